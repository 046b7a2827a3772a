"""The harness's own rules for a cell's settings, checked before anything heavy is loaded. Plug-ins check their own options."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpgbench.bench import distributed
from dpgbench.bench.spending import BUDGET
from dpgbench.bench.tracking import PACKAGES
from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import UserError, did_you_mean
from dpgbench.worlds.text_files import flaw_of, is_passages

LARGEST = 2**63 - 1

# What a setting must be before a rule can ask more of it; with "?" null will do as well. Others say it in a rule of their own.
KINDS = {
    "a whole number": {
        "training": ["inner_steps", "max_length", "micro_batch?"],
        "scale": [
            "threads",
            "max_completion_tokens",
            "sampling_batch",
            "deployment_texts",
            "deployment_steps?",
            "snapshots",
            "max_prompt_tokens?",
        ],
        "policy": ["completions", "group_size", "rollout_batch?", "minibatch?", "micro_batch?", "best_of"],
    },
    "a number": {
        "training": ["lr", "eps", "eps_root", "weight_decay"],
        "policy": ["lr", "max_grad_norm", "entropy_bonus", "entropy_bonus_final?", "averaging"],
    },
    "a word": {
        "scale": ["generator", "target", "corpus_subset?", "corpus_column?", "corpus_revision?", "generator_revision?", "target_revision?"],
        "policy": ["loss_type"],
    },
}
TYPES = {"a whole number": (int,), "a number": (int, float), "a word": (str,)}


def check(config: Mapping[str, Any]) -> None:
    """Apply every rule to one resolved configuration. Raises UserError naming value, rule and fix."""
    check_seed(config["seed"])
    for section in ("task", "method", "training", "scale", "budget"):
        _check_storable(section, config.get(section))
    for section, values in (("training", config["training"]), ("scale", config["scale"]), ("policy", config["method"].get("policy"))):
        _check_kinds(_Section(section, values or {}))
    _check_budget(_Section("budget", config.get("budget", {})))
    _check_training(_Section("training", config["training"]))
    _check_scale(_Section("scale", config["scale"]), config["training"]["inner_steps"])
    if (lora := config["method"].get("lora") or (config["method"].get("policy") or {}).get("lora")) is not None:
        _check_lora(_Section("policy.lora", lora))
    if config["method"].get("policy") is not None:
        _check_policy(_Section("policy", config["method"]["policy"]), config["training"]["inner_steps"], bool(config.get("budget")))


def check_sections(config: Mapping[str, Any], names: Sequence[str]) -> None:
    """That there are sections to look for settings in, before any rule does, and that what names plug-ins and files are words."""
    parts = {name: config.get(name) for name in names}
    for kind in ("task", "method"):
        inside = parts[kind] if isinstance(parts.get(kind), Mapping) else {}
        for key in ("name", "label", "file"):
            if inside.get(key) is not None and not isinstance(inside[key], str):
                raise UserError(f"{kind}.{key}={inside[key]}: must be a word; write {kind}.{key} as text, in quotes where it is a number")
        parts |= {f"{kind}.{key}": inside[key] for key in ("policy", "lora") if inside.get(key) is not None}
        policy = inside.get("policy")
        parts |= {"policy.lora": policy["lora"]} if isinstance(policy, Mapping) and policy.get("lora") is not None else {}
    parts |= {"budget": config["budget"]} if "budget" in config else {}
    for name, section in parts.items():
        if not isinstance(section, Mapping):
            raise UserError(f"{name}={section}: must be a section of settings, a mapping; leave it out, or write its settings below it")


def check_seed(seed: Any) -> None:
    """The one setting that differs between a grid's cells of the same settings."""
    _check_storable("seed", seed)
    if not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed={seed}: a seed is a whole number from 0 up; write seed=0")


