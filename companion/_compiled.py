"""Langevin steps as one call: a CUDA graph of many steps on a GPU, ``torch.compile`` of one elsewhere.

A small network's step is twenty kernels of a few microseconds each, and Python needs longer to launch
them than a GPU to run them. ``step`` is therefore written so that it can be recorded once and replayed:
it works in place on tensors that stay where they are, its coefficients are tensors, and it asks the host
for nothing. A recording draws its noise itself, from a generator of its own that takes over the caller's
state and hands it back, so that the numbers are the plain loop's. Weights that an optimiser updates in
place are read anew at each replay.

The first step of a chain is a recording of its own, whose numbers are compared; the rest is taken in
strides of up to ``STRIDE`` steps, once an energy has taken so many that recording a stride pays.

What a recording cannot see is state in Python: a number in the energy that has changed since, a tensor
that was put in another's place. Hence three precautions. Only an ``nn.Module`` is recorded, whose tensors'
addresses are compared before every call; every call compares the first step with the energy evaluated
afresh (``_agrees``); and a recording that fails is made once more, then given up for the plain loop.
"""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from companion.energies import Energy, energy_and_gradient

__all__ = ["NotCompilableError", "Run", "choose", "give_up", "reference", "run", "step"]

Advance = Callable[[], tuple[Tensor, Tensor]]
T = TypeVar("T")

BACKEND = "inductor"  # of torch.compile; tests take quicker ones
KEPT = 4  # recordings an energy keeps, one a shape of the chains; each holds its own GPU memory
STRIDE = 64  # steps in one replay at most: what launching it costs is then shared by so many
PAYS = 10  # a stride is recorded when so many times its steps were taken one by one: its cost by then

_recordings: WeakKeyDictionary[nn.Module, dict[tuple, Stepper]] = WeakKeyDictionary()
_given_up: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # and the mode, training or not
_side_streams: dict[torch.cuda.Stream, torch.cuda.Stream] = {}  # where those replayed on a stream were made
_programs: dict[tuple, Callable] = {}


class NotCompilableError(RuntimeError):
    """The energy's step cannot be captured or compiled, or not so that it gives the energy's numbers."""


