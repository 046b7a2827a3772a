"""Which models a scale names, read from their configuration files alone: without torch, before anything heavy is loaded.

A model is the name of one on the model hub, a local folder as `save_pretrained` writes it, or "phrasebook", the embedded weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import UserError
from dpgbench.core.settings import Scale, Training
from dpgbench.worlds import phrasebook, text_files

ROLES = ("generator", "target")
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
CAUSAL = ("ForCausalLM", "LMHeadModel")  # how transformers ends the names of classes that predict the next token
# The files of a folder that decide what a model writes: weights, settings, tokenizer, chat template. A trainer leaves others beside them.
DECIDE = {".safetensors", ".bin", ".json", ".jinja", ".txt", ".model", ".tiktoken"}
DO_NOT_DECIDE = {"training_args.bin", "optimizer.bin", "scheduler.bin", "trainer_state.json", "all_results.json", "train_results.json"}
CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx")  # what configurations call the longest context


def smollm2_folder() -> Path:
    """Where SmolLM2 is kept once it was converted from the weights in a registry package (`models.load_generator`)."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dpgbench" / "smollm2-135m-instruct-from-q4_1"


@dataclass(frozen=True)
class ModelFiles:
    """One model of a scale."""

    role: str
    name: str
    config: Mapping[str, Any]
    """config.json as it is: what a class has for a default may be missing."""
    folder: Path | None
    """Where its files are, if it is a local one."""
    commit: str | None
    """Of the hub's repository, if it is there."""

    @property
    def context(self) -> int | None:
        """The longest context in tokens, where the configuration says."""
        return next((self.config[key] for key in CONTEXT if type(self.config.get(key)) is int and self.config[key] > 0), None)

    def about(self) -> dict[str, Any]:
        """What a result says of its models: the hub's commit, or the digest of a local folder."""
        return {"name": self.name, "revision": self.commit} if self.folder is None else {"name": self.name, "sha256": digest(self.folder)}


def find(scale: Scale, role: str, *, online: bool = True) -> ModelFiles:
    """The files of a scale's model, from the hub's cache if they are there. Raises UserError, one line that says why not and what to do.

    `online=False` asks nobody: what is in no cache is not found.
    """
    name, revision = str(scale[role]), scale.get(f"{role}_revision")
    folder = _folder(role, name)
    _check_content(scale, role, folder)
    if folder is not None and revision is not None:
        raise UserError(f"scale.{role}_revision={revision}: {name} is a folder, which has no revisions; write {role}_revision=null")
    where = _Where(f"scale.{role}={name}", name, folder, revision, online)
    path = where.file("config.json")
    if path is None:
        raise UserError(f"scale.{role}={name}: no config.json there, so not a model of transformers; give one that `save_pretrained` wrote")
    try:
        config = _object(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"scale.{role}={name}: its config.json cannot be read ({type(error).__name__}); get the model anew") from None
    commit = path.parent.name if folder is None and re.fullmatch(r"[0-9a-f]{40}", path.parent.name) else revision
    return ModelFiles(role, name, config, folder, commit)


def digests(scale: Mapping[str, Any]) -> dict[str, str]:
    """Of a scale's local folders, as `generator_sha256` and `target_sha256`: what stands for their paths in a cell.

    What has a name of its own, the embedded models and the hub's, has none. Cost: `digest`.
    """
    return {f"{role}_sha256": digest(Path(str(scale[role])).expanduser()) for role in ROLES if is_folder(str(scale[role]))}


def is_folder(model: str) -> bool:
    """Whether a model is a local folder and none of those that have a name of their own."""
    try:
        return model not in ("phrasebook", SMOLLM2) and Path(model).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL, a home that nobody has
        return False


def digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the files that decide what a model writes, in hex.

    Cost: a second or so per gigabyte and core, once per process and state of the files. Raises UserError if one cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            kept = [entry for entry in entries if Path(entry.name).suffix in DECIDE and entry.name not in DO_NOT_DECIDE and entry.is_file()]
            states = sorted((entry.name, found.st_ino, found.st_size, found.st_mtime_ns) for entry in kept for found in [entry.stat()])
        return _digest(folder, tuple(states))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); give a folder you may read") from None


