"""Functions of the user's that a plan names: what is said of one that cannot be had."""

from pathlib import Path

import pytest

from onward.errors import PlanError
from onward.plan.functions import find_function


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("nowhere:f", "", "is not found (No module named 'nowhere')\n  modules are looked for in"),
        ("broken_in_syntax:f", "def f(:\n", "cannot be imported (SyntaxError: invalid syntax (broken_in_syntax"),
        ("broken_in_use:f", "1 / 0\n", "cannot be imported (ZeroDivisionError: division by zero)"),
        ("without_it:f", "", "has no attribute 'f'"),
    ],
)  # fmt: skip
def test_what_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    if not name.startswith("nowhere"):
        (tmp_path / f"{name.partition(':')[0]}.py").write_text(text)
    with pytest.raises(PlanError) as caught:
        find_function(name)
    assert said in str(caught.value)
