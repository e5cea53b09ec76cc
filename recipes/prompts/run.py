"""GPT-2 learns to write prompts: few virtual tokens and epochs beside more of both, and both beside no prompt.

`python recipes/prompts/run.py [RECIPE.yaml] [--FLAG VALUE ...]`; the flags are those of `priors-peft train`. What is done is
not done again: a run that was stopped goes on when it is started again.
"""

import copy
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from priors_peft import PriorPeftModel
from priors_peft.analysis import no_prompt_nll, prompt_nll
from priors_peft.checkpoints import last_checkpoint
from priors_peft.commands.arguments import ModelArguments, PromptArguments, TaskArguments, parse
from priors_peft.commands.evaluate import markdown_table
from priors_peft.commands.train import TrainingArguments, base_model_from, recipe_of, room_for_text, task_from, train
from priors_peft.data import tokenize
from priors_peft.evaluation import best_device
from priors_peft.hub.adapter import PRIOR_CONFIG
from priors_peft.hub.facts import read_facts


RECIPE = Path(__file__).with_name("soft_structured.yaml")
# Virtual tokens and epochs.
SIZES = ((5, 5), (20, 10))
OPENINGS = (
    "I want you to act as a rapper.",
    "I want you to act as a beekeeper.",
    "I want you to act as a museum guide.",
    "I want you to act as a debugger for shell scripts.",
)
NEW_TOKENS = 48
REPETITION_PENALTY = 1.2  # without it small models fall into loops


def main(arguments: list[str]) -> None:
    # ---- The recipe, the base model and the data ----------------------------------------
    recipe = read(arguments)
    base, tokenizer, task = model_and_task(recipe)
    print(f"{len(task.train)} prompts to learn from, {len(task.eval)} held out. One of these:")
    print(task.eval[0]["completion"])

    # ---- Training -----------------------------------------------------------------------
    runs = {f"{tokens} tokens, {epochs} epochs": train_one(tokens, epochs, recipe) for tokens, epochs in SIZES}

    # ---- Perplexity ---------------------------------------------------------------------
    model = load(base, runs)
    print(perplexities(model, tokenizer, task))

    # ---- Continuations ------------------------------------------------------------------
    print(continuations(model, tokenizer, task, OPENINGS))


def read(arguments: list[str]) -> list[Any]:
    """The recipe's model, task, prompt and training arguments."""
    if not arguments or arguments[0].startswith("-"):
        arguments = [str(RECIPE), *arguments]
    dataclasses = (ModelArguments, TaskArguments, PromptArguments, TrainingArguments)
    return parse(dataclasses, arguments, "python recipes/prompts/run.py")


def model_and_task(recipe: list[Any]) -> tuple[Any, Any, Any]:
    """The base model, its tokenizer and the data, as the recipe names them."""
    base, tokenizer = base_model_from(copy.copy(recipe[0]), best_device())
    return base, tokenizer, task_from(recipe[1], tokenizer, None)


def train_one(tokens: int, epochs: int, recipe: list[Any]) -> str:
    """One run, if it is not done yet; it goes on from its last checkpoint. Returns the adapter's folder."""
    model, task, prompt, training = map(copy.copy, recipe)
    folder = Path(training.output_dir, f"{tokens}_tokens_{epochs}_epochs")
    prompt.num_virtual_tokens = tokens
    training.num_train_epochs, training.output_dir, training.resume = epochs, str(folder), True
    asked = json.loads(json.dumps(recipe_of(model, task, prompt, training)))
    done = (folder / PRIOR_CONFIG).is_file()  # written last
    begun = folder if done else last_checkpoint(folder)
    before = read_facts(begun).recipe if begun else asked
    other = sorted(name for name in asked.keys() | before.keys() if asked.get(name) != before.get(name))
    if other:
        raise ValueError(
            f"{other[0]} must be {before.get(other[0])!r} as when {folder} was begun, got {asked.get(other[0])!r}: "
            "pass another output_dir, or delete that one"
        )
    if not done:
        print(f"\nTraining {folder.name}", flush=True)
        train(model, task, prompt, training)
    return str(folder)


def load(base: Any, runs: dict[str, str]) -> PriorPeftModel:
    """The base model with every run's prompt, named as the run."""
    (first, folder), *others = runs.items()
    model = PriorPeftModel.from_pretrained(base, folder, adapter_name=first)
    for name, folder in others:
        model.load_adapter(folder, name)
    return model


def perplexities(model: PriorPeftModel, tokenizer: Any, task: Any) -> str:
    """A table of e to the nats per token of the held-out prompts, all of each and its end."""
    rows = tokenize(task.eval, tokenizer, room_for_text(model.base_model, max(tokens for tokens, _ in SIZES)))
    nlls = {"no prompt": no_prompt_nll(model, rows)}
    for name in model.peft_config:
        model.set_adapter(name)
        nlls[name] = prompt_nll(model, rows)
    cells = [[name, f"{nll:.3f}", f"{math.exp(nll):.2f}"] for name, nll in nlls.items()]
    return markdown_table([f"{len(rows)} held-out prompts", "nats per token", "perplexity"], cells)


def continuations(model: PriorPeftModel, tokenizer: Any, task: Any, openings: Sequence[str]) -> str:
    """How no prompt and each prompt go on with texts, the likeliest token each time but for a penalty on repetition."""
    texts = []
    # As in training: after the token that starts a text, without the one that ends it.
    rows = tokenize([{"prompt": "", "completion": opening} for opening in openings], tokenizer)
    for opening, ids in zip(openings, rows["input_ids"], strict=True):
        ids = torch.tensor([ids[: -1 if ids[-1] == tokenizer.eos_token_id else None]], device=model.device)
        learnt = sum(text.startswith(opening) for text in task.train["completion"])
        lines = [
            f"{opening} ({learnt or 'none'} of the prompts to learn from {'begins' if learnt == 1 else 'begin'} so)"
        ]
        with model.disable_adapter():
            lines.append(f"- no prompt: {go_on(model, tokenizer, ids)}")
        for name in model.peft_config:
            model.set_adapter(name)
            lines.append(f"- {name}: {go_on(model, tokenizer, ids)}")
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def go_on(model: Any, tokenizer: Any, ids: torch.Tensor) -> str:
    """The continuation of token ids `[1, L]` as one line."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "repetition_penalty": REPETITION_PENALTY}
    generated = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.pad_token_id, **options
    )
    text = " ".join(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True).split())
    return text or "(nothing: the text ends)"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"run.py: {error}")
