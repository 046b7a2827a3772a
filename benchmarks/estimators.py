"""The table of docs/estimator.md: `check estimator` on every task at scale tiny, untrained generator, five methods.

    python benchmarks/estimators.py results/estimators            # goes on where it stopped
    python benchmarks/estimators.py results/estimators qr uuid    # some tasks

A method whose numbers are there is not run again. A task's methods are measured together, into TASK.json; a method that METHODS names
later is measured on the same texts, into a file of its own, TASK.METHOD.json. Prints the table of what is there, in Markdown. Batches are
few where a task is dear; each takes 3 to 20 seconds of CPU.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from dpgbench import config
from dpgbench.core.cell import RunSpec
from dpgbench.run.check_estimator import measure_methods

METHODS = ("dpg", "dpg_token", "naive", "influence", "influence_adam")
COUNTS = {  # batches and texts left out
    "l2_norm": (6, 24), "sixseven": (6, 24), "language": (6, 24), "toxicity": (5, 10), "uuid": (5, 10), "lexical_diversity": (5, 10),
    "length": (5, 10), "qr": (5, 10),
}  # fmt: skip


def kept(folder: Path, task: str) -> dict:
    """What is known of a task: its first file, with the methods of all of its files by label; {} where there is none."""
    files = [file for file in (folder / f"{task}.json", *sorted(folder.glob(f"{task}.*.json"))) if file.exists()]
    if not files:
        return {}
    first, *others = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    return {**first, "methods": {method["label"]: method for one in (first, *others) for method in one["methods"]}}


def cells_of(task: str) -> dict[str, RunSpec]:
    """The cells to be measured, by their methods' labels."""
    cells = config.read([f"task={task}", f"method={','.join(METHODS)}"], sweep=True).cells
    return {cell.spec.method.label: cell.spec for cell in cells}


def measured(task: str, folder: Path) -> None:
    """Measure the methods that were not yet, and keep the numbers."""
    there = kept(folder, task).get("methods", {})
    missing = {label: spec for label, spec in cells_of(task).items() if label not in there}
    if not missing:
        return
    name = ".".join([task, *missing]) if there else task
    file, (batches, texts) = folder / f"{name}.json", COUNTS[task]
    start = time.process_time()

    def progress(done: int, total: int) -> None:
        print(f"{task}: {done} of {total}, {time.process_time() - start:.0f} s of CPU", file=sys.stderr, flush=True)

    found = measure_methods(list(missing.values()), batches=batches, texts=texts, progress=progress)
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
    found = [one for task in tasks if (one := kept(folder, task))]
    lines = [
        "| task | N, T | batches, left out | correlation | slope | bias share | gradient bias | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        numbers = (shown(one["pearson"], 3), shown(one["slope"], 2), shown(one["bias_share"], 2), shown(one["gradient_bias"], 3))
        counts = f"{one['texts']}, {one['steps']} | {one['batches']}, {one['left_out']}"
        lines.append(f"| `{one['task']}` | {counts} | {' | '.join(numbers)} | {one['verdict']} |")
    labels = list(cells_of(tasks[0]))
    for title, name, digits in (("signal to noise", "snr", 3), ("cosine to exact", "cosine", 2), ("correlation of rewards", "pearson", 2)):
        lines += ["", f"| {title} | {' | '.join(f'`{label}`' for label in labels)} |", "|---" * (1 + len(labels)) + "|"]
        for one in found:
            numbers = (shown(one["methods"][label][name], digits) if label in one["methods"] else "" for label in labels)
            lines.append(f"| `{one['task']}` | {' | '.join(numbers)} |")
    return lines


def main() -> None:
    folder, tasks = Path(sys.argv[1]), sys.argv[2:] or list(COUNTS)
    for task in tasks:
        measured(task, folder)
    print("\n".join(table(folder, list(COUNTS))))


if __name__ == "__main__":
    main()
