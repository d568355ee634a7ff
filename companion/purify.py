"""Langevin purification: a stochastic defence that stands in front of any classifier.

S_K(x) is the state after K unadjusted Langevin steps that start at the image x itself; the defended
classifier averages logits over independent purifications::

    F(x) = E[C(S_K(x))], estimated by the mean of C(S_K(x_r)) over R replicas,      predicted: argmax F(x)

(Hill, Mitchell & Zhu 2021, "Stochastic Security"; the mid-run regime of Hill et al. 2022). The energy has
seen neither the classifier nor an attack. p(x) is proportional to exp(-E(x)/T); eps is the noise's standard
deviation a step, in the image's own units (a range of 2 for images in [-1, 1]).

An attacker differentiates S_K in one of two ways: by not differentiating it at all (``straight_through``,
the backward pass of BPDA, Athalye et al. 2018) or through every step (``differentiable``). The second is
the harder test, but no harder than the energy is curved: where E is piecewise linear, as with ReLU or leaky
ReLU units, its Hessian is zero and both gradients are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from companion.energies import Energy, frozen
from companion.langevin import langevin

__all__ = ["Defended", "Purifier", "hessian_product"]

_STORED_BYTES = 2**28  # a chain whose states fit in here (256 MiB) is kept whole for the way back


@dataclass(frozen=True, eq=False)
class Purifier:
    """S_K: images ``(B, *shape)`` -> images of the same shape, dtype and device, never clamped.

    ``energy`` maps ``(B, *shape)`` to ``(B,)``; ``steps`` is K, ``step_size`` eps, ``temperature`` T and
    ``base_std`` tau as in ``langevin``. ``energy=None`` is the control: the noise of K steps and nothing
    else. K independent draws of N(0, eps^2) add up to one of N(0, K eps^2), so that one draw of standard
    deviation eps sqrt(K) is made, equal in law to the K small ones.

    Raises ``ValueError`` for steps < 1, for a step size, temperature or base_std that is not positive and
    for a base measure without an energy.
    """

    energy: Energy | None
    steps: int
    step_size: float
    temperature: float = 1.0
    base_std: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        for name in ("step_size", "temperature", "base_std"):
            value = getattr(self, name)
            if value is not None and not value > 0:  # asked this way round, NaN is refused too
                raise ValueError(f"{name} must be positive, got {value}")
        if self.energy is None and self.base_std is not None:
            raise ValueError("noise-only steps have no base measure: base_std needs an energy")

    def noise_only(self) -> Purifier:
        """The control that belongs to this purifier: as many steps of the same size, without the energy."""
        return replace(self, energy=None, base_std=None)

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """S_K(x), without a graph; x: ``(B, *shape)``, left as it is.

        Raises ``ValueError`` for images that are not finite or not of floating point; ``DivergenceError``
        of the chain passes through.
        """
        _check_images(x)
        if self.energy is None:
            noise = torch.empty_like(x).normal_(generator=generator)
            return x.detach() + self.step_size * math.sqrt(self.steps) * noise
        return self._chain(x, self.steps, generator)

    def straight_through(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """S_K(x) whose derivative in x is taken to be the identity (BPDA, Athalye et al. 2018).

        The numbers are those of a plain call from the same generator state. Exact for ``energy=None``.
        """
        return _StraightThrough.apply(x, self, generator)

    def differentiable(
        self, x: Tensor, generator: torch.Generator | None = None, *, segments: int | None = None
    ) -> Tensor:
        """S_K(x), differentiable in x through all K steps, the noise held fixed.

        The numbers are those of a plain call from the same generator state. The chain's graph is never
        built: one step back maps the gradient v at ``x_{k+1}`` to::

            v - eps^2/2 (H(x_k) v / T + v / tau^2),      H the Hessian of E, which is symmetric,

        the gradient at x_k. It needs the states ``x_0 ... x_{K-1}``, each of x's size. ``segments=1`` keeps
        all of them; otherwise the chain is cut into so many parts of nearly equal length, of which only the
        first state is kept, and a part is run again, with the same noise, when the way back reaches it.
        Memory: segments + K/segments states; time: one more chain at most. ``None`` keeps all states if they
        fit into 256 MiB and takes about sqrt(K) segments if not.

        The energy must be differentiable twice by autograd, or have ``value_and_tangent``. Raises
        ``ValueError`` for segments outside 1..K, ``FloatingPointError`` on the way back if the gradient
        overflows, and what a plain call raises.
        """
        if segments is None:
            stored = self.steps * x.numel() * x.element_size()
            segments = 1 if stored <= _STORED_BYTES else math.ceil(math.sqrt(self.steps))
        if not 1 <= segments <= self.steps:
            raise ValueError(f"segments must be between 1 and {self.steps} steps, got {segments}")
        if self.energy is None:
            return self.straight_through(x, generator)  # noise is added: the derivative is the identity
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self(x, generator)
        _check_images(x)
        return _Sweep.apply(x, self, generator, segments)

    def _chain(self, x: Tensor, steps: int, generator: torch.Generator | None) -> Tensor:
        return langevin(
            self.energy, x, steps, self.step_size,
            temperature=self.temperature, base_std=self.base_std, generator=generator,
        ).x  # fmt: skip

    def _states(self, x: Tensor, steps: int, generator: torch.Generator) -> Tensor:
        """x_1 ... x_steps of the chain from x_0 = x, ``(steps, B, *shape)``."""
        return langevin(
            self.energy, x, steps, self.step_size,
            temperature=self.temperature, base_std=self.base_std, generator=generator, record_every=1,
        ).path  # fmt: skip

    def _pull_back(self, x: Tensor, v: Tensor) -> Tensor:
        """The transposed Jacobian of one step at x, applied to v."""
        half = self.step_size**2 / 2
        keep = 1.0 if self.base_std is None else 1 - half / self.base_std**2
        return (keep * v).sub_(hessian_product(self.energy, x, v), alpha=half / self.temperature)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, purifier: Purifier, generator: torch.Generator | None) -> Tensor:
        return purifier(x, generator)

    @staticmethod
    def backward(ctx: object, v: Tensor) -> tuple[Tensor, None, None]:
        return v, None, None


class _Sweep(torch.autograd.Function):
    """The chain forward, segment by segment, and one Hessian product a step backward."""

    @staticmethod
    def forward(
        ctx: object, x: Tensor, purifier: Purifier, generator: torch.Generator | None, segments: int
    ) -> Tensor:
        source = _generator_of(x.device) if generator is None else generator
        x = x.clone()  # the caller may change the images before the way back
        short, longer = divmod(purifier.steps, segments)
        *parts, last = [short + (i < longer) for i in range(segments)]
        ctx.purifier, ctx.segments = purifier, []
        for steps in parts:
            ctx.segments.append((x, steps, source.get_state()))
            x = purifier._chain(x, steps, source)
        # The way back begins with the last segment, whose states are therefore kept at once.
        path = purifier._states(x, last, source)
        ctx.last = (x, path[:-1])
        # A copy: a view of the path would keep all of it alive as long as the result.
        return path[-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, v: Tensor) -> tuple[Tensor, None, None, None]:
        purifier = ctx.purifier
        with frozen(purifier.energy):
            v = _back_through(purifier, *ctx.last, v)
            for start, steps, state in reversed(ctx.segments):
                again = torch.Generator(start.device)
                again.set_state(state)
                inner = purifier._states(start, steps - 1, again) if steps > 1 else ()
                v = _back_through(purifier, start, inner, v)
        if not torch.isfinite(v).all():
            raise FloatingPointError(
                f"the gradient through {purifier.steps} Langevin steps is not finite: it grows wherever the "
                "chain drives neighbours apart. Try fewer or smaller steps, a higher temperature or double "
                "precision."
            )
        return v, None, None, None


def _back_through(purifier: Purifier, start: Tensor, inner: Tensor | tuple[()], v: Tensor) -> Tensor:
    for x in reversed([start, *inner]):
        v = purifier._pull_back(x, v)
    return v


def hessian_product(energy: Energy, x: Tensor, v: Tensor) -> Tensor:
    """H(x) v, the Hessian of each chain's own energy times v; x and v: ``(*batch, *shape)``, as the result.

    The gradient of the slope grad E . v. An energy with ``value_and_tangent`` gives the slope in one pass
    forward, which makes the product a tenth cheaper than differentiating autograd's gradient once more.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        slope = _slope(energy, x, v.detach())
        if not slope.requires_grad:  # an energy without curvature
            return torch.zeros_like(x)
        return torch.autograd.grad(slope, x, materialize_grads=True)[0]


