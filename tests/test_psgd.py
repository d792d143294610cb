"""P-SGD against an independent float64 oracle, momentum SGD on theta: in the scripts' loop and in others' loops."""
import numpy as np
import oracle
import pytest
import torch
from networks import closure, loss_of, mlp, step, tensors, train
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR

from dldr import ProjectedSGD

SCHEDULES = {"multistep": lambda o: MultiStepLR(o, [4, 8]), "cosine": lambda o: CosineAnnealingLR(o, 12),
             "linear": lambda o: LinearLR(o, 0.1, total_iters=8)}


def objective(group, combine=np.mean, clip=np.inf):
    """The gradient, as `combine` makes it of those of a group of mini-batches, clipped at a norm of `clip`."""
    def at(w):
        gradient = combine([oracle.mlp(*batch)(w)[1] for batch in group], axis=0)
        return None, gradient * min(1, clip / (np.linalg.norm(gradient) + 1e-6))

    return at


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_scripts_loop(momentum, accumulate):
    """Two epochs, the lr of the second a tenth, with the velocity kept; groups of 3 average, the last one of 2 too."""
    w0, P, data = oracle.problem(40)
    groups = [group for epoch in (data[:20], data[20:]) for group in oracle.groups(epoch, accumulate)]
    rates = np.repeat([1.0, 0.1], len(groups) // 2)
    model, _ = mlp(w0)
    psgd = ProjectedSGD(model, torch.from_numpy(P), lr=1.0, momentum=momentum)
    history = train(model, psgd, tensors(data[:20]), accumulate)
    psgd.param_groups[0]["lr"] = 0.1
    history += train(model, psgd, tensors(data[20:]), accumulate)
    expected = oracle.psgd(w0, P, list(map(objective, groups)), lr=rates, momentum=momentum)
    assert len(history) == len(expected)
    for w, w_expected in zip(history, expected, strict=True):
        assert np.abs(w.numpy() - w_expected).max() < 1e-10
    # the drop, and the momentum, are no small matter here
    for other in ({"lr": 1.0, "momentum": momentum}, {"lr": rates, "momentum": 0.5}):
        w_other = oracle.psgd(w0, P, list(map(objective, groups)), **other)[-1]
        assert np.abs(w.numpy() - w_other).max() > 0.05


@pytest.mark.parametrize(("schedule", "clip", "accumulate"), [
    *((schedule, np.inf, 1) for schedule in (None, *SCHEDULES)), (None, 0.05, 1), (None, np.inf, 3)])
@pytest.mark.parametrize("zero_grad", ["optimizer", "optimizer in place", "model", "model in place"])
def test_an_ordinary_loop(zero_grad, schedule, clip, accumulate):
    """With torch's schedulers, clipping, and gradients that are accumulated by hand."""
    w0, P, data = oracle.problem(12)
    model, w = mlp(w0)
    optimizer, rates = ProjectedSGD(model, torch.from_numpy(P), lr=0.3), []
    scheduler = schedule and SCHEDULES[schedule](optimizer)
    for i, (x, y) in enumerate(tensors(data), 1):
        loss_of(model, x, y).backward()
        if i % accumulate:
            continue
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler:
            scheduler.step()
        zeroes = optimizer if zero_grad.startswith("optimizer") else model
        zeroes.zero_grad(set_to_none="in place" not in zero_grad)
    objectives = [objective(group, np.sum, clip) for group in oracle.groups(data, accumulate)]
    expected = oracle.psgd(w0, P, objectives, lr=rates)
    assert np.abs(w.numpy() - expected[-1]).max() < 1e-10
    plain = oracle.psgd(w0, P, [objective([batch]) for batch in data], lr=0.3)
    usual = schedule is None and clip == np.inf and accumulate == 1
    assert (np.abs(plain[-1] - expected[-1]).max() > 1e-3) != usual and np.abs(plain[-1] - w0).max() > 0.05


def test_a_closure_is_called_as_torch_sgd_does():
    w0, P, data = oracle.problem(8)
    model, w = mlp(w0)
    optimizer = ProjectedSGD(model, torch.from_numpy(P))
    for batch in tensors(data):
        expected = loss_of(model, *batch).item()
        with torch.no_grad():  # the closure gets autograd back
            assert optimizer.step(closure("for LBFGS", optimizer, model, batch)).item() == expected
    assert np.abs(w.numpy() - oracle.psgd(w0, P, [objective([batch]) for batch in data])[-1]).max() < 1e-10


@pytest.mark.parametrize("change", [
    lambda model, w: model.load_state_dict({n: v + 0.01 for n, v in model.state_dict().items()}),
    lambda model, w: w.add_(0.01), lambda model, w: [p.data.add_(0.01) for p in model.parameters()],
], ids=["loaded", "w", "data"])
def test_what_others_do_to_the_model_is_kept(change):
    """Weights loaded after the optimiser was made, or in the middle of a run: steps go on from there."""
    w0, P, data = oracle.problem(8)
    model, w = mlp(w0 + 1)
    optimizer = ProjectedSGD(model, torch.from_numpy(P))
    model.load_state_dict(mlp(w0)[0].state_dict())
    for batch in tensors(data):
        step(optimizer, model, *batch)
    assert np.abs(w.numpy() - oracle.psgd(w0, P, [objective([batch]) for batch in data])[-1]).max() < 1e-10
    before, theta = w.clone(), optimizer.theta.clone()
    change(model, w)
    moved = w.clone()
    assert (moved - before).norm() > 0.01
    step(optimizer, model, *tensors(data)[0])
    assert torch.allclose(w, moved + torch.from_numpy(P).T @ (optimizer.theta - theta), rtol=0, atol=1e-12)
