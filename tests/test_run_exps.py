"""The runner: order, skipping, resuming, failures, signals, several at once, clusters; on scripts that only pretend.

`repository` is a copy of the runner with `fake_script.py` in place of main_block.py and resample.py.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from utils.experiments import registry
from utils.experiments.cluster import minutes
from utils.experiments.runner import cores, longest_first
from utils.experiments.status import work
from utils.lock import holder

NARROWEST = "^(?=.*WP2WP4WP8WP8-norm)(?!.*-init)"
WHITE = f"{NARROWEST}.*white"
TWO_WIDTHS = "^(?=.*WP[24]WP.*-norm)(?!.*-init)"


@pytest.fixture
def repository(tmp_path):
    shutil.copy(ROOT / "run_exps.py", tmp_path)
    for folder in ("utils", "models", "notebook_data"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ("main_block.py", "resample.py"):
        shutil.copy(ROOT / "tests" / "fake_script.py", tmp_path / script)
    for package in ("torch", "torchvision", "sklearn"):  # which the scripts pretend to need, and which take long
        (tmp_path / f"{package}.py").write_text("raise ImportError")
    return tmp_path


def how(repository, flags, environment):
    """Arguments for `subprocess` that run `run_exps.py` on the scripts that pretend."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "FAKE_"))}
    command = [sys.executable, "run_exps.py", "--scale", "laptop", "--start", "fresh", *flags]
    return {"args": command, "cwd": repository, "env": {**inherited, **environment}, "text": True}


def run(repository, *flags, **environment):
    return subprocess.run(**how(repository, flags, environment), capture_output=True, timeout=60, check=False)


def start(repository, *flags, **environment):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(**how(repository, flags, environment), **pipes)


def chosen(pattern):
    return [e for e in registry.experiments("laptop") if re.search(pattern, e.name)]


def begun(repository, experiment):
    """The epochs that were begun, in order, over all attempts."""
    path = repository / "checkpoints" / experiment.name / "epochs_begun.txt"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def written(repository, experiment, name="status"):
    return json.loads((repository / "checkpoints" / experiment.name / f"{name}.json").read_text())


def are_finished(repository, experiments):
    return all(written(repository, experiment)["state"] == "finished" for experiment in experiments)


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_print_lists_every_command(repository):
    lines = run(repository, "--print", "--data", "/sets/imagenet").stdout.splitlines()
    experiments = registry.experiments("laptop")
    assert len(lines) == len(experiments)
    for i, (line, experiment) in enumerate(zip(lines, experiments), 1):
        assert line == f"[{i:>3}/{len(experiments)}] {experiment.name}:\t" + registry.printed(experiment.command())


def test_print_fills_in_imagenets_folder(repository):
    flags = ("--scale", "paper", "--figure", "7", "--print")
    assert run(repository, *flags, IMAGENET_DIR="/sets/imagenet").stdout.count("--data /sets/imagenet") == 2
    assert run(repository, *flags).stdout.count(registry.IMAGENET) == 2


def test_everything_runs_in_the_order_of_needs_and_only_once(repository):
    first = run(repository, "--match", NARROWEST, "--jobs", "3")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "4 of 4 experiments are finished" in first.stdout
    assert are_finished(repository, chosen(NARROWEST))
    again = run(repository, "--match", NARROWEST)
    assert (again.returncode, again.stdout) == (0, "All 4 experiments are finished: nothing to do.\n")
    assert [begun(repository, e) for e in chosen(NARROWEST)] == [list(range(e.epochs)) for e in chosen(NARROWEST)]


def test_what_is_needed_is_run_too(repository):
    assert run(repository, "--match", f"{NARROWEST}.*retrainclf").returncode == 0
    assert are_finished(repository, chosen(NARROWEST)[:3])


def test_longest_chains_begin_first_and_needs_before_all():
    experiments = registry.experiments("laptop")
    order = [experiment.name for experiment in longest_first(experiments)]
    assert sorted(order) == sorted(experiment.name for experiment in experiments)
    place = {name: i for i, name in enumerate(order)}
    assert all(place[need] < place[experiment.name] for experiment in experiments for need in experiment.needs)
    alone = [experiment for experiment in experiments if experiment.group == "weight_convergence"]
    works = [work(experiment) for experiment in sorted(alone, key=lambda experiment: place[experiment.name])]
    assert works == sorted(works, reverse=True)


