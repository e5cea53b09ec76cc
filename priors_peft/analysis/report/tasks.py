"""The report's figures of prompts at work: activations, losses, runs, transfer."""

from collections.abc import Sequence

import numpy as np

from .. import claims
from ..pictures.faithfulness import LOSS_UNIT, measured_losses, nearest_word
from ..pictures.style import COLOURS, GREY, array
from ..pictures.transfer import own_cells
from .plots import Figure, axis_key, heading, heat_map, name_axis, on, panels, plain, rounded, short, title


_DIVERGING = [[0, "#b35806"], [0.25, "#fdb863"], [0.5, "#f7f7f7"], [0.75, "#b2abd2"], [1, "#542788"]]

_TOP_DOWN = {"autorange": "reversed", "showgrid": False}


def activations(layers: Sequence[claims.Part]) -> Figure:
    """A panel for each layer under one condition: the tasks' rows, projected."""
    layout, rows = panels(len(layers), min(4, len(layers)), 0.06)
    data, headings = [], []
    tasks = list(dict.fromkeys(group["name"] for layer in layers for group in layer["groups"]))
    for index, layer in enumerate(layers):
        probe, silhouette = claims.percent(layer["probe_accuracy"]), claims.decimals(layer["silhouette"])
        headings.append(heading(index, f"layer {layer['layer']}<br>probe {probe}, silhouette {silhouette}"))
        for group in layer["groups"]:
            points, place = array(group["points"]).reshape(-1, 2), tasks.index(group["name"])
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": short(group["name"]),
                    "legendgroup": str(place),
                    "showlegend": index == 0,
                    "x": rounded(points[:, 0]),
                    "y": rounded(points[:, 1]),
                    "text": [short(f"{group['name']}: {label}", 200) for label in group["labels"]],
                    "hoverinfo": "text",
                    "marker": {"color": COLOURS[place % len(COLOURS)], "size": 5, "symbol": place % 5},
                    **on(index),
                }
            )
    layout |= {"height": 140 + 260 * rows, "annotations": headings}
    return {"data": data, "layout": layout}


def losses(adapters: Sequence[claims.Part]) -> Figure:
    """A row for each adapter: with it, with what it reads as, with its start, without it."""
    markers = {
        "prompt_nll": "circle",
        "hardened_nll": "x",
        "initial_nll": "diamond-open",
        "no_prompt_nll": "line-ns-open",
    }
    data = []
    for key, (label, style) in measured_losses(adapters).items():
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label,
                "x": [adapter["faithfulness"].get(key) for adapter in adapters],
                "y": list(range(len(adapters))),
                "text": [
                    f"{plain(adapter['name'])}, {label}: {claims.number(adapter['faithfulness'].get(key))}"
                    for adapter in adapters
                ],
                "hoverinfo": "text",
                "marker": {
                    "symbol": markers[key],
                    "size": 11,
                    "line": {"width": 2 if markers[key].endswith("-open") else 0},
                    "color": GREY if style["color"] == "black" else style["color"],
                },
            }
        )
    layout = {
        "height": 170 + 28 * len(adapters),
        "xaxis": {"title": title(LOSS_UNIT)},
        "yaxis": {**name_axis(adapter["name"] for adapter in adapters), "range": [len(adapters) - 0.4, -0.6]},
    }
    return {"data": data, "layout": layout}


def ablations(adapter: claims.Part) -> Figure:
    """What each virtual token is worth."""
    found = adapter["faithfulness"]["ablations"]
    trace = {
        "type": "bar",
        "x": [each["index"] for each in found],
        "y": rounded(each["increase"] for each in found),
        "text": [
            f"{each['index']}: {plain(nearest_word(adapter, each['index']))}<br>{claims.number(each['increase'])} nats"
            for each in found
        ],
        "textposition": "none",
        "hoverinfo": "text",
        "marker": {"color": [COLOURS[0] if each["increase"] > 0 else COLOURS[1] for each in found]},
    }
    layout = {
        "height": 280,
        "xaxis": {"title": title("virtual token left at the prior's mean"), "dtick": 1 if len(found) <= 40 else 10},
        "yaxis": {"title": title("added loss (nats)")},
    }
    return {"data": [trace], "layout": layout}


