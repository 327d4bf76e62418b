"""A start that does not answer other tasks' inputs: the directions that it avoids, what it leaves of them, a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from veneer.adapter.attach import attach, methods_of
from veneer.adapter.card import Adapter
from veneer.config import LoraSettings, RunConfig
from veneer.errors import CheckpointError, ConfigError, DataError, ModelError
from veneer.model.heard import hear, linear_layers
from veneer.train import osrm, run
from veneer.train.orthogonal import basis_of, outside
from veneer.train.osrm import answered, strongest

Config = Callable[..., RunConfig]


def _moments(model: Any, tasks: list) -> dict[str, torch.Tensor]:
    """Path -> the sum over tasks of E[x xᵀ], formed."""
    found: dict[str, torch.Tensor] = {}
    for task in tasks:
        heard: dict[str, list] = {path: [] for path in linear_layers(model)}
        hear(model, {path: rows.append for path, rows in heard.items()}, None, task)
        for path, rows in heard.items():
            x_TI = torch.cat(rows).double()
            found[path] = found.get(path, 0) + x_TI.mT @ x_TI / len(x_TI)
    return found


@pytest.fixture
def tasks(examples: Any) -> list:
    """Two tasks of different sizes, in few tokens each."""
    return [examples(24, 1), examples(8, 2)]


def test_the_directions_are_the_eigenvectors_of_all_inputs(
    pico: Any, tasks: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(osrm, "SHARE", 1)  # so wide a sketch is all of C
    attach(pico, LoraSettings(r=4))
    wanted = _moments(pico, tasks)
    found = strongest(pico, tasks, dict.fromkeys(wanted, 6))
    assert found.keys() == wanted.keys()
    for path, moment_II in wanted.items():
        assert found[path].shape == (6, len(moment_II))
        torch.testing.assert_close(found[path] @ found[path].mT, torch.eye(6, dtype=torch.float64))
        s_I = torch.linalg.eigvalsh(moment_II)
        share = float((found[path] @ moment_II @ found[path].mT).trace()) / float(s_I[-6:].sum())
        assert share == pytest.approx(1, abs=1e-5)  # summed in float32
        # Room for all but the rank: what is left are the smallest eigenvectors, as in the paper.
        most = strongest(pico, tasks, {path: len(s_I) - 4})[path]
        a_RI = outside(methods_of(pico, "default")[path].a_RI.detach().double(), most)
        left = float((a_RI @ moment_II @ a_RI.mT).trace()) / float(a_RI.square().sum())
        assert left <= float(s_I[3]) * (1 + 1e-3) + osrm.ROUNDING * float(s_I[-1])


def test_the_sketch_finds_most_of_a_quarter_of_the_width(pico: Any, tasks: list) -> None:
    attach(pico, LoraSettings(r=4))
    found = strongest(pico, tasks, dict.fromkeys(linear_layers(pico), 28))
    for path, moment_II in _moments(pico, tasks).items():
        assert len(found[path]) == len(moment_II) // 4
        best = float(torch.linalg.eigvalsh(moment_II)[-len(found[path]) :].sum())
        # A random model spreads its inputs evenly, which is the hardest for a sketch.
        assert float((found[path] @ moment_II @ found[path].mT).trace()) > 0.75 * best


def test_of_random_factors_the_answer_is_one_and_of_avoided_directions_none(pico: Any, tasks: list) -> None:
    attach(pico, LoraSettings(r=4))
    methods = methods_of(pico, "default")
    shares = []
    for seed in range(30):
        for method in methods.values():
            method.a_RI.data.normal_(generator=torch.Generator().manual_seed(seed))
        shares.append(answered(pico, tasks, methods)["share"])
    assert sum(shares) / len(shares) == pytest.approx(1, abs=0.1)
    directions = strongest(pico, tasks, {path: method.a_RI.shape[1] - 4 for path, method in methods.items()})
    for path, method in methods.items():
        method.a_RI.data.copy_(outside(method.a_RI.data, basis_of(directions[path])))
    found = answered(pico, tasks, methods)
    assert found["layers"] == 14 and found["share"] < 0.5  # outside of a quarter; a random model spreads its inputs


def test_layers_a_few_at_a_time_are_the_same(pico: Any, tasks: list, monkeypatch: pytest.MonkeyPatch) -> None:
    attach(pico, LoraSettings(r=4))
    room = dict.fromkeys(linear_layers(pico), 28)
    whole = strongest(pico, tasks, room)
    monkeypatch.setattr(osrm, "ROOM", 5000)
    assert len(osrm._groups(dict.fromkeys(room, 32))) > 1
    parts = strongest(pico, tasks, room)
    assert parts.keys() == whole.keys() and all(torch.equal(parts[path], whole[path]) for path in whole)


def test_what_is_only_rounding_is_no_direction(pico: Any, examples: Any) -> None:
    attach(pico, LoraSettings(r=4))
    [one] = examples(1)
    again = strongest(pico, [[one]], {"model.layers.0.self_attn.q_proj": 28})
    assert len(again["model.layers.0.self_attn.q_proj"]) <= len(one.input_ids)


def test_inputs_that_are_not_finite_are_told(pico: Any, tasks: list) -> None:
    attach(pico, LoraSettings(r=4))
    pico.model.embed_tokens.weight.data[:] = float("nan")
    with pytest.raises(ModelError, match=r"model\.layers\.0.*: what it is fed on --orthogonal-data is not finite"):
        strongest(pico, tasks, dict.fromkeys(linear_layers(pico), 28))


# --- a run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """40 rows of another task than digits."""
    file = tmp_path / "letters.jsonl"
    rows = [(f"Letters {n:02d}", f"{'abcdefghij'[n // 10]} {'klmnopqrst'[n % 10]}") for n in range(10, 50)]
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return file


@pytest.fixture
def first(config: Config, letters: Path, tmp_path: Path) -> RunConfig:
    """A run on letters, finished, whose layers read few directions."""
    one = config(dataset=str(letters), output_dir=str(tmp_path / "first"), r=2)
    run.train(one, progress=False)
    return one


def test_a_run_starts_outside_of_the_data_too_and_resumes_to_the_same_bytes(
    config: Config, first: RunConfig, letters: Path, stopping: Any, tmp_path: Path
) -> None:
    options = {"orthogonal_to": first.output_dir, "orthogonal_data": str(letters)}
    whole, cut = (config(output_dir=str(tmp_path / name), **options) for name in ("whole", "cut"))
    result = run.train(whole, progress=False)
    stopping(cut, 7)
    run.train(cut, progress=False, resume=True)
    weights = [Path(one.output_dir, "adapter_model.safetensors").read_bytes() for one in (whole, cut)]
    assert weights[0] == weights[1]

    told = Adapter.load(whole.output_dir).card.training["orthogonal_to"]
    assert told["adapters"][0]["data"] == str(letters) and len(told["adapters"][0]["data_sha256"]) == 64
    assert told["overlap"]["at_start"] < 1e-12
    assert told["answered"]["layers"] == 14 and 0 < told["answered"]["share"] < 0.5
    assert any("rows of their data that the start did not see, A answers" in note for note in result.notes)
    without = config(output_dir=str(tmp_path / "without"), orthogonal_to=first.output_dir)
    run.train(without, progress=False)
    assert "answered" not in Adapter.load(without.output_dir).card.training["orthogonal_to"]
    assert Path(without.output_dir, "adapter_model.safetensors").read_bytes() != weights[0]


def test_layers_that_the_earlier_adapter_lacks_start_outside_too(config: Config, letters: Path, tmp_path: Path) -> None:
    narrow = config(dataset=str(letters), output_dir=str(tmp_path / "narrow"), r=2, target_modules="q_proj")
    run.train(narrow, progress=False)
    told = {}
    for name, options in (("plain", {}), ("data", {"orthogonal_data": str(letters)})):
        one = config(output_dir=str(tmp_path / name), orthogonal_to=narrow.output_dir, max_steps=1, **options)
        told[name] = run.train(one, progress=False).orthogonal_to
    assert told["plain"]["layers"] == told["data"]["layers"] == 2
    assert told["data"]["answered"]["layers"] == 14 and told["data"]["answered"]["share"] < 0.5


def test_data_is_read_as_the_earlier_adapter_read_it(config: Config, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    rows = [{"Q": f"Letters {'12 ' * 20}{n}", "Ans": f"{'a b ' * 3}{n}"} for n in range(20)]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "Q", "completion": "Ans"}
    earlier = config(dataset=str(long), output_dir=str(tmp_path / "first"), columns=columns, max_length=250, r=2)
    run.train(earlier, progress=False)
    short = config(orthogonal_to=earlier.output_dir, orthogonal_data=str(long), max_length=40, max_steps=1)
    assert run.train(short, progress=False).orthogonal_to["answered"]["layers"] == 14


def test_new_tokens_are_not_read_to_the_base(config: Config, first: RunConfig, letters: Path) -> None:
    lines = letters.read_text().splitlines()
    letters.write_text("\n".join(line.replace("Letters", "Letters <tool>") for line in lines))
    one = config(
        orthogonal_to=first.output_dir, orthogonal_data=str(letters), dataset=str(letters), add_tokens="<tool>", r=2
    )
    assert 0 < run.train(one, progress=False).orthogonal_to["answered"]["share"] < 0.5


def test_resumed_with_other_data_it_is_refused(config: Config, first: RunConfig, letters: Path, stopping: Any) -> None:
    one = config(orthogonal_to=first.output_dir, orthogonal_data=str(letters))
    stopping(one, 7)
    letters.write_text("".join(letters.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(CheckpointError, match="orthogonal_data: it has"):
        run.train(one, progress=False, resume=True)


@pytest.mark.parametrize(
    "options, fault",
    [
        ({"orthogonal_data": ["x", "y"]}, "orthogonal_data names 2 files for 1 adapters; wanted one for each"),
        ({"orthogonal_data": "x", "orthogonal_start": False}, "orthogonal_data is for the start alone"),
        ({"orthogonal_data": "x", "fsdp": True}, "fsdp where orthogonal_data is read before .*leave either out"),
    ],
)
def test_settings_that_do_not_go_together(config: Config, options: dict, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        config(**{"orthogonal_to": "a", **options})


def test_data_without_adapters_is_a_fault(config: Config) -> None:
    with pytest.raises(ConfigError, match="orthogonal_data without orthogonal_to"):
        config(orthogonal_data="x")


def test_files_that_cannot_be_used_are_told(config: Config, first: RunConfig, tmp_path: Path) -> None:
    pairs, single = tmp_path / "pairs.jsonl", tmp_path / "single.jsonl"
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    single.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    for file, fault in (
        (pairs, "preference pairs"),
        (single, "one row of 13 tokens; wanted two"),
        (tmp_path / "no.jsonl", "no.js"),
    ):
        with pytest.raises(DataError, match=fault):
            run.train(config(orthogonal_to=first.output_dir, orthogonal_data=str(file)), progress=False)
