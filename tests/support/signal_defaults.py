"""Signals as a terminal's processes have them."""

import signal


def reset() -> None:
    """
    Hear SIGINT and SIGHUP again.

    A job in the background ignores SIGINT, one under nohup SIGHUP, and so would all that tests
    start: no test could send them.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
