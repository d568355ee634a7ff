"""A generated notebook as Colab would run it: in an environment that has torch, but not the book.

A fresh virtual environment with torch, numpy, matplotlib, ipykernel and pip, a folder away from the
repository, and the package from a git address. ``make colab`` runs this by itself: it takes minutes, because
torch is installed.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import notebooks
import plan
import pytest

ROOT = Path(__file__).parents[1]

CHAPTER = "energy-and-langevin"
GIVEN = ["torch", "numpy", "matplotlib", "ipykernel"]
VERSIONS = """
import importlib.metadata, json
print(json.dumps({d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}))
"""


class Machine:
    """An environment with a kernel, and a folder to work in; nothing in it knows the repository."""

    def __init__(self, folder):
        self.python, self.folder = folder / "venv" / "bin" / "python", folder / "elsewhere"
        self.folder.mkdir()
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        pins = ["-c", str(ROOT / "constraints.txt")]
        self.run("-m", "pip", "install", "--quiet", *pins, *GIVEN).check_returncode()
        kernel = folder / "jupyter" / "kernels" / "away"
        kernel.mkdir(parents=True)
        argv = [str(self.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec = {"argv": argv, "display_name": "Away", "language": "python"}
        (kernel / "kernel.json").write_text(json.dumps(spec))
        self.kernels = str(folder / "jupyter")

    def run(self, *arguments):
        command = [str(self.python), *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)

    def versions(self):
        return json.loads(self.run("-c", VERSIONS).stdout)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    return Machine(tmp_path_factory.mktemp("machine"))


def repository(folder):
    """A git repository of a folder's files; gives the address that pip installs its commit from."""

    def git(*arguments):
        who = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(folder), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "as it stands")
    return f"git+file://{folder}@{git('rev-parse', 'HEAD')}"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The package as the working tree has it."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "companion", folder / "companion", ignore=shutil.ignore_patterns("__pycache__"))
    return repository(folder)


def setup_cell(notebook):
    return next(cell.source for cell in notebook.cells if cell.source.startswith("# @title Set-up"))


# These two run in this order: the second leaves the package installed.


def test_what_cannot_be_installed_beside_the_installed_is_refused(machine, tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "too-new"\nversion = "1"\ndependencies = ["numpy>=9999"]\n'
        "[tool.setuptools]\npackages = []\n"
    )
    before = machine.versions()
    made = notebooks.make_notebooks(ROOT, install=repository(tmp_path))
    done = machine.run("-c", setup_cell(made[f"book/{CHAPTER}"]))
    assert done.returncode
    assert "needs a newer version of a package that is installed here" in done.stderr
    assert "numpy" in done.stderr
    assert machine.versions() == before


def test_a_notebook_runs_and_changes_no_installed_package(machine, source, tmp_path, monkeypatch):
    import papermill

    chapters = plan.load_chapters(ROOT)
    smoke = plan.resolve(chapters, [chapters[CHAPTER]], plan.load_profile(ROOT, "smoke", chapters))
    made = notebooks.make_notebooks(ROOT, install=source)
    paths = notebooks.write_notebooks(made, tmp_path)
    path = next(path for path in paths if path.stem == CHAPTER)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("JUPYTER_PATH", machine.kernels)
    before = machine.versions()
    papermill.execute_notebook(
        path,
        tmp_path / "executed.ipynb",
        parameters=smoke[CHAPTER],
        kernel_name="away",
        language="python",
        cwd=machine.folder,
        progress_bar=False,
        execution_timeout=600,
    )
    after = machine.versions()
    assert {name: after.get(name) for name in before} == before
    assert {"downhill-with-noise", "scipy", "safetensors", "torch-geometric"} <= after.keys() - before.keys()
    where = machine.run("-c", "import companion; print(companion.__file__)").stdout
    assert where.startswith(str(machine.python.parents[1]))
    executed = nbformat.read(tmp_path / "executed.ipynb", as_version=4)
    printed = "".join(output.get("text", "") for cell in executed.cells for output in cell.get("outputs", []))
    assert f"installing {source}" in printed
    assert "device: " in printed and "time: " in printed
    if "no GPU" in printed:
        assert 'WARNING: the sizes of the "gpu" profile' in printed
    assert "hand-built and companion agree" in printed
    images = [output for cell in executed.cells for output in cell.get("outputs", []) if "data" in output]
    assert any("image/png" in output["data"] for output in images)
