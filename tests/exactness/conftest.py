from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import in_child, start
from shim import Recorded, Zygote, build, record

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

SMALL = """
model: qwen2
seed: 1
engine: {threads: 1}
defaults: {batch_size: 4, micro_batch_size: 2, learning_rate: 1e-2, max_length: 256}
stages:
  - name: learn
    train: {language_model: {mode: full}}
    data: few.jsonl
    epochs: 1
    evaluate: {every: 2, data: {path: few.jsonl}, limit: 4}
  - name: adapt
    train: {language_model: {mode: lora, rank: 4, dropout: 0.1}}
    data: few.jsonl
    epochs: 1
checkpoint: {every: 1, keep: {last: 2}}
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


@pytest.fixture(scope="session")
def small(place: Path) -> Path:
    """A plan of two stages of three steps: retention, an evaluation, a merge of everything, a merge of LoRA."""
    import tiny

    tiny.text_data(place / "few.jsonl", rows=10)
    (place / "small.yaml").write_text(SMALL)
    return place / "small.yaml"


@pytest.fixture(scope="session")
def small_reference(place: Path, small: Path) -> Path:
    """The small plan's run that was never interrupted."""
    assert start(small, place / "reference-small") == 0
    return place / "reference-small"


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    scratch = tmp_path_factory.mktemp("zygote")
    zygote = Zygote(build(scratch), scratch)
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def recorded(zygote: Zygote, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """The small plan's run, never interrupted, with all that it did to the disk."""
    return record(zygote, small, tmp_path_factory.mktemp("recorded"))
