"""Metrics against closed forms, brute force, and a second implementation."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from companion import metrics


def test_frechet_distance_of_two_gaussians(rng):
    """d^2 = |m|^2 + tr(A + B - 2 (AB)^{1/2}); diagonal covariances, 200,000 draws."""
    a = torch.randn(200_000, 3, generator=rng) * torch.tensor([1.0, 2.0, 0.5])
    b = torch.randn(200_000, 3, generator=rng) * torch.tensor([1.5, 2.0, 1.0]) + torch.tensor([1.0, 0.0, 0.0])
    expected = 1.0 + 0.5**2 + 0.0 + 0.5**2
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=0.03)
    assert metrics.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_against_scipys_matrix_root(rng):
    from scipy import linalg

    a = torch.randn(300, 6, generator=rng) @ torch.randn(6, 6, generator=rng)
    b = torch.randn(200, 6, generator=rng) @ torch.randn(6, 6, generator=rng) + 0.3
    ca, cb = torch.cov(a.double().T).numpy(), torch.cov(b.double().T).numpy()
    expected = ((a.double().mean(0) - b.double().mean(0)) ** 2).sum().item()
    expected += (ca + cb - 2 * linalg.sqrtm(ca @ cb).real).trace()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_with_fewer_samples_than_features(rng):
    a, b = torch.randn(2, 10, 40, generator=rng)
    assert math.isfinite(metrics.frechet_distance(a, b))


def test_floor_falls_with_the_count_and_refuses_too_many(rng):
    pool, reference = torch.randn(2, 1000, 5, generator=rng)
    small = metrics.frechet_floor(pool, reference, 50, generator=rng).mean()
    large = metrics.frechet_floor(pool, reference, 800, generator=rng).mean()
    assert large < small
    with pytest.raises(ValueError, match="pool has 1000"):
        metrics.frechet_floor(pool, reference, 1001)
    with pytest.raises(ValueError, match="not finite"):
        metrics.frechet_distance(pool, reference * math.nan)
    with pytest.raises(ValueError, match="need features"):
        metrics.frechet_distance(pool, reference[:, :2])


def test_classifier_learns_and_features_have_its_width(rng):
    y = torch.arange(200) % 4
    x = torch.full((200, 1, 8, 8), -1.0)
    for i, label in enumerate(y.tolist()):
        x[i, 0, 2 * label : 2 * label + 2] = 1.0
    net = metrics.train_classifier(x, y, epochs=20, batch=50, features=7, generator=rng)
    assert (net(x).argmax(1) == y).float().mean() > 0.99
    torch.testing.assert_close(net.embed(x, batch=33), net.features(x))
    assert net.features(x).shape == (200, 7) and not any(p.requires_grad for p in net.parameters())


def test_fid_is_the_frechet_distance_of_the_given_features(rng):
    pytest.importorskip("torchmetrics")

    class Mean(nn.Module):
        num_features = 3

        def forward(self, x):
            return x.double().mean((2, 3))

    real = torch.rand(400, 3, 8, 8, generator=rng) * 2 - 1
    fake = (torch.rand(400, 3, 8, 8, generator=rng) * 2 - 1) * 0.7
    ours = metrics.frechet_distance(*(((v + 1) * 127.5).round().double().mean((2, 3)) for v in (real, fake)))
    assert metrics.fid(real, fake, feature=Mean()) == pytest.approx(ours, rel=1e-3)


def test_fid_without_its_extra_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ImportError, match=r"downhill-with-noise\[fid\]"):
        metrics.fid(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8))


def test_discrepancies_are_zero_in_expectation_and_see_a_shift(rng):
    null, shifted = {"mmd": [], "energy": []}, {"mmd": [], "energy": []}
    for _ in range(40):
        a, b = torch.randn(2, 100, 2, generator=rng)
        for shift, into in ((0.0, null), (1.0, shifted)):
            into["mmd"].append(metrics.mmd(a, b + shift, bandwidth=1.0))
            into["energy"].append(metrics.energy_distance(a, b + shift))
    for name in null:
        values = torch.tensor(null[name])
        assert abs(values.mean()) < 4 * values.std() / math.sqrt(40)  # unbiased
        assert torch.tensor(shifted[name]).min() > values.max()


def test_energy_distance_against_brute_force(rng):
    a, b = torch.randn(5, 2, generator=rng), torch.randn(4, 2, generator=rng)
    between = sum((x - y).norm() for x in a for y in b) / 20
    within_a = sum((x - y).norm() for x in a for y in a) / 20
    within_b = sum((x - y).norm() for x in b for y in b) / 12
    expected = (2 * between - within_a - within_b).item()
    assert metrics.energy_distance(a, b) == pytest.approx(expected, abs=1e-5)


def test_mode_coverage_counts(rng):
    means = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    x = torch.cat([means[:3].repeat(10, 1), torch.full((10, 2), 5.0)])
    coverage = metrics.mode_coverage(x, means, std=0.1)
    assert coverage.modes == 3 and coverage.high_quality == pytest.approx(0.75)
    assert coverage.balance == pytest.approx(math.log(3) / math.log(4))


def test_split_rhat_sees_disagreement_and_drift(rng):
    agreeing = torch.randn(4, 2000, generator=rng)
    assert metrics.split_rhat(agreeing) == pytest.approx(1.0, abs=0.005)
    assert metrics.split_rhat(agreeing + torch.arange(4.0).unsqueeze(1)) > 1.2
    assert metrics.split_rhat(agreeing + torch.linspace(0, 3, 2000)) > 1.2  # drift: the halves differ


def test_split_rhat_ranked_against_a_second_implementation(rng):
    """Rank-normalised by scipy, classic formula by numpy; even, odd and tied draws."""
    np, stats = pytest.importorskip("numpy"), pytest.importorskip("scipy.stats")

    def classic(v):
        n = v.shape[1]
        between, within = n * v.mean(1).var(ddof=1), v.var(1, ddof=1).mean()
        return np.sqrt(((n - 1) / n * within + between / n) / within)

    def scores(v):
        return stats.norm.ppf((stats.rankdata(v).reshape(v.shape) - 0.375) / (v.size + 0.25))

    for n in (100, 101):
        chains = torch.randn(4, n, generator=rng).double() + 0.2 * torch.arange(4).unsqueeze(1)
        for values in (chains, (2 * chains).round()):
            v = values.numpy()
            halves = np.concatenate([v[:, : n // 2], v[:, -(n // 2) :]])
            folded = np.abs(halves - np.median(halves))
            assert metrics.split_rhat(values) == pytest.approx(classic(halves), rel=1e-12)
            expected = max(classic(scores(halves)), classic(scores(folded)))
            assert metrics.split_rhat(values, ranked=True) == pytest.approx(expected, rel=1e-9)


def test_ranked_rhat_sees_spread_and_bears_heavy_tails(rng):
    spread = torch.randn(4, 2000, generator=rng) * torch.tensor([1.0, 1.0, 1.0, 3.0]).unsqueeze(1)
    assert metrics.split_rhat(spread) < 1.02 and metrics.split_rhat(spread, ranked=True) > 1.1
    cauchy = torch.randn(4, 2000, generator=rng) / torch.randn(4, 2000, generator=rng)
    assert metrics.split_rhat(cauchy, ranked=True) == pytest.approx(1.0, abs=0.01)
    assert metrics.split_rhat(cauchy + 2 * torch.arange(4.0).unsqueeze(1), ranked=True) > 1.1


def test_grouped_rhat_asks_the_starts_and_not_the_chains(rng):
    """3 starts of 100 chains that each stand still: mixed as groups, unmixed as chains."""
    frozen = torch.randn(3, 100, 1, generator=rng) + 0.1 * torch.randn(3, 100, 50, generator=rng)
    assert metrics.split_rhat(frozen) < 1.02 < 2 < metrics.split_rhat(frozen.flatten(0, 1))
    apart = frozen + torch.tensor([0.0, 0.0, 1.5]).reshape(3, 1, 1)
    drifting = frozen + torch.linspace(0, 3, 50)
    for ranked in (False, True):
        assert metrics.split_rhat(apart, ranked) > 1.1 and metrics.split_rhat(drifting, ranked) > 1.1
    pools = torch.cat([apart[..., :25], apart[..., 25:]]).double()
    between = pools.mean((1, 2)).var()
    within = pools.mean(2).var(1).mean() + pools.var(2).mean()
    assert metrics.split_rhat(apart) == pytest.approx(math.sqrt(1 + between / within))
    assert math.isfinite(metrics.split_rhat(apart[:, :1]))
    for shape in ((4,), (2, 3), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match="split R-hat needs"):
            metrics.split_rhat(torch.zeros(shape))


def test_auroc_against_scikit_learn_and_every_pair(rng):
    from sklearn.metrics import roc_auc_score

    inside, outside = torch.randn(3, 40, generator=rng), 0.8 + torch.randn(3, 60, generator=rng)
    for a, b in ((inside, outside), (inside.round(), outside.round())):
        pairs = (b.unsqueeze(1) > a.unsqueeze(2)).double() + 0.5 * (b.unsqueeze(1) == a.unsqueeze(2))
        found = metrics.auroc(a, b)
        torch.testing.assert_close(found, pairs.mean((1, 2)))
        labels = torch.cat([torch.zeros(40), torch.ones(60)])
        assert metrics.auroc(a[0], b[0]).item() == pytest.approx(
            roc_auc_score(labels, torch.cat([a[0], b[0]]))
        )
    assert metrics.auroc(inside[0], inside[0]) == 0.5 and metrics.auroc(torch.zeros(2), torch.ones(3)) == 1
    with pytest.raises(ValueError, match="not numbers"):
        metrics.auroc(inside, outside * math.nan)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_effective_sample_size_of_an_autoregression(phi, rng):
    """AR(1): n (1 - phi) / (1 + phi); 8 chains of 4,000, within 20 %."""
    noise = torch.randn(8, 4500, generator=rng)
    x, rows = noise[:, 0], []
    for t in range(4500):
        x = phi * x + noise[:, t]
        rows.append(x)
    chains = torch.stack(rows, 1)[:, 500:]
    expected = 32_000 * (1 - phi) / (1 + phi)
    assert metrics.effective_sample_size(chains) == pytest.approx(expected, rel=0.2)
    acf = metrics.autocorrelation(chains, 3).mean(0)
    assert acf.tolist() == pytest.approx([phi**k for k in range(4)], abs=0.05)


def test_autocorrelation_against_the_sum(rng):
    x = torch.randn(50, generator=rng).double()
    c = x - x.mean()
    expected = [(c[: 50 - k] * c[k:]).sum().item() / (c * c).sum().item() for k in range(6)]
    assert metrics.autocorrelation(x, 5).tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="below the length"):
        metrics.autocorrelation(x, 50)


def test_coverage_of_copies_of_one_mode_and_of_the_same_law():
    """1 for the points themselves, one half when one of two modes is missing, 1 - 2^-5 for fresh points.

    Seed 0; 1,000 points: a standard deviation of .006 and neighbourhoods that overlap, hence 3 percent.
    """
    gen = torch.Generator().manual_seed(0)
    real = torch.randn(1000, 2, generator=gen) + 20.0 * (torch.arange(1000) % 2).unsqueeze(1)
    assert metrics.coverage(real, real) == 1.0
    assert metrics.coverage(real, real[::2]) == pytest.approx(0.5, abs=0.001)
    assert metrics.coverage(real[::2], torch.randn(500, 2, generator=gen)) == pytest.approx(
        1 - 2**-5, abs=0.03
    )
    with pytest.raises(ValueError, match="more than 5 real points"):
        metrics.coverage(real[:5], real)


def test_frechet_distance_takes_arrays(rng):
    a, b = torch.randn(50, 3, generator=rng), torch.randn(50, 3, generator=rng)
    assert metrics.frechet_distance(a.numpy(), b.numpy()) == metrics.frechet_distance(a, b)
