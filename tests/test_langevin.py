"""The samplers against closed forms. Error bars: 5 standard errors of the stated number of draws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from companion.energies import Gaussian, GaussianMixture
from companion.langevin import DivergenceError, langevin, mala
from companion.networks import ConvEnergy


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


def test_an_energy_that_is_not_one_number_a_chain_is_refused():
    with pytest.raises(ValueError, match="batch part"):
        langevin(lambda x: x.sum(0), torch.zeros(3, 2), 2, 0.1)
