"""`veneer demo`: the whole life of one adapter on smollm2, a few minutes on two cores.

Writes a data set (free-text request -> exact JSON call), trains, evaluates before and after on phrasings it never saw,
merges, generates from the merged model, and writes the report.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.cli.output import print_json, say, shown
from veneer.cli.parse import Command, parse
from veneer.config import DemoSettings

if TYPE_CHECKING:
    from veneer.evaluate.run import Result

COMMAND = Command(
    name="demo",
    summary="the whole life of one adapter on smollm2, in minutes on two cores",
    settings=DemoSettings,
    example="veneer demo --output-dir out/demo",
)
SHOWN = 3  # answers printed before and after


def run(argv: Sequence[str]) -> int:
    """All steps, each said aloud; the last line of the results is one JSON object."""
    settings = parse(argv, COMMAND).settings
    from veneer.config import RunConfig
    from veneer.data.toolcalls import write
    from veneer.evaluate.model_card import write_model_card
    from veneer.evaluate.run_report import report_run
    from veneer.merge.into_base import merge_into_base
    from veneer.model.load import load
    from veneer.train.run import train

    folder = Path(settings.output_dir)
    _clear(folder)
    say("1/5  data: free-text request -> exact JSON call; the test phrasings are held out")
    files = write(folder / "data", n_train=1600, n_test=settings.test_rows, seed=settings.seed)
    options: dict[str, Any] = {
        "base_model": "smollm2",
        "dataset": str(files["train"]),
        "output_dir": str(folder / "adapter"),
    }
    options |= {
        "max_steps": settings.max_steps,
        "seed": settings.seed,
        "per_device_train_batch_size": 12,
        "validation_split": 32,
        "eval_steps": max(1, settings.max_steps // 4),
    }
    say("2/5  train")
    loaded = load("smollm2")
    trained = train(RunConfig.from_flat(options), loaded=loaded)
    say("3/5  evaluate base and adapter on the test phrasings")
    result = _evaluate(loaded, files["test"], folder / "adapter")
    report = report_run(folder / "adapter", result)
    write_model_card(folder / "adapter")
    say("4/5  merge into the base, reload with plain transformers, compare logits")
    merged = merge_into_base(str(folder / "adapter"), "smollm2", str(folder / "merged"))
    say("5/5  generate from the merged model")
    _generate(folder / "merged", files["test"])
    scores = result.metrics["exact_match"]
    print_json(
        {
            "exact_match_before": scores["base"].score,
            "exact_match_after": scores["adapter"].score,
            "exact_match_after_interval": [scores["adapter"].low, scores["adapter"].high],
            "train_seconds": trained.train_seconds,
            "tokens_per_second": trained.tokens_per_second,
            "merged_logits_difference": merged.logits_difference,
            "adapter": str(folder / "adapter"),
            "merged": str(folder / "merged"),
            "report": str(report),
        }
    )
    return 0


def _clear(folder: Path) -> None:
    """The demo's own folders are made anew; nothing else in there is touched."""
    for name in ("adapter", "merged", "data"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _evaluate(loaded: Any, test: Path, adapter: Path) -> Result:
    from veneer.data.files import read_rows
    from veneer.evaluate.run import evaluate

    result = evaluate(
        loaded,
        read_rows(test),
        metrics=["exact_match", "loss"],
        max_new_tokens=64,
        batch_size=25,
        where=str(test),
        progress=say,
    )
    for sample in result.samples[:SHOWN]:
        say(f"\n  request  {sample.prompt}\n  wanted   {sample.references[0]}")
        say(f"  before   {_line(sample.texts['base'])}\n  after    {_line(sample.texts['adapter'])}")
    for name, scores in result.metrics.items():
        told = ", ".join(
            f"{slot} {shown(score.score)} [{shown(score.low)}, {shown(score.high)}]" for slot, score in scores.items()
        )
        say(f"\n  {name}: {told}")
    return result


def _generate(merged: Path, test: Path) -> None:
    from veneer.data.chat import Template, conversation
    from veneer.data.files import read_rows
    from veneer.model.generate import generate
    from veneer.model.load import load

    model, tokenizer = load(str(merged))
    rows = read_rows(test)[-SHOWN:]
    prompts = [Template(tokenizer).prompt_ids(conversation(row, "test row")) for row in rows]
    for row, text in zip(rows, generate(model, tokenizer, prompts, max_new_tokens=64), strict=True):
        say(f"  {row['prompt']}\n    -> {_line(text)}")


def _line(text: str, width: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
