"""Low-rank adapters on a generator (LoRA, arXiv 2106.09685): its weights are frozen, and a few beside them are trained.

    y = W x + alpha / rank * B A x,    A: (rank, inputs), random at first; B: (outputs, rank), zero at first

so an untrained adapter changes no text. Gradients, the optimizer's moments, averages, checkpoints and kept weights are then of A and B
alone. `settings` needs no torch.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from dpgbench.core.errors import UserError
from dpgbench.core.options import Options

if TYPE_CHECKING:
    from torch import nn

ALL = "all-linear"  # every matrix of the layers, not the LM head; peft's word for it


def settings(method: Options) -> Options | None:
    """A method's `lora` section, its policy's or its own; None where all weights are trained."""
    return (method.get("policy") or method).get("lora")


def matches(path: str, targets: list[str]) -> bool:
    """Whether a matrix of a layer gets an adapter: targets are names, or ends of dotted paths."""
    return ALL in targets or any(path == target or path.endswith(f".{target}") for target in targets)


def adapt(model: nn.Module, lora: Options, seed: int) -> nn.Module:
    """The model, frozen, with adapters that train. Changes the model in place; the same seed gives the same A.

    Raises UserError for targets that the model does not have, or that are its LM head, whose product TRL computes by itself.
    """
    from peft import LoraConfig, get_peft_model

    from dpgbench.core.seeds import torch_seeded

    said, targets = f"policy.lora.targets={list(lora.targets)}", list(lora.targets)
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    if head is not None and ALL not in targets and matches(head, targets):
        raise UserError(f"{said}: the LM head takes no adapter; name matrices of the layers, or write policy.lora.targets=[{ALL}]")
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=ALL if ALL in targets else targets, bias="none", task_type="CAUSAL_LM"
    )
    with torch_seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GPT-2's matrices are stored transposed: peft sees to it and says so
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            if "not found in the base model" not in str(error):
                raise
            layer = sorted(
                {name.rpartition(".")[2] for name, module in model.named_modules() if getattr(module, "weight", None) is not None}
            )
            raise UserError(f"{said}: the generator has none of them; it has {', '.join(layer)}") from None


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name: all of a model without adapters, A and B of one with them."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
