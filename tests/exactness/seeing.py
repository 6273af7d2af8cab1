"""A model that was trained on colours, measured with its images and without them."""

from __future__ import annotations

import json
from pathlib import Path

from harness import in_child


def assert_sees(output: Path, colours: Path, blind: Path) -> None:
    """The loss an answer is far below ln 4 = 1.39 with the image, and not in rows without (written to `blind`).

    Who does not see the image cannot do better than ln 4 an answer: there are four colours.
    """
    rows = [json.loads(line) for line in colours.read_text().splitlines()]
    for row in rows:
        row["messages"][0]["content"] = [part for part in row["messages"][0]["content"] if part["type"] == "text"]
    blind.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def measure() -> None:
        from transformers import AutoTokenizer

        from onward.runs.evaluate import evaluate

        seen, unseen = (
            evaluate(str(output), [data], ["loss", "exact_match"], max_new_tokens=8).metrics
            for data in (colours, blind)
        )
        words = AutoTokenizer.from_pretrained(output)
        lengths = [len(words(row["messages"][1]["content"])["input_ids"]) + 1 for row in rows]  # and the turn's end
        tokens = sum(lengths) / len(lengths)
        print("per answer:", seen["loss"] * tokens, "without the image:", unseen["loss"] * tokens)
        assert seen["loss"] * tokens < 0.3 and seen["exact_match"] > 0.8
        assert unseen["loss"] * tokens > 1.2 and unseen["exact_match"] < 0.6

    assert in_child(measure) == 0
