"""Properties of tas.py. The slow, plain version that a result is compared with stands in the test.

First what a reader reads, in the order of the file: shapes and their cost, networks, the
transformable network, the search objective, knowledge transfer, data, training and search. Then
faults and bad input, mostly as tables. Last what the commands leave and say.
"""
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import errno
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image
from torch._dynamo.testing import CompileCounter
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tas

settings.register_profile("tas", deadline=None, derandomize=True, max_examples=25, database=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tas")
torch.set_num_threads(1)  # small tensors: sharing them out would take longer than computing

HERE = Path(tas.__file__).resolve().parent

CIFAR = ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet164"]
IMAGENET = ["resnet18", "resnet34", "resnet50", "resnet101"]
KERNELS = {arch: (1, 3, 1) if arch in ("resnet164", "resnet50", "resnet101") else (3, 3)
           for arch in CIFAR + IMAGENET}
PUBLISHED_MACS = {
    "cifar10-resnet20": 22444472, "cifar10-resnet32": 34945344, "cifar10-resnet56": 59858430,
    "cifar10-resnet56-table3": 59451390, "cifar10-resnet110": 119259258,
    "cifar10-resnet164": 178071224, "cifar100-resnet20": 22433792, "cifar100-resnet32": 42468608,
    "cifar100-resnet32-predefined": 41095816, "cifar100-resnet32-random": 42908996,
    "cifar100-resnet32-tas": 42493184, "cifar100-resnet56": 61233836,
    "cifar100-resnet110": 119578284, "cifar100-resnet164": 171143792,
    "imagenet-resnet18": 1210757120, "imagenet-resnet50": 2309248169}

def close(a, b, tolerance=1e-9):
    """Relative to the largest entry."""
    return (a - b).abs().max() <= tolerance * b.abs().max()

def chi_square(counts, probabilities):
    """Pearson's statistic over its number of degrees of freedom: near 1 when the counts are drawn
    with these probabilities, in proportion to the number of draws when they are not."""
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum()) / (len(counts) - 1)

def spy(patch, owner, name, look):
    """Call look(*inputs) before each call of a function."""
    plain = getattr(owner, name)

    def call(*inputs, **named):
        look(*inputs)
        return plain(*inputs, **named)

    patch.setattr(owner, name, call)

# ---- Shapes and their cost ----------------------------------------------------------------------

def slow_macs(shape):
    """MACs by walking through the network, one conv after the other."""
    small, kernels = shape.arch in CIFAR, KERNELS[shape.arch]
    size = shape.image_size if small else (shape.image_size + 1) // 2
    macs, c = 3 * (9 if small else 49) * shape.stem * size ** 2, shape.stem
    size = size if small else (size + 1) // 2
    for s, blocks in enumerate(shape.stages):
        for b, widths in enumerate(blocks):
            halved = s > 0 and b == 0
            before, after, c_in = size, (size + 1) // 2 if halved else size, c
            for i, (kernel, width) in enumerate(zip(kernels, widths)):
                area = (before if kernels[:i + 1] == (1,) else after) ** 2
                macs += kernel ** 2 * c * width * area
                c = width
            if halved or c_in != c:
                macs += c_in * c * after ** 2
            size = after
    return macs + c * shape.num_classes

