"""Purification against closed forms and naive autograd. Error bars: 5 standard errors of the stated draws."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from companion.energies import Gaussian
from companion.langevin import DivergenceError, langevin
from companion.networks import ConvEnergy, MLPEnergy
from companion.purify import Defended, Purifier, hessian_product
from companion.stein import GaussianBase


class SmoothConv(nn.Module):
    """A curved convolutional energy without any closed form: the generic way of differentiating."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(48, 1)

    def forward(self, x):
        return self.head(F.softplus(self.conv(x)).flatten(1)).squeeze(1)


def curved(kind):
    torch.manual_seed(0)
    mlp = MLPEnergy((1, 4, 4), (24, 24, 24), gain=2.0)
    energies = {"mlp": mlp, "conv": SmoothConv(), "plain": lambda x: (x.sin().flatten(1).sum(1)) ** 2}
    return energies[kind].double() if kind != "plain" else energies[kind]


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def naive(purifier, x, generator):
    """The chain with its whole graph, written out."""
    for _ in range(purifier.steps):
        (grad,) = torch.autograd.grad(purifier.energy(x).sum(), x, create_graph=True)
        if purifier.base_std is not None:
            grad = grad + purifier.temperature * x / purifier.base_std**2
        noise = torch.empty_like(x).normal_(generator=generator)
        x = x - purifier.step_size**2 / 2 * grad / purifier.temperature + purifier.step_size * noise
    return x


@pytest.mark.parametrize("base_std", [None, 0.8])
def test_gaussian_mean_and_variance_after_k_steps(base_std, rng):
    """With E = |x|^2/2s^2: mean a^K x, variance eps^2 (1 - a^2K)/(1 - a^2); 200,000 draws."""
    std, temperature, eps, steps, draws = 0.5, 2.0, 0.3, 7, 200_000
    purifier = Purifier(Gaussian(torch.zeros(1), torch.tensor([std**2])), steps, eps, temperature, base_std)
    curve = 1 / (temperature * std**2) + (0 if base_std is None else 1 / base_std**2)
    a = 1 - eps**2 / 2 * curve
    out = purifier(torch.full((draws, 1), 0.7), rng)
    variance = eps**2 * (1 - a ** (2 * steps)) / (1 - a**2)
    assert out.mean().item() == pytest.approx(a**steps * 0.7, abs=5 * math.sqrt(variance / draws))
    assert out.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / draws))


@pytest.mark.parametrize("segments", [1, 2, 5, 10])
def test_gaussian_jacobian_is_known(segments, rng):
    """The derivative of S_K is a^K; BPDA says 1."""
    variances = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    purifier = Purifier(Gaussian(torch.zeros(3), variances), 10, 0.3, temperature=0.5)
    x, v = torch.randn(2, 4, 3, dtype=torch.float64, generator=rng)
    x.requires_grad_(True)
    (full,) = torch.autograd.grad(purifier.differentiable(x, rng, segments=segments), x, v)
    a = 1 - 0.3**2 / 2 / (0.5 * variances)
    torch.testing.assert_close(full, a**10 * v, rtol=1e-12, atol=1e-12)
    (identity,) = torch.autograd.grad(purifier.straight_through(x, rng), x, v)
    assert torch.equal(identity, v)


