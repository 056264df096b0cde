"""The standard networks: torchvision's, and the options that the paper adds."""

from dataclasses import replace
from urllib.error import URLError

import pytest
import torch
from torchvision import models as tv

from models import build
from models.config import StandardConfig
from models.names import STANDARD_NON_LINEARITIES
from models.nonlinearity import StandardNonLinearity
from models.signal import Signal
from models.standard_parts import batch_norm

RGB = Signal(3, 32, 32)
TINY = StandardConfig("resnet18-custom", 10, RGB, width=1 / 16)
VGG_TINY = replace(TINY, name="vgg11-custom")


def trainable(network):
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def random_state(network):
    """Random weights and statistics for all of `network`, so that nothing hides behind zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in network.state_dict().items():
        state[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
        if name.endswith("running_var"):
            state[name].uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point():
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 10
            state[name].normal_(0, (2 / fan_in) ** 0.5, generator=generator)
    return state


@pytest.mark.parametrize(
    "theirs, config",
    [
        (tv.resnet18, StandardConfig("resnet18-custom", 1000, RGB)),
        (tv.resnet50, StandardConfig("resnet50-custom", 1000, RGB)),
        (tv.vgg11, StandardConfig("vgg11-custom", 1000, RGB, batch_norm="none")),
        (tv.vgg11_bn, StandardConfig("vgg11-custom", 1000, RGB, batch_norm="pre")),
    ],
)
def test_torchvisions_weights_give_torchvisions_outputs(theirs, config):
    with torch.device("meta"):
        theirs, ours = theirs(), build(config)
    weights = random_state(theirs)
    images = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    for network in (theirs, ours):
        network.load_state_dict(weights, assign=True)
        network.eval()
    with torch.no_grad():
        expected = theirs(images)
        assert (ours(images) - expected).abs().max() < 1e-5 * expected.std()


def test_every_network_has_torchvisions_parameters():
    with torch.device("meta"):
        for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "vgg11", "vgg13", "vgg16", "vgg19"):
            ours = build(StandardConfig(f"{name}-custom", 10, RGB))
            theirs = tv.get_model(f"{name}_bn" if "vgg" in name else name, num_classes=10)
            shapes = {k: v.shape for k, v in theirs.state_dict().items()}
            assert {k: v.shape for k, v in ours.state_dict().items()} == shapes
            plain = build(StandardConfig(name, 10, RGB))
            assert type(plain).__module__.startswith("torchvision")


def test_trainable_parameters_of_the_papers_resnet():
    paper = StandardConfig(
        "resnet18-custom", 1000, Signal(3, 224, 224), batch_norm="post", bias=False, classifier_bias=False
    )
    with torch.device("meta"):
        assert trainable(build(paper)) == 11_678_912
        assert build(replace(paper, width=2)).fc.in_features == 1024
        assert build(replace(paper, width=0.3)).conv1.out_channels == int(0.3 * 64)


@pytest.mark.parametrize("config", [TINY, replace(TINY, name="resnet50-custom"), VGG_TINY])
def test_options_change_the_parameters_they_name(config):
    keys = set(build(config).state_dict())
    assert not any("bn" in k or "running" in k for k in build(replace(config, batch_norm="none")).state_dict())
    unbiased = build(replace(config, bias=False))
    biases = {k for k, _ in unbiased.named_parameters() if k.endswith("bias")}
    assert biases == {"fc.bias" if "resnet" in config.name else "classifier.6.bias"}
    assert not any(
        k.endswith("bias") for k, _ in build(replace(config, bias=False, classifier_bias=False)).named_parameters()
    )
    if "resnet" in config.name:
        post = set(build(replace(config, batch_norm="post")).state_dict())
        assert keys - post == {k for k in keys if ".downsample.1." in k} and not post - keys
        with_biases = build(replace(config, batch_norm="none"))
        assert with_biases.layer1[0].conv1.bias is not None


@pytest.mark.parametrize("order", ["none", "pre", "post"])
@pytest.mark.parametrize("config", [TINY, VGG_TINY])
def test_order_of_batch_norm_and_non_linearity(config, order):
    """After the non-linearity, batch norm sees no negative number; before it, it does."""
    network = build(replace(config, batch_norm=order))
    seen = []
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d) and "downsample" not in name:
            module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].min().item()))
    network(torch.randn(4, 3, 32, 32))
    assert bool(seen) == (order != "none")
    assert all(low >= 0 for low in seen) if order == "post" else all(low < 0 for low in seen)


@pytest.mark.parametrize("name", STANDARD_NON_LINEARITIES)
def test_non_linearities(name):
    x = torch.tensor([[-2.0, -0.5, 0.0, 0.5, 2.0]]).T.repeat(1, 2)[:, :, None, None]  # (5, 2, 1, 1)
    function = StandardNonLinearity(name, 2)
    flat = x[:, 0, 0, 0]
    start = {
        "relu": flat.relu(),
        "abs": flat.abs(),
        "absdead": flat.abs(),
        "thresh": flat,
        "tanh": flat.tanh(),
        "sigmoid": flat.sigmoid(),
        "pow": flat / (1 + flat.abs()),
        "powfixed": flat / (1 + flat.abs()),
    }
    torch.testing.assert_close(function(x)[:, 0, 0, 0], start[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(function(x[:, :, 0, 0]), function(x)[:, :, 0, 0])
    learned = dict(function.named_parameters())
    assert set(learned) == {
        "relu": set(),
        "abs": set(),
        "absdead": {"bias"},
        "thresh": {"bias"},
        "powfixed": {"bias"},
    }.get(name, {"gain", "bias"})
    if learned:
        (function(x) + 1).square().sum().backward()
        assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in learned.values())
        with torch.no_grad():
            learned["bias"][1] = 0.7
        one, other = function(x)[:, 0], function(x)[:, 1]
        assert not torch.equal(one, other)
    if name in ("absdead", "thresh"):
        assert function(x)[1:4, 1].abs().max() == 0


@pytest.mark.parametrize("config", [TINY, VGG_TINY])
@pytest.mark.parametrize("name", ["absdead", "pow"])
def test_learned_non_linearities_train(config, name):
    network = build(replace(config, non_linearity=name, batch_norm="post"))
    network(torch.randn(4, 3, 32, 32)).square().sum().backward()
    gains = [p for k, p in network.named_parameters() if k.endswith("bias") and p.grad is not None and p.grad.any()]
    assert len(gains) > 10 and all(p.grad.isfinite().all() for p in network.parameters())


def test_same_seed_same_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build(TINY).parameters()])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_input_channels_follow_the_images():
    gray = Signal(1, 8, 8)
    assert build(replace(TINY, input=gray))(torch.randn(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": "resnet19-custom"}, "unknown network"),
        ({"batch_norm": "after"}, "none, pre, post"),
        ({"non_linearity": "rleu"}, "relu, abs"),
        ({"width": 0.001}, "leaves none of 64"),
        ({"num_classes": 0}, "at least one class"),
        ({"pretrained": True}, "only torchvision's own networks"),
        ({"name": "resnet18"}, "width is fixed"),
        ({"name": "resnet18", "width": 1.0, "input": Signal(1, 32, 32)}, "3 channels, not 1"),
        ({"name": "resnet18", "width": 1.0, "pretrained": True}, "1000 classes, the data has 10"),
        ({"name": "vgg11-custom", "input": Signal(3, 8, 8)}, "at least 32×32, not 8×8"),
        ({"input": Signal(3, 32, 32, complex=True)}, "real images"),
    ],
)
def test_mistakes_are_explained(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        build(replace(TINY, **changes))
    assert "\n" not in str(error.value)


def test_trained_weights_without_a_network_are_explained(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="put that file into that folder") as error:
        build(StandardConfig("resnet18", 1000, RGB, pretrained=True))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_trained_weights_are_torchvisions(monkeypatch, tmp_path):
    weights = tv.resnet18().state_dict()
    monkeypatch.setattr(tv.ResNet18_Weights, "get_state_dict", lambda *args, **kwargs: weights)
    network = build(StandardConfig("resnet18", 1000, RGB, pretrained=True))
    assert torch.equal(network.fc.weight, weights["fc.weight"])


def test_batch_norm_option():
    assert isinstance(batch_norm(replace(TINY, batch_norm="none"), 3), torch.nn.Identity)
    assert batch_norm(replace(TINY, bias=False), 3).weight is None
