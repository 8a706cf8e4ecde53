"""Tiny random models of many architectures, with a tokenizer of words: for what must hold in each.

The configurations are those of Transformers, with small sizes by their usual names.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, BertTokenizerFast

WORDS = [f"w{number}" for number in range(40)]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = len(_SPECIAL) + len(WORDS)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_LLAMA = {**_SIZES, "num_key_value_heads": 1, "head_dim": 8}
_XLNET = {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 66}
_T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2}
_DISTIL = {"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 16, "n_heads": 2, "n_layers": 2}
_DEBERTA = {
    **_SIZES,
    "relative_attention": True,
    "position_buckets": 16,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
_TOWER = {
    "text_config": _LLAMA,
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
    "image_token_index": VOCABULARY - 1,
    "boi_token_index": VOCABULARY - 2,
    "eoi_token_index": VOCABULARY - 3,
}

ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": _SIZES,
    "Roberta": {**_SIZES, "pad_token_id": 1},
    "XLMRoberta": {**_SIZES, "pad_token_id": 1},
    "DistilBert": _DISTIL,
    "Electra": {**_SIZES, "embedding_size": 16},
    "MPNet": {**_SIZES, "pad_token_id": 1},
    "ModernBert": {**_SIZES, "cls_token_id": 2, "sep_token_id": 3},
    "XLNet": _XLNET,
}
DECODERS: dict[str, dict[str, Any]] = {
    "Llama": _LLAMA,
    "Mistral": _LLAMA,
    "Qwen2": _LLAMA,
    "Qwen3": _LLAMA,
    "Gemma": _LLAMA,
    "Gemma2": _LLAMA,
    "Phi": _SIZES,
    "Phi3": _LLAMA,
    "GPT2": _GPT2,
    "GPTNeoX": _SIZES,
    "GPTJ": {**_GPT2, "rotary_dim": 4},
    "Bloom": {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "OPT": {**_SIZES, "ffn_dim": 16, "word_embed_proj_dim": 16},
    "Falcon": _SIZES,
    "StableLm": _LLAMA,
    "Olmo2": _LLAMA,
    "Granite": _LLAMA,
    "Starcoder2": _LLAMA,
    "Cohere": _LLAMA,
}
OTHERS: dict[str, dict[str, Any]] = {
    "DebertaV2": _DEBERTA,
    "Albert": {**_SIZES, "embedding_size": 16},
    "T5": _T5,
    "Bart": {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
    },
    "Mamba": {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2},
    "Gemma3": _TOWER,
}
"""Those with a peculiarity of their own."""


def save_architecture(folder: Path, kind: str, *, causal: bool = False, **changes: Any) -> Path:
    """Saves a random model and its tokenizer.

    Args:
        folder: of both; also returned.
        kind: one of `ENCODERS`, `DECODERS` or `OTHERS`.
        causal: whether it has the output layer of a language model.
        changes: of its configuration.
    """
    torch.manual_seed(1)
    settings = {**ENCODERS, **DECODERS, **OTHERS}[kind]
    config = getattr(transformers, f"{kind}Config")(**{**settings, **changes})
    # XLNet's configuration makes sizes of its own.
    (AutoModelForCausalLM if causal else AutoModel).from_config(config).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate([*_SPECIAL, *WORDS])}
    BertTokenizerFast(vocab=vocabulary, bos_token="[CLS]", eos_token="[SEP]").save_pretrained(
        folder
    )
    return folder
