"""Put folders on a branch: ``python tools/branch.py build/branch --branch notebooks``. Needs git alone.

Each folder in the given one, a release's notebooks, replaces the folder of that name on the branch; others
stay. The branch is made if there is none, nothing is pushed if nothing changed, and history only grows.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["BranchError", "main", "publish"]

ROOT = Path(__file__).resolve().parents[1]
TRIES = 3  # another run may push in between
AUTHOR = ("github-actions[bot]", "41898282+github-actions[bot]@users.noreply.github.com")


class BranchError(Exception):
    """The branch was not written; the message says why."""


def _git(*arguments: str, cwd: Path) -> str:
    environment = os.environ | {"GIT_TERMINAL_PROMPT": "0"}
    done = subprocess.run(
        ["git", *arguments], cwd=cwd, capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise BranchError(f"git {arguments[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def _check(source: Path) -> list[Path]:
    """The folders to publish; raises ``BranchError`` for none, a link, or a file that is no notebook."""
    folders = sorted(path for path in source.iterdir() if path.is_dir()) if source.is_dir() else []
    files = [path for path in source.rglob("*") if not path.is_dir() or path.is_symlink()]
    strange = [path for path in files if path.is_symlink() or path.suffix != ".ipynb"]
    if not folders or not files or strange:
        what = f"{strange[0]} is no notebook" if strange else f"{source} holds no folder of notebooks"
        raise BranchError(f"nothing published: {what}")
    return folders


def publish(source: Path, branch: str, root: Path, remote: str = "origin") -> str | None:
    """Push the folders in ``source`` to ``branch`` of ``remote``; returns the commit, None if all was there.

    Raises ``BranchError`` when there is nothing to publish, or the push is refused.
    """
    folders, head = _check(source), _git("rev-parse", "HEAD", cwd=root)
    url = _git("remote", "get-url", "--push", remote, cwd=root)
    for tries_left in reversed(range(TRIES)):
        with tempfile.TemporaryDirectory() as folder:
            commit = _commit(Path(folder), folders, branch, url, f"Notebooks of {head}")
            if commit is None:
                return None
            try:
                _git("push", "--quiet", url, f"HEAD:refs/heads/{branch}", cwd=Path(folder))
            except BranchError:
                if not tries_left:
                    raise
                continue
            return commit
    return None


def _commit(clone: Path, folders: list[Path], branch: str, url: str, message: str) -> str | None:
    """The branch as it is now, in an empty folder, with one more commit; None if it would be empty."""
    _git("init", "--quiet", cwd=clone)
    if _git("ls-remote", "--heads", url, branch, cwd=clone):
        _git("fetch", "--quiet", "--depth=1", url, branch, cwd=clone)
        _git("checkout", "--quiet", "-B", branch, "FETCH_HEAD", cwd=clone)
    else:
        _git("checkout", "--quiet", "--orphan", branch, cwd=clone)
    for new in folders:
        shutil.rmtree(clone / new.name, ignore_errors=True)
        shutil.copytree(new, clone / new.name)
    _git("add", "--all", cwd=clone)
    if not _git("status", "--porcelain", cwd=clone):
        return None
    name, address = AUTHOR
    identity = ["-c", f"user.name={name}", "-c", f"user.email={address}"]
    _git(*identity, "commit", "--quiet", "-m", message, cwd=clone)
    return _git("rev-parse", "HEAD", cwd=clone)


def main(argv: list[str] | None = None) -> int:
    """Publish; returns the exit status."""
    parser = argparse.ArgumentParser(description="Put folders of notebooks on a branch.")
    parser.add_argument("source", type=Path, help="its folders replace those of the same name on the branch")
    parser.add_argument("--branch", default="notebooks")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    try:
        commit = publish(arguments.source, arguments.branch, arguments.root)
    except BranchError as error:
        print(f"branch: error: {error}", file=sys.stderr)
        return 1
    print(f"branch: {arguments.branch} {'unchanged' if commit is None else 'at ' + commit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
