"""Notebooks for Colab: what becomes of MyST, what the cells carry, and where the buttons lead."""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import home
import myst
import nbformat
import notebooks
import pages
import plan
import pytest
import test_book
from parameters import BookError

ROOT = Path(__file__).parents[1]

RELEASE = home.Home("https://github.com/some/course.git", "v1.2", "v1.2")
CI = {
    "GITHUB_SERVER_URL": "https://github.com",
    "GITHUB_REPOSITORY": "some/course",
    "GITHUB_SHA": "c" * 40,
    "GITHUB_REF_TYPE": "tag",
    "GITHUB_REF_NAME": "v1.2",
}
project, book = test_book.project, test_book.book  # a miniature project and its command line


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch):
    """No CI: the tests say themselves where the book lives."""
    for name in [*CI, "GITHUB_WORKSPACE", "BOOK_URL"]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def chapters():
    return plan.load_chapters(ROOT)


@pytest.fixture(scope="module")
def made():
    return notebooks.make_notebooks(ROOT, RELEASE)


def text_of(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# --- the real book --------------------------------------------------------------------------------


def test_every_chapter_becomes_a_notebook_without_outputs(chapters, made):
    assert list(made) == [chapter.document for chapter in chapters.values()]
    for chapter in chapters.values():
        notebook = made[chapter.document]
        assert notebook.cells[0].source.startswith(f"# {chapter.title}\n\n> Made from [the chapter's page]")
        assert not any(cell.outputs or cell.execution_count for cell in code_of(notebook))
        assert not any("mystnb" in cell.metadata for cell in notebook.cells)
        assert notebook.metadata["accelerator"] == "GPU"
        assert notebook.metadata["colab"]["gpuType"] == "T4"
        assert notebook.metadata["kernelspec"]["name"] == "python3"


def test_nothing_of_myst_is_left_in_the_text(made):
    raw = {
        "role": r"\{[A-Za-z][\w:.+-]*\}`",
        "directive": r"^[> ]*(`{3,}|:{3,}|~{3,})\s*\{",
        "target": r"^\([\w:-]+\)=",
        "equation label": r"\$\$[ \t]*\([\w:-]+\)[ \t]*$",
        "link to a source": r"\]\([^)\s]*\.md(#[^)\s]*)?\)",
    }
    for document, notebook in made.items():
        for kind, pattern in raw.items():
            found = re.search(pattern, text_of(notebook), flags=re.MULTILINE)
            assert found is None, f"{document}: a {kind} is left: {found[0]}"


def test_equations_and_exercises_are_numbered_and_what_is_cited_is_listed(chapters, made):
    for number, (name, chapter) in enumerate(chapters.items(), start=1):
        text = text_of(made[chapter.document])
        labelled = re.findall(r"^\$\$ \(([\w-]+)\)", chapter.text, flags=re.MULTILINE)
        tags = re.findall(r"\\tag\{([\d.]+)\}", text)
        assert tags == [f"{number}.{i}" for i in range(1, len(labelled) + 1)], name
        exercises = re.findall(r"^### Exercise ([\d.]+): .", text, flags=re.MULTILINE)
        assert exercises and exercises == [f"{number}.{i}" for i in range(1, len(exercises) + 1)], name
        assert re.findall(r"^#### Solution to exercise ([\d.]+)$", text, flags=re.MULTILINE) == exercises
        cited = {key for keys in re.findall(r"\{cite:.\}`([^`]+)`", chapter.text) for key in keys.split(",")}
        sources = text.partition("\n## Sources\n\n")[2].splitlines()
        assert len(sources) == len(cited), name


def test_the_same_text_makes_the_same_bytes(made):
    again = notebooks.make_notebooks(ROOT, RELEASE)
    for document, notebook in made.items():
        assert nbformat.writes(again[document]) == nbformat.writes(notebook)
        ids = [cell.id for cell in notebook.cells]
        assert len(set(ids)) == len(ids)


def test_the_parameters_cell_holds_the_gpu_profile_and_a_switch_to_cpu(chapters, made):
    for profile in ("gpu", "cpu"):
        loaded = plan.load_profile(ROOT, profile, chapters)
        values = plan.resolve(chapters, list(chapters.values()), loaded)
        for name, chapter in chapters.items():
            (cell,) = [
                c for c in code_of(made[chapter.document]) if "parameters" in c.metadata.get("tags", [])
            ]
            source, count = re.subn(r'^profile = "gpu"', f'profile = "{profile}"', cell.source)
            assert count == 1, "the switch is not the first line"
            found = {}
            exec(source, found)
            assert found.pop("profile") == profile
            found.pop("__builtins__")
            assert found == values[name]
            for key, value in values[name].items():
                assert type(found[key]) is type(value), f"{name}: {key}"
    with pytest.raises(ValueError, match='"gpu" or "cpu"'):
        exec(cell.source.replace('profile = "gpu"', 'profile = "gpus"', 1), {})


def test_the_cells_before_the_text_come_in_order(made):
    for document, notebook in made.items():
        sources = [cell.source for cell in code_of(notebook)]
        assert sources[0].startswith("# @title Set-up"), document
        assert 'INSTALL = "git+https://github.com/some/course.git@v1.2"' in sources[0]
        assert "find_spec" not in sources[1] and "import torch" in sources[1]
        assert sources[2].startswith("profile = ") and sources[3] == "check_device(profile, device)"


def test_the_notebooks_link_to_one_another_where_colab_opens_them(made):
    links = {link for notebook in made.values() for link in re.findall(r"\]\(([^)\s]+)\)", text_of(notebook))}
    assert not [link for link in links if not link.startswith("https://")]
    colab = [link for link in links if link.startswith(home.COLAB)]
    assert colab
    for link in colab:
        document = link.removeprefix(f"{home.COLAB}/github/some/course/blob/notebooks/v1.2/")
        assert document.removesuffix(".ipynb") in made


def test_numbers_come_from_the_record_of_the_gpu_then_the_cpu(tmp_path):
    (tmp_path / "results").mkdir()
    for profile, value in (("cpu", 1), ("gpu", 2), ("smoke", 3)):
        run = {"device": profile, "seconds": 75.0, "figures": {"fd": value}}
        record = {"profile": profile, "chapters": {"one": run}}
        (tmp_path / "results" / f"a-{profile}.json").write_text(json.dumps(record))
    (tmp_path / "results" / "tuning.json").write_text("{}")
    records = notebooks.read_records(tmp_path)
    assert [(record.profile, record.figures["fd"]) for record in records["one"]] == [("gpu", 2), ("cpu", 1)]
    assert records["one"][0].duration == "75 seconds"


# --- MyST -----------------------------------------------------------------------------------------


@pytest.fixture
def plain():
    books = myst.Bibliography(ROOT / "book" / "references.bib")
    labels = myst.Labels({"eq-a": "2.1"}, {"ex-a": "2.1"}, {"here": "A section"})
    addresses = {"book/other": "other.ipynb"}
    return myst.Plain(labels, books, {"fd": 12.345, "n": 5}, addresses.get, {"book/other": "The other"})


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("{glue:text}`fd:.1f` of {glue:text}`n`, {glue:text}`not_yet:.2f`", "12.3 of 5, `not_yet`"),
        ("see {cite:p}`hill2022lifecycle,neal2001annealed`", "see (Hill et al., 2022; Neal, 2001)"),
        ("{cite:t}`roberts1996exponential` say", "Roberts and Tweedie (1996) say"),
        ("{cite:t}`hyvarinen2005estimation`", "Hyvärinen (2005)"),
        ("by {eq}`eq-a`, {ref}`ex-a`, {ref}`here`", "by (2.1), Exercise 2.1, A section"),
        ("[the other](other.md#part) and [results](results.md)", "[the other](other.ipynb) and results"),
        ("{doc}`other`, {doc}`this one </book/other>`", "[The other](other.ipynb), [this one](other.ipynb)"),
        ("[out](https://a.org/b.md)", "[out](https://a.org/b.md)"),
        ("{term}`chains <chain>` and {py:func}`~companion.langevin.mala`", "chains and `mala`"),
        (
            "`{eq}` and ``{cite}`x` `` stay, $\\{{a}\\}$ too",
            "`{eq}` and ``{cite}`x` `` stay, $\\{{a}\\}$ too",
        ),
        ("% a comment\nwords", "words"),
        ("(here)=\n## A section", "## A section"),
        ("$$\nx = 1\n$$ (eq-a)", "$$\nx = 1 \\tag{2.1}\n$$"),
        ("$$ x $$", "$$\n x\n$$"),
        ("- so\n\n  $$\n  x\n  $$", "- so\n\n  $$\n  x\n  $$"),
        ("$$x$$ is a sentence", "$$x$$ is a sentence"),
        ("```{math}\n:label: eq-a\nx\n```", "$$\nx \\tag{2.1}\n$$"),
        ("```{note}\nBy {eq}`eq-a`.\n```", "> **Note**\n>\n> By (2.1)."),
        (":::{dropdown} More\n:open:\n- one\n\n- two\n:::", "> **More**\n>\n> - one\n>\n> - two"),
        (
            "````{admonition} Cite\n```bibtex\n@misc{a}\n```\n````",
            "> **Cite**\n>\n> ```bibtex\n> @misc{a}\n> ```",
        ),
        ("```{exercise} Try\n:label: ex-a\n\nDo.\n```", "### Exercise 2.1: Try\n\nDo."),
        ("```python\nx = '{eq}`a`'\n```", "```python\nx = '{eq}`a`'\n```"),
        ("```{code-block} python\nx = 1\n```", "```python\nx = 1\n```"),
        ("```{bibliography}\n```", ""),
        ("```{raw} html\n<script></script>\n```", "*The book's page has an interactive figure here.*"),
        ("```{figure} a.png\n:alt: A ring.\n\nRings.\n```", "*Figure on the book's page:* A ring. Rings."),
    ],
)
def test_myst_becomes_markdown(plain, source, written):
    assert "\n\n".join(plain.cells(source)) == written


