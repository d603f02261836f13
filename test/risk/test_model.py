"""The model as a function: parameters, constants, errors, and what is left of the user's module."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from curvlinops.risk.model import FunctionalModel, autograd_ready

# What torch says about itself at the first use of forward mode.
ignore_torch_script = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's parameters with other values."""
    return {name: 2 * p.detach() + 1 for name, p in module.named_parameters()}


def loaded(module: nn.Module, params: dict[str, Tensor]) -> nn.Module:
    """A copy of a module that has the values in ``params``."""
    other = copy.deepcopy(module)
    for name, p in params.items():
        other.get_parameter(name).data = p.detach().clone()
    return other


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.output = nn.Linear(3, 5)
        self.output.weight = self.embedding.weight

    def forward(self, X: Tensor) -> Tensor:
        return self.output(self.embedding(X))


# Values


def test_evaluates_at_the_given_values() -> None:
    """Predictions belong to ``params``, and not to the module's own values."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    params, X = parameters(net), torch.randn(5, 3)
    model = FunctionalModel(net, params)
    assert torch.equal(model.predict(model.params, X), loaded(net, params)(X))
    # ... and to those passed to `predict`, wherever they come from.
    zero = {name: torch.zeros_like(p) for name, p in params.items()}
    assert torch.equal(model.predict(zero, X), torch.zeros(5, 2))


def test_other_parameters_are_constants() -> None:
    """They have the module's current values, and autograd does not see them."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    X = torch.randn(5, 3)
    params = {"1.weight": torch.randn(2, 4)}
    model = FunctionalModel(net, params)
    assert model.predict(params, X).grad_fn is None  # nn.Linear's own parameters require gradients
    assert torch.equal(model.predict(params, X), loaded(net, params)(X))

    with torch.no_grad():
        net[0].weight.mul_(3)
    net[1].bias = nn.Parameter(torch.ones(2))
    assert torch.equal(model.predict(params, X), loaded(net, params)(X))


class Counting(nn.Module):
    """A layer that changes its buffer, which is another layer's weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("seen", weight)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return x


def test_parameter_that_is_a_buffer_elsewhere() -> None:
    """What changes there is a clone, though it is a constant here."""
    layer = nn.Linear(3, 3, bias=False).requires_grad_(False)
    net = nn.Sequential(layer, Counting(layer.weight), nn.Linear(3, 2))
    assert "1.seen" in dict(net.named_buffers())
    model, before = FunctionalModel(net, {"2.weight": torch.randn(2, 3)}), layer.weight.clone()
    model.predict(model.params, torch.randn(5, 3))
    assert torch.equal(layer.weight, before)


def test_only_the_models_functions_are_seen() -> None:
    """What is done with constants is nobody's business, and watching it would take time."""
    names = []

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model = FunctionalModel(net, {"2.weight": net[2].weight})
    with Watch():
        model.predict(model.params, torch.rand(5, 3))
    assert [name for name in names if name != "rand"] == ["linear", "tanh", "linear"]


def test_dictionary_is_copied() -> None:
    """Later changes of the user's dictionary have no effect; those of the tensors do."""
    net = nn.Linear(3, 2)
    params = dict(net.named_parameters())
    model = FunctionalModel(net, params)
    params.pop("bias")
    assert list(model.params) == ["weight", "bias"]
    assert model.params["weight"] is net.weight


def test_function() -> None:
    """A function gets the parameters and the inputs."""
    params = {"w": torch.randn(3, 2)}
    model = FunctionalModel(lambda params, X: X @ params["w"], params)
    X = torch.randn(5, 3)
    assert torch.equal(model.predict(model.params, X), X @ params["w"])
    assert model.module is None
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


def test_mapping_is_one_argument() -> None:
    """A mapping is passed to the module as it is."""

    class Net(nn.Linear):
        def forward(self, X: dict[str, Tensor]) -> Tensor:
            return super().forward(X["x"]) * X["scale"]

    net, X = Net(3, 2), {"x": torch.randn(4, 3), "scale": torch.tensor(2.0)}
    model = FunctionalModel(net, dict(net.named_parameters()))
    assert torch.equal(model.predict(model.params, X), net(X))


