"""Network Pruning via Transformable Architecture Search (Dong and Yang, NeurIPS 2019), in one file.

    python tas.py train  --data cifar10 --arch resnet56                # the teacher, 300 epochs
    python tas.py search --data cifar10 --arch resnet56 --flops 0.47   # shape.json, 600 epochs
    python tas.py train  --data cifar10 --shape SHAPE --teacher DIR    # distil, 300 epochs
    python tas.py prune  --data cifar10 --arch resnet56 --flops 0.47   # all three, resumable
    python tas.py eval DIR --data cifar10                              # accuracy of a network

An epoch of the search takes a tenth to a fifth longer than one of training the unpruned network.
The pruned network meets the asked number of MACs within 5%, whatever was learned. The paper's
parts, in order: search space: Shape, Space; its cost: count_macs, expected_macs; transformable
network: cwi_matrix, sample_sizes, SuperResNet; objective: cost_loss; pruned size: extract;
knowledge distillation: kd_loss; training: train; the search: search.
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import io
import itertools
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- Hyper-parameters ---------------------------------------------------------------------------
# Meaning, unit (source; reason). The defaults of the command line and of functions are these.

# The search space and the budget.
WIDTH_TENTHS = range(3, 11)     # candidate widths, in tenths of a conv's channels (paper)
DENSE_DEPTHS = 3                # stages of at most 3 blocks: any depth; else odd and full (paper)
WIDEST = 8                      # a Shape has at most so many times the unpruned channels (ours)
FLOPS = "0.5"                   # target, fraction of the unpruned MACs (ours; the paper's vary)
TOLERANCE = 0.05                # half-width of the band, fraction of the target (paper)
REFINEMENTS = 1, 8, 64, 512     # tries of `extract`: cells so many times smaller (ours; the
                                # first nearly always serves)
MOST_CELLS = 100_000_000        # of a refined `extract` (ours; bounds time and memory)
# The search.
COST_WEIGHT = 2.0               # of the cost loss beside cross-entropy (paper)
NUM_SAMPLES = 2                 # candidates mixed per conv (paper)
TAU_START, TAU_END = 10.0, 0.1  # Gumbel temperature, linear over the epochs (paper)
SEARCH_EPOCHS = 600             # (paper)
# alpha and beta, the logits of widths and depths: Adam.
ARCH_LR = 1e-3                  # learning rate in a search of full length (paper)
ARCH_STEPS = 58_200             # steps of such a search, 600 epochs of half of CIFAR (paper)
MOST_ARCH_LR = 0.05             # a shorter search has ARCH_LR * ARCH_STEPS / its steps, at most
                                # this (ours; at 1e-3 a short search hardly leaves its start)
ARCH_BETAS = 0.5, 0.999         # (paper)
ARCH_WEIGHT_DECAY = 1e-3        # (paper)
ARCH_INIT = 0.01                # standard deviation of the first logits (paper)
ABSENT = -1e9                   # logit of what a row lacks: never drawn, whatever Adam adds (ours)
# The weights, in search and training: SGD with Nesterov momentum.
LR = 0.1                        # at its highest; a cosine to 0 (paper), step by step (ours)
MOMENTUM = 0.9                  # (paper)
WEIGHT_DECAY = 5e-4             # (paper)
BATCH_SIZE = 256                # images, over all processes (paper)
TRAIN_EPOCHS = 300              # (paper)
WARMUP_EPOCHS = 5               # linear, counted among those of the training (paper)
WARMUP_SHARE = 0.1              # at most this part of the training (ours; for short ones)
KD_WEIGHT = 0.9                 # of the soft term, 1 - 0.9 of cross-entropy (authors' code)
KD_TEMPERATURE = 4.0            # (paper)
# Images.
CIFAR_SIZE, IMAGENET_SIZE = 32, 224  # pixels (paper)
CROP_PADDING = 4                # pixels, black; then a crop of the first size (paper)
LARGEST_IN_MEMORY = 64          # pixels; larger images are read on the fly (ours)
LARGE_EPOCHS = 120              # of training and of search on larger images (paper)
LARGE_WEIGHT_DECAY = 1e-4       # on larger images (paper)
TOP5_CLASSES = 100              # more classes than these: top-5 accuracy, too (ours)
COLOUR_JITTER = 0.4             # of brightness, contrast, saturation (paper)
RESIZE = 256 / 224              # of a test image before the centre crop (paper)
MEAN = 0.485, 0.456, 0.406      # torchvision's, for all data (ours: a network needs no
STD = 0.229, 0.224, 0.225       # constants of its own)
SYNTHETIC_IMAGES = 4096, 1024   # of training and test (ours)
# Running.
CHANNEL_MULTIPLE = 8            # widths are padded to it in training (ours; faster)
BAR_STEPS = 50                  # between looks at the loss, which wait for the device (ours)

class TASError(ValueError):
    """A mistake that the user can fix: the message names the thing and the remedy."""

def require(condition, message):
    """TASError with the message unless the condition holds."""
    if not condition:
        raise TASError(message)

@contextlib.contextmanager
def errors_as(message, kind=Exception):
    """Turn errors of a kind into a TASError: `message`, with the reason in the place of {}."""
    try:
        yield
    except (TASError, MemoryError, torch.OutOfMemoryError):
        raise
    except kind as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TASError(message.replace("{}", reason.strip().split("\n")[0][:120])) from None

# ---- Shapes and their cost ----------------------------------------------------------------------

BASIC, BOTTLENECK = (3, 3), (1, 3, 1)  # kernel sizes of the convs of a block
CIFAR, IMAGENET = (16, 32, 64), (64, 128, 256, 512)  # channels of the 3x3 convs of the stages

class Arch(NamedTuple):
    """An unpruned ResNet."""

    kernels: tuple
    channels: tuple
    depths: tuple  # blocks of each stage

    @property
    def small(self):
        """CIFAR: 3x3 stem, pooled shortcuts; else ImageNet: 7x7 stem of stride 2, max pooling."""
        return self.channels == CIFAR

    @property
    def stages(self):
        """stages[s][b]: channels of the convs of block b; a bottleneck's last conv has 4 C."""
        blocks = [[c, c] if self.kernels == BASIC else [c, c, 4 * c] for c in self.channels]
        return [[block] * depth for block, depth in zip(blocks, self.depths)]

    def conv_strides(self, stage, block):
        """Strides of a block's convs. Every stage but the first halves the feature map, in the
        first 3x3 conv of its first block."""
        strides = [1] * len(self.kernels)
        if stage > 0 and block == 0:
            strides[self.kernels.index(3)] = 2
        return strides

ARCHS = {
    "resnet20": Arch(BASIC, CIFAR, (3, 3, 3)),
    "resnet32": Arch(BASIC, CIFAR, (5, 5, 5)),
    "resnet44": Arch(BASIC, CIFAR, (7, 7, 7)),
    "resnet56": Arch(BASIC, CIFAR, (9, 9, 9)),
    "resnet110": Arch(BASIC, CIFAR, (18, 18, 18)),
    "resnet164": Arch(BOTTLENECK, CIFAR, (18, 18, 18)),
    "resnet18": Arch(BASIC, IMAGENET, (2, 2, 2, 2)),
    "resnet34": Arch(BASIC, IMAGENET, (3, 4, 6, 3)),
    "resnet50": Arch(BOTTLENECK, IMAGENET, (3, 4, 6, 3)),
    "resnet101": Arch(BOTTLENECK, IMAGENET, (3, 4, 23, 3)),
}

def check_whole(name, value, low, high):
    """TASError unless the value is a whole number from low to high."""
    require(type(value) is int and low <= value <= high,
            f"{name} must be a whole number from {low} to {high}, not {value!r:.40}")

def check_list(name, value, low, high):
    """TASError unless the value is a list of low to high items."""
    require(isinstance(value, (list, tuple)) and low <= len(value) <= high,
            f"{name} must be a list of {low} to {high} items, not {value!r:.40}")

