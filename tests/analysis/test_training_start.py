"""A run that goes on from a trained model."""

import json
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
from minitf.analysis.training.prepared import prepared
from minitf.analysis.training.start import Start
from minitf.families import native
from minitf.parameters import named
from minitf.pretrained import load
from minitf.train.settings import as_config, laid_over, read_preset, tables_of
from minitf.train.token_file import open_tokens
from minitf.vocabulary import Characters

WORDS = np.array("the scan is slow and then attention snaps to what is distinct".split())
TEXT = "".join(" ".join(words) + "\n\n" for words in np.random.default_rng(0).choice(WORDS, (300, 8)).tolist())
ALPHABET = Characters("".join(sorted({*TEXT, "!", "?"})))
CONFIG = ModelConfig(vocabulary=ALPHABET.size, layers=1, width=8, heads=2, length=10, biases=True, tied=True)
SMALL = {"layers": 1, "width": 8, "heads": 2, "length": 10}
# A rate of zero: what a model ends with is what it started from.
STILL = {
    "training": {"steps": 2, "batch": 4, "steps_per_call": 2},
    "optimizer": {"rate": 0.0, "schedule": "constant", "warm_up": 0},
    "keep": {"evaluate_every": 0},
}


def config_of(start, *groups):
    tables = laid_over(STILL, {"training": {"start_from": str(start)}})
    for more in groups:
        tables = laid_over(tables, more)
    return as_config(tables)


def run(out, start, *groups, **options):
    return job.run(config_of(start, *groups), out, quiet=True, **options)


def ready_for(out, start, *groups):
    return prepared(config_of(start, *groups), out, print)


def raises(error):
    raise error


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
    ready = ready_for(tmp_path / "run", model, text, {"model": {"length": 6}})
    found, whole = named(ready.initial()), named(load(model).parameters)
    assert ready.program.model.length == 6
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
    ready = ready_for(tmp_path / "run", folder, tokens)
    assert bits(ready.initial()) == bits(load(folder).parameters)


def test_settings_that_were_left_out_are_not_those_that_it_began_with(begun, tmp_path):
    model, text = begun
    run(tmp_path / "run", model, text, {"model": {"length": 6}})
    with pytest.raises(Problem, match="model.length was 6 and is not given"):
        run(tmp_path / "run", model, text)


def test_a_run_that_was_begun_before_there_was_such_a_setting_goes_on(begun, tmp_path):
    text = {**begun[1], "model": SMALL}
    job.run(as_config(laid_over(STILL, text)), tmp_path / "run", quiet=True)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config.pop("training.start_from") == ""
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    job.run(as_config(laid_over(STILL, text)), tmp_path / "run", quiet=True)
    with pytest.raises(Problem, match=r"training.start_from was '' and is '/"):
        run(tmp_path / "run", begun[0], text)


def test_a_model_that_sees_what_comes_has_no_next_token_to_learn(begun, tmp_path):
    folder = saved(tmp_path / "bert", "bert")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 10, 200_000).astype(np.uint16))
    tokens = {"data": {"format": "tokens", "paths": [str(tmp_path / "ids.npy")]}}
    with pytest.raises(Problem, match="the model is not causal: it sees what comes next"):
        run(tmp_path / "run", folder, tokens)
    copy = laid_over(STILL, {"task": {"name": "copy"}, "model": {**SMALL, "length": 32, "causal": False}})
    with pytest.raises(Problem, match="the model is not causal"):
        job.run(as_config(copy), tmp_path / "copy", quiet=True)
    ready_for(tmp_path / "run", folder, tokens, {"objective": {"kind": "masked_token"}})


def test_a_plan_is_that_of_the_model(begun, tmp_path):
    config = as_config({"training": {"start_from": str(begun[0]), "batch": 4}, "model": {"length": 6}})
    assert plan_job.program_of(config).model == ModelConfig(**{**vars(CONFIG), "length": 6})


def test_of_a_presets_settings_those_of_its_model_are_not_mixed_with_it(tmp_path):
    preset = read_preset("characters")
    found = tables_of("characters", None, {"training": {"start_from": "x"}})
    assert "model" not in found and "encoding" not in found["data"]
    assert found["optimizer"] == preset["optimizer"]
    # What a file or the command line says of the model is meant for it.
    (tmp_path / "x.toml").write_text('preset = "characters"\n[model]\nlength = 7\n[data]\npaths = ["y"]\n')
    found = tables_of("", tmp_path / "x.toml", {"training": {"start_from": "x"}, "model": {"layers": 2}})
    assert found["model"] == {"length": 7, "layers": 2}
    assert found["data"] == {"paths": ["y"]}
    assert tables_of("", tmp_path / "x.toml", {})["model"] == {**preset["model"], "length": 7}


