"""Refining a generator's samples along its critic, five ways behind one call.

A critic D, high on data, is read as the energy E(x) = -D(x): p(x) proportional to exp(beta D(x)), beta = 1/T.
Every method is called as ``method(start, field, steps, step_size, beta, generator=...)`` and returns
``Refined``; ``step_size`` is eps throughout. With z_k latents, x_k samples, xi standard normal::

    data_space   x <- x + eps^2/2 beta grad D(x) + eps xi                       (Song et al. 2020, "pixel")
    ddls         z <- z + eps^2/2 (beta grad_z D(G(z)) - z / s^2) + eps xi      (Che et al. 2020; s: prior)
    dgflow       z <- z + eps^2/2 beta f'(D) grad_z D(G(z)) + eps xi            (Ansari et al. 2021)
    dot          z <- z - eps grad_z (|z - z_0| - D(G(z)) / k)                  (Tanaka 2019; no noise)

DGflow's own symbols are eta = eps^2 beta / 2 and gamma = 1 / beta. The fifth, discriminator contrastive
divergence (DCD), is ``finetune``, which trains D on the ends of such chains, followed by the first or second.
The generator is never changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion._recorded import LOOK, Steps, chain_rows, late_divergence, take_chain_rows, tensors_of
from companion.energies import energy_and_gradient, frozen
from companion.gan import critic_step
from companion.langevin import Gauges, langevin, unasked
from companion.purify import hessian_product

__all__ = ["Field", "Refined", "data_space", "ddls", "dgflow", "dot", "finetune", "largest_step", "rejection"]

# DGflow's divergences as potentials of d = D(G(z)): the flow climbs f(d), whose slope is the paper's s.
_POTENTIALS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda d: d,  # s = 1
    "logd": F.logsigmoid,  # s = sigma(-d)
    "js": F.softplus,  # s = sigma(d)
}


@dataclass(frozen=True)
class Refined:
    """Where the chains ended: samples, the states that walked (latents, or the samples), and gauges."""

    x: Tensor  #: ``(*batch, *shape)``
    state: Tensor  #: ``(*batch, z)`` or x itself
    gauges: Gauges | None  #: of the Langevin chain; dot has none
    critic: Tensor  #: D at the samples, ``(*batch,)``
    path: Tensor | None = None  #: ``(records, *batch, *shape)``: samples along the way, if recorded


class Field(nn.Module):
    """What a chain feels: E(x) = -D(x), or with a ``network`` E(z) = -D(G(z)) on latents ``(*batch, z)``.

    Both networks must be in eval mode if they have batch normalisation, whose batch statistics would couple
    the chains, or spectral normalisation, whose estimate would move with every call. Raises ``ValueError``
    otherwise, and when the network's samples do not fit the critic.
    """

    def __init__(self, critic: nn.Module, network: nn.Module | None = None) -> None:
        super().__init__()
        self.critic, self.network = critic, network
        for name, net in (("critic", critic), ("generator", network)):
            if net is not None:
                _check_mode(name, net)
        if network is not None and tuple(network.shape) != tuple(critic.shape):
            raise ValueError(
                f"the generator makes samples of shape {tuple(network.shape)}, the critic judges "
                f"{tuple(critic.shape)}"
            )
        self.shape = tuple(critic.shape) if network is None else (network.latent,)

    def decode(self, state: Tensor) -> Tensor:
        """States to samples, without a graph."""
        with torch.no_grad():
            return state if self.network is None else self.network(state)

    def forward(self, state: Tensor) -> Tensor:
        """E: ``(*batch, *shape)`` -> ``(*batch,)``."""
        return -self.critic(state if self.network is None else self.network(state))

    def value_and_gradient(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """E and its gradient in the state; the critic's closed form is used where it has one."""
        if self.network is None:
            value, grad = energy_and_gradient(self.critic, state)
            return -value, grad.neg()
        with torch.enable_grad(), frozen(self.network):
            state = state.detach().requires_grad_(True)
            x = self.network(state)
            value, slope = energy_and_gradient(self.critic, x.detach())
            (grad,) = torch.autograd.grad(x, state, slope)
        return -value, grad.neg()

    def check(self, state: Tensor, latent: bool | None = None) -> None:
        """Raise ``ValueError`` for states that do not fit, or for the other space than the method's."""
        if latent is not None and latent != (self.network is not None):
            wanted = "latents: give the field a generator" if latent else "samples: a field without generator"
            raise ValueError(f"this method walks on {wanted}")
        if tuple(state.shape[-len(self.shape) :]) != self.shape:
            raise ValueError(f"the field takes states (*batch, *{self.shape}), got {tuple(state.shape)}")