@ignore_torch_script
def test_transforms() -> None:
    """Predictions can be differentiated and vectorised by ``torch.func``, in both modes."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    params = {"0.weight": torch.randn(3, 2, dtype=torch.float64)}
    X = torch.randn(4, 2, dtype=torch.float64)
    model = FunctionalModel(net, params)

    def f(W: Tensor) -> Tensor:
        return model.predict({"0.weight": W}, X)

    W = params["0.weight"]
    J = jacrev(f)(W)  # [4, 1, 3, 2]
    V = torch.randn(5, 3, 2, dtype=torch.float64)
    JV = vmap(lambda v: jvp(f, (W,), (v,))[1])(V)
    assert torch.allclose(JV, torch.einsum("ncij,vij->vnc", J, V))
    H = hessian(lambda W: f(W).square().sum())(W)
    leaf = W.clone().requires_grad_()
    reference = torch.autograd.functional.hessian(lambda W: f(W).square().sum(), leaf)
    assert torch.allclose(H, reference)


@pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers(layer: type[nn.RNNBase]) -> None:
    """Their weights are also kept in a list, which must not hide those in ``params``."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = layer(3, 4, batch_first=True)

        def forward(self, X: Tensor) -> Tensor:
            return self.recurrent(X)[0]

    net, X = Net(), torch.randn(2, 5, 3)
    before, params = net(X), parameters(net)
    model = FunctionalModel(net, params)
    assert torch.allclose(model.predict(params, X), loaded(net, params)(X))
    grad(lambda params: model.predict(params, X).sum())(params)
    copy.deepcopy(net)  # impossible if the list held intermediate results
    assert torch.equal(net(X), before)


@pytest.mark.parametrize("name", ["embedding.weight", "output.weight"])
def test_tied_parameter(name: str) -> None:
    """All usages get the given value, whichever name it was given under."""
    net, X = Tied(), torch.tensor([[0, 3], [1, 4]])
    params = {name: torch.randn(5, 3)}
    model = FunctionalModel(net, params)
    assert torch.equal(model.predict(params, X), loaded(net, params)(X))
    G = grad(lambda p: model.predict(p, X).square().sum())(params)[name]
    other = loaded(net, params)
    other(X).square().sum().backward()
    assert torch.allclose(G, other.embedding.weight.grad)


def test_parameter_that_is_also_a_buffer() -> None:
    """Its copy in the buffers does not compete with the value in ``params``."""
    net = nn.Linear(3, 3)
    net.register_buffer("shared", net.weight)
    params = {"weight": torch.eye(3)}
    output = FunctionalModel(net, params).predict(params, torch.zeros(1, 3))
    assert torch.equal(output[0], net.bias)


# The user's module is left as found


def snapshot(module: nn.Module) -> list[Any]:
    """Everything that must not change: objects, values, gradients, flags, hooks."""
    state: list[Any] = []
    for name, t in [*module.named_parameters(), *module.named_buffers()]:
        gradient = None if t.grad is None else t.grad.clone().tolist()
        state.append((name, id(t), t.tolist(), t.requires_grad, gradient, id(t.grad), t._version))
    for layer in module.modules():
        state.append((layer.training, list(layer._parameters), list(layer._buffers)))
        state.append((dict(layer._forward_hooks), dict(layer._forward_pre_hooks)))
    return state


