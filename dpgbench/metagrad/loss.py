"""The per-example loss of a causal LM, whole or token by token, as a pure function of a dictionary of parameters.

Nothing here writes to the model, so a step can be run, replayed, differentiated twice or vectorised.
Shape suffixes: B examples in a batch, L tokens (fixed length), V vocabulary. Cost unit: F = one forward pass over the batch.
Source: DPG = arXiv 2604.08423.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpgbench.core.labels import IGNORED_LABEL
from dpgbench.metagrad.fused import cross_entropy, faster_activations
from dpgbench.metagrad.inputs import check_reduction
from dpgbench.metagrad.layer_norm import faster_layer_norms
from dpgbench.metagrad.optimizers import Params


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
    pass (1F more) instead of keeping its activations. Cost 1F. Source: DPG, arXiv 2604.08423.
    Raises ValueError on an unknown reduction."""
    check_reduction(reduction)
    loss_BL, targets_BL = _cross_entropies(model, params, input_ids, labels, precision, activation_checkpointing)
    if reduction == "length":
        return loss_BL.sum(1) / (labels.shape[1] - 1)
    return loss_BL.sum(1) / (targets_BL != IGNORED_LABEL).sum(1).clamp(min=1)


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
    loss_BL, _ = _cross_entropies(model, params, input_ids, labels, precision, activation_checkpointing)
    return F.pad(loss_BL[:, :-1], (1, 0)) / (labels.shape[1] - 1)


def _cross_entropies(
    model: nn.Module, params: Mapping[str, Tensor], input_ids: Tensor, labels: Tensor, precision: str, activation_checkpointing: bool
) -> tuple[Tensor, Tensor]:
    """Of what each position predicts, and that, both (B, L): column t is about the label at position t + 1, the last one about nothing."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_autocast(precision, input_ids.device))
        stack.enter_context(faster_activations(model))
        stack.enter_context(faster_layer_norms(model))
        if activation_checkpointing:
            stack.enter_context(_checkpointed_layers(model, precision))
        logits_BLV = torch.func.functional_call(model, dict(params), (), {"input_ids": input_ids, "use_cache": False}).logits
    if logits_BLV.dtype in (torch.float16, torch.bfloat16):
        logits_BLV = logits_BLV.float()
    # The last position predicts nothing; an ignored target for it is cheaper than a copy of all the other logits.
    targets_BL = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
    return cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten(), IGNORED_LABEL).view(targets_BL.shape), targets_BL


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
