"""The pages on speed, and the two scripts that measure for them."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import speed
import torch
from parameters import BookError

from companion import _compiled, _recorded

ROOT = Path(__file__).parents[1]

limits = importlib.import_module("limits")
budget = importlib.import_module("budget")
cifar_step = importlib.import_module("cifar_step")
side_by_side = importlib.import_module("side_by_side")

THEIRS = """
import torch

def Langevin_dynamics(samples, netD, n_steps, step_lr, noisel):
    x = samples
    for _ in range(n_steps):
        x = x.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(netD(x).sum(), x)
        noise = grad.norm(dim=1, keepdim=True) * noisel * step_lr**0.5 * torch.randn_like(x, device="cuda")
        x = x + FACTOR * step_lr * grad + noise
    return x
"""


def test_operations_and_bytes_are_those_of_the_calls():
    a, b = torch.randn(30, 40), torch.randn(40, 50)

    def work(steps, compile):
        (a @ b).t().relu()  # a view moves nothing

    loop = limits.Loop("a product", "none", 1, work)
    operations, moved, calls = limits.counted(loop)
    assert operations == 2 * 30 * 40 * 50 and calls == 2
    assert moved == 4 * (30 * 40 + 40 * 50 + 30 * 50) + 4 * 2 * (30 * 50)


def test_every_loop_is_counted_and_published_costs_scale_with_the_chains():
    torch.manual_seed(0)
    for loop in limits.loops(torch.device("cpu")):
        if "conv energy" not in loop.what:  # seconds
            operations, moved, calls = limits.counted(loop)
            assert operations > 1e5 and moved > 1e4 and 5 < calls < 3000, loop.what


def test_on_a_gpu_a_loop_is_timed_recorded_and_plain_without_what_recording_costs(monkeypatch):
    calls, clock = [], {"now": 0.0}

    def work(steps, compile):
        calls.append((steps, compile))
        clock["now"] += steps * 0.5 + (0.0 if compile is False else 7.0)  # 7: the recording

    monkeypatch.setattr(limits, "seconds", lambda run, device: -clock["now"] + (run(), clock["now"])[1])
    loop = limits.Loop("x", "none", 3, work, unit=6)
    for compile in (None, False):
        assert limits.step_time(loop, torch.device("cuda"), compile) == pytest.approx(0.5)
    assert calls == [(60, None), (258, None), (60, False), (258, False)]
    assert limits.step_time(loop, torch.device("cpu"), None) == pytest.approx((3 * 0.5 + 7) / 3)


def checkout(folder, factor):
    (folder / "synthetic_exp").mkdir(parents=True)
    text = THEIRS.replace("FACTOR", str(factor))
    (folder / "synthetic_exp/mcmc_sampler.py").write_text(text, encoding="utf-8")
    return str(folder)


def test_a_checkout_is_timed_and_one_that_does_something_else_is_refused(tmp_path):
    out = tmp_path / "beside.json"
    side_by_side.main(["--dcd", checkout(tmp_path / "a", 1.0), "--repeats", "2", "--out", str(out)])
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["methods"]["dcd"]["times_faster"]["median"] > 0
    assert str(tmp_path) not in out.read_text(encoding="utf-8")
    assert "mcmc_sampler" not in sys.modules
    with pytest.raises(SystemExit, match="theirs and the companion's differ"):
        side_by_side.main(["--dcd", checkout(tmp_path / "b", 0.5), "--repeats", "2"])
    with pytest.raises(SystemExit):
        side_by_side.main(["--dcd", str(tmp_path / "nowhere")])


def test_the_gpu_profile_fits_a_t4_by_the_count_of_its_present_sizes():
    """The kept record is that of the profile as it stands; a changed size needs a new count."""
    kept = json.loads((ROOT / "results/budget-gpu.json").read_text(encoding="utf-8"))
    loops = budget.all_loops("gpu")
    assert [(loop.chapter, loop.what) for loop in loops] == [(r["chapter"], r["loop"]) for r in kept["loops"]]
    for loop, row in zip(loops, kept["loops"], strict=True):
        assert loop.times * loop.operations == pytest.approx(row["operations"], rel=1e-6), loop
        assert loop.minutes == pytest.approx(row["minutes"], abs=0.006), loop
    chapters = {loop.chapter for loop in loops}
    assert len(chapters) == 7
    for chapter in chapters:
        assert sum(loop.minutes for loop in loops if loop.chapter == chapter) < budget.LIMIT, chapter
    page = (ROOT / "book/performance.md").read_text(encoding="utf-8")
    for constant, words in (
        (budget.SHARE == 0.3, "three tenths of the float32 rate"),
        (budget.CALL == 3e-6, "three microseconds"),
        (budget.LIMIT == 12, "below twelve minutes"),
        (_compiled.STRIDE == 64, "up to 64 steps"),
        (_recorded.LOOK == 20, "asked every twenty updates"),
    ):
        assert constant and words in " ".join(page.split()), words
    one = budget.Loop("x", "y", 60, 2 * budget.SHARE * budget.RATE, 0)
    assert one.minutes == pytest.approx(2)
    text = "\n".join(speed.budget(ROOT))
    assert "[short-run](short-run.md)" in text and "estimated" in text


AIRBENCH = """
import torchvision
import torchvision.transforms as T
from torch import nn

class CifarNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4).half()
        self.head = nn.Linear(4, CLASSES).half()

    def forward(self, x):
        return self.head(self.conv(x).amax((2, 3)))
"""


def test_the_arms_are_timed_on_the_trainers_network(tmp_path):
    folder, out = tmp_path / "cifar10-airbench", tmp_path / "step.json"
    folder.mkdir()
    small = ["--batch", "8", "--batches", "1", "--repeats", "1", "--width", "2", "--out", str(out)]
    with pytest.raises(SystemExit, match="holds no airbench94_muon.py"):
        cifar_step.main(["--airbench", str(folder), *small])
    module = folder / "airbench94_muon.py"
    module.write_text(AIRBENCH.replace("CLASSES", "7"), encoding="utf-8")
    with pytest.raises(SystemExit, match="not to 10 classes"):
        cifar_step.main(["--airbench", str(folder), *small])
    module.write_text(AIRBENCH.replace("CifarNet", "Other"), encoding="utf-8")
    with pytest.raises(SystemExit, match="has no CifarNet"):
        cifar_step.main(["--airbench", str(folder), *small])
    module.write_text(AIRBENCH.replace("CLASSES", "10"), encoding="utf-8")
    cifar_step.main(["--airbench", str(folder), *small])
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["parameters"]["airbench's network"] == 4 * 27 + 4 + 4 * 10 + 10
    assert len(record["rows"]) == 7 and record["rows"]["airbench"]["of_the_trainer"]["median"] == 1
    assert all(row["examples_a_second"]["median"] > 0 for row in record["rows"].values())
    assert str(tmp_path) not in out.read_text(encoding="utf-8")
    assert record["command"].endswith(
        "--airbench cifar10-airbench --batch 8 --batches 1 --repeats 1 --width 2"
    )
    cifar_step.main(small)
    record = json.loads(out.read_text(encoding="utf-8"))
    assert len(record["rows"]) == 3 and record["trainer"] is None
    with pytest.raises(SystemExit):
        cifar_step.main(["--batch", "1"])


def test_tables_show_what_was_measured_and_say_what_was_not(tmp_path):
    (tmp_path / "results").mkdir()
    assert "Not measured yet" in "\n".join(speed.limits(tmp_path))
    assert speed.cost(tmp_path) == ["Not measured yet."]
    text = "\n".join(speed.beside(tmp_path))
    assert "not measured yet" in text and "a GPU" in text
    record = json.loads((ROOT / "results/limits-cpu.json").read_text(encoding="utf-8"))
    record["device"] = "cuda (x)"
    for i, row in enumerate(record["loops"]):
        row["calls"] = 1234
        row["times_the_plain_loop"] = {"low": 7.5, "median": 8 + i, "high": 29.25}
    (tmp_path / "results/limits-cuda.json").write_text(json.dumps(record), encoding="utf-8")
    text = "\n".join(speed.limits(tmp_path))
    assert "## cuda (x)" in text and "measured yet" not in text.lower()
    assert "| 9.0 (7.5 to 29.2) |" in text and "| 1,234 |" in text
    row = record["published"][0]
    days = row["operations"] * row["updates"] / 1e14 / 86400
    assert f"| {days:.1f} |" in "\n".join(speed.cost(tmp_path))
    (tmp_path / "results/limits-broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(BookError, match="limits-broken.json is not JSON"):
        speed.limits(tmp_path)


def test_the_kept_records_fill_the_pages():
    text = "\n".join(speed.beside(ROOT))
    for name in ("Grathwohl 2020", "Niu 2020", "Ansari 2021", "Song 2020", "Zheng 2021", "TorchEBM"):
        assert name in text, name
    assert "amp, quarter of the batch, airbench's network" in "\n".join(speed.throughput(ROOT))
    assert "\n".join(speed.limits(ROOT)).count("matmul") > 3 and "short-run" in "\n".join(speed.cost(ROOT))
