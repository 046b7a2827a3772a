"""The report's tables: exact ones worked out by hand, in Markdown, LaTeX and JSON, and simulations of the tests they print."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from frames import COMMAND, row, small_frame

from dpgbench.report import build, machine_readable, read_contents
from dpgbench.report.table import Cell, Column, Row, Table, latex, tex
from dpgbench.report.task_tables import reachable_note
from dpgbench.stats.over_seeds import paired_difference

pytestmark = pytest.mark.filterwarnings("error")

# By hand; t table, 2 degrees of freedom: 4.3027; with n = 3 half-width = 4.3027 / sqrt(3) x standard deviation (ddof=1) = 2.4842 sd;
# Hedges: J(2) = 1 / sqrt(pi) = 0.5642. The interval of d: noncentralities / sqrt(3) at which P(T <= d sqrt(3)) is 0.975 and 0.025, from the
# mean of Phi(t sqrt(w / 2) - noncentrality) over 400,000 quantiles w of chi-squared: d = 6: 0.777, 11.616; 0.577: -0.721, 1.773;
# 0: +-1.132; 1.155: -0.442, 2.641.
# dpg 0.6, 0.8, 1.0: mean 0.8, sd 0.2, half-width 0.497. Minus base 0.5, 0.6, 0.7: mean 0.6, sd 0.1, half-width 0.248; d = 6, g = 3.4;
#   only +++ and --- are as extreme: p = 2/8.
# best_n4 0.3, 0.4, 0.2: mean 0.3, sd 0.1. Minus base 0.2, 0.2, -0.1: mean 0.1, sd sqrt(0.03) = 0.1732, half-width 0.430, d = 0.577,
#   g = 0.33; the sums of the 8 patterns are +-0.3, +-0.5, +-0.1 twice each way: |sum| >= 0.3 four times, p = 4/8.
# late 0.0, 0.3, 0.3: mean 0.2, sd 0.1732. Minus base -0.1, 0.1, 0: mean 0, sd 0.1, p = 1, d = 0.
# Holm over three: 0.25 x 3 = 0.75, then max(0.75, 0.5 x 2) = 1, then 1.
# Paired t with 2 degrees of freedom: p = 1 - t / sqrt(t^2 + 2). dpg t = 0.6 sqrt(3) / 0.1 = 10.39: 0.0091, times 3 is 0.027; best_n4 t = 1:
#   0.4226, times 2 is 0.85; late t = 0: 1.
RESULTS = """\
| method | n | acc | difference to base | effect size | p | Holm p | FLOPs | tokens generated | tokens trained | time |
|-|
| dpg | 3 | **0.800 [0.303, 1.297]** | +0.600 [+0.352, +0.848] | +3.4 [+0.8, +11.6] | 0.25 t 0.0091 | 0.75 t 0.027 \
| 1.00e+10 | 1.50k | 2.50M | 20 min |
| best_n4 | 3 | 0.300 [0.052, 0.548] | +0.100 [-0.330, +0.530] | +0.3 [-0.7, +1.8] | 0.5 t 0.42 | 1 t 0.85 | 1.00e+09 | 1.50k | 0 | 4.2 s |
| base (reference) | 3 | 0.200 [-0.048, 0.448] | – | – | – | – | 10.0M | 1.50k | 0 | 4.2 s |
| late | 3 | 0.200 [-0.230, 0.630] | 0.000 [-0.248, +0.248] | 0.0 [-1.1, +1.1] | 1 t 1 | 1 t 1 | 1.00e+12 | 1.50k | 0 | 4.2 s |
| naive | 0 of 3 | – | – | – | – | – | – | – | – | – |

