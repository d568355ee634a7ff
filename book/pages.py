"""What the book is built from: executed notebooks made fit to read, plain pages, and the page of results.

Everything lands in ``build/<profile>/stage/`` under the names that ``_toc.yml`` gives, so the same table
of contents serves the text notebooks in git and the executed ones in the book.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import citing
import nbformat
import notebooks
import plan
import recorded
import reference
import speed
import yaml
from files import write_atomically
from home import BRANCH, COLAB, Home, find_home, git
from nbformat import NotebookNode
from parameters import BookError, with_values
from plan import Chapter, Layout
from recorded import as_table, quantity

__all__ = [
    "ENVIRONMENT_TAG",
    "NOTEBOOKS",
    "commit",
    "config",
    "cpu_banner",
    "gallery",
    "missing_alt",
    "read_result",
    "readable",
    "results_page",
    "stage",
    "with_links",
    "with_time",
    "write_atomically",
]

ENVIRONMENT_TAG = "runner-environment"  # the cell that the runner adds to ask for device and versions
NOTEBOOKS = "notebooks"  # folder of the stage with what the pages' download buttons give
_INSTALL = 'INSTALL = "downhill-with-noise"'


def read_result(layout: Layout, chapter: Chapter) -> dict[str, Any] | None:
    """The results of an executed chapter, or None when it has none or its notebook is gone."""
    try:
        result = json.loads((layout.build / "results" / f"{chapter.name}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    executed = layout.build / "executed" / f"{chapter.name}.ipynb"
    return result if executed.is_file() and "key" in result else None


def commit(root: Path) -> str | None:
    """The commit of the project, ``+dirty`` when files differ from it; None outside git."""
    head = git(root, "rev-parse", "--verify", "HEAD")
    if head is None:
        return None
    return head + ("+dirty" if git(root, "status", "--porcelain") else "")


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
            cell.source = cell.source.replace(_INSTALL, f"INSTALL = {json.dumps(install)}")
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


def with_time(notebook: NotebookNode, line: str) -> NotebookNode:
    """The notebook with a line under its first heading."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and re.search(r"^# .+$", cell.source, flags=re.MULTILINE):
            cell.source = re.sub(
                r"^# .+$", lambda m: f"{m[0]}\n\n{line}", cell.source, count=1, flags=re.MULTILINE
            )
            break
    return notebook


# --- what the front page shows --------------------------------------------------------------------


def gallery(executed: dict[str, NotebookNode], titles: dict[str, str], folder: Path) -> list[str]:
    """Cards with one picture a chapter, that of its cell tagged ``gallery``; the pictures go into ``folder``.

    A notebook without such a cell, or whose cell has made no picture, has no card.
    """
    lines = ["::::{grid} 1 2 2 2", ":gutter: 3", ""]
    for name, notebook in executed.items():
        tagged = (cell for cell in notebook.cells if "gallery" in plan.tags(cell))
        cell = next((cell for cell in tagged if cell.cell_type == "code"), None)
        images = (
            [out.data["image/png"] for out in cell.outputs if "image/png" in out.get("data", {})]
            if cell
            else []
        )
        if not images:
            continue
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.png").write_bytes(base64.b64decode(images[0]))
        alt = " ".join(cell.metadata["mystnb"]["image"]["alt"].split())
        lines += [
            f":::{{grid-item-card}} {titles[name]}",
            f":img-bottom: {folder.name}/{name}.png",
            f":img-alt: {alt}",
            f":link: {name}",
            ":link-type: doc",
            ":::",
            "",
        ]
    return [*lines, "::::"] if len(lines) > 3 else []


# --- the page of results --------------------------------------------------------------------------


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
        *as_table(head, rows),
    ]
    for chapter, result in results:
        figures = result["figures"]
        parts = {f"{name}_{part}" for name in figures for part in ("sd", "n") if f"{name}_{part}" in figures}
        rows = [
            [f"`{name}`", quantity(value, figures.get(f"{name}_sd")), str(figures.get(f"{name}_n", 1))]
            for name, value in figures.items()
            if name not in parts
        ]
        lines += ["", f"## {chapter.title}", ""]
        head = ["Figure", "Mean ± standard deviation", "Runs"]
        lines += as_table(head, rows) if rows else ["No figures recorded."]
        shown = [f"{name} = {value!r}" for name, value in result["parameters"].items()]
        lines += ["", "````{dropdown} Parameters of this run", "```text", *shown, "```", "````"]
    return "\n".join(lines) + "\n"


# --- the stage ------------------------------------------------------------------------------------


