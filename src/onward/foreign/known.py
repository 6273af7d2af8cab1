"""Every kind of foreign checkpoint or model that onward knows, in one place, the most particular first."""

from __future__ import annotations

from pathlib import Path

from onward.errors import DamageError, InputError
from onward.files import read_json
from onward.foreign import (
    dcp,
    deepspeed,
    huggingface,
    mmengine,
    parts,
    peft,
    single_file,
    trainer,
    trainer_training,
)
from onward.foreign.description import Description
from onward.foreign.layouts import describe as layouts
from onward.foreign.stored import open_file, stored_in
from onward.foreign.trainer_files import STEMS
from onward.foreign.training import ForeignTraining

KINDS = (
    trainer.recognise,  # a checkpoint holds a model or an adapter, and may hold a ZeRO directory
    deepspeed.recognise,
    dcp.recognise,
    parts.recognise,
    peft.recognise,  # before models: an adapter may lie beside a config.json
    layouts.recognise,  # their config.json is transformers' too
    huggingface.recognise,
    single_file.recognise,
)


def describe(path: Path) -> Description | None:
    """What another tool has written at `path`, by headers alone; None where none of these is it."""
    return next((found for recognise in KINDS if (found := recognise(path))), None)


TRAININGS = (trainer_training.open_training, deepspeed.open_training, mmengine.open_training)


def open_training(path: Path) -> ForeignTraining:
    """What a foreign checkpoint holds of a training; of an adapter, a model or a file of tensors the weights alone.

    InputError where nothing is known at `path`; DamageError or InputError where a part of it cannot be used.
    """
    for opened in TRAININGS:
        if found := opened(path):
            return found
    stored = open_file(path) if path.is_file() else stored_in(path, STEMS)
    tensors = stored if isinstance(stored, dict) else stored.tensors
    if not isinstance(stored, dict) and stored.problems:
        raise DamageError(stored.problems[0], where=str(path))
    if not tensors:
        raise InputError("holds no training and no weights", where=str(path), hint=f"onward inspect {path}")
    config = path / "adapter_config.json"
    adapter = read_json(config) if config.is_file() else {}
    return ForeignTraining("PEFT" if adapter else "weights", 0, tensors, adapter=adapter)
