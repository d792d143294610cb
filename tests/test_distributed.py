"""Several processes as one run: the same networks, files, errors and checkpoints as with one. On a CPU, by gloo."""
import json
import os
import signal
import socket
import time

import numpy as np
import pytest
import torch
from oracle import angle
from processes import (
    Ranks,
    as_rank,
    command,
    command_without_torchrun,
    run_all,
    run_with_one_network,
    start,
    without_evaluation,
)
from runs import SCRIPTS, WINDOW, digits_args, digits_run, log_of, network, run, same, state
from small_networks import small

import datasets
import utils
from dldr import distributed
from dldr.errors import UserError
from dldr.snapshots import load_window, snapshot_paths
from dldr.subspace import flat_parameters, pca_basis


def final(directory, method):
    """The final network's parameters as one vector."""
    return torch.cat([value.reshape(-1).double() for value in state(directory / f"{method}_final.pt").values()])


ALGORITHMS = {  # name: (method, flags)
    "sgd": ("sgd", []), "adam": ("sgd", ["--optimizer", "adam"]), "accumulated": ("sgd", ["--accumulate", "2"]),
    **{f"{name}{shard}": (method, [*WINDOW, "--shard-basis", shard, *flags]) for shard in ("on", "off")
       for name, method, flags in (("psgd", "psgd", []), ("pbfgs", "pbfgs", []),
                                   ("pbfgs_plus", "pbfgs", ["--alpha", "0.01"]))},
    "streamed": ("psgd", [*WINDOW, "--basis-memory", "1e-5"]),
}


def test_1_2_and_4_processes_train_the_same_network(tmp_path):
    """7 steps of each algorithm, with a last mini-batch of 47 that 2 and 4 do not divide.

    Rounding grows faster in P+-BFGS, and in Adam, whose steps of 1e-3 are as long where a gradient is only rounding.
    """
    shots, arch, lr = tmp_path / "shots", network("fixed_batch_norm"), 0.02
    digits_run("sgd", shots, "--epochs", 5, "--lr", lr, "--arch", arch)
    rates = {"sgd": lr, "adam": lr / 50, "accumulated": lr, **dict.fromkeys(("psgdon", "psgdoff", "streamed"), 10 * lr)}

    def calls(n):
        for name, (method, flags) in ALGORITHMS.items():
            where = tmp_path / f"{name}_{n}"
            places = [where] if method == "sgd" else [shots, "--output-dir", where]
            yield method, digits_args(*places, "--epochs", 1, *flags, "--arch", arch, "--lr", rates.get(name, 1))

    run_all(calls(1))
    for n in (2, 4):
        ranks = Ranks(n, tmp_path, run_all, list(calls(n)))
        assert ranks.wait() == [0] * n, ranks.err(0) + ranks.err(1)
        assert " 1/1 " in ranks.out(0) and not ranks.out(1)
        for name, (method, _) in ALGORITHMS.items():
            one, several = (final(tmp_path / f"{name}_{m}", method) for m in (1, n))
            bound = 1e-3 if name == "adam" else 1e-4 if "plus" in name else 1e-5
            assert float((one - several).abs().max()) <= bound, (name, n)
            for ours, theirs in zip(*(log_of(tmp_path / f"{name}_{m}", method) for m in (1, n)), strict=True):
                assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
                assert ours["train_accuracy"] == pytest.approx(theirs["train_accuracy"], abs=0.5)
                assert ours["test_accuracy"] == pytest.approx(theirs["test_accuracy"], abs=0.6)
                assert ours.get("trials_per_step") == theirs.get("trials_per_step")
        summary = json.loads((tmp_path / f"psgdon_{n}" / "psgd_summary.json").read_text())
        assert summary["hardware"]["processes"] == n


def test_every_process_has_the_same_parameters_and_bits(sampled, tmp_path):
    """Batch norm's statistics differ, and yet after P-BFGS and P-SGD, sharded or not, all hold one w, bit for bit."""
    calls = [(method, digits_args(sampled, "--output-dir", tmp_path / f"{method}{shard}", "--epochs", 1, *WINDOW,
                                  "--shard-basis", shard)) for method in ("psgd", "pbfgs") for shard in ("on", "off")]
    ranks = Ranks(3, tmp_path, run_with_one_network, calls)
    assert ranks.wait() == [0] * 3, ranks.err(1)


