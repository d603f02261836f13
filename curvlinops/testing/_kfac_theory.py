"""What KFAC must be for a block of parameters, and where it must be exact, by its theory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from curvlinops.testing._kfac_layers import LayerCall
from curvlinops.testing._kfac_trace import Evidence

IDENTITY = "forward-only approximates no matrix"
NOT_APART = "an example's loss terms are kept apart in expectation only"
DIAGONAL = "a factor keeps its diagonal only"


@dataclass(frozen=True)
class Rules:
    """What the theory depends on, besides the network.

    Attributes:
        identity: Whether gradient factors are identities (``fisher_type="forward-only"``).
        apart: Whether the loss terms of an example are kept apart: there is one, or each is
            back-propagated by itself.
        max_factor_size: Wider factors keep their diagonal only.
        rtol: The tolerance for conditions.
    """

    identity: bool
    apart: bool
    max_factor_size: int
    rtol: float

    def clip(self, factor: Tensor) -> Tensor:
        """Keep the diagonal of a factor that is too wide."""
        return factor.diag().diag() if len(factor) > self.max_factor_size else factor


@dataclass(frozen=True)
class Verdict:
    """Whether an approximation must be exact, and why, or why not.

    Attributes:
        exact: None if it is not known.
        reason: In words.
    """

    exact: bool | None
    reason: str


@dataclass
class Positions:
    """One example's positions, where a matrix of parameters is multiplied: ``y_s = W a_s``.

    Attributes:
        index: The number of the example.
        a: The inputs ``[S, d_in]``; ones for a bias alone.
        J: The derivatives of the prediction by the outputs ``[P, S, d_out]``.
        root: A root of the loss's curvature ``[P, V]``, with its scale.
        num_terms: The number R of loss terms.
    """

    index: int
    a: Tensor
    J: Tensor
    root: Tensor
    num_terms: int

    @cached_property
    def g(self) -> Tensor:
        """Output gradients ``[V, S, d_out]`` of vectors whose second moment is the curvature."""
        return torch.einsum("pv, psd -> vsd", self.root, self.J)

    @property
    def own(self) -> Tensor:
        """The curvature of each position ``[S, d_out, d_out]``."""
        return torch.einsum("vsd, vse -> sde", self.g, self.g)

    @property
    def pooled(self) -> Tensor:
        """The curvature of all positions together ``[d_out, d_out]``."""
        total = self.g.sum(1)
        return total.mT @ total

    def mixing(self) -> float:
        """Return the size of the curvature between different positions."""
        V, S, d = self.g.shape
        largest = 0.0
        for s in range(S):
            between = self.g[:, s].mT @ self.g.reshape(V, S * d)
            between[:, s * d : (s + 1) * d] = 0
            largest = max(largest, float(between.norm()))
        return largest

    def one_term_each(self) -> bool:
        """Return whether no position has an influence on several loss terms."""
        J = self.J.unflatten(0, (self.num_terms, -1))  # [R, C, S, d_out]
        return bool(((J.abs().amax((1, 3)) > 0).sum(0) <= 1).all())


@dataclass
class Piece:
    """A matrix of parameters with Kronecker factors of its own: a group, or a part of one.

    Attributes:
        places: Where its entries are in the parameter vector ``[d_out, d_in]``.
        examples: The positions of each example that has any.
        has_inputs: False for a bias alone.
    """

    places: Tensor
    examples: list[Positions]
    has_inputs: bool

    def factors(self, approx: str, rules: Rules) -> tuple[Tensor, Tensor]:
        """Return the gradient and the input factor by their definition."""
        height, width = self.places.shape
        B = torch.zeros(height, height, dtype=torch.float64)
        A, count = torch.zeros(width, width, dtype=torch.float64), 0
        for example in self.examples:
            a = example.a
            if approx == "reduce":
                a = a.mean(0, keepdim=True)
            B += example.pooled if approx == "reduce" else example.own.sum(0)
            A += a.mT @ a
            count += len(a)
        B = torch.eye(height, dtype=torch.float64) if rules.identity else B
        A = A / max(count, 1) if self.has_inputs else torch.ones(1, 1, dtype=torch.float64)
        return rules.clip(B), rules.clip(A) if self.has_inputs else A

    def definite(self, approx: str, rules: Rules) -> bool:
        """Return whether there is nothing random in the factors."""
        if rules.apart or rules.identity:
            return True
        return approx == "expand" and all(example.one_term_each() for example in self.examples)

    def verdict(self, approx: str, rules: Rules) -> Verdict:
        """Return whether the Kronecker product must be the exact block."""
        if rules.identity:
            return Verdict(False, IDENTITY)
        if not self.definite(approx, rules):
            return Verdict(False, NOT_APART)
        wide = [size for size in self.places.shape if size > rules.max_factor_size]
        if wide:
            return Verdict(False, DIAGONAL)
        return self._expand(rules) if approx == "expand" else self._reduce(rules)

    def _expand(self, rules: Rules) -> Verdict:
        """Judge: positions must not mix, and have the same curvature or the same input."""
        own = [T for example in self.examples for T in example.own]
        size = max([float(T.norm()) for T in own], default=0.0)
        if size == 0:
            return Verdict(True, "no curvature")
        if any(example.mixing() > rules.rtol * size for example in self.examples):
            return Verdict(False, "positions that share the weight are coupled")
        if not self.has_inputs:
            return Verdict(True, "positions are not coupled")
        if _equal(own, rules.rtol):
            return Verdict(True, "equal curvature at all positions of all data")
        if _equal([a.outer(a) for example in self.examples for a in example.a], rules.rtol):
            return Verdict(True, "equal inputs at all positions of all data")
        return Verdict(False, "neither inputs nor curvature are equal for all data")

    def _reduce(self, rules: Rules) -> Verdict:
        """Judge: gradients or inputs are equal at an example's positions, and for all examples."""
        pooled = [example.pooled for example in self.examples]
        if not self.has_inputs:
            return Verdict(True, "gradients are summed over positions")
        if all(float(example.g.abs().max()) == 0 for example in self.examples):
            return Verdict(True, "no curvature")
        for example in self.examples:
            gradients = list(example.g.movedim(1, 0))
            if not _equal(gradients, rules.rtol) and not _equal(list(example.a), rules.rtol):
                return Verdict(False, "neither inputs nor gradients are equal at all positions")
        if _equal(pooled, rules.rtol):
            return Verdict(True, "equal curvature for all data")
        means = [example.a.mean(0) for example in self.examples]
        if _equal([a.outer(a) for a in means], rules.rtol):
            return Verdict(True, "equal inputs for all data")
        return Verdict(False, "neither inputs nor curvature are equal for all data")


