"""Train one VGG and log its gradients: `python train.py --stages 3 --blocks 10 --residual --bn --wd 1e-3`.

Top to bottom: data, learning rate, evaluation, files, flags, then main(): set-up, data, model, loop, result.
A run writes runs/NAME/{config.json,log.csv,grads.csv,best.pt,last.pt,result.json}; the same command goes on from last.pt.
"""
import argparse
import contextlib
import datetime
import functools
import io
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import VGG

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # CIFAR-10's, as in the paper's framework
ARRAYS = "train_images", "train_labels", "test_images", "test_labels"


def split_indices(n):
    """Training (95 %) and validation indices of n images, whatever the run's seed; for n = 50,000 the paper's split."""
    train = np.random.RandomState(0).choice(n, n - n // 20, replace=False)
    return train, np.setdiff1d(np.arange(n), train)


def synthetic(n_train=10_000, n_test=2_000, classes=100):
    """A learnable stand-in made from a fixed seed, the four ARRAYS: one coarse random picture a class, under heavy noise."""
    rng = np.random.RandomState(0)
    pictures = rng.uniform(-1, 1, (classes, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    labels = rng.randint(classes, size=n_train + n_test)
    images = (128 + 40 * pictures[labels] + rng.normal(0, 40, (len(labels), 32, 32, 3))).clip(0, 255).astype(np.uint8)
    return images[:n_train], labels[:n_train], images[n_train:], labels[n_train:]


def load_data(source, data_dir="data"):
    """[(images, labels) of training, validation, test], uint8 (N, 3, 32, 32) and int64 (N,).

    source: "cifar100" (downloaded to data_dir if it is not there), "synthetic" or a .npz. SystemExit with one line on failure.
    """
    if source == "synthetic":
        arrays = synthetic()
    elif source == "cifar100":
        with exit_with(f"no CIFAR-100 in {data_dir}/ and no download; bring it as --data FILE.npz, or use --data synthetic"):
            from torchvision.datasets import CIFAR100  # here, because the import takes seconds and only this needs it
            parts = [CIFAR100(data_dir, train=train, download=True) for train in (True, False)]
        arrays = [array for part in parts for array in (part.data, np.array(part.targets))]
    else:
        with exit_with(f"{source} cannot be used; it must hold {', '.join(ARRAYS)}: images (N, 32, 32, 3) uint8, labels (N,) from 0"):
            with np.load(source) as file:
                arrays = [file[key] for key in ARRAYS]
            for x, y in (arrays[:2], arrays[2:]):
                if (x.dtype, x.shape, y.shape) != (np.uint8, (len(x), 32, 32, 3), (len(x),)) or y.dtype.kind not in "iu" or min(y) < 0:
                    raise ValueError(f"found images {x.dtype} {x.shape} and labels {y.dtype} {y.shape}")
            if len(arrays[0]) < 20:
                raise ValueError("fewer than 20 training images: none to hold out")
    x, y, *test = [torch.from_numpy(array) for array in arrays]
    parts = [*((x[i], y[i]) for i in split_indices(len(x))), test]
    return [(x.permute(0, 3, 1, 2), y.long()) for x, y in parts]  # the permuted view is channels_last already


@functools.cache  # a step that is being captured may not copy from the host
def per_channel(values, device):
    """Three numbers as a (3, 1, 1) tensor."""
    return torch.tensor(values, device=device)[:, None, None]


def normalise(images):
    """uint8 (N, 3, 32, 32) -> float32, channels_last: (x / 255 - mean) / std."""
    images = (images / 255 - per_channel(MEAN, images.device)) / per_channel(STD, images.device)
    return images.contiguous(memory_format=torch.channels_last)


def draw(n, generator):
    """An epoch's augmentation, (4, n) int64: a shuffled order, then each image's crop row and column (0 to 8) and flip (0, 1)."""
    order = torch.randperm(n, generator=generator, device=generator.device)
    return torch.stack([order, *(torch.randint(k, (n,), generator=generator, device=generator.device) for k in (9, 9, 2))])


def augment(padded, plan):
    """Random crops, half of them mirrored: uint8 (N, 3, 40, 40) and columns (4, B) of draw() -> uint8 (B, 3, 32, 32)."""
    order, row, column, flip = plan
    images = padded.unfold(2, 32, 1).unfold(3, 32, 1)[order, :, row, column]  # a view of all 9 x 9 crops, then one gather
    return torch.where(flip.bool()[:, None, None, None], images.flip(3), images)


def cosine_lr(epoch, epochs, lr_max, lr_min):
    """Learning rate of `epoch` (from 0): it changes between epochs, not steps, and ends one epoch short of lr_min."""
    return lr_min + (lr_max - lr_min) * (1 + math.cos(math.pi * epoch / epochs)) / 2


@torch.no_grad()
def evaluate(model, images, labels, autocast):
    """Mean cross-entropy and accuracy in % over uint8 images, a (2,) tensor on their device. Leaves the model in training mode."""
    model.eval()
    total = torch.zeros(2, device=images.device)
    for x, y in zip(images.split(500), labels.split(500)):
        with autocast:
            logits = model(normalise(x)).float()
        total += torch.stack([F.cross_entropy(logits, y, reduction="sum"), 100 * (logits.argmax(1) == y).sum()])
    model.train()
    return total / len(labels)


@contextlib.contextmanager
def exit_with(line, errors=Exception):
    """End the program with one line and status 1 where the block fails."""
    try:
        yield
    except errors as error:
        sys.exit(f"train.py: {line} ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})")


def usage_error(message):
    """End the program with one line and status 2."""
    print(f"train.py: {message} (python train.py --help)", file=sys.stderr)
    sys.exit(2)


def write(path, content):
    """Replace a file whole, so that a run killed at any moment leaves the old one or the new. content: str, or what torch.save takes."""
    buffer, temporary = io.BytesIO(), path.with_name(f"{path.name}.{os.getpid()}.tmp")
    # torch.save goes through memory, so that a full disk is an OSError for every kind of file
    buffer.write(content.encode()) if isinstance(content, str) else torch.save(content, buffer)
    try:
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def csv_text(rows):
    """Rows (dicts of numbers with the same keys) as CSV."""
    return "\n".join([",".join(rows[0]), *(",".join(f"{value:.8g}" for value in row.values()) for row in rows), ""])


def number(kind, low, high=2**40):
    """An argparse type: an int or a float from low to high."""
    def parse(text):
        if not low <= (value := kind(text)) <= high:
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} from {low}" + f" to {high}" * (high < 2**40)  # argparse: "invalid int from 1 to 5 value: '6'"
    return parse


def parse_args(argv=None):
    """The flags, and of them the settings that a run's figures depend on. Wrong flags end in one line and status 2."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = usage_error
    # model
    p.add_argument("--stages", type=number(int, 1, 5), default=3, help="each halves the image")
    p.add_argument("--blocks", type=number(int, 0), default=5, help="ordinary blocks a stage, before its reduction block")
    p.add_argument("--filters", type=number(int, 1), default=32, help="channels of every conv")
    p.add_argument("--bn", action="store_true", help="batch norm after every conv, not only the first")
    p.add_argument("--residual", action="store_true", help="add each block's input to its output")
    p.add_argument("--act", choices=["leaky_relu", "sigmoid"], default="leaky_relu", help="everywhere")
    # training
    p.add_argument("--epochs", type=number(int, 1), default=100, help="also the cosine's length")
    p.add_argument("--batch-size", type=number(int, 1), default=100, help="a last partial batch is kept")
    p.add_argument("--lr", type=number(float, 0), default=1e-3, help="of the first epoch")
    p.add_argument("--lr-min", type=number(float, 0), default=2e-5, help="what the cosine goes down to")
    p.add_argument("--lr-scale", type=number(float, 0), default=1.0, help="multiplies both ends")
    p.add_argument("--wd", type=number(float, 0), default=0.0, help="weight decay, Adam's own (L2 in the gradient)")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of the weights and the batches, not of the split")
    p.add_argument("--no-augment", action="store_true", help="no random crops and flips")
    # data
    p.add_argument("--data", default="cifar100", help="cifar100, synthetic or FILE.npz")
    p.add_argument("--limit", type=number(int, 1), default=None, help="only so many training images, for a quick look")
    p.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 where it is native")
    settings = vars(p.parse_args([])).keys()
    # the run: nothing that changes its figures
    p.add_argument("--data-dir", default="data", help="where CIFAR-100 is, or is downloaded to")
    p.add_argument("--out", type=Path, default="runs", help="folder of the runs")
    p.add_argument("--name", default=None, help="folder of this run in it (default: made from the settings)")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU if there is one")
    p.add_argument("--no-graph", action="store_true", help="on a GPU: launch a step's kernels one by one, not as a CUDA graph")
    p.add_argument("--fresh", action="store_true", help="start over instead of going on")
    args = p.parse_args(argv)
    if args.data not in ("cifar100", "synthetic") and not args.data.endswith(".npz"):
        usage_error(f"--data is cifar100, synthetic or a file ending in .npz, not {args.data}")
    settings = {key: getattr(args, key) for key in settings}
    if args.name is None:  # every setting that is not the default, so that different settings never share a folder
        changed = [key if value is True else f"{key}={value}" for key, value in settings.items() if value != p.get_default(key)]
        args.name = re.sub(r"[^\w.+=-]+", "-", "_".join([f"vgg{args.stages * (2 * args.blocks + 2) + 2:02}", *changed]))
    if not re.fullmatch(r"(?!\.+$)[^/\\]+", args.name):
        usage_error(f"--name is one folder's name without slashes, not {args.name!r}; --out says where it goes")
    return args, settings


def main(argv=None):
    # ---- set-up
    args, settings = parse_args(argv)
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        usage_error("--device cuda: PyTorch sees no GPU; use --device cpu")
    device = torch.device("cuda" if cuda else "cpu")
    if cuda:
        torch.cuda.set_stream(torch.cuda.Stream())  # a CUDA graph cannot be captured on the default stream
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False  # fp32 is to mean float32
        hardware, native = torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        torch.set_flush_denormal(True)  # where weight decay beats the gradient, weights shrink below 1e-38: three times slower on a CPU
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        hardware, native = cpu.get("cpu_name", platform.machine()), cpu.get("avx512_bf16")
        hardware += f", {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    if args.precision == "auto":
        settings["precision"] = "bf16" if native else "fp32"
    # bf16 has float32's exponents: even a gradient of 1e-30 needs no loss scaling and is logged as it is
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings["precision"] == "bf16", cache_enabled=False)

    run, state = args.out / args.name, None
    if not args.fresh and any((run / file).exists() for file in ("config.json", "last.pt", "result.json")):
        with exit_with(f"{run} cannot be read: move it away, or start over with --fresh"):
            old = json.loads((run / "config.json").read_text())["settings"]
            result = json.loads((run / "result.json").read_text()) if (run / "result.json").exists() else None
            state = torch.load(run / "last.pt", map_location=device, weights_only=True) if (run / "last.pt").exists() else None
        for key, value in settings.items():
            if old.get(key) != value:
                usage_error(f"{run} was made with {key} {old.get(key)}, not {value}: use that, another --name or --out, or --fresh")
        if result:
            return print(f"{run} is finished: {summary(result)}")

    # ---- data
    train, val, test = load_data(args.data, args.data_dir)
    classes = 1 + max(labels.max().item() for _, labels in (train, val, test))
    n = args.limit or len(train[1])
    if n > len(train[1]):
        usage_error(f"--limit {n} is more than the {len(train[1])} training images of {args.data}")
    if args.bn and args.stages == 5 and n % args.batch_size == 1:
        usage_error("batch norm cannot train on a last batch of one image once the map is 1 x 1: use another --batch-size or --limit")
    steps = math.ceil(n / args.batch_size)
    images = F.pad(train[0][:n], [4] * 4).to(device)  # padded before it is normalised, so with black; the split's order is random
    labels, val, test = train[1].to(device), *([tensor.to(device) for tensor in part] for part in (val, test))

    # ---- model
    torch.manual_seed(args.seed)
    model = VGG(args.stages, args.blocks, args.filters, args.bn, args.residual, args.act, classes)
    model = model.to(device, memory_format=torch.channels_last)
    layers, parameters = model.weight_layers(), sum(p.numel() for p in model.parameters())
    # lr is a tensor on the device so that a captured step sees it change; capturable, likewise, is for CUDA graphs
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(args.lr, device=device), weight_decay=args.wd,
                                 fused=True, capturable=cuda)
    log, grads, best = [], [], None
    if state:
        with exit_with(f"{run}/last.pt cannot be read: move {run} away, or start over with --fresh"):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]})
            log, grads, best = state["log"], state["grads"], state["best"]
    else:
        run.mkdir(parents=True, exist_ok=True)
        for file in ("last.pt", "result.json", "config.json", "log.csv", "grads.csv", "best.pt"):
            (run / file).unlink(missing_ok=True)
        write(run / "config.json", json.dumps({
            "name": args.name, "command": shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)]),
            "settings": settings, "layers": model.num_layers, "parameters": parameters, "steps_per_epoch": steps}, indent=1) + "\n")
    print(f"{run}: {model.num_layers} layers ({args.stages} stages of {args.blocks} blocks{', batch norm' * args.bn}"
          f"{', residual' * args.residual}, {args.act}), {parameters:,} parameters")
    print(f"{args.data}: {n:,} training, {len(val[1]):,} validation, {len(test[1]):,} test images, {classes} classes")
    print(f"{hardware} ({device}), {settings['precision']}{' (--precision auto)' if args.precision == 'auto' else ''}, batch "
          f"{args.batch_size}, {args.epochs} epochs of {steps} steps" + (f"; going on after epoch {len(log)}" if log else ""))

    # ---- loop
    metrics = torch.zeros(2, device=device)  # sums of the mini-batches' losses and accuracies, fetched once an epoch

    def step(plan):
        """One step of Adam on the images of plan, columns (4, B) of draw()."""
        x, y = normalise(augment(images, plan)), labels[plan[0]]
        optimizer.zero_grad()
        with autocast:
            logits = model(x).float()
        loss = F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        metrics.add_(torch.stack([loss.detach(), 100 * (logits.argmax(1) == y).float().mean()]))

    graph, eager_steps, batch = None, 0, torch.empty(4, args.batch_size, dtype=torch.int64, device=device)
    live = sys.stdout.isatty()
    wipe = "\r\033[K" * live
    while len(log) < args.epochs and not (log and diverged(log[-1])):
        epoch, start, shown = len(log), time.perf_counter(), 0.0
        lr = cosine_lr(epoch, args.epochs, args.lr * args.lr_scale, args.lr_min * args.lr_scale)
        optimizer.param_groups[0]["lr"].fill_(lr)
        plans = draw(n, torch.Generator(device).manual_seed(args.seed * 1_000_003 + epoch))  # by epoch: going on needs no state
        if args.no_augment:
            plans[1:] = torch.tensor([[4], [4], [0]])  # the middle crop, not mirrored
        metrics.zero_()
        for i, plan in enumerate(plans.split(args.batch_size, dim=1), 1):
            if not cuda or args.no_graph or plan.shape[1] < args.batch_size or eager_steps < 3:
                step(plan)
                eager_steps += 1
            else:  # the whole step in one launch, after three eager ones as CUDA graphs need; a last partial batch stays eager
                if graph is None:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                        step(batch)
                batch.copy_(plan)
                graph.replay()
            if live and time.perf_counter() - shown > 0.2:
                shown = time.perf_counter()
                print(f"{wipe}epoch {epoch + 1:3}/{args.epochs}  step {i}/{steps}  {i / (shown - start):.1f} steps/s", end="", flush=True)
        flow = torch.stack([layer.weight.grad.abs().mean() for layer in layers.values()]).tolist()  # waits for the device
        seconds = time.perf_counter() - start
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
        (train_loss, train_acc), (val_loss, val_acc) = (metrics / steps).tolist(), evaluate(model, *val, autocast).tolist()
        log.append({"epoch": epoch + 1, "lr": lr, "train_loss": train_loss, "train_acc": train_acc, "val_loss": val_loss,
                    "val_acc": val_acc, "grad_norm": norm, "seconds": time.perf_counter() - start, "steps_per_s": steps / seconds})
        grads.append({"epoch": epoch + 1, **dict(zip(layers, flow))})
        if best is None or val_acc > best["val_acc"]:
            best = {**log[-1], "model": {key: tensor.clone() for key, tensor in model.state_dict().items()}}
        write(run / "log.csv", csv_text(log))
        write(run / "grads.csv", csv_text(grads))
        write(run / "best.pt", best["model"])
        # last, and with all of the above in it: what a kill leaves ahead of it is made and written again
        write(run / "last.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"], "log": log,
                                "grads": grads, "best": best})
        left = datetime.timedelta(seconds=round(log[-1]["seconds"] * (args.epochs - epoch - 1)))
        print(f"{wipe}epoch {epoch + 1:3}/{args.epochs}  lr {lr:.1e}  train {train_loss:.3f} {train_acc:5.2f} %  val {val_loss:.3f} "
              f"{val_acc:5.2f} %  |grad| {norm:.1e}  {steps / seconds:.1f} steps/s  {left} left", flush=True)

    # ---- result
    model.load_state_dict(best.pop("model"))
    test_loss, test_acc = evaluate(model, *test, autocast).tolist()
    result = {"name": args.name, "epochs": len(log), "diverged": diverged(log[-1]), "final": log[-1], "best": best,
              "test_loss": test_loss, "test_acc": test_acc, "parameters": parameters, "layers": model.num_layers,
              "device": f"{device} ({hardware})", "precision": settings["precision"], "seconds": sum(row["seconds"] for row in log),
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}
    text = re.sub(r"(?<=: )(NaN|-?Infinity)\b", "null", json.dumps(result, indent=1))  # JSON has neither
    write(run / "result.json", text + "\n")
    print(f"{run} is finished: {summary(json.loads(text))}")


def diverged(row):
    """True if a row of the log has a loss that is not finite."""
    return not math.isfinite(row["train_loss"] + row["val_loss"])


def summary(result):
    """result.json in one line."""
    best = result["best"]
    return (f"{'diverged after ' * result['diverged']}{result['epochs']} epochs, best validation accuracy {best['val_acc']:.2f} % in "
            f"epoch {best['epoch']}, there test accuracy {result['test_acc']:.2f} %, test loss {result['test_loss'] or math.nan:.3f}")


if __name__ == "__main__":
    advice = "stopped; what was written before is whole, and with this mended the same command goes on"
    try:
        with exit_with(advice, (OSError, MemoryError, torch.OutOfMemoryError)):
            main()
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on after the last whole epoch", file=sys.stderr)
        sys.exit(130)
