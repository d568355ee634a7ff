"""The adversarial pair that is refined: a generator G, a critic D, one step and one loop for either loss.

Convention: D is *high on data*. Read as an energy (Song et al. 2020) the critic is E(x) = -D(x), so that
p(x) is proportional to exp(beta D(x)) with beta = 1/T. The losses, of which each is minimised::

    Wasserstein   critic  E_fake[D] - E_data[D]                          generator  -E_fake[D]
    hinge         critic  E_data[(1 - D)_+] + E_fake[(1 + D)_+]          generator  -E_fake[D]

to which the critic's may add ``penalty`` times the gradient penalty ``(|grad D(x^)| - 1)^2`` on random points
of the lines between data and fakes (Gulrajani et al. 2017), and ``drift`` times E_data[D^2] + E_fake[D^2],
which pins the level and the scale of D. The hinge loss goes with spectral normalisation (Miyato et al. 2018).

Stacked networks, x ``(S, B, *shape)``, are S independent pairs: every loss is one number a pair.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from companion import checkpoint as checkpoints
from companion._recorded import Steps, tensors_of
from companion.distributed import Team, average_history

__all__ = [
    "LOSSES",
    "GANRun",
    "critic_loss",
    "critic_step",
    "generator_step",
    "gradient_penalty",
    "new_run",
    "spectrally_normalised",
    "train",
]

#: name -> (critic's loss from D on data and on fakes, a value a sample), each averaged over the batch.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "wasserstein": lambda real, fake: fake.mean(-1) - real.mean(-1),
    "hinge": lambda real, fake: F.relu(1 - real).mean(-1) + F.relu(1 + fake).mean(-1),
}


@dataclass
class GANRun:
    """What outlives one step. ``history`` holds one tensor an update and gauge, stacked pairs apart.

    ``average`` is a copy of the generator whose weights follow w <- decay w + (1 - decay) w_now after each of
    the generator's steps, its buffers the generator's own; ``None`` keeps none.
    """

    network: nn.Module  #: G: latents ``(*batch, z)`` -> ``(*batch, *shape)``; has an attribute ``latent``
    critic: nn.Module  #: D: ``(*batch, *shape)`` -> ``(*batch,)``
    network_optimizer: torch.optim.Optimizer
    optimizer: torch.optim.Optimizer  #: the critic's
    rng: torch.Generator
    average: nn.Module | None = None
    decay: float = 0.0
    update: int = 0
    history: dict[str, list[Tensor]] = field(default_factory=dict)
    team: Team | None = None  #: while the pair is trained by several processes together

    def gauge(self, name: str) -> Tensor:
        """One gauge over the updates so far, ``(updates,)`` or ``(updates, S)``."""
        return torch.stack(self.history[name])

    @property
    def stack(self) -> tuple[int, ...]:
        """``(S,)`` for stacked networks, else ``()``."""
        size = getattr(self.network, "stack", None)
        return () if size is None else (size,)

    def latents(self, batch: int) -> Tensor:
        """z ~ N(0, I) from the run's generator, ``(*stack, batch, z)``."""
        device = next(self.network.parameters()).device
        z = torch.empty(*self.stack, batch, self.network.latent, device=device)
        return z.normal_(generator=self.rng)


def new_run(
    network: nn.Module,
    critic: nn.Module,
    *,
    rate: float,
    critic_rate: float | None = None,
    betas: tuple[float, float] = (0.5, 0.9),
    average: float | None = None,
    rng: torch.Generator,
) -> GANRun:
    """A pair with Adam for both, ready for ``train``; ``average`` is the decay of the averaged generator.

    Raises ``ValueError`` if the two are stacked differently or the decay lies outside [0, 1).
    """
    if getattr(network, "stack", None) != getattr(critic, "stack", None):
        raise ValueError(f"generator and critic of different stacks: {network.stack} and {critic.stack}")
    if average is not None and not 0 <= average < 1:
        raise ValueError(f"the average's decay lies in [0, 1), got {average}")
    adam = torch.optim.Adam(network.parameters(), lr=rate, betas=betas)
    critic_adam = torch.optim.Adam(critic.parameters(), lr=critic_rate or rate, betas=betas)
    kept = None if average is None else copy.deepcopy(network).requires_grad_(False)
    return GANRun(network, critic, adam, critic_adam, rng, kept, average or 0.0)


def spectrally_normalised(network: nn.Module, skip: tuple[type[nn.Module], ...] = ()) -> nn.Module:
    """``network`` with each convolution's and linear layer's weight divided by its largest singular value.

    One power iteration a forward pass, *in training mode only*: in eval mode the estimate stands still, which
    sampling needs (Miyato et al. 2018). Changes the network in place and returns it.
    """
    for layer in list(network.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear) and not isinstance(layer, skip):
            nn.utils.parametrizations.spectral_norm(layer)
    return network


