"""Where chains start and how old they get: the bank of persistent chains and its policies.

The regimes of Hill et al. 2022 differ only here. A chain's age is the number of Langevin steps since its
birth. ``rejuvenation=1`` is no bank at all: every drawn chain is born anew, as in cooperative learning
or noise-initialised short-run training. ``rejuvenation=0.5, max_visits=4`` is the short-run policy, a
small probability without limit the mid-run one, and ``graduate`` between two banks the long-run one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from companion.distributed import Team

__all__ = [
    "Bank",
    "Birth",
    "Draw",
    "LongRunBank",
    "born_from",
    "born_from_data",
    "born_from_noise",
    "graduate",
]

#: birth(batch, generator) -> states ``(*batch, *shape)`` and, if a network made them, latents
#: ``(*batch, z)``.
Birth = Callable[[tuple[int, ...], torch.Generator | None], tuple[Tensor, Tensor | None]]


def born_from_noise(
    shape: tuple[int, ...], std: float | None = None, device: torch.device | str | None = None
) -> Birth:
    """Births uniform on [-1, 1]^D or, if ``std`` is given, from N(0, std^2 I)."""

    def birth(batch: tuple[int, ...], generator: torch.Generator | None) -> tuple[Tensor, None]:
        x = torch.empty(*batch, *shape, device=device)
        return (x.uniform_(-1, 1, generator=generator) if std is None else _normal_(x, generator) * std), None

    return birth


def born_from_data(data: Tensor, noise_std: float = 0.0) -> Birth:
    """Births from randomly drawn rows of ``data`` ``(N, *shape)`` plus N(0, noise_std^2) noise."""

    def birth(batch: tuple[int, ...], generator: torch.Generator | None) -> tuple[Tensor, None]:
        x = data[torch.randint(len(data), batch, generator=generator, device=data.device)]
        return (x + noise_std * _normal_(torch.empty_like(x), generator) if noise_std else x), None

    return birth


def born_from(network: nn.Module) -> Birth:
    """Births G(z), z ~ N(0, I), from a network with an attribute ``latent`` (the size of z).

    The network is used as it is at that moment and in its current mode: train mode keeps batch
    normalisation on the batch's own statistics, as the official CIFAR-10 short-run code does.
    """
    device = next(network.parameters()).device

    def birth(batch: tuple[int, ...], generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        z = _normal_(torch.empty(*batch, network.latent, device=device), generator)
        with torch.no_grad():
            return network(z), z

    return birth


def _normal_(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return x.normal_(generator=generator)


@dataclass
class Draw:
    """Chains taken out of a bank for one visit; all tensors are copies."""

    index: Tensor  #: ``(*stack, B)`` slots
    x: Tensor  #: ``(*stack, B, *shape)`` states, rebirths included
    z: Tensor | None  #: ``(*stack, B, z)`` latents of their births
    born: Tensor  #: ``(*stack, B)`` bool: reborn at this draw
    visits: Tensor  #: ``(*stack, B)`` visits since birth, before this one
    age: Tensor  #: ``(*stack, B)`` Langevin steps since birth, before this visit


class Bank:
    """``size`` persistent chains, for each of S stacked models if ``stack`` is given.

    At each draw a chain is reborn with probability ``rejuvenation``, or when it has had
    ``max_visits`` visits. With p = 1/2 and 4 visits of K steps the age at use is K, 2K, 3K, 4K with
    probability 8/15, 4/15, 2/15, 1/15.

    Raises ``ValueError`` for a probability outside [0, 1] or a limit below 1, and when more chains are
    drawn than there are.

    Example:

    >>> import torch
    >>> from companion.chains import Bank, born_from_noise
    >>> rng = torch.Generator().manual_seed(0)
    >>> bank = Bank(100, born_from_noise((2,)), rejuvenation=0.5, max_visits=4, generator=rng)
    >>> draw = bank.draw(10, rng)
    >>> _ = bank.put(draw, draw.x + 0.1, steps=30)  # where a chain of 30 steps would have ended
    >>> int(bank.age.max()), int((bank.age == 30).sum())
    (30, 10)
    """

    def __init__(
        self,
        size: int,
        birth: Birth,
        *,
        rejuvenation: float,
        max_visits: int | None = None,
        stack: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 <= rejuvenation <= 1:
            raise ValueError(f"rejuvenation is a probability, got {rejuvenation}")
        if size < 1 or (max_visits is not None and max_visits < 1):
            raise ValueError(f"a bank needs size >= 1 and max_visits >= 1, got {size} and {max_visits}")
        self.size, self.birth, self.stack = size, birth, () if stack is None else (stack,)
        self.rejuvenation, self.max_visits = rejuvenation, max_visits
        self.x, self.z = birth((*self.stack, size), generator)
        self.visits = torch.zeros(*self.stack, size, dtype=torch.long, device=self.x.device)
        self.age = torch.zeros_like(self.visits)

    def draw(self, batch: int, generator: torch.Generator | None = None) -> Draw:
        """Take ``batch`` distinct chains, a set of its own for each stacked model, reborn by the policy."""
        if batch > self.size:
            raise ValueError(f"cannot draw {batch} distinct chains from a bank of {self.size}")
        keys = torch.rand(*self.stack, self.size, generator=generator, device=self.x.device)
        index = keys.topk(batch, dim=-1).indices  # distinct and uniform
        at = self._at(index)
        visits, age, x = self.visits[at], self.age[at], self.x[at]
        z = None if self.z is None else self.z[at]
        if self.rejuvenation == 0 and self.max_visits is None:  # nobody is ever reborn: nothing to draw
            return Draw(index, x, z, torch.zeros_like(index, dtype=torch.bool), visits, age)
        born = torch.rand(*self.stack, batch, generator=generator, device=x.device) < self.rejuvenation
        if self.max_visits is not None:
            born |= visits >= self.max_visits
        # A birth for every drawn slot, used where it is due: no data-dependent shape, no wait for a GPU.
        new_x, new_z = self.birth((*self.stack, batch), generator)
        x = torch.where(_like(born, x), new_x, x)
        z = None if z is None or new_z is None else torch.where(_like(born, z), new_z, z)
        return Draw(index, x, z, born, visits.masked_fill(born, 0), age.masked_fill(born, 0))

    def put(
        self, draw: Draw, x: Tensor, steps: int, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Write back the drawn chains after ``steps`` Langevin steps brought them to x.

        Returns the bank's gauges of this update; a plain bank has none (and draws nothing).
        """
        at = self._at(draw.index)
        self.x[at], self.visits[at], self.age[at] = x.detach(), draw.visits + 1, draw.age + steps
        if self.z is not None and draw.z is not None:
            self.z[at] = draw.z
        return {}

    def report(self) -> dict[str, float]:
        """Mean and largest age (Langevin steps) and mean number of visits of the chains as they lie."""
        return {
            "mean_age": self.age.float().mean().item(),
            "max_age": float(self.age.max()),
            "mean_visits": self.visits.float().mean().item(),
        }

    def stagger(self, visits: int, generator: torch.Generator | None = None) -> None:
        """Draw the visit counters uniformly from [0, visits), so that graduations spread evenly."""
        shape, device = self.visits.shape, self.visits.device
        self.visits = torch.randint(visits, shape, generator=generator, device=device)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that changes, as tensors; ``load_state_dict`` restores it bit for bit."""
        state = {"x": self.x, "visits": self.visits, "age": self.age}
        return state if self.z is None else state | {"z": self.z}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ``ValueError`` if the state is of another bank (a missing tensor or another shape)."""
        for name, tensor in self.state_dict().items():
            if name not in state or state[name].shape != tensor.shape:
                found = tuple(state[name].shape) if name in state else "missing"
                raise ValueError(f"bank state {name!r} is {found}, this bank needs {tuple(tensor.shape)}")
            getattr(self, name).copy_(state[name])

    def deal(self, team: Team) -> None:
        """Keep every ``size``-th chain, from the process's rank on: the bank is dealt out to the team.

        Raises ``ValueError`` if it cannot be dealt out evenly.
        """
        share = team.share(self.size, "a bank of")
        along = len(self.stack)
        for name, tensor in self.state_dict().items():
            setattr(
                self, name, tensor.unflatten(along, (share, team.size)).select(along + 1, team.rank).clone()
            )
        self.size = share

    def collect(self, team: Team) -> None:
        """Undo ``deal``: every process holds all chains, each as the process that had it left it."""
        for name, tensor in self.state_dict().items():
            setattr(self, name, team.gather(tensor, len(self.stack)))
        self.size *= team.size

    def _at(self, index: Tensor) -> tuple[Tensor, ...]:
        if not self.stack:
            return (index,)
        return torch.arange(self.stack[0], device=index.device).unsqueeze(1), index


