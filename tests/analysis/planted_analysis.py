"""An `analysis.json` of planted prompts, measured by the analyses themselves, with names and tokens that try to break out."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from priors_peft.analysis import activations, faithfulness, geometry, projection, stability, tokens, transfer, words
from priors_peft.priors import GaussianPrior


NASTY = [
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "<!--", "␣entailed", "$x^2$", "$\\frac{$", "中文",
    "العربية", "<U+202E>", "%{x}", "&amp;", "_under", "<b>bold</b>", "💩", "\ud83d", "\"'`", "{{ 7 * 7 }}", "]]>", "\\u003c",
    "a" * 300, "<br>", "^{2}", "\x00", "<a href='javascript:alert(1)'>x</a>", "<0xE4>", "%(text)s", "{% raw %}", "␊", "é",
]  # fmt: skip
V, D, P, DRAWS, ROWS = 150, 24, 12, 99, 15
TASKS = ["rte", "wsc", "boolq", "<i>wic</i>"]


def rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(token: int) -> str:
    return NASTY[token] if token < len(NASTY) else f"␣word{token}"


@cache
def planted(
    count: int = 4, snapshots: int = 5, deep: bool = False, virtual_tokens: int = P, tsne: bool = False
) -> dict[str, Any]:
    """The analysis of `count` prompts, of four tasks in turn; made once, so copy it before changing it.

    Of each prompt virtual token 0 was moved onto a vocabulary row and token 1 lies where it started, on another. The
    second prompt collapsed. A prompt's loss on a task is its squared distance to the task's optimum.
    """
    vocabulary = rows(V, D, seed=0)
    prior = GaussianPrior.fit(vocabulary)
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([prior.sample(virtual_tokens, generator) for _ in range(DRAWS)])
    null = tokens.best_scores(draws, vocabulary)
    shared = rows(virtual_tokens, D, seed=99)
    optima = {task: shared + 0.7 * rows(virtual_tokens, D, seed=100 + index) for index, task in enumerate(TASKS)}
    prompts, starts, ways = [], [], []
    for index in range(count):
        start = prior.sample(virtual_tokens, torch.Generator().manual_seed(50 + index))
        start[1:2] = vocabulary[(2 * index + 3) % V]
        end = torch.lerp(start, optima[TASKS[index % 4]], 0.6)
        end[0], end[1:2] = 2 * vocabulary[2 * index], start[1:2]
        if index == 1:
            end = 0.5 * end[:1] + 0.1 * end
        starts.append(start)
        prompts.append(end)
        ways.append(torch.stack([torch.lerp(start, end, float(t)) for t in torch.linspace(0, 1, snapshots)]))
    names = [f"{TASKS[i % 4]}-{i // 4}" for i in range(count)]
    names[0] = 'rte "$\\frac{$" <img src=x onerror=alert(1)>'
    names[-1] = "_中文" if count > 1 else names[-1]

    def loss(prompt: Tensor, task: str) -> float:
        return float((prompt - optima[task]).square().mean())

    adapters = []
    for index, (name, prompt, start, way) in enumerate(zip(names, prompts, starts, ways, strict=True)):
        near, before = tokens.nearest_tokens(prompt, vocabulary, 5), tokens.nearest_tokens(start, vocabulary, 5)
        task = TASKS[index % 4]
        series = geometry.geometry_series(way, draws, prior, vocabulary, start, range(0, 10 * snapshots, 10), null)
        where = geometry.token_geometry(prompt, start, draws, prior, vocabulary)
        layers = [
            {"layer": layer, "token": where.to_dict(), "series": series.to_dict()}
            for layer in ([0, -1] if deep else [0])
        ]
        hard = faithfulness.harden(prompt, vocabulary, near.ids[:, 0])
        without = [loss(each, task) for each in faithfulness.ablations(prompt, prior.loc)]
        ranking = faithfulness.rank_ablations(loss(prompt, task), without)
        none = float(optima[task].square().mean())
        adapters.append(
            {
                "name": name, "source": name, "tuning": "deep" if deep else "soft", "prior": "gaussian",
                "num_virtual_tokens": virtual_tokens, "layers": [0, -1] if deep else [0], "task": task,
                "steps": 10 * (snapshots - 1), "tokens": _tokens(near, before, null), "geometry": {"layers": layers},
                "faithfulness": {
                    "task": task, "metric": "nll", "rows": ROWS, "prompt_nll": loss(prompt, task),
                    "hardened_nll": loss(hard, task), "no_prompt_nll": none, "initial_nll": loss(start, task),
                    "waywardness": faithfulness.waywardness(loss(prompt, task), loss(hard, task), none).to_dict(),
                    "ablations": [
                        {"index": i, "nll": nll, "increase": worth}
                        for i, (nll, worth) in enumerate(zip(without, ranking.importance.tolist(), strict=True))
                    ],
                },
                "description": "Say <b>entailment</b> or not. </script>" if index == 0 else None,
                "description_of_draw": "<script>a translation</script>" if index == 0 else None,
            }
        )  # fmt: skip
    together = torch.stack(prompts)
    return {
        "format_version": 1, "versions": {"priors_peft": "0.1.0", "torch": torch.__version__}, "created": "2026-01-02",
        "command": "priors-peft analyze <adapters> --out report", "base_model": "planted <model>", "level": 0.05,
        "num_draws": DRAWS, "seed": 0, "adapters": adapters,
        "projection": _projection(names, prompts, starts, ways, draws, vocabulary, adapters, tsne),
        "activations": _activations(names),
        "words": _words(adapters) if count > 1 else None,
        "stability": {"groups": [_stability(names[:4], together[:4], draws, loss)]} if count > 3 else None,
        "transfer": _transfer(names, together, loss) if count > 3 else None,
        "questions": [{"question": "Is <i>this</i> a question?", "answer": "Computed: 3 < 4.", "figures": {"share": 0.75}}],
    }  # fmt: skip


def _tokens(near, before, null) -> dict[str, Any]:
    signal, changes = tokens.token_signal(near, null, before).to_dict(), tokens.token_changes(before, near).to_dict()

    def listed(found, index: int) -> list[dict[str, Any]]:
        pairs = zip(found.ids[index].tolist(), found.scores[index].tolist(), strict=True)
        return [{"id": token, "text": text(token), "score": score} for token, score in pairs]

    return {
        "metric": "cosine", "k": 5, "num_signal": sum(signal["signal"]), "prior_band": signal["prior_band"],
        "virtual_tokens": [
            {
                "index": i, "nearest": listed(near, i), "initial_nearest": listed(before, i), "score": signal["scores"][i],
                "prior_percentile": signal["prior_percentile"][i], "p_value": signal["p_values"][i],
                "initial_percentile": signal["initial_percentile"][i], "signal": signal["signal"][i],
                "inherited": signal["inherited"][i], "moved": changes["moved"][i],
                "script": words.script(text(near.ids[i, 0].item())),
                **{key: [text(token) for token in changes[key][i]] for key in ("kept", "gained", "lost")},
            }
            for i in range(len(near.ids))
        ],
    }  # fmt: skip


def _projection(names, prompts, starts, ways, draws, vocabulary, adapters, tsne) -> dict[str, Any]:
    groups = {"vocabulary": vocabulary, "draws": draws[:3].flatten(0, 1)}
    kinds = {"vocabulary": ("vocabulary", "vocabulary", [text(token) for token in range(V)], None)}
    kinds["draws"] = ("draws", "draws", ["random"] * 3 * draws.shape[1], None)
    for index, name in enumerate(names):
        read = [row["nearest"][0]["text"] for row in adapters[index]["tokens"]["virtual_tokens"]]
        own = [f"{place}: {word}" for place, word in enumerate(read)]
        times = [10 * t for t in range(len(ways[index])) for _ in own]
        for kind, points, labels, steps in (
            ("prompt", prompts[index], own, None),
            ("initial", starts[index], own, None),
            ("trajectory", ways[index].flatten(0, 1), own * len(ways[index]), times),
        ):
            groups[f"{kind}-{index}"] = points
            kinds[f"{kind}-{index}"] = (name, kind, labels, steps)

    def drawn(found: projection.Projection) -> dict[str, Any]:
        listed = []
        for key, points in found.points.items():
            name, kind, labels, steps = kinds[key]
            listed.append({"name": name, "kind": kind, "points": points.tolist(), "labels": labels, "steps": steps})
        return {"groups": listed, "explained_variance": found.explained_variance} | found.settings

    return {"layer": 0, "pca": drawn(projection.pca(groups)), "tsne": drawn(projection.tsne(groups)) if tsne else None}


def _activations(names) -> dict[str, Any]:
    layers = []
    labels = [task for task in TASKS[:3] for _ in range(ROWS)]
    centres = torch.eye(3, D).repeat_interleave(ROWS, 0)
    for place, layer in enumerate((0, 5)):
        for name in [None, *names[:2]]:
            points = rows(3 * ROWS, D, seed=7 + place) + (1 + place) * (1.0 if name is None else 1.4) * centres
            found = activations.separability(points, labels, folds=2)
            flat = projection.pca({"all": points})
            split = zip(TASKS[:3], flat.points["all"].split(ROWS), strict=True)
            groups = [
                {"name": task, "points": part.tolist(), "labels": [f"row {row} of <b>{task}" for row in range(ROWS)]}
                for task, part in split
            ]
            layers.append(
                {"layer": layer, "with_prompt": name is not None, "adapter": name, "groups": groups} | found.to_dict()
            )
    return {"layers": layers}


def _words(adapters) -> dict[str, Any]:
    def read(key: str) -> list[list[str]]:
        return [[near["text"] for row in each["tokens"]["virtual_tokens"] for near in row[key]] for each in adapters]

    counts, background = words.count_words(read("nearest")), words.count_words(read("initial_nearest"))
    return words.over_represented(counts, background).to_dict()


def _stability(names, prompts, draws, loss) -> dict[str, Any]:
    distances = stability.prompt_distances(prompts)
    lines = []
    for first, second in ((0, 1), (0, 2), (1, 3)):
        losses = [loss(each, TASKS[0]) for each in stability.line_points(prompts[first], prompts[second])]
        found = stability.barrier(losses)
        pair = [names[first], names[second]]
        lines.append({"pair": pair, "t": found.positions.tolist(), "nll": losses, "barrier": found.to_dict()})
    spread = stability.metric_spread([loss(each, TASKS[0]) for each in prompts]).to_dict()
    return {
        "task": TASKS[0], "adapters": names, "raw_distances": distances.raw.tolist(),
        "matched_distances": distances.matched.tolist(), "lines": lines, "left_out_pairs": 3,
        "equidistance": stability.equidistance(prompts, draws).to_dict(), "metric_spread": spread | {"metric": "nll"},
    }  # fmt: skip


def _transfer(names, prompts, loss) -> dict[str, Any]:
    own = [index % 4 for index in range(len(names))]
    scores = torch.tensor([[loss(prompt, task) for task in TASKS] for prompt in prompts])
    none = torch.tensor([loss(torch.zeros_like(prompts[0]), task) for task in TASKS])
    summary = transfer.transfer_summary(scores, none, own, higher_is_better=False)
    similarities = transfer.prompt_similarities(prompts)
    equal = len(names) % 4 == 0
    return {
        "tasks": TASKS, "prompts": names, "own": own, "scores": scores.tolist(), "no_prompt": none.tolist(),
        "metric": "nll", "higher_is_better": False, "share_beating_no_prompt": summary.share, "wins": summary.wins,
        "transfers": summary.transfers, "similarities": {name: each.tolist() for name, each in similarities.items()},
        "correlations": {
            name: transfer.transfer_correlation(
                each, summary.gain_over_none, own, num_permutations=200, num_resamples=100
            ).to_dict() | {"smallest_p": 1 / 24}
            for name, each in similarities.items()
        } if equal else None,
    }  # fmt: skip
