"""ProjectedSGD and ProjectedBFGS as torch optimisers in loops that are not ours."""
import copy

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from networks import DOUBLE, mlp, tensors
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR

from dldr import ProjectedBFGS, ProjectedSGD, flat_parameters, pca_basis

SCHEDULES = {None: None, "multistep": lambda o: MultiStepLR(o, [4, 8]), "cosine": lambda o: CosineAnnealingLR(o, 12),
             "linear": lambda o: LinearLR(o, 0.1, total_iters=8)}
METHODS = {"psgd": ProjectedSGD, "pbfgs": ProjectedBFGS}


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y)


def step(optimizer, model, x, y):
    """One iteration of either method as their docstrings say."""
    if isinstance(optimizer, ProjectedBFGS):
        return optimizer.step(lambda: loss_of(model, x, y))
    optimizer.zero_grad()
    loss_of(model, x, y).backward()
    return optimizer.step()


def on_theta(model, P, batches, *, lr=1.0, schedule=None, clip=None, accumulate=1):
    """Reference: torch's SGD on theta itself, autograd going through w = w_start + P^T theta; w (D,) at the end."""
    names, values = zip(*model.named_parameters(), strict=True)
    w0, sizes = torch.cat([v.detach().reshape(-1) for v in values]), [v.numel() for v in values]
    theta = torch.zeros(len(P), dtype=P.dtype, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=lr, momentum=0.9)
    scheduler = schedule and schedule(optimizer)

    def parameters():
        parts = (w0 + P.T @ theta).split(sizes)
        return {n: part.view_as(v) for n, part, v in zip(names, parts, values, strict=True)}

    for i in range(0, len(batches), accumulate):
        at = {n: v.detach().requires_grad_() for n, v in parameters().items()}
        for x, y in batches[i:i + accumulate]:
            F.cross_entropy(functional_call(model, at, x), y).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(at.values(), clip)
        theta.grad = P @ torch.cat([at[n].grad.reshape(-1) for n in names])
        optimizer.step()
        if scheduler:
            scheduler.step()
    return (w0 + P.T @ theta).detach()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero_grad", ["optimizer", "optimizer in place", "model", "model in place"])
def test_psgd_in_an_ordinary_loop(zero_grad, schedule):
    w0, P, data = oracle.problem(12)
    P, batches = torch.from_numpy(P), tensors(data)
    expected = on_theta(mlp(w0)[0], P, batches, schedule=SCHEDULES[schedule])
    model, w = mlp(w0)
    optimizer = ProjectedSGD(model, P)
    scheduler = SCHEDULES[schedule] and SCHEDULES[schedule](optimizer)
    for x, y in batches:
        zeroes = optimizer if zero_grad.startswith("optimizer") else model
        zeroes.zero_grad(set_to_none="in place" not in zero_grad)
        loss_of(model, x, y).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
    assert torch.allclose(w, expected, rtol=0, atol=1e-10) and (w - torch.from_numpy(w0)).norm() > 0.1


@pytest.mark.parametrize("options", [{"clip": 0.05}, {"accumulate": 3}])
def test_psgd_with_clipping_or_gradients_accumulated_by_hand(options):
    w0, P, data = oracle.problem(12)
    P, batches = torch.from_numpy(P), tensors(data)
    expected = on_theta(mlp(w0)[0], P, batches, lr=0.3, **options)
    assert not torch.allclose(expected, on_theta(mlp(w0)[0], P, batches, lr=0.3), atol=1e-3)
    model, w = mlp(w0)
    optimizer, accumulate = ProjectedSGD(model, P, lr=0.3), options.get("accumulate", 1)
    for i, (x, y) in enumerate(batches, 1):
        loss_of(model, x, y).backward()
        if i % accumulate == 0:
            if "clip" in options:
                torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip"])
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(w, expected, rtol=0, atol=1e-10)


