"""pytest -q: two to three minutes on two cores, no network, no data set."""
import csv
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock

import plot
import train
from model import VGG

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "results"))
import same_images
import vanishing


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_json(path):
    return json.loads(path.read_text())


# ---- model.py

SIZES = {  # (stages, blocks, bn): layers as the paper counts them, parameters to the unit
    (3, 0, False): (8, 59_716),
    (3, 5, False): (38, 336_196),
    (3, 5, True): (38, 338_500),
    (3, 10, True): (68, 616_900),
    (5, 6, True): (72, 654_148),
    (5, 12, True): (132, 1_210_948),
    (4, 12, True): (106, 969_604),
}


@pytest.mark.parametrize("size", SIZES)
def test_models_are_the_papers_to_the_parameter(size):
    stages, blocks, bn = size
    model = VGG(stages, blocks, bn=bn, residual=bn)
    parameters = sum(p.numel() for p in model.parameters())
    assert (model.num_layers, parameters) == SIZES[size]
    layers = list(model.weight_layers())
    assert layers[:2] == ["conv", "norm"] and layers[-1] == "linear"
    norms = model.num_layers - 1 if bn else 1  # after every conv, or only the first
    assert len(layers) == model.num_layers + norms


@pytest.mark.parametrize("act", ["leaky_relu", "sigmoid"])
@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("residual, plain", [(False, False), (True, False), (True, True)])
def test_forward_is_algorithm_1(bn, residual, plain, act):
    torch.manual_seed(1)
    options = {"bn": bn, "residual": residual, "plain_reduction": plain, "act": act}
    model = VGG(stages=2, blocks=1, filters=8, classes=7, **options).double()
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, std=0.3)  # away from the identity that a new BatchNorm is
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    p = dict(model.named_parameters())
    activate = torch.sigmoid if act == "sigmoid" else F.leaky_relu

    def conv(t, name):
        return F.conv2d(t, p[f"{name}.weight"], p.get(f"{name}.bias"), padding=1)

    def norm(t, name):
        if f"{name}.weight" not in p:
            return t
        return F.batch_norm(t, None, None, p[f"{name}.weight"], p[f"{name}.bias"], training=True)

    h = activate(norm(conv(x, "conv"), "norm"))
    for i, reduce in enumerate([False, True, False, True]):
        block = f"blocks.{i}"
        assert (f"{block}.conv1.bias" in p) == (f"{block}.conv2.bias" in p) == reduce
        assert (f"{block}.norm1.weight" in p) == (f"{block}.norm2.weight" in p) == bn
        out = activate(norm(conv(h, f"{block}.conv1"), f"{block}.norm1"))
        if reduce:
            out, h = F.avg_pool2d(out, 2), F.avg_pool2d(h, 2)
        out = norm(conv(out, f"{block}.conv2"), f"{block}.norm2")
        skip = residual and not (reduce and plain)
        h = activate(out + h if skip else out)
    logits = h.mean((2, 3)) @ p["linear.weight"].T + p["linear.bias"]
    torch.testing.assert_close(model(x), logits)


def test_plain_vgg38_vanishes_and_resnet_does_not():
    def flow(bf16=False, **options):
        torch.manual_seed(0)
        model = VGG(stages=3, blocks=5, **options)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(torch.randn(16, 3, 32, 32)).float()
        F.cross_entropy(logits, torch.arange(16)).backward()
        return [layer.weight.grad.abs().mean().item() for layer in model.weight_layers().values()]

    plain, resnet = flow(), flow(bn=True, residual=True)
    assert 0 < plain[0] < 1e-12 * resnet[0] and resnet[0] > 1e-3
    assert plain[-1] > 1e-5  # the last layers do get a gradient
    ratio = np.divide(flow(bf16=True), plain)  # bf16 neither makes it nor hides it
    assert 0.5 < ratio.min() and ratio.max() < 2


def test_dirac_starts_every_block_as_the_identity():
    model = VGG(stages=2, blocks=1, init="dirac")
    x = torch.rand(2, 32, 8, 8)  # not negative: leaky ReLU passes it on
    torch.testing.assert_close(model.blocks(x), F.avg_pool2d(x, 4))


# ---- train.py: its parts


@pytest.fixture(scope="session")
def npz(tmp_path_factory):
    """300 training and 100 test images of ten classes, a few of the synthetic set's."""
    path = tmp_path_factory.mktemp("data") / "ten.npz"
    np.savez(path, **dict(zip(train.ARRAYS, train.synthetic(300, 100, 10))))
    return path


