"""The model as a function of its parameters, and what one look at it reveals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from torch._functorch.autograd_function import custom_function_call
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from curvlinops.risk.data import fresh_mapping, without_inference

#: A function ``(params, X) -> prediction``.
Predict = Callable[[dict[str, Tensor], Any], Tensor]
#: An ``nn.Module``, or such a function.
ModelFunction = nn.Module | Predict


@contextmanager
def autograd_ready() -> Iterator[None]:
    """Record gradients inside, also if the caller is in ``no_grad`` or ``inference_mode``.

    Tensors that were made in inference mode stay unusable for autograd; they must be cloned.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


@dataclass
class ModelTraits:
    """What a model was seen to do in one prediction.

    Attributes:
        padding_idx: Whether an embedding with ``padding_idx`` was used. PyTorch's forward mode does
            not treat its padding row as constant.
        embedding_bag: Whether an embedding bag was used. PyTorch differentiates it in reverse mode
            and once only.
        convolution: Whether a convolution was used. Its second derivative in reverse mode costs
            more than it should.
        wrong_forward: Whether something was used that forward mode does not treat as reverse mode
            does: code under ``no_grad``, hooks on gradients, or a function with a wrong formula.
        weight_norm: Whether PyTorch's weight norm was used, whose second derivative is wrong.
        attention: Whether fused attention was used. Its kernels have derivatives in reverse mode
            and once only.
        once_differentiable: Names of custom functions that forbid second derivatives. PyTorch often
            takes their first derivative for a constant, without an error.
        wrong_third: Names of functions that the model differentiates, and whose third derivatives
            PyTorch computes wrongly: the statistics count as constants there.
        eps: The coarsest machine epsilon among the floating point numbers that were computed.
        entries: The number of floating point numbers that were computed.
        random: Whether torch's global random generator was used; set by
            :meth:`FunctionalModel.inspect` only.
    """

    padding_idx: bool = False
    embedding_bag: bool = False
    convolution: bool = False
    wrong_forward: bool = False
    weight_norm: bool = False
    attention: bool = False
    once_differentiable: list[str] = field(default_factory=list)
    wrong_third: list[str] = field(default_factory=list)
    eps: float = 0.0
    entries: int = 0
    random: bool = False


