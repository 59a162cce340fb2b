"""Make a run directory of weights from elsewhere, for `tas.py --teacher DIR` and `--init DIR`.

    python tools/weights.py torchvision --arch resnet50 --out DIR
    python tools/weights.py FILE --arch resnet18 --out DIR

FILE holds a state dict of torchvision's names, as .pth, .pt or .safetensors, also inside
{"state_dict": ...} or {"model": ...}, with or without "module." before every name. Nothing in it is
executed. torchvision's are IMAGENET1K_V1.
"""

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas
import torch
from command import run

NAMED = 3  # of each kind of what does not fit

def torchvision_file(arch):
    """The file of torchvision's weights, downloaded or of an earlier download, whose name ends in
    the beginning of its hash."""
    from torchvision.models import get_model_weights
    folder = Path(torch.hub.get_dir(), "checkpoints")
    with tas.errors_as(f"torchvision has no weights of {arch} ({{}})", ValueError):
        url = get_model_weights(arch)["IMAGENET1K_V1"].url
    file, wanted = folder / Path(url).name, Path(url).stem.rsplit("-", 1)[1]
    if not file.exists():
        with tas.errors_as(f"cannot download {url} ({{}}); put that file into {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), wanted, progress=False)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    tas.require(found.startswith(wanted), f"{file} is damaged; delete it")
    return file

def read_state(path):
    """The tensors in a file by their names, without the wrappings."""
    with tas.errors_as(f"cannot read weights from {path} ({{}}); give a state dict in a .pth, .pt "
                       "or .safetensors file"):
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        for wrapping in ("state_dict", "model"):
            state = state.get(wrapping, state)
        if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise ValueError("it holds other things than tensors")
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}

def misfits(own, state):
    """What does not fit, in words: names of `own` that the state lacks, names that it has beyond
    them, tensors of another shape."""
    missing = [name for name in own if name not in state and "num_batches" not in name]
    unexpected = [name for name in state if name not in own]
    wrong = [f"{name} {[*state[name].shape]} for {[*tensor.shape]}" for name, tensor in own.items()
             if name in state and state[name].shape != tensor.shape]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    return [f"{kind}: {', '.join(names[:NAMED])}{' ...' if len(names) > NAMED else ''}"
            for kind, names in kinds.items() if names]

def convert(args):
    """Write weights.pt and shape.json."""
    out = Path(args.out)
    tas.require_new(out)
    source = torchvision_file(args.arch) if args.source == "torchvision" else args.source
    state = read_state(source)
    tas.require("fc.bias" in state, f"{source} lacks fc.bias, the classifier; is it a ResNet with "
                "torchvision's names?")
    shape = tas.Shape.unpruned(args.arch, len(state["fc.bias"]), args.image_size)
    net = tas.ResNet(shape)
    odd = misfits(net.state_dict(), state)
    tas.require(not odd, f"{source} does not fit {args.arch}; {'; '.join(odd)}")
    net.load_state_dict(state, strict=False)  # which lacks counts of batches at most
    tas.save_tensors(out / "weights.pt", net.state_dict())
    shape.save(out / "shape.json")
    print(f"{out}: {args.arch}, {shape.num_classes} classes, {tas.summary(shape)}\nnext: python "
          f"tas.py eval {out} --data ..., which tells whether the network is the one that was "
          "trained")

def main(argv=None):
    """Write a run directory; returns the exit status."""
    parser = tas.Parser(prog="tools/weights.py", description=__doc__.split("\n")[0])
    parser.add_argument("source", metavar="SOURCE", help="a file, or torchvision")
    parser.add_argument("--arch", choices=tas.ARCHS, required=True)
    parser.add_argument("--image-size", type=tas.number(int, 8, 1024), help="pixels (32 or 224)")
    parser.add_argument("--out", required=True, help="the directory to make")
    return run(parser, convert, argv)

if __name__ == "__main__":
    sys.exit(main())
