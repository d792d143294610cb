"""ResNets with the stochastic depth of Huang et al., "Deep Networks with Stochastic Depth" (arXiv 1603.09382).

In train mode, the branch of block l = 0 ... L - 1 is computed with probability 1 - l / (2 L - 2), else skipped for the
whole batch: its batch norms see nothing, its parameters get no gradient. In eval mode, it is multiplied by that
probability. The rest is models/resnet.py. Peculiarities of the official release: no ReLU follows the sum and the first
block always survives (the paper has the ReLU, and 1 - l / 2L for l = 1 ... L); the stem's convolution has a bias, and
so have those of the basic blocks (18 and 34 layers), but not those of the bottlenecks.

Parameters for 10 / 100 classes: stochasticdepth18 11,178,762 / 11,224,932; stochasticdepth34 21,290,634 / 21,336,804;
stochasticdepth50 23,520,906 / 23,705,316; stochasticdepth101 42,513,034 / 42,697,444.
"""
from functools import partial

import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation

from models.resnet import VARIANTS, Block, ResNet, basic


class StochasticBlock(Block):
    """A branch with probability `survival`, plus a shortcut: shapes as there."""

    survival = 1.0
    draws_on_host = True

    def forward(self, x):
        shortcut = self.shortcut(x)
        if not self.training:
            return self.survival * self.branch(x) + shortcut
        # drawn on the host, which need not wait for the device
        survives = torch.bernoulli(torch.tensor(self.survival, device="cpu"))
        return self.branch(x) + shortcut if survives else shortcut


def stochasticdepth(depth, num_classes):
    branch, depths = VARIANTS[depth]
    stem = Conv2dNormActivation(3, 64, 3, bias=True)
    block = partial(StochasticBlock, bias=branch is basic)
    model = ResNet(stem, block, branch, depths, nn.AdaptiveAvgPool2d(1), num_classes)
    for number, block in enumerate(model.blocks):
        block.survival = 1 - number / (2 * (len(model.blocks) - 1))
    return model


MODELS = {f"stochasticdepth{depth}": partial(stochasticdepth, depth) for depth in (18, 34, 50, 101)}
