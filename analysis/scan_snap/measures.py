"""What the figures and claims of Scan and Snap measure, on plain arrays.

Symbols: c_n is the attention of class n's query over the contextual tokens when sequences are infinitely long,
P(l|n) how often token l occurs in class n, z the query's row of Z. Entropies are in nats.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float
from scipy import special

from minitf.analysis.scan_snap import theory
from minitf.analysis.scan_snap.results import SmallRun

Masses = Float[np.ndarray, "*rest class token"]
PerClass = Float[np.ndarray, "*rest class"]
ClassMask = Bool[np.ndarray, "class token"]


def association(logits: Masses, probability: Float[np.ndarray, "class token"]) -> Masses:
    """c_n = P(l|n) e^{z_l} / sum_k P(k|n) e^{z_k} (Lemma 2): what is attended to when T is infinite.

    Raises ValueError for a class in which no token ever occurs.
    """
    if not np.all(probability.sum(axis=-1) > 0):
        raise ValueError(f"class {int(np.argmin(probability.sum(axis=-1)))} has no token of positive probability")
    log_mass = logits + np.where(probability > 0, np.log(np.where(probability > 0, probability, 1)), -np.inf)
    return special.softmax(log_mass, axis=-1)


def distinct_shares(c: Masses, distinct: ClassMask) -> Masses:
    """c_n restricted to the class's distinct tokens and renormalized; 0 elsewhere.

    Raises ValueError for a class without distinct tokens, or when they have no mass at all.
    """
    if not np.all(distinct.any(axis=-1)):
        raise ValueError(f"class {int(np.argmin(distinct.any(axis=-1)))} has no distinct token")
    part = np.where(distinct, c, 0.0)
    total = part.sum(axis=-1, keepdims=True)
    if not np.all(total > 0):
        raise ValueError("the distinct tokens of a class have mass 0; their shares are undefined")
    return part / total


def distinct_entropy(c: Masses, distinct: ClassMask) -> PerClass:
    """Entropy of c_n on the class's distinct tokens, in nats (Fig. 6); ln 10 when ten of them are equal."""
    return special.entr(distinct_shares(c, distinct)).sum(axis=-1)


def common_mass(c: Masses, common: Bool[np.ndarray, " token"]) -> PerClass:
    """How much of c_n goes to common tokens, between 0 and 1."""
    return np.where(common, c, 0.0).sum(axis=-1)


def strongest(probability: Float[np.ndarray, "class token"], distinct: ClassMask) -> np.ndarray:
    """The index of each class's most frequent distinct token, [class]; the first of several."""
    return np.where(distinct, probability, -np.inf).argmax(axis=-1)


def strongest_mass(c: Masses, probability: Float[np.ndarray, "class token"], distinct: ClassMask) -> PerClass:
    """c_n of the class's most frequent distinct token."""
    classes = np.arange(c.shape[-2])
    return c[..., classes, strongest(probability, distinct)]


def strongest_share(c: Masses, probability: Float[np.ndarray, "class token"], distinct: ClassMask) -> PerClass:
    """The share of the class's most frequent distinct token in its distinct tokens' attention."""
    return strongest_mass(distinct_shares(c, distinct), probability, distinct)


def ratio_excess(
    stronger: Float[np.ndarray, "*rest"], weaker: Float[np.ndarray, "*rest"]
) -> Float[np.ndarray, "*rest"]:
    """Theorem 3's r = f_l^2 / f_l'^2 - 1 = (c_l / c_l')^2 - 1 of two distinct tokens; 0 when they are equal."""
    return (stronger / weaker) ** 2 - 1


def ratio_growth(logit: Float[np.ndarray, "*#rest"], start: Float[np.ndarray, "*#rest"]) -> np.ndarray:
    """Theorem 3's chi_l = e^{2 (z_l(t) - z_l(0))}: r(t) / r(0) for every weaker distinct token."""
    return np.exp(2 * (logit - start))