class FunctionalModel:
    r"""A model as the function :math:`(\theta, x) \mapsto f_\theta(x)` that ``torch.func`` can use.

    A module is left as found, also after an exception: predictions are evaluated at the tensors in
    ``params``, the module's other parameters are constants at their current values, and its buffers
    are clones, so that only clones are updated (for instance by BatchNorm in training mode).

    Args:
        model_func: An ``nn.Module``, or a function ``(params, X) -> prediction``. A module in
            ``DistributedDataParallel`` is used without it, lest it communicate; names may or may
            not begin with ``"module."``.
        params: The parameters by name, on one device and of one floating point dtype. Names and
            shapes are those of the module; a tied parameter has any one of its names. Values may
            differ.

    Raises:
        TypeError: If ``params`` is not a dictionary of tensors.
        ValueError: If ``model_func`` cannot be called, or ``params`` does not fit it.
        NotImplementedError: If an embedding has ``max_norm`` or ``scale_grad_by_freq``.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> model = FunctionalModel(net, {"weight": torch.ones(1, 2)})
        >>> model.predict(model.params, torch.ones(1, 2))
        tensor([[2.]])
    """

    def __init__(self, model_func: ModelFunction, params: dict[str, Tensor]) -> None:
        if not callable(model_func):
            raise ValueError(
                "model_func must be an nn.Module or a function (params, X) -> prediction, got "
                f"{type(model_func).__name__}."
            )
        _check_params(params)
        model_func = _without_data_parallel(model_func, params)
        self._params = dict(params)
        self._has_inference_params = any(p.is_inference() for p in params.values())
        #: Whether parameters are shards, which FSDP gathers while the module is evaluated.
        self.sharded = any(map(_is_shard, params.values()))
        self._function = model_func
        self.module: nn.Module | None = None
        self.traits: ModelTraits | None = None
        self._hints = ModelTraits()
        self._layers: list[nn.Module] = []
        self._has_scripted_part = self._has_attention_layer = False
        self._has_compiled_part = hasattr(model_func, "_torchdynamo_orig_callable")
        self._differentiated = self._warned = False
        if isinstance(model_func, nn.Module):
            self.module = model_func
            layers = list(model_func.modules())
            # What it does cannot be watched.
            self._has_scripted_part = any(isinstance(x, torch.jit.ScriptModule) for x in layers)
            self._has_compiled_part = any(
                type(x).__name__ == "OptimizedModule" or x._compiled_call_impl is not None
                for x in layers
            )
            self._has_attention_layer = any(isinstance(x, nn.MultiheadAttention) for x in layers)
            self._hints = _guess_traits(layers)
            self._layers = layers
            self._given = _resolve_names(model_func, params)
            self._places = places_of(model_func)
            _check_embeddings(model_func)

    @property
    def inner_module(self) -> nn.Module | None:
        """The user's module, inside of wrappers that name parameters; None for a function."""
        return self.module.module if isinstance(self.module, _Unwrapped) else self.module

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters by name, usable for autograd outside of inference mode."""
        if not self._has_inference_params:
            return self._params
        return {name: without_inference(p) for name, p in self._params.items()}

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(iter(self._params.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parameters."""
        return next(iter(self._params.values())).dtype

    def dependencies(self) -> list[Any]:
        """Return tensors and flags, besides the data, that predictions depend on."""
        return [*self._params.values(), *tensors_and_flags(self.module)]

    @property
    def likely_traits(self) -> ModelTraits:
        """What the model was seen to do; before it was seen, a guess from its layers."""
        return self._hints if self.traits is None else self.traits

    @property
    def forward_mode_ok(self) -> bool:
        """Whether forward-mode derivatives are right; before the model was seen, a guess.

        They are not for embeddings with ``padding_idx``, whose padding row forward mode does not
        treat as constant, nor where it ignores hooks and ``no_grad``, and do not exist for
        embedding bags. Inside of ``torch.compile``, where nothing can be watched, the answer is
        False until the model was seen.
        """
        if self.traits is None and torch.compiler.is_compiling():
            return False
        traits = self.likely_traits
        wrong = traits.padding_idx or traits.embedding_bag or traits.wrong_forward
        return not (wrong or self._has_scripted_part or self._has_backward_hooks())

    def _has_backward_hooks(self) -> bool:
        """Whether there are hooks on the gradients of a layer."""
        return any(x._backward_hooks or x._backward_pre_hooks for x in self._layers)

    def predict(self, params: dict[str, Tensor], X: Any, any_derivative: bool = False) -> Tensor:
        """Evaluate the model.

        Args:
            params: Parameters by name, with the names given at construction.
            X: Inputs of a batch. The model may change a mapping: it gets a copy.
            any_derivative: Whether derivatives in both modes and of second order are needed. Fused
                attention has none: then it is computed by simpler kernels, with one warning. The
                traits are set, unless they are known.

        Returns:
            The prediction.

        Raises:
            TypeError: If the model returns something else than a tensor.
        """
        if self.sharded:
            return self._predict_sharded(X)
        if any_derivative and torch.compiler.is_compiling():  # what else follows cannot be traced
            if not self._may_use_attention:
                return self.predict(params, X)
            with sdpa_kernel(SDPBackend.MATH):
                return self.predict(params, X)
        if any_derivative:
            decompose = self.traits is None or self.traits.weight_norm
            replacement = _Decompose() if decompose else nullcontext()
            with self._plain_attention(), replacement, self._watching_derivatives() as outputs:
                outputs.append(self.predict(params, X))
            return outputs[0]
        X = fresh_mapping(X)
        # Compiled code lacks most derivatives.
        eager = self._has_compiled_part and not torch.compiler.is_compiling()
        stance = torch.compiler.set_stance("force_eager") if eager else nullcontext()
        with stance, self._one_path_of_attention():
            if self.module is None:
                prediction = self._function(params, X)
            else:
                # Places are looked for anew, because the user may tie weights between products.
                compiling = torch.compiler.is_compiling()  # which cannot follow this
                places = self._places if compiling else places_of(self.module)
                # nor need whoever watches the model see this
                with nullcontext() if compiling else torch._C.DisableTorchFunction():
                    tensors = at_places({**self._constants(), **params}, places)
                prediction = functional_call(self.module, tensors, (X,), tie_weights=False)
        if not isinstance(prediction, Tensor):
            raise TypeError(_not_a_tensor(prediction))
        return prediction

    def _predict_sharded(self, X: Any) -> Tensor:
        """Evaluate a module whose parameters are shards, which FSDP gathers when it is called."""
        assert self.module is not None
        changing = [b for b in self.module.buffers()] if self.module.training else []
        before = [b.clone() for b in changing]
        try:
            prediction = self.module(fresh_mapping(X))
        finally:
            with torch.no_grad():
                for buffer, value in zip(changing, before, strict=True):
                    buffer.copy_(value)
        if not isinstance(prediction, Tensor):
            raise TypeError(_not_a_tensor(prediction))
        return prediction

    def unsharded(self) -> dict[str, Tensor]:
        """Return the tensors that FSDP gathers the parameters into, whenever they are used.

        Their memory is there only then.
        """
        assert self.module is not None
        found: dict[str, Tensor] = {}
        for prefix, layer in self.module.named_modules():
            if not hasattr(layer, "unshard"):
                continue
            layer.unshard()
            for name, p in layer.named_parameters(prefix=prefix):
                if not _is_shard(p):
                    found[name] = p
            layer.reshard()
        return {name: found[name].detach() for name in self._params}

    def evaluate(self, X: Any, predict: Predict | None = None) -> Tensor:
        """Evaluate the model at its parameters, without a graph.

        Gradients are enabled inside, for models that differentiate with respect to their inputs.

        Args:
            X: Inputs of a batch.
            predict: Evaluates the model as :meth:`predict` does, if somebody else listens.
        """
        params = {name: p.detach() for name, p in self.params.items()}
        with torch.enable_grad():
            prediction = (predict or self.predict)(params, X)
        return prediction.detach()

    def inspect(self, X: Any, predict: Predict | None = None) -> Tensor:
        """Evaluate the model without a graph, and set the traits from what it does.

        Args:
            X: Inputs of a batch.
            predict: Evaluates the model as :meth:`predict` does, if somebody else listens.

        Returns:
            The prediction.

        Raises:
            NotImplementedError: If an embedding has ``max_norm`` or ``scale_grad_by_freq``.
            TypeError: If the model returns something else than a tensor.
        """
        watch = _Watch()
        before = self._generator_states()
        # with a graph, in which functions show that forbid second derivatives: compiled products
        # cannot find out
        params = {name: p.detach().requires_grad_() for name, p in self.params.items()}
        with torch.enable_grad(), watch:
            prediction = (predict or self.predict)(params, X)
        watch.traits.once_differentiable += _once_differentiable_nodes(prediction.grad_fn)
        watch.traits.wrong_third += _wrong_third_nodes(prediction.grad_fn)
        prediction = prediction.detach()
        states = zip(before, self._generator_states(), strict=True)
        watch.traits.random = any(not torch.equal(a, b) for a, b in states)
        self.traits = watch.traits
        return prediction

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Set the traits, unless they are known, from predictions that are made anyway.

        Raises:
            NotImplementedError: If an embedding has ``max_norm`` or ``scale_grad_by_freq``.
        """
        if self.traits is not None or torch.compiler.is_compiling():
            yield
            return
        watch = _Watch()
        with watch:
            yield
        self.traits = watch.traits

    @contextmanager
    def _watching_derivatives(self) -> Iterator[list[Tensor]]:
        """Watch the first prediction that is differentiated; it is appended to the list yielded.

        Custom functions are seen only then.
        """
        outputs: list[Tensor] = []
        if self._differentiated:
            yield outputs
            return
        watch = _Watch()
        with watch:
            yield outputs
        if self.traits is None:
            self.traits = watch.traits
        names = [*watch.traits.once_differentiable, *_once_differentiable_nodes(outputs[0].grad_fn)]
        self.traits.once_differentiable = sorted(set(names))
        self.traits.wrong_third += _wrong_third_nodes(outputs[0].grad_fn)
        self.traits.wrong_forward |= watch.traits.wrong_forward
        # Without a graph, as in forward mode alone, custom functions are not seen.
        transforming = torch._C._are_functorch_transforms_active()
        self._differentiated = outputs[0].grad_fn is not None or transforming

    @property
    def _may_use_attention(self) -> bool:
        """Whether the model may use fused attention, as far as is known."""
        return self.traits is None or self.traits.attention or self._has_attention_layer

    @contextmanager
    def _plain_attention(self) -> Iterator[None]:
        """Compute attention by kernels that have derivatives in both modes and of second order."""
        if not self._may_use_attention:
            yield
            return
        fused, fast_path = _fused_attention_enabled(), torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
        if fused and not self._warned and self.traits is not None and self.traits.attention:
            self._warned = True
            warn(
                "The model uses fused attention (scaled_dot_product_attention), which cannot be "
                "differentiated twice or in forward mode. It is replaced by PyTorch's math kernel, "
                "with the same result, but more memory.",
                stacklevel=2,
            )

    @contextmanager
    def _one_path_of_attention(self) -> Iterator[None]:
        """Leave aside the fast path of attention, which is taken only where nothing has gradients.

        It gives other values at padded positions.
        """
        possible = self.module is None or self._has_attention_layer
        if torch.compiler.is_compiling() or not possible:
            yield
            return
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(before)

    def _constants(self) -> dict[str, Tensor]:
        """Return the module's other parameters, detached, and clones of buffers that may change."""
        assert self.module is not None
        # Read anew each time, because the user may train the module between products. A tensor that
        # layers share is here under several names, each of which stands for all its places.
        constants: dict[str, Tensor] = {}
        clones: dict[str, Tensor] = {}
        for prefix, layer in self.module.named_modules():
            start = f"{prefix}." if prefix else ""
            for attribute, p in layer._parameters.items():
                name = start + attribute
                if p is not None and name not in self._given:
                    constants[name] = without_inference(p.detach())
            # PyTorch's own layers leave their buffers alone in evaluation mode. To know this halves
            # the cost of a call for networks with many BatchNorm layers.
            constant = not layer.training and type(layer).__module__.startswith("torch.nn.")
            for attribute, buffer in layer._buffers.items():
                name = start + attribute
                if buffer is None or name in self._given or (constant and _is_plain(buffer)):
                    continue
                clones[name] = buffer.detach().clone()
        return {**constants, **clones}

    def _generator_states(self) -> list[Tensor]:
        """Return the states of torch's global generators that the model may use."""
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states


