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
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

BLOCK = 1 << 17  # elements: half a dozen temporaries fit the last-level cache, and below 1 << 15 PyTorch would use one thread only


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
    return not recorded and all(tensor.device.type == "cpu" and not transformed(tensor) for tensor in tensors)


def transformed(tensor: Tensor) -> bool:
    """Whether torch.func.jvp, vmap or grad is looking through this tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of every tensor, a block at a time; on an accelerator all at once."""
    first = tensors[0]
    size = max(1, BLOCK // max(1, first.shape[1:].numel()) if first.device.type == "cpu" else len(first))
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def value_and_tangent(tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Of a dual tensor of forward mode; the tangent is None where there is none."""
    return (None, None) if tensor is None else tuple(forward_ad.unpack_dual(tensor))


def dual(value: Tensor, tangent: Tensor) -> Tensor:
    return forward_ad.make_dual(value, tangent)


@contextmanager
def forwards_replaced(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """Inside, these modules compute these functions."""
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


# ---------------------------------------------------------------- GELU, tanh form


def gelu_tanh(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), twice differentiable in reverse, once in forward mode and reverse."""
    if transformed(x):
        return F.gelu(x, approximate="tanh")
    value, tangent = value_and_tangent(x)
    return _Gelu.apply(x) if tangent is None else dual(*_GeluDual.apply(value, tangent))


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
    @once_differentiable
    def backward(ctx, u: Tensor) -> tuple[Tensor, Tensor]:
        g, x = ctx.saved_tensors
        return blocked(_gelu_twice, x, g.contiguous(), u.contiguous())


class _GeluDual(torch.autograd.Function):
    """f(x) and its tangent f'(x) x_dot."""

    @staticmethod
    def forward(ctx, x: Tensor, x_dot: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, x_dot)
        return F.gelu(x, approximate="tanh"), torch.ops.aten.gelu_backward(x_dot, x, approximate="tanh")

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor, g_dot: Tensor) -> tuple[Tensor, Tensor]:
        x, x_dot = ctx.saved_tensors
        return blocked(_gelu_dual_pulled, x, x_dot.contiguous(), g.contiguous(), g_dot.contiguous())


def _gelu_slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """f' and f''. With z = c (x + a x^3), t = tanh z: f' = (1 + t + x (1 - t^2) z') / 2, f'' = (1 - t^2) (z' + x z'' / 2 - x t z'^2)."""
    c, a = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    t = (square * (a * c)).add_(c).mul_(x).tanh_()
    curved = square.mul_(3 * a * c)  # x z'' / 2
    slope = curved + c  # z'
    bell = (t * t).neg_().add_(1)
    x_slope = x * slope
    first = (x_slope * bell).add_(t).add_(1).mul_(0.5)
    second = curved.add_(slope).sub_(x_slope.mul_(t).mul_(slope)).mul_(bell)
    return first, second


def _gelu_twice(x: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """u f'(x) and u g f''(x)."""
    first, second = _gelu_slopes(x)
    return first.mul_(u), second.mul_(u).mul_(g)


def _gelu_dual_pulled(x: Tensor, x_dot: Tensor, g: Tensor, g_dot: Tensor) -> tuple[Tensor, Tensor]:
    """g f'(x) + g_dot x_dot f''(x) and g_dot f'(x)."""
    first, second = _gelu_slopes(x)
    return second.mul_(x_dot).mul_(g_dot).addcmul_(first, g), first.mul_(g_dot)


@contextmanager
def faster_activations(model: nn.Module) -> Iterator[None]:
    """Inside, the model's tanh-form GELUs, which transformers composes from eight operations, run as `gelu_tanh`."""
    from transformers import activations

    kinds = tuple(getattr(activations, name) for name in ("NewGELUActivation", "GELUTanh", "PytorchGELUTanh") if hasattr(activations, name))
    with forwards_replaced({module: gelu_tanh for module in model.modules() if isinstance(module, kinds)}):
        yield


# ---------------------------------------------------------------- cross-entropy


def cross_entropy(logits_NV: Tensor, targets_N: Tensor, ignore: int) -> Tensor:
    """(N,) -log softmax(logits)[target], 0 where the target is `ignore`; twice differentiable in reverse, once in forward mode and reverse.

    Saves the logits and one number per row, where the composed form saves three tensors of the logits' size."""
    real_N = targets_N != ignore
    where_N = targets_N.where(real_N, 0)
    value, tangent = (None, None) if transformed(logits_NV) else value_and_tangent(logits_NV)
    if tangent is not None:
        loss_N = dual(*_CrossEntropyDual.apply(value, tangent, where_N))
    elif value is not None and value.device.type == "cpu":
        loss_N = _CrossEntropy.apply(logits_NV, where_N)
    else:
        return F.cross_entropy(logits_NV, targets_N, ignore_index=ignore, reduction="none")
    return torch.where(real_N, loss_N, 0.0)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        total_N = torch.cat([torch.logsumexp(logits_RV, 1) for (logits_RV,) in row_blocks(logits_NV)])
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
        for out_RV, logits_RV, total_R, g_R in row_blocks(output, logits_NV, total_N, g_N):
            torch.sub(logits_RV, total_R[:, None], out=out_RV).exp_().mul_(g_R[:, None])
        return output.scatter_add_(1, targets_N[:, None], -g_N[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx, u_NV: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        g_N, logits_NV, total_N, targets_N = ctx.saved_tensors
        to_g_N, to_logits = torch.empty_like(g_N), torch.empty_like(logits_NV) if ctx.needs_input_grad[1] else None
        slots = to_logits if to_logits is not None else torch.empty_like(logits_NV[:1]).expand_as(logits_NV)
        for out_RV, u_RV, logits_RV, total_R, g_R, to_g_R in row_blocks(slots, u_NV, logits_NV, total_N, g_N, to_g_N):
            p_RV = (logits_RV - total_R[:, None]).exp_()
            pu_RV = p_RV * u_RV
            torch.sum(pu_RV, 1, out=to_g_R)
            if to_logits is not None:  # g (p u - p <p, u>)
                torch.mul(pu_RV.sub_(p_RV.mul_(to_g_R[:, None])), g_R[:, None], out=out_RV)
        to_g_N -= u_NV.gather(1, targets_N[:, None])[:, 0]
        return to_g_N, to_logits, None, None


class _CrossEntropyDual(torch.autograd.Function):
    """The loss and its tangent <p, logits_dot> - logits_dot[target]."""

    @staticmethod
    def forward(ctx, logits_NV: Tensor, dot_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        p_NV, total_N, slope_N = torch.empty_like(logits_NV), torch.empty_like(logits_NV[:, 0]), torch.empty_like(logits_NV[:, 0])
        for p_RV, total_R, slope_R, logits_RV, dot_RV in row_blocks(p_NV, total_N, slope_N, logits_NV, dot_NV):
            top_R = logits_RV.amax(1)
            torch.sub(logits_RV, top_R[:, None], out=p_RV).exp_()
            sum_R = p_RV.sum(1)
            p_RV.div_(sum_R[:, None])
            torch.add(sum_R.log_(), top_R, out=total_R)
            torch.sum(p_RV * dot_RV, 1, out=slope_R)
        ctx.save_for_backward(p_NV, dot_NV, slope_N, targets_N)
        places = targets_N[:, None]
        return total_N - logits_NV.gather(1, places)[:, 0], slope_N - dot_NV.gather(1, places)[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, g_N: Tensor, g_dot_N: Tensor) -> tuple[Tensor, Tensor, None]:
        p_NV, dot_NV, slope_N, targets_N = ctx.saved_tensors
        to_logits_NV, to_dot_NV = torch.empty_like(p_NV), torch.empty_like(p_NV)
        blocks = row_blocks(to_logits_NV, to_dot_NV, p_NV, dot_NV, g_N - g_dot_N * slope_N, g_dot_N)
        for to_logits_RV, to_dot_RV, p_RV, dot_RV, rest_R, g_dot_R in blocks:
            torch.mul(p_RV, g_dot_R[:, None], out=to_dot_RV)
            torch.mul(p_RV, rest_R[:, None], out=to_logits_RV).addcmul_(to_dot_RV, dot_RV)  # p (g + g_dot (dot - slope))
        places = targets_N[:, None]
        return to_logits_NV.scatter_add_(1, places, -g_N[:, None]), to_dot_NV.scatter_add_(1, places, -g_dot_N[:, None]), None
