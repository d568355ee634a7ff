"""Make a release: ``python tools/release.py [--profile cpu] [--tag vX.Y.Z]`` fills ``dist/``.

    downhill_with_noise-<version>-py3-none-any.whl, downhill_with_noise-<version>.tar.gz
    downhill-with-noise-<version>-book.tar.gz        the pages of build/<profile>/html
    SHA256SUMS                                       of the three

Refuses uncommitted changes, a version without its dated section in CHANGELOG.md, files that disagree about
the version, and a book that was not built. The tools that it needs (build, cffconvert) are installed into
environments that are thrown away: cffconvert wants a jsonschema older than Jupyter Book's, so the two cannot
live together; between releases the tests hold CITATION.cff against the same schema. The wheel is installed
into an empty environment, with its dependencies as in constraints.txt, and imported there. ``dist/`` is
replaced at the very end: it holds a whole release or the one before. RELEASING.md has the steps around it.

Exit status: 0 done, 1 a step failed, 2 not ready to be released.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

__all__ = ["NotReady", "StepFailed", "archive", "check", "checksums", "main", "release"]

ROOT = Path(__file__).resolve().parents[1]
NAME = "downhill-with-noise"
CONSTRAINTS = "constraints.txt"


class NotReady(Exception):
    """The project cannot be released as it stands; the message says what to do."""


class StepFailed(Exception):
    """A tool failed; the message has the end of what it printed."""


def say(text: str) -> None:
    print(f"release: {text}", flush=True)


# --- what must hold ---------------------------------------------------------------------------------


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise NotReady(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def check(root: Path, site: Path, tag: str | None = None) -> str:
    """The version to release; raises ``NotReady`` with all that stands against it."""
    source = (root / "companion" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "([^"]+)"$', source, flags=re.MULTILINE)[1]
    problems = []
    if changed := _git(root, "status", "--porcelain"):
        problems.append(f"uncommitted changes; commit or stash them: {changed.splitlines()[0].strip()} ...")
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+) \((.+)\)$", changes, flags=re.MULTILINE)
    date = newest[2] if newest and newest[1] == version else None
    if date is None:
        problems.append(f"CHANGELOG.md has no section `## {version} (YYYY-MM-DD)` on top")
    elif not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date):
        problems.append(f"CHANGELOG.md: version {version} is ({date}); give it the day of its release")
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    zenodo = json.loads((root / ".zenodo.json").read_text(encoding="utf-8"))
    for name, said in (("CITATION.cff", citation["version"]), (".zenodo.json", zenodo["version"])):
        if said != version:
            problems.append(f"{name} says version {said}, companion/__init__.py {version}")
    released = str(citation.get("date-released"))
    if date and released != date:
        problems.append(f"CITATION.cff: date-released is {released}, CHANGELOG.md says {date}")
    if tag is not None and tag != f"v{version}":
        problems.append(f"the tag {tag} is not v{version}")
    if not (site / "index.html").is_file():
        problems.append(f"no book in {site}; build it first (make site PROFILE=...)")
    if problems:
        raise NotReady("not ready to be released:\n" + "\n".join(f"  {line}" for line in problems))
    return version


# --- what is made -----------------------------------------------------------------------------------


def archive(folder: Path, target: Path, prefix: str, when: int) -> None:
    """A .tar.gz of a folder that depends on names and contents alone; ``when``: seconds since 1970.

    Raises ``NotReady`` for a link or anything else that is no plain file.
    """
    with (
        target.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=when) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in sorted(folder.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                continue
            if path.is_symlink() or not path.is_file():
                raise NotReady(f"{path} is no plain file and cannot be in the archive")
            member = tarfile.TarInfo(f"{prefix}/{path.relative_to(folder).as_posix()}")
            content = path.read_bytes()
            member.size, member.mtime, member.mode = len(content), when, 0o644
            tar.addfile(member, io.BytesIO(content))


def checksums(folder: Path) -> str:
    """The lines of ``SHA256SUMS``, as ``sha256sum -c`` reads them."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "SHA256SUMS")
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)


def _run(command: list[str], cwd: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        tail = "\n".join(done.stdout.strip().splitlines()[-15:])
        raise StepFailed(f"{' '.join(command[1:5])} ... failed:\n{tail}")
    return done.stdout


@contextlib.contextmanager
def _environment(*packages: str, cwd: Path) -> Iterator[Path]:
    """The folder of programs of an environment with these packages, gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        _run([sys.executable, "-m", "venv", folder], cwd)
        programs = Path(folder) / "bin"
        pip = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, *packages], cwd)
        yield programs


def release(root: Path, site: Path, version: str) -> Path:
    """Build and try everything, then replace ``dist/``; returns it. Raises ``StepFailed``."""
    when = int(_git(root, "log", "-1", "--format=%ct"))
    with tempfile.TemporaryDirectory(dir=root / "build") as folder:
        work, made = Path(folder), Path(folder) / "dist"
        source = work / "source"
        source.mkdir()
        made.mkdir()
        _run(["git", "-C", str(root), "archive", "--output", str(work / "source.tar"), "HEAD"], root)
        with tarfile.open(work / "source.tar") as tar:  # what is committed, whatever else lies about
            tar.extractall(source, filter="data")
        say("CITATION.cff by cffconvert")
        with _environment("cffconvert>=2", cwd=work) as programs:
            _run([str(programs / "cffconvert"), "--validate", "-i", str(source / "CITATION.cff")], work)
        say("wheel and source distribution")
        with _environment("build", cwd=work) as programs:
            command = [str(programs / "python"), "-m", "build", "--outdir", str(made), str(source)]
            _run(command, work, {"SOURCE_DATE_EPOCH": str(when)})
        wheel = next(iter(made.glob(f"*-{version}-*.whl")), None)
        if wheel is None or len(list(made.iterdir())) != 2:
            raise StepFailed(f"build made {', '.join(path.name for path in made.iterdir())}")
        say("the wheel in an empty environment (minutes: torch)")
        with _environment("-c", str(root / CONSTRAINTS), str(wheel), cwd=work) as programs:
            said = _run([str(programs / "python"), "-I", "-c", _IMPORT], work)
            if said.split()[-1] != version:
                raise StepFailed(f"the installed wheel says version {said}")
        say("the book")
        archive(site, made / f"{NAME}-{version}-book.tar.gz", f"{NAME}-{version}-book", when)
        (made / "SHA256SUMS").write_text(checksums(made), encoding="utf-8")
        old = work / "old"
        if (root / "dist").exists():
            (root / "dist").rename(old)
        made.rename(root / "dist")
    return root / "dist"


_IMPORT = """
import importlib, pkgutil, companion
for found in pkgutil.walk_packages(companion.__path__, "companion."):
    importlib.import_module(found.name)
print(companion.__version__)
"""


def main(argv: list[str] | None = None) -> int:
    """Release; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make a release in dist/.")
    parser.add_argument("--profile", default="cpu", help="whose book is released (cpu)")
    parser.add_argument("--tag", help="the tag being released; must be v<version>")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    root = arguments.root.resolve()
    site = root / "build" / arguments.profile / "html"
    try:
        version = check(root, site, arguments.tag or None)
        folder = release(root, site, version)
    except NotReady as error:
        print(f"release: {error}", file=sys.stderr)
        return 2
    except StepFailed as error:
        print(f"release: error: {error}", file=sys.stderr)
        return 1
    print((folder / "SHA256SUMS").read_text(encoding="utf-8"), end="")
    say(f"version {version} is in {folder.relative_to(root)}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
