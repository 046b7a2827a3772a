"""Exact metagradients: how much each training example's weight moves a metric of the trained model.

    tau_i = dPhi(phi_T) / dw_i,   phi_{t+1} = update(phi_t, (1/|B_t|) sum_{i in B_t} w_i grad l(x_i; phi_t))

Three moves, each a function below: train forwards and record every step (`_Run.segment`); start from dPhi/dphi_T
(`signal_gradients`); walk the steps backwards (`_Run.reverse`). A step's reverse is two pull-backs: through the optimizer in closed
form, which gives lambda = dPhi/dgradient, and through the gradient of the loss, in one of the three ways of `metagrad.derivatives`.
The newest steps keep their tapes while the memory budget lasts, the others are recomputed, and what is structurally zero is skipped.

With weights of single tokens, w_i l(x_i) is sum_t w_{i,t} l_{i,t}, l_{i,t} the share of the loss that the label at position t has, and the
same reverse pass gives tau_{i,t} = dPhi / dw_{i,t}, whose sum over t is tau_i.

Shape suffixes: B examples in a batch, N examples in total, L tokens. Weights and rewards have none: (N,) or, per token, (N, L).
Cost unit: F = one forward pass over the batch; a training step is 3F.
Sources: DPG = arXiv 2604.08423 (section on dataset policy gradients); REPLAY = arXiv 2503.13751 (replay from checkpoints).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpgbench.metagrad import derivatives
from dpgbench.metagrad.alike import alike
from dpgbench.metagrad.data_parallel import ShardedBatch, WholeBatch
from dpgbench.metagrad.derivatives import Share, StepLoss, Tape
from dpgbench.metagrad.inputs import (
    Batch,
    check_attention,
    check_batches,
    check_causal,
    check_model,
    check_precision,
    check_reduction,
    check_scalar,
    device_of,
    split_weights,
)
from dpgbench.metagrad.loss import initial_parameters, loaded
from dpgbench.metagrad.memory import OverBudget, Store, budget_bytes, weighed
from dpgbench.metagrad.optimizers import Cotangents, Optimizer, Params, add_cotangents
from dpgbench.metagrad.training import Signal, mean_gradients

log = logging.getLogger(__name__)
MODES = ("auto", "tape", "reverse", "forward")


@dataclass(frozen=True)
class Metagradients:
    """rewards (N,): dPhi/dw_i in the order of the concatenated batches, or (N, L): dPhi/dw_{i,t}; value: Phi(phi_T); params: phi_T by name.

    modes: how each step was differentiated, "tape", "reverse" or "forward" (see `metagrad.derivatives`); tape_bytes: what the
    heaviest tape that was recorded weighs, None if none was; held_bytes: the most that tapes and states held at a time."""

    rewards: Tensor
    value: float
    params: Params
    modes: tuple[str, ...] = ()
    tape_bytes: int | None = None
    held_bytes: int = 0


def metagradients(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    signal: Signal,
    optimizer: Optimizer,
    weights: Tensor | None = None,
    micro_batch: int | None = None,
    checkpoint: str | int = "all",
    reduction: str = "length",
    *,
    memory_budget: int | float | None = None,
    mode: str = "auto",
    precision: str = "full",
    offload: str | None = None,
    activation_checkpointing: bool = False,
    data_parallel: bool = False,
    per_token: bool = False,
) -> Metagradients:
    """dPhi/dw_i of every training example at the given weights (default ones), exact through all T steps.

    With `per_token` dPhi/dw_{i,t} of every label: a step minimises (1/B) sum_i sum_t w_{i,t} l_{i,t}, where l_{i,t} is the cross-entropy of
    the label at position t over L-1, and rewards are (N, L). Column t belongs to the label at position t of `labels`, the token predicted
    from those before it; column 0 and ignored labels get 0. A row sums to what the text gets without `per_token`. weights: (N,) or
    (N, L). Attention is causal, so l_{i,t} does not hang on what follows: Phi at the given weights less Phi with w_{i,s} = 0 for
    all s >= t is what the text adds from token t on, and sum_{s >= t} w_{i,s} dPhi/dw_{i,s} is that to first order. Batches of different
    lengths are filled up with zeros on the right. The cost is the same.

    model: a transformers causal LM, left unchanged; batches: T dicts of "input_ids" and "labels", (B, L) long, right padded,
    labels aligned with input_ids, -100 ignored; signal: module -> 0-d tensor, higher is better, called once on the module
    with phi_T inside. weights (N,), micro_batch, reduction and precision as in `training.train`. An example without labels gets 0.

    memory_budget: what tapes and states may hold, in bytes (int) or as a share of the device's memory (float; None: half).
    mode: "auto" keeps the newest steps' tapes while the budget lasts and recomputes the rest, reverse over forward where a
    self-check passes and else, with a warning, reverse over reverse; "tape", "reverse" and "forward" force one way.
    checkpoint: "all" keeps parameters, gradient and moments of every step (4 copies of the parameters a step with AdamW);
    an int k keeps the state before every k-th step and replays k steps at a time (3T/k + 4k copies); "sqrt" is k = ceil(sqrt(T)).
    offload: None, "cpu" or "disk", where states wait for the reverse pass. activation_checkpointing: training steps keep no activations
    inside a decoder layer (1F more a step); the reverse pass's own memory is bounded by micro_batch.
    data_parallel: under torchrun, every process passes the same arguments, computes its share of each batch, and gets all rewards.

    Cost, beside training's 3FT: with its tape a step costs 6F, recomputed 8F (reverse over reverse: 9F), the first step at most 2F
    or 3F, less when the metric reads few parameters; 3F more per replayed step. A tape weighs two to three times a step's activations.
    Raises ValueError on malformed input, on active dropout, on operations without a second derivative, on `per_token` with
    reduction="tokens", when the signal is not a finite scalar that depends on the parameters, and when processes disagree.
    Sources: DPG, arXiv 2604.08423; REPLAY, arXiv 2503.13751."""
    check_model(model)
    check_attention(model)
    check_reduction(reduction)
    if per_token:
        check_causal(reduction)
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: it must be one of {', '.join(MODES)}; pass one of them")
    params = initial_parameters(model)
    check_precision(precision, params)
    steps, weights = check_batches(batches, params, weights, micro_batch, per_token)
    length = segment_length(checkpoint, len(steps))
    budget = math.inf if mode == "tape" else budget_bytes(memory_budget, device_of(params))
    group = ShardedBatch() if data_parallel else WholeBatch()
    group.check_agreement(steps, weights, params)
    shares = [_share(group, batch, of_step) for batch, of_step in zip(steps, split_weights(weights, steps), strict=True)]
    loss = StepLoss(model, micro_batch, reduction, precision, activation_checkpointing, per_token)

    with Store(offload) as store:
        run = _Run(loss, optimizer, shares, group, store, mode, budget)
        starts = range(0, len(steps), length)
        state, snapshots, records = optimizer.init(params), [], []
        for start in starts:
            records.clear()  # only the last segment's records outlive the forward pass
            if start < starts[-1]:
                run.kept_bytes += store.held_bytes((params, state))
                snapshots.append(store.put((params, state)))
            stop = min(start + length, len(steps))
            records, params, state = run.segment(start, stop, params, state, reverse_follows=stop == len(steps))
        del state

        value, to_params = signal_gradients(model, params, signal)
        to_state = None
        rewards: list[Tensor] = []
        for start in reversed(starts):
            if not records:
                snapshot = snapshots.pop()()
                run.kept_bytes -= store.held_bytes(snapshot)
                records, _, _ = run.segment(start, start + length, *snapshot, reverse_follows=True)
                del snapshot
            while records:
                reward, to_params, to_state = run.reverse(records.pop(), to_params, to_state)
                rewards.append(reward)
    modes = tuple(run.modes[step] for step in range(len(steps)))
    log.info("T=%d: %s; %.0f MB held at most", len(steps), _runs(modes), run.held_bytes / 1e6)
    if per_token:
        length = weights.shape[1]
        rewards = [F.pad(reward, (0, length - reward.shape[1])) for reward in rewards]
    collected = group.collected(rewards[::-1], [share.count for share in shares])
    return Metagradients(collected, value, params, modes, max(run.tape_sizes.values(), default=None), run.held_bytes)


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


def ascend(model: nn.Module, signal: Signal, optimizer: Optimizer, steps: int) -> Params:
    """Parameters after `steps` optimizer steps from the model's own on -Phi itself, no text in between; the model is left unchanged.

    Cost: `steps` times the signal's forward and backward. Raises ValueError as `signal_gradients` does."""
    params = initial_parameters(model)
    state = optimizer.init(params)
    for step in range(steps):
        _, slopes = signal_gradients(model, params, signal)
        downhill = {name: torch.zeros_like(theta) if slopes[name] is None else -slopes[name] for name, theta in params.items()}
        with torch.no_grad():
            params, state = optimizer.update(params, downhill, state, step)
    return params