def _equal(tensors: list[Tensor], rtol: float) -> bool:
    """Return whether tensors are equal, up to a tolerance relative to the largest."""
    size = max([float(t.norm()) for t in tensors], default=0.0)
    return all(float((t - tensors[0]).norm()) <= rtol * size for t in tensors[1:])


@dataclass
class Theory:
    """What is known of a group of parameters.

    Attributes:
        pieces: The matrices it consists of, in canonical order; None if its parameters are used in
            ways that are not followed.
        norm: Whether it belongs to a normalisation layer.
        size: The number of parameters.
    """

    pieces: list[Piece] | None
    norm: bool
    size: int
    _verdicts: dict[tuple[str, Rules], Verdict] = field(default_factory=dict)

    def verdict(self, approx: str, rules: Rules) -> Verdict:
        """Return whether KFAC must be exact for the group; decided once."""
        if (approx, rules) not in self._verdicts:
            self._verdicts[approx, rules] = self._verdict(approx, rules)
        return self._verdicts[approx, rules]

    def _verdict(self, approx: str, rules: Rules) -> Verdict:
        if self.norm:
            if rules.identity:
                return Verdict(False, IDENTITY)
            if not rules.apart:
                return Verdict(False, NOT_APART)
            if self.size > rules.max_factor_size:
                return Verdict(False, DIAGONAL)
            return Verdict(True, "normalisation layers have the exact block")
        if self.pieces is None:
            return Verdict(None, "not followed")
        verdicts = [piece.verdict(approx, rules) for piece in self.pieces]
        verdicts.sort(key=lambda verdict: bool(verdict.exact))
        return verdicts[0] if verdicts else Verdict(True, "not used")

    def definition(self, approx: str, rules: Rules) -> Tensor | None:
        """Return the group's block by KFAC's definition; None if it is not known."""
        if self.norm or self.pieces is None:
            return None
        if not all(piece.definite(approx, rules) for piece in self.pieces):
            return None
        if not self.pieces:  # not used
            zeros = torch.zeros(self.size, self.size, dtype=torch.float64)
            return None if rules.identity else zeros
        return torch.block_diag(*(torch.kron(*p.factors(approx, rules)) for p in self.pieces))

    @property
    def num_positions(self) -> int | None:
        """The largest number of positions of an example; None if it is not known."""
        if self.pieces is None or not self.pieces:
            return None
        return max(max((len(e.a) for e in piece.examples), default=0) for piece in self.pieces)