def test_solutions_are_cells_of_their_own(plain):
    source = "````{solution-start} ex-a\n:class: dropdown\n````\n\nSo.\n\n````{solution-end}\n````\n\nWords."
    assert plain.cells(source) == ["#### Solution to exercise 2.1\n\nSo.", "Words."]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("```{notes}\nx\n```", "unknown directive 'notes'; did you mean 'note'?"),
        ("{eqs}`a`", "unknown role 'eqs'; did you mean 'eq'?"),
        ("{cite:p}`neal2001anealed`", "unknown citation 'neal2001anealed'; did you mean 'neal2001annealed'?"),
        ("{eq}`eq-b`", "unknown equation 'eq-b'; did you mean 'eq-a'?"),
        ("{ref}`there`", "unknown label 'there'; did you mean 'here'?"),
        ("```{note}\nnever closed", "is not closed"),
        ("$$\nnever closed", "is not closed"),
        ("![a picture](a.png)", "cannot show '!['"),
        ("{{ version }}", "cannot show '{{ version }}'"),
        ("[code](../companion/data.py)", "cannot link to [code](../companion/data.py)"),
    ],
)
def test_what_has_no_plain_form_is_refused(plain, source, says):
    with pytest.raises(BookError) as caught:
        plain.cells(source)
    assert says.replace("'!['", "'![") in str(caught.value)


