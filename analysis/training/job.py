"""The command ``minitf train``: train what a configuration says, keep everything, lose nothing.

The same command again goes on from the newest checkpoint, with the same numbers as if it had never stopped.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh

from minitf.analysis.flops import flops
from minitf.analysis.run_folder import Diverged, Problem, open_run_folder, told_to_people
from minitf.analysis.training.devices import peak
from minitf.analysis.training.distributed import first_alone, is_first
from minitf.analysis.training.log import Log, lines_of, read
from minitf.analysis.training.page import page
from minitf.analysis.training.prepared import Prepared, prepared
from minitf.analysis.training.statistics import statistics
from minitf.analysis.training.stopping import Terminated, noticing_signals
from minitf.decode import Sampling, generate
from minitf.families import native
from minitf.files import write_atomically
from minitf.train import sharding, trainer
from minitf.train.checkpoints import Checkpoints, dynamics_steps
from minitf.train.config import TrainConfig
from minitf.train.progress import Progress
from minitf.train.settings import as_tables, as_toml
from minitf.train.step import State
from minitf.train.trainer import Compiled, Evaluation, Taken

Tree = Any
# What may change when a run goes on: where it runs and what it keeps, not what it computes.
FREE = ("mesh", "keep")


def run(config: TrainConfig, out: Path, *, overwrite: bool = False, quiet: bool = False) -> Path:
    """Train, or go on; write everything to ``out``; returns the report's path.

    Raises:
        Problem: configuration, data, folder or device cannot be used; training stopped being finite (exit code 1);
            SIGTERM (143). Its message is for people.
        KeyboardInterrupt: Ctrl-C; everything is kept.
    """
    with told_to_people():
        mesh = sharding.mesh_of(config.mesh)
    settings = {
        f"{group}.{name}": value for group, fields in as_tables(config).items() for name, value in fields.items()
    }
    held = {name: value for name, value in settings.items() if name.partition(".")[0] not in FREE}
    with Progress(quiet or not is_first(), remaining=True) as progress, told_to_people():
        with first_alone("data"):
            if is_first():
                open_run_folder(out, held, overwrite=overwrite, resume=not overwrite)
                write_atomically(out / "config.toml", as_toml(as_tables(config)).encode())
            ready = prepared(config, out / "data", progress.note)
            _check_data(out, ready)
        if not _finished(config, out):
            _train(config, ready, mesh, out, progress)
    report = out / "report.html"
    if is_first():
        write_atomically(report, page(out, config, ready).encode())
    return report


def _finished(config: TrainConfig, out: Path) -> bool:
    """Whether an earlier run took the last step and left its models."""
    many = len(trainer.models_of(config).seeds)
    folders = [out / "model"] if many == 1 else [out / "models" / str(number) for number in range(many)]
    return all((folder / "config.json").exists() for folder in folders)


def _train(config: TrainConfig, ready: Prepared, mesh: Mesh, out: Path, progress: Progress) -> None:
    with told_to_people():
        work = flops(ready.program.gradient, *_shapes(ready))
        models = trainer.models_of(config)
        progress.note(_what(ready, models, work))
        programs = trainer.compiled(ready.program, mesh, work * len(models.seeds), ready.length)
        with Checkpoints(out / "checkpoints", config.keep, config.training.steps) as checkpoints:
            training = Training(config, ready, programs, mesh, models, checkpoints, out, progress, work)
            with _writing(out):
                training.run()


class Training:
    """A run under way: from stop to stop, and what is due at each."""

    def __init__(
        self,
        config: TrainConfig,
        ready: Prepared,
        programs: Compiled,
        mesh: Any,
        models: trainer.Models,
        checkpoints: Checkpoints,
        out: Path,
        progress: Progress,
        work: float,
    ) -> None:
        self.config, self.ready, self.programs, self.mesh, self.models = config, ready, programs, mesh, models
        self.checkpoints, self.out, self.progress, self.work = checkpoints, out, progress, work
        self.batched = models.batched
        self.evaluate = trainer.evaluator(ready.program, mesh, self.batched)
        one = lambda parameters: statistics(parameters, ready.looked_at, ready.program.model)
        self.look = jax.jit(lambda many: jax.lax.map(one, many) if self.batched else one(many))
        self.tokens = len(models.seeds) * config.training.batch * ready.length  # of a step
        self.was_told: set[int] = set()

    def run(self) -> None:
        """From the newest checkpoint, or the start, to the last step."""
        steps = self.config.training.steps
        if self.checkpoints.steps():
            done, state = self.checkpoints.restore(self.programs.state)
            self.progress.note(f"going on from step {done}")
        else:
            done, state = 0, self.programs.start()
        self.log = Log(self.out / "metrics.jsonl", done, is_first())
        self.samples = Log(self.out / "samples.jsonl", done, is_first())
        self.looks = Looks(self.out / "statistics.safetensors", done)
        if not done:
            self.due(0, state)
        stops = [step for step in self.stops() if step > done]
        with (
            noticing_signals() as asked,
            self.progress.stage("training", steps, first=done, per_step=self.tokens, unit="tok/s") as report,
        ):
            state = self.through(
                trainer.run(self.programs, state, done, stops, self.ready.windows, self.mesh), state, report, asked
            )
        self.finish(state)

    def through(
        self,
        calls: Iterator[Taken],
        state: State,
        report: Callable[[int, float], None],
        asked: Callable[[], int | None],
    ) -> State:
        """Every call; what one measured is read when the next is under way, so that the device never waits."""
        stops, waiting, began = set(self.stops()), None, time.monotonic()
        for taken in calls:
            state = taken.state
            if waiting is not None:
                began = self.told(waiting, began, report)
            waiting = taken
            ending = asked()
            if taken.done in stops or ending:
                began = self.told(waiting, began, report)
                waiting = None
                self.due(taken.done, state, ending=bool(ending))
            if ending:
                self.end(taken.done, ending)
        return state

    def told(self, taken: Taken, began: float, report: Callable[[int, float], None]) -> float:
        """Read, write and show what a call measured. Raises Diverged where training must stop."""
        measures = {
            name: np.asarray(value)[..., : taken.done - taken.first]
            for name, value in vars(taken.measures).items()
        }
        now = time.monotonic()
        lines = list(lines_of(taken.first, measures, taken.done))
        rate = (taken.done - taken.first) / max(now - began, 1e-9)
        lines[-1]["tokens_per_second"] = rate * self.tokens
        share = self.utilization(rate)
        if share is not None:
            lines[-1]["utilization"] = share
        self.log.add(lines)
        finite = np.isfinite(measures["loss"]) & np.isfinite(measures["gradient_norm"])
        last = measures["loss"][..., -1]
        report(taken.done, float(np.mean(last[np.isfinite(last)])) if np.isfinite(last).any() else float("nan"))
        if not finite.all():
            self.not_finite(taken.first, finite)
        return now

    def utilization(self, steps_per_second: float) -> float | None:
        """The share of what the devices could multiply at most; None where that is not known."""
        devices = self.mesh.devices.flatten()
        most = peak(devices[0].device_kind)
        work = self.work * len(self.models.seeds)
        return None if most is None else steps_per_second * work / (most * devices.size)

    def not_finite(self, first: int, finite: np.ndarray) -> None:
        """Tell people, or stop: of many models only when all of them are lost."""
        by_model = finite.reshape(-1, finite.shape[-1])
        where = "{} at step {} (sequences {} to {} of its data)"
        size = self.config.training.batch
        for model in np.flatnonzero(~by_model.all(axis=1)):
            step = first + int(np.argmin(by_model[model]))
            what = where.format(
                "its loss or gradient is not a finite number", step, step * size, (step + 1) * size - 1
            )
            if model not in self.was_told:
                self.progress.note(f"model {model}: {what}; such steps change nothing")
            self.was_told.add(int(model))
        if self.config.training.when_not_finite == "stop" and not by_model.all(axis=1).any():
            kept = self.checkpoints.steps()
            raise Diverged(
                f"training stopped: {what}. "
                + (
                    f"The last good checkpoint is of step {kept[-1]}, in {self.checkpoints.folder}. "
                    if kept
                    else ""
                )
                + "Choose a smaller optimizer.rate or a longer optimizer.warm_up, or training.when_not_finite=skip."
            )

    def stops(self) -> list[int]:
        """The steps at which something is due."""
        keep, steps = self.config.keep, self.config.training.steps
        every = (keep.checkpoint_every, keep.evaluate_every, keep.statistics_every, keep.sample_every)
        found = {step for interval in every if interval for step in range(interval, steps, interval)}
        return sorted({*found, *(dynamics_steps(steps) if keep.dynamics else ()), steps} - {0})

    def due(self, step: int, state: State, ending: bool = False) -> None:
        """What is due after so many steps: measure, then keep."""
        keep, steps = self.config.keep, self.config.training.steps
        is_due = lambda interval: bool(interval) and (step % interval == 0 or step == steps)
        weights = state.parameters if state.average is None else state.average
        if is_due(keep.evaluate_every):
            self.log.add([{"step": step, **_of_validation(self.evaluate(weights, self.ready.held_out))}])
        if is_due(keep.statistics_every):
            self.looks.add(step, jax.tree.map(np.asarray, self.look(weights)))
        if is_due(keep.sample_every) and self.ready.vocabulary is not None and self.ready.program.model.causal:
            self.samples.add(self.sampled(step, weights))
        dynamics = keep.dynamics and step in dynamics_steps(steps)
        if ending or dynamics or step == steps or (step and is_due(keep.checkpoint_every)):
            if is_first():
                self.looks.write()
            self.checkpoints.save(step, state)

    def sampled(self, step: int, weights: Tree) -> list[dict[str, Any]]:
        """How the first model goes on from the prompt."""
        vocabulary, config = self.ready.vocabulary, self.ready.program.model
        assert vocabulary is not None
        prompt = vocabulary.encode(self.config.keep.prompt).tolist() or [int(self.ready.looked_at.tokens[0, 0])]
        most = config.length - 1
        prompt = prompt[-max(most // 2, 1) :]
        many = min(self.config.keep.sample_tokens, config.length - len(prompt))
        one = jax.tree.map(lambda x: x[0], weights) if self.batched else weights
        # Tokens that only fill up the vocabulary have never been seen.
        made = generate(
            one,
            [prompt],
            config,
            steps=many,
            sampling=Sampling(temperature=0.8, top_k=50),
            key=jax.random.fold_in(jax.random.key(self.config.training.seed), step),
        )
        ids = np.array([*prompt, *np.asarray(made.tokens[0]).tolist()])
        return [{"step": step, "text": vocabulary.decode(ids[ids < vocabulary.size])}]

    def end(self, step: int, asked: int) -> None:
        """End in order, as a signal asked."""
        self.checkpoints.wait()
        if asked == signal.SIGTERM:
            raise Terminated(
                f"terminated after step {step}; everything is kept, and the same command goes on from there."
            )
        raise KeyboardInterrupt

    def finish(self, state: State) -> None:
        """The trained models, as files that :func:`minitf.pretrained.load` and ``minitf walk`` read."""
        self.checkpoints.wait()
        weights = state.parameters if state.average is None else state.average
        # Of several processes each has its part.
        weights = jax.jit(lambda x: x, out_shardings=sharding.everywhere(self.mesh))(weights)
        if not is_first():
            return
        folders: Sequence[Path] = [self.out / "model"]
        if self.batched:
            folders = [self.out / "models" / str(number) for number in range(len(self.models.seeds))]
        for number, folder in enumerate(folders):
            if (folder / "config.json").exists():
                continue
            one = jax.tree.map(lambda x: x[number], weights) if self.batched else weights  # noqa: B023
            if self.ready.vocabulary is not None:
                folder.mkdir(parents=True, exist_ok=True)
                self.ready.vocabulary.save(folder)
            native.save(folder, self.ready.program.model, one)


class Looks:
    """Statistics at some steps, as arrays ``[record, ...]`` in a file; those of later steps than ``step`` are dropped."""

    def __init__(self, file: Path, step: int) -> None:
        self.file, self.steps, self.found = file, [], []  # type: ignore[var-annotated]
        if file.exists() and step:
            arrays = safetensors.numpy.load_file(file)
            self.steps = [one for one in arrays.pop("step").tolist() if one <= step]
            self.found = [{name: x[place] for name, x in arrays.items()} for place in range(len(self.steps))]

    def add(self, step: int, found: dict[str, np.ndarray]) -> None:
        """Of one more step."""
        self.steps.append(step)
        self.found.append(found)

    def write(self) -> None:
        """All there are. Raises OSError."""
        if self.steps:
            arrays = {name: np.stack([one[name] for one in self.found]) for name in self.found[0]}
            arrays["step"] = np.array(self.steps)
            write_atomically(self.file, safetensors.numpy.save(arrays))


def _of_validation(found: Evaluation) -> dict[str, np.ndarray]:
    return {"validation_loss": found.loss, "validation_accuracy": found.accuracy}


def _shapes(ready: Prepared) -> tuple[Any, ...]:
    """What one model's gradient takes, as shapes: the operations of a step are counted on them."""
    program = ready.program
    key = jax.random.key(0)
    window = jax.ShapeDtypeStruct((program.config.training.batch, ready.length + 1), np.int32)
    numbers = {name: 1.0 for name in program.config.sweep}
    state = jax.eval_shape(lambda: program.start(key, numbers))
    batch = jax.eval_shape(lambda w: program.batch(key, np.int32(0), w), window)
    return state.parameters, batch, numbers, key


