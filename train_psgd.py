"""Train a network inside the subspace of its SGD trajectory with projected SGD (P-SGD).

Reads the snapshots --params_start to --params_end - 1 that train_sgd.py left in --save-dir, takes their first
--n_components principal directions, and trains from the first of them, moving along these directions only.
Writes psgd_args.json, psgd_log.jsonl, psgd_checkpoint.pt, psgd_final.pt and psgd_summary.json.

Example:
  python train_psgd.py --datasets CIFAR10 --arch resnet20 --params_end 81 --n_components 40 --save-dir save_resnet20
"""
import datasets
import graphs
import models
import runs
import utils
from subspace import ProjectedSGD, flat_parameters, load_window, make_basis, snapshot_paths


def parse_args(argv=None):
    parser, train = utils.base_parser(__doc__, epochs=40, batch_size=128, lr=1.0,
                                      lr_help="learning rate in the subspace")
    train.add_argument("--momentum", type=utils.nonnegative, default=0.9, metavar="M", help="momentum in the subspace")
    train.add_argument("--milestones", type=int, nargs="*", default=[30, 50], metavar="E",
                       help="epochs after which lr drops to a tenth")
    utils.add_subspace_flags(parser)
    return utils.check_args(parser, parser.parse_args(argv))


def main(args):
    run = runs.Run("psgd", args)
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

    psgd = ProjectedSGD(w, P, lr=args.lr, momentum=args.momentum)
    capture = graphs.capturer(args.cuda_graphs, model, device, args.datasets)
    step = capture(psgd.step)
    return utils.fit(run, model, w, data, passes=capture(utils.training_passes(model, args.half)),
                     update=lambda *_: step(key=psgd.param_groups[0]["lr"]), algorithm=psgd,
                     schedule=utils.multistep(args.lr, args.milestones), statistics=psgd.statistics,
                     read_every=args.print_freq if device.type == "cuda" else 1)


if __name__ == "__main__":
    utils.run_script(parse_args, main)
