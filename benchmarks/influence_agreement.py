"""How far each influence estimate agrees with what it estimates, on texts of the untouched generator.

    python benchmarks/influence_agreement.py

For each task, Spearman's rank correlation over texts of the reward of every estimator with (a) the metagradients of one training run on
all of them, which DPG pays, and (b) Phi after one step on that text alone. Seed 100, a tuning seed. Words after the script's name are
settings, such as task=language; TEXTS of the environment says how many texts (default 256).
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from scipy.stats import spearmanr

from dpgbench import config
from dpgbench.run.cell import RunContext, _Cell
from dpgbench.store.run_folder import RunFolder

TASKS = ("language", "l2_norm", "sixseven", "uuid")
DAMPINGS = (0.01, 0.1, 1.0)


def agreement(words: list[str], count: int) -> dict[str, tuple[float, float]]:
    """By estimator: the two correlations."""
    spec = config.read([*words, "method=influence", "seed=100"], sweep=False).cells[0].spec
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder.of(Path(scratch), spec)
        folder.path.mkdir(parents=True)
        bench = _Cell(spec, RunContext(folder)).bench
        texts, learnt = (bench.sample(bench.prompts(n, name), name) for n, name in ((count, "agreement"), (512, "influence")))
        paid = bench.metagradients(texts, "agreement").rewards
        alone = torch.tensor(bench.one_step_utilities(texts), dtype=torch.float64)
        rewards = {"dot": bench.influences(texts), "adam": bench.influences(texts, optimizer_aware=True)}
        rewards["less"] = bench.influences(texts, optimizer_aware=True, checkpoint=bench.warmed_up(learnt, 8))
        for damping in DAMPINGS:
            direction = bench.inverse_curvature_product(learnt, damping=damping)
            rewards[f"ekfac, damping {damping:g}"] = bench.influences(texts, direction=direction)
    return {name: tuple(float(spearmanr(values, other).statistic) for other in (paid, alone)) for name, values in rewards.items()}


if __name__ == "__main__":
    given = sys.argv[1:]
    for task in [word for word in given if word.startswith("task=")] or [f"task={name}" for name in TASKS]:
        rest = [word for word in given if not word.startswith("task=")]
        for name, (metagradient, utility) in agreement([task, *rest], int(os.environ.get("TEXTS", "256"))).items():
            print(f"{task:15} {name:20} metagradient {metagradient:+.2f}   one-step utility {utility:+.2f}", flush=True)
