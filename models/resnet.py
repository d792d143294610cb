"""The ImageNet ResNets of He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), for 32 x 32
images, and the trunk that the other residual families share.

What differs from the ImageNet version: the stem is one 3 x 3 convolution of stride 1 without max pooling, so the four
stages work at 32, 16, 8 and 4 pixels; as in torchvision, a bottleneck has its stride in the 3 x 3 convolution.

Parameters for 10 / 100 classes: resnet18 11,173,962 / 11,220,132; resnet34 21,282,122 / 21,328,292; resnet50 23,520,842
/ 23,705,252; resnet101 42,512,970 / 42,697,380; resnet152 58,156,618 / 58,341,028.
"""
import math
from functools import partial

import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation

from models.blocks import Residual


# The convolutions of a branch: for each (channels out, kernel, stride), then optionally (padding, groups).
def basic(width, stride):
    return (width, 3, stride), (width, 3, 1)


def bottleneck(width, stride):
    return (width, 1, 1), (width, 3, stride), (4 * width, 1, 1)


VARIANTS = {  # depth: branch, blocks per stage
    18: (basic, (2, 2, 2, 2)),
    34: (basic, (3, 4, 6, 3)),
    50: (bottleneck, (3, 4, 6, 3)),
    101: (bottleneck, (3, 4, 23, 3)),
    152: (bottleneck, (3, 8, 36, 3)),
}


def make_branch(c_in, convolutions, bias):
    """The convolutions with batch norm, and ReLUs between: (N, c_in, H, W) -> (N, c_out, H / stride, W / stride)."""
    channels = [c_in, *(c_out for c_out, *_ in convolutions)]
    pairs = zip(channels, convolutions, strict=False)
    branch = nn.Sequential(*(Conv2dNormActivation(c, *conv, bias=bias) for c, conv in pairs))
    branch[-1].pop(-1)
    return branch


def make_shortcut(c_in, convolutions, bias):
    """The input, or where the branch changes its shape a 1 x 1 convolution with batch norm: shapes as there."""
    c_out, stride = convolutions[-1][0], math.prod(conv[2] for conv in convolutions)
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return Conv2dNormActivation(c_in, c_out, 1, stride, activation_layer=None, bias=bias)


class Block(Residual):
    """The ReLU of a branch plus a shortcut: (N, c_in, H, W) -> (N, c_out, H / stride, W / stride)."""

    def __init__(self, c_in, convolutions, bias=False):
        super().__init__(make_branch(c_in, convolutions, bias), make_shortcut(c_in, convolutions, bias))

    def forward(self, x):
        return F.relu(super().forward(x))


class ResNet(nn.Module):
    """(N, 3, 32, 32) images -> (N, num_classes) logits: a stem, stages of blocks, pooling, one linear layer.

    `branch(width, stride)` lists a block's convolutions, `block(c_in, convolutions)` makes the module. Each stage after
    the first halves the resolution and doubles the width.
    """

    def __init__(self, stem, block, branch, depths, pool, num_classes, width=64):
        super().__init__()
        branches = [
            branch(width << stage, stride=2 if stage > 0 and i == 0 else 1)
            for stage, depth in enumerate(depths)
            for i in range(depth)
        ]
        channels = [stem.out_channels, *(convolutions[-1][0] for convolutions in branches)]
        self.stem = stem
        self.blocks = nn.Sequential(*map(block, channels, branches))
        self.pool = pool
        self.classifier = nn.Linear(channels[-1], num_classes)

    def forward(self, x):
        return self.classifier(self.pool(self.blocks(self.stem(x))).flatten(1))


def resnet(depth, num_classes):
    stem = Conv2dNormActivation(3, 64, 3)
    return ResNet(stem, Block, *VARIANTS[depth], nn.AdaptiveAvgPool2d(1), num_classes)


MODELS = {f"resnet{depth}": partial(resnet, depth) for depth in VARIANTS}
