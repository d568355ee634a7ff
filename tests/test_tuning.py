"""The searches for settings: what they draw, what they keep, and that an interrupted one goes on."""

from __future__ import annotations

import importlib
import json
import os
import random

import pytest
import tuning

SCRIPTS = [
    "tune_perturb",
    "tune_purifier",
    "tune_refine",
    "tune_short_run",
    "tune_stein",
    "tune_stein_graphs",
]


def summary(rows):
    return {"best": tuning.best(rows, "fd", by="arm", groups=("a", "b"), lowest=True)}


def trial(job):
    arm, number, broken = job
    if broken:
        raise KeyError("the machine is switched off")
    return {"arm": arm, "trial": number, "fd": [float(number), 1.0], "process": os.getpid()}


def new(path, **header):
    return tuning.Record(path, {"size": (8, 8)} | header, summary, identity=("arm", "trial"))


def test_draws_keep_to_their_bounds_and_are_uniform_in_the_logarithm():
    draw = random.Random(0)
    values = [tuning.log_uniform(draw, 1e-3, 1e1) for _ in range(2000)]
    assert min(values) >= 1e-3 and max(values) <= 10 and all(float(f"{v:.2g}") == v for v in values)
    # Four decades with a quarter of the draws each; three standard deviations are 58.
    counts = [sum(10.0**k <= v < 10.0 ** (k + 1) for v in values) for k in (-3, -2, -1, 0)]
    assert all(abs(count - 500) < 58 for count in counts), counts


def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "new" / "search.json"
    record = new(path)
    with pytest.raises(KeyError):
        record.run(trial, [("a", 0, False), ("b", 0, False), ("a", 1, True), ("b", 1, False)], 1)
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert [(row["arm"], row["trial"]) for row in kept["trials"]] == [("a", 0), ("b", 0)]
    again = new(path)
    jobs = [(arm, i, False) for i in range(3) for arm in ("b", "a") if again.lacks(arm, i)]
    assert [job[:2] for job in jobs] == [("b", 1), ("a", 1), ("b", 2), ("a", 2)]
    again.run(trial, jobs, 2)
    made = json.loads(path.read_text(encoding="utf-8"))
    assert made["trials"][:2] == kept["trials"] and len(made["trials"]) == 6
    assert made["best"] == {"a": made["trials"][0], "b": made["trials"][1]}
    assert made["size"] == [8, 8] and {"torch", "device"} <= set(made)
    assert all(row["process"] != os.getpid() for row in made["trials"])


def test_a_write_that_fails_leaves_the_last_whole_record(tmp_path, monkeypatch):
    record = new(tmp_path / "search.json")
    record.add({"arm": "a", "trial": 0, "fd": [1.0]})
    before = record.path.read_text(encoding="utf-8")

    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        record.add({"arm": "a", "trial": 1, "fd": [1.0]})
    assert record.path.read_text(encoding="utf-8") == before


def test_the_best_is_the_lowest_sum_or_the_highest_number_among_those_scored():
    rows = [
        {"arm": "a", "fd": [3.0, 1.0], "score": 0.2}, {"arm": "a", "fd": [1.0, 2.0], "score": 0.1},
        {"arm": "a", "diverged": 3}, {"arm": "b", "diverged": 1},
    ]  # fmt: skip
    assert tuning.best(rows, "fd", by="arm", groups=("a", "b"), lowest=True) == {"a": rows[1]}
    assert tuning.best(rows, "score", by="arm", groups=("a", "b")) == {"a": rows[0]}


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_search_goes_on_in_the_record_of_another(name, tmp_path, capsys):
    path = tmp_path / "search.json"
    new(path).add({"arm": "a", "trial": 0, "fd": [1.0]})
    before = path.read_text(encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main(["--out", str(path)])
    assert stopped.value.code == 2
    assert f"{path} holds a search of another kind" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == before
