"""Inception-v3 of Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (arXiv 1512.00567).

What differs from the ImageNet network: the stem has neither strides nor pooling, so its last convolution, without
padding, gives 30 x 30 pixels; the two reductions leave 14 x 14 and 6 x 6; and there is no auxiliary classifier.
Peculiarities of the official release: 3 x 3 instead of 1 x 1 convolutions after the pooling of the 5 x 5 blocks,
columns before rows in both branches of the 7 x 7 blocks, average instead of max pooling in the second reduction, and
dropout of whole channels (on 1 x 1 pixels the same as ordinary dropout).

Parameters for 10 / 100 classes: inceptionv3 22,133,738 / 22,318,148.
"""
import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation


def chain(c_in, *layers):
    """Layers in sequence: a tuple (channels, kernel size, stride=1, padding="same") makes a convolution with batch norm
    and ReLU; a list makes branches; any other module goes in as it is."""
    modules = []
    for layer in layers:
        if isinstance(layer, tuple):
            layer, c_in = Conv2dNormActivation(c_in, *layer), layer[0]
        elif isinstance(layer, list):
            layer = Branches(c_in, *layer)
        modules.append(layer)
    return nn.Sequential(*modules)


class Branches(nn.Module):
    """Chains side by side, joined along the channels, in `order` if it is not theirs: (N, c_in, H, W) -> (N, sum of
    their channels, H', W')."""

    def __init__(self, c_in, *branches, order=None):
        super().__init__()
        self.branches = nn.ModuleList(chain(c_in, *layers) for layers in branches)
        self.order = order or range(len(branches))

    def forward(self, x):
        return torch.cat([self.branches[i](x) for i in self.order], dim=1)


def fork(c):
    """The end of a branch that is widened instead of deepened: a row and a column of 3 pixels side by side."""
    return [[(c, (1, 3))], [(c, (3, 1))]]


def block5(c_in, c_pool):
    """1 x 1, 5 x 5 and twice 3 x 3 pixels: (N, c_in, H, W) -> (N, 224 + c_pool, H, W)."""
    return Branches(
        c_in,
        [(64, 1)],
        [(48, 1), (64, 5)],
        [(64, 1), (96, 3), (96, 3)],
        [nn.AvgPool2d(3, 1, 1), (c_pool, 3)],
    )


def block7(c):
    """1 x 1, 7 x 7 and twice 7 x 7 pixels, as columns and rows `c` channels wide: (N, 768, H, W) -> the same."""
    column, row = (c, (7, 1)), (c, (1, 7))
    return Branches(
        768,
        [(192, 1)],
        [(c, 1), column, (192, (1, 7))],
        [(c, 1), column, row, column, (192, (1, 7))],
        [nn.AvgPool2d(3, 1, 1), (192, 1)],
    )


def block3(c_in):
    """1 x 1, 3 x 3 and twice 3 x 3 pixels, the last ones forked: (N, c_in, H, W) -> (N, 2048, H, W)."""
    return Branches(
        c_in,
        [(320, 1)],
        [(384, 1), fork(384)],
        [(448, 1), (384, 3), fork(384)],
        [nn.AvgPool2d(3, 1, 1), (192, 1)],
    )


def inceptionv3(num_classes):
    """(N, 3, 32, 32) images -> (N, num_classes) logits."""
    return nn.Sequential(
        chain(3, (32, 3), (32, 3), (64, 3), (80, 1), (192, 3, 1, 0)),
        *(block5(192, 32), block5(256, 64), block5(288, 64)),
        Branches(288, [(384, 3, 2, 0)], [(64, 1), (96, 3), (96, 3, 2, 0)], [nn.MaxPool2d(3, 2)]),
        *(block7(128), block7(160), block7(160), block7(192)),
        Branches(
            768,
            [(192, 1), (320, 3, 2, 0)],
            [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, 0)],
            [nn.AvgPool2d(3, 2)],
        ),
        *(block3(1280), block3(2048)),
        *(nn.AdaptiveAvgPool2d(1), nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(2048, num_classes)),
    )


MODELS = {"inceptionv3": inceptionv3}
