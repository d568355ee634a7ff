"""A Sphinx extension for the API reference: fields that are made anew have the default ``...``.

``inspect`` writes ``<factory>`` there, which is no Python, so that Sphinx would show the signature unparsed.
"""

from __future__ import annotations

from typing import Any

__all__ = ["setup", "shown"]


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


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("autodoc-process-signature", shown)
    return {"parallel_read_safe": True}
