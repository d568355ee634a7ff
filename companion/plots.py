"""The book's figures in one style.

Colours are Okabe and Ito's, which colour-blind readers tell apart, always with a second cue (marker, dash
or label); backgrounds are white, so that a figure reads the same in the page's light and dark mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from companion.energies import Energy

if TYPE_CHECKING:
    import networkx

__all__ = [
    "COLOURS",
    "autocorrelations",
    "band",
    "energy_paths",
    "graph_row",
    "image_grid",
    "landscape",
    "use_style",
]

#: Okabe & Ito 2008: blue, vermilion, green, orange, sky, purple, black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def use_style() -> None:
    """Set matplotlib's defaults to the book's; called once in a chapter's set-up cell."""
    plt.rcParams.update(
        {
            "axes.prop_cycle": plt.cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.titlesize": 10,
            "axes.labelsize": 10,
            "figure.dpi": 110,
            "savefig.dpi": 110,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "figure.constrained_layout.use": True,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "lines.linewidth": 1.6,
        }
    )


def landscape(
    ax: Axes,
    energy: Energy,
    extent: float | tuple[float, float, float, float] = 3.0,
    *,
    temperature: float = 1.0,
    path: Tensor | None = None,
    samples: Tensor | None = None,
    resolution: int = 121,
) -> None:
    """Contours of exp(-(E - min E)/T) on a square of R^2, with samples ``(n, 2)`` and chains on it.

    ``extent`` is half the side, or (left, right, bottom, top); ``path`` is ``(records, chains, 2)``, each
    chain drawn as a line with its start marked.
    """
    if isinstance(extent, int | float):
        extent = (-extent, extent, -extent, extent)
    xs, ys = (np.linspace(a, b, resolution) for a, b in (extent[:2], extent[2:]))
    points = torch.from_numpy(np.stack(np.meshgrid(xs, ys), -1)).float()
    with torch.no_grad():
        values = energy(points.reshape(-1, 2)).reshape(resolution, resolution) / temperature
    density = (values.min() - values).exp().numpy()
    ax.contourf(xs, ys, density, levels=np.linspace(0.02, 1.001, 9), cmap="Greys", alpha=0.75)
    if samples is not None:
        ax.scatter(*samples.cpu().T.numpy(), s=3, color=COLOURS[0], alpha=0.5, linewidths=0, rasterized=True)
    if path is not None:
        for i, chain in enumerate(path.cpu().transpose(0, 1).numpy()):
            colour = COLOURS[i % len(COLOURS)]
            ax.plot(*chain.T, color=colour, lw=0.8, alpha=0.8)
            ax.plot(*chain[0], marker=_MARKERS[i % len(_MARKERS)], color=colour, ms=7, mec="white")
    ax.set(xlim=extent[:2], ylim=extent[2:], aspect="equal", xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)


def image_grid(ax: Axes, images: Tensor, columns: int, title: str | None = None) -> None:
    """Images ``(n, C, H, W)`` in [-1, 1] as one picture, ``columns`` to a row, hairlines between them."""
    images = ((images.detach().float().cpu().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1)  # (n, H, W, C)
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    sheet = torch.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 0.5)
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image
    ax.imshow(sheet.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    if title is not None:
        ax.set_title(title, fontsize=8, loc="left")
    ax.axis("off")


def graph_row(axes: Sequence[Axes], graphs: Sequence[networkx.Graph], title: str | None = None) -> None:
    """One graph to an axes, nodes placed by a spring layout with a fixed seed; ``title`` over the first."""
    import networkx

    for ax, graph in zip(axes, graphs, strict=True):
        place = networkx.spring_layout(graph, seed=0, iterations=100)
        networkx.draw_networkx_edges(graph, place, ax=ax, width=0.8, edge_color="0.5")
        networkx.draw_networkx_nodes(graph, place, ax=ax, node_size=18, node_color=COLOURS[0])
        ax.axis("off")
    if title is not None:
        axes[0].set_title(title, fontsize=9, loc="left")


def band(ax: Axes, x: Sequence[float], rows: Sequence[Sequence[float]], label: str, index: int = 0) -> None:
    """Mean over seeds with a band of one standard deviation: ``rows`` holds a list of seeds for each x."""
    values = np.asarray(rows, dtype=float)  # (len(x), seeds)
    mean, colour = values.mean(1), COLOURS[index % len(COLOURS)]
    ax.plot(x, mean, marker=_MARKERS[index % len(_MARKERS)], ms=4, color=colour, label=label)
    if values.shape[1] > 1:
        spread = values.std(1, ddof=1)
        ax.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)


def energy_paths(
    ax: Axes, steps: Sequence[int], paths: Mapping[str, Tensor], reference: tuple[float, float] | None = None
) -> None:
    """Mean energy along chains, a line each of ``{label: (records, chains)}``, with their quartiles.

    ``reference`` is the mean and standard deviation of the data's energies, drawn as a grey band.
    """
    if reference is not None:
        mean, sd = reference
        ax.axhspan(mean - sd, mean + sd, color="0.85", label="data, mean and one sd")
    for i, (label, values) in enumerate(paths.items()):
        quartiles = torch.quantile(values.double().cpu(), torch.tensor([0.25, 0.75]).double(), dim=1)
        colour = COLOURS[i % len(COLOURS)]
        ax.plot(steps, values.double().mean(1).cpu(), color=colour, label=label)
        ax.fill_between(steps, *quartiles.numpy(), color=colour, alpha=0.2, linewidth=0)
    ax.set(xlabel="Langevin steps", ylabel="energy $E$")


def autocorrelations(ax: Axes, curves: Mapping[str, Tensor], length: int) -> None:
    """Autocorrelation at lags 1.., a line each of ``{label: (lags + 1,)}``, with white noise's 95 % band."""
    ax.axhspan(-1.96 / length**0.5, 1.96 / length**0.5, color="0.85", label="white noise, 95 %")
    for i, (label, values) in enumerate(curves.items()):
        lags = range(1, len(values))
        ax.plot(lags, values[1:].cpu(), marker=_MARKERS[i % len(_MARKERS)], ms=4, label=label)
    ax.set(xlabel="lag (updates)", ylabel="autocorrelation of $d_t$")
