"""The report's figures of the prompts themselves: nearest tokens, words, geometry, projections."""

from collections.abc import Sequence

from .. import claims
from ..pictures.geometry import MEASURES, bands, known_steps, measured_names
from ..pictures.projection import KIND_LABELS, KINDS, task_colour, ways
from ..pictures.style import GREY, INHERITED, PALE, SIGNAL, array, colours, prior_band
from ..pictures.tokens import SCORES
from .plots import BAND, Figure, axis_key, heading, name_axis, on, panels, plain, rounded, short, title


def geometry_layers(adapters: Sequence[claims.Part]) -> list[int]:
    """Layers of which geometry is there, the embedding layer first."""
    layers = [layer for adapter in adapters for layer in (adapter.get("geometry") or {}).get("layers") or []]
    return sorted({layer["layer"] for layer in layers}, key=lambda layer: (layer < 0, layer))


def tokens(adapter: claims.Part, level: float) -> Figure:
    """Each virtual token's score, beside random prompts and the start."""
    rows, metric = adapter["tokens"]["virtual_tokens"], adapter["tokens"]["metric"]
    low, high = prior_band(adapter["tokens"])
    places = [row["index"] for row in rows]
    data: list[Figure] = [
        {
            "type": "bar",
            "name": "random prompts, 5 to 95 %",
            "x": places,
            "y": rounded(high - low),
            "base": rounded(low),
            "marker": {"color": BAND},
            "hoverinfo": "skip",
        }
    ]
    started = [row for row in rows if row.get("initial_nearest")]
    if started:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "at the start",
                "x": [row["index"] for row in started],
                "y": rounded(row["initial_nearest"][0]["score"] for row in started),
                "text": [
                    f"{row['index']} at the start: {plain(row['initial_nearest'][0]['text'])}" for row in started
                ],
                "marker": {"symbol": "diamond-open", "color": GREY, "size": 7},
                "hoverinfo": "text",
            }
        )
    for state, label, colour, symbol in (
        ("chance", "no nearer", GREY, "circle"),
        ("inherited", "inherited (start or prior)", INHERITED, "square"),
        ("signal", "nearer than random prompts", SIGNAL, "circle"),
    ):
        chosen = [row for row in rows if claims.token_state(row, level) == state]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label,
                "x": [row["index"] for row in chosen],
                "y": rounded(row["score"] for row in chosen),
                "text": [
                    f"{row['index']}: {plain(row['nearest'][0]['text'])}<br>{claims.number(row['score'])}, "
                    f"p = {claims.number(row['p_value'])}"
                    for row in chosen
                ],
                "marker": {"color": colour, "symbol": symbol, "size": 9},
                "hoverinfo": "text",
            }
        )
    layout = {
        "height": 320,
        "xaxis": {
            "title": title("virtual token"),
            "dtick": 1 if len(rows) <= 40 else 10,
            "range": [-0.7, len(rows) - 0.3],
        },
        "yaxis": {"title": title(SCORES[metric])},
    }
    return {"data": data, "layout": layout}


def words(words: claims.Part, most: int = 25) -> Figure:
    """The words most over-represented in the prompts."""
    count = min(most, len(words["words"]))
    order = range(count - 1, -1, -1)
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": rounded(words["z"][i] for i in order),
        "y": list(range(count)),
        "text": [
            f"{plain(words['words'][i])}: in {words['counts'][i]} prompts, {words['background'][i]} in the background"
            for i in order
        ],
        "textposition": "none",
        "hoverinfo": "text",
        "marker": {"color": [SIGNAL if words["z"][i] > 1.96 else GREY for i in order]},
    }
    layout = {
        "height": 120 + 20 * count,
        "xaxis": {"title": title("log-odds against the background, standard deviations")},
        "yaxis": name_axis(words["words"][i] for i in order),
    }
    return {"data": [trace], "layout": layout}


