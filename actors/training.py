"""
A worker's session: from its orders to the trained model. The first place that imports torch.

What the user's code raises comes out as `UserCodeError`, everything else as another
`DistplatError`; nothing else leaves this module, so the controller always learns a cause.
"""

import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save

from distplat.actors.logs import log_to_stderr
from distplat.actors.messages import WorkOrder
from distplat.actors.task_loading import as_user_error, load_task_class
from distplat.platform.errors import DistplatError
from distplat.platform.progress import EvalReport, StepReport
from distplat.strategies.catalog import make_strategy
from distplat.strategies.task import Task
from distplat.strategies.training.loop import Progress
from distplat.strategies.training.session import Prepared, join, prepare

if TYPE_CHECKING:
    from distplat.actors.collective import RayCollective
    from distplat.actors.shards import RayShards


logger = logging.getLogger(__name__)


class Session:
    """
    One worker's run.

    Args:
        order: what to do.
        report: takes what the worker finishes, as it finishes it.
    """

    def __init__(self, order: WorkOrder, report: Callable[[StepReport | EvalReport], None]) -> None:
        self._order, self._report = order, report
        self.progress = Progress()

    def run(self) -> bytes:
        """
        Train; give the trained model in the safetensors format.

        Raises:
            UserCodeError: the task raised.
            DistplatError: a part of the platform failed.
        """
        try:
            return self._run()
        except DistplatError:
            raise
        except BaseException as error:  # SystemExit of user code too: it would end only a thread
            step = self.progress.step if self.progress.beats else None
            raise as_user_error(error, self._order.rank, step) from None

    def _run(self) -> bytes:
        order = self._order
        job = order.job
        log_to_stderr()
        if Path(order.search_path).is_dir():  # elsewhere Ray has unpacked it and put us there
            os.chdir(order.search_path)
        torch.set_num_threads(max(1, int(job.scaling.resources()["CPU"])))
        if order.strategy_file is not None:
            order.strategy_file.load()
        strategy = make_strategy(job)
        task = _task_class(order)(**job.task_args)
        prepared = prepare(job, task, "cuda" if job.scaling.use_gpu else "cpu")
        collective = self._collective()
        logger.info(
            "rank %d of %d: %s, %d parameters on %s, %d steps",
            order.rank,
            job.scaling.world,
            job.strategy.name,
            sum(slot.size for slot in prepared.flat.slots),
            prepared.flat.params.device,
            prepared.total_steps,
        )
        loop = join(
            prepared,
            strategy,
            order.rank,
            collective=collective,
            shards=self._shards(prepared),
            report=self._report,
            progress=self.progress,
        )
        try:
            loop.run()
        finally:
            if collective is not None:
                collective.close()
        return saved_model(prepared.flat.model)

    def _collective(self) -> "RayCollective | None":
        order = self._order
        if order.collective is None:
            return None
        from distplat.actors.collective import RayCollective  # only who needs it
        from distplat.actors.group import Settings

        return RayCollective(
            f"{order.run}/{order.attempt}",
            order.collective.backend,
            order.rank,
            order.job.scaling.world,
            Settings(
                order.collective.timeout_s,
                order.job.failure.start_timeout_s,
                order.collective.debug,
            ),
        )

    def _shards(self, prepared: Prepared) -> "RayShards | None":
        if self._order.manager is None:
            return None
        from distplat.actors.shards import RayShards

        return RayShards(self._order, prepared.total_steps)


def _task_class(order: WorkOrder) -> type[Task]:
    if isinstance(order.task, bytes):
        loaded: type[Task] = pickle.loads(order.task)  # noqa: S301  our own driver pickled it
        return loaded
    return load_task_class(order.task, order.search_path)


def saved_model(model: torch.nn.Module) -> bytes:
    """Give a model's state in the safetensors format; copies, so that tensors share no memory."""
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    return save({name: value.contiguous() for name, value in state.items()})
