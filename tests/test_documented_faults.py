"""What README.md and docs/ say of faults, ours and others', each with that very fault."""

import functools
import math
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_failures as failures
from cases import EVERY_FORMAT, ROUNDINGS, run
from equality import assert_equal

import adamaxw
from adamaxw import masks

# The wrappers of Optax promote.
pytestmark = pytest.mark.usefixtures("standard_promotion", "compile_fast")

_PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
_PAGES = "docs/comparison.md", "README.md"
_rows = functools.cache(failures.rows)


@pytest.mark.parametrize("flags", [["--markdown"], []])
def test_where_the_reference_fails(flags, capsys, monkeypatch):
    """It does, and we give the exact value, or refuse what is undefined.

    The pages show what the script prints, and how many rows there are; without a flag it prints a
    table with the versions, for people.
    """
    rows = _rows()
    monkeypatch.setattr(failures, "rows", lambda: rows)
    norm, zero, decay, nearest, wide, scan, b2, mask, *nonsense, inf, skipped = rows[:-6]
    assert norm.optax == decay.optax == nearest.optax == nearest.ours == 1.0
    assert norm.ours == pytest.approx(norm.exact, rel=1e-5)
    assert math.isnan(zero.optax)
    assert zero.ours == zero.exact == 0.0
    # A parameter ends within a few steps of bfloat16, 0.4%, of the mean of 10,000.
    assert decay.ours == pytest.approx(decay.exact, rel=1e-3)
    assert wide.ours == pytest.approx(wide.exact, rel=1e-5)
    assert (scan.optax, scan.ours) == ("TypeError", "runs")
    assert (b2.optax, b2.ours, mask.optax, mask.ours) == (1.0, "TypeError", 0.0, "TypeError")
    assert [row.ours for row in nonsense] == ["ValueError"] * 4
    assert all(isinstance(row.optax, float) for row in nonsense)
    assert math.isnan(inf.optax + inf.ours)
    assert (skipped.optax, skipped.ours) == ("TypeError", skipped.exact)
    assert [row.optax for row in rows[-6:]] == [8.0, 8.0, 8.0, 4.0, 4.0, 4.0]
    assert [row.ours for row in rows[-6:]] == [8.0, 4.0, 2.0, 8.0, 2.0, 4.0]

    monkeypatch.setattr("sys.argv", ["reference_failures.py", *flags])
    monkeypatch.setenv("COLUMNS", "300")
    failures.main()
    printed = capsys.readouterr().out
    assert all(row.situation in printed for row in rows)
    root = Path(__file__).parents[1]
    page, readme = (root.joinpath(name).read_text("utf-8") for name in _PAGES)
    assert (printed in page) == bool(flags)
    if flags:
        lines = printed.splitlines()
        assert sum(line in readme.splitlines() for line in lines) == 3
        assert f"[All {len(lines)} rows](docs/comparison.md" in readme
    else:
        assert f"jax {jax.__version__}" in printed


def test_what_optax_does_not_take():
    """float0 in MultiSteps and apply_if_finite, None for a parameter, mixed dtypes if strict."""
    params = {"w": jnp.ones(3), "n": jnp.arange(3)}
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    for wrap in (optax.MultiSteps, optax.apply_if_finite):
        opt = wrap(adamaxw.adamaxw(1e-3), 2)
        with pytest.raises(TypeError, match="float0"):
            opt.update(grads, opt.init(params), params)
    assert optax.apply_updates({"w": None}, {"w": None}) == {"w": None}
    with pytest.raises(TypeError):
        optax.apply_updates({"w": jnp.ones(2)}, {"w": None})
    params = jnp.ones(3, jnp.bfloat16)
    opt = adamaxw.adamaxw(1e-3, param_rounding="exact")
    updates, _ = opt.update(params, opt.init(params), params)
    with jax.numpy_dtype_promotion("strict"), pytest.raises(ValueError, match="promotion"):
        optax.apply_updates(params, updates)


def test_gradients_that_are_flushed_to_zero():
    """Gradients below about 1e-37 count as zero."""
    opt = adamaxw.adamaxw(1e-3, eps=1e-30)
    for size, counts in ((1e-38, False), (1e-36, True)):
        assert np.all((run(opt, jnp.ones(2), [size])[1].mu > 0) == counts)


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", "nearest"), ("bfloat16", "exact")])
def test_a_decay_below_float32(dtype, rounding):
    """Below 2^-25 it is lost, in the float32 weights of "exact" too; portions are not."""

    def kept(weight_decay):
        opt = adamaxw.adamaxw(1e-4, weight_decay=weight_decay, param_rounding=rounding)
        start = jnp.linspace(1, 2, 8, dtype=dtype)
        return adamaxw.moments.master_params(*run(opt, start, [0.0] * 100)) / start

    assert np.all(kept(1e-4) == 1)
    portions = kept(lambda count: jnp.where(count % 50 == 49, 50 * 1e-4, 0.0))
    np.testing.assert_allclose(portions, np.exp(-1e-8 * 100), rtol=0, atol=2.5e-7)
    assert np.all(portions < 1)


