"""The pages for users of other tools: every old key that a table names is answered with what the table says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from onward.plan import suggest
from onward.plan.learning import Train
from onward.plan.schema import PlanFile, Stage

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("from-xtuner.md", "from-trainer.md")


def rows(page: str) -> Iterator[tuple[list[str], str]]:
    """(the old keys, the rest) of every row of the page's tables."""
    for line in (DOCS / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            yield re.findall(r"`([^`]+)`", cells[0]), " ".join(cells[1:])


KEYS = [(page, key, rest) for page in PAGES for keys, rest in rows(page) for key in keys]


@pytest.mark.parametrize(("page", "key", "rest"), KEYS, ids=[f"{page}-{key}" for page, key, _ in KEYS])
def test_each_old_key_is_answered(page: str, key: str, rest: str) -> None:
    spelt = key.lower()
    ours = {name for _, names in suggest.HOMES for name in names}
    if spelt in ours:  # the same name here: it stands in the table's second column
        assert f"`{spelt}" in rest or f"{spelt}:" in rest or "the same" in rest
        return
    assert spelt in suggest.SPELLINGS or spelt in suggest.EXPLAINED
    said = " ".join(suggest.advice(key, level.model_fields) for level in (PlanFile, Stage, Train))
    assert "the keys here are" not in said
    for name in suggest.SPELLINGS.get(spelt, ()):
        last = name.rsplit(".", 1)[-1]
        assert last in rest, f"the table does not name {name}"
        assert last in said


def test_there_is_much_to_answer() -> None:
    assert len({key for _, key, _ in KEYS}) > 120
