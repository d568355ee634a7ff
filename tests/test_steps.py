"""Updates as one recorded call (``companion._recorded``), held against the plain loops.

``tape`` stands in for CUDA graphs; as it refuses whatever waits for the device, these tests also hold that no
update of the trainings does.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from tape import Tape
from torch import nn

from companion import _compiled, _recorded, chains, gan, graphs, lifecycle, likelihood, refine, stein
from companion._recorded import NotCompilableError, Steps, tensors_of
from companion.classifiers import Recipe, StackedConvNet, train_stack
from companion.langevin import DivergenceError
from companion.networks import MLP, ConvEnergy, ConvGenerator, MLPEnergy, PointGenerator
from companion.perturb import AMP, ASAM, SAM, Random
from companion.residual import PlainResNet, train_residual


@pytest.fixture(autouse=True)
def _double():
    """Else the optimisers' fused form, which rounds otherwise, drives two adversaries apart in 50 updates."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def alike(plain, ours, **tolerance):
    """The same weights, gauges and generator after two trainings."""
    for name in ("energy", "critic", "network", "average", "bank"):
        one, other = (getattr(run, name, None) for run in (plain, ours))
        if one is not None:
            torch.testing.assert_close(dict(other.state_dict()), dict(one.state_dict()), **tolerance)
    assert ours.history.keys() == plain.history.keys()
    for name, values in plain.history.items():
        torch.testing.assert_close(torch.stack(ours.history[name]), torch.stack(values), **tolerance)
    assert torch.equal(ours.rng.get_state(), plain.rng.get_state())


def lsd(seed=0):
    rng = torch.Generator().manual_seed(seed)
    energy = MLPEnergy((2,), (16, 16), stack=2, generator=rng)
    critic = MLP((2, 16, 16, 2), 2, generator=rng)
    adams = [torch.optim.Adam(net.parameters(), 2**-10, (0.0, 0.999)) for net in (energy, critic)]
    return stein.SteinRun(energy, adams[0], rng, critic, adams[1])


@pytest.mark.parametrize("anchored", [False, True])
def test_lsd_recorded_is_lsd(anchored, tapes):
    data = torch.randn(500, 2, generator=torch.Generator().manual_seed(1))
    settings = {
        "batch": 32, "critic_steps": 2, "anchored": anchored, "clip": 1.0, "average": 0.9,
        "schedule": lambda share: 1.0 if share < 0.5 else 0.5,
    }  # fmt: skip
    plain, ours = lsd(), lsd()
    stein.train(plain, data, 60, compile=False, **settings)
    stein.train(ours, data, 60, **settings)
    assert len(tapes) == 2  # the critic's step and the energy's
    alike(plain, ours)


def pair(kind):
    rng = torch.Generator().manual_seed(0)
    if kind == "plane":  # stacked, the penalty differentiated forwards
        critic, network = (
            MLPEnergy((2,), (16, 16), 2, generator=rng),
            PointGenerator(2, 2, stack=2, generator=rng),
        )
        data = torch.randn(300, 2, generator=rng)
        return gan.new_run(network, critic, rate=2**-10, average=0.9, rng=rng), data
    shape = (1, 8, 8)
    network, critic = ConvGenerator(shape, 4, 4, rng), ConvEnergy(shape, 4, rng)
    if kind == "spectral":
        torch.manual_seed(0)  # what the power iteration starts from
        critic = gan.spectrally_normalised(critic)
    return (
        gan.new_run(network, critic, rate=2**-10, average=0.9, rng=rng),
        torch.rand(200, *shape, generator=rng) * 2 - 1,
    )


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("plane", {"penalty": 1.0}),
        ("images", {"penalty": 1.0, "penalty_batch": 8, "drift": 0.01}),
        ("spectral", {"loss": "hinge"}),
    ],
)
def test_a_gan_recorded_is_the_gan(kind, loss, tapes):
    """The penalty's double backward, spectral normalisation's power iteration, batch norm's averages."""
    plain, data = pair(kind)
    ours, _ = pair(kind)
    settings = {"batch": 16, "critic_steps": 2, "half_level": 0.1, "progress": False, **loss}
    gan.train(plain, data, 50, compile=False, **settings)
    gan.train(ours, data, 50, **settings)
    assert len(tapes) == 1
    alike(plain, ours)


def few_graphs():
    rings = [[(i, (i + 1) % n) for i in range(n)] for n in (5, 6, 6, 5, 6, 5)]
    return graphs.GraphBatch.from_edges(rings, [len(ring) for ring in rings])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("method", ["anchored", "plain", "dsm", "frozen"])
