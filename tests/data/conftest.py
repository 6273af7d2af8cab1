from pathlib import Path

import data_templates
import pytest
from data_helpers import build_tokenizer

from onward.data.samples import Origin


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ONWARD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def origin(tmp_path):
    return Origin("train.jsonl:1", str(tmp_path / "train.jsonl:1"), tmp_path)


@pytest.fixture(scope="session")
def tokenizers():
    """Tokenizers by template name and kind, each built once."""
    built = {}

    def get(name: str | None, kind: str = "bytes", **options):
        key = (name, kind, *options.items())
        if key not in built:
            built[key] = build_tokenizer(name and getattr(data_templates, name), kind, **options)
        return built[key]

    return get


@pytest.fixture(scope="session")
def text_model(tmp_path_factory, tokenizers) -> Path:
    """A directory with a ChatML tokenizer, and no more of a model than that takes."""
    directory = tmp_path_factory.mktemp("text-model")
    tokenizers("QWEN2").save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def llava_processor():
    """A LLaVA processor that sees 28x28 pixels as 2x2 patches, class token dropped: 4 tokens an image."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=build_tokenizer(data_templates.LLAVA_CHATML),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=data_templates.LLAVA_CHATML,
    )


@pytest.fixture(scope="session")
def llava_model(tmp_path_factory, llava_processor) -> Path:
    directory = tmp_path_factory.mktemp("llava-model")
    llava_processor.save_pretrained(directory)
    return directory
