"""Goodness-of-fit: Stein kernels against autograd, the RBM against enumeration, tests against their level."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats

from companion import stein
from companion.energies import Gaussian, GaussianBernoulliRBM, gradient, score
from companion.networks import MLP
from companion.stein import (
    Verdict,
    finite_set_features,
    finite_set_stein_test,
    kernel_stein_test,
    ksd_squared,
    learned_stein_test,
    linear_kernel_stein_test,
    median_bandwidth,
    power_objective,
    stein_kernel,
    train_power_critic,
    value_and_trace,
)

TESTS = {
    "learned": learned_stein_test,
    "ksd": kernel_stein_test,
    "linear": linear_kernel_stein_test,
    "fssd": finite_set_stein_test,
}


def _banded(rejections: torch.Tensor, alpha: float) -> None:
    """The count of rejections lies in the central 99.9 % of a binomial at level alpha."""
    low, high = stats.binom.interval(0.999, len(rejections), alpha)
    assert low <= rejections.sum().item() <= high


def _normal(samples: int, rows: int, d: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(samples, rows, d, generator=rng)


def test_the_stein_kernel_is_the_operator_applied_twice(rng):
    """u(x, y) from autograd: A_y of the field y -> k(x, y) e_i, then A_x of what comes out; in double."""
    d, h = 3, 1.3
    energy = Gaussian(torch.tensor([0.3, -0.2, 0.5]), torch.tensor([1.0, 2.0, 0.5]))
    x, y = (torch.randn(n, d, generator=rng, dtype=torch.float64) for n in (4, 5))

    def k(a, b):
        return torch.exp(-(a - b).square().sum() / (2 * h**2))

    def s(a):
        return -gradient(energy, a.unsqueeze(0))[0].detach()

    def once(a, b):  # xi(a, b)_i = A_b of k(a, .) in direction i: s_i(b) k + d k / d b_i
        (slope,) = torch.autograd.grad(k(a, b), b, create_graph=True)
        return s(b) * k(a, b) + slope

    expected = torch.empty(4, 5, dtype=torch.float64)
    for i, j in itertools.product(range(4), range(5)):
        a, b = (v.clone().requires_grad_(True) for v in (x[i], y[j]))
        xi = once(a, b)
        trace = sum(torch.autograd.grad(xi[c], a, retain_graph=True)[0][c] for c in range(d))
        expected[i, j] = s(a) @ xi + trace
    torch.testing.assert_close(stein_kernel(x, score(energy, x), y, score(energy, y), h), expected)


def test_stacked_bandwidths_and_chunks_change_nothing(rng, monkeypatch):
    x, s = _normal(5, 30, 4, rng), _normal(5, 30, 4, rng)
    h = median_bandwidth(x)
    whole = ksd_squared(x, s)
    torch.testing.assert_close(whole, torch.stack([ksd_squared(x[i], s[i], h[i]) for i in range(5)]))
    monkeypatch.setattr("companion._kernel_stein._ELEMENTS", 2 * 30 * 30)
    torch.testing.assert_close(ksd_squared(x, s), whole)


def test_median_bandwidth_is_the_median_of_the_distances(rng):
    for n in (6, 7):
        x = torch.randn(n, 3, generator=rng)
        ordered = torch.pdist(x).sort().values
        assert median_bandwidth(x).item() == pytest.approx(ordered[(len(ordered) - 1) // 2].item(), rel=1e-5)


def test_v_and_u_statistic_differ_by_the_diagonal_and_have_one_p_value(rng):
    x = torch.randn(60, 3, generator=rng, dtype=torch.float64)
    s = 0.3 - x
    h, n = median_bandwidth(x), 60
    v, u = (ksd_squared(x, s, h, statistic=kind) for kind in "VU")
    diagonal = (s.square().sum(-1) + 3 / h**2).sum()  # u(x, x) = |s|^2 + D / h^2
    torch.testing.assert_close(n**2 * v, n * (n - 1) * u + diagonal)
    assert v > 0
    one, other = (
        kernel_stein_test(x, s, statistic=kind, generator=torch.Generator().manual_seed(1)) for kind in "VU"
    )
    assert one.p_value == other.p_value
    torch.testing.assert_close(one.statistic, n * v)


def test_ksd_of_a_shifted_gaussian_by_quadrature(rng):
    """U is unbiased for E u(X, X'), here N(0, 1) against a model of mean 0.7: within 5 standard errors."""
    h, line = 1.1, torch.linspace(-8, 8, 801, dtype=torch.float64)
    weight = torch.exp(-(line**2) / 2) / math.sqrt(2 * math.pi) * (line[1] - line[0])
    grid = line.unsqueeze(-1)
    exact = weight @ stein_kernel(grid, 0.7 - grid, grid, 0.7 - grid, h) @ weight
    x = torch.randn(200, 100, 1, generator=rng, dtype=torch.float64)
    u = ksd_squared(x, 0.7 - x, h, statistic="U")
    assert abs(u.mean() - exact) < 5 * u.std() / math.sqrt(200)


def test_wild_bootstrap_has_uniform_p_values():
    """300 samples of 80 rows from the model itself, seed 0: the Kolmogorov distance stays below its 0.1 %."""
    rng = torch.Generator().manual_seed(0)
    x = _normal(300, 80, 3, rng)
    p = kernel_stein_test(x, -x, draws=300, generator=rng).p_value
    assert stats.kstest(p.numpy(), "uniform").pvalue > 1e-3
    _banded(p <= 0.05, 0.05)


def test_linear_statistic_by_hand_and_its_size():
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(41, 2, generator=rng)
    s, h = 0.5 - x, 1.4
    pairs = [
        stein_kernel(x[i : i + 1], s[i : i + 1], x[i + 1 :][:1], s[i + 1 :][:1], h) for i in range(0, 40, 2)
    ]
    u = torch.cat(pairs).flatten()
    verdict = linear_kernel_stein_test(x, s, bandwidth=h)
    torch.testing.assert_close(verdict.statistic, math.sqrt(20) * u.mean() / u.std())
    assert verdict.p_value.item() == pytest.approx(stats.norm.sf(verdict.statistic.item()), abs=1e-6)
    x = _normal(400, 200, 3, rng)
    _banded(linear_kernel_stein_test(x, -x).rejects(), 0.05)


def test_finite_set_features_against_autograd(rng):
    x = torch.randn(6, 3, generator=rng, dtype=torch.float64)
    places = torch.randn(2, 3, generator=rng, dtype=torch.float64)
    s, h = -x, 0.9
    expected = []
    for point, slope in zip(x, s, strict=True):
        row = []
        for v in places:
            leaf = point.clone().requires_grad_(True)
            k = torch.exp(-(leaf - v).square().sum() / (2 * h**2))
            row.append(slope * k.detach() + torch.autograd.grad(k, leaf)[0])
        expected.append(torch.cat(row) / math.sqrt(6))
    torch.testing.assert_close(finite_set_features(x, s, places, h), torch.stack(expected))


def test_finite_set_statistic_has_its_size(rng):
    x = _normal(200, 150, 3, rng)
    _banded(finite_set_stein_test(x, -x, steps=5, draws=500, generator=rng).rejects(), 0.05)


def test_exact_trace_against_autograd(rng):
    critic = MLP((4, 7, 6, 4), generator=rng).double()
    x = torch.randn(5, 4, generator=rng, dtype=torch.float64)
    f, trace = value_and_trace(critic, x)
    torch.testing.assert_close(f, critic(x))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: critic(v.unsqueeze(0))[0]))(x)
    torch.testing.assert_close(trace, jacobian.diagonal(dim1=-2, dim2=-1).sum(-1))
    # With dropped units it is the trace of the network without them; its gradient too is autograd's.
    keep = tuple(2.0 * (torch.rand(1, w, generator=rng).double() < 0.5) for w in (7, 6))

    def thinned(v):
        first, second, last = (layer for layer in critic.layers if hasattr(layer, "weight"))
        h = torch.nn.functional.silu(v @ first.weight + first.bias) * keep[0]
        h = torch.nn.functional.silu(h @ second.weight + second.bias) * keep[1]
        return h @ last.weight + last.bias

    f, trace = value_and_trace(critic, x, keep)
    torch.testing.assert_close(f, thinned(x))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: thinned(v.unsqueeze(0))[0]))(x)
    expected = jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(trace, expected)
    parameters = [p for p in critic.parameters() if p is not critic.layers[-1].bias]  # the trace has no b_3
    for ours, theirs in zip(
        torch.autograd.grad(trace.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_closed_form_trace_refuses_other_networks():
    with pytest.raises(ValueError, match="two hidden layers"):
        value_and_trace(MLP((4, 7, 4)), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="keep the shape"):
        value_and_trace(MLP((4, 7, 7, 3)), torch.zeros(2, 4))


def test_stacked_critics_are_those_trained_by_themselves(rng):
    x, y = _normal(3, 60, 2, rng), _normal(3, 20, 2, rng)
    s, t = 0.5 - x, 0.5 - y
    stack = MLP((2, 8, 8, 2), stack=3, generator=rng)
    alone = [MLP((2, 8, 8, 2)) for _ in range(3)]
    for i, net in enumerate(alone):
        state = {
            k: v[i].reshape(p.shape)
            for (k, v), p in zip(stack.state_dict().items(), net.parameters(), strict=True)
        }
        net.load_state_dict(state)
    settings = {"steps": 12, "rate": 1e-2, "dropout": 0.0, "every": 3}
    _, best = train_power_critic(stack, x, s, (y, t), **settings)
    for i, net in enumerate(alone):
        _, own = train_power_critic(net, x[i], s[i], (y[i], t[i]), **settings)
        torch.testing.assert_close(best[i], own, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(stack(x)[i], net(x[i]), rtol=1e-3, atol=1e-4)


def test_the_best_critic_is_kept(rng):
    """Trained far too long at a high rate, the critic returned is no worse on the validation rows."""
    x, y = _normal(4, 40, 3, rng), _normal(4, 40, 3, rng)
    s, t = 0.3 - x, 0.3 - y
    critic = MLP((3, 16, 16, 3), stack=4, generator=rng)
    critic, best = train_power_critic(critic, x, s, (y, t), steps=80, rate=3e-2, every=2, generator=rng)
    f, trace = value_and_trace(critic, y)
    operator = (t * f).sum(-1) + trace
    torch.testing.assert_close(operator.mean(-1) / operator.std(-1), best)
    value = power_objective(operator, f.square().sum(-1), 0.5)
    torch.testing.assert_close(value, best - 0.5 * f.square().sum(-1).mean(-1), rtol=1e-3, atol=1e-3)


def test_learned_test_has_its_size_and_sees_a_shift(rng):
    x = _normal(200, 300, 3, rng)
    settings = {"hidden": 16, "steps": 40, "rate": 1e-2, "generator": rng}
    _banded(learned_stein_test(x, -x, **settings).rejects(), 0.05)
    assert learned_stein_test(x[:40], 0.8 - x[:40], **settings).rejects().float().mean() > 0.9


@pytest.mark.parametrize("name", TESTS)
def test_all_tests_are_called_alike(name, rng):
    """One sample is a stack of one, the generator fixes the result, and the wrong model is rejected."""
    x = torch.randn(400, 2, generator=rng)
    run = lambda x, s: TESTS[name](x, s, generator=torch.Generator().manual_seed(3))  # noqa: E731
    one, again, stacked = run(x, 1 - x), run(x, 1 - x), run(x[None], 1 - x[None])
    assert one.p_value.shape == () and stacked.p_value.shape == (1,)
    assert one.statistic == again.statistic
    torch.testing.assert_close(one.statistic, stacked.statistic[0], rtol=1e-3, atol=1e-4)
    assert one.rejects().item() and not one.rejects(one.p_value.item() / 2).item()
    with pytest.raises(ValueError, match="of one shape"):
        run(x, x[:-1])
    with pytest.raises(ValueError, match="rows"):
        run(x[:1], x[:1])
    with pytest.raises(ValueError, match="scores are not finite"):
        run(x, torch.where(x > 2, math.nan, x))


def test_what_the_tests_refuse(rng):
    x = torch.randn(50, 2, generator=rng)
    for alpha in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            Verdict(torch.tensor(1.0), torch.tensor(0.1)).rejects(alpha)
    with pytest.raises(ValueError, match='"U" or "V"'):
        ksd_squared(x, x, statistic="W")
    with pytest.raises(ValueError, match="draws"):
        kernel_stein_test(x, x, draws=0)
    with pytest.raises(ValueError, match="bandwidth"):
        kernel_stein_test(x, x, bandwidth=0.0)
    with pytest.raises(ValueError, match="copies"):
        kernel_stein_test(x[:1].expand(50, 2), x)
    with pytest.raises(ValueError, match="train"):
        finite_set_stein_test(x, x, train=1.0)
    with pytest.raises(ValueError, match="split"):
        learned_stein_test(x, x, split=(0.9, 0.1))
    with pytest.raises(ValueError, match="at least 10"):
        learned_stein_test(x, x)
    with pytest.raises(ValueError, match="dropout"):
        learned_stein_test(x, x, dropout=1.0)
    assert set(stein.__all__) >= {test.__name__ for test in TESTS.values()}


def _small_machine(rng: torch.Generator) -> tuple[GaussianBernoulliRBM, torch.Tensor, torch.Tensor]:
    """A machine of 3 x 4 in double, with its 16 means and their weights by enumeration."""
    weight = torch.randn(3, 4, generator=rng, dtype=torch.float64)
    b, c = (torch.randn(k, generator=rng, dtype=torch.float64) for k in (3, 4))
    h = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    means = h @ weight.T / 2 + b
    # Integrating x out of exp(b.x - |x|^2/2 + h^T B^T x/2 + c.h) leaves |mean|^2 / 2 + c.h.
    return GaussianBernoulliRBM(weight, b, c), means, (means.square().sum(-1) / 2 + h @ c).softmax(0)


def test_rbm_is_the_mixture_it_sums_out(rng):
    machine, means, weights = _small_machine(rng)
    x = torch.randn(20, 3, generator=rng, dtype=torch.float64)
    mixture = torch.logsumexp(weights.log() - (x.unsqueeze(1) - means).square().sum(-1) / 2, -1)
    difference = machine(x) + mixture  # a constant: the log of the normaliser
    torch.testing.assert_close(difference, difference[0].expand(20))


def test_rbm_score_against_autograd(rng):
    machine = GaussianBernoulliRBM.random(6, 5, stack=(3,), generator=rng).perturbed(0.1, rng)
    x = torch.randn(3, 7, 6, generator=rng).requires_grad_(True)
    value = machine(x)
    (expected,) = torch.autograd.grad(value.sum(), x)
    ours, slope = machine.value_and_gradient(x.detach())
    torch.testing.assert_close(ours, value)
    torch.testing.assert_close(slope, expected)
    torch.testing.assert_close(machine[torch.tensor([2, 0])](x[[2, 0]]), value[[2, 0]])


def test_rbm_sampler_against_enumeration():
    """Mean and second moments of 20,000 chains of 30 sweeps, seed 0: within 5 standard errors."""
    rng = torch.Generator().manual_seed(0)
    machine, means, weights = _small_machine(rng)
    x = machine.sample(20_000, rng, sweeps=30)
    second = means.unsqueeze(-1) * means.unsqueeze(-2) + torch.eye(3)
    for values, exact in (
        (x, weights @ means),
        (x.unsqueeze(-1) * x.unsqueeze(-2), (weights[:, None, None] * second).sum(0)),
    ):
        assert ((values.mean(0) - exact).abs() < 5 * values.std(0) / math.sqrt(20_000)).all()


def test_rbm_refuses_what_does_not_fit(rng):
    with pytest.raises(ValueError, match="biases"):
        GaussianBernoulliRBM(torch.zeros(3, 2), torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="points"):
        GaussianBernoulliRBM.random(4, 3, stack=(2,), generator=rng)(torch.zeros(3, 5, 4))
