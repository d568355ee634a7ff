"""Maximum likelihood with MCMC negatives: one step, one loop, its gauges and its checkpoints.

The loss of one update is the difference of mean energies whose gradient is that of the negative
log-likelihood when the negatives follow the model (Hill et al. 2022, eq. of L(theta))::

    L(theta) = (mean E(x+) - mean E(x-)) / T,    x+ = data + data_noise * n.

Gauges of each update: d_t = L(theta_t); r_t, the mean gradient displacement of the chain's last step;
rho = r_t / (eps sqrt(D)), drift over noise.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from companion import checkpoint as checkpoints
from companion._recorded import LOOK, Steps, chain_rows, late_divergence, take_chain_rows, tensors_of
from companion.chains import Bank, LongRunBank
from companion.checkpoint import CheckpointError
from companion.diagnosis import Band, TrainingDiverged, diagnose
from companion.distributed import Team, average_history
from companion.langevin import Chain, DivergenceError, langevin, unasked

LONGEST = 200  # steps of a chain that are recorded as part of an update; longer ones by themselves

__all__ = ["CheckpointError", "Run", "load", "ml_loss", "ml_step", "save", "train"]


@dataclass
class Run:
    """What outlives one update. ``history`` holds one tensor an update and gauge, stacked models apart."""

    energy: nn.Module
    optimizer: torch.optim.Optimizer
    bank: Bank | LongRunBank
    rng: torch.Generator
    network: nn.Module | None = None  #: a generator taught by the chains (short-run), or None
    network_optimizer: torch.optim.Optimizer | None = None
    update: int = 0
    history: dict[str, list[Tensor]] = field(default_factory=dict)
    team: Team | None = None  #: while it is trained by several processes together
    halt: Tensor | None = (
        None  #: while updates are recorded: 1 from where a chain diverged, nothing moves then
    )

    def trainable(self, module: nn.Module) -> nn.Module:
        """``module`` as it is called where its weights are to learn: behind DDP if there is a team."""
        return module if self.team is None else self.team.parallel(module)

    def gauge(self, name: str) -> Tensor:
        """One gauge over the updates so far, ``(updates,)`` or ``(updates, S)``: "d", "r", "rho", ..."""
        return torch.stack(self.history[name])


def ml_loss(energy: nn.Module, positive: Tensor, negative: Tensor, temperature: float | Tensor) -> Tensor:
    """(mean E(x+) - mean E(x-)) / T over the last batch dimension: a scalar, or ``(S,)`` if stacked.

    Minimising it lowers the energy of the data and lifts that of the negatives.
    """
    stacked = getattr(energy, "stack", None) is not None
    plus, minus = _energies(energy, positive, negative, stacked)
    return (plus.mean(-1) - minus.mean(-1)) / temperature


def _energies(energy: nn.Module, positive: Tensor, negative: Tensor, stacked: bool) -> tuple[Tensor, Tensor]:
    values = energy(torch.cat([positive, negative], dim=1 if stacked else 0))  # one pass for both
    return values.split([positive.shape[int(stacked)], negative.shape[int(stacked)]], dim=-1)


def ml_step(
    run: Run,
    positive: Tensor,
    *,
    steps: int,
    step_size: float | Tensor,
    temperature: float | Tensor,
    base_std: float | None = None,
    compile: bool | None = None,
) -> dict[str, Tensor]:
    """One update of ``run`` on the (already noised) batch ``positive``; returns its gauges.

    Draw chains, move them K steps (``compile`` as in ``langevin``), step the energy on L(theta), teach the
    network if there is one (``|x- - G(z)|^2``, no gradient through the chain), put the chains back. Raises
    ``DivergenceError``; with ``run.halt`` it sets that instead, and the chain's own gauges and the step stand
    among the others.
    """
    batch = positive.shape[len(run.bank.stack)]
    drawn = run.bank.draw(batch, run.rng)
    options = {"temperature": temperature, "base_std": base_std, "generator": run.rng}
    told: dict[str, Tensor] = {}
    if run.halt is None:
        chain = langevin(run.energy, drawn.x, steps, step_size, compile=compile, **options)
    else:
        x, moved, trouble = unasked(run.energy, drawn.x, steps, step_size, **options)
        run.halt.copy_(torch.maximum(run.halt, (trouble >= 0).to(run.halt)))
        chain = Chain(torch.where(run.halt > 0, drawn.x, x), moved)  # the bank keeps finite states
        told = chain_rows(moved, trouble)
    # A long-run bank hands out chains that only burn in, behind those that are the negatives.
    negative = chain.x.narrow(len(run.bank.stack), 0, batch)
    plus, minus = _energies(run.trainable(run.energy), positive, negative, stacked=bool(run.bank.stack))
    loss = (plus.mean(-1) - minus.mean(-1)) / temperature  # as ml_loss
    run.optimizer.zero_grad(set_to_none=True)
    loss.sum().backward()  # stacked models are independent: the sum's gradient is each one's own
    run.optimizer.step()
    gauges = {
        "d": loss.detach(), "r": chain.gauges.drift, "rho": chain.gauges.rho,
        "separation": (plus.mean(-1) - minus.mean(-1)).detach() / plus.detach().std(-1),
        "diversity": _spread(negative, len(run.bank.stack)) / _spread(positive, len(run.bank.stack)),
    }  # fmt: skip
    if run.network is not None:
        taught = run.trainable(run.network)(drawn.z)
        error = (taught - chain.x).square().flatten(drawn.index.ndim).sum(-1).mean(-1)
        run.network_optimizer.zero_grad(set_to_none=True)
        error.sum().backward()
        run.network_optimizer.step()
        gauges["teaching"] = error.detach()
    gauges |= run.bank.put(drawn, chain.x, steps, run.rng)
    return gauges | {"age": (drawn.age[..., :batch] + steps).float().mean(-1)} | told


def train(
    run: Run,
    data: Tensor,
    updates: int,
    *,
    batch: int,
    steps: int,
    step_size: float | Tensor,
    temperature: float | Tensor,
    data_noise: float,
    half_level: float = 0.0,
    base_std: float | None = None,
    schedule: Callable[[float], float] | None = None,
    bands: Mapping[str, Band] | None = None,
    window: int = 200,
    log: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    progress: bool | None = None,
    team: Team | None = None,
    compile: bool | None = None,
) -> Run:
    """Bring ``run`` to ``updates`` updates on ``data`` ``(N, *shape)``; returns it.

    Each update draws a batch, dequantises it (uniform noise of +-``half_level``), adds N(0, data_noise^2)
    and calls ``ml_step``. ``schedule`` maps the share of training done, in [0, 1), to a factor on each
    optimiser's learning rate. With ``checkpoint`` (a folder) the state is saved every
    ``checkpoint_every`` updates and at the end, and training resumes from what it finds there: a run
    killed at any update and started again ends with the same numbers as one that was not.

    Every ``window`` updates the gauges are held against ``bands`` (``diagnosis.BANDS[regime]``); a training
    in which one stays outside for a whole window is stopped with what to change. ``log`` is a file to which
    the means of the gauges over each window are appended, a JSON object a line, with the seconds used and
    left; the bar shows the time left as well.

    The processes of a ``team`` (``companion.distributed.team``, under ``torchrun``) train this one run
    together: ``batch`` and the bank are divided evenly among them, which raises ``ValueError`` if it cannot
    be done; the networks must be alike and ``run.rng`` in the same state everywhere, as after the same seed.
    Batch normalisation of ``run.network`` sees one process's share. The log is written by rank 0.

    ``compile``: None takes an update, its chains, its step and the bank, as one recorded call on a GPU (not
    in a team, nor with more than 200 steps a chain), with the plain loop's numbers up to rounding; False
    never; True raises ``NotCompilableError`` where that cannot be. Of a chain that diverges in a recorded
    update one hears up to 20 updates later, but nothing has moved since, and the error names the update.

    Raises ``TrainingDiverged`` (a ``DivergenceError``) when chains leave every bound or a gauge its band,
    ``CheckpointError`` for a checkpoint of another run, ``ValueError`` for data that are no floats.

    Example:

    >>> import torch
    >>> from companion.chains import Bank, born_from_noise
    >>> from companion.energies import GaussianMixture
    >>> from companion.likelihood import Run, train
    >>> from companion.networks import MLPEnergy
    >>> rng = torch.Generator().manual_seed(0)
    >>> data = GaussianMixture.ring().sample(500, rng)
    >>> energy = MLPEnergy((2,), (32, 32), generator=rng)
    >>> bank = Bank(200, born_from_noise((2,), std=2.0), rejuvenation=0.1, generator=rng)
    >>> run = Run(energy, torch.optim.Adam(energy.parameters(), 1e-3), bank, rng)
    >>> settings = dict(batch=50, steps=10, step_size=0.1, temperature=1.0, data_noise=0.0)
    >>> train(run, data, 20, **settings, progress=False).update
    20
    >>> run.gauge("rho").shape
    torch.Size([20])
    """
    if not data.is_floating_point():
        raise ValueError(
            f"data must be floating point, got {data.dtype}; bytes become images in [-1, 1] by x / 127.5 - 1"
        )
    rates = [(group, group.setdefault("initial_lr", group["lr"])) for group in _groups(run)]
    settings = {
        "updates": updates, "batch": batch, "steps": steps, "step_size": _plain(step_size),
        "temperature": _plain(temperature), "data_noise": data_noise, "half_level": half_level,
        "base_std": base_std, "rates": [rate * (schedule(0.5) if schedule else 1.0) for _, rate in rates],
        "energy": checkpoints.describe(run.energy),
        "data": [*data.shape, round(data.double().mean().item(), 6)],
    }  # fmt: skip
    run.team, common = team, run.rng
    if run.team is not None:
        batch, run.rng = run.team.share(batch, "a batch of"), run.team.stream(common)
        run.bank.deal(run.team)
        if run.team.rank:
            log, progress = None, False
    if checkpoint is not None and checkpoints.exists(checkpoint):
        load(run, checkpoint, settings)
        rates = [(group, group["initial_lr"]) for group in _groups(run)]  # loading replaced the groups
    began, first, averaged = time.monotonic(), run.update, run.update
    walk = {
        "steps": steps, "base_std": base_std, "step_size": _placed(step_size, data),
        "temperature": _placed(temperature, data), "compile": False if compile is False else None,
    }  # fmt: skip

    def update() -> dict[str, Tensor]:
        rows = torch.randint(len(data), (*run.bank.stack, batch), generator=run.rng, device=data.device)
        positive = data[rows]
        noise = torch.empty_like(positive)
        if half_level:
            positive = positive + noise.uniform_(-half_level, half_level, generator=run.rng)
        positive = positive + data_noise * noise.normal_(generator=run.rng)
        return ml_step(run, positive, **walk)

    def state() -> list[Tensor]:
        return [*tensors_of(run.energy, run.network), *run.bank.state_dict().values()]

    taking = Steps(
        _optimizers(run).values(), state, [run.rng], device=data.device,
        count=updates - (0 if checkpoint else run.update),  # recorded or not, also where it is resumed
        compile=compile if run.team is None and steps <= LONGEST else False, halting=True,
    )  # fmt: skip
    bar = tqdm(total=updates, initial=run.update, disable=None if progress is None else not progress)
    rest = contextlib.ExitStack()
    rest.callback(setattr, run, "halt", None)
    told: list[dict[str, Tensor]] = []  # of the chains, since it was last asked whether one diverged
    with bar, rest, taking:
        while run.update < updates:
            run.halt = taking.halt
            for group, rate in rates:
                taking.set_rate(group, rate * (schedule(run.update / updates) if schedule else 1.0))
            try:
                gauges = taking.take("update", update)
                told.append(take_chain_rows(gauges))
                for name, value in gauges.items():
                    run.history.setdefault(name, []).append(value)
                run.update += 1
                saving = checkpoint is not None and (
                    run.update % checkpoint_every == 0 or run.update == updates
                )
                looking = run.update % window == 0 and (log is not None or bands is not None)
                if saving or looking or len(told) >= LOOK or run.update == updates or taking.halt is None:
                    _ask(run, told)
            except DivergenceError as error:
                findings = diagnose(run.history, bands or {}, min(20, window))
                raise TrainingDiverged(run.update, findings, error) from error
            bar.update()
            if not bar.disable and run.update % 100 == 0:
                bar.set_postfix({k: f"{v.mean().item():.3g}" for k, v in gauges.items()})
            if run.team is not None and (saving or run.update % window == 0 or run.update == updates):
                average_history(run.history, averaged, run.team)
                averaged = run.update
            if looking:
                if log is not None:
                    _log(run, Path(log), window, time.monotonic() - began, first, updates)
                if bands is not None and (findings := diagnose(run.history, bands, window)):
                    raise TrainingDiverged(run.update, findings)
            if saving:
                with taking.settled():
                    save(run, checkpoint, settings)
    if run.team is not None:
        run.bank.collect(run.team)
        run.team.broadcast(run.network)  # batch norm's statistics
        run.team.forget(run.energy, run.network)
        run.rng, run.team = common, None
    return run


def _ask(run: Run, told: list[dict[str, Tensor]]) -> None:
    """Raise ``DivergenceError`` if a chain diverged in a recorded update, ``run`` as it was before that."""
    trouble = late_divergence(told)
    told.clear()
    if trouble is not None:
        back, error = trouble
        run.update -= back
        for values in run.history.values():
            del values[-back:]
        raise error


def _placed(value: float | Tensor, like: Tensor) -> float | Tensor:
    return value.to(like) if isinstance(value, Tensor) else value


def save(run: Run, folder: str | os.PathLike[str], settings: dict | None = None) -> Path:
    """Write the run's whole state to ``folder``, whole or not at all (``companion.checkpoint``).

    Returns the path of its ``checkpoint.json``; raises ``CheckpointError`` if it cannot write.
    """
    return checkpoints.save(
        folder, run.update, _parts(run), _optimizers(run), run.rng, run.history, settings, run.team
    )


def load(run: Run, folder: str | os.PathLike[str], settings: dict | None = None) -> Run:
    """Restore ``run`` (built as before, same shapes) from ``folder``, bit for bit.

    Raises ``CheckpointError`` if the files are missing or damaged, were made with other ``settings``, or
    do not fit the run's networks, bank or optimisers.
    """
    run.update, run.history = checkpoints.load(
        folder, _parts(run), _optimizers(run), run.rng, run.bank.x.device, settings, run.team
    )
    return run


def _spread(x: Tensor, batch_dim: int) -> Tensor:
    """Total variance of a batch of states: ``(*stack, B, *shape)`` -> ``(*stack,)``."""
    return x.var(batch_dim).flatten(batch_dim).sum(-1)


def _log(run: Run, path: Path, window: int, used: float, first: int, updates: int) -> None:
    means = {k: _plain(torch.stack(v[-window:]).double().mean(0)) for k, v in run.history.items()}
    left = used / (run.update - first) * (updates - run.update)
    line = {"update": run.update, "seconds": round(used, 1), "seconds_left": round(left, 1)} | means
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _parts(run: Run) -> dict[str, nn.Module | Bank | LongRunBank]:
    parts = {"energy": run.energy, "bank": run.bank}
    return parts if run.network is None else parts | {"network": run.network}


def _optimizers(run: Run) -> dict[str, torch.optim.Optimizer]:
    both = {"optimizer": run.optimizer, "network_optimizer": run.network_optimizer}
    return {name: optimizer for name, optimizer in both.items() if optimizer is not None}


def _groups(run: Run) -> list[dict]:
    return [group for optimizer in _optimizers(run).values() for group in optimizer.param_groups]


def _plain(value: float | Tensor) -> float | list[float]:
    return value.tolist() if isinstance(value, Tensor) else value
