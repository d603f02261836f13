"""Natural-gradient training with KFAC, compared with SGD and Adam.

What it shows, on the 8 × 8 images that ship with scikit-learn and a network of five layers:

1. KFAC's factors as moving averages over training batches, in both ways that ``KFACAccumulator``
   has: ``update`` passes through the network once more, with labels that the network samples itself
   (the Fisher matrix); ``observe`` listens to the training step's own passes (the empirical Fisher
   matrix, which uses the true labels and costs least);
2. an inverse every few steps, which preconditions the gradients of any PyTorch optimizer;
3. the training loss after 66 steps, as the mean of the last four measurements. SGD and Adam have
   the best of three learning rates each, KFAC has settings that were chosen once and for all. Its
   loss is at most a quarter of SGD's and half of Adam's (asserted).

A step with KFAC takes longer than one of the others, on so small a network by far: the last column
of the table tells. ``natural_gradient_torchrun.py`` beside this script trains on several processes.

Run it with ``python docs_src/examples/natural_gradient.py``. It writes one figure, to
``figures/natural_gradient.png`` beside this script or to the path given as argument.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from curvlinops import KFACAccumulator

NUM_TRAIN, BATCH_SIZE, EPOCHS = 1408, 128, 6  # 11 steps per epoch
MEASURE_EVERY = 3  # steps
LEARNING_RATES = {"SGD": (0.1, 0.2, 0.4), "Adam": (0.01, 0.02, 0.04)}
MOMENTUM = 0.9  # of SGD, also on KFAC's gradients

# KFAC's settings
LEARNING_RATE = 0.1
DECAY = 0.95  # of the moving averages: about the last 20 batches count
DAMPING = 1e-2
INVERT_EVERY = 5  # steps
KL_CLIP = 1e-3

FIGURE = Path(__file__).parent / "figures" / "natural_gradient.png"

Data = tuple[Tensor, Tensor, Tensor, Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]
loss_func = nn.CrossEntropyLoss()


def make_data() -> Data:
    """Return training images [n, 64] and labels [n], then those for the test."""
    digits = load_digits()
    X = torch.as_tensor(digits.data / 16, dtype=torch.get_default_dtype())
    y = torch.as_tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    X, y = X[order], y[order]
    return X[:NUM_TRAIN], y[:NUM_TRAIN], X[NUM_TRAIN:], y[NUM_TRAIN:]


def make_model() -> nn.Sequential:
    """Return a network that is narrow and deep, which makes it hard to train; always the same."""
    torch.manual_seed(0)
    widths = [64, 32, 32, 32, 32]
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def shuffled_batches(data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over the batches of all epochs; they are the same for each optimizer."""
    X, y, *_ = data
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(y), generator=generator).split(BATCH_SIZE):
            yield X[chosen], y[chosen]


class NaturalGradient:
    """Replaces the gradient g of parameters by K⁻¹ g, for any optimizer of PyTorch to go on with.

    With K the Fisher matrix, K⁻¹ g is the natural gradient: the steepest descent, if the length of
    a step is by how much the network's predictions change, rather than its parameters.
    """

    def __init__(self, accumulator: KFACAccumulator, params: dict[str, Tensor]):
        self.accumulator = accumulator
        self.params = params
        self.num_steps = 0

    def precondition(self) -> None:
        """Precondition the gradients in place. On several ranks, all of them call this."""
        if self.num_steps % INVERT_EVERY == 0:
            # Factors change slowly, and inverses are expensive: one may be used for a few steps.
            self.K = self.accumulator.to_operator()
            # Damping keeps steps short where there is little curvature, hence nothing that says
            # how far the quadratic model can be trusted. This one divides it between the two
            # factors of a block according to their size, see Martens & Grosse (2015).
            self.inverse = self.K.inverse(damping=DAMPING, use_heuristic_damping=True)
        self.num_steps += 1

        gradient = {name: p.grad for name, p in self.params.items()}
        direction = self.inverse @ gradient
        # The step -αd changes predictions by a KL divergence of about α² dᵀKd / 2, which is
        # α² gᵀd / 2. Where that is too much, it is scaled down (Ba et al., 2017). Without this,
        # training diverges here.
        change = LEARNING_RATE**2 * sum(float((gradient[n] * direction[n]).sum()) for n in gradient)
        scale = (KL_CLIP / change) ** 0.5 if change > KL_CLIP else 1.0
        for name, p in self.params.items():
            p.grad = scale * direction[name]


def plain_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches
) -> Iterator[None]:
    """Train with one of PyTorch's optimizers; yield after each step."""
    for X, y in batches:
        optimizer.zero_grad()
        loss_func(model(X), y).backward()
        optimizer.step()
        yield