def test_split_is_the_papers():
    kept, held_out = train.split_indices(50_000)
    assert len(kept) == 47_500 and len(held_out) == 2_500 and not set(kept) & set(held_out)
    # RandomState(0).choice(50000, 47500, replace=False), written down
    assert kept[:8].tolist() == [11841, 19602, 45519, 25747, 42642, 31902, 30346, 12363]
    assert int((kept * np.arange(47_500) % 1_000_003).sum()) == 23_676_587_094


def test_learning_rates():
    """As PyTorch's scheduler has them, far beyond the period too, where --cosine batches goes."""
    ours = [train.cosine_lr(t, 100, 1e-3, 2e-5) for t in range(1000)]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=2e-5)
    theirs = []
    for _ in range(1000):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    assert ours[0] == 1e-3 and ours[50] == pytest.approx(5.1e-4) and 2e-5 < ours[99] < 2.03e-5


def test_augmentation_is_pad_crop_flip():
    n = 4000
    images = torch.randint(1, 256, (n, 3, 32, 32), dtype=torch.uint8)  # 0 is padding
    padded = F.pad(images, [4] * 4)
    torch.manual_seed(5)
    plan = train.draw_plan(n, "cpu")
    out = train.augment(padded, plan)
    assert out.dtype == torch.uint8 and sorted(plan[0].tolist()) == list(range(n))
    for i, (source, row, column, flip) in enumerate(plan[:4].T.tolist()):
        crop = padded[source, :, row : row + 32, column : column + 32]
        assert torch.equal(out[i], crop.flip(2) if flip else crop)
    _, counts = plan[1:4].unique(dim=1, return_counts=True)  # offsets, mirrored and not: evenly
    assert len(counts) == 162 and abs(counts.float().var() / (n / 162) - 1) < 5 * (2 / 161) ** 0.5
    larger = F.pad(torch.zeros(n, 3, 64, 64, dtype=torch.uint8), [4] * 4)  # a fork's images
    assert train.augment(larger, plan[:, :2]).shape == (2, 3, 64, 64)


def test_normalisation_is_the_frameworks():
    from torchvision.transforms import v2

    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    theirs = v2.Normalize(train.MEAN, train.STD)(v2.ToDtype(torch.float32, scale=True)(images))
    torch.testing.assert_close(train.normalise(images), theirs)
    assert train.normalise(images).is_contiguous(memory_format=torch.channels_last)


def test_cifar100_is_read_as_torchvision_has_it(npz, tmp_path, monkeypatch):
    """The official archive's files, but with 300 and 100 images: fine labels, in its order."""
    data, folder = np.load(npz), tmp_path / "cifar-100-python"
    folder.mkdir()
    for part in ("train", "test"):
        images = data[f"{part}_images"].transpose(0, 3, 1, 2).reshape(-1, 3072)
        labels = data[f"{part}_labels"].tolist()
        content = {"data": images, "fine_labels": labels, "coarse_labels": [0] * len(labels)}
        (folder / part).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(10)]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    theirs = train.load_data("cifar100", tmp_path)
    ours = train.load_data(str(npz))
    for (x, y), (x2, y2) in zip(theirs, ours, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    kept, _ = train.split_indices(300)
    assert np.array_equal(ours[0][0].permute(0, 2, 3, 1), data["train_images"][kept])
    assert np.array_equal(ours[0][1], data["train_labels"][kept])


def test_bf16_where_it_is_faster(monkeypatch):
    machines = [("AMD EPYC", False, True), ("Intel Xeon", True, True), ("Intel Xeon", False, False)]
    for name, amx, faster in machines:
        cpu = {"cpu_name": name, "avx512_bf16": True, "amx_bf16": amx}
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: cpu, raising=False)
        assert train.hardware(torch.device("cpu"))[1] is faster


# ---- train.py: whole runs

TINY = "--blocks 0 --filters 8 --batch-size 40 --device cpu".split()
DEVICE = train.parse_args([])[0].device  # the GPU, if there is one


def flags(text, npz, out):
    """The flags of a small run, out/a, on the ten classes of npz."""
    return [*TINY, *text.split(), "--data", str(npz), "--out", str(out), "--name", "a"]


def refused(args):
    """The status, or the line, with which train.main ends."""
    with pytest.raises(SystemExit) as stop:
        train.main([*map(str, args)])
    return stop.value.code


