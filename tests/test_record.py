"""Recorded figures, devices, and the figures' style."""

from __future__ import annotations

import math

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch

from companion import energies, plots, record


def test_several_values_become_mean_spread_and_count(capsys):
    assert record.record("fd", [1.0, 2.0, 6.0]) is None  # as a cell's last line it must show nothing
    printed = dict(line.split(" = ") for line in capsys.readouterr().out.splitlines())
    assert (
        float(printed["fd"]) == 3.0
        and printed["fd_n"] == "3"
        and float(printed["fd_sd"]) == pytest.approx(math.sqrt(7), rel=1e-3)
    )
    record.record("one", torch.tensor(2.5))
    assert capsys.readouterr().out == "one = 2.5\n"
    record.record("single", [4.0])  # one run has no spread
    assert "single_sd" not in capsys.readouterr().out


@pytest.mark.parametrize("value", [math.nan, [1.0, math.inf], []])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="bad"):
        record.record("bad", value)


def test_a_missing_gpu_is_an_error_not_a_fallback():
    if torch.cuda.is_available():
        assert record.pick_device().type == "cuda"
    else:
        assert record.pick_device() == torch.device("cpu")
        with pytest.raises(RuntimeError, match="sees no GPU"):
            record.pick_device("cuda")


def test_environment_is_complete():
    found = record.environment("cpu")
    assert found["device"].startswith("cpu (") and found["peak_memory_mb"] > 50
    assert found["versions"]["torch"] == torch.__version__


def test_figures_draw(rng):
    """Every plot on real shapes; the sheet of images is laid out as promised."""
    plots.use_style()
    ring = energies.GaussianMixture.ring()
    fig, axes = plt.subplots(1, 5)
    plots.landscape(axes[0], ring, samples=ring.sample(9, rng), path=torch.randn(5, 3, 2, generator=rng))
    plots.band(axes[1], [1, 2], [[1.0, 2.0], [3.0, 5.0]], "two seeds")
    plots.energy_paths(axes[2], [1, 2, 3], {"a": torch.randn(3, 7, generator=rng)}, (0.0, 1.0))
    plots.autocorrelations(axes[3], {"a": torch.ones(6)}, 100)
    images = torch.stack([torch.full((1, 4, 3), v) for v in (-1.0, 0.0, 1.0)])
    plots.image_grid(axes[4], images, columns=2)
    sheet = axes[4].images[0].get_array()
    assert sheet.shape == (9, 7)
    assert sheet[0, 0] == 0.0 and sheet[0, 4] == 0.5 and sheet[5, 0] == 1.0
    assert axes[1].lines[0].get_ydata().tolist() == [1.5, 4.0]
    fig.canvas.draw()
    plt.close(fig)
