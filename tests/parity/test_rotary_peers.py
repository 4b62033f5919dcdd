"""Rotary positions for longer texts, against transformers: frequencies, and models beyond their first length."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the peers are not installed: pip install 'minitf[peers]'")
transformers = pytest.importorskip(
    "transformers", reason="the peers are not installed: pip install 'minitf[peers]'"
)

from parity.make_references import double_precision  # noqa: E402
from transformers import modeling_rope_utils  # noqa: E402
from transformers.models.gpt_neox import modeling_gpt_neox  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402
from transformers.models.qwen2 import modeling_qwen2  # noqa: E402

from minitf import pretrained, walk  # noqa: E402
from minitf.families.mapping import places, read  # noqa: E402
from minitf.parameters import named  # noqa: E402
from minitf.rotary import frequencies  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = {"xla_backend_optimization_level": "0"}
# The models are made for 8 positions and read 24.
ORIGINAL, LENGTH, VOCABULARY = 8, 24, 30

numbers = lambda least, most: st.floats(least, most)
rules = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": numbers(1, 40)}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": numbers(1, 40),
            "low_freq_factor": numbers(0.5, 2),
            "high_freq_factor": numbers(2.5, 9),
            "original_max_position_embeddings": st.integers(2, 9000),
        }
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"),
            "factor": numbers(1, 40),
            "original_max_position_embeddings": st.integers(16, 9000),
        },
        optional={
            "beta_fast": numbers(3, 64),
            "beta_slow": numbers(0.5, 2),
            "attention_factor": numbers(0.5, 2),
            "mscale": numbers(0.5, 2),
            "mscale_all_dim": numbers(0.5, 2),
            "truncate": st.booleans(),
        },
    ),
)


def llama_config(rotary, **options):
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        rope_parameters=rotary,
        bos_token_id=0,
        eos_token_id=0,
        **options,
    )


@given(rotary=rules, base=st.sampled_from([1e4, 5e5]), head_width=st.sampled_from([4, 8, 64, 128]))
def test_the_frequencies_are_the_peers_for_every_rule(rotary, base, head_width):
    peer = llama_config(rotary | {"rope_theta": base}, head_dim=head_width)
    with double_precision(modeling_rope_utils):
        expected, growth = modeling_rope_utils.ROPE_INIT_FUNCTIONS[rotary["rope_type"]](peer)
    ours = pretrained.FAMILIES["llama"].config(json.loads(json.dumps(peer.to_dict())))
    found = frequencies(head_width, ours.rotary_base, ours.rotary_scaling)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12)
    assert ours.rotary_scaling.attention_factor == pytest.approx(growth, rel=1e-12)


def gpt_neox():
    rotary = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e3, "partial_rotary_factor": 0.5}
    return (
        modeling_gpt_neox,
        modeling_gpt_neox.GPTNeoXForCausalLM,
        transformers.GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            rope_parameters=rotary,
        ),
    )


def llama():
    rotary = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 0.2,
        "high_freq_factor": 1.1,
        "original_max_position_embeddings": ORIGINAL,
        "rope_theta": 1e3,
    }
    return modeling_llama, modeling_llama.LlamaForCausalLM, llama_config(rotary)


def qwen2():
    rotary = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": ORIGINAL, "rope_theta": 1e3}
    settings = llama_config(rotary).to_dict() | {"model_type": "qwen2", "architectures": None}
    return modeling_qwen2, modeling_qwen2.Qwen2ForCausalLM, transformers.Qwen2Config(**settings)


CASES = {f.__name__: f for f in (gpt_neox, llama, qwen2)}


class Both:
    """A peer with weights of ordinary size, in both precisions, and what we make of the files that it saved."""

    def __init__(self, case, folder):
        self.module, self.model_class, config = CASES[case]()
        config._attn_implementation = "eager"
        self.peer = self.draw(self.model_class(config))
        self.peer.save_pretrained(folder)
        self.ours = pretrained.load(folder)
        self.tokens = np.random.default_rng(1).integers(VOCABULARY, size=(2, LENGTH)).astype(np.int32)
        self.probe = np.cos(np.arange(2 * LENGTH * VOCABULARY)).reshape(2, LENGTH, VOCABULARY)

    def draw(self, model):
        generator = np.random.default_rng(0)
        for parameter in model.parameters():
            noise = generator.normal(size=parameter.shape)
            plain = 0.2 * noise + 1.0 if parameter.ndim == 1 else noise / np.sqrt(parameter.shape[-1])
            parameter.data = torch.tensor(plain.astype(np.float32), dtype=parameter.dtype)
        return model.eval()

    def theirs(self, double):
        """Logits, hidden states, attentions, and gradients under our names."""
        with contextlib.ExitStack() as stack:
            peer = self.peer
            if double:
                stack.enter_context(double_precision(modeling_rope_utils))
                stack.enter_context(double_precision(self.module))
                peer = self.draw(self.model_class(self.peer.config))
            out = peer(
                input_ids=torch.tensor(self.tokens).long(), output_hidden_states=True, output_attentions=True
            )
            torch.mean(out.logits * torch.tensor(self.probe, dtype=out.logits.dtype)).backward()
        # In a file this family's unembedding has another name than in memory.
        neox = self.ours.family == "gpt_neox"
        names = {
            n: "embed_out.weight" if neox and n == "lm_head.weight" else n for n, _ in peer.named_parameters()
        }
        gradients = {names[n]: p.grad.numpy() for n, p in peer.named_parameters()}
        family, config = pretrained.FAMILIES[self.ours.family], self.ours.config
        wanted = {place.name for place in places(family, config)}
        gradients = {name: gradient for name, gradient in gradients.items() if name in wanted}
        return {
            "logits": out.logits.detach().numpy(),
            "hidden states": torch.stack(out.hidden_states).detach().numpy(),
            "attentions": torch.stack(out.attentions).detach().numpy(),
        }, named(read(family, config, gradients, np.float64 if double else np.float32, "gradients"))

    def found(self, double):
        config, dtype = self.ours.config, jnp.float64 if double else jnp.float32

        def loss(parameters):
            found = walk(parameters, jnp.asarray(self.tokens), config)
            leaves = {
                "logits": found.logits,
                "hidden states": jnp.concatenate([found.layers.resid_pre, found.context[None]]),
                "attentions": found.layers.pattern,
            }
            return jnp.mean(found.logits * jnp.asarray(self.probe, dtype)), leaves

        parameters = jax.tree.map(lambda x: x.astype(dtype), self.ours.parameters)
        # Gradients in double precision alone, where only a true difference could be left.
        run = jax.grad(loss, has_aux=True) if double else loss
        gradients, leaves = jax.jit(run, compiler_options=QUICK)(parameters)
        return leaves, named(gradients) if double else {}


@pytest.fixture(scope="module", params=CASES)
def both(request, tmp_path_factory):
    return Both(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_a_model_beyond_its_original_length_is_the_peers(both, double):
    near = 1e-10 if double else 1e-4
    with jax.enable_x64(double):
        theirs, expected = both.theirs(double)
        ours, found = both.found(double)
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=0, atol=near, err_msg=name)
        assert set(found) == (set(expected) if double else set())
        for name, gradient in found.items():
            limit = 1e-10 * np.abs(expected[name]).max()
            np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=limit, err_msg=name)


def test_the_scaling_makes_the_difference(both):
    # Else the test above would show nothing.
    config = both.ours.config
    assert config.rotary_scaling.rule in ("linear", "llama3", "yarn") and LENGTH > ORIGINAL
    share = frequencies(config.rotated_width, config.rotary_base, config.rotary_scaling) / frequencies(
        config.rotated_width, config.rotary_base
    )
    assert share.min() < 0.5


def test_what_is_saved_here_transformers_loads_with_the_same_logits(both, tmp_path):
    pretrained.save(tmp_path / "model", both.ours)
    assert pretrained.load(tmp_path / "model").config == both.ours.config
    again = both.model_class.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    tokens = torch.tensor(both.tokens).long()
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, both.peer(input_ids=tokens).logits)
    # Readers that know only the older name find the same rule there.
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["rope_scaling"].items() <= written["rope_parameters"].items()


@pytest.mark.parametrize("rule", ["dynamic", "longrope"])
def test_a_rule_that_depends_on_the_texts_length_is_refused(rule, tmp_path):
    lists = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": ORIGINAL}
    rotary = {"rope_type": rule, "factor": 2.0, "rope_theta": 1e4} | (lists if rule == "longrope" else {})
    llama_config(rotary).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=f"by the rule '{rule}'; minitf has the rules default, linear, llama3, yarn,"
    ):
        pretrained.load(tmp_path)
