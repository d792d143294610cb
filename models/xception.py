"""Xception of Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions" (arXiv 1610.02357).

What differs from the ImageNet network: the stem's first convolution and the third block have no stride, the stem is
padded, and the classifier is one linear layer without dropout. Peculiarities of the official release: biases in the
shortcuts' convolutions, though a batch norm follows, and the ReLU before block 2, block 3 and the middle blocks changes
the shortcut's input too (the paper's shortcuts see the raw input, as in the exit block).

Parameters for 10 / 100 classes: xception 20,829,578 / 21,013,988.
"""
from itertools import pairwise

from torch import nn
from torchvision.ops import Conv2dNormActivation

from models.blocks import Residual


def separables(*widths):
    """A list of layers: 3 x 3 convolution of each channel by itself, 1 x 1 convolution across the channels and batch
    norm, again and again with ReLUs between: (N, widths[0], H, W) -> (N, widths[-1], H, W)."""
    layers = []
    for c_in, c_out in pairwise(widths):
        depthwise = nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False)
        layers += [nn.ReLU(), depthwise, nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out)]
    return layers[1:]


def pooled(layers, c_in, c_out, stride=2):
    """A block whose layers end in max pooling: (N, c_in, H, W) -> (N, c_out, H / stride, W / stride)."""
    shortcut = Conv2dNormActivation(c_in, c_out, 1, stride, activation_layer=None, bias=True)
    return Residual(nn.Sequential(*layers, nn.MaxPool2d(3, stride, 1)), shortcut)


def xception(num_classes):
    """(N, 3, 32, 32) images -> (N, num_classes) logits."""
    layers = [Conv2dNormActivation(3, 32), Conv2dNormActivation(32, 64), pooled(separables(64, 128, 128), 64, 128)]
    layers += [nn.ReLU(), pooled(separables(128, 256, 256), 128, 256)]
    layers += [nn.ReLU(), pooled(separables(256, 728, 728), 256, 728, stride=1)]
    for _ in range(8):
        layers += [nn.ReLU(), Residual(nn.Sequential(*separables(728, 728, 728, 728)))]
    layers += [pooled([nn.ReLU(), *separables(728, 728, 1024)], 728, 1024), *separables(1024, 1536, 2048)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, num_classes))


MODELS = {"xception": xception}
