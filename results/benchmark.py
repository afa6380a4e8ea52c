"""Steps a second of train.py, of a conventional loop and of the bare step, side by side.

`python results/benchmark.py`: VGG38 with batch norm and residual connections, batch 100, random
images in CIFAR-100's numbers; on the GPU if there is one. Each is measured in a process of its own,
in turns (--rounds), and the ratios are medians over the rounds, for other work moves them all.

train.py      its own loop: steps_per_s of its log.csv, in an epoch that is not the first
conventional  torchvision transforms on PIL images, a DataLoader with 2 workers, float32, NCHW,
              plain Adam, loss.item() every step
bare          train.py's precision, layout and Adam, on one fixed random batch: no data, no
              augmentation, no figures; on a GPU without a CUDA graph

Also: evaluation as a share of a 475-step epoch, and peak memory.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from model import VGG

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
STEPS = 95 if GPU else 16  # a round's length: seconds on either
WARM_UP = 4
VGG38 = ["--bn", "--residual"]


def random_images():
    """The four arrays of train.synthetic: what a step costs does not depend on what is in them."""
    rng = np.random.default_rng(0)
    arrays = []
    for n in (50_000, 10_000):
        arrays.append(rng.integers(256, size=(n, 32, 32, 3), dtype=np.uint8))
        arrays.append(rng.integers(100, size=n))
    return arrays


def wait():
    if GPU:
        torch.cuda.synchronize()


def rate(step):
    """Steps a second of calling step(), the device waited for at both ends."""
    for _ in range(WARM_UP):
        step()
    wait()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    wait()
    return STEPS / (time.perf_counter() - start)


def ours():
    """A run of train.py of two epochs: what it logged, and its peak memory in GiB."""
    train.synthetic = random_images
    with tempfile.TemporaryDirectory() as out:
        length = ["--limit", str(100 * STEPS), "--epochs", "2"]
        train.main(["--data", "synthetic", *length, *VGG38, "--out", out, "--name", "a"])
        log = np.genfromtxt(Path(out) / "a/log.csv", delimiter=",", names=True)[-1]
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if GPU:
        peak = torch.cuda.max_memory_allocated()
    evaluation = log["seconds"] - STEPS / log["steps_per_s"]
    evaluation *= 2_500 / min(2_500, 100 * STEPS)  # --limit limits validation too
    return {"rate": log["steps_per_s"], "evaluation": evaluation, "peak": peak / 2**30}


def conventional():
    from PIL import Image
    from torchvision import transforms

    x, y, *_ = random_images()
    transform = transforms.Compose([
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(train.MEAN, train.STD),
    ])

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, i):
            return transform(Image.fromarray(x[i])), int(y[i])

    model = VGG(stages=3, blocks=5, bn=True, residual=True).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(
        Images(), batch_size=100, shuffle=True, num_workers=2, pin_memory=GPU
    )
    batches = iter(loader)

    def step():
        x, y = (tensor.to(DEVICE) for tensor in next(batches))
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item(), (logits.argmax(1) == y).float().mean().item()

    return {"rate": rate(step)}


def bare():
    if GPU:
        torch.backends.cudnn.deterministic = True
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
    model = VGG(stages=3, blocks=5, bn=True, residual=True)
    model = model.to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    x = torch.randn(100, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
    y = torch.randint(100, (100,), device=DEVICE)

    def step():
        optimizer.zero_grad()
        with autocast:
            logits = model(x).float()
        F.cross_entropy(logits, y).backward()
        optimizer.step()

    return {"rate": rate(step)}


MODES = {"train.py": ours, "conventional": conventional, "bare": bare}


def measure(mode):
    """The figures of a mode, in a process of its own."""
    env = dict(os.environ)
    if mode == "bare":  # what train.py sets itself on a CPU
        env.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**31 - 1))
    command = [sys.executable, __file__, "--mode", mode]
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    if out.returncode:
        sys.exit(out.stderr)
    return json.loads(out.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode:
        print(json.dumps(MODES[args.mode]()))
        return
    name = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; VGG38 ResNet, batch 100; steps a second")
    rates = {mode: [] for mode in MODES}
    for _ in range(args.rounds):
        for mode in rates:
            figures = measure(mode)
            rates[mode].append(figures["rate"])
            if mode == "train.py":
                last = figures
        print("  ".join(f"{mode} {rate[-1]:.2f}" for mode, rate in rates.items()), flush=True)
    for mode in ("conventional", "bare"):
        ratios = [a / b for a, b in zip(rates["train.py"], rates[mode])]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"train.py / {mode}: {statistics.median(ratios):.2f} (median; {spread})")
    share = last["evaluation"] / (last["evaluation"] + 475 / last["rate"])
    print(f"evaluation of 2,500 images: {100 * share:.1f} % of a 475-step epoch")
    whose = "" if GPU else " (of the process)"
    print(f"peak memory: {last['peak']:.2f} GiB{whose}")


if __name__ == "__main__":
    main()
