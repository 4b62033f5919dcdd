"""The commands that train, what that would need (``plan``), and what a few bits keep of it (``fourbit``)."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import arg


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model: a preset, a TOML file, or settings of your own; on a task, or on any text.

    Everything is kept in DIR: checkpoints, metrics, samples, the trained model, a report. Ctrl-C, a crash, a
    pulled plug lose nothing: the same command again goes on from the newest checkpoint, to the same weights.
    """

    settings: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        arg(metavar="[GROUP.FIELD=VALUE ...]", help_behavior_hint=""),
    ] = ()
    """Any settings, over those of the preset: model.layers=4 optimizer.rate=3e-4. --show lists all."""
    preset: Annotated[str, arg(metavar="NAME", help_behavior_hint="")] = ""
    """Settings to begin with; --show without a preset lists them."""
    config: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A TOML file with settings, over those of the preset."""
    start_from: Annotated[str, arg(metavar="MODEL", help_behavior_hint="")] = ""
    """A trained model to go on from, as minitf walk takes it: a folder, a llama2.c .bin file, or hub:owner/name.
    The text then has the model's own tokens, and settings of model those that it has itself."""
    text: Annotated[tuple[str, ...], arg(metavar="PATH [PATH ...]", help_behavior_hint="")] = ()
    """Text to train on: files or folders. Without it, and without a task: the documentation inside Python."""
    steps: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the preset's)")] = None
    """Training steps."""
    seed: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the file's, or 0)")] = None
    """Of the first model; everything random follows from it."""
    seeds: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the file's, or 1)")] = None
    """How many models train together, each with its own seed."""
    sweep: Annotated[tuple[str, ...], arg(metavar="NAME=LOW:HIGH:N [...]", help_behavior_hint="")] = ()
    """Train one model for each value: lr=1e-4:1e-2:8, or optimizer.weight_decay=0,0.1."""
    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/train")
    """Folder for everything."""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace the run that DIR already holds, instead of going on with it."""
    show: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print all settings as TOML, and train nothing."""
    distributed: Annotated[bool, arg(help_behavior_hint="")] = False
    """This is one of several processes of one run, each with its own devices; DIR is on a file system of all. On
    TPU pods, Slurm and Open MPI they find each other; else set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
    JAX_PROCESS_ID."""
    quiet: Annotated[bool, arg(help_behavior_hint="")] = False
    """Show no progress."""

    def run(self) -> int:
        """Run it; returns the exit code."""
        from minitf.analysis.run_folder import told_to_people
        from minitf.train import settings

        if self.show and not (self.preset or self.config or self.settings or self.start_from):
            print("\n".join(f"{name:20} {settings.about_preset(name)}" for name in settings.preset_names()))
            return 0
        with told_to_people():
            config = settings.as_config(self.tables())
        if self.show:
            print(settings.as_toml(settings.as_tables(config)), end="")
            return 0
        from minitf.analysis.training import distributed, job

        if self.distributed:
            with told_to_people():
                distributed.join()
        report = job.run(config, self.out, overwrite=self.overwrite, quiet=self.quiet)
        if distributed.is_first():
            print(f"Report: {report.resolve()}")
        return 0

    def tables(self) -> dict[str, Any]:
        """All settings that were given, by group. Raises ValueError."""
        from minitf.train import settings

        named = {
            "steps": self.steps,
            "seed": self.seed,
            "seeds": self.seeds,
            "start_from": self.start_from or None,
        }
        training = {name: value for name, value in named.items() if value is not None}
        above: dict[str, Any] = {"training": training} if training else {}
        if self.text:
            above["data"] = {"paths": list(self.text)}
        if self.sweep:
            above["sweep"] = settings.sweep_from(self.sweep)
        words = settings.from_words(self.settings)
        for name in above.get("sweep", {}):
            if (value := settings.value_of(words, name)) is not None:
                raise ValueError(f"{name} is set to {value}, and swept with --sweep: leave out one")
        return settings.tables_of(self.preset, self.config, settings.laid_over(words, above))

    def after_interrupt(self) -> str:
        """What to do after Ctrl-C, for people."""
        if not (self.out / "config.json").exists():
            return "Nothing was begun yet."
        without = " without --overwrite" if self.overwrite else ""
        return f"What was done is in {self.out}; run the same command{without} again to go on from there."


@dataclasses.dataclass(frozen=True)
class Plan:
    """See what a training run needs on each device, and how long it takes, before it runs: which meshes fit?

    On paper, for the run's own mesh and for every way to divide it among up to thousands of devices. Reads no
    data and compiles nothing. Prints tables and writes plan.json.
    """

    settings: Annotated[
        tuple[str, ...], tyro.conf.Positional, arg(metavar="[GROUP.FIELD=VALUE ...]", help_behavior_hint="")
    ] = ()
    """Settings of the run, as those of minitf train: mesh.fsdp=8 training.accumulate=4."""
    preset: Annotated[str, arg(metavar="NAME", help_behavior_hint="")] = ""
    """Settings to begin with, as with minitf train."""
    config: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A TOML file with settings, over those of the preset."""
    device: str = "H100"
    """What it is to run on."""
    devices: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: as the mesh)")] = None
    """How many of them; the best splits of more, up to thousands, are told too."""
    utilization: float = 0.4
    """The share of what a device can multiply at most that is assumed."""
    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/plan")
    """Folder for plan.json."""

    def run(self) -> int:
        """Run it; returns the exit code."""
        from minitf.analysis.plan import job
        from minitf.analysis.run_folder import check_writable, told_to_people
        from minitf.train import settings

        with told_to_people():
            words = settings.from_words(self.settings)
            config = settings.as_config(settings.tables_of(self.preset, self.config, words))
            check_writable(self.out)
            job.run(config, self.out, self.device, self.devices, self.utilization)
        return 0

    def after_interrupt(self) -> str:
        """What to do after Ctrl-C, for people."""
        return "Nothing was kept; run the command again."


@dataclasses.dataclass(frozen=True)
class FourBit:
    """See what optimizer states of four bits keep and lose (Li, Chen and Zhu 2023), beside what was published.

    Zero points, frozen states, the bias of the sign, memory, and small models trained with each. Writes
    claims.json.
    """

    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/fourbit")
    """Folder for claims.json."""
    no_training: Annotated[bool, arg(help_behavior_hint="")] = False
    """Leave out the models, which take a minute or two."""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace the run that DIR already holds."""

    def run(self) -> int:
        """Run it; returns the exit code."""
        from minitf.analysis.claims import unmet
        from minitf.analysis.fourbit import job

        claims = job.run(self.out, training=not self.no_training, overwrite=self.overwrite)
        for claim in claims:
            print(f"{'holds' if claim.holds else 'does not hold'}: {claim.statement}")
        expected = [claim for claim in claims if claim.expected]
        print(f"{len(expected) - len(unmet(claims))} of the {len(expected)} claims that should hold do hold.")
        print(f"Claims: {(self.out / 'claims.json').resolve()}")
        return 0

    def after_interrupt(self) -> str:
        """What to do after Ctrl-C, for people."""
        return "Nothing was kept; run the command again."
