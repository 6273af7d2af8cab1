"""`onward inspect`: what is this? By headers and manifests, never by reading tensors."""

from __future__ import annotations

from pathlib import Path

from onward.checkpoint.manifest import MANIFEST, read_manifest
from onward.errors import OnwardError, PlanError
from onward.foreign.description import Description, count_dtypes
from onward.foreign.known import describe
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
        holds = [f"{path.stat().st_size:,} bytes"]
        return Description(str(path), "not recognised", "nothing that onward knows", {"holds": holds}, missing=NOTHING)
    inside = sorted(path.iterdir())
    known = {item: found for item in inside[:50] if (found := describe(item)) and found.missing != NOTHING}
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
        next_command=f"onward inspect {first}" if first else None,
    )


def _run(path: Path) -> Description:
    found = status(path)
    stages = [
        f"{stage.name} {stage.state}" + (f" at step {stage.step}" if stage.step else "") for stage in found.stages
    ]
    return Description(
        str(path),
        f"run, {found.state}",
        "onward",
        {"run id": found.run_id, "model": found.model, "stages": stages, "attempts": found.attempts},
        continues_exactly=True,
        next_command=f"onward status {path}" if found.state == "finished" else f"onward run PLAN --run {path}",
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
            next_command="the run goes on from the newest checkpoint that verifies: onward run PLAN",
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
        next_command = f"onward merge {path} --out DIR" if is_adapter else f"onward evaluate {path} --data FILE"
        if (path / PARTS).exists():
            kind, next_command = "output (a model in parts)", f"onward assemble --base {path} --out DIR"
        missing = ("an optimizer: an output is what a stage hands on; its run's checkpoints continue",)
        return Description(str(path), kind, "onward", facts, missing=missing, next_command=next_command)
    weights = [tensor.dtype for tensor in manifest.tensors if tensor.slot in ("weight", "adapter")]
    state = [tensor.dtype for tensor in manifest.tensors if tensor.slot not in ("weight", "adapter")]
    facts |= {"trained": count_dtypes(weights), f"optimizer ({manifest.optimizer})": count_dtypes(state)}
    return Description(
        str(path),
        "checkpoint",
        "onward",
        facts,
        continues_exactly=True,
        next_command=f"onward verify {path}; its run goes on with: onward run PLAN --run RUN",
    )
