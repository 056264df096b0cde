"""The command line: every command of the authors parses and builds, and every mistake is one clear line."""

import itertools
import json
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch

import models
import run_exps
from models.signal import Signal
from tests.conftest import ROOT
from tests.golden_data import original_commands
from utils.errors import UserError
from utils.figures import command as figures
from utils.runs import options, values
from utils.runs.authors import FOREIGN
from utils.runs.networks import network_config

NORM = "--digits -a 'Fw Std Pr N' --psi-arch mod --Pr-size 8 16 --n-blocks 2 --scat-angles 4 4"
COMMANDS = {name: words[2:] for name, words in original_commands().items() if words[:2] == ["python", "main_block.py"]}
PUBLISHED_PARAMETERS = {
    "cifar-WP64WP128WP256WP512WP512WP512WP512WP512-norm-L4-clbnstd-clnobias": 6_124_480,
    "cifar-WP64WP128WP256WP512WP512WP512WP512WP512-skip-norm-L4-clbnstd-clnobias": 12_248_960,
    "cifar-WP64WP128WP256WP512-L4-clbnstd-clnobias-nowd-paperexps-scalewidth-init1": 881_600,
    "imagenet-WPc32WPc64WPc64WPc128WPc256WPc512WPc512WPc512WPc512WPc512WPc256-skip-L4": 31_768_424,
    "standard-resnet18-nobias-clnobias-bnpost-widthX1-fix": 11_678_912,
}


def parse(line, **environ):
    return options.parse(shlex.split(line), environ)


def build(line):
    return models.build(network_config(parse(line), Signal(1, 8, 8), 10))


def test_every_command_of_the_authors_builds_networks_of_the_published_sizes():
    assert len(COMMANDS) == 221
    sizes, found = {}, {}
    for name, argv in COMMANDS.items():
        args = options.parse(argv, {})
        signal, classes = (Signal(3, 224, 224), 1000) if args.dataset == "imagenet" else (Signal(3, 32, 32), 10)
        config = network_config(args, signal, classes)
        if repr(config) not in sizes:
            with torch.device("meta"):
                learned = [p for p in models.build(config).parameters() if p.requires_grad]
            sizes[repr(config)] = sum(p.numel() * (2 if p.is_complex() else 1) for p in learned)
        found[name] = sizes[repr(config)]
    assert {name: found[name] for name in PUBLISHED_PARAMETERS} == PUBLISHED_PARAMETERS


def test_lists_that_stop_early_are_completed_as_the_authors_program_does():
    """With the default; one size of a projection is for all blocks, where that program stops."""
    line = "--digits -a 'Fw Std Pr' --psi-arch mod --Pr-size 4 --n-blocks 3"
    args = parse(f"{line} --freeze-P 1 --scat-angles 4 --scat-non-linearity abs abs --dict-norm 2")
    assert args.freeze_P == [True, False, False] and args.scat_angles == [4, 8, 8] and args.dict_norm == [2, 0, 0]
    assert args.scat_non_linearity == ["abs", "abs", "mod"] and args.remove_L == [False] * 3 and args.Pr_size == [4] * 3


@pytest.mark.parametrize(
    "words, field, value",
    [
        ("--dataset CIFAR10", "dataset", "cifar10"),
        ("--data-subset 'range(100)'", "data_subset", {"range": [0, 100, 1]}),
        ("--data-subset 'range(10, 0, -2)'", "data_subset", {"range": [10, 0, -2]}),
        ("--data-subset [3,1]", "data_subset", {"images": [3, 1]}),
        ("--classes-subset 0 1 2", "classes_subset", {"classes": [0, 1, 2]}),
        ("--classes-subset 2:", "classes_subset", [2, None, None]),
        ("--no-classifier-bias --classifier-bias", "classifier_bias", True),
        ("--homo", "homogeneous", True),
        ("--learning-rate-adj 7", "learning_rate_adjust_frequency", 7),
    ],
)
def test_what_the_authors_program_accepts_is_accepted(words, field, value):
    line = NORM.replace("--digits ", "") if "--dataset" in words else NORM
    assert getattr(parse(f"{line} {words}"), field) == value


