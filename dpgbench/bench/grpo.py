"""The policy-gradient loop on TRL's GRPOTrainer, shared by every method that trains its generator. The only file that imports trl.

A method differs from the next in one function: rollouts in, one reward per completion out, or credit for each of its tokens
(`token_credit`), for which TRL's loss takes advantages of shape (B, T). The advantage of the DPG paper
(arXiv 2604.08423, section 3) is (reward - group mean) / group std. TRL adds 1e-4 to that divisor, which is far larger than a
metagradient, so advantages are computed here and handed to TRL as rewards with `scale_rewards="none"`; TRL's own subtraction of the
group mean then changes nothing, because every scaling here leaves groups with mean zero.

What is sampled, deployed and updated must be one distribution. So prompts become tokens, completions are drawn and texts are read by
`Generator`, here as for a deployment dataset, and not by TRL, which has ways of its own for each (which tokens end a completion, say).
TRL pads prompts on the left and gives the model no positions, and a model with learned positions (GPT-2) then counts them from the first
pad: in an update it would see other positions than in sampling, and other probabilities. `models.positions_from_the_mask` mends that.
"""

from __future__ import annotations

import functools
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import greenlet
import torch
from accelerate.utils import pad_across_processes
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from dpgbench.bench import flops, tracking
from dpgbench.bench.best_of import Candidates
from dpgbench.bench.distributed import SINGLE_PROCESS, SingleProcess
from dpgbench.bench.likelihood import completion_log_probs
from dpgbench.bench.spending import OVERRUN, Spending
from dpgbench.bench.token_credit import Baseline, alive, returns_to_go, token_advantages
from dpgbench.bench.training_state import WayBack, numbers_of, restore_optimizer, restore_weights, tensors_of
from dpgbench.bench.weight_average import WeightAverage
from dpgbench.bench.workbench import Workbench
from dpgbench.core.errors import CellError, UserError
from dpgbench.core.plugin_types import Prompt, Snapshot
from dpgbench.core.seeds import derive, torch_seeded
from dpgbench.core.settings import Policy
from dpgbench.metagrad.loss import padding_is_computed
from dpgbench.worlds import adapters
from dpgbench.worlds.decoding import keeps_plain_cache
from dpgbench.worlds.generator import Generator
from dpgbench.worlds.models import positions_from_the_mask, quiet


@dataclass(frozen=True)
class Rollouts:
    """One step's completions; those of one prompt are adjacent."""

    step: int
    prompts: list[Prompt]
    completions: list[str]
    completion_ids: list[list[int]]
    """The generator's tokens, up to and with the end, or cut without one."""


Reward = Callable[[Rollouts], Sequence[float] | Tensor]
"""One reward per completion, or credit for each of its tokens: (N, W), W the tokens of the longest, zero beyond a completion's own."""

MOST_STEPS = 10_000  # where only a budget ends a run
SCHEDULES = {  # of the learning rate: its factor after a share of the run
    "constant": lambda share: 1.0,
    "linear": lambda share: max(0.0, 1.0 - share),
    "cosine": lambda share: (1 + math.cos(math.pi * min(1.0, share))) / 2,
}


