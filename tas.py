"""Network Pruning via Transformable Architecture Search (Dong and Yang, NeurIPS 2019), in one file.

    python tas.py train  --data cifar10 --arch resnet56                # the teacher, 300 epochs
    python tas.py search --data cifar10 --arch resnet56 --flops 0.47   # shape.json, 600 epochs
    python tas.py train  --data cifar10 --shape SHAPE --teacher DIR    # distil, 300 epochs
    python tas.py prune  --data cifar10 --arch resnet56 --flops 0.47   # all three, resumable

The pruned network meets the asked number of MACs within 5%, whatever the search found.
Search space: Space. Transformable network: SuperResNet. Channel-wise interpolation: cwi_matrix.
Gumbel-Softmax over sizes: sample_sizes. Expected cost: expected_macs. Cost loss: cost_loss.
Pruned size: extract. Knowledge distillation: kd_loss.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import functools
import io
import itertools
import json
import math
import os
import platform
import re
import signal
import statistics
import sys
import time
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

ABSENT = -1e4  # logit of a candidate that a row of alpha or beta does not have: probability 0

class TASError(ValueError):
    """A mistake that the user can mend: the message names the thing and the remedy."""

def require(condition, message):
    """TASError with the message unless the condition holds."""
    if not condition:
        raise TASError(message)

@contextlib.contextmanager
def explain(message, kind=Exception):
    """Turn errors of a kind into a TASError: `message`, with the reason in the place of {}."""
    try:
        yield
    except TASError:
        raise
    except kind as error:
        reason = (getattr(error, "strerror", None) or str(error)).strip().split("\n")[0][:120]
        raise TASError(message.replace("{}", reason)) from None

def nearest(word, options):
    """A hint such as " (did you mean resnet56?)", or "" when nothing is near."""
    near = difflib.get_close_matches(str(word), list(options), 1)
    return f" (did you mean {near[0]}?)" if near else ""

# ---- Shapes and their cost ----------------------------------------------------------------------

class Arch(NamedTuple):
    """An unpruned network. A block's stride is in its first 3x3 conv."""

    small: bool  # CIFAR: 3x3 stem, pooled shortcuts; else ImageNet: 7x7 stem, max pooling
    kernels: tuple  # kernel size of each conv of a block
    stages: list  # channels of the convs of every block

def _arch(*depths, bottleneck=False):
    channels = (16, 32, 64) if len(depths) == 3 else (64, 128, 256, 512)
    return Arch(len(depths) == 3, (1, 3, 1) if bottleneck else (3, 3), [
        [[c, c, 4 * c] if bottleneck else [c, c]] * n for c, n in zip(channels, depths)])

ARCHS = {"resnet20": _arch(3, 3, 3), "resnet32": _arch(5, 5, 5), "resnet44": _arch(7, 7, 7),
         "resnet56": _arch(9, 9, 9), "resnet110": _arch(18, 18, 18),
         "resnet164": _arch(18, 18, 18, bottleneck=True), "resnet18": _arch(2, 2, 2, 2),
         "resnet34": _arch(3, 4, 6, 3), "resnet50": _arch(3, 4, 6, 3, bottleneck=True),
         "resnet101": _arch(3, 4, 23, 3, bottleneck=True)}

def find_arch(name):
    """The Arch of that name; TASError with the nearest name when there is none."""
    require(isinstance(name, str) and name in ARCHS, f"unknown arch {str(name)[:40]!r}"
            f"{nearest(name, ARCHS)}; known: {', '.join(ARCHS)}")
    return ARCHS[name]

def _check(name, value, most, least=1):
    """TASError unless `value` is a whole number up to `most` or, where that is a list, a list of
    such, as long as it; only of the blocks of a stage, lists of numbers, there may be fewer."""
    if isinstance(most, int):
        what = f"a whole number from {least} to {most}"
        right = type(value) is int and least <= value <= most
    else:
        few = len(most) if isinstance(most[0], int) or isinstance(most[0][0], list) else 1
        what = f"a list of {few} to {len(most)} items"
        right = isinstance(value, (list, tuple)) and few <= len(value) <= len(most)
    if not right:  # some are too long to print
        found = "a huge one" if type(value) is int and abs(value) > 10 ** 40 else str(value)[:40]
        raise TASError(f"{name} must be {what}, not {found}")
    for i, part in enumerate(value if isinstance(most, list) else ()):
        _check(f"{name}[{i}]", part, most[i])

@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of one network. stem: channels of the first conv; stages[s][b]: channels of the
    convs of each kept block. TASError names the field that is no pruned size of `arch`."""

    arch: str
    num_classes: int
    image_size: int
    stem: int
    stages: list = dataclasses.field(hash=False)

    def __post_init__(self):
        stages = find_arch(self.arch).stages
        for name, most, least in (("num_classes", 25_000, 2), ("image_size", 1024, 8),
                                  ("stem", stages[0][0][0], 1), ("stages", stages, 1)):
            _check(name, getattr(self, name), most, least)
        object.__setattr__(self, "stages", [[list(w) for w in blocks] for blocks in self.stages])

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
        small, _, stages = find_arch(arch)
        return cls(arch, num_classes, image_size or (32 if small else 224), stages[0][0][0], stages)

    @classmethod
    def load(cls, path):
        """The Shape of a JSON file or run directory; TASError names what is wrong with it."""
        path = Path(path, "shape.json" if os.path.isdir(path) else "")
        fields = read_json(path)
        try:
            return cls(**fields)
        except (TASError, TypeError) as error:  # a wrong value; a missing or unknown field
            raise TASError(f"{path}: {str(error).replace('__init__() ', '')[:280]}") from None

    def save(self, path):
        """Write the Shape as JSON, whole or not at all."""
        write_file(path, json.dumps(dataclasses.asdict(self)).encode() + b"\n")

def _candidate_widths(channels, round_to):
    """The multiples of round_to that are nearest to C*k//10, k = 3..10, and C itself."""
    widths = {max(1, (channels * k // 10 + round_to // 2) // round_to) * round_to
              for k in range(3, 11)}
    return (*sorted(w for w in widths if w < channels), channels)

class Space:
    """What may be pruned of `full`, an unpruned Shape (paper: search space). widths[j]: candidate
    widths of conv j, in order; depths[s]: candidate numbers of blocks of stage s. `search` "width"
    or "depth" keeps the other full; round_to restricts widths to its multiples and the full one."""

    def __init__(self, arch, num_classes=10, image_size=None, search="both", round_to=1):
        full = Shape.unpruned(arch, num_classes, image_size)
        self._tabulate(
            full, [(c,) if search == "depth" else _candidate_widths(c, round_to)
                   for c in full.convs],
            [(n,) if search == "width" else (*range(1, n, 1 if n <= 3 else 2), n)
             for n in map(len, full.stages)])

    def _tabulate(self, full, widths, depths):
        """Tables of the cost function, float64: exact for whole numbers up to 2^53."""
        arch, half = ARCHS[full.arch], lambda size: -(-size // 2)
        self.full, self.widths, self.depths, self.n = full, widths, depths, len(arch.kernels)
        self.K, self.D = max(map(len, widths)), max(map(len, depths))
        self.starts = list(itertools.accumulate(map(len, full.stages), initial=0))  # first blocks
        size = full.image_size if arch.small else half(full.image_size)
        self.stem_cost = 3 * (9 if arch.small else 49) * size ** 2  # times the stem's channels
        size, table = size if arch.small else half(size), []  # max pooling
        for b in range(self.starts[-1]):
            before, size = size, half(size) if b in self.starts[1:] else size
            sides = [before if arch.kernels[:i + 1] == (1,) else size for i in range(self.n)]
            table.append([*[(k * side) ** 2 for k, side in zip(arch.kernels, sides)], size ** 2,
                          b not in self.starts[1:]])
        table = torch.tensor(table).double().T
        self.conv_cost = table[:-2]  # [n, blocks] times c_in c_out
        self.project_cost, self.free = table[-2:]  # [blocks]; free: none where the widths agree
        values = sorted(set(itertools.chain(*widths)))
        self.values = torch.tensor(values).double()  # [V] every width that occurs
        self.member = torch.zeros(len(widths), self.K, len(values)).double()
        for j, row in enumerate(widths):  # [convs, K, V] candidate k of conv j is width v
            self.member[j, range(len(row)), [values.index(c) for c in row]] = 1
        self.reach, self.leave = torch.zeros(2, len(depths), self.D, self.starts[-1]).double()
        for s, (row, start) in enumerate(zip(depths, self.starts)):  # [stages, D, blocks]
            for d, depth in enumerate(row):
                self.reach[s, d, start:start + depth] = 1  # depth d keeps these blocks,
                self.leave[s, d, start + depth - 1] = 1  # of which this is the last one
        self.first = torch.tensor(self.starts[1:-1])  # [stages - 1]

    def to(self, device):
        """Move the tables, once, so that the cost is computed where alpha and beta are."""
        if self.values.device != device:
            for name, value in vars(self).items():
                setattr(self, name, value.to(device) if isinstance(value, torch.Tensor) else value)
        return self

    def shape(self, width_index, depth_index):
        """The Shape of one candidate per conv and per stage; indices are sequences of int."""
        stem, *widths = [row[int(i)] for row, i in zip(self.widths, width_index)]
        blocks = list(zip(*[iter(widths)] * self.n))
        return dataclasses.replace(self.full, stem=stem, stages=[
            blocks[start:start + depths[int(i)]]
            for start, depths, i in zip(self.starts, self.depths, depth_index)])

def _block_macs(conv_cost, project_cost, c_in, widths, same):
    """MACs of a block: convs of `widths` after `c_in` channels, and its projection. `same` is
    c_in * c_out where the shortcut is the identity. Concrete widths or expectations alike."""
    macs = project_cost * (c_in * widths[-1] - same)
    for cost, c_out in zip(conv_cost, widths):
        macs = macs + cost * c_in * c_out
        c_in = c_out
    return macs

def expected_macs(space, p, q):
    """Expected MACs (multiply-accumulates, the paper's FLOPs) of a network with independent sizes
    (paper: expected cost), float64, 0-d. p [convs, K], q [stages, D]: width, depth probabilities;
    entries past a row's candidates are ignored. Of one-hot p and q: that network's MACs, exactly.
    """
    space.to(p.device)
    p, q, values = p.double(), q.double(), space.values
    dist = torch.einsum("ck,ckv->cv", p, space.member)  # [convs, V] P(width of conv = v)
    ends = dist[space.n::space.n]  # [blocks, V] output widths of blocks
    exits = torch.einsum("sd,sdb->sb", q, space.leave) @ ends  # [stages, V] of stages
    source = torch.cat([dist[:1], ends[:-1]]).index_copy(0, space.first, exits[:-1])  # [blocks, V]
    same = space.free * (source * ends @ values ** 2)  # E[c_in c_out 1(c_in = c_out)]
    macs = _block_macs(space.conv_cost, space.project_cost, source @ values,
                       (dist[1:] @ values).view(-1, space.n).T, same)  # [blocks]
    keep = torch.einsum("sd,sdb->b", q, space.reach)  # [blocks] P(block is kept)
    return (space.stem_cost * (dist[0] @ values) + keep @ macs
            + space.full.num_classes * (exits[-1] @ values))

def argmax_macs(space, p, q):
    """MACs of the most probable network, a 0-d tensor on the device of p and q."""
    def one_hot(t):  # F.one_hot would read its largest index, a host sync
        return torch.arange(t.shape[1], device=t.device) == t.argmax(-1, keepdim=True)
    return expected_macs(space, one_hot(p), one_hot(q))

def count_macs(shape):
    """MACs of one image, an int: of convs and the classifier; nothing else is counted."""
    space, ones = Space.__new__(Space), torch.ones(len(shape.convs), 1)  # of this Shape alone
    space._tabulate(shape, [[c] for c in shape.convs], [[len(s)] for s in shape.stages])
    return int(expected_macs(space, ones, ones[:len(shape.stages)]))

def count_params(shape):
    """Number of trainable parameters of `ResNet(shape)`."""
    with torch.device("meta"):
        return sum(p.numel() for p in ResNet(shape).parameters())

# ---- Networks -----------------------------------------------------------------------------------

def _conv(c_in, c_out, kernel, stride=1):
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)

def _init_convs(net):
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

def _strides(arch, stride):
    """Stride of each conv of a block, pooling and stride of its projection."""
    first = arch.kernels.index(3)
    pool = nn.AvgPool2d(2, ceil_mode=True) if arch.small and stride == 2 else nn.Identity()
    return [stride if i == first else 1 for i in range(len(arch.kernels))], pool, \
        1 if arch.small else stride

class Block(nn.Module):
    """Residual block, basic or bottleneck, with torchvision's names. [N, c_in, H, W] ->
    [N, widths[-1], H/stride, W/stride]."""

    def __init__(self, arch, c_in, widths, stride):
        super().__init__()
        strides, pool, last = _strides(arch, stride)
        for i, c in enumerate([c_in, *widths[:-1]]):
            self.add_module(f"conv{i + 1}", _conv(c, widths[i], arch.kernels[i], strides[i]))
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(widths[i]))
        self.n, self.pool, self.downsample = len(widths), nn.Identity(), nn.Identity()
        if stride == 2 or c_in != widths[-1]:
            self.pool, self.downsample = pool, nn.Sequential(
                _conv(c_in, widths[-1], 1, last), nn.BatchNorm2d(widths[-1]))

    def forward(self, x):
        y = x
        for i in range(1, self.n + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y if i == 1 else F.relu(y)))
        return F.relu(y + self.downsample(self.pool(x)))

