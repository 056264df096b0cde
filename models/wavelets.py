"""Morlet filters (numpy), as the paper's networks use them: sampled in space, used through the real part of their DFT.

The filters are those of kymatio, down to its value 3.1415 of π in the normalisation, so that weights trained with the
authors' program keep their meaning.
"""

import math
from functools import cache

import numpy as np

from models.names import PLAIN

SIGMA = 0.8
XI = 3 * math.pi / 4
_TILES = range(-2, 3)  # the filters are made periodic by summing over 5 × 5 tiles


def gabor(height, width, sigma, theta=0.0, xi=0.0, slant=1.0):
    """Periodised Gabor filter, (height, width) complex128: exp(-uᵀKu + iξ⟨u, e_θ⟩) / (2·3.1415·σ²/slant).

    K = R_θ diag(1, slant²) R_{-θ} / (2σ²); u runs over the integer grid, its first coordinate over rows.
    """
    cos, sin = math.cos(theta), math.sin(theta)
    rotation = np.array([[cos, -sin], [sin, cos]])
    curvature = rotation @ np.diag([1.0, slant**2]) @ rotation.T / (2 * sigma**2)
    filt = np.zeros((height, width), dtype=np.complex128)
    for tile_y in _TILES:
        for tile_x in _TILES:
            x, y = np.mgrid[tile_y * height : (tile_y + 1) * height, tile_x * width : (tile_x + 1) * width]
            quadratic = curvature[0, 0] * x**2 + 2 * curvature[0, 1] * x * y + curvature[1, 1] * y**2
            filt += np.exp(-quadratic + 1j * xi * (x * cos + y * sin))
    return filt / (2 * 3.1415 * sigma**2 / slant)


def morlet(height, width, sigma, theta, xi, slant):
    """Gabor filter with its mean removed by its own envelope, (height, width) complex128."""
    wave = gabor(height, width, sigma, theta, xi, slant)
    envelope = gabor(height, width, sigma, theta, 0.0, slant)
    return wave - wave.sum() / envelope.sum() * envelope


def angles(number, full=False):
    """The orientations θ_l = (int(L - L/2 - 1) - l)·max/L, l = 0..L-1, over [0, π) or (`full`) [0, 2π)."""
    largest = 2 * math.pi if full else math.pi
    return [(int(number - number / 2 - 1) - index) * largest / number for index in range(number)]


@cache
def filter_bank(height, width, number_angles, kind=PLAIN, scales_per_octave=1, full_angles=False):
    """Real 2-D DFT of the filters, (n + 1, height, width) float32: ψ_0 .. ψ_{n-1} (angles fastest), then φ.

    `kind`: "plain" (scales 0, 1/S, … < 1; then subsampled by 2), or the step 0 (ψ_1, φ_1/2) or 1 (ψ_3/2, φ_1/2;
    subsampled by 2) of a factorised octave.
    """
    half_turn_angles = number_angles / 2 if full_angles else number_angles
    slant = 4 / half_turn_angles if number_angles else 1.0
    if kind == PLAIN:
        scales = [2 ** (index / scales_per_octave) for index in range(scales_per_octave)]
        band_pass = [(SIGMA * scale, XI / scale, slant) for scale in scales]
        low_pass = gabor(height, width, SIGMA)
    else:
        if kind == 0:
            band_pass = [(SIGMA, XI, slant)]
        else:
            if slant >= 2:
                raise ValueError(f"factorised blocks need at least 3 angles over [0, π), not {half_turn_angles:g}")
            narrower = math.sqrt(3 * slant**2 / (4 - slant**2))
            band_pass = [(SIGMA * math.sqrt(3 / 2), math.pi / math.sqrt(2), narrower)]
        low_pass = gabor(height, width, SIGMA / math.sqrt(2))
    filters = [
        morlet(height, width, sigma, theta, xi, slant)
        for sigma, xi, slant in band_pass
        for theta in angles(number_angles, full_angles)
    ]
    bank = np.fft.fft2(np.stack([*filters, low_pass])).real.astype(np.float32)
    bank.setflags(write=False)
    return bank
