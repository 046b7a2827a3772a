"""The figure of `check estimator`: rewards against the exact effects of leaving texts out, and how much of each gradient is signal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import seaborn
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dpgbench.report.plot_style import INK, LOOK, WIDTH, cut

BLUE, ORANGE = seaborn.color_palette("colorblind").as_hex()[:2]


def draw_estimators(
    path: str,
    title: str,
    metagradients: NDArray[np.float64],
    effects: NDArray[np.float64],
    ratios: Sequence[tuple[str, float, float]],
) -> None:
    """Write a PNG to `path`.

    Left: each left-out text's metagradient and exact effect, both in units of Phi, with the line on which they are equal. Right: each
    method's signal-to-noise ratio, given as (label, ratio, standard error); the bar's whisker is two standard errors.
    """
    with rc_context(LOOK):
        figure = Figure(figsize=(1.6 * WIDTH, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes in (left, right):
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        both = np.concatenate([metagradients, effects])
        ends = [both.min(), both.max()]
        left.plot(ends, ends, color=ORANGE, linewidth=1.2, label="equal")
        left.plot(metagradients, effects, "o", color=BLUE, markersize=4.5, markeredgecolor="white", markeredgewidth=0.5)
        left.set_xlabel("metagradient of a text")
        left.set_ylabel("effect of leaving it out")
        left.ticklabel_format(scilimits=(-2, 3))
        left.legend(frameon=False)
        left.set_title(cut(title, 60), loc="left", fontsize=12.5, fontweight="bold", pad=14)
        labels = [cut(label, 24) for label, _, _ in ratios]
        places = np.arange(len(labels))
        right.barh(places, [max(0.0, ratio) for _, ratio, _ in ratios], color=BLUE, height=0.6)
        right.errorbar(
            [ratio for _, ratio, _ in ratios], places, xerr=[2 * error for _, _, error in ratios],
            fmt="none", ecolor=INK, elinewidth=1.2, capsize=3,
        )  # fmt: skip
        right.set_yticks(places, labels)
        right.invert_yaxis()
        right.grid(False, axis="y")
        right.axvline(0, color=INK, linewidth=0.8)
        right.set_xlabel("signal to noise of a step's policy gradient")
        figure.savefig(path, format="png", dpi=130, metadata={"Software": None}, facecolor="white")
