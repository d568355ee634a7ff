"""How to cite a chapter: BibTeX of the method's paper and of this implementation, written at staging time.

A chapter names the papers in its front matter, ``cite: key`` or a list of keys of ``book/references.bib``.
Title, authors and version of the implementation come from ``CITATION.cff`` and ``companion/__init__.py``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from parameters import BookError, unknown
from plan import Chapter

__all__ = ["bibtex_entries", "cited", "implementation", "section", "version"]


def version(root: Path) -> str:
    """The version of the companion and so of the book: ``__version__``, said in one place."""
    path = root / "companion" / "__init__.py"
    found = re.search(r'^__version__ = "([^"]+)"$', path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if not found:
        raise BookError('companion/__init__.py: the line `__version__ = "..."` is missing')
    return found[1]


def bibtex_entries(text: str) -> dict[str, str]:
    """The entries of a ``.bib`` file as they stand there, by key; raises ``BookError`` for one left open."""
    entries = {}
    for start in re.finditer(r"^@\w+\{([^,\s]+),", text, flags=re.MULTILINE):
        depth, at = 1, start.end()
        while depth and at < len(text):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if depth:
            raise BookError(f"references.bib: the entry {start[1]} has no end")
        entries[start[1]] = text[start.start() : at]
    return entries


def cited(chapter: Chapter, entries: dict[str, str]) -> list[str]:
    """The keys in a chapter's front matter; raises ``BookError`` for one that the bibliography lacks."""
    front = yaml.safe_load(chapter.text.split("---\n", 2)[1])
    keys = front.get("cite") or []
    keys = [keys] if isinstance(keys, str) else keys
    for key in keys:
        if key not in entries:
            raise unknown("key", key, entries, f"{chapter.document}.md, front matter, cite")
    return keys


def _braced(text: str) -> str:
    """Text as BibTeX shows it, with its capitals kept."""
    return "{" + re.sub(r"([&%$#_])", r"\\\1", text) + "}"


def implementation(chapter: Chapter, result: dict[str, Any], root: Path, url: str | None) -> str:
    """The BibTeX entry of a chapter as it was executed: version, year, address if known, profile, commit."""
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    authors = [
        _braced(a["name"]) if "name" in a else f"{a['family-names']}, {a['given-names']}"
        for a in citation["authors"]
    ]
    book = citation["title"].split(":")[0]
    note = f"Chapter {chapter.name}, executed in the profile {result['profile']}"
    fields = {
        "author": " and ".join(authors),
        "title": f"{_braced(chapter.title)}, a chapter of {_braced(book)}",
        "version": version(root),
        "year": str(citation.get("date-released") or result["finished"])[:4],
        "url": url,
        "note": note + (f" at commit {result['commit'][:10]}" if result["commit"] else ""),
    }
    lines = [f"  {name:<7} = {{{value}}}" for name, value in fields.items() if value]
    key = re.sub(r"\W+", "-", book.lower()).strip("-")
    return f"@software{{{key}-{chapter.name},\n" + ",\n".join(lines) + "\n}"


def section(chapter: Chapter, result: dict[str, Any], root: Path, url: str | None) -> str:
    """The Markdown at the end of a chapter's page."""
    bibliography = root / "book" / "references.bib"
    entries = bibtex_entries(bibliography.read_text(encoding="utf-8"))
    keys = cited(chapter, entries)
    lines = ["## Cite this chapter", ""]
    for count, key in enumerate(keys):
        lines += ["The method:" if not count else "and", "", "```bibtex", entries[key], "```", ""]
    lines += ["This implementation:", "", "```bibtex", implementation(chapter, result, root, url), "```"]
    return "\n".join(lines)
