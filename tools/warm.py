"""A search that starts from the weights of the trained unpruned network.

    python tools/warm.py DIR search --data cifar10 --arch resnet20 --align pad --epochs 8

DIR is a teacher's directory. Every searched conv begins as the teacher's, and the BN affine of each
of its candidate widths as the teacher's first channels. So that these are the ones that matter
most, channels are sorted by the size of the BN weights that scale them; the teacher stays the same
function. This is beyond the paper.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas
import torch
import torch.nn as nn

class Stream:
    """Channels that several layers share, such as the residual ones of a stage."""

    def __init__(self):
        self.writers = []  # pairs of a conv and its BN
        self.readers = []  # convs, or the classifier

def find_streams(net):
    """All Streams of a ResNet."""
    current = Stream()
    streams = [current]
    current.writers.append((net.conv1, net.bn1))
    for block in [block for layer in net.layers for block in layer]:
        entry = inside = current
        for i in range(1, block.num_convs + 1):
            conv, bn = getattr(block, f"conv{i}"), getattr(block, f"bn{i}")
            inside.readers.append(conv)
            if i < block.num_convs:
                inside = Stream()
                streams.append(inside)
                inside.writers.append((conv, bn))
        if isinstance(block.downsample, nn.Sequential):
            current = Stream()
            streams.append(current)
            entry.readers.append(block.downsample[0])
            current.writers.append(tuple(block.downsample))
        current.writers.append((conv, bn))
    current.readers.append(net.fc)
    return streams

@torch.no_grad()
def sort_channels(net):
    """Sort the channels of a ResNet, the most important first; it stays the same function."""
    for stream in find_streams(net):
        importance = sum(bn.weight.abs() for _, bn in stream.writers)
        order = importance.argsort(descending=True, stable=True)
        for conv, bn in stream.writers:
            for tensor in (conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var):
                tensor.copy_(tensor[order])
        for layer in stream.readers:
            layer.weight.copy_(layer.weight[:, order])
    return net

@torch.no_grad()
def start_from(net, teacher):
    """Give a SuperResNet the weights of an unpruned ResNet."""
    norms = {net.stem: teacher.bn1}  # MixedConv -> the BN that it stands for
    net.stem.conv.load_state_dict(teacher.conv1.state_dict())
    for stage, layer in zip(net.stages, teacher.layers):
        for mixed, block in zip(stage, layer):
            for i, searched in enumerate(mixed.convs, 1):
                searched.conv.load_state_dict(getattr(block, f"conv{i}").state_dict())
                norms[searched] = getattr(block, f"bn{i}")
            if mixed.projection is not None:
                mixed.projection.conv.load_state_dict(block.downsample[0].state_dict())
                norms[mixed.projection] = block.downsample[1]
    net.fc.load_state_dict(teacher.fc.state_dict())
    for convs, mix in zip(net.groups.values(), net.mixes):
        for g, searched in enumerate(convs):
            mix.scale[g] = norms[searched].weight  # [K, C], the same for each candidate
            mix.shift[g] = norms[searched].bias
    return net

def main(argv=None):
    """Run a search of tas.py; returns its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[1:2] != ["search"]:
        return tas.complain("give python tools/warm.py the directory of a teacher, then search ...")
    plan_search, make = tas.plan_search, tas.SuperResNet

    def plan(args):
        data, space, *rest = plan_search(args)
        args.teacher = argv[0]
        teacher = tas.load_teacher(args, space.full, data)
        args.warm = tas.checksum(teacher)  # a setting of the run
        tas.measure_teacher(args, data, teacher)
        return data, space, *rest

    def warm(space, align):
        return start_from(make(space, align), sort_channels(tas.load(argv[0])))

    tas.plan_search, tas.SuperResNet = plan, warm
    tas.SEARCH_SETTINGS += ("warm",)
    return tas.main(argv[1:])

if __name__ == "__main__":
    sys.exit(main())