def test_the_error_names_the_chapter_and_the_command_ends_with_a_message(project, capsys, tmp_path):
    root = project(first=test_book.chapter("One", "\n{unheard}`of`\n"))
    assert notebooks.main(["--out", str(tmp_path / "out"), "--root", str(root)]) == 2
    assert "book/first.md: plain Markdown: unknown role 'unheard'" in capsys.readouterr().err


def test_the_command_writes_a_file_a_chapter(project, capsys, tmp_path, monkeypatch):
    root = project(first=test_book.chapter("One"), second=test_book.chapter("Two"))
    assert notebooks.main(["--out", str(tmp_path / "out"), "--root", str(root)]) == 0
    assert "git has no public origin" in capsys.readouterr().err
    assert notebooks.main(["--where", "--root", str(root)]) == 2
    for name, value in CI.items():
        monkeypatch.setenv(name, value)
    assert notebooks.main(["--out", str(tmp_path / "out"), "--where", "--root", str(root)]) == 0
    assert capsys.readouterr().out == "v1.2\n"
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("out/**/*.*"))
    assert written == ["out/book/first.ipynb", "out/book/second.ipynb"]
    notebook = nbformat.read(tmp_path / "out" / "book" / "first.ipynb", as_version=4)
    assert 'INSTALL = "git+https://github.com/some/course@v1.2"' in notebook.cells[1].source


