"""What the searches for settings share: how a setting is drawn, the record, and the pool of processes."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from companion.record import describe_device


def log_uniform(draw: random.Random, low: float, high: float) -> float:
    """A number between the bounds, uniform in its logarithm, rounded to two digits."""
    return float(f"{math.exp(draw.uniform(math.log(low), math.log(high))):.2g}")


class Record:
    """The trials of one search in one JSON, from which an interrupted search goes on.

    ``header`` says what all trials have in common; torch's version and the device are added to it. ``key``
    is the name that the trials have in the file, ``identity`` the fields that tell one from another,
    ``summary`` what stands beside them, made anew from all trials whenever one is added.

    Raises ``ValueError`` if ``path`` holds a search with another header.
    """

    def __init__(
        self,
        path: Path,
        header: dict[str, object],
        summary: Callable[[list[dict]], dict[str, object]],
        *,
        identity: tuple[str, ...] = ("trial",),
        key: str = "trials",
    ) -> None:
        header = header | {"torch": torch.__version__, "device": describe_device("cpu")}
        self.path, self.header = path, json.loads(json.dumps(header))  # tuples are lists in the file
        self.summary, self.identity, self.key = summary, identity, key
        self.rows: list[dict] = []
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            if {name: old.get(name) for name in self.header} != self.header:
                raise ValueError(f"{path} holds a search of another kind; choose another file or remove it")
            self.rows = old[key]
        path.parent.mkdir(parents=True, exist_ok=True)

    def lacks(self, *identity: object) -> bool:
        """Whether no trial of this identity has been made yet."""
        return all(tuple(row[name] for name in self.identity) != identity for row in self.rows)

    def add(self, row: dict) -> None:
        """Add a trial and write the file."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Write the file, under a temporary name first: an interrupt leaves the last whole one."""
        text = json.dumps(self.header | self.summary(self.rows) | {self.key: self.rows}, indent=1) + "\n"
        temporary = self.path.with_suffix(".part")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path)

    def run(
        self, trial: Callable[[tuple], dict], jobs: Iterable[tuple], workers: int | None = os.cpu_count()
    ) -> None:
        """Make a trial of every job, in as many processes, and add each in the jobs' order."""
        jobs = list(jobs)
        with ProcessPoolExecutor(workers) as pool:
            for count, row in enumerate(pool.map(trial, jobs), 1):
                print(f"{count}/{len(jobs)} {row}", flush=True)
                self.add(row)


def best(
    rows: list[dict], score: str, *, by: str, groups: Iterable[str], lowest: bool = False
) -> dict[str, dict]:
    """Each group's best trial by ``score`` (its sum if it is a list); trials without one are passed over."""
    out = {}
    for group in groups:
        scored = [row for row in rows if row[by] == group and score in row]
        if scored:
            sign = 1 if lowest else -1
            out[group] = min(scored, key=lambda row: sign * _total(row[score]))
    return out


def _total(value: float | list[float]) -> float:
    return sum(value) if isinstance(value, list) else value
