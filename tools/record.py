"""Keep a profile's measured figures in git: ``python tools/record.py [--profile cpu]`` after a run.

Writes ``results/<profile>-<device>.json`` from ``build/<profile>/results/``, copies the README's picture from
the executed chapter, and renews the README's chapter table from all kept figures, so that no number in it is
typed. Chapters that were not run again keep the figures that the file already holds, each with the commit it
was made at. Refuses figures that were made from uncommitted code.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book"))

import recorded  # noqa: E402

__all__ = ["chapter_table", "main", "renewed"]

PICTURE = ("short-run-1.png", "book/_static/short-run.png")
BEGIN, END = "<!-- chapters: written by tools/record.py -->", "<!-- end of chapters -->"


def chapter_table(root: Path) -> str:
    """The README's table: what ``results/`` has of the ``cpu`` profile: devices and minutes."""
    found = recorded.runs(root, _in_order(root), "", {})
    runs = {name: [run for run in own if run.profile == "cpu"] for name, own in found.items()}
    runs = {name: own for name, own in runs.items() if own}
    every = [run for own in runs.values() for run in own]
    torch = ", ".join(sorted({run.result["versions"]["torch"] for run in every}))
    minutes = sum(min(run.minutes for run in own) for own in runs.values())
    total = f"Together {minutes:.1f} minutes in the `cpu` profile (torch {torch})."
    return "\n".join([*recorded.chapter_table(root, runs, "book/{}.md"), "", total])


def _in_order(root: Path) -> list[str]:
    """The names of the book's pages as they follow each other."""
    return re.findall(r"file: book/([\w-]+)", (root / "_toc.yml").read_text(encoding="utf-8"))


def renewed(readme: str, table: str) -> str:
    """The README's text with its chapter table replaced; raises ``ValueError`` if the marks are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the lines {BEGIN!r} and {END!r} around its chapter table")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    """Record one profile; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    root, build = args.root, args.root / "build" / args.profile
    results = {}
    for name in _in_order(root):
        path = build / "results" / f"{name}.json"
        if path.exists():
            results[name] = json.loads(path.read_text(encoding="utf-8"))
    dirty = [n for n, r in results.items() if not r["commit"] or r["commit"].endswith("+dirty")]
    if not results or dirty:
        what = f"were made from uncommitted code: {', '.join(dirty)}" if dirty else "are missing"
        print(f"figures in {build} {what}; commit, then run the profile with --fresh", file=sys.stderr)
        return 1
    device = re.sub(r"[^a-z0-9]+", "-", next(iter(results.values()))["device"].lower()).strip("-")
    target = root / "results" / f"{args.profile}-{device}.json"
    if target.exists():
        kept = json.loads(target.read_text(encoding="utf-8"))["chapters"]
        both = kept | results
        results = {name: both[name] for name in _in_order(root) if name in both}
    record = {
        "command": f"python book/run.py --profile {args.profile}",
        "profile": args.profile,
        "chapters": {
            name: {key: value for key, value in result.items() if key not in ("key", "profile", "chapter")}
            for name, result in results.items()
        },
    }
    target.parent.mkdir(exist_ok=True)
    _replace(target, json.dumps(record, indent=1) + "\n")
    print(f"wrote {target.relative_to(root)}")
    if args.profile == "cpu":
        if (build / "figures" / PICTURE[0]).exists():
            shutil.copy(build / "figures" / PICTURE[0], root / PICTURE[1])
        readme = root / "README.md"
        _replace(readme, renewed(readme.read_text(encoding="utf-8"), chapter_table(root)))
        print(f"renewed README.md and {PICTURE[1]}")
    return 0


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
