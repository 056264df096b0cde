"""Makes outputs.pt.xz and commands.tsv.xz: python tests/golden/make.py FOLDER_OF_THE_LARGER_SET LIST_OF_COMMANDS"""

import io
import lzma
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
REPLAY = "J8-norm-fact0-L4"
NAMES = f"""
{REPLAY} J8-skip-fact0-L4 J8-complex-fact0-L4 J4-norm-factnone-L4 J4-skip-factnone-L8 J4-complex-factnone-L4
J4-norm-fact1-L8 J4-plain J4-norm-clbnaffine-clbias J4-norm-x-avgpool J4-norm-x-grayscale J4-norm-x-idproj
resnet18-w0.125-bnpost-nobias
""".split()


def smaller(output, replay):
    """What the tests compare: the command line, one image and its logits, the state, and all steps of the replay."""
    kept = {"argv": output["argv"], "state_dict": output["state_dict"]}
    kept |= {key: output[key][:1].clone() for key in ("input", "logits")}
    if replay:
        kept |= {key: output[key] for key in ("init_state_dict", "train_batches", "train_losses")}
    return kept


def main(folder, commands):
    load = {path.stem: path for path in Path(folder).glob("*.pt")}
    outputs = {"filters": torch.load(load["filters"], weights_only=True)}
    for name in NAMES:
        outputs[name] = smaller(torch.load(load[name], weights_only=True), name == REPLAY)
    buffer = io.BytesIO()
    torch.save(outputs, buffer)
    for target, data in (("outputs.pt.xz", buffer.getvalue()), ("commands.tsv.xz", Path(commands).read_bytes())):
        (HERE / target).write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main(*sys.argv[1:])
