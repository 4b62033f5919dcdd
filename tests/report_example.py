"""A small stand-in for the main job's results, quick to make: for the tests of figures and report.

Syn-Small is really trained, by a few lines of numpy; the rest has plausible shapes and no meaning.
"""

import functools

import numpy as np

from minitf.analysis.claims import Claim, claim
from minitf.analysis.scan_snap import joma, measures, reference
from minitf.analysis.scan_snap.results import MediumPanel, ScanSnapResults, SmallRun, TextRun

COMMON, DISTINCT, CLASSES, LENGTH, BATCH = 10, 10, 2, 127, 128
SENTENCE = (
    "The method returns a new list <script>alert(1)</script> & of the same type , and raises ValueError "
    "if the list is <b>empty</b> or $x$ was not found in it ."
)


def classes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """probability [class, token], distinct [class, token], common [token] of Syn-Small."""
    tokens = COMMON + CLASSES * DISTINCT
    weight, distinct = np.zeros((CLASSES, tokens)), np.zeros((CLASSES, tokens), bool)
    weight[:, :COMMON] = 1
    for n in range(CLASSES):
        own = slice(COMMON + DISTINCT * n, COMMON + DISTINCT * (n + 1))
        weight[n, own], distinct[n, own] = np.linspace(0.1, 1, DISTINCT), True
    return weight / weight.sum(axis=1, keepdims=True), distinct, np.arange(tokens) < COMMON


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gradients(y: np.ndarray, z: np.ndarray, counts: np.ndarray, label: np.ndarray) -> tuple:
    """Loss and gradients for the tables; counts [sample, token]; class n is asked for by query n."""
    weight = counts * np.exp(z[label])
    v = weight / weight.sum(axis=1, keepdims=True)
    norm = np.linalg.norm(v, axis=1, keepdims=True)
    f = v / norm
    alpha = softmax(f @ y)
    residual = np.eye(y.shape[1])[label] - alpha
    push = residual @ y.T
    dz = v * (push - f * (f * push).sum(axis=1, keepdims=True)) / norm
    loss = -np.log(alpha[np.arange(len(label)), label]).mean()
    return loss, -(f.T @ residual) / len(label), -(np.eye(len(z))[label].T @ dz) / len(label)


def train(optimizer: str, rates: tuple[float, float], seed: int, steps: int = 100) -> tuple:
    """loss [step] and z [record, class, token], a record every 2 steps."""
    probability, _, _ = classes()
    generator = np.random.default_rng(seed)
    tables = [np.zeros((probability.shape[1], probability.shape[1] + 2 * CLASSES)), np.zeros_like(probability)]
    first, second = ([np.zeros_like(p) for p in tables] for _ in range(2))
    losses, records = [], []
    for step in range(steps + 1):
        if step % 2 == 0:
            records.append(tables[1].copy())
        label = generator.integers(0, CLASSES, BATCH)
        loss, *grads = gradients(*tables, generator.multinomial(LENGTH, probability[label]), label)
        losses.append(loss)
        for i, (g, rate) in enumerate(zip(grads, rates, strict=True)):
            if optimizer == "sgd":
                first[i] = 0.9 * first[i] + g
                tables[i] = tables[i] - rate * first[i]
            else:
                first[i], second[i] = 0.9 * first[i] + 0.1 * g, 0.999 * second[i] + 0.001 * g**2
                size = np.sqrt(second[i] / (1 - 0.999 ** (step + 1))) + 1e-8
                tables[i] = tables[i] - rate * first[i] / (1 - 0.9 ** (step + 1)) / size
    return np.array(losses[:-1]), np.array(records)


def small_run(name: str, optimizer: str, rates: tuple[float, float], seeds: int) -> SmallRun:
    probability, distinct, common = classes()
    losses, logits = zip(*(train(optimizer, rates, seed) for seed in range(seeds)), strict=True)
    z = np.stack(logits)
    return SmallRun(
        name=name,
        optimizer=optimizer,
        decoder_rate=rates[0],
        attention_rate=rates[1],
        record_steps=np.arange(0, 101, 2),
        loss=np.stack(losses),
        association=measures.association(z, probability),
        attention_logits=z,
        probability=probability,
        distinct=distinct,
        common=common,
        largest_row_sum=np.zeros(seeds),
    )


def medium_panel(queries: int, seeds: int = 10) -> MediumPanel:
    generator = np.random.default_rng(queries)
    shape = reference.FIG6[0]
    published = reference.published_panel(queries, 2 * queries) or reference.FIG6[1]
    noise = generator.normal(size=(*published.mean.shape, seeds)) * published.sd[..., None] / 2
    thresholds = np.linspace(0.92, 1.25, 23)
    width = 0.1 + 0.2 * (2.16 - published.mean)
    recall = 1 / (1 + np.exp((thresholds - 1.06) / width[..., None, None] * 3))
    return MediumPanel(
        queries=queries,
        next_per_query=2,
        attention_rates=shape.attention_rates,
        ratios=shape.ratios,
        entropy=published.mean[..., None] + noise,
        thresholds=thresholds,
        recall=np.repeat(recall, seeds, axis=2),
        final_loss=np.full((*published.mean.shape, seeds), 1e-3),
    )


