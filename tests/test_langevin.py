"""The samplers against closed forms. Error bars: 5 standard errors of the stated number of draws."""

from __future__ import annotations

import gc
import math
import shutil
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from companion import _compiled
from companion._compiled import NotCompilableError
from companion.energies import Gaussian, GaussianMixture
from companion.langevin import DivergenceError, langevin, mala
from companion.networks import ConvEnergy, MLPEnergy, ResidualEnergy


def gaussian(std=1.0, dim=1):
    return Gaussian(torch.zeros(dim), torch.full((dim,), std**2))


@pytest.mark.parametrize("step_size", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_unadjusted_variance_is_the_closed_form(step_size, temperature, rng):
    """Var = s^2/(1 - eps^2/4s^2) with s^2 = T: 200,000 chains, run to stationarity from x = 0."""
    eps = step_size * math.sqrt(temperature)
    x = langevin(gaussian(), torch.zeros(200_000, 1), 80, eps, temperature=temperature, generator=rng).x
    expected = temperature / (1 - eps**2 / (4 * temperature))
    assert x.var().item() == pytest.approx(expected, rel=5 * math.sqrt(2 / 200_000))


def test_adjusted_variance_is_exact_where_the_unadjusted_is_not(rng):
    chain = mala(gaussian(), torch.zeros(100_000, 1), 150, 1.5, generator=rng)
    assert chain.x.var().item() == pytest.approx(1.0, rel=5 * math.sqrt(2 / 100_000))
    assert 0.5 < chain.gauges.acceptance.item() < 0.95


def test_mala_acceptance_is_one_as_the_step_vanishes_and_falls_with_it(rng):
    rates = []
    for eps in (0.05, 1.0, 1.9):
        x = gaussian(dim=5).sample(4000, rng)
        rates.append(mala(gaussian(dim=5), x, 20, eps, generator=rng).gauges.acceptance.item())
    assert rates[0] > 0.999 and rates[0] > rates[1] > rates[2]


def test_mala_is_exact_on_a_mixture_with_base_measure_and_temperature(rng):
    """E x^2 under exp(-E/T) N(0, tau^2) by quadrature against 20,000 chains; 5 standard errors."""
    energy = GaussianMixture(torch.tensor([[-1.0], [1.5]]), 0.7, torch.tensor([2.0, 1.0]))
    temperature, tau = 1.5, 1.2
    x = mala(energy, torch.zeros(20_000, 1), 300, 0.9, temperature=temperature, base_std=tau, generator=rng).x
    line = torch.linspace(-8, 8, 4001, dtype=torch.float64).unsqueeze(1)
    weight = torch.exp(-energy(line) / temperature - line.squeeze(1) ** 2 / (2 * tau**2))
    for power in (1, 2):
        expected = ((weight * line.squeeze(1) ** power).sum() / weight.sum()).item()
        values = x.double() ** power
        assert abs(values.mean().item() - expected) < 5 * values.std().item() / math.sqrt(20_000)


def test_base_measure_alone_confines_to_its_own_variance(rng):
    flat = lambda x: 0 * x.sum(-1)  # noqa: E731
    tau, eps = 0.6, 0.3
    x = langevin(flat, torch.zeros(100_000, 1), 120, eps, base_std=tau, generator=rng).x
    assert x.var().item() == pytest.approx(tau**2 / (1 - eps**2 / (4 * tau**2)), rel=0.025)


def test_plain_loop_gives_the_same_numbers():
    """The sampler against the update written out with autograd and the same generator."""
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    energy = lambda x: net(x.flatten(1)).squeeze(1)  # noqa: E731
    start = torch.randn(10, 2, 3)
    ours = langevin(energy, start, 25, 0.1, temperature=0.5, generator=torch.Generator().manual_seed(3)).x
    generator, x = torch.Generator().manual_seed(3), start.clone()
    for _ in range(25):
        x.requires_grad_(True)
        (grad,) = torch.autograd.grad(energy(x).sum(), x)
        noise = torch.empty_like(x).normal_(generator=generator)
        x = (x - 0.1**2 / 2 * grad / 0.5 + 0.1 * noise).detach()
    torch.testing.assert_close(ours, x)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    shape=st.lists(st.integers(1, 3), max_size=3),
    double=st.booleans(),
    adjusted=st.booleans(),
)
def test_any_shape_and_dtype(batch, shape, double, adjusted):
    dtype = torch.float64 if double else torch.float32
    x = torch.zeros(*batch, *shape, dtype=dtype)
    energy = lambda v: 0.5 * v.square().flatten(len(batch)).sum(-1) if shape else 0.5 * v.square()  # noqa: E731
    sampler = mala if adjusted else langevin
    chain = sampler(energy, x, 6, 0.3, record_every=2)
    assert chain.x.shape == x.shape and chain.x.dtype == dtype
    assert chain.path.shape == (3, *x.shape) and chain.energies.shape == (3, *batch)
    assert torch.equal(chain.path[-1], chain.x) and not x.any()  # the start is not modified
    size = math.prod(shape)
    assert chain.gauges.noise.item() == pytest.approx(0.3 * math.sqrt(size), rel=1e-5)


