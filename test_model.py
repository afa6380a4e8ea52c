"""pytest -q: under two minutes on two cores, no network, no data set."""

import csv
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
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
TINY = "--blocks 0 --filters 8 --batch-size 40 --device cpu".split()
FILES = {"config.json", "log.csv", "grads.csv", "last.pt", "best.pt", "result.json"}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def figures(run):
    """What an interruption must not change: log.csv without timings, grads.csv, and weights."""
    log = [
        {k: v for k, v in row.items() if k not in ("seconds", "steps_per_s")}
        for row in rows(run / "log.csv")
    ]
    return (
        log,
        (run / "grads.csv").read_text(),
        torch.load(run / "last.pt")["model"],
        torch.load(run / "best.pt"),
    )


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


def command(*args, **options):
    line = [sys.executable, HERE / "train.py", *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, **options)


@pytest.fixture(scope="session")
def npz(tmp_path_factory):
    """300 training and 100 test images of ten classes, a few of the synthetic set's."""
    x, y, test_x, test_y = train.synthetic(300, 100, 10)
    path = tmp_path_factory.mktemp("data") / "ten.npz"
    np.savez(path, train_images=x, train_labels=y, test_images=test_x, test_labels=test_y)
    return path


# ---- model.py


@pytest.mark.parametrize("name", plot.PAPER)
def test_sweep_builds_the_papers_models(name):
    listed = subprocess.run(
        ["bash", HERE / "sweep.sh", "--list"], capture_output=True, text=True, check=True
    ).stdout
    lines = {line.split()[0]: line.split()[1:] for line in listed.splitlines()}
    assert [line for line in lines if line in plot.PAPER] == list(plot.PAPER)
    args, *_ = train.parse_args([*lines[name], "--device", "cpu"])
    options = {key: getattr(args, key) for key in ("bn", "residual", "act", "filters")}
    model = VGG(stages=args.stages, blocks=args.blocks, **options)
    parameters = sum(p.numel() for p in model.parameters())
    assert (model.num_layers, parameters) == plot.PAPER[name][1:3]
    layers = model.weight_layers()
    assert list(layers)[0] == "conv" and list(layers)[1] == "norm" and list(layers)[-1] == "linear"
    assert len(layers) == model.num_layers + (
        1 if not args.bn else model.num_layers - 1
    )  # a norm after every conv, or only the first


@pytest.mark.parametrize("act", ["leaky_relu", "sigmoid"])
@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_forward_is_algorithm_1(bn, residual, act):
    torch.manual_seed(1)
    model = VGG(
        stages=2, blocks=1, filters=8, bn=bn, residual=residual, act=act, classes=7
    ).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # away from the identity that a new BatchNorm is
    x, p = torch.randn(5, 3, 32, 32, dtype=torch.float64), dict(model.named_parameters())
    f = torch.sigmoid if act == "sigmoid" else lambda t: torch.where(t > 0, t, 0.01 * t)

    def norm(t, name):
        if name + ".weight" not in p:
            return t
        mean, var = t.mean((0, 2, 3), keepdim=True), t.var((0, 2, 3), keepdim=True, correction=0)
        return (t - mean) / (var + 1e-5).sqrt() * p[name + ".weight"][:, None, None] + p[
            name + ".bias"
        ][:, None, None]

    def halve(t):
        return (t[..., ::2, ::2] + t[..., 1::2, ::2] + t[..., ::2, 1::2] + t[..., 1::2, 1::2]) / 4

    h = f(norm(F.conv2d(x, p["conv.weight"], padding=1), "norm"))
    for i, reduce in enumerate([False, True, False, True]):
        b = f"blocks.{i}."
        assert (b + "conv1.bias" in p) == (b + "conv2.bias" in p) == reduce and (
            b + "norm1.weight" in p
        ) == bn
        out = f(
            norm(
                F.conv2d(h, p[b + "conv1.weight"], p.get(b + "conv1.bias"), padding=1), b + "norm1"
            )
        )
        if reduce:
            out, h = halve(out), halve(h)
        out = norm(
            F.conv2d(out, p[b + "conv2.weight"], p.get(b + "conv2.bias"), padding=1), b + "norm2"
        )
        h = f(out + h if residual else out)
    torch.testing.assert_close(model(x), h.mean((2, 3)) @ p["linear.weight"].T + p["linear.bias"])


