"""Any values in gradients, parameters and states: the recurrence, or NaN that shows."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import Oracle
from strategies import codes_of, floats_of, settings

import adamaxw

pytestmark = pytest.mark.usefixtures("compile_fast")

# What is smaller may be flushed to zero by XLA.
_TINY = 2.0**-125


def _wide(x):
    """In NumPy float64 or complex128."""
    x = np.asarray(x)
    is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
    with np.errstate(all="ignore"):
        return x.astype(np.complex128 if is_complex else np.float64)


def _decoded(mu, nu, scale):
    """The first moment and the norm that are stored, by the definition of the formats."""
    m, u = _wide(mu), _wide(nu)
    if np.asarray(mu).dtype == np.int8:
        u = _wide(scale) * 2.0 ** (u / 6)
        return np.where(m == -128, np.nan, 1.25 * np.sign(m) * (m / 127) ** 2) * u, u
    return m, u if scale is None else u * _wide(scale)


def _joined(p, residual):
    """The float32 of which a bfloat16 and a residual are the bits; below zero there is nothing."""
    high, low = np.asarray(p).view(np.int16).astype(np.int32) << 16, np.asarray(residual)
    low = np.where(_wide(p) == 0, np.maximum(low, 0), low).astype(np.int32)
    return _wide(np.asarray(high + low).view(np.float32))


class _Leaf(NamedTuple):
    g: Any
    p: Any
    mu: Any
    nu: Any
    residual: Any
    update: Any
    new_mu: Any
    new_nu: Any
    new_residual: Any
    decays: bool


def check_step(
    gradients,
    params,
    state,
    after,
    hyperparameters,
    decays=True,
    param_rounding="nearest",
    may_be_lost=False,
):
    """The step is that of the float64 recurrence on the decoded state, to the roundings of formats.

    With a count below 0 there is none, and NaN must show.

    Args:
        gradients: given to `update`, like `params` and `state`.
        params: see there.
        state: see there.
        after: what it has returned.
        hyperparameters: those of `Oracle`.
        decays: which leaves decay, a list in their order, or a boolean for all.
        param_rounding: that of the optimizer.
        may_be_lost: whether an element that shows as NaN or inf in the updates may have been a
            number, as in a state that was spoiled.
    """
    updates, new = after
    leaves, treedef = jax.tree.flatten(gradients, is_leaf=lambda x: x is None)
    none = [None] * len(leaves)
    columns = (
        *(params, state.mu, state.nu, state.residual),
        *(updates, new.mu, new.nu, new.residual),
    )
    columns = [none if tree is None else treedef.flatten_up_to(tree) for tree in columns]
    decays = [decays] * len(leaves) if isinstance(decays, bool) else decays
    for row in zip(leaves, *columns, decays, strict=True):
        leaf = _Leaf(*row)
        if leaf.g is None:
            assert leaf.update is None
        elif not jnp.issubdtype(jnp.result_type(leaf.p), jnp.inexact):
            assert not np.any(np.asarray(leaf.update))
        else:
            h = hyperparameters | {"decays": leaf.decays}
            scales = state.nu_scale, new.nu_scale
            if state.count < 0:
                assert not np.isfinite(_wide(leaf.update)).any()
                continue
            with np.errstate(all="ignore"):
                _check_leaf(leaf, int(state.count), scales, h, param_rounding, may_be_lost)


def _check_leaf(leaf, count, scales, h, param_rounding, may_be_lost):
    new_dtype = np.asarray(leaf.new_mu).dtype
    is_code, is_double = new_dtype == np.int8, new_dtype in (np.float64, np.complex128)
    # Some roundings of the arithmetic, and what it holds.
    unit, largest = (1e-13, 1e307) if is_double else (2e-6, 4e37)
    has_residual = leaf.residual is not None and np.asarray(leaf.residual).dtype == np.int16
    value = _joined(leaf.p, leaf.residual) if has_residual else _wide(leaf.p)
    got_m, got_u = _decoded(leaf.new_mu, leaf.new_nu, scales[1])
    got_update = _wide(leaf.update)
    lost = np.logical_and(~np.isfinite(got_update), may_be_lost)

    # The recurrence, from what the state decodes to.
    m, u = _decoded(leaf.mu, leaf.nu, scales[0])
    # With a scale that was spoiled, a norm may be beyond float32: inf there, and so it stays.
    is_number = np.abs(u) < largest
    g = _wide(leaf.g)
    end = float(scales[1]) * 2.0 ** (255 / 6) if is_code else np.inf
    if is_code:
        # A gradient above the range counts as the largest in it; a norm above it, as where eps was
        # lowered, comes down to it, and m with it.
        g = np.where(np.isfinite(g), np.clip(g, -end, end), g)
        above = np.where(np.isfinite(u), np.maximum(h["b2"] * u / end, 1), 1)
        m, u = m / above, u / above
    oracle = Oracle(value, **h)
    t = min(count, 2**31 - 2) + 1
    oracle.m, oracle.u, oracle.t = m, u, t - 1
    terms = np.abs(h["b1"] * m) + np.abs((1 - h["b1"]) * g)
    oracle.step(g)
    m, u = oracle.m, oracle.u

    # What is stored of it.
    in_range = is_number & np.isfinite(m) & (np.abs(u) < largest) & (terms < largest)
    # What is flushed to zero may be a factor: a gradient, or a norm or its scale.
    m_error = unit * terms + _TINY * max(1, abs(h["b1"]), abs(1 - h["b1"]))
    factor = 1 if scales[0] is None else np.abs(_wide(leaf.nu)) + np.abs(_wide(scales[0]))
    u_error = unit * np.abs(u) + _TINY * np.maximum(1, factor)
    if is_code:
        octaves = np.abs(np.log2(got_u / np.clip(u, float(scales[1]), end)))
        r, got_r = np.clip(m / got_u, -1.25, 1.25), got_m / got_u
        code = np.floor(127 * np.sqrt(np.abs(r) / 1.25))
        # One step of the grid, and powers of 2 that are right to 5e-5.
        r_error = 1.25 * (2 * code + 1) / 127**2 + 3e-4 * (1e-3 + terms / got_u)
        is_right = (octaves < 1 / 12 + 1e-3) & (np.abs(got_r - r) <= r_error)
    else:
        if scales[1] is not None:  # bfloat16: one step for m, half of one for u
            m_error, u_error = m_error + 2.0**-7 * np.abs(m), u_error + 1.01 * 2.0**-8 * np.abs(u)
        is_right = (np.abs(got_m - m) <= m_error) & (np.abs(got_u - u) <= u_error)
    bad = in_range & ~lost & ~is_right
    assert not bad.any(), f"moments {got_m[bad]}, {got_u[bad]} where {m[bad]}, {u[bad]} were due"

    # The update is that of the moments as they are stored.
    b1 = np.float64(h["b1"])
    rate = h["lr"] / (-np.expm1(t * np.log(b1)) if b1 >= 0.5 else 1 - b1**t)
    decay = (h["lr"] if h["scale_decay_by_lr"] else 1.0) * h["wd"] if h["decays"] else 0.0
    ratio = got_m / got_u
    step, shrunk = -rate * ratio, -decay * value if h["decays"] else np.zeros_like(value)
    terms = np.abs(step) + np.abs(shrunk)
    error = 4 * unit * terms + 2 * _TINY * (1 + np.abs(ratio))
    error += 2 * _TINY * np.abs(value) if h["decays"] else 0
    coefficients = np.abs(rate) + np.abs(decay)
    error += 2 * _TINY * coefficients * (1 + 1 / got_u)
    fits = (terms < largest) & (np.abs(ratio) < largest)
    fits &= (coefficients < largest) & (np.abs(b1) ** t < largest)
    got, due, base = got_update, step + shrunk, 0.0
    info, p_info = (jnp.finfo(np.asarray(x).dtype) for x in (leaf.update, leaf.p))
    if param_rounding != "nearest" and p_info.bits < 32:
        # What counts is where the parameter goes.
        base, due = _wide(leaf.p), value + due
        got = base + got_update
        if has_residual:
            got = _joined(got.astype(np.asarray(leaf.p).dtype), leaf.new_residual)
        else:
            error += float(p_info.eps) * np.abs(due) + float(p_info.smallest_subnormal)
        error += 2.0**-22 * (np.abs(due) + np.abs(base) + np.abs(value))
        fits &= np.abs(due) < 0.98 * float(p_info.max)
    error += float(info.eps) * np.abs(due - base)
    error += float(info.smallest_normal if info.bits >= 32 else info.smallest_subnormal)
    fits &= np.abs(due - base) < 0.98 * float(info.max)
    bad = fits & ~lost & ~(np.abs(got - due) <= error)
    assert not bad.any(), f"update {got_update[bad]}: {got[bad]} where {due[bad]} was due"
    bad = (np.isnan(m) | np.isnan(due)) & np.isfinite(got_update)
    assert not bad.any(), f"NaN is lost in updates: {got_update[bad]}"


_LEAVES = {
    "nearest": {"w": ("float32", (7,)), "s": ("float16", ())},
    "stochastic": {"w": ("bfloat16", (7,)), "h": ("float16", (7,)), "s": ("float32", ())},
    "exact": {"w": ("bfloat16", (7,)), "s": ("float32", ())},
}
_CONFIGS = [(name, rounding) for name in (None, "bfloat16", "uint8") for rounding in _LEAVES]


@functools.cache
def _update(moment_dtype, param_rounding):
    """A compiled `update` that takes the hyperparameters too. `s` does not decay."""
    mask = {name: name != "s" for name in _LEAVES[param_rounding]}

    @jax.jit
    def update(gradients, state, params, hyperparameters):
        kwargs = {"moment_dtype": moment_dtype, "param_rounding": param_rounding}
        opt = adamaxw.adamaxw(*hyperparameters, mask, **kwargs)
        return opt.update(gradients, state, params)

    return update


class _Case:
    """Parameters, a state of `init` and hyperparameters, drawn; then step by step."""

    def __init__(self, draw, moment_dtype, param_rounding):
        self.draw, self.param_rounding = draw, param_rounding
        self.leaves = _LEAVES[param_rounding]
        self.params = {name: draw(floats_of(s, d)) for name, (d, s) in self.leaves.items()}
        self.hyperparameters = draw(_hyperparameters(moment_dtype))
        kwargs = {"moment_dtype": moment_dtype, "param_rounding": param_rounding}
        opt = adamaxw.adamaxw(1e-3, eps=float(self.hyperparameters[3]), **kwargs)
        self.state = jax.tree.map(np.asarray, opt.init(self.params))
        self.update = _update(moment_dtype, param_rounding)

    def step(self, may_be_lost=False):
        """Draws gradients and checks a step."""
        gradients = {
            name: self.draw(floats_of(s, "float16" if d == "float16" else "float32"))
            for name, (d, s) in self.leaves.items()
        }
        after = self.update(gradients, self.state, self.params, self.hyperparameters)
        after = jax.tree.map(np.asarray, after)
        names = ("lr", "b1", "b2", "eps", "wd")
        h = dict(zip(names, map(float, self.hyperparameters), strict=True))
        h["scale_decay_by_lr"] = True
        decays = [name != "s" for name in sorted(self.leaves)]
        trees = gradients, self.params, self.state, after
        check_step(*trees, h, decays, self.param_rounding, may_be_lost)
        assert after[1].count == min(int(self.state.count) + 1, 2**31 - 1)
        self.state = after[1]


@st.composite
def _hyperparameters(draw, moment_dtype):
    fractions = st.floats(2.0**-20, 0.99)
    lr = draw(st.sampled_from([1e-3, 1.0, 0.0, 1e-20, 1e20, 3e38]) | fractions)
    b1 = draw(st.sampled_from([0.9, 0.0, 0.5, 0.999, 1 - 2.0**-24]) | fractions)
    b2 = draw(st.sampled_from([0.999, 0.0, 1.0, 0.5, 1e-30, 1 - 2.0**-24]) | fractions)
    smallest, largest = (1e-10, 1e25) if moment_dtype == "uint8" else (1e-30, 1e30)
    eps = draw(st.sampled_from([1e-8, 1e-8, 1e-3, smallest, largest]))
    wd = draw(st.sampled_from([0.0, 1e-4, 0.1, 1e20, 3e38]) | fractions)
    return tuple(map(np.float32, (lr, b1, b2, eps, wd)))


@pytest.mark.parametrize(("moment_dtype", "param_rounding"), _CONFIGS)
@settings(5)
@given(data=st.data())
def test_any_gradients_and_parameters(data, moment_dtype, param_rounding):
    """Three steps from init: each is that of the oracle, to the roundings that are documented."""
    case = _Case(data.draw, moment_dtype, param_rounding)
    for _ in range(3):
        case.step()


@pytest.mark.parametrize(("moment_dtype", "param_rounding"), _CONFIGS)
@settings(10)
@given(data=st.data())
def test_any_state(data, moment_dtype, param_rounding):
    """Whatever it holds in its dtypes: the recurrence of what it decodes to, or NaN that shows."""
    draw = data.draw
    case = _Case(draw, moment_dtype, param_rounding)

    def moment(x):
        is_code = x.dtype in (np.int8, np.uint8, np.int16)
        return draw((codes_of if is_code else floats_of)(x.shape, x.dtype))

    counts = [0, 1, 1000, 2**31 - 1, 2**31 - 2, -1, -2, -(2**31)]
    count = draw(st.sampled_from(counts) | st.integers(-(2**31), 2**31 - 1))
    scale = case.state.nu_scale
    if scale is not None:
        odd = [0.0, -0.0, -1e-8, -1.0, 1e-45, 1e-38, 1e-20, 1e30, 3e38, np.inf, -np.inf, np.nan]
        scale = np.float32(draw(st.sampled_from([scale, *odd]) | st.floats(width=32)))
    mu, nu, residual = (
        jax.tree.map(moment, tree) for tree in (case.state.mu, case.state.nu, case.state.residual)
    )
    case.state = adamaxw.AdamaxState(np.int32(count), mu, nu, scale, residual)
    case.step(may_be_lost=True)


@pytest.mark.parametrize(("moment_dtype", "param_rounding"), _CONFIGS)
@settings(5)
@given(data=st.data())
def test_any_traced_hyperparameters(data, moment_dtype, param_rounding):
    """Values that nobody could check: the recurrence with them, or NaN that shows."""
    case = _Case(data.draw, moment_dtype, param_rounding)
    case.step()
    odd = st.sampled_from([np.nan, np.inf, -np.inf, -0.5, -1.0, -1e-8, 0.0, 1.0, 2.0, 1e30])
    values = list(case.hyperparameters)
    values[data.draw(st.integers(0, 4))] = np.float32(data.draw(odd))
    case.hyperparameters = tuple(values)
    case.step(may_be_lost=True)
