"""Influence functions: what would the loss of a test image be without one of the training images?

The answer of Koh & Liang (2017, "Understanding black-box predictions via influence functions"): if
the parameters θ minimise J(θ) = Σᵢ ℓᵢ(θ) + λ/2 ‖θ‖², and image i is left out, the loss of a test
image changes by about

    ∇ℓ_testᵀ (H + λI)⁻¹ ∇ℓᵢ,

with H the Hessian of Σᵢ ℓᵢ. For all pairs of images at once, this is a product of three operators:
``A_train @ inverse @ A_test.T``, where the rows of A are the gradients of single images. Grosse et
al. (2023, "Studying large language model generalization with influence functions") have EKFAC for
H, and a solution for the price of some small matrix products.

What it shows, for multinomial logistic regression on the 8 × 8 images that ship with scikit-learn:

1. the predictions of the exact inverse (conjugate gradients), EKFAC's, KFAC's, the GGN's diagonal,
   and without any inverse (products of gradients), compared with the truth: 60 times, an image is
   left out, and the parameters are trained again, to the minimum. The correlation with the truth is
   at least 0.97 for the exact inverse (asserted). EKFAC and KFAC have less, but at least 0.2 more
   than the products of gradients, and in the correlation of ranks (Spearman) 0.25 (asserted);
2. labels that are wrong: 5 % of the training images have a random label. They are looked for where
   leaving out an image helps the test images most. The first 5 % of that list contain at least
   two thirds of them with the exact inverse, EKFAC or KFAC, and more than without (asserted).

The problem is strictly convex. For deep networks, training again leads to another minimum, and
there, influence functions predict something else: a change of training that stays close to θ (Bae
et al., 2022, "If influence functions are the answer, then what is the question?").

Run it with ``python docs_src/examples/influence.py``. It writes one figure, to
``figures/influence.png`` beside this script or to the path given as argument.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from curvlinops import (
    CGInverseLinearOperator,
    EKFACLinearOperator,
    GGNDiagonalLinearOperator,
    HessianLinearOperator,
    IdentityLinearOperator,
    KFACLinearOperator,
    PerExampleGradientLinearOperator,
    PyTorchLinearOperator,
    TensorLinearOperator,
    cg,
)

mpl.use("Agg")
from matplotlib import pyplot as plt

SEED = 0
NUM_TRAIN, NUM_WRONG = 400, 20
NUM_LEFT_OUT, NUM_QUERIES = 60, 20  # training images left out in turn, test images asked about
WEIGHT_DECAY = 2.0  # λ
FIGURE = Path(__file__).parent / "figures" / "influence.png"

EXACT, NOTHING = "exact inverse (CG)", "no inverse"
Data = list[tuple[Tensor, Tensor]]
loss_func = nn.CrossEntropyLoss(reduction="sum")


def make_data() -> tuple[Data, Data, Tensor]:
    """Return training and test images [n, 64] with labels [n], and which training labels are wrong.

    The order is random, so that any slice is a random choice.
    """
    digits = load_digits()
    generator = torch.Generator().manual_seed(SEED)
    order = torch.randperm(len(digits.target), generator=generator)
    X = torch.as_tensor(digits.data / 16)[order]  # in float64
    y = torch.as_tensor(digits.target)[order]
    train, test = (X[:NUM_TRAIN], y[:NUM_TRAIN].clone()), (X[NUM_TRAIN:], y[NUM_TRAIN:])

    chosen = torch.randperm(NUM_TRAIN, generator=generator)[:NUM_WRONG]
    train[1][chosen] += torch.randint(1, 10, (NUM_WRONG,), generator=generator)
    train[1][chosen] %= 10
    wrong = torch.zeros(NUM_TRAIN, dtype=torch.bool)
    wrong[chosen] = True
    return [train], [test], wrong


def minimise(
    model: nn.Module, data: Data, preconditioner: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Train to the minimum of J, by Newton's method: it takes a handful of steps.

    Args:
        model: Its parameters are changed in place.
        data: The training data.
        preconditioner: A product with an approximate inverse of J's Hessian. Default: EKFAC's.
    """
    params = dict(model.named_parameters())
    for _ in range(20):
        H = HessianLinearOperator(model, loss_func, params, data, check_deterministic=False)
        _, gradients = H.risk.loss_and_gradient()
        gradient = {
            name: g + WEIGHT_DECAY * p.detach()
            for (name, p), g in zip(params.items(), gradients, strict=True)
        }
        if max(g.abs().max() for g in gradient.values()) < 1e-6:
            return
        approximate = preconditioner or ekfac(model, params, data).inverse(damping=WEIGHT_DECAY)
        step, _ = cg(damped(H), gradient, tolerance=1e-2, preconditioner=approximate)
        with torch.no_grad():
            for name, p in params.items():
                p -= step[name]
    raise RuntimeError("Newton's method has not converged.")


