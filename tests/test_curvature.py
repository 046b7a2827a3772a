"""EK-FAC: each part against a loop, the whole against the dense Gauss-Newton matrix of a model small enough to have one. All in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_training import LENGTH, VOCAB, assert_unchanged, relative_error, snapshot, tiny_batch, tiny_gpt2, tiny_llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from dpgbench.bench.flops import counted_flops, forward_flops
from dpgbench.metagrad import curvature as ekfac
from dpgbench.metagrad.curvature import Gathered, Layer, curvature, draw_labels, inverse_curvature_product
from dpgbench.metagrad.inputs import Batch
from dpgbench.metagrad.loss import per_example_loss
from dpgbench.metagrad.training import gradient_dots


def small_model(width=8, inner=32):
    """One GPT-2 layer: 1,312 parameters."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=LENGTH, n_embd=width, n_inner=inner, n_layer=1, n_head=2, tie_word_embeddings=False,
        attn_implementation="eager", initializer_range=0.05, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def random_direction(model, names=("",)):
    generator = torch.Generator().manual_seed(4)
    drawn = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for n, p in model.named_parameters()}
    return {n: along for n, along in drawn.items() if any(part in n for part in names)}


def drawn_gradients(model, texts, reduction="length"):
    """By a loop over texts, what `curvature` with `seeded()` sees: sqrt(c_i) grad s_i, by name, (N, *shape)."""
    uniforms = torch.rand(texts["input_ids"].shape, generator=seeded())
    labels = draw_labels(model, Batch(**texts), uniforms)
    parameters = dict(model.named_parameters())
    rows = []
    for ids_L, labels_L in zip(texts["input_ids"], labels, strict=True):
        logits = model(input_ids=ids_L[None], use_cache=False).logits[0, :-1]
        count = LENGTH - 1 if reduction == "length" else max(1, int((labels_L[1:] != -100).sum()))
        loss = F.cross_entropy(logits, labels_L[1:], ignore_index=-100, reduction="sum") / count**0.5
        rows.append(torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True))
    return {name: torch.stack([row[place] for row in rows]) for place, name in enumerate(parameters)}


def rows_of(block, gradients):
    """Texts' gradients in a block's own order, (N, size)."""
    if isinstance(block, Gathered):
        return torch.cat([gradients[name].flatten(1) for name in block.shapes], 1)
    weight = gradients[block.weight].mT if block.transposed else gradients[block.weight]
    return (torch.cat([weight, gradients[block.bias][:, None]], 1) if block.bias else weight).flatten(1)


def eigenvectors(block):
    """Of a layer's block as one matrix, columns in the order of its eigenvalues."""
    source, target = (
        torch.eye(size, dtype=torch.float64) if side.basis is None else side.basis
        for side, size in zip(block.sides, (block.inputs, block.outputs), strict=True)
    )
    return torch.kron(source.contiguous(), target.contiguous())


def dense(block, eigenvalues=None):
    """The matrix that a block stands for; of a layer with other eigenvalues than its own."""
    if isinstance(block, Gathered):
        return block.moments.diag() if block.diagonal else block.moments
    basis = eigenvectors(block)
    return basis * (block.eigenvalues if eigenvalues is None else eigenvalues).flatten() @ basis.T


