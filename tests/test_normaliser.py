"""log Z against closed forms, enumeration, quadrature and second implementations; seeds are the fixture's."""

from __future__ import annotations

import math

import pytest
import torch

from companion import metrics
from companion._bridge import bennett, log_mean_exp, relative_error
from companion.energies import Gaussian, GaussianBernoulliRBM, GaussianMixture, energy_and_gradient
from companion.langevin import DivergenceError
from companion.networks import MLPEnergy
from companion.normaliser import Ladder, ais, bridge, bridge_from_ais, log_likelihood, plan_ladder


def rotated_gaussian(dim, narrow, rng):
    """A Gaussian with standard deviations from ``narrow`` to 1 along random axes."""
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=rng).double()).Q
    covariance = axes @ torch.diag(torch.linspace(narrow, 1, dim).double().square()) @ axes.T
    return Gaussian(torch.linspace(-0.5, 0.5, dim), (covariance + covariance.T) / 2)


def two_modes():
    return GaussianMixture(torch.tensor([[-1.0, 0.0], [1.5, 0.5]]), 0.5, torch.tensor([2.0, 1.0]))


def within(estimate, truth, bars=3.0):
    return bool(((estimate.value - truth).abs() < bars * estimate.error).all())


@pytest.mark.parametrize("case", ["correlated", "two modes", "64 dimensions"])
def test_forward_reverse_and_their_bridge_find_a_known_normaliser(case, rng):
    energy, rungs, widest = {
        "correlated": lambda: (
            Gaussian(torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 0.6], [0.6, 0.5]])), 200, 0.05),
        "two modes": lambda: (two_modes(), 200, 0.05),
        "64 dimensions": lambda: (rotated_gaussian(64, 0.2, rng), 600, 0.1),
    }[case]()  # fmt: skip
    shape, truth = (energy.dim,), energy.log_normaliser
    ladder = plan_ladder(energy, shape, rungs, start_std=1.5, generator=rng)
    up = ais(energy, shape, ladder, start_std=1.5, chains=200, generator=rng)
    start = energy.sample(200, rng)
    down = ais(energy, shape, ladder, start_std=1.5, direction="reverse", start=start, generator=rng)
    both = bridge_from_ais(up, down)
    assert within(up, truth) and within(down, truth) and within(both, truth)
    assert both.error < widest and both.error < up.error
    assert up.acceptance.shape == (rungs - 1,) and 0.52 < up.acceptance.mean() < 0.65
    assert up.x.shape == (200, energy.dim) and both.ess > 50


def test_a_start_with_mean_and_spread_of_its_own(rng):
    """Started from the target's own mean and standard deviations, only the correlation is left to weigh."""
    energy = Gaussian(torch.tensor([3.0, -2.0]), torch.tensor([[1.0, 0.3], [0.3, 0.25]]))
    own = {"start_mean": energy.mean, "start_std": energy.covariance.diagonal().sqrt()}
    near = ais(energy, (2,), 30, generator=rng, **own)
    far = ais(energy, (2,), 30, start_std=1.0, generator=rng)
    assert within(near, energy.log_normaliser) and near.error < 0.5 * far.error


def test_temperature_and_base_measure_in_closed_form(rng):
    """exp(-|x|^2/2s^2 T - |x|^2/2 tau^2) in 5-D; the base as start, and a start of its own."""
    std, temperature, tau = 0.8, 0.3, 1.2
    energy = Gaussian(torch.zeros(5), torch.full((5,), std**2))
    truth = -2.5 * math.log((1 / (std**2 * temperature) + 1 / tau**2) / (2 * math.pi))
    target = {"temperature": temperature, "base_std": tau}
    for start in ({}, {"start_std": 0.7}):
        assert within(ais(energy, (5,), 60, generator=rng, **target, **start), truth)
    x = torch.randn(400, 5, generator=rng) * math.sqrt(1 / (1 / (std**2 * temperature) + 1 / tau**2))
    assert within(bridge(energy, x, generator=rng, **target), truth)
    assert log_likelihood(energy, torch.zeros(2, 5), truth, **target).value.item() == pytest.approx(-truth)


