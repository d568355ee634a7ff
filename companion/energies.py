"""What an energy is, and analytic energies whose density, sampler and normaliser are known.

Convention of the whole package: p(x) is proportional to exp(-E(x)/T). An energy is any callable that
maps ``(*batch, *shape)`` to ``(*batch,)``; ``batch`` is usually one dimension, ``(B,)``, and two,
``(S, B)``, when S models are trained side by side with stacked weights. Analytic energies live on
R^d: ``(*batch, d)`` to ``(*batch,)``; their ``log_normaliser`` is log of the integral of exp(-E) at
T = 1, so that ``log_density(x) = -E(x) - log_normaliser``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "Analytic",
    "Banana",
    "DoubleWell",
    "Energy",
    "Gaussian",
    "GaussianBernoulliRBM",
    "GaussianMixture",
    "Rings",
    "energy_and_gradient",
    "frozen",
    "gradient",
    "score",
]

#: Any callable from a batch ``(B, *shape)`` to its energies ``(B,)``, in units of T.
Energy = Callable[[Tensor], Tensor]


def energy_and_gradient(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """E(x) and its gradient in x, both detached; x: ``(*batch, *shape)`` -> ``(*batch,)``, like x.

    Chains do not interact, so the gradient of the summed energy is each chain's own gradient. An
    energy with a method ``value_and_gradient`` (a closed form) is asked for it instead of autograd.
    """
    closed_form = getattr(energy, "value_and_gradient", None)
    if closed_form is not None:
        with torch.no_grad():
            return closed_form(x)
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value = energy(x)
        (grad,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), grad


def gradient(energy: Energy, x: Tensor) -> Tensor:
    """The gradient of E at x, of x's shape."""
    return energy_and_gradient(energy, x)[1]


def score(energy: Energy, x: Tensor, temperature: float = 1.0) -> Tensor:
    """The score, grad log p(x) = -grad E(x) / T, of x's shape: the normaliser has no gradient."""
    return -gradient(energy, x) / temperature


