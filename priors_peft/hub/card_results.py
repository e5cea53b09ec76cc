"""What a model card says of a prompt's results, of its analysis, and of its limits."""

import math
import statistics
from typing import TYPE_CHECKING, Any

from ..analysis import claims
from .card_posterior import RELIABILITY, calibrations, label, posterior
from .markdown import code, escape, plain, table


if TYPE_CHECKING:
    from .card import Facts

Figures = dict[str, float]

# Metrics that are shares of rows, whose standard error follows from their number.
_SHARES = ("exact_match", "accuracy", "accuracy_by_likelihood", "exact_match_by_likelihood")
_NLL = "NLL (nats per answer token)"
# Those that come first in a table, in that order.
_NAMES = {"loss": _NLL, "nll": _NLL, "ece": "ECE"}
_MOST_TOKENS = 32
# With what they show for readers who can't see them.
_PICTURES = {
    "tokens": "The nearest token of each virtual token, beside random prompts and the start",
    "geometry": "The prompt's shape and place over training, with the prior's band",
    "posterior": "How wide the posterior of each virtual token is beside the prior, and whether draws keep its nearest token",
    "projection": "The prompt, its way through training and the vocabulary in a plane",
    "activations": "Hidden states of tasks in a plane",
    "faithfulness": "What reading the prompt as text loses, and what each virtual token is worth",
    "stability": "Distances between prompts of several runs, and the loss on the lines between them",
    "transfer": "What each prompt adds on each task",
}
# Order in the table: JSON has lost the one they were measured in.
_BESIDE = ("no prompt", "before training")


def metric_name(name: str) -> str:
    """A metric as people call it, with its unit."""
    return _NAMES.get(name) or plain(name.replace("_", " "))


def measured(facts: "Facts") -> tuple[Figures, int | None]:
    """The prompt's figures, and on how many rows: what `priors-peft evaluate` found, else training's evaluation."""
    found = (facts.evaluation.get("figures") or {}).get("this prompt")
    if found:
        return found, facts.evaluation.get("num_rows")
    return facts.training.results.get(facts.name) or {}, facts.training.num_eval_rows


def results(facts: "Facts") -> str | None:
    """Figures of the prompt beside none and the one before training, and of several runs; None if none is known."""
    training, several = facts.training, len(facts.training.results) > 1
    figures = dict(facts.evaluation.get("figures") or {})
    figures = _initial(facts, figures) | figures
    rows: dict[str, Figures] = {name: figures.pop(name) for name in _BESIDE if name in figures} | figures
    count = facts.evaluation.get("num_rows") if rows else training.num_eval_rows
    evaluated = bool(rows)
    if not rows:
        rows = {f"{name}, before training": one for name, one in training.initial_results.items()}
        rows |= {f"{name} alone": one for name, one in training.mean_results.items()} | training.results
    parts = []
    if rows:
        found = dict.fromkeys(metric for figures in rows.values() for metric in figures)
        metrics = [name for name in _NAMES if name in found] + [name for name in found if name not in _NAMES]
        lines = [[escape(label(facts, name)), *_cells(one, metrics)] for name, one in rows.items()]
        if several and not evaluated:
            lines.append(["mean ± standard deviation", *(_mean(training.results, metric) for metric in metrics)])
        on = f"On {count:,} evaluation rows:" if isinstance(count, int) else "On the evaluation rows:"
        parts.append(f"{on}\n\n{table(['', *(escape(metric_name(metric)) for metric in metrics)], lines)}")
        if any(metric.endswith("ece") for metric in metrics):
            parts.append(
                "ECE is the expected calibration error: how far the likeliest token's probability is from how often it is "
                "right (Guo et al., 2017). By chance (in the diagram) is what perfect calibration would show on as many tokens."
            )
    parts.append(posterior(facts) or "")
    if calibrations(facts) and f"{RELIABILITY}.png" in facts.pictures:
        parts.append(f"![How often the likeliest token is right, by its probability]({RELIABILITY}.png)")
    likelihoods = _likelihoods(facts)
    if likelihoods and "no prompt" not in rows:
        analysed = ((_analysed_adapter(facts) or {}).get("faithfulness") or {}).get("rows")
        on = f"On {analysed:,} rows of the analysis:" if isinstance(analysed, int) else "In the analysis:"
        lines = [[name, claims.number(value, 4)] for name, value in likelihoods.items()]
        parts.append(f"{on}\n\n{table(['', _NLL], lines)}")
    parts.append(_runs(facts) or "")
    return "\n\n".join(part for part in parts if part) or None


def _initial(facts: "Facts", found: dict[str, Figures]) -> dict[str, Figures]:
    """Figures before training from its own log, if it was evaluated on the same rows: the loss after it is the same."""
    if facts.training.posterior_draws:  # averaged over draws, before training too
        return {}
    before = facts.training.initial_results.get(facts.name)
    loss = facts.training.results.get(facts.name, {}).get("loss", math.nan)
    if not before or not math.isclose(loss, found.get("this prompt", {}).get("nll", math.nan), rel_tol=1e-3):
        return {}
    return {"before training": {"nll" if name == "loss" else name: value for name, value in before.items()}}


