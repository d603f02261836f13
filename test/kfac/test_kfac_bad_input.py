"""Wrong input to KFAC: the error names what is wrong, before the model is evaluated if possible."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from curvlinops import FisherType, KFACLinearOperator, KFACType
from curvlinops.computers.kfac_hooks import HooksKFACComputer


class Counted(nn.Module):
    """Counts evaluations."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(x)


def kfac(model: nn.Module | None = None, **changes: Any) -> KFACLinearOperator:
    """Build KFAC of a small model, with changes of the arguments."""
    model = Counted(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)) if model is None else model
    arguments = {
        "model_func": model,
        "loss_func": nn.MSELoss(),
        "params": dict(model.named_parameters()),
        "data": [(torch.rand(n, 2), torch.rand(n, 2)) for n in (2, 3)],
        **changes,
    }
    return KFACLinearOperator(**arguments)


def assert_refused(error: type[Exception], match: str, **changes: Any) -> None:
    """Check the error, and that the model was not evaluated."""
    model = changes.pop("model", None)
    model = Counted(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)) if model is None else model
    changes = {key: f(model) if key == "params" else f for key, f in changes.items()}
    with pytest.raises(error, match=match):
        kfac(model, **changes)
    assert not getattr(model, "calls", 0)


class L1(nn.L1Loss):
    """A loss without closed forms."""


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (ValueError, r"'fisher' is not a FisherType.*'type-2', 'mc', 'empirical', 'forward-only'",
         {"fisher_type": "fisher"}),
        (ValueError, r"'spread' is not a KFACType.*'expand', 'reduce'", {"kfac_approx": "spread"}),
        (ValueError, r"backend must be one of \['hooks'\], got 'hook'", {"backend": "hook"}),
        (ValueError, "loss_terms must be 'signs' or 'exact', got 'none'", {"loss_terms": "none"}),
        (ValueError, "mc_samples=2 has no meaning for .*'type-2'",
         {"mc_samples": 2, "fisher_type": "type-2"}),
        (ValueError, "mc_samples must be an integer, at least 1, got 0", {"mc_samples": 0}),
        (ValueError, "mc_samples must be an integer, at least 1, got 1.5", {"mc_samples": 1.5}),
        (ValueError, "num_per_example_loss_terms must be positive, got 0",
         {"num_per_example_loss_terms": 0}),
        (ValueError, "max_factor_size must be positive, got 0", {"max_factor_size": 0}),
        (ValueError, "seed must be between 0", {"seed": -1}),
        (ValueError, "seed must be an integer, got 0.5", {"seed": 0.5}),
        (ValueError, "num_data must be positive, got 0", {"num_data": 0}),
        (ValueError, "hooks.*needs an nn.Module, got function", {"model_func": lambda p, x: x}),
        (ValueError, "model_func must be", {"model_func": 3}),
        (TypeError, r"params must be a dict.*dict\(model.named_parameters\(\)\)",
         {"params": lambda m: list(m.parameters())}),
        (TypeError, "params must be a dict", {"params": lambda m: {"layers.0.weight": [1.0]}}),
        (ValueError, "params is empty", {"params": lambda m: {}}),
        (ValueError, "not parameters of Counted: nose",
         {"params": lambda m: {"nose": torch.ones(1)}}),
        (ValueError, r"'layers.0.bias' has shape \(4,\) in params, but \(3,\)",
         {"params": lambda m: {"layers.0.bias": torch.ones(4)}}),
        (ValueError, "floating point",
         {"params": lambda m: {"layers.0.bias": torch.ones(3).long()}}),
        (ValueError, "same dtype", {"params": lambda m: {
            "layers.0.bias": torch.ones(3), "layers.2.bias": torch.ones(2).double()}}),
        (NotImplementedError, "L1Loss has no closed forms.*nn.MSELoss", {"loss_func": nn.L1Loss()}),
        (NotImplementedError, "L1 has no closed forms", {"loss_func": L1()}),
        (NotImplementedError, "l1_loss has no closed forms", {"loss_func": F.l1_loss}),
        (ValueError, "None is not a loss function", {"loss_func": None}),
        (ValueError, "reduction 'none'", {"loss_func": nn.MSELoss(reduction="none")}),
        (ValueError, "no reduction", {"loss_func": lambda f, y: (f - y).sum()}),
        (ValueError, "data is empty", {"data": []}),
        (ValueError, "iterated only once", {"data": iter([(torch.rand(2, 2), torch.rand(2, 2))])}),
        (ValueError, "data must be an iterable of batches", {"data": 3}),
        (ValueError, r"pair \(X, y\)", {"data": [torch.rand(2, 2)]}),
        (ValueError, "must be a tensor or a mapping", {"data": [([1.0], torch.rand(1, 2))]}),
        (ValueError, "batch_size_fn", {"data": [({"x": torch.rand(1, 2)}, torch.rand(1, 2))]}),
        (ValueError, "at least one example", {"data": [(torch.rand(0, 2), torch.rand(0, 2))]}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("check_deterministic", [False, True])
def test_refused(
    error: type[Exception], match: str, changes: dict[str, Any], check_deterministic: bool
):
    assert_refused(error, match, **changes, check_deterministic=check_deterministic)


def test_options_know_their_values():
    assert "mc" in FisherType and FisherType.MC in FisherType and "fisher" not in FisherType
    assert "reduce" in KFACType and "type-2" not in KFACType
    by_name = kfac(fisher_type="type-2", kfac_approx="reduce")
    by_member = kfac(fisher_type=FisherType.TYPE2, kfac_approx=KFACType.REDUCE)
    assert by_name.summary() == by_member.summary()


# ---- layers --------------------------------------------------------------------------------------
class OwnForward(nn.Linear):
    """A Linear that does something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input)


class OwnConvolution(nn.Conv2d):
    """A Conv2d that does something else."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Any) -> Tensor:
        return super()._conv_forward(input, 2 * weight, bias)


class Inherited(nn.Linear):
    """A Linear under another name."""


def _patched() -> nn.Linear:
    layer = nn.Linear(2, 2)
    layer.forward = lambda input: F.linear(2 * input, layer.weight)  # type: ignore[method-assign]
    return layer


UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "embedding": (lambda: nn.Embedding(4, 2), r"'layers.1.weight' \(Embedding\)"),
    "norm": (lambda: nn.LayerNorm(2), r"'layers.1.weight' \(LayerNorm\), 'layers.1.bias'"),
    "recurrent": (lambda: nn.LSTM(2, 2), r"'layers.1.weight_ih_l0' \(LSTM\)"),
    "attention": (lambda: nn.MultiheadAttention(2, 1), r"in_proj_weight' \(MultiheadAttention\)"),
    "bilinear": (lambda: nn.Bilinear(2, 2, 2), r"\(Bilinear\)"),
    "conv1d": (lambda: nn.Conv1d(2, 2, 1), r"\(Conv1d\)"),
    "transposed": (lambda: nn.ConvTranspose2d(2, 2, 1), r"\(ConvTranspose2d\)"),
    "groups": (lambda: nn.Conv2d(2, 4, 1, groups=2), r"'layers.1.weight' \(Conv2d with groups=2\)"),
    "own forward": (lambda: OwnForward(2, 2), r"\(OwnForward\)"),
    "own convolution": (lambda: OwnConvolution(2, 2, 1), r"\(OwnConvolution\)"),
    "patched": (_patched, r"'layers.1.weight' \(Linear\)"),
    "parametrised": (
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)),
        r"parametrizations.weight.original' \(ParametrizationList\)",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_layers(name: str):
    make, match = UNSUPPORTED[name]
    model = Counted(nn.Linear(2, 2), make(), nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match=f"not in supported layers: .*{match}") as caught:
        kfac(model)
    assert not model.calls
    assert "Supported: Linear, Conv2d" in str(caught.value)
    assert "layers.0" not in str(caught.value)
    # as constants they are no obstacle
    if name in ("own forward", "patched", "parametrised", "norm"):
        rest = {k: p for k, p in model.named_parameters() if not k.startswith("layers.1")}
        assert kfac(model, params=rest).trace() > 0


