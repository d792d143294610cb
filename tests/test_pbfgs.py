"""P-BFGS against an independent float64 oracle, and the properties that the method promises."""

import copy
import io
import itertools
import math

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from networks import DOUBLE, mlp, tensors, train
from torch import nn

import datasets
import models
from dldr.engine import Loop
from dldr.subspace import ProjectedBFGS, armijo, bfgs_update, flat_parameters

# ------------------------------------------------------------------------------------------------------ helpers


def searched(model, pbfgs, batches, accumulate=1):
    """One epoch of the scripts' loop; per step (w after it, Search, was the BFGS update skipped)."""
    search, last = pbfgs.search, {}

    def recorded(*args):
        skipped = pbfgs.skipped
        last.update(search=search(*args))
        last.update(skipped=pbfgs.skipped > skipped)

    pbfgs.search = recorded
    history = train(model, pbfgs, batches, accumulate, lambda w: (w, last["search"], last["skipped"]))
    pbfgs.search = search
    return history


def drive(pbfgs, objectives):
    """ProjectedBFGS.search on a bare vector, one numpy objective per iteration; the same history as `searched`."""
    w, history = pbfgs.w, []
    for objective in objectives:
        loss, grad = objective(w.numpy())
        skipped = pbfgs.skipped
        search = pbfgs.search(loss, lambda objective=objective: torch.tensor(objective(w.numpy())[0], dtype=DOUBLE),
                              torch.from_numpy(grad))
        history.append((w.clone(), search, pbfgs.skipped > skipped))
    return history


def vector(values):
    """A model that is a vector of parameters, and these."""
    model = nn.Module()
    model.values = nn.Parameter(torch.tensor(values, dtype=DOUBLE))
    return model, flat_parameters(model)


def assert_same_history(history, expected, w0, rtol=1e-6):
    """The same trials, acceptance and skips, and in every iteration the same step but for rtol of its length."""
    assert len(history) == len(expected)
    before, before_expected = w0, w0
    for i, ((w, search, skipped), line) in enumerate(zip(history, expected, strict=True)):
        assert (search.trials, search.accepted, skipped) == (line.trials, line.accepted, bool(line.skipped)), i
        step, step_expected = w.numpy() - before, line.w - before_expected
        length = np.linalg.norm(step_expected)
        assert length > 0 and np.linalg.norm(step - step_expected) <= rtol * length, i
        before, before_expected = w.numpy(), line.w


# ------------------------------------------------------------------------------------------------------ oracle


