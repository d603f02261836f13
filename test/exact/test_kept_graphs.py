"""Graphs that are kept between products: numbers, model calls, and when they are made anew."""

from __future__ import annotations

import copy
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from exact_cases import (
    PROBLEMS,
    SIZES,
    Apply,
    C,
    Problem,
    assert_close,
    assert_matrix,
    classes,
    cross_entropy,
    mlp,
    rand,
    sequences,
    vectors,
)
from exact_kinds import KINDS, build, dense
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvlinops import record_gradients

each_kind = pytest.mark.parametrize("kind", KINDS)
BATCHES = list(SIZES)


class Net(nn.Module):
    """Depends on parameters, a buffer, and the flag for training; records the sizes of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.last = nn.Linear(4, C)
        self.register_buffer("scale", torch.tensor(0.7))
        self.calls: list[int] = []
        self.double()

    def forward(self, X: Tensor) -> Tensor:
        self.calls.append(len(X))
        h = torch.tanh(self.first(X)) * self.scale
        return self.last(2 * h if self.training else h)


def net_problem(data: Any = None) -> Problem:
    """Not all parameters are given; the loss has a buffer."""
    net = Net().eval()
    given = {name: p for name, p in net.named_parameters() if name != "first.bias"}
    weight = torch.tensor([0.5, 2.0, 1.2], dtype=torch.float64)
    losses = {r: nn.CrossEntropyLoss(weight=weight, reduction=r) for r in ("mean", "none", "sum")}
    data = vectors() if data is None else data
    return Problem(net, losses.__getitem__, data, params=given)


class Watched:
    """An operator that keeps graphs, and a model that tells its calls."""

    def __init__(self, kind: str, problem: Problem | None = None, **options: Any) -> None:
        self.kind = kind
        self.problem = net_problem() if problem is None else problem
        self.net: Any = self.problem.model
        self.operator = build(kind, self.problem, keep_graph=True, **options)
        self.v = rand(self.operator.shape[1])

    def calls(self) -> list[int]:
        """Multiply, and return the sizes of the batches that the model was called with."""
        self.net.calls.clear()
        self.result = self.operator @ self.v
        return list(self.net.calls)

    def assert_right(self) -> None:
        """Compare the last product with that of a new operator without kept graphs."""
        expected = build(self.kind, self.problem) @ self.v
        assert_close(self.result, expected)


# ---- right numbers -------------------------------------------------------------------------------
@each_kind
@pytest.mark.parametrize("columns", [(), (1,), (3,)], ids=["vector", "K=1", "K=3"])
def test_first_and_later_products(kind: str, columns: tuple[int, ...]) -> None:
    """All products are right, with as many columns as before or not; only the first calls."""
    problem = net_problem()
    problem.loss = cross_entropy  # for the reference, which knows no weights
    A, reference = build(kind, problem, keep_graph=True), dense(kind, problem)
    problem.model.calls.clear()
    for shape in (columns, columns, (5,), (), columns):
        V = rand(A.shape[1], *shape)
        assert_close(A @ V, reference @ V)
    assert problem.model.calls == BATCHES


@pytest.mark.parametrize("kind", ["Hessian", "GGN"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_any_model_and_loss(kind: str, name: str) -> None:
    """Layers, losses, formats of data; each reduction's normalizer is kept with the graph."""
    problem = PROBLEMS[name]()
    for reduction in ("mean", "sum"):
        A = problem.operator(KINDS[kind][0], reduction, keep_graph=True)
        expected = problem.dense(KINDS[kind][0], reduction)
        for _ in range(2):
            assert_matrix(A, expected)
            assert_close(A @ expected[0], expected @ expected[0], scale=expected.norm().item() ** 2)


@pytest.mark.parametrize("kind", ["EF", "MC"])
@pytest.mark.parametrize("name", ["sequence_cross_entropy", "CE all options", "tied_embedding"])
def test_loss_terms(kind: str, name: str) -> None:
    """Terms that are ignored count, and samples are those of the plain mode."""
    problem = PROBLEMS[name]()
    plain, kept = build(kind, problem), build(kind, problem, keep_graph=True)
    for columns in ((), (2,), ()):
        V = rand(plain.shape[1], *columns)
        assert_close(kept @ V, plain @ V)


