"""Twenty kills at random places of one run: every step stands once, and what was written can be read."""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path

from after_a_crash import assert_continues, assert_nothing_lost, committed
from harness import KILLED
from shim import Mode, Recorded, Zygote

from onward.files import read_jsonl
from onward.runs.journal import attempts, canonical_metrics

SEED, KILLS = 1, 20


def test_twenty_kills(zygote: Zygote, small: Path, recorded: Recorded, tmp_path: Path) -> None:
    """Each start gets a little further: some dozen changes of the disk, before its next save or after it."""
    chance, run = random.Random(SEED), tmp_path / "runs" / "run"
    run.parent.mkdir()
    kills = 0
    while kills < KILLS:
        ended = zygote.run(small, run, mode=Mode.BEFORE, at=chance.randint(1, 70))
        if ended.status == 0:
            break
        assert ended.status == KILLED, ended.said
        assert_nothing_lost(run, committed(run))
        kills += 1
    assert kills == KILLS
    assert_continues(zygote, small, run, recorded.run)

    rows = read_jsonl(run / "metrics.jsonl")
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()] == [row["step"] for row in rows]
    wanted = canonical_metrics(read_jsonl(recorded.run / "metrics.jsonl"))
    assert canonical_metrics(rows) == wanted
    assert {(stage, step) for stage, step in wanted if step} == set(product(("learn", "adapt"), (1, 2, 3)))
    assert len(rows) > len(wanted)
    assert attempts(read_jsonl(run / "journal.jsonl")) > KILLS / 2
