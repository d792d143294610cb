"""ResNeXt (32 x 4d) of Xie et al., "Aggregated Residual Transformations for Deep Neural Networks" (arXiv 1611.05431).

A bottleneck of twice ResNet's width, whose 3 x 3 convolution has 32 groups. As in models/resnet.py, a 3 x 3 stem of
stride 1 suits 32 x 32 images. Peculiarities of the official release: the first 1 x 1 convolution has 32 groups as well,
so there are fewer parameters than in the paper, and the 152 layers have 4, not 8 blocks in the second stage.

Parameters for 10 / 100 classes: resnext50 14,604,362 / 14,788,772; resnext101 25,118,794 / 25,303,204; resnext152
33,159,242 / 33,343,652.
"""
from functools import partial

from torch import nn
from torchvision.ops import Conv2dNormActivation

from models.resnet import Block, ResNet

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 4, 36, 3)}


def branch(width, stride):
    return (2 * width, 1, 1, 0, 32), (2 * width, 3, stride, 1, 32), (4 * width, 1, 1)


def resnext(depth, num_classes):
    stem = Conv2dNormActivation(3, 64, 3)
    return ResNet(stem, Block, branch, DEPTHS[depth], nn.AdaptiveAvgPool2d(1), num_classes)


MODELS = {f"resnext{depth}": partial(resnext, depth) for depth in DEPTHS}
