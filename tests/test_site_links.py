"""Every link within the built book leads to a page and a place on it that are there; no browser needed.

``BOOK_SITE`` names the folder of the site (default: the smoke profile's), as in ``test_pages.py``.
"""

import os
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
SITE = Path(os.environ.get("BOOK_SITE") or ROOT / "build" / "smoke" / "html").resolve()
FOUND = sorted(path.relative_to(SITE).as_posix() for path in SITE.glob("**/*.html"))
PAGES = [page for page in FOUND if not page.startswith("_static/")]  # the theme's templates lie there


class Links(HTMLParser):
    """What a page links to and loads, and the places on it that others can link to."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.places = [], {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attrs = {name: value or "" for name, value in attributes}
        self.places |= {attrs[name] for name in ("id", "name") if name in attrs and tag != "meta"}
        self.targets += [attrs[name] for name in ("href", "src") if name in attrs]
        if tag == "meta" and attrs.get("http-equiv", "").lower() == "refresh":
            self.targets.append(attrs["content"].partition("url=")[2])


def broken(site, page):
    """The links of a page that lead nowhere within the site."""

    @cache
    def read(path):
        return Links(path.read_text(encoding="utf-8"))

    for target in dict.fromkeys(read(site / page).targets):
        if urlsplit(target).scheme or target.startswith("//"):
            continue  # outside; tools/links.py asks those
        full = urlsplit(urljoin(page, target)) if target else urlsplit(page)
        if target.startswith("/") or full.path.startswith(".."):
            yield f"{target}: leaves the site, which may lie in a folder of its host"
            continue
        path = site / unquote(full.path)
        if path.is_dir():
            path = path / "index.html"
        if not path.is_file():
            yield f"{target}: no such file"
        elif full.fragment and path.suffix == ".html" and unquote(full.fragment) not in read(path).places:
            yield f"{target}: no such place on that page"


def test_there_are_pages():
    if not PAGES and not os.environ.get("BOOK_SITE") and os.environ.get("CI") != "true":
        pytest.skip(f"no built book in {SITE}; run `python book/run.py --profile smoke` first")
    assert "index.html" in PAGES and "book/index.html" in PAGES, f"no built book in {SITE}"


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_book_resolve(page):
    assert not list(broken(SITE, page))


def test_broken_links_are_found(tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "a b.png").touch()
    (tmp_path / "book" / "two.html").write_text('<h1 id="über">Two</h1>')
    (tmp_path / "index.html").write_text(
        '<meta http-equiv="Refresh" content="0; url=book/index.html"><a href="book/two.html#%C3%BCber"></a>'
        '<a href="#here" id="here"></a><a href=""></a><a href="#"></a><img src="a%20b.png">'
        '<a href="book/two.html#gone"></a><a href="gone.html"></a><a href="/book/two.html"></a>'
        '<a href="../up.html"></a><a href="#nowhere"></a><a href="https://a.org/gone"></a>'
        '<a href="mailto:a@b.org"></a><a href="book"></a>'
    )
    assert [line.split(":")[0] for line in broken(tmp_path, "index.html")] == [
        "book/index.html",
        "book/two.html#gone",
        "gone.html",
        "/book/two.html",
        "../up.html",
        "#nowhere",
        "book",
    ]
