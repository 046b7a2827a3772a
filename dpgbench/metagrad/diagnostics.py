"""Can these metagradients be trusted here? Measurements on a user's own model, data and metric, and a verdict in words.

    agreement         exact derivatives against finite differences along random directions of the weights, both in float64
    rounding          rewards in the model's own precision against float64; bfloat16 against float32 where it is asked for
    datamodelling     what the rewards are for: do they rank the outcomes of training on random halves of the data? (LDS, MAGIC)
    metasmoothness    is the learning algorithm smooth enough for its derivative to say something about finite changes? (arXiv 2503.13751)
    saturation        share of AdamW's first step that is only a sign, so it does not depend on the example weights (`eps_root` is far
                      below the squared gradients)
    cost              seconds relative to training alone

`measure` works on any fine-tuning run; `run.check_metagrad.measure_cell` builds one from a cell: its generator's own completions.
Shape suffixes: D directions, N examples in total.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from scipy import stats
from torch import Tensor, nn

from dpgbench.metagrad.differentiate import metagradients, signal_gradients
from dpgbench.metagrad.settings import DEFAULTS, EngineSettings
from dpgbench.metagrad.training import AdamW, Optimizer, Params, Signal, loaded, mean_gradients, train

FD_STEP = 2e-4  # in the weights; AdamW's curvature sits at gradients near sqrt(eps_root), so larger steps measure something else
SMOOTHNESS_STEP = 0.1


@dataclass(frozen=True)
class Findings:
    """What was measured. Correlations and scores are at most 1, and 1 is good; saturation is 0 to 1, and 0 is good."""

    examples: int
    steps: int
    value: float
    """Phi after training with all weights 1."""
    fd_correlation: float
    """Pearson, over random directions, of the exact directional derivative and its finite difference."""
    fd_error: float
    """Largest deviation between the two, relative to the largest derivative."""
    rounding: float
    """Pearson of the rewards with the float64 ones."""
    lds: float
    """Spearman, over random halves, of the predicted and the actual Phi."""
    metasmoothness: float
    saturation: float | None
    """None for SGD."""
    eps_root: float | None
    suggested_eps_root: float | None
    cost: float
    """Seconds of a metagradient over seconds of training alone."""
    modes: tuple[str, ...]
    bf16_correlation: float | None = None
    """Pearson of the rewards under bfloat16 and float32, where bfloat16 was asked for."""

    @property
    def verdict(self) -> tuple[str, list[str]]:
        """ "yes", "with care" or "no", and the reasons."""
        wrong, doubts = [], []
        if not self.fd_correlation >= 0.999:  # so that NaN is wrong too
            wrong.append(
                "the derivatives are not those of this training run: an operation of the model or the signal has a wrong derivative"
            )
        if not self.rounding >= 0.99:
            wrong.append("rounding drowns the rewards: train in float32 or float64, or with a larger learning rate")
        if self.bf16_correlation is not None and self.bf16_correlation < 0.95:
            doubts.append('bfloat16 changes the rewards: use precision="full"')
        if self.saturation is not None and self.saturation > 0.9:
            doubts.append(f"AdamW's first step is nearly all sign: raise eps_root to about {self.suggested_eps_root:.0e}")
        if not self.lds >= 0.5:
            wrong.append("rewards do not rank the outcomes of training on half of the data: the change is too large for a derivative")
        elif self.lds < 0.9:
            doubts.append("rewards rank the outcomes of training on half of the data only roughly")
        if self.metasmoothness < 0.5:
            doubts.append("training is not metasmooth: small changes of the data turn the parameters' course; lower the learning rate")
        return ("no" if wrong else "with care" if doubts else "yes"), wrong + doubts


def measure(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    signal: Signal,
    optimizer: Optimizer,
    *,
    seed: int = 0,
    directions: int = 8,
    subsets: int = 32,
    settings: EngineSettings = DEFAULTS,
) -> Findings:
    """All of it, computed as `settings` say. The model is left unchanged.

    Cost: 4 `directions` training runs and a metagradient in float64, `subsets` + 5 training runs, four metagradients.
    Raises ValueError as `metagradients` does, and on fewer than 3 directions or subsets."""
    for name, count in (("directions", directions), ("subsets", subsets)):
        if count < 3:
            raise ValueError(f"{name}={count}: a correlation needs 3 or more; pass {name}=8")
    full = replace(settings, precision="full")
    outcome, cost = _cost(model, batches, signal, optimizer, settings)
    rewards_N = outcome.rewards.double()
    generator = torch.Generator().manual_seed(seed)

    double = copy.deepcopy(model).double()
    exact_N = metagradients(double, batches, signal, optimizer, **full.for_metagradients()).rewards
    directions_DN = torch.randn(directions, len(exact_N), generator=generator, dtype=torch.float64).to(exact_N.device)
    predicted = (directions_DN @ exact_N).tolist()
    along = [lambda h, d=d: _phi(double, batches, signal, optimizer, 1 + h * d, full) for d in directions_DN]
    differences = [_richardson(function, FD_STEP) for function in along]

    def phi(weights_N: Tensor) -> float:
        return _phi(model, batches, signal, optimizer, weights_N, settings)

    half_predictions, half_values = [], []
    for _ in range(subsets):  # half of the examples left out, the others at weight 2: the mean weight stays 1
        half_N = torch.zeros(len(rewards_N), dtype=torch.float64)
        half_N[torch.randperm(len(rewards_N), generator=generator)[: len(rewards_N) // 2]] = 2
        half_N = half_N.to(rewards_N.device)
        half_predictions.append(float(rewards_N @ (half_N - 1)))
        half_values.append(phi(half_N))

    saturation = suggested = eps_root = None
    if isinstance(optimizer, AdamW):
        saturation, suggested = _saturation(model, batches, signal, optimizer, outcome.params, settings)
        eps_root = optimizer.eps_root
    bf16 = None
    if settings.precision == "bf16":
        bf16 = _pearson(metagradients(model, batches, signal, optimizer, **full.for_metagradients()).rewards, rewards_N)
    return Findings(
        examples=len(rewards_N),
        steps=len(batches),
        value=outcome.value,
        fd_correlation=_pearson(torch.tensor(predicted), torch.tensor(differences)),
        fd_error=max(abs(p - d) for p, d in zip(predicted, differences, strict=True)) / max(map(abs, differences)),
        rounding=_pearson(exact_N, rewards_N),
        lds=float(stats.spearmanr(half_predictions, half_values).statistic),
        metasmoothness=metasmoothness(model, batches, optimizer, generator, settings),
        saturation=saturation,
        eps_root=eps_root,
        suggested_eps_root=suggested,
        cost=cost,
        modes=outcome.modes,
        bf16_correlation=bf16,
    )


def metasmoothness(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    optimizer: Optimizer,
    generator: torch.Generator,
    settings: EngineSettings = DEFAULTS,
) -> float:
    """Do phi_T's coordinates go on in the same direction when the weights do? From -1 to 1; linear is 1.

    With phi(h) the parameters trained at weights 1 + h v, v random signs: sum_j |phi_j(2h) - phi_j(0)| s_j / sum_j |phi_j(2h) - phi_j(0)|,
    s_j = sign(phi_j(2h) - phi_j(h)) sign(phi_j(h) - phi_j(0)). Cost: 3 training runs. Source: arXiv 2503.13751, definition 2."""
    count = sum(len(batch["labels"]) for batch in batches)
    signs_N = (torch.randint(0, 2, (count,), generator=generator) * 2 - 1).double()
    runs = [train(model, batches, optimizer, weights=1 + h * SMOOTHNESS_STEP * signs_N, **settings.for_training()) for h in (0, 1, 2)]
    agreed = moved = 0.0
    for start, middle, end in zip(*(params.values() for params in runs), strict=True):
        size = (end - start).abs().double()
        agreed += float((size * torch.sign(end - middle) * torch.sign(middle - start)).sum())
        moved += float(size.sum())
    return agreed / moved if moved else 1.0


def _saturation(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], signal: Signal, optimizer: AdamW, params: Params, settings: EngineSettings
) -> tuple[float, float]:
    """How much of AdamW's first step cannot be moved by its gradient, and the eps_root at which half of it could.

    That step is g / sqrt(g^2 + eps_root) with derivative eps_root / (g^2 + eps_root)^(3/2), which a sign does not have: the mean of
    g^2 / (g^2 + eps_root) over coordinates, each weighing |dPhi/dphi_j|. The suggestion is the weighted median of g^2."""
    from dpgbench.metagrad.inputs import check_batches
    from dpgbench.metagrad.loss import initial_parameters

    start = initial_parameters(model)
    (first, *_), weights_N = check_batches(batches, start, None, settings.micro_batch)
    gradients = mean_gradients(model, start, first, weights_N[: len(first.labels)], settings.micro_batch, settings.reduction)
    _, cotangents = signal_gradients(model, params, signal)
    live = [name for name, cotangent in cotangents.items() if cotangent is not None]
    squares = torch.cat([gradients[name].double().square().flatten() for name in live])
    weights = torch.cat([cotangents[name].double().abs().flatten() for name in live]) * (squares > 0)  # no gradient, no step
    if not bool(weights.any()):
        return 0.0, optimizer.eps_root
    saturation = float((weights * squares / (squares + optimizer.eps_root)).sum() / weights.sum())
    order = squares.argsort()
    passed = weights[order].cumsum(0)
    median = float(squares[order][torch.searchsorted(passed, passed[-1] / 2)])
    return saturation, 10.0 ** round(math.log10(median))


def _phi(model: nn.Module, batches, signal: Signal, optimizer: Optimizer, weights_N: Tensor, settings: EngineSettings) -> float:
    params = train(model, batches, optimizer, weights=weights_N, **settings.for_training())
    with torch.no_grad(), loaded(model, params):
        return float(signal(model))


def _richardson(function: Callable[[float], float], h: float) -> float:
    """The derivative at 0 from two central differences; the error is O(h^4)."""
    wide, narrow = ((function(step) - function(-step)) / (2 * step) for step in (2 * h, h))
    return (4 * narrow - wide) / 3


def _cost(model, batches, signal, optimizer, settings: EngineSettings):
    """The metagradients, and the median of three ratios of their seconds to training's."""
    ratios = []
    outcome = metagradients(model, batches, signal, optimizer, **settings.for_metagradients())  # warm
    for _ in range(3):
        start = time.perf_counter()
        train(model, batches, optimizer, **settings.for_training())
        middle = time.perf_counter()
        outcome = metagradients(model, batches, signal, optimizer, **settings.for_metagradients())
        ratios.append((time.perf_counter() - middle) / (middle - start))
    return outcome, statistics.median(ratios)


def _pearson(left: Tensor, right: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([left.double(), right.double()]))[0, 1])
