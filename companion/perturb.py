"""Worst-case weight perturbation: the adversary in weight space, around any optimiser that is already built.

One training step on a batch's risk L (Zheng, Zhang and Mao 2021; Foret et al. 2021; algorithm 1 in both)::

    g = grad L(theta),  Delta = rule(g),  g* = grad L(theta + Delta),  the optimiser steps from theta with g*.

The rules differ in one line each. g is the gradient of the loss alone: weight decay, which belongs to the
optimiser, never enters Delta, and Delta is a constant for ``g*``. From plain training to AMP, in a loop with
a closure, two lines change::

    from companion.perturb import AMP, Adversarial
    optimizer = Adversarial(optimizer, AMP(eps=0.5), net)

Schedulers may hold either optimiser. Stacked models (every parameter ``(S, ...)``) get a ball each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from companion._weight_rules import AMP, ASAM, SAM, Random, Rule, norm_of_all, norms_of_each

__all__ = [
    "AMP",
    "ASAM",
    "SAM",
    "Adversarial",
    "Random",
    "Rule",
    "WeightPerturbation",
    "norms_and_biases",
]


class WeightPerturbation:
    """A context in which the weights are theta + Delta; on leaving it, by whatever way, theta bit for bit.

    ``params``: tensors, or parameter groups of an optimiser. Delta comes from the ``.grad`` at entry, or from
    ``grads``, one for each tensor. A group's key ``"radius"`` is its own eps or rho; groups without one share
    one ball, groups with a radius of their own have a ball of their own, radius 0 leaves a group unmoved.
    Tensors that want no gradient or are in ``skip`` are left unmoved. ``missing``: what to do about one that
    wants a gradient and has none, ``"error"`` or ``"skip"`` (branches that were not taken).

    ``ascend()`` inside the context takes a further step from the gradients now in ``.grad``. ``delta`` holds
    the last perturbation and stays readable. Raises ``ValueError`` for a missing or sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        rule: Rule,
        *,
        grads: Sequence[Tensor] | None = None,
        skip: Iterable[Tensor] = (),
        stacked: bool = False,
        missing: str = "error",
        generator: torch.Generator | None = None,
    ) -> None:
        if missing not in ("error", "skip"):
            raise ValueError(f'missing must be "error" or "skip", got {missing!r}')
        groups = [g if isinstance(g, dict) else {"params": [g]} for g in params]
        left_out, given = {id(p) for p in skip}, iter(grads) if grads is not None else None
        balls: dict[object, tuple[Rule, list[int]]] = {}
        self.weights: list[Tensor] = []
        self._given: list[Tensor | None] = []
        for group in groups:
            own = group.get("radius")
            part = rule if own is None else dataclasses.replace(rule, **{rule.radius: own})
            radius = getattr(part, rule.radius)
            for p in group["params"]:
                grad = next(given) if given is not None else None
                still = isinstance(radius, float | int) and radius == 0
                if still or not p.requires_grad or id(p) in left_out:
                    continue
                key = radius if isinstance(radius, float | int) else id(radius)
                balls.setdefault(key, (part, []))[1].append(len(self.weights))
                self.weights.append(p)
                self._given.append(grad)
        self.balls = list(balls.values())
        self.stacked, self.missing, self.generator = stacked, missing, generator
        self._explicit = grads is not None
        self._saved: list[Tensor] | None = None
        self.delta: list[Tensor] = []

    @torch.no_grad()
    def __enter__(self) -> WeightPerturbation:
        if self._saved is not None:
            raise RuntimeError("this perturbation is already applied")
        grads = self._gradients(self._given if self._explicit else [p.grad for p in self.weights])
        self._saved = [p.clone() for p in self.weights]
        try:
            self._move(grads, None)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Copied back, not subtracted: (theta + Delta) - Delta is not theta in floating point. And by the list
        # of what was moved, not by who has a gradient now.
        if self._saved:
            torch._foreach_copy_(self.weights, self._saved)
        self._saved = None

    @torch.no_grad()
    def ascend(self) -> None:
        """One more ascent step, from the gradients at theta + Delta that are now in ``.grad``."""
        if self._saved is None:
            raise RuntimeError("ascend() belongs inside the context")
        self._move(self._gradients([p.grad for p in self.weights]), self.delta)

    def _move(self, grads: list[Tensor], delta: list[Tensor] | None) -> None:
        moved: list[Tensor | None] = [None] * len(self.weights)
        for rule, index in self.balls:
            before = None if delta is None else [delta[i] for i in index]
            weights = [self._saved[i] for i in index]  # theta, not theta + Delta: what ASAM scales with
            steps = rule(
                [grads[i] for i in index], weights, before, stacked=self.stacked, generator=self.generator
            )
            for i, step in zip(index, steps, strict=True):
                moved[i] = step
        self.delta = moved
        if delta is not None:
            torch._foreach_copy_(self.weights, self._saved)
        if moved:
            torch._foreach_add_(self.weights, moved)

    def _gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        lacking = [i for i, g in enumerate(grads) if g is None]
        if grads and len(lacking) == len(grads):
            raise ValueError("no parameter has a gradient: does the closure call loss.backward()?")
        if lacking and self.missing == "error":
            shapes = ", ".join(str(tuple(self.weights[i].shape)) for i in lacking[:5])
            raise ValueError(
                f"{len(lacking)} of {len(grads)} parameters have no gradient (shapes {shapes}). Freeze them "
                'with requires_grad_(False), name them in skip, or pass missing="skip" if they belong to '
                "branches that are not always taken."
            )
        if any(g is not None and g.is_sparse for g in grads):
            raise ValueError("a gradient is sparse: name the embedding in skip, or use sparse=False")
        return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, self.weights, strict=True)]

    def gauges(self) -> dict[str, Tensor]:
        """``norm`` of Delta over all tensors, ``clipped``, the share of balls it fills: ``()`` or ``(S,)``.

        They stay on the device and cost a norm of all tensors, so ask when you want to know.
        """
        if not self.delta:
            return {"norm": torch.zeros(()), "clipped": torch.zeros(())}
        full = []
        for rule, index in self.balls:
            norms = norms_of_each([self.delta[i] for i in index], self.stacked)
            if getattr(rule, "ball", "global") == "global":
                norms = norms.norm(dim=0, keepdim=True)
            full.append(norms >= getattr(rule, rule.radius) * (1 - 1e-3))  # bf16 rounds by that much
        return {"norm": norm_of_all(self.delta, self.stacked), "clipped": torch.cat(full).float().mean(0)}


