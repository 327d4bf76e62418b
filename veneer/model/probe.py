"""The probe at load: does this family compute in the packed path what it computes alone?

It runs on the real weights with a dozen tokens, so it costs a fraction of a second on a small model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.errors import ModelError
from veneer.model.attention import Witness, witnessed
from veneer.model.head import head_of
from veneer.model.losses import head_nll
from veneer.model.packed import attending_by, hidden_states, running, wiring_of
from veneer.model.stream import SHARED, pack
from veneer.model.text import body_of, text_config

# Relative to the largest logit: rounding over tens of layers; a wrong mask or position is off by 10 % and more.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 6e-2, torch.float16: 2e-2}
MOST = 0.25  # of what rounding may explain: a wrong mask in a model that amplifies it is off by more
# Angles that change with the longest sequence of a call: right alone, wrong beside others, and only beyond a length
# that a probe does not reach.
LENGTH_DEPENDENT = {"dynamic", "longrope"}
HALF = (torch.bfloat16, torch.float16)


def probe(model: nn.Module) -> None:
    """Raises ModelError naming the family when packed segments differ from each alone, or the chunked head from the
    model's own logits. A model in training mode is probed without the dropout of its own, and is in it afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        _probe(model)
    finally:
        for module in training:
            module.training = True


def _probe(model: nn.Module) -> None:
    family = getattr(model.config, "model_type", type(model).__name__)
    device = next(model.parameters()).device
    rotary = getattr(text_config(model), "rope_parameters", None) or {}
    kinds = {str(part.get("rope_type")) for part in (rotary, *rotary.values()) if isinstance(part, dict)}
    if stretched := sorted(kinds & LENGTH_DEPENDENT):
        wiring_of(
            model
        ).fault = f"rotary positions of the kind {stretched[0]!r} depend on the length of what is beside them"
        raise ModelError(f"models of the family {family!r} are not supported: {wiring_of(model).fault}")
    sequences = _sequences(text_config(model).vocab_size)
    try:
        packed, nll = _packed(model, sequences, device)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError, LookupError) as error:
        reason = _reason(model, sequences[0], device) or f"the packed forward failed ({error})"
        wiring_of(model).fault = reason
        raise ModelError(f"models of the family {family!r} are not supported: {reason}") from error
    alone = [_alone(model, sequence, device) for sequence in sequences]
    wiring_of(model).probed = True
    faults = _faults(packed, alone, model.dtype, TOLERANCE[model.dtype])
    if faults and model.dtype in HALF:
        faults = _faults(packed, alone, model.dtype, _rounding(model, sequences, alone, device))
        faults += _head_faults(model, sequences[0], alone[0], device)
    faults += _loss_faults(nll, packed[0], sequences[0], TOLERANCE[model.dtype])
    witness = _seen(model, sequences[0], device)
    faults = [*_elsewhere(model, witness), *_mask_faults(witness), *faults]
    if faults:
        _check_finite(model)
        wiring_of(model).fault = "; ".join(faults)
        raise ModelError(f"models of the family {family!r} are not supported: {'; '.join(faults)}")


def _check_finite(model: nn.Module) -> None:
    """Raises ModelError with the weights that are not numbers: then nothing else can be said of the family."""
    broken = [
        name
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and weight.itemsize > 1 and not weight.isfinite().all()
    ]
    if broken:
        raise ModelError(
            f"{len(broken)} weights hold NaN or infinity, {broken[0]} first; check the checkpoint, or download it again"
        )


def _sequences(vocabulary: int) -> list[list[int]]:
    """Two that begin alike, and one on its own."""
    tokens = [(7 * i * i + 3) % vocabulary for i in range(SHARED + 20)]
    begin, rest = tokens[:SHARED], tokens[SHARED:]
    return [begin + rest[:6], begin + rest[6:9], rest[9:]]


