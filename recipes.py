"""What each table trains, as data: a new table is a new row of TABLES. Standard library only.

python recipes.py list            the tables and what they need
python recipes.py table NAME      the commands of a table, one per line, quoted for the shell; run.sh runs them
python recipes.py publish NAME    copy the logs and summaries of its runs, no weights, to where its report is made

Environment: SCALE (full, tenth or cpu); SEEDS, CORRUPT, MODELS replace the seeds, label noise, network of every row;
FLAGS are added to each training command; PRETRAINED=FILE has the weights to fine-tune; SAVE_ROOT is where runs lie
(default: runs, for the demo this directory).
"""
import argparse
import os
import re
import shlex
import shutil
from collections import namedtuple
from itertools import product
from pathlib import Path

# Flags of all stages (data) and of each; the window's start and step, one past its end, and its components k;
# minutes of a run by method, see NEEDS; gb: size of the snapshots of one sampling run.
Setting = namedtuple("Setting", "arch data sgd psgd pbfgs window end k minutes gb")
CIFAR10 = Setting("resnet20", "--datasets CIFAR10", sgd="--epochs 150", psgd="--epochs 40 --batch-size 128",
                  pbfgs="--epochs 20 --batch-size 1024", window="--params_start 0", end=81, k=40,
                  minutes={"sgd": 95, "psgd": 28, "pbfgs": 35}, gb=0.17)
SMALL = Setting("resnet8", "--datasets CIFAR10 --smalldatasets 0.2", sgd="--epochs 30 --milestones 20 27",
                psgd="--epochs 20 --batch-size 128 --milestones 12 18", pbfgs="--epochs 10 --batch-size 256",
                window="--params_start 0", end=21, k=15, minutes={"sgd": 2.3, "psgd": 1.5, "pbfgs": 1}, gb=0.01)
SETTINGS = {
    ("CIFAR10", "full"): CIFAR10,
    ("CIFAR10", "tenth"): CIFAR10._replace(  # with as many steps of P-BFGS as at full size
        data="--datasets CIFAR10 --smalldatasets 0.1", pbfgs="--epochs 98 --batch-size 512",
        minutes={"sgd": 90, "psgd": 30, "pbfgs": 95}),
    ("CIFAR10", "cpu"): SMALL,
    ("CIFAR100", "full"): CIFAR10._replace(arch="resnet32", data="--datasets CIFAR100", sgd="--epochs 200", end=101,
                                           minutes={"sgd": 215, "psgd": 48, "pbfgs": 60}, gb=0.38),
    ("CIFAR100", "cpu"): SMALL._replace(data="--datasets CIFAR100 --smalldatasets 0.2"),
    ("zoo", "full"): CIFAR10._replace(
        arch="vgg11 densenet121 efficientnet googlenet inceptionv3 mobilenet nasnet seresnet18 shufflenetv2 squeezenet "
        "xception", data="--datasets CIFAR100", sgd="--epochs 200", end=101, minutes={}, gb=8.2),
    # SGD on the first tenth, all of whose snapshots are the window; P-SGD on the full training set
    ("transfer", "full"): CIFAR10._replace(
        arch="resnet8", sgd="--epochs 30 --smalldatasets 0.1", psgd="--epochs 3 --allow-mismatch smalldatasets", end=31,
        minutes={"sgd": 15, "psgd": 9}, gb=0.01),
    ("ImageNet", "full"): CIFAR10._replace(  # every second snapshot of the first 40 epochs: 121
        arch="resnet18", data="--datasets ImageNet", sgd="--epochs 90 --batch-size 256 --samples-per-epoch 6",
        pbfgs="--epochs 4 --batch-size 256", window="--params_start 0 --params_step 2", end=241, minutes={}, gb=25.4),
    # Every second snapshot from 1.pt on, of the first 5, 10 and 15 epochs: 15, 30 and 45. The learning rate never
    # drops, so one run holds all three. The release asks for k = 30 each time, but n snapshots have n - 1 components:
    # the first two windows have 14 and 29, and only the third can be as released.
    ("finetune", "full"): CIFAR10._replace(
        arch="resnet18", data="--datasets ImageNet", pbfgs="--epochs 1 --batch-size 256",
        sgd="--pretrained --lr 0.005 --epochs 15 --batch-size 256 --samples-per-epoch 6",
        window="--params_start 1 --params_step 2", minutes={}, gb=4.3),
    ("digits", "full"): CIFAR10._replace(
        arch="resnet8", data="--datasets digits", sgd="--epochs 60 --milestones 45",
        pbfgs="--epochs 30 --batch-size 64", end=46, k=15, minutes={"sgd": 5, "psgd": 3, "pbfgs": 5}, gb=0.02),
}

