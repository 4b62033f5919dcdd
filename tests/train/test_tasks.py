"""Targets are recomputed from the tokens alone, in plain Python."""

import itertools
import math
from functools import cache

import jax
import numpy as np
import pytest

from minitf.train.batch import NO_TARGET
from minitf.train.tasks import (
    TASKS,
    Addition,
    Copy,
    Grammar,
    Induction,
    LinearRegression,
    Memorisation,
    ModularAddition,
    Recall,
    make,
)
from minitf.train.tasks.task import SOME_DRAWN

SMALL = {
    "modular-addition": ModularAddition(modulus=7, share=0.4),
    "copy": Copy(symbols=5, span=4),
    "induction": Induction(symbols=20, length=12),
    "recall": Recall(pairs=3, keys=5),
    "linear-regression": LinearRegression(dimensions=3, points=6, noise=0.5),
    "grammar": Grammar(symbols=3, rules=2, branching=2, depth=3),
    "addition": Addition(digits=2),
    "memorisation": Memorisation(facts=20, symbols=4, length=3),
}
BATCH = 64
NUMBERED = sorted(set(SMALL) - {"linear-regression"})


@cache
def program(task):
    return jax.jit(task.draw, static_argnums=1)


@cache
def drawn(task, seed=0):
    return jax.tree.map(np.asarray, program(task)(jax.random.key(seed), BATCH))


@cache
def held_out(task):
    return jax.tree.map(np.asarray, task.held_out())


@cache
def references(task):
    return task.references()


def rows(batch):
    return list(zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True))


# --- all tasks


@pytest.mark.parametrize("name", SMALL)
def test_what_is_measured_on_is_told_as_it_is(name):
    task = SMALL[name]
    told = task.measured_on
    trained, measured = ({tuple(row) for row in of(task).tokens.tolist()} for of in (drawn, held_out))
    if told.startswith("all"):
        assert trained <= measured
    elif told != SOME_DRAWN and task.objective != "regression":  # whose numbers are beside its tokens
        assert trained.isdisjoint(measured)


@pytest.mark.parametrize("name", SMALL)
def test_tokens_and_targets_are_what_the_task_says(name):
    task = SMALL[name]
    for batch in (drawn(task), held_out(task)):
        assert batch.tokens.shape == batch.targets.shape == (len(batch.tokens), task.length)
        assert batch.tokens.dtype == np.int32 and batch.tokens.min() >= 0 and batch.tokens.max() < task.vocabulary
        if task.objective == "regression":
            assert batch.targets.dtype == np.float32
            assert batch.inputs.shape == (*batch.tokens.shape, task.vocabulary)
        else:
            assert batch.inputs is None and batch.targets.dtype == np.int32
            assert batch.targets.min() >= NO_TARGET and batch.targets.max() < task.vocabulary
            assert np.all(np.any(batch.targets != NO_TARGET, axis=1))
        if task.objective == "classification":
            assert np.all(batch.targets[:, :-1] == NO_TARGET) and np.all(batch.targets[:, -1] >= 0)


@pytest.mark.parametrize("name", NUMBERED)
def test_other_keys_draw_other_sequences_and_the_same_key_the_same(name):
    task = SMALL[name]
    again = program(task)(jax.random.key(0), BATCH)
    assert np.array_equal(drawn(task).tokens, again.tokens)
    assert not np.array_equal(drawn(task).tokens, drawn(task, 1).tokens)


@pytest.mark.parametrize("name", ["copy", "modular-addition", "linear-regression"])
def test_sequences_are_drawn_inside_vmap_and_scan_as_outside(name):
    task = SMALL[name]
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def together(keys):
        def step(carry, key):
            return carry, task.draw(key, 3)

        return jax.vmap(lambda key: task.draw(key, 3))(keys), jax.lax.scan(step, 0, keys)[1]

    one = jax.jit(lambda key: task.draw(key, 3))
    for way in together(keys):
        for index, key in enumerate(keys):
            for x, y in zip(jax.tree.leaves(way), jax.tree.leaves(one(key)), strict=True):
                # One program may round sums otherwise than another: sums of 4 products, in float32.
                assert np.allclose(x[index], y, rtol=4 * 2**-23, atol=4 * 2**-22, equal_nan=True)