> With 3 paired seeds the smallest p that sign flips can reach is 0.25, 0.75 after Holm's correction for 3 comparisons, whatever the \
data: below 0.05 needs 7 seeds. The paired t test (t) has no such bound, but takes the differences to be Gaussian.
"""

# Answers at the FLOPs of whichever spent more, the other holding its last. dpg minus best_n4 at 1e10: 0.3, 0.4, 0.8, mean 0.5, sd 0.2646,
# half-width 0.657, d = 1.890 (-0.176, 3.908), g = 1.07, t = 3.273, p = 0.082. dpg minus late at 1e12: 0.6, 0.5, 0.7, mean 0.6, sd 0.1: as
# dpg to base above. best_n4 minus late: 0.3, 0.1, -0.1, mean 0.1, sd 0.2, half-width 0.497, d = 0.5 (-0.767, 1.672), g = 0.28, t = 0.866,
# p = 0.48; |sum| of the patterns: 0.3, 0.5, 0.1, 0.3, so 6 of 8 are as extreme. Holm over three: 0.75 thrice; t: 0.027, 0.16, 0.48.
EQUAL_FLOPS = """\
| method | against | n | FLOPs | advantage | effect size | p | Holm p |
|-|
| dpg | late | 3 | 1.00e+12 | +0.600 [+0.352, +0.848] | +3.4 [+0.8, +11.6] | 0.25 t 0.0091 | 0.75 t 0.027 |
| dpg | best_n4 | 3 | 1.00e+10 | +0.500 [-0.157, +1.157] | +1.1 [-0.2, +3.9] | 0.25 t 0.082 | 0.75 t 0.16 |
| best_n4 | late | 3 | 1.00e+12 | +0.100 [-0.397, +0.597] | +0.3 [-0.8, +1.7] | 0.75 t 0.48 | 0.75 t 0.48 |

> With 3 paired seeds the smallest p that sign flips can reach is 0.25, 0.75 after Holm's correction for 3 comparisons, whatever the \
data: below 0.05 needs 7 seeds. The paired t test (t) has no such bound, but takes the differences to be Gaussian.
"""

# From 1e8 to 1e10 dpg has its first answer, 0.2 with every seed: no spread. No oracle, so the ceiling is dpg's mean 0.8: levels
# 0.2 + 0.5 x 0.6 = 0.5 and 0.2 + 0.9 x 0.6 = 0.74. Its second snapshot, at 1e10, reaches 0.5 with all seeds and 0.74 with two of three.
COMPUTE = """\
| method | snapshots | FLOPs | mean over log FLOPs | FLOPs to 0.500: 50% | FLOPs to 0.740: 90% |
|-|
| best_n4 | 1 | 1.00e+09 to 1.00e+09 | – | not reached (0 of 3) | not reached (0 of 3) |
| dpg | 2 | 100M to 1.00e+10 | 0.200 [0.200, 0.200] | 1.00e+10 (3 of 3) | 1.00e+10 (2 of 3) |
| late | 1 | 1.00e+12 to 1.00e+12 | – | not reached (0 of 3) | not reached (0 of 3) |
"""

HOLES = """\
## Without a result

