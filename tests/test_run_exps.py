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
from utils.experiments.runner import longest_first
from utils.experiments.status import work
from utils.lock import holder

NARROWEST = "^(?=.*WP2WP4WP8WP8-norm)(?!.*-init)"
TWO_WIDTHS = "^(?=.*WP[24]WP.*-norm)(?!.*-init)"


@pytest.fixture
def repository(tmp_path):
    shutil.copy(ROOT / "run_exps.py", tmp_path)
    for folder in ("utils", "models", "notebook_data"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for script in ("main_block.py", "resample.py"):
        shutil.copy(ROOT / "tests" / "fake_script.py", tmp_path / script)
    return tmp_path


def command(*flags):
    return [sys.executable, "run_exps.py", "--scale", "laptop", "--start", "fresh", *flags]


def environment(**more):
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "FAKE_"))}
    return {**inherited, **more}


def run(repository, *flags, **more):
    return subprocess.run(
        command(*flags),
        cwd=repository,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def chosen(pattern):
    return [e for e in registry.experiments("laptop") if re.search(pattern, e.name)]


def begun(repository, experiment):
    """The epochs that were begun, in order, over all attempts."""
    path = repository / "checkpoints" / experiment.name / "epochs_begun.txt"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def status(repository, experiment):
    return json.loads((repository / "checkpoints" / experiment.name / "status.json").read_text())["state"]


def test_print_lists_every_command(repository):
    result = run(repository, "--print", "--data", "/sets/imagenet")
    lines = result.stdout.splitlines()
    experiments = registry.experiments("laptop")
    assert len(lines) == len(experiments)
    for i, (line, experiment) in enumerate(zip(lines, experiments), 1):
        assert line == f"[{i:>3}/{len(experiments)}] {experiment.name}:\t" + registry.printed(experiment.command())


def test_print_puts_imagenets_folder_in(repository):
    lines = run(repository, "--scale", "paper", "--figure", "7", "--print", IMAGENET_DIR="/sets/imagenet").stdout
    assert lines.count("--data /sets/imagenet") == 2
    assert run(repository, "--scale", "paper", "--figure", "7", "--print").stdout.count(registry.IMAGENET) == 2


def test_print_is_fast():
    started = time.monotonic()
    subprocess.run([sys.executable, "run_exps.py", "--print"], cwd=ROOT, capture_output=True, check=True)
    assert time.monotonic() - started < 2


def test_everything_runs_in_the_order_of_needs_and_only_once(repository):
    first = run(repository, "--match", NARROWEST, "--jobs", "3")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "4 of 4 experiments are finished" in first.stdout
    assert all(status(repository, experiment) == "finished" for experiment in chosen(NARROWEST))
    started = time.monotonic()
    again = run(repository, "--match", NARROWEST)
    assert (again.returncode, again.stdout) == (0, "All 4 experiments are finished: nothing to do.\n")
    assert time.monotonic() - started < 5
    assert [begun(repository, e) for e in chosen(NARROWEST)] == [list(range(e.epochs)) for e in chosen(NARROWEST)]


def test_what_is_needed_is_run_too(repository):
    assert run(repository, "--match", f"{NARROWEST}.*retrainclf").returncode == 0
    assert status(repository, chosen(f"{NARROWEST}.*clnobias$")[0]) == "finished"


def test_longest_chains_begin_first_and_needs_before_all():
    experiments = registry.experiments("laptop")
    order = [experiment.name for experiment in longest_first(experiments[::-1])]
    assert sorted(order) == sorted(experiment.name for experiment in experiments)
    place = {name: i for i, name in enumerate(order)}
    assert all(place[need] < place[experiment.name] for experiment in experiments for need in experiment.needs)
    alone = [experiment for experiment in experiments if experiment.group == "weight_convergence"]
    works = [work(experiment) for experiment in sorted(alone, key=lambda experiment: place[experiment.name])]
    assert works == sorted(works, reverse=True)


def test_a_failure_is_shown_and_leaves_the_rest_unharmed(repository):
    trained, sampled, retrained, white = chosen(NARROWEST)
    result = run(repository, "--match", NARROWEST, FAKE_FAIL="^digits.*clnobias$")
    assert result.returncode == 1
    assert f"{trained.name}: failed, exit status 1" in result.stdout and "RuntimeError: made to fail" in result.stdout
    assert f"{sampled.name}: left out, it needs {trained.name}" in result.stdout
    assert f"{retrained.name}: left out, it needs {sampled.name}" in result.stdout
    assert "1 of 4 experiments are finished, 1 failed, 2 blocked" in result.stdout
    assert status(repository, white) == "finished"
    assert run(repository, "--match", NARROWEST).returncode == 0


def test_a_killed_process_is_reported(repository):
    result = run(repository, "--match", f"{NARROWEST}.*white", FAKE_KILL="white")
    assert result.returncode == 1 and "failed, killed by SIGKILL" in result.stdout


def test_a_changed_definition_is_reported_and_kept(repository):
    (white,) = chosen(f"{NARROWEST}.*white")
    run(repository, "--match", f"{NARROWEST}.*white")
    args = repository / "checkpoints" / white.name / "args.json"
    args.write_text(args.read_text().replace('"0.05"', '"0.01"'))
    before = begun(repository, white)
    result = run(repository, "--match", f"{NARROWEST}.*white")
    assert result.returncode == 1 and "--lr 0.01, now 0.05" in result.stdout
    assert begun(repository, white) == before
    assert "changed" in run(repository, "--match", f"{NARROWEST}.*white", "--status").stdout


def test_a_removed_output_or_need_is_made_again(repository):
    trained, sampled, retrained, _ = chosen(NARROWEST)
    run(repository, "--match", NARROWEST)
    (repository / "checkpoints" / sampled.name / "checkpoint_repeat0.pt").unlink()
    shutil.rmtree(repository / "checkpoints" / trained.name)
    assert "damaged" in run(repository, "--match", NARROWEST, "--status").stdout
    assert run(repository, "--match", NARROWEST).returncode == 0
    assert begun(repository, sampled) == [0, 0] and begun(repository, retrained) == list(range(retrained.epochs))


def test_two_runners_share_a_folder(repository):
    flags = ("--match", TWO_WIDTHS, "--jobs", "2")
    both = [
        subprocess.Popen(
            command(*flags),
            cwd=repository,
            env=environment(FAKE_SECONDS="0.01"),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert any("in the hands of" in output for output in outputs), outputs
    for experiment in chosen(TWO_WIDTHS):
        assert begun(repository, experiment) == list(range(experiment.epochs))


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_it_finishes_redoing_at_most_an_epoch(repository, seed):
    draw, kills = random.Random(seed), 0
    while True:
        process = subprocess.Popen(
            command("--match", NARROWEST, "--jobs", "2"),
            cwd=repository,
            text=True,
            stdout=subprocess.PIPE,
            env=environment(FAKE_SECONDS="0.03"),
        )
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


@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_it_cleanly(repository, signum, expected):
    process = subprocess.Popen(
        command("--match", NARROWEST, "--jobs", "2"),
        cwd=repository,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(FAKE_SECONDS="0.2"),
    )
    trained = chosen(NARROWEST)[0]
    wait_for(lambda: begun(repository, trained))
    process.send_signal(signum)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == expected
    assert len(errors.splitlines()) == 1 and "0 of 4 experiments are finished" in errors
    assert not any(map(holder, (repository / "checkpoints").rglob("lock")))


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_full_disk_fails_clearly_and_the_next_call_goes_on(repository):
    """Files that may not grow beyond 1 KB stand for a disk that fills up in the middle of a run."""
    (white,) = chosen(f"{NARROWEST}.*white")
    limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", *command("--match", f"{NARROWEST}.*white")]
    result = subprocess.run(limited, cwd=repository, env=environment(), capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "")
    assert f"{white.name}: failed" in result.stdout and 0 < len(begun(repository, white)) < white.epochs
    assert run(repository, "--match", f"{NARROWEST}.*white").returncode == 0
    assert len(begun(repository, white)) <= white.epochs + 1


def test_a_folder_that_cannot_be_made_is_a_clear_line(repository):
    (repository / "checkpoints").write_text("a file where the folder should be")
    result = run(repository, "--match", f"{NARROWEST}.*white")
    assert result.returncode == 1 and "failed, could not be started" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--only", "resamplin"), "did you mean resampling"),
        (("--figure", "10"), "no such figure"),
        (("--scale", "lptop"), "did you mean laptop"),
        (("--match", "("), "not a regular expression"),
        (("--name", "digits-WP16-norm"), "no such experiment"),
        (("--match", "nothing"), "no experiment is all of this"),
        (("--jobs", "0"), "at least 1"),
        (("--epochs", "two"), "whole number"),
        (("--submit", "local", "--pack", "0"), "at least 1"),
        (("--submit", "local", "--time", "soon"), "--time soon"),
    ],
)
def test_bad_input_is_one_clear_line(repository, flags, expected):
    result = run(repository, *flags)
    assert result.returncode == 2 and expected in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (repository / "checkpoints").exists()


def test_without_submitit_or_slurm_it_says_so(repository):
    result = run(repository, "--submit", "slurm", PATH="/nowhere")
    assert result.returncode == 2 and "no sbatch and srun" in result.stderr
    (repository / "submitit.py").write_text("raise ImportError")
    result = run(repository, "--submit", "local")
    assert result.returncode == 2 and "pip install submitit" in result.stderr


def test_imagenet_is_left_out_without_its_folder(repository):
    result = run(repository, "--scale", "paper", "--only", "imagenet_spectra")
    assert result.returncode == 1 and "needs ImageNet: --data DIR or IMAGENET_DIR" in result.stdout


def test_trial_runs_beside_the_real_ones(repository):
    assert run(repository, "--match", NARROWEST, "--epochs", "1").returncode == 0
    assert [begun(repository, registry.trial(e, {"--epochs": "1"})) for e in chosen(NARROWEST)] == [[0]] * 4
    assert not any(begun(repository, e) for e in chosen(NARROWEST))


def test_status_tells_epochs_accuracies_and_time(repository):
    run(repository, "--match", f"{NARROWEST}.*white")
    lines = run(repository, "--match", NARROWEST, "--status").stdout.splitlines()
    assert len(lines) == 1 + 4 + 1 and lines[-1].startswith("4 experiments: 3 missing, 1 finished")
    (white,) = [line for line in lines if "white" in line]
    assert re.search(r"finished +15/15 +25\.0", white)


def test_warm_processes_are_like_fresh_ones(repository):
    result = run(repository, "--match", NARROWEST, "--start", "warm", "--jobs", "2", FAKE_FAIL="white")
    assert result.returncode == 1 and "RuntimeError: made to fail" in result.stdout
    trained, sampled, retrained, _ = chosen(NARROWEST)
    assert all(status(repository, experiment) == "finished" for experiment in (trained, sampled, retrained))
    log = (repository / "checkpoints" / "logs" / f"{trained.name}.log").read_text()
    assert log.splitlines() == [f"epoch {epoch} of {trained.name}" for epoch in range(trained.epochs)]


@pytest.mark.slow
def test_real_scripts_from_training_to_retraining(tmp_path):
    """The chain of figure 3 for one width, one epoch of a few digits each; nothing is left to do afterwards."""
    flags = [
        "--scale",
        "laptop",
        "--match",
        "WP4WP8WP16WP16-norm-L4-clbnstd-clnobias(-load|-white|$)",
        "--epochs",
        "1",
        "--data-subset",
        "0:20",
        "--checkpoints",
        str(tmp_path),
        "--jobs",
        "2",
    ]
    outputs = [
        subprocess.run(
            [sys.executable, "run_exps.py", *flags],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        for _ in range(2)
    ]
    assert outputs[0].returncode == 0 and "4 of 4 experiments are finished" in outputs[0].stdout, outputs[0]
    assert outputs[1].stdout == "All 4 experiments are finished: nothing to do.\n"
    parts = [next(tmp_path.glob(f"trial-*/{name}")) for name in ("*clnobias", "resam*/*", "*-retrainclf", "*-trainclf")]
    assert [json.loads((folder / "status.json").read_text())["state"] for folder in parts] == ["finished"] * 4


def test_submit_local_runs_two_experiments_and_their_dependent(repository):
    names = [experiment.name for experiment in chosen(f"{NARROWEST}.*(clnobias|white-trainclf)$")]
    assert len(names) == 3
    result = run(repository, "--submit", "local", "--jobs", "2", "--name", *names)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("3 of 3 jobs ended well.\n")
    assert all(status(repository, registry.by_name("laptop")[name]) == "finished" for name in names)


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
    result = run(
        repository,
        "--submit",
        "slurm",
        "--match",
        TWO_WIDTHS,
        "--pack",
        "2",
        "--partition",
        "gpu",
        "--gpus",
        "1",
        "--time",
        "2:30:00",
        PATH=f"{tools}:{os.environ['PATH']}",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    scripts = [(repository / f"script{n}").read_text() for n in range(100, 104)]
    assert not (repository / "script104").exists()
    for flag in ("partition=gpu", "gpus-per-node=1", "time=150"):
        assert all(f"#SBATCH --{flag}" in script for script in scripts)
    needs = [re.findall(r"--dependency=(\S+)", script) for script in scripts]
    assert needs == [[], [], ["afterok:100"], ["afterok:102"]]
