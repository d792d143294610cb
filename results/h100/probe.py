"""Times ResNet-20's steps on a GPU, a JSON line each: `PYTHONPATH=. python results/h100/probe.py SECTION ...`

Sections: info equal steps epoch parts profile. As it was run with revision b142a88 (whose SGD has
no foreach=True), less variants of a step that are not in the product; kept with its results only.
"""
import json
import os
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

if "equal" in sys.argv:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
import numpy as np
import torch

import datasets
import models
import train_sgd
import utils
from dldr import engine, files, graphs
from dldr.subspace import Basis, ProjectedBFGS, ProjectedSGD, flat_parameters, pca_basis

SGD = Namespace(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4)
CL = torch.channels_last


def say(section, **facts):
    print(json.dumps({"section": section, **facts}, default=str), flush=True)


def ms(function, n=200, warm=10):
    """Milliseconds per call, back to back (CUDA events), median of 5 blocks."""
    for _ in range(warm):
        function()
    times = []
    for _ in range(5):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        for _ in range(n):
            function()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) / n)
    return round(sorted(times)[2], 4)


def build(device, B=128, half=False, nchw=False, captured=True, batch=None):
    """(one step as a function, model, w) of ResNet-20 and SGD, on one batch."""
    torch.manual_seed(1)
    model = models.get_model("resnet20", 10).to(device).train()
    w = flat_parameters(model)
    optimizer = train_sgd.make_optimizer(SGD, list(model.parameters()))
    capture = partial(graphs.Graphed, device=device) if captured else graphs.eager
    loop = engine.Loop(model, optimizer, half=half, capture=capture)
    if batch is None:
        x = torch.randn(B, 3, 32, 32, device=device)
        batch = (x if nchw else x.contiguous(memory_format=CL)), torch.randint(10, (B,), device=device)

    def step():
        out = loop.passes(*batch, len(batch[1]), 1)
        loop.step(0.1)
        optimizer.zero_grad(set_to_none=loop.set_to_none)
        return out

    step()
    return step, model, w


def info(device):
    x = torch.empty(2**30, device=device)
    y = torch.empty_like(x)
    copy = ms(lambda: y.copy_(x), 10, 2)
    say("info", gpu=torch.cuda.get_device_name(), torch=torch.__version__, cudnn=torch.backends.cudnn.version(),
        cores=os.cpu_count(), copy_TB_per_s=round(8 * 2**30 / copy / 1e9, 3))


def equal(device):
    """Captured and eager steps give the same bits with deterministic algorithms; else how far they are apart."""
    for deterministic in (True, False):
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = not deterministic
        ends = []
        for captured in (False, True):
            torch.manual_seed(5)
            x = torch.randn(128, 3, 32, 32, device=device).contiguous(memory_format=CL)
            step, model, w = build(device, captured=captured, batch=(x, torch.arange(128, device=device) % 10))
            losses = [float(step()[0]) for _ in range(12)]
            ends.append((w.clone(), losses))
        (a, la), (b, lb) = ends
        say("equal", deterministic=deterministic, bitwise=bool(torch.equal(a, b)),
            relative=float((a - b).norm() / a.norm()), losses=[la[-1], lb[-1]])


def steps(device):
    """Milliseconds per SGD step (passes, update, gradients to zero), repeated on one batch."""
    for name, options in {"as it is": {}, "eager": {"captured": False}, "nchw": {"nchw": True}, "batch 80": {"B": 80},
                          "batch 1024": {"B": 1024}}.items():
        step, *_ = build(device, **options)
        say("steps", variant=name, ms=ms(step, 40 if options.get("B", 128) > 128 else 200))


def profile(device):
    """The kernels of one captured step: microseconds and number per step, largest first; the rest is gaps."""
    for name, options in {"as it is": {}, "half": {"half": True}}.items():
        step, *_ = build(device, **options)
        whole = ms(step)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            for _ in range(10):
                step()
            torch.cuda.synchronize()
        rows = sorted(((e.self_device_time_total / 10, e.count / 10, e.key[:110]) for e in prof.key_averages()
                       if e.self_device_time_total), reverse=True)
        say("profile", variant=name, step_us=1e3 * whole, kernels_us=round(sum(r[0] for r in rows), 1),
            kernels=round(sum(r[1] for r in rows), 1), top=[[round(t, 1), n, k] for t, n, k in rows[:22]])


