"""What every chapter needs around its method: a device, recorded figures, and where they were made."""

from __future__ import annotations

import math
import os
import platform
import resource
import sys
from collections.abc import Iterable
from importlib import metadata

import torch
from torch import Tensor

__all__ = ["describe_device", "environment", "pick_device", "record"]

_PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "matplotlib", "safetensors")


def pick_device(name: str = "auto") -> torch.device:
    """The device a chapter runs on: ``"auto"`` takes a GPU where there is one, under ``torchrun`` its own.

    Raises ``RuntimeError`` if a CUDA device is asked for by name and none is usable; a chapter that
    silently fell back to the CPU would look like a hung one.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"device={name!r} was asked for, but torch {torch.__version__} sees no GPU. "
            "On Colab choose Runtime > Change runtime type > GPU; elsewhere set device='cpu'."
        )
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def describe_device(device: torch.device | str) -> str:
    """A name a reader recognises, e.g. ``"cpu (AMD EPYC, 2 threads)"`` or ``"cuda (Tesla T4)"``."""
    device = torch.device(device)
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux: the architecture's name has to do
    threads = torch.get_num_threads()
    return f"{device.type} ({name}, {threads} thread{'s' * (threads > 1)})"


def record(name: str, value: float | int | Tensor | Iterable[float]) -> None:
    """Record one figure under ``name`` so that prose can quote it and the runner can collect it.

    A scalar is recorded as it is. Several values (one a seed) are recorded as their mean under
    ``name``, their standard deviation (n - 1 in the denominator) under ``name_sd`` and their count
    under ``name_n``.

    Inside a Jupyter kernel with myst-nb the numbers are glued without display; elsewhere (Colab, a
    plain script) they are printed. Raises ``ValueError`` for a non-finite or empty value: a figure
    that is not a number must stop the chapter, not be quoted by it.

    Example:

    >>> from companion.record import record
    >>> record("fd", [1.0, 2.0, 4.0])  # outside a kernel: printed
    fd = 2.333
    fd_sd = 1.528
    fd_n = 3
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu().tolist()
    if isinstance(value, Iterable):
        values = [float(v) for v in value]
        if not values:
            raise ValueError(f"record({name!r}): no values")
        mean = math.fsum(values) / len(values)
        figures: dict[str, float | int] = {name: mean}
        if len(values) > 1:
            figures[f"{name}_sd"] = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
        figures[f"{name}_n"] = len(values)
    else:
        figures = {name: int(value) if isinstance(value, int) else float(value)}
    for key, number in figures.items():
        if not math.isfinite(number):
            raise ValueError(f"record({key!r}): {number} is not finite; look at the run that produced it")
        _glue(key, number)


def _glue(name: str, number: float | int) -> None:
    try:
        from IPython import get_ipython
        from myst_nb import glue
    except ImportError:
        print(f"{name} = {number:.4g}")
        return
    if get_ipython() is None:
        print(f"{name} = {number:.4g}")
    else:
        glue(name, number, display=False)


def environment(device: torch.device | str | None = None) -> dict[str, object]:
    """Device, package versions and peak memory (MB) of this process, as one JSON-ready object.

    ``peak_memory_mb`` is the process's resident peak; on a GPU ``peak_gpu_memory_mb`` stands beside it.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    result: dict[str, object] = {
        "device": describe_device(device if device is not None else "cpu"),
        "versions": versions,
        "peak_memory_mb": round(_peak_memory_mb(), 1),
    }
    if device is not None and torch.device(device).type == "cuda":
        result["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return result


def _peak_memory_mb() -> float:
    # VmHWM is this program's own peak; ru_maxrss also remembers the parent's size at fork.
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status", encoding="utf-8") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024
