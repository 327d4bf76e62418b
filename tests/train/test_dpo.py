"""DPO: its loss is that of the formula over transformers' own forward, and training prefers what was chosen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from veneer.adapter.attach import attach, methods_of
from veneer.adapter.card import Adapter
from veneer.config import LoraSettings, RunConfig, TrainSettings
from veneer.data.examples import Example, ExamplePair
from veneer.errors import DataError
from veneer.model.layers import arrange
from veneer.model.load import load
from veneer.train import run
from veneer.train.feed import Feed
from veneer.train.job import Job
from veneer.train.objective import Objective
from veneer.train.passes import Passes


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits to be written in words, and not in words of another number."""
    words = "zero one two three four five six seven eight nine".split()
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": f"Write {n}{m}", "chosen": f"{words[n]} {words[m]}", "rejected": f"{words[m]} nine"}
        for n in range(10)
        for m in range(8)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def units(count: int = 5) -> list[ExamplePair]:
    """Pairs that share their prompts."""
    generator = torch.Generator().manual_seed(0)

    def example(prompt: list[int], row: int) -> Example:
        answer = torch.randint(3, 90, (2 + row,), generator=generator).tolist()
        return Example((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer), row, 0)

    prompts = [torch.randint(3, 90, (4,), generator=generator).tolist() for _ in range(count)]
    return [ExamplePair(example(prompt, row), example(prompt, row)) for row, prompt in enumerate(prompts)]


def log_p(model: torch.nn.Module, example: Example) -> torch.Tensor:
    """Of the answer, in the model's own forward of this row alone."""
    ids = torch.tensor([example.input_ids])
    logits = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    told = logits[range(len(ids[0]) - 1), ids[0, 1:]]
    return told[torch.tensor(example.targets[1:])].sum()


@pytest.mark.parametrize("recompute", [0, -1])
def test_loss_and_gradient_are_the_formulas(pico, recompute):
    attach(pico, LoraSettings(r=4, lora_dropout=0.0), "default", seed=0)
    methods = methods_of(pico, "default")
    for method in methods.values():
        method.b_OR.data.normal_(std=0.1)
    rows, settings = units(), TrainSettings(loss="dpo", beta=0.3, max_steps=1, per_device_train_batch_size=5)
    job = Job("default", settings, rows, (), 1e-3, methods)
    arrange(pico, recompute=recompute)
    found = Feed(Passes(pico)).computed([job])[0, 0]
    gradient = job.flat.grads_P.clone()

    job.flat.clear()
    arrange(pico)
    from veneer.model.packed import speaking

    with torch.no_grad(), speaking(pico, None):
        reference = [[log_p(pico, one) for one in pair.sequences] for pair in rows]
    gains = [[log_p(pico, one) for one in pair.sequences] for pair in rows]
    margins = [(c - rc) - (r - rr) for (c, r), (rc, rr) in zip(gains, reference, strict=True)]
    wanted = -torch.nn.functional.logsigmoid(0.3 * torch.stack(margins)).mean()
    wanted.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(gradient, job.flat.grads_P, rtol=1e-4, atol=1e-6)

    total, terms, right = Objective(settings).judged(pico, rows, "default", 64).tolist()
    assert (total / terms, terms) == (pytest.approx(wanted.item(), rel=1e-5), 5)
    assert right == sum(margin > 0 for margin in margins)


def test_an_adapter_at_its_start_is_undecided(pico):
    attach(pico, LoraSettings(r=4), "default", seed=0)
    judged = Objective(TrainSettings(loss="dpo")).judged(pico, units(), "default", 4096).tolist()
    assert judged == [pytest.approx(5 * math.log(2), rel=1e-6), 5, 0]


def test_a_process_without_rows_trains_nothing(pico):
    attach(pico, LoraSettings(r=4), "default", seed=0)
    objective = Objective(TrainSettings(loss="dpo"))
    assert objective.judged(pico, [objective.nothing], "default", 4096).tolist() == [0, 0, 0]


Config = Callable[..., RunConfig]


def test_training_prefers_the_chosen(config: Config, pairs: Path, tmp_path: Path) -> None:
    options = {"dataset": str(pairs), "loss": "dpo", "validation_split": 0.2, "max_steps": 24}
    options |= {"learning_rate": 2e-2, "beta": 2}
    one = config(**options)
    result = run.train(one, progress=False)
    lines = [json.loads(line) for line in Path(one.output_dir, "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if line["split"] == "eval"]
    assert validated[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and validated[0]["accuracy"] == 0
    assert validated[-1]["accuracy"] > 0.8 and result.best_eval_loss < 0.5
    assert Adapter.load(one.output_dir).card.training["options"]["loss"] == "dpo"


def test_the_wrong_kind_of_rows_is_refused(config: Config, pairs: Path) -> None:
    with pytest.raises(DataError, match=r"holds preference pairs.*--loss dpo"):
        run.train(config(dataset=str(pairs)), progress=False)
    with pytest.raises(DataError, match="no preference pairs: --loss dpo needs columns `chosen` and `rejected`"):
        run.train(config(loss="dpo"), progress=False)


def test_a_loaded_base_is_the_reference(config: Config, pico_folder: Path, pairs: Path) -> None:
    """The base's own probabilities, not those of another adapter on it."""
    loaded = load(str(pico_folder), "float32")
    attach(loaded.model, LoraSettings(r=2), "other", seed=5)
    for method in methods_of(loaded.model, "other").values():
        method.b_OR.data.normal_()
    rows = units(2)
    attach(loaded.model, LoraSettings(r=4), "default", seed=0)
    judged = Objective(TrainSettings(loss="dpo")).judged(loaded.model, rows, "default", 4096).tolist()
    assert judged[0] == pytest.approx(2 * math.log(2), rel=1e-6)
