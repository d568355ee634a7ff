"""Chapters' MyST text as plain Markdown, for readers such as Colab that know neither directives nor roles.

``parse`` splits the text of a cell into blocks, ``find_labels`` collects what may be referred to, and
``Plain`` writes the blocks again. A directive or role that it does not know is an error: nothing may reach
the reader raw.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from parameters import BookError, unknown

__all__ = ["Bibliography", "Block", "Labels", "Plain", "find_labels", "parse"]

_FENCE = re.compile(r"(?P<indent> *)(?P<marks>`{3,}|~{3,}|:{3,})(?P<info>.*)")
_DIRECTIVE = re.compile(r"\{(?P<name>[\w:.+-]+)\}[ \t]*(?P<argument>.*)")
_LABEL = r"[\w:.+-]+"
_ADMONITIONS = (
    "attention",
    "caution",
    "danger",
    "error",
    "hint",
    "important",
    "note",
    "seealso",
    "tip",
    "warning",
)
_PICTURES = ("figure", "image")
_VERBATIM = ("code", "code-block", "math", "raw")  # directives whose body is not MyST


@dataclass(frozen=True)
class Block:
    """A part of a text. ``kind`` is text, code, maths, target or directive.

    ``name`` is the directive's, or the label of a target or of an equation (empty without one); ``argument``
    what follows a directive's name, or an equation's indentation; ``body`` the text inside, without fences.
    """

    kind: str
    body: str
    name: str = ""
    argument: str = ""
    options: Mapping[str, str] = field(default_factory=dict)


# --- reading --------------------------------------------------------------------------------------


def parse(text: str) -> list[Block]:
    """The blocks of a text, in order. Raises ``BookError`` for a fence or an equation that is not closed."""
    lines, blocks, plain = text.split("\n"), [], []
    at = 0

    def flush() -> None:
        if plain:
            blocks.append(Block("text", "\n".join(plain)))
            plain.clear()

    while at < len(lines):
        line = lines[at]
        fence = _FENCE.fullmatch(line)
        directive = _DIRECTIVE.match(fence["info"].strip()) if fence else None
        if fence and (directive or fence["marks"][0] != ":"):
            flush()
            end = _closing(lines, at, fence["marks"])
            if directive:
                blocks.append(_directive(directive["name"], directive["argument"], lines[at + 1 : end]))
            else:
                blocks.append(Block("code", "\n".join(lines[at : end + 1])))
            at = end + 1
        elif re.match(r"\s*\$\$", line) and (found := _equation(lines, at)):
            flush()
            block, at = found
            blocks.append(block)
        elif target := re.fullmatch(rf"\(({_LABEL})\)=\s*", line):
            flush()
            blocks.append(Block("target", "", target[1]))
            at += 1
        else:
            if not line.startswith("%"):  # a comment
                plain.append(line)
            at += 1
    flush()
    return blocks


def _closing(lines: list[str], start: int, marks: str) -> int:
    closing = re.compile(rf" *{re.escape(marks[0])}{{{len(marks)},}}\s*")
    for at in range(start + 1, len(lines)):
        if closing.fullmatch(lines[at]):
            return at
    raise BookError(f"the fence {lines[start].strip()!r} is not closed")


def _directive(name: str, argument: str, lines: list[str]) -> Block:
    options = {}
    while lines and (option := re.fullmatch(r":([\w-]+):[ \t]*(.*)", lines[0].strip())):
        options[option[1]] = option[2].strip()
        lines = lines[1:]
    return Block("directive", "\n".join(lines).strip("\n"), name, argument.strip(), options)


def _equation(lines: list[str], start: int) -> tuple[Block, int] | None:
    """The displayed equation that begins at a line, and the line after it; None if a sentence holds it."""
    for end in range(start, len(lines)):
        text = "\n".join(lines[start : end + 1])
        if whole := re.fullmatch(
            rf"(\s*)\$\$((?:(?!\$\$).)*)\$\$[ \t]*(?:\(({_LABEL})\))?\s*", text, re.DOTALL
        ):
            return Block("maths", whole[2].strip("\n"), whole[3] or "", whole[1]), end + 1
        if end > start and "$$" in lines[end] or text.count("$$") > 1:
            return None
    raise BookError(f"the equation {lines[start].strip()!r} is not closed")


@dataclass
class Labels:
    """What texts refer to, by label: equations and exercises by their number, sections by their title."""

    equations: dict[str, str] = field(default_factory=dict)
    exercises: dict[str, str] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)


def _all(blocks: Iterable[Block]) -> Iterator[Block]:
    """Blocks and those inside them, in reading order."""
    for block in blocks:
        yield block
        if block.kind == "directive" and block.name not in _VERBATIM:
            yield from _all(parse(block.body))


def find_labels(cells: Iterable[str], labels: Labels, chapter: int | None) -> None:
    """Number one chapter's equations and exercises as the book's pages do; add them to ``labels``."""
    prefix = f"{chapter}." if chapter else ""
    equations = exercises = 0
    blocks = [block for cell in cells for block in _all(parse(cell))]
    for block, following in zip(blocks, [*blocks[1:], Block("text", "")], strict=True):
        if block.kind == "maths" and block.name:
            equations += 1
            labels.equations[block.name] = f"{prefix}{equations}"
        elif block.kind == "directive" and block.name == "math" and "label" in block.options:
            equations += 1
            labels.equations[block.options["label"]] = f"{prefix}{equations}"
        elif block.kind == "directive" and block.name == "exercise":
            exercises += 1
            labels.exercises[block.options.get("label", f"exercise {exercises}")] = f"{prefix}{exercises}"
        elif block.kind == "target" and (title := re.match(r"\s*#+ +(.+)", following.body)):
            labels.sections[block.name] = title[1].strip()


# --- sources --------------------------------------------------------------------------------------


class Bibliography:
    """The entries of a BibTeX file. Raises ``BookError`` for a key that it does not hold."""

    def __init__(self, path: Path) -> None:
        from pybtex.backends.plaintext import Backend
        from pybtex.database import parse_file

        self._data = parse_file(str(path))
        self._backend = Backend()  # kept: pybtex takes a tenth of a second to find one by its name

    def authors(self, key: str) -> str:
        """The authors as a sentence names them: one, two, or the first ``et al.``"""
        names = [
            " ".join(
                name.render(self._backend) for name in (*person.rich_prelast_names, *person.rich_last_names)
            )
            for person in self._entry(key).persons["author"]
        ]
        return " and ".join(names) if len(names) < 3 else f"{names[0]} et al."

    def year(self, key: str) -> str:
        return self._entry(key).fields["year"]

    def entries(self, keys: Iterable[str]) -> list[str]:
        """The full entries, a line each, by authors and year."""
        from pybtex.style.formatting.unsrt import Style

        ordered = sorted(keys, key=lambda key: (self.authors(key), self.year(key), key))
        formatted = Style().format_entries([self._entry(key) for key in ordered], self._data)
        arxiv = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
        return [
            arxiv.sub(r"[\g<0>](https://arxiv.org/abs/\1)", entry.text.render(self._backend))
            for entry in formatted
        ]

    def _entry(self, key: str) -> object:
        if key not in self._data.entries:
            raise unknown("citation", key, self._data.entries, "references.bib")
        return self._data.entries[key]


# --- writing --------------------------------------------------------------------------------------

_INLINE = re.compile(
    r"""(?P<escaped>\\.)
      | \{(?P<role>[A-Za-z][\w:.+-]*)\}(?P<ticks>`+)(?P<content>(?:(?!\n[ \t]*\n).)+?)(?<!`)(?P=ticks)(?!`)
      | (?P<code>(?P<marks>`+)(?:(?!\n[ \t]*\n).)+?(?<!`)(?P=marks)(?!`))
      | (?P<maths>\$\$(?:\\.|[^$\\])+\$\$ | \$(?:\\.|[^$\\\n]|\n(?![ \t]*\n))+\$)
      | (?P<image>!\[)
      | \[(?P<label>[^\[\]]*)\]\((?P<target>[^)\s]+)\)
      | (?P<substitution>\{\{)""",
    re.DOTALL | re.VERBOSE,
)


@dataclass
class Plain:
    """Writes one chapter's cells as plain Markdown; ``cited`` and ``unrecorded`` grow as it goes.

    ``figures`` are the recorded numbers by name, ``address`` gives the address of a document of the book,
    such as ``book/short-run``, or None, and ``titles`` the documents' titles. Every method that takes text
    raises ``BookError`` for what it cannot write.
    """

    labels: Labels
    bibliography: Bibliography
    figures: Mapping[str, float | int]
    address: Callable[[str], str | None]
    titles: Mapping[str, str]
    cited: set[str] = field(default_factory=set)
    unrecorded: list[str] = field(default_factory=list)
    quoted: int = 0  # recorded numbers in the text

    def cells(self, source: str) -> list[str]:
        """A cell's text, as cells: exercises and solutions begin a new one, so that Colab can fold them."""
        written = "\n".join(self._block(block) for block in parse(source))
        parts = (re.sub(r"\n{3,}", "\n\n", part).strip("\n") for part in written.split("\f"))
        return [part for part in parts if part]

    def _inner(self, source: str) -> str:
        return "\n\n".join(self.cells(source))

    def _block(self, block: Block) -> str:
        match block.kind:
            case "text":
                return self.inline(block.body)
            case "code":
                return block.body
            case "maths":
                return self._equation(block.body, block.name, block.argument)
            case "target":
                return ""
            case _:
                return self._directive(block)

    def _equation(self, body: str, label: str, indent: str = "") -> str:
        tag = f" \\tag{{{self._known('equation', label, self.labels.equations)}}}" if label else ""
        return f"{indent}$$\n{body.rstrip()}{tag}\n{indent}$$"

    # --- directives

    def _directive(self, block: Block) -> str:
        name = block.name
        if name in _ADMONITIONS:
            title = "See also" if name == "seealso" else name.capitalize()
            return self._quote(title, "\n\n".join(part for part in (block.argument, block.body) if part))
        match name:
            case "admonition" | "dropdown":
                return self._quote(block.argument, block.body)
            case "exercise":
                number = self._known("exercise", self._own_label(block), self.labels.exercises)
                title = f": {self.inline(block.argument)}" if block.argument else ""
                return f"\f### Exercise {number}{title}\n\n{self._inner(block.body)}\n"
            case "solution" | "solution-start":
                number = self._known("exercise", block.argument, self.labels.exercises)
                return f"\f#### Solution to exercise {number}\n\n{self._inner(block.body)}\n"
            case "math":
                return self._equation(block.body, block.options.get("label", ""))
            case "code-block" | "code":
                marks = "````" if "```" in block.body else "```"
                return f"{marks}{block.argument}\n{block.body}\n{marks}"
            case "margin" | "sidebar":
                return self._quote(block.argument, block.body)
            case "raw" if block.argument == "html":
                return "\n*The book's page has an interactive figure here.*\n"
            case "solution-end":
                return "\f"
            case "bibliography" | "tableofcontents" | "raw":
                return ""
        if name in _PICTURES:
            said = " ".join(part for part in (block.options.get("alt", ""), self._inner(block.body)) if part)
            return f"\n*Figure on the book's page:* {said}\n"
        known = ["admonition", "code-block", "dropdown", "exercise", "margin", "math", "raw", "sidebar"]
        known += ["solution", "solution-start", "solution-end", *_ADMONITIONS, *_PICTURES]
        raise unknown("directive", name, known, "plain Markdown for notebooks")

    def _own_label(self, block: Block) -> str:
        if "label" not in block.options:
            raise BookError(f"the exercise {block.argument!r} needs a :label:")
        return block.options["label"]

    def _quote(self, title: str, body: str) -> str:
        head = [f"**{self.inline(title)}**", ""] if title else []
        lines = [*head, *self._inner(body).split("\n")]
        return "\n" + "\n".join(f"> {line}".rstrip() for line in lines) + "\n"

    # --- roles and links

    def inline(self, source: str) -> str:
        """Running text with its roles and links written out; code and mathematics stay as they are."""
        return _INLINE.sub(self._token, source)

    def _token(self, token: re.Match[str]) -> str:
        if token["role"]:
            return self._role(token["role"], token["content"].strip())
        if token["image"] or token["substitution"]:
            here = token.string[token.start() : token.start() + 40]
            raise BookError(f"a notebook cannot show {here!r}: it needs files or settings of the book")
        if token["target"]:
            return self._link(token["label"], token["target"])
        return token[0]

    def _link(self, label: str, target: str) -> str:
        label = self.inline(label)
        if re.match(r"(https?|mailto):", target):
            return f"[{label}]({target})"
        page = re.fullmatch(r"(?:\./)?([\w/-]+)\.md(?:#\S*)?", target)
        if not label or not (page or target.startswith("#")):
            raise BookError(f"a notebook cannot link to [{label}]({target})")
        return self._to(f"book/{page[1]}", label) if page else label

    def _to(self, document: str, label: str) -> str:
        address = self.address(document)
        return f"[{label}]({address})" if address else label

    def _role(self, role: str, content: str) -> str:
        shown, _, aim = content.partition("<") if content.endswith(">") else (content, "", "")
        shown, aim = shown.strip(), aim.removesuffix(">").strip() or shown.strip()
        titled = shown if shown != aim else ""
        match role:
            case "glue:text":
                return self._figure(content)
            case "cite:p" | "cite" | "cite:t":
                return self._cite(role, content)
            case "eq":
                return f"({self._known('equation', aim, self.labels.equations)})"
            case "ref" | "numref":
                if aim in self.labels.exercises:
                    return titled or f"Exercise {self.labels.exercises[aim]}"
                return titled or self._known("label", aim, self.labels.sections)
            case "doc":
                document = aim.removeprefix("/") if aim.startswith("/") else f"book/{aim}"
                return self._to(document, titled or self.titles.get(document, Path(document).name))
            case "math":
                return f"${content}$"
            case "abbr" | "term":
                return shown
            case "sub" | "sup" | "kbd":
                return f"<{role}>{content}</{role}>"
        if re.fullmatch(r"py:(attr|class|data|exc|func|meth|mod|obj)", role):
            name = aim.removeprefix("~")
            return f"`{titled or (name.rpartition('.')[2] if aim.startswith('~') else name)}`"
        known = ["abbr", "cite", "cite:p", "cite:t", "doc", "eq", "glue:text", "kbd", "math", "numref"]
        raise unknown("role", role, [*known, "py:func", "ref", "sub", "sup", "term"], "plain Markdown")

    def _known(self, kind: str, label: str, numbers: Mapping[str, str]) -> str:
        if label not in numbers:
            raise unknown(kind, label, numbers, "a reference")
        return numbers[label]

    def _cite(self, role: str, content: str) -> str:
        keys = [key.strip() for key in content.split(",")]
        books = self.bibliography
        if role == "cite:t":
            written = ", ".join(f"{books.authors(key)} ({books.year(key)})" for key in keys)
        else:
            written = "(" + "; ".join(f"{books.authors(key)}, {books.year(key)}" for key in keys) + ")"
        self.cited.update(keys)
        return written

    def _figure(self, content: str) -> str:
        name, _, form = content.partition(":")
        if name not in self.figures:
            self.unrecorded.append(name)
            return f"`{name}`"
        self.quoted += 1
        return format(self.figures[name], form)
