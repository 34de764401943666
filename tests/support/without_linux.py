"""
Simulate macOS, then run command lines: `without_linux.py '[["list"], ["--help"]]'`.

Libraries are imported first, as their Linux builds need Linux: only code of distplat is tested. The
last line of the output is the list of exit codes as JSON.
"""

import asyncio  # noqa: F401  before `epoll` is removed
import json
import multiprocessing  # noqa: F401
import os
import platform
import select
import signal
import sys
import sysconfig
from importlib import import_module

LIBRARIES = (
    *("ray", "ray.job_submission", "requests", "aiohttp", "psutil", "typer", "pydantic", "yaml"),
    *("rich.table", "rich.console", "numpy", "cloudpickle", "fsspec"),
)
LINUX_ONLY = {
    os: (
        *("memfd_create", "eventfd", "pidfd_open", "sched_getaffinity", "sched_setaffinity"),
        *("O_TMPFILE", "O_PATH", "O_DIRECT", "O_NOATIME", "posix_fallocate", "posix_fadvise"),
        *("setns", "unshare", "splice", "copy_file_range", "pipe2", "fdatasync", "getrandom"),
    ),
    signal: ("SIGRTMIN", "SIGRTMAX", "SIGPWR", "SIGPOLL", "SIGSTKFLT", "SIGCLD", "sigtimedwait"),
    select: ("epoll", "EPOLLIN"),
}
SYMBOLS = ("prctl", "syscall", "mallopt", "malloc_trim")


def simulate_macos() -> None:
    """Remove Linux APIs, and refuse access to /proc."""
    for name in LIBRARIES:
        import_module(name)
    sysconfig.get_config_vars()  # reads a file named after the system
    for module, names in LINUX_ONLY.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    sys.platform = "darwin"
    platform.system = lambda: "Darwin"
    sys.addaudithook(_refuse)


def _refuse(event: str, args: tuple[object, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir") and str(args[0]).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", str(args[0]))
    if event == "ctypes.dlsym" and args[1] in SYMBOLS:
        raise AttributeError(args[1])


if __name__ == "__main__":
    simulate_macos()
    from distplat.cli.main import run

    codes = [run(command) for command in json.loads(sys.argv[1])]
    try:
        import distplat.actors.memory.futex  # noqa: F401
    except AttributeError:
        codes.append(-1)  # proves that the simulation has an effect
    print(json.dumps(codes))
