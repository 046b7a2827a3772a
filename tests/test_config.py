"""Words on the command line become cells, and bad words one clear line."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from dpgbench import config
from dpgbench.api import Options
from dpgbench.config.compose import Composer
from dpgbench.config.values import GROUPS
from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import UserError
from dpgbench.core.paths import home
from dpgbench.plugins.registry import Registry


def cells(*words: str):
    return config.read(words, sweep=True).cells


def message(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        config.read(words, sweep=True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_grid_is_the_product_and_a_key_leaves_alone_what_does_not_have_it():
    """`n` belongs to best-of-n only, so base and dpg are not multiplied by it."""
    specs = [cell.spec for cell in cells("task=language,sixseven", "method=base,dpg,active_inheritance", "n=4,16", "seed=0,1")]
    assert len(specs) == 2 * (1 + 1 + 2) * 2
    assert {spec.method.label for spec in specs} == {"base", "dpg", "active_inheritance_n4", "active_inheritance_n16"}


def test_bare_keys_are_short_for_the_only_option_of_that_name():
    """`steps=2` and `policy.steps=2` are one cell; `lang=es` reaches the task."""
    (short,), (full,) = cells("steps=2", "lang=es"), cells("policy.steps=2", "task.lang=es")
    assert short.spec.hash == full.spec.hash
    assert short.spec.method.policy.steps == 2 and short.spec.task.label == "language_es"


def test_models_have_a_name_of_their_own():
    """`model.generator` is `scale.generator`, its revision and dtype too; naming it both ways is naming it twice."""
    (one,), (other,) = (
        cells("task=l2_norm", f"{name}.generator=some/model", f"{name}.target_dtype=bfloat16") for name in ("model", "scale")
    )
    assert one.spec.hash == other.spec.hash and one.spec.scale.generator == "some/model"
    assert "scale.generator is given twice" in message("model.generator=a/b", "scale.generator=a/b")
    assert "no chosen task, method or scale has this option" in message("model.lr=1")


def test_hash_covers_what_changes_the_numbers_and_nothing_else():
    """Seed, option and version change it; launcher and results folder do not."""
    (plain,), (local,) = cells("seed=0"), cells("seed=0", "launcher=local", "workers=7", "results=elsewhere")
    assert plain.spec.hash == local.spec.hash
    others = [cells("seed=1")[0], cells("seed=0", "policy.lr=0.5")[0], cells("seed=0", "training.eps_root=1e-3")[0]]
    assert len({cell.spec.hash for cell in others} | {plain.spec.hash}) == 4
    newer = {**plain.spec.config, "method": {**plain.spec.config["method"], "version": 99}}
    assert RunSpec(newer).hash != plain.spec.hash


def test_adapters_are_part_of_the_cell_and_their_settings_only_with_them():
    """A rank is another cell, for each method that trains; without one, what adapters would have been is none's business."""
    for method in ("dpg", "active_inheritance_rounds"):
        plain, adapted, other, idle = (
            cells(f"method={method}", *words)[0].spec
            for words in ((), ("rank=4",), ("rank=4", "policy.lora.targets=[c_attn]"), ("policy.lora.alpha=8",))
        )
        assert len({plain.hash, adapted.hash, other.hash}) == 3 and idle.hash == plain.hash
    section = {key: value for key, value in plain.config["method"].items() if key != "lora"}
    assert RunSpec({**plain.config, "method": section}).hash == plain.hash, "as stored before there were adapters"
    assert cells("method=base", "rank=4")[0].spec.hash == cells("method=base")[0].spec.hash


def test_a_policy_is_part_of_methods_that_train_one():
    """base has no policy section, so its cells do not change with the policy's settings."""
    (one,), (other,) = cells("method=base"), cells("method=base", "policy.lr=0.5")
    assert one.spec.hash == other.spec.hash


def test_sweep_overrides_and_suites():
    """Words after a suite are put over each of its lines."""
    assert len(cells("suite=quickstart")) == 2 * len(cells("suite=quickstart", "seed=5"))
    of_another_task = cells("suite=paper_language", "task=sixseven")  # the suite's lang= has no use then
    assert {cell.spec.task.name for cell in of_another_task} == {"sixseven"}


def test_replay_gives_the_same_cell(tmp_path):
    """spec.yaml holds everything: reading it back gives the same hash."""
    from omegaconf import OmegaConf

    (cell,) = cells("task=sixseven", "seed=3", "policy.lr=2e-3")
    path = tmp_path / "spec.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(dict(cell.spec.config))))
    assert config.replay(path, Registry()).spec.hash == cell.spec.hash


