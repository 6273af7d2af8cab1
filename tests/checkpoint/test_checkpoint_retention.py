import os
import shutil
from pathlib import Path

import checkpoint_snapshots as snaps
import pytest

from onward.checkpoint.read import list_checkpoints, newest_verified
from onward.checkpoint.removal import OWNER
from onward.checkpoint.retention import retire

RUN = snaps.RUN


def steps(checkpoints):
    return [manifest.step for _, manifest in list_checkpoints(checkpoints)]


def damage(directory):
    (directory / "weights-00000.safetensors").write_bytes(b"")


@pytest.fixture
def six(tmp_path):
    for step in range(100, 700, 100):
        snaps.save(tmp_path, step)
    return tmp_path


def test_the_last_the_best_the_pinned_and_every_nth_stay(six):
    removed = retire(six, RUN, keep_last=2, keep_every=300, best_steps=[100], pinned={400})
    assert steps(six) == [100, 300, 400, 500, 600]
    assert removed == [snaps.place(six, 200)]
    assert not [path for path in six.iterdir() if path.name.startswith(".")]


def test_only_the_last_stay_without_more(six):
    retire(six, RUN, keep_last=1, keep_every=None)
    assert steps(six) == [600]


def test_nothing_goes_that_no_verified_newer_one_supersedes(six):
    for step in (500, 600):
        damage(snaps.place(six, step))
    retire(six, RUN, keep_last=2, keep_every=None)
    assert steps(six) == [300, 400, 500, 600]  # the last two that can be used, and the evidence
    for step in (300, 400):
        damage(snaps.place(six, step))
    assert retire(six, RUN, keep_last=1, keep_every=None) == []


def test_what_the_run_did_not_write_stays(six):
    snaps.save(six, 50, run_id="run-two")
    snaps.save(six, 9000, run_id="run-two")
    snaps.save(six, 9100, stage="sft")
    (six / "junk").mkdir()
    (six / "step-000010").mkdir()
    (six / "step-000020").write_text("file")
    elsewhere = six.with_name(six.name + "-elsewhere")
    snaps.save(elsewhere, 30)
    (six / "step-000030").symlink_to(snaps.place(elsewhere, 30))
    retire(six, RUN, keep_last=1, keep_every=None, stage="align")
    assert steps(six) == [30, 50, 600, 9000, 9100]
    assert {"junk", "step-000010", "step-000020"} <= {path.name for path in six.iterdir()}
    assert steps(elsewhere) == [30]


def test_unfinished_saves_go_only_where_they_are_provably_the_runs(six):
    names = {"ours": RUN, "theirs": "run-two", "nameless": None}
    for name, owner in names.items():
        partial = six / f".partial-step-000700-{name}"
        partial.mkdir()
        (partial / "weights-00000.safetensors").write_bytes(b"half")
        if owner:
            (partial / OWNER).write_text(owner)
    complete = six / ".partial-step-000100-complete"
    shutil.copytree(snaps.place(six, 100), complete)
    removed = retire(six, RUN, keep_last=6, keep_every=None)
    assert {path.name for path in removed} == {complete.name, ".partial-step-000700-ours"}
    assert {path.name for path in six.iterdir() if path.name.startswith(".")} == {
        ".partial-step-000700-theirs",
        ".partial-step-000700-nameless",
    }


def test_a_save_that_is_killed_leaves_a_partial_that_retire_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **options: None)  # a kill cleans nothing up
    monkeypatch.setattr(os, "rename", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        snaps.save(tmp_path, 100)
    monkeypatch.undo()
    assert [path.name.startswith(".partial-step-000100-") for path in tmp_path.iterdir()] == [True]
    retire(tmp_path, RUN, keep_last=1, keep_every=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("deleted", range(6))
def test_a_crash_while_deleting_leaves_no_half_checkpoint_and_is_made_good(six, monkeypatch, deleted):
    """After so many files of the first checkpoint that goes; what is left is still known as the run's."""
    unlink, listed = os.unlink, Path.iterdir
    left = deleted
    # the manifest first, where the order of the directory alone decides
    monkeypatch.setattr(
        Path, "iterdir", lambda path: iter(sorted(listed(path), key=lambda p: p.name != "manifest.json"))
    )

    def crash(*arguments, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        unlink(*arguments, **options)

    monkeypatch.setattr(os, "unlink", crash)
    with pytest.raises(KeyboardInterrupt):
        retire(six, RUN, keep_last=1, keep_every=None)
    monkeypatch.undo()
    found, passed = newest_verified(six, RUN)
    assert found.manifest.step == 600 and passed == []
    assert len([path for path in six.iterdir() if path.name.startswith(".partial-")]) == 1
    retire(six, RUN, keep_last=1, keep_every=None)
    assert [path.name for path in six.iterdir()] == ["step-000600"]


def test_of_two_for_one_step_the_replacement_stays(six):
    replacement = six / "step-000600-0123abcd"
    snaps.save(six / "new", 600, seed=1).rename(replacement)
    (six / "new").rmdir()
    assert newest_verified(six, RUN)[0].directory == replacement
    retire(six, RUN, keep_last=2, keep_every=None)
    assert sorted(path.name for path in six.iterdir()) == ["step-000500", "step-000600-0123abcd"]
