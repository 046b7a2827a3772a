"""Forward mode for the operations that fill a transformer's time: value and tangent at once, and the gradient of both written by hand.

Reverse over forward needs the gradient of a forward-mode product. PyTorch computes that gradient as a sequence of elementwise operations
and adds the matrix products afterwards; here the products are accumulated directly into the result and the rest is done in fused kernels.
`RULES` says which function has which rule; a rule falls back on PyTorch's own where it does not apply (no tangent, autocast,
other shapes). Each result can be differentiated once more in reverse, which is all that is needed, and not twice.

Names: of a function y of x, x_dot and y_dot are tangents; g and g_dot the cotangents of y and y_dot, to_x and to_x_dot those of x and
x_dot. Shapes: S matrices in a stack.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpgbench.metagrad.fused import dual, value_and_tangent


def _products(*pairs: tuple[Tensor | None, Tensor | None], plus: Tensor | None = None, transposed: bool = False) -> Tensor | None:
    """plus + the sum of the pairs' matrix products, accumulated by the products themselves; a pair with a None is zero.

    `transposed`: laid out in memory as the transpose, like the matrix that it is the cotangent of."""
    total = plus
    for left, right in pairs:
        if left is None or right is None:
            continue
        if transposed:
            left, right = right.mT, left.mT
        if total is None:
            total = torch.matmul(left, right)
        elif total is plus:
            total = torch.addmm(total, left, right)
        else:
            total = total.addmm_(left, right) if total.dim() == 2 else total.baddbmm_(left, right)
    return total.mT if transposed and total is not None else total


def _is_transposed(matrix: Tensor) -> bool:
    return matrix.stride(-2) == 1 and matrix.stride(-1) != 1


class _Product(torch.autograd.Function):
    """y = x w + bias of two matrices, or of two stacks of them without a bias."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, bias: Tensor | None, x_dot: Tensor | None, w_dot: Tensor | None, bias_dot: Tensor | None):
        ctx.save_for_backward(x, w, x_dot, w_dot)
        ctx.set_materialize_grads(False)
        return _products((x, w), plus=bias), _products((x_dot, w), (x, w_dot), plus=bias_dot)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor | None, g_dot: Tensor | None):
        x, w, x_dot, w_dot = ctx.saved_tensors
        to_x, to_w, to_bias, to_x_dot, to_w_dot, to_bias_dot = ctx.needs_input_grad
        w_transposed = _is_transposed(w)
        return (
            _products((g, w.mT), (g_dot, None if w_dot is None else w_dot.mT)) if to_x else None,
            _products((x.mT, g), (None if x_dot is None else x_dot.mT, g_dot), transposed=w_transposed) if to_w else None,
            g.sum(0) if to_bias and g is not None else None,
            _products((g_dot, w.mT)) if to_x_dot else None,
            _products((x.mT, g_dot), transposed=w_transposed) if to_w_dot else None,
            g_dot.sum(0) if to_bias_dot and g_dot is not None else None,
        )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # arguments are named as torch's own
    parts = _dual_parts(input, weight, bias)
    if parts is None or input.dim() < 2:
        return F.linear(input, weight, bias)
    (x, x_dot), (w, w_dot), (b, b_dot) = parts
    flat, flat_dot = x.flatten(0, -2), None if x_dot is None else x_dot.flatten(0, -2)
    y, y_dot = _Product.apply(flat, w.mT, b, flat_dot, None if w_dot is None else w_dot.mT, b_dot)
    shape = (*x.shape[:-1], w.shape[0])
    return dual(y.view(shape), y_dot.view(shape))


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **options) -> Tensor:
    parts = None if options or input.dim() != 1 else _dual_parts(mat1, mat2, input)
    if parts is None:
        return torch.addmm(input, mat1, mat2, **options)
    (x, x_dot), (w, w_dot), (b, b_dot) = parts
    return dual(*_Product.apply(x, w, b, x_dot, w_dot, b_dot))


def _matmul(input: Tensor, other: Tensor) -> Tensor:
    stacks = input.dim() > 2 and input.shape[:-2] == other.shape[:-2]
    parts = _dual_parts(input, other) if stacks else None
    if parts is None:
        return torch.matmul(input, other)
    (x, x_dot), (w, w_dot) = ((_stack(value), _stack(tangent)) for value, tangent in parts)
    y, y_dot = _Product.apply(x, w, None, x_dot, w_dot, None)
    shape = (*input.shape[:-1], other.shape[-1])
    return dual(y.view(shape), y_dot.view(shape))


def _stack(matrices: Tensor | None) -> Tensor | None:
    """(..., I, J) as (S, I, J); if that takes a copy, one that leaves transposed matrices transposed."""
    if matrices is None:
        return None
    if _is_transposed(matrices):
        return _stack(matrices.mT).mT
    return matrices.reshape(-1, *matrices.shape[-2:])


def _dual_parts(*tensors: Tensor | None) -> list[tuple[Tensor | None, Tensor | None]] | None:
    """The value and the tangent of each, or None where a product's rule does not apply: the factors, the first two, have no tangent."""
    parts = [value_and_tangent(tensor) for tensor in tensors]
    applies = any(tangent is not None for _, tangent in parts[:2]) and not torch.is_autocast_enabled(tensors[0].device.type)
    return parts if applies else None


# ---------------------------------------------------------------- softmax


class _Softmax(torch.autograd.Function):
    """Over the last dimension: p = softmax(x), p_dot = p (x_dot - <p, x_dot>). PyTorch's own rule writes over what its gradient needs."""

    @staticmethod
    def forward(ctx, x: Tensor, x_dot: Tensor):
        p = torch.softmax(x, -1)
        ctx.save_for_backward(p, x_dot)
        return p, torch._softmax_backward_data(x_dot, p, -1, p.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor, g_dot: Tensor):
        p, x_dot = ctx.saved_tensors
        # the cotangent of p: g + g_dot (x_dot - <p, x_dot>) - x_dot <p, g_dot>
        to_p = (x_dot - (p * x_dot).sum(-1, keepdim=True)).mul_(g_dot).add_(g)
        to_p.addcmul_(x_dot, (p * g_dot).sum(-1, keepdim=True), value=-1)
        return torch._softmax_backward_data(to_p, p, -1, p.dtype), torch._softmax_backward_data(g_dot, p, -1, p.dtype)


def _softmax(input: Tensor, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    if value_and_tangent(input)[1] is None:
        return F.softmax(input, dim=dim, dtype=dtype)
    if dtype is None and torch.is_autocast_enabled(input.device.type):
        dtype = torch.promote_types(input.dtype, torch.float32)  # as autocast does it
    moved = input.to(dtype or input.dtype).transpose(dim, -1)
    return dual(*_Softmax.apply(*value_and_tangent(moved))).transpose(dim, -1)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
    """torch's scaled_dot_product_attention out of the rules above. Every query must see a key."""
    if dropout_p or all(value_and_tangent(tensor)[1] is None for tensor in (query, key, value)):
        options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(query, key, value, **options)
    if enable_gqa:
        key, value = (tensor.repeat_interleave(query.shape[-3] // tensor.shape[-3], -3) for tensor in (key, value))
    scores = _matmul(query, key.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return _matmul(_softmax(scores, -1), value)


RULES = {
    F.linear: _linear, torch.addmm: _addmm, F.softmax: _softmax, F.scaled_dot_product_attention: _attention,
    torch.matmul: _matmul, Tensor.matmul: _matmul, Tensor.__matmul__: _matmul,
}  # fmt: skip