@pytest.mark.parametrize("name", SMALL)
def test_a_sequence_can_be_spelled_and_its_references_are_losses(name):
    task = SMALL[name]
    spelled = task.spell(drawn(task).tokens[0])
    assert isinstance(spelled, str) and spelled
    assert references(task) and all(0 <= loss < math.inf for loss in references(task).values())


@pytest.mark.parametrize("name", NUMBERED)
def test_references_are_not_better_than_knowing_everything_and_not_worse_than_guessing(name):
    task = SMALL[name]
    assert max(references(task).values()) <= math.log(task.vocabulary)


# --- each task


def test_copied_symbols_are_those_before_the_separator():
    for tokens, targets in rows(drawn(SMALL["copy"])):
        separator = tokens.index(5)
        assert separator == 4
        assert targets == [NO_TARGET] * separator + tokens[:separator]
        assert tokens[separator + 1 :] == tokens[: separator - 1]


def test_an_induction_target_is_what_followed_the_earlier_occurrence():
    task = SMALL["induction"]
    firsts, sizes = set(), set()
    for tokens, targets in rows(drawn(task)):
        asked = [place for place, target in enumerate(targets) if target != NO_TARGET]
        assert asked == list(range(asked[0], asked[-1] + 1))
        for place in asked:
            earlier = tokens.index(tokens[place])
            assert earlier < place and targets[place] == tokens[earlier + 1]
        # Nothing else is told: no symbol comes twice but those of the segment, whose last comes after the targets.
        window = [*tokens, None]
        again = [place for place in range(task.length) if tokens[place] in tokens[:place]]
        assert set(asked) <= set(again)
        assert set(again) - set(asked) <= {asked[-1] + 1}
        assert all(window[place + 1] == targets[place] for place in asked if place + 1 < task.length)
        firsts.add(asked[0])
        sizes.add(len(asked))
    assert len(firsts) > 4 and len(sizes) > 3


def test_a_recalled_value_is_the_one_that_stood_beside_its_key():
    for tokens, targets in rows(drawn(SMALL["recall"])):
        pairs = dict(zip(tokens[0:6:2], tokens[1:6:2], strict=True))
        assert len(pairs) == 3 and max(pairs) < 5 <= min(pairs.values())
        questions = tokens[6::2]
        assert sorted(questions) == sorted(pairs)
        assert targets == [NO_TARGET] * 6 + [
            pairs[tokens[place]] if place % 2 == 0 else NO_TARGET for place in range(6, 11)
        ]
        assert all(tokens[place] == targets[place - 1] for place in range(7, 11, 2))


def test_guessing_a_value_that_is_there_costs_at_most_the_logarithm_of_their_number():
    reference = references(SMALL["recall"])["the sequence's own values"]
    assert 0 < reference < math.log(3)


def read_sum(task, tokens, targets):
    """Both terms and the answer, and how many carries there are, from the digits."""
    n = task.digits
    value = lambda digits: sum(digit * 10**place for place, digit in enumerate(digits))
    assert tokens[n] == 10 and tokens[2 * n + 1] == 11
    first, second, answer = tokens[:n], tokens[n + 1 : 2 * n + 1], targets[2 * n + 1 :]
    assert all(0 <= digit <= 9 for digit in first + second + answer)
    assert targets[: 2 * n + 1] == [NO_TARGET] * (2 * n + 1)
    assert tokens[2 * n + 2 :] == answer[:-1]
    carries = sum(value(first[:k]) + value(second[:k]) >= 10**k for k in range(1, n + 1))
    return value(first), value(second), value(answer), len(answer), carries


@pytest.mark.parametrize("task", [Addition(digits=2), Addition(digits=3, carry=False)])
def test_the_answer_is_the_sum_and_without_carry_nothing_is_carried(task):
    most = 0
    for tokens, targets in rows(drawn(task)):
        first, second, answer, digits, carries = read_sum(task, tokens, targets)
        assert first + second == answer and digits == task.digits + task.carry
        most = max(most, carries)
    assert most == (2 if task.carry else 0)


def test_a_sum_is_spelled_as_the_model_reads_it():
    assert Addition(digits=2).spell(np.array([3, 2, 10, 0, 0, 11, 3])) == "32+00=3"


