"""Networks for `--arch tests/small_networks.py:FUNCTION`."""
import random
from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from models.resnet import Block, ResNet, basic
from models.stochasticdepth import StochasticBlock


def small(num_classes):
    """What most tests train: 6,282 parameters for 10 classes, batch norm, thirty times as fast as resnet8."""
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(3, 16, 5, stride=4), bn1=nn.BatchNorm2d(16), relu1=nn.ReLU(),
        conv2=nn.Conv2d(16, 32, 3, stride=2), bn2=nn.BatchNorm2d(32), relu2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), linear=nn.Linear(32, num_classes)))


def no_batch_norm(num_classes):
    """Without batch norm: what a mini-batch's parts add up to is what the whole one gives."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Tanh(), nn.Conv2d(8, 16, 3, stride=2), nn.Tanh(),
                         nn.Flatten(), nn.Linear(16 * 7 * 7, num_classes))


def fixed_batch_norm(num_classes):
    """The same with batch norm, in eval mode throughout, with statistics that are not those of the data."""
    model = no_batch_norm(num_classes)
    for i, channels in ((3, 16), (1, 8)):
        norm = nn.BatchNorm2d(channels).eval()
        norm.running_mean += 0.1
        norm.running_var *= 0.5
        norm.train = lambda mode=True, norm=norm: norm
        model.insert(i, norm)
    return model


def unused_layer(num_classes):
    """The same without batch norm, and with parameters that never get a gradient."""
    model = no_batch_norm(num_classes)
    model[0].unused = nn.Linear(3, 3)
    model.unused_parameters = True
    return model


def dropout(num_classes, block=Block):
    stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    model = ResNet(stem, block, basic, (1, 1, 1), nn.AdaptiveAvgPool2d(1), num_classes, width=8)
    model.pool = nn.Sequential(model.pool, nn.Dropout(0.5))
    return model


def stochastic_depth(num_classes):
    """Dropout, and blocks that are skipped at random (steps of such are never captured)."""
    model = dropout(num_classes, StochasticBlock)
    for block in model.blocks:
        block.survival = 0.5
    return model


class Peculiar(nn.Module):
    """What networks of others do: a mask of -inf, an expanded buffer, a tensor kept from the pass before, noise from
    Python's and numpy's generators, state dicts of a version."""

    _version = 2

    def __init__(self, num_classes):
        super().__init__()
        self.network, self.kept = small(num_classes), {}
        self.register_buffer("mask", torch.full((num_classes, num_classes), -torch.inf).triu(1))
        self.register_buffer("drawn", torch.tensor([np.random.rand(), random.random()]))
        self.register_buffer("scale", torch.ones(1).expand(num_classes), persistent=False)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != 2:
            raise ValueError("version should be 2")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def forward(self, x):
        if self.training:
            x = x + 0.1 * random.random() + 0.1 * np.random.rand()
        ones = self.kept.setdefault(len(x), torch.ones(len(x), 1))
        return self.network(x) * ones * self.scale + self.mask.diagonal()


def peculiar(num_classes):
    return Peculiar(num_classes)
