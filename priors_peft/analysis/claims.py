"""What an analysis says, in sentences computed from it: titles of pictures, lines of the report.

All take parts of `analysis.json` (format version 1) and return None where the part they speak of is not there.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any


Part = Mapping[str, Any]

FORMAT_VERSION = 1


def check_analysis(analysis: Part) -> None:
    """Raise `ValueError` unless this is an analysis of the version that is drawn, with an adapter in it."""
    version = analysis.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"analysis must have format_version {FORMAT_VERSION}, got {version!r}: draw it with the version of "
            "priors_peft that wrote it, or run `priors-peft analyze` again"
        )
    if not analysis.get("adapters"):
        raise ValueError("analysis must hold at least one adapter, got none")


def number(value: float | None, digits: int = 3) -> str:
    """A figure as people write it: three significant digits, a real minus, thousands apart, "–" for None."""
    if value is None or not math.isfinite(value):
        return "–"
    value = value if abs(value) > 1e-12 else 0.0
    text = f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
    text = f"{value:.{digits}f}".rstrip("0").rstrip(".") if "e" in text and abs(value) >= 1e-4 else text
    return text.replace("-", "−")


def decimals(value: float | None) -> str:
    """A figure between −1 and 1 with two decimals."""
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def percent(share: float | None) -> str:
    """A share as a percentage, without decimals unless it is below one percent."""
    return "–" if share is None else f"{number(100 * share, 1) if 0 < abs(share) < 0.01 else round(100 * share)} %"


def plural(count: int, noun: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# One adapter.


def token_state(row: Part, level: float) -> str:
    """What a virtual token's nearest word is: `"signal"`, `"inherited"` (beyond chance, but by start or prior) or
    `"chance"`."""
    if row["signal"]:
        return "signal"
    return "inherited" if row["inherited"] and row["p_value"] <= level else "chance"


def signal(adapter: Part, level: float) -> str | None:
    """How many virtual tokens lie nearer to a word than random prompts, start and prior explain."""
    tokens = adapter.get("tokens")
    if not tokens:
        return None
    rows = tokens["virtual_tokens"]
    found, inherited = tokens["num_signal"], sum(token_state(row, level) == "inherited" for row in rows)
    verb = "lies" if found == 1 else "lie"
    kept = f"; {inherited} more by start or prior" if inherited else ""
    return (
        f"{found or 'none'} of {plural(len(rows), 'virtual token')} {verb} nearer to a word than random "
        f"prompts ({percent(level)} level){kept}"
    )


def stayed(adapter: Part) -> str | None:
    """How many virtual tokens have the nearest word that they started with; None where the start is not known."""
    moved = [row["moved"] for row in (adapter.get("tokens") or {}).get("virtual_tokens", [])]
    if not moved or None in moved:
        return None
    kept = moved.count(False)
    return f"{kept or 'none'} of {plural(len(moved), 'virtual token')} kept the nearest word of the start"


def scripts(adapter: Part) -> str | None:
    """The scripts that the nearest words are in."""
    shares = (adapter.get("tokens") or {}).get("scripts")
    return shares and "nearest words are " + ", ".join(f"{percent(share)} {name}" for name, share in shares.items())


def languages(adapter: Part) -> str | None:
    """The likeliest language of the nearest words, beside random prompts, start and prior."""
    found = (adapter.get("tokens") or {}).get("languages")
    if not found:
        return None
    if not found["likeliest"]:
        return f"the language of the nearest words can't be told ({found['reason']})"
    said = ", ".join(f"{one['code']} {percent(one['probability'])}" for one in found["likeliest"])
    verdict = (
        "more surely than random prompts explain"
        if found["signal"]
        else "as by start or prior"
        if found["inherited"]
        else "which random prompts explain"
    )
    return (
        f"{found['num_words']} nearest words together are told as {said}: {verdict} (p = "
        f"{number(found['p_value'], 2)}; {percent(found['same_share'])} of random prompts are told as "
        f"{found['likeliest'][0]['code']} too)"
    )


def language_found(adapter: Part) -> str | None:
    """The sentence of `languages` where it is a finding."""
    found = (adapter.get("tokens") or {}).get("languages") or {}
    return languages(adapter) if found.get("signal") else None


def last_measure(adapter: Part, name: str, layer: int = 0) -> dict[str, Any] | None:
    """A geometry measure at the end of training, of the first or another of the adapter's layers.

    Returns:
        `value`, `band`, `median` and `percentile`; None where it was not measured.
    """
    layers = (adapter.get("geometry") or {}).get("layers") or []
    measure = layers[layer]["series"]["measures"].get(name) if layer < len(layers) else None
    if not measure or measure["values"][-1] is None:
        return None
    return {
        "value": measure["values"][-1],
        "band": measure["band"],
        "median": measure["median"],
        "percentile": measure["percentile"][-1],
    }


def shape_of(adapter: Part, layer: int = 0) -> str | None:
    """`"not collapsed"`, `"narrowed"` (below the prior's band of effective ranks) or `"collapsed"` (below half of it)."""
    rank = last_measure(adapter, "effective_rank", layer)
    if rank is None:
        return None
    low = rank["band"][0]
    return "not collapsed" if rank["value"] >= low else "narrowed" if rank["value"] >= low / 2 else "collapsed"


def collapse(adapter: Part, layer: int = 0) -> str | None:
    """Whether the prompt fills fewer directions than random prompts of its prior."""
    rank = last_measure(adapter, "effective_rank", layer)
    if rank is None:
        return None
    low, high = map(number, rank["band"])
    return f"{shape_of(adapter, layer)}: effective rank {number(rank['value'])}, random prompts {low} to {high}"


def drift(adapter: Part, layer: int = 0) -> str | None:
    """How far training moved the prompt, beside how far an unrelated prompt lies."""
    moved = last_measure(adapter, "drift", layer)
    if moved is None:
        return None
    return (
        f"moved {number(moved['value'])} prior standard deviations; an unrelated prompt lies "
        f"{number(moved['median'])} away"
    )


def posterior(adapter: Part) -> str | None:
    """How wide the posterior is beside the prior, and what its draws agree on; None of a point."""
    found = adapter.get("posterior")
    if not found:
        return None
    start = found["initial_deviation"]
    begun = f" ({number(start, 2)} when training began)" if start else ""
    kl = f"; KL(q ‖ p) {number(found['kl'])} nats" if found["kl"] is not None else ""
    what = f"each of the posterior's {many} Gaussians" if (many := found.get("components", 1)) > 1 else "posterior"
    return (
        f"{what} {number(found['deviation'], 2)} times as wide as the prior{begun}, {percent(1 - found['determined'])} of "
        f"its variance; draws keep the prompt's nearest tokens {percent(_agreed([found]))} of the time{kl}"
    )


def _agreed(found: Sequence[Part]) -> float:
    shares = [share for each in found for share in each["agreement"]]
    return sum(shares) / len(shares)


def posterior_title(adapters: Sequence[Part]) -> str | None:
    """Of the picture of posteriors."""
    measured = [adapter for adapter in adapters if adapter.get("posterior")]
    if len(measured) < 2:
        return _named(measured[0], posterior(measured[0])) if measured else None
    found = [adapter["posterior"] for adapter in measured]
    low, high = (number(pick(each["deviation"] for each in found), 2) for pick in (min, max))
    return (
        f"Posteriors of {len(found)} prompts are {low if low == high else f'{low} to {high}'} times as wide as their priors; "
        f"draws keep the nearest tokens of the prompts that stand for them {percent(_agreed(found))} of the time"
    )


def faithfulness(adapter: Part) -> str | None:
    """What is lost when the prompt is read as its nearest tokens, and on how many rows."""
    measured = adapter.get("faithfulness")
    if not measured or not measured.get("waywardness"):
        return None
    lost, gained = measured["waywardness"]["lost"], measured["waywardness"]["gained"]
    if gained is None:
        said = f"read as its nearest tokens it loses {number(lost)} nats per token"
    elif gained <= 0:
        said = f"no better than no prompt ({number(-gained)} nats per token worse)"
    elif lost <= 0:
        said = f"read as its nearest tokens it loses nothing of its gain of {number(gained)} nats per token"
    else:
        what = "all of its gain and more" if lost > gained else f"{percent(lost / gained)} of its gain"
        said = f"read as its nearest tokens it loses {what} ({number(lost)} of {number(gained)} nats per token)"
    return f"{said}, on {plural(measured['rows'], 'row')}" if measured.get("rows") else said


# Many adapters: titles of pictures.


def _named(adapter: Part, sentence: str | None) -> str | None:
    return sentence and f"{adapter['name']}: {sentence}"


def tokens_title(adapters: Sequence[Part], level: float) -> str | None:
    """Of the picture of nearest tokens; for several prompts how many show any, beside how many would by chance."""
    measured = [adapter for adapter in adapters if adapter.get("tokens")]
    if len(measured) < 2:
        said = [signal(measured[0], level), stayed(measured[0])] if measured else []
        return _named(measured[0], "; ".join(filter(None, said))) if measured else None
    shown = sum(adapter["tokens"]["num_signal"] > 0 for adapter in measured)
    found = sum(adapter["tokens"]["num_signal"] for adapter in measured)
    total = sum(len(adapter["tokens"]["virtual_tokens"]) for adapter in measured)
    return (
        f"{shown or 'None'} of {len(measured)} prompts {'has' if shown < 2 else 'have'} virtual tokens nearer to a word "
        f"than random prompts ({found} of {total} tokens); {number(level * len(measured), 2)} would by chance"
    )


def geometry_title(adapters: Sequence[Part]) -> str | None:
    """Of the picture of geometry over training."""
    shapes = {adapter["name"]: shape_of(adapter) for adapter in adapters if shape_of(adapter)}
    if len(adapters) == 1 or not shapes:
        said = collapse(adapters[0]) if adapters else None
        return said and f"{adapters[0]['name']} has {said}"
    moved = [found["value"] for found in (last_measure(adapter, "drift") for adapter in adapters) if found]
    span = f"; drift {number(min(moved), 2)} to {number(max(moved), 2)} prior standard deviations" if moved else ""
    found = {which: [name for name, shape in shapes.items() if shape == which] for which in ("collapsed", "narrowed")}
    parts = [
        f"{len(names) or 'none'} {which}" + (f" ({', '.join(names)})" if 0 < len(names) < 3 else "")
        for which, names in found.items()
    ]
    return f"Of {len(shapes)} prompts {' and '.join(parts)}{span}"


def words(words: Part) -> str:
    """How many words several prompts say more often than random ones, beside how many would by chance."""
    shown = sum(z > 1.96 for z in words["z"])
    total = words.get("total") or len(words["z"])
    least = "at least " if shown == len(words["z"]) < total else ""
    return capital(
        f"{least}{shown or 'none'} of {plural(total, 'word')} {'is' if shown == 1 else 'are'} over-represented "
        f"(z > 1.96; chance gives about {number(0.025 * total, 2)})"
    )


def projection_title(projection: Part) -> str | None:
    """Of the picture of projections: how much of the variance it leaves out."""
    found = projection.get("pca")
    if not found or not found.get("explained_variance"):
        return (
            "t-SNE: neighbours are real, distances between clusters mean nothing" if projection.get("tsne") else None
        )
    shown = sum(found["explained_variance"][:2])
    return (
        f"The first two components show {percent(shown)} of the variance; {percent(1 - shown)} is not in the picture"
    )


def activations_title(activations: Part) -> str | None:
    """Of the picture of tasks in activation space: where they are told apart best, with and without the prompt."""
    best: dict[bool, Part] = {}
    for layer in activations["layers"]:
        rival = best.get(bool(layer["with_prompt"]))
        if rival is None or layer["probe_accuracy"] > rival["probe_accuracy"]:
            best[bool(layer["with_prompt"])] = layer
    if not best:
        return None
    parts = [
        f"{percent(layer['probe_accuracy'])} {'with' if prompted else 'without'} the prompt (layer {layer['layer']})"
        for prompted, layer in sorted(best.items(), reverse=True)
    ]
    chance = next(iter(best.values()))["chance"]
    return f"A linear probe tells the tasks apart: {', '.join(parts)}; chance is {percent(chance)}"


def faithfulness_title(adapters: Sequence[Part]) -> str | None:
    """Of the picture of losses: how much of the prompts' gain their nearest tokens keep."""
    measured = [adapter for adapter in adapters if faithfulness(adapter)]
    if len(measured) < 2:
        return _named(measured[0], faithfulness(measured[0])) if measured else None
    ways = [adapter["faithfulness"]["waywardness"] for adapter in measured]
    useful = [way for way in ways if (way["gained"] or 0) > 0]
    if not useful:
        return f"None of {len(measured)} prompts is known to be better than no prompt"
    half = sum(way["lost"] > way["gained"] / 2 for way in useful)
    return (
        f"Read as its nearest tokens, a prompt loses more than half of its gain: {half or 'none'} of {len(useful)} "
        "prompts that are better than no prompt"
    )


def apart(groups: Sequence[Part]) -> str | None:
    """How far runs of one task lie from one another, as they are and after matching of virtual tokens."""
    spans = []
    for key in ("raw_distances", "matched_distances"):
        found = [d for group in groups for i, row in enumerate(group[key]) for d in row[:i] if d is not None]
        if not found:
            return None
        low, high = number(min(found)), number(max(found))
        spans.append(low if low == high else f"{low} to {high}")
    return f"runs lie {spans[0]} apart, {'as far' if spans[0] == spans[1] else spans[1]} with tokens matched"


def stability(group: Part) -> str:
    """What several runs of a task say: metric, distances, barriers."""
    parts = []
    if spread := group.get("metric_spread"):
        parts.append(
            f"{spread.get('metric') or 'metric'} {number(spread['mean'])} ± {number(spread['std'], 2)} "
            f"({plural(spread['count'], 'run')})"
        )
    if equal := group.get("equidistance"):
        where = equal["percentile"]
        says = "more evenly" if where < 5 else "less evenly" if where > 95 else "as evenly"
        parts.append(f"runs lie {says} apart {'as' if 5 <= where <= 95 else 'than'} random prompts")
    elif far := apart([group]):
        parts.append(far)
    heights = [line["barrier"]["height"] for line in group.get("lines") or []]
    if heights:
        parts.append(f"highest barrier between two runs {number(max(heights), 2)} nats per token")
    return "; ".join(parts) or f"{len(group['adapters'])} runs"


def stability_title(groups: Sequence[Part]) -> str | None:
    """Of the picture of runs."""
    if not groups:
        return None
    if len(groups) == 1:
        return f"{groups[0]['task'] or 'Runs'}: {stability(groups[0])}"
    heights = [line["barrier"]["height"] for group in groups for line in group.get("lines") or []]
    equal = [group["equidistance"]["percentile"] for group in groups if group.get("equidistance")]
    parts = []
    if equal:
        inside = sum(5 <= where <= 95 for where in equal)
        parts.append(
            f"runs of {inside or 'none'} of {plural(len(equal), 'task')} lie as evenly apart as random prompts"
        )
    elif far := apart(groups):
        parts.append(far)
    if heights:
        parts.append(f"highest barrier between two runs {number(max(heights), 2)} nats per token")
    return capital("; ".join(parts)) or f"Runs of {len(groups)} tasks"


def transfer_title(transfer: Part) -> str:
    """Of the transfer matrix: the share that beats no prompt; of all pairs where own tasks are not known."""
    if transfer.get("share_beating_no_prompt") is None:
        cells = [gain for row in gains(transfer) for gain in row if gain is not None]
        return f"{sum(gain > 0 for gain in cells)} of {len(cells)} pairs of a prompt and a task beat no prompt"
    wins, total = transfer.get("wins"), transfer.get("transfers")
    counts = f" ({wins} of {total})" if wins is not None and total else ""
    share, metric = percent(transfer["share_beating_no_prompt"]), transfer["metric"].replace("_", " ")
    return f"{share} of transfers to other tasks beat no prompt in {metric}{counts}"


def correlation(name: str, found: Part) -> str:
    """Whether a similarity foretells transfer."""
    if found["rho"] is None:
        return f"{name}: does not vary"
    least = f", can't be below {number(found['smallest_p'], 2)}" if found.get("smallest_p") else ""
    low, high = (number(bound, 2) for bound in found["interval"])
    return f"{name}: ρ = {number(found['rho'], 2)} (95 % {low} to {high}), p = {number(found['p_value'], 2)}{least}"


def capital(sentence: str) -> str:
    """`sentence` with a capital letter in front, the rest as it is."""
    return sentence[:1].upper() + sentence[1:]


def gains(transfer: Part) -> list[list[float | None]]:
    """What each prompt adds to no prompt on each task, better is positive, `[N][M]`."""
    sign = 1 if transfer["higher_is_better"] else -1
    pairs = [list(zip(row, transfer["no_prompt"], strict=True)) for row in transfer["scores"]]
    return [[None if None in pair else sign * (pair[0] - pair[1]) for pair in of_prompt] for of_prompt in pairs]
