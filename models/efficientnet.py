"""EfficientNet-B0 of Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks"
(arXiv 1905.11946).

What differs from the ImageNet network: the stem and the stage of 192 channels have no stride, so the last stages have
4 x 4 pixels. As in the paper, a block with a shortcut skips its branch at random in training, for each image by itself,
with a probability that grows linearly with depth towards 0.2 (stochastic depth, arXiv 1603.09382).

Peculiarities of the official release, all of batch norm: eps = 0.1 after the blocks' last convolution and 0.9 after the
network's; momentum 0.9 (in PyTorch's sense: the running statistics are nearly the last batch's) after the stem.

Parameters for 10 / 100 classes: efficientnet 4,020,358 / 4,135,648.
"""
from torch import nn
from torchvision.ops import StochasticDepth

from models.blocks import SqueezeExcitation

STAGES = [  # expansion, channels out, blocks, kernel, stride of the first
    (1, 16, 1, 3, 1),
    (6, 24, 2, 3, 2),
    (6, 40, 2, 5, 2),
    (6, 80, 3, 3, 2),
    (6, 112, 3, 5, 1),
    (6, 192, 4, 5, 1),
    (6, 320, 1, 3, 1),
]
SKIPPED = 0.2


def conv(c_in, c_out, kernel, stride=1, groups=1, **batch_norm):
    """Convolution and batch norm: (N, c_in, H, W) -> (N, c_out, H / stride, W / stride). As TensorFlow's "same", the
    padding of even sizes is lopsided where there is a stride."""
    padding = kernel - stride
    before, after = padding // 2, padding - padding // 2
    return nn.Sequential(
        nn.ZeroPad2d((before, after, before, after)) if padding else nn.Identity(),
        nn.Conv2d(c_in, c_out, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(c_out, **batch_norm),
    )


class MBConv(nn.Module):
    """An inverted residual block with channel gates: (N, c_in, H, W) -> (N, c_out, H / stride, W / stride)."""

    def __init__(self, c_in, c_out, expansion, kernel, stride, skipped):
        super().__init__()
        hidden = expansion * c_in
        expand = [conv(c_in, hidden, 1, momentum=1 - 0.99), nn.SiLU()] if expansion > 1 else []
        self.residual = nn.Sequential(
            *expand,
            conv(hidden, hidden, kernel, stride, groups=hidden, momentum=1 - 0.99),
            nn.SiLU(),
            SqueezeExcitation(hidden, c_in // 4, nn.SiLU),
            conv(hidden, c_out, 1, eps=1 - 0.9),
        )
        self.skip = StochasticDepth(skipped, "row") if stride == 1 and c_in == c_out else None

    def forward(self, x):
        y = self.residual(x)
        return x + self.skip(y) if self.skip else y


def efficientnet(num_classes):
    """(N, 3, 32, 32) images -> (N, num_classes) logits."""
    rows = [(e, c_out, kernel, 1 if i else stride) for e, c_out, n, kernel, stride in STAGES for i in range(n)]
    c = 32
    layers = [conv(3, c, 3, momentum=0.9), nn.SiLU()]
    for depth, (expansion, c_out, kernel, stride) in enumerate(rows):
        layers.append(MBConv(c, c_out, expansion, kernel, stride, SKIPPED * depth / len(rows)))
        c = c_out
    layers += [conv(c, 1280, 1, eps=0.9), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(1280, num_classes))


MODELS = {"efficientnet": efficientnet}
