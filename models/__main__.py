"""`python -m models`: the networks for 32 x 32 images as a Markdown table, counted for 100 classes.

Multiply-adds are those of the convolutions and linear layers in one forward pass of one image; in evaluation mode, so
with every block of stochastic depth.
"""
import torch
from torch.utils.flop_counter import FlopCounterMode

import models


def row(name, family):
    """Cells of one network: name, parameters, millions of multiply-adds, file."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = models.get_model(name, 100).eval()
        model(torch.empty(1, 3, 32, 32))
    parameters = sum(p.numel() for p in model.parameters())
    file = f"models/{family}.py"
    return f"| {name} | {parameters:,} | {counter.get_total_flops() / 2e6:,.0f} | [{file}]({file}) |"


def table():
    lines = ["| network | parameters | multiply-adds (millions) | file |", "|---|--:|--:|---|"]
    lines += [row(name, family) for family, names in models.FAMILIES.items() for name in names.split()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
