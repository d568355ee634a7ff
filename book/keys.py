"""When a result is stale: content hashes over all that an executed chapter or a built book depends on."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from plan import Chapter

__all__ = ["cache_key", "digest", "files_digest", "package_versions"]


@cache
def package_versions() -> dict[str, str]:
    """Version of every installed package that the book stands on, however indirectly."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    todo = [*project["dependencies"], *project["optional-dependencies"]["book"]]
    versions: dict[str, str] = {}
    while todo:
        name = re.sub(r"[-_.]+", "-", re.match(r"\s*([\w.-]+)", todo.pop())[1]).lower()
        if name in versions:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # a dependency of other platforms
        versions[name] = distribution.version
        todo += [text for text in distribution.requires or [] if "extra ==" not in text]
    return dict(sorted(versions.items()))


def digest(parts: object) -> str:
    """A short content hash of anything that json can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def files_digest(root: Path, paths: Iterable[Path]) -> str:
    """One hash over names and contents of files."""
    hashed = hashlib.sha256()
    for path in sorted(paths):
        content = path.read_bytes()
        hashed.update(f"{path.relative_to(root)}\0{len(content)}\0".encode() + content)
    return hashed.hexdigest()[:32]


def _fingerprint(data: Any) -> object:
    """Size and time of a data file, or of every file in a data folder; None for a data set's name."""
    path = Path(data) if isinstance(data, str) else None
    if path is None or not path.is_absolute() or not path.exists():
        return None
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def cache_key(root: Path, chapter: Chapter, values: dict[str, Any], profile: str) -> str:
    """A hash of all that an executed chapter depends on; while it stays, the chapter is not run again."""
    here = Path(__file__).parent
    return digest(
        {
            "chapter": chapter.text,
            "parameters": values,
            "profile": profile,
            "companion": files_digest(root, (root / "companion").rglob("*.py")),
            "runner": files_digest(
                here, [here / f"{name}.py" for name in ("parameters", "plan", "keys", "execute")]
            ),
            "python": platform.python_version(),
            "packages": package_versions(),
            "data": _fingerprint(values.get("data")),
        }
    )