@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of one network. stem: channels of the first conv; stages[s][b]: channels of the
    convs of each kept block, which may exceed those of `arch`. TASError names a wrong field."""

    arch: str
    num_classes: int
    image_size: int  # pixels
    stem: int
    stages: list = dataclasses.field(hash=False)

    def __post_init__(self):
        require(isinstance(self.arch, str) and self.arch in ARCHS,
                f"unknown arch {self.arch!r:.40}; known: {', '.join(ARCHS)}")
        unpruned = ARCHS[self.arch].stages
        check_whole("num_classes", self.num_classes, 2, 25_000)
        check_whole("image_size", self.image_size, 8, 1024)
        check_whole("stem", self.stem, 1, WIDEST * unpruned[0][0][0])
        check_list("stages", self.stages, len(unpruned), len(unpruned))
        copied = []
        for s, (blocks, most) in enumerate(zip(self.stages, unpruned)):
            check_list(f"stages[{s}]", blocks, 1, len(most))
            for b, widths in enumerate(blocks):
                check_list(f"stages[{s}][{b}]", widths, len(most[b]), len(most[b]))
                for i, width in enumerate(widths):
                    check_whole(f"stages[{s}][{b}][{i}]", width, 1, WIDEST * most[b][i])
            copied.append([list(widths) for widths in blocks])
        object.__setattr__(self, "stages", copied)  # past the frozen dataclass

    @property
    def convs(self):
        """Channels of every conv in order: the stem, then those of each block."""
        return [self.stem, *itertools.chain(*itertools.chain(*self.stages))]

    @property
    def full(self):
        """The unpruned Shape that this one comes from."""
        return self.unpruned(self.arch, self.num_classes, self.image_size)

    @classmethod
    def unpruned(cls, arch, num_classes, image_size=None):
        """The full Shape of an arch; image_size in pixels, 32 or 224 when it is None."""
        found = ARCHS.get(arch, ARCHS["resnet18"])  # an unknown one is refused by Shape
        size = image_size or (CIFAR_SIZE if found.small else IMAGENET_SIZE)
        return cls(arch, num_classes, size, found.channels[0], found.stages)

    @classmethod
    def load(cls, path):
        """The Shape of a JSON file or run directory; TASError names what is wrong with it."""
        path = Path(path, "shape.json") if os.path.isdir(path) else Path(path)
        fields = read_json(path)
        try:
            return cls(**fields)
        except (TASError, TypeError) as error:  # a wrong value; a missing or unknown field
            raise TASError(f"{path}: {str(error).replace('Shape.__init__() ', '')[:280]}") from None

    def save(self, path):
        """Write the Shape as JSON, whole or not at all."""
        write_file(path, json.dumps(dataclasses.asdict(self)).encode() + b"\n")

class Layer(NamedTuple):
    """A layer that costs. c_in and c_out are places in the list [*channels of all convs, *channels
    at the exits of the stages, 1], from -1 back where they are no convs."""

    c_in: int   # -1, one channel, of the stem: its colours are in `area`
    c_out: int  # -1, one channel, of the classifier
    stage: int  # the layer is there when this stage ...
    block: int  # ... keeps more blocks than this
    area: int   # MACs for each pair of an input and an output channel
    always: bool = True  # False of a shortcut that is the identity between as many channels

    def macs(self, c_in, c_out):
        """MACs between so many channels, numbers or tensors."""
        return self.area * c_in * c_out * ((c_in != c_out) | self.always)

def network_layers(shape):
    """All Layers in order: the stem, the convs and the shortcut of each block, the classifier."""
    arch = ARCHS[shape.arch]
    stem_kernel, stem_stride = (3, 1) if arch.small else (7, 2)
    size = math.ceil(shape.image_size / stem_stride)  # rounded up, as padding does
    layers = [Layer(-1, 0, 0, 0, 3 * (stem_kernel * size) ** 2)]
    size = math.ceil(size / stem_stride)  # max pooling
    source = last = 0  # the input of the next conv; the last conv
    for s, blocks in enumerate(shape.stages):
        for b in range(len(blocks)):
            block_source, strides = source, arch.conv_strides(s, b)
            for kernel, stride in zip(arch.kernels, strides):
                size = math.ceil(size / stride)
                last += 1
                layers.append(Layer(source, last, s, b, (kernel * size) ** 2))
                source = last
            layers.append(Layer(block_source, last, s, b, size ** 2, always=2 in strides))
        source = s - len(shape.stages) - 1  # the exit of the stage
    return [*layers, Layer(source, -1, s, 0, shape.num_classes)]

def count_macs(shape):
    """MACs of one image, an int: multiply-accumulates of the convs and of the classifier, which
    the paper prints as FLOPs. Nothing else is counted."""
    channels = [*shape.convs, *[blocks[-1][-1] for blocks in shape.stages], 1]
    return sum(layer.macs(channels[layer.c_in], channels[layer.c_out])
               for layer in network_layers(shape))

def count_params(shape):
    """Number of trainable parameters of `ResNet(shape)`."""
    with torch.device("meta"):
        return sum(p.numel() for p in ResNet(shape).parameters())

def candidate_widths(channels, round_to):
    """Each tenth of the channels, rounded down, or to the nearest multiple of a larger round_to;
    and all of them."""
    widths = {channels}
    for tenth in WIDTH_TENTHS:
        nearest = (channels * tenth // 10 + round_to // 2) // round_to * round_to
        widths.add(min(max(nearest, round_to), channels))
    return tuple(sorted(widths))

def candidate_depths(arch):
    """Numbers of blocks of each stage. CIFAR: all of a short stage; odd ones, and all blocks, of a
    long one. ImageNet: as many for each stage, in equal parts of it (the authors' code)."""
    if not arch.small:
        parts = min(arch.depths)
        return [tuple(n * j // parts for j in range(1, parts + 1)) for n in arch.depths]
    return [(*range(1, n, 1 if n <= DENSE_DEPTHS else 2), n) for n in arch.depths]

class Space:
    """What may be pruned of `full`, an unpruned Shape (paper: search space). widths[j]: candidate
    widths of conv j, in order; depths[s]: candidate numbers of blocks of stage s. `search` "width"
    or "depth" keeps the other full; round_to restricts widths to its multiples and the full one."""

    def __init__(self, arch, num_classes=10, image_size=None, search="both", round_to=1):
        self.full = Shape.unpruned(arch, num_classes, image_size)
        self.widths = [(c,) for c in self.full.convs]
        self.depths = [(len(blocks),) for blocks in self.full.stages]
        if search != "depth":
            self.widths = [candidate_widths(c, round_to) for c in self.full.convs]
        if search != "width":
            self.depths = candidate_depths(ARCHS[arch])
        self.tabulate()

    def tabulate(self):
        """Make all tables anew from full, widths and depths. L layers; K and D are the largest
        numbers of candidates; costs are float64, exact for whole numbers up to 2^53."""
        self.arch = ARCHS[self.full.arch]
        self.block_convs = len(self.arch.kernels)
        widths, depths = (
            nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
            for rows in (self.widths, self.depths))  # [convs, K], [stages, D]; 0 past a row's end
        self.num_widths, self.num_depths = widths.shape[1], depths.shape[1]
        self.width_table, self.has_width = widths, widths > 0
        self.depth_table, self.has_depth = depths, depths > 0
        blocks = torch.tensor([len(blocks) for blocks in self.full.stages])[:, None]  # [stages, 1]
        before = blocks.cumsum(0) - blocks  # blocks of earlier stages
        self.last_conv = (before + depths) * self.block_convs  # [stages, D]; the stem is conv 0
        exits = widths[self.last_conv[:, 0]]  # [stages, K], alike for all blocks of a stage
        self.one_channel = torch.eye(1, self.num_widths).double()  # [1, K]; and its probability
        channels = torch.cat([widths.double(), exits, self.one_channel])  # the list of Layer
        layers = network_layers(self.full)
        self.c_in, self.c_out, self.stage, block, *_ = torch.tensor(layers).T  # [L] each
        self.cost = torch.stack([  # [L, K, K]
            layer.macs(channels[layer.c_in, :, None], channels[layer.c_out]) for layer in layers])
        self.kept = (block[:, None] < depths[self.stage]).double()  # [L, D] 1: the depth has it
        self.unit = "MACs"

    def load_cost(self, path):
        """Count another cost than MACs, of a JSON file such as tools/latency.py writes: "arch",
        "image_size", "widths" as here, "unit", and "cost" [L, K, K] in the place of that above."""
        found = read_json(path)
        own = {"arch": self.full.arch, "image_size": self.full.image_size,
               "widths": [list(row) for row in self.widths]}
        for name, value in own.items():
            require(found.get(name) == value, f"{path} has costs of {name} "
                    f"{str(found.get(name))[:60]}, not of {str(value)[:60]}; measure them")
        with errors_as(f"{path} has no unit or no table of costs from 0 on for every layer ({{}})"):
            cost = torch.tensor(found["cost"], dtype=torch.float64)
            unit = found["unit"].strip()[:20]
            sound = cost.shape == self.cost.shape and cost.min() >= 0 and cost.sum() < math.inf
            if not (sound and unit):
                raise ValueError(f"{list(cost.shape)}, not {list(self.cost.shape)}; {unit!r}")
            self.cost, self.unit = cost, unit

    def show(self, cost):
        return f"{cost:,.0f} MACs" if self.unit == "MACs" else f"{cost:.4g} {self.unit}"

    def cost_of(self, shape):
        """The cost of a Shape of this space, as the tables have it."""
        widths = [shape.stem]
        for blocks, full in zip(shape.stages, self.full.stages):
            widths += itertools.chain(*blocks, *full[len(blocks):])  # those of dropped ones count 0
        depths = [len(blocks) for blocks in shape.stages]
        p = self.width_table.cpu() == torch.tensor(widths)[:, None]  # one-hot
        q = self.depth_table.cpu() == torch.tensor(depths)[:, None]
        require(p.any(1).all() and q.any(1).all(), f"{shape} is not of this space")
        return float(expected_macs(self, p, q))

    def to(self, device):
        """Move the tables, once, so that the cost is computed where alpha and beta are."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))
        return self

    def shape(self, width_index, depth_index):
        """The Shape of one candidate per conv and per stage; indices are sequences of int."""
        widths = iter([row[int(i)] for row, i in zip(self.widths, width_index)])
        stem, stages = next(widths), []
        for full, depths, i in zip(self.full.stages, self.depths, depth_index):
            blocks = [list(itertools.islice(widths, len(convs))) for convs in full]
            stages.append(blocks[:depths[int(i)]])
        return dataclasses.replace(self.full, stem=stem, stages=stages)

def expected_macs(space, p, q):
    """Expected MACs of a network with independent sizes (paper: expected cost), or what else the
    space counts; float64, 0-d.
    p [convs, K], q [stages, D]: width and depth probabilities; entries past a row's candidates are
    ignored. Of one-hot p and q: that network's MACs, exactly. Stays on the device."""
    space.to(p.device)
    p, q = p.double() * space.has_width, q.double() * space.has_depth
    exits = torch.einsum("sd,sdk->sk", q, p[space.last_conv])  # [stages, K]
    sizes = torch.cat([p, exits, space.one_channel])  # the list of Layer: P(candidate)
    cost = torch.einsum("li,lik,lk->l", sizes[space.c_in], space.cost, sizes[space.c_out])
    return (q[space.stage] * space.kept).sum(1) @ cost  # P(the layer is there) times its cost

def argmax_macs(space, p, q):
    """MACs of the most probable network, exactly; 0-d, on the device of p and q."""
    p, q = (torch.zeros_like(t).scatter(1, t.argmax(1, keepdim=True), 1) for t in (p, q))
    return expected_macs(space, p, q)  # one-hot

# ---- Networks -----------------------------------------------------------------------------------

def conv2d(c_in, c_out, kernel, stride=1):
    """A convolution as all networks here have them."""
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)

class Block(nn.Module):
    """Residual block, basic or bottleneck, with torchvision's names. [N, c_in, H, W] ->
    [N, widths[-1], H/stride, W/stride]."""

    def __init__(self, arch, c_in, widths, strides):
        super().__init__()
        self.num_convs, c = len(widths), c_in
        for i, width in enumerate(widths):
            self.add_module(f"conv{i + 1}", conv2d(c, width, arch.kernels[i], strides[i]))
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(width))
            c = width
        if not arch.small:  # residual branches start at zero (authors' code)
            nn.init.zeros_(getattr(self, f"bn{self.num_convs}").weight)
        self.pool, self.downsample = nn.Identity(), nn.Identity()
        stride = max(strides)
        if stride == 2 or c_in != c:
            if arch.small and stride == 2:  # averages, and then every position
                self.pool, stride = nn.AvgPool2d(2, ceil_mode=True), 1
            self.downsample = nn.Sequential(conv2d(c_in, c, 1, stride), nn.BatchNorm2d(c))

    def forward(self, x):
        y = self.bn1(self.conv1(x))  # [N, widths[0], H', W']
        y = self.bn2(self.conv2(F.relu(y)))
        if self.num_convs == 3:
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + self.downsample(self.pool(x)))

class ResNet(nn.Module):
    """The network of a Shape, pruned or not. [N, 3, H, W] -> [N, classes]. Full ImageNet shapes
    take torchvision's state dicts and give its outputs."""

    def __init__(self, shape):
        super().__init__()
        self.shape, arch, c = shape, ARCHS[shape.arch], shape.stem
        self.conv1 = conv2d(3, c, 3) if arch.small else conv2d(3, c, 7, 2)
        self.maxpool = nn.Identity() if arch.small else nn.MaxPool2d(3, 2, 1)
        self.bn1 = nn.BatchNorm2d(c)
        for s, blocks in enumerate(shape.stages):
            layer = nn.Sequential()
            for b, widths in enumerate(blocks):
                layer.append(Block(arch, c, widths, arch.conv_strides(s, b)))
                c = widths[-1]
            self.add_module(f"layer{s + 1}", layer)
        self.fc = nn.Linear(c, shape.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def layers(self):
        """The stages, under torchvision's name."""
        return [getattr(self, f"layer{s + 1}") for s in range(len(self.shape.stages))]

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))  # [N, stem, H, W]; ImageNet H/4, W/4
        for layer in self.layers:
            x = layer(x)  # [N, C_s, H/2^s, W/2^s]
        return self.fc(x.mean((2, 3)))  # [N, classes]