def check_bases(paths, P, shares, w, start, spherical):
    """Of the window, sharded over the ranks, loaded and streamed: the span of P (4, D), what it explains, the start."""
    utils.set_up("cpu")
    sharded = distributed.world_size() > 1
    P, w, model = torch.from_numpy(P), torch.from_numpy(w), small(10)  # a tensor would travel in shared memory
    for memory in (float("inf"), 4 * 10**4, 10**4):
        window = load_window(paths, model, memory=memory, sharded=sharded, start=start)
        assert memory > 10**5 or max(block.numel() * 4 for block in window.blocks()) <= memory / 4
        torch.testing.assert_close(flat_parameters(model), w, rtol=0, atol=1e-6 * (start == "mean"))
        part, explained = pca_basis(window, 4, spherical=spherical, group=distributed if sharded else None)
        assert part.shape == (4, len(range(P.shape[1])[distributed.columns(P.shape[1])]))
        rows = torch.stack([distributed.all_gather(row, P.shape[1]) if sharded else row for row in part])
        np.testing.assert_allclose(explained, shares, rtol=1e-9)
        assert angle(rows, P) <= 1e-5


@pytest.mark.parametrize(("n", "start", "spherical"), [(1, "first", False), (1, "mean", True), (3, "mean", False),
                                                       (3, "last", True)])
def test_sharded_and_streamed_basis_is_the_plain_one(sampled, tmp_path, n, start, spherical):
    paths, model = snapshot_paths(sampled, range(6)), small(10)
    P, shares = pca_basis(load_window(paths, model, start=start), 4, spherical=spherical)
    ranks = Ranks(n, tmp_path, check_bases, paths, P.numpy(), shares, flat_parameters(model).numpy(), start, spherical)
    assert ranks.wait() == [0] * n, ranks.err(0)


def test_a_damaged_file_of_a_streamed_window_is_named(sampled, tmp_path):
    for i in range(4):
        values = state(sampled / f"{i}.pt")
        if i == 2:
            values["conv1.weight"][0] = float("nan")
        torch.save(values, tmp_path / f"{i}.pt", _use_new_zipfile_serialization=i != 3)
    model = small(10)
    with pytest.raises(UserError, match=r"2\.pt: conv1.weight"):
        load_window(snapshot_paths(tmp_path, range(3)), model, memory=10**4)
    with pytest.raises(UserError, match=r"3\.pt.*--basis-memory"):
        load_window([tmp_path / "0.pt", tmp_path / "3.pt"], model, memory=10**4)
    (tmp_path / "4.pt").write_bytes((sampled / "4.pt").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"4\.pt cannot be read.*truncated"):
        load_window([tmp_path / "0.pt", tmp_path / "4.pt"], model, memory=10**4)


