"""Any data of the user's, from a file or a data set: prompts and completions, conversations, or plain text."""

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .base import Task, longest, prompt_completion
from .files import Placed, hold_out, keep, load_hub, read_rows, split_rows
from .metrics import completion_metrics


logger = logging.getLogger(__name__)

Pair = tuple[str, str]


def load(
    train_file: str | None = None,
    eval_file: str | None = None,
    dataset: str | None = None,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    num_train: int | None = None,
    num_eval: int | None = None,
    seed: int = 0,
    data_dir: str | None = None,
    tokenizer: Any = None,
) -> Task:
    """Load the user's rows, each in one of three forms.

    - `prompt` and `completion` (or columns of other names): the completion is learnt.
    - `messages`, a list of `{"role": ..., "content": ...}`: the last, the assistant's, is learnt; those before it are the
      prompt, in the tokenizer's chat template.
    - `text`: all of it is learnt.

    Without an `eval_file` (or, for a data set, a `validation` or `test` split), `num_eval` training rows are held out
    by `seed`: by default a tenth, at least 1 and at most 512. Training rows equal to a held-out row are dropped.

    Args:
        train_file: A `.jsonl`, `.json` (an array of objects, or one object a line) or `.csv` file in UTF-8.
        eval_file: The same for evaluation.
        dataset: Instead of files, a data set for `datasets.load_dataset`: a Hub id or a folder.
        prompt_column: Column of the prompts.
        completion_column: Column of the completions; none may be empty.
        num_train: Keep this many training rows, drawn by `seed` and in their order. `None` keeps all.
        num_eval: Keep this many evaluation rows. `None` keeps all of an evaluation file or split; 0 means none.
        seed: Which rows are kept and which held out.
        data_dir: Folder that relative `train_file` and `eval_file` are looked for in.
        tokenizer: Of the base model; its chat template is needed for `messages`.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file can't be parsed, is empty, lacks a column, or holds an empty completion or a value that is
            not a string; the message names the file and the line. Also if there are `messages`, but no chat template.
        OSError: If the data set can't be reached.
    """
    if (train_file is None) == (dataset is None):
        raise ValueError(
            "task 'completions' needs one of train_file and dataset, "
            f"got train_file={train_file!r} and dataset={dataset!r}. Pass a .jsonl, .json or .csv file, or a Hub id"
        )
    columns = (prompt_column, completion_column)
    held_out = None
    if train_file is not None:
        train = pairs_of(read_rows(_find(train_file, data_dir, "train_file")), columns, tokenizer)
        if eval_file is not None and num_eval != 0:
            held_out = pairs_of(read_rows(_find(eval_file, data_dir, "eval_file")), columns, tokenizer)
        source = train_file
    else:
        if eval_file is not None:
            raise ValueError(
                f"eval_file goes with train_file, got {eval_file!r} with dataset={dataset!r}. Leave it out"
            )
        source = str(dataset)
        splits = load_hub(source, instead="pass a file as train_file")
        forms, present = (columns, ("messages",), ("text",)), set(splits["train"].column_names)
        form: tuple[str, ...] = next((form for form in forms if set(form) <= present), ())
        train = pairs_of(split_rows(source, splits, "train", form), columns, tokenizer)
        split = next((split for split in ("validation", "test") if split in splits), None)
        if split is not None and num_eval != 0:
            held_out = pairs_of(split_rows(source, splits, split, form), columns, tokenizer)

    draw = random.Random(seed)
    if held_out is None and num_eval != 0:
        train, held_out = hold_out(draw, train, num_eval, source)
    elif held_out:
        shared = len(set(held_out) & set(train))
        if shared:
            logger.warning("%d evaluation rows of %s are training rows too, so its score flatters", shared, source)
        held_out = keep(draw, held_out, num_eval, "num_eval", source)
    train = keep(draw, train, num_train, "num_train", source)
    return Task(
        name="completions",
        train=prompt_completion(train),
        eval=prompt_completion(held_out) if held_out else None,
        metrics=completion_metrics,
        max_new_tokens=longest(completion for _, completion in train + (held_out or [])),
        dataset=dataset,
    )