def kfac_steps(model: nn.Module, fisher_type: str, batches: Batches) -> Iterator[None]:
    """Train with KFAC; yield after each step."""
    params = dict(model.named_parameters())
    optimizer = torch.optim.SGD(params.values(), lr=LEARNING_RATE, momentum=MOMENTUM)
    accumulator = KFACAccumulator(
        model,
        loss_func,
        params,
        fisher_type=fisher_type,
        separate_weight_and_bias=False,
        decay=DECAY,
    )
    natural = NaturalGradient(accumulator, params)
    for X, y in batches:
        optimizer.zero_grad()
        if fisher_type == "empirical":
            with accumulator.observe(X, y):  # listens to the two passes inside
                loss_func(model(X), y).backward()
        else:
            loss_func(model(X), y).backward()
            accumulator.update(X, y)  # two passes of its own, which leave gradients alone
        natural.precondition()
        optimizer.step()
        yield


@dataclass
class Run:
    """What happened in training: every few steps, the loss of all training images, and accuracy."""

    label: str
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0  # of the processor, for the steps alone

    @property
    def loss(self) -> float:
        """The mean of the last four losses, as single ones go up and down."""
        return sum(self.losses[-4:]) / 4

    @property
    def accuracy(self) -> float:
        """The mean of the last four accuracies."""
        return sum(self.accuracies[-4:]) / 4


def evaluate(model: nn.Module, X: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the loss, and the fraction of images that are classified correctly."""
    with torch.no_grad():
        prediction = model(X)
        correct = prediction.argmax(1) == y
        return loss_func(prediction, y).item(), correct.double().mean().item()


def record(label: str, model: nn.Module, steps: Iterator[None], data: Data) -> Run:
    """Do all steps of training, and measure what they reach."""
    X, y, X_test, y_test = data
    run = Run(label)
    begin = time.process_time()
    for step, _ in enumerate(steps, start=1):
        run.seconds += time.process_time() - begin
        if step % MEASURE_EVERY == 0:
            run.steps.append(step)
            run.losses.append(evaluate(model, X, y)[0])
            run.accuracies.append(evaluate(model, X_test, y_test)[1])
        begin = time.process_time()
    return run


def run_plain(name: str, data: Data) -> Run:
    """Train with SGD or Adam; return the run whose learning rate gives the least training loss."""
    runs = []
    for lr in LEARNING_RATES[name]:
        model = make_model()
        optimizer: torch.optim.Optimizer
        if name == "SGD":
            optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)
        else:
            optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        steps = plain_steps(model, optimizer, shuffled_batches(data))
        runs.append(record(f"{name}, learning rate {lr}", model, steps, data))
    return min(runs, key=lambda run: run.loss)


def run_kfac(label: str, fisher_type: str, data: Data) -> Run:
    """Train with KFAC."""
    model = make_model()
    return record(label, model, kfac_steps(model, fisher_type, shuffled_batches(data)), data)


def plot(runs: list[Run], path: Path) -> None:
    """Draw the training loss and the test accuracy over the steps."""
    import matplotlib as mpl  # here, as natural_gradient_torchrun.py has no figure

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (losses, accuracies) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for run, style in zip(runs, (":", "--", "-", "-"), strict=True):
        losses.semilogy(run.steps, run.losses, style, label=run.label)
        accuracies.plot(run.steps, [100 * a for a in run.accuracies], style, label=run.label)
    losses.set(xlabel="step", title="Cross-entropy of all training images")
    losses.legend(fontsize=9)
    accuracies.set(xlabel="step", title="Test images classified correctly (%)", ylim=(80, 100))
    for axis in (losses, accuracies):
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"Wrote {path}")


def main(path: Path) -> None:
    """Run everything."""
    torch.set_num_threads(1)  # the network is tiny: more threads only get in each other's way
    data = make_data()
    SGD, Adam = run_plain("SGD", data), run_plain("Adam", data)
    fisher = run_kfac("KFAC, Fisher matrix", "mc", data)
    empirical = run_kfac("KFAC, empirical Fisher matrix", "empirical", data)
    runs = [SGD, Adam, fisher, empirical]

    num_steps = SGD.steps[-1]
    print(f"After {num_steps} steps:                  training loss  test accuracy  time per step")
    for run in runs:
        print(
            f"{run.label:<32}{run.loss:>14.4f}{run.accuracy:>15.1%}"
            f"{1000 * run.seconds / num_steps:>12.1f} ms"
        )
    for run in (fisher, empirical):
        to_SGD, to_Adam = SGD.loss / run.loss, Adam.loss / run.loss
        print(f"{run.label}: loss {to_SGD:.1f} times lower than SGD's, {to_Adam:.1f} than Adam's")
        assert to_SGD >= 4 and to_Adam >= 2
    plot(runs, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURE)
