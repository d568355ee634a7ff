"""The benchmark scripts at tiny sizes: what they write, what they count and what they refuse."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from companion.networks import ConvEnergy, MLPEnergy

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def script(name):
    """The script as a module: ``benchmarks`` is no package, and the scripts run only as ``__main__``."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


bench = script("langevin_step")
MAKERS = {"companion": bench.companion_sampler, "naive": bench.naive_sampler}
TINY = {
    "mlp": bench.Case(lambda rng: MLPEnergy((1, 4, 4), (16, 16), generator=rng), (1, 4, 4), 8, 3),
    "conv": bench.Case(lambda rng: ConvEnergy((1, 12, 12), 4, generator=rng), (1, 12, 12), 4, 2),
}


@pytest.mark.parametrize("name", TINY)
def test_both_samplers_make_the_update_and_a_wrong_one_is_refused(name):
    case = TINY[name]
    rng = torch.Generator().manual_seed(0)
    net, x = case.make(rng), torch.rand(case.batch, *case.shape, generator=rng)
    samplers = {key: make(net) for key, make in MAKERS.items()}
    bench.check_same_update(net, samplers, x)
    naive = samplers["naive"]

    def twice_the_noise(y, steps, generator):
        return 2 * naive(y, steps, generator) - y

    def without_the_half(y, steps, generator):
        for _ in range(steps):
            leaf = y.detach().requires_grad_(True)
            (grad,) = torch.autograd.grad(net(leaf).sum(), leaf)
            noise = torch.randn(y.shape, generator=generator)
            y = y - bench.STEP_SIZE**2 * grad / bench.TEMPERATURE + bench.STEP_SIZE * noise
        return y

    def one_step_short(y, steps, generator):
        return naive(y, steps - 1, generator)

    def in_place(y, steps, generator):
        return y.copy_(naive(y, steps, generator))

    def diverged(y, steps, generator):
        return y * float("nan")

    for wrong in (twice_the_noise, without_the_half, one_step_short, in_place, diverged):
        with pytest.raises(bench.DifferentUpdateError, match="wrong"):
            bench.check_same_update(net, {"wrong": wrong}, x)


def test_a_wrong_sampler_is_not_timed():
    makers = MAKERS | {"wrong": lambda net: lambda x, steps, rng: x.clone()}
    with pytest.raises(bench.DifferentUpdateError, match="Nothing was timed"):
        bench.time_case(TINY["mlp"], makers, 1, torch.device("cpu"), 16)


def test_multiply_adds_are_those_of_the_layers():
    """Forward and input gradient: each layer's product twice, nothing for the weights' gradients."""
    mlp = MLPEnergy((1, 4, 4), (16, 8))
    assert bench.multiply_adds(mlp, torch.zeros(5, 1, 4, 4)) == 2 * 5 * (16 * 16 + 16 * 8 + 8)
    conv = ConvEnergy((1, 8, 8), 4)
    layers = 64 * 4 * 9 + 16 * 8 * 4 * 16 + 4 * 16 * 8 * 16 + 1 * 32 * 16 * 16 + 32
    assert bench.multiply_adds(conv, torch.zeros(3, 1, 8, 8)) == 2 * 3 * layers


def test_the_script_writes_its_figures_whole(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "CASES", TINY)
    monkeypatch.setattr(bench, "CONVOLUTIONS", [(2, 4, 4, 2, 8)])
    monkeypatch.setattr(bench, "candidates", lambda require: MAKERS)
    out = tmp_path / "new" / "figures.json"
    bench.main(["--repeats", "2", "--only", *TINY, "--matmul-size", "32", "--out", str(out)])
    record = json.loads(out.read_text(encoding="utf-8"))
    assert [path.name for path in out.parent.iterdir()] == ["figures.json"]
    assert record["command"].startswith("python benchmarks/langevin_step.py --repeats 2")
    assert {"device", "threads", "versions", "step_size", "temperature"} <= set(record)
    assert list(record["cases"]) == ["mlp", "conv"]
    for name, row in record["cases"].items():
        yardsticks = {"matmul", "convolution"} if name == "conv" else {"matmul"}
        assert row["repeats"] == 2 and row["batch"] == TINY[name].batch and row["multiply_adds"] > 0
        assert set(row["microseconds"]) == {"companion", "naive"}
        assert set(row["ratio_to_companion"]) == {"naive"}
        assert set(row["machine"]) == set(row["share_of_machine"]) == yardsticks
        values = [*row["microseconds"].values(), *row["ratio_to_companion"].values()]
        for value in values + list(row["share_of_machine"].values()):
            assert 0 < value["low"] <= value["median"] <= value["high"]
    shown = capsys.readouterr().out
    assert "naive/companion" in shown and "float32 matmul 32x32" in shown and "conv 2->4" in shown


def test_a_missing_rival_is_left_out_or_an_error_as_asked(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchebm", None)  # importing it now raises ImportError
    assert list(bench.candidates()) == ["companion", "naive"]
    assert "column is left out" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="torchebm"):
        bench.main(["--require", "torchebm", "--repeats", "1"])


def test_tuning_draws_its_settings_from_the_trial_alone_and_within_the_ranges():
    """The first 16 trials from the first ranges; later ones may raise the rates' upper edges, not lower."""
    tune = script("tune_short_run")
    first = {"temperature": (1e-4, 1e-2), "step_size": (0.008, 0.05)}
    first |= {"rate": (5e-5, 1e-3), "network_rate": (3e-4, 3e-3)}
    drawn = [tune.settings(number) for number in range(60)]
    assert drawn == [tune.settings(number) for number in range(60)]
    assert len({tuple(setting.values()) for setting in drawn}) == 60
    for number, setting in enumerate(drawn):
        assert set(setting) == set(first)
        for name, (low, high) in first.items():
            factor = 10 if number >= 16 and name.endswith("rate") else 1
            assert 0.98 * low <= setting[name] <= 1.02 * high * factor  # rounded to two digits
