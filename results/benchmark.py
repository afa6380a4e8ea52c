"""Steps a second of train.py, of a conventional loop and of the bare step, side by side: `python results/benchmark.py`.

VGG38 with batch norm and residual connections, batch 100, random images in CIFAR-100's numbers; on the GPU if there is one. Each
is measured in a process of its own, in turns (--rounds), and the ratios are medians over the rounds, for other work moves them all.
  train.py      its own loop: steps_per_s of its log.csv, in an epoch that is not the first
  conventional  torchvision transforms on PIL images, a DataLoader with 2 workers, float32, NCHW, plain Adam, loss.item() every step
  bare          train.py's precision, layout and Adam, on one fixed random batch: no data, no augmentation, no figures; glibc is
                told to keep freed memory, as it does by itself in a process that has once freed a data set
Also: time to the loop, evaluation and checkpoint as a share of a 475-step epoch, and peak memory, of VGG38 and of VGG132.
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


def random_images():
    """CIFAR-100's shapes: what a step costs does not depend on what is in them."""
    rng = np.random.default_rng(0)
    return [part for n in (50_000, 10_000) for part in (rng.integers(256, size=(n, 32, 32, 3), dtype=np.uint8), rng.integers(100, size=n))]


def rate(step):
    """Steps a second of calling step(), the device waited for at both ends."""
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize() if GPU else None
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize() if GPU else None
    return STEPS / (time.perf_counter() - start)


def ours(flags=("--bn", "--residual")):
    """A run of train.py of two epochs: what it logged and used."""
    train.synthetic = random_images
    with tempfile.TemporaryDirectory() as out:
        marks = []
        write = train.write
        train.write = lambda path, data: (write(path, data), marks.append((path.name, time.perf_counter())))
        train.main(["--data", "synthetic", "--limit", str(100 * STEPS), "--epochs", "2", *flags, "--out", out, "--name", "a"])
        log = (Path(out) / "a/log.csv").read_text().splitlines()
    steps_per_s = float(log[-1].split(",")[-1])
    first, second = (when for name, when in marks if name == "last.pt")  # a whole epoch passes between them
    peak = torch.cuda.max_memory_allocated() if GPU else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"rate": steps_per_s, "rest": second - first - STEPS / steps_per_s, "peak": peak / 2**30}


def conventional():
    from torchvision import transforms as T
    from PIL import Image
    x, y, *_ = random_images()

    class Images(torch.utils.data.Dataset):
        transform = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(train.MEAN, train.STD)])

        def __len__(self):
            return len(x)

        def __getitem__(self, i):
            return self.transform(Image.fromarray(x[i])), int(y[i])

    model = VGG(3, 5, bn=True, residual=True).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = iter(torch.utils.data.DataLoader(Images(), 100, shuffle=True, num_workers=2, pin_memory=GPU))  # 475: more than are used

    def step():
        x, y = (t.to(DEVICE) for t in next(batches))
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item(), (logits.argmax(1) == y).float().mean().item()
    return {"rate": rate(step)}


def bare():
    torch.cuda.set_stream(torch.cuda.Stream()) if GPU else None
    torch.backends.cudnn.benchmark = True
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if GPU else torch.cpu.get_capabilities().get("avx512_bf16", False)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
    model = VGG(3, 5, bn=True, residual=True).to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(1e-3, device=DEVICE), fused=True, capturable=GPU)
    x = torch.randn(100, 3, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last)
    y = torch.randint(100, (100,), device=DEVICE)

    def step():
        optimizer.zero_grad()
        with autocast:
            logits = model(x).float()
        F.cross_entropy(logits, y).backward()
        optimizer.step()
    if GPU:
        for _ in range(3):
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            step()
        step = graph.replay
    return {"rate": rate(step)}


def start_up():
    """Seconds from the command to the loop, beside what `import torch` alone takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    imported = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, Path(train.__file__), "--bn", "--residual", "--data", "synthetic", "--out", out],
                                   stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        [process.stdout.readline() for _ in range(3)]  # the lines before the loop
        seconds = time.perf_counter() - start
        process.kill()
        process.wait()
    return {"rate": seconds - imported}


MODES = {"train.py": ours, "conventional": conventional, "bare": bare, "start": start_up, "VGG132": lambda: ours(["--bn", "--residual", "--stages", "5", "--blocks", "12"])}


def measure(mode):
    keep = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**40)} if mode == "bare" else {}
    out = subprocess.run([sys.executable, __file__, "--mode", mode], capture_output=True, text=True, env={**os.environ, **keep})
    if out.returncode:
        sys.exit(out.stderr)
    return json.loads(out.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode:
        return print(json.dumps(MODES[args.mode]()))
    contenders = ["train.py", "conventional", "bare"]
    name = torch.cuda.get_device_name() if GPU else f"{torch.cpu.get_capabilities().get('cpu_name')}, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; VGG38 ResNet, batch 100; steps a second")
    rounds = []
    for i in range(args.rounds):
        rounds.append({mode: measure(mode) for mode in contenders})
        print(f"round {i + 1}:  " + "  ".join(f"{mode} {result['rate']:.2f}" for mode, result in rounds[-1].items()), flush=True)
    for mode in contenders[1:]:
        ratios = [r["train.py"]["rate"] / r[mode]["rate"] for r in rounds]
        print(f"train.py / {mode}: {statistics.median(ratios):.2f} (median; {min(ratios):.2f} to {max(ratios):.2f})")
    last = rounds[-1]["train.py"]
    print(f"evaluation and checkpoint: {100 * last['rest'] / (last['rest'] + 475 / last['rate']):.1f} % of a 475-step epoch")
    print(f"from the command to the loop, beside import torch: {measure('start')['rate']:.1f} s")
    print(f"peak memory: VGG38 {last['peak']:.2f} GiB, VGG132 {measure('VGG132')['peak']:.2f} GiB" + ("" if GPU else " (of the process)"))


if __name__ == "__main__":
    main()