@pytest.mark.parametrize("kind", ["mlp", "conv", "plain"])
@pytest.mark.parametrize("base_std", [None, 1.5])
def test_the_sweep_is_naive_autograd_for_every_number_of_segments(kind, base_std):
    temperature = 0.2 if kind == "plain" else 0.02  # curved, but not chaotic: that would magnify rounding
    purifier = Purifier(curved(kind), 9, 0.2, temperature, base_std)
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    slow = naive(purifier, x, seeded())
    (expected,) = torch.autograd.grad(slow, x, v)
    assert (expected - v).abs().max() > 0.05  # the chain is curved enough to tell the two gradients apart
    for segments in (None, *range(1, 10)):
        source = seeded()
        fast = purifier.differentiable(x, source, segments=segments)
        (grad,) = torch.autograd.grad(fast, x, v)
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(steps=st.integers(1, 8), data=st.data(), passed=st.booleans())
def test_every_way_gives_the_numbers_of_the_plain_chain(steps, data, passed):
    """Bit for bit, also from torch's own generator, which is left in the same state by all of them."""
    segments = data.draw(st.integers(1, steps))
    energy = MLPEnergy((1, 4, 4), (8, 8), generator=seeded(1))
    purifier = Purifier(energy, steps, 0.1, temperature=0.1)
    x = torch.randn(5, 1, 4, 4, generator=seeded(2)).requires_grad_(True)
    ways = [
        lambda g: langevin(energy, x, steps, 0.1, temperature=0.1, generator=g).x,
        lambda g: purifier(x, g),
        lambda g: purifier.straight_through(x, g),
        lambda g: purifier.differentiable(x, g, segments=segments),
    ]
    results, after, slopes = [], [], []
    for way in ways:
        generator = seeded(7) if passed else None
        torch.manual_seed(7)
        results.append(way(generator).detach())
        after.append(torch.empty(2).normal_(generator=generator))
    for result, state in zip(results[1:], after[1:], strict=True):
        assert torch.equal(result, results[0]) and torch.equal(state, after[0])
    for pieces in (1, segments):
        torch.manual_seed(7)
        out = purifier.differentiable(x, seeded(7) if passed else None, segments=pieces)
        slopes.append(torch.autograd.grad(out.sum(), x)[0])  # torch's own generator has moved on by now
    torch.testing.assert_close(*slopes)


def test_the_way_back_survives_a_change_of_the_images_and_draws_nothing():
    purifier = Purifier(curved("mlp"), 6, 0.2, temperature=0.1)
    leaf = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    grads = []
    for change in (False, True):
        source, x = seeded(), leaf * 1
        out = purifier.differentiable(x, source, segments=3)
        if change:
            x.data.zero_()
        state = source.get_state()
        grads.append(torch.autograd.grad(out.square().sum(), leaf)[0])
        assert torch.equal(source.get_state(), state)
    assert torch.equal(*grads)


def test_hessian_products_agree_along_every_way(rng):
    """Closed-form tangent, autograd twice, and the Hessian itself."""
    net = MLPEnergy((6,), (16, 16), generator=rng).double()
    base = GaussianBase(net, torch.zeros(6), torch.ones(6)).double()
    x, v = torch.randn(2, 4, 6, dtype=torch.float64, generator=rng)
    for energy in (net, base):
        ours, generic = hessian_product(energy, x, v), hessian_product(lambda z: energy(z), x, v)  # noqa: B023
        torch.testing.assert_close(ours, generic, rtol=1e-12, atol=1e-12)
        for i in range(4):
            hessian = torch.autograd.functional.hessian(lambda z: energy(z.unsqueeze(0)).squeeze(0), x[i])  # noqa: B023
            torch.testing.assert_close(ours[i], hessian @ v[i], rtol=1e-12, atol=1e-12)


def test_a_piecewise_linear_energy_has_no_curvature_so_that_full_is_bpda(rng):
    energies = [
        MLPEnergy((1, 8, 8), (16, 16), activation=nn.ReLU, generator=rng),
        ConvEnergy((1, 8, 8), width=4, generator=rng),
        lambda x: x.flatten(1).sum(1),
    ]
    for energy in energies:
        x = torch.randn(3, 1, 8, 8, generator=rng, requires_grad=True)
        v = torch.randn(3, 1, 8, 8, generator=rng)
        out = Purifier(energy, 4, 0.1).differentiable(x, rng)
        assert torch.equal(torch.autograd.grad(out, x, v)[0], v)


