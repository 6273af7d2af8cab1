"""Metrics of texts, against their papers' own scripts written down once more."""

import collections
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onward.evaluate.metrics import anls, contains, exact_match, f1, is_of_answers, worth

WORDS = st.lists(st.sampled_from(["the", "a", "An", "red", "fox,", "Fox", "1,000", "--", "isn't", ""])).map(" ".join)


def squad_f1(prediction, truth):
    """compute_f1 of SQuAD's evaluation script, version 2.0."""

    def normalise(text):
        text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    gold, said = normalise(truth).split(), normalise(prediction).split()
    if not gold or not said:
        return float(gold == said)
    same = sum((collections.Counter(gold) & collections.Counter(said)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(said), same / len(gold)
    return 2 * precision * recall / (precision + recall)


@given(WORDS, WORDS)
def test_f1_is_squads(said, answer):
    assert f1(said, answer) == pytest.approx(squad_f1(said, answer))


def test_f1_counts_chinese_characters_as_tokens():
    assert f1("红色的狐狸。", "红狐狸") == pytest.approx(2 * 3 / (5 + 3))
    assert f1("狐狸", "红") == 0.0


def distance(a, b):
    """Levenshtein's distance, by its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_anls_is_the_papers(said, answer):
    longest = max(len(said), len(answer))
    apart = distance(said, answer) / longest if longest else 0.0
    assert anls(said, answer) == pytest.approx(1 - apart if apart < 0.5 else 0.0)


def test_anls_does_not_mind_case_and_space():
    assert anls(" The  Hague", "the hague") == 1.0
    assert anls("The Haag", "the hague") == pytest.approx(1 - 3 / 9)
    assert anls("Delft", "The Hague") == 0.0


def test_exact_match_and_contains():
    assert exact_match(" red\n", "red") == 1.0 and exact_match("Red", "red") == 0.0
    assert contains("It is RED, I think", "red") == 1.0 and contains("re d", "red") == 0.0
    assert contains("one\n two", "one two") == 1.0
    assert contains("something", "") == 0.0 and contains(" ", "") == 1.0


def test_the_best_of_the_accepted_answers_counts():
    assert worth("f1", "red fox", ["blue", "red", "red fox jumps"], {}, "rows:1") == pytest.approx(0.8)
    assert worth("exact_match", "red", ["blue", "red"], {}, "rows:1") == 1.0


def test_which_need_answers():
    assert all(map(is_of_answers, ("exact_match", "contains", "f1", "anls", "mine:f")))
    assert not any(map(is_of_answers, ("loss", "perplexity", "token_accuracy")))
