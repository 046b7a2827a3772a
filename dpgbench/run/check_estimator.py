"""`check estimator`: what a text's reward has to do with its exact worth, and how much of a method's policy gradient is signal.

Every method that trains the generator by GRPO and says so with `Method.rewards` can be measured; all of them on the same completions, those
that a run's own first steps would draw from the generator as it is. For each batch: the exact effects on Phi of leaving single texts out
(`bench.fidelity`), and the policy gradient that each method's advantages give (`bench.policy_gradient`). `stats.estimator` makes numbers of
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dpgbench.bench.fidelity import Worth, exact_effects
from dpgbench.bench.grpo import Rollouts, advantages
from dpgbench.bench.meter import Meter
from dpgbench.bench.policy_gradient import UNDIVIDED, Completions, draw_completions, policy_gradients, sketch
from dpgbench.bench.token_credit import Baseline, alive, returns_to_go, token_advantages
from dpgbench.bench.workbench import Workbench
from dpgbench.config.measured_together import BATCHES, TEXTS, check_together
from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import CellError
from dpgbench.core.plugin_types import TaskView
from dpgbench.core.seeds import stream
from dpgbench.metagrad import Metagradients
from dpgbench.plugins import contract
from dpgbench.plugins.registry import Registry
from dpgbench.run.open_cell import OpenCell, open_cell
from dpgbench.stats.estimator import Estimate, Matrix, Pairs, cosine, relative_bias, signal_to_noise
from dpgbench.worlds import adapters

if TYPE_CHECKING:
    from torch import Tensor

    from dpgbench.api import Method

Progress = Callable[[int, int], None]
TRUSTED, USABLE, SLOPES = 0.95, 0.7, (0.5, 2.0)  # of the correlation and the slope; ours


@dataclass(frozen=True)
class MethodFindings:
    """What one method's rewards and policy gradient are like."""

    label: str
    pearson: Estimate
    """Of its rewards with the exact effects."""
    snr: Estimate
    """|E g|^2 / tr Cov(g) of one batch's policy gradient."""
    cosine: Estimate
    """Of its mean policy gradient with that of the exact leave-one-out effects."""
    texts: int
    """A batch's."""

    @property
    def texts_for_snr_1(self) -> float:
        """Texts whose batches' mean gradient has as much signal as noise; NaN where no signal was resolved."""
        return self.texts / self.snr.value if self.snr.resolved else math.nan

    @property
    def fewest_texts(self) -> float:
        """What that number is at least, at two standard errors."""
        return self.texts / max(self.snr.value + 2 * self.snr.error, 1e-300)


@dataclass(frozen=True)
class Findings:
    """What was measured. `pearson`, `slope` and the two biases are those of metagradients as stand-ins for exact effects."""

    texts: int
    """A batch's."""
    steps: int
    """T."""
    batches: int
    left_out: int
    """Texts that the target was trained without."""
    pearson: Estimate
    slope: Estimate
    bias_share: Estimate
    gradient_bias: Estimate
    """|E g_tau - E g_exact|^2 / |E g_exact|^2 of the policy gradients that the two pay for."""
    methods: tuple[MethodFindings, ...]
    pairs: Pairs
    """Metagradients and exact effects, for the figure."""

    @property
    def verdict(self) -> tuple[str, list[str]]:
        """ "trust", "with care" or "no", and the reasons, each with what to do."""
        smaller = "lower training.lr, raise training.eps_root, or give a step more texts (policy.completions), so that one moves less"
        reading = f"correlation {self.pearson.value:.3f}, slope {self.slope.value:.2f}"
        if not (self.pearson.value >= USABLE and SLOPES[0] <= self.slope.value <= SLOPES[1]):  # so that NaN is no
            return "no", [f"a text's reward says little about what leaving it out would do ({reading}): {smaller}"]
        doubts = []
        if self.pearson.value < TRUSTED:
            doubts.append(f"rewards follow what leaving a text out would do only roughly ({reading}): {smaller}")
        low = self.pearson.value - 2 * self.pearson.error
        if self.pearson.value >= TRUSTED > low or math.isnan(self.pearson.error):
            doubts.append(f"the correlation is known only to {2 * self.pearson.error:.2f}: measure more, texts={2 * self.left_out}")
        return ("with care" if doubts else "trust"), doubts

    def plain(self) -> dict[str, Any]:
        """For JSON; what is not a number is null."""
        found = asdict(self)
        found["pairs"] = {"metagradient": self.pairs.reward_K.tolist(), "leave_one_out": self.pairs.effect_K.tolist()}
        for row, method in zip(found["methods"], self.methods, strict=True):
            row["texts_for_snr_1"] = method.texts_for_snr_1
        found["verdict"], found["reasons"] = self.verdict
        return _without_nan(found)


