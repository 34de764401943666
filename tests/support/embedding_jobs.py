"""Jobs with embeddings on servers, and an equal task with `nn.Embedding`."""

from typing import Any

import numpy as np
import torch
from jobs import job_of
from local_run import LocalRun
from table_rows import table_rows
from torch import nn
from words import ROWS, WIDTH, Net, Words

from distplat import Task
from distplat.strategies.sparse.lookups import Lookups
from distplat.strategies.sparse.rows import initial_rows


class LocalWords(Words):
    """The task `Words` with `nn.Embedding`."""

    def model(self) -> nn.Module:
        sharded = super().model()
        specs = Lookups(sharded, job(Words, 0)).specs
        rows = [torch.from_numpy(initial_rows(spec, 0, np.arange(ROWS))) for spec in specs]
        rows[1][0] = 0.0
        words, tags = (nn.Parameter(r) for r in rows)
        bag = nn.EmbeddingBag(ROWS, WIDTH, mode="sum", padding_idx=0, _weight=tags.data)
        net = Net(nn.Embedding(ROWS, WIDTH, _weight=words.data), bag)
        net.head.load_state_dict(sharded.head.state_dict())  # type: ignore[union-attr]
        return net


def job(task: type[Task], world: int, *, servers: int = 2, **more: Any) -> Any:
    fields: dict[str, Any] = {
        "optimizer": {"name": "SGD", "lr": 0.5},
        "lr_schedule": {"name": "cosine"},
        "global_batch_size": 9,
        "epochs": 3,
    }
    if task is Words:
        fields["embeddings"] = {"servers": servers, "optimizer": {"name": "SGD", "lr": 0.5}}
    fields |= more
    return job_of(workers=world, **fields)


def table(run: LocalRun, number: int, rows: int = ROWS) -> Any:
    """See `table_rows`."""
    return table_rows(run.tables, number, rows)
