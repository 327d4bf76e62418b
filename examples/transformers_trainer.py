"""transformers.Trainer trains an attached model; the callback keeps the adapter.

python examples/transformers_trainer.py --base-model smollm2 --dataset train.jsonl --max-steps 20
"""

import argparse
import json

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import veneer
from veneer.adapter.callback import AdapterCallback
from veneer.data.chat import Template, encode_rows
from veneer.data.files import read_rows

parser = argparse.ArgumentParser(description=__doc__)
for name, default in {"base-model": "smollm2", "dataset": "train.jsonl", "output-dir": "out/trainer"}.items():
    parser.add_argument(f"--{name}", default=default)
parser.add_argument("--max-steps", type=int, default=20)
given = parser.parse_args()

model, tokenizer = veneer.load(given.base_model, dtype="float32")
veneer.attach(model, veneer.Lora(r=16))
examples = encode_rows(read_rows(given.dataset), Template(tokenizer), 512, given.dataset).examples
labels = [[t if trained else -100 for t, trained in zip(e.input_ids, e.targets, strict=True)] for e in examples]
rows = [{"input_ids": list(e.input_ids), "labels": wanted} for e, wanted in zip(examples, labels, strict=True)]
settings = TrainingArguments(given.output_dir, max_steps=given.max_steps, learning_rate=2e-3, report_to="none")
callback = AdapterCallback(base_name=given.base_model)
Trainer(model, settings, DataCollatorForSeq2Seq(tokenizer), rows, callbacks=[callback]).train()

again, _ = veneer.load(given.base_model, dtype="float32")
veneer.attach(again, veneer.Adapter.load(f"{given.output_dir}/adapter"))
with torch.no_grad():
    ids = torch.tensor([rows[0]["input_ids"]])
    difference = (model.eval()(ids).logits - again(ids).logits).abs().max().item()
print(json.dumps({"adapter": f"{given.output_dir}/adapter", "logits_difference": difference}))
