"""A training run under way: from stop to stop, and what is due at each."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from minitf.analysis.run_folder import Diverged
from minitf.analysis.training.boards import Board, show
from minitf.analysis.training.devices import peak
from minitf.analysis.training.distributed import agreed, is_first
from minitf.analysis.training.log import Log, Looks, lines_of
from minitf.analysis.training.prepared import Prepared
from minitf.analysis.training.statistics import looker
from minitf.analysis.training.stopping import Terminated, noticing_signals
from minitf.decode import Sampling, generate
from minitf.families import native
from minitf.train import sharding, trainer
from minitf.train.checkpoints import Checkpoints, dynamics_steps
from minitf.train.config import TrainConfig, unread
from minitf.train.progress import Progress
from minitf.train.step import State
from minitf.train.trainer import Compiled, Taken

Tree = Any
MOST_SKIPPED = 100  # steps in a row, of all models, after which nothing more is to be expected


class Training:
    """A run under way: from stop to stop, and what is due at each."""

    def __init__(
        self,
        config: TrainConfig,
        ready: Prepared,
        programs: Compiled,
        mesh: Mesh,
        models: trainer.Models,
        checkpoints: Checkpoints,
        out: Path,
        progress: Progress,
        work: float,
        boards: Sequence[Board],
    ) -> None:
        self.config, self.ready, self.programs, self.mesh, self.models = config, ready, programs, mesh, models
        self.checkpoints, self.out, self.progress, self.work = checkpoints, out, progress, work
        self.boards = boards
        self.batched = models.batched
        at_once = None if jax.default_backend() == "cpu" else programs.at_once
        self.evaluate = trainer.evaluator(ready.program, mesh, self.batched, at_once)
        whole = sharding.everywhere(mesh)
        self.norm = jax.jit(optax.tree.norm, out_shardings=whole)
        self.look = looker(ready.looked_at, ready.program.model, self.batched, ready.filler, whole)
        self.tokens = len(models.seeds) * config.training.batch * ready.length  # of a step
        model = ready.program.model
        # What can write: with room for a token after the first.
        self.writes = ready.vocabulary is not None and model.length > 1 and ready.program.objective == "next_token"
        self.was_told: set[int] = set()
        self.skips = config.training.when_not_finite == "skip"
        self.lost_in_a_row = np.zeros(len(models.seeds), int)

    def run(self) -> None:
        """From the newest checkpoint, or the start, to the last step."""
        steps = self.config.training.steps
        if self.checkpoints.steps():
            done, state = self.checkpoints.restore(self.programs.state)
            self.progress.note(f"going on from step {done}")
        else:
            done, state = 0, self.programs.start()
            if (self.out / "metrics.jsonl").exists():
                self.progress.note("there is no checkpoint to go on from: training begins anew")
        self.log = Log(self.out / "metrics.jsonl", done, is_first())
        self.samples = Log(self.out / "samples.jsonl", done, is_first())
        self.looks = Looks(self.out / "statistics.safetensors", done)
        if self.looks.damaged:
            self.progress.note(f"{self.looks.file.name} is damaged; statistics begin anew")
        for name in unread(self.config.optimizer):
            self.progress.note(f"optimizer.{name} is not read by {self.config.optimizer.name}")
        if self.config.keep.sample_every and not self.writes:
            self.progress.note("keep.sample_every: there are no samples of what predicts no next tokens of a text")
        if not done:
            self.due(0, state)
        stops = [step for step in self.stops() if step > done]
        calls = trainer.run(self.programs, state, done, stops, self.ready.windows, self.mesh)
        with noticing_signals() as asked:
            with self.progress.stage("training", steps, first=done, per_step=self.tokens, unit="tok/s") as report:
                state = self.through(calls, state, report, asked)
            self.finish(state)
            ending = asked()
            if ending:
                self.end(steps, ending)

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
            ending = agreed(asked())
            if taken.done in stops or ending:
                began = self.told(waiting, began, report)
                waiting = None
                self.due(taken.done, state, ending=bool(ending))
                began = time.monotonic()  # what was due is no training
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
        lines = list(lines_of(taken.first, measures, taken.done, self.skips))
        rate = (taken.done - taken.first) / max(now - began, 1e-9)
        lines[-1]["tokens_per_second"] = rate * self.tokens
        share = self.utilization(rate)
        if share is not None:
            lines[-1]["utilization"] = share
        self.told_all(lines)
        finite = np.isfinite(measures["loss"]) & np.isfinite(measures["gradient_norm"])
        last = measures["loss"][..., -1]
        report(taken.done, float(np.mean(last[np.isfinite(last)])) if np.isfinite(last).any() else float("nan"))
        by_model = finite.reshape(-1, finite.shape[-1])
        since = np.argmax(by_model[:, ::-1], axis=1)  # the last finite step
        self.lost_in_a_row = np.where(by_model.any(axis=1), since, self.lost_in_a_row + by_model.shape[1])
        if not finite.all():
            self.not_finite(taken.first, by_model)
        return now

    def told_all(self, lines: list[dict[str, Any]]) -> None:
        """Lines for the log and every board."""
        self.log.add(lines)
        show(self.boards, lines)

    def utilization(self, steps_per_second: float) -> float | None:
        """The share of what the devices could multiply at most; None where that is not known."""
        devices = self.mesh.devices.flatten()
        most = peak(devices[0].device_kind)
        work = self.work * len(self.models.seeds)
        return None if most is None else steps_per_second * work / (most * devices.size)

    def not_finite(self, first: int, by_model: np.ndarray) -> None:
        """Tell people, or stop: of many models only when all of them are lost."""
        size, skips, kept = self.config.training.batch, self.skips, self.checkpoints.steps()
        for model in np.flatnonzero(~by_model.all(axis=1)).tolist():
            step = first + int(np.argmin(by_model[model]))
            what = (
                f"the loss or gradient of step {step} is not a finite number (sequences {step * size} to "
                f"{(step + 1) * size - 1} of its data)"
            )
            if skips:
                what += "; such steps change nothing, and are counted"
                what += f". The last checkpoint is of step {kept[-1]}" if kept else ""
            if model not in self.was_told and (skips or self.batched):
                self.progress.note(f"model {model}: {what}" if self.batched else what)
            self.was_told.add(model)
        if not skips and not by_model.all(axis=1).any():
            raise Diverged(f"training stopped: {what}. {self.advice()}")
        lost = self.lost_in_a_row.min()
        if skips and lost >= MOST_SKIPPED:
            what = f"the last {lost} steps were not finite and changed nothing"
            raise Diverged(f"training stopped: {what}. {self.advice()}")

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
        weights = state.weights
        if is_due(keep.evaluate_every):
            self.told_all([{"step": step, **self._validation(weights)}])
        if is_due(keep.statistics_every):
            self.looks.add(step, jax.tree.map(np.asarray, self.look(weights)))
        if is_due(keep.sample_every) and self.writes:
            self.samples.add(self.sampled(step, weights))
        dynamics = keep.dynamics and step in dynamics_steps(steps)
        if ending or dynamics or step == steps or (step and is_due(keep.checkpoint_every)):
            self.check_weights(step, state)
            if is_first():
                self.looks.write()
            self.checkpoints.save(step, state)

    def _validation(self, weights: Any) -> dict[str, np.ndarray]:
        found = self.evaluate(weights, self.ready.held_out)
        shares = {} if self.ready.program.objective == "regression" else {"validation_accuracy": found.accuracy}
        return {"validation_loss": found.loss, **shares}

    def check_weights(self, step: int, state: State) -> None:
        """Keep no weights that are lost: a finite gradient can still lead to some that are not."""
        if not self.skips and not self.batched:
            norm = float(self.norm(state.parameters))
            if not np.isfinite(norm):
                raise Diverged(f"training stopped: the weights are not finite after step {step}. {self.advice()}")

    def advice(self) -> str:
        """What is left, and what to do."""
        kept = self.checkpoints.steps()
        good = f"The last good checkpoint is of step {kept[-1]}, in {self.checkpoints.folder}. " if kept else ""
        skip = "" if self.skips else ", or training.when_not_finite=skip,"
        return (
            f"{good}Choose a smaller optimizer.rate or a longer optimizer.warm_up{skip} and begin anew with "
            "--overwrite."
        )

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
        skipped = np.asarray(state.skipped)
        if skipped.any():
            count = f"{skipped.max()}" if skipped.ndim == 0 else f"up to {skipped.max()} of a model's"
            self.progress.note(f"{count} of {self.config.training.steps} steps were not finite and were skipped")
        # Of several processes each has its part.
        weights = jax.jit(lambda x: x, out_shardings=sharding.everywhere(self.mesh))(state.weights)
        if not is_first():
            return
        for number, folder in enumerate(model_folders(self.out, self.models)):
            if (folder / "config.json").exists():
                continue
            one = jax.tree.map(lambda x: x[number], weights) if self.batched else weights  # noqa: B023
            native.save(folder, self.ready.program.model, one, self.ready.vocabulary)


def model_folders(out: Path, models: trainer.Models) -> list[Path]:
    """Where a run's trained models are, one after another."""
    if not models.batched:
        return [out / "model"]
    return [out / "models" / str(number) for number in range(len(models.seeds))]
