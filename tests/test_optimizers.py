"""ProjectedSGD and ProjectedBFGS as torch optimisers: state, what is in w, what is refused."""
import copy
import io
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from networks import DOUBLE, closure, loss_of, mlp, step, tensors, train
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import models
from dldr import ProjectedBFGS, ProjectedSGD, flat_parameters, pca_basis
from dldr.engine import Loop

METHODS = {"psgd": ProjectedSGD, "pbfgs": ProjectedBFGS}
OPTIONS = {"psgd": ProjectedSGD, "pbfgs": partial(ProjectedBFGS, lr=2.0),  # for which searches take several trials
           "pbfgs+": partial(ProjectedBFGS, lr=2.0, alpha=0.05)}


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("first", [0, 5])
def test_the_state_is_a_copy_and_continues_a_run_bitwise(method, model_first, first):
    """`first` iterations, the state through a file, the rest by others with a past of their own: as uninterrupted."""
    w0, P, data = oracle.problem(12)
    P, batches = torch.from_numpy(P).float(), tensors(data, torch.float32)

    def trained(w0, *batches, **options):
        model, w = mlp(w0, torch.float32)
        optimizer = OPTIONS[method](model, P, **options)
        for batch in batches:
            step(optimizer, model, *batch)
        return model, w, optimizer

    model, w, optimizer = trained(w0, *batches[:first], lr=0.7)
    saved, file = optimizer.state_dict(), io.BytesIO()
    torch.save([model.state_dict(), saved], file)
    for batch in batches[first:]:
        step(optimizer, model, *batch)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    for _ in range(2):  # two optimisers that loaded it share nothing
        other, other_w, again = trained(w0 + 1, *batches[:2], lr=0.3)
        loads = [lambda m=other: m.load_state_dict(weights), lambda o=again: o.load_state_dict(state)]
        for load in loads if model_first else loads[::-1]:
            load()
        assert again.param_groups[0]["lr"] == 0.7
        for batch in batches[first:]:
            step(again, other, *batch)
        assert torch.equal(other_w, w) and (w - torch.from_numpy(w0)).norm() > 0.1

    def flat(state):
        return torch.cat([v.reshape(-1).double() for v in state["state"].values()])

    assert torch.equal(flat(saved), flat(state)) and not torch.equal(flat(optimizer.state_dict()), flat(state))
    with pytest.raises(ValueError, match="state of other shapes"):
        OPTIONS[method](mlp(w0, torch.float32)[0], P[:3].contiguous()).load_state_dict(saved)


@pytest.mark.parametrize("method", OPTIONS)
def test_another_basis_of_the_same_span_gives_the_same_networks(method):
    """Rows of P rotated: the same w after every iteration, for a matrix that is far from the identity."""
    w0, P, data = oracle.problem(45, seed=1)
    runs = []
    for basis in (P, oracle.rotation(len(P)) @ P):
        model, _ = mlp(w0)
        runs.append(train(model, OPTIONS[method](model, torch.from_numpy(basis)), tensors(data[:30])))
    for w, w_rotated in zip(*runs, strict=True):
        assert torch.allclose(w, w_rotated, rtol=0, atol=1e-8)
    assert np.abs(w.numpy() - w0).max() > 0.1


@pytest.mark.parametrize(("method", "lr"), [("psgd", 0.1), ("pbfgs", 1.0)])
def test_a_network_in_float32_stays_in_the_subspace(method, lr):
    """w - w_start lies in span(P) but for the rounding of w (6e-8 |w| a step), however many steps were taken."""
    torch.manual_seed(0)
    model = models.get_model("resnet8", 10)
    w = flat_parameters(model)
    batches = [(torch.randn(16, 3, 32, 32), torch.randint(10, (16,))) for _ in range(5)]
    gradients = [torch.autograd.grad(loss_of(model, *batch), list(model.parameters())) for batch in batches]
    gradients = torch.stack([torch.cat([g.reshape(-1) for g in gradient]) for gradient in gradients])
    P = torch.linalg.qr(gradients.double().T)[0].T.float().contiguous()
    start = w.double()
    train(model, METHODS[method](model, P, lr=lr), batches + batches)
    moved, basis = w.double() - start, torch.linalg.qr(P.double().T)[0].T
    assert moved.norm() > 0.5
    assert (moved - basis.T @ (basis @ moved)).norm() <= 1e-5 * moved.norm()


