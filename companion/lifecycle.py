"""The regimes of the EBM life cycle (Hill et al. 2022) as ready-made runs.

One network, one loss, one sampler: a regime is where its chains are born and how old they may become.
``short_run`` (with its controls), ``mid_run`` and ``long_run`` make a run for ``likelihood.train``; what is
measured on a trained run of any regime is ``quality_over_steps``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from companion.chains import Bank, Birth, LongRunBank, born_from, born_from_noise
from companion.energies import energy_and_gradient
from companion.langevin import langevin
from companion.likelihood import Run
from companion.networks import ConvEnergy, ConvGenerator, MLPEnergy, MLPGenerator, ResidualEnergy

__all__ = ["ARMS", "Corrected", "long_run", "mid_run", "quality_over_steps", "short_run"]

#: arm -> (does a generator give birth?, probability of rejuvenation): all that tells the arms apart.
ARMS = {"bank": (True, 0.5), "no_bank": (True, 1.0), "noise_birth": (False, 1.0)}


# network -> its energy, of (shape, width, rng, precision), and its generator, of (shape, width, latent,
# stack, rng). The MLP's energy has no width and is made in _energy.
_NETWORKS: dict[str, tuple[Callable[..., nn.Module] | None, Callable[..., nn.Module]]] = {
    "mlp": (
        None,
        lambda shape, width, latent, stack, rng: MLPGenerator(shape, latent, stack=stack, generator=rng),
    ),
    "conv": (
        ConvEnergy,
        lambda shape, width, latent, stack, rng: ConvGenerator(shape, latent, 2 * width, rng),
    ),
    "residual": (
        ResidualEnergy,
        lambda shape, width, latent, stack, rng: ConvGenerator(shape, latent, width, rng),
    ),
}


def short_run(
    arm: str,
    shape: tuple[int, int, int],
    *,
    rate: float,
    network_rate: float,
    rng: torch.Generator,
    stack: int | None = None,
    bank_size: int = 2000,
    batch: int = 128,
    network: str = "mlp",
    width: int = 32,
    latent: int = 16,
    device: torch.device | str = "cpu",
    precision: str = "auto",
) -> Run:
    """A run of the short-run regime, ready for ``likelihood.train``.

    ``arm`` is ``"bank"`` (the method: births from a generator taught by the chains, half of the drawn
    chains reborn, at most four visits), ``"no_bank"`` (the same, every chain reborn at each update:
    cooperative learning) or ``"noise_birth"`` (no generator, chains from uniform noise). ``network`` is
    ``"mlp"`` (which can train ``stack`` seeds side by side), ``"conv"`` (the small convolutional energy of
    ``width`` and a generator of twice that) or ``"residual"`` (the paper's SNGAN-32 pair, width 256 there).
    Adam with ``rate`` for the energy and ``network_rate`` for the generator. ``precision`` is that of a
    convolutional energy's convolutions: "float32", "bfloat16", or "auto", which takes bfloat16 on a GPU that
    has units for it.

    Raises ``ValueError`` for an unknown arm, network or precision, and for stacked convolutional networks.
    """
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}: choose one of {', '.join(ARMS)}")
    with_generator, rejuvenation = ARMS[arm]
    energy = _energy(network, shape, width, (256, 256), stack, rng, precision, device)
    generator = _NETWORKS[network][1](shape, width, latent, stack, rng).to(device) if with_generator else None
    birth = born_from_noise(shape, device=device) if generator is None else born_from(generator)
    size = batch if rejuvenation == 1 else bank_size  # without memory a larger bank would never be read
    bank = Bank(size, birth, rejuvenation=rejuvenation, max_visits=4, stack=stack, generator=rng)
    adam = torch.optim.Adam(energy.parameters(), lr=rate)
    if generator is None:
        return Run(energy, adam, bank, rng)
    return Run(energy, adam, bank, rng, generator, torch.optim.Adam(generator.parameters(), lr=network_rate))


def mid_run(
    shape: tuple[int, ...],
    birth: Birth,
    *,
    rate: float,
    rejuvenation: float,
    rng: torch.Generator,
    stack: int | None = None,
    bank_size: int = 4000,
    network: str = "mlp",
    width: int = 32,
    hidden: tuple[int, ...] = (256, 256),
    device: torch.device | str = "cpu",
    precision: str = "auto",
) -> Run:
    """A run of the mid-run regime: births from data or a frozen generator, rare rejuvenation, no limit.

    With K steps a visit the age at use is geometric with mean K / ``rejuvenation``; the design rule is that
    this mean equals the number of steps of the purification that the model is for (Hill et al. 2022: 2,000).
    ``birth`` is ``born_from_data(...)`` or ``born_from(generator)``; nobody teaches that generator here.
    Networks as in ``short_run``; ``hidden`` are the widths of the ``"mlp"``. Adam with ``rate``.

    Raises ``ValueError`` for an unknown network and for stacked convolutional ones.
    """
    energy = _energy(network, shape, width, hidden, stack, rng, precision, device)
    bank = Bank(bank_size, birth, rejuvenation=rejuvenation, stack=stack, generator=rng)
    return Run(energy, torch.optim.Adam(energy.parameters(), lr=rate), bank, rng)


def long_run(
    shape: tuple[int, ...],
    birth: Birth,
    *,
    rate: float,
    visits: int,
    rng: torch.Generator,
    prior: nn.Module | None = None,
    stack: int | None = None,
    bank_size: int = 2000,
    burn_in_size: int = 256,
    network: str = "mlp",
    width: int = 32,
    hidden: tuple[int, ...] = (256, 256),
    device: torch.device | str = "cpu",
    precision: str = "auto",
) -> Run:
    """A run of the long-run regime: a chain may teach only after ``visits`` visits in the burn-in bank.

    With a ``prior`` (a trained energy of the same stack, frozen here) the new network is a correction on
    top of it, E = f + g (:class:`Corrected`), whose last layer starts at zero: the run starts as the prior.
    Without one this is the same policy in a single stage. The counters of the burn-in bank start
    staggered, so that graduations are spread evenly.
    Source: Hill et al. 2022, second stage of the long-run regime. Arguments and errors as in ``mid_run``.
    """
    net = _energy(network, shape, width, hidden, stack, rng, precision, device)
    update, burn_in = (
        Bank(size, birth, rejuvenation=0.0, stack=stack, generator=rng) for size in (bank_size, burn_in_size)
    )
    burn_in.stagger(visits, rng)
    energy = net
    if prior is not None:
        energy = Corrected(net, prior)
        with torch.no_grad():
            list(net.parameters())[-1].zero_()  # bias-free: the last layer's weights
    adam = torch.optim.Adam(net.parameters(), lr=rate)
    return Run(energy, adam, LongRunBank(update, burn_in, visits), rng)


class Corrected(nn.Module):
    """E(x) = f(x) + g(x): a trainable ``correction`` f on top of a frozen ``prior`` energy g.

    The gradient of the likelihood in f's weights needs samples of the sum, and nothing of g's weights, which
    are frozen here for good. Shapes as those of the two energies. Source: Hill et al. 2022, section on
    long-run learning; there each term has a temperature of its own, here they share T.
    """

    def __init__(self, correction: nn.Module, prior: nn.Module) -> None:
        super().__init__()
        self.correction, self.prior = correction, prior.requires_grad_(False)
        self.stack = getattr(correction, "stack", None)

    def forward(self, x: Tensor) -> Tensor:
        """E(x) = f(x) + g(x); shapes as those of the two energies."""
        return self.correction(x) + self.prior(x)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E and its gradient in x, each term's by its own closed form where it has one."""
        (f, df), (g, dg) = (energy_and_gradient(part, x) for part in (self.correction, self.prior))
        return f + g, df + dg


def _energy(
    network: str,
    shape: tuple[int, ...],
    width: int,
    hidden: tuple[int, ...],
    stack: int | None,
    rng: torch.Generator,
    precision: str,
    device: torch.device | str,
) -> nn.Module:
    if network not in _NETWORKS:
        raise ValueError(f"unknown network {network!r}: choose one of {', '.join(_NETWORKS)}")
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f'precision is "auto", "float32" or "bfloat16", got {precision!r}')
    if network == "mlp":
        return MLPEnergy(shape, hidden, stack=stack, generator=rng).to(device)
    if stack is not None:
        raise ValueError("convolutional networks are not stacked: train the seeds one after another")
    if precision == "auto":  # older GPUs only pretend to know bfloat16
        quick = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(False)
        precision = "bfloat16" if quick else "float32"
    kind = torch.bfloat16 if precision == "bfloat16" else None
    return _NETWORKS[network][0](shape, width, rng, kind).to(device)