@pytest.mark.parametrize("tau", [None, 1.5])
def test_restricted_boltzmann_machines_by_enumeration(tau, rng):
    """Stacked: Z is the sum over h of (2 pi / a)^{d/2} exp(|b + Bh/2|^2 / 2a + c^T h), a = 1 + 1/tau^2."""
    models, d, m = 2, 6, 4
    rbm = GaussianBernoulliRBM.random(d, m, (models,), rng)
    a = 1.0 if tau is None else 1 + 1 / tau**2
    h = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * m)  # (2^m, m)
    centre = rbm.visible.unsqueeze(1) + h @ (rbm.weight.mT / 2)  # (S, 2^m, d)
    log_terms = centre.square().sum(-1) / (2 * a) + (h @ rbm.hidden.unsqueeze(-1)).squeeze(-1)
    truth = torch.logsumexp(log_terms.double(), -1) + d / 2 * math.log(2 * math.pi / a)
    estimate = ais(rbm, (d,), 400, base_std=tau, start_std=2.0, stack=models, generator=rng)
    assert estimate.value.shape == (models,) and within(estimate, truth) and (estimate.error < 0.3).all()
    if tau is None:
        found = bridge(rbm, rbm.sample(1000, rng, sweeps=300), generator=rng)
        assert found.value.shape == (models,) and within(found, truth)


def test_stacked_networks_against_quadrature(rng):
    """Temperatures differ by model; 200 chains, 100 rungs, the base measure as start."""
    net = MLPEnergy((2,), (32, 32), stack=2, gain=3.0, generator=rng)
    temperature, tau = torch.tensor([0.2, 0.5]), 1.0

    def potential(x):
        return net(x) / temperature.unsqueeze(-1) + x.square().sum(-1) / (2 * tau**2)

    truth = metrics.grid_log_normaliser(potential, 12.0, 300, stack=2)
    target = {"temperature": temperature, "base_std": tau}
    estimate = ais(net, (2,), 100, chains=200, stack=2, generator=rng, **target)
    assert within(estimate, truth) and (estimate.error < 0.1).all()
    likelihood = log_likelihood(net, torch.zeros(2, 3, 2), truth, **target)
    assert torch.allclose(likelihood.each, (-potential(torch.zeros(2, 3, 2)) - truth[:, None]).double())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_weights_are_unbiased_and_their_logs_bracket_the_truth(rng):
    """20,000 chains on 10 rungs: mean w / Z = 1 within 5 standard errors; E log w below log Z, and above."""
    energy, ladder = two_modes(), Ladder.even(10, lambda b: 1.5 - b)
    up = ais(energy, (2,), ladder, start_std=1.5, chains=20_000, transitions=2, generator=rng)
    start = energy.sample(20_000, rng)
    down = ais(
        energy, (2,), ladder, start_std=1.5, transitions=2, direction="reverse", start=start, generator=rng
    )
    w = (up.log_weights - energy.log_normaliser).exp()
    assert abs(w.mean() - 1) < 5 * w.std() / math.sqrt(20_000)
    assert (1 / (down.log_weights - energy.log_normaliser).exp()).mean().item() == pytest.approx(1, abs=0.1)
    for run, sign in ((up, -1), (down, 1)):
        excess = sign * (run.log_weights - energy.log_normaliser)
        assert excess.mean() > 5 * excess.std() / math.sqrt(20_000)


def test_error_bars_cover_the_truth(rng):
    """300 repeats of 50 chains a side on 20 rungs: two of them hold it in 91 % or more."""
    energy, repeats = two_modes(), 300
    truth = energy.log_normaliser
    ladder = plan_ladder(energy, (2,), 20, start_std=2.0, generator=rng)
    up = ais(energy, (2,), ladder, start_std=2.0, chains=50 * repeats, generator=rng)
    start = energy.sample(50 * repeats, rng)
    down = ais(energy, (2,), ladder, start_std=2.0, direction="reverse", start=start, generator=rng)
    a, b = up.log_weights.reshape(repeats, 50), down.log_weights.reshape(repeats, 50)
    both = bennett(a, b, None)
    bridged = bridge(energy, energy.sample(100 * repeats, rng).reshape(repeats, 100, 2), generator=rng)
    pairs = [
        (log_mean_exp(a), relative_error(a)[0]),
        (both.value, both.error),
        (bridged.value, bridged.error),
    ]
    for value, error in pairs:
        assert ((value - truth).abs() <= 2 * error).double().mean() >= 0.91
        assert error.mean() < 1.3 * (value - truth).square().mean().sqrt()  # nor are they bought by width
    assert both.error.mean() < 0.8 * pairs[0][1].mean()


