"""task_parameters: the trained tensors that a task holds outside its model."""

from typing import Any

import torch
from torch import Tensor, nn

from distplat.strategies.loop.task_settings import task_modules, task_parameters
from distplat.strategies.task import Task


class TaskWithParameters(Task):
    def __init__(self) -> None:
        self.net = nn.Linear(2, 2)
        self.log_var = nn.Parameter(torch.zeros(3))
        self.fixed = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.scale = torch.ones(1, requires_grad=True)
        self.constant = torch.ones(4)
        self.heads = {"a": nn.Linear(2, 1, bias=False), "many": [nn.Linear(1, 1), self.log_var]}
        self.text = "no tensor"

    def model(self) -> nn.Module:
        return self.net

    def train_data(self) -> Any:
        raise NotImplementedError

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        raise NotImplementedError


def test_finds_parameters_outside_the_model() -> None:
    task = TaskWithParameters()
    parameters = task_parameters(task, task.model())
    names = ["heads.a.weight", "heads.many.0.bias", "heads.many.0.weight", "log_var", "scale"]
    assert sorted(parameters) == names
    assert parameters["log_var"] is task.log_var
    assert len(task_modules(task, task.model())) == 2
