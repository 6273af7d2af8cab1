"""Every kind of foreign checkpoint or model that onward knows, in one place, the most particular first."""

from __future__ import annotations

from pathlib import Path

from onward.foreign import dcp, deepspeed, huggingface, peft, single_file, trainer
from onward.foreign.description import Description
from onward.foreign.layouts import describe as layouts

KINDS = (
    trainer.recognise,  # a checkpoint holds a model or an adapter, and may hold a ZeRO directory
    deepspeed.recognise,
    dcp.recognise,
    peft.recognise,  # before models: an adapter may lie beside a config.json
    layouts.recognise,  # their config.json is transformers' too
    huggingface.recognise,
    single_file.recognise,
)


def describe(path: Path) -> Description | None:
    """What another tool has written at `path`, by headers alone; None where none of these is it."""
    return next((found for recognise in KINDS if (found := recognise(path))), None)
