"""The chi distribution far out in its tail: the radius of a standard normal vector, in any dimension."""

import numpy as np
from scipy import special


Array = np.ndarray

# Below this probability float64 itself runs out; above it scipy's functions are exact to a dozen digits.
_SMALLEST = 1e-280


def log_survival(dim: int, radius: Array | float) -> Array:
    """log Pr(|x| > radius) for x ~ N(0, I) in `dim` dimensions, in nats: log Q(d/2, radius²/2)."""
    return _log_q(dim / 2, np.atleast_1d(np.square(np.asarray(radius, dtype=np.float64)) / 2))


def radius_beyond(dim: int, inner: float, uniform: Array) -> Array:
    """The radius whose survival is `uniform` times that of `inner`: inverse CDF of chi truncated below at `inner`.

    Args:
        dim: Dimension d.
        inner: Where the distribution is truncated, >= 0.
        uniform: Numbers in (0, 1].
    """
    shape, start = dim / 2, inner**2 / 2
    target = _log_q(shape, np.array([start])) + np.log(uniform)
    with np.errstate(under="ignore"):
        half = special.gammainccinv(shape, np.exp(target))
    tail = target < np.log(_SMALLEST)
    if tail.any():
        # Newton's iteration on log Q, smooth and nearly straight out there, so that a few steps reach the last digit.
        point = np.full(int(tail.sum()), max(start, shape))
        for _ in range(100):
            survival = _log_q(shape, point)
            density = (shape - 1) * np.log(point) - point - special.gammaln(shape)
            step = (survival - target[tail]) * np.exp(survival - density)
            point = np.maximum(point + step, np.maximum(start, shape / 2))
            if np.all(np.abs(step) <= 1e-13 * point):
                break
        half[tail] = point
    # Rounding of the inverse must not carry a draw over the edge.
    return np.maximum(np.sqrt(2 * half), inner)


def _log_q(shape: float, point: Array) -> Array:
    """log Γ(shape, point) / Γ(shape), the regularized upper incomplete gamma function."""
    with np.errstate(divide="ignore", under="ignore"):
        upper = special.gammaincc(shape, point)
        # Near 1 the upper function has lost the digits that the lower one has.
        result = np.where(upper < 0.5, np.log(upper), np.log1p(-special.gammainc(shape, point)))
    tail = upper < _SMALLEST
    if tail.any():
        result[tail] = _log_q_tail(shape, point[tail])
    return result


def _log_q_tail(shape: float, point: Array) -> Array:
    """Legendre's continued fraction by Lentz's method; it converges fast where `point` is well beyond `shape`."""
    term = point + 1 - shape
    ratio, inverse, product = np.full_like(point, np.inf), 1 / term, 1 / term
    for index in range(1, 10_000):
        numerator = index * (shape - index)
        term = term + 2
        inverse = 1 / (term + numerator * inverse)
        ratio = term + numerator / ratio
        change = ratio * inverse
        product = product * change
        if np.all(np.abs(change - 1) < 1e-15):
            break
    return shape * np.log(point) - point - special.gammaln(shape) + np.log(product)