def _find(file: str, data_dir: str | None, argument: str) -> Path:
    path = Path(data_dir or ".").expanduser() / Path(file).expanduser()
    if not path.is_file():
        where = f" in data_dir {data_dir!r}" if data_dir else f" from {str(Path.cwd())!r}"
        raise FileNotFoundError(
            f"{argument} must be an existing file, got {file!r}{where}. Check the path: a .jsonl, .json or .csv file "
            "with prompt and completion, messages, or text. A data set on the Hub is named by dataset"
        )
    return path


def pairs_of(rows: list[Placed], columns: Pair, tokenizer: Any) -> list[Pair]:
    """Prompts and completions of rows that are all in the form of the first.

    Raises:
        ValueError: A row lacks a column, holds no text or an empty one, or a conversation that can't be rendered.
    """
    first = rows[0][1]
    read: Callable[[Any, str], Pair] = lambda row, where: _pair(row, columns, where)  # noqa: E731
    # Named columns are what is meant, also where others are there.
    if columns == ("prompt", "completion") and not {"prompt", "completion"} & set(first):
        if "messages" in first:
            read = lambda row, where: _conversation(row, tokenizer, where)  # noqa: E731
        elif "text" in first:
            read = lambda row, where: ("", _pair({"prompt": "", **row}, ("prompt", "text"), where)[1])  # noqa: E731
    return [read(row, where) for where, row in rows]


def _pair(row: dict[str, Any], columns: Pair, where: str) -> Pair:
    """The prompt and the completion of a row, checked; `where` begins the message if one is wrong."""
    for argument, column in zip(("prompt_column", "completion_column"), columns, strict=True):
        if column not in row:
            raise ValueError(
                f"{where}: {argument} {column!r} is missing, the columns are {', '.join(map(str, row)) or 'none'}. "
                f"Pass {argument}, or name the columns prompt and completion, messages, or text"
            )
        if not isinstance(row[column], str):
            raise ValueError(
                f"{where}: {column!r} must be a string, got {row[column]!r} ({type(row[column]).__name__}). "
                "Write it as text"
            )
    prompt, completion = (row[column] for column in columns)
    if not completion.strip():
        raise ValueError(f"{where}: {columns[1]!r} must not be empty, got {completion!r}. Fill it in or drop the row")
    return prompt, completion


def _conversation(row: dict[str, Any], tokenizer: Any, where: str) -> Pair:
    """A conversation's last message as the completion of those before it, in the tokenizer's chat template."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
        for message in messages
    ):
        raise ValueError(f"{where}: 'messages' must be a list of objects with role and content, got {messages!r}")
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        roles = [message["role"] for message in messages]
        raise ValueError(f"{where}: the last of 'messages' must be what the assistant answers, got roles {roles}")
    if getattr(tokenizer, "chat_template", None) is None:
        got = "no tokenizer" if tokenizer is None else f"{type(tokenizer).__name__} without one"
        raise ValueError(
            f"{where}: 'messages' need a tokenizer with a chat template, got {got}. Pass the tokenizer of an instruct "
            "model, or rows with prompt and completion"
        )
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError(
            f"{where}: the chat template must render a conversation as its beginning and the answer, got {whole!r}, "
            f"which does not begin with {prompt!r}. Pass rows with prompt and completion"
        )
    # Templates write the token that starts a text; a tokenizer that adds it itself would double it.
    start = tokenizer.bos_token
    if start and prompt.startswith(start) and tokenizer(start)["input_ids"][:2] == [tokenizer.bos_token_id] * 2:
        prompt, whole = prompt[len(start) :], whole[len(start) :]
    # What a template writes after the end token is never generated.
    return prompt, whole[len(prompt) :].rstrip()
