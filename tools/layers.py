"""The layers of a searched network one by one, as functions to be timed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas
import torch
import torch.nn as nn
import torch.nn.functional as F

def describe_layers(space):
    """What every Layer of the space is, in order: (kind, kernel, strides, pixels of its input)."""
    arch, size = space.arch, space.full.image_size
    layers = [("stem", 3 if arch.small else 7, (1 if arch.small else 2,), size)]
    size = size if arch.small else ((size + 1) // 2 + 1) // 2
    for s, depth in enumerate(arch.depths):
        for b in range(depth):
            strides, before = arch.conv_strides(s, b), size
            for i, (kernel, stride) in enumerate(zip(arch.kernels, strides), 1):
                layers.append(("last" if i == len(strides) else "conv", kernel, (stride,), size))
                size = (size + stride - 1) // stride
            layers.append(("shortcut", 1, tuple(strides), before))
    return [*layers, ("classifier", 1, (1,), size)]

def make_case(args, space, layer, x, c_out):
    """Function that runs one layer on x [N, c_in, H, W]."""
    kind, kernel, strides, size = layer
    c_in = x.shape[1]
    if kind == "classifier":
        net = nn.Linear(c_in, space.full.num_classes)
        forward = lambda: net(x.mean((2, 3)))
    elif kind == "shortcut":
        net = tas.Block(space.arch, c_in, [c_out] * space.block_convs, strides)
        after = (size + max(strides) - 1) // max(strides)
        y = x.new_zeros(len(x), c_out, after, after).contiguous(memory_format=torch.channels_last)
        forward = lambda: F.relu(y + net.downsample(net.pool(x)))
    else:
        net = nn.Sequential(tas.conv2d(c_in, c_out, kernel, *strides), nn.BatchNorm2d(c_out))
        net.extend([nn.ReLU()] * (kind != "last"))
        net.extend([nn.MaxPool2d(3, 2, 1)] * (kind == "stem" and not space.arch.small))
        forward = lambda: net(x)
    net = tas.to_device(net.eval(), args)

    @torch.no_grad()
    def case():
        with tas.autocast(args):
            forward()
    return case
