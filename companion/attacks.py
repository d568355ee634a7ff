"""Worst-case images: PGD on a deterministic classifier, and the attack on a randomised defence.

Both climb the cross-entropy within a ball around the image (projected gradient descent, Madry et al. 2018)::

    x <- Pi(x + eta sign g)   or, in l2,   x <- Pi(x + eta g / |g|),

where Pi projects on the ball of the given radius and then on the range of pixels. They differ in the gradient
g and in when an image counts as broken. A classifier that draws noise has no single gradient: g is that of
the cross-entropy of the *mean logits* over several draws (expectation over transformation, Athalye et al.
2018). How the noise's own chain is differentiated is the defence's business, ``gradient="bpda"`` or
``"full"``. Its predictions are random too, so that asking often enough breaks any such defence; the
two-stage count of ``attack_defended`` limits this, and the count with ``step_size=0`` measures what is left.

Radius and step size are in the image's own units: images in [-1, 1] have twice the radius of those in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.energies import frozen

__all__ = ["AttackResult", "Randomised", "attack_defended", "pgd", "project", "wilson_interval"]

Classifier = Callable[[Tensor], Tensor]


class Randomised(Protocol):
    """A classifier that draws: mean logits ``(B, classes)`` over ``replicas`` draws, images ``(B, *shape)``.

    ``gradient`` is ``None``, ``"bpda"`` or ``"full"``: how the result is differentiable in x, as in
    ``companion.purify.Defended``.
    """

    def __call__(
        self, x: Tensor, generator: torch.Generator | None, *, replicas: int, gradient: str | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class AttackResult:
    """What an attack on B images came to."""

    natural: Tensor  #: ``(B,)`` bool: right before the attack
    broken: Tensor  #: ``(B,)`` bool: wrong before the attack, or broken by it
    iterate: Tensor  #: ``(B,)`` long: where it broke, 0 the start; restarts count on; -1 where it held
    proposals: Tensor  #: ``(B,)`` long: how often the attack's own prediction was wrong, each time re-tested
    adversarial: Tensor  #: ``(B, *shape)``: the image that broke it, of one that held that of highest loss

    @property
    def natural_accuracy(self) -> float:
        """The share of the B images that are classified right before any attack, in [0, 1]."""
        return self.natural.double().mean().item()

    @property
    def robust_accuracy(self) -> float:
        """The share of the B images that no iterate of the attack broke, in [0, 1]."""
        return 1 - self.broken.double().mean().item()

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the robust accuracy (Wilson): what the choice of these B images leaves open."""
        return wilson_interval(int((~self.broken).sum()), len(self.broken))

    def robust_after(self, iterate: int) -> float:
        """Robust accuracy if the attack had ended at this iterate: a curve that can only fall."""
        return 1 - (self.broken & (self.iterate <= iterate)).double().mean().item()


def pgd(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    radius: float,
    step_size: float,
    steps: int,
    norm: str = "linf",
    restarts: int = 1,
    generator: torch.Generator | None = None,
    bounds: tuple[float, float] | None = (-1.0, 1.0),
    random_start: bool = True,
) -> Tensor:
    """Adversarial images ``(B, *shape)`` of a deterministic classifier: PGD, Madry et al. 2018.

    x: ``(B, *shape)``, y: ``(B,)`` labels; ``classifier`` gives logits ``(B, classes)`` and is in eval mode.
    Of each image the first iterate that is classified wrongly is returned, otherwise the one of highest
    loss; an image that is wrong as it stands comes back unchanged. ``norm`` is ``"linf"`` or ``"l2"``,
    ``bounds`` the range of pixels or ``None``. ``random_start`` begins uniformly in the ball; each of
    ``restarts`` begins anew with the images that are still right, as AutoAttack does (Croce & Hein 2020).

    Raises ``ValueError`` for arguments out of range, shapes that do not fit and images outside the bounds,
    ``FloatingPointError`` for a gradient that is not finite.
    """
    _check(x, y, radius, step_size, steps, norm, restarts, bounds)
    if restarts > 1 and not random_start:
        raise ValueError("without a random start every restart repeats the first attack")
    with torch.no_grad():
        natural = _answers(classifier(x), y)
    return _search(
        classifier, None, natural, x, y, radius=radius, step_size=step_size, steps=steps, norm=norm,
        restarts=restarts, generator=generator, bounds=bounds, random_start=random_start,
    ).adversarial  # fmt: skip


