"""Tokenizers with chat templates of the usual shapes, over bytes: a library of small folders.

Each shape differs from the others in what ends an answer, and in what the template itself writes
around one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.small_models import CHATML
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set thoughts = '' %}{% if '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ thoughts }}\n</think>\n\n{% endif %}{% endif %}"
    "{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""With an empty block of thoughts before the last answer, as in Qwen3."""
THINKING = QWEN3.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
"""With a prompt that opens the block, as in Qwen3-Thinking."""
ALWAYS_THINKING = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}[THINK][/THINK]{% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""With an empty block before every answer."""
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final"
    "{% endif %}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""With a channel that the model chooses, and another end behind the last answer, as in gpt-oss."""
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('user and assistant alone') }}{% endif %}{% endfor %}"
)
"""Without a header: an answer follows the end of the question."""
HEADERLESS = CHATML.partition("{% if add_generation_prompt")[0]
"""With a header, but none where one is asked for."""
LINES = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""With nothing but a line feed behind an answer."""
QUOTED = CHATML.replace("{{ message['content'] }}", "\"{{ message['content'] }}\"")
WORDS = (
    "{% for m in messages %}### {{ m.role }}\n{{ m.content }} ### end\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)
"""With a text behind an answer, of several tokens, the last of which it shares with a line feed."""


@dataclass(frozen=True)
class Shape:
    """A tokenizer and its chat template."""

    template: str | dict[str, str] | None
    special: Sequence[str | AddedToken]
    """All but padding; their ids are 1, 2 and so on."""
    eos: str | None
    bos: str | None = None
    around: str | None = None
    """What the tokenizer itself puts around a text, as `<s> $A </s>`."""
    end: str = ""
    """What ends an answer and counts with it."""
    generation: Sequence[str] = ()
    """The tokens that end an answer by the settings of generation."""
    thoughts: Sequence[str] = ()
    """Tokens of their own that are not special."""


_IM = ("<|im_start|>", "<|im_end|>")
_THINK = ("<think>", "</think>")
SHAPES: dict[str, Shape] = {
    "chatml": Shape(CHATML, _IM, "<|im_end|>", end="<|im_end|>"),
    "gemma": Shape(
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "<bos>",
        around="<bos> $A",
        end="<end_of_turn>",
    ),
    "qwen3": Shape(QWEN3, _IM, "<|im_end|>", end="<|im_end|>", thoughts=_THINK),
    "thinking": Shape(THINKING, _IM, "<|im_end|>", end="<|im_end|>", thoughts=_THINK),
    "always thinking": Shape(ALWAYS_THINKING, ("</s>",), "</s>", end="</s>"),
    "channels": Shape(
        CHANNELS,
        ("<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|return|>"),
        "<|return|>",
        end="<|return|>",
    ),
    "llama3": Shape(
        LLAMA3,
        ("<|begin|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|end_of_text|>",
        "<|begin|>",
        around="<|begin|> $A",
        end="<|eot_id|>",
        generation=("<|end_of_text|>", "<|eot_id|>"),
    ),
    "phi3": Shape(
        PHI3,
        # These take the white space behind them, also a line feed of the template.
        (
            "<|endoftext|>",
            *(
                AddedToken(f"<|{one}|>", rstrip=True)
                for one in ("user", "assistant", "system", "end")
            ),
        ),
        "<|endoftext|>",
        end="<|end|>",
    ),
    "mistral": Shape(
        MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "<s>", around="<s> $A", end="</s>"
    ),
    "quoted": Shape(QUOTED, _IM, "<|im_end|>", end='"<|im_end|>'),
    "headerless": Shape(HEADERLESS, _IM, "<|im_end|>", end="<|im_end|>"),
    "lines": Shape(LINES, ("</s>",), "</s>", end="</s>"),
    "words": Shape(WORDS, ("</s>",), "</s>", end=" ### end"),
    "words without an end": Shape(WORDS, (), None, end=" ### end"),
}
PLAIN: dict[str, Shape] = {
    "bare": Shape(None, ("</s>",), "</s>", end="</s>"),
    "begins a text": Shape(None, ("<s>", "</s>"), "</s>", "<s>", around="<s> $A", end="</s>"),
    "ends a text": Shape(None, ("<s>", "</s>"), "</s>", "<s>", around="<s> $A </s>", end="</s>"),
    "ends without a beginning": Shape(None, ("</s>",), "</s>", around="$A </s>", end="</s>"),
    "one token for both": Shape(None, ("</s>",), "</s>", "</s>", around="</s> $A </s>", end="</s>"),
    "an end in config.json alone": Shape(None, ("<s>", "</s>"), None, "<s>", end="</s>"),
}
"""Tokenizers for `task.template = "plain"`."""


def save_shape(path: Path, shape: Shape) -> Path:
    """Saves a tokenizer, and a configuration without a model; returns `path`.

    Two line feeds are one token, and so are a `d` and a line feed.
    """
    names = [str(one) if isinstance(one, str) else one.content for one in shape.special]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: number for number, token in enumerate(["<pad>", *names, *alphabet, "ĊĊ", "dĊ"])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ"), ("d", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if shape.around is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=shape.around,
            special_tokens=[(one, vocabulary[one]) for one in names if one in shape.around],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token=shape.bos,
        eos_token=shape.eos,
        additional_special_tokens=[
            one
            for name, one in zip(names, shape.special, strict=True)
            if name not in (shape.bos, shape.eos)
        ],
    )
    fast.add_tokens(list(shape.thoughts))
    fast.chat_template = shape.template
    fast.save_pretrained(path)
    end = shape.eos or (shape.end if shape.end in names else None)
    config: dict[str, Any] = {"model_type": "llama", "vocab_size": len(fast)}
    config["eos_token_id"] = None if end is None else vocabulary[end]
    (path / "config.json").write_text(json.dumps(config))
    if shape.generation:
        settings = {"eos_token_id": [vocabulary[one] for one in shape.generation]}
        (path / "generation_config.json").write_text(json.dumps(settings))
    return path