def law_logits(probability: Float[np.ndarray, " token"], logit: Float[np.ndarray, "*rest"]) -> np.ndarray:
    """Distinct tokens' z, [*rest, token], that Theorem 3 predicts from the strongest one's alone (``logit``).

    From Z(0) = 0, (1 - e^{-2 z_l}) / P_l^2 is the same for all distinct tokens of a class. ``probability`` are
    their P(l|n) up to a factor.
    """
    weight = (probability / probability.max()) ** 2
    return -np.log1p(weight * np.expm1(-2 * logit[..., None])) / 2


def law_entropy(probability: Float[np.ndarray, " token"], logit: Float[np.ndarray, "*rest"]) -> np.ndarray:
    """The entropy of the distinct part, in nats, if the logits are those of :func:`law_logits`."""
    mass = probability * np.exp(law_logits(probability, logit))
    return special.entr(mass / mass.sum(axis=-1, keepdims=True)).sum(axis=-1)


def recall(
    attention: Masses, distinct: ClassMask, thresholds: Float[np.ndarray, " threshold"]
) -> Float[np.ndarray, "*rest threshold"]:
    """Share of all classes' distinct tokens whose attention is above each threshold (Fig. 11, 12).

    The paper's ``attention`` here is the softmax of z over the whole vocabulary, 1/M at the start.
    """
    above = attention[..., distinct][..., None] > thresholds
    return above.mean(axis=-2)


def first_below(loss: Float[np.ndarray, "*rest step"], level: float) -> Float[np.ndarray, "*rest"]:
    """The first step at which the loss is below ``level``; infinity if it never is."""
    below = loss < level
    return np.where(below.any(axis=-1), below.argmax(axis=-1).astype(np.float64), np.inf)


@dataclasses.dataclass(frozen=True)
class Progress:
    """How one :class:`SmallRun` went, means over its classes: ``[seed, record]`` each."""

    entropy: np.ndarray  # of the distinct part, nats
    law: np.ndarray  # the same, predicted by Theorem 3 from the strongest distinct token's logit, nats
    common: np.ndarray  # mass of the common tokens
    strongest: np.ndarray  # mass of the strongest distinct token


def law_entropies(run: SmallRun) -> np.ndarray:
    """:func:`law_entropy` of every class at every record, [seed, record, class], nats."""
    top = strongest(run.probability, run.distinct)
    per_class = [
        law_entropy(
            np.asarray(run.probability[n, run.distinct[n]], np.float64),
            np.asarray(run.attention_logits[:, :, n, top[n]], np.float64),
        )
        for n in range(len(run.distinct))
    ]
    return np.stack(per_class, axis=-1)


def progress(run: SmallRun) -> Progress:
    """The curves of Fig. 4 in numbers."""
    c = np.asarray(run.association, np.float64)
    return Progress(
        entropy=distinct_entropy(c, run.distinct).mean(axis=-1),
        law=law_entropies(run).mean(axis=-1),
        common=common_mass(c, run.common).mean(axis=-1),
        strongest=strongest_mass(c, run.probability, run.distinct).mean(axis=-1),
    )


def vocabulary(run: SmallRun) -> int:
    """M of Syn-Small: contextual tokens, then one query token and one next token per class."""
    return run.probability.shape[1] + 2 * run.probability.shape[0]


def snapping_time(run: SmallRun, momentum: float = 0.9) -> tuple[float, float] | None:
    """Theorem 4's t_0 in steps, with the momentum's gain 1 / (1 - momentum) in the rate, and without it.

    A step on a batch's mean is one unit of the theory's time. None for Adam, for which there is no theory.
    """
    if run.optimizer != "sgd":
        return None
    slow = theory.t0(len(run.probability), vocabulary(run), run.decoder_rate)
    return slow * (1 - momentum), slow


def nearest_records(steps: np.ndarray, wanted: tuple[int, ...]) -> list[int]:
    """Indices of the records nearest to the wanted steps, and of the last one; each once, in order."""
    chosen = [int(np.abs(np.asarray(steps, np.float64) - w).argmin()) for w in wanted if w <= steps[-1]]
    return sorted({*chosen, len(steps) - 1})
