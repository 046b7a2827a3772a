"""The table of docs/estimator.md: `check estimator` on every task at scale tiny, untrained generator, four methods.

    python benchmarks/estimators.py results/estimators            # goes on where it stopped: a task whose file is there is not run again
    python benchmarks/estimators.py results/estimators qr uuid    # some tasks

Prints the table of what is there, in Markdown. Batches are few where a task is dear; each takes 5 to 30 seconds of CPU.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from dpgbench import config
from dpgbench.run.check_estimator import measure_methods

METHODS = "method=dpg,naive,influence,influence_adam"
COUNTS = {  # batches and texts left out
    "l2_norm": (6, 24), "sixseven": (6, 24), "language": (6, 24), "toxicity": (5, 10), "uuid": (5, 10), "lexical_diversity": (5, 10),
    "length": (5, 10), "qr": (5, 10),
}  # fmt: skip


def measured(task: str, folder: Path) -> None:
    """Measure a task, unless that is done, and keep the numbers."""
    file, (batches, texts) = folder / f"{task}.json", COUNTS[task]
    if file.exists():
        return
    specs = [cell.spec for cell in config.read([f"task={task}", METHODS], sweep=True).cells]
    start = time.process_time()

    def progress(done: int, total: int) -> None:
        print(f"{task}: {done} of {total}, {time.process_time() - start:.0f} s of CPU", file=sys.stderr, flush=True)

    found = measure_methods(specs, batches=batches, texts=texts, progress=progress)
    said = {"task": task, "cpu": time.process_time() - start, **found.plain()}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def shown(estimate: dict, digits: int) -> str:
    if estimate["value"] is None:
        return "–"
    error = "?" if estimate["error"] is None else f"{estimate['error']:.{digits}f}"
    return f"{estimate['value']:.{digits}f} ± {error}"


def table(folder: Path, tasks: list[str]) -> list[str]:
    """A line per task of what its metagradients are, then one per task of its methods' signal."""
    found = [json.loads((folder / f"{task}.json").read_text(encoding="utf-8")) for task in tasks if (folder / f"{task}.json").exists()]
    lines = [
        "| task | N, T | batches, left out | correlation | slope | bias share | gradient bias | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        numbers = (shown(one["pearson"], 3), shown(one["slope"], 2), shown(one["bias_share"], 2), shown(one["gradient_bias"], 3))
        counts = f"{one['texts']}, {one['steps']} | {one['batches']}, {one['left_out']}"
        lines.append(f"| `{one['task']}` | {counts} | {' | '.join(numbers)} | {one['verdict']} |")
    labels = [method["label"] for method in found[0]["methods"]] if found else []
    for title, name, digits in (("signal to noise", "snr", 3), ("cosine to exact", "cosine", 2), ("correlation of rewards", "pearson", 2)):
        lines += ["", f"| {title} | {' | '.join(f'`{label}`' for label in labels)} |", "|---" * (1 + len(labels)) + "|"]
        for one in found:
            lines.append(f"| `{one['task']}` | {' | '.join(shown(method[name], digits) for method in one['methods'])} |")
    return lines


def main() -> None:
    folder, tasks = Path(sys.argv[1]), sys.argv[2:] or list(COUNTS)
    for task in tasks:
        measured(task, folder)
    print("\n".join(table(folder, list(COUNTS))))


if __name__ == "__main__":
    main()
