"""A run that goes on from a trained model."""

import shutil

import jax
import numpy as np
import pytest
from properties.checkpoints import saved
from properties.models import bits, random_parameters

from minitf import ModelConfig, initialize
from minitf.analysis.plan import job as plan_job
from minitf.analysis.run_folder import Problem
from minitf.analysis.training import job
from minitf.families import native
from minitf.parameters import named
from minitf.pretrained import load
from minitf.train.settings import as_config, laid_over
from minitf.vocabulary import Characters

WORDS = np.array("the scan is slow and then attention snaps to what is distinct".split())
TEXT = "".join(" ".join(words) + "\n\n" for words in np.random.default_rng(0).choice(WORDS, (300, 8)).tolist())
ALPHABET = Characters("".join(sorted({*TEXT, "!", "?"})))
CONFIG = ModelConfig(vocabulary=ALPHABET.size, layers=2, width=8, heads=2, length=10, biases=True, tied=True)
# A rate of zero: what a model ends with is what it started from.
STILL = {
    "training": {"steps": 2, "batch": 4, "steps_per_call": 2},
    "optimizer": {"rate": 0.0, "schedule": "constant", "warm_up": 0},
    "keep": {"evaluate_every": 0},
}


def run(out, start, *groups):
    tables = laid_over(STILL, {"training": {"start_from": str(start)}})
    for more in groups:
        tables = laid_over(tables, more)
    return job.run(as_config(tables), out, quiet=True)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A model of text with its vocabulary, and a text."""
    folder = tmp_path_factory.mktemp("begun")
    native.save(folder / "model", CONFIG, random_parameters(CONFIG), ALPHABET)
    (folder / "x.txt").write_text(TEXT)
    return folder / "model", {"data": {"paths": [str(folder / "x.txt")]}}


def test_it_starts_from_the_weights_and_reads_with_the_vocabulary(begun, tmp_path):
    model, text = begun
    page = run(tmp_path / "run", model, text).read_text()
    found = load(tmp_path / "run" / "model")
    assert found.config == CONFIG
    assert bits(found.parameters) == bits(load(model).parameters)
    # Of the text alone two letters would not be there, and all others would have other numbers.
    assert found.tokenizer.vocabulary == ALPHABET
    assert f"from the weights of {model}" in page


def test_it_learns_from_there_and_goes_on_when_the_model_is_gone(begun, tmp_path):
    model, text = begun
    shutil.copytree(model, tmp_path / "model")
    learning = {"optimizer": {"rate": 0.01}, "keep": {"checkpoint_every": 1}}
    longer = laid_over(learning, {"training": {"steps": 5}})
    run(tmp_path / "straight", tmp_path / "model", text, longer)
    run(tmp_path / "run", tmp_path / "model", text, learning)
    shutil.rmtree(tmp_path / "model")
    run(tmp_path / "run", tmp_path / "model", text, longer)
    ends = [load(tmp_path / name / "model").parameters for name in ("run", "straight")]
    assert bits(ends[0]) == bits(ends[1])
    assert bits(ends[0]) != bits(load(model).parameters)
    assert bits(load(tmp_path / "run" / "start").parameters) == bits(load(model).parameters)


def test_every_model_starts_from_it(begun, tmp_path):
    model, text = begun
    run(tmp_path / "run", model, text, {"training": {"seeds": 2}, "sweep": {"optimizer.weight_decay": [0.0, 0.1]}})
    for number in range(4):
        assert bits(load(tmp_path / "run" / "models" / str(number)).parameters) == bits(load(model).parameters)


def test_a_shorter_model_has_the_first_positions(begun, tmp_path):
    model, text = begun
    run(tmp_path / "run", model, text, {"model": {"length": 6}})
    found, whole = (named(load(folder).parameters) for folder in (tmp_path / "run" / "model", model))
    assert load(tmp_path / "run" / "model").config.length == 6
    assert {name for name in found if found[name].shape != whole[name].shape} == {"position"}
    np.testing.assert_array_equal(found["position"], whole["position"][:6])


def test_what_can_only_be_another_model_is_refused_and_the_corrected_command_runs(begun, tmp_path):
    model, text = begun
    with pytest.raises(Problem, match=r"start_from and settings of model do not go together: .*embedding has"):
        run(tmp_path / "run", model, text, {"model": {"width": 16}})
    with pytest.raises(Problem, match="do not go together: .*position has the shape"):
        run(tmp_path / "run", model, text, {"model": {"length": 12}})
    with pytest.raises(Problem, match="there is no file or folder '.*nowhere'"):
        run(tmp_path / "run", tmp_path / "nowhere", text)
    with pytest.raises(Problem, match=f"model.vocabulary is {ALPHABET.size}; the data has 39 tokens"):
        run(tmp_path / "run", model, {"task": {"name": "copy", "symbols": 38, "span": 3}, "model": {"length": 6}})
    other = ModelConfig(vocabulary=9, layers=1, width=8, heads=2, length=6)
    native.save(tmp_path / "other", other, initialize(other, jax.random.key(0)))
    run(tmp_path / "run", tmp_path / "other", {"task": {"name": "copy", "symbols": 4, "span": 3}})
    assert load(tmp_path / "run" / "model").config == other


def test_a_letter_that_the_model_does_not_know_is_named(begun, tmp_path):
    (tmp_path / "x.txt").write_text(TEXT + "quiz\n")
    with pytest.raises(Problem, match="characters 'q', 'u', 'z' are not in the alphabet"):
        run(tmp_path / "run", begun[0], {"data": {"paths": [str(tmp_path / "x.txt")]}})


def test_a_model_of_text_needs_a_tokenizer_or_tokens(begun, tmp_path):
    folder = saved(tmp_path / "gpt2", "gpt2")
    with pytest.raises(Problem, match=r"has no tokenizer for .*gpt2: say data.encoding, or train on tokens"):
        run(tmp_path / "run", folder, begun[1])
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 11, 200_000).astype(np.uint16))
    tokens = {"data": {"format": "tokens", "paths": [str(tmp_path / "ids.npy")]}}
    run(tmp_path / "run", folder, tokens)
    assert bits(load(tmp_path / "run" / "model").parameters) == bits(load(folder).parameters)


def test_a_model_that_sees_what_comes_has_no_next_token_to_learn(begun, tmp_path):
    folder = saved(tmp_path / "bert", "bert")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 10, 200_000).astype(np.uint16))
    tokens = {"data": {"format": "tokens", "paths": [str(tmp_path / "ids.npy")]}}
    with pytest.raises(Problem, match="the model is not causal: it sees the next token"):
        run(tmp_path / "run", folder, tokens)
    run(tmp_path / "run", folder, tokens, {"objective": {"kind": "masked_token"}})
    assert bits(load(tmp_path / "run" / "model").parameters) == bits(load(folder).parameters)


def test_a_plan_is_that_of_the_model(begun, tmp_path):
    config = as_config({"training": {"start_from": str(begun[0]), "batch": 4}, "model": {"length": 6}})
    assert plan_job.program_of(config).model == ModelConfig(**{**vars(CONFIG), "length": 6})


def test_a_presets_model_is_not_mixed_with_the_one_to_start_from():
    preset = {"model": {"layers": 9}, "training": {"steps": 5}}
    start = {"training": {"start_from": "x"}}
    assert laid_over(preset, start) == {"training": {"steps": 5, "start_from": "x"}}
    assert laid_over(preset, {**start, "model": {"length": 4}})["model"] == {"length": 4}
    # The file of such a run says what was changed of the model; that stays.
    whole = {**start, "model": {"length": 4}}
    for more in (start, {"training": {"steps": 3}}):
        assert laid_over(whole, more)["model"] == {"length": 4}
