"""The oracle's network in torch, and its data as tensors."""
import oracle
import torch
from torch import nn

from subspace import flat_parameters

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
