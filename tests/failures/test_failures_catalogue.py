"""The catalogue is whole, each test in it exists, and the page shows what stands in it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from catalogue import catalogue_lines, rows

ROOT = Path(__file__).parents[2]


def test_every_row_stands_once_in_order():
    assert [row.number for row in rows()] == list(range(1, 86))


@pytest.mark.parametrize("row", rows(), ids=lambda row: str(row.number))
def test_a_row_has_a_test_that_exists_or_waits(row):
    assert bool(row.waits) != bool(row.test and row.wins)
    if row.test:
        file, _, name = row.test.partition("::")
        functions = {
            node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert name in functions


def test_a_test_that_carries_a_row_s_number_stands_in_the_catalogue():
    named = {row.test.partition("::")[2] for row in rows()}
    for file in Path(__file__).parent.glob("test_failures_*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_row_"):
                assert node.name in named


def test_the_page_shows_the_catalogue():
    page = (ROOT / "docs/failures.md").read_text()
    assert "\n".join(catalogue_lines()) in page
