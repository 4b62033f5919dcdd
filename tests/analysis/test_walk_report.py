import html.parser
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import no_file_larger_than
from walk_example import CONFIG, EVIL, EvilTokenizer, model, saved

from minitf import initialize, mixers, walk
from minitf.analysis.run_folder import Problem
from minitf.analysis.walk_report import job, page
from minitf.analysis.walk_report.data import Labels, both_sides, walk_data
from minitf.analysis.walk_report.job import WalkConfig, edit_of
from minitf.analysis.walk_report.show import show
from minitf.changes import compose
from minitf.decode import generate
from minitf.edits import ablate, steer
from minitf.pretrained import Pretrained, load, save

TOKENS = np.array([3, 1, 4, 1, 5], np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model") / "gpt2")


@pytest.fixture(scope="module")
def data():
    return walk_data(model().parameters, TOKENS, CONFIG, Labels(None))


def test_the_last_station_says_what_the_model_says(data):
    logits = walk(model().parameters, jnp.asarray(TOKENS)[None], CONFIG).logits[0]
    probability = np.asarray(jnp.exp(logits - jnp.log(jnp.sum(jnp.exp(logits), -1, keepdims=True))))
    for t in range(len(TOKENS)):
        best = data["tops"][t][-1]
        order = np.argsort(-probability[t])[: len(best)]
        assert [b["label"] for b in best] == [str(token) for token in order]
        np.testing.assert_allclose([b["p"] for b in best], probability[t][order], rtol=1e-4)


def test_the_rank_is_of_the_token_that_comes_next(data):
    logits = np.asarray(walk(model().parameters, jnp.asarray(TOKENS)[None], CONFIG).logits[0])
    for t, following in enumerate(TOKENS[1:]):
        assert data["rank"][t][-1] == np.sum(logits[t] > logits[t, following])
    assert data["rank"][-1][-1] == 0 and data["next"] == [*map(str, TOKENS[1:]), str(logits[-1].argmax())]


def test_the_parts_sum_to_the_logit_of_the_prediction(data):
    logits = np.asarray(walk(model().parameters, jnp.asarray(TOKENS)[None], CONFIG).logits[0])
    for t in range(len(TOKENS)):
        total = (
            data["start"][t]
            + data["attention_parts"][t].sum()
            + data["feed_forward_parts"][t].sum()
            + data["bias"][t]
        )
        assert total == pytest.approx(logits[t].max(), rel=1e-4)


def test_what_an_edit_pushed_in_is_a_part_of_its_own(data):
    like = jax.eval_shape(lambda: walk(model().parameters, jnp.asarray(TOKENS)[None], CONFIG))
    push = steer(like, jax.random.normal(jax.random.key(3), (CONFIG.width,)), layer=0, coefficient=2.0)
    edit = compose(push, ablate(like, "layers.z", layer=1, head=0))
    both = both_sides(model(), TOKENS, edit)
    asked, edited = both["before"]["predicted_ids"], both["after"]
    logits = walk(model().parameters, jnp.asarray(TOKENS)[None], CONFIG, edit=edit).logits[0]
    parts = edited["start"] + edited["edit_parts"] + edited["bias"]
    parts = parts + edited["attention_parts"].sum(axis=1) + edited["feed_forward_parts"].sum(axis=1)
    np.testing.assert_allclose(parts, np.asarray(logits)[np.arange(len(TOKENS)), asked], rtol=1e-4, atol=1e-4)
    assert np.abs(edited["edit_parts"]).max() > 0.01
    taken = both_sides(model(), TOKENS, ablate(like, "layers.z", layer=1, head=0))["after"]["edit_parts"]
    np.testing.assert_allclose(taken, 0, atol=1e-4)
    assert "edit_parts" not in data


def test_the_pattern_is_the_walks(data):
    pattern = walk(model().parameters, jnp.asarray(TOKENS)[None], CONFIG).layers.pattern[:, 0]
    np.testing.assert_allclose(np.stack(data["pattern"]), pattern, atol=5.1e-4)


def test_an_edited_side_is_asked_about_the_same_token(folder, tmp_path):
    config = WalkConfig(str(folder), "3 1 4 1 5", ids=True, ablate=("0.1", "1.2"))
    job.run(config, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "walk.json").read_text())
    assert written["before"]["predicted"] == written["after"]["predicted"]
    assert not np.any(np.array(written["after"]["heads"])[:, 0, 1]) and not np.any(
        np.array(written["after"]["heads"])[:, 1, 2]
    )
    assert np.any(np.array(written["before"]["heads"])[:, 0, 1])
    assert written["tokens"] == ["3", "1", "4", "1", "5"]


