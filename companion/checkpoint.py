"""Checkpoints that can be trusted: written whole or not at all, read back only into the run they belong to.

A checkpoint is a folder with one safetensors file (everything that is a tensor) and ``checkpoint.json``,
which names it and is renamed into place last: a process killed at any moment, or a full disk, leaves the
previous checkpoint whole. Every training loop of the package saves and resumes through these functions.

A team of processes (``companion.distributed``) writes such a folder each, below one for the update, and then
a ``checkpoint.json`` above them: only an update that all of them have saved can be resumed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from companion.distributed import Team

__all__ = ["CheckpointError", "describe", "exists", "load", "save"]

_DAMAGE = (AttributeError, IndexError, KeyError, TypeError, ValueError)  # of a header of another form


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written, or belongs to another run."""


def describe(network: nn.Module) -> str:
    """What tells two networks apart: class and parameter shapes."""
    shapes = ", ".join("x".join(map(str, p.shape)) for p in network.parameters())
    return f"{type(network).__name__}({shapes})"


def exists(folder: str | os.PathLike[str]) -> bool:
    """Whether ``folder`` holds a checkpoint."""
    return (Path(folder) / "checkpoint.json").exists()


def save(
    folder: str | os.PathLike[str],
    update: int,
    parts: Mapping[str, Any],
    optimizers: Mapping[str, torch.optim.Optimizer],
    rng: torch.Generator,
    history: Mapping[str, list[Tensor]],
    settings: dict | None = None,
    team: Team | None = None,
) -> Path:
    """Write a run's whole state after ``update`` updates; returns the path of ``checkpoint.json``.

    Each process of a ``team`` calls it, and all of them wait for the last one.

    ``parts`` are things with a ``state_dict`` of tensors (networks, banks), by name; ``history`` holds one
    tensor an update and gauge. ``settings`` must be plain JSON. Raises ``CheckpointError`` if it cannot
    write; the previous checkpoint is then untouched.
    """
    folder = Path(folder)
    if team is not None:
        return _save_together(folder, update, parts, optimizers, rng, history, settings, team)
    tensors = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}
    tensors |= {f"history.{k}": torch.stack(v) for k, v in history.items()}
    tensors["rng"] = rng.get_state()
    groups = {}
    for name, optimizer in optimizers.items():
        state = optimizer.state_dict()
        groups[name] = state["param_groups"]
        for i, slots in state["state"].items():
            tensors |= {f"{name}.{i}.{k}": torch.as_tensor(v) for k, v in slots.items()}
    # A new name each time: the file that checkpoint.json points to is never overwritten.
    target = folder / f"checkpoint-{update:07d}.safetensors"
    index = folder / "checkpoint.json"
    header = {"update": update, "tensors": target.name, "groups": groups, "settings": settings}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(
            target, lambda path: save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path)
        )
        _replace(index, lambda path: path.write_text(json.dumps(header, indent=1), encoding="utf-8"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write the checkpoint of update {update} to {folder}: {error}. The previous "
            "checkpoint is untouched; free disk space or choose another folder, and start again."
        ) from error
    for old in folder.glob("checkpoint-*.safetensors"):
        if old != target:
            old.unlink(missing_ok=True)
    return index


def load(
    folder: str | os.PathLike[str],
    parts: Mapping[str, Any],
    optimizers: Mapping[str, torch.optim.Optimizer],
    rng: torch.Generator,
    device: torch.device,
    settings: dict | None = None,
    team: Team | None = None,
) -> tuple[int, dict[str, list[Tensor]]]:
    """Restore parts, optimisers and generator (built as before) bit for bit; returns (update, history).

    Raises ``CheckpointError`` if the files are missing or damaged, were made with other ``settings`` or by
    another number of processes, or do not fit.
    """
    folder = _of_this_process(Path(folder), team)
    index = folder / "checkpoint.json"
    remedy = f"Remove {folder} to start afresh, or choose another folder."
    try:
        header = json.loads(index.read_text(encoding="utf-8"))
        made_with, groups, update = header["settings"], header["groups"], int(header["update"])
        tensors = load_file(index.with_name(header["tensors"]))  # a file of this folder, or ValueError
        state = tensors["rng"]
        if not isinstance(made_with, dict | None):
            raise ValueError("its settings are no names with values")
    except (*_DAMAGE, OSError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the checkpoint {index}: {error}. {remedy}") from error
    if settings is not None and made_with is not None:
        other = [f"{k}={made_with.get(k)} (now {v})" for k, v in settings.items() if made_with.get(k) != v]
        if other:
            raise CheckpointError(f"{index} is of a run with {', '.join(other)}. {remedy}")

    def part(name: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}

    try:
        for name, thing in parts.items():
            thing.load_state_dict(part(name))
        for name, optimizer in optimizers.items():
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in part(name).items():
                number, slot = key.split(".", 1)
                slots.setdefault(int(number), {})[slot] = value
            optimizer.load_state_dict({"state": slots, "param_groups": groups[name]})
        rng.set_state(state)
    except (*_DAMAGE, RuntimeError) as error:
        raise CheckpointError(f"{index} does not fit this run: {error}. {remedy}") from error
    history = {k: list(v.to(device).unbind(0)) for k, v in part("history").items()}
    return update, history


def _save_together(
    folder: Path,
    update: int,
    parts: Mapping[str, Any],
    optimizers: Mapping[str, torch.optim.Optimizer],
    rng: torch.Generator,
    history: Mapping[str, list[Tensor]],
    settings: dict | None,
    team: Team,
) -> Path:
    """All write their own; when the last one has, rank 0 says so; then the one before goes."""
    index, shared = folder / "checkpoint.json", folder / f"update-{update:07d}"
    header = {"update": update, "processes": team.size, "folder": shared.name}
    problem: Exception | None = None
    try:
        save(shared / f"rank-{team.rank}", update, parts, optimizers, rng, history, settings)
    except CheckpointError as error:
        problem = error
    if team.agree(problem is None) and team.rank == 0:
        try:
            _replace(index, lambda path: path.write_text(json.dumps(header, indent=1), encoding="utf-8"))
        except OSError as error:
            problem = CheckpointError(
                f"could not write {index}: {error}. The previous checkpoint is untouched."
            )
    if not team.agree(problem is None):
        raise problem or CheckpointError(
            f"another process could not write its part of the checkpoint of update {update} to {folder}; the "
            "previous checkpoint is untouched. Its own message says why."
        )
    if team.rank == 0:
        for old in folder.glob("update-*"):
            if old != shared:
                shutil.rmtree(old, ignore_errors=True)
    return index


def _of_this_process(folder: Path, team: Team | None) -> Path:
    """The folder with this process's part; ``CheckpointError`` if another number of processes wrote it."""
    index, count = folder / "checkpoint.json", 1 if team is None else team.size
    try:
        header = json.loads(index.read_text(encoding="utf-8"))
        written_by = int(header.get("processes", 1))
        inner = Path(str(header.get("folder", ""))).name  # a name below this folder, whatever the file says
    except (*_DAMAGE, OSError, RecursionError) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {index}: {error}. Remove {folder} to start afresh, or choose "
            "another folder."
        ) from error
    if written_by != count:
        raise CheckpointError(
            f"{index} was written by {written_by} process{'es' * (written_by > 1)}, this job has {count}: "
            f"start {written_by} (torchrun --nproc-per-node {written_by} on one node), remove {folder} to "
            "start afresh, or choose another folder."
        )
    return folder if team is None else folder / inner / f"rank-{team.rank}"


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
