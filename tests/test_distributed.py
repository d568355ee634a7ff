"""Two processes as one: started by torchrun on the CPU, they must do what one process does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from companion import chains, checkpoint, distributed
from companion.distributed import Team

ROOT = Path(__file__).parents[1]

COMMON = """\
import os, signal, sys, json
import torch
from companion import chains, distributed, gan, likelihood, networks
from companion.energies import GaussianMixture

def made(seed=0, network=False):
    rng = torch.Generator().manual_seed(seed)
    data = GaussianMixture.ring().sample(400, rng)
    energy = networks.MLPEnergy((2,), (16, 16), generator=rng)
    bank = chains.Bank(40, chains.born_from_noise((2,)), rejuvenation=0.2, generator=rng)
    run = likelihood.Run(energy, torch.optim.Adam(energy.parameters(), 1e-2), bank, rng)
    return run, data, rng

settings = dict(batch=16, steps=3, step_size=0.1, temperature=1.0, data_noise=0.0, window=3, progress=False)
team = distributed.team("cpu")
settings["team"] = team
flat = lambda net: torch.cat([p.detach().flatten() for p in net.parameters()])
"""

IDENTITIES = (
    COMMON
    + """
same = lambda t: len({tuple(row) for row in team.gather(t.detach().double()[None], 0).tolist()}) == 1
checks = {}
# One step's gradient: DDP over halves against one process with the joined batch.
run, data, rng = made()
negative = torch.empty(16, 2).uniform_(-1, 1, generator=rng)
likelihood.ml_loss(run.energy, data[:16], negative, 0.5).backward()
joined = torch.cat([p.grad.flatten() for p in run.energy.parameters()])
run.energy.zero_grad()
likelihood.ml_loss(team.parallel(run.energy), data[:16][team.rank::2], negative[team.rank::2], 0.5).backward()
shared = torch.cat([p.grad.flatten() for p in run.energy.parameters()])
checks["ml gradient"] = (shared - joined).abs().max().item() / joined.abs().max().item()
# Freezing, as the sampler does, must not unhook DDP.
from companion.langevin import langevin
langevin(run.energy, negative, 2, 0.1, generator=rng)
run.energy.zero_grad()
likelihood.ml_loss(team.parallel(run.energy), data[:16][team.rank::2], negative[team.rank::2], 0.5).backward()
again = torch.cat([p.grad.flatten() for p in run.energy.parameters()])
checks["after sampling"] = (again - joined).abs().max().item() / joined.abs().max().item()
# The critic's step, with the penalty's double backward (on the same random points).
critic = networks.MLPEnergy((2,), (16,), activation=torch.nn.ReLU, generator=rng)
fake = data[100:116].flip(0)
penalised = lambda r, f: (gan.critic_loss(critic, r, f)[0] + 10 * ((torch.autograd.grad(
    critic(x := r.clone().requires_grad_(True)).sum(), x, create_graph=True)[0].norm(dim=1) - 1) ** 2).mean())
penalised(data[:16], fake).backward()
joined = torch.cat([p.grad.flatten() for p in critic.parameters()])
critic.zero_grad()
penalised(data[:16][team.rank::2], fake[team.rank::2]).backward()
team.average_gradients(critic)
shared = torch.cat([p.grad.flatten() for p in critic.parameters()])
checks["critic gradient"] = (shared - joined).abs().max().item() / joined.abs().max().item()
# A training: one model in the end, one bank, generators in step, and half of the chains each meanwhile.
run, data, rng = made()
before = run.bank.x.clone()
likelihood.train(run, data, 7, **settings)
checks["one energy"] = same(flat(run.energy))
checks["one bank"] = same(run.bank.x.flatten()) and run.bank.size == 40 and len(run.bank.x) == 40
checks["moved chains"] = int((run.bank.x != before).any(1).sum())
checks["generators in step"] = run.rng is rng and same(torch.rand(3, generator=rng))
checks["one history"] = same(run.gauge("d")) and len(run.gauge("d")) == 7
# Three chains of ages beside: what was dealt out comes back in its order.
order = torch.arange(6).reshape(1, 6)
mine = order.unflatten(1, (3, 2)).select(2, team.rank)
checks["gathered in order"] = torch.equal(team.gather(mine, 1), order)
# The pair.
rng = torch.Generator().manual_seed(1)
network = networks.PointGenerator(2, 2, (16,), generator=rng)
pair = gan.new_run(network, networks.MLPEnergy((2,), (16,), generator=rng), rate=1e-3, average=0.9, rng=rng)
gan.train(pair, data, 3, batch=8, penalty=1.0, penalty_batch=4, progress=False, team=team)
checks["one pair"] = all(same(flat(net)) for net in (pair.network, pair.critic, pair.average))
checks["pair's generators in step"] = same(torch.rand(3, generator=rng))
try:
    likelihood.train(made()[0], data, 1, **{**settings, "batch": 15})
except ValueError as error:
    checks["odd batch"] = str(error)
if team.rank == 0:
    print("CHECKS " + json.dumps(checks))
