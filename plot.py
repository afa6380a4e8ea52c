"""Every figure and table of the paper, from what the runs wrote.

python plot.py                 runs/ -> results/: figure1.png to figure5.png, annex_a.png, tables.md
python plot.py runs/A runs/B   any runs: results/compare.png, compare_gradients.png, and a table
"""
import argparse
import csv
import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

METRICS = {
    "train_acc": "train acc %",
    "val_acc": "val acc %",
    "train_loss": "train loss",
    "val_loss": "val loss",
}
PAPER = {  # name in sweep.sh: name here, layers, parameters; METRICS after 100 epochs (one seed)
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
    "vgg38_he": ("VGG38, He initialisation", 38, 336_196, None, None, None, None),
    "vgg38_dirac": ("VGG38, Dirac initialisation", 38, 336_196, None, None, None, None),
}
PAPER_TEST = {  # accuracy in % and loss on the test set: vgg68's is in the paper, others in logs
    "vgg08": (49.95, 1.911),
    "vgg38": (1.00, 4.609),
    "vgg38_rn": (61.94, 1.723),
    "vgg68": (65.83, 1.33),
}
PAPER_LOGS = Path(__file__).parent / "results/paper"  # NAME.csv: three published logs, by epoch
LOSS = ("loss", "cross-entropy")
ACC = ("acc", "accuracy (%)")
FIGURES = {  # file: title, runs, what is drawn
    "annex_a": ("Annex A: VGG08 and VGG38", ["vgg08", "vgg38"], [LOSS, ACC]),
    "figure2": (
        "Figure 2 (section 5.1): batch norm and residual connections",
        ["vgg08", "vgg38", "vgg38_bn", "vgg38_rn", "vgg38_rn_sigmoid"],
        [LOSS],
    ),
    "figure3": (
        "Figure 3 (section 5.2): weight decay",
        ["vgg38_rn", "vgg38_rn_wd1e-2", "vgg38_rn_wd1e-3", "vgg38_rn_wd1e-4"],
        [ACC, LOSS],
    ),
    "figure4": (
        "Figure 4 (section 5.3): learning rate and batch size",
        ["vgg38_rn_wd1e-3", "vgg38_rn_lr5", "vgg38_rn_lr30", "vgg38_rn_lr100"]
        + ["vgg38_rn_batch256", "vgg38_rn_batch512"],
        [LOSS],
    ),
    "figure5": (
        "Figure 5 (section 5.4): depth",
        ["vgg38_rn_wd1e-3", "vgg68", "vgg72", "vgg132"],
        [ACC, LOSS],
    ),
}
# Okabe and Ito's, for all eyes
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #000000 #E69F00 #56B4E9 #8C6D31".split()
MILESTONES = (1, 2, 5, 10, 30, 100)  # epochs


def read_csv(path):
    """{column: (epochs,) array} of a CSV of numbers."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}


def read_run(folder):
    """A run: {label, config, log, grads, result (None while it trains), planned, done} epochs.

    ValueError, with one line, if it cannot be read.
    """
    folder = Path(folder)
    if not (folder / "log.csv").exists():
        raise ValueError(f"{folder} is no run, or its first epoch is not over: it has no log.csv")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        log, grads = read_csv(folder / "log.csv"), read_csv(folder / "grads.csv")
        del grads["epoch"]
        result = None
        if (folder / "result.json").exists():
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        planned, done = config["settings"]["epochs"], len(log["epoch"])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder} cannot be read ({reason}): move it away, or train it anew")
    return {"label": folder.name, "config": config, "log": log, "grads": grads, "result": result,
            "planned": planned, "done": done, "diverged": bool(result and result["diverged"])}


def read_seeds(folder, name):
    """The runs of one line of sweep.sh, one a seed: of those there, the ones that got furthest.

    So a mean is over equals. Diverged ones are left out if others are there, and counted. A folder
    that cannot be read, or has another network in it, is named and left out.
    """
    runs = []
    for log in sorted(Path(folder).glob(f"{name}*/log.csv")):
        if not re.fullmatch(re.escape(name) + r"(-seed\d+)?", log.parent.name):
            continue
        try:
            run = read_run(log.parent)
            network = (run["config"]["layers"], run["config"]["parameters"])
            if network != PAPER[name][1:3]:
                raise ValueError(f"{log.parent} has another network than {name}: {network}")
            runs.append({**run, "label": PAPER[name][0]})
        except ValueError as error:
            print(f"plot.py: left out: {error}", file=sys.stderr)
    longest = max((run["planned"] for run in runs), default=0)
    runs = [run for run in runs if run["planned"] == longest]
    whole = [run for run in runs if not run["diverged"]]
    furthest = max((run["done"] for run in whole), default=0)
    for run in whole:
        run["lost"] = len(runs) - len(whole)
    return [run for run in whole if run["done"] == furthest] or runs[:1]


def length(runs):
    """How many epochs, if not the paper's 100: "5 epochs, short", "12 of 100 epochs", ..."""
    planned, done = runs[0]["planned"], runs[0]["done"]
    if runs[0]["diverged"]:
        return f"diverged in epoch {done}"
    if done < planned:
        return f"{done} of {planned} epochs"
    return f"{done} epochs, short" if planned < 100 else f"{done} epochs"


