"""How good samples are, and whether chains have mixed.

Sample quality: the Fréchet distance in the features of a small classifier trained in place (FD; it is
not FID and never called so), always with its real-against-real floor at the same counts; FID proper
through torchmetrics, an optional extra; energy distance and MMD; mode coverage. Detection: AUROC. Densities
of the plane: the normaliser by quadrature. Chains: split R-hat, effective sample size, autocorrelation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.energies import Energy
from companion.networks import initialise

__all__ = [
    "Coverage",
    "FeatureClassifier",
    "auroc",
    "autocorrelation",
    "coverage",
    "effective_sample_size",
    "energy_distance",
    "fid",
    "frechet_distance",
    "frechet_floor",
    "grid_log_normaliser",
    "mmd",
    "mode_coverage",
    "split_rhat",
    "train_classifier",
]


class FeatureClassifier(nn.Module):
    """Two 3x3 convolutions, pooling, a layer of ``features`` units, and the logits.

    Images ``(B, C, H, W)`` in [-1, 1] -> logits ``(B, classes)``; ``features(x)`` is the penultimate layer,
    ``(B, features)``, the space in which FD is measured.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        features: int = 32,
        width: int = 32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        channels, height, side = shape
        self.convs = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.penultimate = nn.Linear(2 * width * (height // 4) * (side // 4), features)
        self.head = nn.Linear(features, classes)
        initialise(self, generator)

    def features(self, x: Tensor) -> Tensor:
        """Activations of the last hidden layer, in (-1, 1): ``(B, C, H, W)`` -> ``(B, features)``."""
        return self.penultimate(self.convs(x)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        """Logits: ``(B, C, H, W)`` -> ``(B, classes)``."""
        return self.head(self.features(x))

    @torch.no_grad()
    def embed(self, x: Tensor, batch: int = 1000) -> Tensor:
        """The features of many images, ``(N, features)``, a batch at a time: the maps of a whole data set
        would take gigabytes."""
        return torch.cat([self.features(part) for part in x.split(batch)])


def train_classifier(
    x: Tensor,
    y: Tensor,
    *,
    epochs: int = 30,
    batch: int = 128,
    rate: float = 2e-3,
    noise: float = 0.1,
    features: int = 32,
    generator: torch.Generator | None = None,
) -> FeatureClassifier:
    """Train a ``FeatureClassifier`` on images ``(N, C, H, W)`` and labels ``(N,)``; returned in eval mode.

    Adam with the rate decayed to zero along a cosine; N(0, noise^2) on the images, so that the
    features do not hang on the exact grey levels.
    """
    net = FeatureClassifier(tuple(x.shape[1:]), int(y.max()) + 1, features, generator=generator).to(x.device)
    updates = epochs * max(1, len(x) // batch)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        rows = torch.randint(len(x), (batch,), generator=generator, device=x.device)
        noisy = x[rows] + noise * torch.empty_like(x[rows]).normal_(generator=generator)
        loss = F.cross_entropy(net(noisy), y[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^{1/2})`` of two feature sets ``(n, d)`` and ``(m, d)``.

    Biased upward at finite counts by an amount that depends on n, m and d: compare only at equal
    counts and quote ``frechet_floor`` beside it. NumPy arrays are taken too. Raises ``ValueError`` for
    fewer than two rows or non-finite features. Source: Heusel et al. 2017, eq. 6.

    Example:

    >>> import torch
    >>> from companion.metrics import frechet_distance
    >>> a = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    >>> round(frechet_distance(a, a + 2), 3)  # a shift alone: its squared length
    12.0
    """
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"need features (n, d) and (m, d), got {tuple(a.shape)} and {tuple(b.shape)}")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("features are not finite: the samples diverged, or the feature network did")
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # C_a C_b has the eigenvalues of the symmetric root C_b root, which eigvalsh finds stably.
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(mean + cov_a.trace() + cov_b.trace() - 2 * cross))


def frechet_floor(
    pool: Tensor, reference: Tensor, count: int, repeats: int = 20, generator: torch.Generator | None = None
) -> Tensor:
    """FD between ``count`` *real* features drawn from ``pool`` and the real ``reference``: ``(repeats,)``.

    What perfect samples would score at these counts; no method can be asked to fall below it. Raises
    ``ValueError`` when the pool holds fewer than ``count`` rows.
    """
    if count > len(pool):
        raise ValueError(f"the floor needs {count} real samples, the pool has {len(pool)}")
    floors = []
    for _ in range(repeats):
        rows = torch.randperm(len(pool), generator=generator, device=pool.device)[:count]
        floors.append(frechet_distance(pool[rows], reference))
    return torch.tensor(floors)


def fid(real: Tensor, fake: Tensor, feature: int | nn.Module = 2048, batch: int = 100) -> float:
    """FID proper, by torchmetrics with torch-fidelity's Inception: images ``(N, 3, H, W)`` in [-1, 1].

    Needs the extra ``pip install downhill-with-noise[fid]`` and, at first use, a network for the Inception
    weights; ``feature`` may be a module that maps uint8 images to features instead. Quote N and the
    version beside the figure. Raises ``ImportError`` with that advice if the extra is missing.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError("FID needs an optional extra: pip install 'downhill-with-noise[fid]'") from error
    metric = FrechetInceptionDistance(feature=feature).to(real.device)
    for images, is_real in ((real, True), (fake, False)):
        levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        for part in levels.split(batch):
            metric.update(part, real=is_real)
    return float(metric.compute())


def energy_distance(a: Tensor, b: Tensor) -> float:
    """``2 E|A-B| - E|A-A'| - E|B-B'|``, unbiased, of samples ``(n, *shape)`` and ``(m, *shape)``.

    Zero in expectation when both follow one law; a single estimate may be slightly negative.
    """
    return float(_discrepancy(a, b, torch.cdist, sign=-1.0))


def mmd(a: Tensor, b: Tensor, bandwidth: float | None = None) -> float:
    """Unbiased squared MMD of samples ``(n, *shape)`` and ``(m, *shape)``, flattened.

    The kernel is ``exp(-|x-y|^2 / 2h^2)``; h is ``bandwidth``, by default the pooled median distance.

    Example:

    >>> import torch
    >>> from companion.metrics import mmd
    >>> a, b = torch.randn(2, 300, 2, generator=torch.Generator().manual_seed(0))
    >>> abs(mmd(a, b)) < 0.01 < mmd(a, b + 1)
    True
    """
    a, b = a.flatten(1), b.flatten(1)
    if bandwidth is None:
        pooled = torch.cat([a, b])
        bandwidth = float(
            torch.pdist(pooled[torch.linspace(0, len(pooled) - 1, 1000).long().unique()]).median()
        )

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(x, y).square() / (2 * bandwidth**2))

    return float(_discrepancy(a, b, kernel, sign=1.0))


def _discrepancy(a: Tensor, b: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], sign: float) -> Tensor:
    a, b = a.flatten(1).double(), b.flatten(1).double()
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise ValueError("two samples of at least two points are needed")
    aa, bb = kernel(a, a), kernel(b, b)
    within_a = (aa.sum() - aa.diagonal().sum()) / (n * (n - 1))
    within_b = (bb.sum() - bb.diagonal().sum()) / (m * (m - 1))
    return sign * (within_a + within_b - 2 * kernel(a, b).mean())


@dataclass(frozen=True)
class Coverage:
    """How samples spread over known modes."""

    modes: int  #: modes that hold at least one high-quality sample
    high_quality: float  #: share of samples within ``radius`` standard deviations of a mode
    balance: float  #: entropy of the mode counts over log K: 1 is even


def coverage(real: Tensor, fake: Tensor, neighbours: int = 5) -> float:
    """Share of real points that have a fake in the ball reaching to their k-th nearest real neighbour.

    Features ``(n, d)`` and ``(m, d)``. 1 - 2^-k in expectation for fakes of the real law at m = n, as the
    paper derives; quality bought with diversity lowers it. Raises ``ValueError`` for fewer than k + 1 real
    points. Source: Naeem et al. 2020, eq. 9.
    """
    if len(real) <= neighbours or not len(fake):
        raise ValueError(f"coverage with k={neighbours} needs more than {neighbours} real points and a fake")
    radius = torch.cdist(real, real).kthvalue(neighbours + 1, dim=1).values  # the first is the point itself
    return (torch.cdist(real, fake).amin(1) <= radius).double().mean().item()


def auroc(inside: Tensor, outside: Tensor) -> Tensor:
    """The chance that a score from outside exceeds one from inside, ties counting half.

    The area under the ROC curve of a detector that calls high scores (energies) foreign: 1/2 is blind.
    ``(*stack, n)`` and ``(*stack, m)`` -> ``(*stack)``, in double precision. Raises ``ValueError`` for scores
    that are not numbers.
    """
    if inside.isnan().any() or outside.isnan().any():
        raise ValueError("some of the scores are not numbers")
    ordered, asked = inside.sort(-1).values.contiguous(), outside.contiguous()
    below, up_to = (torch.searchsorted(ordered, asked, side=side) for side in ("left", "right"))
    return (below + up_to).double().mean(-1) / (2 * inside.shape[-1])


def mode_coverage(x: Tensor, means: Tensor, std: float, radius: float = 4.0) -> Coverage:
    """Modes hit, high-quality share and balance of samples ``(n, d)`` against modes ``(K, d)``."""
    distance, nearest = torch.cdist(x, means.to(x)).min(1)
    good = distance < radius * std
    counts = torch.bincount(nearest[good], minlength=len(means)).double()
    share = counts / counts.sum().clamp(min=1)
    balance = float(-torch.xlogy(share, share).sum() / math.log(len(means))) if len(means) > 1 else 1.0
    return Coverage(int((counts > 0).sum()), float(good.double().mean()), balance)


def grid_log_normaliser(
    energy: Energy, half_side: float, resolution: int = 200, stack: int | None = None
) -> Tensor:
    """log of the integral of exp(-E) over the square [-a, a]^2, a scalar or ``(S,)``, in double precision.

    The midpoint rule on resolution^2 cells of side h: its error falls faster than any power of h once h is
    below the scale of the energy's smallest feature. ``stack`` is the number of stacked models, each given
    the same points. Raises ``ValueError`` if more than 1e-4 of the mass lies in the outermost ring of cells:
    the square is too small.
    """
    step = 2 * half_side / resolution
    line = (torch.arange(resolution) + 0.5) * step - half_side
    points = torch.cartesian_prod(line, line)  # (resolution^2, 2)
    parameter = next(iter(energy.parameters()), None) if isinstance(energy, nn.Module) else None
    points = points if parameter is None else points.to(parameter)
    lead = () if stack is None else (stack,)
    with torch.no_grad():
        parts = [-energy(part.expand(*lead, *part.shape)) for part in points.split(8192)]
    log_mass = torch.cat(parts, -1).double()
    total = torch.logsumexp(log_mass, -1)
    rim = (points.abs() > half_side - step).any(-1)
    share = (torch.logsumexp(log_mass[..., rim], -1) - total).exp().max().item()
    if not share <= 1e-4:  # asked this way round, NaN is refused too
        raise ValueError(f"a share of {share:.2g} of the mass lies at the rim of the square; enlarge it")
    return total + 2 * math.log(step)


def split_rhat(chains: Tensor, ranked: bool = False) -> float:
    """Split R-hat of a scalar along chains ``(n_chains, n_steps)``: near 1 when they agree.

    Each chain is halved, then R-hat = sqrt(((n-1)/n W + B/n) / W). Chains from several starts,
    ``(n_starts, n_chains, n_steps)``, are asked instead whether the starts agree: all first halves from one
    start are a pool, all second halves another, and R-hat = sqrt(1 + B/W) with B the variance between the
    pools' means and W that within a pool. Chains too short to mix one by one do not raise it.

    ``ranked``: the larger of R-hat of the ranks' normal scores and of those of the distance from the median.
    It asks for no moments, and sees chains that agree in mean but not in spread. Sources: Gelman et al.,
    Bayesian Data Analysis, section 11.4; Margossian et al. 2024 (nested); Vehtari et al. 2021 (ranked).
    Raises ``ValueError`` for fewer than four steps or other dimensions.
    """
    n = chains.shape[-1] // 2
    if n < 2 or chains.ndim not in (2, 3):
        raise ValueError(f"split R-hat needs (..., chains, steps >= 4), got {tuple(chains.shape)}")
    halves = torch.cat([chains[..., :n], chains[..., -n:]]).double()
    if ranked:
        folded = (halves - (halves.median() - (-halves).median()) / 2).abs()  # torch's median is the lower
        return max(_rhat(_normal_scores(v)) for v in (halves, folded))
    return _rhat(halves)


def _rhat(halves: Tensor) -> float:
    n = halves.shape[-1]
    if halves.ndim == 3:
        between_chains = halves.mean(2).var(1, correction=min(1, halves.shape[1] - 1))
        within = (between_chains + halves.var(2).mean(1)).mean()
        return float((1 + halves.mean((1, 2)).var() / within).sqrt())
    within = halves.var(1).mean()
    between = n * halves.mean(1).var()
    return float((((n - 1) / n * within + between / n) / within).sqrt())


def _normal_scores(values: Tensor) -> Tensor:
    """Phi^-1((rank - 3/8) / (size + 1/4)), ties sharing their mean rank."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    rank = count.cumsum(0).double() - (count.double() - 1) / 2
    return torch.special.ndtri((rank - 0.375) / (values.numel() + 0.25))[place]


def autocorrelation(series: Tensor, lags: int) -> Tensor:
    """Autocorrelation of ``(..., n)`` along the last dimension at lags 0..lags: ``(..., lags + 1)``."""
    n = series.shape[-1]
    if not 0 <= lags < n:
        raise ValueError(f"lags must be below the length {n}, got {lags}")
    centred = series.double() - series.double().mean(-1, keepdim=True)
    spectrum = torch.fft.rfft(centred, n=2 * n)  # padded: circular correlation would wrap around
    covariance = torch.fft.irfft(spectrum.abs().square(), n=2 * n)[..., : lags + 1]
    return covariance / covariance[..., :1]


def effective_sample_size(chains: Tensor) -> float:
    """Number of independent draws that ``(n_chains, n_steps)`` are worth for the mean of a scalar.

    Combined autocorrelation of all chains, summed over Geyer's initial positive pairs (Stan reference
    manual, section on effective sample size).
    """
    m, n = chains.shape
    rho = autocorrelation(chains, n - 1)
    variance = chains.double().var(1)
    within = variance.mean()
    total = (n - 1) / n * within + (chains.double().mean(1).var() if m > 1 else 0.0)
    combined = 1 - (within - (rho * variance.unsqueeze(1) * (n - 1) / n).mean(0)) / total
    pairs = combined[: 2 * (n // 2)].reshape(-1, 2).sum(1)
    positive = pairs[: int((pairs < 0).nonzero()[0])] if bool((pairs < 0).any()) else pairs
    positive = positive.cummin(0).values
    tau = max(float(2 * positive.sum() - 1), 1 / math.log10(m * n)) if len(positive) else 1.0
    return m * n / tau