class ResNet(nn.Module):
    """The network of a Shape, pruned or not. [N, 3, H, W] -> [N, classes]. Full ImageNet shapes
    take torchvision's state dicts and give its outputs."""

    def __init__(self, shape):
        super().__init__()
        arch, c = ARCHS[shape.arch], shape.stem
        self.shape = shape
        self.conv1 = _conv(3, c, *((3, 1) if arch.small else (7, 2)))
        self.bn1 = nn.BatchNorm2d(c)
        self.maxpool = nn.Identity() if arch.small else nn.MaxPool2d(3, 2, 1)
        for s, blocks in enumerate(shape.stages):
            layer = nn.Sequential()
            for b, widths in enumerate(blocks):
                layer.append(Block(arch, c, widths, 2 if s and not b else 1))
                c = widths[-1]
            self.add_module(f"layer{s + 1}", layer)
        self.fc = nn.Linear(c, shape.num_classes)
        _init_convs(self)

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))  # [N, stem, H, W]; ImageNet H/4, W/4
        for s in range(len(self.shape.stages)):
            x = getattr(self, f"layer{s + 1}")(x)  # [N, C_s, H/2^s, W/2^s]
        return self.fc(x.mean((2, 3)))  # [N, classes]

# ---- Transformable network ----------------------------------------------------------------------

def cwi_matrix(c_in, c_out, size=None, dtype=torch.float32):
    """Channel-wise interpolation (CWI) as a matrix [c_out, c_in]: row o averages the input
    channels floor(o c_in / c_out) ... ceil((o + 1) c_in / c_out) - 1, as adaptive pooling does.
    With `size` the widths are integer tensors [..., 1, 1] on a device, and the result is padded
    with zeros to [..., size, size], so that its shape does not depend on them."""
    device = c_in.device if isinstance(c_in, torch.Tensor) else None
    row = torch.arange(size or c_out, device=device)[:, None]  # [rows, 1]
    column = torch.arange(size or c_in, device=device)  # [columns]
    first, end = row * c_in // c_out, -((row + 1) * -c_in // c_out)
    inside = (column >= first) & (column < end) & (row < c_out)
    return inside.to(dtype) / (end - first)

def channel_wise_interpolation(x, c_out):
    """x [N, C, ...] -> [N, c_out, ...], each output channel the mean of its share of the inputs."""
    return torch.einsum("oc,nc...->no...", cwi_matrix(x.shape[1], c_out, dtype=x.dtype).to(x), x)

class Sample(NamedTuple):
    """One draw of sizes: what a forward pass of SuperResNet mixes."""

    index: torch.Tensor  # [convs, S] distinct candidate widths of every conv
    weight: torch.Tensor  # [convs, S] their weights, summing to 1
    depth: torch.Tensor  # [stages, D] weights of all candidate depths, summing to 1

def sample_sizes(alpha, beta, tau, num_samples=2, gumbel=True):
    """Gumbel-Softmax over sizes (paper: sampled sizes): a Sample, differentiable in the logits
    alpha [convs, K] and beta [stages, D]; tau > 0. z = (log p + g) / tau, where gumbel=False leaves
    g out (ablation); num_samples distinct candidates are drawn with probabilities softmax(z), which
    is what taking the largest of z plus a second Gumbel noise does. No host sync."""
    def noise(logits):
        return -torch.empty_like(logits).exponential_().log()

    def perturb(logits):
        logits = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        return (logits + noise(logits) if gumbel else logits) / tau

    z = perturb(alpha)  # [convs, K]
    drawn = z.detach() + noise(z.detach())
    index = drawn.topk(min(num_samples, alpha.shape[1])).indices  # [convs, S]
    return Sample(index, z.gather(1, index).softmax(-1), perturb(beta).softmax(-1))

class MixedConv(nn.Module):
    """A searched conv with its BNs: the weighted sum, over the sampled widths c_i, of
    CWI(BN_i(first c_i channels of conv(x)), largest c_i). Batch statistics are per channel, so the
    candidates differ in the affine part of their BN alone, and CWI is a matrix: one conv at full
    width, one normalisation and one C x C channel mix give the sum exactly, in fixed shapes."""

    def __init__(self, c_in, widths, kernel, stride, align):
        super().__init__()
        c = max(widths)
        self.conv, self.bn = _conv(c_in, c, kernel, stride), nn.BatchNorm2d(c, affine=False)
        self.align = align
        self.gamma = nn.Parameter(torch.ones(len(widths), c))  # [K, C] one affine per candidate
        self.beta = nn.Parameter(torch.zeros(len(widths), c))
        self.register_buffer("widths", torch.tensor(widths), persistent=False)

    def forward(self, x, index, weight):
        """x [N, c_in, H, W]; index, weight [S] -> y [N, C, H', W'], zero past its width m; and m
        as a 0-d tensor."""
        width = self.widths.index_select(0, index)[:, None, None]  # [S, 1, 1]
        m, x = width.max(), self.bn(self.conv(x))  # [N, C, H', W']
        t = cwi_matrix(width, m if self.align == "cwi" else width, self.gamma.shape[1],
                       self.gamma.dtype) * weight.to(self.gamma)[:, None, None]  # [S, C, C]
        mix = (t * self.gamma.index_select(0, index)[:, None]).sum(0)  # [C, C]
        bias = (t * self.beta.index_select(0, index)[:, None]).sum((0, 2))  # [C]
        return F.conv2d(x, mix[:, :, None, None], bias), m

class MixedBlock(nn.Module):
    """A residual block of searched convs. The projection shares the sample of the last conv."""

    def __init__(self, arch, c_in, widths, stride, align):
        super().__init__()
        strides, self.pool, last = _strides(arch, stride)
        self.convs, self.projection, c = nn.ModuleList(), None, c_in
        for kernel, candidates, stride_i in zip(arch.kernels, widths, strides):
            self.convs.append(MixedConv(c, candidates, kernel, stride_i, align))
            c = max(candidates)
        if stride == 2 or c_in != c:
            self.projection = MixedConv(c_in, widths[-1], 1, last, align)

    def forward(self, x, width, sizes):
        """x [N, C, H, W] of `width` channels, one (index, weight) per conv -> the same."""
        y = x
        for conv, size in zip(self.convs, sizes):
            y, m = conv(y if y is x else F.relu(y), *size)
        if self.projection is None:
            return F.relu(y + x), torch.maximum(m, width)
        return F.relu(y + self.projection(self.pool(x), *sizes[-1])[0]), m

class SuperResNet(nn.Module):
    """The unpruned network with every size a random variable (paper: transformable network), of
    logits alpha [convs, K] and beta [stages, D]. `forward(x, sample)`: [N, 3, H, W] -> [N, classes]
    without a host sync and in fixed shapes, so that a step compiles to one graph and costs the same
    for any number of sampled candidates. Widths are carried along as 0-d tensors; channels past a
    width are zeros, so zero-padding needs no code."""

    def __init__(self, space, align="cwi"):
        super().__init__()
        arch = ARCHS[space.full.arch]
        self.space, self.align = space, align
        # Candidates that a row lacks repeat its first width; their weight is 0.
        rows = iter([[*row, *row[:1] * (space.K - len(row))] for row in space.widths])
        self.stem = MixedConv(3, next(rows), *((3, 1) if arch.small else (7, 2)), align)
        self.maxpool = nn.Identity() if arch.small else nn.MaxPool2d(3, 2, 1)
        self.stages, c = nn.ModuleList(), space.full.stem
        for s, blocks in enumerate(space.full.stages):
            self.stages.append(nn.ModuleList())
            for b in range(len(blocks)):
                widths = list(itertools.islice(rows, space.n))
                self.stages[s].append(MixedBlock(arch, c, widths, 2 if s and not b else 1, align))
                c = max(widths[-1])
        self.fc = nn.Linear(c, space.full.num_classes)
        self.alpha, self.beta = (nn.Parameter((0.01 * torch.randn(table.shape[:2])).masked_fill(
            (table.sum(-1) == 0).cpu(), ABSENT)) for table in (space.member, space.reach))
        self.register_buffer("tau", torch.tensor(10.0))  # temperature of the search
        _init_convs(self)

    def probabilities(self):
        """p [convs, K] and q [stages, D]."""
        return self.alpha.softmax(-1), self.beta.softmax(-1)

    def forward(self, x, sample):
        sizes = list(zip(sample.index.unbind(), sample.weight.unbind()))
        x, width = self.stem(x, *sizes[0])  # [N, C, H, W]
        x, at = self.maxpool(F.relu(x)), 1
        for stage, depths, q_hat in zip(self.stages, self.space.depths, sample.depth.unbind()):
            outputs = []
            for b, block in enumerate(stage):
                x, width = block(x, width, sizes[at:at + self.space.n])
                at += self.space.n
                if b + 1 in depths:
                    outputs.append((x, width))
            # Sum over depths d of q_hat_d * CWI(output of block d, M). A stage's later blocks have
            # identity shortcuts, so its last output is the widest: M is its width.
            mixes = [q * cwi_matrix(m, width if self.align == "cwi" else m, x.shape[1], q.dtype)
                     for q, (_, m) in zip(q_hat.unbind(), outputs)]  # [C, C] each
            x = functools.reduce(torch.add, (
                F.conv2d(y, mix[:, :, None, None]) for mix, (y, _) in zip(mixes, outputs)))
        return self.fc(x.mean((2, 3)))  # [N, classes]

