"""Training steps as one call: on a GPU an update is recorded once as a CUDA graph and replayed.

An update of a small model is some hundred kernels, with a double backward or a second pass twice as many;
launching them one by one takes a GPU longer than running them. ``Steps`` takes a function that does the whole
update on tensors, records it, and replays it from then on. For that the update must be the same operations
each time: what changes lies in tensors (weights, the optimisers' moments, banks, generators), or is handed to
the function as an argument (rows, rates). Rates of the optimisers are tensors meanwhile.

The first ``WARM_UP`` updates of a kind run operation by operation; so does the next, and is then undone,
recorded, replayed and compared: a recording that does not change the weights as the update itself did is not
used, and what counts is always what the plain update has done. Only then replays follow. An update that
cannot be recorded, because it waits for the device or is not reproduced, goes on operation by operation, with
a warning that says why.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from companion import _compiled
from companion._compiled import NotCompilableError
from companion.langevin import DivergenceError, Gauges

__all__ = ["NotCompilableError", "Steps", "chain_rows", "late_divergence", "take_chain_rows", "tensors_of"]

WARM_UP = 3  # updates of a kind before it is recorded
SHORTEST = 40  # updates below which recording does not pay
KINDS = 64  # recordings at most: each holds its own memory
#: Of its change, by how much a tensor may differ between plain and replayed update: rounding, not more.
APART = 0.1
#: The share of tensors that may differ by more: where gradients are nothing but rounding, Adam takes signs.
MANY = 0.25
LOOK = 20  # recorded updates after which a loop asks whether a chain has diverged

Update = Callable[..., dict[str, Tensor]]
_RECORDABLE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_CHAIN = "chain."  # of a result that tells how an update's chains went


def chain_rows(gauges: Gauges, trouble: Tensor) -> dict[str, Tensor]:
    """An update's results from ``langevin.unasked``, for ``late_divergence``."""
    return {_CHAIN + name: value for name, value in vars(gauges).items()} | {_CHAIN + "step": trouble}


