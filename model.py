"""The paper's VGG (sections 2 to 4): a stack of one kind of block, with options."""
from torch import Tensor, nn

ACTIVATIONS = {"leaky_relu": nn.LeakyReLU, "sigmoid": nn.Sigmoid}  # the choices of --act
INITS = ("default", "he", "dirac")  # the choices of --init


class Block(nn.Module):
    """conv - act - conv - (+ input) - act; a reduction block halves the map between its convs.

    x: (N, filters, H, W) -> the same shape, or (N, filters, H // 2, W // 2) if `reduce`.
    `bn` puts batch norm after each conv (section 3.1). `residual` adds the input, pooled where
    the map shrinks, before the last activation (section 3.2; He et al. 2016); with
    `plain_reduction` the blocks that shrink the map have no such skip.
    """

    def __init__(self, filters, reduce, act, bn=False, residual=False, plain_reduction=False):
        super().__init__()
        # The paper's parameter counts show that only a reduction block's convs have a bias.
        self.conv1 = nn.Conv2d(filters, filters, 3, padding=1, bias=reduce)
        self.norm1 = nn.BatchNorm2d(filters) if bn else nn.Identity()
        self.act1 = ACTIVATIONS[act]()
        self.pool = nn.AvgPool2d(2) if reduce else nn.Identity()
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=reduce)
        self.norm2 = nn.BatchNorm2d(filters) if bn else nn.Identity()
        self.act2 = ACTIVATIONS[act]()
        self.skip = residual and not (reduce and plain_reduction)

    def forward(self, x):
        out = self.act1(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(self.pool(out)))
        if self.skip:
            out = out + self.pool(x)
        return self.act2(out)


class VGG(nn.Module):
    """`stages` stages of `blocks` ordinary blocks and one reduction block (section 2, Algorithm 1).

    x: (N, 3, 32, 32) float, normalised -> logits (N, classes). Every stage halves the map,
    so there can be five at most.
    `init` is how the weights start: "default" is PyTorch's own, the paper's, with which the signal
    vanishes in 38 plain layers; "he" scales every conv as He et al. (2015); "dirac" starts every
    block's conv as the identity (Zagoruyko and Komodakis 2017). `options` go to every Block.
    Raises KeyError for an unknown act, ValueError for an unknown init.
    """

    def __init__(self, stages, blocks, filters=32, classes=100, act="leaky_relu", init="default",
                 **options):
        super().__init__()
        self.conv = nn.Conv2d(3, filters, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(filters)  # in every model, those without batch norm too
        self.act = ACTIVATIONS[act]()
        self.blocks = nn.Sequential()
        for _ in range(stages):
            for _ in range(blocks):
                self.blocks.append(Block(filters, False, act, **options))
            self.blocks.append(Block(filters, True, act, **options))
        self.linear = nn.Linear(filters, classes)
        self.num_layers = len(self.convs()) + 1  # as the paper counts: convs and linear
        if init == "he":
            for conv in self.convs():
                nn.init.kaiming_normal_(conv.weight, a=0.01)  # leaky ReLU's slope
        elif init == "dirac":
            for conv in self.convs()[1:]:  # not the entry's: it has 3 channels to spread over 32
                nn.init.dirac_(conv.weight)
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)
        elif init != "default":
            raise ValueError(f"init must be one of {INITS}, not {init}")

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        x = self.blocks(x)
        x = x.mean((2, 3))  # over the map that is left: (N, filters)
        return self.linear(x)

    def convs(self):
        """Every conv, input to output."""
        return [m for m in self.modules() if isinstance(m, nn.Conv2d)]

    def weight_layers(self):
        """{name: module} of each layer that has a weight (Figure 1's x), from input to output if
        __init__ defines them in that order.
        """
        named = self.named_modules()
        return {name: m for name, m in named if isinstance(getattr(m, "weight", None), Tensor)}
