"""The graph energy, its critic, training and sampling: symmetries, closed forms, two ways that agree."""

import copy
import math

import networkx as nx
import pytest
import torch

from companion import graphs
from companion._stein_operator import probe, stein_terms
from companion.graphs.network import GraphCritic, GraphEnergy, mirror, n_nodes, n_pairs, upper
from companion.graphs.training import Pool
from companion.langevin import DivergenceError

SMALL = {"layers": 2, "channels": 3, "node_width": 4, "hidden": 6}


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(3)


@pytest.fixture
def energy(rng):
    return GraphEnergy(8, 0.4, **SMALL, generator=rng).double()


@pytest.fixture
def critic(rng):
    return GraphCritic(8, 0.4, based=True, **SMALL, generator=rng).double()


def relaxed(count, nodes, rng):
    return 0.4 + 0.6 * torch.randn(count, n_pairs(nodes), generator=rng, dtype=torch.float64)


def levels(count, rng):
    return 0.2 + torch.rand(count, generator=rng, dtype=torch.float64)


# --- coordinates ------------------------------------------------------------------------------------


def test_mirror_and_upper_are_inverse_and_row_by_row(rng):
    a = relaxed(3, 5, rng)
    matrix = mirror(a)
    assert torch.equal(matrix, matrix.mT)
    assert torch.equal(matrix.diagonal(dim1=1, dim2=2), torch.zeros(3, 5, dtype=torch.float64))
    assert torch.equal(matrix[:, 0, 1:], a[:, :4])
    assert torch.equal(upper(matrix), a)


def test_only_triangular_numbers_are_numbers_of_pairs():
    assert [n_nodes(n_pairs(n)) for n in (2, 3, 12, 20, 125)] == [2, 3, 12, 20, 125]
    with pytest.raises(ValueError, match="17 is no number of node pairs"):
        n_nodes(17)


# --- symmetries ---------------------------------------------------------------------------------------


def test_relabelling_leaves_the_energy_and_permutes_score_and_critic(energy, critic, rng):
    a, sigma = relaxed(4, 7, rng), levels(4, rng)
    order = torch.randperm(7, generator=rng)
    renamed = upper(mirror(a)[:, order][:, :, order])
    torch.testing.assert_close(energy(renamed, sigma), energy(a, sigma), rtol=0, atol=1e-10)
    for function in (lambda x: graphs.scaled_score(energy, x, sigma), lambda x: critic(x, sigma)):
        expected = upper(mirror(function(a))[:, order][:, :, order])
        torch.testing.assert_close(function(renamed), expected, rtol=0, atol=1e-10)


def test_padding_changes_nothing(energy, critic, rng):
    a, sigma = relaxed(4, 5, rng), levels(4, rng)
    wide = torch.zeros(4, 8, 8, dtype=torch.float64)
    wide[:, :5, :5] = mirror(a)
    wide[:, 5:, 5:] = 7.0  # whatever stands at padded nodes is not read
    mask = (torch.arange(8) < 5).expand(4, 8)
    padded = upper(wide)
    real = upper(mask.unsqueeze(-1) & mask.unsqueeze(-2))[0]
    torch.testing.assert_close(energy(padded, sigma, mask), energy(a, sigma), rtol=0, atol=1e-10)
    score = graphs.scaled_score(energy, padded, sigma, mask)
    torch.testing.assert_close(score[:, real], graphs.scaled_score(energy, a, sigma), rtol=0, atol=1e-10)
    assert (score[:, ~real] == 0).all()
    field = critic(padded, sigma, mask)
    torch.testing.assert_close(field[:, real], critic(a, sigma), rtol=0, atol=1e-10)
    assert (field[:, ~real] == 0).all()


def test_the_energy_tells_two_triangles_from_a_hexagon(rng):
    # Every node of both has two neighbours: no network of degrees and sums over neighbours can.
    two, one = nx.disjoint_union(nx.cycle_graph(3), nx.cycle_graph(3)), nx.cycle_graph(6)
    a = upper(graphs.GraphBatch.from_networkx([two, one]).adjacency)
    value = GraphEnergy(6, generator=rng)(a, 0.3)
    assert (value[0] - value[1]).abs() > 1e-4


def test_large_graphs_take_the_other_way_to_the_same_numbers(energy, rng, monkeypatch):
    from companion.graphs import network

    a, sigma = relaxed(3, 6, rng), levels(3, rng)
    dense = graphs.scaled_score(energy, a, sigma)
    monkeypatch.setattr(network, "_DENSE", 2)
    network._pairs.cache_clear()
    torch.testing.assert_close(graphs.scaled_score(energy, a, sigma), dense, rtol=0, atol=1e-12)
    network._pairs.cache_clear()


