"""The closed forms of Scan and Snap (Tian et al. 2023, arXiv 2305.16380): decoder, attention, snapping.

Symbols and units, the same in every function:

- ``classes`` K, the number of next tokens; ``vocabulary`` M, the number of output tokens;
- ``eta_y``, ``eta_z``: the learning rates of the decoder table Y and of the attention table Z;
- ``t``: time in steps, one step being one sample of a uniformly drawn class; ``visits`` s = t / K: how often
  one given class has been seen;
- ``initial`` C_0: the constant of Theorem 4, rho_0^4 / K with rho_0 the initial overlap of two classes.

Everything is float64 numpy and vectorized over time. All logarithms are natural. Functions raise ValueError
for M < 2 (w1 and t0: M < 4), K < 1, rates or C_0 that are not positive, and negative times.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize

Numbers = float | int | np.ndarray | np.floating | Sequence[Any]
Curve = Float[np.ndarray, "*time"]


def _positive(**numbers: float | int) -> None:
    for name, number in numbers.items():
        if not (number > 0 and math.isfinite(number)):
            raise ValueError(f"{name} is {number}; it must be a positive number")


def _at_least(least: int, **numbers: float | int) -> None:
    for name, number in numbers.items():
        if not number >= least:
            raise ValueError(f"{name} is {number}; it must be at least {least}")


def _times(t: Numbers) -> np.ndarray:
    array = np.asarray(t, np.float64)
    if not np.all(array >= 0):
        raise ValueError(f"the earliest time is {np.min(array)}; times must be 0 or later")
    return array


# One step (section 2)


def lemma1_update(
    y: Float[np.ndarray, "token output"],
    z: Float[np.ndarray, " token"],
    context: Int[np.ndarray, " position"],
    label: int,
) -> tuple[Float[np.ndarray, "token output"], Float[np.ndarray, " token"]]:
    """Lemma 1: the gradient ascent directions of ln alpha_n in Y and in the query's row of Z, rates left out.

    dY = f (e_n - alpha)^T and dz = X^T diag(b) X (I - f f^T) / ||v|| Y (e_n - alpha), in logits per unit
    rate. ``context`` holds the T - 1 contextual tokens, ``z`` the query's attention logits, ``label`` n.
    """
    score = z[context]
    b = np.exp(score - score.max())
    b /= b.sum()
    v = np.bincount(context, weights=b, minlength=len(z))
    f = v / np.linalg.norm(v)
    logits = y.T @ f
    alpha = np.exp(logits - logits.max())
    alpha /= alpha.sum()
    residual = np.eye(len(alpha))[label] - alpha
    push = y @ residual
    # X^T diag(b) X is diagonal with entries v: every token's total attention.
    return np.outer(f, residual), v * (push - f * (f @ push)) / np.linalg.norm(v)


# Decoder (section 4, appendix D)


def h_star(visits: int, vocabulary: int, eta_y: float) -> Float[np.ndarray, " visits_and_zero"]:
    """Lemma 5: h*(0) = 0 and h*(s) = h*(s-1) + eta_Y / (M - 1 + e^{M h*(s-1)}), for s = 0 .. ``visits``.

    After s visits of its class the decoder row is w_n = (M - 1) h*(s) zeta_n, in logits.
    """
    _at_least(2, vocabulary=vocabulary)
    _at_least(0, visits=visits)
    _positive(eta_y=eta_y)
    path = np.zeros(visits + 1)
    for s in range(1, visits + 1):
        path[s] = path[s - 1] + eta_y / (vocabulary - 1 + math.exp(vocabulary * path[s - 1]))
    return path


def h(visits: Numbers, vocabulary: int, eta_y: float) -> Curve:
    """Lemma 6: the continuous h(s), root of e^{M h} + (M - 1) M h = M eta_Y s + 1.

    Newton on y = M h, started at min(ln(M eta_Y s + 1), eta_Y s), which bounds the root from above; the left
    side is convex and increasing, so the iteration falls monotonically onto the root.
    """
    _at_least(2, vocabulary=vocabulary)
    _positive(eta_y=eta_y)
    total = vocabulary * eta_y * _times(visits)
    y = np.minimum(np.log1p(total), total / vocabulary)
    for _ in range(100):
        slope = np.exp(y) + (vocabulary - 1)
        step = (np.expm1(y) + (vocabulary - 1) * y - total) / slope
        y = np.maximum(y - step, 0.0)
        if np.all(np.abs(step) <= 4 * np.finfo(np.float64).eps * y):
            break
    return np.asarray(y / vocabulary)


def gamma(t: Numbers, classes: int, vocabulary: int, eta_y: float) -> Curve:
    """Lemma 9: gamma(t) = (M-1)^2 h(t/K) / (M - 1 + e^{M h(t/K)}), the size of the decoder's push
    (logits)."""
    _at_least(1, classes=classes)
    height = h(_times(t) / classes, vocabulary, eta_y)
    return np.asarray((vocabulary - 1) ** 2 * height / (vocabulary - 1 + np.exp(vocabulary * height)))


def correct_probability(t: Numbers, classes: int, vocabulary: int, eta_y: float) -> Curve:
    """alpha_n(t) = e^y / (M - 1 + e^y) with y = M h(t/K): the probability of the right next token."""
    _at_least(1, classes=classes)
    y = vocabulary * h(_times(t) / classes, vocabulary, eta_y)
    return np.asarray(1.0 / (1.0 + (vocabulary - 1) * np.exp(-y)))


def half_time(classes: int, vocabulary: int, eta_y: float) -> float:
    """The time of alpha_n = 1/2, in steps: K ((M-1) (1 + ln(M-1)) - 1) / (M eta_Y), from Lemma 6."""
    _at_least(2, vocabulary=vocabulary)
    _positive(classes=classes, eta_y=eta_y)
    others = vocabulary - 1
    return classes * (others * (1 + math.log(others)) - 1) / (vocabulary * eta_y)


def u(classes: int, vocabulary: int, eta_y: float) -> float:
    """The decoder's unit of time, u = K ln M / eta_Y steps."""
    _at_least(2, vocabulary=vocabulary)
    _positive(classes=classes, eta_y=eta_y)
    return classes * math.log(vocabulary) / eta_y


