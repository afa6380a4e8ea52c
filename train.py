"""Train one VGG and log its gradients: `python train.py --blocks 10 --bn --residual --wd 1e-3`.

Reads top to bottom: data, augmentation, schedule, evaluation, files, flags, and main(), which has
the training loop. The same command resumes an interrupted run from runs/NAME/last.pt.
"""
import argparse
import copy
import functools
import io
import json
import math
import shlex
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout  # it comes with torch

from model import ACTIVATIONS, INITS, VGG

MEAN = (0.4914, 0.4822, 0.4465)  # CIFAR-10's, as in the paper's framework
STD = (0.2023, 0.1994, 0.2010)


# ---- data
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def split_indices(n):
    """Indices of the training (95 %) and validation images among n images.

    The split never depends on a run's seed. For the official archive's 50,000 it is the paper's.
    """
    train = np.random.RandomState(0).choice(n, n - max(1, n // 20), replace=False)
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
            print(f"train.py: no CIFAR-100 in {data_dir}/, so it is downloaded")
            Path(data_dir).mkdir(parents=True, exist_ok=True)
            with FileLock(f"{data_dir}/download.lock"):  # of several runs only one downloads
                test = CIFAR100(data_dir, train=False, download=True)  # brings both parts
        train = CIFAR100(data_dir)
    except (OSError, RuntimeError) as error:
        sys.exit(f"train.py: no CIFAR-100 in {data_dir}/, and no download ({error}); "
                 "put cifar-100-python.tar.gz there, or use --data FILE.npz or --data synthetic")
    return train.data, train.targets, test.data, test.targets


def load_data(source, data_dir="data"):
    """[(images, labels) of training, validation, test]: uint8 (N, 3, 32, 32) and int64 (N,).

    source: "cifar100", "synthetic" or a .npz file with the four ARRAYS: images uint8
    (N, 32, 32, 3), labels integers from 0. SystemExit if the file has something else.
    """
    if source == "synthetic":
        arrays = synthetic()
    elif source == "cifar100":
        arrays = cifar100(data_dir)
    else:
        try:
            file = np.load(source)
            arrays = [file[key] for key in ARRAYS]
        except Exception as error:  # numpy raises many kinds
            sys.exit(f"train.py: {source} is no .npz file with {ARRAYS} ({error})")
    parts = []
    for images, labels in (arrays[:2], arrays[2:]):
        labels = np.asarray(labels)
        good = images.dtype == np.uint8 and images.shape == (*labels.shape, 32, 32, 3)
        if not good or labels.dtype.kind not in "iu" or labels.min() < 0:
            sys.exit(f"train.py: {source} has {images.dtype} {images.shape} images and "
                     f"{labels.dtype} {labels.shape} labels, not uint8 (N, 32, 32, 3) and N "
                     "integers from 0")
        images = torch.from_numpy(images).permute(0, 3, 1, 2)  # a view
        parts.append((images, torch.from_numpy(labels.astype(np.int64))))
    (images, labels), test = parts
    kept, held_out = split_indices(len(images))
    return [(images[kept], labels[kept]), (images[held_out], labels[held_out]), test]


@functools.cache  # copied to the device once: a copy in every step would make the GPU wait
def per_channel(values, device):
    """Three numbers as a (3, 1, 1) tensor."""
    return torch.tensor(values, device=device)[:, None, None]


def normalise(images):
    """uint8 (N, 3, 32, 32) -> float32, channels_last: (x / 255 - mean) / std."""
    mean, std = per_channel(MEAN, images.device), per_channel(STD, images.device)
    return ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


# ---- augmentation
def draw_plan(n, device):
    """An epoch's augmentation, (4, n) int64: shuffled order, crop row and column (0 to 8), flip."""
    order = torch.randperm(n, device=device)
    row = torch.randint(9, (n,), device=device)
    column = torch.randint(9, (n,), device=device)
    flip = torch.randint(2, (n,), device=device)
    return torch.stack([order, row, column, flip])


def augment(padded, plan):
    """Random crops, half of them mirrored.

    padded: uint8 (N, 3, 40, 40); plan: (4, B), columns of draw_plan() -> uint8 (B, 3, 32, 32).
    """
    order, row, column, flip = plan
    height, width = padded.shape[2] - 8, padded.shape[3] - 8  # 32, but a fork may have others
    # Every 32 x 32 window of every image, (N, 3, 9, 9, 32, 32): a view, which takes no memory.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    images = windows[order, :, row, column]  # (B, 3, 32, 32)
    return torch.where(flip.bool()[:, None, None, None], images.flip(3), images)


# ---- schedule and evaluation
def cosine_lr(t, period, lr_max, lr_min):
    """Learning rate at time t (section 5): lr_max at 0, lr_min at period, then up again."""
    return lr_min + (lr_max - lr_min) * (1 + math.cos(math.pi * t / period)) / 2


@torch.no_grad()
def evaluate(model, images, labels, autocast):
    """Mean cross-entropy, and accuracy in %; leaves the model in training mode."""
    model.eval()
    total = torch.zeros(2, device=images.device)
    for x, y in zip(images.split(500), labels.split(500)):
        with autocast:
            logits = model(normalise(x)).float()
        loss = F.cross_entropy(logits, y, reduction="sum")
        total += torch.stack([loss, 100 * (logits.argmax(1) == y).sum()])
    model.train()
    return (total / len(labels)).tolist()


# ---- files
def write(path, content):
    """Replace a file as a whole, so that a kill leaves the old one or the new one, never a part."""
    temporary = path.with_name(f"{path.name}.tmp")
    if isinstance(content, str):
        temporary.write_text(content)
    else:
        buffer = io.BytesIO()  # torch.save does not say that a disk is full
        torch.save(content, buffer)
        temporary.write_bytes(buffer.getbuffer())
    temporary.replace(path)


def csv_text(rows):
    """Rows, dicts of numbers, as CSV; a row that lacks a column has nan there."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [",".join(columns)]
    for row in rows:
        lines.append(",".join(f"{row.get(key, math.nan):.8g}" for key in columns))
    return "\n".join(lines) + "\n"


# ---- flags
NOT_SETTINGS = ("data_dir", "out", "name", "device", "compile")  # where and how a run runs


def parse_args(argv=None):
    """All flags, and as a dict the settings among them. SystemExit, status 2, on a wrong one.

    Settings are the flags that change a run's results, all but NOT_SETTINGS. They stand in
    config.json and, where they are not the default, in the run's name; a run does not resume with
    other ones.
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
    flag("--plain-reduction", action="store_true", help="no skip where the map shrinks")
    flag("--act", choices=ACTIVATIONS, default="leaky_relu", help="activation, everywhere")
    flag("--init", choices=INITS, default="default", help="initial weights, see model.py")
    # training
    flag("--epochs", type=int, default=100, help="also the cosine's length")
    flag("--batch-size", type=int, default=100, help="the last one may be smaller")
    flag("--lr", type=float, default=1e-3, help="learning rate of the first epoch")
    flag("--lr-min", type=float, default=2e-5, help="where the cosine ends")
    flag("--lr-scale", type=float, default=1.0, help="multiplies --lr and --lr-min")
    flag("--cosine", choices=["epochs", "batches"], default="epochs", help="batches: it swings")
    flag("--wd", type=float, default=0.0, help="weight decay: L2 as in Adam, not AdamW")
    flag("--eps", type=float, default=1e-8, help="Adam's: gradients far below it move little")
    flag("--seed", type=int, default=0, help="of weights and batches, not of the split")
    flag("--no-augment", action="store_true", help="no random crops and flips")
    flag("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="bf16 where faster")
    # data
    flag("--data", default="cifar100", help="cifar100, synthetic or FILE.npz")
    flag("--limit", type=int, default=None, help="only the first so many images of each part")
    # where and how
    flag("--data-dir", default="data", help="where CIFAR-100 is, or is downloaded to")
    flag("--out", type=Path, default="runs", help="folder of the runs")
    flag("--name", default=None, help="this run's folder in it; None: from the settings")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    flag("--compile", action="store_true", help="torch.compile: faster on a GPU, after 30 s")
    args = p.parse_args(argv)
    at_least = {"blocks": 0, "filters": 1, "epochs": 1, "batch_size": 1, "seed": 0, "limit": 1}
    for key, low in at_least.items():
        value = getattr(args, key)
        if value is not None and value < low:
            p.error(f"--{key.replace('_', '-')} must be at least {low}, not {value}")
    settings = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}
    settings["data"] = Path(args.data).name  # the same file in another folder is the same data
    words = [f"vgg{args.stages * (2 * args.blocks + 2) + 2:02}"]  # two convs a block
    for key, value in settings.items():
        if value != p.get_default(key):
            words.append(key if value is True else f"{key}={value}".replace("/", "-"))
    args.name = args.name or "_".join(words)
    return args, json.loads(json.dumps(settings, default=str))  # as config.json has them


def hardware(device):
    """The device's name, and whether bfloat16 is faster than float32 on it."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.cuda.get_device_name(device), native
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # newer than PyTorch 2.6
    name = cpu.get("cpu_name", "CPU")
    # Intel's without AMX have bf16 too, but train 1.4 to 1.7 times faster in float32.
    faster = cpu.get("avx512_bf16", False) and ("AMD" in name or cpu.get("amx_bf16", False))
    return f"{name} (threads: {torch.get_num_threads()})", faster


def main(argv=None):
    # ---- set-up
    argv = sys.argv[1:] if argv is None else argv
    args, settings = parse_args(argv)
    device = torch.device(args.device)
    torch.backends.cudnn.deterministic = True  # the same seed gives the same bits
    torch.backends.cudnn.allow_tf32 = False  # fp32 is to mean float32
    torch.set_flush_denormal(True)  # on a CPU a step with weights below 1e-38 takes 3 times longer
    machine, bf16_is_faster = hardware(device)
    if args.precision == "auto":
        args.precision = settings["precision"] = "bf16" if bf16_is_faster else "fp32"
    if args.data not in ("cifar100", "synthetic"):  # another file of the same name is other data
        if not Path(args.data).is_file():
            sys.exit(f"train.py: --data is cifar100, synthetic or FILE.npz; no file {args.data}")
        settings["data_checksum"] = zlib.crc32(Path(args.data).read_bytes())
    # bf16 has float32's exponents: even a gradient of 1e-30 needs no loss scaling. No cache:
    # an interrupted notebook cell can leave old weights in it.
    bf16 = args.precision == "bf16"
    autocast = torch.autocast(device.type, torch.bfloat16, bf16, cache_enabled=False)

    # ---- the run's folder
    run = args.out / args.name
    # Beside the folder, which may be deleted; a singleton, so that a notebook can call main() again
    lock = FileLock(run.with_name(f".{run.name}.lock"), is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        sys.exit(f"train.py: another process (or notebook) has {run}: wait, or use another --name")
    run.mkdir(exist_ok=True)  # FileLock has made the folders above it
    if (run / "config.json").exists():
        was = json.loads((run / "config.json").read_text())["settings"]
        was = parse_args([])[1] | was  # flags newer than the run had their default
        changed = [f"{key} {was[key]}" for key in was if was[key] != settings.get(key)]
        if changed:
            sys.exit(f"train.py: {run} was made with {', '.join(changed)}: use that with --name "
                     f"{args.name}, another --name or --out, or delete it")
    elif (run / "last.pt").exists() or (run / "result.json").exists():
        sys.exit(f"train.py: {run} has no config.json, its settings: delete it")
    if (run / "result.json").exists():
        print(f"{args.name}: finished before; see {run}, or delete it to start over")
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
    optimizer = torch.optim.Adam(model.parameters(), args.lr, eps=args.eps, weight_decay=args.wd,
                                 fused=True)
    # The compiled network shares the weights of `model`, which evaluate() uses as it is.
    forward = torch.compile(model, mode="reduce-overhead", dynamic=False) if args.compile else model

    # ---- start, or resume from last.pt, which holds `state`
    state = {"log": [], "grads": [], "made_by": [], "best": None}
    if (run / "last.pt").exists():
        state |= torch.load(run / "last.pt", map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    log, grads = state["log"], state["grads"]
    maker = f"{machine}, {args.precision}, torch {torch.__version__}"
    if args.compile:
        maker += ", compiled"
    elif device.type == "cuda":
        print(f"{args.name}: --compile is faster (4 times on an H100), after half a minute")
    if maker not in state["made_by"]:  # several if a run resumed elsewhere
        state["made_by"].append(maker)
    config = {
        "name": args.name, "started": time.ctime(), "classes": classes, "layers": model.num_layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "command": shlex.join(["python", Path(__file__).name, *argv]),
        "settings": settings, "steps_per_epoch": steps_per_epoch, "made_by": state["made_by"],
    }
    write(run / "config.json", json.dumps(config, indent=1) + "\n")
    print(f"{args.name}: {config['layers']} layers, {config['parameters']:,} parameters; "
          f"{n:,} training, {len(val[1]):,} validation, {len(test[1]):,} test images of {classes} "
          f"classes; {maker}; {len(log)} epochs done", flush=True)

    # ---- loop
    lr_max, lr_min = args.lr * args.lr_scale, args.lr_min * args.lr_scale
    for epoch in range(len(log), args.epochs):
        if log and not math.isfinite(log[-1]["train_loss"] + log[-1]["val_loss"]):
            print(f"{args.name}: diverged")
            break
        start = time.perf_counter()
        # Seeded anew in every epoch, so that a resumed run draws what it would have drawn.
        torch.manual_seed(args.seed * 1_000_003 + epoch)
        np.random.seed([args.seed, epoch])  # for forks that draw with np.random
        plans = draw_plan(n, device)
        if args.no_augment:
            plans[1:3] = 4  # the middle crop,
            plans[3] = 0  # not mirrored
        steps = []  # their losses and accuracies, on the device: no step waits for them
        for i, plan in enumerate(plans.split(args.batch_size, dim=1)):
            # Counted in mini-batches, as by the coursework since 2023, the rate swings to the end.
            t = epoch if args.cosine == "epochs" else epoch * steps_per_epoch + i
            lr = cosine_lr(t, args.epochs, lr_max, lr_min)
            for group in optimizer.param_groups:
                group["lr"] = lr
            true = labels[plan[0]]  # for the accuracy, whatever a fork makes of y
            x, y = normalise(augment(padded, plan)), true
            optimizer.zero_grad()
            with autocast:
                logits = forward(x).float()
            loss = F.cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
            accuracy = 100 * (logits.argmax(1) == true).float().mean()
            steps.append(torch.stack([loss.detach(), accuracy]))
            if sys.stdout.isatty() and i % 10 == 0:
                step = f"{args.name}: epoch {epoch + 1}, step {i}/{steps_per_epoch}"
                print(step[-79:], end="\r", flush=True)

        train_loss, train_acc = torch.stack(steps).mean(0).tolist()  # this waits for the GPU
        steps_per_s = len(steps) / (time.perf_counter() - start)
        # The gradients of the epoch's last mini-batch, as in Figure 1; nan for a frozen layer.
        last = [layer.weight.grad for layer in layers.values()]
        flow = [math.nan if grad is None else grad.abs().mean().item() for grad in last]
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        grad_norm = torch.stack(norms).norm().item()
        val_loss, val_acc = evaluate(model, *val, autocast)
        row = {
            "lr": lr, "train_loss": train_loss, "train_acc": train_acc,
            "val_loss": val_loss, "val_acc": val_acc, "grad_norm": grad_norm,
            "seconds": time.perf_counter() - start, "steps_per_s": steps_per_s,
        }  # floats, because last.pt and result.json cannot hold what np.mean, say, returns
        log.append({"epoch": epoch + 1} | {key: float(value) for key, value in row.items()})
        grads.append({"epoch": epoch + 1} | dict(zip(layers, flow)))
        now = json.loads((run / "config.json").read_text())
        if now["started"] != config["started"]:  # the lock went with --out
            sys.exit(f"train.py: {run} was deleted, and another process trains there")
        finite = math.isfinite(train_loss + val_loss)
        if finite and (state["best"] is None or val_acc > state["best"]["val_acc"]):
            state |= {"best": log[-1], "best_model": copy.deepcopy(model.state_dict())}
            write(run / "best.pt", state["best_model"])
        write(run / "grads.csv", csv_text(grads))
        write(run / "log.csv", csv_text(log))  # what plot.py looks for
        # After the others, because a run resumes from it: a kill before it repeats this epoch.
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        write(run / "last.pt", state)
        left = log[-1]["seconds"] * (args.epochs - epoch - 1) / 60
        print(f"{args.name}: epoch {epoch + 1:3}/{args.epochs}  lr {lr:.1e}  "
              f"train {train_loss:.3f} {train_acc:5.2f} %  val {val_loss:.3f} {val_acc:5.2f} %  "
              f"first layer's |grad| {flow[0]:.1e}  {steps_per_s:.1f} steps/s  {left:.0f} min left",
              flush=True)

    # ---- result: the test set, once, with the weights of the best validation accuracy
    result = {"epochs": len(log), "best": state["best"], "test_loss": None, "test_acc": None}
    if state["best"]:
        model.load_state_dict(state["best_model"])
        result["test_loss"], result["test_acc"] = evaluate(model, *test, autocast)
        print(f"{args.name}: best validation accuracy {state['best']['val_acc']:.2f} % in epoch "
              f"{state['best']['epoch']}; test {result['test_acc']:.2f} %")
    write(run / "result.json", json.dumps(result, indent=1) + "\n")
    print(f"{args.name}: finished; see {run}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ntrain.py: interrupted; the same command resumes it")
