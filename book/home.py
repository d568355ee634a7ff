"""Where the book lives: the one place that knows its public address and the release that is being made.

Pages, notebooks and install lines take it from here. It comes from CI's environment, else from git's
``origin``; a copy of the book that has neither gets no Colab buttons and no install line.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from parameters import BookError

__all__ = ["BRANCH", "COLAB", "Home", "find_home", "git"]

BRANCH = "notebooks"  # CI writes the generated notebooks there, a folder a release
COLAB = "https://colab.research.google.com"
_GITHUB = "github.com"  # the only host that Colab opens notebooks from


@dataclass(frozen=True)
class Home:
    """``clone``: what git fetches; ``ref``: the commit or tag; ``release``: the tag, None between releases.

    ``site`` is the address of the published pages, where it is not GitHub's usual one.
    """

    clone: str
    ref: str
    release: str | None = None
    site: str | None = None

    @property
    def url(self) -> str:
        """The repository's page."""
        return self.clone.removesuffix("/").removesuffix(".git")

    @property
    def install(self) -> str:
        """What pip installs the companion from."""
        return f"git+{self.clone}@{self.ref}"

    @property
    def folder(self) -> str:
        """The folder of this release on the branch of notebooks; ``latest`` between releases."""
        return self.release or "latest"

    @property
    def on_colab(self) -> bool:
        """Whether Colab can open what lies here."""
        return urlsplit(self.clone).hostname == _GITHUB

    def notebook(self, document: str) -> str | None:
        """The address at which Colab opens a chapter, e.g. of ``book/short-run``; None if it cannot."""
        if not self.on_colab:
            return None
        path = urlsplit(self.url).path.strip("/")
        return f"{COLAB}/github/{path}/blob/{BRANCH}/{self.folder}/{document}.ipynb"

    def page(self, document: str) -> str | None:
        """The address of a page of the published book; None where it is not known."""
        site = self.site
        if site is None and self.on_colab:
            owner, _, name = urlsplit(self.url).path.strip("/").partition("/")
            site = f"https://{owner.lower()}.github.io/{name}"
        return f"{site.rstrip('/')}/{document}.html" if site else None


def git(root: Path, *arguments: str) -> str | None:
    """What a git command prints in ``root``; None when it fails or there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def find_home(root: Path, ref: str | None = None) -> Home | None:
    """The book's home; None without a public address.

    ``ref`` is a tag or commit to use instead of the one that is checked out. The address of the pages can be
    given in the environment variable ``BOOK_URL``. Raises ``BookError`` for a ref that cannot be one.
    """
    place = _from_ci(root) or _from_origin(root)
    if place is None:
        return None
    clone, checked_out, release = place
    if ref is not None:
        checked_out, release = ref, None if re.fullmatch("[0-9a-f]{40}", ref) else ref
    if not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", checked_out):
        raise BookError(f"{checked_out!r} is not a tag or a commit")
    return Home(clone, checked_out, release, os.environ.get("BOOK_URL") or None)


def _from_ci(root: Path) -> tuple[str, str, str | None] | None:
    """Clone address, commit or tag, and release, as GitHub's runner says them about its own checkout."""
    names = ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_SHA")
    server, repository, commit = (os.environ.get(name) for name in names)
    workspace = os.environ.get("GITHUB_WORKSPACE")
    if not (server and repository and commit):
        return None
    if workspace and not root.resolve().is_relative_to(Path(workspace).resolve()):
        return None  # another project on the same runner
    tag = os.environ.get("GITHUB_REF_NAME") if os.environ.get("GITHUB_REF_TYPE") == "tag" else None
    return f"{server.rstrip('/')}/{repository}", tag or commit, tag


def _from_origin(root: Path) -> tuple[str, str, str | None] | None:
    """The same from git: its ``origin``, if that is public, and the release's tag at the commit, if any."""
    origin, head = git(root, "remote", "get-url", "origin"), git(root, "rev-parse", "--verify", "HEAD")
    if not origin or not head:
        return None
    if match := re.fullmatch(r"[\w.-]+@([\w.-]+):(?!/)(.+)", origin):  # git@host:owner/name.git
        origin = f"ssh://{match[1]}/{match[2]}"
    url = urlsplit(origin)
    if url.scheme not in ("http", "https", "ssh") or "." not in (url.hostname or ""):
        return None
    port = f":{url.port}" if url.port and url.scheme != "ssh" else ""
    scheme = "https" if url.scheme == "ssh" else url.scheme
    tags = (git(root, "tag", "--points-at", "HEAD") or "").splitlines()
    tag = next((tag for tag in reversed(tags) if re.fullmatch(r"v\d[\w.]*", tag)), None)
    return f"{scheme}://{url.hostname}{port}{url.path}", tag or head, tag
