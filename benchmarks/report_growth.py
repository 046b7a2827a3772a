"""How `report` grows with cells: made-up suites of 500, 2,000 and 20,000 cells as parquet files, then the command on each.

    python benchmarks/report_growth.py                      a table: cells, processor seconds and peak memory of JSON and of the page
    python benchmarks/report_growth.py --cells 2000 --json  one size, without the page

Ten tasks of 25 methods (base, an oracle, eight that train and have 8 snapshots a cell, fifteen with one), and as many seeds as the cells
ask for. Scores are random around a curve that saturates; texts, settings and environment are as long as a real cell's. Nothing is trained:
only what `report` does with stored numbers is measured. Each command runs in a process of its own, once; its processor seconds and the
peak of its resident set are what the operating system counted for it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from growth import measured

SIZES = (500, 2_000, 20_000)
TASKS, METHODS, WITH_CURVES = 10, 25, 8
STEPS = np.array([0, 1, 2, 4, 8, 15, 30, 60])
TEXTS = json.dumps(["the cat that sleeps in the house sees a small bird in the garden ."] * 12)
SPEC = "\n".join(f"setting_{number}: value {number}" for number in range(120))
ENV = json.dumps({"dpgbench": "0.1.0", "commit": "", "python": "3", "packages": {"torch": "2"}, "machine": "", "device": "cpu"})


def made_up(cells: int) -> pd.DataFrame:
    """The frame of a suite: a row per (cell, snapshot), in the columns of `store/parquet.py`."""
    rng = np.random.default_rng(0)
    frames = []
    for task in range(TASKS):
        for method in range(METHODS):
            name = {0: "base", 1: "oracle"}.get(method, f"method_{method:02d}")
            steps = STEPS if 2 <= method < 2 + WITH_CURVES else STEPS[-1:]
            seeds = cells // (TASKS * METHODS)
            level = {0: 0.0, 1: 1.0}.get(method, 0.9 * method / METHODS)
            values = level * (1 - np.exp(-(steps + 1) / 15)) + rng.normal(0, 0.05, (seeds, 1)) + rng.normal(0, 0.02, (seeds, len(steps)))
            last = np.tile(steps == steps[-1], seeds)
            seed = np.repeat(np.arange(seeds), len(steps))
            flops = np.tile(1e9 * (1 + method / 10) * (steps + 1.0), seeds)
            blobs = {key: np.where(last, text, None) for key, text in (("texts", TEXTS), ("spec", SPEC), ("env", ENV))}
            frames.append(
                pd.DataFrame(
                    {
                        "cell": [f"task_{task}.{name}.s{number}" for number in seed], "task": f"task_{task}", "task_label": f"task_{task}",
                        "task_description": "A made-up task.", "method": name, "method_label": name, "seed": seed, "status": "done",
                        "reason": None, "step": np.tile(steps, seeds), "flops": flops,
                        "flops_by_phase": json.dumps({"rollouts": 6e8, "metagradients": 3e8, "deployment": 1e8}),
                        "tokens_generated": 1e4, "tokens_trained": 1e4, "seconds": 10.0, "phi": values.ravel() - 1, "headline": "accuracy",
                        "higher_is_better": True, "metric:accuracy": values.ravel(), "metric:another": rng.random(values.size), **blobs,
                        "picture": None,
                    }
                )
            )  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def main() -> None:
    from dpgbench.store.parquet import write_parquet

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=SIZES, help=f"multiples of {TASKS * METHODS}")
    parser.add_argument("--json", action="store_true", help="leave the page and its figures out")
    options = parser.parse_args()
    for cells in options.cells:
        with tempfile.TemporaryDirectory() as folder:
            write_parquet(made_up(cells), Path(folder) / "growth.parquet", suite="growth", title="made up", command="none")
            print(f"| {cells:,} cells |", end="", flush=True)
            for more in ([], ["--format", "json"])[1 if options.json else 0 :]:
                print(f" {measured('report', 'name=growth', f'results={folder}', *more)} |", end="", flush=True)
            print()


if __name__ == "__main__":
    main()