def test_far_out_only_the_quadratic_base_is_left(energy, rng):
    """What makes exp(-E) integrable: the features are bounded, so the score tends to the base's."""
    a, sigma = relaxed(4, 6, rng), levels(4, rng)
    far = a + 100 * torch.sign(a)
    base = -sigma[:, None] * (far - energy.mean) / (energy.log_variance.exp() + sigma[:, None] ** 2)
    torch.testing.assert_close(graphs.scaled_score(energy, far, sigma), base, rtol=1e-6, atol=1e-6)


# --- derivatives --------------------------------------------------------------------------------------


def test_first_and_second_derivatives_are_those_of_finite_differences(energy, critic, rng):
    a, sigma = relaxed(2, 4, rng).requires_grad_(True), levels(2, rng)
    weight = energy.trunk.layers[1].pair.weight
    loss = lambda x, w: energy(x, sigma)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (a, weight))
    assert torch.autograd.gradgradcheck(loss, (a, weight))
    assert torch.autograd.gradcheck(lambda x: critic(x, sigma), (a,))


def test_the_score_is_that_of_the_matrix_convention(energy, rng):
    # -dE/da_ij of the coordinates is -(G_ij + G_ji) of the unconstrained matrix.
    a, sigma = relaxed(3, 6, rng), levels(3, rng)
    matrix = mirror(a).requires_grad_(True)
    (grad,) = torch.autograd.grad(energy(upper((matrix + matrix.mT) / 2), sigma).sum(), matrix)
    expected = -sigma[:, None] * upper(grad + grad.mT)
    torch.testing.assert_close(graphs.scaled_score(energy, a, sigma), expected)


@pytest.mark.parametrize("anchored", [True, False])
def test_the_fast_losses_are_the_exact_ones(energy, critic, rng, anchored):
    a, sigma = relaxed(6, 5, rng), levels(6, rng)
    target = torch.randn(a.shape, generator=rng, dtype=torch.float64)
    grads = {}
    for exact in (True, False):
        gen = torch.Generator().manual_seed(11)  # the same probe
        loss, field = graphs.critic_loss(
            critic, energy, a, sigma, anchored=anchored, exact=exact, generator=gen
        )
        of_critic = torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True)
        model = graphs.model_loss(energy, target, a, sigma, anchored=anchored, exact=exact)
        of_model = torch.autograd.grad(model, list(energy.parameters()))
        flat = [torch.cat([g.flatten() for g in of if g is not None]) for of in (of_critic, of_model)]
        grads[exact] = (loss, model, field, *flat)
    for exact, fast in zip(grads[True], grads[False], strict=True):
        assert (exact - fast).norm() < 3e-3 * exact.norm()


def test_masks_reach_every_loss(energy, critic, rng):
    a, sigma = relaxed(4, 5, rng), levels(4, rng)
    wide = torch.zeros(4, 7, 7, dtype=torch.float64)
    wide[:, :5, :5] = mirror(a)
    mask = (torch.arange(7) < 5).expand(4, 7)
    target = torch.zeros(4, 7, 7, dtype=torch.float64)
    noise = torch.randn(a.shape, generator=rng, dtype=torch.float64)
    target[:, :5, :5] = mirror(noise)
    for exact in (True, False):
        plain = graphs.dsm_loss(energy, a, sigma, noise, exact=exact)
        masked = graphs.dsm_loss(energy, upper(wide), sigma, upper(target), mask, exact=exact)
        torch.testing.assert_close(plain, masked, rtol=0, atol=1e-10)


# --- the objective ------------------------------------------------------------------------------------


def test_the_stein_value_is_the_oracle_s(energy, critic, rng):
    # For a = a_0 + sigma eps: E[u^T f + sigma Tr grad f] = E[(u + eps)^T f], the trace being known.
    clean = (torch.rand(4000, n_pairs(5), generator=rng, dtype=torch.float64) < 0.4).double()
    noise = torch.randn(clean.shape, generator=rng, dtype=torch.float64)
    sigma = torch.full((len(clean),), 0.5, dtype=torch.float64)
    a = clean + 0.5 * noise
    u = graphs.scaled_score(energy, a, sigma)
    terms = stein_terms(u, lambda x: critic(x, sigma), a, trace="exact")
    with torch.no_grad():
        f = critic(a, sigma)
    gap = terms.drift + sigma * terms.trace - ((u + noise) * f).sum(-1)
    error = gap.std() / math.sqrt(len(gap))
    assert gap.mean().abs() < 3 * error
    assert error < 0.05 * f.square().sum(-1).mean()  # sharp enough to mean something


