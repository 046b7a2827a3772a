"""The training step of the target model: loss, SGD, AdamW, and the loop that plain training and metagradients share.

Everything is a pure function of a dictionary of parameters, so that a step can be run, replayed, differentiated or
vectorised without ever touching the model it came from. The optimizers carry their own vector-Jacobian product (VJP).

Shape suffixes: B examples in a batch, N examples in total, L tokens (fixed length), V vocabulary.
Cost unit: F = one forward pass over the batch; a backward pass is 2F, so a training step is 3F.
Sources: DPG = arXiv 2604.08423; REPLAY / metasmoothness = arXiv 2503.13751; optax for `eps_root`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

IGNORE = -100  # the transformers convention: a label that is not learned
REDUCTIONS = ("length", "tokens")

Params = dict[str, Tensor]
Cotangents = Mapping[str, "Tensor | None"]  # derivative of the metric to each tensor; None or absent = structurally zero
Signal = Callable[[nn.Module], Tensor]


# ---------------------------------------------------------------- optimizers


def _check(name: str, value: float, holds: bool, rule: str, fix: str) -> None:
    if not holds or isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: {name} must be {rule}; {fix}")


def _check_common(lr: float, weight_decay: float) -> None:
    _check("lr", lr, math.isfinite(lr) and lr > 0, "positive and finite", "pass e.g. lr=1e-3")
    _check("weight_decay", weight_decay, math.isfinite(weight_decay) and weight_decay >= 0, "finite and >= 0", "pass 0 for no decay")


class Optimizer(Protocol):
    """A differentiable update rule. `step` counts from 0. All methods are pure: no argument is modified."""

    def init(self, params: Params) -> Any:
        """State before the first step."""

    def update(self, params: Params, gradients: Params, state: Any, step: int) -> tuple[Params, Any]:
        """One step: the new parameters and the new state."""

    def vjp(self, gradients: Params, new_state: Any, step: int, to_params: Cotangents, to_state: Any) -> tuple[Cotangents, Cotangents, Any]:
        """Pull cotangents of `update`'s outputs (new parameters, new state) back to its inputs.

        Returns those of (gradients, old parameters, old state), the gradients held fixed when pulling to the parameters:
        the path through the loss is the caller's. `to_state=None` is a structural zero."""


@dataclass(frozen=True)
class SGD:
    """theta' = theta * (1 - lr * weight_decay) - lr * gradient. No state. Raises ValueError on a bad constant."""

    lr: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_common(self.lr, self.weight_decay)

    def init(self, params: Params) -> tuple[()]:
        return ()

    def update(self, params: Params, gradients: Params, state: tuple[()], step: int) -> tuple[Params, tuple[()]]:
        keep = 1 - self.lr * self.weight_decay
        return {name: theta * keep - self.lr * gradients[name] for name, theta in params.items()}, ()

    def vjp(
        self, gradients: Params, new_state: tuple[()], step: int, to_params: Cotangents, to_state: tuple[()] | None
    ) -> tuple[Cotangents, Cotangents, tuple[()]]:
        live = {name: cotangent for name, cotangent in to_params.items() if cotangent is not None}
        keep = 1 - self.lr * self.weight_decay
        return {name: -self.lr * c for name, c in live.items()}, {name: keep * c for name, c in live.items()}, ()