def damped(H: PyTorchLinearOperator) -> PyTorchLinearOperator:
    """Return H + λI."""
    return H + WEIGHT_DECAY * IdentityLinearOperator(H.in_shape, H.device, H.dtype)


def ekfac(model: nn.Module, params: dict[str, Tensor], data: Data) -> EKFACLinearOperator:
    """Return EKFAC of the sum of losses; "type-2" has no Monte-Carlo samples."""
    return EKFACLinearOperator(
        model, loss_func, params, data, fisher_type="type-2", separate_weight_and_bias=False
    )


def make_inverses(model: nn.Module, data: Data) -> dict[str, PyTorchLinearOperator]:
    """Return (H + λI)⁻¹, exact and approximated. The first one multiplies by solving."""
    params = dict(model.named_parameters())
    H = HessianLinearOperator(model, loss_func, params, data)
    K = KFACLinearOperator(
        model, loss_func, params, data, fisher_type="type-2", separate_weight_and_bias=False
    )
    D = GGNDiagonalLinearOperator(model, loss_func, params, data)
    EKFAC_inverse = ekfac(model, params, data).inverse(damping=WEIGHT_DECAY)
    return {
        EXACT: CGInverseLinearOperator(damped(H), tolerance=1e-8, preconditioner=EKFAC_inverse),
        "EKFAC": EKFAC_inverse,
        "KFAC": K.inverse(damping=WEIGHT_DECAY, use_exact_damping=True),
        "diagonal": D.inverse(damping=WEIGHT_DECAY),
        NOTHING: IdentityLinearOperator(H.in_shape, H.device, H.dtype),
    }


def changes_by_retraining(model: nn.Module, train: Data, queries: tuple[Tensor, Tensor]) -> Tensor:
    """Return how losses change without an image, by training again [NUM_LEFT_OUT, NUM_QUERIES].

    Each minimum is close to the one with all images, so the inverse of the Hessian there is a good
    preconditioner. The minimum does not depend on it.
    """
    ((X, y),) = train
    H = HessianLinearOperator(model, loss_func, dict(model.named_parameters()), train)
    inverse = TensorLinearOperator(H.to_dense()).inverse(damping=WEIGHT_DECAY)
    before = losses(model, queries)
    changes = []
    for i in range(NUM_LEFT_OUT):
        others = torch.arange(NUM_TRAIN) != i
        retrained = copy.deepcopy(model)
        minimise(retrained, [(X[others], y[others])], preconditioner=inverse.__matmul__)
        changes.append(losses(retrained, queries) - before)
    return torch.stack(changes)