def plain_loop(npz, seed, lr_max, lr_min, wd, eps, epochs):
    """The paper's recipe again: ordinary Adam, images cropped one by one. A row an epoch, with the
    gradients, and the test loss of the best epoch. Without batch norm, which amplifies rounding.
    """
    (images, labels), (val, val_labels), (test, test_labels) = train.load_data(str(npz))
    torch.manual_seed(seed)
    model = VGG(stages=3, blocks=0, filters=8, residual=True, classes=10)
    optimizer = torch.optim.Adam(model.parameters(), eps=eps, weight_decay=wd, foreach=False)
    log, flow, test_losses = [], [], []
    for epoch in range(epochs):
        lr = lr_min + (lr_max - lr_min) * (1 + math.cos(math.pi * epoch / epochs)) / 2
        optimizer.param_groups[0]["lr"] = lr
        torch.manual_seed(seed * 1_000_003 + epoch)
        plan = train.draw_plan(285, "cpu")
        losses, hits = [], []
        for start in range(0, 285, 40):
            crops = []
            for i, row, column, flip in plan[:4, start : start + 40].T.tolist():
                crop = F.pad(images[i], [4] * 4)[:, row : row + 32, column : column + 32]
                crops.append(crop.flip(2) if flip else crop)
            logits = model(train.normalise(torch.stack(crops)))
            y = labels[plan[0, start : start + 40]]
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            hits.append(100 * (logits.argmax(1) == y).float().mean().item())
        model.eval()
        with torch.no_grad():
            logits = model(train.normalise(val))
            test_losses.append(F.cross_entropy(model(train.normalise(test)), test_labels).item())
        model.train()
        val_loss = F.cross_entropy(logits, val_labels).item()
        val_acc = 100 * (logits.argmax(1) == val_labels).float().mean().item()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        log.append([epoch + 1, lr, np.mean(losses), np.mean(hits), val_loss, val_acc, norm])
        layers = [m for m in model.modules() if hasattr(m, "weight")]
        flow.append([epoch + 1, *(layer.weight.grad.abs().mean().item() for layer in layers)])
    return log, flow, test_losses[np.argmax([row[5] for row in log])]


def test_a_run_is_the_papers_recipe(npz, tmp_path):
    text = "--epochs 2 --wd 1e-2 --eps 1e-3 --lr-scale 2 --precision fp32 --seed 3 --residual"
    train.main(flags(text, npz, tmp_path))
    log, flow, test_loss = plain_loop(npz, 3, 2e-3, 4e-5, wd=1e-2, eps=1e-3, epochs=2)
    columns = "epoch lr train_loss train_acc val_loss val_acc grad_norm".split()
    ours = [[row[column] for column in columns] for row in rows(tmp_path / "a/log.csv")]
    np.testing.assert_allclose(np.array(ours, float), log, rtol=2e-3)
    ours = [list(row.values()) for row in rows(tmp_path / "a/grads.csv")]
    np.testing.assert_allclose(np.array(ours, float), flow, rtol=1e-2)
    assert read_json(tmp_path / "a/result.json")["test_loss"] == pytest.approx(test_loss, rel=2e-3)


@pytest.mark.parametrize("cosine, times", [("epochs", [0, 1, 2]), ("batches", [7, 15, 23])])
def test_what_the_cosine_counts(npz, tmp_path, cosine, times):
    """The rate of the last of an epoch's 8 mini-batches."""
    train.main(flags(f"--epochs 3 --lr 1e-2 --cosine {cosine}", npz, tmp_path))
    rates = [float(row["lr"]) for row in rows(tmp_path / "a/log.csv")]
    np.testing.assert_allclose(rates, [train.cosine_lr(t, 3, 1e-2, 2e-5) for t in times], 1e-6)


def test_learns_the_synthetic_set_and_best_pt_holds_what_it_learned(tmp_path):
    text = "--data synthetic --limit 3000 --blocks 0 --bn --residual --epochs 3 --lr 5e-3"
    train.main([*text.split(), *"--precision fp32 --device cpu --out".split(), str(tmp_path)])
    [run] = tmp_path.glob("vgg08_blocks=0_bn_residual_epochs=3_lr=0.005_*_limit=3000")
    result = read_json(run / "result.json")
    assert result["best"]["val_acc"] > 30 and result["test_acc"] > 30  # chance is 1 %
    assert result["epochs"] == 3
    model = VGG(stages=3, blocks=0, bn=True, residual=True)
    model.load_state_dict(torch.load(run / "best.pt", weights_only=True))
    _, _, test = train.load_data("synthetic")
    figures = train.evaluate(model, *test, torch.autocast("cpu", enabled=False))
    np.testing.assert_allclose(figures, [result["test_loss"], result["test_acc"]], rtol=1e-2)


