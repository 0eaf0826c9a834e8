"""The activations and their derivatives for Triton's kernels: float32 in, float32 out.

Names and numbers are those of `convplan._epilogue.ACTIVATIONS`, and `hardtanh`, a clamp whose derivative is 0 on its
bounds. At corners the derivatives are torch's, and what is not a number stays none. Only what Triton's own language
offers is used, no library of a vendor's, so that its interpreter runs all of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

SMALL = tl.constexpr(0.25)  # below it, differences from 1 lose digits: series instead
ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_TWO_OVER_PI = tl.constexpr(0.7978845608028654)
ONE_OVER_ROOT_TWO_PI = tl.constexpr(0.3989422804014327)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    large = (1 - e) / (1 + e)
    s = x * x
    small = x * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    return tl.where(tl.abs(x) < SMALL, small, tl.where(x < 0, -large, large))


@triton.jit
def expm1(x):
    small = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(tl.abs(x) < SMALL, small, tl.exp(x) - 1)


@triton.jit
def log1p_exp(x):
    """log(1 + exp(x)): what rounding takes from the sum is put back by the quotient."""
    e = tl.exp(-tl.abs(x))
    total = 1 + e
    short = total - 1
    log = tl.where(short == 0, e, tl.log(total) * (e / tl.where(short == 0, 1.0, short)))
    return tl.maximum(x, 0.0) + log


@triton.jit
def gelu_tanh_inner(x):
    return tanh((x + x * x * x * CUBIC) * ROOT_TWO_OVER_PI)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """The activation of `x`."""
    if ACTIVATION == "relu":
        x = tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x > 0, x, x * P0)
    elif ACTIVATION == "clamp" or ACTIVATION == "hardtanh":
        x = tl.where(x < P0, P0, tl.where(x > P1, P1, x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * ROOT_HALF))
    elif ACTIVATION == "gelu_tanh":
        x = 0.5 * x * (1 + gelu_tanh_inner(x))
    elif ACTIVATION == "silu":
        x = x * sigmoid(x)
    elif ACTIVATION == "sigmoid":
        x = sigmoid(x)
    elif ACTIVATION == "tanh":
        x = tanh(x)
    elif ACTIVATION == "hardswish":
        x = tl.where(x <= -3, 0.0, tl.where(x >= 3, x, x * (x + 3) / 6))
    elif ACTIVATION == "elu":
        x = tl.where(x > 0, x, P0 * expm1(x))
    elif ACTIVATION == "softplus":
        x = tl.where(x * P0 > P1, x, log1p_exp(x * P0) / P0)
    else:
        tl.static_assert(ACTIVATION == "none")
    return x


@triton.jit
def slope(x, ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """The activation's derivative at `x`; those that are 0 or 1 somewhere are taken by `backward`."""
    if ACTIVATION == "gelu":
        x = 0.5 * (1 + tl.erf(x * ROOT_HALF)) + x * ONE_OVER_ROOT_TWO_PI * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        t = gelu_tanh_inner(x)
        x = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (1 + x * x * (3 * CUBIC)) * ROOT_TWO_OVER_PI
    elif ACTIVATION == "silu":
        s = sigmoid(x)
        x = s * (1 + x * (1 - s))
    elif ACTIVATION == "sigmoid":
        s = sigmoid(x)
        x = s * (1 - s)
    elif ACTIVATION == "tanh":
        t = tanh(x)
        x = 1 - t * t
    else:
        tl.static_assert(ACTIVATION == "softplus")
        x = tl.where(x * P0 > P1, 1.0, sigmoid(x * P0))
    return x


@triton.jit
def backward(g, x, ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """What comes in for the activation's argument `x`, from what comes in for its output."""
    if ACTIVATION == "none":
        result = g
    elif ACTIVATION == "relu":
        result = tl.where(x <= 0, 0.0, g)
    elif ACTIVATION == "leaky_relu":
        result = tl.where(x > 0, g, g * P0)
    elif ACTIVATION == "clamp":
        result = tl.where((x >= P0) & (x <= P1), g, 0.0)
    elif ACTIVATION == "hardtanh":
        result = tl.where((x <= P0) | (x >= P1), 0.0, g)
    elif ACTIVATION == "hardswish":
        result = tl.where(x <= -3, 0.0, tl.where(x < 3, g * (x / 3 + 0.5), g))
    elif ACTIVATION == "elu":
        result = tl.where(x <= 0, g * P0 * tl.exp(x), g)
    else:
        result = g * slope(x, ACTIVATION, P0, P1)
    return result


@triton.jit
def backward_from_output(g, out, ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """The same from the activation's output, for those whose output tells."""
    if ACTIVATION == "sigmoid":
        result = g * (1 - out) * out
    elif ACTIVATION == "tanh":
        result = g * (1 - out * out)
    elif ACTIVATION == "elu":
        result = tl.where(out <= 0, g * (out + P0), g)
    else:
        tl.static_assert(
            ACTIVATION == "none" or ACTIVATION == "relu" or ACTIVATION == "leaky_relu" or ACTIVATION == "hardtanh"
        )
        result = backward(g, out, ACTIVATION, P0, P1)
    return result