def test_names_of_blocks_and_turns_of_non_linearities():
    block = parse("--digits -a scatnetblockanalysis --L-proj-size 8 --last-arch blockanalysis")
    assert (block.arch, block.last_arch) == ("Fw rho Std P N FrhoF".split(), "Std P N FrhoF".split())
    standard = parse("--digits -a resnet18-custom --standard-non-linearity relu abs --standard-init-gain -1")
    assert standard.standard_non_linearity == ["relu", "abs"] and standard.standard_init_gain == -1
    assert parse("--digits -a resnet18-custom --standard-non-linearity abs").standard_non_linearity == "abs"
    sampling = options.parse_sampling("--experiment x --epoch -1 --num-repeats 3 --num-simultaneous 2".split())
    assert sampling.epoch is None and sampling.num_repeats == 6


def test_every_flag_of_the_authors_program_works_or_is_explained():
    """As docs/faithful.md lists them."""
    text = (ROOT / "docs/faithful.md").read_text()
    listed = re.findall(r"^\| `(-\S+)`", text, re.MULTILINE)
    own = {
        f
        for o in options.TRAINING.options
        for f in (*f"{o.flags} {o.opposite}".split(), *("--" + n for n in o.shortcuts))
    }
    own |= {f for o in options.SAMPLING.options for f in o.flags.split()} | {"--print"}
    assert len(listed) == len(set(listed)) == 114 and set(listed) - own == set(FOREIGN)
    for flag, what in FOREIGN.items():
        for word in (flag, f"{flag}=3"):
            with pytest.raises(UserError, match=f"^{flag}: a flag of the authors' program that {re.escape(what)}$"):
                parse(f"{NORM} {word}")
    with pytest.raises(UserError, match="^--load-dict: a flag"):
        parse(f"{NORM} --load-d x")


def test_the_documentation_lists_all_options_by_group():
    page = (ROOT / "docs" / "options.md").read_text()
    for group, members in itertools.groupby(options.TRAINING.options, key=lambda option: option.group):
        flags = [
            f"`{flag}`" for each in members for flag in (each.flags.split()[0], *map("--{}".format, each.shortcuts))
        ]
        assert f"| {group.title} | {', '.join(flags)} |" in page


NETWORK_OPTIONS = [option for option in options.TRAINING.options if option.group.network and option.field != "n_blocks"]


@pytest.mark.parametrize("option", NETWORK_OPTIONS, ids=lambda option: option.field)
def test_every_option_of_a_network_reaches_its_configuration(option, tmp_path):
    file = str(tmp_path / "matrix.npy")
    np.save(file, np.ones((5, 4)))
    args = parse(NORM if option.group.network == "blocks" else "--digits -a resnet18")
    args = replace(args, P_eigenvectors=[file, file]) if "eigenvectors_" in option.field else args
    value = {values.natural: 1, values.module_names: ["id"], values.matrix_file: file}.get(option.type, 3)
    value = option.choices[-1] if option.choices else value
    value = not option.default if option.type in (None, values.bit) else value
    other = replace(args, **{option.field: [value] * 2 if option.per_block else value})
    assert repr(network_config(other, Signal(3, 8, 8), 10)) != repr(network_config(args, Signal(3, 8, 8), 10))


@pytest.mark.parametrize(
    "more, differences",
    [
        ("--lr=0.05 --wd 0", {}),
        ("--learning-rate 5e-2 --weight-decay 0.0 --scat-angles 4 4", {}),
        ("--lr 0.05 --wd 0 --amp --epochs 3 -j 0 -p 3 --dir x --data-dir y --device cpu", {}),
        ("--lr 0.01 --wd 0", {"lr": (0.05, 0.01)}),
        ("--lr 0.05 --wd 0 --Pr-size 8", {"Pr_size": ([8, 16], [8, 8])}),
        ("--lr 0.05 --wd 0 --resume file", {"resume": (None, "file")}),
    ],
)
def test_a_run_is_the_same_if_its_resolved_options_are(more, differences):
    stored = json.loads(json.dumps(vars(parse(f"{NORM} --lr 0.05 --wd 0"))))
    argv = shlex.split(f"{NORM} {more}".replace("--digits", "--dataset digits"))
    assert options.changes("main_block.py", stored, argv) == differences


def test_samples_are_the_same_if_their_resolved_options_are():
    stored = vars(options.parse_sampling(["--experiment", "x", "--num-repeats", "2"]))
    assert options.changes("resample.py", stored, "--experiment x -b 128 --device cpu".split()) == {}
    assert options.changes("resample.py", stored, "--experiment y".split()) == {"experiment": ("x", "y")}
    with pytest.raises(UserError, match="no arguments of main_block.py"):
        options.changes("main_block.py", stored, shlex.split(NORM))


