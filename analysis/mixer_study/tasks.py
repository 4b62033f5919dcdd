"""The five tasks: what each asks of whatever mixes the positions.

Text needs a little of everything; classification asks what there is, and a little what follows what; recall asks
for places that only the data can tell; addition and memorisation ask for places that are always the same.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key

from minitf.train.batch import NO_TARGET, Batch, next_token
from minitf.train.corpus import Corpus
from minitf.train.windows import on_device, random_batch

TEXT_BYTES = 4_000_000
HELD_OUT = 128  # sequences on which everything is measured
REFERENCE = 5_000  # sequences for the reference classifiers
DATA = 20_261_126  # what is the same for all seeds: classes, facts, held-out sequences


@struct.dataclass
class Score:
    """``loss`` in nats a target, ``accuracy`` of the most likely answer; means over the targets."""

    loss: Any
    accuracy: Any


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: of the task.
        asks: what it asks, for people.
        vocabulary, length: of its sequences.
        batch: sequences in a step.
        steps: of training; ``quick_steps`` with the quick preset.
        draw: key, how many -> a batch of fresh sequences.
        held_out: what everything is measured on.
        choosing: other held-out sequences, by which learning rates are chosen and nothing is measured.
        measure: ``accuracy``, or ``bits`` a symbol.
        pooled: one answer for the whole sequence, from the mean over positions of the logits.
        answers_inside: later tokens tell the answers to earlier ones, so no position may see what follows.
        references: accuracies (or bits) that need no model, by name.
    """

    name: str
    asks: str
    vocabulary: int
    length: int
    batch: int
    steps: int
    quick_steps: int
    draw: Callable[[Key[Array, ""], int], Batch]
    held_out: Batch
    choosing: Batch
    measure: Literal["accuracy", "bits"]
    pooled: bool = False
    answers_inside: bool = True
    references: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def score(self, logits: Float[Array, "batch position vocabulary"], batch: Batch) -> Score:
        """Of a model's logits on a batch."""
        targets = batch.targets
        if self.pooled:
            logits, targets = jnp.mean(logits, axis=1, keepdims=True), targets[:, -1:]
        says = jax.nn.log_softmax(logits.astype(jnp.float32))
        counts = targets != NO_TARGET
        total = jnp.maximum(jnp.sum(counts), 1)
        chosen = jnp.take_along_axis(says, jnp.where(counts, targets, 0)[..., None], axis=-1)[..., 0]
        right = jnp.argmax(says, axis=-1) == targets
        return Score(loss=-jnp.sum(chosen * counts) / total, accuracy=jnp.sum(right & counts) / total)

    def value(self, score: Score) -> Any:
        """The number that the task is judged by."""
        return score.accuracy if self.measure == "accuracy" else score.loss / np.log(2)


def text(corpus: Corpus, length: int = 64) -> Task:
    """The next byte of a text, at every position.

    Raises ValueError where the text is too short.
    """
    stream, unseen = (_bytes_of(documents) for documents in (corpus.train, corpus.validation))
    tokens = on_device(stream, length)
    on_device(unseen, length)  # raises where it is too short
    starts = np.linspace(0, len(unseen) - length - 1, HELD_OUT).astype(int)
    between = (starts[:-1] + starts[1:]) // 2

    def draw(key: Key[Array, ""], count: int) -> Batch:
        return next_token(random_batch(tokens, key, 0, batch=count, length=length))

    def windows(starts: Int[np.ndarray, " window"]) -> Batch:
        return next_token(jnp.asarray(unseen[starts[:, None] + np.arange(length + 1)], jnp.int32))

    shares = np.bincount(stream, minlength=256) / len(stream)
    return Task(
        name="text",
        asks="the next byte of a text",
        vocabulary=256,
        length=length,
        batch=16,
        steps=3000,
        quick_steps=600,
        draw=draw,
        held_out=windows(starts),
        choosing=windows(between),
        measure="bits",
        references={"frequencies alone": float(-np.sum(shares * np.log2(np.maximum(shares, 1e-12))))},
    )