class Moments(NamedTuple):
    """AdamW's running means of the gradient and of its square, by parameter name."""

    first: Mapping[str, Tensor | None]
    second: Mapping[str, Tensor | None]


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay and optax's `eps_root` inside the square root:

        theta' = theta * (1 - lr * weight_decay) - lr * m_hat / (sqrt(v_hat + eps_root) + eps)

    `eps_root` belongs on the scale of the squared gradients: far below it the step is a sign function and the metagradient
    of a single step vanishes (metasmoothness, arXiv 2503.13751). Defaults are those of DPG, arXiv 2604.08423, except lr.
    Raises ValueError on a bad constant."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    eps_root: float = 1e-9
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        _check_common(self.lr, self.weight_decay)
        if not isinstance(self.betas, Sequence) or len(self.betas) != 2:
            raise ValueError(f"betas={self.betas!r}: betas must be two numbers; pass e.g. betas=(0.9, 0.95)")
        for index, beta in enumerate(self.betas):
            _check(f"betas[{index}]", beta, 0 <= beta < 1, "in [0, 1)", "pass e.g. betas=(0.9, 0.95)")
        _check("eps", self.eps, math.isfinite(self.eps) and self.eps >= 0, "finite and >= 0", "pass e.g. eps=1e-8")
        _check("eps_root", self.eps_root, math.isfinite(self.eps_root) and self.eps_root >= 0, "finite and >= 0", "pass e.g. eps_root=1e-9")
        object.__setattr__(self, "betas", tuple(self.betas))  # a list out of a YAML file must stay hashable

    def _corrections(self, step: int) -> tuple[float, float]:
        # Python floats: a float32 tensor would lose digits of 1 - beta ** t, and metagradients are compared in float64.
        return 1 - self.betas[0] ** (step + 1), 1 - self.betas[1] ** (step + 1)

    def init(self, params: Params) -> Moments:
        return Moments({n: torch.zeros_like(p) for n, p in params.items()}, {n: torch.zeros_like(p) for n, p in params.items()})

    def update(self, params: Params, gradients: Params, state: Moments, step: int) -> tuple[Params, Moments]:
        (b1, b2), (c1, c2) = self.betas, self._corrections(step)
        new_params, first, second = {}, {}, {}
        for name, theta in params.items():
            g = gradients[name]
            first[name] = m = b1 * state.first[name] + (1 - b1) * g
            second[name] = v = b2 * state.second[name] + (1 - b2) * g * g
            denominator = (v / c2 + self.eps_root).sqrt() + self.eps
            new_params[name] = theta * (1 - self.lr * self.weight_decay) - (self.lr / c1) * m / denominator
        return new_params, Moments(first, second)

    def vjp(
        self, gradients: Params, new_state: Moments, step: int, to_params: Cotangents, to_state: Moments | None
    ) -> tuple[Cotangents, Cotangents, Moments]:
        (b1, b2), (c1, c2) = self.betas, self._corrections(step)
        to_first, to_second = to_state or ({}, {})
        to_gradients, to_old_params, to_old_first, to_old_second = {}, {}, {}, {}
        for name, g in gradients.items():
            to_theta, to_m, to_v = to_params.get(name), to_first.get(name), to_second.get(name)
            if to_theta is not None:
                m, root = new_state.first[name], (new_state.second[name] / c2 + self.eps_root).sqrt()
                denominator = root + self.eps
                to_old_params[name] = to_theta * (1 - self.lr * self.weight_decay)
                to_m_hat = -self.lr * to_theta / denominator
                m_over_root = m / root
                if self.eps_root == 0:  # an unused token's row: 0 / 0, where the limit along real gradients is zero
                    m_over_root = torch.where(root > 0, m_over_root, 0.0)
                to_m = add_cotangents(to_m_hat / c1, to_m)
                to_v = add_cotangents(to_m_hat * m_over_root / denominator * (-0.5 / (c1 * c2)), to_v)
            from_m = None if to_m is None else (1 - b1) * to_m
            from_v = None if to_v is None else 2 * (1 - b2) * g * to_v
            to_gradients[name] = add_cotangents(from_m, from_v)
            to_old_first[name] = None if to_m is None else b1 * to_m
            to_old_second[name] = None if to_v is None else b2 * to_v
        return to_gradients, to_old_params, Moments(to_old_first, to_old_second)