# ---- Transformable network ----------------------------------------------------------------------

def cwi_matrix(c_in, c_out, size=None, dtype=torch.float32):
    """Channel-wise interpolation (CWI) as a matrix [c_out, c_in]: row o averages the input
    channels floor(o c_in / c_out) ... ceil((o + 1) c_in / c_out) - 1, as adaptive pooling does.
    With `size`: of integer tensors [..., 1, 1], padded with zeros to [..., size, size]."""
    device = getattr(c_in, "device", None)  # an int has none
    row = torch.arange(size or c_out, device=device)[:, None]  # [rows, 1]
    column = torch.arange(size or c_in, device=device)  # [columns]
    first = row * c_in // c_out
    end = ((row + 1) * c_in + c_out - 1) // c_out  # a quotient rounded up
    inside = (column >= first) & (column < end) & (row < c_out)  # [..., rows, columns]
    return inside.to(dtype) / (end - first)

def channel_wise_interpolation(x, c_out):
    """x [N, C, ...] -> [N, c_out, ...], each output channel the mean of its share of the inputs."""
    return torch.einsum("oc,nc...->no...", cwi_matrix(x.shape[1], c_out, dtype=x.dtype).to(x), x)

class Sample(NamedTuple):
    """One draw of sizes: what a forward pass of SuperResNet mixes."""

    index: torch.Tensor   # [convs, S] distinct candidate widths of every conv
    weight: torch.Tensor  # [convs, S] their weights, summing to 1
    depth: torch.Tensor   # [stages, D] weights of all candidate depths, summing to 1

def sample_sizes(alpha, beta, tau, num_samples=NUM_SAMPLES, gumbel=True):
    """Gumbel-Softmax over sizes (paper: sampled sizes): a Sample, differentiable in the logits
    alpha [convs, K] and beta [stages, D], without a host sync. z = (log p + g) / tau with tau > 0;
    gumbel=False takes the plain probabilities, z = log p (ablation)."""
    def gumbel_noise(logits):
        return -torch.empty_like(logits).exponential_().log()

    def perturb(logits):
        log_p = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        return (log_p + gumbel_noise(log_p)) / tau if gumbel else log_p

    z = perturb(alpha)  # [convs, K]
    # The largest of z + a second noise are a draw with probabilities softmax(z), without repeats.
    index = (z + gumbel_noise(z)).topk(min(num_samples, z.shape[1])).indices  # [convs, S]
    return Sample(index, z.gather(1, index).softmax(-1), perturb(beta).softmax(-1))

class ChannelMix(nn.Module):
    """What follows the searched convs of C channels, G of them: the weighted sum, over the sampled
    widths c_i, of CWI(affine_i(first c_i channels), largest c_i). All of it is linear: a C x C
    matrix and a bias for each conv, in fixed shapes. They depend on the sample, not on images."""

    def __init__(self, convs, width_table, align):
        super().__init__()
        self.align = align
        rows = torch.tensor([conv.row for conv in convs])
        widths = width_table.cpu()[rows].clamp(min=1)  # past a row's end any: its weight is 0
        scale = torch.stack([conv.first_scale for conv in convs])[:, None]  # [G, 1, C]
        # Of each candidate an affine of BN of its own.
        self.scale = nn.Parameter(scale.repeat(1, widths.shape[1], 1))  # [G, K, C]
        self.shift = nn.Parameter(torch.zeros_like(self.scale))  # [G, K, C]
        self.register_buffer("widths", widths, persistent=False)  # [G, K] candidates
        self.register_buffer("rows", rows, persistent=False)      # [G] of alpha

    def forward(self, sample):
        """Matrices [G, C, C, 1, 1], biases [G, C] and largest sampled widths [G]."""
        index, weight = sample.index[self.rows], sample.weight[self.rows]  # [G, S]
        width = self.widths.gather(1, index)[..., None, None]  # [G, S, 1, 1]
        largest = width.amax(1, keepdim=True)  # [G, 1, 1, 1]
        target = largest if self.align == "cwi" else width
        cwi = cwi_matrix(width, target, self.scale.shape[2], self.scale.dtype)  # [G, S, C, C]
        scale = weight[..., None] * self.scale.take_along_dim(index[..., None], 1)  # [G, S, C]
        shift = weight[..., None] * self.shift.take_along_dim(index[..., None], 1)
        matrix = (cwi * scale[:, :, None]).sum(1)  # [G, C, C]
        bias = (cwi * shift[:, :, None]).sum((1, 3))  # [G, C]
        kind = matrix.device.type
        if torch.is_autocast_enabled(kind):  # once, not conv by conv
            dtype = torch.get_autocast_dtype(kind)
            matrix, bias = matrix.to(dtype), bias.to(dtype)
        return matrix[..., None, None], bias, largest.flatten()

class MixedConv(nn.Module):
    """A searched conv. Its BNs are one normalisation, as batch statistics are per channel and so
    the same for every candidate width; a 1x1 conv with a matrix of ChannelMix does the rest."""

    def __init__(self, conv, bn, row):
        super().__init__()
        self.conv, self.row = conv, row  # of alpha
        self.first_scale = bn.weight.detach()  # 1, or 0 at the end of a residual branch
        # With a float32 weight the statistics are float32 on every device, under autocast, too.
        self.register_buffer("bn_weight", torch.ones(conv.out_channels), persistent=False)

    def forward(self, x, mixed):
        """x [N, c_in, H, W] -> [N, C, H', W'], zero past the largest sampled width; that width."""
        matrix, bias, width = mixed[self]
        x = F.batch_norm(self.conv(x), None, None, self.bn_weight, training=True)
        return F.conv2d(x, matrix, bias), width

class MixedBlock(nn.Module):
    """A Block of searched convs. The projection shares the sample of the last conv."""

    def __init__(self, block, rows):
        super().__init__()
        self.convs, self.pool, self.projection = nn.ModuleList(), block.pool, None
        for i in range(1, block.num_convs + 1):
            conv, bn = getattr(block, f"conv{i}"), getattr(block, f"bn{i}")
            self.convs.append(MixedConv(conv, bn, next(rows)))
        if isinstance(block.downsample, nn.Sequential):
            self.projection = MixedConv(*block.downsample, self.convs[-1].row)

    def forward(self, x, width, mixed):
        """x [N, c_in, H, W] of a sampled width -> [N, C, H', W'] and its width."""
        y, own = self.convs[0](x, mixed)
        for conv in self.convs[1:]:
            y, own = conv(F.relu(y), mixed)
        if self.projection is not None:
            x, width = self.projection(self.pool(x), mixed)
        # Zeros past the widths make unequal ones add up; the sum is as wide as the wider one.
        return F.relu(y + x), torch.maximum(width, own)

class SuperResNet(nn.Module):
    """The unpruned network with every size a random variable (paper: transformable network), of
    logits alpha [convs, K] and beta [stages, D]. `forward(x, sample)`: [N, 3, H, W] -> [N, classes]
    without a host sync and in fixed shapes, so that a step compiles to one graph and costs the same
    for any number of sampled candidates. For training mode only: it has no running statistics."""

    def __init__(self, space, align="cwi"):
        super().__init__()
        self.space, self.align = space, align
        net, rows = ResNet(space.full), itertools.count()  # of alpha
        self.stem, self.maxpool = MixedConv(net.conv1, net.bn1, next(rows)), net.maxpool
        self.stages = nn.ModuleList()
        for layer in net.layers:
            self.stages.append(nn.ModuleList([MixedBlock(block, rows) for block in layer]))
        self.fc = net.fc
        self.alpha, self.beta = initial_logits(space.has_width), initial_logits(space.has_depth)
        self.groups = {}  # channels -> the searched convs that have as many
        for module in self.modules():
            if isinstance(module, MixedConv):
                self.groups.setdefault(module.conv.out_channels, []).append(module)
        self.mixes = nn.ModuleList()
        for convs in self.groups.values():
            self.mixes.append(ChannelMix(convs, space.width_table, align))

    def probabilities(self):
        """p [convs, K] and q [stages, D]."""
        return self.alpha.softmax(-1), self.beta.softmax(-1)

    def forward(self, x, sample):
        mixed = {}  # searched conv -> its matrix, bias and largest sampled width, 0-d
        for convs, mix in zip(self.groups.values(), self.mixes):
            for conv, *parts in zip(convs, *mix(sample)):
                mixed[conv] = parts
        x, width = self.stem(x, mixed)
        x = self.maxpool(F.relu(x))  # [N, stem, H, W]; ImageNet H/4, W/4
        for stage, depths, q_hat in zip(self.stages, self.space.depths, sample.depth):
            # Sum over depths d of q_hat_d * CWI(output of block d, M), as one 1x1 conv over all.
            outputs, reached = [], []
            for depth, block in enumerate(stage, 1):
                x, width = block(x, width, mixed)  # [N, C, H, W]
                if depth in depths:
                    outputs.append(x)
                    reached.append(width)
            source = torch.stack(reached)[:, None, None]  # [D, 1, 1]
            target = width if self.align == "cwi" else source
            cwi = cwi_matrix(source, target, x.shape[1], q_hat.dtype)  # [D, C, C]
            matrix = (cwi * q_hat[:len(depths), None, None]).transpose(0, 1)  # [C, D, C]
            x = F.conv2d(torch.cat(outputs, 1), matrix.flatten(1)[..., None, None])
        return self.fc(x.mean((2, 3)))  # [N, classes]

def initial_logits(present):
    """Small random logits of the candidates that are present; ABSENT for others."""
    logits = ARCH_INIT * torch.randn(present.shape)  # [rows, candidates]
    return nn.Parameter(logits.masked_fill(~present.cpu(), ABSENT))

# ---- Search objective ---------------------------------------------------------------------------

def cost_loss(expected, actual, target, tolerance=TOLERANCE):
    """Paper's cost loss: log E[MACs] when the argmax network is too large, its negative when it is
    too small, 0 inside target (1 -+ tolerance). expected: 0-d tensor; actual, target: MACs."""
    over = actual > (1 + tolerance) * target
    under = actual < (1 - tolerance) * target
    return (1 * over - 1 * under) * torch.as_tensor(expected).log()

def in_band(macs, target, tolerance):
    """Whether MACs are in target (1 -+ tolerance)."""
    return abs(macs - target) <= tolerance * target

def log_scores(logits, present):
    """Log-probabilities of the candidates that are present, float64 on the CPU; those of a row less
    the largest, which changes no order."""
    logits, present = logits.detach().double().cpu().clamp(-1e9, 1e9), present.cpu()
    require(logits.shape == present.shape and not logits.isnan().any(),
            f"expected logits {list(present.shape)} without NaN; after a search, lower --lr")
    logits = logits.masked_fill(~present, -math.inf)
    return logits - logits.amax(1, keepdim=True)

# A network is a chain: the stem, the blocks, the classifier. What a link costs depends on its own
# widths and on the width of its input alone. So the networks of a space are the ways through a
# graph, and the best one within a budget is found by dynamic programming over its nodes:
# IMAGE; (s, b, k), the part up to block b of stage s, whose output has its k-th width; NETWORK.
# (s, 0, k) is what stage s begins with: the stem, or the stage before with as many blocks as kept.

