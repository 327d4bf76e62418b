"""Our side of the GPU comparison: the library's own loop over synthetic rows, which is what `veneer train` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from benchmarks.gpu_meter import Meter
from benchmarks.gpu_model import batch_of, fresh
from benchmarks.gpu_spec import Spec

SLOT = "default"
LEARNING_RATE = 1e-4
IN_BACKWARD = "in-backward"  # all layers recomputed, and each updated as its backward ends
STORAGES = {"nf4": "nf4-dq", "fp8": "fp8"}  # as bitsandbytes has it in QLoRA, with double quantisation


def train(spec: Spec, meter: Meter, device: str = "cuda") -> Sequence[Tensor]:
    """Trains spec.steps steps; returns the optimiser's moments."""
    from veneer.model.layers import arrange
    from veneer.train.allocator import growing_segments
    from veneer.train.loop import loop

    growing_segments()
    model = built(spec, device)
    job = job_of(spec, model)
    if job.parted is not None:
        arrange(model, spec.compile, recompute=-1, ended=job.layer_ended)
    job.update = marked(job.update, meter)
    meter.ready([job.flat.values_P])
    loop(
        model,
        [job],
        record=lambda _, facts: meter.losses.append(facts["loss"]),
        save=lambda _: None,
        graphs=spec.compile and spec.recompute not in ("offload", IN_BACKWARD),
    )
    return moments_of(job)


def marked(update: Callable[..., Any], meter: Meter) -> Callable[..., Any]:
    """The optimiser's step, which is a step's last, with a mark after it: the loop reads a loss a step later."""

    def then_marked(*given: Any) -> Any:
        told = update(*given)
        meter.mark()
        return told

    return then_marked


def built(spec: Spec, device: str) -> Any:
    """The model with its base stored as asked, an adapter on every linear layer, compiled and recomputed as asked."""
    from veneer.adapter.attach import attach
    from veneer.config import LoraSettings
    from veneer.model.layers import arrange
    from veneer.model.load import prepare

    each = None if spec.storage == "bf16" else lambda model, path: _store(model, path, spec.storage)
    model = fresh(spec.shape, device, each=each, sequence=spec.sequence).eval()
    prepare(model)
    attach(model, LoraSettings(r=spec.rank, lora_alpha=spec.alpha), SLOT, seed=0)
    recompute, offload = recomputed_layers(spec.recompute), spec.recompute == "offload"
    decoded = not offload and spec.cap_gib is None  # as `fit` decides where the memory is not scarce
    arrange(model, compiled=spec.compile, recompute=recompute, offload=offload, decoded=decoded)
    return model


def job_of(spec: Spec, model: nn.Module) -> Any:
    """The job over rows that come in the order in which the peers see them."""
    from veneer.adapter.attach import methods_of
    from veneer.config import TrainSettings
    from veneer.train.job import Job

    in_backward = spec.recompute == IN_BACKWARD
    settings = TrainSettings(
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch // spec.passes,
        gradient_accumulation_steps=spec.passes,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        save_steps=spec.steps + 1,
        load_best_model_at_end=False,
        optim=spec.optim,
        optimizer_in_bwd=in_backward,
        max_grad_norm=0.0 if in_backward else 1.0,
    )
    return Job(SLOT, settings, examples(spec, settings.seed), (), LEARNING_RATE, methods_of(model, SLOT))


def examples(spec: Spec, seed: int) -> list[Any]:
    """One epoch: the rows that `Batches` picks for step s are those of `batch_of(spec, s)`."""
    from veneer.data.batches import Batches
    from veneer.data.chat import Example

    batches = Batches(spec.batch * spec.steps, spec.batch, seed)
    made: dict[int, Any] = {}
    for step in range(spec.steps):
        for row, ids in zip(batches.rows(step), batch_of(spec, step).tolist(), strict=True):
            made[row] = Example(tuple(ids), (True,) * spec.sequence, row, 0)
    return [made[row] for row in range(len(made))]


def moments_of(job: Any) -> list[Tensor]:
    """The optimiser's running averages."""
    states = job.optimizer.state.values()
    return [state[name] for state in states for name in ("exp_avg", "exp_avg_sq") if name in state]


def _store(model: nn.Module, path: str, storage: str) -> None:
    """Packs the linear layer at `path` now; the dense weight is freed before the next layer is made."""
    from veneer.model.quantised import storage_class
    from veneer.model.swap import place_leaf

    linear = model.get_submodule(path)
    base = storage_class(STORAGES[storage]).from_linear(linear)
    if storage == "fp8":
        base.add_transposed(linear.weight)  # as the loader does where memory allows
    place_leaf(model, path, base)


def recomputed_layers(recompute: str) -> int:
    """none, all of them (-1), or how many."""
    return (
        int(recompute) if recompute.isdigit() else {"none": 0, "layers": -1, "offload": -1, IN_BACKWARD: -1}[recompute]
    )
