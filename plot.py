"""Every figure and table of the paper, from what the runs wrote.

python plot.py                     runs/ -> figures/: the paper's figures and tables.md
python plot.py runs/A runs/B       any runs: figures/compare.png, compare_gradients.png, a table
python plot.py --runs results/runs --out results      this project's own
"""
import argparse
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # before matplotlib: a notebook names one that may not be there
import matplotlib.pyplot as plt
import numpy as np

plt.rcParams["figure.constrained_layout.w_pad"] = 0.12  # inches; less, and panels touch

METRICS = {
    "train_acc": "train acc %",
    "val_acc": "val acc %",
    "train_loss": "train loss",
    "val_loss": "val loss",
}
LOSS = ("loss", "cross-entropy")
ACC = ("acc", "accuracy (%)")
LATE = ("acc", "validation accuracy (%), the last half")
# Chosen to be told apart by the colour-blind.
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #000000 #E69F00 #56B4E9 #8C6D31".split()


# ---- any runs
def read_csv(path):
    """{column: (epochs,) array} of a CSV of numbers."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}


def read_run(folder, label=None, colour=None):
    """A run as a dict: label, colour, config, result ({} while it trains), log and grads."""
    folder = Path(folder)
    result = folder / "result.json"
    run = {
        "label": label or str(folder),
        "colour": colour,
        "config": json.loads((folder / "config.json").read_text()),
        "result": json.loads(result.read_text()) if result.exists() else {},
        "log": read_csv(folder / "log.csv"),
        "grads": read_csv(folder / "grads.csv"),
    }
    del run["grads"]["epoch"]
    return run


def is_cifar100(run):
    """False for other data (its 20 coarse classes are), and for a part of it."""
    settings, classes = run["config"]["settings"], run["config"].get("classes", 100)
    named = settings["data"] in ("cifar100", "cifar100.npz")
    return named and classes == 100 and not settings["limit"]


def note(runs):
    """How long the runs of a line were and how many: "100 epochs, 3 seeds"."""
    if not runs:
        return "–"
    settings = runs[0]["config"]["settings"]
    done, planned = len(runs[0]["log"]["epoch"]), settings["epochs"]
    text = f"{done} epochs" if done == planned else f"{done} of {planned} epochs"
    if not is_cifar100(runs[0]):
        text += f" of {settings['data']}"
    if settings["limit"]:
        text += f", limit {settings['limit']}"
    text += f", {len(runs)} seed{'s' if len(runs) > 1 else ''}"
    return ", ".join([text, *runs[0].get("remarks", [])])


def caption(runs):
    """A legend's text: the label, and what of its note is not the paper's 100 epochs, 1 seed."""
    text = note(runs).removeprefix("100 epochs, ")
    return runs[0]["label"] if text == "1 seed" else f"{runs[0]['label']} ({text})"


def save(figure, path):
    figure.savefig(path, dpi=110, bbox_inches="tight")  # as wide as the longest legend
    plt.close(figure)
    print(f"wrote {path}")


def curves(groups, panels, title, path):
    """Loss and accuracy by epoch: validation solid, training light and dotted, a colour a group.

    A group is the seeds of one run: their mean, and the range of their validation as a band. Thin:
    the paper's own curve, if runs[0]["paper"] has it. LATE is validation alone, closer.
    """
    size = (6.4 * len(panels), 5.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    many = len(groups) > len(COLOURS)
    wheel = plt.cm.turbo(np.linspace(0, 1, len(groups))) if many else COLOURS
    for axis, panel in zip(axes[0], panels):
        metric, ylabel = panel
        for i, runs in enumerate(groups):
            colour = wheel[i] if runs[0]["colour"] is None else COLOURS[runs[0]["colour"]]
            start = len(runs[0]["log"]["epoch"]) // 2 if panel is LATE else 0
            epochs = runs[0]["log"]["epoch"][start:]
            dot = "o" if len(epochs) == 1 else None
            val = np.stack([run["log"][f"val_{metric}"][start:] for run in runs])
            train = np.stack([run["log"][f"train_{metric}"] for run in runs])
            axis.plot(epochs, val.mean(0), color=colour, marker=dot, lw=1.4, label=caption(runs))
            axis.fill_between(epochs, val.min(0), val.max(0), color=colour, alpha=0.2, lw=0)
            if panel is LATE:
                continue
            axis.plot(epochs, train.mean(0), ":", color=colour, marker=dot, lw=1.6, alpha=0.55)
            paper = runs[0].get("paper")
            if paper:
                x = paper["epoch"]
                axis.plot(x, paper[f"val_{metric}"], "--", color=colour, lw=0.8)
                axis.plot(x, paper[f"train_{metric}"], "-.", color=colour, lw=0.8, alpha=0.55)
        axis.set(xlabel="epoch", ylabel=ylabel)
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axis.grid(alpha=0.3)
        if metric == "loss":
            axis.set_ylim(bottom=0)
            # What is far over chance, ln 100 = 4.6, would flatten the rest.
            if axis.get_ylim()[1] > 6 > axis.dataLim.y0:
                axis.set(ylim=(0, 6), ylabel=f"{ylabel} (cut at 6)")
    band = " (band: all seeds)" if max(map(len, groups)) > 1 else ""
    styles = {f"validation{band}": "-", "training": ":"}
    if any(runs[0].get("paper") for runs in groups):
        styles |= {"paper, validation": "--", "paper, training": "-."}
    for label, style in styles.items():
        axes[0, 0].plot([], [], style, color="grey", lw=1, label=label)
    legend = axes[0, 0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=2 * len(panels), fontsize=8)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def gradient_flow(runs, title, path):
    """The paper's Figure 1: mean |gradient| of each weight tensor, input to output, a line an
    epoch; on the left linear, as in the paper, on the right logarithmic. Grey: where a stage ends.
    """
    size = (12.8, 3.4 * len(runs))
    figure, axes = plt.subplots(len(runs), 2, figsize=size, squeeze=False, layout="constrained")
    for row, run in zip(axes, runs):
        names = list(run["grads"])
        flow = np.stack(list(run["grads"].values()), axis=1)  # (epochs, layers)
        flow = np.where(flow == 0, 1e-45, flow)  # float32's smallest, for the logarithm
        settings = run["config"]["settings"]
        colour = plt.cm.ScalarMappable(plt.Normalize(1, settings["epochs"]), "viridis")
        x = np.arange(1, len(names) + 1)
        for axis, scale in zip(row, ("linear", "log")):
            for epoch, values in enumerate(flow, 1):
                axis.plot(x, values, color=colour.to_rgba(epoch), lw=0.9, marker=".", ms=3)
            axis.set(yscale=scale, xlabel="weight of a conv, norm or linear layer, input to output")
            axis.set_ylabel(f"mean |gradient|, {scale}")
            axis.grid(alpha=0.3)
        row[0].set_title(f"{caption([run])}, seed {settings['seed']}", fontsize=9, loc="left")
        stage = settings.get("blocks", 0) + 1  # blocks a stage, the last the reduction block
        for end in range(stage - 1, stage * settings.get("stages", 0), stage):
            tensors = [i for i, name in zip(x, names) if name.startswith(f"blocks.{end}.")]
            for axis in row:
                axis.axvline(max(tensors, default=0) + 0.5, color="grey", lw=0.8, alpha=0.6)
        ticks = plt.MaxNLocator(5, integer=True, min_n_ticks=1)
        figure.colorbar(colour, ax=row[1], label="epoch", ticks=ticks)
    limits = np.array([axis.get_ylim() for axis in axes[:, 1]])
    for axis in axes[:, 1]:  # one scale, so that rows compare
        axis.set_ylim(limits.min(), limits.max())
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def compare(folders, out):
    """Curves, gradient flow and last figures of any runs."""
    runs = []
    for folder in folders:
        if (Path(folder) / "log.csv").exists():
            runs.append(read_run(folder))
        else:
            print(f"plot.py: left out, because it has no log.csv: {folder}")
    if not runs:
        sys.exit("plot.py: no run is left; a folder of runs goes after --runs")
    title = "validation and training, by epoch"
    curves([[run] for run in runs], [ACC, LOSS], title, out / "compare.png")
    title = "gradient flow: the last mini-batch of every epoch"
    gradient_flow(runs, title, out / "compare_gradients.png")
    width = max(len(run["label"]) for run in runs)
    print(" " * width, *METRICS.values(), sep="  ")
    for run in runs:
        cells = [f"{run['log'][key][-1]:{len(label)}.2f}" for key, label in METRICS.items()]
        print(f"{run['label']:{width}}", *cells, note([run]), sep="  ")


# ---- the paper
# {name in sweep.sh: label, METRICS after 100 epochs (one seed), colour in all figures}
PAPER = {
    "vgg08": ("VGG08", 55.17, 48.60, 1.60, 1.97, 0),
    "vgg38": ("VGG38", 0.93, 0.64, 4.61, 4.61, 1),
    "vgg38_bn": ("VGG38 BN", 54.43, 45.08, 1.61, 2.01, 2),
    "vgg38_rn": ("VGG38 ResNet", 86.26, 62.32, 0.44, 1.72, 3),
    "vgg38_rn_sigmoid": ("VGG38 ResNet-Sig", 31.50, 30.72, 2.57, 2.62, 5),
    "vgg38_rn_wd1e-2": ("ResNet, λ = 1e-2", 58.09, 53.52, 1.53, 1.69, 6),
    "vgg38_rn_wd1e-3": ("RN+WP (λ = 1e-3)", 87.83, 65.32, 0.42, 1.35, 4),
    "vgg38_rn_wd1e-4": ("ResNet, λ = 1e-4", 88.23, 62.64, 0.38, 1.70, 7),
    "vgg38_rn_lr5": ("RN+WP, LR x5", 60.01, 54.64, 1.41, 1.63, 0),
    "vgg38_rn_lr30": ("RN+WP, LR x30", 21.64, 21.08, 3.16, 3.17, 1),
    "vgg38_rn_lr100": ("RN+WP, LR x100", 15.76, 15.72, 3.51, 3.50, 2),
    "vgg38_rn_batch256": ("RN+WP, batch 256", 88.98, 61.71, 0.39, 1.51, 3),
    "vgg38_rn_batch512": ("RN+WP, batch 512", 86.29, 60.01, 0.48, 1.55, 5),
    "vgg68": ("VGG68", 86.86, 66.76, 0.44, 1.30, 0),
    "vgg72": ("VGG72", 90.02, 67.08, 0.33, 1.32, 1),
    "vgg132": ("VGG132 (the paper's VGG106)", 90.35, 66.56, 0.32, 1.34, 2),
}
EXTRAS = {  # not in the paper; batch 64 is from its author's logs
    "vgg106": ("VGG106, truly", None, None, None, None, 3),
    "vgg38_rn_batch64": ("RN+WP, batch 64", 83.38, 65.08, 0.56, 1.29, 6),
    "vgg38_residual_only": ("VGG38 residual, no BN", None, None, None, None, 4),
    "vgg38_he": ("VGG38, He initialisation, LR 1e-4", None, None, None, None, 6),
    "vgg38_dirac": ("VGG38, Dirac initialisation", None, None, None, None, 7),
    "vgg38_eps": ("VGG38, Adam's eps 1e-17", None, None, None, None, 2),
    # the table that the coursework has handed out since 2021
    "cw21_vgg08": ("VGG08, cw21", 51.59, 46.84, 1.74, 1.95, 0),
    "cw21_vgg38_bn": ("VGG38 BN, cw21", 47.13, 42.76, 1.91, 2.14, 1),
    "cw21_vgg38_rc": ("VGG38 RC, cw21", 61.52, 52.32, 1.33, 1.84, 2),
    "cw21_vgg38_bn_rc": ("VGG38 BN + RC, cw21", 62.99, 53.76, 1.26, 1.73, 3),
    "cw21_vgg38_bn_lr1e-2": ("VGG38 BN, 1e-2, cw21", 52.28, 46.72, 1.70, 1.99, 5),
    "cw21_vgg38_bn_rc_lr1e-2": ("VGG38 BN + RC, 1e-2, cw21", None, None, None, None, 6),
}
PAPER_TEST = {  # accuracy in % and loss on the test set: vgg68's is in the paper, others in logs
    "vgg08": (49.95, 1.911),
    "vgg38": (1.00, 4.609),
    "vgg38_rn": (61.94, 1.723),
    "vgg68": (65.83, 1.33),
}
PAPER_LOGS = Path(__file__).parent / "results/paper"  # NAME.csv: three published logs, by epoch
FIGURES = {  # file: title, what is drawn, runs
    "annex_a": ("Annex A: VGG08 and VGG38", [LOSS, ACC], "vgg08", "vgg38"),
    "figure2": ("Figure 2 (section 5.1): batch norm and residual connections", [LOSS],
                "vgg08", "vgg38", "vgg38_bn", "vgg38_rn", "vgg38_rn_sigmoid"),
    "figure3": ("Figure 3 (section 5.2): weight decay", [ACC, LOSS],
                "vgg38_rn", "vgg38_rn_wd1e-2", "vgg38_rn_wd1e-3", "vgg38_rn_wd1e-4"),
    "figure4": ("Figure 4 (section 5.3): learning rate and batch size", [LOSS],
                "vgg38_rn_wd1e-3", "vgg38_rn_lr5", "vgg38_rn_lr30", "vgg38_rn_lr100",
                "vgg38_rn_batch256", "vgg38_rn_batch512"),
    "figure5": ("Figure 5 (section 5.4): depth", [ACC, LATE, LOSS],
                "vgg38_rn_wd1e-3", "vgg68", "vgg72", "vgg132"),
}
MILESTONES = (1, 2, 5, 10, 30, 100)  # epochs


def sweep_lines():
    """{name: list of flags} as sweep.sh has them."""
    sweep = Path(__file__).with_name("sweep.sh")
    lines = subprocess.check_output(["bash", sweep, "--list"], text=True).splitlines()
    return {name: flags for name, *flags in map(str.split, lines)}


def read_seeds(folder, name):
    """The runs NAME, NAME-seed1, ... in folder, for a mean over runs that differ in the seed alone.

    Those that are not like the longest, or repeat a seed, are named and left out. What else a line
    of a table should say is in each run's "remarks": how many that were, settings not sweep.sh's.
    """
    label, *_, colour = (PAPER | EXTRAS)[name]
    own = re.compile(re.escape(name) + r"(-seed\d+)?")
    folders = [log.parent for log in sorted(folder.glob("*/log.csv"))]
    runs = [read_run(path, label, colour) for path in folders if own.fullmatch(path.name)]
    if not runs:
        return []

    import train  # here, because torch takes seconds and comparing runs needs none of it

    _, defaults = train.parse_args([])  # for flags newer than a run

    longest = max(runs, key=lambda run: (len(run["log"]["epoch"]), len(run["config"]["settings"])))
    theirs = defaults | longest["config"]["settings"]
    paper = PAPER_LOGS / f"{name}.csv"
    seeds = {}
    for run in runs:
        run["paper"] = read_csv(paper) if paper.exists() and is_cifar100(run) else None
        ours = defaults | run["config"]["settings"]
        differ = {key for key in ours | theirs if ours.get(key) != theirs.get(key)}
        if "data_checksum" not in ours.keys() & theirs.keys():  # older runs have none
            differ -= {"data_checksum"}
        as_long = len(run["log"]["epoch"]) == len(longest["log"]["epoch"])
        if as_long and differ <= {"seed"} and ours["seed"] not in seeds:
            seeds[ours["seed"]] = run
        else:
            print(f"plot.py: left out for its length, settings or seed: {run['config']['command']}")
    left_out = len(runs) - len(seeds)
    remarks = [f"{left_out} left out"] if left_out else []
    lines = sweep_lines()
    if name in lines:
        _, usual = train.parse_args(lines[name])
        told = {"seed", "epochs", "data", "data_checksum", "limit", "precision"}  # elsewhere
        for key in theirs:
            if key not in told and theirs[key] != usual.get(key):
                remarks.append(f"{key} {theirs[key]}")
    for run in seeds.values():
        run["remarks"] = remarks
    return list(seeds.values())


def read_all(folder):
    """{name in sweep.sh: its runs}."""
    return {name: read_seeds(folder, name) for name in PAPER | EXTRAS}


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


def table_of_runs(title, lines, found, whose="paper"):
    """The last epoch's METRICS, the published ones beside ours."""
    rows = []
    for name, (label, *papers, _) in lines.items():
        row = [label]
        for metric, paper in zip(METRICS, papers):
            row += [cell([paper]), cell([run["log"][metric][-1] for run in found[name]])]
        rows.append([*row, note(found[name])])
    pairs = [f"{label}, {name}" for label in METRICS.values() for name in (whose, "ours")]
    return markdown(title, ["run", *pairs, "epochs, seeds"], rows)


