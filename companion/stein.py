"""Learning the Stein discrepancy: an energy trained without samples, and a critic that tests one.

The critic f looks for where the model's score s = -grad E is wrong under the data (Grathwohl et al. 2020)::

    max_f  E_data[s^T f + Tr grad f] - lam E_data|f|^2,        f* = (s - s_data) / (2 lam),

and the energy is moved so that the un-penalised mean falls. No chain, no sample, no normaliser; the only
second derivative is that of the critic. Score matching (Hyvarinen 2005) and any other loss of an energy are
trained by the same loop. p(x) is proportional to exp(-E(x)): T = 1 throughout.

Stacked models, x ``(S, B, d)``, are independent: every loss is one number a model, their sum is
differentiated, and gradients are clipped a model at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from companion._kernel_stein import (
    Verdict,
    finite_set_features,
    finite_set_stein_test,
    kernel_stein_test,
    ksd_squared,
    linear_kernel_stein_test,
    median_bandwidth,
    stein_kernel,
)
from companion._learned_test import learned_stein_test, power_objective, train_power_critic, value_and_trace
from companion._recorded import Steps, tensors_of
from companion._stein_operator import (
    Critic,
    SteinTerms,
    matrix_score,
    optimal_critic,
    probe,
    stein_operator,
    stein_terms,
)
from companion.energies import gradient
from companion.networks import MLPEnergy

__all__ = [
    "Critic",
    "GaussianBase",
    "SteinRun",
    "SteinTerms",
    "Verdict",
    "clip_each",
    "critic_loss",
    "critic_step",
    "finite_set_features",
    "finite_set_stein_test",
    "kernel_stein_test",
    "ksd_squared",
    "learned_stein_test",
    "linear_kernel_stein_test",
    "matrix_score",
    "median_bandwidth",
    "model_loss",
    "model_step",
    "optimal_critic",
    "power_objective",
    "probe",
    "score_matching_loss",
    "stein_kernel",
    "stein_operator",
    "stein_terms",
    "train",
    "train_power_critic",
    "value_and_trace",
]

Loss = Callable[[nn.Module, Tensor, torch.Generator | None], Tensor]


class GaussianBase(nn.Module):
    """E(x) = g(x) + sum_i (x_i - m_i)^2 / (2 s_i^2): an energy times a trainable diagonal Gaussian.

    ``net`` is an ``MLPEnergy`` of shape ``(d,)``, stacked or not; ``mean`` and ``std`` are ``(*stack, d)`` or
    ``(d,)``, where training starts: the data's own. The base makes exp(-E) integrable and gives its score a
    way home where there are no data.
    """

    def __init__(self, net: MLPEnergy, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.net, self.stack, self.shape = net, net.stack, net.shape
        lead = () if net.stack is None else (net.stack,)
        if len(net.shape) != 1 or mean.shape[-1:] != net.shape or (std <= 0).any():
            raise ValueError(f"the base needs mean and std > 0 of {net.shape}, got {tuple(mean.shape)}")
        size = (*lead, 1, *net.shape)
        self.mean = nn.Parameter(mean.unsqueeze(-2).expand(size).clone())
        self.log_std = nn.Parameter(std.log().unsqueeze(-2).expand(size).clone())

    def forward(self, x: Tensor) -> Tensor:
        """E(x): ``(*batch, d)``, or ``(S, *batch, d)`` with a stacked net -> the same without d."""
        return self.net(x) + 0.5 * ((x - self.mean) / self.log_std.exp()).square().sum(-1)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E and its gradient in x, by hand."""
        value, grad = self.net.value_and_gradient(x)
        pull = (x - self.mean) * (-2 * self.log_std).exp()
        return value + 0.5 * (pull * (x - self.mean)).sum(-1), grad + pull

    def value_and_tangent(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """E and grad E . v, differentiable in the parameters; shapes as in ``MLP``."""
        value, tangent = self.net.value_and_tangent(x, v)
        pull = (x - self.mean) * (-2 * self.log_std).exp()
        return value + 0.5 * (pull * (x - self.mean)).sum(-1), tangent + (pull * v).sum(-1)


@dataclass
class SteinRun:
    """What outlives one step. ``history`` holds one tensor a step and gauge, stacked models apart.

    ``critic`` and its optimiser are absent when the energy is trained by a loss of its own.
    """

    energy: nn.Module
    optimizer: torch.optim.Optimizer
    rng: torch.Generator
    critic: nn.Module | None = None
    critic_optimizer: torch.optim.Optimizer | None = None
    average: nn.Module | None = None  #: the energy with its weights averaged over its steps; see ``train``
    step: int = 0
    history: dict[str, list[Tensor]] = field(default_factory=dict)

    def gauge(self, name: str) -> Tensor:
        """One gauge over its steps, ``(steps,)`` or ``(steps, S)``: "critic", "square", "model", "loss"."""
        return torch.stack(self.history[name])


def critic_loss(
    energy: nn.Module,
    critic: nn.Module,
    x: Tensor,
    *,
    lam: float,
    anchored: bool = False,
    trace: str = "hutchinson",
    probes: int = 1,
    kind: str = "rademacher",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """``-(E[A f] - lam E|f|^2)`` and ``E|f|^2`` over the batch, each a scalar or ``(S,)``.

    x: ``(*stack, B, d)``. No gradient reaches the energy: its score is a constant here. ``anchored`` gives
    the critic the model's own score and lets the network h learn only the rest, f = (s + h) / (2 lam). Then,
    with A f written out::

        E[A f] - lam E|f|^2 = (E|s|^2 + 2 E Tr grad s + 2 E Tr grad h - E|h|^2) / (4 lam),

    whose best h = -s_data stands still while the model moves; the terms in s alone are left out.
    """
    s, options = (
        -gradient(energy, x),
        {"trace": trace, "probes": probes, "kind": kind, "generator": generator},
    )
    if not anchored:
        terms = stein_terms(s, critic, x, **options)
        return lam * terms.square.mean(-1) - terms.operator.mean(-1), terms.square.detach().mean(-1)
    terms = stein_terms(s, critic, x, **options)  # of h: s^T h, Tr grad h, |h|^2
    square = (s.square().sum(-1) + 2 * terms.drift + terms.square).detach().mean(-1) / (4 * lam**2)
    return (0.5 * terms.square - terms.trace).mean(-1) / (2 * lam), square


def model_loss(
    energy: nn.Module, critic: nn.Module, x: Tensor, *, lam: float = 1.0, anchored: bool = False
) -> Tensor:
    """E[s^T f] over the batch, a scalar or ``(S,)``: what the model makes small, with f a constant.

    Neither the trace nor the penalty depends on the energy, so that the step needs no probe, and ``lam``
    enters only through an ``anchored`` f. An energy with ``value_and_tangent`` gives s^T f = -grad E . f in
    one pass forward; of any other, autograd's gradient is kept differentiable.
    """
    with torch.no_grad():
        f = critic(x)
        if anchored:
            f = (f - gradient(energy, x)) / (2 * lam)
    tangent = getattr(energy, "value_and_tangent", None)
    if tangent is not None:
        return -tangent(x, f)[1].mean(-1)
    return -(_differentiable_gradient(energy, x)[1] * f).sum(-1).mean(-1)


def score_matching_loss(
    energy: nn.Module, x: Tensor, generator: torch.Generator | None = None, *, kind: str = "rademacher"
) -> Tensor:
    """``E[|s|^2 / 2 + Tr grad s]`` over the batch, a scalar or ``(S,)``; the trace by one Hutchinson probe.

    Up to a constant half the Fisher divergence ``E|s - s_data|^2``. Source: Hyvarinen 2005, theorem 1; the
    probe as in the Stein operator.
    """
    x, grad = _differentiable_gradient(energy, x)
    v = probe(x, kind=kind, generator=generator)
    (product,) = torch.autograd.grad((grad * v).sum(), x, create_graph=True)  # v^T Hessian of E
    return (0.5 * grad.square().sum(-1) - (product * v).sum(-1)).mean(-1)


def critic_step(
    run: SteinRun, x: Tensor, *, lam: float, anchored: bool = False, clip: float | None = None
) -> dict[str, Tensor]:
    """One step of the critic on the batch x; returns gauges: "critic", its loss, "square", ``E|f|^2``."""
    loss, square = critic_loss(run.energy, run.critic, x, lam=lam, anchored=anchored, generator=run.rng)
    descend(run.critic_optimizer, run.critic, loss, clip)
    return {"critic": loss.detach(), "square": square}


def model_step(
    run: SteinRun, x: Tensor, *, lam: float, anchored: bool = False, clip: float | None = None
) -> dict[str, Tensor]:
    """One step of the energy on the batch x against the critic as it stands; gauge "model", E[s^T f]."""
    loss = model_loss(run.energy, run.critic, x, lam=lam, anchored=anchored)
    descend(run.optimizer, run.energy, loss, clip)
    return {"model": loss.detach()}


def train(
    run: SteinRun,
    data: Tensor,
    steps: int,
    *,
    batch: int,
    loss: Loss | None = None,
    lam: float = 10.0,
    critic_steps: int = 5,
    anchored: bool = False,
    clip: float | None = None,
    schedule: Callable[[float], float] | None = None,
    average: float | None = None,
    compile: bool | None = None,
) -> SteinRun:
    """Bring ``run`` to ``steps`` steps on ``data``, ``(N, d)`` or a set a model, ``(S, N, d)``; returns it.

    With a critic and no ``loss``: ``critic_steps`` critic steps, then one model step, and so on, each on a
    fresh batch; ``steps`` counts both kinds. With ``loss(energy, x, generator)``, such as
    ``score_matching_loss``, every step is the energy's. ``schedule`` maps the share of training done, in
    [0, 1), to a factor on the learning rates. ``average`` keeps in ``run.average`` an energy whose weights
    follow w <- average w + (1 - average) w_now at each of the energy's steps. ``compile``: None takes each
    kind of step as one recorded call on a GPU, double backward and optimiser included, with the plain loop's
    numbers up to rounding; False never; True raises ``NotCompilableError`` where that cannot be.

    Raises ``ValueError`` if there is neither critic nor loss, ``FloatingPointError`` with the step and the
    last gauges when one of them is not finite.
    """
    if loss is None and (run.critic is None or run.critic_optimizer is None):
        raise ValueError("train needs a loss, or a run with a critic and its optimiser")
    stack = getattr(run.energy, "stack", None)
    lead = () if stack is None else (stack,)
    own = data.ndim == 3
    model = torch.arange(data.shape[0], device=data.device).unsqueeze(-1) if own else None
    groups = [g for o in (run.optimizer, run.critic_optimizer) if o is not None for g in o.param_groups]
    rates = [(group, group.setdefault("initial_lr", group["lr"])) for group in groups]
    if average is not None and run.average is None:
        run.average = copy.deepcopy(run.energy).requires_grad_(False)

    def batch_of_data() -> Tensor:
        rows = torch.randint(data.shape[-2], (*lead, batch), generator=run.rng, device=data.device)
        return data[model, rows] if own else data[rows]

    def of_the_critic() -> dict[str, Tensor]:
        return critic_step(run, batch_of_data(), lam=lam, anchored=anchored, clip=clip)

    def of_the_energy() -> dict[str, Tensor]:
        x = batch_of_data()
        if loss is None:
            gauges = model_step(run, x, lam=lam, anchored=anchored, clip=clip)
        else:
            value = loss(run.energy, x, run.rng)
            descend(run.optimizer, run.energy, value, clip)
            gauges = {"loss": value.detach()}
        if average is not None:
            with torch.no_grad():
                for mean, now in zip(run.average.parameters(), run.energy.parameters(), strict=True):
                    mean.lerp_(now, 1 - average)
        return gauges

    def state() -> list[Tensor]:
        return tensors_of(run.energy, run.critic, run.average)

    optimizers = (run.optimizer, run.critic_optimizer)
    settings = {"device": data.device, "count": steps - run.step, "compile": compile}
    with Steps(optimizers, state, [run.rng], **settings) as taking:
        while run.step < steps:
            for group, rate in rates:
                taking.set_rate(group, rate * (schedule(run.step / steps) if schedule else 1.0))
            critic = loss is None and run.step % (critic_steps + 1) < critic_steps
            gauges = taking.take(critic, of_the_critic if critic else of_the_energy)
            run.step += 1
            for name, value in gauges.items():
                run.history.setdefault(name, []).append(value)
            if run.step % 100 == 0 or run.step == steps:
                _check_finite(run)
    return run


def descend(optimizer: torch.optim.Optimizer, module: nn.Module, loss: Tensor, clip: float | None) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.sum().backward()  # stacked models are independent: the sum's gradient is each one's own
    if clip is not None:
        clip_each(module, clip)
    optimizer.step()


def clip_each(module: nn.Module, limit: float) -> None:
    """Scale each stacked model's gradient down to norm ``limit`` by itself; one model: its whole gradient."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    start = 0 if getattr(module, "stack", None) is None else 1
    squares = [g.square().flatten(start).sum(-1) for g in grads]
    factor = (limit / torch.stack(squares).sum(0).sqrt().clamp(min=1e-12)).clamp(max=1.0)
    for g in grads:
        g.mul_(factor.reshape(*factor.shape, *[1] * (g.ndim - start)))


def _differentiable_gradient(energy: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
    return x, grad


def _check_finite(run: SteinRun) -> None:
    last = {name: values[-1] for name, values in run.history.items()}
    if not all(torch.isfinite(value).all() for value in last.values()):
        shown = ", ".join(f"{name} {value.flatten().tolist()}" for name, value in last.items())
        raise FloatingPointError(
            f"a gauge is not finite at step {run.step} ({shown}). Try a lower learning rate, a larger lam, "
            "more critic steps, or clip."
        )
