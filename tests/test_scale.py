"""The formulae of docs/scale.md against values by hand, and a small point from measurement to table."""
import importlib
import json
import math

import pytest
import torch
from conftest import ROOT

from utils import InputError

RESULT = ROOT / "results/scale/scale.json"


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("scale")


def test_memory_of_a_gpu_by_hand(scale):
    assert scale.gpu_bytes(1000, 40, 8) == 4 * (4 * 1000 + 41 * 125)  # w, gradient, w_start, passing; P and a part
    assert scale.gpu_bytes(1001, 40, 8) == 4 * (4 * 1001 + 41 * 126)
    assert scale.gpu_bytes(1000, 40, 8, "pbfgs") == scale.gpu_bytes(1000, 40, 8)
    assert scale.gpu_bytes(1000, 40, 8, "pbfgs+") == 4 * (6 * 1000 + 41 * 125)
    assert scale.gpu_bytes(1000, 40, 8, sharded=False) == 4 * 43 * 1000
    assert scale.gpu_bytes(1000, 40, 8, "pbfgs", sharded=False) == 4 * 44 * 1000
    assert scale.largest_D(40, 8) == pytest.approx(80e9 / 36.5)
    assert scale.largest_D(40, 1, sharded=False) == pytest.approx(80e9 / 172)


def test_network_bytes_by_hand(scale):
    assert scale.step_bytes(1000, 40, 8) == 4 * 7 / 8 * (2 * 1000 + 80)
    assert scale.step_bytes(1000, 40, 8, "pbfgs+") == 4 * 7 / 8 * (5 * 1000 + 80)
    assert scale.step_bytes(1000, 40, 8, sharded=False) == 280
    assert scale.step_bytes(1000, 40, 1) == 0


def test_files_checked(scale):
    assert scale.files_checked(81, 1, False) == scale.files_checked(81, 8, True) == 81
    assert scale.files_checked(81, 8, False) == 11  # of process 1: 0, and 1, 9, ..., 73
    assert scale.files_checked(81, 1024, False) == 2


