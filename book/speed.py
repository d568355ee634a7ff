"""The tables of the pages on speed: from the timings kept under ``results/``, and from nothing else.

``benchmarks/limits.py``, ``side_by_side.py``, ``langevin_step.py``, ``perturb_step.py`` and ``cifar_step.py``
write what stands there; what none of them has measured yet is a row that says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from parameters import BookError
from recorded import NOT_YET, as_table

__all__ = ["beside", "budget", "cost", "limits", "throughput"]

TITLES = {
    "lsd": "LSD training (Grathwohl 2020)",
    "edp": "Langevin on graphs (Niu 2020)",
    "dgflow": "DGflow (Ansari 2021)",
    "dcd": "DCD's chain (Song 2020)",
}
RATE = 100  # 10^12 operations a second, in the page's arithmetic of what a published training costs


def _records(root: Path, pattern: str) -> list[dict[str, Any]]:
    """The JSON files of that pattern; ``BookError`` for one that cannot be read."""
    found = []
    for path in sorted((root / "results").glob(pattern)):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise BookError(f"results/{path.name} is not JSON ({error}); run its benchmark again") from None
    return found


def _on_gpu(records: list[dict[str, Any]]) -> bool:
    return any(record["device"].startswith("cuda") for record in records)


def _quartiles(values: dict[str, float], scale: float = 1, digits: int = 2, unit: str = "") -> str:
    low, median, high = (f"{scale * values[name]:.{digits}f}" for name in ("low", "median", "high"))
    return f"{median}{unit} ({low} to {high})"


def limits(root: Path) -> list[str]:
    """A table a device: each hot loop's operations, bytes, time and the shares of the device's rates."""
    records, lines = _records(root, "limits-*.json"), []
    for record in records:
        ceilings = "; ".join(f"{name} {values['median']:g}" for name, values in record["ceilings"].items())
        versions = f"torch {record['versions']['torch']}"
        lines += [
            "", f"## {record['device']}", "",
            f"{versions}, {record['threads']} threads, median of {record['repeats']} turns with quartiles. "
            f"Ceilings in 10⁹ operations, and for the copy 10⁹ bytes, a second: {ceilings}.", "",
        ]  # fmt: skip
        counted = all("calls" in row for row in record["loops"])
        recorded = all("times_the_plain_loop" in row for row in record["loops"])
        rows = [
            [
                row["loop"],
                f"[{row['chapter']}]({row['chapter']}.md)",
                f"{row['operations'] / 1e6:,.0f}",
                f"{row['bytes'] / 1e6:,.0f}",
                *([f"{row['calls']:,}"] if counted else []),
                _quartiles(row["milliseconds"], digits=1 if row["milliseconds"]["low"] > 10 else 2),
                f"{_quartiles(row['of_arithmetic'], 100, 0, ' %')} of {row['ceiling'].split()[0]}",
                _quartiles(row["of_copy"], 100, 0, " %"),
                *([_quartiles(row["times_the_plain_loop"], digits=1)] if recorded else []),
            ]
            for row in record["loops"]
        ]
        head = [
            "one step of",
            "chapter",
            "10⁶ operations",
            "MB",
            *(["calls"] if counted else []),
            "ms",
            "of the arithmetic rate",
            "of the copy rate",
            *(["times faster than the plain loop"] if recorded else []),
        ]
        lines += as_table(head, rows)
    if not _on_gpu(records):
        lines += ["", f"## A GPU, in float32 and bfloat16\n\n{NOT_YET.capitalize()}."]
    return lines


def beside(root: Path) -> list[str]:
    """How many times faster than theirs: the authors' codes, a public sampler, the loop one writes first."""
    rows: list[list[str]] = []
    for record in _records(root, "langevin-step-*.json"):
        for case, row in record["cases"].items():
            for name, ratio in row["ratio_to_companion"].items():
                theirs = {"naive": "the loop one writes first", "torchebm": "TorchEBM"}.get(name, name)
                version = record["versions"].get(name, "")
                rows.append(
                    [
                        f"Langevin, {case}",
                        f"{theirs} {version}".strip(),
                        _quartiles(ratio),
                        "",
                        "",
                        record["device"],
                    ]
                )
    others = _records(root, "side-by-side-*.json")
    for record in others:
        for name, row in record["methods"].items():
            stacked = row.get("times_faster_stacked")
            side = f"{_quartiles(stacked)}, {row['seeds']} seeds" if stacked else ""
            title = f"{TITLES.get(name, name)}: {row['unit']}"
            one = _quartiles(row["times_faster"])
            rows.append([title, "the authors' code", one, side, row["note"], record["device"]])
    for record in _records(root, "perturb-step-*.json"):
        steps = record["steps"]
        mine = steps["amp, per tensor, all statistics"]["milliseconds"]
        for name, note in (("official AMP", "per-tensor ball in both"), ("davda54/sam", "SAM in both")):
            if name in steps:
                own = mine if name == "official AMP" else steps["sam"]["milliseconds"]
                ratio = f"{steps[name]['milliseconds'] / own:.2f}"
                title = "AMP step (Zheng 2021)" if name == "official AMP" else "SAM step"
                rows.append([title, name, ratio, "", note, record["device"]])
    if not _on_gpu(others):
        rows.append(["all of these", "", NOT_YET, NOT_YET, "", "a GPU"])
    head = ["what", "beside", "times faster", "seeds side by side", "note", "device"]
    return as_table(head, rows)


