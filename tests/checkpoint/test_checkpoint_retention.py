import os
import shutil
import tempfile
from pathlib import Path

import checkpoint_snapshots as snaps
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onward.checkpoint.read import list_checkpoints, newest_verified
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
    ours = f".partial-step-000700-{RUN}-0123abcd"
    others = {".partial-step-000700-run-two-0123abcd", ".partial-step-000700-0123abcd"}
    for name in (ours, *others):
        (six / name).mkdir()
        (six / name / "weights-00000.safetensors").write_bytes(b"half")
    removed = retire(six, RUN, keep_last=6, keep_every=None)
    assert [path.name for path in removed] == [ours]
    assert {path.name for path in six.iterdir() if path.name.startswith(".")} == others


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


def test_a_copy_under_another_name_is_the_users(six):
    """cp -r and mv of checkpoints: none of these names is one that a save gives to what the manifest says."""
    copies = ["step-000200-before-the-holidays", "backup", "step-000900", "step-200", "step-000100-0123ABCD"]
    for name in copies[:2]:
        shutil.copytree(snaps.place(six, 200), six / name)
    for name in copies[2:]:
        shutil.copytree(snaps.place(six, 100), six / name)
    retire(six, RUN, keep_last=1, keep_every=None)
    assert sorted(path.name for path in six.iterdir()) == sorted([*copies, "step-000600"])


def test_a_copy_does_not_stand_in_for_what_it_was_copied_from(six):
    shutil.copytree(snaps.place(six, 600), six / "step-000600 copy")
    damage(snaps.place(six, 600))
    retire(six, RUN, keep_last=1, keep_every=None)
    assert sorted(path.name for path in six.iterdir()) == ["step-000500", "step-000600", "step-000600 copy"]


def test_a_checkpoint_that_somebody_put_a_file_into_stays(six):
    (snaps.place(six, 200) / "notes.txt").write_text("the one that I liked")
    (snaps.place(six, 300) / "evaluation").mkdir()
    (snaps.place(six, 300) / "evaluation" / "scores.json").write_text("{}")
    retire(six, RUN, keep_last=1, keep_every=None)
    assert steps(six) == [200, 300, 600]


STEPS = range(100, 700, 100)
USABLE, WITH_A_MANIFEST = ("own", "own, to replace", "own, with a stranger"), ("own, damaged",)
KINDS = (
    *USABLE, *WITH_A_MANIFEST, "own, its manifest gone", "a copy", "a copy with a higher number", "another run's",
    "another stage's", "a link", "nothing inside", "a file", "half of theirs",
)  # fmt: skip


def put(templates, place, kind, step):
    """Something that may lie in a directory of checkpoints."""
    path = place / f"step-{step:06d}"
    match kind:
        case "own, to replace":
            shutil.copytree(templates / f"own-{step}", place / f"{path.name}-0123abcd")
        case "a copy":
            shutil.copytree(templates / f"own-{step}", place / f"copy-{step}")
        case "a copy with a higher number":
            shutil.copytree(templates / f"own-{step}", place / f"step-9{step:05d}")
        case "another run's":
            shutil.copytree(templates / f"theirs-{step}", place / f"step-{step + 1:06d}")
        case "another stage's":
            shutil.copytree(templates / f"sft-{step}", place / f"step-{step + 2:06d}")
        case "a link":
            (place / f"step-{step:06d}-89abcdef").symlink_to(templates / f"own-{step}")
        case "nothing inside":
            (place / f"step-8{step:05d}").mkdir()
        case "a file":
            (place / f"step-7{step:05d}").write_text("junk")
        case "half of theirs":
            (place / f".partial-{path.name}-run-two-0123abcd").mkdir()
        case _:
            shutil.copytree(templates / f"own-{step}", path)
            if kind == "own, damaged":
                damage(path)
            elif kind == "own, its manifest gone":
                (path / "manifest.json").unlink()
            elif kind == "own, with a stranger":
                (path / "notes.txt").write_text("mine")


def everything(place):
    """Every name, link and byte below a directory."""
    found = sorted(place.rglob("*"))
    return {
        path.relative_to(place).as_posix(): path.readlink() if path.is_symlink() else path.is_dir() or path.read_bytes()
        for path in found
    }


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    templates = tmp_path_factory.mktemp("templates")
    for step in STEPS:
        snaps.save(templates, step).rename(templates / f"own-{step}")
        snaps.save(templates, step + 1, run_id="run-two").rename(templates / f"theirs-{step}")
        snaps.save(templates, step + 2, stage="sft").rename(templates / f"sft-{step}")
    return templates


some_steps = st.sets(st.sampled_from(STEPS), max_size=2)


@settings(max_examples=30, deadline=None)
@given(
    own=st.lists(st.sampled_from(("own", *KINDS[:5])), min_size=6, max_size=6),
    others=st.sets(st.tuples(st.sampled_from(STEPS), st.sampled_from(KINDS[5:])), min_size=4, max_size=8),
    keep_last=st.integers(1, 3), keep_every=st.sampled_from([None, 200, 300]), best=some_steps, pinned=some_steps,
    mtimes=st.randoms(use_true_random=False),
)  # fmt: skip
def test_whatever_lies_there_only_what_a_verified_newer_one_supersedes_goes(
    templates, own, others, keep_last, keep_every, best, pinned, mtimes
):
    own = dict(zip(STEPS, own, strict=True))
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for step, kind in [*own.items(), *others]:
            put(templates, place, kind, step)
        for path in place.iterdir():
            os.utime(path, (mtimes.randint(0, 2**32), mtimes.randint(0, 2**32)), follow_symlinks=False)
        before, were = everything(place), everything(templates)
        removed = retire(place, RUN, keep_last, keep_every, best, pinned, stage="align")

        gone = {path.name for path in removed}
        assert everything(place) == {name: what for name, what in before.items() if name.partition("/")[0] not in gone}
        assert everything(templates) == were  # no link was followed
        newest = max((step for step, kind in own.items() if kind in USABLE), default=0)
        last = sorted(step for step, kind in own.items() if kind in USABLE + WITH_A_MANIFEST and step <= newest)
        goes = {
            step for step in last[:-keep_last]
            if own[step] != "own, with a stranger"
            and step not in best | pinned
            and not (keep_every and step % keep_every == 0)
        }  # fmt: skip
        assert {int(path.name.split("-")[1]) for path in removed} == goes
        assert retire(place, RUN, keep_last, keep_every, best, pinned, stage="align") == []
