"""A cluster that refuses jobs in the middle of a submission, at every place."""

import re

import pytest

from tests.test_run_exps import CHAIN, folder, run, slurm  # noqa: F401


@pytest.mark.parametrize("most", range(4))
def test_the_rest_is_submitted_once_and_waits_for_what_it_needs(most, folder, slurm, record_property):  # noqa: F811
    refused = run(folder, "--submit", "slurm", *CHAIN, PATH=slurm, MOST=str(most))
    assert refused.returncode == 1 and f"{most} jobs are in the queue" in refused.stderr
    for _ in range(2):
        assert run(folder, "--submit", "slurm", *CHAIN, PATH=slurm).returncode == 0
    assert (folder / "count").read_text() == "104\n"
    scripts = [(folder / f"script{n}").read_text() for n in range(100, 104)]
    needs = [re.findall(r"--dependency=afterok:(\S+)", script) for script in scripts]
    assert sum(map(bool, needs)) == 2 and all(int(job) < 100 + n for n, each in enumerate(needs) for job in each)
    record_property("submissions refused in the middle and completed", 1)
