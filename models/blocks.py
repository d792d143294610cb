"""Blocks that several families of networks share. Convolution + batch norm + activation is torchvision's
`Conv2dNormActivation`."""
from torch import nn


class Residual(nn.Module):
    """A branch plus a shortcut, by default the input itself: (N, c_in, H, W) -> the shape that both give."""

    def __init__(self, branch, shortcut=None):
        super().__init__()
        self.branch, self.shortcut = branch, shortcut or nn.Identity()

    def forward(self, x):
        return self.branch(x) + self.shortcut(x)


class ChannelShuffle(nn.Module):
    """Channel j of group i becomes channel j groups + i. nn.ChannelShuffle has no derivative in torch 2.4."""

    def __init__(self, groups):
        super().__init__()
        self.groups = groups

    def forward(self, x):
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


def preactivated(c_in, c_out, kernel=1, stride=1):
    """Batch norm, ReLU and convolution: (N, c_in, H, W) -> (N, c_out, H / stride, W / stride)."""
    return nn.BatchNorm2d(c_in), nn.ReLU(inplace=True), nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2)


class SqueezeExcitation(nn.Module):
    """Gates in (0, 1) for the channels, from their means (Hu et al., arXiv 1709.01507): (N, c, H, W) -> the same."""

    def __init__(self, channels, hidden, activation=nn.ReLU):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gates = nn.Sequential(nn.Linear(channels, hidden), activation(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x):
        return x * self.gates(self.pool(x).flatten(1))[:, :, None, None]
