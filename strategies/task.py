"""
The task: the user's side of a run, and all that a user must write.

One class, unchanged under every strategy and any number of workers. It says what is trained, on
what, and how well it does; it knows nothing of ranks, servers or Ray. This module needs no torch
itself, so naming a task costs nothing.
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
    What to train. Subclass it; constructor arguments come from `task_args` of the job file.

    A task has `model`, `train_data`, and `loss` or `step`; the rest is up to it (docs/task.md).

    Every method may be called once in every process of the run. The global generators of python,
    numpy and torch are seeded from the job before the module is imported, before the class is
    made, and before `model`, `train_data` and `eval_data`: all ranks build the same. Samples are
    seeded one by one (docs/random_numbers.md).
    """

    @abstractmethod
    def model(self) -> nn.Module:
        """Build the model, on the CPU. Parameters that need no gradient stay as they are."""

    @abstractmethod
    def train_data(self) -> Dataset[Any]:
        """
        Give the training samples: `len(data)` of them, `data[i]`, mostly (inputs, targets).

        Or a stream of them: an `IterableDataset`, or what can be gone through anew each time.
        """

    def sampler(self, data: Dataset[Any], epoch: int) -> Iterable[int]:
        """
        Give the samples of an epoch in order; override it to weigh, balance or group them.

        All workers ask for the same epoch and cut the same order, whatever their number, and so
        does a run that goes on after a failure: it must depend on `data` and `epoch` alone. The
        global generators are seeded by (seed, epoch) before each call. Unless it is overridden the
        job's `data.shuffle` and `seed` say the order.

        Args:
            data: what `train_data` gave.
            epoch: from 0.

        Returns:
            Numbers of samples: a list, a tensor, an array, or one of torch's samplers. A sample
            may come several times or not at all; every epoch must have as many as the first.
        """
        raise NotImplementedError(f"{type(self).__name__} leaves the order to the job")

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """
        Give what the model makes of a batch; override it for batches of another form.

        Unless it is overridden: `model(inputs)` of a pair (inputs, targets), and `model(**batch)`
        of a mapping, as Hugging Face's models are called.

        Args:
            model: what `model()` gave, in training or in evaluation mode. Call it as a whole.
            batch: as `collate` gave it, on the model's device.

        Returns:
            The outputs: what `loss` and `metrics` get.

        Raises:
            ValueError: the batch is neither, and the task does not say how the model is called.
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
        Give the loss of one batch. A task has this or `step`.

        Args:
            outputs: what `forward` gave.
            targets: of a pair the second; the batch, where it is a mapping, or where the task has a
                `forward` of its own.

        Returns:
            A scalar: the **mean** over the samples of the batch. Or `(sum, weight)` for a mean over
            something else, for example tokens: a scalar, and what the sum over all ranks and
            micro-batches is divided by.

        Raises:
            ValueError: by the caller, where it is neither; names what it got.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither loss() nor step()")

    def weights(self, batch: Any) -> Mapping[str, Tensor | float]:
        """
        Give what each term of the loss is divided by, for a loss of several terms that are means
        over different things; override it with a `loss` or `step` that gives a sum for each.

        It is asked for all micro-batches of a step before their first forward, and added up over
        all workers. Unless it is overridden a loss is one term.

        Args:
            batch: see `forward`.

        Returns:
            By term: a number, 0 or more, that the batch alone says. The loss is then a mapping of
            the same terms to sums, each a scalar.
        """
        raise NotImplementedError(f"{type(self).__name__} has a loss of one term")

    def step(self, model: nn.Module, batch: Any) -> Any:
        """
        Give the loss of one batch, from the model on: the general form, of which `loss` is the
        short one. Override one of the two. Backward and update are not a part of it.

        Args:
            model: see `forward`.
            batch: see `forward`.

        Returns:
            What `loss` returns, or a mapping that has it as `"loss"`, such as the outputs of
            Hugging Face's models. All of it is what `metrics` gets as its outputs.
        """
        return self.loss(self.forward(model, batch), targets_of(self, batch))

    def lr(self, step: int, total: int) -> float:
        """
        Give the factor of the learning rate in a step, as for torch's `LambdaLR`; override it for a
        schedule that the job file has no name for.

        It multiplies `lr` of the optimizer, of each of its groups, and of `embeddings.optimizer`.
        Every worker asks for all steps in their order before the first is made, and all must get
        the same. Unless it is overridden the job's `lr_schedule` says the rates.

        Args:
            step: from 0.
            total: steps of the run.

        Returns:
            A number, 0 or more.
        """
        raise NotImplementedError(f"{type(self).__name__} leaves the rates to the job")

    def optimizer(
        self, named_parameters: list[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer | list[torch.optim.Optimizer]:
        """
        Make the optimizer; override it for a class that a job file cannot name.

        Only under `ring`, and in a job with `optimizer: {name: task}`. Every worker makes the same
        and has it update the whole model from the gradient of the global batch, clipped. `lr` of
        each param group is what the job's schedule, or `lr`, is applied to.

        Args:
            named_parameters: all of the model, frozen ones too; then those of the task, whose names
                begin with `task:`.

        Returns:
            One of torch's optimizers, or of a class derived from `torch.optim.Optimizer`; or a list
            of several. Each trainable parameter is in one of them.
        """
        raise NotImplementedError(f"{type(self).__name__} leaves the optimizer to the job")

    def eval_data(self) -> Dataset[Any] | None:
        """Give the samples for evaluation, or None for no evaluation."""
        return None

    def collate(self, samples: list[Any]) -> Any:
        """
        Put the samples of a micro-batch together; override it to pad them, for example.

        Unless it is overridden: as torch's `default_collate`, and dataclasses field by field. It
        runs where samples are read, in a loader process too (`data.num_workers`), which has a copy
        of the task. The global generators are seeded before each call.

        Args:
            samples: of the training or the evaluation data, as the data set gave them.

        Returns:
            The batch: `(inputs, targets)`, or whatever `forward` or `step` takes.
        """
        from distplat.strategies.loop.collate import collated  # here: it needs torch

        return collated(samples)

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, Any]:
        """
        Give named figures of an evaluation batch, each a mean over it; `loss` is added. Or a metric
        with state that the task keeps (`update`, `compute`, `reset` and `merge`, or one of
        torchmetrics), once it has been updated with the batch.

        Args:
            outputs: what `forward` gave; of a task with a `step`, what that gave.
            targets: as `loss` gets them; of a task with a `step`, the batch.
        """
        return {}

    def buffers(self, name: str) -> str | None:
        """
        Say what ranks do with a buffer, or a frozen parameter, that a forward changes.

        Args:
            name: of the model's `state_dict`.

        Returns:
            `"rank0"`: all have rank 0's after each step. `"mean"`: the mean over the ranks,
            weighted by their samples. `"local"`: each keeps its own, and rank 0's is saved. None:
            `"mean"` for a batch norm's running mean and variance, else `"rank0"`.
        """
        return None

    def stages(self, model: nn.Module) -> list[nn.Module]:
        """
        Cut the model into modules that follow each other, for strategies that split it by layers.

        An `nn.Sequential` is cut into its children; override this for any other model.

        Raises:
            NotImplementedError: the model is no `nn.Sequential`, or has a `forward` of its own, and
                the task does not say.
        """
        from torch import nn  # here: naming a task costs no torch

        if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
            return list(model)
        raise NotImplementedError(f"{type(self).__name__} does not say how its model is cut")


def overrides(kind: type[Task], method: str) -> bool:
    """Say whether a class has a method of its own; `lr = 0.1` is a number that it keeps."""
    attribute = getattr(kind, method)
    return callable(attribute) and attribute is not getattr(Task, method)


def has_step(task: Task) -> bool:
    """Say whether a task has a `step` of its own, and so no `loss`."""
    return overrides(type(task), "step")


def step_of(task: Task) -> Callable[[nn.Module, Any], Any]:
    """Give a task's way from a batch to its loss; the task may keep a number as `self.step`."""
    return task.step if has_step(task) else MethodType(Task.step, task)


def method_of(task: Task, name: str) -> Callable[..., Any]:
    """Give a method of a task, which may keep something else under its name: `self.lr = 0.1`."""
    kept = vars(task).get(name)
    found: Callable[..., Any] = getattr(type(task), name)
    return getattr(task, name) if kept is None else MethodType(found, task)


def model_call_method(task: Task) -> str | None:
    """Name the method by which a task calls the model itself; None: it leaves that to us."""
    if has_step(task):
        return "step"
    return "forward" if overrides(type(task), "forward") else None


def targets_of(task: Task, batch: Any) -> Any:
    """Give what `loss` and `metrics` get as targets."""
    return batch if model_call_method(task) or isinstance(batch, Mapping) else batch[1]


def describe_value(batch: object) -> str:
    """Name what a batch is."""
    many = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
    return f"a {type(batch).__name__}{many}"
