"""Say which GPU torch uses: ``python tools/device.py``; exit status 1 where it has none, or one that fails.

A run that was meant for a GPU must not go on quietly, and for hours, on a CPU.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Multiply two matrices on the GPU and compare with the CPU; returns the exit status."""
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        print(
            f"device: error: torch {torch.__version__}, {built}, sees no GPU; check the driver",
            file=sys.stderr,
        )
        return 1
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    difference = ((a.cuda() @ a.cuda()).cpu() - a @ a).abs().max().item()
    if not difference < 1e-9:
        print(f"device: error: a product on the GPU is wrong by {difference:g}", file=sys.stderr)
        return 1
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    print(f"device: {name}, {memory / 2**30:.0f} GiB, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
