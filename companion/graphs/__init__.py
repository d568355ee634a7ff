"""Graphs: data sets, the energy and its training, sampling, and the metrics of generated graphs.

networkx and torch_geometric are imported by the functions that need them: importing this package costs
what torch costs.
"""

from companion.graphs.batch import GraphBatch, check, pair_mask, threshold
from companion.graphs.datasets import GraphDataset, ego_graphs, erdos_renyi_like, load, two_blocks
from companion.graphs.goodness import stein_test
from companion.graphs.metrics import (
    Descriptors,
    connected_share,
    descriptors,
    mmd,
    mmd_over_draws,
    novelty,
    summary,
    uniqueness,
)
from companion.graphs.network import GraphCritic, GraphEnergy, mirror, upper
from companion.graphs.orbits import orbit_counts
from companion.graphs.sampling import Generated, annealed_langevin, generate
from companion.graphs.training import (
    GraphRun,
    critic_loss,
    denoising_loss,
    dsm_loss,
    graph_run,
    model_loss,
    scaled_score,
    train,
)

__all__ = [
    "Descriptors",
    "Generated",
    "GraphBatch",
    "GraphCritic",
    "GraphDataset",
    "GraphEnergy",
    "GraphRun",
    "annealed_langevin",
    "check",
    "connected_share",
    "critic_loss",
    "denoising_loss",
    "descriptors",
    "dsm_loss",
    "ego_graphs",
    "erdos_renyi_like",
    "generate",
    "graph_run",
    "load",
    "mirror",
    "mmd",
    "mmd_over_draws",
    "model_loss",
    "novelty",
    "orbit_counts",
    "pair_mask",
    "scaled_score",
    "stein_test",
    "summary",
    "threshold",
    "train",
    "two_blocks",
    "uniqueness",
    "upper",
]
