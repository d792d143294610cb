"""P-SGD: momentum SGD on theta, and at the same time SGD on w with the projected gradient."""

import io

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from networks import mlp, tensors, train

import models
from dldr.subspace import ProjectedSGD, flat_parameters


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_equals_momentum_sgd_on_theta(momentum):
    """40 iterations, the lr falling to a tenth after half of them, with the velocity kept."""
    w0, P, data = oracle.problem(40)
    rates = [1.0] * 20 + [0.1] * 20
    expected = oracle.psgd(w0, P, [oracle.mlp(*batch) for batch in data], lr=rates, momentum=momentum)
    model, w = mlp(w0)
    psgd = ProjectedSGD(model, torch.from_numpy(P), lr=1.0, momentum=momentum)
    history = train(model, psgd, tensors(data[:20]))
    set_lr(psgd, 0.1)
    history += train(model, psgd, tensors(data[20:]))
    for w, w_expected in zip(history, expected, strict=True):
        assert np.abs(w.numpy() - w_expected).max() < 1e-10
    # the drop, and the momentum, are no small matter here
    for other in ({"lr": 1.0, "momentum": momentum}, {"lr": rates, "momentum": 0.5}):
        w_other = oracle.psgd(w0, P, [oracle.mlp(*batch) for batch in data], **other)[-1]
        assert np.abs(w.numpy() - w_other).max() > 0.05


def test_equals_sgd_on_all_parameters_with_the_projected_gradient():
    """g <- P^T P g, then torch's SGD on w: how the paper writes it, and D instead of k numbers of momentum."""
    w0, P, data = oracle.problem(40)
    P, batches = torch.from_numpy(P), tensors(data)

    model, w = mlp(w0)
    psgd = ProjectedSGD(model, P)
    history = train(model, psgd, batches[:20])
    set_lr(psgd, 0.1)
    history += train(model, psgd, batches[20:])

    model, w = mlp(w0)
    optimizer = torch.optim.SGD([w], lr=1.0, momentum=0.9)
    expected = []
    for i, (x, y) in enumerate(batches):
        set_lr(optimizer, 1.0 if i < 20 else 0.1)
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        w.grad = P.T @ (P @ torch.cat([g.reshape(-1) for g in gradients]))
        optimizer.step()
        expected.append(w.clone())
    for w, w_expected in zip(history, expected, strict=True):
        assert torch.allclose(w, w_expected, rtol=0, atol=1e-10)
    assert np.abs(w.numpy() - w0).max() > 0.1


def test_accumulation_averages_the_gradients_of_a_group():
    """Groups of 3 of 11 mini-batches: w after each, the leftover group of 2 divided by 2."""
    w0, P, data = oracle.problem(11)

    def mean(group):
        objectives = [oracle.mlp(*batch) for batch in group]
        return lambda w: (None, np.mean([objective(w)[1] for objective in objectives], axis=0))

    expected = oracle.psgd(w0, P, [mean(group) for group in oracle.groups(data, 3)])
    model, w = mlp(w0)
    history = train(model, ProjectedSGD(model, torch.from_numpy(P)), tensors(data), accumulate=3)
    assert len(history) == 4
    for w, w_expected in zip(history, expected, strict=True):
        assert np.abs(w.numpy() - w_expected).max() < 1e-10


def test_another_basis_of_the_same_span_gives_the_same_networks():
    """Rows of P rotated: the same w after every iteration."""
    w0, P, data = oracle.problem(30, seed=1)
    runs = []
    for basis in (P, oracle.rotation(len(P)) @ P):
        model, w = mlp(w0)
        runs.append(train(model, ProjectedSGD(model, torch.from_numpy(basis)), tensors(data)))
    for w, w_rotated in zip(*runs, strict=True):
        assert torch.allclose(w, w_rotated, rtol=0, atol=1e-8)
    assert np.abs(w.numpy() - w0).max() > 0.1


def test_a_network_in_float32_stays_in_the_subspace():
    """w - w_start lies in span(P) but for one rounding of w (6e-8 |w|), however many steps were taken."""
    torch.manual_seed(0)
    model = models.get_model("resnet8", 10)
    w = flat_parameters(model)
    batches = [(torch.randn(16, 3, 32, 32), torch.randint(10, (16,))) for _ in range(5)]
    gradients = []
    for x, y in batches:
        gradient = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        gradients.append(torch.cat([g.reshape(-1) for g in gradient]).double())
    P = torch.linalg.qr(torch.stack(gradients).T)[0].T.float().contiguous()
    start = w.double()
    train(model, ProjectedSGD(model, P, lr=0.1), batches + batches)
    moved = w.double() - start
    basis = torch.linalg.qr(P.double().T)[0].T
    assert moved.norm() > 0.5
    assert (moved - basis.T @ (basis @ moved)).norm() <= 1e-5 * moved.norm()


@pytest.mark.parametrize("first", [0, 8])
def test_the_state_continues_a_run_bitwise(first):
    """`first` iterations, the state through a file, the rest by another object: as if uninterrupted, in float32."""
    w0, P, data = oracle.problem(16)
    P, batches = torch.from_numpy(P).float(), tensors(data, torch.float32)

    def start(w0, lr=1.0):
        model, w = mlp(w0, torch.float32)
        return model, w, ProjectedSGD(model, P, lr=lr)

    model, w, psgd = start(w0)
    uninterrupted = train(model, psgd, batches)

    model, w, psgd = start(w0)
    if first:
        train(model, psgd, batches[:first])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "algorithm": psgd.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    model, w, psgd = start(w0 + 1, lr=0.3)
    train(model, psgd, batches[::-1][:5])  # a start, theta, velocity and lr of its own, which must be gone
    model.load_state_dict(state["model"])
    psgd.load_state_dict(state["algorithm"])
    rest = train(model, psgd, batches[first:])
    for w, w_whole in zip(rest, uninterrupted[first:], strict=True):
        assert torch.equal(w, w_whole)
