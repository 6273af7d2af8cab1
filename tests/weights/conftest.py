import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Model directories of each kind, made when they are first asked for."""
    import tiny

    made = {}
    makers = {
        "llama": lambda path: tiny.text_model(path, "llama"),
        "qwen2-tied": lambda path: tiny.text_model(path, "qwen2", tied=True),
        "qwen3-bf16": lambda path: tiny.text_model(path, "qwen3", dtype="bfloat16"),
        "llava": lambda path: tiny.llava(path),
    }

    def base(kind: str) -> Path:
        if kind not in made:
            made[kind] = makers[kind](tmp_path_factory.mktemp("base") / kind)
        return made[kind]

    return base
