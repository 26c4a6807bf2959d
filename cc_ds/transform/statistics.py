"""What least squares needs of the rows, whatever their number: S^T S, S^T E and |E|^2, in float64.

Rows come in blocks and are forgotten. Products of a block are taken in `products` precision and added up in float64.
Float32 products are more than twice as fast and lose nothing that counts where S is well conditioned; `solve` says
where it is not, and the rows are then read again with float64 products. Even those square the condition of S, which
costs the directions of S below 1e-7 of its largest: less than the rounding of float32 activations, so nothing that was
ever measured.

Shapes: H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows in one product: enough that adding it up in float64 is cheap, few enough that float32 sums stay sharp.
_BLOCK_ROWS = 8192
# S^T S is symmetric: panels of so many columns, each from its diagonal on.
_PANEL = 512


class Statistics:
    """Sums over rows (s, e) of pairs of activations."""

    def __init__(self, hidden_size: int, products: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.products = products
        self.gram = torch.zeros(hidden_size, hidden_size, dtype=torch.float64, device=device)
        """S^T S, (H, H); while rows are added, its upper triangle alone."""
        self.cross = torch.zeros_like(self.gram)
        """S^T E, (H, H)."""
        self.energy = torch.zeros((), dtype=torch.float64, device=device)
        """|E|^2."""
        self.rows = 0

    def add(self, source: Tensor, target: Tensor) -> None:
        """Add rows S and E, each (n, H)."""
        for start in range(0, len(source), _BLOCK_ROWS):
            s = source[start : start + _BLOCK_ROWS].to(self.gram.device, self.products)
            e = target[start : start + _BLOCK_ROWS].to(self.gram.device, self.products)
            for left in range(0, s.shape[1], _PANEL):
                right = min(left + _PANEL, s.shape[1])
                self.gram[left:right, left:] += s[:, left:right].T @ s[:, left:]
            for left in range(0, s.shape[1], 4 * _PANEL):  # in panels: no product of the whole size is ever held
                self.cross[left : left + 4 * _PANEL] += s[:, left : left + 4 * _PANEL].T @ e
            self.energy += torch.linalg.vecdot(e, e).double().sum()  # of each row, then of all: no copy of E is made
            self.rows += len(s)

    def complete(self, group=None) -> Statistics:
        """Add up over the ranks of `group` and fill the lower triangle; call it once, when all rows are in."""
        if group is not None:
            for tensor in (self.gram, self.cross, self.energy):
                group.sum(tensor)
            self.rows = sum(group.gather(self.rows))
        for left in range(0, len(self.gram), _PANEL):
            right = left + _PANEL
            self.gram[right:, left:right] = self.gram[left:right, right:].T
            corner = self.gram[left:right, left:right]
            corner.copy_(corner.triu() + corner.triu(1).T)
        return self

    def merge(self, other: Statistics) -> Statistics:
        """Add the sums of other rows to these."""
        self.gram += other.gram
        self.cross += other.cross
        self.energy += other.energy
        self.rows += other.rows
        return self
