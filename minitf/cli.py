"""The command ``minitf``: a thin layer over functions that a notebook can call."""

import dataclasses
import functools
import logging
import operator
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import arg

from minitf.cli_training import FourBit, Plan, Train
from minitf.cli_words import in_order

INTERRUPTED = 130
LESS_MEMORY = "Ask for fewer or shorter sequences, fewer seeds or a smaller model."


class _Stopped(BaseException):
    """Ctrl-C where there is nothing to keep: the training loop, which on KeyboardInterrupt only ends early and
    returns what there is, does not know it.
    """


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped


@dataclasses.dataclass(frozen=True)
class ScanSnap:
    """Watch a one-layer transformer scan and snap (Tian et al. 2023), on synthetic classes and on real text.

    Trains it, compares every claim of the paper with what was measured, and writes a report to open in a
    browser. Takes a few minutes on two cores, and downloads nothing unless you name a data set. Ctrl-C keeps what
    is finished; --resume goes on from there.
    """

    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/scan-snap")
    """Folder for the report and the results."""
    quick: Annotated[bool, arg(help_behavior_hint="")] = False
    """Less, and sooner done: one panel of the learning-rate grid, and short training on text."""
    full: Annotated[bool, arg(help_behavior_hint="")] = False
    """Everything: also three-layer models on text, and a sweep of learning rates."""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace the run that DIR already holds."""
    resume: Annotated[bool, arg(help_behavior_hint="")] = False
    """Go on with the run in DIR where it was interrupted; all other options must be as they were."""
    quiet: Annotated[bool, arg(help_behavior_hint="")] = False
    """Show no progress."""
    strict: Annotated[bool, arg(help_behavior_hint="")] = False
    """Exit with 1 if a claim that should hold does not."""
    seed: int = 0
    """First random seed; the same seed gives the same numbers again."""
    text: Annotated[
        tuple[str, ...],
        arg(
            metavar="PATH [PATH ...]",
            help="Text to train on: files or folders; or one of wikitext-2, wikitext-103, tinyshakespeare, which "
            "is then downloaded. Without it: the documentation that comes with Python.",
            help_behavior_hint="",
        ),
    ] = ()
    text_rate: float = 5.0
    """Learning rate of SGD on text."""
    text_steps: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: 1500 for SGD and 1000 for Adam)")
    ] = None
    """Training steps on text."""
    vocabulary: int = 6000
    """Size of the byte-pair vocabulary that is trained on the text; at least 256."""
    length: int = 128
    """Length T of the synthetic sequences, the last token (the query) included."""
    decoder_rate: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")] = None
    """Try your own pair of learning rates on the small synthetic set: this one for the decoder (eta_Y) ..."""
    attention_rate: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")] = None
    """... and this one for attention (eta_Z). The paper's are 1 and 1, and 10 and 1; both always run."""

    def run(self) -> int:
        """Run it; returns the exit code."""
        from minitf.analysis.claims import unmet
        from minitf.analysis.run_folder import told_to_people
        from minitf.analysis.scan_snap import job

        if self.quiet:  # it warns while it lists the fonts of a fresh machine
            logging.getLogger("matplotlib").setLevel(logging.ERROR)
        names = {f.name for f in dataclasses.fields(job.ScanSnapConfig)}
        with told_to_people():
            config = job.ScanSnapConfig(**{k: v for k, v in vars(self).items() if k in names})
        claims = job.run(config, self.out, overwrite=self.overwrite, resume=self.resume, quiet=self.quiet)
        missed = unmet(claims)
        expected = [c for c in claims if c.expected]
        print(f"{len(expected) - len(missed)} of the {len(expected)} claims that should hold do hold.")
        for c in missed:
            print(f"  {c.id} does not: {c.statement}")
        print(f"Report: {(self.out / 'report.html').resolve()}")
        return 1 if self.strict and missed else 0

    def after_interrupt(self) -> str:
        """What to do after Ctrl-C, for people."""
        return _to_go_on(self.out, self.overwrite)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure speed and memory, beside PyTorch and TransformerLens where they are installed (extras peers, lens).

    Prints a table and writes bench.json.
    """

    names: Annotated[
        tuple[Literal["scan-snap", "walk", "mixers", "train", "fourbit"], ...],
        tyro.conf.Positional,
        arg(metavar="[NAME ...]", help_behavior_hint=""),
    ] = ()
    """What to measure: scan-snap, walk, mixers, train, fourbit. Everything by default."""
    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/bench")
    """Folder for bench.json."""
    pythons: Annotated[tuple[str, ...], arg(metavar="PATH [PATH ...]", help_behavior_hint="")] = ()
    """Python interpreters of environments with other versions of TransformerLens, to measure those too."""
    seed: int = 0
    """Random seed."""
    quiet: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print nothing but errors."""

    def run(self) -> int:
        """Run it; returns the exit code."""
        from minitf.analysis.bench import run_benchmarks
        from minitf.analysis.run_folder import check_writable

        check_writable(self.out)
        before = signal.signal(signal.SIGINT, _stop)
        try:
            run_benchmarks(self.names, self.out, seed=self.seed, quiet=self.quiet, pythons=self.pythons)
        finally:
            signal.signal(signal.SIGINT, before)
        return 0

    def after_interrupt(self) -> str:
        """What to do after Ctrl-C, for people."""
        return "Run the command again to measure from the start."