def _check_storable(name: str, value: Any) -> None:
    """What a run folder and a parquet of results can hold and give back unchanged: a setting of any plug-in too."""
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if not _is_storable(inner):  # names are put together only then: a grid asks this a hundred thousand times
                inside = f"{name}.{key}" if isinstance(value, dict) else f"{name}[{key}]"
                _check_storable(inside.replace("method.policy", "policy"), inner)
            if isinstance(value, dict) and type(key) is not str:
                raise UserError(f"{name}: the key {key!r} is not a word; quote it in the YAML")
    elif isinstance(value, str):
        if (flaw := flaw_of(value)) is not None:
            raise UserError(f"{name}={value!r}: {flaw} cannot be stored; write it as UTF-8")
    elif isinstance(value, int):
        if not -LARGEST - 1 <= value <= LARGEST:
            raise UserError(f"{name}={_short(value)}: a whole number has 64 bits; write one from {-LARGEST - 1} to {LARGEST}")
    elif isinstance(value, float):
        if not math.isfinite(value) and name != "budget.flops":  # infinite until a cell that is matched to another is known to run
            raise UserError(f"{name}={value}: a setting must be finite, and beyond 1.8e308 a number is not; write a smaller one, or null")
        if value == 0 and math.copysign(1, value) < 0:
            raise UserError(f"{name}=-0.0: the same as 0.0, and would be another cell; write {name}=0.0")
    elif value is not None:
        raise UserError(f"{name}={value!r}: a {type(value).__name__} cannot be stored; write a word, a number, true, false, null or a list")


def _is_storable(value: Any) -> bool:
    """Whether a value surely is: an ordinary word or number."""
    kind = type(value)
    if kind is str:
        return value.isascii() and "\0" not in value
    if kind is float:
        return 0 < abs(value) < math.inf
    return value is None or kind is bool or (kind is int and -LARGEST <= value <= LARGEST)


def _short(number: int) -> str:
    """Python refuses to write out more than 4300 digits."""
    return str(number) if number.bit_length() < 200 else f"{'-' if number < 0 else ''}2^{number.bit_length() - 1} or more"


def check_spent(config: Mapping[str, Any], options: Sequence[str]) -> None:
    """Those of a method's options that may be `budget` need one in FLOPs or tokens: what fits into seconds is the machine's."""
    budget = config.get("budget", {})
    for option in options:
        if config["method"].get(option) == BUDGET and not {"flops", "tokens"} & set(budget):
            why = "seconds alone do not say how many" if "seconds" in budget else "there is no budget"
            raise UserError(f"method.{option}=budget: as many as the budget pays for, and {why}; write budget.flops=1e12, or {option}=8")


class _Section:
    """One section's values, and a `require` that knows how to name them."""

    def __init__(self, name: str, values: Mapping[str, Any]):
        self.name, self.values = name, values

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def require(self, key: str, good: bool, rule: str) -> None:
        if not good:
            raise UserError(f"{self.name}.{key}={self.values[key]}: {rule}")

    def require_one_of(self, key: str, *choices: str) -> None:
        if self.values[key] not in choices:  # the nearest choice is looked for only then: a grid asks this thousands of times
            self.require(key, False, did_you_mean(self.values[key], choices))

    def require_divides(self, key: str, whole: int, of_what: str) -> None:
        """None, or a divisor of `whole`."""
        part = self.values[key]
        self.require(
            key, part is None or (part > 0 and whole % part == 0), f"must divide {of_what}, {whole}; write {key}=null for all at once"
        )


def _check_kinds(section: _Section) -> None:
    """`KINDS`; a cell stored before there was a setting has none."""
    for kind, sections in KINDS.items():
        types = TYPES[kind]
        for name in sections.get(section.name, ()):
            key = name.removesuffix("?")
            value = section.values.get(key)
            if (type(value) in types and value != "") or key not in section.values or (value is None and name.endswith("?")):
                continue
            whole = str(int(value)) if isinstance(value, float) and value.is_integer() else "8"
            fix = {"a whole number": whole, "a number": "0.1"}.get(kind, f"\"'{value or 'phrasebook'}'\"")
            section.require(key, False, f"must be {kind}{' or null' if name.endswith('?') else ''}; write {section.name}.{key}={fix}")


