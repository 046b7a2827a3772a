"""Every hand-written rule of forward mode and its gradient, in float64, against autograd of the plain formula and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_metagrad_fused import normal
from test_training import relative_error
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpgbench.metagrad import fused, layer_norm
from dpgbench.metagrad.derivatives import DualRules


def plain_layer_norm(x, weight, bias=0):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * weight + bias


def attention(**options):
    def function(*query_key_value):
        with sdpa_kernel(SDPBackend.MATH):  # outside of DualRules nothing else has a second derivative
            return F.scaled_dot_product_attention(*query_key_value, **options)

    return function


def repeated(query, key, value):
    key, value = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
    return attention(is_causal=True)(query, key, value)


TARGETS = torch.tensor([1, -100, 0, 4, 2, 3])
MASK = torch.ones(5, 5, dtype=torch.bool).tril()
HEADS = ((2, 4, 5, 3),) * 3
# name: what runs under the rules, the plain formula (None: the same function), and the shapes of its arguments
RULES = {
    "linear": (F.linear, None, [(2, 5, 3), (4, 3), (4,)]),
    "linear without bias": (F.linear, None, [(5, 3), (4, 3)]),
    "addmm": (lambda x, w, bias: torch.addmm(bias, x, w), None, [(5, 3), (3, 4), (4,)]),
    "matmul": (lambda x, y: torch.matmul(x, y.mT), None, [(2, 3, 5, 4), (2, 3, 6, 4)]),
    "matmul of transposed heads": (lambda x, y: x.transpose(1, 2) @ y.permute(0, 2, 3, 1), None, [(2, 5, 3, 4), (2, 6, 3, 4)]),
    "softmax": (lambda x: F.softmax(x, dim=-1), None, [(2, 3, 5)]),
    "softmax of the first dimension": (lambda x: F.softmax(x, 0, dtype=torch.float64), None, [(3, 5)]),
    "layer_norm": (lambda x, *affine: F.layer_norm(x, (6,), *affine), plain_layer_norm, [(2, 4, 6), (6,), (6,)]),
    "layer_norm without bias": (lambda x, weight: F.layer_norm(x, (6,), weight), plain_layer_norm, [(4, 6), (6,)]),
    "layer_norm of several dimensions": (lambda x: F.layer_norm(x, (4, 6)), lambda x: plain_layer_norm(x.flatten(1), 1).view_as(x),
                                         [(3, 4, 6)]),
    "layer_norm of many blocks": (lambda x, *affine: F.layer_norm(x, (600,), *affine), plain_layer_norm, [(250, 600), (600,), (600,)]),
    "causal attention": (attention(is_causal=True), None, HEADS),
    "masked attention": (attention(attn_mask=MASK, scale=0.3), None, HEADS),
    "attention with a bias": (attention(attn_mask=torch.where(MASK, 0.5, -torch.inf).double()), None, HEADS),
    "grouped attention": (attention(is_causal=True, enable_gqa=True), repeated, [(2, 4, 5, 3), (2, 2, 5, 3), (2, 2, 5, 3)]),
    "gelu": (fused.gelu_tanh, lambda x: F.gelu(x, approximate="tanh"), [(4, 5)]),
    "gelu of many blocks": (fused.gelu_tanh, lambda x: F.gelu(x, approximate="tanh"), [(3, fused.BLOCK)]),
    "cross_entropy": (lambda x: fused.cross_entropy(x, TARGETS, -100), lambda x: F.cross_entropy(x, TARGETS, reduction="none"), [(6, 5)]),
    "cross_entropy of many blocks": (lambda x: fused.cross_entropy(x, torch.arange(90), -100),
                                     lambda x: F.cross_entropy(x, torch.arange(90), reduction="none"), [(90, 2000)]),
}  # fmt: skip


def case(name, seed=0):
    function, plain, shapes = RULES[name]
    values = [(2 * normal(*shape, seed=seed + index)).requires_grad_() for index, shape in enumerate(shapes)]
    tangents = [normal(*shape, seed=seed + 10 + index).requires_grad_() for index, shape in enumerate(shapes)]
    return function, plain or function, values, tangents


def forward(function, values, tangents):
    """Value and tangent under the rules; a None among the tangents is an argument that does not move."""
    with forward_ad.dual_level(), DualRules():
        arguments = [value if dot is None else forward_ad.make_dual(value, dot) for value, dot in zip(values, tangents, strict=True)]
        return tuple(forward_ad.unpack_dual(function(*arguments)))


def forward_by_reverse(function, values, tangents):
    """The same by the derivative of reverse mode in its cotangent."""
    moving = [(value, dot) for value, dot in zip(values, tangents, strict=True) if dot is not None]
    y = function(*values)
    cotangent = torch.zeros_like(y).requires_grad_()
    pulled = torch.autograd.grad(y, [value for value, _ in moving], cotangent, create_graph=True)
    return y, torch.autograd.grad(pulled, cotangent, [dot for _, dot in moving], create_graph=True)[0]


def compare(function, plain, values, tangents):
    found = []
    # A direction is data: what nothing asks for, the gradient to a parameter's tangent, layer_norm does not compute.
    inputs = [*values, tangents[0]] if tangents[0] is not None else values
    for way, what in ((forward, function), (forward_by_reverse, plain)):
        y, y_dot = way(what, values, tangents)
        cotangents = [normal(*y.shape, seed=20), normal(*y.shape, seed=21)]
        slopes = torch.autograd.grad(y_dot, inputs, cotangents[1], retain_graph=True, allow_unused=True)
        both = torch.autograd.grad((y, y_dot), inputs, cotangents, allow_unused=True)
        found.append([y, y_dot, *slopes, *both])
    for ours, theirs in zip(*found, strict=True):
        if theirs is None or not theirs.any():
            assert ours is None or not ours.any()
        else:
            assert relative_error(ours, theirs) < 1e-10


@pytest.mark.parametrize("name", RULES)
def test_a_rule_and_its_gradient_equal_those_of_the_plain_formula(name):
    """Value, tangent, and the gradients of <tangent, g> alone and together with <value, g'>: relative 1e-10."""
    compare(*case(name))


