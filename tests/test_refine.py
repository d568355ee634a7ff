"""Refinement along a critic: closed forms, identities between methods, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from companion import gan, networks, refine
from companion.energies import GaussianMixture


class Quadratic(torch.nn.Module):
    """D(x) = -|x|^2 / 2."""

    def __init__(self, dim=2):
        super().__init__()
        self.shape = (dim,)

    def forward(self, x):
        return -x.square().sum(-1) / 2


class Identity(torch.nn.Module):
    def __init__(self, dim=2, scale=1.0):
        super().__init__()
        self.shape, self.latent, self.scale = (dim,), dim, scale

    def forward(self, z):
        return self.scale * z


def pair(stack=None, seed=0):
    rng = torch.Generator().manual_seed(seed)
    network = networks.PointGenerator(2, 2, (16, 16), stack=stack, generator=rng)
    critic = networks.MLPEnergy((2,), (16, 16), stack=stack, gain=3.0, generator=rng)
    return network, critic, rng


@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_a_quadratic_critic_gives_variance_one_over_beta(beta):
    """The unadjusted chain's variance is 1 / (beta (1 - eps^2 beta / 4)); 4,000 x 2 values, seed 0."""
    eps = 0.2
    rng = torch.Generator().manual_seed(0)
    ended = refine.data_space(torch.zeros(4000, 2), refine.Field(Quadratic()), 600, eps, beta, generator=rng)
    exact = 1 / (beta * (1 - eps**2 * beta / 4))
    error = exact * math.sqrt(2 / 8000)
    assert ended.x.var().item() == pytest.approx(exact, abs=3 * error)
    torch.testing.assert_close(ended.critic, Quadratic()(ended.x))


def test_latent_and_data_space_agree_for_the_identity_and_a_flat_prior():
    critic = pair()[1]
    start = torch.randn(30, 2, generator=torch.Generator().manual_seed(1))
    options = {"generator": None}
    ends = []
    for method, field, extra in (
        (refine.data_space, refine.Field(critic), {}),
        (refine.ddls, refine.Field(critic, Identity()), {"prior": None}),
        (refine.dgflow, refine.Field(critic, Identity()), {}),
    ):
        options["generator"] = torch.Generator().manual_seed(2)
        ends.append(method(start, field, 12, 0.1, 5.0, **options, **extra).x)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-5, atol=1e-6)


def test_the_prior_is_a_standard_normal():
    """A flat critic leaves the prior: variance 1 / (1 - eps^2 / 4), whatever beta; 8,000 values, seed 3."""

    class Flat(torch.nn.Module):
        shape = (2,)

        def forward(self, x):
            return 0 * x.sum(-1)

    rng = torch.Generator().manual_seed(3)
    field = refine.Field(Flat(), Identity())
    ended = refine.ddls(torch.zeros(4000, 2), field, 400, 0.2, 7.0, generator=rng)
    exact = 1 / (1 - 0.2**2 / 4)
    assert ended.state.var().item() == pytest.approx(exact, abs=3 * exact * math.sqrt(2 / 8000))


def test_without_noise_the_critic_rises_at_every_step():
    network, critic, rng = pair()
    z = torch.randn(50, 2, generator=rng)
    # beta so large and eps so small that noise is nothing beside the drift: eps^2 beta / 2 = 0.005.
    still = refine.data_space(
        network(z).detach(), refine.Field(critic), 40, 1e-6, 1e10, generator=rng, record_every=1
    )
    with torch.no_grad():
        values = critic(still.path)
    assert (values.diff(dim=0) > -1e-6).all()
    assert (values[-1] > values[0]).all()
    far = refine.dot(z, refine.Field(critic, network), 30, 1e-3, beta=1e6)
    with torch.no_grad():
        assert far.critic.mean() > critic(network(z)).mean()


