"""The main job: every experiment of Scan and Snap and JoMA, its claims, and the report.

Each stage leaves its arrays and claims in the output folder as soon as it is done, so that an interrupted job
goes on where it stopped and a diverged one keeps what there was.
"""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from minitf.analysis.claims import Claim, save_claims
from minitf.analysis.run_folder import check_run_folder, open_run_folder, told_to_people, writing_results
from minitf.analysis.scan_snap import synthetic
from minitf.analysis.scan_snap import text as text_runs
from minitf.analysis.scan_snap.joma import JomaResults, run_joma
from minitf.analysis.scan_snap.joma_claims import joma_claims
from minitf.analysis.scan_snap.report import write_report
from minitf.analysis.scan_snap.results import MediumPanel, ScanSnapResults, SmallRun, TextRun
from minitf.analysis.scan_snap.synthetic_claims import fig6_rows, medium_claims, row_sum_claims, small_claims
from minitf.analysis.scan_snap.text_claims import text_claims
from minitf.analysis.scan_snap.theory_claims import theory_claims
from minitf.analysis.stages import Stages, noticing_interrupts
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


def run(
    config: ScanSnapConfig, out: Path, *, overwrite: bool = False, resume: bool = False, quiet: bool = False
) -> list[Claim]:
    """Run everything and write it to ``out``; returns the claims.

    Raises:
        Problem: the folder cannot be used, a text cannot be read, or training diverged; its message is for people.
        KeyboardInterrupt: interrupted; finished stages stay in ``out`` and ``resume`` goes on from there.
    """
    with Progress(quiet) as progress, noticing_interrupts() as interrupted:
        texts = _read_text(config, progress)
        recorded = {**dataclasses.asdict(config), **corpus.identity(texts)}
        check_run_folder(out, recorded, overwrite=overwrite, resume=resume)
        # Before anything is trained, so that too little text is told at once.
        with progress.stage("text: vocabulary"), told_to_people():
            prepared = text_runs.prepare(texts, config.vocabulary)
        folder = open_run_folder(out, recorded, overwrite=overwrite, resume=resume)
        with writing_results(folder):
            stages = Stages(folder / "arrays", progress, interrupted, config.seed)
            return _stages(config, stages, folder, prepared, recorded)


def _stages(
    config: ScanSnapConfig, job: Stages, folder: Path, prepared: text_runs.TextData, recorded: dict[str, Any]
) -> list[Claim]:
    small, claims = _small(config, job)
    medium = _medium(config, job)
    claims += job.claims("medium", "claims: Fig. 6, 11, 12", lambda: medium_claims(medium))
    runs = _text(config, job, prepared)
    claims += text_claims(runs)
    claims += job.claims("theory", "theory", lambda: theory_claims(config.seed))
    (joma,) = job.runs({"joma": JomaResults}, "JoMA", lambda report: ([run_joma(config.seed)], []))
    claims += job.claims("joma_theory", "claims: JoMA", lambda: joma_claims(joma))
    claims.sort(key=_claim_order)
    with job.progress.stage("report"):
        save_claims(folder / "claims.json", claims)
        write_atomically(folder / "fig6.json", json.dumps(fig6_rows(medium), indent=1).encode())
        results = ScanSnapResults(small=tuple(small), medium=tuple(medium), text=tuple(runs))
        write_report(folder, results, joma, claims, recorded, versions())
    return claims


def _small(config: ScanSnapConfig, job: Stages) -> tuple[list[SmallRun], list[Claim]]:
    data = SequenceClasses(length=config.length)
    kinds = list(dict.fromkeys(s.optimizer for s in config.settings))
    small = job.runs(
        {f"small_{i}": SmallRun for i in range(len(config.settings))},
        "Syn-Small (Fig. 4, 5)",
        lambda report: synthetic.run_small(config.settings, data, SMALL_SEEDS, seed=config.seed, report=report),
        steps=len(kinds) * synthetic.STEPS,
        rates=[
            [_rates(s.decoder_rate, s.attention_rate) for s in config.settings if s.optimizer == k] for k in kinds
        ],
    )
    claims = job.claims(
        "small", "claims: Fig. 4, 5", lambda: [*row_sum_claims(small), *small_claims(small, config.seed)]
    )
    return small, claims


def _medium(config: ScanSnapConfig, job: Stages) -> list[MediumPanel]:
    grid = synthetic.grid(synthetic.MEDIUM_ATTENTION_RATES, synthetic.MEDIUM_RATIOS)
    rates = [_rates(float(y), float(z)) for y, z in zip(grid.decoder, grid.attention, strict=True)]
    panels = []
    for queries in QUICK_PANELS if config.quick else ALL_PANELS:

        def make(report: Report, queries: int = queries) -> tuple[list[MediumPanel], list[History]]:
            panel, history = synthetic.run_medium(
                queries, MEDIUM_SEEDS, seed=config.seed, length=config.length, report=report
            )
            return [panel], [history]

        title = f"Syn-Medium {queries}/{2 * queries}"
        name = f"medium_{queries}"
        panels += job.runs({name: MediumPanel}, title, make, steps=synthetic.STEPS, rates=[rates])
    return panels


def _text(config: ScanSnapConfig, job: Stages, prepared: text_runs.TextData) -> list[TextRun]:
    steps = config.text_lengths
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
            {f"{name}_{i}": TextRun for i in range(len(rates))},
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
