"""Elementwise work a cache-sized block at a time, and the two activations whose second derivatives cost PyTorch most of it.

A chain of elementwise operations on a tensor larger than the cache goes through memory once per operation; on a block of it, once in
all. The formulas stay plain PyTorch, only their order of evaluation changes. Used on CPUs and on ordinary tensors; on an accelerator,
under a torch.func transform or where autograd must record the formula itself, everything is computed at once as usual.

Shape suffixes: N tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 1 << 15  # elements: with half a dozen temporaries this fits the second-level cache


def blocked(formula: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """formula(*inputs) for an elementwise formula of tensors of one shape that returns tensors of that shape; bit for bit the same."""
    like = inputs[0]
    if like.numel() <= BLOCK or not _ordinary(*inputs) or not all(tensor.is_contiguous() for tensor in inputs):
        return formula(*inputs)
    pieces = zip(*(tensor.view(-1).split(BLOCK) for tensor in inputs), strict=True)
    outputs: list[Tensor] = []
    for index, piece in enumerate(pieces):
        results = formula(*piece)
        if not outputs:
            outputs = [torch.empty(like.shape, dtype=result.dtype, device=like.device) for result in results]
            slots = [output.view(-1).split(BLOCK) for output in outputs]
        for slot, result in zip(slots, results, strict=True):
            slot[index].copy_(result)
    return tuple(outputs)


def _ordinary(*tensors: Tensor) -> bool:
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not recorded and all(tensor.device.type == "cpu" and not _transformed(tensor) for tensor in tensors)


def _transformed(tensor: Tensor) -> bool:
    """Whether torch.func.jvp, vmap or grad is looking through this tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


# ---------------------------------------------------------------- GELU, tanh form


def gelu_tanh(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), twice differentiable in reverse, once in forward mode and reverse."""
    return F.gelu(x, approximate="tanh") if _transformed(x) else _Gelu.apply(x)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x, approximate="tanh")

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return _GeluBackward.apply(g, *ctx.saved_tensors)


class _GeluBackward(torch.autograd.Function):
    """g f'(x)."""

    @staticmethod
    def forward(ctx, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        return torch.ops.aten.gelu_backward(g, x, approximate="tanh")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, u: Tensor) -> tuple[Tensor | None, Tensor | None]:
        g, x = ctx.saved_tensors
        to_g = torch.ops.aten.gelu_backward(u.contiguous(), x, approximate="tanh") if ctx.needs_input_grad[0] else None
        to_x = blocked(_gelu_second, x, g.contiguous(), u.contiguous())[0] if ctx.needs_input_grad[1] else None
        return to_g, to_x


def _gelu_second(x: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor]:
    """u g f''(x). With z = c (x + a x^3), t = tanh z: f'' = (1 - t^2) (z' + x z'' / 2 - x t z'^2)."""
    c, a = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    slope = (3 * a * c) * square + c  # z'
    t = torch.tanh(x * (a * square + 1) * c)
    inner = slope + (3 * a * c) * square - x * t * slope * slope
    return ((1 - t * t) * inner * g * u,)


@contextmanager
def faster_activations(model: nn.Module) -> Iterator[None]:
    """Inside, the model's tanh-form GELUs, which transformers composes from eight operations, run as `gelu_tanh`."""
    from transformers import activations

    kinds = tuple(getattr(activations, name) for name in ("NewGELUActivation", "GELUTanh", "PytorchGELUTanh") if hasattr(activations, name))
    modules = [module for module in model.modules() if isinstance(module, kinds)]
    for module in modules:
        module.__dict__["forward"] = gelu_tanh
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


# ---------------------------------------------------------------- cross-entropy


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, ignore: int) -> Tensor:
    """(N,) -log softmax(logits)[target], 0 where the target is `ignore`; twice differentiable in reverse, once in forward mode and reverse.

    Saves the logits and one number per row, where the composed form saves three tensors of the logits' size."""
    if logits_NV.device.type != "cpu" or _transformed(logits_NV):
        return F.cross_entropy(logits_NV, targets_N, ignore_index=ignore, reduction="none")
    real_N = targets_N != ignore
    return torch.where(real_N, _CrossEntropy.apply(logits_NV, targets_N.where(real_N, 0)), 0.0)


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of every tensor, a block at a time."""
    size = max(1, 2 * BLOCK // tensors[0].shape[1])
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        total_N = torch.cat([torch.logsumexp(logits_RV, 1) for (logits_RV,) in _rows(logits_NV)])
        ctx.save_for_backward(logits_NV, total_N, targets_N)
        return total_N - logits_NV.gather(1, targets_N[:, None])[:, 0]

    @staticmethod
    def backward(ctx, g_N: Tensor) -> tuple[Tensor, None]:
        return _CrossEntropyBackward.apply(g_N, *ctx.saved_tensors), None


class _CrossEntropyBackward(torch.autograd.Function):
    """g (p - onehot), p = softmax(logits) = exp(logits - total)."""

    @staticmethod
    def forward(ctx, g_N: Tensor, logits_NV: Tensor, total_N: Tensor, targets_N: Tensor) -> Tensor:
        ctx.save_for_backward(g_N, logits_NV, total_N, targets_N)
        output = torch.empty_like(logits_NV)
        for out_RV, logits_RV, total_R, g_R in _rows(output, logits_NV, total_N, g_N):
            torch.sub(logits_RV, total_R[:, None], out=out_RV).exp_().mul_(g_R[:, None])
        return output.scatter_add_(1, targets_N[:, None], -g_N[:, None])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, u_NV: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        g_N, logits_NV, total_N, targets_N = ctx.saved_tensors
        to_g_N, to_logits = torch.empty_like(g_N), torch.empty_like(logits_NV) if ctx.needs_input_grad[1] else None
        slots = to_logits if to_logits is not None else torch.empty_like(logits_NV[:1]).expand_as(logits_NV)
        for out_RV, u_RV, logits_RV, total_R, g_R, to_g_R in _rows(slots, u_NV, logits_NV, total_N, g_N, to_g_N):
            p_RV = (logits_RV - total_R[:, None]).exp_()
            pu_RV = p_RV * u_RV
            torch.sum(pu_RV, 1, out=to_g_R)
            if to_logits is not None:  # g (p u - p <p, u>)
                torch.mul(pu_RV.sub_(p_RV.mul_(to_g_R[:, None])), g_R[:, None], out=out_RV)
        to_g_N -= u_NV.gather(1, targets_N[:, None])[:, 0]
        return to_g_N, to_logits, None, None
