import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from minitf import ModelConfig, walk
from minitf.declaration import declare
from minitf.parameters import named, path_name
from minitf.walk import get

FOLDER = Path(__file__).parent / "references"
FAMILIES = ("gpt2", "gpt_neox", "gptj", "llama", "bloom", "bert", "torch_encoder")
# Compiling takes longest here, and nothing here depends on how well it is done.
QUICK = {"xla_backend_optimization_level": "0"}
STATIONS = ("layers.resid_pre", "layers.resid_mid", "end", "context")


class Reference:
    """One committed file: a peer's weights under minitf's names, and what the peer made of them in float64."""

    def __init__(self, family):
        with safe_open(FOLDER / f"{family}.safetensors", "numpy") as file:
            self.arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = file.metadata()
        self.config = ModelConfig(**json.loads(about["config"]))
        self.output = about["output"]
        self.tokens, self.valid = self.arrays["tokens"], self.arrays["valid"]

    def part(self, prefix):
        return {
            name.removeprefix(f"{prefix}."): value
            for name, value in self.arrays.items()
            if name.startswith(f"{prefix}.")
        }

    def parameters(self, dtype):
        weights = self.part("weights")
        tree = declare(self.config)
        found = jax.tree_util.tree_map_with_path(
            lambda path, _: weights[path_name(path)].astype(dtype), tree, is_leaf=lambda x: hasattr(x, "axes")
        )
        assert set(named(found)) == set(weights)
        return found


class Ours:
    """What minitf makes of the same weights and tokens, in one precision."""

    def __init__(self, reference, dtype):
        self.dtype, self.output = dtype, reference.output

        def loss(parameters, tokens, valid):
            found = walk(parameters, tokens, reference.config, valid=valid)
            out = get(found, reference.output)
            probe = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
            leaves = {name: get(found, name) for name in ("layers.pattern", reference.output, *STATIONS)}
            return jnp.mean(out * probe), leaves

        run = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)
        parameters, tokens, valid = reference.parameters(dtype), reference.tokens, reference.valid
        with jax.enable_x64(dtype == np.float64):
            gradient, self.full = jax.device_get(run(parameters, tokens, np.ones_like(valid)))
            _, self.padded = jax.device_get(run(parameters, tokens, valid))
        self.gradient = named(gradient)


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request):
    return Reference(request.param)


@pytest.fixture(scope="module", params=[np.float32, np.float64], ids=["float32", "float64"])
def ours(request, reference):
    return Ours(reference, request.param)


def assert_close(ours, found, expected, single, double=1e-12):
    """In float32 rounding is allowed for; in float64 only a true difference could be left."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=double if ours.dtype == np.float64 else single)


def test_the_output_is_the_peers(reference, ours):
    assert_close(ours, ours.full[reference.output], reference.arrays["full.output"], single=1e-5)


def test_the_peers_own_float32_output_is_the_same(reference):
    peer, exact = reference.arrays["float32.output"], reference.arrays["full.output"]
    assert peer.dtype == np.float32
    np.testing.assert_allclose(peer, exact, rtol=0, atol=1e-5)


def test_the_residual_stream_is_the_peers_at_every_station(reference, ours):
    expected = reference.part("full")
    present = [name for name in STATIONS if name in expected]
    assert {"layers.resid_pre", "context"} <= set(present)
    for name in present:
        assert_close(ours, ours.full[name], expected[name], single=1e-5)


def test_the_attention_patterns_are_the_peers(reference, ours):
    assert_close(ours, ours.full["layers.pattern"], reference.arrays["full.layers.pattern"], single=1e-6)


def test_padding_is_not_seen(reference, ours):
    # What padding itself attends to means nothing; every real position must agree.
    real = reference.valid
    found, expected = ours.padded[reference.output], reference.arrays["padded.output"]
    assert_close(ours, found[real], expected[real], single=1e-5)
    found, expected = ours.padded["layers.pattern"], reference.arrays["padded.layers.pattern"]
    found, expected = (np.moveaxis(x, 3, 2)[:, real] for x in (found, expected))
    assert_close(ours, found, expected, single=1e-6)
    hidden = ~np.broadcast_to(real[:, None, None, :], ours.padded["layers.pattern"].shape[1:])
    assert not ours.padded["layers.pattern"][:, hidden].any()


def test_the_gradients_are_the_peers(reference, ours):
    for name, expected in reference.part("gradient").items():
        found = ours.gradient[name]
        error = np.max(np.abs(found - expected)) / np.max(np.abs(expected))
        assert error < (1e-12 if ours.dtype == np.float64 else 1e-4), name


def test_the_files_are_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 1_000_000


@pytest.mark.skipif(
    not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")),
    reason="the peers are not installed: pip install 'minitf[peers]'",
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_the_peer_still_makes_what_is_committed(family):
    from parity.families import FAMILIES as PEERS
    from parity.make_references import make

    committed, again = Reference(family).arrays, make(PEERS[family])
    assert set(again) == set(committed)
    for name, value in again.items():
        assert value.dtype == committed[name].dtype
        tolerance = 1e-12 if value.dtype == np.float64 else 2e-6 if name.startswith("float32.") else 0
        np.testing.assert_allclose(value, committed[name], rtol=0, atol=tolerance, err_msg=name)