- levenshtein: 3 skipped (seeds 0, 1, 2): needs a text target
- naive: 1 failed (seed 0): out of memory \\| step &lt;3>
- naive: 2 missing (seeds 1, 2): no reason recorded
"""


def squeezed(text):
    """Table padding is for readers; its exact width is not what the test is about."""
    return re.sub(r"(?m)^\|[-:|]+\|$", "|-|", re.sub(r" +", " ", text))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    build(small_frame(), folder, suite="demo", command=COMMAND)
    return folder / "tables"


@pytest.mark.parametrize("part", [RESULTS, EQUAL_FLOPS, COMPUTE, HOLES])
def test_task_tables_are_the_ones_worked_out_by_hand(small, part):
    assert part in squeezed((small / "toy.md").read_text(encoding="utf-8"))


def test_versus_and_overview_by_hand(small):
    """One task, so the normalised scores of dpg are (end - 0.2) / 0.6 = 2/3, 1, 4/3 with mean 1, those of best_n4 1/6, 1/3, 0 with mean
    1/6; the mean ranks are those of the means 0.8, 0.3, 0.2, 0.2. dpg beats base in 9 of 9 pairs; best_n4 (0.3, 0.4, 0.2 against 0.1,
    0.2, 0.3) wins 6, ties 0.3 and 0.2 once each and loses 0.2 to 0.3: 7/9. FLOPs are those of the final snapshots."""
    summary = squeezed((small / "summary.md").read_text(encoding="utf-8"))
    assert "18 cells: 12 done, 1 failed, 2 missing, 3 skipped." in summary
    for line in (r"\| dpg \| 1 \| 3 \| 1\.000 \[0\.667, 1\.333\] \| 1\.00 \[1\.00, 1\.00\] \| 1\.00 \[1\.00, 1\.00\] \| 1 of 1 \|",
                 r"\| best_n4 \| 1 \| 3 \| 0\.167 \[0\.000, 0\.333\] \| 2\.00 \[.*\] \| 0\.78 \[.*\] \| 0 of 1 \|",
                 r"\| late \| 1 \| 3 \| 0\.000 \[.*\] \| 3\.50 \[.*\] \|", r"\| base \(reference\) \| 1 \| 3 \| 0\.000 \[.*\] \| 3\.50 ",
                 r"\| naive \| 0 of 1 \| 0 \| – \| – \|", r"\| dpg \| \*\*0\.800 \[0\.303, 1\.297\]\*\* \|",
                 r"\| naive \| failed, missing \|", r"\| levenshtein \| skipped \|",
                 r"No oracle on 1 task: there 1 is the best final mean, .* no finding \(dpg on toy\)"):  # fmt: skip
        assert re.search(line, summary), line
    versus = squeezed((small / "versus_dpg.md").read_text(encoding="utf-8"))
    assert "| toy acc ↑ | +0.500 [-0.157, +1.157] p 0.5 t 0.082 n=3 | +0.600 [+0.352, +0.848] p 0.5 t 0.018 n=3 |" in versus
    assert "Ahead of every other method it can be compared with on 1 of 1 task: toy. Behind at least one on 0." in versus
    assert "Behind at least one on 1: toy (dpg)." in (small / "versus_best_n4.md").read_text(encoding="utf-8")


def test_the_winner_and_the_difference_over_tasks_by_hand(small):
    """dpg minus best_n4, the next: 0.3, 0.4, 0.8, mean 0.5, sd 0.2646, half-width 0.657; against each of the others all three differences
    are positive, so each p is 2/8, and so is the largest; of the t tests that is 0.082. Over its one task, at equal FLOPs:
    (0.3, 0.4, 0.8) / 0.6, mean 0.833, half-width 0.657 / 0.6 = 1.095, p = 2/8."""
    summary = squeezed((small / "summary.md").read_text(encoding="utf-8"))
    line = "| toy acc ↑ | dpg | 0.800 [0.303, 1.297] | best_n4 | +0.500 [-0.157, +1.157] | 1.00e+10 next: 1.00e+09 | 3 | 0.25 "
    assert line in summary
    assert "No method is shown to be better than every other on toy (dpg leads, p 0.25 t 0.082)." in summary
    versus = squeezed((small / "versus_dpg.md").read_text(encoding="utf-8"))
    assert "| best_n4 | 1 | 3 | +0.833 [-0.262, +1.929] | 0.25 t 0.082 | 0.5 t 0.082 |" in versus
    assert "| dpg | 1 | 3 | -0.833 [-1.929, +0.262] | 0.25 t 0.082 | 0.5 t 0.16 |" in squeezed(
        (small / "versus_best_n4.md").read_text(encoding="utf-8")
    )


def test_phi_has_a_table_of_its_own_unless_it_is_every_headline(small):
    """Phi is acc - 1 here: dpg's -0.4, -0.2, 0.0 have mean -0.2 and half-width 0.497, as in RESULTS; naive has failed."""
    summary = squeezed((small / "summary.md").read_text(encoding="utf-8")).split("by Φ")[1]
    for line in (
        "| method | toy: Φ ↑ |",
        "| dpg | **-0.200 [-0.697, 0.297]** |",
        "| best_n4 | -0.700 [-0.948, -0.452] |",
        "| naive | failed, missing |",
    ):
        assert line in summary, line
    assert "Best mean Φ, of 1 task: dpg on 1." in summary
    ragged = small_frame()
    ragged.loc[(ragged["method"] == "dpg") & (ragged["seed"] == 2), "phi"] = np.nan
    assert "n=2" in str(read_contents(ragged, "demo").phi.rows) and "n=2" not in str(read_contents(small_frame(), "demo").phi.rows)
    shared = small_frame().assign(phi=1.0)
    assert read_contents(shared, "demo").phi.findings == ()
    assert read_contents(small_frame().assign(headline="phi"), "demo").phi is None
    assert read_contents(small_frame().assign(phi=np.nan), "demo").phi is None


