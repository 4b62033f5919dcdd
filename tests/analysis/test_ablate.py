import json
import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import no_file_larger_than
from walk_example import CONFIG, model, saved

from minitf import initialize, mixers, walk
from minitf.analysis.ablate import job
from minitf.analysis.ablate.page import conclusions
from minitf.analysis.association import REPLACEMENTS, quality
from minitf.analysis.run_folder import Problem
from minitf.edits import set_to
from minitf.pretrained import Pretrained, load, save

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablate")
    tokens = np.random.default_rng(0).integers(CONFIG.vocabulary, size=400)
    (folder / "tokens.txt").write_text(" ".join(map(str, tokens)))
    return {"model": str(saved(folder / "gpt2")), "text": folder / "tokens.txt"}


def configured(given, **changes):
    return job.AblateConfig(**{**given, "ids": True, "length": 8, "windows": 3, "data": 5} | changes)


@pytest.fixture(scope="module")
def done(given, tmp_path_factory):
    out, said = tmp_path_factory.mktemp("out") / "run", []
    report = job.run(configured(given), out, say=said.append)
    return {"report": report, "found": json.loads((out / "ablate.json").read_text()), "said": said, "out": out}


def test_every_replacement_is_measured_for_each_head_and_for_shares_of_all(done):
    found = done["found"]
    assert list(found["replacements"]) == list(REPLACEMENTS)
    for measured in found["replacements"].values():
        assert np.shape(measured["heads"]["loss"]) == (CONFIG.layers, CONFIG.heads)
        for order in measured["orders"].values():
            np.testing.assert_allclose(order["loss"][0], found["intact"]["loss"], rtol=1e-5)
            assert len(order["divergence"]) == len(found["fractions"])
    assert done["said"][-1] == f"{len(REPLACEMENTS)} of {len(REPLACEMENTS)}: {list(REPLACEMENTS)[-1]}"


def test_the_numbers_are_those_of_edited_walks(given, done):
    config = configured(given)
    loaded = load(given["model"])
    tokens, _ = job.windows(job.tokens_of(config, loaded), config)
    intact = walk(loaded.parameters, tokens, CONFIG)
    found = done["found"]
    np.testing.assert_allclose(
        found["intact"]["loss"], quality(intact.logits, tokens, intact.logits).loss, rtol=1e-5
    )
    edit = set_to(intact, "layers.pattern", jnp.eye(8))
    expected = quality(walk(loaded.parameters, tokens, CONFIG, edit=edit).logits, tokens, intact.logits)
    for order in found["replacements"]["identity"]["orders"].values():
        np.testing.assert_allclose(order["loss"][-1], expected.loss, rtol=1e-5)
        np.testing.assert_allclose(order["divergence"][-1], expected.divergence, rtol=1e-5)


