"""What a file of numbers holds: the readers of MNIST's IDX files and of a local ``.npz``.

Every reader of the package returns a :class:`Raw`: whole grey levels, not yet scaled, not yet split. A
file that cannot be read, is cut short or holds something else raises :class:`DataError`, which names the
file and the remedy. Nothing is ever unpickled.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["DataError", "Raw", "read_idx", "read_mnist", "read_npz"]

_MAX_ARRAYS = 8 * 2**30  # bytes of one .npz unpacked: against archives made to fill the memory


class DataError(ValueError):
    """Data that cannot be had or cannot be trusted; the message names the file and the remedy."""


class Raw(NamedTuple):
    """A data set as read: ``x[split]`` uint8 (N, C, H, W), ``y[split]`` int64 (N,), class names.

    The splits are ``train``, ``test`` and perhaps ``validation``, or ``pool`` alone.
    """

    x: dict[str, np.ndarray]
    y: dict[str, np.ndarray]
    classes: tuple[str, ...]


def read_idx(path: Path) -> np.ndarray:
    """One gzipped IDX file of unsigned bytes (the format of MNIST): an array of its 1 to 3 dimensions."""
    remedy = "Delete it and load again to fetch it anew."
    try:
        with gzip.open(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}). {remedy}") from error
    # The magic number: two zero bytes, the type (0x08: unsigned byte), the number of dimensions.
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or not 1 <= data[3] <= 3:
        raise DataError(f"{path} is not an IDX file of unsigned bytes: it opens with {data[:4]!r}. {remedy}")
    header = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:header].ljust(header - 4, b"\x00"))
    if len(data) != header + math.prod(shape):
        raise DataError(
            f"{path} announces shape {shape}, {header + math.prod(shape)} bytes, but has {len(data)}. "
            + remedy
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_mnist(files: Mapping[str, Path]) -> Raw:
    """The four IDX files of MNIST or Fashion-MNIST, by their official names: 10 classes, one channel."""
    x, y = {}, {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        path = files[f"{stem}-images-idx3-ubyte.gz"]
        images, labels = read_idx(path), read_idx(files[f"{stem}-labels-idx1-ubyte.gz"])
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or labels.max(initial=0) > 9:
            raise DataError(
                f"{path} and its labels do not fit: images {images.shape}, labels {labels.shape} up to "
                f"{labels.max(initial=0)}. Delete both and load again to fetch them anew."
            )
        x[split], y[split] = images[:, None], labels.astype(np.int64)
    return Raw(x, y, tuple("0123456789"))


def read_npz(path: Path) -> Raw:
    """A local ``.npz``: ``x_train, y_train, x_test, y_test``, and ``x_validation, y_validation`` if wanted.

    Images: uint8 in 0..255, or floats in [0, 1], or in [-1, 1] if any value of any split is negative;
    floats are rounded to the nearest of 256 grey levels. Shapes (N, H, W), (N, H, W, C) or (N, C, H, W)
    with C = 1 or 3; where both readings fit (an image 1 or 3 pixels wide) the channels are taken last.
    Labels: integers 0..K-1, (N,) or (N, 1), each class present in ``y_train``. Other keys are not read.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            splits = ["train", "test"]
            splits += ["validation"] * any(f"{kind}_validation" in archive for kind in "xy")
            keys = [f"{kind}_{split}" for split in splits for kind in "xy"]
            held, missing = archive.files, [key for key in keys if key not in archive]
            _check_sizes(path, archive, [key for key in keys if key in archive])
            arrays = {key: archive[key] for key in keys if not missing}
    except DataError:
        raise
    except Exception as error:  # by the damage OSError, ValueError, BadZipFile, zlib.error, EOFError ...
        raise DataError(
            f"{path} cannot be read as a .npz of plain arrays ({error}). Pickled objects are never loaded; "
            "write it with numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)."
        ) from error
    if missing:
        raise DataError(
            f"{path} lacks {', '.join(missing)}; it has {', '.join(held) or 'nothing'}. "
            "It needs x_train, y_train, x_test, y_test (x_validation and y_validation together, or neither)."
        )
    x = {split: _channels_first(arrays[f"x_{split}"], f"{path}: x_{split}") for split in splits}
    if len({(x[split].shape[1:], x[split].dtype.kind) for split in splits}) > 1:
        raise DataError(
            f"{path}: the splits differ, "
            + ", ".join(f"x_{split} {x[split].dtype} {x[split].shape[1:]}" for split in splits)
            + ". Give all of them one image shape (C, H, W) and one kind of number."
        )
    if x["train"].dtype.kind == "f":
        x = _grey_levels(x, path)
    y = {split: _labels(arrays[f"y_{split}"], len(x[split]), f"{path}: y_{split}") for split in splits}
    present = np.unique(y["train"])
    if present[-1] != len(present) - 1 or any(labels.max() > present[-1] for labels in y.values()):
        raise DataError(
            f"{path}: y_train holds {len(present)} different labels, from {present[0]} to {present[-1]}; "
            "labels must be 0..K-1 in every split, each of them in y_train. "
            "Renumber: numpy.unique(y, return_inverse=True)[1]."
        )
    return Raw(x, y, tuple(str(label) for label in present))