def convolution_problem() -> tuple[Problem, list[int]]:
    """A network with a convolution, and a list of the sizes of batches it is called with."""
    calls: list[int] = []
    model = Apply(
        lambda self, x: calls.append(len(x)) or self.net(x),
        net=nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, C)),
    ).double()
    return Problem(model, cross_entropy, [(rand(n, 2, 3), classes(n)) for n in SIZES]), calls


@each_kind
@pytest.mark.parametrize("check_deterministic", [True, False])
def test_convolutions(kind: str, check_deterministic: bool) -> None:
    """One evaluation serves all products."""
    problem, calls = convolution_problem()
    options = {"keep_graph": True, "check_deterministic": check_deterministic}
    A, reference = build(kind, problem, **options), dense(kind, problem)
    calls.clear()
    V = rand(A.shape[1])
    assert_close(A @ V, reference @ V)
    assert calls == list(SIZES)
    calls.clear()
    for columns in ((), (3,), (1,), ()):
        V = rand(A.shape[1], *columns)
        assert_close(A @ V, reference @ V)
    assert calls == []


def test_monte_carlo_terms_after_a_convolution() -> None:
    """Batches count their loss terms once, however often the model is called for a graph."""
    problem, _ = convolution_problem()
    kept, plain = (build("MC", problem, keep_graph=keep) for keep in (True, False))
    one_batch = [tuple(torch.cat(ts) for ts in zip(*problem.data, strict=True))]
    together = build("MC", problem, data=one_batch)
    v = rand(kept.shape[1])
    for A in (kept, plain):
        assert_close(A @ v, together @ v)


# ---- when they are remade ------------------------------------------------------------------------
def step(problem: Problem) -> None:
    """A step of an optimizer, in place."""
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.3)
    for p in problem.model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


def replace_storage(problem: Problem) -> None:
    p = problem.params["last.weight"]
    p.data = 2 * p.data


def change_constant(problem: Problem) -> None:
    with torch.no_grad():
        problem.model.first.bias += 1


def replace_constant(problem: Problem) -> None:
    problem.model.first.bias = nn.Parameter(rand(4))


def change_buffer(problem: Problem) -> None:
    problem.model.scale.mul_(2)


def replace_buffer(problem: Problem) -> None:
    problem.model.scale = torch.tensor(0.3, dtype=torch.float64)


def change_loss(problem: Problem) -> None:
    for reduction in ("mean", "none", "sum"):
        problem.loss(reduction).weight[0] = 3


def require_no_gradients(problem: Problem) -> None:
    problem.model.first.weight.requires_grad_(False)


def change_a_number(problem: Problem) -> None:
    with torch.no_grad():
        problem.params["first.weight"].view(-1)[5] = 1.0


# what all batches depend on
CHANGES = {
    "step": step,
    "storage": replace_storage,
    "constant": change_constant,
    "other constant": replace_constant,
    "buffer": change_buffer,
    "other buffer": replace_buffer,
    "training": lambda problem: problem.model.train(),
    "training of a layer": lambda problem: problem.model.last.train(),
    "loss": change_loss,
    "requires_grad": require_no_gradients,
    "one number": change_a_number,
    "load": lambda problem: problem.model.load_state_dict(Net().state_dict()),
}


@each_kind
@pytest.mark.parametrize("change", CHANGES)
def test_remade_after_a_change(kind: str, change: str) -> None:
    """Once, for all batches."""
    A = Watched(kind)
    assert A.calls() == BATCHES
    CHANGES[change](A.problem)
    assert A.calls() == BATCHES
    A.assert_right()
    assert A.calls() == []
    A.assert_right()


