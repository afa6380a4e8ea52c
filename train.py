"""Train one VGG and log its gradients: `python train.py --blocks 10 --bn --residual --wd 1e-3`.

The file reads top to bottom: data, augmentation, schedule, evaluation, files, flags, and main(),
which has the training loop. A run writes runs/NAME/{config.json,log.csv,grads.csv,best.pt,last.pt,
result.json}; if it was interrupted, the same command resumes from last.pt.
"""
import argparse
import copy
import ctypes
import functools
import hashlib
import io
import json
import math
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout  # it comes with torch

from model import ACTIVATIONS, INITS, VGG

MEAN = (0.4914, 0.4822, 0.4465)  # CIFAR-10's, as in the paper's framework
STD = (0.2023, 0.1994, 0.2010)
RESUMES = "the same command (without --fresh) resumes after the last whole epoch"
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


# ---- data
def split_indices(n):
    """Indices of the training (95 %) and validation images among n images.

    The split never depends on a run's seed. For CIFAR-100's 50,000 images it is the paper's.
    """
    train = np.random.RandomState(0).choice(n, n - n // 20, replace=False)
    return train, np.setdiff1d(np.arange(n), train)


def synthetic(n_train=10_000, n_test=2_000, classes=100):
    """The four ARRAYS of a made-up data set: each class is one coarse picture, under noise."""
    rng = np.random.RandomState(0)
    pictures = rng.uniform(-1, 1, (classes, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    labels = rng.randint(classes, size=n_train + n_test)
    noise = rng.normal(0, 40, (len(labels), 32, 32, 3))
    images = (128 + 40 * pictures[labels] + noise).clip(0, 255).astype(np.uint8)
    return images[:n_train], labels[:n_train], images[n_train:], labels[n_train:]


def cifar100(data_dir):
    """CIFAR-100's four ARRAYS, downloaded to data_dir if need be. SystemExit if that fails."""
    from torchvision.datasets import CIFAR100  # here, because this import takes seconds

    try:
        try:
            test = CIFAR100(data_dir, train=False)
        except RuntimeError:  # torchvision's word for "not there, or damaged"
            Path(data_dir).mkdir(parents=True, exist_ok=True)
            with FileLock(f"{data_dir}/download.lock"):  # of several runs only one downloads
                test = CIFAR100(data_dir, train=False, download=True)  # brings both parts
        train = CIFAR100(data_dir)
    except (OSError, RuntimeError) as error:
        sys.exit(f"train.py: no CIFAR-100 in {data_dir}/, and no download ({error}); "
                 "put cifar-100-python.tar.gz there, or use --data FILE.npz or --data synthetic")
    return train.data, train.targets, test.data, test.targets


def as_tensors(images, labels, source):
    """(N, 32, 32, 3) uint8 and (N,) integers -> (N, 3, 32, 32) uint8 and (N,) int64 tensors."""
    labels = np.asarray(labels)
    good_images = images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3)
    good_labels = labels.dtype.kind in "iu" and labels.shape == images.shape[:1]
    if not (good_images and good_labels and labels.min() >= 0):
        sys.exit(f"train.py: {source} cannot be used: it has {images.dtype} {images.shape} images, "
                 "not uint8 (N, 32, 32, 3), or labels that are not N integers from 0")
    images = torch.from_numpy(images).permute(0, 3, 1, 2)  # a view, in channels_last order
    return images, torch.from_numpy(labels.astype(np.int64))


def load_data(source, data_dir="data"):
    """[(images, labels) of training, validation, test]: uint8 (N, 3, 32, 32) and int64 (N,).

    source: "cifar100" (downloaded to data_dir if need be), "synthetic" or a .npz file.
    SystemExit with one line if it cannot be used.
    """
    if source == "synthetic":
        arrays = synthetic()
    elif source == "cifar100":
        arrays = cifar100(data_dir)
    else:
        try:
            with np.load(source) as file:
                arrays = [file[key] for key in ARRAYS]
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            sys.exit(f"train.py: {source} cannot be read ({error}); it must hold {ARRAYS}")
    images, labels = as_tensors(*arrays[:2], source)
    test = as_tensors(*arrays[2:], source)
    kept, held_out = split_indices(len(images))
    return [(images[kept], labels[kept]), (images[held_out], labels[held_out]), test]


@functools.cache  # copied to the device once: a copy in every step would make the GPU wait
def per_channel(values, device):
    """Three numbers as a (3, 1, 1) tensor."""
    return torch.tensor(values, device=device)[:, None, None]


def normalise(images):
    """uint8 (N, 3, 32, 32) -> float32, channels_last: (x / 255 - mean) / std."""
    mean = per_channel(MEAN, images.device)
    std = per_channel(STD, images.device)
    return ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


# ---- augmentation
def draw(n, device):
    """An epoch's augmentation, (4, n) int64: shuffled order, crop row and column (0 to 8), flip."""
    order = torch.randperm(n, device=device)
    row = torch.randint(9, (n,), device=device)
    column = torch.randint(9, (n,), device=device)
    flip = torch.randint(2, (n,), device=device)
    return torch.stack([order, row, column, flip])


def augment(padded, plan):
    """Random crops, half of them mirrored.

    padded: uint8 (N, 3, 40, 40); plan: (4, B), columns of draw() -> uint8 (B, 3, 32, 32).
    """
    order, row, column, flip = plan
    # Every 32 x 32 window of every image, (N, 3, 9, 9, 32, 32): a view, which takes no memory.
    windows = padded.unfold(2, 32, 1).unfold(3, 32, 1)
    images = windows[order, :, row, column]  # (B, 3, 32, 32)
    flip = flip.bool()[:, None, None, None]  # (B, 1, 1, 1)
    return torch.where(flip, images.flip(3), images)


# ---- schedule and evaluation
def cosine_lr(t, period, lr_max, lr_min):
    """Learning rate at time t: from lr_max at t = 0 down to lr_min at t = period (section 5)."""
    return lr_min + (lr_max - lr_min) * (1 + math.cos(math.pi * t / period)) / 2


@torch.no_grad()
def evaluate(model, images, labels, autocast):
    """Mean cross-entropy and accuracy in %, a (2,) tensor; leaves the model in training mode."""
    model.eval()
    total = torch.zeros(2, device=images.device)
    for x, y in zip(images.split(500), labels.split(500)):
        with autocast:
            logits = model(normalise(x)).float()
        loss = F.cross_entropy(logits, y, reduction="sum")
        total += torch.stack([loss, 100 * (logits.argmax(1) == y).sum()])
    model.train()
    return total / len(labels)


def progress(batches, title):
    """The batches; on a terminal, a line that overwrites itself says how far they are."""
    start = time.perf_counter()
    for i, batch in enumerate(batches, 1):
        yield batch
        if sys.stdout.isatty() and i % 10 == 0:
            rate = i / (time.perf_counter() - start)
            line = f"{title}  step {i}/{len(batches)}  {rate:.1f} steps/s"
            width = shutil.get_terminal_size().columns - 1  # a longer line would not overwrite
            print(line[-width:], end="\r", flush=True)


# ---- CUDA graph
def capture(step, x, y, optimizer):
    """step(x, y), captured as a CUDA graph, and then replayed on any x and y of the same shapes.

    A step's 700 kernels run faster than Python launches them one by one; a graph launches them all
    at once. It repeats what the GPU did, and Python no longer runs: an `if`, a hook or a number of
    Python (a random one, the epoch) stays as it was, and .item() or print() of a tensor is an
    error. PyTorch's random numbers on the GPU do change. A smaller batch runs `step` itself.
    """
    x, y = x.clone(), y.clone()  # the memory that the graph reads
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # PyTorch asks for warm-up steps on another stream
        for _ in range(3):
            step(x, y)
    optimizer.zero_grad()  # without gradients, so that capturing allocates them for the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # this waits for the device
        metrics = step(x, y)

    def replay(new_x, new_y):
        if len(new_y) != len(y):  # the epoch's last batch can be smaller
            return step(new_x, new_y)
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
        return metrics.clone()  # the next replay overwrites it

    return replay


# ---- files
def write(path, content):
    """Replace a file as a whole, so that a kill leaves the old one or the new one, never a part.

    content: text, or what torch.save takes. SystemExit with one line if the disk is full.
    """
    buffer = io.BytesIO()  # on a full disk torch.save itself raises no OSError
    if isinstance(content, str):
        buffer.write(content.encode())
    else:
        torch.save(content, buffer)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        sys.exit(f"train.py: cannot write {path} ({error.strerror}); once it can, {RESUMES}")


def csv_text(rows):
    """Rows, dicts of numbers, as CSV with the columns of the last one."""
    lines = [",".join(rows[-1])]
    for row in rows:
        lines.append(",".join(f"{row.get(key, math.nan):.8g}" for key in rows[-1]))
    return "\n".join(lines) + "\n"


def code_version():
    """A hash of model.py and train.py, which any edit changes, and the commit ("" without git)."""
    here = Path(__file__).resolve().parent
    code = (here / "model.py").read_bytes() + (here / "train.py").read_bytes()
    try:
        git = ["git", "-C", here, "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        commit = ""
    return hashlib.sha256(code).hexdigest()[:8], commit


def diverged(log):
    """True if the last row has a loss that is not finite."""
    return bool(log) and not math.isfinite(log[-1]["train_loss"] + log[-1]["val_loss"])


def summary(result):
    """result.json in one line."""
    line = f"finished, {result['epochs']} epochs{', diverged' if result['diverged'] else ''}"
    if result["best"]:
        best = f"{result['best']['val_acc']:.2f} % in epoch {result['best']['epoch']}"
        line += f"; best validation accuracy {best}, test {result['test_acc']:.2f} % there"
    return line


# ---- flags

# Flags that say where and how a run runs:
NOT_SETTINGS = ("data_dir", "out", "name", "device", "no_graph", "compile", "fresh")


def parser():
    """All flags.

    Those that NOT_SETTINGS does not name are settings: they change a run's results. A setting is
    recorded in config.json and in the default name, and a run does not resume with another value.
    """
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="python train.py [FLAGS] (--help lists them)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flag = p.add_argument
    # model
    flag("--stages", type=int, choices=range(1, 6), default=3, help="each halves the image")
    flag("--blocks", type=int, default=5, help="ordinary blocks a stage")
    flag("--filters", type=int, default=32, help="channels of every conv")
    flag("--bn", action="store_true", help="batch norm after every conv, not only the first")
    flag("--residual", action="store_true", help="add each block's input to its output")
    flag("--plain-reduction", action="store_true", help="--residual, but not where the map shrinks")
    flag("--act", choices=ACTIVATIONS, default="leaky_relu", help="activation, everywhere")
    flag("--init", choices=INITS, default="default", help="initial weights, see model.py")
    # training
    flag("--epochs", type=int, default=100, help="also the cosine's length")
    flag("--batch-size", type=int, default=100, help="a last partial batch is kept")
    flag("--lr", type=float, default=1e-3, help="learning rate of the first epoch")
    flag("--lr-min", type=float, default=2e-5, help="where the cosine ends")
    flag("--lr-scale", type=float, default=1.0, help="multiplies --lr and --lr-min")
    flag("--cosine", choices=["epochs", "batches"], default="epochs", help="the cosine's unit")
    flag("--wd", type=float, default=0.0, help="weight decay: L2 as in Adam, not AdamW")
    flag("--seed", type=int, default=0, help="of weights and batches, not of the split")
    flag("--no-augment", action="store_true", help="no random crops and flips")
    # data
    flag("--data", default="cifar100", help="cifar100, synthetic or FILE.npz")
    flag("--limit", type=int, default=None, help="only so many images of each part")
    flag("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="bf16 if native")
    # where and how
    flag("--data-dir", default="data", help="where CIFAR-100 is, or is downloaded to")
    flag("--out", type=Path, default="runs", help="folder of the runs")
    flag("--name", default=None, help="this run's folder in it; None: from the settings")
    flag("--device", choices=["auto", "cpu", "cuda"], default="auto", help="the GPU if it is there")
    how = p.add_mutually_exclusive_group().add_argument
    how("--no-graph", action="store_true", help="on a GPU: no CUDA graph, see capture()")
    how("--compile", action="store_true", help="on a GPU: fuse kernels first; needs Triton and gcc")
    flag("--fresh", action="store_true", help="start over instead of resuming")
    return p


def parse_args(argv=None):
    """All flags, and the settings among them as a dict. SystemExit, status 2, on a wrong one."""
    p = parser()
    args = p.parse_args(argv)
    at_least = {"blocks": 0, "filters": 1, "epochs": 1, "batch_size": 1, "limit": 1, "seed": 0}
    at_least |= {"lr": 0, "lr_min": 0, "lr_scale": 0, "wd": 0}
    for key, low in at_least.items():
        value = getattr(args, key)
        if value is not None and not low <= value < math.inf:  # false for nan, too
            p.error(f"--{key.replace('_', '-')} must be at least {low} and finite, not {value}")
    if args.data not in ("cifar100", "synthetic") and not args.data.endswith(".npz"):
        p.error(f"--data is cifar100, synthetic or a file ending in .npz, not {args.data}")
    settings = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}
    settings["data"] = Path(args.data).name  # the same file in another folder is the same data
    if not args.name:
        parts = [f"vgg{args.stages * (2 * args.blocks + 2) + 2:02}"]
        for key, value in settings.items():
            if value != p.get_default(key):  # so other settings have another folder
                parts.append(key if value is True else f"{key}={value}")
        args.name = "_".join(parts)
    return args, settings


def check_settings(run, old, settings):
    """SystemExit, status 2, if the run's old settings differ; one it lacks had its default."""
    p = parser()
    differing = []
    for key in settings | old:
        before = old.get(key, p.get_default(key))
        now = settings.get(key, "a setting that is no longer there")
        if before != now:
            differing.append(f"{key} {before}, not {now}")
    if differing:
        ways = "use that, another --name or --out, or --fresh"
        p.error(f"{run} was made with {'; '.join(differing)}: {ways}")


def main(argv=None):
    # ---- set-up
    argv = sys.argv[1:] if argv is None else argv
    args, settings = parse_args(argv)
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if (args.device == "cuda" or args.compile) and not cuda:
        parser().error("--device cuda and --compile need a GPU that PyTorch sees")
    device = torch.device("cuda" if cuda else "cpu")
    if cuda:
        torch.backends.cudnn.deterministic = True  # the same seed gives the same bits
        torch.backends.cudnn.allow_tf32 = False  # fp32 is to mean float32
        hardware = torch.cuda.get_device_name()
        native_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        torch.set_flush_denormal(True)  # with weights below 1e-38 a step takes three times longer
        if sys.platform == "linux":  # a step's memory is kept for the next, not fetched anew
            mallopt = ctypes.CDLL(None).mallopt  # the C library's
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: what is freed is not given back,
            mallopt(-4, 0)  # M_MMAP_MAX: nor is a large tensor's memory
        cpu = {}
        if hasattr(torch.cpu, "get_capabilities"):  # newer than PyTorch 2.6
            cpu = torch.cpu.get_capabilities()
        hardware = f"{cpu.get('cpu_name', 'CPU')} (threads: {torch.get_num_threads()})"
        native_bf16 = cpu.get("avx512_bf16", False)
    if args.precision == "auto":
        settings["precision"] = "bf16" if native_bf16 else "fp32"
    bf16 = settings["precision"] == "bf16"
    # bf16 has float32's exponents: even a gradient of 1e-30 needs no loss scaling.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)

    # ---- the run's folder
    run = args.out / args.name
    code, commit = code_version()
    lock = FileLock(run / ".lock", is_singleton=True)  # held until the program ends
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        sys.exit(f"train.py: another process trains {run}: wait, or use another --name")
    except OSError as error:
        sys.exit(f"train.py: {run} cannot be written ({error.strerror}): use another --out")
    if (run / "config.json").exists() and not args.fresh:
        config = json.loads((run / "config.json").read_text())
        check_settings(run, config["settings"], settings)
        if config["code"] != code:
            print(f"{args.name}: note: begun by another model.py or train.py (--fresh starts over)")
        if (run / "result.json").exists():
            result = json.loads((run / "result.json").read_text())
            print(f"{args.name}: {summary(result)}; see {run}")
            return

    # ---- data: all images live on the device, as tensors of bytes
    parts = load_data(args.data, args.data_dir)
    classes = 1 + max(labels.max().item() for _, labels in parts)
    parts = [(x[: args.limit].to(device), y[: args.limit].to(device)) for x, y in parts]
    (images, labels), val, test = parts
    padded = F.pad(images, [4] * 4)  # before normalising, so that the padding is black
    n = len(images)
    steps_per_epoch = math.ceil(n / args.batch_size)

    # ---- model
    torch.manual_seed(args.seed)
    model = VGG(
        args.stages, args.blocks, args.filters, classes, args.act, args.init,
        bn=args.bn, residual=args.residual, plain_reduction=args.plain_reduction,
    )
    model = model.to(device, memory_format=torch.channels_last)
    layers = model.weight_layers()
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.Adam(
        model.parameters(), lr=args.lr, weight_decay=args.wd, fused=True
    )

    # ---- start, or resume from last.pt, which holds `state`
    if args.fresh:  # only now, when the data and the model are there
        for file in ("last.pt", "result.json", "config.json", "log.csv", "grads.csv", "best.pt"):
            (run / file).unlink(missing_ok=True)
    state = {"log": [], "grads": [], "made_by": [], "best": None, "best_model": None}
    if (run / "last.pt").exists():
        try:
            state |= torch.load(run / "last.pt", map_location=device, weights_only=True)
        except (EOFError, OSError, RuntimeError, pickle.UnpicklingError):
            sys.exit(f"train.py: {run}/last.pt is broken: start over with --fresh")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    log, grads = state["log"], state["grads"]
    maker = f"{hardware}, {settings['precision']}, torch {torch.__version__}, {commit} {code}"
    if maker not in state["made_by"]:  # several if a run resumed elsewhere, or edited
        state["made_by"].append(maker)
    config = {
        "name": args.name, "layers": model.num_layers, "parameters": parameters,
        "command": shlex.join(["python", "train.py", *argv]),
        "code": code, "settings": settings, "steps_per_epoch": steps_per_epoch,
        "made_by": state["made_by"],
    }
    write(run / "config.json", json.dumps(config, indent=1) + "\n")
    print(f"{args.name}: {model.num_layers} layers, {parameters:,} parameters, {classes} classes")
    print(f"{args.name}: " + "  ".join(f"{key} {value}" for key, value in settings.items()))
    sizes = f"{n:,} training, {len(val[1]):,} validation, {len(test[1]):,} test images"
    print(f"{args.name}: {sizes}; {steps_per_epoch} steps an epoch; {maker}")
    print(f"{args.name}: {len(log)} of {args.epochs} epochs done")

    # ---- step
    def forward_backward(x, y):
        """A batch's loss and accuracy in %, a (2,) tensor; its gradients replace those in .grad."""
        optimizer.zero_grad(set_to_none=False)  # a graph writes to the same memory every time
        with autocast:
            logits = model(x).float()
        loss = F.cross_entropy(logits, y)
        loss.backward()
        accuracy = 100 * (logits.argmax(1) == y).float().mean()
        return torch.stack([loss.detach(), accuracy])

    step = forward_backward
    if cuda and not args.no_graph:
        if args.compile:
            torch._dynamo.config.recompile_limit = 64  # one for each kind of block and map size
            for block in model.blocks:
                block.compile(dynamic=False)
        before = copy.deepcopy(model.state_dict())
        x, y = normalise(images[: args.batch_size]), labels[: args.batch_size]
        step = capture(forward_backward, x, y, optimizer)
        model.load_state_dict(before)  # capturing moved batch norm's running averages
        if args.compile:  # evaluation and a smaller last batch run uncompiled
            torch.compiler.set_stance("force_eager")

    # ---- loop
    lr_max, lr_min = args.lr * args.lr_scale, args.lr_min * args.lr_scale
    for epoch in range(len(log), args.epochs):
        if diverged(log):
            break
        start = time.perf_counter()
        # Seeded anew in every epoch, so that a resumed run draws what it would have drawn.
        torch.manual_seed(args.seed * 1_000_003 + epoch)
        plans = draw(n, device)
        if args.no_augment:
            plans[1:3] = 4  # the middle crop,
            plans[3] = 0  # not mirrored
        totals = torch.zeros(2, device=device)  # of the steps' losses and accuracies
        title = f"{args.name}: epoch {epoch + 1:3}/{args.epochs}"
        for i, plan in enumerate(progress(plans.split(args.batch_size, dim=1), title)):
            # The paper's cosine counts epochs. The coursework's framework has since 2023 counted
            # mini-batches with the same period, so that the rate swings and never comes down.
            t = epoch if args.cosine == "epochs" else epoch * steps_per_epoch + i
            lr = cosine_lr(t, args.epochs, lr_max, lr_min)
            for group in optimizer.param_groups:
                group["lr"] = lr
            x, y = normalise(augment(padded, plan)), labels[plan[0]]
            totals += step(x, y)  # on the device: nothing waits for it
            optimizer.step()

        flow = torch.stack([layer.weight.grad.abs().mean() for layer in layers.values()]).tolist()
        rate = steps_per_epoch / (time.perf_counter() - start)  # tolist() has waited for the device
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)  # clips nothing
        train_loss, train_acc = (totals / steps_per_epoch).tolist()
        val_loss, val_acc = evaluate(model, *val, autocast).tolist()
        row = {
            "lr": lr, "train_loss": train_loss, "train_acc": train_acc,
            "val_loss": val_loss, "val_acc": val_acc, "grad_norm": norm,
            "seconds": time.perf_counter() - start, "steps_per_s": rate,
        }  # floats, because last.pt and result.json cannot hold what np.mean, say, returns
        log.append({"epoch": epoch + 1} | {key: float(value) for key, value in row.items()})
        grads.append({"epoch": epoch + 1} | dict(zip(layers, flow)))
        if not diverged(log) and (state["best"] is None or val_acc > state["best"]["val_acc"]):
            state["best"] = log[-1]
            state["best_model"] = copy.deepcopy(model.state_dict())
            write(run / "best.pt", state["best_model"])
        write(run / "log.csv", csv_text(log))
        write(run / "grads.csv", csv_text(grads))
        # After the others, because a run resumes from it: a kill before it repeats this epoch.
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        write(run / "last.pt", state)
        left = log[-1]["seconds"] * (args.epochs - epoch - 1) / 60
        print(
            f"{title}  lr {lr:.1e}  train {train_loss:.3f} {train_acc:5.2f} %  "
            f"val {val_loss:.3f} {val_acc:5.2f} %  |grad| {norm:.1e}  "
            f"{rate:.1f} steps/s  {left:.0f} min left"
        )

    # ---- result: the test set, once, with the weights of the best validation accuracy
    test_loss = test_acc = math.nan
    if state["best"]:
        model.load_state_dict(state["best_model"])
        test_loss, test_acc = evaluate(model, *test, autocast).tolist()
    result = {
        "name": args.name, "layers": model.num_layers, "parameters": parameters,
        "epochs": len(log), "diverged": diverged(log), "final": log[-1], "best": state["best"],
        "test_loss": test_loss, "test_acc": test_acc, "made_by": state["made_by"],
    }
    # JSON has no NaN: it becomes null.
    result = json.loads(json.dumps(result), parse_constant=lambda name: None)
    write(run / "result.json", json.dumps(result, indent=1) + "\n")
    print(f"{args.name}: {summary(result)}; see {run}")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # in a file, too, an epoch's line comes at once
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's kill is a Ctrl-C
    try:
        main()
    except KeyboardInterrupt:
        print(f"\ntrain.py: interrupted; {RESUMES}", file=sys.stderr)
        sys.exit(130)
