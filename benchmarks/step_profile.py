"""Where a DPG step's time goes: the parts of one cell's steps, on a CPU or a GPU.

    python benchmarks/step_profile.py task=language steps=6 snapshots=2
    python benchmarks/step_profile.py scale=small task=language threads=1 steps=3 snapshots=1 deployment_texts=8

Words are those of `run`; `--json` prints the numbers for machines. A clock stands around each part: on a GPU the wall's, with the device
synchronised at both ends; on a CPU the process's own, which other processes on the machine do not slow down. The first step, which loads
and counts, is told apart. Scoring is the harness's, once a snapshot, and no part of a step.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from dpgbench import config
from dpgbench.bench import differentiating, grpo
from dpgbench.metagrad import differentiate, training
from dpgbench.run import cell
from dpgbench.worlds import models

PARTS = {  # name: (where the function is looked up, its name)
    "sampling": (grpo._Trainer, "_generate_single_turn"),
    "rewards": (grpo._Loop, "advantages_of"),
    "  of which metagradients": (differentiating, "metagradients"),
    "    of which training the target": (differentiate._Run, "segment"),
    "    of which Phi": (differentiate, "signal_gradients"),
    "    of which the reverse pass": (differentiate._Run, "reverse"),
    "update: forward and backward": (grpo._Trainer, "training_step"),
    "  of which forward": (grpo._Trainer, "_compute_loss"),
    "update: optimizer": (torch.optim.AdamW, "step"),
    "scoring, a snapshot": (cell._Cell, "_score"),
    "  scoring: sampling": (models.Generator, "sample"),
    "  scoring: training the target": (training, "train"),
}


SCORING = [name for name in PARTS if name.strip().startswith("scoring")]
clock = time.perf_counter if torch.cuda.is_available() else time.process_time


class Clocks:
    """Seconds by part and step; a part inside another is counted in both."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.now: Counter[str] = Counter()

    def around(self, name: str, function: Callable) -> Callable:
        def timed(*arguments, **named):
            synchronise()
            start = clock()
            try:
                return function(*arguments, **named)
            finally:
                synchronise()
                self.now[name] += clock() - start

        return timed

    def step_is_over(self, seconds: float) -> None:
        self.now["step"] = seconds
        self.now["update: forward and backward"] -= self.now["sampling"] + self.now["rewards"]  # which TRL asks for inside it
        for name in ("step", *PARTS):
            self.seconds[name].append(self.now[name])
        self.now.clear()


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def profile(spec) -> Clocks:
    """Run a cell in a folder of its own with clocks around its parts."""
    clocks, last = Clocks(), [clock()]
    originals = {name: getattr(*place) for name, place in PARTS.items()}
    for name, (place, attribute) in PARTS.items():
        setattr(place, attribute, clocks.around(name, originals[name]))

    def watch(line: dict) -> None:
        if "step" in line:
            synchronise()
            clocks.step_is_over(clock() - last[0] - clocks.now["scoring, a snapshot"])
            last[0] = clock()

    try:
        with tempfile.TemporaryDirectory() as results:
            cell.run_cell(spec, Path(results), watch=watch, checkpoint_seconds=1e9, let_errors_out=True)
    finally:
        for name, (place, attribute) in PARTS.items():
            setattr(place, attribute, originals[name])
    for name in SCORING:  # of the last snapshot, after the last step
        clocks.seconds[name].append(clocks.now[name])
    return clocks


def table(clocks: Clocks) -> list[tuple[str, float, float, float]]:
    """(part, seconds in the first step, median of the others, its share of the step's median)."""
    whole = statistics.median(clocks.seconds["step"][1:])
    rows = []
    for name in ("step", *PARTS):
        first, *others = clocks.seconds[name] if name not in SCORING else [value for value in clocks.seconds[name] if value] * 2
        middle = statistics.median(others)
        rows.append((name, first, middle, middle / whole))
    return rows


def main(words: list[str]) -> None:
    spec = config.read([word for word in words if word != "--json"], sweep=False).cells[0].spec
    rows = table(profile(spec))
    if "--json" in words:
        print(json.dumps([dict(zip(("part", "first", "median", "share"), row, strict=True)) for row in rows]))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads, processor time"
    print(f"{spec.folder} on {device}: seconds")
    print(f"{'':44}{'first step':>12}{'median after':>14}{'share':>8}")
    for name, first, middle, share in rows:
        print(f"{name:44}{first:12.3f}{middle:14.3f}{'' if name in SCORING else f'{share:8.0%}'}")


if __name__ == "__main__":
    main(sys.argv[1:])
