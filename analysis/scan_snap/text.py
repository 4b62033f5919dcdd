"""Real text: a one-layer transformer learns to scan and snap (Fig. 7), and rebounds under Adam (JoMA Fig. 6).

The model is that of the paper's notebook (PyTorch's word-language-model tutorial): width 200, one head, ReLU,
post-norm, sinusoidal positions, embedding times sqrt(200), untied unembedding with a bias; batches of 20 tracks
by 35 tokens, gradients clipped to .5. Here without dropout, on a byte-pair vocabulary, with one learning rate
for all weights.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
import optax
import tiktoken
from jaxtyping import Array, Float, Int

from minitf.analysis.scan_snap.results import TextRun
from minitf.analysis.scan_snap.synthetic import seed_keys
from minitf.config import ModelConfig
from minitf.declaration import initialize
from minitf.model import walk
from minitf.parameters import Parameters
from minitf.tokenizer import token_labels, train_encoding
from minitf.train import optimizers
from minitf.train.corpus import Corpus
from minitf.train.loop import History, Report, Task, every, train
from minitf.train.windows import sequential_batch, token_stream, tracks, windows

WIDTH, LENGTH, BATCH, CLIP = 200, 35, 20, 0.5
VALIDATION_WINDOWS, KEY_WINDOWS = 64, 256
SGD_RATE, ADAM_RATE = 5.0, 1e-3
# A key is compared when it was seen this often before the query: often enough to tell, and so seldom that
# distinct and common keys are equally rare.
LEAST_SEEN, MOST_SEEN = 3, 12


@dataclass(frozen=True)
class TextData:
    """Tokens, ready for the loop.

    Attributes:
        tracks: ``[batch, track]``, the training text in parallel tracks.
        validation: ``[window, length + 1]``.
        keys: windows of the training text whose last token is a frequent query, and which of their keys are
            distinct to one next token or common to several.
    """

    name: str
    encoding: tiktoken.Encoding
    tracks: Int[Array, "batch track"]
    validation: Int[np.ndarray, "window length_plus_one"]
    keys: "KeyWindows"


@dataclass(frozen=True)
class KeyWindows:
    """Windows that end at a frequent token (the query m), and the standing of each of their keys.

    Among all windows of the training text that end at m, Omega(l) is the set of next tokens that ever followed
    when l was in the window (Tian et al. 2023, section 3, relative to classes of one query as section 7 suggests
    for models with a residual). A key seen 3 to 12 times is distinct when Omega(l) has one member, and common
    otherwise: equally rare keys, so that what differs is what follows them.
    """

    tokens: Int[np.ndarray, "window length_plus_one"]
    distinct: np.ndarray  # bool [window, key]
    common: np.ndarray  # bool [window, key]


def prepare(corpus: Corpus, vocabulary: int) -> TextData:
    """Train a byte-pair encoding on the corpus and cut it into windows.

    Raises:
        ValueError: the vocabulary is too small or the text too short, saying by how much.
    """
    encoding = train_encoding(corpus.train, vocabulary)
    stream = token_stream(encoding, corpus.train)
    validation = windows(token_stream(encoding, corpus.validation), LENGTH)
    spread = np.linspace(0, len(validation) - 1, min(VALIDATION_WINDOWS, len(validation))).astype(int)
    return TextData(
        name=corpus.name,
        encoding=encoding,
        tracks=tracks(stream, BATCH, LENGTH),
        validation=validation[spread],
        keys=find_keys(stream),
    )


def find_keys(stream: Int[np.ndarray, " token"], queries: int = 30) -> KeyWindows:
    """Windows of the text in which both distinct and common keys occur, spread over frequent queries."""
    frequent = [int(m) for m, _ in Counter(stream[LENGTH:-1].tolist()).most_common(queries)]
    size = int(stream.max(initial=0)) + 1
    tokens, distinct, common = [], [], []
    for m in frequent:
        ends = np.flatnonzero(stream[LENGTH - 1 : -1] == m) + LENGTH - 1
        if len(ends) < LEAST_SEEN:
            continue
        cut = stream[ends[:, None] + np.arange(-LENGTH + 1, 2)]
        # Each key once for every window that it is in, beside the token that followed that window.
        keys = np.sort(cut[:, :-2], axis=1)
        first = np.diff(keys, axis=1, prepend=-1) > 0
        after = np.broadcast_to(cut[:, -1:], keys.shape)[first]
        seen = np.bincount(keys[first], minlength=size)
        followers = np.bincount(np.unique(keys[first].astype(np.int64) * size + after) // size, minlength=size)
        known = (seen >= LEAST_SEEN) & (seen <= MOST_SEEN)
        is_distinct = (known & (followers == 1))[cut[:, :-1]]
        is_common = (known & (followers > 1))[cut[:, :-1]]
        is_distinct[:, -1] = is_common[:, -1] = False  # the query's own place
        both = np.flatnonzero(is_distinct.any(axis=1) & is_common.any(axis=1))
        chosen = both[:: max(1, len(both) * queries // KEY_WINDOWS)]
        tokens.append(cut[chosen])
        distinct.append(is_distinct[chosen])
        common.append(is_common[chosen])
    empty = np.zeros((0, LENGTH))
    return KeyWindows(
        tokens=np.concatenate([np.zeros((0, LENGTH + 1), np.int32), *tokens]).astype(np.int32),
        distinct=np.concatenate([empty, *distinct]).astype(bool),
        common=np.concatenate([empty, *common]).astype(bool),
    )


def text_config(vocabulary: int, layers: int = 1) -> ModelConfig:
    """The tutorial's model."""
    return ModelConfig(
        vocabulary=vocabulary,
        layers=layers,
        width=WIDTH,
        heads=1,
        hidden=WIDTH,
        length=LENGTH,
        embedding_scale=math.sqrt(WIDTH),
        position="sinusoidal",
        norm="layer",
        norm_placement="post",
        biases=True,
        unembedding_bias=True,
        feed_forward="relu",
        initializer="fan_in",
    )


