"""EfficientNet-B0 of Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks"
(arXiv 1905.11946).

What differs from the ImageNet network: the stem and the stage of 192 channels have no stride, so the last stages have
4 x 4 pixels. Peculiarities of the official release: no stochastic depth (the paper skips branches with probabilities up
to 0.2); batch norm has eps = 0.1 after the blocks' last convolution and 0.9 after the network's, and momentum 0.9 (in
PyTorch's sense: the running statistics are nearly the last batch's) after the stem; initial weights are drawn with
variance 2 / (channels out * pixels of the kernel) in convolutions, between +-1 / floor(sqrt(inputs)) in linear layers.

Parameters for 10 / 100 classes: efficientnet 4,020,358 / 4,135,648.
"""
import math

from torch import nn

from models.blocks import Residual, SqueezeExcitation

STAGES = [  # expansion, channels out, blocks, kernel, stride of the first
    (1, 16, 1, 3, 1),
    (6, 24, 2, 3, 2),
    (6, 40, 2, 5, 2),
    (6, 80, 3, 3, 2),
    (6, 112, 3, 5, 1),
    (6, 192, 4, 5, 1),
    (6, 320, 1, 3, 1),
]


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


def block(c_in, c_out, expansion, kernel, stride):
    """An inverted residual block with channel gates: (N, c_in, H, W) -> (N, c_out, H / stride, W / stride)."""
    hidden = expansion * c_in
    expand = [conv(c_in, hidden, 1, momentum=1 - 0.99), nn.SiLU()] if expansion > 1 else []
    branch = nn.Sequential(
        *expand,
        conv(hidden, hidden, kernel, stride, groups=hidden, momentum=1 - 0.99),
        nn.SiLU(),
        SqueezeExcitation(hidden, c_in // 4, nn.SiLU),
        conv(hidden, c_out, 1, eps=1 - 0.9),
    )
    return Residual(branch) if stride == 1 and c_in == c_out else branch


def efficientnet(num_classes):
    """(N, 3, 32, 32) images -> (N, num_classes) logits."""
    c = 32
    layers = [conv(3, c, 3, momentum=0.9), nn.SiLU()]
    for expansion, c_out, blocks, kernel, stride in STAGES:
        for i in range(blocks):
            layers.append(block(c, c_out, expansion, kernel, 1 if i else stride))
            c = c_out
    layers += [conv(c, 1280, 1, eps=0.9), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2)]
    model = nn.Sequential(*layers, nn.Linear(1280, num_classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            bound = 1 / math.isqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)
    return model


MODELS = {"efficientnet": efficientnet}