# ---- Search objective ---------------------------------------------------------------------------

def cost_loss(expected, actual, target, tolerance=0.05):
    """Paper's cost loss: log E[MACs] when the argmax network is too large, its negative when it is
    too small, 0 inside target (1 -+ tolerance). expected: 0-d tensor; actual, target: MACs."""
    expected = torch.as_tensor(expected)
    actual = torch.as_tensor(actual, device=expected.device)
    over, under = actual > (1 + tolerance) * target, actual < (1 - tolerance) * target
    return (over.to(expected) - under.to(expected)) * expected.log()

def extract(space, alpha, beta, target, tolerance=0.05):
    """The pruned network's Shape: the argmax one if its MACs lie in target (1 -+ tolerance), else
    one in that band such that no Shape in target (1 -+ tolerance/2) is more probable.
    alpha [convs, K], beta [stages, D]: logits, of which the convs of dropped blocks count with
    their most probable widths (so the argmax one is the most probable of all). TASError with the
    smallest and largest possible MACs when no Shape is in the band."""
    log_p, log_q = _log_rows(alpha, space.widths), _log_rows(beta, space.depths)
    shape = space.shape([row.argmax() for row in log_p], [row.argmax() for row in log_q])
    if abs(count_macs(shape) - target) <= tolerance * target:
        return shape
    log_p = [row - row.max() for row in log_p]  # convs of dropped blocks then count 0
    return _shape_in_band(space, log_p, log_q, target, tolerance, torch.maximum, torch.argmax)

def draw_shape(space, target, tolerance=0.05):
    """A random Shape: every size uniform among its candidates, given that the MACs are in the band
    (ablation). Uses the global random state of torch."""
    log_p, log_q = (_log_rows(torch.zeros(len(rows), max(map(len, rows))), rows)
                    for rows in (space.widths, space.depths))
    return _shape_in_band(space, log_p, log_q, target, tolerance, torch.logaddexp,
                          lambda scores: torch.multinomial(scores.softmax(0), 1)[0])

def scale_shape(space, target, tolerance=0.05, round_to=1):
    """All widths times one factor, depths kept, MACs nearest to the target (ablation)."""
    def scaled(factor):
        def width(c):
            return min(c, max(1, round(c * factor / round_to)) * round_to)
        return dataclasses.replace(space.full, stem=width(space.full.stem), stages=[
            [[width(c) for c in widths] for widths in blocks] for blocks in space.full.stages])

    shapes = {scaled(k / 512) for k in range(1, 513)}
    off, _, shape = min((abs(count_macs(s) - target), str(s), s) for s in shapes)
    require(off <= tolerance * target, f"no uniform width gives {target:,.0f} MACs within "
            f"{tolerance:.1%}; the nearest has {count_macs(shape):,}: choose another --flops")
    return shape

def _log_rows(logits, candidates):
    """Log-probabilities as a list of rows without absent candidates, float64 on the CPU."""
    logits = logits.detach().double().cpu()
    require(len(logits) == len(candidates) and not logits.isnan().any(),
            f"expected {len(candidates)} rows of logits without NaN; after a search, lower --lr")
    return [row[:len(c)].clamp(-1e9, 1e9).log_softmax(0) for row, c in zip(logits, candidates)]

def _layers(space, log_p):
    """(MACs, log-probability) of every choice of the chain stem, blocks, head: two tensors
    [A, ..., O] over input widths, inner widths and output widths."""
    space.to(torch.device("cpu"))
    n, widths = space.n, [torch.tensor(row).double() for row in space.widths]
    layers = [(space.stem_cost * widths[0][None], log_p[0][None])]
    for b in range(len(space.free)):
        convs = slice(n * b, n * b + n + 1)  # the previous block's last conv, then this block's
        c_in, *c = torch.meshgrid(*widths[convs], indexing="ij")
        same = space.free[b] * (c_in == c[-1]) * c_in * c[-1]
        logs = torch.meshgrid(log_p[n * b] * 0, *log_p[convs][1:], indexing="ij")
        layers.append((_block_macs(space.conv_cost[:, b], space.project_cost[b], c_in, c, same),
                       sum(logs)))
    head = widths[-1][:, None] * space.full.num_classes
    return [*layers, (head, head * 0)]

def _program(space, layers, log_q, cell, size, join, pick):
    """Dynamic program over the chain of layers. A state is (output width, MACs in cells); its
    value joins the scores of all ways to it. Returns the values [size] of whole networks, and a
    function that goes back from a cell of them to its Shape. join: torch.maximum, and pick
    argmax, for the best way; logaddexp and a draw for a random one."""
    layers = [((macs / cell).round().long(), scores) for macs, scores in layers]
    exits = {end: [(start + d, q) for d, q in zip(depths, row.tolist())] for start, end, depths, row
             in zip(space.starts, space.starts[1:], space.depths, log_q)}  # of each stage
    before, after = [], []  # states around each layer
    state = torch.zeros(1, size).double().log()  # nothing is reached ...
    state[0, 0] = 0  # ... but the input
    for i, (cells, scores) in enumerate(layers):
        new = torch.full((cells.shape[-1], size), -math.inf).double()  # [O, size]
        for old, *rows in zip(state, cells.flatten(1).tolist(), scores.flatten(1).tolist()):
            for o, (k, score) in enumerate(zip(*rows)):
                if k < size:
                    row = new[o % len(new), k:]
                    join(row, old[:size - k] + score, out=row)
        before.append(state)
        after.append(new)  # the stage may have ended at any of its depths
        state = functools.reduce(join, [after[j] + q for j, q in exits.get(i, [(i, 0.0)])])

    def back(cell):
        n, i, o = space.n, len(layers) - 1, 0
        width_index, depth_index = [0] * len(space.widths), []
        while True:
            cells, scores = (t[..., o] for t in layers[i])  # [A, ...]
            left = (cell - cells).reshape(len(cells), -1)  # [A, M]
            value = before[i].gather(1, left.clamp(min=0)) + scores.reshape(left.shape)
            way = pick(value.masked_fill(left < 0, -math.inf).flatten())
            cell, (o, *inner) = int(left.flatten()[way]), torch.unravel_index(way, cells.shape)
            if i == 0:
                return space.shape(width_index, depth_index[::-1])
            width_index[n * (i - 1) + 1:n * i] = inner or width_index[n * (i - 1) + 1:n * i]
            i -= 1
            if i in exits:
                depth_index.append(int(pick(torch.stack([after[j][o, cell] + q
                                                         for j, q in exits[i]]))))
                i = exits[i][depth_index[-1]][0]
            width_index[n * i] = o

    return state[0], back

def _shape_in_band(space, log_p, log_q, target, tolerance, join, pick):
    """The most probable Shape in the band, or a drawn one. All roundings of a path to cells stay
    below a quarter of the band's half-width, and only cells whose paths must lie in the band are
    looked at. Smaller cells serve spaces with few Shapes."""
    layers, free = _layers(space, log_p), [row * 0 for row in log_q]
    (least, smallest), (most, largest) = [
        _program(space, [(macs, sign * macs) for macs, _ in layers], free, math.inf, 1,
                 torch.maximum, torch.argmax) for sign in (-1, 1)]
    low, high = -int(least), int(most)
    for refine in (1, 8, 64, 512) if low - target <= tolerance * target >= target - high else ():
        cell = tolerance * target / (2 * len(layers) * refine)
        size, margin = int((1 + tolerance) * target / cell) + 1, len(layers) * cell / 2
        if refine > 1 and size > 1_000_000:
            break
        final, back = _program(space, layers, log_q, cell, size, join, pick)
        off = (torch.arange(size) * cell - target).abs()
        final[off > tolerance * target - margin] = -math.inf
        if final.max() > -math.inf:
            return back(int(pick(final)))
        for end, extreme in ((smallest, low), (largest, high)):
            if abs(extreme - target) <= tolerance * target:
                return end(0)
    full = count_macs(space.full)
    raise TASError(f"no shape has {target:,.0f} MACs within {tolerance:.1%}; possible are {low:,} "
                   f"to {high:,} ({low / full:.3f} to {high / full:.3f} of the unpruned network); "
                   "choose another --flops")

# ---- Knowledge transfer -------------------------------------------------------------------------

def kd_loss(student_logits, teacher_logits, labels, weight=0.9, temperature=4.0):
    """Knowledge distillation: (1 - weight) CE + weight T^2 KL(teacher || student at temperature T)
    of logits [N, classes] and labels [N]; the mean over the batch, 0-d."""
    soft = F.kl_div(F.log_softmax(student_logits / temperature, 1),
                    F.log_softmax(teacher_logits / temperature, 1),
                    reduction="batchmean", log_target=True)
    hard = F.cross_entropy(student_logits, labels)
    return (1 - weight) * hard + weight * temperature ** 2 * soft

@torch.no_grad()
def inherit_weights(student, teacher):
    """Copy the first channels of every layer of `teacher` into `student` (paper: Init), both
    ResNets; layers that only the student has keep theirs. Returns the student."""
    source = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        if name in source:
            tensor.copy_(source[name][tuple(slice(n) for n in tensor.shape)])
    return student

# ---- Data ---------------------------------------------------------------------------------------

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's convention, for all data

@functools.cache
def _mean_std(device):
    """255 times MEAN and STD, [1, 3, 1, 1], copied to a device once."""
    return [255 * torch.tensor(t, device=device).view(1, 3, 1, 1) for t in (MEAN, STD)]

def normalize(images):
    """uint8 RGB images [N, 3, H, W] -> the float input of every network, (x / 255 - mean) / std."""
    require(images.dtype == torch.uint8, f"normalize takes uint8 images, not {images.dtype}")
    mean, std = _mean_std(images.device)
    return (images - mean) / std

