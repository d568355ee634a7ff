"""Graph batches and data sets: round trips, refusals, recipes; official formats against files made here."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch

from companion.data import DataError
from companion.graphs import (
    GraphBatch,
    check,
    datasets,
    ego_graphs,
    erdos_renyi_like,
    load,
    pair_mask,
    threshold,
    two_blocks,
    uniqueness,
)

FILES = os.environ.get("DOWNHILL_TEST_GRAPHS")  # a folder with GDSS's graph6 files and citeseer/raw/


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache directory, no pause between retries, no proxy before the local server."""
    monkeypatch.setenv("DOWNHILL_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(datasets, "_PAUSE", 0.0)
    return tmp_path / "cache"


@pytest.fixture
def serve():
    """A local host of files: serve(name=bytes) returns its address, which ends in a slash."""
    servers = []

    def start(**files: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                body = files.get(self.path[1:])
                self.send_response(404 if body is None else 200)
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *args):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def same(a: nx.Graph, b: nx.Graph) -> bool:
    """Equal node by node, in the nodes' order."""
    return np.array_equal(nx.to_numpy_array(a, weight=None), nx.to_numpy_array(b, weight=None))


def some_graphs() -> list[nx.Graph]:
    letters = nx.Graph([("b", "a"), ("a", "c")])  # an order of nodes that is not the alphabet's
    return [
        nx.path_graph(4),
        nx.complete_graph(5),
        letters,
        nx.empty_graph(1),
        nx.empty_graph(0),
        nx.star_graph(3),
    ]


# --- batches -----------------------------------------------------------------------------------------


def test_batch_of_networkx_and_back():
    graphs = some_graphs()
    batch = GraphBatch.from_networkx(graphs, max_nodes=7)
    assert check(batch, binary=True) is batch and len(batch) == 6
    assert batch.adjacency.shape == (6, 7, 7) and batch.adjacency.dtype == torch.float32
    assert batch.sizes.tolist() == [4, 5, 3, 1, 0, 4] and batch.n_edges.tolist() == [3, 10, 2, 0, 0, 3]
    assert all(map(same, batch.to_networkx(), graphs))
    weighted = nx.Graph()
    weighted.add_edge(0, 1, weight=3.0)
    assert GraphBatch.from_networkx([weighted]).adjacency.tolist() == [[[0, 1], [1, 0]]]


def test_from_edges_takes_either_direction_or_both():
    lists = [[(0, 1), (2, 1)], [(1, 0), (0, 1), (1, 2), (2, 1)], torch.tensor([[1, 0], [1, 2]])]
    for adjacency in GraphBatch.from_edges(lists, [3, 3, 3]).adjacency:
        assert same(nx.from_numpy_array(adjacency.numpy()), nx.path_graph(3))
    assert GraphBatch.from_edges([[]], [2]).n_edges.tolist() == [0]
    assert GraphBatch.from_edges([], [], max_nodes=4).adjacency.shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GraphBatch.from_edges([[(0, 3)]], [3]), "an edge that leaves 0..2"),
        (lambda: GraphBatch.from_edges([[(-1, 0)]], [3]), "an edge that leaves 0..2"),
        (lambda: GraphBatch.from_edges([[], [(1, 1)]], [3, 3]), "graph 1 has a self-loop at node 1"),
        (lambda: GraphBatch.from_edges([[]], [3, 3]), "1 lists of edges for 2 sizes"),
        (lambda: GraphBatch.from_edges([[]], [-1]), "cannot have -1 nodes"),
        (lambda: GraphBatch.from_networkx([nx.path_graph(9)], max_nodes=8), "graph 0 has 9 nodes, more than"),
        (lambda: GraphBatch.from_networkx([nx.DiGraph()]), "directed"),
        (lambda: GraphBatch.from_networkx([nx.path_graph(5)]).pad(4), "graph 0 has 5 nodes, more than"),
        (lambda: GraphBatch(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)), r"floats \(B, N, N\)"),
        (lambda: GraphBatch(torch.zeros(2, 3, 3).int(), torch.ones(2, 3, dtype=torch.bool)), "floats"),
        (lambda: GraphBatch(torch.zeros(2, 3, 3), torch.ones(2, 4, dtype=torch.bool)), "mask must be bool"),
        (lambda: GraphBatch(torch.zeros(2, 3, 3), torch.ones(2, 3)), "mask must be bool"),
    ],
)
def test_batch_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_pad_trim_and_subsets():
    graphs = some_graphs()
    batch = GraphBatch.from_networkx(graphs)
    wide = check(batch.pad(9), binary=True)
    assert wide.adjacency.shape == (6, 9, 9) and torch.equal(wide.trim().adjacency, batch.adjacency)
    assert torch.equal(wide.pad(5).mask, batch.mask) and batch[:0].trim().adjacency.shape == (0, 0, 0)
    assert same(batch[1].to_networkx()[0], graphs[1]) and same(batch[-1].to_networkx()[0], graphs[-1])
    assert [len(batch[2:]), len(batch[[0, 0]]), len(batch.subset(torch.tensor([5, 1, 1])))] == [4, 2, 3]
    assert batch[batch.sizes > 3].sizes.tolist() == [4, 5, 4] and len(list(batch)) == 6
    assert batch.subset([4, 1]).sizes.tolist() == [0, 5] and len(batch.subset([])) == len(batch[[]]) == 0
    assert batch[np.int64(1)].sizes.tolist() == batch[torch.tensor(1)].sizes.tolist() == [5]
    assert batch.to(dtype=torch.float64).adjacency.dtype == torch.float64
    with pytest.raises(IndexError):
        batch[6]


