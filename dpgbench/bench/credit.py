"""The options `credit`, `baseline` and `discount` of a method that can pay single tokens (`token_credit` says how). Imports no torch.

`credit=text` pays every token of a completion the completion's reward, `credit=token` its own share of it and those after it, less
`baseline`; a share k tokens further on counts for `discount` to the power k. A method that offers it lists all
three in its `defaults`, at "text", "group" and 1.0, so that cells from before have the hash they had.
"""

from __future__ import annotations

from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import UserError, did_you_mean
from dpgbench.core.options import Options

CREDITS = ("text", "token")
BASELINES = ("group", "position", "critic")


def check_options(options: Options) -> None:
    """Raises UserError for a value that is not known, and for what concerns single tokens where whole texts are paid."""
    for name, known in (("credit", CREDITS), ("baseline", BASELINES)):
        if options[name] not in known:
            raise UserError(f"method.{name}={options[name]}: no such {name}; {did_you_mean(options[name], known)}")
    if options.credit == "text" and options.baseline != "group":
        raise UserError(f"method.baseline={options.baseline}: a baseline of single tokens; write method.credit=token with it")
    if not 0 <= options.discount <= 1:
        raise UserError(f"method.discount={options.discount}: a share of what comes later, 0 to 1; write method.discount=1.0 for all of it")
    if options.credit == "text" and options.discount != 1:
        raise UserError(f"method.discount={options.discount}: what single tokens earn later; write method.credit=token with it")


def check_causal(spec: RunSpec) -> None:
    """Raises UserError where tokens are to be paid and the target's loss is no sum whose parts later tokens leave alone."""
    reduction = spec.training.reduction
    if spec.method.credit == "token" and reduction != "length":
        why = "with a divisor that later tokens change, no token's credit is its own and the later ones'"
        raise UserError(f"method.credit=token with training.reduction={reduction}: {why}; write training.reduction=length")
