"""Log-probabilities of completions, with their gradient: what a policy update computes, without the work that no token needs.

The completions of a group share their prompt. By causality its keys and values are the same in all of them, so each distinct prompt is read
once, and its keys and values, with their graph, are what all its completions go on from; the gradient of each flows back into the one
reading. Completions of one length or nearly so go through the model together, so that little of what is computed is padding, and those
that say the same are computed once: a policy that has learned repeats itself.

Shape suffixes: B completions, C tokens of the longest, N tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.cache_utils import Cache, DynamicLayer

from dpgbench.metagrad.fused import row_blocks
from dpgbench.worlds.decoding import arguments, positions, without_adapters

ROWS_TOGETHER = 64  # at least, in a pass through the model: smaller ones save less padding than they cost in calls
LOGITS_AT_MOST = 1 << 26  # that are kept for the backward pass, 256 MB; more of them are computed in tiles, and once more to go back

Tiles = Callable[[dict[str, Tensor | Cache], Tensor], tuple[Tensor, Tensor]]
"""From a model's inputs and its targets, (B, C), their log-probabilities and entropies, (B, C), in tiles that are not kept."""


def completion_log_probs(model: nn.Module, ids: Tensor, mask: Tensor, width: int, in_tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """log pi(token) and the entropy (nats) of the distribution that it is drawn from, for every token of the completions: both (B, width).

    ids, mask: (B, P + width) long, prompts padded on the left and completions on the right; a pad gets 0 for both. The model is one that
    `decoding.keeps_plain_cache`, P is 2 or more, and `in_tiles` scores what has more logits than are kept.
    Cost of forward and backward: `Shape.update_flops` at most.
    """
    different, row_of_B = torch.unique(torch.cat([ids, mask], dim=1), dim=0, return_inverse=True)
    ids, mask = different.chunk(2, dim=1)
    length = ids.shape[1] - width
    prompts, of_prompt_B = torch.unique(torch.cat([ids[:, :length], mask[:, :length]], dim=1), dim=0, return_inverse=True)
    read = _prompts_read(model, prompts[:, : length - 1], prompts[:, length:-1])
    kept = mask[:, length:].numel() * without_adapters(model).get_output_embeddings().weight.shape[0] <= LOGITS_AT_MOST
    score = in_tiles if in_tiles is not None and not kept else functools.partial(_scored, model)
    tokens_B = mask[:, length:].sum(1)
    order_B = tokens_B.argsort(stable=True)
    pieces = order_B.chunk(max(1, len(ids) // ROWS_TOGETHER))
    longest = [max(1, int(most)) for most in torch.stack([tokens_B[rows[-1]] for rows in pieces]).tolist()]
    found = [
        _piece(model, ids[rows, : length + most], mask[rows, : length + most], length, read, of_prompt_B[rows], score)
        for rows, most in zip(pieces, longest, strict=True)
    ]
    back_B = order_B.argsort()[row_of_B]
    wide = [[F.pad(values, (0, width - values.shape[1])) for values in each] for each in zip(*found, strict=True)]
    return torch.cat(wide[0])[back_B], torch.cat(wide[1])[back_B]


def _prompts_read(model: nn.Module, ids: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer after reading the prompts, their last tokens excepted: each completion's first logits are of those."""
    layers = without_adapters(model).base_model
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    more = {"position_ids": positions(mask)} if "position_ids" in arguments(layers) else {}
    layers(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _piece(
    model: nn.Module, ids: Tensor, mask: Tensor, length: int, read: list[tuple[Tensor, Tensor]], of_prompt_B: Tensor, score: Tiles
) -> tuple[Tensor, Tensor]:
    """`completion_log_probs` of some rows, padded no further than the longest of them."""
    cache = Cache(layers=[_known(keys.index_select(0, of_prompt_B), values.index_select(0, of_prompt_B)) for keys, values in read])
    seen, real = mask[:, :-1], mask[:, length:].bool()
    inputs = {"input_ids": ids[:, length - 1 : -1], "attention_mask": seen, "past_key_values": cache}
    if "position_ids" in arguments(without_adapters(model)):
        inputs["position_ids"] = positions(seen)[:, length - 1 :]
    log_probs, entropies = score(inputs, ids[:, length:])
    return torch.where(real, log_probs, 0.0), torch.where(real, entropies, 0.0)


def _scored(model: nn.Module, inputs: dict[str, Tensor | Cache], targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies from logits that are kept."""
    logits = model(**inputs, use_cache=True).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probs, entropies = log_probs_and_entropies(logits.flatten(0, 1), targets.flatten())
    return log_probs.view(targets.shape), entropies.view(targets.shape)


def _known(keys: Tensor, values: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def log_probs_and_entropies(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(logits)[target], and the softmax's entropy in nats: both (N,), differentiable once."""
    return _LogProbsAndEntropies.apply(logits_NV, targets_N)


class _LogProbsAndEntropies(torch.autograd.Function):
    """With z the log of the sum of exponentials and p = exp(logits - z): logits[target] - z, and H = z - <p, logits>.

    The gradients to the logits are onehot - p, and -p (log p + H). Rows go through the cache a block at a time.
    """

    @staticmethod
    def forward(ctx, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total_N, entropy_N = torch.empty_like(logits_NV[:, 0]), torch.empty_like(logits_NV[:, 0])
        for logits_RV, total_R, entropy_R in row_blocks(logits_NV, total_N, entropy_N):
            top_R = logits_RV.amax(1)
            p_RV = (logits_RV - top_R[:, None]).exp_()
            sum_R = p_RV.sum(1)
            torch.add(sum_R.log(), top_R, out=total_R)
            torch.sub(total_R, p_RV.mul_(logits_RV).sum(1).div_(sum_R), out=entropy_R)
        ctx.save_for_backward(logits_NV, targets_N, total_N, entropy_N)
        return logits_NV.gather(1, targets_N[:, None])[:, 0] - total_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, g_N: Tensor | None, g_entropy_N: Tensor | None) -> tuple[Tensor, None]:
        logits_NV, targets_N, total_N, entropy_N = ctx.saved_tensors
        to_logits_NV = torch.empty_like(logits_NV)
        g_N = torch.zeros_like(total_N) if g_N is None else g_N
        weights_N = torch.zeros_like(total_N) if g_entropy_N is None else g_entropy_N
        for out_RV, logits_RV, total_R, entropy_R, g_R, weight_R in row_blocks(to_logits_NV, logits_NV, total_N, entropy_N, g_N, weights_N):
            torch.sub(logits_RV, total_R[:, None], out=out_RV)
            if g_entropy_N is None:
                out_RV.exp_().mul_(-g_R[:, None])
            else:  # -p (g + g_entropy (log p + H))
                rest_RV = (out_RV + entropy_R[:, None]).mul_(weight_R[:, None]).add_(g_R[:, None])
                out_RV.exp_().mul_(rest_RV).neg_()
        return to_logits_NV.scatter_add_(1, targets_N[:, None], g_N[:, None]), None
