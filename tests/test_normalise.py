"""Normalised scores, their anchors, and grids of them, worked out by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dpgbench.stats.aggregates import normalise, score_grid

nan, inf = np.nan, np.inf


def scores_of(table):
    """{(task, method): values by seed} as the frame `normalise` takes."""
    rows = [
        {"task_label": task, "method_label": method, "seed": seed, "value": value}
        for (task, method), values in table.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["task_label", "method_label", "seed", "value"])


def test_normalised_scores_by_hand_in_both_directions():
    """share: base mean 0.2, oracle 1.0, so 0.6 is 0.5. loss (lower is better): base 4, oracle 2, so 3 is 0.5 and 5 is -0.5."""
    scores = scores_of(
        {
            ("share", "base"): [0.1, 0.3], ("share", "oracle"): [1, 1], ("share", "dpg"): [0.6, 0.2],
            ("loss", "base"): [3, 5], ("loss", "oracle"): [2, 2], ("loss", "dpg"): [3, 5],
        }
    )  # fmt: skip
    got = normalise(scores, {"share": True, "loss": False})
    dpg = got.scores[got.scores["method_label"] == "dpg"].groupby("task_label")["normalised"].apply(list)
    assert dpg["share"] == pytest.approx([0.5, 0]) and dpg["loss"] == pytest.approx([0.5, -0.5])
    share = got.anchors["share"]
    assert (share.base, share.base_n, share.ceiling, share.ceiling_n, share.ceiling_label) == (pytest.approx(0.2), 2, 1, 2, "oracle")
    assert (got.undefined, got.missing) == ((), 0)
    means = got.scores.groupby(["task_label", "method_label"])["normalised"].mean().unstack()
    assert means["base"].to_numpy() == pytest.approx([0, 0], abs=1e-12) and means["oracle"].to_numpy() == pytest.approx([1, 1])


def test_normalised_scores_do_not_depend_on_the_unit():
    """x -> -3 x + 7 turns the direction round and changes nothing else."""
    scores = scores_of({("t", "base"): [1, 2], ("t", "dpg"): [3, 5], ("t", "n16"): [2, 4]})
    other = scores.assign(value=-3 * scores["value"] + 7)
    a, b = normalise(scores, {"t": True}), normalise(other, {"t": False})
    assert a.scores["normalised"].to_numpy() == pytest.approx(b.scores["normalised"].to_numpy())
    assert a.anchors["t"].ceiling_label == b.anchors["t"].ceiling_label == "dpg"


def test_without_an_oracle_the_best_full_method_is_the_ceiling():
    scores = scores_of({("t", "base"): [1, 1], ("t", "dpg"): [3, 5], ("t", "n16"): [2, 2], ("t", "lucky"): [9, nan]})
    got = normalise(scores, {"t": True})
    assert (got.anchors["t"].ceiling_label, got.anchors["t"].ceiling) == ("dpg", 4)
    assert got.missing == 1
    assert got.scores.query("method_label == 'lucky'")["normalised"].iloc[0] == pytest.approx(8 / 3)
    lower = normalise(scores.assign(value=-scores["value"]), {"t": False}).anchors["t"]
    assert (lower.ceiling_label, lower.ceiling, lower.higher_is_better) == ("dpg", -4, False)
    absent = scores_of({("t", "base"): [1], ("t", "oracle"): [nan], ("t", "dpg"): [3]})
    assert normalise(absent, {"t": True}).anchors["t"].ceiling_label == "dpg"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("methods", "why"),
    [
        ({"dpg": [1, 2]}, "no value of base"),
        ({"base": [nan, nan], "dpg": [1, 2]}, "no value of base"),
        ({"base": [1, 2]}, "neither oracle nor a method with a finite mean"),
        ({"base": [1, 2], "dpg": [inf, 1]}, "neither oracle nor a method with a finite mean"),
        ({"base": [1, inf], "dpg": [1, 2]}, "the mean of base is not finite"),
        ({"base": [1, 2], "oracle": [inf, 1]}, "the mean of oracle is not finite"),
        ({"base": [1, 2], "oracle": [1, 1]}, "oracle (1) is not better than base (1.5), and higher is better"),
        ({"base": [0.1 + 0.2, 0.3], "dpg": [0.3, 0.3]}, "dpg (0.3) is not better than base (0.3), and higher is better"),
        ({"base": [0.3, 0.3], "dpg": [0.1 + 0.2, 0.3]}, "dpg (0.3) is not better than base (0.3), and higher is better"),
    ],
)
def test_anchors_that_span_no_scale_leave_nan_and_are_counted(methods, why):
    table = {("bad", method): values for method, values in methods.items()} | {("good", "base"): [0], ("good", "dpg"): [1]}
    got = normalise(scores_of(table), {"bad": True, "good": True})
    assert got.anchors["bad"].why_undefined == why and got.undefined == ("bad",)
    assert got.scores[got.scores["task_label"] == "bad"]["normalised"].isna().all()
    assert got.missing == sum(map(len, methods.values())) and not got.anchors["good"].why_undefined


def test_an_infinite_score_stays_infinite():
    got = normalise(scores_of({("t", "base"): [0], ("t", "oracle"): [1], ("t", "dpg"): [-inf]}), {"t": True})
    assert got.scores["normalised"].iloc[-1] == -inf and got.missing == 0


def test_bad_scores_are_refused_with_the_fix():
    scores = scores_of({("t", "base"): [1, 2], ("t", "dpg"): [3]})
    with pytest.raises(ValueError, match="higher_is_better says nothing about t; it needs the direction of every task"):
        normalise(scores, {})
    with pytest.raises(ValueError, match=r"the scores lack the column\(s\) seed; they need"):
        normalise(scores.drop(columns="seed"), {"t": True})
    with pytest.raises(ValueError, match="task t, method dpg, seed 0 has more than one value; keep the final"):
        normalise(pd.concat([scores, scores[-1:]], ignore_index=True), {"t": True})
    with pytest.raises(ValueError, match="rows with the same index; reset_index"):
        normalise(pd.concat([scores, scores.assign(seed=9)]), {"t": True})
    with pytest.raises(ValueError, match="no score of method 'dqg'; the frame has base, dpg"):
        score_grid(scores, "dqg", "value")
    with pytest.raises(ValueError, match=r"lack the column\(s\) normalised"):
        score_grid(scores, "dpg")
    assert normalise(scores[:0], {}).missing == 0


def test_a_grid_has_every_task_and_seed_of_the_frame():
    scores = scores_of({("a", "dpg"): [1, 2], ("b", "dpg"): [3], ("c", "base"): [4, 5, 6]})
    grid = score_grid(scores, "dpg", "value")
    expected = pd.DataFrame([[1, 2, nan], [3, nan, nan], [nan] * 3], index=list("abc"), columns=[0, 1, 2])
    pd.testing.assert_frame_equal(grid, expected, check_names=False)