def mean_eigenvalue(block):
    return dense(block).diagonal().mean()


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize("reduction", ["length", "tokens"])
@pytest.mark.parametrize("make", [small_model, tiny_llama])
def test_eigenvalues_are_second_moments_of_gradients_in_the_eigenbasis(make, reduction):
    """Every parameter is in one block. A layer's Lambda is the diagonal of the drawn gradients' second moments in Q_A x Q_S, the best
    diagonal in the Frobenius norm, so EK-FAC is nearer to those than K-FAC; a LayerNorm's block is those second moments."""
    model, texts = make(), tiny_batch(12, seed=2)
    before = snapshot(model)
    blocks = curvature(model, **texts, generator=seeded(), reduction=reduction)
    assert_unchanged(model, before)
    gradients = drawn_gradients(model, texts, reduction)
    held = [name for b in blocks for name in (b.shapes if isinstance(b, Gathered) else filter(None, (b.weight, b.bias)))]
    assert sorted(held) == sorted(gradients) and sum(isinstance(b, Layer) for b in blocks) == (7 if make is small_model else 16)
    for block in blocks:
        rows, tolerance = rows_of(block, gradients), 1e-10 if make is small_model else 1e-5  # Llama's norms compute in float32
        moments = rows.T @ rows / len(rows)
        if isinstance(block, Gathered):
            assert not block.diagonal and relative_error(block.moments, moments) < tolerance
            continue
        basis = eigenvectors(block)
        assert relative_error(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64)) < 1e-12
        assert relative_error(block.eigenvalues.flatten(), (basis.T @ moments @ basis).diagonal()) < tolerance
        source, target = (side.values for side in block.sides)
        corrected, kronecker = dense(block), dense(block, torch.outer(source, target))
        assert (corrected - moments).norm() < (kronecker - moments).norm()


def test_factors_by_a_loop():
    """A and S of the first layer's Conv1D, from its inputs and the derivatives in its outputs, position by position."""
    model, texts = tiny_gpt2(), tiny_batch(6, seed=2)
    layer = model.transformer.h[0].attn.c_attn
    (block,) = curvature(model, **texts, generator=seeded(), names=["transformer.h.0.attn.c_attn.bias"])
    labels = draw_labels(model, Batch(**texts), torch.rand(texts["input_ids"].shape, generator=seeded()))
    source, target, tokens = torch.zeros(17, 17).double(), torch.zeros(48, 48).double(), 0
    for ids_L, labels_L in zip(texts["input_ids"], labels, strict=True):
        kept = {}
        hook = layer.register_forward_hook(lambda module, inputs, output, kept=kept: kept.update(a=inputs[0], out=output))
        logits = model(input_ids=ids_L[None], use_cache=False).logits[0, :-1]
        hook.remove()
        loss = F.cross_entropy(logits, labels_L[1:], ignore_index=-100, reduction="sum") / (LENGTH - 1) ** 0.5
        (slopes,) = torch.autograd.grad(loss, kept["out"])
        for place in range(int((labels_L != -100).sum())):  # from a text's start to the token before its last: those have a label after
            a = torch.cat([kept["a"][0, place], torch.ones(1)]).detach()
            source, target, tokens = source + torch.outer(a, a), target + torch.outer(slopes[0, place], slopes[0, place]), tokens + 1
    side_a, side_s = block.sides
    assert relative_error(side_a.basis * side_a.values @ side_a.basis.T, source / tokens) < 1e-10
    assert relative_error(side_s.basis * side_s.values @ side_s.basis.T, target / 6) < 1e-10


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_micro_batches_change_nothing_beyond_rounding(make):
    model, texts = make(), tiny_batch(10, seed=2)
    direction = random_direction(model)
    whole, _ = inverse_curvature_product(model, **texts, direction=direction, generator=seeded())
    parts, _ = inverse_curvature_product(model, **texts, direction=direction, generator=seeded(), micro_batch=3)
    tolerance = 1e-9 if make is tiny_gpt2 else 1e-5  # Llama's norms compute in float32
    assert set(whole) == set(direction) and all(relative_error(parts[name], whole[name]) < tolerance for name in whole)


