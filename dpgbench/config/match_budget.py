"""`budget=match:NAME`: give a cell the FLOPs that a finished cell of another method spent on the same task, scale, training and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpgbench.core.cell import ADDED_SETTINGS, SETTINGS_WITHOUT_EFFECT, RunSpec
from dpgbench.core.errors import UserError
from dpgbench.store.run_folder import RunFolder

ALIKE = ("task", "training", "scale", "seed")


def label_in(values: Sequence[Any] | None) -> str | None:
    """The method's label in the word `budget=match:LABEL`, None without that word. Raises UserError for any other `budget=`."""
    if values is None:
        return None
    kind, _, label = str(values[0]).partition(":")
    if len(values) != 1 or kind != "match" or not label:
        given = ",".join(map(str, values))
        raise UserError(f"budget={given}: not understood; write budget=match:dpg for what dpg spent, or budget.flops=1e12")
    return label


def flops_of(label: str, spec: RunSpec, results: Path) -> float:
    """What the finished cell of the method labelled `label` that differs from `spec` only in the method has spent by its last snapshot.

    Raises UserError unless there is exactly one.
    """
    wanted = _alike(spec.config)
    spent = {}
    for folder in sorted((results / "runs").glob(f"{spec.task.label}.{label}.s{spec.seed}.*")):
        run = RunFolder(folder)
        if run.state().name == "done" and _alike(run.config()) == wanted:
            spent[folder.name] = run.scored()["snapshots"][-1]["flops"]
    if len(spent) == 1:
        return next(iter(spent.values()))
    cell = f"{spec.task.label}, scale {spec.scale.name}, seed {spec.seed}"
    if not spent:
        raise UserError(
            f"budget=match:{label}: {label} has no finished cell of {cell} with these settings in {results}; "
            f"run `sweep method={label}` with the same task, scale and seeds first"
        )
    raise UserError(f"budget=match:{label}: {label} has {len(spent)} finished cells of {cell}, such as {', '.join(list(spent)[:2])}; "
                    f"write the one's FLOPs as budget.flops={next(iter(spent.values())):.4g}")  # fmt: skip


def _alike(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parts in which the two must agree: everything but method and budget, and but what does not change what a method spends.

    That is where a user's file lies, settings without effect, those that the finished cell is too old to have, and further deployments.
    """
    parts = {name: config[name] for name in ALIKE}
    ignored = {"task": ("file",), "scale": ("more_deployments", *SETTINGS_WITHOUT_EFFECT["scale"])}
    ignored["training"] = SETTINGS_WITHOUT_EFFECT["training"]
    for section, names in ignored.items():
        added = ADDED_SETTINGS.get(section, {})
        kept = {key: value for key, value in config[section].items() if key not in names}
        parts[section] = {key: value for key, value in kept.items() if not (key in added and added[key] == value)}
    return parts
