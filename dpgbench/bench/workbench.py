"""What a method is handed: a generator, prompts, the target it may train, and an account that everything it does is charged to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dpgbench.bench import flops as compute
from dpgbench.bench.distributed import ALONE, Alone
from dpgbench.bench.meter import Budget, Meter
from dpgbench.bench.sft import finetune
from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import CellError, UserError
from dpgbench.core.exchange import Prompt, TaskView
from dpgbench.core.options import Options
from dpgbench.core.seeds import derive, stream, torch_seeded
from dpgbench.metagrad import Metagradients, ascend, metagradients, signal_gradients
from dpgbench.metagrad.loss import initial_parameters
from dpgbench.metagrad.settings import EngineSettings
from dpgbench.metagrad.training import SGD, AdamW, first_step_dots, gradient_dots, loaded, one_step_values, train
from dpgbench.store.checkpoints import Saved
from dpgbench.worlds.generator import Generator
from dpgbench.worlds.world import World

if TYPE_CHECKING:
    from torch import Tensor


Checkpoint = Callable[[int, Callable[[], dict[str, "Tensor"]], Callable[[], dict[str, Any]]], None]
PARAMETERS_AT_ONCE = 100_000_000


def optimizer_of(training: Options, name: str | None = None, lr: float | None = None) -> SGD | AdamW:
    """The target's optimizer as configured, or another with the same constants."""
    lr = lr or training.lr
    if (name or training.optimizer) == "sgd":
        return SGD(lr=lr)
    return AdamW(lr, tuple(training.betas), training.eps, training.eps_root, training.weight_decay)


def engine_settings(training: Options, *, data_parallel: bool = False) -> EngineSettings:
    """The metagradient engine's settings as configured; cells stored before there were any get the defaults.

    To the engine tf32 is full precision: how a GPU multiplies float32 numbers is the process's setting, not a step's (`matmul_precision`).
    """
    given = training.plain()
    precision = given.get("precision", "full")
    return EngineSettings(
        reduction=training.reduction,
        precision="full" if precision == "tf32" else precision,
        micro_batch=training.micro_batch,
        memory_budget=given.get("memory_budget"),
        checkpoint=given.get("checkpoint") or "all",
        offload=given.get("offload"),
        data_parallel=data_parallel,
    )


def matmul_precision(training: Options) -> str:
    """torch's word for how float32 matrices are multiplied in a cell, the generator's too: "highest", or with tf32 "high"."""
    return "high" if training.plain().get("precision") == "tf32" else "highest"