def test_plain_vgg38_vanishes_and_resnet_does_not():
    def flow(bf16=False, **options):
        torch.manual_seed(0)
        model = VGG(stages=3, blocks=5, **options)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(torch.randn(16, 3, 32, 32)).float()
        F.cross_entropy(logits, torch.arange(16)).backward()
        return [layer.weight.grad.abs().mean().item() for layer in model.weight_layers().values()]

    plain, resnet = flow(), flow(bn=True, residual=True)
    assert (
        np.abs(np.log2(np.divide(flow(bf16=True), plain))).max() < 1
    )  # bf16 neither makes it nor hides it: within 2 over 14 decades
    assert 0 < plain[0] < 1e-12 * resnet[0] and resnet[0] > 1e-3
    assert plain[-1] > 1e-5  # the last layers do get a gradient


def test_model_refuses_what_it_cannot_build():
    for options in (
        {"stages": 6, "blocks": 1},
        {"stages": 3, "blocks": -1},
        {"stages": 3, "blocks": 1, "act": "none-such"},
    ):
        with pytest.raises(ValueError):
            VGG(**options)


# ---- train.py: its parts


def test_split_is_the_papers():
    kept, held_out = train.split_indices(50_000)
    assert len(kept) == 47_500 and len(held_out) == 2_500 and not set(kept) & set(held_out)
    # RandomState(0).choice(50000, 47500, replace=False), written down
    assert kept[:8].tolist() == [11841, 19602, 45519, 25747, 42642, 31902, 30346, 12363]
    assert int((kept * np.arange(47_500) % 1_000_003).sum()) == 23_676_587_094
    assert held_out[:8].tolist() == [52, 55, 63, 81, 93, 99, 100, 110]
    assert [len(part) for part in train.split_indices(300)] == [285, 15]


def test_learning_rates():
    ours = [train.cosine_lr(e, 100, 1e-3, 2e-5) for e in range(100)]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    schedule, theirs = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=2e-5),
        [],
    )
    for _ in range(100):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    assert ours[0] == 1e-3 and ours[50] == pytest.approx(5.1e-4) and 2e-5 < ours[99] < 2.03e-5


def test_augmentation_is_pad_crop_flip():
    n = 4000
    images = torch.randint(
        1, 256, (n, 3, 32, 32), dtype=torch.uint8
    )  # no zeros: what is black comes from the padding
    padded, plan = F.pad(images, [4] * 4), train.draw(n, torch.Generator().manual_seed(5))
    out = train.augment(padded, plan)
    assert out.dtype == torch.uint8 and sorted(plan[0].tolist()) == list(range(n))
    seen = {}
    for i, (source, row, column, flip) in enumerate(plan.T.tolist()):
        crop = padded[source, :, row : row + 32, column : column + 32]
        assert torch.equal(out[i], crop.flip(2) if flip else crop)
        seen[row, column, flip] = seen.get((row, column, flip), 0) + 1
    assert len(seen) == 9 * 9 * 2  # every offset occurs, mirrored and not, and evenly:
    chi2 = sum((count - n / 162) ** 2 / (n / 162) for count in seen.values())
    assert 161 - 5 * math.sqrt(2 * 161) < chi2 < 161 + 5 * math.sqrt(2 * 161)
    assert plan[0].tolist() != train.draw(n, torch.Generator().manual_seed(6))[0].tolist()
    i = plan[1].argmin()  # a crop from the top: its first row is normalised black
    black = [-m / s for m, s in zip(train.MEAN, train.STD)]
    torch.testing.assert_close(
        train.normalise(out[i : i + 1])[0, :, 0], torch.tensor(black)[:, None].expand(3, 32)
    )


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
        images, labels = (
            data[f"{part}_images"].transpose(0, 3, 1, 2).reshape(-1, 3072),
            data[f"{part}_labels"].tolist(),
        )
        (folder / part).write_bytes(
            pickle.dumps(
                {"data": images, "fine_labels": labels, "coarse_labels": [0] * len(labels)}
            )
        )
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(10)]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    for (x, y), (x2, y2) in zip(
        train.load_data("cifar100", tmp_path), train.load_data(str(npz)), strict=True
    ):
        assert (
            torch.equal(x, x2)
            and torch.equal(y, y2)
            and x.dtype == torch.uint8
            and x.shape[1:] == (3, 32, 32)
        )
    kept, _ = train.split_indices(300)
    (x, y), *_ = train.load_data(str(npz))
    assert np.array_equal(
        x.permute(0, 2, 3, 1).numpy(), data["train_images"][kept]
    ) and np.array_equal(y, data["train_labels"][kept])


