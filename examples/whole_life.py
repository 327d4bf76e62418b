"""The whole life of one adapter from Python: train, prove, use, merge.

python examples/whole_life.py --base-model smollm2 --dataset train.jsonl --max-steps 40
"""

import argparse
import json

import veneer
from veneer.data.chat import Template, conversation
from veneer.data.files import read_rows
from veneer.evaluate.run import evaluate
from veneer.merge.into_base import merge_into_base
from veneer.train.run import train


def main(base_model: str, dataset: str, output_dir: str, max_steps: int) -> dict:
    """Trains, evaluates, generates, merges; returns the facts."""
    adapter_dir, merged_dir = f"{output_dir}/adapter", f"{output_dir}/merged"
    config = veneer.RunConfig.from_flat(
        {"base_model": base_model, "dataset": dataset, "output_dir": adapter_dir, "max_steps": max_steps, "r": 8}
    )
    result = train(config)

    loaded = veneer.load(base_model)
    veneer.attach(loaded.model, veneer.Adapter.load(adapter_dir))
    rows = read_rows(dataset)[-20:]  # in earnest: rows of another file, that training never saw
    proof = evaluate(loaded, rows, metrics=["loss", "exact_match"], max_new_tokens=32)

    prompt = Template(loaded.tokenizer).prompt_ids(conversation(rows[0], "row 1"))
    says = {"base": None, "adapter": "default"}
    texts = {who: veneer.generate(loaded.model, loaded.tokenizer, [prompt], slot, 32)[0] for who, slot in says.items()}

    report = merge_into_base(adapter_dir, base_model, merged_dir)
    merged = veneer.load(merged_dir)
    texts["merged"] = veneer.generate(merged.model, merged.tokenizer, [prompt], max_new_tokens=32)[0]
    return {
        "final_loss": result.final_loss,
        "metrics": proof.to_json(examples=False)["metrics"],
        "texts": texts,
        "merge": report.to_json(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"base-model": "smollm2", "dataset": "train.jsonl", "output-dir": "out/life"}.items():
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--max-steps", type=int, default=40)
    print(json.dumps(main(**vars(parser.parse_args())), indent=2))
