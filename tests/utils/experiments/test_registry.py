"""The registry: the authors' experiments, corrections apart, each serving a figure; costs from the networks."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.golden_data import original_commands
from utils.experiments import registry

ADDED = {"--seed", "--dir"}


def flags(command):
    return {flag: values for flag, values in registry.flags_of(command).items() if flag not in ADDED}


def test_original_lines_flag_by_flag():
    theirs = original_commands()
    ours = registry.by_name("paper")
    assert len(theirs) == 228
    for name in theirs.keys() & ours.keys():
        before, now = theirs[name], ours[name].command()
        assert before[:2] == now[:2]
        before, now = flags(before[2:]), flags(now[2:])
        if name.endswith("-load-gaussian-retrainclf"):
            assert before.pop("--freeze-P") == ("1",) * 7 and now.pop("--freeze-P") == ("1",) * 8
            (read,), (written,) = before.pop("--resume"), now.pop("--resume")
            assert read == written.replace("/checkpoint_repeat0.pt", "_checkpoint_repeat0.pt")
        assert before == now, name


def test_every_difference_in_names_is_a_correction():
    theirs, ours = original_commands().keys(), registry.by_name("paper").keys()
    eight = "cifar-WP64WP128WP256WP512WP512WP512WP512WP512-norm-L4-clbnstd-clnobias-nowd-paperexps-init"
    four = "cifar-WP64WP128WP256WP512-L4-clbnstd-clnobias-nowd-paperexps-init"
    unused = {f"{eight}{i}" for i in range(1, 51)} | {"standard-resnet18-nobias-clnobias-bnpost"}
    assert theirs - ours == unused
    baseline = {e.name for e in registry.experiments("paper") if e.group == "resampling_baseline"}
    assert ours - theirs == {f"{four}{i}" for i in range(1, 51)} | baseline
    assert len(baseline) == 7 and all(registry.by_name("paper")[name].ours for name in baseline)


def test_corrected_networks_are_the_four_block_ones():
    ours = registry.by_name("paper")
    many = flags(ours["cifar-WP64WP128WP256WP512-L4-clbnstd-clnobias-nowd-paperexps-init1"].command()[2:])
    one = flags(ours["cifar-WP64WP128WP256WP512-L4-clbnstd-clnobias-nowd-paperexps-scalewidth-init1"].command()[2:])
    assert many == one


def test_group_sizes_of_the_paper():
    sizes = {}
    for experiment in registry.experiments("paper"):
        key = experiment.group, experiment.kind
        sizes[key] = sizes.get(key, 0) + 1
    assert sizes == {
        ("gaussianity", "trained"): 50,
        ("resampling", "trained"): 7,
        ("resampling", "resampled"): 7,
        ("resampling", "retrained"): 7,
        ("resampling_baseline", "white"): 7,
        ("activation_convergence", "trained"): 14,
        ("weight_convergence", "trained"): 140,
        ("imagenet_spectra", "trained"): 1,
        ("dynamics", "trained"): 1,
    }


@pytest.mark.parametrize("scale", registry.SCALES)
def test_registry_is_consistent(scale):
    experiments = registry.experiments(scale)
    names = [experiment.name for experiment in experiments]
    assert len(set(names)) == len(names)
    assert len({experiment.seed for experiment in experiments}) == len(names)
    assert registry.figures(scale) == list(range(1, 10))
    assert registry.groups(scale) == registry.groups("paper")
    seen = set()
    for experiment in experiments:
        assert experiment.figures and experiment.cost > 0 and experiment.steps > 0
        assert experiment.seed == registry.seed_of(experiment.name) < 2**31
        assert seen.issuperset(experiment.needs), "a need is listed after what needs it"
        seen.add(experiment.name)


@pytest.mark.parametrize("scale", registry.SCALES)
def test_figures_find_their_sets(scale):
    expected = {
        1: ["networks"],
        2: ["networks"],
        3: ["rainbow", "retrained", "trained", "white"],
        4: ["widths"],
        5: ["resnet", "scattering"],
        6: ["many", "widths"],
        7: ["resnet", "scattering"],
        8: ["networks"],
        9: ["network"],
    }
    for figure, names in expected.items():
        sets = registry.figure_sets(scale, figure)
        assert sorted(sets) == names
        for members in sets.values():
            assert [e.width for e in members] == sorted(e.width for e in members)
            assert all(figure in e.figures for e in members)
        assert {e for members in sets.values() for e in members} == set(registry.by_figure(scale, figure))
    widths = {name: [e.width for e in members] for name, members in registry.figure_sets(scale, 3).items()}
    assert len({tuple(w) for w in widths.values()}) == 1
    with pytest.raises(ValueError, match="no experiment serves it"):
        registry.figure_sets(scale, 10)


def test_published_numbers_of_figure_3():
    sets = registry.figure_sets("paper", 3)
    trained = [e.published and e.published["acc1"] for e in sets["trained"]]
    assert trained == [88.0, 89.7, 91.1, 91.6, 91.9, 91.9, None]
    assert sets["rainbow"][3].published["acc1"] == 81.4 and sets["retrained"][3].published["acc1"] == 85.52


def test_sizes_of_the_specification():
    eight = registry.Scattering((1,) * 8)
    assert eight.image_sizes(32) == [32, 16, 16, 8, 8, 4, 4, 2]
    assert registry.Scattering((1,) * 4, factorize=None).image_sizes(32) == [16, 8, 4, 2]
    eleven = registry.Scattering((1,) * 11, factorize=1)
    assert eleven.image_sizes(224) == [112, 112, 56, 56, 28, 28, 14, 14, 7, 6, 3]
    assert registry.Scattering((1,) * 4).image_sizes(8) == [8, 4, 4, 2]


def counted_multiply_adds(experiment, shape):
    """Real multiply-adds of one image, counted on the built network: real parts of its inputs by its weights."""
    import torch

    import models
    from models.signal import Signal
    from utils.runs import options

    args = options.parse([*experiment.command(data="somewhere")[2:]], environ={})
    network = models.build(options.network_config(args, Signal(*shape, False), 1000 if args.data else 10)).eval()
    if args.arch == "resnet18-custom":
        count, handles = [], []
        for module in network.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                handles.append(
                    module.register_forward_hook(
                        lambda m, _, y: count.append(m.weight.numel() * y[0].numel() // y.shape[1])
                    )
                )
        with torch.no_grad():
            network(torch.zeros(1, *shape))
        return sum(count)
    per_weight = 1.5 if args.Pr_size[0] else 3
    per_weight = per_weight if "rho" in args.arch else 1
    total = sum(block.P.weight.numel() * block.out.height * block.out.width * per_weight for block in network.blocks)
    return int(total) + network.classifier.linear.weight.numel()


@pytest.mark.parametrize(
    ("scale", "figure", "name", "shape"),
    [
        ("laptop", 1, "networks", (1, 8, 8)),
        ("laptop", 3, "trained", (1, 8, 8)),
        ("laptop", 7, "scattering", (1, 32, 32)),
        ("laptop", 7, "resnet", (1, 32, 32)),
        ("laptop", 6, "many", (1, 8, 8)),
        ("paper", 1, "networks", (3, 32, 32)),
        ("paper", 6, "many", (3, 32, 32)),
        ("paper", 5, "resnet", (3, 224, 224)),
    ],
)
def test_costs_are_those_of_the_built_networks(scale, figure, name, shape):
    experiment = registry.figure_sets(scale, figure)[name][0]
    validation = {"laptop": 500, "paper": 50_000 if shape[-1] == 224 else 10_000}[scale]
    per_image = experiment.cost / (experiment.epochs * (3 * experiment.images + validation))
    assert per_image == counted_multiply_adds(experiment, shape)


def test_every_training_command_parses():
    from utils.runs import options

    for scale in registry.SCALES:
        for experiment in registry.experiments(scale):
            if experiment.script == "main_block.py":
                args = options.parse(experiment.command(data="somewhere")[2:], environ={})
                assert (args.dir, args.seed, args.epochs) == (experiment.name, experiment.seed, experiment.epochs)


def test_trial_changes_only_what_it_says():
    sets = registry.figure_sets("laptop", 3)
    trained, sampled, retrained = (
        registry.trial(sets[name][0], {"--epochs": "3", "--data-subset": "0:50"})
        for name in ("trained", "rainbow", "retrained")
    )
    prefix = "trial-epochs3-data-subset0_50/"
    before, now = flags(sets["trained"][0].arguments), flags(trained.arguments)
    assert {flag for flag in now if now[flag] != before.get(flag)} == {"--epochs", "--data-subset"}
    assert trained.name == prefix + sets["trained"][0].name and trained.epochs == 3
    assert sampled.needs == (trained.name,) and trained.name in sampled.arguments
    assert f"{sampled.name}/checkpoint_repeat0.pt" in retrained.arguments and retrained.name.startswith(prefix)


def test_task_of_an_array_has_its_own_name_seed_and_needs():
    trained, sampled = (registry.figure_sets("paper", 3)[name][0] for name in ("trained", "rainbow"))
    task = registry.with_init(sampled, 7)
    assert task.name == f"{sampled.name}-init7" and task.needs == (f"{trained.name}-init7",)
    assert task.seed == registry.seed_of(task.name) and task.arguments == ("--experiment", f"{trained.name}-init7")


def test_imagenet_has_a_placeholder_until_its_folder_is_known():
    experiment = registry.figure_sets("paper", 7)["scattering"][0]
    assert registry.IMAGENET in experiment.command()
    assert registry.IMAGENET not in experiment.command(data="/sets/imagenet")


def test_listing_imports_no_torch():
    code = (
        "import sys; from utils.experiments import cluster, processes, registry, runner, status; "
        "registry.experiments('paper'); print([m for m in ('torch', 'numpy', 'submitit') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ast.literal_eval(run.stdout) == []
