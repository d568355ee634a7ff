"""The Stein operator against Jacobians, identities and closed forms; its training against plain versions."""

import math

import pytest
import torch

from companion import energies, metrics, networks, stein
from companion.energies import Gaussian, GaussianMixture, score


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Plain(torch.nn.Module):
    """A network without its hand-written tangent, so that autograd does the work."""

    def __init__(self, net):
        super().__init__()
        self.net, self.stack = net, net.stack

    def forward(self, x):
        return self.net(x)


def make_critic(d=3, stack=None, seed=0, width=16, dtype=torch.float64):
    return networks.MLP((d, width, width, d), stack, generator=generator(seed)).to(dtype)


def make_energy(d=3, stack=None, seed=1, width=16, dtype=torch.float64):
    net = networks.MLPEnergy((d,), (width, width), stack, generator=generator(seed))
    return stein.GaussianBase(net, 0.3 * torch.ones(d), 1.5 * torch.ones(d)).to(dtype)


def symmetric(*shape, seed=0):
    a = torch.randn(*shape, shape[-1], generator=generator(seed), dtype=torch.float64).triu(1)
    return a + a.mT


class MatrixCritic(torch.nn.Module):
    """A smooth map of symmetric matrices to symmetric matrices in which all entries interact."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, a):
        return (self.scale * a @ a).sin() + a.tanh() @ a @ a.tanh()


# --- the operator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [Plain, lambda net: net])
@pytest.mark.parametrize("stack", [None, 2])
def test_exact_trace_is_the_jacobians(wrap, stack):
    net = make_critic(stack=stack)
    lead = () if stack is None else (stack,)
    x = torch.randn(*lead, 5, 3, generator=generator(2), dtype=torch.float64)
    s = score(make_energy(stack=stack), x)
    terms = stein.stein_terms(s, wrap(net), x, trace="exact")
    jacobian = torch.autograd.functional.jacobian(net, x)  # (*lead, 5, 3, *lead, 5, 3)
    flat = jacobian.reshape(s.numel() // 3, 3, s.numel() // 3, 3)
    expected = torch.stack([flat[i, :, i].trace() for i in range(len(flat))]).reshape(*lead, 5)
    torch.testing.assert_close(terms.trace, expected)
    torch.testing.assert_close(terms.drift, (s * net(x)).sum(-1))
    torch.testing.assert_close(terms.square, net(x).square().sum(-1))
    torch.testing.assert_close(terms.operator, stein.stein_operator(s, wrap(net), x, trace="exact"))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("wrap", [Plain, lambda net: net])
def test_hutchinson_trace_is_within_its_error_and_the_signs_vary_less(kind, wrap):
    net, probes = wrap(make_critic()), 3000
    x = torch.randn(4, 3, generator=generator(2), dtype=torch.float64)
    exact = stein.stein_terms(0 * x, net, x, trace="exact").trace
    many = x.expand(probes, 4, 3)
    draws = stein.stein_terms(0 * many, net, many, kind=kind, generator=generator(3)).trace
    error = draws.std(0) / math.sqrt(probes)
    assert ((draws.mean(0) - exact).abs() < 3 * error).all()
    # Variances in closed form: 2 |J|_F^2 for the symmetric part J, less its diagonal for the signs.
    every = torch.autograd.functional.jacobian(net, x)  # (4, 3, 4, 3)
    jacobian = torch.stack([every[i, :, i] for i in range(4)])
    j = (jacobian + jacobian.mT) / 2
    variance = 2 * j.square().sum((-2, -1))
    if kind == "rademacher":
        variance = variance - 2 * j.diagonal(dim1=-2, dim2=-1).square().sum(-1)
    torch.testing.assert_close(draws.var(0), variance, rtol=0.15, atol=0)


@pytest.mark.parametrize("mask_kind", [None, "nodes", "entries"])
def test_symmetric_masked_terms_are_those_of_the_upper_triangle(mask_kind):
    batch, n = 3, 5
    a, s, net = symmetric(batch, n), symmetric(batch, n, seed=1), MatrixCritic()
    nodes = torch.ones(batch, n, dtype=torch.float64)
    nodes[0, 3:], nodes[1, 0] = 0, 0
    entries = nodes[:, :, None] * nodes[:, None, :]
    entries[2, 1, 2] = entries[2, 2, 1] = 0
    mask = {None: None, "nodes": nodes, "entries": entries}[mask_kind]
    pairs = {
        None: torch.ones_like(entries),
        "nodes": nodes[:, :, None] * nodes[:, None, :],
        "entries": entries,
    }
    active = pairs[mask_kind]
    i, j = torch.triu_indices(n, n, 1)

    def upper(v, b):  # the critic on the coordinates themselves: (d,) -> (d,)
        matrix = torch.zeros(n, n, dtype=torch.float64).index_put((i, j), v)
        return net((matrix + matrix.T)[None])[0][i, j] * active[b][i, j]

    expected = torch.zeros(batch, 3, dtype=torch.float64)
    for b in range(batch):
        v = a[b][i, j]
        jacobian = torch.autograd.functional.jacobian(lambda v, b=b: upper(v, b), v)
        f = upper(v, b).detach()
        trace = (jacobian.diagonal() * active[b][i, j]).sum()
        expected[b] = torch.stack([(s[b][i, j] * f).sum(), trace, f.square().sum()])
    with torch.no_grad():
        terms = stein.stein_terms(s, net, a, trace="exact", symmetric=True, mask=mask)
    torch.testing.assert_close(torch.stack(list(terms), -1), expected)
    probes = 4000
    many = a.expand(probes, batch, n, n)
    wide = None if mask is None else mask.expand(probes, *mask.shape)
    draws = stein.stein_terms(
        s.expand_as(many), net, many, symmetric=True, mask=wide, generator=generator(5)
    ).trace.detach()
    error = draws.std(0) / math.sqrt(probes)
    assert ((draws.mean(0) - expected[:, 1]).abs() < 3 * error).all()


def test_probes_have_the_identity_as_covariance_and_respect_masks():
    x = torch.zeros(20_000, 4, 4)
    nodes = torch.ones(20_000, 4)
    nodes[:, 3] = 0
    for kind in ("rademacher", "gaussian"):
        v = stein.probe(x, mask=nodes, symmetric=True, kind=kind, generator=generator())
        assert torch.equal(v, v.mT) and not v.diagonal(dim1=-2, dim2=-1).any() and not v[:, 3].any()
        u = v[:, [0, 0, 1], [1, 2, 2]]
        assert (u.T @ u / len(u) - torch.eye(3)).abs().max() < 0.04  # five standard errors
    assert torch.equal(stein.probe(x, generator=generator()), stein.probe(x, generator=generator()))
    mask = torch.tensor([[1.0, 0.0]])
    assert torch.equal(stein.probe(torch.zeros(1, 2), mask=mask) != 0, mask.bool())


def test_matrix_score_is_the_slope_of_each_coordinate():
    a = symmetric(2, 4)
    weight = torch.randn(4, 4, generator=generator(3), dtype=torch.float64)

    def energy(x):  # not symmetric in its two halves, so that a lost factor 2 would show
        return (weight * x.square() + (x @ x).sin()).sum((-2, -1))

    got = stein.matrix_score(energy, a)
    i, j = torch.triu_indices(4, 4, 1)
    for k in range(len(i)):
        bump = torch.zeros(4, 4, dtype=torch.float64)
        bump[i[k], j[k]] = bump[j[k], i[k]] = 1e-6
        slope = (energy(a + bump) - energy(a - bump)) / 2e-6
        torch.testing.assert_close(got[:, i[k], j[k]], -slope, rtol=1e-5, atol=1e-6)
    assert torch.equal(got, got.mT) and not got.diagonal(dim1=-2, dim2=-1).any()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert not stein.matrix_score(energy, a, mask=mask)[0, 3].any()


def test_steins_identity_holds_under_the_density_and_fails_beside_it():
    density = GaussianMixture.ring(std=0.5)
    net = networks.MLP((2, 8, 2), generator=generator())
    x = density.sample(100_000, generator(1))
    for shift, holds in ((0.0, True), (0.3, False)):
        with torch.no_grad():
            value = stein.stein_operator(score(density, x + shift), net, x + shift, trace="exact")
        error = value.std() / math.sqrt(len(x))
        assert (value.mean().abs() < 3 * error) == holds


def test_the_mean_is_known_without_a_trace_for_smoothed_data():
    """E[s^T f + Tr grad f] = E[(s + eps/sigma)^T f] for x = x0 + sigma eps, matrices with masks too."""
    sigma, n = 0.4, 60_000
    net, energy = make_critic(2, dtype=torch.float32), make_energy(2, dtype=torch.float32)
    noise = torch.randn(n, 2, generator=generator(1))
    x = torch.randint(0, 2, (n, 2), generator=generator(2)) + sigma * noise
    s = score(energy, x)
    with torch.no_grad():
        gap = stein.stein_operator(s, net, x, trace="exact") - ((s + noise / sigma) * net(x)).sum(-1)
    assert gap.mean().abs() < 3 * gap.std() / math.sqrt(n)

    size, net, nodes = 4, MatrixCritic().float(), torch.ones(n, 4)
    nodes[: n // 2, 3] = 0
    pairs = nodes[:, :, None] * nodes[:, None, :]
    a = torch.randint(0, 2, (n, size, size), generator=generator(3)).float().triu(1)
    noise = torch.randn(n, size, size, generator=generator(4)).triu(1)
    noise = (noise + noise.mT) * pairs
    a = (a + a.mT) * pairs + sigma * noise
    s = stein.matrix_score(lambda v: (v**4).sum((-2, -1)) / 8, a, mask=nodes)
    with torch.no_grad():
        value = stein.stein_operator(s, net, a, symmetric=True, mask=nodes, generator=generator(5))
        gap = value - ((s + noise / sigma) * net(a) * pairs).sum((-2, -1)) / 2
    assert gap.mean().abs() < 3 * gap.std() / math.sqrt(n)


def test_what_does_not_fit_is_refused():
    x, net = torch.zeros(2, 3), networks.MLP((3, 4, 3))
    a = symmetric(2, 3)
    with pytest.raises(ValueError, match="differ by up to 1"):
        stein.stein_terms(a, MatrixCritic(), a + torch.eye(3, 3).roll(1, 0).double(), symmetric=True)
    with pytest.raises(ValueError, match=r"mask \(2,\) fits neither the nodes \(2, 3\) nor x"):
        stein.stein_terms(a, MatrixCritic(), a, symmetric=True, mask=torch.ones(2))
    with pytest.raises(ValueError, match=r"mask \(3,\) does not fit x \(2, 3\)"):
        stein.stein_terms(x, net, x, mask=torch.ones(3))
    with pytest.raises(ValueError, match=r"is \(\*batch, n, n\), got \(2, 3\)"):
        stein.stein_terms(x, net, x, symmetric=True)
    with pytest.raises(ValueError, match="same shape"):
        stein.stein_terms(x[:1], net, x)
    with pytest.raises(ValueError, match="must keep the shape"):
        stein.stein_terms(x, lambda v: v[:, :2], x)
    with pytest.raises(ValueError, match="trace must be"):
        stein.stein_terms(x, net, x, trace="exakt")
    with pytest.raises(ValueError, match="probes must be"):
        stein.stein_terms(x, net, x, probes=0)
    with pytest.raises(ValueError, match="kind must be"):
        stein.probe(x, kind="uniform")
    with pytest.raises(ValueError, match="not of ReLU"):
        networks.MLP((3, 4, 3), activation=torch.nn.ReLU).value_and_tangent(x, x)
    run = stein.SteinRun(make_energy(), None, generator())
    with pytest.raises(ValueError, match="needs a loss"):
        stein.train(run, x, 1, batch=1)


def test_a_critic_that_does_not_depend_on_x_has_no_trace():
    x = torch.randn(4, 2, generator=generator())
    constant = torch.nn.Parameter(torch.ones(2))
    for critic in (lambda v: constant.expand_as(v), lambda v: torch.ones_like(v)):
        terms = stein.stein_terms(x, critic, x)
        assert not terms.trace.any() and torch.equal(terms.drift, x.sum(-1))


# --- hand-written derivatives ---------------------------------------------------------------------


@pytest.mark.parametrize("stack", [None, 2])
def test_tangents_are_autograds_and_so_are_their_gradients(stack):
    lead = () if stack is None else (stack,)
    x = torch.randn(*lead, 5, 3, generator=generator(2), dtype=torch.float64)
    v = torch.randn(4, *x.shape, generator=generator(3), dtype=torch.float64)
    net = make_critic(stack=stack)
    value, tangents = net.value_and_tangent(x, v)
    for k in range(4):
        expected = torch.autograd.functional.jvp(net, x, v[k], create_graph=True)
        torch.testing.assert_close((value, tangents[k]), expected)
        torch.testing.assert_close(net.value_and_tangent(x, v[k]), expected)
    weights = torch.randn(tangents.shape, generator=generator(4), dtype=torch.float64)
    parameters = list(net.parameters())

    def differentiate(value, tangents):
        return torch.autograd.grad((weights * tangents).sum() + value.square().sum(), parameters)

    plain = [torch.autograd.functional.jvp(net, x, v[k], create_graph=True) for k in range(4)]
    expected = differentiate(plain[0][0], torch.stack([t for _, t in plain]))
    torch.testing.assert_close(differentiate(value, tangents), expected)


@pytest.mark.parametrize("stack", [None, 2])
def test_the_based_energy_and_its_closed_forms(stack):
    lead = () if stack is None else (stack,)
    energy = make_energy(stack=stack)
    x = torch.randn(*lead, 5, 3, generator=generator(2), dtype=torch.float64)
    value, grad = energy.value_and_gradient(x)
    leaf = x.clone().requires_grad_(True)
    torch.testing.assert_close(grad, torch.autograd.grad(energy(leaf).sum(), leaf)[0])
    torch.testing.assert_close(value, energy(x))
    torch.testing.assert_close(energy.value_and_tangent(x, grad)[1], (grad * grad).sum(-1))
    far = 1e4 * torch.ones(*lead, 1, 3, dtype=torch.float64)
    assert (energy(far) > 1e6).all()  # the base holds whatever the network does
    with pytest.raises(ValueError, match="the base needs"):
        stein.GaussianBase(networks.MLPEnergy((3,)), torch.zeros(2), torch.ones(2))


def test_losses_and_their_gradients_are_those_of_autograd():
    energy, net = make_energy(stack=2), make_critic(stack=2)
    x = torch.randn(2, 6, 3, generator=generator(2), dtype=torch.float64)
    for anchored in (False, True):
        for module in (net, energy):
            pair = []
            for e, c in ((energy, net), (Plain(energy), Plain(net))):
                loss = (
                    stein.critic_loss(e, c, x, lam=3.0, anchored=anchored, generator=generator(1))[0]
                    if module is net
                    else stein.model_loss(e, c, x, lam=3.0, anchored=anchored)
                )
                pair.append((loss, torch.autograd.grad(loss.sum(), list(module.parameters()))))
            torch.testing.assert_close(pair[0], pair[1])


def test_the_anchored_critic_climbs_the_same_objective():
    """Its loss differs from the plain one of f = (s + h)/(2 lam) by terms that h does not enter."""
    lam, energy = 3.0, make_energy()
    x = torch.randn(6, 3, generator=generator(2), dtype=torch.float64)

    def of(net):
        def f(v):
            with torch.enable_grad():
                grad = torch.autograd.grad(energy(v).sum(), v, create_graph=True)[0]
            return (net(v) - grad) / (2 * lam)

        terms = stein.stein_terms(score(energy, x), f, x, trace="exact")
        plain = (lam * terms.square - terms.operator).mean()
        anchored, square = stein.critic_loss(energy, net, x, lam=lam, anchored=True, trace="exact")
        torch.testing.assert_close(square, terms.square.mean())
        return plain - anchored

    torch.testing.assert_close(of(make_critic(seed=4)), of(make_critic(seed=5)))


# --- training -------------------------------------------------------------------------------------


def test_the_critic_becomes_the_difference_of_the_scores():
    """Two Gaussians of one covariance C: f* = C^-1 (m_q - m_p) / (2 lam), a constant, reached to 2 %."""
    covariance = torch.tensor([[1.0, 0.3], [0.3, 0.5]])
    q, p = Gaussian(torch.tensor([0.5, 0.0]), covariance), Gaussian(torch.tensor([-0.3, 0.4]), covariance)
    lam, seeds = 0.5, 3
    rng = generator()
    x = p.sample(200_000, rng)
    net = networks.MLP((2, 16, 2), seeds, generator=rng)
    energy = torch.nn.Module()
    energy.stack, energy.value_and_gradient = seeds, lambda v: (q(v), -score(q, v))
    run = stein.SteinRun(energy, torch.optim.SGD([torch.zeros(1)], 0.0), rng, net)
    run.critic_optimizer = torch.optim.Adam(net.parameters(), 2e-2)
    stein.train(run, x, 500, batch=1000, lam=lam, critic_steps=10**9, schedule=lambda share: (1 - share) ** 2)
    fresh = p.sample(5000, rng)
    best = stein.optimal_critic(score(q, fresh), score(p, fresh), lam)
    torch.testing.assert_close(
        best, (covariance.inverse() @ (q.mean - p.mean).float() / (2 * lam)).expand_as(best)
    )
    with torch.no_grad():
        error = (net(fresh.expand(seeds, -1, -1)) - best).square().sum(-1).mean(-1).sqrt() / best[0].norm()
    assert (error < 0.02).all(), error


@pytest.mark.parametrize("method", ["plain", "anchored", "score_matching"])
def test_stacked_training_is_separate_training(method, monkeypatch):
    """Each of two stacked models ends where it ends alone, its gradients clipped by themselves."""
    # The probes of a stacked batch are drawn in another order than those of one model: fix them.
    monkeypatch.setattr(stein, "probe", lambda x, **_: torch.ones_like(x))
    data = GaussianMixture.ring().sample(200, generator(3)).double()
    energy, net = make_energy(2, stack=2), make_critic(2, stack=2)
    draws = torch.randint(200, (12, 2, 20), generator=generator(4))
    anchored = method == "anchored"

    def train(e, c, rows):  # the loop's own steps, on given batches
        run = stein.SteinRun(e, torch.optim.Adam(e.parameters(), 1e-2), generator(), c)
        run.critic_optimizer = torch.optim.Adam(c.parameters(), 1e-2)
        for k, row in enumerate(rows):
            if method == "score_matching":
                loss = stein.score_matching_loss(e, data[row], generator(k))
                stein.descend(run.optimizer, e, loss, 0.5)
            elif k % 3 < 2:
                loss, _ = stein.critic_loss(e, c, data[row], lam=2.0, anchored=anchored, trace="exact")
                stein.descend(run.critic_optimizer, c, loss, 0.5)
            else:
                stein.model_step(run, data[row], lam=2.0, anchored=anchored, clip=0.5)
        return run

    def slice_of(module, like, k):
        like.load_state_dict({name: v[k] for name, v in module.state_dict().items()})
        return like

    singles = [(slice_of(energy, make_energy(2), k), slice_of(net, make_critic(2), k)) for k in range(2)]
    both = train(energy, net, draws)
    for k, (e, c) in enumerate(singles):
        alone = train(e, c, draws[:, k])
        for stacked, single in ((both.energy, alone.energy), (both.critic, alone.critic)):
            for name, v in single.state_dict().items():
                torch.testing.assert_close(stacked.state_dict()[name][k], v)


def test_score_matching_loss_is_hyvarinens():
    """On a Gaussian of variance v with the model's a: a^2 v / 2 - a a dimension, exactly; one model a row."""

    class Quadratic(torch.nn.Module):
        def forward(self, x):
            return 0.5 * (torch.tensor([0.5, 2.0])[:, None, None] * x.square()).sum(-1)

    x = torch.randn(2, 1000, 3, generator=generator())
    a = torch.tensor([0.5, 2.0])
    expected = a**2 * x.square().sum(-1).mean(-1) / 2 - 3 * a
    torch.testing.assert_close(stein.score_matching_loss(Quadratic(), x, generator()), expected)


