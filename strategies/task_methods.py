"""
Methods of a task that nobody calls: names of other libraries' hooks, and near misses of ours.

    class Bert(Task):
        def collate_fn(self, samples): ...    # PyTorch Lightning's and the DataLoader's, not ours
        def metric(self, outputs, targets): ...    # did you mean metrics()?

A helper of the user's own is silent: one with any other name, and one that the class itself uses.
Here, too, is found whether a class says how its loss is made, and says it once, and whether its
methods can be called: `check_methods`.
This module needs no torch, and looks at a class only: the driver can ask it.
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

_MODEL = "build the module in model(), and what it computes in the module's own forward()"
_CALL = "write forward(model, batch), which calls the model; loss() gets what it gives"
_DATA = "give a data set in train_data(); batches are made of it by the job file's `data`"
_EVAL = "give a data set in eval_data(), and figures in metrics(outputs, targets)"
_LOSS = "write loss(outputs, targets); the step around it is distplat's"
_STEP = "write step(model, batch), which gives the loss; backward and update are distplat's"
_SAMPLER = "write sampler(data, epoch), which gives numbers of samples or a sampler of torch"
_COLLATE = "write collate(samples), which sees the samples of a micro-batch and gives the batch"
_OPTIMIZER = "name it in the job file's `optimizer`, or write optimizer(named_parameters)"
_SCHEDULE = "name it in the job file's `lr_schedule`, or write lr(step, total)"
_CLIP = "give the job file's `clip_norm`"
_ARGUMENTS = "it gets what model() gave, and a batch; what the module computes is its own forward()"
_ELSE = "call anything else by another name"
_TAKES = {
    "forward": ("model, batch", _ARGUMENTS),
    "step": ("model, batch", _ARGUMENTS),
    "lr": ("step, total", f"it gives the factor of `lr` in a step; {_ELSE}"),
    "weights": ("batch", f"it gives the weights of the loss's terms; {_ELSE}"),
    "optimizer": ("named_parameters", f"it makes the optimizer; {_ELSE}"),
}
"""Methods whose arguments are looked at: what these are."""
_BESIDE_STEP = "call it in step(model, batch), or write loss(outputs, targets) instead of step()"
_EVENTS = "write it in a distplat.Callback, and hand that to `Trainer(..., callbacks=[...])`"
_INSTEAD = {
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
"""By what to write instead: hooks of Lightning, of Hugging Face's Trainer and of Keras."""
_REMEDY = {name: remedy for remedy, names in _INSTEAD.items() for name in names.split()}
_NEAR = 0.8
"""`metric` and `train_dat` are near; `loss_weight` and `model_name` are not."""
_LONGER = 3
"""Letters by which a near miss may differ in length: `train_data_path` is a helper."""


def hook_names() -> list[str]:
    """Give the names of a task's own hooks."""
    return [name for name in vars(Task) if not name.startswith("_")]


def uncalled_hooks(kind: type[Task]) -> list[str]:
    """
    Find methods that look like hooks and that nobody calls.

    Returns:
        A sentence for each: where it is, and what to write instead.

    Raises:
        SpecError: see `check_methods`.
    """
    check_methods(kind)
    used = {name for _, member in _members(kind) for name in referenced_names(member)}
    sentences = []
    for name, member in _members(kind):
        instead = _BESIDE_STEP if name == "forward" and overrides(kind, "step") else _instead(name)
        if name not in used and instead:
            location = source_location(member)
            sentences.append(f"{location}{kind.__name__}.{name}() is never called: {instead}")
    return sentences


def check_methods(kind: type[Task]) -> None:
    """
    See that a class has one of `loss` and `step`, and that methods take what they are given.

    Raises:
        SpecError: it has none or both, or one of them takes something else.
    """
    problems = [
        _problem(kind, name, f"{name}() must take ({arguments})", hint)
        for name, (arguments, hint) in _TAKES.items()
        if overrides(kind, name) and not _takes(kind, name, arguments.count(",") + 1)
    ]
    loss, step = overrides(kind, "loss"), overrides(kind, "step")
    if not loss and not step:
        problems.append(_no_loss(kind))
    if loss and step:
        hint = "step() is the general form: keep it, and call what was loss() by another name"
        problems.append(_problem(kind, "step", "step() and loss() both give the loss", hint))
    if problems:
        raise SpecError(*problems)


def _no_loss(kind: type[Task]) -> Problem:
    """Say that a class does not say what its loss is."""
    hint = "write loss(outputs, targets), or step(model, batch) for all of a batch"
    for name, _ in _members(kind):
        if near_miss(name, {"loss", "step"}):
            hint = f"did you mean {name}() to be it?"
        elif _REMEDY.get(name) in (_LOSS, _STEP):
            hint = f"{name}() is never called: {_REMEDY[name]}"
    return Problem(("task",), f"{kind.__name__} has no loss() and no step()", hint)


def _problem(kind: type[Task], method: str, what: str, hint: str) -> Problem:
    location = source_location(inspect.unwrap(getattr(kind, method)))
    return Problem(("task",), f"{location}{kind.__name__}: {what}", hint)


def _takes(kind: type[Task], method: str, count: int) -> bool:
    """Say whether a method can be called with so many arguments."""
    bound = isinstance(inspect.getattr_static(kind, method), staticmethod | classmethod)
    try:
        inspect.signature(getattr(kind, method)).bind(*[None] * (count if bound else count + 1))
    except TypeError:
        return False
    except ValueError:  # written in C
        return True
    return True


def near_miss(name: str, missing: set[str]) -> str | None:
    """Give the hook that a method was probably meant to be, of these; None: none."""
    near = [hook for hook in get_close_matches(name, sorted(missing), 3, _NEAR) if hook != name]
    return next((hook for hook in near if abs(len(hook) - len(name)) <= _LONGER), None)


def _instead(name: str) -> str:
    """Say what to write instead of a method; empty: it looks like no hook."""
    if name.startswith("_") or name in hook_names():
        return ""
    meant = near_miss(name, set(hook_names()))
    known = _REMEDY.get(name, "")
    if meant is not None:
        return f"did you mean {meant}()?" + (f" {known[0].upper()}{known[1:]}" if known else "")
    return known


def _members(kind: type[Task]) -> Iterator[tuple[str, Callable[..., object]]]:
    """Give the methods of a class and of its own bases, public ones and others, once each."""
    seen: set[str] = set()
    for one in kind.__mro__:
        if one in (Task, ABC, object):
            continue
        for name, value in vars(one).items():
            inner = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            inner = inner.fget if isinstance(inner, property) else inner
            if name not in seen and callable(inner) and not isinstance(inner, type):
                seen.add(name)
                yield name, inner


def referenced_names(member: Callable[..., object]) -> set[str]:
    """Give the attributes and globals that a function names, itself and within."""
    code = getattr(inspect.unwrap(member), "__code__", None)
    names: set[str] = set()
    left = [code] if code is not None else []
    while left:
        one = left.pop()
        names.update(one.co_names)
        left += [const for const in one.co_consts if isinstance(const, CodeType)]
    return names


def source_location(member: Callable[..., object]) -> str:
    """Give file and line of a function, `task.py:12: `; empty where they are not known."""
    code = getattr(inspect.unwrap(member), "__code__", None)
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}: " if code else ""