def test_stein_training_of_graphs_recorded_is_the_same(method, exact, tapes):
    """The critic's double backward (exact), averages whose weight changes, a recording a graph size."""
    runs = []
    for compile in (False, None):
        run = graphs.graph_run(
            few_graphs(), (0.5, 0.2), torch.Generator().manual_seed(0), method=method, rate=2**-8,
            critic_rate=2**-8, channels=2, node_width=3, hidden=4, layers=2,
        )  # fmt: skip
        options = {
            "batch": 3,
            "critic_steps": 2 if method == "plain" else 1,
            "warm_up": 8,
            "score_penalty": 0.1,
        }
        runs.append(graphs.train(run, 52, exact=exact, progress=False, compile=compile, **options))
    assert len(tapes) == 4  # the draw with the critic's step, and the energy's, for either size
    alike(*runs)


def short(kind="bank"):
    rng = torch.Generator().manual_seed(0)
    if kind == "long":
        energy = MLPEnergy((2,), (16, 16), generator=rng)
        births = chains.born_from_noise((2,), std=1.0)
        banks = [chains.Bank(size, births, rejuvenation=0.0, generator=rng) for size in (40, 30)]
        bank = chains.LongRunBank(*banks, visits=3)
        return likelihood.Run(energy, torch.optim.Adam(energy.parameters(), 2**-10), bank, rng)
    network, stack = ("conv", None) if kind == "conv" else ("mlp", 2)
    return lifecycle.short_run(
        "bank", (1, 8, 8), rate=2**-11, network_rate=2**-10, rng=rng, stack=stack, bank_size=60,
        network=network,
        width=4, latent=4,
    )  # fmt: skip


