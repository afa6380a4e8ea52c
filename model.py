"""The paper's VGG (sections 2 to 4): one block; batch norm, residual and activation are options."""
from functools import partial

import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {  # the choices of --act
    # in place: a CPU's step takes 5 % less; not for a fork that activates a block's own input
    "leaky_relu": partial(nn.LeakyReLU, inplace=True),
    "sigmoid": nn.Sigmoid,
}


class Block(nn.Module):
    """conv - act - conv - (+ input) - act; a reduction block also halves the map between its convs.

    x: (N, filters, H, W) -> the same shape, or (N, filters, H // 2, W // 2) if `reduce`.
    With batch norm each conv is followed by one (section 3.1); `residual` adds the input, pooled
    where the map shrinks, before the last activation (section 3.2, He et al. 2016).
    """

    def __init__(self, filters, act, bn, residual, reduce):
        super().__init__()
        # as the paper counts parameters: only a reduction block's convs have a bias
        self.conv1 = nn.Conv2d(filters, filters, 3, padding=1, bias=reduce)
        self.norm1 = nn.BatchNorm2d(filters) if bn else nn.Identity()
        self.act1 = ACTIVATIONS[act]()
        self.pool = nn.AvgPool2d(2) if reduce else nn.Identity()
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=reduce)
        self.norm2 = nn.BatchNorm2d(filters) if bn else nn.Identity()
        self.act2 = ACTIVATIONS[act]()
        self.residual = residual

    def forward(self, x):
        out = self.act1(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(self.pool(out)))
        if self.residual:
            out = out + self.pool(x)
        return self.act2(out)


class VGG(nn.Module):
    """`stages` stages of `blocks` ordinary blocks and one reduction block (section 2, Algorithm 1).

    x: (N, 3, 32, 32) float, normalised -> logits (N, classes). Every stage halves the map.
    Weights get PyTorch's default initialisation, which is what makes 38 plain layers vanish.
    Raises ValueError for stages outside 1 to 5, negative blocks, an act not in ACTIVATIONS.
    """

    def __init__(
        self, stages, blocks, filters=32, bn=False, residual=False, act="leaky_relu", classes=100
    ):
        super().__init__()
        if not 1 <= stages <= 5:
            raise ValueError(f"stages must be 1 to 5, for images of 32 x 32, not {stages}")
        if blocks < 0:
            raise ValueError(f"blocks must be 0 or more, not {blocks}")
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {list(ACTIVATIONS)}, not {act}")
        self.conv = nn.Conv2d(3, filters, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(filters)  # in every model, the ones without batch norm too
        self.act = ACTIVATIONS[act]()
        self.blocks = nn.Sequential()
        for _ in range(stages):
            for _ in range(blocks):
                self.blocks.append(Block(filters, act, bn, residual, reduce=False))
            self.blocks.append(Block(filters, act, bn, residual, reduce=True))
        self.linear = nn.Linear(filters, classes)
        self.num_layers = stages * (2 * blocks + 2) + 2  # as the paper counts: convs and linear

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        x = self.blocks(x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (N, filters)
        return self.linear(x)

    def weight_layers(self):
        """{name: module} of each conv, norm and linear layer, input to output (Figure 1's x)."""
        return {name: m for name, m in self.named_modules() if hasattr(m, "weight")}
