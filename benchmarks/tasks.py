"""Four kinds of work on two CPU cores, as a user would do them: `python -m benchmarks.tasks [--tasks sst2,geoquery]`.

Each task is two commands, `veneer train` on SmolLM2-135M-Instruct and `veneer eval` of base and adapter on rows that
training never saw, with the defaults but for what TASKS names. Scores carry their intervals, and the paired difference
to the base. The model has 135M parameters, whose weights were stored in 4 bits once.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import record

DATA = record.ROOT / os.environ.get("VENEER_DATA", "../shared/data")
HELD_OUT = 40  # the last rows of a data set that comes without a test file
TASKS: dict[str, dict[str, Any]] = {
    "dialogsum": {
        "files": ("summarization/dialogsum_train.jsonl", "summarization/dialogsum_test.jsonl"),
        "prompt": "Summarize the dialogue in one or two sentences.",
        "train": {"num_train_epochs": 1},
        "eval": {"metrics": "loss,rouge1,rouge_l", "limit": 100, "max_new_tokens": 64},
    },
    "sst2": {
        "files": ("sentiment/sst2_train.jsonl", "sentiment/sst2_test.jsonl"),
        "prompt": "Is the sentence positive or negative? Answer with one word.",
        "train": {"limit": 1000, "num_train_epochs": 2},
        "eval": {"metrics": "loss,exact_match", "max_new_tokens": 8},
    },
    "toolcall": {
        "files": ("toolcall/conversations.jsonl", None),
        "train": {"num_train_epochs": 1},
        "eval": {"metrics": "loss,token_accuracy"},
    },
    "geoquery": {
        "files": ("sql/geoquery_train.jsonl", "sql/geoquery_test.jsonl"),
        "prompt": "Translate the question into SQL.",
        "train": {"num_train_epochs": 2.5},
        "eval": {"metrics": "loss,exact_match,benchmarks/same_rows.py:same_rows", "max_new_tokens": 160},
    },
}


def main() -> None:
    """Runs the tasks and writes benchmarks/results/tasks.json after each; other tasks' figures stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    if not DATA.is_dir():
        sys.exit(f"no data at {DATA}; set VENEER_DATA to the folder that holds {TASKS['sst2']['files'][0]}")
    path = record.RESULTS / "tasks.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["tasks"] if path.exists() else {}
    for name in parser.parse_args().tasks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = one(TASKS[name], Path(folder))
        record.save("tasks", {"base_model": "smollm2", "tasks": rows})
        print(json.dumps({name: rows[name]["metrics"]}), file=sys.stderr, flush=True)


def one(task: dict[str, Any], where: Path) -> dict[str, Any]:
    """Trains and evaluates; seconds of training as the run counts them, of its whole process by clock and CPU, and what
    the host of a virtual machine gave to others meanwhile, over all cores."""
    train, test = files(task["files"], where)
    shared = {"system_prompt": task["prompt"]} if "prompt" in task else {}
    begun, before, stolen = time.perf_counter(), _cpu_seconds(), _stolen_seconds()
    trained = _veneer("train", base_model="smollm2", dataset=train, output_dir=where / "out", **task["train"], **shared)
    seconds = {"train": trained["train_seconds"], "process": time.perf_counter() - begun}
    seconds["process_cpu"] = _cpu_seconds() - before
    seconds["stolen"] = _stolen_seconds() - stolen
    found = _veneer("eval", adapter=where / "out", dataset=test, **task["eval"])
    return {
        "options": task["train"] | task["eval"] | shared,
        "steps": trained["steps"],
        "tokens": trained["tokens"],
        "seconds": seconds,
        "metrics": found["metrics"],
    }


def files(names: tuple[str, str | None], where: Path) -> tuple[Path, Path]:
    """Training and test file; of a data set that comes in one file, the last rows are the test."""
    train, test = names
    if test is not None:
        return DATA / train, DATA / test
    lines = [json.dumps(spelled(json.loads(line))) for line in (DATA / train).read_text(encoding="utf-8").splitlines()]
    made = where / "train.jsonl", where / "test.jsonl"
    for path, part in zip(made, (lines[:-HELD_OUT], lines[-HELD_OUT:]), strict=True):
        path.write_text("\n".join(part), encoding="utf-8")
    return made


def spelled(row: dict[str, Any]) -> dict[str, Any]:
    """Tools, calls and their results as text: SmolLM2's chat template leaves them out, which `veneer train` refuses."""
    said = [(turn["role"], turn["content"]) for turn in row["messages"]]
    forms = {
        "tool_call": ("assistant", "<tool_call>{}</tool_call>"),
        "tool": ("user", "<tool_response>{}</tool_response>"),
    }
    turns = []
    for role, text in said:
        role, form = forms.get(role, (role, "{}"))
        turns.append({"role": role, "content": form.format(text)})
    if json.loads(row["tools"]):
        told = f"Answer with <tool_call> and JSON to call one of these functions: {row['tools']}"
        turns = [{"role": "system", "content": told}, *(turn for turn in turns if turn["role"] != "system")]
    return {"messages": turns}


def _veneer(verb: str, **options: Any) -> dict[str, Any]:
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "veneer.cli", verb, *words, "--json"]
    done = subprocess.run(command, cwd=record.ROOT, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _stolen_seconds() -> float:
    stat = Path("/proc/stat")
    return int(stat.read_text().split()[8]) / os.sysconf("SC_CLK_TCK") if stat.exists() else 0.0


if __name__ == "__main__":
    main()
