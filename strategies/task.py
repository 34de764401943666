"""
`Task`: the user's model, data and loss, and the only class that a user has to write.

The same class works with every strategy and any number of workers. It does not deal with ranks,
servers or Ray. This module does not import torch, so importing it is cheap.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.utils.data import Dataset


class Task(ABC):
    """
    The model, data and loss of a run. Subclass it; the job file's `task_args` are the constructor's
    arguments.

    A task defines `model`, `train_data`, and either `loss` or `step`. All other methods are
    optional (docs/task.md).

    Every process of the run may call each method once. The global generators of Python, numpy and
    torch are seeded from the job before the module is imported, before the task is constructed, and
    before `model`, `train_data` and `eval_data` are called, so all ranks build the same objects.
    The random numbers of each sample are seeded separately (docs/random_numbers.md).
    """

    @abstractmethod
    def model(self) -> nn.Module:
        """Build the model on the CPU. Parameters with `requires_grad=False` are not trained."""

    @abstractmethod
    def train_data(self) -> Dataset[Any]:
        """
        Return the training data set, map-style: `len(data)` samples `data[i]`, usually pairs
        (inputs, targets).

        An `IterableDataset`, or any iterable that can be iterated again for each epoch, is also
        allowed.
        """

    def sampler(self, data: Dataset[Any], epoch: int) -> Iterable[int]:
        """
        Return the order of an epoch's samples. Override it for weighted, balanced or grouped
        sampling.

        Every worker calls this for the same epoch and uses its own part of the same order. A run
        that resumes after a failure calls it again, possibly with another number of workers. The
        order must therefore depend only on `data` and `epoch`. The global generators are seeded by
        (seed, epoch) before each call. By default the job's `data.shuffle` and `seed` determine the
        order.

        Args:
            data: the return value of `train_data`.
            epoch: from 0.

        Returns:
            Sample indices: a list, a tensor, an array, or a sampler of torch.utils.data. An index
            may occur several times or not at all. Every epoch must have as many samples as the
            first one.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override sampler()")

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """
        Return the model's outputs for a batch. Override it for batches of another form.

        The default calls `model(inputs)` for a pair (inputs, targets), and `model(**batch)` for a
        mapping, as Hugging Face's models are called.

        Args:
            model: the return value of `model()`, in training or evaluation mode. Call the model
                itself, not its submodules.
            batch: the return value of `collate`, on the model's device.

        Returns:
            The outputs that `loss` and `metrics` receive.

        Raises:
            ValueError: The batch is neither a pair nor a mapping, and the task does not override
                this method.
        """
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, list | tuple) and len(batch) == 2:
            return model(batch[0])
        raise ValueError(
            "a batch must be a pair (inputs, targets) or a dict of the model's arguments: each "
            f"sample of the data set, or what collate() gives; it is {describe_value(batch)}. "
            f"For any other batch {type(self).__name__} needs forward(model, batch) or "
            "step(model, batch)"
        )

    def loss(self, outputs: Any, targets: Any) -> Tensor | tuple[Tensor, Tensor | float]:
        """
        Return the loss of one batch. A task defines either this method or `step`.

        Args:
            outputs: the return value of `forward`.
            targets: the second item of a pair. The whole batch, if the batch is a mapping or if the
                task overrides `forward`.

        Returns:
            A scalar: the **mean** over the samples of the batch. Or `(sum, weight)` for a mean over
            something else, such as tokens: a scalar, and this batch's part of the divisor. The sums
            and the weights of all ranks and micro-batches are added up and then divided.

        Raises:
            ValueError: Raised by the caller if the return value has neither form; the message
                contains the value's type.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither loss() nor step()")

    def weights(self, batch: Any) -> Mapping[str, Tensor | float]:
        """
        Return the divisor of each term of the loss, for a loss of several terms that are means over
        different things.

        Override it together with a `loss` or `step` that returns one sum per term. It is called for
        all micro-batches of a step before the first forward, and the weights are added up over all
        workers. By default a loss has one term.

        Args:
            batch: see `forward`.

        Returns:
            A number >= 0 for each term's name, computed from the batch alone. The loss is then a
            mapping of the same names to sums, each a scalar.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override weights()")

    def step(self, model: nn.Module, batch: Any) -> Any:
        """
        Return the loss of one batch, computed with the model: the general form of `loss`.

        Override either this method or `loss`. distplat runs backward and the optimizer step itself.

        Args:
            model: see `forward`.
            batch: see `forward`.

        Returns:
            The same values as `loss`, or a mapping with the loss as `"loss"`, such as the outputs
            of Hugging Face's models. `metrics` receives the whole return value as its outputs.
        """
        return self.loss(self.forward(model, batch), targets_of(self, batch))

    def lr(self, step: int, total: int) -> float:
        """
        Return the factor of the learning rate in a step, as for torch's `LambdaLR`. Override it for
        a schedule that the job file has no name for.

        The factor multiplies `lr` of the optimizer, of each of its groups, and of
        `embeddings.optimizer`. Every worker calls this for all steps in order before the first
        step, and all workers must get the same factors. By default the job's `lr_schedule`
        determines the learning rate.

        Args:
            step: from 0.
            total: number of steps in the run.

        Returns:
            A number >= 0.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override lr()")

    def optimizer(
        self, named_parameters: list[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer | list[torch.optim.Optimizer]:
        """
        Build the optimizer. Override it for a class that a job file cannot name.

        Only under `ring`, and only in a job with `optimizer: {name: task}`. Every worker builds the
        same optimizer, which updates the whole model from the clipped gradient of the global batch.
        The job's `lr_schedule` is applied to the `lr` of each param group.

        Args:
            named_parameters: all parameters of the model, frozen ones included, followed by the
                task's own parameters, whose names start with `task:`.

        Returns:
            An instance of a subclass of `torch.optim.Optimizer`, or a list of several. Each
            trainable parameter belongs to exactly one of them.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override optimizer()")

    def eval_data(self) -> Dataset[Any] | None:
        """Return the data set for evaluation, or None for no evaluation."""
        return None

    def collate(self, samples: list[Any]) -> Any:
        """
        Combine the samples of a micro-batch into a batch. Override it for padding, for example.

        The default works like torch's `default_collate`, and combines dataclasses field by field.
        This method runs in the process that reads the samples; with `data.num_workers` that is a
        loader process with a copy of the task. The global generators are seeded before each call.

        Args:
            samples: items of the training or evaluation data set.

        Returns:
            The batch: `(inputs, targets)`, or any other form that `forward` or `step` accepts.
        """
        from distplat.strategies.loop.collate import collated  # local import: it imports torch

        return collated(samples)

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, Any]:
        """
        Return named metrics of an evaluation batch, each a mean over the batch. `loss` is added
        automatically.

        A value may also be a metric object with state that the task keeps (`update`, `compute`,
        `reset` and `merge`, or a metric of torchmetrics). Call its `update` with the batch before
        returning it.

        Args:
            outputs: the return value of `forward`, or of `step` if the task defines `step`.
            targets: the same as for `loss`. The whole batch, if the task defines `step`.
        """
        return {}

    def buffers(self, name: str) -> str | None:
        """
        Return how ranks synchronize a buffer, or a frozen parameter, that a forward changes.

        Args:
            name: a key of the model's `state_dict`.

        Returns:
            `"rank0"`: after each step all ranks have rank 0's value. `"mean"`: the mean over the
            ranks, weighted by their samples. `"local"`: each rank keeps its own value, and rank 0's
            value is saved. None: `"mean"` for the running mean and variance of a batch norm, else
            `"rank0"`.
        """
        return None

    def stages(self, model: nn.Module) -> list[nn.Module]:
        """
        Split the model into modules that run one after the other, for strategies that split a model
        by layers.

        The default returns the children of an `nn.Sequential`. Override it for any other model.

        Raises:
            NotImplementedError: The model is not an `nn.Sequential`, or it overrides `forward`, and
                the task does not override this method.
        """
        from torch import nn  # local import: importing a task's base class must not import torch

        if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
            return list(model)
        raise NotImplementedError(f"{type(self).__name__} does not say how its model is split")