class _Climb(nn.Module):
    """E = -f(D): what DGflow's other divergences descend."""

    def __init__(self, field: Field, divergence: str) -> None:
        super().__init__()
        self.field, self.potential = field, _POTENTIALS[divergence]

    def forward(self, state: Tensor) -> Tensor:
        return -self.potential(-self.field(state))


def data_space(
    start: Tensor,
    field: Field,
    steps: int,
    step_size: float,
    beta: float,
    *,
    generator: torch.Generator | None = None,
    record_every: int | None = None,
) -> Refined:
    """Langevin on the samples themselves, from ``start`` ``(*batch, *shape)``, G(z) as a rule.

    Raises ``ValueError`` for shapes that do not fit and a step or beta out of range, ``DivergenceError``.
    """
    field.check(start, latent=False)
    return _walk(start, field, field, steps, step_size, beta, None, generator, record_every)


def ddls(
    start: Tensor,
    field: Field,
    steps: int,
    step_size: float,
    beta: float,
    *,
    prior: float | None = 1.0,
    generator: torch.Generator | None = None,
    record_every: int | None = None,
) -> Refined:
    """Langevin on latents from ``start`` ``(*batch, z)`` under exp(beta D(G(z))) N(z; 0, prior^2 I).

    ``prior=None`` drops the prior, as the official code of DCD does; ``|z|`` then leaves its shell. Exact if
    beta D is the log density ratio of data and generator. Raises as ``data_space``.

    Example:

    >>> import torch
    >>> from companion.networks import MLPEnergy, PointGenerator
    >>> from companion.refine import Field, ddls
    >>> rng = torch.Generator().manual_seed(0)
    >>> network = PointGenerator(2, latent=2, generator=rng).eval()
    >>> critic = MLPEnergy((2,), (32,), generator=rng).eval()  # any network (B, *shape) -> (B,), high on data
    >>> z = torch.randn(100, 2, generator=rng)
    >>> refined = ddls(z, Field(critic, network), steps=10, step_size=0.1, beta=1.0, generator=rng)
    >>> refined.x.shape, refined.state.shape
    (torch.Size([100, 2]), torch.Size([100, 2]))
    """
    field.check(start, latent=True)
    return _walk(start, field, field, steps, step_size, beta, prior, generator, record_every)


def dgflow(
    start: Tensor,
    field: Field,
    steps: int,
    step_size: float,
    beta: float,
    *,
    divergence: str = "kl",
    generator: torch.Generator | None = None,
    record_every: int | None = None,
) -> Refined:
    """The gradient flow of a divergence "kl", "logd" or "js", on latents or on samples, without a prior.

    Its step eta and noise gamma: eps = sqrt(2 eta gamma), beta = 1 / gamma; published eta .1, gamma .01, 25
    steps. With "kl" this is Langevin on -D, so ``ddls`` without its prior. Raises as ``data_space``, and
    ``ValueError`` for an unknown divergence.
    """
    if divergence not in _POTENTIALS:
        raise ValueError(f"unknown divergence {divergence!r}: choose one of {', '.join(_POTENTIALS)}")
    field.check(start)
    energy = field if divergence == "kl" else _Climb(field, divergence)
    return _walk(start, field, energy, steps, step_size, beta, None, generator, record_every)


