"""The record of the tuning, what the chapter takes from it, and the scripts that make the figures."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from companion.classifiers import ARMS, recipe

ROOT = Path(__file__).parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def parameters():
    text = (ROOT / "book" / "adversarial-model-perturbation.md").read_text(encoding="utf-8")
    cell = text.partition(":tags: [parameters]")[2].partition("```")[0]
    return {
        name: ast.literal_eval(value)
        for name, value in re.findall(r"^(\w+) = (.+?)\s+#", cell, flags=re.MULTILINE)
    }


def record(name="tuning-perturb-digits"):
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_every_arm_had_the_same_trials_and_the_chapter_uses_the_best():
    tune, rows, chapter = script("tune_perturb"), record()["trials"], parameters()
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        assert sorted(row["trial"] for row in mine) == list(range(8))
        for row in mine:
            chosen = tune.settings(arm, row["trial"])
            assert {name: row[name] for name in chosen} == chosen
        best = min((row for row in mine if "nll" in row), key=lambda row: sum(row["nll"]))
        assert record()["best"][arm] == best
        assert chapter[arm] == list(tune.settings(arm, best["trial"]).values())
        assert recipe(arm, chapter[arm], 3).rate == best["rate"]
    made = record()
    for name, of in {"epochs": "epochs", "n_train": "images", "noise": "noise"}.items():
        assert chapter[name] == made[of]


def test_trials_share_rate_and_decay_and_stay_in_the_ranges():
    tune = script("tune_perturb")
    for trial in range(8):
        drawn = {arm: tune.settings(arm, trial) for arm in ARMS}
        assert len({(row["rate"], row["weight_decay"]) for row in drawn.values()}) == 1
        for arm, row in drawn.items():
            for name, (low, high) in (tune.COMMON | tune.OWN.get(arm, {})).items():
                assert 0.95 * low <= row[name] <= 1.05 * high


def test_a_trial_scores_every_seed(monkeypatch):
    tune = script("tune_perturb")
    monkeypatch.setattr(tune, "IMAGES", 50)
    rows = [tune.trial((arm, 0, 1)) for arm in ("erm", "amp")]
    assert set(tune.summary(rows)["best"]) == {"erm", "amp"}
    assert all(len(row["nll"]) == tune.SEEDS for row in rows)


def test_the_step_is_timed_and_written(tmp_path, capsys):
    bench = script("perturb_step")
    out = tmp_path / "new" / "step.json"
    bench.main(["--batch", "16", "--repeats", "2", "--out", str(out)])
    made = json.loads(out.read_text(encoding="utf-8"))
    assert list(made["steps"])[:2] == ["erm", "amp"]
    assert made["steps"]["erm"]["ratio_to_erm"]["median"] == 1
    assert made["command"].startswith("python benchmarks/perturb_step.py --batch 16")
    assert "x ERM" in capsys.readouterr().out


def test_a_contender_that_takes_another_step_is_not_timed():
    bench = script("perturb_step")
    x, y, cpu = torch.randn(16, 1, 8, 8), torch.arange(16) % 10, torch.device("cpu")
    bench.check_same("itself", bench.companion_step(cpu, None), bench.companion_step(cpu, None), x, y)
    with pytest.raises(SystemExit, match="nothing was timed"):
        bench.check_same(
            "SGD", bench.companion_step(cpu, bench.AMP(3.0)), bench.companion_step(cpu, None), x, y
        )


def test_the_recorded_timings_hold_what_the_chapter_says():
    steps = record("perturb-step-cpu")["steps"]
    assert {"official AMP", "davda54/sam"} <= set(steps)
    assert steps["amp"]["ratio_to_erm"]["median"] < 2.2
    assert steps["amp, quarter of the batch"]["ratio_to_erm"]["median"] < 1.5
