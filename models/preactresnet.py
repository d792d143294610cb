"""The pre-activation ResNets of He et al., "Identity Mappings in Deep Residual Networks" (arXiv 1603.05027).

Batch norm and ReLU come before each convolution, and nothing follows the sum. As in models/resnet.py, a 3 x 3 stem of
stride 1 suits 32 x 32 images. Peculiarities of the official release: a projection shortcut takes the block's raw input
(in the paper it shares the first activation); the convolutions have a bias; the stem has its own batch norm and ReLU
besides the first block's; a bottleneck has its stride in the first 1 x 1 convolution; nothing between last block and
pooling.

Parameters for 10 / 100 classes: preactresnet18 11,176,074 / 11,222,244; preactresnet34 21,287,946 / 21,334,116;
preactresnet50 23,535,754 / 23,720,164; preactresnet101 42,553,994 / 42,738,404; preactresnet152 58,220,682 /
58,405,092.
"""
import math
from functools import partial

import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation

from models.blocks import Residual, preactivated
from models.resnet import VARIANTS, ResNet, basic


def block(c_in, convolutions, dropout=()):
    """A pre-activation block: (N, c_in, H, W) -> (N, c_out, H / stride, W / stride); `dropout` is a sequence of layers
    before its last convolution."""
    layers, c = [], c_in
    for c_out, kernel, stride in convolutions:
        layers += preactivated(c, c_out, kernel, stride)
        c = c_out
    stride = math.prod(stride for *_, stride in convolutions)
    projection = nn.Conv2d(c_in, c, 1, stride) if stride > 1 or c_in != c else None
    return Residual(nn.Sequential(*layers[:-1], *dropout, layers[-1]), projection)


def bottleneck(width, stride):
    return (width, 1, stride), (width, 3, 1), (4 * width, 1, 1)


def preactresnet(depth, num_classes):
    stem = Conv2dNormActivation(3, 64, 3, bias=True)
    branch, depths = VARIANTS[depth]
    pool = partial(F.adaptive_avg_pool2d, output_size=1)
    return ResNet(stem, block, branch if branch is basic else bottleneck, depths, pool, num_classes)


MODELS = {f"preactresnet{depth}": partial(preactresnet, depth) for depth in VARIANTS}
