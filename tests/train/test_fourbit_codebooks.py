import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitf.train.fourbit.codebooks import dynamic_exponent, linear
from minitf.train.fourbit.packing import as_blocks, from_blocks, pack, unpack
from minitf.train.fourbit.quantized import dequantize, quantize

SIGNED, UNSIGNED = dynamic_exponent(signed=True), dynamic_exponent(signed=False)
WITHOUT_ZERO = dynamic_exponent(signed=False, zero=False)
EVERY = {
    "signed": SIGNED,
    "unsigned": UNSIGNED,
    "without 0": WITHOUT_ZERO,
    "linear": linear(),
    "linear with 0": linear(zero=True),
    "signed, 8 bit": dynamic_exponent(8, signed=True),
    "unsigned, 8 bit": dynamic_exponent(8, signed=False),
    "linear, 8 bit": linear(8),
}


def test_levels_of_four_bits_are_those_of_the_published_tables():
    signed = [-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0]
    signed += [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1]
    unsigned = [0, 0.00325, 0.00775, 0.02125, 0.04375, 0.06625, 0.08875]
    unsigned += [0.15625, 0.26875, 0.38125, 0.49375, 0.60625, 0.71875, 0.83125, 0.94375, 1]
    assert SIGNED.levels == pytest.approx(signed) and UNSIGNED.levels == pytest.approx(unsigned)
    assert WITHOUT_ZERO.levels == pytest.approx([0.00325, *unsigned[1:]])
    assert linear().levels == pytest.approx([k / 16 for k in range(1, 17)])
    assert linear(zero=True).levels == pytest.approx([k / 15 for k in range(16)])


def test_thresholds_are_those_of_the_published_table():
    positive = [0.00275, 0.019, 0.055, 0.145, 0.325, 0.55, 0.775]
    assert SIGNED.thresholds == pytest.approx([-x for x in reversed(positive)] + [*positive, 0.94375])


@pytest.mark.parametrize("name", EVERY)
def test_levels_increase_and_use_all_codes(name):
    book = EVERY[name]
    assert len(book.levels) == 2**book.bits and book.levels[-1] == 1
    assert sum(level < 0 for level in book.levels) == book.zero
    # DE-0 has its smallest level in the place of 0 too.
    assert np.all(np.diff(book.levels) > 0) or (name == "without 0" and np.all(np.diff(book.levels)[1:] > 0))
    mirrored = [level for level in book.levels[book.zero + 1 : -1]] if book.zero else []
    assert list(book.levels[: book.zero]) == [-level for level in reversed(mirrored)]


def test_of_eight_bits_the_smallest_levels_are_below_a_millionth():
    assert min(x for x in EVERY["unsigned, 8 bit"].levels if x > 0) == pytest.approx(3.25e-7)
    assert min(x for x in EVERY["signed, 8 bit"].levels if x > 0) == pytest.approx(5.5e-7)


@settings(max_examples=40)
@given(st.lists(st.floats(-1, 1, width=32), min_size=50, max_size=50), st.sampled_from(list(EVERY)))
def test_a_code_is_that_of_the_nearest_level(numbers, name):
    book = EVERY[name]
    x = np.array(numbers, np.float32) if book.zero else np.abs(np.array(numbers, np.float32))
    codes = np.asarray(book.nearest(jnp.asarray(x))).astype(int)
    levels = np.array(book.levels)
    found = np.abs(levels[codes] - x.astype(float))
    # Thresholds are rounded to float32, by half an ulp of at most 1.
    assert np.all(found <= np.abs(levels - x.astype(float)[:, None]).min(axis=1) + 2**-24)


@pytest.mark.parametrize("name", EVERY)
def test_every_level_is_its_own_code_and_halfway_goes_towards_zero(name):
    book = EVERY[name]
    codes = np.arange(len(book.levels))
    own = np.asarray(book.nearest(jnp.asarray(book.levels, jnp.float32)))
    assert np.array_equal(own[2:], codes[2:]) and own[0] == 0
    assert np.asarray(book.decode(jnp.asarray(codes, jnp.uint8))) == pytest.approx(np.array(book.levels), rel=1e-7)
    halfway = np.asarray(book.nearest(jnp.asarray(linear().thresholds, jnp.float32)))
    if name == "linear":
        assert np.array_equal(halfway, codes[:-1])


