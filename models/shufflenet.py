"""ShuffleNet of Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices"
(arXiv 1707.01083), with three groups at full width.

What differs from the ImageNet network: the stem has neither stride nor max pooling, so the last stage has 4 x 4 pixels.
Peculiarities of the official release: the first 1 x 1 convolution is grouped like the others, and the convolutions have
a bias, though a batch norm follows.

Parameters for 10 / 100 classes: shufflenet 925,618 / 1,012,108.
"""
from functools import partial

import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation

from models.blocks import ChannelShuffle

GROUPS = 3
STAGES = [(240, 4), (480, 8), (960, 4)]  # channels out, units
conv = partial(Conv2dNormActivation, bias=True)


class Unit(nn.Module):
    """A bottleneck of grouped convolutions whose channels are shuffled, added to its input, or with stride 2 appended
    to its pooled input: (N, c_in, H, W) -> (N, c_out, H / stride, W / stride)."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        hidden = c_out // 4
        self.pool = nn.AvgPool2d(3, stride, 1) if stride == 2 else None
        last = partial(conv, hidden, kernel_size=1, groups=GROUPS, activation_layer=None)
        self.branch = nn.Sequential(
            conv(c_in, hidden, 1, groups=GROUPS),
            ChannelShuffle(GROUPS),
            conv(hidden, hidden, 3, stride, groups=hidden, activation_layer=None),
            last(c_out),
        )
        if self.pool:  # the release draws both, so the same seed gives the same initial values
            self.branch[-1] = last(c_out - c_in)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.branch(x)
        return self.relu(torch.cat([self.pool(x), y], dim=1) if self.pool else x + y)


def shufflenet(num_classes):
    """(N, 3, 32, 32) images -> (N, num_classes) logits."""
    c = 24
    layers = [conv(3, c, 3)]
    for c_out, units in STAGES:
        layers.append(Unit(c, c_out, stride=2))
        layers.extend(Unit(c_out, c_out, stride=1) for _ in range(units - 1))
        c = c_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, num_classes))


MODELS = {"shufflenet": shufflenet}
