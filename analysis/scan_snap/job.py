"""The main job: every experiment of Scan and Snap and JoMA, its claims, and the report.

Each stage leaves its arrays and claims in the output folder as soon as it is done, so that an interrupted job
goes on where it stopped and a diverged one keeps what there was.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import jax
import numpy as np
from safetensors import SafetensorError

from minitf.analysis.claims import Claim, as_json, claim, save_claims
from minitf.analysis.run_folder import Diverged, Problem, check_run_folder, open_run_folder, told_to_people
from minitf.analysis.scan_snap import synthetic
from minitf.analysis.scan_snap import text as text_runs
from minitf.analysis.scan_snap.joma import JomaResults, run_joma
from minitf.analysis.scan_snap.joma_claims import joma_claims
from minitf.analysis.scan_snap.report import write_report
from minitf.analysis.scan_snap.results import MediumPanel, ScanSnapResults, SmallRun, TextRun, load_run, save_run
from minitf.analysis.scan_snap.synthetic_claims import fig6_rows, medium_claims, row_sum_claims, small_claims
from minitf.analysis.scan_snap.text_claims import text_claims
from minitf.analysis.scan_snap.theory_claims import theory_claims
from minitf.files import write_atomically
from minitf.train import corpus
from minitf.train.loop import History, Report
from minitf.train.optimizers import check_rates
from minitf.train.progress import Progress
from minitf.train.sequence_classes import SequenceClasses

SMALL_SEEDS, MEDIUM_SEEDS = 16, 10
# Every experiment takes its seeds from here on, and a seed has 31 bits.
LARGEST_SEED = 2**31 - 1 - max(SMALL_SEEDS, MEDIUM_SEEDS)
QUICK_PANELS, ALL_PANELS = (3,), synthetic.MEDIUM_QUERIES
FIG10_RATES = (1.0, 2.0, 3.0, 4.0, 5.0)


@dataclasses.dataclass(frozen=True)
class ScanSnapConfig:
    """What to run; the defaults are the paper's, sized for a few minutes on two cores.

    Raises:
        ValueError: a size or rate that cannot be, saying what would be right.
    """

    seed: int = 0
    quick: bool = False
    full: bool = False
    text: tuple[str, ...] = ()
    vocabulary: int = 6000
    length: int = 128
    decoder_rate: float | None = None
    attention_rate: float | None = None
    text_rate: float = text_runs.SGD_RATE
    text_steps: int | None = None

    def __post_init__(self) -> None:
        if self.quick and self.full:
            raise ValueError("--quick and --full exclude each other; choose one")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"seed is {self.seed}; it must lie between 0 and {LARGEST_SEED}")
        if self.vocabulary < 256:
            raise ValueError(
                f"vocabulary is {self.vocabulary}; a byte-pair vocabulary holds at least the 256 bytes"
            )
        if (self.decoder_rate is None) != (self.attention_rate is None):
            raise ValueError("give both --decoder-rate and --attention-rate, or neither")
        rates = {
            "decoder_rate": self.decoder_rate,
            "attention_rate": self.attention_rate,
            "text_rate": self.text_rate,
        }
        check_rates(**{name: rate for name, rate in rates.items() if rate is not None})
        if self.text_steps is not None and self.text_steps < 1:
            raise ValueError(f"text_steps is {self.text_steps}; it must be at least 1")
        SequenceClasses(length=self.length)

    @property
    def settings(self) -> tuple[synthetic.SmallSetting, ...]:
        """The settings of Fig. 4 and 5, and the user's own pair of rates."""
        if self.decoder_rate is None or self.attention_rate is None:
            return synthetic.SMALL_SETTINGS
        name = f"SGD ({self.decoder_rate:g}, {self.attention_rate:g}), yours"
        return (
            *synthetic.SMALL_SETTINGS,
            synthetic.SmallSetting(name, "sgd", self.decoder_rate, self.attention_rate),
        )

    @property
    def text_lengths(self) -> dict[str, int]:
        """Steps of SGD and of Adam on text."""
        default = {"sgd": 400, "adam": 400} if self.quick else {"sgd": 1500, "adam": 1000}
        return default if self.text_steps is None else dict.fromkeys(default, self.text_steps)


