"""The exact effect of leaving one text out of a training run, which a metagradient stands for to first order.

    Delta_i = Phi(phi_T | all weights 1) - Phi(phi_T | w_i = 0, the others 1)

The divisor |B_t| of the text's batch stays, so that w_i is all that changes, and tau_i = dPhi/dw_i is the slope of the same function at
w_i = 1. Nothing is approximated: the steps before the text's own are shared by all texts, the text's own step needs the gradient of that
text alone, because mean gradients are sums, and the later steps are trained again.

Cost unit: F = one forward pass over a batch; a training step is 3F.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpgbench.metagrad.inputs import Batch, check_batches, check_model, check_reduction
from dpgbench.metagrad.loss import initial_parameters, loaded
from dpgbench.metagrad.optimizers import Optimizer, Params
from dpgbench.metagrad.settings import DEFAULTS, EngineSettings
from dpgbench.metagrad.training import Signal, mean_gradients


class LeaveOneOut:
    """One training run, and `effect` of each of its texts. `value` is Phi of the whole run.

    model, batches, signal and optimizer as in `metagradients`; the model is left unchanged and computes in its own precision: give a
    float64 one where effects are small. Cost: 3FT once, and T copies of the parameters, their gradients and the optimizer's moments.
    Raises ValueError on malformed input.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Tensor]],
        signal: Signal,
        optimizer: Optimizer,
        settings: EngineSettings = DEFAULTS,
    ):
        check_model(model)
        check_reduction(settings.reduction)
        self.model, self.signal, self.optimizer, self._how = model, signal, optimizer, settings.for_training()
        params = initial_parameters(model)
        self.steps, weights_N = check_batches(batches, params, None, settings.micro_batch)
        self._one = weights_N[:1]
        state = optimizer.init(params)
        self._before: list[tuple[Params, Any, Params]] = []  # each step's parameters, optimizer state and mean gradient
        for number, batch in enumerate(self.steps):
            gradients = self._gradients(params, batch)
            self._before.append((params, state, gradients))
            params, state = self._update(params, gradients, state, number)
        self.value = self._phi(params)

    def effect(self, index: int) -> float:
        """Delta of the text at `index` in the concatenated batches, in units of Phi; above 0 where the text helps.

        Cost: 3F for each step after the text's own, 3F/|B| and one Phi.
        """
        number = 0
        while index >= len(self.steps[number].labels):
            index -= len(self.steps[number].labels)
            number += 1
        params, state, gradients = self._before[number]
        batch = self.steps[number]
        left_out = Batch(batch.input_ids[index : index + 1], batch.labels[index : index + 1])
        share = mean_gradients(self.model, params, left_out, self._one, count=len(batch.labels), **self._how)
        params, state = self._update(params, {name: whole - share[name] for name, whole in gradients.items()}, state, number)
        for later in range(number + 1, len(self.steps)):
            params, state = self._update(params, self._gradients(params, self.steps[later]), state, later)
        return self.value - self._phi(params)

    def _gradients(self, params: Params, batch: Batch) -> Params:
        return mean_gradients(self.model, params, batch, self._one.expand(len(batch.labels)), **self._how)

    @torch.no_grad()
    def _update(self, params: Params, gradients: Params, state: Any, number: int) -> tuple[Params, Any]:
        return self.optimizer.update(params, gradients, state, number)

    @torch.no_grad()
    def _phi(self, params: Params) -> float:
        with loaded(self.model, params):
            return float(self.signal(self.model))
