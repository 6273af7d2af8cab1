"""Models by id: from the caches of the hubs as they lie there; without a network an error at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from onward.errors import PlanError
from onward.plan.load import load_plan
from onward.runs.hub import hub_directory, is_hub_id
from onward.runs.resolve import model_directory

PLAN = """
model: {model}
stages:
  - {{name: sft, train: {{language_model: {{mode: lora}}}}, data: text.jsonl, steps: 1}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.text_model(tmp_path_factory.mktemp("hub") / "model", "qwen2")


def resolved(folder: Path, name: str) -> Path:
    (folder / "plan.yaml").write_text(PLAN.format(model=name))
    return model_directory(load_plan(folder / "plan.yaml"))


def test_what_is_an_id() -> None:
    assert is_hub_id("Qwen/Qwen2.5-0.5B") and is_hub_id("modelscope:Qwen/Qwen2.5-0.5B")
    for name in ("model", "./a/b", "../a/b", "/a/b", "a/b/c", "modelscope:a", "~/a/b"):
        assert not is_hub_id(name)


@pytest.mark.parametrize(
    "place",
    [
        "models/Qwen/Qwen2___5-0___5B", "hub/Qwen/Qwen2.5-0.5B", "hub/models/Qwen/Qwen2___5-0___5B",
        "models/Qwen--Qwen2.5-0.5B/snapshots/master", "Qwen/Qwen2.5-0.5B",
    ],
)  # fmt: skip
def test_modelscope_s_cache_is_read_without_its_package(model: Path, tmp_path: Path, monkeypatch, place: str) -> None:
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(model, tmp_path / "cache" / place)
    assert resolved(tmp_path, "modelscope:Qwen/Qwen2.5-0.5B") == tmp_path / "cache" / place


def test_what_modelscope_fetched_in_part_is_not_taken(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(model, tmp_path / "cache/models/a/b")
    (tmp_path / "cache/models/a/b/model.safetensors").unlink()
    with pytest.raises(PlanError) as caught:
        resolved(tmp_path, "modelscope:a/b")
    assert "a/b" in caught.value.message and "plan.yaml:2: model" in str(caught.value)
    assert "modelscope download --model a/b" in str(caught.value)


def test_a_slip_in_a_path_that_looks_like_an_id(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "models" / "Qwen2.5-0.5B").mkdir(parents=True)
    with pytest.raises(PlanError, match=r"did you mean models/Qwen2.5-0.5B\?"):
        resolved(tmp_path, "models/Qwen2.5-0.5")


def cached_for_hf(model: Path, cache: Path) -> Path:
    """As huggingface_hub lays a repository out."""
    repository = cache / "models--a--b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("c0ffee")
    return shutil.copytree(model, repository / "snapshots/c0ffee")


OFFLINE = {"HF_HUB_OFFLINE": "1"}
NO_NETWORK = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens there


@pytest.mark.parametrize("how", [OFFLINE, NO_NETWORK])
def test_the_cache_is_enough(model: Path, tmp_path: Path, how: dict[str, str]) -> None:
    snapshot = cached_for_hf(model, tmp_path / "cache")
    assert found(tmp_path, how) == f"found {snapshot}\n"


@pytest.mark.parametrize(
    ("how", "said"), [(OFFLINE, "HF_HUB_OFFLINE is set"), (NO_NETWORK, "127.0.0.1 cannot be reached")]
)
def test_without_a_network_the_error_comes_at_once(tmp_path: Path, how: dict[str, str], said: str) -> None:
    told = found(tmp_path, how)
    assert said in told and "a/b is no directory here" in told and "hf download a/b --local-dir DIR" in told
    assert float(told.split()[-1]) < 3  # on a busy machine; the probe itself waits 0.8 s at most


def found(tmp_path: Path, how: dict[str, str]) -> str:
    """In a process of its own: the hub's library reads the environment once."""
    script = (
        "import sys, time\nfrom huggingface_hub import snapshot_download\nfrom onward.errors import PlanError\n"
        "from onward.runs.hub import hub_directory\nbegan = time.monotonic()\n"
        "try:\n    print('found', hub_directory('a/b', 'plan.yaml:2: model'))\n"
        "except PlanError as error:\n    print(error, time.monotonic() - began)\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "TRANSFORMERS_OFFLINE": "0", **how}
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_a_modelscope_package_that_fails_is_told(tmp_path: Path, monkeypatch) -> None:
    """Its download, stood in for: what it raises becomes one line."""
    package = tmp_path / "site/modelscope"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def snapshot_download(name, **_):\n    raise OSError('404: ' + name)\n")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(PlanError, match=r"does not give it \(OSError: 404: a/b\)"):
            hub_directory("modelscope:a/b", "plan.yaml:2: model")
    assert time.monotonic() - began < 3
    sys.modules.pop("modelscope", None)