def test_a_page_that_has_no_room_is_told(folder, tmp_path):
    found = r"could not be written to .*File too large.*run the same command again"
    with no_file_larger_than(100_000), pytest.raises(Problem, match=found):
        job.run(WalkConfig(str(folder), "3 1 4", ids=True), tmp_path / "out")
    assert not (tmp_path / "out" / "report.html").exists()


def test_generated_tokens_are_said_as_they_come_and_walked(folder, tmp_path):
    said = []
    job.run(WalkConfig(str(folder), "3,1", ids=True, generate=4), tmp_path / "out", say=said.append)
    expected = generate(model().parameters, [[3, 1]], CONFIG, steps=4).tokens[0].tolist()
    assert "".join(said).split() == ["3", "1", *map(str, expected)] and len(said) == 5
    written = json.loads((tmp_path / "out" / "walk.json").read_text())
    assert written["prompt"] == 2 and len(written["tokens"]) == 6


def test_a_model_with_a_tokenizer_of_its_own_is_given_text_and_labelled_in_text(tmp_path):
    pytest.importorskip("tokenizers", reason="not installed: pip install 'minitf[hub]'")
    from properties.checkpoints import saved as model_of_family
    from properties.tokenizer_files import KINDS

    folder = model_of_family(tmp_path / "model", "llama", vocabulary=400, layers=1)
    KINDS["llama2"].save(str(folder / "tokenizer.json"))
    found = load(folder)
    tokens = job._tokens(WalkConfig(str(folder), "The cat"), found)
    labels = Labels(found.tokenizer)
    assert [labels(int(token)) for token in tokens] == ["<s>", "␣The", "␣cat"]
    assert labels(399) == "⟨399⟩"


def test_steering_further_than_a_number_goes_is_told():
    for far in ("1e39", "-1e30", "1e200"):
        with pytest.raises(ValueError, match="the stream would be moved by .*; it must be at most 1e\\+18"):
            edit_of(WalkConfig("m", "abc", steer=f"1:{far}:abcd:ab"), model(EvilTokenizer()))


def test_steering_moves_from_one_text_towards_the_other():
    steered = model(EvilTokenizer())
    edit = edit_of(WalkConfig("m", "abc", steer="1:2.0:abcd:ab"), steered)
    ends = [walk(steered.parameters, jnp.arange(n)[None], CONFIG).layers.resid_post[1, 0, -1] for n in (4, 2)]
    moved = walk(steered.parameters, jnp.arange(3)[None], CONFIG, edit=edit).end
    plain = walk(steered.parameters, jnp.arange(3)[None], CONFIG).end
    np.testing.assert_allclose(moved - plain, np.broadcast_to(2 * (ends[0] - ends[1]), plain.shape), atol=1e-3)


def test_text_from_tokens_stays_text():
    evil = model(EvilTokenizer())
    data = both_sides(evil, np.arange(6, dtype=np.int32))
    text = page.page(data, evil, "<i>model</i>", [EVIL[1]], [("text", EVIL[0])])

    found = []
    reader = html.parser.HTMLParser()
    reader.handle_starttag = lambda tag, attrs: found.append(tag)
    reader.feed(text)
    assert found.count("script") == 3 and "i" not in found and "&lt;i&gt;model" in text
    assert (
        Labels(evil.tokenizer)(0) in json.loads(text.split('id="report-data">')[1].split("</script>")[0])["tokens"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no/where"}, "there is no file or folder 'no/where'"),
        (
            {"ids": False},
            "minitf has no tokenizer for this model; give token ids with --ids (a tokenizer.json beside the model "
            "is read where the package tokenizers is installed: pip install tokenizers)",
        ),
        ({"text": "3 x"}, "'x' is no token id; with --ids the text is whole numbers"),
        ({"text": " "}, "the text is empty"),
        ({"text": "3 20"}, "there is no token 20; the model's are 0 to 19"),
        ({"text": "1 " * 17}, "a text of 17 tokens is longer than the model's 16 positions"),
        ({"generate": 12}, "5 tokens of text and 12 to generate are more than the 16"),
        ({"ablate": ("1",)}, "--ablate 1: name a head as LAYER.HEAD, such as 0.3"),
        ({"ablate": ("0.7",)}, "head=7 is outside 'layers.z', which has 3 on that axis"),
        ({"steer": "1:x:a:b"}, "--steer 1:x:a:b: say LAYER:COEFFICIENT:TEXT:TEXT"),
        ({"steer": "1:nan:a:b"}, "the coefficient is nan; it must be finite"),
        ({"steer": "1:2:a:b"}, "minitf has no tokenizer for this model"),
    ],
)
def test_bad_input_is_told_in_a_sentence_and_leaves_nothing(folder, tmp_path, changes, message):
    config = WalkConfig(**{"model": str(folder), "text": "3 1 4 1 5", "ids": True, **changes})
    with pytest.raises(Problem) as told:
        job.run(config, tmp_path / "out")
    assert message in str(told.value)
    assert not (tmp_path / "out").exists()


