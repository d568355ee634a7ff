"""The runner on a miniature project: what it runs, refuses, keeps, collects and builds."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import execute
import keys
import nbformat
import pages
import parameters
import plan
import pytest
import recorded
import render
import run

ROOT = Path(__file__).parents[1]

HEAD = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

# Chapter TITLE
"""
# The companion's environment() without torch, whose import is most of a small chapter's time.
STUB = """
def environment(device=None):
    return {"device": "none", "versions": {"python": "3"}, "peak_memory_mb": 1.0}
"""
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def cell(source, options=""):
    return f"\n```{{code-cell}} ipython3\n{options}{source}\n```\n"


def chapter(title, *cells, defaults="seed = 3  # of all draws\nsize = 10  # points\n"):
    return HEAD.replace("TITLE", title) + cell(defaults, ":tags: [parameters]\n\n") + "".join(cells)


@pytest.fixture
def project(tmp_path):
    """A project of the same shape as the real one; ``project(first=..., second=...)`` writes its chapters."""

    def write(stub=True, **chapters):
        book = tmp_path / "book"
        (book / "profiles").mkdir(parents=True, exist_ok=True)
        (tmp_path / "companion").mkdir(exist_ok=True)
        record = STUB if stub else (ROOT / "companion" / "record.py").read_text(encoding="utf-8")
        (tmp_path / "companion" / "__init__.py").write_text('__version__ = "1.2.3"\n')
        (tmp_path / "companion" / "record.py").write_text(record, encoding="utf-8")
        shutil.copy(ROOT / "_config.yml", tmp_path)
        shutil.copy(ROOT / "CITATION.cff", tmp_path)
        shutil.copytree(ROOT / "book" / "_static", book / "_static", dirs_exist_ok=True)
        (book / "references.bib").touch()
        (book / "index.md").write_text("# Mini\n\nA book of $n$ chapters, made for its tests.\n")
        names = [f"book/{name}" for name in chapters]
        toc = {"format": "jb-book", "root": "book/index"}
        toc["chapters"] = [{"file": name} for name in [*names, "book/results"]]
        (tmp_path / "_toc.yml").write_text(json.dumps(toc))
        for profile in ("smoke", "cpu", "gpu"):
            sections = {name: {} for name in chapters}
            (book / "profiles" / f"{profile}.yml").write_text(json.dumps(sections))
        for name, text in chapters.items():
            (book / f"{name}.md").write_text(text, encoding="utf-8")
        return tmp_path

    return write


@pytest.fixture
def book(capsys):
    """Run the command line in this process; gives the exit status and what it printed."""

    def call(root, *arguments):
        status = run.main([*arguments, "--root", str(root)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


def result(root, name, profile="cpu"):
    return json.loads((root / "build" / profile / "results" / f"{name}.json").read_text())


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "sede=1"], "unknown parameter 'sede'; did you mean 'seed'?"),
        (["--set", "first.sise=1"], "unknown parameter 'sise'; did you mean 'size'?"),
        (["--set", "frist.size=1"], "unknown chapter 'frist'; did you mean 'first'?"),
        (["--set", "second.size=1", "--only", "first"], "not selected by --only"),
        (["--only", "secnd"], "unknown chapter 'secnd'; did you mean 'second'? Known: first, second."),
        (["--profile", "smok"], "unknown profile 'smok'; did you mean 'smoke'?"),
        (["--set", "size=big"], "'big' is a str, but the parameter is an int (default 10)"),
        (["--set", "size=1.5"], "1.5 is a float, but the parameter is an int"),
        (["--set", "size"], "write --set name=value"),
        (["--data", "digits"], "unknown parameter 'data'"),
    ],
)
def test_a_wrong_call_is_refused_with_the_nearest_name(project, book, arguments, says):
    status, printed = book(project(first=chapter("One"), second=chapter("Two")), *arguments)
    assert status == 2
    assert says in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        (
            "first: {sise: 1}\nsecond: {}\n",
            "cpu.yml, section first: unknown parameter 'sise'; did you mean 'size'?",
        ),
        ("frist: {}\nsecond: {}\n", "unknown chapter 'frist'; did you mean 'first'?"),
        ("first: {size: yes}\nsecond: {}\n", "True is a bool, but the parameter is an int"),
        ("first: {}\n", "has no section for 'second'"),
        ("run: {cell_timout: 3}\n", "unknown run option 'cell_timout'; did you mean 'cell_timeout'?"),
        ("first: [1\n", "not valid YAML"),
    ],
)
def test_a_wrong_profile_is_refused(project, book, profile, says):
    root = project(first=chapter("One"), second=chapter("Two"))
    (root / "book" / "profiles" / "cpu.yml").write_text(profile)
    status, printed = book(root)
    assert status == 2
    assert says in printed


