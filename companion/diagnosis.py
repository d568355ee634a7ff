"""Is a training well? Bands for its gauges, and what it means when one leaves its band.

An energy-based model has no loss that falls: L(theta) is near zero from the first update to the last, and a
training that has failed looks like one that has converged. What tells them apart are gauges, recorded at
every update by ``likelihood.ml_step``:

- ``rho``: drift over noise of the chain's last step, ``|eps^2/2 grad U| / (eps sqrt D)``. At stationarity on
  data of width s it is eps/2s, about 0.1 to 0.3; far above 1 the chain is descent, near 0 free diffusion;
- ``separation``: L(theta) in standard deviations of the data's energy. Healthy: both signs about 0. Negative
  and growing: the network tells negatives from data at a glance, and every update widens the gap
  (expansion). Positive for long: chains overshoot below the data (contraction);
- ``diversity``: total variance of the negatives over that of the data. Below 1 chains collapse on few
  states, above it they fly apart.

Source: Hill et al. 2022 and the appendix of Nijkamp et al. 2020 (expansion, contraction, oscillation); bands
and remedies are this book's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.langevin import DivergenceError

__all__ = ["BANDS", "Band", "Finding", "TrainingDiverged", "diagnose"]


@dataclass(frozen=True)
class Band:
    """Where a gauge belongs, and what to change when it is below or above."""

    low: float
    high: float
    below: str
    above: str


def _separation(width: float) -> Band:
    return Band(
        -width, width,
        below="the network tells chains from data at a glance (expansion). Is data_noise 1.5 to 3 step "
        "sizes? Do the steps suffice for the way from a birth to the data (more steps, nearer births)? "
        "Are chains stranded in the bank (raise rejuvenation, add base_std)? Then lower the learning rate",
        above="chains end far below the data (contraction): raise the temperature if rho was high from the "
        "start (too cold a sampler); else lower the learning rate or take fewer steps",
    )  # fmt: skip


_DIVERSITY = Band(
    0.2, 4.0,
    below="the chains sit in few places: a stale or small bank (raise rejuvenation), too cold a sampler "
    "(raise the temperature), or a collapsed generator (lower its learning rate)",
    above="the chains leave the data's range: add a confining base_std, raise rejuvenation, or raise the "
    "temperature if rho was high from the start",
)  # fmt: skip


def _drift(low: float, high: float) -> Band:
    return Band(
        low, high,
        below="free diffusion, the energy does not steer: lower the temperature or raise the learning rate",
        above="descent, the noise is decoration: give the data noise of 1.5 to 3 step sizes if they vary "
        "less than a step in some direction; raise the temperature if rho was high from the start; take more "
        "steps if chains come from afar; else lower the learning rate",
    )  # fmt: skip


#: regime -> gauge -> band, of means over 50 updates or more. Short-run training tolerates descent and a slow
#: start, the others do not. Set on digits: healthy runs of each regime stay inside over several seeds, each
#: failure of the chapter on failing trainings leaves at least one.
BANDS: dict[str, dict[str, Band]] = {
    "short": {"rho": _drift(0.01, 5.0), "separation": _separation(6.0), "diversity": _DIVERSITY},
    "mid": {"rho": _drift(0.01, 1.0), "separation": _separation(3.0), "diversity": _DIVERSITY},
    "long": {"rho": _drift(0.02, 0.8), "separation": _separation(3.0), "diversity": _DIVERSITY},
}


@dataclass(frozen=True)
class Finding:
    """One gauge outside its band: since which update, at what mean value over the last window."""

    gauge: str
    since: int
    value: float
    band: Band
    model: int | None = None  #: which of the stacked models, None for a single one

    @property
    def remedy(self) -> str:
        """What to change: the band's advice for the side on which the gauge is outside."""
        return self.band.below if self.value < self.band.low else self.band.above

    def __str__(self) -> str:
        whose = "" if self.model is None else f" of model {self.model}"
        return (
            f"{self.gauge}{whose} has been outside [{self.band.low:g}, {self.band.high:g}] since update "
            f"{self.since} (now {self.value:.3g}): {self.remedy}"
        )


class TrainingDiverged(DivergenceError):
    """A training was stopped. ``findings``: the gauges that left their bands, the earliest first."""

    def __init__(self, update: int, findings: list[Finding], cause: DivergenceError | None = None) -> None:
        self.update, self.findings = update, findings
        self.step, self.gauges = (None, None) if cause is None else (cause.step, cause.gauges)
        head = f"training stopped at update {update}" + ("" if cause is None else f": {cause}")
        alike: dict[tuple[str, str], list[Finding]] = {}  # one line for all models with the same complaint
        for finding in findings:
            alike.setdefault((finding.gauge, finding.remedy), []).append(finding)
        found = [f"- {group[0]}{_also(group[1:])}" for group in alike.values()] or [
            "No gauge had left its band before: a single update did it (a spike). Lower the learning rate, "
            "or give the data more noise."
        ]
        RuntimeError.__init__(self, "\n".join([head, *found]))


def _also(findings: list[Finding]) -> str:
    names = ", ".join(str(finding.model) for finding in findings)
    return f" (model{'s' * (len(findings) > 1)} {names} as well)" if findings else ""


def diagnose(
    history: Mapping[str, list[Tensor]], bands: Mapping[str, Band], window: int = 50
) -> list[Finding]:
    """The gauges of ``history`` whose mean over the last ``window`` updates lies outside its band.

    ``history`` as in ``likelihood.Run``: a list of scalars or of ``(S,)`` a gauge. ``since`` is the update
    at which the trailing mean left the band, not to come back: 0 if it has never been inside. Non-finite
    values count as outside. Fewer updates than a window give no finding; a gauge that was not recorded is
    passed over. The earliest finding comes first: later ones are often its consequences.
    """
    findings = []
    for name, band in bands.items():
        if name not in history or len(history[name]) < window:
            continue
        if _inside(torch.stack(history[name][-window:]).double().mean(0), band).all():
            continue  # the usual case, without a look at the whole history
        series = torch.stack(history[name]).double().cpu()
        models = series.unsqueeze(-1) if series.ndim == 1 else series
        for s, column in enumerate(models.unbind(-1)):
            mean = column.unfold(0, window, 1).mean(-1)  # (updates - window + 1,)
            inside = _inside(mean, band)
            if inside[-1]:
                continue
            since = int(inside.nonzero().max()) + window if inside.any() else 0
            model = None if series.ndim == 1 else s
            findings.append(Finding(name, since, mean[-1].item(), band, model))
    return sorted(findings, key=lambda finding: finding.since)


def _inside(mean: Tensor, band: Band) -> Tensor:
    return (mean >= band.low) & (mean <= band.high)  # asked this way round, NaN is outside
