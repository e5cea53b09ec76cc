"""What priors cost: seconds and memory of fitting and sampling, milliseconds of the prior term of a training step.

    python benchmarks/priors.py --dims 576 2048 4096
    python benchmarks/priors.py --share

The second line says what share of a training step the prior takes: θ = µ + A z, log p(θ) and both gradients, beside a
whole step of a Llama of that width (random weights; at 4096 of two layers only, so that real models' shares are less).

Each row runs in a process of its own. Memory is the process's peak less what it held once the reference was made.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import torch


VIRTUAL_TOKENS = 20
DIMS = (576, 2048, 4096)
PROMPTS = 16
FAMILIES = {
    "gaussian": {},
    "structured": {},
    "structured, low_rank": {"structure": "low_rank"},
    "structured, block": {"structure": "block"},
    "structured, mixture": {"structure": "mixture"},
    "exclusion": {},
    "exclusion, rejection": {"method": "rejection"},
    "interpolation": {},
    "text": {"num_virtual_tokens": VIRTUAL_TOKENS},
    "empirical": {},
    "empirical, mixture": {"structure": "mixture"},
}


def correlated_rows(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Rows with a spectrum that decays like that of embeddings, made in pieces so that only the result is held."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(64, dim, generator=generator) / torch.arange(1, 65).sqrt()[:, None]
    reference = torch.empty(rows, dim)
    for piece in reference.split(1000):
        piece.normal_(generator=generator).add_(torch.randn(len(piece), 64, generator=generator) @ factor)
    return reference


def peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure(name: str, dim: int, rows: int) -> dict[str, float]:
    """Figures of one family at one width, in this process."""
    # Imported before the baseline is taken: libraries are not the prior's memory.
    import scipy.special  # noqa: F401
    import sklearn.covariance
    import sklearn.mixture  # noqa: F401

    from priors_peft.priors import prior_class

    family, settings = name.partition(",")[0], dict(FAMILIES[name])
    reference: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = correlated_rows(rows, dim)
    if family == "interpolation":
        # The same number of rows in all.
        reference = (reference[: rows // 2], reference[rows // 2 :] * 0.8 + 0.1)
    elif family == "empirical":
        reference = reference[: PROMPTS * VIRTUAL_TOKENS].unflatten(0, (PROMPTS, VIRTUAL_TOKENS)).clone()
    elif family == "text":
        settings["token_embeddings"] = reference[:VIRTUAL_TOKENS]
    baseline = peak_mib()

    start = time.perf_counter()
    prior = prior_class(family).fit(reference, **settings)
    fit_seconds = time.perf_counter() - start
    fit_mib = peak_mib() - baseline

    start = time.perf_counter()
    prompt = prior.sample(VIRTUAL_TOKENS, torch.Generator().manual_seed(0))
    sample_seconds = time.perf_counter() - start
    sample_mib = peak_mib() - baseline - fit_mib

    prompt.requires_grad_()
    times = []
    for _ in range(12):
        start = time.perf_counter()
        prior.log_prob(prompt).backward()
        times.append(time.perf_counter() - start)
    return {
        "fit_seconds": fit_seconds,
        "fit_mib": fit_mib,
        "sample_seconds": sample_seconds,
        "sample_mib": sample_mib,
        "log_prob_ms": 1000 * sorted(times[2:])[5],
    }


# Width, intermediate size, layers, heads, vocabulary, and rows of 64 tokens.
SHAPES = {576: (1536, 30, 9, 49152, 8), 4096: (11008, 2, 32, 32000, 8)}


def share(dim: int) -> tuple[float, float]:
    """Milliseconds of the prior's part and of a whole training step under the structured prior, medians of 7."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from priors_peft import PriorConfig, get_prior_model
    from priors_peft.priors import StructuredPrior

    intermediate, layers, heads, vocabulary, rows = SHAPES[dim]
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=dim,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=vocabulary,
        )
    )
    prior = StructuredPrior.fit(correlated_rows(2 * dim, dim))
    model = get_prior_model(
        base, PriorConfig(num_virtual_tokens=VIRTUAL_TOKENS, prior=prior, prior_weight=1.0)
    ).train()
    encoder = model.prompt_encoder["default"]
    ids = torch.randint(vocabulary, (rows, 64), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :-4] = -100

    def prior_part() -> None:
        prompt = encoder()
        (prompt.sum() - encoder.log_prob(prompt)).backward()

    def step() -> None:
        outputs = model(input_ids=ids, labels=labels)
        (outputs.loss - 1e-4 * outputs.log_prior).backward()

    medians = []
    for part in (prior_part, step):
        times = []
        for _ in range(9):
            start = time.perf_counter()
            part()
            times.append(time.perf_counter() - start)
        medians.append(1000 * sorted(times[2:])[3])
    return medians[0], medians[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--share", action="store_true", help="the prior's share of a training step instead")
    arguments = parser.parse_args()
    if arguments.share:
        print(f"P = {VIRTUAL_TOKENS}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
        print("| d | prior, ms | training step, ms | share |\n|--:|--:|--:|--:|")
        for dim in SHAPES:
            part, whole = share(dim)
            print(f"| {dim} | {part:.2f} | {whole:.0f} | {part / whole:.2%} |", flush=True)
        return
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.dims[0], arguments.rows)))
        return

    print(
        f"{arguments.rows} rows, P = {VIRTUAL_TOKENS}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print("| prior | d | fit, s | fit, MiB | sample, ms | sample, MiB | log_prob and gradient, ms |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for dim in arguments.dims:
        for name in arguments.families:
            command = [sys.executable, __file__, "--one", name, "--dims", str(dim), "--rows", str(arguments.rows)]
            done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
            if done.returncode != 0:
                print(f"| {name} | {dim} | failed: {(done.stderr.splitlines() or [f'exit {done.returncode}'])[-1]} |")
                continue
            figures = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {name} | {dim} | {figures['fit_seconds']:.2f} | {figures['fit_mib']:.0f} "
                f"| {1000 * figures['sample_seconds']:.1f} | {figures['sample_mib']:.0f} "
                f"| {figures['log_prob_ms']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