def test_stacked_step_sizes_and_temperatures_equal_separate_runs():
    """One value a model: each model's chains follow their own eps and T (no noise shared by accident)."""
    eps, temperature = torch.tensor([0.2, 0.6]), torch.tensor([1.0, 3.0])
    x = langevin(
        gaussian(dim=1), torch.zeros(2, 100_000, 1), 400, eps, temperature=temperature,
        generator=torch.Generator().manual_seed(1),
    ).x  # fmt: skip
    for s in range(2):
        t, e = temperature[s].item(), eps[s].item()
        assert x[s].var().item() == pytest.approx(t / (1 - e**2 / (4 * t)), rel=0.025)


def test_rho_is_eps_over_2s_at_stationarity(rng):
    """r/(eps sqrt D) = eps/2s when every direction has standard deviation s (up to the bias of ULA)."""
    eps, dim = 0.4, 50
    chain = langevin(gaussian(dim=dim), torch.zeros(2000, dim), 200, eps, generator=rng)
    assert chain.gauges.rho.item() == pytest.approx(eps / 2, rel=0.05)


def test_a_step_above_twice_the_std_diverges_and_says_where(rng):
    with pytest.raises(DivergenceError, match=r"at step \d+ .*smaller step size") as caught:
        langevin(gaussian(std=0.1), torch.ones(4, 1), 5000, 0.25, generator=rng)
    assert 10 < caught.value.step < 5000
    assert caught.value.gauges.rho is not None


def test_non_finite_energy_at_the_first_step_and_state_at_the_last():
    with pytest.raises(DivergenceError) as caught:
        langevin(lambda x: x.sum(-1) * math.nan, torch.zeros(3, 2), 5, 0.1)
    assert caught.value.step == 0
    with pytest.raises(DivergenceError, match="non-finite state"):
        langevin(lambda x: x.square().sum(-1) * 1e38, torch.ones(3, 2) * 0.5, 1, 1e3)
    with pytest.raises(DivergenceError):
        mala(lambda x: x.sum(-1) * math.nan, torch.zeros(3, 2), 5, 0.1)


def test_mala_rejects_a_proposal_of_infinite_energy(rng):
    walls = lambda x: torch.where(x.abs().sum(-1) < 1, 0 * x.sum(-1), math.inf)  # noqa: E731
    x = mala(walls, torch.zeros(5000, 1), 200, 0.7, generator=rng).x
    assert x.abs().max() < 1
    assert x.var().item() == pytest.approx(1 / 3, rel=0.06)  # uniform on [-1, 1]


def test_parameters_gradients_and_flags_are_untouched_also_on_error():
    net = ConvEnergy((1, 8, 8), width=2)
    next(net.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    langevin(net, torch.zeros(2, 1, 8, 8), 3, 0.1)
    with pytest.raises(DivergenceError):
        langevin(net, torch.full((2, 1, 8, 8), math.nan), 3, 0.1)
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.grad is None for p in net.parameters())


