"""docs/models.md says what the families say, and what the record of the test run holds."""

import importlib.util
import re
from pathlib import Path

from onward.plan.load import load_plan

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_in_step_with_the_families():
    spec = importlib.util.spec_from_file_location("make_models_md", DOCS / "make_models_md.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "models.md").read_text(encoding="utf-8") == module.page(), "run: python docs/make_models_md.py"


def test_its_plan_from_parts_is_a_plan(tmp_path):
    blocks = re.findall(r"^```yaml\n(.*?)^```", (DOCS / "models.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "plan.yaml").write_text(blocks[1], encoding="utf-8")
    assert load_plan(tmp_path / "plan.yaml").plan.model.projector == "new"
