"""Every format and rounding against float64, over thousands of steps without synchronising."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_equal, types_of
from modes import apply_updates
from oracle import octaves, rms_error
from registry import (
    BAD,
    BAD_STEP,
    CASES,
    CONFIGS,
    FINITE,
    FORMATS,
    HALF_STEP,
    LANES_OF,
    NORM_BOUND,
    RUN_LANES,
    RUN_STEPS,
    ULP,
    Case,
    Rates,
    exact,
    oracle_of,
    problem,
    run,
    trained,
)

from adamaxw import moments

_NARROW = [case for case in CASES if case.dtype != "float32"]
# Of the first moment in units of the norm: largest and rms, twice what is measured.
_M_BOUND = {None: (8 * ULP, 2e-8), "bfloat16": (0.02, 1e-3), "uint8": (0.08, 6.5e-3)}
# Of parameters with all their bits, in units of how far they move: likewise.
_P_BOUND = {None: 6e-6, "bfloat16": 4e-3, "uint8": 0.035}

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_format = pytest.mark.parametrize("moment_dtype", FORMATS)


@each_case
def test_moments_follow_float64(case):
    """At every step the norm is the exact one rounded once, and the first moment is close."""
    history, params, state = trained(case)
    true = exact()
    errors = octaves(history.u[:, FINITE], true.u).max(axis=0)
    of_kind = {kind: errors[lanes].max() for kind, lanes in LANES_OF.items()}
    assert max(of_kind.values()) <= NORM_BOUND[case.moment_dtype], of_kind
    error = (history.m[:, FINITE] - true.m) / true.u
    largest, rms = _M_BOUND[case.moment_dtype]
    assert np.max(np.abs(error)) < largest
    assert np.sqrt(np.mean(error**2)) < rms
    assert types_of(state) == types_of(jax.eval_shape(case.optimizer().init, params))
    if case.dtype == "bfloat16":
        # The noise depends on values, not on how parameters and gradients are stored.
        _, _, wide = trained(Case("float32", case.moment_dtype))
        assert_equal((state.mu, state.nu, state.nu_scale), (wide.mu, wide.nu, wide.nu_scale))


@pytest.mark.parametrize("moment_dtype", FORMATS[1:])
def test_first_moments_are_right_in_the_mean(moment_dtype):
    """Random rounding is unbiased: the error of 128 elements over thousands of steps averages 0."""
    m, true = trained(Case("float32", moment_dtype))[0].m, exact()
    lanes = np.r_[LANES_OF["normal"], LANES_OF["heavy-tailed"]]
    error = ((m[:, lanes] - true.m[:, lanes]) / true.u[:, lanes])[100:]
    z = error.mean(axis=1) / (error.std(axis=1) / np.sqrt(error.shape[1]))
    # The errors of one step are forgotten after about ten.
    assert np.abs(np.mean(z)) < 5 * np.sqrt(20 / len(z))
    assert np.max(np.abs(z)) < 6


@each_format
def test_parameters_follow_float64(moment_dtype):
    """Float32 parameters follow float64 to the accuracy of the moments."""
    got, true = trained(Case("float32", moment_dtype))[0].params, exact().params
    for kind, lanes in LANES_OF.items():
        moved = np.sqrt(np.mean((true[:, lanes] - true[0, lanes]) ** 2))
        error = np.sqrt(np.mean((got[:, lanes] - true[:, lanes]) ** 2))
        assert error < _P_BOUND[moment_dtype] * moved, kind


@pytest.mark.parametrize("case", [c for c in CASES if c.param_rounding == "exact"], ids=str)
def test_exact_trains_as_float32_does(case):
    """At every step the master weights, and at the end the state, are those of float32."""
    history, params, state = trained(case)
    wide, wide_params, wide_state = trained(Case("float32", case.moment_dtype))
    np.testing.assert_array_equal(history.params, wide.params)
    crossings = np.diff(np.sign(history.params[:, FINITE]), axis=0) != 0
    assert np.sum(crossings) > 300
    narrow = np.asarray(params[FINITE].astype(jnp.float32))
    np.testing.assert_allclose(narrow, wide_params[FINITE], rtol=2.0**-8)
    assert_equal(state._replace(residual=None), wide_state)


@pytest.mark.parametrize("case", [c for c in _NARROW if c.param_rounding == "stochastic"], ids=str)
def test_stochastic_is_right_in_the_mean(case):
    """Steps below the spacing of the dtype add up: the mean is that of float64."""
    error = trained(case)[0].params[-1, FINITE] - exact().params[-1]
    assert 0 < np.std(error) < {"bfloat16": 0.15, "float16": 0.02}[case.dtype]
    assert abs(np.mean(error)) < 4 * np.std(error) / np.sqrt(error.size)


@pytest.mark.parametrize("case", [c for c in _NARROW if c.param_rounding == "nearest"], ids=str)
def test_nearest_loses_small_steps(case):
    """Without gradients, the decay per step is below half of the spacing and has no effect."""
    lanes = LANES_OF["zero"]
    assert rms_error(trained(case)[0].params[:, lanes], exact().params[:, lanes]) > 0.05


@each_case
def test_bad_gradients_show_and_ended_ones_are_forgotten(case):
    """A NaN of any payload or an inf makes its element NaN at once and from then on.

    The other elements are compared with float64 above. Once gradients have ended, the first moment
    reaches zero, so that only the decay moves parameters.
    """
    history, params, _ = trained(case)
    for x in (history.params, history.m):
        assert np.all(np.isfinite(x[:BAD_STEP, BAD]))
        assert not np.any(np.isfinite(x[BAD_STEP:, BAD]))
    assert np.all(np.isnan(params[BAD]))
    assert np.all(np.isnan(history.m[-1, BAD]))
    m = history.m[-1, LANES_OF["ending"]]
    assert not np.any(m) if case.moment_dtype == "uint8" else np.max(np.abs(m)) < 1e-30


@pytest.mark.parametrize("moment_dtype", [None, "uint8"])
def test_exact_does_not_depend_on_what_is_compiled_with_it(moment_dtype):
    """Updates compiled by themselves and applied outside give the float32 training too."""
    opt = Case("bfloat16", moment_dtype, "exact").optimizer()
    update = jax.jit(opt.update)
    p, gradients = problem()

    def trained_from(p):
        state = opt.init(p)
        for g in gradients[:100]:
            updates, state = update(g, state, p)
            p = apply_updates(p, updates)
        return moments.master_params(p, state)

    assert_equal(*map(trained_from, (jnp.asarray(p, jnp.bfloat16), jnp.asarray(p))))


@pytest.mark.parametrize(("moment_dtype", "param_rounding"), CONFIGS)
def test_a_zeroed_state_is_a_fresh_one(moment_dtype, param_rounding):
    """`jax.tree.map(jnp.zeros_like, state)` resets it, apart from the seed of the noise."""
    opt = Case("bfloat16", moment_dtype, param_rounding).optimizer()
    p, gradients = problem()
    p, g = jnp.asarray(p[:8]).astype(jnp.bfloat16), gradients[0, :8]
    fresh = opt.init(p)
    if fresh.seed is not None:
        fresh = fresh._replace(seed=jnp.uint32(0))
    zeroed = jax.tree.map(jnp.zeros_like, fresh)
    assert_equal(*(opt.update(g, state, p) for state in (zeroed, fresh)))


# Hyperparameters that change at every step -------------------------------------------------------


_STEP = np.arange(RUN_STEPS)
_RATES = {
    **{f"b2={b2}": Rates(b2=b2) for b2 in (0.0, 1e-3, 0.5, 0.99, 0.9999, 1.0)},
    "b2 rises": Rates(b2=0.5 + 0.4999 * np.minimum(_STEP / 1500, 1)),
    "b2 jumps, eps falls": Rates(
        b2=np.select([_STEP < 500, _STEP < 510, _STEP < 1000], [0.999, 0.0, 1.0], 0.9),
        eps=np.where(_STEP < 1500, 1e-6, 1e-8),
    ),
    "eps rises and falls": Rates(eps=np.select([_STEP < 700, _STEP < 1400], [1e-8, 1e-6], 1e-7)),
    "small eps": Rates(eps=1e-10),
}


@pytest.mark.parametrize("rates", _RATES)
@each_format
def test_schedules_of_b2_and_eps(moment_dtype, rates):
    """The norm stays the exact one rounded once for any constant or changing b2 and eps."""
    rates = _RATES[rates]
    # A few elements of every kind, in the range of the smallest eps.
    g = np.clip(problem()[1][:RUN_STEPS, FINITE][:, ::5], -600, 600)
    _, _, got, state = run(moment_dtype, g, rates)
    _, _, u = oracle_of(g, rates)
    assert np.max(octaves(got, u)) <= NORM_BOUND[moment_dtype]
    if moment_dtype == "uint8":
        assert octaves(state.nu_scale, np.ravel(rates.eps)[-1]) <= HALF_STEP


def test_first_moments_of_bfloat16_follow_a_slow_average():
    """At b1=0.999, where rounding to the nearest would leave them unchanged."""
    g = np.where(np.arange(RUN_STEPS)[:, None] < 700, 1.0, 1e-3) * np.ones(RUN_LANES)
    rates = Rates(b1=0.999)
    (_, m, _, _), (_, m_exact, _) = run("bfloat16", g, rates), oracle_of(g, rates)
    np.testing.assert_allclose(m.mean(axis=1), m_exact[:, 0], rtol=0.02)
