"""A network layer by layer: widths, MACs and their share, against the unpruned network.

    python tools/describe.py resnet56
    python tools/describe.py shapes/cifar10-resnet56.json
    python tools/describe.py runs/cifar10-resnet56/search

The MACs are what torch's FlopCounterMode counts in a forward pass of one image: a second opinion
on `tas.count_macs`, whose sum stands in the last line.
"""

import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas
from command import run

BAR = 24  # characters of a layer that keeps all of its channels

def find_shape(network):
    """The Shape of an arch's name, a JSON file or a run directory."""
    if network in tas.ARCHS:
        return tas.Shape.unpruned(network, 10 if tas.ARCHS[network].small else 1000)
    known = ", ".join(tas.ARCHS)
    tas.require(Path(network).exists(),
                f"{network} is neither an arch ({known}) nor a shape file nor a run directory")
    return tas.Shape.load(network)

def conv_names(shape):
    """Names of all convs in order; those of projections, which not every block has, included."""
    names = ["conv1"]
    kernels = tas.ARCHS[shape.arch].kernels
    for s, blocks in enumerate(shape.stages):
        for b in range(len(blocks)):
            block = f"layer{s + 1}.{b}"
            for i in range(len(kernels)):
                names.append(f"{block}.conv{i + 1}")
            names.append(f"{block}.downsample.0")
    return names

def count_layers(shape):
    """name -> (output channels, MACs) of the convs and of the classifier, as torch counts them."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = tas.ResNet(shape).eval()
        net(torch.empty(1, 3, shape.image_size, shape.image_size))
    flops, layers = counter.get_flop_counts(), {}
    for name, module in net.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            macs = sum(flops[f"ResNet.{name}"].values()) // 2  # two operations each
            layers[name] = len(module.weight), macs
    return layers

def table(shape):
    """Lines of the table: name, channels, channels of the unpruned network, MACs, share, bar."""
    layers, unpruned = count_layers(shape), count_layers(shape.full)
    total = sum(macs for _, macs in layers.values())
    last_conv = f"conv{len(tas.ARCHS[shape.arch].kernels)}"
    lines = [f"{'layer':<24}{'width':>6}{'of':>6}{'MACs':>15}{'share':>8}"]
    for name in [*conv_names(shape.full), "fc"]:
        if name not in layers and (name not in unpruned or "downsample" in name):
            continue  # a projection where there is none, or one of a dropped block
        width, macs = layers.get(name, (0, 0))
        # A pruned block may have a projection that the unpruned one lacks.
        full_width = unpruned[name.replace("downsample.0", last_conv)][0]
        bar = "#" * max(1, round(BAR * width / full_width)) if width else "dropped"
        lines.append(f"{name:<24}{width:>6}{full_width:>6}{macs:>15,}{macs / total:>8.1%}  {bar}")
    return lines

def other_cost(network):
    """The cost of a run's network under a table of --cost, in words; "" without one."""
    if network in tas.ARCHS:
        return ""
    info = tas.read_run(network)
    settings, result = info.get("settings", {}), info.get("result", {})
    search = settings if settings.get("command") == "search" else result.get("search") or {}
    if result.get("cost") is None or "unit" not in search:
        return ""
    return f", {result['cost']:.4g} {search['unit']}"

def describe(args):
    """Print the table of a network, and its size in words."""
    shape = find_shape(args.network)
    print("\n".join(table(shape)))
    print(f"{shape.arch}, {shape.num_classes} classes, {shape.image_size} pixels: "
          f"{tas.summary(shape)}{other_cost(args.network)}")

def main(argv=None):
    """Print the table; returns the exit status."""
    parser = tas.Parser(prog="tools/describe.py", description=__doc__.split("\n")[0])
    parser.add_argument("network", metavar="ARCH|FILE|DIR",
                        help="an arch such as resnet56, a shape.json, or a run directory")
    return run(parser, describe, argv)

if __name__ == "__main__":
    sys.exit(main())
