"""Signal handlers as in processes started from a terminal."""

import signal


def reset() -> None:
    """
    Restore the handlers of SIGINT and SIGHUP.

    A background job ignores SIGINT, and a job under nohup ignores SIGHUP. Child processes would
    inherit that, and tests could not send these signals.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