@pytest.mark.parametrize("anchored", [False, True])
def test_training_without_samples_finds_a_gaussian(anchored):
    p = Gaussian(torch.tensor([0.5, -0.5]), torch.tensor([[1.0, 0.6], [0.6, 1.0]]))
    rng = generator()
    data = p.sample(5000, rng)
    net = networks.MLPEnergy((2,), (32, 32), 2, generator=rng)
    energy = stein.GaussianBase(net, data.mean(0), data.std(0))
    critic = networks.MLP((2, 32, 32, 2), 2, generator=rng)
    adam = [torch.optim.Adam(m.parameters(), 3e-3, (0.5, 0.999)) for m in (energy, critic)]
    run = stein.SteinRun(energy, adam[0], rng, critic, adam[1])
    truth = p.log_density(data).mean()

    def shortfall():
        with torch.no_grad():
            value = -energy(data.expand(2, -1, -1)).double().mean(-1)
        return truth - (value - metrics.grid_log_normaliser(energy, 7.0, 100, stack=2))

    before = shortfall()
    stein.train(
        run, data, 600, batch=100, critic_steps=2, anchored=anchored, average=0.98, clip=10.0,
        schedule=lambda share: min(1.0, 2 * (1 - share)),
    )  # fmt: skip
    assert (before > 0.15).all() and (shortfall() < 0.03).all()
    assert run.step == 600 and len(run.history["model"]) == 200 and run.gauge("square").shape == (400, 2)
    assert run.average is not None and run.average is not run.energy


