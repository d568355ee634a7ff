"""The workflows of GitHub: well formed, safe, and made of commands that run here too."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "workflows"
NAMES = sorted(path.name for path in FOLDER.glob("*.yml"))
WORKFLOWS = {name: yaml.safe_load((FOLDER / name).read_text(encoding="utf-8")) for name in NAMES}
JOBS = [(name, job) for name in NAMES for job in WORKFLOWS[name]["jobs"]]
BOOK = WORKFLOWS["book.yml"]["jobs"]
# Programs that a step may call besides make: of the runner's image.
PROGRAMS = {"cd", "gh", "nvidia-smi", "sha256sum", "test"}


def program(name):
    """One of the environment's programs, wherever its Python is."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return shutil.which(name, path=path) or pytest.fail(
        f"{name} is not installed; run make setup", pytrace=False
    )


def triggers(name):
    return WORKFLOWS[name][True]  # YAML 1.1 reads `on` as true


def steps(name, job):
    return WORKFLOWS[name]["jobs"][job]["steps"]


def schema(name, *files):
    command = [program("check-jsonschema"), "--builtin-schema", name, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_workflows():
    assert NAMES == ["book.yml", "check.yml", "upkeep.yml"]


@pytest.mark.parametrize("name", ["vendor.github-workflows", "custom.github-workflows-require-timeout"])
def test_workflows_fit_their_schema(name):
    schema(name, *FOLDER.glob("*.yml"))


def test_dependabot_fits_its_schema():
    schema("vendor.dependabot", ROOT / ".github" / "dependabot.yml")


def test_the_citation_fits_its_schema():
    """Citation File Format 1.2.0: the schema by which cffconvert validates in tools/release.py."""
    schema("vendor.citation-file-format", ROOT / "CITATION.cff")


def test_a_wrong_file_does_not_fit(tmp_path):
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nmessage: x\ntitle: x\n")
    with pytest.raises(AssertionError, match="authors"):
        schema("vendor.citation-file-format", tmp_path / "CITATION.cff")


def test_zizmor_finds_nothing(tmp_path):
    command = [program("zizmor"), "--offline", "--persona=pedantic", "--format=json"]
    done = subprocess.run([*command, str(ROOT / ".github")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [finding for finding in json.loads(done.stdout) if not finding.get("ignored")]
    bad = (FOLDER / "check.yml").read_text().replace("pull_request:", "pull_request_target:")
    (tmp_path / "bad.yml").write_text(bad)
    assert subprocess.run([*command, str(tmp_path / "bad.yml")], capture_output=True).returncode != 0


def test_actions_are_pinned_by_commit():
    seen = {}
    pin = re.compile(r"uses: (actions/[\w-]+)@([0-9a-f]{40}) # (v\d+\.\d+\.\d+)( # zizmor: .+)?$")
    for name in NAMES:
        for line in (FOLDER / name).read_text(encoding="utf-8").splitlines():
            if "uses:" in line:
                found = pin.search(line)
                assert found, f"{name}: {line.strip()}"
                action, *where = found.group(1, 2, 3)
                assert seen.setdefault(action, where) == where, f"{action} is pinned in two ways"
    assert len(seen) == 7


@pytest.mark.parametrize(("name", "job"), JOBS)
def test_jobs_have_few_rights_and_an_end(name, job):
    workflow, settings = WORKFLOWS[name], WORKFLOWS[name]["jobs"][job]
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["group"]
    assert 0 < settings["timeout-minutes"] <= 240
    may = {"deploy": {"pages": "write", "id-token": "write"}}
    may |= dict.fromkeys(("notebooks", "release"), {"contents": "write"})
    rights = settings.get("permissions")
    assert rights == (may.get(job) if name == "book.yml" else None)
    for step in steps(name, job):
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False
        if rights:  # what may write runs no code from the package index
            assert not re.search(r"\b(make|pip)\b|tools/(?!branch)", step.get("run", ""))


def test_no_foreign_code_comes_near_rights_or_the_gpu():
    for name in NAMES:
        assert "pull_request_target" not in triggers(name) and "workflow_run" not in triggers(name)
    assert triggers("book.yml").keys() == {"schedule", "workflow_dispatch", "push"}
    assert triggers("book.yml")["push"] == {"tags": ["v*"]}  # not branches: only those who may tag a release
    assert "!github.event.repository.fork" in BOOK["gpu"]["if"]
    own = [(name, job) for name, job in JOBS if "GPU_RUNNER" in str(WORKFLOWS[name]["jobs"][job]["runs-on"])]
    assert own == [("book.yml", "gpu")]
    assert all("secrets." not in (FOLDER / name).read_text() for name in NAMES)


def test_the_gpu_is_looked_at_first_and_runs_one_chapter_at_a_time():
    run = [step["run"] for step in BOOK["gpu"]["steps"] if "run" in step]
    assert "nvidia-smi" in run[0] and "make device" in run[0]
    assert run[1] == "make chapters PROFILE=gpu JOBS=1"
    assert WORKFLOWS["book.yml"]["concurrency"] == {"group": "book", "cancel-in-progress": False}


def test_the_site_comes_from_the_gpu_or_else_from_the_cpu():
    assert BOOK["gpu"]["if"].startswith("vars.GPU_RUNNER != ''")
    assert BOOK["cpu"]["if"] == "vars.GPU_RUNNER == ''"
    # A GPU run that failed publishes nothing; a skipped one lets the CPU's pages through.
    condition = BOOK["site"]["if"]
    for gpu, cpu, goes in [
        ("success", "skipped", True),
        ("skipped", "success", True),
        ("failure", "skipped", False),
        ("skipped", "failure", False),
        ("skipped", "skipped", False),
    ]:
        words = {"!cancelled()": "True", "&&": "and", "||": "or"}
        words |= {"needs.gpu.result": repr(gpu), "needs.cpu.result": repr(cpu)}
        text = condition.removeprefix("${{").removesuffix("}}").strip()
        for old, new in words.items():
            text = text.replace(old, new)
        assert bool(eval(text)) is goes, text
    assert BOOK["site"]["env"]["PROFILE"] == "${{ needs.gpu.result == 'success' && 'gpu' || 'cpu' }}"
    for job in ("gpu", "cpu"):
        kept = next(s["with"] for s in BOOK[job]["steps"] if "upload-artifact" in s.get("uses", ""))
        assert kept["name"] == f"executed-{job}"
        assert {f"build/{job}/executed", f"build/{job}/results"} <= set(kept["path"].split())


def commands():
    """Every simple command of every step."""
    for name, job in JOBS:
        for step in steps(name, job):
            for line in re.split(r"\n|&&|\|\|?|;", step.get("run", "")):
                if words := line.strip().strip("()").split():
                    yield name, job, words


def test_steps_are_commands_that_there_are():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    called = set()
    for name, job, words in commands():
        if words[0] == "make":
            for word in words[1:]:
                variable = word.partition("=")[0] if "=" in word else None
                assert word in targets or f"$({variable})" in makefile, f"{name}, {job}: make {word}"
                called |= {word} & targets
        elif words[0] == "python3":
            assert (ROOT / words[1]).is_file(), f"{name}, {job}: {words[1]}"
        else:
            assert words[0] in PROGRAMS, f"{name}, {job}: {words[0]}"
    assert {"test", "chapters", "site", "pages", "branch", "release", "device", "links", "audit"} <= called


@pytest.mark.parametrize("words", sorted({" ".join(w) for *_, w in commands() if w[0] == "make"}))
def test_make_knows_what_to_do(words):
    done = subprocess.run(f"{words} --dry-run", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and ".venv/bin" in done.stdout, done.stderr
    for script in re.findall(r"\.venv/bin/python (\S+\.py)", done.stdout):
        assert (ROOT / script).is_file()


def test_no_line_of_a_step_takes_text_from_outside():
    """An expression in a script is how a branch's name becomes a command; steps read the environment."""
    for name, job in JOBS:
        for step in steps(name, job):
            assert "${{" not in step.get("run", ""), f"{name}, {job}"
