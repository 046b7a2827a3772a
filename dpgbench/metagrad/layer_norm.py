"""layer_norm with the gradient of its derivative written by hand: on a tape, and in forward mode.

y = n weight + bias with n = (x - mean) r, r = rsqrt(variance + eps). With <,> the mean over a row, the derivative of n is the symmetric
map J: v -> r (v - <v> - n <n, v>), so y_dot = J(x_dot) weight + n weight_dot + bias_dot. The second derivative on a tape uses the same
formula: the inner product of what backward returns with directions (u, u_weight, u_bias) equals the inner product of g (the cotangent of y)
with the y_dot along these directions. PyTorch builds that second derivative from thirty operations, and its forward-mode rule treats mean
and r as constants.

Names as in `metagrad.duals`. Shape suffixes: N rows, D columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpgbench.metagrad.fused import dual, forwards_replaced, row_blocks, transformed, value_and_tangent

# ---------------------------------------------------------------- the formulas


def _tangents(
    x_ND: Tensor, mean: Tensor, r: Tensor, weight: Tensor, x_dot_ND: Tensor, weight_dot: Tensor, bias_dot: Tensor | None, eps: float
):
    """n_dot and y_dot."""
    n_dot_ND = _normalising(x_dot_ND, x_ND, mean, r)
    return n_dot_ND, torch.native_layer_norm(x_ND, weight.shape, weight_dot, bias_dot, eps)[0].addcmul_(n_dot_ND, weight)


def _pulled(
    x_ND: Tensor, mean: Tensor, r: Tensor, weight: Tensor, x_dot_ND: Tensor, n_dot_ND: Tensor, weight_dot: Tensor, g_dot_ND: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of <g_dot, y_dot> to x and weight.

    J depends on x: with to_n_dot = g_dot weight, <to_n_dot, J(x_dot)> hangs on n by -r (to_n_dot <n, x_dot> + x_dot <n, to_n_dot>),
    and on r by <to_n_dot, n_dot> / r, where the derivative of r is -r^2 n."""
    to_x_ND, to_weight = torch.empty_like(x_ND), torch.zeros_like(weight)
    for to_x, x, mu, rstd, x_dot, n_dot, g_dot in row_blocks(to_x_ND, x_ND, mean, r, x_dot_ND, n_dot_ND, g_dot_ND):
        n = (x - mu).mul_(rstd)
        to_n_dot = g_dot * weight
        to_n = (to_n_dot * _mean_product(n, x_dot)).addcmul_(x_dot, _mean_product(n, to_n_dot)).mul_(-rstd).addcmul_(g_dot, weight_dot)
        torch.addcmul(_normalising(to_n, x, mu, rstd), n, rstd * _mean_product(to_n_dot, n_dot), value=-1, out=to_x)
        to_weight += torch.mul(g_dot, n_dot, out=to_n_dot).sum(0)
    return to_x_ND, to_weight