@pytest.mark.parametrize("name", [name for name in RULES if len(RULES[name][2]) > 1])
def test_arguments_that_do_not_move(name):
    """Frozen parameters, or a direction that reads few: each argument alone moving, each alone still."""
    function, plain, values, tangents = case(name)
    for one in range(len(values)):
        still = [None if index == one else dot for index, dot in enumerate(tangents)]
        alone = [dot if index == one else None for index, dot in enumerate(tangents)]
        compare(function, plain, values, still)
        compare(function, plain, values, alone)


@pytest.mark.parametrize("name", [name for name in RULES if "many blocks" not in name])
def test_a_rule_holds_against_finite_differences(name):
    """gradcheck of (value, tangent) to values and the first argument's tangent; of random projections, which no wrong entry escapes."""
    function, _, values, tangents = case(name)

    def pair(first_dot, *values):
        return forward(function, values, [first_dot, *(dot.detach() for dot in tangents[1:])])

    assert torch.autograd.gradcheck(pair, [tangents[0], *values], fast_mode=True)


def test_linear_and_matmul_are_differentiable_in_every_tangent():
    """Activations move too: the second factor's tangent has its gradient."""
    for name in ("linear", "addmm", "matmul", "matmul of transposed heads", "causal attention"):
        function, plain, values, tangents = case(name)
        found = []
        for way, what in ((forward, function), (forward_by_reverse, plain)):
            y_dot = way(what, values, tangents)[1]
            found.append(torch.autograd.grad(y_dot, tangents, normal(*y_dot.shape, seed=20)))
        for ours, theirs in zip(*found, strict=True):
            assert relative_error(ours, theirs) < 1e-10


@pytest.mark.parametrize("shape", [(2, 4, 6), (250, 600)])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_on_a_tape(shape, bias):
    """Value, gradient and second derivative of a LayerNorm module equal the plain formula's; gradgradcheck holds."""
    module = torch.nn.LayerNorm(shape[-1:], bias=bias).double()
    values = [(2 * normal(*size, seed=index)).requires_grad_() for index, size in enumerate([shape, shape[-1:], shape[-1:]][: 2 + bias])]
    g, u = normal(*shape, seed=5).requires_grad_(), [normal(*value.shape, seed=6) for value in values]

    def ours(*values):
        with layer_norm.faster_layer_norms(module):
            assert "forward" in vars(module)
            return torch.func.functional_call(module, dict(zip(("weight", "bias"), values[1:], strict=False)), values[0])

    found = []
    for function in (ours, plain_layer_norm):
        y = function(*values)
        slopes = torch.autograd.grad(y, values, g, create_graph=True)
        some = torch.autograd.grad(slopes[1], [values[0], g], u[1], retain_graph=True)
        found.append([y, *slopes, *some, *torch.autograd.grad(slopes, [*values[:2], g], u)])
    for actual, expected in zip(*found, strict=True):
        assert relative_error(actual, expected) < 1e-10
    assert "forward" not in vars(module)
    if shape[0] == 2:
        assert torch.autograd.gradcheck(ours, values) and torch.autograd.gradgradcheck(ours, values)
