"""From data sets to examples: what is trained on and kept back, over layouts and over several data sets."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.config import RunConfig
from veneer.data.examples import Example
from veneer.errors import CheckpointError, DataError
from veneer.model.load import load_tokenizer
from veneer.train import checkpoint, run
from veneer.train.rows import TrainingData, read_data

Config = Callable[..., RunConfig]
WORDS = "zero one two three four five six seven eight nine".split()


@pytest.fixture(scope="module")
def tokenizer(pico_folder: Path) -> Any:
    return load_tokenizer(str(pico_folder))


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., str]:
    def write(name: str, rows: list[dict[str, Any]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def texts(n: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"{WORDS[k % 10]} {WORDS[k // 10 % 10]} " * 6} for k in range(first, first + n)]


def pairs(n: int, prompt: str = "Write") -> list[dict[str, Any]]:
    return [{"prompt": f"{prompt} {k}", "completion": WORDS[k % 10]} for k in range(n)]


def trained(data: TrainingData) -> Counter[Example]:
    return Counter(data.train)


def test_a_text_is_trained_on_chunk_by_chunk(config: Config, file: Any) -> None:
    one = config(dataset=file("text.jsonl", texts(20)), validation_split=0.2, max_length=32, max_steps=8)
    result = run.train(one, progress=False)
    assert result.final_loss < result.eval_loss_before
    told = "; ".join(result.notes)
    assert "20 documents" in told and "chunks of up to 32 tokens" in told
    assert "documents are kept whole: 16 of them" in told and "4, " in told


def test_documents_do_not_leave_their_side(config: Config, file: Any, tokenizer: Any) -> None:
    found = read_data(config(dataset=file("text.jsonl", texts(30)), validation_split=0.3, max_length=16), tokenizer)
    end = tokenizer.eos_token_id
    sides = []
    for side in (found.train, found.validation):
        joined = [side[0].input_ids[0], *(token for one in side for token in one.input_ids[1:])]
        sides.append(tokenizer.decode(joined).split(tokenizer.eos_token)[:-1])
        assert joined[-1] == end
    assert sorted(sides[0] + sides[1]) == sorted(row["text"] for row in texts(30))
    assert len(sides[1]) == 9 and not set(sides[0]) & set(sides[1])


def test_equal_rows_stay_together_over_data_sets_and_layouts(config: Config, file: Any, tokenizer: Any) -> None:
    files = [file("a.jsonl", pairs(20)), file("b.jsonl", pairs(30)), file("c.jsonl", texts(10) + texts(10))]
    found = read_data(config(dataset=files, validation_split=0.3, max_length=400), tokenizer)
    prompts = [{one.prompt for one in side if len(one.prompt) > 1} for side in (found.train, found.validation)]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]
    assert len(found.sha256) == 3 and len(set(found.sha256)) == 3


def test_shares_and_limits(config: Config, file: Any, tokenizer: Any) -> None:
    files = [file("a.jsonl", pairs(40, "Say")), file("b.jsonl", pairs(40, "Write"))]
    options = {"dataset": files, "validation_split": 0, "eval_steps": None, "limit": "40,5"}
    found = read_data(config(**options, dataset_weights="3,1"), tokenizer)
    counts = trained(found)
    of_second = [one for one in counts if "Write" in tokenizer.decode(one.input_ids)]
    assert len(counts) == 45 and len(of_second) == 5
    assert sum(counts[one] for one in of_second) == 13 and len(found.train) == 53
    assert f"{files[1]}: 5 rows to train on, 25.0% of an epoch, each 2.6 times" in found.notes
    plain = read_data(config(**options), tokenizer)
    assert len(plain.train) == 45 == len(trained(plain))
    assert f"{files[0]}: 40 rows to train on, 88.9% of an epoch, each 1 times" in plain.notes


def test_a_mixture_resumes_to_the_same_bytes(config: Config, file: Any, tmp_path: Path) -> None:
    files = [file("a.jsonl", pairs(20)), file("text.jsonl", texts(6))]
    options = {"dataset": files, "dataset_weights": "1,2", "max_length": 40, "max_steps": 6, "eval_steps": 3}

    def bytes_of(name: str) -> bytes:
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    run.train(config(**options, output_dir=str(tmp_path / "whole")), progress=False)
    cut = config(**options, output_dir=str(tmp_path / "cut"))
    run.train(cut, progress=False)
    kept = sorted((tmp_path / "cut" / "checkpoints").iterdir())
    assert len(kept) == 2 and checkpoint.latest(tmp_path / "cut") == kept[1]
    shutil.rmtree(kept[1])  # as if killed after step 3
    other = config(**{**options, "dataset_weights": "1,3"}, output_dir=cut.output_dir)
    with pytest.raises(CheckpointError, match="dataset_weights"):
        run.train(other, resume=True, progress=False)
    run.train(cut, resume=True, progress=False)
    assert bytes_of("cut") == bytes_of("whole")


def test_columns_of_other_names(config: Config, tmp_path: Path, tokenizer: Any, digits: Path) -> None:
    rows = [json.loads(line) for line in digits.read_text().splitlines()]
    odd = tmp_path / "odd.csv"
    odd.write_text("Q,A\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
    found = read_data(config(dataset=str(odd), columns="prompt=Q,completion=A"), tokenizer)
    assert found.train == read_data(config(), tokenizer).train


def test_preference_pairs_ask_for_their_loss(config: Config, file: Any, tokenizer: Any) -> None:
    path = file("pairs.jsonl", [{"prompt": f"Write {n}", "chosen": "one", "rejected": "two"} for n in range(30)])
    with pytest.raises(DataError, match=r"they need a preference loss, --loss dpo\. To train on the chosen"):
        read_data(config(dataset=path), tokenizer)
    assert len(read_data(config(dataset=path, columns="completion=chosen", eval_dataset=path), tokenizer).train) == 30


def test_what_of_the_validation_file_is_trained_on_is_said(config: Config, file: Any, tokenizer: Any) -> None:
    path = file("held.jsonl", pairs(3) + pairs(2, "Tell"))
    found = read_data(config(dataset=file("a.jsonl", pairs(10)), eval_dataset=path), tokenizer)
    assert "3 of 5 validation rows have a prompt that is trained on too" in found.notes
    assert isinstance(found.eval_sha256, str)


def test_a_data_set_that_is_all_kept_back_is_refused(config: Config, file: Any, tokenizer: Any) -> None:
    files = [file(f"{n}.jsonl", [{"prompt": f"Write {n}", "completion": "one"}]) for n in range(4)]
    with pytest.raises(DataError, match=r"\d\.jsonl nothing is left to train on"):
        read_data(config(dataset=files, validation_split=2), tokenizer)
