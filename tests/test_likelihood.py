"""Maximum likelihood: signs and gradients on closed forms, exact resume, checkpoints that survive."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn

from companion import chains, checkpoint, lifecycle, likelihood
from companion.chains import born_from_data
from companion.likelihood import CheckpointError, Run, ml_loss, train
from companion.networks import MLPEnergy

SETTINGS = {"batch": 16, "steps": 5, "step_size": 0.1, "temperature": 0.05, "data_noise": 0.1}


class Quadratic(nn.Module):
    """E(x) = a x^2 / 2, so that p = N(0, T/a): the likelihood's gradient in a is known."""

    stack = None

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(float(a)))

    def forward(self, x):
        return self.a * x.square().squeeze(-1) / 2


@pytest.mark.parametrize("a", [0.5, 1.0, 3.0])
def test_gradient_is_that_of_the_negative_log_likelihood(a, rng):
    """d/da of -E_data log p = (E_data x^2 - T/a) / 2T, with exact negatives; 200,000 draws of each."""
    temperature, data_std = 0.7, 1.2
    positive = data_std * torch.randn(200_000, 1, generator=rng)
    negative = (temperature / a) ** 0.5 * torch.randn(200_000, 1, generator=rng)
    energy = Quadratic(a)
    ml_loss(energy, positive, negative, temperature).backward()
    expected = (data_std**2 - temperature / a) / (2 * temperature)
    assert energy.a.grad.item() == pytest.approx(expected, abs=0.02)


def test_training_finds_the_variance_of_the_data(rng):
    """The learned a must be T / Var(data + noise), up to the sampler's known bias (here 1 %)."""
    temperature, eps = 1.0, 0.3
    data = 1.5 * torch.randn(5000, 1, generator=rng)
    energy = Quadratic(2.0)
    bank = chains.Bank(1000, chains.born_from_noise((1,), std=1.0), rejuvenation=0.01, generator=rng)
    run = Run(energy, torch.optim.SGD(energy.parameters(), lr=0.05), bank, rng)
    train(run, data, 800, batch=500, steps=20, step_size=eps, temperature=temperature, data_noise=0.2,
          schedule=lambda share: 1 - share, progress=False)  # fmt: skip
    assert energy.a.item() == pytest.approx(temperature / (data.var().item() + 0.04), rel=0.08)
    assert abs(run.gauge("d")[-300:].mean().item()) < 0.05  # centred on zero at the optimum


def test_stacked_loss_is_each_models_own(rng):
    run = lifecycle.short_run("noise_birth", (1, 4, 4), rate=1e-3, network_rate=1e-3, rng=rng, stack=3)
    positive, negative = torch.randn(2, 3, 10, 1, 4, 4, generator=rng)
    loss = ml_loss(run.energy, positive, negative, 0.5)
    assert loss.shape == (3,)
    expected = (run.energy(positive).mean(1) - run.energy(negative).mean(1)) / 0.5
    torch.testing.assert_close(loss, expected)


def build(seed=0, arm="bank", stack=2):
    rng = torch.Generator().manual_seed(seed)
    if arm in ("mid", "long", "corrected"):
        birth, shape = born_from_data(data(), 0.1), (1, 4, 4)
        if arm == "mid":
            return lifecycle.mid_run(
                shape, birth, rate=1e-3, rejuvenation=0.2, rng=rng, stack=stack, bank_size=40, hidden=(8, 8)
            )
        prior = None
        if arm == "corrected":  # the same frozen prior whatever the seed, as a user would load it
            prior = MLPEnergy(shape, (8,), stack=stack, generator=torch.Generator().manual_seed(5))
        return lifecycle.long_run(
            shape, birth, rate=1e-3, visits=2, rng=rng, prior=prior, stack=stack, bank_size=40,
            burn_in_size=20, hidden=(8, 8),
        )  # fmt: skip
    return lifecycle.short_run(
        arm, (1, 4, 4), rate=1e-3, network_rate=1e-3, rng=rng, stack=stack, bank_size=40, latent=3
    )


