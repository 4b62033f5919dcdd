"""Checkpoints that transformers wrote, loaded here; and checkpoints from here, loaded by transformers."""

import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the peers are not installed: pip install 'minitf[peers]'")
transformers = pytest.importorskip(
    "transformers", reason="the peers are not installed: pip install 'minitf[peers]'"
)

from minitf import pretrained, walk  # noqa: E402
from minitf.families.mapping import places, read  # noqa: E402
from minitf.families.weights import open_folder  # noqa: E402
from minitf.parameters import named  # noqa: E402

QUICK = {"xla_backend_optimization_level": "0"}
VOCABULARY, LENGTH, BATCH, LONGEST = 40, 24, 2, 24
# float32 through two or three layers of some tens of numbers: rounding stays far below what parity asks for.
NEAR = 1e-4

pytestmark = pytest.mark.filterwarnings("ignore")


def sizes(pick, heads, width):
    return {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": pick(1, 2, 3),
        "hidden_size": width,
        "intermediate_size": pick(24, 40),
        "num_attention_heads": heads,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": pick(False, True),
    }


def gpt2(pick):
    return transformers.GPT2LMHeadModel, transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_layer=pick(1, 2, 3),
        n_head=pick(1, 2, 4),
        n_embd=16,
        n_inner=pick(None, 24),
        n_positions=LENGTH,
        activation_function=pick("gelu_new", "gelu", "relu"),
        layer_norm_epsilon=pick(1e-5, 1e-3),
        tie_word_embeddings=pick(True, False),
    )


def gpt_neox(pick):
    heads = pick(1, 2)
    rotary = {"rope_type": "default", "rope_theta": pick(1e4, 5e3), "partial_rotary_factor": pick(0.25, 0.5, 1.0)}
    return transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(
        **sizes(pick, heads, 16),
        use_parallel_residual=pick(True, False),
        hidden_act=pick("gelu", "gelu_new", "relu"),
        rope_parameters=rotary,
    )


def llama_like(pick, **options):
    heads = pick(2, 4)
    return sizes(pick, heads, 16) | {
        "num_key_value_heads": pick(1, 2, heads),
        "rms_norm_eps": pick(1e-6, 1e-3),
        "rope_parameters": {"rope_type": "default", "rope_theta": pick(1e4, 1e6)},
        **options,
    }


def llama(pick):
    biases = pick(False, True)
    options = llama_like(pick, attention_bias=biases, mlp_bias=biases, head_dim=pick(None, 8))
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(**options)


def mistral(pick):
    options = llama_like(pick, sliding_window=pick(None, 4096, LENGTH), head_dim=pick(None, 6))
    return transformers.MistralForCausalLM, transformers.MistralConfig(**options)


def qwen2(pick):
    return transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**llama_like(pick))


def qwen3(pick):
    return transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**llama_like(pick, head_dim=pick(4, 8)))


def bloom(pick):
    return transformers.BloomForCausalLM, transformers.BloomConfig(
        vocab_size=VOCABULARY, n_layer=pick(1, 2, 3), n_head=pick(1, 2, 3, 4), hidden_size=24
    )


def bert(pick):
    options = sizes(pick, pick(1, 2, 4), 16) | {"tie_word_embeddings": True}
    return transformers.BertForMaskedLM, transformers.BertConfig(
        **options, hidden_act=pick("gelu", "relu", "gelu_new"), type_vocab_size=pick(1, 2)
    )


FAMILIES = {f.__name__: f for f in (gpt2, gpt_neox, llama, mistral, qwen2, qwen3, bloom, bert)}


def build(family, seed):
    """A transformers model of this family with a random small configuration and weights of ordinary size."""
    generator = random.Random(f"{family} {seed}")
    model_class, config = FAMILIES[family](lambda *options: generator.choice(options))
    config.bos_token_id = config.eos_token_id = 0
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    numbers = np.random.default_rng(generator.randrange(2**32))
    for parameter in model.parameters():
        noise = numbers.normal(size=parameter.shape)
        plain = 0.2 * noise + 1.0 if parameter.ndim == 1 else noise / np.sqrt(parameter.shape[-1])
        parameter.data = torch.tensor(plain, dtype=torch.float32)
    return model


