"""What the crash tests run in processes of their own, to be killed there."""
import os
import signal
import time

from runs import SCRIPTS, run

from dldr import checkpoint, files
from dldr.errors import Stopped


def at_write(n, action):
    """Have action(descriptor) done before every write is flushed, and told as its second argument if it is the n-th."""
    real, calls = os.fsync, 0

    def fsync(descriptor):
        nonlocal calls
        calls += 1
        action(descriptor, calls == n)
        real(descriptor)

    files.os.fsync = fsync


def run_and_die_in_write(method, argv, n):
    """The n-th write to the disk stops half way through the file, with the process."""

    def die(descriptor, now):
        if now:
            if os.fstat(descriptor).st_mode & 0o100000:  # a file, not its directory
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    at_write(n, die)
    run(method, argv)


def run_on_slow_disk(method, argv, n):
    """Every write to the disk takes a while; in the n-th comes a SIGTERM."""

    def wait(descriptor, now):
        if now:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)

    at_write(n, wait)
    try:
        run(method, argv)
    except Stopped as stop:
        os._exit(128 + stop.number)


def hold_lock(method, argv, ready):
    """Take the directory of a run, say so, and sit on it."""
    args = SCRIPTS[method].parse_args(argv)
    taken = checkpoint.Run(method, vars(args), changeable=())
    taken.prepare_directory()
    ready.set()
    signal.pause()