def test_processes_share_the_cores_or_the_gpus(repository):
    experiments = chosen(NARROWEST)[::3]
    flags = ("--jobs", "2", "--name", *(experiment.name for experiment in experiments))
    run(repository, *flags, CUDA_VISIBLE_DEVICES="3,5", OMP_NUM_THREADS="", FAKE_SECONDS="0.1")
    written_by = [written(repository, experiment, "args") for experiment in experiments]
    assert [each["threads"] for each in written_by] == [str(max(1, cores() // 2))] * 2
    assert sorted(each["gpus"] for each in written_by) == ["3", "5"]


def test_a_failure_is_shown_and_leaves_the_rest_unharmed(repository):
    trained, sampled, retrained, white = chosen(NARROWEST)
    result = run(repository, "--match", NARROWEST, FAKE_FAIL="^digits.*clnobias$")
    assert result.returncode == 1
    assert f"{trained.name}: failed, exit status 1" in result.stdout and "RuntimeError: made to fail" in result.stdout
    assert f"{sampled.name}: skipped: requires {trained.name}" in result.stdout
    assert f"{retrained.name}: skipped: requires {sampled.name}" in result.stdout
    assert "1 of 4 experiments are finished, 1 failed, 2 blocked" in result.stdout
    assert are_finished(repository, [white])
    assert run(repository, "--match", NARROWEST).returncode == 0


def test_a_killed_process_is_reported(repository):
    result = run(repository, "--match", WHITE, FAKE_KILL="white")
    assert result.returncode == 1 and "failed, killed by SIGKILL" in result.stdout


def test_a_changed_definition_is_reported_and_kept(repository):
    (white,) = chosen(WHITE)
    run(repository, "--match", WHITE)
    args = repository / "checkpoints" / white.name / "args.json"
    args.write_text(args.read_text().replace("0.05", "0.01"))
    before = begun(repository, white)
    result = run(repository, "--match", WHITE)
    assert result.returncode == 1 and "lr = 0.01, now 0.05" in result.stdout
    assert begun(repository, white) == before
    assert "changed" in run(repository, "--match", WHITE, "--status").stdout


def test_a_removed_output_or_need_is_made_again(repository):
    trained, sampled, retrained, _ = chosen(NARROWEST)
    run(repository, "--match", NARROWEST)
    (repository / "checkpoints" / sampled.name / "checkpoint_repeat0.pt").unlink()
    shutil.rmtree(repository / "checkpoints" / trained.name)
    assert "damaged" in run(repository, "--match", NARROWEST, "--status").stdout
    assert run(repository, "--match", NARROWEST).returncode == 0
    assert begun(repository, sampled) == [0, 1, 2] * 2 and begun(repository, retrained) == list(range(retrained.epochs))


def test_two_runners_share_a_folder(repository):
    flags = ("--match", TWO_WIDTHS, "--jobs", "2")
    both = [start(repository, *flags, FAKE_SECONDS="0.05")]
    wait_for(lambda: list(repository.rglob("epochs_begun.txt")))
    both.append(start(repository, *flags, FAKE_SECONDS="0.05"))
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert any("already being run by" in output for output in outputs), outputs
    for experiment in chosen(TWO_WIDTHS):
        assert begun(repository, experiment) == list(range(experiment.epochs))


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_it_finishes_redoing_at_most_an_epoch(repository, seed):
    draw, kills = random.Random(seed), 0
    while True:
        process = start(repository, "--match", NARROWEST, "--jobs", "2", FAKE_SECONDS="0.03")
        try:
            output = process.communicate(timeout=draw.uniform(0.1, 0.8))[0]
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert process.returncode == 0 and kills > 0, output
    for experiment in chosen(NARROWEST):
        epochs = begun(repository, experiment)
        assert sorted(set(epochs)) == list(range(experiment.epochs))
        assert len(epochs) - experiment.epochs <= kills
        assert epochs == sorted(epochs), "an epoch that was done was begun again"


@pytest.mark.parametrize("how_started", ["fresh", "warm"])
@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_signals_stop_it_and_its_processes(repository, signum, expected, how_started):
    process = start(repository, "--match", NARROWEST, "--jobs", "2", "--start", how_started, FAKE_SECONDS="0.2")
    trained = chosen(NARROWEST)[0]
    wait_for(lambda: begun(repository, trained))
    process.send_signal(signum)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == expected
    if signum != signal.SIGKILL:
        assert len(errors.splitlines()) == 1 and "0 of 4 experiments are finished" in errors
    wait_for(lambda: not any(map(holder, (repository / "checkpoints").rglob("lock"))))
    assert len(begun(repository, trained)) < trained.epochs


def test_a_full_disk_fails_clearly_and_the_next_call_resumes(repository):
    """Files that may not grow beyond 4 KB stand for a disk that fills up in the middle of a run."""
    (white,) = chosen(WHITE)
    limited = how(repository, ("--match", WHITE), {})
    limited["args"] = ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash", *limited["args"]]
    result = subprocess.run(**limited, capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (1, "")
    assert f"{white.name}: failed" in result.stdout and 0 < len(begun(repository, white)) < white.epochs
    assert run(repository, "--match", WHITE).returncode == 0
    assert len(begun(repository, white)) <= white.epochs + 1


def test_a_folder_that_cannot_be_made_is_a_clear_line(repository):
    (repository / "checkpoints").write_text("a file where the folder should be")
    result = run(repository, "--match", WHITE)
    assert result.returncode == 1 and "failed, could not be started" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--only resamplin", "did you mean resampling"),
        ("--figure 10", "no such figure"),
        ("--scale lptop", "did you mean laptop"),
        ("--match (", "not a regular expression"),
        ("--name digits-WP16-norm", "no such experiment"),
        ("--match nothing", "no experiment meets all"),
        ("--jobs 0", "at least 1"),
        ("--epochs two", "whole number"),
        ("--submit local --pack 0", "at least 1"),
        ("--submit local --time soon", "--time soon"),
    ],
)
def test_bad_input_is_one_clear_line(repository, flags, expected):
    result = run(repository, *flags.split())
    assert result.returncode == 2 and expected in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (repository / "checkpoints").exists()


def test_imagenet_is_skipped_without_its_folder(repository):
    result = run(repository, "--scale", "paper", "--only", "imagenet_spectra")
    assert result.returncode == 1 and "requires ImageNet: --data DIR or IMAGENET_DIR" in result.stdout


def test_a_trial_is_selected_by_the_names_of_the_real_ones(repository):
    names = [experiment.name for experiment in chosen(NARROWEST)]
    for flags in (("--match", NARROWEST), ("--name", *names), ("--name", *(f"trial-epochs1/{name}" for name in names))):
        assert run(repository, *flags, "--epochs", "1", "--print").stdout.count("trial-epochs1/digits") >= 4


def test_a_trial_runs_beside_the_real_ones(repository):
    assert run(repository, "--match", NARROWEST, "--epochs", "1").returncode == 0
    trials = [registry.trial(experiment, {"--epochs": "1"}) for experiment in chosen(NARROWEST)]
    assert [begun(repository, trial) for trial in trials] == [[0], [0, 1, 2], [0], [0]]
    assert not any(begun(repository, e) for e in chosen(NARROWEST))


def test_status_tells_epochs_accuracies_and_time(repository):
    run(repository, "--match", WHITE)
    lines = run(repository, "--match", NARROWEST, "--status").stdout.splitlines()
    assert len(lines) == 1 + 4 + 1 and lines[-1].startswith("4 experiments: 3 missing, 1 finished")
    (white,) = [line for line in lines if "white" in line]
    assert re.search(r"finished +15/15 +25\.0", white)


@pytest.mark.parametrize(
    "values", [{"epoch": "x"}, {"epochs": "9"}, {"acc1": [1]}, {"epoch": float("nan")}, {"state": 3}]
)
def test_status_survives_values_of_a_wrong_type(repository, values):
    (white,) = chosen(WHITE)
    folder = repository / "checkpoints" / white.name
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"state": "stopped", "epoch": 5, "epochs": 15, **values}))
    (folder / "args.json").write_text('{"args": 5}')
    result = run(repository, "--match", WHITE, "--status")
    assert result.returncode == 0 and "1 changed" in result.stdout and result.stderr == ""