def test_hutchinson_estimates_the_exact_trace(critic, rng):
    a, sigma = relaxed(1, 5, rng), levels(1, rng)
    exact = stein_terms(a, lambda x: critic(x, sigma), a, trace="exact").trace
    many = 2000
    wide, sigmas = a.expand(many, -1), sigma.expand(many)
    estimate = stein_terms(wide, lambda x: critic(x, sigmas), wide, generator=rng).trace
    assert (estimate.mean() - exact).abs() < 3 * estimate.std() / math.sqrt(many)


def test_anchoring_is_the_plain_objective_at_the_anchored_critic(energy, critic, rng):
    """Gradients of V(f) at f = (u + h) / 2 lam, u held fixed: in the critic, and of u^T f in the model."""
    a, sigma, lam = relaxed(5, 5, rng), levels(5, rng), 0.7
    pairs = a.shape[1]
    u = graphs.scaled_score(energy, a, sigma)
    v = probe(a, generator=torch.Generator().manual_seed(2))

    leaf = a.clone().requires_grad_(True)
    h = critic(leaf, sigma)
    (back,) = torch.autograd.grad((h * v).sum(), leaf, create_graph=True)
    f = (u + h) / (2 * lam)
    trace = (back * v).sum(-1) / (2 * lam)  # the part of u is a constant for the critic
    plain = -(((u * f).sum(-1) + sigma * trace - lam * f.square().sum(-1)) / pairs).mean()
    anchored, field = graphs.critic_loss(
        critic, energy, a, sigma, anchored=True, exact=True, generator=torch.Generator().manual_seed(2)
    )
    parameters = list(critic.parameters())
    for p, q in zip(
        torch.autograd.grad(plain, parameters), torch.autograd.grad(anchored, parameters), strict=True
    ):
        torch.testing.assert_close(p, q / (2 * lam), rtol=1e-8, atol=1e-12)

    def of_model(loss):
        return torch.autograd.grad(loss, list(energy.parameters()))

    fixed = ((u + field) / (2 * lam)).detach()
    plain = of_model(graphs.model_loss(energy, fixed, a, sigma, anchored=False, exact=True))
    anchored = of_model(graphs.model_loss(energy, field, a, sigma, anchored=True, exact=True))
    for p, q in zip(plain, anchored, strict=True):
        torch.testing.assert_close(p, q / (4 * lam), rtol=1e-8, atol=1e-12)


# --- training and sampling ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blocks():
    return graphs.two_blocks(20, generator=torch.Generator().manual_seed(0))


def test_the_pool_draws_sizes_with_their_shares(blocks, rng):
    pool = Pool(blocks)
    assert sum(len(group) for group in pool.groups) == 20
    drawn = pool.draw_sizes(4000, rng)
    for size, count in zip(pool.sizes, pool.counts, strict=True):
        share = count.item() / 20
        error = math.sqrt(share * (1 - share) / 4000)
        assert abs((drawn == size).float().mean().item() - share) < 4 * error
    assert pool.density == pytest.approx(
        blocks.n_edges.sum().item() / sum(n_pairs(n) for n in blocks.sizes.tolist())
    )
    assert pool.draw(6, rng).shape[0] == 6