def _check_budget(budget: _Section) -> None:
    for key, limit in budget.values.items():
        good = isinstance(limit, int | float) and not isinstance(limit, bool) and limit > 0
        budget.require(key, good, f"a limit is a positive number, or null for none; write budget.{key}=1e12")


def _check_training(training: _Section) -> None:
    training.require_one_of("optimizer", "adamw", "sgd")
    training.require_one_of("reduction", "length", "tokens")
    training.require("lr", training["lr"] > 0, "a learning rate is positive; write training.lr=1e-3")
    training.require("inner_steps", training["inner_steps"] >= 1, "the target needs at least one optimizer step; write inner_steps=1")
    training.require("max_length", training["max_length"] >= 2, "an example needs two tokens or more; write max_length=24")
    betas = training["betas"]
    good = isinstance(betas, list | tuple) and len(betas) == 2 and all(type(beta) in (int, float) and 0 <= beta < 1 for beta in betas)
    training.require("betas", good, "two decay rates, numbers from 0 up and below 1; write training.betas=[0.9,0.95]")
    batch = training["micro_batch"]
    training.require("micro_batch", batch is None or batch >= 1, "an example or more at once; write training.micro_batch=null for all")
    for key in ("eps", "eps_root", "weight_decay"):
        training.require(key, training[key] >= 0, f"must be 0 or more; write training.{key}=0.0")
    _check_engine(training)


def _check_engine(training: _Section) -> None:
    """Settings of the metagradient engine; cells stored before there were any have none."""
    values = {"precision": "full", "memory_budget": 0.5, "checkpoint": None, "offload": None, **training.values}
    engine = _Section("training", values)
    engine.require_one_of("precision", "full", "tf32", "bf16")
    budget = values["memory_budget"]
    good = isinstance(budget, int | float) and (0 <= budget <= 1 or (budget > 1 and float(budget).is_integer()))
    engine.require("memory_budget", good, "a share of the device's memory up to 1, or bytes; write memory_budget=0.5 or memory_budget=4e9")
    kept = values["checkpoint"]
    good = kept in (None, "all", "sqrt") or (type(kept) is int and kept >= 1)
    engine.require("checkpoint", good, "null, all, sqrt or a number of steps from 1 up; write checkpoint=sqrt")
    engine.require("offload", values["offload"] in (None, "cpu", "disk"), "null, cpu or disk; write offload=disk")


def _check_scale(scale: _Section, inner_steps: int) -> None:
    texts, given = scale["deployment_texts"], scale["deployment_steps"]
    scale.require(
        "deployment_steps", given is None or given >= 1, "at least one optimizer step; write deployment_steps=null for inner_steps"
    )
    steps, source = (given, "deployment_steps") if given else (inner_steps, "inner_steps")
    fix = f"write deployment_texts={max(1, texts // steps) * steps}"
    scale.require("deployment_texts", texts >= 1 and texts % steps == 0, f"must divide into {source}={steps} batches; {fix}")
    _check_more_deployments(scale, steps, source)
    for role in ("generator", "target"):
        scale.require_one_of(f"{role}_dtype", "float32", "bfloat16")
    corpus = str(scale["corpus"])
    known = corpus in ("phrasebook", "topics") or is_passages(corpus) or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", corpus)
    fix = "choose from: phrasebook, topics, a .txt, .jsonl or .parquet file, or a data set of the hub such as wikimedia/wikipedia"
    scale.require("corpus", bool(known), f"no such corpus; {fix}")
    said = scale["instruction"]
    scale.require(
        "instruction", said is None or (isinstance(said, str) and said.strip()), "a sentence or null; write scale.instruction=null"
    )
    for key, least in (("max_completion_tokens", "a text has a token or more"), ("sampling_batch", "a completion or more at once")):
        scale.require(key, scale[key] >= 1, f"{least}; write scale.{key}=32")
    asked = scale.values.get("wording")
    good = asked is None or (isinstance(asked, str) and asked.count("{passage}") == 1)
    scale.require("wording", good, "a request with {passage} where the passage goes, or null for the paper's; write scale.wording=null")
    if scale.values.get("held_out") is not None:
        scale.require_one_of("held_out", "lambada", "sentences")
    limit = scale.values.get("max_prompt_tokens")
    if limit is not None:
        scale.require("max_prompt_tokens", limit >= 1, "a prompt has a token or more; write max_prompt_tokens=null for no limit")
    good = isinstance(scale["languages"], list | tuple) and all(isinstance(language, str) for language in scale["languages"])
    scale.require("languages", good, "a list of language codes; write scale.languages=[en,de]")
    scale.require("snapshots", scale["snapshots"] >= 1, "at least the last snapshot is scored; write snapshots=1")
    scale.require("threads", scale["threads"] >= 1, "a cell needs a thread; write threads=1")


