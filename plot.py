"""Every figure and table of the paper, from what the runs wrote.

python plot.py                 reads runs/ and writes results/: figure1.png to figure5.png, annex_a.png and tables.md
python plot.py runs/A runs/B   compares any runs: results/compare.png, results/compare_gradients.png and a table in the terminal
"""
import argparse
import csv
import json
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

METRICS = {"train_acc": "train acc %", "val_acc": "val acc %", "train_loss": "train loss", "val_loss": "val loss"}
# name in sweep.sh: (name here, layers and parameters by the paper's architecture, its four METRICS after 100 epochs, seed 0)
PAPER = {
    "vgg08": ("VGG08", 8, 59_716, 55.17, 48.60, 1.60, 1.97),
    "vgg38": ("VGG38", 38, 336_196, 0.93, 0.64, 4.61, 4.61),
    "vgg38_bn": ("VGG38 BN", 38, 338_500, 54.43, 45.08, 1.61, 2.01),
    "vgg38_rn": ("VGG38 ResNet", 38, 338_500, 86.26, 62.32, 0.44, 1.72),
    "vgg38_rn_sigmoid": ("VGG38 ResNet-Sig", 38, 338_500, 31.50, 30.72, 2.57, 2.62),
    "vgg38_rn_wd1e-2": ("ResNet, λ = 1e-2", 38, 338_500, 58.09, 53.52, 1.53, 1.69),
    "vgg38_rn_wd1e-3": ("RN+WP (λ = 1e-3)", 38, 338_500, 87.83, 65.32, 0.42, 1.35),
    "vgg38_rn_wd1e-4": ("ResNet, λ = 1e-4", 38, 338_500, 88.23, 62.64, 0.38, 1.70),
    "vgg38_rn_lr5": ("RN+WP, LR x5", 38, 338_500, 60.01, 54.64, 1.41, 1.63),
    "vgg38_rn_lr30": ("RN+WP, LR x30", 38, 338_500, 21.64, 21.08, 3.16, 3.17),
    "vgg38_rn_lr100": ("RN+WP, LR x100", 38, 338_500, 15.76, 15.72, 3.51, 3.50),
    "vgg38_rn_batch256": ("RN+WP, batch 256", 38, 338_500, 88.98, 61.71, 0.39, 1.51),
    "vgg38_rn_batch512": ("RN+WP, batch 512", 38, 338_500, 86.29, 60.01, 0.48, 1.55),
    "vgg68": ("VGG68", 68, 616_900, 86.86, 66.76, 0.44, 1.30),
    "vgg72": ("VGG72", 72, 654_148, 90.02, 67.08, 0.33, 1.32),
    "vgg132": ("VGG132 (the paper's VGG106)", 132, 1_210_948, 90.35, 66.56, 0.32, 1.34),
    # not in the paper; batch 64 is from its author's logs
    "vgg106": ("VGG106, truly", 106, 969_604, None, None, None, None),
    "vgg38_rn_batch64": ("RN+WP, batch 64", 38, 338_500, 83.38, 65.08, 0.56, 1.29),
    "vgg38_residual_only": ("VGG38 residual, no BN", 38, 336_196, None, None, None, None),
}
IN_PAPER = list(PAPER)[:16]
SECTIONS = {
    "5.1 Batch norm and residual connections": ["vgg08", "vgg38", "vgg38_bn", "vgg38_rn", "vgg38_rn_sigmoid"],
    "5.2 Weight decay": ["vgg38_rn", "vgg38_rn_wd1e-2", "vgg38_rn_wd1e-3", "vgg38_rn_wd1e-4"],
    "5.3 Learning rate and batch size": ["vgg38_rn_wd1e-3", "vgg38_rn_lr5", "vgg38_rn_lr30", "vgg38_rn_lr100", "vgg38_rn_batch256", "vgg38_rn_batch512"],
    "5.4 Depth": ["vgg38_rn_wd1e-3", "vgg68", "vgg72", "vgg132"],
    "Extras, not in the paper": ["vgg106", "vgg38_rn_batch64", "vgg38_residual_only"],
}
LOSS, ACC = ("loss", "cross-entropy"), ("acc", "accuracy (%)")
FIGURES = {  # file: (caption, runs, what is drawn)
    "annex_a": ("Annex A: VGG08 and VGG38", ["vgg08", "vgg38"], [LOSS, ACC]),
    "figure2": ("Figure 2: batch norm and residual connections", SECTIONS["5.1 Batch norm and residual connections"], [LOSS]),
    "figure3": ("Figure 3: weight decay", SECTIONS["5.2 Weight decay"], [ACC, LOSS]),
    "figure4": ("Figure 4: learning rate and batch size", SECTIONS["5.3 Learning rate and batch size"], [LOSS]),
    "figure5": ("Figure 5: depth", SECTIONS["5.4 Depth"], [ACC, LOSS]),
}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#8C6D31"]  # Okabe and Ito's, for all eyes


