"""What is to be run: the chapters, and their parameters under a profile.

A chapter is a MyST text notebook ``book/<chapter>.md`` named by ``_toc.yml``. Its cell tagged
``parameters`` holds plain ``name = literal`` lines; those defaults are the ``cpu`` profile. A profile
``book/profiles/<profile>.yml`` has a section a chapter with the values that differ, and may have a
section ``run:`` for the runner itself. ``--set`` and ``--data`` come last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import jupytext
import yaml
from nbformat import NotebookNode
from parameters import BookError, Parameter, agree, read_parameters, unknown

__all__ = [
    "GENERATED",
    "Chapter",
    "Layout",
    "Profile",
    "RunOptions",
    "Setting",
    "load_chapters",
    "load_profile",
    "load_toc",
    "resolve",
    "restrict_toc",
    "select",
    "tags",
    "toc_documents",
]

GENERATED = ("book/results",)  # entries of _toc.yml that the runner writes itself


@dataclass(frozen=True)
class Layout:
    """Where things lie: the project's root and the folders of one profile under ``build/``.

    Of several processes that run a chapter together, those behind the first have a folder of their own.
    """

    root: Path
    profile: str
    rank: int = 0

    @property
    def build(self) -> Path:
        build = self.root / "build" / self.profile
        return build / f"rank-{self.rank}" if self.rank else build

    def folder(self, name: str) -> Path:
        """``build/<profile>/<name>``, made if it is missing."""
        path = self.build / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def shown(self, path: Path) -> str:
        """A path the reader can paste: relative to the root where it lies below it."""
        return str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)


@dataclass(frozen=True)
class Chapter:
    """A chapter as written: ``document`` is its entry in ``_toc.yml``, e.g. ``book/short-run``."""

    name: str
    document: str
    path: Path
    text: str
    notebook: NotebookNode
    parameters: dict[str, Parameter]

    @property
    def distributed(self) -> bool:
        """Whether several processes can share its training: ``distributed: true`` in its front matter."""
        return bool(self.notebook.metadata.get("distributed", False))

    @property
    def title(self) -> str:
        """The chapter's first heading, or its name."""
        text = "\n".join(cell.source for cell in self.notebook.cells if cell.cell_type == "markdown")
        found = re.search(r"^# +(.+)$", text, flags=re.MULTILINE)
        return found[1].strip() if found else self.name


@dataclass(frozen=True)
class RunOptions:
    """A profile's ``run:`` section. Times in seconds; ``cell_timeout: null`` means no limit."""

    cell_timeout: float | None = 900.0
    start_timeout: float = 120.0


@dataclass(frozen=True)
class Profile:
    """A profile file: what it sets for each chapter, and how the runner should run."""

    name: str
    path: Path
    sections: dict[str, dict[str, Any]]
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class Setting:
    """One ``--set [chapter.]name=value``."""

    chapter: str | None
    name: str
    value: Any

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Read ``name=value`` or ``chapter.name=value``; raises ``BookError`` when it is neither."""
        target, equals, value = text.partition("=")
        chapter, _, name = target.strip().rpartition(".")
        if not equals or not name:
            raise BookError(f"--set {text}: write --set name=value or --set chapter.name=value")
        try:
            return cls(chapter or None, name, yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise BookError(f"--set {text}: the value is not YAML ({error})") from None


# --- names ----------------------------------------------------------------------------------------


def tags(cell: NotebookNode) -> list[str]:
    """A cell's tags."""
    return list(cell.metadata.get("tags", []))


def toc_documents(node: Any) -> Iterator[str]:
    """The documents that a table of contents names, in reading order, its root first."""
    if isinstance(node, list):
        for item in node:
            yield from toc_documents(item)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("root", "file"):
                yield str(value)
            elif isinstance(value, (list, dict)):
                yield from toc_documents(value)


def restrict_toc(node: Any, keep: set[str]) -> Any:
    """The table of contents with only the entries in ``keep``, and no part or section left empty."""
    if isinstance(node, list):
        return [kept for item in node if (kept := restrict_toc(item, keep)) is not None]
    if not isinstance(node, dict) or ("file" in node and node["file"] not in keep):
        return None if isinstance(node, dict) else node
    kept = {key: value for key, old in node.items() if (value := restrict_toc(old, keep)) != []}
    emptied = len(kept) < len(node) and not any(isinstance(value, list) for value in kept.values())
    return None if emptied and not node.keys() & {"root", "file"} else kept


def load_toc(root: Path) -> dict[str, Any]:
    """``_toc.yml`` as an object; raises ``BookError`` when it is missing or not YAML."""
    return _yaml_map(root / "_toc.yml")