def dot(
    start: Tensor,
    field: Field,
    steps: int,
    step_size: float,
    beta: float | None = None,
    *,
    generator: torch.Generator | None = None,
    record_every: int | None = None,
) -> Refined:
    """Discriminator optimal transport: descend ``|z - z_0| - D(G(z)) / k`` from the latents z_0, no noise.

    ``beta`` is 1 / k; by default k is the largest ``|D(G(z)) - D(G(z'))| / |z - z'|`` over pairs of the
    start, a number a stacked model: the critic's Lipschitz constant on latents, as in the paper. The step's
    part along z is removed, so that ``|z|`` stays in the prior's shell. Draws nothing; ``generator`` is there
    for the call's shape. Source: Tanaka 2019, eq. 13 and its released code. Raises as ``data_space``.
    """
    field.check(start, latent=True)
    _check_range(steps, step_size, 1.0 if beta is None else beta, None)
    z, path = start.detach().clone(), []
    inverse_k = _inverse_lipschitz(field, z) if beta is None else torch.as_tensor(beta).to(z)
    inverse_k = inverse_k.reshape(*inverse_k.shape, *[1] * (z.ndim - inverse_k.ndim))
    for step in range(steps):
        _, slope = field.value_and_gradient(z)
        away = z - start + 1e-3  # the paper's small offset: a norm has no slope at 0
        move = away / away.norm(dim=-1, keepdim=True) + inverse_k * slope
        radial = z / z.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        z = z - step_size * (move - (move * radial).sum(-1, keepdim=True) * radial)
        if record_every and (step + 1) % record_every == 0:
            path.append(field.decode(z))
    return _refined(field, z, None, torch.stack(path) if path else None)


def rejection(
    critic: nn.Module, network: nn.Module, count: int, best_of: int, *, generator: torch.Generator | None
) -> Tensor:
    """The simplest use of a critic: of ``best_of`` samples keep the one it likes best, ``count`` times.

    Returns ``(*stack, count, *shape)``. Raises ``ValueError`` for a mode or shape as in ``Field``.
    """
    field = Field(critic, network)
    stack = getattr(network, "stack", None)
    lead = () if stack is None else (stack,)
    z = torch.empty(*lead, count * best_of, network.latent, device=next(network.parameters()).device)
    x = field.decode(z.normal_(generator=generator))
    with torch.no_grad():
        best = critic(x).unflatten(-1, (count, best_of)).argmax(-1)  # (*stack, count)
    x = x.unflatten(len(lead), (count, best_of))
    index = best.reshape(*best.shape, 1, *[1] * len(critic.shape)).expand(*best.shape, 1, *critic.shape)
    return x.gather(len(lead) + 1, index).squeeze(len(lead) + 1)


