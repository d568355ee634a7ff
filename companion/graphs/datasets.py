"""Graph data sets by name or path: the benchmark sets of EDP-GNN (Niu et al. 2020) and GDSS (Jo et al. 2022).

========================  =============================================================================
community-small           100 graphs of two communities; the blocks are **seeded**, so that each of the
                          five sizes has one pair of blocks and only size and bridges are random
community-small-unseeded  the same with fresh blocks in every graph, where memorising blocks is no use
ego-small                 200 neighbourhoods in the citation graph Citeseer, 4 to 18 nodes
grid                      100 grids with sides from 10 to 19
enzymes                   587 protein graphs of TUDataset's ENZYMES with at least 10 nodes
========================  =============================================================================

The first 20 % are the test split and the rest trains, in order, as in both papers. The community and grid
sets are generated here, seed 0. The released recipes leave the seed open: these are draws of the same laws as
the benchmark's files, not those files. ego-small and enzymes are the benchmark's graphs in its order; their
raw data are downloaded once into :func:`companion.data.cache_dir`, and their checksums looked at each time.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import os
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from companion.data import DataError, cache_dir
from companion.graphs._planetoid import read_edges
from companion.graphs.batch import GraphBatch

__all__ = ["GraphDataset", "ego_graphs", "erdos_renyi_like", "load", "two_blocks"]

_ROUNDS = 2  # how often the list of mirrors is gone through
_PAUSE = 2.0  # seconds between the rounds
_TIMEOUT = (10.0, 60.0)  # seconds to connect, seconds without a byte

_PLANETOID = (
    "https://github.com/kimiyoung/planetoid/raw/master/data/",
    "https://raw.githubusercontent.com/kimiyoung/planetoid/master/data/",
)
# Of the release's eight files the one that holds the citations; the others are about the papers' words.
_CITESEER = {"ind.citeseer.graph": "d79a4ef9d3e7169aee8946145f6b7306e35bc79bffad26346cfb94e10e9912a7"}
_TUDATASETS = ("https://www.chrsmrrs.com/graphkerneldatasets/",)
_ENZYMES_FILES = ("A", "graph_indicator", "graph_labels", "node_labels")
_MAX_TEXT = 64 * 2**20  # bytes of one of them, unpacked; the largest has 2 MB
# Of the graphs (_digest), not of the archive, which the host packs as it likes.
_ENZYMES_SHA256 = "ab0c4fb466d6323358b4257e073e4305cf33a77123093857cc33e04b985bb088"


@dataclass(frozen=True, eq=False)
class GraphDataset:
    """Graphs and where they come from.

    ``train``, ``test``: batches padded to one N, that of the largest graph of both; ``source``: one line for
    a caption.
    """

    name: str
    train: GraphBatch
    test: GraphBatch
    source: str

    @property
    def max_nodes(self) -> int:
        """N, the number of nodes that both splits are padded to."""
        return self.train.mask.shape[1]


def load(name_or_path: str | os.PathLike[str] = "community-small") -> GraphDataset:
    """A graph data set by name, or a local graph6 file (``.g6``, one graph a line) by path.

    A name wins over a file of that name in the working directory: write ``./grid`` for the file.

    Raises :class:`companion.data.DataError`, a ``ValueError``, for an unknown name, a file that no host
    serves, a wrong checksum, and a file that is no graph6; it names the file and the remedy.
    """
    if name_or_path in _NAMES:
        batch, source = _NAMES[str(name_or_path)]()
        return _dataset(str(name_or_path), batch, source)
    path = Path(name_or_path).expanduser()
    if not str(name_or_path) or not path.is_file():
        near = difflib.get_close_matches(str(name_or_path).lower().replace("_", "-"), _NAMES, n=1)
        raise DataError(
            f"{str(name_or_path)!r} is neither a graph data set nor a file."
            + (f" Did you mean {near[0]!r}?" if near else "")
            + f" Known: {', '.join(_NAMES)}; or the path of a graph6 file."
        )
    # The file's name only: this line goes into captions and records, where nobody's home directory belongs.
    return _dataset(path.name.split(".")[0], _read_graph6(path), f"{path.name} (local, graph6)")


def two_blocks(n_graphs: int, seeded: bool = True, generator: torch.Generator | None = None) -> GraphBatch:
    """Graphs of two communities: the recipe of community-small.

    K uniform on {12, ..., 20}; two blocks G(s, .7), s = K // 2; each pair across is linked with probability
    .1 / s, and the first nodes of the two if none is. ``seeded``: the blocks are networkx's
    ``gnp_random_graph(s, .7, seed=0)`` and ``seed=1``, as in the release, always the same for one s; or else
    each graph's blocks are drawn anew. A block that falls apart counts as several: every two components get
    their link, and a graph is always connected.
    Niu et al. 2020 as released (``n_community`` with ``p_inter`` .05); batch of at most 20 nodes.
    """
    import networkx

    device = generator.device if generator is not None else None

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device).cpu()

    graphs = []
    for _ in range(n_graphs):
        s = int(torch.randint(12, 21, (), generator=generator, device=device)) // 2
        if seeded:
            blocks = [networkx.gnp_random_graph(s, 0.7, seed=seed) for seed in (0, 1)]
        else:
            blocks = [networkx.empty_graph(s) for _ in range(2)]
            for block in blocks:
                block.add_edges_from((uniform(s, s) < 0.7).triu(1).nonzero().tolist())
        graph = networkx.disjoint_union_all(blocks)
        parts = [sorted(part) for part in networkx.connected_components(graph)]
        for k, first in enumerate(parts):
            for second in parts[k + 1 :]:
                links = (uniform(len(first), len(second)) < 0.1 / s).nonzero().tolist() or [(0, 0)]
                graph.add_edges_from((first[i], second[j]) for i, j in links)
        graphs.append(graph)
    return GraphBatch.from_networkx(graphs)


def erdos_renyi_like(
    graphs: GraphBatch, n_graphs: int | None = None, generator: torch.Generator | None = None
) -> GraphBatch:
    """Independent edges with the number of nodes and the density of given graphs: the control that knows no
    structure.

    One for each graph, in order; or ``n_graphs``, each after a graph drawn at random. Nodes without an edge
    stay in: pass the result through :func:`companion.graphs.threshold` to treat it as samples are treated.
    Raises ``ValueError`` for an empty batch.
    """
    if len(graphs) == 0:
        raise ValueError("no graphs to copy sizes and densities from")
    device = generator.device if generator is not None else None
    if n_graphs is not None:
        rows = torch.randint(len(graphs), (n_graphs,), generator=generator, device=device)
        graphs = graphs.subset(rows.to(graphs.mask.device))
    n = graphs.sizes.cpu()
    density = graphs.n_edges.cpu() / (n * (n - 1) / 2).clamp(min=1)
    u = torch.rand(graphs.adjacency.shape, generator=generator, device=device).cpu()
    mask = graphs.mask.cpu()
    edges = (u < density.view(-1, 1, 1)) & mask.unsqueeze(2) & mask.unsqueeze(1)
    upper = edges.triu(1).to(graphs.adjacency.dtype)
    return GraphBatch(upper + upper.mT, mask).to(graphs.mask.device)


def ego_graphs(
    edges: Tensor, n_nodes: int, min_nodes: int = 4, max_nodes: int = 18, n_graphs: int | None = 200
) -> GraphBatch:
    """The recipe of ego-small on a graph given by its edges, (2, M) int64, in one or both directions.

    Nodes are gone through in order; the neighbourhood of each node of the largest component, the node
    included, is taken if it has ``min_nodes`` to ``max_nodes`` nodes, until there are ``n_graphs``.
    Self-loops are left out. Niu et al. 2020 as released (``citeseer_ego``, radius 1).
    """
    import networkx

    graph = networkx.empty_graph(n_nodes)
    graph.add_edges_from(edges[:, edges[0] != edges[1]].T.tolist())
    egos = []
    for centre in sorted(max(networkx.connected_components(graph), key=len)):
        if min_nodes <= graph.degree(centre) + 1 <= max_nodes and (n_graphs is None or len(egos) < n_graphs):
            near = sorted([centre, *graph[centre]])
            places = {node: i for i, node in enumerate(near)}
            links = [(places[u], places[v]) for u, v in graph.subgraph(near).edges()]
            egos.append((links, len(near)))
    return GraphBatch.from_edges([links for links, _ in egos], [n for _, n in egos])


def _community(seeded: bool) -> tuple[GraphBatch, str]:
    batch = two_blocks(100, seeded, torch.Generator().manual_seed(0))
    what = "blocks seeded as released" if seeded else "fresh blocks in every graph"
    return batch, f"two communities by the recipe of Niu et al. 2020, {what}; own draw, seed 0"


def _grid() -> tuple[GraphBatch, str]:
    import networkx

    sides = torch.randint(10, 20, (100, 2), generator=torch.Generator().manual_seed(0))
    batch = GraphBatch.from_networkx([networkx.grid_2d_graph(m, n) for m, n in sides.tolist()])
    return batch, "grids with sides 10 to 19 by the recipe of Jo et al. 2022; own draw, seed 0"


def _ego_small() -> tuple[GraphBatch, str]:
    folder = cache_dir() / "Citeseer" / "raw"
    (path,) = (_fetch(folder, file, _PLANETOID, sha256) for file, sha256 in _CITESEER.items())
    try:
        edges, n_nodes = read_edges(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not Citeseer's graph: {error}. Delete it and load again.") from error
    batch = ego_graphs(edges, n_nodes)
    return batch, "ego-small: Citeseer (Sen et al. 2008), Planetoid release, by the recipe of Niu et al. 2020"


def _enzymes() -> tuple[GraphBatch, str]:
    folder = cache_dir() / "ENZYMES"
    archive = _fetch(folder, "ENZYMES.zip", _TUDATASETS, None)
    remedy = "Delete it and load again to fetch it anew."
    with tempfile.TemporaryDirectory() as unpacked:
        files = []
        try:
            with zipfile.ZipFile(archive) as held:
                for what in _ENZYMES_FILES:
                    member = held.getinfo(f"ENZYMES/ENZYMES_{what}.txt")
                    if member.file_size > _MAX_TEXT:
                        raise zipfile.BadZipFile(f"{member.filename} unpacks to {member.file_size} bytes")
                    files.append(Path(unpacked, f"ENZYMES_{what}.txt"))
                    files[-1].write_bytes(held.read(member))
        except Exception as error:  # by the damage BadZipFile, KeyError, zlib.error, EOFError, OSError ...
            raise DataError(f"{archive} is not the archive of ENZYMES ({error}). {remedy}") from error
        with _processed("ENZYMES", files) as data:
            graphs = [_without_isolated(graph.edge_index) for graph in data]
    kept = [(edges, n) for edges, n in graphs if n >= 10]
    batch = GraphBatch.from_edges([edges for edges, _ in kept], [n for _, n in kept])
    if _digest(batch) != _ENZYMES_SHA256:
        raise DataError(
            f"{archive} holds other graphs than the benchmark's. {remedy} If it happens again, the host has "
            "changed its data: pass the path of a graph6 file."
        )
    return batch, "ENZYMES (Borgwardt et al. 2005), TUDataset release, at least 10 nodes, none isolated"


_NAMES = {
    "community-small": lambda: _community(seeded=True),
    "community-small-unseeded": lambda: _community(seeded=False),
    "ego-small": _ego_small,
    "grid": _grid,
    "enzymes": _enzymes,
}


def _without_isolated(edges: Tensor) -> tuple[Tensor, int]:
    """Edges (2, M) between nodes renumbered 0..n-1 in their order, as (M, 2), and n."""
    nodes, renumbered = edges.unique(return_inverse=True)
    return renumbered.T, len(nodes)


def _digest(batch: GraphBatch) -> str:
    """The sha256 of a batch: of its sizes and its adjacency as bytes of 0 and 1."""
    sizes, adjacency = batch.sizes.numpy().astype("<i8"), batch.adjacency.to(torch.uint8).numpy()
    return hashlib.sha256(sizes.tobytes() + adjacency.tobytes()).hexdigest()


def _dataset(name: str, batch: GraphBatch, source: str) -> GraphDataset:
    cut = len(batch) // 5
    return GraphDataset(name, train=batch[cut:], test=batch[:cut], source=source)


def _read_graph6(path: Path) -> GraphBatch:
    import networkx

    lines = path.read_bytes().removeprefix(b">>graph6<<").split()
    graphs = []
    for k, line in enumerate(lines):
        try:
            graphs.append(networkx.from_graph6_bytes(line))
        except (networkx.NetworkXError, ValueError, IndexError) as error:
            raise DataError(
                f"{path}: line {k + 1} is no graph6 ({error}). Write one graph a line, with "
                "networkx.to_graph6_bytes(graph, header=False)."
            ) from error
        if len(graphs[-1]) == 0:
            raise DataError(f"{path}: the graph of line {k + 1} has no nodes. Leave it out.")
    if len(graphs) < 5:
        raise DataError(
            f"{path} holds {len(graphs)} graphs; five are needed to set a fifth aside for the test."
        )
    return GraphBatch.from_networkx(graphs)


@contextlib.contextmanager
def _processed(name: str, files: Sequence[Path]) -> Iterator[Sequence]:
    """torch_geometric's ``TUDataset`` of raw text ``files``, processed anew in a folder of its own.

    It keeps what it made of the raw files beside them, reads that without looking at the raw files again and
    stumbles over one that was cut short. A second's work is not worth that.
    """
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # of optional accelerators: nothing to act on
        from torch_geometric import datasets

        with tempfile.TemporaryDirectory() as root:
            raw = Path(root, name, "raw")
            raw.mkdir(parents=True)
            for file in files:
                shutil.copyfile(file, raw / file.name)
            yield datasets.TUDataset(root, name)


def _fetch(folder: Path, file: str, mirrors: Sequence[str], sha256: str | None) -> Path:
    """The path of one official file in ``folder``, downloaded if it is not there; its sha256 is checked.

    As in :mod:`companion.data`: whatever interrupts it, the folder holds the whole file or none.
    """
    import pooch
    from requests import RequestException

    stale, left, failures = (folder / file).exists(), list(mirrors), {}
    for last in (False,) * (_ROUNDS - 1) + (True,):
        for mirror in tuple(left):
            downloader = pooch.HTTPDownloader(timeout=_TIMEOUT, progressbar=sys.stderr.isatty())
            try:
                known = {"known_hash": sha256 and f"sha256:{sha256}", "fname": file, "path": folder}
                return Path(pooch.retrieve(mirror + file, downloader=downloader, **known))
            except RequestException as error:
                status = getattr(error.response, "status_code", None)
                reason = str(error).rsplit(": ", 1)[-1].strip("()'\"")
                failures[mirror] = f"HTTP status {status}" if status else f"{type(error).__name__}, {reason}"
            except ValueError:
                failures[mirror] = "what it served has another sha256"
                left.remove(mirror)  # it would serve the same again
            except OSError as error:
                raise DataError(
                    f"{folder / file} cannot be stored ({error}). Free some space, or set DOWNHILL_DATA to "
                    "a directory with room that you may write to."
                ) from error
        if left and not last:
            time.sleep(_PAUSE)
    raise DataError(
        f"{file} is not in the cache and no host served it:\n"
        + "".join(f"  {mirror}{file}: {why}\n" for mirror, why in failures.items())
        + (f"({folder / file} exists but has another sha256: it is damaged.)\n" if stale else "")
        + f"Try again with a network; or put the file{f', sha256 {sha256},' if sha256 else ''} into {folder} "
        "by hand; or pass the path of a graph6 file; or take 'community-small', which needs no download."
    )