def test_arguments_stored_by_an_older_version_are_completed():
    """As args.json holds them since the first version: the same names and values; options added later are missing."""
    stored = json.loads((ROOT / "tests/utils/runs/interrupted/args.json").read_text())["args"]
    args = options.TRAINING.restore(stored, "args.json")
    assert {field: value for field, value in vars(args).items() if field in stored}.items() <= stored.items()
    assert args.lambda_star == [1, 1] and args.standard_init_gain == 1
    frames = {**stored, "arch": ["Fw", "R", "FrhoF"]}
    assert options.TRAINING.restore(frames, "args.json").lambda_star == [0, 0]  # there was no threshold
    old = {field: value for field, value in stored.items() if field not in ("scat_full_angles", "momentum")}
    assert options.TRAINING.restore(old, "args.json") == args
    for change in ({"standard_non_linearity": "pow"}, {"randomize_labels": 3}):
        with pytest.raises(UserError, match="of an earlier version, in which --.*train it anew"):
            options.TRAINING.restore({**stored, **change}, "args.json")
        assert options.TRAINING.restore({**stored, **change, "lambda_star": [1, 1]}, "args.json")


@pytest.mark.parametrize(
    "line, says",
    [
        ("NORM -a 'Fw Std Prr N'", "'Prr'"),
        ("NORM -a 'Fw Std Prr N'", "did you mean 'Pr'"),
        ("NORM -a ''", "empty"),
        ("NORM --psi-arch modd", "did you mean 'mod'"),
        ("NORM --Pr-size 8 16 32", "--Pr-size has 3 values for 2 blocks"),
        ("NORM --scat-angles 4 4 4", "--scat-angles has 3 values"),
        ("NORM --Pr-size 8 0", "0 is not a positive integer"),
        ("NORM --Pr-size 8 big", "'big' is not a positive integer"),
        ("NORM --batch-size -3", "--batch-size: -3 is not a positive integer"),
        ("NORM --lr nan", "nan is not a number of at least 0"),
        ("NORM --seed 100000000000000000000000", "too large"),
        ("NORM --lr 1e308", "too large"),
        ("NORM --wd 1e39", "too large"),
        ("--digits --arch resnet18-custom --standard-width-scaling 1e9", "too large"),
        ("NORM --dir ''", "--dir: empty"),
        ("NORM --checkpoints=~nobody-of-this-name/x", "a user or a variable that does not exist"),
        ("NORM --data-dir $NOT_SET/x", "a user or a variable that does not exist"),
        (f"NORM --dir {'x' * 256}", "too long"),
        ("NORM --n-blocks 1000000000000", "too large"),
        ("NORM --n-blocks 1001", "from 1 to 1000"),
        ("NORM --resume ''", "--resume: empty"),
        ("NORM --n-blocks 0", "0 is not a positive integer"),
        ("NORM --Pc-size 8", "--Pc-size is the size of the module Pc, which is not in --arch"),
        ("NORM -a 'Fw Std Pr Pc'", "the module Pc needs its number of channels, --Pc-size"),
        ("NORM --standard-width-scaling 2", "--standard-width-scaling does not apply"),
        ("NORM --no-such-flag", "--no-such-flag"),
        ("NORM --cifar10", "not allowed with"),
        ("NORM --data somewhere", "--data is ImageNet's folder"),
        ("NORM --restart", "--resume FILE"),
        ("NORM --P-eigenvectors-end 3", "need --P-eigenvectors"),
        ("NORM --data-subset 3", "START:STOP"),
        ("NORM --scattering-wph 2", "0 or 1"),
        ("NORM --pars-reg --quadrature-reg", "not allowed with"),
        ("NORM --first-arch 'Fw Pr' --last-arch 'Fw Pr' --n-blocks 1 --scat-angles 4 --Pr-size 8", "both replace"),
        ("--digits --arch resnet18-custom --Pr-size 8", "--Pr-size does not apply to resnet18-custom"),
        ("--digits --arch resnet18-custom --no-classifier-bias", "--no-classifier-bias does not apply"),
        ("--arch resnet18-custom", "--digits needs nothing"),
        ("--dataset imagenet32 --arch resnet18-custom", "--data DIR"),
        ("--digits", "--arch"),
        ("--digits --arch resnet18-custom --evaluate", "--resume FILE"),
        ("NORM --n-blocks 5 --Pr-size 8", "block 4 of 5"),
        ("NORM -a 'Fw mod mod Std Pr N'", "mod"),
        ("--digits --arch resnet17-custom", "resnet17-custom"),
    ],
)
def test_mistakes_are_one_clear_line(line, says):
    with pytest.raises(ValueError) as caught:
        build(line.replace("NORM", NORM))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_home_and_variables_are_expanded_in_every_name_of_a_file_or_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PLACE", "runs")
    for command in (options.TRAINING, options.SAMPLING):
        named = [option for option in command.options if option.metavar in ("DIR", "FILE")]
        assert len(named) > 2
        for option in [*named, command.by_field["dir"]]:
            needed = ["-a" if command is options.TRAINING else "--experiment", "x"]
            given = command.given([f"{option.flag}=~/${{PLACE}}/$PLACE", *needed])
            value = given[option.field]
            assert (value[0] if option.per_block else value) == "/home/me/runs/runs"
    for parser, flags in ((run_exps.parser(), PLACES[:3]), (figures.parser(), PLACES)):
        for flag in flags:
            given = parser.parse_args([f"{flag}=~/${{PLACE}}/$PLACE"])
            assert str(getattr(given, flag[2:].replace("-", "_"))) == "/home/me/runs/runs"


