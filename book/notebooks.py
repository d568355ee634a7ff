#!/usr/bin/env python
"""Notebooks for Colab and for download: ``python book/notebooks.py --out DIR [--ref TAG]``.

Writes ``DIR/book/<chapter>.ipynb`` for every chapter of ``_toc.yml``, without outputs, from its MyST text.
MyST becomes plain Markdown; a set-up cell comes before the chapter's first code; the parameters cell
carries the ``gpu`` profile, with a switch to ``cpu``. The same text makes the same file, byte by byte.

On the branch ``notebooks`` they lie in a folder a release, which ``--where`` prints: ``<tag>/book/...``, and
``latest/book/...`` between releases. The pages link there.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import plan
import yaml
from files import write_atomically
from home import Home, find_home
from myst import Bibliography, Labels, Plain, find_labels
from nbformat import NotebookNode
from parameters import BookError, unknown, with_values
from plan import Chapter

__all__ = [
    "SETUP",
    "Recorded",
    "main",
    "make_notebooks",
    "parameters_cell",
    "read_records",
    "write_notebooks",
]

# How every chapter's first code cell begins; in a notebook colab_cell.py stands in its place.
SETUP = """\
# The companion is the book's package. pip installs it only where it is missing and leaves torch alone.
import importlib.util
import subprocess
import sys