def test_a_finished_run_is_left_alone(npz, tmp_path, capsys, monkeypatch):
    train.main(flags("--epochs 1", npz, tmp_path))
    before = (tmp_path / "a/last.pt").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", ["train.py", *flags("--epochs 1", npz, tmp_path)])
    train.main()
    assert "a: finished before" in capsys.readouterr().out
    assert (tmp_path / "a/last.pt").stat().st_mtime_ns == before


def test_killed_and_resumed_is_the_same(npz, tmp_path):
    text = "--bn --blocks 2 --epochs 20 --wd 1e-3"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.main(flags(text, npz, whole))
    process = subprocess.Popen([sys.executable, HERE / "train.py", *flags(text, npz, killed)])
    while process.poll() is None and not (killed / "a/last.pt").exists():
        time.sleep(0.005)
    time.sleep(0.1)
    process.kill()
    process.wait()
    assert 1 <= len(rows(killed / "a/log.csv")) < 20  # it was killed in the middle
    torch.load(killed / "a/best.pt", weights_only=True)  # it is whole, as last.pt is:
    train.main(flags(text, npz, killed))
    logs = [rows(out / "a/log.csv") for out in (whole, killed)]
    for row in logs[0] + logs[1]:
        del row["seconds"], row["steps_per_s"]
    assert logs[0] == logs[1] and len(logs[0]) == 20
    assert (whole / "a/grads.csv").read_text() == (killed / "a/grads.csv").read_text()
    for file in ("best.pt", "last.pt"):
        ours, theirs = [torch.load(out / "a" / file, weights_only=True) for out in (whole, killed)]
        ours, theirs = ours.get("model", ours), theirs.get("model", theirs)  # of last.pt
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_training_loss_is_a_mean_over_the_steps_taken(npz, tmp_path, monkeypatch):
    """In a fork that leaves some out, here six of eight."""
    draw_plan = train.draw_plan
    monkeypatch.setattr(train, "draw_plan", lambda *args: draw_plan(*args)[:, :80])
    train.main(flags("--epochs 1", npz, tmp_path))
    assert float(rows(tmp_path / "a/log.csv")[0]["train_loss"]) > 2  # chance is ln 10 = 2.3


def test_numpy_is_seeded_in_every_epoch(npz, tmp_path, monkeypatch):
    """For mixup, say: an epoch that was interrupted has the same numbers again."""
    drawn = []
    augment = train.augment

    def mixup(*args):
        drawn.append(np.random.beta(1, 1))
        if len(drawn) == 10:
            raise KeyboardInterrupt
        return augment(*args)

    monkeypatch.setattr(train, "augment", mixup)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags("--epochs 2", npz, tmp_path))
    train.main(flags("--epochs 2", npz, tmp_path))
    assert len(set(drawn[:8])) == 8 and len(drawn) == 18 and drawn[8:10] == drawn[10:12]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_frozen_or_weight_normed_layer_has_nan(npz, tmp_path, monkeypatch):
    def fork(*args, **options):
        model = VGG(*args, **options)
        model.conv.requires_grad_(False)
        torch.nn.utils.parametrizations.weight_norm(model.linear)
        return model

    monkeypatch.setattr(train, "VGG", fork)
    train.main(flags("--epochs 1", npz, tmp_path))
    _, conv, *others, linear = map(float, rows(tmp_path / "a/grads.csv")[0].values())
    assert math.isnan(conv) and math.isnan(linear) and min(others) > 0


def test_a_column_of_some_epochs_stays():
    assert train.csv_text([{"a": 1}, {"a": 2, "b": 3}, {"a": 4}]) == "a,b\n1,nan\n2,3\n4,nan\n"


def test_diverged_is_a_result(npz, tmp_path):
    train.main(flags("--lr 1e12 --epochs 5", npz, tmp_path))
    result = read_json(tmp_path / "a/result.json")
    assert result["epochs"] < 5 and result["best"] is None
    train.main(flags("--lr 1e12 --epochs 5", npz, tmp_path))  # finished, as any other