def test_a_conv1d_is_a_linear_layer():
    """The same model with its Conv1D layers replaced by Linear ones of the transposed weights has the transposed product."""
    model, other, texts = tiny_gpt2(), tiny_gpt2(), tiny_batch(10, seed=2)
    for name, module in list(other.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.weight.shape[0], module.weight.shape[1]).double()
            linear.weight.data, linear.bias.data = module.weight.data.T.clone(), module.bias.data.clone()
            parent, _, attribute = name.rpartition(".")
            setattr(other.get_submodule(parent), attribute, linear)
    direction = random_direction(model)
    transposed = [name for name, p in model.named_parameters() if p.shape != dict(other.named_parameters())[name].shape]
    square = [name for name in direction if name.endswith("attn.c_proj.weight")]
    there = {name: along.T if name in {*transposed, *square} else along for name, along in direction.items()}
    usual, _ = inverse_curvature_product(model, **texts, direction=direction, generator=seeded())
    linear, _ = inverse_curvature_product(other, **texts, direction=there, generator=seeded())
    assert len(transposed) == 6 and len(square) == 2
    for name, product in usual.items():
        assert relative_error(linear[name], product.T if name in {*transposed, *square} else product) < 1e-9


def test_labels_are_drawn_from_the_model():
    """Frequencies of 5,000 draws at each position, within five standard errors; where there is no label none is drawn."""
    model, texts = tiny_gpt2(), tiny_batch(2, seed=2)
    texts["labels"][0, 4:] = -100
    many = Batch(*(texts[name].repeat(5_000, 1) for name in ("input_ids", "labels")))
    drawn = draw_labels(model, many, torch.rand(many.labels.shape, generator=seeded())).view(5_000, 2, LENGTH)
    assert bool((drawn[:, 0, 4:] == -100).all() and (drawn[:, :, 0] == -100).all())
    p = model(input_ids=texts["input_ids"]).logits.softmax(-1)
    for row, place in ((0, 1), (0, 3), (1, 1)):
        found = torch.bincount(drawn[:, row, place], minlength=VOCAB) / 5_000
        expected = p[row, place - 1].detach()
        assert bool(((found - expected).abs() <= 5 * (expected * (1 - expected) / 5_000).sqrt()).all())


# ---------------------------------------------------------------- the whole


def root_of_gauss_newton(model, texts):
    """R, (rows, P), of G = R^T R = (1/N) sum_i 1/(L-1) sum_t J_t^T (diag p_t - p_t p_t^T) J_t, J_t the Jacobian of the logits at t: no
    labels, nothing drawn. The middle factor is sum_v p_v (e_v - p)(e_v - p)^T, so R's rows are sqrt(p_v) (J_v - p^T J)."""
    params, rows = {name: p.detach() for name, p in model.named_parameters()}, []
    for ids_L, labels_L in zip(texts["input_ids"], texts["labels"], strict=True):

        def logits(params, ids_L=ids_L):
            return torch.func.functional_call(model, params, (), {"input_ids": ids_L[None], "use_cache": False}).logits[0, :-1]

        jacobian = torch.cat([part.flatten(2) for part in torch.func.jacrev(logits)(params).values()], 2)
        for place in (labels_L[1:] != -100).nonzero()[:, 0].tolist():
            p, J = logits(params)[place].softmax(-1), jacobian[place]
            rows.append(p.sqrt()[:, None] * (J - p @ J))
    return torch.cat(rows) / (LENGTH - 1) ** 0.5 / len(texts["input_ids"]) ** 0.5


def conjugate_gradients(matrix, right, precondition, tolerance, most=1000):
    """The solution for a function that multiplies, and the residual's share of the right side after each product: until it is below
    `tolerance`, or `most` of them."""
    x, residual = torch.zeros_like(right), right.clone()
    z = precondition(residual)
    along, inner, shares = z.clone(), residual @ z, []
    while len(shares) < most and (not shares or shares[-1] >= tolerance):
        product = matrix(along)
        step = inner / (along @ product)
        x, residual = x + step * along, residual - step * product
        shares.append(float(residual.norm() / right.norm()))
        z = precondition(residual)
        before, inner = inner, residual @ z
        along = z + inner / before * along
    return x, shares