def w1(vocabulary: int) -> float:
    """Lemma 9: the root of M^{w1} = (1 + w1) ((M-1)/M) ln M; dimensionless, Theta(ln ln M / ln M)."""
    _at_least(4, vocabulary=vocabulary)
    log_m = math.log(vocabulary)
    offset = math.log((vocabulary - 1) / vocabulary * log_m)

    def excess(w: float) -> float:
        return w * log_m - math.log1p(w) - offset

    return float(optimize.brentq(excess, 0.0, 10.0, xtol=1e-15, rtol=4 * np.finfo(np.float64).eps))


def t0(classes: int, vocabulary: int, eta_y: float) -> float:
    """Where scanning turns into snapping: t_0 = 2 (1 + w1) K ln M / eta_Y steps (Theorem 4)."""
    return 2 * (1 + w1(vocabulary)) * u(classes, vocabulary, eta_y)


def theorem1_coefficients(
    gram: Float[np.ndarray, "classes classes"], vocabulary: int
) -> Float[np.ndarray, "classes classes"]:
    """Theorems 1 and 5: g_n = gamma sum over n' of f_n' C[n', n], noise dropped; this is C.

    C = (I - E') (q1 I + q0 (1 1^T - I)) with I - E' = (F^T F)^{-1}, q1 = 1 + 1/(M-1), q0 = -M/(M-1)^2. The
    diagonal is iota_n and minus the rest is beta. ``gram`` is F^T F, the overlaps of the classes' features.
    """
    _at_least(2, vocabulary=vocabulary)
    classes = gram.shape[0]
    q1, q0 = 1 + 1 / (vocabulary - 1), -vocabulary / (vocabulary - 1) ** 2
    return np.linalg.solve(gram, (q1 - q0) * np.eye(classes) + q0)


def equal_overlap_correction(overlap: float, classes: int) -> float:
    """The off-diagonal E' = rho / ((1 - rho) (1 - rho + K rho)) when any two classes overlap by rho."""
    _at_least(1, classes=classes)
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; the overlap of two different classes lies in [0, 1)")
    return overlap / ((1 - overlap) * (1 - overlap + classes * overlap))


# Attention and snapping (sections 5 and 6, appendices E and F)


def frequency_deviation(length: Numbers, failure: float) -> Curve:
    """Lemma 2: sqrt(ln(2/delta) / (2 (T-1))) bounds a token's frequency error with probability 1 - delta.

    ``length`` is T, so T - 1 contextual tokens; ``failure`` is delta.
    """
    count = np.asarray(length, np.float64) - 1
    if not np.all(count >= 1):
        raise ValueError(f"the shortest length is {np.min(count) + 1}; a context needs at least T = 2")
    if not 0 < failure < 1:
        raise ValueError(f"failure is {failure}; a probability of failure lies strictly between 0 and 1")
    return np.asarray(np.sqrt(math.log(2 / failure) / (2 * count)))