def test_warm_processes_are_like_fresh_ones(repository):
    result = run(repository, "--match", NARROWEST, "--start", "warm", "--jobs", "2", FAKE_FAIL="white")
    assert result.returncode == 1 and "RuntimeError: made to fail" in result.stdout
    trained, sampled, retrained, _ = chosen(NARROWEST)
    assert are_finished(repository, (trained, sampled, retrained))
    log = (repository / "checkpoints" / "logs" / f"{trained.name}.log").read_text()
    assert log.splitlines() == [f"epoch {epoch} of {trained.name}" for epoch in range(trained.epochs)]


@pytest.mark.parametrize("how_started", ["fresh", "warm"])
def test_a_script_that_cannot_be_run_says_so_in_its_log(repository, how_started):
    (repository / "main_block.py").unlink()
    result = run(repository, "--match", WHITE, "--start", how_started)
    assert result.returncode == 1 and "No such file or directory" in result.stdout and result.stderr == ""


@pytest.mark.slow
def test_real_scripts_from_training_to_retraining(tmp_path):
    """The chain of figure 3 for one width, one epoch of a few digits each; nothing is left to do afterwards."""
    pattern = "WP4WP8WP16WP16-norm-L4-clbnstd-clnobias(-load|-white|$)"
    flags = [
        "--match",
        pattern,
        "--epochs",
        "1",
        "--data-subset",
        "0:20",
        "--checkpoints",
        str(tmp_path),
        "--jobs",
        "2",
    ]
    for expected in ("4 of 4 experiments are finished", "All 4 experiments are finished: nothing to do.\n"):
        result = run(ROOT, *flags, "--start", "warm")
        assert result.returncode == 0 and expected in result.stdout, result
    parts = [next(tmp_path.glob(f"trial-*/{name}")) for name in ("*clnobias", "resam*/*", "*-retrainclf", "*-trainclf")]
    assert [json.loads((folder / "status.json").read_text())["state"] for folder in parts] == ["finished"] * 4