INSTALL = "downhill-with-noise"
if importlib.util.find_spec("companion") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", INSTALL], check=True)
"""
_SWITCH = 'profile = "gpu"  # "gpu", or "cpu" for a machine without one: change this name, run the cell again'


# --- recorded figures -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """A run of a chapter that is kept in ``results/``: its figures by name, device and seconds."""

    profile: str
    device: str
    seconds: float
    figures: dict[str, float | int]

    @property
    def duration(self) -> str:
        """The time it took, as one says it."""
        return f"{self.seconds:.0f} seconds" if self.seconds < 90 else f"{self.seconds / 60:.1f} minutes"


def read_records(root: Path) -> dict[str, list[Recorded]]:
    """The recorded runs of every chapter in the profiles ``gpu`` and ``cpu``, those of ``gpu`` first."""
    found: dict[str, list[Recorded]] = {}
    for path in sorted((root / "results").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("profile") not in ("gpu", "cpu"):
            continue  # a tuning record or a benchmark
        for name, run in content["chapters"].items():
            record = Recorded(content["profile"], run["device"], run["seconds"], run["figures"])
            found.setdefault(name, []).append(record)
    for records in found.values():
        records.sort(key=lambda record: record.profile != "gpu")
    return found


# --- cells ----------------------------------------------------------------------------------------


def parameters_cell(source: str, gpu: dict[str, Any], cpu: dict[str, Any]) -> str:
    """A parameters cell with the values of ``gpu`` and a switch to those of ``cpu`` that differ."""
    if "profile" in gpu:
        raise BookError("a parameter cannot be called 'profile': in notebooks that is the switch")
    differ = {name: value for name, value in cpu.items() if value != gpu[name]}
    switched = ["    " + with_values(f"{name} = None", {name: value}) for name, value in differ.items()]
    return "\n".join(
        [
            _SWITCH,
            "",
            with_values(source, gpu),
            "",
            'if profile == "cpu":',
            *(switched or ["    pass  # the sizes are the same"]),
            'elif profile != "gpu":',
            '    raise ValueError(\'profile is "gpu" or "cpu"\')',
        ]
    )


def _setup_cell(root: Path, install: str, records: list[Recorded]) -> str:
    """``colab_cell.py`` with what it has to know about this release and chapter."""
    source = Path(__file__).with_name("colab_cell.py").read_text(encoding="utf-8")
    took = [[record.profile, record.device, record.duration] for record in records]
    companion = (root / "companion" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', companion, flags=re.MULTILINE)
    if version is None:
        raise BookError("companion/__init__.py does not say its __version__")
    values = {
        "INSTALL": (install, "the book's package, of this notebook's release"),
        "VERSION": (version[1], "its version"),
        "TOOK": (took, "what this chapter took where it was measured"),
    }
    for name, (value, comment) in values.items():
        line = f"{name} = {json.dumps(value)}  # {comment}"
        source, count = re.subn(rf"^{name} = .*$", lambda _, new=line: new, source, flags=re.MULTILINE)
        if count != 1:
            raise BookError(f"colab_cell.py: needs one line '{name} = ...', has {count}")
    return re.sub(r"  # noqa: .*$", "", source, flags=re.MULTILINE).rstrip()


def _note(book: str, home: Home | None, page: str | None, plain: Plain, records: list[Recorded]) -> str:
    """What a reader must know before the text: where it comes from, and whose the numbers are."""
    made = f"[the chapter's page]({page})" if page else "the chapter's page"
    state = "" if home is None else f", {home.release or 'commit ' + home.ref[:7]}"
    text = (
        f"> Made from {made} in *{book}*{state}. The parameters are the `gpu` profile's; "
        'without a GPU change the one name `profile` to `"cpu"`.'
    )
    if plain.quoted:
        text += (
            f" The numbers in the text were recorded on {records[0].device} in the `{records[0].profile}` "
            "profile; your run prints its own."
        )
    if plain.unrecorded:
        text += (
            f" Names in code type where a number is due, such as `{plain.unrecorded[0]}`, stand for figures "
            "that are not recorded yet; the run prints them."
        )
    return text


# --- notebooks ------------------------------------------------------------------------------------


def _chapter_numbers(toc: dict[str, Any]) -> dict[str, int]:
    """The numbers of the documents in the numbered parts of a table of contents, as the pages have them."""
    numbered = [part for part in toc.get("parts", []) if part.get("numbered")]
    documents = [document for part in numbered for document in plan.toc_documents(part.get("chapters", []))]
    return {document: number for number, document in enumerate(documents, start=1)}


def make_notebooks(
    root: Path, home: Home | None = None, install: str | None = None
) -> dict[str, NotebookNode]:
    """The notebook of every chapter, by document, e.g. ``book/short-run``.

    ``install`` is what pip installs the companion from, by default the home's. Raises ``BookError`` for MyST
    that has no plain form, naming the chapter.
    """
    chapters = plan.load_chapters(root)
    install = install or (home.install if home else "")
    gpu, cpu = (
        plan.resolve(chapters, list(chapters.values()), plan.load_profile(root, name, chapters))
        for name in ("gpu", "cpu")
    )
    toc, records = plan.load_toc(root), read_records(root)
    numbers, labels = _chapter_numbers(toc), Labels()
    for chapter in chapters.values():
        with _named(chapter):
            find_labels(_texts(chapter), labels, numbers.get(chapter.document))
    bibliography = Bibliography(root / "book" / "references.bib")
    titles = _titles(root, toc, chapters)
    book = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["title"]

    def address(document: str) -> str | None:
        if document in {chapter.document for chapter in chapters.values()}:
            # Colab shows a notebook without its neighbours, so a relative link would lead nowhere there.
            return (home and home.notebook(document)) or f"{Path(document).name}.ipynb"
        if document not in titles:
            raise unknown("page", document, titles, "a link")
        return home.page(document) if home else None

    made = {}
    for chapter in chapters.values():
        kept = records.get(chapter.name, [])
        plain = Plain(labels, bibliography, kept[0].figures if kept else {}, address, titles)
        with _named(chapter):
            cells = _cells(chapter, plain, gpu[chapter.name], cpu[chapter.name])
            setup = nbformat.v4.new_code_cell(_setup_cell(root, install, kept))
            setup.metadata["cellView"] = "form"
            first = next(at for at, cell in enumerate(cells) if cell.cell_type == "code")
            cells.insert(first, setup)
            page = home.page(chapter.document) if home else None
            _insert_note(cells[0], _note(book, home, page, plain, kept))
            if plain.cited:
                sources = "\n".join(f"- {entry}" for entry in bibliography.entries(plain.cited))
                cells.append(nbformat.v4.new_markdown_cell(f"## Sources\n\n{sources}"))
        made[chapter.document] = _notebook(cells)
    return made


@contextlib.contextmanager
def _named(chapter: Chapter) -> Iterator[None]:
    """Name the chapter in the errors of what is done to its text."""
    try:
        yield
    except BookError as error:
        raise BookError(f"{chapter.document}.md: {error}") from None


def _texts(chapter: Chapter) -> list[str]:
    return [cell.source for cell in chapter.notebook.cells if cell.cell_type == "markdown"]


def _titles(root: Path, toc: dict[str, Any], chapters: dict[str, Chapter]) -> dict[str, str]:
    """The first heading of every page of the book, or its name for those that are written by the build."""
    titles = {}
    for document in plan.toc_documents(toc):
        path = root / f"{document}.md"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        heading = re.search(r"^# +(.+)$", text, flags=re.MULTILINE)
        titles[document] = heading[1].strip() if heading else Path(document).name
    return titles | {chapter.document: chapter.title for chapter in chapters.values()}


def _cells(chapter: Chapter, plain: Plain, gpu: dict[str, Any], cpu: dict[str, Any]) -> list[NotebookNode]:
    """The chapter's own cells, its text made plain, and a device check after the parameters."""
    cells, code = [], 0
    for cell in chapter.notebook.cells:
        if cell.cell_type == "markdown":
            cells += [nbformat.v4.new_markdown_cell(text) for text in plain.cells(cell.source)]
            continue
        code += 1
        source, tags = cell.source, plan.tags(cell)
        if code == 1:
            source = source.removeprefix(SETUP).lstrip("\n")
        if "parameters" in tags:
            source = parameters_cell(source, gpu, cpu)
        if not source:
            continue
        metadata: dict[str, Any] = {"tags": tags} if tags else {}
        if {"hide-input", "remove-input", "remove-cell"} & set(tags):
            metadata["cellView"] = "form"  # Colab folds the code, as the page does
        cells.append(nbformat.v4.new_code_cell(source, metadata=metadata))
        if "parameters" in tags:
            device = "device" if "device" in gpu else '"auto"'
            cells.append(nbformat.v4.new_code_cell(f"check_device(profile, {device})"))
    return cells


