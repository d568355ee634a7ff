"""What is kept in git of measured figures: it must agree with what the book and the README say of it."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def script(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def parameters(chapter: str) -> dict[str, str]:
    text = (ROOT / "book" / f"{chapter}.md").read_text(encoding="utf-8")
    cell = text.partition(":tags: [parameters]")[2].partition("```")[0]
    return dict(re.findall(r"^(\w+) = (.+?)\s+#", cell, flags=re.MULTILINE))


def test_short_run_uses_each_arms_best_trial():
    record = json.loads((ROOT / "results/tuning-short-run-digits.json").read_text(encoding="utf-8"))
    chapter = parameters("short-run")
    trials = {arm: {r["trial"] for r in record["trials"] if r["arm"] == arm} for arm in record["best"]}
    assert len(set(map(frozenset, trials.values()))) == 1, "the arms were not given the same trials"
    for arm, best in record["best"].items():
        scored = [row for row in record["trials"] if row["arm"] == arm and "fd" in row]
        assert best == min(scored, key=lambda row: sum(row["fd"]))
        for name in ("temperature", "step_size", "rate", "network_rate"):
            if f"{arm}_{name}" in chapter:
                assert float(chapter[f"{arm}_{name}"]) == best[name], (arm, name)
    for name in ("updates", "batch", "steps"):
        assert int(chapter[name]) == record[name]


def test_tuning_gives_every_arm_the_same_settings():
    tune = script("benchmarks/tune_short_run.py")
    record = json.loads((ROOT / "results/tuning-short-run-digits.json").read_text(encoding="utf-8"))
    for row in record["trials"]:
        expected = tune.settings(row["trial"])
        assert {name: row[name] for name in expected} == expected


def test_what_the_chapter_says_of_the_tuning_holds():
    """Bank against no bank over the same settings: most at the trained age, all at four times that age."""
    record = json.loads((ROOT / "results/tuning-short-run-digits.json").read_text(encoding="utf-8"))
    arms = {
        arm: {row["trial"]: row for row in record["trials"] if row["arm"] == arm and "fd" in row}
        for arm in record["best"]
    }
    common = sorted(set.intersection(*map(set, arms.values())))
    assert len(common) == 32

    def wins(arm: str, other: str, figure: str) -> int:
        return sum(sum(arms[arm][t][figure]) < sum(arms[other][t][figure]) for t in common)

    assert wins("bank", "no_bank", "fd") > 24
    assert wins("bank", "no_bank", "fd_4x") == 32
    assert wins("noise_birth", "bank", "fd") > 16


def test_stein_chapter_uses_each_methods_best_trial():
    record = json.loads((ROOT / "results/tuning-stein-plane.json").read_text(encoding="utf-8"))
    tune, chapter = script("benchmarks/tune_stein.py"), parameters("stein-discrepancy")
    names = {"anchored": ("lsd", ""), "plain": ("plain", "plain_"), "score_matching": ("sm", "")}
    for method, best in record["best"].items():
        rows = [row for row in record["trials"] if row["method"] == method]
        assert sorted(row["trial"] for row in rows) == list(range(8))  # every method had the same trials
        assert all(row[k] == v for row in rows for k, v in tune.settings(row["trial"]).items())
        assert best == max((row for row in rows if "score" in row), key=lambda row: row["score"])
        prefix, lam = names[method]
        expected = {f"{prefix}_rate": best["rate"], f"{prefix}_beta": best["beta"]}
        if method != "score_matching":
            expected |= {
                f"{prefix}_critic_rate": best["critic_rate"],
                f"{prefix}_critic_steps": best["critic_steps"],
                f"{lam}lam": best["lam"],
            }
        for name, value in expected.items():
            assert float(chapter[name]) == value, name
    assert int(chapter["batch"]) == record["batch"]
    assert [int(chapter["width"]), int(chapter["critic_width"])] == record["widths"]


def test_what_the_graph_chapter_says_of_its_trainings_holds():
    record = json.loads((ROOT / "results/tuning-stein-graphs.json").read_text(encoding="utf-8"))
    tune, chapter = script("benchmarks/tune_stein_graphs.py"), parameters("stein-graphs")
    assert record["table"] == tune.table(record["runs"])
    rows = {row["candidate"]: row for row in record["table"]}
    assert list(rows) == list(tune.CANDIDATES) and all(row["runs"] == tune.SEEDS for row in rows.values())
    default = tune.CANDIDATES["anchored 1:1"]
    assert float(chapter["rate"]) == default["rate"]
    assert float(chapter["critic_rate"]) == default["critic_rate"]
    assert int(chapter["batch"]) == record["batch"]
    anchored = [row for name, row in rows.items() if name.startswith("anchored")]
    plain = [row for name, row in rows.items() if name.startswith("plain")]
    assert all(row["diverged"] == row["lost"] == 0 for row in anchored)  # what "reliable" means there
    assert rows["plain 1:1, as the anchored"]["lost"] == 3
    assert max(row["dsm"] for row in anchored) < min(row["dsm"] for row in plain if "dsm" in row)
    assert rows["dsm"]["dsm"] < rows["anchored 1:1"]["dsm"] < rows["anchored 1:1, critic not averaged"]["dsm"]
    assert rows["anchored 1:1, twice the rates"]["dsm"] < rows["anchored 1:1"]["dsm"]
    full = json.loads((ROOT / "results/tuning-stein-graphs-full.json").read_text(encoding="utf-8"))
    assert full["table"] == tune.table(full["runs"])
    assert full["cost"] >= int(chapter["cost"]) and full["levels"] == record["levels"]
    ends = {row["candidate"]: row for row in full["table"]}
    for key in ("dsm", "mmd"):  # over a long training the lower rates are better
        assert ends["anchored 1:1"][key] < ends["anchored 1:1, twice the rates"][key]


def test_readme_table_is_that_of_the_record():
    record = script("tools/record.py")
    assert list((ROOT / "results").glob("cpu-*.json")), "no recorded cpu run: make course, tools/record.py"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = record.chapter_table(ROOT)
    assert record.renewed(readme, table) == readme
    with pytest.raises(ValueError, match="lacks the lines"):
        record.renewed("# no marks", table)


def test_figures_of_uncommitted_code_are_refused(tmp_path, capsys):
    record = script("tools/record.py")
    (tmp_path / "_toc.yml").write_text("chapters:\n- file: book/one\n", encoding="utf-8")
    folder = tmp_path / "build" / "cpu" / "results"
    folder.mkdir(parents=True)
    (folder / "one.json").write_text(json.dumps({"commit": "abc+dirty"}), encoding="utf-8")
    assert record.main(["--root", str(tmp_path)]) == 1
    assert "uncommitted code: one" in capsys.readouterr().err


def test_chapters_that_were_not_run_again_keep_their_figures(tmp_path):
    record = script("tools/record.py")
    (tmp_path / "_toc.yml").write_text("- file: book/one\n- file: book/two\n", encoding="utf-8")
    (tmp_path / "README.md").write_text(f"{record.BEGIN}\n{record.END}\n", encoding="utf-8")
    (tmp_path / "book").mkdir()
    folder = tmp_path / "build" / "cpu" / "results"
    folder.mkdir(parents=True)
    entry = {"device": "cpu (x)", "seconds": 60, "versions": {"torch": "2"}, "figures": {}}
    for name in ("one", "two"):
        front = f"---\ntitle: {name}\nmethod: m\npaper: p\n---\n"
        (tmp_path / "book" / f"{name}.md").write_text(front, encoding="utf-8")
        (folder / f"{name}.json").write_text(json.dumps(entry | {"commit": "old"}), encoding="utf-8")
    assert record.main(["--root", str(tmp_path)]) == 0
    (folder / "one.json").unlink()
    (folder / "two.json").write_text(json.dumps(entry | {"commit": "new"}), encoding="utf-8")
    assert record.main(["--root", str(tmp_path)]) == 0
    (file,) = (tmp_path / "results").glob("cpu-*.json")
    chapters = json.loads(file.read_text(encoding="utf-8"))["chapters"]
    assert {name: row["commit"] for name, row in chapters.items()} == {"one": "old", "two": "new"}

    # Measured on another machine: a file of its own, and both machines in the README's table.
    other = {"device": "cpu (y)", "seconds": 120, "commit": "new"}
    (folder / "two.json").write_text(json.dumps(entry | other), encoding="utf-8")
    assert record.main(["--root", str(tmp_path)]) == 0
    assert len(list((tmp_path / "results").glob("cpu-*.json"))) == 2
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| m | p | cpu (x)<br>cpu (y) | 1.0<br>2.0 |" in readme and "| cpu (x) | 1.0 |" in readme
    assert "Together 2.0 minutes" in readme


def test_mid_run_uses_the_best_affordable_trial_and_tells_the_search_as_it_was():
    record = json.loads((ROOT / "results/tuning-purifier-digits.json").read_text(encoding="utf-8"))
    tune, chapter = script("benchmarks/tune_purifier.py"), parameters("mid-run")
    rows, best = record["trials"], record["best"]
    for name, value in (tune.FIXED | {"updates": record["updates"], "n_seeds": tune.SEEDS}).items():
        assert json.loads(chapter[name]) == value, name
    assert sorted(row["trial"] for row in rows) == list(range(tune.TRIALS))
    for row in rows:
        expected = tune.settings(row["trial"])
        assert {name: row[name] for name in expected} == expected
    for name in tune.settings(best["trial"]):
        assert json.loads(chapter[name]) == best[name], name
    assert tune.summary(rows)["best"] == best
    natural = best["natural"][tune.NUMBERS.index(best["best_steps"])]
    assert sum(natural) / tune.SEEDS >= best["plain"] - tune.COST
    affordable = [row for row in rows if "score" in row and tune.affordable(row)]
    assert best["score"] == max(row["score"] for row in affordable)
    # The prose: 24 settings; the search started with less than half the noise and the rate.
    text = (ROOT / "book/mid-run.md").read_text(encoding="utf-8")
    assert f"a search over {len(rows)} settings" in text
    first = rows[0]
    assert first["trial"] == 0 and first["birth_noise"] < best["birth_noise"] / 2
    assert first["rate"] < best["rate"] / 2 and first["score"] < best["score"] - 0.05


def test_the_chapter_on_critics_uses_each_arms_best_trial():
    record = json.loads((ROOT / "results/tuning-refine.json").read_text(encoding="utf-8"))
    tune, chapter = script("benchmarks/tune_refine.py"), parameters("discriminator-langevin")
    for part, fixed in (("plane", tune.PLANE), ("digits", tune.IMAGES)):
        assert record[part] == fixed
        for name, value in fixed.items():
            assert json.loads(chapter[name]) == value, name
        for arm, best in record["best"][part].items():
            rows = [r for r in record["trials"] if (r["part"], r["arm"]) == (part, arm)]
            assert sorted(r["trial"] for r in rows) == list(range(tune.TRIALS[part]))
            for r in rows:
                assert all(r[k] == v for k, v in tune.settings(part, arm, r["trial"]).items())
            assert best == max((r for r in rows if "score" in r), key=lambda r: r["score"])
    names = {
        "data_space": ("space_step_size", "space_beta"), "ddls": ("latent_step_size", "latent_beta"),
        "dgflow": ("flow_step_size", "flow_beta"), "dot": ("dot_step_size",),
        "dcd": ("step_size", "beta", "tune_rate"),
    }  # fmt: skip
    for arm, parts in names.items():
        best = record["best"]["plane"][arm]
        chosen = [best[k] for k in ("step_size", "beta", "rate") if k in best]
        assert [float(chapter[name]) for name in parts] == chosen, arm
    for arm, best in record["best"]["digits"].items():
        chosen = [best[k] for k in ("step_size", "beta", "rate", "updates") if k in best]
        assert json.loads(chapter[f"images_{arm}"]) == chosen, arm


def test_what_the_prose_says_of_the_searches_and_ceilings_is_so():
    trials = json.loads((ROOT / "results/tuning-refine.json").read_text(encoding="utf-8"))["trials"]
    lowered = {}
    for row in trials:
        if row["part"] == "digits" and "fd" in row:
            by_steps = [sum(values) / len(values) for values in zip(*row["fd"], strict=True)]
            lowered.setdefault(row["arm"], []).append(by_steps[0] - min(by_steps))
    # "every one of the twelve lowered the validation FD"; DDLS: "no setting moved FD by much"
    assert len(lowered["dcd"]) == 12 and min(lowered["dcd"]) > 0
    assert max(lowered["ddls"]) < 0.1 * max(lowered["dcd"])
    # "the library for products reaches less than half of what the one for convolutions does"
    ceilings = json.loads((ROOT / "results/limits-cpu.json").read_text(encoding="utf-8"))["ceilings"]
    assert ceilings["matmul float32"]["high"] < 0.5 * ceilings["convolution float32"]["low"]