@pytest.mark.parametrize("method", ["anchored", "dsm"])
def test_training_lowers_the_denoising_loss_and_repeats_itself(blocks, method):
    def judged(energy):
        gen = torch.Generator().manual_seed(2)
        clean = upper(blocks[blocks.sizes == 16].adjacency[:, :16, :16]).repeat(20, 1)
        noise, sigma = torch.randn(clean.shape, generator=gen), torch.full((len(clean),), 0.3)
        return graphs.dsm_loss(energy, clean + 0.3 * noise, sigma, noise).item()

    def trained():
        gen = torch.Generator().manual_seed(1)
        run = graphs.graph_run(blocks, (0.8, 0.3), gen, method=method, rate=1e-2, critic_rate=1e-2, **SMALL)
        before = judged(run.average)
        graphs.train(run, 200, batch=16, warm_up=20, averaging=0.9, progress=False)
        assert judged(run.average) < 0.9 * before
        return run

    first, second = trained(), trained()
    for p, q in zip(first.average.parameters(), second.average.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_denoising_loss_of_a_data_set_is_the_mean_over_its_graphs(blocks):
    energy = graphs.graph_run(blocks, [0.5, 0.2], torch.Generator().manual_seed(0), method="dsm").energy
    got = graphs.denoising_loss(energy, blocks, [0.5, 0.2], torch.Generator().manual_seed(1), repeats=3)
    noise_rng, pool = torch.Generator().manual_seed(1), Pool(blocks)
    for value, level in zip(got, (0.5, 0.2), strict=True):
        losses = []
        for clean in (group.repeat(3, 1) for group in pool.groups):
            noise = torch.randn(clean.shape, generator=noise_rng)
            noisy = clean + level * noise
            miss = graphs.scaled_score(energy, noisy, torch.full((len(clean),), level)) + noise
            losses += miss.square().mean(1).tolist()
        assert value == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert len(losses) == 3 * len(blocks)
    assert all(p.requires_grad for p in energy.parameters())


def test_exact_and_fast_training_agree(blocks):
    ends = []
    for exact in (True, False):
        gen = torch.Generator().manual_seed(1)
        run = graphs.graph_run(blocks, (0.8, 0.3), gen, rate=1e-3, critic_rate=1e-3, **SMALL)
        graphs.train(run, 5, batch=8, warm_up=1, exact=exact, progress=False)
        ends.append(torch.cat([p.detach().flatten() for p in run.energy.parameters()]))
        start = copy.deepcopy(graphs.graph_run(blocks, (0.8, 0.3), torch.Generator().manual_seed(1), **SMALL))
    moved = ends[0] - torch.cat([p.detach().flatten() for p in start.energy.parameters()])
    assert (ends[0] - ends[1]).norm() < 0.05 * moved.norm()


def test_a_frozen_critic_stays_as_it_is(blocks, rng):
    run = graphs.graph_run(blocks, (0.8, 0.3), rng, method="frozen", **SMALL)
    before = copy.deepcopy(run.critic.state_dict())
    graphs.train(run, 5, batch=8, progress=False)
    for name, value in run.critic.state_dict().items():
        assert torch.equal(value, before[name])


def test_divergence_is_an_error_with_the_step(blocks, rng):
    run = graphs.graph_run(blocks, (0.8, 0.3), rng, method="plain", rate=50.0, critic_rate=50.0, **SMALL)
    with pytest.raises(DivergenceError, match="training diverged"):
        graphs.train(run, 400, batch=8, warm_up=1, progress=False)


def test_chains_follow_the_quadratic_base_of_an_energy_without_heads(rng):
    energy = GraphEnergy(6, 0.3, **SMALL, generator=rng)
    with torch.no_grad():
        energy.head.second.weight.zero_()
        energy.node_head.second.weight.zero_()
    sigma, ratio, tau2 = 0.5, 0.05, 0.21
    a, path = graphs.annealed_langevin(
        energy, 6, 400, (1.0, sigma), steps=120, ratio=ratio, denoise=False, generator=rng, record_every=60
    )
    assert path.shape == (4, 400, 15)
    variance = tau2 + sigma**2
    shrink = 1 - ratio * sigma**2 / variance  # x <- m + shrink (x - m) + eps z: its stationary variance
    expected = 2 * ratio * sigma**2 / (1 - shrink**2)
    assert a.mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(expected / a.numel()))
    assert a.var().item() == pytest.approx(expected, rel=4 * math.sqrt(2 / a.numel()))


def test_generate_keeps_the_sizes_and_says_what_it_dropped(blocks, rng):
    run = graphs.graph_run(blocks, (0.8, 0.3), rng, **SMALL)
    sizes = run.pool.draw_sizes(12, rng)
    made = graphs.generate(run.average, sizes, run.levels, steps=3, generator=rng)
    assert sorted(made.relaxed.sizes.tolist()) == sizes.tolist()
    assert torch.equal(made.graphs.sizes, made.relaxed.sizes - made.dropped)
    graphs.check(made.graphs, binary=True)


# --- bad input ----------------------------------------------------------------------------------------


def test_bad_input_is_refused_with_what_to_do(energy, blocks, rng):
    with pytest.raises(ValueError, match="9 nodes is larger than the 8"):
        energy(relaxed(2, 9, rng), 0.5)
    with pytest.raises(ValueError, match=r"coordinates \(B, P\)"):
        energy(mirror(relaxed(2, 5, rng)), 0.5)
    with pytest.raises(ValueError, match="mask must be bool"):
        energy(relaxed(2, 5, rng), 0.5, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="density"):
        GraphEnergy(8, 1.5)
    with pytest.raises(ValueError, match="method must be one of anchored, plain, dsm, frozen"):
        graphs.graph_run(blocks, (0.5,), rng, method="stein")
    with pytest.raises(ValueError, match="levels must be positive"):
        graphs.graph_run(blocks, (0.5, 0.0), rng)
    with pytest.raises(ValueError, match="no graphs to train on"):
        Pool(blocks[[]])
    run = graphs.graph_run(blocks, (0.5,), rng, **SMALL)
    with pytest.raises(ValueError, match="2 level weights for 1 levels"):
        graphs.train(run, 1, level_weights=(1.0, 1.0), progress=False)
