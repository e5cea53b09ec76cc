"""The study's three questions, answered from an analysis: every word of an answer follows from a figure beside it."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from priors_peft.analysis.claims import number, percent, plural
from priors_peft.analysis.stability import prompt_distances


Q1 = "Do trained prompts stay near meaningful words of their task?"
Q2 = "Do several runs of one task end in one place, or do they scatter?"
Q3 = "Does the similarity of prompts predict zero-shot transfer, and what share of transfers beats no prompt?"

# Nats per token.
FLAT = 0.05

# What the study reported of its own models and tasks.
STUDY_SHARE = 0.9

# Words of a description that say nothing of its task.
FUNCTION_WORDS = set(
    "a an and as at be by for from if in is it not of on or so than that the then to was with".split()
)


def questions(
    analysis: Mapping[str, Any], moves: Mapping[str, float] | None = None, level: float = 0.05
) -> list[dict[str, Any]]:
    """The `"questions"` of an `analysis.json`.

    Args:
        analysis: With adapters; what else is there is used.
        moves: From `moves_of`.
        level: Of significance.

    Returns:
        For each question that the analysis has figures for: `question`, `answer` and `figures`.
    """
    answered = [words_kept(analysis, level), runs_compared(analysis, moves), transfer_foretold(analysis, level)]
    return [part for part in answered if part is not None]


def _text(token: Mapping[str, Any]) -> str:
    return token["text"].replace("␣", " ").strip()


def _is_word(text: str) -> bool:
    return text.isalpha() and len(text) > 1 and text.casefold() not in FUNCTION_WORDS


# Question 1.


def words_kept(analysis: Mapping[str, Any], level: float) -> dict[str, Any] | None:
    """Which virtual tokens still lie nearest to the word they started at, and whether that is signal."""
    from scipy.stats import binomtest

    adapters = [
        adapter
        for adapter in analysis["adapters"]
        if adapter["tokens"] and adapter["tokens"]["virtual_tokens"][0]["initial_nearest"]
    ]
    if not adapters:
        return None
    total = kept = shown = 0
    starts, ends = [], []
    prompts: Counter[str | None] = Counter()
    kept_words: dict[str | None, Counter[str]] = defaultdict(Counter)
    new_words: Counter[str] = Counter()
    for adapter in adapters:
        task, own, new = adapter["task"], set(), set()
        described = {token["initial_nearest"][0]["id"] for token in adapter["tokens"]["virtual_tokens"]}
        shown += adapter["tokens"]["num_signal"] > 0
        for token in adapter["tokens"]["virtual_tokens"]:
            first, last = token["initial_nearest"][0], token["nearest"][0]
            total += 1
            starts.append(first["score"])
            ends.append(last["score"])
            if first["id"] == last["id"]:
                kept += 1
                own.add(_text(last))
            elif last["id"] not in described:
                new.add(_text(last))
        prompts[task] += 1
        kept_words[task].update(filter(_is_word, own))
        new_words.update(filter(_is_word, new))
    p_value = float(binomtest(shown, len(adapters), level, alternative="greater").pvalue)
    share = kept / total
    verdict = (
        "They stay where they were put"
        if share >= 0.9
        else "Most stay"
        if share >= 0.5
        else "Some stay"
        if share >= 0.1
        else "They leave them"
    )
    answer = (
        f"{verdict}: {kept} of {total} virtual tokens ({percent(share)}) are still nearest to the token of the English "
        f"description that they started at. The mean cosine to the nearest token went from {number(fmean(starts))} to "
        f"{number(fmean(ends))}."
    )
    everywhere = {
        task: [word for word, count in sorted(words.items(), key=_frequent) if count == prompts[task]]
        for task, words in kept_words.items()
    }
    lists = [
        f"{task or 'no task'}: {', '.join(words[:6])}" for task, words in sorted(everywhere.items(), key=str) if words
    ]
    answer += (
        f" Words kept by every run of their task: {'; '.join(lists)}." if lists else " No word was kept by every run."
    )
    answer += (
        f" Random prompts from the same priors lie around the description too; beyond what they show, {shown or 'none'} of "
        f"{plural(len(adapters), 'prompt')} {'has' if shown == 1 else 'have'} a virtual token nearer to a word (signal), "
        f"where chance gives {number(level * len(adapters))}, "
        + (
            f"p = {number(p_value, 2)}: training moved them to words."
            if p_value <= level
            else f"p = {number(p_value, 2)}: nearness is inherited from the start, and nothing here says that training "
            "found words."
        )
    )
    if new_words:
        shown = ", ".join(f"{word} ({count})" for word, count in sorted(new_words.items(), key=_frequent)[:8])
        answer += f" Words that prompts moved to, from outside their description, and in how many prompts: {shown}."
    figures = {
        "prompts": len(adapters),
        "virtual_tokens": total,
        "kept": kept,
        "kept_share": share,
        "prompts_with_signal": shown,
        "prompts_with_signal_by_chance": level * len(adapters),
        "signal_p_value": p_value,
        "initial_cosine": fmean(starts),
        "cosine": fmean(ends),
    }
    return {"question": Q1, "answer": answer, "figures": figures}


def _frequent(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


# Question 2.


def runs_compared(analysis: Mapping[str, Any], moves: Mapping[str, float] | None) -> dict[str, Any] | None:
    """How far runs of a task lie apart: beside random prompts, beside other tasks, and by their losses."""
    groups = (analysis["stability"] or {}).get("groups", [])
    if not groups:
        return None
    described = {group["task"] or "one task": _of_runs(group) for group in groups}
    figures: dict[str, Any] = {name: own for name, (own, _) in described.items()}
    places = Counter(_place(own["mean_percentile"]) for own in figures.values() if "mean_percentile" in own)
    if places["further apart than"] > len(groups) / 2:
        answer = "They end further apart than random starts lie"
    elif places["closer together than"] > len(groups) / 2:
        answer = "They end closer together than random starts lie"
    elif places:
        answer = "They end as far apart as random starts lie"
    else:
        answer = "There are too few runs to hold against random starts"
    if moves:
        same = moves["move_cosine_within"] > 2 * moves["move_cosine_by_chance"]
        answer += f", and training moves them {'the same way' if same else 'different ways'}"
    answer += "."
    answer = " ".join([answer, *(f"{name}: {said}." for name, (_, said) in described.items())])
    if moves:
        answer += _moved(moves)
        figures = figures | {"moves": dict(moves)}
    highest = [own["highest_barrier"] for own, _ in described.values() if "highest_barrier" in own]
    if highest:
        flat = sum(height <= FLAT for height in highest)
        answer += (
            f" In {flat} of {plural(len(highest), 'task')} all straight lines between runs stay within {FLAT} nats per token "
            f"of their ends' mean{': the runs lie in one basin there, however far apart' if flat else ''}; the highest rise "
            f"is {max(highest):.2g}."
        )
    return {"question": Q2, "answer": answer, "figures": figures}


def _of_runs(group: Mapping[str, Any]) -> tuple[dict[str, float], str]:
    """Figures of the runs of one task, and what they say."""
    raw, matched = (_mean_of_pairs(group[key]) for key in ("raw_distances", "matched_distances"))
    own = {"runs": len(group["adapters"]), "raw_distance": raw, "matched_distance": matched}
    said = f"mean distance {number(raw)}, {number(matched)} with virtual tokens matched"
    if equal := group["equidistance"]:
        own |= {"mean_percentile": equal["mean_percentile"], "equidistance_percentile": equal["percentile"]}
        random = number(fmean(equal["null_means"]))
        said += f", {_place(equal['mean_percentile'])} random prompts of their priors ({random})"
    if spread := group["metric_spread"]:
        own |= {"metric_mean": spread["mean"], "metric_std": spread["std"]}
        said += f"; {spread['metric']} {number(spread['mean'])} ± {number(spread['std'], 2)}"
    heights = [line["barrier"]["height"] for line in group["lines"]]
    if heights:
        own["highest_barrier"] = max(heights)
        said += f"; barriers between runs {number(min(heights), 2)} to {number(max(heights), 2)} nats per token"
    return own, said


def _place(percentile: float) -> str:
    return "closer together than" if percentile < 5 else "further apart than" if percentile > 95 else "as far apart as"


def _mean_of_pairs(matrix: Sequence[Sequence[float]]) -> float:
    return fmean(matrix[i][j] for i, j in combinations(range(len(matrix)), 2))


def moves_of(starts: Tensor, prompts: Tensor, tasks: Sequence[str | None]) -> dict[str, float] | None:
    """How far prompts lie apart before and after training, and whether they moved the same way.

    Args:
        starts: Prompts before training, shape `[N, P, d]`.
        prompts: The same after it.
        tasks: Of each.

    Returns:
        Mean distances after matching virtual tokens, and mean cosines of the moves, within and between tasks; None
        without two prompts of one task and two tasks.
    """
    pairs = list(combinations(range(len(tasks)), 2))
    same = [tasks[i] == tasks[j] for i, j in pairs]
    if not any(same) or all(same):
        return None
    moves = torch.nn.functional.normalize((prompts - starts).double().flatten(1), dim=-1)
    of = {
        "start_distance": prompt_distances(starts).matched,
        "distance": prompt_distances(prompts).matched,
        "move_cosine": moves @ moves.mT,
    }
    found = {"move_cosine_by_chance": prompts[0].numel() ** -0.5}
    for name, values in of.items():
        for where, wanted in (("within", True), ("between", False)):
            chosen = [float(values[pair]) for pair, is_same in zip(pairs, same, strict=True) if is_same == wanted]
            found[f"{name}_{where}"] = fmean(chosen)
    return found


def _moved(moves: Mapping[str, float]) -> str:
    """What `moves_of` says, in sentences."""
    far = {name: number(value) for name, value in moves.items()}
    stayed = abs(moves["distance_between"] / moves["start_distance_between"] - 1) < 0.1
    chance = 2 * moves["move_cosine_by_chance"]
    agree, differ = (
        moves["move_cosine_within"] > chance,
        moves["move_cosine_within"] > moves["move_cosine_between"] + chance,
    )
    return (
        f" Runs of one task lie {far['distance_within']} apart ({far['start_distance_within']} at the start), prompts of "
        f"different tasks {far['distance_between']} ({far['start_distance_between']} at the start)"
        + (": that tasks lie apart is their descriptions' doing, not training's." if stayed else ".")
        + f" What training added points the same way with a mean cosine of {far['move_cosine_within']} between runs of one "
        f"task and {far['move_cosine_between']} between tasks, where unrelated moves have 0 ± "
        f"{far['move_cosine_by_chance']}: runs of a task "
        + (
            "don't agree where to go."
            if not agree
            else "agree where to go, and tasks differ in it."
            if differ
            else "agree where to go, but no more than different tasks do."
        )
    )


# Question 3.


def transfer_foretold(analysis: Mapping[str, Any], level: float) -> dict[str, Any] | None:
    """The share of transfers that beat no prompt, and which similarity goes with transfer."""
    transfer = analysis["transfer"]
    if not transfer or transfer["share_beating_no_prompt"] is None:
        return None
    sentences, figures = [], {}
    foretold, tried, least = [], 0, None
    for metric, found in transfer["by_metric"].items():
        own: dict[str, Any] = {"share": found["share_beating_no_prompt"], "wins": found["wins"]}
        own["transfers"] = found["transfers"]
        said = (
            f"By {metric.replace('_', ' ')} {percent(own['share'])} of transfers beat no prompt ({own['wins']} of "
            f"{own['transfers']})"
        )
        if found.get("own_share") is not None:
            said += f", and {percent(found['own_share'])} of prompts on their own task"
            own["own_share"] = found["own_share"]
        one_metric = []
        for name, one in (found["correlations"] or {}).items():
            own[name] = {key: one[key] for key in ("rho", "p_value", "interval")}
            least = one["smallest_p"]
            if one["rho"] is None:
                continue
            tried += 1
            if one["p_value"] <= level:
                foretold.append((name, metric, one["rho"]))
            low, high = (number(bound, 2) for bound in one["interval"])
            one_metric.append(
                f"{name} ρ = {number(one['rho'], 2)} (95 % {low} to {high}), p = {number(one['p_value'], 2)}"
            )
        sentences.append(said + (f"; similarity with transfer: {'; '.join(one_metric)}" if one_metric else "") + ".")
        figures[metric] = own
    share, metric = transfer["share_beating_no_prompt"], transfer["metric"].replace("_", " ")
    compared = "as" if abs(share - STUDY_SHARE) < 0.05 else "more than" if share > STUDY_SHARE else "fewer than"
    answer = (
        f"{percent(share)} of transfers beat no prompt by {metric}, {compared} the {percent(STUDY_SHARE)} that the study "
        "reported of its own models. "
    )
    if not tried:
        answer += "No correlation of similarity with transfer could be computed. "
    elif not foretold:
        answer += (
            f"No similarity goes with transfer: none of {plural(tried, 'correlation')} has p <= {number(level)}. "
        )
    else:
        ways = "; ".join(f"{name} by {of} (ρ = {number(rho, 2)})" for name, of, rho in foretold)
        answer += f"{len(foretold)} of {plural(tried, 'correlation')} of similarity with transfer have p <= {number(level)}: {ways}. "
    if tried and least is not None and least > level / tried:
        answer += (
            f"With so few tasks p can't go below {number(least, 2)}, so after correction for {plural(tried, 'trial')} "
            "nothing could count as shown; more tasks could. "
        )
    return {"question": Q3, "answer": answer + " ".join(sentences), "figures": figures}
