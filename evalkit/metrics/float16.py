"""The reference evaluator's distances in float16, emulated bit by bit on any device.

A block of distances with an overflow is computed in float32 instead, as the reference evaluator does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evalkit.metrics.points import Points, block_rows

__all__ = ["REFERENCE_BLOCK", "Float16", "brute_force", "float16_norms", "may_overflow"]

REFERENCE_BLOCK = 10_000
"""Rows and columns of the reference evaluator's blocks; one overflow and the whole block is float32."""


class Float16:
    """Points whose squared distances are rounded as in the reference evaluator's float16 graph."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.half()
        self.norms = float16_norms(self.x)
        true_norms = torch.cat(
            [b.double().square().sum(dim=1) for b in torch.split(self.x, block_rows(x.shape[1]))]
        )
        # Product and first difference each have an error of at most 2^-11 (|u|^2 + |v|^2); the error of the
        # norms is known exactly; 2^-22 covers subnormal results.
        self.slack = 2.1 * 2**-11 * true_norms - (self.norms.double() - true_norms) + 2**-22

    def distances(self, i: Tensor, other: Points, j: Tensor) -> Tensor:
        """(pairs,) float64; see :class:`~evalkit.metrics.points.Points`."""
        assert isinstance(other, Float16)
        product = self.x.index_select(0, i).float()
        product *= other.x.index_select(0, j).float()  # two float16: exact in float32
        return _float16_distance(self.norms[i], product.double().sum(dim=1), other.norms[j])


def _float16_distance(u_norms: Tensor, product: Tensor, v_norms: Tensor) -> Tensor:
    """``max(|u|^2 - 2uv + |v|^2, 0)`` from an exact product, rounded to float16 after every operation."""
    distance: Tensor = (u_norms - 2 * product.half() + v_norms).clamp(min=0).double()
    return distance


def float16_norms(x: Tensor) -> Tensor:
    """(n,) float16 sums of squares of (n, d) float16, in the order of TensorFlow's CPU kernel.

    Eigen splits more than 1600 numbers in halves, sums each half in four registers of eight partial sums,
    adds the registers in float16 and their lanes in float32. Checked for d = 2048; other widths are padded.
    """
    if x.shape[1] > 1600:
        left, right = x.tensor_split(2, dim=1)
        return float16_norms(left) + float16_norms(right)
    squares = torch.nn.functional.pad(x * x, (0, -x.shape[1] % 32)).view(len(x), -1, 4, 8)
    sums = squares[:, 0]
    for step in range(1, squares.shape[1]):
        sums = sums + squares[:, step]
    a, b, c, d = sums.unbind(dim=1)
    return (((a + b) + c) + d).float().sum(dim=1).half()


def may_overflow(r: Float16, s: Float16) -> bool:
    """Whether an operation of a float16 distance can exceed 65504, the largest float16."""
    largest = torch.cat([r.norms, s.norms]).double().max()
    # (|u| + |v|)^2 bounds every operand.
    return not bool(4 * largest < 60_000)


def brute_force(r: Tensor, s: Tensor, k: int) -> tuple[float, float]:
    """Precision and recall from all distances, in the reference evaluator's blocks.

    Args:
        r: (n, d) float32 features of the reference.
        s: (m, d) float32 features of the samples.
        k: The radius of a ball reaches to this nearest neighbour.
    """
    radii_r, radii_s = (
        torch.cat(
            [
                torch.cat(
                    [_reference_block(rows, columns) for columns in torch.split(x, REFERENCE_BLOCK)], dim=1
                )
                .kthvalue(k + 1, dim=1)
                .values
                for rows in torch.split(x, REFERENCE_BLOCK)
            ]
        )
        for x in (r, s)
    )
    samples_inside = torch.zeros(len(s), dtype=torch.bool, device=s.device)
    reference_inside = torch.zeros(len(r), dtype=torch.bool, device=r.device)
    for i in torch.split(torch.arange(len(r), device=r.device), REFERENCE_BLOCK):
        for j in torch.split(torch.arange(len(s), device=s.device), REFERENCE_BLOCK):
            distances = _reference_block(r[i], s[j])
            samples_inside[j] |= (distances <= radii_r[i, None]).any(dim=0)
            reference_inside[i] |= (distances <= radii_s[j]).any(dim=1)
    return float(samples_inside.double().mean()), float(reference_inside.double().mean())


def _reference_block(u: Tensor, v: Tensor) -> Tensor:
    """(rows, columns) squared distances of one block as float32: rounded to float16 unless one overflows."""
    half_u, half_v = u.half(), v.half()
    u_norms, v_norms = float16_norms(half_u), float16_norms(half_v)
    wide_v = half_v.double().T
    distances = torch.cat(
        [
            _float16_distance(norms[:, None], rows.double() @ wide_v, v_norms).float()
            for rows, norms in zip(
                torch.split(half_u, block_rows(len(v))), torch.split(u_norms, block_rows(len(v))), strict=True
            )
        ]
    )
    if distances.isfinite().all():
        return distances
    distances = torch.addmm(v.square().sum(dim=1), u, v.T, alpha=-2)
    return distances.add_(u.square().sum(dim=1)[:, None]).clamp_(min=0)
