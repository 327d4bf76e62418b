"""The model card of a run's folder: README.md as the Hugging Face Hub and PEFT's users expect it.

Made from veneer.json and, where there is one, evaluation.json. Nothing of this machine's folders stands in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.adapter.card import Adapter, Card
from veneer.adapter.hub import MODEL_CARD, base_without_folders, is_hub_id, last_part
from veneer.adapter.peft_vocabulary import ADDED
from veneer.config import dump_yaml
from veneer.evaluate.intervals import Score
from veneer.evaluate.run import Result
from veneer.evaluate.run_report import EVALUATION
from veneer.model.source import PACKAGED

MARK = "<!-- Made by veneer from the files beside it. Without this line it is yours, and is never written over. -->"
SETTINGS = (
    "r lora_alpha use_rslora scale target_modules target_parameters exclude_modules lora_dropout max_length "
    "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps lr_scheduler_type optim "
    "weight_decay seed"
).split()
"""Options that a reader of the card may want to repeat; the rest is in veneer.json."""


def write_model_card(folder: str | Path, hub_name: str | None = None) -> Path:
    """Writes README.md beside the adapter, unless someone has made it their own; returns its path.

    hub_name: owner/name that the examples in it speak of. Raises AdapterError.
    """
    path = Path(folder, MODEL_CARD)
    if not path.is_file() or MARK in path.read_text(encoding="utf-8", errors="replace"):
        evaluation = Path(folder, EVALUATION)
        result = Result.from_json(json.loads(evaluation.read_text(encoding="utf-8"))) if evaluation.is_file() else None
        name = Path(folder).resolve().name
        path.write_text(model_card(Adapter.load(folder).card, result, hub_name or name), encoding="utf-8")
    return path


def model_card(card: Card, result: Result | None, name: str) -> str:
    """The text of the card."""
    parts = [
        f"---\n{dump_yaml(_front(card))}---",
        f"# {last_part(name)}",
        f"A LoRA adapter for {_code(_base(card))}, trained with veneer.",
        _scores(card, result),
        _training(card),
        _use(card, name),
        MARK,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _base(card: Card) -> str:
    return base_without_folders(card.base_name) if card.base_name else "an unknown base"


def _front(card: Card) -> dict[str, Any]:
    """The YAML block that the Hub reads. It knows only bases that it has: a folder of someone's own is left out."""
    on_hub = card.base_name is not None and is_hub_id(card.base_name)
    about = {"base_model": card.base_name} if on_hub else {}
    tags = [f"base_model:adapter:{card.base_name}"] if on_hub else []
    return {
        **about,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [*tags, "lora", "transformers", "veneer"],
    }


def _scores(card: Card, result: Result | None) -> str:
    if result is None:
        return _validation(card.training)
    slots = list(next(iter(result.metrics.values())))
    changes = [f"{slot} - {slots[0]}" for slot in slots[1:]]
    rows = [
        [name.replace("_", " "), *map(_score, scores.values()), *map(_score, result.differences[name].values())]
        for name, scores in result.metrics.items()
    ]
    data = last_part(str(result.settings.get("dataset", "held-out rows")))
    return (
        f"## Scores\n\nOn {result.rows:,} rows of {_code(data)}, means with 95 % intervals; differences are paired, "
        f"row by row. Loss is in nats a token of the answers.\n\n{_table(['', *slots, *changes], rows)}"
    )


def _validation(training: Mapping[str, Any]) -> str:
    """What training itself measured: one number, without an interval."""
    before, best = training.get("eval_loss_before"), training.get("best_eval_loss")
    if before is None or best is None:
        return "## Scores\n\nNothing was held out in training, and the adapter has not been evaluated."
    rows = training.get("data", {}).get("validation_rows")
    on = f" on {rows:,} rows held out of training" if isinstance(rows, int) else ""
    return f"## Scores\n\nValidation loss{on}: {before:.4g} before, {best:.4g} after, in nats a token of the answers."


def _score(one: Score) -> str:
    if one.low is None or one.high is None:
        return f"{one.score:.4g}"
    return f"{one.score:.4g} [{one.low:.4g}, {one.high:.4g}]"


def _training(card: Card) -> str:
    options, data, machine = (card.training.get(name) or {} for name in ("options", "data", "machine"))
    facts: dict[str, Any] = {}
    if options.get("dataset"):
        facts["data"] = last_part(str(options["dataset"]))
    facts |= {name.replace("_", " "): data[name] for name in ("rows", "validation_rows", "tokens") if name in data}
    facts |= {name: options[name] for name in SETTINGS if options.get(name) not in (None, [], {}, False)}
    facts |= {
        name.replace("_", " "): card.training[name] for name in ("steps", "learning_rate") if name in card.training
    }
    if "max_steps" in facts:
        facts.pop("num_train_epochs", None)  # it counted for nothing
    facts["base stored as"] = card.storage
    facts["base weights (fingerprint)"] = card.base.weights if card.base else None
    facts["trained on"] = machine.get("device")
    rows = [[name, _code(_plain(value))] for name, value in facts.items() if value not in (None, "")]
    return f"## Training\n\n{_table(['', ''], rows)}"


def _use(card: Card, name: str) -> str:
    on_hub = "/" in name
    known = card.base_name is not None and is_hub_id(card.base_name)
    base = card.base_name if known else "BASE"
    fetch = f"hf download {name} --local-dir {last_part(name)}\n" if on_hub else ""
    given = "" if known or card.base_name in PACKAGED else " --base-model BASE"
    note = "" if known else f"\n\n`BASE` stands for the base model, {_code(_base(card))}."
    return f"""## Use

With veneer, which refuses a base of other weights than it was trained on:

```sh
{fetch}veneer chat {last_part(name)}{given}
```

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
{_added(card, base)}model = PeftModel.from_pretrained(model, "{name}")
```{note}"""


def _added(card: Card, base: str | None) -> str:
    """The lines of Python that add the adapter's tokens; none where it has none."""
    if not (told := card.settings.get(ADDED)):
        return ""
    texts = json.dumps([text for text, _ in told]).replace("`", "\\u0060")  # would end the block
    return (
        "from tokenizers import AddedToken\nfrom transformers import AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")\n'
        f"tokenizer.add_tokens([AddedToken(text, normalized=False) for text in {texts}])\n"
        "if len(tokenizer) > model.get_input_embeddings().num_embeddings:\n"
        "    model.resize_token_embeddings(len(tokenizer))\n"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _code(text: str) -> str:
    """As code, on one line: a name may hold whatever a file's name may hold."""
    return "`" + " ".join(str(text).replace("`", "'").split()) + "`"
