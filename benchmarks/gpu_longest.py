"""The longest sequence that trains under a limit of memory: told by a few layers, then confirmed by a run of all.

Activations of one layer at a time are on the device, so a token takes as much of it however many layers there are:
peak = fixed + layers · one layer + tokens · one token, and three short runs tell the three. The first step has a line
of its own: it tries what a layer's backward reads, while the optimiser's moments do not exist yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.gpu_spec import Spec, sizes

GRAIN = 512  # tokens
PROBES = ((2, 8192), (2, 32768), (4, 8192))  # layers and tokens
PROBE_STEPS = 3
LINES = ("first_step_peak_gib", "later_peak_gib")
CONTEXT = 1.0  # GiB of a limit that are not the allocator's: CUDA's own, and its libraries'
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the prediction, tried in turn
Run = Callable[[Spec], dict[str, Any]]


def longest(spec: Spec, caps_gib: Sequence[float], run: Run, steps: int, most: int) -> Iterator[dict[str, Any]]:
    """Under each limit the length that should fit, and a run at it, or at `most` tokens where that is shorter.

    Yields all that was found so far, after each limit."""
    probes = {
        (layers, tokens): run(spec.but(shape=f"{spec.shape}:{layers}", sequence=tokens, steps=PROBE_STEPS))
        for layers, tokens in PROBES
    }
    found: dict[str, Any] = {"spec": spec.__dict__, "probes": list(probes.values())}
    if not all(name in made for made in probes.values() for name in LINES):
        yield found
        return
    found |= {"lines": {name: line([probes[probe][name] for probe in PROBES]) for name in LINES}, "limits": {}}
    for cap in caps_gib:
        tokens = min(_tokens(told, spec.shape, cap - CONTEXT) for told in found["lines"].values()) // GRAIN * GRAIN
        made = confirmed(spec.but(steps=steps), cap - CONTEXT, min(tokens, most), run)
        found["limits"][f"{cap:g}"] = {"predicted": tokens, **made}
        yield found


def line(peaks_gib: Sequence[float]) -> dict[str, float]:
    """From the peaks of the probes: GiB that do not depend on the run, GiB a layer, KiB a token."""
    (few, short), (_, long), (more, _) = PROBES
    one, longer, deeper = peaks_gib
    token, layer = (longer - one) / (long - short), (deeper - one) / (more - few)
    return {"fixed_gib": one - few * layer - short * token, "layer_gib": layer, "token_kib": token * 2**20}


def _tokens(told: dict[str, float], shape: str, room_gib: float) -> int:
    room = room_gib - told["fixed_gib"] - sizes(shape)["num_hidden_layers"] * told["layer_gib"]
    return max(0, int(room / told["token_kib"] * 2**20))


def confirmed(spec: Spec, cap_gib: float, sequence: int, run: Run) -> dict[str, Any]:
    """The first length, down from `sequence`, at which a fresh process trains."""
    made: dict[str, Any] = {"failed": "nothing fits"}
    for share in SHARES:
        tokens = int(sequence * share) // GRAIN * GRAIN
        if tokens == 0:
            break
        made = run(spec.but(sequence=tokens, cap_gib=cap_gib))
        if "tokens_per_second" in made:
            return {"sequence": tokens, "cap_gib": cap_gib, **made}
    return {"sequence": 0, "cap_gib": cap_gib, **made}
