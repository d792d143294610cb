"""The DenseNets of Huang et al., "Densely Connected Convolutional Networks" (arXiv 1608.06993), DenseNet-BC: with
bottlenecks, and transitions that halve the channels.

What differs from the ImageNet DenseNets: the stem is one 3 x 3 convolution that keeps the resolution, without batch
norm or pooling, so the four dense blocks work on 32, 16, 8 and 4 pixels. The dense blocks are torchvision's; the
transitions are not, for they have no ReLU between batch norm and convolution (as the paper words them).

Parameters for 10 / 100 classes: densenet121 6,956,298 / 7,048,548; densenet161 26,482,378 / 26,681,188;
densenet169 12,493,322 / 12,643,172; densenet201 18,104,330 / 18,277,220.
"""
from functools import partial

from torch import nn
from torchvision.models.densenet import _DenseBlock


def densenet(growth, blocks, num_classes):
    """(N, 3, 32, 32) images -> (N, num_classes) logits; `blocks` are the numbers of dense layers of the four blocks."""
    channels = 2 * growth
    layers = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for i, depth in enumerate(blocks):
        if i > 0:
            layers += [nn.BatchNorm2d(channels), nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
        layers.append(_DenseBlock(depth, channels, bn_size=4, growth_rate=growth, drop_rate=0))
        channels += depth * growth
    layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, num_classes))


MODELS = {
    "densenet121": partial(densenet, 32, (6, 12, 24, 16)),
    "densenet161": partial(densenet, 48, (6, 12, 36, 24)),
    "densenet169": partial(densenet, 32, (6, 12, 32, 32)),
    "densenet201": partial(densenet, 32, (6, 12, 48, 32)),
}
