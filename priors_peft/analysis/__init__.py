"""What came out: measures and pictures of prompts, tensors in, plain values out.

`tokens` which vocabulary tokens a prompt lies near, and whether that is signal · `words` tokens as people read them ·
`geometry` shape and place, over training · `discrepancy` to the vocabulary's distribution · `projection` into a plane ·
`stability` of runs · `transfer` between tasks · `activations` of tasks · `faithfulness` of a prompt to its tokens.

`measure` asks the model, `description` in its own words. `compare` holds runs of several priors against one another,
`places` says where their prompts end up. `collect` makes one dictionary of it all, from adapters that `sources` reads, by way of
`members` (their nulls), `projected`, `runs` and `on_tasks`; `pictures` and `report` draw it.
"""

import importlib
from typing import Any


# What users import from here, by where it lives; loaded on first use.
_MODULES = {
    "collect": "analyze",
    "pictures": "save_pictures",
    "report": "save_report",
    "sources": "read_sources",
    "tokens": "best_scores nearest_tokens token_changes token_signal",
    "words": "count_words over_represented script script_shares show_token",
    "languages": "language_probabilities language_signal word_reader",
    "geometry": "effective_rank geometry_series mahalanobis_radius mean_pairwise_cosine token_drift token_geometry",
    "discrepancy": "mmd_test squared_mmd",
    "projection": "pca tsne umap",
    "description": "describe",
    "faithfulness": "ablations harden rank_ablations waywardness",
    "activations": "match_lengths pool separability",
    "stability": "barrier equidistance line_points metric_spread prompt_distances",
    "transfer": "activation_overlap prompt_similarities transfer_correlation transfer_summary",
    "measure": "ablation_nlls line_nlls neuron_activations no_prompt_nll prompt_nll task_activations",
}
_LOCATIONS = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(_LOCATIONS)


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LOCATIONS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LOCATIONS])
