"""docs/checkpoints.md says what `inspect` says of the samples."""

import importlib.util
from pathlib import Path

from samples import needs_samples

DOCS = Path(__file__).parents[2] / "docs"


@needs_samples
def test_the_page_is_in_step_with_inspect():
    spec = importlib.util.spec_from_file_location("make_checkpoints_md", DOCS / "make_checkpoints_md.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (DOCS / "checkpoints.md").read_text(encoding="utf-8")
    assert page == module.page(), "run: python docs/make_checkpoints_md.py"