@torch.no_grad()
def _packed(model: nn.Module, sequences: list[list[int]], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Logits (tokens, V) of every sequence, and the loss in chunks of the first."""
    stream = pack(sequences, device=device, share=True)
    with running(model, stream):
        hidden_TD = hidden_states(model)
    head = head_of(model)
    rows = [torch.tensor(stream.rows_of(segment), device=device) for segment in stream.sequences]
    targets = torch.tensor(sequences[0][1:], device=device)
    return [head(hidden_TD[here]).float() for here in rows], head_nll(hidden_TD[rows[0][:-1]], head, targets)


@torch.no_grad()
def _seen(model: nn.Module, sequence: list[int], device: torch.device) -> Witness:
    """What packed attention sees of a stream."""
    with running(model, pack([sequence], device=device)), witnessed() as witness:
        hidden_states(model)
    return witness


def _reason(model: nn.Module, sequence: list[int], device: torch.device) -> str | None:
    """Why the packed forward failed, where it gets far enough to tell."""
    try:
        return next(iter(_elsewhere(model, _seen(model, sequence, device))), None)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError, LookupError):
        return None


def _mask_faults(witness: Witness) -> list[str]:
    """What a dozen tokens cannot show: a mask that hides keys farther back, and that its layers do not tell of."""
    return [f"its attention layers do not tell of {fault}" for fault in sorted(witness.untold)]


def _elsewhere(model: nn.Module, witness: Witness) -> list[str]:
    """Why segments see each other, where that is told by what packed attention was not asked for."""
    layers = getattr(text_config(model), "num_hidden_layers", 0)
    if witness.calls >= layers:
        return []
    return [
        f"{layers - witness.calls} of its {layers} layers do not compute attention through transformers' attention "
        "interface (a state space, a convolution, or attention of their own), so segments see each other"
    ]


@torch.no_grad()
def _alone(model: nn.Module, sequence: list[int], device: torch.device) -> Tensor:
    return model(input_ids=torch.tensor([sequence], device=device), use_cache=False).logits[0].float()


def _rounding(model: nn.Module, sequences: list[list[int]], alone: list[Tensor], device: torch.device) -> float:
    """The tolerance of a model that amplifies rounding: by how much its own two attentions differ in half precision.

    Eighty layers can turn the last bit of one number into some percent of a logit. What is measured is one difference
    of two roundings; another may well be three times as large.
    """
    if not getattr(model, "_supports_sdpa", False):
        return TOLERANCE[model.dtype]
    with attending_by(model, "sdpa" if model.config._attn_implementation == "eager" else "eager"):
        others = [_alone(model, sequence, device) for sequence in sequences]
    errors = [_error(other, logits, model.dtype) for other, logits in zip(others, alone, strict=True)]
    return max(TOLERANCE[model.dtype], min(3 * max(errors), MOST))


def _faults(packed: list[Tensor], alone: list[Tensor], dtype: torch.dtype, tolerance: float) -> list[str]:
    faults = []
    for name, got_TV, wanted_TV in zip(("first", "second", "third"), packed, alone, strict=True):
        parts = [slice(SHARED), slice(SHARED, None)] if len(got_TV) > SHARED else [slice(None)]
        error = max(_error(got_TV[part], wanted_TV[part], dtype) for part in parts)
        if not error < tolerance:
            faults.append(
                f"the {name} of three packed sequences is {error:.1%} off what the model computes for it alone "
                "(its attention, its positions, or a scaled or capped head)"
            )
    return faults


@torch.no_grad()
def _head_faults(model: nn.Module, sequence: list[int], wanted_TV: Tensor, device: torch.device) -> list[str]:
    """Depth amplifies what layers round, never what comes after them: the head is held to the ordinary tolerance."""
    out = body_of(model)(input_ids=torch.tensor([sequence], device=device), use_cache=False)
    error = _error(head_of(model)(out[0][0]).float(), wanted_TV, model.dtype)
    return [] if error < TOLERANCE[model.dtype] else [f"its logits are {error:.1%} off those of its vocabulary head"]


def _loss_faults(nll: Tensor, logits_TV: Tensor, sequence: list[int], tolerance: float) -> list[str]:
    targets = torch.tensor(sequence[1:], device=nll.device)
    wanted_nll = nn.functional.cross_entropy(logits_TV[:-1], targets, reduction="none")
    same = torch.allclose(nll, wanted_nll, rtol=tolerance, atol=tolerance)
    return [] if same else ["the loss in chunks differs from that of the head's own logits"]


def _error(got_TV: Tensor, wanted_TV: Tensor, dtype: torch.dtype) -> float:
    """Largest error of a token relative to its largest logit: of the worst token, in half precision of the median one.

    In bfloat16 single tokens (the first, of huge activations) may differ by a third between two right attentions;
    a wrong mask, position or head spoils most of them.
    """
    scale = wanted_TV.abs().amax(-1).clamp(min=1e-2 * wanted_TV.abs().max().item() + 1e-12)
    errors_T = (got_TV - wanted_TV).abs().amax(-1) / scale
    return (errors_T.median() if dtype in HALF else errors_T.max()).item()