# A run: script, the run whose snapshots it reads, flags. _endE and _kK after its name replace end and k.
WINDOW = "{window} --params_end {end} --n_components {k}"
RUNS = {
    "sgd": ("train_sgd.py", None, "{sgd}"),
    "sgd_twice": ("train_sgd.py", None, "{sgd} --samples-per-epoch 2"),
    "adam": ("train_sgd.py", None, "{sgd} --optimizer adam"),
    "psgd": ("train_psgd.py", "sgd", "{psgd} " + WINDOW),
    "psgd_spherical": ("train_psgd.py", "sgd", "{psgd} --basis spherical " + WINDOW),
    "psgd_random": ("train_psgd.py", "sgd", "{psgd} --basis random " + WINDOW),
    "psgd_snapshots": ("train_psgd.py", "sgd", "{psgd} --basis snapshots " + WINDOW),
    "psgd_second": ("train_psgd.py", "sgd", "{psgd} --params_step 2 " + WINDOW),
    "psgd_twice": ("train_psgd.py", "sgd_twice", "{psgd} " + WINDOW),
    "pbfgs": ("train_pbfgs.py", "sgd", "{pbfgs} " + WINDOW),
    "trajectory": ("trajectory.py", "sgd", WINDOW + " --runs {group}/psgd_k{k} {group}/pbfgs_k{k} "
                                                 "--json {group}/trajectory.json --figure {group}/trajectory.png"),
}

