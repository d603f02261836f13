"""Spectrum of a trained network's Hessian: outliers, bulk, and trace, from products alone.

What it shows, for a network with 650 parameters that was trained on the 8 × 8 images that ship with
scikit-learn. The network is so small that its Hessian fits into memory; that is the reference.

1. Its largest eigenvalues by ``eigsh``. As Papyan (2020, "Traces of class/cross-class structure
   pervade deep learning spectra") and Sagun et al. (2018, "Empirical analysis of the Hessian of
   over-parametrized neural networks") found for large networks, about as many as there are classes
   are separated from all others. Here it is one fewer than the classes, 9 (asserted): the largest
   ratio of neighbours among the first 20 eigenvalues is the one after the ninth. A tenth of all
   eigenvalues or more is negative (asserted), unlike those of the GGN. Eigenvalues agree
   with dense ones to 1e-6 (asserted).
2. The density of all eigenvalues by Lanczos processes, also in the logarithm, as in Papyan (2020)
   and Ghorbani et al. (2019, "An investigation into neural net optimization via Hessian eigenvalue
   density"). Their distribution functions differ from the exact ones, smoothed by the same
   Gaussians, by at most 0.03 and, for the logarithm, 0.07 (asserted).
3. The trace by three estimators, 30 times each. Hutchinson's errors agree with their theory to 25 %
   on average. Hutch++ and XTrace deal with outliers apart: with 60 products, their errors are at
   most 0.75 times those of the theory (asserted).

Run it with ``python docs_src/examples/spectrum.py``. It writes one figure, to
``figures/spectrum.png`` beside this script or to the path given as argument.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from curvlinops import (
    HessianLinearOperator,
    PyTorchLinearOperator,
    TensorLinearOperator,
    eigsh,
    hutchinson_trace,
    hutchpp_trace,
    lanczos_approximate_log_spectrum,
    lanczos_approximate_spectrum,
    xtrace,
)
from curvlinops.plotting import plot_spectral_density

mpl.use("Agg")
from matplotlib import pyplot as plt

SEED = 0
NUM_CLASSES, NUM_TRAIN, NUM_FEATURES, WIDTH = 10, 1000, 12, 16
EPOCHS, BATCH_SIZE, LEARNING_RATE = 20, 100, 0.1

NUM_LARGEST = 20  # eigenvalues by eigsh
STEPS, KAPPA = 50, 3.0  # of Lanczos processes; the larger κ, the narrower their Gaussians
LOG_STEPS, LOG_KAPPA = 120, 1.04  # it takes more steps to resolve what is close to zero
EPSILON = 1e-3  # is added to magnitudes before taking the logarithm
REPEATS = 6  # processes, which share products
PRODUCTS = (18, 36, 60, 120)  # for the trace: even, and divisible by 3
REPORTED = 60
RUNS = 30  # of each estimator of the trace
ESTIMATORS = {"Hutchinson": hutchinson_trace, "Hutch++": hutchpp_trace, "XTrace": xtrace}

FIGURE = Path(__file__).parent / "figures" / "spectrum.png"
COLOURS = ("#0072b2", "#d55e00", "#009e73")  # told apart by colour-blind readers, too

Density = tuple[Tensor, Tensor]  # grid and density


class Counted(PyTorchLinearOperator):
    """A symmetric operator that counts the vectors it multiplies."""

    SELF_ADJOINT = True

    def __init__(self, A: PyTorchLinearOperator):
        super().__init__(A.in_shape, A.out_shape)
        self.A = A
        self.count = 0

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        self.count += X[0].shape[-1]
        result: list[Tensor] = self.A @ X
        return result


def make_data() -> tuple[Tensor, Tensor]:
    """Return features [n, 20], the leading principal components of images, and labels [n]."""
    digits = load_digits()
    X = torch.as_tensor(digits.data)
    y = torch.as_tensor(digits.target)
    X = X - X.mean(0)
    X = X @ torch.linalg.svd(X, full_matrices=False).Vh[:NUM_FEATURES].T
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SEED))[:NUM_TRAIN]
    return X[order] / X.std(), y[order]


def train(X: Tensor, y: Tensor, loss_func: nn.Module) -> nn.Sequential:
    """Return a trained network of three layers."""
    torch.manual_seed(SEED)
    model = nn.Sequential(
        nn.Linear(NUM_FEATURES, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, NUM_CLASSES),
    ).double()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(y)).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss_func(model(X[chosen]), y[chosen]).backward()
            optimizer.step()
        schedule.step()
    return model


def count_outliers(eigenvalues: Tensor) -> int:
    """Return how many of descending eigenvalues come before the largest ratio of neighbours."""
    return int((eigenvalues[:-1] / eigenvalues[1:]).argmax()) + 1


def smoothed(eigenvalues: Tensor, grid: Tensor, steps: int, kappa: float) -> Tensor:
    """Return the exact density that a Lanczos density approximates: one Gaussian per eigenvalue.

    Its width is what ``lanczos_approximate_spectrum`` documents, on the grid's interval.
    """
    width = (grid[-1] - grid[0]).item()
    sigma = width / ((steps - 1) * math.sqrt(8 * math.log(kappa)))
    scaled = (grid.unsqueeze(1) - eigenvalues) / sigma  # [num_points, D]
    return (-(scaled**2) / 2).exp().mean(1) / (sigma * math.sqrt(2 * math.pi))


def distance(estimate: Density, exact: Tensor) -> float:
    """Return by how much two distribution functions differ at most (Kolmogorov's distance)."""
    grid, density = estimate
    return torch.cumulative_trapezoid(density - exact, grid).abs().max().item()


def trace_errors(
    estimator: Callable[..., Tensor], A: PyTorchLinearOperator, trace: float
) -> list[float]:
    """Return an estimator's relative root mean square errors, for each number of products."""
    generator = torch.Generator().manual_seed(SEED)
    errors = []
    for num_matvecs in PRODUCTS:
        runs = [estimator(A, num_matvecs, generator=generator).item() for _ in range(RUNS)]
        errors.append((torch.tensor(runs) / trace - 1).square().mean().sqrt().item())
    return errors


def plot(
    exact: Tensor,
    top: Tensor,
    linear: Density,
    exact_linear: Tensor,
    logarithmic: Density,
    exact_logarithmic: Tensor,
    errors: dict[str, list[float]],
    theory: list[float],
    path: Path,
) -> None:
    """Draw the largest eigenvalues, the two densities, and the errors of the trace."""
    figure = plt.figure(figsize=(10.5, 7.5), layout="constrained")
    largest, densities, logs, traces = figure.subplots(2, 2).flatten()
    blue, orange, _ = COLOURS
    num = count_outliers(top)

    index = range(1, len(top) + 1)
    largest.plot(index, exact[: len(top)], "o", mfc="none", ms=10, color="0.4", label="dense")
    largest.plot(index, top, ".", ms=8, color=blue, label="eigsh")
    largest.axvline(num + 0.5, color=orange, ls="--", label=f"{num} outliers, 10 classes")
    largest.set(xlabel="index", ylabel="eigenvalue", title="Largest eigenvalues", ylim=(0, None))
    largest.set_xticks(range(1, len(top) + 1, 2))
    largest.legend()

    for axis, estimate, reference, log_x, title in (
        (densities, linear, exact_linear, False, "Density of all eigenvalues"),
        (logs, logarithmic, exact_logarithmic, True, "Density of log(|λ| + ε)"),
    ):
        grid, density = estimate
        plot_spectral_density(
            grid, reference, ax=axis, log_x=log_x, color="0.75", lw=6, label="exact, smoothed"
        )
        label = f"{REPEATS} Lanczos processes"
        plot_spectral_density(grid, density, ax=axis, log_x=log_x, color=blue, label=label)
        places = exact.abs() + EPSILON if log_x else exact
        bottom, top_of_axis = axis.get_ylim()
        axis.set_ylim(bottom / 30, top_of_axis)  # room for the eigenvalues below the curve
        heights = torch.full_like(places, bottom / 8)
        axis.plot(places, heights, "|", ms=12, color=orange, label="exact eigenvalues")
        axis.set_title(title)
        axis.legend(fontsize=9, loc="center" if log_x else "upper right")

    for (name, values), colour, marker in zip(errors.items(), COLOURS, "osD", strict=True):
        traces.loglog(PRODUCTS, values, marker + "-", color=colour, label=name)
    traces.loglog(PRODUCTS, theory, "k:", label="theory, Hutchinson")
    traces.set(xlabel="products", title="Trace: relative error (root mean square)")
    traces.set_xticks(PRODUCTS, [str(m) for m in PRODUCTS])
    traces.minorticks_off()
    percents = (0.5, 1, 2, 5)
    traces.set_yticks([p / 100 for p in percents], [f"{p} %" for p in percents])
    traces.legend(fontsize=9)
    traces.grid(alpha=0.3)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"Wrote {path}")


