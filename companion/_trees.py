"""What lies in folders or in a tar: class-named image folders, and the batches of CIFAR-10.

A tar is read in one pass and never unpacked to disk; its paths, kinds and sizes are checked first.
Errors are :class:`companion.data.DataError` as in :mod:`companion._readers`.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from companion._readers import DataError, Raw

__all__ = ["TAR_SUFFIXES", "read_cifar", "read_images"]

#: How a file's name ends that is read as a tar.
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
_SPLITS = {"train": "train", "test": "test", "validation": "validation", "val": "validation"}
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp")
_IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP")  # what Pillow may try, whatever the suffix claims
# Limits against archives made to fill the memory; small-image data sets stay far below them.
_MAX_FILE, _MAX_SIDE, _MAX_DECODED, _MAX_DEPTH = 64 * 2**20, 2048, 4 * 2**30, 8
_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError)
_CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR_RECORD = 1 + 3 * 32 * 32  # one label byte, then the red, green and blue planes row by row

Entry = tuple[tuple[str, ...], bytes | None]  # the parts of a path; a file's bytes, or None for a folder


def read_images(path: Path) -> Raw:
    """Class-named folders of 8-bit images, on disk or in a tar (.gz, .xz, .bz2).

    Either ``train/<class>/*`` and ``test/<class>/*`` (``validation/<class>/*`` if wanted), or ``<class>/*``
    alone, which is returned as one ``pool``; folders above these are allowed if all images share them.
    Classes are numbered in sorted order, images sorted by class and file name, so folder and tar agree.
    All images need one size; a set that mixes grey and colour becomes colour, transparency is dropped.
    Hidden files and files that are no image by their suffix are passed over.
    """
    files = _folder_files(path) if path.is_dir() else _tar_files(path)
    images: dict[tuple[str, ...], np.ndarray] = {}
    folders: set[tuple[str, ...]] = set()
    size, budget = None, _MAX_DECODED
    for parts, data in files:
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            continue  # a desktop's droppings: .DS_Store, ._name.jpg
        if data is None:
            folders.add(parts)
        else:
            where = f"{path}: {'/'.join(parts)}"
            if parts in images:
                raise DataError(f"{where} occurs twice in the archive. Write the archive anew.")
            images[parts] = _decode(data, where, size)
            size = images[parts].shape[1::-1]  # Pillow's order: width, height
            budget -= images[parts].nbytes
            if budget < 0:
                raise DataError(f"{where}: more than {_MAX_DECODED >> 30} GiB of pixels. Give a smaller set.")
    return _arrange(path, images, folders)


def _arrange(path: Path, images: dict[tuple[str, ...], np.ndarray], folders: set[tuple[str, ...]]) -> Raw:
    """Images by their path's parts, sorted into splits and classes."""
    layout = "Expected are train/<class>/*.png and test/<class>/*.png, or <class>/*.png alone (or .jpg)."
    if not images:
        raise DataError(f"{path} holds no image. {layout}")
    occupied = {parts[:i] for parts in images for i in range(len(parts))}
    empty = sorted("/".join(folder) for folder in folders - occupied)
    if empty:
        raise DataError(f"{path}: no image in folder {', '.join(empty)}. Fill it or remove it.")
    heads = {parts[:-2] for parts in images}
    split_of = {head: _SPLITS.get(head[-1].lower()) if head else None for head in heads}
    if None in split_of.values():
        split_of = dict.fromkeys(heads, "pool")
    tops = {head if split == "pool" else head[:-1] for head, split in split_of.items()}
    if len(tops) > 1 or any(len(parts) < 2 for parts in images):
        raise DataError(f"{path}: images lie in folders of different depth or kind. {layout}")
    by_split: dict[str, list[tuple[str, ...]]] = {}
    for parts in sorted(images):
        by_split.setdefault(split_of[parts[:-2]], []).append(parts)
    if "pool" not in by_split and not {"train", "test"} <= by_split.keys():
        raise DataError(f"{path} has {', '.join(by_split)} without train and test both. {layout}")
    classes = tuple(sorted({parts[-2] for parts in by_split.get("pool") or by_split["train"]}))
    number = {name: i for i, name in enumerate(classes)}
    channels = max(image.shape[2] for image in images.values())
    height, width, _ = next(iter(images.values())).shape
    x, y = {}, {}
    for split, members in by_split.items():
        strange = sorted({parts[-2] for parts in members} - number.keys())
        if strange:
            raise DataError(f"{path}: {split} has class {', '.join(strange)}, train has not. Rename it.")
        x[split] = np.empty((len(members), channels, height, width), np.uint8)
        for i, parts in enumerate(members):
            x[split][i] = images.pop(parts).transpose(2, 0, 1)  # (H, W, C) -> (C, H, W); grey is broadcast
        y[split] = np.array([number[parts[-2]] for parts in members], np.int64)
    return Raw(x, y, classes)


def _decode(data: bytes, where: str, size: tuple[int, int] | None) -> np.ndarray:
    """One image file as uint8 (H, W, 1) or (H, W, 3); ``size`` (width, height) is what it must have."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as image:
            found, mode = image.size, image.mode
            # From the header alone, which may announce a size that would fill the memory.
            wanted = max(found) <= _MAX_SIDE and found == (size or found) and mode[0] not in "IF"
            if wanted and mode in ("1", "L", "LA"):
                return np.array(image.convert("L"))[:, :, None]
            if wanted:
                return np.array(image.convert("RGB"))
    except Exception as error:  # by the format OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        raise DataError(f"{where} is not a readable image ({error}). Replace or remove it.") from error
    if mode[0] in "IF":
        raise DataError(f"{where} has mode {mode}, more than 8 bits a channel. Convert the images to 8 bits.")
    if max(found) > _MAX_SIDE:
        raise DataError(f"{where} is {found[0]}x{found[1]}, above {_MAX_SIDE} a side. Scale the images down.")
    raise DataError(f"{where} is {found[0]}x{found[1]}, others {size[0]}x{size[1]}. Scale them to one size.")


def _folder_files(root: Path) -> Iterator[Entry]:
    """The folders below ``root`` and its image files."""
    for folder, subfolders, names in os.walk(root, followlinks=True):
        parts = Path(folder).relative_to(root).parts
        if len(parts) > _MAX_DEPTH:
            raise DataError(f"{folder} lies {len(parts)} folders deep (a link in a circle?). Flatten it.")
        subfolders.sort()
        if parts:
            yield parts, None
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(_IMAGE_SUFFIXES):
                try:
                    yield (*parts, name), Path(folder, name).read_bytes()
                except OSError as error:
                    raise DataError(f"{Path(folder, name)} cannot be read ({error}). Remove it.") from error


def _tar_files(path: Path, names: list[str] | None = None) -> Iterator[Entry]:
    """A tar's folders and its image files, or those of the given ``names``, read in one pass.

    Nothing is written to disk. Absolute paths, ``..``, links, devices and oversized members are refused.
    """
    try:
        with _open_tar(path) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    where, parts = f"{path}: {member.name!r}", member.name.replace("\\", "/").split("/")
                    if parts[0] == "" or parts[0].endswith(":") or ".." in parts:
                        raise DataError(f"{where} points outside the archive. Use an archive you trust.")
                    if not (member.isfile() or member.isdir()):
                        raise DataError(
                            f"{where} is a link or a device, which are never followed. "
                            "Write the archive with the files themselves (tar --dereference)."
                        )
                    parts = tuple(part for part in parts if part not in ("", "."))
                    if member.isdir():
                        if parts:
                            yield parts, None
                    elif parts[-1] in names if names else parts[-1].lower().endswith(_IMAGE_SUFFIXES):
                        if member.size > _MAX_FILE:
                            raise DataError(f"{where} has {member.size} bytes, no small image. Remove it.")
                        yield parts, archive.extractfile(member).read()
            while stream.read(2**20):  # to the end, where gzip and xz keep their checksums
                pass
    except _READ_ERRORS as error:
        raise DataError(
            f"{path} is damaged or cut short ({error or type(error).__name__}). Copy or download it again."
        ) from error


def _open_tar(path: Path) -> BinaryIO:
    """The tar inside ``path``, by its first bytes; tarfile's own stream mode would check no checksum."""
    with open(path, "rb") as file:
        magic = file.read(6)
        file.seek(max(0, os.fstat(file.fileno()).st_size - 1024))
        tail = file.read()
    if magic.startswith(b"\x1f\x8b"):
        return gzip.open(path, "rb")
    if magic.startswith(b"\xfd7zXZ\x00"):
        return lzma.open(path, "rb")
    if magic.startswith(b"BZh"):
        return bz2.open(path, "rb")
    if len(tail) < 1024 or any(tail):  # a tar ends with two empty blocks; tarfile does not insist on them
        raise tarfile.ReadError("no end-of-archive mark")
    return open(path, "rb")


def read_cifar(files: Mapping[str, Path]) -> Raw:
    """CIFAR-10's archive in its binary version, which needs no pickle: five train batches and one test."""
    path = files["cifar-10-binary.tar.gz"]
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    batches: dict[str, np.ndarray] = {}
    for parts, data in _tar_files(path, names):
        if data is None:
            continue
        if not data or len(data) % _CIFAR_RECORD:
            raise DataError(
                f"{path}: {parts[-1]} has {len(data)} bytes, no multiple of a record's {_CIFAR_RECORD}. "
                "Delete the archive and load again to fetch it anew."
            )
        batches[parts[-1]] = np.frombuffer(data, np.uint8).reshape(-1, _CIFAR_RECORD)
    missing = [name for name in names if name not in batches]
    if missing or any(batch[:, 0].max() > 9 for batch in batches.values()):
        raise DataError(
            f"{path} is not CIFAR-10's binary version: "
            + (f"{', '.join(missing)} missing." if missing else "labels above 9.")
            + " Delete it and load again to fetch it anew."
        )
    rows = {"train": np.concatenate([batches[name] for name in names[:5]]), "test": batches[names[5]]}
    x = {split: r[:, 1:].reshape(-1, 3, 32, 32) for split, r in rows.items()}
    return Raw(x, {split: r[:, 0].astype(np.int64) for split, r in rows.items()}, _CIFAR_CLASSES)