def test_the_bar_sees_a_tail_that_the_weights_have_not_met(rng):
    """Log-normal weights, 1,000 times 100: the delta method alone covers 80 % at s = 2, 30 % at s = 4."""
    for s in (0.5, 1.0, 2.0, 4.0):
        log_w = s * torch.randn(1000, 100, generator=rng).double()
        error, ess = relative_error(log_w)
        assert ((log_mean_exp(log_w) - s**2 / 2).abs() <= 2 * error).double().mean() > 0.9
    assert ess.median() < 5  # and this is the flag
    # Chains left behind are no tail: half of the weights being nothing costs a factor sqrt(1/n), not nats.
    left = 0.1 * torch.randn(1000, 100, generator=rng).double() - 50 * (torch.arange(100) < 50)
    assert relative_error(left)[0].max() < 0.15
    error, ess = relative_error(torch.full((10,), -700.0).double())
    assert error == pytest.approx(0, abs=1e-6) and ess == pytest.approx(10)


def test_plain_loop_gives_the_same_numbers():
    """Neal's algorithm written out, one MALA step a rung, from the same generator."""
    energy, tau, temperature, eps, rungs = two_modes(), 1.5, 0.7, 0.6, 8
    ours = ais(
        energy, (2,), Ladder.even(rungs, eps), chains=20, temperature=temperature, base_std=tau,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip

    def potential(x, b):
        value, grad = energy_and_gradient(energy, x)
        return b * value / temperature + x.square().sum(-1) / (
            2 * tau**2
        ), b * grad / temperature + x / tau**2

    rng = torch.Generator().manual_seed(5)
    x, log_w = tau * torch.randn(20, 2, generator=rng), torch.zeros(20)
    for k in range(1, rungs + 1):
        log_w = log_w - energy(x) / temperature / rungs
        if k == rungs:
            break
        u, g = potential(x, k / rungs)
        z = torch.randn(20, 2, generator=rng)
        y = x - eps**2 / 2 * g + eps * z
        v, h = potential(y, k / rungs)
        back = ((x - y + eps**2 / 2 * h) / eps).square().sum(-1)
        accept = torch.rand(20, generator=rng).log() < u - v + (z.square().sum(-1) - back) / 2
        x = torch.where(accept[:, None], y, x)
    torch.testing.assert_close(ours.log_weights.float(), log_w + math.log(2 * math.pi * tau**2))
    torch.testing.assert_close(ours.x, x)


def test_a_stack_is_its_models_side_by_side():
    """One of one equals the plain run bit for bit; beside another neighbour, a model's numbers stay."""
    ladder = Ladder.even(12, 0.4)
    draw = lambda: torch.Generator().manual_seed(2)  # noqa: E731
    rbm = GaussianBernoulliRBM.random(3, 2, (3,), draw())

    def run(energy, stack, steps=ladder):
        return ais(energy, (3,), steps, chains=7, base_std=1.3, stack=stack, generator=draw())

    alone = GaussianBernoulliRBM(rbm.weight[0], rbm.visible[0], rbm.hidden[0])
    plain, one = run(alone, None), run(rbm[torch.tensor([0])], 1)
    assert torch.equal(one.value[0], plain.value) and torch.equal(one.log_weights[0], plain.log_weights)
    assert plain.value.shape == () and one.acceptance.shape == (11, 1)
    left, right = run(rbm[torch.tensor([0, 1])], 2), run(rbm[torch.tensor([0, 2])], 2)
    assert torch.equal(left.log_weights[0], right.log_weights[0])
    assert not torch.equal(left.log_weights[1], right.log_weights[1])
    own = Ladder(ladder.betas, torch.stack([ladder.step_size, 2 * ladder.step_size], 1))
    torch.testing.assert_close(run(rbm[torch.tensor([0, 1])], 2, own).log_weights[0], left.log_weights[0])
    with pytest.raises(ValueError, match="2 stacked models"):
        run(alone, None, own)


def test_randomness_is_the_generators_alone():
    runs = []
    for seed, ambient in ((1, 0), (1, 7), (2, 0)):
        torch.manual_seed(ambient)
        rng = torch.Generator().manual_seed(seed)
        runs.append(ais(two_modes(), (2,), 15, start_std=1.0, chains=10, generator=rng))
    assert torch.equal(runs[0].log_weights, runs[1].log_weights)
    assert not torch.equal(runs[0].log_weights, runs[2].log_weights)


def test_bennetts_root_is_meng_and_wongs_fixed_point(rng):
    """The iteration over the optimal bridge, written out; unequal counts, correlated samples."""
    up, down = 1.5 * torch.randn(300, generator=rng).double(), 1.5 + torch.randn(500, generator=rng).double()
    for worth in (500, 120):
        z, s = torch.tensor(1.0).double(), 300 / (300 + worth)
        for _ in range(200):
            above = (up.exp() / (s * z + (1 - s) * up.exp())).mean()
            z = above / (1 / (s * z + (1 - s) * down.exp())).mean()
        found = bennett(up, down, worth)
        assert found.value.item() == pytest.approx(z.log().item(), abs=1e-9)
    assert found.error > bennett(up, down, None).error  # 120 draws say less than 500
    swapped = bennett(-down, -up, None)
    assert swapped.value.item() == pytest.approx(-bennett(up, down, None).value.item(), abs=1e-9)
    # A draw outside the target's support weighs nothing, but counts.
    assert math.isfinite(bennett(torch.cat([up, torch.tensor([-math.inf])]), down, None).value)


def test_bridge_takes_a_proposal_and_shapes(rng):
    """Image-shaped states; a poor proposal has a wider bar than the fitted Gaussian, and both are right."""
    energy = rotated_gaussian(4, 0.5, rng)
    image = lambda x: energy(x.flatten(-2))  # noqa: E731
    x = energy.sample(600, rng).reshape(600, 2, 2)
    fitted = bridge(image, x, generator=rng)
    poor = bridge(
        image, x, proposal=Gaussian(torch.zeros(4), torch.full((4,), 9.0)), draws=300, generator=rng
    )
    assert within(fitted, energy.log_normaliser) and within(poor, energy.log_normaliser)
    assert fitted.error < poor.error and fitted.log_weights.shape == (600,)
    assert poor.log_weights.shape == (900,)
    with pytest.raises(ValueError, match="cannot fit a Gaussian"):
        bridge(image, x[:8], generator=rng)
    with pytest.raises(ValueError, match="as many proposals"):
        bridge(image, x, proposal=[energy, energy], generator=rng)
    with pytest.raises(ValueError, match="worth"):
        bridge(image, x, worth=0, generator=rng)


def test_log_likelihood_of_a_gaussian(rng):
    """-entropy, within 4 of its own standard errors; an uncertain log Z widens the bar, not the examples."""
    energy = rotated_gaussian(3, 0.4, rng)
    x = energy.sample(4000, rng)
    exact = log_likelihood(energy, x, energy.log_normaliser)
    assert abs(exact.value + 1.5 + energy.log_normaliser) < 4 * exact.error
    assert exact.error.item() == pytest.approx(math.sqrt(1.5 / 4000), rel=0.1)
    assert torch.allclose(exact.each, energy.log_density(x).double(), atol=1e-5)
    rough = ais(energy, (3,), 20, start_std=1.0, chains=20, generator=rng)
    assert log_likelihood(energy, x, rough).error.square().item() == pytest.approx(
        (exact.error**2 + rough.error**2).item()
    )
    with pytest.raises(ValueError, match="not finite"):
        log_likelihood(energy, x * math.nan, 0.0)


def test_a_planned_ladder_keeps_its_promises(rng):
    """Each rung adds the same spread; MALA accepts about what was asked, from wide start to narrow end."""
    energy = rotated_gaussian(8, 0.1, rng)
    ladder = plan_ladder(energy, (8,), 300, start_std=3.0, acceptance=0.7, generator=rng)
    assert len(ladder.betas) == 301 and ladder.betas[1] < 1e-3 and ladder.step_size[0] > ladder.step_size[-1]
    run = ais(energy, (8,), ladder, start_std=3.0, generator=rng)
    assert run.acceptance.mean().item() == pytest.approx(0.7, abs=0.07) and run.acceptance.min() > 0.4
    even = ais(energy, (8,), Ladder.even(300, 0.15), start_std=3.0, generator=rng)
    assert run.error < 0.5 * even.error
    with pytest.raises(ValueError, match="too far from the target"):
        plan_ladder(energy, (8,), 300, start_std=3.0, limit=10, generator=rng)


def test_a_proposal_of_infinite_energy_is_rejected_and_a_state_of_one_is_an_error(rng):
    walls = lambda x: torch.where(x.abs().sum(-1) < 1, 0 * x.sum(-1), math.inf)  # noqa: E731
    start = 2 * torch.rand(500, 1, generator=rng) - 1
    run = ais(
        walls, (1,), Ladder.even(5, 0.5), start_std=1.0, direction="reverse", start=start, generator=rng
    )
    # Backwards no chain leaves the walls: the start's mass beyond them is missing from Z_0.
    assert run.x.abs().max() < 1 and within(run, math.log(2 / math.erf(math.sqrt(0.5))))
    with pytest.raises(DivergenceError, match="at step 0"):
        ais(walls, (1,), Ladder.even(5, 0.5), start_std=3.0, generator=rng)
    with pytest.raises(DivergenceError, match="at step 0"):
        plan_ladder(lambda x: x.sum(-1) * math.nan, (1,), 5, start_std=1.0, generator=rng)
    well = lambda x: torch.where(x.abs().sum(-1) < 4, 0 * x.sum(-1), -math.inf)  # noqa: E731
    with pytest.raises(DivergenceError) as caught:
        ais(well, (1,), Ladder.even(200, 1.0), start_std=1.0, generator=torch.Generator().manual_seed(0))
    assert 0 < caught.value.step < 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ladder": 0}, "rungs"),
        ({"start_std": None}, "start from nothing proper"),
        ({"start_std": 0.0}, "start_std"),
        ({"start_std": torch.tensor([1.0, math.nan])}, "start_std"),
        ({"base_std": -1.0}, "base_std"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": torch.ones(3)}, "temperature"),
        ({"chains": 1}, "chains"),
        ({"transitions": 0}, "transitions"),
        ({"direction": "up"}, "direction"),
        ({"direction": "reverse"}, "reverse direction"),
        ({"start": torch.zeros(5, 2)}, "reverse direction"),
        ({"direction": "reverse", "start": torch.zeros(5, 3)}, "start must be"),
        ({"stack": 2}, "the energy maps"),
    ],
)
def test_arguments_out_of_range_are_named(change, message):
    arguments = {"shape": (2,), "ladder": Ladder.even(3, 0.1), "start_std": 1.0, "chains": 4} | change
    energy = lambda x: x.flatten(1).square().sum(-1)  # noqa: E731
    with pytest.raises(ValueError, match=message):
        ais(energy, **arguments)


def test_ladders_that_cannot_be_climbed_or_do_not_match_are_refused(rng):
    one = torch.ones(3)
    for betas, sizes in (
        ([0, 1, 0.5], one),
        ([0.1, 0.5, 1], one),
        ([0, 0.5, 1], one[:2]),
        ([0, 0.5, 1], 0 * one),
    ):
        with pytest.raises(ValueError, match="ladder"):
            Ladder(torch.tensor(betas), sizes)
    with pytest.raises(ValueError, match="rungs"):
        Ladder.even(0, 0.1)
    energy, start = two_modes(), two_modes().sample(5, rng)
    up = ais(energy, (2,), Ladder.even(3, 0.1), start_std=1.0, generator=rng)
    for other in (Ladder.even(3, 0.2), Ladder.even(4, 0.1)):
        down = ais(energy, (2,), other, start_std=1.0, direction="reverse", start=start, generator=rng)
        with pytest.raises(ValueError, match="share one ladder"):
            bridge_from_ais(up, down)