def _check_more_deployments(scale: _Section, steps: int, source: str) -> None:
    """Other sizes of the deployment dataset; cells stored before there were any have none."""
    sizes = scale.values.get("more_deployments", [])
    if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
        scale.require("more_deployments", False, "a list of whole numbers; write scale.more_deployments=[64,1024], or [] for none")
    if any(size < 1 or size % steps for size in sizes):
        fix = ",".join(str(max(1, size // steps) * steps) for size in sizes)
        scale.require("more_deployments", False, f"each must divide into {source}={steps} batches; write scale.more_deployments=[{fix}]")
    others = sorted(set(sizes) - {scale["deployment_texts"]})
    if len(others) < len(sizes):
        said = f"each once, and deployment_texts={scale['deployment_texts']} is among them anyway"
        scale.require("more_deployments", False, f"{said}; write scale.more_deployments=[{','.join(map(str, others))}]")


def _check_policy(policy: _Section, inner_steps: int, budget: bool) -> None:
    group, completions, steps = policy["group_size"], policy["completions"], policy["steps"]
    policy.require("steps", steps is not None or budget, "without a limit the budget must be one; write budget.flops=1e12, or steps=60")
    good = steps is None or (type(steps) is int and 1 <= steps <= 10_000)
    policy.require("steps", good, "at least one policy update is needed, at most 10000; write steps=60, or method=base for none")
    policy.require_one_of("lr_schedule", "constant", "linear", "cosine")
    policy.require(
        "group_size", group >= 2, "an advantage compares completions of one prompt, so a group needs 2 or more; write group_size=4"
    )
    fix = f"write completions={max(1, completions // group) * group}"
    policy.require(
        "completions", completions >= group and completions % group == 0, f"must divide into groups of group_size={group}; {fix}"
    )
    policy.require(
        "completions", completions % inner_steps == 0, f"must divide into inner_steps={inner_steps} batches; write inner_steps=1"
    )
    policy.require_divides("minibatch", completions, "a step's completions")
    policy.require_divides("micro_batch", policy["minibatch"] or completions, "an update's completions")
    if policy.values.get("rollout_batch") is not None:  # cells stored before there was a choice have none
        policy.require("rollout_batch", policy["rollout_batch"] >= 1, "a completion or more at once; write rollout_batch=null for all")
    trackers = policy.values.get("report_to", [])
    if not isinstance(trackers, list):
        policy.require("report_to", False, "a list of trackers; write policy.report_to=[tensorboard], or [] for none")
    for tracker in trackers:
        policy.require("report_to", tracker in PACKAGES, f"{tracker} is no tracker known here; {did_you_mean(tracker, PACKAGES)}")
    if policy.values.get("rollout", "transformers") != "transformers":
        policy.require_one_of("rollout", "transformers", "vllm")
        share = policy["vllm_memory"]
        good = isinstance(share, int | float) and not isinstance(share, bool) and 0 < share < 1
        policy.require("vllm_memory", good, "a share of the GPU's memory between 0 and 1; write policy.vllm_memory=0.3")
    policy.require("lr", policy["lr"] > 0, "a learning rate is positive; write policy.lr=1e-3")
    policy.require("entropy_bonus", policy["entropy_bonus"] >= 0, "a bonus is 0 or more; write entropy_bonus=0 for none")
    final = policy["entropy_bonus_final"]
    good = not final or (final > 0 and policy["entropy_bonus"] > 0)
    policy.require("entropy_bonus_final", good, "a bonus may fall or rise from one above 0; write entropy_bonus_final=null for no change")
    policy.require("averaging", 0 <= policy["averaging"] < 1, "a decay is at least 0 and below 1; write averaging=0.9, or 0 for none")
    policy.require_one_of("scale_advantages", "group", "batch", "none")
    if "best_of" in policy.values:  # cells stored before there was a choice have none
        policy.require("best_of", policy["best_of"] >= 1, "a deployment text is the best of one completion or more; write policy.best_of=1")


def _check_lora(lora: _Section) -> None:
    """Low-rank adapters; without a rank there are none and this is not asked."""
    rank, alpha, targets = lora["rank"], lora["alpha"], lora["targets"]
    lora.require("rank", type(rank) is int and rank >= 1, "a rank is a whole number from 1 up, or null for no adapters; write rank=8")
    good = isinstance(alpha, int | float) and not isinstance(alpha, bool) and alpha > 0
    lora.require("alpha", good, "a positive number, divided by the rank; write policy.lora.alpha=32")
    good = isinstance(targets, list) and targets and all(isinstance(target, str) and target for target in targets)
    lora.require("targets", bool(good), "a list of names of matrices; write policy.lora.targets=[q_proj,v_proj], or [all-linear] for all")


def check_processes(spec: RunSpec, launcher: str) -> None:
    """Whether torchrun's processes can share this cell. Raises UserError naming value, rule and fix; needs no torch.

    A step's completions are sampled in parts of `rollout_batch` and updated on in parts of `micro_batch`. The parts are the same ones in
    any number of processes, so there must be as many, or a multiple, of each: then a cell's numbers do not depend on that number.
    """
    count = distributed.size()
    if count == 1:
        return
    for kind in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise UserError(
                f"ACCELERATE_USE_{kind}=true: every process holds the whole generator, sharded ones are not supported; start with torchrun"
            )
    if launcher not in ("inline", "debug"):
        raise UserError(f"launcher={launcher}: torchrun's {count} processes run one cell themselves; write launcher=inline")
    if spec.method.get("policy") is None:
        raise UserError(
            f"method={spec.method.label}: trains no policy, so {count} processes have nothing to share; run it without torchrun"
        )
    check_shared(spec, count)


def check_shared(spec: RunSpec, count: int) -> None:
    """Whether so many processes can share this cell of a method that trains a policy. Raises UserError as `check_processes` does."""
    policy = spec.method.policy
    if policy.get("rollout") == "vllm":
        raise UserError(f"policy.rollout=vllm: one process only, and this cell has {count}; write policy.rollout=transformers")
    if policy.get("report_to"):
        raise UserError(
            f"policy.report_to={list(policy.report_to)}: one process only, and this cell has {count}; write policy.report_to=[]"
        )
    updated = policy.minibatch or policy.completions
    for setting, whole, of_what in (
        ("rollout_batch", policy.completions, "completions"),
        ("micro_batch", updated, "an update's completions"),
    ):
        part = policy.get(setting)
        if part is None or whole % part or whole // part % count:
            fix = f"write policy.{setting}={whole // count}" if whole % count == 0 else f"make that a multiple of {count}"
            raise UserError(f"policy.{setting}={part}: must cut {of_what}, {whole}, into parts that {count} processes can share; {fix}")
