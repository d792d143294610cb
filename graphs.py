"""CUDA graphs: the few hundred kernels of a training step recorded once and launched as one."""
from functools import partial

import torch

import distributed
from utils import InputError

WARM_UP = 3  # calls that run as usual first: libraries choose their kernels, optimisers make their state


class Graphed:
    """function(*tensors) -> a tensor or None, recorded at its fourth call of a kind and replayed from then on.

    A kind is the inputs' shapes and `key`, which stands for every Python number inside that may change (the learning
    rate). The first calls of a kind run as usual, so a recorded and a plain run compute the same, and what is called
    seldom is never recorded. Inputs are copied into buffers of the recording and the output is one too: read it
    before the next call. `function` must not synchronise, nor choose its kernels by what a tensor holds.
    On a CPU there is nothing to record: the call is repeated on the buffers.
    """

    def __init__(self, function, device):
        self.function, self.device, self.recordings, self.calls = function, device, {}, {}
        # its recordings never run at the same time, so they may share their memory
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(self, *inputs, key=None):
        kind = key, *((x.shape, x.stride(), x.dtype) for x in inputs)
        if kind not in self.recordings:
            self.calls[kind] = self.calls.get(kind, 0) + 1
            if self.calls[kind] <= WARM_UP:
                return self.function(*inputs)
            self.recordings[kind] = self.record(inputs)
        buffers, replay = self.recordings[kind]
        for buffer, x in zip(buffers, inputs, strict=True):
            buffer.copy_(x)
        return replay()

    def record(self, inputs):
        """Buffers for the inputs, and a function that runs on what they hold."""
        buffers = [x.clone() for x in inputs]
        if self.device.type == "cpu":
            return buffers, lambda: self.function(*buffers)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=torch.cuda.current_stream(),
                              capture_error_mode="thread_local"):  # loader threads may allocate meanwhile
            output = self.function(*buffers)  # is recorded, and computes nothing yet

        def replay():
            graph.replay()
            return output

        return buffers, replay


def plain(function):
    """What stands for Graphed where nothing is recorded."""

    def call(*inputs, key=None):
        return function(*inputs)

    return call


def capturer(mode, model, device, dataset="CIFAR10"):
    """Graphed or `plain`, for --cuda-graphs auto, on or off.

    auto: on a GPU, but for networks that draw on the host which blocks to compute (a recording would repeat one draw),
    for ImageNet, whose steps are long, and for several processes. Raises InputError if such a network, or several
    processes, are asked to be recorded.
    """
    drawn = any(getattr(module, "draws_on_host", False) for module in model.modules())
    if mode == "on" and drawn:
        raise InputError("--cuda-graphs on: this --arch draws anew which blocks to compute; auto or off will do")
    several = distributed.world() > 1
    if mode == "on" and several:
        raise InputError("--cuda-graphs on goes with one process; auto or off will do")
    on = mode == "on" or (mode == "auto" and device.type == "cuda" and not drawn and dataset != "ImageNet"
                          and not several)
    return partial(Graphed, device=device) if on else plain
