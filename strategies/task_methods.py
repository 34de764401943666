"""
Check a task's methods: near misses of its hooks, and hooks of other libraries.

    class Bert(Task):
        def collate_fn(self, samples): ...    # a name of PyTorch Lightning and DataLoader
        def metric(self, outputs, targets): ...    # did you mean metrics()?

Methods with any other name, and methods that the class itself calls, are helpers and are not
reported. `check_methods` also checks that a class defines exactly one of `loss` and `step`, and
that its hooks accept their arguments.

The checks only inspect the class and do not import torch.
"""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from types import CodeType

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.task import Task, overrides

_MODEL = "build the module in model(), and write its computation in the module's forward()"
_CALL = "write forward(model, batch), which calls the model; loss() gets its return value"
_DATA = "return a data set from train_data(); the job file's `data` says how it is batched"
_EVAL = "return a data set from eval_data(), and metrics from metrics(outputs, targets)"
_LOSS = "write loss(outputs, targets); the step around it is distplat's"
_STEP = "write step(model, batch), which returns the loss; backward and update are distplat's"
_SAMPLER = "write sampler(data, epoch), which returns sample indices or a sampler of torch"
_COLLATE = "write collate(samples), which gets a micro-batch's samples and returns the batch"
_OPTIMIZER = "name it in the job file's `optimizer`, or write optimizer(named_parameters)"
_SCHEDULE = "name it in the job file's `lr_schedule`, or write lr(step, total)"
_CLIP = "set the job file's `clip_norm`"
_ARGUMENTS = "its arguments are the return value of model() and a batch"
_RENAME_HINT = "rename a method with another purpose"
_HOOK_ARGUMENTS = {
    "forward": ("model, batch", _ARGUMENTS),
    "step": ("model, batch", _ARGUMENTS),
    "lr": ("step, total", f"it returns the factor of `lr` in a step; {_RENAME_HINT}"),
    "weights": ("batch", f"it returns the weights of the loss's terms; {_RENAME_HINT}"),
    "optimizer": ("named_parameters", f"it builds the optimizer; {_RENAME_HINT}"),
}
"""Hooks whose signature is checked: their arguments and a hint."""
_BESIDE_STEP = "call it in step(model, batch), or write loss(outputs, targets) instead of step()"
_EVENTS = "write it in a distplat.Callback, and hand that to `Trainer(..., callbacks=[...])`"
_FOREIGN_HOOKS = {
    _COLLATE: "collate_fn data_collator get_collate_fn",
    _SAMPLER: "train_sampler get_train_sampler get_sampler batch_sampler",
    _LOSS: "loss_fn loss_function criterion get_loss backward",
    _STEP: "training_step train_step compute_loss",
    _CALL: "call forward_step",
    _OPTIMIZER: """
        configure_optimizers create_optimizer get_optimizer make_optimizer
        optimizers optimizer_step optimizer_zero_grad
    """,
    _SCHEDULE: """
        create_scheduler lr_scheduler lr_scheduler_step configure_schedulers
        create_optimizer_and_scheduler get_scheduler
    """,
    _CLIP: "clip_gradients configure_gradient_clipping",
    _MODEL: """
        build_model create_model make_model get_model model_init configure_model predict_step
    """,
    _DATA: """
        train_dataloader get_train_dataloader train_loader training_dataset
        train_dataset get_train_dataset train_set prepare_data
    """,
    _EVAL: """
        validation_step test_step eval_step prediction_step compute_metrics
        val_dataloader eval_dataloader test_dataloader get_eval_dataloader val_data
        valid_data validation_data test_data val_dataset eval_dataset validation_dataset
        test_dataset validation_epoch_end get_metrics configure_metrics
    """,
    _EVENTS: """
        training_epoch_end configure_callbacks on_train_start on_train_end on_fit_start
        on_fit_end on_train_epoch_start on_train_epoch_end on_train_batch_start
        on_train_batch_end on_validation_epoch_end on_epoch_begin on_validation_start
        on_validation_end on_before_optimizer_step on_epoch_end on_step_end
        on_save_checkpoint on_load_checkpoint on_train_begin
    """,
}
"""Hooks of Lightning, Hugging Face's Trainer and Keras, by the hint that replaces them."""
_HINTS = {name: remedy for remedy, names in _FOREIGN_HOOKS.items() for name in names.split()}
_MIN_SIMILARITY = 0.8
"""
Minimum similarity: `metric` and `train_dat` are near misses, `loss_weight` and `model_name` not.
"""
_MAX_LENGTH_DIFFERENCE = 3
"""Maximum difference in length of a near miss: `train_data_path` is a helper."""


def hook_names() -> list[str]:
    """Return the names of `Task`'s public methods."""
    return [name for name in vars(Task) if not name.startswith("_")]


