"""
Weights to begin from: a file of somebody else's training, read before the first step.

    model.pt  model.safetensors  a directory or URL with one of them, whole or in shards
        │  names and tensors only: no code of a stranger's file runs
        ▼
    names compared with the model's, `module.` and `_orig_mod.` left out
        ▼
    the whole model, before it is cut; where none has values (`init: meta`), each rank's part
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
"""What a directory may hold, the first that is there: Hugging Face's names, and a run's own."""
_SAFETENSORS = ".safetensors"
_SUFFIXES = (_SAFETENSORS, ".pt", ".pth", ".bin", ".ckpt")
_WITHIN = ("state_dict", "model_state_dict", "model", "module")
"""Where a file that has more than a state dict keeps it."""
_SHOWN = 5
_INDEX_BYTES = 64 * 2**20
"""The largest index that is read: half a million tensors."""


def initial_weights(job: Job, model: nn.Module, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Fill a model with the weights that its job names.

    Args:
        job: names some.
        model: whole, on the CPU; or without values, and then it stays so.
        extra: what the task trains beside it, by name.

    Returns:
        The weights by the model's names, on the CPU.

    Raises:
        SpecError: there are none, they cannot be read, or they are of another model.
    """
    wanted = job.initial_weights
    assert wanted is not None, "asked for only where the job names some"
    with tempfile.TemporaryDirectory(prefix="distplat-weights-") as folder:
        weights = _together(wanted, Path(folder), job.failure.storage_timeout_s)
        weights = {name: one for name, one in weights.items() if not name.startswith(EMA_PREFIX)}
        state = {**model.state_dict(keep_vars=True), **extra}
        own = {name: one for name, one in state.items() if isinstance(one, Tensor)}
        weights = _renamed(weights, own)
        _check_tensors(weights, own, wanted)
        missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        if not any(one.is_meta for one in own.values()):
            missing, unknown = _filled(model, extra, weights)
        _check_names(_but_for_tied(missing, own), unknown, {*weights}, wanted)
        return {name: one.clone() for name, one in weights.items() if name in own}