def _insert_note(cell: NotebookNode, note: str) -> None:
    """Put the note under the chapter's title, which the first cell begins with."""
    if not (title := re.match(r"# +.+\n?", cell.source)):
        raise BookError("the text does not begin with the chapter's title, '# ...'")
    cell.source = f"{title[0].rstrip()}\n\n{note}\n\n{cell.source[title.end() :].lstrip()}".rstrip()


def _notebook(cells: list[NotebookNode]) -> NotebookNode:
    """A notebook of these cells. A cell's id follows from its text, so that what did not change stays."""
    seen: dict[str, int] = {}
    for cell in cells:
        digest = hashlib.sha256(f"{cell.cell_type}\0{cell.source}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell["id"] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    metadata = {
        "accelerator": "GPU",
        "colab": {"gpuType": "T4", "provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.validate(notebook)
    return notebook


def write_notebooks(notebooks: dict[str, NotebookNode], out: Path) -> list[Path]:
    """Write notebooks below ``out``, each under its document's name; returns the files."""
    written = []
    for document, notebook in notebooks.items():
        path = out / f"{document}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, nbformat.writes(notebook) + "\n")
        written.append(path)
    return written


# --- the command ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Write the notebooks; returns the exit status. Errors end as a message, not as a traceback."""
    parser = argparse.ArgumentParser(prog="book/notebooks.py", description="Write notebooks for Colab.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write DIR/book/<chapter>.ipynb")
    parser.add_argument("--ref", help="tag or commit to install from (default: the one checked out)")
    parser.add_argument("--install", metavar="SOURCE", help="what pip installs the package from instead")
    parser.add_argument("--where", action="store_true", help="print the folder on the branch of notebooks")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.out is None and not args.where:
        parser.error("say where to: --out DIR")
    try:
        home = find_home(args.root.resolve(), args.ref)
        if args.where:
            if home is None:
                raise BookError("the book has no public address here: git has no public origin")
            print(home.folder)
        if args.out is not None:
            notebooks = make_notebooks(args.root.resolve(), home, args.install)
            if home is None and not args.install:
                said = "git has no public origin, so these notebooks cannot install the package"
                print(f"warning: {said}; name a source with --install", file=sys.stderr)
            paths = write_notebooks(notebooks, args.out)
            print(f"{len(paths)} notebooks in {args.out}", file=sys.stderr)
    except BookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