def graduate(
    source: Bank,
    drawn: Draw,
    target: Bank,
    slots: Draw,
    visits: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Move chains that had at least ``visits`` visits from a burn-in bank into the update bank.

    Called after both draws of an update were put back. Chain i of ``drawn`` overwrites slot i of
    ``slots``, with its age; its own slot is reborn (Hill et al. 2022, long-run: 750 visits of 100
    steps). Returns the mask of those that moved, ``(*stack, B)``.
    """
    if drawn.index.shape != slots.index.shape:
        raise ValueError("graduation pairs chains with slots: draw as many from either bank")
    at, to = source._at(drawn.index), target._at(slots.index)
    moved = source.visits[at] >= visits
    for name in ("x", "visits", "age"):
        ours, theirs = getattr(source, name), getattr(target, name)
        theirs[to] = torch.where(_like(moved, ours[at]), ours[at], theirs[to])
    new_x, new_z = source.birth(tuple(moved.shape), generator)
    source.x[at] = torch.where(_like(moved, new_x), new_x, source.x[at])
    if source.z is not None and new_z is not None:
        source.z[at] = torch.where(_like(moved, new_z), new_z, source.z[at])
    source.visits[at] = source.visits[at].masked_fill(moved, 0)
    source.age[at] = source.age[at].masked_fill(moved, 0)
    return moved


class LongRunBank:
    """Two banks behind the face of one: chains burn in for ``visits`` visits before they may teach.

    ``draw(B)`` takes B chains of the update bank, which are the negatives, and behind them B of the
    burn-in bank, which only walk: ``(*stack, 2 B, *shape)``, so that one call of the sampler moves both.
    ``put`` writes both back and graduates. Neither bank rejuvenates: no negative is ever younger than
    ``visits`` visits, except for the first generation with which the update bank is filled.

    Source: Hill et al. 2022, the long-run regime (750 visits of 100 steps, banks of 10,000 and 1,000).
    Raises ``ValueError`` if the banks are of different stacks or reborn by themselves.
    """

    def __init__(self, update: Bank, burn_in: Bank, visits: int) -> None:
        if update.stack != burn_in.stack:
            raise ValueError(f"banks of different stacks: {update.stack} and {burn_in.stack}")
        if update.rejuvenation or burn_in.rejuvenation or visits < 1:
            raise ValueError("the long-run policy needs visits >= 1 and two banks with rejuvenation=0")
        self.update, self.burn_in, self.visits = update, burn_in, visits

    @property
    def birth(self) -> Birth:
        """How the update bank's chains are born."""
        return self.update.birth

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading dimensions of both banks: ``(S,)`` for S models side by side, or ``()``."""
        return self.update.stack

    @property
    def x(self) -> Tensor:
        """The chains that may teach, ``(*stack, size, *shape)``."""
        return self.update.x

    def draw(self, batch: int, generator: torch.Generator | None = None) -> Draw:
        """``batch`` chains of either bank, those of the update bank first; nothing is reborn here."""
        parts = [bank.draw(batch, generator) for bank in (self.update, self.burn_in)]
        along = len(self.stack)
        fields = {
            name: torch.cat([getattr(part, name) for part in parts], along)
            for name in ("index", "x", "born", "visits", "age")
        }
        return Draw(z=None, **fields)

    def put(
        self, draw: Draw, x: Tensor, steps: int, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Write back both halves and graduate; gauges: ``graduated``, how many moved, ``(*stack,)``."""
        along = len(self.stack)
        halves = [
            Draw(z=None, **dict(zip(("index", "x", "born", "visits", "age"), part, strict=True)))
            for part in zip(
                *(v.chunk(2, along) for v in (draw.index, x, draw.born, draw.visits, draw.age)), strict=True
            )
        ]
        slots, drawn = halves
        self.update.put(slots, slots.x, steps)
        self.burn_in.put(drawn, drawn.x, steps)
        moved = graduate(self.burn_in, drawn, self.update, slots, self.visits, generator)
        return {"graduated": moved.sum(-1).float()}

    def deal(self, team: Team) -> None:
        """Deal out both banks to the team, as ``Bank.deal`` does with one."""
        for bank in (self.update, self.burn_in):
            bank.deal(team)

    def collect(self, team: Team) -> None:
        """Undo ``deal`` for both banks, as ``Bank.collect``."""
        for bank in (self.update, self.burn_in):
            bank.collect(team)

    def report(self) -> dict[str, float]:
        """Ages and visits of the update bank, and under ``burn_in_...`` those of the other."""
        return self.update.report() | {f"burn_in_{k}": v for k, v in self.burn_in.report().items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that changes in either bank, as tensors."""
        banks = {"update": self.update, "burn_in": self.burn_in}
        return {f"{name}.{k}": v for name, bank in banks.items() for k, v in bank.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ``ValueError`` if the state is of other banks."""
        for name, bank in {"update": self.update, "burn_in": self.burn_in}.items():
            try:
                bank.load_state_dict(
                    {k: state[f"{name}.{k}"] for k in bank.state_dict() if f"{name}.{k}" in state}
                )
            except ValueError as error:
                raise ValueError(f"{name} bank: {error}") from error


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
