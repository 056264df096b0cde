"""The wavelet transform of a block (`Fw`): low-pass φ and band-pass ψ, through their own modules, then concatenated."""

import torch
from torch import nn

from models.names import PLAIN
from models.signal import output_size, padded_size, padding_indices
from models.wavelets import filter_bank


def reference_transform(x, bank, subsample):
    """The wavelet transform by FFT, in the plainest form: the standard that the fast one is compared with.

    Args:
        x: (B, C, M, N) real or complex.
        bank: (n + 1, P, Q) real DFTs of ψ_0 .. ψ_{n-1}, φ at the padded size.
        subsample: whether to keep every second sample.

    Returns:
        φ (B, C, M', N') of x's type and ψ (B, C·n, M', N') complex, the filter index fastest.
    """
    rows, columns = padding_indices(x.shape[2]), padding_indices(x.shape[3])
    padded = x[:, :, rows][:, :, :, columns]  # (B, C, P, Q)
    product = torch.fft.fft2(padded)[:, :, None] * bank  # (B, C, n + 1, P, Q)
    if subsample:
        p, q = product.shape[-2:]
        product = product.unflatten(-2, (2, p // 2)).unflatten(-1, (2, q // 2)).mean((-4, -2))  # (…, P/2, Q/2)
    crop = 1 if subsample else 2
    filtered = torch.fft.ifft2(product)[..., crop:-crop, crop:-crop]  # (B, C, n + 1, M', N')
    phi = filtered[:, :, -1]
    return (phi if x.is_complex() else phi.real), filtered[:, :, :-1].flatten(1, 2)


class WaveletTransform(nn.Module):
    """(B, C, M, N) -> [φ, ψ] (B, C + C·n, M', N'), after the modules `phi` and `psi`; complex if either part is.

    n = L angles (times S scales in a plain block); φ alone when L = 0.

    Raises ValueError: an image axis too small for the transform.
    """

    def __init__(self, signal, angles, kind=PLAIN, scales_per_octave=1, full_angles=False):
        super().__init__()
        self.subsample = kind != 0
        height, width = (output_size(size, self.subsample) for size in (signal.height, signal.width))
        if min(height, width) < 1:
            raise ValueError(f"an image of {signal.height}×{signal.width} is too small for another wavelet transform")
        bank = filter_bank(
            padded_size(signal.height), padded_size(signal.width), angles, kind, scales_per_octave, full_angles
        )
        self.register_buffer("bank", torch.from_numpy(bank.copy()), persistent=False)
        self.number = len(bank) - 1
        self.phi_signal = signal.with_(height=height, width=width)
        self.psi_signal = self.phi_signal.with_(channels=signal.channels * self.number, complex=True)
        self.phi, self.psi = nn.Identity(), nn.Identity()
        self._set_out(self.phi_signal, self.psi_signal)

    def attach(self, phi, phi_out, psi, psi_out):
        """Put modules after φ and after ψ, with the types of their outputs."""
        if (phi_out.height, phi_out.width) != (psi_out.height, psi_out.width):
            raise ValueError(f"φ ({phi_out}) and ψ ({psi_out}) differ in size: they cannot be concatenated")
        self.phi, self.psi = phi, psi
        self._set_out(phi_out, psi_out)

    def _set_out(self, phi_out, psi_out):
        if self.number == 0:
            self.out = phi_out
        else:
            self.out = phi_out.with_(
                channels=phi_out.channels + psi_out.channels, complex=phi_out.complex or psi_out.complex
            )

    def forward(self, x):
        phi, psi = reference_transform(x, self.bank, self.subsample)
        if self.number == 0:
            return self.phi(phi)
        return concatenate(self.phi(phi), self.psi(psi))


def concatenate(*parts):
    """Concatenate along channels; complex if any part is."""
    if any(part.is_complex() for part in parts):
        parts = [part if part.is_complex() else part.to(torch.cfloat) for part in parts]
    return torch.cat(parts, 1)
