"""From an XTuner release of a LLaVA to a model that two more stages trained, by onward's commands alone.

    python examples/from-xtuner-llava/example.py [RELEASE] [BASES] [OUT]

RELEASE holds XTuner's parts (llm_adapter, visual_encoder_adapter, projector), BASES the folder to which the names in
their adapter_config.json are relative. Without arguments: the samples beside the repository; OUT is in demo/.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
SAMPLES = HERE.parents[2] / "shared" / "samples"
RELEASE = SAMPLES / "xtuner-llava-internlm2-parts" / "release"
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "yellow": (230, 220, 30)}


def main(release: Path = RELEASE, bases: Path = SAMPLES, out: Path = Path("demo/from-xtuner-llava")) -> None:
    if not release.is_dir():
        sys.exit(f"{release} is not there: give a release of XTuner's and the folder of its bases")
    release, bases, out = release.resolve(), bases.resolve(), out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copyfile(HERE / "plan.yaml", out / "plan.yaml")
    make_data(out / "data")

    print("1. What is this? inspect prints the command that puts it together")
    told = json.loads(onward(bases, "inspect", release, "--json"))
    words = shlex.split(told["next_command"].replace("--out DIR", f"--out {out / 'model'}"))[1:]
    print("\n2. The parts become one model: what none of them states is given")
    onward(bases, *words, "--set", "vision_feature_layer=-2", "--dtype", "fp32")
    print("\n3. Two more stages, each with a gate; interrupted, the same command goes on")
    onward(out, "run", "plan.yaml", "--run", "run")
    print("\n4. Where it stands")
    onward(out, "status", "run")
    print("\n5. And out again: one directory a module, as other tools take them")
    onward(out, "export", "run/stages/2-task/output", "--to", "parts", "--out", "parts")
    onward(out, "export", "run/stages/2-task/output", "--to", "xtuner-pth", "--out", "xtuner")


def onward(where: Path, *words: object) -> str:
    """One command, shown with what it says."""
    command = [sys.executable, "-m", "onward", *map(str, words)]
    print(f"   $ onward {shlex.join(command[3:])}", flush=True)
    done = subprocess.run(command, cwd=where, stdout=subprocess.PIPE, text=True, env={**os.environ})
    print("".join(f"   {line}\n" for line in done.stdout.splitlines()[:40]), end="")
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def make_data(directory: Path) -> None:
    """Small images of one colour each, and the question which."""
    chance = random.Random(7)
    (directory / "images").mkdir(parents=True)
    for side, count in (("train", 96), ("heldout", 24)):
        with (directory / f"{side}.jsonl").open("w") as file:
            for number in range(count):
                name, colour = list(COLOURS.items())[number % 4]
                shade = tuple(max(0, min(255, value + chance.randint(-20, 20))) for value in colour)
                image = f"images/{side}-{number}.png"
                Image.new("RGB", (56, 56), shade).save(directory / image)
                asked = [{"type": "image", "path": image}, {"type": "text", "text": "which colour"}]
                messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": name}]
                file.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
