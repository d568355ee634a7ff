"""A stand-in for CUDA graphs where there is no GPU: one call's operations, recorded and replayed on a CPU.

What it shares with a CUDA graph, and what the tests that use it therefore hold:

- recording runs nothing: tensors and generators that stood before are afterwards as they were;
- Python is not asked again, so a number that Python knew stays what it was; tensors are read anew;
- results lie in the same memory after every replay;
- whatever would make the host wait for the device, or bring host data to it, is refused, and so are draws
  from a generator that was not registered, and shapes that depend on data.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

_WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten._unique2.default, aten.unique_dim.default, aten.repeat_interleave.Tensor,
}  # fmt: skip


class Tape(TorchDispatchMode):
    """Records within ``with tape:`` and takes the operations again at ``replay()``."""

    def __init__(self, generators=()):
        super().__init__()
        self.rows, self.generators = [], list(generators)
        self._made, self._before = set(), {}
        self._drawn_before = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        picks = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
        if func in _WAITS or (picks and any(t.dtype in (torch.bool, torch.uint8) for t in leaves[1:])):
            raise RuntimeError(f"the host waits for the device: {func}")
        if func in (
            aten.lift_fresh.default,
            aten.scalar_tensor.default,
        ):  # the latter: a number in torch.where
            raise RuntimeError("a tensor made from Python numbers is brought to the device")
        for generator in tree_leaves((args, kwargs)):
            if isinstance(generator, torch.Generator):
                self._drawing(generator)
        if torch.Tag.nondeterministic_seeded in func.tags and not any(
            isinstance(leaf, torch.Generator) for leaf in tree_leaves((args, kwargs))
        ):
            self._drawing(torch.default_generator, default=True)
        for tensor in self._written(func, args, kwargs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._made and storage.data_ptr() not in self._before:
                self._before[storage.data_ptr()] = (storage, storage.clone())
        out = func(*args, **kwargs)
        seen = {t.untyped_storage().data_ptr() for t in leaves}
        for t in tree_leaves(out):
            if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in seen:
                self._made.add(t.untyped_storage().data_ptr())
        self.rows.append((func, args, kwargs, out))
        return out

    def _drawing(self, generator, default=False):
        if not default and not any(generator._cdata == known._cdata for known in self.generators):
            raise RuntimeError("a draw from a generator that was not registered")
        self._drawn_before.setdefault(generator._cdata, (generator, generator.get_state()))

    @staticmethod
    def _written(func, args, kwargs):
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                yield from (t for t in tree_leaves(given) if torch.is_tensor(t))

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, before in self._before.values():
            storage.copy_(before)
        for generator, state in self._drawn_before.values():
            generator.set_state(state)

    @torch.no_grad()
    def replay(self):
        """The operations once more."""
        for func, args, kwargs, out in self.rows:
            read = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if torch.is_tensor(old) and old.untyped_storage().data_ptr() not in read:
                    old.copy_(new)


def tape_capture(recorded):
    """What ``companion._compiled._capture`` is replaced by: tapes for graphs, kept in the list."""

    def capture(call, device, generators=(), warm_up=3):
        tape = Tape(generators)
        for _ in range(warm_up):
            call()
        with tape:
            outputs = call()
        recorded.append(tape)
        return lambda: (tape.replay(), outputs)[1]

    return capture
