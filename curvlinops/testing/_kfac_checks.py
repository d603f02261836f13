"""The properties of Kronecker-factored operators as a whole, and the report of distances."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from curvlinops.ekfac import EKFACLinearOperator
from curvlinops.ggn import GGNLinearOperator
from curvlinops.gradient_moments import EFLinearOperator
from curvlinops.kfac import KFACLinearOperator
from curvlinops.kfac_utils import FisherType
from curvlinops.kfoc import KFOCLinearOperator
from curvlinops.risk import EmpiricalRisk
from curvlinops.testing._check import RTOL, wide
from curvlinops.testing._kfac_blocks import KFAC_METHODS, Block, BlockCheck, Complaints, text
from curvlinops.testing._kfac_report import ALL, METHODS, Distances, KFACReport, Method
from curvlinops.testing._kfac_theory import Rules, Theory, theory_of
from curvlinops.testing._kfac_trace import gather_evidence, single_examples

_CLASSES = {"KFAC": KFACLinearOperator, "EKFAC": EKFACLinearOperator, "KFOC": KFOCLinearOperator}


class KFACCheck:
    """Builds all operators, and checks them.

    Args:
        arguments: The model, loss, parameters, data and ``batch_size_fn``.
        fisher: The Fisher type.
        rtol: The tolerance; None for that of the dtype.
        seed: Fixes all random numbers.
        max_block: The number of parameters of the largest block.
        options: Other options of the operators.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        fisher: FisherType,
        rtol: float | None,
        seed: int,
        max_block: int,
        options: dict[str, Any],
    ):
        self.arguments, self.fisher, self.seed, self.options = arguments, fisher, seed, options
        self.max_block = max_block
        self.mc_samples = options.get("mc_samples", 1)
        self.risk = EmpiricalRisk(**arguments, check_deterministic=False, num_data=1)
        rtol = RTOL[self.risk.dtype] if rtol is None else rtol
        self.complaints = Complaints(rtol)
        loss = arguments["loss_func"]
        with self.risk.undisturbed():
            self.evidence = gather_evidence(
                self.risk, loss, str(fisher), self.mc_samples, seed, rtol
            )
        self.rules = Rules(
            identity=fisher is FisherType.FORWARD_ONLY,
            apart=options["loss_terms"] == "exact" or self.most_terms == 1,
            max_factor_size=options.get("max_factor_size", 8192),
            rtol=rtol / 10,
        )
        self._theories: dict[Any, Theory] = {}

    @property
    def most_terms(self) -> int:
        """The largest number of loss terms of an example."""
        return max(example.num_terms for example in self.evidence.examples)

    def run(self) -> KFACReport:
        """Check everything, and report."""
        operators: dict[Method, KFACLinearOperator] = {}
        for method in self.methods():
            changes = {"check_deterministic": False} if operators else {}
            operators[method] = self.build(method, **changes)
        K = operators["KFAC", "expand"]
        self.check_groups(K)
        self.check_exact_matrix()
        blocks = [
            Block(group, places, self.theory(group))
            for group, places in zip(K.mapping, self.canonical(K), strict=True)
        ]
        sizes = {" + ".join(block.names): len(block.places) for block in blocks}
        refuse_large(sizes, self.max_block)
        for method, op in operators.items():
            self.check_chain(method, op, blocks)
        for block in blocks:
            BlockCheck(block, operators, self.evidence, self.rules, self.complaints).run(
                self.fisher
            )
        self.check_batching(blocks)
        return self.report(blocks)

    # ---- operators -------------------------------------------------------------------------------
    def methods(self) -> list[Method]:
        """Return the approximations that exist for the Fisher type."""
        if self.fisher is FisherType.FORWARD_ONLY:
            return list(KFAC_METHODS)
        both = self.fisher in (FisherType.TYPE2, FisherType.MC)
        return [method for method in METHODS if both or method[0] != "KFOC"]

    def build(self, method: Method, data: Any = None, **changes: Any) -> KFACLinearOperator:
        """Return an operator, perhaps for other batches."""
        name, approx = method
        options = {**self.options, "seed": self.seed, "fisher_type": self.fisher, **changes}
        if approx is not None:
            options["kfac_approx"] = approx
        arguments = {**self.arguments, **({} if data is None else {"data": data})}
        return _CLASSES[name](**arguments, **options)

    def theory(self, group: dict[str, str]) -> Theory:
        """Return what is known of a group; found once."""
        key = tuple(group.items())
        if key not in self._theories:
            self._theories[key] = theory_of(self.evidence, group, self.rules.rtol)
        return self._theories[key]

    def random(self, *shape: int) -> Tensor:
        """Return normally distributed numbers in float64."""
        generator = torch.Generator().manual_seed(self.seed % 2**63)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def like(self, x: Tensor) -> Tensor:
        """Return numbers in the dtype and on the device of the parameters."""
        return x.to(self.risk.device, self.risk.dtype)

    # ---- properties ------------------------------------------------------------------------------
    def check_groups(self, K: KFACLinearOperator) -> None:
        """Check which parameters are together."""
        groups, fail = K.mapping, self.complaints.fail
        names = [name for group in groups for name in group.values()]
        if sorted(names) != sorted(self.arguments["params"]):
            fail("groups", f"{groups} is not a partition of the parameters")
        if self.options["separate_weight_and_bias"]:
            if any(len(group) > 1 for group in groups):
                fail("groups", f"weights and biases are not separate: {groups}")
            return
        for weight, bias in self.evidence.pairs():
            if {"W": weight, "b": bias} not in groups:
                fail("groups", f"{weight!r} and {bias!r} are not together: {groups}")

    def check_exact_matrix(self) -> None:
        """Check that the library's dense matrix is that of autograd."""
        options: dict[str, Any] = {"check_deterministic": False}
        if self.fisher is FisherType.MC:
            options |= {"mc_samples": self.mc_samples, "seed": self.seed}
        empirical = self.fisher is FisherType.EMPIRICAL
        op = (EFLinearOperator if empirical else GGNLinearOperator)(**self.arguments, **options)
        x = self.random(op.shape[1], 2)
        expected = torch.zeros_like(x)
        for example in self.evidence.examples:
            J = example.jacobian
            expected += self.evidence.scale * (J.mT @ (example.curvature @ (J @ x)))
        with warnings.catch_warnings():  # another kernel of attention is fine here
            warnings.filterwarnings("ignore", message="The model uses fused attention")
            actual = wide(op @ self.like(x))
        self.complaints.close("exact matrix", f"products of {op!r}", actual, expected)

    def canonical(self, K: KFACLinearOperator) -> list[Tensor]:
        """Return where the entries of each block's canonical vector are; check that P says so."""
        _, B, PT = K
        numbers = torch.arange(K.shape[1])
        # two small numbers each, which every dtype has
        digits = [wide(PT @ self.like(part)).long() for part in (numbers % 128, numbers // 128)]
        sizes = [block.shape[0] for block in B]  # type: ignore[attr-defined]
        result = list((digits[0] + 128 * digits[1]).split(sizes))
        for group, places in zip(K.mapping, result, strict=True):
            theory, names = self.theory(group), tuple(group.values())
            own = torch.cat([self.evidence.places[name] for name in names])
            if not torch.equal(places.sort().values, own.sort().values):
                self.complaints.fail("canonical form", "P does not permute its entries", names)
            if theory.pieces:
                own = torch.cat([piece.places.flatten() for piece in theory.pieces])
            if (theory.pieces or theory.norm) and not torch.equal(places, own):
                self.complaints.fail("canonical form", "its entries are in a wrong order", names)
        return result

    def check_chain(self, method: Method, K: KFACLinearOperator, blocks: list[Block]) -> None:
        """Check that the operator consists of its blocks; keep these, dense."""
        name, complaints = text(method), self.complaints
        if K.mapping != [block.group for block in blocks]:
            complaints.fail("groups", f"{name} has others: {K.mapping}")
        x = self.random(K.shape[1], 2)
        expected = torch.zeros_like(x)
        for block, places in zip(blocks, self.canonical(K), strict=True):
            if not torch.equal(places, block.places):
                complaints.fail("canonical form", f"{name} has another one", block.names)
            block.dense[method] = wide(K.block(block.names[0]).to_dense())
            expected[places] = block.dense[method] @ x[places]
        P, B, PT = K
        x = self.like(x)
        complaints.close("chain", f"products of {name} and its blocks", wide(K @ x), expected)
        product = wide(P @ (B @ (PT @ x)))
        complaints.close("chain", f"P @ (B @ (PT @ x)) of {name}", product, expected)

    def check_batching(self, blocks: list[Block]) -> None:
        """Check that KFAC is the same for other batches of the same data."""
        with self.risk.undisturbed():
            batches = list(self.risk.batches("Batches"))
        others = [pair for batch in batches for pair in single_examples(batch)]
        name = "single examples"
        if len(others) == len(batches):
            merged = _merged(others)
            if len(batches) == 1 or merged is None:
                return
            others, name = merged, "a single batch"
        for method in KFAC_METHODS:
            K = self.build(method, others, check_deterministic=False)
            for block in blocks:
                actual = wide(K.block(block.names[0]).to_dense())
                reason = f"{text(method)} with {name}"
                self.complaints.close("batching", reason, actual, block.dense[method], block.names)

    # ---- distances -------------------------------------------------------------------------------
    def report(self, blocks: list[Block]) -> KFACReport:
        """Return the distances."""
        rows: list[dict[str, Any]] = []
        for method in self.methods():
            sums, verdicts = Distances(), []
            for block in blocks:
                distance, cosine = sums.add(block.dense[method], block.exact)
                verdict = block.verdict(method, self.rules)
                verdicts.append(verdict.exact)
                rows.append(
                    {
                        "parameters": block.names,
                        "method": method[0],
                        "approx": method[1],
                        "distance": distance,
                        "cosine": cosine,
                        "exact": verdict.exact,
                        "reason": verdict.reason,
                        "size": len(block.places),
                        "positions": block.theory.num_positions,
                    }
                )
            distance, cosine = sums.total()
            unknown = None in verdicts and False not in verdicts
            rows.append(
                {
                    "parameters": (ALL,),
                    "method": method[0],
                    "approx": method[1],
                    "distance": distance,
                    "cosine": cosine,
                    "exact": None if unknown else all(verdicts),
                    "reason": "that of its blocks",
                    "size": sum(len(block.places) for block in blocks),
                    "positions": None,
                }
            )
        target = {
            FisherType.MC: f"GGN with {self.mc_samples} Monte-Carlo sample(s)",
            FisherType.EMPIRICAL: "empirical Fisher",
        }.get(self.fisher, "GGN")
        numbers = f"N = {len(self.evidence.examples)}, R = {self.most_terms}"
        title = f"Distances to the blocks of the {target} (fisher_type={self.fisher}, {numbers})"
        order = {block.names: i for i, block in enumerate(blocks)}
        rows.sort(key=lambda row: order.get(row["parameters"], len(order)))
        return KFACReport(rows, title)


def refuse_large(sizes: dict[str, int], max_block: int) -> None:
    """Raise an error if blocks are too large."""
    large = [f"{name} ({size:,})" for name, size in sizes.items() if size > max_block]
    if large:
        raise ValueError(
            f"These blocks have more than max_block={max_block:,} parameters, too many for dense "
            f"matrices: {', '.join(large)}. Leave them out of params, take a smaller version of "
            "the model, or increase max_block."
        )


def _merged(pairs: list[tuple[Any, Any]]) -> list[tuple[Any, Any]] | None:
    """Return single examples as one batch, if they are tensors that fit together."""
    X, y = zip(*pairs, strict=True)
    for tensors in (X, y):
        if not all(isinstance(t, Tensor) and t.shape[1:] == tensors[0].shape[1:] for t in tensors):
            return None
    return [(torch.cat(X), torch.cat(y))]


__all__: list[str] = ["KFACCheck", "refuse_large"]
