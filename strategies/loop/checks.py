"""
Checks of the objects that user code returns, so that mistakes fail early with a clear message.

    model()              a module with initialized parameters, whose state can be saved and sent
    train_data(), ...    a map-style data set with a length, or a stream
    loss()               a scalar that requires grad
    metrics()            a mapping of names to numbers

A mistake in user code is a `ValueError`, which a worker reports as a failure of the user code (exit
code 1). Data and state that the job does not support are a `SpecError` (exit code 2).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset

from distplat.platform.errors import Problem, SpecError
from distplat.platform.evaluations import metric_fields, period_problems
from distplat.platform.sampler import ENDLESS, Sampler
from distplat.platform.spec import Job
from distplat.platform.tensor_slices import ITEM_BYTES
from distplat.strategies.collective import SENDABLE
from distplat.strategies.loop.containers import items_in, tensors_in
from distplat.strategies.loop.streams import StreamSamples, StreamSeeds, is_ray_data, is_stream
from distplat.strategies.model.module_hooks import unwrap
from distplat.strategies.model.parameter_layout import dtype_name
from distplat.strategies.task import Task, overrides
from distplat.strategies.task_methods import source_location

logger = logging.getLogger(__name__)

_REAL = "keep it as real numbers: torch.view_as_real(...), and torch.view_as_complex in forward()"
_MAX_NAMES = 6
"""Number of names in one message."""


def check_device(device: str) -> None:
    """
    Check that the device for training is available.

    Raises:
        SpecError: the device is a GPU, and torch sees no GPU in this process.
    """
    if device == "cuda" and not torch.cuda.is_available():
        text = f"torch {torch.__version__} sees no GPU where this worker runs"
        hint = "set it to false, or run on nodes with a GPU and a CUDA build of torch"
        raise SpecError(Problem(("scaling", "use_gpu"), text, hint))


def checked_model(task: Task, model: object) -> nn.Module:
    """
    Return the result of `model()` without wrappers that change parameter names.

    Raises:
        ValueError: the result is not a module, is a ScriptModule, or has uninitialized parameters.
    """
    where = method_location(task, "model")
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ValueError(
            f"{where}model() must return a model, got the class {model.__name__}: "
            f"call it, {model.__name__}(...)"
        )
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{where}model() must return a torch.nn.Module, got {_type_of(model)}{no_return(model)}"
        )
    if lazy := without_shape(model):
        raise ValueError(
            f"{where}{lazy}: run one through the model in model(), for example "
            "model(torch.zeros(1, 8)), before returning it"
        )
    scripted = [name for name, m in model.named_modules() if isinstance(m, ScriptModule)]
    if scripted:
        name = repr(scripted[0]) if scripted[0] else "the model"
        raise ValueError(
            f"{where}{name} is a ScriptModule of torch.jit, and updates do not reach all of its "
            "parameters: return the original nn.Module, and set `compile: true` to compile it"
        )
    return unwrap(model)


def without_shape(model: nn.Module) -> str:
    """Return the names of uninitialized parameters and buffers, as a clause; empty: none."""
    named = (*model.named_parameters(), *model.named_buffers())
    lazy = [name for name, tensor in named if is_lazy(tensor)]
    if not lazy:
        return ""
    has = "has" if len(lazy) == 1 else "have"
    names = f"{quoted(lazy)} of the model {has}"
    return f"{names} no shape yet, as lazy modules do before their first batch"


def check_state(model: nn.Module, *, sent: bool, named: str = "model()") -> None:
    """
    Check that all state of a model can be saved and sent, before it is trained.

    Args:
        model: the user's model.
        sent: whether ranks exchange the model's tensors in collective operations.
        named: name of the model in messages.

    Raises:
        SpecError: names each unsupported entry of the state and its type.
    """
    problems = []
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, value in model.state_dict().items():
        role = "parameter" if name in trained else "state"
        if not isinstance(value, Tensor):
            text = f"{named} has {name!r} in its state_dict(), a {type(value).__name__}"
            hint = "return a tensor from get_extra_state(), or keep this state in the task"
            problems.append(Problem(("task",), f"{text}: only tensors can be saved", hint))
            continue
        dtype = dtype_name(value)
        hint = _REAL if value.is_complex() else "use another type"
        if value.layout is not torch.strided:
            dtype = f"{dtype}, {value.layout}"
            hint = "store its indices and its values as two tensors"
        if dtype not in ITEM_BYTES:
            text = f"{named} has the {role} {name!r} of type {dtype}, which cannot be saved"
            problems.append(Problem(("task",), text, hint))
        elif sent and value.dtype not in SENDABLE:
            text = f"{named} has the {role} {name!r} of type {dtype}, which workers cannot exchange"
            if name not in trained:  # servers support no complex parameters, and get no buffers
                hint += "; or set `strategy: ps-sync`"
            problems.append(Problem(("task",), text, hint))
    if problems:
        raise SpecError(*problems)


def checked_data(job: Job, task: Task, data: object, method: str) -> Dataset[Any]:
    """
    Return the result of `train_data()` or `eval_data()` as a map-style data set.

    A stream is wrapped.

    Raises:
        ValueError: the result is neither a map-style data set nor a stream.
        SpecError: the job cannot read the stream.
    """
    if is_stream(data):
        return _checked_stream(job, task, data, method)
    fault = _data_fault(data)
    if not fault and method == "eval_data" and len(data) == 0:  # type: ignore[arg-type]
        fault = "has no samples: return None for no evaluation"
    if fault:
        raise ValueError(f"{method_location(task, method)}{method}() {fault}")
    data_set: Dataset[Any] = data  # type: ignore[assignment]
    return data_set


def _checked_stream(job: Job, task: Task, data: object, method: str) -> StreamSamples:
    """Wrap a stream as a map-style data set, and check that it can be read repeatedly."""
    evaluates = method == "eval_data"
    if is_ray_data(data) and job.data.num_workers:
        text = "the task's data is a Ray Dataset, and loader processes are not connected to Ray"
        raise SpecError(Problem(("data", "num_workers"), text, "set it to 0"))
    if not evaluates and overrides(type(task), "sampler"):
        raise ValueError(
            f"{method_location(task, 'sampler')}sampler() returns an order of indices, and "
            "train_data() returns a stream, which has its own order: remove one of the two"
        )
    where = f"{method_location(task, method)}{method}()"
    samples = StreamSamples(data, StreamSeeds(job.seed, evaluates), where)
    counts = evaluates or job.epochs is not None
    samples.survey(counts=counts, limit_s=job.failure.start_timeout_s / 2)
    if len(samples) == ENDLESS and job.checkpoint.every_epochs is not None:
        text = "the training data is a stream without a length, which has no epochs"
        raise SpecError(Problem(("checkpoint", "every_epochs"), text, "set `every_steps`"))
    return samples


def check_frequencies(model: nn.Module, parts: int) -> None:
    """
    Check that no embedding uses `scale_grad_by_freq` if batches are split.

    Args:
        model: the user's model.
        parts: number of micro-batches of a batch, over all workers.

    Raises:
        SpecError: names each such embedding.
    """
    named = model.named_modules() if parts > 1 else ()
    names = [name for name, m in named if getattr(m, "scale_grad_by_freq", False) is True]
    text = (
        "model() has {!r} with `scale_grad_by_freq`: its gradient is divided by the frequency of "
        f"a row in a micro-batch, and this job splits a batch into {parts} micro-batches"
    )
    hint = "remove the option, or use one worker without gradient_accumulation"
    if names:
        raise SpecError(*(Problem(("task",), text.format(name), hint) for name in names))


def check_evaluations(job: Job, sampler: Sampler, eval_data: object) -> None:
    """
    Check that the evaluations that a job depends on take place.

    Raises:
        SpecError: the task has no evaluation data, the metrics are needed before the end of the
            run, or steps with a checkpoint have no evaluation.
    """
    if eval_data is not None and sampler.endless and job.evaluation.every_steps is None:
        logger.warning(
            "the training data is a stream without a length, so the only evaluation is after "
            "the last step, unless `evaluation.every_steps` is set"
        )
        text = "needs evaluations during the run, but the only one is at its end"
        if metric_fields(job):
            advice = "set `evaluation.every_steps`"
            raise SpecError(*(Problem(field, text, advice) for field, _ in metric_fields(job)))
    fields = [field for field, _ in metric_fields(job)]
    if job.data.persistent_workers:
        fields.append(("data", "persistent_workers"))
    if job.evaluation.before_first:
        fields.append(("evaluation", "before_first"))
    if eval_data is None and fields:
        text = "needs evaluations, and the task's eval_data() gives no data"
        raise SpecError(*(Problem(field, text, "write eval_data()") for field in fields))
    if job.checkpoint.keep_best is None:
        return
    steps = sampler.steps_per_epoch
    periods = job.checkpoint.period(steps), job.evaluation.period(steps)
    if problems := period_problems(*periods):
        raise SpecError(*problems)


def _data_fault(data: object) -> str:
    """Return why an object is not a map-style data set; empty: it is one."""
    wanted = (
        "must return a map-style data set, with len(data) and data[i] -> (inputs, targets), or an "
        "IterableDataset"
    )
    if data is None:
        return f"{wanted}; got None{no_return(data)}"
    if isinstance(data, type):
        return f"{wanted}; got the class {data.__name__}: call it, {data.__name__}(...)"
    if isinstance(data, DataLoader):
        return (
            f"{wanted}; got a DataLoader: return its data set; the job's global_batch_size and "
            "data.* determine the batches"
        )
    if hasattr(data, "__next__"):
        return (
            f"{wanted}; got {_type_of(data)}, which can be read only once: return an object whose "
            "__iter__ starts from the first sample each time, for example a generator function"
        )
    if isinstance(data, tuple) and data and all(isinstance(item, Tensor) for item in data):
        return f"{wanted}; got a tuple of tensors: TensorDataset(...) makes a data set of them"
    if advice := _data_hint(data):
        return f"{wanted}; got {_type_of(data)} {advice}"
    if not hasattr(data, "__getitem__"):
        return f"{wanted}; {_type_of(data)} has no __getitem__"
    try:
        len(data)  # type: ignore[arg-type]
    except TypeError:
        return f"{wanted}; {_type_of(data)} has no length"
    return ""


def _data_hint(data: Any) -> str:
    """Return a hint for a table or a collection of data sets; empty: the object is neither."""
    if hasattr(data, "iloc"):
        return "of pandas, whose data[i] is a column: return data.to_dict('records')"
    if isinstance(data, Mapping) and data and 0 not in data:
        names = quoted([str(name) for name in data])
        return f"of {names}, without data[0]: return one of them, or a data set that reads them all"
    if isinstance(data, list | tuple) and data and isinstance(data[0], Dataset):
        return "of data sets: ConcatDataset(...) combines them"
    return ""


def checked_step(task: Task, result: object) -> object:
    """
    Return the loss in the result of step(): the result itself, or the entry 'loss' of a mapping.

    Raises:
        ValueError: the mapping has no entry 'loss'.
    """
    if not isinstance(result, Mapping):
        return result
    if "loss" not in result:
        names = quoted([str(name) for name in result]) or "nothing"
        raise ValueError(
            f"{method_location(task, 'step')}step() must return the loss, alone or in a mapping as "
            f"'loss'; got a {type(result).__name__} of {names}"
        )
    loss: object = result["loss"]
    return loss


_DETACHED = ".detach(), no_grad(), .item() or the like detach it, or it uses frozen parameters only"


def checked_loss(task: Task, loss: object, outputs: Any, method: str) -> Tensor:
    """
    Return the loss of a micro-batch after checks.

    Args:
        task: the user's task.
        loss: result of loss() or step(), or the sum of a pair (sum, weight).
        outputs: the model's outputs, for the message.
        method: "loss" or "step".

    Raises:
        ValueError: the loss is not a scalar tensor, or does not require grad where grad is enabled.
    """
    where = method_location(task, method)
    if not isinstance(loss, Tensor):
        raise ValueError(f"{where}{_not_a_tensor(loss, method)}")
    if loss.ndim != 0:
        raise ValueError(
            f"{where}{method}() must return a scalar, the mean over the batch, or (sum, weight); "
            f"got shape {[*loss.shape]}: take its mean()"
        )
    if not loss.is_floating_point():
        dtype = dtype_name(loss)
        raise ValueError(f"{where}{method}() must return a real number, got one of type {dtype}")
    if torch.is_grad_enabled() and not loss.requires_grad:
        why = _why_detached(outputs) if method == "loss" else _DETACHED
        raise ValueError(f"{where}{method}() returned a scalar that does not require grad: {why}")
    return loss


def checked_weight(task: Task, weight: object, method: str) -> float:
    """
    Return the weight of a pair (sum, weight) as a float.

    Raises:
        ValueError: the weight is not a number, or is negative, infinite or NaN.
    """
    where = method_location(task, method)
    number = checked_number(weight, f"{where}{method}() gives the weight", "weight")
    if not 0.0 <= number < float("inf"):
        raise ValueError(
            f"{where}{method}() gives the weight {number:g}: it must be finite, 0 or more"
        )
    return number


def _not_a_tensor(loss: object, method: str) -> str:
    """Return the error message for a loss that is not a tensor."""
    text = f"{method}() must return a scalar tensor, got {_type_of(loss)}"
    if isinstance(loss, int | float):
        return f"{text} {loss:g}: return the tensor itself, without .item() or float()"
    if isinstance(loss, Mapping):
        names = quoted([str(name) for name in loss])
        return f"{text} of {names}: return the entry to minimize"
    if isinstance(getattr(loss, "loss", None), Tensor):
        return f"{text}: return its .loss"
    return f"{text}{no_return(loss)}"


def _why_detached(outputs: object) -> str:
    items = [outputs, *(items_in(outputs) or ())]
    objects = [o for o in items if hasattr(o, "__dict__") and not isinstance(o, Tensor | Mapping)]
    attributes = [vars(o) for o in objects]
    if any(tensor.requires_grad for tensor in tensors_in((outputs, attributes))):
        return "the model's output does; .detach(), no_grad(), argmax or the like detach the loss"
    return (
        "the model's output does not either: its forward() detaches it, runs under no_grad(), or "
        "uses frozen parameters only"
    )


def checked_metrics(
    task: Task, outputs: Any, targets: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    Return the metrics of an evaluation batch: means over the batch, and metrics with state.

    Raises:
        ValueError: names a metric that is neither a number nor a metric with state.
    """
    means: dict[str, float] = {}
    stateful: dict[str, Any] = {}
    metrics = task.metrics(outputs, targets)
    where = method_location(task, "metrics")
    if not isinstance(metrics, Mapping):
        raise ValueError(
            f"{where}metrics() must return a mapping of names to numbers, "
            f"got {_type_of(metrics)}{no_return(metrics)}"
        )
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise ValueError(f"{where}a name in metrics() must be text, got {name!r}")
        if has_state(value):
            stateful[name] = value
        else:
            means[name] = checked_number(value, f"{where}metrics() gives {name!r}", name)
    return means, stateful