def settings(kind="bank", **more):
    shape = (2,) if kind == "long" else (1, 8, 8)
    data = torch.rand(200, *shape, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return {
        "data": data, "batch": 16, "steps": 4, "step_size": 0.05, "temperature": 0.01, "data_noise": 0.05,
        "half_level": 0.03, "progress": False, **more,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["bank", "conv", "long"])
def test_maximum_likelihood_recorded_is_the_same(kind, tapes):
    """Draws, births, chains, update, teaching and bank in one recording; rates that change."""
    plain, ours = short(kind), short(kind)
    options = settings(kind, schedule=lambda share: 1.0 if share < 0.5 else 0.5, base_std=1.0)
    likelihood.train(plain, updates=50, compile=False, **options)
    likelihood.train(ours, updates=50, **options)
    assert len(tapes) == 1 and ours.halt is None
    alike(plain, ours)
    optimizer = ours.optimizer  # left as it was before
    assert optimizer.param_groups[0]["lr"] == pytest.approx(plain.optimizer.param_groups[0]["lr"])
    assert not optimizer.param_groups[0]["fused"] and not hasattr(optimizer, "found_inf")
    for run in (plain, ours):
        likelihood.train(run, updates=52, compile=False, **options)
    alike(plain, ours)


def test_a_recorded_training_resumes_from_its_checkpoint_with_the_same_numbers(tapes, tmp_path):
    whole, killed = short(), short()
    options = settings(checkpoint_every=20)
    likelihood.train(whole, updates=60, checkpoint=tmp_path / "whole", **options)

    class Killed(Exception):
        pass

    def killer(share):
        if share > 0.6:
            raise Killed
        return 1.0

    with pytest.raises(Killed):
        likelihood.train(killed, updates=60, checkpoint=tmp_path / "killed", schedule=killer, **options)
    again = short()
    likelihood.train(again, updates=60, checkpoint=tmp_path / "killed", **options)
    assert len(tapes) == 3  # also of the resumed one, whose 20 updates alone would not have been worth it
    alike(whole, again, rtol=0, atol=0)


def test_a_chain_that_diverges_in_a_recorded_update_stops_everything_there(tapes):
    """The plain loop's update and step; weights, moments and history as they were before it."""
    runs, errors = [], []
    for compile in (False, True):
        run = short()

        def provoke(share, run=run):
            last = run.energy.net.layers[-1].weight
            if share > 0.5 and last.abs().max() < 1e100:
                with torch.no_grad():
                    last.mul_(1e300)  # finite still, but not where the first step leads
            return 1.0

        with pytest.raises(likelihood.TrainingDiverged) as caught:
            likelihood.train(run, updates=100, **settings(schedule=provoke, compile=compile))
        runs.append(run)
        errors.append(caught.value)
    plain, ours = runs
    assert plain.update == ours.update == 51 and errors[0].step == errors[1].step == 1
    assert len(ours.history["d"]) == ours.update and ours.halt is None
    for one, other in ((plain.energy, ours.energy), (plain.network, ours.network)):
        torch.testing.assert_close(dict(other.named_parameters()), dict(one.named_parameters()))
    for p, q in zip(plain.energy.parameters(), ours.energy.parameters(), strict=True):
        assert ours.optimizer.state[q]["step"] == plain.optimizer.state[p]["step"] == plain.update
    assert all(torch.isfinite(t).all() for t in ours.bank.state_dict().values())


RECIPES = {
    "erm, MixUp, SWA": {"mixup": 1.0, "average_from": 0.5},
    "flooding": {"flood": 1.0, "smoothing": 0.1},
    "amp, two steps": {"rule": AMP(0.3, 0.7), "steps": 2},
    "sam": {"rule": SAM(0.05)},
    "asam": {"rule": ASAM(0.5)},
    "random": {"rule": Random(0.3)},
}


@pytest.mark.parametrize("arm", RECIPES)
def test_a_stack_of_classifiers_recorded_learns_the_same(arm, tapes):
    """Both passes of a perturbation, its rollback and batch norm's statistics in one recording."""
    x = torch.rand(2, 60, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = torch.randint(3, (2, 60), generator=torch.Generator().manual_seed(2))
    nets, trained, states = [], [], []
    for compile in (False, True):
        rng = torch.Generator().manual_seed(0)
        net = StackedConvNet((1, 8, 8), 3, 2, (4, 6), generator=rng)
        recipe = Recipe(epochs=9, rate=0.05, batch=12, **RECIPES[arm])
        trained.append(train_stack(x, y, net, recipe, rng, compile=compile))
        nets.append(net)
        states.append(rng.get_state())
    assert len(tapes) == 1 and torch.equal(*states)
    torch.testing.assert_close(nets[1].state_dict(), nets[0].state_dict())
    torch.testing.assert_close(trained[1].curves, trained[0].curves)
    assert trained[1].evaluations == trained[0].evaluations


@pytest.mark.parametrize("ascent", [None, 4])
def test_the_residual_network_recorded_learns_the_same(ascent, tapes):
    x = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = torch.randint(3, (48,), generator=torch.Generator().manual_seed(2))
    nets = []
    for compile in (False, True):
        torch.manual_seed(0)
        net = PlainResNet(1, 3, width=2)
        rng = torch.Generator().manual_seed(0)
        how = Recipe(epochs=5, rate=0.01, batch=16, smoothing=0.1, rule=AMP(0.1))
        nets.append(train_residual(x, y, net, how, rng, ascent, compile=compile))
    assert len(tapes) == 1
    torch.testing.assert_close(nets[1].state_dict(), nets[0].state_dict())


@pytest.mark.parametrize("latent", [False, True])
def test_fine_tuning_a_critic_recorded_is_the_same(latent, tapes):
    """Chains on the critic, in eval mode, and its step, in training mode, in one recording."""
    critics, gauges = [], []
    for compile in (False, True):
        run, data = pair("plane")
        network = run.network
        gauges.append(refine.finetune(
            run.critic, network, data, 45, optimizer=run.optimizer, batch=16, steps=5, step_size=0.1,
            beta=2.0,
            generator=run.rng, latent=latent, penalty=0.5, schedule=lambda s: 1.0 if s < 0.5 else 0.25,
            compile=compile,
        ))  # fmt: skip
        critics.append(run.critic)
        assert network.training and run.critic.training and run.optimizer.param_groups[0]["lr"] == 2**-10
    assert len(tapes) == 1
    torch.testing.assert_close(critics[1].state_dict(), critics[0].state_dict())
    torch.testing.assert_close(gauges[1], gauges[0])


def test_a_chain_that_diverges_while_a_critic_is_tuned_is_an_error_of_its_update(tapes):
    for compile in (False, True):
        run, data = pair("plane")

        def provoke(share, run=run):
            last = run.critic.net.layers[-1].weight
            if share > 0.5 and last.abs().max() < 1e100:
                with torch.no_grad():
                    last.mul_(1e300)
            return 1.0

        with pytest.raises(DivergenceError, match="at step 1 of"):
            refine.finetune(
                run.critic, run.network, data, 60, optimizer=run.optimizer, batch=16, steps=5, step_size=0.1,
                beta=2.0, generator=run.rng, schedule=provoke, compile=compile,
            )  # fmt: skip
        assert run.optimizer.param_groups[0]["lr"] == 2**-10


def test_graphs_are_sampled_by_one_recording_for_all_levels(tapes):
    run = graphs.graph_run(few_graphs(), (0.5, 0.2), torch.Generator().manual_seed(0), channels=2, hidden=4)
    sampled = []
    for by_hand in (True, False):
        rng = torch.Generator().manual_seed(1)
        with pytest.MonkeyPatch.context() as patch:
            if by_hand:
                patch.setattr(_compiled, "_mechanism", lambda device: "compile")
            a, _ = graphs.annealed_langevin(run.average, 6, 5, (0.5, 0.3, 0.2), steps=200, generator=rng)
        sampled.append(a)
    assert len(tapes) == 2  # one step, and a stride
    torch.testing.assert_close(*sampled)


# What a recording must not do unnoticed.


def small(wrong=None):
    """Sixty updates of a linear model, in one of which something is wrong: (weights, generator's state)."""
    rng = torch.Generator().manual_seed(0)
    net, other = nn.Linear(3, 1), torch.Generator().manual_seed(0)
    with torch.no_grad():
        net.weight.fill_(1.0), net.bias.fill_(0.0)
    adam = torch.optim.Adam(net.parameters(), 2**-6)
    count, seen = torch.zeros((), dtype=torch.long), []

    def update(scale):
        source = other if wrong == "another generator" else rng
        x = torch.empty(8, 3).normal_(generator=source)
        loss = ((net(x) - scale).square()).mean()
        if wrong == "a wait" and loss.item() < 0:
            loss = -loss
        if wrong == "a number of Python's":
            seen.append(None)
            loss = loss * len(seen) ** 4
        if wrong == "a tensor from the host":
            loss = loss * torch.tensor(2.0)
        if wrong == "a count":
            count.copy_(count + len(seen))
            seen.append(None)
        adam.zero_grad()
        loss.backward()
        adam.step()
        return {"loss": loss.detach()}

    def run(compile):
        state = lambda: [*tensors_of(net), count]  # noqa: E731
        with Steps([adam], state, [rng], device="cpu", count=60, compile=compile) as steps:
            for i in range(60):
                steps.set_rate(adam.param_groups[0], 2**-6 if i < 30 else 2**-8)
                steps.take("update", update, float(i))
            return steps.recording

    return run, net, rng


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("a wait", "waits for the device"),
        ("a tensor from the host", "brought to the device"),
        ("another generator", "not registered"),
        ("a number of Python's", "does not do what the update itself does"),
        ("a count", "does not do what the update itself does"),
    ],
)
def test_what_cannot_be_recorded_goes_on_as_the_plain_loop_and_says_so(wrong, reason, tapes):
    plain, net, rng = small(wrong)
    plain(False)
    ours, other, same = small(wrong)
    with pytest.warns(RuntimeWarning, match=reason):
        assert ours(None) is False
    if wrong not in ("a number of Python's", "a count"):  # there the failed recording counted once more
        torch.testing.assert_close(other.state_dict(), net.state_dict())
    assert torch.equal(rng.get_state(), same.get_state())
    with pytest.raises(NotCompilableError, match=reason):
        small(wrong)[0](True)


