"""Files from outside are data, never programs: what is refused, and that no code here could run one.

Tars with bad paths, links and devices are in ``test_data.py``; here are the other doors, and the source.
"""

import ast
import importlib.util
import io
import json
import os
import pickle
import re
import sys
import tarfile
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from companion import _readers, checkpoint, data, graphs
from companion.data import DataError
from companion.graphs import _planetoid, datasets

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("downhill_cells", ROOT / "tools" / "cells.py")
cells = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = cells
spec.loader.exec_module(cells)


class Boom:
    """Unpickled, it would leave a file behind."""

    def __reduce__(self):
        return (os.system, ("touch boom",))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOWNHILL_DATA", str(tmp_path / "cache"))
    yield tmp_path
    assert not (tmp_path / "boom").exists(), "something was unpickled"


# --- archives of images ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "train/link.png", "train/device.png"])
def test_a_malicious_tar_is_refused_and_writes_nothing(here, name):
    member = tarfile.TarInfo(name)
    member.type = {"link": tarfile.SYMTYPE, "device": tarfile.BLKTYPE}.get(Path(name).stem, tarfile.REGTYPE)
    member.linkname = "/etc/passwd"
    with tarfile.open(here / "pets.tar", "w") as archive:
        archive.addfile(member)
    with pytest.raises(DataError, match=r"outside|link or a device"):
        data.load(here / "pets.tar")
    assert [path.name for path in here.iterdir()] == ["pets.tar"]


# --- arrays ---------------------------------------------------------------------------------------


def arrays(**change):
    images, labels = np.zeros((4, 2, 2), np.uint8), np.array([0, 1, 0, 1])
    return {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels} | change