IMAGE, NETWORK = "image", "network"

class Edge(NamedTuple):
    """A way into a node of the graph: a choice of widths or of a depth."""

    source: object  # the node before
    cost: float
    score: float    # log-probability of the choice
    widths: tuple = ()  # of the convs of a block or of the stem; none of other choices

def size_graph(space, log_p, log_q):
    """The graph: node -> Edges into it, each node after its sources."""
    cost, log_p, log_q = space.cost.tolist(), log_p.tolist(), log_q.tolist()
    graph, convs = collections.defaultdict(list), space.block_convs
    for k, width in enumerate(space.widths[0]):
        graph[0, 0, k].append(Edge(IMAGE, cost[0][0][k], log_p[0][k], (width,)))
    conv = layer = 0  # the last ones before a block
    for s, depths in enumerate(space.depths):
        for b in range(len(space.full.stages[s])):
            rows = space.widths[conv:conv + convs + 1]  # of the block's input and its convs
            for choice in itertools.product(*map(enumerate, rows)):
                index, widths = zip(*choice)
                macs = cost[layer + convs + 1][index[0]][index[-1]]  # of the shortcut
                score = 0
                for i in range(convs):
                    macs += cost[layer + i + 1][index[i]][index[i + 1]]
                    score += log_p[conv + i + 1][index[i + 1]]
                graph[s, b + 1, index[-1]].append(Edge((s, b, index[0]), macs, score, widths[1:]))
            conv, layer = conv + convs, layer + convs + 1
        for k in range(len(space.widths[conv])):
            for depth, log in zip(depths, log_q[s]):
                graph[s + 1, 0, k].append(Edge((s, depth, k), 0, log))
    for k in range(len(space.widths[-1])):
        graph[NETWORK].append(Edge((len(space.depths), 0, k), cost[-1][k][0], 0))
    return graph

def best_scores(graph, cell, num_cells):
    """Node -> [cells]: the score of the most probable way to it, by the MACs that it spends:

        best[v][m] = max over the edges e into v of best[source_e][m - cost_e] + score_e

    with MACs in cells, those of an edge rounded to whole ones."""
    best = {node: torch.full((num_cells,), -math.inf).double() for node in (IMAGE, *graph)}
    best[IMAGE][0] = 0
    for node, edges in graph.items():
        for edge in edges:
            spent = min(round(edge.cost / cell), num_cells)
            reached = best[edge.source][:num_cells - spent] + edge.score
            torch.maximum(best[node][spent:], reached, out=best[node][spent:])
    return best

def best_shape(space, graph, best, cell, m):
    """The Shape of the most probable way to NETWORK that spends m cells, found from its end."""
    node, stages = NETWORK, [[] for _ in space.depths]
    while node != IMAGE:
        for edge in graph[node]:  # one of them gives the same sum as in best_scores
            before = m - round(edge.cost / cell)
            if before >= 0 and best[edge.source][before] + edge.score == best[node][m]:
                break
        if edge.widths:
            stages[node[0]].insert(0, edge.widths)
        node, m = edge.source, before
    [stem] = stages[0].pop(0)  # inserted last
    return dataclasses.replace(space.full, stem=stem, stages=stages)

def extract(space, alpha, beta, target, tolerance=TOLERANCE):
    """The pruned network's Shape: the argmax one if its MACs lie in target (1 -+ tolerance), else
    one in that band such that no Shape in target (1 -+ tolerance/2) is more probable.
    alpha [convs, K], beta [stages, D]: logits, of which the convs of dropped blocks count with
    their most probable widths (so the argmax one is the most probable of all). TASError with the
    smallest and largest possible MACs when no Shape is found in the band.

    Of the best ways of each number of cells near the band, the most probable one whose exact MACs
    are in the band is taken. All roundings of a way together stay below a quarter of the band's
    half-width: so what is in its inner half cannot be missed. Smaller cells serve small spaces."""
    log_p, log_q = log_scores(alpha, space.has_width), log_scores(beta, space.has_depth)
    shape = space.shape(log_p.argmax(1), log_q.argmax(1))
    if in_band(space.cost_of(shape), target, tolerance):
        return shape
    graph = size_graph(space, log_p, log_q)
    links = 2 + sum(map(len, space.full.stages))  # that cost MACs
    for refinement in REFINEMENTS:
        cell = tolerance * target / (2 * links * refinement)
        first = max(0, int((1 - tolerance) * target / cell - links / 2))
        num_cells = int((1 + tolerance) * target / cell + links / 2) + 1
        if num_cells * len(graph) > MOST_CELLS and refinement > 1:
            break
        best = best_scores(graph, cell, num_cells)
        scores = best[NETWORK][first:]  # of whole networks near the band
        for m in scores.argsort(descending=True, stable=True)[:scores.isfinite().sum()].tolist():
            shape = best_shape(space, graph, best, cell, first + m)
            if in_band(space.cost_of(shape), target, tolerance):
                return shape
    fewest, most, full = {IMAGE: 0}, {IMAGE: 0}, space.cost_of(space.full)
    for node, edges in graph.items():
        fewest[node] = min(fewest[edge.source] + edge.cost for edge in edges)
        most[node] = max(most[edge.source] + edge.cost for edge in edges)
    low, high = fewest[NETWORK], most[NETWORK]
    raise TASError(f"no shape has {space.show(target)} within {tolerance:.1%}; possible are "
                   f"{space.show(low)} to {space.show(high)} ({low / full:.3f} to "
                   f"{high / full:.3f} of the unpruned network); choose another target")

def draw_shape(space, target, tolerance=TOLERANCE):
    """A random Shape in the band (ablation): with Gumbel noise for logits the most probable sizes
    are uniform ones, and where their MACs miss the band, `extract` moves as few as it can."""
    noise = [-torch.empty(present.shape).exponential_().log()
             for present in (space.has_width, space.has_depth)]
    return extract(space, *noise, target, tolerance)

def scale_shape(space, target, tolerance=TOLERANCE, round_to=1):
    """All widths times one factor, depths kept, MACs nearest to the target (ablation)."""
    def scaled(factor):
        def width(c):
            return min(c, max(1, round(c * factor / round_to)) * round_to)
        stages = [[[width(c) for c in widths] for widths in blocks] for blocks in space.full.stages]
        return dataclasses.replace(space.full, stem=width(space.full.stem), stages=stages)

    shapes = [scaled(k / 512) for k in range(1, 513)]
    shape = min(shapes, key=lambda shape: (abs(count_macs(shape) - target), str(shape)))
    macs = count_macs(shape)
    require(in_band(macs, target, tolerance), f"no uniform width gives {target:,.0f} MACs within "
            f"{tolerance:.1%}; the nearest has {macs:,}: choose another --flops")
    return shape

# ---- Knowledge transfer -------------------------------------------------------------------------

def kd_loss(student_logits, teacher_logits, labels, weight=KD_WEIGHT, temperature=KD_TEMPERATURE):
    """Knowledge distillation: (1 - weight) CE + weight T^2 KL(teacher || student at temperature T)
    of logits [N, classes] and labels [N]; the mean over the batch, 0-d."""
    log_student = F.log_softmax(student_logits / temperature, 1)
    log_teacher = F.log_softmax(teacher_logits / temperature, 1)
    soft = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    hard = F.cross_entropy(student_logits, labels)
    return (1 - weight) * hard + weight * temperature ** 2 * soft

@torch.no_grad()
def inherit_weights(student, teacher):
    """Copy the first channels of every layer of `teacher` into `student` (paper: Init), both
    ResNets; layers that only the student has keep theirs. Returns the student. TASError where the
    student is the wider one."""
    source = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        if name in source:
            require(all(a <= b for a, b in zip(tensor.shape, source[name].shape)),
                    f"--transfer init: {name} is wider than the teacher's; use another --transfer "
                    "and --out")
            tensor.copy_(source[name][tuple(map(slice, tensor.shape))])
    return student

# Of each --transfer, what is called before the training, with (student, teacher), and what is
# the loss in the place of cross-entropy, as kd_loss.
TRANSFERS = {
    "none": (None, None),
    "init": (inherit_weights, None),
    "kd": (None, kd_loss),
    "init+kd": (inherit_weights, kd_loss),
}

# ---- Data ---------------------------------------------------------------------------------------

# What --data names: two splits, SmallImages or LargeImages, and the names of the classes.
Data = NamedTuple("Data", [("train", object), ("test", object), ("classes", list)])

@functools.cache
def mean_and_std(device):
    """255 times MEAN and STD, [1, 3, 1, 1], copied to a device once."""
    return [255 * torch.tensor(t, device=device).view(1, 3, 1, 1) for t in (MEAN, STD)]

def normalize(images):
    """uint8 RGB images [N, 3, H, W] -> the float input of every network, (x / 255 - mean) / std."""
    require(images.dtype == torch.uint8, f"normalize takes uint8 images, not {images.dtype}")
    mean, std = mean_and_std(images.device)
    return (images - mean) / std

def split_batches(order, batch_size, train):
    """Consecutive parts of `order`; in training without the last one if it is incomplete."""
    end = len(order) - (batch_size - 1 if train else 0)
    return [order[start:start + batch_size] for start in range(0, end, batch_size)]

def split_halves(labels, seed):
    """Two class-balanced halves of the training set, as index tensors (paper: 50/50 split)."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels.cpu()[order].argsort(stable=True)]  # class by class
    return order[0::2], order[1::2]

class SmallImages:
    """A split of small images, in memory on the device: uint8 [N, H, W, 3], labels [N]. A batch,
    its random crops (zero-padding) and flips are one gather."""

    def __init__(self, images, labels, device):
        self.size, self.labels = images.shape[1], labels.to(device)
        border = 0, 0, *[CROP_PADDING] * 4  # black, of the rows and columns
        self.side = self.size + 2 * CROP_PADDING
        self.pixels = F.pad(images, border).reshape(-1, 3).to(device)  # [N * side * side, 3]

    def batches(self, order, batch_size, train, rank=0, world=1):
        """Normalised images [B, 3, H, W] and labels [B] in the given order of indices. `train`
        augments and drops an incomplete batch. Each of `world` processes gets its share of every
        batch; all of them draw the whole batch's random numbers, and so stay in step."""
        device = self.labels.device
        line = torch.arange(self.size, device=device)
        for index in split_batches(order.to(device), batch_size, train):
            row = column = line.expand(len(index), self.size)  # [B, size]
            top = left = CROP_PADDING
            if train:
                top, left = torch.randint(2 * CROP_PADDING + 1, (2, len(index), 1), device=device)
                flip = torch.rand(len(index), 1, device=device) < 0.5
                column = column.where(~flip, column.flip(1))
            index, row, column = (t[rank::world] for t in (index, row + top, column + left))
            row, column = row[:, :, None], column[:, None]  # [B, size, 1], [B, 1, size]
            pixel = (index[:, None, None] * self.side + row) * self.side + column  # [B, H, W]
            images = self.pixels.index_select(0, pixel.flatten()).view(*pixel.shape, 3)
            yield normalize(images.permute(0, 3, 1, 2)), self.labels[index]

