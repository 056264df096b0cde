"""The runner: order, skipping, resuming, failures, signals, several at once, clusters; on scripts that only pretend.

`folder` holds a copy of the runner, with `fake_script.py` in place of main_block.py and resample.py.
"""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from utils import machine
from utils.experiments import registry
from utils.experiments.cluster import minutes
from utils.experiments.runner import longest_first
from utils.experiments.status import work
from utils.lock import holder

LAPTOP = registry.experiments("laptop")
NARROWEST, TWO_WIDTHS = "^(?=.*WP2WP4WP8WP8-norm)(?!.*-init)", "^(?=.*WP[24]WP.*-norm)(?!.*-init)"
CHAIN, ONE = ("--match", NARROWEST), ("--match", f"{NARROWEST}.*white")
NARROW = [experiment for experiment in LAPTOP if re.search(NARROWEST, experiment.name)]
TRAINED, SAMPLED, RETRAINED, WHITE = NARROW
fresh_and_warm = pytest.mark.parametrize("interpreter", ["fresh", "warm"])


@pytest.fixture
def folder(tmp_path):
    shutil.copy(ROOT / "run_exps.py", tmp_path)
    for package in ("utils", "models", "notebook_data"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ("main_block.py", "resample.py"):
        shutil.copy(ROOT / "tests" / "fake_script.py", tmp_path / script)
    for package in ("torch", "torchvision", "sklearn"):  # which take long, and which nothing here needs
        (tmp_path / f"{package}.py").write_text("raise ImportError")
    return tmp_path


def how(folder, flags, environment):
    """Arguments for `subprocess` that run `run_exps.py` in a folder."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "FAKE_"))}
    command = [sys.executable, "run_exps.py", "--scale", "laptop", "--start", "fresh", *flags]
    return {"args": command, "cwd": folder, "env": {**inherited, **environment}, "text": True}


def run(folder, *flags, **environment):
    return subprocess.run(**how(folder, flags, environment), capture_output=True, timeout=60, check=False)


def start(folder, *flags, **environment):
    return subprocess.Popen(**how(folder, flags, environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def begun(folder, experiment):
    """The epochs that were begun, in order, over all attempts."""
    path = folder / "checkpoints" / experiment.name / "epochs_begun.txt"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def written(folder, experiment, name="status"):
    return json.loads((folder / "checkpoints" / experiment.name / f"{name}.json").read_text())


def are_finished(folder, *experiments):
    return all(written(folder, experiment)["state"] == "finished" for experiment in experiments)


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_print_lists_every_command(folder):
    lines = run(folder, "--print", "--data", "/sets/imagenet").stdout.splitlines()
    listed = [f"{experiment.name}:\t{shlex.join(experiment.command())}" for experiment in LAPTOP]
    assert lines == [f"[{i:>3}/{len(listed)}] {line}" for i, line in enumerate(listed, 1)]
    flags = ("--scale", "paper", "--figure", "7", "--print")
    assert run(folder, *flags, IMAGENET_DIR="/sets/imagenet").stdout.count("--data /sets/imagenet") == 2
    assert run(folder, *flags).stdout.count(registry.IMAGENET) == 2


def test_everything_runs_in_the_order_of_needs_and_only_once(folder):
    first = run(folder, *CHAIN, "--jobs", "3")
    assert first.returncode == 0 and "4 of 4 experiments are finished" in first.stdout, first
    assert are_finished(folder, *NARROW)
    again = run(folder, *CHAIN)
    assert (again.returncode, again.stdout) == (0, "All 4 experiments are finished: nothing to do.\n")
    assert all(begun(folder, experiment) == list(range(experiment.epochs)) for experiment in NARROW)


def test_what_is_needed_is_run_too(folder):
    assert run(folder, "--name", RETRAINED.name).returncode == 0
    assert are_finished(folder, TRAINED, SAMPLED, RETRAINED) and not begun(folder, WHITE)


def test_longest_chains_begin_first_and_needs_before_all():
    order = longest_first(LAPTOP)
    place = {experiment.name: i for i, experiment in enumerate(order)}
    assert len(order) == len(LAPTOP) and place.keys() == {experiment.name for experiment in LAPTOP}
    assert all(place[need] < place[experiment.name] for experiment in order for need in experiment.needs)
    works = [work(experiment) for experiment in order if experiment.group == "weight_convergence"]
    assert works == sorted(works, reverse=True)


def test_processes_share_the_cores_or_the_gpus(folder):
    names = (TRAINED.name, WHITE.name)
    run(folder, "--jobs", "2", "--name", *names, CUDA_VISIBLE_DEVICES="3,5", OMP_NUM_THREADS="", FAKE_SECONDS="0.1")
    descriptions = [written(folder, experiment, "args") for experiment in (TRAINED, WHITE)]
    assert [each["threads"] for each in descriptions] == [str(max(1, machine.cores() // 2))] * 2
    assert sorted(each["gpus"] for each in descriptions) == ["3", "5"]


@pytest.mark.parametrize(
    ("how_it_ends", "shown"),
    [("FAKE_FAIL", ["exit status 1", "RuntimeError: made to fail"]), ("FAKE_KILL", ["killed by SIGKILL"])],
)
def test_a_failure_is_shown_and_leaves_the_rest_unharmed(folder, how_it_ends, shown):
    result = run(folder, *CHAIN, **{how_it_ends: "^digits.*clnobias$"})
    assert result.returncode == 1 and all(text in result.stdout for text in shown)
    assert f"{TRAINED.name}: failed, {shown[0]}" in result.stdout
    assert f"{SAMPLED.name}: skipped: requires {TRAINED.name}" in result.stdout
    assert f"{RETRAINED.name}: skipped: requires {SAMPLED.name}" in result.stdout
    assert "1 of 4 experiments are finished, 1 failed, 2 blocked" in result.stdout
    assert are_finished(folder, WHITE)
    assert run(folder, *CHAIN).returncode == 0


def test_a_changed_definition_is_reported_and_kept(folder):
    run(folder, *ONE)
    args = folder / "checkpoints" / WHITE.name / "args.json"
    args.write_text(args.read_text().replace("0.05", "0.01"))
    before = begun(folder, WHITE)
    result = run(folder, *ONE)
    assert result.returncode == 1 and "lr = 0.01, now 0.05" in result.stdout
    assert begun(folder, WHITE) == before
    assert "1 changed" in run(folder, *ONE, "--status").stdout


def test_a_removed_output_or_need_is_made_again(folder):
    run(folder, *CHAIN)
    (folder / "checkpoints" / SAMPLED.name / SAMPLED.output).unlink()
    shutil.rmtree(folder / "checkpoints" / TRAINED.name)
    assert "damaged" in run(folder, *CHAIN, "--status").stdout
    assert run(folder, *CHAIN).returncode == 0
    assert begun(folder, SAMPLED) == [0, 1, 2] * 2 and begun(folder, RETRAINED) == list(range(RETRAINED.epochs))


def test_two_runners_share_a_folder(folder):
    flags = ("--match", TWO_WIDTHS, "--jobs", "2")
    both = [start(folder, *flags, FAKE_SECONDS="0.05")]
    wait_for(lambda: list(folder.rglob("epochs_begun.txt")))
    both.append(start(folder, *flags, FAKE_SECONDS="0.05"))
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert any("already being run by" in output for output in outputs), outputs
    for experiment in LAPTOP:
        assert not re.search(TWO_WIDTHS, experiment.name) or begun(folder, experiment) == list(range(experiment.epochs))


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_it_finishes_redoing_at_most_an_epoch(folder, seed):
    draw, kills = random.Random(seed), 0
    while True:
        process = start(folder, *CHAIN, "--jobs", "2", FAKE_SECONDS="0.03")
        try:
            seconds = draw.uniform(0.1, 0.8) * (1 + kills / 10)  # so that a busy machine gets there too
            output = process.communicate(timeout=seconds)[0]
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert process.returncode == 0 and kills > 0, output
    for experiment in NARROW:
        epochs = begun(folder, experiment)
        assert sorted(set(epochs)) == list(range(experiment.epochs))
        assert len(epochs) - experiment.epochs <= kills
        assert epochs == sorted(epochs), "an epoch that was done was begun again"


@fresh_and_warm
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_ends_it_and_its_processes(folder, signum, status, interpreter):
    process = start(folder, *CHAIN, "--jobs", "2", "--start", interpreter, FAKE_SECONDS="0.2")
    wait_for(lambda: begun(folder, TRAINED))
    process.send_signal(signum)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    if signum != signal.SIGKILL:
        assert len(errors.splitlines()) == 1 and "0 of 4 experiments are finished" in errors
    wait_for(lambda: not any(map(holder, folder.rglob("lock"))))
    assert len(begun(folder, TRAINED)) < TRAINED.epochs


def test_a_full_disk_fails_clearly_and_the_next_call_resumes(folder):
    """Files that may not grow beyond 4 KB stand for a disk that fills up in the middle of a run."""
    limited = how(folder, ONE, {})
    limited["args"] = ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash", *limited["args"]]
    result = subprocess.run(**limited, capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (1, "")
    assert f"{WHITE.name}: failed" in result.stdout and 0 < len(begun(folder, WHITE)) < WHITE.epochs
    assert run(folder, *ONE).returncode == 0
    assert len(begun(folder, WHITE)) <= WHITE.epochs + 1


def test_a_folder_that_cannot_be_made_is_a_clear_line(folder):
    (folder / "checkpoints").write_text("a file where the folder should be")
    result = run(folder, *ONE)
    assert (result.returncode, result.stderr) == (1, "") and "failed, could not be started" in result.stdout


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("--only resamplin", "did you mean resampling"), ("--scale lptop", "did you mean laptop")]
    + [("--figure 11", "no such figure"), ("--name digits-WP16-norm", "no such experiment")]
    + [("--match (", "not a regular expression"), ("--match nothing", "no experiment meets all")]
    + [("--jobs 0", "positive"), ("--jobs x", "positive"), ("--epochs two", "integer"), ("--epochs ²", "integer")]
    + [("--epochs 1" + 400 * "0", "too large"), ("--lr fast", "--lr"), ("--data-subset 5", "START:STOP")]
    + [("--checkpoints=", "empty"), ("--checkpoints " + 300 * "x", "too long"), ("--gpus -1 --print", "--gpus")]
    + [("--submit local --pack 0", "positive"), ("--submit local --time soon", "--time soon")],
)
def test_bad_input_is_one_clear_line(folder, flags, expected):
    result = run(folder, *flags.split())
    assert result.returncode == 2 and expected in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (folder / "checkpoints").exists()


def test_imagenet_is_skipped_without_its_folder(folder):
    result = run(folder, "--scale", "paper", "--only", "imagenet_spectra")
    assert result.returncode == 1 and "requires ImageNet: --data DIR or IMAGENET_DIR" in result.stdout


def test_a_trial_is_selected_by_either_name_and_runs_beside_the_real_ones(folder):
    trials = [registry.trial(experiment, {"--epochs": "1"}) for experiment in NARROW]
    for flags in (CHAIN, ("--name", *(e.name for e in NARROW)), ("--name", *(e.name for e in trials))):
        assert len(run(folder, *flags, "--epochs", "1", "--print").stdout.splitlines()) == 4
    assert run(folder, *CHAIN, "--epochs", "1").returncode == 0
    assert [begun(folder, trial) for trial in trials] == [[0], [0, 1, 2], [0], [0]]
    assert not any(begun(folder, experiment) for experiment in NARROW)


def test_status_tells_epochs_accuracies_and_time(folder):
    run(folder, *ONE)
    lines = run(folder, *CHAIN, "--status").stdout.splitlines()
    assert len(lines) == 1 + 4 + 1 and lines[-1].startswith("4 experiments: 3 missing, 1 finished")
    (white,) = [line for line in lines if "white" in line]
    assert re.search(r"finished +15/15 +25\.0", white)
    records = json.loads(run(folder, *CHAIN, "--status", "--json").stdout)
    assert [record["state"] for record in records].count("missing") == 3
    assert next(record for record in records if record["experiment"] == WHITE.name).items() >= {
        "epoch": 15, "epochs": 15, "acc1": 25.0, "published": None
    }.items()  # fmt: skip
    assert run(folder, "--json").returncode == 2


@pytest.mark.parametrize(
    "values", [{"epoch": "x"}, {"epochs": "9"}, {"acc1": [1]}, {"epoch": float("nan")}, {"state": 3}]
)
def test_status_survives_values_of_a_wrong_type(folder, values):
    place = folder / "checkpoints" / WHITE.name
    place.mkdir(parents=True)
    (place / "status.json").write_text(json.dumps({"state": "stopped", "epoch": 5, "epochs": 15, **values}))
    (place / "args.json").write_text('{"args": 5}')
    result = run(folder, *ONE, "--status")
    assert (result.returncode, result.stderr) == (0, "") and "1 changed" in result.stdout


def test_warm_processes_are_like_fresh_ones(folder):
    result = run(folder, *CHAIN, "--start", "warm", "--jobs", "2", FAKE_FAIL="white")
    assert result.returncode == 1 and "RuntimeError: made to fail" in result.stdout
    assert are_finished(folder, TRAINED, SAMPLED, RETRAINED)
    log = (folder / "checkpoints" / "logs" / f"{TRAINED.name}.log").read_text()
    assert log.splitlines() == [f"epoch {epoch} of {TRAINED.name}" for epoch in range(TRAINED.epochs)]


@fresh_and_warm
def test_a_script_that_cannot_be_run_says_so_in_its_log(folder, interpreter):
    (folder / "main_block.py").unlink()
    result = run(folder, *ONE, "--start", interpreter)
    assert (result.returncode, result.stderr) == (1, "") and "No such file or directory" in result.stdout


@pytest.mark.slow
def test_real_scripts_from_training_to_retraining(tmp_path):
    """The chain of figure 3 for one width, one epoch of a few digits each; nothing is left to do afterwards."""
    flags = [*CHAIN, "--epochs", "1", "--data-subset", "0:20", "--checkpoints", str(tmp_path), "--jobs", "2"]
    for expected in ("4 of 4 experiments are finished", "All 4 experiments are finished: nothing to do.\n"):
        result = run(ROOT, *flags, "--start", "warm")
        assert result.returncode == 0 and expected in result.stdout, result
    assert len(list(tmp_path.rglob("accuracies.csv"))) == 1 and len(list(tmp_path.rglob("last.pt"))) == 3


# --- Clusters ----------------------------------------------------------------------------------------------------


def test_without_submitit_or_slurm_it_says_so(folder):
    result = run(folder, "--submit", "slurm", PATH="/nowhere")
    assert result.returncode == 2 and "no sbatch and srun" in result.stderr
    (folder / "submitit.py").write_text("raise ImportError")
    result = run(folder, "--submit", "local")
    assert result.returncode == 2 and "pip install submitit" in result.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("30:00", 30), ("1:30", 2), ("24:00:00", 1440), ("0:30:00", 30), ("0:00:01", 1)]
    + [("1-12", 2160), ("2-00:30", 2910), ("7-00:00:00", 10080), ("1-02:03:04", 1564)],
)
def test_time_limits_mean_what_they_mean_for_slurm(text, expected):
    assert minutes(text) == expected


def test_submit_local_runs_two_experiments_and_their_dependent(folder):
    names = (TRAINED.name, SAMPLED.name, WHITE.name)
    result = run(folder, "--submit", "local", "--jobs", "2", "--name", *names)
    assert result.returncode == 0 and result.stdout.endswith("3 of 3 jobs succeeded.\n"), result
    assert are_finished(folder, TRAINED, SAMPLED, WHITE)


def test_a_failed_job_stops_its_dependents(folder):
    result = run(folder, "--submit", "local", "--name", SAMPLED.name, FAKE_FAIL="^digits")
    assert result.returncode == 1 and "what it needs failed" in result.stdout and "0 of 2 jobs" in result.stdout


@pytest.fixture
def slurm(folder):
    """Stand-ins for SLURM's commands, and their PATH: jobs count from 100 and stay in the queue, MOST of them."""
    tools = folder / "tools"
    tools.mkdir()
    refusal = "sbatch: error: one\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy"
    count = "n=$(cat count 2>/dev/null || echo 100)"
    for tool, lines in {
        "sbatch": f"""{count}\n[ "$n" -lt $((100 + ${{MOST:-50}})) ] || {{ echo "{refusal}" >&2; exit 1; }}
            echo $((n + 1)) > count\ncp "$1" "script$n"\necho "Submitted batch job $n" """,
        "squeue": f"""[ -z "$DOWN" ] || {{ echo "slurm_load_jobs error: Unable to contact" >&2; exit 1; }}
            {count}\nseq 100 $((n - 1))""",
        "srun": "",
    }.items():
        (tools / tool).write_text(f"#!/bin/sh\n{lines}\n")
        (tools / tool).chmod(0o755)
    return f"{tools}:{os.environ['PATH']}"


def test_slurm_gets_needs_as_dependencies(folder, slurm):
    flags = "--submit slurm --pack 2 --partition gpu --gpus 1 --time 2:30:00".split()
    result = run(folder, *flags, "--match", TWO_WIDTHS, PATH=slurm)
    assert result.returncode == 0, result.stdout + result.stderr
    scripts = [(folder / f"script{n}").read_text() for n in range(100, 104)]
    assert not (folder / "script104").exists()
    for flag in ("partition=gpu", "gpus-per-node=1", "time=150"):
        assert all(f"#SBATCH --{flag}" in script for script in scripts)
    needs = [re.findall(r"--dependency=(\S+)", script) for script in scripts]
    assert needs == [[], [], ["afterok:100"], ["afterok:102"]]


def test_what_is_in_the_queue_is_not_submitted_again(folder, slurm):
    result = run(folder, "--submit", "slurm", "--name", TRAINED.name, PATH=slurm)
    assert (result.returncode, (folder / "count").read_text()) == (0, "101\n"), result.stderr
    result = run(folder, "--submit", "slurm", "--name", SAMPLED.name, PATH=slurm)
    assert "1 experiments are in the queue already" in result.stdout and (folder / "count").read_text() == "102\n"
    assert "--dependency=afterok:100" in (folder / "script101").read_text()
    result = run(folder, "--submit", "slurm", "--name", SAMPLED.name, PATH=slurm, DOWN="1")
    assert result.returncode == 1 and (folder / "count").read_text() == "102\n"
    assert result.stderr.count("\n") == 1 and "Unable to contact" in result.stderr


def test_a_refusal_in_the_middle_says_how_many_are_in_and_the_next_call_submits_the_rest(folder, slurm):
    result = run(folder, "--submit", "slurm", *CHAIN, PATH=slurm, MOST="2")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "QOS policy" in result.stderr and "refused job 3 of 4" in result.stderr and "2 jobs are in" in result.stderr
    result = run(folder, "--submit", "slurm", *CHAIN, PATH=slurm)
    assert result.returncode == 0 and (folder / "count").read_text() == "104\n"