def test_a_page_that_toc_names_must_exist(project, book):
    root = project(first=chapter("One"))
    (root / "book" / "first.md").rename(root / "book" / "firsts.md")
    status, printed = book(root)
    assert status == 2
    assert "unknown page 'book/first'; did you mean 'book/firsts'?" in printed


def test_parameters_cells_are_read_checked_and_rewritten():
    source = (
        'a: int = 1  # count\nrates = [\n    0.1,\n    0.2,\n]  # both\nname = "é"  # a word\nnone = None'
    )
    found = parameters.read_parameters(source, "here")
    assert {name: p.default for name, p in found.items()} == {
        "a": 1,
        "rates": [0.1, 0.2],
        "name": "é",
        "none": None,
    }
    assert [p.comment for p in found.values()] == ["count", "both", "a word", ""]
    shown = parameters.with_values(source, {"a": 7, "rates": [1.0], "name": "ü", "none": None})
    assert shown == 'a: int = 7  # count\nrates = [1.0]  # both\nname = "ü"  # a word\nnone = None'
    with pytest.raises(parameters.BookError, match="line 2: the value of 'b' is not a literal"):
        parameters.read_parameters("a = 1\nb = a + 1", "here")
    with pytest.raises(parameters.BookError, match="line 1 is not `name = value`: import os"):
        parameters.read_parameters("import os", "here")


def test_values_take_the_type_of_their_default():
    assert parameters.agree(0.1, "1e-3", "x") == 1e-3  # a string for YAML 1.1
    assert isinstance(parameters.agree(0.1, 2, "x"), float)
    assert parameters.agree([0.1], [1, "1e-2"], "x") == [1.0, 0.01]
    mixed = parameters.agree([0.1, 7], ["1e-2", 3], "x")
    assert mixed == [0.01, 3] and isinstance(mixed[1], int)  # each element as its own default
    for default, value in [(1, True), (0.1, True), ("a", 1), (True, 1), ([1], 1), ([1], [0.5]), (1, None)]:
        with pytest.raises(parameters.BookError):
            parameters.agree(default, value, "x")


def test_data_is_a_name_or_a_path_that_exists(project, tmp_path, monkeypatch):
    root = project(first=chapter("One", defaults='data = "digits"  # which\n'))
    chapters = plan.load_chapters(root)
    profile = plan.load_profile(root, "cpu", chapters)

    def resolved(data):
        return plan.resolve(chapters, list(chapters.values()), profile, [], data)["first"]["data"]

    assert resolved("mnist") == "mnist"
    with pytest.raises(parameters.BookError, match=r"mine\.npz: no such file or folder"):
        resolved("mine.npz")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.npz").write_bytes(b"1")
    assert resolved("mine.npz") == str(tmp_path / "mine.npz")
    first = keys.cache_key(root, chapters["first"], {"data": resolved("mine.npz")}, "cpu")
    (tmp_path / "mine.npz").write_bytes(b"22")
    assert keys.cache_key(root, chapters["first"], {"data": resolved("mine.npz")}, "cpu") != first


# --- a whole run ----------------------------------------------------------------------------------


