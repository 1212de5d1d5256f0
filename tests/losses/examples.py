"""Inputs of the losses' tests."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def logits_of(B: int, T: int, V: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(B, T, V)).to(dtype)


def labels_of(T: int, *sequences: tuple[int, ...]) -> Tensor:
    """Labels ``[B, T]``; each sequence is (start, length) of its answers, one after the other."""
    labels = torch.full((len(sequences), T), -100)
    for b, spans in enumerate(sequences):
        for start, length in zip(spans[::2], spans[1::2], strict=True):
            labels[b, start : start + length] = 1
    return labels


def value_and_gradient(
    loss: Callable[..., Tensor], student: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """A loss and its gradient with respect to the student's logits."""
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf, *arguments, **options)
    value.sum().backward()
    return value.detach(), leaf.grad
