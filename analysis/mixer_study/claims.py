"""What has been published about how much of attention the data is needed for, restated for these five tasks.

Figures and their sources are those of the papers; what they were measured on is much larger. A statement says what
of them can be asked here.
"""

from collections.abc import Mapping
from itertools import chain

import numpy as np

from minitf.analysis.claims import Claim, claim, mean_ci95
from minitf.analysis.mixer_study.cell import Cell
from minitf.analysis.mixer_study.replaced import Replaced
from minitf.analysis.mixer_study.tasks import NO_RECALL, Task

Cells = Mapping[tuple[str, str], Cell]
SOFTMAX, UNIFORM, NOTHING = "softmax", "uniform", "nothing"
ONCE = "softmax, then nothing"
FIXED, TRAINED, DENSE = "synthesizer, fixed", "synthesizer, trained", "synthesizer, dense"
FIXED_PAIRS = "softmax, fixed query and key"
FIRST = "least important first"

PAPA = "Hassid et al. 2022 (PAPA)"
SYNTHESIZER = "Tay et al. 2021 (Synthesizer)"
MIXIT = "Dong et al. 2025 (Attention Retrieves, MLP Memorizes)"
FNET = "Lee-Thorp et al. 2022 (FNet)"
GMLP = "Liu et al. 2021 (gMLP)"
PAR = "Mandava et al. 2020 (PAR)"
AFT = "Zhai et al. 2021 (AFT), table of Peng et al. 2023 (RWKV)"
SINGH = "Singh 2023"


def claims(cells: Cells, replaced: Mapping[str, Replaced], tasks: Mapping[str, Task]) -> list[Claim]:
    """All that the rows and tasks which ran can speak to."""
    return [
        *chain.from_iterable(_constant(replaced[name], tasks[name]) for name in tasks if name in replaced),
        *_text(cells),
        *_rules(cells, tasks),
        *_classification(cells),
    ]


def _constant(one: Replaced, task: Task) -> list[Claim]:
    """A trained model's association replaced by its mean over data (PAPA)."""
    every, half = one.at("mean over data", FIRST, 1.0), one.at("mean over data", FIRST, 0.5)
    if task.name == "classification":
        return [
            _seeds(
                "constant_classification",
                "In a trained classifier, constant associations in place of all heads' (the mean over data) cost "
                "little: published, 8 % of the score on average; here, at most twice that.",
                PAPA,
                _share(one.intact - every, one.intact),
                "relative drop of accuracy",
                "<",
                0.16,
            ),
            _seeds(
                "half_constant_classification",
                "With constant associations in the less important half of the heads, little or nothing is lost: "
                "here, at most 2 % of the accuracy.",
                PAPA,
                _share(one.intact - half, one.intact),
                "relative drop of accuracy",
                "<",
                0.02,
            ),
        ]
    if task.name == "recall":
        return [
            _seeds(
                "constant_recall",
                "In a model trained to recall, constant associations cost nearly everything: at least .8 of what "
                "it is better than answers to which no key is looked at.",
                "conclusion of Hassid et al. 2022 and Dong et al. 2025",
                _share(one.intact - every, one.intact - task.references[NO_RECALL]),
                "share of the accuracy above that of no recall that is lost",
                ">",
                0.8,
            )
        ]
    if task.name == "text":
        return [
            _seeds(
                "constant_text",
                "In a trained language model, constant associations cost more than they do in classification: the "
                "perplexity of a byte grows by more than 5 %.",
                "conclusion of Hassid et al. 2022 and Tay et al. 2021",
                2 ** (every - one.intact) - 1,
                "growth of the perplexity",
                ">",
                0.05,
            )
        ]
    return []


