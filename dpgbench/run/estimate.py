"""What a cell will cost, before it runs and without torch: FLOPs by the formulas of `flops`, memory by the largest things that must fit.

Both are computed from configuration files alone, as if every completion had its full length, so they are closer to an upper bound than to
an average. How often a method uses the models is known only to the method (`Method.target_passes` or `Method.planned_flops`). The cost of
Phi is known only to the task and is left out. The time on this machine is the FLOPs divided by the speed of matrix products as wide as the
generator, measured on the spot (`flops_a_second`).
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dpgbench.bench import distributed
from dpgbench.bench.flops import Shape
from dpgbench.bench.prices import Prices
from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import UserError
from dpgbench.core.options import Options
from dpgbench.core.plugin_types import TaskInfo
from dpgbench.core.settings import Scale
from dpgbench.plugins import contract
from dpgbench.plugins.registry import Registry
from dpgbench.worlds import adapters, model_files, world

SUSTAINED = 2e13  # FLOPs a second of one GPU; ours: a third of what an H100 has for float32 products, not measured
CALIBRATION = 0.25  # seconds
TOKENS_PER_WORD = 4 / 3  # of English prose, roughly; for corpora whose prompts have no limit

# What the stored scales name, for a machine that has not loaded them yet. From their config.json.
KNOWN = {
    "openai-community/gpt2": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
    "meta-llama/Llama-3.2-1B-Instruct": {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    model_files.SMOLLM2: {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "head_dim": 64, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
    },
}  # fmt: skip
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2")  # as Llama
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Estimate:
    """Of a cell: FLOPs that the method is charged, and bytes on one GPU, which holds both models whether or not it shares the work."""

    flops: float
    memory: float
    evaluation: float = 0.0
    """FLOPs that no budget counts: the deployment datasets of the snapshots before the last, those of other sizes, a target on each."""
    width: int = 0
    """Of the generator's hidden states."""

    @property
    def gpu_hours(self) -> float:
        """At the rate of SUSTAINED."""
        return self.flops / SUSTAINED / 3600


