"""How far a float32 gradient is off float64's at the start, by depth: `python results/rounding.py`.

One batch of 100 synthetic images, seed 0, contiguous layout, on the CPU; relative L2 distance over
all parameters, in %.
"""
import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from model import VGG

NETS = {
    "plain": {},
    "batch norm": {"bn": True},
    "batch norm, residual": {"bn": True, "residual": True},
}
(images, labels), *_ = train.load_data("synthetic")
x, y = train.normalise(images[:100]).contiguous(), labels[:100]


def gradient(model, x):
    F.cross_entropy(model(x), y).backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


print("blocks  " + "  ".join(NETS))
for blocks in (0, 1, 2, 5, 10):
    errors = []
    for name, options in NETS.items():
        torch.manual_seed(0)
        model = VGG(stages=3, blocks=blocks, **options)
        exact = gradient(copy.deepcopy(model).double(), x.double())
        error = 100 * (gradient(model, x) - exact).norm() / exact.norm()
        errors.append(f"{error:{len(name)}.2g}")
    print(f"{blocks:6}  " + "  ".join(errors), flush=True)