def gradient_penalty(
    critic: nn.Module, real: Tensor, fake: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """``E (|grad D(x^)| - 1)^2`` with x^ uniform on the line from a datum to a fake: a scalar, or ``(S,)``.

    real, fake: ``(*batch, *shape)``. Differentiable in the critic's parameters. A smooth ``MLPEnergy`` on
    points of the plane is differentiated forwards, which is cheaper.
    Source: Gulrajani et al. 2017, eq. 3.
    """
    lead = real.ndim - len(critic.shape)
    share = torch.empty(*real.shape[:lead], *[1] * len(critic.shape), dtype=real.dtype, device=real.device)
    between = fake + share.uniform_(generator=generator) * (real - fake)
    with torch.enable_grad():
        if tuple(critic.shape) == (2,) and getattr(critic, "smooth", False):
            axes = torch.eye(2, dtype=real.dtype, device=real.device)
            axes = axes.reshape(2, *[1] * lead, 2).expand(2, *between.shape)
            norm = critic.value_and_tangent(between, axes)[1].square().sum(0).add(1e-12).sqrt()
        else:
            between = between.detach().requires_grad_(True)
            (grad,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            norm = grad.flatten(lead).square().sum(-1).add(1e-12).sqrt()  # the root has no slope at 0
    return (norm - 1).square().mean(-1)


def critic_loss(
    critic: nn.Module,
    real: Tensor,
    fake: Tensor,
    *,
    loss: str = "wasserstein",
    penalty: float = 0.0,
    penalty_batch: int | None = None,
    drift: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's loss, a scalar or ``(S,)``, and its gauges: "gap" E_data[D] - E_fake[D] and "penalty".

    ``penalty_batch`` takes the gradient penalty on the first so many of the batch. Raises ``ValueError`` for
    an unknown loss, and for batches of different shape.
    """
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}: choose one of {', '.join(LOSSES)}")
    if real.shape != fake.shape:
        raise ValueError(f"data {tuple(real.shape)} and fakes {tuple(fake.shape)} differ in shape")
    along = real.ndim - len(critic.shape) - 1  # the batch dimension
    size = real.shape[along]
    plus, minus = critic(torch.cat([real, fake], along)).split([size, size], -1)
    total = LOSSES[loss](plus, minus)
    gauges = {"gap": (plus.mean(-1) - minus.mean(-1)).detach()}
    if drift:
        total = total + drift * (plus.square().mean(-1) + minus.square().mean(-1))
    if penalty:
        count = min(size, penalty_batch or size)
        parts = (real.narrow(along, 0, count), fake.narrow(along, 0, count))
        steep = gradient_penalty(critic, *parts, generator)
        total, gauges["penalty"] = total + penalty * steep, steep.detach()
    return total, gauges


def critic_step(
    critic: nn.Module,
    optimizer: torch.optim.Optimizer,
    real: Tensor,
    fake: Tensor,
    *,
    generator: torch.Generator | None = None,
    team: Team | None = None,
    **loss: float | str | None,
) -> dict[str, Tensor]:
    """One step of the critic on data and (detached) fakes; options and gauges as in ``critic_loss``.

    With a ``team`` the step is along the mean of its processes' gradients.
    """
    total, gauges = critic_loss(critic, real, fake.detach(), generator=generator, **loss)
    optimizer.zero_grad(set_to_none=True)
    total.sum().backward()  # stacked pairs are independent: the sum's gradient is each one's own
    if team is not None:  # by hand: DDP does not know the penalty's second way back
        team.average_gradients(critic)
    optimizer.step()
    return gauges | {"critic": total.detach()}


def generator_step(run: GANRun, batch: int) -> dict[str, Tensor]:
    """One step of the generator on -E[D(G(z))], the critic held; moves the average along."""
    run.critic.requires_grad_(False)
    try:
        loss = -run.critic(run.network(run.latents(batch))).mean(-1)
        run.network_optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        if run.team is not None:
            run.team.average_gradients(run.network)
        run.network_optimizer.step()
    finally:
        run.critic.requires_grad_(True)
    if run.average is not None:
        with torch.no_grad():
            for kept, new in zip(run.average.parameters(), run.network.parameters(), strict=True):
                kept.lerp_(new, 1 - run.decay)
            for kept, new in zip(run.average.buffers(), run.network.buffers(), strict=True):
                kept.copy_(new)
    return {"generator": loss.detach()}


def train(
    run: GANRun,
    data: Tensor,
    updates: int,
    *,
    batch: int,
    critic_steps: int = 5,
    half_level: float = 0.0,
    schedule: Callable[[float], float] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    progress: bool | None = None,
    team: Team | None = None,
    compile: bool | None = None,
    **loss: float | str | None,
) -> GANRun:
    """Bring ``run`` to ``updates`` updates on ``data`` ``(N, *shape)``; returns it.

    An update is ``critic_steps`` critic steps, each on a fresh batch of data (dequantised by uniform noise of
    +-``half_level``) and fresh fakes, and one step of the generator. ``loss`` are the options of
    ``critic_loss``. ``schedule`` maps the share of training done, in [0, 1), to a factor on both rates. With
    ``checkpoint`` (a folder) the state is saved every ``checkpoint_every`` updates and at the end, and
    training resumes from what it finds there with the same numbers as if it had never stopped.

    The processes of a ``team`` (``companion.distributed.team``, under ``torchrun``) train this one pair
    together: ``batch`` and ``penalty_batch`` are divided among them. Batch normalisation, and spectral
    normalisation's power iteration, are each process's own; rank 0's are kept.

    ``compile``: None takes an update as one recorded call on a GPU (not in a team), the penalty's double
    backward and both optimisers included, with the plain loop's numbers up to rounding; False never; True
    raises ``NotCompilableError`` where that cannot be.

    Raises ``FloatingPointError`` with the update when a gauge is not finite, ``CheckpointError`` for a
    checkpoint of another run, ``ValueError`` as ``critic_loss`` and for data that are no floats.
    """
    if not data.is_floating_point():
        raise ValueError(
            f"data must be floating point, got {data.dtype}; bytes become images in [-1, 1] by x / 127.5 - 1"
        )
    groups = [g for o in (run.optimizer, run.network_optimizer) for g in o.param_groups]
    rates = [group.setdefault("initial_lr", group["lr"]) for group in groups]
    settings = {
        "updates": updates, "batch": batch, "critic_steps": critic_steps, "half_level": half_level,
        "rates": [rate * (schedule(0.5) if schedule else 1.0) for rate in rates], "decay": run.decay,
        "network": checkpoints.describe(run.network), "critic": checkpoints.describe(run.critic),
        "data": [*data.shape, round(data.double().mean().item(), 6)], **loss,
    }  # fmt: skip
    run.team, common = team, run.rng
    if run.team is not None:
        batch, run.rng = run.team.share(batch, "a batch of"), run.team.stream(common)
        if loss.get("penalty_batch"):
            loss["penalty_batch"] = max(1, loss["penalty_batch"] // run.team.size)
        run.team.broadcast(run.network, run.critic, run.average)
        progress = False if run.team.rank else progress
    parts = {"network": run.network, "critic": run.critic}
    parts |= {} if run.average is None else {"average": run.average}
    optimizers = {"optimizer": run.optimizer, "network_optimizer": run.network_optimizer}
    if checkpoint is not None and checkpoints.exists(checkpoint):
        run.update, run.history = checkpoints.load(
            checkpoint, parts, optimizers, run.rng, data.device, settings, run.team
        )
        groups = [g for o in (run.optimizer, run.network_optimizer) for g in o.param_groups]
    averaged = run.update

    def update() -> dict[str, Tensor]:
        for _ in range(critic_steps):
            rows = torch.randint(len(data), (*run.stack, batch), generator=run.rng, device=data.device)
            real = data[rows]
            if half_level:
                noise = torch.empty_like(real)
                real = real + noise.uniform_(-half_level, half_level, generator=run.rng)
            with torch.no_grad():
                fake = run.network(run.latents(batch))
            gauges = critic_step(
                run.critic, run.optimizer, real, fake, generator=run.rng, team=run.team, **loss
            )
        return gauges | generator_step(run, batch)

    def state() -> list[Tensor]:
        return tensors_of(run.network, run.critic, run.average)

    taking = Steps(
        optimizers.values(), state, [run.rng], device=data.device,
        count=updates - (0 if checkpoint else run.update),  # recorded or not, also where it is resumed
        compile=compile if run.team is None else False,
    )  # fmt: skip
    bar = tqdm(total=updates, initial=run.update, disable=None if progress is None else not progress)
    with bar, taking:
        while run.update < updates:
            for group, rate in zip(groups, rates, strict=True):
                taking.set_rate(group, rate * (schedule(run.update / updates) if schedule else 1.0))
            for name, value in taking.take("update", update).items():
                run.history.setdefault(name, []).append(value)
            run.update += 1
            bar.update()
            saving = checkpoint is not None and (run.update % checkpoint_every == 0 or run.update == updates)
            if saving or run.update % 100 == 0 or run.update == updates:
                if run.team is not None:
                    average_history(run.history, averaged, run.team)
                    averaged = run.update
                _check_finite(run)
            if saving:
                with taking.settled():
                    checkpoints.save(
                        checkpoint, run.update, parts, optimizers, run.rng, run.history, settings, run.team
                    )
    if run.team is not None:
        run.team.broadcast(run.network, run.critic, run.average)
        run.rng, run.team = common, None
    return run


def _check_finite(run: GANRun) -> None:
    bad = [name for name, values in run.history.items() if not torch.isfinite(values[-1]).all()]
    if bad:
        raise FloatingPointError(
            f"{', '.join(bad)} not finite at update {run.update}. Try a lower rate, a larger penalty or more "
            "critic steps."
        )
