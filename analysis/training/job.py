"""The command ``minitf train``: train what a configuration says, keep everything, lose nothing.

The same command again goes on from the newest checkpoint, with the same numbers as if it had never stopped.
"""

import json
import shutil
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from minitf.analysis.flops import flops
from minitf.analysis.run_folder import (
    Problem,
    check_run_folder,
    hold,
    open_run_folder,
    recorded,
    telling_of_memory,
    told_to_people,
    writing_results,
)
from minitf.analysis.training import start
from minitf.analysis.training.boards import Board, boards
from minitf.analysis.training.distributed import first_alone, is_first
from minitf.analysis.training.log import read
from minitf.analysis.training.page import page
from minitf.analysis.training.prepared import DATA, Prepared, check_data, prepared
from minitf.analysis.training.under_way import Training, model_folders
from minitf.declaration import count
from minitf.files import write_atomically
from minitf.memory import machine_bytes
from minitf.train import sharding, trainer
from minitf.train.checkpoints import Checkpoints
from minitf.train.config import TrainConfig
from minitf.train.kept_models import describe
from minitf.train.progress import Progress
from minitf.train.settings import as_tables, as_toml, by_name

# What may change when a run goes on: where it runs and what it keeps, not what it computes.
FREE = ("mesh", "keep")
STEPS = "training.steps"
LESS_MEMORY = (
    "A smaller training.batch needs less, or training.accumulate=4, training.rematerialize=true, or "
    "training.at_once=1 where many models train; minitf plan says how much."
)
GOES_ON = "The checkpoints before are whole; when this is put right, the same command goes on from the newest."


def run(config: TrainConfig, out: Path, *, overwrite: bool = False, quiet: bool = False) -> Path:
    """Train, or go on; write everything to ``out``; returns the report's path.

    Raises:
        Problem: configuration, data, folder or device cannot be used; training stopped being finite (exit code 1);
            SIGTERM (143). Its message is for people.
        KeyboardInterrupt: Ctrl-C; everything is kept.
    """
    with told_to_people():
        sharding.check_divides(config.training, config.mesh)
        mesh = sharding.mesh_of(config.mesh)
    held = _held(config)
    silent = quiet or not is_first()
    with (
        ExitStack() as held_until,
        Progress(silent, remaining=True) as progress,
        told_to_people(),
        writing_results(out, GOES_ON),
    ):
        with first_alone("data"):
            if is_first():
                start.check_elsewhere(config, out)
                hold(out, held_until)
                _open(config, held, out, overwrite)
            ready = prepared(config, out, progress.note, sharding.part_of_batch(mesh, config.training.batch))
            if is_first():
                _keep_identity(out, ready)
            longer = recorded(out).get(STEPS) != held[STEPS]
        if longer or not _finished(config, out):
            _train(config, ready, mesh, out, progress, quiet, longer)
        report = out / "report.html"
        if is_first():
            write_atomically(report, page(out, config, ready).encode())
    return report


def _held(config: TrainConfig) -> dict[str, Any]:
    """The settings with which a run goes on, and with no others."""
    return {name: value for name, value in by_name(config).items() if name.partition(".")[0] not in FREE}


def _open(config: TrainConfig, held: dict[str, Any], out: Path, overwrite: bool) -> None:
    """Make the folder that of this run, or refuse.

    A run that is made longer stays what it was until it trains on: so far all that it has is read alone.

    Raises:
        Problem: it cannot be.
    """
    # A run that was begun before there was a setting had what is usual, and did not record it.
    usual = _held(TrainConfig())
    changed: tuple[str, ...] = ()
    if not overwrite:
        if _nothing_done(out):
            changed = _begun_anew(held, out)
        elif _made_longer(config, held, out, usual):
            return
    open_run_folder(out, held, overwrite=overwrite, resume=not overwrite, changed=changed, usual=usual)
    write_atomically(out / "config.toml", as_toml(as_tables(config)).encode())


def _begun_anew(held: dict[str, Any], out: Path) -> tuple[str, ...]:
    """Leave nothing of a run that did nothing yet; returns the settings that may differ from its own: all."""
    for name in ("data.json", "metrics.jsonl", "samples.jsonl", "statistics.safetensors"):
        (out / name).unlink(missing_ok=True)
    before = recorded(out)
    if before.get(start.SETTING) != held[start.SETTING]:
        shutil.rmtree(out / start.FOLDER, ignore_errors=True)
    # All that either of them says.
    return (*held, *before)


def _nothing_done(out: Path) -> bool:
    """Whether a training was to be in this folder, and took no step: no weights, no loss but the first."""
    if "training.steps" not in recorded(out) or [*out.glob("checkpoints/*/"), *out.glob("model*")]:
        return False
    metrics = out / "metrics.jsonl"
    return not metrics.exists() or all(line["step"] == 0 for line in read(metrics))