def train_policy(
    bench: Workbench,
    reward: Reward,
    *,
    generator: Generator | None = None,
    instruction: str | None = None,
    sample: Callable[[Sequence[Prompt]], list[str]] | None = None,
    baseline: str = "group",
) -> Iterator[Snapshot]:
    """GRPO with one batch-level reward call per step; yields the untrained generator (step 0) and then every step.

    A `reward` that gives one number per completion has the group's mean subtracted (`advantages`). One that gives credit to single tokens
    has each token paid its return-to-go less `baseline`, one of `credit.BASELINES`.

    A policy that writes the deployment texts itself needs no more than that; with `policy.best_of` each of them is the best of so many of
    the trained generator's (`best_of.Candidates`), charged as such. Any other one is `generator`, a copy of the bench's, trained
    on the same prompts with `instruction` after each; `sample` says how a snapshot writes texts, and is called with the averaged weights
    in that copy.
    Ends after `policy.steps`, or before the step that would go over the cell's budget; one that is dearer than any before and does go over
    is undone, and the snapshot before it yielded again. Learning rate and entropy bonus follow the nearer of the two ends, so that a run
    which a budget ends has had its whole schedule.
    Cost per step: sampling, whatever `reward` spends, and 3F of the generator on prompts and completions, less the LM head where there is
    nothing to predict; with low-rank adapters (`policy.lora`) little more than 2F; with vLLM's rollouts (`policy.rollout`), and with
    mini-batches, another F.
    Raises CellError if a reward is not finite or has the wrong count, and whatever `reward` raises: never a batch of zeros.
    """
    policy, saved = bench.options.policy, bench.saved
    best_of = policy.get("best_of", 1)
    if sample is not None and best_of > 1:
        raise UserError(f"policy.best_of={best_of}: {bench.spec.method.label} has its own way of writing deployment texts; write best_of=1")
    generator = generator or bench.generator
    generator.adapt(adapters.settings(bench.options), bench.seed("lora"))
    average = WeightAverage(generator.model, policy.averaging)
    expected = Baseline(baseline, generator, policy.group_size, bench.seed("baseline"))
    if saved is not None:
        restore_weights(generator.model, saved.tensors, average.mean)
        expected.restore(saved.tensors)

    def snapshot(step: int) -> Snapshot:
        def write(prompts: Sequence[Prompt]) -> list[str]:
            with average.loaded():
                if sample is not None:
                    return sample(prompts)
                if best_of == 1:
                    return bench.sample(prompts, "deployment")
                return Candidates(bench, "auto", "deployment").best(prompts, best_of)[0]

        return Snapshot(step, write, weights=average.weights if sample is None else None)

    def way_back_where_dear() -> WayBack | None:
        """From the next step, where one three times as dear as any before would not fit."""
        return WayBack(bench, generator.model, average.mean) if spending.spent + 3 * spending.dearest > 1 else None

    first = saved.step if saved else 0
    spending = Spending(*(saved.numbers["spending"] if saved else ()))
    yield snapshot(first)
    if first == (policy.steps or MOST_STEPS) or not spending.leaves_a_step(first, bench.spent_share()):
        return
    trackers = list(policy.get("report_to", []))
    with (
        tempfile.TemporaryDirectory() as scratch,
        _quiet(),
        positions_from_the_mask(generator.model),
        tracking.into(bench.tracking or Path(scratch), trackers),
    ):
        loop = _Loop(bench, reward, policy, generator, expected)
        trainer = _Trainer(
            model=generator.model,
            processing_class=generator.tokenizer,
            args=_trl_settings(bench, policy, generator, scratch),
            train_dataset=_Prompts(bench, policy, instruction).from_step(first, policy.steps or MOST_STEPS),
            reward_funcs=loop.advantages_of,
            callbacks=[loop],
        )
        trainer.remove_callback(PrinterCallback)
        loop.trainer, trainer.rollout_batch, trainer.generator = trainer, policy.get("rollout_batch"), generator
        trainer.group, trainer.rollout_seed = bench.group, bench.seed("rollouts")
        way_back = way_back_where_dear()
        for step in loop.steps():
            average.update(step)
            # Asking for its price draws it: only where one that is twice as dear as the last would not fit, by the first process's clock.
            if way_back and bench.group.broadcast(bench.spent_share(answers=2) > 1) and bench.share_with(snapshot(step)) > 1 + OVERRUN:
                way_back.take()
                yield snapshot(step - 1)
                return
            bench.checkpoint(
                step,
                lambda: tensors_of(generator.model, average.mean, trainer.optimizer) | expected.tensors(),
                lambda: {**numbers_of(trainer.optimizer, trainer.lr_scheduler), "spending": [spending.spent, spending.dearest]},
            )
            yield snapshot(step)
            if not spending.leaves_a_step(step, bench.spent_share()):
                return
            way_back = way_back_where_dear()


