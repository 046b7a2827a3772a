"""`check metagrad`: the measurements of `metagrad.diagnostics` on a cell."""

from __future__ import annotations

from pathlib import Path

import torch

from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import UserError
from dpgbench.core.seeds import derive, stream
from dpgbench.metagrad.diagnostics import Findings, measure


def measure_cell(spec: RunSpec, plugins: Path | None = None, **counts: int) -> Findings:
    """`measure` on a cell's target, task and training settings, with the untouched generator's completions of its first training prompts.

    As many texts as the method's policy asks for per step. Raises UserError on settings that do not go together."""
    from dpgbench.bench.meter import Meter
    from dpgbench.bench.workbench import Workbench, engine_of
    from dpgbench.core.exchange import TaskView
    from dpgbench.plugins import contract
    from dpgbench.plugins.registry import Registry
    from dpgbench.worlds import models
    from dpgbench.worlds.world import World, corpus

    torch.set_num_threads(spec.scale.threads)
    models.quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    registry = Registry(plugins)
    task = registry.make("task", spec.task.name, spec.task)
    generator = models.load_generator(spec.scale)
    generator.model.to(device)
    target, tokenizer = models.load_target(spec.scale)
    world = World(spec.scale, spec.training, corpus(spec.scale, generator.tokenizer), target.to(device), tokenizer)
    file, prompts = registry.find("task", spec.task.name), world.prompts("test", contract.TEXTS, stream(spec.seed, "deployment prompts"))
    contract.called(file.path, "prepare", task.prepare, world)
    contract.check_task(file, task, world.target, prompts)
    bench = Workbench(spec, TaskView(task), world, generator, Meter(), lambda line: None)
    policy = spec.method.plain().get("policy") or {}
    count = policy.get("completions", spec.scale.deployment_texts)
    group = policy.get("group_size", 1)
    prompts = [prompt for prompt in bench.prompts(count // group, "check") for _ in range(group)]
    batches, _ = bench.batches(bench.sample(prompts, "check"), "check")
    training = spec.training
    how = {"reduction": training.reduction, "micro_batch": training.micro_batch, **engine_of(training)}
    try:
        return measure(target, batches, task.signal, bench.optimizer, seed=derive(spec.seed, "check") % 2**31, **how, **counts)
    except ValueError as error:
        raise UserError(str(error)) from None
