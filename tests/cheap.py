"""What makes the tests fast, here and in the processes that they start; imported for its effects."""
import functools
import os

import torch

import datasets

torch.set_num_threads(1)  # for small tensors; two threads beside another job made the suite 20 times slower
os.fsync = lambda descriptor: None  # nobody cuts the power: what a killed process has written, the kernel keeps
DIGITS = functools.cache(lambda: datasets.read_digits(None))
datasets.SOURCES["digits"] = datasets.SOURCES["digits"]._replace(read=lambda root: DIGITS())