def test_all_unsupported_parameters_are_listed():
    model = Counted(nn.LayerNorm(2), nn.Conv1d(2, 2, 1), nn.Linear(2, 2))
    with pytest.raises(NotImplementedError) as caught:
        kfac(model)
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert f"layers.{name}" in str(caught.value)


def test_subclasses_with_the_same_forward_are_supported():
    model = Counted(Inherited(2, 3), nn.Linear(3, 2))
    assert "layers.0.weight" in kfac(model).summary()


def test_parameters_of_the_model_itself():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))
            self.weight = nn.Parameter(torch.ones(2, 2))
            self.lin = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x @ self.weight) * self.scale

    with pytest.raises(NotImplementedError, match=r"'scale' \(Own\), 'weight' \(Own\)"):
        kfac(Own())


# ---- usages --------------------------------------------------------------------------------------
class Outside(nn.Module):
    """Uses a layer's parameters without calling the layer."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.lin, self.use = nn.Linear(2, 2), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


class Multiply(torch.autograd.Function):
    """A differentiable function of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight.T, x.T @ gradient


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (lambda m, x: F.linear(x, m.lin.weight), "lin.weight"),
        (lambda m, x: m.lin(x) + F.linear(x, m.lin.weight), "lin.weight"),
        (lambda m, x: m.lin(x) @ m.lin.weight.T, "lin.weight"),
        (lambda m, x: m.lin(x) + m.lin.bias, "lin.bias"),
        (lambda m, x: torch.addmm(m.lin.bias, x, torch.eye(2)), "lin.bias"),
        (lambda m, x: m.lin(x) * torch.stack([m.lin.bias, m.lin.bias]).sum(), "lin.bias"),
        (lambda m, x: m.lin(x) + (m.lin.weight**2).sum(), "lin.weight"),
        (lambda m, x: Multiply.apply(m.lin(x), m.lin.weight), "lin.weight"),
        (lambda m, x: x.new_zeros(len(x), 2).copy_(m.lin.bias), "lin.bias"),
        (lambda m, x: functional_call(m.lin, dict(m.lin.named_parameters()), x) * m.lin.bias,
         "lin.bias"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fisher_type", ["type-2", "forward-only"])
def test_use_outside_of_the_layer(
    use: Callable[[Any, Tensor], Tensor], name: str, fisher_type: str
):
    model = Outside(use)
    with pytest.raises(NotImplementedError, match=f"parameter '{name}' is used outside"):
        kfac(model, fisher_type=fisher_type)
    assert not model.lin._forward_hooks
    if name == "lin.weight":  # as a constant, it may be used anywhere
        assert kfac(model, params={"lin.bias": model.lin.bias}).trace() >= 0


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: m.lin(x.to(m.lin.weight)),
        lambda m, x: m.lin(x.type_as(m.lin.bias)),
        lambda m, x: m.lin(x + torch.zeros_like(m.lin.bias) + m.lin.weight.new_zeros(2)),
        lambda m, x: m.lin(x) * m.lin.weight.shape[0] / m.lin.weight.dtype.itemsize,
        lambda m, x: m.lin(x) + m.lin.bias.detach() + m.lin.weight.data.sum(),
    ],
)
def test_harmless_use_outside_of_the_layer(use: Callable[[Any, Tensor], Tensor]):
    assert kfac(Outside(use)).trace() > 0


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook"])
def test_use_in_a_hook_of_the_layer(kind: str):
    model = Outside(lambda m, x: m.lin(x))
    if kind == "forward_pre_hook":
        model.lin.register_forward_pre_hook(lambda module, args: (args[0] + module.bias,))
    else:
        model.lin.register_forward_hook(lambda module, args, output: output * module.bias)
    with pytest.raises(NotImplementedError, match=r"parameter 'lin.bias' is used outside"):
        kfac(model)