def test_pair_mask_is_where_a_complete_graph_has_edges():
    batch = GraphBatch.from_networkx([nx.complete_graph(n) for n in (0, 1, 3, 5)], max_nodes=6)
    assert torch.equal(pair_mask(batch.mask), batch.adjacency == 1)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ((1, 0, 1), 0.0, "asymmetric"),
        ((1, 2, 2), 1.0, "self-loop"),
        ((1, [0, 4], [4, 0]), 0.2, "edge at a padded node"),
        ((1, [0, 1], [1, 0]), float("nan"), "non-finite"),
        ((1, [0, 1], [1, 0]), float("inf"), "non-finite"),
    ],
)
def test_check_names_the_fault(where, value, message):
    batch = GraphBatch.from_networkx([nx.path_graph(5), nx.path_graph(4)])
    batch.adjacency[where] = value
    with pytest.raises(ValueError, match=f"graph 1 of 2 has .*{message}"):
        check(batch)


def test_check_of_masks_and_relaxed_adjacencies(rng):
    gap = GraphBatch(torch.zeros(1, 3, 3), torch.tensor([[True, False, True]]))
    with pytest.raises(ValueError, match="padded node before a real one"):
        check(gap)
    noise = torch.randn(1, 4, 4, generator=rng).triu(1)
    relaxed = GraphBatch(noise + noise.mT, torch.ones(1, 4, dtype=torch.bool))
    check(relaxed)
    check(GraphBatch(relaxed.adjacency + 1e-7 * noise, relaxed.mask))  # rounding of a symmetric function
    with pytest.raises(ValueError, match="other than 0 and 1"):
        check(relaxed, binary=True)


def test_threshold_keeps_graphs_without_isolated_nodes(rng):
    batch = two_blocks(8, generator=rng)
    noise = 0.3 * torch.rand(batch.adjacency.shape, generator=rng)
    found, lost = threshold(batch.adjacency + noise * (1 - 2 * batch.adjacency), batch.mask)
    assert torch.equal(found.adjacency, batch.adjacency) and torch.equal(found.mask, batch.mask)
    assert lost.tolist() == [0] * 8


def test_threshold_drops_isolated_nodes_as_networkx_does(rng):
    a = torch.rand(200, 9, 9, generator=rng)  # neither symmetric nor empty at diagonal and padding
    mask = torch.arange(9) < torch.randint(1, 10, (200, 1), generator=rng)
    found, lost = threshold(a, mask, level=0.75)
    check(found, binary=True)
    assert torch.equal(found.sizes + lost, mask.sum(1)) and (lost > 0).any() and (found.n_edges == 0).any()
    whole, none = threshold(a, mask, level=0.75, drop_isolated=False)
    assert torch.equal(whole.mask, mask) and not none.any()
    for mine, graph, matrix, n in zip(found.to_networkx(), whole.to_networkx(), a, mask.sum(1), strict=True):
        matrix = (matrix + matrix.T)[:n, :n] / 2
        assert same(graph, nx.from_numpy_array((matrix.fill_diagonal_(0) >= 0.75).numpy()))
        graph.remove_nodes_from(list(nx.isolates(graph)))
        assert same(mine, graph if len(graph) else nx.empty_graph(1))


def test_threshold_refuses_a_diverged_chain():
    a, mask = torch.zeros(2, 3, 3), torch.tensor([[True] * 3, [True, True, False]])
    a[1, 2, 0] = float("nan")  # at padding: not read
    threshold(a, mask)
    a[1, 1, 0] = float("nan")
    with pytest.raises(ValueError, match="graph 1 of 2 has a non-finite entry"):
        threshold(a, mask)


