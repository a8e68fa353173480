"""Edits merged into a student's weights: W += alpha / rank * B A, in float32, one edit after the other.

A worker does so before it trains or answers on a student with edits; ``python -m student.merge`` writes the merged
student as a folder that transformers and vLLM load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from preceptor.errors import PreceptorError
from student.base import LoadedBase
from student.peft_format import PeftAdapter, read_adapter


@torch.no_grad()
def merge_adapters(base: LoadedBase, folders: Sequence[Path]) -> None:
    """Changes the weights of ``base`` to what it computes with the adapters in ``folders``, in order.

    Sums are made in float32 and rounded to the weights' own type once, after the last adapter.
    Raises PreceptorError as ``read_adapter``, and before any weight is changed ADAPTER_MISMATCH (layers that the
    student lacks or that have other widths) and BASE_NOT_ADAPTABLE (quantised layers, and such as share their weight).
    """
    adapters = [read_adapter(folder) for folder in folders]
    layers = dict(base.model.named_modules())
    held = Counter(parameter.data_ptr() for _, parameter in base.model.named_parameters(remove_duplicate=False))
    for adapter in adapters:
        _check(adapter, layers, held)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.factors):
        weight = layers[name].weight
        assert isinstance(weight, nn.Parameter)
        merged = weight.data.float()
        for adapter in adapters:
            if name in adapter.factors:
                a, b = (factor.to(merged.device) for factor in adapter.factors[name])
                merged = merged + (b @ a) * (adapter.alpha / adapter.rank)
        weight.data.copy_(merged)


def _check(adapter: PeftAdapter, layers: dict[str, nn.Module], held: Counter[int]) -> None:
    place = str(adapter.folder)
    if not adapter.factors:
        raise PreceptorError("ADAPTER_MISMATCH", "the adapter is empty", file=place)
    for name, (a, b) in adapter.factors.items():
        layer = layers.get(name)
        if layer is None or not isinstance(getattr(layer, "weight", None), nn.Parameter):
            raise PreceptorError("ADAPTER_MISMATCH", f"the student has no layer {name}", file=place, field=name)
        if type(layer) is not nn.Linear or not layer.weight.is_floating_point():
            message = f"{name} is a {type(layer).__name__}: adapters are merged into plain linear layers"
            raise PreceptorError("BASE_NOT_ADAPTABLE", message, file=place, field=name)
        if held[layer.weight.data_ptr()] > 1:
            message = f"{name} shares its weight with another layer of the student"
            raise PreceptorError("BASE_NOT_ADAPTABLE", message, file=place, field=name)
        if (b.shape[0], a.shape[1]) != tuple(layer.weight.shape):
            here, there = f"{layer.in_features} and gives {layer.out_features}", f"{a.shape[1]} and {b.shape[0]}"
            message = f"{name} takes {here} values, the adapter's {there}"
            raise PreceptorError("ADAPTER_MISMATCH", message, file=place, field=name)