def _filled(
    model: nn.Module, extra: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> tuple[list[str], list[str]]:
    """Fill a model as torch does, whose modules may know older names; give what one side lacks."""
    try:
        left = model.load_state_dict({k: v for k, v in weights.items() if k not in extra}, False)
    except RuntimeError as error:
        raise _problem(f"they are of another model: {_reason(error)}") from None
    for name in extra.keys() & weights.keys():
        extra[name].data.copy_(weights[name])
    missing = [*left.missing_keys, *(extra.keys() - weights.keys())]
    return sorted(missing), sorted(left.unexpected_keys)


def _together(wanted: InitialWeights, folder: Path, limit_s: float) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for number, path in enumerate(wanted.path):
        target = folder / str(number)
        target.mkdir()
        weights |= _read(_on_disk(path, target, limit_s))
    return weights


def _said(wanted: InitialWeights) -> str:
    return " and ".join(wanted.path)


def fill_part(
    flat: FlatModel, weights: Mapping[str, Tensor], slices: Mapping[str, TensorSlice]
) -> None:
    """
    Fill a part of a model, in place.

    Args:
        flat: the part.
        weights: of the whole, by name.
        slices: where a tensor of the part lies in the whole one, for those that are slabs.
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


def _on_disk(path: str, folder: Path, limit_s: float) -> Path:
    """Give the file or directory; of a URL a copy of what is read there."""
    if not is_url(path):
        local = Path(path).expanduser()
        if not local.exists():
            near = nearest(local.name, [one.name for one in local.parent.glob("*")])
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
        return _copied(RemoteStorage(base, limit_s), last, folder)
    storage = RemoteStorage(path, limit_s)
    there = storage.with_retries(lambda: storage.names(""))
    for name in there:
        if name in _FILES or name.endswith((_SAFETENSORS, ".bin")):
            _copied(storage, name, folder)
    return folder


def _copied(storage: RemoteStorage, name: str, folder: Path) -> Path:
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
    """Read a file, or those of a directory."""
    if not path.is_dir():
        return _read_file(path)
    name = next((name for name in _FILES if (path / name).is_file()), None)
    if name is None:
        raise _problem(f"{path} has none of {', '.join(_FILES)}", "give the file itself")
    if not name.endswith(".json"):
        return _read_file(path / name)
    weights: dict[str, Tensor] = {}
    for shard in _shards(path / name):
        if Path(shard).name != shard or not (path / shard).is_file():
            raise _problem(f"{path / name} names {shard!r}, which is not there")
        weights |= _read_file(path / shard)
    return weights


def _shards(index: Path) -> list[str]:
    if index.stat().st_size > _INDEX_BYTES:
        raise _problem(f"{index} has more than {_INDEX_BYTES} bytes")
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({str(name) for name in named})
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise _problem(f"{index} is no index of shards: {error!r}") from None


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise _problem(f"{path} is no regular file")  # a pipe would block, a device never end
    try:
        if path.suffix == _SAFETENSORS:
            return load_file(path)
        given = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = f"{path} has more than tensors, numbers and names: {_reason(error)}"
        advice = "save the state dict alone: torch.save(model.state_dict(), path)"
        raise _problem(text, advice) from None
    except (
        Exception
    ) as error:  # torch's readers raise whatever a damaged file makes them stumble at
        raise _problem(f"{path} cannot be read: {_reason(error)}") from None
    return _state_dict(given, path)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), "")
    return (reason or (lines[0] if lines else type(error).__name__))[:300]


def _state_dict(given: Any, path: Path) -> dict[str, Tensor]:
    """Give the tensors of what a file holds: of a training's checkpoint, the model's."""
    if isinstance(given, Mapping):
        for name in _WITHIN:
            if isinstance(given.get(name), Mapping):
                return _state_dict(given[name], path)
        tensors = {name: one for name, one in given.items() if isinstance(one, Tensor)}
        if tensors and all(isinstance(name, str) for name in tensors):
            return tensors
    kind = "nothing" if given is None else f"a {type(given).__name__}"
    text = f"{path} holds {kind}, not tensors by name"
    raise _problem(text, "save model.state_dict()")


def _renamed(weights: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what wrappers put before names: `module.` of DDP, `_orig_mod.` of torch.compile."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        new = name
        if name not in mine:
            new = name.replace("_orig_mod.", "")
            if new not in mine and new.startswith("module."):
                new = new.removeprefix("module.")
        if new in renamed:
            raise _problem(f"two of its names are {new!r} without `module.` and `_orig_mod.`")
        renamed[new] = tensor
    return renamed


def _check_tensors(
    weights: Mapping[str, Tensor], mine: Mapping[str, Tensor], wanted: InitialWeights
) -> None:
    """Compare shapes and kinds: whole numbers for weights are those of a quantized model."""
    there = sorted(weights.keys() & mine.keys())
    others = [
        f"{name!r} is {_kind(weights[name])} there, {_kind(mine[name])} in the model"
        for name in there
        if _kind(weights[name]) != _kind(mine[name])
    ]
    if others:
        raise _problem(f"{_said(wanted)} is of another model: {_listed(others)}")
    _check_shared(weights, mine, wanted)


def _kind(tensor: Tensor) -> str:
    """Say what must be alike; a float may have any number of bits."""
    number = "" if tensor.is_floating_point() else "whole numbers "
    return f"{'complex ' if tensor.is_complex() else number}{[*tensor.shape]}"


def _check_names(
    missing: Sequence[str], unknown: Sequence[str], names: Set[str], wanted: InitialWeights
) -> None:
    """Say what one side lacks."""
    if not missing and not unknown:
        return
    lines = [f"no {name!r} in the file{_near(name, unknown)}" for name in missing]
    lines += [f"no {name!r} in the model" for name in unknown]
    text = f"{_said(wanted)}: {_listed(lines, of=len(missing))}"
    if names <= {*unknown}:
        raise _problem(text, _prefix(unknown, missing) or "it has none of the model's names")
    if wanted.strict:
        advice = _prefix(unknown, missing)
        raise _problem(text, advice or "`strict: false` takes what there is of both")
    logger.warning("initial_weights: %s", text)


def _check_shared(
    weights: Mapping[str, Tensor], mine: Mapping[str, Tensor], wanted: InitialWeights
) -> None:
    """See that names of one tensor, such as tied embeddings, have one value."""
    for names in _shared(mine):
        there = [name for name in names if name in weights]
        for name in there[1:]:
            if not torch.equal(weights[there[0]], weights[name]):
                text = f"{there[0]!r} and {name!r} are one tensor of the model, and two values in"
                raise _problem(
                    f"{text} {_said(wanted)}", "the file is of a model that ties them not"
                )


def _shared(mine: Mapping[str, Tensor]) -> Iterator[list[str]]:
    names_by_id: dict[int, list[str]] = {}
    for name, tensor in mine.items():
        names_by_id.setdefault(id(tensor), []).append(name)
    return (names for names in names_by_id.values() if len(names) > 1)


def _but_for_tied(missing: Sequence[str], mine: Mapping[str, Tensor]) -> list[str]:
    """Leave out the names of tensors that the file has by another name."""
    known = {id(tensor) for name, tensor in mine.items() if name not in missing}
    return [name for name in missing if name not in mine or id(mine[name]) not in known]


def _near(name: str, unknown: Iterable[str]) -> str:
    near = nearest(name, unknown)
    return f", but {near!r}" if near else ""


def _prefix(unknown: Sequence[str], missing: Sequence[str]) -> str:
    """Say what stands before all names of the one and not of the other; empty: nothing."""
    for longer, shorter, text in (
        (unknown, missing, "names of the file begin with {!r}: save it without"),
        (missing, unknown, "names of the model begin with {!r}, those of the file do not"),
    ):
        if not shorter or not longer:
            continue
        ends = [name for name in longer if name.endswith("." + shorter[0])]
        before = ends[0].removesuffix(shorter[0]) if ends else ""
        if before and all(before + name in longer for name in shorter):
            return text.format(before)
    return ""


def _listed(lines: Sequence[str], of: int = 0) -> str:
    """Give some lines of each kind, the first `of` of one and the rest of the other."""
    shown = [*lines[: min(of, _SHOWN)], *lines[of : of + _SHOWN]] if of else [*lines[:_SHOWN]]
    return "; ".join(shown) + (f"; and {len(lines) - len(shown)} more" * (len(lines) > len(shown)))