def epoch(device):
    """Seconds of an epoch's parts on random images; the first epochs eager and capturing, the others replayed."""
    rng, source = np.random.default_rng(0), datasets.SOURCES["CIFAR10"]

    def batches(n, size, **options):
        return datasets.ArrayBatches(rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n), source,
                                     size, device, **options)

    train, test = batches(50000, 128, seed=1, shuffle=True, augment=True), batches(10000, 2000)

    def seconds(function):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        return round(time.perf_counter() - start, 4)

    model = models.get_model("resnet20", 10).to(device)
    flat_parameters(model)
    loop = engine.Loop(model, train_sgd.make_optimizer(SGD, list(model.parameters())), read_every=50,
                       capture=partial(graphs.Graphed, device=device))
    out = {"batches_alone": [seconds(lambda e=e: sum(1 for _ in train.epoch(e))) for e in range(3)],
           "train": [], "eval": []}
    for e in range(6):
        out["train"].append(seconds(lambda e=e: loop.train_epoch(train.epoch(e), sizes=train.sizes)))
        out["eval"].append(seconds(lambda: engine.evaluate(model, test.epoch(0))))
    state = model.state_dict()
    out["cpu_copy"] = [seconds(lambda: files.cpu_copy(state)) for _ in range(3)]
    out["save"] = [seconds(lambda: files.save_tensors(Path("probe.pt"), state)) for _ in range(5)]
    Path("probe.pt").unlink()
    say("epoch", **out)


def parts(device):
    """Microseconds of what the methods and optimisers add to a step, captured; D 269,722, k 40. Seconds of a basis."""
    model = models.get_model("resnet20", 10).to(device).train()
    w = flat_parameters(model)
    D, k, parameters = len(w), 40, list(model.parameters())
    for p in parameters:
        p.grad = torch.randn_like(p)
    P = torch.linalg.qr(torch.randn(D, k))[0].T.contiguous().to(device)
    theta, v, psgd = torch.randn(k, device=device), torch.randn(D, device=device), ProjectedSGD(model, Basis(P))
    adam = Namespace(optimizer="adam", lr=1e-3, weight_decay=1e-4)
    work = {"P @ v": lambda: P @ v, "P.T @ theta": lambda: P.T @ theta, "cat of gradients": psgd.gradient,
            "P-SGD step": psgd.step, "sgd as it is": train_sgd.make_optimizer(SGD, parameters).step,
            "sgd fused, 65 tensors": torch.optim.SGD(parameters, 0.1, 0.9, weight_decay=1e-4, fused=True).step,
            "adam as it is": train_sgd.make_optimizer(adam, parameters).step,
            "zero_grad": lambda: torch._foreach_zero_([p.grad for p in parameters])}
    facts = {}
    for name, f in work.items():
        g = graphs.Graphed(lambda lr, f=f: (f(), None)[1], device)
        facts[name] = round(1e3 * ms(lambda g=g: g(0.1)), 2)
    pbfgs = ProjectedBFGS(model, Basis(P))
    accept = torch.tensor(-1e30, device=device, dtype=torch.float64)
    facts["P-BFGS search without passes, accepted at once"] = round(
        1e3 * ms(lambda: pbfgs.search(0.0, lambda: accept), 50), 1)
    say("parts", us=facts)
    window, times = torch.randn(81, D, device=device).cumsum(0), []
    for _ in range(4):
        copy = window.clone()
        torch.cuda.synchronize()
        t = time.perf_counter()
        pca_basis(copy, k)
        torch.cuda.synchronize()
        times.append(round(time.perf_counter() - t, 4))
    say("parts", basis_seconds=times)


if __name__ == "__main__":
    gpu = utils.set_up("cuda", conv_tf32=True)
    for section in sys.argv[1:]:
        globals()[section](gpu)
