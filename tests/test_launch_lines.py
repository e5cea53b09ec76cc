"""Every launch line of the documentation is run as printed, but for flags behind it that make it short.

Models and data sets come, under the ids that are printed, from a Hub on this machine, which has tiny models and a few
rows; lines that name `DATA` run without any Hub.
"""

import copy
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from conftest import CONFIGS, addition_rows, write_superglue
from test_docs import COMMAND_LINES, ROOT, has_launcher, lines
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from priors_peft.files import cache_dir, sha256, write_json
from priors_peft.hub.base_model import GGUF_SHA256, MANIFEST
from priors_peft.tasks.superglue import SUBTASKS


HERE = Path(__file__).parent
MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "llama",
    "openai-community/gpt2": "gpt2",
    "bigscience/bloomz-560m": "bloom",
    "meta-llama/Llama-3.2-1B": "llama",
}
RUN_ELSEWHERE = {"docs/exports.md": "tests/hub/test_export.py", "docs/hub.md": "tests/hub/test_push.py"}
RUNS = ["--max_steps", "2", "--num_train", "16", "--num_eval", "8", "--disable_tqdm", "true"]
# The first name among a line's words says what makes it short.
SHORT = {
    "train": RUNS,
    "recipes/train.py": RUNS,
    "recipes/paper/small.yaml": [*RUNS, "--tuning", "soft", "--prior", "gaussian", "structured"],
    "recipes/paper/grid.yaml": [*RUNS, "--seed", "0", "--tuning", "four", "--prior", "interpolation"],
    "recipes/paper/deep.yaml": [*RUNS, "--seed", "0", "--task", "squad"],
    "recipes/paper/llama-3.2-1b.yaml": [*RUNS, "--seed", "0", "--tuning", "soft", "--prior", "exclusion"],
    "benchmarks/low_data.py": [
        *("--tasks", "add_or_sub", "--sizes", "16", "--seeds", "0", "--steps", "2", "--num_eval", "6"),
        *("--num_answers", "2", "--num_draws", "2", "--picture", "outputs/low_data.png"),
    ],
    "benchmarks/optimizers.py": [
        *("--tasks", "arithmetic__add_or_sub", "--optimizers", "AdamW", "Muon"),
        *("--steps", "1", "--seeds", "1", "--num_eval", "6"),
    ],
    "recipes/prompts/run.py": RUNS,
    "recipes/semantics/run.py": [
        *("--max_steps", "2", "--num_train", "16", "--seeds", "1", "--num_transfer", "6", "--num_analysis", "1"),
        *("--tasks", "rte", "wic"),
        *("--num_draws", "20", "--disable_tqdm", "true"),
    ],
    "analyze": ["--num_draws", "19"],
    "compare": ["--num_permutations", "9"],
    "transfer": ["--num_eval", "6"],
    "evaluate": [],
    "card": [],
    "push": [],
}