def places_of(module: nn.Module) -> dict[str, list[str]]:
    """Return where a module has the tensor of each name of a parameter or buffer.

    A tensor can be in several places, and a place can have several names, if a layer is in the
    module twice. ``torch.func.functional_call`` would swap the tensor in such a place twice, and
    leave the wrong one behind.

    Args:
        module: The module.

    Returns:
        For each name: one name for each place of its tensor.
    """
    places: dict[Tensor, list[str]] = {}
    names: dict[str, list[str]] = {}
    first: dict[nn.Module, str] = {}
    for prefix, layer in module.named_modules(remove_duplicate=False):
        known = first.setdefault(layer, prefix) != prefix
        for attribute, tensor in (*layer._parameters.items(), *layer._buffers.items()):
            if tensor is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                names[name] = places.setdefault(tensor, [])
                if not known:
                    places[tensor].append(name)
    return names


def at_places(tensors: dict[str, Tensor], places: dict[str, list[str]]) -> dict[str, Tensor]:
    """Return tensors by the names of their places, once for each.

    Args:
        tensors: By name. Names that the module does not have are ignored.
        places: See :func:`places_of`.
    """
    return {place: value for name, value in tensors.items() for place in places.get(name, [])}


def device_of(params: Any) -> torch.device | None:
    """Return the device of parameters; None if they are not what they should be."""
    tensors = params.values() if isinstance(params, dict) else ()
    return next((p.device for p in tensors if isinstance(p, Tensor)), None)


