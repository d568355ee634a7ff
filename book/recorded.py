"""Measured figures, wherever they are kept: of this build, and those in git under ``results/``.

From them come the chapter table of the README and of the front page, the time that stands at the head of each
chapter, and the page "Results against the papers". ``tools/record.py`` writes ``results/`` and uses the same
table, so that it is written once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from parameters import BookError, unknown

__all__ = [
    "Parts",
    "Run",
    "as_table",
    "chapter_table",
    "filled",
    "front_matter",
    "papers_tables",
    "quantity",
    "runs",
    "time_line",
]

MINIATURE = "smoke"  # its sizes are too small to say anything, of time or of quality
NOT_YET = "not measured yet"
_ORDER = (MINIATURE, "cpu", "gpu", "paper")


@dataclass(frozen=True)
class Run:
    """One run of one chapter; ``here`` says that it is the one on this build's pages."""

    chapter: str
    profile: str
    result: dict[str, Any]
    here: bool = False

    @property
    def minutes(self) -> float:
        return self.result["seconds"] / 60

    @property
    def commit(self) -> str:
        head, _, dirty = (self.result.get("commit") or "none").partition("+")
        return head[:7] + ("+" + dirty if dirty else "")


def runs(
    root: Path, names: Iterable[str], profile: str, results: dict[str, dict[str, Any]]
) -> dict[str, list[Run]]:
    """The runs of the chapters ``names``, in that order: of this build, ``results``, and those that are kept.

    A kept run of a profile that this build has run as well is left out. Raises ``BookError`` for a file under
    ``results/`` that cannot be read.
    """
    found: dict[str, list[Run]] = {name: [] for name in names}
    for name, result in results.items():
        found[name].append(Run(name, profile, result, here=True))
    for path in sorted((root / "results").glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise BookError(f"results/{path.name} is not JSON ({error}); see tools/record.py") from None
        if not isinstance(record.get("chapters"), dict) or "profile" not in record:
            continue  # a tuning record or a timing
        for name, result in record["chapters"].items():
            own = found.get(name, [])
            if record["profile"] not in {run.profile for run in own if run.here}:
                own.append(Run(name, record["profile"], result))
    return {name: sorted(own, key=lambda run: _ORDER.index(run.profile)) for name, own in found.items()}


def front_matter(root: Path, name: str) -> dict[str, Any]:
    """What stands above a chapter: title, method, paper. Raises ``BookError`` when one of them is missing."""
    text = (root / "book" / f"{name}.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n", 2)[1])
    for key in ("title", "method", "paper"):
        if key not in front:
            raise BookError(f"book/{name}.md: its front matter lacks '{key}:', which the chapter table shows")
    return front


def as_table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in [head, *rows]]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def quantity(mean: float, spread: float | None) -> str:
    """A number with its spread, to two digits of the spread: ``12.34 ± 0.56``."""
    if spread:
        decimals = 1 - math.floor(math.log10(spread))
        if 0 <= decimals <= 6:
            return f"{mean:.{decimals}f} ± {spread:.{decimals}f}"
        return f"{mean:.4g} ± {spread:.2g}"
    return f"{mean}" if isinstance(mean, int) else f"{mean:.4g}"


# --- chapters and their times ---------------------------------------------------------------------


def chapter_table(root: Path, chapters: dict[str, list[Run]], link: str, status: bool = False) -> list[str]:
    """A row a chapter: what it is, on which devices it was measured and how long it took there.

    ``link`` is where a chapter's page is, ``{}`` its name; ``status`` adds what this build did with it.
    """
    rows = []
    for name, own in chapters.items():
        front = front_matter(root, name)
        timed = [run for run in own if run.profile != MINIATURE]
        row = [f"[{front['title']}]({link.format(name)})", front["method"], front["paper"]]
        row += ["<br>".join(str(run.result["device"]) for run in timed) or NOT_YET]
        row += ["<br>".join(f"{run.minutes:.1f}" for run in timed) or "–"]
        rows.append(row + [_status(own)] * status)
    return as_table(["chapter", "method", "paper", "device", "minutes", *["status"] * status], rows)


