"""Edits merged into a student's weights: W += alpha / rank * B A, in float32, one edit after the other.

A worker does so before it trains or answers on a student with edits. ``python -m student.merge`` writes the merged
student as a folder that transformers, vLLM and the student service take, in the type in which the student is stored:

    python -m student.merge --source FOLDER_OR_ID --commit COMMIT --adapter FOLDER [--adapter FOLDER ...] --out FOLDER

It prints one line of JSON: ``folder``, ``commit`` (its hash), ``dtype``, ``max_logit_difference`` (of what was read
back and what was written, over a probe: 0). An error is "REASON: message", the last line on stderr, with exit code 2.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from preceptor.errors import PreceptorError
from preceptor.hashes import folder_sha256
from preceptor.settings import HouseSettings
from preceptor.storage import storage_error
from preceptor.v1 import types_pb2 as types
from student.base import LoadedBase, load_base
from student.kept import fetch_edits, save_student, write_provenance
from student.peft_format import PeftAdapter, read_adapter
from student.source import fetch

# Tokens of the text by which what was written is compared with what is read back.
_PROBE_TOKENS = 64


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


def write_merged(student: types.PinnedStudent, out: Path) -> dict[str, object]:
    """Writes the student with its edits merged to ``out``, whole or not at all, and reads it back.

    Raises PreceptorError: OUTPUT_NOT_WRITABLE, ARTIFACT_CORRUPT (what is read back computes something else), and what
    ``student.source.fetch``, ``student.kept.fetch_edits`` and ``merge_adapters`` raise.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PreceptorError("OUTPUT_NOT_WRITABLE", "there is something already", file=str(out))
    copies = HouseSettings().artifact_cache
    weights, adapters = fetch_edits(student, copies)
    folder = weights or fetch(student.source, student.commit, copies)
    edits = tuple(adapter.sha256 for adapter in student.adapters)
    base = load_base(folder, source=student.source, commit=student.commit, dtype="auto", adapters=edits)
    merge_adapters(base, adapters)
    draft = out.absolute().parent / f".{out.name}-{uuid.uuid4().hex[:8]}"
    try:
        draft.mkdir(parents=True)
        save_student(base, draft)
        write_provenance(base, "weights", draft)
        difference = _largest_difference(base, load_base(draft, source="", commit="", dtype="auto"))
        if difference != 0.0:
            message = f"what was written gives other logits when it is read back (by {difference:g})"
            raise PreceptorError("ARTIFACT_CORRUPT", message, file=str(draft))
        if out.exists():
            out.rmdir()
        draft.rename(out)
    except OSError as error:
        known = storage_error(error, out)
        raise known or PreceptorError("OUTPUT_NOT_WRITABLE", str(error), file=str(out)) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    dtype = str(base.model.dtype).removeprefix("torch.")
    return {"folder": str(out), "commit": folder_sha256(out), "dtype": dtype, "max_logit_difference": difference}


@torch.no_grad()
def _largest_difference(one: LoadedBase, other: LoadedBase) -> float:
    """Between the two students' logits, for tokens that are spread over the vocabulary; NaN if one has such."""
    length = min(_PROBE_TOKENS, one.context)
    ids = torch.linspace(0, one.model.config.vocab_size - 1, length).long()[None]
    logits = [base.model(ids, use_cache=False).logits.float() for base in (one, other)]
    return float((logits[0] - logits[1]).abs().max())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    from transformers.utils import logging

    parser = argparse.ArgumentParser(prog="python -m student.merge", allow_abbrev=False)
    parser.add_argument("--source", required=True, help="where the student comes from")
    parser.add_argument("--commit", required=True, help="the commit it was registered with")
    parser.add_argument("--adapter", action="append", type=Path, default=[], help="an edit's folder; in order")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write; not there yet, or empty")
    given = parser.parse_args(arguments)
    logging.disable_progress_bar()
    try:
        for folder in given.adapter:
            if not folder.is_dir():
                raise PreceptorError("ARTIFACT_NOT_FOUND", "there is no such folder", file=str(folder))
        edits = [
            types.Artifact(uri=folder.resolve().as_uri(), sha256=folder_sha256(folder)) for folder in given.adapter
        ]
        student = types.PinnedStudent(name=given.source, source=given.source, commit=given.commit, adapters=edits)
        print(json.dumps(write_merged(student, given.out)))
    except PreceptorError as error:
        print(f"{error.reason}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
