"""
Initial weights: pretrained weights loaded before the first step.

    model.pt  model.safetensors  a directory or URL with one of them, whole or in shards
        │  names and tensors only: loading never executes code from the file
        ▼
    names compared with the model's, without `module.` and `_orig_mod.`
        ▼
    the whole model before it is split; each rank's part if the model is on meta (`init: meta`)
"""

from __future__ import annotations

import json
import logging
import pickle
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError, nearest
from distplat.platform.model_options import InitialWeights
from distplat.platform.remote_storage import (
    PART_BYTES,
    ObjectNotFound,
    RemoteStorage,
    is_url,
    missing_library,
    url_problem,
)
from distplat.platform.spec import Job
from distplat.platform.tensor_file import EMA_PREFIX
from distplat.platform.tensor_slices import RawTensor, TensorSlice
from distplat.strategies.checkpoint.checkpoint_reader import tensor_of
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.parameter_layout import dtype_name

logger = logging.getLogger(__name__)

_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files searched for in a directory, in this order: names of Hugging Face and of distplat."""
_SAFETENSORS = ".safetensors"
_SUFFIXES = (_SAFETENSORS, ".pt", ".pth", ".bin", ".ckpt")
_WITHIN = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training checkpoints have the model's state dict."""
_SHOWN = 5
_INDEX_BYTES = 64 * 2**20
"""Size limit of an index file: half a million tensors."""