# ---- train.py: whole runs


def test_a_run_is_the_papers_recipe(npz, tmp_path):
    """Two epochs against a plain loop: ordinary Adam, images cropped one by one.

    Without batch norm in the blocks, which would amplify rounding (results/README.md).
    """
    train.main(
        [
            *TINY,
            "--data",
            str(npz),
            "--epochs",
            "2",
            "--wd",
            "1e-2",
            "--lr-scale",
            "2",
            "--precision",
            "fp32",
            "--seed",
            "3",
            "--residual",
            "--out",
            str(tmp_path),
            "--name",
            "a",
        ]
    )
    (images, labels), (val, val_labels), (test, test_labels) = train.load_data(str(npz))
    torch.manual_seed(3)
    model = VGG(stages=3, blocks=0, filters=8, residual=True, classes=10)
    optimizer, best = torch.optim.Adam(
        model.parameters(), lr=1e-3, weight_decay=1e-2, foreach=False
    ), (-1, None)
    for epoch, (row, grads) in enumerate(
        zip(rows(tmp_path / "a/log.csv"), rows(tmp_path / "a/grads.csv"), strict=True)
    ):
        optimizer.param_groups[0]["lr"] = lr = (
            4e-5 + (2e-3 - 4e-5) * (1 + math.cos(math.pi * epoch / 2)) / 2
        )
        plan, losses, hits = (
            train.draw(285, torch.Generator().manual_seed(3 * 1_000_003 + epoch)),
            [],
            [],
        )
        for start in range(0, 285, 40):
            crops = [
                F.pad(images[i], [4] * 4)[:, r : r + 32, c : c + 32]
                for i, r, c, _ in plan[:, start : start + 40].T.tolist()
            ]
            crops = [x.flip(2) if m else x for x, m in zip(crops, plan[3, start : start + 40])]
            logits, y = (
                model(train.normalise(torch.stack(crops))),
                labels[plan[0, start : start + 40]],
            )
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            hits.append(100 * (logits.argmax(1) == y).float().mean().item())
        model.eval()
        with torch.no_grad():
            logits = model(train.normalise(val))
        acc = 100 * (logits.argmax(1) == val_labels).float().mean().item()
        theirs = [
            epoch + 1,
            lr,
            np.mean(losses),
            np.mean(hits),
            F.cross_entropy(logits, val_labels).item(),
            acc,
            torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item(),
        ]
        np.testing.assert_allclose([float(v) for v in list(row.values())[:7]], theirs, rtol=2e-3)
        np.testing.assert_allclose(
            [float(v) for v in list(grads.values())[1:]],
            [m.weight.grad.abs().mean().item() for m in model.modules() if hasattr(m, "weight")],
            rtol=1e-2,
        )
        with torch.no_grad():
            best = max(
                best,
                (acc, F.cross_entropy(model(train.normalise(test)), test_labels).item()),
                key=lambda pair: pair[0],
            )
        model.train()
    assert json.loads((tmp_path / "a/result.json").read_text())["test_loss"] == pytest.approx(
        best[1], rel=2e-3
    )


