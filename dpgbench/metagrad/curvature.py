"""The inverse curvature of the training loss at phi_0, times a direction: EK-FAC (Grosse et al., arXiv 2308.03296, section 3).

The curvature is the Gauss-Newton matrix of the mean loss over N texts, which for a cross-entropy is the true Fisher matrix:

    G = (1/N) sum_i c_i E[(grad s_i)(grad s_i)^T],    s_i = sum_t -log p(y_t | x_<t),    y_t ~ p(. | x_<t) of the model at phi_0,

the tokens read are those of text i, the labels are the model's own draws, and c_i = 1/(L-1), or with reduction="tokens" 1 over the
number of labels, is how the loss averages a text's tokens. One draw of the labels stands for the expectation. With true labels in their
place it would be the empirical Fisher matrix, which is not a curvature (Kunstner et al., arXiv 1905.12558).

G is taken as block diagonal, a block for each module, and a block's axes are turned so that it is nearly diagonal. Of a layer with
inputs a_t and derivatives g_t of sqrt(c_i) s_i in its outputs, a text's gradient is the matrix sum_t a_t g_t^T. With

    A = mean_t a_t a_t^T = Q_A D_A Q_A^T        S = (1/N) sum_i sum_t g_t g_t^T = Q_S D_S Q_S^T

the block is approximated in the basis Q_A x Q_S by a diagonal: D_A x D_S is K-FAC (Martens and Grosse, arXiv 1503.05671); the second
moments of the texts' gradients in that basis, Lambda = (1/N) sum_i (Q_A^T (sum_t a_t g_t^T) Q_S)^2, are the best diagonal there is in the
Frobenius norm, EK-FAC (George et al., arXiv 1806.03884). What each kind of module gets:

    Linear, Conv1D   the bias is one more input, which is always 1
    Embedding        the input is one-hot, so A is diagonal as it stands: Q_A = 1. Positions are embeddings too
    an axis of more than LARGEST_FACTOR   keeps its own coordinates, Q = 1, instead of a matrix that would not fit: the output side of a
                     head over a real vocabulary
    any other module with up to LARGEST_DENSE parameters (a LayerNorm)   its dense block, from the texts' gradients
    any other parameter, and one that is used twice (a tied head) or otherwise than for each token once   its diagonal

Damping follows Grosse et al.: lambda = damping times the block's mean eigenvalue, for each block its own.

Cost (F = one forward pass of the model on the texts; I inputs with the bias and O outputs of a layer; n tokens that are read): drawing
the labels F; two passes of at most 2F, for no gradient of a weight is formed; per layer 2n(I^2 + O^2) for A and S, as much to turn, 2NLIO
for Lambda, 9(I^3 + O^3) for eigenvectors (Q = 1 costs nothing); 3F if there is a module of the third kind. Only modules that the
direction reaches are looked at: for a metric of the LM head, that layer alone.
Memory beside the model: Lambda, as large as the parameters; Q, I^2 + O^2 for a layer; activations and their derivatives of a micro-batch.

Shape suffixes: B texts in a micro-batch, N in total, L tokens, n tokens that are read, V vocabulary, I inputs, O outputs, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpgbench.core.labels import IGNORED_LABEL
from dpgbench.core.limits import LARGEST_FACTOR
from dpgbench.metagrad.inputs import Batch, check_batch, check_model, check_number, check_reduction, device_of, micro_batches
from dpgbench.metagrad.loss import initial_parameters, padding_computed, per_example_loss
from dpgbench.metagrad.optimizers import Params

LARGEST_DENSE = 4096  # ours: a LayerNorm of width 2048, weight and bias
NUMBERS_AT_ONCE = 20_000_000  # of texts' gradients


def inverse_curvature_product(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    direction: Params,
    generator: torch.Generator,
    damping: float = 0.1,
    micro_batch: int | None = None,
    reduction: str = "length",
) -> tuple[Params, float]:
    """(G + lambda)^-1 direction at the model's parameters, by parameter name, and the FLOPs of eigenvectors, which torch does not count.

    input_ids, labels: (N, L) long; of the labels only where they are counts, their values are drawn from the model with `generator`, on the
    CPU, all numbers beforehand: `micro_batch` changes nothing beyond rounding. direction: by parameter name; a parameter it does not name
    counts as zero, but shares its module's block, so that the product may name it. Parameters that no text moves get zero.
    Cost: see above. Raises ValueError as `train` does, and on a damping that is not positive."""
    check_damping(damping)
    blocks = curvature(model, input_ids, labels, generator, names=list(direction), micro_batch=micro_batch, reduction=reduction)
    product = {}
    with torch.no_grad():
        for block in blocks:
            product |= block.solve(direction, damping)
    return product, sum(block.decomposition_flops for block in blocks)


def check_damping(damping: float) -> None:
    check_number("damping", damping, 0 < damping < float("inf"), "positive and finite", "pass e.g. damping=0.1")


def curvature(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    names: Sequence[str] | None = None,
    micro_batch: int | None = None,
    reduction: str = "length",
) -> list[Block]:
    """The blocks of G that hold the parameters `names` (default: all trainable ones); arguments and cost as above."""
    check_model(model)
    check_reduction(reduction)
    params = initial_parameters(model)
    texts = check_batch({"input_ids": input_ids, "labels": labels}, "input", device_of(params), may_be_unlabelled=True)
    uniforms_NL = torch.rand(input_ids.shape, generator=generator).to(texts.input_ids.device)
    read = [(rows, Batch(texts.input_ids[rows], texts.labels[rows])) for rows in micro_batches(len(input_ids), micro_batch)]
    drawn = [Batch(part.input_ids, draw_labels(model, part, uniforms_NL[rows])) for rows, part in read]
    wanted = set(params if names is None else names)
    layers, dense, others = _kinds(model, params, wanted, Batch(texts.input_ids[:2], texts.labels[:2]))
    if layers:
        _fit_layers(layers, model, params, drawn, reduction)
    if dense or others:
        _fit_gathered(dense + others, model, params, drawn, reduction)
    return [*layers, *dense, *others]


def draw_labels(model: nn.Module, texts: Batch, uniforms_BL: Tensor) -> Tensor:
    """Labels in the convention of `per_example_loss`, one for each real one of the texts', drawn from the model: (B, L) long. Cost F.

    A label is where the distribution function of its position first exceeds the uniform number of that position."""
    with torch.no_grad():
        weights_BLV = model(input_ids=texts.input_ids, use_cache=False).logits[:, :-1].float().softmax(-1).cumsum(-1)
        reached_BL1 = uniforms_BL[:, 1:, None].to(weights_BLV) * weights_BLV[..., -1:]
        drawn_BL = torch.searchsorted(weights_BLV, reached_BL1, right=True)[..., 0].clamp(max=weights_BLV.shape[-1] - 1)
        drawn_BL = F.pad(drawn_BL, (1, 0), value=IGNORED_LABEL)
        return drawn_BL.where(texts.labels != IGNORED_LABEL, IGNORED_LABEL)


# ---------------------------------------------------------------- blocks


@dataclass
class Side:
    """One side of a layer's block: the eigenvectors of its factor as columns, or None for its own axes, and the factor's values there."""

    basis: Tensor | None
    values: Tensor

    @property
    def decomposition_flops(self) -> float:
        return 0.0 if self.basis is None else 9.0 * len(self.basis) ** 3  # LAPACK's count for eigenvalues and eigenvectors, roughly

    def turned(self, what: Tensor) -> Tensor:
        """Rows in the side's own coordinates, (..., size), in those of the eigenvectors."""
        return what if self.basis is None else what @ self.basis

    def turned_back(self, what: Tensor) -> Tensor:
        return what if self.basis is None else what @ self.basis.T