def test_remade_after_a_change_of_another_parameter_type() -> None:
    """A function's parameters are in ``params`` only; a tensor in its closure is not seen."""
    calls: list[int] = []
    params = {"w": rand(3, C)}
    problem = Problem(
        lambda p, X: calls.append(len(X)) or (X @ p["w"]).sin(), cross_entropy, vectors(), params
    )
    problem.predict = lambda p, X: (X @ p["w"]).sin()
    A = build("GGN", problem, keep_graph=True)
    v = rand(A.shape[1])
    A @ v
    params["w"].mul_(-2)
    calls.clear()
    assert_close(A @ v, problem.ggn() @ v)
    assert_close(A @ v, problem.ggn() @ v)
    assert calls == BATCHES


@each_kind
def test_not_remade_without_a_reason(kind: str) -> None:
    """What others do with the model and the data is no reason."""
    A = Watched(kind)
    assert A.calls() == BATCHES
    X, y = A.problem.data[1]
    loss = A.problem.loss("mean")(A.net(X), y)
    loss.backward()
    A.problem.data[1] = [X, y]  # another container of the same tensors
    A.net.eval()
    A.net.requires_grad_(True)
    A.v = rand(*A.v.shape)
    assert A.calls() == []
    A.net.zero_grad()
    copy.deepcopy(A.net).train()
    with torch.no_grad():
        assert A.calls() == []
    with torch.inference_mode():
        A.v = A.v.clone()
        assert A.calls() == []
    A.assert_right()


def change_inputs(data: list[Any]) -> None:
    data[1][0].mul_(2)


def change_targets(data: list[Any]) -> None:
    data[1][1].sub_(1).abs_()


def replace_batch(data: list[Any]) -> None:
    data[1] = tuple(t.clone() for t in data[1])


def replace_inputs(data: list[Any]) -> None:
    data[1] = (rand(1, 3), data[1][1])


def replace_targets(data: list[Any]) -> None:
    data[1] = (data[1][0], (data[1][1] + 1) % C)


def view_of_inputs(data: list[Any]) -> None:
    """The same memory and shape, read in another way."""
    X, y = data[2]
    data[2] = (X.as_strided((4, 3), (1, 4)), y)


DATA_CHANGES = {
    "inputs": (change_inputs, [1]),
    "targets": (change_targets, [1]),
    "batch": (replace_batch, [1]),
    "other inputs": (replace_inputs, [1]),
    "other targets": (replace_targets, [1]),
    "strides": (view_of_inputs, [4]),
    "order": (list.reverse, BATCHES[::-1]),
}


@each_kind
@pytest.mark.parametrize("change", DATA_CHANGES)
def test_changed_batches_are_remade(kind: str, change: str) -> None:
    """And no others, unless the order matters."""
    A = Watched(kind)
    assert A.calls() == BATCHES
    function, called = DATA_CHANGES[change]
    function(A.problem.data)
    if change == "order":
        called = [4, 3]  # the batch in the middle stays, unless its samples are others
        called = [4, 1, 3] if kind != "Hessian" else called
    assert A.calls() == called
    A.assert_right()
    assert A.calls() == []
    A.assert_right()


@pytest.mark.parametrize("where", ["mapping", "value", "key"])
def test_changed_mappings(where: str) -> None:
    """Inputs in mappings are looked into, and what is no tensor is compared."""
    calls: list[int] = []
    net = mlp()

    def predict(self: Any, X: dict[str, Any]) -> Tensor:
        calls.append(len(X["x"][0]))
        return self.net(X["x"][0]) * X["factor"] * (2 if "twice" in X else 1)

    data = [({"once": None, "x": [X], "factor": 1.5}, y) for X, y in vectors()]
    problem = Problem(
        Apply(predict, net=net), cross_entropy, data, batch_size_fn=lambda X: len(X["x"][0])
    )
    A = build("GGN", problem, keep_graph=True)
    v = rand(A.shape[1])
    A @ v
    calls.clear()
    A @ v
    assert calls == []
    if where == "mapping":
        data[1][0]["x"][0].mul_(3)
    elif where == "value":
        data[1][0]["factor"] = 0.5
    else:
        X, y = data[1]
        data[1] = ({"twice" if key == "once" else key: X[key] for key in X}, y)
    result = A @ v
    assert calls == [1]
    assert_close(result, problem.ggn() @ v)