def theory_of(evidence: Evidence, group: dict[str, str], rtol: float) -> Theory:
    """Return what is known of a group of parameters (role to name)."""
    size = sum(len(evidence.places[name]) for name in group.values())
    if set(group.values()) & evidence.norms:
        return Theory(None, set(group.values()) <= evidence.norms, size)
    pieces: dict[tuple[int, ...], Piece] = {}
    for index, example in enumerate(evidence.examples):
        found: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for call in example.calls:
            for places, a, J in _matrices(call, group, evidence):
                key = tuple(places.flatten().tolist())
                found.setdefault(key, []).append((a, J))
                pieces.setdefault(key, Piece(places, [], "W" in group))
        for key, uses in found.items():
            a, J = (torch.cat(list(parts), dim) for parts, dim in zip(zip(*uses), (0, 1)))  # noqa: B905
            root = example.root * evidence.scale**0.5
            pieces[key].examples.append(Positions(index, a, J, root, example.num_terms))
    ordered = [pieces[key] for key in sorted(pieces)]
    return Theory(ordered if _complete(evidence, group, ordered, rtol) else None, False, size)


def _matrices(
    call: LayerCall, group: dict[str, str], evidence: Evidence
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield places ``[d_out, d_in]``, inputs ``[S, d_in]`` and derivatives of a call's matrices."""
    ones = torch.ones(call.jacobian.shape[1], 1, dtype=torch.float64)
    if "W" not in group:
        if call.bias is not None and _within(call.bias, evidence.places[group["b"]]):
            yield call.bias.unsqueeze(1), ones, call.jacobian
        return
    if call.weight is None or not _within(call.weight, evidence.places[group["W"]]):
        return
    places, bias, G = call.weight, call.bias, call.inputs.shape[1]
    if "b" in group:
        if bias is None:  # the weight has one elsewhere
            bias, ones = _bias_of(call.weight, evidence), 0 * ones
        if bias is None or not _within(bias, evidence.places[group["b"]]):
            return
        places = torch.cat([places, bias.unsqueeze(1)], dim=1)
    each = zip(places.chunk(G), call.inputs.unbind(1), call.jacobian.chunk(G, 2), strict=True)
    for rows, a, J in each:
        yield rows, torch.cat([a, ones], dim=1) if "b" in group else a, J


def _bias_of(weight: Tensor, evidence: Evidence) -> Tensor | None:
    """Return the bias that a weight has in another call."""
    for example in evidence.examples:
        for call in example.calls:
            same = call.weight is not None and torch.equal(call.weight, weight)
            if same and call.bias is not None:
                return call.bias
    return None


def _within(places: Tensor, parameter: Tensor) -> bool:
    """Return whether places are in a parameter."""
    return bool(parameter[0] <= places.min()) and bool(places.max() <= parameter[-1])


def _complete(evidence: Evidence, group: dict[str, str], pieces: list[Piece], rtol: float) -> bool:
    """Return whether pieces explain the derivatives by a group's parameters, without overlap."""
    places = torch.cat([evidence.places[name] for name in group.values()])
    covered = torch.cat([places[:0], *(piece.places.flatten() for piece in pieces)])
    if len(covered) and not torch.equal(covered.sort().values, places.sort().values):
        return False
    for index, example in enumerate(evidence.examples):
        total = torch.zeros_like(example.jacobian)
        for piece in pieces:
            for each in piece.examples:
                if each.index == index:
                    gradients = torch.einsum("psd, si -> pdi", each.J, each.a)
                    total[:, piece.places.flatten()] = gradients.flatten(1)
        error = (total - example.jacobian)[:, places].abs().max()
        if error > rtol * example.jacobian[:, places].abs().max():
            return False
    return True


__all__ = ["NOT_APART", "Piece", "Rules", "Theory", "Verdict", "theory_of"]