def test_limit_and_no_augment(npz, tmp_path, monkeypatch, capsys):
    plans = []
    augment = train.augment

    def spy(padded, plan, *more):
        plans.append(plan)
        return augment(padded, plan, *more)

    monkeypatch.setattr(train, "augment", spy)
    train.main(flags("--epochs 1 --limit 50 --no-augment", npz, tmp_path))
    assert "50 training, 15 validation, 50 test images" in capsys.readouterr().out
    assert [plan.shape[1] for plan in plans] == [40, 10]
    assert (plans[0][1:3] == 4).all() and not plans[0][3].any()


def test_a_run_does_not_go_on_with_other_settings(npz, tmp_path):
    train.main(flags("--epochs 1 --wd 1e-3", npz, tmp_path))
    before = (tmp_path / "a/last.pt").read_bytes()
    line = refused(flags("--epochs 1", npz, tmp_path))
    assert "was made with wd 0.001: use that" in line
    assert (tmp_path / "a/last.pt").read_bytes() == before
    elsewhere = shutil.copy(npz, tmp_path)  # the same file in another folder is the same data
    train.main(flags("--epochs 1 --wd 1e-3", elsewhere, tmp_path))
    np.savez(elsewhere, **dict(zip(train.ARRAYS, train.synthetic(200, 100, 10))))  # this is not
    assert "made with data_checksum" in refused(flags("--epochs 1 --wd 1e-3", elsewhere, tmp_path))
    os.remove(elsewhere)
    assert "no file" in refused(flags("--epochs 1 --wd 1e-3", elsewhere, tmp_path))
    (tmp_path / "a/config.json").unlink()  # to get around the refusal
    assert "has no config.json" in refused(flags("--epochs 1", npz, tmp_path))


def test_a_new_flag_disowns_no_earlier_run(npz, tmp_path):
    train.main(flags("--epochs 1", npz, tmp_path))
    config = read_json(tmp_path / "a/config.json")
    del config["settings"]["wd"]  # as if --wd were new: it had its default
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    train.main(flags("--epochs 1", npz, tmp_path))
    assert "made with wd 0.0: use" in refused(flags("--epochs 1 --wd 1", npz, tmp_path))


def test_default_names_differ_when_settings_do():
    variants = (
        "--blocks 6|--stages 2 --blocks 8|--bn|--residual|--act sigmoid|--epochs 5|--lr 1e-2|"
        "--batch-size 50|--wd 1e-3|--wd 1e-4|--seed 1|--no-augment|--data a/b.npz|--limit 5"
    ).split("|")
    names = {train.parse_args(variant.split())[0].name for variant in variants}
    plain, _ = train.parse_args("--out x --wd 0 --device cpu".split())
    assert len(names - {plain.name}) == len(variants) and plain.name == "vgg38"
    assert not any("/" in name for name in names)


@pytest.mark.parametrize("text", ["--stages 6", "--blocks -1", "--batch-size 0", "--nonsense"])
def test_wrong_flags_say_which_and_write_nothing(text, tmp_path, capsys):
    assert refused([*text.split(), "--out", tmp_path]) == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ") and text.split()[0] in error
    assert not list(tmp_path.iterdir())


def test_broken_data_is_one_line(npz, tmp_path):
    data = dict(np.load(npz))
    broken = {
        "shape": {**data, "train_images": data["train_images"][:, :16]},
        "length": {**data, "test_labels": data["test_labels"][:-1]},
        "negative": {**data, "train_labels": data["train_labels"] - 1},
        "keys": {"images": data["train_images"]},
    }
    for name, arrays in broken.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    for name in [*broken, "missing"]:
        line = refused(flags("", tmp_path / f"{name}.npz", tmp_path))
        assert f"{name}.npz" in line and "\n" not in line


def test_no_network_is_one_line(tmp_path, monkeypatch):
    def offline(*args, download=False, **kwargs):
        raise OSError("no name resolution") if download else RuntimeError("not there")

    monkeypatch.setattr("torchvision.datasets.CIFAR100", offline)
    line = refused(["--data-dir", tmp_path / "data", "--out", tmp_path])
    assert "--data FILE.npz" in line and "\n" not in line


