"""What the analysis must know of the paper's networks: call `register` once before analysing them with `rainbow`.

Nothing else here imports rainbow, and rainbow imports nothing from here.
"""

from dataclasses import replace

import torch

import rainbow
from models.block import Block
from models.classifier import Classifier
from models.planar import from_planar, to_planar
from models.projection import Projection
from models.scatnet import ScatNet
from models.standardization import EPSILON, Standardization
from rainbow.layers import Skipped
from rainbow.norms import Norm
from rainbow.program import INPUT, Step
from rainbow.running import device_of, input_of
from rainbow.samples import Samples


def register():
    """Teaches `rainbow` the layers, normalisations and networks of the paper. A second call changes nothing."""
    rainbow.register(Projection, ProjectionLayer)
    rainbow.register(Standardization, StandardizationNorm)
    rainbow.register(ScatNet, ScatteringNetwork)


class ProjectionLayer(rainbow.Layer):
    """W (N, D) at every position of (B, D, M, N')."""

    @classmethod
    def refusal(cls, module):
        if module.basis is not None:
            return Skipped("its input goes through a fixed basis first")
        weight, (rows, columns) = module.weight, module.weight.shape
        identity = torch.eye(rows, dtype=weight.dtype, device=weight.device)
        if rows == columns and not weight.requires_grad and torch.equal(weight, identity):
            return Skipped("a fixed identity", harmless=True)
        return None


class StandardizationNorm(Norm):
    """`Std`: no affine map; `homogeneous` keeps the mean at 0."""

    mean_buffer, var_buffer, epsilon = "mean", "var", EPSILON

    def set(self, mean, var, count):
        if self.module.homogeneous:
            mean, var = torch.zeros_like(mean), var + mean.abs().square()
        super().set(mean, var, count)


class ScatteringNetwork(rainbow.Architecture):
    """Input mixing, blocks, classifier; maps between blocks that run as one operation have channels last."""

    def example(self):
        signal, generator = self.module.blocks[0].signal, torch.Generator().manual_seed(0)
        return torch.rand(2, signal.channels, signal.height, signal.width, generator=generator)

    def steps(self, example):
        network, source, steps = self.module, "mixed", []
        planar, parts = self._runs_fused(example.dtype), 2 if network.blocks[-1].out.complex else 1

        def mix(env):
            mixed = network.mix(env[INPUT])
            return to_planar(mixed) if planar else mixed

        steps.append(Step(source, (INPUT,), mix))
        for index, block in enumerate(network.blocks):
            steps.append(BlockStep(f"block{index}", source, block, planar))
            source = f"block{index}"
        steps.append(ClassifierStep(source, network.classifier, parts if planar else None))
        return steps

    def stream(self, layers, images, patches, receive):
        network = self.module
        if not self._runs_fused(images.dtype):
            return False
        waiting = {layer.module: k for k, layer in enumerate(layers)}
        x = to_planar(network.mix(images))
        for block in network.blocks:
            if block.P not in waiting:
                x = block.forward_planar(x)
                continue
            columns = block.fused.columns_of(x)
            norm = None if block.std is None else Norm.of(block.std)
            receive(waiting.pop(block.P), samples_of_columns(block, columns), norm, False)
            if not waiting:
                return True
            x = block.fused.forward_from(columns, x, block.P.weight, block.std)
        ((module, k),) = waiting.items()
        x = input_of(module, lambda: network.classifier(from_planar(x, 2 if block.out.complex else 1)))
        receive(k, Samples.of(layers[k].samples(x, patches)), None, True)
        return True

    def resized(self, widths):
        network, modules = self.module, dict(self.module.named_modules())
        by_module, blocks = {modules[name]: width for name, width in widths.items()}, []
        for config, block in zip(network.config.blocks, network.blocks):
            if block.P in by_module:
                kind = next(name for name, module in block.body.named_children() if module is block.P)
                size = {f"{kind}_size": by_module[block.P]}
                config = replace(config, projection_initialization=None, projection_eigenvalues=None, **size)
            blocks.append(config)
        with torch.random.fork_rng(devices=[]):
            resized = ScatNet(replace(network.config, blocks=tuple(blocks)))
        state, old = resized.state_dict(), network.state_dict()
        resized.load_state_dict({key: old[key] if old[key].shape == new.shape else new for key, new in state.items()})
        return resized.to(device_of(network))

    def _runs_fused(self, dtype):
        return all(block.runs_fused(dtype) for block in self.module.blocks)


class BlockStep(Step):
    """A block; `planar`: it runs as one operation, on maps with channels last."""

    def __init__(self, name: str, source: str, block: Block, planar: bool):
        forward = block.forward_planar if planar else block
        super().__init__(name, (source,), lambda env: forward(env[source]), block)
        self.planar = planar

    def resumes(self, module):
        return module is self.holder.P

    def resume(self, module, value, env):
        out = self.holder.project(value)
        return to_planar(out) if self.planar else out

    def input_of(self, module, env):
        x = env[self.inputs[0]]
        x = from_planar(x, 2 if self.holder.signal.complex else 1) if self.planar else x
        return self.holder.features(x) if module is self.holder.P else input_of(module, lambda: self.holder(x))

    def norm_of(self, layer):
        stages = list(self.holder.body)
        before = next((norm for norm, stage in zip(stages, stages[1:]) if stage is layer), None)
        return before if isinstance(before, Standardization) else None

    def samples_of(self, module, env, layer):
        if not self.planar or module is not (self.holder.std or self.holder.P):
            return super().samples_of(module, env, layer)
        return samples_of_columns(self.holder, self.holder.fused.columns_of(env[self.inputs[0]]))


class ClassifierStep(Step):
    """The classifier, after planar maps of so many `parts`, or other maps for None."""

    def __init__(self, source: str, classifier: Classifier, parts: int | None):
        def classify(env):
            x = env[source]
            return classifier(x if parts is None else from_planar(x, parts))

        super().__init__("scores", (source,), classify, classifier)

    def norm_of(self, layer):
        return self.holder.bn if layer is self.holder.linear and not self.holder.averages else None


def samples_of_columns(block, columns):
    """Samples of the features of a block before `Std`, as it computes with them."""
    (real, real_order), (imaginary, imaginary_order) = block.fused.layout.parts_of(columns)
    return Samples(real, imaginary, real_order, imaginary_order)