@cache
def _digest(folder: Path, states: tuple[tuple[str, int, int, int], ...]) -> str:
    """Of a folder whose files are in these states."""
    names = [name for name, *_ in states]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets other threads run
        found = pool.map(lambda name: text_files.digest(folder / name), names)
        return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in zip(names, found, strict=True)).encode()).hexdigest()


def _check_content(scale: Scale, role: str, folder: Path | None) -> None:
    """Raises UserError where a cell was made with the content of a local folder, and this is not it."""
    made_with = scale.get(f"{role}_sha256")
    if made_with is None:
        return
    said = f"scale.{role}={scale[role]}"
    if folder is None:  # and is never asked for on the hub, where a stranger's may have that name
        raise UserError(f"{said}: no such folder here, and this cell was made with one; bring it back, or start a new cell")
    if (found := digest(folder)) != made_with:
        raise UserError(
            f"{said}: its content has SHA-256 {found[:12]}..., and this cell was made for {made_with[:12]}...; bring the old folder back, "
            "or start a new cell"
        )


def check(scale: Scale, training: Training) -> None:
    """Both models of a scale are there, causal, end their texts and are long enough. Raises UserError, one line, for the first that is not.

    Cost: a few kilobytes of each model from the hub, once.
    """
    for role in ROLES:
        files = find(scale, role)
        check_kind(files)
        where = _Where(f"scale.{role}={files.name}", files.name, files.folder, files.commit, True)
        settings = (_json(where.file(name)) for name in ("tokenizer_config.json", "special_tokens_map.json"))
        if files.config.get("eos_token_id") is None and not any(found.get("eos_token") for found in settings):
            raise no_end(role, files.name)
        if role == "target":
            _check_room(files, training.max_length, f"an example has training.max_length={training.max_length}")
        else:
            read, written = scale.get("max_prompt_tokens") or 0, scale.max_completion_tokens
            said = f"scale.max_prompt_tokens={read} and scale.max_completion_tokens={written}" if read else f"a completion has {written}"
            _check_room(files, read + written, said)
            _check_prompts(files, scale)


def check_cells(specs: Iterable[RunSpec]) -> None:
    """`check` for every different pair of models of some cells."""
    seen = set()
    for spec in specs:
        asked = json.dumps([spec.scale.plain(), spec.training.max_length], sort_keys=True)
        if asked not in seen:
            seen.add(asked)
            if SMOLLM2 not in (spec.scale.generator, spec.scale.target) or smollm2_folder().exists():
                check(spec.scale, spec.training)  # SmolLM2 may also come from a registry package, which loading it finds out


# Of transformers 5, those whose config.json need not say it: state spaces, recurrences, and mixtures of these with attention. The loaded
# configuration is asked again (`models`), which also finds kinds that came later.
RECURRENT = frozenset({
    "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "lfm3", "mamba",
    "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "zaya",
})  # fmt: skip
ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})


def check_kind(files: ModelFiles) -> None:
    """Raises UserError for a model that does not predict the next token."""
    classes, said = files.config.get("architectures") or [], f"scale.{files.role}={files.name}"
    if classes and not any(str(name).endswith(CAUSAL) for name in classes):
        raise UserError(f"{said}: {classes[0]} is not a causal language model; choose one whose config.json says ...ForCausalLM")
    if files.config.get("is_encoder_decoder"):
        raise UserError(f"{said}: an encoder and a decoder, and a causal language model is a decoder alone; choose one of these")
    check_attention(said, files.config.get("model_type"), files.config.get("layer_types"))


def check_attention(said: str, kind: object, layer_types: object) -> None:
    """Raises UserError for a model of which some layers do not attend: FLOPs are counted for attention (`bench.flops`)."""
    strange = set(map(str, layer_types)) - ATTENTION if isinstance(layer_types, (list, tuple)) else set()
    if kind in RECURRENT or strange:
        what = f"has layers of another kind ({', '.join(sorted(strange))})" if strange else "keeps a state from token to token"
        raise UserError(f"{said}: {kind} {what}, and FLOPs are counted for layers that attend; choose a model all of whose layers do")


