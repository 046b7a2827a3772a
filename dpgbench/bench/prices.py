"""What the parts of a cell cost, for a method that says beforehand what it will spend."""

from __future__ import annotations

import math

from dpgbench.bench.flops import Shape, critic_code, critic_features, critic_flops
from dpgbench.core.cell import RunSpec
from dpgbench.core.plugin_types import TaskInfo


class Prices:
    """What the parts of a cell cost, in FLOPs, as if every text were as long as it may be: what `Method.planned_flops` adds up."""

    def __init__(self, spec: RunSpec, task: TaskInfo, generator: Shape, target: Shape, prompt_tokens: int):
        self.spec, self.task, self.generator, self.target = spec, task, generator, target
        self.prompt, self.written = prompt_tokens, spec.scale.max_completion_tokens
        self.at_once, self.updated = spec.scale.sampling_batch, 0  # texts sampled and updated on at a time, for memory
        self.earlier = 0.0
        """Of deployment datasets before the last, where they cost more than the generator's: nobody's charge, but this machine's time."""
        self.last: float | None = None
        """The last deployment dataset, where it costs another sum than `deployment` says."""

    def sampled(self, texts: int, *, after: int = 0, written: int | None = None) -> float:
        """One text each for so many prompts that are `after` tokens longer; texts of `written` tokens where they are others than usual."""
        return self.generator.sampling_flops(texts, self.prompt + after, self.written if written is None else written)

    def deployment(self, *, after: int = 0) -> float:
        """A deployment dataset written by the generator, or by its policy as best of so many (`policy.best_of`)."""
        texts, best_of = self.spec.scale.deployment_texts, (self.spec.method.get("policy") or {}).get("best_of", 1)
        return self.sampled(texts, after=after) if best_of == 1 else self.best_of(best_of, texts, after=after)

    def best_of(self, n: int, texts: int, criterion: str = "auto", *, after: int = 0) -> float:
        """So many texts, each the best of n by a criterion of `best_of.CRITERIA`. Left out: Phi, of which only the task knows the cost."""
        judged_for_free = criterion != "utility" and "score" in self.task.defines
        return n * self.sampled(texts, after=after) + (0.0 if judged_for_free else 3 * self.read(n * texts))

    def all_spent(self, flops: float, tokens: int) -> float:
        """The whole budget, spent on work of which a piece costs so many FLOPs and generates so many tokens."""
        budget = self.spec.budget
        return min(budget.get("flops", math.inf), flops * budget.get("tokens", math.inf) / tokens)

    def read(self, texts: int) -> float:
        """F: one forward pass of the target on so many texts; training on them is 3F."""
        return self.target.forward_flops(texts, self.spec.training.max_length)

    def curvature(self, texts: int) -> float:
        """EK-FAC of the target on so many texts, if Phi's gradient reaches all of it."""
        return self.target.curvature_flops(texts, self.spec.training.max_length)

    def baseline(self, kind: str) -> float:
        """What a policy step's tokens are compared with, one of `credit.BASELINES`: nothing but for a critic, which is fitted."""
        if kind != "critic":
            return 0.0
        features = critic_features(self.written, critic_code(self.generator.width))
        return critic_flops(self.spec.method.policy.completions * self.written, features)

    def finetuned(self, texts: int, batch: int) -> float:
        """Teaching the generator so many texts, `batch` at a time; each has an end then, one that was cut as well."""
        self.updated = max(self.updated, batch)
        return self.generator.training_flops(texts, self.prompt + self.written + 1)

    def policy(self, rewards: float, *, after: int = 0, written: int | None = None) -> float | None:
        """All steps of the method's policy, whose rewards cost so much a step; None without a number of steps or a budget that ends it."""
        policy, budget = self.spec.method.policy, self.spec.budget
        texts, written = policy.completions, self.written if written is None else written
        self.at_once = max(self.at_once, policy.get("rollout_batch") or texts)
        self.updated = max(self.updated, policy.micro_batch or policy.minibatch or texts)
        update = self.generator.step_update_flops(policy, texts, self.prompt + after, written)
        steps = policy.steps
        if steps is None and "tokens" in budget:
            steps = budget["tokens"] / (texts * written)
        if steps is None:
            return budget.get("flops")
        return steps * (self.sampled(texts, after=after, written=written) + update + rewards)
