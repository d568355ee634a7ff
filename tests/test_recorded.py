"""What is written at staging from measured figures and the package's source; what each chapter owes."""

import ast
import base64
import json
import pkgutil
import re
from pathlib import Path

import nbformat
import pages
import plan
import pytest
import recorded
import reference
import signatures
import yaml
from parameters import BookError

ROOT = Path(__file__).parents[1]

CHAPTERS = plan.load_chapters(ROOT)
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def result(**figures):
    return {
        "figures": figures,
        "device": "cpu (x)",
        "seconds": 90.0,
        "commit": "0123456789abcdef",
        "parameters": {"claims": True},
    }


@pytest.fixture
def project(tmp_path):
    """A project with two chapters, one kept record, and the claims that a test gives."""

    def write(claims=(), kept=None):
        for folder in ("book", "results"):
            (tmp_path / folder).mkdir(exist_ok=True)
        for name in ("one", "two"):
            front = f"---\ntitle: {name.title()}\nmethod: a method\npaper: A 2000\n---\n# {name}\n"
            (tmp_path / "book" / f"{name}.md").write_text(front, encoding="utf-8")
        (tmp_path / "book" / "published.yml").write_text(yaml.safe_dump(list(claims)), encoding="utf-8")
        record = {"profile": "gpu", "chapters": kept or {}}
        (tmp_path / "results" / "gpu-x.json").write_text(json.dumps(record), encoding="utf-8")
        (tmp_path / "results" / "tuning.json").write_text('{"trials": []}', encoding="utf-8")
        return tmp_path

    return write


def claim(**changes):
    base = {"chapter": "one", "paper": "a2000", "what": "quality", "setting": "s", "published": 1.5}
    return base | {"where": "table 1", "ours": "fd", "differs": "much"} | changes


# --- figures --------------------------------------------------------------------------------------


def test_runs_of_this_build_come_before_what_was_kept(project):
    root = project(kept={"one": result(fd=2.0), "gone": result()})
    runs = recorded.runs(root, ["two", "one"], "gpu", {"one": result(fd=1.0)})
    assert list(runs) == ["two", "one"] and runs["two"] == []
    assert [(run.here, run.result["figures"]["fd"]) for run in runs["one"]] == [(True, 1.0)]
    runs = recorded.runs(root, ["one"], "smoke", {"one": result(fd=1.0)})
    assert [run.profile for run in runs["one"]] == ["smoke", "gpu"]


def test_times_and_status(project):
    root = project(kept={"two": result()})
    own = result() | {"seconds": 20.0, "parameters": {"claims": False}}
    runs = recorded.runs(root, ["one", "two"], "smoke", {"one": own})
    assert recorded.time_line(runs["one"]) == "**Time to run:** not measured yet."  # a miniature says nothing
    assert recorded.time_line(runs["two"]) == "**Time to run:** 1.5 minutes in the `gpu` profile on cpu (x)."
    table = "\n".join(recorded.chapter_table(root, runs, "{}.md", status=True))
    assert (
        "| [One](one.md) | a method | A 2000 | not measured yet | – | `smoke`: runs, claims not tried |"
        in table
    )
    assert "| [Two](two.md) | a method | A 2000 | cpu (x) | 1.5 | not in this build |" in table
    runs = recorded.runs(root, ["one"], "cpu", {"one": result() | {"seconds": 20.0}})
    assert recorded.time_line(runs["one"]).startswith("**Time to run:** 20 seconds in the `cpu`")
    assert "its claims hold" in recorded.chapter_table(root, runs, "{}.md", status=True)[-1]


