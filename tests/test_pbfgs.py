"""P-BFGS against an independent float64 oracle, and the properties that the method promises."""
import copy
import itertools
import math

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from networks import DOUBLE, closure, loss_of, mlp, step, tensors
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

import models
from dldr.engine import Loop
from dldr.subspace import ProjectedBFGS, armijo, bfgs_update


def recorded(pbfgs):
    """A list that grows with each iteration: (w after it, Search, was the BFGS update skipped)."""
    history, search = [], pbfgs.search

    def recording(*args):
        skipped = pbfgs.skipped
        found = search(*args)
        history.append((pbfgs.w.clone(), found, pbfgs.skipped > skipped))
        return found

    pbfgs.search = recording
    return history


def drive(w0, P, objectives, **options):
    """P-BFGS on a bare vector from w0, one numpy objective per iteration; the optimiser and its history."""
    model = nn.Module()
    model.values = nn.Parameter(torch.tensor(w0, dtype=DOUBLE))
    pbfgs = ProjectedBFGS(model, torch.from_numpy(P), **options)
    history, w = recorded(pbfgs), pbfgs.w
    for objective in objectives:
        loss, grad = objective(w.numpy())
        pbfgs.search(loss, lambda: torch.tensor(objective(w.numpy())[0], dtype=DOUBLE), torch.from_numpy(grad))  # noqa: B023
    return pbfgs, history


def assert_same_history(history, expected, w0, rtol=1e-6):
    """The same trials, acceptance and skips, and in every iteration the same step but for rtol of its length."""
    before, before_expected = w0, w0
    for i, ((w, search, skipped), line) in enumerate(zip(history, expected, strict=True)):
        assert (search.trials, search.accepted, skipped) == (line.trials, line.accepted, bool(line.skipped)), i
        moved, moved_expected = w.numpy() - before, line.w - before_expected
        length = np.linalg.norm(moved_expected)
        assert length > 0 and np.linalg.norm(moved - moved_expected) <= rtol * length, i
        before, before_expected = w.numpy(), line.w


# ------------------------------------------------------------------------------------------------------ oracle


@pytest.mark.parametrize("alpha", [0.0, 0.05])
@pytest.mark.parametrize(("batches", "accumulate"), [(45, 1), (101, 3)])
@pytest.mark.parametrize("how", ["the scripts' loop", "loss only", "for LBFGS"])
def test_training_equals_the_oracle(how, batches, accumulate, alpha):
    """Every iteration of real training: by the scripts' loop, over three epochs or in groups with a leftover of two
    mini-batches; and by closures, or lists of them.

    Small mini-batches make all branches happen: accepted at once, shrunk, and skipped updates; and, where the
    direction comes from three mini-batches and the search from the last alone, searches that fail.
    """
    w0, P, data = oracle.problem(batches, seed=1)
    options = {"lr": 2.0, "alpha": alpha, "gamma": 0.8}
    expected = oracle.pbfgs(w0, P, [oracle.mlp(*batch) for batch in data], accumulate=accumulate, **options)
    assert any(line.accepted and line.trials == 1 for line in expected)
    assert any(line.accepted and line.trials > 1 for line in expected)
    assert any(line.skipped for line in expected)
    if accumulate > 1:
        assert batches % accumulate == 2 and any(not line.accepted for line in expected)

    model, w = mlp(w0)
    pbfgs = ProjectedBFGS(model, torch.from_numpy(P), **options)
    history = recorded(pbfgs)
    if how == "the scripts' loop":  # groups do not cross epochs; B, g, s and v do
        for epoch in oracle.groups(tensors(data), 15 if accumulate == 1 else batches):
            Loop(model, pbfgs, accumulate=accumulate).train_epoch(epoch)
    else:
        for group in oracle.groups(tensors(data), accumulate):
            loss = loss_of(model, *group[-1]).item()
            made = [closure(how, pbfgs, model, batch) for batch in group]
            assert float(pbfgs.step(made if accumulate > 1 else made[0])) == pytest.approx(loss, rel=1e-12)
    assert_same_history(history, expected, w0)

    outside = np.linalg.norm((np.eye(len(w0)) - P.T @ P) @ (w.numpy() - w0))
    assert outside > 0.05 if alpha else outside < 1e-12
    counts = pbfgs.statistics()
    if not alpha:
        np.testing.assert_allclose(counts["theta"], P @ (w.numpy() - w0), rtol=1e-9, atol=1e-12)
    assert counts["trials_per_step"] == pytest.approx(np.mean([line.trials for line in expected]), abs=1e-12)
    at_once = np.mean([line.accepted and line.trials == 1 for line in expected])
    assert counts["first_trial_accepted"] == pytest.approx(100 * at_once, abs=1e-9)
    assert counts["failed_searches"] == sum(not line.accepted for line in expected)
    assert counts["skipped_updates"] == sum(bool(line.skipped) for line in expected)
    since_the_last_call = pbfgs.statistics()
    assert since_the_last_call["skipped_updates"] == since_the_last_call["trials_per_step"] == 0


