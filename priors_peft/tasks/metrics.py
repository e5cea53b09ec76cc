"""Metrics over lists of predictions and references; each is a mean in [0, 1]."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence


Reference = str | Sequence[str]


def exact_match(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """Share of predictions equal to a reference, white space at the ends aside.

    Args:
        predictions: One text a row.
        references: The gold answer of each row, or a list of answers any of which counts.

    Raises:
        ValueError: If the two lists differ in length or are empty; so do all metrics here.
    """
    return _mean_best(lambda prediction, gold: float(prediction.strip() == gold.strip()), predictions, references)


def token_f1(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """Mean F1 of the bags of words split at white space; nothing is normalized, so `-5` is not `5`."""
    return _mean_best(lambda prediction, gold: _f1(prediction.split(), gold.split()), predictions, references)


def squad_normalize(text: str) -> str:
    """SQuAD's official normalization: lower case, no punctuation, no articles (a, an, the), single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_exact_match(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """Share of predictions equal to a reference after `squad_normalize`."""
    return _mean_best(
        lambda prediction, gold: float(squad_normalize(prediction) == squad_normalize(gold)), predictions, references
    )


def squad_f1(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """Mean F1 of the bags of words after `squad_normalize`, the best over the references of a row."""
    return _mean_best(
        lambda prediction, gold: _f1(squad_normalize(prediction).split(), squad_normalize(gold).split()),
        predictions,
        references,
    )


def first_line(text: str) -> str:
    """The first line with something on it: an answer, without what a model goes on to write after it."""
    return text.strip().split("\n", 1)[0].strip()


def macro_f1(predictions: Sequence[str], references: Sequence[str], classes: Sequence[str]) -> float:
    """Mean of the F1 of each class that occurs among predictions or references; other predictions are wrong."""
    from sklearn.metrics import f1_score

    present = [name for name in classes if name in references or name in predictions]
    return float(f1_score(references, predictions, labels=present, average="macro", zero_division=0.0))


def completion_metrics(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Strict metrics for any completion: `{"exact_match": ..., "f1": ...}` from `exact_match` and `token_f1`."""
    return {"exact_match": exact_match(predictions, references), "f1": token_f1(predictions, references)}


def _f1(prediction: list[str], gold: list[str]) -> float:
    if not prediction or not gold:
        return float(prediction == gold)
    common = sum((Counter(prediction) & Counter(gold)).values())
    return 2 * common / (len(prediction) + len(gold))


def _mean_best(
    score: Callable[[str, str], float], predictions: Sequence[str], references: Sequence[Reference]
) -> float:
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            "predictions and references must have the same length, at least 1, "
            f"got {len(predictions)} and {len(references)}"
        )
    golds = [[reference] if isinstance(reference, str) else reference for reference in references]
    if not all(golds):
        raise ValueError(f"references must name at least one answer a row, got none in row {golds.index([]) + 1}")
    best = [max(score(prediction, gold) for gold in row) for prediction, row in zip(predictions, golds, strict=True)]
    return sum(best) / len(best)