@dataclasses.dataclass(frozen=True)
class WalkText:
    """See one text walk through a model: every step, head and association, on one page.

    The page shows, for each token, its path through embedding space, what each station would predict, where every
    head looks, and which heads and neurons decided; with --ablate or --steer, before and after side by side.
    """

    model: Annotated[str, tyro.conf.Positional, arg(metavar="MODEL", help_behavior_hint="")]
    """A folder with config.json and model.safetensors, a llama2.c .bin file, or hub:owner/name to download one."""
    text: Annotated[str, tyro.conf.Positional, arg(metavar="TEXT", help_behavior_hint="")]
    """What to walk: a text; with --ids, token ids."""
    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/walk")
    """Folder for the report."""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace the run that DIR already holds."""
    ids: Annotated[bool, arg(help_behavior_hint="")] = False
    """TEXT is token ids, such as "1 42 7": for models whose tokenizer minitf does not have."""
    generate: int = 0
    """Tokens to add to the text first; they go to standard output as they come."""
    temperature: float = 0.0
    """Of the choice of each token; 0 takes the most likely one."""
    top_k: int = 0
    """Choose among the k most likely tokens only; 0 for all."""
    top_p: float = 1.0
    """Choose among the most likely tokens that together have this probability."""
    min_p: float = 0.0
    """Choose among tokens at least this fraction as likely as the most likely one."""
    ablate: Annotated[tuple[str, ...], arg(metavar="L.H [L.H ...]", help_behavior_hint="")] = ()
    """Heads to leave out, as layer.head counted from 0: 0.3 is layer 0, head 3."""
    steer: Annotated[str, arg(metavar="L:C:TEXT:TEXT", help_behavior_hint="")] = ""
    """After layer L, at every position, go C times the way from what the second text ends in to the first."""
    seed: int = 0
    """Of the choice of tokens."""
    quiet: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print the generated text alone."""

    def run(self) -> int:
        """Run it; returns the exit code."""
        from minitf.analysis.run_folder import told_to_people
        from minitf.analysis.walk_report import job
        from minitf.decode import Sampling

        with told_to_people():
            sampling = Sampling(self.temperature, self.top_k, self.top_p, self.min_p)
            names = {f.name for f in dataclasses.fields(job.WalkConfig)} - {"sampling"}
            config = job.WalkConfig(sampling=sampling, **{k: v for k, v in vars(self).items() if k in names})
        say = functools.partial(print, end="", flush=True)
        report = job.run(config, self.out, overwrite=self.overwrite, say=say)
        if self.generate:
            print()
        if not self.quiet:
            print(f"Report: {report.resolve()}", file=sys.stderr if self.generate else sys.stdout)
        return 0

    def after_interrupt(self) -> str:
        """What to do after Ctrl-C, for people."""
        return "There is no report yet; run the command again."