def step(
    energy: Energy,
    x: Tensor,
    noise: Tensor,
    decay: Tensor | None,
    slope: Tensor,
    eps: Tensor,
    clock: Tensor,
    trouble: Tensor,
    source: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """x <- decay x + slope grad E + eps noise, in place; returns E and grad E at the x it started from.

    ``slope`` is -eps^2/2T and ``decay`` 1 - eps^2/(2 tau^2), or None without a base measure. ``clock``
    counts the steps; ``trouble`` keeps the first at which an energy was not finite, -1 until then. ``noise``
    is what was drawn for the step, or drawn here from ``source``.
    """
    if torch.compiler.is_compiling() and not hasattr(energy, "value_and_gradient"):
        grad, value = _traceable_gradient(energy, x)
    else:
        value, grad = energy_and_gradient(energy, x)
    healthy = torch.isfinite(value.sum()) | (trouble >= 0)
    trouble.copy_(torch.where(healthy, trouble, clock))
    clock.add_(1)
    if decay is not None:
        x.mul_(decay)
    if source is not None:
        noise.normal_(generator=source)
    x.addcmul_(grad, slope).addcmul_(noise, eps)
    return value, grad


def _traceable_gradient(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.compile`` looks into ``torch.func.grad``, not into ``torch.autograd.grad``."""

    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        value = energy(x)
        return value.sum(), value

    return torch.func.grad(total, has_aux=True)(x)


@dataclass
class Stepper:
    """The tensors that ``step`` works on, and what takes it: by number of steps, recordings; or a program.

    ``source``: the generator that recordings draw from; None if the noise is drawn for them.
    """

    x: Tensor
    noise: Tensor
    coefficients: tuple[Tensor | None, Tensor, Tensor]  # decay, slope, eps
    clock: Tensor
    trouble: Tensor
    source: torch.Generator | None = None
    addresses: tuple[int, ...] = ()  # of the energy's tensors, when it was recorded
    strides: dict[int, Advance] = field(default_factory=dict)
    taken: int = 0  # steps, one by one
    fresh: bool = True  # made for this call

    @classmethod
    def blank(cls, x: Tensor, coefficients: tuple, draws: bool) -> Stepper:
        """At x, with coefficients 0: steps that only warm up stay where they are."""
        x = x.detach().clone()
        zeros = [None if c is None else x.new_zeros(getattr(c, "shape", ())) for c in coefficients]
        clock = torch.zeros((), dtype=torch.long, device=x.device)
        source = torch.Generator(x.device) if draws else None
        return cls(x, torch.zeros_like(x), tuple(zeros), clock, clock - 1, source)

    def load(self, x: Tensor, coefficients: tuple, generator: torch.Generator) -> None:
        """Put the chains at x and set the coefficients, numbers or tensors, without recording anew."""
        if self.source is not None:
            self.source.set_state(generator.get_state())
        self.x.copy_(x)
        self.clock.zero_()
        self.trouble.fill_(-1)
        for mine, given in zip(self.coefficients, coefficients, strict=True):
            if mine is not None:
                mine.copy_(given) if isinstance(given, Tensor) else mine.fill_(given)

    def call(self, energy: Energy, steps: int) -> tuple[Tensor, Tensor]:
        rest = (*self.coefficients, self.clock, self.trouble, self.source)
        for _ in range(steps):
            value, grad = step(energy, self.x, self.noise, *rest)
        return value, grad

    def record(self, energy: Energy, steps: int, warm_up: int = 0) -> None:
        """Record a replay of ``steps`` steps. Warming up takes steps: with coefficients 0 chains stay put.

        Raises ``NotCompilableError`` with the reason.
        """
        generators = [] if self.source is None else [self.source]
        try:
            self.strides[steps] = _capture(
                lambda: self.call(energy, steps), self.x.device, generators, warm_up=warm_up
            )
        except Exception as error:
            raise NotCompilableError(f"this energy's step cannot be captured: {_line(error)}") from error

    def advance(self, energy: Energy, stride: int, left: int) -> tuple[Tensor, Tensor, int]:
        """The next step, or the next ``stride`` steps if so many are ``left``; E, grad E, how many it took.

        Strides are taken where they are recorded, and recorded where that pays.
        """
        length = 1
        if stride <= left and (stride in self.strides or self.taken >= PAYS * stride):
            length = stride
            if stride not in self.strides:
                self.record(energy, stride)
        self.taken += length == 1
        return *self.strides[length](), length


def _stride(steps: int, every: int | None) -> int:
    """How many steps a replay takes behind the first: a stride ends where a state is to be kept."""
    whole = every or min(steps - 1, STRIDE)
    return max((n for n in range(1, min(whole, STRIDE) + 1) if whole % n == 0), default=1)


def choose(wanted: bool | None, energy: Energy, x: Tensor) -> str | None:
    """``"graph"``, ``"compile"``, or None for the plain loop. ``wanted`` is langevin's ``compile``.

    Raises ``NotCompilableError`` if a wanted one is impossible.
    """
    how, obstacle = _mechanism(x.device), None
    # Unasked only on a GPU: compiling takes seconds and hardly pays on a CPU, a capture milliseconds.
    if wanted is False or (wanted is None and how != "graph"):
        return None
    if x.dtype not in (torch.float32, torch.float64):
        obstacle = f"coefficients would be rounded to {x.dtype}"
    elif how == "graph" and not isinstance(energy, nn.Module):
        obstacle = "only an nn.Module's tensors can be watched for replacement; wrap the energy in one"
    elif torch.is_autocast_enabled(x.device.type):
        obstacle = "autocast keeps copies of weights that a recorded step would go on reading"
    if wanted and obstacle:
        raise NotCompilableError(f"this energy's step cannot be captured or compiled: {obstacle}")
    given_up = wanted is None and not obstacle and _given_up.get(energy) is energy.training
    return None if obstacle or given_up else how


def _mechanism(device: torch.device) -> str:
    return "graph" if device.type == "cuda" else "compile"


def give_up(energy: Energy) -> None:
    """Have ``choose`` take the plain loop for this energy while it stays in its mode, training or not."""
    if isinstance(energy, nn.Module):
        _given_up[energy] = energy.training


def reference(energy: Energy, x: Tensor) -> tuple[Tensor, Tensor]:
    """E and grad E at x as the plain loop has them, without a trace in the default generators.

    Raises ``NotCompilableError`` if that draws random numbers, or changes a buffer of the energy (batch
    normalisation in training), which is put back: warming up would change it too.
    """
    buffers = list(energy.buffers()) if isinstance(energy, nn.Module) else []
    before = [(b.clone(), b._version) for b in buffers]
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        default = torch.cuda.default_generators[x.device.index] if x.is_cuda else torch.default_generator
        state = default.get_state()
        value, grad = energy_and_gradient(energy, x.detach())
        drew = not torch.equal(default.get_state(), state)
    if drew:
        raise NotCompilableError("evaluating this energy draws random numbers, as dropout in training does")
    if any(b._version != version for b, (_, version) in zip(buffers, before, strict=True)):
        for b, (copy, _) in zip(buffers, before, strict=True):  # all: not every kernel counts a version up
            b.copy_(copy)
        raise NotCompilableError("evaluating this energy changes its buffers, as batch norm in training does")
    return value, grad


@dataclass(frozen=True)
class Run:
    """What a loop of steps ends with, however they were taken."""

    x: Tensor
    first: Tensor  # E at the first state
    value: Tensor  # E and grad E at the last state but one
    grad: Tensor
    path: list[Tensor]
    energies: list[Tensor]
    trouble: int  # the first step with a non-finite energy, or -1
    finite: bool  # x


def run(
    how: str,
    energy: Energy,
    x: Tensor,
    steps: int,
    coefficients: tuple,
    expected: tuple[Tensor, Tensor],
    generator: torch.Generator | None,
    record_every: int | None,
) -> Run:
    """``steps`` recorded or compiled steps from x; ``expected`` is ``reference``'s E and grad E there.

    Raises ``NotCompilableError``, with the generator where it was, if the energy's step cannot be recorded
    or compiled, or if that gives other numbers also when it is done afresh.
    """
    # The default generator too: an energy may draw from it, and is found out only afterwards.
    default = torch.cuda.default_generators[x.device.index] if x.is_cuda else torch.default_generator
    sources = {generator, default, torch.default_generator} - {None}
    before = [(source, source.get_state()) for source in sources]
    stride = 1 if how == "compile" else _stride(steps, record_every)
    while True:
        path, energies, done, asked = [], [], 0, 0
        try:
            stepper = _take(how, energy, x, coefficients)
            stepper.load(x, coefficients, generator or default)
            while done < steps:
                if stepper.source is None:
                    stepper.noise.normal_(generator=generator)
                # The first step by itself, to be compared; those before a state that is kept, one by one too.
                due = done > 0 and not (record_every and done % stride)
                value, grad, length = stepper.advance(energy, stride if due else 1, steps - done)
                if done == 0:
                    first, same = value.clone(), _agrees(stepper, expected, value, grad)
                done += length
                if record_every and done % record_every == 0:
                    path.append(stepper.x.clone())
                    energies.append(value.clone())
                # A GPU is asked every 50 steps, as in the plain loop; a CPU need not be waited for.
                if x.device.type == "cpu" or done - asked >= 50:
                    asked = done
                    if stepper.trouble.item() >= 0:
                        break
        except NotCompilableError:
            _rewind(before)
            raise
        finite = torch.isfinite(stepper.x).all()
        same, finite, trouble = torch.stack([same.long(), finite.long(), stepper.trouble]).tolist()
        if same:
            break
        _rewind(before)
        if stepper.fresh:
            raise NotCompilableError(
                "this energy's step, captured or compiled, gives other numbers than the energy itself: "
                "it draws random numbers, or depends on more than x and its tensors"
            )
    if stepper.source is not None:
        (generator or default).set_state(stepper.source.get_state())
    # Copies: the stepper's own tensors are the next call's.
    result = Run(*(t.clone() for t in (stepper.x, first, value, grad)), path, energies, trouble, bool(finite))
    _keep(how, energy, coefficients, stepper)
    return result


def _rewind(states: list[tuple[torch.Generator, Tensor]]) -> None:
    for generator, state in states:
        generator.set_state(state)


def _agrees(stepper: Stepper, expected: tuple[Tensor, Tensor], value: Tensor, grad: Tensor) -> Tensor:
    """Whether a first step's E and grad E are those of ``reference``: a boolean on the device.

    Up to the square root of the machine's precision, 3e-4 in float32, or to what rounding does to the noise.
    Numbers that are not finite pass: they are ``trouble``.
    """
    _, slope, eps = stepper.coefficients
    precision = torch.finfo(grad.dtype).eps
    off, drift = (slope * (grad - expected[1])).norm(), (slope * expected[1]).norm()
    noise = eps.square().mean().sqrt() * math.sqrt(grad.numel())
    level = expected[0].norm()
    good = off <= math.sqrt(precision) * drift + 16 * precision * noise
    good &= (value - expected[0]).norm() <= math.sqrt(precision) * (level + math.sqrt(value.numel()))
    return good | ~torch.isfinite(level + drift)


def _take(how: str, energy: Energy, x: Tensor, coefficients: tuple) -> Stepper:
    """A stepper for chains like x, recorded before or now. Nobody else has it until ``_keep`` puts it back.

    Raises ``NotCompilableError`` with the reason.
    """
    if how == "compile":
        stepper = Stepper.blank(x, coefficients, draws=False)
        stepper.strides[1] = _compile(energy, stepper)
        return stepper
    # Taken out, so that another thread, or an energy that samples, does not write into the same tensors.
    stepper = _recordings.get(energy, {}).pop(_key(x, coefficients), None)
    if stepper is not None and stepper.addresses == _addresses(energy):
        return stepper
    stepper = Stepper.blank(x, coefficients, draws=True)
    stepper.record(energy, 1, warm_up=3)
    stepper.addresses = _addresses(energy)
    return stepper


def _keep(how: str, energy: Energy, coefficients: tuple, stepper: Stepper) -> None:
    """Put a recording back for the next call; the oldest of more than ``KEPT`` goes."""
    if how == "graph":
        stepper.fresh = False
        mine = _recordings.setdefault(energy, {})
        mine[_key(stepper.x, coefficients)] = stepper
        if len(mine) > KEPT:
            del mine[next(iter(mine))]


def _key(x: Tensor, coefficients: tuple) -> tuple:
    shapes = tuple(None if c is None else tuple(getattr(c, "shape", ())) for c in coefficients)
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    return x.shape, x.dtype, x.device, shapes, stream  # replays on one stream wait for each other


def _addresses(energy: nn.Module) -> tuple[int, ...]:
    """Where the module's tensors lie: an optimiser writes into them, ``p.data = other`` moves them."""
    groups: list[dict[str, Any]] = []
    for module in energy.modules():
        groups += [module._parameters, module._buffers, vars(module)]
    return tuple(t.data_ptr() for group in groups for t in group.values() if isinstance(t, Tensor))


def _capture(
    call: Callable[[], T],
    device: torch.device,
    generators: Iterable[torch.Generator] = (),
    warm_up: int = 3,
) -> Callable[[], T]:
    """Record ``call`` as a CUDA graph; what it returns lies in the same place after every replay.

    ``generators``: those it draws from, beside the default one; each replay goes on where they stand. Before
    the recording, which runs nothing, ``call`` runs ``warm_up`` times.
    """
    main, mode = torch.cuda.current_stream(device), torch.cuda.get_sync_debug_mode()
    # Warm-up and capture on one side stream, as libraries set themselves up, with a workspace, a stream.
    side = _side_streams.setdefault(main, torch.cuda.Stream(device))
    # stream(main): a capture that fails leaves torch.cuda.graph without putting the stream back.
    with torch.random.fork_rng(devices=[device]), torch.cuda.device(device), torch.cuda.stream(main):
        side.wait_stream(main)
        try:
            # An energy that waits for the GPU is refused here; in a capture it would upset the allocator.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
                torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.stream(side):
                for _ in range(warm_up):
                    call()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # thread_local: what other threads do meanwhile (a loader that pins memory) is none of its business.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            outputs = call()

    def replay() -> T:
        graph.replay()
        return outputs

    return replay


def _compile(energy: Energy, stepper: Stepper) -> Advance:
    """``step`` by ``torch.compile``, which itself watches the Python state that it has read."""
    # A code object for each kind of energy and shape: torch counts recompilations a code object, and its
    # limit of 8 must not be reached by a program that samples from nine energies.
    kind = getattr(energy, "__code__", type(energy))
    key = (kind, stepper.x.shape, stepper.x.dtype, BACKEND)
    if key not in _programs:
        own = types.FunctionType(step.__code__.replace(), step.__globals__, step.__name__)
        _programs[key] = torch.compile(own, fullgraph=True, dynamic=False, backend=BACKEND)

    def advance() -> tuple[Tensor, Tensor]:
        rest = (*stepper.coefficients, stepper.clock, stepper.trouble, None)
        try:
            return _programs[key](energy, stepper.x, stepper.noise, *rest)
        except Exception as error:  # the energy itself was evaluated just before
            _programs.pop(key, None)
            raise NotCompilableError(f"this energy's step cannot be compiled: {_line(error)}") from error

    return advance


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
