"""The one place where operators enter ``torch.ops.mlot``.

An operator is three torch ops. ``<op>_forward`` and ``<op>_backward`` have one implementation per backend and no
autograd formula. ``<op>`` joins them through one ``autograd.Function``, for whoever calls ``torch.ops``; the public
Python function applies the same Function directly, because ``torch.func`` cannot enter it through the dispatcher.

An operator whose outputs are indices has no gradient, and so nothing to join: it is one op, ``<op>``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlot_kernels import backends

_library = torch.library.Library("mlot", "FRAGMENT")
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

Table = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Operator:
    """An operator as the public functions call it and as the contract tests find it."""

    name: str
    op: Callable[..., Any]
    function: type[torch.autograd.Function] | None  # None and an empty `backward`: it has no gradient
    forward: Table
    backward: Table

    def __call__(self, *arguments: Any, backend: str | None) -> Any:
        """Run on the backend that ``backend`` names, or on the best one for the first tensor's device."""
        chosen = backends.resolve(self.name, self.forward, arguments, backend)
        if self.function is None:
            return self.op(*arguments, chosen)
        return self.function.apply(*_distinct(arguments), chosen)


OPERATORS: dict[str, Operator] = {}


def _distinct(arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments, a tensor that comes twice as a view the second time: torch.compile refuses one for two inputs."""
    distinct: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor) and any(argument is other for other in distinct):
            argument = argument.view_as(argument)
        distinct.append(argument)
    return distinct


def raw_operator(schema: str, *, fake: Callable[..., Any], implementations: Table) -> Callable[..., Any]:
    """Define an op with one implementation per backend and no gradient.

    Args:
        schema: torch schema whose last argument is ``str backend``, e.g. ``"f_forward(Tensor x, str backend) ->
            Tensor"``.
        fake: the outputs' shapes and dtypes; takes the schema's arguments as meta tensors.
        implementations: backend name -> function of the schema's arguments without ``backend``.
    """

    def run(*arguments: Any) -> Any:
        *inputs, backend = arguments
        if backend not in implementations:  # only a caller of torch.ops comes here: the public functions resolve first
            raise backends.BackendUnavailable(
                f"mlot::{name}: no backend '{backend}' (it has {', '.join(implementations)})"
            )
        device = next(argument.device.type for argument in inputs if isinstance(argument, Tensor))
        if not torch.is_autocast_enabled(device):
            return implementations[backend](*inputs)
        with torch.autocast(device, enabled=False):  # plain torch inside would round its matrix products
            return implementations[backend](*inputs)

    name = _define(schema, fake)
    _library.impl(name, run, "CompositeExplicitAutograd")
    return getattr(torch.ops.mlot, name).default


def differentiable_operator(
    schema: str,
    *,
    fake: Callable[..., Any],
    function: type[torch.autograd.Function],
    forward: Table,
    backward: Table,
) -> Operator:
    """Define the op that joins forward and backward: ``function.apply`` under autograd, its forward alone below it."""
    name = _define(schema, fake)
    function.forward.__signature__ = _PositionalSignature.from_callable(function.forward)  # type: ignore[attr-defined]
    _library.impl(name, function.apply, "Autograd")
    _library.impl(name, function.forward, "CompositeExplicitAutograd")
    OPERATORS[name] = Operator(name, getattr(torch.ops.mlot, name).default, function, forward, backward)
    return OPERATORS[name]


class _PositionalSignature(inspect.Signature):
    """A signature for ``Function.apply``, which asks for it and binds to it in every call: half of what a small call
    costs. All arguments are given, by position, and so there is nothing to bind."""

    def bind(self, *arguments: Any, **named: Any) -> Any:
        if named or len(arguments) != len(self.parameters):
            return super().bind(*arguments, **named)
        return _Bound(arguments)


class _Bound(NamedTuple):
    """As much of ``inspect.BoundArguments`` as ``Function.apply`` uses."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = MappingProxyType({})

    def apply_defaults(self) -> None:
        pass


def plain_operator(schema: str, *, fake: Callable[..., Any], implementations: Table) -> Operator:
    """Define an operator without a gradient, whose outputs are indices; arguments as for ``raw_operator``."""
    op = raw_operator(schema, fake=fake, implementations=implementations)
    name = _name(schema)
    OPERATORS[name] = Operator(name, op, None, implementations, {})
    return OPERATORS[name]


def lazy(module: str, name: str) -> Callable[..., Any]:
    """The function ``name`` of ``module``, imported at its first call: Triton need not be installed."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments)

    return call


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``backward(ctx, saved, *grads)`` an ``autograd.Function``'s backward that has no derivative itself.

    ``saved`` are ``ctx.saved_tensors``, unpacked here because checkpointing allows that a single time. A second
    derivative raises; torch's own decorator of this name lets it pass as 0 where the upstream gradient is a constant.
    """

    def once(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        with torch.no_grad():
            outputs = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # nobody asks for a graph of this
            return outputs
        inputs = [x for x in (*saved, *grads) if isinstance(x, Tensor) and x.requires_grad]
        return tuple(None if output is None else _NoSecondDerivative.apply(output, *inputs) for output in outputs)

    return once


class _NoSecondDerivative(torch.autograd.Function):
    """Hands a gradient on, connected to what it was made of."""

    @staticmethod
    def forward(gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "the operators of mlot_kernels are differentiable once, and this asks for a second derivative; "
            "detach their gradient, or differentiate the definition in the operator's reference.py"
        )


def _name(schema: str) -> str:
    return schema[: schema.index("(")]


def _define(schema: str, fake: Callable[..., Any]) -> str:
    name = _name(schema)
    _library.define(schema, tags=_TAGS)
    torch.library.register_fake(f"mlot::{name}", fake)
    return name