def _check_sizes(path: Path, archive: np.lib.npyio.NpzFile, keys: list[str]) -> None:
    """Refuse arrays that announce more than they hold, or that would fill the memory, before any is made.

    A few kilobytes of zip can unpack to gigabytes, and numpy makes room for whatever shape a header names.
    """
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    total, names = 0, set(archive.zip.namelist())
    for key in keys:
        member = archive.zip.getinfo(key if key in names else f"{key}.npy")
        with archive.zip.open(member) as file:
            version = np.lib.format.read_magic(file)
            if version not in readers:
                raise ValueError(f"{key} is written in version {version} of the format")
            shape, _, dtype = readers[version](file)
        if dtype.hasobject:
            raise ValueError(f"{key} holds objects")
        size = math.prod(shape) * dtype.itemsize
        if size > member.file_size:
            raise DataError(
                f"{path}: {key} announces {size} bytes and holds {member.file_size}. Write it anew."
            )
        total += size
    if total > _MAX_ARRAYS:
        raise DataError(
            f"{path}: {total / 2**30:.1f} GiB of arrays, more than {_MAX_ARRAYS >> 30}. Give fewer."
        )


def _channels_first(x: np.ndarray, what: str) -> np.ndarray:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) of uint8 or finite floats, as (N, C, H, W)."""
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise DataError(
            f"{what} is {x.dtype}; give uint8 in 0..255, by .astype(numpy.uint8), or floats in [0, 1] or "
            "[-1, 1]."
        )
    if x.size == 0 or x.ndim not in (3, 4) or (x.ndim == 4 and not {x.shape[1], x.shape[3]} & {1, 3}):
        raise DataError(
            f"{what} has shape {x.shape}; give (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3, "
            "at least one image; flat rows need .reshape(N, H, W)."
        )
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise DataError(
            f"{what} holds {x.size - np.isfinite(x).sum()} non-finite values. Find them with "
            "numpy.isfinite and drop those images."
        )
    if x.ndim == 3:
        return x[:, None]
    return x.transpose(0, 3, 1, 2) if x.shape[3] in (1, 3) else x


def _grey_levels(x: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """Floats in [0, 1] or [-1, 1], told apart over all splits together, as the nearest of 256 levels."""
    low = min(float(images.min()) for images in x.values())
    high = max(float(images.max()) for images in x.values())
    if low < -1 - 1e-4 or high > 1 + 1e-4:  # the slack: float32 arithmetic overshoots by its last digits
        raise DataError(
            f"{path}: float images span [{low:g}, {high:g}]. Scale all splits to [0, 1] or [-1, 1], or give "
            "uint8."
        )
    offset, scale = (1.0, 127.5) if low < 0 else (0.0, 255.0)
    return {
        split: np.rint((images.astype(np.float64) + offset) * scale).clip(0, 255).astype(np.uint8)
        for split, images in x.items()
    }


def _labels(y: np.ndarray, n: int, what: str) -> np.ndarray:
    """Integer labels as int64 (n,); (n, 1) is accepted since Keras stores CIFAR's so."""
    if y.dtype.kind not in "iu" or y.shape not in ((n,), (n, 1)):
        raise DataError(
            f"{what} is {y.dtype} {y.shape}; {n} images need integer labels of shape ({n},): "
            "class numbers, not one-hot rows or floats."
        )
    if y.min() < 0 or y.max() > np.iinfo(np.int64).max:
        raise DataError(f"{what} holds labels from {y.min()} to {y.max()}. Number the classes 0..K-1.")
    return y.reshape(n).astype(np.int64)