@pytest.mark.slow
def test_it_preconditions_the_dense_gauss_newton_matrix():
    """3,144 parameters. Conjugate gradients on the exact damped matrix reach the dense solution with the product as preconditioner. What
    EK-FAC approximates are that matrix's blocks: without the blocks' couplings it takes fewer than a quarter of the plain method's steps to
    1e-4, with them fewer too; and the product is nearer to the blocks' solution than the blocks' common scales are."""
    model, texts = small_model(12, 72), tiny_batch(8, seed=3)
    params = dict(model.named_parameters())
    sizes, shapes = [p.numel() for p in params.values()], [p.shape for p in params.values()]
    assert sum(sizes) == 3144
    many = {name: tensor.repeat(80, 1) for name, tensor in texts.items()}  # eighty draws of the labels of each text
    blocks = curvature(model, **many, generator=seeded())

    def flat(named):
        return torch.cat([named[name].detach().flatten() for name in params])

    def per_block(values):
        own = [(b.shapes if isinstance(b, Gathered) else filter(None, (b.weight, b.bias)), v) for b, v in zip(blocks, values, strict=True)]
        return flat({name: torch.full_like(params[name], float(value)) for names, value in own for name in names})

    def precondition(right):
        named = {name: part.view(shape) for name, part, shape in zip(params, right.split(sizes), shapes, strict=True)}
        return flat({name: part for block in blocks for name, part in block.solve(named, 0.1).items()})

    damping, number = per_block([0.1 * mean_eigenvalue(block) for block in blocks]), per_block(range(len(blocks)))
    root, right = root_of_gauss_newton(model, texts), flat(random_direction(model))
    whole = root.T @ root
    blocks_alone = whole * (number[:, None] == number)
    products = {1: lambda x: root.T @ (root @ x), 4: lambda x: blocks_alone @ x}
    for matrix, fewer in ((whole, 1), (blocks_alone, 4)):

        def damped(x, fewer=fewer):
            return products[fewer](x) + damping * x

        exact = torch.cholesky_solve(right[:, None], torch.linalg.cholesky(matrix + damping.diag()))[:, 0]
        found, shares = conjugate_gradients(damped, right, precondition, 1e-8)
        assert relative_error(found, exact) < 1e-8
        steps = sum(share >= 1e-4 for share in shares) + 1
        _, without = conjugate_gradients(damped, right, lambda residual: residual, 1e-4, most=fewer * steps)
        assert without[-1] >= 1e-4
    near = F.cosine_similarity
    product = precondition(right)
    assert 0.9 < near(product, exact, dim=0) > near(right / damping, exact, dim=0)


