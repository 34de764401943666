"""
What user code returned, looked at before it is used: clear words instead of a failure further on.

    model()              a module whose parameters have shapes, whose state can be kept and sent
    train_data(), ...    a data set with a length and numbered samples, or a stream
    loss()               one number that leads back to the parameters
    metrics()            names, and a number for each

What is wrong with user code is a `ValueError` here, which a worker tells as the user's error (exit
code 1). What no strategy or file could hold is a `SpecError` (exit code 2): nothing was trained.
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
_SHOWN = 6
"""Names in one message."""


def check_device(device: str) -> None:
    """
    See whether the device that a model is to be trained on is there.

    Raises:
        SpecError: it is a GPU, and torch sees none here.
    """
    if device == "cuda" and not torch.cuda.is_available():
        text = f"torch {torch.__version__} sees no GPU where this worker runs"
        hint = "set it to false, or run where a GPU and a torch built for it are"
        raise SpecError(Problem(("scaling", "use_gpu"), text, hint))


def checked_model(task: Task, model: object) -> nn.Module:
    """
    Give what `model()` returned, if it can be trained; without wrappers that change names.

    Raises:
        ValueError: it is no module, or has parameters without a shape.
    """
    where = method_location(task, "model")
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ValueError(
            f"{where}model() must return a model, got the class {model.__name__}: "
            f"call it, {model.__name__}(...)"
        )
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{where}model() must return a torch.nn.Module, got {_named(model)}{no_return(model)}"
        )
    if lazy := without_shape(model):
        raise ValueError(
            f"{where}{lazy}: run one through the model in model(), for example "
            "model(torch.zeros(1, 8)), before you return it"
        )
    scripted = [name for name, one in model.named_modules() if isinstance(one, ScriptModule)]
    if scripted:
        what = repr(scripted[0]) if scripted[0] else "the model"
        raise ValueError(
            f"{where}{what} is a ScriptModule of torch.jit, which keeps its parameters where no "
            "update reaches them all: give the module that it was made of, and for its speed set "
            "`compile: true`"
        )
    return unwrap(model)


def without_shape(model: nn.Module) -> str:
    """Name what of a model has no shape yet; empty: all has one."""
    named = (*model.named_parameters(), *model.named_buffers())
    lazy = [name for name, tensor in named if is_lazy(tensor)]
    if not lazy:
        return ""
    has = "has" if len(lazy) == 1 else "have"
    names = f"{quoted(lazy)} of the model {has}"
    return f"{names} no shape yet, as lazy modules do before their first batch"


def check_state(model: nn.Module, *, sent: bool, named: str = "model()") -> None:
    """
    Find what could be trained and then neither be kept nor sent.

    Args:
        model: the user's.
        sent: whether ranks exchange its tensors in collective operations.
        named: what it is called in messages.

    Raises:
        SpecError: names each tensor and its type.
    """
    problems = []
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, value in model.state_dict().items():
        what = "parameter" if name in trained else "state"
        if not isinstance(value, Tensor):
            text = f"{named} has {name!r} in its state_dict(), a {type(value).__name__}"
            hint = "get_extra_state() must return a tensor, or hold such state in the task"
            problems.append(Problem(("task",), f"{text}: only tensors are kept", hint))
            continue
        kind = dtype_name(value)
        hint = _REAL if value.is_complex() else "use another type"
        if value.layout is not torch.strided:
            kind, hint = f"{kind}, {value.layout}", "keep its indices and its values in two of them"
        if kind not in ITEM_BYTES:
            text = f"{named} has the {what} {name!r} of type {kind}, which cannot be saved"
            problems.append(Problem(("task",), text, hint))
        elif sent and value.dtype not in SENDABLE:
            text = f"{named} has the {what} {name!r} of type {kind}, which workers cannot exchange"
            if name not in trained:  # servers take real parameters only, and no buffers
                hint += "; or take `strategy: ps-sync`"
            problems.append(Problem(("task",), text, hint))
    if problems:
        raise SpecError(*problems)


def checked_data(job: Job, task: Task, data: object, method: str) -> Dataset[Any]:
    """
    Give what `train_data()` or `eval_data()` returned, if samples can be taken from it by number.

    Of a stream they can be, once it is wrapped.

    Raises:
        ValueError: they cannot be; says what to return instead.
        SpecError: it is a stream that the job cannot read.
    """
    if is_stream(data):
        return _checked_stream(job, task, data, method)
    fault = _fault_of(data)
    if not fault and method == "eval_data" and len(data) == 0:  # type: ignore[arg-type]
        fault = "has no samples: return None for no evaluation"
    if fault:
        raise ValueError(f"{method_location(task, method)}{method}() {fault}")
    data_set: Dataset[Any] = data  # type: ignore[assignment]
    return data_set


def _checked_stream(job: Job, task: Task, data: object, method: str) -> StreamSamples:
    """Make a stream's samples numbered, and see that it can be read anew."""
    evaluates = method == "eval_data"
    if is_ray_data(data) and job.data.num_workers:
        text = "a loader process is no process of Ray's, and the task's data is a Ray Dataset"
        raise SpecError(Problem(("data", "num_workers"), text, "set it to 0"))
    if not evaluates and overrides(type(task), "sampler"):
        raise ValueError(
            f"{method_location(task, 'sampler')}sampler() says an order of numbered samples, and "
            "train_data() gives a stream, which has its own: remove one of the two"
        )
    where = f"{method_location(task, method)}{method}()"
    samples = StreamSamples(data, StreamSeeds(job.seed, evaluates), where)
    counts = evaluates or job.epochs is not None
    samples.survey(counts=counts, limit_s=job.failure.start_timeout_s / 2)
    if len(samples) == ENDLESS and job.checkpoint.every_epochs is not None:
        text = "the training data is a stream without a length, which has no epochs"
        raise SpecError(Problem(("checkpoint", "every_epochs"), text, "give `every_steps`"))
    return samples


