"""A finished cell as something to use: its generator as a transformers folder, its deployment dataset ready for fine-tuning.

A cell keeps what its last scored snapshot was made with and of, beside its result, replaced at every scored snapshot:

    deployment.jsonl        the deployment dataset, a {"prompt", "text"} a line
    generator.safetensors   the generator's weights, for methods that train it (`Snapshot.weights`), unless scale.keep_generator=false;
                            its low-rank adapters alone, where those are what was trained

`export` makes of them, in a folder that `transformers` and `datasets` read and that needs nothing of dpgbench:

    README.md               what it is, the curve, the settings
    generator/              config, model.safetensors, tokenizer with its chat template; only where the method trained it. Low-rank
                            adapters are merged into it
    adapter/                and as peft reads them, where there are some
    dataset/train.jsonl     {"text": ...} a line, what the target was trained on: the texts alone
    spec.yaml               `python -m dpgbench run spec=spec.yaml` runs the cell again
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpgbench.core.cell import RunSpec
from dpgbench.core.documents import Unreadable, json_of
from dpgbench.core.errors import UserError
from dpgbench.core.files import replacing, write_atomically
from dpgbench.core.plugin_types import Prompt, Snapshot
from dpgbench.store.checkpoints import write_tensors
from dpgbench.store.run_folder import RunFolder, read_lines
from dpgbench.worlds import adapters

if TYPE_CHECKING:
    from torch import Tensor

DATASET, WEIGHTS = "deployment.jsonl", "generator.safetensors"


def keep(folder: RunFolder, snapshot: Snapshot, prompts: Sequence[Prompt], texts: Sequence[str]) -> None:
    """Put a scored snapshot's dataset and weights into its run folder, over those of the one before. Cost: the weights' bytes to disk."""
    folder.check_owned()
    lines = (json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) for prompt, text in zip(prompts, texts, strict=True))
    write_atomically(folder.path / DATASET, ("\n".join(lines) + "\n").encode("utf-8", "replace"))
    if snapshot.weights is not None and folder.spec.scale.get("keep_generator", True):
        _write_weights(folder.path / WEIGHTS, snapshot.weights())


def _write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    write_tensors(path, {name: weight.detach().cpu().contiguous() for name, weight in weights.items()})


def export(run: Path, to: Path | None = None) -> Path:
    """Write the folder of the module's docstring to `to` (default: `export` inside the run folder). Returns it.

    Raises UserError if the cell is not finished, has kept no dataset, or the folder is there already.
    """
    run, to = Path(run), Path(to) if to is not None else Path(run) / "export"
    if not (run / "spec.yaml").exists():
        raise UserError(f"{run}: not a run folder; give one of results/runs/, such as `python -m dpgbench status` lists")
    folder = RunFolder(run)
    state = folder.state()
    if state.name != "done":
        raise UserError(f"{run}: the cell is {state.name}, and only a finished one has a result; `run spec={run}/spec.yaml` finishes it")
    if not (run / DATASET).exists():
        raise UserError(f"{run}: finished before datasets were kept; delete the folder and `run` the cell again")
    if to.exists():
        raise UserError(f"{to}: there is something already; delete it, or give another folder with to=DIR")
    spec, result = RunSpec(folder.config()), folder.scored()
    try:
        env = json_of(folder.text("env.json"))
        card = _readme(spec, result, env, (run / WEIGHTS).exists())
    except (Unreadable, KeyError, TypeError, AttributeError, ValueError) as error:  # of files that another program wrote, or a stranger
        raise UserError(f"{run}: its files are not a cell's ({' '.join(str(error).split())}); `run spec={run}/spec.yaml` again") from None
    folder.whole(DATASET)
    with replacing(to) as partial:
        (partial / "dataset").mkdir(parents=True)
        if (run / WEIGHTS).exists():
            _write_generator(spec, folder.whole(WEIGHTS), partial / "generator")
        texts = [line["text"] for line in read_lines(run / DATASET) if isinstance(line.get("text"), str)]
        rows = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
        (partial / "dataset" / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        shutil.copy(run / "spec.yaml", partial / "spec.yaml")
        (partial / "README.md").write_text(card, encoding="utf-8")
    return to


def _write_generator(spec: RunSpec, weights: Path, to: Path) -> None:
    """The scale's generator with these weights, as `from_pretrained` reads it."""
    import torch
    from safetensors.torch import load_file

    from dpgbench.worlds.models import load_generator, quiet

    quiet()
    generator, kept, lora = load_generator(spec.scale), load_file(weights), adapters.settings(spec.method)
    generator.adapt(lora, seed=0)
    parameters = adapters.trained(generator.model)
    if {name: value.shape for name, value in kept.items()} != {name: value.shape for name, value in parameters.items()}:
        raise UserError(f"{weights}: not weights of scale.generator={spec.scale.generator}; delete the folder and run the cell again")
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(kept[name])
    if lora is not None:
        generator.model.peft_config["default"].base_model_name_or_path = spec.scale.generator  # and not the folder it was loaded from
        generator.model.save_pretrained(to.parent / "adapter", save_embedding_layers=False)
        (to.parent / "adapter" / "README.md").unlink(missing_ok=True)  # peft's template of a card; the folder has its own
        generator.model = generator.model.merge_and_unload()
    generator.model.save_pretrained(to)
    generator.tokenizer.save_pretrained(to)


