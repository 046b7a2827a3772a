"""A randomly initialised model of SmolLM2-135M's shape, with a tokenizer trained here: as fast as the real one, and nothing more.

python benchmarks/random_smollm2.py FOLDER      517 MB; --smoke: two layers of width 64
python benchmarks/random_smollm2.py --is-there  "yes" if the real one can be loaded without a network
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Of the published config.json; the rest is transformers' own default.
SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 100000, "tie_word_embeddings": True,
}  # fmt: skip
SMOKE = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def is_there() -> bool:
    from huggingface_hub import try_to_load_from_cache

    from dpgbench.worlds.model_files import SMOLLM2, smollm2_folder

    return smollm2_folder().exists() or isinstance(try_to_load_from_cache(SMOLLM2, "config.json"), str)


def make(folder: Path, smoke: bool) -> None:
    from pydoc_data import topics

    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    shape = SHAPE | (SMOKE if smoke else {})
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=shape["vocab_size"], special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(topics.topics.values(), trainer)
    missing = shape["vocab_size"] - tokenizer.get_vocab_size()  # so that every token the model can write is one the tokenizer knows
    tokenizer.add_tokens([f"<word {number}>" for number in range(missing)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=TEMPLATE)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    LlamaForCausalLM(LlamaConfig(**shape, **ids)).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--is-there", action="store_true")
    options = parser.parse_args()
    if options.is_there:
        print("yes" if is_there() else "no")
    elif options.folder is None:
        parser.error("FOLDER is missing: where the model goes")
    else:
        make(options.folder, options.smoke)


if __name__ == "__main__":
    main()
