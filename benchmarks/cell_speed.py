"""What a whole cell costs in two versions of the code, side by side: CPU seconds of old and new, and whether they say the same.

    git worktree add ../before <commit>
    python benchmarks/cell_speed.py ../before . --out benchmarks/cell_speed.json

Each cell of CELLS runs in a process of its own in one tree and then in the other, `--repeats` times in turn. A process tells its CPU
seconds (user and system, all threads) for imports and for the cell: other work on the machine does not count, but for how it slows a core
down, which it does to both. The ratio is that of the medians. Rewards, Phi and texts of both trees are compared line by line: a rounding
that turns one draw of a token shows as a text that differs, and what follows from there is another run of the same method. FLOPs are
equal as long as the texts are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

DPG = ("method=dpg", "steps=3", "snapshots=2")
TASKS = ("language", "sixseven", "uuid", "length")
CELLS = [(f"task={task}", *DPG) for task in TASKS] + [(f"task={task}", "method=active_inheritance", "n=8") for task in TASKS]

CHILD = """
import json, sys, time, tempfile
from pathlib import Path
from dpgbench import config
from dpgbench.bench import grpo
from dpgbench.bench.workbench import Workbench
from dpgbench.run import cell
words, folder = sys.argv[2:], sys.argv[1]
spec = config.read(words, sweep=False).cells[0].spec
imported = time.process_time()
cell.run_cell(spec, Path(folder), checkpoint_seconds=1e9, let_errors_out=True)
lines = [line for path in Path(folder).rglob("metrics.jsonl") for line in path.read_text().splitlines()]
result = [json.loads(path.read_text()) for path in Path(folder).rglob("result.json")]
print(json.dumps({"imports": imported, "cell": time.process_time() - imported, "lines": lines, "texts": result[0]["texts"]}))
"""


def run(tree: Path, words: tuple[str, ...]) -> dict:
    """CPU seconds of one cell in a process that imports `tree`, and what it left: metrics, and the last deployment texts."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHILD, folder, *words]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True)
    outcome = json.loads(done.stdout.splitlines()[-1])
    return {**outcome, "lines": [json.loads(line) for line in outcome["lines"]]}


def compared(old: dict, new: dict) -> dict:
    """How far apart the two trees' lines are: texts that differ; the largest relative difference of rewards and Phi while texts agree."""
    texts = differing = 0
    reward = phi = 0.0
    flops = True
    for left, right in zip(old["lines"], new["lines"], strict=True):
        flops = flops and left["flops"] == right["flops"]
        if "rollouts" in left:
            pairs = list(zip(left["rollouts"]["texts"], right["rollouts"]["texts"], strict=True))
            texts += len(pairs)
            differing += sum(a != b for a, b in pairs)
            if not differing:
                size = max(map(abs, left["rollouts"]["rewards"]))
                apart = max(abs(a - b) for a, b in zip(left["rollouts"]["rewards"], right["rollouts"]["rewards"], strict=True))
                reward = max(reward, apart / size)
        if "phi" in left and not differing:
            phi = max(phi, abs(left["phi"] - right["phi"]) / max(abs(left["phi"]), 1e-12))
    last = sum(a != b for a, b in zip(old["texts"], new["texts"], strict=True))
    return {
        "rollouts": texts, "rollouts_that_differ": differing, "last_deployment_texts_that_differ": last,
        "rewards_apart": reward, "phi_apart": phi, "equal_flops": flops,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs=2, type=lambda word: Path(word).resolve(), metavar="TREE", help="old and new")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="words that a cell must have")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = []
    for words in CELLS:
        if not set(asked.only) <= set(words):
            continue
        runs = [[run(tree, words) for tree in asked.trees] for _ in range(asked.repeats)]
        seconds = {part: [statistics.median(pair[tree][part] for pair in runs) for tree in (0, 1)] for part in ("imports", "cell")}
        row = {
            "cell": " ".join(words), "repeats": asked.repeats, "seconds": seconds, "ratio": seconds["cell"][0] / seconds["cell"][1],
            "ratio_with_imports": math.fsum(seconds[part][0] for part in seconds) / math.fsum(seconds[part][1] for part in seconds),
            **compared(*runs[0]),
        }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
        if asked.out:
            asked.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
