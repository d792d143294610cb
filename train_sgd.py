"""Train a network normally and save its parameters after every epoch: the sampling stage of DLDR.

Writes the snapshots 0.pt (initialisation), 1.pt, ... to --save-dir, and sgd_args.json, sgd_log.jsonl,
sgd_checkpoint.pt, sgd_final.pt and sgd_summary.json. train_pbfgs.py and train_psgd.py read the snapshots.

Example:
  python train_sgd.py --datasets CIFAR10 --arch resnet20 --epochs 150 --save-dir save_resnet20
"""
import packages  # noqa: F401 - first: it says what is missing

import torch

import utils
from dldr import distributed, engine
from dldr.errors import UserError
from dldr.snapshots import is_finite
from dldr.subspace import flat_parameters

DEFAULTS = {  # of data sets that have their own
    "CIFAR100": {"milestones": [150]},
    "ImageNet": {"epochs": 90, "batch_size": 256, "milestones": [30, 60], "samples_per_epoch": 6},
}


def parse_args(argv=None):
    parser, train = utils.base_parser(
        __doc__, epochs=200, batch_size=128, lr=None, lr_help="learning rate (default: 0.1 for sgd, 0.001 for adam)",
        subspace=False,
    )
    train.add_argument("--optimizer", choices=("sgd", "adam"), default="sgd", help="optimiser")
    train.add_argument("--momentum", type=utils.nonnegative, default=0.9, metavar="M", help="momentum of sgd")
    train.add_argument("--wd", "--weight-decay", dest="weight_decay", type=utils.nonnegative, default=1e-4, metavar="W",
                       help="weight decay")
    train.add_argument("--milestones", type=int, nargs="*", default=[100, 150], metavar="E",
                       help="epochs after which lr drops to a tenth (CIFAR100: 150; ImageNet: 30 60)")
    train.add_argument("--pretrained", nargs="?", const=True, default=False, metavar="FILE",
                       help="start from this state dict, or without FILE from torchvision's weights (ImageNet only)")
    train.add_argument("--samples-per-epoch", type=utils.count, default=1, metavar="S",
                       help="snapshots per epoch: 1, at its end, or after iterations 1, c + 1, ..., (S - 1) c + 1 with "
                       "c = (iterations - 1) // (S - 1) (ImageNet: 6)")
    train.add_argument("--snapshot-dtype", choices=("float32", "bfloat16"), default="float32",
                       help="how the parameters in snapshots are stored, those of the initialisation aside")
    args = parser.parse_args(argv)
    parser.set_defaults(lr={"sgd": 0.1, "adam": 0.001}[args.optimizer], **DEFAULTS.get(args.datasets, {}))
    args = parser.parse_args(argv)
    if args.pretrained is True and args.datasets != "ImageNet":
        parser.error(f"--pretrained: there are no weights for --datasets {args.datasets}, only for ImageNet")
    return utils.check_args(parser, args)


def sampling_iterations(iterations, samples):
    """The iterations of an epoch, counted from 1, after which a snapshot is saved; the last one if samples is 1."""
    if samples == 1:
        return [iterations]
    if samples > iterations:
        raise UserError(f"--samples-per-epoch {samples}: an epoch has {iterations} iterations only")
    step = (iterations - 1) // (samples - 1)
    return [1 + j * step for j in range(samples)]


def make_optimizer(args, parameters):
    """A parameter without gradient does not move, under weight decay either."""
    cuda = parameters[0].is_cuda
    if args.optimizer == "sgd":  # not fused: that fails where a parameter gets its first gradient late
        own = {"foreach": cuda}  # sets the gradients to zero in one launch, too
        optimizer = torch.optim.SGD(parameters, args.lr, args.momentum, weight_decay=args.weight_decay, **own)
    else:
        own = {"fused": cuda, "capturable": cuda}
        optimizer = torch.optim.Adam(parameters, args.lr, weight_decay=args.weight_decay, **own)

    @optimizer.register_load_state_dict_pre_hook
    def keep_implementation(_, state):  # a checkpoint from another device has that device's
        for group in state["param_groups"]:
            group.update(own)

    return optimizer


def train(run, args, data, model):
    w = flat_parameters(model)
    due = sampling_iterations(len(data.train), args.samples_per_epoch)
    snapshots = 1 + max(0, args.epochs - args.start_epoch) * len(due)
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    run.begin(data, w, snapshots=snapshots, writes=snapshots * size)
    parameters = {name for name, _ in model.named_parameters()}
    watched = {name for name, buffer in model.named_buffers() if is_finite(buffer)}  # a mask may hold -inf

    def save_snapshot(epoch, iteration):
        if iteration in due:
            state = model.state_dict()
            everything = torch.cat([w, *(buffer.reshape(-1).to(w) for name, buffer in model.named_buffers()
                                         if name in watched)])
            if distributed.all_reduce_max(int(not is_finite(everything))):  # losses may be read later
                raise FloatingPointError(f"the network is not finite after iteration {iteration}")
            if args.snapshot_dtype == "bfloat16":
                state = {name: value.bfloat16() if name in parameters else value for name, value in state.items()}
            run.save_snapshot(epoch * len(due) + due.index(iteration) + 1, state)

    if not run.checkpoint_to_resume():
        run.save_snapshot(args.start_epoch * len(due), model.state_dict())
    optimizer = make_optimizer(args, list(model.parameters()))
    loop = utils.make_loop(args, model, optimizer, distributed.data_parallel(model))
    warm_up = args.arch in ("resnet110", "resnet1202")
    return engine.fit(run, loop, data, schedule=utils.drops(args.milestones, warm_up), after_iteration=save_snapshot,
                      progress=utils.progress_bar(args))


def main(args):
    return utils.run_stage("sgd", args, train)


if __name__ == "__main__":
    utils.run_script(parse_args, main)
