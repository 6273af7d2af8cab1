"""What the thin commands hand on, and what they make of what comes back."""

import dataclasses
import io
import json
import logging
import sys
import types
from pathlib import Path

import pytest

from onward.cli.main import main
from onward.errors import DamageError, Interrupted, Refused, TrainingError
from onward.plan.load import load_plan
from onward.plan.lock import Lock, plan_values, write_lock

PLAN = """\
model: m
stages:
  - {name: sft, train: {language_model: {mode: full}}, data: a.jsonl, epochs: 1}
"""


@dataclasses.dataclass
class Result:
    status: str = "finished"
    steps_trained: int = 3
    tier: str = "bitwise"

    def to_json(self):
        return dataclasses.asdict(self)


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """In a directory with a plan; `onward.runs.walk.run_plan` notes its calls and does what `calls.do` says."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text(PLAN)
    seen = types.SimpleNamespace(runs=[], do=lambda view: Result())

    def run_plan(loaded, directory, *, until, accept, view, command):
        seen.runs.append((loaded, directory, until, accept, command))
        return seen.do(view)

    monkeypatch.setitem(sys.modules, "onward.runs.walk", types.SimpleNamespace(run_plan=run_plan))
    return seen


def test_run_hands_on_what_was_said(calls, capsys):
    words = ["run", "plan.yaml", "seed=3", "--run", "here", "stages.sft.epochs=2", "--until", "sft", "--accept", "a"]
    assert main([*words, "--accept", "b"]) == 0
    ((loaded, directory, until, accept, command),) = calls.runs
    assert command == "onward run plan.yaml seed=3 stages.sft.epochs=2 --run here"
    assert (loaded.plan.seed, loaded.plan.stages[0].epochs) == (3, 2)
    assert (str(directory), until, accept) == ("here", "sft", ["a", "b"])


def test_run_lies_in_runs_by_the_plans_name(calls):
    assert main(["run", "plan.yaml"]) == 0
    assert str(calls.runs[0][1]) == "runs/plan"
    assert main(["run", "plan.yaml", "seed=3"]) == 0
    assert main(["run", "plan.yaml"]) == 0
    assert [loaded.plan.seed for loaded, *_ in calls.runs] == [42, 3, 42]  # nothing is left over from a call before


def test_overrides_of_the_start_stand_on_continuing(calls, tmp_path):
    loaded = load_plan(tmp_path / "plan.yaml", ["seed=3"])
    lock = Lock(run_id="r", created="", date="", written=loaded.written, overrides=loaded.overrides,
                plan=plan_values(loaded.plan), fingerprints={}, environment={})  # fmt: skip
    (tmp_path / "runs" / "plan").mkdir(parents=True)
    write_lock(tmp_path / "runs" / "plan" / "plan.lock.json", lock)
    assert main(["run", "plan.yaml", "stages.sft.epochs=2"]) == 0
    again = calls.runs[0][0]
    assert (again.plan.seed, again.plan.stages[0].epochs) == (3, 2)
    assert again.overrides == {"seed": 3, "stages.sft.epochs": 2}


def test_json_has_the_result_alone_on_stdout(calls, capsys):
    def do(view):
        view.note("a note")
        return Result(steps_trained=0)

    calls.do = do
    assert main(["run", "plan.yaml", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"status": "finished", "steps_trained": 0, "tier": "bitwise"}
    assert err == "a note\n"
    assert main(["run", "plan.yaml"]) == 0
    assert capsys.readouterr().out == "a note\n"


@pytest.mark.parametrize(
    ("raised", "status", "says"),
    [
        (Refused("no", where="w", hint="do this"), 3, "error: w: no\n  do this\n"),
        (DamageError("bad", where="f"), 1, "error: f: bad\n"),
        (TrainingError("loss is nan"), 1, "error: loss is nan\n"),
        (Interrupted("saved at step 3"), 75, "interrupted: saved at step 3\n"),
        (KeyboardInterrupt(), 75, "interrupted: before it was done; nothing half-made is used\n"),
        (PermissionError(13, "Permission denied", "runs/x"), 1, "error: runs/x: Permission denied\n"),
    ],
)
def test_exit_statuses(calls, capsys, raised, status, says):
    def do(view):
        raise raised

    calls.do = do
    assert main(["run", "plan.yaml"]) == status
    assert capsys.readouterr() == ("", says)
    assert main(["run", "plan.yaml", "--json"]) == status
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["exit_status"] == status
    assert err == says


def test_a_defect_of_ours_keeps_its_traceback(calls):
    def do(view):
        raise ZeroDivisionError

    calls.do = do
    with pytest.raises(ZeroDivisionError):
        main(["run", "plan.yaml"])


@dataclasses.dataclass
class Report:
    good: bool = True

    @property
    def ok(self):
        return self.good

    equal = ok

    def lines(self):
        return ["first", "second"]

    def to_json(self):
        return {"good": self.good}


@pytest.mark.parametrize(
    ("command", "words", "fails"),
    [("status", ["x"], 0), ("inspect", ["x"], 0), ("verify", ["x"], 1), ("diff", ["x", "y"], 1)],
)
def test_reports_are_lines_or_json_and_their_verdict_is_the_exit_status(monkeypatch, capsys, command, words, fails):
    report = Report()
    fake = types.SimpleNamespace(**{command: lambda *paths: report if [*map(str, paths)] == words else None})
    monkeypatch.setitem(sys.modules, f"onward.runs.{command}", fake)
    assert main([command, *words]) == 0
    assert capsys.readouterr().out == "first\nsecond\n"
    report.good = False
    assert main([command, *words, "--json"]) == fails
    assert json.loads(capsys.readouterr().out) == {"good": False}


def test_check_hands_on_overrides_and_show(calls, monkeypatch, capsys):
    seen = []
    fake = types.SimpleNamespace(
        check_plan=lambda loaded, *, show, run: seen.append((loaded.plan.seed, show, str(run.path))) or Report()
    )
    monkeypatch.setitem(sys.modules, "onward.runs.check", fake)
    assert main(["check", "plan.yaml", "--show", "3", "seed=5"]) == 0
    assert main(["check", "plan.yaml", "--run", "here"]) == 0
    assert seen == [(5, 3, "runs/plan"), (42, 0, "here")]


def test_evaluate(monkeypatch, capsys):
    seen = []

    def evaluate(model, data, metrics, **options):
        seen.append((model, [str(path) for path in data], metrics, options))
        return types.SimpleNamespace(lines=lambda: ["loss: 1.25"], to_json=lambda: {"metrics": {"loss": 1.25}})

    monkeypatch.setitem(sys.modules, "onward.runs.evaluate", types.SimpleNamespace(evaluate=evaluate))
    words = ["evaluate", "m", "--data", "a", "--data", "b", "--limit", "3"]
    assert main(words) == 0
    assert capsys.readouterr().out == "loss: 1.25\n"
    assert main([*words, "--metric", "f1", "--metric", "mine:f", "--out", "p.jsonl", "--base", "b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"metrics": {"loss": 1.25}}
    options = {"base": None, "limit": 3, "max_new_tokens": 64, "batch_size": 8, "out": None}
    assert seen == [
        ("m", ["a", "b"], ["loss"], options),
        ("m", ["a", "b"], ["f1", "mine:f"], {**options, "base": "b", "out": Path("p.jsonl")}),
    ]


def test_no_command_shows_help_and_is_wrong_usage(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "onward run plan.yaml" in err


def test_a_closed_stdout_is_no_error_message(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return self.null.fileno()

    with open("/dev/null", "w") as null:  # noqa: PTH123
        Closed.null = null
        monkeypatch.setattr(sys, "stdout", Closed())
        assert main(["schema"]) == 1


def test_what_deepspeed_warns_of_when_it_is_imported_is_not_shown(capsys):
    """It sets its own level and writes to stdout, where --json is; its errors are shown."""
    assert main(["schema"]) == 0
    logger = logging.getLogger("DeepSpeed")
    warned, failed = (
        logger.makeRecord("DeepSpeed", level, "", 0, "", (), None) for level in (logging.WARNING, logging.ERROR)
    )
    assert not logger.filter(warned) and logger.filter(failed)
