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
    cg,
)

mpl.use("Agg")
from matplotlib import pyplot as plt

DAMPING = 1e-2
FIGURE = Path(__file__).parent / "figures" / "digits.png"

Data = list[tuple[Tensor, Tensor]]


def make_data(batch_size: int = 256, num_train: int = 1437) -> tuple[Data, Data]:
    """Return training and test batches of images [n, 1, 8, 8] and labels [n]."""
    digits = load_digits()
    X = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.as_tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    X, y = X[order], y[order]
    train = list(zip(X[:num_train].split(batch_size), y[:num_train].split(batch_size), strict=True))
    return train, [(X[num_train:], y[num_train:])]


def make_model() -> nn.Sequential:
    """Return a small convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def train_model(model: nn.Module, loss_func: nn.Module, data: Data, epochs: int = 15) -> None:
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


def gradient(model: nn.Module, loss_func: nn.Module, params: dict[str, Tensor], data: Data) -> list:
    """Return the gradient of the mean loss over all data."""
    num_data = sum(len(y) for _, y in data)
    loss = sum(loss_func(model(X), y) * (len(y) / num_data) for X, y in data)
    return list(torch.autograd.grad(loss, list(params.values())))


def solve(model: nn.Module, loss_func: nn.Module, params: dict, data: Data, K) -> tuple:
    """Solve (GGN + δI) x = gradient by CG, without and with KFAC's inverse as preconditioner."""
    GGN = GGNLinearOperator(model, loss_func, params, data)
    damped = GGN + DAMPING * IdentityLinearOperator(GGN.in_shape, GGN.device, GGN.dtype)
    b = gradient(model, loss_func, params, data)
    x_plain, plain = cg(damped, b, tolerance=1e-4)
    preconditioner = K.inverse(damping=DAMPING, use_exact_damping=True)
    x_kfac, kfac = cg(damped, b, tolerance=1e-4, preconditioner=preconditioner)
    return b, (x_plain, plain), (x_kfac, kfac)


def check_against_dense(model: nn.Module, loss_func: nn.Module, data: Data) -> float:
    """Compare both solves with a dense one, in float64, on the network's last layer."""
    double = make_model().double()
    double.load_state_dict(model.state_dict())
    data = [(X.double(), y) for X, y in data]
    params = {name: p for name, p in double.named_parameters() if name.startswith("7.")}
    K = KFACLinearOperator(double, loss_func, params, data, fisher_type="type-2")
    b, *solutions = solve(double, loss_func, params, data, K)
    GGN = GGNLinearOperator(double, loss_func, params, data).to_dense()
    flat = torch.cat([g.flatten() for g in b])
    exact = torch.linalg.solve(GGN + DAMPING * torch.eye(len(flat), dtype=GGN.dtype), flat)
    errors = [
        (torch.cat([x.flatten() for x in solution]) - exact).norm() / exact.norm()
        for solution, _ in solutions
    ]
    return max(errors).item()


def use_in_fresh_process(K: KFACLinearOperator, b: list[Tensor]) -> None:
    """Save K, and multiply with its inverse in a process without the network and the data."""
    program = """
import sys, torch, curvlinops
K = torch.load(sys.argv[1] + "/kfac.pt")
b = torch.load(sys.argv[1] + "/b.pt")
torch.save(K.inverse(damping=1e-2, use_exact_damping=True) @ b, sys.argv[1] + "/x.pt")
"""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(K, f"{folder}/kfac.pt")
        torch.save(b, f"{folder}/b.pt")
        subprocess.run([sys.executable, "-W", "error", "-c", program, folder], check=True)
        loaded = torch.load(f"{folder}/x.pt")
        size = Path(folder, "kfac.pt").stat().st_size
    here = K.inverse(damping=DAMPING, use_exact_damping=True) @ b
    for x, y in zip(loaded, here, strict=True):
        torch.testing.assert_close(x, y)
    print(f"Saved K ({size / 1024:.0f} KiB); a fresh process applied its inverse.")


def plot(model, loss_func, params, data, K, plain, kfac, path: Path) -> None:
    """Draw convergence, eigenvalues of the factors, and a block of GGN beside that of KFAC."""
    figure = plt.figure(figsize=(11, 6.6), layout="constrained")
    convergence, spectrum, exact, approximate = figure.subplots(2, 2).flatten()

    convergence.semilogy(plain.history, label="CG")
    convergence.semilogy(kfac.history, label="CG, preconditioned with KFAC")
    convergence.set(xlabel="iteration", ylabel="relative residual", title="(GGN + δI) x = gradient")
    convergence.legend()

    for name in [name for name in params if name.endswith("weight")]:
        for factor, what, style in zip(K.factors(name), ("gradients", "inputs"), "-:", strict=True):
            values = torch.linalg.eigvalsh(factor.double()).flip(0).clamp(min=1e-12)
            color = f"C{[n for n in params if n.endswith('weight')].index(name)}"
            spectrum.semilogy(values, style, color=color, label=f"{name}, {what}")
    spectrum.set(xlabel="index", ylabel="eigenvalue", title="Kronecker factors", ylim=(1e-9, None))
    spectrum.set_xscale("log")
    spectrum.legend(fontsize=7, ncols=2)

    name = "0.weight"
    block = {name: params[name]}
    matrices = [
        GGNLinearOperator(model, loss_func, block, data).to_dense(),
        K.block(name).to_dense(),
    ]
    limit = matrices[0].abs().max().item()
    for axis, matrix, title in zip((exact, approximate), matrices, ("GGN", "KFAC"), strict=True):
        image = axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set(title=f"{title}, block of {name}", xticks=[], yticks=[])
        figure.colorbar(image, ax=axis, shrink=0.8)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"Wrote {path}")


def main(path: Path) -> None:
    """Run everything."""
    torch.manual_seed(0)
    train, test = make_data()
    model, loss_func = make_model(), nn.CrossEntropyLoss()
    train_model(model, loss_func, train)
    print(f"Accuracy: {accuracy(model, train):.1%} (training), {accuracy(model, test):.1%} (test)")

    params = dict(model.named_parameters())
    K = KFACLinearOperator(
        model, loss_func, params, train, fisher_type="type-2", progressbar=True
    )
    damped = K + DAMPING * K**0
    print(K.summary())
    print(f"Trace of K: {K.trace():.4g}. Log-determinant of K + {DAMPING} I: {damped.logdet():.6g}")

    b, (_, plain), (_, kfac) = solve(model, loss_func, params, train, K)
    print(f"CG: {int(plain.iterations)} iterations; with KFAC: {int(kfac.iterations)}")
    assert kfac.converged.all() and plain.converged.all()
    assert 2 * kfac.iterations <= plain.iterations
    error = check_against_dense(model, loss_func, train)
    print(f"Largest relative error to a dense solve, last layer in float64: {error:.1e}")
    assert error < 1e-3

    H = HessianLinearOperator(model, loss_func, params, train)
    top = eigsh(H.to_scipy(), k=4, which="LA", return_eigenvectors=False, tol=1e-3)
    print(f"Largest eigenvalues of the Hessian: {top[::-1].round(3)}")

    use_in_fresh_process(K, b)
    plot(model, loss_func, params, train, K, plain, kfac, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURE)
