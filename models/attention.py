"""Residual Attention Networks of Wang et al., "Residual Attention Network for Image Classification" (arXiv 1704.06904).

Three stages with 256, 512 and 1024 channels of attention modules: a trunk of two pre-activation bottlenecks gives T, an
hourglass of bottlenecks that looks at 2 x 2 pixels in its middle gives a soft mask M in (0, 1); (1 + M) T is passed on.
The paper's p = 1, t = 2, r = 1 throughout. What differs from the ImageNet version: a 3 x 3 stem without pooling, and a
first bottleneck with stride 2, so that the stages work at 16, 8 and 4 pixels a side and the last bottlenecks at 2.
Upsampling repeats pixels, where the paper interpolates: that has a deterministic gradient on a GPU.

Peculiarities of the official release: all convolutions have a bias; every bottleneck has a convolution as its shortcut,
also where the shapes match; no batch norm or ReLU follows the last bottleneck; the hourglass of the third stage, which
has one level, has one more bottleneck than the pattern of the others: here its skip connection.

Parameters for 10 / 100 classes: attention56 55,519,370 / 55,703,780; attention92 105,261,450 / 105,445,860.
"""
from functools import partial

import torch.nn.functional as F
from torch import nn


def preactivated(c_in, c_out, kernel=1, stride=1):
    """Batch norm, ReLU and convolution."""
    return nn.BatchNorm2d(c_in), nn.ReLU(inplace=True), nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 convolutions beside a 1 x 1: (N, c_in, H, W) -> (N, c_out, H / stride, W / stride)."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        width = c_out // 4
        self.residual = nn.Sequential(
            *preactivated(c_in, width, stride=stride),
            *preactivated(width, width, kernel=3),
            *preactivated(width, c_out),
        )
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x):
        return self.residual(x) + self.shortcut(x)


class Hourglass(nn.Module):
    """Bottlenecks at half the resolution around a smaller hourglass (or two more): (N, c, H, W) -> the same."""

    def __init__(self, c, levels, skip=True):
        super().__init__()
        self.down, self.up = Bottleneck(c, c), Bottleneck(c, c)
        if levels > 1:  # the innermost of several has no skip connection
            self.inner = Hourglass(c, levels - 1, skip=levels > 2)
        else:
            self.inner = nn.Sequential(Bottleneck(c, c), Bottleneck(c, c))
        self.skip = Bottleneck(c, c) if skip else None

    def forward(self, x):
        half = self.down(F.max_pool2d(x, 3, stride=2, padding=1))
        inner = self.inner(half)
        if self.skip is not None:
            inner = inner + self.skip(half)
        return F.interpolate(self.up(inner), size=x.shape[2:])


class Attention(nn.Module):
    """The trunk times one plus the soft mask, between two bottlenecks: (N, c, H, W) -> the same."""

    def __init__(self, c, levels):
        super().__init__()
        self.first, self.last = Bottleneck(c, c), Bottleneck(c, c)
        self.trunk = nn.Sequential(Bottleneck(c, c), Bottleneck(c, c))
        self.mask = nn.Sequential(Hourglass(c, levels), *preactivated(c, c), *preactivated(c, c), nn.Sigmoid())

    def forward(self, x):
        x = self.first(x)
        return self.last((1 + self.mask(x)) * self.trunk(x))


def attention(modules, num_classes):
    """(N, 3, 32, 32) images -> (N, num_classes) logits; `modules` in each of the three stages."""
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(inplace=True), Bottleneck(64, 256, stride=2)]
    for c, levels, count in zip((256, 512, 1024), (3, 2, 1), modules, strict=True):
        layers += [Attention(c, levels) for _ in range(count)] + [Bottleneck(c, 2 * c, stride=2)]
    layers += [Bottleneck(2048, 2048), Bottleneck(2048, 2048), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(2048, num_classes))


MODELS = {"attention56": partial(attention, (1, 1, 1)), "attention92": partial(attention, (1, 2, 3))}
