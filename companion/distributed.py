"""Several processes that train one model: ``torchrun`` starts them, a ``Team`` keeps them one model.

``torchrun --nproc-per-node 8 ...`` starts as many processes of the same program. All of them build the same
networks and banks from the same seed; ``likelihood.train`` and ``gan.train``, given the ``team``, divide the
work: each process takes its share of the batch and of the bank and draws from a
stream of its own, gradients are averaged (``DistributedDataParallel`` where one pass forward is followed by
one backward), gauges are averaged. As each share is of the same size, the averaged gradient is that of the
whole batch. When training is done every process holds the whole bank and the same weights again, and the
generator that it was given stands where it stood in all of them: what a chapter does between two trainings
is done by each process alike.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Team", "team"]

#: How long a process waits for the others. A dead one is noticed by torchrun long before; this is for those
#: that compute something of different length between two trainings.
PATIENCE = timedelta(hours=2)

_joined: dict[str, Team] = {}  # the one of this process, by device


@dataclass(eq=False)
class Team:
    """This process's place among those of its job."""

    rank: int  #: of this process, 0 to size - 1
    size: int
    device: torch.device
    _parallel: dict[int, DistributedDataParallel] = field(default_factory=dict, repr=False)

    def share(self, count: int, what: str) -> int:
        """Each process's part of ``count``; ``ValueError`` if the team cannot divide it evenly."""
        if count % self.size or count < self.size:
            below = max(count // self.size, 1) * self.size
            raise ValueError(
                f"{what} {count} cannot be shared evenly by {self.size} processes: take {below} or "
                f"{below + self.size}, or start another number of processes"
            )
        return count // self.size

    def stream(self, rng: torch.Generator) -> torch.Generator:
        """A generator of this process's own, seeded from ``rng`` (in the same state everywhere) and the rank.

        Takes one draw from ``rng``, the same in every process.
        """
        common = torch.randint(2**31, (), generator=rng, device=rng.device).item()
        return torch.Generator(rng.device).manual_seed(common * 2**20 + self.rank)

    def parallel(self, module: nn.Module) -> nn.Module:
        """``module`` behind DDP, made once: to be called where a backward pass follows, not for sampling.

        The first call takes weights and buffers of rank 0 everywhere. A module without a trainable weight is
        returned as it is.
        """
        known = self._parallel.get(id(module))
        if known is None or known.module is not module:
            if not any(p.requires_grad for p in module.parameters()):
                return module
            ids = [self.device.index] if self.device.type == "cuda" else None
            known = self._parallel[id(module)] = DistributedDataParallel(module, device_ids=ids)
        return known

    def forget(self, *modules: nn.Module | None) -> None:
        """Drop what ``parallel`` keeps of these modules, once their training is over."""
        for module in modules:
            self._parallel.pop(id(module), None)

    def average(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor over the processes, in one message."""
        wide = torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32
        flat = torch.cat([value.detach().reshape(-1).to(self.device, wide) for value in values])
        dist.all_reduce(flat)
        parts = (flat / self.size).split([value.numel() for value in values])
        return [part.view(v.shape).to(v.dtype) for part, v in zip(parts, values, strict=True)]

    def average_gradients(self, module: nn.Module) -> None:
        """Replace each gradient by its mean over the processes: where DDP's one-to-one passes do not fit."""
        with_grad = [p for p in module.parameters() if p.grad is not None]
        for p, mean in zip(with_grad, self.average([p.grad for p in with_grad]), strict=True):
            p.grad.copy_(mean)

    def broadcast(self, *modules: nn.Module | None) -> None:
        """Give every process rank 0's weights and buffers, such as batch norm's statistics."""
        with torch.no_grad():
            for module in modules:
                if module is not None:
                    for tensor in [*module.parameters(), *module.buffers()]:
                        dist.broadcast(tensor, 0)

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """Undo ``part = whole[rank::size]`` along ``dim``: the whole tensor, in every process."""
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.stack(parts, dim + 1).flatten(dim, dim + 1)  # interleaved as it was dealt out

    def from_first(self, value: float) -> float:
        """Rank 0's number, in every process: for what depends on a clock."""
        number = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(number, 0)
        return number.item()

    def agree(self, yes: bool) -> bool:
        """Whether all say yes. Waits for all of them."""
        votes = torch.tensor(int(yes), device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MIN)
        return bool(votes.item())


def team(device: torch.device | str) -> Team | None:
    """The processes of this job, started by ``torchrun`` or joined by ``init_process_group``; else None.

    The first call joins them: NCCL for tensors on a GPU, Gloo for those on a CPU. Raises ``RuntimeError`` if
    the others are not there, or were joined for the other kind of device.
    """
    device = torch.device(device)
    if not dist.is_available():
        return None
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched() or os.environ.get("WORLD_SIZE") == "1":
            return None
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    if dist.get_world_size() == 1:
        return None
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda" and "nccl" not in dist.get_backend():
        raise RuntimeError("these processes were joined for CPU tensors (Gloo), the data lie on a GPU")
    return _joined.setdefault(str(device), Team(dist.get_rank(), dist.get_world_size(), device))


def average_history(history: dict[str, list[Tensor]], since: int, team: Team) -> None:
    """Average the gauges from update ``since`` on over the processes, in place."""
    names = sorted(name for name, values in history.items() if len(values) > since)
    if names:
        new: Iterable[Tensor] = team.average([torch.stack(history[name][since:]) for name in names])
        for name, values in zip(names, new, strict=True):
            history[name][since:] = values.unbind(0)
