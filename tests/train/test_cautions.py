"""Settings that are known to hurt: each rule speaks where it should, and none of a default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from veneer.config import RunConfig
from veneer.train.cautions import RULES, Facts, cautions
from veneer.train.run import train

NEEDED = {"base_model": "b", "dataset": "d.jsonl", "output_dir": "o"}
ALL = [f"model.layers.0.{path}" for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]
FACTS = Facts(adapted=ALL, trainable_parameters=10_000, rows=1000, trained_tokens=10_000, usual_rate=1e-3)

# options, facts that are otherwise -> the option named, what the advice says
CASES: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"learning_rate": 2e-5}, {}, "--learning-rate 2e-05", "--learning-rate 0.001"),
    ({"learning_rate": 3e-3}, {}, "--learning-rate 0.003", "--learning-rate 0.001"),
    ({"per_device_train_batch_size": 65}, {}, "--per-device-train-batch-size 65", "32 rows a step"),
    ({"gradient_accumulation_steps": 16}, {}, "--gradient-accumulation-steps 16", "32 rows a step"),
    ({"target_modules": "q_proj,o_proj"}, {"adapted": ALL[:2]}, "--target-modules q_proj,o_proj", "all-linear"),
    ({"r": 4}, {"trained_tokens": 25_000}, "--r 4", "--r 10"),
    ({"r": 4}, {"trained_tokens": 10_000_000}, "--r 4", "--r 256"),
    ({"use_rslora": True, "learning_rate": 1e-3}, {}, "--use-rslora", "--lora-alpha 8"),
]


def _said(options: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    return list(map(str, cautions(RunConfig.from_flat(NEEDED | options), FACTS._replace(**facts))))


@pytest.mark.parametrize("options, facts, named, advice", CASES)
def test_each_rule_names_option_and_advice(
    options: dict[str, Any], facts: dict[str, Any], named: str, advice: str
) -> None:
    [said] = _said(options, facts)
    before, after = said.split("; next: ")
    assert named in before
    assert advice in after


def test_every_rule_has_a_case() -> None:
    spoken = [
        {rule for rule in RULES if rule(RunConfig.from_flat(NEEDED | options), FACTS._replace(**facts))}
        for options, facts, _, _ in CASES
    ]
    assert set().union(*spoken) == set(RULES)


# As near to a rule as can be; data far larger than a default adapter; a narrow base, whose usual rate is high.
@pytest.mark.parametrize(
    "options, facts",
    [
        ({}, {}),
        ({}, {"trained_tokens": 10**9}),
        ({"learning_rate": 5e-5}, {}),
        ({"learning_rate": 2.9e-3}, {}),
        ({"learning_rate": 1e-2}, {"usual_rate": 6e-3}),
        ({"gradient_accumulation_steps": 8}, {}),
        ({"gradient_accumulation_steps": 16}, {"rows": 64}),
        ({"r": 4}, {}),
        ({"use_rslora": True}, {}),  # the rate makes up for the scale
        ({"use_rslora": True, "lora_alpha": 16, "learning_rate": 1e-3}, {}),
        ({"use_rslora": True, "r": 1, "learning_rate": 1e-3}, {}),
        ({"learning_rate": 3e-5}, {"usual_rate": 3e-5}),
    ],
)
def test_nothing_is_said_of_what_is_not_known_to_hurt(options: dict[str, Any], facts: dict[str, Any]) -> None:
    assert _said(options, facts) == []


def test_a_run_tells_them_and_keeps_them(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    one = config(target_modules="q_proj,v_proj", max_steps=1, r=16)
    result = train(one, progress=True)
    [said] = result.warnings
    assert said.startswith("--target-modules q_proj,v_proj: only attention")
    assert "warning: --target-modules q_proj,v_proj" in capsys.readouterr().err
    assert result.to_json()["warnings"] == [said]
    assert "only attention is adapted" in Path(one.output_dir, "veneer.json").read_text()
