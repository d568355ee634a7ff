"""Do the external links still lead somewhere? ``python tools/links.py`` asks each of them, politely.

The links are those of the pages in book/, the files of the project's root and book/references.bib (url, doi,
arXiv). An answer that a page is there is kept in build/links.json and believed for a fortnight. A page that
only keeps robots out (401, 403, 429) counts as there; of a DOI it is asked whether it is registered, not
whether the publisher lets us in. One request at a time, a pause between two to one host.

Exit status: 0 all are there, 1 some are dead, 2 no network (nothing is said about any link).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import requests

__all__ = ["ask", "find_links", "main", "urls_in"]

ROOT = Path(__file__).resolve().parents[1]
BELIEVED = timedelta(days=14)
TIMEOUT = (10.0, 30.0)  # seconds to connect, seconds without a byte
TRIES = 3
AGENT = "downhill-with-noise link check (one request a page, once a fortnight)"
GUARDED = {401, 403, 405, 429}
_TEMPORARY = {408, 425, 429, 500, 502, 503, 504}


# --- finding --------------------------------------------------------------------------------------


def urls_in(text: str) -> list[str]:
    """The external addresses in Markdown, YAML or BibTeX, in their order; those of examples are left out."""
    found = []
    for raw in re.findall(r"https?://[^\s<>\"'`{}\\|^]+", text):
        url = raw.rstrip(".,;:!?*_")
        while url.endswith((")", "]")) and url.count(")") + url.count("]") > url.count("(") + url.count("["):
            url = url[:-1].rstrip(".,;:!?*_")
        host = urlsplit(url).hostname or ""
        example = host in ("localhost", "127.0.0.1") or host.endswith(
            (".example", "example.org", "example.com")
        )
        if "." in host and not example:
            found.append(url)
    return list(dict.fromkeys(found))


def _references(text: str) -> list[str]:
    """The addresses behind ``doi`` and ``eprint`` fields of BibTeX."""
    dois = re.findall(r"^\s*doi\s*=\s*[{\"]([^}\"]+)", text, flags=re.MULTILINE)
    papers = re.findall(r"^\s*eprint\s*=\s*[{\"](\d{4}\.\d{4,5})", text, flags=re.MULTILINE)
    return [f"https://doi.org/{doi}" for doi in dois] + [f"https://arxiv.org/abs/{paper}" for paper in papers]


def find_links(root: Path) -> dict[str, list[str]]:
    """Every external address, with the files that have it."""
    files = [*root.glob("*.md"), root / "CITATION.cff", *root.glob("book/**/*.md"), *root.glob("book/*.bib")]
    links: dict[str, list[str]] = {}
    for path in sorted(path for path in files if path.is_file()):
        text = path.read_text(encoding="utf-8")
        for url in urls_in(text) + (_references(text) if path.suffix == ".bib" else []):
            links.setdefault(url, []).append(path.relative_to(root).as_posix())
    return links


# --- asking ---------------------------------------------------------------------------------------


def ask(url: str, session: requests.Session, pause: float) -> tuple[bool | None, str]:
    """Whether a page is there, and what its host said; None when the host could not be reached."""
    follow = urlsplit(url).hostname not in ("doi.org", "dx.doi.org")
    said = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(pause * 2**attempt)
        try:
            answer = session.head(url, timeout=TIMEOUT, allow_redirects=follow)
            if answer.status_code >= 400 and answer.status_code not in _TEMPORARY:
                # Some hosts do not know HEAD; the body is not read.
                answer = session.get(url, timeout=TIMEOUT, allow_redirects=follow, stream=True)
                answer.close()
        except requests.RequestException as error:
            said = f"{type(error).__name__}: {str(error).rsplit(': ', 1)[-1].strip('()')}"
            continue
        said = str(answer.status_code)
        if answer.status_code < 400 or answer.status_code in GUARDED:
            return True, said
        if answer.status_code not in _TEMPORARY:
            return False, said
    return (False if said.isdecimal() else None), said


def _by_turns(urls: Iterable[str]) -> list[str]:
    """Addresses in an order in which two of one host are as far apart as can be."""
    hosts: dict[str, list[str]] = {}
    for url in urls:
        hosts.setdefault(urlsplit(url).netloc, []).append(url)
    order = [(i, url) for urls_of_host in hosts.values() for i, url in enumerate(urls_of_host)]
    return [url for _, url in sorted(order, key=lambda item: item[0])]


def _read(cache: Path) -> dict[str, str]:
    try:
        kept = json.loads(cache.read_text(encoding="utf-8"))
        oldest = (datetime.now(UTC) - BELIEVED).isoformat()
        return {url: when for url, when in kept.items() if when > oldest}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(cache: Path, good: dict[str, str]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_name(f".{cache.name}.part")
    temporary.write_text(json.dumps(dict(sorted(good.items())), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, cache)


def main(argv: list[str] | None = None) -> int:
    """Ask all links that are not known to be good; returns the exit status."""
    parser = argparse.ArgumentParser(description="Check the external links.")
    parser.add_argument("--again", action="store_true", help="ask also what was found good lately")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between requests to one host (1)")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    links, cache = find_links(arguments.root), arguments.root / "build" / "links.json"
    good = {} if arguments.again else _read(cache)
    session = requests.Session()
    session.headers["User-Agent"] = AGENT
    last: dict[str, float] = {}
    dead: dict[str, str] = {}
    unreached: dict[str, str] = {}
    reached = 0
    due = _by_turns(url for url in links if url not in good)
    try:
        for url in due:
            host = urlsplit(url).netloc
            time.sleep(max(0.0, last.get(host, -1e9) + arguments.pause - time.monotonic()))
            there, said = ask(url, session, arguments.pause)
            last[host] = time.monotonic()
            reached += there is not None
            if there:
                good[url] = datetime.now(UTC).isoformat()
            else:
                (dead if there is False else unreached)[url] = said
            if not reached and len(unreached) >= 3 and len({urlsplit(u).netloc for u in unreached}) >= 2:
                break  # hosts that have nothing to do with each other: it is this machine's network
    finally:
        _write(cache, {url: when for url, when in good.items() if url in links})
    if due and not reached:
        print(f"links: no network ({next(iter(unreached.values()))}); nothing is known", file=sys.stderr)
        return 2
    for url, said in sorted((dead | unreached).items()):
        print(f"{url}: {said} ({', '.join(links[url])})")
    bad = len(dead) + len(unreached)
    print(f"links: {len(links)} in all, {len(due)} asked, {bad} dead")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
