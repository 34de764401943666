"""Loader processes: forked from a server that has torch, so that none has to import it."""

import subprocess
import sys

SCRIPT = """
import sys
from multiprocessing import get_context

from distplat.strategies.catalog import make_job
from distplat.strategies.training.loader_processes import ready_loaders

if __name__ == "__main__":
    ready_loaders(make_job({
        "name": "loaders", "strategy": "ring", "scaling": {"num_workers": 1}, "steps": 1,
        "optimizer": {"name": "SGD", "lr": 1}, "global_batch_size": 1, "data": {"num_loaders": 1},
    }))()
    look = "import sys; sys.exit(7 if 'torch.utils.data' in sys.modules else 3)"
    child = get_context("forkserver").Process(target=exec, args=(look,))
    child.start()
    child.join()
    sys.exit(child.exitcode)
"""


def test_a_loader_process_has_torch_from_the_start() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], timeout=60, check=False)
    assert found.returncode == 7
