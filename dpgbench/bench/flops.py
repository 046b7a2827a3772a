"""FLOP formulas of a causal LM (forward pass, training, sampling), and `counted_flops`, which lets torch count.

FLOPs are counted from shapes, so they are deterministic. With N the weights of all matrix products (the LM head included, embedding
look-ups not), H layers of width D and a batch of B sequences of length L, one forward pass costs

    F(B, L) = 2 N B L + 4 H B L^2 D          (products with weights; attention scores and their product with the values)

and training on the batch 3 F. Padding is computed, so it is counted. The same convention as `torch.utils.flop_counter`, which the
tests hold these formulas against.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from dpgbench.core.limits import LARGEST_FACTOR

if TYPE_CHECKING:
    from torch import nn

Result = TypeVar("Result")


@dataclass(frozen=True)
class Shape:
    """A causal LM's sizes, which is all that the formulas need."""

    matmul_weights: int
    """N: the number of weights that multiply activations, once per module (a tied head counts, an embedding look-up does not)."""
    attention_flops_per_pair: int
    """4 H D: what one (query, key) pair costs over all layers."""
    head: int
    """Weights of the LM head."""
    parameters: int = 0
    """All there are, a tied head once; for memory."""
    untied: int = 0
    """The same with a head of its own."""
    vocabulary: int = 0
    cache_per_token: int = 0
    """Keys and values kept for one token, over all layers."""
    adapters: int = 0
    """Of N, the weights of low-rank adapters, which are then all that is trained; 0: everything is."""
    untouched: int = 0
    """With adapters, weights that multiply what no adapter has touched yet, as the first layer's: no gradient flows back through them."""
    layers: int = 0
    width: int = 0
    score_maps: int = 0
    """Layers times heads: attention scores kept for one pair of tokens, with eager attention."""

    def activations(self, batch: int, length: int, *, checkpointed: bool = False) -> float:
        """Values kept for a backward pass through all layers: about 17 a token and unit, and scores before and after their softmax.

        A rough count (Korthikanti et al., arXiv 2205.05198, without dropout). Checkpointed: a layer's input each, and one layer.
        """
        layer = batch * length * (17.0 * self.width + 2.0 * self.score_maps / max(1, self.layers) * length)
        return layer + batch * length * self.layers * self.width if checkpointed else layer * self.layers

    def forward_flops(self, batch: int, length: int) -> float:
        """F(B, L) of the module docstring."""
        return 2.0 * self.matmul_weights * batch * length + float(self.attention_flops_per_pair) * batch * length**2

    def training_flops(self, batch: int, length: int) -> float:
        """Forward and backward, 3F: every product has one with its input's gradient and one with its weights'.

        A frozen weight has no gradient of its own, so with a weights of adapters in N, u of N untouched and attention's products, which
        have no weights, as before, the N part of 3F is 2 (N + (N - u) + a) B L.
        """
        if not self.adapters:
            return 3 * self.forward_flops(batch, length)
        products = 2.0 * (2 * self.matmul_weights - self.untouched + self.adapters) * batch * length
        return products + 3.0 * self.attention_flops_per_pair * batch * length**2

    def curvature_flops(self, texts: int, length: int) -> float:
        """EK-FAC of all modules on so many texts (`metagrad.curvature`), at most.

        8F for its passes; and of a matrix with I inputs and O outputs 4(I^2 + O^2) + 2IO a token and 9(I^3 + O^3) once. A matrix inside
        a layer counts as (D, 4D), the longest of GPT-2's and Llama's: 19 a weight and token, 146 D a weight once. The head is (D, V), and
        its longer side is free where it is more than LARGEST_FACTOR; embeddings have a factor of D on one side.
        """
        width, vocabulary, tokens = self.width, self.vocabulary, texts * length
        sides = [width, width, width, *([vocabulary] if vocabulary <= LARGEST_FACTOR else [])]
        inner = self.matmul_weights - self.head
        products = 19.0 * inner + sum(4.0 * side**2 for side in sides) + 2.0 * self.head
        return 8 * self.forward_flops(texts, length) + products * tokens + 146.0 * width * inner + sum(9.0 * side**3 for side in sides)

    def scoring_flops(self, batch: int, prompt_length: int, new_tokens: int) -> float:
        """The probabilities of completions: F, but for the head at the prompt's positions, its last one excepted."""
        return self.forward_flops(batch, prompt_length + new_tokens) - 2.0 * self.head * batch * (prompt_length - 1)

    def update_flops(self, batch: int, prompt_length: int, new_tokens: int) -> float:
        """A policy update: prompts and completions, but for the head at the prompt's positions, its last one excepted."""
        head = 2.0 * self.head * batch * (prompt_length - 1)  # never has an adapter
        return self.training_flops(batch, prompt_length + new_tokens) - (2 if self.adapters else 3) * head

    def step_update_flops(self, policy: Mapping[str, Any], batch: int, prompt_length: int, new_tokens: int) -> float:
        """All updates of a policy step: one pass over the completions, and what TRL reads beside it.

        It scores them once more where they are not, or not all, the updated model's own: vLLM's probabilities differ from the model's, and
        from a step's second mini-batch on the model has moved.
        """
        update = self.update_flops(batch, prompt_length, new_tokens)
        scored = policy.get("rollout") == "vllm" or (policy.get("minibatch") or batch) < batch
        return update + self.scoring_flops(batch, prompt_length, new_tokens) if scored else update

    def sampling_flops(self, batch: int, prompt_length: int, new_tokens: int) -> float:
        """Sampling with a key-value cache: the prompt once (logits of its last position only), then a token at a time."""
        if new_tokens == 0:
            return 0.0
        prompt = self.forward_flops(batch, prompt_length) - 2.0 * self.head * batch * (prompt_length - 1)
        steps = new_tokens - 1  # the last token is sampled but never read
        contexts = steps * prompt_length + steps * (steps + 1) / 2
        return prompt + 2.0 * self.matmul_weights * batch * steps + float(self.attention_flops_per_pair) * batch * contexts