def test_a_loop_without_backward_raises():
    w0, P, data = oracle.problem(1)
    model, _ = mlp(w0)
    psgd, pbfgs = ProjectedSGD(model, torch.from_numpy(P)), ProjectedBFGS(model, torch.from_numpy(P))
    with pytest.raises(RuntimeError, match=r"call loss.backward\(\) before step"):
        psgd.step()
    step(psgd, model, *tensors(data)[0])
    model.zero_grad()
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        psgd.step()
    for nothing in (None, [], 3.0):
        with pytest.raises(TypeError, match="needs a closure"):
            pbfgs.step(nothing)
    with pytest.raises(TypeError):
        pbfgs.step()


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


def odd():
    torch.manual_seed(0)
    model = Odd().double()
    batches = [(torch.randn(8, 6, dtype=DOUBLE), torch.randint(3, (8,))) for _ in range(6)]
    window = [flat_parameters(model).clone()]
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    for batch in batches:
        step(optimizer, twin, *batch)
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


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("how", ["the scripts' loop", "loss only", "for LBFGS"])
def test_trials_change_nothing_but_w(how, accumulate):
    """Every buffer, bit for bit, is what one forward pass of each mini-batch leaves, and each trial starts from that;
    trials build no autograd graph, unless the closure does, and leave the gradients."""
    model, P, batches = odd()
    twin, batches = copy.deepcopy(model), batches[:accumulate]
    for batch in batches:
        twin.zero_grad()
        loss_of(twin, *batch).backward()
    optimizer = ProjectedBFGS(model, P, lr=1e4)
    seen, forward = [], model.forward
    model.forward = lambda x: seen.append((float(model.calls), torch.is_grad_enabled())) or forward(x)
    if how == "the scripts' loop":
        Loop(model, optimizer, accumulate=accumulate).train_epoch(batches)
    else:
        optimizer.step([closure(how, optimizer, model, batch) for batch in batches])
    trials = len(seen) - accumulate
    assert trials > 2
    assert seen == [(i, True) for i in range(accumulate)] + [(accumulate, how == "for LBFGS")] * trials
    buffers = dict(model.named_buffers())
    for name, expected in twin.named_buffers():
        assert torch.equal(buffers[name], expected), name
    assert len(buffers) > 8
    for p, q in zip(model.parameters(), twin.parameters(), strict=True) if how == "loss only" else ():
        assert p.grad is q.grad is None or torch.equal(p.grad, q.grad)


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


def test_parameters_that_share_memory_are_refused():
    model = nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 6, bias=False))
    model[1].weight.data = model[0].weight.data.t()
    with pytest.raises(ValueError, match="share memory: to tie them, use one nn.Parameter in both places"):
        flat_parameters(model)


