"""The check of external links and the audit: what they find, believe and say, against a host of their own."""

import importlib.util
import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tool(name):
    spec = importlib.util.spec_from_file_location(f"downhill_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


links, audit = tool("links"), tool("audit")


SOME = ["https://c.org/d"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see [a](https://a.org/x_(y)) and (https://b.org/z).", ["https://a.org/x_(y)", "https://b.org/z"]),
        ("<https://a.org/>, `https://b.org`: *https://c.org/d*", ["https://a.org/", "https://b.org", *SOME]),
        ("url = {https://a.org/q?x=1&y=2#z},", ["https://a.org/q?x=1&y=2#z"]),
        ("http://127.0.0.1:9/ http://localhost/x https://me.example.org/ https://forge/x", []),
        ("![badge][1]\n\n[1]: https://a.org/b.svg\nhttps://a.org/b.svg", ["https://a.org/b.svg"]),
    ],
)  # fmt: skip
def test_addresses_are_found(text, found):
    assert links.urls_in(text) == found


def test_the_book_s_own_links_are_found():
    found = links.find_links(ROOT)
    assert "https://arxiv.org/abs/2205.12243" in found
    assert all(files for files in found.values())


@pytest.fixture
def host(monkeypatch):
    """A host whose answers are set by path, ``host.answers["/x"] = [503, 200]``; ``host.asked`` has them."""
    asked, answers = [], {}

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            asked.append((self.command, self.path))
            codes = answers.get(self.path, [404])
            self.send_response(codes.pop(0) if len(codes) > 1 else codes[0])
            if self.path == "/moved":
                self.send_header("Location", "/there")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = answer

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answers = asked, answers
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "*")
    address = f"http://127.0.0.1:{server.server_port}"

    # The check leaves out addresses of this machine; here they stand for the world.
    def found(root):
        return {f"{address}{line}": ["page.md"] for line in (root / "paths").read_text().split()}

    monkeypatch.setattr(links, "find_links", found)
    yield server
    server.shutdown()
    server.server_close()


def check(root, capsys, *paths):
    (root / "paths").write_text("\n".join(paths))
    status = links.main(["--root", str(root), "--pause", "0"])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_what_is_there_is_believed_and_what_is_dead_is_told(host, tmp_path, capsys):
    host.answers.update(
        {
            "/there": [200],
            "/moved": [301],
            "/guarded": [403],
            "/tired": [503, 503, 200],
            "/no-head": [405, 200],
        }
    )
    good = ["/there", "/moved", "/guarded", "/tired", "/no-head"]
    status, printed = check(tmp_path, capsys, *good)
    assert status == 0 and "5 in all, 5 asked, 0 dead" in printed
    assert host.asked.count(("HEAD", "/tired")) == 3 and ("GET", "/guarded") in host.asked
    host.asked.clear()
    status, printed = check(tmp_path, capsys, *good, "/gone")
    assert status == 1 and "/gone: 404 (page.md)" in printed and "6 in all, 1 asked, 1 dead" in printed
    assert host.asked == [("HEAD", "/gone"), ("GET", "/gone")]
    kept = json.loads((tmp_path / "build" / "links.json").read_text())
    assert len(kept) == 5

    # A dead one is asked again each time, an old answer too, a link that is no longer used is forgotten.
    (tmp_path / "build" / "links.json").write_text(
        json.dumps(dict.fromkeys(kept, "2020-01-01T00:00:00+00:00"))
    )
    host.answers["/gone"] = [200]
    status, printed = check(tmp_path, capsys, "/gone", "/there")
    assert status == 0 and "2 asked" in printed
    assert len(json.loads((tmp_path / "build" / "links.json").read_text())) == 2
    (tmp_path / "build" / "links.json").write_text("{")
    assert check(tmp_path, capsys, "/there")[0] == 0


def test_a_host_that_is_always_down_is_dead(host, tmp_path, capsys):
    host.answers.update({"/there": [200], "/down": [503]})
    status, printed = check(tmp_path, capsys, "/there", "/down")
    assert status == 1 and "/down: 503" in printed


def test_no_network_is_no_verdict(tmp_path, capsys, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(
        links, "find_links", lambda root: {f"http://127.0.0.{i}:{port}/": ["page.md"] for i in range(1, 9)}
    )
    status, printed = check(tmp_path, capsys)
    assert status == 2 and "no network" in printed and "dead" not in printed
    assert json.loads((tmp_path / "build" / "links.json").read_text()) == {}


# --- the audit ------------------------------------------------------------------------------------

CLEAN = {"name": "a", "version": "1", "vulns": []}
WEAK = {"name": "b", "version": "2", "vulns": [{"id": "X-1", "fix_versions": ["3"]}]}
SKIPPED = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "status", "says"),
    [
        ([CLEAN], 0, "1 packages, nothing known"),
        ([CLEAN, WEAK], 1, "b 2: X-1, mended in 3"),
        ([CLEAN, SKIPPED], 2, "NOT looked up: c"),
        ([SKIPPED], 2, "0 packages looked up"),
        ([WEAK, SKIPPED], 1, "NOT looked up: c"),
    ],
)
def test_a_look_up_that_did_not_happen_is_no_clean_bill(
    tmp_path, capsys, monkeypatch, packages, status, says
):
    monkeypatch.setattr(audit, "pip_audit", lambda _: {"dependencies": packages})
    assert audit.main(["--root", str(tmp_path)]) == status
    printed = capsys.readouterr()
    assert says in printed.out + printed.err
    assert json.loads((tmp_path / "build" / "audit.json").read_text())["status"] == status


def test_an_audit_that_cannot_be_made_says_so(tmp_path, capsys, monkeypatch):
    def fail(_):
        raise OSError("pip install: no network")

    monkeypatch.setattr(audit, "pip_audit", fail)
    assert audit.main(["--root", str(tmp_path)]) == 2
    assert "no network" in capsys.readouterr().err
    assert "no network" in json.loads((tmp_path / "build" / "audit.json").read_text())["error"]
