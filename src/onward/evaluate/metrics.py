"""What an answer is worth: metrics over texts. Each gives 0 to 1 for one answer, the best over all accepted ones.

docs/measuring.md defines them for users.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onward.errors import InputError
from onward.plan.functions import find_function
from onward.plan.schema import ANSWER_METRICS

ANLS_THRESHOLD = 0.5


def is_of_answers(metric: str) -> bool:
    """Does the metric need what the model says? The others need what it thinks of the true tokens."""
    return ":" in metric or metric in ANSWER_METRICS


def worth(metric: str, said: str, accepted: Sequence[str], row: Mapping[str, Any], where: str) -> float:
    """The answer's value: the best over the accepted answers.

    A function of the user's is called with (said, accepted answer, row). InputError when it fails, naming `where`.
    """
    if ":" in metric:
        return max(_yours(metric, said, answer, row, where) for answer in accepted)
    return max(_METRICS[metric](said, answer) for answer in accepted)


def _yours(metric: str, said: str, answer: str, row: Mapping[str, Any], where: str) -> float:
    try:
        return float(find_function(metric)(said, answer, row))
    except Exception as error:  # the user's code: anything can come
        raise InputError(f"metric {metric} failed: {type(error).__name__}: {error}", where=where) from error


def exact_match(said: str, answer: str) -> float:
    """The same to the letter, but for space around."""
    return float(said.strip() == answer.strip())


def contains(said: str, answer: str) -> float:
    """The accepted answer stands somewhere in what is said; case and runs of space do not count."""
    whole, part = (" ".join(text.casefold().split()) for text in (said, answer))
    return float(part in whole) if part else float(not whole)


def f1(said: str, answer: str) -> float:
    """Token F1 as SQuAD's script has it (Rajpurkar et al., 2016); a Chinese or Japanese character is a token."""
    ours, theirs = _tokens(said), _tokens(answer)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def anls(said: str, answer: str) -> float:
    """Normalised Levenshtein similarity (Biten et al., 2019), 0 where half the letters or more differ."""
    a, b = (" ".join(text.lower().split()) for text in (said, answer))
    longest = max(len(a), len(b))
    if longest == 0:
        return 1.0
    distance = _levenshtein(a, b) / longest
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


_METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "f1": f1,
    "anls": anls,
}


def _tokens(text: str) -> list[str]:
    """Lower case, without punctuation and English articles, split at space and around each CJK character."""
    text = "".join(
        letter for letter in text.lower() if letter not in string.punctuation and unicodedata.category(letter)[0] != "P"
    )
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return re.sub(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])", r" \1 ", text).split()


def _levenshtein(a: str, b: str) -> int:
    """The fewest insertions, deletions and replacements of letters that make `b` of `a`."""
    before = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (letter != other)))
        before = row
    return before[-1]
