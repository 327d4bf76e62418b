"""TRL's SFTTrainer trains an attached model: no peft_config, the adapter is on already; the callback keeps it.

python examples/trl_sft.py --base-model smollm2 --dataset train.jsonl --max-steps 20
"""

import argparse
import json

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import veneer
from veneer.adapter.callback import AdapterCallback
from veneer.data.chat import conversation
from veneer.data.files import read_rows

parser = argparse.ArgumentParser(description=__doc__)
for name, default in {"base-model": "smollm2", "dataset": "train.jsonl", "output-dir": "out/trl"}.items():
    parser.add_argument(f"--{name}", default=default)
parser.add_argument("--max-steps", type=int, default=20)
given = parser.parse_args()

model, tokenizer = veneer.load(given.base_model, dtype="float32")
veneer.attach(model, veneer.Lora(r=16))
turns = [conversation(row, f"row {n}").messages for n, row in enumerate(read_rows(given.dataset), start=1)]
rows = Dataset.from_list([{"prompt": list(t[:-1]), "completion": [t[-1]]} for t in turns])
settings = SFTConfig(given.output_dir, max_steps=given.max_steps, learning_rate=2e-3, report_to="none", bf16=False)
callback = AdapterCallback(base_name=given.base_model)
SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer, callbacks=[callback]).train()

again, _ = veneer.load(given.base_model, dtype="float32")
veneer.attach(again, veneer.Adapter.load(f"{given.output_dir}/adapter"))
with torch.no_grad():
    ids = torch.tensor([tokenizer("one two three")["input_ids"]])
    difference = (model.eval()(ids).logits - again(ids).logits).abs().max().item()
print(json.dumps({"adapter": f"{given.output_dir}/adapter", "logits_difference": difference}))
