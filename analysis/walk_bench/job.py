"""The rows of ``minitf bench walk``."""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minitf.analysis import bench
from minitf.analysis.bench import Row, Say, Worker
from minitf.analysis.walk_bench.sizes import NEW_TOKENS, READ, WRITE, Size
from minitf.declaration import initialize
from minitf.pretrained import Pretrained, save

HERE = Path(__file__).parent
OURS = "minitf.analysis.walk_bench.ours"
# Heads' outputs replaced by those of another run; heads' associations made uniform. Both one by one.
SWEEPS = ("sweep", "ablation")
# A step's large arrays otherwise go back to the system and come again, page by page, in every run of either side.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}
# Least work for one reading, in forward passes of the largest size; smaller models repeat what they do.
REPEATS = {64: 20, 256: 3, 320: 1, 768: 1}
NOTE = (
    "one core, one thread, float32, random weights; CPU time of whole processes in turns, same allocator settings"
)


def bench_walk(
    *,
    seed: int = 0,
    rounds: int = 3,
    say: Say = lambda sentence: None,
    pythons: Sequence[str] = (),
    read: Sequence[Size] = READ,
    write: Sequence[Size] = WRITE,
    device: bench.Device | None = None,
) -> Iterator[Row]:
    """Forward passes, whole walks, sweeps, attribution and decoding, beside TransformerLens and transformers.

    Args:
        seed: of the weights and tokens, the same for all sides.
        rounds: how often each side is measured, in turns.
        say: told what is being measured.
        pythons: interpreters of environments with other versions of TransformerLens.
        read: models for everything but decoding.
        write: models for decoding.
        device: to measure on; the one that JAX finds, unless it is given.

    Raises:
        RuntimeError: a side fails, or its sweep or text differs from ours: then there is nothing to compare.
    """
    device = device or bench.device()
    environment, note = ALLOCATOR, NOTE
    if device.kind != "cpu":
        environment, note = {}, f"{device.name}, float32, random weights; by the clock, in turns"
    with ExitStack() as stack:
        here = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        say("starting the workers")
        ours = stack.enter_context(Worker("-m", OURS, device.kind, environment=environment))
        peers = []
        if bench.installed("torch") and bench.installed("transformers"):
            peers.append(sys.executable)
        workers = [
            stack.enter_context(Worker(str(HERE / "peer.py"), device.kind, python=python, environment=environment))
            for python in (*peers, *pythons)
        ]
        for number, size in enumerate((*read, *write)):
            folder = _written(here / str(number), size, seed)
            tasks = ("generate",) if size in write else ("forward", "everything", *SWEEPS, "gradient", "memory")
            yield from _rows(folder, size, tasks, ours, workers, rounds, say, note)


def _written(folder: Path, size: Size, seed: int) -> Path:
    """The model and two inputs, where every side finds them."""
    config = size.config
    parameters = initialize(config, jax.random.key(seed))
    save(folder, Pretrained("gpt2", config, parameters))
    tokens = jax.random.randint(jax.random.key(seed + 1), (2, size.batch, size.length), 0, config.vocabulary)
    (folder / "tokens.json").write_text(json.dumps(tokens.tolist()))
    return folder


def _rows(
    folder: Path,
    size: Size,
    tasks: Sequence[str],
    ours: Worker,
    workers: Sequence[Worker],
    rounds: int,
    say: Say,
    note: str,
) -> list[Row]:
    asked = {"folder": str(folder), "size": {"new_tokens": NEW_TOKENS, "rows": size.batch * size.length}}
    sides: dict[str, tuple[Worker, str]] = {task: (ours, task) for task in tasks if task != "memory"}
    for worker in workers:
        versions = worker.greeting
        lens, hf = (f"{name} {versions.get(name)}" for name in ("transformer-lens", "transformers"))
        for task in tasks:
            if task in ("forward", "everything", *SWEEPS) and "transformer-lens" in versions:
                sides[f"{task} {lens}"] = (worker, task)
            if task in ("forward", "generate"):
                sides[f"{task} {hf}"] = (worker, f"hf {task}")
    first: dict[str, Any] = {}
    for name, (worker, task) in sides.items():
        say(f"{size.name}: first run of {name}")
        first[name] = worker.ask(json.dumps({**asked, "task": task, "repeats": 0}))["value"]
    _check(first, size)

    def measure(worker: Worker, task: str) -> float:
        repeats = REPEATS.get(size.width, 1)
        return worker.ask(json.dumps({**asked, "task": task, "repeats": repeats}))["seconds"]

    measured = bench.interleaved(
        {name: partial(measure, *side) for name, side in sides.items()},
        rounds,
        lambda sentence: say(f"{size.name}: {sentence}"),
    )
    rows = []
    for name, seconds in measured.items():
        task, _, peer = name.partition(" ")
        if peer:
            rows.append(bench.cost_row(f"{task}, {size.name}", peer, measured[task], seconds, "s", note))
    if "forward" in tasks:
        rows += _in_forwards(measured, size, note)
        rows += _memory_rows(ours.ask(json.dumps({**asked, "task": "memory", "repeats": 0}))["value"], size)
    elif not workers:
        rows.append(bench.missing_row(f"generate, {size.name}", "transformers", measured["generate"], "s"))
    return rows


def _check(first: dict[str, Any], size: Size) -> None:
    """Every side found the same effects, and wrote the same tokens."""
    for name, value in first.items():
        task, _, peer = name.partition(" ")
        if peer and task in SWEEPS:
            # numpy's maximum passes on what is no number.
            most = float(np.max(np.abs(np.subtract(value, first[task]))))
            scale = max(abs(a) for a in first[task])
            if not most <= 1e-4 * scale:
                raise RuntimeError(f"{size.name}: the {task} of {peer} differs from ours by {most} of {scale}")
        if peer and task == "generate" and value != first["generate"]:
            raise RuntimeError(f"{size.name}: {peer} writes other tokens than we do")


def _in_forwards(measured: dict[str, list[float]], size: Size, note: str) -> list[Row]:
    names = {
        "everything": "the whole walk kept",
        "sweep": f"sweep over {size.layers * size.heads} heads",
        "ablation": f"associations of {size.layers * size.heads} heads made uniform, one by one",
        "gradient": "one gradient for every leaf",
    }
    rows = [
        bench.value_row(
            f"{what}, {size.name}",
            [a / b for a, b in zip(measured[task], measured["forward"], strict=True)],
            "of our forward passes",
            note,
        )
        for task, what in names.items()
    ]
    counted = "multiplications of the sweep, from each edit's layer on, over those of a forward pass"
    rows.append(
        bench.value_row(f"the sweep's arithmetic, {size.name}", [size.sweep], "of our forward passes", counted)
    )
    return rows


def _memory_rows(memory: dict[str, int], size: Size) -> list[Row]:
    beyond = memory["output"] + memory["temporary"] - memory["temporary_plain"] - memory["arrays"]
    return [
        bench.value_row(f"the whole walk's arrays, {size.name}", [memory["arrays"] / 2**20], "MiB"),
        bench.value_row(
            f"memory beyond those, {size.name}",
            [beyond / 2**20],
            "MiB",
            "outputs and temporaries of the compiled program, less those of a plain forward pass, less the arrays",
        ),
    ]
