"""Train a network inside the subspace of its SGD trajectory with projected BFGS (P-BFGS).

Reads the snapshots --params_start to --params_end - 1 that train_sgd.py left in --save-dir, takes their first
--n_components principal directions, and trains from the first of them with BFGS and an Armijo line search on each
mini-batch. With --alpha > 0 it also follows what the subspace leaves out of the gradient (P+-BFGS).
Writes pbfgs_args.json, pbfgs_log.jsonl, pbfgs_checkpoint.pt, pbfgs_final.pt and pbfgs_summary.json.

Example:
  python train_pbfgs.py --datasets CIFAR10 --arch resnet20 --params_end 81 --n_components 40 --save-dir save_resnet20
"""
import torch
import torch.nn.functional as F

import datasets
import distributed
import graphs
import models
import runs
import utils
from subspace import ProjectedBFGS, flat_parameters, frozen_statistics, load_window, make_basis, snapshot_paths


def parse_args(argv=None):
    parser, train = utils.base_parser(__doc__, epochs=20, batch_size=1024, lr=1.0,
                                      lr_help="step length of the line search's first trial, along -B g")
    train.add_argument("--alpha", type=utils.nonnegative, default=0.0, metavar="LR",
                       help="learning rate on the gradient's part outside the subspace (P+-BFGS); 0 stays inside")
    train.add_argument("--gamma", type=utils.nonnegative, default=0.9, metavar="M",
                       help="its momentum, where --alpha > 0")
    utils.add_subspace_flags(parser)
    return utils.check_args(parser, parser.parse_args(argv))


def main(args):
    run = runs.Run("pbfgs", args)
    paths = [] if args.evaluate else snapshot_paths(args.save_dir, utils.window_indices(args))
    if (summary := run.finished(paths)) is not None:
        return summary
    device = utils.set_up(args)
    if not args.evaluate:
        run.take_directory()
    with run.timer("load"):
        data = datasets.from_args(args, device)
        model = models.from_args(args, data.classes, device)
        if args.evaluate:
            return run.evaluate(model, data)
        w = flat_parameters(model)
        memory, sharded = utils.basis_storage(args, w.numel())
        window = load_window(paths, model, device, memory=memory, sharded=sharded)
    with run.timer("basis"):
        P, explained = make_basis(window, args.n_components, args.basis, args.randomseed, sharded)
    run.begin(data, w, snapshots=len(paths), explained=explained)

    pbfgs = ProjectedBFGS(w, P, lr=args.lr, alpha=args.alpha, gamma=args.gamma,
                          max_trials=30 if args.datasets == "ImageNet" else 20)

    capture = graphs.capturer(args.cuda_graphs, model, device, args.datasets)
    # in float32 whatever --half: bfloat16 cannot see small steps
    trial_loss = capture(lambda x, y: F.cross_entropy(model(x), y))

    def update(loss, x, y, weight=None):
        def at_w():  # of several processes, the loss of all their parts
            return trial_loss(x, y) if weight is None else distributed.mean(weight * trial_loss(x, y).double())

        with frozen_statistics(model), torch.no_grad():
            pbfgs.step(float(at_w()) if args.half else loss, at_w)

    return utils.fit(run, model, w, data, passes=capture(utils.training_passes(model, args.half)), update=update,
                     algorithm=pbfgs, schedule=utils.multistep(args.lr, []), statistics=pbfgs.statistics)


if __name__ == "__main__":
    utils.run_script(parse_args, main)
