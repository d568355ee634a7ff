"""Langevin sampling: the unadjusted chain and its Metropolis-adjusted twin.

Both walk on the density p(x) proportional to exp(-U(x)) with::

    U(x) = E(x) / T + |x|^2 / (2 tau^2)

where the second term, the confining base measure, is present only if ``base_std`` (tau) is given.
``langevin`` has a discretisation bias that grows with the step size; ``mala`` removes it by accepting
or rejecting each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from companion import _compiled
from companion._compiled import NotCompilableError
from companion.energies import Energy, energy_and_gradient, frozen

__all__ = ["Chain", "DivergenceError", "Gauges", "NotCompilableError", "langevin", "mala"]

Callback = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Gauges:
    """How the chains moved. Each is a mean over the chains (a scalar, or ``(S,)`` for stacked models)."""

    energy_start: Tensor  #: E at the first state
    energy: Tensor  #: E at the last state at which a gradient was taken
    drift: Tensor  #: r: mean length of the gradient displacement, ``eps^2/2 |grad U|``, at that state
    noise: Tensor  #: expected length of the noise displacement, eps sqrt(D)
    acceptance: Tensor  #: mean acceptance probability over the chain; 1 for the unadjusted chain

    @property
    def rho(self) -> Tensor:
        """Drift over noise: about 0 free diffusion, about eps/2s at stationarity, above 1 descent."""
        return self.drift / self.noise

    def __str__(self) -> str:
        rows = vars(self) | {"rho": self.rho}
        return ", ".join(f"{name} {value.float().mean().item():.4g}" for name, value in rows.items())


@dataclass(frozen=True)
class Chain:
    """The end of a run of chains, and the way there if it was recorded."""

    x: Tensor  #: ``(*batch, *shape)``, last states
    gauges: Gauges
    path: Tensor | None = None  #: ``(records, *batch, *shape)``: states after every record_every-th step
    energies: Tensor | None = None  #: ``(records, *batch)``: E at the state from which each such step started


class DivergenceError(RuntimeError):
    """A chain left every bound. ``step`` is where, ``gauges`` the last ones (which may be non-finite)."""

    def __init__(self, step: int, gauges: Gauges, what: str) -> None:
        self.step, self.gauges = step, gauges
        super().__init__(
            f"{what} at step {step} of the chain ({gauges}). "
            "Try a smaller step size or learning rate, a higher temperature, more noise on the data, "
            "or a confining base measure (base_std)."
        )


def langevin(
    energy: Energy,
    x: Tensor,
    steps: int,
    step_size: float | Tensor,
    *,
    temperature: float | Tensor = 1.0,
    base_std: float | None = None,
    generator: torch.Generator | None = None,
    record_every: int | None = None,
    callback: Callback | None = None,
    compile: bool | None = None,
) -> Chain:
    """``steps`` unadjusted Langevin steps from x: x <- x - eps^2/2 grad U(x) + eps z, z ~ N(0, I).

    x: ``(*batch, *shape)``, any shape, floating dtype and device; it is not modified. ``step_size``
    (eps, the noise's standard deviation) and ``temperature`` may be tensors of shape ``(S,)`` when the
    batch is ``(S, B)``: one value a stacked model. ``record_every=k`` keeps every k-th state in
    ``path``; ``callback(step, x, energy)`` is called after each step. Parameters of the energy are
    frozen meanwhile. The states are left unclamped: clamp for display only.

    ``compile`` says how the steps are taken; the numbers are the plain loop's up to rounding, and so is
    the generator's state. False: one operation after the other. None: on a GPU a float32 or float64
    ``nn.Module`` has its steps captured once as a CUDA graph and replayed, the noise drawn within, up to 64
    steps at a time, whatever the weights, step size and temperature; everything else, and an energy that
    cannot be captured, takes the plain loop. True: on a GPU the captured steps, elsewhere
    ``torch.compile``'s (seconds for the first call, hardly faster on a CPU), or ``NotCompilableError``, which
    says why not. A captured energy must not change between the steps of a call other than through x. With a
    ``callback`` the loop is always plain.

    Raises ``DivergenceError`` with step and gauges when an energy or state is not finite,
    ``ValueError`` for an argument out of range and for states of another shape than the energy names in
    ``shape``, and ``TypeError`` for states that are no tensor. Source: the gradient step eps^2/2 with noise
    eps, as in Nijkamp et al. 2020 and Hill et al. 2022.

    Example:

    >>> import torch
    >>> from companion.energies import Gaussian
    >>> from companion.langevin import langevin
    >>> rng = torch.Generator().manual_seed(0)
    >>> gaussian = Gaussian(torch.zeros(1), torch.ones(1))
    >>> chain = langevin(gaussian, torch.zeros(5000, 1), steps=50, step_size=1.0, generator=rng)
    >>> bool((chain.x.var() - 4 / 3).abs() < 0.1)  # too wide at eps = s: 1 / (1 - eps^2 / 4 s^2)
    True
    """
    _check(energy, x, steps, step_size, temperature, base_std, record_every)
    plain = callback is not None or (generator is not None and generator.device.type != x.device.type)
    how = None if plain else _compiled.choose(compile, energy, x)  # such a generator: torch's own error
    if how is not None:
        try:
            with frozen(energy), torch.no_grad():
                expected = _compiled.reference(energy, x)
                kernel = _Kernel.build(x, expected[0], step_size, temperature, base_std)
                run = _compiled.run(
                    how, energy, x, steps, kernel.coefficients(), expected, generator, record_every
                )
            return _chain(run, kernel.gauges(run.first, run.value, run.grad, run.x), steps)
        except NotCompilableError:
            if compile:
                raise
            _compiled.give_up(energy)
    watch = _Watch(x.device)
    path, energies = [], []

    def after(step: int, x: Tensor, value: Tensor) -> None:
        if record_every and (step + 1) % record_every == 0:
            path.append(x.clone())
            energies.append(value)
        if callback is not None:
            callback(step, x, value)

    kernel, x, first, value, grad = _walk(
        energy, x, steps, step_size, temperature, base_std, generator, watch, after
    )
    gauges = kernel.gauges(first, value, grad, x)
    finite = watch.step >= 0 or bool(torch.isfinite(x).all())
    return _chain(_compiled.Run(x, first, value, grad, path, energies, watch.step, finite), gauges, steps)


def unasked(
    energy: Energy,
    x: Tensor,
    steps: int,
    step_size: float | Tensor,
    *,
    temperature: float | Tensor = 1.0,
    base_std: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Gauges, Tensor]:
    """``langevin``'s plain loop for whoever must not wait for the device: it looks at no number it makes.

    Returns the last states, the gauges, and on the device the step at which ``langevin`` would have raised,
    -1 if it would not.
    """
    watch = _Watch(x.device, every=None)
    kernel, x, first, value, grad = _walk(
        energy, x, steps, step_size, temperature, base_std, generator, watch, lambda step, x, value: None
    )
    lost = ~torch.isfinite(x).all() & (watch.flag < 0)
    trouble = watch.flag.masked_fill(lost, steps - 1)
    return x, kernel.gauges(first, value, grad, x), trouble


def _walk(
    energy: Energy,
    x: Tensor,
    steps: int,
    step_size: float | Tensor,
    temperature: float | Tensor,
    base_std: float | None,
    generator: torch.Generator | None,
    watch: _Watch,
    after: Callback,
) -> tuple[_Kernel, Tensor, Tensor, Tensor, Tensor]:
    """The plain loop: kernel, last states, first energy, and energy and gradient at the last state but one.

    It ends at the step at which ``watch`` sees trouble.
    """
    x = x.detach().clone()
    noise = torch.empty_like(x)
    with frozen(energy):
        for step in range(steps):
            value, grad = energy_and_gradient(energy, x)
            if step == 0:
                first = value
                kernel = _Kernel.build(x, value, step_size, temperature, base_std)
            if watch.sees_trouble(step, value):
                break
            noise.normal_(generator=generator)
            kernel.move(x, grad, noise)
            after(step, x, value)
    return kernel, x, first, value, grad


def _chain(run: _compiled.Run, gauges: Gauges, steps: int) -> Chain:
    if run.trouble >= 0:
        raise DivergenceError(run.trouble, gauges, "non-finite energy")
    if not run.finite:
        raise DivergenceError(steps - 1, gauges, "non-finite state")
    path, energies = (torch.stack(kept) if kept else None for kept in (run.path, run.energies))
    return Chain(run.x, gauges, path, energies)


def mala(
    energy: Energy,
    x: Tensor,
    steps: int,
    step_size: float | Tensor,
    *,
    temperature: float | Tensor = 1.0,
    base_std: float | None = None,
    generator: torch.Generator | None = None,
    record_every: int | None = None,
    callback: Callback | None = None,
) -> Chain:
    """``steps`` Metropolis-adjusted Langevin steps: the same proposal, accepted with probability::

        min(1, exp(U(x) - U(x')) q(x | x') / q(x' | x)),   q(b | a) = N(b; a - eps^2/2 grad U(a), eps^2 I),

    so that p itself is stationary whatever the step size. Arguments, shapes and errors as in
    ``langevin``; a *proposal* of infinite energy is merely rejected. ``gauges.acceptance`` is the mean
    acceptance probability (0.57 is the classic optimum in high dimension). Source: Roberts & Tweedie 1996.

    Example:

    >>> import torch
    >>> from companion.energies import Gaussian
    >>> from companion.langevin import mala
    >>> rng = torch.Generator().manual_seed(0)
    >>> gaussian = Gaussian(torch.zeros(1), torch.ones(1))
    >>> chain = mala(gaussian, torch.zeros(5000, 1), steps=50, step_size=1.0, generator=rng)
    >>> bool((chain.x.var() - 1).abs() < 0.1), bool(chain.gauges.acceptance > 0.9)
    (True, True)
    """
    _check(energy, x, steps, step_size, temperature, base_std, record_every)
    x = x.detach().clone()
    path, energies = [], []
    with frozen(energy):
        value, grad = first, _ = energy_and_gradient(energy, x)
        kernel = _Kernel.build(x, value, step_size, temperature, base_std)
        if not torch.isfinite(value).all():
            raise DivergenceError(0, kernel.gauges(first, value, grad, x), "non-finite energy")
        accepted, uniform, noise = torch.zeros_like(value), torch.empty_like(value), torch.empty_like(x)
        for step in range(steps):
            noise.normal_(generator=generator)
            proposal = kernel.move(x.clone(), grad, noise)
            new_value, new_grad = energy_and_gradient(energy, proposal)
            # The noise that the reverse step x' -> x would have had to draw.
            reverse = (x - kernel.move(proposal.clone(), new_grad, None)) / kernel.eps
            log_ratio = kernel.log_density_ratio(x, proposal, value, new_value)
            log_ratio = log_ratio + (kernel.squared(noise) - kernel.squared(reverse)) / 2
            log_ratio = torch.where(log_ratio.isnan(), -math.inf, log_ratio)  # a diverged proposal
            accepted += log_ratio.clamp(max=0).exp()
            accept = uniform.uniform_(generator=generator).log() < log_ratio
            moved = accept.reshape(*accept.shape, *[1] * (x.ndim - accept.ndim))
            x, grad = torch.where(moved, proposal, x), torch.where(moved, new_grad, grad)
            value = torch.where(accept, new_value, value)
            if record_every and (step + 1) % record_every == 0:
                path.append(x)
                energies.append(value)
            if callback is not None:
                callback(step, x, value)
    gauges = kernel.gauges(first, value, grad, x, accepted / steps)
    return Chain(x, gauges, torch.stack(path) if path else None, torch.stack(energies) if path else None)


@dataclass(frozen=True)
class _Kernel:
    """One step's coefficients, as numbers or as tensors that broadcast against x."""

    eps: float | Tensor
    half: float | Tensor  # eps^2 / 2
    inverse_t: float | Tensor  # 1 / T
    base_std: float | None
    dims: tuple[int, ...]  # the dimensions of one state, those that are not batch

    @classmethod
    def build(
        cls,
        x: Tensor,
        value: Tensor,
        step_size: float | Tensor,
        temperature: float | Tensor,
        base_std: float | None,
    ) -> _Kernel:
        if value.shape != x.shape[: value.ndim]:
            raise ValueError(
                f"the energy maps {tuple(x.shape)} to {tuple(value.shape)}, which is not its batch part"
            )

        def shaped(v: float | Tensor) -> float | Tensor:
            if isinstance(v, Tensor) and v.ndim:
                return v.to(x).reshape(*v.shape, *[1] * (x.ndim - v.ndim))
            return float(v)

        eps = shaped(step_size)
        return cls(eps, eps**2 / 2, 1.0 / shaped(temperature), base_std, tuple(range(value.ndim, x.ndim)))

    def move(self, x: Tensor, grad: Tensor, noise: Tensor | None) -> Tensor:
        """x <- x - eps^2/2 (grad/T + x/tau^2) + eps noise, in place."""
        if self.base_std is not None:
            x.mul_(1 - self.half / self.base_std**2)
        if isinstance(self.eps, Tensor) or isinstance(self.inverse_t, Tensor):
            x.sub_(self.half * self.inverse_t * grad)
            return x if noise is None else x.add_(self.eps * noise)
        x.add_(grad, alpha=-self.half * self.inverse_t)
        return x if noise is None else x.add_(noise, alpha=self.eps)

    def coefficients(self) -> tuple[float | Tensor | None, float | Tensor, float | Tensor]:
        """``move``'s three: x <- decay x + slope grad + eps noise; no decay without a base measure."""
        decay = None if self.base_std is None else 1 - self.half / self.base_std**2
        return decay, -self.half * self.inverse_t, self.eps

    def squared(self, v: Tensor) -> Tensor:
        """|v|^2 of each state: ``(*batch, *shape)`` -> ``(*batch,)``."""
        return v.square().sum(self.dims) if self.dims else v.square()

    def log_density_ratio(self, x: Tensor, new: Tensor, value: Tensor, new_value: Tensor) -> Tensor:
        """U(x) - U(new), the log of p(new) / p(x)."""
        inverse_t = self.inverse_t
        if isinstance(inverse_t, Tensor):
            inverse_t = inverse_t.reshape(inverse_t.shape[: value.ndim])
        ratio = (value - new_value) * inverse_t
        if self.base_std is not None:
            ratio = ratio + (self.squared(x) - self.squared(new)) / (2 * self.base_std**2)
        return ratio

    def gauges(
        self, first: Tensor, value: Tensor, grad: Tensor, x: Tensor, acceptance: Tensor | None = None
    ) -> Gauges:
        slope = grad * self.inverse_t
        if self.base_std is not None:
            slope = slope + x / self.base_std**2
        size = math.prod(x.shape[value.ndim :])
        eps = self.eps if isinstance(self.eps, Tensor) else x.new_full((), self.eps)  # no copy from the host
        noise = eps.flatten().squeeze() * math.sqrt(size)
        acceptance = torch.ones_like(value) if acceptance is None else acceptance

        def mean(v: Tensor) -> Tensor:
            return v.float().mean(-1) if v.ndim else v.float()

        drift = self.squared(self.half * slope).sqrt()
        return Gauges(mean(first), mean(value), mean(drift), noise, mean(acceptance))


class _Watch:
    """Looks for non-finite energies without making a GPU wait at every step, or, ``every`` None, at all."""

    def __init__(self, device: torch.device, every: int | None = 50) -> None:
        self.every = every
        asked = device.type == "cpu" and every is not None
        self.flag = None if asked else torch.full((), -1, device=device)
        self.first = -1

    @property
    def step(self) -> int:
        """The first step with a non-finite energy, -1 if there was none."""
        return self.first if self.flag is None else int(self.flag)

    def sees_trouble(self, step: int, value: Tensor) -> bool:
        total = value.sum()
        if self.flag is None:
            if not math.isfinite(total.item()):
                self.first = step
            return self.first >= 0
        # Not torch.where, which would bring the number to the device, and wait for that.
        self.flag = self.flag.masked_fill((self.flag < 0) & ~torch.isfinite(total), step)
        return self.every is not None and step % self.every == self.every - 1 and self.step >= 0


def _check(
    energy: Energy,
    x: Tensor,
    steps: int,
    step_size: float | Tensor,
    temperature: float | Tensor,
    base_std: float | None,
    record_every: int | None,
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"chains start from a tensor, got {type(x).__name__}; torch.as_tensor(x) makes one")
    shape = getattr(energy, "shape", None)
    if isinstance(shape, tuple) and tuple(x.shape[x.ndim - len(shape) :]) != shape:
        raise ValueError(
            f"the energy takes states (*batch, {', '.join(map(str, shape))}), got {tuple(x.shape)}"
        )
    for name, value in (("step_size", step_size), ("temperature", temperature), ("base_std", base_std)):
        # Asked this way round, NaN is refused too.
        if value is not None and not bool(torch.as_tensor(value > 0).all()):
            raise ValueError(f"{name} must be positive, got {value}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if record_every is not None and record_every < 1:
        raise ValueError(f"record_every must be at least 1, got {record_every}")
    if not x.is_floating_point():
        raise ValueError(f"chains need floating-point states, got {x.dtype}")