def stability(group: claims.Part) -> Figure:
    """Distances between a task's runs, and losses on the lines between them."""
    runs, lines = group["adapters"], group.get("lines") or []
    layout, _ = panels(2 + bool(lines), 2 + bool(lines), 0.1)
    most = float(np.nanmax(array(group["raw_distances"]))) or 1.0
    data: list[Figure] = [
        heat_map(group[key], runs, runs, zmin=0, zmax=most, showscale=False, **on(index))
        for index, key in enumerate(("raw_distances", "matched_distances"))
    ]
    for index, line in enumerate(lines):
        pair = " to ".join(map(plain, line["pair"]))
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": pair,
                "showlegend": False,
                "x": rounded(line["t"]),
                "y": rounded(line["nll"]),
                "text": [
                    f"{pair}<br>at {claims.number(t)}: {claims.number(nll)} nats"
                    for t, nll in zip(line["t"], line["nll"], strict=True)
                ],
                "hoverinfo": "text",
                "line": {"color": COLOURS[index % len(COLOURS)], "width": 1.5},
                "marker": {"size": 4},
                **on(2),
            }
        )
    headings = ["distances as they are", "distances, tokens matched", "loss on the lines between (nats)"]
    for key in ("xaxis", "xaxis2"):
        layout[key] |= name_axis(range(1, len(runs) + 1)) | {"showgrid": False}
    layout["yaxis"] |= {**name_axis(runs), **_TOP_DOWN}
    layout["yaxis2"] |= {**name_axis(range(1, len(runs) + 1)), **_TOP_DOWN}
    layout |= {"height": 360, "annotations": [heading(i, headings[i]) for i in range(2 + bool(lines))]}
    return {"data": data, "layout": layout}


def transfer(transfer: claims.Part) -> Figure:
    """What each prompt adds on each task, to no prompt and to the task's own prompts; its own task framed."""
    gains = [array(claims.gains(transfer))]
    if transfer.get("gain_over_own") is not None:
        gains.append(array(transfer["gain_over_own"]))
    most = float(np.nanmax(np.abs(np.stack(gains)))) or 1.0
    layout, _ = panels(len(gains), len(gains), 0.06)
    bar = {"title": title("better by")}
    data = [
        heat_map(
            values, transfer["prompts"], transfer["tasks"], zmin=-most, zmax=most, colorscale=_DIVERGING, colorbar=bar,
            showscale=index == 0, **on(index),
        )
        for index, values in enumerate(gains)
    ]  # fmt: skip
    frames = [
        {
            "type": "rect",
            "xref": f"x{axis_key(index)}",
            "yref": f"y{axis_key(index)}",
            "x0": j - 0.5,
            "x1": j + 0.5,
            "y0": i - 0.5,
            "y1": i + 0.5,
            "line": {"color": GREY, "width": 3},
        }
        for index in range(len(gains))
        for i, j in own_cells(transfer)
    ]
    for index in range(len(gains)):
        layout[f"xaxis{axis_key(index)}"] |= {
            **name_axis(transfer["tasks"]),
            "showgrid": False,
            "title": title("measured on (framed: trained on)"),
        }
        layout[f"yaxis{axis_key(index)}"] |= {**name_axis(transfer["prompts"]), **_TOP_DOWN}
    if len(gains) > 1:
        layout["yaxis2"]["showticklabels"] = False
    headings = ["against no prompt", "against the task's own prompts"]
    layout |= {
        "height": 220 + 28 * len(transfer["prompts"]),
        "shapes": frames,
        "annotations": [heading(index, headings[index]) for index in range(len(gains))],
    }
    return {"data": data, "layout": layout}


def similarities(transfer: claims.Part) -> Figure:
    """A panel for each similarity between prompts."""
    found = transfer["similarities"]
    layout, rows = panels(len(found), min(2, len(found)), 0.14)
    data, prompts = [], transfer["prompts"]
    for index, values in enumerate(found.values()):
        shown = array(values)
        # A prompt is most like itself: left out, or it would take all the colours.
        np.fill_diagonal(shown, np.nan)
        data.append(heat_map(shown, prompts, prompts, showscale=False, **on(index)))
        axis = axis_key(index)
        layout[f"xaxis{axis}"] |= name_axis(range(1, len(prompts) + 1)) | {"showgrid": False}
        shown_names = prompts if index % 2 == 0 else range(1, len(prompts) + 1)
        layout[f"yaxis{axis}"] |= {**name_axis(shown_names), **_TOP_DOWN}
    layout |= {"height": 120 + 320 * rows, "annotations": [heading(i, plain(name)) for i, name in enumerate(found)]}
    return {"data": data, "layout": layout}
