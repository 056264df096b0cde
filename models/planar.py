"""Planar feature maps: real tensors (B, M, N, p·C) with channels last and the parts of complex numbers apart.

p is 1 for a real map and 2 for a complex one, whose real parts come first.
"""

from dataclasses import dataclass

import torch

RE, MODULUS, IM = range(3)  # the blocks of columns of [z, |z|]


def to_planar(x):
    """(B, C, M, N) real or complex -> (B, M, N, p·C) real, contiguous; real parts first."""
    x = x.movedim(1, -1)
    return torch.cat([x.real, x.imag], -1) if x.is_complex() else x.contiguous()


def from_planar(x, parts):
    """The inverse of `to_planar`."""
    x = x.movedim(-1, 1)
    return x if parts == 1 else torch.complex(*x.chunk(2, 1))


def consecutive(matrices):
    """(slice of rows, slice of columns) of each matrix on the diagonal of the block matrix that they make up."""
    slices, row, column = [], 0, 0
    for matrix in matrices:
        rows, columns = matrix.shape
        slices.append((slice(row, row + rows), slice(column, column + columns)))
        row, column = row + rows, column + columns
    return slices


@dataclass(frozen=True)
class Piece:
    """A part of W that is a block of a real matrix: what a block of columns adds to the real or imaginary part of y."""

    output: int  # 0: the real part of y; 1: the imaginary part
    block: int  # of columns
    part: int  # of W: 0 real, 1 imaginary
    sign: int = 1


_PIECES = {  # by (skip, whether W is complex)
    (False, False): (Piece(0, 0, 0),),
    (False, True): (Piece(0, 0, 0), Piece(1, 0, 1)),
    (True, False): (Piece(0, RE, 0), Piece(0, MODULUS, 0), Piece(1, IM, 0)),
    (True, True): (
        *(Piece(0, RE, 0), Piece(0, MODULUS, 0), Piece(0, IM, 1, -1)),
        *(Piece(1, RE, 1), Piece(1, MODULUS, 1), Piece(1, IM, 0)),
    ),
}


@dataclass(frozen=True)
class ColumnLayout:
    """How the features of a block lie in the columns of a real matrix, and what W becomes there.

    Canonical channels are [φ, |ψ|], or [z, |z|] of z = [φ, ψ] with `skip`; ψ has `filters` channels for each of the
    `channels` of the input, the filter index fastest. Columns are one block [φ, |ψ|], or the blocks [Re z, |z|, Im z];
    in each the filter index is slowest.
    """

    channels: int
    filters: int
    skip: bool

    @property
    def block(self):
        """Columns of a block."""
        return self.channels * (1 + self.filters)

    @property
    def width(self):
        """Number of columns."""
        return self.block * (3 if self.skip else 1)

    def _as_columns(self, values):
        """Values of the channels of φ and ψ, (D,), in the order of the columns of a block."""
        phi, psi = values[: self.channels], values[self.channels :]
        return torch.cat([phi, psi.view(self.channels, self.filters).t().flatten()])

    def _as_channels(self, values):
        """The inverse of `_as_columns`."""
        phi, psi = values[: self.channels], values[self.channels :]
        return torch.cat([phi, psi.view(self.filters, self.channels).t().flatten()])

    def places(self, device=None):
        """The column in its block, (D,), of each channel of φ and ψ."""
        return self._as_channels(torch.arange(self.block, device=device))

    def to_columns(self, mean, var):
        """Mean and variance of the canonical channels -> those of the columns."""
        if not self.skip:
            return self._as_columns(mean), self._as_columns(var)
        (z, modulus), (z_var, modulus_var) = ([self._as_columns(half) for half in v.chunk(2)] for v in (mean, var))
        return torch.cat([z.real, modulus.real, z.imag]), torch.cat([z_var, modulus_var, z_var])

    def to_channels(self, mean, var):
        """The inverse of `to_columns`."""
        if not self.skip:
            return self._as_channels(mean), self._as_channels(var)
        real, modulus, imaginary = (self._as_channels(block) for block in mean.chunk(3))
        z_var, modulus_var, _ = (self._as_channels(block) for block in var.chunk(3))
        mean = torch.cat([torch.complex(real, imaginary), modulus.to(torch.cfloat)])
        return mean, torch.cat([z_var, modulus_var])

    def tied(self, values):
        """Sums (width,) over the real numbers that one r of W diag(r) scales: Re z and Im z share theirs."""
        if not self.skip:
            return values
        real, modulus, imaginary = values.chunk(3)
        return torch.cat([real + imaginary, modulus, real + imaginary])

    def features_of(self, columns):
        """Maps of the columns, (B, M, N, width), -> the canonical features (B, D, M, N)."""
        columns, places = columns.movedim(-1, 1), self.places(columns.device)
        if not self.skip:
            return columns[:, places]
        real, modulus, imaginary = (block[:, places] for block in columns.chunk(3, 1))
        return torch.cat([torch.complex(real, imaginary), modulus.to(torch.cfloat)], 1)

    def fold(self, weight, scale):
        """W (C', D) in canonical order -> the real matrices of W diag(r), giving consecutive columns of y; scale: r.

        Real weights of a complex z are two matrices, without zeros: Im y comes from Im z alone.
        """
        rows = len(weight) * (1 + weight.is_complex())
        widths = [2 * self.block, self.block] if self.skip and not weight.is_complex() else [self.width]
        matrices = [scale.new_empty(rows, width) for width in widths]
        for piece in _PIECES[self.skip, weight.is_complex()]:
            for target, source, factor in self._views(piece, weight, matrices, scale):
                torch.mul(source, factor, out=target)
        return matrices

    def unfold(self, gradients, weight, scale):
        """Gradients of the real matrices of W diag(r) -> the gradient of W."""
        total, begun = torch.empty_like(weight), set()
        for piece in _PIECES[self.skip, weight.is_complex()]:
            entries = piece.part, piece.block == MODULUS
            for gradient, target, factor in self._views(piece, total, gradients, scale):
                if entries in begun:
                    target.addcmul_(gradient, factor)
                else:
                    torch.mul(gradient, factor, out=target)
            begun.add(entries)
        return total

    def _views(self, piece, weight, matrices, scale):
        """Views of a piece, first of φ (rows, C), then of ψ (rows, n, C): (in a matrix, in W, factor between them)."""
        rows, c, n = len(weight), self.channels, self.filters
        number = min(piece.output, len(matrices) - 1)
        y, columns = consecutive(matrices)[number]
        row, column = piece.output * rows - y.start, piece.block * self.block - columns.start
        real = matrices[number][row : row + rows, column : column + self.block]
        part = torch.view_as_real(weight)[..., piece.part] if weight.is_complex() else weight
        part = part[:, self.block :] if piece.block == MODULUS else part[:, : self.block]
        factor = piece.sign * scale[piece.block * self.block :][: self.block]
        yield real[:, :c], part[:, :c], factor[:c]
        yield real[:, c:].unflatten(1, (n, c)), part[:, c:].unflatten(1, (c, n)).mT, factor[c:].view(n, c)