def geometry(adapters: Sequence[claims.Part], layer: int) -> Figure:
    """A panel for each measure over training, at one layer."""
    series = {
        adapter["name"]: each["series"]
        for adapter in adapters
        for each in (adapter.get("geometry") or {}).get("layers") or []
        if each["layer"] == layer
    }
    measures = measured_names(series)
    layout, rows = panels(len(measures), 3)
    palette = colours(adapters)
    data, shapes = [], []
    entries: set[str] = set()
    for index, name in enumerate(measures):
        axis = axis_key(index)
        for low, high, colour in bands(series, name, palette):
            where = {"xref": f"x{axis} domain", "yref": f"y{axis}", "x0": 0, "x1": 1, "y0": low, "y1": high}
            look = {"fillcolor": colour, "opacity": 0.2, "line": {"width": 0}, "layer": "below"}
            shapes.append({"type": "rect", **where, **look})
        for key, one in series.items():
            measure = one["measures"].get(name)
            if measure is None:
                continue
            colour, label = palette[key]
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": short(label),
                    "legendgroup": plain(label),
                    "showlegend": label not in entries,
                    "x": known_steps(one),
                    "y": rounded(measure["values"]),
                    "text": [
                        f"{plain(key)}{at_step(step)}: {claims.number(value)}<br>"
                        f"above {claims.number(share)} % of random prompts"
                        for step, value, share in zip(
                            one["steps"], measure["values"], measure["percentile"], strict=True
                        )
                    ],
                    "hoverinfo": "text",
                    "line": {"color": colour, "width": 1.5},
                    "marker": {"size": 4},
                    **on(index),
                }
            )
            entries.add(label)
    over_time = any(len(one["steps"]) > 1 for one in series.values())
    for index in range(len(measures)):
        below = title("training step") if index >= len(measures) - 3 and over_time else None
        layout[f"xaxis{axis_key(index)}"] |= {"title": below, "showticklabels": over_time}
    layout |= {
        "height": 120 + 210 * rows,
        "annotations": [heading(index, MEASURES[name]) for index, name in enumerate(measures)],
        "shapes": shapes,
    }
    return {"data": data, "layout": layout}


def at_step(step: int | None) -> str:
    return "" if step is None else f", step {step}"


def projection(adapters: Sequence[claims.Part], projection: claims.Part) -> Figure:
    """Every group in a plane; a trace's `meta` is its kind, by which the page shows and hides it."""
    palette = colours(adapters)
    data = []
    for group in sorted(projection["groups"], key=lambda group: KINDS.index(group["kind"])):
        points, kind = array(group["points"]).reshape(-1, 2), group["kind"]
        colour, own = palette.get(group["name"], (task_colour(group["name"], palette), group["name"]))
        steps = group["steps"] or [None] * len(points)
        hover = [
            f"{plain(label)}<br>{plain(group['name'])}{at_step(step)}"
            for label, step in zip(group["labels"], steps, strict=True)
        ]
        order = list(range(len(points)))
        if kind == "trajectory":
            # A gap after each virtual token's way, so that one trace holds them all.
            order = [place for way in ways(group) for place in [*way.tolist(), -1]]
        gapped = {
            axis: [None if i < 0 else value for i, value in zip(order, rounded(points[order, column]), strict=True)]
            for column, axis in enumerate("xy")
        }
        trace = {
            "type": "scatter",
            "mode": "lines+markers" if kind == "trajectory" else "markers",
            "name": short(own if kind in ("prompt", "initial", "trajectory", "posterior") else KIND_LABELS[kind]),
            "meta": kind,
            "legendgroup": plain(f"{kind}-{own}"),
            "showlegend": kind == "prompt",
            **gapped,
            "text": [None if i < 0 else hover[i] for i in order],
            "hoverinfo": "text",
            "marker": {"color": colour, **_MARKERS[kind]},
        }
        if kind == "trajectory":
            trace["line"] = {"color": colour, "width": 1}
            trace["opacity"] = 0.6
        data.append(trace)
    entries: set[str] = set()
    for trace in data:
        trace["showlegend"] = trace["showlegend"] and trace["name"] not in entries
        entries |= {trace["name"]} if trace["showlegend"] else set()
    shares = projection.get("explained_variance")
    titles = (
        [f"component {i + 1} ({claims.percent(share)} of variance)" for i, share in enumerate(shares[:2])]
        if shares
        else ["no unit: only neighbours mean something", ""]
    )
    layout = {
        "height": 620,
        "xaxis": {"title": title(titles[0]), "zeroline": False, "showticklabels": bool(shares)},
        "yaxis": {"title": title(titles[1]), "zeroline": False, "showticklabels": bool(shares)},
    }
    return {"data": data, "layout": layout}


_MARKERS: dict[str, Figure] = {
    "vocabulary": {"size": 4, "color": PALE},
    "draws": {"size": 5, "symbol": "x-thin-open", "color": GREY},
    "activations": {"size": 5, "symbol": "triangle-up"},
    "trajectory": {"size": 3},
    "initial": {"size": 6, "symbol": "diamond-open"},
    "posterior": {"size": 4, "opacity": 0.4},
    "prompt": {"size": 9, "line": {"width": 1, "color": "white"}},
}
# The same in text, beside the boxes that show and hide them.
KIND_SYMBOLS = {
    "vocabulary": "•", "draws": "×", "activations": "▲", "trajectory": "—", "initial": "◇", "posterior": "∘", "prompt": "●",
}  # fmt: skip
