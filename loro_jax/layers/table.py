"""The table of a network's layers: shapes, ranks, parameters and operations."""

from __future__ import annotations

import dataclasses
import math

Cells = list[str]

_HEADER: Cells = ["layer", "shape", "rank", "parameters", "now", "FLOPs a token", "now"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        path: its path in the network.
        leading: numbers of matrices, over the axes of a stack and of a batch.
        shape: outputs and inputs of each matrix, (m, n).
        rank: r; None: dense.
        bias: number of entries of the bias.
        error: relative error of the product against the dense weight; None: not known.
    """

    path: str
    leading: tuple[int, ...]
    shape: tuple[int, int]
    rank: int | None = None
    bias: int = 0
    error: float | None = None

    @property
    def matrices(self) -> int:
        """Number of matrices."""
        return math.prod(self.leading)

    @property
    def before(self) -> int:
        """Parameters of the dense layer."""
        return self.matrices * math.prod(self.shape) + self.bias

    @property
    def after(self) -> int:
        """Parameters of the layer as it is."""
        if self.rank is None:
            return self.before
        return self.matrices * self.rank * sum(self.shape) + self.bias

    @property
    def flops_before(self) -> int:
        """Operations per token of the dense layer, forward and backward."""
        return 6 * self.matrices * math.prod(self.shape)

    @property
    def flops_after(self) -> int:
        """Operations per token of the layer as it is, forward and backward."""
        if self.rank is None:
            return self.flops_before
        return 6 * self.matrices * self.rank * sum(self.shape)


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """The layers of a network that are, or could be, low-rank; printing it shows a table.

    Operations are those of products with weights, forward and backward, for each row of the input:
    for a token, or for one position of a convolution's output.

    Attributes:
        rows: the layers.
        others: parameters outside of these layers.

    Example:
        >>> print(Summary((Row("q", (2,), (64, 64), rank=8),), others=100))
        layer   shape        rank  parameters  now    FLOPs a token  now
        q       2 x 64 x 64  8     8,192       2,048  49,152         12,288
        others                     100         100
        total                      8,292       2,148  49,152         12,288
    """

    rows: tuple[Row, ...]
    others: int

    @property
    def parameters_before(self) -> int:
        """All parameters of the network with dense layers."""
        return self.others + sum(row.before for row in self.rows)

    @property
    def parameters(self) -> int:
        """All parameters of the network as it is."""
        return self.others + sum(row.after for row in self.rows)

    @property
    def flops_before(self) -> int:
        """Operations per token with dense layers, forward and backward."""
        return sum(row.flops_before for row in self.rows)

    @property
    def flops(self) -> int:
        """Operations per token as the network is, forward and backward."""
        return sum(row.flops_after for row in self.rows)

    def __str__(self) -> str:
        errors = any(row.error is not None for row in self.rows)
        table = [_HEADER + ["relative error"] * errors]
        table += [_cells(row) + [_percent(row.error)] * errors for row in self.rows]
        others = f"{self.others:,}"
        table.append(["others", "", "", others, others, "", ""] + [""] * errors)
        totals = [self.parameters_before, self.parameters, self.flops_before, self.flops]
        table.append(["total", "", "", *(f"{n:,}" for n in totals)] + [""] * errors)
        widths = [max(len(cells[i]) for cells in table) for i in range(len(table[0]))]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            for cells in table
        )
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__


def _cells(row: Row) -> Cells:
    shape = " x ".join(map(str, (*row.leading, *row.shape)))
    rank = "dense" if row.rank is None else str(row.rank)
    numbers = (row.before, row.after, row.flops_before, row.flops_after)
    return [row.path or "(the network)", shape, rank, *(f"{n:,}" for n in numbers)]


def _percent(error: float | None) -> str:
    return "" if error is None else f"{100 * error:.2f}%"