def test_a_model_that_sees_later_tokens_walks_and_is_asked_for_none(tmp_path):
    both_ways = replace(CONFIG, causal=False)
    native = Pretrained("minitf", both_ways, model().parameters, None)
    save(tmp_path / "model", native)
    config = WalkConfig(str(tmp_path / "model"), "3 1", ids=True, generate=2)
    said = []
    with pytest.raises(Problem, match="it is not causal.*so it cannot generate"):
        job.run(config, tmp_path / "out", say=said.append)
    assert not said and not (tmp_path / "out").exists()


def test_a_notebook_shows_the_page_and_nothing_of_it_leaves_its_frame(tmp_path):
    evil = model(EvilTokenizer())
    like = jax.eval_shape(lambda: walk(evil.parameters, jnp.zeros((1, 1), jnp.int32), CONFIG))
    shown = show(evil, "six ..", ablate(like, "layers.z", layer=0, head=1), name="<i>model</i>")
    tags = []
    reader = html.parser.HTMLParser()
    reader.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    reader.feed(shown._repr_html_())
    assert [tag for tag, _ in tags] == ["iframe"]
    assert tags[0][1]["srcdoc"] == shown.html
    assert "as the edit says" in shown.html and "&lt;i&gt;model" in shown.html
    shown.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == shown.html
    assert len(repr(shown)) < 80


@pytest.mark.parametrize(
    "mixer", [mixers.Retention(), mixers.TokenNetwork(), (mixers.Mamba(states=2), mixers.Softmax())], ids=str
)
def test_layers_that_mix_otherwise_are_shown_too(mixer):
    config = replace(CONFIG, layers=2, mixer=mixer, causal=not isinstance(mixer, mixers.TokenNetwork))
    parameters = initialize(config, jax.random.key(0))
    found = walk_data(parameters, TOKENS, config, Labels(None))
    walked = walk(parameters, jnp.asarray(TOKENS)[None], config)
    if isinstance(mixer, mixers.TokenNetwork):
        assert "pattern" not in found
    else:
        first = walked.layers.pattern[0][0]
        np.testing.assert_allclose(found["pattern"][0], first, atol=6e-4)
        if isinstance(mixer, tuple):
            np.testing.assert_allclose(found["pattern"][1], walked.layers.pattern[1][0], atol=6e-4)
            # No head is made up for the layer that has fewer.
            assert len(found["pattern"][1]) == CONFIG.heads < len(found["pattern"][0])
            assert np.isnan(found["heads"][:, 1, CONFIG.heads :]).all()
            assert np.isfinite(found["heads"][:, 1, : CONFIG.heads]).all()
    # What the heads of a layer add to the logit is what the layer adds.
    np.testing.assert_allclose(np.nansum(found["heads"], axis=-1), found["attention_parts"], atol=1e-5)
    assert "<html" in show(Pretrained("any", config, parameters), TOKENS.tolist()).html


def test_what_cannot_be_shown_is_told():
    with pytest.raises(ValueError, match="^minitf has no tokenizer for this model; give token ids$"):
        show(model(), "text")
    with pytest.raises(ValueError, match="^there is no token 20; the model's are 0 to 19$"):
        show(model(), [3, 20])
    with pytest.raises(ValueError, match="^17 tokens: the model reads from 1 to 16$"):
        show(model(), [1] * 17)
    with pytest.raises(ValueError, match="^0 tokens: the model reads from 1 to 16$"):
        show(model(), [])
