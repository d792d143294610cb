"""Captured steps: static buffers on a CPU, where a run must end at the same bits; CUDA graphs on a GPU."""
import ctypes

import pytest
import torch
from runs import digits_run, same, state

import models
import train_sgd
import utils
from dldr import engine, graphs
from dldr.errors import UserError
from dldr.subspace import Basis, ProjectedSGD

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def test_calls_are_plain_at_first_then_on_buffers():
    seen = []

    def function(x, y):
        seen.append((x, y))
        return x * y

    graphed = graphs.Graphed(function, torch.device("cpu"))
    for i in range(6):
        x, y = torch.full((3,), float(i)), torch.tensor(2.0)
        assert torch.equal(graphed(x, y), x * y)
        assert (seen[-1][0] is x) == (i < graphs.WARM_UP)
    assert seen[-1][0] is seen[-2][0] and seen[-1][1] is seen[-2][1]  # one pair of buffers


def test_a_capture_is_of_one_signature():
    """Another shape, layout or number (the learning rate of a step) is another capture."""
    graphed = graphs.Graphed(lambda lr, *inputs: torch.tensor(lr) * sum(x.sum() for x in inputs), torch.device("cpu"))
    image = torch.rand(2, 3, 4, 4)
    for lr in (1.0, 0.1):
        for _ in range(5):
            assert graphed(lr, torch.ones(4)) == pytest.approx(4 * lr)
            assert graphed(lr, torch.ones(3)) == pytest.approx(3 * lr)
            assert graphed(lr) == 0
            for x in (image, image.contiguous(memory_format=torch.channels_last)):
                assert graphed(lr, x) == pytest.approx(lr * float(image.sum()))
    assert len(graphed.captured) == 2 * 5 and all(calls == graphs.WARM_UP + 1 for calls in graphed.calls.values())


def test_which_steps_are_captured():
    resnet, drawing = models.get_model("resnet8", 10), models.get_model("stochasticdepth18", 10)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")

    def captured(*args):
        return graphs.capturer(*args) is not graphs.eager

    assert captured("auto", resnet, cuda) and captured("on", resnet, cpu)
    assert not captured("auto", resnet, cpu) and not captured("off", resnet, cuda)
    assert not captured("auto", drawing, cuda) and not captured("auto", resnet, cuda, "ImageNet")
    with pytest.raises(UserError, match="--cuda-graphs on: this --arch draws"):
        graphs.capturer("on", drawing, cuda)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("method, more", [
    ("sgd", ["--milestones", 2]), ("sgd", ["--optimizer", "adam"]), ("sgd", ["--accumulate", 2]),
    ("psgd", ["--milestones", 2]), ("pbfgs", []),
    ("pbfgs", ["--half", "--smalldatasets", 0.1, "--allow-mismatch", "smalldatasets"]),
    ("pbfgs", ["--alpha", 0.01, "--accumulate", 3]),
])
def test_runs_with_and_without_capture_are_the_same(sampled, tmp_path, method, more, device):
    """431 images in batches of 64, the last of 47; a drop of the learning rate; bitwise on a CPU."""
    for mode in ("off", "on"):
        digits_run(method, tmp_path / mode if method == "sgd" else sampled, "--epochs", 4, *more, "--cuda-graphs", mode,
                   "--device", device, "--deterministic", "--conv-tf32", "off", output=tmp_path / mode)
    assert same(*(tmp_path / mode / f"{method}_final.pt" for mode in ("off", "on")))


