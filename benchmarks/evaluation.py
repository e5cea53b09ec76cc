"""Evaluation beside stock PEFT's: likelihood and greedy answers of RTE, 100 virtual tokens, 16 rows a batch.

    python benchmarks/evaluation.py --data_dir DATA

Stock takes the rows as they come, padded on the left as its generation needs; beside it stock with rows sorted by length,
which it does not do by itself. Ours is what `PriorTrainer.evaluate` does. Each measures the same rows, in turn.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from side_by_side import base_model, machine, ours, pairs, ratio, stock_twin

from priors_peft import PriorTrainer, PriorTrainingArguments, load_base_model
from priors_peft.data import IGNORED, pad, padded_text, prompts_of, tokenize
from priors_peft.tasks import load_task


ROWS, BATCH, NEW_TOKENS, VIRTUAL_TOKENS = 32, 16, 5, 100


@torch.no_grad()
def stock_evaluation(model: Any, rows: list[dict], pad_token_id: int, device: torch.device) -> tuple[float, list]:
    """Summed nats of the answers, and generated ids, as one would write it with stock PEFT."""
    total, answers = 0.0, []
    for start in range(0, len(rows), BATCH):
        chunk = rows[start : start + BATCH]
        text = padded_text([row["input_ids"] for row in chunk], pad_token_id, "left", device)
        labels = pad([row["labels"] for row in chunk], IGNORED, "left").to(device)
        loss = model(**text, labels=labels).loss
        total += float(loss) * int((labels != IGNORED).sum())
        prompts = prompts_of(*(part.tolist() for part in (*text.values(), labels)))
        generated = model.generate(
            **padded_text(prompts, pad_token_id, "left", device),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=pad_token_id,
            eos_token_id=None,
        )
        answers += generated[:, -NEW_TOKENS:].tolist()
    return total, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/evaluation.jsonl"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--data_dir")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    model_name = "bundled:smollm2-135m"
    base, tokenizer = base_model(model_name, options.device, options.dtype), load_base_model(model_name)[1]
    folder = options.data_dir and str(Path(options.data_dir) / "superglue")
    task = load_task("superglue", subtask="rte", data_dir=folder, num_train=8, num_eval=ROWS)
    tuned = ours(base, VIRTUAL_TOKENS).eval()
    # Answers that end early would be padded by one side and not the other.
    tuned.generation_config.eos_token_id = None
    stock = stock_twin(base, tuned.prompt_encoder["default"]()[0]).eval()
    arguments = PriorTrainingArguments(
        output_dir="outputs/evaluation",
        per_device_eval_batch_size=BATCH,
        max_new_tokens=NEW_TOKENS,
        use_cpu=options.device.type == "cpu",
        disable_tqdm=True,
        report_to=[],
    )
    trainer = PriorTrainer(
        model=tuned, args=arguments, processing_class=tokenizer, compute_metrics=lambda prediction: {}
    )
    rows = list(tokenize(task.eval, tokenizer))
    by_length = sorted(rows, key=lambda row: -len(row["input_ids"]))

    def stock_on(rows: list[dict]) -> tuple[float, list]:
        return stock_evaluation(stock, rows, tokenizer.pad_token_id, options.device)

    def tuned_on(_: int) -> Any:
        return trainer.predict(task.eval)

    tokens = sum(len(row["labels"]) - row["labels"].count(IGNORED) for row in rows)
    results = {"stock_nll": stock_on(rows)[0] / tokens, "ours_nll": tuned_on(0).metrics["test_loss"]}
    for name, given in (("as they come", rows), ("sorted by length", by_length)):
        timed = pairs(lambda _, given=given: stock_on(given), tuned_on, options.pairs, options.device)  # type: ignore[misc]
        results[name] = ratio(timed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"rows": ROWS, **results, **machine(options.device)})
    with options.output.open("a") as file:
        file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
