"""The CIFAR ResNets of He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), section 4.2.

Depth 6n + 2: a 3 x 3 stem, three stages of n basic blocks with 16, 32 and 64 channels, global average pooling and one
linear layer. What differs from the ImageNet ResNets: the stem keeps the resolution, and the shortcuts have no
parameters (option A): they take every second pixel and pad the new channels with zeros.

Parameters for 10 / 100 classes: resnet8 75,290 / 81,140; resnet20 269,722 / 275,572; resnet32 464,154 / 470,004;
resnet44 658,586 / 664,436; resnet56 853,018 / 858,868; resnet110 1,727,962 / 1,733,812; resnet1202 19,421,274 /
19,427,124. Module names are those of the common implementations, so their state dicts load.
"""
from functools import partial

import torch.nn as nn
import torch.nn.functional as F


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and an option-A shortcut: (N, c_in, H, W) -> (N, c_out, H / stride, W / stride)."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.new_channels = stride, c_out - c_in

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.new_channels:
            half = self.new_channels // 2
            # a pool of one pixel: the bits of x[:, :, ::stride, ::stride], but a gradient that stays channels_last
            x = F.pad(F.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, half, half))
        return F.relu(out + x)


class ResNet(nn.Module):
    """(N, 3, 32, 32) images -> (N, num_classes) logits; `depth` = 6n + 2."""

    def __init__(self, depth, num_classes):
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, n, stride=1)
        self.layer2 = self._stage(16, 32, n, stride=2)
        self.layer3 = self._stage(32, 64, n, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(c_in, c_out, blocks, stride):
        first = BasicBlock(c_in, c_out, stride)
        return nn.Sequential(first, *(BasicBlock(c_out, c_out, 1) for _ in range(blocks - 1)))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


MODELS = {f"resnet{depth}": partial(ResNet, depth) for depth in (8, 20, 32, 44, 56, 110, 1202)}
