"""The preloaded process of shim.py: reads requests, forks a child for each run, answers with how it ended."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import peft  # noqa: F401
import transformers.models.qwen2.modeling_qwen2  # noqa: F401
from harness import in_child, reopen_here

import onward.runs.handon
import onward.runs.walk
import onward.train.loop  # noqa: F401
from onward.cli.main import main
from onward.runs.environment import _sources

LONGEST = 120  # seconds for one run: what hangs is killed, and the test fails


def run(request: dict) -> int:
    said = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    signal.alarm(LONGEST)
    reopen_here()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    arm = ctypes.CDLL(None).shim_arm
    arm(request["directory"].encode(), request["only"].encode(), request["mode"], ctypes.c_long(request["at"]), log)
    return main(request["words"])


_sources()  # remembered: all children are the same code, whatever happens to its files
for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps(in_child(lambda asked=asked: run(asked))), flush=True)
