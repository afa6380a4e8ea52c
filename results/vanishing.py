"""What vanishes in plain VGG38 at its start, and what the cures keep: draws results/vanishing.png.

python results/vanishing.py [DATA [SEED]]     DATA: cifar100 (default), synthetic or FILE.npz

128 training images, seed 0 if none is given, float64, no augmentation. At the input of every conv
and of the linear layer: how much of the signal differs between images (root mean square of x minus
its mean over the images), how far the images' directions are apart (one minus the mean cosine of
two images), the mean |gradient| of the loss with respect to that input, and what is left of that
gradient if noise is added to the images (mean cosine of an image's gradients without and with it;
its standard deviation, 0.01, is under 1 % of the images').
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from model import VGG
from plot import COLOURS, plt

NETS = {
    "plain": {},
    "plain, He": {"init": "he"},
    "plain, Dirac": {"init": "dirac"},
    "batch norm": {"bn": True},
    "residual": {"residual": True},
    "both": {"bn": True, "residual": True},
}
MEASURES = ("what differs between images", "1 - mean cosine of two images", "mean |gradient|",
            "cosine of the gradients without and with 1 % noise")


def measure(images, labels, seed=0, blocks=5, weights=None, **options):
    """(4, layers): MEASURES at the input of each conv and linear layer. weights: a best.pt."""
    torch.manual_seed(seed)
    model = VGG(stages=3, blocks=blocks, **options).double()
    if weights:
        model.load_state_dict(torch.load(weights, map_location="cpu"))
    inputs = []

    def keep(module, args):
        args[0].retain_grad()
        inputs.append(args[0])

    for layer in [*model.convs(), model.linear]:
        layer.register_forward_pre_hook(keep)
    for batch in (images.clone(), images + 0.01 * torch.randn_like(images)):
        F.cross_entropy(model(batch.requires_grad_()), labels).backward()
    rows = []
    for x, with_noise in zip(inputs[: model.num_layers], inputs[model.num_layers :]):
        differs = (x - x.mean(0)).square().mean().sqrt()
        # The variance of the unit vectors is one minus the mean cosine of all pairs, but does not
        # subtract two numbers that are nearly equal.
        apart = F.normalize(x.flatten(1)).var(0).sum()
        # A vanished gradient has a direction, too: eps is far below it.
        units = [F.normalize(t.grad.flatten(1), eps=1e-100) for t in (x, with_noise)]
        left = (units[0] * units[1]).sum(1).mean()
        rows.append([differs.item(), apart.item(), x.grad.abs().mean().item(), left.item()])
    return torch.tensor(rows).T


def main(source="cifar100", seed=0):
    (images, labels), *_ = train.load_data(source)
    images, labels = train.normalise(images[:128]).double(), labels[:128]
    found = {name: measure(images, labels, int(seed), **o) for name, o in NETS.items()}
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for i, (axis, title) in enumerate(zip(axes.flat, MEASURES)):
        for (name, values), colour in zip(found.items(), COLOURS):
            axis.plot(range(1, 39), values[i], lw=1.3, color=colour, label=name)
        for end in (13.5, 25.5, 37.5):  # a stage is 12 convs, after the entry's
            axis.axvline(end, color="grey", lw=0.8, alpha=0.6)
        axis.set(title=title, xlabel="at the input of layer (grey: a stage ends)")
        axis.set_yscale("linear" if title == MEASURES[-1] else "log")
        axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(NETS))
    figure.suptitle("VGG38 before training: the image on the way forward (above), "
                    "the gradient on the way back (below)")
    if int(seed) == 0:  # the picture in README
        figure.savefig(Path(__file__).parent / "vanishing.png", dpi=110)
    columns = {"first block": 1, "second stage": 13, "third stage": 25, "linear layer": 37}
    for i, title in enumerate(MEASURES):
        print(f"\n{title}, at the input of the\n{'':12}  " + "  ".join(columns))
        for name, values in found.items():
            cells = [f"{values[i][at]:{len(column)}.2g}" for column, at in columns.items()]
            print(f"{name:12}  " + "  ".join(cells))
    print("\n1 - cosine, at plain's linear layer; what noise leaves, at the first block")
    for blocks in (0, 1, 2, 3, 10):
        deep = {name: measure(images, labels, int(seed), blocks, **o) for name, o in NETS.items()}
        left = "  ".join(f"{name} {values[3][1]:.2f}" for name, values in deep.items())
        print(f"VGG{6 * blocks + 8:02}  {deep['plain'][1][-1]:.2g}  {left}")
    for name, run in {"batch norm": "vgg38_bn", "residual": "vgg38_residual_only"}.items():
        weights = Path(__file__).parent / f"weights/{run}.pt"
        left = measure(images, labels, weights=weights, **NETS[name])[3]
        print(f"what noise leaves after 100 epochs, {name}: {left[1]:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