def test_psgd_calls_a_closure_as_torch_sgd_does():
    w0, P, data = oracle.problem(8)
    P, batches = torch.from_numpy(P), tensors(data)
    model, w = mlp(w0)
    optimizer = ProjectedSGD(model, P)
    for x, y in batches:
        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            return loss

        expected = loss_of(model, x, y).item()
        with torch.no_grad():  # the closure gets autograd back
            assert optimizer.step(closure).item() == expected
    assert torch.allclose(w, on_theta(mlp(w0)[0], P, batches), rtol=0, atol=1e-10)


def test_a_loop_without_backward_raises():
    w0, P, data = oracle.problem(1)
    model, _ = mlp(w0)
    psgd, pbfgs = ProjectedSGD(model, torch.from_numpy(P)), ProjectedBFGS(model, torch.from_numpy(P))
    with pytest.raises(RuntimeError, match=r"call loss.backward\(\) before step"):
        psgd.step()
    loss_of(model, *tensors(data)[0]).backward()
    psgd.step()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        psgd.step()
    for nothing in (None, [], 3.0):
        with pytest.raises(TypeError, match="needs a closure"):
            pbfgs.step(nothing)
    with pytest.raises(TypeError):
        pbfgs.step()


def closures(kind, optimizer, model, batch):
    """The batch's loss as a closure: one that returns it, or one for torch.optim.LBFGS."""
    def loss_only():
        return loss_of(model, *batch)

    def for_lbfgs():
        optimizer.zero_grad()
        assert torch.is_grad_enabled()
        loss = loss_of(model, *batch)
        loss.backward()
        return loss

    return {"loss only": loss_only, "for LBFGS": for_lbfgs}[kind]


@pytest.mark.parametrize("alpha", [0.0, 0.05])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", ["loss only", "for LBFGS"])
def test_pbfgs_takes_closures_and_lists_of_them(kind, accumulate, alpha):
    """The oracle's --accumulate: gradients averaged, the search on the last mini-batch."""
    w0, P, data = oracle.problem(30, seed=1)
    expected = oracle.pbfgs(w0, P, [oracle.mlp(*batch) for batch in data], accumulate=accumulate, lr=2.0, alpha=alpha)
    model, w = mlp(w0)
    optimizer = ProjectedBFGS(model, torch.from_numpy(P), lr=2.0, alpha=alpha)
    batches = tensors(data)
    for i, line in zip(range(0, 30, accumulate), expected, strict=True):
        group = [closures(kind, optimizer, model, batch) for batch in batches[i:i + accumulate]]
        loss = loss_of(model, *batches[i + accumulate - 1]).item()
        assert float(optimizer.step(group if accumulate > 1 else group[0])) == pytest.approx(loss, rel=1e-12)
        assert np.abs(w.numpy() - line.w).max() < 1e-6
    assert any(line.trials > 1 for line in expected)


def test_pbfgs_lr_of_a_scheduler_is_the_first_trial():
    w0, P, data = oracle.problem(6, seed=1)
    model, _ = mlp(w0)
    optimizer = ProjectedBFGS(model, torch.from_numpy(P), lr=2.0)
    scheduler = MultiStepLR(optimizer, [3], gamma=0.01)
    lengths, search = [], optimizer.search
    optimizer.search = lambda *a: lengths.append(search(*a))
    for x, y in tensors(data):
        step(optimizer, model, x, y)
        scheduler.step()
    firsts = [s.t / 0.4 ** (s.trials - 1) for s in lengths]
    assert firsts == pytest.approx([2.0] * 3 + [0.02] * 3)


