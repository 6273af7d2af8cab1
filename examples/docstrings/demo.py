"""A real chat model, real data: SmolLM2-135M-Instruct learns to write the first line of a docstring.

    python examples/docstrings/demo.py

Everything is made in demo/docstrings. Killed on the way, the same command goes on where it was: try it. Exit status 1
when the held-out loss has not fallen.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from prepare import prepare

HERE = Path("demo/docstrings")
READY = HERE / ".ready"
ONWARD = Path(sys.executable).absolute().with_name("onward")
SHOWN = 3  # answers
OUTPUT = "runs/plan/stages/1-sft/output"


def main() -> None:
    began = time.perf_counter()
    print(f"onward's text demo: some five minutes on two cores, all of it in {HERE}.", flush=True)
    if not READY.exists():
        prepare(HERE)
        READY.touch()
    counts = {side: len((HERE / f"data/{side}.jsonl").read_text().splitlines()) for side in ("train", "heldout")}
    print(
        f"{counts['train']} functions of the standard library to learn from, "
        f"{counts['heldout']} of other modules held out"
    )
    before = answers(HERE / "model")
    print("$ onward run plan.yaml", flush=True)
    status = subprocess.run([ONWARD, "run", "plan.yaml"], cwd=HERE, check=False).returncode
    if status:
        sys.exit(status)
    after = answers(HERE / OUTPUT)
    for (question, expected, said), (_, _, says) in zip(before, after, strict=True):
        print(
            f"\n{question}\n   the library says: {expected}\n   before:           {said}\n   after:            {says}"
        )
    rows = [json.loads(line) for line in (HERE / "runs/plan/metrics.jsonl").read_text().splitlines()]
    start, end = (row["evaluation"] for row in (rows[0], rows[-1]))
    print(
        f"\nheld-out loss {start['loss']:.3f} before, {end['loss']:.3f} after; "
        f"tokens predicted right {start['token_accuracy']:.1%} before, {end['token_accuracy']:.1%} after"
    )
    print(
        f"Done in {time.perf_counter() - began:.0f} s. The trained model is {HERE / OUTPUT}, a Hugging Face directory."
    )
    if end["loss"] >= start["loss"]:
        sys.exit("demo failed: nothing was learnt")


def answers(model: Path) -> list[tuple[str, str, str]]:
    """(question, what the library says, what the model says) for some held-out functions."""
    from onward.data.encode import load_encoder
    from onward.data.samples import Origin
    from onward.evaluate.generate import generate_answers
    from onward.model.load import load_model

    file = HERE / "data/heldout.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:: len(lines) // SHOWN][:SHOWN]]
    encoder = load_encoder(model, max_length=1024, overlong="error", loss_on="assistant", date="2026-01-01")
    loaded = load_model(model, precision="fp32", device="cpu")
    found = generate_answers(loaded.model, encoder, [(row, Origin("", str(file), file.parent)) for row in rows], 48)
    return [(answer.row["messages"][1]["content"], answer.accepted[0], answer.said) for answer in found]


if __name__ == "__main__":
    main()