def add_cotangents(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Addition of cotangents, None being zero."""
    if left is None or right is None:
        return right if left is None else left
    return left + right


# ---------------------------------------------------------------- the model as a function of its parameters


def initial_parameters(model: nn.Module) -> Params:
    """phi_0: the parameters that require a gradient, detached, sharing the model's memory; tied tensors appear once.

    Parameters with requires_grad=False are frozen: they stay in the model and in no dictionary.
    Raises ValueError when none is trainable or one is not floating point."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(f"parameter {name} is {parameter.dtype}: parameters must be floating point; load the model unquantised")
    params = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not params:
        raise ValueError("0 trainable parameters: at least one must have requires_grad=True; call model.requires_grad_(True)")
    return params


@contextmanager
def loaded(model: nn.Module, params: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Put `params` (names as in named_parameters; parameters not named keep their value) into the module for the block.

    The tensors go in as they are, so autograd, jvp and vmap see through them, and a tied tensor reaches every place it is
    used. On exit, exceptions included, the original Parameter objects and the training flags are back. Costs no copy.
    Raises ValueError on a name the model lacks or a shape that differs. Not safe to share between threads."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append((module, attribute))
    originals = dict(model.named_parameters())
    for name, tensor in params.items():
        if name not in originals:
            raise ValueError(f"parameter {name!r} is not in the model: names must come from named_parameters(); drop or rename it")
        if tensor.shape != originals[name].shape:
            raise ValueError(
                f"parameter {name} has shape {tuple(tensor.shape)}: the model's is {tuple(originals[name].shape)}; pass that shape"
            )
    modes = [(module, module.training) for module in model.modules()]
    try:
        for name, tensor in params.items():
            for module, attribute in places[originals[name]]:
                module._parameters[attribute] = tensor
        yield model
    finally:
        for parameter, spots in places.items():
            for module, attribute in spots:
                module._parameters[attribute] = parameter
        for module, training in modes:
            module.training = training


def per_example_loss(
    model: nn.Module, params: Mapping[str, Tensor], input_ids: Tensor, labels: Tensor, reduction: str = "length"
) -> Tensor:
    """l(x; phi) for every example: the sum of its token cross-entropies (nats) over L-1 ("length") or its real labels ("tokens").

    input_ids, labels: (B, L) long, labels aligned with input_ids (shifted inside), -100 ignored. Returns (B,); an example
    without labels has loss 0. Batches are right padded and attention is causal, hence no attention mask. Attention runs on
    the MATH kernel, the only one with a double backward and a forward mode. Cost 1F. Source: DPG, arXiv 2604.08423.
    Raises ValueError on an unknown reduction."""
    check_reduction(reduction)
    with sdpa_kernel(SDPBackend.MATH):
        logits_BLV = torch.func.functional_call(model, dict(params), (), {"input_ids": input_ids, "use_cache": False}).logits
    if logits_BLV.dtype in (torch.float16, torch.bfloat16):
        logits_BLV = logits_BLV.float()
    targets_BL = labels[:, 1:]
    loss_BL = F.cross_entropy(logits_BLV[:, :-1].transpose(1, 2), targets_BL, ignore_index=IGNORE, reduction="none")
    if reduction == "length":
        return loss_BL.sum(1) / targets_BL.shape[1]
    return loss_BL.sum(1) / (targets_BL != IGNORE).sum(1).clamp(min=1)


def mean_gradients(
    model: nn.Module, params: Params, batch: Batch, weights_B: Tensor, micro_batch: int | None = None, reduction: str = "length"
) -> Params:
    """Gradient of (1/B) sum_i w_i l(x_i; phi), accumulated over micro-batches. Cost 3F."""
    leaves = {name: theta.detach().requires_grad_() for name, theta in params.items()}
    total: Sequence[Tensor] | None = None
    for rows in micro_batches(len(weights_B), micro_batch):
        with torch.enable_grad():
            loss_B = per_example_loss(model, leaves, batch.input_ids[rows], batch.labels[rows], reduction)
            mean = (weights_B[rows] * loss_B).sum() / len(weights_B)
        parts = torch.autograd.grad(mean, list(leaves.values()), materialize_grads=True)
        total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]
    return dict(zip(leaves, total, strict=True))


def train(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    optimizer: Optimizer,
    weights: Tensor | None = None,
    micro_batch: int | None = None,
    reduction: str = "length",
) -> Params:
    """phi_T: T optimizer steps from the model's parameters, one per batch; step t minimises (1/|B_t|) sum_i w_i l(x_i; phi_t).

    batches: T dicts of "input_ids" and "labels", (B, L) long, right padded; weights (N,) over the concatenated batches,
    default ones. Returns name -> tensor (trainable parameters only); the model is left unchanged. `micro_batch` bounds
    memory and changes nothing beyond rounding. Cost 3F a step.
    Raises ValueError on malformed batches, weights or micro_batch, active dropout, and non-floating parameters."""
    check_model(model)
    params = initial_parameters(model)
    steps, weights_N = check_batches(batches, params, weights, micro_batch)
    state = optimizer.init(params)
    for step, (batch, weights_B) in enumerate(zip(steps, split_weights(weights_N, steps), strict=True)):
        gradients = mean_gradients(model, params, batch, weights_B, micro_batch, reduction)
        with torch.no_grad():
            params, state = optimizer.update(params, gradients, state, step)
    return params


# ---------------------------------------------------------------- Phi after one step on one text


def one_step_values(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    signal: Signal,
    optimizer: Optimizer,
    reduction: str = "length",
    chunk: int = 64,
) -> Tensor:
    """Phi after one optimizer step from phi_0 on text i alone, for each of N texts: (N,), detached.

    input_ids, labels: (N, L) long. `signal` is called on the model with the stepped parameters inside. Texts run `chunk` at a
    time through torch.func.vmap, holding about six copies of the parameters per text; where an architecture or a signal
    cannot be vectorised, one warning names the reason and the rest runs text by text. Cost: 3F over all texts plus N signals.
    Raises ValueError as `train` does, and on a signal that is not a scalar tensor."""
    check_model(model)
    check_reduction(reduction)
    _check_count("chunk", chunk)
    params = initial_parameters(model)
    texts = check_batch({"input_ids": input_ids, "labels": labels}, "input", _device(params), may_be_unlabelled=True)
    state = optimizer.init(params)

    def value(ids_L: Tensor, labels_L: Tensor) -> Tensor:
        gradients = torch.func.grad(lambda p: per_example_loss(model, p, ids_L[None], labels_L[None], reduction)[0])(params)
        stepped, _ = optimizer.update(params, gradients, state, 0)
        with loaded(model, stepped), sdpa_kernel(SDPBackend.MATH):
            return check_scalar(signal(model))

    values: list[Tensor] = []
    function = torch.func.vmap(value)
    with torch.no_grad():  # torch.func.grad is not affected; nothing else needs a tape
        for ids_BL, labels_BL in zip(texts.input_ids.split(chunk), texts.labels.split(chunk), strict=True):
            if function is not None:
                try:
                    values.append(function(ids_BL, labels_BL))
                    continue
                except RuntimeError as error:
                    function = None
                    reason = str(error).strip().split("\n")[0]
                    warnings.warn(f"one_step_values: vmap failed, going on text by text, slower but the same: {reason}", stacklevel=2)
            values.append(torch.stack([value(*text) for text in zip(ids_BL, labels_BL, strict=True)]))
    return torch.cat(values)


# ---------------------------------------------------------------- validation, shared with metagrad.py


class Batch(NamedTuple):
    """One step's data on the model's device: input_ids and labels, both (B, L) long."""

    input_ids: Tensor
    labels: Tensor


def micro_batches(size: int, micro_batch: int | None) -> list[slice]:
    """Row ranges that cover a batch of `size` examples, at most `micro_batch` each (None: all at once)."""
    width = micro_batch or size
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def split_weights(weights_N: Tensor, steps: Sequence[Batch]) -> tuple[Tensor, ...]:
    """The weights of the concatenated batches, cut back into one (B,) piece per step."""
    return weights_N.split([len(step.input_ids) for step in steps])


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
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"{name} is {found}: it must be a dict with input_ids and labels; pass both as (B, L) long tensors")
    ids, labels = batch["input_ids"], batch["labels"]
    if ids.shape != labels.shape:
        raise ValueError(f"{name}: input_ids {tuple(ids.shape)} and labels {tuple(labels.shape)} must have one shape; align the labels")
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}: it must be (B, L) with B >= 1 and L >= 2; drop it or pad it")
    if ids.dtype != torch.long or labels.dtype != torch.long:
        raise ValueError(f"{name}: dtypes {ids.dtype}, {labels.dtype} must both be torch.int64; call .long()")
    if not may_be_unlabelled and not bool((labels[:, 1:] != IGNORE).any()):
        raise ValueError(f"{name}: all labels after the first are {IGNORE}: one must be real, the first is never predicted; drop it")
    return Batch(ids.to(device), labels.to(device))


