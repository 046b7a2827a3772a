"""What a caller may get wrong: every check of the engine's inputs, and the one line that says what to do about it.

Shape suffixes: B examples in a batch, N examples in total, L tokens (fixed length). Weights have none: they are (N,) or, per token, (N, L).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpgbench.core.labels import IGNORED_LABEL
from dpgbench.metagrad.optimizers import Params, check_number

REDUCTIONS = ("length", "tokens")
PRECISIONS = ("full", "bf16")


class Batch(NamedTuple):
    """One step's data on the model's device: input_ids and labels, both (B, L) long."""

    input_ids: Tensor
    labels: Tensor


def micro_batches(size: int, micro_batch: int | None) -> list[slice]:
    """Row ranges that cover a batch of `size` examples, at most `micro_batch` each (None: all at once)."""
    width = micro_batch or size
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def split_weights(weights: Tensor, steps: Sequence[Batch]) -> tuple[Tensor, ...]:
    """The weights of the concatenated batches, cut back into one piece per step: (B,), or (B, L) with L the batch's own length."""
    pieces = weights.split([len(step.input_ids) for step in steps])
    if weights.dim() == 1:
        return pieces
    return tuple(piece[:, : step.input_ids.shape[1]] for piece, step in zip(pieces, steps, strict=True))


def check_model(model: nn.Module) -> None:
    """Training must be a function: raises ValueError while dropout is active, be it a module or a number that a module keeps."""
    for name, module in model.named_modules():
        if module.training:
            numbers = {attribute: rate for attribute, rate in vars(module).items() if "dropout" in attribute and isinstance(rate, float)}
            rates = {"p": module.p} if isinstance(module, nn.modules.dropout._DropoutNd) else numbers
            for attribute, rate in rates.items():
                if rate > 0:
                    raise ValueError(f"dropout {rate} is active ({name}.{attribute}): training must be deterministic; call model.eval()")


def check_scalar(value: Any) -> Tensor:
    """`value` itself when it is a 0-d floating tensor, what a signal must return; else ValueError."""
    if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
        what = f"a {tuple(value.shape)} {value.dtype} tensor" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r:.60}"
        raise ValueError(f"signal returned {what}: it must be a 0-d floating tensor; reduce it, e.g. with .mean()")
    return value


def check_batch(batch: Mapping[str, Tensor], name: str, device: torch.device, may_be_unlabelled: bool = False) -> Batch:
    """One batch, moved to the device. Raises ValueError naming what is wrong with it."""
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
        given = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"{name} is {given}: it must be a dict with input_ids and labels; pass both as (B, L) long tensors")
    ids, labels = batch["input_ids"], batch["labels"]
    if ids.shape != labels.shape:
        raise ValueError(f"{name}: input_ids {tuple(ids.shape)} and labels {tuple(labels.shape)} must have one shape; align the labels")
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}: it must be (B, L) with B >= 1 and L >= 2; drop it or pad it")
    if ids.dtype != torch.long or labels.dtype != torch.long:
        raise ValueError(f"{name}: dtypes {ids.dtype}, {labels.dtype} must both be torch.int64; call .long()")
    if not may_be_unlabelled and not bool((labels[:, 1:] != IGNORED_LABEL).any()):
        raise ValueError(f"{name}: all labels after the first are {IGNORED_LABEL}: one must be real, the first is never predicted; drop it")
    return Batch(ids.to(device), labels.to(device))


def check_batches(
    batches: Sequence[Mapping[str, Tensor]],
    params: Params,
    weights: Tensor | None,
    micro_batch: int | None,
    per_token: bool = False,
) -> tuple[list[Batch], Tensor]:
    """The T batches on the parameters' device, and the weights in the dtype of the loss. Raises ValueError.

    Weights are (N,), or with `per_token` (N, L), L the longest batch's length; given as (N,), each goes to all of its text's tokens.
    """
    if isinstance(batches, Mapping) or len(batches) == 0:
        raise ValueError(f"batches is {type(batches).__name__} of {len(batches)}: it must be a list of >= 1 batches; pass [batch]")
    if micro_batch is not None:
        check_count("micro_batch", micro_batch)
    steps = [check_batch(batch, f"batches[{index}]", device_of(params)) for index, batch in enumerate(batches)]
    count = sum(len(step.input_ids) for step in steps)
    exact = any(theta.dtype == torch.float64 for theta in params.values())
    like = {"dtype": torch.float64 if exact else torch.float32, "device": device_of(params)}
    length = max(step.input_ids.shape[1] for step in steps)
    if weights is None:
        return steps, torch.ones((count, length) if per_token else count, **like)
    if tuple(weights.shape) not in ([(count,), (count, length)] if per_token else [(count,)]):
        tokens = f" or ({count}, {length}), one per token" if per_token else ""
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}: it must be ({count},), one per example{tokens}; concatenate in batch order"
        )
    if per_token and weights.dim() == 1:
        weights = weights[:, None].repeat(1, length)
    if not bool(torch.isfinite(weights).all()):
        raise ValueError(f"weights holds {int((~torch.isfinite(weights)).sum())} non-finite values: all must be finite; 0 drops a text")
    return steps, weights.detach().to(**like)


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: reduction must be one of {', '.join(REDUCTIONS)}; pass one of them")


def check_causal(reduction: str) -> None:
    """Raises ValueError where a text's loss is no causal sum over its tokens, so that weights per token would say something else."""
    if reduction == "tokens":
        raise ValueError(
            'reduction="tokens" with weights per token: it divides by the number of a text\'s labels, which every later token changes,'
            " so that no token's credit is the sum of its own and the later weights' derivatives; use reduction=\"length\""
        )


def check_count(name: str, value: int) -> None:
    check_number(name, value, isinstance(value, int) and value >= 1, "an integer >= 1", "pass e.g. 32")


def device_of(params: Params) -> torch.device:
    return next(iter(params.values())).device


def check_precision(precision: str, params: Params) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: precision must be one of {', '.join(PRECISIONS)}; pass one of them")
    if precision == "bf16":
        for name, theta in params.items():
            if theta.dtype != torch.float32:
                raise ValueError(f'precision="bf16" with {name} in {theta.dtype}: master weights must be float32; call model.float()')


def check_attention(model: nn.Module) -> None:
    """Raises ValueError on an attention kernel that has no second derivative."""
    kind = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if kind not in (None, "eager", "sdpa"):
        raise ValueError(f'attn_implementation={kind!r}: it must be "eager" or "sdpa", others have no second derivative; reload the model')
