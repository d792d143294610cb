"""Xception of Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions" (arXiv 1610.02357).

What differs from the ImageNet network: the stem's first convolution and the third block have no stride, the stem is
padded, and the classifier is one linear layer without dropout. Peculiarity of the official release: biases in the
shortcuts' convolutions, though a batch norm follows.

Parameters for 10 / 100 classes: xception 20,829,578 / 21,013,988.
"""
from itertools import pairwise

from torch import nn
from torchvision.ops import Conv2dNormActivation


def separables(*widths):
    """A list of layers: ReLU, 3 x 3 convolution of each channel by itself, 1 x 1 convolution across the channels and
    batch norm, again and again: (N, widths[0], H, W) -> (N, widths[-1], H, W)."""
    layers = []
    for c_in, c_out in pairwise(widths):
        depthwise = nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False)
        layers += [nn.ReLU(), depthwise, nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out)]
    return layers


class Block(nn.Module):
    """The sum of some layers and a shortcut: shapes as the two give them."""

    def __init__(self, layers, shortcut):
        super().__init__()
        self.residual = nn.Sequential(*layers)
        self.shortcut = shortcut

    def forward(self, x):
        return self.residual(x) + self.shortcut(x)


def pooled(layers, c_in, c_out, stride=2):
    """A block whose layers end in max pooling: (N, c_in, H, W) -> (N, c_out, H / stride, W / stride)."""
    shortcut = Conv2dNormActivation(c_in, c_out, 1, stride, activation_layer=None, bias=True)
    return Block([*layers, nn.MaxPool2d(3, stride, 1)], shortcut)


def xception(num_classes):
    """(N, 3, 32, 32) images -> (N, num_classes) logits."""
    return nn.Sequential(
        *(Conv2dNormActivation(3, 32), Conv2dNormActivation(32, 64)),
        pooled(separables(64, 128, 128)[1:], 64, 128),  # the stem has a ReLU at its end
        pooled(separables(128, 256, 256), 128, 256),
        pooled(separables(256, 728, 728), 256, 728, stride=1),
        *(Block(separables(728, 728, 728, 728), nn.Identity()) for _ in range(8)),
        pooled(separables(728, 728, 1024), 728, 1024),
        *separables(1024, 1536, 2048)[1:],
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, num_classes)),
    )


MODELS = {"xception": xception}
