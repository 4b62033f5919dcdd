"""The command ``minitf``: a thin layer over functions that a notebook can call."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True)
class ScanSnap:
    """Watch a one-layer transformer scan and snap (Tian et al. 2023), on synthetic classes and on real text.

    Trains, compares every claim of the paper with what was measured, and writes a report to open in a browser.
    Takes a few minutes on two cores.
    """

    out: Path = Path("runs/scan-snap")
    """Folder for the report and the results."""
    seed: int = 0
    """First random seed; a run with the same seed repeats exactly."""
    quiet: bool = False
    """Show no progress."""
    overwrite: bool = False
    """Replace the run that OUT already holds."""
    resume: bool = False
    """Go on with the run in OUT where it was interrupted."""
    strict: bool = False
    """Exit with 1 if a claim that should hold does not."""
    quick: bool = False
    """One panel of the learning-rate grid and short text runs."""
    full: bool = False
    """Everything, also deeper models on text and a sweep of learning rates."""
    text: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH [PATH ...]")] = ()
    """Text to train on: files or folders; or one of wikitext-2, wikitext-103, tinyshakespeare, which is then
    downloaded. Without it, the documentation that comes with Python is read; nothing is downloaded."""
    vocabulary: int = 2000
    """Size of the byte-pair vocabulary that is trained on the text."""
    length: int = 128
    """Length T of the synthetic sequences, the query included."""
    decoder_rate: float | None = None
    """Also train Syn-Small with this learning rate of the decoder (eta_Y) ..."""
    attention_rate: float | None = None
    """... and this one of the attention logits (eta_Z)."""
    text_rate: float = 5.0
    """Learning rate of SGD on text."""
    text_steps: int | None = None
    """Training steps on text; by default 1500 for SGD and 1000 for Adam."""

    def run(self) -> int:
        """Run it; returns the exit code."""
        from minitf.analysis.claims import unmet
        from minitf.analysis.scan_snap import job

        names = {f.name for f in dataclasses.fields(job.ScanSnapConfig)}
        config = job.ScanSnapConfig(**{k: v for k, v in vars(self).items() if k in names})
        claims = job.run(config, self.out, overwrite=self.overwrite, resume=self.resume, quiet=self.quiet)
        missed = unmet(claims)
        expected = [c for c in claims if c.expected]
        print(f"{len(expected) - len(missed)} of {len(expected)} claims hold that should.")
        for c in missed:
            print(f"  {c.id} does not: {c.statement}")
        print(f"Report: {(self.out / 'report.html').resolve()}")
        return 1 if self.strict and missed else 0


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure speed and memory, beside PyTorch where it is installed (the peers extra)."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to measure; everything by default. Known: scan-snap."""
    out: Path = Path("runs/bench")
    """Folder for bench.json."""
    seed: int = 0
    """Random seed."""
    quiet: bool = False
    """Print nothing but errors."""

    def run(self) -> int:
        """Run it; returns the exit code."""
        from minitf.analysis.bench import run_benchmarks

        run_benchmarks(self.names, self.out, seed=self.seed, quiet=self.quiet)
        return 0


Command = Annotated[ScanSnap, tyro.conf.subcommand("scan-snap")] | Annotated[Bench, tyro.conf.subcommand("bench")]


def main(arguments: list[str] | None = None) -> None:
    """The entry point: exits with 0, or 1 (diverged; unmet under --strict), 2 (bad input), 130 (interrupted)."""
    command: ScanSnap | Bench = tyro.cli(
        Command,
        prog="minitf",
        args=arguments,
        description="Transformers to understand: train a toy model, watch it learn, take its attention apart.",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        code = command.run()
    except KeyboardInterrupt:
        print(
            f"\nminitf: interrupted. What was finished is in {command.out}; add --resume to go on from there.",
            file=sys.stderr,
        )
        code = 130
    except (ValueError, OSError) as error:
        print(f"minitf: {error}", file=sys.stderr)
        code = 1 if type(error).__name__ == "Diverged" else 2
    sys.exit(code)
