"""An adapter folder -> a folder with the adapter as GGUF and a Modelfile: what `veneer convert --to gguf` runs."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedModel

from veneer.adapter.card import Adapter
from veneer.adapter.peft_vocabulary import COPIES
from veneer.adapter.verify import check_base
from veneer.config import ConvertSettings
from veneer.merge.convert import ConvertReport, converted
from veneer.merge.folder import free, whole
from veneer.merge.gguf.adapter_file import FILE, check, write_adapter
from veneer.merge.gguf.family import family_of
from veneer.merge.gguf.ollama import write_modelfile
from veneer.merge.gguf.tensors import Names
from veneer.model import fingerprint as fingerprints
from veneer.model.read import opened, quiet, read_shapes, read_tokenizer
from veneer.model.source import Source, resolve
from veneer.model.sources import checkpoint_files


def export_adapter(settings: ConvertSettings, base_model: str) -> ConvertReport:
    """Reads the adapter and writes it, cut to a rank if asked for, as `adapter.gguf` to `settings.output`.

    Of the base only config and tokenizer are read, and what its fingerprint needs. Raises ConfigError where the output
    is in the way, WrongBaseError, ModelError for a family without a GGUF here, NotMergeable.
    """
    output = free(settings.output)
    adapter = Adapter.load(str(settings.adapter))
    source = resolve(base_model)
    with quiet():
        files = opened(source)
        model, tokenizer = read_shapes(files), read_tokenizer(files)
    check(adapter, model.config, Names(model.config, family_of(model.config)))
    notes = check_base(_without_copies(adapter), model, _fingerprint(source, model, tokenizer))
    cut, report = converted(adapter, settings.rank, settings.energy)
    with whole(output) as partial:
        partial.mkdir(parents=True)
        write_adapter(partial, cut, model.config)
        told, base = _base_of(source)
        notes += told + write_modelfile(partial, base, tokenizer, adapter.card.system_prompt, f"./{FILE}")
    return dataclasses.replace(report, notes=tuple(dict.fromkeys([*report.notes, *notes])))


def _without_copies(adapter: Adapter) -> Adapter:
    """Copies of base weights that lay beside the factors are not exported, and no weights are read to compare them."""
    settings = {key: value for key, value in adapter.card.settings.items() if key != COPIES}
    return Adapter(adapter.tensors, dataclasses.replace(adapter.card, settings=settings))


def _fingerprint(source: Source, model: PreTrainedModel, tokenizer: Any) -> fingerprints.Fingerprint:
    files = checkpoint_files(str(source.local or source.place))
    return fingerprints.Fingerprint(
        weights=fingerprints.weights_of(files) if files else fingerprints.UNKNOWN,
        architecture=fingerprints.architecture_of(model.config),
        tokenizer=fingerprints.tokenizer_of(tokenizer),
        template=fingerprints.template_of(tokenizer),
    )


def _base_of(source: Source) -> tuple[list[str], str]:
    """Notes on the base, and what the Modelfile calls it."""
    if source.gguf_file is not None and source.local is not None:
        return [], str(source.local.resolve())
    files = checkpoint_files(source.place)
    folder = str(files[0].parent.resolve()) if files else source.name
    return [f"llama.cpp reads the base as GGUF too: make one of {folder} with its convert_hf_to_gguf.py"], folder