def check_frequencies(model: nn.Module, parts: int) -> None:
    """
    See that no embedding goes by how often a batch has a row, where batches are cut.

    Args:
        model: the user's.
        parts: into how many micro-batches, over all workers, a batch is cut.

    Raises:
        SpecError: names each that does.
    """
    named = model.named_modules() if parts > 1 else ()
    names = [name for name, one in named if getattr(one, "scale_grad_by_freq", False) is True]
    text = (
        "model() has {!r} with `scale_grad_by_freq`: its gradient is divided by how often a row is "
        f"in a micro-batch, and this job makes {parts} of a batch"
    )
    hint = "leave it out, or use one worker without gradient_accumulation"
    if names:
        raise SpecError(*(Problem(("task",), text.format(name), hint) for name in names))


def check_evaluations(job: Job, sampler: Sampler, eval_data: object) -> None:
    """
    See whether the evaluations that a job decides by, or asks for by name, are made.

    Raises:
        SpecError: the task has no data for them, or a checkpoint has none of its step.
    """
    if eval_data is not None and sampler.endless and job.evaluation.every_steps is None:
        logger.warning(
            "the training data is a stream without a length, so there are no epochs after which "
            "it could be evaluated: it is after the last step, or give `evaluation.every_steps`"
        )
        text = "needs evaluations while the run goes on, and there is one at its end only"
        if metric_fields(job):
            advice = "give `evaluation.every_steps`"
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


def _fault_of(data: object) -> str:
    """Say what is wrong with a data set; empty: nothing."""
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
            f"{wanted}; got a DataLoader: return its data set, the job's global_batch_size and "
            "data.* say how batches are made of it"
        )
    if hasattr(data, "__next__"):
        return (
            f"{wanted}; got {_named(data)}, which can be read only once: give an object whose "
            "__iter__ begins anew each time, as a generator function does"
        )
    if isinstance(data, tuple) and data and all(isinstance(one, Tensor) for one in data):
        return f"{wanted}; got a tuple of tensors: TensorDataset(...) makes a data set of them"
    if advice := _several(data):
        return f"{wanted}; got {_named(data)} {advice}"
    if not hasattr(data, "__getitem__"):
        return f"{wanted}; {_named(data)} has no __getitem__"
    try:
        len(data)  # type: ignore[arg-type]
    except TypeError:
        return f"{wanted}; {_named(data)} has no length"
    return ""


def _several(data: Any) -> str:
    """Say what to return in place of tables, and of several data sets; empty: it is one."""
    if hasattr(data, "iloc"):
        return "of pandas, of which data[i] is a column: return data.to_dict('records')"
    if isinstance(data, Mapping) and data and 0 not in data:
        names = quoted([str(name) for name in data])
        return f"of {names}, without data[0]: return one of them, or a data set that reads them all"
    if isinstance(data, list | tuple) and data and isinstance(data[0], Dataset):
        return "of data sets: ConcatDataset(...) makes one of them"
    return ""


def checked_step(task: Task, given: object) -> object:
    """
    Give the loss in what step() returned: all of it, or an entry of a mapping.

    Raises:
        ValueError: a mapping has no entry for it.
    """
    if not isinstance(given, Mapping):
        return given
    if "loss" not in given:
        names = quoted([str(name) for name in given]) or "nothing"
        raise ValueError(
            f"{method_location(task, 'step')}step() must have the loss in what it returns, as "
            f"'loss'; got a {type(given).__name__} of {names}"
        )
    loss: object = given["loss"]
    return loss


_CUT_OFF = ".detach(), no_grad(), .item() and the like cut it off, or all that it uses is frozen"


