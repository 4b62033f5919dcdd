"""JoMA's statements beside what :mod:`joma` measured."""

import math

import numpy as np
from scipy import special

from minitf.analysis.claims import Claim, claim, mean_ci95
from minitf.analysis.scan_snap.joma import INVARIANT_CASES, JomaResults

SOURCE = "JoMA, arXiv 2310.00535"


def _over_seeds(samples: np.ndarray) -> tuple[list[float], list[tuple[float, float]] | None]:
    """Means over the last axis, and their intervals (None when there is one seed)."""
    pairs = [mean_ci95(row) for row in samples]
    intervals = [interval for _, interval in pairs if interval is not None]
    return [mean for mean, _ in pairs], intervals if len(intervals) == len(pairs) else None


def _invariant_numbers(results: JomaResults, names: list[str]) -> np.ndarray:
    """Per case: the error at the first step size, and how much it shrinks when the step halves [2 case,
    seed]."""
    index = [next(i for i, c in enumerate(INVARIANT_CASES) if c.name == name) for name in names]
    error = results.invariant_error[index]
    return np.concatenate([error[:, 0], error[:, 0] / error[:, 1]])


def _exact_in_the_limit(results: JomaResults, id: str, statement: str, names: list[str], note: str = "") -> Claim:
    value, ci95 = _over_seeds(_invariant_numbers(results, names))
    cases = " and ".join(names)
    return claim(
        id,
        statement,
        source=f"{SOURCE}, Theorem 1",
        statistic=f"relative error at step {results.invariant_step[0]:g}, then error(step) / error(step / "
        f"2): {cases}",
        value=value,
        direction="within",
        threshold=[[0, 0.01]] * len(names) + [[1.9, 2.1]] * len(names),
        n=results.invariant_error.shape[2],
        ci95=ci95,
        note=note or "An error that halves with the step is the discretization's: the flow itself is exact.",
    )


def _fails(results: JomaResults, id: str, statement: str, name: str, note: str) -> Claim:
    value, ci95 = _over_seeds(_invariant_numbers(results, [name])[:1])
    return claim(
        id,
        statement,
        source=f"{SOURCE}, Theorem 1",
        statistic=f"relative error at step {results.invariant_step[0]:g}: {name}",
        value=value[0],
        direction="<",
        threshold=0.01,
        n=results.invariant_error.shape[2],
        ci95=None if ci95 is None else ci95[0],
        note=note,
        expected=False,
    )


def invariant_claims(results: JomaResults) -> list[Claim]:
    """Theorem 1: what gradient flow conserves, and where it does not."""
    return [
        _exact_in_the_limit(
            results,
            "joma.invariant_exp",
            "With exponential attention and one query, each attention logit equals half the squared weights "
            "of its token, up to a constant, all through training.",
            ["exp, ReLU units", "exp, linear units"],
        ),
        _exact_in_the_limit(
            results,
            "joma.invariant_linear",
            "With linear attention and one query, each squared attention logit equals the squared weights "
            "of its token, up to a constant, all through training.",
            ["linear attention, ReLU units", "linear attention, linear units"],
        ),
        _fails(
            results,
            "joma.invariant_three_queries",
            "The exponential invariant also holds for each of three queries that share the upper layer.",
            "exp, three queries",
            "It does not: the shared weights move with every query, each query's logits only with its own. "
            "joma.invariant_three_queries_summed is the form that holds.",
        ),
        _exact_in_the_limit(
            results,
            "joma.invariant_three_queries_summed",
            "When three queries share the upper layer, the invariant holds for the sum of their attention logits.",
            ["exp, three queries summed"],
            "The corrected form of joma.invariant_three_queries, derived here: each query adds its own part "
            "to dW.",
        ),
        _fails(
            results,
            "joma.invariant_softmax_unstructured",
            "With softmax attention the invariant (with its mean-attention term) holds on any data.",
            "softmax, unstructured samples",
            "It does not on random samples with random labels: the theorem asks that the mean attention stay "
            "constant and factor out. On the class-structured data of Fig. 2 it predicts the logits well.",
        ),
    ]


def linear_unit_claims(results: JomaResults) -> list[Claim]:
    """Theorem 2: linear units, winner takes all."""
    drive, v = results.winner_drive, results.winner_v
    inner = v[:, -1]
    ratio = special.erf(inner / math.sqrt(2)) / drive
    half = special.erf(inner / 2) / drive
    blow_up = math.sqrt(math.pi / 2) / np.abs(drive).max()
    weight = np.exp(v**2 / 2)
    share = weight / weight.sum(axis=0)
    entropy = -np.sum(share * np.log(share), axis=0)
    source = f"{SOURCE}, Theorem 2"
    return [
        claim(
            "joma.theorem2_erf",
            "With one linear unit, erf(v / sqrt 2) divided by its drive is the same number for every token.",
            source=source,
            statistic="largest over smallest erf(v_l / sqrt 2) / Delta_l, minus 1",
            value=float(ratio.max() / ratio.min() - 1),
            direction="<",
            threshold=1e-6,
            note=f"With erf(v / 2) instead, the quotients run from {half.min():.3f} to {half.max():.3f}.",
        ),
        claim(
            "joma.theorem2_blow_up",
            "The token with the largest drive runs away at the time sqrt(pi/2) / max|Delta|, and no other does.",
            source=source,
            statistic="time at which the winner's v passes 6, over the predicted time, minus 1 (absolute)",
            value=abs(float(results.winner_time[-1]) / blow_up - 1),
            direction="<",
            threshold=1e-6,
            note=f"The other tokens' v at that time: {', '.join(f'{x:.3f}' for x in np.sort(inner)[:-1])}.",
        ),
        claim(
            "joma.theorem2_winner",
            "With a linear unit the winner takes all attention: its share goes to 1 and the entropy only falls.",
            source=source,
            statistic="the winner's final share; share of time steps in which the entropy falls",
            value=[float(share[np.argmax(np.abs(drive)), -1]), float(np.mean(np.diff(entropy) < 0))],
            direction="within",
            threshold=[[0.99, 1.0], [1.0, 1.0]],
            note=f"Entropy of e^z over {len(drive)} tokens: {entropy[0]:.3f} -> {entropy[-1]:.2g} nats.",
        ),
    ]