def forged(shape):
    """A .npy member whose header announces another shape than the bytes behind it have."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue() + b"\0" * 16


def test_an_npz_with_pickled_objects_is_refused():
    np.savez("set.npz", **arrays(x_train=np.array([Boom()] * 4)))
    with pytest.raises(DataError, match="Pickled objects are never loaded"):
        data.load("./set.npz")


def test_an_npz_that_announces_more_than_it_holds_is_refused_before_room_is_made():
    np.savez("set.npz", **{key: value for key, value in arrays().items() if key != "x_train"})
    with zipfile.ZipFile("set.npz", "a") as archive:
        archive.writestr("x_train.npy", forged((10**12, 28, 28)))
    with pytest.raises(DataError, match="x_train announces 784000000000000 bytes and holds"):
        data.load("./set.npz")


def test_an_npz_that_would_fill_the_memory_is_refused(monkeypatch):
    np.savez_compressed("set.npz", **arrays(x_train=np.zeros((4, 1000, 1000), np.uint8)))
    assert Path("set.npz").stat().st_size < 20_000  # and 4 MB unpacked
    monkeypatch.setattr(_readers, "_MAX_ARRAYS", 10**6)
    with pytest.raises(DataError, match="GiB of arrays, more than"):
        data.load("./set.npz")


# --- checkpoints ----------------------------------------------------------------------------------


def run():
    network = nn.Linear(2, 1)
    return {"net": network}, {"adam": torch.optim.Adam(network.parameters())}, torch.Generator()


def restored(folder):
    return checkpoint.load(folder, *run(), torch.device("cpu"), {"steps": 1})


def saved(folder):
    checkpoint.save(folder, 3, *run(), {}, {"steps": 1})
    assert restored(folder)[0] == 3
    index = folder / "checkpoint.json"
    return index, json.loads(index.read_text())


def test_a_checkpoint_with_a_pickle_in_it_is_refused(here):
    index, header = saved(here / "run")
    (here / "run" / header["tensors"]).write_bytes(pickle.dumps(Boom()))
    with pytest.raises(checkpoint.CheckpointError, match="cannot read the checkpoint.*start afresh"):
        restored(here / "run")
    torch.save({"rng": Boom()}, here / "run" / header["tensors"])
    with pytest.raises(checkpoint.CheckpointError, match="cannot read the checkpoint"):
        restored(here / "run")
    index.write_bytes(pickle.dumps(Boom()))
    with pytest.raises(checkpoint.CheckpointError, match="cannot read the checkpoint"):
        restored(here / "run")


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": "../other.safetensors"},
        {"tensors": "/etc/passwd"},
        {"tensors": ".."},
        {"tensors": None},
        {"update": "three"},
        {"groups": None},
        {"groups": {"adam": [7]}},
        {"groups": {"adam": []}},
        {"settings": [1]},
    ],
    ids=str,
)
def test_a_forged_header_is_refused(here, change):
    index, header = saved(here / "run")
    other = here / "other.safetensors"
    other.write_bytes((here / "run" / header["tensors"]).read_bytes())
    index.write_text(json.dumps(header | change))
    with pytest.raises(checkpoint.CheckpointError):
        restored(here / "run")
    for key in change:
        index.write_text(json.dumps({name: value for name, value in header.items() if name != key}))
        with pytest.raises(checkpoint.CheckpointError, match="cannot read"):
            restored(here / "run")
    index.write_text("[" * 100_000)
    with pytest.raises(checkpoint.CheckpointError, match="cannot read"):
        restored(here / "run")


# --- graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_planetoid_graph_is_read_without_unpickling(protocol):
    lists = {0: [1, 2], 1: [0], 2: [0, 300], 300: []}
    for held in (lists, {}, {5: []}, {70_000: [2**31, -1]}):
        assert _planetoid.read_lists(pickle.dumps(held, protocol)) == held
    if protocol == 2:  # the release's own form
        found = _planetoid.read_lists(pickle.dumps(defaultdict(list, lists), protocol, fix_imports=True))
        assert found == lists
    edges, n = _planetoid.read_edges(pickle.dumps({0: [1], 1: [0], 2: []}, protocol))
    assert edges.tolist() == [[0, 1], [1, 0]] and n == 3


@pytest.mark.parametrize(
    "held",
    [
        Boom(), {0: [Boom()]}, {0: Boom()}, {"a": [1]}, {0: 1}, {0: ["a"]}, {0: [[1]]}, [1], 1, None,
        {0: (1,)}, defaultdict(Boom, {0: [1]}), {0: [1.5]}, os.system, {0: {1: [2]}},
    ],
    ids=lambda held: re.sub(r" at 0x\w+", "", str(held)),
)  # fmt: skip
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_any_other_pickle_is_refused(held, protocol):
    with pytest.raises(ValueError, match="pickle"):
        _planetoid.read_lists(pickle.dumps(held, protocol))


@pytest.mark.parametrize(
    "content", [b"", b"cos\nsystem\n(S'touch boom'\ntR.", b"e.", b"]q\x01.", b"\x80\x02h\x07."]
)
def test_what_is_no_pickle_is_refused(content):
    with pytest.raises(ValueError):
        _planetoid.read_lists(content)


def test_a_forged_citeseer_is_refused_even_with_the_right_checksum(here, monkeypatch):
    folder = here / "cache" / "Citeseer" / "raw"
    folder.mkdir(parents=True)
    (folder / "ind.citeseer.graph").write_bytes(pickle.dumps({0: [Boom()]}))
    monkeypatch.setattr(datasets, "_fetch", lambda folder, file, mirrors, sha256: folder / file)
    with pytest.raises(DataError, match=r"ind\.citeseer\.graph is not Citeseer's graph"):
        graphs.load("ego-small")


def test_a_graph_archive_that_would_fill_the_memory_is_refused(here, monkeypatch):
    monkeypatch.setattr(datasets, "_fetch", lambda folder, file, mirrors, sha256: here / file)
    monkeypatch.setattr(datasets, "_MAX_TEXT", 1000)
    with zipfile.ZipFile(here / "ENZYMES.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ENZYMES/ENZYMES_A.txt", "1, 2\n" * 1000)
    with pytest.raises(DataError, match="unpacks to 5000 bytes"):
        graphs.load("enzymes")


# --- the source -----------------------------------------------------------------------------------

RUNS_DATA = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
YAML = {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}


def keyword(call, name):
    found = next((k.value for k in call.keywords if k.arg == name), None)
    return found.value if isinstance(found, ast.Constant) else found


def dangers(source):
    """Lines of a Python source that could run or unpack what a file holds."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
            for name in names:
                if name.split(".")[0] in RUNS_DATA:
                    yield f"line {node.lineno}: imports {name}"
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
            continue
        text = ast.unparse(node.func)
        owner, _, called = text.rpartition(".")
        bad = (
            (text == "torch.load" and keyword(node, "weights_only") is not True)
            or (
                called in ("load", "loadtxt", "fromregex")
                and keyword(node, "allow_pickle") not in (None, False)
            )
            or (called == "read_pickle")
            or (called in ("extractall", "extract", "unpack_archive") and keyword(node, "filter") != "data")
            or (owner == "yaml" and called in YAML)
            or text in ("eval", "exec", "os.system", "os.popen", "compile")
            or (owner == "torch.hub")
            or (keyword(node, "shell") is True)
        )
        if bad:
            yield f"line {node.lineno}: {ast.unparse(node)[:80]}"


SOURCES = [
    p for folder in ("companion", "book", "tools", "benchmarks") for p in (ROOT / folder).rglob("*.py")
]


@pytest.mark.parametrize("path", sorted(SOURCES), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_code_could_run_what_a_file_holds(path):
    assert not list(dangers(path.read_text(encoding="utf-8")))


def test_no_chapter_could_run_what_a_file_holds():
    pages = cells.chapters(ROOT)
    assert len(pages) > 5
    for page in pages:
        for cell in cells.code_cells(page.read_text(encoding="utf-8")):
            assert not list(dangers(cell.source)), f"{page.name}, from line {cell.first + 1}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.externals",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "archive.extractall(folder)",
        "archive.extract(member, folder, filter='fully_trusted')",
        "shutil.unpack_archive(path)",
        "yaml.load(text)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "torch.hub.load('a', 'b')",
    ],
)
def test_the_search_finds_what_it_should(source):
    assert list(dangers(source))


def test_the_search_lets_the_rest_pass():
    good = "torch.load(p, weights_only=True); np.load(p); np.load(p, allow_pickle=False); yaml.safe_load(t)\n"
    assert not list(dangers(good + "t.extractall(f, filter='data'); import pickletools; re.compile(x)"))