def quadratic(curvature, centre, sign=1.0):
    """sum_i c_i (w_i - z_i)^2 / 2 as an objective; sign -1 reports a gradient that points the wrong way."""

    def objective(w):
        return float(curvature @ (w - centre) ** 2 / 2), sign * curvature * (w - centre)

    return objective


def quadratics(signs):
    rng = np.random.default_rng(3)
    P = np.linalg.qr(rng.normal(size=(8, 4)))[0].T
    curvature = rng.uniform(0.5, 4, size=8)
    return P, [quadratic(curvature, rng.normal(size=8) * 10, sign) for sign in signs]


@pytest.mark.parametrize("max_trials", [20, 30])
@pytest.mark.parametrize("alpha", [0.0, 0.01])
def test_failed_searches_take_the_last_tiny_step(max_trials, alpha):
    """Where the gradient lies, all trials fail; the step is then rho^(max_trials - 1) d, and so is s in the update."""
    signs = [1, 1, -1, 1, 1, -1, -1, 1, 1, 1]
    P, objectives = quadratics(signs)
    w0, options = np.zeros(8), {"max_trials": max_trials, "alpha": alpha}
    expected = oracle.pbfgs(w0, P, objectives, **options)
    assert [line.accepted for line in expected] == [sign > 0 for sign in signs]
    assert [line.trials for line in expected if not line.accepted] == [max_trials] * 3
    pbfgs, history = drive(w0, P, objectives, **options)
    # 0.4^29 d is 1e-11 long beside a w of length 10: what rounding leaves of such a step is 4 digits, hence rtol
    assert_same_history(history, expected, w0, rtol=1e-6 if max_trials == 20 or alpha else 1e-3)
    assert pbfgs.statistics()["failed_searches"] == 3
    for _, search, _ in history:
        assert search.t == pytest.approx(0.4 ** (search.trials - 1), rel=1e-12)


@pytest.mark.parametrize(("alpha", "lr"), [(0.0, 1.0), (0.0, 2.5), (0.01, 2.5)])
def test_lr_is_the_first_trial_and_rho_and_sigma_are_heeded(alpha, lr):
    """Other values of every option, on a deterministic problem."""
    P, objectives = quadratics([1] * 8)
    options = {"lr": lr, "alpha": alpha, "rho": 0.7, "sigma": 0.1, "max_trials": 9, "gamma": 0.3}
    _, history = drive(np.ones(8), P, objectives, **options)
    assert history[0][1].t == pytest.approx(lr * 0.7 ** (history[0][1].trials - 1), rel=1e-12)
    assert any(search.trials > 1 for _, search, _ in history)
    assert_same_history(history, oracle.pbfgs(np.ones(8), P, objectives, **options), np.ones(8))


def test_lr_of_a_scheduler_is_the_first_trial():
    w0, P, data = oracle.problem(6, seed=1)
    model, _ = mlp(w0)
    optimizer = ProjectedBFGS(model, torch.from_numpy(P), lr=2.0)
    scheduler, history = MultiStepLR(optimizer, [3], gamma=0.01), recorded(optimizer)
    for batch in tensors(data):
        step(optimizer, model, *batch)
        scheduler.step()
    assert [s.t / 0.4 ** (s.trials - 1) for _, s, _ in history] == pytest.approx([2.0] * 3 + [0.02] * 3)


@pytest.mark.parametrize(("curvature_along_s", "skipped"), [(1.1e-20, False), (0.9e-20, True)])
def test_updates_are_skipped_below_1e_20(curvature_along_s, skipped):
    """y^T s on both sides of the threshold: |w|^2 / 8 for the first step, s = -w / 2, y = s / 2."""
    P, w0 = np.eye(2, 3), np.array([0.6, 0.8, 0.0]) * np.sqrt(8 * curvature_along_s)
    objectives = [quadratic(np.full(3, 0.5), np.zeros(3))] * 2
    pbfgs, history = drive(w0, P, objectives)
    assert [(search.trials, was_skipped) for _, search, was_skipped in history] == [(1, False), (1, skipped)]
    assert torch.equal(pbfgs.state["B"], torch.eye(2, dtype=DOUBLE)) == skipped
    assert_same_history(history, oracle.pbfgs(w0, P, objectives), w0)