def classification(
    classes: int = 8, symbols: int = 32, length: int = 64, *, which: float = 0.3, follows: float = 0.3
) -> Task:
    """Which of a few Markov chains a sequence is from.

    The chains differ in how often symbols come (log weights of deviation ``which``) and in which follows which
    (``follows``), so a bag of symbols says much and not all. ``references`` are the best classifier, by the
    chains' likelihood, and the one that counts symbols as if they were independent.
    """
    rng = np.random.default_rng(DATA)
    logits = which * rng.normal(size=(classes, 1, symbols)) + follows * rng.normal(
        size=(classes, symbols, symbols)
    )
    chain = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    start = np.stack([_stationary(one) for one in chain])
    log_chain, log_start = jnp.asarray(np.log(chain), jnp.float32), jnp.asarray(np.log(start), jnp.float32)

    def draw(key: Key[Array, ""], count: int) -> Batch:
        of_class, of_start, of_steps = jax.random.split(key, 3)
        label = jax.random.randint(of_class, (count,), 0, classes)
        first = jax.random.categorical(of_start, log_start[label])

        def step(symbol: Array, key: Array) -> tuple[Array, Array]:
            return jax.random.categorical(key, log_chain[label, symbol]), symbol

        _, tokens = jax.lax.scan(step, first, jax.random.split(of_steps, length))
        targets = jnp.full((count, length), NO_TARGET).at[:, -1].set(label)
        return Batch(tokens=tokens.T, targets=targets)

    many = _drawn(draw, "reference", REFERENCE)
    label = np.asarray(many.targets[:, -1])
    of_counts = jnp.sum(log_start[:, many.tokens], axis=-1)
    of_pairs = log_start[:, many.tokens[:, 0]] + jnp.sum(
        log_chain[:, many.tokens[:, :-1], many.tokens[:, 1:]], axis=-1
    )
    right = lambda likelihood: float(np.mean(np.argmax(np.asarray(likelihood), axis=0) == label))
    return Task(
        name="classification",
        asks="which of eight sources a sequence is from",
        vocabulary=symbols,
        length=length,
        batch=16,
        steps=1500,
        quick_steps=400,
        draw=draw,
        held_out=_drawn(draw, "classification", 2 * HELD_OUT),
        choosing=_drawn(draw, "choosing", 2 * HELD_OUT),
        measure="accuracy",
        pooled=True,
        answers_inside=False,
        references={
            "the best classifier": right(of_pairs),
            "symbols counted": right(of_counts),
            "chance": 1 / classes,
        },
    )


NO_RECALL = "no key looked at: values shown and not yet answered"


def recall(pairs: int = 6, keys: int = 16) -> Task:
    """Pairs of a key and a value, then the keys again in another order, each to be answered with its value.

    Multi-query associative recall (Arora et al. 2024): where the answer stands, only the data tells.
    """
    length = 4 * pairs

    def one(key: Key[Array, ""]) -> tuple[Array, Array]:
        of_keys, of_values, of_order = jax.random.split(key, 3)
        asked = jax.random.permutation(of_keys, keys)[:pairs]
        values = keys + jax.random.randint(of_values, (pairs,), 0, keys)
        order = jax.random.permutation(of_order, pairs)
        both = lambda order: jnp.stack([asked[order], values[order]], axis=1).reshape(-1)
        tokens = jnp.concatenate([both(jnp.arange(pairs)), both(order)])
        place = jnp.arange(length)
        is_question = (place >= 2 * pairs) & (place % 2 == 0)
        return tokens, jnp.where(is_question, jnp.roll(tokens, -1), NO_TARGET)

    draw = lambda key, count: Batch(*jax.vmap(one)(jax.random.split(key, count)))
    held_out = _drawn(draw, "recall", HELD_OUT)
    return Task(
        name="recall",
        asks="the value that stood beside a key",
        vocabulary=2 * keys,
        length=length,
        batch=32,
        steps=3000,
        quick_steps=800,
        draw=draw,
        held_out=held_out,
        choosing=_drawn(draw, "choosing", HELD_OUT),
        measure="accuracy",
        references={
            NO_RECALL: _by_elimination(np.asarray(held_out.tokens), pairs),
            "chance among the values present": 1 / pairs,
        },
    )


def _by_elimination(tokens: Int[np.ndarray, "batch position"], pairs: int) -> float:
    """The accuracy of the value that was shown most often and answered least: no key is looked at.

    Earlier questions' answers are there to be seen, so this is much better than chance.
    """
    right = 0
    for row in tokens:
        left = Counter(row[1 : 2 * pairs : 2].tolist())
        for answer in row[2 * pairs + 1 :: 2].tolist():
            right += left.most_common(1)[0][0] == answer
            left[answer] -= 1
    return right / (len(tokens) * pairs)