def attention_push(t: Numbers, classes: int, vocabulary: int, eta_y: float, eta_z: float) -> Curve:
    """Gamma(t) = eta_Z int_0^t gamma = (eta_Z/eta_Y) K (M-1)^2 h(t/K)^2 / 2, exactly (logits)."""
    _positive(eta_z=eta_z)
    _at_least(1, classes=classes)
    height = (vocabulary - 1) * h(_times(t) / classes, vocabulary, eta_y)
    return np.asarray((eta_z / eta_y) * classes * height**2 / 2)


def exponent_printed(push: Numbers, initial: float = 1.0) -> Curve:
    """Theorem 4 as printed: B = (1/4) ln(C_0 + 4 Gamma), in logits; not 0 at t = 0 unless C_0 = 1."""
    _positive(initial=initial)
    return np.asarray(np.log(initial + 4 * np.asarray(push, np.float64)) / 4)


def exponent_integrated(push: Numbers, initial: float = 1.0) -> Curve:
    """Theorem 4's equation integrated from B(0) = 0: B = (1/4) ln(1 + 4 Gamma / C_0), in logits.

    The paper drops the constant -(1/4) ln C_0.
    """
    _positive(initial=initial)
    return np.asarray(np.log1p(4 * np.asarray(push, np.float64) / initial) / 4)


def exponent_corrected(push: Numbers, initial: float, common_rate: float) -> Curve:
    """B = (1/(4 A)) ln(1 + 4 A Gamma / C_0) where the common token falls A times faster than B grows.

    When all K classes share the query, Theorem 2 gives A = K (1 - f_ct^2); Theorem 4 as printed has A = 1.
    """
    _positive(initial=initial, common_rate=common_rate)
    return np.asarray(np.log1p(4 * common_rate * np.asarray(push, np.float64) / initial) / (4 * common_rate))


def exponent_scanning(
    t: Numbers, classes: int, vocabulary: int, eta_y: float, eta_z: float, *, initial: float = 1.0
) -> Curve:
    """Theorem 4 before u: B = (1/4) ln(C_0 + 2 (M-1)^2 eta_Y eta_Z t^2 / (K M^2)), in logits."""
    _at_least(2, vocabulary=vocabulary)
    _positive(classes=classes, eta_y=eta_y, eta_z=eta_z, initial=initial)
    early = 2 * ((vocabulary - 1) / vocabulary) ** 2 * eta_y * eta_z * _times(t) ** 2 / classes
    return np.asarray(np.log(initial + early) / 4)


def exponent_snapping(
    t: Numbers, classes: int, vocabulary: int, eta_y: float, eta_z: float, *, initial: float = 1.0
) -> Curve:
    """Theorem 4 from t_0 on: B = (1/4) ln(C_0 + 2K ((M-1)/M)^2 (eta_Z/eta_Y) ln^2(M eta_Y t/K)), in
    logits."""
    _at_least(2, vocabulary=vocabulary)
    _positive(classes=classes, eta_y=eta_y, eta_z=eta_z, initial=initial)
    late = np.log(vocabulary * eta_y * _times(t) / classes) ** 2
    return np.asarray(
        np.log(initial + 2 * classes * ((vocabulary - 1) / vocabulary) ** 2 * (eta_z / eta_y) * late) / 4
    )


def growth_factor(exponent: Numbers) -> Curve:
    """Theorem 3: chi = e^{2 B}, by which the squared-ratio excess of two distinct tokens grows at most."""
    return np.asarray(np.exp(2 * np.asarray(exponent, np.float64)))


def ratio_excess(stronger: Numbers, weaker: Numbers, gain: Numbers = 0.0) -> Curve:
    """Theorem 3: r = (P_l^2 / P_l'^2 - 1) e^{2 z_l}: how far two distinct tokens of a class are apart.

    ``stronger`` and ``weaker`` are P(l|n) and P(l'|n) with z(0) = 0; ``gain`` is z_l(t), in logits.
    """
    ratio = np.asarray(stronger, np.float64) / np.asarray(weaker, np.float64)
    return np.asarray((ratio**2 - 1) * np.exp(2 * np.asarray(gain, np.float64)))


# Curves for the report