def test_a_run_is_trained_by_one_process(npz, tmp_path, monkeypatch):
    with FileLock(tmp_path / ".a.lock"):
        assert "another process (or notebook) has" in refused(flags("", npz, tmp_path))
    assert not (tmp_path / "a").exists()  # not made anew if deleted

    config = tmp_path / "a/config.json"

    def meanwhile(*_):
        if not (tmp_path / "a/log.csv").exists():  # an editor only changes the blanks
            config.write_text(json.dumps(read_json(config)))
        else:  # all was deleted, the lock too, and another process has begun
            config.write_text('{"started": "later"}')
        return 0.0, 0.0

    monkeypatch.setattr(train, "evaluate", meanwhile)
    assert "another process trains there" in refused(flags("", npz, tmp_path))
    assert len(rows(tmp_path / "a/log.csv")) == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_compiled_trains_as_eager_does(npz, tmp_path):
    """The losses, and the gradients, which a GPU's graph keeps in memory of its own."""
    losses, gradients = [], []
    for flag in ("", "--compile"):
        text = f"--bn --residual --epochs 2 --precision fp32 --device {DEVICE} {flag}"
        train.main(flags(text, npz, tmp_path / flag))
        losses.append([float(row["train_loss"]) for row in rows(tmp_path / flag / "a/log.csv")])
        epoch = rows(tmp_path / flag / "a/grads.csv")[0]
        gradients.append([float(gradient) for gradient in epoch.values()])
    np.testing.assert_allclose(*losses, rtol=0.02)
    np.testing.assert_allclose(*gradients, rtol=0.1)


# ---- sweep.sh


@pytest.fixture
def sweep(tmp_path):
    """Runs sweep.sh with a python that prints its arguments and runs CODE (shell)."""

    def run(*args, code="", script=HERE / "sweep.sh", **env):
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\necho "$@"\n{code}\n')
        python.chmod(0o755)
        unset = {"JOBS": "", "SEEDS": "", "SLURM_ARRAY_TASK_ID": ""}
        env = {**os.environ, **unset, "PATH": f"{tmp_path}:{os.environ['PATH']}", **env}
        options = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        done = subprocess.run(["bash", script, *args], cwd=tmp_path, env=env, **options)
        return done.returncode, done.stdout, done.stderr

    return run


def test_sweep_has_the_papers_runs():
    lines = subprocess.check_output(["bash", HERE / "sweep.sh", "--list"], text=True).splitlines()
    assert [line.split()[0] for line in lines] == [*plot.PAPER, *plot.EXTRAS]
    for name, *options in map(str.split, lines):
        args, _ = train.parse_args(options)
        layers = VGG(args.stages, args.blocks).num_layers
        assert layers == int(re.match(r"(?:cw21_)?vgg(\d+)", name)[1])
        if "_rn" in name:
            assert args.bn and args.residual


def test_sweep_runs_the_papers_runs_and_names_the_failed(sweep):
    code = 'case "$*" in *"--name vgg38_bn --"*) exit 1 ;; esac'
    status, out, err = sweep(code=code)
    assert re.findall(r"--name (\S+)", out) == list(plot.PAPER)
    assert status != 0 and "failed: vgg38_bn\n" in err


def test_sweep_hands_on_flags_jobs_and_seeds(sweep):
    code = 'echo "threads $OMP_NUM_THREADS"'
    args = ["vgg08", "vgg106", "--", "--out", "a  b"]
    status, out, _ = sweep(*args, code=code, JOBS="2", SEEDS="0 7", OMP_NUM_THREADS="")
    runs = [("vgg08", "0"), ("vgg08-seed7", "7"), ("vgg106", "0"), ("vgg106-seed7", "7")]
    assert sorted(re.findall(r"--name (\S+) .*--seed (\d)", out)) == runs
    assert status == 0 and out.count("--out a  b") == 4  # one argument, blanks and all
    assert len(re.findall("threads [1-9]", out)) == 4


def test_a_slurm_task_is_a_line_of_the_list(sweep):
    _, out, _ = sweep(SLURM_ARRAY_TASK_ID="11")
    assert "--name vgg38_rn_lr100 --bn --residual --wd 1e-3 --lr-scale 100 --seed 0" in out
    _, out, _ = sweep(SLURM_ARRAY_TASK_ID="17")
    assert re.findall(r"--name (\S+)", out) == ["vgg106"]
    status, out, _ = sweep(SLURM_ARRAY_TASK_ID="1000")
    assert status == 2 and not out  # and no run at all


def test_sweep_refuses_what_it_does_not_know(sweep):
    status, out, err = sweep("none-such")
    assert status == 2 and "none-such" in err and not out


def test_a_line_can_be_commented_out(sweep, tmp_path):
    script = tmp_path / "sweep.sh"
    script.write_text((HERE / "sweep.sh").read_text().replace("\nvgg72 ", "\n#vgg72 "))
    for args, names in (([], plot.PAPER), (["--list"], plot.PAPER | plot.EXTRAS)):
        _, out, _ = sweep(*args, script=script)
        assert "vgg72" not in out and len(out.splitlines()) == len(names) - 1