class SmallImages:
    """A split of small images, in memory on the device: uint8 [N, H, W, 3], labels [N]. A batch,
    its random crops (zero-padding) and flips are one gather."""

    def __init__(self, images, labels, device):
        self.size, self.labels = images.shape[1], labels.to(device)
        self.pixels = F.pad(images.reshape(-1, 3), (0, 0, 0, 1)).to(device)  # [N*H*W + 1, 3]

    def batches(self, order, batch_size, train, rank=0, world=1):
        """Normalised images [B, 3, H, W] and labels [B] in the given order of indices. `train`
        augments and drops the last, incomplete batch. Each of `world` processes gets its share of
        every batch; all of them draw the whole batch's random numbers, and so stay in step."""
        device, size, pad = self.labels.device, self.size, 4
        order, line = order.to(device), torch.arange(size, device=device)
        for start in range(0, len(order) - (batch_size - 1 if train else 0), batch_size):
            index = order[start:start + batch_size]
            row = column = line.expand(len(index), size)  # [B, size]
            if train:
                shift = torch.randint(-pad, pad + 1, (2, len(index), 1), device=device)
                flip = torch.rand(len(index), 1, device=device) < 0.5
                row, column = row + shift[0], column.where(~flip, size - 1 - column) + shift[1]
            index, row, column = (t[rank::world] for t in (index, row, column))
            row, column = row[:, :, None], column[:, None]
            inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
            pixel = (index[:, None, None] * size + row) * size + column  # [B, H, W]
            pixel = pixel.where(inside, len(self.pixels) - 1)  # black outside
            images = self.pixels.index_select(0, pixel.flatten()).view(*pixel.shape, 3)
            yield normalize(images.permute(0, 3, 1, 2)), self.labels[index]

def _resize(size):
    """Transform of a test image to uint8 [3, size, size]."""
    from torchvision.transforms import v2
    return v2.Compose([v2.Resize(size * 256 // 224 if size > 64 else size), v2.CenterCrop(size),
                       v2.PILToTensor()])

class LargeImages(torch.utils.data.Dataset):
    """A split of image files, decoded and augmented by worker processes, normalised on the device;
    the same interface as SmallImages. An item is (index, seed of its augmentation or None), so that
    the result depends neither on the number of workers nor on an interruption."""

    def __init__(self, folder, size, device, workers):
        from torchvision.transforms import v2
        self.folder, self.device, self.workers, self.loader = folder, device, workers, None
        self.labels, self.plain = torch.tensor(folder.targets), _resize(size)
        self.augment = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(),
                                   v2.ColorJitter(0.4, 0.4, 0.4), v2.PILToTensor()])

    def __getstate__(self):
        return vars(self) | {"loader": None}  # a copy of this split has its own

    def __getitem__(self, item):
        image, label = self.folder[item[0]]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(item[1] or 0)  # the CPU's alone
            return (self.plain if item[1] is None else self.augment)(image), label

    def batches(self, order, batch_size, train, rank=0, world=1):
        """As those of SmallImages."""
        seeds = torch.randint(2 ** 62, (len(order),)).tolist() if train else [None] * len(order)
        items = list(zip(order.tolist(), seeds))
        if self.loader is None:  # its own generator leaves the global random state alone
            self.loader = torch.utils.data.DataLoader(
                self, batch_sampler=[], num_workers=self.workers, generator=torch.Generator(),
                pin_memory=self.device.type == "cuda", persistent_workers=self.workers > 0)
        self.loader.batch_sampler[:] = [
            items[i:i + batch_size][rank::world]
            for i in range(0, len(items) - (batch_size - 1 if train else 0), batch_size)]
        for images, labels in self.loader:
            images, labels = (t.to(self.device, non_blocking=True) for t in (images, labels))
            yield normalize(images.contiguous(memory_format=torch.channels_last)), labels

Data = NamedTuple("Data", [("train", object), ("test", object), ("classes", list)])

def _synthetic(count, seed):
    """Gratings of 5 slopes and 2 periods, 10 classes. Phase, colour and mirroring are random:
    class means are alike, so that no linear model separates them."""
    g = torch.Generator().manual_seed(seed)
    labels, line = torch.arange(count) % 10, torch.arange(32.0)
    angle = (labels % 5 * math.pi / 8)[:, None, None]
    wave = 2 * math.pi / torch.where(labels < 5, 8.0, 4.0)[:, None, None]
    mirror, phase = torch.rand(2, count, 1, 1, generator=g)
    x = torch.where(mirror < 0.5, line, -line)  # [N, 1, 32]
    wave = (wave * (x * angle.cos() + line[:, None] * angle.sin()) + 2 * math.pi * phase).sin()
    colour, light = torch.rand(2, count, 1, 1, 3, generator=g) - 0.5
    noise = torch.randn(count, 32, 32, 3, generator=g)
    images = 128 + 120 * colour * wave[..., None] + 60 * light + 40 * noise  # [N, 32, 32, 3]
    return images.clamp(0, 255).byte(), labels

def _cifar(name, root):
    """torchvision's CIFAR, downloaded on first use; two pairs of uint8 images and labels."""
    from torchvision import datasets
    kind = getattr(datasets, name.upper())
    with contextlib.redirect_stdout(io.StringIO()), explain(
            f"{name} is not in {root} and could not be downloaded ({{}}): put the folder "
            f"{kind.base_folder} of {kind.filename} into {root}, or use --data synthetic"):
        splits = [kind(root, train, download=True) for train in (True, False)]
    return [(torch.from_numpy(s.data), torch.tensor(s.targets)) for s in splits], splits[0].classes

def _read_image(path):
    from torchvision.datasets.folder import default_loader
    with explain(f"cannot read the image {path}: {{}}; replace or remove it"):
        return default_loader(path)

def _folders(root):
    """torchvision's ImageFolders root/train and root/test or, without test, root/val."""
    from torchvision.datasets import ImageFolder
    root, folders = Path(root), []
    for part in (root / "train", root / "test" if (root / "test").is_dir() else root / "val"):
        with explain(f"{part}: {{}}. Put the images into {root}/train/CLASS/ and "
                     f"{root}/val/CLASS/", OSError):  # no folder, or a class without images
            folders.append(ImageFolder(part, loader=_read_image))
    odd = set(folders[0].classes) ^ set(folders[1].classes)
    why = f"only one has: {', '.join(sorted(odd))[:80]}" if odd else "there is one class only"
    require(not odd and len(folders[0].classes) > 1, f"{folders[0].root} and {folders[1].root} "
            f"must have the same class folders, two or more; {why}")
    return folders

@functools.lru_cache(maxsize=1)
def load_data(name, root, image_size, device, workers):
    """The Data of --data. Images up to 64 pixels are held in memory, larger ones are read on the
    fly; raises TASError for what is missing, empty, unreadable or inconsistent."""
    if name in ("imagenet", "folder"):
        folders = _folders(root)
        classes, splits = folders[0].classes, []
        if image_size > 64:
            return Data(*[LargeImages(f, image_size, device, workers) for f in folders], classes)
        for folder in folders:
            folder.transform = _resize(image_size)
            images = torch.cat([x for x, _ in torch.utils.data.DataLoader(
                folder, 500, num_workers=workers, generator=torch.Generator())])
            splits.append((images.permute(0, 2, 3, 1), torch.tensor(folder.targets)))
    elif image_size != 32:
        raise TASError(f"{name} has images of 32 pixels; leave --image-size out or use it with "
                       "--data folder")
    elif name == "synthetic":
        splits, classes = [_synthetic(4096, 1), _synthetic(1024, 2)], list("0123456789")
    else:
        splits, classes = _cifar(name, root)
    return Data(*[SmallImages(*split, device) for split in splits], classes)

def split_halves(labels, seed):
    """Two class-balanced halves of the training set, as index tensors (paper: 50/50 split)."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels.cpu()[order].argsort(stable=True)]  # class by class, each shuffled
    return order[0::2], order[1::2]

# ---- Training -----------------------------------------------------------------------------------

def write_file(path, content):
    """Write bytes under a temporary name, flush and rename: the old file or the new, never half."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    with explain(f"cannot write {path}: {{}}; free space or choose another --out", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

def read_json(path):
    """The object in a JSON file; TASError when it is none or larger than 1 MB."""
    with explain(f"cannot read {path} ({{}}); it must hold one JSON object, of at most 1 MB",
                 (OSError, ValueError, RecursionError)):
        if os.path.getsize(path) > 1_000_000:
            raise ValueError("larger than 1 MB")
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}")
        return value

def save_tensors(path, state):
    """torch.save, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getbuffer())

def load_tensors(path):
    """A dict saved by torch.save, on the CPU; nothing in the file is executed."""
    with explain(f"{path} is missing, damaged or of another program; delete it or use another"):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not compare checksums
                raise ValueError
        return {**torch.load(path, map_location="cpu", weights_only=True)}

@torch.no_grad()
def average(tensors, world):
    """Average tensors over all processes, in place."""
    if world > 1:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        torch.distributed.all_reduce(flat)
        for t, mean in zip(tensors, flat.div_(world).split([t.numel() for t in tensors])):
            t.copy_(mean.view(t.shape))

class Run:
    """The directory --out of a command: run.json (settings, versions, command and, when finished,
    the result), metrics.jsonl (a line an epoch) and last.ckpt (the state after the last finished
    epoch). The settings are what determines the result; one with other settings is refused."""

    def __init__(self, args, data, step, **settings):
        self.path, self.args = Path(args.out or base_directory(args) / step), args
        self.settings = {name: getattr(args, name) for name in (
            "command", "data", "image_size", "epochs", "batch_size", "lr", "weight_decay", "seed",
            "precision")} | settings | {"images": f"{len(data.train.labels)} + "
            f"{len(data.test.labels)} images, {len(data.classes)} classes"}
        self.info = {
            "command": args.line, "settings": self.settings, "machine": machine(args.device),
            "versions": {"python": platform.python_version(), "torch": torch.__version__}}
        if (self.path / "run.json").exists():
            self.info = read_json(self.path / "run.json")
            self._compare("run.json", self.info.get("settings"))
            with explain(f"{self.path / 'run.json'} is damaged; choose another --out"):
                if (result := self.info.get("result")) is not None:
                    f"{result['macs']:d} {result.get('accuracy', 0.0):f}"
        elif not args.rank:
            empty = all(p.suffix == ".tmp" for p in self.path.glob("*"))
            require(empty and not self.path.is_file(),
                    f"{self.path} exists and is no run directory; choose another --out")
            self.update()
        if args.world > 1:  # nobody writes a result before all have looked for one
            torch.distributed.barrier()

    def _compare(self, name, old):
        require(isinstance(old, dict), f"{self.path / name} has no settings; choose another --out")
        odd = [f"{k} was {str(old.get(k))[:60]}, now {str(self.settings.get(k))[:60]}"
               for k in sorted({*old, *self.settings}) if old.get(k) != self.settings.get(k)]
        require(not odd, f"{self.path / name} has other settings ({'; '.join(odd)}); choose "
                "another --out, or the old settings")

    def update(self, **entries):
        """Add entries to run.json."""
        self.info |= entries
        if not self.args.rank:
            write_file(self.path / "run.json", json.dumps(self.info, indent=1).encode() + b"\n")

    def resume(self, parts):
        """Restore `parts` and the random state; returns the metrics of the finished epochs."""
        path = self.path / "last.ckpt"
        if not path.exists():
            return []
        state = load_tensors(path)
        self._compare("last.ckpt", state.get("settings"))
        with explain(f"{path} does not fit this network; delete it to start anew, or change --out"):
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])
            torch.set_rng_state(state["rng"])
            if len(state["cuda_rng"]) and torch.cuda.is_available():
                torch.cuda.set_rng_state(state["cuda_rng"])
            return [dict(line) for line in state["metrics"]]

    def save(self, parts, metrics):
        """Write metrics.jsonl and last.ckpt."""
        if not self.args.rank:
            write_file(self.path / "metrics.jsonl",
                       "".join(json.dumps(line) + "\n" for line in metrics).encode())
            save_tensors(self.path / "last.ckpt", {
                "settings": self.settings, "metrics": metrics, "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else [],
                "parts": {name: part.state_dict() for name, part in parts.items()}})

def machine(device):
    """Name of the GPU, or of the processor and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        name = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    return f"{name}, {torch.get_num_threads()} threads"

