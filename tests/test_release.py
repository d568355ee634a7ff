"""The tools of publishing: what a release refuses and is made of, the notebooks' branch, the device check."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def tool(name):
    spec = importlib.util.spec_from_file_location(f"downhill_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


release, branch, device = tool("release"), tool("branch"), tool("device")


def git(folder, *arguments):
    command = ["git", "-c", "user.name=Test", "-c", "user.email=test@example.org", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


# --- a release ------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path):
    """A project that is ready to be released as version 1.2.0."""
    files = {
        "companion/__init__.py": '__version__ = "1.2.0"\n',
        "CHANGELOG.md": "# Changelog\n\n## 1.2.0 (2026-12-01)\n\n- x\n\n## 1.1.0 (2026-11-01)\n",
        "CITATION.cff": 'version: 1.2.0\ndate-released: "2026-12-01"\n',
        ".zenodo.json": '{"version": "1.2.0"}\n',
        ".gitignore": "build/\ndist/\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    site = tmp_path / "build" / "cpu" / "html"
    (site / "book").mkdir(parents=True)
    (site / "index.html").write_text("<h1>Book</h1>")
    (site / "book" / "one.html").write_text("<h1>One</h1>")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "x")
    return tmp_path


def test_a_ready_project_gives_its_version(project):
    assert release.check(project, project / "build" / "cpu" / "html", "v1.2.0") == "1.2.0"


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        ("CHANGELOG.md", "2026-12-01", "unreleased", "version 1.2.0 is (unreleased); give it the day"),
        ("CHANGELOG.md", "## 1.2.0 (2026-12-01)", "", "no section `## 1.2.0 (YYYY-MM-DD)` on top"),
        ("CITATION.cff", "1.2.0", "1.1.0", "CITATION.cff says version 1.1.0, companion/__init__.py 1.2.0"),
        ("CITATION.cff", "2026-12-01", "2026-12-02", "date-released is 2026-12-02, CHANGELOG.md says"),
        (".zenodo.json", "1.2.0", "1.1.0", ".zenodo.json says version 1.1.0"),
        ("companion/__init__.py", "1.2.0", "1.3.0", "the tag v1.2.0 is not v1.3.0"),
        ("build/cpu/html/index.html", None, None, "no book in"),
        ("new.txt", None, "x", "uncommitted changes; commit or stash them: ?? new.txt"),
    ],
)  # fmt: skip
def test_what_is_not_ready_is_refused(project, capsys, name, old, new, says):
    path = project / name
    if new is None:
        path.unlink()
    else:
        path.write_text(path.read_text().replace(old, new, 1) if old else new)
    if name != "new.txt" and not name.startswith("build"):
        git(project, "commit", "-qam", "y")
    assert release.main(["--root", str(project), "--tag", "v1.2.0"]) == 2
    assert says in capsys.readouterr().err
    assert not (project / "dist").exists()


def test_the_book_s_archive_depends_on_its_contents_alone(project, tmp_path):
    site, made = project / "build" / "cpu" / "html", []
    for i in range(2):
        for path in site.rglob("*"):
            os.utime(path, (i * 1000, i * 1000))
        release.archive(site, tmp_path / f"{i}.tar.gz", "book-1.2.0", 1_700_000_000)
        made.append((tmp_path / f"{i}.tar.gz").read_bytes())
    assert made[0] == made[1]
    with tarfile.open(tmp_path / "0.tar.gz") as tar:
        assert tar.getnames() == ["book-1.2.0/book/one.html", "book-1.2.0/index.html"]
        assert all((m.uid, m.mtime, m.isreg()) == (0, 1_700_000_000, True) for m in tar)
    (site / "link.html").symlink_to("/etc/passwd")
    with pytest.raises(release.NotReady, match="is no plain file"):
        release.archive(site, tmp_path / "2.tar.gz", "x", 0)


def test_checksums_are_those_that_sha256sum_checks(tmp_path):
    (tmp_path / "b.whl").write_bytes(b"b")
    (tmp_path / "a.tar.gz").write_bytes(b"a")
    (tmp_path / "SHA256SUMS").write_text("old")
    lines = release.checksums(tmp_path).splitlines()
    expected = [(hashlib.sha256(b"a").hexdigest(), "a.tar.gz"), (hashlib.sha256(b"b").hexdigest(), "b.whl")]
    assert [tuple(line.split("  ")) for line in lines] == expected


def test_a_failed_step_leaves_the_release_before(project, monkeypatch, capsys):
    (project / "dist").mkdir()
    (project / "dist" / "old.whl").write_text("old")

    def fail(*_, **__):
        raise release.StepFailed("pip failed:\nno network")

    monkeypatch.setattr(release, "_environment", fail)
    assert release.main(["--root", str(project)]) == 1
    assert "pip failed" in capsys.readouterr().err
    assert [path.name for path in (project / "dist").iterdir()] == ["old.whl"]
    assert [path.name for path in (project / "build").iterdir()] == ["cpu"]


# --- the branch of notebooks ----------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path):
    """A clone with an origin beside it; ``clone / "out"`` is what is published."""
    git(tmp_path, "init", "-q", "--bare", "origin.git")
    git(tmp_path, "clone", "-q", "origin.git", "clone")
    work = tmp_path / "clone"
    (work / "file").write_text("x")
    git(work, "add", "-A")
    git(work, "commit", "-qm", "x")
    git(work, "push", "-q", "origin", "HEAD:main")
    (work / "out" / "latest" / "book").mkdir(parents=True)
    (work / "out" / "latest" / "book" / "one.ipynb").write_text("{}")
    return work


def on_branch(clone):
    return git(clone.parent / "origin.git", "ls-tree", "-r", "--name-only", "notebooks").split()


def test_notebooks_are_added_to_their_branch(clone, capsys):
    arguments = [str(clone / "out"), "--root", str(clone)]
    assert branch.main(arguments) == 0
    assert on_branch(clone) == ["latest/book/one.ipynb"]
    head = git(clone, "rev-parse", "HEAD")
    assert f"Notebooks of {head}" in git(clone.parent / "origin.git", "log", "--format=%s", "notebooks")
    assert branch.main(arguments) == 0
    assert capsys.readouterr().out.endswith("notebooks unchanged\n")

    # A release's folder stays when the next is written; what a folder no longer has is gone.
    (clone / "out" / "latest").rename(clone / "out" / "v1.0.0")
    assert branch.main(arguments) == 0
    (clone / "out" / "v1.0.0").rename(clone / "out" / "latest")
    (clone / "out" / "latest" / "book" / "one.ipynb").rename(clone / "out" / "latest" / "book" / "two.ipynb")
    assert branch.main(arguments) == 0
    assert on_branch(clone) == ["latest/book/two.ipynb", "v1.0.0/book/one.ipynb"]
    assert git(clone.parent / "origin.git", "rev-list", "--count", "notebooks") == "3"
    assert git(clone, "status", "--porcelain") == "?? out/"


def test_only_notebooks_are_published(clone, capsys):
    (clone / "out" / "latest" / "run.sh").write_text("x")
    assert branch.main([str(clone / "out"), "--root", str(clone)]) == 1
    assert "run.sh is no notebook" in capsys.readouterr().err
    (clone / "out" / "latest" / "run.sh").unlink()
    (clone / "out" / "latest" / "link.ipynb").symlink_to("/etc/passwd")
    assert branch.main([str(clone / "out"), "--root", str(clone)]) == 1
    assert branch.main([str(clone / "nothing"), "--root", str(clone)]) == 1
    assert "holds no folder of notebooks" in capsys.readouterr().err


def test_a_push_that_is_refused_is_an_error(clone, capsys):
    hook = clone.parent / "origin.git" / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho no entry >&2\nexit 1\n")
    hook.chmod(0o755)
    assert branch.main([str(clone / "out"), "--root", str(clone)]) == 1
    assert "git push" in capsys.readouterr().err


# --- the device -----------------------------------------------------------------------------------


def test_a_machine_without_a_gpu_is_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.main() == 1
    assert "sees no GPU" in capsys.readouterr().err
