"""Write a trained network for use without this repository: torch.export, and ONNX.

    python tools/export.py DIR             # DIR/network.pt2
    python tools/export.py DIR --onnx      # DIR/network.onnx as well

Both take a batch of any size, [N, 3, size, size], of RGB images as (x / 255 - mean) / std, and
give logits [N, classes]. They are compared with the network's own outputs before they are written.
What a user must know (classes, normalisation, image size, MACs) is in their metadata.
"""

import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas
import torch
from command import printable, run

BATCHES = 1, 3  # sizes at which outputs are compared
TOLERANCE = 1e-4  # of logits, as a share of the largest; other programs add in another order

def metadata(directory, shape):
    """What stands beside the weights, name -> text."""
    properties = {
        "arch": shape.arch, "image_size": str(shape.image_size),
        "macs": str(tas.count_macs(shape)),
        "mean": json.dumps(tas.MEAN), "std": json.dumps(tas.STD)}
    result = tas.read_run(directory).get("result", {})
    if "classes" in result:  # weights from elsewhere do not name them
        properties["classes"] = json.dumps(result["classes"])
    return properties

def to_program(net):
    """The torch.export program of a network, with a dynamic batch."""
    size = net.shape.image_size
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    return torch.export.export(net, (torch.zeros(2, 3, size, size),), dynamic_shapes=dynamic)

def to_bytes(program, properties):
    """Content of the .pt2 file of a program."""
    buffer = io.BytesIO()
    extra = {"metadata.json": json.dumps(properties)}
    torch.export.save(program, buffer, extra_files=extra)
    return buffer.getvalue()

def check(net, function, what):
    """TASError unless a function of a batch gives the outputs of the network."""
    for n in BATCHES:
        x = torch.randn(n, 3, net.shape.image_size, net.shape.image_size)
        with torch.no_grad():
            expected, found = net(x), function(x)
        message = f"{what} gives other outputs than the network at batch {n}; nothing is written"
        tas.require(found.shape == expected.shape, message)
        largest = max(1.0, float(expected.abs().max()))
        tas.require(bool(((found - expected).abs() <= TOLERANCE * largest).all()), message)

def to_onnx(net, properties):
    """Content of the ONNX file of a network, checked."""
    import onnx
    size = net.shape.image_size
    program = torch.onnx.export(
        net, (torch.zeros(2, 3, size, size),), dynamo=True, verbose=False,
        input_names=["images"], output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    model = program.model_proto
    onnx.helper.set_model_props(model, properties)
    content = model.SerializeToString()
    check(net, onnx_function(content), "ONNX")
    return content

def onnx_function(content):
    """Run an ONNX file: by onnxruntime if it is installed, else by onnx's own, slow evaluator."""
    try:
        from onnxruntime import InferenceSession
        session = InferenceSession(content, providers=["CPUExecutionProvider"])
    except ImportError:
        from onnx import load_from_string
        from onnx.reference import ReferenceEvaluator
        session = ReferenceEvaluator(load_from_string(content))
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])

def export(args):
    """Write the files of a run directory, all or none of them, and print their sizes."""
    if args.onnx:  # as early as possible
        with tas.errors_as("--onnx: {}; pip install onnx onnxscript", ImportError):
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401  (torch.onnx needs it)
    net, out = tas.load(args.dir), Path(args.dir)
    properties = metadata(args.dir, net.shape)
    files = {}
    content = files["network.pt2"] = to_bytes(to_program(net), properties)
    check(net, torch.export.load(io.BytesIO(content)).module(), "torch.export")
    unpruned = to_bytes(to_program(tas.ResNet(net.shape.full).eval()), properties)
    if args.onnx:
        files["network.onnx"] = to_onnx(net, properties)
    for name, content in files.items():
        tas.write_file(out / name, content)
        print(printable(f"{out / name}: {len(content) / 1e6:.2f} MB, outputs equal the network's"))
    print(f"unpruned: {len(unpruned) / 1e6:.2f} MB as .pt2; pruned: {tas.summary(net.shape)}")

def main(argv=None):
    """Write the files; returns the exit status."""
    parser = tas.Parser(prog="tools/export.py", description=__doc__.split("\n")[0])
    parser.add_argument("dir", metavar="DIR", help="run directory of a finished train")
    parser.add_argument("--onnx", action="store_true",
                        help="write ONNX, too (needs onnx and onnxscript)")
    return run(parser, export, argv)

if __name__ == "__main__":
    sys.exit(main())