def autocast(args):
    """bf16 for convolutions and matrix products; statistics, losses and optimisers stay fp32."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16")

def place(net, args):
    """Move a network to the device, in the memory format that convolutions like."""
    return net.to(args.device, memory_format=torch.channels_last)

def maybe_compile(function, args):
    """torch.compile, as one graph of fixed shapes, where --compile asks for it."""
    if args.compile == "off" or args.compile == "auto" and args.device.type != "cuda":
        return function
    compiled = torch.compile(function, fullgraph=True, dynamic=False)

    def with_fallback(*inputs):
        nonlocal compiled
        try:
            return compiled(*inputs)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            print(f"warning: running without --compile: {str(error).splitlines()[0][:100]}",
                  file=sys.stderr)
            compiled = function
            return function(*inputs)
    return compiled if args.compile == "on" else with_fallback

class Step:
    """One step of an optimiser on a batch of its `share` of the training images, given as indices:
    the gradients of what it steps, averaged over all processes, and no more. objective(x, y) ->
    what is minimised, cross-entropy and number of right answers; these stay on the device."""

    def __init__(self, net, optimizer, objective, share, args):
        self.net, self.optimizer, self.share, self.world = net, optimizer, share, args.world
        self.objective, self.seen = maybe_compile(objective, args), []

    def __call__(self, x, y):
        params = self.optimizer.param_groups[0]["params"]
        self.net.requires_grad_(False)  # autograd follows only what is stepped ...
        for p in params:
            p.requires_grad_(True)  # ... in the forward pass already
        value, loss, right = self.objective(x, y)
        self.optimizer.zero_grad()
        value.backward(inputs=params)
        average([p.grad for p in params], self.world)
        self.optimizer.step()
        self.seen.append(torch.stack([loss.detach().double(), 100 * right.double() / len(y)]))

    def read(self, world=1):
        """(mean loss, accuracy in %) of the steps since `seen` was emptied, over all processes if
        `world` says so. FloatingPointError with the first step whose loss was not finite."""
        seen = torch.stack(self.seen)  # [steps, 2]
        average([seen], world)
        if bad := (~seen[:, 0].isfinite()).nonzero().flatten().tolist():
            raise FloatingPointError(bad[0] + 1)
        return seen.mean(0).tolist()

def sgd(weights, args):
    """The optimiser of all weights: SGD with Nesterov momentum."""
    return torch.optim.SGD(weights, args.lr, momentum=0.9, nesterov=True, fused=True,
                           weight_decay=args.weight_decay)

def train_steps(net, args, share, teacher=None):
    """The Step of training, in a list, under knowledge distillation where there is a teacher."""
    def objective(x, y):
        with autocast(args):
            logits = net(x).float()  # [N, classes]
            guide = None if teacher is None else teacher(x).float()
        loss = F.cross_entropy(logits, y) if teacher is None else kd_loss(logits, guide, y)
        return loss, loss, (logits.argmax(1) == y).sum()

    if teacher is not None:
        place(teacher, args).eval().requires_grad_(False)
    return [Step(net, sgd(net.parameters(), args), objective, share, args)]

def search_steps(net, args, halves, target):
    """The two Steps of the search: SGD on the weights with a batch of the one half, then Adam on
    alpha and beta with a batch of the other half, each with its own sample."""
    def weight_objective(x, y):
        sample = sample_sizes(net.alpha, net.beta, net.tau, args.num_samples,
                              args.sampler == "gumbel")
        with autocast(args):
            logits = net(x, sample).float()  # [N, classes]
        loss = F.cross_entropy(logits, y)
        return loss, loss, (logits.argmax(1) == y).sum()

    def arch_objective(x, y):
        loss, _, right = weight_objective(x, y)
        p, q = net.probabilities()
        cost = cost_loss(expected_macs(net.space, p, q), argmax_macs(net.space, p, q), target,
                         args.tolerance)
        return loss + 2 * cost.float(), loss, right

    adam = torch.optim.Adam([net.alpha, net.beta], args.arch_lr, betas=(0.5, 0.999),
                            weight_decay=1e-3, fused=True)
    weights = [p for p in net.parameters() if p is not net.alpha and p is not net.beta]
    return [Step(net, sgd(weights, args), weight_objective, halves[0], args),
            Step(net, adam, arch_objective, halves[1], args)]

def run_epochs(run, data, net, steps, measure, warmup=0, note=lambda line: ""):
    """The loop of training and search: every Step takes a batch of its share in turn, until there
    is no whole batch left. After each epoch that is not done there is a line of metrics, with
    measure(epoch), and a checkpoint; returns all lines. One bar on a terminal, else a line an
    epoch."""
    from tqdm import tqdm
    args, parts = run.args, {"net": net}
    parts |= zip(("optimizer", "arch_optimizer"), [step.optimizer for step in steps])
    metrics, show = run.resume(parts), not args.rank and not args.quiet
    size = min(len(step.share) for step in steps) // args.batch_size
    warmup, total = warmup * size, args.epochs * size  # in steps
    sources = [copy.copy(data.train) for _ in steps]  # each with its own worker processes
    bar = tqdm(total=total, initial=len(metrics) * size, desc=run.path.name,
               unit="step", dynamic_ncols=True, disable=None if show else True)
    for epoch in range(len(metrics), args.epochs):
        start = time.perf_counter()
        net.train()
        streams = [source.batches(step.share[torch.randperm(len(step.share))], args.batch_size,
                                  True, args.rank, args.world)
                   for source, step in zip(sources, steps)]
        for step in steps:
            step.seen = []
        with explain(f"{run.path}: the loss is not finite in epoch {epoch + 1}, step {{}}, with "
                     f"--lr {args.lr:g}; lower --lr (and choose another --out); the last "
                     "checkpoint, if there is one, is kept", FloatingPointError):
            for i, *batches in zip(range(epoch * size, (epoch + 1) * size), *streams):
                steps[0].optimizer.param_groups[0]["lr"] = args.lr * (
                    (i + 1) / warmup if i < warmup else
                    0.5 * (1 + math.cos(math.pi * (i - warmup) / (total - warmup))))
                for step, batch in zip(steps, batches):
                    step(*batch)
                if not bar.disable and i % 50 == 0:  # reading waits for the device
                    bar.set_postfix_str("loss {:.3f}, accuracy {:.1f}%".format(*steps[-1].read())
                                        + (note(metrics[-1]) if metrics else ""))
                bar.update()
            line = {"epoch": epoch + 1}
            for name, step in zip(("train", "val"), steps):
                line[f"{name}_loss"], line[f"{name}_accuracy"] = step.read(args.world)
        average([b for b in net.buffers() if b.is_floating_point()], args.world)
        metrics.append(line | measure(epoch) | {"seconds": round(time.perf_counter() - start, 2)})
        run.save(parts, metrics)
        if show and bar.disable:
            print(f"{run.path.name} {epoch + 1}/{args.epochs}: " + ", ".join(
                f"{k} {v:.4g}" for k, v in metrics[-1].items() if k != "epoch"), flush=True)
    bar.close()
    return metrics

def medians(functions, rounds, device, warmup=1):
    """name -> median time in ms of functions that take turns, after rounds of warm-up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = {name: [] for name in functions}
    for name, function in [*functions.items()] * (warmup + rounds):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[warmup:]) for name, values in times.items()}