def _what(ready: Prepared, models: trainer.Models, work: float) -> str:
    """What is about to be trained, in a sentence."""
    from minitf.parameters import count  # noqa: PLC0415

    model, many = ready.program.model, len(models.seeds)
    device = jax.devices()[0]
    each = "" if many == 1 else f"{many} models of "
    return (
        f"{each}{count(model):,} parameters ({model.layers} layers, width {model.width}), on {ready.source}; "
        f"{work / 1e9:.3g} GFLOP a step{' each' if many > 1 else ''}, on {device.device_kind}"
    )


def _check_data(out: Path, ready: Prepared) -> None:
    """Refuse to go on with other data than the run began with."""
    file, now = out / "data.json", json.loads(json.dumps(ready.identity))
    if not ready.identity:
        return
    if file.exists() and read_json(file) != now:
        raise Problem(
            f"the files that {out} trains on have changed since it began. Put them back, or use --overwrite to begin "
            "anew."
        )
    write_atomically(file, (json.dumps(now, indent=1) + "\n").encode())


def read_json(file: Path) -> Any:
    """What a file of JSON holds; None where it is damaged."""
    try:
        return json.loads(file.read_bytes())
    except ValueError:
        return None


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Tell people what to do where results cannot be written."""
    try:
        yield
    except OSError as error:
        raise Problem(
            f"the results could not be written to {out}: {error}. The checkpoints before are whole; when this is put "
            "right, the same command goes on from the newest."
        ) from error


__all__ = ["Training", "read", "run"]