def finetune(
    critic: nn.Module,
    network: nn.Module,
    data: Tensor,
    updates: int,
    *,
    optimizer: torch.optim.Optimizer,
    batch: int,
    steps: int,
    step_size: float,
    beta: float,
    generator: torch.Generator,
    latent: bool = False,
    prior: float | None = 1.0,
    half_level: float = 0.0,
    schedule: Callable[[float], float] | None = None,
    compile: bool | None = None,
    **loss: float | str | None,
) -> dict[str, Tensor]:
    """Discriminator contrastive divergence: ``updates`` steps of the critic against the ends of its chains.

    An update draws z, walks ``steps`` Langevin steps from G(z) (from z itself if ``latent``) with the critic
    frozen, and takes one ``critic_step`` on fresh data ``(N, *shape)`` and the chains' ends, which are the
    negatives of contrastive divergence; ``steps=0`` leaves G(z) and is the GAN's own critic step. ``loss``
    are the options of ``critic_loss``. The generator stays as it is, in eval mode, bit for bit; the critic is
    in eval mode while chains walk and in training mode for its step. Returns its gauges, ``(updates,)`` or
    ``(updates, S)`` each. ``compile``: None takes an update, chains and penalty included, as one recorded
    call on a GPU, with the plain loop's numbers up to rounding; False never; True raises
    ``NotCompilableError`` where that cannot be. Source: Song et al. 2020, algorithm 1.

    Raises as ``data_space``, and ``ValueError`` when data and critic do not fit.
    """
    if tuple(data.shape[1:]) != tuple(critic.shape):
        raise ValueError(f"data {tuple(data.shape[1:])} do not fit a critic of {tuple(critic.shape)}")
    stack = getattr(critic, "stack", None)
    lead = () if stack is None else (stack,)
    modes = [(net, net.training) for net in (critic, network)]
    groups = [(group, group["lr"]) for group in optimizer.param_groups]
    history: dict[str, list[Tensor]] = {}
    told: list[dict[str, Tensor]] = []
    walk = {"step_size": step_size, "beta": beta, "prior": prior if latent else None, "generator": generator}
    network.eval(), critic.eval()
    field = Field(critic, network if latent else None)
    taking = Steps(
        [optimizer], lambda: tensors_of(critic), [generator], device=data.device, count=updates,
        compile=compile, halting=True,
    )  # fmt: skip

    def update() -> dict[str, Tensor]:
        critic.eval()
        rows = torch.randint(len(data), (*lead, batch), generator=generator, device=data.device)
        real = data[rows]
        if half_level:
            noise = torch.empty_like(real)
            real = real + noise.uniform_(-half_level, half_level, generator=generator)
        z = torch.empty(*lead, batch, network.latent, device=data.device).normal_(generator=generator)
        negative, gauges = _negatives(
            field, network, z, steps, taking.halt, False if compile is False else None, **walk
        )
        critic.train()
        return gauges | critic_step(critic, optimizer, real, negative, generator=generator, **loss)

    try:
        with taking:
            for number in range(updates):
                for group, rate in groups:
                    taking.set_rate(group, rate * (schedule(number / updates) if schedule else 1.0))
                gauges = taking.take("update", update)
                told.append(take_chain_rows(gauges))
                for name, value in gauges.items():
                    history.setdefault(name, []).append(value)
                if len(told) >= LOOK or number == updates - 1:
                    trouble = late_divergence(told)
                    told.clear()
                    if trouble is not None:
                        raise trouble[1]
    finally:
        for group, rate in groups:
            group["lr"] = rate
        for net, mode in modes:
            net.train(mode)
    return {name: torch.stack(values) for name, values in history.items()}


def largest_step(field: Field, start: Tensor, beta: float, iterations: int = 20) -> Tensor:
    """The largest eps at which Langevin from each state is stable to second order, ``(*batch,)``.

    A step multiplies a small difference by 1 - eps^2/2 beta H; with l the largest eigenvalue of H = -D'' this
    leaves [-1, 1] at eps = 2 / sqrt(beta l). Power iteration on H, shifted so that the largest and not the
    most negative is found; infinite where H has no positive eigenvalue, as everywhere in a piecewise linear
    critic.
    """
    v = torch.ones_like(start)
    dims = tuple(range(start.ndim - len(field.shape), start.ndim))

    def unit(v: Tensor) -> Tensor:
        return v / v.square().sum(dims, keepdim=True).sqrt().clamp(min=1e-30)

    def rayleigh(shift: Tensor) -> tuple[Tensor, Tensor]:
        w = unit(v + 0.01 * torch.sin(torch.arange(v.numel(), device=v.device)).reshape(v.shape))
        for _ in range(iterations):
            product = hessian_product(field, start, w) + shift * w
            top = (w * product).sum(dims, keepdim=True)
            w = unit(product)
        return top, w

    zero = torch.zeros_like(start.sum(dims, keepdim=True))
    extreme, _ = rayleigh(zero)  # largest in size, of either sign
    shift = extreme.abs()
    top = rayleigh(shift)[0] - shift
    top = top.reshape(start.shape[: dims[0]]).clamp(min=0)
    return 2 / (beta * top).sqrt()