@pytest.mark.parametrize("alpha", [0.0, 0.05])
@pytest.mark.parametrize(("batches", "accumulate"), [(45, 1), (101, 3)])
def test_training_equals_the_oracle(batches, accumulate, alpha):
    """Every iteration of real training, over three epochs or in groups with a leftover of two mini-batches.

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
    epochs = 3 if accumulate == 1 else 1  # groups do not cross epochs; B, g, s and v do
    history = []
    for epoch in range(epochs):
        part = slice(epoch * batches // epochs, (epoch + 1) * batches // epochs)
        history += searched(model, pbfgs, tensors(data[part]), accumulate)
    assert len(history) == math.ceil(batches / accumulate) >= 34
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


def test_accumulation_works_on_the_batches_the_scripts_pass():
    """--accumulate with an epoch of a data set, a generator: 71 digits are 5 mini-batches and so 3 updates."""
    data = datasets.load("digits", "data", batch_size=16, device="cpu", seed=0, part=0.05)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    loop, sizes = Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), accumulate=2), []
    loop.update = lambda x, y, size, loss: sizes.append(len(y))
    loop.train_epoch(data.train.epoch(0), sizes=data.train.sizes)
    assert sizes == [16, 16, 7]


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
    """Where the gradient lies, all trials fail; the step is then rho^(max_trials - 1) d, and y is divided by that."""
    signs = [1, 1, -1, 1, 1, -1, -1, 1, 1, 1]
    P, objectives = quadratics(signs)
    w0 = np.zeros(8)
    options = {"max_trials": max_trials, "alpha": alpha}
    expected = oracle.pbfgs(w0, P, objectives, **options)
    assert [line.accepted for line in expected] == [sign > 0 for sign in signs]
    assert [line.trials for line in expected if not line.accepted] == [max_trials] * 3

    model, w = vector(w0)
    pbfgs = ProjectedBFGS(model, torch.from_numpy(P), **options)
    history = drive(pbfgs, objectives)
    # 0.4^29 d is 1e-11 long beside a w of length 10: what rounding leaves of such a step is 4 digits, hence rtol
    assert_same_history(history, expected, w0, rtol=1e-6 if max_trials == 20 or alpha else 1e-3)
    assert pbfgs.statistics()["failed_searches"] == 3
    for _, search, _ in history:
        assert search.t == pytest.approx(0.4 ** (search.trials - 1), rel=1e-12)


def test_the_update_after_a_failed_search_uses_the_step_really_taken():
    """The pair (s, y) after a failure has s = rho^19 d, read here off w itself: B y = s for the next B."""
    P, objectives = quadratics([1, -1, 1])
    model, w = vector(np.zeros(8))
    pbfgs = ProjectedBFGS(model, torch.from_numpy(P))
    drive(pbfgs, objectives[:1])
    before, B, g = w.numpy().copy(), pbfgs.state["B"].numpy(), pbfgs.state["g"].numpy()
    _, g_wrong = objectives[1](before)
    drive(pbfgs, objectives[1:2])
    s = P @ (w.numpy() - before)
    assert pbfgs.failed == 1
    # the whole direction -B g is 0.4^-19 times as long as the step taken along it
    B_now = pbfgs.state["B"].numpy()
    assert np.allclose(s / 0.4**19, -B_now @ (P @ g_wrong), rtol=1e-6) and not np.allclose(B, B_now)
    y = P @ objectives[2](w.numpy())[1] - P @ g_wrong
    assert y @ s > 1e-20 and not np.allclose(g, P @ g_wrong)
    drive(pbfgs, objectives[2:])
    assert np.linalg.norm(pbfgs.state["B"].numpy() @ y - s) <= 1e-5 * np.linalg.norm(s)  # 1e-16 |B| |y| / |s| is 1e-7


@pytest.mark.parametrize(("alpha", "lr"), [(0.0, 1.0), (0.0, 2.5), (0.01, 2.5)])
def test_lr_is_the_first_trial_and_rho_and_sigma_are_heeded(alpha, lr):
    """Other values of every option, on a deterministic problem, against the oracle."""
    P, objectives = quadratics([1] * 8)
    options = {"lr": lr, "alpha": alpha, "rho": 0.7, "sigma": 0.1, "max_trials": 9, "gamma": 0.3}
    w0 = np.ones(8)
    model, w = vector(w0)
    history = drive(ProjectedBFGS(model, torch.from_numpy(P), **options), objectives)
    assert history[0][1].t == pytest.approx(lr * 0.7 ** (history[0][1].trials - 1), rel=1e-12)
    assert any(search.trials > 1 for _, search, _ in history)
    assert_same_history(history, oracle.pbfgs(w0, P, objectives, **options), w0)


@pytest.mark.parametrize(("curvature_along_s", "skipped"), [(1.1e-20, False), (0.9e-20, True)])
def test_updates_are_skipped_below_1e_20(curvature_along_s, skipped):
    """y^T s on both sides of the threshold: |w|^2 / 8 for the first step, s = -w / 2, y = s / 2."""
    P = np.eye(2, 3)
    w0 = np.array([0.6, 0.8, 0.0]) * np.sqrt(8 * curvature_along_s)
    objectives = [quadratic(np.full(3, 0.5), np.zeros(3))] * 2
    model, w = vector(w0)
    pbfgs = ProjectedBFGS(model, torch.from_numpy(P))
    history = drive(pbfgs, objectives)
    assert [search.trials for _, search, _ in history] == [1, 1]
    assert [was_skipped for *_, was_skipped in history] == [False, skipped]
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

    model, w = vector(np.zeros(8))
    history = drive(ProjectedBFGS(model, torch.from_numpy(P)), [objective])
    _, search, _ = history[0]
    assert search.trials > 3 and search.accepted and math.isfinite(search.loss)
    assert np.abs(w.numpy()).max() < 0.5 <= np.abs(w.numpy()).max() / 0.4  # w began at 0; / 0.4 was the trial before
    assert_same_history(history, oracle.pbfgs(np.zeros(8), P, [objective]), np.zeros(8))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("finite_trials", [0, 3])
def test_a_search_that_ends_without_a_finite_loss_raises_and_leaves_w(bad, finite_trials):
    """No step is taken onto a point without a loss: w, bit for bit, is where the iteration began.

    Also where finite trials came before (too large to be accepted), since the last one is where the step would end.
    """
    P, objectives = quadratics([1, 1, 1])
    model, w = vector(np.full(8, 1 / 3))
    pbfgs = ProjectedBFGS(model, torch.from_numpy(P), alpha=0.1)
    drive(pbfgs, objectives[:2])
    before = w.clone()
    loss, grad = objectives[2](w.numpy())
    gradient = torch.from_numpy(grad)
    trials = itertools.count()
    seen = []

    def trial_loss():
        seen.append(w.clone())
        return torch.tensor(1e30 if next(trials) < finite_trials else bad)

    with pytest.raises(FloatingPointError, match="20 trials"):
        pbfgs.search(loss, trial_loss, gradient)
    assert len(seen) == 20 and not torch.equal(seen[-1], before)  # w did move in the search
    assert torch.equal(w, before)
    with pytest.raises(FloatingPointError):
        oracle.pbfgs(before.numpy(), P, [lambda w: (bad, grad)])


# ------------------------------------------------------------------------------------------------------ pieces


def test_bfgs_update_meets_the_secant_equation_and_stays_positive_definite():
    """B y = s, B symmetric with positive eigenvalues, and unchanged where it was right already; 30 updates on end."""
    generator = torch.Generator().manual_seed(0)
    B = torch.eye(12, dtype=DOUBLE)
    for _ in range(30):
        s, y = torch.randn(2, 12, generator=generator, dtype=DOUBLE)
        y = y if y @ s > 0 else -y
        B_previous, B = B, bfgs_update(B, s, y)
        scale = B.abs().max()
        assert torch.allclose(B @ y, s, rtol=0, atol=1e-12 * float(scale * y.norm()))
        assert (B - B.T).abs().max() <= 1e-12 * scale
        assert torch.linalg.eigvalsh(B)[0] > 0
        assert not torch.allclose(B, B_previous)
        if scale > 1e3:  # random pairs, which no matrix fits, blow B up until eigenvalues drown in rounding
            B = torch.eye(12, dtype=DOUBLE)
    again = bfgs_update(bfgs_update(torch.eye(12, dtype=DOUBLE), s, y), s, y)
    assert torch.allclose(again, bfgs_update(torch.eye(12, dtype=DOUBLE), s, y), rtol=1e-9, atol=1e-9)


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


def test_armijo_is_strict():
    """A loss equal to the bound f + sigma t slope is not less than it. The numbers are exact in binary."""
    f, slope, sigma, t = 1.0, -2.0, 0.25, 0.5
    bound = f + sigma * t * slope
    options = {"first": t, "rho": 0.5, "sigma": sigma, "max_trials": 1}
    assert not armijo(lambda t: bound, f, slope, **options).accepted
    assert armijo(lambda t: math.nextafter(bound, -math.inf), f, slope, **options).accepted
    assert not armijo(lambda t: f, f, 0.0, max_trials=3).accepted  # no decrease, none asked for


def test_armijo_asks_for_a_decrease_in_proportion_to_the_step():
    """f(t) = f + c t slope falls short for c = 0.39 at every t, and is enough for c = 0.41 at once (sigma is 0.4)."""
    for c, trials, accepted in ((0.39, 20, False), (0.41, 1, True)):
        search = armijo(lambda t, c=c: 1 - 3 * c * t, 1.0, -3.0)
        assert (search.trials, search.accepted) == (trials, accepted)
    assert armijo(lambda t: 2.0, 1.0, -1.0) == (0.4**19, 2.0, 20, False)
    assert armijo(lambda t: 2.0, 1.0, -1.0, max_trials=30) == (0.4**29, 2.0, 30, False)


# ------------------------------------------------------------------------------------------------------ properties


@pytest.mark.parametrize("alpha", [0.0, 0.05])
def test_another_basis_of_the_same_span_gives_the_same_networks(alpha):
    """Rows of P rotated: the same w after every iteration, for a matrix that is far from the identity."""
    w0, P, data = oracle.problem(45, seed=1)
    runs = []
    for basis in (P, oracle.rotation(len(P)) @ P):
        model, w = mlp(w0)
        pbfgs = ProjectedBFGS(model, torch.from_numpy(basis), lr=2.0, alpha=alpha)
        runs.append(searched(model, pbfgs, tensors(data[:30])))
    assert any(search.trials > 1 for _, search, _ in runs[0])
    for (w, search, _), (w_rotated, search_rotated, _) in zip(*runs, strict=True):
        assert search.trials == search_rotated.trials
        assert torch.allclose(w, w_rotated, rtol=0, atol=1e-8)
    assert np.abs(w.numpy() - w0).max() > 0.1


def images(batches, size=16, seed=0):
    """Mini-batches of random images with random labels, for a network of 10 classes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(batches)
    ]


