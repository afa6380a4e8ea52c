"""Every figure and table of the paper, from what the runs wrote.

python plot.py                     runs/ -> figures/: the paper's figures and tables.md
python plot.py runs/A runs/B       any runs: figures/compare.png, compare_gradients.png, a table
python plot.py --runs results/runs --out results      this project's own
"""
import argparse
import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # before matplotlib: a notebook's own back end draws no files
import matplotlib.pyplot as plt
import numpy as np

METRICS = {
    "train_acc": "train acc %",
    "val_acc": "val acc %",
    "train_loss": "train loss",
    "val_loss": "val loss",
}
LOSS = ("loss", "cross-entropy")
ACC = ("acc", "accuracy (%)")
# Chosen to be told apart by the colour-blind.
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #000000 #E69F00 #56B4E9 #8C6D31".split()


# ---- any runs


def read_csv(path):
    """{column: (epochs,) array} of a CSV of numbers."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}


def read_run(folder):
    """A run, as a dict: its label, config, log, grads, result (None while it trains), and the
    numbers of epochs planned and done. ValueError with one line if it cannot be read.
    """
    path = Path(folder)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        log, grads = read_csv(path / "log.csv"), read_csv(path / "grads.csv")
        result = None
        if (path / "result.json").exists():
            result = json.loads((path / "result.json").read_text(encoding="utf-8"))
        lacking = {"epoch", *METRICS} - log.keys()
        if lacking:
            raise ValueError(f"its log.csv has no {' and no '.join(sorted(lacking))}")
        planned, done = config["settings"]["epochs"], len(log["epoch"])
        grads.pop("epoch")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{folder} is no run that can be read ({error})")
    return {"label": str(folder), "config": config, "log": log, "grads": grads, "result": result,
            "planned": planned, "done": done, "diverged": bool(result and result["diverged"])}


def has_cifar100s_size(run):
    """False if an epoch has other than 47,500 images: synthetic data, or --limit."""
    config = run["config"]
    return config["steps_per_epoch"] == math.ceil(47_500 / config["settings"]["batch_size"])


def length(runs):
    """How many epochs the runs had: "100 epochs", "5 epochs, short", "12 of 100 epochs", ..."""
    planned, done = runs[0]["planned"], runs[0]["done"]
    if runs[0]["diverged"]:
        return f"diverged in epoch {done}"
    if done < planned:
        return f"{done} of {planned} epochs"
    return f"{done} epochs, short" if planned < 100 else f"{done} epochs"


def note(runs):
    """How many epochs and seeds the runs of one line had, and what else is unusual about them."""
    if not runs:
        return "–"
    parts = [length(runs), "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"]
    if runs[0].get("lost"):
        parts.append(f"{runs[0]['lost']} more diverged")
    if not has_cifar100s_size(runs[0]):
        parts.append(f"other data: {runs[0]['config']['settings']['data']}")
    return ", ".join(parts)


def caption(runs):
    """A legend's text: the label, with its note if that is not the paper's 100 epochs, 1 seed."""
    label = runs[0]["label"]
    return label if note(runs) == "100 epochs, 1 seed" else f"{label} ({note(runs)})"


def save(figure, path):
    figure.savefig(path, dpi=110, bbox_inches="tight")  # as wide as the longest legend
    plt.close(figure)
    print(f"wrote {path}")


def curves(groups, panels, title, path):
    """Loss and accuracy by epoch: validation solid, training light and dotted, a colour a group.

    A group is the seeds of one run: their mean, and the range of their validation as a band. Thin:
    the paper's own curve, if runs[0]["paper"] has it.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.4 * len(panels), 5.4), squeeze=False, layout="constrained"
    )
    wheel = COLOURS
    if len(groups) > len(wheel):
        wheel = [plt.cm.turbo(x) for x in np.linspace(0, 1, len(groups))]
    papers = False
    for axis, (metric, ylabel) in zip(axes[0], panels):
        for i, runs in enumerate(groups):
            colour = runs[0].get("colour", wheel[i])
            epochs = runs[0]["log"]["epoch"]
            dot = "o" if len(epochs) == 1 else None
            val = np.stack([run["log"][f"val_{metric}"] for run in runs])
            train = np.stack([run["log"][f"train_{metric}"] for run in runs])
            axis.plot(epochs, val.mean(0), color=colour, marker=dot, lw=1.4, label=caption(runs))
            axis.plot(epochs, train.mean(0), ":", color=colour, marker=dot, lw=1.6, alpha=0.55)
            if len(runs) > 1:
                axis.fill_between(epochs, val.min(0), val.max(0), color=colour, alpha=0.2)
            paper = runs[0].get("paper")
            if paper:
                papers = True
                x = paper["epoch"]
                axis.plot(x, paper[f"val_{metric}"], "--", color=colour, lw=0.8)
                axis.plot(x, paper[f"train_{metric}"], "-.", color=colour, lw=0.8, alpha=0.55)
        axis.set(xlabel="epoch", ylabel=ylabel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if metric == "loss":  # chance is ln 100 = 4.6; a spike above would flatten all the rest
            axis.set_ylim(0, min(axis.get_ylim()[1], 6))
    styles = {"validation": "-", "training": ":"}
    if papers:
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
    figure, axes = plt.subplots(
        len(runs), 2, figsize=(12.8, 3.4 * len(runs)), squeeze=False, layout="constrained"
    )
    for row, run in zip(axes, runs):
        names = list(run["grads"])
        flow = np.stack(list(run["grads"].values()), axis=1)  # (epochs, layers)
        colour = plt.cm.ScalarMappable(plt.Normalize(1, max(run["planned"], 2)), "viridis")
        x = np.arange(1, len(names) + 1)
        settings = run["config"]["settings"]
        stage = settings["blocks"] + 1  # blocks of a stage, the reduction block the last of them
        ends = [f"blocks.{stage * (i + 1) - 1}." for i in range(settings["stages"])]
        for axis, scale in zip(row, ("linear", "log")):
            if scale == "log":  # has no place for zeros: float32's smallest number
                flow = np.where(flow == 0, 1e-45, flow)
            for epoch, values in enumerate(flow, 1):
                axis.plot(x, values, color=colour.to_rgba(epoch), lw=0.9, marker=".", ms=3)
            for end in ends:
                tensors = [i for i, name in enumerate(names, 1) if name.startswith(end)]
                axis.axvline(max(tensors, default=0) + 0.5, color="grey", lw=0.8, alpha=0.6)
            axis.set(yscale=scale, xlabel="weight of a conv, norm or linear layer, input to output")
            axis.set_ylabel("mean |gradient|")
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
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def compare(folders, out):
    """Curves, gradient flow and last figures of any runs. What is no run is named and left out."""
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except ValueError as error:
            print(f"plot.py: left out: {error}", file=sys.stderr)
    if not runs:
        sys.exit("plot.py: none of these is a run; a folder of the paper's runs goes after --runs")
    title = "validation and training, by epoch"
    curves([[run] for run in runs], [ACC, LOSS], title, out / "compare.png")
    title = "gradient flow: the last mini-batch of every epoch"
    gradient_flow(runs, title, out / "compare_gradients.png")
    width = max(len(run["label"]) for run in runs)
    print(" " * width, " epochs ", "  ".join(METRICS.values()))
    for run in runs:
        cells = [f"{run['log'][key][-1]:{len(label)}.2f}" for key, label in METRICS.items()]
        print(f"{run['label']:{width}}  {run['done']:6} ", "  ".join(cells))


# ---- the paper

PAPER = {  # name in sweep.sh: label; METRICS after 100 epochs (one seed); colour in all figures
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
    "vgg38_he": ("VGG38, He initialisation", None, None, None, None, 6),
    "vgg38_dirac": ("VGG38, Dirac initialisation", None, None, None, None, 7),
}
# The table that the coursework has handed out since 2021 (VGG38 BN: a draft of it), and a student's
# published run (AlexeyDronov's fork of the framework): METRICS, twice; None if there is none.
CW21 = {
    "cw21_vgg08": ("VGG08", (51.59, 46.84, 1.74, 1.95), (51.4, 46.4, 1.747, 1.989)),
    "cw21_vgg38_bn": ("VGG38 BN", (47.13, 42.76, 1.91, 2.14), (46.0, 45.4, 1.975, 2.002)),
    "cw21_vgg38_rc": ("VGG38 RC", (61.52, 52.32, 1.33, 1.84), None),
    "cw21_vgg38_bn_rc": ("VGG38 BN + RC", (62.99, 53.76, 1.26, 1.73), None),
    "cw21_vgg38_bn_lr1e-2": ("VGG38 BN, 1e-2", (52.28, 46.72, 1.70, 1.99), None),
    "cw21_vgg38_bn_rc_lr1e-2": ("VGG38 BN + RC, 1e-2", None, (71.2, 60.4, 0.961, 1.563)),
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
    "figure5": ("Figure 5 (section 5.4): depth", [ACC, LOSS],
                "vgg38_rn_wd1e-3", "vgg68", "vgg72", "vgg132"),
}
MILESTONES = (1, 2, 5, 10, 30, 100)  # epochs


def sweep_settings():
    """{name: settings} of every line of sweep.sh, as train.py's parser reads its flags."""
    import train  # here, because this import takes seconds and comparing any runs needs none of it

    sweep = Path(__file__).parent / "sweep.sh"
    lines = subprocess.check_output(["bash", sweep, "--list"], text=True).splitlines()
    return {line.split()[0]: train.parse_args(line.split()[1:])[1] for line in lines}


def read_seeds(folder, name, expected):
    """The runs of one line of sweep.sh, one a seed: of those there, the ones that got furthest.

    `expected`: the line's settings. A folder with others, or that cannot be read, is named and left
    out; so are seeds whose epochs, data or precision are not the longest run's, for a mean is over
    equals. Diverged ones are left out if others are there, and counted.
    """
    free = {"seed", "epochs", "precision", "data", "limit"}  # what a line of sweep.sh leaves open
    runs = []
    for log in Path(folder).glob(f"{name}*/log.csv"):
        seed = re.fullmatch(re.escape(name) + r"(?:-seed(\d+))?", log.parent.name)
        if not seed:
            continue
        try:
            run = read_run(log.parent)
            settings = expected | run["config"]["settings"]
            differs = [key for key in expected.keys() - free if settings[key] != expected[key]]
            if settings["seed"] != int(seed[1] or 0):
                differs.append("seed")
            if differs:
                made_with = ", ".join(f"{key} {settings[key]}" for key in sorted(differs))
                raise ValueError(f"{log.parent} is not {name}: made with {made_with}")
        except ValueError as error:
            print(f"plot.py: left out: {error}", file=sys.stderr)
            continue
        label, *_, colour = (PAPER | EXTRAS).get(name, (CW21.get(name, [name])[0], 0))
        paper = PAPER_LOGS / f"{name}.csv"
        run |= {"label": label, "colour": COLOURS[colour], "seed": settings["seed"]}
        run["paper"] = read_csv(paper) if paper.exists() and has_cifar100s_size(run) else None
        data = Path(settings["data"]).name
        run["kind"] = (run["planned"], data, settings["limit"], settings["precision"])
        runs.append(run)
    runs.sort(key=lambda run: (-run["planned"], run["seed"]))
    for run in runs:
        if run["kind"] != runs[0]["kind"]:
            print(f"plot.py: left out: {name}, seed {run['seed']}: {run['kind']} is not "
                  f"{runs[0]['kind']}", file=sys.stderr)
    runs = [run for run in runs if run["kind"] == runs[0]["kind"]]
    whole = [run for run in runs if not run["diverged"]]
    if not whole:
        return runs
    furthest = max(run["done"] for run in whole)
    for run in whole:
        run["lost"] = len(runs) - len(whole)
    return [run for run in whole if run["done"] == furthest]


def read_all(folder):
    """{name in sweep.sh: its runs}."""
    expected = sweep_settings()
    names = [*PAPER, *EXTRAS, *CW21]
    return {name: read_seeds(folder, name, expected[name]) for name in names}


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


def table_of_runs(title, lines, found):
    """The last epoch's METRICS, the paper's beside ours."""
    rows = []
    for name, (label, *papers, _) in lines.items():
        row = [label]
        for metric, paper in zip(METRICS, papers):
            row += [cell([paper]), cell([run["log"][metric][-1] for run in found[name]])]
        rows.append([*row, note(found[name])])
    pairs = [f"{label}, {whose}" for label in METRICS.values() for whose in ("paper", "ours")]
    return markdown(title, ["run", *pairs, "ours"], rows)


def table_of_the_later_coursework(found):
    """METRICS handed out, a student's, and ours: the last epoch's, and the mean of the last eight
    in brackets, a whole period of the swing that 475 mini-batches an epoch make of 200.
    """
    rows = []
    for name, (label, handed_out, published) in CW21.items():
        if handed_out:
            rows.append([label, "handed out", *handed_out, ""])
        if published:
            rows.append([label, "a student's", *published, ""])
        if found[name]:
            ours = []
            for metric in METRICS:
                logs = [run["log"][metric] for run in found[name]]
                eight = cell([log[-8:].mean() for log in logs])
                ours.append(f"{cell([log[-1] for log in logs])} ({eight})")
            rows.append([label, "ours", *ours, note(found[name])])
    header = ["run", "whose", *METRICS.values(), "ours"]
    return markdown("The coursework's table since 2021 (`--cosine batches`)", header, rows)


def table_of_the_test_set(found):
    rows = []
    for name, (label, *_) in (PAPER | EXTRAS).items():
        row = [label]
        results = [run["result"] or {} for run in found[name]]
        for key, paper in zip(("test_acc", "test_loss"), PAPER_TEST.get(name, (None, None))):
            row += [cell([paper]), cell([result.get(key) for result in results])]
        rows.append([*row, note(found[name])])
    header = ["run", "acc %, paper", "acc %, ours", "loss, paper", "loss, ours", "ours"]
    return markdown("Test set, at the epoch of the best validation accuracy", header, rows)


def table_of_milestones(found):
    """Of a run of less than 100 epochs only the first: then its learning rate comes down sooner."""
    rows = []
    for name, runs in found.items():
        if not runs:
            continue
        row = [runs[0]["label"] if name not in CW21 else f"{CW21[name][0]}, `{name}`"]
        for epoch in MILESTONES:
            logs = [run["log"] for run in runs if run["done"] >= epoch]
            if not logs or (epoch > 1 and runs[0]["planned"] < 100):
                row.append("–")
                continue
            loss = cell([log["train_loss"][epoch - 1] for log in logs])
            accuracy = cell([log["val_acc"][epoch - 1] for log in logs], digits=1)
            row.append(f"{loss} / {accuracy}")
        rows.append([*row, note(runs)])
    title = "Is yours on the way? Training loss / validation accuracy in % after so many epochs"
    return markdown(title, ["run", *MILESTONES, "ours"], rows)


def table_of_origins(found):
    rows = []
    nothing = np.array([np.nan])  # a fork's log may lack a column
    for run in [run for runs in found.values() for run in runs]:
        minutes = f"{run['log'].get('seconds', nothing).sum() / 60:.0f}"
        rate = f"{np.median(run['log'].get('steps_per_s', nothing)):.1f}"
        made_by = "; then ".join((run["result"] or run["config"]).get("made_by", []))
        epochs = f"{run['done']} of {run['planned']}"
        rows.append([f"`{run['config']['command']}`", made_by, epochs, minutes, rate])
    header = ["command", "made by", "epochs", "minutes", "steps a second"]
    return markdown("Where each run comes from", header, rows)


def tables(found):
    """The text of tables.md."""
    return (
        "# The paper and this implementation\n\nWritten by `python plot.py`. Mean ± standard "
        "deviation over seeds where there are several; the paper's are of 100 epochs and one seed. "
        "A dash: no such run, or no such figure.\n\n"
        + table_of_runs("All runs of the paper, last epoch", PAPER, found)
        + table_of_runs("Extras, not in the paper", EXTRAS, found)
        + table_of_the_test_set(found)
        + table_of_the_later_coursework(found)
        + table_of_milestones(found)
        + table_of_origins(found)
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="python plot.py [RUN ...] [--runs RUNS] [--out OUT]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
        title = "Figure 1: gradient flow, last mini-batch of every epoch (grey: where a stage ends)"
        gradient_flow(flows, title, args.out / "figure1.png")
    for file, (title, panels, *names) in FIGURES.items():
        groups = [found[name] for name in names if found[name]]
        if groups:
            curves(groups, panels, title, args.out / f"{file}.png")
    (args.out / "tables.md").write_text(tables(found), encoding="utf-8")
    missing = " ".join(name for name in PAPER if not found[name])
    print(f"wrote {args.out / 'tables.md'}; runs that are missing: {missing or 'none'}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a folder that cannot be written, a full disk
        sys.exit(f"plot.py: {error}")
