"""The graph of a Planetoid release, read from its pickle without unpickling it.

A pickle is a program, and Python's own reader runs whatever it says. This one knows only the instructions
that build integers, lists and one dictionary, and refuses the rest: nothing that a file holds is ever run.
"""

from __future__ import annotations

import pickletools

import torch
from torch import Tensor

__all__ = ["read_edges", "read_lists"]

_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list}
_INTEGERS = {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1"}
_NOTHING = {"PROTO", "FRAME"}
_PUT = {"BINPUT", "LONG_BINPUT", "PUT"}
# The release's dictionary is a defaultdict(list), named by Python 2.
_NAMES = {"collections defaultdict", "__builtin__ list", "builtins list"}
_MARK = object()


def read_lists(data: bytes) -> dict[int, list[int]]:
    """A pickled dictionary from integers to lists of integers, ``dict`` or ``defaultdict(list)``.

    Raises ``ValueError`` for a pickle of anything else, naming the instruction that was not carried out.
    """
    stack: list = []
    memo: dict[int, object] = {}

    def since_mark() -> list:
        last = max(i for i, item in enumerate(stack) if item is _MARK)
        items, stack[last:] = stack[last + 1 :], []
        return items

    try:
        for operation, argument, _ in pickletools.genops(data):
            name = operation.name
            if name in _INTEGERS:
                stack.append(int(argument))
            elif name in _EMPTY:
                stack.append(_EMPTY[name]())
            elif name == "GLOBAL" and argument in _NAMES:
                stack.append(argument)
            elif name == "TUPLE1":
                stack.append((stack.pop(),))
            elif name == "REDUCE" and stack[-2] == "collections defaultdict" and stack[-1][0] in _NAMES:
                stack[-2:] = [{}]
            elif name == "MARK":
                stack.append(_MARK)
            elif name == "LIST":
                stack.append(since_mark())
            elif name == "DICT":
                items = since_mark()
                stack.append(dict(zip(items[::2], items[1::2], strict=True)))
            elif name == "APPEND":
                stack[-2].append(stack.pop())
            elif name == "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            elif name == "SETITEM":
                key, value = stack[-2:]
                del stack[-2:]
                stack[-1][key] = value
            elif name == "SETITEMS":
                items = since_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            elif name in _PUT:
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name == "STOP":
                break
            elif name not in _NOTHING:
                raise ValueError(
                    f"the pickle wants {name} {argument if argument is not None else ''}".strip()
                )
    except (AttributeError, IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a pickle of lists of integers ({type(error).__name__}: {error})") from error
    if len(stack) != 1 or not isinstance(stack[0], dict):
        raise ValueError("the pickle holds no dictionary")
    for key, values in stack[0].items():
        if not isinstance(key, int) or not isinstance(values, list):
            raise ValueError("the pickle holds something other than lists of integers")
        if not all(isinstance(value, int) for value in values):
            raise ValueError("the pickle holds something other than lists of integers")
    return stack[0]


def read_edges(data: bytes) -> tuple[Tensor, int]:
    """Edges (2, M) int64 and the number of nodes of a Planetoid release's ``ind.<name>.graph``.

    Nodes are 0 to n - 1, each with the list of its neighbours. Raises ``ValueError`` for anything else.
    """
    lists = read_lists(data)
    n = len(lists)
    pairs = [(node, other) for node, others in lists.items() for other in others]
    if not pairs or set(lists) != set(range(n)) or not all(0 <= other < n for _, other in pairs):
        raise ValueError(f"no graph of nodes 0 to {n - 1}, each with its neighbours")
    return torch.tensor(pairs).T, n