def _negatives(
    field: Field,
    network: nn.Module,
    z: Tensor,
    steps: int,
    halt: Tensor | None,
    compile: bool | None,
    *,
    step_size: float,
    beta: float,
    prior: float | None,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The chains' ends and their gauges; with ``halt``, of a recorded update, nothing is asked meanwhile."""
    with torch.no_grad():
        start = network(z)
    if steps == 0:
        return start, {}
    origin, rows = (start if field.network is None else z), {}
    if halt is None:
        ended = _walk(origin, field, field, steps, step_size, beta, prior, generator, None, compile)
        x, gauges = ended.x, ended.gauges
    else:
        _check_range(steps, step_size, beta, prior)
        walk = {"temperature": 1 / beta, "base_std": prior, "generator": generator}
        x, gauges, trouble = unasked(field, origin, steps, step_size, **walk)
        halt.copy_(torch.maximum(halt, (trouble >= 0).to(halt)))
        x, rows = field.decode(torch.where(halt > 0, origin, x)), chain_rows(gauges, trouble)
    return x, {"rho": gauges.rho, "climb": gauges.energy_start - gauges.energy} | rows


def _walk(
    start: Tensor,
    field: Field,
    energy: Callable[[Tensor], Tensor],
    steps: int,
    step_size: float,
    beta: float,
    prior: float | None,
    generator: torch.Generator | None,
    record_every: int | None,
    compile: bool | None = None,
) -> Refined:
    _check_range(steps, step_size, beta, prior)
    chain = langevin(
        energy, start, steps, step_size,
        temperature=1 / beta, base_std=prior, generator=generator, record_every=record_every, compile=compile,
    )  # fmt: skip
    path = None if chain.path is None else torch.stack([field.decode(state) for state in chain.path])
    return _refined(field, chain.x, chain.gauges, path)


def _refined(field: Field, state: Tensor, gauges: Gauges | None, path: Tensor | None) -> Refined:
    x = field.decode(state)
    with torch.no_grad():
        return Refined(x, state, gauges, field.critic(x), path)


def _inverse_lipschitz(field: Field, z: Tensor) -> Tensor:
    """1 / k, a scalar or ``(S,)``, from a hundred pairs of neighbours in the batch."""
    some = z[..., : min(200, z.shape[-2] // 2 * 2), :]
    with torch.no_grad():
        value = -field(some)
    rise = (value[..., ::2] - value[..., 1::2]).abs()
    run = (some[..., ::2, :] - some[..., 1::2, :]).norm(dim=-1)
    return 1 / (rise / run).amax(-1)


def _check_range(steps: int, step_size: float, beta: float, prior: float | None) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be positive and finite, got {beta}: p is proportional to exp(beta D)")
    if not step_size > 0:
        raise ValueError(f"step_size must be positive, got {step_size}")
    if prior is not None and not prior > 0:
        raise ValueError(f"the prior's standard deviation must be positive, got {prior}")
    if prior is not None and step_size >= 2 * prior:
        raise ValueError(
            f"step_size {step_size} is at or above {2 * prior:g}, twice the prior's standard deviation, "
            "where the prior's own pull already throws chains out: choose a smaller step"
        )


def _check_mode(name: str, net: nn.Module) -> None:
    for layer in net.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
            raise ValueError(
                f"the {name} has batch normalisation in training mode, which would couple the chains of a "
                f"batch: call {name}.eval() first"
            )
        if isinstance(layer, nn.utils.parametrizations._SpectralNorm) and layer.training:
            raise ValueError(
                f"the {name} has spectral normalisation in training mode, which would change it at every "
                f"step of a chain: call {name}.eval() first"
            )