def test_noise_only_is_the_law_of_k_noise_steps(rng):
    """One draw of sd eps sqrt(K) against K steps of a flat energy; 100,000 draws each."""
    eps, steps, draws = 0.2, 9, 100_000
    control = Purifier(lambda x: x.square().sum(-1), steps, eps, 0.1, base_std=2.0).noise_only()
    assert control.energy is None and (control.steps, control.step_size) == (steps, eps)
    x = torch.full((draws, 1), 0.3)
    flat = Purifier(lambda x: 0 * x.sum(-1), steps, eps)
    for out in (control(x, rng), flat(x, rng)):
        assert out.mean().item() == pytest.approx(0.3, abs=5 * eps * math.sqrt(steps / draws))
        assert out.var().item() == pytest.approx(steps * eps**2, rel=5 * math.sqrt(2 / draws))
    x.requires_grad_(True)
    same = control.differentiable(x, seeded())
    assert torch.equal(same, control(x, seeded())) and not control(x, seeded()).requires_grad
    assert torch.equal(torch.autograd.grad(same.sum(), x)[0], torch.ones_like(x))


def test_images_and_parameters_are_left_alone(rng):
    energy = MLPEnergy((1, 4, 4), (8, 8), generator=rng)
    x = torch.randn(3, 1, 4, 4, generator=rng, requires_grad=True)
    before = x.detach().clone()
    purifier = Purifier(energy, 5, 0.1)
    assert not purifier(x, rng).requires_grad
    purifier.differentiable(x, rng, segments=2).sum().backward()
    assert torch.equal(x, before) and x.grad is not None
    assert all(p.requires_grad and p.grad is None for p in energy.parameters())


def test_without_a_wanted_gradient_nothing_is_kept(rng):
    purifier = Purifier(MLPEnergy((1, 4, 4), (8, 8), generator=rng), 5, 0.1)
    x = torch.randn(2, 1, 4, 4, requires_grad=True)
    with torch.no_grad():
        assert purifier.differentiable(x, rng).grad_fn is None
    assert purifier.differentiable(x.detach(), rng).grad_fn is None


# A classifier behind the purifier


def linear(dim=4, classes=3):
    torch.manual_seed(1)
    return nn.Linear(dim, classes).eval()


def test_defended_averages_logits_over_replicas_of_one_batch():
    classifier, purifier = linear(), Purifier(Gaussian(torch.zeros(4), torch.ones(4)), 3, 0.5)
    x = torch.randn(5, 4)
    defended = Defended(classifier, purifier, replicas=6)
    logits = defended(x, seeded())
    purified = purifier(x.repeat(6, 1), seeded())  # replica by replica
    expected = torch.stack([classifier(part) for part in purified.split(5)]).mean(0)
    torch.testing.assert_close(logits, expected.detach())
    assert torch.equal(defended.predict(x, seeded()), logits.argmax(1)) and not logits.requires_grad
    labels = logits.argmax(1)
    labels[0] = (labels[0] + 1) % 3
    assert defended.accuracy(x, labels, seeded()) == pytest.approx(0.8)
    assert defended(x, seeded(), replicas=2).shape == (5, 3)


def test_defended_logits_have_the_mean_and_spread_that_are_known(rng):
    """Linear classifier, noise of sd s: logits W x + b with variance s^2 |w|^2 / R; 20,000 images alike."""
    classifier, eps, steps, replicas = linear(), 0.3, 4, 5
    x = torch.randn(1, 4).expand(20_000, 4)
    logits = Defended(classifier, Purifier(None, steps, eps), replicas)(x, rng)
    variance = eps**2 * steps * classifier.weight.square().sum(1) / replicas
    gap = (logits.mean(0) - classifier(x[:1])[0]).abs() / (variance / 20_000).sqrt()
    assert gap.max() < 5
    torch.testing.assert_close(logits.var(0), variance.detach(), rtol=5 * math.sqrt(2 / 20_000), atol=0)


@pytest.mark.parametrize("max_batch", [1, 7, 1000])
def test_max_batch_limits_the_states_at_once(max_batch):
    seen = []

    def classifier(z):
        seen.append(len(z))
        return z

    noiseless = Purifier(lambda z: 0 * z.sum(-1), 1, 1e-12)
    x = torch.randn(5, 3)
    out = Defended(classifier, noiseless, 4, max_batch)(x, seeded())
    torch.testing.assert_close(out, x)
    assert max(seen) <= max_batch and sum(seen) == 20


