# SPDX-License-Identifier: Apache-2.0
"""Concept files: one safetensors file holds all of one concept.

Keys, for every adapted module path: `<path>.A` fp16 [O, r], `<path>.B` fp16 [r, I],
`<path>.exponent` int32 [2], `<path>.bits` int32 [O, ceil(I / 32)]; for every token
`token/<component>/<token>` fp32 [dim]. The header's metadata has one entry, `stamina`: JSON with
the file version, the concept's name, index, config and tokens, the prompt it was learned with where
that is known, and per layer the scale and the digest of the base weight. Equal concepts give equal
bytes.
"""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from stamina_adapters.concept import ConceptState, Tokens, check_name
from stamina_adapters.config import StaminaConfig
from stamina_adapters.fold import fold_concepts
from stamina_adapters.models import adapted_model, find_state
from stamina_kernels import CommittedAdapter
from stamina_kernels.reference import word_count

_ENTRY, VERSION = "stamina", 1
_TOKEN = "token/"
_STOCK_NAMES = ("pytorch_lora_weights.safetensors",)


def _tensors(concept: ConceptState) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path, adapter in concept.layers.items():
        tensors[f"{path}.A"] = adapter.A
        tensors[f"{path}.B"] = adapter.B
        tensors[f"{path}.exponent"] = torch.tensor(adapter.exponent, dtype=torch.int32)
        tensors[f"{path}.bits"] = adapter.bits
    for component, tokens in concept.tokens.items():
        for token, vector in tokens.items():
            tensors[f"{_TOKEN}{component}/{token}"] = vector
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _metadata(concept: ConceptState) -> dict[str, str]:
    # one entry, because the writer stores several in no fixed order
    prompt = {} if concept.prompt is None else {"prompt": concept.prompt}
    described = {
        "version": VERSION,
        "name": concept.name,
        "index": concept.index,
        "config": concept.config.model_dump(mode="json"),
        "layers": {
            path: {"scale": adapter.scale, "base": concept.digests[path]}
            for path, adapter in concept.layers.items()
        },
        "tokens": {component: list(tokens) for component, tokens in concept.tokens.items()},
        **prompt,
    }
    return {_ENTRY: json.dumps(described)}


def concept_to_bytes(concept: ConceptState) -> bytes:
    """The contents of the concept's file."""
    return save(_tensors(concept), _metadata(concept))