def nonlinear_unit_claims(results: JomaResults) -> list[Claim]:
    """Theorems 3 and 4: with nonlinear units salient components come first, the others later."""
    mu = results.salience_mu
    ratio = results.salience_log[1:] / results.salience_log[0]
    at_five = ratio[:, np.argmin(np.abs(results.salience_time - 5))]
    limit = np.exp((mu[1:] ** 2 - mu[0] ** 2) / 2)
    reference = np.array([1.756, 4.166])
    source = f"{SOURCE}, Theorems 3 and 4"
    return [
        claim(
            "joma.theorem4_t5",
            "With a nonlinear unit the more salient components converge first, in the ratio computed for time 5.",
            source=source,
            statistic="ln(1/delta_j) / ln(1/delta_1) at t = 5 for mu = 1.5 and 2 against mu = 1",
            value=at_five,
            direction="within",
            threshold=np.stack([0.995 * reference, 1.005 * reference], axis=1),
            note="Integrated to 1e-10. The reference 1.756 and 4.166 is reproduced digit for digit by Euler "
            "steps of .001, so the difference in the third digit is that step's.",
        ),
        claim(
            "joma.theorem4_limit",
            "That ratio tends to e^((mu_j^2 - mu_k^2) / 2).",
            source=source,
            statistic=f"ratio at t = {results.salience_time[-1]:g} over its limit, minus 1 (absolute)",
            value=np.abs(ratio[:, -1] / limit - 1),
            direction="<",
            threshold=1e-3,
            note=f"Limits {limit[0]:.3f} and {limit[1]:.3f}.",
        ),
    ]


def figure_claims(results: JomaResults) -> list[Claim]:
    """Figs. 2 and 4."""
    claims = []
    for row, (variant, least) in enumerate((("gaussian", 0.99), ("random", 0.85))):
        final = results.fig2_full[row, :, -1]
        mean, ci95 = mean_ci95(final)
        claims.append(
            claim(
                f"joma.fig2_{variant}",
                f"On {variant} frequencies the attention logits follow the prediction from the upper layer's "
                "weights to the end of training.",
                source=f"{SOURCE}, Fig. 2",
                statistic="mean correlation of z with its prediction at the last step",
                value=mean,
                direction=">",
                threshold=least,
                n=len(final),
                ci95=ci95,
                note=f"Worst seed {final.min():.4f}.",
            )
        )
    better = [
        results.fig2_full - np.abs(part) for part in (results.fig2_first, results.fig2_second)
    ]  # each [variant, seed, time]
    value, ci95_list = _over_seeds(np.concatenate([b.mean(axis=2) for b in better]))
    claims.append(
        claim(
            "joma.fig2_terms",
            "Both terms of the prediction are needed: neither alone follows the attention as well.",
            source=f"{SOURCE}, Fig. 2",
            statistic="mean over training of full minus single-term correlation: first term (gaussian, "
            "random), second term (gaussian, random)",
            value=value,
            direction=">",
            threshold=0.0,
            n=results.fig2_full.shape[1],
            ci95=ci95_list,
        )
    )
    references = (("authors", [2.3026, 0.942, 1.549]), ("uniform", [2.3026, 0.5494, 1.195, 1.3545]))
    for row, (variant, reference) in enumerate(references):
        entropy = results.fig4_entropy[row]
        value = [float(entropy[0]), float(entropy.min()), float(entropy[-1])]
        if len(reference) == 4:
            value.append(float(results.fig4_late_entropy[row]))
        claims.append(
            claim(
                f"joma.fig4_{variant}",
                "With a nonlinear unit attention first concentrates and then spreads again: the entropy "
                f"drops and rebounds ({'the authors’' if variant == 'authors' else 'evenly spaced'} "
                "targets).",
                source=f"{SOURCE}, Fig. 4",
                statistic="entropy in nats at the start, at its minimum, after 5000 steps"
                + (", after the late steps (200 000)" if len(reference) == 4 else ""),
                value=value,
                direction="within",
                threshold=[[x - 2e-3, x + 2e-3] for x in reference],
                note=f"The minimum is at step {int(entropy.argmin())}.",
            )
        )
    return claims


def joma_claims(results: JomaResults) -> list[Claim]:
    """Every claim about JoMA's small experiments (its text part is measured elsewhere)."""
    return [
        *invariant_claims(results),
        *linear_unit_claims(results),
        *nonlinear_unit_claims(results),
        *figure_claims(results),
    ]
