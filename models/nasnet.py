"""NASNet-A of Zoph et al., "Learning Transferable Architectures for Scalable Image Recognition" (arXiv 1707.07012).

Three stages of four normal cells with 44, 88 and 176 filters, a reduction cell before the second and the third. A cell
sees the outputs of the two cells before it; inside, five pairs of operations are summed, and most sums concatenated.
What differs from the ImageNet version: the stem is one 3 x 3 convolution with stride 1 and no reduction cells, so the
stages work at 32, 16 and 8 pixels a side. There is no auxiliary classifier and no dropped path.

Peculiarities of the official release: the third sum of a normal cell adds the average of the last cell's output to that
output (the paper to that of the cell before last); the pointwise convolutions have a bias, the depthwise ones too, but
for the first of each pair in normal cells; so has the input's 1 x 1 convolution in reduction cells. Every cell has both
a 1 x 1 convolution and a factorised reduction for the output of the cell before last, and uses at most one of them.

Parameters for 10 / 100 classes: nasnet 5,126,494 / 5,221,624.
"""
import torch
from torch import nn

# One row per sum: operation and input, twice. Inputs: 0 the cell before last, 1 the last cell, 2 ... the sums so far.
NORMAL = (
    ("sep3", 1, "skip", 1),
    ("sep3", 0, "sep5", 1),
    ("avg3", 1, "skip", 1),
    ("avg3", 0, "avg3", 0),
    ("sep5", 0, "sep3", 0),
)
REDUCTION = (
    ("sep7", 0, "sep5", 1),
    ("max3", 1, "sep7", 0),
    ("avg3", 1, "sep5", 0),
    ("max3", 1, "sep3", 2),
    ("avg3", 2, "skip", 3),
)


def project(c_in, c_out, bias=True):
    return nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=bias), nn.BatchNorm2d(c_out))


def operation(name, c, stride, bias):
    """(N, c, H, W) -> (N, c, H / stride, W / stride); `bias` is that of the first depthwise convolution."""
    if name == "skip":
        return nn.Identity()
    kind, kernel = name[:3], int(name[3:])
    if kind != "sep":
        return {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}[kind](kernel, stride, padding=kernel // 2)
    layers = []
    for s, b in ((stride, bias), (1, True)):  # separable convolutions are always applied twice
        depthwise = nn.Conv2d(c, c, kernel, s, padding=kernel // 2, groups=c, bias=b)
        layers += [nn.ReLU(), depthwise, nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)]
    return nn.Sequential(*layers)


class Fit(nn.Module):
    """A factorised reduction to `size`, or at this size a 1 x 1 convolution, or with c_out channels too the input:
    (N, c_in, H, W) -> (N, c_out, *size)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.relu = nn.ReLU()
        self.even, self.odd = (nn.Sequential(nn.AvgPool2d(1, 2), nn.Conv2d(c_in, c_out // 2, 1)) for _ in range(2))
        self.bn = nn.BatchNorm2d(c_out)
        self.project = project(c_in, c_out)

    def forward(self, x, size):
        if x.shape[2:] != size:
            x = self.relu(x)
            return self.bn(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], dim=1))
        return self.project(x) if x.shape[1] != self.bn.num_features else x


class Cell(nn.Module):
    """A reduction cell has stride 2: (N, c_before, ...), (N, c_in, H, W) -> (N, c_out, H / stride, W / stride)."""

    def __init__(self, c_before, c_in, filters, reduction):
        super().__init__()
        self.reduction, self.rows = reduction, REDUCTION if reduction else NORMAL
        self.c_out = filters * (4 if reduction else 6)
        self.last = project(c_in, filters, bias=reduction)
        self.operations = nn.ModuleList(
            operation(name, filters, stride=2 if reduction and source < 2 else 1, bias=reduction)
            for left, i, right, j in self.rows for name, source in ((left, i), (right, j))
        )
        self.before = Fit(c_before, filters)

    def forward(self, before, last):
        states = [self.before(before, last.shape[2:]), self.last(last)]
        for k, (_, i, _, j) in enumerate(self.rows):
            states.append(self.operations[2 * k](states[i]) + self.operations[2 * k + 1](states[j]))
        return torch.cat(states[3:] if self.reduction else states[:1] + states[2:], dim=1)


class NASNet(nn.Module):
    """(N, 3, 32, 32) images -> (N, num_classes) logits."""

    unused_parameters = True  # in every `Fit`

    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 44, 3, padding=1, bias=False), nn.BatchNorm2d(44))
        self.cells = nn.ModuleList()
        c_before = c_in = 44
        for filters, stage in ((44, "NNNN"), (88, "RNNNN"), (176, "RNNNN")):  # normal and reduction cells
            for kind in stage:
                self.cells.append(Cell(c_before, c_in, filters, reduction=kind == "R"))
                c_before, c_in = c_in, self.cells[-1].c_out
        self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, num_classes))

    def forward(self, x):
        before = last = self.stem(x)
        for cell in self.cells:
            before, last = last, cell(before, last)
        return self.head(last)


MODELS = {"nasnet": NASNet}