def test_the_answer_modulo_is_right_and_held_out_pairs_are_all_that_training_never_draws():
    task = SMALL["modular-addition"]
    every = program(task)(jax.random.key(3), task.training_pairs)
    sides = []
    for batch in (jax.tree.map(np.asarray, every), held_out(task)):
        for tokens, targets in rows(batch):
            assert tokens[2] == 7 and targets == [NO_TARGET, NO_TARGET, (tokens[0] + tokens[1]) % 7]
        sides.append({tuple(tokens[:2]) for tokens, _ in rows(batch)})
    train, unseen = sides
    # As many different ones as were drawn: a batch of all pairs is each once.
    assert len(train) == task.training_pairs == 20
    assert not train & unseen and train | unseen == set(itertools.product(range(7), repeat=2))
    assert {tuple(tokens[:2]) for tokens, _ in rows(drawn(task))} == train


def test_the_split_depends_on_the_data_seed_alone():
    assert np.array_equal(ModularAddition(7).order, ModularAddition(7, share=0.9).order)
    assert not np.array_equal(ModularAddition(7).order, ModularAddition(7, data_seed=1).order)


def test_a_fact_has_one_answer_and_held_out_is_every_fact():
    task = SMALL["memorisation"]
    facts = {tuple(tokens): targets[-1] for tokens, targets in rows(held_out(task))}
    assert len(facts) == 20
    seen = {tuple(tokens): targets[-1] for tokens, targets in rows(drawn(task))}
    # 64 are three times each of the 20, and 4 more.
    assert seen == facts


def test_facts_are_different_when_they_are_nearly_all_and_when_sequences_are_too_many_to_number():
    for task in (Memorisation(facts=60, symbols=4, length=3), Memorisation(facts=60, symbols=4, length=300)):
        sequences, answers = task.known
        assert len(np.unique(sequences, axis=0)) == 60 and sequences.shape == (60, task.length)
        assert sequences.max() < 4 and answers.max() < 4


# --- regression


def test_points_are_where_the_task_says_and_targets_are_the_ys():
    task = SMALL["linear-regression"]
    batch = drawn(task)
    x, y = batch.inputs[:, ::2], batch.inputs[:, 1::2]
    assert np.all(x[..., -1] == 0) and np.all(y[..., :-1] == 0)
    assert np.array_equal(batch.targets[:, ::2], y[..., -1])
    assert np.all(np.isnan(batch.targets[:, 1::2])) and np.all(batch.tokens == 0)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_reference_predicts_as_numpys_least_squares(noise):
    task = LinearRegression(dimensions=3, points=6, noise=noise)
    batch = drawn(task)
    predicted = task.least_squares(batch)
    for sequence in range(5):
        inputs = batch.inputs[sequence].astype(np.float64)
        x, y = inputs[::2, :-1], inputs[1::2, -1]
        for point in range(task.points):
            rows = np.concatenate([x[:point], noise * np.eye(3)])
            answers = np.concatenate([y[:point], np.zeros(3)])
            # Numbers as small as rounding are the zeros of points fewer than dimensions.
            slopes = np.linalg.lstsq(rows, answers, rcond=1e-12)[0]
            expected = x[point] @ slopes
            # Both lose at most the square of the condition number, here below 1e4, times 2**-52.
            assert abs(predicted[sequence, point] - expected) < 1e8 * 2**-52 * max(1, abs(expected))


def test_without_noise_least_squares_is_exact_once_there_are_as_many_points_as_dimensions():
    task = LinearRegression(dimensions=3, points=6)
    batch = drawn(task)
    wrong = np.abs(task.least_squares(batch) - batch.targets[:, ::2])
    assert np.median(wrong[:, 3:]) < 1e-5 and np.median(wrong[:, :3]) > 0.1
    losses = references(task)
    assert losses["least squares"] < losses["zero"]
    # The mean over 512 * 6 ys; a y is w.x, of variance 3 with fat tails (the standard deviation of y**2 is 3 times
    # sqrt(8) at most), and ys of a sequence share w: five standard deviations of 512 independent ones.
    assert abs(losses["zero"] - 3) < 5 * 3 * math.sqrt(8 / 512)


# --- grammar


