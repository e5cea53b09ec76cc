"""Every figure of the report by the id of its place in the page."""

from .. import claims
from ..pictures.activations import conditions
from ..pictures.projection import PLANES
from . import prompts, tasks
from .plots import Figure


def figures(analysis: claims.Part) -> dict[str, Figure]:
    """Traces and layouts of what an analysis holds, as `Plotly.newPlot` takes them."""
    adapters = analysis["adapters"]
    found = {
        f"tokens-{i}": prompts.tokens(each, analysis["level"]) for i, each in enumerate(adapters) if each.get("tokens")
    }
    found |= {f"geometry-{layer}": prompts.geometry(adapters, layer) for layer in prompts.geometry_layers(adapters)}
    if analysis.get("words"):
        found["words"] = prompts.words(analysis["words"])
    for name in PLANES:
        if (analysis.get("projection") or {}).get(name):
            found[name] = prompts.projection(adapters, analysis["projection"][name])
    return found | _at_work(analysis)


def _at_work(analysis: claims.Part) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    measured = {i: adapter for i, adapter in enumerate(analysis["adapters"]) if adapter.get("faithfulness")}
    if (analysis.get("activations") or {}).get("layers"):
        for index, layers in enumerate(conditions(analysis["activations"]).values()):
            found[f"activations-{index}"] = tasks.activations(layers)
    if measured:
        found["losses"] = tasks.losses(list(measured.values()))
    found |= {
        f"ablations-{i}": tasks.ablations(each) for i, each in measured.items() if each["faithfulness"]["ablations"]
    }
    for index, group in enumerate((analysis.get("stability") or {}).get("groups") or []):
        found[f"stability-{index}"] = tasks.stability(group)
    if transfer := analysis.get("transfer"):
        found["transfer"] = tasks.transfer(transfer)
        if transfer.get("similarities"):
            found["similarities"] = tasks.similarities(transfer)
    return found
