from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import in_child, start

TWO_STAGES = """
model: {model}
seed: 1
engine: {{threads: 1}}
defaults:
  batch_size: 6
  micro_batch_size: 4
  learning_rate: 1e-2
  max_length: 256
  schedule: {{name: cosine, warmup_ratio: 0.2}}
stages:
  - name: learn
    train:
{learn}
    data: {data}
    epochs: 2
  - name: adapt
    train:
      language_model: {{mode: lora, rank: 4, dropout: 0.1}}
{adapt}
    data: {data}
    epochs: 1
checkpoint: {{every: 3}}
"""


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tiny models and data, and two plans over them."""
    place = tmp_path_factory.mktemp("exactness")

    def build() -> None:
        import tiny

        tiny.llava(place / "llava")
        tiny.text_model(place / "qwen2", "qwen2", tied=True)
        tiny.text_data(place / "text.jsonl")
        tiny.colour_data(place / "colours.jsonl")

    assert in_child(build) == 0
    full = (
        "\n".join(f"      {module}: {{{{mode: full}}}}" for module in ("language_model", "projector", "vision_tower"))
        .replace("{{", "{")
        .replace("}}", "}")
    )
    (place / "llava.yaml").write_text(
        TWO_STAGES.format(
            model="llava",
            data="colours.jsonl",
            learn=full,
            adapt="      projector: {mode: full, learning_rate_scale: 0.1}",
        )
    )
    (place / "text.yaml").write_text(
        TWO_STAGES.format(model="qwen2", data="text.jsonl", learn="      language_model: {mode: full}", adapt="")
    )
    return place


@pytest.fixture(scope="session")
def reference(place: Path) -> dict[str, Path]:
    """Each plan's run that was never interrupted."""
    runs = {}
    for name in ("llava", "text"):
        runs[name] = place / f"reference-{name}"
        assert start(place / f"{name}.yaml", runs[name]) == 0
    return runs