def test_a_parameter_called_profile_is_refused():
    with pytest.raises(BookError, match="cannot be called 'profile'"):
        notebooks.parameters_cell("profile = 1", {"profile": 1}, {"profile": 1})


# --- the set-up cell ------------------------------------------------------------------------------


@pytest.fixture
def setup(made):
    return code_of(made["book/energy-and-langevin"])[0].source


def test_setup_says_the_device_and_the_recorded_time(setup, capsys, monkeypatch):
    import torch

    exec(setup, {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert "device: cpu (" in printed or "device: cuda (" in printed
    record = notebooks.read_records(ROOT)["energy-and-langevin"][0]
    assert f"time: {record.duration} on {record.device} in the {record.profile} profile" in printed
    space = {}
    exec(setup.replace("TOOK = [", "TOOK = [][:0] + [", 1), space)
    capsys.readouterr()
    space["TOOK"] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    memory = types.SimpleNamespace(total_memory=15 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    space["show_device"]()
    assert capsys.readouterr().out == (
        "device: cuda (Tesla T4), 15 GB\ntime: this chapter has not been measured on a GPU yet\n"
    )
    for profile, device, available, warned in [
        ("gpu", "auto", True, False),
        ("gpu", "cpu", True, True),
        ("gpu", "auto", False, True),
        ("cpu", "auto", False, False),
    ]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        space["check_device"](profile, device)
        assert ("WARNING" in capsys.readouterr().out) == warned


def test_setup_says_when_another_release_is_installed(setup, capsys):
    exec(re.sub('^VERSION = ".*?"', 'VERSION = "99"', setup, flags=re.MULTILINE), {})
    assert "is installed here; this notebook was made for 99" in capsys.readouterr().out


@pytest.fixture
def without_companion(monkeypatch):
    """A Python that has no companion yet; ``pip`` says what it was called with and does as it is told."""
    calls = []
    real = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "companion" else real(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)

    def answer(output="", code=0):
        def run(command, **options):
            constraints = Path(command[command.index("-c") + 1]).read_text(encoding="utf-8")
            calls.append((command, constraints.splitlines()))
            return types.SimpleNamespace(returncode=code, stdout=output)

        monkeypatch.setattr(subprocess, "run", run)
        return calls

    return answer


def test_setup_pins_every_installed_package(setup, without_companion):
    calls = without_companion()
    exec(setup, {})
    ((command, constraints),) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[-1] == RELEASE.install
    for name in ("torch", "numpy", "matplotlib"):
        assert f"{name}=={importlib.metadata.version(name)}" in constraints


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (
            "ERROR: ResolutionImpossible: for help",
            "needs a newer version of a package that is installed here",
        ),
        ("ERROR: quite new", "look at the last lines of pip's output below.\n\nERROR: quite new"),
    ],
)
def test_setup_says_why_the_package_could_not_be_installed(setup, without_companion, output, says):
    without_companion(output, code=1)
    with pytest.raises(RuntimeError) as caught:
        exec(setup, {})
    assert says in str(caught.value)


def test_setup_of_a_book_without_address_says_what_to_do(setup, without_companion):
    calls = without_companion()
    with pytest.raises(RuntimeError, match="In that copy's folder run: pip install -e"):
        exec(re.sub('^INSTALL = ".*?"', 'INSTALL = ""', setup, flags=re.MULTILINE), {})
    assert not calls


# --- where the book lives -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "url"),
    [
        ("https://user:secret@forge.org/me/book.git", "https://forge.org/me/book"),
        ("git@forge.org:me/book.git", "https://forge.org/me/book"),
        ("ssh://git@forge.org:2222/me/book.git", "https://forge.org/me/book"),
        ("https://forge.org:8443/me/book", "https://forge.org:8443/me/book"),
        ("/srv/git/book.git", None),
        ("file:///srv/git/book.git", None),
        (None, None),
    ],
)
def test_the_home_is_git_s_public_origin(monkeypatch, origin, url):
    said = {"remote": origin, "rev-parse": "a" * 40, "tag": ""}
    monkeypatch.setattr(home, "git", lambda root, *arguments: said[arguments[0]])
    found = home.find_home(ROOT)
    assert (found and found.url) == url
    if found:
        assert found.install == f"git+{found.clone}@{'a' * 40}"
        assert found.folder == "latest"
        assert found.notebook("book/x") is None and found.page("book/x") is None  # Colab opens GitHub only
    said["tag"] = "old\nv1.1\nv1.2"
    if tagged := home.find_home(ROOT):
        assert (tagged.ref, tagged.folder) == ("v1.2", "v1.2")


