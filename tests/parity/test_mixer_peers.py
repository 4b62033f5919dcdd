"""Mixers that others have published, with the same weights: PyTorch's cells; Mamba, RWKV and FNet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minitf import ModelConfig, initialize, mixers
from minitf.layer import mixer_of
from minitf.places import places_from_start
from minitf.walk import LayerWalk

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra peers)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra peers)")

WIDTH, LENGTH = 16, 40


def config(mixer, **fields):
    causal = not isinstance(mixer, mixers.Fourier)
    return ModelConfig(
        **{"vocabulary": 5, "width": WIDTH, "heads": 2, "length": LENGTH, "mixer": mixer, "causal": causal}
        | fields
    )


def inputs():
    return np.random.default_rng(0).normal(size=(3, LENGTH, WIDTH)).astype(np.float32)


def randomized(module):
    """Weights of ordinary size everywhere, in float64 for a comparison without rounding."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.3)
    return module.double().eval()


def array(tensor):
    return jnp.asarray(tensor.detach().numpy())


def mixed(mixer, weights, x, **fields):
    """What goes into the output map, and the map's product."""
    shape = config(mixer, **fields)
    out = mixer_of(shape).mix(weights, x, shape, LayerWalk(), places_from_start(LENGTH, shape, None), None).out
    flat = out.reshape(*out.shape[:2], -1)
    return flat, flat @ weights["output"].reshape(flat.shape[-1], -1) if "output" in weights else None


def columns(tensor):
    """A torch map ``[outputs, inputs]`` as ours."""
    return array(tensor).T


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64():
        yield


@pytest.mark.parametrize(
    ("mixer", "kind", "parts"),
    [
        (mixers.Gru(), torch.nn.GRU, ("reset", "keep", "value")),
        (mixers.Lstm(), torch.nn.LSTM, ("write", "keep", "value", "out")),
    ],
    ids=["gru", "lstm"],
)
def test_cells_are_torchs(mixer, kind, parts):
    module = randomized(kind(WIDTH, WIDTH, batch_first=True))
    weights = {}
    for i, part in enumerate(parts):
        rows = slice(i * WIDTH, (i + 1) * WIDTH)
        weights[f"{part}_input"] = columns(module.weight_ih_l0[rows])
        weights[f"{part}_held"] = columns(module.weight_hh_l0[rows])
        weights[f"{part}_input_bias"] = array(module.bias_ih_l0[rows])
        weights[f"{part}_held_bias"] = array(module.bias_hh_l0[rows])
    x = inputs().astype(np.float64)
    np.testing.assert_allclose(
        mixed(mixer, weights, jnp.asarray(x))[0], module(torch.tensor(x))[0].detach(), atol=1e-10
    )


