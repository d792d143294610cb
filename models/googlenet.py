"""GoogLeNet of Szegedy et al., "Going Deeper with Convolutions" (arXiv 1409.4842).

What differs from the paper: the stem is three 3 x 3 convolutions of stride 1, so the inception modules work on 16, 8
and 4 pixels; two 3 x 3 convolutions stand for each 5 x 5; batch norm behind every convolution; no local response
normalisation and no auxiliary classifiers. Peculiarities of the official release: the first convolution of each such
pair has a batch norm whose eps is its number of channels (128, say, where 1e-5 is usual), the convolutions of the
inception modules keep their bias, and the dropout is one of whole channels (after the pooling: of single features).

Parameters for 10 / 100 classes: googlenet 6,310,314 / 6,402,564.
"""
from functools import partial

import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation

# The paper's table 1: out 1 x 1, reduce and out 3 x 3, reduce and out "5 x 5", out pool; rows of stages 3, 4 and 5.
INCEPTIONS = [
    [(64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)],
    [
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ],
    [(256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)],
]
conv = partial(Conv2dNormActivation, bias=True)  # convolution, batch norm, ReLU


class Inception(nn.Module):
    """Four branches side by side: (N, c_in, H, W) -> (N, out1 + out3 + out5 + out_pool, H, W)."""

    def __init__(self, c_in, out1, reduce3, out3, reduce5, out5, out_pool):
        super().__init__()
        self.branches = nn.ModuleList([
            conv(c_in, out1, 1),
            nn.Sequential(conv(c_in, reduce3, 1), conv(reduce3, out3, 3)),
            nn.Sequential(
                conv(c_in, reduce5, 1),
                conv(reduce5, out5, 3, norm_layer=partial(nn.BatchNorm2d, eps=out5)),
                conv(out5, out5, 3),
            ),
            nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv(c_in, out_pool, 1)),
        ])

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def googlenet(num_classes):
    """(N, 3, 32, 32) images -> (N, num_classes) logits."""
    layers = [Conv2dNormActivation(c_in, c_out, 3) for c_in, c_out in ((3, 64), (64, 64), (64, 192))]
    c_in, pool = 192, nn.MaxPool2d(3, stride=2, padding=1)
    for stage in INCEPTIONS:
        layers.append(pool)
        for out1, reduce3, out3, reduce5, out5, out_pool in stage:
            layers.append(Inception(c_in, out1, reduce3, out3, reduce5, out5, out_pool))
            c_in = out1 + out3 + out5 + out_pool
    layers += [nn.AdaptiveAvgPool2d(1), nn.Dropout2d(0.4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(c_in, num_classes))


MODELS = {"googlenet": googlenet}