def overrides(cls: type[Task], method: str) -> bool:
    """
    Return whether a class overrides a method of `Task`. A number such as `lr = 0.1` is not an
    override.
    """
    attribute = getattr(cls, method)
    return callable(attribute) and attribute is not getattr(Task, method)


def has_step(task: Task) -> bool:
    """Return whether a task defines `step`, and therefore no `loss`."""
    return overrides(type(task), "step")


def step_of(task: Task) -> Callable[[nn.Module, Any], Any]:
    """Return the method that computes a batch's loss, even if `self.step` is a number."""
    return task.step if has_step(task) else MethodType(Task.step, task)


def method_of(task: Task, name: str) -> Callable[..., Any]:
    """Return a method of a task, even if an attribute (`self.lr = 0.1`) shadows it."""
    attribute = vars(task).get(name)
    method: Callable[..., Any] = getattr(type(task), name)
    return getattr(task, name) if attribute is None else MethodType(method, task)


def model_call_method(task: Task) -> str | None:
    """Return the method in which a task calls the model itself; None: there is none."""
    if has_step(task):
        return "step"
    return "forward" if overrides(type(task), "forward") else None


def targets_of(task: Task, batch: Any) -> Any:
    """Return the targets that `loss` and `metrics` receive."""
    return batch if model_call_method(task) or isinstance(batch, Mapping) else batch[1]


def describe_value(batch: object) -> str:
    """Return the type of a batch, and its length if it is a list or tuple."""
    length = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
    return f"a {type(batch).__name__}{length}"
