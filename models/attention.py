"""Residual Attention Networks of Wang et al., "Residual Attention Network for Image Classification" (arXiv 1704.06904).

Three stages with 256, 512 and 1024 channels of attention modules: a trunk of two pre-activation bottlenecks gives T, a
mask of bottlenecks at half the resolution gives M in (0, 1); (1 + M) T is passed on. The paper's p = 1, t = 2, r = 1
throughout. What differs from the ImageNet version: a 3 x 3 stem without pooling, and a first bottleneck with stride 2,
so that the stages work at 16, 8 and 4 pixels a side and the last bottlenecks at 2.

Peculiarities of the official release: every mask pools its input once (the paper's hourglasses three times, twice and
once in the three stages), so the first stage's uses one bottleneck twice and one never, the third's one never; a mask
repeats pixels (the paper interpolates); all convolutions have a bias; every bottleneck has a convolution as its
shortcut, also where the shapes match; no batch norm or ReLU follows the last bottleneck.

Parameters for 10 / 100 classes: attention56 55,519,370 / 55,703,780; attention92 105,261,450 / 105,445,860.
"""
from functools import partial

import torch.nn.functional as F
from torch import nn

from models.blocks import Residual, preactivated


def bottleneck(c_in, c_out, stride=1):
    """1 x 1, 3 x 3, 1 x 1 convolutions beside a 1 x 1: (N, c_in, H, W) -> (N, c_out, H / stride, W / stride)."""
    width = c_out // 4
    branch = nn.Sequential(
        *preactivated(c_in, width, stride=stride),
        *preactivated(width, width, kernel=3),
        *preactivated(width, c_out),
    )
    return Residual(branch, nn.Conv2d(c_in, c_out, 1, stride))


class Attention(nn.Module):
    """The trunk times one plus the mask, between two bottlenecks: (N, c, H, W) -> the same. `levels` is the number of
    poolings in the paper's mask."""

    unused_parameters = True  # one bottleneck of `skips`, except for two levels

    def __init__(self, c, levels):
        super().__init__()

        def several(count):
            return nn.Sequential(*(bottleneck(c, c) for _ in range(count)))

        self.first, self.trunk = bottleneck(c, c), several(2)
        self.down, self.up, self.skips = several(levels + 1), several(levels + 1), several(max(levels - 1, 1))
        self.gates = nn.Sequential(*preactivated(c, c), *preactivated(c, c), nn.Sigmoid())
        self.last = bottleneck(c, c)
        self.levels = levels

    def mask(self, x):
        half = F.max_pool2d(x, 3, stride=2, padding=1)
        skips = []
        if self.levels > 2:
            skips.append(self.down[2](self.down[1](half)))
        if self.levels > 1:
            skips.append(self.skips[-1](self.down[0](half)))
        y = self.up[:2](self.down[-2:](half))
        for skip, up in zip(skips, self.up[2:], strict=True):
            y = up(y + skip)
        return self.gates(F.interpolate(y, size=x.shape[2:]))

    def forward(self, x):
        x = self.first(x)
        return self.last((1 + self.mask(x)) * self.trunk(x))


def attention(modules, num_classes):
    """(N, 3, 32, 32) images -> (N, num_classes) logits; `modules` in each of the three stages."""
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(inplace=True), bottleneck(64, 256, stride=2)]
    for c, levels, count in zip((256, 512, 1024), (3, 2, 1), modules, strict=True):
        layers += [Attention(c, levels) for _ in range(count)] + [bottleneck(c, 2 * c, stride=2)]
    layers += [bottleneck(2048, 2048), bottleneck(2048, 2048), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(2048, num_classes))


MODELS = {"attention56": partial(attention, (1, 1, 1)), "attention92": partial(attention, (1, 2, 3))}