def test_enough_seeds_and_a_clear_lead_are_a_win(tmp_path):
    """Eight seeds: p = 2/256 against every other, one task, so 0.0078 stays 0.0078 and the page says who is better."""
    values = {"base": 0.1, "dpg": 0.8, "naive": 0.4}
    frame = pd.DataFrame([row(method=name, seed=seed, value=value + 0.01 * seed) for name, value in values.items() for seed in range(8)])
    frame.loc[frame["method"] == "dpg", "metric:acc"] += np.tile([0.0, 0.05], 4)
    build(frame, tmp_path, suite="demo", command=COMMAND)
    summary = (tmp_path / "tables/summary.md").read_text(encoding="utf-8")
    assert "Better than every other (adjusted p &lt; 0.05): dpg on toy." in summary and "**0.0078 one task: 0.0078" in summary
    assert "Better than every other (adjusted p &lt; 0.05): dpg on toy." in (tmp_path / "index.html").read_text(encoding="utf-8")
    versus = squeezed((tmp_path / "tables/versus_dpg.md").read_text(encoding="utf-8"))
    assert "Over tasks, adjusted p &lt; 0.05 by sign flips: better than naive; worse than none." in versus


def test_lower_is_better_turns_the_order_and_the_oracle_scales_and_does_not_compete(tmp_path):
    frame = small_frame().assign(higher_is_better=False)
    frame = pd.concat([frame, pd.DataFrame([row(method="oracle", seed=s, value=0.0, higher_is_better=False) for s in range(3)])])
    build(frame, tmp_path, suite="demo", command=COMMAND)
    table = (tmp_path / "tables/toy.md").read_text(encoding="utf-8").partition("at equal FLOPs")[0]
    order = re.findall(r"(?m)^\| ([a-z_0-9]+(?: \([a-z ]+\))?) ", table)[1:]
    assert sorted(order[:2]) == ["base (reference)", "late"], "both 0.2"
    assert order[2:] == ["best_n4", "dpg", "naive", "oracle (not a competitor)"]
    assert "lower is better" in table and "over the 3 comparisons of this table" in table  # the oracle's is not one of the family
    summary = squeezed((tmp_path / "tables/summary.md").read_text(encoding="utf-8"))
    assert re.search(r"\| dpg \| 1 \| 3 \| -3\.000 ", summary), "(0.8 - 0.2) / (0 - 0.2)"
    assert re.search(r"\| oracle \(not a competitor\) \| 1 \| 3 \| 1\.000 [^|]*\| – \|", summary) and "No oracle" not in summary
    equal = squeezed((tmp_path / "tables/toy.md").read_text(encoding="utf-8"))
    assert "| best_n4 | dpg | 3 | 1.00e+10 | +0.500 [-0.157, +1.157] |" in equal, "the lower one is ahead"


def test_holm_family_is_the_table_and_six_seeds_reach_what_they_can():
    """6 seeds, all differences positive: p = 2/64 = 0.031, times 2 comparisons 0.0625: no bold, and the note says that 7 seeds would do."""
    rng = np.random.default_rng(1)
    rows = [row(seed=s, value=0.0) for s in range(6)]
    rows += [
        row(method=m, seed=s, step=t, value=t * (0.5 + 0.1 * rng.random()), flops=(1 + t) * 1e9)
        for m in "ab"
        for s in range(6)
        for t in (0, 1)
    ]
    contents = read_contents(pd.DataFrame(rows), "demo")
    cells = [[cell.text for cell in row.cells[5:7]] for row in contents.by_task["toy"][0].rows]
    assert cells == [["0.031", "0.062"], ["0.031", "0.062"], ["–", "–"]]
    assert reachable_note([6, 6], 2) == contents.by_task["toy"][0].notes
    assert (
        "0.031, 0.062 after Holm's correction for 2 comparisons, whatever the data: below 0.05 needs 7 seeds. The paired t test"
        in contents.by_task["toy"][0].notes[0]
    )
    assert reachable_note([7, 7], 2) == () and reachable_note([6], 1) == () and reachable_note([], 3) == ()