# --- recipes -----------------------------------------------------------------------------------------


def halves(graph: nx.Graph) -> tuple[nx.Graph, nx.Graph, list[tuple[int, int]]]:
    """The two blocks, and the links between them."""
    s = len(graph) // 2
    links = [(u, v) for u, v in graph.edges if (u < s) != (v < s)]
    blocks = (graph.subgraph(range(s)), nx.convert_node_labels_to_integers(graph.subgraph(range(s, 2 * s))))
    return *blocks, links


def test_seeded_blocks_are_the_released_ones(rng):
    batch = check(two_blocks(300, True, rng), binary=True)
    bridges = 0.0
    for graph in batch.to_networkx():
        first, second, links = halves(graph)
        s = len(first)
        assert set(first.edges) == set(nx.gnp_random_graph(s, 0.7, seed=0).edges)
        assert set(second.edges) == set(nx.gnp_random_graph(s, 0.7, seed=1).edges)
        assert links and nx.is_connected(graph)
        p = 0.1 / s
        bridges += (
            len(links) - s * s * p - (1 - p) ** (s * s)
        ) / 300  # the expectation, with the forced link
    # Sizes: K = 12..20 uniform, halves of K // 2. Five standard errors of 300 draws; seed 0.
    share = torch.bincount(batch.sizes, minlength=21)[12::2] / 300
    expected = torch.tensor([2, 2, 2, 2, 1]) / 9
    assert (share - expected).abs().max() < 5 * (2 / 9 * 7 / 9 / 300) ** 0.5 and (batch.sizes % 2 == 0).all()
    assert abs(bridges) < 5 * (1 / 300) ** 0.5  # a count of variance below sp s <= 1


def test_blocks_drawn_anew(rng):
    graphs = two_blocks(200, False, rng).to_networkx()
    assert all(map(nx.is_connected, graphs))
    inside = [block.number_of_edges() for graph in graphs for block in halves(graph)[:2]]
    pairs = [len(graph) // 2 * (len(graph) // 2 - 1) / 2 for graph in graphs for _ in range(2)]
    # Five standard errors of the share of about 10,000 pairs; links that mend a broken block add little.
    assert abs(sum(inside) / sum(pairs) - 0.7) < 5 * (0.21 / sum(pairs)) ** 0.5
    assert uniqueness(graphs) > 0.95  # seeded, there would be some 50 different ones


def test_erdos_renyi_like_copies_sizes_and_densities(rng):
    train = GraphBatch.from_networkx([nx.complete_graph(6), nx.empty_graph(4), nx.cycle_graph(9)])
    copies = check(erdos_renyi_like(train, generator=rng), binary=True)
    assert torch.equal(copies.mask, train.mask) and copies.n_edges[:2].tolist() == [15, 0]
    many = check(erdos_renyi_like(train[2], 400, rng), binary=True)
    assert (many.sizes == 9).all()
    # 9 of 36 edges expected, variance 36 / 4 * 3 / 4; five standard errors of 400 graphs.
    assert abs(float(many.n_edges.float().mean()) - 9) < 5 * (6.75 / 400) ** 0.5
    assert erdos_renyi_like(train, 30, rng).sizes.unique().tolist() == [4, 6, 9]
    with pytest.raises(ValueError, match="no graphs"):
        erdos_renyi_like(train[:0], generator=rng)


def test_ego_graphs_by_hand():
    # A wheel of five spokes with a tail, self-loops and doubled edges; a triangle apart is not looked at.
    graph = nx.wheel_graph(6)
    graph.add_edges_from([(5, 6), (3, 3), (7, 8), (8, 9), (9, 7)])
    edges = torch.tensor(list(graph.edges) + [(v, u) for u, v in graph.edges]).T
    egos = ego_graphs(edges, 10)
    # Node 0: the wheel, 6 nodes. Nodes 1 to 4: the hub and two of the rim, 4 nodes. Node 5: and the tail.
    assert egos.sizes.tolist() == [6, 4, 4, 4, 4, 5] and egos.n_edges.tolist() == [10, 5, 5, 5, 5, 6]
    for centre, ego in enumerate(egos.to_networkx()):
        near = nx.ego_graph(graph, centre)
        near.remove_edges_from(list(nx.selfloop_edges(near)))
        assert nx.is_isomorphic(ego, near)
    assert ego_graphs(edges, 10, max_nodes=4).sizes.tolist() == [4] * 4
    assert ego_graphs(edges, 10, n_graphs=2).sizes.tolist() == [6, 4]


# --- load: what needs no download --------------------------------------------------------------------


def whole(data: datasets.GraphDataset) -> GraphBatch:
    """Test and train together, in the order of the file."""
    parts = data.test, data.train
    return GraphBatch(torch.cat([p.adjacency for p in parts]), torch.cat([p.mask for p in parts]))


@pytest.mark.parametrize(
    ("name", "largest", "digest"),
    [
        ("community-small", 20, "fa0c2e5d81306ccf7f8a9c8d933a753a126c9f3ffa7ee3ebe600d43818bea4d4"),
        ("community-small-unseeded", 20, "c97acc0141ad4ee25fbd2cc0ffe63b09ec053036c75bfcfc1fd0bad0db9f0df9"),
        ("grid", 361, "7ba6ead78b30b65da1bb116faea323e57f83739c367c1de545b695a4a3b4400b"),
    ],
)
def test_generated_sets_are_fixed(name, largest, digest, cache):
    # The graphs themselves, so that no figure of the book moves unseen when a dependency does.
    data = load(name)
    assert (len(data.test), len(data.train), data.max_nodes) == (20, 80, largest)
    assert datasets._digest(check(whole(data), binary=True)) == digest
    assert data.name == name and "seed 0" in data.source and not cache.exists()


def test_load_reads_graph6_in_order(tmp_path):
    graphs = [nx.gnp_random_graph(3 + k, 0.5, seed=k) for k in range(11)]
    path = tmp_path / "mine.g6"
    path.write_bytes(b"".join(nx.to_graph6_bytes(g, header=k == 0) for k, g in enumerate(graphs)))
    for given in (path, str(path)):
        data = load(given)
        assert (data.name, data.source) == ("mine", "mine.g6 (local, graph6)")
        assert [len(data.test), len(data.train), data.max_nodes, data.test.mask.shape[1]] == [2, 9, 13, 13]
        assert all(map(same, whole(data).to_networkx(), graphs))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"A_\n" * 4, "holds 4 graphs"),
        (b"", "holds 0 graphs"),
        (b"A_\n" * 5 + b"?\n", "line 6 has no nodes"),
        (b"A_\n" * 5 + b"E\n", "line 6 is no graph6"),
        (b"\x80\x04\x95 pickled\n" * 9, "line 1 is no graph6"),
        (bytes(range(256)), "is no graph6"),
    ],
)
def test_load_refuses_other_files(tmp_path, content, message):
    path = tmp_path / "bad.g6"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(path)