def measure_methods(
    specs: Sequence[RunSpec],
    plugins: Path | None = None,
    *,
    batches: int = BATCHES,
    texts: int = TEXTS,
    progress: Progress = lambda done, of: None,
) -> Findings:
    """The measurements on cells that differ in their method alone, at the generator and the target as the cells begin.

    batches: independent steps of the cells' own size; texts: how many texts are left out in turn, spread evenly over them.
    Cost per batch (F = one forward pass of the target on it): sampling, each method's rewards, a metagradient, 3F in float64 and per text
    left out up to 3F more and one Phi, and 2F of the generator for each method and for the reference.
    Raises UserError for cells that do not go together and methods that say no rewards, CellError for rewards that are not finite.
    """
    first, registry = specs[0], Registry(plugins)
    check_together(specs, registry, batches, texts)
    size, group = first.method.policy.completions, first.method.policy.group_size
    cell = open_cell(first, registry)
    shared = _Shared()
    benches = [_Bench(spec, cell, shared) for spec in specs]
    bench, generator = benches[0], cell.generator
    generator.adapt(adapters.settings(first.method), bench.seed("lora"))
    methods = [registry.make("method", spec.method.name, spec.method) for spec in specs]
    files = [registry.find("method", spec.method.name).path for spec in specs]
    baselines = [Baseline(method.baseline, generator, group, own.seed("baseline")) for method, own in zip(methods, benches, strict=True)]
    at_once = first.method.policy.micro_batch or generator.batch

    total = batches + 1
    mean_tau = float(bench.metagradients(draw_completions(bench, batches).texts, batches, 0).rewards.double().mean())
    progress(1, total)
    measured = Measured()
    for number in range(batches):
        drawn = draw_completions(bench, number)
        count = texts // batches + (number < texts % batches)
        chosen = sorted(stream(first.seed, "left out", number).sample(range(size), count))
        worth = _worth(bench, drawn.texts, number, chosen)
        by_tau_N, error_N = worth.split_advantages(mean_tau)
        rewards, paid = {}, [(by_tau_N, UNDIVIDED)]
        for spec, file, method, own, expected in zip(specs, files, methods, benches, baselines, strict=True):
            credit = _rewards(file, method, own, Rollouts(number, drawn.prompts, drawn.texts, drawn.ids))
            rewards[spec.method.label] = credit if credit.ndim == 1 else credit.sum(1)
            policy = spec.method.policy
            paid.append((_advantages(credit, drawn, expected, group, policy.scale_advantages), policy.loss_type))
        gradients = policy_gradients(generator, drawn, paid, at_once)
        gradients += policy_gradients(generator, drawn.only(chosen), [(error_N[chosen], UNDIVIDED)], at_once)  # other texts have no error
        by_tau, *of_methods, error = (sketch(gradient, bench.seed("sketch")) for gradient in gradients)
        measured.add(worth, rewards, by_tau, error, dict(zip(rewards, of_methods, strict=True)))
        progress(number + 2, total)
    return measured.findings(size, first.training.inner_steps)


@dataclass
class Measured:
    """What is kept of each batch: policy gradients, and of its left-out texts rewards and effects."""

    exact: list[Tensor] = field(default_factory=list)
    """The leave-one-out estimator's gradients, by way of `bench.fidelity`."""
    error: list[Tensor] = field(default_factory=list)
    """Those of the metagradients' error."""
    by_method: dict[str, list[Tensor]] = field(default_factory=dict)
    tau: list[float] = field(default_factory=list)
    effects: list[float] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    """The batch of each left-out text."""
    rewards: dict[str, list[float]] = field(default_factory=dict)

    def add(self, worth: Worth, rewards: dict[str, Tensor], by_tau: Tensor, error: Tensor, of_methods: dict[str, Tensor]) -> None:
        """A batch: gradients paid in metagradients and in their error, and each method's rewards (N,) and gradient."""
        for index, effect in worth.effects.items():
            self.tau.append(float(worth.metagradients[index]))
            self.effects.append(effect)
            self.numbers.append(len(self.exact))
            for label, values in rewards.items():
                self.rewards.setdefault(label, []).append(float(values[index]))
        self.exact.append(by_tau - error)
        self.error.append(error)
        for label, gradient in of_methods.items():
            self.by_method.setdefault(label, []).append(gradient)

    def findings(self, texts: int, steps: int) -> Findings:
        """The numbers; `texts` of a batch, T steps."""
        exact, tau = _products(self.exact, self.exact), self._pairs(self.tau)
        methods = []
        for label, gradients in self.by_method.items():
            own, with_exact = _products(gradients, gradients), _products(gradients, self.exact)
            pearson = self._pairs(self.rewards[label]).pearson()
            methods.append(MethodFindings(label, pearson, signal_to_noise(own), cosine(own, with_exact, exact), texts))
        bias = relative_bias(_products(self.error, self.error), exact)
        counts = (texts, steps, len(self.exact), len(self.tau))
        return Findings(*counts, tau.pearson(), tau.slope(), tau.bias_share(), bias, tuple(methods), tau)

    def _pairs(self, rewards: Sequence[float]) -> Pairs:
        return Pairs(np.array(rewards, dtype=float), np.array(self.effects, dtype=float), np.array(self.numbers))


