"""The chapters as a GPU would run them: every loop recorded and replayed, in the ``smoke`` profile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_chapter_runs_with_recorded_loops_and_none_is_given_up(tmp_path):
    """What a chapter does with Python's state between updates shows here and nowhere else without a GPU."""
    copy, told = tmp_path / "copy", tmp_path / "tapes.txt"
    copy.mkdir()
    for name in ("book", "companion"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("_config.yml", "_toc.yml", "pyproject.toml", "CITATION.cff"):
        shutil.copy(ROOT / name, copy / name)
    paths = [ROOT / "tests" / "as_on_a_gpu", ROOT / "tests", copy]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)), "TAPES": str(told), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "book/run.py", "--profile", "smoke", "--no-build", "--jobs", "2"]
    done = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    lines = told.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line != "recorded"] == []
    assert len(lines) > 150