def checked_loss(task: Task, loss: object, outputs: Any, method: str) -> Tensor:
    """
    Give what loss() or step() made of a micro-batch, if it can be differentiated, or is not to be.

    Args:
        task: the user's.
        loss: what it returned, or the sum of a pair that it returned.
        outputs: what the model gave, for the message.
        method: which of the two.

    Raises:
        ValueError: it is no scalar tensor, or nothing leads from it back to the parameters.
    """
    where = method_location(task, method)
    if not isinstance(loss, Tensor):
        raise ValueError(f"{where}{_no_tensor(loss, method)}")
    if loss.ndim != 0:
        raise ValueError(
            f"{where}{method}() must return a scalar, the mean over the batch, or (sum, weight); "
            f"got shape {[*loss.shape]}: take its mean()"
        )
    if not loss.is_floating_point():
        kind = dtype_name(loss)
        raise ValueError(f"{where}{method}() must return a real number, got one of type {kind}")
    if torch.is_grad_enabled() and not loss.requires_grad:
        why = _cut_off(outputs) if method == "loss" else _CUT_OFF
        raise ValueError(f"{where}{method}() returned a scalar without a gradient: {why}")
    return loss


def checked_weight(task: Task, weight: object, method: str) -> float:
    """
    Give the weight of a pair (sum, weight) that loss() or step() returned.

    Raises:
        ValueError: it is no number, negative, infinite or NaN.
    """
    where = method_location(task, method)
    number = checked_number(weight, f"{where}{method}() gives the weight", "weight")
    if not 0.0 <= number < float("inf"):
        raise ValueError(
            f"{where}{method}() gives the weight {number:g}: it must be finite, 0 or more"
        )
    return number


def _no_tensor(loss: object, method: str) -> str:
    """Say what to return instead of what is no tensor."""
    text = f"{method}() must return a tensor without dimensions, got {_named(loss)}"
    if isinstance(loss, int | float):
        return f"{text} {loss:g}: return the tensor itself, without .item() or float()"
    if isinstance(loss, Mapping):
        names = quoted([str(name) for name in loss])
        return f"{text} of {names}: return the entry that is to be minimised"
    if isinstance(getattr(loss, "loss", None), Tensor):
        return f"{text}: return its .loss"
    return f"{text}{no_return(loss)}"


def _cut_off(outputs: object) -> str:
    objects = [one for one in (outputs, *(items_in(outputs) or ())) if hasattr(one, "__dict__")]
    held = [vars(one) for one in objects if not isinstance(one, Tensor | Mapping)]
    if any(tensor.requires_grad for tensor in tensors_in((outputs, held))):
        return "what the model gave has one; .detach(), no_grad(), argmax and the like cut it off"
    return (
        "what the model gave has none either: its forward() detaches it, runs under no_grad(), or "
        "uses frozen parameters only"
    )


def checked_metrics(
    task: Task, outputs: Any, targets: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """
    Give the metrics of one evaluation batch: means over it, and metrics with state.

    Raises:
        ValueError: one of them is neither; names it.
    """
    figures: dict[str, float] = {}
    kept: dict[str, Any] = {}
    metrics = task.metrics(outputs, targets)
    where = method_location(task, "metrics")
    if not isinstance(metrics, Mapping):
        raise ValueError(
            f"{where}metrics() must return a mapping of names to numbers, "
            f"got {_named(metrics)}{no_return(metrics)}"
        )
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise ValueError(f"{where}a name in metrics() must be text, got {name!r}")
        if has_state(value):
            kept[name] = value
        else:
            figures[name] = checked_number(value, f"{where}metrics() gives {name!r}", name)
    return figures, kept


def has_state(value: object) -> bool:
    """Say whether what metrics() gives is a metric with state, not a number."""
    return has_methods(value, "update", "compute", "reset")


def has_methods(value: object, *names: str) -> bool:
    """Say whether an object has methods, whatever it answers who asks for an attribute."""
    try:
        methods = [getattr(value, name, None) for name in names]
    except Exception:  # such as the KeyError of a dict that takes attributes for keys
        return False
    return not isinstance(value, type) and all(map(callable, methods))


def checked_number(value: object, prefix: str, name: str) -> float:
    """
    Give a figure.

    Args:
        value: what there is in its place.
        prefix: begins the message, `metrics() gives 'accuracy'`.
        name: of the figure.

    Raises:
        ValueError: it is no number.
    """
    wanted = "wanted is one number, the mean over the batch"
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex()):
        kind = dtype_name(value)
        several = f"; give one entry for each, such as '{name}_0'" if value.numel() > 1 else ""
        text = f"{prefix} as a tensor of shape {[*value.shape]}, {kind}: {wanted}{several}"
        raise ValueError(text)
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{prefix} as {_named(value)}: {wanted}") from None


def method_location(task: Task, method: str) -> str:
    """Give file and line of a method, see `source_location`."""
    return source_location(getattr(type(task), method))


def _named(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}".replace("a int", "an int")


def no_return(value: object) -> str:
    """Give the hint for a method that returned nothing; empty: it returned something."""
    return ": is there a `return`?" if value is None else ""


def quoted(names: list[str]) -> str:
    """Give names as a message has them, the first ones of many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more