class Adversarial(Optimizer):
    """An optimiser that is already built, stepped with the gradient at theta + Delta.

    ``base``: SGD, Adam, ...; its groups may hold a ``"radius"`` (see :class:`WeightPerturbation`) and are the
    groups of this object too, so that a scheduler may be built on either, before or after a load.
    ``module``: the network, for its batch-norm statistics, or None. ``steps``: N ascent steps; the closure is
    called N + 1 times; with N = 0, or no weight to move, the step is the base's own, bit for bit.
    ``statistics``: ``"clean"`` updates running statistics from the pass at theta alone, ``"all"`` from every
    pass (the official code). ``skip``: parameters not to move, e.g. ``norms_and_biases(net)``. ``generator``:
    of :class:`Random`; its state is part of ``state_dict``, as is everything of the base. Other arguments as
    in :class:`WeightPerturbation`.

    Use bf16 without a GradScaler: a scaler can neither drive a closure nor unscale the ascent's gradient.
    Accumulate micro-batches inside the closure, for one Delta a step; for a Delta each, enter a
    :class:`WeightPerturbation` around each backward pass and step the base.
    Raises ``TypeError`` for a base that needs a closure of its own, ``ValueError`` for N or a radius below 0.

    Example:

    >>> import torch
    >>> from companion.perturb import AMP, Adversarial
    >>> _ = torch.manual_seed(0)
    >>> net, x, y = torch.nn.Linear(3, 2), torch.randn(8, 3), torch.arange(8) % 2
    >>> optimizer = Adversarial(torch.optim.SGD(net.parameters(), lr=0.1), AMP(eps=0.5), net)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = torch.nn.functional.cross_entropy(net(x), y)
    ...     loss.backward()
    ...     return loss
    >>> losses = [optimizer.step(closure).item() for _ in range(20)]
    >>> losses[-1] < losses[0]
    True
    """

    def __init__(
        self,
        base: Optimizer,
        rule: Rule,
        module: nn.Module | None,
        *,
        steps: int = 1,
        statistics: str = "clean",
        skip: Iterable[Tensor] = (),
        stacked: bool = False,
        missing: str = "error",
        generator: torch.Generator | None = None,
    ) -> None:
        if isinstance(base, torch.optim.LBFGS | Adversarial):
            raise TypeError(f"{type(base).__name__} calls the closure itself and cannot be wrapped")
        if steps < 0:
            raise ValueError(f"steps must not be below zero, got {steps}")
        if statistics not in ("clean", "all"):
            raise ValueError(f'statistics must be "clean" or "all", got {statistics!r}')
        # Not Optimizer.__init__, which would make groups of its own: the pickle protocol's way in sets up the
        # hooks that schedulers and profilers expect and leaves the groups to the properties below.
        self.__setstate__({
            "base": base, "rule": rule, "module": module, "steps": steps, "statistics": statistics,
            "skip": list(skip), "stacked": stacked, "missing": missing, "generator": generator, "last": None,
        })  # fmt: skip
        self._perturbation()  # a radius below zero in a group is an error now, not at the first step

    param_groups = property(lambda self: self.base.param_groups, doc="The base optimiser's groups.")
    state = property(lambda self: self.base.state, doc="The base optimiser's state, by weight.")
    defaults = property(lambda self: self.base.defaults, doc="What the base optimiser gives a new group.")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the base optimiser does."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Hand a further group of weights to the base optimiser; the rule perturbs it too."""
        self.base.add_param_group(param_group)

    def step(
        self, closure: Callable[[], Tensor] | None = None, *, ascent: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """One step; returns the loss of the first pass, at theta.

        ``closure`` computes the loss, calls ``backward()`` and returns the loss; gradients are cleared before
        each pass, so it need not. ``ascent``: another such closure, on a part of the batch, from which alone
        Delta is computed (a quarter of the batch costs a quarter of a pass). Raises ``TypeError`` without a
        closure and ``ValueError`` when a pass leaves no gradient; the weights are theta then.
        """
        if closure is None:
            raise TypeError(
                "step() needs a closure that computes the loss, calls backward() and returns it. A "
                "GradScaler cannot pass one on: use bf16 autocast, which needs no scaler."
            )
        self.last = self._perturbation()
        if not (self.steps and self.last.weights):
            loss = self._evaluate(closure)
        else:
            first = closure if ascent is None else ascent
            loss = self._evaluate(first)
            frozen = _frozen_statistics(self.module if self.statistics == "clean" else None)
            with self.last, frozen:
                for _ in range(self.steps - 1):
                    self._evaluate(first)
                    self.last.ascend()
                self._evaluate(closure)
        self.base.step()
        return loss

    def _evaluate(self, closure: Callable[[], Tensor]) -> Tensor:
        self.base.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = closure()
        if all(p.grad is None for group in self.base.param_groups for p in group["params"]):
            raise ValueError("the closure left no gradient: it has to call loss.backward()")
        return loss

    def _perturbation(self) -> WeightPerturbation:
        return WeightPerturbation(
            self.base.param_groups, self.rule, skip=self.skip, stacked=self.stacked, missing=self.missing,
            generator=self.generator,
        )  # fmt: skip

    def gauges(self) -> dict[str, Tensor]:
        """``|Delta|`` and the clip rate of the last step, as ``WeightPerturbation.gauges``."""
        return {} if self.last is None else self.last.gauges()

    def state_dict(self) -> dict[str, Any]:
        """The base's whole state, with the rule's name and the generator's state beside it."""
        own = {"rule": repr(self.rule), "steps": self.steps}
        if self.generator is not None:
            own["generator"] = self.generator.get_state()
        return self.base.state_dict() | {"perturbation": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave; the state of a bare base optimiser is welcome too.

        Raises ``ValueError`` if it was made with another rule or number of steps.
        """
        own = state_dict.get("perturbation")
        if own is not None and (own["rule"], own["steps"]) != (repr(self.rule), self.steps):
            raise ValueError(
                f"this state is of {own['rule']} with {own['steps']} steps, not of {self.rule} with "
                f"{self.steps}; build the optimiser so, or load the state into its base"
            )
        self.base.load_state_dict({k: v for k, v in state_dict.items() if k != "perturbation"})
        if own is not None and self.generator is not None and "generator" in own:
            self.generator.set_state(own["generator"])


@contextmanager
def _frozen_statistics(module: nn.Module | None) -> Iterator[None]:
    """Batch normalisation by the batch, as in training, without a trace in the running statistics.

    The flag, not momentum 0: that would still count batches, and momentum None has no zero.
    """
    norms = (
        [] if module is None else [m for m in module.modules() if getattr(m, "track_running_stats", False)]
    )
    modules = [] if module is None else module.modules()
    norms = [m for m in modules if m.training and getattr(m, "track_running_stats", False)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def norms_and_biases(module: nn.Module) -> list[Tensor]:
    """The parameters of normalisation layers and all biases of ``module``, for ``skip``."""
    kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    return [
        p
        for m in module.modules()
        for name, p in m.named_parameters(recurse=False)
        if name == "bias" or isinstance(m, kinds)
    ]
