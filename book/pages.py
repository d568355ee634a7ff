"""What the book is built from: executed notebooks made fit to read, plain pages, and the page of results.

Everything lands in ``build/<profile>/stage/`` under the names that ``_toc.yml`` gives, so the same table
of contents serves the text notebooks in git and the executed ones in the book.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import citing
import nbformat
import plan
import yaml
from nbformat import NotebookNode
from parameters import BookError, with_values
from plan import Chapter, Layout

__all__ = [
    "ENVIRONMENT_TAG",
    "commit",
    "cpu_banner",
    "missing_alt",
    "read_result",
    "readable",
    "results_page",
    "stage",
    "with_links",
    "write_atomically",
]

ENVIRONMENT_TAG = "runner-environment"  # the cell that the runner adds to ask for device and versions
_INSTALL = 'INSTALL = "downhill-with-noise"'


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_result(layout: Layout, chapter: Chapter) -> dict[str, Any] | None:
    """The results of an executed chapter, or None when it has none or its notebook is gone."""
    try:
        result = json.loads((layout.build / "results" / f"{chapter.name}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    executed = layout.build / "executed" / f"{chapter.name}.ipynb"
    return result if executed.is_file() and "key" in result else None


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit(root: Path) -> str | None:
    """The commit of the project, ``+dirty`` when files differ from it; None outside git."""
    head = _git(root, "rev-parse", "--verify", "HEAD")
    if head is None:
        return None
    return head + ("+dirty" if _git(root, "status", "--porcelain") else "")


def install_source(root: Path) -> str | None:
    """What pip installs the companion from: ``git+https://...@commit``; None without a public origin."""
    origin, head = _git(root, "remote", "get-url", "origin"), _git(root, "rev-parse", "--verify", "HEAD")
    if not origin or not head:
        return None
    if match := re.fullmatch(r"[\w.-]+@([\w.-]+):(?!/)(.+)", origin):  # git@host:owner/name.git
        origin = f"ssh://{match[1]}/{match[2]}"
    url = urlsplit(origin)
    if url.scheme not in ("http", "https", "ssh") or "." not in (url.hostname or ""):
        return None
    port = f":{url.port}" if url.port and url.scheme != "ssh" else ""
    scheme = "https" if url.scheme == "ssh" else url.scheme
    return f"git+{scheme}://{url.hostname}{port}{url.path}@{head}"


# --- notebooks ------------------------------------------------------------------------------------


def readable(notebook: NotebookNode, values: dict[str, Any], install: str | None = None) -> NotebookNode:
    """An executed notebook as its reader should see it.

    The parameters cell shows the values that were run, and the cells that the runner and papermill
    added are gone, with warnings, progress bars and every trace of the machine's paths.
    """
    drop = {ENVIRONMENT_TAG, "injected-parameters"}
    notebook.cells = [cell for cell in notebook.cells if not drop & set(plan.tags(cell))]
    notebook.metadata.pop("papermill", None)
    count = 0
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        if cell.cell_type != "code":
            continue
        count += 1
        if count == 1 and install:
            cell.source = cell.source.replace(_INSTALL, f'INSTALL = "{install}"')
        if "parameters" in plan.tags(cell):
            cell.source = with_values(cell.source, values)
        cell.execution_count = count
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]  # the log has it
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = count
    return notebook


def with_links(text: str, documents: set[str], left_out: set[str]) -> str:
    """Markdown whose links to chapters, ``[...](short-run.md)``, fit the stage, where chapters are notebooks.

    A link to a chapter that is left out becomes its text.
    """

    def fitted(match: re.Match[str]) -> str:
        label, name, anchor = match.groups(default="")
        if f"book/{name}" in left_out:
            return label or name
        return f"[{label}]({name}.ipynb{anchor})" if f"book/{name}" in documents else match[0]

    return re.sub(r"\[([^\[\]]*)\]\((?:\./)?([\w-]+)\.md(#[^)\s]*)?\)", fitted, text)


def missing_alt(notebook: NotebookNode) -> list[str]:
    """The code cells that show an image without saying what is on it."""
    missing = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, start=1):
        shows = any(kind.startswith("image/") for out in cell.outputs for kind in out.get("data", {}))
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt")
        if (
            shows
            and not str(alt or "").strip()
            and not {"remove-cell", "remove-output"} & set(plan.tags(cell))
        ):
            missing.append(f"code cell {number}: {cell.source.strip().splitlines()[0]}")
    return missing


# --- the page of results --------------------------------------------------------------------------


def _quantity(mean: float, spread: float | None) -> str:
    """A number with its spread, to two digits of the spread: ``12.34 ± 0.56``."""
    if spread:
        decimals = 1 - math.floor(math.log10(spread))
        if 0 <= decimals <= 6:
            return f"{mean:.{decimals}f} ± {spread:.{decimals}f}"
        return f"{mean:.4g} ± {spread:.2g}"
    return f"{mean}" if isinstance(mean, int) else f"{mean:.4g}"


def _short(commit: str | None) -> str:
    head, plus, dirty = (commit or "none").partition("+")
    return f"`{head[:7]}{plus}{dirty}`" if commit else head


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    line = "| {} |".format
    return [line(" | ".join(row)) for row in [head, ["---"] * len(head), *rows]]


