"""Draws docs/priors/*.png, one picture a family: `python docs/pictures.py` (about two minutes; needs matplotlib).

Each shows 1,000 virtual tokens of the family, fitted with its default settings on SmolLM2-135M-Instruct, over the
vocabulary: on its first two principal components, and by Mahalanobis radius.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch


matplotlib.use("Agg")
import matplotlib.pyplot as plt


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from families import DESCRIPTION, english  # noqa: E402

from priors_peft import PriorConfig, load_base_model  # noqa: E402
from priors_peft.architecture import check_base_model  # noqa: E402
from priors_peft.fitting import new_encoder  # noqa: E402
from priors_peft.priors import StructuredPrior  # noqa: E402
from priors_peft.priors.reference import vocabulary_reference  # noqa: E402
from priors_peft.tasks import load_task  # noqa: E402


COUNT = 1000
VOCABULARY, SAMPLES = "#9aa7b5", "#d95f02"
CLAIMS = {
    "gaussian": "gaussian: the vocabulary's spread, none of its shape",
    "structured": "structured: the vocabulary's own shape",
    "exclusion": "exclusion: outside what the vocabulary fills",
    "interpolation": "interpolation: between MATH's tokens and English ones",
    "text": "text: close to the tokens of a description",
    "empirical": "empirical: the spread of three prompts trained on another task",
}


def draw(name: str, rows: torch.Tensor, samples: torch.Tensor, shape: StructuredPrior) -> None:
    """One picture."""
    centre = rows.mean(0)
    axes = torch.linalg.svd(rows[:: max(1, len(rows) // 8000)] - centre, full_matrices=False).Vh[:2]
    share = ((rows - centre) @ axes.mT).var(0) / rows.var(0).sum()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9))
    for points, color, size, label in (
        (
            rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:4000]],
            VOCABULARY,
            3,
            "vocabulary",
        ),
        (samples, SAMPLES, 7, f"{name} prior"),
    ):
        x, y = ((points - centre) @ axes.mT).mT.numpy()
        left.scatter(x, y, s=size, color=color, alpha=0.5, linewidths=0, label=label)
    left.set_xlabel(f"first principal component ({share[0]:.0%} of variance)")
    left.set_ylabel(f"second ({share[1]:.0%})")
    # Of one family a few far samples must not shrink the rest to a dot.
    reach = np.quantile(np.abs(((torch.cat([rows, samples]) - centre) @ axes.mT).numpy()), 0.998) * 1.15
    left.set_xlim(-reach, reach)
    left.set_ylim(-reach, reach)
    legend = left.legend(loc="upper left", fontsize=9, markerscale=3)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    radii = [(shape.to_whitened(points).norm(dim=-1) / shape.dim**0.5).numpy() for points in (rows, samples)]
    bins = np.linspace(0, max(2.2, float(np.quantile(radii[1], 0.995)) * 1.05), 70)
    for radius, color, label in zip(radii, (VOCABULARY, SAMPLES), ("vocabulary", f"{name} prior"), strict=True):
        weights = np.full(len(radius), 1 / len(radius))
        right.hist(radius.clip(0, bins[-1]), bins=bins, weights=weights, color=color, alpha=0.75, label=label)
    right.set_xlabel("Mahalanobis radius / √d (by the vocabulary's covariance)")
    right.set_ylabel("share of tokens")
    right.legend(fontsize=9)
    figure.suptitle(CLAIMS[name], fontsize=12)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "priors" / f"{name}.png", dpi=90)
    plt.close(figure)


def main() -> None:
    base, tokenizer = load_base_model("bundled:smollm2-135m")
    check_base_model(base)
    (rows,), _ = vocabulary_reference(base, [0], tokenizer)
    shape = StructuredPrior.fit(rows)
    math = [row["prompt"] + row["completion"] for row in load_task("math", num_train=4000, num_eval=128).train]
    trained = sys.argv[1] if len(sys.argv) > 1 else "outputs"
    settings = {
        "gaussian": {},
        "structured": {},
        "exclusion": {},
        "interpolation": {"reference": "activations", "reference_kwargs": {"data": [math, english()]}},
        "text": {"prior_kwargs": {"text": DESCRIPTION}},
        # What benchmarks/families.py leaves.
        "empirical": {
            "reference": "adapters",
            "reference_kwargs": {"adapters": [f"{trained}/mul, seed {seed}" for seed in range(3)]},
        },
    }
    for name, own in settings.items():
        config = PriorConfig(num_virtual_tokens=20, prior=name, token_dim=rows.shape[1], **own)
        encoder, _ = new_encoder(base, config, [0], tokenizer)
        generator = torch.Generator().manual_seed(0)
        samples = torch.cat([encoder.priors[0].sample(20, generator) for _ in range(COUNT // 20)])
        draw(name, rows, samples, shape)
        print(f"docs/priors/{name}.png")


if __name__ == "__main__":
    main()