def test_numbers_and_rates_reach_a_recorded_update(tapes):
    plain, net, rng = small()
    plain(False)
    ours, other, same = small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours(None) is True
    assert len(tapes) == 1
    torch.testing.assert_close(other.state_dict(), net.state_dict())
    assert torch.equal(rng.get_state(), same.get_state())


def test_what_is_not_worth_a_recording_or_cannot_have_one_is_plain(tapes, monkeypatch):
    net = nn.Linear(2, 1)
    make = lambda optimizer, **more: Steps(  # noqa: E731
        [optimizer], lambda: tensors_of(net), [], device="cpu", **({"count": 100} | more)
    )
    adam = torch.optim.Adam(net.parameters())
    assert make(adam).recording
    assert not make(adam, count=_recorded.SHORTEST - 1).recording
    assert not make(adam, compile=False).recording
    rare = torch.optim.RMSprop(net.parameters())
    assert not make(rare).recording
    with pytest.raises(NotCompilableError, match="RMSprop"):
        make(rare, compile=True)
    monkeypatch.undo()
    assert not make(adam).recording
    with pytest.raises(NotCompilableError, match="on a GPU"):
        make(adam, compile=True)


def test_the_tape_runs_nothing_while_it_records():
    x, rng = torch.zeros(3), torch.Generator().manual_seed(0)
    state, tape = rng.get_state(), Tape([rng])
    with tape:
        y = x.normal_(generator=rng) + 1
    assert not x.any() and torch.equal(rng.get_state(), state)
    expected = torch.empty(3).normal_(generator=torch.Generator().manual_seed(0))
    tape.replay()
    assert torch.equal(x, expected) and torch.equal(y, expected + 1)
    tape.replay()
    assert not torch.equal(x, expected)


def test_a_wait_is_told_from_what_else_torch_warns_of():
    """The first warning comes once a process, from asking for the others, and speaks of the same."""
    notice = "Synchronization debug mode is a prototype feature and does not yet detect all "
    notice += "synchronizing operations"
    wait = "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:150.)"

    def told(*texts):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            for text in texts:
                warnings.warn(text, UserWarning, stacklevel=1)
        return heard

    assert not _recorded._waited(told(notice)) and _recorded._waited(told(notice, wait))
    with pytest.warns(UserWarning, match="something else"):
        assert not _recorded._waited(told("something else"))