def test_a_run_collects_builds_and_is_not_repeated(project, book):
    figures = cell(
        "from companion.record import record\n"
        "record('mean', [size, size + 2])\n"
        "_ = record('count', size)\n"
        "import sys; print('to the log'); print('a', 'warning', file=sys.stderr)"
    )
    image = cell(
        f"import base64\nfrom IPython.display import Image\nImage(base64.b64decode('{PIXEL}'))",
        '---\nmystnb:\n  image:\n    alt: "One pixel."\n---\n',
    )
    solution = (
        "\n```{exercise} Twice\n:label: twice\nDouble it.\n```\n"
        "\n````{solution-start} twice\n:class: dropdown\n````\n"
        + cell("2 * size")
        + "\n````{solution-end}\n````\n"
    )
    prose = "\nIts mean is {glue:text}`mean:.1f` and $x^2$; see [the other](second.md).\n"
    root = project(
        stub=False,
        first=chapter("One", figures, prose, image, solution),
        second=chapter("Two", "\nSome words, so that the page is not empty.\n"),
    )
    status, printed = book(root, "--set", "first.size=4")
    assert status == 0, printed
    assert "[1/2] first: " in printed and "book: 4 pages" in printed

    found = result(root, "first")
    assert found["figures"] == {"mean": 5.0, "mean_sd": pytest.approx(2**0.5), "mean_n": 2, "count": 4}
    assert found["parameters"] == {"seed": 3, "size": 4}
    assert (found["chapter"], found["profile"], found["seed"], found["commit"]) == ("first", "cpu", 3, None)
    assert found["device"].startswith("cpu (") and "torch" in found["versions"]
    assert found["peak_memory_mb"] > 50 and found["seconds"] > 0 and found["finished"].endswith("+00:00")
    build = root / "build" / "cpu"
    assert (build / "logs" / "first.log").read_text().split("\n")[:2] == ["to the log", "a warning"]
    assert (build / "figures" / "first-1.png").read_bytes().startswith(b"\x89PNG")

    page = (build / "html" / "book" / "first.html").read_text()
    assert "Its mean is 5.0 and" in " ".join(re.sub("<[^>]+>", "", page).split())
    assert 'alt="One pixel."' in page and 'href="second.html"' in page
    assert '<span class="mi">4</span>' in page  # the parameters cell shows what was run
    for hidden in ("injected-parameters", "_environment", "a warning", str(root)):
        assert hidden not in page
        assert hidden not in (build / "html" / "_sources" / "book" / "first.ipynb").read_text()
    results = (build / "html" / "book" / "results.html").read_text()
    assert "5.0 ± 1.4" in results
    words = " ".join(re.sub("<[^>]+>", "", page).split())
    assert "Cite this chapter" in words and "@software{downhill-with-noise-first, " in words
    assert "version = {1.2.3}" in words and "executed in the profile cpu}" in words
    assert "executed on a CPU" not in words

    before = time.perf_counter()
    status, printed = book(root, "--set", "first.size=4")
    assert status == 0
    assert printed.count("unchanged, not run again") == 2 and "book: unchanged" in printed
    assert time.perf_counter() - before < 10

    # A page that is lost is built again; a chapter that the toc names but no page shows is an error.
    (build / "html" / "book" / "second.html").unlink()
    assert render.check_site(build / "html", ["book/first", "book/second"]) == [
        "book/second: in _toc.yml, but the book has no book/second.html"
    ]


def test_keys_follow_everything_that_a_result_depends_on(project):
    root = project(first=chapter("One"))

    def key(profile="cpu", **values):
        found = plan.load_chapters(root)["first"]
        return keys.cache_key(root, found, {"seed": 3, "size": 10, **values}, profile)

    seen = [key(), key(size=11), key(profile="smoke")]
    assert key() == seen[0]
    (root / "companion" / "record.py").write_text(STUB + "\n# other\n")
    seen.append(key())
    (root / "companion" / "more").mkdir()
    (root / "companion" / "more" / "part.py").write_text("x = 1\n")
    seen.append(key())
    (root / "book" / "first.md").write_text(chapter("One") + "\nOne more sentence.\n")
    seen.append(key())
    assert len(set(seen)) == len(seen)
    assert {"torch", "papermill", "jupyter-book", "nbclient", "sphinx"} <= keys.package_versions().keys()


def test_a_book_is_published_from_what_was_executed(project, book, monkeypatch):
    root = project(
        first=chapter("One", "\nSome words, so that the page is not empty.\n"), second=chapter("Two")
    )
    build, head = root / "build" / "cpu", "0" * 40
    assert book(root, "--no-build", "--only", "first")[0] == 0
    status, printed = book(root, "--publish")
    assert status == 2
    assert "not fit to publish in profile cpu" in printed and "second: not executed" in printed
    assert "\n  first:" not in printed and not (build / "html").exists()
    status, printed = book(root, "--publish", "--only", "first")
    assert status == 2 and "--publish takes all chapters" in printed

    # As from another machine: other packages, hence another key, but this very commit.
    for name in ("first", "second"):
        (build / "executed" / f"{name}.ipynb").write_bytes((build / "executed" / "first.ipynb").read_bytes())
        values = {"chapter": name, "commit": head, "key": "elsewhere", "device": "NVIDIA A"}
        (build / "results" / f"{name}.json").write_text(json.dumps(result(root, "first") | values))
    for commit in (None, "1" * 40, f"{head}+dirty"):
        monkeypatch.setattr(pages, "commit", lambda _, commit=commit: commit)
        status, printed = book(root, "--publish")
        assert status == 2 and f"second: executed at {head}, this is {commit}" in printed
    monkeypatch.setattr(pages, "commit", lambda _: head)
    status, printed = book(root, "--publish")
    assert status == 0, printed
    assert "book: 4 pages" in printed and "[1/2]" not in printed
    assert json.loads((build / "results" / "first.json").read_text())["key"] == "elsewhere"  # not run again
    banner = [{"device": "cpu (x)"}, {"device": "none"}]
    assert pages.cpu_banner(banner, "cpu").startswith(
        "1 of 2 chapters were executed on a CPU, in the profile"
    )
    assert pages.cpu_banner(banner[:1], "cpu").startswith("These pages were executed on a CPU")
    assert pages.cpu_banner([{"device": "NVIDIA A"}], "gpu") is None
    assert "executed on a CPU" not in (build / "html" / "book" / "first.html").read_text()

    (build / "results" / "first.json").write_text(json.dumps(result(root, "first") | {"device": "cpu (x)"}))
    assert book(root, "--publish")[0] == 0
    assert "1 of 2 chapters were executed on a CPU" in (build / "html" / "book" / "second.html").read_text()


