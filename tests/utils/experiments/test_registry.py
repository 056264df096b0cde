"""The registry: the authors' experiments, corrections apart, each serving a figure; costs from the networks."""

import subprocess
import sys

import pytest
import torch

import models
from models.signal import Signal
from tests.conftest import ROOT
from tests.golden_data import original_commands
from utils.experiments import registry
from utils.runs import options
from utils.runs.networks import network_config

SETS = {
    **dict.fromkeys((1, 2, 8, 10), {"networks"}),
    3: {"trained", "rainbow", "retrained", "white"},
    4: {"widths"},
    **dict.fromkeys((5, 7), {"scattering", "resnet"}),
    6: {"widths", "many"},
    9: {"network"},
}
FOUR = "cifar-WP64WP128WP256WP512-L4-clbnstd-clnobias-nowd-paperexps"


def flags(command):
    """{flag: values} of a command without interpreter and script, but for what every experiment has of its own."""
    found = {}
    for word in command[2:]:
        if word.startswith("-"):
            values = found[word] = []
        else:
            values.append(word)
    return {flag: values for flag, values in found.items() if flag not in ("--seed", "--dir")}


def test_original_lines_flag_by_flag():
    theirs, ours = original_commands(), registry.by_name("paper")
    assert len(theirs) == 228
    for name in theirs.keys() & ours.keys():
        before, now = theirs[name], ours[name].command()
        assert before[:2] == now[:2]
        before, now = flags(before), flags(now)
        if name.endswith("-load-gaussian-retrainclf"):
            assert before["--freeze-P"] == ["1"] * 7
            (read,), (written,) = before.pop("--resume"), now.pop("--resume")
            assert read == written.replace("/checkpoint_repeat0.pt", "_checkpoint_repeat0.pt")
        assert before == now, name


def test_every_difference_in_names_is_a_correction():
    theirs, ours = original_commands().keys(), registry.by_name("paper")
    eight = FOUR.replace("WP512-L4", "WP512" * 5 + "-norm-L4")
    unused = {f"{eight}-init{i}" for i in range(1, 51)} | {"standard-resnet18-nobias-clnobias-bnpost"}
    assert theirs - ours.keys() == unused
    baseline = {name for name, experiment in ours.items() if experiment.group == "resampling_baseline"}
    assert ours.keys() - theirs == {f"{FOUR}-init{i}" for i in range(1, 51)} | baseline
    assert len(baseline) == 7 and all(ours[name].ours for name in baseline)
    assert flags(ours[f"{FOUR}-init1"].command()) == flags(ours[f"{FOUR}-scalewidth-init1"].command())


@pytest.mark.parametrize("scale", registry.SCALES)
def test_registry_is_consistent(scale):
    experiments = registry.experiments(scale)
    assert len({e.name for e in experiments}) == len({e.seed for e in experiments}) == len(experiments)
    assert registry.figures(scale) == list(range(1, 11))
    assert registry.groups(scale) == registry.groups("paper")
    seen = set()
    for experiment in experiments:
        assert experiment.figures or experiment.width == 8 and "-skip-" in experiment.name  # theirs, drawn nowhere
        assert experiment.cost > 0 and experiment.steps > 0
        assert experiment.seed == registry.seed_of(experiment.name) < 2**31
        assert seen.issuperset(experiment.needs), "a need is listed after what needs it"
        seen.add(experiment.name)


@pytest.mark.parametrize("scale", registry.SCALES)
def test_figures_find_their_sets(scale):
    for figure, names in SETS.items():
        sets = registry.figure_sets(scale, figure)
        assert sets.keys() == names
        assert all([e.width for e in members] == sorted(e.width for e in members) for members in sets.values())
        serving = {e for e in registry.experiments(scale) if figure in e.figures}
        assert {e for members in sets.values() for e in members} == serving
    assert len({tuple(e.width for e in members) for members in registry.figure_sets(scale, 3).values()}) == 1
    with pytest.raises(ValueError, match="no experiment serves it"):
        registry.figure_sets(scale, 11)


@pytest.mark.parametrize("scale", registry.SCALES)
def test_the_last_projection_belongs_to_the_classifier(scale):
    for experiment in registry.experiments(scale):
        if experiment.kind in ("retrained", "white"):
            args = options.parse(experiment.command(data="somewhere")[2:], environ={})
            assert args.freeze_P == [True] * (args.n_blocks - 1) + [False]


def test_claims_of_the_laptop_scale_rest_on_three_networks():
    for figure in registry.figures("laptop"):
        for members in registry.figure_sets("laptop", figure).values():
            assert all(sum(e.width == width for e in members) >= 3 for width in {e.width for e in members})


