"""Products with inverse curvature matrices: preconditioners, many right-hand sides, SciPy.

What it shows, for a network that was trained on the 8 × 8 images that ship with scikit-learn. It is
so small that dense matrices in float64 can be the reference for everything.

1. (GGN + δI) X = B by conjugate gradients. The columns of B are the gradients of four test losses,
   and share products. KFAC's and EKFAC's inverses as preconditioners save at least a
   quarter of the iterations, that of a Nyström approximation (Frangella et al., 2023, "Randomized
   Nyström preconditioning") at least 60 %, after one product with 100 vectors (asserted).
2. The same with the Hessian in place of the GGN, by MINRES, and damping that makes it positive
   definite. The preconditioners are still those of the GGN; each saves at least a fifth of the
   iterations (asserted).
3. A truncated Neumann series with as many products as CG is less accurate, at least 10 times
   (asserted).
4. ``CGInverseLinearOperator`` inside of larger expressions: the influence of each training example
   on each test loss (Koh & Liang, 2017, "Understanding black-box predictions via influence
   functions"), as a product of three operators; and SciPy's ``eigsh`` in shift-invert mode, which
   finds the most negative eigenvalues of the Hessian. Both agree with dense linear algebra
   (asserted).

Run it with ``python docs_src/examples/inverse_products.py``. It writes one figure, to
``figures/inverse_products.png`` beside this script or to the path given as argument.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from scipy.sparse.linalg import eigsh as scipy_eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn

from curvlinops import (
    CGInverseLinearOperator,
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
    NeumannInverseLinearOperator,
    PerExampleGradientLinearOperator,
    PyTorchLinearOperator,
    cg,
    eigsh,
    minres,
)
from curvlinops.solvers import SolverInfo, nystrom

mpl.use("Agg")
from matplotlib import pyplot as plt

SEED = 0
NUM_TRAIN, NUM_TEST, WIDTH = 600, 4, 12
DAMPING = 3e-3  # of the GGN
TOLERANCE = 1e-6
RANK = 100  # of Nyström approximations
NUM_EIGENVALUES = 3
PLAIN = "no preconditioner"

FIGURE = Path(__file__).parent / "figures" / "inverse_products.png"
COLOURS = ("0.3", "#0072b2", "#e69f00", "#009e73")  # told apart by colour-blind readers, too

STYLES = ("-", "-", "--", "-")  # those of KFAC and EKFAC nearly coincide

Data = list[tuple[Tensor, Tensor]]
Preconditioners = dict[str, PyTorchLinearOperator | None]
Infos = dict[str, SolverInfo]
loss_func = nn.CrossEntropyLoss()


def make_data() -> tuple[Data, Data]:
    """Return training and test images [n, 64] with labels [n].

    Pixels have their raw values, 0 to 16: inputs that are not normalised make curvature
    ill-conditioned, which is what preconditioners are for.
    """
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(SEED))
    X, y = torch.as_tensor(digits.data)[order], torch.as_tensor(digits.target)[order]
    end = NUM_TRAIN + NUM_TEST
    return [(X[:NUM_TRAIN], y[:NUM_TRAIN])], [(X[NUM_TRAIN:end], y[NUM_TRAIN:end])]


def train(data: Data, epochs: int = 12, batch_size: int = 50) -> nn.Sequential:
    """Return a trained network with one hidden layer."""
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    [(X, y)] = data
    for _ in range(epochs):
        for chosen in torch.randperm(len(y)).split(batch_size):
            optimizer.zero_grad()
            loss_func(model(X[chosen]), y[chosen]).backward()
            optimizer.step()
    return model


def make_preconditioners(
    approximations: dict[str, PyTorchLinearOperator], damping: float
) -> Preconditioners:
    """Return the inverse of each approximation of the GGN, damped as the system is."""
    # Exact damping adds a multiple of the identity to a Kronecker product, not to its factors.
    inverses: Preconditioners = {PLAIN: None}
    for name, K in approximations.items():
        inverses[name] = K.inverse(damping, use_exact_damping=True)
    return inverses


def solve_all(
    solver: Callable[..., tuple[Tensor, SolverInfo]],
    A: PyTorchLinearOperator,
    B: Tensor,
    preconditioners: Preconditioners,
    reference: Tensor,
) -> Infos:
    """Solve A X = B with each preconditioner, and print a table; ``reference`` is the solution."""
    infos: Infos = {}
    for name, M in preconditioners.items():
        X, info = solver(A, B, tolerance=TOLERANCE, preconditioner=M)
        infos[name] = info
        count, plain = max(info.iterations).item(), max(infos[PLAIN].iterations).item()
        error = relative_error(X, reference)
        print(f"{name:<20}{count:>6} iterations{count / plain:>8.2f}{error:>16.1e}")
        assert bool(info.converged.all()) and error <= 1e-4
    return infos


def relative_error(X: Tensor, reference: Tensor) -> float:
    """Return the largest error of a column, relative to its norm."""
    return ((X - reference).norm(dim=0) / reference.norm(dim=0)).max().item()


def neumann_residuals(A: PyTorchLinearOperator, b: Tensor, counts: list[int]) -> list[float]:
    """Return relative residuals of Neumann series, after several numbers of products with A."""
    largest = eigsh(A, k=1, which="LA", tolerance=1e-2, return_eigenvectors=False).item()
    residuals = []
    for count in counts:
        x = NeumannInverseLinearOperator(A, num_terms=count, scale=1 / largest) @ b
        residuals.append(((b - A @ x).norm() / b.norm()).item())
    return residuals


def plot(
    systems: dict[str, Infos],
    counts: list[int],
    neumann: list[float],
    cg_alone: list[float],
    path: Path,
) -> None:
    """Draw the residuals of both systems, and those of the Neumann series."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained", sharey=True)
    for axis, (title, infos) in zip(axes, systems.items(), strict=False):
        for (name, info), colour, style in zip(infos.items(), COLOURS, STYLES, strict=True):
            axis.semilogy(info.history, style, color=colour, label=name)
        axis.set(xlabel="iteration", title=title)
    axes[0].set_ylabel("relative residual")
    axes[2].semilogy(cg_alone, color=COLOURS[0], label="CG")
    axes[2].semilogy(counts, neumann, "o-", color="#d55e00", label="Neumann series")
    axes[2].set(xlabel="products", title="One right-hand side, GGN")
    for axis in axes:
        axis.legend(fontsize=9, loc="upper right")
        axis.grid(alpha=0.3)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"Wrote {path}")