class Fragile(nn.Module):
    """Changes its buffers, and fails at the end if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", None)
        self.error: BaseException | None = None
        self.inner[0].bias.requires_grad_(False)
        self.inner[0].weight.grad = torch.ones(4, 3)
        self.inner[2].register_forward_hook(lambda module, args, output: 2 * output)

    def forward(self, X: Tensor) -> Tensor:
        self.calls += 1
        result = self.inner(X) + 0 * self.calls
        self.calls = result.mean()  # another object
        if self.error is not None:
            raise self.error
        return result


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("error", [None, ZeroDivisionError("planted"), KeyboardInterrupt()])
@pytest.mark.parametrize("subset", [False, True])
@ignore_torch_script
def test_module_is_left_as_found(train: bool, error: BaseException | None, subset: bool) -> None:
    """Values, gradients, flags, hooks and buffers, also after exceptions and under transforms."""
    net, X = Fragile().train(train), torch.randn(6, 3)
    params = parameters(net)
    if subset:
        params = {"inner.1.weight": params["inner.1.weight"]}
    model = FunctionalModel(net, params)
    before = snapshot(net)
    net.error = error

    def f(params: dict[str, Tensor]) -> Tensor:
        return model.predict(params, X).sum()

    calls: list[Callable[[], Any]] = [
        lambda: f(params),
        lambda: model.inspect(X),
        lambda: grad(f)(params),
        lambda: jvp(grad(f), (params,), (params,)),
    ]
    for call in calls:
        if error is None:
            call()
        else:
            with pytest.raises(type(error)):
                call()
        assert snapshot(net) == before


def test_shared_buffers() -> None:
    """Layers that share a buffer share its clone."""

    class Counter(nn.Module):
        def __init__(self, count: Tensor) -> None:
            super().__init__()
            self.register_buffer("count", count)

        def forward(self, X: Tensor) -> Tensor:
            self.count += 1
            return X * self.count

    count = torch.zeros(())
    net = nn.Sequential(nn.Linear(2, 1), Counter(count), Counter(count)).eval()
    model = FunctionalModel(net, dict(net.named_parameters()))
    X = torch.randn(3, 2)
    for _ in range(2):
        assert torch.allclose(model.predict(model.params, X), 2 * net[0](X))
    assert count == 0
    assert net[1].count is net[2].count is count


# Errors


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (list(nn.Linear(2, 1).parameters()), TypeError, "params must be a dict.*named_parameters"),
        (nn.Linear(2, 1).parameters(), TypeError, "params must be a dict.*got generator"),
        (torch.zeros(2), TypeError, "params must be a dict.*got Tensor"),
        (None, TypeError, "params must be a dict"),
        ({"weight": 1.0}, TypeError, "params must be a dict.*'weight': float"),
        ({0: torch.zeros(1, 2)}, TypeError, "params must be a dict.*int 0"),
        ({}, ValueError, "params is empty"),
        ({"weight": torch.zeros(1, 2).int()}, ValueError, "'weight' must be floating point"),
        ({"weight": torch.zeros(1, 2).cfloat()}, ValueError, "'weight' must be floating point"),
        (
            {"weight": torch.zeros(1, 2), "bias": torch.zeros(1).double()},
            ValueError,
            "same dtype, got torch.float32: weight; torch.float64: bias",
        ),
        (
            {"weight": torch.zeros(1, 2), "bias": torch.zeros(1, device="meta")},
            ValueError,
            "same device, got cpu: weight; meta: bias",
        ),
        (
            {"weight": torch.zeros(1, 2), "wieght": torch.zeros(1)},
            ValueError,
            r"not parameters of Linear: wieght\. Its parameters: weight, bias",
        ),
        ({"weight": torch.zeros(2, 1)}, ValueError, r"\(2, 1\) in params, but \(1, 2\) in Linear"),
    ],
)
def test_wrong_params(params: Any, error: type[Exception], message: str) -> None:
    """The message says what is wrong."""
    with pytest.raises(error, match=message):
        FunctionalModel(nn.Linear(2, 1), params)


def test_buffer_in_params() -> None:
    """A state_dict has buffers, too."""
    net = nn.BatchNorm1d(3)
    params = {k: v for k, v in net.state_dict().items() if v.is_floating_point()}
    with pytest.raises(ValueError, match=r"running_var\. 'running_mean' is a buffer"):
        FunctionalModel(net, params)


def test_tied_parameter_given_twice() -> None:
    """One parameter has one name, also for a function, which cannot tell."""
    net = Tied()
    twice = {"embedding.weight": torch.zeros(5, 3), "output.weight": torch.ones(5, 3)}
    with pytest.raises(
        ValueError, match=r"'embedding\.weight' and 'output\.weight' are tied in Tied"
    ):
        FunctionalModel(net, twice)
    w = torch.zeros(2)
    with pytest.raises(ValueError, match="'a' and 'b' are one tensor"):
        FunctionalModel(lambda params, X: X, {"a": w, "b": w})


@pytest.mark.parametrize("model_func", [None, "net", torch.zeros(1)])
def test_model_func_must_be_callable(model_func: Any) -> None:
    """Anything else is an error."""
    with pytest.raises(ValueError, match=r"nn.Module or a function \(params, X\) -> prediction"):
        FunctionalModel(model_func, {"w": torch.zeros(1)})


@dataclass
class CausalLMOutput:
    """Like the outputs of Hugging Face's models."""

    logits: Tensor