def test_halfway_between_negative_levels_goes_towards_zero_too():
    up = np.asarray(SIGNED.nearest(jnp.asarray(SIGNED.thresholds[7:-1], jnp.float32)))
    down = np.asarray(SIGNED.nearest(jnp.asarray(-SIGNED.thresholds[7:-1], jnp.float32)))
    assert np.array_equal(up - 7, 7 - down) and np.array_equal(up, np.arange(7, 14))


@pytest.mark.parametrize("name", [name for name in EVERY if "8 bit" not in name])
def test_rounding_at_random_has_the_number_as_its_mean(name):
    book, draws = EVERY[name], 4000
    x = np.linspace(max(book.levels[0], -1), 1, 57).astype(np.float32)
    uniform = (np.arange(draws, dtype=np.float32) + 0.5) / draws
    grid = np.broadcast_to(x[:, None], (len(x), draws))
    codes = book.stochastic(jnp.asarray(grid), jnp.asarray(np.broadcast_to(uniform, grid.shape)))
    levels = np.array(book.levels)[np.asarray(codes).astype(int)]
    # Evenly spaced draws give each share to half a draw of a step, below .24, and there is float32's rounding.
    assert levels.mean(axis=1) == pytest.approx(x, abs=0.24 / draws + 1e-6)
    assert np.all(np.ptp(np.asarray(codes), axis=1) <= 1)


@settings(max_examples=12)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.sampled_from([2, 6, 8]), st.sampled_from([4, 8]))
def test_what_is_cut_in_blocks_and_packed_comes_back(shape, block, bits):
    size = int(np.prod(shape))
    codes = np.random.default_rng(size).integers(0, 2**bits, size=shape)

    @jax.jit
    def there_and_back(x):
        packed = pack(as_blocks(x, block), bits)
        return packed, from_blocks(unpack(packed, bits).astype(jnp.float32), tuple(shape))

    packed, back = there_and_back(jnp.asarray(codes, jnp.float32))
    assert packed.size == -(-size // block) * block * bits // 8
    assert np.array_equal(back, codes)


def test_blocks_along_the_last_axis_are_those_of_the_flattened_tensor():
    x = jnp.arange(48.0).reshape(2, 3, 8)
    assert as_blocks(x, 4).shape == (2, 3, 2, 4)
    assert np.array_equal(as_blocks(x, 4).reshape(-1, 4), as_blocks(x.reshape(-1), 4))


def test_codes_that_cannot_share_bytes_are_refused():
    with pytest.raises(ValueError, match="a block has 3 codes; two share a byte, so the number must be even"):
        pack(jnp.zeros((2, 3)), 4)


@pytest.mark.parametrize("scale", ["block", "rank1"])
def test_a_tensor_comes_back_within_half_a_step_of_its_scale(scale):
    x = jnp.asarray(np.random.default_rng(0).exponential(size=(6, 5, 8)), jnp.float32)
    back = dequantize(quantize(x, linear(), block=8, scale=scale), x.shape, linear(), block=8, scale=scale)
    maxima = [np.asarray(x).max(axis=tuple(a for a in range(3) if a != axis), keepdims=True) for axis in range(3)]
    scales = np.minimum(np.minimum(maxima[0], maxima[1]), maxima[2])
    if scale == "block":
        scales = np.asarray(x).max(axis=2, keepdims=True)
    error = np.abs(np.asarray(back - x))
    # Half of 1/16, but a whole 1/16 where the nearest level would be 0.
    assert np.all(error <= np.where(x < scales / 32, 1 / 16, 1 / 32) * scales * (1 + 1e-6))


@pytest.mark.parametrize("bits", [3, 16])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}; a code takes 4 or 8"):
        linear(bits)
    with pytest.raises(ValueError, match=f"bits is {bits}; a code takes 4 or 8"):
        dynamic_exponent(bits, signed=True)


def test_signed_levels_without_zero_are_refused():
    with pytest.raises(ValueError, match="leave zero=True"):
        dynamic_exponent(signed=True, zero=False)