def test_published_figures_stand_beside_ours(project):
    root = project([claim(), claim(what="never run", ours="fd_big", profile="paper"), claim(ours=None)])
    figures = result(fd=12.3456, fd_sd=0.561, fd_n=3)
    runs = recorded.runs(root, ["one", "two"], "cpu", {"one": figures})
    text = "\n".join(recorded.papers_tables(root, runs))
    assert "| quality {cite:p}`a2000` | s | 1.5 (table 1) |" in text
    assert "| **12.35 ± 0.56** (n = 3, cpu (x), `cpu`, `0123456`) | much |" in text
    assert "| not measured yet |" in text and "| not repeated |" in text
    assert "## One" in text and "## Two" not in text
    smoke = recorded.runs(root, ["one"], "smoke", {"one": figures})
    assert "12.35" not in "\n".join(recorded.papers_tables(root, smoke))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (claim(ours="df"), "quality, chapter one: unknown figure 'df'; did you mean 'fd'?"),
        (claim(chapter="oen"), "entry 1: unknown chapter 'oen'; did you mean 'one'?"),
        (claim(publisched=1), "entry 1: unknown field 'publisched'; did you mean 'published'?"),
        ({"chapter": "one"}, "entry 1 lacks differs, paper, published, setting, what, where"),
    ],
)
def test_a_claim_without_our_figure_is_an_error(project, wrong, says):
    root = project([wrong])
    with pytest.raises(BookError, match=re.escape(says)):
        recorded.papers_tables(root, recorded.runs(root, ["one"], "cpu", {"one": result(fd=1.0)}))


def test_marks_are_filled_and_unknown_ones_refused():
    parts = {"a": lambda: ["x", "y"]}
    assert recorded.filled("1\n<!-- made at staging: a -->\n2", parts, "p") == "1\nx\ny\n2"
    assert recorded.filled("<!-- a remark -->", parts, "p") == "<!-- a remark -->"
    with pytest.raises(BookError, match="p: unknown part 'b'; did you mean 'a'"):
        recorded.filled("<!-- made at staging: b -->", parts, "p")


def test_the_gallery_shows_what_was_made(tmp_path):
    def notebook(outputs, tag="gallery"):
        metadata = {"tags": [tag], "mystnb": {"image": {"alt": "Two\nwords"}}}
        return nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell("", outputs=outputs, metadata=metadata)]
        )

    image = nbformat.v4.new_output("display_data", {"image/png": PIXEL})
    books = {"a": notebook([image]), "b": notebook([]), "c": notebook([image], tag="other")}
    text = "\n".join(pages.gallery(books, {"a": "A", "b": "B", "c": "C"}, tmp_path / "gallery"))
    assert ":::{grid-item-card} A" in text and ":img-alt: Two words" in text and ":link: a" in text
    assert "card} B" not in text and "card} C" not in text
    assert (tmp_path / "gallery" / "a.png").read_bytes() == base64.b64decode(PIXEL)
    assert pages.gallery({"b": books["b"]}, {"b": "B"}, tmp_path / "gallery") == []


# --- what each chapter owes -----------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapters_say_what_they_need_and_where_they_lead(name):
    chapter = CHAPTERS[name]
    head = chapter.text.partition("```{code-cell}")[0]
    assert "After this chapter you can" in head and "You need" in head
    recorded.front_matter(ROOT, name)
    assert "claims" in chapter.parameters
    tagged = [cell for cell in chapter.notebook.cells if "gallery" in plan.tags(cell)]
    assert len(tagged) == 1 and tagged[0].metadata["mystnb"]["image"]["alt"].strip()
    sections = re.findall(r"^## (.+)$", chapter.text, flags=re.MULTILINE)
    assert "Exercises" in sections and sections[-1] == "Further reading"
    reading = chapter.text.partition("## Further reading")[2].partition("```")[0]
    items = [line for line in reading.splitlines() if line.startswith("- ")]
    assert 3 <= len(items) <= 5 and all("{cite:t}" in line and ": " in line for line in items)


def test_what_is_cited_is_in_the_bibliography():
    keys = set(
        re.findall(r"^@\w+\{([^,]+),", (ROOT / "book/references.bib").read_text("utf-8"), re.MULTILINE)
    )
    claims = yaml.safe_load((ROOT / "book/published.yml").read_text(encoding="utf-8"))
    assert {entry["paper"] for entry in claims} <= keys
    for path in (ROOT / "book").glob("*.md"):
        cited = re.findall(r"\{cite:\w+\}`([^`]+)`", path.read_text(encoding="utf-8"))
        assert {key.strip() for group in cited for key in group.split(",")} <= keys, path.name


def test_published_figures_name_what_the_kept_runs_record():
    runs = recorded.runs(ROOT, CHAPTERS, "cpu", {})
    assert recorded.papers_tables(ROOT, runs)  # raises for a name that a kept run does not have


# --- notation and glossary ------------------------------------------------------------------------


def names_in_companion():
    """Every argument, attribute, field, function, class and module of the package."""
    found = set()
    for path in (ROOT / "companion").rglob("*.py"):
        found.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.arg(arg=name) | ast.Attribute(attr=name):
                    found.add(name)
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    found.add(name)
                case ast.AnnAssign(target=ast.Name(id=name)):
                    found.add(name)
    return found


def test_code_names_of_the_notation_exist():
    text = (ROOT / "book" / "notation.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| $")]
    assert len(rows) > 40 and all(len(row) == 3 for row in rows)
    cells = [row[2] for row in rows]
    assert all(cell == "–" or re.fullmatch(r"`\w+`(, `\w+`)*", cell) for cell in cells)
    used = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert used - names_in_companion() == set()
    assert "step_length" not in names_in_companion()  # the test can fail


def test_glossary_terms_are_sorted_and_lead_to_a_page():
    text = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8")
    body = text.partition("```{glossary}\n")[2].partition("```")[0]
    entries = re.findall(r"^(\S.*)\n((?:  .*\n)+)", body, flags=re.MULTILINE)
    terms = [term for term, _ in entries]
    assert len(terms) > 40 and terms == sorted(terms, key=str.lower)
    for term, meaning in entries:
        links = re.findall(r"\]\(([\w-]+)\.md", meaning)
        assert links and all(link in CHAPTERS or link == "results" for link in links), term


# --- the API reference ----------------------------------------------------------------------------


def test_every_public_module_is_in_a_room():
    import companion

    modules = [found.name for found in pkgutil.walk_packages(companion.__path__, "companion.")]
    public = {name for name in modules if not any(part.startswith("_") for part in name.split("."))}
    rooms = reference.rooms(ROOT)
    assert {module for room in rooms.values() for module in room} | {"companion.graphs"} == public
    texts = reference.pages(ROOT)
    assert texts.keys() == {f"book/api/{room}" for room in rooms}
    for module in public - {"companion.graphs"}:
        assert any(f".. automodule:: {module}\n" in text for text in texts.values()), module
        assert reference.public_names(ROOT, module), f"{module} has no __all__"
    table = "\n".join(reference.room_table(ROOT))
    assert all(f"[`companion.{room}`]({room}.md)" in table for room in rooms)


def test_a_source_page_leads_back_to_the_module_that_defines_a_name():
    assert signatures.source_of(None, "companion.likelihood", "CheckpointError") == "companion.likelihood"
    assert signatures.source_of(None, "companion.checkpoint", "CheckpointError") is None
    # From a private module: as viewcode does it.
    assert signatures.source_of(None, "companion.stein", "ksd_squared") is None
    assert signatures.source_of(None, "companion.chains", "Bank.draw") is None


def test_rooms_become_sections_of_the_index():
    toc = {"root": "book/index", "parts": [{"chapters": [{"file": reference.INDEX}, {"file": "book/x"}]}]}
    got = reference.with_rooms(toc, {"book/api/a": "", "book/api/b": ""})
    assert list(plan.toc_documents(got)) == [
        "book/index", reference.INDEX, "book/api/a", "book/api/b", "book/x"
    ]  # fmt: skip
    assert reference.INDEX in plan.toc_documents(plan.load_toc(ROOT))


@pytest.mark.parametrize("name", [name for name, c in CHAPTERS.items() if "checkpoints" in c.parameters])
def test_a_chapters_checkpoints_lie_in_a_folder_of_its_own(name):
    """The profiles give all chapters one folder: two that use the same name would meet each other's runs."""
    text = CHAPTERS[name].text
    folders = re.findall(r'f"\{checkpoints\}/([^"{/]*)', text)
    assert folders and set(folders) == {name}


@pytest.mark.parametrize("name", CHAPTERS)
def test_nobody_waits_for_a_value_from_record(name):
    """It returns nothing, so that a cell which ends with it shows nothing."""
    for cell in CHAPTERS[name].notebook.cells:
        if cell.cell_type == "code":
            tree = ast.parse(cell.source)
            alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "record":
                    assert id(node) in alone, ast.unparse(node)