# ---- plot.py


@pytest.fixture(scope="session")
def three_seeds(tmp_path_factory):
    """vgg08 with three seeds of 2 epochs, and vgg38 stopped after 1 of 2."""
    out = tmp_path_factory.mktemp("runs")
    args = ["--data", "synthetic", "--limit", "100", "--device", "cpu", "--out", str(out)]
    for seed in range(3):
        name = f"vgg08-seed{seed}" if seed else "vgg08"
        train.main([*args, *f"--blocks 0 --epochs 2 --name {name} --seed {seed}".split()])
    train.main([*args, "--epochs", "2", "--name", "vgg38"])
    (out / "vgg38/result.json").unlink()
    for file in ("log.csv", "grads.csv"):
        lines = (out / "vgg38" / file).read_text().splitlines(keepends=True)
        (out / "vgg38" / file).write_text("".join(lines[:2]))
    return out


@pytest.fixture
def runs(three_seeds, tmp_path):
    """A copy of them, to be changed."""
    return Path(shutil.copytree(three_seeds, tmp_path / "runs"))


def table(path, number=0):
    """{first cell: cells} of a table of tables.md."""
    lines = path.read_text(encoding="utf-8").split("\n## ")[number + 1].splitlines()[4:]
    cells = [line.strip("| ").split(" | ") for line in lines if line]
    return {row[0]: row for row in cells}


def test_tables_and_figures(runs, tmp_path, capsys):
    plot.main(["--runs", str(runs), "--out", str(tmp_path / "out")])
    drawn = {"figure1.png", "annex_a.png", "figure2.png"}  # of the runs that are there
    assert {f.name for f in (tmp_path / "out").iterdir()} == drawn | {"tables.md"}
    cells = table(tmp_path / "out/tables.md")
    logs = [rows(runs / f"vgg08{seed}/log.csv") for seed in ("", "-seed1", "-seed2")]
    values = [float(log[-1]["val_acc"]) for log in logs]
    assert cells["VGG08"][3] == "48.60"
    assert cells["VGG08"][4] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    assert cells["VGG08"][-1] == "2 epochs of synthetic, limit 100, 3 seeds"
    assert cells["VGG38"][-1] == "1 of 2 epochs of synthetic, limit 100, 1 seed"
    assert cells["VGG38"][8] == f"{float(rows(runs / 'vgg38/log.csv')[0]['val_loss']):.2f}"
    assert cells["VGG68"][1:] == ["86.86", "–", "66.76", "–", "0.44", "–", "1.30", "–", "–"]
    milestones = table(tmp_path / "out/tables.md", 3)["VGG08"]
    loss = np.mean([float(log[0]["train_loss"]) for log in logs])
    assert milestones[1].startswith(f"{loss:.2f} ± ")
    assert "missing: vgg38_bn" in capsys.readouterr().out


def test_a_mean_is_over_runs_that_differ_in_the_seed_alone(runs, capsys):
    for seed in (3, 4, 6):  # 3 stays seed 1 again
        shutil.copytree(runs / "vgg08-seed1", runs / f"vgg08-seed{seed}")
    shutil.copytree(runs / "vgg38", runs / "vgg08-seed5")  # that has an epoch less
    added = {"": {"data_checksum": 1}, "-seed2": {"wd": 0.01}}
    added |= {"-seed4": {"data_checksum": 2, "seed": 4}, "-seed5": {"blocks": 0, "seed": 5}}
    added |= {"-seed6": {"smooth": 0.1, "seed": 6}}  # a flag of a fork, or one that is gone
    for suffix, settings in added.items():
        path = runs / f"vgg08{suffix}/config.json"
        config = read_json(path)
        config["settings"] |= settings
        path.write_text(json.dumps(config))
    found = plot.read_seeds(runs, "vgg08")
    assert [run["config"]["settings"]["seed"] for run in found] == [0, 1]
    assert plot.note(found).endswith("2 seeds, 5 left out")
    assert capsys.readouterr().out.count("left out") == 5 and not any(r["paper"] for r in found)
    config = (runs / "vgg38/config.json").read_text().replace('"wd": 0.0', '"wd": 0.01')
    (runs / "vgg38/config.json").write_text(config)  # not sweep.sh's vgg38
    assert plot.note(plot.read_seeds(runs, "vgg38")).endswith(", 1 seed, wd 0.01")