def _slope(energy: Energy, x: Tensor, v: Tensor) -> Tensor:
    """The sum over the chains of grad E . v."""
    tangent = getattr(energy, "value_and_tangent", None)
    if tangent is not None:
        try:
            return tangent(x, v)[1].sum()
        except ValueError:  # layers whose tangent it does not know
            pass
    (grad,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
    return (grad * v).sum()


@dataclass(frozen=True, eq=False)
class Defended:
    """A classifier behind a purifier: F(x), the mean logits over ``replicas`` purifications of each image.

    ``classifier`` maps ``(N, *shape)`` to logits ``(N, classes)`` and is in eval mode; its parameters are
    frozen meanwhile. Logits are averaged, not probabilities (Hill, Mitchell & Zhu 2021). All replicas go
    through as one batch, replica by replica, ``(R * B, *shape)``; ``max_batch`` limits how many states that
    are at once (and changes which noise falls on which image).

    Raises ``ValueError`` for replicas or max_batch below 1.
    """

    classifier: Callable[[Tensor], Tensor]
    purifier: Purifier
    replicas: int = 32
    max_batch: int | None = None

    def __post_init__(self) -> None:
        _at_least_one("replicas", self.replicas)
        if self.max_batch is not None:
            _at_least_one("max_batch", self.max_batch)

    def __call__(
        self,
        x: Tensor,
        generator: torch.Generator | None = None,
        *,
        replicas: int | None = None,
        gradient: str | None = None,
    ) -> Tensor:
        """Mean logits ``(B, classes)`` of images ``(B, *shape)``.

        ``replicas`` replaces the number of the defence for this call. ``gradient`` says how the result is
        differentiable in x: ``None`` not at all, ``"bpda"`` with the identity for the purifier's Jacobian,
        ``"full"`` through the whole chain. It does not change the numbers. Raises ``ValueError`` for another
        gradient, for replicas below 1 and for logits of another shape, ``FloatingPointError`` for logits
        that are not finite, ``DivergenceError`` when a chain diverges.
        """
        ways = {
            None: self.purifier,
            "bpda": self.purifier.straight_through,
            "full": self.purifier.differentiable,
        }
        if gradient not in ways:
            raise ValueError(f"gradient must be None, 'bpda' or 'full', got {gradient!r}")
        replicas = self.replicas if replicas is None else _at_least_one("replicas", replicas)
        states = x.repeat(replicas, *[1] * (x.ndim - 1))  # (R * B, *shape)
        wanted = gradient is not None and torch.is_grad_enabled()
        with torch.set_grad_enabled(wanted), frozen(self.classifier):
            parts = states.split(self.max_batch or max(1, len(states)))
            logits = torch.cat([self.classifier(ways[gradient](part, generator)) for part in parts])
        if logits.ndim != 2 or len(logits) != len(states):
            raise ValueError(
                f"the classifier maps {tuple(states.shape)} to {tuple(logits.shape)}, not to (N, classes)"
            )
        if not torch.isfinite(logits).all():
            raise FloatingPointError("the classifier's logits on purified images are not finite")
        return logits.unflatten(0, (replicas, len(x))).mean(0)  # (R, B, classes) -> (B, classes)

    def predict(
        self, x: Tensor, generator: torch.Generator | None = None, *, replicas: int | None = None
    ) -> Tensor:
        """argmax F(x), ``(B,)``: a random answer, the more settled the more replicas."""
        return self(x, generator, replicas=replicas).argmax(1)

    def accuracy(
        self, x: Tensor, y: Tensor, generator: torch.Generator | None = None, *, replicas: int | None = None
    ) -> float:
        """Share of the images ``(B, *shape)`` whose prediction is their label ``(B,)``."""
        if y.shape != x.shape[:1] or not len(y):
            raise ValueError(f"{tuple(y.shape)} labels for images {tuple(x.shape)}")
        return (self.predict(x, generator, replicas=replicas) == y).double().mean().item()


def _generator_of(device: torch.device) -> torch.Generator:
    """The generator that torch draws from on this device when none is passed."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]  # a tensor's device has its index
    return torch.default_generator


def _check_images(x: Tensor) -> None:
    if not x.is_floating_point() or x.ndim < 1:
        raise ValueError(f"images must be a floating-point batch (B, *shape), got {x.dtype} {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError("the images to purify are not all finite")


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
