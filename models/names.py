"""The names that describe networks on a command line: tables without torch."""

import difflib

MODULES = {
    "Fw": "wavelet transform",
    "mod": "pointwise non-linearity",
    "rho": "skip connection [z, ρ(z)]",
    "Std": "standardisation",
    "P": "projection with weights of the input's type",
    "Pr": "projection with real weights",
    "Pc": "projection with complex weights",
    "N": "division by the norm over channels",
    "R": "complex to real",
    "C": "real to complex",
    "B": "two branches, concatenated",
    "FrhoF": "learned frame around a non-linearity",
    "id": "nothing",
}
PROJECTIONS = ("P", "Pr", "Pc")
IDENTITY = "id"
PLAIN = "plain"  # the kind of a wavelet transform of whole octaves

# Non-linearities, each with the numbers it has: a bias b, a gain g.
NON_LINEARITIES = {"mod": "", "abs": "", "relu": "b", "cst": "b", "mc": "", "ms": "bg", "tanh": "g", "pow": "bg"}
STANDARD_NON_LINEARITIES = {  # g, b: learned per channel
    "relu": "",
    "abs": "",
    "absdead": "b",
    "thresh": "b",
    "tanh": "",
    "sigmoid": "g",
    "pow": "bg",
    "powfixed": "",
}
FRAME_NON_LINEARITIES = tuple(
    "relu modulus softshrink softmodulus hardshrink id gate triang sigmo sigmo_deriv abs tanh".split()
)

BATCH_NORMS = ("none", "pre", "post")
CLASSIFIER_BATCH_NORMS = ("affine", "std", "none")


def check_choice(what, name, known):
    """Raise ValueError if `name` is not in `known`; `what`: what it names."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: choose among {', '.join(known)}")


def check_names(arch):
    """Raise ValueError for a name that is not in MODULES, with the nearest one that is."""
    for name in arch:
        if name not in MODULES:
            near = difflib.get_close_matches(name, MODULES, 1, 0.3)
            near = near or [known for known in MODULES if known.lower() == name.lower()]
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown module {name!r}{hint} (known: {' '.join(MODULES)})")