def _cells(figures: Figures, metrics: list[str]) -> list[str]:
    return [claims.number(figures.get(metric), 4) for metric in metrics]


def _mean(runs: dict[str, Figures], metric: str) -> str:
    values = [figures[metric] for figures in runs.values() if metric in figures]
    spread = f" ± {claims.number(statistics.stdev(values), 2)}" if len(values) > 1 else ""
    return f"{claims.number(statistics.mean(values), 4)}{spread}" if values else "–"


def _likelihoods(facts: "Facts") -> Figures:
    """What the analysis measured, in nats per answer token."""
    found = (_analysed_adapter(facts) or {}).get("faithfulness") or {}
    names = {"no prompt": "no_prompt_nll", "before training": "initial_nll", "this prompt": "prompt_nll"}
    names["its nearest tokens"] = "hardened_nll"
    return {name: found[key] for name, key in names.items() if found.get(key) is not None}


def _runs(facts: "Facts") -> str | None:
    """Several runs of the task, where the analysis compared them."""
    name = (_analysed_adapter(facts) or {}).get("name")
    groups = (facts.analysis.get("stability") or {}).get("groups") or []
    group = next((group for group in groups if name in group["adapters"] and len(group["adapters"]) > 1), None)
    return f"{len(group['adapters'])} runs of this task: {escape(claims.stability(group))}." if group else None


# Analysis.


def _analysed_adapter(facts: "Facts") -> dict[str, Any] | None:
    adapters = facts.analysis.get("adapters") or []
    names = {facts.folder.resolve().name, facts.repo_id, facts.name}
    found = next((one for one in adapters if len(adapters) == 1 or {one["name"], one["source"]} & names), None)
    # A prompt that was there before may have been analysed.
    return found if found is not None and found.get("sha256") in (None, facts.sha256) else None


def analysis(facts: "Facts") -> str | None:
    """What the analysis says, the nearest tokens with their null, and the pictures that are there."""
    adapter = _analysed_adapter(facts)
    if adapter is None:
        return None
    level = facts.analysis["level"]
    said = [
        claims.signal(adapter, level),
        claims.collapse(adapter),
        claims.drift(adapter),
        claims.posterior(adapter),
        claims.faithfulness(adapter),
    ]
    parts = ["\n".join(f"- {escape(claims.capital(line))}" for line in said if line)]
    tokens = adapter.get("tokens")
    if tokens:
        parts.append(
            f"The nearest tokens of each virtual token, by {escape(tokens['metric'])}. Some token is always the nearest, so "
            f"each is held against {facts.analysis['num_draws']} random prompts from the same prior: the percentile among "
            "them, and p corrected for the number of virtual tokens. “signal” is what is nearer than they are; “inherited” "
            "is the token that was nearest before training, or at the prior's own centre, and is no nearer now."
        )
        parts.append(_token_table(tokens))
    shown = [name for name in _PICTURES if f"{name}.png" in facts.pictures]
    parts += [f"![{_PICTURES[name]}]({name}.png)" for name in shown]
    return "\n\n".join(part for part in parts if part)


def _token_table(tokens: dict[str, Any]) -> str:
    rows = []
    for token in tokens["virtual_tokens"][:_MOST_TOKENS]:
        nearest = " ".join(code(near["text"]) for near in token["nearest"][:3])
        mark = "signal" if token["signal"] else "inherited" if token["inherited"] else "as by chance"
        figures = [f"{token['score']:.3f}", f"{token['prior_percentile']:.0f}", f"{token['p_value']:.3f}"]
        rows.append([str(token["index"]), nearest, *figures, mark])
    left = len(tokens["virtual_tokens"]) - len(rows)
    rest = f"\n\n{left} more are in `analysis.json`." if left > 0 else ""
    return table(["", "nearest tokens", escape(tokens["metric"]), "percentile", "p", ""], rows) + rest


# Limits.


def limits(facts: "Facts") -> list[str]:
    """What the prompt is not known to do, and how sure its figures are."""
    figures, count = measured(facts)
    base = facts.base_model
    lines = [
        "It works with the base model it was tuned for"
        + (f", {code(base)}" if base else "")
        + (f" at revision {code(str(facts.stock['revision'])[:12])}" if facts.stock.get("revision") else "")
        + ", and with no other; whatever that model gets wrong or says that it should not, it still does.",
        "It was tuned for one task. Other tasks, languages and ways of asking have not been measured.",
    ]
    if not figures:
        lines.append("No evaluation of it is known.")
    for metric in [name for name in _SHARES if name in figures][:1]:
        if count and 0 < figures[metric] < 1:
            error = math.sqrt(figures[metric] * (1 - figures[metric]) / count)
            lines.append(
                f"On {count:,} rows, {escape(metric_name(metric))} has a standard error of {claims.number(error, 2)}."
            )
    runs = max(len(facts.training.results), len(facts.adapters))
    if figures and runs < 2 and not _runs(facts):
        lines.append("It is one run: how much another seed would change the figures is not known.")
    if _analysed_adapter(facts):
        lines.append("Nearest tokens say where virtual tokens lie, which need not be what they do.")
    return lines