def note(runs):
    """How many epochs and seeds the runs of one line had."""
    if not runs:
        return "–"
    lost = runs[0].get("lost", 0)
    seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
    return f"{length(runs)}, {seeds}" + (f", {lost} more diverged" if lost else "")


def caption(runs):
    """The name in a legend, with its note if that is not the paper's 100 epochs of one seed."""
    label = runs[0]["label"]
    return label if note(runs) == "100 epochs, 1 seed" else f"{label} ({note(runs)})"


def curves(groups, panels, title, path):
    """Loss and accuracy by epoch: validation solid, training light and dotted, one colour a group.

    A group is the seeds of a run: their mean, and the range of their validation. Thin and dashed:
    the paper's own curve, where it is published.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.4 * len(panels), 4.6), squeeze=False, layout="constrained"
    )
    colours = COLOURS
    if len(groups) > len(COLOURS):
        colours = plt.cm.turbo(np.linspace(0, 1, len(groups)))
    papers = []
    for runs in groups:
        log = PAPER_LOGS / f"{runs[0]['config']['name']}.csv"
        papers.append(read_csv(log) if log.exists() else None)
    for axis, (metric, ylabel) in zip(axes[0], panels):
        for colour, runs, paper in zip(colours, groups, papers):
            epochs = runs[0]["log"]["epoch"]
            dot = "o" if len(epochs) == 1 else None
            val = np.stack([run["log"][f"val_{metric}"] for run in runs])
            train = np.stack([run["log"][f"train_{metric}"] for run in runs])
            axis.plot(epochs, val.mean(0), color=colour, marker=dot, label=caption(runs))
            axis.plot(epochs, train.mean(0), ":", color=colour, marker=dot, alpha=0.6)
            if len(runs) > 1:
                axis.fill_between(epochs, val.min(0), val.max(0), color=colour, alpha=0.2)
            for part in ("val", "train") if paper else ():
                axis.plot(paper["epoch"], paper[f"{part}_{metric}"], "--", color=colour, lw=0.7)
        axis.set(xlabel="epoch", ylabel=ylabel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        lengths = [runs[0]["done"] for runs in groups] + [100 for paper in papers if paper]
        if max(lengths) > 4 * min(lengths):  # a short run beside a long one is a speck
            axis.set(xscale="log", xlabel="epoch (logarithmic: the runs differ in length)")
            axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
        if metric == "loss":  # chance is ln 100 = 4.6; a spike above would flatten all the rest
            axis.set_ylim(0, min(axis.get_ylim()[1], 6))
    axes[0, 0].plot([], [], color="grey", label="validation")
    axes[0, 0].plot([], [], ":", color="grey", label="training")
    if any(papers):
        axes[0, 0].plot([], [], "--", color="grey", lw=0.7, label="paper, both")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(title)
    save(figure, path)


def gradient_flow(runs, title, path):
    """Figure 1: mean |gradient| of each weight tensor, input to output, a line an epoch.

    Left linear, as in the paper; right logarithmic.
    """
    figure, axes = plt.subplots(
        len(runs), 2, figsize=(12.8, 3.4 * len(runs)), squeeze=False, layout="constrained"
    )
    for row, run in zip(axes, runs):
        names = list(run["grads"])
        flow = np.stack(list(run["grads"].values()), axis=1)  # (epochs, layers)
        colour = plt.cm.ScalarMappable(plt.Normalize(1, max(run["planned"], 2)), "viridis")
        x = np.arange(1, len(names) + 1)
        marker = "." if len(names) < 100 else None
        for axis, scale in zip(row, ("linear", "log")):
            if scale == "log":  # has no place for zeros: float32's smallest number
                flow = np.where(flow == 0, 1e-45, flow)
            for epoch, values in enumerate(flow, 1):
                axis.plot(x, values, color=colour.to_rgba(epoch), lw=0.9, marker=marker, ms=4)
            axis.set(yscale=scale, xlabel="weight layer, input to output", ylabel="mean |gradient|")
            axis.set_title(f"{caption([run])}, {scale}", fontsize=9)
            if len(names) <= 12:
                axis.set_xticks(x, [name.replace(".", "\n") for name in names], fontsize=8)
            axis.grid(alpha=0.3)
        row[0].ticklabel_format(axis="y", scilimits=(-3, 3))
        bar = figure.colorbar(colour, ax=row[1], label="epoch")
        bar.locator = plt.MaxNLocator(5, integer=True)
    limits = np.array([axis.get_ylim() for axis in axes[:, 1]])
    for axis in axes[:, 1]:  # one scale, so that rows compare
        axis.set_ylim(min(1e-6, limits.min()), max(1, limits.max()))
    figure.suptitle(title)
    save(figure, path)


def save(figure, path):
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"wrote {path}")


def cell(values, digits=2):
    """Mean over seeds, and if there are several their standard deviation (n - 1); or a dash."""
    if not values or None in values:
        return "–"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def markdown(title, header, rows):
    """A titled Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    table = "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
    return f"## {title}\n\n{table}\n"


