"""What has been published about constant associations in trained models, asked of the model that is ablated.

The figures are means over several tasks and much larger models; a statement says what of them is asked here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from minitf.analysis.claims import Claim, Direction, claim

NEXT = "the next token"  # what a model that sees the past alone is asked for
CONSTANT, ORDER = "mean over data", "least important first"
PAPA = "Hassid et al. 2022 (PAPA)"
BOTH = "conclusion of Hassid et al. 2022 and Tay et al. 2021"


def published(data: Mapping[str, Any]) -> list[Claim]:
    """The claims that the model can speak to; ``data`` as ``measure`` of the job makes it."""
    every, half = -1, len(data["fractions"]) // 2
    if data["asked"] == NEXT:
        constant = _over_windows(
            data,
            "constant",
            "In a trained language model, constant associations in place of all heads' (the mean over data) cost "
            "more than they do in classification: the perplexity of a token grows by more than 5 %.",
            BOTH,
            "growth of the perplexity",
            np.expm1(_growth(data, "loss", every)),
            ">",
            0.05,
        )
        measure, statistic, lost = "loss", "relative growth of the loss", _growth(data, "loss", half)
    else:
        constant = _over_windows(
            data,
            "constant",
            "In a trained encoder, constant associations in place of all heads' (the mean over data) cost little: "
            "published, 8 % of the score of six tasks on average; here, at most twice that of the accuracy at "
            "masked tokens.",
            PAPA,
            "relative drop of the accuracy",
            _relative(data, "accuracy", -_growth(data, "accuracy", every)),
            "<",
            0.16,
        )
        measure, statistic, lost = "accuracy", "relative drop of the accuracy", -_growth(data, "accuracy", half)
    if data["fractions"][half] == 1:  # there is one head alone, and no half
        return [constant]
    return [
        constant,
        _over_windows(
            data,
            "half_constant",
            "With constant associations in the less important half of the heads, little or nothing is lost: here, "
            f"at most 2 % of the {measure}.",
            PAPA,
            statistic,
            _relative(data, measure, lost),
            "<",
            0.02,
        ),
    ]


def _growth(data: Mapping[str, Any], measure: str, share: int) -> np.ndarray:
    """By how much the measure grows, and both ends of its interval (NaN where none is known)."""
    found = data["replacements"][CONSTANT]["orders"][ORDER]
    growth = _number(found[measure][share]) - _number(data["intact"][measure])
    margin = _number(found["margins"][measure][share])
    return np.array([growth, growth - margin, growth + margin])


def _relative(data: Mapping[str, Any], measure: str, change: np.ndarray) -> np.ndarray:
    """Of the intact model's, as it was measured; NaN where that is nothing."""
    intact = _number(data["intact"][measure])
    return change / intact if intact else np.full_like(change, np.nan)


def _number(found: float | None) -> float:
    return np.nan if found is None else float(found)


def _over_windows(
    data: Mapping[str, Any],
    name: str,
    statement: str,
    source: str,
    statistic: str,
    numbers: np.ndarray,
    direction: Direction,
    threshold: float,
) -> Claim:
    value, *ends = numbers
    return claim(
        f"ablate.{name}",
        statement,
        source=source,
        statistic=f"{statistic}; over windows of the text",
        value=value,
        direction=direction,
        threshold=threshold,
        n=data["windows"],
        ci95=sorted(ends) if np.isfinite(ends).all() else None,
    )
