"""The only training and evaluation loop."""
import contextlib
import math
import random
import signal
import threading
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dldr import distributed
from dldr.errors import Stopped, UserError
from dldr.graphs import eager
from dldr.subspace import ProjectedBFGS

AGREE = 20  # batches between which the ranks tell each other of signals


class StopSignals:
    """Defer SIGINT and SIGTERM to the next batch, where `watch` raises Stopped.

    A second signal after 1 s takes effect immediately; before that a scheduler may have told both the process and its
    parent, which passes it on.
    """

    def __enter__(self):
        self.number, self.since, self.before = None, 0.0, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        now = time.monotonic()
        if self.number and now - self.since > 1:
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
        self.number, self.since = number, self.since or now

    def watch(self, batches, equal=True):
        """The batches, until a signal comes: Stopped before the next one, on several ranks before the same one of all.

        Ranks agree every AGREE batches and at the end, since that costs a collective; unless all have an `equal` number
        of batches at the end only, to which a signal then leads at once.
        """
        for i, batch in enumerate(batches):
            if distributed.world_size() == 1 or equal and i % AGREE == 0:
                self.check()
            elif self.number and not equal:
                break
            yield batch
        self.check()

    def check(self):
        if number := distributed.all_reduce_max(self.number or 0):
            raise Stopped(number)