@pytest.mark.parametrize("method", OPTIONS)
def test_a_step_inside_autocast_is_one_with_autocast_inside(method):
    """Products with P stay in float32, and a trial's pass has the trial's weights."""
    w0, P, data = oracle.problem(12)
    batches, ends = tensors(data, torch.float32)[:4], []
    for around in (False, True):
        model, w = mlp(w0, torch.float32)
        optimizer = OPTIONS[method](model, torch.from_numpy(P).float())
        half = partial(torch.autocast, "cpu", torch.bfloat16)
        for batch in batches:
            def loss(batch=batch, model=model, inside=nullcontext if around else half):
                with inside():
                    return loss_of(model, *batch)

            with half() if around else nullcontext():
                if method == "psgd":
                    optimizer.zero_grad()
                    loss().backward()
                    optimizer.step()
                else:
                    optimizer.step(loss)
        ends.append(w)
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_a_closure_may_return_a_float():
    """As for torch.optim.LBFGS, after its own backward."""
    w0, P, data = oracle.problem(12)
    ends = []
    for kind in (torch.Tensor.item, lambda loss: loss):
        model, w = mlp(w0)
        optimizer = ProjectedBFGS(model, torch.from_numpy(P))
        batch = tensors(data)[0]
        loss = optimizer.step(lambda b=batch, o=optimizer, m=model, kind=kind: kind(closure("for LBFGS", o, m, b)()))
        ends.append((float(loss), w))
    assert ends[0][0] == ends[1][0] and torch.equal(ends[0][1], ends[1][1])


def test_a_model_in_ddp_is_refused(tmp_path):
    """Each process would search on the loss of its own part."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
        with pytest.raises(ValueError, match="on each process's own loss: give it model.module"):
            ProjectedBFGS(model, torch.eye(2, 8))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("buffer", [torch.ones(1).expand(4, 4), torch.eye(4).to_sparse()])
def test_buffers_that_cannot_be_written_are_left(buffer):
    model = nn.Linear(3, 2)
    model.register_buffer("fixed", buffer)
    ProjectedBFGS(model, torch.eye(2, 8)).step(lambda: model(torch.ones(4, 3)).square().mean())
    assert model.fixed is buffer


def test_sparse_gradients_are_gradients():
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = ProjectedSGD(model, torch.eye(15)[3:5], lr=1.0)
    model(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert optimizer.theta.tolist() == [-1, -1]


def test_a_second_parameter_group_is_refused():
    optimizer = ProjectedSGD(nn.Linear(3, 1), torch.eye(2, 4))
    with pytest.raises(ValueError, match="one parameter group only"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


@pytest.mark.parametrize("method", METHODS)
def test_a_basis_may_be_any_object_with_project_and_lift(method):
    w0, P, data = oracle.problem(4)
    P, ends = torch.from_numpy(P), []
    for basis in (P, SimpleNamespace(project=lambda gradient: P @ gradient, lift=lambda s: s @ P)):
        model, _ = mlp(w0)
        ends.append(train(model, METHODS[method](model, basis), tensors(data))[-1])
    assert torch.allclose(*ends, rtol=0, atol=1e-12)


class Recurrent(nn.Module):
    """Rows of an 8 x 8 digit as a sequence of eight."""

    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(8, 48, batch_first=True), nn.Linear(48, 10)

    def forward(self, x):
        return self.head(self.gru(x)[0][:, -1])


def test_a_recurrent_network_trains_as_well_in_its_subspace():
    """scikit-learn's digits: sampling by SGD, and from its start both methods to within 2 points of it."""
    digits = load_digits()
    X, Y = torch.from_numpy(digits.images / 16).float(), torch.from_numpy(digits.target)
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(X)))
    training, test = order[:1400], order[1400:]
    torch.manual_seed(0)
    model = Recurrent()
    w, start = flat_parameters(model), copy.deepcopy(model.state_dict())
    snapshots = [w.clone()]

    def accuracy(optimizer, epochs, batch):
        generator = torch.Generator().manual_seed(1)
        for _ in range(epochs):
            for part in training[torch.randperm(len(training), generator=generator)].split(batch):
                step(optimizer, model, X[part], Y[part])
            snapshots.append(w.clone())
        with torch.no_grad():
            return 100 * (model(X[test]).argmax(1) == Y[test]).float().mean().item()

    sgd = accuracy(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 20, 64)
    P, _ = pca_basis(torch.stack(snapshots), k=15)
    for make, batch in ((partial(ProjectedSGD, lr=0.3), 64), (ProjectedBFGS, 256)):
        model.load_state_dict(start)
        assert sgd > 90 and accuracy(make(model, P), 15, batch) > sgd - 2