def data():
    return torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(9)) * 2 - 1


def state(run: Run) -> list[torch.Tensor]:
    tensors = [*run.energy.state_dict().values(), *run.bank.state_dict().values(), run.rng.get_state()]
    if run.network is not None:
        tensors += run.network.state_dict().values()
    return tensors + [run.gauge(name) for name in sorted(run.history)]


def same(one: Run, two: Run):
    assert all(torch.equal(x, y) for x, y in zip(state(one), state(two), strict=True))


@pytest.mark.parametrize("arm", ["bank", "noise_birth", "mid", "long", "corrected"])
@pytest.mark.parametrize("killed_at", [1, 6, 7, 11])
def test_killed_and_resumed_run_ends_with_the_same_numbers(arm, killed_at, tmp_path):
    schedule = lambda share: 1 - 0.9 * share  # noqa: E731
    whole = train(build(arm=arm), data(), 12, schedule=schedule, progress=False, **SETTINGS)

    class Killed(BaseException):
        pass

    run, calls = build(arm=arm), 0
    step = likelihood.ml_step

    def dying(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > killed_at:
            raise Killed
        return step(*args, **kwargs)

    options = dict(schedule=schedule, checkpoint=tmp_path, checkpoint_every=3, progress=False, **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "ml_step", dying)
        with pytest.raises(Killed):
            train(run, data(), 12, **options)
    # Other weights and another generator state: everything must come from the checkpoint, if there is one.
    seed = 77 if any(tmp_path.iterdir()) else 0
    resumed = train(build(seed=seed, arm=arm), data(), 12, **options)
    assert resumed.update == 12 and len(resumed.gauge("d")) == 12
    same(whole, resumed)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    one = train(build(), data(), 6, checkpoint=tmp_path, progress=False, **SETTINGS)
    two = train(build(seed=5), data(), 6, checkpoint=tmp_path, progress=False, **SETTINGS)
    same(one, two)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch):
    run = train(build(), data(), 3, progress=False, **SETTINGS)
    likelihood.save(run, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    run.update += 1
    with pytest.raises(CheckpointError, match="No space left.*previous checkpoint is untouched"):
        likelihood.save(run, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_killed_between_the_two_files_the_old_checkpoint_still_loads(tmp_path, monkeypatch):
    run = train(build(), data(), 3, progress=False, **SETTINGS)
    likelihood.save(run, tmp_path)
    train(run, data(), 4, progress=False, **SETTINGS)
    replace = os.replace

    def dying(source, target):
        if str(target).endswith(".json"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        likelihood.save(run, tmp_path)
    monkeypatch.undo()
    assert likelihood.load(build(), tmp_path).update == 3


def test_foreign_and_damaged_checkpoints_are_refused_with_a_remedy(tmp_path):
    train(build(), data(), 4, checkpoint=tmp_path, progress=False, **SETTINGS)
    with pytest.raises(CheckpointError, match=r"steps=5 \(now 6\).*Remove"):
        train(build(), data(), 4, checkpoint=tmp_path, progress=False, **(SETTINGS | {"steps": 6}))
    with pytest.raises(CheckpointError, match="does not fit"):
        likelihood.load(build(stack=3), tmp_path)
    header = json.loads((tmp_path / "checkpoint.json").read_text())
    file = tmp_path / header["tensors"]
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot read"):
        likelihood.load(build(), tmp_path)
    (tmp_path / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read"):
        likelihood.load(build(), tmp_path)


def test_short_run_arms_differ_as_they_should(rng):
    run = build(arm="no_bank", stack=None)
    train(run, data(), 5, progress=False, **SETTINGS)
    assert (run.gauge("age") == 5).all() and run.network is not None
    assert build(arm="noise_birth").network is None
    run = train(build(), data(), 40, progress=False, **SETTINGS)
    assert 5 < run.gauge("age")[-20:].mean().item() < 15  # 5 steps x 1.73 visits in the long run
    with pytest.raises(ValueError, match="bank, no_bank, noise_birth"):
        build(arm="bnak")


@pytest.mark.parametrize("network", ["conv", "residual"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_convolutional_short_run_trains(network, shape, rng):
    """One update of the image-sized networks, births included; both nets move, nothing is stacked."""
    run = lifecycle.short_run(
        "bank", shape, rate=1e-3, network_rate=1e-3, rng=rng, bank_size=8, batch=4, network=network, width=4
    )
    before = [p.clone() for net in (run.energy, run.network) for p in net.parameters()]
    images = torch.rand(6, *shape, generator=rng) * 2 - 1
    train(run, images, 1, progress=False, **(SETTINGS | {"batch": 4, "steps": 2, "step_size": 0.01}))
    after = [p for net in (run.energy, run.network) for p in net.parameters()]
    assert run.bank.x.shape == (8, *shape) and run.bank.x.isfinite().all()
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > len(before) / 2
    with pytest.raises(ValueError, match="not stacked"):
        lifecycle.short_run("bank", shape, rate=1, network_rate=1, rng=rng, network=network, stack=2)


def test_quality_over_steps_walks_one_chain_and_clamps(rng):
    run = build()
    seen = []
    scores, states = lifecycle.quality_over_steps(
        run,
        (0, 4, 9),
        20,
        lambda x: seen.append(x) or float(len(seen)),
        step_size=0.5,
        temperature=0.05,
        rng=rng,
    )
    assert [len(row) for row in scores] == [2, 2, 2] and set(states) == {0, 4, 9}
    assert all(x.shape == (20, 1, 4, 4) and x.abs().max() <= 1 for x in seen)
    assert run.network.training


def test_a_correction_starts_as_its_prior_and_leaves_it_alone(rng):
    run = build(arm="corrected")
    x = torch.randn(2, 7, 1, 4, 4, generator=rng)
    prior = run.energy.prior
    torch.testing.assert_close(run.energy(x), prior(x), rtol=0, atol=0)  # nothing is corrected yet
    before = [p.clone() for p in prior.parameters()]
    train(run, data(), 8, progress=False, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(before, prior.parameters(), strict=True))
    assert not torch.equal(run.energy(x), prior(x))
    value, slope = run.energy.value_and_gradient(x)
    x.requires_grad_(True)
    (plain,) = torch.autograd.grad((run.energy.correction(x) + prior(x)).sum(), x)
    torch.testing.assert_close(slope, plain, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(value, run.energy(x))
    # A prior kept apart (safetensors) makes the same energy again.
    copy = build(arm="corrected", seed=3)
    copy.energy.load_state_dict(run.energy.state_dict())
    torch.testing.assert_close(copy.energy(x), run.energy(x), rtol=0, atol=0)


def test_long_run_negatives_come_from_the_update_bank_alone(rng):
    """The gradient of the loss must not see the chains that only burn in."""
    run = build(arm="long", stack=None)
    run.bank.burn_in.x += 1e3  # far away: as negatives they would be seen at once
    gauges = likelihood.ml_step(run, data()[:8], steps=1, step_size=1e-3, temperature=1.0)
    assert gauges["diversity"] < 10 and gauges["graduated"] >= 0
    with pytest.raises(ValueError, match="unknown network"):
        lifecycle.long_run((1, 4, 4), born_from_data(data()), rate=1, visits=1, rng=rng, network="mpl")


def test_bytes_for_data_are_refused_before_anything_is_trained():
    rng = torch.Generator().manual_seed(0)
    energy = MLPEnergy((1, 8, 8), (4,), generator=rng)
    bank = chains.Bank(20, chains.born_from_noise((1, 8, 8)), rejuvenation=1.0, generator=rng)
    run = Run(energy, torch.optim.Adam(energy.parameters()), bank, rng)
    images = torch.zeros(10, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"floating point, got torch.uint8; .* x / 127.5 - 1"):
        train(run, images, 1, batch=4, steps=1, step_size=0.1, temperature=1.0, data_noise=0.0)