def test_callback_sees_every_step():
    seen = []
    langevin(gaussian(), torch.zeros(3, 1), 4, 0.1, callback=lambda k, x, e: seen.append((k, e.shape)))
    assert seen == [(k, (3,)) for k in range(4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": math.nan}, "step_size"),
        ({"steps": 0}, "steps"),
        ({"temperature": -1.0}, "temperature"),
        ({"base_std": 0.0}, "base_std"),
        ({"record_every": 0}, "record_every"),
        ({"x": torch.zeros(3, 1, dtype=torch.long)}, "floating"),
    ],
)
@pytest.mark.parametrize("sampler", [langevin, mala])
def test_arguments_out_of_range_are_named(sampler, change, message):
    arguments = {"x": torch.zeros(3, 1), "steps": 2, "step_size": 0.1} | change
    with pytest.raises(ValueError, match=message):
        sampler(gaussian(), **arguments)


@pytest.mark.parametrize("chain", [langevin, mala])
def test_states_that_are_no_tensor_or_do_not_fit_are_refused(chain):
    energy = MLPEnergy((2, 3), (4,))
    with pytest.raises(TypeError, match="from a tensor, got ndarray"):
        chain(energy, torch.zeros(5, 2, 3).numpy(), 1, 0.1)
    with pytest.raises(ValueError, match=r"states \(\*batch, 2, 3\), got \(5, 3, 2\)"):
        chain(energy, torch.zeros(5, 3, 2), 1, 0.1)
    with pytest.raises(ValueError, match=r"got \(3,\)"):
        chain(energy, torch.zeros(3), 1, 0.1)


def test_an_energy_that_is_not_one_number_a_chain_is_refused():
    with pytest.raises(ValueError, match="batch part"):
        langevin(lambda x: x.sum(0), torch.zeros(3, 2), 2, 0.1)


# The step as one call. A CUDA graph cannot be had here; ``Tape`` stands in for it.


class Autograd(nn.Module):
    """An energy without a closed form, with a number and a mode that a recording cannot see."""

    def __init__(self, extra=None, scale=1.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), *([extra] if extra else []), nn.Linear(16, 1))
        self.scale = scale

    def forward(self, x):
        return self.scale * self.net(x.flatten(1)).squeeze(1)


ENERGIES = {
    "mlp": (lambda: MLPEnergy((6,), (16, 16)), (10, 6)),
    "stacked": (lambda: MLPEnergy((2, 3), (16,), stack=2), (2, 10, 2, 3)),
    "conv": (lambda: ConvEnergy((1, 8, 8), width=2), (4, 1, 8, 8)),
    "conv, bfloat16": (lambda: ConvEnergy((1, 8, 8), 2, precision=torch.bfloat16), (4, 1, 8, 8)),
    "residual, bfloat16": (lambda: ResidualEnergy((1, 8, 8), 4, precision=torch.bfloat16), (4, 1, 8, 8)),
    "autograd": (Autograd, (10, 2, 3)),
}


def both(energy, x, steps=12, step_size=0.1, **options):
    """Plain and compiled from the same noise, and that the generators are left in the same state."""
    chains, states = [], []
    for compile in (False, options.pop("compile", True)):
        generator = torch.Generator().manual_seed(3)
        chains.append(langevin(energy, x, steps, step_size, generator=generator, compile=compile, **options))
        states.append(generator.get_state())
    assert torch.equal(*states)
    plain, ours = chains
    torch.testing.assert_close(vars(ours.gauges), vars(plain.gauges))
    for name in ("x", "path", "energies"):
        if getattr(plain, name) is not None:
            torch.testing.assert_close(getattr(ours, name), getattr(plain, name))
    return ours


@pytest.mark.parametrize("name", ENERGIES)
@pytest.mark.parametrize("way", ["graph", "compile"])
def test_the_step_as_one_call_gives_the_plain_loops_numbers(name, way, request, monkeypatch):
    request.getfixturevalue("tapes") if way == "graph" else monkeypatch.setattr(_compiled, "BACKEND", "eager")
    make, shape = ENERGIES[name]
    energy, x = make(), torch.randn(shape)
    chain = both(energy, x, temperature=0.5, base_std=2.0, record_every=3)
    assert chain.path.shape[0] == 4 and all(p.requires_grad for p in energy.parameters())
    if name == "stacked":
        both(energy, x, step_size=torch.tensor([0.1, 0.3]), temperature=torch.tensor([0.5, 2.0]))


