"""How far single precision may be from exact arithmetic: from the number of terms, not from what was seen.

n additions in single precision err by √n u relative to the sum of the terms' absolute values, u = 2⁻²⁴, if roundings
are independent (Higham and Mary, 2019); four times as much once in many thousands.
"""

import math

import torch

UNIT = 2.0**-24
AT_ONCE = 8192  # samples that the analysis adds in single precision


def of_sum(terms, at_once=AT_ONCE):
    """Relative error of a sum over so many samples."""
    return 4 * UNIT * math.sqrt(min(terms, at_once))


def assert_products(found, a, b=None, steps=1):
    """`found` is Σ φ_a φ_b^H (its real part, if it is real) of samples (n, D); `steps` sums led to their values."""
    a, b = (x.to(torch.complex128 if x.is_complex() else torch.float64) for x in (a, a if b is None else b))
    dtype = torch.promote_types(a.dtype, b.dtype)
    expected = a.T.to(dtype) @ b.to(dtype).conj()
    error = (found - (expected if found.is_complex() else expected.real)).abs()
    assert (error <= steps * of_sum(len(a)) * (a.abs().T @ b.abs())).all()


def assert_values(found, expected, terms, steps=1):
    """Values that `steps` sums of so many terms led to, one after another, are as expected."""
    atol = steps * of_sum(terms) * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
