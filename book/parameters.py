"""Parameters cells: reading their ``name = literal  # comment`` lines, checking and replacing values."""

from __future__ import annotations

import ast
import contextlib
import difflib
import io
import json
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["BookError", "Parameter", "agree", "read_parameters", "unknown", "with_values"]


class BookError(Exception):
    """Something the person at the keyboard can mend; the message says what and how."""


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: its name, its literal default and the comment beside it."""

    name: str
    default: Any
    comment: str


def unknown(kind: str, name: str, known: Iterable[str], where: str) -> BookError:
    """The error for a name that does not exist: it names the nearest that does, and all of them."""
    names = list(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return BookError(f"{where}: unknown {kind} {name!r}{hint} Known: {', '.join(names) or 'none'}.")


def _assignments(source: str) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.parse(source).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                yield name, value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                yield name, value
            case ast.Expr(value=ast.Constant(value=str())):
                continue  # a docstring
            case _:
                raise ValueError(f"line {node.lineno} is not `name = value`: {ast.unparse(node)}")


def read_parameters(source: str, where: str) -> dict[str, Parameter]:
    """The ``name = literal  # comment`` lines of a parameters cell.

    Raises ``BookError`` for anything else: a value computed in that cell could not be set from outside.
    """
    found = {}
    try:
        comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        for name, value in _assignments(source):
            try:
                default = ast.literal_eval(value)
            except ValueError:
                raise ValueError(f"line {value.lineno}: the value of {name!r} is not a literal") from None
            comment = comments.get(value.end_lineno or 0) or comments.get(value.lineno, "")
            found[name] = Parameter(name, default, comment)
    except (SyntaxError, ValueError, tokenize.TokenError) as error:
        raise BookError(f"{where}: {error}") from None
    return found


def with_values(source: str, values: dict[str, Any]) -> str:
    """A parameters cell with other values, its comments kept: what the reader of a profile should see."""
    lines = [line.encode() for line in source.split("\n")]
    for name, node in reversed(list(_assignments(source))):  # from the end, so that places stay valid
        if name not in values or ast.literal_eval(node) == values[name]:
            continue
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        new = lines[first][: node.col_offset] + _literal(values[name]).encode()
        lines[first : last + 1] = [new + lines[last][node.end_col_offset :]]
    return b"\n".join(lines).decode()


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def agree(default: Any, value: Any, where: str) -> Any:
    """``value`` in the type of ``default``; an int may stand for a float. Raises ``BookError``.

    A list's elements are of the types of the default's, one by one; where there are more, of the first's.
    """
    match default:
        case None:
            return value
        case bool():
            right = isinstance(value, bool)
        case float():
            if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
                with contextlib.suppress(ValueError):
                    value = float(value)
            right = isinstance(value, (int, float)) and not isinstance(value, bool)
            value = float(value) if right else value
        case int():
            right = isinstance(value, int) and not isinstance(value, bool)
        case list() | tuple():
            right = isinstance(value, (list, tuple))
            if right and default:
                types = [*default, *[default[0]] * len(value)]
                value = [agree(types[i], v, f"{where}, element {i}") for i, v in enumerate(value)]
        case _:
            right = isinstance(value, type(default))
    if not right:
        raise BookError(
            f"{where}: {value!r} is {_a(type(value).__name__)}, "
            f"but the parameter is {_a(type(default).__name__)} (default {default!r})"
        )
    return value


def _a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun
