"""Exact metagradients: the derivative of a metric through a whole training run.

differentiate  the public functions; training: the differentiable step, and plain training with it
optimizers     SGD and AdamW with their vector-Jacobian products
loss           the per-example loss as a function of a dictionary of parameters
inputs         what a caller may get wrong, and the sentence that says so
derivatives    exact ways to pull a cotangent back through the gradient of a step; duals, fused, layer_norm: their parts
settings       how a run is computed, in one value
memory         the budget: how many bytes a tape holds, where states are kept
data_parallel  the same over several processes
curvature      the inverse curvature of the loss times a direction, for influence functions
leave_one_out  what leaving a text out really does, by training without it
diagnostics    can these metagradients be trusted here? measurements, and a verdict in words
"""

from dpgbench.metagrad.differentiate import Metagradients, ascend, metagradients, signal_gradients

__all__ = ["Metagradients", "ascend", "metagradients", "signal_gradients"]
