"""The cases of other libraries, which are used through their documented interfaces alone.

Each function is called in its library's own environment, and imports it there.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from cases import Case, Cases, UnusableError, product_case, random_tensor
from models import Problem
from suites import COLUMNS, PLAIN, POWERS, by_columns
from torch import Tensor, nn

FISHER_TYPES = {"": "mc", " type-2": "type-2", " empirical": "empirical"}
DAMPING = 1e-2


class Flat(nn.Module):
    """Logits [n, vocabulary, positions] as [n * positions, vocabulary]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Evaluate the model."""
        return self.model(tokens).transpose(1, 2).flatten(0, 1)


# --------------------------------------------------------------------------------------------------
# curvlinops-for-pytorch
# --------------------------------------------------------------------------------------------------
def curvlinops_for_pytorch(problem: Problem) -> Cases:
    """Use another package whose module has our name."""
    return {
        **_products_of_curvlinops_for_pytorch(problem),
        **_factors_of_curvlinops_for_pytorch(problem),
    }


def _products_of_curvlinops_for_pytorch(problem: Problem) -> Cases:
    """Products that evaluate the network."""
    import curvlinops

    params, data = list(problem.model.parameters()), problem.data
    options = {"check_deterministic": False, "num_data": problem.num_data}

    def case(cls: Any, columns: int = 0, **more: Any) -> Callable[[], Case]:
        def make() -> Case:
            loss_func = nn.CrossEntropyLoss()
            operator = cls(problem.model, loss_func, params, data, **options, **more)
            v = random_tensor(problem.device, problem.num_params, *([columns] if columns else []))
            return product_case(v, lambda: operator.__matmul__)

        return make

    def jacobian(cls: Any) -> Callable[[], Case]:
        def make() -> Case:
            J = cls(problem.model, params, data, **options)
            return product_case(random_tensor(problem.device, J.shape[1]), lambda: J.__matmul__)

        return make

    H, G = curvlinops.HessianLinearOperator, curvlinops.GGNLinearOperator
    found: Cases = {
        "Hessian": case(H),
        "GGN": case(G),
        "EF": case(curvlinops.EFLinearOperator),
        "MC GGN": case(curvlinops.FisherMCLinearOperator, mc_samples=1),
        "Jacobian": jacobian(curvlinops.JacobianLinearOperator),
        "transposed Jacobian": jacobian(curvlinops.TransposedJacobianLinearOperator),
    }
    for what, cls in zip(PLAIN, (H, G), strict=True):
        for k in {*POWERS, COLUMNS}:
            found[by_columns(what, k)] = case(cls, columns=k)
    return found


def _factors_of_curvlinops_for_pytorch(problem: Problem) -> Cases:
    """Its Kronecker factors; asked for their trace, it does all work."""
    import curvlinops

    params, several_terms = list(problem.matrices.values()), problem.terms_per_example > 1
    K, E = curvlinops.KFACLinearOperator, curvlinops.EKFACLinearOperator

    def build(
        cls: Any, fisher_type: str = "mc", kfac_approx: str = "expand", checked: bool = False
    ) -> Any:
        model, data = problem.model, problem.data
        if several_terms and cls is E:  # it takes 2d outputs only
            model, data = Flat(model), [(X, y.flatten()) for X, y in data]
        operator = cls(
            model,
            nn.CrossEntropyLoss(),
            params,
            data,
            check_deterministic=checked,
            fisher_type=fisher_type,
            kfac_approx=kfac_approx,
            num_per_example_loss_terms=problem.terms_per_example,
            separate_weight_and_bias=False,
            num_data=problem.num_data,
        )
        _ = operator.trace
        return operator

    def result(operator: Any) -> dict[str, Tensor]:
        v = random_tensor(problem.device, operator.shape[1])
        return {"product": operator @ v, "number": torch.as_tensor(operator.trace)}

    def constructor(cls: Any, fisher_type: str = "mc", **options: Any) -> Any:
        def make() -> Case:
            if several_terms and fisher_type == "type-2":
                # at initialisation KFAC's trace is 1.3 times, and EKFAC's 6 times the one with its
                # own Monte-Carlo samples, which has the same expectation
                raise UnusableError("another matrix: mixes loss terms")
            return Case(lambda: build(cls, fisher_type, **options), result)

        return make

    def product(cls: Any, inverse: bool) -> Any:
        def make() -> Case:
            operator = build(cls)
            if inverse:
                operator = curvlinops.KFACInverseLinearOperator(
                    operator, damping=DAMPING, use_exact_damping=True
                )
            v = random_tensor(problem.device, operator.shape[1])
            return product_case(v, lambda: operator.__matmul__)

        return make

    found: Cases = {"KFAC reduce": constructor(K, kfac_approx="reduce")}
    for name, cls in (("KFAC", K), ("EKFAC", E)):
        for suffix, fisher_type in FISHER_TYPES.items():
            found[f"{name}{suffix}"] = constructor(cls, fisher_type)
            found[f"{name}{suffix}, checked"] = constructor(cls, fisher_type, checked=True)
        found[f"{name} product"] = product(cls, inverse=False)
        found[f"{name} inverse product"] = product(cls, inverse=True)
    return found


# --------------------------------------------------------------------------------------------------
# hessian-eigenthings
# --------------------------------------------------------------------------------------------------
def hessian_eigenthings(problem: Problem) -> Cases:
    """Average over batches, which have the same size here."""
    import hessian_eigenthings as he

    model, data, loss_func = problem.model, problem.data, nn.CrossEntropyLoss()

    def hessian() -> Any:
        return he.HessianOperator(model, data, he.supervised_loss(loss_func)).matvec

    def ggn() -> Any:
        forward, loss_of_output = he.supervised_forward, he.supervised_loss_of_output(loss_func)
        return he.GGNOperator(model, data, forward, loss_of_output).matvec

    def ef() -> Any:
        if problem.terms_per_example > 1:
            raise UnusableError("one loss term per example")
        loss_of_one = he.supervised_per_sample_loss(loss_func)
        return he.EmpiricalFisherOperator(model, data, loss_of_one).matvec

    def case(build: Any) -> Any:
        return lambda: product_case(random_tensor(problem.device, problem.num_params), build)

    return {"Hessian": case(hessian), "GGN": case(ggn), "EF": case(ef)}


# --------------------------------------------------------------------------------------------------
# backpack-for-pytorch
# --------------------------------------------------------------------------------------------------
def backpack(problem: Problem) -> Cases:
    """Average over batches; its backward pass always computes the gradient, too."""
    import backpack as package
    from backpack.extensions import KFAC, KFLR, DiagGGNExact, DiagGGNMC

    Saved = dict[str, list[Tensor]]  # by parameter: Kronecker factors, or a diagonal
    params = problem.matrices
    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
    extended: list[nn.Module] = []

    def average(extension: Callable[[], Any]) -> Saved:
        saved: Saved = {}
        model, loss_func = extended
        for X, y in problem.data:
            try:
                with package.backpack(extension()):
                    loss_func(model(X), y).backward()
            except NotImplementedError as error:
                raise UnusableError("layers not supported") from error
            share = len(X) / problem.num_data
            for name, p in params.items():
                new = getattr(p, extension().savefield)
                delattr(p, extension().savefield)  # lest it is held until the next run
                new = new if isinstance(new, list) else [new]
                if name in saved:
                    torch._foreach_add_(saved[name], new, alpha=share)
                else:
                    saved[name] = [part * share for part in new]
                p.grad = None
        return saved

    def kronecker(saved: Saved) -> dict[str, Tensor]:
        v = random_tensor(problem.device, sum(p.numel() for p in params.values()))
        products, trace = [], torch.zeros((), device=problem.device)
        parts = v.split([p.numel() for p in params.values()])
        for part, (B, *A) in zip(parts, saved.values(), strict=True):
            rows = B @ part.reshape(len(B), -1)
            products.append((rows @ A[0] if A else rows).flatten())
            trace = trace + B.trace() * (A[0].trace() if A else 1)
        return {"product": torch.cat(products), "number": trace}

    def diagonal(saved: Saved) -> dict[str, Tensor]:
        d = torch.cat([part.flatten() for (part,) in saved.values()])
        return {"product": d * random_tensor(problem.device, len(d)), "number": d.sum()}

    def case(extension: Any, result: Any) -> Callable[[], Case]:
        def make() -> Case:
            extended[:] = package.extend(problem.model), package.extend(nn.CrossEntropyLoss())
            return Case(lambda: average(extension), result)

        return make

    return {
        "KFAC, separate bias": case(KFAC, kronecker),
        "KFAC type-2, separate bias": case(KFLR, kronecker),
        "GGN diagonal": case(DiagGGNExact, diagonal),
        "MC GGN diagonal": case(DiagGGNMC, diagonal),
    }


# --------------------------------------------------------------------------------------------------
# nngeometry
# --------------------------------------------------------------------------------------------------
def nngeometry(problem: Problem) -> Cases:
    """Fisher matrices in its representations; it wants a ``DataLoader`` over examples."""
    from nngeometry.layercollection import LayerCollection
    from nngeometry.metrics import FIM, FIM_MonteCarlo
    from nngeometry.object import PMatDiag, PMatEKFAC, PMatImplicit, PMatKFAC, PVector
    from torch.utils.data import DataLoader, TensorDataset

    model = problem.model
    try:
        LayerCollection.from_model(model)
    except Exception as error:  # it raises this class
        raise UnusableError("layers not supported") from error
    X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
    loader = DataLoader(TensorDataset(X, y), batch_size=len(problem.data[0][0]))
    options = {"loader": loader, "device": str(problem.device)}

    def multiply(F: Any) -> Callable[[Tensor], Tensor]:
        layers = LayerCollection.from_model(model)
        return lambda v: F.mv(PVector(layers, vector_repr=v)).to_torch()

    def result(F: Any) -> dict[str, Tensor]:
        v = random_tensor(problem.device, problem.num_params)
        return {"product": multiply(F)(v).detach(), "number": F.trace().detach()}

    def exact(representation: Any) -> Callable[[], Any]:
        return lambda: FIM(model=model, representation=representation, **options)

    def sampled(representation: Any) -> Callable[[], Any]:
        return lambda: FIM_MonteCarlo(
            model=model, representation=representation, trials=1, **options
        )

    def ekfac() -> Any:
        F = exact(PMatEKFAC)()
        F.update_diag(loader)
        return F

    def constructor(build: Callable[[], Any]) -> Callable[[], Case]:
        return lambda: Case(build, result)

    def ggn() -> Case:
        v = random_tensor(problem.device, problem.num_params)
        return product_case(v, lambda: multiply(exact(PMatImplicit)()))

    return {
        "GGN": ggn,
        "KFAC": constructor(sampled(PMatKFAC)),
        "KFAC type-2": constructor(exact(PMatKFAC)),
        "EKFAC type-2": constructor(ekfac),
        "GGN diagonal": constructor(exact(PMatDiag)),
        "MC GGN diagonal": constructor(sampled(PMatDiag)),
    }


# --------------------------------------------------------------------------------------------------
# kronfluence
# --------------------------------------------------------------------------------------------------
def kronfluence(problem: Problem) -> Cases:
    """EKFAC with samples; it writes all factors to disk, which its time includes."""
    from kronfluence import Analyzer, FactorArguments, Task, prepare_model
    from torch.utils.data import TensorDataset

    class Classification(Task):
        """The sum of all loss terms, as its documentation has it."""

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            """Evaluate the loss for given targets, or for the model's own."""
            inputs, targets = batch
            logits = model(inputs)
            if sample:
                p = logits.detach().softmax(1).movedim(1, -1)  # [n, ..., classes]
                targets = p.flatten(0, -2).multinomial(1).view(p.shape[:-1])
            return nn.functional.cross_entropy(logits, targets, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            """Evaluate what influences are of, which is not asked for."""
            return self.compute_train_loss(batch, model)

    def ekfac() -> Case:
        logging.disable(logging.WARNING)
        task = Classification()
        model = prepare_model(model=copy.deepcopy(problem.model), task=task)
        folder = tempfile.TemporaryDirectory()
        analyzer = Analyzer(
            analysis_name="benchmark",
            model=model,
            task=task,
            cpu=problem.device.type == "cpu",
            disable_tqdm=True,
            output_dir=folder.name,
        )
        X, y = (torch.cat(parts).cpu() for parts in zip(*problem.data, strict=True))
        dataset = TensorDataset(X, y)
        arguments = FactorArguments(strategy="ekfac", eigendecomposition_dtype=torch.float32)

        def run() -> Any:
            analyzer.fit_all_factors(
                factors_name="ekfac",
                dataset=dataset,
                per_device_batch_size=len(problem.data[0][0]),
                factor_args=arguments,
                overwrite_output_dir=True,
            )
            return folder  # it lives as long as the case

        def result(folder: Any) -> dict[str, Tensor]:
            # eigenvalues are summed over examples, and the loss over their terms
            saved = analyzer.load_lambda_matrices("ekfac")
            sums, numbers = saved["lambda_matrix"], saved["num_lambda_processed"]
            trace = sum(sums[name].sum() / numbers[name].sum() for name in sums)
            return {"number": trace / problem.terms_per_example}

        return Case(run, result)

    return {"EKFAC": ekfac}
