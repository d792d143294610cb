"""SE-ResNets of Hu et al., "Squeeze-and-Excitation Networks" (arXiv 1709.01507): models/resnet.py with gated branches.

A block's branch ends in channel gates (reduction 16). As there, a 3 x 3 stem of stride 1 suits 32 x 32 images.
Peculiarities of the official release: the convolutions have a bias, and a ReLU stands between the branch's last batch
norm and the gates (the paper has none there), so branches only add.

Parameters for 10 / 100 classes: seresnet18 11,267,842 / 11,314,012; seresnet34 21,451,830 / 21,498,000; seresnet50
26,078,394 / 26,262,804; seresnet101 47,343,354 / 47,527,764; seresnet152 64,861,370 / 65,045,780.
"""
from functools import partial

import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation

from models.blocks import SqueezeExcitation
from models.resnet import VARIANTS, ResNet, make_branch, make_shortcut


class SEBlock(nn.Module):
    """A residual block with channel gates: (N, c_in, H, W) -> (N, c_out, H / stride, W / stride)."""

    def __init__(self, c_in, convolutions):
        super().__init__()
        c_out = convolutions[-1][0]
        self.branch = make_branch(c_in, convolutions, bias=True).append(nn.ReLU(inplace=True))
        if len(convolutions) == 3:  # the release's order of parameters: in bottlenecks the gates come first
            self.gates = SqueezeExcitation(c_out, c_out // 16)
        self.shortcut = make_shortcut(c_in, convolutions, bias=True)
        if len(convolutions) == 2:
            self.gates = SqueezeExcitation(c_out, c_out // 16)

    def forward(self, x):
        return F.relu(self.gates(self.branch(x)) + self.shortcut(x))


def seresnet(depth, num_classes):
    stem = Conv2dNormActivation(3, 64, 3, bias=True)
    pool = partial(F.adaptive_avg_pool2d, output_size=1)
    return ResNet(stem, SEBlock, *VARIANTS[depth], pool, num_classes)


MODELS = {f"seresnet{depth}": partial(seresnet, depth) for depth in VARIANTS}