@contextmanager
def frozen(energy: Energy) -> Iterator[None]:
    """Within the block no parameter of the energy requires a gradient; afterwards, each as before.

    Without it every Langevin step also builds the graph for the parameters' gradients, which
    sampling never uses. Finds the modules behind an ``nn.Module``, a bound method, a
    ``functools.partial`` or a closure; the state is restored also when the block raises.
    """
    parameters = [p for module in _modules(energy, depth=3) for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def _modules(thing: object, depth: int) -> list[nn.Module]:
    if isinstance(thing, nn.Module):
        return [thing]
    if depth == 0:
        return []
    inside = [getattr(thing, "__self__", None), getattr(thing, "func", None)]
    inside += getattr(thing, "args", None) or ()
    for cell in getattr(thing, "__closure__", None) or ():
        try:
            inside.append(cell.cell_contents)
        except ValueError:  # a name that is bound later than the function that closes over it
            continue
    return [module for part in inside if part is not None for module in _modules(part, depth - 1)]


class Analytic:
    """An energy on R^d with known normaliser and exact sampler. Subclasses define the three."""

    dim: int = 2
    log_normaliser: float

    def __call__(self, x: Tensor) -> Tensor:
        """E(x): ``(*batch, d)`` -> ``(*batch,)``."""
        raise NotImplementedError

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n independent exact samples at T = 1, ``(n, d)``, on the generator's device."""
        raise NotImplementedError

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x) in nats, ``(*batch, d)`` -> ``(*batch,)``."""
        return -self(x) - self.log_normaliser

    def check(self, x: Tensor) -> Tensor:
        """x itself, ``(*batch, d)``; raises ``ValueError`` if its points do not lie in R^d."""
        if x.shape[-1] != self.dim:
            raise ValueError(
                f"{type(self).__name__} lives on R^{self.dim}; got points of shape {tuple(x.shape)}"
            )
        return x


def _normal(n: int, dim: int, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else None
    return torch.randn(n, dim, generator=generator, device=device)


def _uniform(n: int, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else None
    return torch.rand(n, generator=generator, device=device)


class Gaussian(Analytic):
    """E(x) = (x - m)^T S^-1 (x - m) / 2 with any covariance S, ``(d, d)``, or variances ``(d,)``.

    Raises ``ValueError`` for a covariance that is not symmetric positive definite.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        mean, covariance = torch.as_tensor(mean).double(), torch.as_tensor(covariance).double()
        if covariance.ndim < 2:
            covariance = torch.diag(covariance.expand(mean.shape[-1]))
        if covariance.shape != (mean.shape[-1],) * 2 or not torch.allclose(covariance, covariance.T):
            raise ValueError(f"covariance must be a symmetric ({mean.shape[-1]}, {mean.shape[-1]}) matrix")
        factor, info = torch.linalg.cholesky_ex(covariance)
        if info.item():
            raise ValueError("covariance is not positive definite: an eigenvalue is zero or negative")
        self.mean, self.covariance, self.factor = mean, covariance, factor
        self.precision = torch.cholesky_inverse(factor)
        self.dim = mean.shape[-1]
        self.log_normaliser = float(self.dim / 2 * math.log(2 * math.pi) + factor.diagonal().log().sum())

    def __call__(self, x: Tensor) -> Tensor:
        centred = self.check(x) - self.mean.to(x)
        return 0.5 * ((centred @ self.precision.to(x)) * centred).sum(-1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        z = _normal(n, self.dim, generator)
        return self.mean.to(z) + z @ self.factor.T.to(z)


class GaussianMixture(Analytic):
    """``E(x) = -log sum_k w_k exp(-|x - m_k|^2 / 2 s^2)``: K Gaussians of one standard deviation s.

    means: ``(K, d)``; weights ``(K,)``, normalised here, equal if not given.

    Example:

    >>> import torch
    >>> from companion.energies import GaussianMixture
    >>> ring = GaussianMixture.ring(modes=8, radius=2.0, std=0.25)
    >>> x = ring.sample(1000, torch.Generator().manual_seed(0))
    >>> x.shape, ring(x).shape
    (torch.Size([1000, 2]), torch.Size([1000]))
    >>> bool(torch.allclose(ring.log_density(x), -ring(x) - ring.log_normaliser))
    True
    """

    def __init__(self, means: Tensor, std: float, weights: Tensor | None = None) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float32)
        if self.means.ndim != 2 or std <= 0:
            raise ValueError("a mixture needs means of shape (K, d) and std > 0")
        weights = torch.ones(len(self.means)) if weights is None else torch.as_tensor(weights).float()
        if weights.shape != (len(self.means),) or (weights <= 0).any():
            raise ValueError(f"weights must be {len(self.means)} positive numbers")
        self.weights = weights / weights.sum()
        self.std, self.dim = std, self.means.shape[1]
        self.log_normaliser = self.dim / 2 * math.log(2 * math.pi * std**2)

    @classmethod
    def ring(cls, modes: int = 8, radius: float = 2.0, std: float = 0.25) -> GaussianMixture:
        """``modes`` Gaussians evenly on a circle: the mode-coverage test of the field."""
        angle = torch.arange(modes) * (2 * math.pi / modes)
        return cls(radius * torch.stack([angle.cos(), angle.sin()], -1), std)

    @classmethod
    def grid(cls, side: int = 5, spacing: float = 2.0, std: float = 0.05) -> GaussianMixture:
        """side x side Gaussians on a square lattice centred on 0 (25 at the default)."""
        line = (torch.arange(side) - (side - 1) / 2) * spacing
        return cls(torch.cartesian_prod(line, line), std)

    @classmethod
    def moons(cls, points: int = 24, radius: float = 1.5, std: float = 0.15) -> GaussianMixture:
        """Two interleaved half circles, each a chain of ``points`` Gaussians that overlap into a band."""
        angle = torch.linspace(0, math.pi, points)
        upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], -1)
        return cls(radius * torch.cat([upper, -upper]), std)

    def __call__(self, x: Tensor) -> Tensor:
        x, means = self.check(x), self.means.to(x)
        squared = (x.unsqueeze(-2) - means).square().sum(-1)  # (*batch, K)
        return -torch.logsumexp(self.weights.log().to(x) - squared / (2 * self.std**2), -1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        z = _normal(n, self.dim, generator)
        mode = torch.multinomial(self.weights.to(z), n, replacement=True, generator=generator)
        return self.means.to(z)[mode] + self.std * z


class GaussianBernoulliRBM:
    """``E(x) = |x|^2/2 - b^T x - sum_j log 2 cosh((B^T x / 2 + c)_j)``: h in {-1, 1}^m summed out.

    The testbed of goodness-of-fit tests (Liu et al. 2016): a mixture of 2^m unit Gaussians, of means
    B h / 2 + b, whose score is cheap and whose normaliser is not. B: ``(*stack, d, m)``; b: ``(*stack, d)``;
    c: ``(*stack, m)``; S machines side by side if stack is ``(S,)``. Points are ``(*stack, n, d)``.

    Raises ``ValueError`` for parts that do not fit each other, or points that do not fit them.
    """

    def __init__(self, weight: Tensor, visible: Tensor, hidden: Tensor) -> None:
        *stack, d, m = weight.shape
        if visible.shape != (*stack, d) or hidden.shape != (*stack, m):
            raise ValueError(f"weight {tuple(weight.shape)} needs biases of {(*stack, d)} and {(*stack, m)}")
        self.weight, self.visible, self.hidden, self.dim = weight, visible, hidden, d

    @classmethod
    def random(
        cls, d: int = 50, m: int = 40, stack: tuple[int, ...] = (), generator: torch.Generator | None = None
    ) -> GaussianBernoulliRBM:
        """B of fair signs, b and c standard normal: the machines of the published test."""
        sign = 2.0 * (_uniform(math.prod(stack) * d * m, generator) < 0.5) - 1
        visible, hidden = (_normal(math.prod(stack), k, generator) for k in (d, m))
        return cls(sign.reshape(*stack, d, m), visible.reshape(*stack, d), hidden.reshape(*stack, m))

    def perturbed(self, std: float | Tensor, generator: torch.Generator | None) -> GaussianBernoulliRBM:
        """The same machine with B + std N(0, 1); ``std`` may be ``(*stack,)``, one a machine."""
        noise = torch.empty_like(self.weight).normal_(generator=generator)
        std = torch.as_tensor(std).to(noise)
        return type(self)(self.weight + std[..., None, None] * noise, self.visible, self.hidden)

    def __getitem__(self, index: Tensor) -> GaussianBernoulliRBM:
        """The machines ``index`` of a stack, copies allowed."""
        return type(self)(self.weight[index], self.visible[index], self.hidden[index])

    def _field(self, x: Tensor) -> Tensor:
        stack = self.weight.shape[:-2]
        if x.shape[-1] != self.dim or x.shape[: len(stack)] != stack:
            raise ValueError(f"this machine's points are {(*stack, '*', self.dim)}; got {tuple(x.shape)}")
        return x @ (self.weight.to(x) / 2) + self.hidden.to(x).unsqueeze(-2)  # (*stack, n, m)

    def __call__(self, x: Tensor) -> Tensor:
        field = self._field(x)
        quadratic = (x * (x / 2 - self.visible.to(x).unsqueeze(-2))).sum(-1)
        return quadratic - torch.logaddexp(field, -field).sum(-1)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E and its gradient x - b - B tanh(B^T x / 2 + c) / 2, in closed form."""
        drive = self._field(x).tanh() @ (self.weight.to(x).mT / 2)
        return self(x), x - self.visible.to(x).unsqueeze(-2) - drive

    def sample(self, n: int, generator: torch.Generator | None = None, sweeps: int = 2000) -> Tensor:
        """n chains a machine after ``sweeps`` of block Gibbs from random h: ``(*stack, n, d)``.

        h_j = 1 with probability sigmoid((B^T x + 2c)_j), then x ~ N(B h / 2 + b, I). Chains do not cross
        between distant modes; within a mode they forget their start in a few sweeps.
        """
        half, offset = self.weight.mT / 2, self.visible.unsqueeze(-2)
        x, uniform = (half.new_empty(*half.shape[:-2], n, k) for k in (self.dim, half.shape[-2]))
        h = (uniform.uniform_(generator=generator) < 0.5).to(x).mul_(2).sub_(1)
        for sweep in range(sweeps + 1):
            if sweep:
                chance = self._field(x).mul_(2).sigmoid_()
                h = (uniform.uniform_(generator=generator) < chance).to(x).mul_(2).sub_(1)
            x.normal_(generator=generator).add_(h @ half).add_(offset)
        return x


class DoubleWell(Analytic):
    """``E(x) = h (x_1^2 - 1)^2 + |x_2..d|^2 / 2``: wells at x_1 = -1 and 1 behind a barrier of height h."""

    def __init__(self, barrier: float = 4.0, dim: int = 2) -> None:
        from scipy import integrate  # here: importing the package costs what torch costs

        if barrier <= 0 or dim < 1:
            raise ValueError("the double well needs barrier > 0 and dim >= 1")
        self.barrier, self.dim = barrier, dim
        # The first coordinate is independent of the others: one-dimensional quadrature is exact enough.
        mass, _ = integrate.quad(lambda u: math.exp(-barrier * (u * u - 1) ** 2), -np.inf, np.inf)
        self.log_normaliser = math.log(mass) + (dim - 1) / 2 * math.log(2 * math.pi)

    def __call__(self, x: Tensor) -> Tensor:
        x = self.check(x)
        return self.barrier * (x[..., 0].square() - 1).square() + 0.5 * x[..., 1:].square().sum(-1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        z = _normal(n, self.dim, generator)
        edge = math.sqrt(1 + math.sqrt(40 / self.barrier))  # beyond it the density is below exp(-40)
        u = torch.linspace(-edge, edge, 20_001, dtype=torch.float64)
        z[:, 0] = _inverse_cdf(u, -self.barrier * (u**2 - 1) ** 2, _uniform(n, generator))
        return z


class Banana(Analytic):
    """E(x) = x_1^2 / 2a^2 + (x_2 - b (x_1^2 - a^2))^2 / 2s^2: a Gaussian bent along a parabola.

    The bend has Jacobian 1, so the normaliser stays that of the Gaussian, 2 pi a s.
    """

    def __init__(self, width: float = 1.5, bend: float = 0.5, std: float = 0.4) -> None:
        if min(width, std) <= 0:
            raise ValueError("the banana needs width > 0 and std > 0")
        self.width, self.bend, self.std = width, bend, std
        self.log_normaliser = math.log(2 * math.pi * width * std)

    def __call__(self, x: Tensor) -> Tensor:
        x1, x2 = self.check(x).unbind(-1)
        ridge = self.bend * (x1.square() - self.width**2)
        return x1.square() / (2 * self.width**2) + (x2 - ridge).square() / (2 * self.std**2)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        z = _normal(n, 2, generator)
        x1 = self.width * z[:, 0]
        x2 = self.bend * (x1.square() - self.width**2) + self.std * z[:, 1]
        return torch.stack([x1, x2], -1)


class Rings(Analytic):
    """``E(x) = -log sum_k exp(-(|x| - R_k)^2 / 2s^2)``: concentric rings, not a mixture of Gaussians.

    Each ring holds mass in proportion to its circumference; the normaliser is one radial integral.
    """

    def __init__(self, radii: tuple[float, ...] = (1.0, 2.5), std: float = 0.15) -> None:
        if min(radii) <= 0 or std <= 0:
            raise ValueError("rings need radii > 0 and std > 0")
        self.radii, self.std = tuple(radii), std
        r = torch.linspace(0, max(radii) + 10 * std, 40_001, dtype=torch.float64)[1:]
        self._radius, self._log_radial = r, r.log() - self._radial_energy(r)  # r dr: the area element
        self.log_normaliser = math.log(2 * math.pi * float(torch.trapezoid(self._log_radial.exp(), r)))

    def _radial_energy(self, r: Tensor) -> Tensor:
        offset = r.unsqueeze(-1) - torch.tensor(self.radii).to(r)
        return -torch.logsumexp(-offset.square() / (2 * self.std**2), -1)

    def __call__(self, x: Tensor) -> Tensor:
        # The norm's gradient is undefined at 0; the tiny shift keeps a chain started there finite.
        return self._radial_energy((self.check(x).square().sum(-1) + 1e-12).sqrt())

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        angle = 2 * math.pi * _uniform(n, generator)
        radius = _inverse_cdf(self._radius, self._log_radial, _uniform(n, generator))
        return radius.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)


def _inverse_cdf(grid: Tensor, log_density: Tensor, uniform: Tensor) -> Tensor:
    """Samples of a one-dimensional density tabulated on a fine grid, by linear interpolation."""
    cdf = torch.cumulative_trapezoid(log_density.exp(), grid)
    cdf = torch.cat([cdf.new_zeros(1), cdf])
    points = np.interp(uniform.double().cpu().numpy(), (cdf / cdf[-1]).numpy(), grid.numpy())
    return torch.from_numpy(points).to(uniform)
