"""The paper's VGG (sections 2 to 4): one block class, with batch norm, residual connections and the activation as options."""
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """conv - act - conv - (+ input) - act; a reduction block also halves the map between its convs.

    x: (N, filters, H, W) -> (N, filters, H, W), or (N, filters, H // 2, W // 2) if `reduce`.
    With batch norm each conv is followed by one (section 3.1); `residual` adds the input, pooled
    where the map shrinks, before the last activation (section 3.2, He et al. 2016).
    """

    def __init__(self, filters, act, bn, residual, reduce):
        super().__init__()
        # As in the paper's parameter counts, only a reduction block's convs have a bias, with BN or without.
        self.conv1 = nn.Conv2d(filters, filters, 3, padding=1, bias=reduce)
        self.norm1 = nn.BatchNorm2d(filters) if bn else nn.Identity()
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=reduce)
        self.norm2 = nn.BatchNorm2d(filters) if bn else nn.Identity()
        self.pool = nn.AvgPool2d(2) if reduce else nn.Identity()
        self.act, self.residual = act, residual

    def forward(self, x):
        out = self.pool(self.act(self.norm1(self.conv1(x))))
        out = self.norm2(self.conv2(out))
        return self.act(out + self.pool(x) if self.residual else out)


class VGG(nn.Module):
    """`stages` stages of `blocks` ordinary blocks and one reduction block each (paper, section 2 and Algorithm 1).

    x: (N, 3, 32, 32) float, normalised -> logits (N, classes). Every stage halves the map, so 1 <= stages <= 5.
    act: "leaky_relu" (slope 0.01) or "sigmoid", everywhere. Weights get PyTorch's default initialisation,
    which is what makes 38 plain layers vanish. Raises ValueError for another `act` or number of stages.
    """

    def __init__(self, stages, blocks, filters=32, bn=False, residual=False, act="leaky_relu", classes=100):
        super().__init__()
        acts = {"leaky_relu": nn.LeakyReLU(inplace=True), "sigmoid": nn.Sigmoid()}
        if act not in acts or not 1 <= stages <= 5 or blocks < 0:
            raise ValueError(f"VGG needs 1 to 5 stages, 0 or more blocks and act of {list(acts)}; got {stages}, {blocks}, {act!r}")
        self.act = acts[act]
        self.conv = nn.Conv2d(3, filters, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(filters)  # the entry is normalised in every model, the "no BN" ones too
        self.blocks = nn.Sequential(*[
            Block(filters, self.act, bn, residual, reduce=b == blocks) for _ in range(stages) for b in range(blocks + 1)])
        self.linear = nn.Linear(filters, classes)
        self.num_layers = stages * (2 * blocks + 2) + 2  # convs + entry + linear, as the paper counts

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        x = self.blocks(x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (N, filters)
        return self.linear(x)

    def weight_layers(self):
        """{name: module} of every conv, norm and linear layer from input to output: the x axis of Figure 1."""
        return {name: m for name, m in self.named_modules() if hasattr(m, "weight")}
