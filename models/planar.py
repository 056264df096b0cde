"""Planar feature maps: real tensors (B, M, N, p·C) with channels last and the parts of complex numbers apart.

p is 1 for a real map and 2 for a complex one, whose real parts come first.
"""

from dataclasses import dataclass

import torch
from torch import nn

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


class ColumnLayout(nn.Module):
    """How the features of a block lie in the columns of a real matrix, and what W becomes there.

    Canonical channels are [φ, |ψ|], or [z, |z|] of z = [φ, ψ] with `skip`; ψ has `filters` channels for each of the
    `channels` of the input, the filter index fastest. Columns are one block [φ, |ψ|], or the blocks [Re z, |z|, Im z];
    in each the filter index is slowest. `places`: the column in its block of each channel; `order`: the inverse.
    """

    def __init__(self, channels, filters, skip):
        super().__init__()
        self.channels, self.filters, self.skip = channels, filters, skip
        self.block = channels * (1 + filters)  # columns of a block
        self.width = self.block * (3 if skip else 1)
        psi = channels + torch.arange(channels * filters).view(channels, filters)
        order = torch.cat([torch.arange(channels), psi.t().flatten()])
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("places", torch.argsort(order), persistent=False)

    def to_columns(self, mean, var):
        """Mean and variance of the canonical channels -> those of the columns."""
        if not self.skip:
            return mean[self.order], var[self.order]
        (z, modulus), (z_var, modulus_var) = ([half[self.order] for half in v.chunk(2)] for v in (mean, var))
        return torch.cat([z.real, modulus.real, z.imag]), torch.cat([z_var, modulus_var, z_var])

    def to_channels(self, mean, var):
        """The inverse of `to_columns`."""
        if not self.skip:
            return mean[self.places], var[self.places]
        real, modulus, imaginary = (block[self.places] for block in mean.chunk(3))
        z_var, modulus_var, _ = (block[self.places] for block in var.chunk(3))
        mean = torch.cat([torch.complex(real, imaginary), modulus.to(torch.cfloat)])
        return mean, torch.cat([z_var, modulus_var])

    def parts_of(self, columns):
        """Real and imaginary parts of columns, each with its order: channel d's real part is column order[d].

        The imaginary part is (None, None) for real features; it is that of the first channels, those of z.
        """
        if not self.skip:
            return (columns, self.places), (None, None)
        order = torch.cat([self.places, self.block + self.places])
        return (columns[:, : 2 * self.block], order), (columns[:, 2 * self.block :], self.places)

    def features_of(self, columns):
        """Maps of the columns, (B, M, N, width), -> the canonical features (B, D, M, N)."""
        columns = columns.movedim(-1, 1)
        if not self.skip:
            return columns[:, self.places]
        real, modulus, imaginary = (block[:, self.places] for block in columns.chunk(3, 1))
        return torch.cat([torch.complex(real, imaginary), modulus.to(torch.cfloat)], 1)

    def tied(self, values):
        """Sums (width,) over the real numbers that one r of W diag(r) scales: Re z and Im z share theirs."""
        if not self.skip:
            return values
        real, modulus, imaginary = values.chunk(3)
        return torch.cat([real + imaginary, modulus, real + imaginary])

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