class _Job:
    """The stages of one run folder: each is computed, or read if an earlier run finished it."""

    def __init__(
        self, config: ScanSnapConfig, folder: Path, progress: Progress, interrupted: Callable[[], bool]
    ) -> None:
        self.config, self.progress, self.interrupted = config, progress, interrupted
        self.arrays = folder / "arrays"

    def claims(self, name: str, title: str, make: Callable[[], list[Claim]]) -> list[Claim]:
        """A stage that yields claims."""
        file = self.arrays / f"{name}.claims.json"
        kept = self._kept(title, [file], lambda: _read_claims(file))
        if kept is not None:
            return kept
        with self.progress.stage(title):
            try:
                made = make()
            except Exception as error:
                if self.interrupted():  # what failed had been left without its numbers
                    raise KeyboardInterrupt from error
                raise
            if self.interrupted():
                raise KeyboardInterrupt
        write_atomically(file, as_json(made).encode())
        return _read_claims(file)

    def runs(
        self,
        names: Sequence[str],
        kind: type,
        title: str,
        make: Callable[[Report], tuple[Sequence[Any], Sequence[History]]],
        *,
        steps: int | None = None,
        rates: Sequence[Sequence[str]] = (),
    ) -> list[Any]:
        """A stage that yields arrays.

        ``make`` takes the progress report and returns the runs and the histories of the programs that trained
        them; ``rates`` says, per program, what the learning rates of its runs are, for people.
        """
        files = [self.arrays / f"{name}{ending}" for name in names for ending in (".json", ".safetensors")]
        kept = self._kept(title, files, lambda: [load_run(self.arrays, name, kind) for name in names])
        if kept is not None:
            return kept
        with self.progress.stage(title, steps) as report:
            made, histories = make(self._stoppable(report))
            diverged = [bool(np.any(history.diverged >= 0)) for history in histories]
            finished = all(history.finished for history in histories) and not self.interrupted()
            partial = "" if finished and not any(diverged) else ".partial"
            for name, run in zip(names, made, strict=True):
                save_run(self.arrays, name + partial, run)
            if any(diverged):
                i = diverged.index(True)
                raise Diverged(self._divergence(title, histories[i].diverged, rates[i]))
            if not finished:
                raise KeyboardInterrupt
        for file in files:
            file.with_name(f"{file.stem}.partial{file.suffix}").unlink(missing_ok=True)
        return [load_run(self.arrays, name, kind) for name in names]

    def _kept(self, title: str, files: Sequence[Path], read: Callable[[], list[Any]]) -> list[Any] | None:
        """What an earlier run left of a stage; None when it did not finish it, or when a file is damaged."""
        if not all(file.exists() for file in files):
            return None
        try:
            kept = read()
        except (ValueError, TypeError, KeyError, SafetensorError) as error:
            names = ", ".join(file.name for file in files)
            self.progress.note(
                f"{title}: a file of {self.arrays} is damaged ({names}: {error}); it is made again."
            )
            return None
        self.progress.note(f"{title}: finished before")
        return kept

    def _stoppable(self, report: Report) -> Report:
        """The loop ends in order on Ctrl-C; so must the next loop of the same stage."""

        def report_or_stop(step: int, loss: float) -> None:
            report(step, loss)
            if self.interrupted():
                raise KeyboardInterrupt

        return report_or_stop

    def _divergence(self, title: str, diverged: np.ndarray, rates: Sequence[str]) -> str:
        step = int(diverged[diverged >= 0].min())
        seed, rate = (int(i) for i in np.argwhere(diverged == step)[0])
        return (
            f"{title}: the loss stopped being finite at step {step} ({rates[rate]}, seed "
            f"{self.config.seed + seed}). Choose a smaller learning rate. What was measured until then is in "
            f"{self.arrays}, in the files named .partial."
        )


