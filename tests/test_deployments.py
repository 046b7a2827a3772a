"""What a final answer is deployed with: the best of several completions, and other numbers of texts than the suite's own."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL
from frames import COMMAND, row, small_frame

from dpgbench import config
from dpgbench.bench.grpo import train_policy
from dpgbench.config import match_budget
from dpgbench.core.errors import UserError
from dpgbench.plugins.registry import Registry
from dpgbench.report import build, machine_readable
from dpgbench.report.deployment_size import size_tables
from dpgbench.report.results import read_frame
from dpgbench.run import estimate
from dpgbench.run.cell import RunContext, _Cell, run_cell
from dpgbench.stats.over_seeds import mean_interval
from dpgbench.store import parquet
from dpgbench.store.run_folder import RunFolder


def cell_of(*words: str):
    said = {word.split("=")[0]: word for word in (*SMALL, *words)}
    (cell,) = config.read(list(said.values()), sweep=False).cells
    return cell


def result_of(tmp_path, *words: str) -> dict:
    spec = cell_of(*words).spec
    assert run_cell(spec, tmp_path) == "done"
    return RunFolder.of(tmp_path, spec).result()


# ---- best of k of a trained generator


@pytest.mark.parametrize("task", ["language", pytest.param("l2_norm", marks=pytest.mark.slow)])
def test_a_policy_may_deploy_the_best_of_several(bench, task):
    """After an update, with averaged weights: by hand from the generator's draws, charged as so many and their judging."""
    words = (f"task={task}", "method=dpg", "steps=1", "averaging=0.5", "policy.lr=1e-2")
    work = bench(*words, "policy.best_of=3")
    if task == "language":  # a score that differs more often
        work.task.score = lambda texts: [float(len(text.split())) for text in texts]
    *_, last = train_policy(work, lambda rollouts: [float(len(text)) for text in rollouts.completions])
    prompts = work.prompts(6, "a test")
    with work.meter.deployment() as price:
        kept = last.sample(prompts)
    averaged = {name: weight.clone() for name, weight in last.weights().items()}
    for name, weight in work.generator.model.named_parameters():
        weight.data.copy_(averaged[name])
    with work.meter.deployment() as by_hand:
        draws = [work.sample(prompts, "deployment", *([draw] if draw else [])) for draw in range(3)]
        texts = [text for draw in draws for text in draw]
        values = work.task.score(texts) if task == "language" else work.one_step_utilities(texts)
    for place, text in enumerate(kept):
        of_prompt = values[place::6]
        assert text == draws[of_prompt.index(max(of_prompt))][place]
    assert price.flops == by_hand.flops and price.tokens_generated == by_hand.tokens_generated > 0
    assert kept != draws[0], "it matters"


def test_best_of_one_is_the_cell_that_there_was(bench):
    spec = cell_of("method=dpg").spec
    assert spec.hash == cell_of("method=dpg", "policy.best_of=1").spec.hash != cell_of("method=dpg", "policy.best_of=2").spec.hash
    before = {**spec.config, "method": {**spec.config["method"], "policy": dict(spec.config["method"]["policy"])}}
    before["scale"] = {key: value for key, value in spec.config["scale"].items() if key != "more_deployments"}
    del before["method"]["policy"]["best_of"]
    assert type(spec)(before).hash == spec.hash
    assert estimate.estimate(type(spec)(before), Registry()) == estimate.estimate(spec, Registry())


def test_an_estimate_knows_both():
    """Best of k costs k datasets; other sizes cost time and no budget."""

    def found(*words: str):
        return estimate.estimate(cell_of("task=language", "method=dpg", "steps=1", *words).spec, Registry())

    plain, twice, thrice = found(), found("policy.best_of=2"), found("policy.best_of=3")
    assert thrice.flops - twice.flops == pytest.approx(twice.flops - plain.flops) and twice.flops > plain.flops
    more = found("more_deployments=[32,64]")
    assert more.flops == plain.flops and more.evaluation > plain.evaluation


# ---- other numbers of deployment texts


