"""Training a graph energy by its Stein discrepancy, and by denoising score matching for comparison.

Graphs have no density, so they are given one: a = a_0 + sigma eps on the coordinates of ``network.py``, at
several levels sigma. With u = sigma s, the model's scaled score s = -dE/da, and a critic f, the value of one
graph at one level is (Grathwohl et al. 2020, scaled by sigma so that the levels weigh alike)::

    V(f) = [ u^T f + sigma Tr grad f - lam |f|^2 ] / P,        f* = (u - sigma s_data) / (2 lam).

``plain``
    the critic climbs V, the model descends u^T f / P: Shankar 2021 as it can be reconstructed.
``anchored``
    f = (u + h) / (2 lam) with u held fixed and h the network. V then falls apart into
    ``[ sigma Tr grad h - |h|^2 / 2 ] / (2 lam P)`` for the critic, whose optimum ``h* = -sigma s_data``
    does not move while the model trains, and ``|u + h|^2 / (4 lam P)`` for the model, a least-squares
    problem. The same discrepancy and the same optimum, without the chase.
``dsm``
    no critic: ``|u + eps|^2 / P``. For data smoothed like this it is what a perfect critic would
    give (the noise is known), hence the control: same network, same noise.
``frozen``
    the anchored model against a critic that never learns: the control that must fail.

**Two forms of every loss.** ``exact=True`` differentiates twice (autograd through ``stein_terms`` and
through the energy's gradient). The default replaces derivatives *along one direction* by central
differences, J v = (F(a + delta v) - F(a - delta v)) / (2 delta) + O(delta^2), so that training needs first
derivatives only and the two evaluations are one batch; the relative error at the default step is some
1e-3, far below the probe's own noise (Pang et al. 2020 do the same for sliced score matching).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from companion._recorded import Steps, tensors_of
from companion._stein_operator import probe as draw_probe
from companion._stein_operator import stein_terms
from companion.energies import frozen
from companion.graphs.batch import GraphBatch
from companion.graphs.network import GraphCritic, GraphEnergy, upper
from companion.langevin import DivergenceError, Gauges

__all__ = [
    "GraphRun",
    "Pool",
    "critic_loss",
    "denoising_loss",
    "difference_trace",
    "dsm_loss",
    "graph_run",
    "model_loss",
    "scaled_score",
    "train",
]

METHODS = ("anchored", "plain", "dsm", "frozen")
_DELTA = 0.01  # of a central difference, in units of sigma a coordinate


class Pool:
    """Training graphs by size, as coordinates: a batch of one size needs neither padding nor mask.

    ``sizes`` and ``counts`` are the histogram that generation draws node counts from.
    """

    def __init__(self, graphs: GraphBatch) -> None:
        if len(graphs) == 0:
            raise ValueError("no graphs to train on")
        n = graphs.sizes
        self.sizes = sorted(set(n.tolist()))
        if self.sizes[0] < 2:
            raise ValueError("a graph of fewer than two nodes has no pair to model; leave it out")
        self.groups = [upper(graphs.adjacency[n == k][:, :k, :k]) for k in self.sizes]
        self.counts = torch.tensor([float(len(group)) for group in self.groups], device=n.device)
        edges = sum(group.sum().item() for group in self.groups)
        self.density = edges / sum(group.numel() for group in self.groups)

    @property
    def max_nodes(self) -> int:
        """N, the number of nodes of the largest graph."""
        return self.sizes[-1]

    def draw(self, batch: int, rng: torch.Generator) -> Tensor:
        """``batch`` graphs of one size, ``(batch, P)``: the size with its share, then with replacement."""
        return self.of_size(self.pick(rng), batch, rng)

    def pick(self, rng: torch.Generator) -> int:
        """A size, as its place in ``sizes``, with its share. ``rng`` on another device would make it wait."""
        return int(torch.multinomial(self.counts.to(rng.device), 1, generator=rng))

    def of_size(self, which: int, batch: int, rng: torch.Generator) -> Tensor:
        """``batch`` graphs of the size at that place, ``(batch, P)``, with replacement."""
        group = self.groups[which]
        return group[torch.randint(len(group), (batch,), generator=rng, device=group.device)]

    def draw_sizes(self, count: int, rng: torch.Generator) -> Tensor:
        """``count`` node numbers from the histogram, ``(count,)`` int64, ascending."""
        drawn = torch.multinomial(self.counts, count, replacement=True, generator=rng)
        return torch.tensor(self.sizes, device=drawn.device)[drawn].sort().values


@dataclass
class GraphRun:
    """What outlives one step. ``history`` holds one tensor a step and gauge.

    ``average`` is the exponential moving average of the energy's weights, the model that is sampled.
    """

    energy: GraphEnergy
    average: GraphEnergy
    optimizer: torch.optim.Optimizer
    pool: Pool
    levels: Tensor  #: ``(L,)``, descending
    rng: torch.Generator
    method: str = "anchored"
    critic: GraphCritic | None = None
    critic_optimizer: torch.optim.Optimizer | None = None
    step: int = 0
    history: dict[str, list[Tensor]] = field(default_factory=dict)

    def gauge(self, name: str) -> Tensor:
        """One gauge over its steps, ``(steps,)``: "dsm", and with a critic "stein", "square", "cosine"."""
        return torch.stack(self.history[name])


def graph_run(
    graphs: GraphBatch,
    levels: tuple[float, ...],
    rng: torch.Generator,
    *,
    method: str = "anchored",
    rate: float = 6e-3,
    critic_rate: float = 6e-3,
    betas: tuple[float, float] = (0.9, 0.95),
    layers: int = 3,
    channels: int = 8,
    node_width: int = 16,
    hidden: int = 32,
) -> GraphRun:
    """Networks, optimisers and pool for ``method`` on the training ``graphs``, on their device.

    Raises ``ValueError`` for an unknown method and levels that are not positive.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if not levels or min(levels) <= 0:
        raise ValueError(f"noise levels must be positive, got {levels}")
    device = graphs.mask.device
    pool = Pool(graphs)
    size = {"layers": layers, "channels": channels, "node_width": node_width, "hidden": hidden}
    # Weights are drawn on the CPU: the same seed gives the same networks on every device.
    cpu = torch.Generator().manual_seed(int(torch.randint(2**31, (1,), generator=rng, device=rng.device)))
    energy = GraphEnergy(pool.max_nodes, pool.density, **size, generator=cpu).to(device)
    average = copy.deepcopy(energy)
    optimizer = torch.optim.Adam(energy.parameters(), rate, betas, fused=True)
    descending = torch.tensor(sorted(levels, reverse=True), device=device)
    run = GraphRun(energy, average.requires_grad_(False), optimizer, pool, descending, rng, method)
    if method != "dsm":
        based = method != "plain"
        run.critic = GraphCritic(pool.max_nodes, pool.density, based=based, **size, generator=cpu).to(device)
        run.critic_optimizer = torch.optim.Adam(run.critic.parameters(), critic_rate, betas, fused=True)
    return run


