"""Swaps leaves of a model: norms for the fused one, linear layers for leaves with slots."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from veneer.bases.base import Base, frozen
from veneer.bases.dense import Dense
from veneer.bases.lookup import Lookup
from veneer.bases.stacked import Stacked
from veneer.bases.transposed import Transposed
from veneer.errors import ModelError
from veneer.model.experts import is_experts, why_not
from veneer.model.leaf import Leaf, Slotted
from veneer.model.norm import FrozenRMSNorm
from veneer.model.packed import wiring_of
from veneer.model.routed import expert_leaf_at, release
from veneer.model.siblings import family
from veneer.model.text import text_modules
from veneer.model.vocabulary import EmbeddingLeaf, HeadLeaf, embedding_path, head_path, is_tied, multiplier_of

# Class names whose arithmetic FrozenRMSNorm repeats (to rounding); others keep the model's own code.
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


def swap_norms(model: nn.Module) -> int:
    """Puts FrozenRMSNorm where a known RMSNorm stands; returns how many."""
    found = [(path, module) for path, module in model.named_modules() if type(module).__name__ in NORMS]
    for path, norm in found:
        place(model, path, FrozenRMSNorm(norm.weight, norm.variance_epsilon))
    return len(found)


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of the layers that can hold an adapter: every linear layer and leaf but the vocabulary head.

    Of a model that sees or hears as well, those of its language model: nothing but text is trained on.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kinds, inside = (nn.Linear, Conv1D, Leaf), text_modules(model)
    named = model.named_modules()
    linear = [(path, module) for path, module in named if isinstance(module, kinds) and module in inside]
    return [path for path, module in linear if module is not head and not isinstance(module, EmbeddingLeaf)]


def check_adaptable(model: nn.Module, path: str) -> None:
    """Raises ModelError when what stands at `path` is no plain linear layer, no token embedding, no leaf, and no
    experts to adapt."""
    if is_experts(model, path):
        if reason := why_not(model, path):
            raise ModelError(f"{path} is {reason}")
        return
    module = model.get_submodule(path)
    if path == embedding_path(model) and not isinstance(module, Leaf):
        multiplier_of(module)
        return
    if type(module) not in (nn.Linear, Conv1D) and not isinstance(module, Leaf):
        raise ModelError(f"{path} is a {type(module).__name__}; an adapter goes on a plain linear layer")


def leaf_at(model: nn.Module, path: str) -> Slotted:
    """The leaf at `path`, swapped in now if a plain linear layer or the token embedding stands there, or put beside
    experts."""
    if is_experts(model, path):
        return expert_leaf_at(model, path, wiring_of(model))
    module = model.get_submodule(path)
    if isinstance(module, Leaf):
        return module
    check_adaptable(model, path)
    if path == embedding_path(model):
        return _placed(model, EmbeddingLeaf(Lookup.from_embedding(module), wiring_of(model), path, module))
    kind = Transposed if isinstance(module, Conv1D) else Dense
    base = kind.from_linear(module)
    leaf = HeadLeaf(base, wiring_of(model), path) if path == head_path(model) else Leaf(base, wiring_of(model), path)
    return _placed(model, leaf)


def tie_rows(model: nn.Module) -> None:
    """Gives a head that is tied to the embedding its trained rows, too."""
    embedding = model.get_submodule(embedding_path(model) or "")
    if isinstance(embedding, EmbeddingLeaf) and is_tied(model):
        head = leaf_at(model, str(head_path(model)))
        assert isinstance(head, HeadLeaf)
        head.tie(embedding)


def base_at(model: nn.Module, path: str) -> Base:
    """The base of a leaf; of another layer one over its weight, to ask: the layer itself is not frozen by it."""
    parent, _, name = path.rpartition(".")
    if is_experts(model, path):
        experts = model.get_submodule(parent)
        return Stacked(getattr(experts, name), experts.is_transposed)
    layer = model.get_submodule(path)
    if isinstance(layer, Leaf):
        return layer.base
    weight = layer.weight.detach()
    if isinstance(layer, nn.Embedding):
        return Lookup(frozen(weight))
    return Dense.from_weight(weight.t() if isinstance(layer, Conv1D) else weight)


def place_leaf(model: nn.Module, path: str, base: Base) -> Leaf:
    """Puts a leaf around `base` where another module stands, and makes it known to its siblings."""
    return _placed(model, Leaf(base, wiring_of(model), path))


def _placed(model: nn.Module, leaf: Leaf) -> Leaf:
    path = leaf.path
    for neighbour in model.get_submodule(path.rpartition(".")[0]).children():
        if isinstance(neighbour, Leaf) and family(neighbour.path) == family(path):
            neighbour.siblings.append(leaf)
            leaf.siblings = neighbour.siblings
            break
    leaf.train(model.get_submodule(path).training)
    place(model, path, leaf)
    return leaf


def place(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def unswap(model: nn.Module) -> int:
    """Puts plain linear layers back where dense leaves stand, the same weights, and leaves experts to themselves.

    Returns how many linear layers. A leaf of a quantised storage stays: no plain linear layer holds its weight.
    """
    leaves = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, Leaf) and isinstance(module.base, Dense)
    ]
    for path, leaf in leaves:
        leaf.siblings.remove(leaf)
        place(model, path, _layer(leaf).train(leaf.training))
    release(model)
    return len(leaves)


def _layer(leaf: Leaf) -> nn.Module:
    """The layer that `leaf` stands for, holding the same weights."""
    if isinstance(leaf, EmbeddingLeaf):
        return leaf.original()
    base: Base = leaf.base
    with torch.device("meta"):
        if isinstance(base, Transposed):
            layer: nn.Module = Conv1D(base.out_features, base.in_features)
            layer.weight = frozen(base.weight.t())
        else:
            layer = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
            layer.weight = base.weight
    layer.bias = base.bias
    return layer
