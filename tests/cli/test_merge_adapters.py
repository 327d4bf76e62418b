"""`veneer merge` of adapters: folders in, one folder with its recipe out; what is refused, and what is said."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.merge.test_combine import BASE, adapter, update
from veneer.adapter.card import Adapter
from veneer.config.merging import SETTINGS
from veneer.errors import ConfigError
from veneer.merge.apply import combine
from veneer.merge.recipe import Recipe
from veneer.merge.table import MERGES


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with adapters a, b and c in it."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        adapter(seed).save(tmp_path / name)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_analogy(veneer: Any, out: Path) -> None:
    answer = veneer("merge", "a", "b", "c", "--weights", "1,-1,1", "--output", "d", "--json")
    assert answer.code == 0, answer.err
    report = json.loads(answer.out)
    a, b, c, d = (Adapter.load(out / name) for name in "abcd")
    for module in a.modules():
        wanted = update(a, module) - update(b, module) + update(c, module)
        torch.testing.assert_close(update(d, module), wanted, rtol=0, atol=1e-5)
    assert report["adapters"] == ["a", "b", "c"] and report["output"] == "d"
    assert report["parents"] == [a.identity, b.identity, c.identity] == list(d.card.parents)
    assert report["kept"] == pytest.approx(1) and report["layers"].keys() == set(a.modules())
    assert d.card.base == BASE
    assert "up_proj" in answer.err and d.identity not in answer.err


@pytest.mark.parametrize("words", [("--weights", "0.5", "-0.5"), ("--weights=0.5,-0.5",), ("--weights", "0.5,-0.5")])
def test_spellings_of_weights(veneer: Any, out: Path, words: tuple[str, ...]) -> None:
    answer = veneer("merge", "a", "b", *words, "-o", "d", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["recipe"]["weights"] == [0.5, -0.5]


@pytest.mark.parametrize("method", [name for name in MERGES if not SETTINGS[name].reads_data])
def test_each_method_and_its_recipe_makes_the_same_bytes_again(veneer: Any, out: Path, method: str) -> None:
    own = {"density": "0.7", "seed": "3", "rank": "3", "common": "0.5", "inner": "dare_ties"}
    words = [w for name in SETTINGS[method].model_fields if name in own for w in (f"--{name}", own[name])]
    answer = veneer("merge", "a", "b", "--weights", "0.7,0.3", "--method", method, *words, "-o", "d")
    assert answer.code == 0, answer.err
    assert veneer("merge", "d/recipe.yaml", "--output", "e").code == 0
    assert files(out / "e") == files(out / "d")
    assert "recipe.yaml" in files(out / "d") and "adapter_config.json" in files(out / "d")


def test_a_recipe_moves_along_with_its_parents(veneer: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert veneer("merge", "a", "b", "-o", "sub/d").code == 0
    shutil.copytree(out, out / "moved", ignore=shutil.ignore_patterns("moved"))
    for name in ("a", "b"):
        shutil.rmtree(out / name)
    monkeypatch.chdir(out / "sub")
    answer = veneer("merge", "../moved/sub/d/recipe.yaml", "-o", "e")
    assert answer.code == 0, answer.err
    assert files(out / "sub" / "e").keys() == files(out / "sub" / "d").keys()
    assert Adapter.load(out / "sub" / "e").identity == Adapter.load(out / "sub" / "d").identity


def test_a_parent_that_changed_is_an_error(veneer: Any, out: Path) -> None:
    assert veneer("merge", "a", "b", "c", "-o", "d").code == 0
    before = [Adapter.load(out / name).identity for name in "ab"]
    adapter(7).save(out / "a")
    adapter(8).save(out / "b")
    answer = veneer("merge", "d/recipe.yaml", "-o", "e")
    assert answer.code == 2 and not (out / "e").exists()
    assert all(f"wanted {identity}" in answer.err for identity in before)
    assert all(Adapter.load(out / name).identity in answer.err for name in "ab")
    assert "a@sha256" not in answer.err and "leave @sha256:... out" in answer.err


def test_a_recipe_by_hand(veneer: Any, out: Path) -> None:
    (out / "recipes").mkdir()
    text = "method: ties\nadapters: [../a, ../b]\nweights: [1, -0.5]\ndensity: 0.4\nr: 3\noutput: made\n"
    (out / "recipes" / "r.yaml").write_text(text)
    assert veneer("merge", "recipes/r.yaml").code == 0
    wanted, _ = combine([adapter(0), adapter(1)], Recipe("ties", (1, -0.5), {"density": 0.4, "rank": 3}))
    assert Adapter.load(out / "recipes" / "made").identity == wanted.identity
    answer = veneer("merge", "recipes/r.yaml", "--density", "0.9", "-o", "other", "--json")  # the command line wins
    assert json.loads(answer.out)["recipe"]["options"]["density"] == 0.9


def test_mergekit_keys_are_answered_with_advice(veneer: Any, out: Path) -> None:
    (out / "m.yaml").write_text("merge_method: ties\nmodels: [{model: a}]\nparameters: {density: 0.5}\n")
    answer = veneer("merge", "m.yaml", "-o", "d")
    assert answer.code == 2
    assert "--merge-method: write --method" in answer.err and "--models: write --adapters" in answer.err
    assert "--parameters: write each option at the top level" in answer.err


def test_equal_weights_are_said(veneer: Any, out: Path) -> None:
    answer = veneer("merge", "a", "b", "c", "-o", "d", "--json")
    assert "weights: none given, so 0.3333 for each of 3 adapters" in answer.err
    assert json.loads(answer.out)["recipe"]["weights"] == [1 / 3] * 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--density", "0.5"), "--density is no option of linear; of magnitude, ties"),
        (("--method", "cat", "--rank", "4"), "--rank is no option of cat; of all but cat"),
        (("--method", "ties", "--density", "1.5"), "--density: got 1.5"),
        (("--method", "tie"), "wanted ties"),
        (("--denstiy", "0.5"), "did you mean --density"),
        (("--weights", "1,2,3"), "got 3 for 2 adapters"),
        (("--weights", "1,x"), "got x"),
        (("--weights", "1,nan"), "got nan"),
        (("--rank", "0"), "--rank: got 0"),
        (("--energy", "0"), "--energy: got 0"),
        (("--base-model", "smollm2"), "for --into-base or with --dataset only"),
        (("--into-base",), "one adapter"),
    ],
)
def test_settings_that_cannot_be(veneer: Any, out: Path, words: tuple[str, ...], told: str) -> None:
    answer = veneer("merge", "a", "b", *words, "-o", "d")
    assert (answer.code, answer.out) == (2, "") and not (out / "d").exists()
    assert told in answer.err


def test_one_adapter_takes_a_method_or_a_weight(veneer: Any, out: Path) -> None:
    answer = veneer("merge", "a", "-o", "d")
    assert answer.code == 2 and "veneer convert" in answer.err and "--into-base" in answer.err
    assert veneer("merge", "a", "--weights", "2", "-o", "d").code == 0
    a, d = Adapter.load(out / "a"), Adapter.load(out / "d")
    torch.testing.assert_close(update(d, a.modules()[0]), 2 * update(a, a.modules()[0]), rtol=0, atol=1e-5)
    assert veneer("merge", "a", "--into-base", "--weights", "2", "-o", "e").code == 2


@pytest.mark.parametrize("name", ["file", "folder"])
def test_an_output_in_the_way_is_told_before_any_work(veneer: Any, out: Path, name: str) -> None:
    (out / "folder").mkdir()
    (out / "folder" / "kept").write_text("")
    (out / "file").write_text("")
    answer = veneer("merge", "a", "no-such-adapter", "-o", name)
    assert answer.code == 2 and f"--output {name} exists" in answer.err and "no such folder" not in answer.err
    (out / "empty").mkdir()
    (out / ".empty.partial").mkdir()  # as a merge that was killed leaves it
    (out / ".empty.partial" / "half.safetensors").write_text("")
    assert veneer("merge", "a", "b", "-o", "empty").code == 0
    assert "half.safetensors" not in files(out / "empty")
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_three_hundred_adapters(veneer: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # takes seconds of a thousand files
    names = [f"many/{seed:03}" for seed in range(300)]
    bases = (BASE, replace(BASE, template="9" * 64))
    given = [adapter(seed, layers=1, names=("q_proj",), base=bases[seed % 2]) for seed in range(300)]
    for one, name in zip(given, names, strict=True):
        one.save(out / name)
    answer = veneer("merge", *names, "--rank", "4", "-o", "d", "--json")
    assert answer.code == 0, answer.err
    assert len(Adapter.load(out / "d").card.parents) == 300
    assert "and 288 more" in answer.err and len(answer.err.splitlines()) < 50
    wanted = sum(update(one, "model.layers.0.q_proj") for one in given) / 300
    s = torch.linalg.svdvals(wanted)
    kept = float(s[:4].square().sum() / s.square().sum())
    assert json.loads(answer.out)["layers"]["model.layers.0.q_proj"]["kept"] == pytest.approx(kept, rel=1e-4)


def _with_nan(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())
    next(iter(tensors.values()))[0, 0] = torch.nan
    file.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))


def _as_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"weights": [1.0]}))


def _disguised(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps({"weights": [1.0]}))


def _truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_with_nan, "NaN or infinite"),
        (_as_pickle, "adapter_model.bin: a pickle can run any code"),
        (_disguised, "pickle"),
        (_truncated, "truncated"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_every_adapter_that_cannot_be_read_is_named(veneer: Any, out: Path, damage: Any, told: str) -> None:
    damage(out / "b")
    damage(out / "c")
    answer = veneer("merge", "a", "b", "c", "-o", "d")
    assert (answer.code, answer.out) == (2, "") and not (out / "d").exists()
    assert answer.err.count(told) == 2 and "Traceback" not in answer.err


def test_adapters_of_two_bases_are_named_by_their_folders(veneer: Any, out: Path) -> None:
    adapter(3, base=replace(BASE, weights="9" * 64)).save(out / "b")
    answer = veneer("merge", "a", "b", "-o", "d")
    assert answer.code == 2 and not (out / "d").exists()
    assert "weights of the base: b was trained on another than a" in answer.err


def test_other_templates_unverified_bases_and_missing_layers_are_notes(veneer: Any, out: Path) -> None:
    adapter(3, base=replace(BASE, template="9" * 64)).save(out / "b")
    adapter(4, base=None, layers=1).save(out / "c")
    answer = veneer("merge", "a", "b", "c", "-o", "d", "--json")
    assert answer.code == 0
    assert "note: template of the base: b was trained on another than a" in answer.err
    assert "note: base unverified, not recorded: c" in answer.err
    assert "note: c has nothing for 2 of 4 layers, merged without it" in answer.err
    assert len(json.loads(answer.out)["notes"]) == 3


def test_a_recipe_of_unreadable_options_is_one_message(veneer: Any, out: Path) -> None:
    (out / "r.yaml").write_text("adapters: {a: 1}\nweights: soft\n")
    answer = veneer("merge", "r.yaml", "-o", "d")
    assert answer.code == 2 and "--adapters" in answer.err and "--weights" in answer.err
    with pytest.raises(ConfigError):
        Recipe("linear", ())