def test_learns_the_synthetic_set(tmp_path, capsys):
    args = [
        "--data",
        "synthetic",
        "--blocks",
        "0",
        "--bn",
        "--residual",
        "--epochs",
        "2",
        "--lr",
        "5e-3",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    train.main(args)
    run = tmp_path / "vgg08_blocks=0_bn_residual_epochs=2_lr=0.005_data=synthetic"
    assert {path.name for path in run.iterdir()} >= FILES
    result, log = json.loads((run / "result.json").read_text()), rows(run / "log.csv")
    assert (
        result["final"]["val_acc"] > 30 > 3 > float(log[0]["lr"]) and result["test_acc"] > 30
    )  # chance is 1 %
    assert (
        list(log[0])
        == "epoch lr train_loss train_acc val_loss val_acc grad_norm seconds steps_per_s".split()
    )
    assert len(rows(run / "grads.csv")[0]) == 1 + 8 + 7 and all(
        float(v) > 0 for v in rows(run / "grads.csv")[1].values()
    )
    assert (result["parameters"], result["layers"], result["diverged"]) == (60_100, 8, False)
    # best.pt gives the figures of result.json
    model = VGG(stages=3, blocks=0, bn=True, residual=True)
    model.load_state_dict(torch.load(run / "best.pt"))
    _, _, test = train.load_data("synthetic")
    bf16 = json.loads((run / "config.json").read_text())["settings"]["precision"] == "bf16"
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    np.testing.assert_allclose(
        train.evaluate(model, *test, autocast).tolist(),
        [result["test_loss"], result["test_acc"]],
        rtol=1e-2,
    )
    # the same command again trains nothing
    before, _ = (run / "last.pt").stat().st_mtime_ns, capsys.readouterr()
    train.main(args)
    assert (
        "is finished" in capsys.readouterr().out and (run / "last.pt").stat().st_mtime_ns == before
    )


def test_killed_and_continued_is_the_same(npz, tmp_path):
    args = [*TINY, "--data", str(npz), "--bn", "--blocks", "2", "--epochs", "20", "--wd", "1e-3"]
    train.main([*args, "--out", str(tmp_path / "whole"), "--name", "a"])
    process = subprocess.Popen(
        [sys.executable, HERE / "train.py", *args, "--out", tmp_path / "killed", "--name", "a"]
    )
    killed, deadline = tmp_path / "killed/a", time.time() + 60
    while not (killed / "last.pt").exists() and time.time() < deadline:
        time.sleep(0.005)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (
        not (killed / "result.json").exists() and 1 <= len(rows(killed / "log.csv")) < 20
    )  # it was killed in the middle
    torch.load(killed / "best.pt"), torch.load(killed / "last.pt"), rows(killed / "grads.csv")
    train.main([*args, "--out", str(tmp_path / "killed"), "--name", "a"])
    (log, grads, last, best), (log2, grads2, last2, best2) = figures(tmp_path / "whole/a"), figures(
        killed
    )
    assert (
        log == log2
        and len(log) == 20
        and grads == grads2
        and same(last, last2)
        and same(best, best2)
    )


def test_ctrl_c_says_how_to_go_on(npz, tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            HERE / "train.py",
            *TINY,
            "--data",
            npz,
            "--epochs",
            "1000",
            "--out",
            tmp_path,
            "--name",
            "a",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "a/last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.count("\n") <= 2 and "without --fresh) goes on" in err


def test_diverged_is_a_result(npz, tmp_path):
    args = [
        *TINY,
        "--data",
        str(npz),
        "--lr",
        "1e12",
        "--epochs",
        "5",
        "--out",
        str(tmp_path),
        "--name",
        "a",
    ]
    train.main(args)
    result = json.loads(
        (tmp_path / "a/result.json").read_text(),
        parse_constant=lambda name: pytest.fail(f"{name} is not JSON"),
    )
    assert (
        result["diverged"] is True
        and result["epochs"] < 5
        and result["final"]["train_loss"] is None
    )
    train.main(args)  # finished, as any other


def test_other_settings_fresh_and_limit(npz, tmp_path, capsys):
    args = [*TINY, "--data", str(npz), "--epochs", "1", "--out", str(tmp_path), "--name", "a"]
    train.main([*args, "--limit", "50", "--no-augment"])
    assert (
        json.loads((tmp_path / "a/config.json").read_text())["steps_per_epoch"] == 2
        and "50 training, 15 validation, 50 test images" in capsys.readouterr().out
    )
    before = (tmp_path / "a/last.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train.main(args)
    err = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and err.count("\n") == 1
        and "was made with" in err
        and (tmp_path / "a/last.pt").read_bytes() == before
    )
    train.main([*args, "--fresh"])
    assert json.loads((tmp_path / "a/config.json").read_text())["settings"]["limit"] is None


def test_a_new_flag_disowns_no_earlier_run(npz, tmp_path, monkeypatch, capsys):
    """What a run's config.json and last.pt do not have yet counts as the flag's default."""
    args = [*TINY, "--data", str(npz), "--epochs", "1", "--out", str(tmp_path), "--name", "a"]
    train.main(args)
    state, config = torch.load(tmp_path / "a/last.pt"), json.loads(
        (tmp_path / "a/config.json").read_text()
    )
    del state["settings"]["wd"], config["settings"]["wd"]  # as if --wd were new
    torch.save(state, tmp_path / "a/last.pt")
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    (tmp_path / "a/result.json").unlink()
    train.main(args)
    assert "1 epochs done" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        train.main([*args, "--wd", "1"])
    assert stop.value.code == 2 and "made with wd 0.0, not 1.0" in capsys.readouterr().err
    (tmp_path / "a/result.json").unlink()
    (tmp_path / "a/config.json").unlink()  # last.pt knows too
    with pytest.raises(SystemExit) as stop:
        train.main([*args, "--seed", "1"])
    assert stop.value.code == 2 and "made with seed 0, not 1" in capsys.readouterr().err


def test_every_flag_is_a_setting_but_those_named(capsys):
    args, settings = train.parse_args(["--device", "cpu"])
    assert vars(args).keys() - settings.keys() == set(train.NO_SETTINGS)


def test_changed_code_is_told_and_a_continued_run_says_what_made_it(
    npz, tmp_path, monkeypatch, capsys
):
    args = [*TINY, "--data", str(npz), "--epochs", "1", "--out", str(tmp_path), "--name", "a"]
    train.main(args)
    train.main(args)
    assert "note:" not in capsys.readouterr().out
    monkeypatch.setattr(train, "code_version", lambda: ("changed", "c0ffee"))
    train.main(args)
    assert "note: " in capsys.readouterr().out
    (tmp_path / "a/result.json").unlink()
    train.main(args)
    made_by = json.loads((tmp_path / "a/result.json").read_text())["made_by"]
    assert len(made_by) == 2 and made_by[1].endswith("c0ffee") and torch.__version__ in made_by[0]


def test_one_process_a_folder(npz, tmp_path):
    (tmp_path / "a").mkdir()
    with FileLock(tmp_path / "a/.lock"), pytest.raises(SystemExit) as stop:
        train.main([*TINY, "--data", str(npz), "--out", str(tmp_path), "--name", "a"])
    assert "another process trains" in stop.value.code and "\n" not in stop.value.code


def test_labels_of_any_integer_type(npz, tmp_path):
    data = dict(np.load(npz))
    for dtype in (">i4", "uint8", "uint64"):
        np.savez(tmp_path / "x.npz", **{**data, "train_labels": data["train_labels"].astype(dtype)})
        (_, labels), *_ = train.load_data(str(tmp_path / "x.npz"))
        assert labels.dtype == torch.int64 and torch.equal(labels, train.load_data(str(npz))[0][1])


def test_default_names_differ_when_settings_do():
    variants = [
        "",
        "--blocks 6",
        "--stages 2 --blocks 8",
        "--bn",
        "--residual",
        "--act sigmoid",
        "--epochs 5",
        "--batch-size 50",
        "--lr 1e-2",
        "--lr-min 0",
        "--lr-scale 5",
        "--wd 1e-3",
        "--wd 1e-4",
        "--seed 1",
        "--no-augment",
        "--data synthetic",
        "--data a/b.npz",
        "--limit 5",
        "--precision fp32",
        "--filters 8",
    ]
    names = [
        train.parse_args([*variant.split(), "--device", "cpu"])[0].name for variant in variants
    ]
    assert len(set(names)) == len(variants) and all("/" not in name for name in names)
    assert (
        train.parse_args(["--out", "x", "--fresh", "--wd", "0", "--device", "cpu"])[0].name
        == names[0]
        == "vgg38"
    )


@pytest.mark.parametrize(
    "flags",
    [
        "--stages 6",
        "--stages 0",
        "--blocks -1",
        "--epochs 0",
        "--batch-size x",
        "--lr nan",
        "--wd -1",
        "--act none-such",
        "--nonsense",
        "--data none-such",
        "--name a/b",
        "--device mps",
        "--device gpu",
        "--lr inf",
        "--precision fp16",
        "--seed 1.5",
        "--name ..",
        "--limit 0",
        "--stages 5 --bn --limit 41 --batch-size 40 --data NPZ",
        "--stages 5 --bn --batch-size 1 --data NPZ",
    ],
)
def test_wrong_flags_are_one_line_and_status_2(flags, npz, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*flags.replace("NPZ", str(npz)).split(), "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert (
        stop.value.code == 2
        and err.count("\n") == 1
        and err.startswith("train.py: ")
        and not list(tmp_path.iterdir())
    )


def test_broken_files_are_one_line_and_status_1(npz, tmp_path, monkeypatch):
    def message(*args):
        with pytest.raises(SystemExit) as stop:
            train.main(
                [*TINY, "--out", str(tmp_path), "--name", "a", "--epochs", "2", *map(str, args)]
            )
        assert (
            isinstance(stop.value.code, str) and "\n" not in stop.value.code
        )  # sys.exit(line): printed to stderr, status 1
        return stop.value.code

    (tmp_path / "bad.npz").write_bytes(b"not a zip file")
    data = dict(np.load(npz))
    np.savez(tmp_path / "shape.npz", **{**data, "train_images": data["train_images"][:, :16]})
    np.savez(tmp_path / "keys.npz", images=data["train_images"])
    np.savez(tmp_path / "length.npz", **{**data, "test_labels": data["test_labels"][:-1]})
    np.savez(tmp_path / "absurd.npz", **{**data, "test_labels": np.full(100, 2**31)})
    np.savez(tmp_path / "objects.npz", **{**data, "test_labels": np.array([None] * 100)})
    for name in ("bad", "shape", "keys", "length", "absurd", "objects", "missing"):
        assert f"{name}.npz cannot be used" in message("--data", tmp_path / f"{name}.npz")

    def offline(*args, **kwargs):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr("torchvision.datasets.CIFAR100", offline)
    line = message("--data", "cifar100")
    assert "FILE.npz" in line and "synthetic" in line and not (tmp_path / "a").exists()

    train.main([*TINY, "--out", str(tmp_path), "--name", "a", "--epochs", "2", "--data", str(npz)])
    (tmp_path / "a/result.json").unlink()
    whole = (tmp_path / "a/last.pt").read_bytes()
    for broken in (whole[:1000], b"", b"PK" + whole[2:3000]):
        (tmp_path / "a/last.pt").write_bytes(broken)
        assert (
            "--fresh" in message("--data", npz) and (tmp_path / "a/last.pt").read_bytes() == broken
        )
    torch.save({"model": {}}, tmp_path / "a/last.pt")
    assert "--fresh" in message("--data", npz)
    (tmp_path / "a/last.pt").write_bytes(whole)
    (tmp_path / "a/config.json").write_text("{")
    assert "--fresh" in message("--data", npz)


def test_full_disk_and_unwritable_folder(npz, tmp_path):
    args = [*TINY, "--data", npz, "--epochs", "3", "--name", "a", "--out", tmp_path / "runs"]
    limit = lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000, 20_000)
    )  # config.json fits, last.pt does not
    failed = command(*args, preexec_fn=limit)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "goes on" in failed.stderr
    assert {path.name for path in (tmp_path / "runs/a").glob("*")} & {
        "last.pt",
        "last.pt.tmp",
    } == set()  # and no half-written file
    assert command(*args).returncode == 0
    failed = command(*args, "--out", npz)
    assert (
        failed.returncode == 1
        and failed.stderr.count("\n") == 1
        and "Traceback" not in failed.stderr
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_trains_as_eager_steps_do(npz, tmp_path):
    for name, flags in (("graph", []), ("eager", ["--no-graph"])):
        train.main(
            [
                "--blocks",
                "1",
                "--bn",
                "--residual",
                "--batch-size",
                "40",
                "--data",
                str(npz),
                "--epochs",
                "4",
                "--precision",
                "fp32",
                "--device",
                "cuda",
                "--out",
                str(tmp_path),
                "--name",
                name,
                *flags,
            ]
        )
    for graph, eager in zip(rows(tmp_path / "graph/log.csv"), rows(tmp_path / "eager/log.csv")):
        np.testing.assert_allclose(
            float(graph["train_loss"]), float(eager["train_loss"]), rtol=0.02
        )


# ---- sweep.sh


@pytest.fixture
def sweep(tmp_path):
    """Starts sweep.sh with a python that prints its arguments and runs CODE (shell)."""

    def start(*args, code="", **env):
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\necho "$@"\n{code}\n')
        python.chmod(0o755)
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **env}
        options = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        command = ["bash", HERE / "sweep.sh", *args]
        return subprocess.Popen(command, text=True, cwd=tmp_path, env=env, **options)

    return start


