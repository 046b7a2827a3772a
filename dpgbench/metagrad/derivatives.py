"""Three exact ways to pull a cotangent back through the gradient of one training step.

A step's gradient is g = (1/B) sum_i w_i grad l_i(phi). From lambda = dPhi/dg the reverse pass wants
    reward_i = dPhi/dw_i = <lambda, grad l_i> / B        and        H lambda = dPhi/dphi through g,
H the Hessian of the weighted mean loss. The ways differ in what they keep and what they cost (F = one forward pass over the batch):

    tape      the gradient was computed with its graph (`record`); one backward through that graph gives both. 6F, and the memory.
    reverse   record the tape now, then pull: reverse over reverse. 3F + 6F.
    forward   the forward-mode product of the loss vector along lambda *is* (<lambda, grad l_i>)_i, 3F; the gradient of
              (1/B) sum_i w_i <lambda, grad l_i> is H lambda, 5F more: reverse over forward. 8F, without the second part 3F.

PyTorch's forward rule of layer_norm treats the saved mean and rstd as constants: right on its own, silently wrong when it is
differentiated again. `metagrad.layer_norm` has a rule of its own, and `forward_mode_fault` compares the third way with the second on every
model before it is used.

Shape suffixes: B examples in a batch, L tokens. Weights, losses, slopes and rewards have none: they are (B,) or, per token, (B, L), where
w_i l_i above is sum_t w_{i,t} l_{i,t} and everything else stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from dpgbench.metagrad.duals import RULES
from dpgbench.metagrad.inputs import Batch, micro_batches
from dpgbench.metagrad.layer_norm import layer_norm as _layer_norm
from dpgbench.metagrad.loss import per_example_loss, per_token_loss
from dpgbench.metagrad.optimizers import Cotangents, Params, add_cotangents


class Share(NamedTuple):
    """This process's rows of one step's batch, their weights, and `count`, the size of the whole batch that the mean divides by."""

    batch: Batch
    weights: Tensor
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens."""
        return tuple(self.batch.input_ids.shape)

    def rows(self, rows: slice) -> Share:
        return Share(Batch(self.batch.input_ids[rows], self.batch.labels[rows]), self.weights[rows], self.count)


@dataclass(frozen=True)
class StepLoss:
    """The loss of a training step: what stays the same from step to step."""

    model: nn.Module
    micro_batch: int | None = None
    reduction: str = "length"
    precision: str = "full"
    activation_checkpointing: bool = False
    per_token: bool = False

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        """(B,) losses, or their tokens' shares, (B, L)."""
        options = (self.precision, self.activation_checkpointing)
        if self.per_token:
            return per_token_loss(self.model, params, batch.input_ids, batch.labels, *options)
        return per_example_loss(self.model, params, batch.input_ids, batch.labels, self.reduction, *options)

    @property
    def kind(self) -> tuple:
        """What decides which operations run on this model, for checks that are made once."""
        attention = getattr(getattr(self.model, "config", None), "_attn_implementation", None)
        return attention, self.precision, self.activation_checkpointing, self.per_token

    def pieces(self, share: Share) -> list[Share]:
        """The share, a micro-batch at a time."""
        return [share.rows(rows) for rows in micro_batches(len(share.weights), self.micro_batch)]


class Tape(NamedTuple):
    """The gradient of a piece of a step with the graph that computed it: differentiable in `leaves` (parameters) and `weights`."""

    leaves: Params
    weights: Tensor
    gradients: Params

    def pull(self, to_gradients: Params, second_order: bool) -> tuple[Tensor, Cotangents]:
        """From lambda = dPhi/dgradient: (dPhi/dw, H lambda by name). Uses the tape up.

        `second_order=False` leaves H lambda out: autograd then skips the whole path to the parameters. Cost at most 6F, or 2F.
        Raises ValueError when an operation of the model has no second derivative."""
        pairs = [(self.gradients[name], cotangent) for name, cotangent in to_gradients.items() if self.gradients[name].requires_grad]
        if not pairs:  # the metric reads parameters that the loss does not touch
            return torch.zeros_like(self.weights), {}
        inputs = [self.weights, *(self.leaves.values() if second_order else ())]
        gradients, cotangents = zip(*pairs, strict=True)
        try:
            reward, *products = torch.autograd.grad(gradients, inputs, cotangents, allow_unused=True)
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise (_refusal(reason) if "not implemented" in reason else error) from error
        if reward is None:
            reward = torch.zeros_like(self.weights)
        return reward, dict(zip(self.leaves, products, strict=second_order))


def _refusal(reason: str) -> ValueError:
    return ValueError(
        f"the model has an operation without a second derivative ({reason}): exact metagradients need one;"
        ' load it with attn_implementation="eager" and without fused kernels'
    )


_differentiable: WeakKeyDictionary[nn.Module, set[tuple]] = WeakKeyDictionary()


def _check_second_derivative(loss: StepLoss, tape: Tape) -> None:
    """Autograd prunes what leads to no input, an operation's complaint that it can be differentiated only once among it, and is then
    silently wrong: look for such nodes in the graph of the first tape of every model. Raises ValueError."""
    checked = _differentiable.setdefault(loss.model, set())
    if loss.kind in checked:
        return
    nodes, seen = [gradient.grad_fn for gradient in tape.gradients.values()], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("Error"):
            raise _refusal("one is marked as differentiable only once")
        nodes.extend(parent for parent, _ in node.next_functions)
    checked.add(loss.kind)