# ------------------------------------------------------------------------------------------------------ not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_trials_without_a_finite_loss_are_rejected(bad):
    """NaN, inf and above all -inf, which is less than any bound, send the search back; finite ones may be accepted."""
    P, (good,) = quadratics([1])

    def objective(w):
        loss, grad = good(w)
        return (loss if np.abs(w).max() < 0.5 else bad), grad

    _, history = drive(np.zeros(8), P, [objective])
    ((w, search, _),) = history
    assert search.trials > 3 and search.accepted and math.isfinite(search.loss)
    assert w.abs().max() < 0.5 <= w.abs().max() / 0.4  # w began at 0; / 0.4 was the trial before
    assert_same_history(history, oracle.pbfgs(np.zeros(8), P, [objective]), np.zeros(8))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("finite_trials", [0, 3])
def test_a_search_that_ends_without_a_finite_loss_raises_and_leaves_w(bad, finite_trials):
    """No step is taken onto a point without a loss: w, bit for bit, is where the iteration began.

    Also where finite trials came before (too large to be accepted), since the last one is where the step would end.
    """
    P, objectives = quadratics([1, 1, 1])
    pbfgs, _ = drive(np.full(8, 1 / 3), P, objectives[:2], alpha=0.1)
    w, seen, trials = pbfgs.w, [], itertools.count()
    before, (loss, grad) = w.clone(), objectives[2](w.numpy())

    def trial_loss():
        seen.append(w.clone())
        return torch.tensor(1e30 if next(trials) < finite_trials else bad)

    with pytest.raises(FloatingPointError, match="20 trials"):
        pbfgs.search(loss, trial_loss, torch.from_numpy(grad))
    assert len(seen) == 20 and not torch.equal(seen[-1], before)  # w did move in the search
    assert torch.equal(w, before)


# ------------------------------------------------------------------------------------------------------ pieces


def test_bfgs_updates_find_the_inverse_hessian_of_a_quadratic():
    """With exact line searches, k updates give the inverse of a k x k Hessian and the minimum, as theory says."""
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(6, 6, generator=generator, dtype=DOUBLE)
    A = A @ A.T + torch.eye(6, dtype=DOUBLE)
    theta, B = torch.ones(6, dtype=DOUBLE), torch.eye(6, dtype=DOUBLE)
    for _ in range(6):
        g = A @ theta
        d = -B @ g
        s = -(g @ d) / (d @ A @ d) * d
        theta, B = theta + s, bfgs_update(B, s, A @ s)
    assert torch.allclose(B, torch.linalg.inv(A), rtol=0, atol=1e-9)
    assert (A @ theta).norm() < 1e-9


@pytest.mark.parametrize("m", [0, 1, 4])
def test_armijo_returns_the_first_acceptable_trial(m):
    """The m-th trial is taken although later ones are acceptable too, and no loss is evaluated after it."""
    asked = []

    def loss_at(t):
        asked.append(t)
        return 5.0 if len(asked) <= m else -100.0

    search = armijo(loss_at, 1.0, -1.0, first=2.0, rho=0.5)
    assert asked == [2.0 * 0.5**i for i in range(m + 1)]
    assert search == (2.0 * 0.5**m, -100.0, m + 1, True)


def test_armijo_asks_for_more_than_a_decrease_in_proportion_to_the_step():
    """A loss equal to the bound f + sigma t slope is not less than it. The numbers are exact in binary."""
    f, slope, sigma, t = 1.0, -2.0, 0.25, 0.5
    bound = f + sigma * t * slope
    options = {"first": t, "rho": 0.5, "sigma": sigma, "max_trials": 1}
    assert not armijo(lambda t: bound, f, slope, **options).accepted
    assert armijo(lambda t: math.nextafter(bound, -math.inf), f, slope, **options).accepted
    assert not armijo(lambda t: f, f, 0.0, max_trials=3).accepted  # no decrease, none asked for
    for c, trials, accepted in ((0.39, 20, False), (0.41, 1, True)):  # sigma is 0.4
        search = armijo(lambda t, c=c: 1 - 3 * c * t, 1.0, -3.0)
        assert (search.trials, search.accepted) == (trials, accepted)
    assert armijo(lambda t: 2.0, 1.0, -1.0, max_trials=30) == (0.4**29, 2.0, 30, False)


def test_on_a_cpu_the_losses_of_a_search_are_those_of_float64():
    """Channels_last batch norm, which sums in float32 there, would be off by 2e-6."""
    torch.manual_seed(0)
    model = models.get_model("resnet8", 10)
    x, y = torch.randn(256, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.randint(10, (256,))
    with torch.no_grad():
        exact = float(F.cross_entropy(copy.deepcopy(model).double()(x.double()), y))
    P = torch.eye(2, sum(p.numel() for p in model.parameters()))
    assert Loop(model, ProjectedBFGS(model, P)).train_epoch([(x, y)])["loss"] == pytest.approx(exact, rel=2e-7)
