"""One call from settings to an adapter, its report and its model card: what `veneer train` and a notebook call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from veneer.config import EvalSettings, RunConfig, read
from veneer.errors import ConfigError
from veneer.evaluate.model_card import write_model_card
from veneer.evaluate.publish import name_of, publish
from veneer.evaluate.run import Result
from veneer.evaluate.run_report import report_run
from veneer.train.ranks import joined
from veneer.train.run import TrainResult, train


@dataclass(frozen=True)
class Run:
    """A finished run. In a notebook it shows its report: loss curve, scores, answers, where the model changed.

    training: what the run did. address: where the adapter was uploaded to, None where it was not.
    """

    config: RunConfig
    training: TrainResult
    address: str | None = None

    @property
    def folder(self) -> Path:
        """The adapter folder: PEFT's files, veneer.json, README.md, report.html."""
        return Path(self.config.output_dir)

    def evaluate(self, dataset: str, metrics: Sequence[str] = ("loss", "exact_match"), **options: Any) -> Result:
        """Base and adapter on held-out rows, the base stored as in training; report and model card get the scores.

        options: as those of `veneer eval`. Raises ConfigError, DataError and what loading raises.
        """
        from veneer.evaluate.verb import evaluate_files

        stored = {name: getattr(self.config, name) for name in ("base_model", "dtype", *self.config.storage_options())}
        asked = {"adapter": [str(self.folder)], "dataset": dataset, "metrics": list(metrics)}
        result = evaluate_files(EvalSettings.from_flat({**stored, **asked, **options}))
        report_run(self.folder, result)
        write_model_card(self.folder)
        return result

    def _repr_html_(self) -> str:
        """The report as a page within the page, so that neither's style touches the other's."""
        page = (self.folder / "report.html").read_text(encoding="utf-8")
        style = "width: 100%; height: 760px; border: 0"
        return f'<iframe srcdoc="{escape(page, quote=True)}" style="{style}" title="Report of the run"></iframe>'


def finetune(config: RunConfig | None = None, *, resume: bool = False, progress: bool = True, **options: Any) -> Run:
    """Trains an adapter, writes its folder with report and model card, and uploads it where that is asked for.

        veneer.finetune(base_model="smollm2", dataset="train.jsonl", output_dir="out/skill", r=8)

    Takes the options of `veneer train` by name, or a RunConfig. resume: goes on from the last checkpoint. Raises what
    `veneer.train.run.train` raises, and HubError: before training where the upload could not begin, after it with the
    adapter whole in its folder.
    """
    if config is not None and not isinstance(config, RunConfig):
        raise ConfigError(f"got {config!r}, wanted options by name, base_model=..., dataset=..., or a RunConfig")
    config = read(RunConfig, config.to_flat() if config else {}, options)
    with joined() as ranks:
        if config.hub.push_to_hub and ranks.is_main:
            name_of(config.output_dir, config.hub)
        training = train(config, resume=resume, progress=progress)
        if not ranks.is_main:
            return Run(config, training)
        report_run(config.output_dir)
        write_model_card(config.output_dir)
    return Run(config, training, publish(config.output_dir, config.hub) if config.hub.push_to_hub else None)
