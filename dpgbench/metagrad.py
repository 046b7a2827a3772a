"""Exact metagradients: how much each training example's weight moves a metric of the trained model.

    tau_i = dPhi(phi_T) / dw_i,   phi_{t+1} = update(phi_t, (1/|B_t|) sum_{i in B_t} w_i grad l(x_i; phi_t))

Three moves, each a function below: train forwards and record every step (`_Run.segment`); start from dPhi/dphi_T
(`signal_gradients`); walk the steps backwards (`_Run.reverse`). A step's reverse is two pull-backs: through the optimizer
in closed form, which gives lambda = dPhi/dgradient, and through the gradient of the loss, where
    tau_i = <lambda, grad l_i> / |B_t|    and    dPhi/dphi_t += H_t lambda,   H_t the Hessian of the weighted mean loss.
Both come from one backward pass through the step's own backward pass (`Tape`). The first step needs no H_0 lambda, so a
forward-mode product suffices there. No backward ever follows a forward-mode product: the forward rule of layer_norm treats
its statistics as constants, which is right on its own and silently wrong when differentiated again.

Shape suffixes: B examples in a batch, N examples in total.
Cost unit: F = one forward pass over the batch; a training step is 3F.
Sources: DPG = arXiv 2604.08423 (section on dataset policy gradients); REPLAY = arXiv 2503.13751 (replay from checkpoints).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpgbench.training import (
    Batch,
    Cotangents,
    Optimizer,
    Params,
    Signal,
    add_cotangents,
    check_batches,
    check_model,
    check_reduction,
    check_scalar,
    initial_parameters,
    loaded,
    mean_gradients,
    micro_batches,
    per_example_loss,
    split_weights,
)


@dataclass(frozen=True)
class Metagradients:
    """rewards (N,): dPhi/dw_i in the order of the concatenated batches; value: Phi(phi_T); params: phi_T by name."""

    rewards: Tensor
    value: float
    params: Params


def metagradients(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    signal: Signal,
    optimizer: Optimizer,
    weights: Tensor | None = None,
    micro_batch: int | None = None,
    checkpoint: str | int = "all",
    reduction: str = "length",
) -> Metagradients:
    """dPhi/dw_i of every training example at the given weights (default ones), exact through all T steps.

    model: a transformers causal LM, left unchanged; batches: T dicts of "input_ids" and "labels", (B, L) long, right padded,
    labels aligned with input_ids, -100 ignored; signal: module -> 0-d tensor, higher is better, called once on the module
    with phi_T inside. weights (N,), micro_batch and reduction as in `training.train`. An example without labels gets 0.

    checkpoint: "all" keeps parameters, gradient and moments of every step (4 copies of the parameters a step with AdamW);
    an int k keeps the state before every k-th step and replays k steps at a time (3T/k + 4k copies); "sqrt" is k = ceil(sqrt(T)).

    Cost, beside training's 3FT: T=1 at most 2F (3F with micro_batch), less when the metric reads few parameters; T>1: 6F for
    the last step, 9F per middle step (9F also for the last with micro_batch), 3F for the first; 3F more per replayed step.
    The last step keeps its own tape, about twice the activations of a training step: set micro_batch where that is too much.
    Raises ValueError on malformed input, on active dropout, on attention kernels without a second derivative, and when the
    signal is not a finite scalar that depends on the parameters. Source: DPG, arXiv 2604.08423; REPLAY, arXiv 2503.13751."""
    check_model(model)
    _check_attention(model)
    check_reduction(reduction)
    params = initial_parameters(model)
    steps, weights_N = check_batches(batches, params, weights, micro_batch)
    length = segment_length(checkpoint, len(steps))
    run = _Run(model, optimizer, steps, split_weights(weights_N, steps), micro_batch, reduction)

    starts = range(0, len(steps), length)
    state, snapshots, records = optimizer.init(params), [], []
    for start in starts:
        snapshots.append((params, state))
        records.clear()  # only the last segment's records outlive the forward pass
        stop = min(start + length, len(steps))
        records, params, state = run.segment(start, stop, params, state, tape_last=stop == len(steps))

    value, to_params = signal_gradients(model, params, signal)
    to_state = None
    rewards: list[Tensor] = []
    for start in reversed(starts):
        snapshot = snapshots.pop()
        if not records:
            records, _, _ = run.segment(start, start + length, *snapshot)
        while records:
            reward_B, to_params, to_state = run.reverse(records.pop(), to_params, to_state)
            rewards.append(reward_B)
    return Metagradients(torch.cat(rewards[::-1]), value, params)


def segment_length(checkpoint: str | int, steps: int) -> int:
    """Steps between kept states: T for "all", ceil(sqrt(T)) for "sqrt", k itself for an int. Raises ValueError."""
    if checkpoint == "all":
        return steps
    if checkpoint == "sqrt":
        return math.isqrt(steps - 1) + 1
    if isinstance(checkpoint, int) and not isinstance(checkpoint, bool) and checkpoint >= 1:
        return min(checkpoint, steps)
    raise ValueError(f'checkpoint={checkpoint!r}: it must be "all", "sqrt" or an integer >= 1; pass the steps between kept states')


def signal_gradients(model: nn.Module, params: Params, signal: Signal) -> tuple[float, Cotangents]:
    """Phi(params) and dPhi/dparams, None where the signal does not look. Cost: the signal's own forward and backward.

    Raises ValueError when the signal is not a finite 0-d tensor that depends on the parameters."""
    leaves = {name: theta.detach().requires_grad_() for name, theta in params.items()}
    with torch.enable_grad(), loaded(model, leaves):
        value = check_scalar(signal(model))
        if not bool(torch.isfinite(value)):
            raise ValueError(f"signal returned {value.item()}: it must be finite; lower the learning rate or rescale the signal")
        cotangents = (None,)
        if value.requires_grad:
            cotangents = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    if all(cotangent is None for cotangent in cotangents):
        raise ValueError(
            f"signal returned {value.item():.6g}, which does not depend on the trained parameters: it must;"
            " compute it from model's weights or outputs without .item(), .detach() or torch.no_grad()"
        )
    return value.item(), dict(zip(leaves, cotangents, strict=True))


class Tape(NamedTuple):
    """A step's gradient with the graph that computed it: differentiable in `leaves` (parameters) and `weights_B`."""

    leaves: Params
    weights_B: Tensor
    gradients: Params

    def pull(self, to_gradients: Params, second_order: bool) -> tuple[Tensor, Cotangents]:
        """From lambda = dPhi/dgradient: (dPhi/dw (B,), H lambda by name). Uses the tape up.

        `second_order=False` leaves H lambda out: autograd then skips the whole path to the parameters. Cost at most 6F, or 2F."""
        pairs = [(self.gradients[name], cotangent) for name, cotangent in to_gradients.items() if self.gradients[name].requires_grad]
        if not pairs:  # the metric reads parameters that the loss does not touch
            return torch.zeros_like(self.weights_B), {}
        inputs = [self.weights_B, *(self.leaves.values() if second_order else ())]
        gradients, cotangents = zip(*pairs, strict=True)
        reward_B, *products = torch.autograd.grad(gradients, inputs, cotangents, allow_unused=True)
        if reward_B is None:
            reward_B = torch.zeros_like(self.weights_B)
        return reward_B, dict(zip(self.leaves, products, strict=second_order))