def choose_precision(run, net, size, *extra):
    """Resolve --precision auto: bf16 on CUDA; elsewhere the faster one in training steps of this
    network. Kept in run.json, so that a resumed run goes on with it."""
    args, choice = run.args, [run.info.get("precision") or run.args.precision, "as asked"]
    if choice[0] == "auto" and args.device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        choice = ["bf16" if native else "fp32", "what the GPU computes natively"]
    elif choice[0] == "auto":
        net, batch = copy.deepcopy(net), max(4, min(args.batch_size, 64 * 32 ** 2 // size ** 2))
        x = torch.ones(batch, 3, size, size).to(args.device, memory_format=torch.channels_last)

        def step(precision):
            args.precision = precision
            with autocast(args):
                logits = net(x, *extra)
            logits.float().logsumexp(1).sum().backward()

        times = medians({name: functools.partial(step, name) for name in ("fp32", "bf16")}, 4,
                        args.device)
        ratio = times["fp32"] / times["bf16"]  # with a margin, so that noise decides less
        choice = ["bf16" if ratio > 1.2 else "fp32", f"bf16 is {ratio:.2f} times as fast as fp32"]
    if args.world > 1:
        torch.distributed.broadcast_object_list(choice)
    args.precision = choice[0]
    if "precision" not in run.info:
        if not args.rank and not args.quiet:
            print("precision {}: {}".format(*choice), flush=True)
        run.update(precision=choice[0], precision_reason=choice[1])

def pad_channels(net, multiple=8):
    """Widen every layer of `net` to multiples of 8 channels with zeros, which processors like and
    training keeps: the function is unchanged; `inherit_weights` takes the channels back out."""
    for m in net.modules():
        for name, old in [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)]:
            size = [-(-n // multiple) * multiple for n in old.shape[:2]]
            if m is net.conv1:
                size[1] = 3  # colours
            elif m is net.fc:
                size[0] = len(old)  # classes
            new = old.new_zeros([*size, *old.shape[2:]])
            new[tuple(map(slice, old.shape))] = old.detach()
            setattr(m, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
    return net

@torch.no_grad()
def evaluate(net, split, args):
    """Accuracy in % on a split, each process on its share."""
    net.eval()
    order, right = torch.arange(len(split.labels)), torch.zeros((), device=args.device)
    for x, y in split.batches(order[args.rank::args.world], args.batch_size, False):
        with autocast(args):
            right += (net(x).argmax(1) == y).sum()
    if args.world > 1:
        torch.distributed.all_reduce(right)
    return 100 * right.item() / len(order)

def train_network(run, data, net, teacher=None):
    """Train any network: unpruned or pruned, with a teacher or without. Returns the metrics."""
    args = run.args
    place(pad_channels(net), args)
    choose_precision(run, net, net.shape.image_size)
    steps = train_steps(net, args, torch.arange(len(data.train.labels)), teacher)
    return run_epochs(run, data, net, steps,
                      lambda epoch: {"test_accuracy": evaluate(net, data.test, args)},
                      warmup=min(5, args.epochs / 10))

def discrepancy(probabilities, rows):
    """Mean of the top minus the second probability, over the rows that have a choice."""
    top = [p[:len(row)].topk(2).values for p, row in zip(probabilities, rows) if len(row) > 1]
    return statistics.mean(float(a - b) for a, b in top) if top else 0.0

def search_sizes(run, data, space, target):
    """Search the sizes of `space` (paper: the search). Returns the Shape and the metrics."""
    args, full = run.args, count_macs(space.full)
    net = place(SuperResNet(space.to(run.args.device), args.align), args)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        sample = sample_sizes(net.alpha, net.beta, 1.0, args.num_samples)
    choose_precision(run, net, space.full.image_size, sample)

    def tau(epoch):
        return 10 + (0.1 - 10) * epoch / max(1, args.epochs - 1)

    @torch.no_grad()
    def measure(epoch):
        net.tau.fill_(tau(epoch + 1))  # for the next epoch
        p, q = net.probabilities()
        return {"tau": tau(epoch), "expected_macs": float(expected_macs(space, p, q)),
                "argmax_macs": int(argmax_macs(space, p, q)),
                "width_discrepancy": discrepancy(p, space.widths),
                "depth_discrepancy": discrepancy(q, space.depths)}

    steps = search_steps(net, args, split_halves(data.train.labels, args.seed), target)
    metrics = run_epochs(run, data, net, steps, measure, note=lambda line: (
        f", MACs {line['argmax_macs'] / full:.1%} for {target / full:.1%}"))
    return extract(space, net.alpha, net.beta, target, args.tolerance), metrics

# ---- Commands -----------------------------------------------------------------------------------

PAPER = {  # paper (as transcribed): images -> arch -> accuracy and MACs of TAS with KD
    "50000 + 10000 images, 10 classes": {
        "resnet20": "92.88 at 22.4M", "resnet32": "93.16 at 35.0M", "resnet56": "93.69 at 59.5M",
        "resnet110": "94.33 at 119M", "resnet164": "94.00 at 178M"},
    "50000 + 10000 images, 100 classes": {
        "resnet20": "68.90 at 22.4M", "resnet32": "72.41 at 42.5M", "resnet56": "72.25 at 61.2M",
        "resnet110": "73.16 at 120M", "resnet164": "77.76 at 171M"},
    "1281167 + 50000 images, 1000 classes": {
        "resnet18": "69.15 at 1.21G", "resnet50": "76.20 at 2.31G"}}

def setup(args):
    """Fill in the device and the place among the processes of torchrun; set the seed."""
    args.rank, args.world, local = (int(os.environ.get(name, other)) for name, other in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    require(args.batch_size % args.world == 0, f"--batch-size {args.batch_size} must be a multiple "
            f"of the {args.world} processes")
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    with explain(f"--device {args.device}: {{}}; use cpu or leave it out"):
        device = torch.device(auto if args.device == "auto" else args.device)
        if device.type == "cuda":
            device = torch.device("cuda", local if args.world > 1 else device.index or 0)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).double().item()
    args.device = device
    if args.world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                             timeout=datetime.timedelta(minutes=10))
    torch.backends.cudnn.benchmark = True
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no mallopt
        for option, value in ((-3, 1 << 25), (-1, 2 ** 31 - 1)):  # glibc: mmap and trim thresholds,
            ctypes.CDLL(None).mallopt(option, value)  # so that freed tensors' memory is kept
    torch.manual_seed(args.seed)

def open_data(args, arch):
    """The data set of a command, after setup; what depends on its images is filled into args."""
    setup(args)
    if args.image_size is None:
        small = ARCHS[arch].small if args.data == "folder" else args.data != "imagenet"
        args.image_size = 32 if small else 224
    if args.rank:  # the first process downloads what is missing
        torch.distributed.barrier()
    data = load_data(args.data, args.data_dir, args.image_size, args.device, args.workers)
    if args.world > 1 and not args.rank:
        torch.distributed.barrier()
    large, halved = args.image_size > 64, args.command == "search" and args.method == "tas"
    args.epochs = args.epochs or (120 if large else 600 if args.command == "search" else 300)
    if args.weight_decay is None:
        args.weight_decay = 1e-4 if large else 5e-4
    images = len(data.train.labels) // (2 if halved else 1)
    require(args.command == "eval" or args.batch_size <= images, f"--batch-size {args.batch_size} "
            f"is larger than the {images} training images{' of a half of the search' * halved}")
    return data

def base_directory(args):
    """Where the runs of a data set and an arch are by default."""
    name = Path(args.data_dir).resolve().name if args.data == "folder" else args.data
    return Path("runs") / f"{name}-{args.arch}"

def parse_target(text, full):
    """--flops: a fraction of the unpruned network's MACs such as 0.47, or MACs such as 59.5M."""
    scale = {"K": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:].upper(), 1)
    try:
        value = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        value = math.nan
    target = value * full if scale == 1 and value <= 1 else value
    require(0 < target <= full and not 1 < value < 1000, f"--flops {text}: give a fraction such as "
            f"0.5, or MACs up to the {full:,} of the unpruned network, such as {full * 5e-7:.1f}M")
    return round(target)

def summary(shape):
    """MACs and parameters of a Shape in words."""
    macs, full = count_macs(shape), count_macs(shape.full)
    return f"{macs / 1e6:.2f}M MACs ({macs / full:.1%} of the unpruned), " \
           f"{count_params(shape) / 1e6:.3f}M parameters"

def load(path, trained=False):
    """The network, in eval mode, of a run directory of `train` with its weights or, unless it must
    be `trained`, a new one of a shape file."""
    weights, trained = Path(path) / "weights.pt", trained or Path(path).is_dir()
    require(weights.exists() or not trained,
            f"{path} has no weights.pt; give the directory of a finished `train`")
    net = ResNet(Shape.load(path)).eval()
    if trained:
        with explain(f"{weights} does not fit the shape.json beside it"):
            net.load_state_dict(load_tensors(weights))
    return net

def read_info(path):
    """run.json of a run directory or of the one that a file is in, {} when there is none."""
    if not os.path.exists(path or ""):
        return {}
    file = (Path(path) if os.path.isdir(path) else Path(path).parent) / "run.json"
    return read_json(file) if file.exists() else {}

def _agree(path, shape, other, whose, *names):
    for name in names:
        a, b = getattr(shape, name), getattr(other, name)
        require(a == b, f"{path} has {name} {a}, {whose} {b}; choose another one")

def load_teacher(path, shape):
    """The trained unpruned network that is to guide `shape`, and a checksum that names it."""
    if path == "torchvision":
        from torchvision.models import get_model
        with explain(f"--teacher torchvision: no {shape.arch} to be had ({{}}); train a teacher"):
            weights = get_model(shape.arch, weights="DEFAULT").state_dict()
        net = ResNet(Shape.unpruned(shape.arch, len(weights["fc.bias"]), shape.image_size))
        net.load_state_dict(weights)
    else:
        net = load(path, trained=True)
        require(net.shape == net.shape.full,
                f"--teacher {path} is a pruned network; give the unpruned one")
    _agree(f"--teacher {path}", net.shape, shape, "the network to train", "arch", "num_classes")
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()
    return net, zlib.crc32(flat.numpy().tobytes())

def finish(run, shape, metrics, **result):
    """Write shape.json and the result of a run."""
    if not run.args.rank:
        shape.save(run.path / "shape.json")
    run.update(result={**result, "macs": count_macs(shape), "params": count_params(shape),
                       "full_macs": count_macs(shape.full),
                       "seconds": round(sum(line["seconds"] for line in metrics), 1)})
    if run.args.world > 1:
        torch.distributed.barrier()  # the next step of `prune` reads these files

def conclude(args, text, then):
    """Print what a command made and, unless more of `prune` follows, the next command."""
    place = f" --data {args.data} --data-dir {args.data_dir}".removesuffix(" --data-dir data")
    place += f" --image-size {args.image_size} " if args.data == "folder" else " "
    if not args.rank:
        print(text + ("" if args.follows else "\nnext: python tas.py " + then.replace(
            " DATA ", place, 1)))

def command_train(args):
    """Train the unpruned network of --arch, or the pruned one of --shape."""
    if args.shape:
        shape = Shape.load(args.shape)
        require(args.arch in (None, shape.arch),
                f"{args.shape} is a shape of {shape.arch}, not of {args.arch}")
        args.arch, args.image_size = shape.arch, args.image_size or shape.image_size
    require(args.arch, "train needs --arch, such as resnet56, or --shape with a shape.json")
    args.transfer = args.transfer or ("kd" if args.teacher else "none")
    require(args.teacher or args.transfer == "none",
            f"--transfer {args.transfer} needs --teacher DIR, a trained {args.arch}")
    data = open_data(args, args.arch)
    full = Shape.unpruned(args.arch, len(data.classes), args.image_size)
    shape = shape if args.shape else full
    _agree(args.shape, shape, full, "the data", "num_classes", "image_size")
    teacher, checksum = load_teacher(args.teacher, shape) if args.teacher else (None, None)
    run = Run(args, data, "teacher" if shape == full else "pruned",
              shape=dataclasses.asdict(shape), transfer=args.transfer, teacher=checksum)
    if run.info.get("result") is None:
        torch.manual_seed(args.seed)
        net = ResNet(shape)
        if args.transfer == "init":
            inherit_weights(net, teacher)
        metrics = train_network(run, data, net, teacher if args.transfer == "kd" else None)
        if not args.rank:  # without the padded channels
            save_tensors(run.path / "weights.pt", inherit_weights(ResNet(shape), net).state_dict())
        above = read_info(args.teacher).get("result") or {}
        finish(run, shape, metrics, accuracy=metrics[-1]["test_accuracy"], classes=data.classes,
               search=read_info(args.shape).get("settings"), teacher_accuracy=above.get("accuracy"))
    conclude(args, f"{run.path}: {args.arch}, accuracy {run.info['result']['accuracy']:.2f}% on "
             f"{args.data}, {summary(shape)}", f"search DATA --arch {args.arch} --flops 0.5"
             if shape == full else f"export {run.path}")

def plan_search(args):
    """All that can go wrong before a search: its device, data, space, target in MACs, and a Shape
    in the band, which is that of the methods that do not search."""
    require(args.method != "uniform" or args.search == "both",
            f"--method uniform keeps all depths; leave --search {args.search} out")
    data = open_data(args, args.arch)
    space = Space(args.arch, len(data.classes), args.image_size, args.search, args.round)
    target = parse_target(args.flops, count_macs(space.full))
    shape = scale_shape(space, target, args.tolerance, args.round) \
        if args.method == "uniform" else draw_shape(space, target, args.tolerance)
    return data, space, target, shape

def command_search(args):
    """Search the sizes of --arch that meet --flops; leaves shape.json."""
    data, space, target, shape = plan_search(args)
    if args.arch_lr is None:
        steps = len(data.train.labels) // 2 // args.batch_size * args.epochs
        args.arch_lr = min(0.05, max(1e-3, 59 / max(1, steps)))
    run = Run(args, data, "search", target=target, **{name: getattr(args, name) for name in (
        "arch", "search", "method", "num_samples", "sampler", "align", "round", "tolerance",
        "arch_lr")})
    if run.info.get("result") is None:
        metrics = []
        if args.method == "tas":
            torch.manual_seed(args.seed)
            shape, metrics = search_sizes(run, data, space, target)
        finish(run, shape, metrics, **{k: metrics[-1][k] for k in (
            "val_accuracy", "width_discrepancy", "depth_discrepancy") if metrics})
    teacher = run.path.parent / "teacher"
    conclude(args, f"{run.path / 'shape.json'}: {summary(Shape.load(run.path))}; target "
             f"{target / 1e6:.2f}M", f"train DATA --shape {run.path / 'shape.json'} --teacher "
             f"{teacher if teacher.exists() else 'DIR'}")

def command_prune(args):
    """Train the teacher, search the sizes, distil the pruned network; finished parts are kept."""
    base, transfer = Path(args.out or base_directory(args)), args.transfer or "kd"
    teacher = args.teacher or (base / "teacher" if transfer != "none" else None)

    def part(name, **changes):
        return argparse.Namespace(**{**vars(args), "out": base / name, "command": "train",
                                     "follows": True, **changes})

    searching = part("search", command="search")
    _, space, *_ = plan_search(searching)  # before hours of training
    if args.teacher:
        load_teacher(args.teacher, space.full)
    elif teacher:
        command_train(part("teacher", transfer="none"))
    command_search(searching)
    command_train(part("pruned", shape=base / "search", teacher=teacher, transfer=transfer,
                       follows=False))

def command_eval(args):
    """Accuracy of a trained network on the test images of --data."""
    net = load(args.dir, trained=True)
    args.image_size = args.image_size or net.shape.image_size
    data = open_data(args, net.shape.arch)
    require(len(data.classes) == net.shape.num_classes, f"{args.dir} has {net.shape.num_classes} "
            f"classes, the data {len(data.classes)}; give the --data that it was trained on")
    if args.precision == "auto":  # as in the last epoch of the run
        args.precision = read_info(args.dir).get("precision")
    accuracy = evaluate(place(pad_channels(net), args), data.test, args)
    if not args.rank:
        print(f"{args.dir}: accuracy {accuracy:.2f}% on {len(data.test.labels):,} images, "
              f"{summary(net.shape)}\nnext: python tas.py export {args.dir}")

def command_export(args):
    """Write a trained network as a torch.export program (and ONNX) with a dynamic batch."""
    net, out, sizes = load(args.dir, trained=True), Path(args.dir), []
    size, batch = net.shape.image_size, torch.export.Dim("batch", min=1)
    for model in (ResNet(net.shape.full).eval(), net):
        program = torch.export.export(model, (torch.zeros(2, 3, size, size),),
                                      dynamic_shapes=({0: batch},))
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        sizes.append(f"{len(buffer.getvalue()) / 1e6:.2f} MB")
    for n in (1, 3):
        x = torch.randn(n, 3, size, size)
        torch.testing.assert_close(program.module()(x), net(x))
    write_file(out / "network.pt2", buffer.getvalue())
    print(f"{out / 'network.pt2'}: {sizes[1]} (unpruned {sizes[0]}), {summary(net.shape)}; outputs "
          f"equal eager ones\nnext: torch.export.load('{out / 'network.pt2'}').module()"
          "(tas.normalize(images))")
    if args.onnx:
        with explain("--onnx: {}; pip install onnx onnxscript", ImportError):
            import onnx, onnxscript  # noqa: E401, F401
        torch.onnx.export(program, dynamo=True, verbose=False).save(out / "network.onnx")
        print(f"{out / 'network.onnx'}: {(out / 'network.onnx').stat().st_size / 1e6:.2f} MB")

def command_describe(args):
    """A network layer by layer: widths, MACs and their share, against the unpruned network."""
    from torch.utils.flop_counter import FlopCounterMode
    if args.network in ARCHS:
        shape = Shape.unpruned(args.network, 10 if ARCHS[args.network].small else 1000)
    else:
        require(Path(args.network).exists(), f"{args.network} is neither an arch"
                f"{nearest(args.network, ARCHS)} nor a shape file nor a run directory")
        shape = Shape.load(args.network)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        nets = [ResNet(s).eval() for s in (shape, shape.full)]
        nets[0](torch.empty(1, 3, shape.image_size, shape.image_size))
    flops = counter.get_flop_counts()  # two for each multiply-accumulate
    total, last = count_macs(shape), f"conv{len(ARCHS[shape.arch].kernels)}"
    width, full = [{name: len(m.weight) for name, m in net.named_modules()
                    if isinstance(m, (nn.Conv2d, nn.Linear))} for net in nets]
    print(f"{'layer':<24}{'width':>6}{'of':>6}{'MACs':>15}{'share':>8}")
    width = {name: 0 for name in full if "conv" in name} | width  # dropped ones, too
    for name in sorted(width, key=lambda name: (name == "fc", [
            part.zfill(9) for part in name.split(".")])):
        c, of = width[name], full[name.replace("downsample.0", last)]
        macs = sum(flops[f"ResNet.{name}"].values()) // 2 if c else 0
        print(f"{name:<24}{c:>6}{of:>6}{macs:>15,}{macs / total:>8.1%}  "
              + ("#" * max(1, round(24 * c / of)) if c else "dropped"))
    print(f"{shape.arch}, {shape.num_classes} classes, {shape.image_size} pixels: {summary(shape)}"
          "\nnext: python tas.py "
          + (f"train --data DATA --shape {args.network}" if shape != shape.full else
             f"prune --data DATA --arch {shape.arch} --flops 0.5"))

def _bench_cases(args, space, shapes):
    """name -> function of everything that is timed, in the precision of args."""
    batch, size = args.batch_size, space.full.image_size
    split = SmallImages(torch.randint(256, (batch, size, size, 3), dtype=torch.uint8),
                        torch.randint(10, (batch,)), args.device)
    order = torch.arange(batch)
    x, y = next(split.batches(order, batch, True))

    def step(steps):
        for each in steps:
            each(x, y)

    @torch.no_grad()
    def infer(net, n):
        with autocast(args):
            return net(x[:n])

    net = place(pad_channels(ResNet(space.full)), args)
    cases = {"training": functools.partial(step, train_steps(net, args, order)),
             "batching and augmentation": lambda: next(split.batches(order, batch, True))}
    for n in (2, space.K):
        mixed = argparse.Namespace(**vars(args) | {"num_samples": n})
        cases[f"search, {n} candidates mixed"] = functools.partial(step, search_steps(
            place(SuperResNet(space), args), mixed, (order, order), count_macs(space.full) / 2))
    for (name, shape), n in itertools.product(shapes.items(), (1, batch)):
        cases[f"inference, {name}, batch {n}"] = functools.partial(
            infer, place(ResNet(shape).eval(), args), n)
    return cases

def command_bench(args):
    """Time training, search, batching and inference, alternating in one process; print ratios."""
    args.lr, args.weight_decay, args.arch_lr, args.arch = 0.01, 5e-4, 1e-3, args.arch or "resnet20"
    setup(args)
    space = Space(args.arch, 10, args.image_size).to(args.device)
    shapes = {"unpruned": space.full} | {Path(s).stem: Shape.load(s) for s in args.shape}
    require(len(shapes) > len(args.shape), "--shape: give different names, none unpruned.json")
    precisions = ["fp32", "bf16"] if args.precision == "auto" else [args.precision]
    cases = {(name, precision): function for precision in precisions
             for name, function in _bench_cases(argparse.Namespace(
                 **vars(args) | {"precision": precision}), space, shapes).items()}
    times, rows = medians(cases, args.rounds, args.device, warmup=2), []
    for (name, precision), ms in times.items():
        base = "inference, unpruned" + name[name.rfind(","):] if "inference" in name else "training"
        rows.append({"case": name, "precision": precision, "ms": round(ms, 2), "to": base,
                     "ratio": round(ms / times[base, precision], 3)})
        print(f"{precision} {name:<42}{ms:>10.2f} ms {rows[-1]['ratio']:>7.3f} x {base}")
    macs = {name: round(count_macs(s) / count_macs(space.full), 4) for name, s in shapes.items()}
    print("MACs: " + ", ".join(f"{name} {ratio:.1%}" for name, ratio in macs.items()))
    if args.json:
        write_file(args.json, json.dumps({
            "command": args.line, "machine": machine(args.device), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "arch": args.arch, "batch_size": args.batch_size,
            "rows": rows, "macs_ratio": macs}, indent=1).encode())
    print(f"next: python tas.py prune --data cifar10 --arch {args.arch} --flops 0.5")

def _mean(values, digits=2):
    """Mean ± standard deviation of the values that there are."""
    values = [v for v in values if v is not None]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}" if values else "-"

def _report_rows(runs):
    """Rows of the table: trained networks that differ in nothing but the seed, together."""
    groups = {}
    for info in sorted(runs, key=lambda info: info["settings"]["seed"]):
        settings, search = info["settings"], info["result"].get("search") or {}
        if settings["command"] == "train":
            shape = Shape(**settings["shape"])
            method = search.get("method") or ("unpruned" if shape == shape.full else "given shape")
            if method == "tas":
                method += "".join(f", {k} {search[k]}" for k, usual in (
                    ("search", "both"), ("num_samples", 2), ("sampler", "gumbel"), ("align", "cwi"),
                    ("round", 1)) if search[k] != usual)
            apart = ("seed", "teacher", "shape") if search else ("seed", "teacher")
            same = [{k: v for k, v in d.items() if k not in apart} for d in (settings, search)]
            groups.setdefault((shape.arch, settings["data"], method, settings["transfer"],
                               json.dumps(same)), []).append(info)
    for (arch, data, method, transfer, _), infos in sorted(groups.items()):
        results, settings = [info["result"] for info in infos], infos[0]["settings"]
        search = results[0].get("search") or {}
        teacher = [r.get("teacher_accuracy") for r in results]
        paper = PAPER.get(settings["images"], {}) if (method, transfer) == ("tas", "kd") else {}
        yield {
            "arch": arch, "data": data, "size found by": method, "transfer": transfer,
            "target M": f"{search['target'] / 1e6:.2f}" if search else "-",
            "MACs M": _mean([r["macs"] / 1e6 for r in results]),
            "removed %": _mean([100 - 100 * r["macs"] / r["full_macs"] for r in results], 1),
            "params M": _mean([r["params"] / 1e6 for r in results], 3),
            "teacher %": _mean(teacher), "accuracy %": _mean([r["accuracy"] for r in results]),
            "drop": _mean([t and t - r["accuracy"] for t, r in zip(teacher, results)]),
            "seeds": " ".join(str(info["settings"]["seed"]) for info in infos),
            "epochs": " + ".join(str(d["epochs"]) for d in (search, settings)
                                 if d is settings or method.startswith("tas")),
            "training minutes": _mean([r["seconds"] / 60 for r in results], 1),
            "paper (as transcribed)": paper.get(arch, "-")}

def command_report(args):
    """One Markdown table and one figure over all runs below the given directories."""
    places, out = ", ".join(args.dirs), Path(args.out or args.dirs[0])
    runs = {p.parent: info for d in args.dirs for p in sorted(Path(d).rglob("run.json"))
            if (info := read_json(p)).get("result")}
    require(runs, f"no finished run below {places}; train or search first")
    with explain(f"a run below {places} is damaged ({{}}); remove that run"):
        rows = list(_report_rows(runs.values()))
        head = list(rows[0]) if rows else ["no training yet"]
        table = "".join(f"| {' | '.join(row)} |\n" for row in (
            head, ["---"] * len(head), *[row.values() for row in rows]))
        machines = "; ".join(sorted({info["machine"] for info in runs.values()}))
        write_file(out / "report.md", (
            f"{table}\nAccuracy is that of the last epoch on the test images, mean ± standard "
            f"deviation over the seeds. Machine: {machines}.\n").encode())
        searches = [path for path, info in runs.items() if info["settings"].get("method") == "tas"]
        if searches:
            _draw_report(searches[0], out / "report.png")
    print(f"{table}{out / 'report.md'}" + (f", {out / 'report.png'}" if searches else "")
          + "\nnext: python tas.py describe DIR/shape.json")

def _draw_report(directory, path):
    """The trajectory of one search, and the widths it found over the unpruned ones."""
    from matplotlib.figure import Figure
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    settings, shape = read_json(directory / "run.json")["settings"], Shape.load(directory)
    total, blue, red, buffer = count_macs(shape.full), "#0072B2", "#D55E00", io.BytesIO()
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    *panels, axis = figure.subplot_mosaic("abcd;eeee").values()
    panels[0].axhspan(*(100 * settings["target"] * (1 + t) / total for t in (
        -settings["tolerance"], settings["tolerance"])), color="0.85", label="target band")
    for panel, scale, unit, curves in zip(panels, (100 / total, 1, 1, 1), (
            "MACs (% of unpruned)", "temperature tau", "top minus second probability",
            "accuracy of sampled sizes (%)"), (
            {"expected_macs": "expected", "argmax_macs": "most probable"}, {"tau": "tau"},
            {"width_discrepancy": "widths", "depth_discrepancy": "depths"},
            {"val_accuracy": "architecture half", "train_accuracy": "weight half"})):
        for (key, label), colour, mark in zip(curves.items(), (blue, red), "os"):
            panel.plot([line["epoch"] for line in lines], [scale * line[key] for line in lines],
                       color=colour, marker=mark if len(lines) < 40 else "", label=label)
        panel.set(xlabel="epoch", ylabel=unit)
        panel.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3,
                     fontsize="small", handlelength=1.2, columnspacing=1)
    found = [shape.stem]
    for blocks, widest in zip(shape.stages, shape.full.stages):
        axis.axvline(len(found) - 0.5, color="0.4", linewidth=0.8, linestyle=":")
        found += itertools.chain(*blocks, [0] * len(widest[0]) * (len(widest) - len(blocks)))
    axis.bar(range(len(found)), shape.full.convs, color="0.85", width=0.9, label="unpruned")
    axis.bar(range(len(found)), found, color=blue, width=0.9, label="found")
    if dropped := [j for j, width in enumerate(found) if not width]:
        axis.plot(dropped, [0] * len(dropped), "x", color=red, clip_on=False,
                  label="conv of a dropped block")
    axis.set(xlabel="conv, in order (dotted: stages begin)", ylabel="channels",
             xlim=(-0.6, len(found) - 0.4))
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    for each in (*panels, axis):
        each.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"{shape.arch}: {settings['target'] / total:.0%} of the MACs asked, "
                    f"{count_macs(shape) / total:.1%} found, seed {settings['seed']}")
    figure.savefig(buffer, dpi=110)
    write_file(path, buffer.getbuffer())