class LanguageModel(nn.Linear):
    """Like a Hugging Face model."""

    def forward(self, x: Tensor) -> CausalLMOutput:  # type: ignore[override]
        return CausalLMOutput(super().forward(x))


def test_prediction_must_be_a_tensor() -> None:
    """The error names the type and shows a wrapper, which works."""
    net, X = LanguageModel(3, 2), {"x": torch.randn(4, 3)}

    def call(net: nn.Module, X: Any) -> Tensor:
        params = dict(net.named_parameters())
        return FunctionalModel(net, params).predict(params, X)

    with pytest.raises(TypeError, match="must return a tensor, got CausalLMOutput") as caught:
        call(net, X["x"])
    message = str(caught.value)
    wrapper = message[message.index("    class") :]
    namespace: dict[str, Any] = {"nn": nn}
    exec("if True:\n" + wrapper, namespace)  # the advice is code: run it
    assert torch.equal(call(namespace["Wrapped"](net), X), net(**X).logits)


# Inference mode


def test_inference_tensors() -> None:
    """Parameters, constants and buffers that were made in inference mode can be differentiated."""
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
        params = {"0.weight": torch.randn(4, 3)}
    model, X = FunctionalModel(net, params), torch.randn(5, 3)

    def run() -> Tensor:
        with autograd_ready():
            G = grad(lambda p: model.predict(p, X).square().sum())(model.params)
            leaves = {name: p.detach().requires_grad_() for name, p in model.params.items()}
            value = model.predict(leaves, X).square().sum()
            (reverse,) = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
            assert torch.allclose(reverse, G["0.weight"])
            assert torch.autograd.grad(reverse.sum(), list(leaves.values()))[0].any()
            return G["0.weight"]

    inside = torch.inference_mode()(run)()
    assert torch.equal(run(), inside)
    with torch.inference_mode():
        params["0.weight"].mul_(2)  # seen by the next product
    assert not torch.equal(run(), inside)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_autograd_ready(context: Callable[[], Any]) -> None:
    """Gradients are recorded inside, and everything is as before afterwards."""
    with context():
        before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        with autograd_ready():
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


# Embeddings


