"""A method's work with the target: what texts do to it, by training on them and by differentiating Phi through that training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dpgbench.bench.accountant import Accountant
from dpgbench.bench.engine import engine_settings, optimizer_of
from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import CellError, UserError
from dpgbench.core.plugin_types import TaskView
from dpgbench.core.seeds import derive, torch_seeded
from dpgbench.metagrad import Metagradients, ascend, metagradients, signal_gradients
from dpgbench.metagrad.curvature import inverse_curvature_product
from dpgbench.metagrad.loss import initial_parameters
from dpgbench.metagrad.training import first_step_dots, gradient_dots, loaded, one_step_values, train, train_with_state
from dpgbench.worlds.world import World

if TYPE_CHECKING:
    from torch import Tensor, nn

PARAMETERS_AT_ONCE = 100_000_000


@dataclass(frozen=True)
class Checkpoint:
    """The target after `step` optimizer steps, and the optimizer's state there; {} and None stand for phi_0 and a fresh optimizer."""

    params: dict[str, Tensor]
    state: Any
    step: int

    @contextmanager
    def loaded(self, target: nn.Module) -> Iterator[nn.Module]:
        """The target with these parameters, to be read and differentiated; phi_0 again afterwards."""
        leaves = {name: theta.detach().requires_grad_() for name, theta in self.params.items()}
        with loaded(target, leaves):
            yield target