def test_a_mask_and_plain_containers():
    """Pass static_args where the state goes through something such as flax.serialization."""
    state = optax.inject_hyperparams(adamaxw.adamaxw)(0.1, mask=masks.matrices).init(_PARAMS)
    with pytest.raises(TypeError, match="serialize"):
        flax.serialization.to_bytes(state)
    inject = optax.inject_hyperparams(adamaxw.adamaxw, static_args=("mask",))
    state = inject(0.1, mask=masks.matrices).init(_PARAMS)
    assert_equal(state, flax.serialization.from_bytes(state, flax.serialization.to_bytes(state)))


def test_masks_inside_flatten():
    """Patterns and trees are an error there, and masks.matrices chooses nothing."""

    def flat(mask):
        return optax.flatten(adamaxw.adamaxw(1.0, weight_decay=0.5, mask=mask))

    for mask in (masks.matching("w"), {"w": True, "b": False}):
        with pytest.raises(ValueError, match="mask"):
            flat(mask).init(_PARAMS)
    assert_equal(run(flat(masks.matrices), _PARAMS, [0.0])[0], _PARAMS)
    assert np.all(run(flat(None), _PARAMS, [0.0])[0]["b"] == 0.5)


@EVERY_FORMAT
def test_frozen_rows(moment_dtype, param_rounding):
    """Zero gradients do not hold them; zero updates do, with float32 weights that stay close."""
    hold = optax.stateless(lambda u, _: jnp.where(jnp.arange(4)[:, None] < 2, 0, u))
    options = {"moment_dtype": moment_dtype, "param_rounding": param_rounding}
    opt = adamaxw.adamaxw(0.02, weight_decay=0.5, **options)
    start = jnp.linspace(0.5, 2, 16, dtype=jnp.bfloat16).reshape(4, 4)
    params, state = run(optax.chain(opt, hold), start, [1.0] * 10 + [-0.3] * 40)
    weights = adamaxw.moments.master_params(params, state[0])
    close = np.isclose(weights.astype(np.float32), start.astype(np.float32), rtol=2**-8)
    assert_equal(params[:2], start[:2])
    assert np.all(close[:2])
    assert np.all(params[2:] != start[2:])
    # The decay moves them, and so does what the first moment remembers.
    assert np.any(run(optax.chain(hold, opt), start, [1.0] * 50)[0][:2] != start[:2])
    state = run(opt, start, [1.0] * 10)[1]
    assert np.any(adamaxw.adamax(0.02, **options).update(0 * start, state, start)[0] != 0)


@pytest.mark.parametrize("rounding", ["stochastic", "exact"])
@pytest.mark.parametrize("is_inside", [False, True])
def test_what_makes_updates_smaller_afterwards(rounding, is_inside):
    """Makes training stand still, as 'lost' shows; the same learning rate inside does not."""

    def rate(count):
        return jnp.where(count < 5, 3e-3, 3e-4)

    make = functools.partial(adamaxw.adamaxw, param_rounding=rounding)
    after = optax.chain(make(3e-3), optax.scale_by_schedule(lambda count: rate(count) / 3e-3))
    opt, params = make(rate) if is_inside else after, jnp.ones(256, jnp.bfloat16)
    seen, lost = [], []
    update, state = jax.jit(opt.update), opt.init(params)
    for _ in range(20):
        updates, state = update(jnp.ones_like(params), state, params)
        lost.append(adamaxw.diagnostics(updates, state, params)["lost"])
        params = optax.apply_updates(params, updates)
        seen.append(params)
    assert np.any(seen[4] != seen[0])
    assert np.any(seen[19] != seen[6]) == is_inside
    assert (max(lost) == 0) if is_inside else (max(lost) > 0.9)


def test_bad_batches():
    """apply_if_finite gives up after 5 in a row, also around MultiSteps; skip_not_finite never.

    Inside MultiSteps, a NaN stays in the mean: no step is taken, and then everything is NaN.
    """
    opt = adamaxw.adamaxw(1e-3)
    around = optax.apply_if_finite(optax.MultiSteps(opt, 2).gradient_transformation(), 5)
    skips = optax.MultiSteps(opt, 2, should_skip_update_fn=optax.skip_not_finite)
    for wrapped, gives_up in (
        (optax.apply_if_finite(opt, 5), True),
        (around, True),
        (skips, False),
    ):
        params, _ = run(wrapped, _PARAMS, [1.0, *[np.nan] * 5, 1.0])
        assert_equal(params, run(wrapped, _PARAMS, [1.0, 1.0])[0])
        params, _ = run(wrapped, _PARAMS, [1.0, *[np.nan] * 6])
        assert np.all(np.isnan(params["w"])) == gives_up
    inside = optax.MultiSteps(optax.apply_if_finite(opt, 5), 2)
    assert_equal(run(inside, _PARAMS, [np.nan, *[1.0] * 9])[0], _PARAMS)
    assert np.all(np.isnan(run(inside, _PARAMS, [np.nan, *[1.0] * 11])[0]["w"]))