def advantages(rewards: torch.Tensor, group_size: int, scaling: str) -> torch.Tensor:
    """(reward - group mean), divided by the group's std ("group"), the batch's std ("batch") or nothing ("none").

    rewards: (P * G,), groups adjacent, any unit. A group (batch) whose rewards are all equal gets zeros. Standard deviations have
    ddof=1, as TRL's.
    """
    groups = rewards.double().view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if scaling == "none":
        return centred.flatten().float()
    deviation = groups.std(1, keepdim=True) if scaling == "group" else groups.std().expand(len(groups), 1)
    # Equal rewards differ in the last bits after centring; a divisor of that size would blow them up to advantages of order one.
    noise = 1e-12 * groups.abs().amax(1, keepdim=True)
    return torch.where(deviation > noise, centred / deviation, 0.0).flatten().float()


class _Loop(TrainerCallback):
    """Stands between TRL and the bench: seeds each step, turns rewards into advantages, records, and hands steps out one by one."""

    trainer: _Trainer

    def __init__(self, bench: Workbench, reward: Reward, policy: Policy, generator: Generator, baseline: Baseline):
        self.bench, self.reward, self.policy, self.generator, self.baseline = bench, reward, policy, generator, baseline
        self.updates_per_step = policy.completions // (policy.minibatch or policy.completions)
        self.step = bench.saved.step if bench.saved else 0
        self.line: dict = {}
        self.shape = flops.shape_of(generator.model, trains=True)
        self.__name__ = "advantages"  # TRL names its logs after the reward function

    def steps(self) -> Iterator[int]:
        """Run the trainer in a greenlet, so that `for step in loop.steps()` pauses it after each step, where its stack stands."""
        self._outside = greenlet.getcurrent()
        training = greenlet.greenlet(lambda: self.trainer.train() and None)
        try:
            while (step := training.switch()) is not None:
                yield step
        finally:
            if not training.dead:
                training.throw()  # unwinds the trainer when the consumer stops early

    def advantages_of(
        self,
        prompts: list[Prompt],
        completion_ids: list[list[int]],
        log_metric: Callable[[str, float], None],
        **_: object,
    ) -> list[float]:
        """TRL's reward function: called once per step, with all its completions or this process's share of them; everybody judges all."""
        group, texts = self.bench.group, self.generator.texts_of(completion_ids)
        mine = slice(group.rank * len(texts), (group.rank + 1) * len(texts))
        prompts, texts, completion_ids = zip(*group.gathered(list(zip(prompts, texts, completion_ids, strict=True))), strict=True)
        prompts, texts, completion_ids = list(prompts), list(texts), [list(ids) for ids in completion_ids]
        self._charge(prompts, completion_ids)
        rewards = torch.as_tensor(self.reward(Rollouts(self.step, prompts, texts, completion_ids)), dtype=torch.float64).cpu()
        rewards = group.broadcast(rewards)  # processes' sums may differ in the last bits
        if rewards.shape not in ((len(texts),), (len(texts), max(map(len, completion_ids)))):
            raise CellError(
                f"{self.bench.spec.method.name}: its rewards have shape {tuple(rewards.shape)} for {len(texts)} completions; "
                "it must give one reward each, or one for each token"
            )
        if not rewards.isfinite().all():
            bad = int((~rewards.isfinite()).view(len(texts), -1).any(1).sum())
            raise CellError(f"{bad} of {len(texts)} rewards are not finite; training on them would be training on noise")
        if rewards.dim() == 1:
            result = advantages(rewards, self.policy.group_size, self.policy.scale_advantages)
        else:
            of_tokens = self._token_advantages(rewards, completion_ids)
            self.trainer.token_advantages = of_tokens[mine]
            rewards, result = rewards.sum(1), of_tokens.sum(1) / torch.tensor([len(ids) for ids in completion_ids])
        groups = rewards.view(-1, self.policy.group_size)
        self.line = {
            "reward_mean": float(rewards.mean()), "reward_std": float(rewards.std()),
            "reward_min": float(rewards.min()), "reward_max": float(rewards.max()),
            "groups_without_signal": int((groups.amax(1) == groups.amin(1)).sum()),
            "completion_tokens": sum(map(len, completion_ids)) / len(texts),
            "texts": texts[:: max(1, len(texts) // 4)][:4],
            "rollouts": {"texts": texts, "rewards": rewards.tolist(), "advantages": result.tolist()},
        }  # fmt: skip
        if self.policy.get("report_to"):
            for name, value in {**self.bench.noted(), **self.line, "flops": self.bench.meter.total_flops}.items():
                if isinstance(value, int | float):
                    log_metric(f"dpgbench/{name}", float(value))
        return result[mine].tolist()

    def _token_advantages(self, credit_NW: Tensor, completion_ids: list[list[int]]) -> Tensor:
        """(N, W), zero beyond a completion's own tokens. Noted: the share of the returns' variance that the baseline leaves."""
        returns_NW, alive_NW = returns_to_go(credit_NW), alive(completion_ids, credit_NW.shape[1])
        baseline_NW = self.bench.group.broadcast(self.baseline(returns_NW, completion_ids))
        if self.baseline.flops:
            self.bench.meter.charge("critic", self.baseline.flops)
        spread = float(returns_NW[alive_NW].var(correction=0))
        left = float((returns_NW - baseline_NW)[alive_NW].square().mean())
        self.bench.note(unexplained=left / spread if spread else 0.0)
        return token_advantages(returns_NW, baseline_NW, alive_NW, self.policy.group_size, self.policy.scale_advantages)

    def on_train_begin(self, args, state, control, **_: object) -> None:
        """Go on where a checkpoint was made: TRL's own resuming replays prompts from its second epoch on, and pickles."""
        if (saved := self.bench.saved) is not None:
            restore_optimizer(self.trainer.optimizer, self.trainer.lr_scheduler, saved.tensors, saved.numbers)
            state.global_step = self.trainer._globalstep_last_logged = saved.step * self.updates_per_step

    def on_step_begin(self, args, state, control, **_: object) -> None:
        """Rollouts draw from torch's default generator: give each step its own seed, so that a step does not depend on the ones before."""
        torch.manual_seed(derive(self.bench.seed("rollouts"), state.global_step))
        share = max(self.step / (self.policy.steps or MOST_STEPS), min(1.0, self.bench.spent_share()))
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = self.policy.lr * SCHEDULES[self.policy.lr_schedule](share)
        start, final = self.policy.entropy_bonus, self.policy.entropy_bonus_final
        if start and final is not None:
            self.trainer.entropy_coef = start + (final - start) * share

    def on_log(self, args, state, control, logs=None, **_: object) -> None:
        """After each update TRL logs; the update that completes a step completes its record, and the step is handed out."""
        if "loss" not in logs or state.global_step % self.updates_per_step:
            return
        self.step += 1
        self.bench.record(step=self.step, entropy=logs["entropy"], gradient_norm=float(logs["grad_norm"]), **self.line)
        self._outside.switch(self.step)

    def _charge(self, prompts: list[Prompt], completion_ids: list[list[int]]) -> None:
        batch, group = len(prompts), self.policy.group_size
        of_each = self.generator.tokenize(prompts[::group])["attention_mask"].sum(1).tolist()  # a group shares its prompt
        lengths = [length for length in of_each for _ in range(group)]
        for part in _parts(batch, self.policy.get("rollout_batch")):
            self.bench.charge_generation(
                len(prompts[part]), max(lengths[part]), max(map(len, completion_ids[part])), generator=self.generator
            )
        prompt_length, new_tokens = max(lengths), max(map(len, completion_ids))
        update = self.shape.step_update_flops(self.policy, batch, prompt_length, new_tokens)
        self.bench.meter.charge("policy_update", update, trained=sum(map(len, completion_ids)))


class _Trainer(GRPOTrainer):
    """TRL's trainer, with a step's work in parts that do not depend on how many processes share them.

    Completions are sampled in calls of `rollout_batch`, each with a seed of its own; in one call, whose keys and values may outgrow any
    memory, if there is none. The parts of an update are dealt out as they would follow one another in a single process.
    """

    generator: Generator
    rollout_batch: int | None = None
    rollout_seed: int = 0
    group: SingleProcess = SINGLE_PROCESS
    token_advantages: Tensor | None = None
    """(B, W) of this process's completions, where the reward gave credit to single tokens: TRL multiplies each token's loss by its own."""
    _sampling = False

    def _tokenize_prompts(self, prompts):
        return self.generator.token_ids(prompts), None, {}

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.token_advantages is not None:
            width = output["completion_ids"].shape[1]  # TRL's own padding: of this process's completions alone
            paid = self.token_advantages[:, :width]
            output["advantages"] = torch.nn.functional.pad(paid, (0, width - paid.shape[1])).to(output["advantages"].device)
        return output

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, **more):
        if self.use_vllm:  # which batches by itself
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, **more)
        if self.rollout_batch is None:  # the step's own seed, see `on_step_begin`
            return self.generator.write(prompt_ids), None
        parts, completion_ids = _parts(len(prompt_ids), self.rollout_batch), []
        for number, part in enumerate(parts, start=self.group.rank * len(parts)):
            with torch_seeded(derive(self.rollout_seed, self.state.global_step, "part", number)):
                completion_ids += self.generator.write(prompt_ids[part])
        return completion_ids, None

    def _prepare_inputs(self, generation_batch):
        """TRL shuffles a process's own rollouts into mini-batches; here those of all processes, so that each is what one would have."""
        if self.group.size == 1 or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        place = self._step % self.args.steps_per_generation
        if place == 0:
            self._sampling = True
            rollouts = self._generate_and_score_completions(generation_batch)
            self._sampling = False
            self._buffered_inputs = self._dealt(rollouts)
        return self._buffered_inputs[place]

    def _get_per_token_logps_and_entropies(self, model, ids, mask, width, batch_size=None, *, compute_aux_loss=False, **more):
        """TRL asks for what mini-batches are compared with before they are dealt out, and padded as they will be: too early."""
        if self._sampling and self.group.size > 1:
            return None, None, None
        with self.generator.products():
            if compute_aux_loss or not self._shares_prompts(ids.shape[1] - width):
                return super()._get_per_token_logps_and_entropies(
                    model, ids, mask, width, batch_size, compute_aux_loss=compute_aux_loss, **more
                )

            def in_tiles(inputs: dict, targets: Tensor) -> tuple[Tensor, Tensor]:
                outputs = model(**inputs, shift_labels=targets, fused_lm_head=True)
                return outputs.log_probs, outputs.entropy

            parts = [completion_log_probs(model, ids[part], mask[part], width, in_tiles) for part in _parts(len(ids), batch_size)]
        return *map(torch.cat, zip(*parts, strict=True)), None

    def _shares_prompts(self, prompt_length: int) -> bool:
        """Whether an update can go on from a prompt's keys and values: they are kept, and no wrapper waits for one forward pass."""
        plain = self.group.size == 1 and not self.args.gradient_checkpointing and not padding_is_computed()
        return plain and prompt_length > 1 and keeps_plain_cache(self.generator.model)

    def _dealt(self, mine: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """From every process's rollouts, this process's inputs of each forward pass of the step."""
        size, rank, gather = self.args.per_device_train_batch_size, self.group.rank, self.accelerator.gather
        pad = {"prompt_ids": self._tokenizer.pad_token_id, "completion_ids": self._tokenizer.pad_token_id}
        rows = {
            name: gather(pad_across_processes(value, dim=1, pad_index=pad.get(name, 0), pad_first=name.startswith("prompt_")))
            for name, value in mine.items()
            if value.ndim
        }
        order = torch.randperm(len(rows["advantages"]))  # as TRL draws it: the default generator has the step's seed in every process
        parts = order.to(rows["advantages"].device).split(size)[rank :: self.group.size]
        whole = {name: value for name, value in mine.items() if not value.ndim}
        dealt = [{**{name: value[part] for name, value in rows.items()}, **whole} for part in parts]
        if self.args.gradient_accumulation_steps < len(dealt):  # several updates: the later ones weigh by how far they have come
            for inputs in dealt:
                ids, mask = (torch.cat([inputs[f"prompt_{what}"], inputs[f"completion_{what}"]], dim=1) for what in ("ids", "mask"))
                with torch.no_grad():
                    before, _, _ = self._get_per_token_logps_and_entropies(self.model, ids, mask, inputs["completion_ids"].shape[1])
                inputs["old_per_token_logps"] = before
        return dealt


def _parts(count: int, size: int | None) -> list[slice]:
    """`count` things in runs of `size`; None: all at once."""
    return [slice(start, start + (size or count)) for start in range(0, count, size or count)]


class _Prompts:
    """Each step's prompts, drawn when they are asked for: the same at step t however many steps there will be.

    `datasets` pickles a transform to name it and copies it with its data set: there is one, and its pickle does not hold the bench.
    """

    def __init__(self, bench: Workbench, policy: Policy, instruction: str | None):
        self.bench, self.instruction = bench, instruction
        self.per_step = policy.completions // policy.group_size
        self.of_step = functools.lru_cache(maxsize=2)(self._of_step)

    def __call__(self, rows: dict[str, list[int]]) -> dict[str, list[Prompt]]:
        return {"prompt": [self.of_step(number // self.per_step)[number % self.per_step] for number in rows["number"]]}

    def _of_step(self, step: int) -> list[Prompt]:
        prompts = self.bench.prompts(self.per_step, "policy", step)
        return prompts if self.instruction is None else self.bench.world.instruct(prompts, self.instruction)

    def __getstate__(self) -> dict:
        return {}

    def __deepcopy__(self, memo: dict) -> _Prompts:
        return self

    def from_step(self, first: int, last: int) -> Dataset:
        """The prompts of steps `first` to `last` - 1, a row each."""
        return Dataset.from_dict({"number": range(first * self.per_step, last * self.per_step)}).with_transform(self)


def _trl_settings(bench: Workbench, policy: Policy, generator: Generator, scratch: str) -> GRPOConfig:
    """The paper's GRPO (no KL term, temperature 1, one pass) in TRL's words."""
    updated = policy.minibatch or policy.completions
    forward = policy.micro_batch or updated
    together = forward * bench.group.size  # rows in a forward pass of all processes
    on_cpu = not torch.cuda.is_available()
    if policy.get("rollout") == "vllm":
        longest = bench.spec.scale.get("max_prompt_tokens")
        vllm = {
            "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": policy.vllm_memory,
            "vllm_max_model_length": longest and longest + generator.max_completion_tokens,
            "generation_kwargs": {"stop_token_ids": generator.ends},
        }  # fmt: skip
    else:
        vllm = {}
    return GRPOConfig(
        output_dir=scratch, use_cpu=on_cpu, bf16=False,
        gradient_checkpointing=bool(policy.get("activation_checkpointing")), report_to=list(policy.get("report_to", [])),
        run_name=bench.spec.folder, disable_tqdm=True, save_strategy="no",
        logging_steps=1, logging_nan_inf_filter=False, seed=bench.seed("trainer") % 2**31, shuffle_dataset=False, dataloader_num_workers=0,
        max_steps=(policy.steps or MOST_STEPS) * (policy.completions // updated),
        per_device_train_batch_size=forward, gradient_accumulation_steps=updated // together,
        steps_per_generation=policy.completions // together, ddp_find_unused_parameters=False, log_level_replica="error",
        num_generations=policy.group_size, num_iterations=1, beta=0.0, scale_rewards="none", loss_type=policy.loss_type,
        temperature=1.0, top_p=1.0, top_k=0, max_completion_length=generator.max_completion_tokens,
        learning_rate=policy.lr, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=policy.max_grad_norm,
        entropy_coef=policy.entropy_bonus, **vllm,
    )  # fmt: skip


class _quiet:
    """TRL, datasets and transformers narrate on standard error; a cell's progress has its own display."""

    LOGGERS = ("trl", "datasets")

    def __enter__(self) -> None:
        self._verbosity = transformers_logging.get_verbosity()
        quiet()
        self._levels = [logging.getLogger(name).level for name in self.LOGGERS]
        for name in self.LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"transformers\.generation")

    def __exit__(self, *error: object) -> None:
        self._warnings.__exit__(*error)
        for name, level in zip(self.LOGGERS, self._levels, strict=True):
            logging.getLogger(name).setLevel(level)
        transformers_logging.set_verbosity(self._verbosity)
