"""Every public name of the companion says what it is: modules, functions, classes, their methods, aliases."""

import ast
import importlib
import inspect
import itertools
import pkgutil
import types

import pytest

import companion

MODULES = sorted(found.name for found in pkgutil.walk_packages(companion.__path__, "companion."))


def says(text):
    """More than a word, and not the signature that dataclass and NamedTuple write by themselves."""
    return bool(text and len(text.split()) > 2)


def described(cls, name, member):
    """A method's own text, or that of the class of this package whose method it overrides."""
    own = member if isinstance(member, property) else getattr(member, "__func__", member)
    if says(own.__doc__):
        return True
    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("companion")]
    return any(says(getattr(vars(base).get(name), "__doc__", None)) for base in bases)


def silent_methods(cls):
    for name, member in vars(cls).items():
        kinds = (property, classmethod, staticmethod)
        public = not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, kinds))
        if public and not described(cls, name, member):
            yield f"{cls.__name__}.{name}"


def own_docstring(cls):
    automatic = f"{cls.__name__}("
    return says(vars(cls).get("__doc__")) and not cls.__doc__.startswith(automatic)


def described_values(module):
    """Names assigned at the top of a module under a comment that begins with ``#:``, as Sphinx reads it."""
    source = inspect.getsource(module)
    lines = source.splitlines()
    for node in ast.parse(source).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        above = itertools.takewhile(lambda line: line.startswith("#:"), lines[node.lineno - 2 :: -1])
        text = " ".join(line[2:] for line in above)
        if isinstance(node, ast.Assign | ast.AnnAssign) and says(text):
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def silent(module):
    """The public names of a module that do not say what they are."""
    found = [] if says(module.__doc__) else [module.__name__]
    values = set(described_values(module))
    for name in module.__all__:
        member = getattr(module, name)
        if inspect.isclass(member):
            found += [] if own_docstring(member) else [name]
            found += silent_methods(member)
        elif inspect.isfunction(member):
            found += [] if says(member.__doc__) else [name]
        elif not inspect.ismodule(member):
            homes = [importlib.import_module(other) for other in MODULES]
            known = values.union(*(described_values(m) for m in homes if getattr(m, name, None) is member))
            found += [] if name in known else [name]
    return found


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_says_what_it_is(name):
    module = importlib.import_module(name)
    assert module.__all__, f"{name} has no __all__"
    assert not silent(module), f"{name}: without a docstring"


def test_what_says_nothing_is_found(monkeypatch):
    source = (
        '"""A module that says something."""\n'
        "from dataclasses import dataclass\n"
        "__all__ = ['Auto', 'Child', 'LIMIT', 'SIZE', 'bare', 'told']\n"
        "LIMIT = 3  # of something\n"
        "#: How large it is.\nSIZE = 3\n"
        "def bare(): ...\n"
        "def told():\n    'It says what it does.'\n"
        "@dataclass\nclass Auto:\n    x: int\n"
        "class Base:\n    'Says what it is.'\n    def f(self): ...\n"
        "class Child(Base):\n    'Says what it is.'\n    def f(self): ...\n"
        "    @property\n    def g(self): ...\n"
    )
    module = types.ModuleType("companion.silent")
    exec(source, module.__dict__)
    monkeypatch.setattr(inspect, "getsource", lambda _: source)
    assert silent(module) == ["Auto", "Child.f", "Child.g", "LIMIT", "bare"]
