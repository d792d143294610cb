"""The trajectory seen from the subspace of its first epochs, against float64 by hand."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import digits_args, network
from small_networks import small

import plots
import train_psgd
import trajectory
from dldr.errors import UserError
from dldr.files import checksum
from dldr.snapshots import load_window, snapshot_paths
from dldr.subspace import flat_parameters

FLAGS = ["--datasets", "digits", "--arch", network("small"), "--smalldatasets", "0.3", "--params_end", "4",
         "--n_components", "2", "--device", "cpu"]


def test_distances_accuracies_and_picture(sampled, tmp_path, monkeypatch, capsys):
    """A basis of snapshots 0 to 3 and the steps to all of 0 to 5; the first three lie in a plane with their start."""
    monkeypatch.setattr(trajectory, "GRID", 3)
    argv = digits_args(sampled, "--output-dir", str(tmp_path), *FLAGS[6:10], "--epochs", "2")
    train_psgd.main(train_psgd.parse_args(argv))
    path, figure = tmp_path / "new" / "t.json", tmp_path / "newer" / "t.png"
    trajectory.main(trajectory.parse_args([*FLAGS, "--save-dir", str(sampled), "--samples", "100", "--runs",
                                           str(tmp_path), "--json", str(path), "--figure", str(figure)]))
    result = json.loads(path.read_text())
    assert result["snapshots"] == [0, 5] and figure.read_bytes().startswith(b"\x89PNG")
    assert plots.image(plots.plane(result)) == figure.read_bytes()  # report.py draws it again, to the byte
    assert len(result["losses"]) == 3 and len(result["paths"]["sgd"][0]) == 6 and len(result["paths"]["psgd"][0]) == 3
    assert "snapshot 5 is " in capsys.readouterr().out

    X = load_window(snapshot_paths(sampled, range(6)), small(10)).double().numpy()
    P = np.linalg.svd(X[:4] - X[:4].mean(0), full_matrices=False)[2][:2]
    steps = X - X[0]
    np.testing.assert_allclose(result["distance_from_start"], np.linalg.norm(steps, axis=1), rtol=1e-4, atol=1e-6)
    outside = np.linalg.norm(steps - steps @ P.T @ P, axis=1)
    np.testing.assert_allclose(result["distance_from_subspace"], outside, rtol=1e-2, atol=1e-3)
    assert set(result["accuracy"]) == {"last_snapshot", "projected", "projected_own_statistics"}
    log = [json.loads(line) for line in (sampled / "sgd_log.jsonl").read_text().splitlines()]
    assert result["accuracy"]["last_snapshot"] == pytest.approx(log[-1]["test_accuracy"])


def test_the_surface_is_the_loss_at_its_points(sampled):
    """The plane through `at`: at its own coordinates, counted from the start, the loss is that of `at`."""
    torch.manual_seed(0)
    model = small(10)
    w = flat_parameters(model)
    at, start = w.clone(), torch.randn(len(w))
    P = torch.linalg.qr(torch.randn(len(w), 2))[0].T.contiguous()
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    a, b = (P @ (at - start)).tolist()
    losses = trajectory.surface(model, w, start, at, P, [[a, a + 1.0], [b]], [(x, y)])
    assert losses.shape == (1, 2)
    for loss, point in zip(losses[0], (at, at + P[0]), strict=True):
        w.copy_(point)
        with torch.no_grad():
            assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(model.train()(x), y)), rel=1e-3)


def test_runs_in_other_directions_are_refused(sampled, tmp_path):
    argv = digits_args(sampled, "--output-dir", str(tmp_path), *FLAGS[6:10], "--epochs", "1", "--basis", "random")
    train_psgd.main(train_psgd.parse_args(argv))
    with pytest.raises(UserError, match="has no theta in this basis .--basis random, here pca"):
        trajectory.main(trajectory.parse_args([*FLAGS, "--save-dir", str(sampled), "--runs", str(tmp_path), "--figure",
                                               str(tmp_path / "t.png")]))


def test_runs_of_other_snapshots_windows_and_damaged_logs_are_refused(sampled, tmp_path):
    train_psgd.main(train_psgd.parse_args(
        digits_args(sampled, "--output-dir", str(tmp_path), *FLAGS[6:10], "--epochs", "1")))
    log, args = tmp_path / "psgd_log.jsonl", trajectory.parse_args([*FLAGS, "--save-dir", str(sampled)])
    window = checksum(*snapshot_paths(sampled, range(4)))
    assert len(trajectory.read_path(log, args, window)) == 2
    with pytest.raises(UserError, match="of other snapshots"):
        trajectory.read_path(log, args, "of another seed")
    (tmp_path / "psgd_summary.json").unlink()  # as in a run that has not ended
    assert len(trajectory.read_path(log, args, window)) == 2
    with pytest.raises(UserError, match="of other snapshots"):
        trajectory.read_path(log, args, "of another seed")
    args.params_end = 5
    with pytest.raises(UserError, match="--params_end 4, here 5"):
        trajectory.read_path(log, args, checksum(*snapshot_paths(sampled, range(5))))
    for path, content in ((log, log.read_text()[:-9]), (tmp_path / "psgd_args.json", "{}")):
        whole = path.read_text()
        path.write_text(content)
        with pytest.raises(UserError, match="psgd_log.jsonl.*missing or damaged"):
            trajectory.read_path(log, args, window)
        path.write_text(whole)


@pytest.mark.parametrize("missing", [2, 4])
def test_a_gap_in_the_snapshots_is_named(sampled, tmp_path, missing):
    shutil.copytree(sampled, tmp_path / "run")
    (tmp_path / "run" / f"{missing}.pt").unlink()
    with pytest.raises(UserError, match=rf"has 5\.pt but no {missing}\.pt"):
        trajectory.main(trajectory.parse_args([*FLAGS, "--params_end", "6", "--params_step", "2", "--params_start",
                                               "1", "--save-dir", str(tmp_path / "run")]))


def test_snapshots_that_span_too_little_are_refused(sampled, tmp_path):
    for name, i in {"a1.pt": 0, "a2.pt": 1, "a3.pt": 1, "a4.pt": 2}.items():
        shutil.copy(sampled / f"{i}.pt", tmp_path / name)
    with pytest.raises(UserError, match="--n_components"):
        trajectory.main(trajectory.parse_args([*FLAGS, "--n_components", "3", "--save-dir", str(tmp_path)]))


def test_one_component_is_a_plane_too(sampled, tmp_path, monkeypatch):
    monkeypatch.setattr(trajectory, "GRID", 3)
    flags = [*FLAGS, "--n_components", "1", "--save-dir", str(sampled)]
    train_psgd.main(train_psgd.parse_args([*flags, "--output-dir", str(tmp_path), "--epochs", "1"]))
    result = trajectory.main(trajectory.parse_args([*flags, "--samples", "8", "--runs", str(tmp_path), "--figure",
                                                    str(tmp_path / "t.png")]))
    assert all(len(point) == 2 for lines in result["paths"].values() for line in lines for point in line)


def test_checkpoints_are_no_snapshots_and_directories_of_runs_exist(sampled, tmp_path):
    for name in ("0.pt", "2.pt", "3.pt", "sgd_checkpoint.pt", "sgd_final.pt"):
        shutil.copy(sampled / name, tmp_path)
    flags = digits_args(tmp_path, "--params_end", 3, "--n_components", 2)
    paths, every = trajectory.snapshots(trajectory.parse_args(flags))
    assert [path.name for path in every] == [path.name for path in paths] == ["0.pt", "2.pt", "3.pt"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        trajectory.main(trajectory.parse_args(digits_args(
            sampled, "--params_end", 4, "--n_components", 2, "--runs", tmp_path / "nowhere")))
    with pytest.raises(SystemExit):
        trajectory.parse_args([*flags, "--figure", "a.pdf"])
