"""The bank against the stationary law of its ages, and its bookkeeping."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from companion.chains import Bank, LongRunBank, born_from, born_from_data, born_from_noise, graduate
from companion.networks import MLPGenerator


def drive(bank, updates, batch, steps, rng):
    """Run the bank with chains that stand still; returns the ages at use of every visit."""
    ages = []
    for _ in range(updates):
        drawn = bank.draw(batch, rng)
        ages.append(drawn.age + steps)
        bank.put(drawn, drawn.x, steps)
    return torch.stack(ages)


@pytest.mark.parametrize("stack", [None, 3])
def test_short_run_ages_follow_their_stationary_law(stack, rng):
    """8/15, 4/15, 2/15, 1/15 for K, 2K, 3K, 4K (p = 1/2, four visits): within 5 standard errors."""
    bank = Bank(200, born_from_noise((2,)), rejuvenation=0.5, max_visits=4, stack=stack, generator=rng)
    ages = drive(bank, 1500, 40, 30, rng)[200:]
    for visits, expected in zip((1, 2, 3, 4), (8 / 15, 4 / 15, 2 / 15, 1 / 15), strict=True):
        share = (ages == 30 * visits).double().mean().item()
        # Successive visits of one chain are correlated; a factor 2 on the binomial error covers it.
        assert abs(share - expected) < 10 * math.sqrt(expected * (1 - expected) / ages.numel())
    assert set(ages.unique().tolist()) == {30, 60, 90, 120}


def test_mid_run_mean_age_is_steps_over_p(rng):
    bank = Bank(100, born_from_noise((1,)), rejuvenation=0.1, generator=rng)
    ages = drive(bank, 6000, 20, 30, rng)[1000:].double()
    assert ages.mean().item() == pytest.approx(30 / 0.1, rel=0.03)
    share = (ages == 30).double().mean().item()
    assert share == pytest.approx(0.1, abs=0.01)  # geometric law: the first visit has probability p


def test_no_bank_is_rejuvenation_one(rng):
    bank = Bank(8, born_from_noise((1,)), rejuvenation=1.0, generator=rng)
    assert (drive(bank, 50, 8, 30, rng) == 30).all()
    assert bank.report() == {"mean_age": 30.0, "max_age": 30.0, "mean_visits": 1.0}


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 30),
    share=st.floats(0.1, 1.0),
    stack=st.none() | st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_draw_and_put_touch_exactly_the_drawn_slots(size, share, stack, seed):
    rng = torch.Generator().manual_seed(seed)
    batch = max(1, int(size * share))
    bank = Bank(size, born_from_noise((2, 1)), rejuvenation=0.3, stack=stack, generator=rng)
    before = bank.x.clone()
    drawn = bank.draw(batch, rng)
    assert torch.equal(bank.x, before)  # a draw copies
    flat = drawn.index.reshape(-1, batch)
    assert all(len(set(row.tolist())) == batch for row in flat)
    bank.put(drawn, torch.full_like(drawn.x, 9.0), 5)
    changed = (bank.x == 9.0).all(-1).all(-1).reshape(-1, size)
    assert (changed.sum(1) == batch).all()
    assert torch.equal(bank.x.reshape(-1, size, 2, 1)[~changed], before.reshape(-1, size, 2, 1)[~changed])
    assert (bank.visits.sum(-1) == batch).all() and (bank.age.sum(-1) == 5 * batch).all()


def test_latents_stay_with_their_births(rng):
    """Until a chain is reborn, its z is the one that made it: G(z) is its first state."""
    network = MLPGenerator((3,), latent=4, hidden=(8,), stack=2, generator=rng).eval()
    bank = Bank(20, born_from(network), rejuvenation=0.4, max_visits=3, stack=2, generator=rng)
    for _ in range(30):
        drawn = bank.draw(7, rng)
        with torch.no_grad():
            torch.testing.assert_close(network(drawn.z), drawn.x)
        bank.put(drawn, drawn.x, 10)


def test_births_from_data_are_data(rng):
    data = torch.arange(12.0).reshape(6, 2)
    x, z = born_from_data(data)((50,), rng)
    assert z is None and {tuple(row) for row in x.tolist()} == {tuple(row) for row in data.tolist()}
    noisy, _ = born_from_data(torch.zeros(6, 2), 0.5)((4000,), rng)
    assert noisy.std().item() == pytest.approx(0.5, rel=0.05)


def test_state_restores_exactly(rng):
    network = MLPGenerator((3,), latent=4, hidden=(8,), generator=rng)
    bank = Bank(16, born_from(network), rejuvenation=0.5, max_visits=4, generator=rng)
    drive(bank, 20, 5, 10, rng)
    other = Bank(16, born_from(network), rejuvenation=0.5, max_visits=4, generator=rng)
    other.load_state_dict({k: v.clone() for k, v in bank.state_dict().items()})
    one = drive(bank, 20, 5, 10, torch.Generator().manual_seed(5))
    two = drive(other, 20, 5, 10, torch.Generator().manual_seed(5))
    assert torch.equal(one, two) and torch.equal(bank.x, other.x) and torch.equal(bank.z, other.z)
    with pytest.raises(ValueError, match="visits"):
        other.load_state_dict({"x": bank.x, "z": bank.z, "age": bank.age})


def test_graduation_moves_old_chains_with_their_age(rng):
    source = Bank(6, born_from_noise((1,)), rejuvenation=0.0, generator=rng)
    target = Bank(9, born_from_noise((1,)), rejuvenation=0.0, generator=rng)
    source.visits[:3], source.age[:3] = 10, 1000
    source.x[:] = torch.arange(6.0).unsqueeze(1) + 100
    drawn, slots = source.draw(6, rng), target.draw(6, rng)
    source.put(drawn, drawn.x, 100)
    target.put(slots, slots.x, 100)
    moved = graduate(source, drawn, target, slots, visits=11, generator=rng)
    assert moved.sum() == 3
    assert sorted(target.x[target.age == 1100].flatten().tolist()) == [100.0, 101.0, 102.0]
    assert (source.visits[:3] == 0).all() and (source.age[:3] == 0).all()
    assert (source.x[:3] < 2).all() and (source.x[3:] >= 100).all() and (source.age[3:] == 100).all()


def test_staggered_counters_spread(rng):
    bank = Bank(5000, born_from_noise((1,)), rejuvenation=0.0, generator=rng)
    bank.stagger(50, rng)
    assert bank.visits.min() == 0 and bank.visits.max() == 49
    assert bank.visits.double().mean().item() == pytest.approx(24.5, abs=5 * 14.4 / math.sqrt(5000))


def long_run_bank(rng, visits, size=60, burn_in=40, stack=None):
    update, below = (
        Bank(n, born_from_noise((2,)), rejuvenation=0.0, stack=stack, generator=rng) for n in (size, burn_in)
    )
    below.stagger(visits, rng)
    return LongRunBank(update, below, visits)


@pytest.mark.parametrize("stack", [None, 2])
def test_long_run_negatives_are_old_and_flow_at_the_rate_of_the_paper(stack, rng):
    """Once the first generation is replaced no negative is younger than its visits below; B / (visits + 1)
    chains graduate at an update."""
    visits, batch, steps = 6, 15, 10
    bank = long_run_bank(rng, visits, stack=stack)
    ages, moved = [], []
    for _ in range(1200):
        drawn = bank.draw(batch, rng)
        assert drawn.x.shape == (*bank.stack, 2 * batch, 2)
        ages.append((drawn.age[..., :batch] + steps).float().mean(-1))
        moved.append(bank.put(drawn, drawn.x, steps, rng)["graduated"])
        assert torch.equal(bank.burn_in.age % steps, torch.zeros_like(bank.burn_in.age))
        assert (bank.burn_in.visits < visits).all()  # who has had enough leaves at once
    # Staggered counters shorten the first burn-in, not the age that is counted with it.
    assert bank.update.age.min() >= visits * steps
    assert torch.stack(moved)[300:].mean().item() == pytest.approx(batch / visits, rel=0.1)
    # Residence: 60 slots at batch / visits graduations, each with chance 1 / 4 of a visit an update.
    residence = 60 * visits / batch * batch / 60
    expected = steps * (visits + residence)
    assert torch.stack(ages)[600:].mean().item() == pytest.approx(expected, rel=0.1)


def test_a_long_run_bank_restores_exactly(rng):
    bank, other = long_run_bank(rng, 3), long_run_bank(rng, 3)
    drive(bank, 10, 7, 5, rng)
    other.load_state_dict({k: v.clone() for k, v in bank.state_dict().items()})
    results = []
    for each in (bank, other):
        gen = torch.Generator().manual_seed(4)
        for _ in range(12):
            drawn = each.draw(7, gen)
            each.put(drawn, drawn.x + 1, 5, gen)
        results.append(each.state_dict())
    assert all(torch.equal(results[0][k], v) for k, v in results[1].items())
    assert bank.report()["burn_in_mean_visits"] < 3
    state = {k: v for k, v in bank.state_dict().items() if k != "burn_in.age"}
    with pytest.raises(ValueError, match="burn_in bank.*age"):
        other.load_state_dict(state)


def test_banks_that_cannot_be_one_long_run_bank(rng):
    plain = Bank(4, born_from_noise((1,)), rejuvenation=0.0, generator=rng)
    with pytest.raises(ValueError, match="different stacks"):
        LongRunBank(plain, Bank(4, born_from_noise((1,)), rejuvenation=0.0, stack=2, generator=rng), 3)
    with pytest.raises(ValueError, match="rejuvenation=0"):
        LongRunBank(plain, Bank(4, born_from_noise((1,)), rejuvenation=0.1, generator=rng), 3)


def test_bad_arguments_are_named(rng):
    with pytest.raises(ValueError, match="probability"):
        Bank(4, born_from_noise((1,)), rejuvenation=1.5)
    with pytest.raises(ValueError, match="max_visits"):
        Bank(4, born_from_noise((1,)), rejuvenation=0.5, max_visits=0)
    with pytest.raises(ValueError, match="5 distinct chains from a bank of 4"):
        Bank(4, born_from_noise((1,)), rejuvenation=0.5).draw(5)
