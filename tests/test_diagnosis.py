"""Bands and diagnosis: since when, whose, what to change; a sick training is stopped, a well one is not."""

from __future__ import annotations

import json
import math

import pytest
import torch

from companion import lifecycle
from companion.chains import born_from_data, born_from_noise
from companion.diagnosis import BANDS, Band, Finding, TrainingDiverged, diagnose
from companion.langevin import DivergenceError
from companion.likelihood import CheckpointError, load, train

BAND = Band(-1.0, 1.0, below="go up", above="go down")
SHAPE = (1, 4, 4)
SETTINGS = {
    "batch": 32,
    "steps": 10,
    "step_size": 0.1,
    "temperature": 0.1,
    "data_noise": 0.2,
    "base_std": 1.0,
}


def history(values, name="g"):
    return {name: [torch.as_tensor(v, dtype=torch.float32) for v in values]}


def squares():
    """200 images whose upper half is random and whose lower half never changes."""
    x = torch.rand(200, *SHAPE, generator=torch.Generator().manual_seed(9)) * 2 - 1
    x[:, :, 2:] = -1
    return x


def build(birth=None, *, rate=1e-2, rejuvenation=0.1, hidden=(16, 16), stack=2):
    birth = born_from_data(squares(), 0.2) if birth is None else birth
    rng = torch.Generator().manual_seed(0)
    return lifecycle.mid_run(
        SHAPE, birth, rate=rate, rejuvenation=rejuvenation, rng=rng, stack=stack, bank_size=64, hidden=hidden
    )


# --- bands on made-up histories -------------------------------------------------------------------


def test_a_gauge_inside_its_band_is_no_finding():
    assert diagnose(history([0.5, -0.5] * 20), {"g": BAND}, 10) == []
    # A single jump that the mean forgives, and one that lies further back than the window.
    assert diagnose(history([0.0] * 35 + [9.0] + [0.0] * 4), {"g": BAND}, 10) == []
    assert diagnose(history([50.0] * 10 + [0.0] * 10), {"g": BAND}, 10) == []


@pytest.mark.parametrize(("level", "since"), [(3.0, 43), (1.5, 46), (30.0, 40)])
def test_since_is_when_the_trailing_mean_left(level, since):
    """From update 40 on the gauge is at ``level``: after m such updates the mean of ten is m level / 10."""
    (finding,) = diagnose(history([0.0] * 40 + [level] * 30), {"g": BAND}, 10)
    assert finding.since == since
    assert finding.value == pytest.approx(level)
    assert f"since update {since}" in str(finding) and "go down" in str(finding)


def test_since_counts_the_last_departure_and_zero_is_from_the_start():
    there_and_back = [5.0] * 20 + [0.0] * 20 + [-5.0] * 20
    (finding,) = diagnose(history(there_and_back), {"g": BAND}, 10)
    assert finding.since == 42 and "go up" in str(finding)  # three updates at -5 make the mean -1.5
    (finding,) = diagnose(history([5.0] * 12), {"g": BAND}, 10)
    assert finding.since == 0


def test_the_model_of_a_stack_is_named_and_the_earliest_finding_comes_first():
    rows = [[0.0, 0.0, 0.0]] * 20 + [[0.0, 0.0, 7.0]] * 10 + [[-7.0, 0.0, 7.0]] * 10
    found = diagnose(history(rows), {"g": BAND}, 5)
    assert [(f.model, f.since) for f in found] == [(2, 20), (0, 30)]
    assert "of model 2" in str(found[0])
    both = history(rows) | history([9.0] * 40, "h")
    assert [f.gauge for f in diagnose(both, {"g": BAND, "h": BAND}, 5)] == ["h", "g", "g"]
    assert diagnose(both, {"h": BAND}, 5)[0].model is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_outside(bad):
    (finding,) = diagnose(history([0.0] * 20 + [bad]), {"g": BAND}, 10)
    assert finding.since == 20 and not math.isfinite(finding.value)
    assert diagnose(history([[0.0, 0.0]] * 20 + [[0.0, bad]]), {"g": BAND}, 10)[0].model == 1