def tokens_and_padding(seed, length=LONGEST):
    tokens = np.random.default_rng(seed).integers(VOCABULARY, size=(BATCH, length)).astype(np.int32)
    return tokens, np.arange(length)[None] < np.array([length, length - 5])[:, None]


def run_peer(model, tokens, valid):
    with torch.no_grad():
        options = {"output_hidden_states": True, "output_attentions": True}
        mask = torch.tensor(valid).long()
        return model(input_ids=torch.tensor(tokens).long(), attention_mask=mask, **options)


def run_ours(model, tokens, valid):
    run = jax.jit(lambda p, t, v: walk(p, t, model.config, valid=v), compiler_options=QUICK)
    return jax.device_get(run(model.parameters, tokens, valid))


def near(found, expected, what=""):
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), rtol=0, atol=NEAR, err_msg=what)


CASES = [(family, seed) for family in FAMILIES for seed in range(3)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def both(request, tmp_path_factory):
    """The peer, and what we make of the files that it saved."""
    family, seed = request.param
    folder = tmp_path_factory.mktemp(family)
    peer = build(family, seed)
    peer.save_pretrained(folder)
    return peer, pretrained.load(folder), folder


def test_a_model_of_transformers_is_loaded_with_its_logits_attention_and_hidden_states(both):
    peer, ours, _ = both
    tokens, _ = tokens_and_padding(0)
    theirs, found = run_peer(peer, tokens, np.ones_like(tokens, bool)), run_ours(ours, tokens, None)
    assert ours.family == peer.config.model_type
    near(found.logits, theirs.logits)
    stations = [*found.layers.resid_pre, found.context]
    assert len(stations) == len(theirs.hidden_states)
    for layer, (one, other) in enumerate(zip(stations, theirs.hidden_states, strict=True)):
        near(one, other, f"hidden state {layer}")
    for layer, (one, other) in enumerate(zip(found.layers.pattern, theirs.attentions, strict=True)):
        near(one, other, f"attention {layer}")


def test_padding_changes_nothing_for_the_tokens_that_are_there(both):
    peer, ours, _ = both
    tokens, valid = tokens_and_padding(1)
    theirs, found = run_peer(peer, tokens, valid), run_ours(ours, tokens, valid)
    near(np.asarray(found.logits)[valid], theirs.logits[torch.tensor(valid)])


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_the_peers(name, tmp_path):
    peer = build(name, 3)
    peer.save_pretrained(tmp_path)
    ours = pretrained.load(tmp_path)
    tokens, _ = tokens_and_padding(2, length=8)
    tokens, probe = (
        jnp.asarray(tokens),
        np.cos(np.arange(BATCH * 8 * VOCABULARY, dtype=np.float32)).reshape(BATCH, 8, VOCABULARY),
    )

    def loss(parameters):
        return jnp.mean(walk(parameters, tokens, ours.config).logits * probe)

    peer.zero_grad()
    torch.mean(peer(input_ids=torch.tensor(np.asarray(tokens)).long()).logits * torch.tensor(probe)).backward()
    found = jax.jit(jax.grad(loss), compiler_options=QUICK)(ours.parameters)
    # Read by the same mapping, which the other tests check by values: a gradient lies where its weight lies.
    family = pretrained.FAMILIES[ours.family]
    names = {place.name for place in places(family, ours.config)}
    theirs = {name: p.grad.numpy() for name, p in checkpoint_names(peer).items() if name in names}
    assert set(theirs) == names
    expected = read(family, ours.config, theirs, jnp.float32, "gradients")
    found, expected = named(found), named(expected)
    for name, gradient in expected.items():
        if name == "layers.attention.key_bias" and ours.config.position != "rotary":
            # One vector added to all keys moves all scores of a query alike: zero, up to rounding.
            size = np.abs(expected["layers.attention.query_bias"]).max()
            assert max(np.abs(gradient).max(), np.abs(found[name]).max()) < 1e-4 * size
            continue
        scale = np.abs(gradient).max()
        assert scale > 0 or name == "token_type"
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=1e-3 * scale, err_msg=name)