def test_attention_does_not_call_its_projection():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(2, 1, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x)[0]

    model = Attention().eval()
    data = [(torch.rand(2, 3, 2), torch.rand(2, 3, 2))]
    params = {name: p for name, p in model.named_parameters() if "out_proj" in name}
    with pytest.raises(NotImplementedError, match=r"'attn.out_proj.weight' is used outside"):
        kfac(model, params=params, data=data)


# ---- tied parameters -----------------------------------------------------------------------------
def tied(**changes: Any) -> Counted:
    model = Counted(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    for place, tensor in changes.items():
        layer, attribute = int(place[1]), place[2:]
        setattr(model.layers[layer], attribute, tensor(model.layers))
    return model


@pytest.mark.parametrize("names", [None, ["0.weight", "2.bias", "0.bias"]])
def test_conflicting_biases(names: list[str] | None):
    model = tied(_2weight=lambda layers: layers[0].weight)
    params = dict(model.named_parameters())
    if names is not None:
        params = {f"layers.{name}": params[f"layers.{name}"] for name in names}
    with pytest.raises(ValueError, match=r"conflicting biases.*layers.0.bias.*layers.2.bias"):
        kfac(model, params=params, separate_weight_and_bias=False)
    assert not model.calls
    kfac(model, params=params)
    del params["layers.2.bias"]
    kfac(model, params=params, separate_weight_and_bias=False)


def test_a_bias_of_two_weights():
    model = tied(_2bias=lambda layers: layers[0].bias)
    params = dict(model.named_parameters())
    for left_out in ("nothing", "layers.2.weight"):
        params.pop(left_out, None)
        with pytest.raises(ValueError, match="conflicting biases or weights"):
            kfac(model, params=params, separate_weight_and_bias=False)
        kfac(model, params=params)
    del params["layers.0.weight"]
    kfac(model, params=params, separate_weight_and_bias=False)


def test_a_tied_parameter_is_given_once():
    model = tied(_2weight=lambda layers: layers[0].weight)
    given = {"layers.0.weight": torch.rand(2, 2), "layers.2.weight": torch.rand(2, 2)}
    with pytest.raises(ValueError, match=r"tied.*under one of its names"):
        kfac(model, params=given)
    by_name = [kfac(model, params={name: given[name]}, fisher_type="type-2") for name in given]
    del given["layers.2.weight"]
    assert by_name[0].mapping == [{"W": "layers.0.weight"}]
    assert by_name[1].mapping == [{"W": "layers.2.weight"}]


# ---- data ----------------------------------------------------------------------------------------
def test_wrong_number_of_loss_terms():
    data = [(torch.rand(2, 3, 2), torch.rand(2, 3, 2))]
    kfac(data=data, num_per_example_loss_terms=3)
    with pytest.raises(ValueError, match=r"num_per_example_loss_terms=2, .* have 3 loss"):
        kfac(data=data, num_per_example_loss_terms=2)


def test_wrong_batch_size_fn():
    data = [(torch.rand(6, 2), torch.rand(6, 2))]
    with pytest.raises(ValueError, match=r"4 examples.*batch_size_fn"):
        kfac(data=data, batch_size_fn=lambda X: 4)
    with pytest.raises(ValueError, match=r"batch_size_fn.*integer"):
        kfac(data=data, batch_size_fn=lambda X: 1.5)
    with pytest.raises(ValueError, match=r"3 examples.*num_data is 6"):
        kfac(data=data, batch_size_fn=lambda X: 3, num_data=6)


def test_positions_before_examples():
    """Sequences with the positions first would be mixed up."""

    class Transposed(Counted):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    model = Transposed(nn.Linear(2, 2))
    data = [(torch.rand(3, 4, 2), torch.rand(3, 4, 2))]
    with pytest.raises(ValueError, match=r"'layers.0' sees .*\[4, 3, 2\] for 3 examples"):
        kfac(model, data=data)


def test_wrong_targets():
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2, 3\)"):
        kfac(data=[(torch.rand(2, 2), torch.rand(2, 3))])