def shape_of(model: nn.Module, *, trains: bool = False) -> Shape:
    """What a loaded model's charges are computed from; with `trains` those of training too, which takes a model with adapters a token."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    config = model.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    products = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    adapters = untouched = 0
    if trains and not all(weight.requires_grad for weight in model.parameters()):
        adapters = sum(module.weight.numel() for module in products if module.weight.requires_grad)
        untouched = _untouched(model, products)
    weights, head = sum(module.weight.numel() for module in products), model.get_output_embeddings().weight.numel()
    return Shape(weights, 4 * config.num_hidden_layers * width, head, adapters=adapters, untouched=untouched)


def _untouched(model: nn.Module, products: list[nn.Module]) -> int:
    """Weights whose input needs no gradient, found by letting one token through."""
    import torch

    sizes: list[int] = []

    def look(module: nn.Module, inputs: tuple) -> None:
        if not inputs[0].requires_grad:
            sizes.append(module.weight.numel())

    hooks, was_training = [module.register_forward_pre_hook(look) for module in products], model.training
    try:
        with torch.enable_grad():
            model.eval()(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return sum(sizes)


def forward_flops(model: nn.Module, batch: int, length: int) -> float:
    """F(B, L) of the module docstring."""
    return shape_of(model).forward_flops(batch, length)


def sampling_flops(model: nn.Module, batch: int, prompt_length: int, new_tokens: int) -> float:
    """Of `new_tokens` for each of `batch` prompts; see `Shape.sampling_flops`."""
    return shape_of(model).sampling_flops(batch, prompt_length, new_tokens)


# ---- a critic of single tokens (`token_credit.Baseline`)

CODE = 64
"""The most numbers that a critic knows a token by."""


def critic_code(width: int) -> int:
    """How many it knows one by, where the generator's embeddings are `width` wide."""
    return min(CODE, width)


def critic_features(places: int, code: int) -> int:
    """D: a one-hot of so many places, three codes, and one number."""
    return places + 3 * code + 1


def critic_flops(tokens: int, features: int) -> float:
    """Of one step on R tokens with D features: products 2 R D^2, targets and predictions 2 R D each, and two solves of 2/3 D^3."""
    return 2.0 * tokens * features**2 + 4.0 * tokens * features + 2 * (2 / 3) * features**3


def counted_flops(function: Callable[[], Result]) -> tuple[Result, float]:
    """What `function` returns, and its FLOPs by torch's own counter; for code whose products only it knows, such as a user's signal.

    Padding is computed, and so counted. Of work that the engine names as alike one piece is counted, and the others are taken to cost the
    same. Counting changes no number that `function` computes beyond rounding.
    """
    from dpgbench.metagrad.alike import told
    from dpgbench.metagrad.loss import padding_computed

    counter = _Counter()
    with padding_computed(), counter, told(counter.alike):
        result = function()
    return result, float(counter.flops)


class _Counter:
    """torch's counter, stopped where what is computed has a known cost: it goes through Python at every operation."""

    def __init__(self):
        self._counter, self._so_far, self._known = None, 0, {}

    def __enter__(self) -> None:
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        aten = torch.ops.aten  # products that add to their result in place, which the counter does not know
        in_place = {
            aten.addmm_: lambda total, left, right, *_, **__: 2 * left[0] * left[1] * right[1],
            aten.baddbmm_: lambda total, left, right, *_, **__: 2 * left[0] * left[1] * left[2] * right[2],
        }
        self._counter = FlopCounterMode(display=False, custom_mapping=in_place).__enter__()

    def __exit__(self, *error: object) -> None:
        self._counter.__exit__(*error)
        self._so_far += self._counter.get_total_flops()
        self._counter = None

    @property
    def flops(self) -> int:
        """Counted up to now."""
        return self._so_far + (self._counter.get_total_flops() if self._counter else 0)

    def alike(self, kind: Hashable, work: Callable[[], Result]) -> Result:
        """What `work` returns; counted if nothing of its kind was. Work that raises counts as far as it went and is no measure."""
        from dpgbench.metagrad.alike import told

        if kind not in self._known:
            before = self.flops
            result = work()
            self._known[kind] = self.flops - before
            return result
        self.__exit__(None, None, None)
        try:
            with told(None):
                result = work()
        finally:
            self.__enter__()
        self._so_far += self._known[kind]
        return result