def test_a_function_and_an_analytic_energy_compile_and_take_the_plain_loop_unasked(monkeypatch, tapes):
    net = nn.Linear(2, 1)
    for energy in (lambda x: net(x).squeeze(1).square(), GaussianMixture.ring()):
        both(energy, torch.randn(5, 2), compile=None)
        with pytest.raises(NotCompilableError, match="nn.Module"):
            langevin(energy, torch.randn(5, 2), 3, 0.1, compile=True)
    assert not tapes
    monkeypatch.undo()
    monkeypatch.setattr(_compiled, "BACKEND", "eager")
    for energy in (lambda x: net(x).squeeze(1).square(), GaussianMixture.ring()):
        both(energy, torch.zeros(5, 2))  # the mixture's gradient at 0 is nothing but rounding


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_plain_numbers_and_compiles_once_for_weights_step_sizes_and_temperatures():
    """The default back end; a second compilation would count."""
    energy, x = MLPEnergy((6,), (16,)), torch.randn(10, 6)
    before = both(energy, x).x
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():
        energy.net.layers[0].weight.mul_(3)
    after = both(energy, x, steps=7).x
    assert (after - before).abs().max() > 1e-3
    both(energy, x, step_size=0.2, temperature=3.0)
    both(MLPEnergy((6,), (16,)), x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize("every", [None, 6, 97])
def test_a_long_chain_is_replayed_in_strides_with_the_plain_loops_noise(every, tapes):
    """Up to 64 steps a replay, recorded once they pay: states, what is kept, the generator afterwards."""
    energy, x = MLPEnergy((6,), (16,)), torch.randn(10, 6)
    chain = both(energy, x, steps=5 * 97, record_every=every, compile=None)
    assert every is None or len(chain.path) == 5 * 97 // every
    (stepper,) = _compiled._recordings[energy].values()
    assert sorted(stepper.strides) == {None: [1, 64], 6: [1, 6], 97: [1]}[every] and len(tapes) <= 2
    both(energy, x, steps=20, compile=None)
    both(energy, x, steps=20, compile=None)
    both(energy, x, steps=9, record_every=3, base_std=None, compile=None)


def test_strides_draw_noise_of_the_right_distribution(tapes):
    """Var = s^2/(1 - eps^2/4s^2) at s = T = 1 for a flat start of 20,000 chains; 5 standard errors."""

    class Quadratic(nn.Module):
        def forward(self, x):
            return x.square().sum(-1) / 2

    energy = Quadratic()
    for _ in range(2):
        x = langevin(energy, torch.zeros(20_000, 1), 400, 1.0, generator=torch.Generator().manual_seed(1)).x
    assert len(tapes) == 2
    assert x.var().item() == pytest.approx(4 / 3, rel=5 * math.sqrt(2 / 20_000))


def test_one_recording_serves_a_training(tapes):
    """Weights updated in place, other step sizes, temperatures, lengths and starts: recorded once."""
    energy, x = MLPEnergy((6,), (16, 16)), torch.randn(10, 6)
    optimiser = torch.optim.Adam(energy.parameters(), 0.05)
    ends = []
    for step in range(4):
        ends.append(
            both(
                energy, x + step, steps=3 + step, step_size=0.1 + step, temperature=2.0**step, compile=None
            ).x
        )
        kept = ends[0].clone()
        optimiser.zero_grad()
        energy(x).square().sum().backward()
        optimiser.step()
    assert len(tapes) == 1 and torch.equal(kept, ends[0])  # what was returned is not overwritten
    both(energy, torch.randn(4, 6), compile=None)
    both(energy, x, base_std=1.0, compile=None)
    both(energy, x, compile=None)
    assert len(tapes) == 3  # another shape and another set of coefficients, each recorded beside the first


def test_a_recording_is_made_anew_when_python_state_or_an_address_has_changed(tapes):
    energy, x = Autograd(), torch.randn(10, 6)
    both(energy, x)
    energy.scale = 1.01  # an address does not show it; the comparison of the first step does
    both(energy, x, compile=None)
    assert len(tapes) == 2
    weight = energy.net[0].weight
    weight.data = 2 * weight.data
    both(energy, x, compile=None)
    assert len(tapes) == 3
    energy.net[2] = nn.Linear(16, 1)
    both(energy, x, compile=None)
    assert len(tapes) == 4


def test_recordings_are_few_and_die_with_their_energy(tapes):
    energy = Autograd()
    for batch in range(1, 8):
        langevin(energy, torch.randn(batch, 6), 2, 0.1)
    assert len(_compiled._recordings[energy]) == _compiled.KEPT
    gone = weakref.ref(energy)
    del energy
    gc.collect()
    assert gone() is None


class Waiting(Autograd):
    def forward(self, x):
        return super().forward(x) * (2.0 if x.sum().item() > 0 else 1.0)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Autograd(nn.Dropout(0.5)), "random numbers"),
        (lambda: Autograd(nn.BatchNorm1d(16)), "buffers"),
        (Waiting, "host waits"),
    ],
)
def test_an_energy_that_cannot_be_recorded_is_an_error_asked_and_the_plain_loop_unasked(make, reason, tapes):
    energy, x, rng = make(), torch.randn(10, 6), torch.Generator().manual_seed(1)
    state, buffers = rng.get_state(), [b.clone() for b in energy.buffers()]
    with pytest.raises(NotCompilableError, match=reason):
        langevin(energy, x, 5, 0.1, generator=rng, compile=True)
    assert torch.equal(rng.get_state(), state)
    assert all(torch.equal(b, old) for b, old in zip(energy.buffers(), buffers, strict=True))
    made = len(tapes)
    for _ in range(2):
        ends = []
        for compile in (False, None):
            torch.manual_seed(5)  # what dropout draws from
            ends.append(langevin(energy, x, 5, 0.1, generator=rng.manual_seed(2), compile=compile).x)
        assert torch.equal(*ends)
    assert len(tapes) <= made + 1  # tried once, then known


