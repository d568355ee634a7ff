"""A Sphinx extension for the API reference: signatures that are Python, source pages that lead back.

``inspect`` writes ``<factory>`` as the default of a field that is made anew, which is no Python, so that
Sphinx would show the signature unparsed; it is shown as ``...``. And a name that a public module takes over
from another public module has two entries but one source, whose link back knows only one of them; it is left
to the module that defines the name.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["setup", "shown", "source_of"]


def shown(
    _app: Any,
    _what: str,
    _name: str,
    _object: Any,
    _options: Any,
    arguments: str | None,
    returned: str | None,
) -> tuple[str | None, str | None]:
    """The signature as the page shows it (a handler of ``autodoc-process-signature``)."""
    return arguments and arguments.replace("<factory>", "..."), returned


def source_of(_app: Any, module: str, name: str) -> str | None:
    """The module whose source page an entry is linked to (a handler of ``viewcode-follow-imported``).

    Its own, where another public module defines it: viewcode finds nothing there and makes no link. None,
    which leaves it to viewcode, for what a module defines or takes from a private one.
    """
    value: Any = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part, None)
    defined = str(getattr(value, "__module__", None) or module)
    return None if defined == module or "._" in defined else module


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("autodoc-process-signature", shown)
    app.connect("viewcode-follow-imported", source_of)
    return {"parallel_read_safe": True}
