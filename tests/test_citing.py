"""Citing: every chapter names its papers, entries are BibTeX, and one version stands everywhere."""

import json
import re
from pathlib import Path

import citing
import plan
import pytest
import yaml
from parameters import BookError
from pybtex.database import parse_string

ROOT = Path(__file__).parents[1]

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
RESULT = {"profile": "cpu", "commit": "0123456789abcdef+dirty", "finished": "2026-11-20T00:00:00+00:00"}
BIBLIOGRAPHY = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")


def test_every_chapter_names_its_papers():
    entries = citing.bibtex_entries(BIBLIOGRAPHY)
    for chapter in plan.load_chapters(ROOT).values():
        keys = citing.cited(chapter, entries)
        assert keys, f"{chapter.name}: front matter has no `cite: key`"
        year = yaml.safe_load(chapter.text.split("---\n", 2)[1])["paper"]
        for key in keys:
            assert re.search(r"(\d{4})", key)[1] in year, f"{chapter.name}: {key} is not of {year}"


def test_entries_are_taken_whole_and_are_bibtex():
    entries = citing.bibtex_entries(BIBLIOGRAPHY)
    parsed = parse_string(BIBLIOGRAPHY, "bibtex").entries
    assert entries.keys() == parsed.keys()
    for key, text in entries.items():
        alone = parse_string(text, "bibtex").entries[key]
        assert alone.fields == parsed[key].fields, key
    with pytest.raises(BookError, match="entry open has no end"):
        citing.bibtex_entries("@misc{open,\n title = {a {b}\n")


@pytest.mark.parametrize("url", [None, "https://forge.org/me/book"])
def test_a_chapter_s_section(url):
    chapter = plan.load_chapters(ROOT)["when-training-fails"]
    text = citing.section(chapter, RESULT, ROOT, url)
    blocks = re.findall(r"```bibtex\n(.*?)\n```", text, flags=re.DOTALL)
    found = parse_string("\n\n".join(blocks), "bibtex").entries
    assert list(found) == [
        "hill2022lifecycle",
        "nijkamp2020anatomy",
        "downhill-with-noise-when-training-fails",
    ]
    ours = found["downhill-with-noise-when-training-fails"]
    assert ours.type == "software" and ours.fields["version"] == citing.version(ROOT)
    assert ours.fields["year"] == "2026" and ours.fields.get("url") == url
    assert ours.fields["note"].endswith("executed in the profile cpu at commit 0123456789")
    assert [str(person) for person in ours.persons["author"]] == ["{The Downhill with Noise authors}"]
    assert chapter.title in ours.fields["title"].replace("{", "").replace("}", "")


def test_a_key_that_does_not_exist_is_told():
    chapter = plan.load_chapters(ROOT)["short-run"]
    with pytest.raises(
        BookError, match=r"short-run\.md, front matter, cite: unknown key 'hill2022lifecycle'"
    ):
        citing.cited(chapter, {"hill2022lifecycl": ""})


def test_one_version_stands_everywhere():
    """It is said in companion/__init__.py; the files that others read must agree with it."""
    version = citing.version(ROOT)
    zenodo = json.loads((ROOT / ".zenodo.json").read_text(encoding="utf-8"))
    assert CITATION["version"] == zenodo["version"] == version
    newest = re.search(
        r"^## (\S+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert newest[1] == version
    date = CITATION.get("date-released")  # no day of release before the release
    assert newest[2] == (str(date) if date else "unreleased")


def test_what_others_read_agrees():
    zenodo = json.loads((ROOT / ".zenodo.json").read_text(encoding="utf-8"))
    assert zenodo["title"] == CITATION["title"]
    assert zenodo["description"] == CITATION["abstract"].strip()
    assert zenodo["keywords"] == CITATION["keywords"]
    assert zenodo["license"] == CITATION["license"]
    assert [c["name"] for c in zenodo["creators"]] == [a["name"] for a in CITATION["authors"]]
    assert (zenodo["upload_type"], zenodo["access_right"]) == ("software", "open")
