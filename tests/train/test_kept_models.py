"""What a run kept on the way are models, each by its step."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minitf import initialize, walk
from minitf.analysis.training import job
from minitf.parameters import named
from minitf.train import kept_models
from minitf.train.checkpoints import digests
from minitf.train.kept_models import load
from minitf.train.settings import as_config, laid_over

TINY = {
    "model": {"layers": 1, "width": 8, "heads": 2, "length": 8},
    "training": {"steps": 4, "batch": 4, "steps_per_call": 2},
    "keep": {"checkpoint_every": 2, "evaluate_every": 0, "dynamics": True},
}


def run(out, **groups):
    text = out.with_suffix(".txt")
    text.write_text("".join(f"the {n} of {n * n}, and then\n" for n in range(400)))
    job.run(as_config(laid_over(TINY, {"data": {"paths": [str(text)]}, **groups})), out, quiet=True)
    return out


def same(one, other):
    return all(np.array_equal(x, y) for x, y in zip(named(one).values(), named(other).values(), strict=True))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one") / "run")


def test_every_step_that_was_kept_is_a_model(one):
    last, ended = load(one / "checkpoints" / "4"), load(one / "model")
    assert last.config == ended.config
    assert last.tokenizer.encode("the") == ended.tokenizer.encode("the")
    assert same(last.parameters, ended.parameters)
    first = load(one / "checkpoints" / "0")
    fresh = initialize(first.config, jax.random.fold_in(jax.random.key(0), 0))
    assert same(first.parameters, fresh)
    assert walk(first.parameters, jnp.array([[3, 1, 4]]), first.config).logits.shape == (1, 3, 256)


def test_a_run_may_start_from_one_of_another(one, tmp_path):
    source = str(one / "checkpoints" / "2")
    started = run(tmp_path / "run", model={}, training={"start_from": source})
    assert same(load(started / "checkpoints" / "0").parameters, load(source).parameters)


@pytest.mark.parametrize(
    "groups",
    [
        {"training": {"seeds": 2}, "optimizer": {"average": 0.5, "name": "adamw_4bit"}},
        {"training": {"seeds": 2}, "model": {"layers": 2, "mixer": ["Uniform", "Gru"]}},
    ],
    ids=["average", "hybrid"],
)
def test_of_many_models_each_has_its_number_and_its_running_mean(tmp_path, groups):
    out = run(tmp_path / "run", **groups)
    for number in range(2):
        ended = load(out / "models" / str(number))
        assert same(load(out / "checkpoints" / "4" / str(number)).parameters, ended.parameters)
    for place in ("4", "4/2"):
        with pytest.raises(
            ValueError, match=r"is not a model of this run: name one of its 2 models, from .*4/0 on"
        ):
            load(out / "checkpoints" / place)


def test_what_is_not_there_is_told(one, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint of step 3; there are those of steps 0, 1, 2, 4"):
        load(one / "checkpoints" / "3")
    with pytest.raises(ValueError, match="its one model is .*4$"):
        load(one / "checkpoints" / "4" / "0")
    with pytest.raises(ValueError, match="name one by its step"):
        load(one / "checkpoints")


def test_a_run_that_did_not_end_says_where_its_models_are(tmp_path):
    out = run(tmp_path / "run")
    for file in (out / "model").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="a run that did not end; what it kept on the way are the models in"):
        load(out)


# What Orbax leaves behind when reading fails says so when it is collected: here, not in some later test.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_one_is_told(tmp_path):
    out = run(tmp_path / "run")
    for file in (out / "checkpoints" / "2").rglob("d/*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"the checkpoint .*2 cannot be read"):
        load(out / "checkpoints" / "2")
    (out / "checkpoints" / "model.json").write_text("{")
    with pytest.raises(ValueError, match="which says what the checkpoints beside it hold, is damaged"):
        load(out / "checkpoints" / "4")
    gc.collect()


def test_a_changed_number_is_told(tmp_path, monkeypatch):
    out = run(tmp_path / "run", optimizer={"average": 0.5})
    load(out / "checkpoints" / "2")
    monkeypatch.setattr(kept_models, "digests", lambda found: digests([x + 1 for x in found]))
    with pytest.raises(ValueError, match=r"2 is damaged: its numbers are not those that were written"):
        load(out / "checkpoints" / "2")