def embed(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> FunctionalModel:
    """A function that calls an embedding function; its weight is ``w``."""
    params = {"w": 10 * torch.ones(4, 3)}
    return FunctionalModel(lambda params, X: function(X, params["w"], *args, **kwargs), params)


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_refused_embedding_modules(layer: type[nn.Module], option: dict[str, Any]) -> None:
    """They are found at construction, by name, also if they are constants."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer(4, 3, **option)))
    with pytest.raises(
        NotImplementedError, match=f"{layer.__name__} '1.0' uses {next(iter(option))}"
    ):
        FunctionalModel(net, {"0.bias": torch.zeros(2)})


@pytest.mark.parametrize(
    ("model", "option"),
    [
        (embed(functional.embedding, max_norm=1.0), "max_norm"),
        (embed(functional.embedding, None, 1.0), "max_norm"),
        (embed(functional.embedding_bag, max_norm=1.0), "max_norm"),
        (embed(functional.embedding, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (embed(functional.embedding_bag, None, None, 2.0, True), "scale_grad_by_freq"),
        (embed(lambda X, w: torch.embedding(w, X, -1, True)), "scale_grad_by_freq"),
    ],
)
def test_refused_embedding_functions(model: FunctionalModel, option: str) -> None:
    """They are found at the first prediction, before they change the weight."""
    with pytest.raises(NotImplementedError, match=f"The model uses {option}"):
        model.inspect(torch.tensor([[0, 1]]))
    assert torch.equal(model.params["w"], 10 * torch.ones(4, 3))


@pytest.mark.parametrize(
    ("model", "ok"),
    [
        (embed(lambda X, w: functional.one_hot(X, 4).float() @ w), True),
        (embed(functional.embedding), True),
        (embed(functional.embedding, padding_idx=0), False),
        (embed(functional.embedding, padding_idx=-1), False),  # the last row
        (embed(functional.embedding, 0), False),
        (embed(lambda X, w: torch.embedding(w, X, -1)), True),  # no row
        (embed(lambda X, w: torch.embedding(w, X, 0)), False),
        (embed(lambda X, w: torch.embedding(w, X, padding_idx=0)), False),
        (embed(functional.embedding_bag), False),
        (embed(lambda X, w: nn.Embedding(4, 3, 0, _weight=w)(X)), False),
    ],
)
def test_forward_mode_ok(model: FunctionalModel, ok: bool) -> None:
    """It says whether forward mode is right. Of a function, this is not known before a look."""
    assert model.forward_mode_ok
    model.inspect(torch.tensor([[0, 1]]))
    assert model.forward_mode_ok is ok


def test_forward_mode_ok_of_modules() -> None:
    """Modules are watched like functions; before that, their layers allow a guess."""
    X = torch.tensor([[0, 1]])
    for layer, ok in [
        (nn.Embedding(4, 3), True),
        (nn.Embedding(4, 3, padding_idx=0), False),
        (nn.EmbeddingBag(4, 3), False),
    ]:
        net = nn.Sequential(layer, nn.Linear(3, 2))
        model = FunctionalModel(net, dict(net.named_parameters()))
        assert model.forward_mode_ok is ok
        assert torch.equal(model.inspect(X), net(X))
        assert model.forward_mode_ok is ok


def test_a_look_replaces_the_guess() -> None:
    """A layer that is not used is of no importance; one that the layers do not show is."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.ModuleList([nn.Embedding(4, 3, padding_idx=0), nn.Conv1d(2, 2, 1)])
            self.weight = nn.Parameter(torch.rand(4, 3))

        def forward(self, X: Tensor) -> Tensor:
            return functional.embedding(X, self.weight)

    net = Net()
    model = FunctionalModel(net, {"weight": net.weight})
    assert not model.forward_mode_ok
    assert model.likely_traits.padding_idx
    assert model.likely_traits.convolution
    assert model.traits is None
    model.inspect(torch.tensor([[0, 1]]))
    assert model.forward_mode_ok
    assert model.likely_traits is model.traits
    assert not model.likely_traits.padding_idx
    assert not model.likely_traits.convolution


def test_convolutions_are_seen() -> None:
    """As layers and as functions, transposed or not; not what the model could do."""
    X, w = torch.rand(1, 2, 3), torch.rand(2, 2, 2)
    for function, expected in [
        (functional.conv1d, True),
        (functional.conv_transpose1d, True),
        (lambda X, w: X * w.sum(), False),
    ]:
        model = FunctionalModel(lambda p, X, function=function: function(X, p["w"]), {"w": w})
        assert not model.likely_traits.convolution
        model.inspect(X)
        assert model.likely_traits.convolution is expected
    for layer in (nn.Conv1d(2, 2, 2), nn.ConvTranspose1d(2, 2, 2), nn.LazyConv1d(2, 2)):
        if isinstance(layer, nn.LazyConv1d):
            layer(X)  # it is a Conv1d now
        net = nn.Sequential(layer)
        model = FunctionalModel(net, dict(net.named_parameters()))
        assert model.likely_traits.convolution
        model.inspect(X)
        assert model.likely_traits.convolution


def test_numbers_that_are_computed() -> None:
    """All outputs of functions count, and nothing else."""
    model = FunctionalModel(lambda p, X: (X @ p["w"]).exp(), {"w": torch.rand(3, 4)})
    model.predict(model.params, torch.rand(5, 3), any_derivative=True)
    assert model.likely_traits.entries == 2 * 5 * 4


# Predictions that are differentiated


class Once(torch.autograd.Function):
    """Forbids second derivatives."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class OldOnce(torch.autograd.Function):
    """The same in the old style."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


@pytest.mark.parametrize("inspected", [False, True])
@pytest.mark.parametrize("function", [Once, OldOnce])
def test_once_differentiable_functions(function: Any, inspected: bool) -> None:
    """They are seen in the first prediction that is differentiated, also after an inspection."""
    model = FunctionalModel(
        lambda p, X: function.apply(function.apply(X * p["w"])).exp(), {"w": torch.ones(())}
    )
    X, calls = torch.rand(3), []
    if inspected:
        model.inspect(X)
    before = model.traits

    def value(p: dict[str, Tensor]) -> Tensor:
        calls.append(1)
        return model.predict(p, X, any_derivative=True).sum()

    if function is Once:
        grad(value)(model.params)
    else:
        leaves = {"w": torch.ones((), requires_grad=True)}
        torch.autograd.grad(value(leaves), list(leaves.values()))
    assert model.likely_traits.once_differentiable == [function.__name__]
    assert not inspected or before.once_differentiable
    assert len(calls) == 1
    assert before is None or model.traits is before


def test_traits_from_the_first_derivative() -> None:
    """A prediction for derivatives sets what is not known, and leaves what is."""
    X = torch.tensor([[0, 1]])
    model = embed(functional.embedding, padding_idx=0)
    model.predict(model.params, X)
    assert model.traits is None  # not watched
    prediction = model.predict(model.params, X, any_derivative=True)
    assert torch.equal(prediction, model.predict(model.params, X))
    assert model.traits is not None
    assert not model.forward_mode_ok
    before = model.traits
    model.predict(model.params, X, any_derivative=True)
    assert model.traits is before


def test_watching() -> None:
    """Predictions that are made anyway set the traits, the first of them."""
    model, X = embed(functional.embedding, padding_idx=0), torch.tensor([[0, 1]])
    with pytest.raises(ZeroDivisionError), model.watching():
        raise ZeroDivisionError
    assert model.traits is None
    with model.watching():
        model.predict(model.params, X)
    assert model.traits is not None
    assert model.traits.padding_idx
    before = model.traits
    with model.watching():
        pass
    assert model.traits is before
    refused = embed(functional.embedding, max_norm=1.0)
    with pytest.raises(NotImplementedError, match="max_norm"), refused.watching():
        refused.predict(refused.params, X)


@pytest.mark.parametrize("any_derivative", [False, True])
def test_attention_warns_only_if_it_is_replaced(any_derivative: bool) -> None:
    """Once per model, and for derivatives; numbers are the same."""
    q = torch.rand(1, 2, 3, 4)
    model = FunctionalModel(
        lambda p, X: functional.scaled_dot_product_attention(X * p["w"], X, X),
        {"w": torch.ones(())},
    )
    expected = functional.scaled_dot_product_attention(q, q, q)
    assert torch.allclose(model.evaluate(q), expected)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            prediction = model.predict(model.params, q, any_derivative)
            assert torch.allclose(prediction, expected)
    assert ["fused attention" in str(w.message) for w in caught] == [True] * any_derivative
    assert torch.backends.cuda.flash_sdp_enabled()


def test_evaluate() -> None:
    """Without a graph, although the model may need one inside; traits are not set."""

    def derivative(p: dict[str, Tensor], X: Tensor) -> Tensor:
        X = X.clone().requires_grad_()
        return torch.autograd.grad((X**2).sum(), X, create_graph=True)[0] * p["w"]

    X = torch.rand(3)
    model = FunctionalModel(derivative, {"w": torch.tensor(3.0, requires_grad=True)})
    with torch.no_grad():
        result = model.evaluate(X)
    assert not result.requires_grad
    assert torch.allclose(result, 6 * X)
    assert model.traits is None


def test_dependencies() -> None:
    """All tensors and flags that a prediction depends on: those given, and the module's."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    given = {"0.weight": torch.rand(4, 3)}
    model = FunctionalModel(net, given)
    found = {id(x) for x in model.dependencies() if isinstance(x, Tensor)}
    tensors = [given["0.weight"], *net.parameters(), *net.buffers()]
    assert found >= {id(t) for t in tensors}
    flags = [x for x in model.dependencies() if not isinstance(x, Tensor)]
    assert flags == [False] * 3
    net[1].train()
    assert [x for x in model.dependencies() if not isinstance(x, Tensor)] == [False, False, True]
    function = FunctionalModel(lambda p, X: X, given)
    assert [id(x) for x in function.dependencies()] == [id(given["0.weight"])]


def test_scripted_parts_cannot_be_watched() -> None:
    """So forward mode is not trusted."""
    X = torch.tensor([[0, 1]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        net = nn.Sequential(torch.jit.trace(nn.Embedding(4, 3, padding_idx=0), X))
    model = FunctionalModel(net, dict(net.named_parameters()))
    model.inspect(X)
    assert not model.forward_mode_ok


@ignore_torch_script
def test_why_forward_mode_is_not_ok() -> None:
    """Forward mode ignores ``padding_idx``. If this fails, torch was repaired: relax the rule."""
    model, X = embed(functional.embedding, padding_idx=0), torch.tensor([[0, 1]])
    w = model.params["w"]
    J = jacrev(lambda w: model.predict({"w": w}, X))(w)
    assert not J[:, :, :, 0].any()
    forward = jvp(lambda w: model.predict({"w": w}, X), (w,), (torch.ones_like(w),))[1]
    assert forward[0, 0].all()


# Other traits


def test_coarsest_precision() -> None:
    """Low precision inside of a model is seen, whatever its prediction has."""

    class Autocast(nn.Linear):
        def forward(self, X: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(X).float()

    for net, dtype in [(nn.Linear(3, 2), torch.float32), (Autocast(3, 2), torch.bfloat16)]:
        model = FunctionalModel(net, dict(net.named_parameters()))
        assert model.inspect(torch.zeros(1, 3)).dtype == torch.float32
        assert model.traits is not None
        assert model.traits.eps == torch.finfo(dtype).eps


def test_random() -> None:
    """A draw from the global generator is noticed."""
    for function, expected in [
        (lambda p, X: X * p["w"], False),
        (lambda p, X: X.bernoulli(), True),
    ]:
        model = FunctionalModel(function, {"w": torch.ones(())})
        model.inspect(torch.full((3,), 0.5))
        assert model.traits is not None
        assert model.traits.random is expected


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    """Leave no compiled code behind."""
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself, at import
def test_compiled_parts_are_watched() -> None:
    """Parts that the user compiles are seen through, also as a whole graph."""
    part = nn.Embedding(4, 3, padding_idx=0)
    net = nn.Sequential(torch.compile(part, backend="eager", fullgraph=True))
    model = FunctionalModel(net, dict(net.named_parameters()))
    model.inspect(torch.tensor([[0, 1]]))
    assert model.traits is not None
    assert model.traits.padding_idx