def check_batches(
    batches: Sequence[Mapping[str, Tensor]], params: Params, weights: Tensor | None, micro_batch: int | None
) -> tuple[list[Batch], Tensor]:
    """The T batches on the parameters' device and the (N,) weights in the dtype of the loss. Raises ValueError."""
    if isinstance(batches, Mapping) or len(batches) == 0:
        raise ValueError(f"batches is {type(batches).__name__} of {len(batches)}: it must be a list of >= 1 batches; pass [batch]")
    if micro_batch is not None:
        _check_count("micro_batch", micro_batch)
    steps = [check_batch(batch, f"batches[{index}]", _device(params)) for index, batch in enumerate(batches)]
    count = sum(len(step.input_ids) for step in steps)
    exact = any(theta.dtype == torch.float64 for theta in params.values())
    like = {"dtype": torch.float64 if exact else torch.float32, "device": _device(params)}
    if weights is None:
        return steps, torch.ones(count, **like)
    if tuple(weights.shape) != (count,):
        raise ValueError(f"weights has shape {tuple(weights.shape)}: it must be ({count},), one per example; concatenate in batch order")
    if not bool(torch.isfinite(weights).all()):
        raise ValueError(f"weights holds {int((~torch.isfinite(weights)).sum())} non-finite values: all must be finite; 0 drops a text")
    return steps, weights.detach().to(**like)


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: reduction must be one of {', '.join(REDUCTIONS)}; pass one of them")


def _check_count(name: str, value: int) -> None:
    _check(name, value, isinstance(value, int) and value >= 1, "an integer >= 1", "pass e.g. 32")


def _device(params: Params) -> torch.device:
    return next(iter(params.values())).device