# ------------------------------------------------------------------------------------------------------ state


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_first", [True, False])
def test_state_is_a_copy_and_continues_bitwise(method, model_first):
    w0, P, data = oracle.problem(12)
    P, batches = torch.from_numpy(P).float(), tensors(data, torch.float32)

    def start():
        model, w = mlp(w0, torch.float32)
        return model, w, METHODS[method](model, P, lr=0.7)

    model, w, optimizer = start()
    for batch in batches[:5]:
        step(optimizer, model, *batch)
    saved, weights = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    frozen = copy.deepcopy(saved)
    for batch in batches[5:]:
        step(optimizer, model, *batch)
    ends = []
    for _ in range(2):  # two optimisers that loaded it share nothing
        other, other_w, again = start()
        step(again, other, *batches[0])
        loads = [lambda m=other: m.load_state_dict(weights), lambda o=again: o.load_state_dict(saved)]
        for load in loads if model_first else loads[::-1]:
            load()
        for batch in batches[5:]:
            step(again, other, *batch)
        ends.append(other_w)
    assert all(torch.equal(end, w) for end in ends)
    assert again.param_groups[0]["lr"] == 0.7

    def flat(state):
        return torch.cat([v.reshape(-1).double() for v in state["state"].values()])

    assert torch.equal(flat(saved), flat(frozen)) and not torch.equal(flat(optimizer.state_dict()), flat(frozen))
    with pytest.raises(ValueError, match="state of other shapes"):
        METHODS[method](mlp(w0, torch.float32)[0], P[:3].contiguous()).load_state_dict(saved)


