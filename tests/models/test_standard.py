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

RGB = Signal(3, 32, 32)
TINY = StandardConfig("resnet18-custom", 10, RGB, width=1 / 16)
VGG_TINY = replace(TINY, name="vgg11-custom")


def random_state(network):
    """Random weights and statistics for all of `network`, so that nothing hides behind zeros and ones."""
    state = {}
    for name, tensor in network.state_dict().items():
        state[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
        if name.endswith("running_var"):
            state[name].uniform_(0.5, 2)
        elif tensor.is_floating_point():
            state[name].normal_(0, (2 / (tensor[0].numel() if tensor.dim() > 1 else 10)) ** 0.5)
    return state


@pytest.mark.parametrize("name, norm", [("resnet18", "pre"), ("resnet50", "pre"), ("vgg11", "none"), ("vgg11", "pre")])
def test_torchvisions_weights_give_torchvisions_outputs(name, norm):
    with torch.device("meta"):
        ours = build(StandardConfig(f"{name}-custom", 1000, RGB, batch_norm=norm))
        theirs = tv.get_model("vgg11_bn" if (name, norm) == ("vgg11", "pre") else name)
    weights, images = random_state(theirs), torch.randn(2, 3, 40, 40)
    for network in (theirs, ours):
        network.load_state_dict(weights, assign=True)
        network.eval()
    with torch.no_grad():
        expected = theirs(images)
        assert (ours(images) - expected).abs().max() < 1e-5 * expected.std()


@pytest.mark.parametrize("name", "resnet18 resnet34 resnet50 resnet101 resnet152 vgg11 vgg13 vgg16 vgg19".split())
def test_every_network_has_torchvisions_parameters(name):
    with torch.device("meta"):
        ours, plain = build(StandardConfig(f"{name}-custom", 10, RGB)), build(StandardConfig(name, 10, RGB))
        theirs = tv.get_model(f"{name}_bn" if "vgg" in name else name, num_classes=10)
    shapes = [{k: v.shape for k, v in network.state_dict().items()} for network in (ours, theirs)]
    assert shapes[0] == shapes[1] and type(plain).__module__.startswith("torchvision")


@pytest.mark.parametrize("config", [TINY, replace(TINY, name="resnet50-custom"), VGG_TINY])
def test_options_change_the_parameters_they_name(config):
    def keys(**changes):
        return set(build(replace(config, **changes)).state_dict())

    def biases(**changes):
        return {k for k, _ in build(replace(config, **changes)).named_parameters() if k.endswith("bias")}

    last = "fc" if "resnet" in config.name else "classifier.6"
    assert biases(bias=False) == {f"{last}.bias"} and biases(bias=False, classifier_bias=False) == set()
    assert not any("bn" in k or "running" in k for k in keys(batch_norm="none"))
    assert int(0.3 * 64) in {len(p) for p in build(replace(config, width=0.3)).parameters()}
    if "resnet" in config.name:
        assert keys() - keys(batch_norm="post") == {k for k in keys() if ".downsample.1." in k}
        assert "layer1.0.conv1.bias" in keys(batch_norm="none") and keys(batch_norm="post") <= keys()


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


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("config", [TINY, replace(TINY, name="resnet50-custom"), VGG_TINY])
def test_on_a_cpu_channels_never_lie_last_in_memory(config, channels):
    """There a convolution of few channels may end the process in its backward pass, whatever images are given."""
    network, seen = build(replace(config, input=Signal(channels, 32, 32))), []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, y: seen.extend([*inputs, y]))
    network(torch.randn(2, channels, 32, 32).to(memory_format=torch.channels_last)).sum().backward()
    assert all(x.stride(1) == x.shape[2] * x.shape[3] for x in seen)


def pow_(x, b, g):
    t = b.exp() * x.abs() ** g.exp()
    return t / ((1 + t) * (x.abs() + 1e-6)) * x


FORMULAS = {  # the authors', of a bias and a gain, and those of the two that are learned
    "relu": (lambda x, b, g: x.relu(), set()),
    "abs": (lambda x, b, g: x.abs(), set()),
    "absdead": (lambda x, b, g: (x - b).relu() + (-x - b).relu(), {"bias"}),
    "thresh": (lambda x, b, g: (x - b).relu() - (-x - b).relu(), {"bias"}),
    "tanh": (lambda x, b, g: x.tanh(), set()),
    "sigmoid": (lambda x, b, g: torch.sigmoid(g * x.abs() + b) / (x.abs() + 1e-6) * x, {"gain"}),
    "pow": (pow_, {"gain", "bias"}),
    "powfixed": (lambda x, b, g: x / (1 + x.abs()), set()),
}


@pytest.mark.parametrize("gain, bias", [(1.0, 0.0), (-0.7, 0.4), (0.3, -0.4)])
@pytest.mark.parametrize("name", STANDARD_NON_LINEARITIES)
def test_non_linearities_are_the_authors(name, gain, bias):
    """Their values and numbers at the start; what is learned, is for each channel, with finite gradients at 0 too."""
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0])[:, None, None, None].repeat(1, 2, 1, 1)  # (5, 2, 1, 1)
    function, (formula, learned) = StandardNonLinearity(name, 2, gain, bias), FORMULAS[name]
    expected = formula(x, torch.tensor(bias), torch.tensor(gain))
    torch.testing.assert_close(function(x), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(function(x[:, :, 0, 0]), function(x)[:, :, 0, 0])
    x.requires_grad_()
    assert set(dict(function.named_parameters())) == set(function.state_dict()) == learned
    (function(x) + 1).square().sum().backward()
    assert all(n.grad.isfinite().all() and n.grad.any() for n in (x, *function.parameters()))
    for parameter in function.parameters():
        before = function(x)[:, 0]
        with torch.no_grad():
            parameter[1] = 0.9
        assert torch.equal(function(x)[:, 0], before) and not torch.equal(*function(x).unbind(1))


@pytest.mark.parametrize("config", [TINY, replace(TINY, name="resnet50-custom"), VGG_TINY])
def test_non_linearities_take_turns_in_the_order_of_the_layers(config):
    network = build(replace(config, non_linearity=("relu", "sigmoid", "pow"), init_gain=0.5))
    found = [m for m in network.modules() if isinstance(m, StandardNonLinearity)]
    assert [m.name for m in found] == [("relu", "sigmoid", "pow")[i % 3] for i in range(len(found))]
    assert all(torch.equal(m.gain, torch.full_like(m.gain, 0.5)) for m in found)


@pytest.mark.parametrize("config", [TINY, VGG_TINY])
def test_learned_non_linearities_have_finite_gradients(config):
    network = build(replace(config, non_linearity="pow", batch_norm="post"))
    network(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for k, p in network.named_parameters() if k.endswith("gain"))


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


def test_trained_weights_are_torchvisions(monkeypatch):
    weights = tv.resnet18().state_dict()
    monkeypatch.setattr(tv.ResNet18_Weights, "get_state_dict", lambda *args, **kwargs: weights)
    network = build(StandardConfig("resnet18", 1000, RGB, pretrained=True))
    assert torch.equal(network.fc.weight, weights["fc.weight"])
