"""What an adapter goes on: the layers, and the experts, that settings name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from veneer.adapter import patterns as patterns_of_peft
from veneer.config import LoraSettings
from veneer.errors import ConfigError, listed, nearest
from veneer.model.experts import expert_parameters, expert_paths, experts_note, is_experts, why_not
from veneer.model.swap import linear_paths
from veneer.model.text import text_modules
from veneer.model.vocabulary import embedding_path, head_path
from veneer.notes import tell


def find_targets(model: nn.Module, settings: LoraSettings) -> list[str]:
    """Paths of the layers and of the experts' parameters that the settings name, in the model's order.

    The token embedding and the vocabulary head are adapted where they are named, 'all-linear' does not mean them. A
    name in target_modules means layers where it is that of any, as to PEFT, and experts where it is of none.
    Raises ConfigError with every target that matches nothing.
    """
    linear, experts, ends = linear_paths(model), expert_paths(model), (embedding_path(model), head_path(model))
    layers = [path for path in (ends[0], *linear, ends[1]) if path is not None]
    everything = settings.target_modules == "all-linear"
    chosen = linear if everything else _modules(model, settings.target_modules, layers, experts)
    if settings.target_parameters:
        chosen = [*chosen, *named_paths(experts, settings.target_parameters, "target_parameters", _unadapted(model))]
    if settings.exclude_modules:
        excluded = set(named_paths([*layers, *experts], settings.exclude_modules, "exclude_modules"))
        chosen = [path for path in chosen if path not in excluded]
    if not chosen:
        raise ConfigError("no linear layer is left to adapt after exclude_modules, and no experts")
    return [path for path in (*layers, *experts) if path in set(chosen)]


def _modules(model: nn.Module, targets: Sequence[str], layers: Sequence[str], experts: Sequence[str]) -> list[str]:
    """What target_modules means."""
    of_layers = [target for target in targets if _matched(target, layers, "target_modules")]
    for target in of_layers:
        if also := _matched(target, experts, "target_modules"):
            kind = ".".join(also[0].split(".")[-2:])
            tell(
                f"target_modules: {target!r} names linear layers here; {kind} stays as it is "
                f"(--target-parameters {kind} adapts it)"
            )
    others = [target for target in targets if target not in of_layers]
    chosen = named_paths(layers, of_layers, "target_modules")
    return [*chosen, *named_paths([*layers, *experts], others, "target_modules", _unadapted(model))]


def _matched(pattern: str, paths: Sequence[str], option: str) -> list[str]:
    try:
        return patterns_of_peft.matched(pattern, paths)
    except patterns_of_peft.TooCostly as error:
        raise ConfigError(f"{option}: {error}") from error


def named_paths(
    paths: Sequence[str], patterns: Sequence[str], option: str, unadapted: Mapping[str, str] | None = None
) -> list[str]:
    """The paths that any pattern names, in the model's order. Raises ConfigError with every pattern that names none.

    unadapted: path -> why it is none of `paths`.
    """
    hits = {pattern: _matched(pattern, paths, option) for pattern in patterns}
    missed = [pattern for pattern, found in hits.items() if not found]
    if missed:
        kinds = sorted({path.rpartition(".")[2] for path in paths})
        wanted = "parameter of experts" if option == "target_parameters" else "linear layer"
        faults = [f"{p!r} matches no {wanted}{_why(p, unadapted or {}) or _near(p, kinds)}" for p in missed]
        has = f"{', '.join(kinds)} (or a whole path such as {paths[0]})" if paths else f"no {wanted} to adapt"
        raise ConfigError(listed(f"{option}:", faults, f"This model has: {has}."))
    hit = {path for found in hits.values() for path in found}
    return [path for path in paths if path in hit]


def _why(pattern: str, unadapted: Mapping[str, str]) -> str:
    found = patterns_of_peft.matched(pattern, list(unadapted))
    return f": {found[0]} is {unadapted[found[0]]}" if found else ""


def _near(word: str, kinds: Sequence[str]) -> str:
    close = nearest(word, kinds)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def _unadapted(model: nn.Module) -> dict[str, str]:
    """Path -> why no adapter goes on what stands there, for what users name that is no linear layer to us."""
    reasons = {path: reason for path in expert_parameters(model) if (reason := why_not(model, path))}
    inside = text_modules(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            reasons[path] = "an embedding of something else than tokens, which stays frozen"
        elif module not in inside and isinstance(module, nn.Linear):
            reasons[path] = "not of the language model, and trained is on text"
    return reasons


def left_out(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """What 'all-linear' does not mean, though one could think so."""
    notes = []
    experts = experts_note(model)
    if experts and not any(is_experts(model, path) for path in targets):
        how = " (--target-parameters adapts them)" if expert_paths(model) else ""
        notes.append(f"all-linear: {experts} and stay as they are{how}; adapted is what all tokens pass")
    inside = text_modules(model)
    others = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and m not in inside]
    if others:
        parts = sorted({path.removeprefix("model.").partition(".")[0] for path in others})
        notes.append(f"all-linear: of {', '.join(parts)} nothing is adapted ({len(others)} layers); trained is on text")
    return notes