TABLES = [  # name, setting, scales, label noise, seeds, runs
    ("demo", "CIFAR10", "full", "0.2", "1", "sgd pbfgs psgd"),
    ("quick", "digits", "full", "0", "1", "sgd pbfgs psgd"),
    ("cifar10", "CIFAR10", "full cpu", "0", "1 2 3", "sgd adam psgd_k{k} pbfgs_k{k}"),
    ("cifar10", "CIFAR10", "tenth", "0", "1 2 3", "sgd psgd_k40 pbfgs_k40"),
    ("cifar10", "CIFAR10", "tenth", "0", "1", "adam"),
    ("cifar100", "CIFAR100", "full cpu", "0", "1 2 3", "sgd adam psgd_k{k} pbfgs_k{k}"),
    ("noise", "CIFAR10", "full", "0 0.1 0.2 0.4", "1 2 3", "sgd psgd_k5 psgd_k15 psgd_k25 psgd_k40 pbfgs_k40"),
    ("noise", "CIFAR10", "tenth", "0 0.4", "1 2 3", "sgd psgd_k40 pbfgs_k40"),
    ("noise", "CIFAR10", "tenth", "0.2", "1", "sgd psgd_k40 pbfgs_k40"),
    ("noise", "CIFAR10", "cpu", "0 0.2 0.4", "1 2 3", "sgd psgd_k15 pbfgs_k15"),
    ("dims", "CIFAR10", "full", "0", "1 2 3",
     "sgd psgd_k3 psgd_k5 psgd_k6 psgd_k9 psgd_k12 psgd_k15 psgd_k20 psgd_k25 psgd_k40"),
    ("dims", "CIFAR10", "tenth", "0", "1", "sgd psgd_k5 psgd_k15 psgd_k25 psgd_k40"),
    ("dims", "CIFAR10", "cpu", "0", "1 2 3", "sgd psgd_k3 psgd_k5 psgd_k10 psgd_k15 psgd_k20"),
    ("basis", "CIFAR10", "full cpu", "0", "1 2 3", "sgd psgd_k{k} psgd_random_k{k} psgd_snapshots_k{k}"),
    ("basis", "CIFAR10", "tenth", "0", "1", "sgd psgd_k3 psgd_k40 psgd_spherical_k3 psgd_spherical_k15 "
     "psgd_spherical_k40 psgd_random_k40 psgd_snapshots_k40"),
    ("sampling", "CIFAR10", "full", "0", "1 2 3", "sgd psgd_end21_k15 psgd_end41_k15 psgd_end61_k15 psgd_end81_k15 "
     "psgd_end101_k15 psgd_second_k15 sgd_twice psgd_twice_end161_k15"),
    ("sampling", "CIFAR10", "cpu", "0", "1 2 3", "sgd psgd_end11_k10 psgd_end16_k10 psgd_end21_k10 psgd_second_k10 "
     "sgd_twice psgd_twice_end41_k10"),
    ("trajectory", "CIFAR10", "full cpu", "0", "1 2 3", "sgd psgd_k{k} pbfgs_k{k} trajectory"),
    ("zoo", "zoo", "full", "0", "1", "sgd pbfgs_k40 psgd_k40"),
    ("transfer", "transfer", "full", "0", "1 2 3", "sgd psgd_k15"),
    ("imagenet", "ImageNet", "full", "0", "1", "sgd pbfgs_k120"),
    ("finetune", "finetune", "full", "0", "1", "sgd pbfgs_end31_k14 pbfgs_end61_k29 pbfgs_end91_k30"),
]
ABOUT = {
    "demo": "the release's demo: SGD, P-BFGS and P-SGD under 20% label noise (CORRUPT=0: without)",
    "quick": "the same on scikit-learn's digits, ResNet-8; no download",
    "cifar10": "SGD, Adam, P-SGD and P-BFGS",
    "cifar100": "the same on CIFAR-100; ResNet-32 (cpu: ResNet-8)",
    "noise": "P-SGD and P-BFGS against label noise",
    "dims": "P-SGD against the number of components",
    "basis": "principal directions (tenth: spherical ones too), random ones, the span of snapshots",
    "sampling": "P-SGD against the window's end and density",
    "trajectory": "how far SGD strays from the subspace; the paths over the loss surface",
    "zoo": "SGD, P-BFGS and P-SGD of eleven other networks (MODELS) on CIFAR-100",
    "transfer": "the subspace of a tenth of CIFAR-10, ResNet-8, trained in on all of it",
    "imagenet": "ResNet-18: 90 epochs of SGD, 4 of P-BFGS in 120 dimensions",
    "finetune": "pretrained ResNet-18: 5, 10, 15 epochs of SGD, 1 of P-BFGS in the subspace of each",
}
NEEDS = """
Disk: the snapshots; beside them 5 GB for the packages, 0.4 GB for each CIFAR, 150 GB for ImageNet. Memory: at most 5 GB
for CIFAR's ResNets at SCALE=full (P-BFGS at batch 1024), 3 GB at tenth and cpu; the others have not been measured.
Hours: sums over single runs timed on two CPU cores. full: a Xeon with AMX and FLAGS=--half, P-BFGS in float32 (an EPYC
in float32: about 4 for the demo); CIFAR-100 by its multiply-adds; others: an EPYC (tenth, transfer
and quick: one thread, beside other work). An H100 takes 1.2 s for an epoch of SGD with ResNet-20 on all of CIFAR-10.
?: not timed, needs a CUDA GPU."""

# ----------------------------------------------------------------------------------------------- from rows to commands

PlannedRun = namedtuple("PlannedRun", "command directory report minutes gb")
ONE_DIRECTORY = {"demo": "save_labelnoise{c}_{arch}", "quick": "quick"}  # for all stages, as in the release


def env(name, default=""):
    return os.environ.get(name) or default