def _text(cells: Cells) -> list[Claim]:
    """Trained from scratch on text."""
    bits = {row: cell.final for (row, task), cell in cells.items() if task == "text"}
    found = []

    def more(row: str) -> np.ndarray:
        return (bits[row] - bits[SOFTMAX]) / bits[SOFTMAX]

    if {SOFTMAX, TRAINED, FIXED} <= bits.keys():
        found += [
            _seeds(
                "trained_beats_fixed",
                "Random associations that are trained beat random ones that are not (published: BLEU 27.27 "
                "against 23.89 in translation).",
                SYNTHESIZER,
                bits[FIXED] - bits[TRAINED],
                "bits a byte by which the trained are better",
                ">",
                0.0,
            ),
            _seeds(
                "trained_near_softmax",
                "Trained random associations, the same for every text, cost some percent of the loss (published: "
                "log perplexity 5.4 % more on C4, 1.7 % on LM1B): here, between 0 and 15 %.",
                SYNTHESIZER,
                more(TRAINED),
                "relative growth of the loss",
                "within",
                (0.0, 0.15),
            ),
        ]
    if {SOFTMAX, UNIFORM, NOTHING} <= bits.keys():
        found.append(
            _seeds(
                "uniform_share",
                "A plain average of what came before keeps part of what context is good for (published: one "
                "averaged vector keeps .54 of the signal of gpt-neo-1.3B on HellaSwag): here, from half to one "
                "and a half times that share.",
                SINGH,
                _share(bits[NOTHING] - bits[UNIFORM], bits[NOTHING] - bits[SOFTMAX]),
                "share of the gain over no context at all",
                "within",
                (0.27, 0.81),
            )
        )
    if {SOFTMAX, FIXED_PAIRS} <= bits.keys():
        found.append(
            _seeds(
                "fixed_pairs_text",
                "Softmax attention whose query and key maps stay random is a competitive language model "
                "(published: log perplexity 9.7 % more): here, at most 10 % more.",
                MIXIT,
                more(FIXED_PAIRS),
                "relative growth of the loss",
                "<",
                0.10,
            )
        )
    if {SOFTMAX, "AFT simple", "linear attention", DENSE} <= bits.keys():
        found.append(
            _seeds(
                "softmax_first",
                "Softmax attention beats AFT simple, linear attention and the dense Synthesizer on characters "
                "(published, enwik8: 1.137 against 1.180, 1.207, 1.298 bits).",
                AFT,
                [bits[row] - bits[SOFTMAX] for row in ("AFT simple", "linear attention", DENSE)],
                "bits a byte by which softmax attention is better, of each",
                ">",
                0.0,
            )
        )
    if {SOFTMAX, ONCE} <= bits.keys():
        found.append(
            _seeds(
                "attention_in_half_of_the_layers",
                "A language model needs attention in few of its layers (published: at equal perplexity, 63 % of "
                "the attention blocks may be feed-forward): here, attention in the first of two layers alone "
                "costs at most 2 % of the loss.",
                PAR,
                more(ONCE),
                "relative growth of the loss",
                "<",
                0.02,
            )
        )
    if {SOFTMAX, "gMLP"} <= bits.keys():
        found.append(
            _seeds(
                "gmlp_parity",
                "gMLP is on a par with attention (published: as a masked language model): here, within 3 % of its "
                "loss on the next byte.",
                GMLP,
                more("gMLP"),
                "relative growth of the loss",
                "within",
                (-0.03, 0.03),
            )
        )
    return found