def test_latex_has_every_cell_and_nothing_that_latex_would_take_for_itself(small):
    text = (small / "toy.tex").read_text(encoding="utf-8")
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\label{tab:toy-") == 3
    assert text.count("{") == text.count("}")
    results = text.split(r"\end{tabular}")[0].split(r"\midrule")[1].split(r"\bottomrule")[0]
    lines = [line for line in results.splitlines() if line]
    assert len(lines) == 5 and all(line.endswith(r" \\") and line.count(" & ") == 10 for line in lines)
    assert lines[0].startswith(r"dpg & 3 & \textbf{0.800 {[}0.303, 1.297{]}} & +0.600 ") and r"best\_n4 & 3" in lines[1]
    unescaped = re.compile(r"(?<!\\)[_%#$]")
    assert not [line for line in text.splitlines()[1:] if unescaped.search(re.sub(r"\$\\[a-z]+\$", "", line))]
    assert tex("50% of a_b & [c] ↑ \\ {x}") == r"50\% of a\_b \& {[}c{]} $\uparrow$ \textbackslash{} \{x\}"
    one = Table("n", "T", "C.", (Column("a_b", numeric=False),), (Row((Cell("x", bold=True),)),), ("note",))
    assert r"\textbf{x} \\" in latex(one) and r"\caption{T. C.}" in latex(one) and r"{\footnotesize note}" in latex(one)


def test_json_carries_the_unrounded_numbers():
    found = json.loads(json.dumps(machine_readable(small_frame(), suite="demo", command=COMMAND), allow_nan=False))
    dpg = found["tasks"]["toy"]["tables"]["results"]["rows"][0]
    assert dpg["acc"]["mean"] == pytest.approx(0.8) and dpg["acc"]["n"] == 3 and dpg["p"]["p"] == 0.25 and dpg["Holm p"]["p"] == 0.75
    assert dpg["effect size"]["d"] == pytest.approx(6) and dpg["FLOPs"]["median"] == 1e10
    naive = found["tasks"]["toy"]["tables"]["results"]["rows"][-1]
    assert naive["acc"]["mean"] is None and naive["n"]["cells"] == 3
    assert found["tasks"]["toy"]["tables"]["compute"]["rows"][0]["FLOPs to 0.500: 50%"]["median"] is None
    assert found["cells"] == {"done": 12, "failed": 1, "missing": 2, "skipped": 3}
    assert found["tasks"]["toy"]["without_a_result"][1] == {
        "method": "naive", "status": "failed", "seeds": [0], "reason": "out of memory | step <3>"}  # fmt: skip


def test_size_under_the_null_and_power_that_grows_with_n():
    """2000 Gaussian experiments a point. Null: p <= 0.05 at most 5% of the time (exactly 2 floor(0.05 x 2^n / 2) / 2^n of the patterns:
    0 at 5 pairs, 2/64 at 6, 12/256 at 8). A true effect of one standard deviation is found more often with every pair more."""
    rng = np.random.default_rng(20261121)

    def share_found(n, effect):
        draws = rng.normal(effect, 1.0, (2000, n))
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        sums = np.abs(draws @ signs.T)
        ps = (sums >= sums[:, :1] - 1e-12).mean(axis=1)
        for values, p in zip(draws[:5], ps, strict=False):  # the function itself says the same
            assert paired_difference(pd.Series(values), pd.Series(np.zeros(n))).p == pytest.approx(p, abs=1e-12)
        return float((ps <= 0.05).mean())

    for n, exact in ((5, 0.0), (6, 2 / 64), (8, 12 / 256)):
        assert share_found(n, 0.0) == pytest.approx(exact, abs=4 * np.sqrt(0.05 * 0.95 / 2000))
    power = [share_found(n, 1.0) for n in (5, 6, 8, 10, 12)]
    assert power[0] == 0 and all(b > a + 0.03 for a, b in pairwise(power)) and power[-1] > 0.8
