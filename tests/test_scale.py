"""The formulae of docs/scale.md: what a step holds and sends, counted (its tables: test_benchmark.py)."""
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