def _is_shard(p: Tensor) -> bool:
    """Return whether a parameter is spread over processes; by name, as the import takes long."""
    return type(p).__name__ == "DTensor"


def refuse_sharded(name: str, model_func: Any, params: Any) -> None:
    """Refuse parameters of which each process has a part.

    Args:
        name: What cannot do with them.
        model_func: The model.
        params: The parameters by name.

    Raises:
        NotImplementedError: If parameters are ``DTensor``, or a part of the model is wrapped by
            FSDP.
    """
    tensors = list(params.values()) if isinstance(params, dict) else []
    layers = list(model_func.modules()) if isinstance(model_func, nn.Module) else []
    tensors += [p for layer in layers for p in layer.parameters(recurse=False)]
    # By name: to import FSDP takes long. fully_shard makes a module's class one of FSDPModule.
    wrappers = {"FSDPModule", "FullyShardedDataParallel"}
    wrapped = any(wrappers & {base.__name__ for base in type(layer).__mro__} for layer in layers)
    if wrapped or any(map(_is_shard, tensors)):
        raise NotImplementedError(
            f"{name} does not support parameters that are sharded by FSDP (DTensor): derivatives "
            "with respect to shards do not exist. Gather the full parameters into a model without "
            "FSDP (torch.distributed.checkpoint.state_dict.get_model_state_dict with "
            "full_state_dict=True), and pass the process group as process_group; or use "
            "KFACLinearOperator or EKFACLinearOperator with backend='hooks'."
        )