def test_a_run_goes_on_with_the_replacements_that_are_not_there_yet(given, done, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(done["out"], out)
    kept = sorted((out / "arrays").iterdir())
    assert len(kept) == len(REPLACEMENTS)
    kept[0].unlink()
    kept[1].write_text("{")
    changed = json.loads(kept[2].read_text())
    changed["heads"]["loss"][0][0] = 17.0  # to be found again, since it is not made anew
    kept[2].write_text(json.dumps(changed))
    found = r"could not be written to .*File too large.*with --resume goes on"
    with no_file_larger_than(100_000), pytest.raises(Problem, match=found):
        job.run(configured(given), out, resume=True)
    job.run(configured(given), out, resume=True)
    found = json.loads((out / "ablate.json").read_text())["replacements"]
    name = next(name for name in REPLACEMENTS if name.replace(" ", "_") == kept[2].stem)
    assert found[name]["heads"]["loss"][0][0] == 17.0
    for other in REPLACEMENTS.keys() - {name}:
        assert found[other] == done["found"]["replacements"][other]


def test_a_run_with_another_text_is_not_gone_on_with(given, done, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(done["out"], out)
    with pytest.raises(Problem, match="other settings"):
        job.run(configured(given, windows=4), out, resume=True)


def test_windows_for_means_are_others_than_those_measured(given):
    config = configured(given, windows=20, data=30)
    measured, data = job.windows(np.arange(400, dtype=np.int32), config)
    assert measured.shape == (20, 8) and data.shape == (30, 8)
    assert len({int(w[0]) for w in [*measured, *data]}) == 50


def test_the_page_says_what_the_numbers_say(done):
    page = done["report"].read_text()
    sentences = conclusions(done["found"])
    assert all(sentence.split(",")[0].replace("'", "&#39;") in page for sentence in sentences)
    intact = done["found"]["intact"]["loss"]
    assert sentences[0] == f"As it is, the model loses {intact:.3f} nats a token."
    last = done["found"]["replacements"]["uniform"]["orders"]["least important first"]["loss"][-1]
    assert f"By a uniform average {last - intact:+.3f}" in sentences[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0, "windows": 60}, "60 + 5 windows of 16 tokens need a text of"),
        ({"length": 17}, "length is 17; this model reads at most 16 tokens"),
        ({"windows": 60}, "60 + 5 windows of 8 tokens need a text of 520"),
        ({"ids": False}, "give a file of token ids, and --ids"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input_is_told_in_a_sentence_and_leaves_nothing(given, tmp_path, changes, message):
    with pytest.raises(Problem) as caught:
        job.run(configured(given, **changes), tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"), [("1 2 x", "is to hold token ids"), ("1 99", "there is no token 99")]
)
def test_a_file_that_holds_no_tokens_of_the_model_is_told(given, tmp_path, text, message):
    (tmp_path / "odd.txt").write_text(text)
    with pytest.raises(Problem, match=message):
        job.run(configured(given, text=tmp_path / "odd.txt"), tmp_path / "run")


def test_models_whose_layers_differ_are_ablated_as_far_as_they_associate(given, tmp_path):
    config = replace(CONFIG, mixer=(mixers.MinimalGru(), mixers.Softmax()))
    assert config.layers == 2
    save(tmp_path / "model", Pretrained("minitf", config, jax.jit(partial(initialize, config))(KEY), None))
    report = job.run(configured(given, model=str(tmp_path / "model")), tmp_path / "run")
    found = json.loads((tmp_path / "run" / "ablate.json").read_text())
    heads = found["replacements"]["uniform"]["heads"]["loss"]
    assert found["heads"] == len(heads[0]) == len(heads[1]) == config.width
    assert None not in heads[0] and heads[1][config.heads :] == [None] * (config.width - config.heads)
    assert set(REPLACEMENTS) - set(found["replacements"]) == {"positions only", "contents only"}
    assert "Places explain" not in report.read_text()


def test_a_model_without_associations_is_refused(given, tmp_path):
    config = replace(CONFIG, causal=False, mixer=mixers.TokenNetwork())
    save(tmp_path / "model", Pretrained("minitf", config, jax.jit(partial(initialize, config))(KEY), None))
    with pytest.raises(Problem, match="no layer of this model mixes by an association"):
        job.run(configured(given, model=str(tmp_path / "model")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_number_of_windows_that_cannot_be_is_told(given):
    with pytest.raises(ValueError, match="^windows is 0; it must be at least 1$"):
        configured(given, windows=0)


def test_text_is_read_by_the_models_tokenizer_line_by_line(given, tmp_path):
    class ByCharacter:
        def encode(self, text):
            return [ord(c) % CONFIG.vocabulary for c in text]

    (tmp_path / "text.txt").write_text("ab\ncd\n")
    found = job.tokens_of(configured(given, ids=False, text=tmp_path / "text.txt"), model(ByCharacter()))
    assert found.tolist() == [ord(c) % CONFIG.vocabulary for c in "ab\ncd\n"]