def read_csv(path):
    """{column: (epochs,) array} of a CSV of numbers."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}


def read_run(folder):
    """A run as {config, log, grads, result (None while it trains), label}, or None before its first epoch. SystemExit if broken."""
    folder = Path(folder)
    if not (folder / "log.csv").exists():
        return None
    try:
        run = {"config": json.loads((folder / "config.json").read_text()), "log": read_csv(folder / "log.csv"), "result": None}
        run["grads"] = read_csv(folder / "grads.csv")
        run["grads"].pop("epoch")
        if (folder / "result.json").exists():
            run["result"] = json.loads((folder / "result.json").read_text())
        run["planned"], run["done"], run["label"] = run["config"]["settings"]["epochs"], len(run["log"]["epoch"]), folder.name
        return run
    except Exception as error:
        sys.exit(f"plot.py: {folder} cannot be read ({type(error).__name__}: {error}): move it away, or train it again with --fresh")


def read_seeds(folder, name):
    """The runs of one line of sweep.sh, one a seed: of those that are there, the ones that got furthest, so that a mean is over equals."""
    runs = [read_run(f) for f in [Path(folder) / name, *sorted(Path(folder).glob(f"{name}-seed*"))]]
    runs = [{**run, "label": PAPER[name][0]} for run in runs if run]
    return [run for run in runs if (run["planned"], run["done"]) == max((r["planned"], r["done"]) for r in runs)]


def length(runs):
    """"" for the paper's 100 epochs; else how many: "5 epochs, short", "12 of 100 epochs" or "diverged in epoch 3"."""
    planned, done, result = runs[0]["planned"], runs[0]["done"], runs[0]["result"]
    if result and result["diverged"]:
        return f"diverged in epoch {done}"
    return "" if planned == done == 100 else f"{done}{f' of {planned}' * (done < planned)} epochs{', short' * (planned < 100)}"


def caption(runs):
    """A legend's or a panel's name: the run's, and in brackets what is special about its length and seeds."""
    notes = ", ".join(filter(None, [length(runs), f"{len(runs)} seeds" * (len(runs) > 1)]))
    return runs[0]["label"] + (f" ({notes})" if notes else "")