def config(root: Path, home: Home | None, announcement: str | None = None) -> str:
    """``_config.yml`` with Colab buttons that open the notebooks of this release, where Colab can.

    ``announcement`` is a line on top of every page.
    """
    text = (root / "_config.yml").read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    if home is not None and home.on_colab:
        settings["repository"] = {"url": home.url, "branch": BRANCH, "path_to_book": home.folder}
        settings["launch_buttons"] = {"colab_url": COLAB}
    elif announcement is None:
        return text
    if announcement is not None:
        settings.setdefault("html", {})["announcement"] = announcement
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def cpu_banner(results: list[dict[str, Any]], profile: str) -> str | None:
    """What readers of a published book must know when not all of it was executed on a GPU; else None."""
    on_cpu = [result for result in results if str(result["device"]).startswith("cpu")]
    if not on_cpu:
        return None
    which = "These pages" if len(on_cpu) == len(results) else f"{len(on_cpu)} of {len(results)} chapters"
    return f"{which} were executed on a CPU, in the profile {profile}: smaller data than a GPU would take."


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
    home = find_home(root)
    found = [(chapter, read_result(layout, chapter)) for chapter in chapters.values()]
    results = [(chapter, result) for chapter, result in found if result is not None]
    left_out = [chapter.name for chapter, result in found if result is None]
    staged = {chapter.document for chapter, _ in results}
    missing = {chapter.document for chapter in chapters.values()} - staged
    runs = recorded.runs(root, chapters, layout.profile, {c.name: result for c, result in results})
    shown, without_alt = {}, []
    for chapter, result in results:
        executed = nbformat.read(layout.build / "executed" / f"{chapter.name}.ipynb", as_version=4)
        notebook = readable(executed, result["parameters"], home.install if home else None)
        notebook = with_time(notebook, recorded.time_line(runs[chapter.name]))
        without_alt += [f"  {chapter.document}.md, {cell}" for cell in missing_alt(notebook)]
        cite = citing.section(chapter, result, root, home.url if home else None)
        notebook.cells.append(nbformat.v4.new_markdown_cell(cite, id="cite-this-chapter"))
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = with_links(cell.source, staged, missing)
        nbformat.write(notebook, folder / f"{chapter.document}.ipynb")
        shown[chapter.name] = notebook
    if without_alt:
        raise BookError(
            "figures without alt text; add to the cell's metadata `mystnb: {image: {alt: what one sees}}`:\n"
            + "\n".join(without_alt)
        )
    if not results:
        raise BookError(f"no chapter has been executed in profile {layout.profile}; nothing to build")
    toc = plan.load_toc(root)
    rooms = reference.pages(root) if reference.INDEX in plan.toc_documents(toc) else {}
    toc = reference.with_rooms(toc, rooms)
    documents = [document for document in plan.toc_documents(toc) if document not in missing]
    toc_text = yaml.safe_dump(plan.restrict_toc(toc, set(documents)), sort_keys=False)
    (folder / "_toc.yml").write_text(toc_text, encoding="utf-8")
    announcement = cpu_banner([result for _, result in results], layout.profile) if banner else None
    (folder / "_config.yml").write_text(config(root, home, announcement), encoding="utf-8")
    notebooks.write_notebooks(notebooks.make_notebooks(root, home), folder / NOTEBOOKS)
    parts = _parts(layout, chapters, runs, shown)
    for document in documents:
        if document in staged:
            continue
        if document in rooms:
            text = rooms[document]
        elif document in plan.GENERATED:
            text = results_page(results, layout.profile)
        else:
            text = (root / f"{document}.md").read_text(encoding="utf-8")
            text = with_links(recorded.filled(text, parts, f"{document}.md"), staged, missing)
        (folder / document).parent.mkdir(exist_ok=True)
        (folder / f"{document}.md").write_text(text, encoding="utf-8")
    for extra in ("references.bib", "_static"):
        if (source := root / "book" / extra).is_dir():
            shutil.copytree(source, folder / "book" / extra)
        elif source.exists():
            shutil.copy(source, folder / "book" / extra)
    return folder, documents, left_out


def _parts(
    layout: Layout,
    chapters: dict[str, Chapter],
    runs: dict[str, list[recorded.Run]],
    shown: dict[str, NotebookNode],
) -> recorded.Parts:
    """What stands in plain pages in place of ``<!-- made at staging: NAME -->``."""
    root, pictures = layout.root, layout.build / "stage" / "book" / "gallery"
    return {
        "gallery": lambda: gallery(shown, {name: c.title for name, c in chapters.items()}, pictures),
        "chapters": lambda: recorded.chapter_table(root, runs, "{}.md", status=True),
        "papers": lambda: recorded.papers_tables(root, runs),
        "rooms": lambda: reference.room_table(root),
        "limits": lambda: speed.limits(root),
        "beside": lambda: speed.beside(root),
        "budget": lambda: speed.budget(root),
        "cost": lambda: speed.cost(root),
        "throughput": lambda: speed.throughput(root),
    }