def attack_defended(
    defended: Randomised,
    x: Tensor,
    y: Tensor,
    *,
    radius: float,
    step_size: float,
    steps: int,
    norm: str = "linf",
    restarts: int = 1,
    generator: torch.Generator | None = None,
    bounds: tuple[float, float] | None = (-1.0, 1.0),
    random_start: bool = True,
    gradient: str = "bpda",
    attack_replicas: int = 8,
    replicas: int = 32,
) -> AttackResult:
    """Attack a randomised defence and count in two stages, as Hill, Mitchell & Zhu 2021 do.

    At each of the steps + 1 iterates of PGD (arguments as in ``pgd``) the mean logits of ``attack_replicas``
    draws give the gradient and a prediction. A wrong prediction only *proposes* a break: the image is
    classified again with ``replicas`` fresh draws, and is broken for good if that is wrong as well; then it
    leaves the batch. Before the attack ``replicas`` draws judge each image as it stands (``natural``); one
    that is wrong counts as broken at iterate 0.

    ``gradient="bpda"`` takes the identity for the purifier's Jacobian, ``"full"`` goes through its whole
    chain: BPDA with EOT, and the full-gradient attack with EOT (Athalye et al. 2018). ``step_size=0`` is the
    control of the count: every image stays where it is (also without a random start) and is asked as often
    as the attack would.

    Raises what ``pgd`` raises, ``ValueError`` for an unknown gradient or fewer than one replica, and passes
    through what the defence raises.
    """
    _check(x, y, radius, step_size, steps, norm, restarts, bounds)
    if gradient not in ("bpda", "full"):
        raise ValueError(f"gradient must be 'bpda' or 'full', got {gradient!r}")
    for name, value in (("attack_replicas", attack_replicas), ("replicas", replicas)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")

    def look(z: Tensor) -> Tensor:
        return defended(z, generator, replicas=attack_replicas, gradient=gradient)

    def judge(z: Tensor) -> Tensor:
        return defended(z, generator, replicas=replicas)

    with torch.no_grad():
        natural = _answers(judge(x), y)
    return _search(
        look, judge, natural, x, y, radius=radius, step_size=step_size, steps=steps, norm=norm,
        restarts=restarts, generator=generator, bounds=bounds, random_start=random_start,
    )  # fmt: skip


def project(
    z: Tensor, centre: Tensor, radius: float, norm: str, bounds: tuple[float, float] | None = None
) -> Tensor:
    """Project z ``(B, *shape)`` on the ball around ``centre``, then on the bounds, which hold the centre.

    In l-infinity this is the nearest point of both. In l2 it is a point of both: clipping towards a range
    that holds the centre never leads away from it. Raises ``ValueError`` for another norm.
    """
    if norm == "linf":
        z = torch.minimum(torch.maximum(z, centre - radius), centre + radius)
    elif norm == "l2":
        offset = z - centre
        z = centre + offset * (radius / _lengths(offset).clamp(min=1e-12)).clamp(max=1)
    else:
        raise ValueError(f"norm must be 'linf' or 'l2', got {norm!r}")
    return z if bounds is None else z.clamp(*bounds)


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of a binomial share by Wilson 1927, 95 % at this z: inside [0, 1], honest at 0 and 1."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes in {trials} trials have no share")
    share, spread = successes / trials, z**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def _search(
    look: Classifier,
    judge: Classifier | None,
    natural: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    radius: float,
    step_size: float,
    steps: int,
    norm: str,
    restarts: int,
    generator: torch.Generator | None,
    bounds: tuple[float, float] | None,
    random_start: bool,
) -> AttackResult:
    """The one loop: ``look`` gives differentiable logits; ``judge`` re-tests a break, or ``None``."""
    iterate = torch.where(natural, -1, 0)
    proposals = torch.zeros_like(iterate)
    adversarial, highest = x.clone(), torch.full(x.shape[:1], -math.inf, dtype=torch.float64, device=x.device)
    for restart in range(restarts):
        rows = (iterate < 0).nonzero().squeeze(1)  # the images that still hold
        z = x[rows]
        if random_start and step_size > 0:
            z = project(_start(z, radius, norm, generator), z, radius, norm, bounds)
        for step in range(steps + 1):
            if not len(rows):
                break
            climbing = step < steps and step_size > 0
            logits, loss, slope = _climb(look, z, y[rows], climbing)
            proposed = (~_answers(logits, y[rows])).nonzero().squeeze(1)
            proposals[rows[proposed]] += 1
            if judge is not None and len(proposed):
                with torch.no_grad():
                    proposed = proposed[~_answers(judge(z[proposed]), y[rows[proposed]])]
            broken = torch.zeros_like(rows, dtype=torch.bool)
            broken[proposed] = True
            keep = broken | (loss > highest[rows])
            adversarial[rows[keep]], highest[rows[keep]] = z[keep], loss[keep]
            iterate[rows[broken]] = restart * (steps + 1) + step
            rows, z = rows[~broken], z[~broken]
            if climbing:
                z = project(_ascend(z, slope[~broken], step_size, norm), x[rows], radius, norm, bounds)
    return AttackResult(natural, iterate >= 0, iterate, proposals, adversarial)