def test_dot_stays_where_it_is_when_the_critic_weighs_nothing_and_on_its_shell():
    network, critic, rng = pair()
    z = torch.randn(40, 2, generator=rng)
    field = refine.Field(critic, network)
    still = refine.dot(z, field, 50, 0.01, beta=1e-9)
    assert (still.state - z).norm(dim=1).max() < 0.02  # |z - z_0| has no slope at 0: a step's length at most
    moved = refine.dot(z, field, 50, 0.01)
    torch.testing.assert_close(moved.state.norm(dim=1), z.norm(dim=1), rtol=0.03, atol=0.01)
    assert moved.critic.mean() > field.critic(field.decode(z)).mean()


def test_dgflow_slopes_are_the_papers():
    d = torch.linspace(-3, 3, 7, dtype=torch.double, requires_grad=True)
    slopes = {"kl": torch.ones_like(d), "logd": 1 / (1 + d.exp()), "js": d.sigmoid()}
    for name, expected in slopes.items():
        (slope,) = torch.autograd.grad(refine._POTENTIALS[name](d).sum(), d)
        torch.testing.assert_close(slope, expected)


def test_rejection_takes_the_critics_favourite():
    network, critic, rng = pair(stack=2)
    state = rng.get_state()
    best = refine.rejection(critic, network, 7, 5, generator=rng)
    rng.set_state(state)
    z = torch.empty(2, 35, 2).normal_(generator=rng)
    with torch.no_grad():
        x = network(z).unflatten(1, (7, 5))
        values = critic(x.flatten(1, 2)).unflatten(1, (7, 5))
    assert best.shape == (2, 7, 2)
    with torch.no_grad():
        torch.testing.assert_close(critic(best), values.amax(-1))


