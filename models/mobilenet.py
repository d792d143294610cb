"""MobileNet of Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications"
(arXiv 1704.04861), at full width.

What differs from the ImageNet network: the stem keeps the resolution, so the last stage has 2 x 2 pixels. Peculiarity
of the official release: the 1 x 1 convolutions have a bias, though a batch norm follows.

Parameters for 10 / 100 classes: mobilenet 3,223,178 / 3,315,428.
"""
from torch import nn
from torchvision.ops import Conv2dNormActivation

BLOCKS = [  # channels out, stride
    (64, 1),
    (128, 2), (128, 1),
    (256, 2), (256, 1),
    (512, 2), *[(512, 1)] * 5,
    (1024, 2), (1024, 1),
]


def mobilenet(num_classes):
    """(N, 3, 32, 32) images -> (N, num_classes) logits."""
    c = 32
    layers = [Conv2dNormActivation(3, c, 3)]
    for c_out, stride in BLOCKS:
        layers.append(Conv2dNormActivation(c, c, 3, stride, groups=c))
        layers.append(Conv2dNormActivation(c, c_out, 1, bias=True))
        c = c_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, num_classes))


MODELS = {"mobilenet": mobilenet}
