"""Train one VGG and log its gradients: `python train.py --stages 3 --blocks 10 --residual --bn --wd 1e-3`.

Top to bottom: helpers (data, learning rate, metrics, files), then main(): arguments, data, model, loop.
A run writes runs/NAME/{config.json,log.csv,grads.csv,last.pt,best.pt,result.json}; the same command goes on from last.pt.
"""
import argparse
import ctypes
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
    """Training and validation indices of n images, 95 % to 5 % and the same for every seed (the paper's split for n = 50,000)."""
    train = np.random.RandomState(0).choice(n, n - n // 20, replace=False)
    return train, np.setdiff1d(np.arange(n), train)


def synthetic(n_train=10_000, n_test=2_000, classes=100):
    """A learnable stand-in made from a fixed seed, the four ARRAYS: one blurry random image a class, under heavy noise."""
    rng = np.random.RandomState(0)
    prototypes = rng.uniform(-1, 1, (classes, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    labels = rng.randint(classes, size=n_train + n_test)
    images = 128 + 40 * prototypes[labels] + rng.normal(0, 40, (len(labels), 32, 32, 3))
    images = images.clip(0, 255).astype(np.uint8)
    return images[:n_train], labels[:n_train], images[n_train:], labels[n_train:]


def load_data(source, data_dir="data"):
    """[(images, labels) of train, validation, test], uint8 (N, 3, 32, 32) and int64 (N,). SystemExit with one line if it cannot."""
    if source == "synthetic":
        arrays = synthetic()
    elif source == "cifar100":
        try:
            from torchvision.datasets import CIFAR100  # here, because the import takes seconds and only this source needs it
            parts = [CIFAR100(data_dir, train=train, download=True) for train in (True, False)]
        except Exception as error:
            sys.exit(f"CIFAR-100 could not be downloaded to or read from {data_dir}/ ({brief(error)}). "
                     "Two ways on: --data FILE.npz with the data set in it, or --data synthetic")
        arrays = [a for part in parts for a in (part.data, np.array(part.targets))]
    else:
        try:
            with np.load(source) as file:
                arrays = [file[key] for key in ARRAYS]
            for x, y in (arrays[:2], arrays[2:]):
                if x.dtype != np.uint8 or x.shape != (len(x), 32, 32, 3) or y.dtype.kind not in "iu" or y.shape != (len(x),) or y.min() < 0:
                    raise ValueError(f"found images {x.dtype} {x.shape}, labels {y.dtype} {y.shape} from {y.min()}")
            if len(arrays[0]) < 20:
                raise ValueError("fewer than 20 training images")
        except Exception as error:
            sys.exit(f"{source} cannot be used ({brief(error)}). It must hold {', '.join(ARRAYS)}: "
                     "images (N, 32, 32, 3) uint8, labels (N,) integers from 0")
    x, y, *test = [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
    pairs = [*((x[i], y[i]) for i in split_indices(len(x))), test]
    return [(x.permute(0, 3, 1, 2), y.long()) for x, y in pairs]  # the permuted view is channels_last already


@functools.cache  # a step that is being captured may not copy from the host
def per_channel(values, device):
    """Three numbers as a (3, 1, 1) tensor."""
    return torch.tensor(values, device=device)[:, None, None]


def normalise(images):
    """uint8 (N, 3, 32, 32) -> float32, channels_last: (x / 255 - mean) / std."""
    mean, std = per_channel(MEAN, images.device), per_channel(STD, images.device)
    return ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def draw(n, generator):
    """An epoch's augmentation, (4, n) int64: a shuffled order, then each image's crop row and column (0 to 8) and flip (0 or 1)."""
    def uniform(high):
        return torch.randint(high, (n,), generator=generator, device=generator.device)
    order = torch.randperm(n, generator=generator, device=generator.device)
    return torch.stack([order, uniform(9), uniform(9), uniform(2)])


def augment(padded, plan):
    """A batch of random crops, half of them mirrored: uint8 (N, 3, 40, 40) and some columns (4, B) of draw() -> uint8 (B, 3, 32, 32)."""
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


def keep_freed_memory():
    """Have glibc keep freed activations. It returns them to the kernel otherwise, and every step faults them in again (README, Speed)."""
    if platform.libc_ver()[0] == "glibc":
        for option, value in ((-3, 2**25), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, 32 MiB is its maximum; M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)


def brief(error):
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200].rstrip(": ")


def write(path, data):
    """Replace a file whole, so that a run killed at any moment leaves the old one or the new one. data: bytes or str."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data if isinstance(data, bytes) else data.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def pack(state):
    """torch.save to bytes: through memory, so that a full disk is an OSError as for every other file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def csv_text(rows):
    """Rows (dicts with the same keys) as CSV."""
    lines = [rows[0].keys()] + [[f"{v:.8g}" for v in row.values()] for row in rows]
    return "".join(",".join(line) + "\n" for line in lines)


def clock(seconds):
    """1h02m, 3m04s or 5s."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02}m" if minutes >= 60 else f"{minutes}m{s:02}s" if minutes else f"{s}s"


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float from low to high."""
    def parse(text):
        x = kind(text)
        if not (low <= x <= high and math.isfinite(x)):
            raise ValueError
        return x
    parse.__name__ = f"{kind.__name__} from {low}" + (f" to {high}" if high < math.inf else "")  # argparse: "invalid int from 1 value"
    return parse


def parse_args(argv=None):
    """The flags, with the paper's settings as defaults. Usage errors end in one line and exit status 2."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: p.exit(2, f"train.py: {message} (see python train.py --help)\n")
    # model
    p.add_argument("--stages", type=number(int, 1, 5), default=3, help="each halves the image, 5 at most")
    p.add_argument("--blocks", type=number(int, 0), default=5, help="ordinary blocks a stage, before its reduction block")
    p.add_argument("--filters", type=number(int, 1), default=32)
    p.add_argument("--bn", action="store_true", help="batch norm after every conv, not only the first")
    p.add_argument("--residual", action="store_true")
    p.add_argument("--act", choices=["leaky_relu", "sigmoid"], default="leaky_relu")
    # training
    p.add_argument("--epochs", type=number(int, 1), default=100)
    p.add_argument("--batch-size", type=number(int, 1), default=100)
    p.add_argument("--lr", type=number(float, 0), default=1e-3, help="of the first epoch")
    p.add_argument("--lr-min", type=number(float, 0), default=2e-5, help="what the cosine goes down to")
    p.add_argument("--lr-scale", type=number(float, 0), default=1.0, help="multiplies both ends")
    p.add_argument("--wd", type=number(float, 0), default=0.0, help="weight decay, Adam's own (L2 in the gradient)")
    p.add_argument("--seed", type=number(int, 0, 2**40), default=0, help="of the weights and the batches, not of the split")
    p.add_argument("--no-augment", action="store_true", help="no random crops and flips")
    # data
    p.add_argument("--data", default="cifar100", help="cifar100, synthetic or FILE.npz")
    p.add_argument("--limit", type=number(int, 1), default=None, help="only so many training images, for a quick look")
    settings = [action.dest for action in p._actions if action.dest != "help"]  # what follows does not change a run's figures
    p.add_argument("--data-dir", default="data", help="where CIFAR-100 is, or is downloaded to")
    # run
    p.add_argument("--out", default="runs", help="folder of the runs")
    p.add_argument("--name", default=None, help="folder of this run in it (default: made from the settings)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    p.add_argument("--no-graph", action="store_true", help="on a GPU: launch every kernel of a step, as a CPU does, instead of one CUDA graph")
    p.add_argument("--fresh", action="store_true", help="start over instead of going on")
    args = p.parse_args(argv)
    if args.data not in ("cifar100", "synthetic") and not args.data.endswith(".npz"):
        p.error(f"--data is cifar100, synthetic or a file ending in .npz, not {args.data}")
    if args.name is None:  # every setting that is not the default, so that different settings never share a folder
        args.name = f"vgg{args.stages * (2 * args.blocks + 2) + 2:02}"
        for key in settings + ["precision"]:
            value = getattr(args, key)
            if value != p.get_default(key):
                args.name += f"_{key}" if value is True else f"_{key}={value}"
        args.name = re.sub(r"[^\w.+=-]+", "-", args.name)
    if args.name != Path(args.name).name or args.name in ("", ".", ".."):
        p.error(f"--name is one folder's name without slashes, not {args.name}; --out says where it goes")
    try:
        cuda = torch.cuda.is_available()
        device = torch.device(("cuda" if cuda else "cpu") if args.device == "auto" else args.device)
    except RuntimeError:
        p.error(f"--device is auto, cpu, cuda or cuda:N, not {args.device}")
    if device.type not in ("cpu", "cuda"):
        p.error(f"--device {args.device} is not supported here, only cpu and cuda are: use --device cpu")
    if device.type == "cuda" and not (cuda and (device.index or 0) < torch.cuda.device_count()):
        p.error(f"--device {args.device}: PyTorch sees no such GPU; use --device cpu")
    return args, {key: getattr(args, key) for key in settings}, device, p.error


def main(argv=None):
    # ---- arguments
    args, settings, device, usage_error = parse_args(argv)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())  # a CUDA graph cannot be captured on the default stream
        torch.backends.cudnn.benchmark = True
    keep_freed_memory()
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu.get("avx512_bf16", False)
    precision = args.precision if args.precision != "auto" else "bf16" if bf16 else "fp32"
    # bf16 has float32's exponent range, so even gradients of 1e-30 need no loss scaling and are logged as they are
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
    settings["precision"] = precision
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else cpu.get("cpu_name") or platform.machine()
    if device.type == "cpu":
        hardware += f", {torch.get_num_threads()} threads"

    run = Path(args.out) / args.name
    state = None
    if not args.fresh and any((run / name).exists() for name in ("config.json", "last.pt", "result.json")):
        try:
            old = json.loads((run / "config.json").read_text())["settings"]
            result = json.loads((run / "result.json").read_text()) if (run / "result.json").exists() else None
            if (run / "last.pt").exists():
                state = torch.load(run / "last.pt", map_location=device, weights_only=True)
        except Exception as error:
            sys.exit(f"{run} cannot be read ({brief(error)}): move it away, or start over with --fresh")
        for key in settings:
            if old.get(key) != settings[key]:
                usage_error(f"{run} was made with {key} {old.get(key)}, not {settings[key]}: use the same settings, another --name, or --fresh")
        if result:
            print(f"{run} is finished: {summary(result)}")
            return

    # ---- data
    train, val, test = load_data(args.data, args.data_dir)
    classes = 1 + max(labels.max().item() for _, labels in (train, val, test))
    if args.limit and args.limit > len(train[1]):
        usage_error(f"--limit {args.limit} is more than the {len(train[1])} training images of {args.data}")
    train = [t[:args.limit] for t in train]  # in the order of the split, which is random
    n, (val, test) = len(train[1]), [[t.to(device) for t in pair] for pair in (val, test)]
    images, labels = F.pad(train[0], [4] * 4).to(device), train[1].to(device)  # padded before normalising: black
    steps = math.ceil(n / args.batch_size)
    if args.bn and args.stages == 5 and n % args.batch_size == 1:
        usage_error(f"batch norm cannot train on the last batch's single image once the map is 1 x 1: change --batch-size or --limit")

    # ---- model
    torch.manual_seed(args.seed)
    model = VGG(args.stages, args.blocks, args.filters, args.bn, args.residual, args.act, classes)
    model = model.to(device, memory_format=torch.channels_last)
    layers, parameters = model.weight_layers(), sum(p.numel() for p in model.parameters())
    # lr is a tensor on the device so that a captured step sees it change; capturable, likewise, is for CUDA graphs
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(args.lr, device=device), weight_decay=args.wd,
                                 fused=True, capturable=device.type == "cuda")
    log, grads, best = [], [], None
    if state:
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]})
            log, grads, best = state["log"], state["grads"], state["best"]
        except Exception as error:
            sys.exit(f"{run}/last.pt cannot be read ({brief(error)}): move it away, or start over with --fresh")
    else:
        run.mkdir(parents=True, exist_ok=True)
        for name in ("last.pt", "result.json", "config.json", "log.csv", "grads.csv", "best.pt"):  # last.pt first: no run goes on from another's
            (run / name).unlink(missing_ok=True)
        command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
        write(run / "config.json", json.dumps({"name": args.name, "command": command, "settings": settings, "layers": model.num_layers,
                                               "parameters": parameters, "steps_per_epoch": steps}, indent=1) + "\n")

    print(f"{run}: {model.num_layers} layers, {parameters:,} parameters; {n:,} training, {len(val[1]):,} validation and "
          f"{len(test[1]):,} test images of {args.data}, {classes} classes")
    print(f"{device} ({hardware}), {precision}{' (picked by --precision auto)' if args.precision == 'auto' else ''}; "
          f"{args.epochs} epochs of {steps} steps at batch {args.batch_size}" + (f"; going on after epoch {len(log)}" if log else ""))

    # ---- loop
    metrics = torch.zeros(2, device=device)  # sums of the mini-batches' loss and accuracy: fetched once an epoch

    def step(plan):
        """One step of Adam on the images of plan, (4, B)."""
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
    while len(log) < args.epochs and not (log and diverged(log[-1])):
        epoch, start, shown = len(log), time.perf_counter(), 0.0
        lr = cosine_lr(epoch, args.epochs, args.lr * args.lr_scale, args.lr_min * args.lr_scale)
        optimizer.param_groups[0]["lr"].fill_(lr)
        # seeded by the epoch, so that going on needs no generator's state
        plans = draw(n, torch.Generator(device).manual_seed(args.seed * 1_000_003 + epoch))
        if args.no_augment:
            plans[1:] = torch.tensor([[4], [4], [0]])  # the middle crop, not mirrored
        metrics.zero_()
        for i, plan in enumerate(plans.split(args.batch_size, dim=1)):
            if device.type == "cpu" or args.no_graph or plan.shape[1] < args.batch_size or eager_steps < 3:
                step(plan)
                eager_steps += 1
            else:  # one launch for the whole step, after three eager ones as CUDA graphs need; a last partial batch stays eager
                if graph is None:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                        step(batch)
                batch.copy_(plan)
                graph.replay()
            if live and time.perf_counter() - shown > 0.2:
                shown = time.perf_counter()
                rate = (i + 1) / (shown - start)
                print(f"\repoch {epoch + 1}/{args.epochs}  step {i + 1}/{steps}  {rate:.1f} steps/s  "
                      f"{clock((steps * (args.epochs - epoch) - i - 1) / rate)} left\033[K", end="", flush=True)
        flow = torch.stack([layer.weight.grad.abs().mean() for layer in layers.values()]).tolist()  # waits for the device
        trained = time.perf_counter()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
        (train_loss, train_acc), (val_loss, val_acc) = (metrics / steps).tolist(), evaluate(model, *val, autocast).tolist()
        now = time.perf_counter()
        log.append({"epoch": epoch + 1, "lr": lr, "train_loss": train_loss, "train_acc": train_acc, "val_loss": val_loss, "val_acc": val_acc,
                    "grad_norm": norm, "seconds": now - start, "steps_per_s": steps / (trained - start)})
        grads.append({"epoch": epoch + 1, **dict(zip(layers, flow))})
        if best is None or val_acc > best["val_acc"]:
            best = {**log[-1], "model": {k: v.clone() for k, v in model.state_dict().items()}}
        write(run / "log.csv", csv_text(log))
        write(run / "grads.csv", csv_text(grads))
        write(run / "best.pt", pack(best["model"]))
        # last, and with all the others hold: what a kill leaves ahead of it is made and written again
        write(run / "last.pt", pack({"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"],
                                     "log": log, "grads": grads, "best": best}))
        print(f"{chr(13) if live else ''}epoch {epoch + 1:3}/{args.epochs}  lr {lr:.1e}  train {train_loss:.3f} {train_acc:5.2f} %  "
              f"val {val_loss:.3f} {val_acc:5.2f} %  |grad| {norm:.1e}  {log[-1]['steps_per_s']:.1f} steps/s  "
              f"{clock((now - start) * (args.epochs - epoch - 1))} left" + ("\033[K" if live else ""), flush=True)

    # ---- result
    model.load_state_dict(best.pop("model"))
    test_loss, test_acc = evaluate(model, *test, autocast).tolist()
    result = {"name": args.name, "epochs": len(log), "diverged": diverged(log[-1]), "final": log[-1], "best": best, "test_loss": test_loss,
              "test_acc": test_acc, "parameters": parameters, "layers": model.num_layers, "device": f"{device} ({hardware})", "precision": precision,
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
              "seconds": sum(row["seconds"] for row in log)}
    write(run / "result.json", re.sub(r"(?<=: )(NaN|-?Infinity)\b", "null", json.dumps(result, indent=1)) + "\n")
    print(f"{run} is finished: {summary(result)}")


def diverged(row):
    """True if a row of the log has a loss that is not finite."""
    return not (math.isfinite(row["train_loss"]) and math.isfinite(row["val_loss"]))


def summary(result):
    """result.json in one line."""
    best = result["best"]
    return (("diverged, " if result["diverged"] else "") + f"{result['epochs']} epochs, best validation accuracy {best['val_acc']:.2f} % in epoch "
            f"{best['epoch']}, where test accuracy is {result['test_acc']:.2f} % and test loss {result['test_loss'] or math.nan:.3f}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on after the last whole epoch", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.exit(f"train.py: {brief(error)}. What was written before is whole: mend this and the same command goes on")
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower():
            raise
        sys.exit(f"train.py: {brief(error)}. Use a smaller --batch-size or net, or --device cpu")
