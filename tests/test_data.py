"""Data sets: official formats against small files written here, damage and malice refused, splits fixed."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import pickle
import socket
import struct
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pooch
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from companion import _trees, data
from companion._readers import read_idx
from companion.data import DataError, Dataset, dequantise, load

N_TRAIN, N_TEST, N_VALIDATION = 30, 10, 5  # of the small stand-ins for the official sets


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache directory, no pause between retries, no proxy before the local server."""
    monkeypatch.setenv("DOWNHILL_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(data, "_PAUSE", 0.0)
    return tmp_path / "cache"


def levels_of(x: torch.Tensor, levels: int) -> np.ndarray:
    """The whole grey levels behind images at bin centres; fails if they are off the centres."""
    v = (x.double() + 1) / 2 * levels - 0.5
    assert (v - v.round()).abs().max() < 1e-4
    return v.round().to(torch.int64).numpy()


def check(ds: Dataset) -> None:
    """What every data set promises."""
    for x, y in ((ds.x_train, ds.y_train), (ds.x_validation, ds.y_validation), (ds.x_test, ds.y_test)):
        assert x.dtype == torch.float32 and x.shape[1:] == ds.shape and len(x) > 0 and x.is_contiguous()
        assert y.dtype == torch.int64 and y.shape == (len(x),)
        assert x.min() >= -1 and x.max() <= 1 and y.min() >= 0 and y.max() < ds.n_classes == len(ds.classes)
        levels_of(x, ds.levels)


# --- digits ------------------------------------------------------------------------------------------


def test_digits_are_whole_fixed_and_balanced():
    ds = load()
    check(ds)
    assert (ds.name, ds.levels, ds.shape, ds.n_classes) == ("digits", 17, (1, 8, 8), 10)
    xs, ys = (ds.x_train, ds.x_validation, ds.x_test), (ds.y_train, ds.y_validation, ds.y_test)
    assert [len(y) for y in ys] == [997, 400, 400]
    # Disjoint and complete: together they are scikit-learn's rows, as a multiset.
    rows = np.concatenate([levels_of(x, 17).reshape(-1, 64) for x in xs])
    assert sorted(map(bytes, rows.astype(np.uint8))) == sorted(
        map(bytes, load_digits().data.astype(np.uint8))
    )
    share = torch.bincount(torch.cat(ys)) / 1797
    for y in ys:
        assert (torch.bincount(y) - share * len(y)).abs().max() < 1  # stratified: off by rounding only
    # The split itself, so that no figure of the book moves unseen when a dependency does.
    labels = np.concatenate(ys).astype(np.uint8)
    digest = hashlib.sha256(rows.astype(np.uint8).tobytes() + labels.tobytes()).hexdigest()
    assert digest == "565ab0c9653b99612a5061b36afd161460a8fe3cb68d13c17c1672fde6dc70c0"


# --- dequantise --------------------------------------------------------------------------------------


@given(
    levels=st.integers(2, 256),
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_dequantise_stays_in_its_bin(levels, shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    v = torch.randint(levels, shape, generator=generator)
    x = (v.to(dtype) + 0.5) / levels * 2 - 1
    state, before = generator.get_state(), x.clone()
    noisy = dequantise(x, levels, generator)
    assert noisy.shape == x.shape and noisy.dtype == dtype and torch.equal(x, before)
    assert ((noisy >= -1) & (noisy <= 1)).all()
    # (noisy + 1) / 2 * levels lies in [v, v + 1] up to the rounding of a number near 1 times levels.
    offset = (noisy.double() + 1) / 2 * levels - v
    slack = 4 * levels * torch.finfo(dtype).eps
    assert ((offset >= -slack) & (offset <= 1 + slack)).all()
    generator.set_state(state)
    assert torch.equal(noisy, dequantise(x, levels, generator))


@pytest.mark.parametrize("levels", [17, 256])
def test_dequantise_is_uniform(levels):
    n, generator = 100_000, torch.Generator().manual_seed(0)
    x = torch.full((n,), (levels - 1 + 0.5) / levels * 2 - 1)  # the last bin, whose upper edge is 1
    u = ((dequantise(x, levels, generator).double() + 1) / 2 * levels - (levels - 1)).sort().values
    # Kolmogorov-Smirnov distance to the uniform law: above 1.95 / sqrt(n) with probability 0.001.
    grid = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (u - grid).abs().max() < 1.95 / n**0.5


def test_dequantise_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="floating-point"):
        dequantise(torch.zeros(3, dtype=torch.uint8), 256, None)
    with pytest.raises(ValueError, match="levels"):
        dequantise(torch.zeros(3), 1, None)


# --- the official formats, served by a local host -----------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return gzip.compress(
        struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    )


def tar_bytes(members: dict[str, bytes | None], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            info.size = len(content or b"")
            archive.addfile(info, io.BytesIO(content or b""))
    return buffer.getvalue()


def small_mnist() -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    arrays = {}
    for stem, n in (("train", N_TRAIN), ("t10k", N_TEST)):
        arrays[f"{stem}-images-idx3-ubyte.gz"] = rng.integers(0, 256, (n, 6, 5), dtype=np.uint8)
        arrays[f"{stem}-labels-idx1-ubyte.gz"] = rng.integers(0, 10, n, dtype=np.uint8)
    return {name: idx(array) for name, array in arrays.items()}, arrays


def small_cifar() -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (N_TRAIN + N_TEST, 3, 32, 32), dtype=np.uint8)
    y = rng.integers(0, 10, len(x), dtype=np.uint8)
    records = [bytes([label]) + image.tobytes() for label, image in zip(y, x, strict=True)]
    members = {"cifar-10-batches-bin": None, "cifar-10-batches-bin/batches.meta.txt": b"airplane\n"}
    order = [5, 2, 3, 4, 1]  # an archive need not hold its batches in order; the images must be
    per = N_TRAIN // 5
    for i in order:
        members[f"cifar-10-batches-bin/data_batch_{i}.bin"] = b"".join(records[(i - 1) * per : i * per])
    members["cifar-10-batches-bin/test_batch.bin"] = b"".join(records[N_TRAIN:])
    return members, x, y


@pytest.fixture
def host():
    """A web server in a thread: ``serve[path]`` a body, or a list of answers in turn; ``log`` of requests.

    An answer is bytes, a status number, or (bytes, announced length).
    """
    serve, log = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            log.append(self.path)
            answer = serve.get(self.path, 404)
            if isinstance(answer, list):
                answer = answer.pop(0) if len(answer) > 1 else answer[0]
            if isinstance(answer, int):
                self.send_error(answer)
                return
            body, length = answer if isinstance(answer, tuple) else (answer, len(answer))
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    yield SimpleNamespace(url=url, serve=serve, log=log)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def nowhere() -> str:
    """A host that refuses the connection."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


def publish(monkeypatch, name: str, files: dict[str, bytes], mirrors: list[str]) -> None:
    """Put small files in the place of an official set: their checksums, their counts, their hosts."""
    sums = {file: hashlib.sha256(body).hexdigest() for file, body in files.items()}
    official = data._REMOTE[name]
    stand_in = data._Remote(
        official.source, tuple(mirrors), sums, official.read, N_TRAIN, N_TEST, n_validation=N_VALIDATION
    )
    monkeypatch.setitem(data._REMOTE, name, stand_in)


def cached(cache) -> list[str]:
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file())


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist_format_with_first_mirror_down_then_offline(name, host, nowhere, cache, monkeypatch):
    files, arrays = small_mnist()
    publish(monkeypatch, name, files, [nowhere, f"{host.url}/a/", f"{host.url}/b/"])
    host.serve.update({f"/b/{file}": body for file, body in files.items()})  # /a answers 404
    ds = load(name)
    check(ds)
    assert (ds.shape, ds.levels, ds.n_classes) == ((1, 6, 5), 256, 10)
    x, y = arrays["train-images-idx3-ubyte.gz"], arrays["train-labels-idx1-ubyte.gz"]
    cut = N_TRAIN - N_VALIDATION
    np.testing.assert_array_equal(levels_of(ds.x_train, 256)[:, 0], x[:cut])
    np.testing.assert_array_equal(levels_of(ds.x_validation, 256)[:, 0], x[cut:])
    np.testing.assert_array_equal(levels_of(ds.x_test, 256)[:, 0], arrays["t10k-images-idx3-ubyte.gz"])
    np.testing.assert_array_equal(torch.cat([ds.y_train, ds.y_validation]), y)
    np.testing.assert_array_equal(ds.y_test, arrays["t10k-labels-idx1-ubyte.gz"])
    assert cached(cache) == sorted(f"{name}/{file}" for file in files)
    # Once cached, no host is asked.
    requests = len(host.log)
    publish(monkeypatch, name, files, [nowhere])
    torch.testing.assert_close(load(name).x_train, ds.x_train, rtol=0, atol=0)
    assert len(host.log) == requests


def test_cifar_format(host, monkeypatch):
    members, x, y = small_cifar()
    files = {"cifar-10-binary.tar.gz": tar_bytes(members)}
    publish(monkeypatch, "cifar10", files, [f"{host.url}/"])
    host.serve["/cifar-10-binary.tar.gz"] = files["cifar-10-binary.tar.gz"]
    ds = load("cifar10")
    check(ds)
    assert (ds.shape, ds.classes[0], ds.classes[9]) == ((3, 32, 32), "airplane", "truck")
    everything = torch.cat([ds.x_train, ds.x_validation, ds.x_test])
    np.testing.assert_array_equal(levels_of(everything, 256), x)
    np.testing.assert_array_equal(torch.cat([ds.y_train, ds.y_validation, ds.y_test]), y)
    assert len(ds.x_validation) == N_VALIDATION


def test_wrong_bytes_are_passed_over_and_never_kept(host, cache, monkeypatch):
    files, _ = small_mnist()
    publish(monkeypatch, "mnist", files, [f"{host.url}/a/", f"{host.url}/b/"])
    host.serve.update({f"/a/{file}": b"<html>moved</html>" for file in files})
    with pytest.raises(DataError, match="another sha256") as caught:
        load("mnist")
    message = str(caught.value)
    for piece in ("train-images-idx3-ubyte.gz", host.url + "/a/", host.url + "/b/", str(cache), "npz", "404"):
        assert piece in message
    assert cached(cache) == []
    assert host.log.count("/a/train-images-idx3-ubyte.gz") == 1  # wrong bytes are not asked for twice
    host.serve.update({f"/b/{file}": body for file, body in files.items()})
    check(load("mnist"))


def test_a_host_that_stumbles_is_asked_again(host, monkeypatch):
    files, _ = small_mnist()
    publish(monkeypatch, "mnist", files, [f"{host.url}/"])
    for file, body in files.items():
        host.serve[f"/{file}"] = [503, body] if "train" in file else [(body[:-9], len(body)), body]
    check(load("mnist"))


def test_a_download_cut_short_leaves_nothing(host, cache, monkeypatch):
    files, _ = small_mnist()
    publish(monkeypatch, "mnist", files, [f"{host.url}/"])
    host.serve.update({f"/{file}": (body[: len(body) // 2], len(body)) for file, body in files.items()})
    with pytest.raises(DataError, match="no host served it"):
        load("mnist")
    assert cached(cache) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupt_or_a_full_disk_leaves_nothing(stop, nowhere, cache, monkeypatch):
    files, _ = small_mnist()
    publish(monkeypatch, "mnist", files, [nowhere])

    def half(self, url, output_file, pooch, check_only=False):
        with open(output_file, "wb") as file:
            file.write(b"half")
        raise stop

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", half)
    with pytest.raises(KeyboardInterrupt if isinstance(stop, KeyboardInterrupt) else DataError) as caught:
        load("mnist")
    assert cached(cache) == []
    if isinstance(stop, OSError):
        assert "No space left" in str(caught.value) and "DOWNHILL_DATA" in str(caught.value)


def test_a_cache_directory_that_cannot_be_made(nowhere, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DOWNHILL_DATA", str(tmp_path / "file" / "cache"))
    publish(monkeypatch, "mnist", small_mnist()[0], [nowhere])
    with pytest.raises(DataError, match="DOWNHILL_DATA"):
        load("mnist")


def test_a_damaged_cached_file_is_fetched_anew_or_named(host, nowhere, cache, monkeypatch):
    files, _ = small_mnist()
    host.serve.update({f"/{file}": body for file, body in files.items()})
    publish(monkeypatch, "mnist", files, [f"{host.url}/"])
    load("mnist")
    damaged = cache / "mnist" / "t10k-labels-idx1-ubyte.gz"
    damaged.write_bytes(b"damaged")
    publish(monkeypatch, "mnist", files, [nowhere])
    with pytest.raises(DataError, match="it is damaged"):
        load("mnist")
    publish(monkeypatch, "mnist", files, [f"{host.url}/"])
    check(load("mnist"))
    assert damaged.read_bytes() == files[damaged.name]


def test_the_remedy_works_a_file_put_into_the_cache_by_hand(nowhere, cache, monkeypatch):
    members, _, _ = small_cifar()
    body = tar_bytes(members)
    publish(monkeypatch, "cifar10", {"cifar-10-binary.tar.gz": body}, [nowhere])
    with pytest.raises(DataError) as caught:
        load("cifar10")
    assert hashlib.sha256(body).hexdigest() in str(caught.value)
    (cache / "cifar10").mkdir(parents=True, exist_ok=True)
    (cache / "cifar10" / "cifar-10-binary.tar.gz").write_bytes(body)
    check(load("cifar10"))


def broken(what: str) -> dict[str, bytes]:
    files, arrays = small_mnist()
    images = arrays["train-images-idx3-ubyte.gz"]
    header = gzip.decompress(files["train-images-idx3-ubyte.gz"])
    key = "train-images-idx3-ubyte.gz"
    if what == "labels":
        return files | {"train-labels-idx1-ubyte.gz": idx(np.zeros(N_TRAIN - 1, np.uint8))}
    if what == "label range":
        return files | {"train-labels-idx1-ubyte.gz": idx(np.full(N_TRAIN, 10, np.uint8))}
    if what == "counts":
        return files | {
            "t10k-images-idx3-ubyte.gz": idx(images[:7]),
            "t10k-labels-idx1-ubyte.gz": idx(images[0, 0, :1].repeat(7) % 10),
        }
    return files | {
        key: {
            "gzip": files[key][:-20],
            "no gzip": b"plain text",
            "payload": gzip.compress(header[:-1]),
            "magic": gzip.compress(b"\x00\x00\x0d\x03" + header[4:]),
            "header": gzip.compress(header[:7]),
            "swapped": idx(images[:, 0, 0]),
        }[what]
    }


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("gzip", "not a whole gzip file"),
        ("no gzip", "not a whole gzip file"),
        ("payload", "announces shape"),
        ("header", "announces shape"),
        ("magic", "not an IDX file"),
        ("swapped", "do not fit"),
        ("labels", "do not fit"),
        ("label range", "do not fit"),
        ("counts", "instead of"),
    ],
)
def test_idx_damage_behind_a_right_checksum(what, words, host, monkeypatch):
    files = broken(what)
    publish(monkeypatch, "mnist", files, [f"{host.url}/"])
    host.serve.update({f"/{file}": body for file, body in files.items()})
    with pytest.raises(DataError, match=words) as caught:
        load("mnist")
    assert "mnist" in str(caught.value) and "elete" in str(caught.value)


def test_idx_reads_one_to_three_dimensions(tmp_path):
    for shape in ((3,), (2, 3), (4, 2, 3), (0, 2, 2)):
        array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
        (tmp_path / "a.gz").write_bytes(idx(array))
        np.testing.assert_array_equal(read_idx(tmp_path / "a.gz"), array)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("short", "no multiple"),
        ("missing", "data_batch_3.bin missing"),
        ("label", "above 9"),
        ("cut", "cut short"),
    ],
)
def test_cifar_damage_behind_a_right_checksum(what, words, host, monkeypatch):
    members, _, _ = small_cifar()
    batch = "cifar-10-batches-bin/data_batch_3.bin"
    if what == "short":
        members[batch] = members[batch][:-1]
    elif what == "missing":
        del members[batch]
    elif what == "label":
        members[batch] = b"\x0a" + members[batch][1:]
    body = tar_bytes(members)
    files = {"cifar-10-binary.tar.gz": body[: len(body) // 2] if what == "cut" else body}
    publish(monkeypatch, "cifar10", files, [f"{host.url}/"])
    host.serve["/cifar-10-binary.tar.gz"] = files["cifar-10-binary.tar.gz"]
    with pytest.raises(DataError, match=words) as caught:
        load("cifar10")
    assert "cifar-10-binary.tar.gz" in str(caught.value)


def test_the_table_of_official_files_is_well_formed():
    for remote in data._REMOTE.values():
        assert len(remote.mirrors) >= 3 and all(
            m.startswith("http") and m.endswith("/") for m in remote.mirrors
        )
        assert all(len(bytes.fromhex(digest)) == 32 for digest in remote.files.values())
        assert len(set(remote.files.values())) == len(remote.files)


# --- names and paths ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"), [("digit", "digits"), ("MNIST", "mnist"), ("fashion-mnist", "fashion_mnist")]
)
def test_unknown_name_gives_the_nearest(name, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"Did you mean '{near}'"):
        load(name)


def test_paths_that_are_no_data(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="neither a data set nor an existing path"):
        load(tmp_path / "absent.npz")
    with pytest.raises(DataError, match="neither"):
        load("")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes\.txt is no \.npz, folder or tar"):
        load(tmp_path / "notes.txt")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        load("./mnist")  # a path; the bare name would be the data set


def test_cache_directory(monkeypatch, tmp_path):
    assert data.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("DOWNHILL_DATA")
    assert data.cache_dir().name == "downhill-with-noise"


# --- .npz --------------------------------------------------------------------------------------------


def good_arrays(n: int = 40) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 256, (n + 8, 4, 5), dtype=np.uint8), np.arange(n + 8) % 4
    return {"x_train": x[:n], "y_train": y[:n], "x_test": x[n:], "y_test": y[n:]}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    height=st.integers(2, 7),
    width=st.integers(2, 7).filter(lambda w: w != 3),
    channels=st.sampled_from([None, 1, 3]),
    last=st.booleans(),
    number=st.sampled_from(["uint8", "float16", "float32", "float64", ">f4"]),
    signed=st.booleans(),
    label=st.sampled_from(["uint8", "int32", "int64", "uint64"]),
    column=st.booleans(),
    given_validation=st.booleans(),
    seed=st.integers(0, 99),
)
def test_npz_any_shape_and_dtype(
    height, width, channels, last, number, signed, label, column, given_validation, seed, tmp_path
):
    rng = np.random.default_rng(seed)
    sizes = {"train": 24, "test": 6} | ({"validation": 5} if given_validation else {})
    v, y, arrays = {}, {}, {}
    for split, n in sizes.items():
        v[split] = rng.integers(0, 256, (n, channels or 1, height, width), dtype=np.uint8)
        v[split][0, 0, 0, 0] = 0  # with a zero, [-1, 1] shows its sign
        y[split] = (np.arange(n) % 3).astype(label)
        x = v[split][:, 0] if channels is None else v[split].transpose(0, 2, 3, 1) if last else v[split]
        if number != "uint8":
            x = (x / 127.5 - 1 if signed else x / 255).astype(number)
        arrays[f"x_{split}"], arrays[f"y_{split}"] = x, y[split][:, None] if column else y[split]
    np.savez(tmp_path / "set.npz", **arrays)
    ds = load(tmp_path / "set.npz")
    check(ds)
    assert ds.shape == (channels or 1, height, width) and ds.n_classes == 3 and ds.name == "set"
    np.testing.assert_array_equal(levels_of(ds.x_test, 256), v["test"])
    np.testing.assert_array_equal(ds.y_test, y["test"])
    if given_validation:
        np.testing.assert_array_equal(levels_of(ds.x_train, 256), v["train"])
        np.testing.assert_array_equal(levels_of(ds.x_validation, 256), v["validation"])
    else:  # three of 24, one a class, nothing lost
        assert sorted(ds.y_validation.tolist()) == [0, 1, 2]
        both = levels_of(torch.cat([ds.x_train, ds.x_validation]), 256).astype(np.uint8)
        assert sorted(map(bytes, both)) == sorted(map(bytes, v["train"]))


def test_npz_validation_is_a_stratified_tenth_and_the_same_each_time(tmp_path):
    np.savez(tmp_path / "set.npz", **good_arrays(400))
    first, second = load(tmp_path / "set.npz"), load(str(tmp_path / "set.npz"))
    assert torch.bincount(first.y_validation).tolist() == [10] * 4 and len(first.x_train) == 360
    assert torch.equal(first.x_validation, second.x_validation)
    assert str(tmp_path) not in first.source


def nonfinite() -> np.ndarray:
    x = np.zeros((40, 4, 5), np.float32)
    x[3, 2, 1] = np.nan
    return x


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"y_test": None}, "lacks y_test; it has x_train"),
        ({"x_validation": np.zeros((4, 4, 5), np.uint8)}, "lacks y_validation"),
        ({"x_train": np.zeros((40, 4, 5), np.int64)}, "x_train is int64"),
        ({"x_train": np.zeros((40, 4, 5), bool)}, "x_train is bool"),
        ({"x_train": np.zeros((40, 20), np.uint8)}, r"shape \(40, 20\)"),
        ({"x_train": np.zeros((40, 2, 4, 5), np.uint8)}, "C = 1 or 3"),
        ({"x_train": np.zeros((0, 4, 5), np.uint8), "y_train": np.zeros(0, int)}, "at least one image"),
        ({"x_test": np.zeros((8, 5, 5), np.uint8)}, "splits differ"),
        ({"x_test": np.zeros((8, 4, 5), np.float32)}, "splits differ"),
        ({"x_train": nonfinite(), "x_test": np.zeros((8, 4, 5), np.float32)}, "1 non-finite"),
        ({"x_train": np.full((40, 4, 5), 255.0), "x_test": np.zeros((8, 4, 5))}, r"span \[0, 255\]"),
        ({"x_train": np.full((40, 4, 5), -1.1), "x_test": np.zeros((8, 4, 5))}, r"span \[-1.1, 0\]"),
        ({"y_train": np.arange(39) % 4}, r"y_train is int64 \(39,\); 40 images"),
        ({"y_train": np.zeros(40)}, "y_train is float64"),
        ({"y_train": np.eye(40, dtype=int)}, "one-hot"),
        ({"y_train": np.arange(40) % 4 - 1}, "from -1 to 2"),
        ({"y_train": np.arange(40) % 4 + 1}, "labels must be 0..K-1"),
        ({"y_test": np.full(8, 4)}, "labels must be 0..K-1"),
        ({"y_train": np.where(np.arange(40) == 0, 0, np.arange(40) % 3 + 1)}, "rarest class with 1"),
        ({"x_train": np.array([object()] * 40)}, "never loaded"),
    ],
)
def test_npz_errors(change, words, tmp_path):
    arrays = {key: value for key, value in (good_arrays() | change).items() if value is not None}
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=words) as caught:
        load(tmp_path / "set.npz")
    assert "set.npz" in str(caught.value)


class Boom:
    def __reduce__(self):
        return (os.system, ("touch boom",))


def test_npz_never_unpickles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = good_arrays() | {"x_train": np.array([Boom()] * 40)}
    np.savez("objects.npz", **arrays)
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Boom()))
    for name in ("objects.npz", "bare.npz"):
        with pytest.raises(DataError, match="never loaded"):
            load(name)
    np.savez("extra.npz", **good_arrays(), notes=np.array([Boom()]))
    check(load("extra.npz"))  # a key nobody asked for is not opened
    assert not (tmp_path / "boom").exists()


def test_npz_damaged(tmp_path):
    np.savez_compressed(tmp_path / "set.npz", **good_arrays())
    whole = (tmp_path / "set.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 0xFF
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    stray = io.BytesIO()
    with zipfile.ZipFile(stray, "w") as archive:
        archive.writestr("x_train.npy", b"not an array")
    for content in (whole[: len(whole) // 2], bytes(flipped), b"", buffer.getvalue(), stray.getvalue()):
        (tmp_path / "set.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"set\.npz"):
            load(tmp_path / "set.npz")


# --- image folders and tars --------------------------------------------------------------------------


def png(seed: int, size: tuple[int, int] = (5, 4), mode: str = "RGB", kind: str = "PNG") -> bytes:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0]) + ((3,) if mode == "RGB" else ()), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def image_tree(per: int = 20, mode: str = "RGB", top: str = "") -> dict[str, bytes | None]:
    tree: dict[str, bytes | None] = {}
    for s, split in enumerate(("train", "test")):
        for c, name in enumerate(("cat", "ant", "bee")):
            tree[f"{top}{split}/{name}"] = None
            for i in range(per if split == "train" else 4):
                tree[f"{top}{split}/{name}/{i:03}.png"] = png(s * 1000 + c * 100 + i, mode=mode)
    return tree


def write_tree(root, tree: dict[str, bytes | None]):
    for name, content in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).mkdir(exist_ok=True) if content is None else (root / name).write_bytes(content)
    return root


def same(a: Dataset, b: Dataset) -> bool:
    fields = [f"{k}_{s}" for s in ("train", "validation", "test") for k in "xy"]
    return a.classes == b.classes and all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_folder_and_every_tar_agree(mode, tmp_path):
    tree = image_tree(mode=mode)
    ds = load(write_tree(tmp_path / "pets", tree))
    check(ds)
    assert (ds.name, ds.shape, ds.classes) == (
        "pets",
        (3 if mode == "RGB" else 1, 4, 5),
        ("ant", "bee", "cat"),
    )
    assert (
        torch.bincount(ds.y_train).tolist() == [18] * 3
        and torch.bincount(ds.y_validation).tolist() == [2] * 3
    )
    # Every image is there once and under its own label.
    x = levels_of(torch.cat([ds.x_train, ds.x_validation, ds.x_test]), 256)
    y = torch.cat([ds.y_train, ds.y_validation, ds.y_test])
    found = sorted((bytes(i.astype(np.uint8)), int(c)) for i, c in zip(x, y, strict=True))
    images = {n: np.array(Image.open(io.BytesIO(b))) for n, b in tree.items() if b}
    images = {n: i.transpose(2, 0, 1) if mode == "RGB" else i[None] for n, i in images.items()}
    assert found == sorted((bytes(i.copy()), ds.classes.index(n.split("/")[1])) for n, i in images.items())
    # Not sorted by class: the first images of a split are a sample of it.
    assert len(set(ds.y_test[:6].tolist())) > 1
    for suffix, kind in ((".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz"), (".tar.bz2", "w:bz2")):
        backwards = dict(reversed(image_tree(mode=mode, top="./some/pets/").items()))
        path = tmp_path / f"pets{suffix}"
        path.write_bytes(tar_bytes(backwards, kind))
        assert same(load(path), ds), suffix


def test_folder_pool_validation_formats_and_droppings(tmp_path):
    pool = {
        f"{c}/{i}.{k}": png(i, kind=f)
        for c in "ab"
        for i in range(25)
        for k, f in (("jpg", "JPEG"), ("png", "PNG"))
    }
    pool |= {"a/.DS_Store": b"x", "a/._0.png": b"x", "__MACOSX/a/0.png": b"x", "README.txt": b"x"}
    ds = load(write_tree(tmp_path / "pool", pool))
    check(ds)
    assert [torch.bincount(y).tolist() for y in (ds.y_train, ds.y_validation, ds.y_test)] == [
        [30] * 2,
        [10] * 2,
        [10] * 2,
    ]
    assert same(ds, load(tmp_path / "pool"))
    tree = image_tree() | {f"val/bee/{i}.png": png(i) for i in range(3)}
    ds = load(write_tree(tmp_path / "given", tree))
    assert len(ds.x_train) == 60 and ds.y_validation.tolist() == [1] * 3
    # One colour image makes the set colour; palettes and transparency are flattened to RGB.
    mixed = image_tree(mode="L") | {
        "train/ant/p.png": png(1, mode="P"),
        "train/ant/q.png": png(1, mode="RGBA"),
    }
    check(ds := load(write_tree(tmp_path / "mixed", mixed)))
    assert ds.shape == (3, 4, 5)
    one = {f"faces/{i}.png": png(i) for i in range(10)}
    assert load(write_tree(tmp_path / "one", one)).n_classes == 1


def gif() -> bytes:
    return png(0, kind="GIF")


def sixteen_bit() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 5), np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train/ant/bad.png": b"not an image"}, "train/ant/bad.png is not a readable image"),
        ({"train/ant/bad.png": png(0)[:-30]}, "train/ant/bad.png is not a readable image"),
        ({"train/ant/bad.jpg": png(0, (64, 64), kind="JPEG")[:-900]}, "bad.jpg"),
        ({"train/ant/bad.png": b""}, "not a readable image"),
        ({"train/ant/bad.png": gif()}, "not a readable image"),  # a format nobody asked for
        ({"train/cat/big.png": png(0, (5, 5))}, "train/cat/big.png is 5x5, others 5x4"),
        ({"test/dog/0.png": png(0)}, "test has class dog"),
        ({"train/ant/deep.png": sixteen_bit()}, "8 bits"),
        ({"train/dog": None}, "no image in folder train/dog"),
        ({"train/dog/readme.txt": b"x", "train/dog": None}, "no image in folder train/dog"),
        ({"train/stray.png": png(0)}, "different depth"),
        ({"stray.png": png(0)}, "different depth"),
        ({"other/ant/0.png": png(0)}, "different depth"),
    ],
)
@pytest.mark.parametrize("tarred", [False, True])
def test_image_errors(change, words, tarred, tmp_path):
    tree = image_tree(per=3) | dict(sorted(change.items()))
    if tarred:
        path = tmp_path / "pets.tar.gz"
        path.write_bytes(tar_bytes(tree))
    else:
        path = write_tree(tmp_path / "pets", tree)
    with pytest.raises(DataError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_image_sets_that_are_too_small_or_lack_a_part(tmp_path):
    with pytest.raises(DataError, match="too few"):
        load(write_tree(tmp_path / "few", {"a/0.png": png(0), "b/0.png": png(1), "b/1.png": png(2)}))
    with pytest.raises(DataError, match="without train and test both"):
        load(write_tree(tmp_path / "half", {"train/a/0.png": png(0)}))
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        load(tmp_path / "void")


def test_image_limits(tmp_path, monkeypatch):
    path = write_tree(tmp_path / "pets", image_tree(per=3))
    monkeypatch.setattr(_trees, "_MAX_SIDE", 4)
    with pytest.raises(DataError, match="above 4 a side"):
        load(path)
    monkeypatch.undo()
    monkeypatch.setattr(_trees, "_MAX_DECODED", 200)
    with pytest.raises(DataError, match="of pixels"):
        load(path)
    monkeypatch.undo()
    (tmp_path / "pets.tar").write_bytes(tar_bytes(image_tree(per=3), "w"))
    monkeypatch.setattr(_trees, "_MAX_FILE", 50)
    with pytest.raises(DataError, match="no small image"):
        load(tmp_path / "pets.tar")
    monkeypatch.undo()
    (path / "train" / "ant" / "loop").symlink_to(path / "train")
    with pytest.raises(DataError, match="link in a circle"):
        load(path)


@pytest.mark.parametrize(
    ("mode", "damage"),
    [
        (mode, damage)
        for mode in ("w", "w:gz", "w:xz", "w:bz2")
        for damage in ("half", "tail", "flip", "empty", "text")
        if (mode, damage) != ("w", "flip")  # a plain tar keeps no checksum of its contents
    ],
)
def test_tar_damage(mode, damage, tmp_path):
    body = bytearray(tar_bytes(image_tree(per=5), mode))
    if damage == "half" and mode == "w":  # at a member's boundary, where a plain tar looks whole
        with tarfile.open(fileobj=io.BytesIO(body)) as archive:
            body = body[: archive.getmembers()[12].offset]
    elif damage == "half":
        body = body[: len(body) // 2]
    elif damage == "tail":
        body = body.rstrip(b"\0") if mode == "w" else body[:-5]
    elif damage == "flip":
        body[-12 if mode == "w:xz" else len(body) // 2] ^= 0x55
    else:
        body = b"" if damage == "empty" else b"hello world, this is no archive" * 100
    path = tmp_path / ("pets.tar" + mode[1:].replace(":", "."))
    path.write_bytes(body)
    with pytest.raises(DataError, match="damaged or cut short|not a readable image") as caught:
        load(path)
    assert str(path) in str(caught.value)


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("evil", "words"),
    [
        (member("../evil.png"), "points outside"),
        (member("train/ant/../../../evil.png"), "points outside"),
        (member("train\\..\\..\\evil.png"), "points outside"),
        (member("/etc/evil.png"), "points outside"),
        (member("C:/evil.png"), "points outside"),
        (member("train/ant/evil.png", tarfile.SYMTYPE, "/etc/passwd"), "link or a device"),
        (member("train/ant/evil.png", tarfile.LNKTYPE, "train/ant/000.png"), "link or a device"),
        (member("train/evil", tarfile.SYMTYPE, "/"), "link or a device"),
        (member("train/ant/evil.png", tarfile.FIFOTYPE), "link or a device"),
        (member("train/ant/evil.png", tarfile.CHRTYPE), "link or a device"),
        (member("train/ant/000.png"), "occurs twice"),
    ],
)
def test_malicious_tars_are_refused(evil, words, tmp_path):
    content = png(0) if evil.isreg() else b""
    evil.size = len(content)
    path = tmp_path / "pets.tar.gz"
    path.write_bytes(tar_bytes(image_tree(per=3)))
    with tarfile.open(path) as source, tarfile.open(tmp_path / "evil.tar", "w") as archive:
        for info in source:
            archive.addfile(info, source.extractfile(info))
        archive.addfile(evil, io.BytesIO(content))
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(DataError, match=words):
        load(tmp_path / "evil.tar")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before  # nothing was unpacked


def test_a_data_set_shows_what_it_holds_in_one_line():
    assert repr(data.load()) == (
        "Dataset('digits': 997 train, 400 validation, 400 test images of 1x8x8, 10 classes, 17 levels)"
    )
