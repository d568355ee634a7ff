"""The staged pages built into HTML with jupyter-book, and checked: complete, described, and offline."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path

import keys
import pages
from parameters import BookError
from plan import Chapter, Layout

__all__ = ["BuildFailed", "Page", "build_book", "check_page", "check_site"]

_MATHJAX = "sphinx-mathjax-offline"
# Of MathJax's 26 MB: one bundle (TeX and MathML in, HTML out), its fonts, what it loads on demand.
_MATHJAX_BUNDLE = "tex-mml-chtml.js"
_MATHJAX_SPEECH = {"base.json", "en.json", "nemeth.json"}


class BuildFailed(Exception):
    """The book was not built, or what was built is not complete."""


def build_book(layout: Layout, chapters: dict[str, Chapter], stale: list[str], banner: bool = False) -> Path:
    """Stage, build from nothing with warnings as errors, check, and put the site in ``html/``.

    Nothing is built when the staged pages, the packages and the site are those of the last build; an
    incremental build is never made, because it hides the warnings of pages it skips. Returns the index.
    Raises ``BookError`` for what the chapters lack and ``BuildFailed`` for the rest, which leaves the
    site of the last good build in place. ``banner``: pages that were made on a CPU say so at the top.
    """
    stage, documents, left_out = pages.stage(layout, chapters, banner)
    if left_out:
        print(f"book: without {', '.join(left_out)}, not yet run in profile {layout.profile}")
    if stale:
        print(f"book: {', '.join(stale)} as of an earlier run, whose source or settings have changed since")
    files = [path for path in stage.rglob("*") if path.is_file()]
    own = [Path(__file__), Path(__file__).with_name("signatures.py")]
    package = (layout.root / "companion").rglob("*.py")  # of its docstrings the reference is made
    sources = [keys.files_digest(stage, files), keys.files_digest(own[0].parent, own)]
    key = keys.digest([*sources, keys.files_digest(layout.root, package), keys.package_versions()])
    site, mark = layout.build / "html", layout.build / "html.key"
    index = site / f"{documents[0]}.html"
    try:
        unchanged = mark.read_text() == key and not check_site(site, documents)
    except FileNotFoundError:
        unchanged = False
    if unchanged:
        print(f"book: unchanged, {layout.shown(index)}", flush=True)
        return index
    built = _jupyter_book(layout, stage, strict=not left_out)
    _add_mathjax(built)
    # The download button serves the page's source, which here would be the executed notebook, MyST and all.
    shutil.copytree(stage / pages.NOTEBOOKS, built / "_sources", dirs_exist_ok=True)
    if problems := check_site(built, documents):
        raise BuildFailed("the built book is not complete:\n" + "\n".join(f"  {line}" for line in problems))
    mark.unlink(missing_ok=True)
    if site.exists():
        shutil.rmtree(site)
    built.rename(site)
    mark.write_text(key)
    print(f"book: {len(documents)} pages, {layout.shown(index)}", flush=True)
    return index


def _jupyter_book(layout: Layout, stage: Path, strict: bool) -> Path:
    """Run jupyter-book; ``strict`` makes warnings errors, which a book with chapters left out cannot bear."""
    target = layout.folder("building")
    shutil.rmtree(target)
    extensions = f"import sys; sys.path.append({str(Path(__file__).parent)!r})"  # signatures.py
    program = f"{extensions}; from jupyter_book.cli.main import main; sys.exit(main())"
    options = ["--path-output", str(target), "--all", *(["-W", "--keep-going"] if strict else [])]
    command = [sys.executable, "-c", program, "build", str(stage), *options]
    # The API reference is of this project's package, whichever else may be installed.
    path = os.pathsep.join([str(layout.root), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONPATH": path},
    )
    output = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    log = layout.folder("logs") / "build.log"
    log.write_text(output, encoding="utf-8")
    # myst-nb counts lines as cell * 10000 + line.
    lines = re.sub(r"\.ipynb:(\d+)(\d{4}):", _place, output).splitlines()
    told = [line for line in lines if re.search(r"\b(WARNING|ERROR|CRITICAL)\b|[Ee]rror:", line)]
    shown = "\n".join(f"  {line.replace(f'{stage}/', '')}" for line in told or lines[-15:])
    if done.returncode:
        cause = "jupyter-book failed (a warning counts as a failure):"
        raise BuildFailed(f"{cause}\n{shown}\nthe whole of it: {layout.shown(log)}")
    if told:
        print(f"book: warnings, perhaps about the chapters left out:\n{shown}")
    return target / "_build" / "html"


def _place(match: re.Match[str]) -> str:
    return f".ipynb, cell {match[1]}, line {int(match[2])}:"


def _add_mathjax(site: Path) -> None:
    """Copy MathJax out of the package that carries it, so that the book needs no network to show maths."""
    try:
        files = metadata.files(_MATHJAX) or []
    except metadata.PackageNotFoundError:
        raise BookError(f"{_MATHJAX} is not installed, which carries MathJax; run `make setup`") from None
    for file in files:
        name = str(file).partition("/static/mathjax/")[2]
        top_level_bundle = "/" not in name and name != _MATHJAX_BUNDLE
        other_speech = "mathmaps/" in name and file.name not in _MATHJAX_SPEECH
        if not name or top_level_bundle or other_speech or name.startswith("output/svg"):
            continue
        target = site / "_static" / "mathjax" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(file.locate()), target)


# --- checks ---------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What one HTML page has in it: headings, words, images without alt text, and what it loads."""

    _LOADING = {
        "stylesheet",
        "preload",
        "modulepreload",
        "icon",
        "preconnect",
        "dns-prefetch",
        "prefetch",
    }

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings = self.words = self._depth = 0
        self.without_alt: list[str] = []
        self.loads: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        attrs = {name: value or "" for name, value in attributes}
        self._inside = tag
        if tag == "article":
            self._depth += 1
        self.headings += tag == "h1" and self._depth > 0
        if tag == "img" and self._depth and not attrs.get("alt", "").strip():
            self.without_alt.append(attrs.get("src", ""))
        if tag == "link" and not self._LOADING & set(attrs.get("rel", "").split()):
            return
        if tag not in ("a", "base"):
            self.loads += [
                attrs[name] for name in ("src", "href", "srcset", "data", "poster") if name in attrs
            ]
        self.loads += _urls(attrs.get("style", ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""
        self._depth -= tag == "article"

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.loads += _urls(data)
        elif self._inside == "script":
            self.loads += re.findall(r"""["'](https?://[^"']+\.m?js)\b""", data)
        elif self._depth:
            self.words += len(data.split())


def _urls(css: str) -> list[str]:
    found = re.findall(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""", css)
    return [first or second for first, second in found]


def _foreign(urls: list[str]) -> list[str]:
    return sorted({url for url in urls if re.match(r"\s*(https?:)?//", url)})


def check_page(text: str) -> list[str]:
    """What is wrong with one page: no heading, no text, an image without alt text, something loaded afar."""
    page = Page(text)
    problems = [] if page.headings else ["no <h1> in the article"]
    problems += [] if page.words > 5 else ["no text in the article"]
    problems += [f"image without alt text: {source}" for source in page.without_alt]
    return problems + [f"loads {url} from another host" for url in _foreign(page.loads)]


def check_site(site: Path, documents: list[str]) -> list[str]:
    """What is wrong with a built book, a line each: every document must have a page, and stay offline."""
    problems = []
    for document in documents:
        page = site / f"{document}.html"
        if not page.is_file() or not page.stat().st_size:
            problems.append(f"{document}: in _toc.yml, but the book has no {document}.html")
            continue
        problems += [f"{document}.html: {line}" for line in check_page(page.read_text(encoding="utf-8"))]
    if not (site / "_static" / "mathjax" / _MATHJAX_BUNDLE).is_file():
        problems.append(f"_static/mathjax/{_MATHJAX_BUNDLE} is missing")
    for sheet in site.glob("_static/**/*.css"):
        urls = _foreign(_urls(sheet.read_text(encoding="utf-8", errors="replace")))
        problems += [f"{sheet.relative_to(site)}: loads {url} from another host" for url in urls]
    return problems