def test_the_home_is_what_ci_says(monkeypatch):
    for name, value in CI.items():
        monkeypatch.setenv(name, value)
    found = home.find_home(ROOT)
    assert found.install == "git+https://github.com/some/course@v1.2"
    colab = "https://colab.research.google.com/github/some/course/blob/notebooks"
    assert found.notebook("book/x") == f"{colab}/v1.2/book/x.ipynb"
    assert found.page("book/x") == "https://some.github.io/course/book/x.html"
    monkeypatch.setenv("BOOK_URL", "https://book.org/")
    assert home.find_home(ROOT).page("book/x") == "https://book.org/book/x.html"
    monkeypatch.setenv("GITHUB_REF_TYPE", "branch")
    monkeypatch.setenv("GITHUB_REF_NAME", "main")
    assert home.find_home(ROOT).install.endswith("@" + CI["GITHUB_SHA"])
    assert home.find_home(ROOT).notebook("book/x") == f"{colab}/latest/book/x.ipynb"
    assert home.find_home(ROOT, "v2.0").notebook("book/x") == f"{colab}/v2.0/book/x.ipynb"
    with pytest.raises(BookError, match="is not a tag or a commit"):
        home.find_home(ROOT, 'v1"; x')
    monkeypatch.setenv("GITHUB_WORKSPACE", "/somewhere/else")
    monkeypatch.setattr(home, "git", lambda *arguments: None)
    assert home.find_home(ROOT) is None  # another project on the same runner


# --- the pages' buttons ---------------------------------------------------------------------------


def test_only_chapters_get_colab_buttons_and_only_with_a_public_home(project, book, monkeypatch):
    root = project(first=test_book.chapter("One", "\n[Next](second.md)\n"), second=test_book.chapter("Two"))
    site = root / "build" / "cpu" / "html"
    for name, value in CI.items():
        monkeypatch.setenv(name, value)
    status, printed = book(root)
    assert status == 0, printed
    links = {
        page.stem: re.findall(r'href="(https://colab[^"]+)"', page.read_text(encoding="utf-8"))
        for page in site.glob("book/*.html")
    }
    prefix = "https://colab.research.google.com/github/some/course/blob/notebooks/v1.2/book"
    assert links == {
        "first": [f"{prefix}/first.ipynb"],
        "second": [f"{prefix}/second.ipynb"],
        "index": [],
        "results": [],
    }
    download = nbformat.read(site / "_sources" / "book" / "first.ipynb", as_version=4)
    assert nbformat.writes(download) == nbformat.writes(
        notebooks.make_notebooks(root, home.find_home(root))["book/first"]
    )
    for name in CI:
        monkeypatch.delenv(name)
    assert pages.config(root, home.find_home(root)) == (root / "_config.yml").read_text(encoding="utf-8")
