"""The longest sequence that trains under a limit of memory: told by a few layers, then confirmed by a run of all.

Activations of one layer at a time are on the device, so a token takes as much of it however many layers there are:
peak = fixed + layers · one layer + tokens · one token, and three short runs tell the three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu_spec import Spec, sizes

GRAIN = 512  # tokens
PROBES = ((2, 8192), (2, 32768), (4, 8192))  # layers and tokens
PROBE_STEPS = 2
SHARES = (1.0, 0.95, 0.9, 0.8)  # of the prediction, tried in turn
Run = Callable[[Spec], dict[str, Any]]


def longest(spec: Spec, caps_gib: Sequence[float], run: Run, steps: int, most: int) -> dict[str, Any]:
    """Under each limit the length that should fit, and a run at it, or at `most` tokens where that is shorter."""
    probes = {
        (layers, tokens): run(spec.but(shape=f"{spec.shape}:{layers}", sequence=tokens, steps=PROBE_STEPS))
        for layers, tokens in PROBES
    }
    found: dict[str, Any] = {"spec": spec.__dict__, "probes": list(probes.values())}
    if not all("peak_gib" in made for made in probes.values()):
        return found
    (few, short), (_, long), (more, _) = PROBES
    one, longer, deeper = (probes[probe]["peak_gib"] for probe in PROBES)
    token, layer = (longer - one) / (long - short), (deeper - one) / (more - few)
    fixed = one - few * layer - short * token
    found |= {"fixed_gib": fixed, "layer_gib": layer, "token_kib": token * 2**20, "limits": {}}
    for cap in caps_gib:
        room = cap - fixed - sizes(spec.shape)["num_hidden_layers"] * layer
        tokens = max(0, int(room / token)) // GRAIN * GRAIN
        made = confirmed(spec.but(steps=steps), cap, min(tokens, most), run)
        found["limits"][f"{cap:g}"] = {"predicted": tokens, **made}
    return found


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