def _rules(cells: Cells, tasks: Mapping[str, Task]) -> list[Claim]:
    """Recall, addition, memorisation (MixiT)."""
    found = []
    for name, needs in (("addition", False), ("memorisation", False), ("recall", True)):
        if not {(SOFTMAX, name), (FIXED, name)} <= cells.keys():
            continue
        lost = cells[SOFTMAX, name].final - cells[FIXED, name].final
        says, statistic = f"matches attention at {name}: here, within .05 of its accuracy", "accuracy"
        if needs:
            says = (
                "fails at recall, which attention solves: it lacks at least .8 of what attention is better than "
                "answers to which no key is looked at"
            )
            statistic = "share of its accuracy above that of no recall"
            lost = _share(lost, cells[SOFTMAX, name].final - tasks[name].references[NO_RECALL])
        found.append(
            _seeds(
                f"fixed_{name}",
                f"A random association that is never trained {says}.",
                MIXIT,
                lost,
                f"{statistic} that softmax attention has more",
                ">" if needs else "<",
                0.8 if needs else 0.05,
            )
        )
    if {(SOFTMAX, "recall"), (FIXED_PAIRS, "recall")} <= cells.keys():
        least = tasks["recall"].references[NO_RECALL]
        share = _share(cells[FIXED_PAIRS, "recall"].final - least, cells[SOFTMAX, "recall"].final - least)
        found.append(
            _seeds(
                "fixed_pairs_recall",
                "Softmax attention whose query and key maps stay random still forms induction heads: it keeps at "
                "least .9 of what attention is better than answers to which no key is looked at.",
                MIXIT,
                share,
                "share of the accuracy above that of no recall",
                ">",
                0.9,
            )
        )
    return found


def _classification(cells: Cells) -> list[Claim]:
    """From scratch on classification."""
    found = []
    for row, name, text, source, least in (
        (
            "FNet",
            "fnet",
            "Fourier mixing, without any weights, keeps 92 to 97 % of attention's score in classification: "
            "here, at least 92 %.",
            FNET,
            0.92,
        ),
        (
            UNIFORM,
            "uniform_classification",
            "A plain average in place of attention costs little in classification: it keeps at least 90 % of the "
            "accuracy.",
            "conclusion of Hassid et al. 2022 and Lee-Thorp et al. 2022",
            0.9,
        ),
    ):
        if {(SOFTMAX, "classification"), (row, "classification")} <= cells.keys():
            share = _share(cells[row, "classification"].final, cells[SOFTMAX, "classification"].final)
            unmixed = cells.get((NOTHING, "classification"))
            note = "" if unmixed is None else f"A model that mixes nothing keeps {_kept(unmixed, cells):.2f}."
            found.append(_seeds(name, text, source, share, "accuracy, of attention's", ">", least, note))
    if {(SOFTMAX, "classification"), (UNIFORM, "classification"), (NOTHING, "classification")} <= cells.keys():
        softmax, uniform, nothing = (cells[row, "classification"].final for row in (SOFTMAX, UNIFORM, NOTHING))
        found.append(
            _seeds(
                "uniform_gain_classification",
                "Of what mixing is good for in classification (over a model that mixes nothing), a plain average "
                "keeps at least half: it is nearer to attention than to nothing.",
                "the same conclusion, asked of what mixing adds",
                uniform - (softmax + nothing) / 2,
                "accuracy above the middle between attention and nothing",
                ">",
                0.0,
            )
        )
    return found


def _kept(cell: Cell, cells: Cells) -> float:
    return float(
        _share(cell.final.mean(keepdims=True), cells[SOFTMAX, "classification"].final.mean(keepdims=True))[0]
    )


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """NaN where there is no whole, or less than none (a model that has learned nothing, or learned worse than what
    it is compared with), so that what is claimed does not hold."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)


def _seeds(
    name: str,
    statement: str,
    source: str,
    samples: np.ndarray | list[np.ndarray],
    statistic: str,
    direction: str,
    threshold: float | tuple[float, float],
    note: str = "",
) -> Claim:
    """A claim about the mean over seeds, of one row, or of two in pairs; several numbers from several samples."""
    each = [mean_ci95(one) for one in np.atleast_2d(samples)]
    several = np.ndim(samples) == 2
    means, intervals = [mean for mean, _ in each], [interval for _, interval in each]
    known = None if any(interval is None for interval in intervals) else (intervals if several else intervals[0])
    return claim(
        f"mixers.{name}",
        statement,
        source=source,
        statistic=f"{statistic}; mean over seeds",
        value=means if several else means[0],
        direction=direction,  # type: ignore[arg-type]
        threshold=threshold,
        n=np.atleast_2d(samples).shape[1],
        ci95=known,
        note=note,
    )
