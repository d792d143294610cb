"""Processes for tests: single ones to be killed, or the ranks of one run as torchrun would start them (gloo).

They are forked from a server that has imported everything and run nothing: they start in milliseconds, and inherit no
CUDA context or autograd threads from the test. What they call must be a function of a module.
"""
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import sys
from unittest import mock

import cheap
import torch
import torch._dynamo  # which the first optimizer imports
import torchvision  # noqa: F401
from runs import SCRIPTS, run

import utils
from dldr import distributed, engine

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["processes", "crash"])
cheap.DIGITS()
gc.freeze()  # a collection would copy every page that the server has filled, which takes a second


def serve():
    """Start the server."""
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # where it looks for its imports
        multiprocessing.forkserver.ensure_running()


def start(target, *args):
    """A process that calls target(*args)."""
    serve()
    process = context.Process(target=target, args=args)
    process.start()
    return process


def finish(target, *args, status=0):
    process = start(target, *args)
    process.join()
    assert process.exitcode == status


class Ranks:
    """n processes that each call function(*args); what they print is in .out(rank) and .err(rank)."""

    def __init__(self, n, directory, function, *args):
        self.output = directory / f"ranks{n}"
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.members = [start(as_rank, rank, n, self.store.port, self.output, function, *args) for rank in range(n)]

    def wait(self, timeout=300):
        """Their exit statuses; -n for signal n. Kills those that do not end."""
        for member in self.members:
            member.join(timeout)
            if member.is_alive():
                member.kill()
                member.join()
        self.store = None
        return [member.exitcode for member in self.members]

    def out(self, rank):
        return open(f"{self.output}.out{rank}").read()

    def err(self, rank):
        return open(f"{self.output}.err{rank}").read()


# ------------------------------------------------------------------------------------------------ what they may call


def as_rank(rank, n, port, output, function, *args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", TORCHELASTIC_USE_AGENT_STORE="True",
                      TORCHELASTIC_RESTART_COUNT="0")
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    function(*args)
    distributed.destroy()


def run_all(calls):
    """`run` of each (method, argv) in turn."""
    for method, argv in calls:
        run(method, argv)


def run_with_one_network(calls):
    """The same; each time every rank must end with the same network, bit for bit."""
    for method, argv in calls:
        def train(run, args, data, model, method=method):
            SCRIPTS[method].train(run, args, data, model)
            state = torch.cat([value.reshape(-1).double() for value in model.state_dict().values()])
            assert torch.equal(distributed.broadcast(state.clone()), state), (method, args)

        utils.run_stage(method, SCRIPTS[method].parse_args(argv), train)


def without_evaluation(function, *args):
    """function(*args), where the test set would take most of the time."""
    engine.evaluate = lambda *_, **__: {"loss": 0.0, "accuracy": 0.0}
    function(*args)


def command_without_torchrun(*args):
    """`command`, where only the environment is left of it."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    command(*args)


def command(method, argv):
    """A script with its arguments as from the command line."""
    sys.argv = [SCRIPTS[method].__file__, *argv]
    utils.run_script(SCRIPTS[method].parse_args, SCRIPTS[method].main)
