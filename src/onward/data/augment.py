"""A function of the user's that changes samples at random, made repeatable.

`augment: module:function` is called as `function(sample, rng)` and returns the sample to train on. `sample` is the
row as `{"messages": …}` or `{"text": …}`, whatever its file has, a copy of its own, with every image part as
{"type": "image", "image": PIL.Image in RGB}; `rng` is a random.Random. Its seed is a function of the run's seed, the
stage, the epoch, the row and the repeat, so it is the same wherever and whenever the sample is made. The global
generators of random, numpy and torch are seeded likewise during the call and put back after it: functions of image
libraries that draw from them are repeatable too.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from onward.data.images import load_image
from onward.data.rows import plain_text, read_conversation
from onward.data.samples import Origin
from onward.errors import InputError, PlanError
from onward.plan.functions import find_function

Augment = Callable[[dict[str, Any], random.Random], dict[str, Any]]


def find_augment(name: str) -> Augment:
    """The function that `module:function` names; looked for in the current directory too. Else PlanError."""
    try:
        return find_function(name)
    except PlanError as error:
        raise PlanError(f"augment: {error.message}", hint=error.hint) from None


def augmented(row: dict[str, Any], name: str, draw: int, origin: Origin) -> dict[str, Any]:
    """The row as the function `name` changes it with the random number `draw`. InputError when the function fails."""
    function = find_augment(name)
    sample = _with_images(row, origin)
    with _seeded(draw):
        try:
            changed = function(sample, random.Random(draw))
        except Exception as error:  # the user's code: anything can come
            raise InputError(f"augment {name} failed: {type(error).__name__}: {error}", where=origin.where) from error
    if not isinstance(changed, dict):
        raise InputError(f"augment {name} returned {type(changed).__name__}, not the sample", where=origin.where)
    return changed


def _with_images(row: dict[str, Any], origin: Origin) -> dict[str, Any]:
    sample = copy.deepcopy(row)
    if plain_text(row, origin) is not None:
        return sample
    images = iter(read_conversation(row, origin).images)
    for message in sample["messages"]:
        if isinstance(message.get("content"), list):
            message["content"] = [
                {"type": "image", "image": load_image(next(images), origin)} if part["type"] != "text" else part
                for part in message["content"]
            ]
    return sample


@contextmanager
def _seeded(draw: int) -> Iterator[None]:
    import torch

    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(draw)
            np.random.seed(draw % 2**32)
            torch.default_generator.manual_seed(draw)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