def test_too_few_updates_and_missing_gauges_give_no_finding():
    assert diagnose(history([9.0] * 9), {"g": BAND}, 10) == []
    assert len(diagnose(history([9.0] * 10), {"g": BAND}, 10)) == 1
    assert diagnose(history([9.0] * 10), {"other": BAND}, 10) == []
    assert diagnose({}, BANDS["long"], 10) == []


def test_every_band_is_in_order_and_says_what_to_change():
    for bands in BANDS.values():
        assert set(bands) == {"rho", "separation", "diversity"}
        for band in bands.values():
            assert band.low < band.high and band.below and band.above
    assert BANDS["long"]["rho"].high <= BANDS["mid"]["rho"].high <= BANDS["short"]["rho"].high


def test_the_message_without_a_finding_calls_it_a_spike():
    error = TrainingDiverged(12, [])
    assert isinstance(error, DivergenceError)
    assert "update 12" in str(error) and "spike" in str(error)
    error = TrainingDiverged(12, [Finding("g", 3, 7.0, BAND, 1)])
    assert error.update == 12 and "g of model 1" in str(error) and "go down" in str(error)


def test_models_with_the_same_complaint_share_a_line():
    up = [Finding("g", since, 7.0, BAND, model) for model, since in ((2, 3), (0, 5))]
    down = Finding("g", 4, -7.0, BAND, 1)
    lines = str(TrainingDiverged(12, [up[0], down, up[1]])).splitlines()
    assert len(lines) == 3 and "g of model 2" in lines[1] and "(model 0 as well)" in lines[1]
    assert "g of model 1" in lines[2] and "go up" in lines[2] and "as well" not in lines[2]


# --- in a training ----------------------------------------------------------------------------------


def test_a_well_training_is_not_stopped():
    run = train(build(), squares(), 120, bands=BANDS["long"], window=20, progress=False, **SETTINGS)
    assert run.update == 120


def test_data_narrower_than_a_step_stop_it_and_noise_is_named():
    with pytest.raises(TrainingDiverged, match=r"noise of 1\.5 to 3 step sizes") as caught:
        train(
            build(rate=0.03), squares(), 600, bands=BANDS["long"], window=20, progress=False,
            **(SETTINGS | {"data_noise": 0.0}),
        )  # fmt: skip
    assert "rho" in {finding.gauge for finding in caught.value.findings}
    assert caught.value.findings[0].since <= caught.value.update < 600
    # The same with noise goes on to the end.
    run = train(
        build(rate=0.03), squares(), caught.value.update, bands=BANDS["long"], window=20, progress=False,
        **SETTINGS,
    )  # fmt: skip
    assert run.update == caught.value.update


def test_too_cold_a_sampler_stops_it_at_the_first_window_and_temperature_is_named():
    with pytest.raises(TrainingDiverged, match="raise the temperature") as caught:
        train(
            build(rate=1e-5), squares(), 100, bands=BANDS["long"], window=20, progress=False,
            **(SETTINGS | {"temperature": 1e-4}),
        )  # fmt: skip
    assert caught.value.update == 20
    assert all(finding.since == 0 for finding in caught.value.findings)
    assert "separation" in {finding.gauge for finding in caught.value.findings}


def test_chains_out_of_every_bound_say_which_step_and_update():
    run = build(born_from_noise(SHAPE), rejuvenation=1.0)
    with torch.no_grad():
        for parameter in run.energy.parameters():
            parameter.mul_(1e14)  # the energy overflows in the chain
    with pytest.raises(TrainingDiverged, match="non-finite") as caught:
        train(run, squares(), 10, bands=BANDS["long"], window=2, progress=False, **SETTINGS)
    assert caught.value.step is not None and caught.value.update == run.update


