"""Lint or format the code cells of the chapters: ``python tools/cells.py check`` or ``format``.

ruff knows Python files and notebooks, not MyST text. So each chapter's cells go to it as a notebook, and what
it says is told with the chapter's own lines; ``format`` writes the cells back and leaves every other line as
it is. The settings are pyproject.toml's, what is lifted for cells stands there under ``*.ipynb``.

Exit status: 0 nothing to do or done, 1 something to mend, 2 ruff does not run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cell", "CellsError", "chapters", "check", "code_cells", "formatted", "main"]

ROOT = Path(__file__).resolve().parents[1]


class CellsError(Exception):
    """ruff cannot be run; the message says what to do."""


@dataclass(frozen=True)
class Cell:
    """One code cell in a chapter's text: its lines ``first`` to ``last - 1``, counted from 0."""

    first: int
    last: int
    source: str


def code_cells(text: str) -> list[Cell]:
    """The code cells of a MyST text notebook, without options. Raises ``ValueError`` for an open one."""
    lines, cells, at = text.split("\n"), [], 0
    while at < len(lines):
        fence = re.match(r"(`{3,})\{code-cell\}", lines[at])
        at += 1
        if not fence:
            continue
        begin = at
        while at < len(lines) and lines[at].rstrip() != fence[1]:
            at += 1
        if at == len(lines):
            raise ValueError(f"line {begin}: the code cell has no end")
        first = begin
        if lines[first] == "---":
            first = lines.index("---", first + 1) + 1
        while first < at and (lines[first].startswith(":") or not lines[first].strip()):
            first += 1
        cells.append(Cell(first, at, "\n".join(lines[first:at])))
    return cells


def chapters(root: Path) -> list[Path]:
    """The text notebooks in ``book/``."""
    pages = sorted((root / "book").glob("*.md"))
    return [page for page in pages if "\nkernelspec:" in page.read_text(encoding="utf-8")]


def _ruff(arguments: list[str], cells: list[Cell], page: Path, root: Path) -> str:
    """What ruff says about the cells as a notebook in the chapter's place."""
    found = shutil.which("ruff", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        raise CellsError("ruff is not installed; run make setup")
    notebook = {
        "cells": [
            {
                "cell_type": "code",
                "execution_count": None,
                "metadata": {},
                "outputs": [],
                "source": cell.source.splitlines(keepends=True),
            }
            for cell in cells
        ],
        "metadata": {"kernelspec": {"language": "python"}, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 4,
    }
    name = str(page.with_suffix(".ipynb").relative_to(root))
    command = [found, *arguments, "--config", "pyproject.toml", "--stdin-filename", name, "-"]
    done = subprocess.run(command, input=json.dumps(notebook), capture_output=True, text=True, cwd=root)
    if not done.stdout.strip():
        raise CellsError(f"{page.relative_to(root)}: ruff failed: {done.stderr.strip()}")
    return done.stdout


def formatted(page: Path, root: Path) -> str:
    """The chapter's text with its cells formatted. Raises ``CellsError``, for no Python too."""
    text = page.read_text(encoding="utf-8")
    cells, lines = code_cells(text), text.split("\n")
    shaped = json.loads(_ruff(["format"], cells, page, root))["cells"] if cells else []
    for cell, new in reversed(
        list(zip(cells, shaped, strict=True))
    ):  # from the end, so that places stay valid
        lines[cell.first : cell.last] = "".join(new["source"]).rstrip("\n").split("\n")
    return "\n".join(lines)


def check(page: Path, root: Path) -> list[str]:
    """What is wrong in a chapter's cells, a line each: ruff's rules, then cells that are not formatted."""
    cells = code_cells(page.read_text(encoding="utf-8"))
    if not cells:
        return []
    where, said = page.relative_to(root), []
    for fault in json.loads(_ruff(["check", "--output-format", "json"], cells, page, root)):
        row = cells[fault["cell"] - 1].first + fault["location"]["row"]
        said.append(f"{where}:{row}:{fault['location']['column']}: {fault['code']} {fault['message']}")
    if not any("invalid-syntax" in line or "SyntaxError" in line for line in said):
        shaped = json.loads(_ruff(["format"], cells, page, root))["cells"]
        for cell, new in zip(cells, shaped, strict=True):
            if "".join(new["source"]).rstrip("\n") != cell.source.rstrip("\n"):
                said.append(f"{where}:{cell.first + 1}: cell not formatted; run make format")
    return said


def main(argv: list[str] | None = None) -> int:
    """Check or format every chapter; returns the exit status."""
    parser = argparse.ArgumentParser(description="Lint or format the code cells of the chapters.")
    parser.add_argument("what", choices=["check", "format"])
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    root, faults = arguments.root.resolve(), []
    try:
        for page in chapters(root):
            if arguments.what == "check":
                faults += check(page, root)
                continue
            old, new = page.read_text(encoding="utf-8"), formatted(page, root)
            if new != old:
                temporary = page.with_name(f".{page.name}.part")
                temporary.write_text(new, encoding="utf-8")
                os.replace(temporary, page)
                print(f"formatted {page.relative_to(root)}")
    except CellsError as error:
        print(f"cells: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(faults) or f"cells: {len(chapters(root))} chapters, nothing to mend")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
