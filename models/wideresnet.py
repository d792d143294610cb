"""WRN-40-10 of Zagoruyko and Komodakis, "Wide Residual Networks" (arXiv 1605.07146), a network for CIFAR.

Pre-activation blocks of two 3 x 3 convolutions, three stages of six with 160, 320 and 640 channels at 32, 16 and 8
pixels. Peculiarities of the official release: the projection shortcuts take the block's raw input (the paper's code
activates it first), the convolutions have a bias, and the dropout between them is 0.5 (0.3 in the paper).

Parameters for 10 / 100 classes: wideresnet 55,856,330 / 55,914,020.
"""
from torch import nn

from models import preactresnet
from models.resnet import ResNet, basic


def block(c_in, convolutions):
    return preactresnet.block(c_in, convolutions, dropout=[nn.Dropout(0.5)])


def wideresnet(num_classes):
    stem = nn.Conv2d(3, 16, 3, padding=1)
    pool = nn.Sequential(nn.BatchNorm2d(640), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1))
    return ResNet(stem, block, basic, (6, 6, 6), pool, num_classes, width=160)


MODELS = {"wideresnet": wideresnet}
