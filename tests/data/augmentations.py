"""Functions that a plan could name under `augment`."""

import os
import random as global_random
import signal

import numpy as np
import torch


def shout(sample, rng):
    """Draws from the generator that it is given."""
    sample["messages"][-1]["content"] = f"{rng.random()} {rng.random()}"
    return sample


def careless(sample, rng):
    """Draws from every global generator."""
    drawn = (global_random.random(), float(np.random.rand()), float(torch.rand(())))
    sample["messages"][-1]["content"] = repr(drawn)
    return sample


def flip(sample, rng):
    """Changes a picture."""
    for part in sample["messages"][0]["content"]:
        if part["type"] == "image" and rng.random() < 0.5:
            part["image"] = part["image"].rotate(180)
    return sample


def lengthen(sample, rng):
    sample["messages"][0]["content"] = "a " * 1000
    return sample


def broken(sample, rng):
    raise KeyError("colour")


def deadly(sample, rng):
    os.kill(os.getpid(), signal.SIGKILL)


def nothing(sample, rng):
    sample["messages"] = []
