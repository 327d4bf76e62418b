"""`veneer merge` with a data file for each adapter: methods that read rows, and the comparison on them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.conftest import DIGITS, pico_folder  # noqa: F401
from veneer.adapter.attach import attach
from veneer.adapter.card import Adapter
from veneer.adapter.take import take
from veneer.config import LoraSettings
from veneer.config.merging import data_methods
from veneer.evaluate.intervals import Score
from veneer.evaluate.merged import Compared
from veneer.evaluate.metrics import LIKELIHOOD
from veneer.evaluate.result import Result
from veneer.merge.on_base import OF_TOKENS
from veneer.model.load import load

DATA_METHODS = data_methods()
FEW = {
    "linear": ("--rank", "2", "--activation-aware"),
    "lorahub": ("--evaluations", "6"),
    "lora_soups": ("--max-steps", "4"),
}


@pytest.fixture(scope="session")
def parents(pico_folder: Path) -> tuple[Adapter, Adapter]:  # noqa: F811
    """Two adapters on the pico model, of another rank and other layers each."""
    made = []
    for seed, settings in enumerate((LoraSettings(r=2), LoraSettings(r=3, target_modules=["q_proj", "down_proj"]))):
        model = attach(load(str(pico_folder), "float32").model, settings, seed=seed)
        plain = take(model, base_name=str(pico_folder))
        draw = torch.Generator().manual_seed(seed)
        tensors = {
            name: value if name.endswith(".a") else 0.3 * torch.randn(value.shape, generator=draw)
            for name, value in plain.tensors.items()
        }
        made.append(Adapter(tensors, plain.card))
    return made[0], made[1]


def rows(seed: int, count: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    words = [[draw.choice(DIGITS) for _ in range(3)] for _ in range(count)]
    return [{"prompt": f"Write {' '.join(some)}", "completion": " ".join(some[:: 1 - 2 * seed])} for some in words]


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parents: tuple[Adapter, Adapter]) -> Path:
    """The working directory: adapters a and b, 12 rows for one and 10 for the other in a.jsonl and b.jsonl."""
    monkeypatch.chdir(tmp_path)
    for seed, (name, adapter, count) in enumerate(zip("ab", parents, (12, 10), strict=True)):
        adapter.save(tmp_path / name)
        text = "".join(json.dumps(row) + "\n" for row in rows(seed, count))
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_comparison_is_what_eval_finds(veneer: Callable[..., Any], out: Path) -> None:
    """Each score is that of `veneer eval` on the same rows, and what others have less the merge is paired."""
    answer = veneer("merge", "a", "b", "--dataset", "a.jsonl", "b.jsonl", "-o", "d", "--json")
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    for name, found in zip("ab", report["comparison"]["files"], strict=True):
        told = veneer("eval", "a", "b", "d", "--dataset", f"{name}.jsonl", "--metrics", "loss", "--json")
        wanted = json.loads(told.out)["metrics"]["loss"]
        loss = found["metrics"]["loss"]
        for ours, theirs in {"merged": "d", "base": "base", "a": "a", "b": "b"}.items():
            assert loss[ours] == wanted[theirs]
        for other in ("base", "a", "b"):
            difference = loss["differences"][other]
            assert difference["score"] == pytest.approx(loss[other]["score"] - loss["merged"]["score"])
            assert difference["low"] <= difference["score"] <= difference["high"]
        assert found["file"] == f"{name}.jsonl" and found["rows"] == {"a": 12, "b": 10}[name]


def test_rows_are_as_long_as_its_adapter_was_trained_or_as_asked(veneer: Callable[..., Any], out: Path) -> None:
    card = json.loads((out / "a" / "veneer.json").read_text())
    card["training"] = {"options": {"max_length": 24}}
    (out / "a" / "veneer.json").write_text(json.dumps(card))

    def lengths(*more: str) -> list[int]:
        folder = f"d{len(list(out.iterdir()))}"
        answer = veneer("merge", "a", "b", "--dataset", "a.jsonl", "b.jsonl", "-o", folder, "--json", *more)
        assert answer.code == 0, answer.err
        return [found["settings"]["max_length"] for found in json.loads(answer.out)["comparison"]["files"]]

    assert lengths() == [24, 1024]
    assert lengths("--max-length", "30") == [30, 30]
    made = [json.loads((out / name / "veneer.json").read_text()) for name in ("d4", "d5")]
    assert [card["training"]["options"] for card in made] == [{"max_length": 24}] * 2  # as far as it is known
    assert "max_length: 30" in (out / "d5" / "recipe.yaml").read_text()


def test_rows_at_fault_have_their_number_in_the_file_and_what_is_cut_is_told(
    veneer: Callable[..., Any], out: Path
) -> None:
    lines = (out / "a.jsonl").read_text().splitlines()
    lines[7] = json.dumps({"prompt": "Write", "completion": ""})  # among the rows that the method does not read
    (out / "a.jsonl").write_text("\n".join(lines))
    command = ("merge", "a", "b", "--dataset", "a.jsonl", "b.jsonl", "--method", "regmean", "-o", "d")
    answer = veneer(*command)
    assert answer.code != 0 and "a.jsonl" in answer.err and "8" in answer.err and not (out / "d").exists()
    del lines[7]
    (out / "a.jsonl").write_text("\n".join(lines))
    answer = veneer(*command, "--max-length", "17")
    assert answer.code == 0, answer.err
    assert "a.jsonl: 11 rows are cut at max_length 17: 35 tokens are left out" in answer.err, answer.err


@pytest.mark.parametrize("method", ["linear", "regmean"])
def test_rows_that_cannot_be_used_are_told_before_the_merge(
    veneer: Callable[..., Any], out: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("merged before all rows were looked at")

    monkeypatch.setattr("veneer.merge.from_folders.combine", never)
    with (out / "b.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Write", "completion": ""}) + "\n")
    answer = veneer("merge", "a", "b", "--dataset", "a.jsonl", "b.jsonl", "--method", method, "-o", "d")
    assert answer.code == 2 and "row 11" in answer.err, answer.err


def test_names_with_commas_one_after_the_other(veneer: Callable[..., Any], out: Path) -> None:
    for old, new in (("a", "co,a"), ("a.jsonl", "a,1.jsonl"), ("b.jsonl", "b,2.jsonl")):
        (out / old).rename(out / new)
    answer = veneer("merge", "co,a", "b", "--dataset", "a,1.jsonl", "b,2.jsonl", "-o", "d")
    assert answer.code == 0, answer.err
    again = veneer("merge", "d/recipe.yaml", "-o", "e")
    assert again.code == 0, again.err
    name = "adapter_model.safetensors"
    assert (out / "d" / name).read_bytes() == (out / "e" / name).read_bytes()
    (out / "own.yaml").write_text("adapters: [co,a]\nweights: [1]\n".replace("[co,a]", "'co,a'"))
    assert veneer("merge", "own.yaml", "-o", "f").code == 0


def test_a_list_in_json_and_another_word(veneer: Callable[..., Any], out: Path) -> None:
    answer = veneer("merge", '["a"]', "b", "-o", "d", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["adapters"] == ["a", "b"]


def test_metrics_of_tokens_are_those_of_an_evaluation() -> None:
    assert set(LIKELIHOOD) == OF_TOKENS


def test_the_best_single_adapter_is_best_over_all_files_and_named(veneer: Callable[..., Any], out: Path) -> None:
    answer = veneer("merge", "a", "b", "--dataset", "a.jsonl,b.jsonl", "-o", "d", "--json")
    found = json.loads(answer.out)["comparison"]
    means = found["means"]["loss"]
    for model in ("base", "a", "b", "merged"):
        scores = [one["metrics"]["loss"][model]["score"] for one in found["files"]]
        assert means[model] == pytest.approx(sum(scores) / 2)
    assert found["best_single_adapter"] == {"adapter": min("ab", key=means.__getitem__), "by": "loss"}
    assert f"its own adapter {found['best_single_adapter']['adapter']}, the best single one" in answer.err
    assert answer.err.count("merged is ") == 2 and "less merged" in answer.err


def test_a_parent_that_is_surely_better_on_its_own_file_is_named() -> None:
    def result(metric: str, low: float | None, high: float | None) -> Result:
        """Of a file: its parent's score less the merge's."""
        middle = 0.0 if low is None or high is None else (low + high) / 2
        return Result({metric: {}}, {metric: {label: Score(middle, low, high, 9) for label in "abcd"}}, (), 9, {})

    def worse(metric: str) -> list[str]:
        ends = ((-0.4, -0.2), (-0.3, 0.1), (0.2, 0.4), (None, None))
        return Compared(tuple("abcd"), (), (), tuple(result(metric, *each) for each in ends), "a").worse_than_own()

    assert worse("loss") == ["a"]
    assert worse("exact_match") == ["c"]


def test_a_merge_worse_than_a_parent_is_told_what_keeps_more(
    veneer: Callable[..., Any], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where something was taken away, which is meant to be worse, nor where weights were learned."""

    def advised(name: str, *options: str) -> bool:
        answer = veneer("merge", "a", "b", "--dataset", "a.jsonl", "b.jsonl", "-o", name, *options)
        assert answer.code == 0, answer.err
        return "next: --method lora_soups" in answer.err

    found: list[str] = []
    monkeypatch.setattr(Compared, "worse_than_own", lambda _: found)
    assert not advised("good")
    found.append("b")
    assert advised("plain") and advised("given", "--weights", "0,1")
    assert advised("cut", "--activation-aware", "--rank", "1")
    assert advised("found", "--method", "lorahub", "--evaluations", "1")
    assert not advised("learned", "--method", "lora_soups", "--max-steps", "1")
    assert not advised("away", "--weights=1,-1")


