"""Calibration measures against their definitions and against classifiers of known calibration."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from companion.calibration import calibration_error, error_rate, hard_nll, reliability


def logits_of(confidence, answer, classes=4):
    """Logits whose largest probability is ``confidence``, at ``answer``; the rest shared evenly."""
    rest = (1 - confidence) / (classes - 1)
    p = rest.unsqueeze(-1).expand(*confidence.shape, classes).clone()
    return p.scatter(-1, answer.unsqueeze(-1), confidence.unsqueeze(-1)).log()


def test_error_and_nll_are_the_usual_ones_for_one_and_many_models(rng):
    logits = torch.randn(3, 50, 4, generator=rng)
    labels = torch.randint(4, (50,), generator=rng)
    own = torch.stack([labels, labels.flip(0), labels.roll(1)])
    for s in range(3):
        expected = F.cross_entropy(logits[s].double(), labels)
        torch.testing.assert_close(hard_nll(logits, labels)[s], expected)
        torch.testing.assert_close(hard_nll(logits, own)[s], F.cross_entropy(logits[s].double(), own[s]))
        assert error_rate(logits, labels)[s] == (logits[s].argmax(1) != labels).double().mean()


def test_ece_by_hand():
    confidence = torch.tensor([0.95, 0.91, 0.55, 0.57]).double()
    labels = torch.tensor([0, 1, 0, 0])
    logits = logits_of(confidence, torch.tensor([0, 0, 0, 1]))
    # Two of ten bins are filled: (0.9, 1] with accuracy 1/2, confidence 0.93; (0.5, 0.6] with 1/2, 0.56.
    assert calibration_error(logits, labels, 10).item() == pytest.approx(0.5 * 0.43 + 0.5 * 0.06)
    assert calibration_error(logits, labels, 2, adaptive=True).item() == pytest.approx(
        0.5 * 0.43 + 0.5 * 0.06
    )
    assert calibration_error(logits, labels, 1, adaptive=True).item() == pytest.approx(0.745 - 0.5)
    share, mean, accuracy = reliability(logits, labels, 10)
    assert share.nonzero().flatten().tolist() == [5, 9]
    assert mean[9].item() == pytest.approx(0.93) and accuracy[5].item() == 0.5


def test_edges_and_certainty_have_a_bin():
    logits = torch.tensor([[800.0, 0.0], [0.0, 0.0]])  # confidence 1 and exactly 1/2
    share, _, _ = reliability(logits, torch.tensor([0, 0]), 2)
    assert share.tolist() == [0.5, 0.5]
    for bins, adaptive in ((0, False), (3, True)):
        with pytest.raises(ValueError, match=f"{bins} bins for 2 images"):
            reliability(logits, torch.tensor([0, 0]), bins, adaptive)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_calibrated_classifier_has_only_the_noise_of_the_bins(rng, adaptive):
    """Labels drawn from the predicted probabilities. With 15 bins of accuracy p over n images the error's
    expectation is at most sqrt(15 p (1-p) 2 / (pi n)); an overconfident twin misses by its excess."""
    n = 40_000
    logits = 1.5 * torch.randn(n, 4, generator=rng)
    labels = torch.multinomial(logits.softmax(1), 1, generator=rng).squeeze(1)
    bound = math.sqrt(15 * 0.25 * 2 / (math.pi * n))
    assert calibration_error(logits, labels, adaptive=adaptive) < 1.5 * bound
    sharp = 3 * logits
    gap = sharp.softmax(1).max(1).values.mean() - (sharp.argmax(1) == labels).float().mean()
    assert calibration_error(sharp, labels, adaptive=adaptive).item() == pytest.approx(
        gap.item(), abs=2 * bound
    )
