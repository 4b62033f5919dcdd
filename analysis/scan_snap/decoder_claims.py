"""The theory's claims about the decoder with frozen features: T7, Theorem 1 under plain SGD, Remark 1."""

import functools

import numpy as np

from minitf.analysis.claims import Claim, claim, mean_ci95
from minitf.analysis.scan_snap import theory
from minitf.analysis.scan_snap.theory_simulations import equal_gram, frozen_decoder, split_push

SOURCE = "Scan and Snap, arXiv 2305.16380"
CLASSES, VOCABULARY, ETA = 10, 1000, 0.5
OVERLAP, SMALL_OVERLAP = 0.3125, 0.0102
SGD_TIMES = (30, 100, 300, 1000, 6000)


def _orders(seed: int, seeds: int) -> np.ndarray:
    draws = [np.random.default_rng([seed, i]).integers(0, CLASSES, SGD_TIMES[-1]) for i in range(seeds)]
    return np.stack(draws)


def t7_modified_update(seed: int = 0, seeds: int = 16) -> Claim:
    """T7: Theorem 1's iota and beta under the decoder update that the proof uses."""
    gram = equal_gram(OVERLAP, CLASSES)
    _, push = frozen_decoder(gram, VOCABULARY, ETA, _orders(seed, seeds), SGD_TIMES[-1:], modified=True)
    predicted = theory.theorem1_coefficients(gram, VOCABULARY)
    size = theory.gamma(SGD_TIMES[-1], CLASSES, VOCABULARY, ETA)
    iota, beta = (x[:, 0] / size for x in split_push(push))
    pairs = [mean_ci95(iota / predicted[0, 0]), mean_ci95(beta / -predicted[0, 1])]
    return claim(
        "scan_snap.T7",
        "With the decoder update of the proof, a class is pushed towards itself and away from the others as "
        "strongly as the theory says.",
        source=f"{SOURCE}, Theorems 1 and 5",
        statistic="measured over predicted iota and beta at t = 6000 (K = 10, M = 1000, overlap .3125)",
        value=[mean for mean, _ in pairs],
        direction="within",
        threshold=[0.98, 1.02],
        n=seeds,
        ci95=[interval for _, interval in pairs] if seeds > 1 else None,
        note=f"iota {iota.mean():.4f} against {predicted[0, 0]:.4f}, beta {beta.mean():.4f} against "
        f"{-predicted[0, 1]:.4f}.",
    )


def theorem1_under_sgd(seed: int = 0, seeds: int = 8) -> list[Claim]:
    """Theorem 1's beta = E' for plain SGD (it fails), and the sign xi > 0 (it holds)."""
    quotients, smallest = {}, np.inf
    size = theory.gamma(np.array(SGD_TIMES), CLASSES, VOCABULARY, ETA)
    for overlap in (OVERLAP, SMALL_OVERLAP):
        gram = equal_gram(overlap, CLASSES)
        _, push = frozen_decoder(gram, VOCABULARY, ETA, _orders(seed, seeds), SGD_TIMES, modified=False)
        quotients[overlap] = split_push(push)[1] / size / theory.equal_overlap_correction(overlap, CLASSES)
        others = -push * (1 - np.eye(CLASSES))
        xi = np.einsum("stfn,fn->stn", others, gram) / size[:, None]
        smallest = min(smallest, float(xi.min()))
    pairs = [mean_ci95(column) for column in quotients[OVERLAP].T]
    rare = ", ".join(f"{x:.3f}" for x in quotients[SMALL_OVERLAP].mean(axis=0))
    return [
        claim(
            "scan_snap.theorem1_sgd",
            "Plain SGD on the decoder pushes classes apart as strongly as Theorem 1 says.",
            source=f"{SOURCE}, Theorem 1",
            statistic=f"measured beta over gamma E' at t = {', '.join(map(str, SGD_TIMES))} (overlap .3125)",
            value=[mean for mean, _ in pairs],
            direction="within",
            threshold=[0.98, 1.02],
            n=seeds,
            ci95=[interval for _, interval in pairs] if seeds > 1 else None,
            note="The proof replaces SGD by a modified update (T7, which holds); SGD itself starts with beta "
            f"near 1/M. With overlap .0102 the quotients are {rare}. The sign is right: theorem1_sgd_sign.",
            expected=False,
        ),
        claim(
            "scan_snap.theorem1_sgd_sign",
            "Plain SGD pushes every class away from the others: xi is positive, as the rest of the theory needs.",
            source=f"{SOURCE}, Theorem 1",
            statistic="smallest xi_n / gamma over classes, times and seeds, overlaps .3125 and .0102",
            value=smallest,
            direction=">",
            threshold=0.0,
            n=seeds,
            note="What remains of Theorem 1 for plain SGD: the sign, which Theorems 2 and 3 rest on.",
        ),
    ]


def remark1() -> list[Claim]:
    """Remark 1: equal overlaps only lower the rate to (1 - rho) eta_Y; true for K = M alone."""
    order = np.tile(np.arange(CLASSES), SGD_TIMES[-1] // CLASSES)[None]
    gram, error = equal_gram(OVERLAP, CLASSES), {}
    for m in (CLASSES, VOCABULARY):
        state, _ = frozen_decoder(gram, m, ETA, order, [order.shape[1]], modified=False)
        rows = gram @ state[0, 0]
        zeta = m / (m - 1) * (np.eye(CLASSES, CLASSES + 1) - 1 / m)
        predicted = (m - 1) * theory.h(order.shape[1] / CLASSES, m, (1 - OVERLAP) * ETA) * zeta
        weight = np.append(np.ones(CLASSES), m - CLASSES)
        error[m] = float(np.sqrt(np.sum((rows - predicted) ** 2 * weight) / np.sum(predicted**2 * weight)))
    about = functools.partial(
        claim,
        source=f"{SOURCE}, Remark 1",
        statistic=f"relative error of the predicted decoder rows w_n at t = {order.shape[1]}",
        direction="<",
        threshold=0.02,
    )
    return [
        about(
            "scan_snap.remark1_few_classes",
            "When all classes overlap equally, the decoder learns as if the rate were (1 - rho) times "
            "smaller, also when there are far fewer classes than tokens (10 and 1000).",
            value=error[VOCABULARY],
            note="It needs K = M, since only then do the zeta_n of all classes sum to zero: "
            "scan_snap.remark1_all_classes.",
            expected=False,
        ),
        about(
            "scan_snap.remark1_all_classes",
            "When all classes overlap equally and every token is some class's answer (K = M = 10), the "
            "decoder learns as if the rate were (1 - rho) times smaller.",
            value=error[CLASSES],
            note="The condition under which Remark 1 holds.",
        ),
    ]


def decoder_claims(seed: int = 0) -> list[Claim]:
    """All claims of this module."""
    return [t7_modified_update(seed), *theorem1_under_sgd(seed), *remark1()]
