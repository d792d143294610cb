"""CUDA graphs: the few hundred kernels of a training step captured once and launched as one."""
from functools import partial

import torch

from dldr import distributed
from dldr.errors import UserError

WARM_UP = 3  # calls that run eagerly first: libraries choose their kernels, optimisers make their state


class Graphed:
    """function(*inputs) -> a tensor or None, captured per input signature after three warm-up calls.

    The signature is the tensors' shapes, and every Python number among the inputs. The first calls of a signature run
    eagerly, so a captured and an eager run compute the same, and what is called seldom is never captured. Tensors are
    copied into static buffers, and the output is one too: read it before the next call. `function` must not
    synchronise, nor choose its kernels by what a tensor holds. On a CPU the call is repeated on the buffers.
    """

    def __init__(self, function, device):
        self.function, self.device, self.captured, self.calls = function, device, {}, {}
        # its graphs never run at the same time, so they may share their memory
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(self, *inputs):
        signature = tuple((x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in inputs)
        if signature not in self.captured:
            self.calls[signature] = self.calls.get(signature, 0) + 1
            if self.calls[signature] <= WARM_UP:
                return self.function(*inputs)
            self.captured[signature] = self.capture(inputs)
        buffers, replay = self.captured[signature]
        for buffer, x in zip(buffers, inputs, strict=True):
            if isinstance(x, torch.Tensor):
                buffer.copy_(x)
        return replay()

    def capture(self, inputs):
        """Static buffers for the inputs, and a function that runs on what they hold."""
        buffers = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        if self.device.type == "cpu":
            return buffers, lambda: self.function(*buffers)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=torch.cuda.current_stream(),
                              capture_error_mode="thread_local"):  # loader threads may allocate meanwhile
            output = self.function(*buffers)  # is captured, and computes nothing yet

        def replay():
            graph.replay()
            return output

        return buffers, replay


def eager(function):
    """Eager fallback."""
    return function


def capturer(mode, model, device, dataset="CIFAR10"):
    """Graphed or `eager`, for --cuda-graphs auto, on or off.

    auto: on a GPU, but for networks that draw on the host which blocks to compute (a graph would repeat one draw), for
    ImageNet, whose steps are long, and for several processes. Raises UserError if it is on for such a network or for
    several processes.
    """
    drawn = any(getattr(module, "draws_on_host", False) for module in model.modules())
    several = distributed.world_size() > 1
    if mode == "on" and (drawn or several):
        reason = "this --arch draws anew which blocks to compute" if drawn else "it needs a single process"
        raise UserError(f"--cuda-graphs on: {reason}; use auto or off")
    auto = device.type == "cuda" and dataset != "ImageNet" and not drawn and not several
    return partial(Graphed, device=device) if mode == "on" or mode == "auto" and auto else eager