def write_beside(file: Path, data: bytes) -> None:
    """Write next to `file` and rename; on the disk when it returns, or not there at all."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _concepts(source: Any) -> list[ConceptState]:
    if isinstance(source, ConceptState):
        return [source]
    state = find_state(adapted_model(source))
    if state is not None and state.live is not None:
        raise RuntimeError(
            f"the adapter {state.live.name!r} is not finished: call fold_stamina before saving"
        )
    if state is None or not state.folded:
        raise RuntimeError("there is no folded concept to save")
    return [concept.state for concept in state.folded]


def save_stamina_weights(path: str | os.PathLike[str], source: Any) -> list[Path]:
    """Write a `ConceptState`, or every folded concept of a model, one file each; returns the files.

    `path` is a file that ends in .safetensors (for one concept) or a directory, made if absent,
    where concepts are named <adapter name>.safetensors. Files are written beside and renamed.
    Raises RuntimeError while an adapter is live or where there is nothing to save, ValueError for
    a file name that other tools would read as something else.
    """
    target = Path(path)
    concepts = _concepts(source)
    if target.suffix == ".safetensors":
        if len(concepts) != 1:
            raise ValueError(f"path must be a directory for {len(concepts)} concepts, got {target}")
        files = [target]
    else:
        files = [target / f"{concept.name}.safetensors" for concept in concepts]
    for file in files:
        if file.name in _STOCK_NAMES:
            raise ValueError(
                f"file must not be named {file.name}: other tools would load it and drop the mask"
            )
    for file, concept in zip(files, concepts, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_beside(file, concept_to_bytes(concept))
    return files


def _describe(file: Path | str, metadata: dict[str, str]) -> dict[str, Any]:
    if _ENTRY not in metadata:
        raise ValueError(f"{file}: not a STAMINA file: its header has no {_ENTRY!r} entry")
    try:
        described = json.loads(metadata[_ENTRY])
        version = described["version"]
        if version != VERSION:
            raise ValueError(f"file version {version!r}, this release reads {VERSION!r}")
        described["config"] = StaminaConfig.model_validate(described["config"])
        fields = {key: described[key] for key in ("name", "index", "config", "layers", "tokens")}
        if not isinstance(fields["index"], int) or fields["index"] < 0:
            raise ValueError(f"index must be a non-negative integer, got {fields['index']!r}")
        check_name(fields["name"])
        fields["prompt"] = described.get("prompt")
        if not isinstance(fields["prompt"], str | None):
            raise ValueError(f"prompt must be a string, got {fields['prompt']!r}")
        if not all(isinstance(names, list) for names in fields["tokens"].values()):
            raise ValueError("tokens must be lists of words by component")
        for layer in fields["layers"].values():
            if not math.isfinite(layer["scale"]) or len(layer["base"]) != 64:
                raise ValueError("a layer's scale or digest is malformed")
    except (KeyError, TypeError, AttributeError, ValueError, ValidationError) as error:
        raise ValueError(f"{file}: the header is malformed: {error}") from error
    return fields


def _check_keys(file: Path | str, described: dict[str, Any], present: set[str]) -> None:
    parts = ("A", "B", "exponent", "bits")
    expected = {f"{path}.{part}" for path in described["layers"] for part in parts}
    expected |= {f"{_TOKEN}{c}/{t}" for c, tokens in described["tokens"].items() for t in tokens}
    if missing := sorted(expected - present):
        raise ValueError(f"{file}: missing keys: {', '.join(missing)}")
    if unexpected := sorted(present - expected):
        raise ValueError(f"{file}: unexpected keys: {', '.join(unexpected)}")


def _adapter(
    file: Path | str, path: str, tensors: dict[str, Tensor], scale: float
) -> CommittedAdapter:
    A, B, exponent, bits = (tensors[f"{path}.{p}"] for p in ("A", "B", "exponent", "bits"))
    if A.dim() != 2 or B.dim() != 2 or B.shape[0] != A.shape[1]:
        raise ValueError(f"{file}: {path}: A {list(A.shape)} and B {list(B.shape)} do not multiply")
    words = word_count(B.shape[1])
    wanted: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]] = {
        "A": (A, torch.float16, tuple(A.shape)),
        "B": (B, torch.float16, tuple(B.shape)),
        "exponent": (exponent, torch.int32, (2,)),
        "bits": (bits, torch.int32, (A.shape[0], words)),
    }
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{file}: {path}.{name} must be {dtype} {list(shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    ea, eb = exponent.tolist()
    return CommittedAdapter(A, B, (ea, eb), bits, scale)


def _concept(
    file: Path | str, metadata: dict[str, str], tensors: dict[str, Tensor]
) -> ConceptState:
    described = _describe(file, metadata)
    _check_keys(file, described, set(tensors))
    layers = {
        path: _adapter(file, path, tensors, layer["scale"])
        for path, layer in described["layers"].items()
    }
    tokens: Tokens = {
        component: {token: tensors[f"{_TOKEN}{component}/{token}"] for token in names}
        for component, names in described["tokens"].items()
    }
    for component, vectors in tokens.items():
        for token, vector in vectors.items():
            if vector.dtype != torch.float32 or vector.dim() != 1:
                raise ValueError(
                    f"{file}: {_TOKEN}{component}/{token} must be torch.float32 of one dimension, "
                    f"got {vector.dtype} {list(vector.shape)}"
                )
    return ConceptState(
        name=described["name"],
        index=described["index"],
        config=described["config"],
        layers=layers,
        digests={path: layer["base"] for path, layer in described["layers"].items()},
        tokens=tokens,
        prompt=described["prompt"],
    )


def concept_from_bytes(data: bytes, source: str) -> ConceptState:
    """The concept in a file's contents; ValueError, which begins with `source`, as when reading."""
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{source}: not readable as safetensors: {error}") from error
    return _concept(source, header.get("__metadata__") or {}, tensors)


def read_stamina_weights(file: str | os.PathLike[str]) -> ConceptState:
    """The concept in a file. Raises FileNotFoundError, or ValueError naming what is wrong in it."""
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    try:
        with safe_open(file, framework="pt") as reader:
            metadata = reader.metadata() or {}
            tensors = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file: {error}") from error
    return _concept(file, metadata, tensors)


def load_stamina_weights(
    pipe_or_module: Any,
    file: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    weight: float = 1.0,
    verify_base: bool = True,
) -> ConceptState:
    """Read a concept file and fold it; `adapter_name` gives the concept another name.

    Raises as `read_stamina_weights` and `fold_concepts`; then nothing has been changed.
    """
    concept = read_stamina_weights(file)
    if adapter_name is not None:
        check_name(adapter_name)
        concept = replace(concept, name=adapter_name)
    fold_concepts(pipe_or_module, [concept], [weight], verify_base=verify_base)
    return concept
