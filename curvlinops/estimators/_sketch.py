"""Range bases of a sketch, with all of its columns and without any one of them."""

from __future__ import annotations

import torch
from torch import Tensor


def range_basis(Y: Tensor) -> Tensor:
    """Return orthonormal columns ``[D, k]`` whose span contains that of ``Y [D, k]``."""
    return torch.linalg.qr(Y).Q


def leave_one_out(Y: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return bases of the range of a sketch without each of its columns, from one decomposition.

    The range of all columns but the i-th is that of the projector
    :math:`P_i = U (I - s_i s_i^H) U^H`: where y_i is not in the range of the others, it is the
    range of all columns without one direction, else that of all columns, with :math:`s_i = 0`.

    Epperly, Tropp & Webber (2024) have the normalised columns of :math:`R^{-H}`, from the QR
    decomposition of Y, for the s_i. They do not exist if Y has not full rank, which is so for any
    matrix of small rank and for repeated vectors of signs. The singular vectors of R tell both
    cases apart, and no basis of the range is then chosen by rounding.

    Args:
        Y: Sketch ``[D, k]``.

    Returns:
        U ``[D, k]``, orthonormal columns that span the range of Y, or zeros after these if it has
        not full rank; and the s_i, columns ``[k, k]`` of norm 1 or 0.
    """
    with torch.autocast(Y.device.type, enabled=False):
        eps, k = torch.finfo(Y.dtype).eps, Y.shape[1]
        Q, R = torch.linalg.qr(Y)
        left, sizes, rightH = torch.linalg.svd(R)
        kept = sizes > k * eps * sizes[0]  # [k]
        # With C = Uᴴ Y of full row rank, s_i is orthogonal to all columns of C but the i-th, hence
        # a multiple of the i-th row of the pseudo-inverse of C. The factor keeps it finite.
        rows = torch.where(kept, sizes[0] / sizes, 0).unsqueeze(1) * rightH
        norms = torch.linalg.vector_norm(rows, dim=0)
        # Such an s_i exists if the i-th unit vector is orthogonal to the null space of Y.
        in_null_space = (rightH.abs().square() * ~kept.unsqueeze(1)).sum(0)
        exists = (in_null_space <= eps) & (norms > 0)
        S = rows * torch.where(exists, 1 / norms, 0)
        return Q @ (left * kept), S