def counted_macs(shape):
    """By running the network on meta tensors under torch's counter, which counts both the
    multiplication and the addition."""
    with torch.device("meta"):
        net, x = tas.ResNet(shape).eval(), torch.empty(1, 3, shape.image_size, shape.image_size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            assert net(x).shape == (1, shape.num_classes)
    return counter.get_total_flops() / 2

def random_shape(arch, seed, widest=1, **fields):
    """Any valid Shape; full and half widths are frequent, so that neighbours are often equal."""
    rng, full = random.Random(seed), tas.Shape.unpruned(arch, 10)

    def width(c):
        return rng.choice([c, c // 2, rng.randint(1, widest * c)])

    stages = [[[width(c) for c in widths] for widths in blocks[:rng.randint(1, len(blocks))]]
              for blocks in full.stages]
    return dataclasses.replace(full, stem=width(full.stem), stages=stages, **fields)

@settings(max_examples=40)
@given(st.sampled_from(CIFAR + IMAGENET), st.integers(0, 2 ** 32), st.integers(8, 1024),
       st.integers(2, 25_000))
def test_shapes_are_saved_and_loaded(tmp_path_factory, arch, seed, size, classes):
    path = tmp_path_factory.getbasetemp() / "round-trip.json"
    shape = random_shape(arch, seed, 8, image_size=size, num_classes=classes)
    shape.save(path)
    again = tas.Shape.load(path)
    assert again == shape == tas.Shape.load(str(path)) and hash(again) == hash(shape)
    assert json.loads(path.read_text()) == {
        "arch": arch, "num_classes": classes, "image_size": size, "stem": shape.stem,
        "stages": shape.stages}
    assert shape.convs == [shape.stem, *itertools.chain(*itertools.chain(*shape.stages))]
    assert list(path.parent.glob("round-trip*")) == [path]

def test_shapes_are_values():
    stages = [[[6, 4]], [[32, 32], [9, 19]], [[64, 64]]]
    shape = tas.Shape("resnet20", 10, 32, 16, stages)
    same = tas.Shape("resnet20", 10, 32, 16, tuple(tuple(map(tuple, s)) for s in stages))
    assert same == shape and len({shape, same}) == 1
    stages[0][0][0] = 7  # the Shape keeps its own lists
    assert shape.stages[0][0][0] == 6
    for change in (dict(stem=15), dict(num_classes=9), dict(image_size=31), dict(stages=stages)):
        assert dataclasses.replace(shape, **change) != shape
    with pytest.raises(dataclasses.FrozenInstanceError):
        shape.stem = 3
    assert dataclasses.replace(shape, stem=8 * 16).stem == 128  # wider than the unpruned one
    with pytest.raises(tas.TASError, match="stem"):
        dataclasses.replace(shape, stem=8 * 16 + 1)

@pytest.mark.parametrize("arch", CIFAR + IMAGENET)
@settings(max_examples=4)
@given(data=st.data())
def test_macs_are_what_torch_counts(arch, data):
    size = data.draw(st.integers(8, 70), "image size")
    shape = random_shape(arch, data.draw(st.integers(0, 2 ** 32), "seed"), 2, image_size=size,
                         num_classes=data.draw(st.integers(2, 1000), "classes"))
    macs = tas.count_macs(shape)
    assert type(macs) is int and macs == counted_macs(shape) == slow_macs(shape)

def test_published_macs():
    shapes = {path.stem: tas.Shape.load(path) for path in (HERE / "shapes").glob("*.json")}
    assert {name: tas.count_macs(shape) for name, shape in shapes.items()} == PUBLISHED_MACS
    assert {name: slow_macs(shape) for name, shape in shapes.items()} == PUBLISHED_MACS
    for arch, classes, macs, digit in (
            ("resnet20", 10, 40.81e6, 1e4), ("resnet32", 10, 69.12e6, 1e4),
            ("resnet56", 10, 125.75e6, 1e4), ("resnet110", 10, 253.15e6, 1e4),
            ("resnet164", 10, 247.65e6, 1e4), ("resnet18", 1000, 1.814e9, 1e6),
            ("resnet50", 1000, 4.089e9, 1e6)):
        assert abs(tas.count_macs(tas.Space(arch, classes).full) - macs) <= digit / 2

def test_candidates():
    space = tas.Space("resnet110")
    assert space.widths[0] == space.widths[1] == (4, 6, 8, 9, 11, 12, 14, 16)
    assert space.widths[-1] == (19, 25, 32, 38, 44, 51, 57, 64)
    assert space.depths == [(1, 3, 5, 7, 9, 11, 13, 15, 17, 18)] * 3
    assert tas.Space("resnet18").depths == [(1, 2)] * 4
    assert tas.Space("resnet101").depths == [(1, 2, 3), (1, 2, 4), (7, 15, 23), (1, 2, 3)]
    width_only, depth_only = (tas.Space("resnet20", search=name) for name in ("width", "depth"))
    assert width_only.depths == [(3,)] * 3 and width_only.widths[0] == space.widths[0]
    assert depth_only.widths == [(c,) for c in depth_only.full.convs]
    assert depth_only.depths == [(1, 2, 3)] * 3
    for arch, round_to in itertools.product(CIFAR + IMAGENET, (8, 16)):
        space = tas.Space(arch, round_to=round_to)
        for row, full in zip(space.widths, space.full.convs):
            assert row[-1] == full and list(row) == sorted(set(row))
            assert all(c % round_to == 0 for c in row[:-1])

def test_rounded_candidates():
    """Tenths to the nearest multiple, an entry for each, and the full width."""
    space = tas.Space("resnet20", round_to=8)
    assert {len(row): row for row in space.widths} == {
        2: (8, 16), 4: (8, 16, 24, 32), 7: (16, 24, 32, 40, 48, 56, 64)}
    assert tas.Space("resnet20", round_to=5).widths[0] == (5, 10, 15, 16)

@pytest.mark.parametrize("arch", CIFAR + IMAGENET)
def test_names_tell_the_layers(arch):
    """The stem, the convs of the blocks and the classifier; all stages of CIFAR are alike."""
    full = tas.Space(arch).full
    assert len(full.convs) + 1 == int(arch.removeprefix("resnet"))
    assert arch in IMAGENET or len({len(blocks) for blocks in full.stages}) == 1
    assert (full.image_size, full.num_classes) == (32 if arch in CIFAR else 224, 10)

def test_tables_move():
    space = tas.Space("resnet20").to(torch.device("meta"))
    p, q = (torch.empty(t.shape, device="meta") for t in (space.has_width, space.has_depth))
    assert tas.expected_macs(space, p, q).device == p.device

def make_space(arch, size, stages, stem, widths):
    """The space of an unpruned network with these stages and candidate widths, any depth."""
    space = tas.Space(arch, 10, size)
    space.full = dataclasses.replace(space.full, stem=stem, stages=stages)
    space.widths = [widths(j, c) for j, c in enumerate(space.full.convs)]
    space.depths = [tuple(range(1, len(blocks) + 1)) for blocks in stages]
    space.tabulate()
    return space

def tiny_space(arch, size, blocks, seed):
    """A space small enough to enumerate: few blocks, one to three candidate widths per conv, the
    same for the last convs of a stage, as everywhere."""
    n, full = len(KERNELS[arch]), tas.Shape.unpruned(arch, 10)
    stages = [stage[:count] for stage, count in zip(full.stages, blocks)]

    def widths(j, c):
        place = f"last of {c}" if j > 0 and j % n == 0 else f"conv {j}"
        few = [(c,), (c * 4 // 10, c), (c * 4 // 10, c * 7 // 10, c)]
        return random.Random(f"{seed} {place}").choices(few, (4, 2, 1))[0]

    return make_space(arch, size, stages, full.stem, widths)

TINY = [("resnet20", 13, (3, 2, 1)), ("resnet164", 32, (2, 1, 2)), ("resnet18", 40, (2, 2, 1, 2)),
        ("resnet50", 64, (2, 1, 1, 2))]

def all_shapes(space):
    """Every Shape of a space, once."""
    n = len(KERNELS[space.full.arch])
    for depths in itertools.product(*space.depths):
        kept, at = [space.widths[0]], 1
        for blocks, depth in zip(space.full.stages, depths):
            kept += space.widths[at:at + n * depth]
            at += n * len(blocks)
        for stem, *rest in itertools.product(*kept):
            widths = iter(rest)
            stages = [[[next(widths) for _ in range(n)] for _ in range(d)] for d in depths]
            yield dataclasses.replace(space.full, stem=stem, stages=stages)

def write_costs(path, space, seed):
    """A file of other costs than MACs: random ones of every layer at every pair of candidates.
    Returns the table."""
    rng = random.Random(seed)
    cost = [[[rng.choice([0, rng.random(), 10 * rng.random()]) for _ in range(space.num_widths)]
             for _ in range(space.num_widths)] for _ in space.cost]
    entries = {"arch": space.full.arch, "image_size": space.full.image_size, "unit": "mJ",
               "widths": space.widths, "cost": cost}
    path.write_text(json.dumps(entries))
    return cost

def slow_cost(space, cost, shape):
    """A walk along the network: the stem, of each block its convs and its shortcut, the end."""
    n, layer, conv, at = len(KERNELS[shape.arch]), 1, 1, space.widths[0].index(shape.stem)
    total = cost[0][0][at]
    for full, blocks in zip(space.full.stages, shape.stages):
        for b in range(len(full)):
            if b < len(blocks):
                first = at
                for i, width in enumerate(blocks[b]):
                    k = space.widths[conv + i].index(width)
                    total += cost[layer + i][at][k]
                    at = k
                total += cost[layer + n][first][at]
            layer, conv = layer + n + 1, conv + n
    return total + cost[layer][at][0]

@functools.lru_cache(maxsize=None)
def tiny_shapes(case, seed, table=None):
    """A tiny space, its Shapes, their costs, and the slow cost of one: MACs, or what a random table
    says."""
    space, slow = tiny_space(*TINY[case], seed), slow_macs
    shapes = list(all_shapes(space))
    if table is not None:
        with tempfile.TemporaryDirectory() as folder:
            cost = write_costs(Path(folder, "cost.json"), space, table)
            space.load_cost(Path(folder, "cost.json"))
        slow = functools.partial(slow_cost, space, cost)
    costs = torch.tensor([slow(shape) for shape in shapes], dtype=torch.float64)
    return space, shapes, costs, slow

def log_probability(space, shape, log_p, log_q):
    """Sum over the stem, the convs of the blocks that are kept, and the depths; lists of rows."""
    n, at, total = len(KERNELS[shape.arch]), 1, log_p[0][space.widths[0].index(shape.stem)]
    for s, (full, blocks) in enumerate(zip(space.full.stages, shape.stages)):
        total += log_q[s][space.depths[s].index(len(blocks))]
        for j, width in enumerate(itertools.chain(*blocks)):
            total += log_p[at + j][space.widths[at + j].index(width)]
        at += n * len(full)
    return total

def random_distribution(space, seed):
    g = torch.Generator().manual_seed(seed)
    p = torch.zeros(len(space.widths), space.num_widths).double()
    q = torch.zeros(len(space.depths), space.num_depths).double()
    for table, rows in ((p, space.widths), (q, space.depths)):
        for row, candidates in zip(table, rows):
            logits = 2 * torch.randn(len(candidates), generator=g).double()
            row[:len(candidates)] = logits.softmax(0)
    return p, q

@pytest.mark.parametrize("table", [None, 0, 1])
@pytest.mark.parametrize("case", range(len(TINY)))
@pytest.mark.parametrize("seed", [0, 1])
def test_expected_cost_by_enumeration(case, seed, table):
    """The sum over all Shapes of their probability times their cost, with its gradient; entries
    past the candidates of a row are ignored."""
    space, shapes, costs, slow = tiny_shapes(case, seed, table)
    for shape in shapes[::max(1, len(shapes) // 50)]:
        assert math.isclose(space.cost_of(shape), slow(shape), rel_tol=1e-12)
    p, q = random_distribution(space, seed)
    log_p, log_q = p.log().tolist(), q.log().tolist()
    chance = [math.exp(log_probability(space, shape, log_p, log_q)) for shape in shapes]
    assert math.isclose(sum(chance), 1)
    total = sum(c * one for c, one in zip(chance, costs.tolist()))
    assert math.isclose(tas.expected_macs(space, p, q), total, rel_tol=1e-12)
    p[p == 0], q[q == 0] = 0.5, 0.5
    assert math.isclose(tas.expected_macs(space, p, q), total, rel_tol=1e-12)
    p.requires_grad_(), q.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, q: tas.expected_macs(space, p, q) / total, (p, q))

@pytest.mark.parametrize("arch", CIFAR + IMAGENET)
@settings(max_examples=4)
@given(seed=st.integers(0, 2 ** 32))
def test_expected_macs_of_one_hots_are_the_macs(arch, seed):
    rng, space = random.Random(seed), tas.Space(arch)
    width = [rng.randrange(len(row)) for row in space.widths]
    depth = [rng.randrange(len(row)) for row in space.depths]
    macs = slow_macs(space.shape(width, depth))
    p = F.one_hot(torch.tensor(width), space.num_widths)
    q = F.one_hot(torch.tensor(depth), space.num_depths)
    assert tas.expected_macs(space, p, q).item() == macs
    assert tas.argmax_macs(space, p * 0.4 + 0.1, q * 0.4 + 0.1).item() == macs
    assert tas.count_macs(space.shape(width, depth)) == macs

# ---- Networks -----------------------------------------------------------------------------------

def random_bn(net):
    """Random BN weights and statistics; fresh ones would hide mistakes."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for t, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5),
                                 (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2)):
                torch.nn.init.uniform_(t, low, high)
    return net

def test_absent_candidates_stay_absent():
    """The decay of alpha moves them, by about a learning rate a step."""
    space = tas.Space("resnet20", round_to=8)
    net = tas.SuperResNet(space)
    optimizer = torch.optim.Adam([net.alpha], 30, tas.ARCH_BETAS,
                                 weight_decay=tas.ARCH_WEIGHT_DECAY)
    net.alpha.grad = torch.zeros_like(net.alpha)
    for _ in range(2000):
        optimizer.step()
    p, _ = net.probabilities()
    assert not space.has_width.all() and (p[~space.has_width] == 0).all()
    assert (p[space.has_width] > 0).all()

@pytest.mark.parametrize("arch, last", [("resnet20", 1), ("resnet50", 0)])
def test_initial_weights(arch, last):
    """Convs are normal with variance 2 / (k^2 output channels). On ImageNet the last BN of every
    block is zero, all other ones are one."""
    torch.manual_seed(0)
    space, scales = tas.Space(arch), []
    net, searched = tas.ResNet(space.full), tas.SuperResNet(space)
    for weight in (m.weight for m in (*net.modules(), *searched.modules())
                   if isinstance(m, torch.nn.Conv2d)):
        std = math.sqrt(2 / (weight.shape[0] * weight.shape[2] * weight.shape[3]))
        error = 5 / math.sqrt(weight.numel())  # of a mean, in standard deviations
        assert abs(weight.mean() / std) < error and abs(weight.std() / std - 1) < error
        assert weight.abs().max() > 2 * std  # which uniform ones would not reach
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            scales.append((module.weight, name.endswith(f"bn{len(KERNELS[arch])}")))
    ends = [block.convs[-1] for stage in searched.stages for block in stage]
    for layer in searched.modules():
        if isinstance(layer, tas.MixedConv):
            scales.append((affine(searched, layer)[0], layer in ends))
    assert len(scales) == {"resnet20": 2 * 21, "resnet50": 2 * 53}[arch]
    for scale, is_last in scales:
        assert (scale == (last if is_last else 1)).all()

@pytest.mark.parametrize("arch, params", [("resnet18", 11689512), ("resnet34", 21797672),
                                          ("resnet50", 25557032), ("resnet101", 44549160)])
def test_full_shapes_are_torchvision_s_networks(arch, params):
    torch.manual_seed(0)
    theirs = random_bn(torchvision.models.get_model(arch, weights=None)).double().eval()
    shape = tas.Space(arch, 1000, 64).full
    ours = tas.ResNet(shape).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert tas.count_params(shape) == params
    x = torch.randn(2, 3, 64, 64).double()
    with torch.no_grad():
        assert close(ours(x), theirs(x), 1e-10)

def test_a_stage_that_is_replaced_is_used():
    net, x = tas.ResNet(tas.Shape.unpruned("resnet20", 10)).eval(), torch.randn(2, 3, 32, 32)
    net.layer3 = torch.nn.Sequential(net.layer3[0])
    assert close(net(x), net.fc(net.layer3(net.layer2(net.layer1(
        net.bn1(net.conv1(x)).relu()))).mean((2, 3))))

@pytest.mark.parametrize("size", [8, 9])
def test_cifar_shortcut_is_average_pooling_and_a_projection(size):
    torch.manual_seed(0)
    shape = random_shape("resnet20", 3, image_size=size)
    block = random_bn(tas.ResNet(shape)).double().eval().layer2[0]
    x = torch.randn(2, shape.stages[0][-1][-1], size, size).double()

    def bn(m, y):
        return F.batch_norm(y, m.running_mean, m.running_var, m.weight, m.bias)

    half = -(-size // 2)
    pooled = torch.stack([x[:, :, 2 * i:2 * i + 2, 2 * j:2 * j + 2].mean((2, 3))
                          for i in range(half) for j in range(half)], 2).unflatten(2, (half, half))
    conv, norm = block.downsample
    shortcut = bn(norm, torch.einsum("oc,nchw->nohw", conv.weight[:, :, 0, 0], pooled))
    y = bn(block.bn1, F.conv2d(x, block.conv1.weight, stride=2, padding=1)).relu()
    y = bn(block.bn2, F.conv2d(y, block.conv2.weight, padding=1))
    assert close(block(x), (y + shortcut).relu(), 1e-12)

# ---- Transformable network: channel-wise interpolation ------------------------------------------

def adaptive(x, m):
    """Adaptive average pooling along dimension 1 of x [N, C, ...]."""
    y = x.flatten(2).transpose(1, 2)  # [N, rest, C]
    return F.adaptive_avg_pool1d(y, m).transpose(1, 2).unflatten(2, x.shape[2:])

def test_cwi_is_adaptive_pooling():
    """The identity where the widths agree; padded, it has zeros around it."""
    for c_out in range(1, 25):
        all_padded = tas.cwi_matrix(torch.arange(1, 25)[:, None, None], torch.tensor(c_out), 27,
                                    torch.float64)  # [24, 27, 27]
        for c_in, padded in zip(range(1, 25), all_padded):
            eye = torch.eye(c_in).double()
            expected = F.adaptive_avg_pool1d(eye[None], c_out)[0].T  # [c_out, c_in]
            found = tas.cwi_matrix(c_in, c_out, dtype=torch.float64)
            torch.testing.assert_close(found, expected)
            assert c_in != c_out or found.equal(eye)
            assert padded.equal(F.pad(found, (0, 27 - c_in, 0, 27 - c_out)))

@given(st.integers(1, 2048), st.integers(1, 2048), st.integers(0, 99))
def test_cwi_of_large_widths(c_in, c_out, seed):
    x = torch.randn(2, c_in, 3, generator=torch.Generator().manual_seed(seed)).double()
    y = tas.channel_wise_interpolation(x, c_out)
    assert y.shape == (2, c_out, 3)
    torch.testing.assert_close(y, adaptive(x, c_out))

# ---- Transformable network: sampling ------------------------------------------------------------

ROWS = 20_000
LOGITS = torch.tensor([0.5, -1.0, 1.5, 0.0, -0.3, 0.8])

@given(st.integers(2, 8), st.integers(1, 9), st.floats(0.1, 10), st.booleans(), st.integers(0, 99))
def test_samples_are_distinct_and_weights_sum_to_one(k, num_samples, tau, gumbel, seed):
    torch.manual_seed(seed)
    alpha, beta = 3 * torch.randn(50, k).double(), 3 * torch.randn(4, 5).double()
    index, weight, depth = tas.sample_sizes(alpha, beta, tau, num_samples, gumbel)
    count = min(num_samples, k)
    assert index.shape == weight.shape == (50, count) and depth.shape == (4, 5)
    assert all(len({*row}) == count and {*row} <= {*range(k)} for row in index.tolist())
    assert weight.min() >= 0 and close(weight.sum(1), torch.ones(50))
    assert depth.min() >= 0 and close(depth.sum(1), torch.ones(4))
    if not gumbel:  # the plain probabilities, whatever tau
        p = alpha.softmax(1).gather(1, index)
        assert close(weight, p / p.sum(1, keepdim=True)) and close(depth, beta.softmax(1))

def test_pairs_are_drawn_without_replacement():
    """Without Gumbel noise z is fixed: the first is i with probability p_i = softmax(z)_i, the
    second then j with p_j / (1 - p_i)."""
    torch.manual_seed(0)
    index = tas.sample_sizes(LOGITS.repeat(ROWS, 1), torch.zeros(1, 2), 3.0, gumbel=False).index
    p = LOGITS.softmax(0).tolist()
    pairs = list(itertools.permutations(range(6), 2))
    probabilities = torch.tensor([p[i] * p[j] / (1 - p[i]) for i, j in pairs])
    drawn = (index[:, 0] * 6 + index[:, 1]).bincount(minlength=36)
    counts = torch.stack([drawn[6 * i + j] for i, j in pairs])
    assert counts.sum() == ROWS
    assert chi_square(counts, probabilities) < 2
    assert chi_square(counts, torch.full((30,), 1 / 30)) > 20  # the check can fail

def test_most_weighted_sizes_follow_the_distribution():
    """argmax(log p + noise) is distributed as p, whatever tau; a low one makes it one-hot."""
    torch.manual_seed(0)
    logits = LOGITS.repeat(ROWS, 1)
    for tau in (1e-6, 0.05, 1.0):
        index, weight, depth = tas.sample_sizes(logits, logits, tau, 6)
        heaviest = index.gather(1, weight.argmax(1, keepdim=True))[:, 0]
        for sizes in (heaviest, depth.argmax(1)):
            assert chi_square(sizes.bincount(minlength=6), LOGITS.softmax(0)) < 3.5
        one_hot = torch.cat([weight, depth]).amax(1) > 0.999
        assert one_hot.double().mean() > 0.99 if tau == 1e-6 else not one_hot.all()
    # The draw has a second noise: at a high tau z is flat, and all candidates are drawn alike.
    index = tas.sample_sizes(logits, torch.zeros(1, 2), 1e4, 1).index
    assert chi_square(index[:, 0].bincount(minlength=6), torch.full((6,), 1 / 6)) < 3.5

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gumbel", [True, False])
def test_samples_are_finite_for_extreme_logits(dtype, gumbel):
    torch.manual_seed(0)
    signs = torch.randint(0, 2, (2000, 8)) * 100.0 - 50.0
    alpha, beta = (signs.to(dtype).requires_grad_() for _ in range(2))
    sample = tas.sample_sizes(alpha, beta, 0.1, 2, gumbel)
    (sample.weight.square().sum() + sample.depth.square().sum()).backward()
    for t in (sample.weight, sample.depth, alpha.grad, beta.grad):
        assert t.isfinite().all()
    torch.testing.assert_close(sample.weight.sum(1).float(), torch.ones(2000))

@pytest.mark.parametrize("gumbel", [True, False])
def test_samples_are_differentiable(gumbel):
    torch.manual_seed(0)
    alpha = torch.randn(3, 5).double().requires_grad_()
    beta = torch.randn(2, 4).double().requires_grad_()

    def weights(alpha, beta):
        torch.manual_seed(7)
        return tas.sample_sizes(alpha, beta, 1.5, 3, gumbel)[1:]

    assert torch.autograd.gradcheck(weights, (alpha, beta))

# ---- Transformable network: the network ---------------------------------------------------------

def to_width(x, m, align):
    return adaptive(x, m) if align == "cwi" else F.pad(x, (0, 0, 0, 0, 0, m - x.shape[1]))

def affine(net, layer):
    """Scale and shift [K, C] of the BNs of a searched conv."""
    for convs, mix in zip(net.groups.values(), net.mixes):
        if layer in convs:
            return mix.scale[convs.index(layer)], mix.shift[convs.index(layer)]

def slow_conv(net, layer, x, stride, widths, index, weight):
    """The searched conv as the paper tells it: slice, one BN per candidate, align, weigh, sum."""
    (scale, shift), kernel = affine(net, layer), layer.conv.weight[:, :x.shape[1]]
    y = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
    drawn = [(i, w) for i, w in zip(index, weight) if i < len(widths)]  # others do not exist
    m, mixed = max(widths[i] for i, _ in drawn), 0
    for i, w in drawn:
        c = widths[i]
        part = F.batch_norm(y[:, :c], None, None, scale[i, :c], shift[i, :c], True)
        mixed = mixed + w * to_width(part, m, net.align)
    return mixed

def slow_block(net, block, x, rows, halved):
    """rows: for every conv its candidate widths, the drawn indices and their weights."""
    y, arch = x, net.space.full.arch
    for i, (layer, row) in enumerate(zip(block.convs, rows)):
        stride = 2 if halved and i == KERNELS[arch].index(3) else 1
        y = slow_conv(net, layer, y if i == 0 else F.relu(y), stride, *row)
    if block.projection is not None:
        stride = 2 if halved and arch in IMAGENET else 1
        x = F.avg_pool2d(x, 2, ceil_mode=True) if halved and arch in CIFAR else x
        x = slow_conv(net, block.projection, x, stride, *rows[-1])
    m = max(x.shape[1], y.shape[1])
    return F.relu(to_width(x, m, "pad") + to_width(y, m, "pad"))

def slow_supernet(net, x, sample):
    space, arch = net.space, net.space.full.arch
    rows = iter(list(zip(space.widths, sample.index.tolist(), sample.weight)))
    x = F.relu(slow_conv(net, net.stem, x, 1 if arch in CIFAR else 2, *next(rows)))
    x = x if arch in CIFAR else F.max_pool2d(x, 3, 2, 1)
    for s, (stage, depths) in enumerate(zip(net.stages, space.depths)):
        outputs = {}
        for b, block in enumerate(stage):
            mine = [next(rows) for _ in KERNELS[arch]]
            x = outputs[b + 1] = slow_block(net, block, x, mine, s > 0 and b == 0)
        m = max(outputs[d].shape[1] for d in depths)
        x = sum(q * to_width(outputs[d], m, net.align) for q, d in zip(sample.depth[s], depths))
    return F.linear(x.mean((2, 3)), net.fc.weight[:, :x.shape[1]], net.fc.bias)

def check_supernet(space, num_samples, align, seed=0, batch=4):
    """In float64, outputs and gradients with respect to every parameter; all of these are random,
    as fresh BNs and logits would hide mistakes."""
    torch.manual_seed(seed)
    net = tas.SuperResNet(space, align).double()
    params = dict(net.named_parameters())
    with torch.no_grad():
        for name, p in params.items():
            if "scale" in name or "shift" in name:
                p += 0.3 * torch.randn_like(p)
            elif name in ("alpha", "beta"):  # those of present candidates
                p += torch.where(p > -1, torch.randn_like(p), 0)
    x = torch.randn(batch, 3, space.full.image_size, space.full.image_size).double()
    toward = torch.randn(batch, 10).double()
    results = []
    for forward in (net, functools.partial(slow_supernet, net)):
        torch.manual_seed(seed + 1)
        sample = tas.sample_sizes(net.alpha, net.beta, 2.0, num_samples)
        for index, widths in zip(sample.index.tolist(), space.widths):  # absent ones come last
            assert len({k for k in index if k < len(widths)}) == min(num_samples, len(widths))
        y = forward(x, sample)
        grads = torch.autograd.grad((y * toward).sum(), list(params.values()),
                                    materialize_grads=True)
        results.append((y.detach(), dict(zip(params, grads))))
    (y, grads), (slow_y, slow_grads) = results
    assert close(y, slow_y)
    largest = max(g.abs().max() for g in slow_grads.values())
    for name, grad in grads.items():
        slow = slow_grads[name]
        assert (grad - slow).abs().max() <= 1e-8 * slow.abs().max() + 1e-12 * largest, name
    for name, rows in (("alpha", space.widths), ("beta", space.depths)):
        choice = torch.tensor([len(row) > 1 for row in rows])
        moved = grads[name].abs().amax(1) > 0
        assert moved.equal(choice) or (name, num_samples) == ("alpha", 1)

@pytest.mark.parametrize("num_samples, align, seed", [
    (1, "cwi", 0), (2, "cwi", 0), (2, "cwi", 1), (2, "pad", 0), (3, "cwi", 0), (8, "cwi", 0)])
@pytest.mark.parametrize("arch, size, blocks, share", [
    ("resnet20", 8, (3, 3, 3), 1), ("resnet20", 16, (3, 2, 1), 1), ("resnet164", 16, (2, 1, 2), 1),
    ("resnet18", 64, (2, 2, 1, 2), 4), ("resnet50", 64, (2, 1, 1, 2), 4)])
def test_supernet_is_the_slow_one(arch, size, blocks, share, num_samples, align, seed):
    """Few blocks of every kind, all candidate widths; of ImageNet a quarter of the channels."""
    full = tas.Space(arch).full
    stages = [[[c // share for c in widths] for widths in stage[:n]]
              for stage, n in zip(full.stages, blocks)]
    space = make_space(arch, size, stages, full.stem // share,
                       lambda j, c: tuple(c * k // 10 for k in range(3, 11)))
    check_supernet(space, num_samples, align, seed)

@pytest.mark.parametrize("arch, options, num_samples, align", [
    ("resnet164", {}, 2, "cwi"), ("resnet18", {"image_size": 32}, 3, "cwi"),
    *[("resnet20", options, 2, align) for align in ("cwi", "pad") for options in (
        {"search": "width"}, {"search": "depth"}, {"round_to": 8}, {"image_size": 13})],
    ("resnet20", {"round_to": 16}, 2, "cwi"),  # fewer candidates than samples: all are mixed
    ("resnet20", {"round_to": 8}, 3, "cwi"), ("resnet20", {"round_to": 8}, 8, "cwi")])
def test_supernet_is_the_slow_one_in_whole_spaces(arch, options, num_samples, align):
    check_supernet(tas.Space(arch, 10, **{"image_size": 8, **options}), num_samples, align, seed=5)

def test_logits_start_small_and_absent_candidates_are_never_drawn():
    torch.manual_seed(0)
    space = tas.Space("resnet101", round_to=16)
    net = tas.SuperResNet(space)
    present = torch.cat([row[:len(c)] for row, c in zip(net.alpha, space.widths)])
    assert abs(present.mean()) < 0.002 and abs(present.std() - 0.01) < 0.001
    for tau in (0.1, 10.0):
        sample = tas.sample_sizes(net.alpha, net.beta, tau, 1)
        assert all(index < len(c) for index, c in zip(sample.index, space.widths))
        for weights, depths in zip(sample.depth, space.depths):
            assert weights[:len(depths)].sum().item() == pytest.approx(1)
            assert (weights[len(depths):] == 0).all()

# ---- Search objective ---------------------------------------------------------------------------

@given(st.floats(0.1, 10), st.floats(0.01, 0.5), st.floats(1e3, 1e10))
def test_cost_loss(ratio, tolerance, expected):
    target = 1e6
    e = torch.tensor(expected, dtype=torch.float64, requires_grad=True)
    loss = tas.cost_loss(e, ratio * target, target, tolerance)
    sign = 1 if ratio > 1 + tolerance else -1 if ratio < 1 - tolerance else 0
    assert math.isclose(loss.item(), sign * math.log(expected), rel_tol=1e-12)
    grad, = torch.autograd.grad(loss, e)
    assert math.isclose(grad.item(), sign / expected, rel_tol=1e-12)

def test_cost_loss_moves_every_row_outside_the_band():
    """The edges of the band belong to it; the tolerance is 5% unless another is given."""
    space = tas.Space("resnet18")
    net = tas.SuperResNet(space)
    expected = tas.expected_macs(space, *net.probabilities())
    for actual, sign in ((105, 0), (95, 0), (106, 1), (94, -1)):
        loss = tas.cost_loss(expected, torch.tensor(actual), 100)
        assert math.isclose(loss.item(), sign * math.log(expected.item()), rel_tol=1e-12)
    for grad in torch.autograd.grad(loss, (net.alpha, net.beta)):
        assert grad.isfinite().all() and (grad.abs().amax(1) > 0).all()

KINDS = {"small": lambda t: t * 0.01, "large": lambda t: t * 50, "huge": lambda t: t * 1e6,
         "ties": lambda t: t.round(), "equal": lambda t: t * 0 + 3,
         "infinite": lambda t: torch.where(t > 1, math.inf, t)}

def draw_logits(space, kind, seed):
    g = torch.Generator().manual_seed(seed)
    tables = [torch.randn(len(space.widths), space.num_widths, generator=g),
              torch.randn(len(space.depths), space.num_depths, generator=g)]
    return [KINDS[kind](t) for t in tables]

def check_extract(space, kind, seed, share, tolerance=0.05):
    """The result is in the band."""
    alpha, beta = draw_logits(space, kind, seed)
    smallest = space.shape([0] * len(space.widths), [0] * len(space.depths))
    target = (1 - share) * slow_macs(smallest) + share * slow_macs(space.full)
    shape = tas.extract(space, alpha, beta, target, tolerance)
    assert abs(slow_macs(shape) - target) <= tolerance * target
    log_probability(space, shape, alpha, beta)  # fails where a size is no candidate

@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(st.sampled_from(["resnet20", "resnet18"] * 4 + ["resnet32", "resnet110", "resnet34"]),
       st.integers(0, 2 ** 32), st.floats(0, 1), st.floats(0.01, 0.2))
def test_extract_is_in_the_band(kind, arch, seed, share, tolerance):
    check_extract(tas.Space(arch), kind, seed, share, tolerance)

@pytest.mark.parametrize("arch, kind, share, round_to", [
    ("resnet164", "large", 0.3, 1), ("resnet50", "small", 0.5, 1), ("resnet101", "ties", 0.4, 1),
    *[(arch, "large", share, 8) for arch in ("resnet20", "resnet56", "resnet18", "resnet34")
      for share in (0.05, 0.3, 0.7, 1)]])
def test_extract_is_in_the_band_of_other_spaces(arch, kind, share, round_to):
    """Bottlenecks, and widths that are multiples of 8."""
    check_extract(tas.Space(arch, round_to=round_to), kind, 0, share)

@settings(max_examples=15)
@given(st.sampled_from(["resnet20", "resnet56", "resnet18"]), st.integers(0, 2 ** 32),
       st.floats(-0.049, 0.049))
def test_extract_returns_the_argmax_in_the_band(arch, seed, off):
    space = tas.Space(arch)
    alpha, beta = draw_logits(space, "large", seed)
    most = space.shape([row[:len(c)].argmax() for row, c in zip(alpha, space.widths)],
                       [row[:len(c)].argmax() for row, c in zip(beta, space.depths)])
    assert tas.extract(space, alpha, beta, slow_macs(most) / (1 + off)) == most

@pytest.mark.parametrize("table", [None, 2])
@pytest.mark.parametrize("case", range(len(TINY)))
@settings(max_examples=12)
@given(st.integers(0, 2), st.sampled_from([*KINDS][:-1]), st.integers(0, 2 ** 32),
       st.floats(0, 1), st.floats(-0.49, 0.49), st.floats(0.005, 0.3))
def test_extract_by_enumeration(case, table, space_seed, kind, seed, which, off, tolerance):
    """In the band, and no Shape in its inner half is more probable; the conv of a dropped block
    counts as much as its most probable width."""
    space, shapes, costs, slow = tiny_shapes(case, space_seed, table)
    alpha, beta = draw_logits(space, kind, seed)
    target = float(costs[int(which * (len(costs) - 1))]) / (1 + off * tolerance)
    shape = tas.extract(space, alpha, beta, target, tolerance)
    rounding = 0 if table is None else 1e-9  # MACs are whole
    assert abs(slow(shape) - target) <= tolerance * target * (1 + rounding)
    log_p, log_q = (
        [(row - row.max()).tolist() for row in
         [row[:len(c)].double().log_softmax(0) for row, c in zip(logits, candidates)]]
        for logits, candidates in ((alpha, space.widths), (beta, space.depths)))
    inner = ((costs - target).abs() <= tolerance * target / 2).nonzero().flatten().tolist()
    best = max(log_probability(space, shapes[i], log_p, log_q) for i in inner)
    found = log_probability(space, shape, log_p, log_q)
    assert found >= best - 1e-9 * max(1, abs(found))

@pytest.mark.parametrize("case", [*range(len(TINY)), "depths of resnet18"])
def test_extract_at_the_edges_of_what_is_possible(case):
    """It finds a Shape exactly when one is in the band, and else names what is possible."""
    space = tas.Space("resnet18", search="depth")  # 16 Shapes, far apart
    if case in range(len(TINY)):
        space = tiny_shapes(case, 0)[0]
    macs = sorted({slow_macs(shape) for shape in all_shapes(space)})
    gap, middle = max((b / a, (a + b) / 2) for a, b in zip(macs, macs[1:]))
    bands = [(macs[0], 0.05), (macs[-1], 0.05), (1.0, 0.05), (1e15, 0.05), (middle, (gap - 1) / 4)]
    for near in (0.99999, 1.00001):  # beside the bands that the smallest and the largest one end
        bands += [(macs[0] / 1.05 * near, 0.05), (macs[-1] / 0.95 * near, 0.05)]
    for one in macs[::max(1, len(macs) // 16)]:
        bands += [(one, 1e-3), (one / 1.0099, 0.01)]
    alpha, beta = draw_logits(space, "large", 0)
    for target, tolerance in bands:
        if any(abs(found - target) <= tolerance * target for found in macs):
            shape = tas.extract(space, alpha, beta, target, tolerance)
            assert abs(slow_macs(shape) - target) <= tolerance * target
        else:
            with pytest.raises(tas.TASError, match="no shape") as caught:
                tas.extract(space, alpha, beta, target, tolerance)
            for number in (macs[0], macs[-1], target):
                assert f"{number:,.0f}" in str(caught.value)

def test_drawn_shapes():
    """Uniform where the band leaves them alone; else in the band, and all different."""
    space = tas.Space("resnet20")
    full = tas.count_macs(space.full)
    torch.manual_seed(0)
    free = [tas.draw_shape(space, full / 2, 1.0) for _ in range(400)]
    for name, drawn in (("stem", [shape.stem for shape in free]),
                        ("depth", [len(shape.stages[1]) for shape in free]),
                        ("width", [shape.stages[2][0][1] for shape in free])):
        candidates = {"stem": space.widths[0], "depth": space.depths[1]}.get(name, space.widths[14])
        counts = torch.tensor([drawn.count(c) for c in candidates]).double()
        assert counts.sum() == 400
        assert chi_square(counts, torch.full_like(counts, 1 / len(counts))) < 3
    for share in (0.2, 0.8):
        drawn = [tas.draw_shape(space, share * full) for _ in range(20)]
        assert all(abs(slow_macs(shape) / (share * full) - 1) <= 0.05 for shape in drawn)
        assert len({shape for shape in drawn}) == 20

@pytest.mark.parametrize("arch", ["resnet20", "resnet18", "resnet50"])
@pytest.mark.parametrize("round_to", [1, 8])
def test_scaled_shapes(arch, round_to):
    """Of those whose widths are one factor times the full ones, the nearest."""
    space, macs = tas.Space(arch), {}
    for k in range(1, 513):
        def width(c):
            return min(c, max(1, round(c * k / 512 / round_to)) * round_to)
        stages = [[[width(c) for c in widths] for widths in blocks] for blocks in space.full.stages]
        shape = dataclasses.replace(space.full, stem=width(space.full.stem), stages=stages)
        macs[shape] = slow_macs(shape)
    for share in (0.1, 0.25, 0.4, 0.47, 0.8, 1):
        target = share * slow_macs(space.full)
        off = min(abs(found - target) for found in macs.values())
        shape = tas.scale_shape(space, target, 1.001 * off / target, round_to)
        assert abs(macs[shape] - target) == off
        if off:
            with pytest.raises(tas.TASError, match="no uniform width"):
                tas.scale_shape(space, target, 0.999 * off / target, round_to)

# ---- Knowledge transfer -------------------------------------------------------------------------

def random_logits(seed, n=6, classes=5):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(2, n, classes, generator=g).double()).unbind()
    return student.requires_grad_(), teacher, torch.randint(classes, (n,), generator=g)

def cross_entropy(z, y):
    return -z.log_softmax(1)[range(len(y)), y].mean()

def slow_kd(z, teacher_z, y, weight, temperature):
    p, q = (teacher_z / temperature).softmax(1), (z / temperature).softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    return (1 - weight) * cross_entropy(z, y) + weight * temperature ** 2 * kl

@given(st.floats(0, 1), st.floats(0.5, 10), st.integers(0, 999))
def test_kd_loss_by_formula(weight, temperature, seed):
    student, teacher, labels = random_logits(seed)
    for loss, slow in ((tas.kd_loss(student, teacher, labels, weight, temperature),
                        slow_kd(student, teacher, labels, weight, temperature)),
                       (tas.kd_loss(student, teacher, labels),
                        slow_kd(student, teacher, labels, 0.9, 4))):
        torch.testing.assert_close(loss, slow, rtol=1e-9, atol=0)
        assert close(*(torch.autograd.grad(value, student)[0] for value in (loss, slow)))

def test_kd_loss_is_cross_entropy_at_weight_0_and_stationary_at_the_teacher_at_1():
    student, teacher, labels = random_logits(0)
    loss, plain = tas.kd_loss(student, teacher, labels, 0.0), F.cross_entropy(student, labels)
    assert loss.equal(plain)
    assert torch.autograd.grad(loss, student)[0].equal(torch.autograd.grad(plain, student)[0])
    away = torch.autograd.grad(tas.kd_loss(student, teacher, labels, 1.0), student)[0]
    same = tas.kd_loss(student, student.detach(), labels, 1.0)
    assert same.abs() < 1e-12 and away.abs().max() > 0.01
    assert torch.autograd.grad(same, student)[0].abs().max() < 1e-12

@settings(max_examples=6)
@given(st.sampled_from(["resnet20", "resnet164", "resnet18"]), st.integers(0, 999))
def test_inherited_weights_are_the_first_channels(arch, seed):
    torch.manual_seed(seed)
    teacher = random_bn(tas.ResNet(tas.Shape.unpruned(arch, 10)))
    student = tas.ResNet(random_shape(arch, seed))
    before = copy.deepcopy(student.state_dict())
    source = teacher.state_dict()
    assert tas.inherit_weights(student, teacher) is student
    for name, tensor in student.state_dict().items():
        if name not in source:  # a projection that the teacher needs not
            assert ".downsample." in name and tensor.equal(before[name])
            continue
        corner = source[name]
        for dim, size in enumerate(tensor.shape):
            corner = corner.narrow(dim, 0, size)
        assert tensor.equal(corner), name
    with pytest.raises(tas.TASError, match="wider"):
        tas.inherit_weights(tas.ResNet(dataclasses.replace(student.shape, stem=65)), teacher)

# ---- Data ---------------------------------------------------------------------------------------

def random_images(count, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=g)
    return images, torch.randint(10, (count,), generator=g)

def slow_normalize(images):
    """uint8 [N, H, W, 3] -> float64 [N, 3, H, W]"""
    mean = torch.tensor([0.485, 0.456, 0.406]).double()
    std = torch.tensor([0.229, 0.224, 0.225]).double()
    return ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)

def test_augmentation_is_a_padded_crop_and_a_flip():
    """Each image, padded by 4 black pixels, is one of the 162 crops, plain and flipped, and all 162
    come about equally often."""
    images, labels = random_images(4000, 8)
    torch.manual_seed(0)
    order = torch.randperm(4000)
    batches = list(tas.SmallImages(images, labels, "cpu").batches(order, 250, train=True))
    assert [len(x) for x, _ in batches] == [250] * 16
    found, given_labels = (torch.cat(part) for part in zip(*batches))
    assert given_labels.equal(labels[order])
    padded = F.pad(images[order], (0, 0, 4, 4, 4, 4))
    counts, matches = [], torch.zeros(4000)
    for top, left, flip in itertools.product(range(9), range(9), (False, True)):
        crop = padded[:, top:top + 8, left:left + 8]
        crop = slow_normalize(crop.flip(2) if flip else crop)
        match = (found - crop).abs().flatten(1).amax(1) < 1e-4
        counts.append(match.sum())
        matches += match
    assert matches.equal(torch.ones(4000))
    counts = torch.stack(counts).view(9, 9, 2)
    assert chi_square(counts.flatten(), torch.full((162,), 1 / 162)) < 1.5
    for dims in ((1, 2), (0, 2), (0, 1)):
        n = counts.sum(dims)
        assert chi_square(n, torch.full((len(n),), 1 / len(n))) < 4

@pytest.mark.parametrize("batch_size, full, rest", [
    (7, 4, [2]), (10, 3, []), (30, 1, []), (31, 0, [30])])
def test_batches(batch_size, full, rest):
    """Without augmentation all images, in order; a training drops the incomplete batch."""
    images, labels = random_images(30, 12)
    data, order = tas.SmallImages(images, labels, "cpu"), torch.randperm(30)
    state = torch.get_rng_state()
    batches = list(data.batches(order, batch_size, train=False))
    assert torch.get_rng_state().equal(state)
    assert [len(x) for x, _ in batches] == [batch_size] * full + rest
    found, given_labels = (torch.cat(part) for part in zip(*batches))
    assert found.dtype == torch.float32 and given_labels.equal(labels[order])
    torch.testing.assert_close(found.double(), slow_normalize(images[order]), rtol=0, atol=1e-5)
    with pytest.raises(tas.TASError, match="uint8"):
        tas.normalize(found)
    training = list(data.batches(order, batch_size, train=True))
    assert [(len(x), len(y)) for x, y in training] == [(batch_size, batch_size)] * full
    for x, _ in batches + training:
        assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()

@pytest.mark.parametrize("train", [True, False])
def test_two_processes_share_the_batch(train):
    images, labels = random_images(50, 8)
    data, order, parts = tas.SmallImages(images, labels, "cpu"), torch.arange(50), []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        torch.manual_seed(3)
        parts.append(list(data.batches(order, 20, train, rank, world)))
    assert len(parts[0]) == (2 if train else 3)
    for (x, y), (x0, y0), (x1, y1) in zip(*parts, strict=True):
        assert x[0::2].equal(x0) and x[1::2].equal(x1)
        assert y[0::2].equal(y0) and y[1::2].equal(y1)

@given(st.lists(st.integers(0, 6), min_size=2, max_size=60), st.integers(0, 99))
def test_halves_are_balanced(labels, seed):
    labels = torch.tensor(labels)
    first, second = tas.split_halves(labels, seed)
    assert sorted(torch.cat([first, second]).tolist()) == list(range(len(labels)))
    assert abs(len(first) - len(second)) <= 1
    for c in labels.unique():
        assert abs(int((labels[first] == c).sum()) - int((labels[second] == c).sum())) <= 1

def test_halves_are_seeded():
    labels = torch.arange(1000) % 10
    halves = [tas.split_halves(labels, seed)[0].sort().values for seed in (0, 0, 1)]
    assert halves[0].equal(halves[1]) and not halves[0].equal(halves[2])
    assert len(halves[0]) == 500
    common = len(set(halves[0].tolist()) & set(halves[2].tolist()))
    assert 190 < common < 310  # 250 are expected of independent halves

def test_a_linear_model_cannot_separate_the_synthetic_data():
    """Ridge regression on the pixels, with the best of three penalties."""
    data = tas.load_data("synthetic", None, 32, torch.device("cpu"), 0)
    (x, y), (test_x, test_y) = (
        next(split.batches(torch.arange(len(split.labels)), 10 ** 6, False)) for split in data[:2])
    assert y.bincount().min() >= 400 and len(data.classes) == 10
    x, test_x = x.flatten(1), test_x.flatten(1)
    gram, cross, accuracies = x.T @ x, x.T @ F.one_hot(y, 10).float(), []
    for penalty in (1e2, 1e4, 1e6):
        w = torch.linalg.solve(gram + penalty * torch.eye(len(gram)), cross)
        accuracies.append(float(((test_x @ w).argmax(1) == test_y).float().mean()))
    assert max(accuracies) < 0.4

def write_images(root, classes="ab", train=12, val=4, size=8, mode="RGB"):
    """An ImageFolder of noise; the classes differ in brightness."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for c, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                shape, brightest = (size, size, 3), min(176 + 40 * c, 256)
                pixels = rng.integers(40 * c, brightest, shape, dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")

def test_images_without_classes_are_no_test_set(tmp_path):
    """ImageNet's own test/ has no labels, and its val/ is used; else test/ comes first."""
    write_images(tmp_path)
    (tmp_path / "test").mkdir()
    shutil.copy(tmp_path / "val/a/0.png", tmp_path / "test/x.png")
    assert tas.open_folders(tmp_path)[1].root == tmp_path / "val"
    for name in "ab":
        shutil.copytree(tmp_path / f"val/{name}", tmp_path / f"test/{name}")
    assert tas.open_folders(tmp_path)[1].root == tmp_path / "test"

@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA"])
def test_other_kinds_of_images_are_converted(tmp_path, mode):
    write_images(tmp_path, mode=mode)
    data = tas.load_data("folder", str(tmp_path), 8, torch.device("cpu"), 0)
    for split, part in ((data.train, "train"), (data.test, "val")):
        files = sorted((tmp_path / part).rglob("*.png"))
        images = np.stack([Image.open(file).convert("RGB") for file in files])
        bordered = split.pixels.view(-1, split.side, split.side, 3)
        inner = bordered[:, 4:-4, 4:-4]  # without the border for crops
        assert inner.numpy().tobytes() == images.tobytes() and images.std() > 0

@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files cannot be counted")
def test_many_images_are_read_with_few_open_files(tmp_path):
    """Each batch of a worker is a file until it is dropped."""
    for name in "ab":
        (tmp_path / name).mkdir()
        image = Image.new("RGB", (8, 8), (7, 8, 9) if name == "a" else (1, 2, 3))
        image.save(tmp_path / name / "0.bmp")
        for i in range(1, 2000):
            (tmp_path / name / f"{i}.bmp").symlink_to(tmp_path / name / "0.bmp")
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        opened = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 14, hard))
        images, labels = tas.read_all(tas.open_folder(tmp_path), 8, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    assert images.shape == (4000, 8, 8, 3) and labels.tolist() == [0] * 2000 + [1] * 2000
    for label, colour in enumerate(((7, 8, 9), (1, 2, 3))):
        assert (images[labels == label] == torch.tensor(colour)).all()

def make_photographs(root):
    """JPEG files of smooth colours, of many sizes, one of them grey and one for printers."""
    rng = np.random.default_rng(1)
    for part, count in (("train", 8), ("val", 3)):
        for name in ("n01", "n02"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize((90 + 7 * i, 120 - 2 * i), Image.BICUBIC)
                image = image.convert({0: "L", 1: "CMYK"}.get(i, "RGB"))
                image.save(root / part / name / f"{name}_{i}.JPEG")

@pytest.mark.parametrize("size, resized", [(32, 32), (64, 64), (72, 82), (224, 256)])
def test_test_images_are_resized_and_cropped(tmp_path, size, resized):
    """The shorter side to the size, or 256/224 of a large one; then the centre."""
    make_photographs(tmp_path)
    data = tas.load_data("folder", str(tmp_path), size, torch.device("cpu"), 0)
    [(images, labels)] = data.test.batches(torch.arange(6), 6, False)
    assert labels.tolist() == [0] * 3 + [1] * 3 and images.shape == (6, 3, size, size)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for x, path in zip(images, sorted((tmp_path / "val").rglob("*.JPEG"))):
        image = Image.open(path).convert("RGB")
        short = min(image.size)
        image = image.resize([int(resized * side / short) for side in image.size], Image.BILINEAR)
        left, top = [round((side - size) / 2) for side in image.size]
        pixels = np.asarray(image.crop((left, top, left + size, top + size)))
        expected = torch.tensor((pixels / 255 - mean) / std).permute(2, 0, 1).float()
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=0)
        assert torch.equal(tas.preprocess(Image.open(path), size), x[None])

@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_torchvision_s(monkeypatch, name):
    """Training images are for training, test images for the test, in torchvision's order."""
    class Fake:
        base_folder, filename, classes = "folder", "file", [*"abcdefghij"]

        def __init__(self, root, train, download):
            images, labels = random_images(6 if train else 4, 32)
            self.data, self.targets = images.numpy(), labels.tolist()

    monkeypatch.setattr(torchvision.datasets, name.upper(), Fake)
    data = tas.load_data.__wrapped__(name, "", 32, torch.device("cpu"), 0)
    assert data.classes == Fake.classes
    for split, count in ((data.train, 6), (data.test, 4)):
        images, labels = random_images(count, 32)
        [(x, y)] = split.batches(torch.arange(count), count, False)
        assert y.equal(labels)
        torch.testing.assert_close(x.double(), slow_normalize(images), rtol=0, atol=1e-5)

def test_many_small_images(tmp_path):
    """More than are read at once."""
    write_images(tmp_path, train=260, val=1)
    data = tas.load_data("folder", str(tmp_path), 8, torch.device("cpu"), 0)
    assert len(data.train.labels) == len(data.train.pixels) // 16 ** 2 == 520

def test_large_images_are_augmented(tmp_path):
    """An item is cropped, mirrored and coloured anew every time; its hue stays. The image is a
    sawtooth of ten teeth in red: a crop shows some of them, and a mirror turns them round."""
    tooth = np.arange(100) % 10 * 5
    row = np.stack([80 + tooth, 60 + tooth, 60 + tooth], 1).astype(np.uint8)
    for part, name in itertools.product(("train", "val"), "ab"):
        (tmp_path / part / name).mkdir(parents=True)
        Image.fromarray(np.tile(row, (100, 1, 1))).save(tmp_path / part / name / "0.png")
    data = tas.load_data("folder", str(tmp_path), 72, torch.device("cpu"), 0)
    torch.manual_seed(0)
    x = torch.cat([x for _ in range(2) for x, _ in data.train.batches(
        torch.zeros(64, dtype=torch.int64), 64, True)])
    assert len({image.numpy().tobytes() for image in x}) == 128
    mean, std = (torch.tensor(t).view(3, 1) for t in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    red, green, blue = (255 * (x[:, :, 36] * std + mean)).round().unbind(1)  # [128, 72] each
    assert green.equal(blue)
    steps = [row[row != 0].sign() for row in green.diff()]
    teeth = [int((row[1:] != row[:-1]).sum()) / 2 for row in steps]
    assert min(teeth) <= 3 and max(teeth) >= 8
    assert 40 < sum(float(row.sum()) < 0 for row in steps) < 88
    height = green.amax(1) - green.amin(1)
    colour = (red - green).mean(1) / height  # 20 / 45, whatever the brightness and the contrast
    assert colour.min() < 0.33 and colour.max() > 0.55
    assert height.min() < 30 and height.max() > 60

def test_large_images_are_read_by_so_many_workers(tmp_path, monkeypatch):
    write_images(tmp_path, size=80)
    seen, plain = [], torch.utils.data.DataLoader.__init__
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", lambda *inputs, **named: (
        seen.append(named["num_workers"]) or plain(*inputs, **named)))
    data = tas.load_data.__wrapped__("folder", str(tmp_path), 72, torch.device("cpu"), 2)
    next(data.train.batches(torch.arange(8), 4, True))
    assert seen == [2]

@pytest.mark.parametrize("train", [True, False])
def test_two_processes_share_the_batch_of_large_images(tmp_path, train):
    write_images(tmp_path, train=5, size=80)
    data, parts = tas.load_data("folder", str(tmp_path), 72, torch.device("cpu"), 0), []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        torch.manual_seed(3)
        parts.append(list(data.train.batches(torch.arange(10), 4, train, rank, world)))
    assert len(parts[0]) == (2 if train else 3)
    for (x, y), (x0, y0), (x1, y1) in zip(*parts, strict=True):
        assert x[0::2].equal(x0) and x[1::2].equal(x1)
        assert y[0::2].equal(y0) and y[1::2].equal(y1)

# ---- Training and search ------------------------------------------------------------------------

@pytest.mark.parametrize("arch", ["resnet20", "resnet164", "resnet18"])
def test_padded_networks_compute_the_same(arch):
    torch.manual_seed(0)
    net = random_bn(tas.ResNet(random_shape(arch, 5, image_size=32))).double()
    padded, x = tas.pad_channels(copy.deepcopy(net)), torch.randn(4, 3, 32, 32).double()
    for module in padded.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.shape[0] % 8 == 0 and module.weight.shape[1] % 8 in (0, 3)
    assert close(padded(x), net(x)) and close(padded.eval()(x), net.eval()(x))

@pytest.mark.parametrize("arch", ["resnet20", "resnet164", "resnet18"])
def test_padding_is_the_least(arch):
    net = tas.ResNet(random_shape(arch, 5, image_size=32))
    for old, new in zip(net.parameters(), tas.pad_channels(copy.deepcopy(net)).parameters()):
        assert all(0 <= b - a < 8 for a, b in zip(old.shape, new.shape))

def test_learning_rates():
    """A warm-up of 2.5 of 10 steps never exceeds the highest rate; at its end the cosine begins."""
    optimizer, rates = torch.optim.SGD([torch.zeros(1)]), []
    for step in range(10):
        tas.set_learning_rate(optimizer, step, 10, 2.5, 0.2)
        rates.append(optimizer.param_groups[0]["lr"])
    cosine = [0.1 * (1 + math.cos(math.pi * (step - 2.5) / 7.5)) for step in range(3, 10)]
    assert rates == pytest.approx([0.08, 0.16, 0.2, *cosine])

def test_temperatures():
    assert tas.gumbel_temperature(0, 1) == 10
    for epochs in (2, 3, 600):
        ends = [tas.gumbel_temperature(epoch, epochs) for epoch in (0, epochs - 1)]
        assert ends == pytest.approx([10, 0.1])

def test_decidedness_of_sizes_with_a_choice():
    """A mean over these alone; 0 where there are none."""
    torch.manual_seed(0)
    for options in ({"search": "width"}, {"search": "depth"}, {"round_to": 16}):
        space = tas.Space("resnet20", **options)
        net = tas.SuperResNet(space)
        found = tas.measure_sizes(net)
        for name, logits, rows in (("width", net.alpha, space.widths),
                                   ("depth", net.beta, space.depths)):
            tops = [row[:len(c)].double().softmax(0).sort().values[-2:]
                    for row, c in zip(logits.detach(), rows) if len(c) > 1]
            expected = statistics.fmean(float(b - a) for a, b in tops) if tops else 0
            assert found[f"{name}_discrepancy"] == pytest.approx(expected, abs=1e-6)

@pytest.mark.parametrize("classes", [3, 7, 200])
def test_accuracy_of_ranked_logits(classes):
    """The label of image i is in place i modulo 7, or the classes; the last batch is one image."""
    args = tas.build_parser().parse_args("eval x --data synthetic --batch-size 4".split())
    args.device, args.precision, args.rank, args.world = torch.device("cpu"), "fp32", 0, 1
    images, labels = random_images(13, 8)
    labels = labels % classes
    places = torch.arange(13) % min(classes, 7)
    logits = torch.zeros(13, classes)
    for row, label, place in zip(logits, labels.tolist(), places.tolist()):
        order = [c for c in range(classes) if c != label]
        order.insert(place, label)
        row[torch.tensor(order)] = -torch.arange(classes).float()
    rows = iter(logits.split(4))

    class Ranked(torch.nn.Module):
        def forward(self, x):
            return next(rows)

    top1, top5 = tas.evaluate(Ranked(), tas.SmallImages(images, labels, "cpu"), args)
    assert top1 == pytest.approx(100 * (places == 0).double().mean().item())
    assert top5 == pytest.approx(100 * (places < 5).double().mean().item())

@pytest.fixture
def run_small(tmp_path, monkeypatch):
    """Run a command on a few images of 8x8 pixels whose brightness tells the class. {tmp} stands
    for a directory with a teacher and pruned shapes. Returns the Data."""
    torch.manual_seed(0)
    teacher = random_bn(tas.ResNet(tas.Space("resnet20", 10, 8).full))
    teacher.shape.save(tmp_path / "teacher" / "shape.json")
    tas.save_tensors(tmp_path / "teacher" / "weights.pt", teacher.state_dict())
    for arch, stages in (("resnet20", [[[3, 5], [7, 5]], [[4, 14]], [[8, 32], [22, 30]]]),
                         ("resnet164", [[[3, 5, 9], [7, 2, 9]], [[4, 6, 44]], [[8, 9, 30]]]),
                         ("resnet18", [[[3, 9]], [[4, 14]], [[8, 32], [22, 30]], [[7, 9]]])):
        tas.Shape(arch, 10, 8, 9, stages).save(tmp_path / f"{arch}.json")

    def run(line, count=167, classes=10, status=0):
        splits = []
        for n in (count, 40):
            images, labels = random_images(n, 8, seed=n)
            images = images // 2 + 12 * labels[:, None, None, None].byte()
            splits.append(tas.SmallImages(images, labels, "cpu"))
        data = tas.Data(*splits, [str(c) for c in range(classes)])
        monkeypatch.setattr(tas, "load_data", functools.cache(lambda *_: data))
        command, *rest = line.format(tmp=tmp_path).split()
        always = "--data synthetic --image-size 8 --device cpu --precision fp32 --quiet --out"
        assert tas.main([command, *always.split(), str(tmp_path / "run"), *rest]) == status
        return data
    return run

@pytest.fixture
def float64(monkeypatch):
    """The whole program in float64, so that a slow loop agrees with it to many digits."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(tas, "normalize", lambda x: slow_normalize(x.permute(0, 2, 3, 1)))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

def accuracy(z, y):
    return 100 * (z.argmax(1) == y).double().mean().item()

@torch.no_grad()
def sgd_step(weights, loss, velocity, lr, decay):
    """Nesterov momentum 0.9; weight decay is part of the gradient."""
    for w, g, v in zip(weights, torch.autograd.grad(loss, weights), velocity):
        g = g + decay * w
        v.copy_(0.9 * v + g)
        w -= lr * (g + 0.9 * v)

@torch.no_grad()
def adam_step(logits, loss, moments, t, lr):
    """The t-th step; weight decay is part of the gradient."""
    for a, g, (m, v) in zip(logits, torch.autograd.grad(loss, logits), moments):
        g = g + 0.001 * a
        m.copy_(0.5 * m + 0.5 * g)
        v.copy_(0.999 * v + 0.001 * g ** 2)
        a -= lr * (m / (1 - 0.5 ** t)) / ((v / (1 - 0.999 ** t)).sqrt() + 1e-8)

def means(names, rows):
    return {name: statistics.fmean(column) for name, column in zip(names, zip(*rows))}

def slow_training(data, net, teacher, epochs, warmup, highest, decay, kd):
    """The training as the paper tells it, in batches of 16; `warmup` in steps, `highest` learning
    rate, `kd` the weight and the temperature of distillation. Returns what is to be logged."""
    weights, count, i, log = list(net.parameters()), len(data.train.labels), 0, []
    velocity, steps = [torch.zeros_like(w) for w in weights], epochs * (count // 16)
    for epoch in range(epochs):
        net.train()
        seen = []
        for x, y in data.train.batches(torch.randperm(count), 16, True):
            lr = highest * (1 + math.cos(math.pi * (i - warmup) / (steps - warmup))) / 2
            if i < warmup:
                lr = highest * (i + 1) / warmup
            z = net(x)
            loss = cross_entropy(z, y)
            if kd:  # the teacher is in evaluation mode
                loss = slow_kd(z, teacher(x).detach(), y, *kd)
            sgd_step(weights, loss, velocity, lr, decay)
            seen.append((loss.item(), accuracy(z, y)))
            i += 1
        x, y = next(data.test.batches(torch.arange(40), 40, False))
        z = net.eval()(x)
        log.append({"epoch": epoch + 1, **means(("train_loss", "train_accuracy"), seen),
                    "test_accuracy": accuracy(z, y), "lr": lr})
        if len(data.classes) > 100:
            best = z.argsort(1, descending=True)[:, :5]
            log[-1]["test_top5"] = 100 * statistics.fmean(a in b for a, b in zip(y, best))
    assert i == steps
    return log

def slow_search(data, net, target, seed, highest, decay, tolerance, num_samples, gumbel, arch_lr,
                cost_weight, taus):
    """The search as the paper tells it: three epochs of ten steps of eight images. Returns what is
    to be logged, and the signs of the cost loss."""
    space, sizes, i, log, signs = net.space, [net.alpha, net.beta], 0, [], []
    weights = [p for name, p in net.named_parameters() if name not in ("alpha", "beta")]
    velocity = [torch.zeros_like(w) for w in weights]
    moments = [(torch.zeros_like(s), torch.zeros_like(s)) for s in sizes]
    first, second = tas.split_halves(data.train.labels, seed)

    def size_up():
        p, q = net.alpha.softmax(1), net.beta.softmax(1)
        return tas.expected_macs(space, p, q), slow_macs(space.shape(p.argmax(1), q.argmax(1)))

    def discrepancy(logits):
        top = logits.softmax(1).sort(1, descending=True).values
        return (top[:, 0] - top[:, 1]).mean().item()

    for epoch, tau in enumerate(taus):
        seen, orders = [], [half[torch.randperm(len(half))] for half in (first, second)]
        batches = [data.train.batches(order, 8, True) for order in orders]
        for (x, y), (val_x, val_y) in zip(*batches):
            z = net(x, tas.sample_sizes(net.alpha, net.beta, tau, num_samples, gumbel))
            loss = cross_entropy(z, y)
            lr = highest * (1 + math.cos(math.pi * i / 30)) / 2
            sgd_step(weights, loss, velocity, lr, decay)

            val_z = net(val_x, tas.sample_sizes(net.alpha, net.beta, tau, num_samples, gumbel))
            val_loss, (expected, actual) = cross_entropy(val_z, val_y), size_up()
            signs.append((actual > (1 + tolerance) * target) - (actual < (1 - tolerance) * target))
            cost = signs[i] * expected.log()
            adam_step(sizes, val_loss + cost_weight * cost, moments, i + 1, arch_lr)
            seen.append((loss.item(), accuracy(z, y), val_loss.item(), accuracy(val_z, val_y)))
            i += 1
        names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
        log.append({"epoch": epoch + 1, "tau": tau, "lr": lr, **means(names, seen),
                    "expected_macs": size_up()[0].item(), "argmax_macs": size_up()[1],
                    "width_discrepancy": discrepancy(net.alpha),
                    "depth_discrepancy": discrepancy(net.beta)})
    assert i == 30
    return log, signs

def check_run(path, log, saved, net):
    """What a run logged and saved is what a slow loop did."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line, expected in zip(lines, log, strict=True):
        assert all(line.pop(name) > 0 for name in MEASURED)
        assert line == pytest.approx(expected, rel=1e-9)
    assert saved.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-8, atol=1e-10, msg=name)

MEASURED = "seconds", "images_per_second", "memory_mb"  # metrics that differ between equal runs
PRUNED = "--shape {tmp}/resnet20.json --teacher {tmp}/teacher"

@pytest.mark.parametrize("options, changes", [
    ("--arch resnet20", {}), (PRUNED, dict(kd=(0.9, 4))), (PRUNED + " --transfer none", {}),
    (PRUNED + " --kd-weight 0.3 --kd-temperature 2", dict(kd=(0.3, 2))),
    (PRUNED + " --transfer init", {}), (PRUNED + " --transfer init+kd", dict(kd=(0.9, 4))),
    ("--shape {tmp}/resnet164.json", {}), ("--shape {tmp}/resnet18.json", {}),
    ("--arch resnet20 --seed 3 --lr 0.2 --weight-decay 0.01",
     dict(seed=3, highest=0.2, decay=0.01)),
    ("--arch resnet20 --image-size 65", dict(classes=101, decay=1e-4)),  # as of large images
    ("--arch resnet20 --epochs 54", dict(count=20, epochs=54, warmup=5))])
def test_training_is_the_slow_loop(float64, run_small, tmp_path, options, changes):
    """Two epochs of ten steps, or many of one."""
    loop = dict(epochs=2, warmup=2, highest=0.1, decay=5e-4, kd=None, seed=0, count=167,
                classes=10) | changes
    count, classes, seed = (loop.pop(name) for name in ("count", "classes", "seed"))
    data = run_small(f"train --epochs 2 --batch-size 16 {options}", count, classes)
    teacher = tas.load(tmp_path / "teacher")
    [path] = re.findall(r"{tmp}/(\w+.json)", options) or ["teacher/shape.json"]
    torch.manual_seed(seed)
    shape = dataclasses.replace(tas.Shape.load(tmp_path / path), num_classes=classes)
    net = tas.ResNet(shape)
    if "init" in options:
        tas.inherit_weights(net, teacher)
    log = slow_training(data, net, teacher, **loop)
    check_run(tmp_path / "run", log, tas.load_tensors(tmp_path / "run" / "weights.pt"), net)

@pytest.mark.parametrize("options, round_to, align, share, loop", [
    ("", 1, "cwi", 0.5, dict(seed=0, highest=0.1, decay=5e-4, tolerance=0.05, num_samples=2,
                             gumbel=True, arch_lr=0.05, cost_weight=2, taus=(10, 5.05, 0.1))),
    ("--round 8 --align pad --flops 0.45 --seed 3 --lr 0.2 --weight-decay 0.01 --tolerance 0.15 "
     "--num-samples 3 --sampler softmax --arch-lr 0.02 --cost-weight 0.5 --tau-start 4 --tau-end 2",
     8, "pad", 0.45, dict(seed=3, highest=0.2, decay=0.01, tolerance=0.15, num_samples=3,
                          gumbel=False, arch_lr=0.02, cost_weight=0.5, taus=(4, 3, 2)))])
def test_search_is_the_slow_loop(float64, run_small, tmp_path, options, round_to, align, share,
                                 loop):
    data = run_small(f"search --arch resnet20 --epochs 3 --batch-size 8 {options}")
    space = tas.Space("resnet20", 10, 8, round_to=round_to)
    target = round(share * slow_macs(space.full))
    torch.manual_seed(loop["seed"])
    net = tas.SuperResNet(space, align)
    log, signs = slow_search(data, net, target, **loop)
    assert set(signs) == {-1, 0, 1}  # so that all parts of the cost loss are seen
    saved = tas.load_tensors(tmp_path / "run" / "last.ckpt")["parts"]["net"]
    check_run(tmp_path / "run", log, saved, net)
    shape = tas.extract(space, net.alpha, net.beta, target, loop["tolerance"])
    assert tas.Shape.load(tmp_path / "run") == shape

@pytest.mark.parametrize("line, expected", [
    ("train --arch resnet20", dict(epochs=300, batch_size=256)),
    ("train --arch resnet20 --image-size 65", dict(epochs=120)),
    ("search --arch resnet20 --image-size 65", dict(epochs=120, weight_decay=1e-4)),
    ("search --arch resnet20",  # 600 steps
     dict(epochs=600, batch_size=256, tolerance=0.05, arch_lr=0.05)),
    ("search --arch resnet20 --batch-size 8", dict(arch_lr=58.2 / (37 * 600))),
    ("search --arch resnet20 --batch-size 8 --epochs 9999", dict(arch_lr=1e-3))])
def test_defaults(run_small, monkeypatch, tmp_path, line, expected):
    """Those that the slow loops do not use; the rate of alpha depends on the number of steps."""
    def stop(*_):
        raise tas.TASError("stop")

    monkeypatch.setattr(tas, "train", stop)
    monkeypatch.setattr(tas, "search", stop)
    run_small(line, count=600, status=2)
    found = tas.read_json(tmp_path / "run" / "run.json")["settings"]
    assert {name: found[name] for name in expected} == pytest.approx(expected)

@pytest.mark.parametrize("classes", [100, 101])
def test_top5_of_more_than_100_classes(run_small, tmp_path, classes):
    run_small("train --arch resnet20 --epochs 1 --batch-size 16", 20, classes)
    line = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert ("test_top5" in line) == (classes == 101)

class HostSync(Exception):
    pass

class NoScalars(TorchDispatchMode):
    """Fails on operators whose result the host has to wait for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero,
                                       torch.ops.aten.masked_select, torch.ops.aten.equal):
            raise HostSync(str(function))
        if function.overloadpacket is torch.ops.aten.index and torch.bool in [
                t.dtype for t in args[1] if t is not None]:
            raise HostSync("an index by a mask")
        return function(*args, **(kwargs or {}))

@contextlib.contextmanager
def no_host_sync():
    def fail(*_, **__):
        raise HostSync

    with pytest.MonkeyPatch.context() as patch, NoScalars():
        for name in ("item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__float__",
                     "__int__", "__index__", "__repr__", "__format__"):
            patch.setattr(torch.Tensor, name, fail)
        yield

@pytest.mark.parametrize("sync", [
    lambda t: t.item(), lambda t: t.cpu(), lambda t: t[None].tolist(), lambda t: bool(t > 0),
    lambda t: float(t), lambda t: int(t), lambda t: f"{t}", lambda t: repr(t),
    lambda t: t[None].nonzero(), lambda t: torch.nonzero(t[None]), lambda t: t[None][t[None] > 0],
    lambda t: t[None].numpy(), lambda t: torch.equal(t, t)])
def test_the_guard_notices_host_syncs(sync):
    with no_host_sync(), pytest.raises(HostSync):
        sync(torch.ones(()) * 2)

STEPS = [("train --arch resnet20 --batch-size 16", 1), (f"train {PRUNED} --batch-size 16", 1),
         ("search --arch resnet20 --batch-size 8", 2)]  # and the steps of two batches

@pytest.mark.parametrize("line, parts", STEPS)
def test_an_epoch_does_not_wait_for_the_device(run_small, monkeypatch, line, parts):
    """From its first step to the measuring at its end."""
    steps = []
    with contextlib.ExitStack() as guard:
        def look(*inputs):
            if not steps:
                guard.enter_context(no_host_sync())
            steps.append(inputs)

        spy(monkeypatch, tas, "take_step", look)
        spy(monkeypatch, tas, "mean_of_steps", lambda *_: guard.close())
        run_small(f"{line} --epochs 1")
    assert len(steps) == 10 * parts

@pytest.mark.parametrize("line, parts", STEPS)
def test_gradients_of_what_is_stepped_and_of_nothing_else(run_small, line, parts):
    nets, asked, grads = [], [], []

    def before_forward(net, _):
        if isinstance(net, (tas.ResNet, tas.SuperResNet)) and torch.is_grad_enabled():
            names = {name for name, p in net.named_parameters() if p.requires_grad}
            if net.training:
                nets.append(net)
                asked.append(names)
            assert net is nets[-1] or not names  # a teacher has no gradient

    def before_step(*_):
        grads.append({name: None if p.grad is None else p.grad.clone()
                      for name, p in nets[-1].named_parameters()})

    with register_module_forward_pre_hook(before_forward), (
            register_optimizer_step_pre_hook(before_step)):
        run_small(f"{line} --epochs 1")
    sizes = {"alpha", "beta"} & grads[0].keys()
    halves = [grads[0].keys() - sizes, sizes][:parts] * 10
    assert asked == halves and len(grads) == 10 * parts
    assert {name for name, grad in grads[0].items() if grad is None} == sizes
    for old, new, half in zip(grads, grads[1:], halves[1:]):
        for name, grad in new.items():  # renewed by its own step, kept by the other one
            assert (old[name] is None or not grad.equal(old[name])) == (name in half), name

@pytest.mark.parametrize("loss, inputs", [(tas.search_loss, ()), (tas.architecture_loss, (1e5,))])
def test_a_search_step_is_one_graph(loss, inputs):
    """Whatever the sample and the temperature."""
    args = tas.build_parser().parse_args("search --data synthetic --arch resnet20".split())
    args.device, args.precision = torch.device("cpu"), "fp32"
    torch.manual_seed(0)
    net, counter = tas.SuperResNet(tas.Space("resnet20", 10, 8)), CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend=counter)
    tau, x, y = torch.zeros(()), torch.randn(4, 3, 8, 8), torch.arange(4)
    values = set()
    for i in range(20):
        tau.fill_(tas.gumbel_temperature(i, 20))
        minimised, _, _ = compiled(args, net, tau, *inputs, x, y)
        minimised.backward()
        values.add(minimised.item())
    assert counter.frame_count == 1 and len(values) == 20

@pytest.mark.parametrize("line", [f"train {PRUNED} --epochs 1 --batch-size 16",
                                  "search --arch resnet20 --epochs 1 --batch-size 8"])
def test_losses_are_fp32(run_small, monkeypatch, line):
    """Under bf16, too."""
    seen = []
    spy(monkeypatch, F, "cross_entropy", lambda z, y: seen.append(z.dtype))
    spy(monkeypatch, F, "log_softmax", lambda z, *_, **__: seen.append(z.dtype))
    run_small(f"{line} --precision bf16")
    assert len(seen) >= 20 and set(seen) == {torch.float32}

# ---- Commands in small worlds -------------------------------------------------------------------

LIMIT = 240  # seconds; only against hangs
os.environ["OMP_NUM_THREADS"] = "1"  # in other processes as in this one
RESULTS = ("run.json", "metrics.jsonl", "last.ckpt", "shape.json", "weights.pt")
CHEAP = "--data folder --image-size 8 --batch-size 6 --workers 0 --precision fp32"
TRAIN = f"train {CHEAP} --data-dir {{root}}/data --arch resnet20 --epochs 2"
SEARCH = f"search {CHEAP} --data-dir {{root}}/data --arch resnet20 --epochs 3"
PRUNE = f"prune {CHEAP} --data-dir {{root}}/data --arch resnet20 --epochs 3"
DISTIL = f"train {CHEAP} --data-dir {{root}}/data --shape {{root}}/runs/search --epochs 3"
GUIDED = DISTIL + " --teacher {root}/runs/teacher"
ONE = f"{CHEAP} --data-dir {{root}}/data --epochs 1 --out {{root}}/new"
NEW = f"train --arch resnet20 {ONE}"
HALF = TRAIN + " --out {root}/half"

def run(line, **places):
    """Run a command in this process."""
    return tas.main(shlex.split(line.format(**places)))

def tree(root):
    """Content of every file below a directory."""
    return {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

def read_metrics(directory):
    """Lines of metrics.jsonl, if there is one, without the entries that may differ between runs."""
    path = directory / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]

def read_result(directory):
    """What a finished run gave, without its time."""
    return tas.read_json(directory / "run.json")["result"] | {"seconds": 0}

def macs_share(directory):
    """MACs of a run's network, as a share of the unpruned one's."""
    shape = tas.Shape.load(directory)
    return tas.count_macs(shape) / tas.count_macs(shape.full)

def change_json(path, change):
    """Write these bytes, or change these entries of the object that is there."""
    if isinstance(change, dict):
        change = json.dumps(tas.read_json(path) | change).encode()
    path.write_bytes(change)

def change_state(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)

def identical(a, b):
    """Whether two nested states are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b

def check_same_run(a, b):
    """The same files with the same result to the last bit, and the same state to go on from."""
    searched = "tau" in read_metrics(a)[0]
    for path in (a, b):
        assert sorted(p.name for p in path.glob("*")) == sorted(RESULTS[:5 - searched])
    assert read_metrics(a) == read_metrics(b)
    assert (a / "shape.json").read_bytes() == (b / "shape.json").read_bytes()
    if not searched:
        assert identical(*[tas.load_tensors(p / "weights.pt") for p in (a, b)])
    assert identical(*[tas.load_tensors(p / "last.ckpt")["parts"] for p in (a, b)])
    assert read_result(a) == read_result(b)

def check_parts(base, expected):
    for part in ("teacher", "search", "pruned"):
        check_same_run(base / part, expected / part)

def stop_while_writing(patch, nth, name="last.ckpt"):
    """Interrupt in the middle of writing the nth file of that name."""
    count = itertools.count(1)

    def look(path, content):
        if Path(path).name == name and next(count) == nth:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(f"{path}.tmp").write_bytes(bytes(content)[:100])
            raise KeyboardInterrupt

    spy(patch, tas, "write_file", look)

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with `data`, `runs` made by prune, `other`, a second teacher, `whole`, a short
    training, and `half`, the same interrupted."""
    root = tmp_path_factory.mktemp("world")
    write_images(root / "data")
    assert run(PRUNE + " --out {root}/runs", root=root) == 0
    assert run(TRAIN + " --seed 1 --out {root}/other", root=root) == 0
    assert run(TRAIN + " --out {root}/whole", root=root) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_while_writing(patch, 2)
        assert run(HALF, root=root) == 130
    return root

@pytest.fixture
def world(root, tmp_path):
    """A copy of that directory, to be changed."""
    yield shutil.copytree(root, tmp_path / "world")
    shutil.rmtree(tmp_path / "world")

def one_line(capture):
    """The only line on stderr."""
    err = capture.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    return err

def check_refused(capture, root, line, *words, **places):
    """Exit status 2, one line that names the thing, and no file changed or made."""
    before = tree(root)
    capture.readouterr()
    assert run(line, root=root, **places) == 2
    err = one_line(capture)
    for word in words:
        assert word.replace("{root}", str(root)) in err
    after = tree(root)
    shutil.rmtree(root / "new", ignore_errors=True)  # for the other tests
    assert after == before

# ---- Wrong shapes, costs and targets ------------------------------------------------------------

FULL = dataclasses.asdict(tas.Shape.unpruned("resnet20", 10))
WRONG = [None, True, False, 0, -1, -10 ** 400, 10 ** 300, 25_001, 3.0, -0.5, math.nan, "", "16",
         "resnet", "\ud800", "x" * 500, {}, {"a": [1]}, [], [3], [[]], [[[]]], [[3, 3]] * 9]

def refused(path, content):
    """The error of a file that holds no Shape: one line that names it; returns the rest."""
    path.write_bytes(content)
    with pytest.raises(tas.TASError) as caught:
        tas.Shape.load(path)
    message = str(caught.value)
    reason = message.replace(str(path), "", 1)
    assert str(path) in message and "\n" not in message and len(reason) < 300
    return reason

@pytest.mark.parametrize("arch", ["resnet20", "resnet164", "resnet18"])
@settings(max_examples=150)
@given(seed=st.integers(0, 2 ** 32), value=st.sampled_from(WRONG))
def test_a_wrong_field_is_named(tmp_path_factory, arch, seed, value):
    """At any place, in a file and in Python."""
    rng, fields = random.Random(seed), dataclasses.asdict(random_shape(arch, seed))
    key = name = rng.choice(list(fields))
    container = fields
    while isinstance(container[key], list) and rng.random() < 0.75:
        container, key = container[key], rng.randrange(len(container[key]))
        name += f"[{key}]"
    container[key] = value
    path = tmp_path_factory.getbasetemp() / "wrong.json"
    assert name in refused(path, json.dumps(fields).encode())
    with pytest.raises(tas.TASError, match=re.escape(name)):
        tas.Shape(**fields)

def test_missing_and_unknown_fields_are_named(tmp_path):
    for missing, unknown in itertools.product(FULL, ("width", "Stem", "self", "", "cls")):
        less = {k: v for k, v in FULL.items() if k != missing}
        for wrong, name in ((less, missing), (FULL | {unknown: 1}, unknown)):
            assert f"'{name}'" in refused(tmp_path / "x.json", json.dumps(wrong).encode())

def test_files_that_are_no_shape(tmp_path):
    whole = json.dumps(FULL).encode()
    for content in (b"", b"\x00", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"null", b"3", b"[]",
                    b'"text"', b"{}", b"NaN", b"{'arch': 1}", b'{"arch": "\xe9"}', b"[" * 100_000,
                    b'{"a":' * 100_000, b"9" * 10_000, b'{"stem": ' + b"9" * 10_000 + b"}",
                    b"[" * 2_000_000, *[whole[:n] for n in range(len(whole))], whole + b"}"):
        refused(tmp_path / "x.json", content)
    # Just below the depth that the JSON reader refuses, printing the value must not fail.
    for depth, name in itertools.product((3, *range(500, 1100, 3), 10_000), ("arch", "stages")):
        text = json.dumps(FULL | {name: "HERE"}).replace('"HERE"', "[" * depth + "]" * depth)
        refused(tmp_path / "x.json", text.encode())
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "none.json" / "x", "x" * 300):
        with pytest.raises(tas.TASError, match=re.escape(str(path))):
            tas.Shape.load(path)
    with pytest.raises(tas.TASError, match="cannot write"):
        tas.Shape(**FULL).save(tmp_path / "x.json" / "shape.json")

def set_cost(value):
    return lambda entries: entries["cost"][3][1].__setitem__(2, value)

@pytest.mark.parametrize("change, word", [
    (lambda entries: entries.update(arch="resnet32"), "arch resnet32"),
    (lambda entries: entries.update(image_size=64), "image_size 64"),
    (lambda entries: entries["widths"].pop(), "widths"),
    (lambda entries: entries.update(cost=[[1.0]]), "table of costs"),
    (lambda entries: entries.update(cost="many"), "table of costs"),
    *[(lambda entries, unit=unit: entries.update(unit=unit), "table of costs")
      for unit in (3, "", " ")],
    *[(set_cost(value), "table of costs") for value in (-1, math.nan, math.inf, None, [])]])
def test_wrong_costs_are_refused_by_name(tmp_path, change, word):
    space, path = tas.Space("resnet20"), tmp_path / "cost.json"
    write_costs(path, space, 0)
    space.load_cost(path)
    entries = tas.read_json(path)
    change(entries)
    path.write_text(json.dumps(entries))
    with pytest.raises(tas.TASError, match=f"cost.json.*{word}"):
        space.load_cost(path)

@pytest.mark.parametrize("links", [10, 11])
def test_extract_with_all_costs_rounded_down(links):
    """In cells of 1, those for so many links, the most probable network seems to be in the band,
    near its edge, but is not; without the last block it is. The links of this resnet20, in which
    the last stage may have fewer blocks, are the stem, the nine blocks and the classifier."""
    space = tas.Space("resnet20", search="depth")
    space.cost.zero_()
    target, rest = 40 * links, 42 * links - 5 - 20  # all but the last block
    costs = [rest // 10 + (i < rest % 10) for i in range(9)] + [20, rest // 10]
    for layer, cost in zip((0, *range(1, 28, 3), 28), costs, strict=True):
        space.cost[layer] = cost + 0.49
    assert space.cost_of(space.full) > 1.05 * target
    beta = torch.tensor([[0.0, 0, 90], [0.0, 0, 90], [0.0, 1, 2]])
    shape = tas.extract(space, torch.zeros(19, 1), beta, target)
    assert [len(blocks) for blocks in shape.stages] == [3, 3, 2]

def test_logits_of_another_space_are_an_error():
    space = tas.Space("resnet20")
    alpha, beta = draw_logits(space, "small", 0)
    for logits in ((alpha[:1], beta), (alpha, beta[:1]), (alpha[:, :1], beta), (beta, alpha)):
        with pytest.raises(tas.TASError, match="expected logits"):
            tas.extract(space, *logits, 2e7)

def test_shapes_of_another_space_are_an_error():
    space = tas.Space("resnet20", search="width")
    full = space.full
    for shape in (dataclasses.replace(full, stem=15), dataclasses.replace(
            full, stages=[*full.stages[:2], full.stages[2][:1]])):
        with pytest.raises(tas.TASError, match="not of this space"):
            space.cost_of(shape)

def test_extract_of_nan_is_an_error():
    space = tas.Space("resnet20")
    for which in (0, 1):
        logits = draw_logits(space, "small", 0)
        logits[which][0] = math.nan
        with pytest.raises(tas.TASError, match="NaN"):
            tas.extract(space, *logits, 2e7)

@pytest.mark.parametrize("unit, text, share", [
    ("MACs", "0.5", 0.5), ("MACs", "1", 1), ("MACs", "20M", 20e6 / 40813184),
    ("MACs", "9000k", 9e6 / 40813184), ("MACs", "0.02G", 20e6 / 40813184),
    ("µs", "0.5", 0.5), ("µs", "20000000µs", 20e6 / 40813184), ("m²", "2e7m²", 20e6 / 40813184)])
def test_targets(unit, text, share):
    space = tas.Space("resnet20")
    space.unit = unit
    assert math.isclose(tas.parse_target(text, space), share * 40813184, rel_tol=1e-6)

# ---- Wrong command lines ------------------------------------------------------------------------

TRAIN_CHANGES = ["--epochs 9", "--lr 0.2", "--seed 4 --lr 0.3", "--batch-size 4", "--image-size 9",
                 "--weight-decay 0.01", "--precision bf16", "--init {root}/other"]
SEARCH_CHANGES = ["--flops 0.6", "--tolerance 0.1", "--num-samples 3", "--sampler softmax",
                  "--align pad", "--round 2", "--arch-lr 0.01", "--search width", "--method random",
                  "--cost-weight 1.0", "--tau-start 5.0", "--tau-end 1.0"]
DISTIL_CHANGES = ["--transfer init", "--transfer none", "--teacher {root}/other", "--kd-weight 0.5",
                  "--kd-temperature 2.0", "--shape {root}/whole"]

@pytest.mark.parametrize("line, flags, where", [
    *[(TRAIN, flags, where) for flags in TRAIN_CHANGES for where in ("half", "whole")],
    *[(SEARCH, flags, "runs/search") for flags in SEARCH_CHANGES],
    *[(GUIDED, flags, "runs/pruned") for flags in DISTIL_CHANGES]])
def test_other_settings_are_refused(root, capfd, line, flags, where):
    """All that differ are named, with both values."""
    names = []
    for flag, value in re.findall(r"--(\S+) (\S+)", flags):
        name = {"flops": "target"}.get(flag, flag.replace("-", "_"))
        is_converted = name in ("target", "teacher", "shape", "init")
        names += [f"{name} was ", "now " if is_converted else f"now {value}"]
    check_refused(capfd, root, f"{line} {flags} --out {{root}}/{where}", "--out", *names)

def test_every_setting_is_compared(world, capfd):
    """A run that does not record one is another run."""
    info = tas.read_json(world / "half/run.json")
    for name, value in info["settings"].items():
        settings = {key: other for key, other in info["settings"].items() if key != name}
        change_json(world / "half/run.json", {"settings": settings})
        words = f"{name} was not recorded, now {str(value)[:60]}"
        check_refused(capfd, world, HALF, words)

WRONG_VALUES = {
    "train": {
        "--epochs": "-3 0 two", "--batch-size": "0 1 25", "--lr": "nan -1 inf", "--seed": "-1",
        "--workers": "-2", "--image-size": "7", "--precision": "fp8", "--weight-decay": "2",
        "--transfer": "copy", "--device": "nonsense cuda:99 meta", "--arch": "vgg resnt56",
        "--data": "cifar11", "--wrong": "3", "--flops": "0.5", "--weight": "0.1"},
    "search": {
        "--flops": "0 1.5 abc nan inf -0.5 900G M 20000000 2.6M 3ms", "--num-samples": "9 0",
        "--search": "all", "--method": "grid", "--sampler": "hard", "--align": "crop",
        "--round": "0", "--tolerance": "0", "--arch-lr": "nan", "--batch-size": "13",
        "--teacher": "x"}}
WRONG_TOGETHER = {
    "train": [
        ("--arch vgg", "resnet56"),
        ("--arch resnet32 --shape {root}/runs/search/shape.json", "resnet20", "resnet32"),
        ("--shape {root}/nowhere.json", "{root}/nowhere.json"),
        ("--shape {root}/runs", "{root}/runs"),
        ("--shape {root}/runs/search/shape.json --image-size 16", "image_size 8", "16"),
        ("--transfer kd", "--transfer kd", "--teacher"),
        ("--transfer init", "--transfer init", "--teacher"),
        ("--arch resnet32 --teacher {root}/runs/teacher", "resnet20", "resnet32"),
        ("--teacher {root}/runs/search", "{root}/runs/search", "weights.pt"),
        ("--teacher {root}/half", "{root}/half", "weights.pt"),
        ("--teacher {root}/nowhere", "{root}/nowhere"),
        ("--teacher {root}/runs/search/shape.json", "shape.json", "weights.pt"),
        ("--teacher {root}/runs/pruned", "{root}/runs/pruned", "pruned network"),
        ("--init {root}/other --shape {root}/runs/search", "--shape"),
        ("--init {root}/other --arch resnet32", "resnet20"),
        ("--init {root}/nowhere", "{root}/nowhere has no weights.pt"),
        ("--out {root}/half/run.json", "{root}/half/run.json", "--out"),
        ("--out {root}/half/run.json/new", "{root}/half/run.json/new", "--out"),
        ("--out {root}/data", "{root}/data", "--out"),
        ("--out /proc/nowhere", "/proc/nowhere", "--out")],
    "search": [
        ("--method random --search depth --flops 0.01", "possible are"),
        ("--method uniform --flops 0.0004", "--flops"), ("--flops 1e-8", "possible are"),
        ("--method uniform --search depth", "uniform", "--search"),
        ("--method tas --search depth --flops 0.01", "possible are")],
    "prune": [  # before the first step
        ("--flops 50", "--flops 50"), ("--search depth --flops 0.01", "possible are"),
        ("--batch-size 13", "half of the search"), ("--teacher {root}/nowhere", "{root}/nowhere"),
        ("--teacher {root}/runs/pruned", "pruned network"),
        ("--init {root}/other --teacher {root}/other", "--init"),
        ("--init {root}/runs/pruned", "--init {root}/runs/pruned is pruned"),
        ("--init {root}/other --transfer none", "--init"),
        ("--epochs 3 --flops 0.4 --out {root}/runs", "target was",
         "prune keeps its teacher with --teacher DIR")]}

@pytest.mark.parametrize("line, words", [
    ("train " + ONE, ["--arch"]), ("search " + ONE, ["--arch"]), ("", ["COMMAND"]),
    ("trian --arch resnet20 " + ONE, ["trian", "train"]),
    ("train --arch resnet20 --epochs 1", ["--data"]),
    ("train --data synthetic --image-size 16 --arch resnet20", ["give --image-size 32"]),
    ("eval --data synthetic --epochs 3 DIR", ["--epochs"]),
    ("eval --data synthetic {root}/whole", ["not 8; give --image-size 32"]),
    *[(f"eval {{root}}/{name} --data folder --data-dir {{root}}/data", ["{root}/" + name])
      for name in ("nowhere", "half", "runs/search", "runs/search/shape.json")],
    *[(f"{NEW} {words}", [re.split("[ =]", words)[0][2:] + ": an empty value"])
      for words in ("--teacher ''", "--shape ''", "--shape=", "--out ''", "--data-dir=")],
    *[(f"{command} --arch resnet20 {ONE} {flag} {value}", [flag, value])
      for command, flags in WRONG_VALUES.items()
      for flag, values in flags.items() for value in values.split()],
    *[(f"{command} --arch resnet20 {ONE} {flags}", words)
      for command, rows in WRONG_TOGETHER.items() for flags, *words in rows]])
def test_wrong_command_lines(root, capfd, line, words):
    check_refused(capfd, root, line, *words)

def test_a_batch_that_the_processes_cannot_share(root, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_refused(capfd, root, NEW, "--batch-size 6", "4 processes")

def test_processes_wait_for_one_that_reads_images(monkeypatch):
    """Those of a data set may take longer than the ten minutes that NCCL waits by default."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    waits = []
    monkeypatch.setattr(torch.distributed, "init_process_group",
                        lambda backend, timeout, **_: waits.append(timeout.total_seconds()))
    tas.setup(tas.build_parser().parse_args("train --data synthetic --device cpu".split()))
    assert waits and min(waits) >= 6 * 3600

def no_network(*_, **__):
    raise urllib.error.URLError("no network")

@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_no_network_for_cifar(tmp_path, capfd, monkeypatch, name):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    check_refused(capfd, tmp_path, f"train --data {name} --data-dir {{root}}/data --arch resnet20 "
                  "--out {root}/new", name, "{root}/data", "no network", "--data synthetic")

@pytest.mark.parametrize("options, size", [
    ("cifar10 --arch resnet20", 32), ("synthetic --arch resnet18", 32),
    ("folder --arch resnet20", 32), ("folder --arch resnet18", 224),
    ("imagenet --arch resnet18", 224), ("imagenet --arch resnet20", 224)])
def test_default_image_sizes(monkeypatch, capfd, options, size):
    def stop(name, root, image_size, *_):
        raise tas.TASError(f"{image_size} pixels")

    monkeypatch.setattr(tas, "load_data", functools.cache(stop))
    assert run(f"train --data {options}") == 2
    assert f"error: {size} pixels" in capfd.readouterr().err

# ---- Spoiled files ------------------------------------------------------------------------------

GOOD = {"arch": "resnet20", "num_classes": 2, "image_size": 8, "stem": 9,
        "stages": [[[9, 8]], [[20, 12], [32, 12]], [[64, 25]]]}

def cut_jpeg(path):
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:3000])

# What happens to a copy of the small world before a command that must refuse it.

def write(name, content):
    return lambda world: (world / name).write_bytes(content)

def cut(name, size):
    return lambda world: os.truncate(world / name, size)

def remove(*names):
    return lambda world: [shutil.rmtree(world / name) for name in names]

def other_images(*names):
    """Classes of these names in the place of a and b."""
    def spoil(world):
        shutil.rmtree(world / "data")
        write_images(world / "data", names)
    return spoil

def shape_file(**changes):
    return write("shape.json", json.dumps(GOOD | changes).encode())

def state(change, name="half/last.ckpt"):
    return lambda world: change_state(world / name, change)

EVAL = f"eval {CHEAP} --data-dir {{root}}/data {{root}}/"
SPOILED = [
    # Images that are missing, cannot be read, or would be read as others.
    *[(spoil, NEW, words) for spoil, *words in (
        (remove("data"), "{root}/data/train"), (remove("data/train"), "{root}/data/train"),
        (lambda world: [shutil.rmtree(world / "data"), (world / "data").mkdir()],
         "{root}/data/train"),
        (lambda world: [shutil.rmtree(world / "data/train"), (world / "data/train").touch()],
         "{root}/data/train"),
        (remove("data/val"), "{root}/data", "val/", "tools/split.py"),
        (remove("data/train/b", "data/val/b"), "one class"),
        (lambda world: [path.unlink() for path in (world / "data/train/b").iterdir()],
         "{root}/data/train", "b"),
        (lambda world: (world / "data/val/b").rename(world / "data/val/zebra"), "b, zebra"),
        (write("data/train/b/3.png", b"no image"), "{root}/data/train/b/3.png"),
        (cut("data/train/b/3.png", 60), "{root}/data/train/b/3.png"),
        (cut("data/train/b/3.png", 0), "{root}/data/train/b/3.png"),
        *[(lambda world, mode=mode, name=name: Image.new(mode, (8, 8), 500).save(world / name),
           name, f"mode {mode}") for mode, name in (
               ("I;16", "data/train/a/x.png"), ("F", "data/train/a/x.tif"),
               ("I", "data/train/a/y.tif"))])],
    *[(spoil, NEW + " --workers 2", words) for spoil, *words in (
        (cut("data/train/b/3.png", 60), "{root}/data/train/b/3.png"),
        (lambda world: cut_jpeg(world / "data/val/a/cut.jpeg"), "{root}/data/val/a/cut.jpeg"))],
    # Images of another run.
    *[(lambda world: (world / "data/train/a/0.png").unlink(), f"{TRAIN} --out {{root}}/{name}",
       ["images was 24 + ", "now 23 + "]) for name in ("half", "whole")],
    (other_images("dog", "emu"), EVAL + "whole", ["['a', 'b']", "['dog', 'emu']"]),
    *[(other_images("dog", "emu"), f"{TRAIN} --out {{root}}/{name}",
       ["class_names was ['a', 'b'], now ['dog', 'emu']"]) for name in ("half", "whole")],
    (other_images(*"abc"), EVAL + "runs/pruned", ["2", "3", "classes"]),
    (other_images(*"abc"), NEW + " --teacher {root}/runs/teacher", ["2", "3", "classes"]),
    (other_images("dog", "emu"), NEW + " --teacher {root}/runs/teacher",
     ["{root}/runs/teacher", "['a', 'b']", "['dog', 'emu']"]),
    # Shapes.
    *[(spoil, NEW + " --shape {root}/shape.json", ["{root}/shape.json", *words])
      for spoil, *words in (
          (shape_file(stem=1000), "stem", "1000"), (shape_file(extra=1), "extra"),
          (shape_file(num_classes=3), "num_classes 3", "2"), (write("shape.json", b""),))],
    # Files of a run.
    *[(write("half/run.json", content), HALF, ["{root}/half/run.json"]) for content in (
        b"", b"{", b"[]", b"{}", b'{"settings": []}', b'{"settings": null}', b'{"settings": {}}')],
    (write("runs/search/run.json", b"[]"), GUIDED + " --out {root}/new",
     ["{root}/runs/search/run.json"]),
    (write("runs/teacher/run.json", b"{"), GUIDED + " --out {root}/new",
     ["{root}/runs/teacher/run.json"]),
    *[(write("runs/search/run.json", content), GUIDED + " --out {root}/new",
       ["{root}/runs/search/run.json"]) for content in (b'{"result": null}', b'{"settings": 3}')],
    (lambda world: (world / "new/pruned").mkdir(parents=True) or (
        world / "new/pruned/notes.txt").touch(), PRUNE + " --out {root}/new", ["{root}/new/pruned"]),
    (state(lambda state: state["bn1.running_mean"].add_(1), "runs/teacher/weights.pt"),
     PRUNE + " --out {root}/runs", ["teacher was "]),
    *[(spoil, HALF, ["{root}/half/last.ckpt", remedy]) for spoil, remedy in (
        (cut("half/last.ckpt", 100_000), "delete it"), (cut("half/last.ckpt", 0), "delete it"),
        (write("half/last.ckpt", b"hello"), "delete it"),
        (lambda world: torch.save([1, 2], world / "half/last.ckpt"), "delete it"),
        (lambda world: shutil.copy(world / "runs/search/last.ckpt", world / "half"),
         "command was search, now train"),
        *[(state(lambda state, name=name: state.pop(name)), "--out")
          for name in ("parts", "metrics", "settings", "rng")],
        (state(lambda state: state["parts"]["net"].popitem()), "--out"),
        (state(lambda state: state["settings"].update({5: 5})), "--out"))]]

@pytest.mark.parametrize("spoil, line, words", SPOILED)
def test_spoiled_files_are_refused(world, capfd, spoil, line, words):
    spoil(world)
    check_refused(capfd, world, line, *words)

@pytest.mark.parametrize("spoil, workers, name", [
    (cut("data/train/b/3.png", 60), 0, "train/b/3.png"),
    (lambda world: cut_jpeg(world / "data/val/a/cut.jpeg"), 2, "val/a/cut.jpeg")])
def test_unreadable_large_images_are_named(tmp_path, capfd, spoil, workers, name):
    """When it is their turn, so that a run directory has been made."""
    write_images(tmp_path / "data", size=80)
    spoil(tmp_path)
    before = tree(tmp_path / "data")
    line = f"train {ONE} --arch resnet18 --image-size 72 --workers {workers}"
    assert run(line, root=tmp_path) == 2
    assert f"{tmp_path}/data/{name}" in one_line(capfd)
    assert tree(tmp_path / "data") == before
    assert not (tmp_path / "new" / "weights.pt").exists()

class Evil:
    """A pickle of it makes a directory when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)

@pytest.mark.parametrize("name, line", [
    ("half/last.ckpt", HALF), ("whole/weights.pt", "eval --data synthetic {root}/whole"),
    ("whole/weights.pt", NEW + " --teacher {root}/whole")])
def test_a_pickle_is_not_executed(world, tmp_path, capfd, name, line):
    torch.save({"settings": Evil(tmp_path / "executed")}, world / name)
    check_refused(capfd, world, line, "{root}/" + name)
    assert not (tmp_path / "executed").exists()
    torch.load(world / name, weights_only=False)
    assert (tmp_path / "executed").exists()  # the file is as dangerous as it should be

def damage(directory, kind, name, other, at, noise):
    """Damage one file of a run directory, or exchange two. Returns the names."""
    path = directory / name
    content = path.read_bytes()
    at = int(at * len(content))
    if kind == "swap":
        path.write_bytes((directory / other).read_bytes())
        (directory / other).write_bytes(content)
        return {name, other}
    path.write_bytes(content[:at])
    if kind == "noise":
        path.write_bytes(content[:at] + noise + content[at + len(noise):])
    return {name}

def check_outcome(capture, status, kind, damaged, wanted):
    """Status 2 and one line, or 0 and the wanted words. It is 0 where no file that is read was
    damaged, 2 where one was cut or exchanged; noise may or may not matter."""
    captured = capture.readouterr()
    assert status in ([0, 2] if damaged and kind == "noise" else [2] if damaged else [0]), captured
    if status:
        assert re.fullmatch(r"error: [^\n]+\n", captured.err), captured.err
    else:
        assert captured.err == "" and wanted in captured.out, captured

@pytest.mark.parametrize("state, source, line, reads", [
    ("half", "half", TRAIN, {"run.json", "last.ckpt"}),
    ("whole", "whole", TRAIN, {"run.json"}),
    ("search", "runs/search", SEARCH, {"run.json", "shape.json"})])
def test_damaged_run_directories(root, tmp_path, capfd, state, source, line, reads):
    """The same command refuses the directory and leaves the evidence, or ends in the result of the
    undamaged one."""
    ends, directory, whole = collections.Counter(), tmp_path / "run", root / "whole"

    @settings(deadline=None, derandomize=True, max_examples=25, database=None,
              phases=[Phase.explicit, Phase.generate],  # shrinking would repeat long runs
              suppress_health_check=[HealthCheck.too_slow])
    @given(kind=st.sampled_from(["truncate", "noise", "swap"]), at=st.floats(0, 0.99),
           noise=st.binary(min_size=1, max_size=40), data=st.data())
    def check(kind, at, noise, data):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(root / source, directory)
        names = [name for name in RESULTS if (directory / name).exists()]
        name, other = data.draw(st.permutations(names))[:2]
        damaged = damage(directory, kind, name, other, at, noise)
        content = (directory / name).read_bytes()
        capfd.readouterr()
        status = run(line + " --quiet --out {out}", root=root, out=directory)
        check_outcome(capfd, status, kind, damaged & reads, "next: ")
        ends[status] += 1
        if status == 2:
            assert (directory / name).read_bytes() == content  # evidence is not overwritten
        elif state == "search":
            assert "shape.json" in damaged or tas.Shape.load(directory) == tas.Shape.load(
                root / source)
        else:
            status = run(f"eval {{out}} {CHEAP} --data-dir {{root}}/data", root=root, out=directory)
            left = damaged & {"shape.json", "weights.pt", "run.json"} if state == "whole" else {}
            check_outcome(capfd, status, kind, left, f"{read_result(whole)['accuracy']:.2f}%")
            assert status or identical(*[tas.load(d).state_dict() for d in (directory, whole)])

    check()
    assert min(ends[0], ends[2]) > 2, ends  # both happened

@pytest.mark.parametrize("name, other", [("world", 2), ("data", "imagenet"), ("command", "search")])
def test_a_run_of_other_processes_or_data_is_another(world, capfd, name, other):
    settings = tas.read_json(world / "half/run.json")["settings"]
    change_json(world / "half/run.json", {"settings": settings | {name: other}})
    check_refused(capfd, world, HALF, f"{name} was {other}, now {settings[name]}")

# ---- A full disk, numbers that are none, errors of the machine ----------------------------------

def fill_disk(patch, nth):
    """No file from the nth on can be flushed. Returns a list with an item for each try."""
    tries = []

    def look(descriptor):
        tries.append(descriptor)
        if len(tries) >= nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    spy(patch, os, "fsync", look)
    return tries

def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    tas.write_file(tmp_path / "file", b"old")
    fill_disk(monkeypatch, 1)
    with pytest.raises(tas.TASError, match="No space left"):
        tas.write_file(tmp_path / "file", b"new" * 1000)
    assert tree(tmp_path) == {tmp_path / "file": b"old"}

def test_a_full_disk_at_any_moment(root, tmp_path, capfd, monkeypatch):
    """Each file in turn is the one that does not fit; afterwards the same command goes on."""
    line = TRAIN + " --out {tmp}/{nth}"
    with monkeypatch.context() as patch:
        files = fill_disk(patch, math.inf)
        assert run(line, root=root, tmp=tmp_path, nth=0) == 0
    assert len(files) >= 7
    for nth in range(1, len(files) + 1):
        capfd.readouterr()
        with monkeypatch.context() as patch:
            fill_disk(patch, nth)
            assert run(line, root=root, tmp=tmp_path, nth=nth) == 2
        assert "No space left" in one_line(capfd)
        assert not list(tmp_path.rglob("*.tmp"))
        assert run(line, root=root, tmp=tmp_path, nth=nth) == 0
        check_same_run(tmp_path / str(nth), root / "whole")

def test_a_huge_learning_rate_stops_the_run(root, tmp_path, capfd):
    assert run(TRAIN + " --lr 1e9 --out {tmp}/run", root=root, tmp=tmp_path) == 2
    err = one_line(capfd)
    assert re.search(r"epoch \d+, step \d+, .*1e\+09.*lower --lr", err), err
    assert not (tmp_path / "run" / "weights.pt").exists()

@pytest.mark.parametrize("line, call, step, value", [
    (TRAIN, 7, 3, math.nan), (TRAIN, 8, 4, math.inf), (SEARCH, 7, 2, math.nan),
    (SEARCH, 8, 2, math.inf), (SEARCH, 6, 1, math.nan), (GUIDED, 7, 3, math.nan)])
def test_a_loss_that_is_not_finite_is_located(root, tmp_path, capfd, monkeypatch, line, call, step,
                                              value):
    """24 images, batch 6: 4 steps of training or 2 of search, of 2 losses each, in an epoch."""
    plain, count = F.cross_entropy, itertools.count(1)
    monkeypatch.setattr(F, "cross_entropy", lambda *a: plain(*a) * (
        value if next(count) == call else 1))
    assert run(line + " --out {tmp}/run", root=root, tmp=tmp_path) == 2
    err = one_line(capfd)
    assert f"epoch 2, step {step}," in err and "--lr 0.1" in err
    assert len(tas.load_tensors(tmp_path / "run" / "last.ckpt")["metrics"]) == 1
    assert len(read_metrics(tmp_path / "run")) == 1
    assert not (tmp_path / "run" / "shape.json").exists()

@pytest.mark.parametrize("error, word", [
    (OSError(24, "Too many open files"), "Too many open files"),
    (PermissionError(13, "Permission denied", "/x"), "/x"),
    (OSError("Caught OSError in worker\nTraceback\nOSError: no disk"), "error: OSError: no disk"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "--workers 0")])
def test_errors_of_the_machine_are_one_line(root, capfd, monkeypatch, error, word):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(tas, "evaluate", fail)
    assert run(EVAL + "whole", root=root) == 2
    assert word in one_line(capfd)

# ---- Interruptions ------------------------------------------------------------------------------

def uncounted(function):
    """The same function for a process whose calls are counted; most are within it, and it leaves
    nothing."""
    def call(*inputs):
        profiler = sys.getprofile()
        sys.setprofile(None)
        result = function(*inputs)
        sys.setprofile(profiler)
        return result
    return call

def child(event, number, line, out, rank, world, port):
    """What a process of `fork` does. It leaves its output and what it has seen in `out`."""
    seen = {"calls": 0, "checkpoints": 0, "steps": 0, "memory": [], "nets": [], "wrote": [],
            "tested": []}

    def is_last(name):
        seen[name] += 1
        return rank == world - 1 and name == event and seen[name] == number

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def note_memory():
        seen["memory"].append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    def profile(frame, *_):  # a call or return of a function of tas.py, or of one that it calls
        if frame.f_code.co_filename == tas.__file__ and is_last("calls"):
            die()

    def begin(*_):  # what comes before leaves nothing
        if event == "calls":
            sys.setprofile(profile)

    def step(args, net, *_):
        if not any(net is other for other in seen["nets"]):
            seen["nets"].append(net)
        if is_last("steps"):
            die()
        note_memory()

    def write(path, content):
        if Path(path).name == "last.ckpt" and is_last("checkpoints"):
            Path(f"{path}.tmp").write_bytes(bytes(content)[:1000])
            die()
        if Path(path).name == "shape.json" and world > 1:
            time.sleep(1)  # a slow disk: nobody may read what is not yet there

    signal.alarm(LIMIT)
    if world > 1:
        os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{world}", "MASTER_PORT": f"{port}",
                       "MASTER_ADDR": "127.0.0.1"}
    os.dup2(os.open(out / f"out{rank}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 1)
    tas.SYNTHETIC_IMAGES = 1024, 64
    tas.plan_search, tas.extract = uncounted(tas.plan_search), uncounted(tas.extract)
    patch = pytest.MonkeyPatch()  # never undone
    spy(patch, tas.Run, "__init__", begin)
    spy(patch, tas, "take_step", step)
    spy(patch, tas, "evaluate", lambda net, *_: seen["tested"].append(
        copy.deepcopy({**net.state_dict()})))
    spy(patch, tas, "write_file", write)
    spy(patch, os, "replace", lambda _, new: seen["wrote"].append(str(new)))
    status = tas.main(line.split())
    sys.setprofile(None)
    note_memory()
    seen["nets"] = [{**net.state_dict()} for net in seen["nets"]]
    seen["random"] = torch.get_rng_state()
    torch.save(seen, out / f"seen{rank}")
    sys.stdout.flush()
    os._exit(status)

def fork(event, number, line, out, world=1):
    """Run a command in so many processes, the last of which dies by kill -9 in the number-th of its
    "calls", "checkpoints" or "steps". Returns their exit statuses, and what they have seen. They
    start at once, as forks of a process that has imported everything."""
    out.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the first fork
        processes = [context.Process(target=child, args=(event, number, line, out, i, world, port))
                     for i in range(world)]
        for process in processes:
            process.start()
    for process in processes:
        process.join()
    seen = [torch.load(path) for path in sorted(out.glob("seen*"))]
    return [process.exitcode for process in processes], seen

def test_killed_at_random_moments(root, tmp_path):
    """kill -9 in calls drawn from all that an uninterrupted run makes."""
    line, rng = PRUNE.format(root=root) + f" --out {tmp_path}/runs", random.Random(4)
    status, [seen] = fork("calls", 0, line.replace("/runs", "/count"), tmp_path / "out")
    assert status == [0]
    finished = []  # epochs, after each try
    for _ in range(5):
        number = rng.randrange(seen["calls"] // 20, seen["calls"] // 3)
        assert fork("calls", number, line, tmp_path / "out")[0] == [-signal.SIGKILL]
        found = (tmp_path / "runs").glob("*/last.ckpt")
        finished.append(sum(len(tas.load_tensors(path)["metrics"]) for path in found))
    assert len(set(finished)) > 3, finished  # died in many places
    assert run(line) == 0
    check_parts(tmp_path / "runs", root / "runs")

def test_killed_while_writing_checkpoints(root, tmp_path):
    line = PRUNE.format(root=root) + f" --out {tmp_path}/runs"
    for part, nth, finished in (("teacher", 3, 2), ("search", 3, 1), ("pruned", 4, 1)):
        assert fork("checkpoints", nth, line, tmp_path / "out")[0] == [-signal.SIGKILL]
        checkpoint = tmp_path / "runs" / part / "last.ckpt"
        assert checkpoint.with_suffix(".ckpt.tmp").stat().st_size == 1000
        assert len(tas.load_tensors(checkpoint)["metrics"]) == finished
    assert run(line) == 0
    check_parts(tmp_path / "runs", root / "runs")

def test_interrupted_at_every_epoch_and_in_every_file(root, tmp_path, monkeypatch):
    """Where the second checkpoint is not written, the first was, so that a try gets one epoch on.
    At the end of a part come weights.pt (if any), shape.json and run.json."""
    begin = [("run.json", 1), ("metrics.jsonl", 1), ("last.ckpt", 1)]
    end = [("weights.pt", 1), ("shape.json", 1), ("run.json", 1)]
    two = [("last.ckpt", 2)] * 2
    for name, nth in [*begin, *two, *end, *begin[2:], *two, *end[1:], ("metrics.jsonl", 2),
                      *two[1:], *end]:
        with monkeypatch.context() as patch:
            stop_while_writing(patch, nth, name)
            assert run(PRUNE + " --out {tmp}/runs", root=root, tmp=tmp_path) == 130, (name, nth)
    assert run(PRUNE + " --out {tmp}/runs", root=root, tmp=tmp_path) == 0
    check_parts(tmp_path / "runs", root / "runs")

@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_stopped_with_a_hint(root, tmp_path, monkeypatch, capfd, how):
    count = itertools.count(1)

    def look(*_):
        if next(count) == 6:  # in the second epoch
            os.kill(os.getpid(), how)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
    spy(monkeypatch, tas, "take_step", look)
    assert run(TRAIN + " --out {tmp}/run", root=root, tmp=tmp_path) == 130
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "same command" in err
    assert len(tas.load_tensors(tmp_path / "run" / "last.ckpt")["metrics"]) == 1
    assert run(TRAIN + " --out {tmp}/run", root=root, tmp=tmp_path) == 0
    check_same_run(tmp_path / "run", root / "whole")

def test_finished_parts_are_not_repeated(root, capsys):
    before = {p: p.stat().st_mtime_ns for p in (root / "runs").rglob("*")}
    assert run(PRUNE + " --out {root}/runs", root=root) == 0
    assert {p: p.stat().st_mtime_ns for p in (root / "runs").rglob("*")} == before
    assert "1/3" not in capsys.readouterr().out

def test_large_images_do_not_depend_on_workers_or_interruptions(tmp_path, monkeypatch):
    write_images(tmp_path / "data", train=4, size=90)
    line = "train --data imagenet --data-dir {tmp}/data --image-size 72 --arch resnet18 " \
           "--epochs 2 --batch-size 4 --precision fp32 --workers {n} --out {tmp}/{n}"
    for n in (0, 2):
        assert run(line, tmp=tmp_path, n=n) == 0
    check_same_run(tmp_path / "0", tmp_path / "2")
    with monkeypatch.context() as patch:
        stop_while_writing(patch, 2)
        assert run(line, tmp=tmp_path, n=1) == 130
    assert run(line, tmp=tmp_path, n=1) == 0
    check_same_run(tmp_path / "0", tmp_path / "1")

# ---- Several processes --------------------------------------------------------------------------

def start(line, *python, stdout=subprocess.PIPE):
    """Run a command as a process of its own: its exit status, output and error output."""
    words = [sys.executable, *(python or [tas.__file__]), *line.split()]
    done = subprocess.run(words, text=True, cwd=HERE, timeout=LIMIT, stdout=stdout,
                          stderr=subprocess.PIPE)
    return done.returncode, done.stdout, done.stderr

def test_two_processes_agree(root, tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    status, [a, b] = fork("", 0, PRUNE.format(root=root) + f" --out {runs}", out, 2)
    assert status == [0, 0]
    assert (out / "out0").read_text().count("search 3/3") == 1
    assert (out / "out1").read_text() == ""  # only the first one speaks ...
    assert len(a["wrote"]) > 10 and b["wrote"] == []  # ... and writes
    assert len(a["nets"]) == 3 and identical(a["nets"], b["nets"])
    for name, net in zip(("teacher", "search", "pruned"), a["nets"]):
        assert identical({**tas.load_tensors(runs / name / "last.ckpt")["parts"]["net"]}, net)
    assert 0.475 <= macs_share(runs / "search") <= 0.525
    assert tas.load(runs / "pruned").shape == tas.Shape.load(runs / "search")
    # As a user types it.
    line = TRAIN.format(root=root) + f" --epochs 3 --out {tmp_path}/teacher"
    status, said, err = start(line, "-m", "torch.distributed.run", "--standalone",
                              "--nproc_per_node=2", tas.__file__)
    assert status == 0 and said.count("teacher 3/3") == 1, err
    check_same_run(tmp_path / "teacher", runs / "teacher")

def test_two_processes_that_draw_a_shape(root, tmp_path):
    """Nothing is learned, so the first process is at the end of it at once."""
    line = SEARCH.format(root=root) + f" --method random --out {tmp_path}/run"
    assert fork("", 0, line, tmp_path / "out", 2)[0] == [0, 0]
    assert read_result(tmp_path / "run")["macs"] == tas.count_macs(tas.Shape.load(tmp_path / "run"))

def test_a_dead_process_ends_the_run(root, tmp_path):
    line = TRAIN.format(root=root) + f" --out {tmp_path}/run"
    [first, second], _ = fork("steps", 6, line, tmp_path / "out", 2)
    assert first not in (0, -signal.SIGALRM) and second == -signal.SIGKILL
    assert len(tas.load_tensors(tmp_path / "run" / "last.ckpt")["metrics"]) == 1
    assert not (tmp_path / "run" / "weights.pt").exists()

def test_two_processes_are_the_slow_ones(root, tmp_path, capsys):
    """Each has the gradient of its half of every batch, and the mean is followed; metrics are those
    of all images, as one process finds them afterwards."""
    line, runs = TRAIN.format(root=root) + f" --out {tmp_path}/", tmp_path / "run"
    status, [a, b] = fork("", 0, line + "run", tmp_path / "out", 2)
    assert status == [0, 0] and a["random"].equal(b["random"])
    data = tas.load_data("folder", f"{root}/data", 8, torch.device("cpu"), 0)
    torch.manual_seed(0)
    net, seen = tas.ResNet(tas.Space("resnet20", 2, 8).full), []
    weights = list(net.parameters())
    velocity = [torch.zeros_like(w) for w in weights]
    for i, (x, y) in enumerate(data.train.batches(torch.randperm(24), 6, True)):
        parts = [(net(x[rank::2]), y[rank::2]) for rank in range(2)]
        loss = sum(cross_entropy(z, y) for z, y in parts) / 2
        lr = 0.1 if i == 0 else 0.05 * (1 + math.cos(math.pi * (i - 0.8) / 7.2))
        sgd_step(weights, loss, velocity, lr, 5e-4)
        seen.append((loss.item(), statistics.fmean(accuracy(z, y) for z, y in parts)))
    found = read_metrics(runs)[0]
    for name, value in means(("train_loss", "train_accuracy"), seen).items():
        assert found[name] == pytest.approx(value, rel=1e-3)
    assert len(a["tested"]) == 2 and identical(a["tested"], b["tested"])
    capsys.readouterr()
    assert run(f"eval {CHEAP} --data-dir {root}/data {runs}") == 0
    assert f"accuracy {read_result(runs)['accuracy']:.2f}% on 8 images" in capsys.readouterr().out

def test_two_processes_of_a_search_stay_in_step(root, tmp_path):
    line = SEARCH.format(root=root) + f" --epochs 1 --out {tmp_path}/search"
    status, [a, b] = fork("", 0, line, tmp_path / "out", 2)
    assert status == [0, 0] and a["random"].equal(b["random"])

def test_two_processes_go_on(root, tmp_path):
    """As if they had not been interrupted."""
    line = TRAIN.format(root=root) + f" --out {tmp_path}/"
    assert fork("", 0, line + "whole", tmp_path / "out", 2)[0] == [0, 0]
    assert fork("steps", 6, line + "parts", tmp_path / "out", 2)[0][1] == -signal.SIGKILL
    assert len(read_metrics(tmp_path / "parts")) == 1
    assert fork("", 0, line + "parts", tmp_path / "out", 2)[0] == [0, 0]
    check_same_run(tmp_path / "whole", tmp_path / "parts")

@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_downloads(monkeypatch, first):
    """While the others wait."""
    calls = []
    monkeypatch.setattr(tas, "setup", lambda args: None)
    monkeypatch.setattr(tas, "is_first", lambda: first)
    monkeypatch.setattr(tas, "wait_for_all", lambda: calls.append("wait"))
    monkeypatch.setattr(tas, "load_data", lambda *_: calls.append("load") or SimpleNamespace(
        train=SimpleNamespace(labels=range(99)), classes=["a", "b"]))
    args = tas.build_parser().parse_args(
        "train --data cifar10 --arch resnet20 --batch-size 9".split())
    args.world = 1
    tas.open_data(args)
    assert calls == (["load", "wait"] if first else ["wait", "load"])

# ---- What the commands leave --------------------------------------------------------------------

def test_prune_leaves_three_runs(root):
    shape = tas.Shape.load(root / "runs" / "search" / "shape.json")
    assert tas.Shape.load(root / "runs" / "search") == shape
    assert abs(macs_share(root / "runs" / "search") - 0.5) <= 0.025
    for name, files in (("teacher", RESULTS), ("search", RESULTS[:4]), ("pruned", RESULTS)):
        assert sorted(p.name for p in (root / "runs" / name).glob("*")) == sorted(files)
        net = tas.ResNet(shape)
        if name != "search":
            net = tas.load(root / "runs" / name)
            assert net.shape == (shape.full if name == "teacher" else shape) and not net.training
        info = tas.read_json(root / "runs" / name / "run.json")
        assert info["command"].startswith("python tas.py prune --data folder")
        assert info["settings"]["seed"] == 0 and info["versions"]["torch"] == torch.__version__
        assert info["precision"] == "fp32" and "threads" in info["machine"]
        assert info["result"]["full_macs"] == tas.count_macs(shape.full)
        assert info["result"]["macs"] == tas.count_macs(net.shape)
        assert info["result"]["params"] == sum(p.numel() for p in net.parameters())
    above, result = [read_result(root / "runs" / name) for name in ("teacher", "pruned")]
    assert result["teacher_accuracy"] == above["accuracy"] and result["classes"] == ["a", "b"]
    assert result["search"]["method"] == "tas" and result["search"]["num_samples"] == 2
    assert above["search"] is None and above["teacher_accuracy"] is None

@pytest.mark.parametrize("flags, epochs", [
    ("--epochs 1 --transfer none", {"search": 1, "pruned": 1}),
    ("--epochs 1 --teacher {root}/runs/teacher --quiet", {"search": 1, "pruned": 1}),
    ("--epochs 1 --transfer init --method random", {"teacher": 1, "search": 0, "pruned": 1}),
    ("--epochs 1 --init {root}/other", {"teacher": 1, "search": 1, "pruned": 1}),
    ("--epochs 3 --search-epochs 2", {"teacher": 3, "search": 2, "pruned": 3}),
    ("--epochs 2 --teacher-epochs 1", {"teacher": 1, "search": 2, "pruned": 2}),
    ("--epochs 1 --search-epochs 2 --teacher-epochs 3", {"teacher": 3, "search": 2, "pruned": 1})])
def test_prune_makes_what_it_needs(root, tmp_path, capsys, flags, epochs):
    """So many epochs of each part, and only the teacher starts from other weights."""
    line = PRUNE.replace("--epochs 3", flags) + " --out {tmp}"
    assert run(line, root=root, tmp=tmp_path) == 0
    made = {path.name: path for path in tmp_path.iterdir()}
    assert made.keys() == epochs.keys()
    for name, path in made.items():
        assert len(read_metrics(path)) == epochs[name]
        begins_anew = "--init" not in flags or name != "teacher"
        start = None if begins_anew else tas.checksum(tas.load(root / "other"))
        assert tas.read_json(path / "run.json")["settings"].get("init") == start
    out = capsys.readouterr().out
    assert out.count("next: ") == 1
    assert bool(re.search(r"^\w+ 1/\d: ", out, re.M)) == ("--quiet" not in flags)

def test_prune_is_of_the_image_size_of_its_weights(root, tmp_path):
    """As a training from them is; the search and the pruned network, too."""
    line = PRUNE.replace("--image-size 8 ", "").replace("--epochs 3", "--epochs 1")
    write_images(tmp_path / "data", size=16)
    assert run(line + " --init {init}/other --out {root}/runs", root=tmp_path, init=root) == 0
    for part in ("teacher", "search", "pruned"):
        assert tas.Shape.load(tmp_path / "runs" / part).image_size == 8
        assert tas.read_json(tmp_path / f"runs/{part}/run.json")["settings"]["image_size"] == 8

@pytest.mark.parametrize("first, words", [
    (f"{SEARCH} --epochs 1 --flops 0.4 --out {{tmp}}/search", ["{tmp}/search", "target was"]),
    (f"{SEARCH} --epochs 1 --arch-lr 0.01 --out {{tmp}}/search", ["arch_lr was 0.01, now 0.05"]),
    (f"{DISTIL} --epochs 1 --out {{tmp}}/pruned", ["{tmp}/pruned", "without {tmp}/search"]),
    (f"{DISTIL} --epochs 1 --out {{tmp}}/pruned",
     ["{tmp}/pruned", "without {tmp}/teacher"])])
def test_prune_refuses_what_was_begun_before_it_trains(root, tmp_path, capfd, first, words):
    line = PRUNE.replace("--epochs 3", "--epochs 1") + f" --out {tmp_path}"
    assert run(first, root=root, tmp=tmp_path) == 0
    if "teacher" in words[-1]:
        assert run(SEARCH.replace("--epochs 3", "--epochs 1") + " --out {tmp}/search", root=root,
                   tmp=tmp_path) == 0
    capfd.readouterr()
    check_refused(capfd, root, line, *[word.format(tmp=tmp_path) for word in words])
    assert not (tmp_path / "teacher").exists()

@pytest.mark.parametrize("name", ["teacher", "pruned"])
def test_eval_gives_the_accuracy_of_the_run(root, capsys, name):
    """And so do the weights, loaded without this program's help, image by image."""
    path = root / "runs" / name
    accuracy = read_result(path)["accuracy"]
    assert run(f"eval {path} --data folder --data-dir {root}/data --workers 0") == 0
    assert f"accuracy {accuracy:.2f}% on 8 images" in capsys.readouterr().out
    assert read_metrics(path)[-1]["test_accuracy"] == accuracy
    net, right = tas.ResNet(tas.Shape.load(path / "shape.json")), 0
    net.load_state_dict(torch.load(path / "weights.pt", weights_only=True))
    net.eval()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for label, folder in enumerate("ab"):
        for file in (root / "data" / "val" / folder).iterdir():
            pixels = (np.asarray(Image.open(file)) / 255 - mean) / std
            x = torch.tensor(pixels).permute(2, 0, 1)[None].float()
            assert torch.equal(net(x), tas.load(path)(x))
            right += int(net(x).argmax()) == label
    assert accuracy == 100 * right / 8

def test_top_5_of_many_classes(tmp_path, monkeypatch, capsys):
    """Of more than 100, for which 6 stand here."""
    monkeypatch.setattr(tas, "TOP5_CLASSES", 5)
    write_images(tmp_path / "data", "abcdef", train=4, val=3)
    assert run(TRAIN + " --out {root}/run", root=tmp_path) == 0
    top5 = read_metrics(tmp_path / "run")[-1]["test_top5"]
    assert read_result(tmp_path / "run")["top5"] == top5 < 100
    assert run(EVAL + "run", root=tmp_path) == 0
    assert f"(top-5 {top5:.2f}%)" in capsys.readouterr().out

def test_photographs(tmp_path):
    make_photographs(tmp_path / "data")
    assert run("prune --data imagenet --data-dir {tmp}/data --arch resnet18 --image-size 72 "
               "--epochs 1 --batch-size 8 --workers 1 --flops 0.5 --search width --precision fp32 "
               "--out {tmp}/runs", tmp=tmp_path) == 0
    assert abs(macs_share(tmp_path / "runs" / "pruned") - 0.5) <= 0.025
    assert tas.load(tmp_path / "runs" / "pruned")(torch.zeros(1, 3, 72, 72)).shape == (1, 2)
    for part in ("teacher", "search", "pruned"):
        assert [line["epoch"] for line in read_metrics(tmp_path / "runs" / part)] == [1]
        kept = tas.read_json(tmp_path / "runs" / part / "run.json")["settings"]
        assert kept["weight_decay"] == 1e-4 and kept["images"] == "16 + 6 images, 2 classes"

def test_a_network_without_a_shape_knows_no_search(root, tmp_path, monkeypatch):
    """Even when it is trained in a directory that has a run.json."""
    monkeypatch.chdir(root / "runs" / "search")
    assert run(TRAIN + " --epochs 1 --out {tmp}/run", root=root, tmp=tmp_path) == 0
    assert read_result(tmp_path / "run")["search"] is None

def test_training_goes_on_from_weights(root, tmp_path, monkeypatch):
    """A pruned network keeps its shape; with other classes it has a new classifier."""
    seen = []
    spy(monkeypatch, tas, "train", lambda run, data, net, teacher: seen.append(
        copy.deepcopy(net.state_dict())))
    write_images(tmp_path / "data", "abc")
    for i, (part, place) in enumerate(itertools.product(("teacher", "pruned"), (root, tmp_path))):
        line = f"train {CHEAP} --data-dir {place}/data --epochs 1 --init {root}/runs/{part}"
        assert run(f"{line} --out {tmp_path}/{i}") == 0
        source = tas.load(root / "runs" / part)
        assert tas.load(tmp_path / str(i)).shape.stages == source.shape.stages
        other = [name for name, tensor in source.state_dict().items()
                 if not identical(tensor, seen[-1][name])]
        assert other == (["fc.weight", "fc.bias"] if place == tmp_path else [])
    assert run(TRAIN + " --epochs 1 --out {tmp}/new", root=root, tmp=tmp_path) == 0
    assert len(seen) == 5 and not identical(seen[-1], seen[0])
    shutil.rmtree(tmp_path / "data")
    write_images(tmp_path / "data", ("ape", "cat"))  # as many others
    teacher = shutil.copytree(root / "runs/teacher", tmp_path / "teacher")
    line = f"train {CHEAP} --data-dir {tmp_path}/data --epochs 1 --init {teacher}"
    assert run(f"{line} --out {tmp_path}/others") == 0
    (teacher / "run.json").unlink()  # weights from elsewhere, whose classes are not told
    assert run(f"{line} --out {tmp_path}/untold") == 0
    old = tas.load(teacher).state_dict()
    for state, kept in zip(seen[-2:], (False, True)):
        assert identical(state["conv1.weight"], old["conv1.weight"])
        assert identical(state["fc.weight"], old["fc.weight"]) == kept

@pytest.mark.parametrize("switch, share", [
    ("--flops 1.4M", 1.4e6 / 2550912), ("--search width", 0.5), ("--round 8", 0.5),
    ("--search depth --flops 0.65", 0.65), ("--method random", 0.5), ("--method uniform", 0.5),
    ("--method random --search width --round 4", 0.5), ("--method uniform --round 2", 0.5)])
def test_the_shape_is_what_the_switches_say(root, tmp_path, switch, share):
    assert run(f"{SEARCH} {switch} --out {{tmp}}/run", root=root, tmp=tmp_path) == 0
    assert abs(macs_share(tmp_path / "run") / share - 1) <= 0.05 + 1e-6
    shape = tas.Shape.load(tmp_path / "run" / "shape.json")
    if "--search width" in switch or "uniform" in switch:
        assert list(map(len, shape.stages)) == [3, 3, 3]
    if "--search depth" in switch:
        assert {c for widths in shape.stages[2] for c in widths} == {64} and shape.stem == 16
    multiple = int((switch + " --round 1").split("--round ")[1].split()[0])
    assert [c % multiple for c in shape.convs] == [0] * len(shape.convs)
    if "uniform" in switch:
        assert len({*shape.convs[:7]}) == 1 and shape.stem < shape.stages[2][0][0] < 64
    assert (tmp_path / "run" / "metrics.jsonl").exists() == ("--method" not in switch)

def test_random_sizes_follow_the_seed_and_the_tolerance_is_kept(root, tmp_path):
    flags = {"0": "", "again": "", "1": "--seed 1", "close": "--tolerance 0.004"}
    for name, flag in flags.items():
        assert run(f"{SEARCH} --method random {flag} --out {tmp_path}/{name}", root=root) == 0
    shapes = [tas.Shape.load(tmp_path / name) for name in ("0", "again", "1")]
    assert shapes[0] == shapes[1] != shapes[2]
    close, other = (abs(macs_share(tmp_path / name) - 0.5) for name in ("close", "0"))
    assert close <= 0.002 < other

def test_a_search_under_another_cost(root, tmp_path, capfd):
    space = tas.Space("resnet20", 2, 8)
    cost = write_costs(tmp_path / "cost.json", space, 1)
    full = slow_cost(space, cost, space.full)
    line = SEARCH + " --cost {tmp}/cost.json --out {tmp}/"
    for name, budget, target in (("share", "0.7", 0.7 * full),
                                 ("unit", f"{0.8 * full:.3f}mJ", 0.8 * full)):
        assert run(f"{line}{name} --budget {budget}", root=root, tmp=tmp_path) == 0
        found = slow_cost(space, cost, tas.Shape.load(tmp_path / name))
        assert abs(found / target - 1) <= 0.05
        assert f"{found:.4g} mJ, target {target:.4g} mJ" in capfd.readouterr().out
        info = tas.read_json(tmp_path / name / "run.json")
        assert info["settings"]["unit"] == "mJ" and info["result"]["cost"] == pytest.approx(found)
        assert 0 < read_metrics(tmp_path / name)[-1]["argmax_macs"] < 2 * full
    assert run(f"train {CHEAP} --data-dir {{root}}/data --shape {{tmp}}/unit --epochs 1 "
               "--out {tmp}/trained", root=root, tmp=tmp_path) == 0
    trained = read_result(tmp_path / "trained")
    assert trained["cost"] == info["result"]["cost"] and trained["search"] == info["settings"]
    write_costs(tmp_path / "cost.json", space, 2)
    check_refused(capfd, root, f"{line}share --budget 0.7", "cost was", tmp=tmp_path)
    for flags, word in (("--budget 0.7 --method uniform", "uniform"),
                        ("--budget 0.0001", "possible are"),
                        *[(f"--budget {text}", f"--flops {text}:")
                          for text in ("2", "3kg", "3M", "mJ", "0mJ", "1e-300")]):
        check_refused(capfd, root, f"{line}x {flags}", word, tmp=tmp_path)

@pytest.mark.parametrize("images, steps", [(24, 3), (23, 2)])
def test_the_halves_of_the_search_do_not_mix(tmp_path, monkeypatch, images, steps):
    """Large images, whose split was used before: the batches come from either half in turn. No
    other one is made, such as the third of the larger half of 23."""
    write_images(tmp_path / "data", "abc", train=8, size=66)
    for path in [*(tmp_path / "data/train/a").iterdir()][:24 - images]:
        path.unlink()
    data = tas.load_data("imagenet", f"{tmp_path}/data", 66, torch.device("cpu"), 0)
    assert len(list(data.train.batches(torch.arange(images), 4, True))) == images // 4
    pickle.dumps(data.train)  # as for worker processes that are not forks
    seen = []
    spy(monkeypatch, tas.LargeImages, "__getitem__", lambda split, item: seen.append(item[0]))
    assert run("search --data imagenet --data-dir {tmp}/data --image-size 66 --arch resnet18 "
               "--epochs 2 --batch-size 4 --precision fp32 --workers 0 --out {tmp}/run",
               tmp=tmp_path) == 0
    halves = [set(half.tolist()) for half in tas.split_halves(data.train.labels, 0)]
    assert len(seen) == 16 * steps
    for start in range(0, 16 * steps, 4):
        assert set(seen[start:start + 4]) < halves[start // 4 % 2]

def test_what_does_not_change_the_result_is_no_other_setting(root, world, capsys):
    capsys.readouterr()
    assert run(HALF + " --workers 1 --quiet --device cpu", root=world) == 0
    check_same_run(world / "half", root / "whole")
    assert "half 2/2" not in capsys.readouterr().out

@pytest.mark.parametrize("native, requested, expected", [
    ({"avx512_bf16": True}, "auto", "bf16"), ({"amx_bf16": True}, "auto", "bf16"),
    ({"avx512_f": True, "avx512_bf16": False}, "auto", "fp32"), ({}, "auto", "fp32"),
    ({}, "bf16", "bf16"), ({"avx512_bf16": True}, "fp32", "fp32"), (True, "auto", "bf16"),
    (False, "auto", "fp32")])
def test_precision_is_a_rule(monkeypatch, native, requested, expected):
    """bf16 where it is native: as the processor or CUDA says."""
    args = tas.build_parser().parse_args(["eval", "DIR", "--data", "synthetic"])
    args.precision, args.device = requested, torch.device("cpu" if isinstance(native, dict) else
                                                          "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: native, raising=False)
    assert tas.native_precision(args) == expected

def test_a_teacher_is_measured_as_its_student_is_trained(root, tmp_path, monkeypatch, capsys):
    """Twice, before all and before the distillation, in the precision of both."""
    monkeypatch.setattr(tas, "native_precision",
                        lambda args: "bf16" if args.precision == "auto" else args.precision)
    seen = []
    spy(monkeypatch, tas, "evaluate", lambda net, split, args: seen.append(args.precision))
    line = PRUNE.replace("--precision fp32 ", "").replace("--epochs 3", "--epochs 1")
    assert run(line + " --method random --teacher {root}/other --out {tmp}", root=root,
               tmp=tmp_path) == 0
    told = re.findall(r"^teacher \S+: accuracy (.+)%", capsys.readouterr().out, re.M)
    assert seen == ["bf16"] * 3 and len(told) == 2 and len(set(told)) == 1

def test_a_run_keeps_its_precision(root, tmp_path, monkeypatch):
    """It was begun where bf16 is native, and goes on and is evaluated where it is not."""
    line = TRAIN.replace("fp32", "auto") + " --out {tmp}/run"
    with monkeypatch.context() as patch:
        patch.setattr(tas, "native_precision", lambda args: "bf16")
        stop_while_writing(patch, 2)
        assert run(line, root=root, tmp=tmp_path) == 130
    monkeypatch.setattr(tas, "native_precision", lambda args: "fp32")
    assert run(line, root=root, tmp=tmp_path) == 0
    assert tas.read_json(tmp_path / "run" / "run.json")["precision"] == "bf16"
    monkeypatch.undo()
    assert run(TRAIN + " --precision bf16 --out {tmp}/whole", root=root, tmp=tmp_path) == 0
    check_same_run(tmp_path / "run", tmp_path / "whole")
    assert run(SEARCH + " --precision bf16 --out {tmp}/search", root=root, tmp=tmp_path) == 0
    for found, in_fp32 in (("run", "whole"), ("search", "runs/search")):
        assert read_metrics(tmp_path / found) != read_metrics(root / in_fp32)
    seen = []
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)  # nothing is native
    spy(monkeypatch, tas, "evaluate", lambda net, split, args: seen.append(args.precision))
    for precision in ("auto", "fp32"):
        line = f"eval {CHEAP} --data-dir {root}/data {tmp_path}/run --precision {precision}"
        assert run(line) == 0
    assert seen == ["bf16", "fp32"]

def test_the_accuracy_is_that_of_the_last_epoch(root, tmp_path, monkeypatch):
    """Not of the best one."""
    falling = iter([(75.0, 100.0), (50.0, 100.0)])
    monkeypatch.setattr(tas, "evaluate", lambda *_: next(falling))
    assert run(TRAIN + " --out {tmp}/run", root=root, tmp=tmp_path) == 0
    assert read_result(tmp_path / "run")["accuracy"] == 50

@pytest.mark.parametrize("line, where", [
    ("train --arch resnet20", "teacher"), ("train --shape {root}/runs/search", "pruned"),
    ("search --arch resnet20 --method random", "search")])
def test_where_results_go(root, tmp_path, monkeypatch, line, where):
    monkeypatch.chdir(tmp_path)
    assert run(f"{line} {CHEAP} --epochs 1 --data-dir {{root}}/data", root=root) == 0
    assert [p.parent for p in Path().rglob("shape.json")] == [Path("runs/data-resnet20") / where]

def test_seconds_of_a_run(root):
    for part in ("teacher", "search", "pruned"):
        lines = map(json.loads, (root / "runs" / part / "metrics.jsonl").read_text().splitlines())
        seconds = tas.read_json(root / "runs" / part / "run.json")["result"]["seconds"]
        assert seconds == pytest.approx(sum(line["seconds"] for line in lines), abs=0.06)

def test_a_summary(root, capfd):
    shape = tas.Shape.load(root / "runs/pruned")
    params = sum(p.numel() for p in tas.load(root / "runs/pruned").parameters())
    assert run(EVAL + "runs/pruned", root=root) == 0
    assert (f"{slow_macs(shape) / 1e6:.2f}M MACs ({macs_share(root / 'runs/pruned'):.1%} of the "
            f"unpruned), {params / 1e6:.3f}M parameters") in capfd.readouterr().out

# ---- What the commands say, and what they take --------------------------------------------------

@pytest.mark.parametrize("spoiled", [False, True])
def test_the_teacher_s_accuracy_comes_before_the_search(root, tmp_path, capfd, spoiled):
    """With a warning where it classifies no better than chance."""
    shutil.copytree(root / "runs/teacher", tmp_path / "teacher")
    net = tas.load(root / "runs/teacher")
    if spoiled:
        change_state(tmp_path / "teacher/weights.pt", lambda state: [
            t.zero_() for name, t in state.items() if name.startswith("fc.")])
        net.fc.weight.data.zero_()
        net.fc.bias.data.zero_()
    data = tas.load_data("folder", f"{root}/data", 8, torch.device("cpu"), 0)
    [(x, y)] = data.test.batches(torch.arange(8), 8, False)
    with torch.no_grad():
        accuracy = 100 * float((net(x).argmax(1) == y).double().mean())
    line = PRUNE.replace("--epochs 3", "--epochs 1") + " --teacher {tmp}/teacher --out {tmp}/runs"
    assert run(line, root=root, tmp=tmp_path) == 0
    out, err = capfd.readouterr()
    assert f"teacher: accuracy {accuracy:.2f}% on 8 images" in out.split("search 1/1")[0]
    assert ("warning: the teacher is near chance" in err) == (accuracy < 55) == spoiled
    assert read_result(tmp_path / "runs/pruned")["teacher_accuracy"] == accuracy

@pytest.mark.parametrize("accuracy, warned", [(18.9, True), (19.1, False)])
def test_a_teacher_near_chance(monkeypatch, capfd, accuracy, warned):
    """Of ten classes; near is within a tenth of the way to 100%."""
    args = tas.build_parser().parse_args("train --data synthetic --teacher T".split())
    args.device = torch.device("cpu")
    data = SimpleNamespace(test=SimpleNamespace(labels=range(9)), classes=list("0123456789"))
    monkeypatch.setattr(tas, "evaluate", lambda *_: (accuracy, 100.0))
    assert tas.measure_teacher(args, data, torch.nn.Identity()) == accuracy
    assert ("near chance" in capfd.readouterr().err) == warned

def test_a_network_for_large_images_on_small_ones(tmp_path, capfd):
    write_images(tmp_path / "data", size=32)
    line = f"train {CHEAP} --epochs 1 --image-size 32 --data-dir {tmp_path}/data --out {tmp_path}/"
    for arch, warned in (("resnet18", True), ("resnet20", False)):
        assert run(f"{line}{arch} --arch {arch}") == 0
        assert ("warning: resnet18" in capfd.readouterr().err) == warned

class Terminal(io.StringIO):
    def isatty(self):
        return True

def test_a_bar_on_a_terminal(root, tmp_path, capsys, monkeypatch):
    """One bar with loss, accuracy and MACs, in the place of a line an epoch."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run(SEARCH + " --out {tmp}/run", root=root, tmp=tmp_path) == 0
    bar = sys.stderr.getvalue()
    assert re.search(r"6/6 .*loss \d+\.\d{3}, accuracy \d+\.\d%, MACs \d+\.\d% of the target, "
                     r"lr \S+, \d+ images/s, \d+ MB", bar)
    assert "1/3:" not in capsys.readouterr().out

@pytest.mark.parametrize("flags, words", [
    ("", ["{tmp}/teacher: ", "{tmp}/search/shape.json: ", "teacher {tmp}/teacher: ",
          "{tmp}/pruned: ", "next: "]),
    ("--lr 1e9", ["error: {tmp}/teacher: the loss is not finite"])])
def test_what_is_printed_has_lines_of_its_own(root, tmp_path, monkeypatch, flags, words):
    """On a terminal, where bars are drawn over themselves and stay above it."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    run(f"{PRUNE} --epochs 2 {flags} --out {{tmp}}", root=root, tmp=tmp_path)
    bars, printed = [], []
    for text in terminal.getvalue().split("\n"):
        (bars if "\r" in text else printed).append(text)
    assert len(bars) == (1 if flags else 3) and all("step/s" in text for text in bars)
    assert printed.pop() == ""  # after the last end of a line
    for text, word in zip(printed, words, strict=True):
        assert text.startswith(word.format(tmp=tmp_path)) and "%|" not in text

def test_commands_of_one_process(root, tmp_path, monkeypatch):
    """As those of a notebook: each reads the images that are there; also in a thread."""
    counts, line = [], TRAIN.replace("{root}/data", "data") + " --epochs 1 --out "
    for i, train in enumerate((12, 8, 8)):
        write_images(tmp_path / f"{i}/data", train=train)
        monkeypatch.chdir(tmp_path / str(i))
        if i == 2:
            for path in Path("data").rglob("3.png"):
                path.unlink()
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            assert thread.submit(run, line + "run").result() == 0
        counts.append(tas.read_json("run/run.json")["settings"]["images"])
    assert [text.split(",")[0] for text in counts] == ["24 + 8 images", "16 + 8 images",
                                                       "14 + 6 images"]

def test_the_next_command(root, tmp_path, capfd):
    """A search after the unpruned network, then its distillation, then the export."""
    nexts = []
    for line in (f"{TRAIN} --epochs 1 --out {{tmp}}/teacher",
                 f"{SEARCH} --method random --out {{tmp}}/search",
                 f"{GUIDED} --epochs 1 --out {{tmp}}/pruned"):
        assert run(line, root=root, tmp=tmp_path) == 0
        nexts.append(capfd.readouterr().out.splitlines()[-1])
    words = f"--data folder --data-dir {root}/data --image-size 8"
    assert nexts == [f"next: python tas.py search {words} --arch resnet20 --flops 0.5",
                     f"next: python tas.py train {words} --shape {tmp_path}/search/shape.json "
                     f"--teacher {tmp_path}/teacher",
                     f"next: python tools/export.py {tmp_path}/pruned"]

def test_the_next_command_can_be_typed(root, tmp_path, capfd):
    """Whatever the directories are called."""
    out = f"{tmp_path}/DATA of 'mine'"
    words = SEARCH.format(root=root).split() + ["--epochs", "1", "--method", "random", "--out", out]
    assert tas.main(words) == 0
    program, *words = shlex.split(capfd.readouterr().out.splitlines()[-1].split("python ", 1)[1])
    args = tas.build_parser().parse_args(words)
    assert program == "tas.py" and args.shape == f"{out}/shape.json"
    assert (args.data, args.data_dir, args.image_size) == ("folder", f"{root}/data", 8)

@pytest.mark.parametrize("command", ["", "train", "search", "prune", "eval"])
def test_help_fits_one_screen(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        run(command + " --help")
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert 10 < out.count("\n") <= 50 and out.startswith(f"usage: tas.py {command}".strip())
    assert "None" not in out and ("(default: 256)" in out or not command)

def test_import_is_light():
    names = "matplotlib", "torchvision", "tqdm"
    code = "import sys, torch; before = set(sys.modules); import tas; " \
           f"print([n for n in {names} if n in set(sys.modules) - before])"
    assert start("", "-c", code) == (0, "[]\n", "")

def test_metrics_of_the_machine(root):
    for part in ("teacher", "search"):
        lines = (root / "runs" / part / "metrics.jsonl").read_text().splitlines()
        for line in map(json.loads, lines):
            low, high = (24 / (line["seconds"] + off) for off in (0.005, -0.005))  # rounded
            assert low - 0.05 <= line["images_per_second"] <= high + 0.05
            assert 100 < line["memory_mb"] < 1e5

@pytest.mark.parametrize("platform, unit", [("linux", 1024), ("darwin", 1)])
def test_units_of_memory(monkeypatch, platform, unit):
    """getrusage(2) of Linux counts kilobytes, that of macOS bytes."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=3 * 10 ** 6))
    args = SimpleNamespace(device=torch.device("cpu"))
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    assert tas.resources(args, optimizer, 1, 0)["memory_mb"] == 3 * unit

def test_memory_of_the_search(tmp_path):
    """From the first step on it grows at most 1.5 times as much as that of a training."""
    growth = {}
    for command in ("train", "search"):
        line = f"{command} --data synthetic --arch resnet20 --epochs 1 --precision fp32 " \
               f"--workers 0 --out {tmp_path}/{command}"
        status, [seen] = fork("", 0, line, tmp_path / "out")
        assert status == [0] and seen["steps"] == 4
        growth[command] = seen["memory"][-1] - seen["memory"][0]  # KB
    assert 1e5 < growth["train"] and growth["search"] <= 1.5 * growth["train"]

# ---- README, reproduce.sh -----------------------------------------------------------------------

def test_readme_points_at_the_right_lines():
    """Every link to a line of tas.py leads to the definition or the section that it names."""
    code = Path(tas.__file__).read_text().splitlines()
    links = re.findall(r"\[`?([\w -]+)`?\]\(tas\.py#L(\d+)\)", (HERE / "README.md").read_text())
    assert len(links) > 20
    for name, number in links:
        assert re.match(rf"(class|def) {name}\b|# ---- {name} -", code[int(number) - 1]), name

def test_readme_s_commands_are_understood():
    text = (HERE / "README.md").read_text()
    lines = re.findall(r"^python tas\.py (.+)$", text, re.M)
    assert len(lines) >= 2
    for line in lines:
        assert tas.build_parser().parse_args(line.split()).function
    names = re.findall(r"`(\w+)`", text.split("## Deviations")[1].split("## Limits")[0])
    assert len(names) > 5 and [name for name in names if not hasattr(tas, name)] == []
    for path in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"python (tools/\w+\.py)", text):
        assert (HERE / path).exists(), path

NAMES = ["smoke", "cpu", "budgets", "latency", "full20", "table", "table1", "table2", "table3",
         "figure3"]

def reproduce(*words, **names):
    return subprocess.run(["bash", "reproduce.sh", *words], cwd=HERE, text=True, timeout=LIMIT,
                          capture_output=True, env=os.environ | names)

@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_is_a_plan_of_commands(name):
    """All are understood, in full and as a trial; what a training needs comes before it."""
    for names in ({}, {"EPOCHS": "1", "DATA": "synthetic", "BATCH": "512", "SEEDS": "0 1"}):
        plan = reproduce(name, "--dry-run", **names)
        assert plan.returncode == 0 and plan.stderr == ""
        made = {"shapes/cifar10-resnet20.json", "results/cifar10-resnet20-cpu/teacher"}
        lines = [line.split() for line in plan.stdout.splitlines() if line.startswith("python ")]
        assert lines[-1][1] in ("tools/report.py", "tools/bench.py")
        for _, program, *words in lines:
            if program == "tools/warm.py":
                assert words.pop(0) in made  # a teacher
            elif program not in ("tas.py", "tools/graphs.py"):
                assert (HERE / program).is_file()
                continue
            args = tas.build_parser().parse_args(words)
            assert not names or (args.epochs == 1 and args.data == "synthetic") or name == "smoke"
            for needed in (getattr(args, "shape", None), getattr(args, "teacher", None)):
                assert needed in (None, *made)
            made |= {args.out, f"{args.out}/shape.json"}

@pytest.mark.parametrize("name", ["cpu", "budgets", "latency", "full20", "table", "table2"])
def test_the_cost_of_an_experiment(name):
    """That of the commands: a step of training is three passes, one of the search two and a half
    for the images of both halves, distillation one of the unpruned network."""
    plan = reproduce(name, "--dry-run", IMAGENET="x").stdout
    done, passes = set(), 0
    for line in re.findall(r"^python (?:tas|tools/(?:warm|graphs))\.py (.+)$", plan, re.M):
        args = tas.build_parser().parse_args(line.split()[line.startswith("results"):])
        if args.out in done:  # a search that several trainings share
            continue
        done.add(args.out)
        large = args.data == "imagenet"
        macs = tas.count_macs(tas.Shape.unpruned(args.arch or "resnet20", 1000 if large else 10))
        images = 1.281e6 if large else 5e4
        trained, searched = (120, 120) if large else (args.epochs or 300, args.epochs or 600)
        if args.command == "prune":
            steps = 3 * trained + 2.5 * searched + (3 * float(args.flops) + 1) * trained
        elif args.command == "search":
            steps, share = 2.5 * searched * (args.method == "tas"), float(args.flops)
            arch, share = args.arch, 0.4 if args.cost else share  # of the MACs, for 0.6 of the time
        elif args.shape:
            if args.shape.startswith("shapes"):
                arch, share = "resnet20", 0.55
            macs = tas.count_macs(tas.Shape.unpruned(arch, 10))
            steps = (3 * share + ("kd" in args.transfer)) * trained
        else:
            steps = 3 * trained
        passes += macs * images * steps
    printed = sum(map(float, re.findall(r"about (\S+) x 10\^15 MACs", plan)))
    assert printed == pytest.approx(passes / 1e15, rel=0.03)

def test_a_half_made_environment_is_mended(tmp_path):
    """As an interrupted first start leaves one: a python without pip."""
    shutil.copy(HERE / "reproduce.sh", tmp_path)
    for path, text in (
            ("bin/python", "exit 1"), (".venv/bin/python", "exit 1"),
            ("bin/python3", "echo new $*; printf '#!/bin/bash\necho ran $*\n' > .venv/bin/python")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / path).chmod(0o755)
    names = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(["bash", "reproduce.sh", "smoke"], cwd=tmp_path, text=True, timeout=LIMIT,
                          capture_output=True,
                          env=names | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0] == "new -m venv .venv"
    assert all(line.startswith("ran ") for line in lines[1:]) and "tas.py prune" in done.stdout

def test_the_seeds_of_an_experiment():
    plain, more = (reproduce("table1", "--dry-run", **names).stdout.splitlines()
                   for names in ({}, {"SEEDS": "3 4"}))
    assert len(more) == 2 * len(plain) - 1  # but one report
    assert sum("--seed 3" in line for line in more) == sum("--seed 0" in line for line in plain)

@pytest.mark.parametrize("words, status", [
    (["help"], 0), (["bogus"], 2), (["table", "more"], 2), (["table", "--dry-run", "x"], 2)])
def test_names_of_experiments(words, status):
    done = reproduce(*words)
    assert done.returncode == status
    assert all(f"\n  {name} " in done.stdout + done.stderr for name in NAMES)
