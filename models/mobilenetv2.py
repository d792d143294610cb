"""MobileNetV2 of Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (arXiv 1801.04381).

What differs from the ImageNet network: the stem and the stage of 160 channels have no stride, which leaves 5 x 5 pixels
to the end. Peculiarities of the official release: the stem is a 1 x 1 convolution with padding 1 (32 -> 34 pixels), the
first block has a 1 x 1 convolution before its depthwise one though nothing is expanded, the convolutions have a bias
though a batch norm follows, and there is no dropout.

Parameters for 10 / 100 classes: mobilenetv2 2,254,090 / 2,369,380.
"""
from functools import partial

from torch import nn
from torchvision.ops import Conv2dNormActivation

from models.blocks import Residual

STAGES = [  # expansion, channels out, blocks, stride of the first
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 1),
    (6, 320, 1, 1),
]
conv = partial(Conv2dNormActivation, activation_layer=nn.ReLU6, bias=True)


def block(c_in, c_out, expansion, stride):
    """Expand, filter each channel, project, with a shortcut where shapes agree: (N, c_in, H, W) -> (N, c_out, H /
    stride, W / stride)."""
    hidden = expansion * c_in
    branch = nn.Sequential(
        conv(c_in, hidden, 1),
        conv(hidden, hidden, 3, stride, groups=hidden),
        conv(hidden, c_out, 1, activation_layer=None),
    )
    return Residual(branch) if stride == 1 and c_in == c_out else branch


class MobileNetV2(nn.Module):
    """(N, 3, 32, 32) images -> (N, num_classes) logits."""

    def __init__(self, num_classes):
        super().__init__()
        c = 32
        layers = [conv(3, c, 1, padding=1)]
        for expansion, c_out, blocks, stride in STAGES:
            for i in range(blocks):
                layers.append(block(c, c_out, expansion, 1 if i else stride))
                c = c_out
        self.features = nn.Sequential(*layers, conv(c, 1280, 1))
        self.classifier = nn.Conv2d(1280, num_classes, 1)

    def forward(self, x):
        return self.classifier(self.features(x).mean(dim=(2, 3), keepdim=True)).flatten(1)


MODELS = {"mobilenetv2": MobileNetV2}