@pytest.mark.parametrize("gradient", ["bpda", "full"])
def test_attack_gradients_are_those_of_the_paper(gradient):
    """g = sum over r of the gradient in x_r of CE(mean of C(x_s)), taken back by I or by the Jacobian."""
    torch.manual_seed(0)
    energy, classifier = curved("mlp"), nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double().eval()
    purifier, y = Purifier(energy, 5, 0.2, temperature=0.1), torch.tensor([0, 2, 1])
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(Defended(classifier, purifier, 4)(x, seeded(), gradient=gradient), y)
    (ours,) = torch.autograd.grad(loss, x)
    start = x.detach().repeat(4, 1, 1, 1).requires_grad_(True)
    chain = naive(purifier, start, seeded())
    purified = chain.detach().requires_grad_(True)
    mean = classifier(purified).unflatten(0, (4, 3)).mean(0)
    (slope,) = torch.autograd.grad(F.cross_entropy(mean, y), purified)
    if gradient == "full":
        (slope,) = torch.autograd.grad(chain, start, slope)
    torch.testing.assert_close(ours, slope.unflatten(0, (4, 3)).sum(0), rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in classifier.parameters())


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": math.nan}, "step_size"),
        ({"temperature": -1.0}, "temperature"),
        ({"base_std": 0.0}, "base_std"),
        ({"energy": None, "base_std": 1.0}, "base measure"),
    ],
)
def test_purifier_arguments_out_of_range_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Purifier(**({"energy": lambda x: x.sum(-1), "steps": 2, "step_size": 0.1} | change))


def test_images_that_cannot_be_purified_are_refused():
    purifier = Purifier(None, 2, 0.1)
    with pytest.raises(ValueError, match="floating"):
        purifier(torch.zeros(2, 3, dtype=torch.long))
    for way in (purifier, Purifier(lambda x: x.sum(-1), 2, 0.1).differentiable):
        with pytest.raises(ValueError, match="finite"):
            way(torch.full((2, 3), math.nan, requires_grad=True))
    for segments in (0, 3):
        with pytest.raises(ValueError, match="segments must be between 1 and 2"):
            purifier.differentiable(torch.zeros(1, 3), segments=segments)


def test_a_chain_or_a_gradient_that_explodes_says_so(rng):
    steep = Purifier(Gaussian(torch.zeros(1), torch.tensor([0.01])), 5000, 0.25)
    x = torch.ones(4, 1, requires_grad=True)
    for way in (steep, steep.straight_through, steep.differentiable):
        with pytest.raises(DivergenceError, match="smaller step size"):
            way(x, rng)
    # States stay finite, but neighbours are driven apart by a factor 1.5 a step.
    saddle = Purifier(lambda z: -0.5 * z.square().sum(-1), 60, 1.0)
    out = saddle.differentiable(torch.zeros(2, 1, requires_grad=True), rng)
    assert torch.isfinite(out).all()
    with pytest.raises(FloatingPointError, match="60 Langevin steps"):
        out.backward(torch.full_like(out, 1e30))


def test_defended_arguments_out_of_range_are_named():
    purifier, x = Purifier(None, 1, 0.1), torch.zeros(2, 4)
    for change in ({"replicas": 0}, {"max_batch": 0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            Defended(linear(), purifier, **change)
    defended = Defended(linear(), purifier)
    with pytest.raises(ValueError, match="replicas"):
        defended(x, replicas=0)
    with pytest.raises(ValueError, match="'bpda' or 'full'"):
        defended(x, gradient="half")
    with pytest.raises(ValueError, match="labels"):
        defended.accuracy(x, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="classes"):
        Defended(lambda z: z.sum(-1), purifier)(x)
    with pytest.raises(FloatingPointError, match="not finite"):
        Defended(lambda z: z / 0, purifier)(x)
