"""A cell's models, world and task, loaded once for whoever works on it: a run, `check metagrad` and `check plugin`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpgbench.api import Task
from dpgbench.core.cell import RunSpec
from dpgbench.core.plugin_types import Prompt
from dpgbench.core.seeds import stream
from dpgbench.plugins import contract
from dpgbench.plugins.registry import Registry
from dpgbench.plugins.source import PluginFile
from dpgbench.worlds import model_files
from dpgbench.worlds.prompts import Room

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpgbench.worlds.generator import Generator
    from dpgbench.worlds.world import World


@dataclass(frozen=True)
class OpenCell:
    """A cell whose task is prepared and keeps its contract."""

    task_file: PluginFile
    task: Task
    world: World
    generator: Generator
    prompts: list[Prompt]
    """For deployment datasets: one fixed list per seed, whatever the method."""


def open_cell(spec: RunSpec, registry: Registry) -> OpenCell:
    """Load what the cell names, on the GPU if there is one. Nothing is spent.

    Raises UserError for models or texts that are not to be had, prompts that are too long, and a task that breaks its contract.
    """
    import torch

    from dpgbench.bench.engine import matmul_precision
    from dpgbench.worlds import models

    torch.set_num_threads(spec.scale.threads)
    torch.set_float32_matmul_precision(matmul_precision(spec.training))
    models.quiet()
    generator = models.load_generator(spec.scale)
    generator.model.to("cuda" if torch.cuda.is_available() else "cpu")
    world = open_world(spec, generator.tokenizer)
    world.target.to(generator.model.device)
    context = model_files.find(spec.scale, "generator").context or getattr(generator.model.config, "max_position_embeddings", None)
    if context is not None:
        world.room = Room(spec.scale, generator.tokenizer, context)
        world.check_room()
    file, task = prepared_task(spec, registry, world)
    prompts = world.prompts("test", spec.scale.deployment_texts, stream(spec.seed, "deployment prompts"))
    contract.check_task(file, task, world.target, prompts)
    return OpenCell(file, task, world, generator, prompts)


def open_world(spec: RunSpec, generator_tokenizer: PreTrainedTokenizerBase | None = None) -> World:
    """The scale's target and texts with a cell's settings, prompts worded for that tokenizer."""
    from dpgbench.worlds import models
    from dpgbench.worlds.world import World, corpus

    texts = corpus(spec.scale, generator_tokenizer)
    return World(spec.scale, spec.training, texts, *models.load_target(spec.scale))


def prepared_task(spec: RunSpec, registry: Registry, world: World) -> tuple[PluginFile, Task]:
    """The cell's task, prepared on that world, and its file. Raises UserError as `contract.called` does."""
    file = registry.find("task", spec.task.name)
    task = registry.make("task", file.name, spec.task)
    contract.called(file.path, "prepare", task.prepare, world)
    return file, task