def resnet(batches, k=5, seed=0):
    """A resnet8 in float32, its flat parameters, and as P an orthonormal basis of k of its gradients."""
    torch.manual_seed(seed)
    model = models.get_model("resnet8", 10)
    w = flat_parameters(model)
    gradients = []
    for x, y in batches[:k]:
        other = copy.deepcopy(model)
        gradient = torch.autograd.grad(F.cross_entropy(other(x), y), list(other.parameters()))
        gradients.append(torch.cat([g.reshape(-1) for g in gradient]).double())
    P = torch.linalg.qr(torch.stack(gradients).T)[0].T.float().contiguous()
    return model, w, P


def test_a_network_in_float32_stays_in_the_subspace():
    """w - w_start lies in span(P): every step adds only the rounding of w itself (6e-8 |w|, 1e-6 in all)."""
    batches = images(6)
    model, w, P = resnet(batches)
    start = w.double()
    pbfgs = ProjectedBFGS(model, P, lr=1.0)
    searched(model, pbfgs, batches + batches)
    moved = w.double() - start
    basis = torch.linalg.qr(P.double().T)[0].T
    assert moved.norm() > 0.5
    assert (moved - basis.T @ (basis @ moved)).norm() <= 1e-5 * moved.norm()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batch_norm_statistics_are_those_of_the_first_forward(accumulate):
    """Trials leave no trace: the buffers, bit for bit, are what one plain forward of each mini-batch makes of them."""
    batches = images(5)
    model, w, P = resnet(batches)
    untouched = copy.deepcopy(model)
    untouched.train()
    for x, y in batches[:accumulate]:
        F.cross_entropy(untouched(x), y).backward()
    pbfgs = ProjectedBFGS(model, P, lr=100.0)
    ((_, search, _),) = searched(model, pbfgs, batches[:accumulate], accumulate)
    assert search.trials > 1
    buffers = dict(model.named_buffers())
    assert len(buffers) == 3 * 7  # mean, variance and count of seven layers
    for name, expected in untouched.named_buffers():
        assert torch.equal(buffers[name], expected), name
    assert model.bn1.num_batches_tracked == accumulate and model.bn1.running_mean.abs().max() > 0

    # the layers do follow the next forward
    model(batches[0][0])
    assert model.bn1.num_batches_tracked == accumulate + 1


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_trials_build_no_autograd_graph_and_leave_the_gradient(alpha):
    """`search` switches autograd off for trial_loss, on again behind it, and leaves the parameters' gradients."""
    w0, P, data = oracle.problem(1)
    model, w = mlp(w0)
    ((x, y),) = tensors(data)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    seen = []

    def trial_loss():
        value = F.cross_entropy(model(x), y)
        seen.append((torch.is_grad_enabled(), value.requires_grad))
        return value

    search = ProjectedBFGS(model, torch.from_numpy(P), lr=50.0, alpha=alpha).search(loss.item(), trial_loss)
    assert search.trials == len(seen) > 1
    assert seen == [(False, False)] * len(seen)
    assert torch.is_grad_enabled()
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("alpha", [0.0, 0.05])
@pytest.mark.parametrize("first", [0, 8])
def test_the_state_continues_a_run_bitwise(alpha, first):
    """`first` iterations, the state through a file, the rest by another object: as if uninterrupted, in float32."""
    w0, P, data = oracle.problem(16)
    P, batches = torch.from_numpy(P).float(), tensors(data, torch.float32)

    def start():
        model, w = mlp(w0, torch.float32)
        return model, w, ProjectedBFGS(model, P, lr=2.0, alpha=alpha)

    model, w, pbfgs = start()
    uninterrupted = searched(model, pbfgs, batches)

    model, w, pbfgs = start()
    if first:
        searched(model, pbfgs, batches[:first])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "algorithm": pbfgs.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    model, w, pbfgs = start()
    searched(model, pbfgs, batches[::-1][:5])  # a state of its own, which must be gone
    model.load_state_dict(state["model"])
    pbfgs.load_state_dict(state["algorithm"])
    rest = searched(model, pbfgs, batches[first:])
    for (w, search, skipped), (w_whole, search_whole, skipped_whole) in zip(rest, uninterrupted[first:], strict=True):
        assert torch.equal(w, w_whole) and (search, skipped) == (search_whole, skipped_whole)


def test_on_a_cpu_the_losses_of_a_search_are_those_of_float64():
    """Channels_last batch norm, which sums in float32 there, would be off by 2e-6."""
    torch.manual_seed(0)
    model = models.get_model("resnet8", 10)
    x, y = torch.randn(256, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.randint(10, (256,))
    with torch.no_grad():
        exact = float(F.cross_entropy(copy.deepcopy(model).double()(x.double()), y))
    P = torch.eye(2, sum(p.numel() for p in model.parameters()))
    assert Loop(model, ProjectedBFGS(model, P)).train_epoch([(x, y)])["loss"] == pytest.approx(exact, rel=2e-7)