def no_end(role: str, name: str) -> UserError:
    return UserError(f"scale.{role}={name}: its tokenizer has no end-of-sequence token, so texts cannot end; choose a model that has one")


def _check_room(files: ModelFiles, needed: int, said: str) -> None:
    if files.context is not None and needed > files.context:
        fix = f"training.max_length={files.context}" if files.role == "target" else "fewer of them"
        raise UserError(
            f"scale.{files.role}={files.name}: it reads {files.context} tokens and {said}; write {fix}, or choose another model"
        )


def _check_prompts(files: ModelFiles, scale: Scale) -> None:
    """`world.check_room`, and a user's own file is read; torch is loaded, by the tokenizer, only if some prompt may be too long."""
    from dpgbench.worlds import world
    from dpgbench.worlds.prompts import Room
    from dpgbench.worlds.user_corpora import no_limit

    most = None if files.context is None or scale.get("max_prompt_tokens") is not None else files.context - scale.max_completion_tokens
    if not text_files.is_passages(scale.corpus) and scale.corpus not in ("phrasebook", "topics"):
        if most is not None:
            raise no_limit(f"scale.corpus={scale.corpus}", most)
        return
    corpus = world.corpus(scale)
    if most is None or scale.generator == "phrasebook" == scale.corpus:
        return
    said = len((scale.get("instruction") or "").encode())
    if next(corpus.longest((most - said) // 2 - 512), None) is not None:  # so few bytes are surely no more tokens, template and all
        from transformers import AutoTokenizer

        try:
            where = {"revision": files.commit} if files.folder is None else {}
            tokenizer = AutoTokenizer.from_pretrained(files.folder or files.name, trust_remote_code=False, **where)
        except Exception:  # whatever a damaged file makes of it: loading the model says why
            return
        world.check_room(scale, world.corpus(scale, tokenizer), Room(scale, tokenizer, files.context))


def _folder(role: str, name: str) -> Path | None:
    """A local model's folder; None for a name on the hub."""
    if name == "phrasebook":
        return phrasebook.WEIGHTS / role
    if name == SMOLLM2 and smollm2_folder().exists():
        return smollm2_folder()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UserError(f"scale.{role}={name}: no such folder, nor a name on the model hub; give a folder or a name such as {SMOLLM2}")
    return None


@dataclass(frozen=True)
class _Where:
    """A model's files, wherever they are."""

    said: str
    name: str
    folder: Path | None
    revision: str | None
    online: bool

    def file(self, name: str) -> Path | None:
        """One of them; None if the model has no such file."""
        if self.folder is not None:
            return self.folder / name if (self.folder / name).exists() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )  # fmt: skip
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # the hub's retries are nobody's business: the lines below say what happened
        wanted = {"repo_id": self.name, "filename": name, "revision": self.revision}
        try:
            return Path(hf_hub_download(**wanted, local_files_only=True))
        except OSError as error:
            if not self.online:
                raise UserError(f"{self.said}: not in the model hub's cache ({type(error).__name__}); run a cell of it once") from None
        try:
            return Path(hf_hub_download(**wanted))
        except GatedRepoError:
            raise UserError(f"{self.said}: gated; accept its terms on its page of the model hub, then `hf auth login`") from None
        except RepositoryNotFoundError:
            fix = "check the name, or `hf auth login` if it is private; a local folder will do as well"
            raise UserError(f"{self.said}: the model hub has no such model; {fix}") from None
        except RevisionNotFoundError:
            raise UserError(f"{self.said}: it has no revision {self.revision}; give a commit, a tag or a branch of it, or null") from None
        except (LocalEntryNotFoundError, OSError) as error:  # before the next: a file that could not be asked for is an entry not found too
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return None
            reason = str(error).strip().splitlines()[0].split(". ")[0]
            raise UserError(f"{self.said}: cannot be loaded ({reason}); go online once, or give a local folder") from None


def _json(path: Path | None) -> dict[str, Any]:
    try:
        return {} if path is None else _object(path)
    except (OSError, ValueError, RecursionError):
        return {}


def _object(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path.name}: not an object")
    return found
