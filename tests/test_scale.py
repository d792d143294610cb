"""The formulae of docs/scale.md: what a step holds and sends, counted, and a plan by hand."""
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from dldr import distributed
from dldr.subspace import ProjectedBFGS, ProjectedSGD

N = 8


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made under it and still alive: at most, since peak was set to 0."""

    def __init__(self):
        super().__init__()
        self.made, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                reference = StorageWeakRef(x.untyped_storage())
                self.made[reference.cdata] = reference, x.untyped_storage().nbytes()
        self.made = {key: value for key, value in self.made.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.made.values()))
        return result


@pytest.fixture
def sent(monkeypatch):
    """Stands for N ranks, this one the first, whose collectives take no memory: the numbers that each was given."""
    numbers = []
    monkeypatch.setattr(distributed, "world_size", lambda: N)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda x: numbers.append(2 * x.numel()))
    for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        monkeypatch.setattr(distributed.dist, name, lambda out, x: (out.zero_(), numbers.append(
            max(out.numel(), x.numel()))))
    return numbers


@pytest.mark.parametrize("method", ["psgd", "pbfgs", "pbfgs+"])
@pytest.mark.parametrize("sharded", [True, False])
def test_a_step_holds_and_sends_what_the_formulae_say(script, sent, method, sharded):
    scale, D, k = script("scale"), 100_003, 4
    with Live() as live:
        model = torch.nn.ParameterList([torch.zeros(D)])
        model[0].grad = torch.ones(D)
        P = torch.zeros(k, distributed.columns_per_rank(D) if sharded else D)
        basis = distributed.ShardedBasis(P, D) if sharded else distributed.ReplicatedBasis(P)
        if method == "psgd":
            step = ProjectedSGD(model, basis).step
        else:
            optimizer = ProjectedBFGS(model, basis, alpha=0.1 * (method == "pbfgs+"))
            step = lambda: optimizer.search(0.0, lambda: torch.tensor(-1.0))  # noqa: E731
        step()
        live.peak = 0
        sent.clear()
        step()
    assert live.peak == pytest.approx(scale.gpu_bytes(D, k, N, method, sharded), rel=0.02)
    assert 4 * (N - 1) / N * sum(sent) == pytest.approx(scale.step_bytes(D, k, N, method, sharded), rel=1e-3)


def test_plan_by_hand(script):
    scale = script("scale")
    host = {"checksum": 2e9, "read_warm": 4e9, "finite": 1e8, "mapped_warm": 1e9, "open": 1000}
    plan = scale.plan(10**9, 64, host)
    assert plan["window at `--basis-memory 2`"] == "in files" and plan["files checked by each process"] == 3
    blocks = 10  # of 2**31 // (16 * 81) columns
    assert {key: value for key, value in plan.items() if not isinstance(value, str)} == pytest.approx({
        "on disk, TB": 0.324,
        "files checked by each process": 3,
        "check, read from the file system, TB": 0.324 + 7 * 0.004,
        "basis, read from the file system, TB": 0.648,
        "check, s": 3 * (4 / 1.25 + 4 / 2 + 4 / 4 + 10),  # a node's 10 GB/s among 8
        "basis, reading, s": 2 * (81 * 4 * 0.015625 + blocks * 81 / 1000),
        "basis, arithmetic, s": (2 * 81 * 81 + 2 * 81 * 40) * 1e9 / 64 / 67e12 + 2 * 81 * 15_625_000 * 24 / 3.35e12,
        "host memory per process, one file read or mapped, GB": 4,
        "per GPU: P-BFGS (P-SGD: 4 D less), GB": 20 + 41 * 4 / 64,
        "per GPU: P+-BFGS, GB": 32 + 41 * 4 / 64,
        "per GPU with P whole, P-SGD, GB": 12 + 160,
        "per GPU if w were sharded too (it is not), GB": 180 / 64,
        "sent by each GPU per step, GB": 63 / 64 * 8,
        "step: network, ms": 63 / 64 * 8e3 / 50,
        "step: GPU memory traffic, ms": 1e3 * (8 * 40 * 15_625_000 + 40e9) / 3.35e12,
        "the network's own passes, ms": 1e3 * 6e9 * 8192 / (989e12 * 0.4)}, rel=1e-6)
    loaded = scale.plan(10**9, 256, host, b=2)
    assert loaded["window at `--basis-memory 2`"] == "loaded" and loaded["files checked by each process"] == 81
    assert loaded["check, read from the file system, TB"] == pytest.approx(32 * 0.162)
    assert loaded["basis, reading, s"] == loaded["basis, read from the file system, TB"] == 0