def test_transform(size):
    """Transform of a test image to uint8 [3, size, size]."""
    from torchvision.transforms import v2
    resized = int(size * RESIZE) if size > LARGEST_IN_MEMORY else size
    return v2.Compose([v2.Resize(resized), v2.CenterCrop(size), v2.PILToTensor()])

def preprocess(image, size):
    """A PIL image, resized and cropped as a test image: a network's input [1, 3, size, size]."""
    return normalize(test_transform(size)(image.convert("RGB"))[None])

class LargeImages(torch.utils.data.Dataset):
    """A split of image files, decoded and augmented by worker processes, normalised on the device;
    the same interface as SmallImages. An item is (index, seed of its augmentation or None), so that
    the result depends neither on the number of workers nor on an interruption."""

    def __init__(self, folder, size, device, workers):
        from torchvision.transforms import v2
        self.folder, self.device, self.workers = folder, device, workers
        self.labels, self.plain = torch.tensor(folder.targets), test_transform(size)
        self.augment = v2.Compose([
            v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(),
            v2.ColorJitter(COLOUR_JITTER, COLOUR_JITTER, COLOUR_JITTER), v2.PILToTensor()])

    def __getitem__(self, item):
        index, seed = item
        image, label = self.folder[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed or 0)  # the CPU's alone
            return (self.plain if seed is None else self.augment)(image), label

    def batches(self, order, batch_size, train, rank=0, world=1):
        seeds = torch.randint(2 ** 62, (len(order),)).tolist() if train else [None] * len(order)
        batches = split_batches(list(zip(order.tolist(), seeds)), batch_size, train)
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=[batch[rank::world] for batch in batches], num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator())  # leaves the global random state alone
        for images, labels in loader:
            images, labels = (t.to(self.device, non_blocking=True) for t in (images, labels))
            yield normalize(images.contiguous(memory_format=torch.channels_last)), labels

def make_synthetic(count, seed):
    """Gratings of 5 slopes and 2 periods, 10 classes. Phase, colour and mirroring are random:
    class means are alike, so that no linear model separates them."""
    generator = torch.Generator().manual_seed(seed)
    labels, line = torch.arange(count) % 10, torch.arange(32.0)
    angle = (labels % 5 * math.pi / 8)[:, None, None]
    frequency = 2 * math.pi / torch.where(labels < 5, 8.0, 4.0)[:, None, None]
    mirror, phase = torch.rand(2, count, 1, 1, generator=generator)
    x = torch.where(mirror < 0.5, line, -line)  # [N, 1, 32]
    along = x * angle.cos() + line[:, None] * angle.sin()  # [N, 32, 32]
    wave = (frequency * along + 2 * math.pi * phase).sin()
    colour, light = torch.rand(2, count, 1, 1, 3, generator=generator) - 0.5
    noise = torch.randn(count, 32, 32, 3, generator=generator)
    images = 128 + 120 * colour * wave[..., None] + 60 * light + 40 * noise  # [N, 32, 32, 3]
    return images.clamp(0, 255).byte(), labels

def load_cifar(name, root):
    """torchvision's CIFAR, downloaded on first use: pairs of uint8 images and labels, classes."""
    from torchvision import datasets
    kind = getattr(datasets, name.upper())
    with contextlib.redirect_stdout(io.StringIO()), errors_as(
            f"{name} is not in {root} and could not be downloaded ({{}}): put the folder "
            f"{kind.base_folder} of {kind.filename} into {root}, or use --data synthetic"):
        splits = [kind(root, train, download=True) for train in (True, False)]
    pairs = [(torch.from_numpy(split.data), torch.tensor(split.targets)) for split in splits]
    return pairs, splits[0].classes

def read_image(path):
    """The RGB image of a file."""
    from PIL import Image
    with errors_as(f"cannot read the image {path}: {{}}; replace or remove it"):
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # converting them would clip the values
                raise ValueError(f"it has mode {image.mode}, not 8 bits per channel")
            return image.convert("RGB")

def open_folder(root):
    """torchvision's ImageFolder of a split."""
    from torchvision.datasets import ImageFolder
    base = root.parent
    with errors_as(f"{root}: {{}}. Put the images into {base}/train/CLASS/ and {base}/val/CLASS/ "
                   f"(python tools/split.py {base} makes a test/)", OSError):  # also without images
        return ImageFolder(root, loader=read_image)

def open_folders(root):
    """The ImageFolders root/train and root/test or, where that has no classes, root/val."""
    train = open_folder(root / "train")
    has_test = any(path.is_dir() for path in (root / "test").glob("*"))
    test = open_folder(root / ("test" if has_test else "val"))
    odd = sorted(set(train.classes) ^ set(test.classes))
    require(not odd, f"{train.root} and {test.root} must have the same class folders; only one has "
            f"{', '.join(odd)[:80]}")
    require(len(train.classes) > 1, f"{train.root} has one class only; give two or more")
    return train, test

def read_all(folder, size, workers):
    """All images of a folder, resized: uint8 [N, size, size, 3], and their labels [N]."""
    folder.transform = test_transform(size)
    loader = torch.utils.data.DataLoader(folder, 500, num_workers=workers,
                                         generator=torch.Generator())
    labels = torch.tensor(folder.targets)  # [N]
    images = torch.empty(len(labels), size, size, 3, dtype=torch.uint8)
    for part, (batch, _) in zip(images.split(500), loader):
        part.copy_(batch.permute(0, 2, 3, 1))  # out of the workers' memory, which is scarce
    return images, labels

@functools.lru_cache(maxsize=1)
def load_data(name, root, image_size, device, workers):
    """The Data of --data; raises TASError for what is missing, empty, unreadable, inconsistent."""
    if name in ("imagenet", "folder"):
        folders = open_folders(Path(root))
        classes = folders[0].classes
        if image_size > LARGEST_IN_MEMORY:
            return Data(*[LargeImages(f, image_size, device, workers) for f in folders], classes)
        splits = [read_all(folder, image_size, workers) for folder in folders]
    elif image_size != CIFAR_SIZE:
        raise TASError(f"{name} has images of 32 pixels, not {image_size}; give --image-size 32")
    elif name == "synthetic":
        splits = [make_synthetic(count, seed) for count, seed in zip(SYNTHETIC_IMAGES, (1, 2))]
        classes = list("0123456789")
    else:
        splits, classes = load_cifar(name, root)
    return Data(*[SmallImages(images, labels, device) for images, labels in splits], classes)

# ---- Training and search ------------------------------------------------------------------------

def autocast(args):
    """bf16 for convolutions and matrix products; statistics, losses and optimisers stay fp32."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16")

def to_device(net, args):
    """Move a network to the device, in the memory format that convolutions like."""
    return net.to(args.device, memory_format=torch.channels_last)

def average_over_processes(tensors):
    """Average tensors over all processes, in place, where there are several."""
    if torch.distributed.is_initialized():
        flat = torch.cat([t.reshape(-1) for t in tensors])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for t, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(mean.view(t.shape))

def sgd(weights, args):
    """The optimiser of all weights."""
    return torch.optim.SGD(weights, args.lr, MOMENTUM, weight_decay=args.weight_decay,
                           nesterov=True, fused=True)

def set_learning_rate(optimizer, step, steps, warmup, highest):
    """Set a step's: a linear rise in the first `warmup` of all `steps`, then a cosine to 0."""
    share = (step - warmup) / (steps - warmup)
    factor = min(1, (step + 1) / warmup) if step < warmup else 0.5 * (1 + math.cos(math.pi * share))
    optimizer.param_groups[0]["lr"] = highest * factor

def gumbel_temperature(epoch, epochs, start=TAU_START, end=TAU_END):
    """Gumbel temperature tau of an epoch, linear over the epochs."""
    return start + (end - start) * epoch / max(1, epochs - 1)

def training_loss(args, net, teacher, x, y):
    """Returns what is minimised, the loss that is reported, and the logits [N, classes], of a batch
    x [N, 3, H, W], y [N], under a teacher if there is one."""
    with autocast(args):
        logits = net(x).float()
        teacher_logits = teacher(x).float() if teacher else None
    if teacher:
        _, distil = TRANSFERS[args.transfer]
        loss = distil(logits, teacher_logits, y, args.kd_weight, args.kd_temperature)
    else:
        loss = F.cross_entropy(logits, y)
    return loss, loss, logits

def search_loss(args, net, tau, x, y):
    """As training_loss, of a SuperResNet without a teacher, under a new sample of sizes: one for
    all processes, whose random states are alike."""
    sample = sample_sizes(net.alpha, net.beta, tau, args.num_samples, args.sampler == "gumbel")
    with autocast(args):
        logits = net(x, sample).float()
    loss = F.cross_entropy(logits, y)
    return loss, loss, logits

def architecture_loss(args, net, tau, target, x, y):
    """As search_loss; the cost loss is added to what is minimised."""
    loss, _, logits = search_loss(args, net, tau, x, y)
    p, q = net.probabilities()
    expected, actual = expected_macs(net.space, p, q), argmax_macs(net.space, p, q)
    cost = cost_loss(expected, actual, target, args.tolerance).float()
    return loss + args.cost_weight * cost, loss, logits

def take_step(args, net, optimizer, loss_function, *inputs):
    """One step of an optimiser down a loss(args, net, *inputs), whose last inputs are a batch x, y.
    Returns the reported loss and the accuracy in %, a tensor [2] on the device."""
    parameters = optimizer.param_groups[0]["params"]
    net.requires_grad_(False)  # saves the gradients, and what they need, of all that is not stepped
    for parameter in parameters:
        parameter.requires_grad_(True)
    minimised, loss, logits = loss_function(args, net, *inputs)
    optimizer.zero_grad()
    minimised.backward(inputs=parameters)
    average_over_processes([p.grad for p in parameters])
    optimizer.step()
    accuracy = 100 * (logits.argmax(1) == inputs[-1]).double().mean()
    return torch.stack([loss.detach().double(), accuracy])

def mean_of_steps(run, epoch, seen):
    """Metrics of an epoch: means over its steps and all processes; TASError if not finite."""
    names = "train_loss", "train_accuracy", "val_loss", "val_accuracy"  # a training has two
    values = torch.stack(seen)  # [steps, 2], of a search [steps, 4]
    average_over_processes([values])
    for step, finite in enumerate(values[:, ::2].isfinite().all(1).tolist(), 1):
        require(finite, f"{run.path}: the loss is not finite in epoch {epoch + 1}, step {step}, "
                f"with --lr {run.args.lr:g}; lower --lr and choose another --out")
    return dict(zip(names, values.mean(0).tolist()))

def resources(args, optimizer, images, start):
    """Metrics of an epoch: its last learning rate, speed, highest memory of the GPU or process."""
    import resource
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    if args.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 1e6
    return {"lr": optimizer.param_groups[0]["lr"], "images_per_second": round(images / seconds, 1),
            "memory_mb": round(memory, 1), "seconds": round(seconds, 2)}

def shuffled_batches(split, indices, args):
    """Augmented batches of these images of a split, in a new order."""
    order = indices[torch.randperm(len(indices))]
    return split.batches(order, args.batch_size, True, args.rank, args.world)