def _made_longer(config: TrainConfig, held: dict[str, Any], out: Path, usual: dict[str, Any]) -> bool:
    """Whether more steps are asked of a run than it began with: at a constant rate nothing depended on them.

    Raises:
        Problem: another setting has changed too, or a run that took its last step has no checkpoint of it.
    """
    before = recorded(out).get(STEPS)
    constant = config.optimizer.schedule == "constant"
    if not constant or not isinstance(before, int) or before >= config.training.steps:
        return False
    check_run_folder(out, held, resume=True, changed=(STEPS,), usual=usual)
    if _finished(config, out) and not (out / "checkpoints" / str(before)).is_dir():
        raise Problem(
            f"{out} has no checkpoint of its last step, {before}, from which a longer run goes on (its model is "
            "whole). Choose another folder with --out, and training.start_from for its weights, or --overwrite to "
            "begin anew."
        )
    return True


def _begin_longer(config: TrainConfig, out: Path) -> None:
    """Be the longer run from now on; the model so far makes room, whose weights are in the newest checkpoint."""
    for folder in model_folders(out, trainer.models_of(config)):
        shutil.rmtree(folder, ignore_errors=True)
    write_atomically(out / "config.toml", as_toml(as_tables(config)).encode())
    open_run_folder(out, _held(config), resume=True, changed=(STEPS,), usual=_held(TrainConfig()))


def _finished(config: TrainConfig, out: Path) -> bool:
    """Whether an earlier run took the last step and left its models."""
    return all((folder / "config.json").exists() for folder in model_folders(out, trainer.models_of(config)))


def _train(
    config: TrainConfig, ready: Prepared, mesh: Mesh, out: Path, progress: Progress, quiet: bool, longer: bool
) -> None:
    state, batch, numbers, key = ready.program.shapes()
    keep, models = config.keep, trainer.models_of(config)
    with Checkpoints(out / "checkpoints", keep, config.training.steps) as checkpoints:
        done = max(checkpoints.steps(), default=0)
        opened: AbstractContextManager[list[Board]] = nullcontext([])
        if is_first():
            many = len(models.seeds) if models.batched else None
            describe(out / "checkpoints", ready.program.model, ready.vocabulary, many, state)
            opened = boards(keep, out, done=done, settings=by_name(config), quiet=quiet)
        with opened as shown:
            # What rematerialization makes again is no work that the model asks for.
            once = replace(config, training=replace(config.training, rematerialize=False))
            work = flops(replace(ready.program, config=once).gradient, state.parameters, batch, numbers, key)
            progress.note(_what(ready, models, work))
            if config.optimizer.warm_up > config.training.steps:
                progress.note(
                    f"optimizer.warm_up is {config.optimizer.warm_up}, longer than all {config.training.steps} "
                    "steps: the rate only rises, and never reaches its value"
                )
            with telling_of_memory(LESS_MEMORY):
                programs = trainer.compiled(
                    ready.program, mesh, work * len(models.seeds), ready.length, initial=ready.initial
                )
                _check_memory(programs, mesh)
                if longer:
                    with first_alone("longer"):
                        if is_first():
                            _begin_longer(config, out)
                Training(config, ready, programs, mesh, models, checkpoints, out, progress, work, shown).run()


def _check_memory(programs: trainer.Compiled, mesh: Mesh) -> None:
    """Refuse what the compiler says has no room: a CPU would take the machine's memory until it is killed.

    Raises:
        Problem: with what is needed and what there is.
    """
    there, each = trainer.memory_of(mesh), programs.argument_bytes + programs.temporary_bytes
    where, needed = "the device", each
    if there is None:
        # Devices that do not say are parts of this machine.
        there, where, needed = machine_bytes(), "this machine", each * len(mesh.local_devices)
    if there is not None and needed > there:
        raise Problem(
            f"a training step needs {needed / 1e9:.1f} GB of memory; {where} has {there / 1e9:.1f}. {LESS_MEMORY}"
        )


def _what(ready: Prepared, models: trainer.Models, work: float) -> str:
    """What is about to be trained, in a sentence."""
    model, many = ready.program.model, len(models.seeds)
    device = jax.devices()[0]
    each = "" if many == 1 else f"{many} models of "
    layers = f"{model.layers} layer{'' if model.layers == 1 else 's'}"
    return (
        f"{each}{count(model):,} parameters ({layers}, width {model.width}), on {ready.source}; "
        f"{work / 1e9:.3g} GFLOP a step{' each' if many > 1 else ''}, on {device.device_kind}"
    )


def _keep_identity(out: Path, ready: Prepared) -> None:
    """Keep what the data is; refuse to go on with other data than the run began with."""
    if ready.identity:
        check_data(out, ready.identity)
        write_atomically(out / DATA, (json.dumps(ready.identity, indent=1) + "\n").encode())
