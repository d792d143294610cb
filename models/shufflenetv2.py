"""ShuffleNet V2 of Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design"
(arXiv 1807.11164), at full width.

What differs from the ImageNet network: the stem has neither stride nor max pooling, so the last stage has 4 x 4 pixels.
Peculiarities of the official release: no ReLU after the stem's batch norm, units with a stride keep their input's
width until the last 1 x 1 convolution, and the convolutions have a bias, though a batch norm follows.

Parameters for 10 / 100 classes: shufflenetv2 1,268,646 / 1,360,896.
"""
from functools import partial

import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation

from models.blocks import ChannelShuffle

STAGES = [(116, 4), (232, 8), (464, 4)]  # channels out, units
conv = partial(Conv2dNormActivation, bias=True)


def depthwise(c, stride):
    return conv(c, c, 3, stride, groups=c, activation_layer=None)


class Unit(nn.Module):
    """Two branches side by side, then shuffled. With stride 1 each gets half of the channels and the left one keeps
    them as they are, with stride 2 both get all: (N, c_in, H, W) -> (N, c_out, H / stride, W / stride)."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        half = c_out // 2
        self.split = stride == 1
        c = half if self.split else c_in
        self.right = nn.Sequential(conv(c, c, 1), depthwise(c, stride), conv(c, half, 1))
        self.left = nn.Identity() if self.split else nn.Sequential(depthwise(c, stride), conv(c, half, 1))
        self.shuffle = ChannelShuffle(2)

    def forward(self, x):
        left, right = x.chunk(2, dim=1) if self.split else (x, x)
        return self.shuffle(torch.cat([self.left(left), self.right(right)], dim=1))


class ShuffleNetV2(nn.Module):
    """(N, 3, 32, 32) images -> (N, num_classes) logits."""

    def __init__(self, num_classes):
        super().__init__()
        c = 24
        layers = [conv(3, c, 3, activation_layer=None)]
        for c_out, units in STAGES:
            layers.append(Unit(c, c_out, stride=2))
            layers.extend(Unit(c_out, c_out, stride=1) for _ in range(units - 1))
            c = c_out
        self.features = nn.Sequential(*layers, conv(c, 1024, 1))
        self.classifier = nn.Linear(1024, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).mean(dim=(2, 3)))


MODELS = {"shufflenetv2": ShuffleNetV2}