def test_load_tells_the_nearest_name():
    for wrong, near in (("comunity-small", "community-small"), ("ego_small", "ego-small"), ("Grid", "grid")):
        with pytest.raises(DataError, match=f"Did you mean '{near}'.*Known: community-small,"):
            load(wrong)
    with pytest.raises(DataError, match="neither a graph data set nor a file"):
        load("")


def test_importing_the_package_costs_what_torch_costs():
    code = (
        "import torch, sys; old = set(sys.modules); import companion.graphs; print(*set(sys.modules) - old)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"networkx", "torch_geometric", "pooch", "sklearn", "scipy", "matplotlib"}
    assert "companion.graphs" in found and not heavy & set(found)


# --- load: what is downloaded ------------------------------------------------------------------------


def planetoid(folder: Path, graph: nx.Graph) -> dict[str, str]:
    """The file of a Planetoid release that holds ``graph``; its sha256."""
    folder.mkdir(parents=True)
    path = folder / "ind.citeseer.graph"
    path.write_bytes(pickle.dumps({node: list(graph[node]) for node in graph}))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}


def test_ego_small_through_planetoid(tmp_path, cache, monkeypatch, serve, capfd, recwarn):
    graph = nx.wheel_graph(19)  # the hub has 19 in its neighbourhood, one too many
    graph.add_nodes_from(range(600))
    sha256 = planetoid(tmp_path / "raw", graph)
    monkeypatch.setattr(datasets, "_CITESEER", sha256)
    monkeypatch.setattr(
        datasets, "_PLANETOID", (serve(), serve(**{p: (tmp_path / "raw" / p).read_bytes() for p in sha256}))
    )
    data = load("ego-small")
    assert [len(data.test), len(data.train), data.max_nodes] == [3, 15, 4] and data.name == "ego-small"
    assert (whole(data).sizes == 4).all() and (whole(data).n_edges == 5).all()
    assert {path.name for path in (cache / "Citeseer" / "raw").iterdir()} == set(sha256)
    assert not (cache / "Citeseer" / "processed").exists() and "Processing" not in "".join(capfd.readouterr())
    assert not recwarn.list

    # The second time without any host. A file that was cut short is noticed and named.
    monkeypatch.setattr(datasets, "_PLANETOID", (serve(),))
    assert len(load("ego-small").train) == 15
    (cache / "Citeseer" / "raw" / "ind.citeseer.graph").write_bytes(b"short")
    with pytest.raises(
        DataError, match=r"(?s)ind\.citeseer\.graph is not in the cache.*404.*it is damaged.*by hand"
    ):
        load("ego-small")