def quality_over_steps(
    run: Run,
    marks: Sequence[int],
    count: int,
    score: Callable[[Tensor], float],
    *,
    step_size: float,
    temperature: float,
    base_std: float | None = None,
    rng: torch.Generator | None = None,
) -> tuple[list[list[float]], dict[int, Tensor]]:
    """Score fresh chains after each number of test steps in ``marks`` (increasing, may start at 0).

    ``count`` chains a model are born as in training (a generator in eval mode) and walk without clamping;
    ``score`` sees ``(count, *shape)`` states clamped to [-1, 1]. Returns the scores, a row a mark and an
    entry a stacked model, and the clamped states by mark, ``(*stack, count, *shape)``. Raises
    ``DivergenceError`` if a chain leaves every bound.
    """
    if run.network is not None:
        run.network.eval()
    x, _ = run.bank.birth((*run.bank.stack, count), rng)
    if run.network is not None:
        run.network.train()
    scores, states, done = [], {}, 0
    for mark in marks:
        if mark > done:
            x = langevin(
                run.energy, x, mark - done, step_size,
                temperature=temperature, base_std=base_std, generator=rng,
            ).x  # fmt: skip
            done = mark
        states[mark] = x.clamp(-1, 1)
        scores.append([score(part) for part in (states[mark] if run.bank.stack else [states[mark]])])
    return scores, states