# --- Clusters ----------------------------------------------------------------------------------------------------


def test_without_submitit_or_slurm_it_says_so(repository):
    result = run(repository, "--submit", "slurm", PATH="/nowhere")
    assert result.returncode == 2 and "no sbatch and srun" in result.stderr
    (repository / "submitit.py").write_text("raise ImportError")
    result = run(repository, "--submit", "local")
    assert result.returncode == 2 and "pip install submitit" in result.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("30:00", 30), ("1:30", 2), ("24:00:00", 1440), ("0:30:00", 30), ("0:00:01", 1)]
    + [("1-12", 2160), ("2-00:30", 2910), ("7-00:00:00", 10080), ("1-02:03:04", 1564)],
)
def test_time_limits_mean_what_they_mean_for_slurm(text, expected):
    assert minutes(text) == expected


def test_submit_local_runs_two_experiments_and_their_dependent(repository):
    experiments = chosen(f"{NARROWEST}.*(clnobias|white-trainclf)$")
    assert len(experiments) == 3
    names = [experiment.name for experiment in experiments]
    result = run(repository, "--submit", "local", "--jobs", "2", "--name", *names)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("3 of 3 jobs succeeded.\n")
    assert are_finished(repository, experiments)


def test_a_failed_job_stops_its_dependents(repository):
    names = [experiment.name for experiment in chosen(f"{NARROWEST}.*clnobias$")]
    result = run(repository, "--submit", "local", "--name", *names, FAKE_FAIL="^digits")
    assert result.returncode == 1 and "what it needs failed" in result.stdout and "0 of 2 jobs" in result.stdout


def test_slurm_gets_needs_as_dependencies(repository):
    tools = repository / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text(
        "#!/bin/sh\nn=$(cat count 2>/dev/null || echo 100)\necho $((n + 1)) > count\n"
        'cp "$1" "script$n"\necho "Submitted batch job $n"\n'
    )
    (tools / "srun").write_text("#!/bin/sh\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    flags = "--submit slurm --pack 2 --partition gpu --gpus 1 --time 2:30:00".split()
    result = run(repository, *flags, "--match", TWO_WIDTHS, PATH=f"{tools}:{os.environ['PATH']}")
    assert result.returncode == 0, result.stdout + result.stderr
    scripts = [(repository / f"script{n}").read_text() for n in range(100, 104)]
    assert not (repository / "script104").exists()
    for flag in ("partition=gpu", "gpus-per-node=1", "time=150"):
        assert all(f"#SBATCH --{flag}" in script for script in scripts)
    needs = [re.findall(r"--dependency=(\S+)", script) for script in scripts]
    assert needs == [[], [], ["afterok:100"], ["afterok:102"]]