def test_samples_belong_to_their_terms() -> None:
    """A batch with other loss terms before it than before has other samples."""
    model = Apply(lambda self, x: self.net(x).transpose(1, 2), net=mlp())
    data = sequences(lambda *s: rand(*s, 3), classes)
    problem = Problem(model, cross_entropy, data, classes=1)
    kinds = {kind: build(kind, problem, keep_graph=True) for kind in ("MC", "Hessian")}
    v = rand(kinds["MC"].shape[1])
    for A in kinds.values():
        A @ v
    data[0] = (rand(3, 4, 3), classes(3, 4))  # as many examples, but longer sequences
    for kind, A in kinds.items():
        for _ in range(2):
            assert_close(A @ v, build(kind, problem) @ v)


# ---- a list that grew or shrank ------------------------------------------------------------------
@each_kind
def test_other_number_of_batches(kind: str) -> None:
    """The same examples in more and in fewer batches than before."""
    A = Watched(kind)
    data = A.problem.data
    assert A.calls() == BATCHES
    X, y = data.pop()
    data += [(X[:1], y[:1]), (X[1:], y[1:])]
    assert A.calls() == [1, 3]
    A.assert_right()
    assert A.calls() == []
    data[1:] = [tuple(torch.cat(ts) for ts in zip(*data[1:], strict=True))]
    assert A.calls() == [5]
    A.assert_right()
    A.calls()
    assert A.calls() == []
    A.assert_right()


@each_kind
@pytest.mark.parametrize("shrink", [False, True])
def test_stale_graphs_are_freed(kind: str, shrink: bool) -> None:
    """A batch that is not in the data any more is let go, at the latest by the product after."""
    A = Watched(kind)
    A.calls()
    data = A.problem.data
    X, y = data.pop()
    old = [weakref.ref(X), weakref.ref(X.untyped_storage())]
    if shrink:
        middle_X, middle_y = data.pop()
        data.append((torch.cat([middle_X, X]), torch.cat([middle_y, y])))
        del middle_X, middle_y
    else:
        data.append((X.clone(), y))
    del X, y
    assert old[0]() is not None  # a graph and its batch are kept
    A.calls()
    if shrink:
        A.calls()
    assert [ref() for ref in old] == [None, None]
    A.assert_right()


@each_kind
def test_graphs_do_not_outlive_their_parameters(kind: str) -> None:
    """All graphs are let go before the first of a new pass is made: never two sets at once."""
    A = Watched(kind)
    A.calls()
    old = weakref.ref(A.problem.params["last.weight"].untyped_storage())
    replace_storage(A.problem)
    A.calls()
    assert old() is None


def test_graphs_are_freed_before_new_ones_are_made() -> None:
    """A change of the parameters does not double the memory for a while."""
    A = Watched("GGN")
    alive: list[int] = []
    A.net.register_forward_pre_hook(lambda net, args: alive.append(len(A.operator._kept)))
    A.calls()
    step(A.problem)
    A.calls()
    assert alive[-6:] == [0, 1, 2, 0, 1, 2]


@each_kind
def test_a_batch_is_freed_before_its_next_graph_is_made(kind: str) -> None:
    """A change of a batch does not hold two graphs of it for a while."""
    A = Watched(kind)
    A.calls()
    old = weakref.ref(A.problem.data[2][0])
    A.problem.data[2] = (rand(4, 3), classes(4))
    alive: list[bool] = []
    A.net.register_forward_pre_hook(lambda net, args: alive.append(old() is not None))
    A.calls()
    assert alive == [False]


def test_deep_copies_keep_their_own_graphs() -> None:
    """And do not spoil those of the original."""
    A = Watched("GGN")
    A.calls()
    copied = copy.deepcopy(A.operator)
    copied @ A.v
    assert A.calls() == []
    assert len(copied._kept) == len(BATCHES)


