"""The wavelet transform of a block (`Fw`): low-pass φ and band-pass ψ, through their own modules, then concatenated."""

import torch
from torch import nn

from models.config import BlockConfig
from models.signal import output_size, padded_size, padding_indices
from models.standardization import single
from models.wavelets import filter_bank


def reference_transform(x, bank, subsample):
    """The wavelet transform by FFT, in the plainest form: the standard that the fast one is compared with.

    x (B, C, M, N) real or complex and `bank`, the real DFTs (n + 1, P, Q) of ψ_0 .. ψ_{n-1}, φ at the padded size ->
    φ (B, C, M', N') of x's type and ψ (B, C·n, M', N') complex, the filter index fastest, subsampled by 2 or not.
    """
    rows, columns = padding_indices(x.shape[2]), padding_indices(x.shape[3])
    padded = single(x)[:, :, rows][:, :, :, columns]  # (B, C, P, Q)
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

    n = L angles (times S scales in a plain block); φ alone if L = 0. `build(names, signal)` makes `phi` and `psi`.

    Raises ValueError: an image axis too small for the transform.
    """

    def __init__(self, signal, config: BlockConfig, build):
        super().__init__()
        shape = signal.height, signal.width
        self.subsample = config.kind != 0
        height, width = (output_size(size, self.subsample) for size in shape)
        if min(height, width) < 1:
            raise ValueError(f"an image of {shape[0]}×{shape[1]} is too small for another wavelet transform")
        options = config.angles, config.kind, config.scales_per_octave, config.full_angles
        bank = filter_bank(*map(padded_size, shape), *options)
        self.register_buffer("bank", torch.from_numpy(bank.copy()), persistent=False)
        self.number = len(bank) - 1
        signal = signal.with_(height=height, width=width)
        self.phi, self.psi = build(config.phi_arch, signal), nn.Identity()
        self.out = self.phi.out
        if self.number:
            self.psi = build(config.psi_arch, signal.with_(channels=signal.channels * self.number, complex=True))
            self.out = self.phi.out.joined(self.psi.out)

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
