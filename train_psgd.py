"""Train a network inside the subspace of its SGD trajectory with projected SGD (P-SGD).

Reads the snapshots --params_start to --params_end - 1 that train_sgd.py left in --save-dir, takes their first
--n_components principal directions, and trains from the first snapshot (--start), moving along these directions only.
Writes psgd_args.json, psgd_log.jsonl, psgd_checkpoint.pt, psgd_final.pt and psgd_summary.json.

Example:
  python train_psgd.py --datasets CIFAR10 --arch resnet20 --params_end 81 --n_components 40 --save-dir save_resnet20
"""
import packages  # noqa: F401 - first: it says what is missing

import utils
from dldr import engine
from dldr.subspace import ProjectedSGD


def parse_args(argv=None):
    parser, train = utils.base_parser(__doc__, epochs=40, batch_size=128, lr=1.0,
                                      lr_help="learning rate in the subspace")
    train.add_argument("--momentum", type=utils.nonnegative, default=0.9, metavar="M", help="momentum in the subspace")
    train.add_argument("--milestones", type=int, nargs="*", default=[30, 50], metavar="E",
                       help="epochs after which lr drops to a tenth")
    return utils.check_args(parser, parser.parse_args(argv))


def train(run, args, data, model):
    P = utils.subspace(run, args, data, model)
    psgd = ProjectedSGD(model, P, lr=args.lr, momentum=args.momentum)
    loop = utils.make_loop(args, model, psgd)
    return engine.fit(run, loop, data, schedule=utils.drops(args.milestones), progress=utils.progress_bar(args))


def main(args):
    return utils.run_stage("psgd", args, train)


if __name__ == "__main__":
    utils.run_script(parse_args, main)