def test_files_beside_the_adapter_and_the_same_bytes_again(veneer: Callable[..., Any], out: Path) -> None:
    words = ("--dataset", "a.jsonl", "b.jsonl", "--limit", "6", "--metrics", "loss,token_accuracy")
    assert veneer("merge", "a", "b", *words, "-o", "d").code == 0
    made = files(out / "d")
    assert json.loads(made["comparison.json"])["files"][1]["rows"] == 6
    assert b"| loss | merged |" in made["comparison.md"] and b"| token_accuracy | a |" in made["comparison.md"]
    answer = veneer("merge", "d/recipe.yaml", "-o", "e")
    assert answer.code == 0, answer.err
    assert files(out / "e") == made


def test_the_recipe_moves_with_base_parents_and_data(
    veneer: Callable[..., Any],
    out: Path,
    pico_folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(pico_folder, out / "base")
    words = ("--dataset", "a.jsonl", "b.jsonl", "--base-model", "./base")
    assert veneer("merge", "a", "b", *words, "-o", "sub/d").code == 0
    out.joinpath("elsewhere").mkdir()
    for name in ("a", "b", "base", "sub", "a.jsonl", "b.jsonl"):
        shutil.move(out / name, out / "elsewhere" / name)
    answer = veneer("merge", "elsewhere/sub/d/recipe.yaml", "-o", "e")
    assert answer.code == 0, answer.err
    made, again = files(out / "elsewhere" / "sub" / "d"), files(out / "e")
    assert {name for name in made if made[name] != again[name]} == {"recipe.yaml"}  # folders from another place


def test_another_file_than_the_recipe_was_written_for(veneer: Callable[..., Any], out: Path) -> None:
    assert veneer("merge", "a", "b", "--dataset", "a.jsonl", "b.jsonl", "-o", "d").code == 0
    for name in "ab":
        (out / f"{name}.jsonl").write_text(json.dumps(rows(0, 1)[0]) + "\n")
    answer = veneer("merge", "d/recipe.yaml", "-o", "e")
    assert answer.code == 2 and not (out / "e").exists()
    assert answer.err.count("holds other data than the recipe was written for") == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--dataset", "a.jsonl"), "got 1 for 2 adapters"),
        (("--limit", "3"), "--limit: with --dataset only"),
        (("--rank", "2", "--activation-aware"), "--activation-aware reads data: give --dataset"),
        (("--activation-aware", "--dataset", "a.jsonl", "b.jsonl"), "give that"),
        (("--dataset", "a.jsonl", "no.jsonl"), "no.jsonl"),
        (("--dataset", "a.jsonl", "b.jsonl", "--metrics", "losss"), "did you mean loss"),
        (("--dataset", "a.jsonl", "b.jsonl", "--into-base"), "leave out beside --into-base"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(
    veneer: Callable[..., Any], out: Path, words: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.merge.on_base.load", lambda *_, **__: pytest.fail("loaded"))
    answer = veneer("merge", "a", "b", *words, "-o", "d")
    assert (answer.code, answer.out) == (2, "") and not (out / "d").exists()
    assert told in answer.err


@pytest.mark.parametrize("method", ["linear", *DATA_METHODS])
def test_a_method_that_reads_data_makes_the_same_bytes_again_in_any_order(
    veneer: Callable[..., Any], out: Path, method: str
) -> None:
    few = FEW.get(method, ())
    words = ("--method", method, *few, "--dataset", "a.jsonl", "b.jsonl", "-o", "d", "--json")
    answer = veneer("merge", "a", "b", "--weights", "0.7,0.3", *words)
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    assert report["learned"] and Adapter.load(out / "d").card.training["learned"] == report["learned"]
    assert [one["rows"] for one in report["comparison"]["files"]] == [6, 5]
    reader = "activation_aware" if method == "linear" else method
    assert f"note: {reader} has read 11 rows, every other one; compared on the other 11 alone" in answer.err
    assert veneer("merge", "d/recipe.yaml", "-o", "e").code == 0
    assert files(out / "e") == files(out / "d")
    turned = ("--method", method, *few, "--dataset", "b.jsonl", "a.jsonl", "-o", "f")
    assert veneer("merge", "b", "a", "--weights", "0.3,0.7", *turned).code == 0
    assert Adapter.load(out / "f").identity == Adapter.load(out / "d").identity


@pytest.mark.parametrize("method", DATA_METHODS)
def test_a_method_that_reads_data_asks_for_it(veneer: Callable[..., Any], out: Path, method: str) -> None:
    answer = veneer("merge", "a", "b", "--method", method, "-o", "d")
    assert answer.code == 2 and f"{method} reads data: give --dataset, a file for each adapter" in answer.err
    for name in "ab":
        (out / f"{name}.jsonl").write_text(json.dumps(rows(0, 1)[0]) + "\n")
    answer = veneer("merge", "a", "b", "--method", method, "--dataset", "a.jsonl", "b.jsonl", "-o", "d")
    assert answer.code == 2 and answer.err.count("wanted two rows at least: one to read, one to judge by") == 2