def _backward(g_ND: Tensor, x_ND: Tensor, mean: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of <g, y> to x, weight and bias."""
    return torch.ops.aten.native_layer_norm_backward(g_ND.contiguous(), x_ND, weight.shape, mean, r, weight, weight, [True] * 3)


def _normalising(v_ND: Tensor, x_ND: Tensor, mean: Tensor, r: Tensor, weight: Tensor | None = None) -> Tensor:
    """J(v), or J(v weight): how a cotangent of n, or of y, goes back to x."""
    what = (x_ND.shape[-1:], mean, r, weight, None, [True, False, False])
    return torch.ops.aten.native_layer_norm_backward(v_ND.contiguous(), x_ND, *what)[0]


def _plain(input: Tensor, weight: Tensor | None, normalized_shape) -> bool:
    """Whether the formulas cover this use: one dimension, a weight, one dtype."""
    simple = len(normalized_shape) == 1 and weight is not None and weight.dtype == input.dtype
    return simple and not torch.is_autocast_enabled(input.device.type)


def _mean_product(left_ND: Tensor, right_ND: Tensor) -> Tensor:
    return (left_ND * right_ND).mean(-1, keepdim=True)


# ---------------------------------------------------------------- on a tape


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y_ND, mean, r = torch.native_layer_norm(x_ND, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x_ND, weight, mean, r)
        ctx.eps, ctx.has_bias = eps, bias is not None
        return y_ND

    @staticmethod
    def backward(ctx, g_ND: Tensor):
        to_x_ND, to_weight, to_bias = _LayerNormBackward.apply(g_ND, *ctx.saved_tensors, ctx.eps)
        return to_x_ND, to_weight, to_bias if ctx.has_bias else None, None


class _LayerNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g_ND: Tensor, x_ND: Tensor, weight: Tensor, mean: Tensor, r: Tensor, eps: float):
        ctx.save_for_backward(g_ND, x_ND, weight, mean, r)
        ctx.eps = eps
        return _backward(g_ND, x_ND, mean, r, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, u_ND: Tensor, u_weight: Tensor, u_bias: Tensor):
        g_ND, x_ND, weight, mean, r = ctx.saved_tensors
        n_dot_ND, to_g_ND = _tangents(x_ND, mean, r, weight, u_ND, u_weight, u_bias, ctx.eps)
        to_x_ND, to_weight = _pulled(x_ND, mean, r, weight, u_ND, n_dot_ND, u_weight, g_ND)
        return to_g_ND, to_x_ND, to_weight, None, None, None


def _module_forward(module: nn.LayerNorm, input: Tensor) -> Tensor:
    tensors = (input, module.weight, module.bias)
    special = any(tensor is not None and (transformed(tensor) or value_and_tangent(tensor)[1] is not None) for tensor in tensors)
    if special or not _plain(input, module.weight, module.normalized_shape):
        return F.layer_norm(input, module.normalized_shape, module.weight, module.bias, module.eps)
    return _LayerNorm.apply(input.contiguous().flatten(0, -2), module.weight, module.bias, module.eps).view(input.shape)


@contextmanager
def faster_layer_norms(model: nn.Module) -> Iterator[None]:
    """Inside, the model's layer_norms go on tapes with the second derivative above."""
    with forwards_replaced({module: partial(_module_forward, module) for module in model.modules() if type(module) is nn.LayerNorm}):
        yield


# ---------------------------------------------------------------- in forward mode


class _LayerNormDual(torch.autograd.Function):
    """y and y_dot, and their gradient."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight: Tensor, bias: Tensor | None, x_dot_ND: Tensor, weight_dot: Tensor, bias_dot: Tensor | None, eps):
        y_ND, mean, r = torch.native_layer_norm(x_ND, weight.shape, weight, bias, eps)
        n_dot_ND, y_dot_ND = _tangents(x_ND, mean, r, weight, x_dot_ND, weight_dot, bias_dot, eps)
        ctx.save_for_backward(x_ND, mean, r, weight, x_dot_ND, n_dot_ND, weight_dot)
        return y_ND, y_dot_ND

    @staticmethod
    @once_differentiable
    def backward(ctx, g_ND: Tensor, g_dot_ND: Tensor):
        x_ND, mean, r, weight, *_ = ctx.saved_tensors
        to_x_ND, to_weight = _pulled(*ctx.saved_tensors, g_dot_ND)
        more_ND, more, to_bias = _backward(g_ND, x_ND, mean, r, weight)
        to_x_dot_ND = _normalising(g_dot_ND, x_ND, mean, r, weight)
        return to_x_ND.add_(more_ND), to_weight.add_(more), to_bias if ctx.needs_input_grad[2] else None, to_x_dot_ND, None, None, None


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, *_):  # the names are those of torch's own signature
    """layer_norm whose forward-mode product may be differentiated again."""
    (x, x_dot), (w, w_dot), (b, b_dot) = (value_and_tangent(tensor) for tensor in (input, weight, bias))
    if x_dot is None or not _plain(input, weight, normalized_shape):
        return _composed_layer_norm(input, normalized_shape, weight, bias, eps)
    rows, rows_dot = x.contiguous().flatten(0, -2), x_dot.contiguous().flatten(0, -2)
    y, y_dot = _LayerNormDual.apply(rows, w, b, rows_dot, torch.zeros_like(w) if w_dot is None else w_dot, b_dot, eps)
    return dual(y.view(x.shape), y_dot.view(x.shape))


def _composed_layer_norm(input, normalized_shape, weight, bias, eps):
    """Written out in var_mean and rsqrt, whose forward-mode rules may be differentiated again."""
    across = tuple(range(-len(normalized_shape), 0))
    variance, mean = torch.var_mean(input, across, correction=0, keepdim=True)
    output = (input - mean) * torch.rsqrt(variance + eps)
    output = output if weight is None else output * weight
    return output if bias is None else output + bias
