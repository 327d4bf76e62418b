"""`veneer convert`: any adapter becomes plain LoRA, for PEFT or as GGUF; or a tuned model an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.cli.layers import print_layers
from veneer.cli.load import base_of
from veneer.cli.output import print_json, say
from veneer.cli.parse import Command, parse
from veneer.config import ConvertSettings

COMMAND = Command(
    name="convert",
    summary="any adapter -> plain LoRA for PEFT or llama.cpp, compressed to a rank; or the adapter of a tuned model",
    settings=ConvertSettings,
    positional="adapter",
    second="output",
    example="veneer convert out/skill out/small --rank 4, or --extract tuned --base-model base --rank 16 -o out/skill",
)


def run(argv: Sequence[str]) -> int:
    """Convert and print the error report."""
    parsed = parse(argv, COMMAND)
    settings = parsed.settings
    report = {"output": settings.output, **_report(settings)}
    print_layers(f"{settings.extract or settings.adapter} -> {settings.output}", report, json=parsed.json)
    say(_parameters(report))
    if parsed.json:
        print_json(report)
    return 0


def _report(settings: ConvertSettings) -> dict[str, Any]:
    if settings.extract is None:
        if settings.to == "gguf":
            return _gguf(settings)
        from veneer.merge.convert import convert_folder

        return convert_folder(settings).to_json()
    from veneer.merge.extract import extract_folder

    return extract_folder(settings).to_json()


def _gguf(settings: ConvertSettings) -> dict[str, Any]:
    from veneer.merge.gguf.export import export_adapter

    base = base_of(settings.base_model, [str(settings.adapter)])
    report = export_adapter(settings, base).to_json()
    files = f"llama-cli -m BASE.gguf --lora {settings.output}/adapter.gguf"
    say(f"next: {files}, or ollama create NAME -f {settings.output}/Modelfile")
    return report


def _parameters(report: Mapping[str, Any]) -> str:
    before = report.get("parameters_before")
    return f"parameters: {report['parameters']:,}" + (f", of {before:,}" if before is not None else "")