def test_a_model_in_the_folder_of_the_run_is_refused_before_anything_is_removed(begun, tmp_path):
    model, text = begun
    run(tmp_path / "run", model, text)
    for inside in ("model", "start"):
        with pytest.raises(Problem, match=r"lies in the folder of this run: choose another --out"):
            run(tmp_path / "run", tmp_path / "run" / inside, text, overwrite=True)
        assert (tmp_path / "run" / inside / "model.safetensors").exists()


def test_killed_before_its_first_step_it_needs_the_model_no_more(begun, tmp_path, monkeypatch):
    model, text = begun
    shutil.copytree(model, tmp_path / "model")
    with monkeypatch.context() as killed:
        killed.setattr(job, "_train", lambda *_: raises(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", tmp_path / "model", text)
    shutil.rmtree(tmp_path / "model")
    run(tmp_path / "run", tmp_path / "model", text)
    assert bits(load(tmp_path / "run" / "model").parameters) == bits(load(model).parameters)


def test_a_model_that_was_masked_goes_on_with_its_own_mask(tmp_path):
    pytest.importorskip("tokenizers", reason="not installed: pip install 'minitf[hub]'")
    from properties.tokenizer_files import KINDS

    rows = KINDS["bert"].get_vocab_size()
    folder = saved(tmp_path / "bert", "bert", vocabulary=rows)
    KINDS["bert"].save(str(folder / "tokenizer.json"))
    (tmp_path / "x.txt").write_text(TEXT)
    config = {
        "data": {"paths": [str(tmp_path / "x.txt")]},
        "objective": {"kind": "masked_token", "mask_share": 0.9},
    }
    tables = laid_over(laid_over(STILL, {"training": {"start_from": str(folder)}}), config)
    ready = prepared(as_config(tables), tmp_path / "run", print)
    assert ready.program.model.vocabulary == rows
    tokens = np.asarray(ready.held_out.tokens)
    mask, changed = KINDS["bert"].token_to_id("[MASK]"), np.asarray(ready.held_out.targets) >= 0
    assert 0.65 < np.mean(tokens[changed] == mask) < 0.95
    # Of the others some are any tokens, not those below the mask alone.
    assert tokens.max() > mask


def test_a_model_of_next_tokens_goes_on_with_masked_ones(begun, tmp_path):
    text = {"data": {"paths": [str(begun[0].parent / "x.txt")]}, "objective": {"kind": "masked_token"}}
    run(tmp_path / "run", begun[0], text)
    went = load(tmp_path / "run" / "model")
    assert went.config.vocabulary == CONFIG.vocabulary + 1
    np.testing.assert_array_equal(went.parameters.embedding[:-1], load(begun[0]).parameters.embedding)


def test_a_series_is_read_as_the_model_reads_it(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n" + "".join(f"{i % 7},{i % 3}\n" for i in range(4000)))
    table = {"format": "csv", "paths": [str(tmp_path / "x.csv")]}
    fresh = laid_over(STILL, {"data": {**table, "columns": ["b", "a"], "bins": 3}, "model": SMALL})
    job.run(as_config(fresh), tmp_path / "one", quiet=True)
    run(tmp_path / "two", tmp_path / "one" / "model", {"data": table})
    ids = [open_tokens(tmp_path / name / "data" / "train.tokens").ids for name in ("one", "two")]
    np.testing.assert_array_equal(*ids)
    with pytest.raises(Problem, match="data.columns are a, b; the bins of this vocabulary are those of b, a"):
        run(tmp_path / "three", tmp_path / "one" / "model", {"data": {**table, "columns": ["a", "b"]}})
    with pytest.raises(Problem, match="data.bins is 4; with a model to start from"):
        run(tmp_path / "three", tmp_path / "one" / "model", {"data": {**table, "bins": 4}})


def kept(folder, **settings):
    model = ModelConfig(**{"vocabulary": 5, "layers": 1, "width": 6, "heads": 1, "length": 4, **settings})
    native.save(folder, model, random_parameters(model))
    return Start(folder, model, None)


@pytest.mark.parametrize("settings", [{}, {"tied": True, "embedding": "learned"}, {"unembedding_bias": True}])
def test_tokens_that_a_model_has_no_rows_for_have_fresh_ones(tmp_path, settings):
    start = kept(tmp_path, **settings)
    grown = start.with_room(8)
    start.with_room(3).check(start.config)
    grown.check(grown.config)
    before, after = start.parameters(start.config), grown.parameters(grown.config)
    for name, path in {"embedding": np.s_[:5], "unembedding": np.s_[:, :5], "unembedding_bias": np.s_[:5]}.items():
        one, other = getattr(before, name), getattr(after, name)
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(other[path], one)
    assert after.embedding.shape == (8, 6) and np.std(after.embedding[5:]) > 0
    jax.tree.map(np.testing.assert_array_equal, before.layers, after.layers)


def test_one_hot_tokens_are_as_many_as_they_are(tmp_path):
    start = kept(tmp_path, embedding="one_hot", width=5, tied=False)
    assert start.parameters(start.config).embedding is None
    with pytest.raises(ValueError, match="one-hot embeddings are as wide as the vocabulary"):
        start.with_room(8)
