"""The API reference: a page a room of the package, written anew at each staging so that none is forgotten.

A room is a public module of ``companion``, or a package in it with its public modules. Sphinx fills the pages
from signatures and docstrings; here only the source is read, so that staging does not import the package.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from recorded import as_table

__all__ = ["INDEX", "pages", "public_names", "room_table", "rooms", "with_rooms"]

INDEX = "book/api/index"  # its entry in _toc.yml gets the rooms as sections


def rooms(root: Path) -> dict[str, list[str]]:
    """Every room, by its name, and the modules in it: ``{"langevin": ["companion.langevin"], ...}``."""
    folder = root / "companion"
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("_"):
            continue
        if path.suffix == ".py":
            found[path.stem] = [f"companion.{path.stem}"]
        elif (path / "__init__.py").is_file():
            inside = sorted(part.stem for part in path.glob("*.py") if not part.stem.startswith("_"))
            found[path.name] = [f"companion.{path.name}.{stem}" for stem in inside]
    return found


def _tree(root: Path, module: str) -> ast.Module:
    path = root.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _assigned(tree: ast.Module) -> dict[str, ast.expr]:
    """What a module assigns to plain names at its top level."""
    single = [n for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
    found = {node.targets[0].id: node.value for node in single}
    typed = [
        n for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and n.value
    ]
    return found | {node.target.id: node.value for node in typed}


def public_names(root: Path, module: str) -> list[str]:
    """A module's ``__all__``; empty if it has none."""
    names = _assigned(_tree(root, module)).get("__all__")
    return ast.literal_eval(names) if names is not None else []


def _foreign_values(root: Path, module: str) -> list[str]:
    """Public names that are values taken from elsewhere in the package: automodule passes over them."""
    public, found = set(public_names(root, module)), []
    for node in _tree(root, module).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("companion."):
            there = _assigned(_tree(root, node.module))
            found += [alias.name for alias in node.names if alias.name in public & there.keys()]
    return found


def _summary(root: Path, module: str) -> str:
    """The first sentence of a module's docstring, or its first line."""
    text = ast.get_docstring(_tree(root, module)) or ""
    return text.split("\n\n")[0].replace("\n", " ").strip()


def _automodule(root: Path, module: str) -> list[str]:
    lines = ["```{eval-rst}", f".. automodule:: {module}"]
    for name in _foreign_values(root, module):
        lines += ["", f".. autodata:: {module}.{name}"]
    return [*lines, "```"]


def pages(root: Path) -> dict[str, str]:
    """The text of every room's page, by its document, ``book/api/<room>``."""
    found = {}
    for room, modules in rooms(root).items():
        lines = [f"# {room}", ""]
        if modules == [f"companion.{room}"]:
            lines += _automodule(root, modules[0])
        else:
            lines += ["```{eval-rst}", f".. automodule:: companion.{room}", "   :no-members:"]
            lines += ["   :no-special-members:", "```", ""]
            names = ", ".join(f"`{name}`" for name in public_names(root, f"companion.{room}"))
            lines += [f"`from companion.{room} import ...` has {names}.", ""]
            for module in modules:
                lines += [f"## {module.removeprefix('companion.')}", "", *_automodule(root, module), ""]
        found[f"book/api/{room}"] = "\n".join(lines) + "\n"
    return found


def room_table(root: Path) -> list[str]:
    """The rooms and what they hold, for the index of the reference."""
    rows = []
    for room, modules in rooms(root).items():
        package = modules != [f"companion.{room}"]
        names = public_names(root, f"companion.{room}") if package else public_names(root, modules[0])
        link = f"[`companion.{room}`]({room}.md)"
        rows.append([link, _summary(root, f"companion.{room}"), ", ".join(f"`{name}`" for name in names)])
    return as_table(["room", "what it is", "public names"], rows)


def with_rooms(toc: Any, found: dict[str, str]) -> Any:
    """The table of contents with the rooms' pages under the index of the reference."""
    if isinstance(toc, list):
        return [with_rooms(item, found) for item in toc]
    if not isinstance(toc, dict):
        return toc
    if toc.get("file") == INDEX:
        return {**toc, "sections": [{"file": document} for document in found]}
    return {key: with_rooms(value, found) for key, value in toc.items()}
