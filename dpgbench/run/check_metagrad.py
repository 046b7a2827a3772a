"""`check metagrad`: the measurements of `metagrad.diagnostics` on a cell."""

from __future__ import annotations

from pathlib import Path

from dpgbench.bench.meter import Meter
from dpgbench.bench.workbench import Workbench
from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import UserError
from dpgbench.core.plugin_types import TaskView
from dpgbench.core.seeds import derive
from dpgbench.metagrad.diagnostics import Findings, measure
from dpgbench.plugins.registry import Registry
from dpgbench.run.open_cell import open_cell


def measure_cell(spec: RunSpec, plugins: Path | None = None, **counts: int) -> Findings:
    """`measure` on a cell's target, task and training settings, with the untouched generator's completions of its first training prompts.

    As many texts as the method's policy asks for per step. Raises UserError on settings that do not go together."""
    cell = open_cell(spec, Registry(plugins))
    bench = Workbench(spec, TaskView(cell.task), cell.world, cell.generator, Meter(), lambda line: None)
    policy = spec.method.plain().get("policy") or {}
    count = policy.get("completions", spec.scale.deployment_texts)
    group = policy.get("group_size", 1)
    prompts = [prompt for prompt in bench.prompts(count // group, "check") for _ in range(group)]
    batches, _ = bench.batches(bench.sample(prompts, "check"), "check")
    seed = derive(spec.seed, "check") % 2**31
    try:
        return measure(cell.world.target, batches, cell.task.signal, bench.optimizer, seed=seed, settings=bench.engine, **counts)
    except ValueError as error:
        raise UserError(str(error)) from None
