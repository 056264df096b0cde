"""Tiny networks of many kinds, for properties that hold for any network: images (B, 3, 8, 8), three classes.

A network joins by a line in NETWORKS and one in HIDDEN, which says what must be permuted together: a group of neurons
for each part between bars. `a`: the rows of module (or parameter) a and what else it has for each of them; `a@1`: its
columns; `a@first`, `a@last`: its columns, flattened maps with channels first or last; `a+6`: its columns from the
seventh on; `a~2`: its rows, twice as many.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F


class Pipe(nn.Module):
    """Modules that a function takes: `body(self, x)`."""

    def __init__(self, body, **modules):
        super().__init__()
        self.body = body
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.body(self, x)


class Attention(nn.Module):
    """Two heads: q, k and v in one matrix, in three, or by functions."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        if kind == "separate":
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        else:
            self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        if self.kind == "separate":
            q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        else:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.kind == "matmul":
            x = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).flatten(2))


class Token(nn.Module):
    """Puts a class token before the others."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return torch.cat([self.value.expand(len(x), 1, 8), x], 1)


def classified():
    """A transformer that reads its class token."""

    def body(self, x):
        x = self.token(self.embed(x).flatten(2).mT)
        x = x + self.attention(self.norm(x))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x[:, 0])

    made = transformer(Attention("sdpa"))
    made.body, made.token = body, Token()
    return made


def transformer(attention):
    def body(self, x):
        x = self.embed(x).flatten(2).mT
        x = x + self.attention(self.norm(x))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))

    embed, norm = nn.Conv2d(3, 8, 2, stride=2), nn.LayerNorm(8)
    modules = {"up": nn.Linear(8, 16), "down": nn.Linear(16, 8), "head": nn.Linear(8, 3)}
    return Pipe(body, embed=embed, norm=norm, attention=attention, **modules)


class Torchs(nn.MultiheadAttention):
    """`nn.MultiheadAttention` of a value with itself."""

    def __init__(self):
        super().__init__(8, 2, batch_first=True)

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


def conv(inputs=6, outputs=6):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def residual(self, x):
    x = self.stem(x)
    x = x + self.b(F.relu(self.norm(self.a(x))))
    return self.head(F.relu(x).mean((2, 3)))


def tokens(self, x):
    return self.head(F.relu(self.b(F.relu(self.a(x.flatten(2).mT)))).flatten(1))


def channels_last(self, x):
    return self.head(F.relu(self.a(x.permute(0, 2, 3, 1))).flatten(1))


def merging(self, x):
    """Patches of 2×2 positions, side by side, as in Swin."""
    x = F.relu(self.a(x)).permute(0, 2, 3, 1)
    x = torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
    return self.head(F.relu(self.b(x)).mean((1, 2)))


def concatenated(self, x):
    a = F.relu(self.a(x))
    x = torch.cat([a, F.relu(self.b(a))], 1)
    return self.head(F.relu(self.c(x)).mean((2, 3)))


def unet(self, x):
    a = F.relu(self.a(x))
    up = F.interpolate(F.relu(self.b(F.max_pool2d(a, 2))), scale_factor=2.0)
    return self.head(F.relu(self.c(torch.cat([a, up], 1))).flatten(1))


def squeezed(self, x):
    x = F.relu(self.a(x))
    x = x * self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid()[..., None, None]
    return self.head(F.relu(self.b(x)).mean((2, 3)))


def gated(self, x):
    a, b = self.a(x.flatten(1)).chunk(2, -1)
    return self.head(F.relu(self.b(a * b.sigmoid())))


def sequence(self, x):
    return self.head(F.relu(self.b(F.relu(self.norm(self.a(x.flatten(2)))))).mean(2))


def sequence_residual(self, x):
    x = F.relu(self.a(x.flatten(2)))
    out = F.relu(self.norm(self.b(x)))
    out += x
    return self.head(out.flatten(1))


def mixer(self, x):
    x = self.embed(x).flatten(2).mT
    x = x + self.back(F.gelu(self.mix(x.mT))).mT
    return self.head(F.relu(self.a(x)).mean(1))


def depthwise(self, x):
    return self.head(F.relu(self.point(self.depth(F.relu(self.a(x))))).mean((2, 3)))


def shuffled(self, x):
    return self.head(F.relu(self.b(F.pixel_unshuffle(F.relu(self.a(x)), 2))).mean((2, 3)))


def upscaled(self, x):
    return self.head(F.relu(self.b(F.pixel_shuffle(F.relu(self.a(x)), 2))).mean((2, 3)))


def recurrent(self, x):
    return self.head(F.relu(self.a(self.rnn(x.flatten(2).mT)[0][:, -1])))


def volume(self, x):
    return self.head(F.relu(self.b(F.relu(self.norm(self.a(x[:, :, None].repeat(1, 1, 4, 1, 1)))))).flatten(1))


def two_scales(self, x):
    x = F.relu(self.a(x))
    return self.head(torch.cat([x.flatten(1), F.avg_pool2d(x, 2).flatten(1)], 1))


def split(self, x):
    a, b = F.relu(self.a(x)).split([2, 4], 1)
    return self.head(torch.cat([F.relu(self.b(b)), a], 1).mean((2, 3)))


def head(size):
    return nn.Linear(size, 3)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), head(8))


def vgg():
    body = conv(3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2), conv(), nn.ReLU(inplace=True)
    return nn.Sequential(
        *body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(24, 10), nn.ReLU(), head(10)
    )


def line(inputs, outputs):
    return nn.Conv1d(inputs, outputs, 3, padding=1)


NETWORKS = {
    "mlp": mlp,
    "vgg": vgg,
    "all convolutions": lambda: nn.Sequential(conv(3), nn.ReLU(), conv(), nn.ReLU(), nn.Conv2d(6, 3, 8), nn.Flatten()),
    "batch norm first": lambda: nn.Sequential(conv(3), nn.ReLU(), nn.BatchNorm2d(6), conv(), nn.Flatten(), head(384)),
    "residual": lambda: Pipe(residual, stem=conv(3), a=conv(), norm=nn.BatchNorm2d(6), b=conv(), head=head(6)),
    "tokens": lambda: Pipe(tokens, a=nn.Linear(3, 6), b=nn.Linear(6, 5), head=head(320)),
    "channels last": lambda: Pipe(channels_last, a=nn.Linear(3, 5), head=head(320)),
    "patch merging": lambda: Pipe(merging, a=conv(3), b=nn.Linear(24, 5), head=head(5)),
    "concatenated": lambda: Pipe(concatenated, a=conv(3), b=conv(6, 4), c=conv(10, 5), head=head(5)),
    "u-net": lambda: Pipe(unet, a=conv(3), b=conv(6, 4), c=conv(10, 5), head=head(320)),
    "squeeze and excitation": lambda: Pipe(
        squeezed, a=conv(3), down=nn.Linear(6, 4), up=nn.Linear(4, 6), b=conv(), head=head(6)
    ),
    "gated": lambda: Pipe(gated, a=nn.Linear(192, 16), b=nn.Linear(8, 6), head=head(6)),
    "sequence": lambda: Pipe(sequence, a=line(3, 6), norm=nn.BatchNorm1d(6), b=line(6, 8), head=head(8)),
    "sequence as long as wide": lambda: nn.Sequential(
        *(nn.Flatten(2), line(3, 64), nn.BatchNorm1d(64), nn.ReLU(), line(64, 4), nn.Flatten(), head(256))
    ),
    "residual sequence": lambda: Pipe(
        sequence_residual, a=line(3, 6), b=line(6, 6), norm=nn.BatchNorm1d(6), head=head(384)
    ),
    "mixer": lambda: Pipe(
        mixer,
        embed=nn.Conv2d(3, 8, 2, 2),
        mix=nn.Linear(16, 10),
        back=nn.Linear(10, 16),
        a=nn.Linear(8, 5),
        head=head(5),
    ),
    "depthwise": lambda: Pipe(
        depthwise, a=conv(3), depth=nn.Conv2d(6, 6, 3, groups=6), point=nn.Conv2d(6, 5, 1), head=head(5)
    ),
    "pixel unshuffle": lambda: Pipe(shuffled, a=conv(3), b=conv(24, 5), head=head(5)),
    "pixel shuffle": lambda: Pipe(upscaled, a=conv(3, 8), b=conv(2, 5), head=head(5)),
    "recurrent": lambda: Pipe(recurrent, rnn=nn.LSTM(3, 6, batch_first=True), a=nn.Linear(6, 5), head=head(5)),
    "volume": lambda: Pipe(
        volume, a=nn.Conv3d(3, 4, 3, stride=2), norm=nn.BatchNorm3d(4), b=nn.Conv3d(4, 5, 1), head=head(45)
    ),
    "two scales": lambda: Pipe(two_scales, a=conv(3), head=head(480)),
    "split": lambda: Pipe(split, a=conv(3), b=conv(4, 4), head=head(6)),
    "transformer, one matrix": lambda: transformer(Attention("sdpa")),
    "transformer, products": lambda: transformer(Attention("matmul")),
    "transformer, three matrices": lambda: transformer(Attention("separate")),
    "transformer, torch's": lambda: transformer(Torchs()),
    "transformer, class token": classified,
    "transformer layer": lambda: transformer(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
    "group norm": lambda: nn.Sequential(
        *(conv(3), nn.GroupNorm(1, 6), nn.SiLU(), conv(), nn.AvgPool2d(2), nn.Flatten(), head(96))
    ),
    "weight norm": lambda: nn.Sequential(
        nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(192, 12)), nn.ReLU(), head(12)
    ),
}


HIDDEN = {
    "mlp": "1 3@1 | 3 5@1",
    "vgg": "0 1 4@1 | 4 9@first | 9 11@1",
    "all convolutions": "0 2@1 | 2 4@1",
    "batch norm first": "0 2 3@1 | 3 5@first",
    "residual": "stem b a@1 head@1 | a norm b@1",
    "tokens": "a b@1 | b head@last",
    "channels last": "a head@last",
    "patch merging": "a b@last | b head@1",
    "concatenated": "a b@1 c+0 | b c+6 | c head@1",
    "u-net": "a b@1 c+0 | b c+6 | c head@first",
    "squeeze and excitation": "a down@1 up b@1 | down up@1 | b head@1",
    "gated": "a~2 b@1 | b head@1",
    "sequence": "a norm b@1 | b head@1",
    "sequence as long as wide": "1 2 4@1 | 4 6@first",
    "residual sequence": "a b norm b@1 head@first",
    "mixer": "embed a@1 | a head@1 | mix back@1",
    "depthwise": "a depth point@1 | point head@1",
    "pixel unshuffle": "a b@first | b head@1",
    "pixel shuffle": "b head@1",
    "recurrent": "a head@1",
    "volume": "a norm b@1 | b head@first",
    "two scales": "",
    "split": "b head+0",
    "transformer, one matrix": "embed norm attention.out down attention.qkv@1 up@1 head@1 | up down@1",
    "transformer, class token": "embed norm token attention.out down attention.qkv@1 up@1 head@1 | up down@1",
    "transformer, products": "embed norm attention.out down attention.qkv@1 up@1 head@1 | up down@1",
    "transformer, three matrices": (
        "embed norm attention.out down attention.q@1 attention.k@1 attention.v@1 up@1 head@1 | up down@1"
    ),
    "transformer, torch's": "embed norm attention.out_proj down attention.in_proj_weight@1 up@1 head@1 | up down@1",
    "transformer layer": (
        "embed norm attention.norm1 attention.norm2 attention.linear2 attention.self_attn.out_proj down "
        "attention.self_attn.in_proj_weight@1 attention.linear1@1 up@1 head@1 | up down@1 | "
        "attention.linear1 attention.linear2@1"
    ),
    "group norm": "0 1 3@1 | 3 6@first",
    "weight norm": "",
}


def network(name, seed=0):
    """A network of NETWORKS with random weights and statistics, in evaluation mode."""
    torch.manual_seed(seed)
    made = NETWORKS[name]().eval()
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
                module.bias.normal_(0, 0.1)
    return made


def permuted(network, hidden):
    """A copy of a network whose groups of hidden neurons (a value of HIDDEN) are permuted."""
    copied = copy.deepcopy(network)
    tensors = dict(copied.state_dict())
    generator = torch.Generator().manual_seed(0)
    for group in filter(None, hidden.split(" | ")):
        order = None
        for token in group.split():
            name, mark, where = token.partition(next((m for m in "@+~" if m in token), "@"))
            mine = [name] if name in tensors else [key for key in tensors if key.rpartition(".")[0] == name]
            for tensor in (tensors[key] for key in mine):
                if order is None:
                    order = torch.randperm(len(tensor) // (2 if mark == "~" else 1), generator=generator)
                if tensor.ndim > 1 or not where or mark == "~":
                    permute(tensor, order, mark if where else "", where)
    return copied


def permute(tensor, order, mark, where):
    if tensor.ndim:
        x, size = tensor if mark in ("", "~") else tensor.transpose(0, 1), len(order)
        start = int(where) if mark == "+" else 0
        if where in ("first", "last"):
            x = x.unflatten(0, (size, -1) if where == "first" else (-1, size))
            x = x if where == "first" else x.transpose(0, 1)
        parts = x.chunk(2) if mark == "~" else [x[start : start + size]]
        for part in parts:
            part.copy_(part[order])


def alone(network, hidden):
    """The layers whose neurons are the only ones of their group."""
    modules = dict(network.named_modules())
    for group in hidden.split(" | "):
        rows = [token.partition("~")[0] for token in group.split() if not set(token) & set("@+")]
        layers = [name for name in rows if isinstance(modules.get(name), (nn.Linear, nn.modules.conv._ConvNd))]
        yield from layers if len(layers) == 1 else []
