"""docs/plan.md says what the schema says."""

import importlib.util
import re
from pathlib import Path

import pytest

from onward.plan.load import load_plan

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_in_step_with_the_schema():
    spec = importlib.util.spec_from_file_location("make_plan_md", DOCS / "make_plan_md.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "plan.md").read_text(encoding="utf-8") == module.page(), "run: python docs/make_plan_md.py"


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_readme_s_plans_are_plans(readme, tmp_path):
    blocks = re.findall(
        r"^```yaml\n(.*?)^```", (DOCS.parent / readme).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        assert load_plan(path).plan.stages