def record(loss: StepLoss, params: Params, piece: Share, wanted: Iterable[str] | None = None) -> Tape:
    """The piece's share of the mean loss's gradient, to the parameters `wanted` (None: all), with its graph. Cost at most 3F."""
    leaves = {name: theta.detach().requires_grad_() for name, theta in params.items()}
    leaf = piece.weights.detach().requires_grad_()
    names = list(leaves if wanted is None else wanted)
    with torch.enable_grad():
        mean = (leaf * loss(leaves, piece.batch)).sum() / piece.count
        gradients = torch.autograd.grad(mean, [leaves[name] for name in names], create_graph=True, materialize_grads=True)
    tape = Tape(leaves, leaf, dict(zip(names, gradients, strict=True)))
    _check_second_derivative(loss, tape)
    return tape


def pull_tapes(tapes: list[Tape], direction: Params, second_order: bool) -> tuple[Tensor, Cotangents]:
    """(rewards, H lambda) from the kept tapes of a step's pieces, which are used up. Cost 6F, or 2F without H lambda."""
    return _over_pieces(tape.pull(direction, second_order) for tape in _consumed(tapes))


def reverse_over_reverse(loss: StepLoss, params: Params, share: Share, direction: Params, second_order: bool) -> tuple[Tensor, Cotangents]:
    """(rewards, H lambda), recording each piece's tape and pulling it at once. Cost 9F, or 5F without H lambda."""
    return _over_pieces(record(loss, params, piece, direction).pull(direction, second_order) for piece in loss.pieces(share))


def reverse_over_forward(loss: StepLoss, params: Params, share: Share, direction: Params, second_order: bool) -> tuple[Tensor, Cotangents]:
    """(rewards, H lambda) by a forward-mode product and its gradient. Cost 8F, or 3F without H lambda."""
    return _over_pieces(_forward_piece(loss, params, piece, direction, second_order) for piece in loss.pieces(share))


def _forward_piece(loss: StepLoss, params: Params, piece: Share, direction: Params, second_order: bool) -> tuple[Tensor, Cotangents]:
    leaves = {name: theta.detach().requires_grad_(second_order) for name, theta in params.items()}
    with torch.set_grad_enabled(second_order):
        with forward_ad.dual_level(), DualRules():
            moving = {name: forward_ad.make_dual(leaves[name], tangent) for name, tangent in direction.items()}
            slope = forward_ad.unpack_dual(loss({**leaves, **moving}, piece.batch)).tangent
        # Outside of the level: inside, the backward pass would carry tangents of its own.
        if slope is None:  # the metric reads parameters that the loss does not touch
            return torch.zeros_like(piece.weights), {}
        slope = slope / piece.count
        if not second_order:
            return slope, {}
        products = [None] * len(leaves)
        total = (piece.weights * slope).sum()
        if total.requires_grad:
            products = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return slope.detach(), dict(zip(leaves, products, strict=True))


def _consumed(tapes: list[Tape]):
    while tapes:
        yield tapes.pop(0)  # so that a tape's memory goes as soon as it has been pulled


def _over_pieces(pulled: Iterable[tuple[Tensor, Cotangents]]) -> tuple[Tensor, Cotangents]:
    rewards, total = [], {}
    for reward, products in pulled:
        rewards.append(reward)
        total = {name: add_cotangents(total.get(name), products.get(name)) for name in {**total, **products}}
    return torch.cat(rewards), total


class DualRules(TorchFunctionMode):
    """Inside, operations on dual tensors go by the rules of `metagrad.duals` where it has one."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        rule = _layer_norm if function in (F.layer_norm, torch.layer_norm) else RULES.get(function, function)
        return rule(*args, **(kwargs or {}))


# ---------------------------------------------------------------- can this model be differentiated this way?

_faults: WeakKeyDictionary[nn.Module, dict[tuple, str | None]] = WeakKeyDictionary()
_TOLERANCE = {"full": 1e-3, "bf16": 5e-2}  # of the norm; a wrong rule is off by 0.6% to 10%


def forward_mode_fault(loss: StepLoss, params: Params, share: Share, second_order: bool) -> str | None:
    """Why the forward-mode way cannot be used on this model, or None: it is compared with reverse over reverse on two examples, along
    their gradient. Asked once per model, attention kernel and precision, then remembered. Cost 20F of two examples (10F to first order)."""
    if loss.activation_checkpointing:
        return "recomputed activations have no forward mode"
    known = _faults.setdefault(loss.model, {})
    key = (*loss.kind, second_order)
    if key not in known:
        known[key] = _forward_mode_fault(loss, params, share.rows(slice(0, 2)), second_order)
    return known[key]


def _forward_mode_fault(loss: StepLoss, params: Params, sample: Share, second_order: bool) -> str | None:
    tape = record(loss, params, sample)
    direction = {name: gradient.detach() for name, gradient in tape.gradients.items()}
    exact = tape.pull(direction, second_order)
    try:
        ours = reverse_over_forward(loss, params, sample, direction, second_order)
    except torch.OutOfMemoryError:
        raise  # says nothing about the model
    except RuntimeError as error:  # no forward mode for an operation, or a shape that it cannot take
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    # reward and H lambda live on different scales: each is held against its own size
    for what, expected, actual in (("rewards", {"": exact[0]}, {"": ours[0]}), ("Hessian-vector product", exact[1], ours[1])):
        off, size = _distance(expected, actual), _distance(expected, {})
        if not off <= _TOLERANCE[loss.precision] * size:
            return f"its {what} is {off / size if size else off:.1e} off"
    return None


def _distance(left: Cotangents, right: Cotangents) -> float:
    """Euclidean, over all tensors; None is zero."""
    total = 0.0
    for name in {**left, **right}:
        difference = add_cotangents(left.get(name), None if right.get(name) is None else -right[name])
        total += 0.0 if difference is None else float(difference.double().square().sum())
    return total**0.5
