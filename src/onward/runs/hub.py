"""A model that is named by an id: found in the hub's own cache, or downloaded into it; and one that is uploaded.

Without a network: an error at once, not after some minutes of attempts.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from onward.errors import InputError, OnwardError, PlanError
from onward.weights.shards import model_shards

MODELSCOPE = "modelscope:"
ID = r"[\w.-]+/[\w.-]+"
PATIENCE = 0.8
"""Seconds for a first connection, before the network counts as not there."""
UNUSED = ["*.bin", "*.pth", "*.pt", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.ot", "original/*"]
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def is_hub_id(name: str) -> bool:
    """Does a plan's model look like `owner/name` or `modelscope:owner/name`?"""
    return re.fullmatch(f"({MODELSCOPE})?{ID}", name) is not None and not name.startswith(".")


def hub_directory(name: str, where: str) -> Path:
    """The directory of a hub id, whole: from the cache as it lies there, or downloaded.

    PlanError, within a second, where it is not in the cache and there is no network; and where the hub has no such
    model or does not give it.
    """
    if name.startswith(MODELSCOPE):
        return _from_modelscope(name.removeprefix(MODELSCOPE), where)
    from huggingface_hub import constants, snapshot_download

    by_hand = f"where there is a network: hf download {name} --local-dir DIR; then give DIR as the model"
    try:  # as it lies there: a model that moved on at the hub is not the one that a run began with
        cached = Path(snapshot_download(name, local_files_only=True))
    except Exception:  # the hub's library raises a dozen kinds, and its network library's own
        cached = None
    if cached and _is_whole(cached):
        return cached
    if any(os.environ.get(key, "").upper() in ("1", "ON", "YES", "TRUE") for key in OFFLINE):
        raise PlanError(
            f"{name} is no directory here and not in the hub's cache, and HF_HUB_OFFLINE is set", where=where,
            hint=by_hand,
        )  # fmt: skip
    _must_be_reached(constants.ENDPOINT, name, where, by_hand)
    try:
        return Path(snapshot_download(name, ignore_patterns=UNUSED))
    except Exception as error:
        raise _not_given(name, error, where) from None


def _from_modelscope(name: str, where: str) -> Path:
    by_hand = f"where there is a network: modelscope download --model {name} --local_dir DIR; then give DIR"
    for place in _modelscope_places(name):
        if _is_whole(place):
            return place
    if find_spec("modelscope") is None:
        raise PlanError(
            f"{name} is not in ModelScope's cache, and the package that downloads it is not installed", where=where,
            hint=f"pip install 'onward[modelscope]'; or {by_hand}",
        )  # fmt: skip
    _must_be_reached(os.environ.get("MODELSCOPE_ENDPOINT", "https://www.modelscope.cn"), name, where, by_hand)
    try:
        from modelscope import snapshot_download

        return Path(snapshot_download(name, ignore_file_pattern=UNUSED))
    except Exception as error:
        raise _not_given(name, error, where) from None


def _modelscope_places(name: str) -> Iterable[Path]:
    """Where ModelScope's versions have put a model; in names of directories it writes a dot as three underlines."""
    root = Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache/modelscope").expanduser()
    owner, model = name.split("/")
    snapshots = root / "models" / f"{owner}--{model}" / "snapshots"
    yield snapshots / "master"
    yield from sorted(snapshots.glob("*"))
    for folder in ("models", "hub/models", "hub", "."):
        for spelt in (model, model.replace(".", "___")):
            yield root / folder / owner / spelt


def _is_whole(directory: Path) -> bool:
    """Are the configuration and every shard there? Another tool may have fetched a file or two of it."""
    try:
        return (directory / "config.json").is_file() and bool(model_shards(directory))
    except OnwardError:
        return False


def _must_be_reached(endpoint: str, name: str, where: str, hint: str) -> None:
    """PlanError unless the hub, or the proxy before it, accepts a connection at once."""
    url = urlsplit(getproxies().get("https") or endpoint)
    address = (url.hostname or "", url.port or (80 if url.scheme == "http" else 443))
    outcome: list[str] = []

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=PATIENCE).close()
            outcome.append("")
        except OSError as error:
            outcome.append(str(error))

    # in a thread: the search for the address has no time limit of its own
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(PATIENCE)
    if failure := (outcome or [f"no answer in {PATIENCE} s"])[0]:
        raise PlanError(
            f"{name} is no directory here and not in the cache, and {address[0]} cannot be reached ({failure})",
            where=where,
            hint=hint,
        )


def _not_given(name: str, error: Exception, where: str) -> PlanError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return PlanError(
        f"{name} is no directory here, and the hub does not give it ({type(error).__name__}: {reason})",
        where=where,
        hint="is the name right? A model that needs an agreement needs a login: hf auth login. "
        "Or give the path of a local copy",
    )


def push(directory: Path, hub_id: str) -> str:
    """Upload a directory to the Hugging Face hub; its address. InputError where there is no network, or no right to."""
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        api.create_repo(hub_id, exist_ok=True)
        api.upload_folder(repo_id=hub_id, folder_path=directory)
    except Exception as error:  # the hub's client raises its own, its transport's and the system's kinds
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"could not be uploaded to {hub_id} ({first})",
            where=str(directory),
            hint="the export itself is whole. With a network and a token (hf auth login): "
            f"hf upload {hub_id} {directory}",
        ) from None
    return f"{api.endpoint}/{hub_id}"
