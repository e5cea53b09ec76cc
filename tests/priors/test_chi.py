"""The tail of the chi distribution against mpmath's arbitrary precision."""

import mpmath
import numpy as np
import pytest

from priors_peft.priors.chi import log_survival, radius_beyond


@pytest.mark.parametrize(
    ("dim", "radius"), [(1, 40.0), (2, 1.0), (2, 40.0), (64, 50.0), (2048, 30.0), (2048, 80.0), (4096, 63.0), (4096, 200.0)]
)  # fmt: skip
def test_survival_and_its_inverse_hold_far_beyond_underflow(dim, radius):
    with mpmath.workdps(40):
        expected = mpmath.log(mpmath.gammainc(mpmath.mpf(dim) / 2, mpmath.mpf(radius) ** 2 / 2, regularized=True))
    survival = log_survival(dim, radius)[0]
    assert survival == pytest.approx(float(expected), rel=1e-12, abs=1e-15)
    uniform = np.array([1.0, 0.5, 1e-3, 1e-12])
    beyond = radius_beyond(dim, radius, uniform)
    assert (beyond >= radius).all()
    np.testing.assert_allclose(log_survival(dim, beyond) - survival, np.log(uniform), atol=1e-9)