@pytest.mark.parametrize(
    "words",
    [["method=dpg"], ["method=active_inheritance", "n=3"]]
    + [
        pytest.param(words, marks=pytest.mark.slow)
        for words in (
            ["method=base"], ["method=oracle"], ["method=optimsyn", "texts=1"], ["method=dpg", "policy.best_of=2", "averaging=0.9"],
            ["method=prompt_only", "search=3", "search_texts=8"],
            ["method=active_inheritance_rounds", "n=2", "rounds=2", "round_prompts=16"],
        )
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_size_is_what_a_cell_of_that_size_ends_with(tmp_path, words):
    """All numbers of the row, its charges among them, are those of another cell; the curve is that of the cell without."""
    words = ["task=language", "inner_steps=2", *words]
    found = result_of(tmp_path, *words, "more_deployments=[24,8]")
    assert [line["deployment_texts"] for line in found["deployments"]] == [8, 16, 24]
    for line in found["deployments"]:
        size = line.pop("deployment_texts")
        alone = result_of(tmp_path, *words, f"deployment_texts={size}")["snapshots"][-1]
        assert {**line, "seconds": 0} == {**alone, "seconds": 0}, size
    plain = result_of(tmp_path, *words)
    assert [{**line, "seconds": 0} for line in found["snapshots"]] == [{**line, "seconds": 0} for line in plain["snapshots"]]
    assert "deployments" not in plain and found["texts"] == plain["texts"]


@pytest.mark.slow
def test_a_round_made_in_vain_is_no_part_of_a_larger_deployment(tmp_path):
    """`rounds=budget` goes back to the generator of its answer: the larger dataset is that of a cell with as many rounds."""
    words = ["task=language", "method=active_inheritance_rounds", "n=2", "round_prompts=16", "more_deployments=[32]"]
    flops = [line["flops"] for line in result_of(tmp_path, *words, "rounds=2")["snapshots"]]
    spent = result_of(tmp_path, *words, "rounds=budget", f"budget.flops={flops[-1] * 0.999!r}")
    assert len(spent["snapshots"]) == len(flops) - 1
    once = result_of(tmp_path, *words, "rounds=1")
    for one, other in zip(spent["deployments"], once["deployments"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_a_policy_that_went_on_has_no_other_sizes_and_says_so(tmp_path):
    """Its weights are not those of the answer any more."""
    spec = cell_of("task=language", "method=dpg", "steps=1", "more_deployments=[8]").spec
    cell = _Cell(spec, RunContext(RunFolder.of(tmp_path, spec)))
    cell.folder.path.mkdir(parents=True)
    made = Registry().load("method", "dpg")(cell.bench.options).run(cell.bench)
    first = next(made)
    assert cell._answer(first) and [line["deployment_texts"] for line in cell._deployments(first)["deployments"]] == [8, 16]
    found = cell._deployments(next(made))
    assert [line["deployment_texts"] for line in found["deployments"]] == [16] and "trained beyond" in found["deployments_left_out"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "more_deployments=[15]",
            "scale.more_deployments=[15]: each must divide into inner_steps=2 batches; write scale.more_deployments=[14]",
        ),
        (
            "more_deployments=[8,16,8]",
            "scale.more_deployments=[8, 16, 8]: each once, and deployment_texts=16 is among them anyway; write scale.more_deployments=[8]",
        ),
        (
            "more_deployments=[a]",
            "scale.more_deployments=['a']: a list of whole numbers; write scale.more_deployments=[64,1024], or [] for none",
        ),
        ("policy.best_of=0", "policy.best_of=0: a deployment text is the best of one completion or more; write policy.best_of=1"),
    ],
)
def test_bad_settings_are_one_line(word, message):
    with pytest.raises(UserError) as caught:
        cell_of("method=dpg", "inner_steps=2", word)
    assert str(caught.value) == message


def test_a_policy_that_writes_no_deployment_texts_has_no_best_of_them():
    with pytest.raises(UserError, match=r"policy\.best_of=2: a rubric has one text written under it; write policy\.best_of=1"):
        cell_of("method=optimsyn", "policy.best_of=2")


def test_a_budget_is_matched_to_cells_older_than_these_settings(tmp_path):
    """And to those that are deployed at other sizes, which spend the same on their answer."""
    spec = cell_of("method=base", "task=l2_norm").spec
    assert run_cell(spec, tmp_path) == "done"
    folder = RunFolder.of(tmp_path, spec)
    spent = folder.result()["snapshots"][-1]["flops"]
    stored = (folder.path / "spec.yaml").read_text()
    assert "more_deployments: []\n" in stored
    (folder.path / "spec.yaml").write_text(stored.replace("  more_deployments: []\n", ""))
    result = json.loads((folder.path / "result.json").read_text())  # nor had results checksums then
    (folder.path / "result.json").write_text(json.dumps({key: result[key] for key in result.keys() - {"files", "checksum"}}))
    for words in ([], ["more_deployments=[8]"]):
        assert match_budget.flops_of("base", cell_of("method=dpg", "task=l2_norm", *words).spec, tmp_path) == spent


# ---- the report


@pytest.mark.slow
def test_rows_of_other_sizes_are_kept_apart_in_the_frame(tmp_path):
    cell = cell_of("task=language", "method=base", "more_deployments=[8]")
    assert run_cell(cell.spec, tmp_path) == "done"
    frame = parquet.frame_of([cell], tmp_path, {})
    assert frame["deployment_texts"].tolist()[1:] == [8, 16] and np.isnan(frame["deployment_texts"][0])
    assert frame["phi"][0] == frame["phi"][2] != frame["phi"][1]
    parquet.write_parquet(frame, tmp_path / "mine.parquet", suite="mine", title="", command="")
    stored, _ = parquet.read_parquet(tmp_path / "mine.parquet")
    results = read_frame(stored, "mine")
    assert len(results.frame) == 1 and results.deployments["deployment_texts"].tolist() == [8, 16]


def sized_frame() -> pd.DataFrame:
    """small_frame with dpg and best deployed at 64 and 1024 texts beside 256, on three seeds."""
    rows = []
    for seed, value in enumerate((0.5, 0.7, 0.9)):
        for size, gain in ((64, -0.2), (256, 0.0), (1024, 0.1)):
            more = {"seed": seed, "deployment_texts": float(size), "value": value + gain}
            rows.append(row(method="dpg", step=9, flops=1e10 + 1e6 * size, **more))
            rows.append(row(method="best", label="best_n4", step=4, flops=4e6 * size, **more))
    return pd.concat([small_frame(), pd.DataFrame(rows)], ignore_index=True)


def test_a_report_has_the_second_axis_and_its_curves_stay_as_they_were(tmp_path):
    sized, plain = sized_frame(), small_frame()
    with_sizes, without = (machine_readable(frame, suite="demo", command=COMMAND) for frame in (sized, plain))
    table = with_sizes["tasks"]["toy"]["tables"].pop("sizes")
    assert with_sizes == without, "nothing else of the report has moved"
    by_method = {line["method"]["text"]: line for line in table["rows"]}
    assert set(by_method) == {"dpg", "best_n4"}
    expected = mean_interval([0.6, 0.8, 1.0])
    assert by_method["dpg"]["1024 texts"]["mean"] == pytest.approx(expected.mean)
    assert by_method["dpg"]["1024 texts"]["low"] == pytest.approx(expected.low)
    assert by_method["best_n4"]["FLOPs: 64 texts"]["flops"] == pytest.approx(4e6 * 64)
    build(sized, tmp_path, suite="demo", command=COMMAND)
    assert (tmp_path / "figures" / "toy_sizes.png").exists() and "deployment texts" in (tmp_path / "figures" / "toy_sizes.svg").read_text()
    page = (tmp_path / "index.html").read_text()
    assert "over the number of deployment texts" in page and "By the number of deployment texts" in page
    assert "1024 texts" in (tmp_path / "tables" / "toy.md").read_text()


def test_sizes_are_compared_over_the_same_seeds():
    """Of five seeds three were deployed at one size alone: means over two seeds at every size, and a note about the others."""
    rows = []
    for seed in range(5):
        for size in (None, 64, 256) if seed < 2 else (None, 256):
            rows.append({**row(method="dpg", seed=seed, value=0.9 - 0.2 * seed), "deployment_texts": size})
    results = read_frame(pd.DataFrame(rows), "demo")
    (table,) = size_tables(results.tasks[0], results)
    (dpg,) = table.rows
    assert [dpg.cells[place].value for place in (1, 3)] == pytest.approx([0.8, 0.8])
    assert table.notes == ("dpg, seed 2, 3, 4: not deployed at every size and left out (result.json says why).",)
