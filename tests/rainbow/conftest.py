"""The analysis is tested on the paper's networks too."""

from models import rainbow_layers

rainbow_layers.register()