def initial_weights(job: Job, model: nn.Module, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Load the job's initial weights into a model.

    Args:
        job: has `initial_weights`.
        model: the whole model on the CPU; a model on the meta device stays unchanged.
        extra: trainable tensors of the task outside the model, by name.

    Returns:
        The weights by the model's names, on the CPU.

    Raises:
        SpecError: a file is missing or unreadable, or is of another model.
    """
    wanted = job.initial_weights
    assert wanted is not None, "called only if the job has initial weights"
    with tempfile.TemporaryDirectory(prefix="distplat-weights-") as folder:
        weights = _load_all(wanted, Path(folder), job.failure.storage_timeout_s)
        weights = {name: w for name, w in weights.items() if not name.startswith(EMA_PREFIX)}
        state = {**model.state_dict(keep_vars=True), **extra}
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        weights = _strip_wrapper_names(weights, tensors)
        _check_tensors(weights, tensors, wanted)
        missing = sorted(tensors.keys() - weights.keys())
        unexpected = sorted(weights.keys() - tensors.keys())
        if not any(tensor.is_meta for tensor in tensors.values()):
            missing, unexpected = _load_state_dict(model, extra, weights)
        _check_names(_without_tied(missing, tensors), unexpected, {*weights}, wanted)
        return {name: weight.clone() for name, weight in weights.items() if name in tensors}


def _load_state_dict(
    model: nn.Module, extra: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> tuple[list[str], list[str]]:
    """
    Load weights by `load_state_dict`, whose hooks may convert the names of older versions.

    Returns:
        The missing names, and the unexpected ones.
    """
    try:
        keys = model.load_state_dict({k: v for k, v in weights.items() if k not in extra}, False)
    except RuntimeError as error:
        raise _problem(f"the weights are of another model: {_reason(error)}") from None
    for name in extra.keys() & weights.keys():
        extra[name].data.copy_(weights[name])
    missing = [*keys.missing_keys, *(extra.keys() - weights.keys())]
    return sorted(missing), sorted(keys.unexpected_keys)


def _load_all(wanted: InitialWeights, folder: Path, limit_s: float) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for number, path in enumerate(wanted.path):
        target = folder / str(number)
        target.mkdir()
        weights |= _read(_local_path(path, target, limit_s))
    return weights


def _paths(wanted: InitialWeights) -> str:
    return " and ".join(wanted.path)


def fill_part(
    flat: FlatModel, weights: Mapping[str, Tensor], slices: Mapping[str, TensorSlice]
) -> None:
    """
    Load weights into a part of a model, in place.

    Args:
        flat: the part.
        weights: weights of the whole model, by name.
        slices: slice of the whole tensor that each split tensor of the part has.
    """
    for name, tensor in flat.state_dict().items():
        if name in weights:
            whole = weights[name].to(tensor.dtype).contiguous()
            raw = whole.reshape(-1).view(torch.uint8).numpy()
            tensor_slice = slices.get(name, TensorSlice(tuple(tensor.shape)))
            part = tensor_of(RawTensor(dtype_name(whole), tuple(whole.shape), raw), tensor_slice)
            tensor.copy_(part.view(tensor.shape))


def _problem(text: str, advice: str = "") -> SpecError:
    return SpecError(Problem(("initial_weights",), text, advice))


def _local_path(path: str, folder: Path, limit_s: float) -> Path:
    """Return the path of the file or directory; downloads a URL's weights into `folder`."""
    if not is_url(path):
        local = Path(path).expanduser()
        if not local.exists():
            near = nearest(local.name, [entry.name for entry in local.parent.glob("*")])
            advice = f"did you mean {near!r}? " if near else ""
            where = "" if local.is_absolute() else f", looked for in {Path.cwd()}"
            text = f"there is no {local}{where}"
            raise _problem(text, f"{advice}every worker reads it, on its own node")
        return local
    for text, advice in (url_problem(path), missing_library(path)):
        if text:
            raise _problem(text, advice)
    base, _, last = path.rstrip("/").rpartition("/")
    if last.endswith(_SUFFIXES):
        return _download(RemoteStorage(base, limit_s), last, folder)
    storage = RemoteStorage(path, limit_s)
    for name in storage.with_retries(lambda: storage.names("")):
        if name in _FILES or name.endswith((_SAFETENSORS, ".bin")):
            _download(storage, name, folder)
    return folder


def _download(storage: RemoteStorage, name: str, folder: Path) -> Path:
    try:
        size = storage.with_retries(lambda: storage.size(name))
    except ObjectNotFound:
        raise _problem(f"there is no {storage.url}/{name}") from None
    with (folder / name).open("xb") as file:
        for start in range(0, size, PART_BYTES):
            stop = min(start + PART_BYTES, size)
            file.write(storage.with_retries(partial(storage.read, name, start, stop)))
    return folder / name


def _read(path: Path) -> dict[str, Tensor]:
    """Load a file, or all files of a directory."""
    if not path.is_dir():
        return _read_file(path)
    name = next((name for name in _FILES if (path / name).is_file()), None)
    if name is None:
        raise _problem(f"{path} has none of {', '.join(_FILES)}", "specify the file itself")
    if not name.endswith(".json"):
        return _read_file(path / name)
    weights: dict[str, Tensor] = {}
    for shard in _shard_names(path / name):
        if Path(shard).name != shard or not (path / shard).is_file():
            raise _problem(f"{path / name} names {shard!r}, which is not a file of this directory")
        weights |= _read_file(path / shard)
    return weights


def _shard_names(index: Path) -> list[str]:
    if index.stat().st_size > _INDEX_BYTES:
        raise _problem(f"{index} has more than {_INDEX_BYTES} bytes")
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({str(name) for name in files})
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise _problem(f"{index} is not an index of shards: {error!r}") from None


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise _problem(f"{path} is not a regular file")  # reading a pipe or device may never end
    try:
        if path.suffix == _SAFETENSORS:
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = f"{path} has objects other than tensors, numbers and names: {_reason(error)}"
        advice = "save the state dict alone: torch.save(model.state_dict(), path)"
        raise _problem(text, advice) from None
    except Exception as error:  # torch raises arbitrary exceptions for damaged files
        raise _problem(f"{path} cannot be read: {_reason(error)}") from None
    return _state_dict(content, path)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), "")
    return (reason or (lines[0] if lines else type(error).__name__))[:300]


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file's content; in a training checkpoint, the model's."""
    if isinstance(content, Mapping):
        for key in _WITHIN:
            if isinstance(content.get(key), Mapping):
                return _state_dict(content[key], path)
        tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if tensors and all(isinstance(name, str) for name in tensors):
            return tensors
    found = "nothing" if content is None else f"a {type(content).__name__}"
    text = f"{path} holds {found}, not tensors by name"
    raise _problem(text, "save model.state_dict()")


def _strip_wrapper_names(
    weights: Mapping[str, Tensor], model: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Remove prefixes of wrappers: `module.` of DDP, `_orig_mod.` of torch.compile."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        new = name
        if name not in model:
            new = name.replace("_orig_mod.", "")
            if new not in model and new.startswith("module."):
                new = new.removeprefix("module.")
        if new in renamed:
            raise _problem(f"two names of the file are {new!r} without `module.` and `_orig_mod.`")
        renamed[new] = tensor
    return renamed


def _check_tensors(
    weights: Mapping[str, Tensor], model: Mapping[str, Tensor], wanted: InitialWeights
) -> None:
    """Check shapes and number types: weights that are integers are of a quantized model."""
    mismatches = [
        f"{name!r} is {_type_of(weights[name])} there, {_type_of(model[name])} in the model"
        for name in sorted(weights.keys() & model.keys())
        if _type_of(weights[name]) != _type_of(model[name])
    ]
    if mismatches:
        raise _problem(f"{_paths(wanted)} is of another model: {_format_lines(mismatches)}")
    _check_shared(weights, model, wanted)


def _type_of(tensor: Tensor) -> str:
    """Return the number type and shape that must match; floats may have any precision."""
    number = "" if tensor.is_floating_point() else "whole numbers "
    return f"{'complex ' if tensor.is_complex() else number}{[*tensor.shape]}"


def _check_names(
    missing: Sequence[str], unexpected: Sequence[str], names: Set[str], wanted: InitialWeights
) -> None:
    """Check that file and model have the same names; with `strict: false`, warn."""
    if not missing and not unexpected:
        return
    lines = [f"no {name!r} in the file{_similar(name, unexpected)}" for name in missing]
    lines += [f"no {name!r} in the model" for name in unexpected]
    text = f"{_paths(wanted)}: {_format_lines(lines, of=len(missing))}"
    if names <= {*unexpected}:
        advice = _prefix_advice(unexpected, missing)
        raise _problem(text, advice or "the file has none of the model's names")
    if wanted.strict:
        advice = _prefix_advice(unexpected, missing)
        raise _problem(text, advice or "`strict: false` loads the names that both have")
    logger.warning("initial_weights: %s", text)


def _check_shared(
    weights: Mapping[str, Tensor], model: Mapping[str, Tensor], wanted: InitialWeights
) -> None:
    """Check that all names of a tied tensor, such as an embedding, have the same values."""
    for names in _tied_names(model):
        present = [name for name in names if name in weights]
        for name in present[1:]:
            if not torch.equal(weights[present[0]], weights[name]):
                text = (
                    f"{present[0]!r} and {name!r} are one tensor of the model, with two values in"
                )
                raise _problem(f"{text} {_paths(wanted)}", "the file's model does not tie them")


def _tied_names(model: Mapping[str, Tensor]) -> Iterator[list[str]]:
    names_by_id: dict[int, list[str]] = {}
    for name, tensor in model.items():
        names_by_id.setdefault(id(tensor), []).append(name)
    return (names for names in names_by_id.values() if len(names) > 1)


def _without_tied(missing: Sequence[str], model: Mapping[str, Tensor]) -> list[str]:
    """Return missing names without those of tensors that the file has under another name."""
    present = {id(tensor) for name, tensor in model.items() if name not in missing}
    return [name for name in missing if name not in model or id(model[name]) not in present]


def _similar(name: str, unexpected: Iterable[str]) -> str:
    near = nearest(name, unexpected)
    return f", but {near!r}" if near else ""


def _prefix_advice(unexpected: Sequence[str], missing: Sequence[str]) -> str:
    """Return a hint that one side's names have a prefix; empty: no common prefix."""
    for longer, shorter, text in (
        (unexpected, missing, "names of the file begin with {!r}: save them without it"),
        (missing, unexpected, "names of the model begin with {!r}, those of the file do not"),
    ):
        if not shorter or not longer:
            continue
        ends = [name for name in longer if name.endswith("." + shorter[0])]
        prefix = ends[0].removesuffix(shorter[0]) if ends else ""
        if prefix and all(prefix + name in longer for name in shorter):
            return text.format(prefix)
    return ""


def _format_lines(lines: Sequence[str], of: int = 0) -> str:
    """Join some lines of each of two kinds: the first `of` lines, and the rest."""
    shown = [*lines[: min(of, _SHOWN)], *lines[of : of + _SHOWN]] if of else [*lines[:_SHOWN]]
    return "; ".join(shown) + (f"; and {len(lines) - len(shown)} more" * (len(lines) > len(shown)))
