"""The examples run, print their table, and are short."""
import importlib.util
import re

import pytest
from runs import ROOT


@pytest.mark.parametrize(("name", "arguments", "least"), [
    ("tabular", {"epochs": 12, "k": 4}, 85), ("vision_transformer", {"file": "none", "epochs": 6, "k": 5}, 50)])
def test_examples_print_the_three_methods_side_by_side(name, arguments, least, capsys):
    path = ROOT / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(**arguments)
    rows = re.findall(r"^(\S+) +([\d,]+) +(\d+) +([\d.]+)$", capsys.readouterr().out, re.M)
    assert [row[0] for row in rows] == ["SGD", "P-SGD", "P-BFGS"] and rows[1][1] == rows[2][1] == str(arguments["k"])
    assert all(float(accuracy) > least for *_, accuracy in rows)
    assert len(path.read_text().splitlines()) <= 60