class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; a wrong word is answered with the nearest."""

    def error(self, message):
        if wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += nearest(wrong[1], re.findall(r"\w+", wrong[2]))
        raise TASError(f"{message}; see python {self.prog} --help")

def number(kind, low, high):
    """Argument type: an int or float from low to high."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} from {low} to {high}")
    return parse

OPTIONS = {  # title -> flag (* and +: several values) -> (argument type, default, help)
    "network": {
        "dir": (str, None, "directory of a finished train"),
        "dirs+": (str, None, "directories with runs below them"),
        "network": (str, None, "arch, shape file or run directory"),
        "--arch": (tuple(ARCHS), None, " ".join(ARCHS)),
        "--shape": (str, None, "shape.json of a pruned network, instead of --arch"),
        "--shape*": (str, [], "shapes whose inference is timed too")},
    "data": {
        "--data": (("cifar10", "cifar100", "imagenet", "folder", "synthetic"), None,
                   "needed: cifar10 cifar100 imagenet folder synthetic"),
        "--data-dir": (str, "data", "where the data is, or goes (data)"),
        "--image-size": (number(int, 8, 1024), None, "pixels (32 or 224); up to 64: in memory"),
        "--workers": (number(int, 0, 256), min(8, os.cpu_count()),
                      "processes that read images (as many as processors, at most 8)")},
    "schedule": {
        "--epochs": (number(int, 1, 10 ** 5), None,
                     "train 300, search 600, above 64 pixels 120 (paper)"),
        "--batch-size": (number(int, 1, 10 ** 6), 256, "over all processes (256, paper)"),
        "--lr": (number(float, 1e-9, 1e9), 0.1, "of the weights, cosine to 0 (0.1, paper)"),
        "--weight-decay": (number(float, 0, 1), None, "5e-4, above 64 px 1e-4 (paper)"),
        "--seed": (number(int, 0, 2 ** 62), 0, "of everything random (0)"),
        "--rounds": (number(int, 1, 1000), 7, "of measuring, after two of warm-up (7)")},
    "target": {
        "--flops": (str, "0.5", "MACs: fraction of the unpruned, or such as 59.5M (0.5, ours)"),
        "--tolerance": (number(float, 0.001, 0.5), 0.05, "half-width of the band (0.05, paper)"),
        "--round": (number(int, 1, 64), 1, "candidate widths in multiples of this (1, paper)"),
        "--arch-lr": (number(float, 1e-9, 1e9), None, "Adam's rate for alpha and beta (ours: the "
                      "paper's 1e-3 x 59,000 / steps, at least 1e-3, at most 0.05)")},
    "ablations": {
        "--search": (("both", "width", "depth"), "both", "both width depth (both, paper)"),
        "--method": (("tas", "random", "uniform"), "tas",
                     "tas; random: any sizes; uniform: one factor for all widths (tas, paper)"),
        "--num-samples": (number(int, 1, 8), 2, "candidates mixed, 1 to 8 (2, paper)"),
        "--sampler": (("gumbel", "softmax"), "gumbel", "gumbel softmax (gumbel, paper)"),
        "--align": (("cwi", "pad"), "cwi", "unequal widths: cwi, or pad with zeros (cwi, paper)")},
    "knowledge transfer": {
        "--teacher": (str, None, "directory of the trained unpruned network, or torchvision"),
        "--transfer": (("none", "init", "kd"), None,
                       "none; init: copy its first channels; kd: distil (kd with a teacher)")},
    "running": {
        "--device": (str, "auto", "cpu, cuda, ... (auto: cuda where there is one)"),
        "--precision": (("auto", "fp32", "bf16"), "auto", "auto fp32 bf16 (the faster)"),
        "--compile": (("auto", "on", "off"), "auto", "auto on off (auto: on CUDA)"),
        "--out": (str, None, "where results go (runs/DATA-ARCH/STEP; of report: the first DIR)"),
        "--json": (str, None, "write the table to this file"),
        "--onnx": (None, False, "ONNX as well"),
        "--quiet": (None, False, "print results only")}}