def test_published_numbers_of_figure_3():
    sets = registry.figure_sets("paper", 3)
    trained = [e.published and e.published["acc1"] for e in sets["trained"]]
    assert trained == [88.0, 89.7, 91.1, 91.6, 91.9, 91.9]
    assert sets["rainbow"][3].published["acc1"] == 81.4 and sets["retrained"][3].published["acc1"] == 85.52


@pytest.mark.parametrize(
    ("blocks", "factorize", "size", "expected"),
    [(8, 0, 32, [32, 16, 16, 8, 8, 4, 4, 2]), (4, None, 32, [16, 8, 4, 2]), (4, 0, 8, [8, 4, 4, 2])]
    + [(11, 1, 224, [112, 112, 56, 56, 28, 28, 14, 14, 7, 6, 3])],
)
def test_sizes_of_the_specification(blocks, factorize, size, expected):
    assert options.image_sizes(size, blocks, factorize) == expected


def counted_multiply_adds(experiment, shape):
    """Real multiply-adds of one image, counted on the built network: real parts of its inputs by its weights."""
    args = options.parse([*experiment.command(data="somewhere")[2:]], environ={})
    network = models.build(network_config(args, Signal(*shape, False), 1000 if args.data else 10)).eval()
    if args.arch == "resnet18-custom":
        counts = []
        for module in network.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.register_forward_hook(
                    lambda m, _, y: counts.append(m.weight.numel() * y[0].numel() // y.shape[1])
                )
        with torch.no_grad():
            network(torch.zeros(1, *shape))
        return sum(counts)
    per_weight = 1 if "rho" not in args.arch else 1.5 if args.Pr_size[0] else 3
    total = sum(block.P.weight.numel() * block.out.height * block.out.width * per_weight for block in network.blocks)
    return int(total) + network.classifier.linear.weight.numel()


@pytest.mark.parametrize(
    ("scale", "figure", "name", "shape"),
    [("laptop", figure, name, (1, 8, 8)) for figure, name in ((1, "networks"), (3, "trained"), (6, "many"))]
    + [("laptop", 7, name, (1, 32, 32)) for name in ("scattering", "resnet")]
    + [("paper", figure, name, (3, 32, 32)) for figure, name in ((1, "networks"), (6, "many"))]
    + [("paper", 5, "resnet", (3, 224, 224))],
)
def test_costs_are_those_of_the_built_networks(scale, figure, name, shape):
    experiment = registry.figure_sets(scale, figure)[name][0]
    validation = {"laptop": 500, "paper": 50_000 if shape[-1] == 224 else 10_000}[scale]
    per_image = experiment.cost / (experiment.epochs * (3 * experiment.images + validation))
    assert per_image == counted_multiply_adds(experiment, shape)


@pytest.mark.parametrize("scale", registry.SCALES)
def test_every_training_command_parses(scale):
    for experiment in registry.experiments(scale):
        if experiment.script == "main_block.py":
            args = options.parse(experiment.command(data="somewhere")[2:], environ={})
            assert (args.dir, args.seed, args.epochs) == (experiment.name, experiment.seed, experiment.epochs)


def test_trial_changes_only_what_it_says():
    sets = registry.figure_sets("laptop", 3)
    overrides = {"--epochs": "3", "--data-subset": "0:50"}
    trained, sampled, retrained = (
        registry.trial(sets[name][0], overrides) for name in ("trained", "rainbow", "retrained")
    )
    prefix = "trial-epochs3-data-subset0_50/"
    before, now = flags(sets["trained"][0].command()), flags(trained.command())
    assert {flag for flag in now if now[flag] != before.get(flag)} == overrides.keys()
    assert trained.name == prefix + sets["trained"][0].name and trained.epochs == 3
    assert sampled.needs == (trained.name,) and trained.name in sampled.arguments
    assert f"{sampled.name}/checkpoint_repeat0.pt" in retrained.arguments and retrained.name.startswith(prefix)


def test_task_of_an_array_has_its_own_name_seed_and_needs():
    trained, sampled = (registry.figure_sets("paper", 3)[name][0] for name in ("trained", "rainbow"))
    task = registry.with_init(sampled, 7)
    assert task.name == f"{sampled.name}-init7" and task.needs == (f"{trained.name}-init7",)
    assert task.seed == registry.seed_of(task.name) and task.arguments == ("--experiment", f"{trained.name}-init7")


def test_listing_imports_no_torch():
    code = (
        "import sys; from utils.experiments import cluster, processes, registry, runner, status; "
        "registry.experiments('paper'); print([m for m in ('torch', 'numpy', 'submitit') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"