class Record(NamedTuple):
    """What the reverse pass needs of step `step`: its tapes if they were kept, and phi_t, its gradient and the state after it."""

    step: int
    tapes: list[Tape] | None
    tensors: Callable[[], tuple[Params, Params, Any]]


@dataclass
class _Run:
    """The forward and the reverse pass over one training run, and what they learn on the way."""

    loss: StepLoss
    optimizer: Optimizer
    shares: Sequence[Share]
    group: WholeBatch
    store: Store
    mode: str
    budget: float
    modes: dict[int, str] = field(default_factory=dict)
    tape_sizes: dict[tuple[int, int], int] = field(default_factory=dict)  # bytes, by the shape of the share
    kept_bytes: int = 0  # snapshots outside the segment at hand
    held_bytes: int = 0
    warned: bool = False

    # ---- forwards

    def segment(self, start: int, stop: int, params: Params, state: Any, reverse_follows: bool) -> tuple[list[Record], Params, Any]:
        """Train steps start..stop-1. Where the reverse pass follows, a Record of each, the newest with tapes while the budget lasts."""
        records = []
        per_step = self.store.held_bytes(params) + self.store.held_bytes((params, state))  # gradient, parameters, state
        spare = self.budget - self.kept_bytes - per_step * (stop - start)
        tapes_bytes = 0
        for step in range(start, stop):
            tapes = None
            if reverse_follows and self._tape_wanted(step) and self._predicted(step, stop) <= spare:
                tapes, weight = self._recorded(step, params, spare - tapes_bytes)
                if tapes is not None and self._predicted(step, stop) > spare and step + 1 < stop:
                    tapes = None  # now that its weight is known: the budget is for later steps
            if tapes is None:
                gradients = self._gradients(step, params)
            else:
                tapes_bytes += weight
                gradients = _detached_sum(tapes)
            gradients = self.group.summed(gradients, params)
            with torch.no_grad():
                given = (params, gradients, state, step)
                new_params, state = alike("update", lambda given=given: self.optimizer.update(*given))
            if reverse_follows:
                records.append(Record(step, tapes, self.store.put((params, gradients, state))))
                self.held_bytes = max(self.held_bytes, self.kept_bytes + per_step * len(records) + tapes_bytes)
            params = new_params
        return records, params, state

    def _tape_wanted(self, step: int) -> bool:
        return self.mode in ("auto", "tape") and len(self.shares[step].weights) > 0  # a small batch leaves some process without a share

    def _predicted(self, step: int, stop: int) -> float:
        """Bytes of the tapes of steps step..stop-1, from those already weighed: an upper bound for other shapes, 0 if none is known."""
        return sum(self._predicted_one(later) for later in range(step, stop))

    def _predicted_one(self, step: int) -> float:
        rows, width = self.shares[step].shape
        if (rows, width) in self.tape_sizes or not self.tape_sizes:
            return self.tape_sizes.get((rows, width), 0)
        # Activations grow with the tokens, attention with their square.
        return min(size * (rows / r) * (width / w) * max(1, width / w) for (r, w), size in self.tape_sizes.items() if r)

    def _recorded(self, step: int, params: Params, limit: float) -> tuple[list[Tape] | None, int]:
        """The step's tapes and their bytes, or (None, 0) when they would weigh more than `limit`."""
        share = self.shares[step]
        try:
            with weighed(limit, (*params.values(), *share.batch, share.weights)) as scale:
                pieces = self.loss.pieces(share)
                tapes = alike(("tape", *share.shape), lambda: [derivatives.record(self.loss, params, piece) for piece in pieces])
        except OverBudget:
            shape = share.shape
            self.tape_sizes[shape] = max(self.tape_sizes.get(shape, 0), int(limit) + 1)
            return None, 0
        self.tape_sizes[share.shape] = scale.bytes
        return tapes, scale.bytes

    def _gradients(self, step: int, params: Params) -> Params:
        share, loss = self.shares[step], self.loss
        options = (loss.micro_batch, loss.reduction, loss.precision, loss.activation_checkpointing)
        given = (loss.model, params, share.batch, share.weights, *options)
        return alike(("gradients", *share.shape), lambda: mean_gradients(*given, count=share.count))

    # ---- backwards

    def reverse(self, record: Record, to_params: Cotangents, to_state: Any) -> tuple[Tensor, Cotangents, Any]:
        """Pull the cotangents of (phi_{t+1}, state) back through step t: (rewards, cotangents of phi_t and of its state)."""
        params, gradients, new_state = record.tensors()
        reached = tuple(name for name, cotangent in to_params.items() if cotangent is not None)
        with torch.no_grad():
            given = (gradients, new_state, record.step, to_params, to_state)
            vjp = ("vjp", reached, to_state is None)
            to_gradients, to_params, to_state = alike(vjp, lambda: self.optimizer.vjp(*given))
        direction = {name: cotangent for name, cotangent in to_gradients.items() if cotangent is not None}
        second_order = record.step > 0  # phi_0 is given: nothing before it to pull back to
        if len(self.shares[record.step].weights) == 0:  # no share of a small batch
            self.modes[record.step], reward, products = "forward", self.shares[record.step].weights.clone(), {}
        elif record.tapes is not None:
            self.modes[record.step] = "tape"
            pull = ("pull", *self.shares[record.step].shape, tuple(direction), second_order)
            reward, products = alike(pull, lambda: derivatives.pull_tapes(record.tapes, direction, second_order))
        else:
            reward, products = self._recompute(record.step, params, direction, second_order)
        if second_order:
            products = self.group.summed(products, params)
        return reward, {name: add_cotangents(to_params.get(name), products.get(name)) for name in params}, to_state

    def _recompute(self, step: int, params: Params, direction: Params, second_order: bool) -> tuple[Tensor, Cotangents]:
        share = self.shares[step]
        self.modes[step] = mode = "reverse" if self.mode == "reverse" or self._forward_fault(params, share, second_order) else "forward"
        compute = derivatives.reverse_over_reverse if mode == "reverse" else derivatives.reverse_over_forward
        kind = (mode, *share.shape, tuple(direction), second_order)
        return alike(kind, lambda: compute(self.loss, params, share, direction, second_order))

    def _forward_fault(self, params: Params, share: Share, second_order: bool) -> bool:
        """Whether the forward-mode way is closed to this model. Raises ValueError if it is the way that was asked for."""
        fault = derivatives.forward_mode_fault(self.loss, params, share, second_order)
        if fault is not None and self.mode == "forward":
            raise ValueError(f'mode="forward" on {type(self.loss.model).__name__}: {fault}; use mode="auto" or "reverse"')
        if fault is not None and not self.warned:
            self.warned = True
            warnings.warn(
                f"{type(self.loss.model).__name__}: recomputing steps by reverse over reverse, exact but slower: {fault}", stacklevel=4
            )
        return fault is not None


def _share(group: WholeBatch, batch: Batch, weights: Tensor) -> Share:
    rows = group.rows(len(weights))
    return Share(Batch(batch.input_ids[rows], batch.labels[rows]), weights[rows], len(weights))


def _detached_sum(tapes: Sequence[Tape]) -> Params:
    total = {name: gradient.detach() for name, gradient in tapes[0].gradients.items()}
    for tape in tapes[1:]:
        total = {name: total[name] + gradient.detach() for name, gradient in tape.gradients.items()}
    return total


def _runs(modes: Sequence[str]) -> str:
    """ "step 0 forward, steps 1-3 tape" for the log."""
    runs, start = [], 0
    for step in range(1, len(modes) + 1):
        if step == len(modes) or modes[step] != modes[start]:
            runs.append(f"{f'step {start}' if step - start == 1 else f'steps {start}-{step - 1}'} {modes[start]}")
            start = step
    return ", ".join(runs)