class OneLayer(nn.Module):
    """Logits are one linear function of the same three numbers, whatever the token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, VOCAB).double()

    def forward(self, input_ids, use_cache=False):
        seen = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64).expand(*input_ids.shape, 3)
        return type("Output", (), {"logits": self.layer(seen)})


def test_one_layer_with_a_constant_input_is_exact():
    """There the Fisher matrix is a Kronecker product: K-FAC, EK-FAC and the drawn gradients' second moments over tokens are equal, and with
    one label a text so is the inverse. Over 200,000 labels the matrix is the Gauss-Newton matrix within sampling error."""
    model = OneLayer()
    ids = torch.zeros(500, 2, dtype=torch.long)
    (block,) = curvature(model, ids, ids, generator=seeded())
    a = torch.tensor([0.5, -1.0, 2.0, 1.0], dtype=torch.float64)
    drawn = draw_labels(model, Batch(ids, ids), torch.rand(ids.shape, generator=seeded()))[:, 1]
    p = model(ids[:1]).logits[0, 0].softmax(-1).detach()
    slopes = p - F.one_hot(drawn, VOCAB)
    exact = torch.kron(torch.outer(a, a), slopes.T @ slopes / 500)
    assert relative_error(dense(block), exact) < 1e-10
    assert relative_error(torch.outer(*(side.values for side in block.sides)), block.eigenvalues) < 1e-10
    direction = random_direction(model)
    flat = torch.cat([direction["layer.weight"].T, direction["layer.bias"][None]]).flatten()
    solved = torch.linalg.solve(exact + 0.3 * exact.diagonal().mean() * torch.eye(len(exact)), flat).view(4, VOCAB)
    product, _ = inverse_curvature_product(model, ids, ids, direction, seeded(), damping=0.3)
    assert relative_error(product["layer.weight"], solved[:-1].T) < 1e-7 and relative_error(product["layer.bias"], solved[-1]) < 1e-7
    many = torch.zeros(200_000, 2, dtype=torch.long)
    (block,) = curvature(model, many, many, generator=seeded())
    newton = torch.kron(torch.outer(a, a), p.diag() - torch.outer(p, p))
    assert relative_error(dense(block), newton) < 0.02


def test_with_much_damping_it_ranks_texts_as_dot_does():
    """lambda -> infinity: <grad l_i, v> becomes the dot product over damping and mean eigenvalue, exactly dot's order where the direction
    is in one block, and the sum over blocks of such where it is in several."""
    model, texts = small_model(), tiny_batch(8, seed=2)
    head = random_direction(model, ["lm_head"])
    for direction, names in ((head, ["lm_head"]), (random_direction(model), [""])):
        product, _ = inverse_curvature_product(model, **texts, direction=direction, generator=seeded(), damping=1e8)
        blocks = curvature(model, **texts, generator=seeded(), names=list(direction))
        expected = torch.zeros(8, dtype=torch.float64)
        for block in blocks:
            own = block.shapes if isinstance(block, Gathered) else [name for name in (block.weight, block.bias) if name]
            part = gradient_dots(model, **texts, direction={name: direction[name] for name in own})
            expected += part / (1e8 * mean_eigenvalue(block))
        values = gradient_dots(model, **texts, direction=product)
        assert relative_error(values, expected) < 1e-5
        if names == ["lm_head"]:
            assert len(blocks) == 1 and torch.equal(values.argsort(), gradient_dots(model, **texts, direction=head).argsort())


# ---------------------------------------------------------------- what is unusual, and what it costs


def test_a_tied_head_and_wide_axes_fall_back(monkeypatch):
    """A tied head is in no Kronecker block but in the diagonal; an axis too long keeps its coordinates; both by the loop above."""
    model, texts = tiny_gpt2(tied=True), tiny_batch(12, seed=2)
    monkeypatch.setattr(ekfac, "LARGEST_FACTOR", 20)
    monkeypatch.setattr(ekfac, "LARGEST_DENSE", 20)
    blocks = curvature(model, **texts, generator=seeded())
    gradients = drawn_gradients(model, texts)
    (tied,) = [b for b in blocks if isinstance(b, Gathered) and "transformer.wte.weight" in b.shapes]
    assert relative_error(tied.moments, gradients["transformer.wte.weight"].flatten(1).square().mean(0)) < 1e-10
    (norm,) = [b for b in blocks if isinstance(b, Gathered) and "transformer.ln_f.weight" in b.shapes]
    assert norm.diagonal
    (wide,) = [b for b in blocks if isinstance(b, Layer) and b.weight == "transformer.h.0.mlp.c_fc.weight"]
    assert wide.sides[1].basis is None and wide.sides[0].basis is not None
    rows = rows_of(wide, gradients)
    basis = eigenvectors(wide)
    assert relative_error(wide.eigenvalues.flatten(), (basis.T @ (rows.T @ rows / 12) @ basis).diagonal()) < 1e-10
    assert relative_error(wide.sides[1].values, torch.tensor([1.0])) > 0  # a diagonal, in its own coordinates


def test_a_padding_row_is_not_trained():
    """An Embedding whose padding_idx occurs in the texts: its row has no second moments, and the others those of the loop."""
    model, texts = tiny_llama(), tiny_batch(8, seed=2, padded=False)
    model.model.embed_tokens.padding_idx = 3
    assert bool((texts["input_ids"][:, :-1] == 3).any())
    (block,) = curvature(model, **texts, generator=seeded(), names=["model.embed_tokens.weight"])
    rows = rows_of(block, drawn_gradients(model, texts))
    basis = eigenvectors(block)
    assert bool((block.eigenvalues[3] == 0).all()) and bool((block.eigenvalues[4] > 0).any())
    assert relative_error(block.eigenvalues.flatten(), (basis.T @ (rows.T @ rows / 8) @ basis).diagonal()) < 1e-5


def test_only_the_blocks_that_the_direction_reaches():
    """A LayerNorm's weight alone brings its bias along; what no text moves gets zero; nothing else is named."""
    model, texts = tiny_gpt2(), tiny_batch(5, seed=2)
    direction = random_direction(model, ["ln_f.weight"])
    product, _ = inverse_curvature_product(model, **texts, direction=direction, generator=seeded())
    assert set(product) == {"transformer.ln_f.weight", "transformer.ln_f.bias"} and product["transformer.ln_f.bias"].abs().max() > 0
    texts["labels"][:] = -100
    product, _ = inverse_curvature_product(model, **texts, direction=random_direction(model), generator=seeded())
    assert all(bool((along == 0).all()) for along in product.values())
    with pytest.raises(ValueError, match="damping=0: damping must be positive and finite"):
        inverse_curvature_product(model, **texts, direction=direction, generator=seeded(), damping=0)