def test_a_host_that_serves_something_else(monkeypatch, serve, cache):
    wrong = serve(**{name: b"something else" for name in datasets._CITESEER})
    monkeypatch.setattr(datasets, "_PLANETOID", (wrong,))
    with pytest.raises(DataError, match="another sha256"):
        load("ego-small")
    assert not any(path.is_file() for path in cache.rglob("*"))


def test_no_network(monkeypatch):
    monkeypatch.setattr(datasets, "_PLANETOID", ("http://127.0.0.1:9/",))
    with pytest.raises(DataError, match=r"(?s)no host served it.*with a network.*graph6.*needs no download"):
        load("ego-small")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DOWNHILL_DATA", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be stored.*DOWNHILL_DATA"):
        load("ego-small")


def tudataset(path: Path, graphs: list[nx.Graph]) -> bytes:
    """An archive in the format of TUDataset: nodes numbered from 1 over all graphs, edges both ways."""
    union = nx.convert_node_labels_to_integers(nx.disjoint_union_all(graphs), first_label=1)
    graph_of = [k + 1 for k, graph in enumerate(graphs) for _ in graph]
    texts = {
        "A": [f"{u}, {v}" for a, b in union.edges for u, v in ((a, b), (b, a))],
        "graph_indicator": graph_of,
        "graph_labels": [1 + k % 2 for k in range(len(graphs))],
        "node_labels": [1 + k % 3 for k in range(len(graph_of))],
    }
    with zipfile.ZipFile(path, "w") as archive:
        for what, lines in texts.items():
            archive.writestr(f"ENZYMES/ENZYMES_{what}.txt", "".join(f"{line}\n" for line in lines))
    return path.read_bytes()


def test_enzymes_through_tudataset(tmp_path, cache, monkeypatch, serve):
    kept = [nx.cycle_graph(n) for n in (10, 12, 11, 14, 13)]
    isolated = nx.disjoint_union(nx.empty_graph(2), nx.path_graph(10))  # 12 nodes, 10 of them with an edge
    lonely = nx.disjoint_union(nx.path_graph(9), nx.empty_graph(3))  # 9 with an edge: too few
    content = tudataset(tmp_path / "E.zip", [kept[0], lonely, *kept[1:], isolated])
    monkeypatch.setattr(datasets, "_TUDATASETS", (serve(**{"ENZYMES.zip": content}),))
    with pytest.raises(DataError, match=r"ENZYMES\.zip holds other graphs than the benchmark's"):
        load("enzymes")
    expected = GraphBatch.from_networkx([*kept, nx.path_graph(10)])
    monkeypatch.setattr(datasets, "_ENZYMES_SHA256", datasets._digest(expected))
    data = load("enzymes")
    assert [len(data.test), len(data.train), data.max_nodes] == [1, 5, 14]
    assert torch.equal(whole(data).adjacency, expected.adjacency)
    (cache / "ENZYMES" / "ENZYMES.zip").write_bytes(content[:500])
    with pytest.raises(DataError, match=r"ENZYMES\.zip is not the archive"):
        load("enzymes")


# --- the benchmark's files ---------------------------------------------------------------------------

needs_files = pytest.mark.skipif(
    not FILES, reason="DOWNHILL_TEST_GRAPHS names no folder with the benchmark's files"
)


@needs_files
def test_the_benchmark_has_the_seeded_blocks():
    counts = []
    for graph in nx.read_graph6(Path(FILES, "community_small.g6")):
        first, second, links = halves(graph)
        assert set(first.edges) == set(nx.gnp_random_graph(len(first), 0.7, seed=0).edges)
        assert set(second.edges) == set(nx.gnp_random_graph(len(first), 0.7, seed=1).edges)
        counts.append(len(links))
    assert np.bincount(counts).tolist() == [0, 89, 9, 2]


@needs_files
def test_ego_small_is_the_benchmarks(cache):
    shutil.copytree(Path(FILES, "citeseer", "raw"), cache / "Citeseer" / "raw")
    data, file = load("ego-small"), nx.read_graph6(Path(FILES, "ego_small.g6"))
    assert [len(data.test), len(data.train), data.max_nodes] == [40, 160, 17]
    assert all(map(nx.is_isomorphic, whole(data).to_networkx(), file))  # in its order
