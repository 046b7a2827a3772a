"""What a whole cell costs in two versions of the code, side by side: CPU seconds of old and new, and whether they say the same.

    git worktree add ../before <commit>
    python benchmarks/cell_speed.py ../before . --out benchmarks/cell_speed.json

Each cell of CELLS runs in a process of its own in one tree and then in the other, `--repeats` times in turn. A process tells its CPU
seconds (user and system, all threads): its start (imports, and loading a model once), the cell, and in it a step after the first. Other
work on the machine does not count, but for how it slows a core down, which it does to both. Ratios are those of the medians.

Rewards, Phi and texts of both trees are compared line by line. A rounding that turns one draw of a token shows as a text that differs, and
what follows from there is another run of the same method. FLOPs are equal as long as the texts are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TASKS = {"language": (), "sixseven": (), "uuid": ("deployment_steps=16",), "length": ()}
METHODS = {"dpg": ("steps=4", "snapshots=2"), "active_inheritance": ("n=8",)}
CELLS = [
    (f"task={task}", f"method={method}", "deployment_texts=256", *more, *words)
    for method, words in METHODS.items()
    for task, more in TASKS.items()
]

CHILD = """
import json, sys, time
from pathlib import Path
from matplotlib.backends import backend_agg
from dpgbench import config
from dpgbench.bench import grpo
from dpgbench.run import cell
from dpgbench.worlds.models import load_generator, load_target
folder, *words = sys.argv[1:]
spec = config.read(words, sweep=False).cells[0].spec
load_generator(spec.scale), load_target(spec.scale)  # what transformers prepares at its first model is no work of the cell's
began, marks = time.process_time(), []
watch = lambda line: marks.append((*line.keys() & {"step", "snapshot"}, time.process_time()))
cell.run_cell(spec, Path(folder), watch=watch, checkpoint_seconds=1e9, let_errors_out=True)
ended = time.process_time()
steps = [b - a for (_, a), (kind, b) in zip(marks, marks[1:]) if kind == "step"]
found = {path.name: path.read_text() for path in Path(folder).rglob("*.json*")}
lines = {name: [json.loads(line) for line in found.get(name, "").splitlines()] for name in ("metrics.jsonl", "rollouts.jsonl")}
print(json.dumps({"start": began, "cell": ended - began, "steps": steps[1:], **lines, "texts": json.loads(found["result.json"])["texts"]}))
"""


def run(tree: Path, words: tuple[str, ...]) -> dict:
    """CPU seconds of one cell in a process that imports `tree`, and what it left: metrics, rollouts, deployment texts."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", CHILD, folder, *words]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, encoding="utf-8", check=True)
    outcome = json.loads(done.stdout.splitlines()[-1])
    return {**outcome, "step": statistics.median(outcome["steps"] or [0.0])}


def apart(left: list[float], right: list[float]) -> float:
    """The largest difference, over the largest size."""
    return max(abs(a - b) for a, b in zip(left, right, strict=True)) / max(map(abs, left))


def compared(old: dict, new: dict) -> dict:
    """How far apart the two trees' lines are: texts that differ; the largest relative difference of rewards and Phi while texts agree."""
    steps = list(zip(old["rollouts.jsonl"], new["rollouts.jsonl"], strict=True))
    differing = [sum(a != b for a, b in zip(left["texts"], right["texts"], strict=True)) for left, right in steps]
    equal = next((place for place, count in enumerate(differing) if count), sys.maxsize)
    metrics = list(zip(old["metrics.jsonl"], new["metrics.jsonl"], strict=True))
    phis = [(left["phi"], right["phi"]) for left, right in metrics if "phi" in left and left.get("step", left.get("snapshot")) <= equal]
    return {
        "rollouts": sum(len(left["texts"]) for left, _ in steps), "rollouts_that_differ": sum(differing),
        "deployment_texts_that_differ": sum(a != b for a, b in zip(old["texts"], new["texts"], strict=True)),
        "rewards_apart": [apart(left["rewards"], right["rewards"]) for left, right in steps[:equal]],
        "phi_apart": max((apart([a], [b]) for a, b in phis), default=None),
        "flops_apart": apart([left["flops"] for left, _ in metrics], [right["flops"] for _, right in metrics]),
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
        seconds = {part: [statistics.median(pair[tree][part] for pair in runs) for tree in (0, 1)] for part in ("start", "cell", "step")}
        (start, new_start), (cell, new_cell), (step, new_step) = seconds.values()
        row = {
            "cell": " ".join(words), "repeats": asked.repeats, "seconds": seconds, "ratio": cell / new_cell,
            "ratio_with_start": (start + cell) / (new_start + new_cell), "ratio_of_a_step": step / new_step if step else None,
            **compared(*runs[0]),
        }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
        if asked.out:
            asked.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