PLACES = "--checkpoints --data --data-dir --numbers --pictures --out".split()


def test_a_slurm_array_gives_every_task_its_name_and_seed():
    one, two = (parse(NORM + " --dir run --seed 5", SLURM_ARRAY_TASK_ID=task) for task in "12")
    assert (one.dir, two.dir) == ("run-init1", "run-init2")
    assert len({one.seed, two.seed, parse(NORM + " --seed 5").seed}) == 3


def test_names_that_are_made_up_are_unique():
    made_up = {options.made_up_name(parse(NORM), {"SLURM_ARRAY_TASK_ID": "3"}) for _ in range(100)}
    assert len(made_up) == 100
    assert all(name.startswith("digits-Fw-Std-Pr-N-") and name.endswith("-init3") for name in made_up)


def test_without_phase_the_coefficients_are_moduli():
    with_mod, without_phase = build(NORM), build(NORM.replace("--psi-arch mod", "--scattering-wph 0 0"))
    without_phase.load_state_dict(with_mod.state_dict())
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(with_mod.eval()(x), without_phase.eval()(x))


def test_projections_come_from_files(tmp_path):
    """Eigenvectors lie in rows; kernels of 1×1 are matrices; eigenvalues of the chosen vectors, at least 0."""
    vectors = torch.linalg.qr(torch.randn(5, 5)).Q
    torch.save(vectors[:, :, None, None], tmp_path / "vectors.pt")
    np.save(tmp_path / "values.npy", np.array([9.0, 0.0, -1e-9, 0.0, 9.0], np.float32))
    np.savez(tmp_path / "weights.npz", weights=np.ones((16, 40, 1, 1), np.float32))
    chosen = f"--P-eigenvectors {tmp_path}/vectors.pt --P-eigenvectors-start 1 --P-eigenvectors-end 4"
    network = build(
        f"{NORM} {chosen} --P-eigenvalues {tmp_path}/values.npy --P-initialization none {tmp_path}/weights.npz"
    )
    first, second = network.blocks[0].P, network.blocks[1].P
    assert torch.equal(first.basis, vectors[1:4]) and first.weight.shape == (8, 3) and not first.weight.any()
    assert torch.equal(second.weight, torch.ones(16, 40)) and second.basis is None
    for rows in ("-start 5", "-end 6", "-start 3 --P-eigenvectors-end 3"):
        with pytest.raises(UserError, match=r"vectors.pt: shape \(5, 5\) has no rows"):
            build(f"{NORM} --P-eigenvectors {tmp_path}/vectors.pt --P-eigenvectors{rows}")


def test_files_that_are_no_matrix_are_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    torch.save(object, tmp_path / "code.pt")
    for file in ("objects.npy", "missing.pt", "code.pt"):
        with pytest.raises(UserError, match=file) as error:
            build(f"{NORM} --P-eigenvalues {tmp_path}/{file}")
        assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
