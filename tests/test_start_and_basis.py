"""--start, --basis FILE, --save-basis and a share of the variance as --n_components, through the scripts."""
import shutil

import pytest
import torch
from runs import digits_args, digits_run, network, same, state

import models
import report
import trajectory
from dldr.errors import UserError
from dldr.snapshots import load_window

SMALL = network("small")


def run(sampled, output, *flags, method="psgd", epochs=0):
    return digits_run(method, sampled, "--n_components", 3, "--epochs", epochs, *flags, output=output)


@pytest.mark.parametrize(("start", "buffers"), [("first", 1), ("last", 5), ("mean", 5)])
def test_start(sampled, tmp_path, start, buffers):
    """What training starts from: parameters, and of which snapshot batch norm's statistics are."""
    summary = run(sampled, tmp_path, "--params_start", 1, "--params_step", 2, "--n_components", 2, "--start", start)
    assert summary["snapshots"] == 3 and summary["test_accuracy_last"] is None
    final, parameters = state(tmp_path / "psgd_final.pt"), dict(models.get_model(SMALL, 10).named_parameters())
    snapshots = {i: state(sampled / f"{i}.pt") for i in (1, 3, 5)}
    for name, value in final.items():
        if name in parameters and start == "mean":
            torch.testing.assert_close(value, sum(s[name] for s in snapshots.values()) / 3, rtol=0, atol=1e-6)
        else:
            assert torch.equal(value, snapshots[buffers][name])


def test_a_run_stays_in_the_subspace_of_another_start(sampled, tmp_path):
    summary = run(sampled, tmp_path, "--start", "mean", "--basis", "spherical", "--n_components", "0.8", epochs=1)
    k = summary["n_components"]
    assert summary["parameters_trained"] == k < 5 and sum(summary["explained_variance"]["per_component"][:-1]) <= 0.8
    assert summary["explained_variance"]["total"] > 0.8
    (found,) = report.find_runs([tmp_path])
    assert report.label(found) == "P-SGD (spherical, from the mean)"
    with pytest.raises(UserError, match="other flags .start mean -> last"):
        run(sampled, tmp_path, "--start", "last", "--basis", "spherical", "--n_components", "0.8", "--resume", "auto")


@pytest.mark.parametrize("method", ["psgd", "pbfgs"])
def test_a_saved_basis_is_the_basis(sampled, tmp_path, method):
    """Training in it is bitwise training in the window that it is of."""
    file = tmp_path / "basis.pt"
    run(sampled, tmp_path / "a", "--save-basis", file, method=method, epochs=1)
    saved = state(file)
    assert saved["P"].shape == (3, 6282) and saved["made"]["args"]["basis"] == "pca"
    assert len(saved["explained_variance"]) == 3 and list(saved["parameters"])[0] == "conv1.weight"
    summary = run(sampled, tmp_path / "b", "--basis", file, method=method, epochs=1)
    assert same(*(tmp_path / name / f"{method}_final.pt" for name in "ab"))
    assert summary["explained_variance"]["per_component"] == pytest.approx(saved["explained_variance"], rel=1e-3)


def test_a_finished_run_does_not_pass_over_save_basis(sampled, tmp_path):
    run(sampled, tmp_path / "a", epochs=1)
    with pytest.raises(UserError, match="basis.pt: the run in .* is finished and makes no basis"):
        run(sampled, tmp_path / "a", "--save-basis", tmp_path / "basis.pt", "--resume", "auto", epochs=1)


def test_a_basis_serves_a_network_without_a_window(sampled, tmp_path, basis):
    """Fewer of its components are the first ones."""
    (here := tmp_path / "one").mkdir()
    shutil.copy(sampled / "2.pt", here / "0.pt")
    summary = run(here, tmp_path / "c", "--basis", basis, "--params_end", 1, "--n_components", 2, epochs=1)
    assert summary["n_components"] == 2
    assert report.label({"method": "psgd", "args": summary["args"]}) == "P-SGD (basis.pt)"
    end, start = load_window([tmp_path / "c" / "psgd_final.pt", sampled / "2.pt"], models.get_model(SMALL, 10))
    P = state(basis)["P"][:2]
    assert (end - start - P.T @ (P @ (end - start))).norm() < 1e-4 * (end - start).norm()


@pytest.mark.parametrize(("change", "flags", "message"), [
    ({}, ["--n_components", "4"], "has 3 components, --n_components asks for 4"),
    ({"parameters": {"w": [3]}}, [], r"another network: it has w \[3\] where this one has conv1.weight"),
    ({"parameters": {}}, [], "another network: it has nothing"),
    ({"P": torch.ones(3, 6282)}, [], "is not a basis that --save-basis has written"),
    ({"P": None}, [], "is not a basis that --save-basis has written"),
    (None, [], "cannot be read"),
])
def test_files_that_are_no_basis_of_this_network(sampled, tmp_path, basis, change, flags, message):
    file = tmp_path / "bad.pt"
    if change is None:
        file.write_bytes(b"nothing")
    else:
        torch.save({**state(basis), **change}, file)
    with pytest.raises(UserError, match=f"bad.pt.*{message}"):
        run(sampled, tmp_path / "run", "--basis", file, *flags)


@pytest.fixture(scope="module")
def basis(sampled, tmp_path_factory):
    directory = tmp_path_factory.mktemp("basis")
    run(sampled, directory, "--save-basis", directory / "basis.pt")
    return directory / "basis.pt"


def test_another_basis_of_that_name_is_not_resumed_in(sampled, tmp_path, basis):
    file = tmp_path / "basis.pt"
    shutil.copy(basis, file)
    run(sampled, tmp_path / "run", "--basis", file, epochs=1)
    saved = state(file)
    torch.save({**saved, "P": saved["P"].flip(0).contiguous()}, file)
    with pytest.raises(UserError, match="file_digests"):
        run(sampled, tmp_path / "run", "--basis", file, "--resume", "auto", epochs=2)


def foreign(sampled, directory, names):
    """State dicts under other names, wrapped as some trainers save them."""
    directory.mkdir()
    for i, name in enumerate(names):
        torch.save({"state_dict": {f"module.{key}": value for key, value in state(sampled / f"{i}.pt").items()},
                    "epoch": i}, directory / name)
    return directory


@pytest.mark.parametrize("names", [[f"epoch_{10 * i}.pth" for i in range(6)], [f"{10 * i + 10}.pt" for i in range(6)]])
def test_the_trajectory_of_state_dicts_from_elsewhere(sampled, tmp_path, names, monkeypatch, capsys):
    monkeypatch.setattr(trajectory, "GRID", 2)

    def measure(directory, end):
        flags = digits_args(directory, "--n_components", 2, "--samples", 50, "--params_end", end)
        return trajectory.main(trajectory.parse_args(flags))

    theirs = measure(directory := foreign(sampled, tmp_path / "theirs", names), "4")
    assert f"holds 6 state dicts, 0 to 5 in this order: {names[0]} ... {names[-1]}\n" in capsys.readouterr().err
    ours = measure(sampled, "4")
    for key in ("snapshots", "distance_from_start", "distance_from_subspace", "accuracy", "paths", "losses"):
        assert theirs[key] == ours[key]
    with pytest.raises(UserError, match="--params_end 7: --save-dir .*theirs holds 6 state dicts"):
        measure(directory, "7")
    with pytest.raises(UserError, match="lacks 4 of the 4 snapshots"):
        measure(tmp_path, "4")
