"""The SqueezeNet of Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model
size" (arXiv 1602.07360), with the simple bypasses of its section 6.

What differs from the ImageNet SqueezeNet: the stem is a 3 x 3 convolution of stride 1 and the poolings are 2 x 2, so
the fire modules work on 16, 8 and 4 pixels; batch norm before every ReLU, no ReLU after the last convolution and no
dropout. A peculiarity of the official release: the convolutions keep their bias in front of the batch norm. As in the
public CIFAR-100 networks it builds on, the last fire module, which has a bypass in the paper, has none.

Parameters for 10 / 100 classes: squeezenet 734,986 / 781,156.
"""
import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation


class Fire(nn.Module):
    """Squeeze by 1 x 1, expand by 1 x 1 and 3 x 3: (N, c_in, H, W) -> (N, c_out, H, W), plus the input if `bypass`."""

    def __init__(self, c_in, c_out, squeezed, bypass):
        super().__init__()
        self.squeeze = Conv2dNormActivation(c_in, squeezed, 1, bias=True)
        self.expand1 = Conv2dNormActivation(squeezed, c_out // 2, 1, bias=True)
        self.expand3 = Conv2dNormActivation(squeezed, c_out // 2, 3, bias=True)
        self.bypass = bypass

    def forward(self, x):
        squeezed = self.squeeze(x)
        out = torch.cat([self.expand1(squeezed), self.expand3(squeezed)], dim=1)
        return out + x if self.bypass else out


def squeezenet(num_classes):
    """(N, 3, 32, 32) images -> (N, num_classes) logits."""
    pool = nn.MaxPool2d(2)  # used twice, and the stem has its own: the release has two such layers
    return nn.Sequential(
        Conv2dNormActivation(3, 96, 3, bias=True), nn.MaxPool2d(2),
        Fire(96, 128, 16, bypass=False),
        Fire(128, 128, 16, bypass=True),
        Fire(128, 256, 32, bypass=False), pool,
        Fire(256, 256, 32, bypass=True),
        Fire(256, 384, 48, bypass=False),
        Fire(384, 384, 48, bypass=True),
        Fire(384, 512, 64, bypass=False), pool,
        Fire(512, 512, 64, bypass=False),
        nn.Conv2d(512, num_classes, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )


MODELS = {"squeezenet": squeezenet}