class Layer:
    """A Linear, Conv1D or Embedding: EK-FAC. Its matrix here is (I, O), inputs first, the bias its last row."""

    def __init__(self, module: nn.Module, weight: str, bias: str | None):
        self.module, self.weight, self.bias = module, weight, bias
        self.one_hot = isinstance(module, nn.Embedding)
        self.transposed = isinstance(module, nn.Linear)  # keeps (outputs, inputs)
        shape = module.weight.shape[::-1] if self.transposed else module.weight.shape
        self.inputs, self.outputs = shape[0] + (bias is not None), shape[1]
        like = {"dtype": module.weight.dtype, "device": module.weight.device}
        dense = [size <= LARGEST_FACTOR and not own for size, own in ((self.inputs, self.one_hot), (self.outputs, False))]
        # First the factors' sums, (size, size) or their diagonals, (size,); `decompose` puts eigenvectors in their place.
        self.factors = [
            torch.zeros((size, size) if full else (size,), **like) for size, full in zip((self.inputs, self.outputs), dense, strict=True)
        ]
        self.sides: list[Side] = []
        self.eigenvalues = torch.zeros((self.inputs, self.outputs), **like)
        """Lambda."""

    @property
    def decomposition_flops(self) -> float:
        return sum(side.decomposition_flops for side in self.sides)

    def add_factors(self, inputs: Tensor, slopes_BLO: Tensor, read_BL: Tensor) -> None:
        slopes_nO = slopes_BLO[read_BL]
        if self.one_hot:
            self.factors[0] += torch.bincount(inputs[read_BL], minlength=self.inputs)
        else:
            _add_outer(self.factors[0], self._with_bias(inputs[read_BL]))
        _add_outer(self.factors[1], slopes_nO)

    def decompose(self, tokens: int, texts: int) -> None:
        for factor, count in zip(self.factors, (tokens, texts), strict=True):
            if factor.dim() == 1:
                self.sides.append(Side(None, factor / count))
            else:  # in float64: float32 loses the small eigenvalues of a matrix like these
                values, basis = torch.linalg.eigh(factor.double() / count)
                self.sides.append(Side(basis.to(factor), values.clamp(min=0).to(factor)))
        self.factors = []

    def add_eigenvalues(self, inputs: Tensor, slopes_BLO: Tensor, read_BL: Tensor, texts: int) -> None:
        """Squares of a micro-batch's gradients in the eigenbasis, over the number of all texts."""
        source, target = self.sides
        slopes_BLO = _where(read_BL, target.turned(slopes_BLO[read_BL]))
        if self.one_hot:
            size = self.inputs  # gradients of the rows that a text has, and of no other
            place_BL = inputs + size * torch.arange(len(inputs), device=inputs.device)[:, None]
            places, where = place_BL.flatten().unique(return_inverse=True)
            rows = slopes_BLO.new_zeros(len(places), self.outputs).index_add_(0, where, slopes_BLO.flatten(0, 1))
            self.eigenvalues.index_add_(0, places % size, rows.square_() / texts)
            return
        inputs_BLI = _where(read_BL, source.turned(self._with_bias(inputs[read_BL])))
        width = max(1, NUMBERS_AT_ONCE // self.eigenvalues.numel())
        for a_BLI, g_BLO in zip(inputs_BLI.split(width), slopes_BLO.split(width), strict=True):
            self.eigenvalues += (a_BLI.mT @ g_BLO).square_().sum(0) / texts

    def solve(self, direction: Mapping[str, Tensor], damping: float) -> Params:
        source, target = self.sides
        along = direction.get(self.weight)
        along_IO = torch.zeros_like(self.module.weight) if along is None else along
        if self.transposed:
            along_IO = along_IO.T
        if self.bias is not None:
            bias = direction.get(self.bias)
            along_IO = torch.cat([along_IO, (along_IO.new_zeros(self.outputs) if bias is None else bias)[None]])
        turned_IO = source.turned(target.turned(along_IO).T).T
        solved_IO = source.turned_back(target.turned_back(_divided(turned_IO, self.eigenvalues, damping)).T).T
        found = {} if self.bias is None else {self.bias: solved_IO[-1].clone()}
        weight_IO = solved_IO if self.bias is None else solved_IO[:-1]
        return {self.weight: (weight_IO.T if self.transposed else weight_IO).contiguous(), **found}

    def _with_bias(self, inputs: Tensor) -> Tensor:
        return inputs if self.bias is None else F.pad(inputs, (0, 1), value=1.0)


class Gathered:
    """Parameters whose texts' gradients are formed: their second moments, dense or, with `diagonal`, only the diagonal."""

    def __init__(self, shapes: Mapping[str, torch.Size], like: Tensor, diagonal: bool):
        self.shapes, self.diagonal = dict(shapes), diagonal
        self.sizes = [shape.numel() for shape in shapes.values()]
        size = sum(self.sizes)
        self.moments = torch.zeros((size,) if diagonal else (size, size), dtype=like.dtype, device=like.device)

    @property
    def decomposition_flops(self) -> float:
        return 0.0 if self.diagonal else len(self.moments) ** 3 / 3  # a Cholesky factor

    def add(self, gradients: Params, texts: int) -> None:
        """Gradients by name, (B, *shape)."""
        flat_BP = torch.cat([gradients[name].flatten(1) for name in self.shapes], dim=1)
        _add_outer(self.moments, flat_BP / texts**0.5)

    def solve(self, direction: Mapping[str, Tensor], damping: float) -> Params:
        missing = {name: self.moments.new_zeros(shape) for name, shape in self.shapes.items() if name not in direction}
        along_P = torch.cat([(missing.get(name) if name in missing else direction[name]).flatten() for name in self.shapes])
        if self.diagonal:
            solved_P = _divided(along_P, self.moments, damping)
        elif (mean := self.moments.diagonal().mean()) > 0:
            damped = self.moments.double() + damping * mean.double() * torch.eye(len(self.moments), device=mean.device, dtype=torch.float64)
            solved_P = torch.cholesky_solve(along_P.double()[:, None], torch.linalg.cholesky(damped))[:, 0].to(along_P)
        else:
            solved_P = torch.zeros_like(along_P)
        parts = zip(self.shapes.items(), solved_P.split(self.sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}


Block = Layer | Gathered


def _add_outer(total: Tensor, rows: Tensor) -> None:
    """Adds rows^T rows, or of that the diagonal where `total` is one."""
    if total.dim() == 1:
        total += rows.square().sum(0)
    else:
        total += rows.T @ rows


def _where(read_BL: Tensor, rows: Tensor) -> Tensor:
    """Rows put back where they were read, zeros elsewhere: (B, L, size)."""
    return rows.new_zeros(*read_BL.shape, rows.shape[1]).index_put_((read_BL,), rows)


def _divided(what: Tensor, eigenvalues: Tensor, damping: float) -> Tensor:
    mean = eigenvalues.mean()
    return what / (eigenvalues + damping * mean) if mean > 0 else torch.zeros_like(what)


# ---------------------------------------------------------------- passes over the texts


def _kinds(model: nn.Module, params: Params, wanted: set[str], probe: Batch) -> tuple[list[Layer], list[Gathered], list[Gathered]]:
    """Which parameter goes into which block; of the blocks those that hold a wanted parameter. Cost: a pass over two texts at most."""
    from transformers.pytorch_utils import Conv1D

    names = {id(parameter): name for name, parameter in model.named_parameters()}  # a tied one has one name
    owners: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(names[id(parameter)], []).append(module)
    candidates = {}
    for module in model.modules():
        own = {attribute: names[id(parameter)] for attribute, parameter in module._parameters.items() if parameter is not None}
        habits = any(getattr(module, habit, None) for habit in ("max_norm", "scale_grad_by_freq"))  # of an Embedding's gradient
        usual = isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) and not habits
        alone = all(name in params and len(owners[name]) == 1 for name in own.values())
        if usual and alone and wanted & set(own.values()):
            candidates[module] = Layer(module, own["weight"], own.get("bias"))
    runs: dict[nn.Module, list[bool]] = {module: [] for module in candidates}  # of each run, whether it was for each token

    def look(module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        runs[module].append(inputs.shape[:2] == output.shape[:2] == probe.input_ids.shape)

    with torch.no_grad(), padding_computed(), _watched(list(candidates), len(probe.input_ids), look):
        per_example_loss(model, params, *probe)
    layers = [layer for module, layer in candidates.items() if runs[module] == [True]]
    taken = {name for layer in layers for name in (layer.weight, layer.bias)}
    dense, others = [], []
    for module in model.modules():
        own = [names[id(parameter)] for parameter in module._parameters.values() if parameter is not None]
        rest = {name: params[name].shape for name in own if name in params and name not in taken}
        taken |= set(rest)
        if not wanted & set(rest):
            continue
        like = params[next(iter(rest))]
        tied = any(len(owners[name]) > 1 for name in rest)
        if not tied and module not in candidates and sum(shape.numel() for shape in rest.values()) <= LARGEST_DENSE:
            dense.append(Gathered(rest, like, diagonal=False))
        else:
            others += [Gathered({name: shape}, like, diagonal=True) for name, shape in rest.items() if name in wanted]
    return layers, dense, others


@contextmanager
def _watched(modules: Sequence[nn.Module], texts: int, look: Callable[[nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, `look` is told each run of these modules: module, input, output. One row of ids for all `texts` (GPT-2's positions) is
    repeated for each, so that each text has derivatives of its own."""

    def spread(module: nn.Module, arguments: tuple) -> tuple:
        ids = arguments[0]
        return (ids.expand(texts, *ids.shape[1:]), *arguments[1:]) if len(ids) == 1 else arguments

    def told(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        look(module, arguments[0], output)

    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_pre_hook(spread).remove)
            stack.callback(module.register_forward_hook(told).remove)
        yield


def _fit_layers(layers: list[Layer], model: nn.Module, params: Params, drawn: list[Batch], reduction: str) -> None:
    """Two passes: factors and their eigenvectors, then the second moments in those."""
    texts, tokens = sum(len(part.input_ids) for part in drawn), 0
    for part in drawn:
        read_BL = _read(part.labels)
        tokens += int(read_BL.sum())
        for layer, inputs, slopes_BLO in _inputs_and_slopes(layers, model, params, part, reduction):
            layer.add_factors(inputs, slopes_BLO, read_BL)
    for layer in layers:
        layer.decompose(max(1, tokens), texts)
    for part in drawn:
        read_BL = _read(part.labels)
        for layer, inputs, slopes_BLO in _inputs_and_slopes(layers, model, params, part, reduction):
            layer.add_eigenvalues(inputs, slopes_BLO, read_BL, texts)


def _read(labels_BL: Tensor) -> Tensor:
    """Where a position has a label after it: at all others a layer's output has no effect on the loss."""
    later_BL = (labels_BL != IGNORED_LABEL).flip(1).cumsum(1).flip(1)
    return F.pad(later_BL[:, 1:], (0, 1)) > 0


def _inputs_and_slopes(
    layers: list[Layer], model: nn.Module, params: Params, part: Batch, reduction: str
) -> Iterator[tuple[Layer, Tensor, Tensor]]:
    """Of each layer its inputs, (B, L, I) or ids (B, L), and the derivatives of sqrt(c_i) s_i in its outputs, (B, L, O). At most 2F."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    leaves = {name: theta.detach().requires_grad_() for name, theta in params.items()}
    modules = [layer.module for layer in layers]
    with torch.enable_grad(), padding_computed(), _watched(modules, len(part.input_ids), lambda module, *what: seen.update({module: what})):
        total = _drawn_losses(model, leaves, part.input_ids, part.labels, reduction).sum()
    places = [seen[layer.module] for layer in layers]
    slopes = torch.autograd.grad(total, [output for _, output in places], materialize_grads=True)
    for layer, (inputs, _), slopes_BLO in zip(layers, places, slopes, strict=True):
        if getattr(layer.module, "padding_idx", None) is not None:  # a row that is never trained
            slopes_BLO = slopes_BLO.where((inputs != layer.module.padding_idx)[..., None], 0.0)
        yield layer, inputs.detach(), slopes_BLO


def _drawn_losses(model: nn.Module, params: Mapping[str, Tensor], input_ids: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """sqrt(c_i) s_i of each text, (B,): sqrt(c_i) is 1 over the root of what the loss divides s_i by."""
    losses_B = per_example_loss(model, params, input_ids, labels, reduction)
    if reduction == "length":
        return losses_B * (labels.shape[1] - 1) ** 0.5
    return losses_B * (labels[:, 1:] != IGNORED_LABEL).sum(1).to(losses_B).sqrt()


def _fit_gathered(blocks: list[Gathered], model: nn.Module, params: Params, drawn: list[Batch], reduction: str) -> None:
    """One pass with each text's own gradient, a few texts at a time. Cost 3F at most."""
    own = {name: params[name] for block in blocks for name in block.shapes}
    rest = {name: theta for name, theta in params.items() if name not in own}
    texts = sum(len(part.input_ids) for part in drawn)

    def gradients(ids_L: Tensor, labels_L: Tensor) -> Params:
        return torch.func.grad(lambda p: _drawn_losses(model, {**rest, **p}, ids_L[None], labels_L[None], reduction)[0])(own)

    width = max(1, NUMBERS_AT_ONCE // sum(theta.numel() for theta in own.values()))
    vectorised: Callable | None = torch.func.vmap(gradients)
    with torch.no_grad():  # torch.func.grad is not affected
        for part in drawn:
            for ids_BL, labels_BL in zip(part.input_ids.split(width), part.labels.split(width), strict=True):
                try:
                    found = vectorised(ids_BL, labels_BL) if vectorised else None
                except RuntimeError:  # an architecture that cannot be vectorised: text by text, slower and the same
                    vectorised = found = None
                if found is None:
                    each = [gradients(*text) for text in zip(ids_BL, labels_BL, strict=True)]
                    found = {name: torch.stack([one[name] for one in each]) for name in own}
                for block in blocks:
                    block.add(found, texts)
