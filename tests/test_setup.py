"""Set-up: the tool that makes .venv, and the agreement of the files that say what is installed and run."""

import importlib.util
import json
import re
import subprocess
import tomllib
from pathlib import Path

import notebooks
import plan
import pytest
import yaml

ROOT = Path(__file__).parents[1]

spec = importlib.util.spec_from_file_location("downhill_setup", ROOT / "tools" / "setup.py")
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
UNSATISFIED = "ERROR: Could not find a version that satisfies the requirement"


def canonical(name):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


# --- the tool -------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    """A project's files, as far as its stamp depends on them, with an environment that looks complete."""
    for name in ("pyproject.toml", "constraints.txt", "tools/setup.py", "companion/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text("version = 3.11.7\n")
    # A Python that says it lives here, as a real one would.
    fake = f"#!/bin/sh\nprintf '%s\\n3 11\\n' '{venv}'\n"
    (venv / "bin" / "python").write_text(fake)
    (venv / "bin" / "python").chmod(0o755)
    (venv / setup.STAMP).write_text(json.dumps(setup.stamp_of(tmp_path, venv)))
    return tmp_path


def test_an_old_python_is_told_what_to_do(monkeypatch):
    assert setup.old_python((3, 11, 0)) is None
    assert setup.old_python((4, 0, 0)) is None
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    assert "Python 3.10 is too old, the book needs 3.11 or newer" in setup.old_python((3, 10, 4))
    monkeypatch.setattr(setup.shutil, "which", lambda name: name if name == "python3.12" else None)
    assert setup.old_python((3, 9, 1)).endswith("make setup PYTHON=python3.12")


def test_a_fitting_stamp_is_all_that_is_needed(root, monkeypatch, capsys):
    monkeypatch.setattr(setup, "pip_install", lambda *_: pytest.fail("installed again"))
    setup.set_up(root, root / ".venv")
    assert capsys.readouterr().out == "setup: up to date\n"


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("constraints.txt", "torch==", "torch==9."),
        ("pyproject.toml", '"torch>=', '"torch>=1'),
        ("tools/setup.py", '"""', '"""Other. '),
        ("companion/__init__.py", '__version__ = "', '__version__ = "9'),
        (".venv/pyvenv.cfg", "3.11", "3.12"),
    ],
)
def test_the_stamp_follows_what_the_environment_depends_on(root, name, old, new):
    before = setup.stamp_of(root, root / ".venv")
    text = (root / name).read_text(encoding="utf-8")
    assert old in text
    (root / name).write_text(text.replace(old, new, 1), encoding="utf-8")
    assert setup.stamp_of(root, root / ".venv") != before


def test_the_stamp_does_not_follow_the_linter_s_settings(root):
    before = setup.stamp_of(root, root / ".venv")
    with (root / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("\n[tool.other]\nx = 1\n")
    assert setup.stamp_of(root, root / ".venv") == before


def broken(root, how):
    venv = root / ".venv"
    if how == "moved":
        venv.rename(root / "elsewhere")
        return root / "elsewhere"
    if how == "unfinished":
        (venv / setup.UNFINISHED).touch()
    elif how == "no interpreter":
        (venv / "bin" / "python").unlink()
        (venv / "bin" / "python").symlink_to("/nonexistent/python")
    elif how == "no pip":
        (venv / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    elif how == "old":
        (venv / "bin" / "python").write_text(f"#!/bin/sh\nprintf '%s\\n3 9\\n' '{venv}'\n")
    elif how == "copied":
        (venv / "bin" / "python").write_text("#!/bin/sh\nprintf '/usr\\n3 11\\n'\n")
    return venv


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("moved", "it was moved here from"),
        ("unfinished", "its installation was not finished"),
        ("no interpreter", "its Python does not start"),
        ("no pip", "its Python or its pip does not work"),
        ("old", "its Python is older than 3.11"),
        ("copied", "its Python belongs to /usr"),
    ],
)
def test_a_broken_environment_is_made_anew(root, monkeypatch, capsys, how, says):
    venv = broken(root, how)
    assert says in setup.venv_problem(venv)
    made = []

    def make(path):
        made.append(path)
        (path / "bin").mkdir(parents=True)
        (path / "pyvenv.cfg").write_text("version = 3.11.7\n")
        (path / "bin" / "python").write_text("#!/bin/sh\nexit 0\n")
        (path / "bin" / "python").chmod(0o755)

    monkeypatch.setattr(setup, "make_venv", make)
    monkeypatch.setattr(setup, "pip_install", lambda *_: None)
    setup.set_up(root, venv)
    printed = capsys.readouterr().out
    assert f".venv is made anew, because {says}" in printed and printed.endswith(
        "make course runs the book\n"
    )
    assert made == [venv]
    assert setup.read_stamp(venv) == setup.stamp_of(root, venv)
    assert not (venv / setup.UNFINISHED).exists()