class _Unwrapped(nn.Module):
    """Calls a module whose parameters have names as in ``DistributedDataParallel``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)


def _without_data_parallel(model_func: ModelFunction, params: dict[str, Tensor]) -> ModelFunction:
    """Return the module in ``DistributedDataParallel``, with the names that params have."""
    if not isinstance(model_func, nn.Module):
        return model_func
    if isinstance(model_func, nn.parallel.DistributedDataParallel):
        module: nn.Module = model_func.module
        names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        prefixed = {f"module.{name}" for name in names}
        wrap = not names.issuperset(params) and prefixed.issuperset(params)
        model_func = _Unwrapped(module) if wrap else module
    for name, layer in model_func.named_modules():
        if isinstance(layer, nn.parallel.DistributedDataParallel):
            raise NotImplementedError(
                f"The model has a DistributedDataParallel inside ({name!r}), which would "
                "communicate in each prediction. Build the model around its .module, which shares "
                "its parameters."
            )
    return model_func


def tensors_and_flags(function: Any) -> list[Any]:
    """Return a module's parameters, buffers, and train/eval flags; nothing for other functions."""
    if not isinstance(function, nn.Module):
        return []
    flags = [layer.training for layer in function.modules()]
    return [*function.parameters(), *function.buffers(), *flags]


class _Watch(TorchFunctionMode):
    """Sees the functions of torch that a model calls, and refuses some."""

    def __init__(self) -> None:
        super().__init__()
        self.traits = ModelTraits()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        traits = self.traits
        if func in _NOTABLE:
            self._note(func, args, kwargs)
        # Both are off inside of a custom function, which has derivatives of its own.
        if torch._C._is_fwd_grad_enabled() and not torch.is_grad_enabled():
            traits.wrong_forward |= any(map(_is_tracked, [*args, *kwargs.values()]))
        outputs = func(*args, **kwargs)
        for output in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(output, Tensor) and output.is_floating_point():
                traits.eps = max(traits.eps, torch.finfo(output.dtype).eps)
                traits.entries += output.numel()
        return outputs

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what it means that one of the notable functions is called; refuse some options."""
        traits = self.traits
        traits.convolution |= func in _CONVOLUTIONS
        traits.weight_norm |= func is torch._weight_norm
        traits.wrong_forward |= func in _WRONG_FORWARD
        traits.attention |= func is functional.scaled_dot_product_attention or (
            func is functional.multi_head_attention_forward and not kwargs.get("need_weights", True)
        )
        if func is custom_function_call and _is_once_differentiable(args[0]):
            traits.once_differentiable.append(args[0].__name__)
        if func in _EMBEDDINGS:
            names = _EMBEDDINGS[func]
            # Slices, because torch 2.6 cannot trace a zip of unequal lengths.
            given = {**dict(zip(names[: len(args)], args[: len(names)], strict=True)), **kwargs}
            # Refused before the function runs, because max_norm changes the weight in place.
            for option in ("max_norm", "scale_grad_by_freq"):
                if given.get(option):
                    raise NotImplementedError(_refused_embedding("The model", option))
            padding_idx = given.get("padding_idx")
            # Negative numbers count from the end, but not in torch.embedding.
            ignored = padding_idx is None or (func is torch.embedding and padding_idx < 0)
            traits.padding_idx |= not ignored
            traits.embedding_bag |= func in (functional.embedding_bag, torch.embedding_bag)


#: Functions with embedding options, and their arguments in order.
_EMBEDDINGS: dict[Any, tuple[str, ...]] = {
    functional.embedding: (
        *("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"),
    ),
    torch.embedding: ("weight", "indices", "padding_idx", "scale_grad_by_freq"),
    functional.embedding_bag: (
        *("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode"),
        *("sparse", "per_sample_weights", "include_last_offset", "padding_idx"),
    ),
    torch.embedding_bag: (
        *("weight", "indices", "offsets", "scale_grad_by_freq", "mode", "sparse"),
        *("per_sample_weights", "include_last_offset", "padding_idx"),
    ),
}


#: Functions that are convolutions.
_CONVOLUTIONS = {
    *(torch.conv1d, torch.conv2d, torch.conv3d, torch.convolution),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
}

#: Functions whose formulas in forward mode are wrong, and hooks, which it ignores.
_WRONG_FORWARD = {
    *(torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_),
    *(torch.index_reduce, Tensor.index_reduce, Tensor.index_reduce_),
    Tensor.register_hook,
}

#: All functions whose call says something of derivatives.
_NOTABLE = {
    *(*_CONVOLUTIONS, *_WRONG_FORWARD, *_EMBEDDINGS, torch._weight_norm, custom_function_call),
    *(functional.scaled_dot_product_attention, functional.multi_head_attention_forward),
}


def _is_tracked(x: Any) -> bool:
    """Whether a tensor depends on something that is differentiated, in either mode."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return False
    return x.requires_grad or forward_ad.unpack_dual(x).tangent is not None


