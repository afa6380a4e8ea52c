"""CIFAR-100 in the order of our runs: `python results/same_images.py SOURCE OUT.npz`.

Our copy has another order than the official archive, so its split draws other validation images.
SOURCE is any copy of CIFAR-100, as train.py's --data takes it (cifar100 downloads it). OUT.npz then
has the training and test images that our runs and weights saw, in their order.
"""
import hashlib
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train


def keys(images, labels):
    """A number an image, (N,) uint64: the start of the SHA-256 of its 3,072 bytes and its label."""
    contents = (x.tobytes() + bytes([y]) for x, y in zip(images, labels))
    starts = [hashlib.sha256(content).digest()[:8] for content in contents]
    return np.frombuffer(b"".join(starts), dtype="<u8")


def order_as(order, found):
    """Indices that put what has the keys `found` into the order of the keys `order`."""
    if not np.array_equal(np.sort(order), np.sort(found)):
        sys.exit("same_images.py: this is not CIFAR-100, or not all of it: some images differ")
    index = np.empty(len(order), int)
    index[np.argsort(order)] = np.argsort(found)  # equal images are interchangeable
    return index


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python results/same_images.py SOURCE OUT.npz")
    parts = train.load_data(sys.argv[1])
    images = torch.cat([x for x, _ in parts]).permute(0, 2, 3, 1).numpy()
    labels = torch.cat([y for _, y in parts]).numpy()
    index = order_as(np.load(Path(__file__).parent / "order.npy"), keys(images, labels))
    images, labels = images[index], labels[index]
    arrays = (images[:50_000], labels[:50_000], images[50_000:], labels[50_000:])
    np.savez(sys.argv[2], **dict(zip(train.ARRAYS, arrays)))
