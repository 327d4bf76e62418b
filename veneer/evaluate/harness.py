"""Tasks of lm-evaluation-harness (EleutherAI, `lm_eval`) on base and adapters, with our intervals where rows allow it.

lm_eval is an optional dependency. A task's metric that is the mean of what its rows score gets an interval and a paired
difference; of any other (perplexity of a corpus, groups of tasks) lm_eval's figure stands alone.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from veneer.errors import ConfigError, VeneerError
from veneer.evaluate.intervals import MEAN, RATIO, Measured, Score, weighted
from veneer.evaluate.result import Result


def check_installed() -> None:
    """ConfigError where lm_eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--harness needs lm-evaluation-harness, which is not installed; next: pip install lm-eval")


def evaluate_tasks(
    loaded: Any,
    tasks: Sequence[str],
    *,
    slots: Mapping[str, str | None],
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    system_prompt: str | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> Result:
    """Each slot of `loaded` on lm_eval's tasks: their names, or YAML files of one's own.

    Raises ConfigError where lm_eval is missing or does not accept the tasks.
    """
    check_installed()
    import lm_eval

    from veneer.evaluate.harness_model import HarnessModel

    options: dict[str, Any] = {"num_fewshot": num_fewshot, "limit": limit, "apply_chat_template": apply_chat_template}
    options["system_instruction"] = system_prompt if apply_chat_template else None
    found: dict[str, dict[str, Any]] = {}
    for label, slot in slots.items():
        progress(f"{label}: {', '.join(tasks)}")
        try:
            found[label] = lm_eval.simple_evaluate(
                model=HarnessModel(loaded, slot, batch_size), tasks=list(tasks), bootstrap_iters=0, **options
            )
        except VeneerError:  # ours already, though a ConfigError is a ValueError
            raise
        except (ImportError, KeyError, OSError, ValueError) as error:
            raise ConfigError(
                f"lm_eval cannot run {', '.join(tasks)}: {type(error).__name__}: {error}. `lm_eval ls tasks` lists its "
                "tasks; their data sets are downloaded unless they are local."
            ) from error
    settings = {
        "base_model": loaded.name,
        "storage": loaded.storage,
        "dataset": f"lm_eval {getattr(lm_eval, '__version__', '')}: {', '.join(tasks)}",
        "slots": dict(slots),
        "seed": seed,
        "system_prompt": system_prompt,
        **{name: options[name] for name in ("num_fewshot", "limit", "apply_chat_template")},
    }
    return _result(found, settings, seed)


def _result(found: Mapping[str, Mapping[str, Any]], settings: dict[str, Any], seed: int) -> Result:
    scores: dict[str, dict[str, Score]] = {}
    differences: dict[str, dict[str, Score]] = {}
    first = next(iter(found.values()))
    for task, metric, kind in _figures(first):
        name = f"{task}/{metric}" + ("" if kind == "none" else f",{kind}")
        totals = {label: float(results["results"][task][f"{metric},{kind}"]) for label, results in found.items()}
        rows = {label: _rows(results, task, metric, kind) for label, results in found.items()}
        if all(_is_mean(rows[label], total) for label, total in totals.items()):
            right_or_wrong = all(value in (0, 1) for values in rows.values() for value in values)
            statistics = {label: weighted(values) for label, values in rows.items()}
            measured = Measured(MEAN if right_or_wrong else RATIO, statistics)
            scores[name], differences[name] = measured.scores(seed), measured.differences(seed)
        else:
            scores[name] = {
                label: Score(total, None, None, _count(found[label], task, kind)) for label, total in totals.items()
            }
            (_, before), *others = scores[name].items()
            differences[name] = {
                label: Score(after.score - before.score, None, None, after.n) for label, after in others
            }
    n = sum(count["effective"] for count in first["n-samples"].values())
    return Result(scores, differences, (), n, settings)


def _figures(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Task, metric and filter of every figure: lm_eval's keys are `metric,filter`."""
    for task, figures in results["results"].items():
        for key, value in figures.items():
            metric, comma, kind = key.rpartition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                yield task, metric, kind


def _rows(results: Mapping[str, Any], task: str, metric: str, kind: str) -> list[float]:
    """What each row of a task scores; empty for a group, and where that is not one number."""
    rows = [sample.get(metric) for sample in results["samples"].get(task, ()) if sample["filter"] == kind]
    numbers = [float(value) for value in rows if isinstance(value, int | float) or hasattr(value, "item")]
    return numbers if len(numbers) == len(rows) else []


def _count(results: Mapping[str, Any], task: str, kind: str) -> int:
    """Rows of a task, and 0 of a group of tasks."""
    return sum(sample["filter"] == kind for sample in results["samples"].get(task, ()))


def _is_mean(rows: Sequence[float], total: float) -> bool:
    return bool(rows) and math.isclose(math.fsum(rows) / len(rows), total, rel_tol=1e-9, abs_tol=1e-12)