class _Decompose(TorchFunctionMode):
    """Computes weight norm in steps that can be differentiated twice."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Evaluate ``torch._weight_norm``."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _guess_traits(layers: list[nn.Module]) -> ModelTraits:
    """Guess from a module's layers what it will be seen to do."""
    return ModelTraits(
        padding_idx=any(isinstance(x, nn.Embedding) and x.padding_idx is not None for x in layers),
        embedding_bag=any(isinstance(x, nn.EmbeddingBag) for x in layers),
        convolution=any(isinstance(x, nn.modules.conv._ConvNd) for x in layers),
    )


def _fused_attention_enabled() -> bool:
    """Whether the caller lets PyTorch choose fused kernels for attention."""
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled()


def _is_once_differentiable(function: Any) -> bool:
    """Whether a ``torch.autograd.Function`` forbids second derivatives."""
    backward = getattr(function, "backward", None)
    return getattr(backward, "__code__", None) is _ONCE_DIFFERENTIABLE


def _once_differentiable_nodes(root: Any) -> Iterator[str]:
    """Yield the names of custom functions in a graph that forbid second derivatives."""
    for node in _nodes(root):
        function: Any = getattr(type(node), "_forward_cls", None)
        if _is_once_differentiable(function):
            yield function.__name__


def _wrong_third_nodes(root: Any) -> Iterator[str]:
    """Yield the names of functions whose gradients in a graph have wrong second derivatives."""
    for node in _nodes(root):
        kind = type(node).__name__.rstrip("0123456789")
        if kind in ("NativeLayerNormBackwardBackward", "_LayerNormGradientBackward"):
            yield "layer_norm"
        on_gpu = kind == "CudnnBatchNormBackwardBackward"  # of training mode only
        if on_gpu or (kind == "NativeBatchNormBackwardBackward" and node._saved_train):
            yield "batch_norm or instance_norm in training mode"


def _nodes(root: Any) -> Iterator[Any]:
    """Yield the nodes of a graph."""
    seen, todo = set(), [root]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        todo.extend(following for following, _ in node.next_functions)


_ONCE_DIFFERENTIABLE = once_differentiable(lambda ctx: None).__code__


def _is_plain(tensor: Tensor) -> bool:
    """Whether autograd treats a tensor as a constant."""
    # torch.compile cannot ask for inference tensors, and refuses them itself.
    inference = not torch.compiler.is_compiling() and tensor.is_inference()
    return not (tensor.requires_grad or inference)


