"""What `new task` and `new method` write: the two files of a small plug-in that runs as it is, for its author to change."""

from __future__ import annotations

import re
from pathlib import Path

from dpgbench.core.errors import UserError
from dpgbench.plugins.registry import Registry
from dpgbench.plugins.source import Kind

RESERVED = ("all", "null", "none", "true", "false")  # words that mean something else on the command line

TASK = '''\
"""Make a word of your choice open the target's texts: Phi = log p(word | no context)."""

import torch

from dpgbench.api import Task


class {name}(Task):
    version = 1  # raise it when the numbers change
    headline = "probability"  # the entry of `measure` that tables and plots lead with
    higher_is_better = True  # of the headline; of Phi it always is

    def prepare(self, world):
        """Once per cell, before anything else: `world` has the initial target, its tokenizer, and held-out texts."""
        super().prepare(world)
        tokenizer = world.target_tokenizer
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.start = torch.tensor([[start]], device=world.target.device)
        self.word = tokenizer(self.options.word, add_special_tokens=False)["input_ids"][0]  # its first token

    def signal(self, model):
        """Phi: a 0-d tensor, higher is better, differentiable in the model's parameters."""
        return model(input_ids=self.start).logits[0, 0].log_softmax(-1)[self.word]

    def measure(self, model, texts):
        """What people read: numbers about the trained target, and about the texts it was trained on."""
        with_word = sum(self.options.word in text.lower() for text in texts)
        return {{"probability": self.signal(model).exp().item(), "share_with_word": with_word / len(texts)}}

    def hint(self):
        """The goal in words, for methods that prompt. Leave it out where there are none; `score`, `references`, `draw` likewise."""
        return f"Write about {{self.options.word}}."
'''
TASK_OPTIONS = """\
# Options of the task: task.word=today on the command line, or word=today, stands over what is written here.
name: {file}
word: tonight
"""
METHOD = '''\
"""The longest of n texts per prompt, as an example: best of n by a score that no task asked for."""

from dpgbench.api import Method, Snapshot, UserError


class {name}(Method):
    version = 1  # raise it when the numbers change

    def __init__(self, options):
        """Reject bad options here, before anything heavy is loaded; so import no torch at the top of this file."""
        super().__init__(options)
        if options.n < 1:
            raise UserError(f"method.n={{options.n}}: a text or more per prompt; write n=4")

    def run(self, bench):
        """Yield a snapshot whenever there is a new answer. Whatever `bench` does for you is charged to the method."""

        def longest(prompts):
            drawn = [bench.sample(prompts, "deployment", number) for number in range(self.options.n)]
            return [max(texts, key=len) for texts in zip(*drawn, strict=True)]

        yield Snapshot(step=self.options.n, sample=longest)
'''
METHOD_OPTIONS = """\
# Options of the method: method.n=8 on the command line, or n=8, stands over what is written here.
name: {file}
n: 4  # texts drawn per prompt
"""
TEXTS = {"task": (TASK, TASK_OPTIONS), "method": (METHOD, METHOD_OPTIONS)}


def write(kind: Kind, name: str, folder: Path) -> list[Path]:
    """The Python file and the YAML of a new plug-in. Nothing is ever overwritten; raises UserError for a name that cannot be had."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name.lower() in RESERVED:
        example = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_").lower()
        example = example if re.match("[a-z]", example) and example not in RESERVED else f"my_{kind}"
        raise UserError(f"new {kind} {name}: a name is letters, digits and _, a letter first, and not {', '.join(RESERVED)}; try {example}")
    there = any((folder / part).is_dir() for part in ("methods", "tasks", "configs"))
    registry = Registry(folder if there else None)
    taken = registry.presets(kind) | {file.name: file.path for file in registry.files(kind)}
    paths = [folder / f"{kind}s" / f"{name}.py", folder / "configs" / kind / f"{name}.yaml"]
    for path in [*([taken[name]] if name in taken else []), *(path for path in paths if path.exists())]:
        raise UserError(f"new {kind} {name}: {path} is there already; choose another name, or edit that one")
    class_name = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    try:
        for path, text in zip(paths, TEXTS[kind], strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "x", encoding="utf-8") as file:
                file.write(text.format(name=class_name, file=name))
    except OSError as error:
        raise UserError(f"plugins={folder}: cannot write {path} ({error.strerror}); give another folder with plugins=DIR") from None
    return paths
