"""Shared fixtures: one thread (the suite runs in parallel) and a seeded generator for every test."""

from __future__ import annotations

import pytest
import torch
from tape import Tape, tape_capture

from companion import _compiled


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def tapes(monkeypatch) -> list[Tape]:
    """Chains and trainings as on a GPU, with tapes for CUDA graphs; the list of those recorded."""
    recorded: list[Tape] = []
    monkeypatch.setattr(_compiled, "_mechanism", lambda device: "graph")
    monkeypatch.setattr(_compiled, "_capture", tape_capture(recorded))
    monkeypatch.setattr(_compiled, "PAYS", 4)
    return recorded
