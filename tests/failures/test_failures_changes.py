"""Rows about what somebody changed: refused by name, and not a byte of the run is another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness import in_child, start


def content(directory: Path) -> dict[str, bytes]:
    """Every file's bytes, but for the mark of who works on the run."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "run.hold")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def refused(there: Path, capfd) -> Callable[..., str]:
    """Continue the run, which must be refused and left as it is; what was said."""

    def start_again(*overrides: str, patch: Callable[[], None] | None = None) -> str:
        before = content(there / "run")
        assert start(there / "plan.yaml", there / "run", *overrides, patch=patch) == 3
        assert content(there / "run") == before
        return capfd.readouterr().err

    return start_again


@pytest.mark.parametrize("key", ["learning_rate", "optimizer.weight_decay"])
def test_row_04_a_new_learning_rate_is_refused_by_name(refused, key: str) -> None:
    said = refused(f"stages.learn.{key}=0.001")
    assert f"stages.learn.{key}: 0.01 → 0.001" in said
    assert f"--accept {key.rpartition('.')[2]}" in said


def test_row_05_another_batch_size_is_refused(refused) -> None:
    assert "stages.learn.batch_size: 6 → 12" in refused("stages.learn.batch_size=12")


def test_row_25_another_alpha_is_refused(place: Path, late: Path, capfd) -> None:
    before = content(late)
    assert start(place / "plan.yaml", late, "stages.adapt.train.language_model.alpha=64") == 3
    assert "stages.adapt.train.language_model.alpha: 8.0 → 64" in capfd.readouterr().err
    assert content(late) == before


def test_row_42_another_set_of_trained_modules_is_refused(refused) -> None:
    said = refused("stages.learn.train.embed_tokens={mode: frozen}")
    assert "stages.learn.train.embed_tokens" in said


def test_row_54_another_seed_is_refused(refused) -> None:
    assert "seed: 1 → 2" in refused("seed=2")


def test_row_24_another_base_is_refused(there: Path, refused) -> None:
    def build() -> None:
        import tiny

        tiny.text_model(there / "model", "qwen2", tied=True, seed=1)

    assert in_child(build) == 0
    assert "content.weights" in refused()


def test_row_53_other_data_is_refused(there: Path, refused) -> None:
    data = there / "text.jsonl"
    data.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))
    assert "content.data.learn" in refused()


def test_row_85_another_chat_template_is_refused(there: Path, refused) -> None:
    template = there / "model/chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>\n", "<|im_end|> \n"))
    assert "content.encoding.learn" in refused()


def test_row_84_another_library_version_is_refused(refused) -> None:
    def patch() -> None:
        import onward.runs.environment as environment

        original = environment._version
        environment._version = lambda package: "9.9" if package == "transformers" else original(package)

    said = refused(patch=patch)
    assert "environment.transformers" in said and "9.9" in said
    assert "--accept environment" in said


def test_row_71_somebody_elses_directory_is_left_alone(there: Path, tmp_path: Path, capfd) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter-1.tex").write_text("words")
    assert start(there / "plan.yaml", tmp_path / "thesis") == 3
    assert "chapter-1.tex" in capfd.readouterr().err
    assert content(tmp_path / "thesis") == {"chapter-1.tex": b"words"}