def test_half_precision_is_refused_and_what_dynamo_cannot_read_is_a_clear_error(monkeypatch):
    with pytest.raises(NotCompilableError, match="bfloat16"):
        langevin(gaussian(), torch.zeros(3, 1, dtype=torch.bfloat16), 2, 0.1, compile=True)
    monkeypatch.setattr(_compiled, "BACKEND", "eager")
    with pytest.raises(NotCompilableError, match="cannot be compiled"):
        langevin(Waiting(), torch.randn(3, 6), 2, 0.1, compile=True)


@pytest.mark.parametrize("way", ["graph", "compile"])
def test_compiled_divergence_says_where(way, request, monkeypatch):
    request.getfixturevalue("tapes") if way == "graph" else monkeypatch.setattr(_compiled, "BACKEND", "eager")
    energy, x = MLPEnergy((2,), (8,)), torch.ones(4, 2)
    energy.forward, energy.value_and_gradient = None, lambda x: (x.square().sum(-1) * 50, x * 100)
    steps = []
    for compile in (False, True):
        with pytest.raises(DivergenceError, match="non-finite energy") as caught:
            langevin(energy, x, 500, 0.25, generator=torch.Generator().manual_seed(0), compile=compile)
        steps.append(caught.value.step)
    assert 10 < steps[0] == steps[1] < 500
    for quiet in range(2):  # within a stride as well: the second call has one
        langevin(energy, x * 0, 300, 1e-12, compile=True)
        with pytest.raises(DivergenceError, match="non-finite energy") as caught:
            langevin(energy, x, 300, 0.25, generator=torch.Generator().manual_seed(0), compile=True)
        assert caught.value.step == steps[0], quiet
    with pytest.raises(DivergenceError) as caught:
        langevin(energy, x * math.nan, 5, 0.25, compile=True)
    assert caught.value.step == 0
    with pytest.raises(DivergenceError, match="non-finite state"):
        langevin(energy, x * 5e17, 1, 1e10, compile=True)


def test_a_callback_has_the_plain_loop(tapes):
    langevin(Autograd(), torch.randn(3, 6), 4, 0.1, callback=lambda k, x, e: None, compile=True)
    assert not tapes