@contextmanager
def _noticing_interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: also where the training loop took it for a wish to end, or it was lost in a
    callback, where Python drops exceptions.
    """
    pressed = False

    def notice(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.default_int_handler(number, frame)

    # Not ours to change: another handler, or a thread.
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, notice)
    try:
        yield lambda: pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def run(
    config: ScanSnapConfig, out: Path, *, overwrite: bool = False, resume: bool = False, quiet: bool = False
) -> list[Claim]:
    """Run everything and write it to ``out``; returns the claims.

    Raises:
        Problem: the folder cannot be used, a text cannot be read, or training diverged; its message is for people.
        KeyboardInterrupt: interrupted; finished stages stay in ``out`` and ``resume`` goes on from there.
    """
    with Progress(quiet) as progress, _noticing_interrupts() as interrupted:
        texts = _read_text(config, progress)
        recorded = {**dataclasses.asdict(config), **_identity(texts)}
        check_run_folder(out, recorded, overwrite=overwrite, resume=resume)
        # Before anything is trained, so that too little text is told at once.
        with progress.stage("text: vocabulary"), told_to_people():
            prepared = text_runs.prepare(texts, config.vocabulary)
        folder = open_run_folder(out, recorded, overwrite=overwrite, resume=resume)
        try:
            return _stages(_Job(config, folder, progress, interrupted), folder, prepared, recorded)
        except OSError as error:
            raise Problem(
                f"the results could not be written to {folder}: {error}. What was finished is there; when this is "
                "put right, the same command with --resume goes on."
            ) from error


def _stages(job: _Job, folder: Path, prepared: text_runs.TextData, recorded: dict[str, Any]) -> list[Claim]:
    config = job.config
    small, claims = _small(job)
    medium = _medium(job)
    claims += job.claims("medium", "claims: Fig. 6, 11, 12", lambda: medium_claims(medium))
    runs = _text(job, prepared)
    claims += text_claims(runs)
    claims += job.claims("theory", "theory", lambda: theory_claims(config.seed))
    (joma,) = job.runs(["joma"], JomaResults, "JoMA", lambda report: ([run_joma(config.seed)], []))
    claims += job.claims("joma_theory", "claims: JoMA", lambda: joma_claims(joma))
    claims.sort(key=_claim_order)
    with job.progress.stage("report"):
        save_claims(folder / "claims.json", claims)
        write_atomically(folder / "fig6.json", json.dumps(fig6_rows(medium), indent=1).encode())
        results = ScanSnapResults(small=tuple(small), medium=tuple(medium), text=tuple(runs))
        write_report(folder, results, joma, claims, recorded, versions())
    return claims


def _small(job: _Job) -> tuple[list[SmallRun], list[Claim]]:
    config, data = job.config, SequenceClasses(length=job.config.length)
    kinds = list(dict.fromkeys(s.optimizer for s in config.settings))
    small = job.runs(
        [f"small_{i}" for i in range(len(config.settings))],
        SmallRun,
        "Syn-Small (Fig. 4, 5)",
        lambda report: synthetic.run_small(config.settings, data, SMALL_SEEDS, seed=config.seed, report=report),
        steps=len(kinds) * synthetic.STEPS,
        rates=[
            [_rates(s.decoder_rate, s.attention_rate) for s in config.settings if s.optimizer == k] for k in kinds
        ],
    )
    claims = job.claims(
        "small", "claims: Fig. 4, 5", lambda: [*row_sum_claims(), *small_claims(small, config.seed)]
    )
    return small, claims


def _medium(job: _Job) -> list[MediumPanel]:
    grid = synthetic.grid(synthetic.MEDIUM_ATTENTION_RATES, synthetic.MEDIUM_RATIOS)
    rates = [_rates(float(y), float(z)) for y, z in zip(grid.decoder, grid.attention, strict=True)]
    panels = []
    for queries in QUICK_PANELS if job.config.quick else ALL_PANELS:

        def make(report: Report, queries: int = queries) -> tuple[list[MediumPanel], list[History]]:
            panel, history = synthetic.run_medium(
                queries, MEDIUM_SEEDS, seed=job.config.seed, length=job.config.length, report=report
            )
            return [panel], [history]

        title = f"Syn-Medium {queries}/{2 * queries}"
        name = f"medium_{queries}"
        panels += job.runs([name], MediumPanel, title, make, steps=synthetic.STEPS, rates=[rates])
    return panels


def _text(job: _Job, prepared: text_runs.TextData) -> list[TextRun]:
    config, steps = job.config, job.config.text_lengths
    plans: list[tuple[str, str, Literal["sgd", "adam"], int, Sequence[float]]] = [
        ("text_sgd", "text, SGD", "sgd", 1, [config.text_rate]),
        ("text_adam", "text, Adam", "adam", 1, [text_runs.ADAM_RATE]),
    ]
    if config.full:
        plans += [
            ("text_sgd_deep", "text, SGD, 3 layers", "sgd", 3, [config.text_rate]),
            ("text_adam_deep", "text, Adam, 3 layers", "adam", 3, [text_runs.ADAM_RATE]),
            ("text_fig10", "text, rates (Fig. 10)", "sgd", 1, FIG10_RATES),
        ]
    runs = []
    for name, title, optimizer, layers, rates in plans:

        def make(
            report: Report,
            optimizer: Literal["sgd", "adam"] = optimizer,
            layers: int = layers,
            rates: Sequence[float] = rates,
        ) -> tuple[list[TextRun], list[History]]:
            made, history = text_runs.run_text(
                prepared, optimizer, rates, steps[optimizer], layers=layers, seed=config.seed, report=report
            )
            return made, [history]

        runs += job.runs(
            [f"{name}_{i}" for i in range(len(rates))],
            TextRun,
            title,
            make,
            steps=steps[optimizer],
            rates=[[f"learning rate {rate:g}" for rate in rates]],
        )
    return runs


def _rates(decoder: float, attention: float) -> str:
    return f"decoder rate {decoder:g}, attention rate {attention:g}"


def _read_text(config: ScanSnapConfig, progress: Progress) -> corpus.Corpus:
    """The user's files, a corpus asked for by name, or the interpreter's own documentation."""
    with told_to_people():
        if not config.text:
            return corpus.python_documentation()
        if len(config.text) == 1 and config.text[0] in corpus.DOWNLOADS and not Path(config.text[0]).exists():
            with progress.stage("text: download"):
                return corpus.download(config.text[0])
        return corpus.read_paths(config.text)


def _identity(texts: corpus.Corpus) -> dict[str, str]:
    """What the text was, so that no run goes on with another one under the same name."""
    digest = hashlib.sha256(json.dumps([texts.train, texts.validation]).encode()).hexdigest()
    return {"text_source": texts.source, "text_sha256": digest[:16]}


def _read_claims(file: Path) -> list[Claim]:
    rows = json.loads(file.read_bytes())
    if not isinstance(rows, list):
        raise ValueError("claims are a list")
    return [_claim_from(row) for row in rows]


def _claim_from(row: dict[str, Any]) -> Claim:
    fields = {k: v for k, v in row.items() if k not in ("id", "statement", "holds")}
    fields["value"] = np.array(fields["value"], np.float64)  # null, a value that is not finite, becomes NaN
    return claim(row["id"], row["statement"], **fields)


def _claim_order(c: Claim) -> tuple:
    """Scan and Snap's T1, T2, ... in order, then its other claims, then JoMA's."""
    family, _, name = c.id.partition(".")
    digits = "".join(x for x in name.split("_")[0][1:] if x.isdigit())
    numbered = name[:1] == "T" and bool(digits)
    return family != "scan_snap", not numbered, int(digits) if numbered else 0, name


def versions() -> dict[str, str]:
    """What ran: Python, the packages that matter, and the kind of device."""
    packages = ("minitf", "jax", "jaxlib", "flax", "optax", "numpy", "tiktoken")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "device": jax.devices()[0].device_kind,
    }