def test_gradients_text_by_text_are_the_same(monkeypatch):
    """An architecture that vmap refuses gets the same LayerNorm blocks."""
    model, texts = tiny_gpt2(), tiny_batch(5, seed=2)
    usual = curvature(model, **texts, generator=seeded(), names=["transformer.ln_f.weight"])

    def refuse(function):
        def run(*arguments):
            raise RuntimeError("vmap: no")

        return run

    monkeypatch.setattr(torch.func, "vmap", refuse)
    (again,) = curvature(model, **texts, generator=seeded(), names=["transformer.ln_f.weight"])
    assert relative_error(again.moments, usual[0].moments) < 1e-10


def test_what_it_costs_is_what_the_formula_says():
    """Matrix products as torch counts them, for one layer and for all; without padding, so that every position but the last is read."""
    model, texts = tiny_gpt2(), tiny_batch(6, seed=2, padded=False)
    forward, read, everywhere = forward_flops(model, 6, LENGTH), 6 * (LENGTH - 1), 6 * LENGTH
    _, counted = counted_flops(lambda: curvature(model, **texts, generator=seeded(), names=["lm_head.weight"]))
    own = 4 * read * (16**2 + VOCAB**2) + 2 * everywhere * 16 * VOCAB
    assert counted == pytest.approx(forward + 2 * forward + own + forward_flops(model, 2, LENGTH), rel=1e-6)
    blocks, counted = counted_flops(lambda: curvature(model, **texts, generator=seeded()))
    layers = [block for block in blocks if isinstance(block, Layer)]
    own = 0.0
    for layer in layers:
        i, o = 0 if layer.one_hot else layer.inputs, layer.outputs
        own += 4 * read * (i**2 + o**2) + 2 * everywhere * i * o
    dense_blocks = sum(2 * 6 * len(block.moments) ** 2 for block in blocks if isinstance(block, Gathered))
    passes = counted - own - dense_blocks - forward_flops(model, 2, LENGTH)
    assert 7 * forward < passes <= 8.05 * forward
    assert sum(block.decomposition_flops for block in layers) == 9 * sum(
        (0 if layer.one_hot else layer.inputs**3) + layer.outputs**3 for layer in layers
    )


def test_the_drawn_losses_are_the_loss_of_per_example_loss():
    """The scale that makes the second moments the curvature of the mean loss: sqrt(c_i) s_i = l_i / sqrt(c_i)."""
    model, texts = tiny_gpt2(), tiny_batch(4, seed=2)
    params = dict(model.named_parameters())
    counts = (texts["labels"][:, 1:] != -100).sum(1)
    for reduction, scale in (("length", (LENGTH - 1) ** 0.5), ("tokens", counts.double().sqrt())):
        found = ekfac._drawn_losses(model, params, **texts, reduction=reduction)
        assert relative_error(found, per_example_loss(model, params, **texts, reduction=reduction) * scale) < 1e-12