def ended(process):
    """(status, stdout, stderr) of a process, once it has ended."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_sweep_runs_the_papers_runs_and_names_the_failed(sweep):
    code = 'case "$*" in *"--name vgg38_bn --"*) exit 1 ;; esac'
    status, out, err = ended(sweep(code=code))
    assert re.findall(r"--name (\S+) --seed 0", out) == list(plot.PAPER)[:16]
    assert status == 1 and "failed: vgg38_bn\n" in err


def test_sweep_hands_on_flags_jobs_seeds_and_slurms_task(sweep):
    process = sweep("vgg08", "vgg106", "--", "--out", "a b", JOBS="2", SEEDS="0 7")
    status, out, _ = ended(process)
    runs = [("vgg08", "0"), ("vgg08-seed7", "7"), ("vgg106", "0"), ("vgg106-seed7", "7")]
    assert sorted(re.findall(r"--name (\S+) --seed (\d)", out)) == runs
    assert status == 0 and out.count("--out a b") == 4
    _, out, _ = ended(sweep(SLURM_ARRAY_TASK_ID="11"))
    assert "--name vgg38_rn_lr100 --seed 0 --bn --residual --wd 1e-3 --lr-scale 100" in out
    _, out, _ = ended(sweep(SLURM_ARRAY_TASK_ID="17"))
    assert re.findall(r"--name (\S+)", out) == ["vgg106"]


def test_sweep_shows_lines_as_they_come(sweep, tmp_path):
    process = sweep("vgg08", code=f"sleep 2; touch '{tmp_path}/ended'", JOBS="2")
    assert process.stdout.readline().startswith("vgg08: ")
    assert not (tmp_path / "ended").exists()
    assert ended(process)[1] == "sweep.sh: all done\n" and (tmp_path / "ended").exists()


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_sweep_that_is_ended_ends_its_runs_and_starts_no_more(sweep, tmp_path, jobs):
    code = f"trap 'echo last words; exit 130' TERM; sleep 30 & wait; touch '{tmp_path}/ended'"
    process = sweep("vgg08", "vgg38", "vgg68", code=code, JOBS=jobs)
    while "--name" not in process.stdout.readline():
        pass
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    status, out, _ = ended(process)
    assert status == 130 and "last words" in out and "vgg68" not in out


def test_sweep_refuses_what_it_does_not_know(sweep):
    wrong = [sweep("none-such"), sweep(JOBS="0"), sweep(SEEDS="a"), sweep(SEEDS=" ")]
    for process in [*wrong, sweep(SLURM_ARRAY_TASK_ID="1000")]:
        status, out, err = ended(process)
        assert status == 2 and err.count("\n") == 1 and not out


# ---- plot.py


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """vgg08 with three seeds of 2 epochs, and vgg38 stopped after 1 of 2."""
    out = tmp_path_factory.mktemp("runs")
    args = ["--data", "synthetic", "--limit", "100", "--device", "cpu", "--out", str(out)]
    for seed in range(3):
        name = f"vgg08-seed{seed}" if seed else "vgg08"
        flags = ["--blocks", "0", "--epochs", "2", "--name", name, "--seed", str(seed)]
        train.main([*args, *flags])
    train.main([*args, "--epochs", "2", "--name", "vgg38"])
    (out / "vgg38/result.json").unlink()
    for file in ("log.csv", "grads.csv"):
        lines = (out / "vgg38" / file).read_text().splitlines(keepends=True)
        (out / "vgg38" / file).write_text("".join(lines[:2]))
    return out


def table(path, number=0):
    """{first cell: cells} of a table of tables.md."""
    lines = path.read_text(encoding="utf-8").split("\n## ")[number + 1].splitlines()[4:]
    cells = [line.strip("| ").split(" | ") for line in lines if line]
    return {row[0]: row for row in cells}


def test_tables_and_figures(runs, tmp_path, capsys):
    plot.main(["--runs", str(runs), "--out", str(tmp_path)])
    drawn = {"figure1.png", "annex_a.png", "figure2.png"}  # of the runs that are there
    assert {f.name for f in tmp_path.iterdir()} == drawn | {"tables.md"}
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in tmp_path.glob("*.png"))
    cells = table(tmp_path / "tables.md")
    finals = [rows(runs / name / "log.csv")[-1] for name in ("vgg08", "vgg08-seed1", "vgg08-seed2")]
    values = [float(row["val_acc"]) for row in finals]
    assert cells["VGG08"][3] == "48.60"
    assert cells["VGG08"][4] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    assert cells["VGG08"][-1] == "2 epochs, short, 3 seeds"
    assert cells["VGG38"][-1] == "1 of 2 epochs, 1 seed"
    assert cells["VGG38"][8] == f"{float(rows(runs / 'vgg38/log.csv')[0]['val_loss']):.2f}"
    assert cells["VGG68"][1:] == ["86.86", "–", "66.76", "–", "0.44", "–", "1.30", "–", "–"]
    assert len(cells) == 16
    loss = np.mean(
        [
            float(rows(runs / name / "log.csv")[0]["train_loss"])
            for name in ("vgg08", "vgg08-seed1", "vgg08-seed2")
        ]
    )
    assert table(tmp_path / "tables.md", 3)["VGG08"][1].startswith(f"{loss:.2f} ± ")
    assert f"torch {torch.__version__}" in (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "vgg38_bn" in capsys.readouterr().out


def test_seeds_that_diverged_or_are_broken_are_told(runs, tmp_path, capsys):
    shutil.copytree(runs, tmp_path / "runs")
    diverged = tmp_path / "runs/vgg08-seed2/result.json"
    result = json.loads(diverged.read_text())
    diverged.write_text(json.dumps({**result, "diverged": True}))
    (tmp_path / "runs/vgg08-seed1/config.json").write_text("{")
    shutil.copytree(runs / "vgg08", tmp_path / "runs/vgg08-seed1_old")  # is no seed
    shutil.copytree(runs / "vgg08", tmp_path / "runs/vgg72")  # is another network
    plot.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    cells = table(tmp_path / "out/tables.md")
    assert cells["VGG08"][-1] == "2 epochs, short, 1 seed, 1 more diverged"
    assert cells["VGG72"][-1] == "–"
    left_out = capsys.readouterr().err
    assert left_out.count("\n") == 2 and "vgg08-seed1 cannot" in left_out and "vgg72" in left_out


def test_compare_any_runs_and_bad_ones(runs, tmp_path, capsys):
    plot.main([str(runs / "vgg08"), str(runs / "vgg38"), "--out", str(tmp_path)])
    assert {f.name for f in tmp_path.iterdir()} == {"compare.png", "compare_gradients.png"}
    assert "val acc %" in capsys.readouterr().out
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/log.csv").write_text("epoch,lr\n1,x\n")
    for args in (["--runs", tmp_path / "none"], [tmp_path / "none"], [tmp_path / "broken"], [runs]):
        with pytest.raises(SystemExit) as stop:
            plot.main([*map(str, args), "--out", str(tmp_path)])
        assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    assert "--runs" in stop.value.code


def test_the_papers_own_curves_are_drawn_where_they_are(runs, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(plot, "save", lambda figure, path: kept.append(figure))
    run = plot.read_run(runs / "vgg08")
    plot.curves([[run]], [plot.LOSS], "", None)
    monkeypatch.setattr(plot, "PAPER_LOGS", tmp_path)
    plot.curves([[run]], [plot.LOSS], "", None)
    dashed = [
        [line for line in figure.axes[0].lines if line.get_linestyle() == "--"] for figure in kept
    ]
    assert [len(lines) for lines in dashed] == [3, 0]  # validation, training, and the legend's
    assert len(dashed[0][0].get_xdata()) == 100


def test_a_vanished_gradient_is_seen(tmp_path, monkeypatch):
    """The logarithmic axis reaches from the smallest gradient to the largest."""
    kept = []
    monkeypatch.setattr(plot, "save", lambda figure, path: kept.append(figure))
    run = {
        "grads": {f"blocks.{i}.conv1": np.array([10.0 ** (i - 18)]) for i in range(16)},
        "label": "x",
        "planned": 1,
        "done": 1,
        "diverged": False,
    }
    plot.gradient_flow([run], "", None)
    linear, log = kept[0].axes[:2]
    assert (
        (linear.get_yscale(), log.get_yscale()) == ("linear", "log")
        and log.get_ylim()[0] < 1e-18
        and log.get_ylim()[1] >= 1e-3
    )
    np.testing.assert_allclose(log.lines[0].get_ydata(), [10.0 ** (i - 18) for i in range(16)])


def test_readme_shows_the_results():
    """README's main table is that of tables.md, which plot.py makes of results/runs."""
    tables = (HERE / "results/tables.md").read_text(encoding="utf-8")
    found = {name: plot.read_seeds(HERE / "results/runs", name) for name in plot.PAPER}
    assert tables == plot.tables(found)
    main = tables.split("\n## ")[1].split("\n\n")[1].strip()
    assert main.count("\n") == 17
    assert main in (HERE / "README.md").read_text(encoding="utf-8")