def planned_runs(table, scale):
    """The `PlannedRun`s of a table; one that several rows ask for comes once."""
    root, found = Path(env("SAVE_ROOT", "." if table == "demo" else "runs")), {}
    for _, data, _, noise, seeds, names in [row for row in TABLES if row[0] == table and scale in row[2].split()]:
        setting = SETTINGS[data, scale]
        columns = env("SEEDS", seeds), env("CORRUPT", noise), env("MODELS", setting.arch), names.format(k=setting.k)
        for seed, c, arch, run in product(*map(str.split, columns)):
            kind, end, k = re.fullmatch(r"(\w+?)(?:_end(\d+))?(?:_k(\d+))?", run).groups()
            script, source, flags = RUNS[kind]
            network = arch.rsplit(":", 1)[-1]  # of FILE.py:FUNCTION
            group, report = root / scale / f"{data}_{network}_c{c}_seed{seed}", root / scale / "tables" / table
            directory, save_dir = group if kind == "trajectory" else group / run, group / (source or run)
            if table in ONE_DIRECTORY:
                name = ONE_DIRECTORY[table].format(c=c, arch=network) + ("" if seed == "1" else f"_seed{seed}")
                directory = save_dir = report = root / name
            values = setting._replace(end=end or setting.end, k=k or setting.k)._asdict()
            flags = shlex.split(flags.format(**values, group=shlex.quote(str(group))))
            if "--pretrained" in flags and env("PRETRAINED"):
                flags.insert(flags.index("--pretrained") + 1, env("PRETRAINED"))
            if kind != "trajectory":
                flags += shlex.split(env("FLAGS"))
            flags += ["--save-dir", str(save_dir)]
            if directory not in (save_dir, group):
                flags += ["--output-dir", str(directory)]
            command = (script, *setting.data.split(), "--arch", arch, "--corrupt", c, "--randomseed", seed, *flags)
            minutes, gb = setting.minutes.get(re.sub(r"train_|\.py", "", script), 0), 0 if source else setting.gb
            found[command] = PlannedRun(command, directory, report, minutes, gb)
    return list(found.values())


def commands(table, scale):
    """The commands of a table as tuples of words: its runs, then its report."""
    made = planned_runs(table, scale)
    lines = [run.command for run in made] + [("recipes.py", "publish", table)] * (table not in ONE_DIRECTORY)
    return lines + [("report.py", report, "--table", f"{report}/table.md", "--csv", f"{report}/runs.csv", "--figures",
                     report) for report in dict.fromkeys(str(run.report) for run in made)]


def publish(table, scale):
    for run in planned_runs(table, scale) if table not in ONE_DIRECTORY else ():  # whose report lies beside them
        for path in [*run.directory.glob("*.json*"), *run.directory.parent.glob("log_*")]:
            target = run.report / path.relative_to(run.report.parents[1])
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(path), str(target))


def main():
    parser = argparse.ArgumentParser(prog="recipes.py", usage="recipes.py list | table NAME | publish NAME",
                                     description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("list", "table", "publish"))
    parser.add_argument("table", nargs="?", default="")
    args, chosen = parser.parse_args(), env("SCALE", "full")
    known = list(dict.fromkeys((row[0], scale) for row in TABLES for scale in row[2].split()))
    if args.action == "list":
        print("table      SCALE  runs  disk, GB  hours  what it shows")
        for table, scale in known:
            made = planned_runs(table, scale)
            hours = f"{sum(run.minutes for run in made) / 60:.1f}" if any(run.minutes for run in made) else "?"
            print(f"{table:10} {scale:5} {len(made):5} {sum(run.gb for run in made):9.1f} {hours:>6}  {ABOUT[table]}")
        print(NEEDS)
    elif args.table not in ABOUT:
        parser.exit(2, f"recipes.py: error: no table {args.table!r}, only {', '.join(ABOUT)}\n")
    elif (args.table, chosen) not in known:
        scales = ", ".join(scale for table, scale in known if table == args.table)
        parser.exit(2, f"recipes.py: error: table {args.table} has no SCALE={chosen}, only {scales}\n")
    elif args.action == "publish":
        publish(args.table, chosen)
    else:
        print("\n".join(" ".join(map(shlex.quote, command)) for command in commands(args.table, chosen)))


if __name__ == "__main__":
    main()