def test_mamba_is_transformers():
    from transformers.models.mamba.modeling_mamba import MambaMixer

    inner, states, rank = 2 * WIDTH, 4, 1
    theirs = transformers.MambaConfig(
        hidden_size=WIDTH, state_size=states, expand=2, conv_kernel=4, time_step_rank=rank, use_mambapy=False
    )
    module = randomized(MambaMixer(theirs, layer_idx=0))
    into, by_step = module.in_proj.weight, module.x_proj.weight
    weights = {
        "value": columns(into[:inner]),
        "gate": columns(into[inner:]),
        "kernel": array(module.conv1d.weight[:, 0]).T,
        "kernel_bias": array(module.conv1d.bias),
        "step_into": columns(by_step[:rank]),
        "key": columns(by_step[rank : rank + states]),
        "query": columns(by_step[rank + states :]),
        "step_out": columns(module.dt_proj.weight),
        "step_bias": array(module.dt_proj.bias),
        "log_decay": array(module.A_log),
        "skip": array(module.D),
        "output": columns(module.out_proj.weight)[:, None],
    }
    x = inputs().astype(np.float64)
    expected = module(torch.tensor(x)).detach()
    # It computes its states in float32, whatever it is given.
    found = mixed(mixers.Mamba(states=states), weights, jnp.asarray(x))[1]
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def test_mamba2_is_transformers():
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    inner, states, heads = 2 * WIDTH, 4, 4
    theirs = transformers.Mamba2Config(
        hidden_size=WIDTH,
        state_size=states,
        expand=2,
        conv_kernel=4,
        num_heads=heads,
        head_dim=inner // heads,
        n_groups=1,
        chunk_size=16,
        layer_norm_epsilon=1e-5,
    )
    module = randomized(Mamba2Mixer(theirs, layer_idx=0))
    into = columns(module.in_proj.weight)
    gate, value, key, query, step = np.split(into, np.cumsum([inner, inner, states, states]), axis=1)
    kernels = np.split(array(module.conv1d.weight[:, 0]).T, np.cumsum([inner, states]), axis=1)
    biases = np.split(array(module.conv1d.bias), np.cumsum([inner, states]))
    weights = {
        "value": value,
        "gate": gate.reshape(WIDTH, heads, -1),
        "key": key,
        "query": query,
        "step": step,
        "kernel": kernels[0],
        "key_kernel": kernels[1],
        "query_kernel": kernels[2],
        "kernel_bias": biases[0],
        "key_kernel_bias": biases[1],
        "query_kernel_bias": biases[2],
        "step_bias": array(module.dt_bias),
        "log_decay": array(module.A_log),
        "skip": array(module.D),
        "gain": array(module.norm.weight).reshape(heads, -1),
        "output": columns(module.out_proj.weight).reshape(heads, -1, WIDTH),
    }
    weights = {name: jnp.asarray(value) for name, value in weights.items()}
    x = inputs().astype(np.float64)
    expected = module(torch.tensor(x)).detach()
    found = mixed(mixers.Mamba2(states=states), weights, jnp.asarray(x), heads=heads)[1]
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def test_rwkv_is_transformers():
    module_type = pytest.importorskip("transformers.models.rwkv.modeling_rwkv").RwkvSelfAttention
    theirs = transformers.RwkvConfig(
        hidden_size=WIDTH, attention_hidden_size=WIDTH, context_length=LENGTH, num_hidden_layers=1
    )
    module = randomized(module_type(theirs))
    weights = {
        "fade": array(module.time_decay),
        "bonus": array(module.time_first),
        "output": columns(module.output.weight)[:, None],
    }
    for ours, name in (("query", "receptance"), ("key", "key"), ("value", "value")):
        weights[ours] = columns(getattr(module, name).weight)[..., None]
        weights[f"{ours}_share"] = array(getattr(module, f"time_mix_{name}"))[0, 0]
    x = inputs().astype(np.float64)
    expected = module(torch.tensor(x))[0].detach()
    found = mixed(mixers.Rwkv4(), weights, jnp.asarray(x))[1]
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def test_fourier_mixing_is_transformers():
    from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform

    theirs = transformers.FNetConfig(hidden_size=WIDTH, max_position_embeddings=LENGTH)
    x = inputs()
    expected = FNetBasicFourierTransform(theirs)(torch.tensor(x))[0]
    shape = config(mixers.Fourier())
    out = (
        mixers.Fourier()
        .mix({}, jnp.asarray(x), shape, LayerWalk(), places_from_start(LENGTH, shape, None), None)
        .out
    )
    np.testing.assert_allclose(jnp.sum(out, axis=2), expected, atol=1e-4)


def test_a_mamba_model_starts_as_published_ones_do():
    """Decays 1 to N in every channel, steps from .001 to .1."""
    shape = config(mixers.Mamba(states=4))
    weights = initialize(shape, jax.random.key(0)).layers.attention
    np.testing.assert_allclose(np.exp(weights["log_decay"][0, 0]), [1, 2, 3, 4], rtol=1e-6)
    steps = np.log1p(np.exp(weights["step_bias"]))
    assert steps.min() > 9e-4 and steps.max() < 0.11