def main(path: Path) -> None:
    """Run everything."""
    torch.set_num_threads(1)  # the network is tiny: more threads only get in each other's way
    X, y = make_data()
    loss_func = nn.CrossEntropyLoss(label_smoothing=0.1)
    model = train(X, y, loss_func)
    accuracy = (model(X).argmax(1) == y).double().mean().item()

    params = dict(model.named_parameters())
    H = Counted(HessianLinearOperator(model, loss_func, params, [(X, y)], keep_graph=True))
    dim = H.shape[0]
    dense = H.to_dense(chunk_size=32)
    exact = torch.linalg.eigvalsh(dense).flip(0)
    print(f"A network with {dim} parameters, {accuracy:.1%} of training images correct")

    H.count = 0
    generator = torch.Generator().manual_seed(SEED)
    values, vectors = eigsh(H, k=NUM_LARGEST, which="LA", tolerance=1e-6, generator=generator)
    top, products = values.flip(0), H.count
    error = ((top - exact[:NUM_LARGEST]) / exact[:NUM_LARGEST]).abs().max().item()
    residual = ((H @ vectors - vectors * values).norm(dim=0) / values).max().item()
    num = count_outliers(top)
    gap = (top[num - 1] / top[num]).item()
    print(f"eigsh, {NUM_LARGEST} eigenvalues:  {products} products, relative error {error:.1e}")
    print(f"Residual of eigenvectors: {residual:.1e}")
    print(f"Outliers: {num} of {NUM_CLASSES} classes, {gap:.2f} times the next eigenvalue")

    H.count = 0
    options = {"num_repeats": REPEATS, "chunk_size": REPEATS, "generator": generator}
    linear = lanczos_approximate_spectrum(H, STEPS, kappa=KAPPA, **options)
    logarithmic = lanczos_approximate_log_spectrum(
        H, LOG_STEPS, kappa=LOG_KAPPA, epsilon=EPSILON, **options
    )
    negative = int((exact < -1e-6).sum())
    print(f"Negative eigenvalues, of which the GGN has none: {negative}")
    print(f"Two densities, {REPEATS} Lanczos processes each: {H.count} products")
    t = logarithmic[0].log()
    exact_linear = smoothed(exact, linear[0], STEPS, KAPPA)
    exact_logarithmic = smoothed((exact.abs() + EPSILON).log(), t, LOG_STEPS, LOG_KAPPA)
    distances = {
        "density": distance(linear, exact_linear),
        "log density": distance((t, logarithmic[1]), exact_logarithmic),
    }
    for name, value in distances.items():
        print(f"Distance of the {name} to the exact one: {value:.4f}")

    trace = exact.sum().item()
    # Errors are those of many runs, hence with the matrix that is there already.
    A = TensorLinearOperator(dense)
    errors = {name: trace_errors(run, A, trace) for name, run in ESTIMATORS.items()}
    squares = (dense.square().sum() - dense.diagonal().square().sum()).item()
    theory = [math.sqrt(2 * squares / m) / trace for m in PRODUCTS]
    one = xtrace(H, REPORTED, generator=generator).item()
    print(f"Trace: {trace:.3f}; by XTrace, with {REPORTED} products of the network: {one:.3f}")
    print("Relative error of the trace:" + "".join(f"{n:>12}" for n in ("theory", *errors)))
    for index, m in enumerate(PRODUCTS):
        row = [theory[index], *(values[index] for values in errors.values())]
        print(f"{m:>12} products       " + "".join(f"{value:>12.2%}" for value in row))

    assert error <= 1e-6 and residual <= 1e-5 and products < dim / 2
    assert num == NUM_CLASSES - 1 and negative >= dim / 10
    assert distances["density"] <= 0.03 and distances["log density"] <= 0.07
    ratios = {
        name: [e / t for e, t in zip(values, theory, strict=True)]
        for name, values in errors.items()
    }
    index = PRODUCTS.index(REPORTED)
    assert abs(sum(ratios["Hutchinson"]) / len(PRODUCTS) - 1) <= 0.25
    assert max(ratios["Hutch++"][index], ratios["XTrace"][index]) <= 0.75
    assert abs(one / trace - 1) <= 5 * errors["XTrace"][index]
    plot(exact, top, linear, exact_linear, logarithmic, exact_logarithmic, errors, theory, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURE)
