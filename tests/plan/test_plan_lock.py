"""The lock: written and read back whole, and no altered byte of it believed."""

import json

import pytest

from onward.errors import DamageError, Refused
from onward.files import canonical_json, digest_bytes
from onward.plan.load import load_plan
from onward.plan.lock import Amendment, Lock, locked_plan, plan_values, read_lock, write_lock

PLAN = """\
model: m
stages:
  - name: a
    train:
      x: {mode: lora, targets: [q_proj], rank_pattern: {q_proj: 3}}
      y: {mode: full}
      z: {mode: frozen}
      v: {mode: frozen, bits: 4, quant_type: fp4}
      w: {mode: qlora, bits: 8}
      u: {mode: qlora, double_quant: false}
    data: a.jsonl
    steps: 3
    output: adapters
"""


@pytest.fixture
def lock(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    loaded = load_plan(tmp_path / "plan.yaml", ["seed=3"])
    return Lock(
        run_id="r1",
        created="2026-01-02T03:04:05+00:00",
        date="2026-01-02",
        written=loaded.written,
        overrides=loaded.overrides,
        plan=plan_values(loaded.plan),
        fingerprints={"model": "sha256:1", "data": {"a": "sha256:2"}},
        environment={"torch": "2.13.0"},
        measured={"a": {"micro_batch_size": 4}},
        amendments=[Amendment(attempt=2, stage="a", step=10, key="k", before=None, after=[1], kind="free")],
    )


def test_a_lock_reads_back_as_it_was(lock, tmp_path):
    path = tmp_path / "plan.lock.json"
    write_lock(path, lock)
    assert read_lock(path) == lock
    assert locked_plan(read_lock(path)) == load_plan(tmp_path / "plan.yaml", ["seed=3"]).plan
    first = path.read_bytes()
    write_lock(path, read_lock(path))
    assert path.read_bytes() == first


def test_every_altered_byte_is_found(lock, tmp_path):
    path = tmp_path / "plan.lock.json"
    write_lock(path, lock)
    data = path.read_bytes()
    for position in range(len(data)):
        if data[position : position + 1].isspace():
            continue  # blanks between values mean nothing
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(DamageError):
            read_lock(path)
    for length in (0, 1, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:length])
        with pytest.raises(DamageError):
            read_lock(path)


def _sealed(values: dict) -> str:
    return json.dumps({**values, "digest": digest_bytes(canonical_json(values))})


def test_a_missing_a_newer_and_a_foreign_lock(lock, tmp_path):
    path = tmp_path / "plan.lock.json"
    with pytest.raises(DamageError, match="missing"):
        read_lock(path)
    values = lock.model_dump(mode="json")
    path.write_text(_sealed({**values, "schema_version": 2, "more": 1}))
    with pytest.raises(Refused, match="newer onward"):
        read_lock(path)
    path.write_text(_sealed({**values, "run_id": 3}))
    with pytest.raises(DamageError, match="run_id"):
        read_lock(path)
    path.write_text("[]")
    with pytest.raises(DamageError, match="is not a lock"):
        read_lock(path)


def test_a_locked_plan_that_is_none(lock):
    with pytest.raises(DamageError, match="locked plan"):
        locked_plan(lock.model_copy(update={"plan": {**lock.plan, "seed": "x"}}))