"""
)

TRAINING = (
    COMMON
    + """
folder, victim = sys.argv[1], int(sys.argv[2])
run, data, rng = made(3)
if victim >= 0:
    step = likelihood.ml_step
    def dying(run, *args, **kwargs):
        if run.update == 6 and run.team.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(run, *args, **kwargs)
    likelihood.ml_step = dying
likelihood.train(run, data, 9, **settings, checkpoint=folder, checkpoint_every=4)
if team.rank == 0:
    digest = [flat(run.energy).tolist(), run.bank.x.tolist(), run.gauge("d").tolist()]
    print("DIGEST " + json.dumps([*digest, torch.rand(2, generator=rng).tolist()]))
"""
)


def launch(script: Path, *args: object, processes: int = 2) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(script), *map(str, args)], capture_output=True, text=True, timeout=280, env=env
    )


def told(result: subprocess.CompletedProcess, word: str) -> object:
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith(word)]
    return json.loads(line.removeprefix(word))


def test_two_processes_take_the_gradients_of_one_and_stay_one_model(tmp_path):
    (tmp_path / "identities.py").write_text(IDENTITIES, encoding="utf-8")
    checks = told(launch(tmp_path / "identities.py"), "CHECKS")
    for name in ("ml gradient", "after sampling", "critic gradient"):
        assert checks.pop(name) < 1e-6, name
    assert checks.pop("moved chains") > 30  # both halves walked
    assert "15 cannot be shared evenly by 2" in checks.pop("odd batch")
    assert checks and all(value is True for value in checks.values()), checks


def test_a_killed_process_ends_the_job_and_the_next_start_resumes_all(tmp_path):
    script = tmp_path / "training.py"
    script.write_text(TRAINING, encoding="utf-8")
    whole = told(launch(script, tmp_path / "whole", -1), "DIGEST")
    died = launch(script, tmp_path / "broken", 1)
    assert died.returncode != 0 and "DIGEST" not in died.stdout
    assert "SIGKILL" in died.stderr or "exitcode  : -9" in died.stderr  # torchrun says which, and of what
    header = json.loads((tmp_path / "broken/checkpoint.json").read_text(encoding="utf-8"))
    assert (header["update"], header["processes"]) == (4, 2)
    assert told(launch(script, tmp_path / "broken", -1), "DIGEST") == whole
    folders = sorted(p.name for p in (tmp_path / "broken").glob("update-*"))
    assert folders == ["update-0000009"]  # the one before is gone
    # One process cannot go on where two stopped, and is told what to start.
    with pytest.raises(
        checkpoint.CheckpointError, match="written by 2 processes.*torchrun --nproc-per-node 2"
    ):
        checkpoint.load(tmp_path / "broken", {}, {}, torch.Generator(), torch.device("cpu"))


def test_a_team_refuses_the_checkpoint_of_one_process(tmp_path):
    checkpoint.save(tmp_path, 1, {}, {}, torch.Generator(), {})
    duo = Team(0, 2, torch.device("cpu"))
    with pytest.raises(checkpoint.CheckpointError, match="written by 1 process, this job has 2"):
        checkpoint.load(tmp_path, {}, {}, torch.Generator(), torch.device("cpu"), team=duo)


def test_dealing_out_a_bank_is_every_second_chain():
    rng = torch.Generator().manual_seed(0)
    bank = chains.Bank(6, chains.born_from_noise((2,)), rejuvenation=0.5, stack=3, generator=rng)
    whole = bank.x.clone()
    bank.deal(Team(1, 2, torch.device("cpu")))
    assert bank.size == 3 and torch.equal(bank.x, whole[:, 1::2]) and bank.age.shape == (3, 3)
    with pytest.raises(ValueError, match="a bank of 3 cannot be shared evenly by 2 processes: take 2 or 4"):
        bank.deal(Team(1, 2, torch.device("cpu")))


def test_an_ordinary_process_has_no_team():
    assert distributed.team("cpu") is None


@pytest.fixture
def project(tmp_path):
    """The real chapters in a folder whose build belongs to this test."""
    for name in ("book", "companion"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("_toc.yml", "_config.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_a_chapter_is_run_by_two_processes_and_kept_by_the_first(project):
    asked = ["--root", project, "--profile", "smoke", "--no-build"]
    result = launch(project / "book/run.py", *asked, "--only", "short-run", "--set", "checkpoints=made")
    assert result.returncode == 0, result.stderr[-3000:]
    ours, theirs = (
        json.loads((project / "build/smoke" / part / "results/short-run.json").read_text(encoding="utf-8"))
        for part in ("", "rank-1")
    )
    assert ours["figures"]["fd_refined"] == theirs["figures"]["fd_refined"]  # one model, judged alike
    kept = project / "made/short-run/digits-bank-0/checkpoint.json"
    header = json.loads(kept.read_text(encoding="utf-8"))
    assert header["processes"] == 2
    refused = launch(project / "book/run.py", *asked, "--only", "energy-and-langevin")
    assert refused.returncode != 0
    assert "energy-and-langevin: several processes have nothing to share there" in refused.stderr