def test_models_that_are_not_deterministic():
    model = Counted(nn.Linear(2, 2), nn.Dropout(0.5))
    with pytest.raises(RuntimeError, match=r"Dropout in training mode: layers.1"):
        kfac(model)
    assert not model.calls
    kfac(model.eval())


def test_predictions_that_are_no_tensors():
    class Output(Counted):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x)}

    with pytest.raises(TypeError, match="must return a tensor, got dict"):
        kfac(Output(nn.Linear(2, 2)))


# ---- values --------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_factors(value: float):
    model = Counted(nn.Linear(2, 3), nn.Linear(3, 2))
    X = torch.rand(2, 2)
    X[1, 0] = value
    with pytest.raises(RuntimeError, match=r"input factor of 'layers.0.weight' has non-finite"):
        kfac(model, data=[(X, torch.rand(2, 2))], check_deterministic=False)
    bias = {"layers.0.bias": torch.full((3,), value)}
    arguments = {"fisher_type": "empirical", "check_deterministic": False}
    with pytest.raises(RuntimeError, match=r"gradient factor of 'layers.0.bias' has non-finite"):
        kfac(model, params=bias, **arguments)
    with pytest.raises(RuntimeError, match=r"factor of 'layers.0.weight', 'layers.0.bias' has non"):
        kfac(
            model,
            data=[(X, torch.rand(2, 2))],
            check_deterministic=False,
            separate_weight_and_bias=False,
            max_factor_size=1,
        )


def test_computers_refuse_the_same():
    model = Counted(nn.Linear(2, 2))
    data = [(torch.rand(2, 2), torch.rand(2, 2))]
    build = partial(HooksKFACComputer, model, params=dict(model.named_parameters()), data=data)
    with pytest.raises(NotImplementedError, match="no closed forms"):
        build(loss_func=nn.L1Loss())
    with pytest.raises(ValueError, match="FisherType"):
        build(loss_func=nn.MSELoss(), fisher_type="type2")
    other = copy.deepcopy(model)
    with pytest.raises(NotImplementedError, match="not in supported layers"):
        HooksKFACComputer(
            nn.Sequential(other, nn.LayerNorm(2)),
            nn.MSELoss(),
            {"1.weight": torch.ones(2)},
            data,
        )
