"""The sections of a cell's settings that the harness reads, by name and type; what each setting means is said in `configs/scale/tiny.yaml`.

They are views like any `Options`: the annotations tell an editor and a type checker what there is, and a test holds them to the YAML files.
`config.validate` has the rules for the values.
"""

from __future__ import annotations

from dpgbench.core.options import Options


class Scale(Options):
    """Models, texts and sizes: section `scale`."""

    name: str
    version: int
    corpus: str
    corpus_subset: str | None
    corpus_column: str | None
    corpus_revision: str | None
    max_prompt_tokens: int | None
    wording: str | None
    held_out: str
    languages: list[str]
    generator: str
    target: str
    generator_revision: str | None
    target_revision: str | None
    generator_dtype: str
    target_dtype: str
    threads: int
    max_completion_tokens: int
    sampling_batch: int
    instruction: str | None
    deployment_texts: int
    deployment_steps: int | None
    more_deployments: list[int]
    snapshots: int
    keep_generator: bool


class Training(Options):
    """The learning algorithm A of the target: section `training`."""

    optimizer: str
    lr: float
    betas: list[float]
    eps: float
    eps_root: float
    weight_decay: float
    inner_steps: int
    max_length: int
    reduction: str
    micro_batch: int | None
    precision: str
    memory_budget: float
    checkpoint: int | str | None
    offload: str | None


class Lora(Options):
    """Low-rank adapters: `policy.lora`."""

    rank: int | None
    alpha: float
    targets: list[str]


LOSS_TYPES = ("dapo", "bnpo", "grpo", "dr_grpo")  # of TRL's, those whose gradient `bench.policy_gradient` writes down


class Policy(Options):
    """The generator's update: section `policy`, which methods that train one have as `method.policy`."""

    steps: int | None
    completions: int
    group_size: int
    rollout_batch: int | None
    rollout: str
    vllm_memory: float
    minibatch: int | None
    micro_batch: int | None
    activation_checkpointing: bool
    lr: float
    lr_schedule: str
    max_grad_norm: float
    loss_type: str
    scale_advantages: str
    entropy_bonus: float
    entropy_bonus_final: float | None
    averaging: float
    best_of: int
    lora: Lora | None
    report_to: list[str]