# ---- data that are made anew ---------------------------------------------------------------------
class NewTensors:
    """Data that give copies, and remember whether these are alive."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.given: list[weakref.ref[Tensor]] = []

    def __iter__(self) -> Iterator[Any]:
        for X, y in self.batches:
            X, y = X.clone(), y.clone()
            self.given += [weakref.ref(X), weakref.ref(y)]
            yield X, y

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.given)


@each_kind
def test_data_loaders(kind: str) -> None:
    """They give new tensors: a few passes later this is known, and one warning says so."""
    X, y = (torch.cat(ts) for ts in zip(*vectors(), strict=True))
    problem = Problem(mlp(), cross_entropy, [(X, y)])
    A = build(kind, problem, keep_graph=True, data=DataLoader(TensorDataset(X, y), 3))
    reference = dense(kind, problem)
    for _ in range(2):  # it might be a change of all data
        assert_matrix(A, reference)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_matrix(A, reference)
    (message,) = [str(w.message) for w in caught if w.category is UserWarning]
    assert "keep_graph=True has no effect" in message
    assert "new tensors" in message
    assert "Pass a list of batches" in message
    for _ in range(3):
        assert_matrix(A, reference)


@each_kind
def test_new_tensors_are_not_kept(kind: str) -> None:
    """Neither the batches nor their graphs, once it is known."""
    problem = Problem(mlp(), cross_entropy, vectors())
    data = NewTensors(problem.data)
    A = build(kind, problem, keep_graph=True, data=data)
    v = rand(A.shape[1])
    for _ in range(2):
        A @ v
        assert data.alive() == 2 * 3  # never those of two passes
    with pytest.warns(UserWarning, match="no effect"):
        A @ v
    assert data.alive() == 0
    A @ v
    assert data.alive() == 0


def test_data_that_change_now_and_then() -> None:
    """All batches are replaced again and again, but each is used twice: graphs are worth it."""
    A = Watched("GGN")
    for _ in range(4):
        A.problem.data[:] = vectors()
        assert A.calls() == BATCHES
        A.assert_right()
        assert A.calls() == []


def test_one_batch_that_is_always_new() -> None:
    """The others are still worth keeping."""
    A = Watched("GGN")
    A.calls()
    for _ in range(8):
        replace_batch(A.problem.data)
        assert A.calls() == [1]
    A.assert_right()


# ---- where nothing is kept -----------------------------------------------------------------------
class Cube(torch.autograd.Function):
    """Has forward mode, but its derivative in reverse mode cannot be differentiated."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return OnceOnly.apply(3 * ctx.saved_tensors[0] ** 2 * grad)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * tangent


class OnceOnly(torch.autograd.Function):
    """Complains like PyTorch's functions without a second derivative."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise NotImplementedError("derivative for aten::cube_backward is not implemented")

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()


def cubic_problem() -> tuple[Problem, Problem]:
    """A network with such a function, and the same in PyTorch's own functions."""
    layers = {"head": nn.Linear(3, 4), "tail": nn.Linear(4, C)}
    model = Apply(lambda self, x: self.tail(Cube.apply(self.head(x))), **layers).double()
    other = Apply(lambda self, x: self.tail(self.head(x) ** 3), **layers)
    data = vectors()
    return Problem(model, cross_entropy, data), Problem(other, cross_entropy, data)


@each_kind
def test_no_second_derivative_in_reverse_mode(kind: str) -> None:
    """One warning says why nothing is kept; forward mode gives the numbers, now and later."""
    problem, reference = cubic_problem()
    A, expected = build(kind, problem, keep_graph=True), dense(kind, reference)
    v = rand(A.shape[1])
    if kind == "Hessian":  # needs a second derivative
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with pytest.raises(NotImplementedError, match="cube_backw"):
                A @ v
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_close(A @ v, expected @ v)
    (message,) = [str(w.message) for w in caught if w.category is UserWarning]
    assert "keep_graph=True has no effect:" in message
    assert "cube_backw" in message
    for _ in range(2):
        assert_close(A @ v, expected @ v)
    assert len(A._kept) == 0