class Differentiating:
    """Every answer is that of a fresh target: training starts at phi_0 and leaves it as it is."""

    def __init__(self, spec: RunSpec, task: TaskView, world: World, account: Accountant):
        self.spec, self.task, self.world, self.account = spec, task, world, account
        self.optimizer = optimizer_of(spec.training)
        self.engine = engine_settings(spec.training, data_parallel=account.group.size > 1)
        self._start = Checkpoint({}, None, 0)
        self._signal_gradients: dict[int, dict[str, Tensor]] = {}  # by the number of steps before

    def batches(self, texts: Sequence[str], *names: object, steps: int | None = None) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The batches of `steps` (default: T) optimizer steps of the target, and for each position in them the index of its text.

        Texts are dealt out in a seeded random order, so that the completions of one prompt do not all meet in one batch.
        Raises UserError if they do not make that many batches of one size.
        """
        steps = steps or self.spec.training.inner_steps
        if len(texts) % steps or not texts:
            fix = f"make it {max(1, len(texts) // steps) * steps} texts or lower inner_steps"
            raise UserError(f"training.inner_steps={steps}: a dataset of {len(texts)} texts must divide into as many batches; {fix}")
        with torch_seeded(derive(self.spec.seed, "batches", *names)):
            order = torch.randperm(len(texts)) if steps > 1 else torch.arange(len(texts))
        encoded = self.world.encode(texts)
        parts = order.chunk(steps)
        return [{name: tensor[part.to(tensor.device)] for name, tensor in encoded.items()} for part in parts], order

    def metagradients(
        self,
        texts: Sequence[str],
        *names: object,
        optimizer: str | None = None,
        lr: float | None = None,
        per_token: bool = False,
    ) -> Metagradients:
        """Train a fresh target on the texts and differentiate Phi through that run: one reward per text, in the texts' order.

        `optimizer` ("sgd", "adamw") and `lr` stand in for the target's own. With `per_token` rewards are (N, L): column t is of token t of
        a text as `World.encode` gives it, and a row sums to the text's; no other cost.

        Cost: 3TF for T batches' training, and for the reverse pass what the engine needs, between 0.3F (a metric of the head alone,
        T=1) and 2F + 9(T-1)F, counted rather than derived, because the engine skips what is structurally zero.
        Raises CellError if a reward is not finite.
        """
        training = self.spec.training
        learner = optimizer_of(training, optimizer, lr)
        batches, order = self.batches(texts, *names)

        def differentiate() -> Metagradients:
            options = self.engine.for_metagradients()
            return metagradients(self.world.target, batches, self.task.signal, learner, per_token=per_token, **options)

        outcome = self.account.metagradients(batches, differentiate)
        rewards = torch.empty_like(outcome.rewards)
        rewards[order.to(rewards.device)] = outcome.rewards
        if not (math.isfinite(outcome.value) and bool(rewards.isfinite().all())):
            bad = int((~rewards.isfinite()).view(len(texts), -1).any(1).sum())
            raise CellError(
                f"metagradients: Phi is {outcome.value:g} and {bad} of {len(texts)} rewards are not finite; "
                f"lower training.lr={training.lr} or raise training.eps_root={training.eps_root}"
            )
        return Metagradients(rewards, outcome.value, outcome.params)

    def dataset_value(self, texts: Sequence[str], *names: object, lr: float | None = None) -> float:
        """Phi of a fresh target trained on the texts by T steps: one number for all of them. Cost: 3TF for T batches, and one Phi.

        `lr` stands in for the target's own. Raises CellError if it is not finite, UserError if the texts do not make T batches of one size.
        """
        target = self.world.target
        batches, _ = self.batches(texts, *names)
        params = train(target, batches, optimizer_of(self.spec.training, lr=lr), **self.engine.for_training())
        with loaded(target, params), torch.no_grad():
            value = float(self.task.signal(target))
        self.account.training(batches)
        self.account.signal()
        if not math.isfinite(value):
            raise CellError(f"dataset_value: Phi is {value:g} after training; lower the learning rate of {lr or self.spec.training.lr}")
        return value

    def ascend(self) -> dict[str, Tensor]:
        """Where the target's own optimizer gets by following Phi itself, in as many steps as a deployment dataset would be worth.

        No text could be better, up to what weights it reaches: an anchor, not a competitor. Its cost is counted and charged as training.
        """
        steps = self.spec.scale.deployment_steps or self.spec.training.inner_steps
        return self.account.counted("training", lambda: ascend(self.world.target, self.task.signal, self.optimizer, steps))

    def one_step_utilities(self, texts: Sequence[str], known: Sequence[float] = ()) -> list[float]:
        """For each text alone: Phi of a fresh target after one step on that text. Cost: 3F and one Phi per text.

        `known`: what this gave for the first of these texts before. They are charged again, and not computed again as far as they were
        computed in whole groups: a value's last bits depend on the texts that it is computed with.
        """
        encoded, at_once = self.world.encode(texts), self._texts_at_once()
        kept = len(known) // at_once * at_once
        values = list(known[:kept])
        if kept < len(texts):
            rest = (encoded["input_ids"][kept:], encoded["labels"][kept:])
            arguments = (self.world.target, *rest, self.task.signal, self.optimizer)
            values += one_step_values(*arguments, reduction=self.engine.reduction, chunk=at_once).tolist()
        self.account.judged(encoded, signals=len(texts))
        return values

    def influences(
        self,
        texts: Sequence[str],
        *,
        optimizer_aware: bool = False,
        direction: Mapping[str, Tensor] | None = None,
        checkpoint: Checkpoint | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """What one step on each text alone would do to Phi, to first order: <u_i, grad Phi(phi_0)>, (N,), higher is better.

        u_i is minus the text's gradient, or with `optimizer_aware` the next update that the target's optimizer makes of it. Every text is
        judged alone and at phi_0, whatever T is: there the optimizer has seen nothing and the update is its first. With a `checkpoint`
        (`warmed_up`) all three are taken there: the text's gradient, grad Phi, and the optimizer's state that the update starts from. A
        `direction`, by parameter name, stands in for grad Phi (`inverse_curvature_product`). With `per_token` (N, L): column t is the
        share of token t of a text as `World.encode` gives it, and a row sums to the text's; no other cost.
        Cost: 3F in any case, and once per cell Phi's gradient at each of the points, counted. Raises CellError if a value is not finite,
        ValueError for `per_token` with `optimizer_aware`: an update is no sum over tokens.
        """
        if per_token and optimizer_aware:
            raise ValueError("per_token with optimizer_aware: an optimizer's update is no sum over tokens; leave one of them out")
        encoded = self.world.encode(texts)
        where = checkpoint or self._start
        given = (encoded["input_ids"], encoded["labels"], self._gradient_of_signal(where) if direction is None else dict(direction))
        with where.loaded(self.world.target) as target:
            if optimizer_aware:
                how = {"reduction": self.engine.reduction, "chunk": self._texts_at_once(), "state": where.state, "step": where.step}
                values = first_step_dots(target, *given, self.optimizer, **how)
            else:
                values = -gradient_dots(target, *given, per_token=per_token, **self.engine.for_training())
        self.account.judged(encoded)
        if not bool(values.isfinite().all()):
            bad = int((~values.isfinite()).view(len(texts), -1).any(1).sum())
            raise CellError(f"influences: {bad} of {len(texts)} are not finite; look at the task's signal at the initial target")
        return values

    def inverse_curvature_product(self, texts: Sequence[str], *, damping: float) -> dict[str, Tensor]:
        """(G + lambda)^-1 grad Phi(phi_0) by EK-FAC, with the curvature of the loss on the texts: `metagrad.curvature`.

        Deterministic in cell and texts. Cost: that of `metagrad.curvature`, for the modules that Phi's gradient reaches, as torch counts
        it, eigenvectors by formula; and once per cell Phi's gradient at phi_0. Raises CellError if it is not finite.
        """
        encoded, slopes = self.world.encode(texts), self._gradient_of_signal(self._start)
        draws = torch.Generator().manual_seed(derive(self.spec.seed, "curvature", "labels"))
        how = {"damping": damping, "micro_batch": self.engine.micro_batch, "reduction": self.engine.reduction}
        given = (encoded["input_ids"], encoded["labels"], slopes, draws)
        product, flops = self.account.counted("scoring", lambda: inverse_curvature_product(self.world.target, *given, **how))
        self.account.meter.charge("scoring", flops)
        for name, along in product.items():
            if not bool(along.isfinite().all()):
                raise CellError(f"inverse_curvature_product: {name} is not finite; raise damping={damping}")
        return product

    def warmed_up(self, texts: Sequence[str], steps: int) -> Checkpoint:
        """The target after so many steps of its own optimizer on the texts, and the optimizer's state there. Cost: 3F.

        Raises UserError if the texts do not make that many batches of one size.
        """
        batches, _ = self.batches(texts, "warm-up", steps=steps)
        params, state = train_with_state(self.world.target, batches, self.optimizer, **self.engine.for_training())
        self.account.training(batches)
        return Checkpoint(params, state, steps)

    def _gradient_of_signal(self, where: Checkpoint) -> dict[str, Tensor]:
        """Of the parameters that Phi reads; paid once per cell for each number of steps."""
        if where.step not in self._signal_gradients:
            target, params = self.world.target, where.params or initial_parameters(self.world.target)
            name = f"signal gradient after {where.step} steps" if where.step else "signal gradient"
            _, slopes = self.account.counted("scoring", lambda: signal_gradients(target, params, self.task.signal), once=name)
            self._signal_gradients[where.step] = {name: slope for name, slope in slopes.items() if slope is not None}
        return self._signal_gradients[where.step]

    def _texts_at_once(self) -> int:
        """How many texts may have copies of the parameters of their own."""
        size = sum(parameter.numel() for parameter in self.world.target.parameters())
        return max(1, min(64, PARAMETERS_AT_ONCE // size))
