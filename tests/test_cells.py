"""The tool that lints and formats the chapters' code cells, on a chapter of its own and on the book's."""

import importlib.util
import shutil
import sys
from pathlib import Path

import jupytext
import pytest
from parameters import read_parameters

ROOT = Path(__file__).parents[1]

spec = importlib.util.spec_from_file_location("downhill_cells", ROOT / "tools" / "cells.py")
cells = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = cells  # dataclasses look their module up
spec.loader.exec_module(cells)

CHAPTER = """---
kernelspec:
  name: python3
---

# A chapter   with  odd   prose , left alone

```{code-cell} ipython3
:tags: [parameters]

size = 10  # points
rates = [0.1,0.2]  # both
```

````{note}
```python
x = ( 1 )  # not a cell
```
````

```{code-cell} ipython3
---
mystnb:
  image:
    alt: a picture
---
def f(n):
    return {'a': n,
            "b": 2}
table = [1,2,
         3]  # fmt: skip
CELL
```
"""


@pytest.fixture
def project(tmp_path):
    def write(last=""):
        (tmp_path / "book").mkdir(exist_ok=True)
        shutil.copy(ROOT / "pyproject.toml", tmp_path)
        (tmp_path / "book" / "index.md").write_text("# A plain page\n")
        (tmp_path / "book" / "one.md").write_text(CHAPTER.replace("CELL", last))
        return tmp_path

    return write


def test_formatting_touches_the_cells_alone(project, capsys):
    root = project("print( f(size), rates,table )")
    page = root / "book" / "one.md"
    before = page.read_text()
    assert cells.main(["check", "--root", str(root)]) == 1
    assert "book/one.md:11: cell not formatted; run make format" in capsys.readouterr().out
    assert page.read_text() == before
    assert cells.main(["format", "--root", str(root)]) == 0
    after = page.read_text()
    assert "rates = [0.1, 0.2]  # both" in after and 'return {"a": n, "b": 2}' in after
    assert "table = [1,2,\n         3]  # fmt: skip" in after
    assert "print(f(size), rates, table)" in after
    prose = [
        line
        for line in before.split("\n")
        if line not in "\n".join(c.source for c in cells.code_cells(before))
    ]
    assert [line for line in after.split("\n") if line in prose and line] == [line for line in prose if line]
    assert "# A chapter   with  odd   prose , left alone" in after and "x = ( 1 )  # not a cell" in after
    assert cells.main(["check", "--root", str(root)]) == 0
    assert cells.main(["format", "--root", str(root)]) == 0
    assert page.read_text() == after


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ("import os", "book/one.md:32:8: F401 `os` imported but unused"),
        ("print(sise)", "book/one.md:32:7: F821 Undefined name `sise`"),
        ("print(", "book/one.md:"),
    ],
)
def test_a_fault_is_told_with_the_chapter_s_own_line(project, capsys, last, says):
    assert cells.main(["check", "--root", str(project(last))]) == 1
    assert says in capsys.readouterr().out


def test_a_cell_without_an_end_is_named():
    with pytest.raises(ValueError, match="line 2: the code cell has no end"):
        cells.code_cells("a\n```{code-cell} ipython3\nx = 1\n````")


def test_cells_are_those_that_jupytext_runs():
    pages = cells.chapters(ROOT)
    assert len(pages) > 5
    for page in pages:
        text = page.read_text(encoding="utf-8")
        run = [c for c in jupytext.reads(text, fmt="md:myst").cells if c.cell_type == "code"]
        assert [c.source.strip() for c in cells.code_cells(text)] == [c.source.strip() for c in run], (
            page.name
        )
        # One line a parameter, so that a reader sees name, value and meaning together.
        found = next(c for c in run if "parameters" in c.metadata.get("tags", []))
        assert all(p.comment for p in read_parameters(found.source, page.name).values())
        assert all("=" in line.split("#")[0] for line in found.source.splitlines() if line.strip()), page.name
