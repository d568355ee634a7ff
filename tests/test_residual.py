"""The residual study at tiny size: shapes, augmentation, arms, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from companion.classifiers import Recipe, recipe
from companion.data import Dataset
from companion.residual import PlainResNet, augment, residual_study, train_residual


@pytest.fixture
def images(rng):
    x = torch.rand(60, 3, 16, 16, generator=rng) * 2 - 1
    y = torch.arange(60) % 4
    return Dataset("tiny", x[:40], y[:40], x[40:50], y[40:50], x[50:], y[50:], 256, tuple("abcd"), "noise")


def test_augmentation_crops_and_flips_each_image_by_itself(rng):
    x = torch.arange(16.0).expand(200, 1, 16, 16).contiguous()  # the value is the column
    out = augment(x, rng, pad=2)
    assert out.shape == x.shape
    middle = out[:, 0, 8, 6:10]
    steps = middle.diff(dim=1)[:, 0]
    assert set(steps.tolist()) == {-1.0, 1.0}  # flipped or not
    assert len(set(middle[steps > 0][:, 0].tolist())) == 5  # offsets -2 to 2
    assert torch.equal(out[:, :, 0], out[:, :, 15])  # columns alone were seen


def test_every_arm_runs_and_seeds_start_alike(images):
    arms = {
        "erm": [0.05, 1e-4],
        "amp": [0.05, 1e-4, 0.3, 1.0],
        "smoothing": [0.05, 1e-4],
        "sam": [0.05, 1e-4, 0.1],
    }
    size = dict(seeds=2, epochs=1, batch=20, width=4, size=30, device="cpu")
    out = residual_study(images, arms, ascent=5, **size)
    for row in out.values():
        assert set(row) == {"error", "nll", "ece", "seconds"} and all(len(v) == 2 for v in row.values())
    again = residual_study(images, {"amp": [0.05, 1e-4, 0.0, 1.0]}, ascent=None, **size)
    assert again["amp"]["nll"] == out["erm"]["nll"]  # without a radius AMP is ERM


def test_what_has_no_arm_is_refused(images, rng):
    net = PlainResNet(3, 4, 4)
    with pytest.raises(ValueError, match="no flooding, MixUp or averaging"):
        train_residual(images.x_train, images.y_train, net, recipe("mixup", [0.1, 0.0, 1.0], 1), rng)
    with pytest.raises(ValueError, match="do not fill a batch"):
        train_residual(images.x_train, images.y_train, net, Recipe(1, batch=100), rng)
