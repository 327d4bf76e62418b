"""The longest sequence that trains under a limit of memory: `python -m benchmarks.gpu_longest SPEC_JSON CAPS`.

One process builds the model once and searches under each limit; an attempt is two whole steps, optimiser included. What
it finds counts after a fresh process has trained at that length (`confirmed`).
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu_child import MARK, limit, out_of_memory
from benchmarks.gpu_spec import Spec, sizes

GRAIN = 512  # tokens
MOST = 2**18
PROBES = ((2, 8192), (2, 32768), (4, 8192))  # layers and tokens
STEPS = 2  # of a run that confirms, or probes


def longest(fits: Callable[[int], bool], grain: int = GRAIN, most: int = MOST, least: int = 0) -> int:
    """The largest multiple of `grain` up to `most` that fits, given that all smaller ones do; 0 where none does.
    `least` is known to fit."""
    low, high = least // grain, max(1, 2 * (least // grain))
    while high * grain <= most and fits(high * grain):
        low, high = high, 2 * high
    high = min(high, most // grain + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * grain) else (low, middle)
    return low * grain


def search(spec: Spec, caps: Sequence[float]) -> dict[str, Any]:
    """Limit in GiB -> longest sequence, found in this process."""
    import torch

    from benchmarks.ours_gpu import built, steps_of

    model = built(spec.but(sequence=MOST), "cuda")
    found: dict[str, Any] = {}
    known = 0
    for cap in sorted(caps):

        def fits(sequence: int, cap: float = cap) -> bool:
            gc.collect()
            torch.cuda.empty_cache()
            limit(cap)
            try:
                steps_of(spec.but(sequence=sequence), model)
            except Exception as error:
                if out_of_memory(error):
                    return False
                raise
            print(f"{cap:g} GiB: {sequence} tokens train", file=sys.stderr, flush=True)
            return True

        known = found[f"{cap:g}"] = longest(fits, least=known)
    return {"found": found}


def confirmed(
    spec: Spec, cap_gib: float, sequence: int, run: Callable[[Spec], dict[str, Any]], steps: int = STEPS
) -> dict[str, Any]:
    """The first length, down from what the search found, at which a fresh process trains."""
    made: dict[str, Any] = {"failed": "nothing fits"}
    for share in (1.0, 0.97, 0.94, 0.9):
        tokens = int(sequence * share) // GRAIN * GRAIN
        if tokens == 0:
            break
        made = run(spec.but(sequence=tokens, cap_gib=cap_gib, steps=steps))
        if "tokens_per_second" in made:
            return {"sequence": tokens, "cap_gib": cap_gib, "searched": sequence, **made}
    return {"sequence": 0, "cap_gib": cap_gib, "searched": sequence, **made}


def predicted(spec: Spec, cap_gib: float, run: Callable[[Spec], dict[str, Any]]) -> dict[str, Any]:
    """The length that should fit, told by a few layers: peak = fixed + layers · one layer + tokens · one token.

    Activations of one layer at a time are on the device, so a token takes as much of it however many layers there are.
    """
    few = {(layers, tokens): spec.but(shape=f"{spec.shape}:{layers}", sequence=tokens) for layers, tokens in PROBES}
    made = {probe: run(each.but(steps=STEPS)) for probe, each in few.items()}
    if not all("peak_gib" in result for result in made.values()):
        return {"cap_gib": cap_gib, "probes": list(made.values())}
    (few_layers, short), (_, long), (more_layers, _) = PROBES
    peaks = [made[probe]["peak_gib"] for probe in PROBES]
    token, layer = (peaks[1] - peaks[0]) / (long - short), (peaks[2] - peaks[0]) / (more_layers - few_layers)
    fixed = peaks[0] - few_layers * layer - short * token
    room = cap_gib - fixed - sizes(spec.shape)["num_hidden_layers"] * layer
    facts = {"cap_gib": cap_gib, "fixed_gib": fixed, "layer_gib": layer, "token_kib": token * 2**20}
    return {**facts, "sequence": max(0, int(room / token)) // GRAIN * GRAIN, "probes": list(made.values())}


if __name__ == "__main__":
    print(MARK + json.dumps(search(Spec.parse(sys.argv[1]), json.loads(sys.argv[2]))), flush=True)