@dataclasses.dataclass(frozen=True)
class Ablate:
    """See what a trained model loses when its attention's association is replaced.

    Head by head, and in shares of all heads: by uniform, mean, per-lag, identical, shuffled, random, sparse,
    low-rank associations, and by the parts of its scores that places explain and do not explain. Nothing is
    trained.
    """

    model: Annotated[str, tyro.conf.Positional, arg(metavar="MODEL", help_behavior_hint="")]
    """A folder with config.json and model.safetensors, a llama2.c .bin file, or hub:owner/name to download one."""
    text: Annotated[Path, tyro.conf.Positional, arg(metavar="FILE", help_behavior_hint="")]
    """A text to predict; with --ids, token ids."""
    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/ablate")
    """Folder for the report."""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace the run that DIR already holds."""
    resume: Annotated[bool, arg(help_behavior_hint="")] = False
    """Go on with the run in DIR where it was interrupted; all other options must be as they were."""
    ids: Annotated[bool, arg(help_behavior_hint="")] = False
    """FILE holds token ids: for models whose tokenizer minitf does not have."""
    length: Annotated[int, arg(help_behavior_hint="(default: 64, or all that the model reads)")] = 0
    """Tokens in a window."""
    windows: int = 16
    """Windows to measure on."""
    data: int = 32
    """Further windows, for means over data."""
    seed: int = 0
    """Of the choice of windows, and of what is random."""
    mask: Annotated[int | None, arg(metavar="TOKEN", help_behavior_hint="(default: its tokenizer's)")] = None
    """Of a model that sees both ways: the token that stands for what it is to tell."""
    quiet: Annotated[bool, arg(help_behavior_hint="")] = False
    """Print nothing but errors."""

    def run(self) -> int:
        """Run it; returns the exit code."""
        from rich.console import Console

        from minitf.analysis.ablate import job
        from minitf.analysis.run_folder import told_to_people

        with told_to_people():
            names = {f.name for f in dataclasses.fields(job.AblateConfig)}
            config = job.AblateConfig(**{k: v for k, v in vars(self).items() if k in names})
        with Console(stderr=True, quiet=self.quiet).status("ablating") as status:
            told = status.update
            report = job.run(config, self.out, overwrite=self.overwrite, resume=self.resume, say=told)
        if not self.quiet:
            print(f"Report: {report.resolve()}")
        return 0

    def after_interrupt(self) -> str:
        """What to do after Ctrl-C, for people."""
        return _to_go_on(self.out, self.overwrite)


@dataclasses.dataclass(frozen=True)
class Mixers:
    """Train every sequence mixer from scratch on the same tasks: which task needs which association?

    The same small model with one mixer after another in the place of attention, as many parameters, several seeds:
    text, classification, recall, addition, memorisation. Compares what was published with what was measured, and
    writes a report. Without --full: a few mixers, some minutes on two cores. Ctrl-C keeps the cells that are
    finished; --resume goes on from there.
    """

    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/mixers")
    """Folder for the report and the results."""
    full: Annotated[bool, arg(help_behavior_hint="")] = False
    """Every mixer, five seeds, three learning rates, long training: many hours on two cores."""
    mixers: Annotated[tuple[str, ...], arg(metavar="NAME [NAME ...]", help_behavior_hint="")] = ()
    """Rows of the table, as the report names them, or all; softmax attention is always among them."""
    tasks: tuple[Literal["text", "classification", "recall", "addition", "memorisation"], ...] = (
        "text",
        "classification",
        "recall",
        "addition",
        "memorisation",
    )
    """Columns of the table."""
    seeds: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 3, with --full 5)")] = None
    """How many random seeds."""
    seed: int = 0
    """The first of them."""
    steps: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: by task)")] = None
    """Training steps on every task."""
    text: Annotated[tuple[str, ...], arg(metavar="PATH [PATH ...]", help_behavior_hint="")] = ()
    """Text for the language model: files or folders. Without it: the documentation that comes with Python."""
    overwrite: Annotated[bool, arg(help_behavior_hint="")] = False
    """Replace the run that DIR already holds."""
    resume: Annotated[bool, arg(help_behavior_hint="")] = False
    """Go on with the run in DIR, also with other mixers and tasks; all other options must be as they were."""
    quiet: Annotated[bool, arg(help_behavior_hint="")] = False
    """Show no progress."""

    def run(self) -> int:
        """Run it; returns the exit code."""
        from minitf.analysis.claims import is_settled
        from minitf.analysis.mixer_study import job
        from minitf.analysis.run_folder import told_to_people

        # Before JAX has a backend: cells train in threads of their own.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {job.ONE_THREAD}".strip()

        names = {f.name for f in dataclasses.fields(job.StudyConfig)}
        with told_to_people():
            config = job.StudyConfig(**{k: v for k, v in vars(self).items() if k in names})
        claims = job.run(config, self.out, overwrite=self.overwrite, resume=self.resume, quiet=self.quiet)
        unsettled = sum(not is_settled(c) for c in claims)
        beyond = f" (of {unsettled} the interval over seeds reaches across what is asked)" if unsettled else ""
        holding = f"{sum(c.holds for c in claims)} of {len(claims)} published claims hold here{beyond}."
        print(holding if claims else "No published claim is of these mixers and tasks.")
        print(f"Report: {(self.out / 'report.html').resolve()}")
        return 0

    def after_interrupt(self) -> str:
        """What to do after Ctrl-C, for people."""
        return _to_go_on(self.out, self.overwrite)


def _to_go_on(out: Path, overwrite: bool) -> str:
    if not (out / "config.json").exists():
        return "Nothing was begun yet."
    instead = "--resume instead of --overwrite" if overwrite else "--resume"
    return f"What was finished is in {out}; run the same command with {instead} to go on from there."


AnyCommand = ScanSnap | WalkText | Ablate | Mixers | Train | Plan | FourBit | Bench
COMMANDS = {
    "scan-snap": ScanSnap,
    "walk": WalkText,
    "ablate": Ablate,
    "mixers": Mixers,
    "train": Train,
    "plan": Plan,
    "fourbit": FourBit,
    "bench": Bench,
}


def parsed(arguments: list[str]) -> AnyCommand:
    """What the words of a command line ask for; exits with 2, and a reason, where they cannot be understood."""
    name, *words = arguments or [""]
    if name in COMMANDS:
        try:
            arguments = [name, *in_order(words, COMMANDS[name])]
        except ValueError as problem:
            print(f"minitf: {problem}", file=sys.stderr)
            sys.exit(2)
    named = [Annotated[kind, tyro.conf.subcommand(called)] for called, kind in COMMANDS.items()]
    any_of_them: Any = functools.reduce(operator.or_, named)
    command: AnyCommand = tyro.cli(
        any_of_them,
        prog="minitf",
        args=arguments,
        description="Transformers to understand: train a toy model, watch it learn, take its attention apart. "
        "Begin with: minitf scan-snap --quick",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return command


def main(arguments: list[str] | None = None) -> None:
    """The entry point: exits with 0, or 1 (diverged; unmet under --strict), 2 (bad input), 130 (interrupted)."""
    code = _run(parsed(sys.argv[1:] if arguments is None else arguments))
    if code == INTERRUPTED:
        # A compiler that was interrupted crashes in the interpreter's own clean-up, and there is nothing to clean.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run(command: AnyCommand) -> int:
    """The exit code. Only what a person can put right is told without a stack trace; the rest are bugs."""
    try:
        from minitf.analysis.run_folder import Problem, telling_of_memory

        try:
            with telling_of_memory(LESS_MEMORY):
                return command.run()
        except Problem as problem:
            print(f"minitf: {problem}", file=sys.stderr)
            return problem.exit_code
    except (KeyboardInterrupt, _Stopped):
        print(f"\nminitf: interrupted. {command.after_interrupt()}", file=sys.stderr)
        return INTERRUPTED
