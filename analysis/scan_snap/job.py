"""The main job: every experiment of Scan and Snap and JoMA, its claims, and the report.

Each stage leaves its arrays and claims in the output folder as soon as it is done, so that an interrupted job
goes on where it stopped and a diverged one keeps what there was.
"""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from minitf.analysis.scan_snap.report import write_report

from minitf.analysis.claims import Claim, as_json, claim, save_claims
from minitf.analysis.run_folder import Problem, open_run_folder
from minitf.analysis.scan_snap import synthetic
from minitf.analysis.scan_snap import text as text_runs
from minitf.analysis.scan_snap.joma import JomaResults, run_joma
from minitf.analysis.scan_snap.joma_claims import joma_claims
from minitf.analysis.scan_snap.results import MediumPanel, ScanSnapResults, SmallRun, TextRun, load_run, save_run
from minitf.analysis.scan_snap.synthetic_claims import fig6_rows, medium_claims, row_sum_claims, small_claims
from minitf.analysis.scan_snap.text_claims import text_claims
from minitf.analysis.scan_snap.theory_claims import theory_claims
from minitf.files import write_atomically
from minitf.train import corpus
from minitf.train.loop import History
from minitf.train.optimizers import check_rates
from minitf.train.progress import Progress
from minitf.train.sequence_classes import SequenceClasses

SMALL_SEEDS, MEDIUM_SEEDS = 16, 10
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
    vocabulary: int = 2000
    length: int = 128
    decoder_rate: float | None = None
    attention_rate: float | None = None
    text_rate: float = text_runs.SGD_RATE
    text_steps: int | None = None

    def __post_init__(self) -> None:
        if self.quick and self.full:
            raise ValueError("--quick and --full exclude each other; choose one")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}; it must lie between 0 and {2**31 - 1}")
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


class Diverged(Problem):
    """Training stopped at a loss that is not finite."""


class _Job:
    """The stages of one run folder: each is computed, or read if an earlier run finished it."""

    def __init__(self, config: ScanSnapConfig, folder: Path, progress: Progress) -> None:
        self.config, self.folder, self.progress = config, folder, progress
        self.arrays = folder / "arrays"

    def claims(self, name: str, title: str, make: Callable[[], list[Claim]]) -> list[Claim]:
        """A stage that yields claims."""
        file = self.arrays / f"{name}.claims.json"
        if not file.exists():
            with self.progress.stage(title):
                write_atomically(file, as_json(make()).encode())
        return [_claim_from(row) for row in json.loads(file.read_text())]

    def runs(self, names: Sequence[str], kind: type, title: str, steps: int, make: Callable) -> list[Any]:
        """A stage that yields arrays; ``make`` takes the progress report and returns (runs, histories)."""
        if not all((self.arrays / f"{name}.json").exists() for name in names):
            with self.progress.stage(title, steps) as report:
                made, histories = make(report)
            for name, run in zip(names, made, strict=True):
                save_run(self.arrays, name, run)
            for history in histories:
                self._check(history, names, title)
        return [load_run(self.arrays, name, kind) for name in names]

    def _check(self, history: History, names: Sequence[str], title: str) -> None:
        if np.all(history.diverged < 0) and history.finished:
            return
        for name in names:  # unfinished stages are not to be taken for finished ones
            (self.arrays / f"{name}.json").rename(self.arrays / f"{name}.partial.json")
        if np.all(history.diverged < 0):
            raise KeyboardInterrupt
        step = int(history.diverged[history.diverged >= 0].min())
        seed, rate = np.argwhere(history.diverged == step)[0]
        raise Diverged(
            f"{title}: the loss stopped being finite at step {step} (seed {self.config.seed + int(seed)}, "
            f"{_setting(self.config, title, int(rate))}). Choose a smaller learning rate. "
            f"What was measured until then is in {self.arrays}."
        )


def run(
    config: ScanSnapConfig, out: Path, *, overwrite: bool = False, resume: bool = False, quiet: bool = False
) -> list[Claim]:
    """Run everything and write it to ``out``; returns the claims.

    Raises:
        Problem: the folder cannot be used, a text cannot be read, or training diverged; its message is for people.
        KeyboardInterrupt: interrupted; finished stages stay in ``out`` and ``resume`` goes on from there.
    """
    texts = _read_text(config)
    folder = open_run_folder(out, dataclasses.asdict(config), overwrite=overwrite, resume=resume)
    with Progress(quiet) as progress:
        job = _Job(config, folder, progress)
        small, claims = _small(job)
        medium = _medium(job)
        claims += job.claims("medium", "claims of Fig. 6, 11, 12", lambda: medium_claims(medium))
        runs = _text(job, texts)
        claims += text_claims(runs)
        claims += job.claims("theory", "theory", lambda: theory_claims(config.seed))
        (joma,) = job.runs(["joma"], JomaResults, "JoMA", 1, lambda report: ([run_joma(config.seed)], []))
        claims += job.claims("joma_theory", "claims of JoMA", lambda: joma_claims(joma))
        claims.sort(key=_claim_order)
        with progress.stage("report"):
            save_claims(folder / "claims.json", claims)
            write_atomically(folder / "fig6.json", json.dumps(fig6_rows(medium), indent=1).encode())
            results = ScanSnapResults(small=tuple(small), medium=tuple(medium), text=tuple(runs))
            write_report(folder, results, joma, claims, dataclasses.asdict(config), versions())
    return claims


