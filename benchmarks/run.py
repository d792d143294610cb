"""Time the basis and the P-BFGS iteration against their references, side by side on one machine.

basis:  `pca_basis` of a window of snapshots against scikit-learn's full PCA of the same matrix, with the largest
        principal angle between the two spans and to numpy's SVD in float64.
pbfgs:  one P-BFGS iteration of train_pbfgs.py against its own forward + backward and trial forwards timed alone.
save:   the checkpoint of an SGD run of --save-arch (ImageNet's ResNet-50), which a stopped run has to write.

The first two are run in turn (A B A B ...) after a warm-up; the medians, every single time and the ratio are printed
and written as JSON. Run it on an idle machine.

Example:
  python train_sgd.py --datasets digits --arch resnet20 --epochs 80 --save-dir runs/trajectory
  python benchmarks/run.py --save-dir runs/trajectory --json results/cpu-speed/benchmark.json
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import models
import runs
import utils
from subspace import ProjectedBFGS, flat_parameters, frozen_statistics, load_window, pca_basis, snapshot_paths


def parse_args(argv=None):
    description, example = __doc__.strip().split("\n\nExample", 1)
    parser = argparse.ArgumentParser(
        description=description, epilog="example" + example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save-dir", required=True, metavar="DIR",
                        help="where train_sgd.py left the snapshots 0.pt ... of a network with 10 classes")
    parser.add_argument("--arch", default="resnet20", help="their network (default: resnet20)")
    parser.add_argument("--params_end", type=int, default=81, metavar="N", help="snapshots 0 to N - 1 (default: 81)")
    parser.add_argument("--n_components", type=int, default=40, metavar="K", help="dimensions (default: 40)")
    parser.add_argument("--batch-size", type=int, default=1024, metavar="N", help="of the iteration (default: 1024)")
    parser.add_argument("--save-arch", default="resnet50", metavar="ARCH",
                        help="torchvision network of the checkpoint (default: resnet50)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="repetitions (default: 5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    return parser.parse_args(argv)


def seconds(device, function, *args):
    """Wall-clock seconds of function(*args), device work included, and what it returned."""
    start = time.perf_counter()
    result = function(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def angle(P, Q):
    """Largest principal angle (radians) between the row spans of P and Q (k, D)."""
    P, Q = (np.linalg.qr(np.asarray(M, dtype=np.float64).T)[0] for M in (P, Q))
    return float(np.arcsin(min(1.0, np.linalg.norm(Q - P @ (P.T @ Q), 2))))


def basis(args, device):
    """Ours and scikit-learn's seconds for the same basis, and the angles between the spans."""
    from sklearn.decomposition import PCA

    window = load_window(snapshot_paths(args.save_dir, range(args.params_end)), models.get_model(args.arch, 10))
    X, on_device = window.numpy(), window.to(device)
    ours, sklearn = [], []
    for run in range(args.runs + 1):  # the first is the warm-up
        copy = on_device.clone()  # pca_basis uses its window up
        time_ours, (P, _) = seconds(device, pca_basis, copy, args.n_components)
        pca = PCA(n_components=args.n_components, svd_solver="full")
        time_sklearn, _ = seconds(device, pca.fit, X)
        if run:
            ours.append(time_ours)
            sklearn.append(time_sklearn)
    P = P.cpu().double().numpy()
    exact = np.linalg.svd(X - X.mean(0, dtype=np.float64), full_matrices=False)[2][: args.n_components]
    return {
        "window": list(X.shape),
        "n_components": args.n_components,
        "seconds": ours,
        "seconds_sklearn_full": sklearn,
        "ratio_of_medians": statistics.median(sklearn) / statistics.median(ours),
        "angle_to_sklearn_full": angle(P, pca.components_),
        "angle_to_float64_svd": angle(P, exact),
        "angle_of_sklearn_full_to_float64_svd": angle(pca.components_, exact),
        "orthonormality_error": float(np.abs(P @ P.T - np.eye(len(P))).max()),
    }


def pbfgs(args, device):
    """Seconds of a P-BFGS iteration, and of the passes it consists of alone: forward + backward, and its trials."""
    model = models.get_model(args.arch, 10)
    window = load_window(snapshot_paths(args.save_dir, range(args.params_end)), model, device)
    model.to(device).train()
    w = flat_parameters(model)
    P, _ = pca_basis(window, args.n_components)
    optimizer = ProjectedBFGS(w, P)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(args.batch_size, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
    y = torch.randint(10, (args.batch_size,), generator=generator).to(device)

    def trial_loss():
        return F.cross_entropy(model(x), y)

    def update(loss, x, y):
        with frozen_statistics(model), torch.no_grad():
            optimizer.step(loss, trial_loss)

    def forward_backward():
        F.cross_entropy(model(x), y).backward()

    def forwards(count):
        with frozen_statistics(model), torch.no_grad():
            for _ in range(count):
                trial_loss()

    rows = []
    for _ in range(args.runs + 2):  # the first two are the warm-up: the first BFGS update comes in the second
        whole, _ = seconds(device, utils.train_epoch, model, w, [(x, y)], update)
        trials = int(optimizer.counts()["trials_per_step"])
        passes, _ = seconds(device, forward_backward)
        searching, _ = seconds(device, forwards, trials)
        rows.append({"iteration": whole, "trials": trials, "forward_backward": passes, "trial_forwards": searching})
    rows = rows[2:]
    ratios = [row["iteration"] / (row["forward_backward"] + row["trial_forwards"]) for row in rows]
    return {"batch_size": args.batch_size, "runs": rows, "ratios": ratios, "median_ratio": statistics.median(ratios)}


def save(args, device):
    """Seconds to copy network and momentum from the device and write them to --save-dir, flushed to the disk."""
    model = models.get_model(args.save_arch, 1000, "ImageNet").to(device)
    w = flat_parameters(model)
    state = {"model": model.state_dict(), "algorithm": {"momentum_buffer": torch.zeros_like(w)}}
    path = Path(args.save_dir) / ".benchmark.pt"
    times = [seconds(device, runs.save_tensors, path, state)[0] for _ in range(args.runs)]
    size = path.stat().st_size
    path.unlink()
    return {"arch": args.save_arch, "megabytes": size / 1e6, "seconds": times}


def main(args):
    device = utils.pick_device(args.device)
    utils.keep_freed_memory()
    result = {"command": runs.command_line(), "basis": basis(args, device), "pbfgs": pbfgs(args, device),
              "save": save(args, device),
              "versions": runs.versions(), "hardware": runs.hardware(device), "git_revision": runs.git_revision()}
    b, p, s = result["basis"], result["pbfgs"], result["save"]
    print(f"basis {b['window'][0]} x {b['window'][1]:,}, k {args.n_components}: "
          f"{statistics.median(b['seconds']):.3f} s, "
          f"scikit-learn full {statistics.median(b['seconds_sklearn_full']):.3f} s, ratio {b['ratio_of_medians']:.1f}, "
          f"angle {b['angle_to_sklearn_full']:.1e} (to float64 {b['angle_to_float64_svd']:.1e})")
    print(f"P-BFGS iteration, {args.arch}, batch {args.batch_size}: {p['median_ratio']:.3f} times its passes alone "
          f"({', '.join(f'{ratio:.3f}' for ratio in p['ratios'])})")
    print(f"checkpoint of {s['arch']}, {s['megabytes']:.0f} MB: {min(s['seconds']):.2f} to {max(s['seconds']):.2f} s")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        runs.save_json(Path(args.json), result)


if __name__ == "__main__":
    utils.run_script(parse_args, main)