# --- what goes wrong ------------------------------------------------------------------------------


def test_failures_are_explained_and_earlier_results_stay(project, book):
    good = chapter("One", cell("print(size)"))

    def second(source, **options):
        return project(first=good, second=chapter("Two", cell("x = 1"), cell(source)), **options)

    root = second("y = x + 1\nraise RuntimeError(f'y is {y}')")
    build = root / "build" / "cpu"
    status, printed = book(root)
    assert status == 1
    assert "FAILED second, code cell 3 of 3 (book/second.md, line 22)" in printed
    assert "    raise RuntimeError(f'y is {y}')" in printed and "RuntimeError: y is 2" in printed
    assert "partial notebook: build/cpu/failed/second.ipynb" in printed
    partial = nbformat.read(build / "failed" / "second.ipynb", as_version=4)
    assert any("x = 1" in part.source and part.execution_count for part in partial.cells)
    first_run = result(root, "first")
    assert not (build / "results" / "second.json").exists()
    assert not (build / "executed" / "second.ipynb").exists()

    # A killed kernel. The chapter before it is not run again.
    status, printed = book(second("import os\nos.kill(os.getpid(), 9)"))
    assert status == 1
    assert "first: unchanged, not run again" in printed
    assert "FAILED second, code cell 3 of 3" in printed and "DeadKernelError" in printed
    assert "    os.kill(os.getpid(), 9)" in printed

    # A cell that takes too long.
    root = second("import time\ntime.sleep(60)")
    (root / "book" / "profiles" / "cpu.yml").write_text("run: {cell_timeout: 1}\nfirst: {}\nsecond: {}\n")
    status, printed = book(root)
    assert status == 1
    assert "CellTimeoutError: the cell ran longer than 1 s" in printed and "time.sleep(60)" in printed

    # A chapter that leaves early would look complete to papermill.
    status, printed = book(second("import sys\nsys.exit(0)"))
    assert status == 1
    assert "does a cell call exit()?" in printed
    assert "FAILED second (book/second.md, profile cpu)" in printed

    # A figure that says nothing to those who do not see it; other profiles and chapters are not touched.
    status, printed = book(
        second(f"import base64\nfrom IPython.display import Image\nImage(base64.b64decode('{PIXEL}'))")
    )
    assert status == 2
    assert "figures without alt text" in printed and "book/second.md, code cell 3: import base64" in printed
    assert result(root, "first") == first_run

    # --fresh runs what is up to date.
    assert "first: unchanged" not in book(root, "--fresh", "--no-build", "--only", "first")[1]
    assert result(root, "first")["key"] == first_run["key"]
    assert result(root, "first") != first_run