def take_chain_rows(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take what ``chain_rows`` has put among an update's results out of them."""
    return {name: results.pop(name) for name in list(results) if name.startswith(_CHAIN)}


def late_divergence(told: list[dict[str, Tensor]]) -> tuple[int, DivergenceError] | None:
    """How many of these updates, the last ones, came after a chain had diverged (that one included), and the
    error that ``langevin`` would have raised; None if all went well. Waits for the device once."""
    rows = [row for row in told if row]
    if not rows:
        return None
    steps = torch.stack([row[_CHAIN + "step"] for row in rows]).tolist()
    first = next((i for i, step in enumerate(steps) if step >= 0), None)
    if first is None:
        return None
    gauges = {name.removeprefix(_CHAIN): v for name, v in rows[first].items() if name != _CHAIN + "step"}
    error = DivergenceError(steps[first], Gauges(**gauges), "non-finite energy or state")
    return len(rows) - first, error


def tensors_of(*modules: nn.Module | None) -> list[Tensor]:
    """Parameters and buffers of the modules."""
    return [t for m in modules if m is not None for t in [*m.parameters(), *m.buffers()]]


def _waited(told: list[warnings.WarningMessage]) -> bool:
    """Whether torch has warned of a wait; what else there was to be told is told again."""
    waits = False
    for warning in told:
        text = str(warning.message)
        if text.startswith("called a synchronizing CUDA operation"):
            waits = True
        elif not text.startswith("Synchronization debug mode is a prototype"):  # that it may overlook some
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return waits


@dataclass
class _Kind:
    """One recording: what it reads from outside, how often the update has run, and its replay.

    ``update`` is kept because a recording goes on reading the tensors that it closes over. Of the replay's
    results those in float32 lie, one behind the other, in one more tensor, so that a copy of all is one call.
    """

    inputs: list[Tensor]
    update: Update
    seen: int = 0
    replay: Callable[[], tuple[dict[str, Tensor], Tensor]] | None = None

    def packed(self) -> tuple[dict[str, Tensor], Tensor]:
        results = self.update(*self.inputs)
        alike = [v.reshape(-1) for v in results.values() if v.dtype == torch.float32]
        return results, torch.cat(alike) if alike else torch.empty(0)

    def again(self) -> dict[str, Tensor]:
        """Replay; copies of the results, which the next replay overwrites."""
        results, alike = self.replay()
        names = [name for name, v in results.items() if v.dtype == torch.float32]
        parts = alike.clone().split([results[name].numel() for name in names])
        copies = {name: part.view(results[name].shape) for name, part in zip(names, parts, strict=True)}
        return {name: copies[name] if name in copies else v.clone() for name, v in results.items()}


class Steps:
    """The updates of one training loop; a context within which they may be recorded.

    ``optimizers``: all that step in it (Adam, AdamW or SGD, or a wrapper with a ``base``). ``state``: gives
    every tensor that an update changes in place, beside the optimisers' own. ``generators``: those it draws
    from. ``count``: how many updates are to come; fewer than ``SHORTEST`` are not recorded. ``compile``: None
    records on a GPU what can be recorded; False never; True raises ``NotCompilableError`` where it cannot.
    ``halting``: on the device ``halt`` is then a number that an update may set to 1; from there on no
    optimiser moves, so that trouble may be looked for later.

    Example:

    >>> import torch
    >>> from companion._recorded import Steps, tensors_of
    >>> net = torch.nn.Linear(2, 1)
    >>> sgd = torch.optim.SGD(net.parameters(), 0.1)
    >>> def update(x):
    ...     sgd.zero_grad()
    ...     loss = net(x).square().mean()
    ...     loss.backward()
    ...     sgd.step()
    ...     return {"loss": loss.detach()}
    >>> with Steps([sgd], lambda: tensors_of(net), [], device="cpu", count=100) as steps:
    ...     for _ in range(100):
    ...         gauges = steps.take("update", update, torch.ones(5, 2))
    >>> steps.recording, bool(gauges["loss"] < 0.1)  # a CPU has nothing to gain
    (False, True)
    """

    def __init__(
        self,
        optimizers: Iterable[torch.optim.Optimizer | None],
        state: Callable[[], Sequence[Tensor]],
        generators: Iterable[torch.Generator],
        *,
        device: torch.device | str,
        count: int,
        compile: bool | None = None,
        halting: bool = False,
    ) -> None:
        self.device, self.state, self.generators = torch.device(device), state, list(generators)
        self.optimizers = [getattr(o, "base", o) for o in optimizers if o is not None]
        self.wanted, self.halting = compile, halting
        self._index = self.device.index
        if self.device.type == "cuda" and self._index is None:
            self._index = torch.cuda.current_device()
        obstacle = self._obstacle()
        if compile and obstacle:
            raise NotCompilableError(f"this training cannot be recorded: {obstacle}")
        self.recording = compile is not False and not obstacle and (bool(compile) or count >= SHORTEST)
        self.halt: Tensor | None = None
        self._kinds: dict[Any, _Kind] = {}
        self._before: list[tuple[dict, dict[str, Any]]] = []  # groups as they were
        self._rates: list[tuple[dict, Tensor]] = []

    def _obstacle(self) -> str | None:
        if _compiled._mechanism(self.device) != "graph":
            return f"updates are recorded on a GPU, not on {self.device.type}"
        for optimizer in self.optimizers:
            if type(optimizer) not in _RECORDABLE:
                known = ", ".join(kind.__name__ for kind in _RECORDABLE)
                return f"{type(optimizer).__name__} is not among the optimisers that can be ({known})"
        if any(g.device.type != self.device.type for g in self.generators):
            return "its generator is not on the device"
        return None

    def __enter__(self) -> Steps:
        if self.recording:
            if self.halting:
                self.halt = torch.zeros((), dtype=torch.float32, device=self.device)
            groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
            # float32, as the fused optimisers read it on a GPU.
            blank = torch.zeros(len(groups), dtype=torch.float32, device=self.device)
            self._rates = list(zip(groups, blank.unbind(), strict=True))
            self._switch_on()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def _stop(self) -> None:
        """Leave everything as a loop without recordings knows it."""
        if not self.recording:
            return
        self._switch_off()
        self.recording, self.halt = False, None
        self._kinds.clear()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None  # its memory is a recording's
                    step = optimizer.state[p].get("step") if p in optimizer.state else None
                    if isinstance(step, Tensor) and not (group.get("fused") or group.get("capturable")):
                        optimizer.state[p]["step"] = step.cpu()

    def _switch_on(self) -> None:
        """Rates as tensors, optimisers in their fused and capturable form, counts of steps on the device."""
        self._before = []
        for group, rate in self._rates:
            kept = {name: group[name] for name in ("lr", "fused", "foreach", "capturable") if name in group}
            self._before.append((group, kept))
            rate.fill_(float(group["lr"]))
            group |= {"lr": rate, "fused": True, "foreach": False}
            if "capturable" in group:
                group["capturable"] = self.device.type == "cuda"
        for optimizer in self.optimizers:
            if self.halt is not None:
                optimizer.found_inf = self.halt
            optimizer._warned_capturable_if_run_uncaptured = True  # before its recording an update is not
            for p, slots in optimizer.state.items():
                if isinstance(slots.get("step"), Tensor):
                    slots["step"] = slots["step"].to(p.device, torch.float32)

    def _switch_off(self) -> None:
        for group, kept in self._before:
            group |= kept | {"lr": group["lr"].item()}
        self._before = []
        for optimizer in self.optimizers:
            if self.halt is not None:
                del optimizer.found_inf

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Within it the optimisers are as without recordings: for writing a checkpoint."""
        if not self.recording:
            yield
            return
        self._switch_off()
        try:
            yield
        finally:
            self._switch_on()

    def set_rate(self, group: dict, rate: float) -> None:
        """Set the learning rate of an optimiser's group, so that recordings see it."""
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate

    def take(self, kind: object, update: Update, *inputs: Tensor | float) -> dict[str, Tensor]:
        """One update: ``update(*inputs)``, or its replay with these inputs. Returns its tensors.

        ``kind`` names updates that are the same operations; so do the inputs' shapes. Numbers among the
        inputs reach a recorded update as tensors.
        """
        if not self.recording:
            return update(*inputs)
        key = (kind, *((v.shape, v.dtype) if isinstance(v, Tensor) else None for v in inputs))
        known = self._kinds.get(key)
        if known is None:
            if len(self._kinds) == KINDS:
                return update(*inputs)
            blank = [
                torch.empty_like(v) if isinstance(v, Tensor) else torch.empty((), device=self.device)
                for v in inputs
            ]
            known = self._kinds[key] = _Kind(blank, update)
        for mine, given in zip(known.inputs, inputs, strict=True):
            mine.copy_(given) if isinstance(given, Tensor) else mine.fill_(given)
        if known.replay is None:
            known.seen += 1
            if known.seen <= WARM_UP:
                return self._watched(known)
            return self._record(known)
        return known.again()

    def _watched(self, known: _Kind) -> dict[str, Tensor]:
        """One update operation by operation, on a stream of its own, as recordings want it; does it wait?"""
        if self.device.type != "cuda":
            return known.update(*known.inputs)
        main, mode = torch.cuda.current_stream(self.device), torch.cuda.get_sync_debug_mode()
        side = _compiled._side_streams.setdefault(main, torch.cuda.Stream(self.device))
        side.wait_stream(main)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with torch.cuda.stream(side):
                    results = known.update(*known.inputs)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        main.wait_stream(side)
        if _waited(told):
            self._give_up("an update waits for the device")
        return results

    def _record(self, known: _Kind) -> dict[str, Tensor]:
        """The plain update; then from where it started its recording, which must come to the same."""
        before, generators = self._snapshot(), self._draws()
        results = {name: value.clone() for name, value in self._watched(known).items()}
        if not self.recording:
            return results
        after, moved = self._snapshot(), self._draws()
        try:
            known.replay = _compiled._capture(known.packed, self.device, self.generators, warm_up=0)
        except Exception as error:
            self._repair(moved)
            self._give_up(_compiled._line(error))
            return results
        self._load(before)
        for generator, state in generators:
            generator.set_state(state)
        known.replay()
        reproduced = self._same(before, after, self._snapshot())
        reproduced &= all(torch.equal(g.get_state(), state) for g, state in moved)
        self._load(after)
        for generator, state in moved:
            generator.set_state(state)
        if not reproduced:
            self._give_up("a replayed update does not do what the update itself does")
        return results

    def _draws(self) -> list[tuple[torch.Generator, Tensor]]:
        """The generators that an update may draw from, the default one among them, with their states."""
        cuda = self.device.type == "cuda"
        default = torch.cuda.default_generators[self._index] if cuda else torch.default_generator
        return [(g, g.get_state()) for g in [*self.generators, default]]

    def _snapshot(self) -> list[Tensor]:
        return [t.detach().clone() for t in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        slots = [s for o in self.optimizers for s in o.state.values()]
        own = [v for s in slots for v in s.values() if isinstance(v, Tensor)]
        return [*self.state(), *own, *([] if self.halt is None else [self.halt])]

    @torch.no_grad()
    def _load(self, kept: list[Tensor]) -> None:
        for mine, value in zip(self._tensors(), kept, strict=True):
            mine.copy_(value)

    @staticmethod
    def _same(before: list[Tensor], plain: list[Tensor], replayed: list[Tensor]) -> bool:
        """Whether two updates changed the tensors alike: counts exactly, nearly all others to ``APART``."""
        far = changed = 0
        for old, one, other in zip(before, plain, replayed, strict=True):
            if not one.is_floating_point():
                if not torch.equal(one, other):
                    return False
                continue
            moved, apart = ((v - w).double().norm().item() for v, w in ((one, old), (one, other)))
            rounding = torch.finfo(one.dtype).eps * one.double().norm().item()
            if not math.isfinite(moved + rounding):
                continue  # trouble, which the loop looks for itself
            changed += moved > 16 * rounding
            far += not apart <= max(APART * moved, 16 * rounding)
        return far <= MANY * max(changed, 1)

    def _repair(self, states: list[tuple[torch.Generator, Tensor]]) -> None:
        """Give generators that a failed recording has left half-registered a state of their own again."""
        for generator, state in states:
            if generator.device.type == "cuda":
                fresh = torch.Generator(generator.device)
                fresh.set_state(state)
                generator.graphsafe_set_state(fresh.graphsafe_get_state())
            else:
                generator.set_state(state)

    def _give_up(self, reason: str) -> None:
        self._stop()
        if self.wanted:
            raise NotCompilableError(f"this training cannot be recorded: {reason}")
        warnings.warn(
            f"the updates of this training are taken operation by operation, with the same numbers but more "
            f"slowly on a GPU: {reason}",
            RuntimeWarning,
            stacklevel=4,
        )
