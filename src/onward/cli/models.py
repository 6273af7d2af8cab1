"""onward merge, onward evaluate: what is done with a model outside a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from onward.cli.output import show
from onward.cli.parser import Commands, add_command, add_json

MODEL = "a model, an output of a stage, an adapter, or a checkpoint of a run: RUN@STAGE/STEP"
METRIC = (
    "loss (default), perplexity, token_accuracy, exact_match, contains, f1, anls, or module:function; again for more"
)


def add_commands(commands: Commands) -> None:
    parser = add_command(
        commands,
        "merge",
        merge,
        "fold adapters into their base model, in bounded memory",
        "onward merge runs/plan/stages/1-sft/checkpoints/step-000100 --out merged",
    )
    parser.add_argument(
        "adapters",
        metavar="ADAPTER",
        nargs="+",
        help="a PEFT LoRA directory (an onward checkpoint is one: RUN@STAGE/STEP); several add up",
    )
    parser.add_argument("--base", metavar="B", help="the base model's directory (default: the one the adapters name)")
    parser.add_argument(
        "--base-values",
        choices=("original", "dequantised"),
        default="original",
        help="after qlora: merge into the base as it was (default), or as quantisation had left it",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="a directory that does not exist yet")
    add_json(parser)

    parser = add_command(
        commands,
        "evaluate",
        evaluate,
        "measure a model on data",
        "onward evaluate runs/plan/stages/1-sft/output --data heldout.jsonl --metric exact_match",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--data", metavar="FILE", action="append", required=True, help="may be given again")
    parser.add_argument("--metric", metavar="NAME", action="append", help=METRIC)
    parser.add_argument("--base", metavar="B", help="for an adapter: its base, instead of the one that it names")
    parser.add_argument("--limit", metavar="N", type=int, help="use the first N samples")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=64, help="the longest answer (64)")
    parser.add_argument("--batch-size", metavar="N", type=int, default=8, help="samples at once (8)")
    parser.add_argument("--out", metavar="FILE", help="write each prediction with its values, as JSON lines")
    add_json(parser)


def merge(arguments: argparse.Namespace) -> int:
    from onward.model.families import find_family
    from onward.runs.reference import path_of
    from onward.weights.merge import merge_adapters

    report = merge_adapters(
        [path_of(adapter) for adapter in arguments.adapters],
        Path(arguments.base) if arguments.base else None,
        Path(arguments.out),
        to_canonical_for=lambda config: find_family(config, "the base's config.json").to_canonical,
        base_values=arguments.base_values,
    )
    show(report, as_json=arguments.json, out=arguments.out)
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    from onward.runs.evaluate import evaluate as evaluate_model

    report = evaluate_model(
        arguments.model,
        [Path(path) for path in arguments.data],
        arguments.metric or ["loss"],
        base=arguments.base,
        limit=arguments.limit,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        out=Path(arguments.out) if arguments.out else None,
    )
    show(report, as_json=arguments.json)
    return 0