def test_run_takes_one_cell():
    with pytest.raises(UserError, match="use `sweep`"):
        config.read(["seed=0,1"], sweep=False)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["task=lenguage"], "did you mean 'language'"),
        (["method=dgp"], "did you mean 'dpg'"),
        (["scale=tinny"], "did you mean 'tiny'"),
        (["launcher=slrm"], "launcher=slrm: no such launcher"),
        (["suite=quikstart"], "did you mean 'quickstart'"),
        (["lang=en"], "task.lang=en: no such language"),
        (["labels=none"], "task.labels=none"),
        (["steps=0"], "policy.steps=0"),
        (["steps=2.5"], "expected a whole number"),
        (["steps=many"], "expected a whole number"),
        (["group_size=1"], "policy.group_size=1: an advantage compares completions"),
        (
            ["completions=250", "group_size=4"],
            "policy.completions=250: must divide into groups of group_size=4; write completions=248",
        ),
        (["minibatch=48", "completions=256"], "policy.minibatch=48: must divide a step's completions, 256"),
        (["policy.micro_batch=48"], "policy.micro_batch=48: must divide"),
        (["policy.lr=0"], "policy.lr=0"),
        (["training.lr=nan"], "must be finite"),
        (["optimizer=adam"], "did you mean 'adamw'"),
        (["inner_steps=3"], "must divide into inner_steps=3 batches"),
        (["deployment_steps=7"], "must divide into deployment_steps=7 batches; write deployment_texts=1022"),
        (["deployment_steps=0"], "scale.deployment_steps=0: at least one optimizer step"),
        (["instruction=' '"], "scale.instruction= : a sentence or null"),
        (["averaging=1"], "policy.averaging=1.0: a decay is at least 0 and below 1"),
        (["scale_advantages=global"], "policy.scale_advantages=global"),
        (["policy.lora.rank=0"], "policy.lora.rank=0: a rank is a whole number from 1 up, or null for no adapters"),
        (["policy.lora.rank=2.5"], "policy.lora.rank=2.5: a rank is a whole number"),
        (["rank=4", "policy.lora.alpha=0"], "policy.lora.alpha=0.0: a positive number"),
        (
            ["rank=4", "policy.lora.targets=q_proj"],
            "policy.lora.targets=q_proj: expected a list, such as policy.lora.targets=[all-linear]",
        ),
        (["method=active_inheritance_rounds", "rank=many"], "policy.lora.rank=many"),
        (["method=active_inheritance", "n=0"], "method.n=0"),
        (["method=active_inheritance", "criterion=best"], "no such criterion"),
        (["seed=-1"], "seed=-1"),
        (["stepps=3"], "did you mean policy.steps"),
        (["lr=1"], "could mean"),
        (["steps"], "arguments are key=value"),
        (["seed=0", "seed=1"], "seed is given twice"),
        (["snapshots=0"], "scale.snapshots=0"),
        (["plugins=/nowhere"], "no methods/, tasks/ or configs/ folder"),
    ],
)
def test_bad_words_are_one_line_that_names_value_rule_and_fix(words, says):
    assert says in message(*words)


def test_an_impossible_combination_is_skipped_with_its_reason():
    """Skipped, not failed: the rest of a sweep goes on."""
    (cell,) = cells("task=sixseven", "method=active_inheritance", "criterion=score")
    assert "no black-box score" in cell.skip


def test_options_are_read_only_views():
    options = Options({"lr": 1.0, "policy": {"steps": 2}})
    assert options.policy.steps == 2 and options.plain() == {"lr": 1.0, "policy": {"steps": 2}}
    with pytest.raises(AttributeError, match="no option 'speed'"):
        options.speed  # noqa: B018


@pytest.mark.slow
def test_every_choice_of_files_is_what_hydra_composes():
    """Files are composed one by one and merged, because choices multiply and files do not: the outcome is Hydra's own."""
    from hydra import compose, initialize_config_dir

    registry = Registry()
    composer = Composer(registry)
    files = {group: list(registry.presets(group)) for group in GROUPS}
    choices = [("language", "dpg", scale, launcher) for scale in files["scale"] for launcher in files["launcher"]]
    choices += [(task, "dpg", "tiny", "inline") for task in files["task"]] + [
        ("qr", method, "tiny", "inline") for method in files["method"]
    ]
    for names in choices:
        with initialize_config_dir(str(home() / "configs"), version_base="1.3"):
            whole = compose("config", [f"{group}={name}" for group, name in zip(GROUPS, names, strict=True)])
        assert OmegaConf.to_container(composer._compose(names)) == OmegaConf.to_container(whole), names
