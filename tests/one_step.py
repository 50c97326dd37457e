"""One step beside the float64 recurrence, from whatever a state decodes to."""

from itertools import repeat

import jax
import jax.numpy as jnp
import numpy as np
from oracle import Oracle

# What is smaller may be flushed to zero by XLA.
_TINY = 2.0**-125


def check_step(after, gradients, state, params, h, decays, param_rounding, may_be_lost=False):
    """A step agrees with the float64 recurrence, to the roundings that the formats document.

    Types must not change. `after` is what `update` returned, `h` are the hyperparameters in the
    order of `adamaxw`, and `decays` has a boolean per leaf. With `may_be_lost`, as for
    hyperparameters out of bounds, an element may be NaN where the recurrence has a number.
    """
    updates, new = after
    assert jax.tree.structure(updates) == jax.tree.structure(gradients)
    assert jax.tree.map(_type, new) == jax.tree.map(_type, state)
    assert new.count == min(int(state.count) + 1, 2**31 - 1)
    before, afterwards = (state.mu, state.nu, state.residual), (new.mu, new.nu, new.residual)
    trees = gradients, updates, params, *before, *afterwards
    columns = [repeat(None) if tree is None else jax.tree.leaves(tree) for tree in trees]
    for g, update, p, *stored, decay in zip(*columns, decays, strict=False):
        if not jnp.issubdtype(jnp.result_type(p), jnp.inexact):
            assert not np.any(np.asarray(update))
            continue
        oracle = Oracle(0.0, *map(float, h.values()), decays=decay)
        oracle.t = min(int(state.count), 2**31 - 2)
        scales = state.nu_scale, new.nu_scale
        with np.errstate(all="ignore"):
            _check_leaf(oracle, _wide(g), update, p, stored, scales, param_rounding, may_be_lost)


def _type(x):
    return np.shape(x), jnp.result_type(x)


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


def _check_leaf(oracle, g, update, p, stored, scales, param_rounding, may_be_lost):
    mu, nu, residual, new_mu, new_nu, new_residual = stored
    b1, b2, t = oracle.b1, oracle.b2, oracle.t + 1
    new_dtype = np.asarray(new_mu).dtype
    is_code, is_double = new_dtype == np.int8, new_dtype in (np.float64, np.complex128)
    # Some roundings of the arithmetic, and what it holds.
    unit, largest = (1e-13, 1e307) if is_double else (2e-6, 4e37)
    has_residual = residual is not None and np.asarray(residual).dtype == np.int16
    value = _joined(p, residual) if has_residual else _wide(p)
    got_m, got_u = _decoded(new_mu, new_nu, scales[1])
    got_update = _wide(update)
    lost = np.logical_and(~np.isfinite(got_update), may_be_lost)

    # The recurrence, from what the state decodes to.
    m, u = _decoded(mu, nu, scales[0])
    # A norm beyond float32 is inf there, and so it stays.
    in_range = np.abs(u) < largest
    end = float(scales[1]) * 2.0 ** (255 / 6) if is_code else np.inf
    if is_code:
        # A gradient above the range counts as the largest in it; a norm above it, as where eps was
        # lowered, comes down to it, and m with it.
        g = np.where(np.isfinite(g), np.clip(g, -end, end), g)
        above = np.where(np.isfinite(u), np.maximum(b2 * u / end, 1), 1)
        m, u = m / above, u / above
    terms = np.abs(b1 * m) + np.abs((1 - b1) * g)
    oracle.p, oracle.m, oracle.u = value, m, u
    oracle.step(g)
    m, u = oracle.m, oracle.u

    # What is stored of it.
    in_range &= np.isfinite(m) & (np.abs(u) < largest) & (terms < largest)
    # What is flushed to zero may be a factor: a gradient, or a norm or its scale.
    m_error = unit * terms + _TINY * max(1, abs(b1), abs(1 - b1))
    factor = 1 if scales[0] is None else np.abs(_wide(nu)) + np.abs(_wide(scales[0]))
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
    rate = oracle.lr / (-np.expm1(t * np.log(b1)) if b1 >= 0.5 else 1 - b1**t)
    decay = oracle.lr * oracle.wd if oracle.decays else 0.0
    ratio = got_m / got_u
    step, shrunk = -rate * ratio, -decay * value if oracle.decays else np.zeros_like(value)
    terms, coefficients = np.abs(step) + np.abs(shrunk), np.abs(rate) + np.abs(decay)
    error = 4 * unit * terms + 2 * _TINY * (1 + np.abs(ratio) + coefficients * (1 + 1 / got_u))
    error += 2 * _TINY * np.abs(value) if oracle.decays else 0
    fits = (terms < largest) & (np.abs(ratio) < largest)
    fits &= (coefficients < largest) & (np.abs(b1) ** t < largest)
    got, due, base = got_update, step + shrunk, 0.0
    info, p_info = (jnp.finfo(np.asarray(x).dtype) for x in (update, p))
    if param_rounding != "nearest" and p_info.bits < 32:
        # What counts is where the parameter goes.
        base, due = _wide(p), value + due
        got = base + got_update
        if has_residual:
            got = _joined(got.astype(np.asarray(p).dtype), new_residual)
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
