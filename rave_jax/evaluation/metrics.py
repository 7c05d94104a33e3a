"""How an answer is scored, 0 to 1, the best over the accepted answers: exact match, relaxed accuracy, ANLS."""

from __future__ import annotations

import difflib
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from rave_jax.config import ConfigError

RELAXED_TOLERANCE = 0.05
ANLS_THRESHOLD = 0.5


def normalise(text: str) -> str:
    """Text as it is compared: Unicode NFKC, case folded, white space collapsed, one closing full stop dropped."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text[:-1].rstrip() if len(text) > 1 and text.endswith(".") else text


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction equals an accepted answer after `normalise`."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 where a number is within 5 % of an accepted number, or where a text matches exactly.

    The rule of ChartQA (Masry et al. 2022, arXiv 2203.10244, section 5.1, after Methani et al. 2020). As in
    the scorers in common use, "12%" is read as 0.12, and an answer of 0 has no 5 % and must match as text.
    """
    return max((_relaxed(prediction, answer) for answer in answers), default=0.0)


def _relaxed(prediction: str, answer: str) -> float:
    given, wanted = _number(prediction), _number(answer)
    if given is not None and wanted:
        return float(abs(given - wanted) <= RELAXED_TOLERANCE * abs(wanted))
    return exact_match(prediction, (answer,))


def _number(text: str) -> float | None:
    text = normalise(text)
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def anls(prediction: str, answers: Sequence[str]) -> float:
    """1 - normalised edit distance, 0 where that distance is 0.5 or more.

    Average normalised Levenshtein similarity (Biten et al. 2019, arXiv 1905.13648, equation 1, with its
    threshold 0.5): case and white space do not count, the distance is divided by the longer length.
    """
    return max((_similarity(prediction, answer) for answer in answers), default=0.0)


def _similarity(prediction: str, answer: str) -> float:
    given, wanted = (" ".join(text.lower().split()) for text in (prediction, answer))
    distance = edit_distance(given, wanted) / max(len(given), len(wanted), 1)
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of characters that turn `a` into `b`."""
    above = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        row = [i]
        for j, right in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
        above = row
    return above[-1]


METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "relaxed_accuracy": relaxed_accuracy,
    "anls": anls,
}


def score(metric: str, prediction: str, answers: Sequence[str]) -> float:
    """Score of a prediction by the metric that its source names.

    Raises:
        ConfigError: no such metric.
    """
    check_metric(metric)
    return METRICS[metric](prediction, answers)


def check_metric(metric: str, where: str = "") -> None:
    """Raise ConfigError, naming where it stands, unless there is such a metric."""
    if metric not in METRICS:
        close = difflib.get_close_matches(str(metric), METRICS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{where}metric is {metric!r}, expected one of {', '.join(map(repr, METRICS))}{hint}")
