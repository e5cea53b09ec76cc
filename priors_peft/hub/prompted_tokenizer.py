"""A tokenizer with virtual tokens in its vocabulary that puts them before every text and conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..files import write_json
from .reading import read_json


# Texts on which the saved tokenizer is held against the base model's.
_PROBES = ("", "Hello, world", " 12 + 3 =\n", "naïve 日本語 🙂\n\n  x")
_PROMPT = "<|prompt|>"
ELSEWHERE = "export to peft, prefix or prompt-embeds instead"


def save_prompted_tokenizer(tokenizer: Any, count: int, folder: Path, with_token_types: bool) -> list[int]:
    """Save a tokenizer whose encodings begin with `count` new special tokens, before BOS.

    A post-processor in `tokenizer.json` puts them before plain text, the chat template before conversations.

    Args:
        tokenizer: The base model's; it is changed.
        count: Number P of virtual tokens.
        folder: Where it goes, beside the model's `config.json`.
        with_token_types: Whether the model takes `token_type_ids`.

    Returns:
        Ids of the virtual tokens.

    Raises:
        ValueError: The tokenizer is not one of the `tokenizers` library, or can't be given the tokens exactly.
    """
    from tokenizers import AddedToken, Tokenizer
    from transformers import AutoTokenizer

    name = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False) or not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(f"the tokenizer must be a fast one, with a tokenizer.json, got {name}: {ELSEWHERE}")
    expected = {text: tokenizer(text)["input_ids"] for text in _PROBES}
    conversations = {label: _conversation(tokenizer, label) for label in _labels(tokenizer)}

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    vocabulary = backend.get_vocab(with_added_tokens=True)
    stem = "prompt"
    while any(token.startswith(f"<|{stem}_") for token in vocabulary):
        stem = f"virtual_{stem}"
    tokens = [f"<|{stem}_{index}|>" for index in range(count)]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    after = max(vocabulary.values()) + 1
    ids = list(range(after, after + count))
    if ids != [backend.token_to_id(token) for token in tokens]:
        raise ValueError(
            f"the tokenizer must give new tokens the ids after its last, got others by {name}: {ELSEWHERE}"
        )

    described = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    described["post_processor"] = _prefixed(described["post_processor"], tokens, ids)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {label: "".join(tokens) + text for label, text in template.items()}
    elif template:
        tokenizer.chat_template = "".join(tokens) + template
    tokenizer.save_pretrained(folder)
    write_json(folder / "tokenizer.json", described)
    config = read_json(folder / "tokenizer_config.json")
    # The class that takes tokenizer.json as it is; model classes, in some versions, make their own post-processor.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("add_bos_token", "add_eos_token", "auto_map"):
        config.pop(key, None)
    if not with_token_types:
        config["model_input_names"] = ["input_ids", "attention_mask"]
    write_json(folder / "tokenizer_config.json", config)

    again = AutoTokenizer.from_pretrained(folder)
    wrong: list[str | None] = [text for text in _PROBES if again(text)["input_ids"] != ids + expected[text]]
    wrong += [
        label for label, old in conversations.items() if old is not None and _conversation(again, label) != ids + old
    ]
    if wrong:
        raise ValueError(
            f"the tokenizer must put the virtual tokens before a text and change nothing else, got other ids by {name} "
            f"for {wrong[0]!r}: {ELSEWHERE}"
        )
    return ids


def _labels(tokenizer: Any) -> list[str | None]:
    """Names of the chat templates; None for a lone one."""
    template = tokenizer.chat_template
    return list(template) if isinstance(template, dict) else [None] if template else []


def _conversation(tokenizer: Any, label: str | None) -> list[int] | None:
    """Ids of a short conversation, or None if the template has no use for one."""
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": "12 + 3 = ?"}]
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=label, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError):
        return None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _prefixed(processor: dict[str, Any] | None, tokens: list[str], ids: list[int]) -> dict[str, Any]:
    """A post-processor that puts tokens in front of what the given one makes."""
    first = {"SpecialToken": {"id": _PROMPT, "type_id": 0}}
    special = {_PROMPT: {"id": _PROMPT, "ids": ids, "tokens": tokens}}
    text, second = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
    template = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": special,
    }
    kind = processor["type"] if processor else None
    if processor is None:
        return template
    if kind == "TemplateProcessing":
        return processor | {
            "single": [first, *processor["single"]],
            "pair": [first, *processor["pair"]],
            "special_tokens": processor["special_tokens"] | special,
        }
    if kind == "ByteLevel":  # changes offsets only
        return {"type": "Sequence", "processors": [processor, template]}
    if kind == "Sequence":
        parts = processor["processors"]
        if all(part["type"] == "ByteLevel" for part in parts):
            return {"type": "Sequence", "processors": [*parts, template]}
        if [part["type"] for part in parts if part["type"] != "ByteLevel"] == ["TemplateProcessing"]:
            changed = [part if part["type"] == "ByteLevel" else _prefixed(part, tokens, ids) for part in parts]
            return processor | {"processors": changed}
    raise ValueError(f"the tokenizer's post-processor must be a template or none, got {kind}: {ELSEWHERE}")