@each_kind
def test_gradients_of_the_product_need_a_new_graph(kind: str) -> None:
    """Kept graphs cannot record, and are neither used nor harmed."""
    A = Watched(kind)
    A.calls()
    A.v.requires_grad_()
    with record_gradients():
        assert A.calls() == BATCHES
    w = rand(len(A.v))
    (gradient,) = torch.autograd.grad(A.result @ w, A.v)
    A.v = w
    assert A.calls() == []
    assert_close(gradient, A.result)


@pytest.mark.parametrize("what", ["parameters", "inputs"])
@each_kind
def test_inference_tensors(kind: str, what: str) -> None:
    """Nobody counts their changes: graphs are remade each time, without a warning."""
    problem = net_problem()
    with torch.inference_mode():
        if what == "parameters":
            problem.params = {name: p.clone() for name, p in problem.params.items()}
        else:
            problem.data[:] = [(X.clone(), y) for X, y in problem.data]
        A = Watched(kind, problem)
        for _ in range(5):
            assert A.calls() == BATCHES
        if what == "parameters":
            problem.params["last.weight"].mul_(2)
        else:
            problem.data[1][0].mul_(2)
        assert A.calls() == BATCHES
    A.assert_right()


@each_kind
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(kind: str, mode: Callable[[], Any]) -> None:
    """Graphs that are made inside can be used outside, and the other way round."""
    A = Watched(kind)
    with mode():
        assert A.calls() == BATCHES
        assert A.calls() == []
    A.assert_right()
    assert A.calls() == []
    with mode():
        assert A.calls() == []
    A.assert_right()


def test_results_record_no_graph() -> None:
    """Neither of the vector nor of the kept graph."""
    A = Watched("GGN")
    for _ in range(2):
        A.v.requires_grad_()
        A.calls()
        assert A.result.grad_fn is None
        assert not A.result.requires_grad


# ---- copies and accidents ------------------------------------------------------------------------
class ByName:
    """A loss that can be pickled, of a reduction."""

    def __call__(self, reduction: str) -> Any:
        return nn.CrossEntropyLoss(reduction=reduction)


@each_kind
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda A: pickle.loads(pickle.dumps(A))]
)
def test_copies(kind: str, copied: Callable[[Any], Any]) -> None:
    """An operator with graphs can be copied and saved; deep copies do not follow the original."""
    problem = Problem(mlp(), ByName(), vectors())
    A, before = build(kind, problem, keep_graph=True), dense(kind, problem)
    assert_matrix(A, before)
    B = copied(A)
    assert_matrix(B, before)
    with torch.no_grad():
        problem.params["0.weight"].mul_(2)
    after = dense(kind, problem)
    for _ in range(2):
        assert_matrix(B, after if copied is copy.copy else before)
        assert_matrix(A, after)


@each_kind
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["model", "data"])
@pytest.mark.parametrize("when", ["first product", "after a change", "between"])
def test_interrupted_products(kind: str, error: type[BaseException], place: str, when: str) -> None:
    """A product that ends in the middle leaves an operator that is right."""
    fuse: dict[str, int] = {"model": 0, "data": 0}

    def burn(name: str) -> None:
        fuse[name] -= 1
        if fuse[name] == 0:
            raise error

    class Data(list):
        def __iter__(self) -> Iterator[Any]:
            for element in super().__iter__():
                burn("data")
                yield element

    problem = net_problem(Data(vectors()))
    problem.model.register_forward_hook(lambda *args: burn("model"))
    A = Watched(kind, problem)
    if when != "first product":
        A.calls()
    if when == "after a change":
        step(problem)
    fuse[place] = 2
    # the model is not called again without a change
    expected = nullcontext() if when == "between" and place == "model" else pytest.raises(error)
    with expected:
        A.calls()
    fuse[place] = 0
    for _ in range(2):
        A.calls()
        A.assert_right()
    assert A.calls() == []


def test_off_by_default() -> None:
    """Each product calls the model, and nothing is held."""
    problem = net_problem()
    A = build("GGN", problem)
    problem.model.calls.clear()
    v = rand(A.shape[1])
    A @ v
    A @ v
    assert problem.model.calls == 2 * BATCHES
