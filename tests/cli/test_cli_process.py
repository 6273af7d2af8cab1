"""The command as a user starts it: quick, without torch, with exit statuses and without tracebacks."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from onward import __version__
from onward.plan.load import load_plan
from onward.plan.lock import Lock, plan_values, write_lock

ONWARD = (sys.executable, "-c", "import sys; from onward.cli.main import main; sys.exit(main())")
HEAVY = ("torch", "transformers", "peft", "numpy")
PLAN = """\
model: nowhere
stages:
  - {name: sft, train: {language_model: {mode: full}}, data: a.jsonl, epochs: 1}
"""


def onward(*words: str, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([*ONWARD, *words], capture_output=True, text=True, timeout=60, **settings)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def imported(*words: str, cwd: Path | None = None) -> set[str]:
    """The top modules that a command has imported when it ends."""
    program = f"import sys; from onward.cli.main import main; main({list(words)!r}); print('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd, timeout=60)
    return {name.partition(".")[0] for name in done.stdout.rpartition("MODULES")[2].split()}


def quickest(*words: str, cwd: Path | None = None) -> float:
    """CPU seconds of the quickest of a few starts: what a quiet machine takes, however busy this one is."""
    times = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        onward(*words, cwd=cwd)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["run", "--help"], ["rnu"], []])
def test_help_imports_nothing_heavy(words):
    assert not imported(*words) & {*HEAVY, "pydantic", "rich", "ruamel"}


def test_help_is_quick():
    assert quickest("--help") < 0.3


def test_version():
    assert onward("--version").stdout == f"onward {__version__}\n"


@pytest.mark.parametrize(
    "command",
    ["run", "check", "schema", "prove", "pin", "status", "inspect", "verify", "diff", "merge", "evaluate", "chat"],
)
def test_every_command_has_help_with_an_example(command):
    done = onward(command, "--help")
    assert done.returncode == 0
    assert f"example:\n  onward {command}" in done.stdout


def test_a_bad_plan_is_quick_and_needs_no_torch(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN.replace("epochs", "epoks"))
    for command in ("run", "check"):
        assert not imported(command, "plan.yaml", cwd=tmp_path) & set(HEAVY)
    assert quickest("check", "plan.yaml", cwd=tmp_path) < 1
    done = onward("run", "plan.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: plan.yaml:3: stages.sft.epoks: unknown key; did you mean epochs?\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.yaml"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rnu"], "unknown command rnu; did you mean run?"),
        (["frobnicate"], "unknown command frobnicate; the commands are run, check"),
        (["run"], "the following arguments are required: PLAN"),
        (["run", "plan.yaml", "--resume"], "there is no resume flag"),
        (["run", "plan.yaml", "--acept", "x"], "unknown argument --acept; did you mean --accept?"),
        (["run", "plan.yaml", "--run", "d", "nonsense"], "an override is KEY=VALUE"),
        (["run", "nothing.yaml"], "nothing.yaml: there is no such plan file"),
        (
            ["run", "plan.yaml", "--run", "d", "stages.sft.epoch=3"],
            "command line: stages.sft.epoch=3: unknown key; did",
        ),
        (["run", "plan.yaml", "sed=3", "--run", "d", "seeed=3"], "command line: seeed=3"),
        (["run", "plan.yaml", "sed=3", "--run", "d", "seeed=3"], "command line: sed=3"),
        (["status", "runs/x", "y"], "unknown argument y"),
        (["check", "plan.yaml", "--show", "x"], "argument --show: invalid int value"),
    ],
)
def test_wrong_usage_exits_2_without_a_traceback(tmp_path, words, says):
    (tmp_path / "plan.yaml").write_text(PLAN)
    done = onward(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.startswith("error:") and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_errors_are_json_when_json_is_asked_for(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN.replace("full", "fool"))
    done = onward("run", "plan.yaml", "--json", cwd=tmp_path)
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["exit_status"], error["kind"]) == (2, 2, "PlanError")
    assert error["message"].startswith(
        "plan.yaml:3: stages.sft.train.language_model.mode: must be full, lora, qlora or frozen"
    )
    assert error["message"] in done.stderr


def test_a_terminal_of_another_encoding_ends_no_command():
    done = onward("--help", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "") and "exit status: 0 done ? 1 failed" in done.stdout


def test_ctrl_c_ends_watching_well(tmp_path):
    plan = load_plan(write(tmp_path / "plan.yaml", PLAN)).plan
    lock = Lock(run_id="r", created="t", date="d", written={}, overrides={}, plan=plan_values(plan), fingerprints={},
                environment={})  # fmt: skip
    write_lock(tmp_path / "plan.lock.json", lock)
    words = [*ONWARD, "status", ".", "--watch"]
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where a shell runs it behind
    )
    assert "stopped, not started yet" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


def test_schema_is_json():
    schema = json.loads(onward("schema").stdout)
    assert "stages" in schema["required"]


def test_a_damaged_lock_stops_run_and_changes_nothing(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    lock = tmp_path / "runs" / "plan" / "plan.lock.json"
    lock.parent.mkdir(parents=True)
    lock.write_text("{}")
    done = onward("run", "plan.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert "plan.lock.json: is not a lock" in done.stderr and "Traceback" not in done.stderr
    assert lock.read_text() == "{}"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["schema", "--help"])  # more and less than a buffer holds
def test_a_reader_that_goes_away_leaves_no_traceback(command, unbuffered):
    words = ["bash", "-c", '"$@" | true', "bash", *ONWARD, command]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)
    assert done.stderr == ""


def test_a_run_whose_reader_goes_away_ends_well():
    program = """
import sys, types
from onward.cli.view import View
view = View.of_process(as_json=False)
for _ in range(1000):
    view.note("x" * 100)
print("trained to the end", file=sys.stderr)
"""
    words = ["bash", "-c", 'set -o pipefail; "$@" | true', "bash", sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "trained to the end\n")
