"""The optimizers of the learning algorithm, each with its own vector-Jacobian product (VJP) in closed form.

All methods are pure functions of dictionaries of tensors, so that a step can be run, replayed, vectorised or differentiated.
Sources: optax for `eps_root`; DPG = arXiv 2604.08423 for the defaults; metasmoothness = arXiv 2503.13751.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dpgbench.metagrad.fused import blocked

Params = dict[str, Tensor]
Cotangents = Mapping[str, "Tensor | None"]  # derivative of the metric to each tensor; None or absent = structurally zero


def check_number(name: str, value: float, holds: bool, rule: str, fix: str) -> None:
    if not holds or isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: {name} must be {rule}; {fix}")


def _check_common(lr: float, weight_decay: float) -> None:
    check_number("lr", lr, math.isfinite(lr) and lr > 0, "positive and finite", "pass e.g. lr=1e-3")
    check_number("weight_decay", weight_decay, math.isfinite(weight_decay) and weight_decay >= 0, "finite and >= 0", "pass 0 for no decay")


class Optimizer(Protocol):
    """A differentiable update rule. `step` counts from 0. All methods are pure: no argument is modified.

    What becomes of a parameter hangs on its own gradient and state alone, so that those nobody looks at can be left out.
    """

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
            check_number(f"betas[{index}]", beta, 0 <= beta < 1, "in [0, 1)", "pass e.g. betas=(0.9, 0.95)")
        check_number("eps", self.eps, math.isfinite(self.eps) and self.eps >= 0, "finite and >= 0", "pass e.g. eps=1e-8")
        check_number(
            "eps_root", self.eps_root, math.isfinite(self.eps_root) and self.eps_root >= 0, "finite and >= 0", "pass e.g. eps_root=1e-9"
        )
        object.__setattr__(self, "betas", tuple(self.betas))  # a list out of a YAML file must stay hashable

    def _corrections(self, step: int) -> tuple[float, float]:
        # Python floats: a float32 tensor would lose digits of 1 - beta ** t, and metagradients are compared in float64.
        return 1 - self.betas[0] ** (step + 1), 1 - self.betas[1] ** (step + 1)

    def init(self, params: Params) -> Moments:
        return Moments({n: torch.zeros_like(p) for n, p in params.items()}, {n: torch.zeros_like(p) for n, p in params.items()})

    def update(self, params: Params, gradients: Params, state: Moments, step: int) -> tuple[Params, Moments]:
        (b1, b2), (c1, c2) = self.betas, self._corrections(step)

        def formula(theta: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g * g
            denominator = (v / c2 + self.eps_root).sqrt() + self.eps
            return theta * (1 - self.lr * self.weight_decay) - (self.lr / c1) * m / denominator, m, v

        new_params, first, second = {}, {}, {}
        for name, theta in params.items():
            results = blocked(formula, theta, gradients[name], state.first[name], state.second[name])
            new_params[name], first[name], second[name] = results
        return new_params, Moments(first, second)

    def vjp(
        self, gradients: Params, new_state: Moments, step: int, to_params: Cotangents, to_state: Moments | None
    ) -> tuple[Cotangents, Cotangents, Moments]:
        (b1, b2), (c1, c2) = self.betas, self._corrections(step)

        def through_theta(to_theta: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            root = (v / c2 + self.eps_root).sqrt()
            denominator = root + self.eps
            to_m_hat = -self.lr * to_theta / denominator
            m_over_root = m / root
            if self.eps_root == 0:  # an unused token's row: 0 / 0, where the limit along real gradients is zero
                m_over_root = torch.where(root > 0, m_over_root, 0.0)
            to_v = to_m_hat * m_over_root / denominator * (-0.5 / (c1 * c2))
            return to_theta * (1 - self.lr * self.weight_decay), to_m_hat / c1, to_v

        def through_moments(g: Tensor, to_m: Tensor, to_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return (1 - b1) * to_m + (2 * (1 - b2)) * g * to_v, b1 * to_m, b2 * to_v

        to_first, to_second = to_state or ({}, {})
        to_gradients, to_old_params, to_old_first, to_old_second = {}, {}, {}, {}
        for name, g in gradients.items():
            to_theta, to_m, to_v = to_params.get(name), to_first.get(name), to_second.get(name)
            if to_theta is not None:
                parts = blocked(through_theta, to_theta, new_state.first[name], new_state.second[name])
                to_old_params[name] = parts[0]
                to_m, to_v = add_cotangents(parts[1], to_m), add_cotangents(parts[2], to_v)
            if to_m is not None and to_v is not None:
                to_gradients[name], to_old_first[name], to_old_second[name] = blocked(through_moments, g, to_m, to_v)
            else:
                from_m = None if to_m is None else (1 - b1) * to_m
                from_v = None if to_v is None else (2 * (1 - b2)) * g * to_v
                to_gradients[name] = add_cotangents(from_m, from_v)
                to_old_first[name] = None if to_m is None else b1 * to_m
                to_old_second[name] = None if to_v is None else b2 * to_v
        return to_gradients, to_old_params, Moments(to_old_first, to_old_second)


def add_cotangents(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Addition of cotangents, None being zero."""
    if left is None or right is None:
        return right if left is None else left
    return left + right
