"""The properties of curvature matrices, one method for each group of them."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import torch
from torch import Tensor

from curvlinops.ggn import GGNLinearOperator
from curvlinops.ggn_diagonal import GGNDiagonalLinearOperator
from curvlinops.gradient_moments import EFLinearOperator, PerExampleGradientLinearOperator
from curvlinops.hessian import HessianLinearOperator
from curvlinops.jacobian import JacobianLinearOperator, TransposedJacobianLinearOperator
from curvlinops.risk.model import ModelFunction
from curvlinops.testing._check import wide
from curvlinops.testing._curvature_batches import (
    CannotRebatchError,
    merge,
    require_same_risk,
    split,
)
from curvlinops.testing._curvature_reference import Example, Reference, plain_autograd
from curvlinops.testing._curvature_report import RTOL, Recorder
from curvlinops.testing._curvature_samples import Terms, probes
from curvlinops.testing._curvature_traces import Traces

#: Probability of a false alarm of the statistical test.
FALSE_ALARM = 1e-6
#: Among how many seeds the test distributes its samples: more if they tell the standard error.
SEEDS, SEEDS_OF_UNKNOWN = 8, 32

OPERATORS: dict[str, Any] = {
    "Jacobian": JacobianLinearOperator,
    "transposed Jacobian": TransposedJacobianLinearOperator,
    "GGN": GGNLinearOperator,
    "Hessian": HessianLinearOperator,
    "empirical Fisher": EFLinearOperator,
    "loss term gradients": PerExampleGradientLinearOperator,
    "GGN diagonal": GGNDiagonalLinearOperator,
    "Monte-Carlo GGN": GGNLinearOperator,
    "Monte-Carlo GGN diagonal": GGNDiagonalLinearOperator,
}
_CHECKED: dict[str, Any] = {"check_deterministic": True, "num_data": None}  # as by default
JACOBIANS = ("Jacobian", "transposed Jacobian")
#: What a loss that is known by its value only has.
VALUE_ONLY = (*JACOBIANS, "GGN", "Hessian")


class Checker(Recorder):
    """A model, a loss and data, their dense matrices, and the properties of the operators."""

    def __init__(
        self,
        model_func: ModelFunction,
        loss_func: Callable[[Any, Any], Tensor],
        params: dict[str, Tensor],
        data: list[Any],
        batch_size_fn: Callable[[Any], int] | None,
        rtol: float | None,
        mc_samples: int,
        seed: int,
    ):
        self.model, self.loss, self.params, self.data = model_func, loss_func, params, data
        self.batch_size_fn, self.mc_samples, self.seed = batch_size_fn, mc_samples, seed
        first = next(iter(params.values()))
        self.dtype, self.device = first.dtype, first.device
        super().__init__(RTOL[self.dtype] if rtol is None else rtol)
        count = batch_size_fn or (lambda X: X.shape[0])
        self.batches = [Example(X, y, count(X)) for X, y in data]
        self.reference = Reference(model_func, loss_func, params, self.batches)
        self.generator = torch.Generator().manual_seed(seed)
        self.V = self._random(self.reference.dim, 3)
        self.dense: dict[str, Tensor] = {}
        self.found: dict[str, Tensor] = {}  # what operators are instead
        #: Rounding errors of numbers that cancel are relative to these norms.
        self.size: dict[str, float] = {}

    def run(self) -> None:
        """Check all properties."""
        self._make_references()
        traces = Traces(self.model, self.params)
        for name in OPERATORS:
            if not name.startswith("Monte-Carlo"):
                self._check_matrix(name)
        self._check_gradient()
        self._check_definite()
        self._check_monte_carlo()
        self._check_kept_graphs()
        self._check_batching("each example a batch", split)
        self._check_batching("all data in one batch", merge)
        with self.property("parameters, module and random generators"):
            changed = traces.changed()
            self.require(not changed, f"changed: {', '.join(changed[:3])}")

    # ---- references --------------------------------------------------------------------------
    def _make_references(self) -> None:
        """Compute all dense matrices; a loss or model that autograd refuses raises its error."""
        r = self.reference
        if not r.finite:
            raise ValueError(
                "Loss or predictions are not finite: there is no curvature to check. Check the "
                "data and the parameters for NaN, infinities and overflow."
            )
        J = r.jacobian
        curvature = max((float(H.abs().max()) for H in r.loss_hessians), default=0.0)
        ggn = max(curvature, r.scale if self._closed_form else 0.0) * float(J.norm()) ** 2
        # By how much rounding errors of the loss's derivatives may be larger than the tolerance.
        noise = 10 * r.eps / self.rtol
        self.dense = {"Jacobian": J, "transposed Jacobian": J.T, "GGN": r.ggn}
        self.size = {"GGN": noise * ggn, "Hessian": max(noise * ggn, float(r.ggn.norm()))}
        self._add_hessian()
        if self._closed_form:
            self.dense["GGN diagonal"] = r.ggn.diagonal()
            try:
                A = self.dense["loss term gradients"] = r.term_gradients
                self.dense["empirical Fisher"] = r.empirical_fisher
            except NotImplementedError:  # a registered loss without values of its terms
                return
            error = noise * float(J.norm())
            self.size["loss term gradients"] = error
            self.size["empirical Fisher"] = r.scale * error * (2 * float(A.norm()) + error)
        self.size["GGN diagonal"] = self.size["GGN"]

    def _add_hessian(self) -> None:
        """Compute the Hessian, unless PyTorch's second derivatives are missing or wrong."""
        self._no_hessian = ""
        try:
            H = self.reference.hessian
        except RuntimeError as error:  # NotImplementedError is one
            text = " ".join(str(error).split())
            self._no_hessian = f"autograd cannot differentiate twice: {text[:80]}"
            return
        asymmetry = float((H - H.T).norm())
        if asymmetry > self.rtol * max(float(H.norm()), self.size["Hessian"]):
            self._no_hessian = f"autograd's Hessian is not symmetric (by {asymmetry:.1e})"
            return
        self.dense["Hessian"] = H

    @property
    def _closed_form(self) -> bool:
        """Whether the loss is in the table."""
        return self.reference.loss.kind != "value"

    @property
    def _known_samples(self) -> bool:
        """Whether the distribution of would-be gradients is known."""
        return self.reference.loss.kind in ("softmax", "sigmoid", "square")

    # ---- operators ---------------------------------------------------------------------------
    def _build(self, name: str, data: list[Any] | None = None, **options: Any) -> Any:
        """Build an operator for the data, or other ones."""
        loss = () if name in JACOBIANS else (self.loss,)
        params = options.pop("params", self.params)
        data = self.data if data is None else data
        unchecked = {"check_deterministic": False, "num_data": sum(b.n for b in self.batches)}
        options = {"batch_size_fn": self.batch_size_fn, **unchecked, **options}
        if name.startswith("Monte-Carlo"):
            options = {"mc_samples": 2, "seed": self.seed, **options}
        return OPERATORS[name](self.model, *loss, params, data, **options)

    def _random(self, *shape: int) -> Tensor:
        """Draw normally distributed numbers that are exact in the operators' dtype."""
        numbers = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return wide(numbers.to(self.dtype))

    def _multiply(self, op: Any, V: Tensor) -> Tensor:
        """Multiply onto a matrix of float64 on the CPU."""
        return wide(op @ V.to(self.device, self.dtype))

    def _matches(self, op: Any, name: str, V: Tensor, what: str = "") -> None:
        """Compare the product with that of the dense matrix; a diagonal one is a vector."""
        dense = self.dense[name]
        V = V if dense.shape[-1] == len(V) else self._random(dense.shape[-1], *V.shape[1:])
        expected = (dense if dense.ndim == 2 else dense.diag()) @ V
        scale = self.size.get(name, 0.0)
        scale = max(float(dense.norm()), scale) * float(V.norm())
        self.close(self._multiply(op, V), expected, scale, what)

    # ---- exact matrices ----------------------------------------------------------------------
    def _check_matrix(self, name: str) -> None:
        """Check that an operator has its matrix, or refuses a loss that it cannot use."""
        if name not in VALUE_ONLY and not self._closed_form:
            with self.property(f"{name}: refuses a loss that is not in the table"):
                try:
                    self._build(name)
                except NotImplementedError:
                    self.require(True, "")
                else:
                    self.fail("did not raise NotImplementedError")
            self.skip(f"{name}: matrix", "the loss is not in the table (see register_loss)")
            return
        if name not in self.dense:
            reason = (
                self._no_hessian if name == "Hessian" else "the loss has no values of its terms"
            )
            self.skip(f"{name}: matrix", reason)
            return
        dense = self.dense[name]
        eye = torch.eye(dense.shape[-1], dtype=torch.float64)
        with self.property(f"{name}: matrix"):
            self.found[name] = self._multiply(self._build(name, **_CHECKED), eye)
            matrix = dense if dense.ndim == 2 else dense.diag()
            self.close(self.found[name], matrix, self.size.get(name, 0.0))
        if dense.ndim == 2:  # a diagonal has been computed once and for all
            with self.property(f"{name}: one vector"):
                self._matches(self._build(name), name, self.V[:, 0])

    def _check_gradient(self) -> None:
        """Check that the gradient is the scaled sum of the loss terms' gradients."""
        name = "loss term gradients"
        if name not in self.dense:
            return
        with self.property(f"{name}: their scaled sum is the gradient"):
            A = self._build(name)
            ones = torch.ones(len(self.dense[name]), dtype=torch.float64)
            scale = self.reference.scale * float(self.dense[name].norm()) * len(ones) ** 0.5
            total = A.scale * self._multiply(A.T, ones)
            self.close(total, self.reference.gradient, max(scale, self.size[name]))

    def _check_definite(self) -> None:
        """Check that the GGN is positive semi-definite, for losses that are convex."""
        name = "GGN: positive semi-definite"
        for H in self.reference.loss_hessians:
            smallest, norm = _smallest_eigenvalue(H), float(H.norm())
            if smallest < -10 * len(H) * self.reference.eps * norm:
                self.skip(name, f"the loss is not convex (smallest eigenvalue {smallest:.1e})")
                return
        if "GGN" not in self.found:
            return
        with self.property(name):
            # Tighter than for the matrix, which could not fail by more.
            tolerance = min(self.rtol, 100 * self.reference.dim * self.reference.eps)
            scale = max(float(self.dense["GGN"].norm()), self.size["GGN"])
            smallest = min(_smallest_eigenvalue(self.found["GGN"]), 0.0)
            error = -smallest / scale if scale else 0.0
            text = f"the smallest eigenvalue is {smallest:.3e}, and the norm {scale:.3e}"
            self.at_most(error, tolerance, text)

    # ---- Monte-Carlo -------------------------------------------------------------------------
    def _check_monte_carlo(self) -> None:
        name = "Monte-Carlo GGN"
        if not self._closed_form:
            self._check_matrix(name)
            return
        S, eye = 2, torch.eye(self.reference.dim, dtype=torch.float64)
        with self.property(f"{name}: a function of the seed"):
            op = self._build(name, mc_samples=S)
            dense, size = self._multiply(op, eye), self.size["GGN"]
            scale = max(float(dense.norm()), size) * float(self.V.norm())
            self.close(self._multiply(op, eye), dense, size, "a second product")
            self.close(self._multiply(op, self.V), dense @ self.V, scale, "other columns")
            again = self._multiply(self._build(name, mc_samples=S), eye)
            self.close(again, dense, size, "a second operator")
            self.dense[name] = dense
        if name not in self.dense:  # a registered loss without samples
            return
        self.size[name] = self.size["GGN"]
        terms = self._terms() if self._known_samples else None
        self._check_samples(terms, S)
        with self.property("Monte-Carlo GGN diagonal: that of the Monte-Carlo GGN"):
            diagonal = self._build("Monte-Carlo GGN diagonal", mc_samples=S)
            self.dense["Monte-Carlo GGN diagonal"] = self.dense[name].diagonal()
            self.size["Monte-Carlo GGN diagonal"] = self.size["GGN"]
            self._matches(diagonal, "Monte-Carlo GGN diagonal", torch.ones(len(eye)).double())
        with self.property(f"{name}: unbiased"):
            self._check_unbiased(terms)

    def _check_samples(self, terms: Terms | None, S: int) -> None:
        """Compare with the matrix of the documented samples."""
        name = "Monte-Carlo GGN: matrix of the documented samples"
        if terms is None:
            self.skip(name, "the samples of a registered loss are its own")
        elif self.dtype != torch.float64:
            # A class may change if its probability is rounded.
            self.skip(name, "needs float64")
        else:
            with self.property(name):
                size = self.size["GGN"]
                self.close(self.dense["Monte-Carlo GGN"], terms.sampled_ggn(S, self.seed), size)
                op = self._build("Monte-Carlo GGN", mc_samples=S, seed=self.seed + 1)
                expected = terms.sampled_ggn(S, self.seed + 1) @ self.V
                scale = max(float(self.dense["GGN"].norm()), size) * float(self.V.norm())
                self.close(self._multiply(op, self.V), expected, scale, "another seed")

    def _terms(self) -> Terms:
        """Return predictions and their Jacobians by loss terms."""
        r = self.reference
        F, J, k = [], [], []
        with plain_autograd(), torch.no_grad():
            for f, Jb, b in zip(r.outputs, r.jacobians, r.batches, strict=True):
                F.append(wide(r.loss.vectors(f)))
                indices = r.loss.vectors(torch.arange(f.numel()).reshape(f.shape))
                J.append(Jb[indices])
                k.append(wide(r.loss.hessian_factor(f, b.y)))
        return Terms(r.loss.kind, torch.cat(F), torch.cat(J), torch.cat(k), r.scale)

    def _check_unbiased(self, terms: Terms | None) -> None:
        """Compare averages of quadratic forms with those of the exact matrix."""
        V = probes(self.V)
        V = wide(V.to(self.dtype))
        seeds = SEEDS_OF_UNKNOWN if terms is None else SEEDS
        S = -(-self.mc_samples // seeds)
        forms = []
        for seed in range(self.seed, self.seed + seeds):
            op = self._build("Monte-Carlo GGN", mc_samples=S, seed=seed)
            forms.append((V * self._multiply(op, V)).sum(0))
        estimates = torch.stack(forms)  # [seeds, p]
        exact = (V * (self.reference.ggn @ V)).sum(0)
        tau = log(2 * V.shape[1] / FALSE_ALARM)
        if terms is None:
            allowed = (2 * tau / seeds) ** 0.5 * estimates.std(0)
        else:
            allowed = terms.deviation(V, seeds * S, tau)
        allowed = allowed + self.rtol * max(float(self.dense["GGN"].norm()), self.size["GGN"])
        errors = (estimates.mean(0) - exact).abs()
        scale = max(float(exact.abs().max()), torch.finfo(torch.float64).tiny)
        worst = int((errors - allowed).argmax())
        error, tolerance = errors[worst].item() / scale, allowed[worst].item() / scale
        text = (
            f"the mean of {seeds * S} samples deviates by {error:.3e} (relative), more than "
            f"{tolerance:.3e}, for which the probability is below {FALSE_ALARM:.0e}"
        )
        self.at_most(error, tolerance, text)

    # ---- kept graphs, batches ----------------------------------------------------------------
    def _check_kept_graphs(self) -> None:
        for name in ("GGN", "Hessian", "empirical Fisher", "Monte-Carlo GGN"):
            if name not in self.dense:
                continue
            with self.property(f"{name}: keep_graph=True"):
                params = {n: p.detach().clone() for n, p in self.params.items()}
                kept = self._build(name, params=params, keep_graph=True)
                for what in ("first product", "second product"):
                    self._matches(kept, name, self.V, what)
                for p in params.values():
                    noise = self._random(*p.shape).to(p.device, p.dtype)
                    p.mul_(1.03).add_(noise, alpha=0.03)
                expected = self._multiply(self._build(name, params=params), self.V)
                product = self._multiply(kept, self.V)
                norm = max(float(self.dense[name].norm()), self.size[name])
                scale = norm * float(self.V.norm())
                self.close(product, expected, scale, "after a change of the parameters")

    def _check_batching(self, text: str, rebatch: Callable[[list[Example]], Any]) -> None:
        """Check that all matrices are those of the same data in other batches."""
        name = f"independent of batching: {text}"
        try:
            batches = rebatch(self.batches)
            require_same_risk(self.reference, batches, self.batch_size_fn, self.rtol)
        except CannotRebatchError as error:
            self.skip(name, str(error))
            return
        data = [(b.X, b.y) for b in batches]
        for operator in self.dense:
            with self.property(f"{operator}: {name}"):
                self._matches(self._build(operator, data), operator, self.V)


def _smallest_eigenvalue(matrix: Tensor) -> float:
    return torch.linalg.eigvalsh((matrix + matrix.mT) / 2).min().item()
