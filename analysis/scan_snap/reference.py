"""Published numbers beside which the report sets its own; every one with its source.

Paper: Tian et al. 2023, *Scan and Snap*, arXiv 2305.16380v4. Authors' files: the repository
facebookresearch/luckmatters, folder ssl/real-dataset (commit 625b5f7d). What is not known is absent.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class PublishedPanel:
    """One panel of Fig. 6: entropy of c_n on the distinct tokens, nats, over 10 seeds."""

    queries: int  # #last
    next_tokens: int  # #next, the number of classes
    attention_rates: np.ndarray  # [eta], eta_Z
    ratios: np.ndarray  # [ratio], eta_Y / eta_Z
    mean: np.ndarray  # [eta, ratio]
    sd: np.ndarray  # [eta, ratio], sample standard deviation of the seeds


_RATES, _RATIOS = np.array([0.5, 1.0, 2.0, 3.0]), np.array([1.0, 2.0, 5.0, 10.0])
FIG6_SOURCE = "Fig. 6 (arXiv 2305.16380); means and sds from the authors' saved results"
# The values of the panels 5/10 and 10/20 are not known to us.
FIG6 = (
    PublishedPanel(
        queries=1,
        next_tokens=2,
        attention_rates=_RATES,
        ratios=_RATIOS,
        mean=np.array(
            [
                [1.971, 2.007, 2.066, 2.092],
                [1.871, 1.937, 2.022, 2.053],
                [1.699, 1.810, 1.934, 1.900],
                [1.551, 1.708, 1.786, 1.825],
            ]
        ),
        sd=np.array(
            [
                [0.028, 0.032, 0.017, 0.016],
                [0.052, 0.052, 0.036, 0.030],
                [0.101, 0.099, 0.068, 0.200],
                [0.155, 0.154, 0.170, 0.331],
            ]
        ),
    ),
    PublishedPanel(
        queries=3,
        next_tokens=6,
        attention_rates=_RATES,
        ratios=_RATIOS,
        mean=np.array(
            [
                [2.019, 1.988, 2.031, 2.063],
                [1.963, 1.920, 1.982, 2.024],
                [1.842, 1.809, 1.899, 1.955],
                [1.737, 1.715, 1.821, 1.839],
            ]
        ),
        sd=np.array(
            [
                [0.010, 0.012, 0.007, 0.005],
                [0.015, 0.018, 0.009, 0.008],
                [0.024, 0.027, 0.018, 0.020],
                [0.032, 0.038, 0.030, 0.100],
            ]
        ),
    ),
)


def published_panel(queries: int, next_tokens: int) -> PublishedPanel | None:
    """Fig. 6's panel for so many query and next tokens, or None where its values are not known."""
    return next((p for p in FIG6 if (p.queries, p.next_tokens) == (queries, next_tokens)), None)


# Syn-Small with (eta_Y, eta_Z) = (1, 1), one seed; nats per token.
FIG4_LOSS_SOURCE = "the authors' training log of Fig. 4, seed 2"
FIG4_LOSS_RATES = (1.0, 1.0)
FIG4_LOSS_STEP = np.array([0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 30, 40, 60, 98])
FIG4_LOSS = np.array(
    [
        *(3.5264, 2.3679, 0.7335, 0.1608, 0.04443, 0.01295, 0.004386, 0.001810),
        *(6.41e-4, 4.10e-4, 2.05e-4, 5.30e-5, 2.91e-5, 2.43e-5, 2.22e-5),
    ]
)

# What the figures without published numbers are said to show, in our words.

# JoMA (arXiv 2310.00535), Fig. 6: one layer on WikiText-2, Adam at 1e-4; the authors' result files.
JOMA_TEXT_SOURCE = "the authors' result files for JoMA's one-layer run (WikiText-2, Adam, rate 1e-4)"
JOMA_TEXT_BATCHES = 1000 * np.array([0, 1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 40, 50, 58])
JOMA_TEXT_ENTROPY = np.array([2.51, 1.89, 1.55, 1.59, 1.64, 1.73, 1.80, 1.87, 1.98, 2.06, 2.17, 2.21, 2.23, 2.21])
JOMA_TEXT_LOSS = np.array([10.65, 6.31, 6.05, 5.93, 5.84, 5.76, 5.66, 5.62, 5.57, 5.50, 5.45, 5.36, 5.44, 5.37])
