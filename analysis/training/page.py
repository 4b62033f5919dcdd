"""The report of a training run: curves, what the walk looked like on the way, samples, settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minitf import __version__
from minitf.analysis import page_parts
from minitf.analysis.training.log import read, statistics_in
from minitf.analysis.training.prepared import Prepared
from minitf.analysis.training.statistics import LABELS
from minitf.declaration import count
from minitf.train import trainer
from minitf.train.config import TrainConfig
from minitf.train.settings import by_name

HERE = Path(__file__).parent
SHOWN_SAMPLES = 8
SHOWN_LOST = 4
MOST_POINTS = 2000


def page(out: Path, config: TrainConfig, ready: Prepared) -> str:
    """The page of a run folder, as HTML text."""
    lines = read(out / "metrics.jsonl")
    data = {
        "training": _curve(lines, "loss"),
        "gradient": _curve(lines, "gradient_norm"),
        "validation": _curve(lines, "validation_loss"),
        "accuracy": _curve(lines, "validation_accuracy"),
        "references": ready.references,
        "models": names_of(config),
        "statistics": _statistics(out / "statistics.safetensors", trainer.models_of(config).batched),
        "unit": "squared error" if ready.program.objective == "regression" else "nats a target",
        "besides": _besides(config),
        "measured_on": ready.measured_on,
    }
    samples = read(out / "samples.jsonl")
    shown = (
        [samples[i] for i in np.unique(np.linspace(0, len(samples) - 1, SHOWN_SAMPLES).astype(int))]
        if samples
        else []
    )
    settings = [(name, str(value)) for name, value in by_name(config).items() if name not in config.sweep]
    return page_parts.render(
        HERE / "training.html.j2",
        page_parts.drawn_by(HERE / "training.js"),
        data,
        conclusions=conclusions(data, lines),
        samples=shown,
        settings=settings,
        source=ready.source,
        besides=data["besides"],
        measured_on=data["measured_on"],
        model=ready.program.model,
        parameters=f"{count(ready.program.model):,}",
        many=len(data["models"]),
        version=__version__,
    )


def names_of(config: TrainConfig) -> list[str]:
    """Of each model what makes it different: its seed, its swept numbers."""
    models = trainer.models_of(config)
    numbers = [
        [f"{name.rpartition('.')[2]} {values[i]:.3g}" for name, values in models.hyper.items()]
        for i in range(len(models.seeds))
    ]
    return [", ".join([f"seed {seed}", *rest]) for seed, rest in zip(models.seeds, numbers, strict=True)]


def _besides(config: TrainConfig) -> str:
    """What the training loss has that the validation loss has not, in brackets, or nothing."""
    o, swept = config.objective, config.sweep
    names = {"objective.label_smoothing": o.label_smoothing, "objective.z_loss": o.z_loss}
    found = [name.rpartition(".")[2].replace("_", " ") for name, value in names.items() if value or name in swept]
    return f" (with {' and '.join(found)})" if found else ""


def _curve(lines: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Steps, and values ``[model][step]``."""
    kept = [line for line in lines if name in line]
    # Of a long run some lines are enough to draw.
    kept = kept[:: -max(len(kept) // MOST_POINTS, 1)][::-1]  # the last among them
    values = np.array([np.atleast_1d(np.array(line[name], np.float64)) for line in kept])
    return {"step": [line["step"] for line in kept], "values": values.T if kept else []}


def _statistics(file: Path, batched: bool) -> dict[str, Any]:
    """By name: steps, label, axes, and the mean over models, ``[record, ...]``."""
    arrays = statistics_in(file)
    if not arrays:
        return {}
    steps = arrays.pop("step")
    found = {}
    for name, values in arrays.items():
        label, axes = LABELS["rank" if name.startswith("rank_") else name]
        if name.startswith("rank_"):
            label = f"{label}: {name.removeprefix('rank_')}"
        mean = values.mean(axis=1) if batched else values
        found[name] = {"label": label, "axes": axes, "step": steps, "values": mean}
    return found


def conclusions(data: Mapping[str, Any], lines: list[dict[str, Any]]) -> list[str]:
    """What the numbers say, in sentences."""
    found = []
    unit, models = data["unit"], data["models"]
    training, validation, accuracy = (
        np.array(data[name]["values"]) for name in ("training", "validation", "accuracy")
    )
    if training.size:
        ends = f"from {_mean(training[:, 0])} to {_mean(training[:, -1])}"
        found.append(f"Training loss{data['besides']}, {ends} ({unit}).")
    if validation.size:
        last = validation[:, -1]
        alive = np.isfinite(last)
        best = np.min(np.where(np.isfinite(validation), validation, np.inf), axis=1)
        better = alive.any() and np.mean(best[alive]) < 0.995 * np.mean(last[alive])
        right = alive.any() and accuracy.size
        found.append(
            f"On {data['measured_on']}, {_mean(last)}"
            + (f" (at best {_mean(best)})" if better else "")
            + (f", {100 * np.mean(accuracy[alive, -1]):.1f} % right." if right else ".")
        )
        if len(models) > 1 and alive.any():
            number = int(np.argmin(np.where(alive, last, np.inf)))
            found.append(f"The best of the {len(models)} at the end: {models[number]}, with {last[number]:.3f}.")
        if not alive.all():
            lost = [name for name, lives in zip(models, alive, strict=True) if not lives]
            rest = f" and {len(lost) - SHOWN_LOST} more" if len(lost) > SHOWN_LOST else ""
            named = f": {'; '.join(lost[:SHOWN_LOST])}{rest}" if len(models) > 1 else ""
            found.append(f"{len(lost)} of {len(models)} models lost, their loss no finite number{named}.")
    skipped = sum(np.atleast_1d(line.get("skipped", 0)) for line in lines)
    if np.any(skipped):
        most = f"{np.max(skipped)} steps" + (" of a model" if len(models) > 1 else "")
        found.append(f"{'Up to ' if len(models) > 1 else ''}{most} were not finite, and changed nothing.")
    for name, value in data["references"].items():
        found.append(f"To compare: {name}, {value:.3f}.")
    rates = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    if rates:
        found.append(f"{np.median(rates):,.0f} tokens a second.")
    shares = [line["utilization"] for line in lines if line.get("utilization")]
    if shares:
        found.append(f"{np.median(shares):.1%} of what the devices could multiply at most.")
    return found


def _mean(values: np.ndarray) -> str:
    """Of all models, with the smallest and the largest; those that were lost do not count."""
    values = values[np.isfinite(values)]
    if not len(values):
        return "no finite number"
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} (between {np.min(values):.3f} and {np.max(values):.3f})"
