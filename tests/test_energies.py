"""Analytic energies against quadrature, autograd and their own samplers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from companion import energies
from companion.energies import Banana, DoubleWell, Gaussian, GaussianMixture, Rings
from companion.langevin import langevin
from companion.networks import ConvEnergy, MLPEnergy, ResidualEnergy

PLANE = {
    "gaussian": Gaussian(torch.tensor([0.5, -1.0]), torch.tensor([[1.5, 0.6], [0.6, 0.8]])),
    "ring": GaussianMixture.ring(),
    "grid": GaussianMixture.grid(side=3, spacing=1.5, std=0.2),
    "weighted": GaussianMixture(torch.tensor([[-1.0, 0.0], [2.0, 1.0]]), 0.4, torch.tensor([1.0, 3.0])),
    "double well": DoubleWell(),
    "banana": Banana(width=1.0),  # narrow enough that the square of the quadrature holds its tails
    "rings": Rings(),
}


@pytest.mark.parametrize("name", PLANE)
def test_density_integrates_to_one(name):
    energy = PLANE[name]
    line = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    mass = energy.log_density(points).exp().sum() * (line[1] - line[0]) ** 2
    assert mass.item() == pytest.approx(1.0, abs=2e-4)


@pytest.mark.parametrize("name", PLANE)
def test_sampler_agrees_with_density(name, rng):
    """Mean energy of exact samples against its quadrature: 5 standard errors of 40,000 samples."""
    energy = PLANE[name]
    x = energy.sample(40_000, rng)
    assert x.shape == (40_000, 2)
    line = torch.linspace(-8, 8, 1201, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    weight = energy.log_density(points).exp() * (line[1] - line[0]) ** 2
    for statistic in (energy, lambda v: v[..., 0], lambda v: v[..., 1] ** 2):
        expected = (weight * statistic(points)).sum().item()
        values = statistic(x).double()
        assert abs(values.mean().item() - expected) < 5 * values.std().item() / 200 + 1e-4


@pytest.mark.parametrize("name", PLANE)
def test_score_is_the_gradient_of_log_density(name, rng):
    energy = PLANE[name]
    x = torch.randn(20, 2, generator=rng, dtype=torch.float64)
    step = 1e-5
    for axis in range(2):
        shift = torch.zeros(2, dtype=torch.float64)
        shift[axis] = step
        numeric = (energy.log_density(x + shift) - energy.log_density(x - shift)) / (2 * step)
        torch.testing.assert_close(energies.score(energy, x)[:, axis], numeric, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(energies.score(energy, x, temperature=2.0) * 2, energies.score(energy, x))


def test_gaussian_against_torch_distributions(rng):
    covariance = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, -0.2], [0.0, -0.2, 0.5]])
    energy = Gaussian(torch.zeros(3), covariance)
    x = torch.randn(50, 3, generator=rng)
    reference = torch.distributions.MultivariateNormal(torch.zeros(3), covariance)
    torch.testing.assert_close(energy.log_density(x), reference.log_prob(x), rtol=1e-4, atol=1e-5)
    assert torch.cov(energy.sample(100_000, rng).T) == pytest.approx(covariance, abs=0.05)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="positive definite"):
        Gaussian(torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ValueError, match="symmetric"):
        Gaussian(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"R\^2"):
        Banana()(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="positive numbers"):
        GaussianMixture(torch.zeros(2, 2), 0.1, torch.tensor([1.0, -1.0]))


def test_frozen_restores_each_parameter_also_on_error():
    net = nn.Linear(3, 1)
    net.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="boom"), energies.frozen(lambda x: net(x).squeeze(-1)):
        assert not net.weight.requires_grad
        raise RuntimeError("boom")
    assert net.weight.requires_grad and not net.bias.requires_grad
    with energies.frozen(net.forward):
        assert not net.weight.requires_grad


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    batch=st.integers(1, 5),
    stack=st.none() | st.integers(1, 3),
    smooth=st.booleans(),
)
def test_mlp_gradient_by_hand_is_autograds(shape, batch, stack, smooth):
    activation = nn.SiLU if smooth else nn.ReLU
    energy = MLPEnergy(tuple(shape), (7, 5), stack=stack, activation=activation).double()
    lead = (batch,) if stack is None else (stack, batch)
    x = torch.randn(*lead, *shape, dtype=torch.float64)
    value, grad = energies.energy_and_gradient(energy, x)
    plain_value, plain_grad = energies.energy_and_gradient(lambda y: energy(y), x)
    assert value.shape == lead and grad.shape == x.shape
    torch.testing.assert_close(value, plain_value)
    torch.testing.assert_close(grad, plain_grad)


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    shape=st.tuples(st.integers(1, 3), st.integers(8, 13), st.integers(8, 13)),
    channels_last=st.booleans(),
)
def test_conv_gradient_by_hand_is_autograds(batch, shape, channels_last):
    """Also where a stride leaves rows over (28 -> 14 -> 7 -> 3); in float64, where no kink is crossed."""
    energy = ConvEnergy(shape, width=2).double()
    x = torch.randn(batch, *shape, dtype=torch.float64)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    before = x.clone()
    value, grad = energies.energy_and_gradient(energy, x)
    plain_value, plain_grad = energies.energy_and_gradient(lambda y: energy(y), x)
    assert torch.equal(x, before) and value.shape == (batch,)
    torch.testing.assert_close(value, plain_value)
    torch.testing.assert_close(grad, plain_grad)


@pytest.mark.parametrize("make", [ConvEnergy, ResidualEnergy])
def test_bfloat16_convolutions_give_the_energy_to_a_per_cent(make, rng):
    """Weights, states, sum and gradient stay in float32, and a weight's change is seen at once."""
    exact, rough = (
        make((3, 16, 16), 16, torch.Generator().manual_seed(0), precision)
        for precision in (None, torch.bfloat16)
    )
    x = torch.rand(64, 3, 16, 16, generator=rng) * 2 - 1
    (value, grad), (near, near_grad) = (energies.energy_and_gradient(net, x) for net in (exact, rough))
    assert near.dtype == near_grad.dtype == rough.head.weight.dtype == torch.float32
    assert (near - value).abs().max() < 0.02 * value.std() + 0.01 * value.abs().max()
    # Rounding puts some states on the other side of a ReLU's kink, which turns a gradient a little.
    along = torch.nn.functional.cosine_similarity(near_grad.flatten(1), grad.flatten(1))
    assert along.min() > 0.95 and along.mean() > 0.99
    assert (near_grad.norm() / grad.norm() - 1).abs() < 0.01
    plain_grad = energies.energy_and_gradient(lambda y: rough(y), x)[1]  # autograd's, in the same type
    assert torch.nn.functional.cosine_similarity(near_grad.flatten(), plain_grad.flatten(), 0) > 0.999
    rough(x).mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in rough.parameters())
    with torch.no_grad():
        for p in rough.parameters():
            p.mul_(0.9)
    assert (energies.energy_and_gradient(rough, x)[0] - near).abs().max() > 0.05 * near.abs().max()


