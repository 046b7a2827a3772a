"""The differentiable training step, where users import it from: see `dpgbench.metagrad.training`."""

from dpgbench.metagrad.training import (
    SGD,
    AdamW,
    first_step_dots,
    gradient_dots,
    loaded,
    mean_gradients,
    one_step_values,
    per_example_loss,
    train,
)

__all__ = ["SGD", "AdamW", "first_step_dots", "gradient_dots", "loaded", "mean_gradients", "one_step_values", "per_example_loss", "train"]