def load_chapters(root: Path) -> dict[str, Chapter]:
    """All chapters in the order of ``_toc.yml``, by name.

    Raises ``BookError`` for an entry without a file and for a parameters cell it cannot read.
    """
    chapters = {}
    for document in toc_documents(load_toc(root)):
        path = root / f"{document}.md"
        if document in GENERATED:
            continue
        if not path.is_file():
            written = sorted(f"book/{p.stem}" for p in (root / "book").glob("*.md"))
            raise unknown("page", document, written, "_toc.yml")
        text = path.read_text(encoding="utf-8")
        if not re.match(r"---\n(?:.*\n)*?kernelspec:", text):
            continue  # a plain page
        notebook = jupytext.reads(text, fmt="md:myst")
        cells = [c for c in notebook.cells if c.cell_type == "code" and "parameters" in tags(c)]
        if len(cells) != 1:
            raise BookError(f"{document}.md: needs one code cell tagged 'parameters', has {len(cells)}")
        name = path.stem
        parameters = read_parameters(cells[0].source, f"{document}.md, cell 'parameters'")
        chapters[name] = Chapter(name, document, path, text, notebook, parameters)
    return chapters


def select(chapters: dict[str, Chapter], only: list[str]) -> list[Chapter]:
    """The chapters named by ``--only``, in the book's order; all when none is named."""
    for name in only:
        if name not in chapters:
            raise unknown("chapter", name, chapters, "--only")
    return [chapter for name, chapter in chapters.items() if not only or name in only]


# --- profiles and settings ------------------------------------------------------------------------


def _yaml_map(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BookError(f"{path.name}: no such file in {path.parent}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BookError(f"{path}: not valid YAML: {error}") from None
    if content is not None and not isinstance(content, dict):
        raise BookError(f"{path}: expected 'name: value' lines at the top level")
    return content or {}


def load_profile(root: Path, name: str, chapters: dict[str, Chapter]) -> Profile:
    """A profile with every name and type in it checked against the chapters.

    Raises ``BookError`` for an unknown profile, chapter, parameter or run option, and for a wrong type.
    """
    folder = root / "book" / "profiles"
    known = sorted(path.stem for path in folder.glob("*.yml"))
    if name not in known:
        raise unknown("profile", name, known, "--profile")
    path = folder / f"{name}.yml"
    content = _yaml_map(path)
    where = f"book/profiles/{name}.yml"
    options = content.pop("run", None) or {}
    for option, value in options.items():
        if option not in (names := [f.name for f in fields(RunOptions)]):
            raise unknown("run option", option, names, where)
        if value is not None:
            options[option] = agree(0.0, value, f"{where}: {option}")
    sections: dict[str, dict[str, Any]] = {}
    for chapter, section in content.items():
        if chapter not in chapters:
            raise unknown("chapter", chapter, [*chapters, "run"], where)
        sections[chapter] = {
            key: _checked(chapters[chapter], key, value, f"{where}, section {chapter}")
            for key, value in (section or {}).items()
        }
    return Profile(name, path, sections, RunOptions(**options))


def _checked(chapter: Chapter, name: str, value: Any, where: str) -> Any:
    if name not in chapter.parameters:
        raise unknown("parameter", name, chapter.parameters, where)
    return agree(chapter.parameters[name].default, value, f"{where}: {name}")


def resolve(
    chapters: dict[str, Chapter],
    selected: list[Chapter],
    profile: Profile,
    settings: Iterable[Setting] = (),
    data: str | None = None,
) -> dict[str, dict[str, Any]]:
    """For each selected chapter all its parameters: defaults, then the profile, then ``--set``, ``--data``.

    Raises ``BookError`` for a name that no selected chapter has, a wrong type, a data path that does not
    exist, and a selected chapter for which the profile has no section.
    """
    resolved = {}
    for chapter in selected:
        if chapter.name not in profile.sections:
            raise BookError(
                f"book/profiles/{profile.name}.yml has no section for {chapter.name!r}; add one "
                f"(`{chapter.name}: {{}}` runs the chapter's own defaults)"
            )
        defaults = {name: parameter.default for name, parameter in chapter.parameters.items()}
        resolved[chapter.name] = {**defaults, **profile.sections[chapter.name]}
    if data is not None:
        settings = [*settings, Setting(None, "data", data)]
    for setting in settings:
        if setting.chapter and setting.chapter not in chapters:
            raise unknown("chapter", setting.chapter, chapters, f"--set {setting.chapter}.{setting.name}")
        targets = [c for c in selected if setting.chapter in (None, c.name)]
        if setting.chapter and not targets:
            raise BookError(f"--set {setting.chapter}.{setting.name}: that chapter is not selected by --only")
        having = [chapter for chapter in targets if setting.name in chapter.parameters]
        flag = "--data" if setting.name == "data" and setting.value == data else f"--set {setting.name}"
        if not having:
            known = dict.fromkeys(name for chapter in targets for name in chapter.parameters)
            raise unknown("parameter", setting.name, known, flag)
        for chapter in having:
            resolved[chapter.name][setting.name] = _checked(chapter, setting.name, setting.value, flag)
    for values in resolved.values():
        if isinstance(values.get("data"), str):
            values["data"] = _data(values["data"])
    return resolved


def _data(value: str) -> str:
    """A data set's name as it is; a path made absolute, because kernels run in the project's root."""
    path = Path(value).expanduser()
    is_path = len(path.parts) > 1 or value.startswith(("~", ".")) or path.suffix != ""
    if not is_path:
        return value
    if not path.exists():
        raise BookError(f"--data {value}: no such file or folder (looked for {path.absolute()})")
    return str(path.resolve())