@pytest.mark.parametrize("begun", [False, True])
def test_a_failed_installation_counts_as_unfinished_once_it_had_begun(root, monkeypatch, begun):
    venv = root / ".venv"
    (root / "constraints.txt").write_text("other==1\n")

    def fail(python, arguments, log, cwd):
        log.write_text("Collecting torch\n" + "Installing collected packages: torch\n" * begun)
        raise setup.SetupError("no network")

    monkeypatch.setattr(setup, "pip_install", fail)
    with pytest.raises(setup.SetupError):
        setup.set_up(root, venv)
    assert (venv / setup.UNFINISHED).exists() == begun
    assert (setup.venv_problem(venv) is not None) == begun


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(': Failed to "
            "establish a new connection: [Errno -3] Temporary failure in name resolution')'\n"
            f"{UNSATISFIED} torch>=2.4 (from versions: none)\n"
            "ERROR: No matching distribution found for torch>=2.4",
            "no network",
        ),
        (
            f"{UNSATISFIED} setuptools>=69 (from versions: none)\n"
            "ERROR: No matching distribution found for setuptools>=69",
            "no network",
        ),
        (
            f"{UNSATISFIED} torch==2.99 (from versions: 2.4, 2.5)\n"
            "ERROR: No matching distribution found for torch==2.99",
            "no torch==2.99 for this Python",
        ),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "disk is full",
        ),
        (
            "  error: command 'gcc' failed: No such file or directory\n"
            "  ERROR: Failed building wheel for pyzmq\n"
            "ERROR: Could not build wheels for pyzmq, which is required",
            "pyzmq has no ready-made wheel for this Python, and no compiler",
        ),
        (
            "Could not fetch URL: SSLError(SSLCertVerificationError(1, 'CERTIFICATE_VERIFY_FAILED",
            "certificate",
        ),
        ("PermissionError: [Errno 13] Permission denied: '.venv'", "permission denied"),
        ("ERROR: ResolutionImpossible: for help visit", "constraints.txt contradicts pyproject.toml"),
        ("something\nERROR: quite new\n", "pip failed: ERROR: quite new"),
        ("", "pip failed: no output"),
    ],
)
def test_a_failed_pip_says_what_to_do(output, says):
    message = setup.explain_pip(output)
    assert says in message
    assert "\n" not in message


def test_pip_s_failure_is_one_line_and_its_output_is_kept(tmp_path):
    pip = tmp_path / "python"
    pip.write_text("#!/bin/sh\necho 'OSError: [Errno 28] No space left on device'\nexit 2\n")
    pip.chmod(0o755)
    with pytest.raises(setup.SetupError, match="the disk is full") as caught:
        setup.pip_install(pip, ["x"], tmp_path / "log", tmp_path)
    assert str(tmp_path / "log") in str(caught.value)
    assert "Errno 28" in (tmp_path / "log").read_text()


def test_constraints_hold_on_every_platform():
    frozen = ["torch==2.13.0+cpu", "nvidia-cublas==13.1", "triton==3.5", "-e git+x", "B==1", "a==2"]
    assert setup.constraints("\n".join(frozen)) == "a==2\nB==1\ntorch==2.13.0\n"


# --- files that must agree ------------------------------------------------------------------------


def test_everything_installed_has_one_exact_version():
    lines = pinned()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    names = [canonical(line) for line in lines]
    assert len(set(names)) == len(names)
    wanted = [*PROJECT["dependencies"], *EXTRAS["book"], *EXTRAS["test"]]
    assert not {canonical(requirement) for requirement in wanted} - set(names)


def test_the_package_has_lower_bounds_only():
    everything = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    for requirement in everything:
        bounds = re.sub(r"^[\w.-]+(\[[\w,]+\])?", "", requirement.split(";")[0])
        if canonical(requirement) == "jupyter-book":
            assert bounds.endswith(",<2")  # version 2 is another program
            bounds = bounds.removesuffix(",<2")
        assert re.fullmatch(r">=[\w.]+", bounds), requirement
    assert PROJECT["requires-python"] == ">=3.11"


def test_the_conda_environment_is_the_same_installation():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["name"] == PROJECT["name"]
    assert environment["channels"] == ["conda-forge"]
    *conda, pip = environment["dependencies"]
    assert [re.match(r"\w+", name)[0] for name in conda] == ["python", "pip"]
    assert pip == {"pip": ["-c constraints.txt", f"-e .[{setup.EXTRAS}]"]}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    source = (ROOT / "companion" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{citation["version"]}"' in source
    assert citation["license"] == "MIT"


def test_no_notebook_is_tracked():
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "*.ipynb"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert listed.stdout == ""


@pytest.mark.parametrize("name", ["smoke", "cpu", "gpu", "paper"])
def test_profiles_fit_the_chapters(name):
    chapters = plan.load_chapters(ROOT)
    profile = plan.load_profile(ROOT, name, chapters)  # raises for an unknown name or a wrong type
    assert profile.sections.keys() == chapters.keys()
    values = plan.resolve(chapters, list(chapters.values()), profile)
    if name == "cpu":  # the parameters cells are this profile, so a reader's notebook is the course's
        for chapter in chapters.values():
            defaults = {key: parameter.default for key, parameter in chapter.parameters.items()}
            assert values[chapter.name] == defaults


def test_every_chapter_is_written_as_one():
    for chapter in plan.load_chapters(ROOT).values():
        front = yaml.safe_load(chapter.text.split("---")[1])
        assert front["accelerator"] == "GPU", chapter.name
        assert chapter.title.startswith(front["title"]), chapter.name
        assert "seed" in chapter.parameters and "device" in chapter.parameters
        silent = [name for name, parameter in chapter.parameters.items() if not parameter.comment]
        assert not silent, f"{chapter.name}: parameters without a comment: {silent}"
        first = next(cell for cell in chapter.notebook.cells if cell.cell_type == "code")
        assert first.source.startswith(notebooks.SETUP + "\n"), f"{chapter.name}: not the common set-up cell"
