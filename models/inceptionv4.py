"""Inception-v4 and Inception-ResNet-v2 of Szegedy, Ioffe, Vanhoucke and Alemi, "Inception-v4, Inception-ResNet and the
Impact of Residual Connections on Learning" (arXiv 1602.07261).

What differs from the ImageNet networks: nothing in the stem has a stride, and only its first convolution has no
padding, so the first blocks see 30 x 30 pixels. The two reductions leave 14 x 14 and 7 x 7 (inceptionv4, whose second
reduction is padded) or 6 x 6 (inceptionresnetv2).
Peculiarities of the official release: dropout of whole channels (on 1 x 1 pixels the same as ordinary dropout), and in
the residual blocks a 1 x 1 convolution on the shortcut too, biases in both 1 x 1 convolutions before the sum, and batch
norm after it; the residuals of blocks B and C are multiplied by 0.1, those of A are not (in the paper all are, by 0.1
to 0.3). The 1154 channels are the paper's.

Parameters for 10 / 100 classes: inceptionv4 41,158,186 / 41,296,516; inceptionresnetv2 65,257,662 / 65,442,072.
"""
from torch import nn

from models.inceptionv3 import Branches, chain, fork


def stem():
    """(N, 3, 32, 32) -> (N, 384, 30, 30)."""
    return nn.Sequential(
        chain(3, (32, 3, 1, 0), (32, 3), (64, 3)),
        Branches(64, [(96, 3)], [nn.MaxPool2d(3, 1, 1)]),
        Branches(160, [(64, 1), (64, (7, 1)), (64, (1, 7)), (96, 3)], [(64, 1), (96, 3)]),
        Branches(192, [nn.MaxPool2d(3, 1, 1)], [(192, 3)]),
    )


def reduction_a(c1, c2, c3):
    """(N, 384, 30, 30) -> (N, 768 + c3, 14, 14)."""
    return Branches(384, [(c1, 1), (c2, 3), (c3, 3, 2, 0)], [(384, 3, 2, 0)], [nn.MaxPool2d(3, 2)])


def block_a():
    """(N, 384, H, W) -> the same."""
    return Branches(
        384,
        [(64, 1), (96, 3), (96, 3)],
        [(64, 1), (96, 3)],
        [(96, 1)],
        [nn.AvgPool2d(3, 1, 1), (96, 1)],
    )


def block_b():
    """(N, 1024, H, W) -> the same."""
    return Branches(
        1024,
        [(192, 1), (192, (1, 7)), (224, (7, 1)), (224, (1, 7)), (256, (7, 1))],
        [(192, 1), (224, (1, 7)), (256, (7, 1))],
        [(384, 1)],
        [nn.AvgPool2d(3, 1, 1), (128, 1)],
        order=(2, 1, 0, 3),
    )


def block_c():
    """(N, 1536, H, W) -> the same."""
    return Branches(
        1536,
        [(384, 1), (448, (1, 3)), (512, (3, 1)), fork(256)],
        [(384, 1), fork(256)[::-1]],
        [(256, 1)],
        [nn.AvgPool2d(3, 1, 1), (256, 1)],
        order=(2, 1, 0, 3),
    )


def inceptionv4(num_classes):
    """(N, 3, 32, 32) images -> (N, num_classes) logits."""
    return nn.Sequential(
        stem(),
        *(block_a() for _ in range(4)),
        reduction_a(192, 224, 256),
        *(block_b() for _ in range(7)),
        Branches(
            1024,
            [(256, 1), (256, (1, 7)), (320, (7, 1)), (320, 3, 2)],
            [(192, 1), (192, 3, 2)],
            [nn.MaxPool2d(3, 2, 1)],
            order=(1, 0, 2),
        ),
        *(block_c() for _ in range(3)),
        *(nn.AvgPool2d(7), nn.Dropout2d(1 - 0.8), nn.Flatten(), nn.Linear(1536, num_classes)),
    )


class ScaledResidual(nn.Module):
    """Branches, joined from the last to the first and made `c_out` wide, times `scale`, plus the shortcut: (N, c_in, H,
    W) -> (N, c_out, H, W)."""

    def __init__(self, c_in, c_out, scale, branches):
        super().__init__()
        width = sum(layers[-1][0] for layers in branches)
        joined = Branches(c_in, *branches, order=range(len(branches))[::-1])
        self.branch = nn.Sequential(joined, nn.Conv2d(width, c_out, 1))
        self.shortcut = nn.Conv2d(c_in, c_out, 1)
        self.output = nn.Sequential(nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))
        self.scale = scale

    def forward(self, x):
        return self.output(self.scale * self.branch(x) + self.shortcut(x))


def residuals(count, c_in, c_out, scale, *branches):
    """`count` residual blocks: (N, c_in, H, W) -> (N, c_out, H, W)."""
    return nn.Sequential(*(ScaledResidual(c_out if i else c_in, c_out, scale, branches) for i in range(count)))


def inceptionresnetv2(num_classes):
    """(N, 3, 32, 32) images -> (N, num_classes) logits."""
    return nn.Sequential(
        stem(),
        residuals(5, 384, 384, 1, [(32, 1), (48, 3), (64, 3)], [(32, 1), (32, 3)], [(32, 1)]),
        reduction_a(256, 256, 384),
        residuals(10, 1152, 1154, 0.1, [(128, 1), (160, (1, 7)), (192, (7, 1))], [(192, 1)]),
        Branches(
            1154,
            [(256, 1), (384, 3, 2, 0)],
            [(256, 1), (288, 3, 2, 0)],
            [(256, 1), (288, 3), (320, 3, 2, 0)],
            [nn.MaxPool2d(3, 2)],
        ),
        residuals(5, 2146, 2048, 0.1, [(192, 1), (224, (1, 3)), (256, (3, 1))], [(192, 1)]),
        *(nn.AdaptiveAvgPool2d(1), nn.Dropout2d(1 - 0.8), nn.Flatten(), nn.Linear(2048, num_classes)),
    )


MODELS = {"inceptionv4": inceptionv4, "inceptionresnetv2": inceptionresnetv2}