@torch.no_grad()
def evaluate(net, split, args):
    """Top-1 and top-5 accuracy in % on a split, each process on its share."""
    net.eval()
    order, right = torch.arange(len(split.labels)), torch.zeros(5, device=args.device)
    for x, y in split.batches(order[args.rank::args.world], args.batch_size, False):
        with autocast(args):
            logits = net(x)  # [N, classes]
        best = logits.topk(min(5, logits.shape[1])).indices  # [N, 5]
        right[:best.shape[1]] += (best == y[:, None]).sum(0)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(right)
    return 100 * right[0].item() / len(order), 100 * right.sum().item() / len(order)

def pad_channels(net):
    """Widen every layer of `net` to multiples of CHANNEL_MULTIPLE with zeros, which processors like
    and training keeps (all their gradients are 0): the function is unchanged. `inherit_weights`
    takes the channels back out."""
    for name, tensor in net.state_dict(keep_vars=True).items():
        size = [math.ceil(n / CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE for n in tensor.shape[:2]]
        if name == "conv1.weight":
            size[1] = 3  # colours
        elif name.startswith("fc."):
            size[0] = len(tensor)  # classes
        padded = tensor.new_zeros([*size, *tensor.shape[2:]])
        padded[tuple(map(slice, tensor.shape))] = tensor.detach()
        tensor.data = padded
    return net

def train(run, data, net, teacher=None):
    """Train any network, unpruned or pruned, on all training images. Returns the metrics."""
    args = run.args
    everything = torch.arange(len(data.train.labels))
    steps = len(everything) // args.batch_size  # an epoch
    warmup = steps * min(WARMUP_EPOCHS, WARMUP_SHARE * args.epochs)
    to_device(pad_channels(net), args)
    if teacher:
        to_device(teacher, args).eval().requires_grad_(False)
    optimizer = sgd(net.parameters(), args)
    state = {"net": net, "optimizer": optimizer}
    metrics = run.resume(state)

    for epoch in range(len(metrics), args.epochs):
        start, seen = time.perf_counter(), []
        net.train()
        batches = shuffled_batches(data.train, everything, args)
        for i, batch in run.steps(epoch, steps, batches, seen):
            set_learning_rate(optimizer, i, args.epochs * steps, warmup, args.lr)
            seen.append(take_step(args, net, optimizer, training_loss, teacher, *batch))
        average_over_processes([b for b in net.buffers() if b.is_floating_point()])
        means = mean_of_steps(run, epoch, seen)
        top1, top5 = evaluate(net, data.test, args)
        top5 = {"test_top5": top5} if len(data.classes) > TOP5_CLASSES else {}
        metrics.append({"epoch": epoch + 1, **means, "test_accuracy": top1, **top5,
                        **resources(args, optimizer, steps * args.batch_size, start)})
        run.save(state, metrics)
    return metrics

def search(run, data, space, target):
    """Search the sizes of a space under a target in MACs (paper: the search). Every step trains the
    weights on a batch of one half of the training images, then alpha and beta on a batch of the
    other half, each under a sample of sizes of its own. Returns the Shape and the metrics."""
    args = run.args
    net = to_device(SuperResNet(space.to(args.device), args.align), args)
    halves = split_halves(data.train.labels, args.seed)
    steps = len(halves[1]) // args.batch_size  # an epoch
    weights = [p for p in net.parameters() if p is not net.alpha and p is not net.beta]
    optimizer = sgd(weights, args)
    arch_optimizer = torch.optim.Adam([net.alpha, net.beta], args.arch_lr, betas=ARCH_BETAS,
                                      weight_decay=ARCH_WEIGHT_DECAY, fused=True)
    tau = torch.zeros((), device=args.device)  # a tensor, so that all steps are one graph
    state = {"net": net, "optimizer": optimizer, "arch_optimizer": arch_optimizer}
    metrics = run.resume(state)

    for epoch in range(len(metrics), args.epochs):
        start, seen = time.perf_counter(), []
        temperature = gumbel_temperature(epoch, args.epochs, args.tau_start, args.tau_end)
        tau.fill_(temperature)
        batches = [shuffled_batches(data.train, half, args) for half in halves]
        for i, (batch, arch_batch) in run.steps(epoch, steps, zip(*batches), seen):
            set_learning_rate(optimizer, i, args.epochs * steps, 0, args.lr)
            weights_seen = take_step(args, net, optimizer, search_loss, tau, *batch)
            sizes_seen = take_step(args, net, arch_optimizer, architecture_loss, tau, target,
                                   *arch_batch)
            seen.append(torch.cat([weights_seen, sizes_seen]))  # [4]
        means = mean_of_steps(run, epoch, seen)
        metrics.append({"epoch": epoch + 1, **means, "tau": temperature, **measure_sizes(net),
                        **resources(args, optimizer, 2 * steps * args.batch_size, start)})
        run.save(state, metrics)
    return extract(space, net.alpha, net.beta, target, args.tolerance), metrics

@torch.no_grad()
def measure_sizes(net):
    """MACs, and how decided alpha and beta are: top minus second probability, a mean over the sizes
    that have a choice."""
    def discrepancy(probabilities, present):
        rows = probabilities.double()[present.sum(1) > 1]  # [sizes, candidates]
        if len(rows) == 0:
            return 0.0
        first, second = rows.topk(2).values.T
        return float((first - second).mean())

    p, q = net.probabilities()
    return {"expected_macs": float(expected_macs(net.space, p, q)),
            "argmax_macs": float(argmax_macs(net.space, p, q)),
            "width_discrepancy": discrepancy(p, net.space.has_width),
            "depth_discrepancy": discrepancy(q, net.space.has_depth)}

# ---- Runs ---------------------------------------------------------------------------------------

def is_first():
    """Whether this process is the one, of those of torchrun, that writes and prints."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0

def wait_for_all():
    """Wait until every process is here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()

def write_file(path, content):
    """Write bytes, in the first process alone: the file is the old or the new one, never half."""
    if not is_first():
        return
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    with errors_as(f"cannot write {path}: {{}}; free space or choose another --out", OSError):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

def read_json(path):
    """The object in a JSON file."""
    with errors_as(f"cannot read {path} ({{}}); it must hold one JSON object"):
        return {**json.loads(Path(path).read_text())}  # a TypeError of what is no object

def save_tensors(path, state):
    """torch.save, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getbuffer())

def load_tensors(path):
    """A dict saved by torch.save, on the CPU; nothing in the file is executed."""
    with errors_as(f"{path} is missing, damaged or foreign; delete it or use another"):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not compare checksums
                raise ValueError
        return {**torch.load(path, map_location="cpu", weights_only=True)}

# The arguments that decide the result: of every run, of a training, of a search.
SETTINGS = ("command", "data", "image_size", "epochs", "batch_size", "lr", "weight_decay", "seed",
            "precision", "world")
TRAIN_SETTINGS = "transfer", "kd_weight", "kd_temperature"
SEARCH_SETTINGS = ("arch", "search", "method", "num_samples", "sampler", "align", "round",
                   "tolerance", "arch_lr", "cost_weight", "tau_start", "tau_end")

def require_new(path):
    """TASError unless a run may begin in this directory."""
    stray = [file for file in path.glob("*") if file.suffix != ".tmp"]
    require(not stray and not path.is_file(),
            f"{path} exists and is no run directory; choose another --out")

class Run:
    """The directory --out of a command: run.json (settings, versions, command and, when finished,
    the result), metrics.jsonl (a line an epoch) and last.ckpt (the state after the last finished
    epoch). The settings are what determines the result, but for the images themselves; a run with
    other settings is refused."""

    bar = None  # on the terminal, of the run that goes on in this process

    def __init__(self, args, data, step, names, **settings):
        self.path, self.args = Path(args.out or base_directory(args) / step), args
        self.settings = {name: getattr(args, name) for name in (*SETTINGS, *names)} | settings | {
            "images": f"{len(data.train.labels)} + {len(data.test.labels)} images, "
                      f"{len(data.classes)} classes",
            "class_names": data.classes}
        self.info = {
            "command": args.line, "settings": self.settings, "machine": machine(args.device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "precision": native_precision(args)}
        if (self.path / "run.json").exists():
            old = read_json(self.path / "run.json")
            self.compare("run.json", old.get("settings"))
            self.info |= old
        elif is_first():
            require_new(self.path)
            self.update()
        args.precision = self.info["precision"]
        Run.bar, self.last = None, ""
        wait_for_all()  # nobody writes a result before all have looked for one

    def compare(self, name, old):
        """TASError unless the settings in a file of the run, `old`, are those of this command."""
        path, odd = self.path / name, []
        require(isinstance(old, dict), f"{path} has no settings; choose another --out")
        for key in old | self.settings:
            before, now = (d.get(key, "not recorded") for d in (old, self.settings))
            if before != now:
                odd.append(f"{key} was {str(before)[:60]}, now {str(now)[:60]}")
        kept = "; prune keeps its teacher with --teacher DIR" if "target" in old else ""
        require(not odd, f"{path} has other settings ({'; '.join(odd)}); choose another --out, or "
                f"the old settings{kept}")

    def update(self, **entries):
        self.info |= entries
        write_file(self.path / "run.json", json.dumps(self.info, indent=1).encode() + b"\n")

    def resume(self, parts):
        """Restore `parts` and the random state; returns the metrics of the finished epochs."""
        path = self.path / "last.ckpt"
        if not path.exists():
            return []
        state = load_tensors(path)
        with errors_as(f"{path} does not fit this network ({{}}); delete it to start anew, or "
                       "choose another --out"):
            self.compare("last.ckpt", state["settings"])
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])
            torch.set_rng_state(state["rng"])
            if len(state["cuda_rng"]) and self.args.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"])
            return state["metrics"]

    def steps(self, epoch, count, batches, seen):
        """Pairs (number of the step in the whole run, batch) of an epoch of `count` steps; shows
        them as a bar on a terminal, with what the last one put into `seen`."""
        from tqdm import tqdm
        Run.bar = self.bar or tqdm(
            total=count * self.args.epochs, initial=count * epoch, unit="step", dynamic_ncols=True,
            disable=self.args.quiet or not is_first() or None)  # None: without a terminal
        self.bar.set_description(f"{self.path.name}, epoch {epoch + 1} of {self.args.epochs}")
        # The numbers first: no batch is made that nobody takes.
        for i, batch in zip(range(count * epoch, count * (epoch + 1)), batches):
            yield i, batch
            if not self.bar.disable and len(seen) % BAR_STEPS == 1:
                *_, loss, accuracy = seen[-1].tolist()  # waits for the device
                self.bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1f}%{self.last}")
            self.bar.update()

    def save(self, parts, metrics):
        """Write metrics.jsonl and last.ckpt; show the last epoch."""
        lines = "".join(json.dumps(line) + "\n" for line in metrics)
        write_file(self.path / "metrics.jsonl", lines.encode())
        save_tensors(self.path / "last.ckpt", {
            "settings": self.settings, "metrics": metrics, "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.args.device.type == "cuda" else [],
            "parts": {name: part.state_dict() for name, part in parts.items()}})
        line = metrics[-1]
        if "target" in self.settings:
            share = line["argmax_macs"] / self.settings["target"]
            reached = f"{self.settings['unit']} {share:.1%} of the target"
        else:
            reached = f"test accuracy {line['test_accuracy']:.1f}%"
        self.last = (f", {reached}, lr {line['lr']:.3g}, {line['images_per_second']:.0f} images/s, "
                     f"{line['memory_mb']:.0f} MB")
        if self.bar.disable and not self.args.quiet:
            values = [f"{name} {value:.5g}" for name, value in line.items() if name != "epoch"]
            minutes = line["seconds"] * (self.args.epochs - line["epoch"]) / 60
            print(f"{self.path.name} {line['epoch']}/{self.args.epochs}: {', '.join(values)}, "
                  f"{minutes:.0f} min left")

    def finish(self, final, metrics, **result):
        """Write the final Shape and the result."""
        close_bar()
        if is_first():
            for left in self.path.glob("*.tmp"):  # by a killed process
                left.unlink()
        final.save(self.path / "shape.json")
        self.update(result={
            **result, "macs": count_macs(final), "params": count_params(final),
            "full_macs": count_macs(final.full),
            "seconds": round(sum(line["seconds"] for line in metrics), 1)})
        wait_for_all()  # the next step of `prune` reads these files

def close_bar():
    """Leave the bar as it is, so that what is printed begins a line of its own."""
    if Run.bar:
        Run.bar.close()

def machine(device):
    """Name of the GPU, or of the processor and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = getattr(torch.cpu, "get_capabilities", dict)()
    return f"{processor.get('cpu_name', platform.machine())}, {torch.get_num_threads()} threads"

def native_precision(args):
    """--precision or, for auto, bf16 where the device computes it natively, else fp32."""
    if args.precision != "auto":
        return args.precision
    if args.device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        processor = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.8 has none
        native = processor.get("avx512_bf16") or processor.get("amx_bf16")
    return "bf16" if native else "fp32"

def read_run(path):
    """What the run.json says of a directory, or of the one that a file is in; {} without one."""
    file = Path(path if os.path.isdir(path) else Path(path).parent, "run.json")
    info = read_json(file) if file.exists() else {}
    for name in ("settings", "result"):
        require(isinstance(info.get(name, {}), dict), f"{file} has no sound {name}; move it away")
    return info

def load(directory):
    """The trained network, in eval mode, of a run directory of `train`."""
    weights = Path(directory, "weights.pt")
    require(weights.exists(), f"{directory} has no weights.pt; give the directory of a finished "
            "train, or make one with tools/weights.py")
    net = ResNet(Shape.load(directory)).eval()
    with errors_as(f"{weights} does not fit the shape.json beside it"):
        net.load_state_dict(load_tensors(weights))
    return net

# ---- Commands -----------------------------------------------------------------------------------

def setup(args):
    """Fill in the device and the place among the processes of torchrun; set the seed."""
    args.rank = int(os.environ.get("RANK", 0))
    args.world = int(os.environ.get("WORLD_SIZE", 1))
    require(args.batch_size % args.world == 0, f"--batch-size {args.batch_size} must be a multiple "
            f"of the {args.world} processes")
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    with errors_as(f"--device {args.device}: {{}}; use cpu or leave it out"):
        args.device = torch.device(auto if args.device == "auto" else args.device)
        if args.device.type == "cuda":
            local = os.environ.get("LOCAL_RANK", args.device.index or 0)
            args.device = torch.device("cuda", int(local))
            torch.cuda.set_device(args.device)
            torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions have it
        torch.zeros(1, device=args.device).double().item()  # fails where it cannot compute
    started = torch.distributed.is_torchelastic_launched() or args.world > 1
    if started and not torch.distributed.is_initialized():
        patience = datetime.timedelta(hours=12)  # of those that wait for one that reads images
        if args.device.type == "cuda":
            torch.distributed.init_process_group("nccl", timeout=patience, device_id=args.device)
        else:
            torch.distributed.init_process_group("gloo", timeout=patience)
    if not is_first():  # one process speaks for all
        sys.stdout = open(os.devnull, "w")
    torch.backends.cudnn.benchmark = True
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no mallopt
        # It keeps freed memory: on a CPU a search step is a tenth to a sixth faster.
        ctypes.CDLL(None).mallopt(-3, 1 << 25)  # glibc's M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
    torch.manual_seed(args.seed)

def open_data(args, shape=None):
    """The Data of a command, after setup. A given Shape stands in for --arch and --image-size; the
    defaults that depend on the images are filled in."""
    if shape:
        args.arch, args.image_size = args.arch or shape.arch, args.image_size or shape.image_size
    require(args.arch, "--arch is missing, such as --arch resnet56")
    setup(args)
    small = ARCHS[args.arch].small if args.data == "folder" else args.data != "imagenet"
    args.image_size = args.image_size or (CIFAR_SIZE if small else IMAGENET_SIZE)
    large = args.image_size > LARGEST_IN_MEMORY
    usual = SEARCH_EPOCHS if args.command == "search" else TRAIN_EPOCHS
    args.epochs = args.epochs or (LARGE_EPOCHS if large else usual)
    if args.weight_decay is None:
        args.weight_decay = LARGE_WEIGHT_DECAY if large else WEIGHT_DECAY
    if not is_first():  # the first process downloads what is missing
        wait_for_all()
    data = load_data(args.data, args.data_dir, args.image_size, args.device, args.workers)
    if is_first():
        wait_for_all()
    if not large and not ARCHS[args.arch].small:
        warn(f"{args.arch} is for images above {LARGEST_IN_MEMORY} pixels; try resnet56 here")
    images = len(data.train.labels)
    if args.command == "search" and args.method == "tas":
        images //= 2  # a batch is of one half
    require(args.command == "eval" or args.world < args.batch_size <= images,
            f"--batch-size {args.batch_size}: give each process 2 images to normalise, and at most "
            f"{images} to all, the training images or a half of the search")
    return data

def base_directory(args):
    """Where the runs of a data set and an arch are by default."""
    name = Path(args.data_dir).resolve().name if args.data == "folder" else args.data
    return Path("runs") / f"{name}-{args.arch}"

def parse_target(text, space):
    """The cost that --flops means: 0.47 of the unpruned network's, 59.5M or, of a table, 3.5ms."""
    full, value = space.cost_of(space.full), math.nan
    units = {"K": 1e3, "M": 1e6, "G": 1e9} if space.unit == "MACs" else {space.unit: 1}
    for unit, size in {"": full, **units}.items():
        if text.upper().endswith(unit.upper()):
            with contextlib.suppress(ValueError):
                value = float(text[:len(text) - len(unit)]) * size
    require(1e-9 * full < value <= full, f"--flops {text}: give a fraction of the unpruned "
            f"network such as 0.5, or a number with {', '.join(units)}, up to {space.show(full)}")
    return max(1, round(value)) if space.unit == "MACs" else value

def summary(shape):
    """MACs and parameters of a Shape in words."""
    macs, full = count_macs(shape), count_macs(shape.full)
    return (f"{macs / 1e6:.2f}M MACs ({macs / full:.1%} of the unpruned), "
            f"{count_params(shape) / 1e6:.3f}M parameters")

def print_result(args, text, program, *words):
    """Print what a command made and, unless more of `prune` follows, the next command."""
    print(text)
    if program.startswith("tas.py"):
        words = ("--data", args.data, "--data-dir", args.data_dir, "--image-size", args.image_size,
                 *words)
    if not args.more:
        print(f"next: python {program} {shlex.join(map(str, words))}")

def trained_classes(path, data):
    """Names of the classes of the network of a directory; those of the data where none are told."""
    return read_run(path).get("result", {}).get("classes", data.classes)

def require_classes(path, net, data):
    """TASError unless the data has the classes that the network of a directory was trained on."""
    classes = trained_classes(path, data)
    require(len(data.classes) == net.shape.num_classes and classes == data.classes,
            f"{path} was trained on {net.shape.num_classes} classes, {str(classes)[:100]}; "
            f"the data has {len(data.classes)}, {str(data.classes)[:100]}; choose another one")

def load_teacher(args, shape, data):
    """The trained unpruned network of --teacher, which is to guide `shape`."""
    net = load(args.teacher)
    require(net.shape == net.shape.full and net.shape.arch == shape.arch,
            f"--teacher {args.teacher} is {net.shape.arch} with {summary(net.shape)}; give an "
            f"unpruned network, {shape.arch}")
    require_classes(args.teacher, net, data)
    return net

def measure_teacher(args, data, teacher):
    """Print and return the teacher's accuracy in % on the test images; warn near chance."""
    args = argparse.Namespace(**{**vars(args), "precision": native_precision(args)})
    accuracy, _ = evaluate(to_device(teacher, args), data.test, args)
    print(f"teacher {args.teacher}: accuracy {accuracy:.2f}% on {len(data.test.labels):,} images")
    chance = 100 / len(data.classes)
    if accuracy < chance + (100 - chance) / 10:
        warn("the teacher is near chance; are these its classes, in its order, and its shortcuts?")
    return accuracy

def checksum(net):
    """A number that tells a network's parameters and buffers from others'; None without one."""
    if net is None:
        return None
    return zlib.crc32(b"".join(t.numpy().tobytes() for t in net.state_dict().values()))

def command_train(args):
    """Train the unpruned network of --arch, or the pruned one of --shape."""
    require(not args.init or not args.shape, "--init has a shape of its own; leave --shape out")
    args.transfer = args.transfer or ("kd" if args.teacher else "none")
    require(args.teacher or args.transfer == "none",
            f"--transfer {args.transfer} needs --teacher DIR, a trained unpruned network")
    start, given, found = None, None, {}
    if args.init:
        start = load(args.init)
        given = start.shape
    elif args.shape:
        given, found = Shape.load(args.shape), read_run(args.shape)
    data = open_data(args, given)
    full = Shape.unpruned(args.arch, len(data.classes), args.image_size)
    given = given or full
    shape = dataclasses.replace(given, num_classes=full.num_classes, image_size=full.image_size)
    words = "{0.arch} with num_classes {0.num_classes}, image_size {0.image_size}"
    require(shape.arch == full.arch and (start or shape == given),
            f"{args.init or args.shape} is {words.format(given)}; choose a {words.format(full)}")
    teacher = load_teacher(args, shape, data) if args.teacher else None
    run = Run(args, data, "teacher" if shape == full else "pruned", TRAIN_SETTINGS,
              shape=dataclasses.asdict(shape), teacher=checksum(teacher), init=checksum(start))
    if not run.info.get("result"):
        above = measure_teacher(args, data, teacher) if teacher else None
        torch.manual_seed(args.seed)
        net, (prepare, distil) = ResNet(shape), TRANSFERS[args.transfer]
        if start:
            if (start.shape.num_classes != shape.num_classes
                    or trained_classes(args.init, data) != data.classes):
                start.fc = net.fc  # a new classifier
            net.load_state_dict(start.state_dict())
        if prepare:
            prepare(net, teacher)
        metrics = train(run, data, net, teacher if distil else None)
        plain = inherit_weights(ResNet(shape), net)  # without the padded channels
        save_tensors(run.path / "weights.pt", plain.state_dict())
        run.finish(shape, metrics, accuracy=metrics[-1]["test_accuracy"],
                   top5=metrics[-1].get("test_top5"), classes=data.classes,
                   search=found.get("settings"), cost=found.get("result", {}).get("cost"),
                   teacher_accuracy=above)
    following = ["tools/export.py", run.path]
    if shape == full:
        following = ["tas.py search", "--arch", args.arch, "--flops", FLOPS]
    accuracy = run.info["result"]["accuracy"]
    print_result(args, f"{run.path}: {args.arch}, accuracy {accuracy:.2f}% on {args.data}, "
                 f"{summary(shape)}", *following)

def plan_search(args):
    """All that can go wrong before a search. Returns its Data, Space and target, and a Shape in the
    band: that of the methods that do not search, else only a proof that there is one."""
    data = open_data(args)
    space = Space(args.arch, len(data.classes), args.image_size, args.search, args.round)
    if args.cost:
        space.load_cost(args.cost)
    target = parse_target(args.flops, space)
    if args.method == "uniform":
        require(args.search == "both" and not args.cost,
                "--method uniform scales all widths to MACs; leave --search and --cost out")
        return data, space, target, scale_shape(space, target, args.tolerance, args.round)
    return data, space, target, draw_shape(space, target, args.tolerance)

def open_search(args, data, space, target):
    """The Run of a search, begun or to begin."""
    if args.arch_lr is None:
        steps = len(data.train.labels) // 2 // args.batch_size * args.epochs
        args.arch_lr = min(MOST_ARCH_LR, ARCH_LR * max(1, ARCH_STEPS / max(1, steps)))
    table = zlib.crc32(repr(space.cost.tolist()).encode()) if args.cost else None
    return Run(args, data, "search", SEARCH_SETTINGS, target=target, unit=space.unit, cost=table)

def command_search(args):
    """Search the sizes of --arch that meet --flops; leaves shape.json."""
    data, space, target, shape = plan_search(args)
    run = open_search(args, data, space, target)
    if not run.info.get("result"):
        metrics = []
        if args.method == "tas":
            torch.manual_seed(args.seed)
            shape, metrics = search(run, data, space, target)
        run.finish(shape, metrics, cost=space.cost_of(shape) if args.cost else None)
    shape = Shape.load(run.path)
    met = f"{space.show(space.cost_of(shape))}, " if args.cost else ""
    file, teacher = run.path / "shape.json", run.path.parent / "teacher"
    teacher = teacher if teacher.exists() else "DIR"
    print_result(args, f"{file}: {summary(shape)}; {met}target {space.show(target)}",
                 "tas.py train", "--shape", file, "--teacher", teacher)

def command_prune(args):
    """Train the teacher, search the sizes, distil the pruned network; finished parts are kept."""
    base, transfer = Path(args.out or base_directory(args)), args.transfer or "kd"
    trains_teacher = not args.teacher and transfer != "none"
    require(trains_teacher or not args.init,
            "--init is where the teacher starts; leave --teacher and --transfer none out")
    if args.init:
        shape = load(args.init).shape
        require(shape == shape.full, f"--init {args.init} is pruned; give an unpruned network")
        args.image_size = args.image_size or shape.image_size
    part = functools.partial(argparse.Namespace, **vars(args))  # these options, but for changes
    training = part(command="train", out=base / "teacher", shape=None, transfer="none",
                    epochs=args.teacher_epochs or args.epochs, more=True)
    searching = part(command="search", out=base / "search",
                     epochs=args.search_epochs or args.epochs, more=True)
    distilling = part(command="train", out=base / "pruned", shape=base / "search", init=None,
                      transfer=transfer, teacher=training.out if trains_teacher else args.teacher)
    # All that can go wrong, before hours of training. The teacher's directory comes first anyway.
    data, space, target, _ = plan_search(searching)
    if (searching.out / "run.json").exists():
        open_search(argparse.Namespace(**vars(searching)), data, space, target)  # only compares
    else:
        require_new(searching.out)
    if (distilling.out / "run.json").exists():
        for needed in [searching.out] + [training.out] * trains_teacher:
            require("result" in read_run(needed), f"{distilling.out} was begun without {needed}; "
                    "choose another --out")
    else:
        require_new(distilling.out)
    if trains_teacher:
        command_train(training)
    elif args.teacher:
        measure_teacher(searching, data, load_teacher(searching, space.full, data))
    command_search(searching)
    command_train(distilling)

def command_eval(args):
    """Accuracy of a trained network on the test images of --data."""
    net = load(args.dir)
    data = open_data(args, net.shape)
    require_classes(args.dir, net, data)
    if args.precision == "auto":  # as in the last epoch of the run
        args.precision = read_run(args.dir).get("precision", "auto")
    args.precision = native_precision(args)
    accuracy, top5 = evaluate(to_device(pad_channels(net), args), data.test, args)
    top5 = f" (top-5 {top5:.2f}%)" if len(data.classes) > TOP5_CLASSES else ""
    print_result(args, f"{args.dir}: accuracy {accuracy:.2f}%{top5} on {len(data.test.labels):,} "
                 f"images, {summary(net.shape)}", "tools/export.py", args.dir)

class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all others."""

    def error(self, message):
        raise TASError(f"{message}; see python {self.prog} --help")

def number(kind, low, high):
    """Argument type: an int or float from low to high."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} from {low} to {high}")
    return parse

