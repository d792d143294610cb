"""ResNets with the stochastic depth of Huang et al., "Deep Networks with Stochastic Depth" (arXiv 1603.09382).

In train mode, the branch of block l of L is computed with probability 1 - l / 2L, else skipped for the whole batch: its
batch norms see nothing, its parameters get no gradient. In eval mode, it is multiplied by that probability. The rest is
models/resnet.py. Peculiarities of the official release: the stem's convolution has a bias, and so have those of the
basic blocks (18 and 34 layers), but not those of the bottlenecks.

Parameters for 10 / 100 classes: stochasticdepth18 11,178,762 / 11,224,932; stochasticdepth34 21,290,634 / 21,336,804;
stochasticdepth50 23,520,906 / 23,705,316; stochasticdepth101 42,513,034 / 42,697,444.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation

from models.resnet import VARIANTS, Block, ResNet, basic


class StochasticBlock(Block):
    """A residual block with probability `survival`, else its shortcut: shapes as there."""

    survival = 1.0
    draws_on_host = True

    def forward(self, x):
        if not self.training:
            return F.relu(self.survival * self.branch(x) + self.shortcut(x))
        if torch.rand((), device="cpu") < self.survival:  # drawn on the host: no wait for the device
            return super().forward(x)
        return F.relu(self.shortcut(x))


def stochasticdepth(depth, num_classes):
    branch, depths = VARIANTS[depth]
    stem = Conv2dNormActivation(3, 64, 3, bias=True)
    block = partial(StochasticBlock, bias=branch is basic)
    model = ResNet(stem, block, branch, depths, nn.AdaptiveAvgPool2d(1), num_classes)
    for number, block in enumerate(model.blocks, 1):
        block.survival = 1 - number / (2 * len(model.blocks))
    return model


MODELS = {f"stochasticdepth{depth}": partial(stochasticdepth, depth) for depth in (18, 34, 50, 101)}