def table_of_the_test_set(found):
    rows = []
    for name, runs in found.items():
        row = [runs[0]["label"]]
        for key, paper in zip(("test_acc", "test_loss"), PAPER_TEST.get(name, (None, None))):
            row += [cell([paper]), cell([run["result"].get(key) for run in runs])]
        rows.append([*row, note(runs)])
    header = ["run", "acc %, paper", "acc %, ours", "loss, paper", "loss, ours", "epochs, seeds"]
    return markdown("Test set, at the epoch of the best validation accuracy", header, rows)


def table_of_milestones(found):
    rows = []
    for runs in found.values():
        row = [runs[0]["label"]]
        for epoch in MILESTONES:
            logs = [run["log"] for run in runs if len(run["log"]["epoch"]) >= epoch]
            loss = cell([log["train_loss"][epoch - 1] for log in logs])
            accuracy = cell([log["val_acc"][epoch - 1] for log in logs], digits=1)
            row.append(f"{loss} / {accuracy}" if logs else "–")
        rows.append([*row, note(runs)])
    title = "Is yours on the way? Training loss / validation accuracy in % after so many epochs"
    return markdown(title, ["run", *MILESTONES, "epochs, seeds"], rows)


def table_of_origins(found):
    rows = []
    for run in [run for runs in found.values() for run in runs]:
        config = run["config"]
        rows.append([f"`{config['command']}`", "; then ".join(config["made_by"])])
    return markdown("Where each run comes from", ["command", "made by"], rows)