def test_plan_by_hand(scale):
    host = {"checksum": 2e9, "read_warm": 4e9, "finite": 1e8, "mapped_warm": 1e9, "open": 1000}
    plan = scale.plan(10**9, 81, 40, 64, host=host)
    assert plan["disk"] == 324e9 and not plan["loaded"] and plan["files_checked"] == 3
    assert plan["check_read"] == 324e9 + 7 * 4e9 and plan["basis_read"] == 648e9
    assert plan["gram_flops"] == (2 * 81 * 81 + 2 * 81 * 40) * 10**9
    assert plan["check_s"] == pytest.approx(3 * (4 / 1.25 + 4 / 2 + 4 / 4 + 10))  # a node's 10 GB/s among 8
    blocks = math.ceil(15_625_000 / (2**31 // (16 * 81)))
    assert plan["basis_io_s"] == pytest.approx(2 * (81 * 4 * 15_625_000 / 1e9 + blocks * 81 / 1000))
    assert plan["step_network_s"] == pytest.approx(4 * 63 / 64 * (2e9 + 80) / 50e9)
    assert plan["step_memory_s"] == pytest.approx((8 * 40 * 15_625_000 + 32e9) / 3.35e12)
    assert plan["passes_s"] == pytest.approx(6e9 * 8192 / (989e12 * 0.4))
    assert plan["host_bytes"] == 4e9
    loaded = scale.plan(10**9, 81, 40, 256, b=2, host=host)
    assert loaded["loaded"] and loaded["files_checked"] == 81 and loaded["basis_read"] == loaded["basis_io_s"] == 0
    assert loaded["check_read"] == 32 * 162e9 and loaded["host_bytes"] == 2e9 + 4 * 81 * 3_906_250


def test_predictions_by_hand(scale):
    rates = {"read_cold": 1e6, "read_warm": 2e6, "checksum": 4e6, "finite": 1e6, "mapped_cold": 1e6, "mapped_warm": 1e7,
             "open": 100, "gram": 1e6, "lift": 2e6, "to_float64": 1e6, "first_touch": 1e6}
    one = {"rates": rates, "file_bytes": 4_000, "cache_available": 10**6,
           "memory": {"check": {"before": 5}, "basis": {"before": 7}}}
    row = {"D": 1000, "n": 5, "k": 2, "dtype": "float32", "processes": 1, "memory": 16 * 5 * 300}  # 4 blocks of 300
    expected = scale.predicted(row, one)
    assert expected["check"] == pytest.approx(5 * (0.004 + 0.002 + 0.001 + 0.001))
    assert expected["reading"] == pytest.approx([0.02 + 4 * 5 / 100, 0.002 + 4 * 5 / 100])
    assert expected["arithmetic"] == pytest.approx([0.05 + 0.005, 0.01 + 0.005 + 0.008])
    assert expected["check_bytes"] == 5 + 4_000
    assert expected["basis_bytes"] == 7 + 8_000 + 4 * 5 * 300 + 3 * 2**23
    assert scale.predicted(row, one | {"cache_available": 27_000})["reading"][1] == pytest.approx(0.02 + 0.2)


def test_largest_angle(scale):
    P = torch.eye(2, 50, dtype=torch.float64)
    Q = torch.zeros(2, 50, dtype=torch.float64)
    Q[0, 0], Q[0, 7], Q[1, 1] = 3 * math.cos(0.01), 3 * math.sin(0.01), -1
    assert scale.largest_angle(P, Q, width=8) == pytest.approx(0.01, rel=1e-6)
    assert scale.largest_angle(P, torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64) @ P) < 1e-7


def test_a_small_point_from_snapshots_to_table(scale, tmp_path, capsys):
    path, table, scratch = tmp_path / "new" / "scale.json", tmp_path / "scale.md", tmp_path / "scratch"
    scale.main(scale.parse_args(["--points", "20000,9,3,bfloat16,1,0.0001", "--gpus", "8", "--scratch", str(scratch),
                                 "--json", str(path), "--table", str(table)]))
    assert list(scratch.iterdir()) == []
    (row,) = json.loads(path.read_text())["points"]
    (streamed,), (loaded,) = row["streamed"], row["loaded"]
    assert len(streamed["passes"]) == 2 and loaded["passes"] == [] and streamed["P_bytes"] == 4 * 3 * 20000
    assert all(0 < one["reading"] < one["seconds"] < streamed["seconds"]["basis"] for one in streamed["passes"])
    assert loaded["angle"] < 1e-5
    for one in (streamed, loaded):
        assert all(one["memory"][name]["whole"] > one["memory"][name]["before"] > 1e7 for name in ("check", "basis"))
    text = table.read_text()
    assert text in capsys.readouterr().out and "| 20,000 | 9 | 3 | bfloat16 | 1 | 0.0001 |" in text
    assert text.count("| on disk, TB |") == 4  # two D, two kinds of snapshots

    scale.main(scale.parse_args(["--from", str(path), "--gpus", "8", "--table", str(tmp_path / "again.md")]))
    assert (tmp_path / "again.md").read_text() == text


def test_wrong_usage(scale, tmp_path, capsys):
    for text in ("1000,9,9,float32,1,0.000001", "1000,9,3,float32,1,2", "1000,9,3,int8,1,0.000001", "1000"):
        with pytest.raises(SystemExit):
            scale.parse_args(["--points", text])
    assert "is not D,n,k" in capsys.readouterr().err
    with pytest.raises(InputError, match="there is no such file"):
        scale.main(scale.parse_args(["--from", str(tmp_path / "missing.json"), "--scratch", str(tmp_path)]))


@pytest.mark.skipif(not RESULT.is_file(), reason="not measured yet")
def test_recorded_results(scale):
    result = json.loads(RESULT.read_text())
    assert scale.table(result, [10**9, 10**10], [8, 64, 256, 1024]) == (RESULT.parent / "table.md").read_text()
    angles = [one["angle"] for row in result["points"] for one in row["streamed"] + row.get("loaded", [])
              if "angle" in one]
    assert angles and max(angles) <= 1e-5