class Record(NamedTuple):
    """What the reverse pass needs of step `step`: phi_t, its gradient, the state after it, perhaps its tape."""

    step: int
    params: Params
    gradients: Params
    new_state: Any
    tape: Tape | None


@dataclass(frozen=True)
class _Run:
    """The forward and the reverse pass over one training run; holds what stays the same from step to step."""

    model: nn.Module
    optimizer: Optimizer
    steps: Sequence[Batch]
    weights: Sequence[Tensor]  # one (B,) per step
    micro_batch: int | None
    reduction: str

    def segment(self, start: int, stop: int, params: Params, state: Any, tape_last: bool = False) -> tuple[list[Record], Params, Any]:
        """Train steps start..stop-1, keeping a Record of each; with `tape_last` the last one keeps its tape if it is in one piece."""
        records = []
        for step in range(start, stop):
            batch, weights_B, tape = self.steps[step], self.weights[step], None
            if tape_last and step == stop - 1 and len(micro_batches(len(weights_B), self.micro_batch)) == 1:
                tape = self.tape(step, params, slice(None), params)
                gradients = {name: gradient.detach() for name, gradient in tape.gradients.items()}
            else:
                gradients = mean_gradients(self.model, params, batch, weights_B, self.micro_batch, self.reduction)
            with torch.no_grad():
                new_params, state = self.optimizer.update(params, gradients, state, step)
            records.append(Record(step, params, gradients, state, tape))
            params = new_params
        return records, params, state

    def reverse(self, record: Record, to_params: Cotangents, to_state: Any) -> tuple[Tensor, Cotangents, Any]:
        """Pull the cotangents of (phi_{t+1}, state) back through step t: (dPhi/dw_t (B,), those of phi_t and of its state)."""
        with torch.no_grad():
            to_gradients, to_params, to_state = self.optimizer.vjp(record.gradients, record.new_state, record.step, to_params, to_state)
        live = {name: cotangent for name, cotangent in to_gradients.items() if cotangent is not None}
        first = record.step == 0
        pieces = []
        for rows in micro_batches(len(self.weights[record.step]), self.micro_batch):
            if record.tape is not None:
                reward_B, products = record.tape.pull(live, second_order=not first)
            elif first:
                reward_B, products = self.forward_product(record, rows, live), {}
            else:
                reward_B, products = self.tape(record.step, record.params, rows, live).pull(live, second_order=True)
            pieces.append(reward_B)
            to_params = {name: add_cotangents(to_params.get(name), products.get(name)) for name in record.params}
        return torch.cat(pieces), to_params, to_state

    def tape(self, step: int, params: Params, rows: slice, wanted: Mapping[str, Any]) -> Tape:
        """Record the gradient of the rows' share of step `step`'s mean loss, to the parameters named in `wanted`. Cost at most 3F."""
        batch, weights_B = self.steps[step], self.weights[step]
        leaves = {name: theta.detach().requires_grad_() for name, theta in params.items()}
        leaf_B = weights_B[rows].detach().requires_grad_()
        with torch.enable_grad():
            loss_B = per_example_loss(self.model, leaves, batch.input_ids[rows], batch.labels[rows], self.reduction)
            mean = (leaf_B * loss_B).sum() / len(weights_B)
            names = list(wanted)
            gradients = torch.autograd.grad(mean, [leaves[name] for name in names], create_graph=True, materialize_grads=True)
        return Tape(leaves, leaf_B, dict(zip(names, gradients, strict=True)))

    def forward_product(self, record: Record, rows: slice, direction: Params) -> Tensor:
        """<direction, grad l_i> / B for every row, by one forward-mode product: at most 3F and no tape."""
        batch, names = self.steps[record.step], list(direction)

        def loss(*moved: Tensor) -> Tensor:
            params = {**record.params, **dict(zip(names, moved, strict=True))}
            return per_example_loss(self.model, params, batch.input_ids[rows], batch.labels[rows], self.reduction)

        with torch.no_grad():
            _, slope_B = torch.func.jvp(loss, tuple(record.params[name] for name in names), tuple(direction.values()))
        return slope_B / len(batch.input_ids)


def _check_attention(model: nn.Module) -> None:
    kind = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if kind not in (None, "eager", "sdpa"):
        raise ValueError(f'attn_implementation={kind!r}: it must be "eager" or "sdpa", others have no second derivative; reload the model')