def _small(job: _Job) -> tuple[list[SmallRun], list[Claim]]:
    config, data = job.config, SequenceClasses(length=job.config.length)
    names = [f"small_{i}" for i in range(len(config.settings))]
    small = job.runs(
        names,
        SmallRun,
        "Syn-Small (Fig. 4, 5)",
        2 * synthetic.STEPS,
        lambda report: synthetic.run_small(config.settings, data, SMALL_SEEDS, seed=config.seed, report=report),
    )
    claims = job.claims(
        "small", "claims of Fig. 4, 5", lambda: [*row_sum_claims(), *small_claims(small, config.seed)]
    )
    return small, claims


def _medium(job: _Job) -> list[MediumPanel]:
    panels = []
    for queries in QUICK_PANELS if job.config.quick else ALL_PANELS:

        def make(report: Callable, queries: int = queries) -> tuple[list[MediumPanel], list[History]]:
            panel, history = synthetic.run_medium(
                queries, MEDIUM_SEEDS, seed=job.config.seed, length=job.config.length, report=report
            )
            return [panel], [history]

        title = f"Syn-Medium {queries}/{2 * queries} (Fig. 6)"
        panels += job.runs([f"medium_{queries}"], MediumPanel, title, synthetic.STEPS, make)
    return panels


def _text(job: _Job, texts: corpus.Corpus) -> list[TextRun]:
    config, steps = job.config, job.config.text_lengths
    plans: list[tuple[str, str, int, Sequence[float], int]] = [
        ("text_sgd", "sgd", 1, [config.text_rate], steps["sgd"]),
        ("text_adam", "adam", 1, [text_runs.ADAM_RATE], steps["adam"]),
    ]
    if config.full:
        plans += [
            ("text_sgd_deep", "sgd", 3, [config.text_rate], steps["sgd"]),
            ("text_adam_deep", "adam", 3, [text_runs.ADAM_RATE], steps["adam"]),
            ("text_fig10", "sgd", 1, FIG10_RATES, steps["sgd"]),
        ]
    prepared: list[text_runs.TextData] = []
    runs = []
    for name, optimizer, layers, rates, length in plans:

        def make(report: Callable, plan: tuple = (optimizer, layers, rates, length)) -> tuple[list, list]:
            if not prepared:
                prepared.append(text_runs.prepare(texts, config.vocabulary))
            optimizer, layers, rates, length = plan
            made, history = text_runs.run_text(
                prepared[0], optimizer, rates, length, layers=layers, seed=config.seed, report=report
            )
            return made, [history]

        names = [f"{name}_{i}" for i in range(len(rates))]
        title = f"text: {texts.name}, {optimizer.upper() if optimizer == 'sgd' else 'Adam'}, {layers} layer(s)"
        runs += job.runs(names, TextRun, title, length, make)
    return runs


def _read_text(config: ScanSnapConfig) -> corpus.Corpus:
    """The user's files, a corpus asked for by name, or the interpreter's own documentation."""
    if not config.text:
        return corpus.python_documentation()
    if len(config.text) == 1 and config.text[0] in corpus.DOWNLOADS and not Path(config.text[0]).exists():
        return corpus.download(config.text[0])
    return corpus.read_paths(config.text)


def _setting(config: ScanSnapConfig, title: str, rate: int) -> str:
    """The learning rates of one run, for people."""
    if title.startswith("Syn-Small"):
        same = [s for s in config.settings if s.optimizer == "sgd"]
        return (
            f"eta_Y = {same[rate].decoder_rate:g}, eta_Z = {same[rate].attention_rate:g}"
            if rate < len(same)
            else ""
        )
    if title.startswith("Syn-Medium"):
        grid = synthetic.grid(synthetic.MEDIUM_ATTENTION_RATES, synthetic.MEDIUM_RATIOS)
        return f"eta_Y = {float(grid.decoder[rate]):g}, eta_Z = {float(grid.attention[rate]):g}"
    return f"learning rate {config.text_rate:g}"


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