def main(path: Path) -> None:
    """Run everything."""
    torch.set_num_threads(1)  # the network is tiny: more threads only get in each other's way
    data, test = make_data()
    model = train(data)
    params = dict(model.named_parameters())
    arguments = (model, loss_func, params)
    GGN = GGNLinearOperator(*arguments, data, keep_graph=True)
    H = HessianLinearOperator(*arguments, data, keep_graph=True)
    # Gradients of single losses are rows; those of the test losses are the right-hand sides.
    train_rows = PerExampleGradientLinearOperator(*arguments, data)
    test_rows = PerExampleGradientLinearOperator(*arguments, test)
    B = test_rows.T @ torch.eye(NUM_TEST, dtype=torch.float64)  # [D, 4]
    dense_GGN, dense_H = GGN.to_dense(chunk_size=32), H.to_dense(chunk_size=32)
    eye = torch.eye(len(B), dtype=torch.float64)
    print(f"{len(B)} parameters, loss {H.risk.loss_and_gradient()[0].item():.3f}")

    options = {"fisher_type": "type-2", "separate_weight_and_bias": False}
    approximations: dict[str, PyTorchLinearOperator] = {
        "KFAC": KFACLinearOperator(*arguments, data, **options),
        "EKFAC": EKFACLinearOperator(*arguments, data, **options),
        "Nyström": nystrom(GGN, RANK, generator=torch.Generator().manual_seed(SEED)),
    }

    print(f"\nGGN + {DAMPING} I, CG                   of plain CG  error to dense")
    A = GGN + DAMPING * GGN**0
    exact = torch.linalg.solve(dense_GGN + DAMPING * eye, B)
    with_GGN = solve_all(cg, A, B, make_preconditioners(approximations, DAMPING), exact)

    spectrum = torch.linalg.eigvalsh(dense_H)
    lowest = eigsh(H, k=1, which="SA", tolerance=1e-3, return_eigenvectors=False).item()
    shift = -1.25 * lowest  # makes the Hessian positive definite
    print(f"\nHessian + {shift:.3f} I, MINRES          of plain MINRES  error to dense")
    damped_H = H + shift * H**0
    exact_H = torch.linalg.solve(dense_H + shift * eye, B)
    preconditioners = make_preconditioners(approximations, shift)
    with_H = solve_all(minres, damped_H, B, preconditioners, exact_H)

    _, alone = cg(A, B[:, 0], tolerance=TOLERANCE)
    counts = [3, 10, 30, 100]
    neumann = neumann_residuals(A, B[:, 0], counts)
    ratio = neumann[-1] / alone.history[counts[-1]]
    print(
        f"\nResidual after {counts[-1]} products: CG {alone.history[counts[-1]]:.1e}, "
        f"Neumann series {neumann[-1]:.1e}, {ratio:.0f} times as much"
    )

    inverse = CGInverseLinearOperator(
        A, tolerance=TOLERANCE, preconditioner=preconditioners["KFAC"]
    )
    influence = train_rows @ inverse @ test_rows.T  # lazy; [600, 4]
    influences = influence @ torch.eye(NUM_TEST, dtype=torch.float64)
    error = relative_error(influences, train_rows @ exact)
    print(f"Influences {list(influence.shape)}: error to dense {error:.1e}")

    # Shift-invert: the largest eigenvalues of (H + shift I)⁻¹ belong to the smallest of H.
    solve = CGInverseLinearOperator(
        damped_H, tolerance=1e-8, preconditioner=preconditioners["Nyström"]
    )
    values = scipy_eigsh(
        H.to_scipy(),
        k=NUM_EIGENVALUES,
        sigma=-shift,
        OPinv=solve.to_scipy(),
        v0=B[:, 0].numpy(),
        return_eigenvectors=False,
    )
    found = torch.as_tensor(values).sort().values
    smallest = spectrum[:NUM_EIGENVALUES]
    difference = ((found - smallest) / smallest).abs().max().item()
    print(
        f"Smallest eigenvalues of the Hessian: {[round(v, 4) for v in found.tolist()]}, "
        f"error {difference:.1e}"
    )

    for infos, bounds in ((with_GGN, (0.75, 0.75, 0.4)), (with_H, (0.8, 0.8, 0.8))):
        plain = max(infos[PLAIN].iterations).item()
        for name, bound in zip(approximations, bounds, strict=True):
            assert max(infos[name].iterations).item() <= bound * plain, name
    assert ratio >= 10
    assert error <= 1e-4 and difference <= 1e-6

    plot({"GGN, CG": with_GGN, "Hessian, MINRES": with_H}, counts, neumann, alone.history, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURE)