def _readme(spec: RunSpec, result: Mapping[str, Any], env: Mapping[str, Any], trained: bool) -> str:
    """The folder's card: what was made, how far it got, with what."""
    from omegaconf import OmegaConf

    scale, headline = spec.scale, result["headline"]
    if trained:
        generator = LOADS + (ADAPTER if adapters.settings(spec.method) else "")
    elif scale.get("keep_generator", True):
        generator = f"The method leaves the generator as it was: {scale.generator}."
    else:
        generator = f"Its weights were not kept (scale.keep_generator=false); it started as {scale.generator}."
    names = ["step", *([headline] if headline != "phi" else []), "phi", "FLOPs", "generated tokens"]
    rows = [names, ["---"] * len(names)]
    for line in result["snapshots"]:
        values = {**line["measures"], "phi": line["phi"]}
        told = [f"{values[name]:.6g}" for name in names[1:-2]]
        rows.append([str(line["snapshot"]), *told, f"{line['flops']:.3g}", str(line["tokens_generated"])])
    return CARD.format(
        task=spec.task.label, method=spec.method.label, scale=scale.name, seed=spec.seed, generator=generator, target=scale.target,
        count=scale.deployment_texts, direction="higher" if result["higher_is_better"] else "lower", headline=headline,
        curve="\n".join(f"| {' | '.join(row)} |" for row in rows), commit=env.get("commit") or "unknown", device=env["device"],
        spec=OmegaConf.to_yaml(OmegaConf.create(dict(spec.config))).rstrip(),
    )  # fmt: skip


LOADS = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

generator = AutoModelForCausalLM.from_pretrained("generator")
tokenizer = AutoTokenizer.from_pretrained("generator")
```

It was sampled at temperature 1 from the full distribution, which is what its `generation_config.json` says now, and trained without
dropout, which is 0 in its `config.json`."""

ADAPTER = """

Only low-rank adapters were trained: `generator` has them merged into its weights; `adapter` is they alone, for peft's `PeftModel`."""

CARD = """\
---
configs:
- config_name: default
  data_files: dataset/train.jsonl
---

# {task}, {method}, scale {scale}, seed {seed}

A dpgbench cell: training text made to move a target model, and who wrote it.

## Generator

{generator}

## Dataset

`dataset/train.jsonl`: {count} texts, one for each held-out prompt. The target, {target}, was fine-tuned on the texts alone, without
their prompts, each with an end of sequence. To do the same with another model:

```python
from datasets import load_dataset
from trl import SFTTrainer

trainer = SFTTrainer("another-model", train_dataset=load_dataset("json", data_files="dataset/train.jsonl", split="train"))
trainer.train()
```

## Curve

Each row: a fresh target trained on a dataset that was drawn at that step. {headline}: {direction} is better; phi: higher is better.

{curve}

## Settings

dpgbench commit {commit}, device {device}. `python -m dpgbench run spec=spec.yaml` runs the cell again.

```yaml
{spec}
```
"""
