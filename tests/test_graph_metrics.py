"""Graph metrics: orbits by hand and by brute force, the protocol against scipy and networkx."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from companion.graphs import (
    GraphBatch,
    connected_share,
    descriptors,
    erdos_renyi_like,
    load,
    mmd,
    mmd_over_draws,
    novelty,
    orbit_counts,
    orbits,
    summary,
    two_blocks,
    uniqueness,
)

DRAWS = os.environ.get(
    "DOWNHILL_TEST_GRAPHS"
)  # a folder with GDSS's benchmark sets as community_small.g6 ...


def random_graphs(count: int, largest: int, seed: int = 0) -> list[nx.Graph]:
    rng = np.random.default_rng(seed)
    return [
        nx.gnp_random_graph(int(rng.integers(1, largest + 1)), float(rng.random()), seed=int(i))
        for i in rng.integers(2**31, size=count)
    ]


def orbits_of(graph: nx.Graph) -> list[list[int]]:
    return orbit_counts(GraphBatch.from_networkx([graph]))[0].tolist()


def row(**counts: int) -> list[int]:
    """A row of orbit counts from o0=..., o14=..."""
    return [counts.get(f"o{k}", 0) for k in range(15)]


# --- orbits ------------------------------------------------------------------------------------------

# A place's number from (edges, degree of the node in the subgraph, sorted degrees of the subgraph).
PLACES = {
    (1, 1, (1, 1)): 0,
    (2, 1, (1, 1, 2)): 1,
    (2, 2, (1, 1, 2)): 2,
    (3, 2, (2, 2, 2)): 3,
    (3, 1, (1, 1, 2, 2)): 4,
    (3, 2, (1, 1, 2, 2)): 5,
    (3, 1, (1, 1, 1, 3)): 6,
    (3, 3, (1, 1, 1, 3)): 7,
    (4, 2, (2, 2, 2, 2)): 8,
    (4, 1, (1, 2, 2, 3)): 9,
    (4, 2, (1, 2, 2, 3)): 10,
    (4, 3, (1, 2, 2, 3)): 11,
    (5, 2, (2, 2, 3, 3)): 12,
    (5, 3, (2, 2, 3, 3)): 13,
    (6, 3, (3, 3, 3, 3)): 14,
}


def brute_force(graph: nx.Graph) -> np.ndarray:
    """Every connected induced subgraph of 2 to 4 nodes, one after the other."""
    a = nx.to_numpy_array(graph, weight=None).astype(int)
    counts = np.zeros((len(a), 15), int)
    for size in (2, 3, 4):
        for nodes in itertools.combinations(range(len(a)), size):
            degrees = a[np.ix_(nodes, nodes)].sum(0)
            for node, degree in zip(nodes, degrees, strict=True):
                # Up to four nodes these three numbers tell connected graphs from all others.
                place = PLACES.get((degrees.sum() // 2, degree, tuple(sorted(degrees))))
                if place is not None:
                    counts[node, place] += 1
    return counts


def test_orbits_by_hand():
    assert orbits_of(nx.complete_graph(3)) == [row(o0=2, o3=1)] * 3
    assert orbits_of(nx.complete_graph(4)) == [row(o0=3, o3=3, o14=1)] * 4
    assert orbits_of(nx.cycle_graph(4)) == [row(o0=2, o1=2, o2=1, o8=1)] * 4
    assert orbits_of(nx.cycle_graph(5)) == [row(o0=2, o1=2, o2=1, o4=2, o5=2)] * 5
    end, inside = row(o0=1, o1=1, o4=1), row(o0=2, o1=1, o2=1, o5=1)
    assert orbits_of(nx.path_graph(4)) == [end, inside, inside, end]
    assert orbits_of(nx.star_graph(4)) == [row(o0=4, o2=6, o7=4)] + [row(o0=1, o1=3, o6=3)] * 4
    tail = nx.Graph([(0, 1), (1, 2), (2, 0), (2, 3)])  # node 3 hangs on the triangle 0, 1, 2
    base = row(o0=2, o1=1, o3=1, o10=1)
    assert orbits_of(tail) == [base, base, row(o0=3, o2=2, o3=1, o11=1), row(o0=1, o1=2, o9=1)]
    diamond = nx.Graph([(0, 1), (1, 2), (2, 0), (1, 3), (2, 3)])
    tip, hub = row(o0=2, o1=2, o3=1, o12=1), row(o0=3, o2=1, o3=2, o13=1)
    assert orbits_of(diamond) == [tip, hub, hub, tip]
    assert orbits_of(nx.empty_graph(3)) == [row()] * 3


def test_orbits_by_brute_force():
    graphs = [*random_graphs(60, 9), nx.grid_2d_graph(4, 5), nx.petersen_graph(), nx.star_graph(8)]
    counts = orbit_counts(GraphBatch.from_networkx(graphs, max_nodes=23)).numpy()
    for graph, found in zip(graphs, counts, strict=True):
        np.testing.assert_array_equal(found[: len(graph)], brute_force(graph))
        assert not found[len(graph) :].any()


def test_orbits_do_not_depend_on_how_a_batch_is_cut(monkeypatch):
    batch = GraphBatch.from_networkx(random_graphs(20, 12, seed=1))
    whole = orbit_counts(batch)
    monkeypatch.setattr(orbits, "_CELLS", 1)
    assert torch.equal(orbit_counts(batch), whole)
    assert orbit_counts(batch[:0]).shape == (0, 12, 15)


def test_orbits_of_large_graphs_with_known_answers():
    counts = orbit_counts(GraphBatch.from_networkx([nx.complete_graph(60)]))
    assert (counts[..., 14] == 59 * 58 * 57 // 6).all() and not counts[..., 4:14].any()
    counts = orbit_counts(GraphBatch.from_networkx([nx.star_graph(120)]))
    assert counts[0, 0, 7] == 120 * 119 * 118 // 6 and (counts[0, 1:, 6] == 119 * 118 // 2).all()
    # K_{m,m}: a 4-cycle through a node is its opposite and two of the other side.
    counts = orbit_counts(GraphBatch.from_networkx([nx.complete_bipartite_graph(70, 70)]))
    assert (counts[..., 8] == 69 * (70 * 69 // 2)).all() and (counts[..., 6] == 70 * 69 * 68 // 2).all()


# --- descriptors -------------------------------------------------------------------------------------


def test_descriptors_are_those_of_networkx_and_numpy():
    graphs = [*random_graphs(40, 15, seed=2), nx.complete_bipartite_graph(3, 4), nx.empty_graph(1)]
    found = descriptors(graphs, spectral=True)
    for k, graph in enumerate(graphs):
        degree = np.array(nx.degree_histogram(graph)) / len(graph)
        np.testing.assert_allclose(found.degree[k, : len(degree)], degree)
        assert not found.degree[k, len(degree) :].any()
        values = list(nx.clustering(graph).values())
        np.testing.assert_allclose(found.cluster[k], np.histogram(values, 100, (0, 1))[0] / len(graph))
        np.testing.assert_allclose(found.orbit[k], brute_force(graph).mean(0))
        laplacian = nx.normalized_laplacian_matrix(graph).toarray()
        # The largest eigenvalue of a bipartite graph is 2, give or take rounding.
        eigenvalues = np.linalg.eigvalsh(laplacian).clip(max=2)
        spectral = np.histogram(eigenvalues, 200, (-1e-5, 2))[0] / len(graph)
        np.testing.assert_allclose(found.spectral[k], spectral)


def test_edgeless_graphs_are_zeros():
    found = descriptors([nx.empty_graph(1), nx.empty_graph(5)], spectral=True)
    assert (found.degree[:, 0] == 1).all() and (found.cluster[:, 0] == 1).all() and not found.orbit.any()
    assert not any(mmd(found, found).values())


def test_descriptors_refuse_what_has_none():
    one = GraphBatch.from_networkx([nx.path_graph(3)])
    with pytest.raises(ValueError, match="no graphs"):
        descriptors([])
    with pytest.raises(ValueError, match="no graphs"):
        uniqueness(one[:0])
    with pytest.raises(ValueError, match="graph 1 of 2 has no nodes"):
        descriptors([nx.path_graph(3), nx.empty_graph(0)])
    with pytest.raises(ValueError, match="other than 0 and 1"):
        descriptors(GraphBatch(one.adjacency * 0.7, one.mask))


# --- the MMD protocol --------------------------------------------------------------------------------


def by_definition(a: list[nx.Graph], b: list[nx.Graph]) -> dict[str, float]:
    """The protocol pair by pair, W1 by scipy."""
    bins = range(100)

    def kernel(x: nx.Graph, y: nx.Graph) -> np.ndarray:
        degrees = [list(dict(g.degree).values()) for g in (x, y)]
        clusters = [np.histogram(list(nx.clustering(g).values()), 100, (0, 1))[0] for g in (x, y)]
        orbits = [brute_force(g).mean(0) for g in (x, y)]
        w = wasserstein_distance(*degrees), wasserstein_distance(bins, bins, *clusters) / 100 / 0.1
        square = ((orbits[0] - orbits[1]) ** 2).sum()
        return np.exp([-(w[0] ** 2) / 2, -(w[1] ** 2) / 2, -square / (2 * 30**2)])

    def mean(p: list[nx.Graph], q: list[nx.Graph]) -> np.ndarray:
        return np.mean([kernel(x, y) for x in p for y in q], 0)

    values = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    return dict(zip(("degree", "cluster", "orbit"), values, strict=True)) | {"mean": values.mean()}


def test_mmd_is_the_protocol_written_out():
    # Different largest sizes, so that histograms of different lengths meet.
    a, b = random_graphs(6, 6, seed=3), [*random_graphs(5, 4, seed=4), nx.star_graph(7)]
    found = mmd(descriptors(a), descriptors(b))
    assert found == pytest.approx(by_definition(a, b), rel=1e-9)
    assert mmd(descriptors(b), descriptors(a)) == pytest.approx(found, rel=1e-9)
    assert set(mmd(descriptors(a, spectral=True), descriptors(b, spectral=True))) == {*found, "spectral"}


def test_mmd_of_single_graphs_by_hand():
    # Two nodes with and without their edge: degrees all 1 against all 0, W = 1; the same clustering.
    found = mmd(descriptors([nx.path_graph(2)]), descriptors([nx.empty_graph(2)]))
    assert found["degree"] == pytest.approx(2 - 2 * np.exp(-0.5)) and found["cluster"] == 0
    assert found["orbit"] == pytest.approx(2 - 2 * np.exp(-1 / (2 * 30**2)))
    # A triangle against a path of three: clustering all in the last bin against all in the first, 99 bins.
    found = mmd(descriptors([nx.complete_graph(3)]), descriptors([nx.path_graph(3)]))
    assert found["cluster"] == pytest.approx(2 - 2 * np.exp(-(9.9**2) / 2))
    spectra = (
        descriptors([nx.complete_graph(3)], spectral=True),
        descriptors([nx.path_graph(3)], spectral=True),
    )
    # Eigenvalues 0, 1.5, 1.5 against 0, 1, 2: bins 0, 149, 149 against 0, 99, 199, W = 100 / 3.
    assert mmd(*spectra)["spectral"] == pytest.approx(2 - 2 * np.exp(-((100 / 3) ** 2) / 2))


def test_mmd_does_not_see_labels_and_order(rng):
    graphs = random_graphs(12, 10, seed=5)
    adjacencies = [nx.to_numpy_array(graph) for graph in graphs]
    orders = [torch.randperm(len(a), generator=rng).numpy() for a in adjacencies]
    shuffled = [nx.from_numpy_array(a[o][:, o]) for a, o in zip(adjacencies, orders, strict=True)][::-1]
    a, b = descriptors(graphs, spectral=True), descriptors(GraphBatch.from_networkx(shuffled, max_nodes=17))
    assert mmd(a, b) == pytest.approx({"degree": 0, "cluster": 0, "orbit": 0, "mean": 0}, abs=1e-12)


def test_mmd_over_draws(rng):
    a, b = descriptors(random_graphs(15, 10, seed=6)), descriptors(random_graphs(7, 10, seed=7))
    whole = mmd_over_draws(a, b, draw_size=15, n_draws=2, generator=rng)
    assert {k: v.tolist() for k, v in whole.items()} == {
        k: pytest.approx([v] * 2) for k, v in mmd(a, b).items()
    }
    state = rng.get_state()
    found = mmd_over_draws(a, b, draw_size=4, n_draws=3, generator=rng)
    rng.set_state(state)
    for k in range(3):
        rows = torch.randperm(15, generator=rng)[:4]
        one = mmd(a.subset(rows), b)
        assert one == pytest.approx({name: float(v[k]) for name, v in found.items()}, rel=1e-9)
    with pytest.raises(ValueError, match="cannot draw 16 of 15"):
        mmd_over_draws(a, b, 16, 1, rng)


def test_mmd_tells_structure_from_none(rng):
    # The bands are wide: at 60 graphs the degree of noise is about .01 (seed 0).
    train, fresh = two_blocks(60, True, rng), two_blocks(60, True, rng)
    blocks, independent = two_blocks(60, False, rng), erdos_renyi_like(train, generator=rng)
    floor, unseeded, er = (
        mmd(descriptors(g), descriptors(train))["mean"] for g in (fresh, blocks, independent)
    )
    assert floor < 0.06 < unseeded < 0.25 < er


# --- counts of graphs --------------------------------------------------------------------------------


def test_uniqueness_and_novelty_are_up_to_isomorphism():
    path, relabelled = nx.path_graph(4), nx.Graph([(2, 0), (0, 3), (3, 1)])
    assert uniqueness([path, relabelled, nx.cycle_graph(4), nx.star_graph(3)]) == 0.75
    assert (
        novelty([path, relabelled, nx.cycle_graph(4)], [nx.Graph([("b", "a"), ("b", "c"), ("c", "d")])])
        == 1 / 3
    )
    assert novelty([nx.path_graph(5)], [path]) == 1.0
    # The same orbit counts at every node, but not the same graph: two cycles of five and one of ten.
    pair = nx.disjoint_union(nx.cycle_graph(5), nx.cycle_graph(5))
    assert uniqueness([pair, nx.cycle_graph(10)]) == 1.0 and novelty([pair], [nx.cycle_graph(10)]) == 1.0


def test_uniqueness_is_networkx_own():
    graphs = random_graphs(60, 5, seed=8)
    classes: list[nx.Graph] = []
    for graph in graphs:
        if not any(nx.is_isomorphic(graph, known) for known in classes):
            classes.append(graph)
    assert 1 < len(classes) < 60 and uniqueness(graphs) == len(classes) / 60
    train = graphs[:20]
    new = [g for g in graphs[20:] if not any(nx.is_isomorphic(g, known) for known in train)]
    assert novelty(graphs[20:], train) == len(new) / 40


def test_connected_share():
    graphs = random_graphs(50, 8, seed=9) + [nx.path_graph(30), nx.empty_graph(1), nx.empty_graph(2)]
    assert connected_share(graphs) == pytest.approx(np.mean([nx.is_connected(g) for g in graphs]))


def test_summary(rng):
    graphs, train, test = two_blocks(10, True, rng), two_blocks(10, True, rng), two_blocks(5, True, rng)
    found = summary(graphs, train, test)
    assert mmd(descriptors(graphs), descriptors(test)).items() <= found.items()
    assert found["novelty"] == novelty(graphs, train) and found["uniqueness"] == uniqueness(graphs)
    assert found["connected"] == 1 and found["nodes"] == pytest.approx(graphs.sizes.double().mean())
    density = np.mean([nx.density(g) for g in graphs.to_networkx()])
    assert found["density"] == pytest.approx(density) and 20 < found["edges"] < 65


# --- the benchmark's files ---------------------------------------------------------------------------


@pytest.mark.skipif(
    not DRAWS, reason="DOWNHILL_TEST_GRAPHS names no folder with the benchmark's graph6 files"
)
@pytest.mark.parametrize(
    ("name", "whole"),
    [("community_small", (0.003, 0.009, 0.001)), ("ego_small", (0.014, 0.027, 0.004))],
)
def test_reference_points_of_the_benchmark(name, whole):
    data = load(Path(DRAWS, f"{name}.g6"))
    found = mmd(descriptors(data.train), descriptors(data.test))
    assert (round(found["degree"], 3), round(found["cluster"], 3), round(found["orbit"], 3)) == whole