def initialize_text(config: ModelConfig, key: Array) -> Parameters:
    """The tutorial's start: embedding and unembedding uniform within .1, the rest by fan-in."""
    parameters = initialize(config, key)
    bound = 0.1 * math.sqrt(config.width)  # relative to the fan-in bound, 1 / sqrt(width)
    return dataclasses.replace(
        parameters, embedding=parameters.embedding * bound, unembedding=parameters.unembedding * bound
    )


def next_token_loss(logits: Float[Array, "batch position vocabulary"], tokens: Array) -> Float[Array, ""]:
    """Cross-entropy of every next token, mean, nats; ``tokens`` is ``[batch, position + 1]``."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))


def attention_entropy(
    pattern: Float[Array, "layer batch head query key"],
) -> Float[Array, " layer"]:
    """Mean entropy of the rows of each layer's association, nats."""
    return jnp.mean(-jnp.sum(pattern * jnp.log(pattern + 1e-8), axis=-1), axis=(1, 2, 3))


def text_task(data: TextData, layers: int, optimizer: Literal["sgd", "adam"]) -> Task:
    """Next-token training on the tracks; the hyper-parameter is the learning rate."""
    config = text_config(data.encoding.n_vocab, layers)
    make = {"sgd": optimizers.sgd, "adam": optimizers.adam}[optimizer]

    def loss(parameters: Parameters, batch: Array) -> Array:
        return next_token_loss(walk(parameters, batch[:, :-1], config, unroll=True).logits, batch)

    def record(parameters: Parameters) -> dict[str, Array]:
        validation = walk(parameters, jnp.asarray(data.validation[:, :-1]), config)
        pattern = validation.layers.pattern
        kept = {
            "validation_loss": next_token_loss(validation.logits, jnp.asarray(data.validation)),
            "entropy": attention_entropy(pattern),
            "pattern": pattern[0, 0, 0],
        }
        if len(data.keys.tokens):
            keys = walk(parameters, jnp.asarray(data.keys.tokens[:, :-1]), config).layers.pattern
            kept["attended"] = keys[0, :, 0, -1]
        return kept

    return Task(
        initialize=lambda key: initialize_text(config, key),
        batch=lambda key, step: sequential_batch(data.tracks, step, length=LENGTH),
        loss=loss,
        optimizer=lambda rate: optimizers.clipped(make(rate), CLIP),
        record=record,
    )


def run_text(
    data: TextData,
    optimizer: Literal["sgd", "adam"],
    rates: Sequence[float],
    steps: int,
    *,
    layers: int = 1,
    seed: int = 0,
    records: int = 40,
    report: Report | None = None,
) -> tuple[list[TextRun], History]:
    """Train on text at each learning rate, one after another in one program."""
    history = train(
        text_task(data, layers, optimizer),
        seed_keys(seed, 1),
        jnp.asarray(rates, jnp.float32),
        every(steps, max(1, steps // records)),
        records_per_chunk=2,
        report=report,
    )
    labels = tuple(token_labels(data.encoding, data.validation[0, :-1]))
    return [_text_run(data, history, i, rate, optimizer, layers, labels) for i, rate in enumerate(rates)], history


def _text_run(
    data: TextData, history: History, i: int, rate: float, optimizer: str, layers: int, labels: tuple[str, ...]
) -> TextRun:
    kept = {name: x[0, i] for name, x in history.records.items()}
    record_steps = history.record_steps
    shots = np.unique(np.abs(record_steps[:, None] - np.linspace(0, record_steps[-1], 4)).argmin(axis=0))
    return TextRun(
        name=f"{optimizer.upper() if optimizer == 'sgd' else 'Adam'} {rate:g}, {layers} layer{'s' * (layers > 1)}",
        optimizer=optimizer,
        layers=layers,
        learning_rate=rate,
        record_steps=record_steps,
        train_loss=history.loss[0, i],
        validation_loss=kept["validation_loss"],
        entropy=kept["entropy"],
        snapshot_steps=record_steps[shots],
        snapshot_tokens=labels,
        snapshot_pattern=kept["pattern"][shots],
        distinct_lift=_lift(kept, data.keys.distinct, len(record_steps)),
        common_lift=_lift(kept, data.keys.common, len(record_steps)),
        key_examples=_examples(data, kept["attended"][-1]) if "attended" in kept else (),
    )


def _lift(kept: dict[str, np.ndarray], mask: np.ndarray, records: int) -> Float[np.ndarray, " record"]:
    """Attention to the masked keys relative to uniform attention, mean over their occurrences."""
    if "attended" not in kept or not mask.any():
        return np.full(records, np.nan)
    return kept["attended"][:, mask].mean(axis=1) * LENGTH


def _examples(data: TextData, attended: Float[np.ndarray, "window key"], count: int = 6) -> tuple[str, ...]:
    """For people: what the last token looked at most, in windows whose distinct keys got most of it."""
    share = (attended * data.keys.distinct).sum(axis=1)
    sentences = []
    for w in np.argsort(-share)[:count]:
        tokens = data.keys.tokens[w]
        top = np.argsort(-attended[w])[:3]
        names = token_labels(data.encoding, tokens)
        looked = ", ".join(
            f"{names[k]} ({attended[w, k]:.0%}{', distinct' if data.keys.distinct[w, k] else ''})" for k in top
        )
        sentences.append(f"before {names[-2]} \N{RIGHTWARDS ARROW} {names[-1]}: {looked}")
    return tuple(sentences)
