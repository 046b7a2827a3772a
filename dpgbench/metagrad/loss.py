"""The per-example loss of a causal LM, whole or token by token, as a pure function of a dictionary of parameters.

Nothing here writes to the model, so a step can be run, replayed, differentiated twice or vectorised.
Shape suffixes: B examples in a batch, L tokens (fixed length), V vocabulary. Cost unit: F = one forward pass over the batch.
Source: DPG = arXiv 2604.08423.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpgbench.core.labels import IGNORED_LABEL
from dpgbench.metagrad.fused import cross_entropy, faster_activations, transformed
from dpgbench.metagrad.inputs import check_reduction
from dpgbench.metagrad.layer_norm import faster_layer_norms
from dpgbench.metagrad.optimizers import Params

ROWS_TOGETHER = 32  # at least, in a pass of rows that are of one length or nearly so: smaller ones cost more in calls than they save
PASSES_AT_MOST = 4
_padding_computed: ContextVar[bool] = ContextVar("padding is computed", default=False)


@contextmanager
def padding_computed() -> Iterator[None]:
    """Inside, batches are computed as they are given, pads and repeated rows too: for who counts FLOPs or watches modules."""
    before = _padding_computed.set(True)
    try:
        yield
    finally:
        _padding_computed.reset(before)


def padding_is_computed() -> bool:
    """Whether this is inside of `padding_computed`."""
    return _padding_computed.get()


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
    model: nn.Module,
    params: Mapping[str, Tensor],
    input_ids: Tensor,
    labels: Tensor,
    reduction: str = "length",
    precision: str = "full",
    activation_checkpointing: bool = False,
) -> Tensor:
    """l(x; phi) for every example: the sum of its token cross-entropies (nats) over L-1 ("length") or its real labels ("tokens").

    input_ids, labels: (B, L) long, labels aligned with input_ids (shifted inside), -100 ignored. Returns (B,); an example
    without labels has loss 0. Batches are right padded and attention is causal, hence no attention mask. Attention runs on
    the MATH kernel, the only one with a double backward and a forward mode. precision="bf16" computes matrix products in
    bfloat16 and the cross-entropy in float32. `activation_checkpointing` recomputes every decoder layer in the backward
    pass (1F more) instead of keeping its activations. Cost 1F, less the padding where `by_length` leaves it out. Source: DPG, arXiv
    2604.08423.
    Raises ValueError on an unknown reduction."""
    check_reduction(reduction)

    def summed(loss_RW: Tensor) -> Tensor:
        return loss_RW.sum(1)

    loss_B, targets_BL = _cross_entropies(model, params, input_ids, labels, precision, activation_checkpointing, summed)
    if reduction == "length":
        return loss_B / (labels.shape[1] - 1)
    return loss_B / (targets_BL != IGNORED_LABEL).sum(1).clamp(min=1)


def per_token_loss(
    model: nn.Module,
    params: Mapping[str, Tensor],
    input_ids: Tensor,
    labels: Tensor,
    precision: str = "full",
    activation_checkpointing: bool = False,
) -> Tensor:
    """What each label adds to l(x; phi) with reduction "length": (B, L), its cross-entropy (nats) over L-1.

    Column t belongs to the label at position t, predicted from the tokens before it; column 0, which nothing predicts, and ignored labels
    are 0. Rows sum to `per_example_loss`. Attention is causal, so what is right of column t has no part in it. Cost 1F, arguments as there.
    """
    length = labels.shape[1]

    def whole(loss_RW: Tensor) -> Tensor:
        return F.pad(loss_RW, (0, length - loss_RW.shape[1]))

    loss_BL, _ = _cross_entropies(model, params, input_ids, labels, precision, activation_checkpointing, whole)
    return F.pad(loss_BL[:, :-1], (1, 0)) / (length - 1)


def _cross_entropies(
    model: nn.Module,
    params: Mapping[str, Tensor],
    input_ids: Tensor,
    labels: Tensor,
    precision: str,
    activation_checkpointing: bool,
    of_rows: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """`of_rows` of the cross-entropies of what each position predicts, (R, W) for some of the rows at a time, and those targets, (B, L).

    Column t is about the label at position t + 1, the last one about nothing. What lies beyond W are pads."""
    # The last position predicts nothing; an ignored target for it is cheaper than a copy of all the other logits.
    targets_BL = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_autocast(precision, input_ids.device))
        stack.enter_context(faster_activations(model))
        stack.enter_context(faster_layer_norms(model))
        if activation_checkpointing:
            stack.enter_context(_checkpointed_layers(model, precision))

        def loss_of(ids_RW: Tensor, targets_RW: Tensor) -> Tensor:
            logits_RWV = torch.func.functional_call(model, dict(params), (), {"input_ids": ids_RW, "use_cache": False}).logits
            if logits_RWV.dtype in (torch.float16, torch.bfloat16):
                logits_RWV = logits_RWV.float()
            return of_rows(cross_entropy(logits_RWV.flatten(0, 1), targets_RW.flatten(), IGNORED_LABEL).view(targets_RW.shape))

        return by_length(loss_of, input_ids, targets_BL), targets_BL


def by_length(function: Callable[[Tensor, Tensor], Tensor], ids_BL: Tensor, targets_BL: Tensor) -> Tensor:
    """function(ids, targets), one value or one row of values for each row; rows of one length or nearly so go together, without their pads.

    What comes after a row's last target is padding to a causal model, and rows that are the same are computed once. All at once on an
    accelerator, where asking for lengths would be waiting for it, under a torch.func transform of the rows, and where FLOPs are counted.
    """
    if padding_is_computed() or targets_BL.device.type != "cpu" or transformed(targets_BL):
        return function(ids_BL, targets_BL)
    different, row_of_B = torch.unique(torch.cat([ids_BL, targets_BL], dim=1), dim=0, return_inverse=True)
    ids_RL, targets_RL = different.chunk(2, dim=1)
    places_L = torch.arange(1, targets_RL.shape[1] + 1)
    needed_R = (places_L * (targets_RL != IGNORED_LABEL)).amax(1)
    order_R = needed_R.argsort(stable=True)
    pieces = order_R.chunk(max(1, min(PASSES_AT_MOST, len(order_R) // ROWS_TOGETHER)))
    widths = needed_R[torch.stack([rows[-1] for rows in pieces])].clamp(min=1).tolist()
    parts = [function(ids_RL[rows, :width], targets_RL[rows, :width]) for rows, width in zip(pieces, widths, strict=True)]
    return torch.cat(parts)[order_R.argsort()[row_of_B]]


def _autocast(precision: str, device: torch.device):
    # Without the cache: a cast kept from one evaluation would carry the graph of another.
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if precision == "bf16" else nullcontext()


@contextmanager
def _checkpointed_layers(model: nn.Module, precision: str) -> Iterator[None]:
    """Inside, every decoder layer forgets its activations. A layer's parameters are captured when it runs, because by the time it is
    recomputed functional_call has put the model's own back."""
    from torch.utils.checkpoint import checkpoint

    def forgetful(layer: nn.Module, forward):
        def run(*args, **kwargs):
            current = dict(layer.named_parameters())

            def compute(*args, **kwargs):
                autocast = _autocast(precision, args[0].device)
                with loaded(layer, current), sdpa_kernel(SDPBackend.MATH), faster_activations(layer), faster_layer_norms(layer), autocast:
                    return forward(*args, **kwargs)

            return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    layers = decoder_layers(model)
    for layer in layers:
        layer.__dict__["forward"] = forgetful(layer, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The longest ModuleList of the model: its stack of decoder layers. Raises ValueError when it has none."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not stacks:
        raise ValueError(f"activation_checkpointing on {type(model).__name__}: it has no list of layers to recompute; leave it off")
    return list(max(stacks, key=len))