@pytest.mark.parametrize("change", [
    lambda model, w: model.load_state_dict({n: v + 0.01 for n, v in model.state_dict().items()}),
    lambda model, w: w.add_(0.01), lambda model, w: [p.data.add_(0.01) for p in model.parameters()],
], ids=["loaded", "w", "data"])
def test_psgd_keeps_what_others_do_to_the_model(change):
    """Weights loaded after the optimiser was made, or in the middle of a run: steps go on from there."""
    w0, P, data = oracle.problem(8)
    P, batches = torch.from_numpy(P), tensors(data)
    model, w = mlp(w0 + 1)
    optimizer = ProjectedSGD(model, P)
    model.load_state_dict(mlp(w0)[0].state_dict())
    for batch in batches:
        step(optimizer, model, *batch)
    assert torch.allclose(w, on_theta(mlp(w0)[0], P, batches), rtol=0, atol=1e-10)
    before = w.clone()
    change(model, w)
    moved = w.clone()
    assert (moved - before).norm() > 0.01
    theta = optimizer.theta.clone()
    step(optimizer, model, *batches[0])
    assert torch.allclose(w, moved + P.T @ (optimizer.theta - theta), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ what is in w


class Odd(nn.Module):
    """A frozen layer, a head that is never used, tied weights, and every kind of buffer that changes in a pass."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.conv = spectral_norm(nn.Conv1d(1, 4, 3, padding=1))
        self.norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.bn = nn.BatchNorm1d(24)
        self.tied, self.again = nn.Linear(24, 24), nn.Linear(24, 24)
        self.again.weight = self.tied.weight
        self.head, self.unused = nn.Linear(24, 3), nn.Linear(24, 7)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + 1
        h = self.norm(self.conv(torch.tanh(self.frozen(x))[:, None])).flatten(1)
        return self.head(torch.tanh(self.again(torch.tanh(self.tied(self.bn(h))))))


def odd(seed=0):
    torch.manual_seed(seed)
    model = Odd().double()
    batches = [(torch.randn(8, 6, dtype=DOUBLE), torch.randint(3, (8,))) for _ in range(6)]
    window = [flat_parameters(model).clone()]
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    for x, y in batches:
        optimizer.zero_grad()
        loss_of(twin, x, y).backward()
        optimizer.step()
        window.append(flat_parameters(twin).clone())
    return model, pca_basis(torch.stack(window), 4)[0], batches


@pytest.mark.parametrize("method", METHODS)
def test_frozen_unused_and_tied_parameters(method):
    model, P, batches = odd()
    w, before = flat_parameters(model), copy.deepcopy(model.state_dict())
    assert len(w) == sum(p.numel() for p in model.parameters() if p.requires_grad) == P.shape[1]
    start, optimizer = w.clone(), METHODS[method](model, P)
    for batch in batches:
        step(optimizer, model, *batch)
    after = model.state_dict()
    for name in before:
        if name.startswith(("frozen", "unused")):
            assert torch.equal(before[name], after[name]), name
    assert model.again.weight is model.tied.weight and not torch.equal(before["tied.weight"], after["tied.weight"])
    assert torch.allclose(w, start + P.T @ optimizer.theta, rtol=0, atol=1e-12) and optimizer.theta.norm() > 0.01


@pytest.mark.parametrize("kind", ["loss only", "for LBFGS"])
def test_trials_change_nothing_but_w(kind):
    """Every buffer, bit for bit, is what one forward pass leaves, and each trial starts from that."""
    model, P, batches = odd()
    twin = copy.deepcopy(model)
    loss_of(twin, *batches[0])
    optimizer = ProjectedBFGS(model, P, lr=1e4)
    seen, forward = [], model.forward
    model.forward = lambda x: seen.append(float(model.calls)) or forward(x)
    optimizer.step(closures(kind, optimizer, model, batches[0]))
    assert len(seen) > 3 and seen == [0.0] + [1.0] * (len(seen) - 1)
    buffers = dict(model.named_buffers())
    for name, expected in twin.named_buffers():
        assert torch.equal(buffers[name], expected), name
    assert len(buffers) > 8


@pytest.mark.parametrize("harm", [
    lambda m: m.to(torch.float32).to(DOUBLE), lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
    lambda m: setattr(m, "head", nn.Linear(24, 3).double()), lambda m: m.tied.requires_grad_(False),
], ids=["converted", "assigned", "replaced", "frozen"])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_left_w_is_noticed(method, harm):
    model, P, batches = odd()
    optimizer = METHODS[method](model, P)
    step(optimizer, model, *batches[0])
    harm(model)
    with pytest.raises(RuntimeError, match="make a new optimiser"):
        step(optimizer, model, *batches[1])


def test_snapshots_of_a_vector_that_the_model_left_are_noticed():
    model, _, batches = odd()
    w = flat_parameters(model)
    model.to(torch.float32)
    with pytest.raises(ValueError, match="differ in 0 directions.*no longer uses"):
        pca_basis(torch.stack([w.clone() for _ in range(3)]), 2)


@pytest.mark.parametrize("method", METHODS)
def test_copies_averages_compiled_and_loaded_models_work_as_usual(method):
    model, P, batches = odd()
    w, optimizer = flat_parameters(model), METHODS[method](model, P)
    average = torch.optim.swa_utils.AveragedModel(model)
    start, copied = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    for x, y in batches[:2]:
        step(optimizer, compiled, x, y)
        average.update_parameters(model)
    assert all(torch.equal(v, start[n]) for n, v in copied.state_dict().items())
    assert not torch.equal(flat_parameters(average), w)
    model.load_state_dict(start)
    assert torch.equal(w, flat_parameters(copied)) and flat_parameters(model).data_ptr() == w.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("method", METHODS)
def test_float32_and_float64(method, dtype):
    w0, P, data = oracle.problem(4)
    model, w = mlp(w0, dtype)
    optimizer = METHODS[method](model, torch.from_numpy(P).to(dtype))
    for batch in tensors(data, dtype):
        step(optimizer, model, *batch)
    assert w.dtype == dtype and w.isfinite().all() and (w.double() - torch.from_numpy(w0)).norm() > 0.01


@pytest.mark.parametrize(("convert", "found"), [
    (lambda m: m.half(), "torch.float16 on cpu"), (lambda m: m.bfloat16(), "torch.bfloat16 on cpu"),
    (lambda m: m[0].double(), "torch.float32 on cpu, torch.float64 on cpu"),
    (lambda m: m[0].to("meta"), "torch.float32 on cpu, torch.float32 on meta"),
    (lambda m: m.requires_grad_(False), "none"),
])
def test_other_dtypes_and_devices_are_refused(convert, found):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    convert(model)
    for make in (flat_parameters, lambda m: ProjectedSGD(m, torch.eye(2, 20))):
        with pytest.raises(ValueError, match=f"not {found}; call model.float.*autocast"):
            make(model)


@pytest.mark.parametrize(("P", "message"), [
    (torch.eye(20, 2), r"P must be \(k, 20\) torch.float32 on cpu.*it is \(20, 2\)"),
    (torch.eye(2, 20, dtype=DOUBLE), "it is .2, 20. torch.float64"), (2 * torch.eye(2, 20), "not orthonormal"),
    (torch.ones(2, 20) / 20**0.5, "not orthonormal"), (torch.full((2, 20), torch.nan), "not orthonormal"),
])
@pytest.mark.parametrize("method", METHODS)
def test_a_basis_that_does_not_fit_is_refused(method, P, message):
    with pytest.raises(ValueError, match=message):
        METHODS[method](nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), P)


def test_a_second_parameter_group_is_refused():
    optimizer = ProjectedSGD(nn.Linear(3, 1), torch.eye(2, 4))
    with pytest.raises(ValueError, match="one parameter group only"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_a_basis_may_be_any_object_with_project_and_lift():
    w0, P, data = oracle.problem(4)
    P = torch.from_numpy(P)

    class Mine:
        def project(self, gradient):
            return P @ gradient

        def lift(self, s):
            return s @ P

    for method in METHODS.values():
        ends = []
        for basis in (P, Mine()):
            model, w = mlp(w0)
            optimizer = method(model, basis)
            for batch in tensors(data):
                step(optimizer, model, *batch)
            ends.append(w)
        assert torch.allclose(*ends, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ networks


class Transformer(nn.Module):
    """Rows of an 8 x 8 digit as a sequence of eight."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Linear(8, 32), nn.Parameter(0.1 * torch.randn(8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.position).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(8, 48, batch_first=True), nn.Linear(48, 10)

    def forward(self, x):
        return self.head(self.gru(x)[0][:, -1])


@pytest.mark.parametrize("network", [Transformer, Recurrent])
def test_networks_without_convolutions_train_as_well_in_their_subspace(network):
    """scikit-learn's digits: sampling by SGD, and from its start both methods to within 2 points of it."""
    digits = load_digits()
    X, Y = torch.from_numpy(digits.images / 16).float(), torch.from_numpy(digits.target)
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(X)))
    train, test = order[:1400], order[1400:]
    torch.manual_seed(0)
    model = network()

    def epochs(n, batch, step, after=lambda: None):
        generator = torch.Generator().manual_seed(1)
        for _ in range(n):
            for part in train[torch.randperm(len(train), generator=generator)].split(batch):
                step(X[part], Y[part])
            after()
        with torch.no_grad():
            return 100 * (model(X[test]).argmax(1) == Y[test]).float().mean().item()

    w, start = flat_parameters(model), copy.deepcopy(model.state_dict())
    snapshots = [w.clone()]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def sgd_step(x, y):
        sgd.zero_grad()
        loss_of(model, x, y).backward()
        sgd.step()

    accuracy = epochs(20, 64, sgd_step, lambda: snapshots.append(w.clone()))
    P, _ = pca_basis(torch.stack(snapshots), k=15)
    for method, n, batch, options in ((ProjectedSGD, 15, 64, {"lr": 0.3}), (ProjectedBFGS, 15, 256, {})):
        model.load_state_dict(start)
        optimizer = method(model, P, **options)
        reached = epochs(n, batch, lambda x, y, o=optimizer: step(o, model, x, y))
        assert accuracy > 90 and reached > accuracy - 2, (method.__name__, accuracy, reached)