def derivations(task, level=0, symbol=None):
    """Every sequence of leaves below a symbol (below any root), one for each choice of rules."""
    if symbol is None:
        return [leaves for root in range(task.symbols) for leaves in derivations(task, 0, root)]
    if level == task.depth:
        return [(symbol,)]
    found = []
    for right in task.productions[level, symbol].tolist():
        parts = [derivations(task, level + 1, child) for child in right]
        found += [sum(leaves, ()) for leaves in itertools.product(*parts)]
    return found


@pytest.mark.parametrize("shape", [(3, 2, 2, 2), (2, 2, 2, 2), (3, 2, 3, 2)])
def test_every_choice_of_rules_is_another_sequence_so_the_entropy_is_their_logarithm(shape):
    symbols, rules, branching, depth = shape
    task = Grammar(symbols, rules, branching, depth)
    every = derivations(task)
    assert len(set(every)) == len(every) == task.sequences
    assert task.entropy == pytest.approx(math.log(len(every)), rel=1e-12)
    frequencies = np.bincount(np.ravel(every), minlength=symbols) / np.size(every)
    assert task.frequencies() == pytest.approx(frequencies, rel=1e-12)
    assert references(task)["entropy"] <= references(task)["frequencies alone"] + 1e-12


def test_what_is_drawn_are_sequences_of_the_grammar_after_a_token_that_begins_them():
    task = Grammar(symbols=3, rules=2, branching=2, depth=2)
    every = set(derivations(task))
    found = set()
    for tokens, targets in rows(drawn(task)):
        assert tokens == [3, *targets[:-1]] and tuple(targets) in every
        found.add(tuple(targets))
    # 64 draws of 24 equally likely sequences leave less than three in four out with overwhelming probability.
    assert len(found) > 12


def test_rules_are_the_same_for_the_same_data_seed_and_others_for_another():
    assert np.array_equal(Grammar().productions, Grammar().productions)
    assert not np.array_equal(Grammar().productions, Grammar(data_seed=1).productions)


# --- making them by name


@pytest.mark.parametrize("name", TASKS)
def test_a_task_of_that_name_with_its_defaults_is_made(name):
    assert make(name, {}) == TASKS[name]()


def test_settings_are_taken_and_whole_numbers_will_do_for_real_ones():
    assert make("linear-regression", {"noise": 1, "points": 3}) == LinearRegression(points=3, noise=1.0)
    assert make("addition", {"carry": False}) == Addition(carry=False)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gramar", {}, "no task 'gramar' .did you mean 'grammar'.*modular-addition"),
        ("copy", {"symbol": 3}, "no setting 'symbol' .did you mean 'symbols'.*symbols, span"),
        ("copy", {"span": 2.0}, "span of the task copy is 2.0; it must be a whole number"),
        ("copy", {"span": True}, "span .* is True; it must be a whole number"),
        ("modular-addition", {"share": "many"}, "share .* is 'many'; it must be a number"),
        ("addition", {"carry": 1}, "carry .* is 1; it must be true or false"),
        ("copy", {"symbols": 1}, "symbols is 1; it must be at least 2"),
        ("copy", {"span": 0}, "span is 0; it must be at least 1"),
        ("modular-addition", {"share": 1.0}, "share is 1.0; it must be above 0 and below 1"),
        ("modular-addition", {"modulus": 2, "share": 0.1}, "leave some of the 4 pairs on each side"),
        ("induction", {"symbols": 32}, "symbols is 32; it must be above the length, 32"),
        ("recall", {"pairs": 20}, "pairs is 20; it must be at most the number of keys, 16"),
        ("linear-regression", {"noise": -1}, "noise is -1.0; it must be a finite number"),
        ("linear-regression", {"noise": float("nan")}, "noise is nan"),
        ("grammar", {"rules": 9}, "rules is 9; 8 symbols need 72 .* there are 64 of 2 symbols: at most 8 rules"),
        ("grammar", {"depth": 17}, "depth is 17; .* 131072 positions"),
        ("addition", {"digits": 10}, "digits is 10; it must be from 1 to 9"),
        ("memorisation", {"symbols": 2}, "facts is 1024; with 2 symbols there are only 16"),
    ],
)
def test_what_makes_no_task_is_refused_in_words(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make(name, settings)