@torch.no_grad()
def losses(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of each image."""
    X, y = data
    return cross_entropy(model(X), y, reduction="none")


@dataclass
class Result:
    """What one of the inverses predicts."""

    label: str
    changes: Tensor  # of the queries' losses [NUM_LEFT_OUT, NUM_QUERIES]
    pearson: float  # correlation with the truth, mean over queries
    spearman: float
    found: list[int]  # how many wrong labels are among the first 1, 2, ... training images

    @property
    def precision(self) -> float:
        """The fraction of wrong labels among as many images as have one."""
        return self.found[NUM_WRONG - 1] / NUM_WRONG


def correlation(A: Tensor, B: Tensor) -> float:
    """Return Pearson's correlation of each two columns, on average."""
    A, B = A - A.mean(0), B - B.mean(0)
    return ((A * B).sum(0) / (A.norm(dim=0) * B.norm(dim=0))).mean().item()


def ranks(A: Tensor) -> Tensor:
    """Return the rank of each entry in its column."""
    return A.argsort(0).argsort(0).double()


def predict(
    label: str,
    A_train: PyTorchLinearOperator,
    inverse: PyTorchLinearOperator,
    A_test: PyTorchLinearOperator,
    truth: Tensor,
    wrong: Tensor,
) -> Result:
    """Predict influences, and compare them with the truth."""
    # Nothing is computed here: [NUM_TRAIN, number of test images]
    influence = A_train @ inverse @ A_test.T
    num_test = influence.shape[1]
    queries = torch.eye(num_test, NUM_QUERIES, dtype=torch.float64)
    changes = (influence @ queries)[:NUM_LEFT_OUT]
    # The sum of the test images' losses, one solve: where it falls most comes first.
    order = (influence @ torch.ones(num_test, dtype=torch.float64)).argsort()
    return Result(
        label,
        changes,
        pearson=correlation(changes, truth),
        spearman=correlation(ranks(changes), ranks(truth)),
        found=wrong[order].cumsum(0).tolist(),
    )


def plot(results: dict[str, Result], truth: Tensor, path: Path) -> None:
    """Draw predicted over true changes, and how fast wrong labels are found."""
    figure = plt.figure(figsize=(11, 6.6), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(1, 1, 1.25))
    shown = (EXACT, "EKFAC", "KFAC", NOTHING)
    colours = dict(zip(shown, ("#0072b2", "#009e73", "#e69f00", "#666666"), strict=True))

    for index, label in enumerate(shown):
        axis = figure.add_subplot(grid[index // 2, index % 2])
        result = results[label]
        x, y = result.changes.flatten(), truth.flatten()
        axis.plot(x, y, "o", markersize=3, alpha=0.5, markeredgewidth=0, color=colours[label])
        if label != NOTHING:  # which has other units
            axis.axline((0, 0), slope=1, color="black", linewidth=0.8, linestyle="--")
        axis.set(
            title=f"{label}: correlation {result.pearson:.2f}",
            xlabel="predicted change" if label != NOTHING else "product of gradients",
            ylabel="true change of test loss" if index % 2 == 0 else None,
        )
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.3)

    axis = figure.add_subplot(grid[:, 2])
    for label, style in zip(shown, ("-", "--", "-.", ":"), strict=True):
        found = [0, *results[label].found]
        axis.plot(range(len(found)), found, style, color=colours[label], label=label)
    axis.plot([0, NUM_WRONG, NUM_TRAIN], [0, NUM_WRONG, NUM_WRONG], color="black", linewidth=0.6)
    axis.annotate("best possible", (19.6, 20.1), fontsize=8, va="bottom")
    axis.set(
        title="Search for wrong labels",
        xlabel="training images inspected, most harmful first",
        ylabel=f"wrong labels found, of {NUM_WRONG}",
        xlim=(0, 100),
        ylim=(0, NUM_WRONG + 1),
        yticks=range(0, NUM_WRONG + 1, 5),
    )
    axis.legend(loc="lower right", fontsize=9)
    axis.grid(alpha=0.3)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"Wrote {path}")


def main(path: Path) -> None:
    """Run everything."""
    torch.set_num_threads(1)  # the model is tiny: more threads only get in each other's way
    train, test, wrong = make_data()
    model = nn.Linear(64, 10, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    minimise(model, train)
    ((X_test, y_test),) = test
    accuracy = (model(X_test).argmax(1) == y_test).double().mean().item()
    print(f"Trained on {NUM_TRAIN} images, {NUM_WRONG} labels are wrong; test: {accuracy:.1%}")

    params = dict(model.named_parameters())
    inverses = make_inverses(model, train)
    queries = X_test[:NUM_QUERIES], y_test[:NUM_QUERIES]
    truth = changes_by_retraining(model, train, queries)
    A_train = PerExampleGradientLinearOperator(model, loss_func, params, train)
    A_test = PerExampleGradientLinearOperator(model, loss_func, params, test)
    results = {
        label: predict(label, A_train, inverse, A_test, truth, wrong)
        for label, inverse in inverses.items()
    }

    print("                     Pearson  Spearman  wrong labels found")
    for label, result in results.items():
        print(f"{label:<20}{result.pearson:>8.3f}{result.spearman:>10.3f}{result.precision:>19.0%}")
    nothing = results[NOTHING]
    assert results[EXACT].pearson >= 0.97
    for label in (EXACT, "EKFAC", "KFAC"):
        result = results[label]
        assert result.pearson >= nothing.pearson + 0.2
        assert result.spearman >= nothing.spearman + 0.25
        assert result.precision >= 2 / 3 and result.precision > nothing.precision
    plot(results, truth, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURE)