def tables(found):
    """tables.md from {name in sweep.sh: its runs}."""
    out = (
        "# The paper and this implementation\n\nWritten by `python plot.py`. Mean ± standard "
        "deviation over seeds where there are several; the paper's are of 100 epochs and one seed. "
        "A dash: no such run, or no such figure.\n\n"
    )
    main, test, way, origin = {}, {}, {}, []
    for name, runs in found.items():
        label, _, _, *papers = PAPER[name]
        main[name] = [label]
        for metric, paper in zip(METRICS, papers):
            main[name] += [cell([paper]), cell([run["log"][metric][-1] for run in runs])]
        test[name] = [label]
        results = [run["result"] or {} for run in runs]
        for key, paper in zip(("test_acc", "test_loss"), PAPER_TEST.get(name, (None, None))):
            test[name] += [cell([paper]), cell([result.get(key) for result in results])]
        way[name] = [label]
        for epoch in MILESTONES:
            logs = [run["log"] for run in runs if run["done"] >= epoch]
            loss = cell([log["train_loss"][epoch - 1] for log in logs])
            accuracy = cell([log["val_acc"][epoch - 1] for log in logs], digits=1)
            way[name].append(f"{loss} / {accuracy}" if logs else "–")
        for rows in (main, test, way):
            rows[name].append(note(runs))
        for run in runs:
            origin.append([
                f"`{run['config']['command']}`",
                "; then ".join((run["result"] or {}).get("made_by", ["not finished"])),
                f"{run['done']} of {run['planned']}",
                f"{run['log']['seconds'].sum() / 60:.0f}",
                f"{np.median(run['log']['steps_per_s']):.1f}",
            ])
    pairs = [f"{label}, {whose}" for label in METRICS.values() for whose in ("paper", "ours")]
    rows = list(main.values())
    out += markdown("All runs of the paper, last epoch", ["run", *pairs, "ours"], rows[:16])
    out += markdown("Extras, not in the paper", ["run", *pairs, "ours"], rows[16:])
    pairs = ["acc %, paper", "acc %, ours", "loss, paper", "loss, ours"]
    title = "Test set, at the epoch of the best validation accuracy"
    out += markdown(title, ["run", *pairs, "ours"], test.values())
    title = "Is yours on the way? Training loss / validation accuracy in % after so many epochs"
    out += markdown(title, ["run", *MILESTONES, "ours"], way.values())
    header = ["command", "made by", "epochs", "minutes", "steps a second"]
    return out + markdown("Where each run comes from", header, origin)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"plot.py: {message} (see --help)\n")
    parser.add_argument("folders", nargs="*", metavar="RUN", help="folders of runs to compare")
    parser.add_argument("--runs", type=Path, default="runs", help="sweep.sh's (default: runs)")
    parser.add_argument("--out", type=Path, default="results", help="default: results")
    args = parser.parse_args(argv)
    if args.folders:
        try:
            runs = [read_run(folder) for folder in args.folders]
        except ValueError as error:
            sys.exit(f"plot.py: {error} (a folder of runs goes after --runs)")
        args.out.mkdir(parents=True, exist_ok=True)
        curves([[run] for run in runs], [ACC, LOSS], "", args.out / "compare.png")
        gradient_flow(runs, "Gradient flow", args.out / "compare_gradients.png")
        width = max(len(run["label"]) for run in runs)
        print(" " * width, " epochs ", "  ".join(METRICS.values()))
        for run in runs:
            cells = [f"{run['log'][key][-1]:{len(label)}.2f}" for key, label in METRICS.items()]
            print(f"{run['label']:{width}}  {run['done']:6} ", "  ".join(cells))
        return
    found = {name: read_seeds(args.runs, name) for name in PAPER}
    if not any(found.values()):
        sys.exit(f"plot.py: {args.runs}/ has none of the paper's runs: bash sweep.sh makes them")
    args.out.mkdir(parents=True, exist_ok=True)
    flows = [found[name][0] for name in ("vgg08", "vgg38", "vgg38_rn") if found[name]]
    if flows:
        title = "Figure 1: gradient flow, last mini-batch of every epoch"
        gradient_flow(flows, title, args.out / "figure1.png")
    for file, (title, names, panels) in FIGURES.items():
        groups = [found[name] for name in names if found[name]]
        if groups:
            curves(groups, panels, title, args.out / f"{file}.png")
    (args.out / "tables.md").write_text(tables(found), encoding="utf-8")
    missing = " ".join(name for name in PAPER if not found[name])
    print(f"wrote {args.out / 'tables.md'}; runs that are missing: {missing or 'none'}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"plot.py: {error}")
