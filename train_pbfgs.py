"""Train a network inside the subspace of its SGD trajectory with projected BFGS (P-BFGS).

Reads the snapshots --params_start to --params_end - 1 that train_sgd.py left in --save-dir, takes their first
--n_components principal directions, and trains from the first snapshot (--start) with BFGS and an Armijo line search on
each mini-batch. With --alpha > 0 it also follows what the subspace leaves out of the gradient (P+-BFGS).
Writes pbfgs_args.json, pbfgs_log.jsonl, pbfgs_checkpoint.pt, pbfgs_final.pt and pbfgs_summary.json.

Example:
  python train_pbfgs.py --datasets CIFAR10 --arch resnet20 --params_end 81 --n_components 40 --save-dir save_resnet20
"""
import packages  # noqa: F401 - first: it says what is missing

import utils
from dldr import distributed, engine


def parse_args(argv=None):
    parser, train = utils.base_parser(__doc__, epochs=20, batch_size=1024, lr=1.0,
                                      lr_help="step length of the line search's first trial, along -B g")
    train.add_argument("--alpha", type=utils.nonnegative, default=0.0, metavar="LR",
                       help="learning rate on the gradient's part outside the subspace (P+-BFGS); 0 stays inside")
    train.add_argument("--gamma", type=utils.nonnegative, default=0.9, metavar="M",
                       help="momentum of the residual step (with --alpha > 0)")
    parser.set_defaults(conv_tf32="off")  # rounding shifts trials: 1.15 -> 1.32 a step
    return utils.check_args(parser, parser.parse_args(argv))


def train(run, args, data, model):
    P = utils.subspace(run, args, data, model)
    pbfgs = distributed.DistributedBFGS(model, P, lr=args.lr, alpha=args.alpha, gamma=args.gamma,
                                        max_trials=30 if args.datasets == "ImageNet" else 20)
    loop = utils.make_loop(args, model, pbfgs)
    return engine.fit(run, loop, data, progress=utils.progress_bar(args))


def main(args):
    return utils.run_stage("pbfgs", args, train)


if __name__ == "__main__":
    utils.run_script(parse_args, main)