def processes_in(folder):
    """Living processes that work in a folder (Linux)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve() == folder and (entry / "stat").read_text().split()[2] != "Z":
                found.append(entry.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("number", "jobs"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)], ids=str
)
def test_an_interrupted_run_leaves_no_kernel_and_goes_on(project, book, number, jobs):
    slow = (
        "import os, pathlib, subprocess, time\n"
        "if not pathlib.Path('go').exists():\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"
        "    pathlib.Path('NAME').write_text(f'{os.getpid()} {child.pid} .')\n"
        "    time.sleep(60)"
    )
    names = ["second", "third"][:jobs]
    chapters = {name: chapter(name, cell(slow.replace("NAME", name)), "\nMore words.\n") for name in names}
    root = project(first=chapter("One", "\nWords.\n"), **chapters)
    assert book(root, "--no-build", "--only", "first")[0] == 0
    command = [sys.executable, str(ROOT / "book" / "run.py"), "--root", str(root), "--no-build"]
    command += ["--jobs", str(jobs)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root.parent
    )
    pids = [root / name for name in names]
    end = time.monotonic() + 60
    while not all(p.exists() and p.read_text().endswith(".") for p in pids) and time.monotonic() < end:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130, printed
    assert "finished chapters are kept" in printed and "Traceback" not in printed
    for pid in " ".join(path.read_text() for path in pids).replace(".", "").split():
        status = Path(f"/proc/{pid}/stat")
        assert not status.exists() or status.read_text().split()[2] == "Z", f"process {pid} is still there"
    if Path("/proc").exists():
        assert not processes_in(root.resolve())
    build = root / "build" / "cpu"
    left = {path.name for folder in ("executed", "results", "running") for path in (build / folder).iterdir()}
    assert left == {"first.ipynb", "first.json"}

    if number == signal.SIGINT:  # once is enough: the next run goes on where this one stopped
        (root / "go").touch()
        status, printed = book(root, "--no-build")
        assert status == 0
        assert "first: unchanged, not run again" in printed and f"[2/{1 + jobs}] second: " in printed
        assert result(root, names[-1])["seed"] == 3


WITNESS = """
import os, pathlib, time
pathlib.Path('MINE').write_text(os.environ['OMP_NUM_THREADS'])
end = time.monotonic() + 60
while not pathlib.Path('OTHER').exists():
    assert time.monotonic() < end, 'the other chapter did not start'
    time.sleep(0.05)
"""


def test_chapters_run_side_by_side_and_share_the_cores(project, book, monkeypatch):
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    _forget_threads(monkeypatch)
    here, there = (WITNESS.replace("MINE", a).replace("OTHER", b) for a, b in [("a", "b"), ("b", "a")])
    root = project(
        first=chapter("One", cell(here)), second=chapter("Two", cell(there)), third=chapter("Three")
    )
    monkeypatch.setattr(Path, "read_text", _without_quota(Path.read_text))
    status, printed = book(root, "--no-build", "--jobs", "2")
    assert status == 0, printed
    assert [(root / name).read_text() for name in "ab"] == ["2", "2"]
    assert result(root, "third")["seed"] == 3

    # One that fails: its neighbour still ends and is kept, what has not begun is not begun.
    broken = cell(here) + cell("raise RuntimeError('so')")
    root = project(
        first=chapter("One", broken), second=chapter("Two", cell(there + "time.sleep(2)")), third=chapter("3")
    )
    for name in "ab":
        (root / name).unlink()
    status, printed = book(root, "--no-build", "--jobs", "2")
    assert status == 1
    assert "[1/3] first: failed" in printed and "[2/3] second: " in printed and "[3/3]" not in printed
    assert "FAILED first, code cell 3 of 3" in printed and "RuntimeError: so" in printed
    with pytest.raises(SystemExit):
        book(root, "--jobs", "0")


def _forget_threads(monkeypatch):
    """No number of threads in the environment; what the runner sets is gone after the test."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def _without_quota(read):
    def read_text(self, *args, **kwargs):
        if str(self) == "/sys/fs/cgroup/cpu.max":
            raise FileNotFoundError(self)
        return read(self, *args, **kwargs)

    return read_text


def test_two_runs_of_one_profile_do_not_mix(project, book):
    root = project(first=chapter("One"))
    with run._alone(plan.Layout(root, "cpu")):
        status, printed = book(root)
    assert status == 2
    assert "another run is at work in build/cpu" in printed


# --- parts ----------------------------------------------------------------------------------------


def glued(name, text, prefix="application/papermill.record/"):
    metadata = {"scrapbook": {"name": name, "mime_prefix": prefix}}
    return nbformat.v4.new_output("display_data", {f"{prefix}text/plain": text}, metadata=metadata)


def notebook(*outputs):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=list(outputs))])


def test_glued_numbers():
    outputs = [
        glued("a", "1.5"),
        glued("b", "3", prefix=""),
        glued("c", "np.float64(2.0)"),
        glued("d", "'x'"),
    ]
    assert execute.glued_numbers(notebook(*outputs, glued("a", "1.5"))) == {"a": 1.5, "b": 3, "c": 2.0}
    with pytest.raises(parameters.BookError, match="'a' was recorded twice, as 1.5 and as 1.6"):
        execute.glued_numbers(notebook(glued("a", "1.5"), glued("a", "1.6")))
    with pytest.raises(parameters.BookError, match="'a' is nan"):
        execute.glued_numbers(notebook(glued("a", "nan")))