def tables(found):
    """The text of tables.md."""
    there = {name: runs for name, runs in found.items() if runs}
    extras = {name: EXTRAS[name] for name in EXTRAS if name in there}
    return (
        "# The paper and this implementation\n\nWritten by `python plot.py`. Mean ± standard "
        "deviation over seeds where there are several; the paper's are of 100 epochs and one seed. "
        "A dash: no such run, or no such figure. Hashes: the commit, then the code.\n\n"
        + table_of_runs("All runs of the paper, last epoch", PAPER, found)
        + table_of_runs("Extras, not in the paper", extras, found, "published")
        + table_of_the_test_set(there)
        + table_of_milestones(there)
        + table_of_origins(there)
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", metavar="RUN", help="folders of runs to compare")
    parser.add_argument("--runs", type=Path, default="runs", help="sweep.sh's (default: runs)")
    parser.add_argument("--out", type=Path, default="figures", help="default: figures")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.folders:
        return compare(args.folders, args.out)
    found = read_all(args.runs)
    if not any(found.values()):
        sys.exit(f"plot.py: {args.runs}/ has none of the paper's runs: bash sweep.sh makes them; "
                 "for any others name their folders: python plot.py RUN ...")
    flows = [found[name][0] for name in ("vgg08", "vgg38", "vgg38_rn") if found[name]]
    if flows:
        title = ("Figure 1: gradient flow, last mini-batch of every epoch (grey: a stage ends; "
                 "ResNet's zigzag: conv, norm, conv, norm, ...)")
        gradient_flow(flows, title, args.out / "figure1.png")
    for file, (title, panels, *names) in FIGURES.items():
        groups = [found[name] for name in names if found[name]]
        if groups:
            curves(groups, panels, title, args.out / f"{file}.png")
    (args.out / "tables.md").write_text(tables(found), encoding="utf-8")
    missing = " ".join(name for name in PAPER if not found[name])
    print(f"wrote {args.out / 'tables.md'}; runs that are missing: {missing or 'none'}")


if __name__ == "__main__":
    main()
