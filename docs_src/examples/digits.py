"""Curvature of a small CNN on handwritten digits, from the first product to a saved KFAC.

What it shows, on the 8 × 8 images that ship with scikit-learn:

1. KFAC of the training loss: its summary, trace and log-determinant;
2. solving (GGN + δI) x = gradient by conjugate gradients, with and without KFAC's inverse as
   preconditioner: it saves at least half of the iterations (asserted), and both agree with a dense
   solve on a submodel that is small enough for one (asserted);
3. the largest eigenvalues of the Hessian, by SciPy;
4. KFAC saved, and used by another process that has neither the network nor the data (asserted).

Run it with ``make demo``. It writes one figure, to ``figures/digits.png`` beside this script or to
the path given as argument.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl
import torch
from scipy.sparse.linalg import eigsh
from sklearn.datasets import load_digits
from torch import Tensor, nn

from curvlinops import (
    GGNLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    KFACLinearOperator,
    SubmatrixLinearOperator,
    cg,
)
from curvlinops.solvers import SolverInfo

mpl.use("Agg")
from matplotlib import pyplot as plt

DAMPING = 1e-3
FIGURE = Path(__file__).parent / "figures" / "digits.png"

Data = list[tuple[Tensor, Tensor]]


def make_data(batch_size: int = 512, num_train: int = 1437) -> tuple[Data, Data]:
    """Return training and test batches of images [n, 1, 8, 8] and labels [n].

    Pixels have their raw values, 0 to 16: inputs that are not normalised make curvature
    ill-conditioned, which is what preconditioners are for.
    """
    digits = load_digits()
    X = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    y = torch.as_tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    X, y = X[order], y[order]
    train = list(zip(X[:num_train].split(batch_size), y[:num_train].split(batch_size), strict=True))
    return train, [(X[num_train:], y[num_train:])]


def make_model() -> nn.Sequential:
    """Return a small convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 3 * 3, 10)
    )


def train_model(model: nn.Module, loss_func: nn.Module, data: Data, epochs: int = 30) -> None:
    """Train with Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for X, y in data:
            optimizer.zero_grad()
            loss_func(model(X), y).backward()
            optimizer.step()


def accuracy(model: nn.Module, data: Data) -> float:
    """Return the fraction of images that are classified correctly."""
    with torch.no_grad():
        correct = sum((model(X).argmax(1) == y).sum().item() for X, y in data)
    return correct / sum(len(y) for _, y in data)


def solve(
    model: nn.Module, loss_func: nn.Module, params: dict[str, Tensor], data: Data, tolerance: float
) -> tuple[KFACLinearOperator, list[Tensor], list[Tensor], list[SolverInfo]]:
    """Solve (GGN + δI) x = gradient by CG, without and with KFAC's inverse as preconditioner.

    Returns KFAC, the gradient, the two solutions (flat), and what CG did.
    """
    GGN = GGNLinearOperator(model, loss_func, params, data)
    damped = GGN + DAMPING * IdentityLinearOperator(GGN.in_shape, GGN.device, GGN.dtype)
    _, gradient = GGN.risk.loss_and_gradient()
    b = torch.cat([g.flatten() for g in gradient])

    K = KFACLinearOperator(
        model,
        loss_func,
        params,
        data,
        progressbar=True,
        fisher_type="type-2",
        separate_weight_and_bias=False,
    )
    preconditioner = K.inverse(damping=DAMPING, use_exact_damping=True)
    x, plain = cg(damped, b, tolerance=tolerance)
    x_preconditioned, kfac = cg(damped, b, tolerance=tolerance, preconditioner=preconditioner)
    return K, gradient, [x, x_preconditioned], [plain, kfac]


def check_against_dense(model: nn.Module, loss_func: nn.Module, data: Data) -> float:
    """Compare both solves with a dense one, in float64, for the parameters of the convolution."""
    double = make_model().double()
    double.load_state_dict(model.state_dict())
    data = [(X.double(), y) for X, y in data]
    params = {name: p for name, p in double.named_parameters() if name.startswith("0.")}
    _, gradient, solutions, _ = solve(double, loss_func, params, data, tolerance=1e-10)

    GGN = GGNLinearOperator(double, loss_func, params, data).to_dense()
    b = torch.cat([g.flatten() for g in gradient])
    exact = torch.linalg.solve(GGN + DAMPING * torch.eye(len(b), dtype=b.dtype), b)
    return max(((x - exact).norm() / exact.norm()).item() for x in solutions)


def use_in_fresh_process(K: KFACLinearOperator, b: list[Tensor]) -> None:
    """Save K, and multiply with its inverse in a process without the network and the data."""
    program = """