def scaled_score(
    energy: nn.Module, a: Tensor, sigma: Tensor, mask: Tensor | None = None, create_graph: bool = False
) -> Tensor:
    """u = sigma s = -sigma dE/da, ``(B, P)``: of order one at every level."""
    with torch.enable_grad():
        a = a.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(energy(a, sigma, mask).sum(), a, create_graph=create_graph)
    return -sigma.unsqueeze(-1) * grad


def dsm_loss(
    energy: nn.Module,
    a: Tensor,
    sigma: Tensor,
    noise: Tensor,
    mask: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """mean over graphs of ``|u + eps|^2 / P``, a = a_0 + sigma eps: 1 for a model that knows nothing.

    Source: Vincent 2011; the weighting by sigma^2 as in Song & Ermon 2019. Without ``exact`` the value is
    right and the gradient a central difference.
    """
    return _squares(energy, noise, a, sigma, mask, exact)


def denoising_loss(
    energy: nn.Module,
    graphs: GraphBatch,
    levels: Sequence[float],
    generator: torch.Generator | None = None,
    repeats: int = 1,
) -> list[float]:
    """``dsm_loss`` of all ``graphs``, not of a batch: one number a level, mean over ``repeats`` noises.

    The yardstick for energies that were trained by different losses: held-out graphs, the same noise for the
    same generator state, 1 for an energy that knows nothing. Raises ``ValueError`` for an empty batch.
    """
    per_level = []
    pool = Pool(graphs)
    for level in levels:
        total, count = 0.0, 0
        for clean in pool.groups:
            clean = clean.repeat(repeats, 1)
            noise = torch.empty_like(clean).normal_(generator=generator)
            sigma = torch.full((len(clean),), level, device=clean.device)
            with frozen(energy):
                loss = dsm_loss(energy, clean + level * noise, sigma, noise)
            total, count = total + loss.item() * len(clean), count + len(clean)
        per_level.append(total / count)
    return per_level


def critic_loss(
    critic: nn.Module,
    energy: nn.Module,
    a: Tensor,
    sigma: Tensor,
    *,
    anchored: bool,
    lam: float = 0.5,
    mask: Tensor | None = None,
    exact: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """What the critic makes small on a ``(B, P)`` at levels ``(B,)``: a scalar; and its field at a, detached.

    anchored: ``E[ |h|^2 / 2 - sigma Tr grad h ] / P``, in which the energy does not occur; plain:
    ``-E[ u^T f + sigma Tr grad f - lam |f|^2 ] / P``. One Rademacher probe.
    """
    count = _count(a, mask)
    u = torch.zeros_like(a) if anchored else scaled_score(energy, a, sigma, mask)
    weight = 0.5 if anchored else lam
    if exact:
        real = None if mask is None else upper(mask.unsqueeze(-1) & mask.unsqueeze(-2))
        terms = stein_terms(u, lambda x: critic(x, sigma, mask), a, mask=real, generator=generator)
        value = terms.drift + sigma * terms.trace - weight * terms.square
        with torch.no_grad():
            field_ = critic(a, sigma, mask)
    else:
        f, trace = difference_trace(critic, a, sigma, draw_probe(a, generator=generator), mask)
        value = (u * f).sum(-1) + trace - weight * f.square().sum(-1)
        field_ = f.detach()
    return -(value / count).mean(), field_


def difference_trace(
    critic: nn.Module, a: Tensor, sigma: Tensor, v: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """f(a) (B, P) and sigma v^T (grad f) v (B,), both up to delta^2, from one batch of twice the size.

    With v a probe of ``companion.stein`` the second estimates sigma Tr grad f.
    """
    ahead, behind = _pair(critic, a, _DELTA * sigma.unsqueeze(-1) * v, sigma, mask)
    trace = ((ahead - behind) * v).sum(-1) / (2 * _DELTA)  # the step is delta sigma: sigma / step = 1 / delta
    return (ahead + behind) / 2, trace


def model_loss(
    energy: nn.Module,
    field_: Tensor,
    a: Tensor,
    sigma: Tensor,
    *,
    anchored: bool,
    mask: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """What the model makes small, given the critic's field (B, P) at a, held fixed: a scalar.

    anchored: ``E|u + h|^2 / P`` (its gradient is that of u^T f, times a constant); plain: ``E[u^T f] / P``.
    """
    if anchored:
        return _squares(energy, field_, a, sigma, mask, exact)
    count = _count(a, mask)
    if exact:
        return ((scaled_score(energy, a, sigma, mask, True) * field_).sum(-1) / count).mean()
    return (_along(energy, field_, a, sigma, mask) / count).mean()


def _squares(
    energy: nn.Module, target: Tensor, a: Tensor, sigma: Tensor, mask: Tensor | None, exact: bool
) -> Tensor:
    """mean |u + target|^2 / P."""
    count = _count(a, mask)
    if exact:
        return ((scaled_score(energy, a, sigma, mask, True) + target).square().sum(-1) / count).mean()
    with frozen(energy):
        miss = scaled_score(energy, a, sigma, mask) + target
    value = (miss.square().sum(-1) / count).mean()
    surrogate = 2 * (_along(energy, miss, a, sigma, mask) / count).mean()
    return value + (surrogate - surrogate.detach())  # the value of the first, the gradient of the second


def _along(energy: nn.Module, v: Tensor, a: Tensor, sigma: Tensor, mask: Tensor | None) -> Tensor:
    """u^T v for a fixed v, as a central difference of the energy along v, ``(B,)``."""
    step = _DELTA * sigma / v.square().mean(-1).sqrt().clamp(min=1e-12)  # delta sigma a coordinate, rms
    ahead, behind = _pair(energy, a, step.unsqueeze(-1) * v, sigma, mask)
    return -sigma * (ahead - behind) / (2 * step)


def _pair(
    network: nn.Module, a: Tensor, shift: Tensor, sigma: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The network at a + shift and at a - shift, in one batch."""
    both = network(
        torch.cat([a + shift, a - shift]),
        torch.cat([sigma, sigma]),
        None if mask is None else torch.cat([mask, mask]),
    )
    return both.chunk(2)


def _count(a: Tensor, mask: Tensor | None) -> Tensor | int:
    if mask is None:
        return a.shape[-1]
    n = mask.sum(-1)
    return n * (n - 1) / 2


def train(
    run: GraphRun,
    steps: int,
    *,
    batch: int = 16,
    critic_steps: int = 1,
    lam: float = 0.5,
    warm_up: int = 100,
    hold: float = 0.5,
    final: float = 0.05,
    clip: float = 1.0,
    averaging: float = 0.995,
    score_penalty: float = 0.0,
    critic_averaging: float = 0.99,
    level_weights: tuple[float, ...] | None = None,
    schedule: Callable[[float], float] | None = None,
    exact: bool = False,
    progress: bool | None = None,
    compile: bool | None = None,
) -> GraphRun:
    """Bring ``run`` to ``steps`` model steps by its method; returns it.

    Each model step is preceded by ``critic_steps`` critic steps on fresh batches of ``batch`` graphs of one
    size, the last of which the model shares. The learning rates rise over ``warm_up`` steps, hold for the
    share ``hold`` of the training and fall exponentially to ``final`` of their value (or follow
    ``schedule``, a factor at the share done). ``averaging`` is the decay of the energy's averaged weights,
    which are sampled; ``critic_averaging`` that of the critic's, whose field is the anchored model's target
    (0: the critic as it is): its optimum stands still, so that the average is nearer to it.
    ``score_penalty`` adds that times ``E|u|^2 / P`` to the plain model's loss.

    ``compile``: None takes either kind of step, a graph size at a time, as one recorded call on a GPU, with
    the plain loop's numbers up to rounding; False never; True raises ``NotCompilableError`` where that
    cannot be. Recorded, sizes are drawn on the CPU, so that no step waits for them.

    Raises ``DivergenceError`` with the step when a gauge is no longer finite; that is looked at every 50
    steps, so that a GPU need not wait.
    """
    weights = torch.ones(len(run.levels)) if level_weights is None else torch.tensor(level_weights)
    if weights.shape != run.levels.shape:
        raise ValueError(f"{len(weights)} level weights for {len(run.levels)} levels")
    weights = weights.to(run.levels.device)
    anchored = run.method != "plain"
    optimizers = [o for o in (run.optimizer, run.critic_optimizer) if o is not None]
    rates = [(g, g.setdefault("initial_lr", g["lr"])) for o in optimizers for g in o.param_groups]
    model, smooth = list(run.energy.parameters()), list(run.average.parameters())
    critic = [] if run.critic is None else list(run.critic.parameters())
    averaged = critic_averaging > 0 and run.method == "anchored"  # a plain critic's optimum moves
    slow_critic = copy.deepcopy(run.critic).requires_grad_(False) if averaged else None
    slow = list(slow_critic.parameters()) if averaged else []

    def of_the_critic(which: int, keep: float | Tensor) -> dict[str, Tensor]:
        clean = run.pool.of_size(which, batch, run.rng)
        sigma = run.levels[torch.multinomial(weights, batch, replacement=True, generator=run.rng)]
        noise = torch.empty_like(clean).normal_(generator=run.rng)
        a = clean + sigma.unsqueeze(-1) * noise
        field_ = noise
        if run.critic is not None:
            with frozen(run.energy):
                loss, field_ = critic_loss(
                    run.critic,
                    run.energy,
                    a,
                    sigma,
                    anchored=anchored,
                    lam=lam,
                    exact=exact,
                    generator=run.rng,
                )
            if run.method != "frozen":
                run.critic_optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(critic, clip)
                run.critic_optimizer.step()
                if slow:
                    _lerp(slow, critic, 1 - keep)
        return {"a": a, "sigma": sigma, "noise": noise, "field": field_}

    def of_the_energy(a: Tensor, sigma: Tensor, field_: Tensor, keep: float | Tensor) -> dict[str, Tensor]:
        if slow:
            with torch.no_grad():
                field_ = slow_critic(a, sigma)
        value = model_loss(run.energy, field_, a, sigma, anchored=anchored, exact=exact)
        if score_penalty:
            value = value + score_penalty * _squares(run.energy, torch.zeros_like(a), a, sigma, None, exact)
        run.optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model, clip)
        run.optimizer.step()
        _lerp(smooth, model, 1 - keep)
        return {"value": value.detach(), "field": field_}

    def state() -> list[Tensor]:
        return tensors_of(run.energy, run.average, run.critic, slow_critic)

    taking = Steps(
        optimizers, state, [run.rng], device=run.levels.device, count=steps - run.step, compile=compile
    )
    sizes = run.rng
    if taking.recording and run.rng.device.type != "cpu":
        start = torch.randint(2**31, (), generator=run.rng, device=run.rng.device).item()
        sizes = torch.Generator().manual_seed(start)
    with taking:
        for _ in tqdm(range(run.step, steps), disable=None if progress is None else not progress):
            share = run.step / steps
            factor = schedule(share) if schedule else final ** max(0.0, (share - hold) / (1 - hold))
            for group, rate in rates:
                taking.set_rate(group, rate * factor * min(1.0, (run.step + 1) / warm_up))
            early = (1 + run.step) / (10 + run.step)  # of an average: forget the first steps faster
            for _ in range(critic_steps if run.critic is not None else 1):
                which = run.pool.pick(sizes)
                at = taking.take(
                    ("critic", which),
                    lambda keep, w=which: of_the_critic(w, keep),
                    min(critic_averaging, early),
                )
            done = taking.take(
                "energy", of_the_energy, at["a"], at["sigma"], at["field"], min(averaging, early)
            )
            if run.step % 50 == 0 or run.step == steps - 1:
                _look(run, at["a"], at["sigma"], at["noise"], done["field"], done["value"])
            run.step += 1
    return run


@torch.no_grad()
def _lerp(means: list[Tensor], now: list[Tensor], share: float | Tensor) -> None:
    """Move each mean by ``share`` of its way towards ``now``."""
    if isinstance(share, Tensor):  # of a recorded step; one call for all tensors takes a number only
        for mean, new in zip(means, now, strict=True):
            mean.lerp_(new, share)
    else:
        torch._foreach_lerp_(means, now, share)


def _look(run: GraphRun, a: Tensor, sigma: Tensor, noise: Tensor, field_: Tensor, value: Tensor) -> None:
    """The gauges at one batch: DSM loss of the energy, the critic's size and its agreement with the truth."""
    with frozen(run.energy):
        u = scaled_score(run.energy, a, sigma)
    miss = u + noise  # sigma (s - s_noise): what the critic should point along, on average
    gauges = {"dsm": miss.square().mean(), "model": value.detach()}
    if run.critic is not None:
        f = field_ if run.method == "plain" else u + field_
        cosine = nn.functional.cosine_similarity(f, miss, dim=-1).mean()
        gauges |= {"square": f.square().mean(), "cosine": cosine, "stein": (miss * f).mean()}
    for name, number in gauges.items():
        run.history.setdefault(name, []).append(number)
    run.history.setdefault("step", []).append(torch.tensor(run.step))
    if not torch.isfinite(torch.stack(list(gauges.values()))).all():
        zero = torch.zeros(())
        shown = ", ".join(f"{name} {number.item():.3g}" for name, number in gauges.items())
        raise DivergenceError(run.step, Gauges(zero, zero, zero, zero, zero), f"training diverged ({shown})")