def checkpoint_names(peer):
    """Parameters by the names in a file, which for one family are not those in memory."""
    old = lambda name: "embed_out.weight" if name == "lm_head.weight" and "NeoX" in type(peer).__name__ else name
    found = {old(name): p for name, p in peer.named_parameters()}
    for parameter in found.values():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found


def test_what_is_saved_here_transformers_loads_with_the_same_weights_and_logits(both, tmp_path):
    peer, ours, _ = both
    pretrained.save(tmp_path / "model", ours)
    again, report = type(peer).from_pretrained(
        tmp_path / "model", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = peer.state_dict()
    assert set(again.state_dict()) == set(before)
    for name, value in again.state_dict().items():
        assert torch.equal(value, before[name]), name
    tokens, _ = tokens_and_padding(3)
    everything = np.ones_like(tokens, bool)
    theirs = run_peer(again.eval(), tokens, everything)
    assert torch.equal(theirs.logits, run_peer(peer, tokens, everything).logits)


def test_loaded_and_saved_again_every_tensor_is_the_same_to_the_bit(both, tmp_path):
    _, ours, folder = both
    pretrained.save(tmp_path / "model", ours)
    before, after = (open_folder(f) for f in (folder, tmp_path / "model"))
    assert set(before) == set(after)
    for name, value in after.items():
        assert value.dtype == before[name].dtype and value.tobytes() == before[name].tobytes(), name


def test_a_sharded_checkpoint_of_transformers_is_the_same_model(tmp_path):
    peer = build("llama", 0)
    peer.save_pretrained(tmp_path / "whole")
    peer.save_pretrained(tmp_path / "shards", max_shard_size="3KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    one, other = (pretrained.load(tmp_path / name) for name in ("whole", "shards"))
    assert one.config == other.config
    for name, value in named(one.parameters).items():
        np.testing.assert_array_equal(value, named(other.parameters)[name], err_msg=name)


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_files_of_the_model_without_its_head_have_no_prefix_and_are_read_all_the_same(family, tmp_path):
    for seed in range(10):
        peer = build(family, seed)
        if peer.config.tie_word_embeddings:
            break
    peer.save_pretrained(tmp_path / "whole")
    peer.base_model.save_pretrained(tmp_path / "base")
    assert not any("transformer." in name for name in open_folder(tmp_path / "base"))
    one, other = (pretrained.load(tmp_path / name) for name in ("whole", "base"))
    for name, value in named(one.parameters).items():
        np.testing.assert_array_equal(value, named(other.parameters)[name], err_msg=name)


def test_half_precision_is_kept_where_it_is_asked_for(tmp_path):
    peer = build("llama", 1).to(torch.bfloat16)
    peer.save_pretrained(tmp_path / "theirs")
    ours = pretrained.load(tmp_path / "theirs", dtype=jnp.bfloat16)
    assert {x.dtype for x in named(ours.parameters).values()} == {jnp.dtype(jnp.bfloat16)}
    pretrained.save(tmp_path / "ours", ours)
    before, after = (open_folder(tmp_path / name) for name in ("theirs", "ours"))
    for name, value in after.items():
        assert value.dtype == before[name].dtype and value.tobytes() == before[name].tobytes(), name
    again = type(peer).from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
    ],
    ids=str,
)
def test_a_llama_that_would_differ_is_refused_when_transformers_itself_wrote_it(settings, tmp_path):
    _, config = llama(lambda *options: options[0])
    for name, value in settings.items():
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: "):
        pretrained.load(tmp_path)


def test_a_window_shorter_than_the_positions_becomes_the_length(tmp_path):
    generator = random.Random(0)
    model_class, config = mistral(lambda *options: generator.choice(options))
    config.sliding_window, config._attn_implementation = 8, "eager"
    peer = model_class(config).eval()
    peer.save_pretrained(tmp_path)
    ours = pretrained.load(tmp_path)
    assert ours.config == replace(ours.config, length=8)
    tokens, _ = tokens_and_padding(0, length=8)
    near(run_ours(ours, tokens, None).logits, run_peer(peer, tokens, np.ones_like(tokens, bool)).logits)
    tokens, _ = tokens_and_padding(0, length=9)
    with pytest.raises(ValueError, match="9 tokens are more than the model's length of 8"):
        walk(ours.parameters, jnp.asarray(tokens), ours.config)
