"""Tiny models of every architecture that matters, built from their configurations, and a tokenizer for them."""

import copy
import gc
import itertools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hub.loopback import TOKEN, LoopbackHub


# Where the client would go is read when it is imported; only tests that take the fixture `hub` let it go there.
HUB = LoopbackHub()
for name in ("HF_ENDPOINT", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[name] = HUB.environment()[name]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("HF_TOKEN", None)

import huggingface_hub
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
)

from priors_peft.files import cache_dir


torch.set_num_threads(1)

VOCABULARY = 96
WIDTH = 32
LAYERS = 3

_SHARED = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **_SHARED,
    ),
    "gpt2": GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=128, **_SHARED),
    "bloom": BloomConfig(hidden_size=WIDTH, n_layer=LAYERS, n_head=4, **_SHARED),
    "opt": OPTConfig(
        hidden_size=WIDTH,
        ffn_dim=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=WIDTH,
        **_SHARED,
    ),
    "neox": GPTNeoXConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=128,
        **_SHARED,
    ),
    # Scaled embeddings, sliding windows, soft-capped logits, heads wider than hidden_size / heads.
    "gemma2": Gemma2Config(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=64,
        max_position_embeddings=128,
        final_logit_softcapping=5.0,
        **_SHARED,
    ),
}


def pytest_collection_finish() -> None:
    """Modules and tests stay: `Trainer` collects garbage whenever it starts, and need not look through them each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tests fit their priors into a cache of their own; the bundled model and its data stay where the user has them."""
    shared, own = cache_dir(), tmp_path_factory.mktemp("cache")
    for name in ("models", "math"):
        (shared / name).mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(shared / name)
    os.environ["PRIORS_PEFT_CACHE"] = str(own)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> LoopbackHub:
    """An empty Hub that this process is logged in to; the client's waiting between tries takes no time."""
    HUB.reset()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return HUB


@pytest.fixture(params=list(CONFIGS))
def architecture(request) -> str:
    return request.param


def pairwise(*factors: Iterable[Any]) -> list[Any]:
    """Every combination, the slow ones marked: among the others each two values of two factors meet at least once."""
    combinations = list(itertools.product(*map(list, factors)))

    def pairs(combination: tuple) -> set[tuple]:
        return set(itertools.combinations(enumerate(combination), 2))

    fast, unmet = set(), set().union(*map(pairs, combinations))
    while unmet:
        fast.add(most := max(combinations, key=lambda one: len(pairs(one) & unmet)))
        unmet -= pairs(most)
    return [pytest.param(*one, marks=[] if one in fast else [pytest.mark.slow]) for one in combinations]


def make_model(architecture: str = "llama", seed: int = 0):
    """A tiny model in evaluation mode whose weights are large enough for differences to show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[architecture]), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model.eval()


def make_tokenizer():
    """A whitespace tokenizer over digits and a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "Question:", "Answer:", "plus", "is", "what", "?"]
    words += [str(number) for number in range(80)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def addition_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """Prompt-completion rows of sums below 80."""
    pairs = [(a, b) for a in range(40) for b in range(40)]
    chosen = [pairs[(start + index) * 7 % len(pairs)] for index in range(count)]
    return [{"prompt": f"Question: what is {a} plus {b} ? Answer:", "completion": f" {a + b}"} for a, b in chosen]


# SuperGLUE's answers in the tokenizer's words.
SUPERGLUE_KWARGS = {
    "superglue:rte": {"verbalizer": {"entailment": "5", "not_entailment": "6"}},
    **{f"superglue:{name}": {"verbalizer": {"False": "7", "True": "8"}} for name in ("wsc", "boolq", "wic")},
}


def write_superglue(folder: Path, count: int = 16) -> str:
    """RTE, WSC, BoolQ and WiC as they are published, in words of the tokenizer."""
    spans = {"span1_text": "1", "span1_index": 0, "span2_text": "2", "span2_index": 1}
    rows: dict[str, Callable[[int], dict]] = {
        "RTE": lambda n: {"premise": f"what is {n}", "hypothesis": f"is {n % 5} ?", "label": ("entailment", "not_entailment")[n % 2]},
        "WSC": lambda n: {"text": f"1 2 plus {n}", "target": spans, "label": n % 3 == 0},
        "BoolQ": lambda n: {"passage": f"{n} plus {n} is {2 * n}", "question": f"is {n} {n + 1}", "label": n % 2 == 1},
        "WiC": lambda n: {"word": str(n), "sentence1": f"what is {n}", "sentence2": f"{n} plus", "label": n % 4 < 2},
    }  # fmt: skip
    for name, row in rows.items():
        (folder / name).mkdir(parents=True)
        for split, start in (("train", 0), ("val", 20)):
            lines = [json.dumps(row(number)) + "\n" for number in range(start, start + count)]
            (folder / name / f"{split}.jsonl").write_text("".join(lines))
    return str(folder)


def save_base(folder: Path) -> str:
    """The tiny llama and its tokenizer, in a folder."""
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)
