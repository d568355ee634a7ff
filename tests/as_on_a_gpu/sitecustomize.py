"""Put on PYTHONPATH, this makes a notebook's kernel sample and train as on a GPU, with tapes for CUDA graphs.

Every recording, and every one that was given up, is a line in the file that ``TAPES`` names.
"""

from __future__ import annotations

import os
import sys

if "TAPES" in os.environ and "ipykernel" in " ".join(sys.orig_argv):
    from tape import tape_capture

    from companion import _compiled, _recorded

    def note(line: str) -> None:
        with open(os.environ["TAPES"], "a", encoding="utf-8") as file:
            file.write(line + "\n")

    class Noted(list):
        def append(self, tape: object) -> None:  # forgotten, but counted: an update's tensors take memory
            note("recorded")

    give_up_step, give_up_updates = _compiled.give_up, _recorded.Steps._give_up

    def step_given_up(energy: object) -> None:
        note(f"given up: a step of {type(energy).__name__}: {sys.exc_info()[1]}")
        give_up_step(energy)

    def updates_given_up(steps: _recorded.Steps, reason: str) -> None:
        note(f"given up: {reason}")
        give_up_updates(steps, reason)

    _compiled._mechanism = lambda device: "graph"
    _compiled._capture = tape_capture(Noted())
    _compiled.give_up, _recorded.Steps._give_up = step_given_up, updates_given_up
    # The sizes are those of tests: eight updates must be enough for a recording and its replays.
    _compiled.STRIDE, _compiled.KEPT, _compiled.PAYS, _recorded.SHORTEST = 3, 2, 4, 6
