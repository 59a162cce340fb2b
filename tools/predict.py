"""Classify image files with a trained network.

    python tools/predict.py DIR FILE ...

Prints for every file its most probable classes. An image of any size is resized and cropped as the
test images were while the network was trained.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas
import torch
from command import printable, run

def class_names(directory, count):
    """Names of the classes in the order of the network's outputs; numbers where none are told, as
    of weights from elsewhere."""
    names = tas.read_run(directory).get("result", {}).get("classes")
    if names is None:
        return [f"class {i}" for i in range(count)]
    tas.require(isinstance(names, list) and len(names) == count,
                f"{directory}: run.json does not name the {count} classes of its network")
    return names

@torch.no_grad()
def predict(args):
    """Print a line for every file; returns 2 when one of them could not be read."""
    net = tas.load(args.dir)
    names = class_names(args.dir, net.shape.num_classes)
    status = 0
    for path in args.files:
        try:
            image = tas.preprocess(tas.read_image(path), net.shape.image_size)
        except tas.TASError as error:  # the other files are classified all the same
            tas.complain(printable(error))
            status = 2
            continue
        top = net(image)[0].softmax(0).topk(min(args.top, len(names)))
        found = []
        for probability, i in zip(top.values.tolist(), top.indices.tolist()):
            found.append(f"{names[i]} {probability:.1%}")
        print(printable(f"{path}: {', '.join(found)}"))
    return status

def main(argv=None):
    """Print the classes; returns the exit status, 2 when a file could not be read."""
    parser = tas.Parser(prog="tools/predict.py", description=__doc__.split("\n")[0])
    parser.add_argument("dir", metavar="DIR", help="run directory of a finished train")
    parser.add_argument("files", metavar="FILE", nargs="+", help="image files")
    parser.add_argument("--top", type=tas.number(int, 1, 1000), default=5, metavar="N",
                        help="classes to print, the most probable ones (5)")
    return run(parser, predict, argv)

if __name__ == "__main__":
    sys.exit(main())
