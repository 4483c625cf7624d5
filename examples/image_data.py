"""Labelled images for tpu_resnet.py: a folder of one folder per class, an .npz file, or made up."""

import functools
import pathlib
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image


class Images(NamedTuple):
    """read(i) is image i, uint8 [size, size, 3]."""

    read: Callable[[int], np.ndarray]
    labels: np.ndarray  # int32 [n], from 0


def load(path: str | None, size: int) -> tuple[Images, Images]:
    """(training, test), a tenth of the images being the test.

    path: a folder of folders of images, where a file that is no image is left out with a warning
        that names it; an .npz file with uint8 `images` [n, height, width, 3] and integer `labels`
        [n]; None for 20,480 made-up images of 10 classes.
    """
    if path is None:
        read, labels = functools.partial(_made_up, size=size), np.arange(20480) % 10
    elif path.endswith(".npz"):
        with np.load(path) as file:
            images, labels = file["images"], file["labels"]
        read = lambda i: _resized(Image.fromarray(images[i]), size)
    else:
        files = _images_in(pathlib.Path(path))
        _, labels = np.unique([p.parent.name for p in files], return_inverse=True)
        read = lambda i: _resized(Image.open(files[i]), size)
    if len(labels) < 10:
        expected = "expected at least 10: one folder per class, images inside"
        raise ValueError(f"{path} holds {len(labels)} images, {expected}")
    order = np.random.default_rng(0).permutation(len(labels))
    parts = order[len(order) // 10 :], order[: len(order) // 10]
    return tuple(
        Images(lambda i, part=part: read(part[i]), labels[part].astype(np.int32)) for part in parts
    )


def batches(
    data: Images, batch_size: int, *, seed: int | None, epoch: int = 0, skip: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """The part that this host loads of each global batch: `image` in [-1, 1] and `label`.

    With a seed the images are shuffled, half of them are mirrored, and an incomplete last batch is
    left out. All this depends on seed and epoch alone, so that a resumed run sees what it would
    have seen. Without a seed the images come in order, and the last batch is filled up with label
    -1.

    skip: batches to leave out at the beginning.
    """
    n = len(data.labels)
    random = np.random.default_rng(None if seed is None else (seed, epoch))
    order = (
        np.arange(-(-n // batch_size) * batch_size)
        if seed is None
        else random.permutation(n)[: n // batch_size * batch_size]
    )
    mirrored = random.random(len(order)) < (0 if seed is None else 0.5)
    share = batch_size // jax.process_count()
    with ThreadPoolExecutor() as pool:
        for start in range(skip * batch_size, len(order), batch_size):
            here = slice(
                start + jax.process_index() * share, start + (jax.process_index() + 1) * share
            )
            images = (
                np.stack(list(pool.map(data.read, order[here] % n))).astype(np.float32) / 127.5 - 1
            )
            images = np.where(mirrored[here, None, None, None], images[:, :, ::-1], images)
            yield {
                "image": images,
                "label": np.where(order[here] < n, data.labels[order[here] % n], -1),
            }


def _images_in(folder):
    """The image files of the folder's folders, by their suffix; warns of any others."""
    suffixes = Image.registered_extensions()
    files = sorted(p for p in folder.glob("*/*") if p.is_file())
    stray = [
        p for p in [*files, *folder.iterdir()] if p.is_file() and p.suffix.lower() not in suffixes
    ]
    if stray:
        names = ", ".join(str(p.relative_to(folder)) for p in stray[:5])
        more = f" and {len(stray) - 5} more" if len(stray) > 5 else ""
        warnings.warn(
            f"left out of {folder}, as their names are no images': {names}{more}", stacklevel=3
        )
    return [p for p in files if p.suffix.lower() in suffixes and not p.name.startswith(".")]


def _made_up(i, size):
    """Noise over eight by eight random tiles that belong to the class."""
    tiles = np.random.default_rng(i % 10).integers(256, size=(8, 8, 3))
    noise = np.random.default_rng(i).normal(0, 48, (size, size, 3))
    picked = np.arange(size) * 8 // size
    return np.clip(tiles[picked][:, picked] + noise, 0, 255).astype(np.uint8)


def _resized(image, size):
    """The largest square in the middle."""
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    box = (left, top, left + short, top + short)
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box))