def addition(digits: int = 3) -> Task:
    """The sum of two numbers, lowest digit first: ``a + b = c``; the places never change."""
    plus, equals = 10, 11

    def draw(key: Key[Array, ""], count: int) -> Batch:
        terms = jax.random.randint(key, (count, 2), 0, 10**digits)
        spelled = lambda number, many: number[:, None] // 10 ** jnp.arange(many) % 10
        mark = lambda symbol: jnp.full((count, 1), symbol)
        answer = spelled(jnp.sum(terms, axis=1), digits + 1)
        tokens = jnp.concatenate(
            [spelled(terms[:, 0], digits), mark(plus), spelled(terms[:, 1], digits), mark(equals), answer], axis=1
        )
        batch = next_token(tokens)
        asked = jnp.arange(batch.tokens.shape[1]) > 2 * digits
        return Batch(batch.tokens, jnp.where(asked, batch.targets, NO_TARGET))

    held_out = _drawn(draw, "addition", 4 * HELD_OUT)
    return Task(
        name="addition",
        asks=f"each digit of the sum of two {digits}-digit numbers",
        vocabulary=12,
        length=3 * digits + 2,
        batch=64,
        steps=3000,
        quick_steps=800,
        draw=draw,
        held_out=held_out,
        choosing=_drawn(draw, "choosing", 4 * HELD_OUT),
        measure="accuracy",
        references={"the most frequent digit at each place": _most_frequent(np.asarray(held_out.targets))},
    )


def _most_frequent(targets: Int[np.ndarray, "batch position"]) -> float:
    """The accuracy of one answer for each place, the best one: the last digit of a sum is 0 or 1."""
    asked = targets[:, targets[0] != NO_TARGET]
    return float(np.mean([np.bincount(place).max() / len(place) for place in asked.T]))


def memorisation(facts: int = 1024, symbols: int = 32, length: int = 4) -> Task:
    """Facts without any rule: what random symbol belongs to each of so many random sequences, all different."""
    rng = np.random.default_rng(DATA)
    numbers = rng.choice(symbols**length, size=facts, replace=False)
    tokens = jnp.asarray(numbers[:, None] // symbols ** np.arange(length) % symbols, jnp.int32)
    labels = jnp.asarray(rng.integers(symbols, size=facts), jnp.int32)
    every = Batch(tokens, jnp.full((facts, length), NO_TARGET).at[:, -1].set(labels))

    def draw(key: Key[Array, ""], count: int) -> Batch:
        chosen = jax.random.randint(key, (count,), 0, facts)
        return jax.tree.map(lambda x: x[chosen], every)

    return Task(
        name="memorisation",
        asks=f"the symbol that belongs to each of {facts} sequences, learned by heart",
        vocabulary=symbols,
        length=length,
        batch=128,
        steps=2000,
        quick_steps=400,
        draw=draw,
        held_out=every,
        choosing=every,  # there are no other facts
        measure="accuracy",
        answers_inside=False,
        references={"chance": 1 / symbols},
    )


def every_task(corpus: Corpus) -> dict[str, Task]:
    """All tasks, by name."""
    tasks = (text(corpus), classification(), recall(), addition(), memorisation())
    return {task.name: task for task in tasks}


def _bytes_of(documents: tuple[str, ...]) -> Int[np.ndarray, " byte"]:
    joined = "\n\n".join(documents).encode("utf-8")[:TEXT_BYTES]
    return np.frombuffer(joined, np.uint8).astype(np.int32)


def _key(of: str) -> Key[Array, ""]:
    return jax.random.fold_in(jax.random.key(DATA), sum(of.encode()))


def _drawn(draw: Callable[[Any, int], Batch], of: str, count: int) -> Batch:
    """So many sequences, as one program."""
    return jax.jit(draw, static_argnums=1)(_key(of), count)


def _stationary(chain: Float[np.ndarray, "symbol symbol"]) -> Float[np.ndarray, " symbol"]:
    values, vectors = np.linalg.eig(chain.T)
    found = np.real(vectors[:, np.argmax(np.real(values))])
    return found / found.sum()
