import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minitf.analysis.mixer_study import tasks
from minitf.analysis.mixer_study.tasks import NO_TARGET, Batch
from minitf.train.corpus import Corpus

KEY = jax.random.key(4)
TRAIN, UNSEEN = "abcdefgh" * 40, "hgfedcba" * 40


def corpus(train=TRAIN, unseen=UNSEEN):
    return Corpus(name="letters", train=(train,), validation=(unseen,), source="made up")


@pytest.fixture(scope="module")
def classification():
    return tasks.classification(classes=3, symbols=6, length=20, which=0.5, follows=0.5)


def every(classification):
    return (
        tasks.text(corpus(), length=16),
        classification,
        tasks.recall(3, 7),
        tasks.addition(),
        tasks.memorisation(20),
    )


def test_batches_are_of_the_tasks_shape_and_symbols(classification):
    for task in every(classification):
        batch = jax.jit(task.draw, static_argnums=1)(KEY, 5)
        assert batch.tokens.shape == batch.targets.shape == (5, task.length), task.name
        assert batch.tokens.min() >= 0 and batch.tokens.max() < task.vocabulary
        asked = np.asarray(batch.targets)[np.asarray(batch.targets) != NO_TARGET]
        assert asked.size and asked.min() >= 0 and asked.max() < task.vocabulary


def test_text_asks_for_the_next_byte_and_is_measured_on_what_is_not_trained_on():
    task = tasks.text(corpus(), length=16)
    batch = task.draw(KEY, 8)
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    spelled = lambda rows: {bytes(np.asarray(row, np.uint8)).decode() for row in rows}
    assert all(one in TRAIN for one in spelled(batch.tokens))
    assert all(one in UNSEEN for one in spelled(task.held_out.tokens))
    assert task.references["frequencies alone"] == pytest.approx(3.0)


def test_rates_are_chosen_by_other_sequences_than_those_that_are_measured(classification):
    letters = "".join(np.random.default_rng(0).choice(list("abcdefgh"), size=9000))
    for task in (tasks.text(corpus(unseen=letters), length=16), classification, tasks.recall(), tasks.addition()):
        measured, choosing = (
            {tuple(row.tolist()) for row in one.tokens} for one in (task.held_out, task.choosing)
        )
        assert len(choosing & measured) <= 0.01 * len(measured), task.name
        assert task.choosing.targets.shape[1:] == task.held_out.targets.shape[1:]
    facts = tasks.memorisation(20)
    assert facts.choosing is facts.held_out  # what is measured is what was learned: there is nothing else


def test_a_text_that_is_too_short_is_told():
    with pytest.raises(ValueError, match="too short"):
        tasks.text(corpus(unseen="abc"), length=16)


def test_recall_asks_for_the_value_that_stood_beside_the_key():
    batch = tasks.recall(pairs=4, keys=9).draw(KEY, 20)
    for tokens, targets in zip(np.asarray(batch.tokens), np.asarray(batch.targets), strict=True):
        known = dict(zip(tokens[0:8:2], tokens[1:8:2], strict=True))
        assert len(known) == 4 and all(value >= 9 > key for key, value in known.items())
        asked = np.flatnonzero(targets != NO_TARGET)
        assert asked.tolist() == [8, 10, 12, 14]
        assert [known[key] for key in tokens[asked]] == targets[asked].tolist() == tokens[asked + 1].tolist()


def test_addition_is_right_digit_by_digit():
    batch = tasks.addition(digits=3).draw(KEY, 50)
    for tokens, targets in zip(np.asarray(batch.tokens), np.asarray(batch.targets), strict=True):
        number = lambda digits: sum(int(d) * 10**i for i, d in enumerate(digits))
        assert tokens[3] == 10 and tokens[7] == 11
        assert number(targets[7:]) == number(tokens[:3]) + number(tokens[4:7])
        assert np.all(targets[:7] == NO_TARGET)


def rows(batch):
    """Each sequence with its targets."""
    return zip(np.asarray(batch.tokens), np.asarray(batch.targets), strict=True)


def test_facts_are_all_different_and_always_the_same():
    task = tasks.memorisation(facts=200, symbols=5, length=4)
    facts = {tuple(t): int(a[-1]) for t, a in rows(task.held_out)}
    assert len(facts) == 200 and len(set(facts.values())) == 5
    batch = task.draw(KEY, 30)
    assert all(facts[tuple(t)] == a[-1] for t, a in rows(batch))


def test_classes_differ_as_much_as_the_references_say(classification):
    chance, counted, best = (
        classification.references[name] for name in ("chance", "symbols counted", "the best classifier")
    )
    assert chance == pytest.approx(1 / 3)
    assert chance + 0.2 < counted < best - 0.03 < 0.97
    # Chains counted on many sequences classify others about as well as the best classifier.
    draw = jax.jit(classification.draw, static_argnums=1)
    seen, new = draw(KEY, 20_000), draw(jax.random.key(5), 2000)
    counts = np.ones((3, 6, 6))
    tokens, label = np.asarray(seen.tokens), np.asarray(seen.targets[:, -1])
    np.add.at(counts, (label[:, None], tokens[:, :-1], tokens[:, 1:]), 1)
    chain = np.log(counts / counts.sum(axis=-1, keepdims=True))
    tokens, label = np.asarray(new.tokens), np.asarray(new.targets[:, -1])
    likelihood = chain[:, tokens[:, :-1], tokens[:, 1:]].sum(axis=-1)
    assert np.mean(likelihood.argmax(axis=0) == label) == pytest.approx(best, abs=0.03)


def test_the_answer_to_addition_without_a_look_is_the_best_digit_of_each_place():
    """The last digit is a carry, of which one half is zero; the first digits are all alike."""
    (best,) = tasks.addition(3).references.values()
    assert best == pytest.approx((3 * 0.1 + 0.5) / 4, abs=0.02) and best > 0.2


def test_the_score_is_the_mean_over_targets_alone(classification):
    task = tasks.recall(2, 5)
    logits = jax.random.normal(KEY, (3, task.length, task.vocabulary))
    batch = task.draw(KEY, 3)
    found = task.score(logits, batch)
    says = np.asarray(jax.nn.log_softmax(logits))
    places = np.argwhere(np.asarray(batch.targets) != NO_TARGET)
    each = [says[b, t, int(batch.targets[b, t])] for b, t in places]
    assert found.loss == pytest.approx(-np.mean(each), rel=1e-5)
    right = [says[b, t].argmax() == int(batch.targets[b, t]) for b, t in places]
    assert found.accuracy == pytest.approx(np.mean(right))
    assert task.value(found) == found.accuracy


def test_a_whole_sequence_is_answered_from_the_mean_over_positions(classification):
    logits = jax.random.normal(KEY, (4, classification.length, classification.vocabulary))
    batch = classification.draw(KEY, 4)
    mean = np.asarray(logits).mean(axis=1)
    expected = mean.argmax(axis=-1) == np.asarray(batch.targets[:, -1])
    assert classification.score(logits, batch).accuracy == pytest.approx(expected.mean())


def test_bits_are_nats_over_the_log_of_two():
    task = tasks.text(corpus(), length=16)
    uniform = jnp.zeros((2, 16, 256))
    batch = Batch(task.held_out.tokens[:2], task.held_out.targets[:2])
    assert task.value(task.score(uniform, batch)) == pytest.approx(8.0)