def throughput(root: Path) -> list[str]:
    """Examples a second of the arms on images of CIFAR-10's size, beside the fastest public trainer's."""
    records, rows = _records(root, "cifar-step-*.json"), []
    for record in records:
        for name, row in record["rows"].items():
            share = row.get("of_the_trainer")
            rows.append([
                name, _quartiles(row["examples_a_second"], digits=0),
                _quartiles(share) if share else NOT_YET, str(record["batch"]), record["device"],
            ])  # fmt: skip
    if not _on_gpu(records):
        rows.append(["all of these", NOT_YET, NOT_YET, "", "a GPU"])
    return as_table(["training", "examples a second", "of the trainer's", "batch", "device"], rows)


def budget(root: Path) -> list[str]:
    """Estimated minutes of each chapter's long loops on a T4, from counted operations and calls."""
    record = json.loads((root / "results/budget-gpu.json").read_text(encoding="utf-8"))
    rows: dict[str, list[float]] = {}
    for row in record["loops"]:
        sums = rows.setdefault(row["chapter"], [0.0, 0.0, 0.0])
        for i, name in enumerate(("operations", "calls", "minutes")):
            sums[i] += row[name]
    head = ["chapter", "10¹⁴ operations", "10⁶ calls", "estimated minutes on a T4"]
    shown = [
        [f"[{name}]({name}.md)", f"{ops / 1e14:.1f}", f"{calls / 1e6:.0f}", f"{minutes:.1f}"]
        for name, (ops, calls, minutes) in rows.items()
    ]
    return as_table(head, shown)


def cost(root: Path) -> list[str]:
    """What the published trainings take, in operations, and the gradients that processes exchange."""
    rows, seen = [], set()
    for record in _records(root, "limits-*.json"):
        for row in record.get("published", []):
            if row["training"] in seen:
                continue  # operations are counted: the same on every device
            seen.add(row["training"])
            total = row["operations"] * row["updates"]
            rows.append([
                row["training"], str(row["steps"]), f"{row['updates']:,}", f"{row['operations'] / 1e12:.1f}",
                f"{total / 1e18:.2f}", f"{total / (RATE * 1e12) / 86400:.1f}",
                f"{4 * row['parameters'] / 1e6:.0f}",
            ])  # fmt: skip
    head = ["training", "K", "updates", "10¹² operations an update", "10¹⁸ in all",
            f"days at {RATE} · 10¹² a second", "MB of gradients an update"]  # fmt: skip
    return as_table(head, rows) if rows else [f"{NOT_YET.capitalize()}."]