def test_a_lost_training_says_where():
    net = networks.MLPEnergy((2,), (4,), generator=generator())
    energy = stein.GaussianBase(net, torch.zeros(2), torch.ones(2))
    run = stein.SteinRun(energy, torch.optim.SGD(energy.parameters(), 1e30), generator())
    with pytest.raises(FloatingPointError, match="not finite at step .* learning rate"):
        stein.train(run, torch.randn(50, 2), 100, batch=5, loss=stein.score_matching_loss)


# --- what it is judged by -------------------------------------------------------------------------


def test_quadrature_knows_the_normalisers():
    for density in (GaussianMixture.moons(), energies.Rings((1.0, 2.0), 0.2), GaussianMixture.ring(std=0.3)):
        value = metrics.grid_log_normaliser(density, 5.0)
        assert value.item() == pytest.approx(density.log_normaliser, abs=1e-4)
    energy = make_energy(2, stack=2)
    alone = metrics.grid_log_normaliser(energy, 9.0, stack=2)
    assert alone.shape == (2,) and torch.allclose(
        alone, metrics.grid_log_normaliser(energy, 12.0, 300, stack=2)
    )
    with pytest.raises(ValueError, match="rim of the square"):
        metrics.grid_log_normaliser(GaussianMixture.moons(), 1.0)


def test_moons_are_two_bands():
    moons = GaussianMixture.moons()
    x = moons.sample(4000, generator())
    assert x.mean(0).abs().max() < 0.08 and torch.equal(moons.means[:24], -moons.means[24:])
    gaps = (moons.means[1:24] - moons.means[:23]).norm(dim=-1)
    assert gaps.max() < 1.5 * moons.std  # no valley between neighbours
