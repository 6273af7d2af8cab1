"""docs/plan.md says what the schema says."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_in_step_with_the_schema():
    spec = importlib.util.spec_from_file_location("make_plan_md", DOCS / "make_plan_md.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "plan.md").read_text(encoding="utf-8") == module.page(), "run: python docs/make_plan_md.py"