def test_what_counts_as_cifar100():
    others = [("cifar100", 100, 100), ("cifar100_lt.npz", None, 100), ("cifar100.npz", None, 20)]
    for data, limit, classes in [("cifar100", None, 100), *others]:
        run = {"config": {"settings": {"data": data, "limit": limit}, "classes": classes}}
        assert plot.is_cifar100(run) == ((data, limit, classes) not in others)


def test_compare_any_runs(runs, tmp_path, capsys):
    shutil.copytree(runs / "vgg08", tmp_path / "other/vgg08")
    names = [runs / "vgg08", runs / "vgg38", runs / "none", tmp_path / "other/vgg08"]
    plot.main([*map(str, names), "--out", str(tmp_path / "out")])
    drawn = {f.name for f in (tmp_path / "out").iterdir()}
    assert drawn == {"compare.png", "compare_gradients.png"}
    out = capsys.readouterr().out
    assert "val acc %" in out and f"{tmp_path}/other/vgg08" in out
    assert f"left out, because it has no log.csv: {runs}/none" in out


def test_a_vanished_gradient_is_seen(runs, monkeypatch):
    """The logarithmic axis reaches from the smallest gradient to the largest."""
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure))
    run = plot.read_run(runs / "vgg38")
    del run["config"]["settings"]["stages"]  # a fork's network has other flags
    run["grads"] = {f"blocks.{i}.conv1": np.array([10.0 ** (i - 18)]) for i in range(16)}
    plot.gradient_flow([run], "", None)
    linear, log = drawn[0].axes[:2]
    assert linear.get_yscale() == "linear" and log.get_yscale() == "log"
    assert log.get_ylim()[0] < 1e-18 and log.get_ylim()[1] >= 1e-3
    np.testing.assert_allclose(log.lines[0].get_ydata(), [10.0 ** (i - 18) for i in range(16)])


# ---- results/


def test_the_image_vanishes_from_the_plain_net_alone():
    (images, labels), *_ = train.load_data("synthetic")
    images = train.normalise(images[:16]).double()
    for name, options in vanishing.NETS.items():
        differs, _, gradient, left = vanishing.measure(images, labels[:16], **options)
        assert len(differs) == 38 and differs[0] > 0.1 and gradient[-1] > 1e-4
        assert left[-1] > 0.99 and (left[0] < 0.1 if name == "batch norm" else left[0] > 0.7)
        if name == "plain":
            assert differs[-1] < 1e-12 and gradient[0] < 1e-16
        else:
            assert differs[-1] > 1e-3 and gradient[0] > 1e-9


def test_same_images_restores_the_order():
    images, labels, *_ = train.synthetic(200, 1)
    images[7], labels[7] = images[3], labels[3]  # the same image twice
    order = same_images.keys(images, labels)
    shuffle = np.random.RandomState(0).permutation(200)
    index = same_images.order_as(order, same_images.keys(images[shuffle], labels[shuffle]))
    assert np.array_equal(images[shuffle][index], images)
    with pytest.raises(SystemExit, match="not all of it"):
        same_images.order_as(order, same_images.keys(images, (labels + 1) % 100))
    assert np.load(HERE / "results/order.npy").shape == (60_000,)


@pytest.mark.parametrize("weights", sorted(HERE.glob("results/weights/*.pt")), ids=lambda p: p.stem)
def test_published_weights_are_their_runs(weights):
    run = HERE / "results/runs" / weights.stem
    config, result = read_json(run / "config.json"), read_json(run / "result.json")
    state = torch.load(weights, weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state.values())
    network = ("stages", "blocks", "filters", "bn", "residual", "act")
    model = VGG(**{key: config["settings"][key] for key in network})
    model.load_state_dict(state)
    assert sum(p.numel() for p in model.parameters()) == config["parameters"]
    assert result["epochs"] == 100
    steps = result["best"]["epoch"] * config["steps_per_epoch"]
    assert state["norm.num_batches_tracked"] == steps  # they are of the best epoch


def test_readme_shows_the_results():
    """README's main table is that of tables.md, which plot.py makes of results/runs."""
    tables = (HERE / "results/tables.md").read_text(encoding="utf-8")
    assert tables == plot.tables(plot.read_all(HERE / "results/runs"))
    main = tables.split("\n## ")[1].split("\n\n")[1].strip()
    assert main.count("\n") == 17
    assert main in (HERE / "README.md").read_text(encoding="utf-8")
