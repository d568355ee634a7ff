"""Energy-based models by Langevin, Stein and adversary: the package behind *Downhill with Noise*.

One convention everywhere: p(x) is proportional to exp(-E(x)/T); an energy maps a batch
``(B, *shape)`` to ``(B,)``; one Langevin step of size eps is
``x - eps**2 / 2 * grad E(x) / T + eps * z`` with z standard normal.
"""

__version__ = "0.1.0"