def test_a_quantity_is_shown_to_two_digits_of_its_spread():
    assert recorded.quantity(12.3456, 0.561) == "12.35 ± 0.56"
    assert recorded.quantity(0.00123456, 0.00001234) == "0.001235 ± 0.000012"
    assert recorded.quantity(1234.5, 56.0) == "1234 ± 56"
    assert recorded.quantity(5, None) == "5"
    assert recorded.quantity(0.3333333, 0.0) == "0.3333"


def test_a_partial_table_of_contents():
    toc = {
        "format": "jb-book",
        "root": "book/index",
        "parts": [
            {"caption": "A", "chapters": [{"file": "book/a", "sections": [{"file": "book/b"}]}]},
            {"caption": "C", "numbered": True, "chapters": [{"file": "book/c"}]},
        ],
    }
    assert list(plan.toc_documents(toc)) == ["book/index", "book/a", "book/b", "book/c"]
    kept = plan.restrict_toc(toc, {"book/index", "book/a"})
    assert kept["parts"] == [{"caption": "A", "chapters": [{"file": "book/a"}]}]
    assert plan.restrict_toc(toc, set(plan.toc_documents(toc))) == toc


def test_links_between_chapters_fit_the_stage():
    text = "[one](one.md), [its start](./one.md#start), [two](two.md), [page](index.md), [out](https://x.org/one.md)"
    shown = pages.with_links(text, {"book/one"}, {"book/two"})
    assert shown == (
        "[one](one.ipynb), [its start](one.ipynb#start), two, [page](index.md), [out](https://x.org/one.md)"
    )


@pytest.mark.parametrize(
    ("html", "says"),
    [
        ("<article><h1>T</h1><p>one two three four five six</p></article>", []),
        ("<article><p>one two three four five six</p></article>", ["no <h1> in the article"]),
        ("<article><h1>T</h1></article>", ["no text in the article"]),
        (
            "<article><h1>T</h1><p>one two three four five six</p><img src='a.png' alt=' '></article>",
            ["image without alt text: a.png"],
        ),
        (
            "<script src='//cdn.org/x.js'></script><link rel='canonical' href='https://me.org'>"
            "<article><h1>T</h1><p>one two three four five <a href='https://b.org'>six</a></p></article>",
            ["loads //cdn.org/x.js from another host"],
        ),
        (
            "<style>@import 'https://f.org/a.css'; b {background: url(https://g.org/i.png)}</style>"
            "<article><h1>T</h1><p>one two three four five six</p></article>",
            ["loads https://f.org/a.css from another host", "loads https://g.org/i.png from another host"],
        ),
    ],
)
def test_pages_are_checked(html, says):
    assert render.check_page(html) == says


def test_the_install_line_names_where_the_book_lives():
    for source, shown in [("git+https://forge.org/me/book@v1", None), (None, "downhill-with-noise")]:
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell('INSTALL = "downhill-with-noise"')]
        )
        cell = pages.readable(notebook, {}, source).cells[0]
        assert cell.source == f'INSTALL = "{shown or source}"'


def test_the_kernel_s_threads_fit_the_machine(monkeypatch):
    for jobs in (1, 1000):
        _forget_threads(monkeypatch)
        run._share_the_cores(jobs)
        threads = int(os.environ["OMP_NUM_THREADS"])
        assert 1 <= threads <= (os.cpu_count() or 1) and (jobs == 1 or threads == 1)


def test_side_by_side_the_longest_chapter_starts_first(project):
    root = project(**{name: chapter(name) for name in ("brief", "long", "unmeasured", "middling")})
    (root / "results").mkdir()
    times = {"brief": 10, "long": 600, "middling": 60}
    rows = {name: {"seconds": seconds} for name, seconds in times.items()}
    record = {"profile": "cpu", "chapters": rows}
    (root / "results/cpu-x.json").write_text(json.dumps(record), encoding="utf-8")
    found = plan.load_chapters(root)
    order = run._longest_first(list(found.values()), plan.Layout(root, "cpu"))
    assert [c.name for c in order] == ["unmeasured", "long", "middling", "brief"]
    assert run._longest_first(list(found.values()), plan.Layout(root, "smoke")) == list(found.values())
