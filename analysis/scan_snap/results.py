"""What the main job measured: plain arrays, saved as safetensors and JSON, from which the report is drawn.

The report reads only what is defined here, so it can be drawn again from a finished run's folder.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class SmallRun:
    """One optimizer setting on Syn-Small (Fig. 4, 5), several seeds.

    ``association`` is c_n, what the last token attends to when sequences are infinitely long, over the
    contextual tokens: ``[seed, record, class, token]``; common tokens come first, then each class's distinct
    ones from weakest to strongest. ``attention_logits`` is the class's row of Z, same axes.
    """

    name: str
    optimizer: str  # "sgd" or "adam"
    decoder_rate: float  # eta_Y
    attention_rate: float  # eta_Z
    record_steps: np.ndarray  # [record]
    loss: np.ndarray  # [seed, step], before each step
    association: np.ndarray  # [seed, record, class, token]
    attention_logits: np.ndarray  # [seed, record, class, token]
    probability: np.ndarray  # [class, token], P(token | class)
    distinct: np.ndarray  # [class, token], bool
    common: np.ndarray  # [token], bool
    largest_row_sum: np.ndarray  # [seed], |sum| over a row of Y or Z, after the last step


@dataclasses.dataclass(frozen=True)
class MediumPanel:
    """One panel of Fig. 6 (and a column of Fig. 11, 12): a grid of learning rates, several seeds."""

    queries: int  # #last in the paper
    next_per_query: int  # the panel is named queries / (queries * next_per_query)
    attention_rates: np.ndarray  # [eta], eta_Z
    ratios: np.ndarray  # [ratio], eta_Y / eta_Z
    entropy: np.ndarray  # [eta, ratio, seed], nats, of c_n on the class's distinct tokens, mean over classes
    thresholds: np.ndarray  # [threshold], of attention, in units of 1 / vocabulary
    recall: np.ndarray  # [eta, ratio, seed, threshold], share of distinct tokens above the threshold
    final_loss: np.ndarray  # [eta, ratio, seed]


@dataclasses.dataclass(frozen=True)
class TextRun:
    """One model trained on real text (Fig. 7, 10; JoMA Fig. 6, 8)."""

    name: str
    optimizer: str  # "sgd" or "adam"
    layers: int
    learning_rate: float
    record_steps: np.ndarray  # [record]
    train_loss: np.ndarray  # [step], nats per token
    validation_loss: np.ndarray  # [record]
    entropy: np.ndarray  # [record, layer], nats, mean attention entropy on validation text
    snapshot_steps: np.ndarray  # [snapshot]
    snapshot_tokens: tuple[str, ...]  # labels of the positions of the snapshots' sequence
    snapshot_pattern: np.ndarray  # [snapshot, query, key], lowest layer
    # Attention to a key relative to uniform attention, mean over its occurrences, for keys that are distinct to
    # few next tokens and keys that are common to many, as Tian et al. define them, counted on the text.
    distinct_lift: np.ndarray  # [record]
    common_lift: np.ndarray  # [record]
    key_examples: tuple[str, ...]  # sentences for people: "'x' -> 'y': most attended keys ..."


@dataclasses.dataclass(frozen=True)
class ScanSnapResults:
    """The training runs that the report shows."""

    small: tuple[SmallRun, ...] = ()
    medium: tuple[MediumPanel, ...] = ()
    text: tuple[TextRun, ...] = ()
