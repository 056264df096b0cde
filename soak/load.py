"""The ImageNet path on a tree of thousands of small images, bad ones among them."""

from soak.programs import run

IMAGES = 20_000


def imagenet(trial):
    """benchmarks/imagenet_load.py."""
    ended = run(["benchmarks/imagenet_load.py", "--images", str(IMAGES), "--size", "64"], fresh=True)
    trial.expect_status(ended, 0)
    failed = [line for line in ended.output.splitlines() if line.startswith("FAIL")]
    trial.expect(not failed, failed)
    memory = [int(line.split()[-2]) for line in ended.output.splitlines() if "workers' memory" in line]
    bad = next((line.split(": ")[1] for line in ended.output.splitlines() if "bad files" in line), "?")
    return (
        f"{IMAGES:,} images, {len(memory)} epochs; bad files: {bad}; "
        f"workers grew by {max(memory, default=0)} KiB at most"
    )
