"""The oracle's network and data in torch, an epoch of the scripts' loop, and steps as other loops make them."""
import oracle
import torch
import torch.nn.functional as F
from torch import nn

from dldr.engine import Loop
from dldr.subspace import ProjectedBFGS, flat_parameters

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


def train(model, optimizer, batches, accumulate=1):
    """One epoch of the scripts' loop; w (D,) after each step."""
    loop, history = Loop(model, optimizer, accumulate=accumulate), []
    update = loop.update

    def recorded(*args):
        update(*args)
        history.append(flat_parameters(model).clone())

    loop.update = recorded
    loop.train_epoch(batches)
    return history


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y)


def closure(kind, optimizer, model, batch):
    """The batch's loss as a closure: one that returns it ("loss only"), or one for torch.optim.LBFGS."""
    def for_lbfgs():
        optimizer.zero_grad()
        assert torch.is_grad_enabled()
        loss = loss_of(model, *batch)
        loss.backward()
        return loss

    return for_lbfgs if kind == "for LBFGS" else lambda: loss_of(model, *batch)


def step(optimizer, model, *batch):
    """One iteration of either method as their docstrings say."""
    if isinstance(optimizer, ProjectedBFGS):
        return optimizer.step(closure("loss only", optimizer, model, batch))
    optimizer.zero_grad()
    loss_of(model, *batch).backward()
    return optimizer.step()