def _status(own: list[Run]) -> str:
    here = next((run for run in own if run.here), None)
    if here is None:
        return "not in this build" if own else "not run yet"
    if here.result["parameters"].get("claims", False):
        return "its claims hold"
    return f"`{here.profile}`: runs, claims not tried"


def time_line(own: list[Run]) -> str:
    """How long a chapter takes, a line for its head: of profile ``cpu``, and ``gpu`` where measured."""
    told = [
        f"{_spoken(run.minutes)} in the `{run.profile}` profile on {run.result['device']}"
        for run in own
        if run.profile in ("cpu", "gpu")
    ]
    return f"**Time to run:** {'; '.join(told) or NOT_YET}."


def _spoken(minutes: float) -> str:
    if minutes < 1:
        return f"{60 * minutes:.0f} seconds"
    return f"{minutes:.1f} minutes"


# --- against the papers ---------------------------------------------------------------------------

_FIELDS = {"chapter", "paper", "what", "setting", "published", "where", "ours", "profile", "differs"}
_NEEDED = {"chapter", "paper", "what", "setting", "published", "where", "differs"}


def papers_tables(root: Path, chapters: dict[str, list[Run]]) -> list[str]:
    """The published figures of ``book/published.yml`` beside those recorded, a table a chapter.

    A claim names the recorded figure in ``ours``, and in ``profile`` the one profile that records it, if not
    every one does. Raises ``BookError`` for a claim that lacks a field or has an unknown one, of an unknown
    chapter, and for a figure that the chapter does not record.
    """
    path = root / "book" / "published.yml"
    claims = yaml.safe_load(path.read_text(encoding="utf-8")) or []
    lines: list[str] = []
    for number, claim in enumerate(claims, start=1):
        where = f"book/published.yml, entry {number}"
        for field in claim.keys() - _FIELDS:
            raise unknown("field", field, sorted(_FIELDS), where)
        if missing := sorted(_NEEDED - claim.keys()):
            raise BookError(f"{where} lacks {', '.join(missing)}")
        if claim["chapter"] not in chapters:
            raise unknown("chapter", claim["chapter"], chapters, where)
    for name, own in chapters.items():
        rows = [
            [
                f"{claim['what']} {{cite:p}}`{claim['paper']}`",
                claim["setting"],
                f"{claim['published']} ({claim['where']})",
                _ours(claim, own),
                claim["differs"],
            ]
            for claim in claims
            if claim["chapter"] == name
        ]
        if rows:
            head = ["claim", "setting", "published", "here", "what differs"]
            title = front_matter(root, name)["title"]
            lines += ["", f"## {title}", "", f"[To the chapter]({name}.md).", "", *as_table(head, rows)]
    return lines


def _ours(claim: dict[str, Any], own: list[Run]) -> str:
    """Our side of one claim: a line a profile that was run, with all that a figure needs beside it."""
    name, only = claim.get("ours"), claim.get("profile")
    if name is None:
        return "not repeated"
    asked = [run for run in own if only in (None, run.profile)]
    known = {figure for run in asked for figure in run.result["figures"]}
    if asked and name not in known:
        raise unknown(
            "figure", name, known, f"book/published.yml: {claim['what']}, chapter {claim['chapter']}"
        )
    told = []
    for run in asked:
        figures = run.result["figures"]
        if run.profile == MINIATURE or name not in figures:
            continue
        mean = quantity(figures[name], figures.get(f"{name}_sd"))
        count = figures.get(f"{name}_n", 1)
        told.append(f"**{mean}** (n = {count}, {run.result['device']}, `{run.profile}`, `{run.commit}`)")
    return "<br>".join(told) or NOT_YET


# --- marks ----------------------------------------------------------------------------------------


Parts = dict[str, Callable[[], list[str]]]


def filled(text: str, parts: Parts, where: str) -> str:
    """Markdown with each ``<!-- made at staging: NAME -->`` replaced by the lines of that part.

    Raises ``BookError`` for a name that is none of the parts.
    """

    def part(match: re.Match[str]) -> str:
        if match[1] not in parts:
            raise unknown("part", match[1], parts, where)
        return "\n".join(parts[match[1]]())

    return re.sub(r"^<!-- made at staging: ([\w-]+) -->$", part, text, flags=re.MULTILINE)
