"""
Find generators of random numbers that a data set holds itself.

Seeding the global generators does not reach them. What they give depends on who read which samples
before: on the number of workers, of loader processes (each has a copy), on restarts.
"""

import functools
import random
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

_KINDS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_DEPTH = 8
"""Steps from the data set: a wrapper, its data, a list of transforms, a transform, ..."""
_WIDTH = 64
"""Entries of a container that are looked at: the samples themselves are many."""
_OBJECTS = 10_000
_READS = ("__getitem__", "__getitems__", "__call__", "forward")
"""Methods that may run while a sample is read."""
_PLAIN = (str, bytes, int, float, complex, type(None), torch.Tensor, np.ndarray, types.ModuleType)


def held_generators(data: Dataset[Any]) -> list[str]:
    """
    Name the places of generators that a data set holds, as seen from it.

    Looked through are attributes, slots, containers, closures, and the module's variables that
    reading a sample uses; not local variables.

    Args:
        data: the data set.

    Returns:
        Names such as `self.data.transform.transforms[0].rng`.
    """
    seen: set[int] = {id(one) for one in _global()}
    found = []
    left: list[tuple[str, Any, int]] = [("self", data, 0)]
    while left and len(seen) < _OBJECTS:
        name, value, depth = left.pop(0)
        if id(value) in seen or isinstance(value, _PLAIN):
            continue
        seen.add(id(value))
        if isinstance(value, _KINDS):
            found.append(name)
        elif depth < _DEPTH:
            left += [(f"{name}{path}", one, depth + 1) for path, one in _inside(value)]
    return found


def warning_of(data: Dataset[Any], what: str) -> str | None:
    """
    Say which generators a data set holds and what to do; None: it holds none.

    Args:
        data: the data set.
        what: the method of the task that gave it.
    """
    names = held_generators(data)
    if not names:
        return None
    holds = f"{what}(): {type(data).__name__} holds a random generator of its own, "
    return (
        holds + ", ".join(names) + ". If it is drawn from while samples are read, what they "
        "get depends on the number of workers and loaders: draw from torch, numpy or random there, "
        "or from distplat.sample_rng() (docs/random_numbers.md)"
    )


def _global() -> tuple[Any, ...]:
    """Give the generators that are seeded for each sample."""
    return random._inst, np.random.mtrand._rand, torch.default_generator


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """Give what an object holds, and how it is reached."""
    if isinstance(value, type):
        return
    yield from _of_container(value)
    if isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
        value = value.__func__
    if isinstance(value, types.FunctionType):
        yield from _of_function(value)
    if isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    for name, one in list(getattr(value, "__dict__", {}).items()):
        yield f".{name}", one
    yield from _of_class(value)


def _of_container(value: Any) -> Iterator[tuple[str, Any]]:
    """Give the first entries; other mappings may make theirs when they are asked for them."""
    if isinstance(value, dict):
        for key in list(value)[:_WIDTH]:
            yield f"[{key!r}]", value[key]
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value[:_WIDTH]):
            yield f"[{number}]", one


def _of_class(value: Any) -> Iterator[tuple[str, Any]]:
    """Give slots, generators that a class has for all, and what its reading methods use."""
    for kind in type(value).__mro__:
        if kind.__module__.partition(".")[0] in ("builtins", "torch", "numpy"):
            continue
        for name, one in vars(kind).items():
            if isinstance(one, types.MemberDescriptorType):
                if hasattr(value, name):
                    yield f".{name}", getattr(value, name)
            elif isinstance(one, _KINDS):
                yield f".{name}", one
            elif name in _READS and isinstance(one, types.FunctionType):
                yield from _of_function(one)


def _of_function(value: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Give what a function closes over, and generators among the module's variables it names."""
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        try:
            yield f".<{name}>", cell.cell_contents
        except ValueError:  # not filled yet
            continue
    for name in value.__code__.co_names:
        one = value.__globals__.get(name)
        if isinstance(one, _KINDS):
            yield f".<{value.__module__}.{name}>", one