def results_page(results: list[tuple[Chapter, dict[str, Any]]], profile: str) -> str:
    """The page "Results and run times", written from the results of the executed chapters."""
    rows = [
        [
            f"{{doc}}`/{chapter.document}`",
            str(result["device"]),
            result["profile"],
            f"{result['seconds'] / 60:.1f}",
            f"{result['peak_memory_mb']:.0f}",
            result["versions"].get("torch", "none"),
            f"`{result['commit'][:10]}{'+dirty' * result['commit'].endswith('+dirty')}`"
            if result["commit"]
            else "none",
            result["finished"][:10],
        ]
        for chapter, result in results
    ]
    head = ["Chapter", "Device", "Profile", "Minutes", "Peak MB", "torch", "Commit", "Date (UTC)"]
    lines = [
        "# Results and run times",
        "",
        "This page is written by `book/run.py` from what the chapters recorded while they ran; no number "
        f"on it was typed. The profile is `{profile}`.",
        "",
        *_table(head, rows),
    ]
    for chapter, result in results:
        figures = result["figures"]
        parts = {f"{name}_{part}" for name in figures for part in ("sd", "n") if f"{name}_{part}" in figures}
        rows = [
            [f"`{name}`", _quantity(value, figures.get(f"{name}_sd")), str(figures.get(f"{name}_n", 1))]
            for name, value in figures.items()
            if name not in parts
        ]
        lines += ["", f"## {chapter.title}", ""]
        head = ["Figure", "Mean ± standard deviation", "Runs"]
        lines += _table(head, rows) if rows else ["No figures recorded."]
        shown = [f"{name} = {value!r}" for name, value in result["parameters"].items()]
        lines += ["", "````{dropdown} Parameters of this run", "```text", *shown, "```", "````"]
    return "\n".join(lines) + "\n"


# --- the stage ------------------------------------------------------------------------------------


def cpu_banner(results: list[dict[str, Any]], profile: str) -> str | None:
    """What readers of a published book must know when not all of it was executed on a GPU; else None."""
    on_cpu = [result for result in results if str(result["device"]).startswith("cpu")]
    if not on_cpu:
        return None
    which = "These pages" if len(on_cpu) == len(results) else f"{len(on_cpu)} of {len(results)} chapters"
    return f"{which} were executed on a CPU, in the profile {profile}: smaller data than a GPU would take."


def _announce(config: Path, text: str) -> None:
    """Put a line on top of every page of a staged book."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    settings.setdefault("html", {})["announcement"] = text
    config.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")


def stage(
    layout: Layout, chapters: dict[str, Chapter], banner: bool = False
) -> tuple[Path, list[str], list[str]]:
    """Fill ``stage/`` with all that jupyter-book needs; returns it, its documents and the chapters left out.

    A chapter that has not been executed in this profile is left out, of ``_toc.yml`` too. ``banner``: a book
    that was executed on a CPU says so on every page. Raises ``BookError`` when no chapter has been executed,
    or a figure has no alt text.
    """
    root, folder = layout.root, layout.folder("stage")
    shutil.rmtree(folder)
    (folder / "book").mkdir(parents=True)
    install = install_source(root)
    url = re.sub(r"^git\+|(\.git)?@[^@]*$", "", install) if install else None
    found = [(chapter, read_result(layout, chapter)) for chapter in chapters.values()]
    results = [(chapter, result) for chapter, result in found if result is not None]
    left_out = [chapter.name for chapter, result in found if result is None]
    staged = {chapter.document for chapter, _ in results}
    missing = {chapter.document for chapter in chapters.values()} - staged
    without_alt = []
    for chapter, result in results:
        executed = nbformat.read(layout.build / "executed" / f"{chapter.name}.ipynb", as_version=4)
        notebook = readable(executed, result["parameters"], install)
        without_alt += [f"  {chapter.document}.md, {cell}" for cell in missing_alt(notebook)]
        cite = citing.section(chapter, result, root, url)
        notebook.cells.append(nbformat.v4.new_markdown_cell(cite, id="cite-this-chapter"))
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = with_links(cell.source, staged, missing)
        nbformat.write(notebook, folder / f"{chapter.document}.ipynb")
    if without_alt:
        raise BookError(
            "figures without alt text; add to the cell's metadata `mystnb: {image: {alt: what one sees}}`:\n"
            + "\n".join(without_alt)
        )
    if not results:
        raise BookError(f"no chapter has been executed in profile {layout.profile}; nothing to build")
    toc = plan.load_toc(root)
    documents = [document for document in plan.toc_documents(toc) if document not in missing]
    toc_text = yaml.safe_dump(plan.restrict_toc(toc, set(documents)), sort_keys=False)
    (folder / "_toc.yml").write_text(toc_text, encoding="utf-8")
    shutil.copy(root / "_config.yml", folder)
    if banner and (text := cpu_banner([result for _, result in results], layout.profile)):
        _announce(folder / "_config.yml", text)
    for document in documents:
        if document in plan.GENERATED:
            (folder / f"{document}.md").write_text(results_page(results, layout.profile), encoding="utf-8")
        elif document not in staged:
            text = (root / f"{document}.md").read_text(encoding="utf-8")
            (folder / f"{document}.md").write_text(with_links(text, staged, missing), encoding="utf-8")
    for extra in ("references.bib", "_static"):
        if (source := root / "book" / extra).is_dir():
            shutil.copytree(source, folder / "book" / extra)
        elif source.exists():
            shutil.copy(source, folder / "book" / extra)
    return folder, documents, left_out
