"""An adapter as a GGUF file that llama.cpp puts on its base, any base that it stores in GGUF, quantised or not.

Legend: R rank, I in, O out, V vocabulary, D hidden size.

llama.cpp adds alpha / R · B A with one alpha a file and the R of each layer. Here scales are folded into B already, so
alpha is the largest R, and a layer of lower rank has its B times R / alpha: what is added is B A for every layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.adapter.card import Adapter
from veneer.adapter.experts import parameter_of
from veneer.adapter.faults import add_fault
from veneer.adapter.peft_vocabulary import ADDED, EMBEDDINGS
from veneer.errors import NotMergeable, listed
from veneer.merge.gguf.family import family_of
from veneer.merge.gguf.model_file import write
from veneer.merge.gguf.tensors import Names, add_tensor

FILE = "adapter.gguf"


def write_adapter(folder: Path, adapter: Adapter, config: Any) -> None:
    """Writes `adapter.gguf` into the folder, in float32. config: transformers' of the base.

    Raises ModelError for a family, NotMergeable for what llama.cpp has no adapter for; both before a file is made.
    """
    from gguf import GGUFWriter, Keys

    family = family_of(config)
    names = Names(config, family)
    check(adapter, config, names)
    alpha = max(adapter.card.ranks.values())
    writer = GGUFWriter(folder / FILE, family.arch)
    writer.add_type("adapter")
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(alpha))
    embeddings = adapter.card.settings.get(EMBEDDINGS, [])
    for module in adapter.modules():
        a_RI, b_OR = adapter.factors(module)
        b_OR = names.ordered(module, b_OR * (len(a_RI) / alpha))
        name = names.of(f"{module}.weight")
        add_tensor(writer, f"{name}.lora_a", _looked_up(a_RI) if module in embeddings else a_RI)
        add_tensor(writer, f"{name}.lora_b", b_OR)
    write(writer)


def _looked_up(a_RV: Tensor) -> Tensor:
    """The A of a token embedding has a row for each token."""
    return a_RV.t()


def check(adapter: Adapter, config: Any, names: Names) -> None:
    """Raises NotMergeable with everything in the adapter that llama.cpp has no place for."""
    faults: list[str] = []
    settings, modules = adapter.card.settings, adapter.modules()
    if adapter.card.method != "lora":
        faults.append(f"the method {adapter.card.method}: llama.cpp adds B·A alone")
    add_fault(faults, "rows of tokens, trained as they are", list(adapter.rows()))
    add_fault(faults, "added tokens", [text for text, _ in settings.get(ADDED, [])])
    experts = [module for module in modules if parameter_of(module)]
    add_fault(faults, "experts", experts)
    ends = [*settings.get(EMBEDDINGS, []), "lm_head"] if config.tie_word_embeddings else []
    add_fault(faults, "token embedding and head, which this base has in one weight", [m for m in modules if m in ends])
    strange = [m for m in modules if names.of(f"{m}.weight") is None and m not in experts]
    add_fault(faults, "layers that llama.cpp has no name for", strange)
    if faults:
        next_step = "Next: veneer merge ADAPTER --into-base --format gguf -o FOLDER, which holds all of it."
        raise NotMergeable(listed("llama.cpp has no adapter of this kind:", faults, next_step))
