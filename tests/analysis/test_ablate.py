import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import no_file_larger_than
from walk_example import CONFIG, model, saved

from minitf import initialize, mixers, walk
from minitf.analysis import association, prediction_quality
from minitf.analysis.ablate import job
from minitf.analysis.ablate.page import conclusions
from minitf.analysis.association import REPLACEMENTS
from minitf.analysis.prediction_quality import next_tokens, quality
from minitf.analysis.run_folder import Problem
from minitf.edits import set_to
from minitf.pretrained import Pretrained, load, save
from minitf.vocabulary import Characters, Labelled, Measured, Tokenizer

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


def test_margins_are_of_the_growth_over_windows(done):
    found = done["found"]
    for measured in found["replacements"].values():
        for name, of_heads in measured["heads"]["margins"].items():
            assert np.shape(of_heads) == (CONFIG.layers, CONFIG.heads)
            for order in measured["orders"].values():
                # With nothing replaced, no window loses more or less than another.
                assert order["margins"][name][0] == pytest.approx(0, abs=1e-4)
                assert (order["margins"][name][-1] > 0) >= (order[name][-1] != order[name][0])
    uniform = found["replacements"]["uniform"]["orders"]["least important first"]
    assert f"\u00b1 {uniform['margins']['loss'][-1]:.3f}" in conclusions(found)[2]


def test_what_was_published_stands_beside_what_was_measured(done):
    claims = json.loads((done["out"] / "claims.json").read_text())
    assert [one["id"] for one in claims] == ["ablate.constant", "ablate.half_constant"]
    constant = done["found"]["replacements"]["mean over data"]["orders"]["least important first"]
    growth = constant["loss"][-1] - done["found"]["intact"]["loss"]
    assert claims[0]["value"] == pytest.approx(np.expm1(growth)) and claims[0]["n"] == 3
    assert np.log1p(claims[0]["ci95"][1]) == pytest.approx(growth + constant["margins"]["loss"][-1])
    page = done["report"].read_text()
    assert all(one["statement"].replace("'", "&#39;") in page for one in claims)


def test_of_one_window_no_margin_is_known(given, tmp_path):
    page = job.run(configured(given, windows=1), tmp_path / "run").read_text()
    found = json.loads((tmp_path / "run" / "ablate.json").read_text())
    assert found["intact"]["margins"]["loss"] is None and "\u00b1" not in conclusions(found)[1] and page


def test_the_numbers_are_those_of_edited_walks(given, done):
    config = configured(given)
    loaded = load(given["model"])
    tokens, _ = job.windows(job.tokens_of(config, loaded), config)
    intact = walk(loaded.parameters, tokens, CONFIG)
    found = done["found"]
    np.testing.assert_allclose(
        found["intact"]["loss"], quality(intact.logits, next_tokens(tokens), intact.logits).loss, rtol=1e-5
    )
    edit = set_to(intact, "layers.pattern", jnp.eye(8))
    expected = quality(
        walk(loaded.parameters, tokens, CONFIG, edit=edit).logits, next_tokens(tokens), intact.logits
    )
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
        ({"text": Path("nowhere.txt")}, "The text nowhere.txt cannot be read: No such file or directory."),
        ({"text": Path()}, "The text . cannot be read: Is a directory."),
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
    ("text", "message"),
    [
        ("1 2 x", "is to hold token ids, and 'x' is none: for text leave out --ids"),
        ("1 99", "there is no token 99"),
    ],
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
    assert "that places explain, alone" not in report.read_text()