_DATA, _DEVICE = "--data! --data-dir --image-size --workers", "--device --precision --compile"
_RUN = f"{_DATA} --epochs --batch-size --lr --weight-decay --seed {_DEVICE} --out --quiet"
_SEARCH = " ".join(["--arch!", *OPTIONS["target"], *OPTIONS["ablations"], _RUN])
COMMANDS = {  # command -> its options; ! says that one must be given
    command_train: f"--arch --shape --teacher --transfer {_RUN}", command_search: _SEARCH,
    command_prune: f"{_SEARCH} --teacher --transfer",
    command_eval: f"dir {_DATA} --device --precision",
    command_export: "dir --onnx", command_describe: "network", command_report: "dirs+ --out",
    command_bench: f"--arch --shape* --image-size --batch-size --rounds {_DEVICE} --json"}

def build_parser():
    """The command line."""
    parser = Parser(prog="tas.py", description="Prune ResNets by searching their size (TAS).")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for function, flags in COMMANDS.items():
        flags = flags.split()
        p = commands.add_parser(
            function.__name__.removeprefix("command_"), help=function.__doc__, usage=" ".join(
                ["%(prog)s", *[flag.upper() for flag in flags if flag[0] != "-"], "[options]"]),
            description=f"{function.__doc__} Defaults are in parentheses, with their source.",
            formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=28))
        p.set_defaults(function=function, follows=False)
        for title, options in OPTIONS.items():
            section = p.add_argument_group(title)
            for flag, (kind, default, text) in options.items():
                name = flag.rstrip("*+")
                how = {"action": "store_true"} if kind is None else {
                    "choices" if isinstance(kind, tuple) else "type": kind, "default": default,
                    "metavar": name.upper().split("-")[-1]}
                if flag != name:
                    how["nargs"] = flag[-1]
                if f"{flag}!" in flags:
                    how["required"] = True
                if f"{flag}!" in flags or flag in flags:
                    section.add_argument(name, help=text, **how)
                else:  # of a command that does not ask
                    p.set_defaults(**{name.strip("-").replace("-", "_"): default})
    return parser

def main(argv=None):
    """Run a command; returns the exit status: 0, 2 for what the user can mend, 130 when stopped."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = build_parser().parse_args(argv)
        args.line = " ".join(["python tas.py", *argv])
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        args.function(args)
    except TASError as error:  # its last part, when a worker process raised it
        print(f"error: {str(error).rsplit('TASError: ', 1)[-1].strip()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on after the last finished epoch", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0

if __name__ == "__main__":
    sys.exit(main())
