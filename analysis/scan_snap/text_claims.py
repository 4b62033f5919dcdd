"""What real text shows: attention scans and snaps under SGD, and rebounds under Adam."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from minitf.analysis.claims import Claim, claim
from minitf.analysis.scan_snap.results import TextRun

FIG7 = "Fig. 7 of arXiv 2305.16380 (WikiText-2 there), settings of the authors' notebook without dropout"
JOMA = "JoMA (arXiv 2310.00535), Fig. 6 and 8 (WikiText-2 there)"


# How attention ends cannot be judged before it had the time to.
LEAST_STEPS = 1000


def text_claims(runs: Sequence[TextRun]) -> list[Claim]:
    """Claims about the one-layer runs of at least 1000 steps, SGD and Adam, each at its first learning rate."""
    one_layer = [run for run in runs if run.layers == 1 and run.record_steps[-1] >= LEAST_STEPS]
    sgd = next((run for run in one_layer if run.optimizer == "sgd"), None)
    adam = next((run for run in one_layer if run.optimizer == "adam"), None)
    claims = []
    if sgd is not None:
        claims += [*sgd_claims(sgd), *key_claims(sgd)]
    if adam is not None:
        claims += adam_claims(adam)
    rates = [run for run in one_layer if run.optimizer == "sgd"]
    if len(rates) > 2:
        claims.append(rate_claim(rates))
    return claims


def smoothed(entropy: Float[np.ndarray, " record"]) -> Float[np.ndarray, " record"]:
    """The running mean of three records: a batch more or less must not make a rebound."""
    padded = np.pad(entropy.astype(np.float64), 1, mode="edge")
    return np.convolve(padded, np.ones(3) / 3, mode="valid")


def rebound(entropy: Float[np.ndarray, " record"]) -> float:
    """How far the smoothed entropy stands, in the last quarter of training, above its minimum before; nats."""
    smooth = smoothed(entropy)
    last = smooth[-max(1, len(smooth) // 4) :]
    return float(last.mean() - smooth[: len(smooth) - len(last)].min(initial=smooth[0]))


def sgd_claims(run: TextRun) -> list[Claim]:
    """Scan, snap, freeze: the entropy falls and does not come back."""
    entropy = run.entropy[:, 0].astype(np.float64)
    moves = np.abs(np.diff(run.snapshot_pattern.astype(np.float64), axis=0)).sum(axis=-1).mean(axis=-1) / 2
    return [
        claim(
            "scan_snap.text_sparse",
            "On real text, too, attention trained by SGD becomes sparse.",
            source=FIG7,
            statistic="entropy of attention on validation text at the end, relative to the start",
            value=entropy[-1] / entropy[0],
            direction="<",
            threshold=0.5,
            note=f"{entropy[0]:.2f} to {entropy[-1]:.2f} nats in {run.record_steps[-1]} steps",
        ),
        claim(
            "scan_snap.text_frozen",
            "Attention on a sentence moves most early on, and freezes towards the end.",
            source=FIG7,
            statistic="attention moved per query between the last two of four times, over the first two",
            value=moves[-1] / moves[0],
            direction="<",
            threshold=1.0,
            note="share of a query's attention that changed place: "
            + ", ".join(f"{x:.2f}" for x in moves)
            + ". Attention becomes one-hot but goes on jumping between keys at this rate: over 3000 steps "
            "the entropy fell to .02 nats, and still .4 of it moved in 50 steps.",
            expected=False,
        ),
        claim(
            "joma.text_sgd_stays",
            "Under SGD the entropy of attention does not come back up.",
            source=JOMA,
            statistic="mean of the last quarter minus the minimum before, nats",
            value=rebound(entropy),
            direction="<",
            threshold=0.15,
        ),
    ]


def adam_claims(run: TextRun) -> list[Claim]:
    """Drop and rebound."""
    entropy = smoothed(run.entropy[:, 0])
    return [
        claim(
            "joma.text_drop",
            "Under Adam attention first becomes sparse: its entropy drops.",
            source=JOMA,
            statistic="entropy at the start minus its minimum, nats",
            value=float(entropy[0] - entropy.min()),
            direction=">",
            threshold=0.6,
        ),
        claim(
            "joma.text_rebound",
            "Then its entropy comes back up: less salient tokens are attended to again.",
            source=JOMA,
            statistic="mean of the last quarter of training minus the minimum before, nats",
            value=rebound(run.entropy[:, 0]),
            direction=">",
            threshold=0.15,
        ),
    ]


def key_claims(run: TextRun) -> list[Claim]:
    """Distinct against common keys, counted on the text."""
    if not np.isfinite(run.distinct_lift).all():
        return []
    distinct, common = (x[len(x) // 2 :].mean() for x in (run.distinct_lift, run.common_lift))
    return [
        claim(
            "scan_snap.text_distinct",
            "On real text, attention prefers tokens distinct to one next token to equally rare common ones.",
            source="Theorem 2, read on text; the paper shows no such figure",
            statistic="attention to distinct over attention to common keys, mean of the second half of training",
            value=float(distinct / common),
            direction=">",
            threshold=1.0,
            note=f"relative to uniform: distinct {distinct:.2f}, common {common:.2f}; one text, one seed",
        )
    ]


def rate_claim(runs: Sequence[TextRun]) -> Claim:
    """Fig. 10: larger rates leave sparser attention."""
    runs = sorted(runs, key=lambda run: run.learning_rate)
    rates, final = [r.learning_rate for r in runs], [float(r.entropy[-1, 0]) for r in runs]
    return claim(
        "scan_snap.fig10",
        "Larger SGD rates leave sparser attention on real text.",
        source="Fig. 10 of arXiv 2305.16380",
        statistic="Pearson correlation of the learning rate and the final entropy",
        value=float(np.corrcoef(rates, final)[0, 1]),
        direction="<",
        threshold=0.0,
        note=", ".join(f"{rate:g}: {x:.2f}" for rate, x in zip(rates, final, strict=True)),
    )