def curves(groups, panels, title, path):
    """Loss and accuracy by epoch: validation solid, training light and dotted, one colour a run (a list of seeds: mean, and range of validation)."""
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.6), squeeze=False, layout="constrained")
    for axis, (metric, ylabel) in zip(axes[0], panels):
        for colour, runs in zip(COLOURS * len(groups), groups):
            epochs, dot = runs[0]["log"]["epoch"], "o" if runs[0]["done"] == 1 else None
            val, train = (np.stack([run["log"][f"{part}_{metric}"] for run in runs]) for part in ("val", "train"))
            axis.plot(epochs, val.mean(0), color=colour, marker=dot, label=caption(runs))
            axis.plot(epochs, train.mean(0), color=colour, marker=dot, alpha=0.6, linestyle=":")
            if len(runs) > 1:
                axis.fill_between(epochs, val.min(0), val.max(0), color=colour, alpha=0.2, linewidth=0)
        axis.set(xlabel="epoch", ylabel=ylabel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        done = [runs[0]["done"] for runs in groups]
        if max(done) > 4 * min(done):  # a short run beside a long one is a speck on a linear axis
            axis.set(xscale="log", xlabel="epoch (logarithmic: the runs differ in length)")
            axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
        if metric == "loss":  # the first epochs of a large learning rate would flatten all the rest
            axis.set_ylim(0, min(axis.get_ylim()[1], max(6, 2 * max(run["log"]["val_loss"][-1] for runs in groups for run in runs))))
    axes[0, 0].plot([], [], color="grey", label="validation")
    axes[0, 0].plot([], [], color="grey", linestyle=":", label="training")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(title)
    save(figure, path)


def gradient_flow(runs, title, path):
    """Figure 1: mean |gradient| of every weight tensor, input to output, a line an epoch; linear as in the paper, and logarithmic."""
    figure, axes = plt.subplots(len(runs), 2, figsize=(12.8, 3.4 * len(runs)), squeeze=False, layout="constrained")
    for row, run in zip(axes, runs):
        names, flow = list(run["grads"]), np.stack(list(run["grads"].values()), axis=1)  # (epochs, layers)
        colour = plt.cm.ScalarMappable(plt.Normalize(1, max(run["planned"], 2)), "viridis")
        x = np.arange(1, len(names) + 1)
        for axis, scale in zip(row, ("linear", "log")):
            for epoch, values in enumerate(flow, 1):
                # exact zeros have no place on a logarithmic axis: they are drawn at float32's smallest number
                axis.plot(x, values if scale == "linear" else np.where(values == 0, 1e-45, values), color=colour.to_rgba(epoch), linewidth=0.9,
                          marker="." if len(names) < 100 else None, markersize=4)
            axis.set(yscale=scale, xlabel="weight layer, from input to output", ylabel="mean |gradient|")
            axis.set_title(f"{caption([run])}, {scale}", fontsize=9)
            if len(names) <= 12:
                axis.set_xticks(x, [n.replace("blocks.", "block ").replace(".", "\n") for n in names], fontsize=8)
            axis.grid(alpha=0.3)
        row[0].ticklabel_format(axis="y", scilimits=(-3, 3))
        figure.colorbar(colour, ax=row[1], label="epoch").locator = plt.MaxNLocator(5, integer=True)
    limits = np.array([axis.get_ylim() for axis in axes[:, 1]])
    plt.setp(axes[:, 1], ylim=(min(1e-6, limits.min()), max(1, limits.max())))  # one scale, so that rows compare
    figure.suptitle(title)
    save(figure, path)


def save(figure, path):
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"wrote {path}")


def cell(runs, value, digits=2):
    """Mean of value(run) over seeds, with their standard deviation (n - 1) if there are several; a dash if there is nothing."""
    values = [value(run) for run in runs]
    if not values or None in values:
        return "–"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def note(runs):
    """The last column: how many epochs and seeds ours had."""
    if not runs:
        return "–"
    return f"{length(runs) or '100 epochs'}, {len(runs)} seed{'s' * (len(runs) > 1)}"