def has_state(value: object) -> bool:
    """Return whether a value of metrics() is a metric with state, not a number."""
    return has_methods(value, "update", "compute", "reset")


def has_methods(value: object, *names: str) -> bool:
    """Return whether an object has all of these methods; an error of `getattr` means no."""
    try:
        methods = [getattr(value, name, None) for name in names]
    except Exception:  # for example, the KeyError of a dict with attribute access
        return False
    return not isinstance(value, type) and all(map(callable, methods))


def checked_number(value: object, prefix: str, name: str) -> float:
    """
    Convert a value that user code returned to a float.

    Args:
        value: the value.
        prefix: start of the message, such as `metrics() gives 'accuracy'`.
        name: name of the value.

    Raises:
        ValueError: the value is not one number.
    """
    wanted = "expected one number, the mean over the batch"
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex()):
        dtype = dtype_name(value)
        several = f"; return one entry for each, such as '{name}_0'" if value.numel() > 1 else ""
        text = f"{prefix} as a tensor of shape {[*value.shape]}, {dtype}: {wanted}{several}"
        raise ValueError(text)
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{prefix} as {_type_of(value)}: {wanted}") from None


def method_location(task: Task, method: str) -> str:
    """Return file and line of a method; see `source_location`."""
    return source_location(getattr(type(task), method))


def _type_of(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}".replace("a int", "an int")


def no_return(value: object) -> str:
    """Return a hint to a missing `return`; empty: the value is not None."""
    return ": is there a `return`?" if value is None else ""


def quoted(names: list[str]) -> str:
    """Return names in quotes for a message; of many names, the first ones and a count."""
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(repr(name) for name in names[:_MAX_NAMES]) + more
