"""What a method is handed: a generator, prompts, the target it may train, and an account that everything it does is charged to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dpgbench import compute
from dpgbench.api import Options, Prompt, RunSpec, TaskView
from dpgbench.data import World
from dpgbench.errors import CellError
from dpgbench.metagrad import Metagradients, metagradients
from dpgbench.models import Generator
from dpgbench.seeds import derive, stream, torch_seeded
from dpgbench.training import SGD, AdamW, one_step_values

if TYPE_CHECKING:
    from torch import Tensor


def optimizer_of(training: Options) -> SGD | AdamW:
    """The target's optimizer as configured."""
    if training.optimizer == "sgd":
        return SGD(lr=training.lr)
    return AdamW(training.lr, tuple(training.betas), training.eps, training.eps_root, training.weight_decay)


class Workbench:
    """One cell's tools. `options` are the method's own; `record` receives one dict per step for `metrics.jsonl`."""

    def __init__(self, spec: RunSpec, task: TaskView, world: World, generator: Generator, meter: compute.Meter, record: Callable[[dict[str, Any]], None]):
        self.spec, self.task, self.world, self.generator, self.meter = spec, task, world, generator, meter
        self.options = spec.method
        self.record = record
        self.optimizer = optimizer_of(spec.training)
        self._signal_flops: float | None = None

    # ---- drawing

    def seed(self, *names: object) -> int:
        """A seed of this cell for one purpose; the same for every method with the same seed and names."""
        return derive(self.spec.seed, *names)

    def prompts(self, count: int, *names: object) -> list[Prompt]:
        """Training prompts: the same for every method that asks with the same names."""
        return self.world.corpus.prompts("train", count, stream(self.spec.seed, "prompts", *names))

    def sample(self, prompts: Sequence[Prompt], *names: object) -> list[str]:
        """One completion of the generator per prompt, charged as generation."""
        texts, shapes = self.generator.sample(prompts, self.seed("sample", *names))
        for batch, prompt_length, new_tokens in shapes:
            self.charge_generation(batch, prompt_length, new_tokens)
        return texts

    def charge_generation(self, batch: int, prompt_length: int, new_tokens: int) -> None:
        """For completions sampled by other hands than `sample` (a trainer's rollouts)."""
        self.meter.charge("generate", compute.sampling_flops(self.generator.model, batch, prompt_length, new_tokens), generated=batch * new_tokens)

    # ---- what a text is worth

    def batches(self, texts: Sequence[str], *names: object) -> tuple[list[dict[str, Tensor]], Tensor]:
        """T batches of the target's training, and for each position in them the index of its text.

        Texts are dealt out in a seeded random order, so that the completions of one prompt do not all meet in one batch.
        """
        steps = self.spec.training.inner_steps
        with torch_seeded(self.seed("batches", *names)):
            order = torch.randperm(len(texts)) if steps > 1 else torch.arange(len(texts))
        encoded = self.world.encode(texts)
        parts = order.chunk(steps)
        return [{name: tensor[part.to(tensor.device)] for name, tensor in encoded.items()} for part in parts], order

    def metagradients(self, texts: Sequence[str], *names: object) -> Metagradients:
        """Train a fresh target on the texts and differentiate Phi through that run: one reward per text, in the texts' order.

        Cost: 3TF + 3F + 8(T-1)F for T batches, and Phi's own gradient. Raises CellError if a reward is not finite.
        """
        training = self.spec.training
        batches, order = self.batches(texts, *names)
        outcome = metagradients(
            self.world.target, batches, self.task.signal, optimizer=self.optimizer, micro_batch=training.micro_batch, reduction=training.reduction
        )  # fmt: skip
        self._charge_training(batches)
        forward = self._forward_flops(batches)
        self.meter.charge("metagradient", 3 * forward / len(batches) + 8 * forward * (len(batches) - 1) / len(batches) + self._signal_cost())
        rewards = torch.empty_like(outcome.rewards)
        rewards[order.to(rewards.device)] = outcome.rewards
        if not (math.isfinite(outcome.value) and bool(rewards.isfinite().all())):
            raise CellError(
                f"metagradients: Phi is {float(outcome.value):g} and {int((~rewards.isfinite()).sum())} of {len(texts)} rewards are not finite; "
                f"lower training.lr={training.lr} or raise training.eps_root={training.eps_root}"
            )
        return Metagradients(rewards, outcome.value, outcome.params)

    def one_step_utilities(self, texts: Sequence[str]) -> list[float]:
        """For each text alone: Phi of a fresh target after one step on that text. Cost: 3F and one Phi per text."""
        encoded = self.world.encode(texts)
        values = one_step_values(
            self.world.target, encoded["input_ids"], encoded["labels"], self.task.signal, self.optimizer, reduction=self.spec.training.reduction
        )  # fmt: skip
        forward = compute.forward_flops(self.world.target, *encoded["input_ids"].shape)
        self.meter.charge("scoring", 3 * forward + len(texts) * self._signal_cost() / 3, trained=int((encoded["labels"] != -100).sum()))
        return values.tolist()

    def scores(self, texts: Sequence[str]) -> list[float]:
        """The task's black-box score of each text. It runs no model here, so it costs seconds but no FLOPs."""
        return list(self.task.score(texts))

    # ---- accounts

    def _charge_training(self, batches: list[dict[str, Tensor]]) -> None:
        trained = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        self.meter.charge("training", 3 * self._forward_flops(batches), trained=trained)

    def _forward_flops(self, batches: list[dict[str, Tensor]]) -> float:
        return sum(compute.forward_flops(self.world.target, *batch["input_ids"].shape) for batch in batches)

    def _signal_cost(self) -> float:
        """FLOPs of Phi and its gradient, counted once: only the task knows what it computes."""
        if self._signal_flops is None:
            target = self.world.target
            self._signal_flops = compute.counted_flops(lambda: torch.autograd.grad(self.task.signal(target), list(target.parameters()), allow_unused=True))
        return self._signal_flops
