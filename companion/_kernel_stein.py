"""Does this sample come from that density? Tests by kernels, from samples x and the score at them.

A Stein test never sees the normaliser, nor a sample of the model: only s(x) = grad log q(x) = -grad E(x)/T
at the data. Every test here, and the learned one, is called alike, ``test(x, s, *, ...) -> Verdict``, with x
and s ``(n, d)``, or ``(S, n, d)`` for S independent samples (or models) tested side by side. Rows are taken
to be independent draws, in an order that carries no information. Public names are re-exported by
``companion.stein``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Verdict",
    "finite_set_features",
    "finite_set_stein_test",
    "kernel_stein_test",
    "ksd_squared",
    "linear_kernel_stein_test",
    "median_bandwidth",
    "stein_kernel",
]

_ELEMENTS = 2**22  # entries of the Stein matrices that are held at once: 16 MB in single precision


@dataclass(frozen=True)
class Verdict:
    """What a test says, each a scalar or ``(S,)``: the larger the statistic, the worse the model."""

    statistic: Tensor
    p_value: Tensor

    def rejects(self, alpha: float = 0.05) -> Tensor:
        """Is the hypothesis "x follows the density" rejected at level alpha? Raises if alpha is no level."""
        if not 0 < alpha < 1:
            raise ValueError(f"alpha is a probability between 0 and 1, got {alpha}")
        return self.p_value <= alpha


def median_bandwidth(x: Tensor, points: int = 500) -> Tensor:
    """The median distance between two rows among the first ``points``: ``(*stack, n, d)`` -> ``(*stack,)``.

    Raises ``ValueError`` if it is 0: more than half of the pairs are equal.
    """
    x = x[..., :points, :]
    n = x.shape[-2]
    distance = torch.cdist(x, x).flatten(-2)
    # n of the n^2 entries are a row's distance to itself, and the smallest.
    median = distance.kthvalue(n + (n * n - n + 1) // 2, dim=-1).values
    if not (median > 0).all():
        raise ValueError("the median distance is 0: half of the rows are copies of others")
    return median


def stein_kernel(x: Tensor, s: Tensor, y: Tensor, t: Tensor, bandwidth: float | Tensor) -> Tensor:
    """u(x, y) = A_x A_y k(x, y), ``k = exp(-|x-y|^2 / 2h^2)``, between all rows: ``(*stack, n, m)``.

    With s, t the scores at x, y, and D the dimension::

        u = k [s.t + (s - t).(x - y)/h^2 + D/h^2 - |x - y|^2/h^4].

    x, s: ``(*stack, n, D)``; y, t: ``(*stack, m, D)``; bandwidth h: a number or ``(*stack,)``. Two matrix
    products. Source: Liu, Lee & Jordan 2016, theorem 3.6; Chwialkowski et al. 2016.
    """
    h2 = torch.as_tensor(bandwidth, dtype=x.dtype, device=x.device)[..., None, None].square()
    centre = x.mean(-2, keepdim=True)  # distances from inner products cancel less near the origin
    x, y = x - centre, y - centre
    xx, yy = (v.square().sum(-1) for v in (x, y))
    cross = x @ y.mT
    squared = (xx.unsqueeze(-1) + yy.unsqueeze(-2) - 2 * cross).clamp_(min=0)
    # (s - x/h^2).(t - y/h^2) holds s.t and both mixed terms; what it has too much of x.y/h^4 is taken back.
    bracket = (s - x / h2) @ (t - y / h2).mT
    bracket += (s * x).sum(-1, keepdim=True) / h2 + (t * y).sum(-1, keepdim=True).mT / h2
    bracket -= cross / h2.square()
    bracket += x.shape[-1] / h2 - squared / h2.square()
    return bracket.mul_(torch.exp(squared.mul_(-0.5 / h2)))


def ksd_squared(
    x: Tensor, s: Tensor, bandwidth: float | Tensor | None = None, *, statistic: str = "V"
) -> Tensor:
    """The squared kernel Stein discrepancy between a sample and a density, a scalar or ``(S,)``.

    "V" is the mean of u over all pairs, never negative; "U" that over the pairs of different rows,
    unbiased. The bandwidth is the median distance if not given. Raises ``ValueError`` for an unknown
    statistic, for shapes that differ, fewer than 2 rows and scores that are not finite.

    Example:

    >>> import torch
    >>> from companion.stein import ksd_squared
    >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    >>> right, wrong = ksd_squared(x, -x), ksd_squared(x, -(x - 1))  # scores of N(0, I) and of N(1, I)
    >>> bool(wrong > 10 * right)
    True
    """
    return _kernel_statistics(x, s, bandwidth, statistic, None)[0]


def kernel_stein_test(
    x: Tensor,
    s: Tensor,
    *,
    bandwidth: float | Tensor | None = None,
    draws: int = 1000,
    statistic: str = "V",
    generator: torch.Generator | None = None,
) -> Verdict:
    """Test by the kernel Stein discrepancy, threshold by the wild bootstrap: n KSD^2 and its p-value.

    Under the hypothesis (1/n) sum_ij u(x_i, x_j) is distributed like (1/n) sum_ij w_i w_j u(x_i, x_j) with
    independent signs w; ``draws`` of them are compared with the statistic, p = (1 + #larger) / (1 + draws).
    Signs square to 1, so that the diagonal, which is all that tells V from U, is in every draw the same:
    both statistics have one p-value. Cost: n^2 (D + draws). Raises as ``ksd_squared``.
    Source: Chwialkowski, Sejdinovic & Gretton 2016 for independent data.
    """
    if draws < 1:
        raise ValueError(f"the bootstrap needs draws >= 1, got {draws}")
    # One set of signs for the whole stack: its samples are independent of each other as they are.
    signs = torch.empty(draws, x.shape[-2], dtype=x.dtype, device=x.device)
    signs.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
    squared, p_value = _kernel_statistics(x, s, bandwidth, statistic, signs)
    return Verdict(squared * x.shape[-2], p_value)


def _kernel_statistics(
    x: Tensor, s: Tensor, bandwidth: float | Tensor | None, statistic: str, signs: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if statistic not in ("U", "V"):
        raise ValueError(f'statistic must be "U" or "V", got {statistic!r}')
    x, s, lead = paired(x, s, least=2)
    n, squared, p_values = x.shape[-2], [], []
    for part in chunks(len(x), n * n):
        u = stein_kernel(x[part], s[part], x[part], s[part], _bandwidth(bandwidth, x, part))
        diagonal = u.diagonal(dim1=-2, dim2=-1).sum(-1)
        u.diagonal(dim1=-2, dim2=-1).zero_()
        off = u.sum((-2, -1))
        squared.append((off + diagonal) / n**2 if statistic == "V" else off / (n * (n - 1)))
        if signs is not None:
            larger = ((signs @ u) * signs).sum(-1) >= off.unsqueeze(-1)  # (chunk, draws)
            p_values.append((1 + larger.sum(-1)) / (1 + signs.shape[0]))
    p_value = torch.cat(p_values).reshape(lead) if signs is not None else None
    return torch.cat(squared).reshape(lead), p_value


def linear_kernel_stein_test(
    x: Tensor, s: Tensor, *, bandwidth: float | Tensor | None = None, generator: torch.Generator | None = None
) -> Verdict:
    """Test by the linear-time estimate of KSD^2: u averaged over disjoint pairs of rows, a z-test.

    The n/2 values u(x_1, x_2), u(x_3, x_4), ... are independent, so sqrt(n/2) mean/std is normal under the
    hypothesis; one-sided. Cost: n D. Draws nothing (``generator`` is there to be called alike). Raises
    ``ValueError`` as ``ksd_squared``, with fewer than 8 rows. Source: Liu, Lee & Jordan 2016, section 4.
    """
    x, s, lead = paired(x, s, least=8)
    h = torch.cat([_bandwidth(bandwidth, x, part) for part in chunks(len(x), x.shape[-2] * 500)])
    even = x.shape[-2] // 2 * 2
    (a, sa), (b, sb) = ((x[:, i:even:2, None], s[:, i:even:2, None]) for i in (0, 1))  # (S, n/2, 1, D)
    u = stein_kernel(a, sa, b, sb, h.unsqueeze(-1)).squeeze((-2, -1))
    statistic = math.sqrt(even // 2) * u.mean(-1) / u.std(-1)
    return Verdict(statistic.reshape(lead), upper_tail(statistic).reshape(lead))


def finite_set_stein_test(
    x: Tensor,
    s: Tensor,
    *,
    locations: int = 5,
    train: float = 0.2,
    steps: int = 40,
    rate: float = 0.1,
    draws: int = 2000,
    generator: torch.Generator | None = None,
) -> Verdict:
    """Test by the finite-set Stein discrepancy: the Stein witness at J optimised locations.

    The witness of a Gaussian kernel is g(v) = E[xi(x, v)], xi = k(x, v) (s(x) - (x - v)/h^2). FSSD^2 is the
    mean of its square over the J locations and D coordinates, estimated without bias. On the first share
    ``train`` of the rows, locations and bandwidth are moved by ``steps`` Adam steps of ``rate`` towards the
    largest FSSD^2 / std; the rest is tested, n FSSD^2 against ``draws`` of sum_i (z_i^2 - 1) w_i, with w the
    eigenvalues of the features' covariance. Cost: n D J. Raises ``ValueError`` for shares, locations or
    draws out of range and as ``ksd_squared``. Source: Jitkrittum et al. 2017.
    """
    if not 0 < train < 1 or min(locations, draws) < 1:
        raise ValueError(f"need 0 < train < 1, locations, draws >= 1; got {train}, {locations}, {draws}")
    x, s, lead = paired(x, s, least=20)
    cut = max(2, round(train * x.shape[-2]), locations)
    statistics, p_values = [], []
    for part in chunks(len(x), x.shape[-2] * x.shape[-1] * locations):
        tau = _optimised_features(x[part], s[part], cut, locations, steps, rate, generator)
        n = tau.shape[-2]
        centred = tau - tau.mean(-2, keepdim=True)
        weights = torch.linalg.eigvalsh(centred.mT @ centred / n).clamp(min=0)
        z = torch.empty(draws, weights.shape[-1], dtype=x.dtype, device=x.device)
        null = weights @ z.normal_(generator=generator).square_().sub_(1).mT  # (chunk, draws)
        value = n * _fssd_squared(tau)
        statistics.append(value)
        p_values.append((1 + (null >= value.unsqueeze(-1)).sum(-1)) / (1 + draws))
    return Verdict(torch.cat(statistics).reshape(lead), torch.cat(p_values).reshape(lead))


def _optimised_features(
    x: Tensor,
    s: Tensor,
    cut: int,
    locations: int,
    steps: int,
    rate: float,
    generator: torch.Generator | None,
) -> Tensor:
    """The features of the rows behind ``cut`` at locations and bandwidth chosen on those before it."""
    fit, fit_s = x[:, :cut], s[:, :cut]
    rows = torch.rand(fit.shape[:2], generator=generator, device=x.device).topk(locations).indices
    start = fit.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # (S, J, D): rows of the data
    scale = fit.std(1, keepdim=True)  # so that one rate fits data of any width
    shift = torch.zeros_like(start, requires_grad=True)
    log_h = median_bandwidth(fit).log().requires_grad_(True)
    adam = torch.optim.Adam([shift, log_h], lr=rate)
    with torch.enable_grad():
        for _ in range(steps):
            tau = finite_set_features(fit, fit_s, start + scale * shift, log_h.exp())
            spread = 2 * (tau @ tau.mean(-2).unsqueeze(-1)).squeeze(-1).std(-1)  # std under the alternative
            adam.zero_grad()
            (-_fssd_squared(tau) / (spread + 1e-6)).sum().backward()
            adam.step()
    with torch.no_grad():
        return finite_set_features(x[:, cut:], s[:, cut:], start + scale * shift, log_h.exp())


def finite_set_features(x: Tensor, s: Tensor, locations: Tensor, bandwidth: float | Tensor) -> Tensor:
    """tau(x) = xi(x, v_j) / sqrt(D J) for all j and coordinates: ``(*stack, n, J D)``.

    ``FSSD^2 = |E tau|^2``.     x, s: ``(*stack, n, D)``; locations ``(*stack, J, D)``; bandwidth a number or
    ``(*stack,)``.
    """
    h2 = torch.as_tensor(bandwidth, dtype=x.dtype, device=x.device)[..., None, None, None].square()
    delta = x.unsqueeze(-2) - locations.unsqueeze(-3)  # (*stack, n, J, D)
    kernel = torch.exp(-delta.square().sum(-1, keepdim=True) / (2 * h2))
    return (kernel * (s.unsqueeze(-2) - delta / h2)).flatten(-2) / math.sqrt(locations.shape[-2:].numel())


def _fssd_squared(tau: Tensor) -> Tensor:
    """``|E tau|^2`` without bias: tau_i . tau_j averaged over i != j; ``(*stack, n, F)`` -> ``(*stack,)``."""
    n = tau.shape[-2]
    return (tau.sum(-2).square().sum(-1) - tau.square().sum((-2, -1))) / (n * (n - 1))


def paired(x: Tensor, s: Tensor, least: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """x and s as ``(S, n, d)`` and the results' shape; raises ``ValueError`` for what no test can use."""
    if x.shape != s.shape or x.ndim not in (2, 3):
        raise ValueError(
            f"samples and their scores are (n, d) or (S, n, d), of one shape; got {tuple(x.shape)} and "
            f"{tuple(s.shape)}"
        )
    if x.shape[-2] < least:
        raise ValueError(f"this test needs at least {least} rows, got {x.shape[-2]}")
    for name, value in (("samples", x), ("scores", s)):
        if not torch.isfinite(value).all():
            raise ValueError(f"some {name} are not finite: a chain diverged, or the energy has a kink there")
    x, s = x.detach(), s.detach()
    return (x, s, tuple(x.shape[:1])) if x.ndim == 3 else (x.unsqueeze(0), s.unsqueeze(0), ())


def chunks(count: int, elements: int) -> Iterator[slice]:
    """Slices of a stack of ``count`` whose members need ``elements`` entries each: bounds the memory."""
    size = max(1, _ELEMENTS // elements)
    return (slice(i, i + size) for i in range(0, count, size))


def upper_tail(z: Tensor) -> Tensor:
    """P(Z > z) of a standard normal, the p-value of a one-sided z-test."""
    return 0.5 * torch.erfc(z / math.sqrt(2))


def _bandwidth(bandwidth: float | Tensor | None, x: Tensor, part: slice) -> Tensor:
    if bandwidth is None:
        return median_bandwidth(x[part])
    bandwidth = torch.as_tensor(bandwidth, dtype=x.dtype, device=x.device).expand(len(x))
    if not (bandwidth > 0).all():
        raise ValueError("the bandwidth must be positive")
    return bandwidth[part]