def test_bfloat16_chains_walk_where_float32_chains_walk(rng):
    exact, rough = (
        ConvEnergy((1, 8, 8), 8, torch.Generator().manual_seed(0), precision)
        for precision in (None, torch.bfloat16)
    )
    x = torch.rand(100, 1, 8, 8, generator=rng) * 2 - 1
    ends = [
        langevin(net, x, 50, 0.05, temperature=0.1, generator=torch.Generator().manual_seed(1)).x
        for net in (exact, rough)
    ]
    drift, off = ends[0] - x, ends[1] - ends[0]
    assert off.norm() < 0.03 * drift.norm()  # the same noise: what is left is rounding
    assert abs(exact(ends[0]).mean() - exact(ends[1]).mean()) < 0.05 * exact(ends[0]).std()


def test_stacked_models_are_independent(rng):
    """Model s of a stack is the single model with its weights; its gradient sees no other model."""
    stacked = MLPEnergy((4,), (6, 5), stack=3, generator=rng)
    x = torch.randn(3, 9, 4, generator=rng)
    for s in range(3):
        single = MLPEnergy((4,), (6, 5))
        with torch.no_grad():
            for ours, theirs in zip(single.parameters(), stacked.parameters(), strict=True):
                ours.copy_(theirs[s])
        torch.testing.assert_close(stacked(x)[s], single(x[s]))
        member = stacked.member(s)
        torch.testing.assert_close(member(x[s]), single(x[s]))
        torch.testing.assert_close(energies.gradient(member, x[s]), energies.gradient(stacked, x)[s])
        assert member.stack is None and all(p.requires_grad for p in member.parameters())
    with torch.no_grad():
        member.net.layers[0].weight.zero_()  # a copy: the stack does not follow
    assert stacked.net.layers[0].weight[2].abs().sum() > 0
    with pytest.raises(ValueError, match="not stacked"):
        member.member(0)
    other = x.clone()
    other[1:] += 1
    torch.testing.assert_close(energies.gradient(stacked, x)[0], energies.gradient(stacked, other)[0])


def test_log_normaliser_of_the_grid_is_that_of_one_gaussian():
    assert GaussianMixture.grid().log_normaliser == pytest.approx(math.log(2 * math.pi * 0.05**2))