def test_without_bands_nothing_is_stopped():
    settings = SETTINGS | {"temperature": 1e-4}
    assert train(build(rate=1e-5), squares(), 40, window=20, progress=False, **settings).update == 40


def test_the_log_has_a_line_a_window(tmp_path):
    log = tmp_path / "deep" / "log.jsonl"
    run = train(build(), squares(), 25, window=10, log=log, progress=False, **SETTINGS)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["update"] for line in lines] == [10, 20]
    for line in lines:
        assert line["seconds"] >= 0 and line["seconds_left"] >= 0
        assert set(run.history) <= set(line)
        assert all(len(line[name]) == 2 for name in ("d", "rho", "separation", "diversity"))
    assert lines[1]["d"] == pytest.approx(run.gauge("d")[10:20].mean(0).tolist(), rel=1e-5)
    assert lines[1]["seconds_left"] <= lines[1]["seconds"]  # five updates to go, twenty done


def test_a_sick_state_is_not_saved(tmp_path):
    """The bands are asked before the checkpoint is written: what lies there is the last state they passed."""
    with pytest.raises(TrainingDiverged) as caught:
        train(
            build(rate=0.03), squares(), 600, bands=BANDS["long"], window=20, checkpoint=tmp_path,
            checkpoint_every=20, progress=False, **(SETTINGS | {"data_noise": 0.0}),
        )  # fmt: skip
    good = load(build(), tmp_path)
    assert good.update == caught.value.update - 20
    assert diagnose(good.history, BANDS["long"], 20) == []


# --- what a checkpoint refuses, and why (more in test_likelihood.py) -------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"run": {"hidden": (8, 8)}}, r"is of a run with energy=MLPEnergy\(2x16x16.*now MLPEnergy\(2x16x8"),
        ({"run": {"stack": None}}, r"energy=MLPEnergy.*now MLPEnergy\(16x16,"),
        ({"settings": {"temperature": 0.2}}, r"temperature=0\.1 \(now 0\.2\)"),
        ({"settings": {"data_noise": 0.1}}, r"data_noise=0\.2 \(now 0\.1\)"),
        ({"updates": 9}, r"updates=6 \(now 9\)"),
        ({"data": 100}, r"data=\[200, 1, 4, 4"),
    ],
)
def test_another_run_is_refused_by_name(change, says, tmp_path):
    options = {"checkpoint": tmp_path, "progress": False}
    train(build(), squares(), 6, **options, **SETTINGS)
    with pytest.raises(CheckpointError, match=says) as caught:
        train(
            build(**change.get("run", {})), squares()[: change.get("data", 200)], change.get("updates", 6),
            **options, **(SETTINGS | change.get("settings", {})),
        )  # fmt: skip
    assert "Remove" in str(caught.value)


@pytest.mark.parametrize(
    "harm",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-40]),
        lambda file: file.write_bytes(b""),
        lambda file: file.unlink(),
        lambda file: file.with_name("checkpoint.json").write_bytes(b"\xff\xfe"),
        lambda file: file.with_name("checkpoint.json").write_text("[]"),
        lambda file: file.with_name("checkpoint.json").write_text('{"update": 3}'),
    ],
    ids=["truncated", "empty", "gone", "not text", "not an index", "half an index"],
)
def test_damaged_files_are_refused_and_the_run_is_left_alone(harm, tmp_path):
    train(build(), squares(), 4, checkpoint=tmp_path, progress=False, **SETTINGS)
    (file,) = tmp_path.glob("*.safetensors")
    harm(file)
    run = build()
    before = [p.clone() for p in run.energy.parameters()]
    with pytest.raises(CheckpointError, match="cannot read.*Remove"):
        train(run, squares(), 4, checkpoint=tmp_path, progress=False, **SETTINGS)
    assert run.update == 0
    assert all(torch.equal(a, b) for a, b in zip(before, run.energy.parameters(), strict=True))