@pytest.mark.parametrize("stack", [None, 2])
def test_zero_steps_are_the_critics_own_step(stack):
    """DCD at K = 0 is the GAN's critic step, bit for bit."""
    data = GaussianMixture.grid(spacing=1.0).sample(500, torch.Generator().manual_seed(0))
    network, critic, _ = pair(stack)
    other = copy.deepcopy(critic)
    lead = () if stack is None else (stack,)
    options = {"penalty": 0.5, "drift": 0.1}
    gen = torch.Generator().manual_seed(4)
    refine.finetune(
        critic, network, data, 1, optimizer=torch.optim.Adam(critic.parameters(), lr=1e-2), batch=32, steps=0,
        step_size=0.1, beta=1.0, generator=gen, **options,
    )  # fmt: skip
    gen.manual_seed(4)
    real = data[torch.randint(len(data), (*lead, 32), generator=gen)]
    with torch.no_grad():
        fake = network(torch.empty(*lead, 32, 2).normal_(generator=gen))
    gan.critic_step(
        other, torch.optim.Adam(other.parameters(), lr=1e-2), real, fake, generator=gen, **options
    )
    assert all(torch.equal(p, q) for p, q in zip(critic.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("latent", [False, True])
def test_finetuning_leaves_the_generator_bit_for_bit(latent):
    """Batch normalisation included: its running statistics would move in training mode."""
    rng = torch.Generator().manual_seed(0)
    network = networks.ConvGenerator((1, 8, 8), 4, 4, rng).train()
    critic = networks.ConvEnergy((1, 8, 8), 2, rng)
    before, first = copy.deepcopy(network.state_dict()), copy.deepcopy(critic.state_dict())
    data = torch.rand(50, 1, 8, 8, generator=rng)
    gauges = refine.finetune(
        critic, network, data, 3, optimizer=torch.optim.Adam(critic.parameters(), lr=1e-3), batch=8, steps=2,
        step_size=0.05, beta=10.0, generator=rng, latent=latent, half_level=0.03, penalty=1.0,
    )  # fmt: skip
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert network.training
    assert any(not torch.equal(v, first[k]) for k, v in critic.state_dict().items())
    assert gauges["gap"].shape == (3,) and torch.isfinite(gauges["rho"]).all()


def test_finetuning_repairs_a_critic_that_knows_nothing():
    """Two modes, an untrained pair: after DCD chains from the generator end at the modes; seed 7."""
    gen = torch.Generator().manual_seed(7)
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    data = means[torch.randint(2, (4000,), generator=gen)] + 0.1 * torch.randn(4000, 2, generator=gen)
    network, critic, _ = pair(seed=8)
    walk = {"step_size": 0.1, "beta": 10.0, "generator": gen}
    optimizer = torch.optim.Adam(critic.parameters(), lr=5e-3)

    def near():
        z = torch.randn(400, 2, generator=gen)
        x = refine.data_space(network(z).detach(), refine.Field(critic), 100, **walk).x
        return (torch.cdist(x, means).amin(1) < 0.4).double().mean().item()

    before = near()
    refine.finetune(critic, network, data, 150, optimizer=optimizer, batch=64, steps=30, drift=0.05, **walk)
    assert before < 0.5 and near() > 0.85


def test_largest_step_of_a_quadratic():
    """D = -|x|^2 / 2 has curvature 1: eps = 2 / sqrt(beta). Infinite for a linear critic."""
    field = refine.Field(Quadratic(3))
    bound = refine.largest_step(field, torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), 4.0)
    torch.testing.assert_close(bound, torch.ones(5), rtol=1e-4, atol=0.0)


def test_chains_record_their_way_and_say_their_gauges():
    network, critic, rng = pair()
    ended = refine.ddls(
        torch.randn(6, 2, generator=rng),
        refine.Field(critic, network),
        10,
        0.1,
        2.0,
        generator=rng,
        record_every=5,
    )
    assert ended.path.shape == (2, 6, 2)
    torch.testing.assert_close(ended.path[-1], ended.x)
    assert ended.gauges.rho > 0


def test_modes_that_couple_chains_are_refused():
    rng = torch.Generator().manual_seed(0)
    network = networks.ConvGenerator((1, 8, 8), 4, 4, rng)
    critic = gan.spectrally_normalised(networks.ResidualEnergy((1, 8, 8), 4, rng))
    with pytest.raises(ValueError, match="critic has spectral normalisation in training mode"):
        refine.Field(critic)
    critic.eval()
    with pytest.raises(ValueError, match="generator has batch normalisation in training mode"):
        refine.Field(critic, network)
    network.eval()
    refine.Field(critic, network)
    normed = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    normed.shape = (2,)
    with pytest.raises(ValueError, match="critic has batch normalisation"):
        refine.Field(normed)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"beta": float("nan")}, "beta must be positive"),
        ({"step_size": -0.1}, "step_size must be positive"),
        ({"step_size": 2.0}, "twice the prior's standard deviation"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(change, match):
    network, critic, rng = pair()
    arguments = {"steps": 3, "step_size": 0.1, "beta": 1.0} | change
    with pytest.raises(ValueError, match=match):
        refine.ddls(torch.randn(4, 2), refine.Field(critic, network), generator=rng, **arguments)


def test_shapes_and_spaces_that_do_not_fit_are_refused():
    network, critic, rng = pair()
    field, latent = refine.Field(critic), refine.Field(critic, network)
    with pytest.raises(ValueError, match="this method walks on samples"):
        refine.data_space(torch.zeros(3, 2), latent, 2, 0.1, 1.0)
    with pytest.raises(ValueError, match="this method walks on latents"):
        refine.ddls(torch.zeros(3, 2), field, 2, 0.1, 1.0)
    with pytest.raises(ValueError, match=r"states \(\*batch, \*\(2,\)\)"):
        refine.data_space(torch.zeros(3, 5), field, 2, 0.1, 1.0)
    with pytest.raises(ValueError, match="critic judges"):
        refine.Field(Quadratic(3), network)
    with pytest.raises(ValueError, match="do not fit a critic"):
        refine.finetune(
            critic, network, torch.zeros(9, 3), 1, optimizer=None, batch=2, steps=1, step_size=0.1, beta=1.0,
            generator=rng,
        )  # fmt: skip
    with pytest.raises(ValueError, match="unknown divergence 'lk'"):
        refine.dgflow(torch.zeros(3, 2), latent, 2, 0.1, 1.0, divergence="lk")