def _grown(tree):
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 2), (0, 0))), tree)


@EVERY_FORMAT
def test_a_larger_vocabulary(moment_dtype, param_rounding):
    """Old rows go on as they would have, new ones begin with (1 - b1) of the learning rate."""
    options = {"moment_dtype": moment_dtype, "param_rounding": param_rounding}
    opt = adamaxw.adamaxw(2.0**-5, weight_decay=0.0, **options)
    dtype = jnp.float32 if param_rounding == "nearest" else jnp.bfloat16
    small = jnp.linspace(-1, 1, 24, dtype=dtype).reshape(6, 4)
    small, state = run(opt, small, [*[1.0, -0.5, 0.25] * 5, *[1.0] * 15])
    moments, large = adamaxw.moments.unpack(state), _grown(small)
    packed = adamaxw.moments.pack(
        moments._replace(**{k: _grown(getattr(moments, k)) for k in ("mu", "nu", "residual")}),
        moment_dtype,
    )
    updates, _ = opt.update(jnp.ones_like(large), packed, large)
    expected, _ = opt.update(jnp.ones_like(small), state, small)
    updates, expected = updates.astype(np.float32), expected.astype(np.float32)
    # "bfloat16" rounds norms once more when it packs; a bfloat16 may then tip over.
    atol = 2.0**-5 * 2**-7 + (2.0**-7 if param_rounding == "stochastic" else 0)
    np.testing.assert_allclose(updates[:6], expected, rtol=0, atol=atol)
    np.testing.assert_allclose(updates[6:].mean(), -(2.0**-5) * 0.1 / (1 - 0.9**31), rtol=0.2)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_parameters_beyond_bfloat16(rounding):
    """They are inf, and NaN a step later; without decay, "nearest" leaves them at inf."""
    start = jnp.full(2, 3.3e38, jnp.bfloat16)
    for opt, stays in (
        (adamaxw.adamaxw(1e38, weight_decay=0.0, param_rounding=rounding), False),
        (adamaxw.adamax(1e38, param_rounding=rounding), rounding == "nearest"),
    ):
        after = [run(opt, start, factors)[0] for factors in ([-1.0], [-1.0, 0.0])]
        assert np.all(np.isposinf(after[0].astype(jnp.float32)))
        assert np.all((np.isposinf if stays else np.isnan)(after[1].astype(jnp.float32)))


def test_stochastic_at_the_ceiling_of_the_count():
    """The noise stays that of the last count: a parameter may move by a whole unit at each step.

    Steps are a tenth of a unit: a tenth of the parameters moves at every step, the others never.
    """
    opt = adamaxw.adamax(2.0**-8 * 0.1, param_rounding="stochastic")
    start = jnp.ones(1000, jnp.bfloat16) * 1.5
    state = opt.init(start)._replace(count=jnp.int32(2**31 - 1), mu=jnp.ones(1000))
    params, _ = run(opt, start, [1.0] * 10, state)
    assert set(np.asarray((start - params).astype(jnp.float32)) / 2.0**-7) == {0.0, 10.0}


def test_uint8_far_below_eps():
    """It takes such steps rarely and in larger portions, with the right mean."""

    def last_updates(moment_dtype):
        opt, zeros = adamaxw.adamax(1.0, moment_dtype=moment_dtype), jnp.zeros(2**18)
        _, state = run(opt, zeros, [1e-13] * 49)
        return np.asarray(opt.update(zeros + 1e-13, state)[0])

    updates, exact = last_updates("uint8"), last_updates(None)[0]
    assert np.mean(updates != 0) < 0.2
    assert np.max(np.abs(updates)) > 5 * np.abs(exact)
    np.testing.assert_allclose(updates.mean(), exact, rtol=0.05)


def test_a_first_moment_beyond_its_range():
    """Where the norm forgets first, "uint8" clips m in the state to 1.25 of it."""

    def ratio(moment_dtype):
        opt = adamaxw.adamax(1e-3, b1=0.9, b2=0.5, moment_dtype=moment_dtype)
        moments = adamaxw.moments.unpack(run(opt, jnp.ones(3), [*[1.0] * 10, *[0.0] * 5])[1])
        return moments.mu / moments.nu

    np.testing.assert_allclose(ratio("uint8"), 1.25, rtol=1e-6)
    assert np.all(ratio(None) > 5)
