"""README and docs: flags, links and commands that exist, figures of the runs in results/, pages made from the code."""
import importlib.util
import json
import math
import re
import shlex

import matplotlib
import pytest
import test_bad_input
import test_distributed
import test_folders
import test_fuzz
import test_fuzz_pairs
import test_report
import test_resume
import test_run_sh
import test_scripts
import test_stages
from conftest import ROOT
from matplotlib.image import imread
from test_zoo import on_meta

import models
import recipes
import report
import train_pbfgs
import train_psgd
import train_sgd
import trajectory

README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
SCRIPTS = {"train_sgd.py": train_sgd, "train_pbfgs.py": train_pbfgs, "train_psgd.py": train_psgd, "report.py": report,
           "trajectory.py": trajectory}
OTHERS = {"--help", "--nproc_per_node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--nodes",
          "--ntasks-per-node", "--gpus-per-node", "--signal", "--requeue", "--no-index", "--find-links"}
FLAG = r"(?<![\w-])--[a-z][\w-]*"


def make():
    spec = importlib.util.spec_from_file_location("make", ROOT / "docs" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150 and len(README.split()) <= 1400


def test_the_page_of_flags_is_that_of_the_parsers():
    assert DOCS["flags.md"] == make().flags()


def test_every_flag_that_is_named_exists():
    benchmarks = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    known = set(re.findall(FLAG, DOCS["flags.md"])) | OTHERS | set(re.findall(FLAG, benchmarks))
    assert len(known) > 50
    for name, page in {"README.md": README, **DOCS}.items():
        assert not set(re.findall(FLAG, page)) - known, name


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "results" / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def commands():
    """Every line of README and docs that starts one of the scripts."""
    for name, page in {"README.md": README, **DOCS}.items():
        for line in re.sub(r"\\\n\s*", "", page).splitlines():
            found = re.search(r"(?:python (?:-u )?|torchrun .*?)(\w+\.py) (--[^#`|]*)", line)
            if found and found[1] in SCRIPTS and "..." not in line:
                yield pytest.param(SCRIPTS[found[1]], shlex.split(found[2].replace("$", "")), id=f"{name}: {line[:60]}")


@pytest.mark.parametrize(("script", "argv"), list(commands()))
def test_every_command_is_understood(script, argv):
    script.parse_args(argv)


def test_every_table_exists():
    for page in (README, *DOCS.values()):
        assert set(re.findall(r"run\.sh table ([a-z]\w*)", page)) <= set(recipes.ABOUT)
        assert set(re.findall(r"run\.sh ([a-z]\w*)", page)) <= {"quick", "test", "lint", "table"}


def test_the_headline_is_that_of_the_runs():
    rows = re.findall(r"^\| ResNet-20, .*? \| (\S+) \| ([\d,]+) \| .*? \| ([\d.]+) \| ([\d.]+) \|$", README, re.M)
    runs = {report.label(run): run for run in report.find_runs([ROOT / "results" / "noise-full"])}
    assert len(rows) == 3
    for name, trained, last, best in rows:
        run = runs[name]
        assert (trained, float(last), float(best)) == (
            f"{run['parameters_trained']:,}", run["test_accuracy_last"], run["test_accuracy_best"])
    table = (ROOT / "results" / "cifar10-cpu" / "table.md").read_text()
    small = re.findall(r"^\| ResNet-8, .*? \| (\S+) \| .*? \| (\S+ ± \S+) \| (\S+ ± \S+) \|$", README, re.M)
    assert len(small) == 3 and all(f"| {last} | {best} |" in table for _, last, best in small)


# what stands behind each line of testing.md: numbers of random cases, and tests, whose parameters count
FAULTS = [
    [*test_resume.KILLS.values()],
    [test_resume.test_killed_inside_a_save_a_run_goes_on_to_the_same_bits],
    [test_resume.test_networks_that_draw_in_the_forward_pass_resume_to_the_same_bits],
    [test_resume.test_signals_save_a_checkpoint_and_say_how_to_go_on,
     test_run_sh.test_a_signal_reaches_the_script_once_and_its_last_words_are_kept],
    [test_resume.test_a_full_disk_names_file_and_bytes_and_keeps_what_was_saved,
     test_resume.test_a_read_only_disk_is_one_line, test_resume.test_a_signal_while_a_slow_disk_writes_waits_for_it,
     test_bad_input.test_a_write_that_fails_names_the_path_and_leaves_the_old_file],
    [test_fuzz.COMMAND_LINES], [test_fuzz.FOLDERS], [test_fuzz.ENVIRONMENTS], [test_fuzz.SNAPSHOTS, 50],
    [test_fuzz.ARRAYS],
    [test_fuzz_pairs.STAGES],
    [test_fuzz_pairs.DIRECTORIES, test_stages.test_a_finished_run_is_not_replaced_by_a_checkpoint_from_elsewhere],
    [test_stages.test_snapshots_of_another_run_in_the_window_are_refused,
     test_stages.test_starting_over_removes_what_the_script_has_written_and_no_more,
     test_stages.test_snapshots_left_behind_by_a_killed_run_are_not_of_the_resumed_one,
     test_scripts.test_resume_refuses_another_window],
    [test_folders.test_a_part_is_a_fixed_draw_over_all_classes,
     test_folders.test_noise_is_spread_over_all_classes_by_the_seed,
     test_folders.test_a_part_without_some_classes_says_so],
    [test_folders.test_16_bit_png_looks_as_with_8_bits, test_folders.test_other_depths_are_refused_by_name,
     test_folders.test_npz_of_images_scaled_to_one_is_refused,
     test_folders.test_hidden_files_and_folders_are_no_images_and_no_classes,
     test_folders.test_class_folders_that_differ_are_named],
    [test_folders.test_an_image_that_cannot_be_read_is_named, test_folders.test_a_killed_worker_ends_the_run,
     test_folders.test_an_error_elsewhere_ends_the_run_and_its_workers,
     test_folders.test_a_small_shared_memory_is_named, test_folders.test_a_low_limit_on_open_files_is_named,
     test_folders.test_a_limit_met_on_the_way_is_named, test_folders.test_the_other_rank_ends_too],
    [test_report.test_a_run_counts_once_and_different_experiments_are_different_rows,
     test_report.test_targets_are_compared_with_the_very_setting_only],
    [test_stages.test_state_dicts_as_people_save_them, test_stages.test_a_pickled_model_is_refused_by_its_name,
     test_distributed.test_pretrained_file_is_where_training_starts],
    [test_stages.test_a_file_system_without_locks_is_warned_of,
     test_stages.test_directories_that_cannot_be_flushed_are_passed_over],
    [test_bad_input.test_a_loss_that_is_not_finite_stops_before_the_step,
     test_bad_input.test_a_line_search_without_a_finite_trial_is_one_line_too],
    [test_bad_input.test_hostile_snapshots_run_no_code,
     test_bad_input.test_hostile_checkpoint_is_refused, 1],  # to resume, and to evaluate
    [test_resume.test_a_second_run_in_a_directory_is_refused_while_the_first_lives],
    [test_distributed.test_a_dead_or_silent_process_ends_the_others,
     test_distributed.test_a_signal_to_one_process_stops_all_and_leaves_a_checkpoint,
     test_distributed.test_a_process_to_which_no_others_come_ends_in_time],
]


def times(test):
    """How often pytest runs a test, without what is slow or needs a GPU."""
    return math.prod(sum(not getattr(values, "marks", ()) for values in mark.args[1])
                     for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize")


def test_counts_of_faults_are_those_of_the_tests():
    rows = re.findall(r"^\| .* \| (.*) \| (\d+) \|$", DOCS["testing.md"], re.MULTILINE)
    assert [int(count) for _, count in rows] == [
        sum(part if isinstance(part, int) else times(part) for part in parts) for parts in FAULTS]
    for (files, _), parts in zip(rows, FAULTS, strict=True):
        assert all(f"({part.__module__}.py)" in files.replace("../tests/", "") for part in parts
                   if not isinstance(part, int))


def test_networks_are_listed_as_they_are():
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| [\d,]+ \| \[models/(\w+)\.py\]", DOCS["networks.md"], re.MULTILINE)
    assert [(name, file) for name, _, file in rows] == [
        (name, family) for family, names in models.FAMILIES.items() for name in names.split()]
    for name, parameters, _ in rows:
        assert parameters == f"{sum(p.numel() for p in on_meta(name, 100).parameters()):,}"


@pytest.mark.slow
def test_the_page_of_networks_is_made_from_them():
    assert DOCS["networks.md"] == make().networks()


def test_speeds_are_those_that_were_printed():
    printed = "".join(path.read_text() for path in (ROOT / "results" / "cpu-speed").glob("*.log"))
    rows = re.findall(r"^\|.*(?:baseline / ours|with --half|its passes|first iteration).*$", DOCS["speed.md"],
                      re.MULTILINE)
    assert len(rows) >= 9 and all(row in printed for row in rows)


TABLES = [path.parent.name for path in sorted((ROOT / "results").glob("*/runs.csv"))]


@pytest.mark.parametrize("directory", [*TABLES, "cifar100-zoo"])
def test_tables_are_those_of_the_runs(directory):
    runs = report.find_runs([ROOT / "results" / directory])
    assert (ROOT / "results" / directory / "table.md").read_text() == report.table(runs)
    if directory != "cifar100-zoo":  # two epochs are no result
        assert (ROOT / "results" / directory / "runs.csv").read_text() == report.comma_separated(runs)


@pytest.mark.parametrize("directory", TABLES)
def test_figures_are_those_of_the_runs(directory, tmp_path):
    """The same pixels, from the same version of matplotlib."""
    pinned = re.search(r"matplotlib==(\S+)", (ROOT / "requirements.txt").read_text())[1]
    if matplotlib.__version__ != pinned:
        pytest.skip(f"drawn with matplotlib {pinned}, this is {matplotlib.__version__}")
    report.main(report.parse_args([str(ROOT / "results" / directory), "--figures", str(tmp_path)]))
    committed = sorted((ROOT / "results" / directory).glob("*.png"))
    assert committed and {path.name for path in committed} <= {path.name for path in tmp_path.iterdir()}
    for path in committed:
        assert (imread(path) == imread(tmp_path / path.name)).all(), path.name


def test_results_are_small_and_without_weights():
    files = [path for path in (ROOT / "results").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6e6 and not {path.suffix for path in files} & {".pt", ".npz"}


def test_every_target_is_compared():
    """Each line of results/targets.json has its figure in results/README.md, and describes a run that can be made."""
    page = (ROOT / "results" / "README.md").read_text()
    targets = json.loads(report.TARGETS.read_text())["targets"]
    assert len(targets) > 75
    for target in targets:
        assert f"{target['last']:.2f}" in page or f"{target['last']:g}" in page
        script = {"SGD": train_sgd, "P-SGD": train_psgd, "P-BFGS": train_pbfgs}[target["label"]]
        known = vars(script.parse_args(["--save-dir", "x"]))
        assert not set(target) - set(known) - {"table", "source", "label", "dataset", "last", "best"}
