"""Several processes of one run, forked from the test's, as torchrun would start them (gloo)."""
import contextlib
import multiprocessing
import os
import signal
import sys
import traceback

import torch

import distributed
import utils

fork = multiprocessing.get_context("fork")


def as_rank(rank, n, port, output, function, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", TORCHELASTIC_USE_AGENT_STORE="True",
                      TORCHELASTIC_RESTART_COUNT="0")
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # in place of pytest's
    torch.set_num_threads(1)
    status = 0
    try:
        function(*args)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 99
    finally:
        with contextlib.suppress(Exception):
            distributed.stop()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def keep_store(pipe):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    signal.pause()


class Processes:
    """n processes that each call function(*args); what they print is in .out(rank) and .err(rank)."""

    def __init__(self, n, directory, function, *args):
        self.output = directory / f"processes{n}"
        # torchrun holds the store, and outlives its processes; not here, since a fork must not meet the store's threads
        ours, theirs = fork.Pipe()
        self.store = fork.Process(target=keep_store, args=(theirs,), daemon=True)
        self.store.start()
        port = ours.recv()
        self.members = [fork.Process(target=as_rank, args=(rank, n, port, self.output, function, args))
                        for rank in range(n)]
        for member in self.members:
            member.start()

    def wait(self, timeout=300):
        """Their exit statuses; -n for signal n. Kills those that do not end."""
        for member in self.members:
            member.join(timeout)
            if member.is_alive():
                member.kill()
                member.join()
        self.store.kill()
        self.store.join()
        return [member.exitcode for member in self.members]

    def out(self, rank):
        return open(f"{self.output}.out{rank}").read()

    def err(self, rank):
        return open(f"{self.output}.err{rank}").read()


def mains(calls):
    """main(args) of each (script, argv) in turn."""
    for script, argv in calls:
        script.main(script.parse_args(argv))


def command(script, argv):
    """A script with its arguments as from the command line."""
    sys.argv = [script.__file__, *argv]
    utils.run_script(script.parse_args, script.main)