@contextlib.contextmanager
def cudnn_benchmark(on):
    """Without `on`, cuDNN does not time its algorithms for the shapes seen inside, which come seldom."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before and on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def seed_epoch(seed, epoch):
    """Seed torch, numpy and Python, for dropout and the like, from (seed, epoch, rank)."""
    entropy = [seed, epoch, *([distributed.rank()] if distributed.rank() else [])]
    number = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def forward(model, x, half=False):
    """Logits (N, classes), float32 with `half` too, where the network itself runs in bfloat16 autocast."""
    if not half:
        return model(x)
    with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):  # no casts kept in a captured graph
        return model(x).float()


class Loop:
    """A network, the optimizer of its parameters, and how its passes run.

    `optimizer`: torch's, ProjectedSGD or ProjectedBFGS. `half`: bfloat16 autocast of the passes, but not of the losses
    that a line search compares. `accumulate`: mini-batches whose gradients are averaged before a step; a line
    search uses the last of them. `read_every`: iterations between reading losses from the device, which waits for it;
    P-BFGS needs 1. `capture`: see `graphs.capturer`. `network`: the model as the gradient passes call it
    (DistributedDataParallel). `top5`: of the evaluations, see `evaluate`.

    The loss is the cross-entropy, summed over this rank's samples and divided by the size of the whole mini-batch, so
    that losses and gradients add up over the ranks.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, half=False, accumulate=1, read_every=1,
                 capture=eager, network=None, top5=False):
        self.model, self.network, self.optimizer = model, network or model, optimizer
        self.half, self.accumulate, self.top5 = half, accumulate, top5
        self.searches = isinstance(optimizer, ProjectedBFGS)
        self.read_every = 1 if self.searches else read_every
        self.device = next(model.parameters()).device
        # parameters that a step's passes skip have no gradient then, whatever the steps before (a resumed run has
        # none); but a captured graph needs the gradients where they are
        self.set_to_none = capture is eager
        self.passes = capture(self._passes)
        self.step = capture(lambda lr: self.optimizer.step())  # a captured graph holds for one lr
        # torch's channels_last batch norm sums in float32 on a CPU: relative error of the loss of 1,024 images 4e-5, of
        # NCHW's 3e-8; a line search compares losses
        self.nchw = self.searches and self.device.type == "cpu"
        # in float32 whatever `half`: bfloat16 cannot see small steps
        self.trial_loss = capture(lambda x, y, size: F.cross_entropy(self.model(x), y, reduction="sum") / size)

    def _passes(self, x, y, size, group) -> Tensor:
        """Loss and number of correct predictions, as (2,); adds the gradient of loss / group to the parameters'."""
        logits = forward(self.network, x, self.half)
        loss = F.cross_entropy(logits, y, reduction="sum") / size
        (loss / group if group > 1 else loss).backward()
        return torch.stack([loss.detach(), (logits.argmax(1) == y).sum()])

    def update(self, x, y, size, loss):
        """A step from the parameters' gradients; (x, y) and `loss` are those of the last mini-batch."""
        if self.searches:
            self.optimizer.search(None if self.half else loss,
                                  lambda: distributed.all_reduce(self.trial_loss(x, y, size).double()))
        else:
            self.step(self.optimizer.param_groups[0]["lr"])
        self.optimizer.zero_grad(set_to_none=self.set_to_none)

    def train_epoch(self, batches, *, sizes=None, after_iteration=None, progress=None) -> dict:
        """Train on the mini-batches (x, y); mean loss and accuracy (%) of the passes before each step, and samples.

        `sizes`: of the whole mini-batches, of which `batches` are this rank's parts; needed if `batches` has no length.
        after_iteration(i) is called after mini-batch i = 1, 2, ... A shorter group at the end of the epoch counts too.
        Raises FloatingPointError when it reads a loss that is not finite: before the step that would use it if
        read_every is 1.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=self.set_to_none)
        sizes = sizes or [len(y) for _, y in batches]
        n, loss = len(sizes), None
        record = torch.zeros(n, 2, dtype=torch.float64, device=self.device)
        loss_sum = correct = seen = read = 0
        for i, (x, y) in enumerate(batches):
            group = min(self.accumulate, n - i // self.accumulate * self.accumulate)
            complete = (i + 1) % self.accumulate == 0 or i + 1 == n
            if self.nchw:
                x = x.contiguous()
            sync = contextlib.nullcontext if complete else getattr(self.network, "no_sync", contextlib.nullcontext)
            with sync(), cudnn_benchmark(sizes[i] == sizes[0]):
                record[i] = self.passes(x, y, sizes[i], group)
            if (i + 1) % self.read_every == 0 or i + 1 == n:
                for loss, right in distributed.all_reduce(record[read:i + 1]).tolist():
                    if not math.isfinite(loss):
                        raise FloatingPointError(f"the training loss is {loss} at iteration {read + 1}")
                    loss_sum, correct, seen = loss_sum + loss * sizes[read], correct + right, seen + sizes[read]
                    read += 1
                if progress is not None:
                    progress.set_postfix(loss=f"{loss_sum / seen:.4f}", accuracy=f"{100 * correct / seen:.2f}%",
                                         refresh=False)
            if complete:
                self.update(x, y, sizes[i], loss)
            if after_iteration:
                after_iteration(i + 1)
            if progress is not None:
                progress.update()
        return {"loss": loss_sum / seen, "accuracy": 100 * correct / seen, "samples": seen}


@torch.no_grad()  # not inference_mode: a network may keep a tensor of the pass
def evaluate(model, batches, half=False, top5=False) -> dict:
    """Mean loss and accuracy (%) of the model in eval mode over all ranks' `batches`, read from the device once.

    With `top5` also the share (%) of samples whose class is among the five largest logits, as "top5".
    """
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=next(model.parameters()).device)  # loss, correct, in five, n
    with cudnn_benchmark(False):
        for x, y in batches:
            logits = forward(model, x, half)
            totals[0] += F.cross_entropy(logits, y, reduction="sum")
            totals[1] += (logits.argmax(1) == y).sum()
            if top5:
                totals[2] += (logits.topk(min(5, logits.shape[1])).indices == y[:, None]).sum()
            totals[3] += len(y)
    loss, correct, in_five, seen = distributed.all_reduce(totals).tolist()
    result = {"loss": loss / seen, "accuracy": 100 * correct / seen}
    return {**result, "top5": 100 * in_five / seen} if top5 else result


def fit(run, loop, data, *, schedule=None, after_iteration=None, progress=None) -> dict:
    """Train for the epochs of a `checkpoint.Run`: evaluate, log and checkpoint after each; returns the summary.

    schedule(epoch) is the factor on the initial learning rate (default: 1). after_iteration(epoch, i) follows each
    mini-batch.
    progress(total, text) makes a progress bar, a context manager with update and set_postfix. What the optimizer's
    statistics() returns is added to the log of the epoch.
    """
    model, optimizer = loop.model, loop.optimizer
    progress = progress or (lambda total, text: contextlib.nullcontext())
    first = run.start_or_resume(model, optimizer)
    if not distributed.agree(first):
        raise UserError(f"the ranks find different checkpoints: {run.flag} must be one directory for all machines")
    if schedule:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule, last_epoch=first - 1)
    good = run.state(first, model, optimizer)
    with StopSignals() as signals:
        for epoch in range(first, run.epochs):
            seed_epoch(run.seed, epoch)
            lr, before = optimizer.param_groups[0]["lr"], run.seconds["train"]
            hook = after_iteration and (lambda i, epoch=epoch: after_iteration(epoch, i))
            try:
                with run.timer("train"), progress(len(data.train), f"epoch {epoch + 1}/{run.epochs}") as bar:
                    train = loop.train_epoch(signals.watch(data.train.epoch(epoch)), sizes=data.train.sizes,
                                             after_iteration=hook, progress=bar)
                distributed.broadcast_buffers(model)
                with run.timer("eval"):
                    test = evaluate(model, signals.watch(data.test.epoch(0), equal=False), loop.half, loop.top5)
                if not math.isfinite(test["loss"]):  # where the last step of the epoch was the fatal one
                    raise FloatingPointError(f"the test loss is {test['loss']} after the last iteration")
                statistics = optimizer.statistics() if hasattr(optimizer, "statistics") else {}
                run.log_epoch(epoch, lr, train, test, run.seconds["train"] - before, statistics)
            except Stopped as stop:
                path = run.save("checkpoint.pt", good)
                raise Stopped(stop.number, f"in epoch {epoch + 1}; the state before it is in {path}; to resume, repeat "
                              "the command with --resume auto") from stop
            except FloatingPointError as error:
                path = run.save("checkpoint.pt", good)
                raise UserError(
                    f"epoch {epoch + 1}: {error}; stopped there, the state before this epoch is in {path}; "
                    f"try a smaller --lr{', or without --half,' if loop.half else ''} in another {run.flag}"
                ) from error
            except Exception:  # on any other error keep the last epoch's checkpoint
                with contextlib.suppress(UserError):  # and the error, if the disk was the reason
                    run.save("checkpoint.pt", good)
                raise
            if schedule:
                scheduler.step()
            good = run.state(epoch + 1, model, optimizer)
            if (epoch + 1) % run.save_every == 0 or epoch + 1 == run.epochs:
                run.save("checkpoint.pt", good)
        run.save("final.pt", model.state_dict())
        summary = run.finish(loop.device)
        if signals.number:  # signal arrived after training: still exit non-zero
            raise Stopped(signals.number, "after its last epoch; the run is finished")
        return summary