def test_losses_read_late_give_the_same_epoch_and_still_stop():
    """As on a GPU: read every third iteration and at the end."""
    torch.manual_seed(0)
    batches = [(torch.randn(n, 3, 32, 32), torch.arange(n) % 10) for n in (8, 8, 8, 8, 5)]

    def epoch(read_every, batches=batches):
        torch.manual_seed(0)
        model = models.get_model("resnet8", 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        result = engine.Loop(model, optimizer, read_every=read_every).train_epoch(batches)
        return result, [value.tolist() for value in model.state_dict().values()]

    assert epoch(1) == epoch(3)
    bad = [*batches[:3], (torch.full((8, 3, 32, 32), torch.nan), batches[3][1]), batches[4]]
    for read_every in (1, 3, 50):
        with pytest.raises(FloatingPointError, match="nan at iteration 4"):
            epoch(read_every, bad)


@pytest.mark.gpu
def test_convolutions_without_tf32_are_exact_on_cuda(tmp_path):
    """Against float64: TF32 has 10 bits, some 3e-4 here; float32 1e-5 at most. Products with P never use it."""
    torch.manual_seed(0)
    x, weight = torch.randn(8, 64, 16, 16), torch.randn(64, 64, 3, 3)
    exact = torch.nn.functional.conv2d(x.double(), weight.double())
    A = torch.randn(40, 100_000)
    errors = []
    for tf32 in (False, True):
        utils.set_up("cuda", conv_tf32=tf32)
        error = (torch.nn.functional.conv2d(x.cuda(), weight.cuda()).cpu() - exact).abs().max() / exact.abs().max()
        errors.append(float(error))
        product = (A.cuda() @ A.T.cuda()).cpu().double() - A.double() @ A.double().T
        assert (product - product.diag().diag()).abs().max() < 2e-2  # of sums of 100,000 products; with TF32 0.3
    assert errors[0] < 5e-5 and 3 * errors[0] < errors[1] < 1e-2  # a flag that does nothing would not be seen above


def captured_loop(kind, deterministic=False):
    """A loop of ResNet-20 on the GPU that captures its steps, and eight mini-batches of 128."""
    device = utils.set_up("cuda", deterministic=deterministic)
    model = models.get_model("resnet20", 10).to(device)
    parameters = list(model.parameters())
    if kind == "psgd":
        optimizer = ProjectedSGD(model, Basis(torch.eye(3, sum(p.numel() for p in parameters), device=device)))
    else:
        optimizer = train_sgd.make_optimizer(train_sgd.parse_args(["--optimizer", kind]), parameters)
    x = torch.randn(128, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    batches = [(x, torch.zeros(128, dtype=torch.int64, device=device))] * 8
    return engine.Loop(model, optimizer, read_every=1000, capture=graphs.capturer("on", model, device)), batches


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sgd", "psgd"])
def test_replayed_steps_wait_for_nothing(kind):
    """Between the first and the last of an epoch's iterations nothing synchronises."""
    loop, batches = captured_loop(kind)
    loop.train_epoch(batches)
    modes = []

    def watch(i):
        modes.append("error" if i < len(batches) - 1 else "default")
        torch.cuda.set_sync_debug_mode(modes[-1])

    try:
        loop.train_epoch(batches, after_iteration=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert modes.count("error") == 6


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adam", "psgd"])
def test_a_captured_step_is_a_bounded_number_of_nodes(kind, deterministic, monkeypatch):
    """Passes 467 to 602 nodes on an H100, 240 more with NaN into every new tensor; a step 3 to 7, one by one 18."""
    graph, made = torch.cuda.CUDAGraph, []
    if not hasattr(graph, "raw_cuda_graph"):
        pytest.skip("this torch does not keep captured graphs")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(graph(keep_graph=True)) or made[-1])
    loop, batches = captured_loop(kind, deterministic)
    loop.train_epoch(batches)
    names = None, f"libcudart.so.{torch.version.cuda.split('.')[0]}"  # linked into the process, or torch's own
    cudart = next(lib for lib in map(ctypes.CDLL, names) if hasattr(lib, "cudaGraphGetNodes"))
    nodes = []
    for captured in made:
        number = ctypes.c_size_t()
        handle = ctypes.c_void_p(captured.raw_cuda_graph())
        assert cudart.cudaGraphGetNodes(handle, None, ctypes.byref(number)) == 0
        nodes.append(number.value)
    passes, step = nodes
    assert 100 < passes <= 750 and 1 <= step <= 12


def test_a_gpus_sgd_takes_first_gradients_that_come_late():
    """As with stochastic depth, after other parameters have momentum."""
    class OnGPU(torch.nn.Parameter):
        is_cuda = True

    ends = []
    for kind in (OnGPU, torch.nn.Parameter):
        parameters = [kind(torch.ones(3)), kind(torch.ones(2))]
        optimizer = train_sgd.make_optimizer(train_sgd.parse_args([]), parameters)
        for early_only in (True, False, False):
            for p in parameters[:1] if early_only else parameters:
                p.grad = torch.full_like(p, 0.5).as_subclass(torch.Tensor)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(torch.cat([p.detach().as_subclass(torch.Tensor) for p in parameters]))
        assert bool(optimizer.defaults["foreach"]) == (kind is OnGPU)
    assert torch.equal(*ends) and (ends[0] != 1).all()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_checkpoint_from_another_device_keeps_this_ones_kernels(tmp_path, kind):
    """As a CUDA run would have written it; capturable refuses a CPU."""
    digits_run("sgd", tmp_path, "--optimizer", kind, "--epochs", 1)
    for epochs in (2, 3):
        saved = state(path := tmp_path / "sgd_checkpoint.pt")
        for group in saved["optimizer"]["param_groups"]:
            own = {"sgd": ["foreach"], "adam": ["fused", "capturable"]}[kind]
            assert not any(group[key] for key in own)
            group.update(dict.fromkeys(own, True))
        torch.save(saved, path)
        resumed = digits_run("sgd", tmp_path, "--optimizer", kind, "--epochs", epochs, "--resume", "auto")
        assert resumed["epochs"] == epochs


def test_no_snapshot_holds_statistics_that_are_not_finite(tmp_path):
    """Losses are read late on a GPU, and gradients accumulate: the network's buffers know first."""
    with pytest.raises(UserError, match="epoch 1: the (network is not finite|test loss is|training loss is)"):
        digits_run("sgd", tmp_path, "--epochs", 1, "--accumulate", 9, "--samples-per-epoch", 7, "--lr", 1e38)
    for path in tmp_path.glob("[0-9]*.pt"):
        assert all(value.isfinite().all() for value in state(path).values())
