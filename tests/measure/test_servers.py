"""Rules of servers: what each refuses, what to do about it; and what PEFT itself writes passes where it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from tests.measure.making import random
from veneer.config.verbs import Target
from veneer.errors import VeneerError
from veneer.measure.servers.server import check
from veneer.measure.servers.table import SERVERS, server_named
from veneer.measure.servers.traits import ADVICE, PeftFiles

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
TENSORS = {f"{PREFIX}.lora_A.weight": (8, 32), f"{PREFIX}.lora_B.weight": (32, 8)}

# What is special -> which servers load it.
ALL, NONE = {"peft", "vllm", "sglang", "llama.cpp"}, set[str]()
CASES: list[tuple[dict[str, Any], dict[str, tuple[int, ...]], set[str]]] = [
    ({}, {}, ALL),
    ({"use_rslora": True}, {}, {"peft", "vllm"}),
    ({"rank_pattern": {"q_proj": 4}}, {}, {"peft", "vllm", "llama.cpp"}),
    ({"alpha_pattern": {"q_proj": 4}}, {}, {"peft", "vllm"}),
    ({"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 16}}, {}, ALL),  # as all others
    ({"use_dora": True}, {f"{PREFIX}.lora_magnitude_vector": (32,)}, {"peft"}),
    ({"bias": "lora_only"}, {f"{PREFIX}.base_layer.bias": (32,)}, {"peft"}),
    ({"lora_bias": True}, {f"{PREFIX}.lora_B.bias": (32,)}, {"peft"}),
    ({"init_lora_weights": "pissa"}, {}, {"peft"}),
    ({"init_lora_weights": "EVA"}, {}, ALL),
    ({"modules_to_save": ["lm_head"]}, {}, {"peft"}),
    ({"modules_to_save": ["score"]}, {}, ALL),
    ({"target_modules": ".*q_proj"}, {}, {"peft", "vllm", "llama.cpp"}),
    ({"target_modules": "all-linear"}, {}, ALL),
    ({"target_modules": None}, {}, NONE),
    ({"peft_type": "LOHA"}, {}, {"peft"}),
    ({"kasa_config": {"x": 1}}, {}, {"peft"}),
    ({"alora_invocation_tokens": [1]}, {}, {"peft", "llama.cpp"}),
    ({"layer_replication": [[0, 1]]}, {}, {"peft"}),
    ({}, {"base_model.model.lm_head.token_adapter.trainable_tokens_delta": (2, 32)}, {"peft"}),
    ({}, {"base_model.model.model.embed_tokens.weight": (96, 32)}, {"peft", "sglang"}),
    (
        {},
        {"base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight": (64, 32)},
        {"peft", "vllm", "sglang"},
    ),
    ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": (8, 96)}, ALL),
]


@pytest.mark.parametrize(("config", "tensors", "loads"), CASES)
@pytest.mark.parametrize("name", SERVERS)
def test_rules(name: str, config: dict[str, Any], tensors: dict[str, tuple[int, ...]], loads: set[str]) -> None:
    files = PeftFiles({**PLAIN, **config}, {**TENSORS, **tensors})
    found = check(server_named(name), files, "out/skill")
    assert found.loads == (name in loads), found.faults
    assert found.loads == (not found.faults)
    assert all("; next: " in fault for fault in found.faults)


def test_every_rule_says_what_to_do() -> None:
    for name in SERVERS:
        server = server_named(name)
        assert {*server.refused, *server.wrong} <= ADVICE.keys()
        assert not set(server.refused) & set(server.wrong)
        assert server.version


def test_the_option_offers_the_table() -> None:
    assert list(get_args(Target)) == list(SERVERS)


@pytest.mark.parametrize(
    ("rank", "limit", "loads", "says"),
    [
        (16, None, True, ""),
        (17, None, False, "start vLLM with --max-lora-rank 32"),
        (17, 32, True, ""),
        (300, 256, False, "start vLLM with --max-lora-rank 320"),
        (300, 256, False, "--to peft --rank 256"),
        (600, 600, False, "no more than 512"),
    ],
)
def test_ranks_of_vllm(rank: int, limit: int | None, loads: bool, says: str) -> None:
    tensors = {name: tuple(rank if side == 8 else side for side in shape) for name, shape in TENSORS.items()}
    found = check(server_named("vllm"), PeftFiles({**PLAIN, "r": rank}, tensors), "out/skill", limit)
    assert found.loads is loads
    assert says in " ".join(found.faults)


def test_the_rank_is_that_of_the_tensors_too() -> None:
    found = check(server_named("vllm"), PeftFiles(PLAIN, {f"{PREFIX}.lora_A.weight": (64, 32)}), "out/skill")
    assert not found.loads


def test_sglang_takes_the_rank_it_is_started_for() -> None:
    found = check(server_named("sglang"), PeftFiles(PLAIN, TENSORS), "out/skill")
    assert found.loads
    assert "--max-lora-rank 8" in " ".join(found.notes)
    assert not check(server_named("sglang"), PeftFiles(PLAIN, TENSORS), "out/skill", limit=4).loads


def test_a_head_that_is_the_embedding() -> None:
    files = PeftFiles(PLAIN, {**TENSORS, "base_model.model.lm_head.lora_A.weight": (8, 32)})
    assert check(server_named("llama.cpp"), files, "out/skill").loads  # nobody knows
    assert check(server_named("llama.cpp"), files, "out/skill", tied=False).loads
    assert not check(server_named("llama.cpp"), files, "out/skill", tied=True).loads


def test_unknown_layers_are_told() -> None:
    files = PeftFiles(PLAIN, {"base_model.model.model.layers.0.mixer.x_proj.lora_A.weight": (8, 32)})
    found = check(server_named("sglang"), files, "out/skill")
    assert found.loads
    assert "x_proj" in " ".join(found.notes)


def test_what_veneer_writes_loads_everywhere(tmp_path: Path) -> None:
    folder = random(0, rank=4).save(tmp_path / "a")
    files = PeftFiles.read(str(folder))
    assert set(files.ranks().values()) == {4}
    for name in SERVERS:
        assert check(server_named(name), files, "out/skill").loads, name


@pytest.mark.parametrize("broken", ["{", "[]", '{"r": 1'])
def test_a_broken_config_is_an_error(tmp_path: Path, broken: str) -> None:
    folder = random(0).save(tmp_path / "a")
    (folder / "adapter_config.json").write_text(broken)
    with pytest.raises(VeneerError):
        PeftFiles.read(str(folder))


@pytest.mark.parametrize("odd", [{"rank_pattern": [1]}, {"modules_to_save": 3}, {"target_modules": 7}, {"bias": []}])
def test_a_config_of_other_types_is_no_crash(odd: dict[str, Any]) -> None:
    for name in SERVERS:
        check(server_named(name), PeftFiles({**PLAIN, **odd}, TENSORS), "out/skill")