class Workbench:
    """One cell's tools. `options` are the method's own; `reserve` is what a deployment dataset costs, as far as the harness knows yet.

    Where several processes work on the cell (`group`), every one of them has a bench and a method that takes the same steps. Metagradients
    and a policy's rollouts and updates are shared among them; anything else every process computes for itself, and it is charged once.
    """

    def __init__(
        self,
        spec: RunSpec,
        task: TaskView,
        world: World,
        generator: Generator,
        meter: Meter,
        record: Callable[[dict[str, Any]], None],
        checkpoint: Checkpoint = lambda step, tensors, numbers: None,
        group: Alone = ALONE,
    ):
        self.spec, self.task, self.world, self.generator, self.meter = spec, task, world, generator, meter
        self.options = spec.method
        self._record, self._checkpoint, self.group = record, checkpoint, group
        self.makes_checkpoints = False
        self.tracking: Path | None = None
        """Where trackers' files go, if the method trains a policy that reports to some."""
        self.saved: Saved | None = None
        """Where the method is to go on from: what it told `checkpoint` in a run that was interrupted."""
        self._notes: dict[str, Any] = {}
        self.budget = Budget(**spec.budget)
        self.reserve = Meter()
        self.optimizer = optimizer_of(spec.training)
        self.engine = engine_settings(spec.training, data_parallel=group.size > 1)
        self._signal_flops: float | None = None
        self._signal_gradient: dict[str, Tensor] | None = None
        self._charged: set[str] = set()  # what is paid once per cell
        self._metagradient_flops: dict[tuple, float] = {}  # of one call, by the batches' shapes

    # ---- telling

    def note(self, **values: Any) -> None:
        """Values for the line of the step in progress."""
        self._notes |= values

    def noted(self) -> dict[str, Any]:
        """What was noted so far."""
        return dict(self._notes)

    def record(self, **line: Any) -> None:
        """One line of `metrics.jsonl`: `step`, whatever else, and what was noted since the last line."""
        line, self._notes = {**self._notes, **line}, {}
        self._record(line)

    # ---- how much is left

    def spent_share(self) -> float:
        """The share of the budget that an answer drawn now would have cost: 0 without a budget, above 1 if it is too much."""
        return self.budget.share(self.meter + self.reserve)

    # ---- going on after an interruption

    def checkpoint(self, step: int, tensors: Callable[[], dict[str, Tensor]], numbers: Callable[[], dict[str, Any]] = lambda: {}) -> None:
        """For methods with a state worth keeping, between a step's record and its snapshot: save it, if it is time to.

        `tensors` and `numbers` (whatever JSON can hold) are called only then, and come back as `bench.saved` in the run that goes on,
        which must yield the snapshot of `saved.step` first and then draw what it would have drawn. A method without a state of its
        own never calls this and starts again. Raises Interrupted where the process was asked to stop.
        """
        self.makes_checkpoints = True
        self._checkpoint(step, tensors, numbers)

    def state(self) -> dict[str, Any]:
        """What this bench remembers that later charges depend on."""
        flops = [[[list(shape) for shape in shapes], value] for shapes, value in self._metagradient_flops.items()]
        return {"charged": sorted(self._charged), "metagradient_flops": flops, "reserve": self.reserve.state()}

    def restore(self, saved: Saved, state: dict[str, Any]) -> None:
        """As it was at a checkpoint."""
        self.saved = saved
        self._charged = set(state["charged"])
        self.reserve.restore(state["reserve"])
        self._metagradient_flops = {tuple(tuple(shape) for shape in shapes): value for shapes, value in state["metagradient_flops"]}

    # ---- drawing

    def seed(self, *names: object) -> int:
        """A seed of this cell for one purpose; the same for every method with the same seed and names."""
        return derive(self.spec.seed, *names)

    def prompts(self, count: int, *names: object) -> list[Prompt]:
        """Training prompts: the same for every method that asks with the same names."""
        return self.world.prompts("train", count, stream(self.spec.seed, "prompts", *names))

    def sample(self, prompts: Sequence[Prompt], *names: object, generator: Generator | None = None) -> list[str]:
        """One completion per prompt of the generator, or of a copy of it (`Generator.copy`), charged as generation."""
        texts, shapes = (generator or self.generator).sample(prompts, self.seed("sample", *names))
        for batch, prompt_length, new_tokens in shapes:
            self.charge_generation(batch, prompt_length, new_tokens, generator=generator)
        return texts

    def charge_generation(self, batch: int, prompt_length: int, new_tokens: int, *, generator: Generator | None = None) -> None:
        """For completions sampled by other hands than `sample` (a trainer's rollouts)."""
        flops = compute.sampling_flops((generator or self.generator).model, batch, prompt_length, new_tokens)
        self.meter.charge("generate", flops, generated=batch * new_tokens)

    def finetune(self, prompts: Sequence[Prompt], completions: Sequence[str], *names: object, lr: float, epochs: int, batch: int) -> float:
        """Teach the generator to write these completions: `finetuning.finetune`, charged as a policy update. Returns the last epoch's loss.

        Cost: 3F of the generator on prompts and completions, per epoch; little more than 2F with adapters (`Shape.training_flops`).
        Raises CellError if the loss is not finite.
        """
        losses, shapes = finetune(
            self.generator, prompts, completions, lr=lr, epochs=epochs, batch=batch, seed=self.seed("finetune", *names)
        )
        generator = compute.shape_of(self.generator.model, trains=True)
        flops = sum(generator.training_flops(*shape) for shape in shapes)
        tokens = sum(len(self.generator.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in completions)
        self.meter.charge("policy_update", flops, trained=epochs * tokens)
        if not math.isfinite(losses[-1]):
            raise CellError(f"finetune: the generator's loss is {losses[-1]:g}; lower lr={lr}")
        return losses[-1]

    # ---- what a text is worth

    def batches(self, texts: Sequence[str], *names: object, steps: int | None = None) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The batches of `steps` (default: T) optimizer steps of the target, and for each position in them the index of its text.

        Texts are dealt out in a seeded random order, so that the completions of one prompt do not all meet in one batch.
        Raises UserError if they do not make that many batches of one size.
        """
        steps = steps or self.spec.training.inner_steps
        if len(texts) % steps or not texts:
            fix = f"make it {max(1, len(texts) // steps) * steps} texts or lower inner_steps"
            raise UserError(f"training.inner_steps={steps}: a dataset of {len(texts)} texts must divide into as many batches; {fix}")
        with torch_seeded(self.seed("batches", *names)):
            order = torch.randperm(len(texts)) if steps > 1 else torch.arange(len(texts))
        encoded = self.world.encode(texts)
        parts = order.chunk(steps)
        return [{name: tensor[part.to(tensor.device)] for name, tensor in encoded.items()} for part in parts], order

    def metagradients(self, texts: Sequence[str], *names: object, optimizer: str | None = None, lr: float | None = None) -> Metagradients:
        """Train a fresh target on the texts and differentiate Phi through that run: one reward per text, in the texts' order.

        `optimizer` ("sgd", "adamw") and `lr` stand in for the target's own.

        Cost: 3TF for T batches' training, and for the reverse pass what the engine needs, between 0.3F (a metric of the head alone,
        T=1) and 2F + 9(T-1)F, counted rather than derived, because the engine skips what is structurally zero.
        Raises CellError if a reward is not finite.
        """
        training = self.spec.training
        batches, order = self.batches(texts, *names)

        def differentiate() -> Metagradients:
            learner = optimizer_of(training, optimizer, lr)
            return metagradients(self.world.target, batches, self.task.signal, learner, **self.engine.for_metagradients())

        shapes = tuple(tuple(batch["input_ids"].shape) for batch in batches)
        if shapes in self._metagradient_flops:
            outcome = differentiate()
        else:
            outcome, flops = compute.counted_flops(differentiate)
            self._metagradient_flops[shapes] = self._of_all_processes(flops)
        forward = self._forward_flops(batches)
        trained = _labels_in(batches)
        self.meter.charge("training", 3 * forward, trained=trained)
        self.meter.charge("metagradient", self._metagradient_flops[shapes] - 3 * forward)
        rewards = torch.empty_like(outcome.rewards)
        rewards[order.to(rewards.device)] = outcome.rewards
        if not (math.isfinite(outcome.value) and bool(rewards.isfinite().all())):
            bad = int((~rewards.isfinite()).sum())
            raise CellError(
                f"metagradients: Phi is {outcome.value:g} and {bad} of {len(texts)} rewards are not finite; "
                f"lower training.lr={training.lr} or raise training.eps_root={training.eps_root}"
            )
        self.note(phi=float(outcome.value))
        return Metagradients(rewards, outcome.value, outcome.params)

    def dataset_value(self, texts: Sequence[str], *names: object) -> float:
        """Phi of a fresh target trained on the texts by T steps: one number for all of them. Cost: 3TF for T batches, and one Phi.

        Raises CellError if it is not finite, UserError if the texts do not make T batches of one size.
        """
        training, target = self.spec.training, self.world.target
        batches, _ = self.batches(texts, *names)
        params = train(target, batches, self.optimizer, **self.engine.for_training())
        with loaded(target, params), torch.no_grad():
            value = float(self.task.signal(target))
        trained = _labels_in(batches)
        self.meter.charge("training", 3 * self._forward_flops(batches), trained=trained)
        self.meter.charge("scoring", self._signal_cost())
        if not math.isfinite(value):
            raise CellError(f"dataset_value: Phi is {value:g} after training; lower training.lr={training.lr}")
        return value

    def ascend(self) -> dict[str, Tensor]:
        """Where the target's own optimizer gets by following Phi itself, in as many steps as a deployment dataset would be worth.

        No text could be better, up to what weights it reaches: an anchor, not a competitor. Its cost is counted and charged as training.
        """
        steps = self.spec.scale.deployment_steps or self.spec.training.inner_steps
        params, flops = compute.counted_flops(lambda: ascend(self.world.target, self.task.signal, self.optimizer, steps))
        self.meter.charge("training", flops)
        return params

    def one_step_utilities(self, texts: Sequence[str]) -> list[float]:
        """For each text alone: Phi of a fresh target after one step on that text. Cost: 3F and one Phi per text."""
        encoded = self.world.encode(texts)
        ids, labels, reduction = encoded["input_ids"], encoded["labels"], self.engine.reduction
        values = one_step_values(self.world.target, ids, labels, self.task.signal, self.optimizer, reduction, self._texts_at_once())
        forward = compute.forward_flops(self.world.target, *ids.shape)
        self.meter.charge("scoring", 3 * forward + len(texts) * self._signal_cost(), trained=int((labels != -100).sum()))
        return values.tolist()

    def influences(self, texts: Sequence[str], *, optimizer_aware: bool = False) -> Tensor:
        """What one step from phi_0 on each text alone would do to Phi, to first order: <u_i, grad Phi(phi_0)>, (N,), higher is better.

        u_i is minus the text's gradient, or with `optimizer_aware` the first update that the target's optimizer makes of it. Every text
        is judged alone and at phi_0, whatever T is. Cost: 3F in either case, and once per cell Phi's gradient at phi_0, counted.
        Raises CellError if a value is not finite.
        """
        target = self.world.target
        if self._signal_gradient is None:
            slopes, flops = compute.counted_flops(lambda: signal_gradients(target, initial_parameters(target), self.task.signal)[1])
            self._signal_gradient = {name: slope for name, slope in slopes.items() if slope is not None}
            if "signal gradient" not in self._charged:  # a run that goes on computes it again and has paid already
                self.meter.charge("scoring", flops)
                self._charged.add("signal gradient")
        encoded = self.world.encode(texts)
        arguments = (target, encoded["input_ids"], encoded["labels"], self._signal_gradient)
        if optimizer_aware:
            values = first_step_dots(*arguments, self.optimizer, reduction=self.engine.reduction, chunk=self._texts_at_once())
        else:
            values = -gradient_dots(*arguments, **self.engine.for_training())
        labelled = int((encoded["labels"] != -100).sum())
        self.meter.charge("scoring", 3 * compute.forward_flops(target, *encoded["input_ids"].shape), trained=labelled)
        if not bool(values.isfinite().all()):
            bad = int((~values.isfinite()).sum())
            raise CellError(f"influences: {bad} of {len(texts)} are not finite; look at the task's signal at the initial target")
        return values

    def scores(self, texts: Sequence[str]) -> list[float]:
        """The task's black-box score of each text. It runs no model here, so it costs seconds but no FLOPs."""
        return list(self.task.score(texts))

    def _texts_at_once(self) -> int:
        """How many texts may have copies of the parameters of their own."""
        size = sum(parameter.numel() for parameter in self.world.target.parameters())
        return max(1, min(64, PARAMETERS_AT_ONCE // size))

    # ---- accounts

    def _forward_flops(self, batches: list[dict[str, Tensor]]) -> float:
        return sum(compute.forward_flops(self.world.target, *batch["input_ids"].shape) for batch in batches)

    def _of_all_processes(self, metagradient_flops: float) -> float:
        """What one process would have computed: shares add up, and the derivative of Phi, which every process takes, counts once."""
        if self.group.size == 1:
            return metagradient_flops
        target = self.world.target
        _, repeated = compute.counted_flops(lambda: signal_gradients(target, initial_parameters(target), self.task.signal))
        return sum(self.group.gathered([metagradient_flops])) - (self.group.size - 1) * repeated

    def _signal_cost(self) -> float:
        """FLOPs of one Phi, counted once: only the task knows what it computes."""
        if self._signal_flops is None:
            target = self.world.target
            _, self._signal_flops = compute.counted_flops(lambda: self.task.signal(target))
        return self._signal_flops


def _labels_in(batches: list[dict[str, Tensor]]) -> int:
    """Real labels of all batches: one number to wait for, not one a batch."""
    return int(sum((batch["labels"] != -100).sum() for batch in batches))