def markdown(title, header, rows):
    """A titled Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return f"## {title}\n\n" + "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines) + "\n"


def tables(found):
    """tables.md from {name in sweep.sh: its runs}."""
    out = ("# The paper and this implementation\n\nWritten by `python plot.py`. Each pair of columns is paper, then ours: the last epoch's figures, mean ± standard "
           "deviation over seeds where there are several. The paper's are after 100 epochs, one seed. A dash: no such run, or no such figure in the paper.\n\n")
    header = ["run", *(f"{label}, {whose}" for label in METRICS.values() for whose in ("paper", "ours")), "ours: epochs, seeds"]
    for title, names in {"All runs of the paper": IN_PAPER, **SECTIONS}.items():
        rows = []
        for name in names:
            label, _, _, *paper = PAPER[name]
            pairs = [("–" if p is None else f"{p:.2f}", cell(found[name], lambda run: run["log"][m][-1])) for p, m in zip(paper, METRICS)]
            rows.append([label, *(figure for pair in pairs for figure in pair), note(found[name])])
        out += markdown(title, header, rows)
    test = [[PAPER[name][0], *(("65.83", "1.33") if name == "vgg68" else "––"), *(cell([r["result"] or {key: None} for r in runs], lambda r: r[key])
             for key in ("test_acc", "test_loss")), note(runs)] for name, runs in found.items()]
    out += markdown("Test set, at the epoch of the best validation accuracy",
                    ["run", "test acc %, paper", "test loss, paper", "test acc %, ours", "test loss, ours", "ours: epochs, seeds"], test)
    size = [[label, layers, f"{parameters:,}", *((runs[0]["config"]["layers"], f"{runs[0]['config']['parameters']:,}") if runs else "––")]
            for (label, layers, parameters, *_), runs in zip(PAPER.values(), found.values())]
    out += markdown("Size", ["run", "layers, paper", "parameters, paper", "layers, ours", "parameters, ours"], size)
    speed = [[PAPER[name][0], paper, cell(found[name], lambda run: np.median(run["log"]["steps_per_s"])), hardware(found[name])]
             for name, paper in (("vgg38_rn", 6.45), ("vgg68", 8.6), ("vgg72", 2.34), ("vgg132", 1.2))]
    out += markdown("Training speed (steps a second; the paper's were measured on different machines)", ["run", "paper", "ours", "ours: machine"], speed)
    runs = [[f"`{run['config']['command']}`", hardware([run]), f"{run['done']} of {run['planned']}", f"{run['log']['seconds'].sum() / 60:.1f}"]
            for group in found.values() for run in group]
    return out + markdown("Where ours come from", ["command", "machine", "epochs", "minutes"], runs)


def hardware(runs):
    result = runs[0]["result"] if runs else None
    return f"{result['device']}, {result['precision']}" if result else "–"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"plot.py: {message} (see python plot.py --help)\n")
    parser.add_argument("folders", nargs="*", metavar="RUN", help="folders of runs to compare; none: the paper's figures and tables")
    parser.add_argument("--runs", type=Path, default="runs", help="where sweep.sh put its runs (default: runs)")
    parser.add_argument("--out", type=Path, default="results", help="where figures and tables go (default: results)")
    args = parser.parse_args(argv)
    if args.folders:
        runs = [read_run(folder) for folder in args.folders]
        if None in runs:
            sys.exit(f"plot.py: {args.folders[runs.index(None)]} is no run, or its first epoch is not over: it has no log.csv")
        args.out.mkdir(parents=True, exist_ok=True)
        curves([[run] for run in runs], [ACC, LOSS], "", args.out / "compare.png")
        gradient_flow(runs, "Gradient flow", args.out / "compare_gradients.png")
        width = max(len(run["label"]) for run in runs)
        print(f"{'':{width}}  epochs  " + "  ".join(METRICS.values()))
        for run in runs:
            print(f"{run['label']:{width}}  {run['done']:6}  " + "  ".join(f"{run['log'][m][-1]:{len(label)}.2f}" for m, label in METRICS.items()))
        return
    found = {name: read_seeds(args.runs, name) for name in PAPER}
    if not any(found.values()):
        sys.exit(f"plot.py: {args.runs}/ has none of the paper's runs: bash sweep.sh makes them, and python plot.py RUN RUN compares any others")
    args.out.mkdir(parents=True, exist_ok=True)
    flows = [found[name][0] for name in ("vgg08", "vgg38", "vgg38_rn") if found[name]]
    if flows:
        gradient_flow(flows, "Figure 1: gradient flow, last mini-batch of every epoch", args.out / "figure1.png")
    for file, (title, names, panels) in FIGURES.items():
        groups = [found[name] for name in names if found[name]]
        if groups:
            curves(groups, panels, title, args.out / f"{file}.png")
    (args.out / "tables.md").write_text(tables(found))
    print(f"wrote {args.out / 'tables.md'}; runs that are missing: {' '.join(name for name in IN_PAPER if not found[name]) or 'none'}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"plot.py: {error}")
