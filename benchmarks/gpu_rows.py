"""The rows of the GPU comparison: which systems, at which settings, among which variants each picks its best."""

from __future__ import annotations

import dataclasses

from benchmarks.gpu_spec import Spec

# system -> the module that runs it, and the storage of its base.
SYSTEMS: dict[str, tuple[str, str]] = {
    "ours": ("benchmarks.ours_gpu", "bf16"),
    "ours-fp8": ("benchmarks.ours_gpu", "fp8"),
    "ours-nf4": ("benchmarks.ours_gpu", "nf4"),
    "peft": ("benchmarks.peers_gpu", "bf16"),
    "peft-liger": ("benchmarks.peers_gpu", "bf16"),
    "qlora-peft": ("benchmarks.peers_gpu", "nf4"),
    "qlora-peft-liger": ("benchmarks.peers_gpu", "nf4"),
    "unsloth": ("benchmarks.peers_gpu", "bf16"),
    "unsloth-fp8": ("benchmarks.peers_gpu", "fp8"),
    "qlora-unsloth": ("benchmarks.peers_gpu", "nf4"),
    "full": ("benchmarks.peers_gpu", "fp32"),
    "full-liger": ("benchmarks.peers_gpu", "fp32"),
    "full-bf16-liger": ("benchmarks.peers_gpu", "bf16"),
}

Variant = tuple[int, str, bool] | tuple[int, str, bool, int]  # batch, recompute, compile, passes a step
OURS_FAST: tuple[Variant, ...] = ((1, "none", True), (2, "none", True), (3, "none", True))
# Row by row: as many layers keep their activations as there is room for.
OURS_SMALL: tuple[Variant, ...] = (
    (4, "layers", True, 4),
    (4, "28", True, 4),
    (4, "27", True, 4),
)
OFFLOADED: tuple[Variant, ...] = ((4, "unsloth", False), (4, "unsloth", False, 4))
CARD = 78.0  # GiB that the allocator finds on a card of 80 GB
UNSLOTH_FAST: tuple[Variant, ...] = ((1, "none", False), (2, "none", False), (3, "none", False))
LIGER: tuple[Variant, ...] = ((1, "none", False), (1, "none", True), (4, "layers", False))


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: the same work for every system."""

    title: str
    shape: str
    systems: dict[str, tuple[Variant, ...]]
    rank: int = 16
    sequence: int = 4096
    cap_gib: float | None = None
    optim: str = "adamw"  # of our side
    within: str | None = None  # ours takes its fastest variant among those whose peak is at most this system's

    def candidates(self, system: str, steps: int) -> list[Spec]:
        """The variants of a system to choose from."""
        common = Spec(
            system,
            self.shape,
            SYSTEMS[system][1],
            self.rank,
            self.sequence,
            steps=steps,
            cap_gib=self.cap_gib,
            optim=self.optim,
        )
        return [
            common.but(batch=batch, recompute=recompute, compile=compiled, passes=passes[0] if passes else 1)
            for batch, recompute, compiled, *passes in self.systems[system]
        ]


ROWS: dict[str, Row] = {
    "8b-bf16": Row(
        "8B, bf16: the best of each, on an 80 GB card or on as much of a larger one",
        "8b",
        {
            "ours": OURS_FAST,
            "unsloth": UNSLOTH_FAST,
            "peft-liger": LIGER,
            "peft": ((1, "none", False), (2, "layers", False)),
        },
        cap_gib=CARD,
    ),
    "8b-fp8": Row(
        "8B, fp8 base: the best of each, likewise",
        "8b",
        {"ours-fp8": OURS_FAST, "unsloth-fp8": (*UNSLOTH_FAST, OFFLOADED[0])},
        cap_gib=CARD,
    ),
    "8b-nf4": Row(
        "8B, NF4 with double quantisation: within the memory of Unsloth's recompute, which keeps inputs on the host",
        "8b",
        {
            "ours-nf4": OURS_SMALL,
            "qlora-unsloth": OFFLOADED,
            "qlora-peft-liger": ((4, "layers", False), (4, "layers", False, 4)),
            "qlora-peft": ((2, "layers", False), (4, "layers", False, 4)),
        },
        within="qlora-unsloth",
    ),
    "8b-bf16-low": Row(
        "8B, bf16: likewise within that memory",
        "8b",
        {"ours": OURS_SMALL, "unsloth": OFFLOADED},
        within="unsloth",
    ),
    "1b-bf16": Row(
        "1B, bf16: four rows a step",
        "1b",
        {
            "ours": ((4, "none", True),),
            "unsloth": ((4, "none", False), (4, "unsloth", False)),
            "peft-liger": ((4, "none", False), (4, "none", True)),
            "peft": ((4, "layers", False),),
        },
    ),
    "65b": Row(
        "65B, the largest run of QLoRA's paper (arXiv 2305.14314): NF4, double quantisation, a 48 GB card, r = 64",
        "65b",
        {"ours-nf4": ((1, "layers", True), (1, "layers", False))},
        rank=64,
        sequence=512,
        cap_gib=44.5,
        optim="adamw_8bit",
    ),
    "65b-least": Row(
        "65B likewise, its gradients freed during backward",
        "65b",
        {"ours-nf4": ((1, "in-backward", True),)},
        rank=64,
        sequence=512,
        cap_gib=44.5,
        optim="adamw_8bit",
    ),
    "full": Row(
        "1B: full fine-tuning beside LoRA and QLoRA",
        "1b",
        {
            "ours": ((4, "none", True),),
            "ours-nf4": ((4, "none", True),),
            "full-liger": ((4, "none", False),),
            "full-bf16-liger": ((4, "none", False),),
            "full": ((2, "layers", False),),
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Longest:
    """Not a comparison: the longest sequence that trains under a limit, see benchmarks.gpu_longest."""

    title: str
    shape: str
    caps_gib: tuple[float, ...]
    steps: int
    most: int = 2**18  # tokens of a run that confirms

    @property
    def spec(self) -> Spec:
        return Spec("ours-nf4", self.shape, "nf4", rank=32, recompute="offload", compile=False, optim="adamw_8bit")


LONGEST: dict[str, Longest] = {
    "8b-longest": Longest(
        "8B, NF4, r = 32: the longest sequence that trains in all of a card's memory", "8b", (8.0, 16.0, 24.0), steps=3
    ),
    # One step, and no longer than it takes four minutes.
    "70b-longest": Longest("70B, NF4, r = 32: likewise", "70b", (CARD + 1.0,), steps=1, most=98304),
}


def is_ours(system: str) -> bool:
    return system.startswith("ours")


def parse_rows(text: str) -> list[str]:
    """`8b-bf16,65b` or `all`. Raises ValueError with every name that is unknown."""
    known = [*ROWS, *LONGEST]
    wanted = known if text == "all" else [name for name in text.split(",") if name]
    return _known(wanted, known, "row")


def parse_systems(text: str | None) -> list[str] | None:
    """Names of systems, or None for all of a row."""
    return None if text is None else _known([name for name in text.split(",") if name], list(SYSTEMS), "system")


def _known(wanted: list[str], known: list[str], what: str) -> list[str]:
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"unknown {what}: {', '.join(unknown)}; wanted some of {', '.join(known)}")
    if not wanted:
        raise ValueError(f"no {what} named; wanted some of {', '.join(known)}")
    return wanted
