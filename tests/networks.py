"""The oracle's network and data in torch, and an epoch of the training loop step by step."""
import oracle
import torch
from torch import nn

from dldr.engine import Loop
from dldr.subspace import flat_parameters

DOUBLE = torch.float64


def mlp(w0, dtype=DOUBLE):
    """The oracle's network in torch, at w0 (D,), and its flat parameters."""
    model = nn.Sequential(
        nn.Linear(oracle.FEATURES, oracle.HIDDEN), nn.Tanh(), nn.Linear(oracle.HIDDEN, oracle.CLASSES)
    ).to(dtype)
    w = flat_parameters(model)
    w.copy_(torch.from_numpy(w0))
    return model, w


def tensors(batches, dtype=DOUBLE):
    """numpy mini-batches (x (N, features), y (N,)) as tensors."""
    return [(torch.from_numpy(x).to(dtype), torch.from_numpy(y)) for x, y in batches]


def train(model, optimizer, batches, accumulate=1, after=lambda w: w):
    """One epoch of the scripts' loop; after(w) of a copy of w (D,) after each step."""
    loop, history = Loop(model, optimizer, accumulate=accumulate), []
    update = loop.update

    def recorded(*args):
        update(*args)
        history.append(after(flat_parameters(model).clone()))

    loop.update = recorded
    loop.train_epoch(batches)
    return history