def text_run(name: str, optimizer: str, layers: int = 1, tokens: tuple[str, ...] | None = None) -> TextRun:
    """Attention that sharpens onto two keys (SGD) or sharpens and spreads again (Adam)."""
    tokens = tokens or tuple(SENTENCE.replace(" ", "\n ").split("\n"))
    steps = np.unique(np.geomspace(1, 1000, 24).astype(int) - 1)
    generator = np.random.default_rng(len(name))
    time = steps / 1000
    adam = optimizer == "adam"
    curve = 1.7 + 0.85 * np.exp(-60 * time) + 0.25 * time if adam else 0.05 + 2.45 * np.exp(-6 * time)
    size = len(tokens)
    scores = generator.normal(size=(size, size)) + 2 * generator.normal(size=size)
    mask = np.tril(np.ones((size, size), bool))
    patterns = [softmax(np.where(mask, s * scores, -np.inf)) for s in (0, 0.5, 1.5, 1.2 if adam else 6)]
    train_steps = np.arange(steps[-1] + 1)
    return TextRun(
        name=name,
        optimizer=optimizer,
        layers=layers,
        learning_rate=0.001 if adam else 5.0,
        record_steps=steps,
        train_loss=4.3 + 3.3 * np.exp(-train_steps / 60) + 0.1 * generator.normal(size=len(train_steps)),
        validation_loss=4.4 + 3.2 * np.exp(-steps / 60),
        entropy=np.stack([curve + 0.25 * i for i in range(layers)], axis=1),
        snapshot_steps=np.array([0, 50, 250, int(steps[-1])]),
        snapshot_tokens=tokens,
        snapshot_pattern=np.stack(patterns),
        distinct_lift=1 + 1.5 * (1 - np.exp(-5 * time)),
        common_lift=1 - 0.4 * (1 - np.exp(-5 * time)),
        key_examples=("'is' -> 'not': most attended keys 'empty', 'found'", "<script>window.hit = 1</script>"),
    )


@functools.cache
def example_results(seeds: int = 3) -> ScanSnapResults:
    """All parts of the report: five small runs, four panels, two runs on text and a deeper one."""
    settings = [("sgd", 1.0, 1.0), ("sgd", 10.0, 1.0), ("adam", 0.1, 0.1), ("adam", 0.5, 0.5), ("adam", 1.0, 1.0)]
    return ScanSnapResults(
        small=tuple(small_run(f"{o} {y:g}, {z:g}", o, (y, z), seeds) for o, y, z in settings),
        medium=tuple(medium_panel(queries) for queries in (1, 3, 5, 10)),
        text=(text_run("SGD", "sgd"), text_run("Adam", "adam"), text_run("Adam, 3 layers", "adam", layers=3)),
    )


@functools.cache
def example_joma() -> joma.JomaResults:
    """JoMA's small experiments, cut short."""
    return joma.run_joma(seeds=2, late_steps=joma.FIG4_STEPS)


def example_claims() -> list[Claim]:
    """Every verdict there is, and text that must stay text."""
    return [
        claim(
            "scan_snap.T15",
            "The loss falls like the authors': ln 34 at the start, below 0.02 after ten steps.",
            source="Scan and Snap, arXiv 2305.16380, Fig. 4",
            statistic="mean loss at steps 0, 2, 4, 6, 8, 10 over the authors' log",
            value=[1.0, 0.997, 0.999, 0.995, 1.001, 1.05],
            direction="within",
            threshold=[0.92, 1.08],
            n=8,
            ci95=[[0.99, 1.01]] * 6,
        ),
        claim(
            "scan_snap.T16",
            "A larger decoder rate leaves attention denser.",
            source="Scan and Snap, arXiv 2305.16380, Fig. 4",
            statistic="entropy at (10, 1) minus entropy at (1, 1), nats",
            value=0.148,
            direction=">",
            threshold=0.0,
            n=8,
            ci95=[0.14, 0.156],
            note="<script>window.hit = 1</script> stays text.",
        ),
        claim(
            "scan_snap.T20",
            "Every cell of Fig. 6 agrees with the published mean.",
            source="Scan and Snap, arXiv 2305.16380, Fig. 6",
            statistic="difference to the published mean, 32 cells, nats",
            value=list(np.linspace(-0.03, 0.06, 32)),
            direction="within",
            threshold=[[-0.05, 0.05]] * 32,
            n=10,
        ),
        claim(
            "scan_snap.theorem1_sgd",
            "Plain SGD on the decoder pushes classes apart as strongly as Theorem 1 says.",
            source="Scan and Snap, arXiv 2305.16380, Theorem 1",
            statistic="measured beta over gamma E'",
            value=[0.018, 0.05, 0.15],
            direction="within",
            threshold=[0.98, 1.02],
            note="The proof replaces SGD by a modified update (T7, which holds).",
            expected=False,
        ),
        claim(
            "joma.surprise",
            "Expected to fail, and holds all the same.",
            source="JoMA, arXiv 2310.00535, Theorem 1",
            statistic="relative error",
            value=0.001,
            direction="<",
            threshold=0.01,
            expected=False,
        ),
    ]


def example_config() -> dict:
    return {"seed": 0, "quick": False, "small": {"steps": 100, "batch": 128}, "text": ["<b>corpus</b>"]}


def example_versions() -> dict:
    return {"minitf": "0.1.0", "python": "3.11.2", "jax": "0.10.1"}