def short(words: list[str]) -> list[str]:
    return [*words, *next(SHORT[word] for word in words if word in SHORT)]


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's and Llama 3's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet))  # fmt: skip
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_model(architecture: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    config = copy.deepcopy(CONFIGS[architecture])
    config.vocab_size = len(tokenizer)
    setattr(config, "n_positions" if architecture == "gpt2" else "max_position_embeddings", 512)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_data(folder: Path) -> list[str]:
    """The data sets' own files, of a few rows; returns their texts."""
    write_superglue(folder / "superglue")
    squad = [
        {"context": f"The box with number {n} holds {n + 7} green and {n * 3} red stones.", "question": f"How many green stones are in box {n}?", "answer": str(n + 7)}
        for n in range(40)
    ]  # fmt: skip
    (folder / "squad").mkdir()
    (folder / "squad" / "train.json").write_text(json.dumps(squad))
    prompts = [
        (f"Guide {n}", f"I want you to act as guide number {n}. I will give you {n} places.") for n in range(60)
    ]
    (folder / "prompts").mkdir()
    with open(folder / "prompts" / "prompts.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("act", "prompt"), *prompts])
    texts = [line for path in folder.glob("superglue/*/*.jsonl") for line in path.read_text().splitlines()]
    return [*texts, *(" ".join(row.values()) for row in squad), *(" ".join(row) for row in prompts)]


def fill(hub, data: Path, tokenizer: PreTrainedTokenizerFast, scratch: Path) -> None:
    """Put the models and, as the Hub has them, the data sets there."""

    def put(name: str, files: dict[str, bytes]) -> None:
        hub.create(name)
        hub.commit(name, "main", "all", files)

    def parquet(name: str, parts: dict[str, dict[str, datasets.Dataset]]) -> None:
        configs = [
            {"config_name": part, "data_files": [{"split": split, "path": f"{part}/{split}-*"} for split in splits]}
            for part, splits in parts.items()
        ]
        files = {"README.md": f"---\n{json.dumps({'configs': configs})}\n---\n".encode()}
        for part, splits in parts.items():
            for split, rows in splits.items():
                rows.to_parquet(scratch / "part.parquet")
                files[f"{part}/{split}-00000-of-00001.parquet"] = (scratch / "part.parquet").read_bytes()
        put(f"datasets/{name}", files)

    for name, architecture in MODELS.items():
        folder = save_model(architecture, tokenizer, scratch / name)
        put(name, {path.name: path.read_bytes() for path in folder.iterdir()})
    rows = json.loads((data / "squad" / "train.json").read_text())
    squad = datasets.Dataset.from_list(
        [
            {"id": str(n), "title": "T", "context": row["context"], "question": row["question"]}
            | {"answers": {"text": [row["answer"]], "answer_start": [row["context"].find(row["answer"])]}}
            for n, row in enumerate(rows)
        ]
    )
    splits = {"train": squad.select(range(30)), "validation": squad.select(range(30, 40))}
    parquet("rajpurkar/squad", {"plain_text": splits})
    parts = {}
    for subtask in ("rte", "wsc", "boolq", "wic"):
        names = list(SUBTASKS[subtask].verbalizer)
        parts[subtask] = {}
        for split, file in (("train", "train"), ("validation", "val")):
            path = data / "superglue" / SUBTASKS[subtask].folder / f"{file}.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            rows = [
                {key: value for key, value in row.items() if key != "target"}
                | row.get("target", {})
                | {"label": names.index(str(row["label"]))}
                for row in rows
            ]
            of = datasets.Dataset.from_list(rows)
            parts[subtask][split] = of.cast_column("label", datasets.ClassLabel(names=names))
    parquet("aps/super_glue", parts)
    prompts = (data / "prompts" / "prompts.csv").read_bytes()
    put("datasets/fka/awesome-chatgpt-prompts", {"prompts.csv": prompts})


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder as a user has it: recipes, data, rows of their own, and a tiny model in place of the bundled one."""
    for name in ("recipes", "benchmarks", "accelerate_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    texts = write_data(tmp_path / "DATA")
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in addition_rows(40)))
    cache = tmp_path / "cache"
    (cache / "models").mkdir(parents=True)
    (cache / "math").symlink_to(cache_dir() / "math")
    bundled = save_model("llama", tokenizer_of(texts), cache / "models" / f"smollm2-135m-{GGUF_SHA256[:12]}")
    write_json(bundled / MANIFEST, {"sha256": {file.name: sha256(file) for file in bundled.iterdir()}})
    return tmp_path


def launch(place: Path, jobs: list[list[str]], environment: dict[str, str]) -> None:
    """Run lines one after another; a failure shows what the line printed."""
    logs = place / "logs"
    logs.mkdir()
    (place / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(HERE / "launching.py"), str(place / "jobs.json"), str(logs)]
    own = {"PRIORS_PEFT_CACHE": str(place / "cache"), "HF_HOME": str(place / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    own |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=place, env=os.environ | own | environment, capture_output=True, text=True)
    number = len(list(logs.iterdir())) - 1
    assert done.returncode == 0, (
        f"{' '.join(jobs[number])}\n{(logs / f'{number}.txt').read_text()[-4000:]}\n{done.stderr[-2000:]}"
    )


def printed(with_data: bool) -> list[list[str]]:
    """The lines that are run here, each once."""
    chosen = [
        words
        for page, words in COMMAND_LINES
        if words[0] != "make" and page not in RUN_ELSEWHERE and not has_launcher(words)
        and with_data == ("DATA" in " ".join(words))
    ]  # fmt: skip
    return [words for number, words in enumerate(chosen) if words not in chosen[:number]]


def test_every_line_is_run_here_or_by_another_test():
    assert all(short(words) for with_data in (True, False) for words in printed(with_data))
    for page, test in RUN_ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8") and lines(page)


@pytest.mark.slow
def test_lines_that_take_models_and_data_from_the_hub_run(place, hub):
    scratch = place / "scratch"
    scratch.mkdir()
    bundled = next(path for path in (place / "cache" / "models").iterdir() if path.is_dir())
    fill(hub, place / "DATA", PreTrainedTokenizerFast.from_pretrained(bundled), scratch)
    shutil.rmtree(place / "DATA")
    # What pages say of recipes whose lines name a folder: without it the data comes from the Hub.
    recipes = [f"recipes/{name}/soft_structured.yaml" for name in ("squad", "superglue")]
    jobs = [*printed(with_data=False), *(["priors-peft", "train", recipe] for recipe in recipes)]
    launch(place, [short(words) for words in jobs], hub.environment())
    for name in MODELS:
        assert hub.counted(f"/{name}/resolve/"), name
    for name in ("rajpurkar/squad", "aps/super_glue", "fka/awesome-chatgpt-prompts"):
        assert hub.counted(f"/datasets/{name}/resolve/"), name
    written = [
        "mine/README.md",
        "paper/compare/compare.md",
        "semantics_bloomz/report.html",
        "paper_llama/results.jsonl",
    ]
    for path in written:
        assert (place / "outputs" / path).is_file(), path


@pytest.mark.slow
def test_lines_that_name_a_folder_of_data_need_no_hub(place):
    (place / "outputs").mkdir()
    for number in (0, 1):  # `outputs/seed*` are prompts for RTE
        (place / "outputs" / f"seed{number}").symlink_to(f"rte-{number}")
    train = ["priors-peft", "train", "--model", "bundled:smollm2-135m", "--data_dir", "DATA/superglue", *RUNS]
    jobs = [
        [*train, "--task", task, "--seed", seed, "--output_dir", f"outputs/{task}-{seed}"]
        for task, seed in (("rte", "0"), ("rte", "1"), ("wic", "0"), ("boolq", "0"))
    ]
    launch(place, [*jobs, *(short(words) for words in printed(with_data=True))], {"HF_HUB_OFFLINE": "1"})
    written = ["seeds/report.html", "analysis/transfer.png", "semantics/report.html", "paper/compare/compare.md"]
    for path in written:
        assert (place / "outputs" / path).is_file(), path
