"""Ten published numbers, recomputed from a parquet alone with nothing of the package: python tests/recompute.py [PARQUET] [TABLES].

Prints each and exits with 1 if the tables say otherwise. Tables default to the folder beside the parquet.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

path = Path(sys.argv[1] if len(sys.argv) > 1 else "results/methods.parquet")
tables = Path(sys.argv[2]) if len(sys.argv) > 2 else path.with_suffix("") / "tables"
frame = pd.read_parquet(path)
finals = frame[frame.status == "done"].sort_values("step").groupby("cell").tail(1)
value, better, wrong = {}, {}, []  # by task: seeds x methods, and 1 where higher is better
for task, rows in finals.groupby("task_label"):
    value[task] = rows.assign(v=rows["metric:" + rows.headline.iloc[0]]).pivot(index="seed", columns="method_label", values="v")
    better[task] = 1 if rows.higher_is_better.iloc[0] else -1
lines = [line for name in ("summary.md", "pooled.md") for line in (tables / name).read_text(encoding="utf-8").splitlines()]


def published(heading, row, column):
    """The text of one cell: the first table below `heading`."""
    body = [[cell.strip().strip("*") for cell in line.strip("|").split(" | ")] for line in lines[lines.index(heading) :] if line[:1] == "|"]
    at = next(i for i, name in enumerate(body[0]) if name.split(":")[0] == column)
    return next(cells[at] for cells in body if cells[0].split(" (")[0] == row).strip("* ")


def check(what, computed, text, slack=0.0):
    """Every computed number rounds to the one in `text` at its place, give or take `slack`."""
    shown = [word.strip("[],") for word in text.split()[: len(computed)]]
    ok = all(abs(x - float(y)) <= 0.5 * 10.0 ** -len(y.partition(".")[2]) + slack + 1e-12 for x, y in zip(computed, shown, strict=True))
    print(f"{'ok   ' if ok else 'WRONG'} {what}: computed {', '.join(f'{x:.6g}' for x in computed)}; published {text}")
    wrong.extend([] if ok else [what])


def t_interval(d):
    half = stats.t.ppf(0.975, len(d) - 1) * stats.sem(d)
    return [d.mean(), d.mean() - half, d.mean() + half]


suite, reference = path.stem, "dpg"
value = {task: v for task, v in value.items() if "dpg" in v}  # the others are still to be computed
for task in sorted(value)[:4]:  # 1 to 4: final means with their intervals
    check(f"{reference} on {task}", t_interval(value[task][reference]), published(f"## {suite}: every task", reference, task))
full = sorted(method for method in finals.method_label.unique() if all(method in v for v in value.values()) and method != "oracle")
ranks = np.mean([(-better[task] * v[full].mean()).rank() for task, v in value.items()], axis=0)
check(f"mean rank of {reference}", [ranks[full.index(reference)]], published(f"## {suite}: over all tasks", reference, "mean rank"))
gap, pooled = {task: abs(v["oracle"].mean() - v["base"].mean()) for task, v in value.items()}, f"# {reference} over all tasks"
for rival in [method for method in full if method != reference][2::-1]:  # 6 to 8: the pooled effect
    d = [better[task] * (v[reference] - v[rival]).dropna() / gap[task] for task, v in value.items()]
    check(f"effect against {rival}", [np.mean([x.mean() for x in d])], published(pooled, rival, "effect"))
parts = np.concatenate([x / np.sqrt((x**2).mean()) / len(x) / len(d) for x in d])
check(f"S against {rival}", [parts.sum()], published(pooled, rival, "S"))
drawn = np.random.default_rng(0).choice([-1, 1], (50_000, len(parts)))
p = np.mean(np.abs(drawn @ parts) >= abs(parts.sum()) - 1e-12)
check(f"p against {rival}, 50,000 patterns drawn", [p], published(pooled, rival, "p"), slack=4 * np.sqrt(max(p, 1e-4) / 50_000))
sys.exit(bool(wrong))