class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the defaults, but for those that depend on other options."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)

def option_groups():
    """Parsers with the options of all commands, of those that train, of knowledge transfer, and of
    the search; each command has some of them."""
    data, training, transfer, search = (argparse.ArgumentParser(add_help=False) for _ in range(4))

    add = data.add_argument
    add("--data", required=True, choices=("cifar10", "cifar100", "imagenet", "folder", "synthetic"))
    add("--data-dir", default="data", help="where the data is, or goes")
    add("--image-size", type=number(int, 8, 1024), help="pixels, 32 or 224; up to 64: in memory")
    add("--workers", type=number(int, 0, 256), default=min(8, os.cpu_count()), help="read images")
    add("--batch-size", type=number(int, 1, 10 ** 6), default=BATCH_SIZE, help="of all processes")
    add("--seed", type=number(int, 0, 2 ** 62), default=0, help="of everything random")
    add("--device", default="auto", help="cpu, cuda, ...; auto: cuda where there is one")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="auto: bf16 where native; fp32: TF32 on CUDA")

    add = training.add_argument
    add("--arch", choices=ARCHS)
    add("--epochs", type=number(int, 1, 10 ** 5), help="300, search 600; above 64 pixels 120")
    add("--lr", type=number(float, 1e-9, 1e9), default=LR, help="of the weights, at its highest")
    add("--weight-decay", type=number(float, 0, 1), help="5e-4, of images above 64 pixels 1e-4")
    add("--out", help="where results go (runs/DATA-ARCH/STEP)")
    add("--quiet", action="store_true", help="print results only")

    add = transfer.add_argument
    add("--teacher", help="directory of the trained unpruned network")
    add("--init", help="directory of weights to start from")
    add("--transfer", choices=TRANSFERS, help="kd: distil; init: copy channels")
    add("--kd-weight", type=number(float, 0, 1), default=KD_WEIGHT, help="of the soft term")
    add("--kd-temperature", type=number(float, 0.01, 1000), default=KD_TEMPERATURE,
        help="of both networks")

    add = search.add_argument  # the paper's ablations among them
    add("--flops", "--budget", default=FLOPS, help="MACs: a fraction or 59.5M; with --cost 3.5ms")
    add("--cost", help="JSON of other costs than MACs")
    add("--tolerance", type=number(float, 0.001, 0.5), default=TOLERANCE, help="part of the target")
    add("--round", type=number(int, 1, 64), default=1, help="widths in multiples of this")
    add("--arch-lr", type=number(float, 1e-9, 1e9), help="1e-3; in short searches up to 0.05")
    add("--search", choices=("both", "width", "depth"), default="both", help="what is searched")
    add("--method", choices=("tas", "random", "uniform"), default="tas", help="uniform: scale all")
    add("--cost-weight", type=number(float, 0, 1e6), default=COST_WEIGHT, help="of the cost loss")
    add("--tau-start", type=number(float, 1e-3, 100), default=TAU_START, help="temperature")
    add("--tau-end", type=number(float, 1e-3, 100), default=TAU_END, help="temperature at the end")
    add("--num-samples", type=number(int, 1, 8), default=NUM_SAMPLES, help="candidates mixed")
    add("--sampler", choices=("gumbel", "softmax"), default="gumbel")
    add("--align", choices=("cwi", "pad"), default="cwi", help="unequal widths: interpolate or pad")
    return data, training, transfer, search