import sys, torch, curvlinops
K = torch.load(sys.argv[1] + "/kfac.pt")
b = torch.load(sys.argv[1] + "/b.pt")
torch.save(K.inverse(damping=float(sys.argv[2]), use_exact_damping=True) @ b, sys.argv[1] + "/x.pt")
"""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(K, f"{folder}/kfac.pt")
        torch.save(b, f"{folder}/b.pt")
        command = [sys.executable, "-W", "error", "-c", program, folder, str(DAMPING)]
        subprocess.run(command, check=True)
        loaded = torch.load(f"{folder}/x.pt")
        size = Path(folder, "kfac.pt").stat().st_size
    here = K.inverse(damping=DAMPING, use_exact_damping=True) @ b
    for x, y in zip(loaded, here, strict=True):
        torch.testing.assert_close(x, y)
    print(f"Saved K ({size / 1024:.0f} KiB); a fresh process applied its inverse.")


def plot(
    blocks: dict[str, Tensor], K: KFACLinearOperator, infos: list[SolverInfo], path: Path
) -> None:
    """Draw convergence, eigenvalues of the factors, and a block of the GGN beside that of KFAC."""
    figure = plt.figure(figsize=(10, 7), layout="constrained")
    convergence, spectrum, exact, approximate = figure.subplots(2, 2).flatten()

    for info, label in zip(infos, ("CG", "CG, preconditioned with KFAC"), strict=True):
        convergence.semilogy(info.history, label=label)
    convergence.set(
        xlabel="iteration", ylabel="relative residual", title="Solving (GGN + δI) x = gradient"
    )
    convergence.legend()

    for index, group in enumerate(K.mapping):
        name = group["W"]
        for factor, what, style in zip(
            K.factors(name), ("gradient", "input"), ("-o", "--s"), strict=True
        ):
            values = torch.linalg.eigvalsh(factor.double()).flip(0)
            label = f"{name}: {what} factor"
            spectrum.loglog(
                range(1, len(values) + 1),
                values.clamp(min=0).numpy(),
                style,
                color=f"C{index}",
                markersize=3,
                label=label,
            )
    spectrum.set(
        xlabel="index", ylabel="eigenvalue", title="Spectra of KFAC's factors", ylim=(1e-6, None)
    )
    spectrum.legend(fontsize=8)

    limit = 0.5 * blocks["GGN"].abs().max().item()
    for axis, (title, matrix) in zip((exact, approximate), blocks.items(), strict=True):
        image = axis.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set(title=f"{title}: block of the convolution", xticks=[], yticks=[])
        figure.colorbar(image, ax=axis, shrink=0.9)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"Wrote {path}")


def main(path: Path) -> None:
    """Run everything."""
    torch.set_num_threads(1)  # the network is tiny: more threads only get in each other's way
    torch.manual_seed(0)
    train, test = make_data()
    model, loss_func = make_model(), nn.CrossEntropyLoss()
    train_model(model, loss_func, train)
    print(f"Accuracy: {accuracy(model, train):.1%} (training), {accuracy(model, test):.1%} (test)")

    params = dict(model.named_parameters())
    K, gradient, _, infos = solve(model, loss_func, params, train, tolerance=1e-4)
    damped = K + DAMPING * IdentityLinearOperator(K.in_shape, K.device, K.dtype)
    print(f"\n{K.summary()}\n")
    print(f"Trace of K: {K.trace():.4g}")
    print(f"Log-determinant of K + {DAMPING} I: {damped.logdet():.6g}")

    plain, preconditioned = infos
    print(f"CG: {int(plain.iterations)} iterations; with KFAC: {int(preconditioned.iterations)}")
    assert plain.converged.all() and preconditioned.converged.all()
    assert 2 * preconditioned.iterations <= plain.iterations
    error = check_against_dense(model, loss_func, train)
    print(f"Largest error of both to a dense solve (convolution only, float64): {error:.1e}")
    assert error < 1e-6

    H = HessianLinearOperator(model, loss_func, params, train)
    top = eigsh(H.to_scipy(), k=4, which="LA", return_eigenvectors=False, tol=1e-3)
    print(f"Largest eigenvalues of the Hessian: {top[::-1].round(3)}")

    use_in_fresh_process(K, gradient)
    convolution = {name: params[name] for name in ("0.weight", "0.bias")}
    blocks = {
        "GGN": GGNLinearOperator(model, loss_func, convolution, train).to_dense(),
        "KFAC": SubmatrixLinearOperator(K, range(60), range(60)).to_dense(),
    }
    plot(blocks, K, infos, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURE)