def test_a_model_without_associations_is_refused(given, tmp_path):
    config = replace(CONFIG, causal=False, mixer=mixers.TokenNetwork())
    save(tmp_path / "model", Pretrained("minitf", config, jax.jit(partial(initialize, config))(KEY), None))
    with pytest.raises(Problem, match="no layer of this model mixes by an association"):
        job.run(configured(given, model=str(tmp_path / "model")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_numbers_that_cannot_be_are_told(given):
    with pytest.raises(ValueError, match="^windows is 0; it must be at least 1$"):
        configured(given, windows=0)
    with pytest.raises(ValueError, match="^seed is 2147483648; it must be below 2\\^31$"):
        configured(given, seed=2**31)


def test_what_is_no_text_is_told(given, tmp_path):
    (tmp_path / "odd.txt").write_bytes(b"ab\xd1")
    with pytest.raises(Problem, match=r"odd.txt is not UTF-8 \(unexpected end of data at byte 2\)"):
        job.run(configured(given, ids=False, text=tmp_path / "odd.txt"), tmp_path / "run")


class Beginning:
    """A tokenizer that puts a token of its own before every text."""

    def encode(self, text):
        return [1, *(ord(c) % CONFIG.vocabulary for c in text)]


def test_a_text_begins_once(given, tmp_path):
    text = "ab\ncd\n" * 50
    (tmp_path / "text.txt").write_text(text)
    found = job.tokens_of(configured(given, ids=False, text=tmp_path / "text.txt"), model(Beginning()))
    assert found.tolist() == [1, *(ord(c) % CONFIG.vocabulary for c in text)]


def test_a_long_text_is_read_as_far_as_is_needed(given, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "CHARACTERS_A_TOKEN", 1)
    monkeypatch.setattr(job, "LEAST_CHARACTERS", 8)
    (tmp_path / "text.txt").write_text("abc\n" * 5000)
    found = job.tokens_of(configured(given, ids=False, text=tmp_path / "text.txt"), model(Beginning()))
    assert 4 * 64 <= len(found) <= 5 * 65


def test_orders_are_by_what_heads_cost_on_other_windows(given):
    config = configured(given)
    loaded = load(given["model"])
    cuts = job.windows(job.tokens_of(config, loaded), config)
    measured, data = (job.asked(cut, loaded, 0) for cut in cuts)
    found = job.measure(loaded, measured, data, 0)["replacements"]["uniform"]
    swapped = job.measure(loaded, job.asked(cuts[1][:3], loaded, 0), data, 0)["replacements"]["uniform"]
    few = np.argsort(np.array(swapped["heads"]["loss"]).reshape(-1))
    masks = association.every_share({"expected": few}, (CONFIG.layers, CONFIG.heads))
    intact = association.kept(walk(loaded.parameters, cuts[0], CONFIG))
    of_data = association.kept(walk(loaded.parameters, cuts[1], CONFIG))
    pattern = REPLACEMENTS["uniform"](intact, of_data, CONFIG, KEY)
    metric = prediction_quality.metric(measured.targets, intact.logits)
    expected = association.with_heads_replaced(loaded.parameters, cuts[0], pattern, masks, metric, CONFIG)
    np.testing.assert_allclose(found["orders"]["least important first"]["loss"], expected[:, 0], rtol=1e-4)


def test_a_model_that_sees_both_ways_is_asked_what_stood_under_the_mask(given, tmp_path):
    vocabulary = Characters("abcdefghij")
    config = replace(CONFIG, vocabulary=vocabulary.size + 1, causal=False)
    both_ways = Pretrained("minitf", config, jax.jit(partial(initialize, config))(KEY), Tokenizer(vocabulary))
    tokens = jnp.asarray(np.random.default_rng(0).integers(10, size=(40, 8)))
    found = job.asked(tokens, both_ways, 0)
    chosen = np.asarray(found.tokens) == vocabulary.size
    assert 0.1 < chosen.mean() < 0.35 and chosen.any(axis=1).all()
    np.testing.assert_array_equal(np.where(chosen, found.targets, found.tokens), tokens)
    assert np.all(np.asarray(found.targets)[~chosen] == -1)
    unknown = replace(both_ways, tokenizer=None)
    with pytest.raises(Problem, match="no tokenizer that says which token is the mask: say --mask TOKEN"):
        job.asked(tokens, unknown, 0)
    np.testing.assert_array_equal(job.asked(tokens, unknown, 0, mask=vocabulary.size).tokens, found.tokens)
    with pytest.raises(ValueError, match="there is no token 11"):
        job.asked(tokens, unknown, 0, mask=11)
    with pytest.raises(Problem, match="mask is 3; this model predicts next tokens"):
        job.asked(tokens, replace(unknown, config=replace(config, causal=True)), 0, mask=3)
    save(tmp_path / "model", both_ways)
    (tmp_path / "text.txt").write_text("abcdefghij" * 40)
    asked_of = configured(given, ids=False, text=tmp_path / "text.txt", model=str(tmp_path / "model"))
    page = job.run(asked_of, tmp_path / "run").read_text()
    assert "nats a token, asked for masked tokens." in page and "Asked for is masked tokens." in page


def test_a_kept_row_with_nothing_in_it_is_made_anew(given, done, tmp_path):
    shutil.copytree(done["out"], tmp_path / "run")
    (tmp_path / "run" / "arrays" / "identity.json").write_text('{"heads": {}, "orders": {}}')
    job.run(configured(given), tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run" / "ablate.json").read_text()) == done["found"]


@pytest.mark.parametrize(
    ("vocabulary", "what"),
    [
        (Labelled(Characters("abc"), ("no", "yes")), "its label"),
        (Measured(Characters("abc"), "speed", 2.0, 1.0), "'speed'"),
    ],
)
def test_a_model_of_whole_sequences_is_not_asked_for_tokens(given, tmp_path, vocabulary, what):
    config = replace(CONFIG, vocabulary=vocabulary.size)
    weights = jax.jit(partial(initialize, config))(KEY)
    save(tmp_path / "model", Pretrained("minitf", config, weights, Tokenizer(vocabulary)))
    with pytest.raises(Problem, match=f"trained to tell of a whole sequence .*{what}, and not tokens"):
        job.run(configured(given, model=str(tmp_path / "model")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nobody_says_half_of_the_heads_where_all_or_more_were_replaced(done):
    found = done["found"]
    said = lambda share: conclusions({**found, "fractions": [0, share / 2, share, share, 1]})[1]
    assert "nats; half of the heads, the least important first: " in said(0.5)
    assert "nats; 67% of the heads, the least important first: " in said(2 / 3)
    assert said(1.0).endswith(" nats.") and "least" not in said(1.0)


def test_shares_are_those_that_were_replaced():
    assert [association.replaced(share, 1) for share in association.FRACTIONS] == [0, 0, 1, 1, 1]
    assert [association.replaced(share, 2) for share in association.FRACTIONS] == [0, 1, 1, 2, 2]
    assert [association.replaced(share, 8) for share in association.FRACTIONS] == [0, 2, 4, 6, 8]
