"""A task file that can be imported and checked, but not trained."""

TASK = """\
from distplat import Task

class Lin(Task):
    def model(self): ...
    def train_data(self): ...
    def loss(self, outputs, targets): ...
"""
