"""The properties of single blocks of Kronecker-factored operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from curvlinops.blockdiagonal import BlockDiagonalLinearOperator
from curvlinops.diag import DiagonalLinearOperator
from curvlinops.kfac import KFACLinearOperator
from curvlinops.kfac_utils import FisherType
from curvlinops.testing._check import wide
from curvlinops.testing._kfac_report import METHODS, Method
from curvlinops.testing._kfac_theory import NOT_APART, Rules, Theory, Verdict
from curvlinops.testing._kfac_trace import Evidence

#: KFAC with expand and with reduce.
KFAC_METHODS = METHODS[:2]


@dataclass(frozen=True)
class Complaints:
    """Compares with a tolerance, and raises errors that name the property.

    Attributes:
        rtol: The tolerance, relative to the norm of what is compared.
    """

    rtol: float

    def fail(self, what: str, reason: str, names: tuple[str, ...] = ()) -> NoReturn:
        """Raise the error that names the property and the block."""
        where = f" of {' + '.join(map(repr, names))}" if names else ""
        raise AssertionError(f"check_kfac: {what}{where}: {reason}")

    def close(
        self,
        what: str,
        reason: str,
        actual: Tensor,
        expected: Tensor,
        names: tuple[str, ...] = (),
        scale: float | None = None,
        slack: float = 1.0,
    ) -> None:
        """Fail if tensors differ by more than the tolerance (times the slack)."""
        if actual.shape != expected.shape:
            sizes = f"has shape {list(actual.shape)} instead of {list(expected.shape)}"
            self.fail(what, f"{reason}: {sizes}", names)
        scale = float(expected.norm()) if scale is None else scale
        error, tolerance = float((actual - expected).norm()), slack * self.rtol
        if not error <= tolerance * scale:  # also for NaN
            relative = error / scale if scale else float("inf")
            reason = f"{reason}: relative error {relative:.3e} exceeds {tolerance:.1e}"
            self.fail(what, reason, names)


class Block:
    """One block: its parameters, what theory says, and the dense matrices to compare.

    Args:
        group: Role to parameter name.
        places: Where the entries of the block's canonical vector are in the parameter vector.
        theory: What is known of the group.
    """

    def __init__(self, group: dict[str, str], places: Tensor, theory: Theory):
        self.group = group
        self.places = places
        self.theory = theory
        #: The approximations ``[d, d]``.
        self.dense: dict[Method, Tensor] = {}
        #: What is approximated, without what is between the block's parts.
        self.exact = torch.empty(0)
        #: Whether the parameters are in no supported layer.
        self.diagonal = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return tuple(self.group.values())

    def verdict(self, method: Method, rules: Rules) -> Verdict:
        """Return whether an approximation must be exact."""
        name, approx = method
        if self.diagonal:
            return Verdict(False, "diagonal")
        if name == "KFAC":
            return self.theory.verdict(str(approx), rules)
        if not rules.apart:
            return Verdict(False, NOT_APART)
        if name == "EKFAC":
            return self.theory.verdict(str(approx), rules)
        # the nearest Kronecker product is as near as each of the two
        expand, reduce = (self.theory.verdict(kind, rules) for kind in ("expand", "reduce"))
        return expand if expand.exact else reduce


class BlockCheck:
    """Checks the properties of one block.

    Args:
        block: The block, with the dense approximations.
        operators: The operators.
        evidence: What is known of the examples.
        rules: What the theory depends on.
        complaints: How to compare and complain.
    """

    def __init__(
        self,
        block: Block,
        operators: dict[Method, KFACLinearOperator],
        evidence: Evidence,
        rules: Rules,
        complaints: Complaints,
    ):
        self.block, self.operators, self.rules = block, operators, rules
        self.evidence, self.complaints = evidence, complaints

    def close(
        self, what: str, reason: str, actual: Tensor, expected: Tensor, **kwargs: Any
    ) -> None:
        """Fail if tensors differ."""
        self.complaints.close(what, reason, actual, expected, self.block.names, **kwargs)

    def parts(self, method: Method) -> list[Any]:
        """Return the parts of the block of an operator."""
        return parts_of(self.operators[method].block(self.block.names[0]))

    def run(self, fisher: FisherType) -> None:
        """Check everything."""
        block = self.block
        block.diagonal = self.is_diagonal()
        block.exact = self.exact_block()
        if block.diagonal:
            if fisher is FisherType.TYPE2:
                for method, K in block.dense.items():
                    self.close("diagonal block", text(method), K, block.exact.diag().diag())
            return
        for method in self.operators:
            if method[0] != "EKFAC":
                self.check_factors(method)
        for method, K in block.dense.items():
            verdict = block.verdict(method, self.rules)
            if verdict.exact:
                reason = f"{text(method)} must be exact ({verdict.reason})"
                slack = 10.0 if method[0] == "KFOC" else 1.0
                self.close("exact block", reason, K, block.exact, slack=slack)
        for method in KFAC_METHODS:
            expected = block.theory.definition(str(method[1]), self.rules)
            if expected is not None:
                reason = f"the block of {text(method)}"
                self.close("definition", reason, block.dense[method], expected)
        for method in self.operators:
            if method[0] == "EKFAC":
                self.check_ekfac(method)
            if method[0] == "KFOC" and self.rules.apart:
                self.check_kfoc(method)

    def is_diagonal(self) -> bool:
        """Return whether a weight has no factors, but a diagonal block."""
        factors = [factor for part in self.parts(("KFAC", "expand")) for factor in part]
        kronecker = len(factors) > 1 or not isinstance(factors[0], DiagonalLinearOperator)
        return "W" in self.block.group and not (kronecker or self.block.theory.norm)

    def exact_block(self) -> Tensor:
        """Return what is approximated."""
        places, theory = self.block.places, self.block.theory
        exact = torch.zeros(len(places), len(places), dtype=torch.float64)
        for example in self.evidence.examples:
            rows = example.root.mT @ example.jacobian[:, places]
            exact += self.evidence.scale * rows.mT @ rows
        if self.block.diagonal:
            return exact
        if theory.pieces:
            sizes = [piece.places.numel() for piece in theory.pieces]
        else:
            sizes = [part.shape[0] for part in self.parts(("KFAC", "expand"))]
        return exact * torch.block_diag(*(torch.ones(n, n, dtype=exact.dtype) for n in sizes))

    def check_factors(self, method: Method) -> None:
        """Check that factors are symmetric and positive semi-definite."""
        for part in self.parts(method):
            for kind, factor in zip(("gradient", "input"), part, strict=False):
                S = wide(as_matrix(factor))
                which = f"the {kind} factor of {text(method)}"
                self.close("factors", f"{which} is not symmetric", S.mT, S)
                values = torch.linalg.eigvalsh(S)
                size = float(values.abs().max())
                if not float(values.min()) >= -self.complaints.rtol * size:
                    least = float(values.min()) / size
                    reason = f"{which} has a negative eigenvalue, {least:.3e} of the largest"
                    self.complaints.fail("factors", reason, self.block.names)

    def check_ekfac(self, method: Method) -> None:
        """Check eigenvectors and eigenvalues."""
        name, K, exact = text(method), self.block.dense["KFAC", method[1]], self.block.exact
        parts = self.parts(method)
        values = torch.cat([wide(part.eigenvalues) for part in parts])
        Q = torch.block_diag(*(wide(as_matrix(part.eigenvectors)) for part in parts))
        eye = torch.eye(len(Q), dtype=Q.dtype)
        self.close("EKFAC basis", f"that of {name} is not orthogonal", Q.mT @ Q, eye, slack=10)
        rotated = Q.mT @ K @ Q
        reason = f"that of {name} does not diagonalise KFAC's block"
        diagonal = rotated.diag().diag()
        self.close("EKFAC basis", reason, rotated, diagonal, scale=float(K.norm()), slack=10)
        if not self.rules.apart:
            return
        E, size = self.block.dense[method], float(exact.norm())
        self.close("EKFAC trace", name, E.trace(), exact.trace())
        self.check_distance("EKFAC distance", method, ("KFAC", method[1]), self.complaints.rtol)
        diagonal = (Q.mT @ exact @ Q).diag()
        self.close("EKFAC eigenvalues", name, values, diagonal, scale=size)

    def check_distance(self, what: str, method: Method, other: Method, slack: float) -> None:
        """Check that an approximation is not further away than another one."""
        exact, dense = self.block.exact, self.block.dense
        size = float(exact.norm())
        mine, theirs = (float((dense[each] - exact).norm()) for each in (method, other))
        if not mine <= theirs + slack * size:
            mine, theirs = mine / (size or 1), theirs / (size or 1)
            reason = f"{text(method)} is at {mine:.6e}, but {text(other)} at {theirs:.6e}"
            self.complaints.fail(what, reason, self.block.names)

    def check_kfoc(self, method: Method) -> None:
        """Check that the factors are the best ones."""
        for other in KFAC_METHODS:
            self.check_distance("KFOC distance", method, other, 10 * self.complaints.rtol)
        start = 0
        for part in self.parts(method):
            factors, own = list(part), slice(start, start + part.shape[0])
            start = own.stop
            if len(factors) != 2 or not all(isinstance(factor, Tensor) for factor in factors):
                continue
            B, A = map(wide, factors)
            exact = self.block.exact[own, own]
            products = exact.reshape(len(B), len(A), len(B), len(A))
            size = float(exact.norm()) * float(max(A.norm(), B.norm()))
            for kind, actual, expected in (
                ("gradient", B * A.norm() ** 2, torch.einsum("oipj, ij -> op", products, A)),
                ("input", A * B.norm() ** 2, torch.einsum("oipj, op -> ij", products, B)),
            ):
                reason = f"the {kind} factor is not the best for the other one"
                # the iteration stops at an error of this size
                self.close("KFOC optimality", reason, actual, expected, scale=size, slack=100)


def text(method: Method) -> str:
    """Return the name of an approximation."""
    return " ".join(part for part in method if part)


def parts_of(block: Any) -> list[Any]:
    """Return the parts of a block, as those of channel groups."""
    return list(block) if isinstance(block, BlockDiagonalLinearOperator) else [block]


def as_matrix(factor: Any) -> Tensor:
    """Return a tensor, or an operator's matrix."""
    return factor if isinstance(factor, Tensor) else factor.to_dense()


__all__ = ["KFAC_METHODS", "Block", "BlockCheck", "Complaints", "text"]