def shape_of(config: Mapping[str, Any], lora: Options | None = None) -> Shape | None:
    """A model's sizes from its config.json, and of its adapters; None for an architecture or targets whose matrices are not known here."""
    kind = config.get("model_type")
    if kind == "gpt2":
        width, layers, vocabulary = config["n_embd"], config["n_layer"], config["vocab_size"]
        inner = config.get("n_inner") or 4 * width
        matrices = [  # of a layer: stage, name, inputs, outputs; those of a stage read what those of the stage before wrote
            (0, "attn.c_attn", width, 3 * width), (1, "attn.c_proj", width, width), (2, "mlp.c_fc", width, inner),
            (3, "mlp.c_proj", inner, width),
        ]  # fmt: skip
        small = layers * (9 * width + inner) + 2 * width + config.get("n_positions", 1024) * width
        cache = 2 * layers * width
        heads_width, heads, tied = width, config["n_head"], config.get("tie_word_embeddings", True)
    elif kind in GATED:
        width, layers, vocabulary, heads = (
            config[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
        )  # fmt: skip
        head = config.get("head_dim") or width // heads
        keys = config.get("num_key_value_heads") or heads
        inner = config["intermediate_size"]
        matrices = [
            *((0, f"self_attn.{name}_proj", width, count * head) for name, count in (("q", heads), ("k", keys), ("v", keys))),
            (1, "self_attn.o_proj", heads * head, width),
            (2, "mlp.gate_proj", width, inner), (2, "mlp.up_proj", width, inner), (3, "mlp.down_proj", inner, width),
        ]  # fmt: skip
        small = layers * 2 * width + width
        cache = 2 * layers * keys * head
        heads_width, tied = heads * head, config.get("tie_word_embeddings", False)
    else:
        return None
    table, products = vocabulary * width, layers * sum(inputs * outputs for _, _, inputs, outputs in matrices)
    adapted = [matrix for matrix in matrices if lora and adapters.matches(matrix[1], lora.targets)]
    if lora and not adapted:
        return None
    added = layers * sum(lora.rank * (inputs + outputs) for _, _, inputs, outputs in adapted)
    first = min((stage for stage, *_ in adapted), default=-1)  # in the first layer nothing before it needs a gradient
    untouched = sum(inputs * outputs for stage, _, inputs, outputs in matrices if stage <= first)
    untouched += sum(lora.rank * inputs for stage, _, inputs, _ in adapted if stage == first)
    return Shape(
        matmul_weights=products + table + added, adapters=added, untouched=untouched,
        attention_flops_per_pair=4 * layers * heads_width, head=table,
        parameters=products + small + table * (1 if tied else 2), untied=products + small + 2 * table,
        vocabulary=vocabulary, cache_per_token=cache, layers=layers, width=width, score_maps=layers * heads,
    )  # fmt: skip


def estimate(spec: RunSpec, registry: Registry) -> Estimate | None:
    """A cell's cost; None where a model's configuration is not at hand, or the method cannot tell."""
    generator, target = _shapes(spec)
    if generator is None or target is None:
        return None
    file = registry.find("task", spec.task.name)
    prices = Prices(spec, TaskInfo(file.name, spec.task, file.defines), generator, target, _prompt_tokens(spec.scale))
    flops = _planned(spec, registry, prices)
    if flops is None:
        return None
    scale, limit = spec.scale, spec.budget.get("flops", math.inf)
    scored, more = scale.snapshots if spec.method.get("policy") is not None else 1, sum(scale.get("more_deployments", []))
    last = prices.deployment() if prices.last is None else prices.last
    evaluation = prices.earlier + (scored - 1) * prices.deployment() + more / scale.deployment_texts * last
    evaluation += 3 * prices.read(scored * scale.deployment_texts + more)
    memory = _memory(spec, generator, target, prices.prompt + prices.written, prices.at_once, prices.updated)
    return Estimate(min(flops, limit), memory, evaluation, generator.width)


def why_none(spec: RunSpec) -> str:
    """What `estimate` lacked where it gave None."""
    if None in _shapes(spec):
        return "their models are not here yet"
    return f"{spec.method.name} has no planned_flops, or it cannot tell (docs/your_method.md)"


def _shapes(spec: RunSpec) -> tuple[Shape | None, Shape | None]:
    """The generator's and the target's."""
    return _shape(spec.scale, "generator", adapters.settings(spec.method)), _shape(spec.scale, "target")


@lru_cache
def flops_a_second(width: int, rows: int) -> float:
    """Of processor time: float32 products of a (rows, width) with a (width, 4 width) matrix, as in a model's layer. Takes CALIBRATION."""
    import numpy

    draw = numpy.random.default_rng(0)
    left, right = (draw.standard_normal(shape, dtype=numpy.float32) for shape in ((rows, width), (width, 4 * width)))
    numpy.matmul(left, right)  # the first one starts threads
    rates, end = [], time.perf_counter() + CALIBRATION
    while not rates or time.perf_counter() < end:
        start, products = time.process_time(), 0
        while (spent := time.process_time() - start) < CALIBRATION / 10:
            numpy.matmul(left, right)
            products += 1
        rates.append(products * 8 * rows * width**2 / spent)
    return statistics.median(rates)


def _memory(spec: RunSpec, generator: Shape, target: Shape, length: int, at_once: int, updated: int) -> float:
    """The two models, gradients and moments of what trains, and the largest of: keys and values in sampling, an update, the target's run.

    Tapes of the metagradients are not in it: they take what `training.memory_budget` leaves.
    """
    training, width = spec.training, BYTES[spec.scale.generator_dtype]
    if updated and not generator.adapters:  # weights that are trained are float32, whatever they were
        width = BYTES["float32"]
    trained = 3 * width * generator.parameters if updated else 0
    if generator.adapters:  # in float32, their own weights among the four
        trained = 4 * 4 * generator.adapters
    resident = generator.parameters * width + trained + target.untied * BYTES[spec.scale.target_dtype]
    sampling = at_once * length * generator.cache_per_token * width
    update = 3 * updated * spec.scale.max_completion_tokens * generator.vocabulary * 4  # logits of the completions, softmax and gradient
    policy = spec.method.get("policy")
    checkpointed = policy and policy.get("activation_checkpointing")
    update += generator.activations(updated, length, checkpointed=bool(checkpointed)) * width
    texts = policy.completions if policy else spec.scale.deployment_texts
    steps, kept = training.inner_steps, training.plain().get("checkpoint")
    states = min(steps, kept) if isinstance(kept, int) else min(steps, 2 * math.isqrt(steps) + 1) if kept == "sqrt" else steps
    at_a_time = training.micro_batch or math.ceil(texts / steps / distributed.size())  # torchrun's processes share a batch
    logits = 3 * at_a_time * training.max_length * target.vocabulary * 4
    run = (states + 1) * 12.0 * target.untied + logits + 4 * target.activations(at_a_time, training.max_length)  # a state: and two moments
    return resident + max(sampling, update, run)


def _planned(spec: RunSpec, registry: Registry, prices: Prices) -> float | None:
    """What the method says, if its file can be asked without loading torch."""
    file = registry.find("method", spec.method.name)
    if not file.defines & {"planned_flops", "target_passes"}:
        return None
    method = registry.make("method", file.name, spec.method)
    if "planned_flops" in file.defines:
        return method.planned_flops(prices)
    passes = contract.passes(file.path, method, spec.training.inner_steps)
    if passes is None or spec.method.get("policy") is None:
        return None if passes is None else prices.deployment()
    steps = prices.policy(passes * prices.read(spec.method.policy.completions))
    return None if steps is None else steps + prices.deployment()


def _shape(scale: Scale, role: str, lora: Options | None = None) -> Shape | None:
    known = KNOWN.get(scale[role]) if scale.get(f"{role}_revision") is None else None
    try:
        return shape_of(known or model_files.find(scale, role, online=False).config, lora)
    except (UserError, KeyError):
        return None


def _prompt_tokens(scale: Scale) -> int:
    """A prompt's limit, or about the longest of a local corpus's in a batch, to which the others are padded."""
    if (limit := scale.get("max_prompt_tokens")) is not None:
        return limit
    return _longest(scale.corpus, scale.get("corpus_column"))


@lru_cache
def _longest(corpus: str, column: str | None) -> int:
    if corpus not in ("phrasebook", "topics"):
        return 1024  # the paper's limit, for texts that nobody has looked at
    prompts = world.corpus(Options({"corpus": corpus, "corpus_column": column})).prompts("train", 64, random.Random(0))
    words = [len((prompt if isinstance(prompt, str) else prompt[-1]["content"]).split()) for prompt in prompts]
    per_word = 1 if corpus == "phrasebook" else TOKENS_PER_WORD
    return round(per_word * max(words)) + 1