def build_parser():
    """The command line."""
    data, training, transfer, search = option_groups()
    parser = Parser(prog="tas.py", description="Prune ResNets by searching their size (TAS).",
                    allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(function, *parents):
        command = commands.add_parser(
            function.__name__.removeprefix("command_"), parents=parents, help=function.__doc__,
            description=function.__doc__, usage="%(prog)s [options]", allow_abbrev=False,
            formatter_class=functools.partial(Help, max_help_position=36))
        # The last three are options of all commands but eval; `prune` sets `more`.
        command.set_defaults(function=function, more=False, arch=None, epochs=None,
                             weight_decay=None)
        return command.add_argument

    add = add_command(command_train, training, transfer, data)
    add("--shape", help="shape.json of a pruned network, for --arch")
    add_command(command_search, training, search, data)
    add = add_command(command_prune, training, search, transfer, data)
    add("--teacher-epochs", type=number(int, 1, 10 ** 5), help="in the place of --epochs")
    add("--search-epochs", type=number(int, 1, 10 ** 5), help="in the place of --epochs")
    add = add_command(command_eval, data)
    add("dir", help="directory of a finished train")
    return parser

def complain(text, kind="error"):
    """One line on stderr; the exit status of what the user can fix."""
    close_bar()
    print(f"{kind}: {text}", file=sys.stderr)
    return 2

def warn(text):
    """One line on stderr, of the first process."""
    if is_first():
        complain(text, "warning")

def drop_output():
    """Where standard output takes no more, drop the rest, over which Python would stumble at its
    end."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

def main(argv=None):
    """Run a command; returns the exit status: 0, 2 for what the user can fix, 130 when stopped."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        with contextlib.suppress(AttributeError):  # a notebook's; a terminal may lack letters
            sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
        args = build_parser().parse_args(argv)
        for name, value in vars(args).items():  # of an unset variable
            require(value != "", f"{name.replace('_', '-')}: an empty value")
        args.line = shlex.join(["python", "tas.py", *argv])
        load_data.cache_clear()  # in a notebook, of files that may have changed
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        args.function(args)
    except TASError as error:  # its last part, when a worker process raised it
        return complain(str(error).rsplit("TASError: ", 1)[-1].strip())
    except OSError as error:  # of the disk, of standard output
        drop_output()
        reason = str(error).rsplit("\n", 1)[-1]  # the last line of a worker's
        return complain(f"{reason}; fix that, and the same command goes on")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        return complain(f"{error}; the same command goes on, with --workers 0 without workers")
    except KeyboardInterrupt:
        complain("the same command goes on after the last finished epoch", "stopped")
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0

if __name__ == "__main__":
    sys.exit(main())
