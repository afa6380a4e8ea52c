"""Train one VGG and log its gradients: `python train.py --blocks 10 --bn --residual --wd 1e-3`.

Top to bottom: data, augmentation, schedule, evaluation, files, flags, then main(): set-up, data,
model, step, loop, result. A run writes runs/NAME/{config.json,log.csv,grads.csv,best.pt,last.pt,
result.json}; the same command goes on from last.pt.
"""
import argparse
import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout

from model import ACTIVATIONS, INITS, VGG

MEAN = (0.4914, 0.4822, 0.4465)  # CIFAR-10's, as in the paper's framework
STD = (0.2023, 0.1994, 0.2010)
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
NO_SETTINGS = ("data_dir", "out", "name", "device", "no_graph", "fresh")  # where and how a run runs


def split_indices(n):
    """Training (95 %) and validation indices of n images, for any seed; of 50,000 the paper's."""
    train = np.random.RandomState(0).choice(n, n - n // 20, replace=False)
    return train, np.setdiff1d(np.arange(n), train)


def synthetic(n_train=10_000, n_test=2_000, classes=100):
    """The four ARRAYS of a stand-in made on the spot: one coarse picture a class, under noise."""
    rng = np.random.RandomState(0)
    pictures = rng.uniform(-1, 1, (classes, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    labels = rng.randint(classes, size=n_train + n_test)
    noise = rng.normal(0, 40, (len(labels), 32, 32, 3))
    images = (128 + 40 * pictures[labels] + noise).clip(0, 255).astype(np.uint8)
    return images[:n_train], labels[:n_train], images[n_train:], labels[n_train:]


def cifar100(data_dir):
    """CIFAR-100's four ARRAYS, downloaded to data_dir if they are not there. SystemExit if not."""
    advice = "bring it as --data FILE.npz, or use --data synthetic"
    with exit_with(f"no CIFAR-100 in {data_dir}/ and no download; {advice}"):
        from torchvision.datasets import CIFAR100  # an import of seconds, which only this needs
        try:
            CIFAR100(data_dir, train=False)
        except RuntimeError:  # not there, or not whole: one process downloads, others wait for it
            Path(data_dir).mkdir(parents=True, exist_ok=True)
            with FileLock(f"{data_dir}/download.lock"):
                CIFAR100(data_dir, download=True)
        train, test = CIFAR100(data_dir), CIFAR100(data_dir, train=False)
    return train.data, train.targets, test.data, test.targets


def as_tensors(images, labels):
    """(N, 32, 32, 3) uint8, (N,) integers -> (N, 3, 32, 32) uint8, (N,) int64; or ValueError."""
    labels = np.asarray(labels)
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
        raise ValueError(f"images are {images.dtype} {images.shape}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError(f"labels are {labels.dtype} {labels.shape}, images {images.shape}")
    if labels.min() < 0 or labels.max() >= 100_000:
        raise ValueError(f"labels go from {labels.min()} to {labels.max()}")
    images = torch.from_numpy(images).permute(0, 3, 1, 2)  # a view: channels_last already
    return images, torch.from_numpy(labels.astype(np.int64))


def load_data(source, data_dir="data"):
    """[(images, labels) of training, validation, test], uint8 (N, 3, 32, 32) and int64 (N,).

    source: "cifar100" (downloaded to data_dir if need be), "synthetic" or a .npz. SystemExit with
    one line on failure.
    """
    must = f"it must hold {', '.join(ARRAYS)}: images (N, 32, 32, 3) uint8, labels (N,) from 0"
    with exit_with(f"{source} cannot be used; {must}"):
        if source == "synthetic":
            arrays = synthetic()
        elif source == "cifar100":
            arrays = cifar100(data_dir)
        else:
            with np.load(source) as file:
                arrays = [file[key] for key in ARRAYS]
        images, labels = as_tensors(*arrays[:2])
        test = as_tensors(*arrays[2:])
        if len(images) < 20:
            raise ValueError("fewer than 20 training images: none to hold out")
    kept, held_out = split_indices(len(images))
    return [(images[kept], labels[kept]), (images[held_out], labels[held_out]), test]


@functools.cache  # nothing may be copied from the host in a step that cuda_graph() records
def per_channel(values, device):
    """Three numbers as a (3, 1, 1) tensor."""
    return torch.tensor(values, device=device)[:, None, None]


def normalise(images):
    """uint8 (N, 3, 32, 32) -> float32, channels_last: (x / 255 - mean) / std."""
    mean = per_channel(MEAN, images.device)
    std = per_channel(STD, images.device)
    return ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def draw(n, generator):
    """An epoch's augmentation, (4, n) int64: shuffled order, crop row and column (0 to 8), flip."""
    options = {"generator": generator, "device": generator.device}
    order = torch.randperm(n, **options)
    row = torch.randint(9, (n,), **options)
    column = torch.randint(9, (n,), **options)
    flip = torch.randint(2, (n,), **options)
    return torch.stack([order, row, column, flip])


def augment(padded, plan):
    """Random crops, half of them mirrored.

    padded: uint8 (N, 3, 40, 40); plan: (4, B), columns of draw() -> uint8 (B, 3, 32, 32).
    """
    order, row, column, flip = plan
    crops = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # (N, 3, 9, 9, 32, 32), a view
    images = crops[order, :, row, column]  # (B, 3, 32, 32)
    flip = flip.bool()[:, None, None, None]  # (B, 1, 1, 1)
    return torch.where(flip, images.flip(3), images)


def cosine_lr(epoch, epochs, lr_max, lr_min):
    """Learning rate of `epoch` (from 0): constant in it, and the last is still above lr_min."""
    return lr_min + (lr_max - lr_min) * (1 + math.cos(math.pi * epoch / epochs)) / 2


@torch.no_grad()
def evaluate(model, images, labels, autocast):
    """Mean cross-entropy and accuracy in %, a (2,) tensor; the model is in training mode after."""
    model.eval()
    total = torch.zeros(2, device=images.device)
    for x, y in zip(images.split(500), labels.split(500)):
        with autocast:
            logits = model(normalise(x)).float()
        loss = F.cross_entropy(logits, y, reduction="sum")
        total += torch.stack([loss, 100 * (logits.argmax(1) == y).sum()])
    model.train()
    return total / len(labels)


def cuda_graph(step, batch_size, device):
    """`step` recorded as a CUDA graph and replayed: one launch instead of some 700 (--no-graph).

    A replay repeats the recorded kernels on the same memory. So Python numbers and ifs in `step`
    are frozen as they were when it was recorded, while tensors changed in place are seen (the
    learning rate); and it can neither copy from the host nor wait for the device.
    """
    batch = torch.empty(4, batch_size, dtype=torch.int64, device=device)
    graph = torch.cuda.CUDAGraph()
    steps = 0

    def replay(plan):
        nonlocal steps
        if plan.shape[1] < batch_size:
            return step(plan)
        steps += 1
        if steps <= 3:  # PyTorch allocates and chooses in the first steps what is then recorded
            return step(plan)
        if steps == 4:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                step(batch)
        batch.copy_(plan)
        graph.replay()

    return replay


def live(batches, title):
    """The batches; on a terminal, a line that the next one overwrites says how far they are."""
    start = time.perf_counter()
    for i, batch in enumerate(batches, 1):
        yield batch
        if sys.stdout.isatty() and i % 10 == 0:
            rate = i / (time.perf_counter() - start)
            print(f"{title}  step {i}/{len(batches)}  {rate:.1f} steps/s", end="\r", flush=True)


@contextlib.contextmanager
def exit_with(line, errors=Exception):
    """End the program with one line and status 1 where the block fails."""
    try:
        yield
    except errors as error:
        reason = str(error).split("\n")[0][:200]
        sys.exit(f"train.py: {line} ({type(error).__name__}: {reason})")


def usage_error(message):
    """End the program with one line and status 2."""
    print(f"train.py: {message} (python train.py --help)", file=sys.stderr)
    sys.exit(2)


def write(path, content):
    """Replace a file whole: a kill leaves the old or the new. content: text, or for torch.save."""
    buffer = io.BytesIO()  # torch.save goes through memory: a full disk is then an OSError
    if isinstance(content, str):
        buffer.write(content.encode())
    else:
        torch.save(content, buffer)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def csv_text(rows):
    """Rows, dicts of numbers, as CSV with the columns of the last one."""
    lines = [",".join(rows[-1])]
    for row in rows:
        lines.append(",".join(f"{row.get(key, math.nan):.8g}" for key in rows[-1]))
    return "\n".join(lines) + "\n"


def code_version():
    """A hash of model.py and train.py, which tells any edit, and the commit ("" without git)."""
    here = Path(__file__).resolve().parent
    code = (here / "model.py").read_bytes() + (here / "train.py").read_bytes()
    commit = ""
    with contextlib.suppress(OSError):
        git = ["git", "-C", here, "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return hashlib.sha256(code).hexdigest()[:8], commit


def diverged(log):
    """True if the last row has a loss that is not finite."""
    return bool(log) and not math.isfinite(log[-1]["train_loss"] + log[-1]["val_loss"])


def summary(result):
    """result.json in one line."""
    length = f"{result['epochs']} epochs{', diverged' if result['diverged'] else ''}"
    best = f"{result['best']['val_acc']:.2f} % in epoch {result['best']['epoch']}"
    return f"{length}; best validation accuracy {best}, test {result['test_acc']:.2f} % there"


def at_least(low, kind=int):
    """An argparse type: a finite number."""

    def number(text):
        value = kind(text)
        if not low <= value < 2**40:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {2**40}")
        return value

    return number


def parse_args(argv=None):
    """All flags, and those of them that a run's figures depend on: its settings, a dict.

    A new flag is a setting, unless NO_SETTINGS names it: it goes into config.json and the default
    name, and a run does not go on with another value. Wrong flags end in one line and status 2.
    """
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.error = usage_error
    flag = p.add_argument
    # model
    flag("--stages", type=int, choices=range(1, 6), default=3, help="each halves the image")
    flag("--blocks", type=at_least(0), default=5, help="ordinary blocks a stage")
    flag("--filters", type=at_least(1), default=32, help="channels of every conv")
    flag("--bn", action="store_true", help="batch norm after every conv, not only the first")
    flag("--residual", action="store_true", help="add each block's input to its output")
    flag("--plain-reduction", action="store_true", help="--residual, but not where the map shrinks")
    flag("--act", choices=ACTIVATIONS, default="leaky_relu", help="everywhere")
    flag("--init", choices=INITS, default="default", help="of the convs (see model.py)")
    # training
    flag("--epochs", type=at_least(1), default=100, help="also the cosine's length")
    flag("--batch-size", type=at_least(1), default=100, help="a last partial batch is kept")
    flag("--lr", type=at_least(0, float), default=1e-3, help="of the first epoch")
    flag("--lr-min", type=at_least(0, float), default=2e-5, help="what the cosine goes down to")
    flag("--lr-scale", type=at_least(0, float), default=1.0, help="multiplies both")
    flag("--wd", type=at_least(0, float), default=0.0, help="Adam's weight decay: L2, coupled")
    flag("--seed", type=at_least(0), default=0, help="of weights and batches, not of the split")
    flag("--no-augment", action="store_true", help="no random crops and flips")
    # data
    flag("--data", default="cifar100", help="cifar100, synthetic or FILE.npz")
    flag("--limit", type=at_least(1), default=None, help="only so many images of each part")
    flag("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="bf16 if native")
    # where and how
    flag("--data-dir", default="data", help="where CIFAR-100 is, or is downloaded to")
    flag("--out", type=Path, default="runs", help="folder of the runs")
    flag("--name", default=None, help="this run's folder in it (default: from the settings)")
    flag("--device", choices=["auto", "cpu", "cuda"], default="auto", help="the GPU if it is there")
    flag("--no-graph", action="store_true", help="on a GPU: launch a step's kernels one by one")
    flag("--fresh", action="store_true", help="start over instead of going on")
    args = p.parse_args(argv)
    if args.data not in ("cifar100", "synthetic") and not args.data.endswith(".npz"):
        usage_error(f"--data is cifar100, synthetic or a file ending in .npz, not {args.data}")
    settings = {key: value for key, value in vars(args).items() if key not in NO_SETTINGS}
    if not args.name:
        parts = [f"vgg{args.stages * (2 * args.blocks + 2) + 2:02}"]
        for key, value in settings.items():
            if value != p.get_default(key):  # so other settings have another folder
                parts.append(key if value is True else f"{key}={value}")
        args.name = "_".join(parts).replace("/", "-")
    if args.name != Path(args.name).name or args.name == "..":
        usage_error(f"--name is a folder's name without slashes, not {args.name}; see --out")
    return args, settings


def check_settings(run, old, settings):
    """Usage error if the run's old settings are others; one that they lack had its default."""
    _, defaults = parse_args([])
    for key, value in settings.items():
        before = old.get(key, defaults[key])
        if before != value:
            ways = "use that, another --name or --out, or --fresh"
            usage_error(f"{run} was made with {key} {before}, not {value}: {ways}")


def main(argv=None):
    # ---- set-up
    args, settings = parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        usage_error("--device cuda: PyTorch sees no GPU; use --device cpu")
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if cuda:
        torch.cuda.set_stream(torch.cuda.Stream())  # cuda_graph() cannot use the default stream
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # fp32 is to mean float32
        hardware = torch.cuda.get_device_name()
        native_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        torch.set_flush_denormal(True)  # weights that decayed below 1e-38 are three times slower
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # newer than PyTorch 2.6
        hardware = f"{cpu.get('cpu_name', 'CPU')} (threads: {torch.get_num_threads()})"
        native_bf16 = cpu.get("avx512_bf16", False)
    if args.precision == "auto":
        settings["precision"] = "bf16" if native_bf16 else "fp32"
    bf16 = settings["precision"] == "bf16"
    # bf16 has float32's exponents: even a gradient of 1e-30 needs no loss scaling
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)

    # ---- what the run's folder has
    run = args.out / args.name
    code, commit = code_version()
    unreadable = f"{run} cannot be read: move it away, or start over with --fresh"
    if not args.fresh and (run / "config.json").exists():
        with exit_with(unreadable):
            config = json.loads((run / "config.json").read_text())
            check_settings(run, config["settings"], settings)
            if config.get("code", code) != code:
                print(f"note: {run} was begun by another model.py or train.py (or --fresh)")
            if (run / "result.json").exists():
                result = json.loads((run / "result.json").read_text())
                return print(f"{run} is finished: {summary(result)}")

    # ---- data
    parts = load_data(args.data, args.data_dir)
    classes = 1 + max(labels.max().item() for _, labels in parts)
    parts = [(x[: args.limit].to(device), y[: args.limit].to(device)) for x, y in parts]
    (images, labels), val, test = parts
    padded = F.pad(images, [4] * 4)  # before images are normalised: padding is black
    n = len(images)
    if args.bn and args.stages == 5 and (n - 1) % args.batch_size == 0:
        usage_error("batch norm on a 1 x 1 map cannot train on a last batch of 1: see --batch-size")
    steps = math.ceil(n / args.batch_size)

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
        model.parameters(),
        lr=torch.tensor(args.lr, device=device),  # a tensor, for cuda_graph() to see it change
        weight_decay=args.wd,
        fused=True,
        capturable=cuda,
    )

    # ---- start, or go on from last.pt
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / ".lock", is_singleton=True)  # until the program ends
    with exit_with(f"another process trains {run}: wait, or use another --name", Timeout):
        lock.acquire(timeout=0)
    log, grads, made_by, best, best_model = [], [], [], None, None
    if args.fresh:
        for file in ("last.pt", "result.json", "log.csv", "grads.csv", "best.pt"):
            (run / file).unlink(missing_ok=True)
    elif (run / "last.pt").exists():
        with exit_with(unreadable):
            state = torch.load(run / "last.pt", map_location=device, weights_only=True)
            check_settings(run, state["settings"], settings)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            optimizer.param_groups[0]["capturable"] = cuda  # it may come from another device
            log, grads, made_by = state["log"], state["grads"], state["made_by"]
            best, best_model = state["best"], state["best_model"]
    maker = f"{hardware}, {settings['precision']}, torch {torch.__version__}, {commit or code}"
    if maker not in made_by:  # more than one if a run goes on elsewhere
        made_by.append(maker)

    flags = sys.argv[1:] if argv is None else argv
    config = {
        "name": args.name, "command": shlex.join(["python", "train.py", *flags]), "code": code,
        "settings": settings, "layers": model.num_layers, "parameters": parameters,
        "steps_per_epoch": steps,
    }
    write(run / "config.json", json.dumps(config, indent=1) + "\n")
    print(f"{run}: {model.num_layers} layers, {parameters:,} parameters, {classes} classes")
    print("  ".join(f"{key} {value}" for key, value in settings.items()))
    sizes = f"{n:,} training, {len(val[1]):,} validation, {len(test[1]):,} test images"
    print(f"{sizes}; {steps} steps an epoch, {len(log)} epochs done; {maker}")

    # ---- step
    metrics = torch.zeros(2, device=device)  # sums of the steps' loss and accuracy in %

    def step(plan):
        """One step of Adam on the images of plan, columns (4, B) of draw()."""
        x, y = normalise(augment(padded, plan)), labels[plan[0]]
        optimizer.zero_grad()
        with autocast:
            logits = model(x).float()
        loss = F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        accuracy = 100 * (logits.argmax(1) == y).float().mean()
        metrics.add_(torch.stack([loss.detach(), accuracy]))

    if cuda and not args.no_graph:
        step = cuda_graph(step, min(args.batch_size, n), device)

    # ---- loop
    for epoch in range(len(log), args.epochs):
        if diverged(log):
            break
        start = time.perf_counter()
        lr = cosine_lr(epoch, args.epochs, args.lr * args.lr_scale, args.lr_min * args.lr_scale)
        for group in optimizer.param_groups:
            group["lr"].fill_(lr)
        # seeded by the epoch: a run that goes on needs no generator's state
        plans = draw(n, torch.Generator(device).manual_seed(args.seed * 1_000_003 + epoch))
        if args.no_augment:
            plans[1:] = torch.tensor([[4], [4], [0]])  # the middle crop, not mirrored
        metrics.zero_()
        title = f"epoch {epoch + 1:3}/{args.epochs}"
        for plan in live(plans.split(args.batch_size, dim=1), title):
            step(plan)

        flow = torch.stack([layer.weight.grad.abs().mean() for layer in layers.values()]).tolist()
        rate = steps / (time.perf_counter() - start)  # tolist() has waited for the device
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()  # clips nothing
        train_loss, train_acc = (metrics / steps).tolist()
        val_loss, val_acc = evaluate(model, *val, autocast).tolist()
        log.append({
            "epoch": epoch + 1, "lr": lr, "train_loss": train_loss, "train_acc": train_acc,
            "val_loss": val_loss, "val_acc": val_acc, "grad_norm": norm,
            "seconds": time.perf_counter() - start, "steps_per_s": rate,
        })
        grads.append({"epoch": epoch + 1, **dict(zip(layers, flow))})
        if best is None or val_acc > best["val_acc"]:
            best, best_model = log[-1], copy.deepcopy(model.state_dict())

        write(run / "log.csv", csv_text(log))
        write(run / "grads.csv", csv_text(grads))
        write(run / "best.pt", best_model)
        # last, and with all of the above: what a kill leaves ahead of it is made again
        write(run / "last.pt", {
            "settings": settings, "made_by": made_by, "log": log, "grads": grads,
            "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "best": best, "best_model": best_model,
        })
        left = log[-1]["seconds"] * (args.epochs - epoch - 1) / 60
        print(
            f"{title}  lr {lr:.1e}  train {train_loss:.3f} {train_acc:5.2f} %  "
            f"val {val_loss:.3f} {val_acc:5.2f} %  |grad| {norm:.1e}  "
            f"{rate:.1f} steps/s  {left:.0f} min left",
            flush=True,
        )

    # ---- result
    model.load_state_dict(best_model)
    test_loss, test_acc = evaluate(model, *test, autocast).tolist()
    result = {
        "name": args.name, "epochs": len(log), "diverged": diverged(log),
        "final": log[-1], "best": best, "test_loss": test_loss, "test_acc": test_acc,
        "parameters": parameters, "layers": model.num_layers, "made_by": made_by,
    }  # JSON has no NaN: it becomes null
    result = json.loads(json.dumps(result), parse_constant=lambda name: None)
    write(run / "result.json", json.dumps(result, indent=1) + "\n")
    print(f"{run} is finished: {summary(result)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's kill is a Ctrl-C
    goes_on = "the same command (without --fresh) goes on after the last whole epoch"
    try:
        main()
    except KeyboardInterrupt:
        print(f"\ninterrupted: {goes_on}", file=sys.stderr)
        sys.exit(130)
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise  # a fault; not a device that is out of memory
        with exit_with(f"stopped; with this mended, {goes_on}"):
            raise