@dataclasses.dataclass(frozen=True)
class TheoryCurves:
    """The paper's theoretical figures as arrays; float64 throughout.

    Fig. 3 (K=10, M=1000, eta_Z=.5, C_0=1): ``fig3_growth`` e^{2B} [curve, step], ``fig3_t0`` [curve].
    Fig. 8: ``fig8_h_star`` and ``fig8_h`` [vocabulary, eta_y, visits], ``fig8_eta_y`` [vocabulary, eta_y].
    Fig. 9 (K=1, C_0=1): ``fig9_exponent`` B [panel, eta_z, time], ``fig9_time`` [panel, time], ``fig9_t0``
    [panel, eta_z]; panel 0 has nu = eta_Y/eta_Z = 10 and M = 100, panel 1 has nu = 1 and M = 10000.
    Times are steps, visits are visits of one class.
    """

    fig3_time: Float[np.ndarray, " step"]
    fig3_eta_y: Float[np.ndarray, " curve"]
    fig3_growth: Float[np.ndarray, "curve step"]
    fig3_t0: Float[np.ndarray, " curve"]
    fig8_visits: Float[np.ndarray, " visits"]
    fig8_vocabulary: Float[np.ndarray, " vocabulary"]
    fig8_eta_y: Float[np.ndarray, "vocabulary fig8_eta_y"]
    fig8_h_star: Float[np.ndarray, "vocabulary fig8_eta_y visits"]
    fig8_h: Float[np.ndarray, "vocabulary fig8_eta_y visits"]
    fig9_time: Float[np.ndarray, "panel time"]
    fig9_eta_z: Float[np.ndarray, " eta_z"]
    fig9_ratio: Float[np.ndarray, " panel"]
    fig9_vocabulary: Float[np.ndarray, " panel"]
    fig9_exponent: Float[np.ndarray, "panel eta_z time"]
    fig9_t0: Float[np.ndarray, "panel eta_z"]


def fig3_growth(t: Numbers, eta_y: float, initial: float = 1.0) -> Curve:
    """Fig. 3's growth factor e^{2B} at K=10, M=1000, eta_Z=.5; the paper does not state C_0 (``initial``)."""
    return growth_factor(exponent_integrated(attention_push(t, 10, 1000, eta_y, 0.5), initial))


def fig9_exponent(t: Numbers, ratio: float, vocabulary: int, eta_z: float) -> Curve:
    """Fig. 9's B(t) at fixed ratio nu = eta_Y / eta_Z; K = 1 and C_0 = 1 fit the paper's axes, unstated
    there."""
    return exponent_integrated(attention_push(t, 1, vocabulary, ratio * eta_z, eta_z))


def theory_curves() -> TheoryCurves:
    """Everything the report draws of the paper's Figs. 3, 8 and 9."""
    fig3_eta, time3 = (0.5, 1.0, 2.0, 5.0), np.arange(701.0)
    vocabulary8, visits = (50, 1000), np.arange(76.0)
    eta8 = ((0.1, 0.2, 0.5, 1.0, 2.0), (0.2, 0.5, 1.0, 2.0, 4.0))
    eta9, panels = (0.5, 1.0, 2.0, 4.0, 8.0), ((10.0, 100, 5.0), (1.0, 10000, 50.0))
    time9 = [np.linspace(0, last, 251) for _, _, last in panels]
    return TheoryCurves(
        fig3_time=time3,
        fig3_eta_y=np.array(fig3_eta),
        fig3_growth=np.stack([fig3_growth(time3, eta) for eta in fig3_eta]),
        fig3_t0=np.array([t0(10, 1000, eta) for eta in fig3_eta]),
        fig8_visits=visits,
        fig8_vocabulary=np.array(vocabulary8, np.float64),
        fig8_eta_y=np.array(eta8),
        fig8_h_star=np.stack(
            [[h_star(75, m, e) for e in etas] for m, etas in zip(vocabulary8, eta8, strict=True)]
        ),
        fig8_h=np.stack([[h(visits, m, e) for e in etas] for m, etas in zip(vocabulary8, eta8, strict=True)]),
        fig9_time=np.stack(time9),
        fig9_eta_z=np.array(eta9),
        fig9_ratio=np.array([nu for nu, _, _ in panels]),
        fig9_vocabulary=np.array([m for _, m, _ in panels], np.float64),
        fig9_exponent=np.stack(
            [
                [fig9_exponent(times, nu, m, eta) for eta in eta9]
                for (nu, m, _), times in zip(panels, time9, strict=True)
            ]
        ),
        fig9_t0=np.array([[t0(1, m, nu * eta) for eta in eta9] for nu, m, _ in panels]),
    )
