"""Data of every kind and format for the exactness tests, and models that take it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import tiny

WORDS = tiny.CORPUS[2].split()[-10:]


def exchanges(rows: int, seed: int) -> list[tuple[str, str]]:
    """Questions and answers of very unequal lengths."""
    chance = random.Random(seed)
    said = [" ".join(chance.choices(WORDS, k=chance.choice((1, 2, 3, 20)))) for _ in range(rows)]
    return [(f"say it again please : {text}", text) for text in said]


def write_data(place: Path) -> None:
    """`sharegpt.parquet`, `alpaca.json`, `prompt/*.jsonl`, `saved/` (texts), `odd.jsonl` (renamed columns), and
    `llava.parquet` with images inside."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    datasets.disable_progress_bars()
    turns = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in exchanges(9, 1)]
    parquet.write_table(
        pyarrow.table({"conversations": turns, "id": range(9)}), place / "sharegpt.parquet", row_group_size=4
    )
    alpaca = [{"instruction": q, "input": "", "output": a} for q, a in exchanges(7, 2)]
    (place / "alpaca.json").write_text(json.dumps(alpaca, indent=1))
    (place / "prompt").mkdir()
    for name, seed in (("a", 3), ("b", 4)):
        rows = [{"question": q, "answer": a} for q, a in exchanges(4, seed)]
        (place / f"prompt/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": f"{q} {a}"} for q, a in exchanges(6, 5)]
    datasets.Dataset.from_list(texts).save_to_disk(place / "saved")
    odd = [{"ask": q, "say": a} for q, a in exchanges(8, 6)]
    (place / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in odd))
    colours = [json.loads(line) for line in (place / "colours.jsonl").read_text().splitlines()]
    pictures = [
        {
            "image": {"bytes": (place / row["messages"][0]["content"][0]["path"]).read_bytes(), "path": None},
            "conversations": [
                {"from": "human", "value": "<image>\nwhat colour is the picture ?" + " please" * (i % 4)},
                {"from": "gpt", "value": row["messages"][1]["content"]},
            ],
        }
        for i, row in enumerate(colours)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(pictures), place / "llava.parquet", row_group_size=5)


def base_model(place: Path) -> None:
    """`base`: the qwen2 of the other tests, without a chat template."""
    shutil.copytree(place / "qwen2", place / "base")
    for file in (place / "base").glob("chat_template*"):
        file.unlink()