def _climb(look: Classifier, z: Tensor, y: Tensor, climbing: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, the loss of each image and, if asked for, its gradient in z."""
    with torch.set_grad_enabled(climbing), frozen(look):
        z = z.detach().requires_grad_(climbing)
        logits = look(z)
        # In double precision: in single, 1 - p of a confident answer rounds to 0, and with it the gradient
        # of the label's own logit.
        loss = F.cross_entropy(logits.double(), y, reduction="none")
        slope = torch.autograd.grad(loss.sum(), z)[0] if climbing else None
    if slope is not None and not torch.isfinite(slope).all():
        raise FloatingPointError("the attack's gradient is not finite: try double precision")
    return logits.detach(), loss.detach(), slope


def _ascend(z: Tensor, slope: Tensor, step_size: float, norm: str) -> Tensor:
    if norm == "linf":
        return z + step_size * slope.sign()
    # First by the largest entry: the square of a tiny gradient would vanish.
    largest = slope.flatten(1).abs().amax(1).clamp(min=torch.finfo(slope.dtype).tiny)
    slope = slope / largest.reshape(-1, *[1] * (slope.ndim - 1))
    return z + step_size * slope / _lengths(slope).clamp(min=1e-12)


def _start(x: Tensor, radius: float, norm: str, generator: torch.Generator | None) -> Tensor:
    """Uniform in the ball around x."""
    if norm == "linf":
        return x + radius * torch.empty_like(x).uniform_(-1, 1, generator=generator)
    direction = torch.empty_like(x).normal_(generator=generator)
    share = torch.empty_like(_lengths(x)).uniform_(generator=generator) ** (1 / math.prod(x.shape[1:]))
    return x + radius * share * direction / _lengths(direction)


def _lengths(v: Tensor) -> Tensor:
    """|v| of each image, ``(B, 1, ..., 1)``."""
    return v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.ndim - 1))


def _answers(logits: Tensor, y: Tensor) -> Tensor:
    """Which predictions are right, ``(B,)`` bool."""
    if logits.ndim != 2 or len(logits) != len(y):
        raise ValueError(f"need logits ({len(y)}, classes), got {tuple(logits.shape)}")
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the classifier's logits are not finite")
    return logits.argmax(1) == y


def _check(
    x: Tensor,
    y: Tensor,
    radius: float,
    step_size: float,
    steps: int,
    norm: str,
    restarts: int,
    bounds: tuple[float, float] | None,
) -> None:
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', got {norm!r}")
    for name, value, least in (
        ("radius", radius, 0), ("step_size", step_size, 0), ("steps", steps, 0), ("restarts", restarts, 1)
    ):  # fmt: skip
        if not value >= least:  # asked this way round, NaN is refused too
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not x.is_floating_point() or x.ndim < 2 or y.shape != x.shape[:1] or not len(y):
        raise ValueError(
            f"need images (B, *shape) of floating point and labels (B,), got {x.dtype} {tuple(x.shape)} "
            f"and {tuple(y.shape)}"
        )
    low, high = (-torch.finfo(x.dtype).max, torch.finfo(x.dtype).max) if bounds is None else bounds
    if not bool(((x >= low) & (x <= high)).all()):
        raise ValueError(f"the images leave the bounds [{low}, {high}], or are not finite")
