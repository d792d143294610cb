"""Blocks that several families of networks share. Convolution + batch norm + activation is torchvision's
`Conv2dNormActivation`."""
from torch import nn


class SqueezeExcitation(nn.Module):
    """Gates in (0, 1) for the channels, from their means (Hu et al., arXiv 1709.01507): (N, c, H, W) -> the same."""

    def __init__(self, channels, hidden, activation=nn.ReLU):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gates = nn.Sequential(nn.Linear(channels, hidden), activation(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x):
        return x * self.gates(self.pool(x).flatten(1))[:, :, None, None]
