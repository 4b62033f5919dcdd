"""A real pretrained model: llama2.c's stories260K (Karpathy 2023), in its own file format."""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minitf import count, pretrained, walk
from minitf.families.llama2c import as_llama
from minitf.parameters import named

SHARED = Path(os.environ.get("MINITF_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared"))
FOLDER = SHARED / "data" / "stories260K"
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(),
    reason=f"the model stories260K is not in {FOLDER}; set MINITF_SHARED to the folder above data",
)
BEGIN = 1
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do."
)


@functools.cache
def model():
    return pretrained.load(FOLDER / "stories260K.bin")


@functools.cache
def greedy_tokens(steps):
    config, parameters = model().config, model().parameters

    @jax.jit
    def next_token(tokens, last):
        # Padding lies after the last token, where a causal model does not look.
        return jnp.argmax(walk(parameters, tokens, config).logits[0, last])

    tokens = np.zeros((1, steps + 1), np.int32)
    tokens[0, 0] = BEGIN
    for last in range(steps):
        tokens[0, last + 1] = next_token(tokens, last)
    return tokens[0]


def test_the_parameters_are_those_of_the_file():
    config, parameters = model().config, model().parameters
    assert sum(x.size for x in jax.tree.leaves(parameters)) == count(config)
    assert 255_000 < count(config) < 265_000
    assert (config.width, config.hidden, config.layers, config.heads) == (64, 172, 5, 8)
    assert (config.groups, config.vocabulary, config.length, config.tied) == (4, 512, 512, True)


def test_the_numbers_are_those_of_the_file_in_its_order():
    numbers = np.fromfile(FOLDER / "stories260K.bin", "<f4", offset=28)
    weights = named(model().parameters)
    np.testing.assert_array_equal(weights["embedding"].ravel(), numbers[: 512 * 64])
    np.testing.assert_array_equal(weights["layers.attention_norm.gain"].ravel(), numbers[512 * 64 :][: 5 * 64])
    queries = numbers[(512 + 5) * 64 :][: 5 * 64 * 64].reshape(5, 64, 64)
    np.testing.assert_array_equal(weights["layers.attention.query"].reshape(5, 64, 64), queries.swapaxes(1, 2))


def test_greedy_decoding_tells_the_documented_story():
    assert model().tokenizer.n_vocab == 512
    assert model().tokenizer.decode(greedy_tokens(120)).strip().startswith(STORY)


def test_the_tokenizer_cuts_the_story_as_the_model_wrote_it():
    tokenizer, told = model().tokenizer, greedy_tokens(120)
    tokens = tokenizer.encode(STORY)
    assert tokens == told[: len(tokens)].tolist()
    assert tokenizer.decode(tokens) == STORY


@pytest.mark.parametrize("text", ["", " ", "a", "  two  spaces ", "é 漢 🙂", "<0x0A>\n\t", "\n<s>\n</s>", STORY])
def test_every_text_comes_back_from_its_tokens(text):
    tokenizer = model().tokenizer
    tokens = tokenizer.encode(text)
    assert tokens[0] == BEGIN and BEGIN not in tokens[1:]
    assert tokenizer.decode(tokens) == text


def test_a_token_that_does_not_exist_and_a_text_without_bytes_are_refused():
    with pytest.raises(ValueError, match="^there is no token 512; the ids go from 0 to 511$"):
        model().tokenizer.decode([1, 512])
    with pytest.raises(ValueError, match="^the text holds a lone surrogate at position 1$"):
        model().tokenizer.encode("a\ud800")


def saved_as_llama(folder):
    config, parameters = as_llama(model().config, model().parameters)
    pretrained.save(folder, pretrained.Pretrained("llama", config, parameters))


def test_as_a_llama_it_is_saved_and_has_the_same_logits(tmp_path):
    saved_as_llama(tmp_path)
    again = pretrained.load(tmp_path)
    assert again.family == "llama" and not again.config.rotary_interleaved
    tokens = jnp.asarray(greedy_tokens(120)[None])
    one, other = (walk(m.parameters, tokens, m.config).logits for m in (model(), again))
    # Sums over a head's components are taken in another order: rounding alone, on logits of some tens.
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
    assert not np.array_equal(model().parameters.layers.attention.query, again.parameters.layers.attention.query)


@pytest.mark.filterwarnings("ignore")
def test_transformers_agrees_on_the_real_model(tmp_path):
    torch = pytest.importorskip("torch", reason="the peers are not installed: pip install 'minitf[peers]'")
    transformers = pytest.importorskip("transformers", reason="the peers are not installed")
    saved_as_llama(tmp_path)
    peer = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    tokens = greedy_tokens(120)[None]
    with torch.no_grad():
        theirs = peer(input_ids=torch.tensor(tokens).long()).logits.numpy()
    ours = walk(model().parameters, jnp.asarray(tokens), model().config).logits
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