def uncalled_hooks(cls: type[Task]) -> list[str]:
    """
    Return a message for each method that looks like a hook and is never called.

    Returns:
        Messages with file and line of the method, and the method to write instead.

    Raises:
        SpecError: see `check_methods`.
    """
    check_methods(cls)
    used = {name for _, member in _members(cls) for name in referenced_names(member)}
    messages = []
    for name, member in _members(cls):
        hint = _BESIDE_STEP if name == "forward" and overrides(cls, "step") else _hint_for(name)
        if name not in used and hint:
            location = source_location(member)
            messages.append(f"{location}{cls.__name__}.{name}() is never called: {hint}")
    return messages


def check_methods(cls: type[Task]) -> None:
    """
    Check that a class defines one of `loss` and `step`, and that its hooks accept their arguments.

    Raises:
        SpecError: The class defines neither or both, or a hook has another signature.
    """
    problems = [
        _problem(cls, name, f"{name}() must take ({arguments})", hint)
        for name, (arguments, hint) in _HOOK_ARGUMENTS.items()
        if overrides(cls, name) and not _accepts(cls, name, arguments.count(",") + 1)
    ]
    loss, step = overrides(cls, "loss"), overrides(cls, "step")
    if not loss and not step:
        problems.append(_no_loss(cls))
    if loss and step:
        hint = "step() is the general form: keep it, and rename loss()"
        problems.append(_problem(cls, "step", "step() and loss() both define the loss", hint))
    if problems:
        raise SpecError(*problems)


def _no_loss(cls: type[Task]) -> Problem:
    """Return the problem of a class without a loss, with the most likely reason as its hint."""
    hint = "write loss(outputs, targets), or step(model, batch) for all of a batch"
    for name, _ in _members(cls):
        if near_miss(name, {"loss", "step"}):
            hint = f"did you mean {name}()?"
        elif _HINTS.get(name) in (_LOSS, _STEP):
            hint = f"{name}() is never called: {_HINTS[name]}"
    return Problem(("task",), f"{cls.__name__} has no loss() and no step()", hint)


def _problem(cls: type[Task], method: str, what: str, hint: str) -> Problem:
    location = source_location(inspect.unwrap(getattr(cls, method)))
    return Problem(("task",), f"{location}{cls.__name__}: {what}", hint)


def _accepts(cls: type[Task], method: str, count: int) -> bool:
    """Return whether a method can be called with `count` arguments."""
    bound = isinstance(inspect.getattr_static(cls, method), staticmethod | classmethod)
    try:
        inspect.signature(getattr(cls, method)).bind(*[None] * (count if bound else count + 1))
    except TypeError:
        return False
    except ValueError:  # written in C
        return True
    return True


def near_miss(name: str, missing: set[str]) -> str | None:
    """Return the hook among `missing` that a name most likely means; None: no similar hook."""
    near = [
        hook
        for hook in get_close_matches(name, sorted(missing), 3, _MIN_SIMILARITY)
        if hook != name
    ]
    return next(
        (hook for hook in near if abs(len(hook) - len(name)) <= _MAX_LENGTH_DIFFERENCE), None
    )


def _hint_for(name: str) -> str:
    """Return the hint for a method that is never called; empty: the name is not like a hook's."""
    if name.startswith("_") or name in hook_names():
        return ""
    similar = near_miss(name, set(hook_names()))
    hint = _HINTS.get(name, "")
    if similar is not None:
        return f"did you mean {similar}()?" + (f" {hint[0].upper()}{hint[1:]}" if hint else "")
    return hint


def _members(cls: type[Task]) -> Iterator[tuple[str, Callable[..., object]]]:
    """Yield the methods of a class and of its bases below `Task`, each name once."""
    seen: set[str] = set()
    for base in cls.__mro__:
        if base in (Task, ABC, object):
            continue
        for name, value in vars(base).items():
            function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            function = function.fget if isinstance(function, property) else function
            if name not in seen and callable(function) and not isinstance(function, type):
                seen.add(name)
                yield name, function


def referenced_names(member: Callable[..., object]) -> set[str]:
    """Return the attributes and globals that a function refers to, nested functions included."""
    code = getattr(inspect.unwrap(member), "__code__", None)
    names: set[str] = set()
    pending = [code] if code is not None else []
    while pending:
        code = pending.pop()
        names.update(code.co_names)
        pending += [const for const in code.co_consts if isinstance(const, CodeType)]
    return names


def source_location(member: Callable[..., object]) -> str:
    """Return file and line of a function, such as `task.py:12: `; empty if unknown."""
    code = getattr(inspect.unwrap(member), "__code__", None)
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}: " if code else ""