@pytest.mark.parametrize(("samples", "batch"), [(431, 64), (7, 7)])
def test_every_sample_goes_to_one_process(samples, batch, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    for training in (True, False):
        parts = []
        for rank in range(3):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            parts.append(datasets.shares(samples, batch, training))
        seen = sorted(i for ranges in parts for first, last in ranges for i in range(first, last))
        assert seen == list(range(samples))
        if training:
            whole = [sum(last - first for first, last in step) for step in zip(*parts, strict=True)]
            assert whole == datasets.batch_sizes(samples, batch)
    with pytest.raises(UserError, match="--batch-size 4"):
        datasets.shares(10, 4, True)


RESNET8 = ["--lr", "0.05", "--arch", "resnet8", "--smalldatasets", "0.1"]


def begun(tmp_path, argv, file):
    """Two ranks of a run that has written this file."""
    ranks, deadline = Ranks(2, tmp_path, command, "sgd", argv), time.monotonic() + 60
    while not (tmp_path / "run" / file).is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    return ranks


@pytest.mark.parametrize(("harm", "seconds"), [(signal.SIGKILL, 20), (signal.SIGSTOP, 25)])
def test_a_dead_or_silent_process_ends_the_others(harm, seconds, tmp_path):
    """Within the timeout, with one line; and one process goes on from the checkpoint of the two."""
    argv = digits_args(tmp_path / "run", *RESNET8, "--save-every", 1, "--timeout", 8, "--resume", "auto")
    ranks = begun(tmp_path, [*argv, "--epochs", "1000"], "sgd_checkpoint.pt")
    os.kill(ranks.members[1].pid, harm)
    since = time.monotonic()
    ranks.members[0].join(60)
    assert time.monotonic() - since < seconds
    ranks.members[1].kill()
    assert ranks.wait() == [1, -signal.SIGKILL]
    line = ranks.err(0).strip()
    assert "\n" not in line and "another process of this run" in line and "--resume auto" in line
    done = len(log_of(tmp_path / "run", "sgd"))
    run("sgd", [*argv, "--epochs", str(done + 1)])
    assert [line["epoch"] for line in log_of(tmp_path / "run", "sgd")] == list(range(1, done + 2)) and done >= 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_to_which_no_others_come_ends_in_time(rank, tmp_path):
    """A leftover environment, say; also if the error is another one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for more, status, words in (([], 1, "another process of this run"), (["--lr", "x"], 2, "--lr")):
        process = start(as_rank, rank, 2, port, tmp_path / "out", command_without_torchrun, "sgd",
                        digits_args(tmp_path / "run", "--timeout", "1", *more))
        process.join(20)
        assert process.exitcode == status
        lines = (tmp_path / f"out.err{rank}").read_text().splitlines()  # torch may warn before
        assert [words in line for line in lines if line.startswith("train_sgd.py: ")] == [True], lines


@pytest.mark.parametrize("method", SCRIPTS)
def test_a_checkpoint_of_two_resumes_as_one_and_as_four(method, tmp_path):
    """To the network that one process alone would have had, up to rounding."""
    shots = tmp_path / "shots"
    arch = ["--arch", network("no_batch_norm")]
    digits_run("sgd", shots, "--epochs", 5, "--lr", 0.05, *arch)

    def argv(name, epochs):
        places = [tmp_path / name] if method == "sgd" else [shots, "--output-dir", tmp_path / name, *WINDOW]
        rate = 0.05 if method == "sgd" else 0.5
        return digits_args(*places, "--resume", "auto", "--epochs", epochs, *arch, "--lr", rate)

    run(method, argv("whole", 3))
    for n, epochs in ((2, 1), (1, 2), (4, 3)):
        if n == 1:
            run(method, argv("parts", epochs))
        else:
            ranks = Ranks(n, tmp_path, run, method, argv("parts", epochs))
            assert ranks.wait() == [0] * n, ranks.err(0)
    difference = float((final(tmp_path / "whole", method) - final(tmp_path / "parts", method)).abs().max())
    assert difference <= (1e-4 if method == "pbfgs" else 1e-5)  # rounding, which its steps let grow


def test_a_signal_to_one_process_stops_all_and_leaves_a_checkpoint(tmp_path):
    argv = digits_args(tmp_path / "run", *RESNET8, "--epochs", "1000", "--save-every", "1000")
    ranks = begun(tmp_path, argv, "1.pt")
    os.kill(ranks.members[1].pid, signal.SIGTERM)
    assert ranks.wait(30) == [143, 143]
    lines = (ranks.err(0) + ranks.err(1)).strip()
    assert "\n" not in lines and "stopped by SIGTERM" in lines
    assert (tmp_path / "run" / "sgd_checkpoint.pt").is_file()


@pytest.mark.parametrize("more", [["--batch-size", "1"], ["--smalldatasets", "0"], ["--cuda-graphs", "on"],
                                  ["--data", "/nowhere", "--datasets", "ImageNet", "--arch", "resnet18"]])
def test_bad_input_is_one_line_of_one_process(more, tmp_path):
    ranks = Ranks(3, tmp_path, command, "sgd", [*digits_args(tmp_path / "run", "--epochs", "1"), *more])
    statuses = ranks.wait(60)
    assert set(statuses) <= {1, 2} and len(set(statuses)) == 1
    lines = "".join(ranks.err(rank) for rank in range(3)).strip()
    assert "\n" not in lines and more[-2 if more[0] != "--data" else 0] in lines


def test_what_only_the_first_process_sees_is_one_line_too(sampled, tmp_path):
    """A directory with another run's results, which process 0 looks into; nothing in it changes."""
    digits_run("sgd", tmp_path / "run", "--epochs", 1, "--lr", 0.05)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    ranks = Ranks(2, tmp_path, command, "sgd", digits_args(tmp_path / "run", "--epochs", "1", "--lr", "0.1"))
    assert ranks.wait(60) == [1, 1]
    lines = (ranks.err(0) + ranks.err(1)).strip()
    assert "\n" not in lines and "lr 0.05 -> 0.1" in lines
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_processes_that_find_different_data_are_refused(own, tmp_path):
    """As of a split that is drawn without a seed: one process would train on another's test samples."""
    file = own("import os\nimport numpy as np\nX, Y = np.random.rand(90, 9), np.arange(90) % 3\ndef split():\n"
               "    n = 60 + int(os.environ['RANK'])\n    return X[:n], Y[:n], X[n:], Y[n:], 3\n"
               "def net(num_classes):\n    import torch\n    return torch.nn.Linear(9, num_classes)\n")
    ranks = Ranks(2, tmp_path, command, "sgd", ["--datasets", f"{file}:split", "--arch", f"{file}:net", "--epochs", "1",
                                                "--device", "cpu", "--save-dir", str(tmp_path / "run")])
    assert ranks.wait(60) == [1, 1] and not (tmp_path / "run").exists()
    lines = (ranks.err(0) + ranks.err(1)).strip()
    assert "\n" not in lines and "the processes find different data" in lines


def test_a_network_that_skips_blocks_trains_on_two(tmp_path):
    """Stochastic depth: some parameters have a gradient on one process only, or in one mini-batch only."""
    argv = digits_args(tmp_path / "run", "--epochs", "1", "--arch", "stochasticdepth18", "--smalldatasets", "0.02",
                       "--batch-size", "8", "--lr", "0.01", "--accumulate", "2")
    ranks = Ranks(2, tmp_path, without_evaluation, run_with_one_network, [("sgd", argv)])
    assert ranks.wait() == [0, 0], ranks.err(0)


@pytest.mark.parametrize("flags", [[], ["--accumulate", "2"]])
def test_parameters_without_gradient_stay_where_they_are(flags, tmp_path):
    """Weight decay moves them neither on one process nor on two, which train the same network."""
    def argv(n):
        return digits_args(tmp_path / str(n), "--epochs", "1", "--lr", "0.05", "--arch", network("unused_layer"),
                           *flags)

    run("sgd", argv(1))
    ranks = Ranks(2, tmp_path, run_with_one_network, [("sgd", argv(2))])
    assert ranks.wait() == [0, 0], ranks.err(0)
    assert float((final(tmp_path / "1", "sgd") - final(tmp_path / "2", "sgd")).abs().max()) <= 1e-5
    for n in "12":
        assert torch.equal(*(state(tmp_path / n / f"{i}.pt")["0.unused.weight"] for i in (0, 1)))


def test_snapshots_in_bfloat16(tmp_path, capsys):
    """Half the size but for the initialisation, batch-norm statistics as they are, and their span is near."""
    for dtype in ("float32", "bfloat16"):
        digits_run("sgd", tmp_path / dtype, "--epochs", 5, "--lr", 0.05, "--snapshot-dtype", dtype)
    plain, half = (state(tmp_path / dtype / "5.pt") for dtype in ("float32", "bfloat16"))
    names = {name for name, _ in small(10).named_parameters()}
    for name, value in plain.items():
        assert torch.equal(half[name], value.bfloat16() if name in names else value)
    assert same(tmp_path / "float32" / "0.pt", tmp_path / "bfloat16" / "0.pt")
    bases = [pca_basis(load_window(snapshot_paths(tmp_path / dtype, range(6)), small(10)), 3)[0]
             for dtype in ("float32", "bfloat16")]
    assert angle(*bases) < 0.1  # seen: 0.07
    assert capsys.readouterr().err.count("holds torch.bfloat16; converted") == 1


def test_pretrained_file_is_where_training_starts(sampled, tmp_path):
    final = state(sampled / "sgd_final.pt")
    torch.save({f"module.{name}": value for name, value in final.items()}, tmp_path / "weights.pt")
    for source in (tmp_path / "weights.pt", sampled / "sgd_checkpoint.pt"):
        where = tmp_path / source.stem
        digits_run("sgd", where, "--epochs", 1, "--lr", 0.001, "--pretrained", source)
        assert same(where / "0.pt", final)
    with pytest.raises(UserError, match="--pretrained .*weights.pt does not fit"):
        digits_run("sgd", tmp_path / "other", "--pretrained", tmp_path / "weights.pt", "--arch", "resnet20")