def _check_params(params: Any) -> None:
    """Check the parameters alone."""
    if not isinstance(params, dict):
        raise TypeError(
            "params must be a dict mapping parameter names to tensors, got "
            f"{type(params).__name__}. Build it with e.g. dict(model.named_parameters())."
        )
    if not params:
        raise ValueError("params is empty. Pass at least one parameter.")
    names_of: dict[int, str] = {}
    for name, p in params.items():
        if not isinstance(name, str) or not isinstance(p, Tensor):
            raise TypeError(
                "params must be a dict mapping parameter names to tensors, got "
                f"{type(name).__name__} {name!r}: {type(p).__name__}. Build it with e.g. "
                "dict(model.named_parameters())."
            )
        if not p.is_floating_point():
            raise ValueError(f"Parameter {name!r} must be floating point, got {p.dtype}.")
        if id(p) in names_of:
            raise ValueError(
                f"Parameters {names_of[id(p)]!r} and {name!r} are one tensor. Pass a tied "
                "parameter under one of its names."
            )
        names_of[id(p)] = name
    for what in ("device", "dtype"):
        groups: dict[Any, list[str]] = defaultdict(list)
        for name, p in params.items():
            groups[getattr(p, what)].append(name)
        if len(groups) > 1:
            listing = "; ".join(f"{value}: {', '.join(names)}" for value, names in groups.items())
            raise ValueError(f"All params must have the same {what}, got {listing}.")


def _resolve_names(module: nn.Module, params: dict[str, Tensor]) -> set[str]:
    """Check names and shapes against a module; return all names of the parameters given."""
    owned = dict(module.named_parameters(remove_duplicate=False))
    unknown = [name for name in params if name not in owned]
    if unknown:
        buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
        hint = "".join(f" {name!r} is a buffer." for name in unknown if name in buffers)
        raise ValueError(
            f"params has names that are not parameters of {type(module).__name__}: "
            f"{', '.join(unknown)}.{hint} Its parameters: {', '.join(owned)}."
        )
    first_name: dict[int, str] = {}
    for name, p in params.items():
        original = owned[name]
        if p.shape != original.shape:
            raise ValueError(
                f"Parameter {name!r} has shape {tuple(p.shape)} in params, but "
                f"{tuple(original.shape)} in {type(module).__name__}. They must be the same."
            )
        if id(original) in first_name:
            raise ValueError(
                f"Parameters {first_name[id(original)]!r} and {name!r} are tied in "
                f"{type(module).__name__}. Pass a tied parameter under one of its names."
            )
        first_name[id(original)] = name
    # A tensor can be a parameter in one place and a buffer in another.
    tensors = [*owned.items(), *module.named_buffers(remove_duplicate=False)]
    return {name for name, tensor in tensors if id(tensor) in first_name}


def _check_embeddings(module: nn.Module) -> None:
    """Refuse embeddings whose forward pass changes their weight or whose gradient is none."""
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            where = f"{type(layer).__name__} {name!r}" if name else type(layer).__name__
            if layer.max_norm is not None:
                raise NotImplementedError(_refused_embedding(where, "max_norm"))
            if layer.scale_grad_by_freq:
                raise NotImplementedError(_refused_embedding(where, "scale_grad_by_freq"))


def _refused_embedding(where: str, option: str) -> str:
    """Say why an option of an embedding is refused."""
    reason = {
        "max_norm": "it changes the weight in the forward pass",
        "scale_grad_by_freq": "its gradient is not the derivative of the prediction",
    }
    return (
        f"{where} uses {option}, which is not supported: {reason[option]}. Build the embedding "
        f"without {option}."
    )


def _not_a_tensor(prediction: Any) -> str:
    """Say how to wrap a model that does not return a tensor."""
    return (
        f"The model must return a tensor, got {type(prediction).__name__}. Wrap it in a module "
        "that returns one, and take the parameters of that module, e.g.\n"
        "    class Wrapped(nn.Module):\n"
        "        def __init__(self, model):\n"
        "            super().__init__()\n"
        "            self.model = model\n"
        "        def forward(self, X):\n"
        "            return self.model(**X).logits"
    )


__all__ = [
    "FunctionalModel",
    "ModelFunction",
    "ModelTraits",
    "at_places",
    "autograd_ready",
    "device_of",
    "places_of",
    "refuse_sharded",
    "tensors_and_flags",
]