def _products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Matrix:
    """Inner products of every two batches' gradients, (M, M)."""
    return (torch.stack(list(left)).double() @ torch.stack(list(right)).double().T).numpy()


class _Shared(dict):
    """Metagradients by what they are of: the latest batch's, because methods that ask for the same need not each compute it."""

    step: object = None


class _Bench(Workbench):
    """A method's workbench on a cell that it shares with other methods; nothing is recorded and no budget ends anything."""

    def __init__(self, spec: RunSpec, cell: OpenCell, shared: _Shared):
        super().__init__(spec, TaskView(cell.task), cell.world, cell.generator, Meter(), lambda line: None)
        self._shared, self._judged = shared, self.influences
        self.influences = self._influences

    def metagradients(
        self, texts: Sequence[str], *names: object, optimizer: str | None = None, lr: float | None = None, per_token: bool = False
    ) -> Metagradients:
        """Once for all methods, of tokens where the loss allows, because a text's is their sum and they cost no more."""
        key, causal = (tuple(texts), names, optimizer, lr), self.spec.training.reduction == "length"
        if names[:1] != (self._shared.step,):
            self._shared.clear()
            self._shared.step = names[0] if names else None
        if per_token and not causal:
            return super().metagradients(texts, *names, optimizer=optimizer, lr=lr, per_token=True)  # which says why not
        if key not in self._shared:
            self._shared[key] = super().metagradients(texts, *names, optimizer=optimizer, lr=lr, per_token=causal)
        found = self._shared[key]
        return found if per_token or not causal else replace(found, rewards=found.rewards.sum(1))

    def _influences(self, texts: Sequence[str], **how: Any) -> Tensor:
        """Of each different text once: it is judged alone."""
        different = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        return self._judged(list(different), **how)[[different[text] for text in texts]]


def _worth(bench: Workbench, texts: Sequence[str], step: int, left_out: Sequence[int]) -> Worth:
    """Of a step's completions as one dataset, dealt into T batches as its metagradients are."""
    tau_N = bench.metagradients(texts, step, 0).rewards.double().cpu()
    batches, order = bench.batches(texts, step, 0)
    effects = exact_effects(bench.world.target, batches, order, bench.task.signal, bench.optimizer, left_out, bench.engine)
    return Worth(tau_N, effects)


def _rewards(file: Path, method: Method, bench: Workbench, rollouts: Rollouts) -> Tensor:
    """(N,) float64, or (N, W) of single tokens. Raises CellError for another shape and for what is not finite."""
    said = contract.called(file, "rewards", method.rewards, bench, rollouts)
    rewards, count = torch.as_tensor(said, dtype=torch.float64).cpu(), len(rollouts.completions)
    if rewards.shape not in ((count,), (count, max(map(len, rollouts.completion_ids)))):
        raise CellError(f"{file.name}: rewards returned shape {tuple(rewards.shape)} for {count} completions; one each, or each token's")
    if not rewards.isfinite().all():
        bad = int((~rewards.isfinite()).view(count, -1).any(1).sum())
        raise CellError(f"{file.name}: {bad} of {count} rewards are not finite; there is no gradient of them")
    return rewards


def _advantages(credit: Tensor, drawn: Completions, expected: Baseline, group_size: int, scaling: str) -> Tensor:
    """(N,) of rewards (N,), or (N, W) of single tokens' credit. A baseline that learns does so from batch to batch, as in a run: each
    batch is judged by what earlier ones taught, which costs no independence of the means."""
    if credit.ndim == 1:
        return advantages(credit, group_size, scaling)
    returns_NW = returns_to_go(credit)
    alive_NW = alive(drawn.ids, credit.shape[1])
    return token_advantages(returns_NW, expected(returns_NW, drawn.ids), alive_NW, group_size, scaling)


def _without_nan(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: _without_nan(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [_without_nan(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found
