"""`onward inspect`: what is this? By headers and manifests, never by reading tensors."""

from __future__ import annotations

import os
from pathlib import Path

from onward.checkpoint.manifest import MANIFEST, read_manifest
from onward.errors import OnwardError, PlanError
from onward.files import read_lines
from onward.foreign.description import Description, command, count_dtypes
from onward.foreign.known import describe
from onward.runs.begin import command_of
from onward.runs.directory import RunDirectory
from onward.runs.status import status
from onward.weights.shards import PARTS

NOTHING = ("it is no run, checkpoint, output, model directory or adapter",)


def inspect(path: Path) -> Description:
    """Describe a run, checkpoint, output, model or adapter; PlanError when there is nothing at `path`."""
    if not path.exists():
        raise PlanError("no such file or directory", where=str(path))
    if RunDirectory(path).lock.is_file():
        return _run(path)
    if (path / MANIFEST).is_file():
        return _own(path)
    if found := describe(path):
        return found
    return _unknown(path)


def _unknown(path: Path) -> Description:
    """Nothing that onward knows; a directory may hold something that it does, one level down."""
    if path.is_file():
        holds, words = {"holds": f"{path.stat().st_size:,} bytes"}, None
        if path.suffix in (".yaml", ".yml"):
            words = command("check", path, note="if it is a plan")
        elif path.suffix in (".jsonl", ".json", ".parquet"):
            words = command("check", "PLAN", note=f"if it is data, with `data: {path}` in a stage of PLAN")
        return Description(str(path), "not recognised", "no checkpoint", holds, missing=NOTHING, next_command=words)
    inside = sorted(path.iterdir())
    known = {item: found for item in inside[:50] if (found := _known(item)) and found.missing != NOTHING}
    facts = {"holds": [f"{item.name} ({found.kind})" for item, found in known.items()]}
    if not known:
        facts = {"holds": [item.name for item in inside[:6]] or ["nothing"]}
    first = min(known, key=lambda item: known[item].kind == "tensors", default=None)  # plain tensors come last
    return Description(
        str(path),
        "directory" if known else "not recognised",
        "no checkpoint itself" if known else "nothing that onward knows",
        facts,
        missing=NOTHING,
        next_command=command("inspect", first) if first else None,
    )


def _known(path: Path) -> Description | None:
    return _run(path) if RunDirectory(path).lock.is_file() else describe(path)


def _run(path: Path) -> Description:
    found = status(path)
    stages = [
        f"{stage.name} {stage.state}" + (f" at step {stage.step}" if stage.step else "") for stage in found.stages
    ]
    outputs = [stage.output for stage in found.stages if stage.output]
    return Description(
        str(path),
        f"run, {found.state}",
        "onward",
        {"run id": found.run_id, "model": found.model, "stages": stages, "attempts": found.attempts},
        continues_exactly=True,
        next_command=found.next_command or (command("chat", outputs[-1]) if outputs else command("status", path)),
    )


def _own(path: Path) -> Description:
    try:
        manifest = read_manifest(path)
    except OnwardError as error:
        return Description(
            str(path),
            "checkpoint or output, damaged",
            "onward",
            problems=(str(error),),
            missing=("a manifest that verifies",),
            next_command=f"{_run_command(path)}  # goes on from the newest checkpoint that verifies",
        )
    facts = {
        "run id": manifest.run_id,
        "stage": manifest.stage,
        "step": manifest.step,
        "samples seen": f"{manifest.samples_seen:,}",
        "files": f"{len(manifest.files)}, {sum(record.size for record in manifest.files):,} bytes",
        "written": manifest.created,
    }
    if manifest.kind == "output":
        is_adapter = (path / "adapter_config.json").exists()
        kind = "output (adapters)" if is_adapter else "output (merged model)"
        words: tuple[object, ...] = (
            ("merge", path, "--out", "DIR") if is_adapter else ("evaluate", path, "--data", "FILE")
        )
        if (path / PARTS).exists():
            kind, words = "output (a model in parts)", ("assemble", "--base", path, "--out", "DIR")
        missing = ("an optimizer: an output is what a stage hands on; its run's checkpoints continue",)
        return Description(str(path), kind, "onward", facts, missing=missing, next_command=command(*words))
    weights = [tensor.dtype for tensor in manifest.tensors if tensor.slot in ("weight", "adapter")]
    state = [tensor.dtype for tensor in manifest.tensors if tensor.slot not in ("weight", "adapter")]
    facts |= {"trained": count_dtypes(weights), f"optimizer ({manifest.optimizer})": count_dtypes(state)}
    return Description(
        str(path),
        "checkpoint",
        "onward",
        facts,
        continues_exactly=True,
        next_command=command("verify", path, note=f"its run goes on with: {_run_command(path)}"),
    )


def _run_command(checkpoint: Path) -> str:
    """What goes on with the run in which a checkpoint lies; RUN/stages/1-sft/checkpoints/step-000100 is its place."""
    above = checkpoint.absolute().parents
    run = RunDirectory(Path(os.path.relpath(above[min(3, len(above) - 1)])))
    return command_of(run, read_lines(run.journal)[0]) if run.lock.is_file() else "onward run PLAN --run RUN"
