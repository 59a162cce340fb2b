"""Properties of tas.py. The slow, plain version that a result is compared with stands in the test.
"""
import contextlib
import copy
import dataclasses
import errno
import functools
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image
from torch._dynamo.testing import CompileCounter
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tas

settings.register_profile("tas", deadline=None, derandomize=True, max_examples=25, database=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tas")
torch.set_num_threads(1)  # small tensors: sharing them out would take longer than computing

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "shared"

CIFAR = ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet164"]
IMAGENET = ["resnet18", "resnet34", "resnet50", "resnet101"]
KERNELS = {arch: (1, 3, 1) if arch in ("resnet164", "resnet50", "resnet101") else (3, 3)
           for arch in CIFAR + IMAGENET}
PUBLISHED_MACS = {
    "cifar10-resnet20": 22444472, "cifar10-resnet32": 34945344, "cifar10-resnet56": 59858430,
    "cifar10-resnet164": 178071224, "cifar100-resnet20": 22433792, "cifar100-resnet32": 42468608,
    "cifar100-resnet110": 119578284, "cifar10-resnet56-table3": 59451390,
    "cifar100-resnet32-predefined": 41095816, "cifar100-resnet32-tas": 42493184,
    "imagenet-resnet18": 1210757120}


# ------------------------------------------------------------------------------------------------
# The slow versions
# ------------------------------------------------------------------------------------------------

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


def random_shape(arch, seed, **fields):
    """Any valid Shape; full and half widths are frequent, so that neighbours are often equal."""
    rng, full = random.Random(seed), tas.Space(arch).full

    def width(c):
        return rng.choice([c, c // 2, rng.randint(1, c)])

    stages = [[[width(c) for c in widths] for widths in blocks[:rng.randint(1, len(blocks))]]
              for blocks in full.stages]
    return dataclasses.replace(full, stem=width(full.stem), stages=stages, **fields)


def tiny_space(arch, blocks, seed, image_size=32):
    """A space small enough to enumerate: few blocks, one to three candidate widths per conv, the
    same for the last convs of a stage, as everywhere."""
    rng, full = random.Random(seed), tas.Space(arch, 10, image_size).full
    stages = [stage[:n] for stage, n in zip(full.stages, blocks)]
    space = tas.Space.__new__(tas.Space)
    full = dataclasses.replace(full, stages=stages)
    n, rows, product = len(KERNELS[arch]), [(c,) for c in full.convs], 1
    ends = [range(1 + n * sum(blocks[:s]), 1 + n * sum(blocks[:s + 1]))[n - 1::n]
            for s in range(len(blocks))]
    inner = [[j] for j in range(1, len(rows)) if j % n]
    for group in [[0], *rng.sample([*ends, *inner], len(ends) + len(inner))]:
        c = full.convs[group[0]]
        row = (*[max(1, c * k // 10) for k in (4, 7)][:rng.randint(1, 2)], c)
        if product * len(row) ** len(group) <= 1000:
            product *= len(row) ** len(group)
            for j in group:
                rows[j] = row
    space._tabulate(full, rows, [tuple(range(1, m + 1)) for m in blocks])
    return space


TINY = [("resnet20", (3, 2, 1)), ("resnet164", (2, 1, 2)), ("resnet18", (2, 2, 1, 2)),
        ("resnet50", (2, 1, 1, 2))]


def members(space):
    """(Shape, kept convs, candidate of each kept conv, candidate depth of each stage), all."""
    n, full = len(KERNELS[space.full.arch]), space.full
    for depth in itertools.product(*[range(len(row)) for row in space.depths]):
        counts = [row[d] for row, d in zip(space.depths, depth)]
        kept, at = [0], 1
        for blocks, count in zip(full.stages, counts):
            kept += range(at, at + n * count)
            at += n * len(blocks)
        for pick in itertools.product(*[range(len(space.widths[j])) for j in kept]):
            widths = iter([space.widths[j][k] for j, k in zip(kept, pick)])
            stem = next(widths)
            stages = [[[next(widths) for _ in range(n)] for _ in range(c)] for c in counts]
            yield dataclasses.replace(full, stem=stem, stages=stages), kept, pick, depth


@functools.lru_cache(maxsize=None)
def tiny_members(case, seed):
    """A tiny space, its members and their MACs."""
    space = tiny_space(*TINY[case], seed)
    everything = list(members(space))
    return space, everything, torch.tensor([slow_macs(m[0]) for m in everything]).double()


def relative_log_softmax(logits, candidates):
    """Rows of log probabilities, the largest moved to 0: the conv of a dropped block counts as
    much as its most probable width."""
    rows = [row[:len(c)].double().log_softmax(0) for row, c in zip(logits, candidates)]
    return [(row - row.max()).tolist() for row in rows]


def log_probability(member, log_p, log_q):
    """Sum over the stem, the convs of the blocks that are kept, and the depths."""
    _, kept, pick, depth = member
    return (sum(log_p[j][k] for j, k in zip(kept, pick))
            + sum(row[d] for row, d in zip(log_q, depth)))


def shape_log_probability(space, shape, log_p, log_q):
    """The same of a Shape of any space."""
    n, at, total = len(KERNELS[shape.arch]), 1, log_p[0][space.widths[0].index(shape.stem)]
    for s, (full, blocks) in enumerate(zip(space.full.stages, shape.stages)):
        total += log_q[s][space.depths[s].index(len(blocks))]
        for j, width in enumerate(itertools.chain(*blocks)):
            total += log_p[at + j][space.widths[at + j].index(width)]
        at += n * len(full)
    return total


def close(a, b, tolerance=1e-9):
    """Relative to the largest entry."""
    return (a - b).abs().max() <= tolerance * b.abs().max()


def chi_square(counts, probabilities):
    """Pearson's statistic over its number of degrees of freedom: near 1 when the counts are drawn
    with these probabilities, in proportion to the number of draws when they are not."""
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum()) / (len(counts) - 1)


# ------------------------------------------------------------------------------------------------
# Channel-wise interpolation
# ------------------------------------------------------------------------------------------------

def adaptive(x, m):
    """Adaptive average pooling along dimension 1 of x [N, C, ...]."""
    y = x.flatten(2).transpose(1, 2)  # [N, rest, C]
    return F.adaptive_avg_pool1d(y, m).transpose(1, 2).unflatten(2, x.shape[2:])


@pytest.mark.parametrize("c_in", range(1, 25))
def test_cwi_is_adaptive_pooling(c_in):
    eye = torch.eye(c_in, dtype=torch.float64)[None]  # [1, c_in, c_in]
    for c_out in range(1, 25):
        expected = F.adaptive_avg_pool1d(eye, c_out)[0].T  # [c_out, c_in]
        torch.testing.assert_close(tas.cwi_matrix(c_in, c_out, dtype=torch.float64), expected)


@given(st.integers(1, 2048), st.integers(1, 2048), st.integers(0, 99))
def test_cwi_of_large_widths(c_in, c_out, seed):
    x = torch.randn(2, c_in, 3, generator=torch.Generator().manual_seed(seed)).double()
    y = tas.channel_wise_interpolation(x, c_out)
    assert y.shape == (2, c_out, 3)
    torch.testing.assert_close(y, adaptive(x, c_out))


@given(st.integers(1, 300))
def test_cwi_of_equal_widths_is_the_identity(c):
    assert tas.cwi_matrix(c, c).equal(torch.eye(c))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 40), st.integers(0, 9))
def test_padded_cwi_has_the_plain_one_in_its_corner(widths, c_out, more):
    size = max(*widths, c_out) + more
    padded = tas.cwi_matrix(torch.tensor(widths)[:, None, None], torch.tensor(c_out), size)
    assert padded.shape == (len(widths), size, size)
    for matrix, c_in in zip(padded, widths):
        expected = torch.zeros(size, size)
        expected[:c_out, :c_in] = tas.cwi_matrix(c_in, c_out)
        assert matrix.equal(expected)


# ------------------------------------------------------------------------------------------------
# Transformable network
# ------------------------------------------------------------------------------------------------

def to_width(x, m, align):
    return adaptive(x, m) if align == "cwi" else F.pad(x, (0, 0, 0, 0, 0, m - x.shape[1]))


def slow_conv(layer, x, stride, widths, index, weight, align):
    """The searched conv as the paper tells it: slice, one BN per candidate, align, weigh, sum."""
    kernel = layer.conv.weight[:, :x.shape[1]]
    y = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
    drawn = [(i, w) for i, w in zip(index, weight) if i < len(widths)]  # others do not exist
    m, mixed = max(widths[i] for i, _ in drawn), 0
    for i, w in drawn:
        c = widths[i]
        part = F.batch_norm(y[:, :c], None, None, layer.gamma[i, :c], layer.beta[i, :c], True)
        mixed = mixed + w * to_width(part, m, align)
    return mixed


def slow_block(block, x, rows, arch, halved, align):
    """rows: for every conv its candidate widths, the drawn indices and their weights."""
    y, kernels = x, KERNELS[arch]
    for i, (layer, row) in enumerate(zip(block.convs, rows)):
        stride = 2 if halved and i == kernels.index(3) else 1
        y = slow_conv(layer, y if i == 0 else F.relu(y), stride, *row, align)
    if block.projection is not None:
        stride = 2 if halved and arch in IMAGENET else 1
        x = F.avg_pool2d(x, 2) if halved and arch in CIFAR else x
        x = slow_conv(block.projection, x, stride, *rows[-1], align)
    m = max(x.shape[1], y.shape[1])
    return F.relu(to_width(x, m, "pad") + to_width(y, m, "pad"))


def slow_supernet(net, x, sample, align="cwi"):
    space, arch = net.space, net.space.full.arch
    rows = iter(list(zip(space.widths, sample.index.tolist(), sample.weight)))
    x = F.relu(slow_conv(net.stem, x, 1 if arch in CIFAR else 2, *next(rows), align))
    x = x if arch in CIFAR else F.max_pool2d(x, 3, 2, 1)
    for s, (stage, depths) in enumerate(zip(net.stages, space.depths)):
        outputs = {}
        for b, block in enumerate(stage):
            mine = [next(rows) for _ in KERNELS[arch]]
            x = outputs[b + 1] = slow_block(block, x, mine, arch, s > 0 and b == 0, align)
        m = max(outputs[d].shape[1] for d in depths)
        x = sum(q * to_width(outputs[d], m, align) for q, d in zip(sample.depth[s], depths))
    return F.linear(x.mean((2, 3)), net.fc.weight[:, :x.shape[1]], net.fc.bias)


def random_supernet(space, seed, align="cwi"):
    """In float64, with every parameter random: fresh BNs and logits would hide mistakes."""
    torch.manual_seed(seed)
    net = tas.SuperResNet(space, align).double()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "gamma" in name or ".beta" in name:
                p += 0.3 * torch.randn_like(p)
        for logits, rows in ((net.alpha, space.widths), (net.beta, space.depths)):
            for row, candidates in zip(logits, rows):
                row[:len(candidates)] = torch.randn(len(candidates))
    return net


def check_supernet(space, seed, num_samples=2, align="cwi", batch=4):
    net = random_supernet(space, seed, align)
    params = dict(net.named_parameters())
    x = torch.randn(batch, 3, space.full.image_size, space.full.image_size).double()
    toward = torch.randn(batch, 10).double()
    results = []
    for forward in (net, lambda x, sample: slow_supernet(net, x, sample, align)):
        torch.manual_seed(seed + 1)
        sample = tas.sample_sizes(net.alpha, net.beta, 2.0, num_samples)
        y = forward(x, sample)
        grads = torch.autograd.grad((y * toward).sum(), list(params.values()),
                                    materialize_grads=True)
        results.append((y.detach(), grads))
    (y, grads), (slow_y, slow_grads) = results
    assert close(y, slow_y)
    largest = max(g.abs().max() for g in slow_grads)
    for name, grad, slow in zip(params, grads, slow_grads):
        assert (grad - slow).abs().max() <= 1e-8 * slow.abs().max() + 1e-12 * largest, name
    assert net.alpha.grad is None and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("num_samples", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_supernet_is_the_slow_one_resnet20(seed, num_samples):
    check_supernet(tas.Space("resnet20", 10, 8), seed, num_samples)


@pytest.mark.parametrize("arch, size, seed, num_samples", [
    ("resnet164", 8, 0, 2), ("resnet18", 32, 0, 2), ("resnet18", 32, 1, 3), ("resnet50", 32, 0, 2)])
def test_supernet_is_the_slow_one(arch, size, seed, num_samples):
    check_supernet(tas.Space(arch, 10, size), seed, num_samples)


@pytest.mark.parametrize("case, num_samples, align", [
    *itertools.product(range(3), [1, 3, 8], ["cwi"]), (3, 3, "cwi"),
    *itertools.product(range(4), [2], ["pad"])])
def test_supernet_is_the_slow_one_in_few_blocks(case, num_samples, align):
    """Few blocks of every kind, with all candidate widths."""
    arch, blocks = TINY[case]
    full = tas.Space(arch, 10, 16 if arch in CIFAR else 64).full
    full = dataclasses.replace(full, stages=[b[:n] for b, n in zip(full.stages, blocks)])
    space = tas.Space.__new__(tas.Space)
    widths = [tuple(c * k // 10 for k in range(3, 11)) for c in full.convs]
    space._tabulate(full, widths, [tuple(range(1, n + 1)) for n in blocks])
    check_supernet(space, 3, num_samples, align, batch=2)


@pytest.mark.parametrize("options", [
    dict(search="width"), dict(search="depth"), dict(round_to=8), dict(image_size=12)])
@pytest.mark.parametrize("align", ["cwi", "pad"])
def test_supernet_is_the_slow_one_in_other_spaces(options, align):
    check_supernet(tas.Space("resnet20", 10, **{"image_size": 8, **options}), 5, 2, align)


@pytest.mark.parametrize("round_to, num_samples", [(16, 2), (8, 3), (8, 8)])
def test_supernet_with_more_samples_than_candidates(round_to, num_samples):
    """Rounded widths leave some convs fewer candidates than are asked for: all of them are mixed.
    """
    space = tas.Space("resnet20", 10, 8, round_to=round_to)
    assert min(map(len, space.widths)) < num_samples
    net = tas.SuperResNet(space)
    sample = tas.sample_sizes(net.alpha, net.beta, 2.0, num_samples)
    for index, widths in zip(sample.index.tolist(), space.widths):
        assert len({k for k in index if k < len(widths)}) == min(num_samples, len(widths))
    check_supernet(space, 0, num_samples)


@pytest.mark.parametrize("arch, size", [("resnet20", 8), ("resnet18", 32)])
@pytest.mark.parametrize("part", ["network", "cost", "both"])
def test_every_row_of_logits_gets_a_gradient(arch, size, part):
    torch.manual_seed(0)
    space = tas.Space(arch, 10, size)
    net, loss = tas.SuperResNet(space), 0
    if part != "cost":
        sample = tas.sample_sizes(net.alpha, net.beta, 5.0)
        logits = net(torch.randn(8, 3, size, size), sample)
        loss = F.cross_entropy(logits, torch.arange(8) % 10)
    if part != "network":
        expected = tas.expected_macs(space, *net.probabilities())
        loss = loss + 2 * tas.cost_loss(expected, slow_macs(space.full), 1e6)
    for logits, grad in zip((net.alpha, net.beta),
                            torch.autograd.grad(loss, (net.alpha, net.beta))):
        assert grad.shape == logits.shape and grad.isfinite().all()
        assert (grad.abs().amax(1) > 0).all()


# ------------------------------------------------------------------------------------------------
# Sampling
# ------------------------------------------------------------------------------------------------

ROWS = 20_000
LOGITS = torch.tensor([0.5, -1.0, 1.5, 0.0, -0.3, 0.8])


@given(st.integers(2, 8), st.integers(1, 9), st.floats(0.1, 10), st.booleans(), st.integers(0, 99))
def test_samples_are_distinct_and_weights_sum_to_one(k, num_samples, tau, gumbel, seed):
    torch.manual_seed(seed)
    alpha, beta = 3 * torch.randn(50, k), 3 * torch.randn(4, 5)
    index, weight, depth = tas.sample_sizes(alpha, beta, tau, num_samples, gumbel)
    count = min(num_samples, k)
    assert index.shape == weight.shape == (50, count) and depth.shape == (4, 5)
    for row in index.tolist():
        assert len(set(row)) == count and set(row) <= set(range(k))
    torch.testing.assert_close(weight.sum(1), torch.ones(50))
    torch.testing.assert_close(depth.sum(1), torch.ones(4))
    assert (weight >= 0).all() and (depth >= 0).all()


@given(st.floats(0.3, 5), st.integers(0, 99))
def test_plain_softmax_weights_by_formula(tau, seed):
    torch.manual_seed(seed)
    alpha, beta = torch.randn(30, 8).double(), torch.randn(3, 4).double()
    index, weight, depth = tas.sample_sizes(alpha, beta, tau, 3, gumbel=False)
    z = alpha.softmax(1).log() / tau
    for row, drawn, w in zip(z, index, weight):
        torch.testing.assert_close(w, row[drawn].exp() / row[drawn].exp().sum())
    torch.testing.assert_close(depth, (beta.softmax(1).log() / tau).softmax(1))


@pytest.mark.parametrize("tau", [0.7, 1.0, 3.0])
def test_pairs_are_drawn_without_replacement(tau):
    """Without Gumbel noise z is fixed: the first is i with probability p_i = softmax(z)_i, the
    second then j with p_j / (1 - p_i)."""
    torch.manual_seed(0)
    index = tas.sample_sizes(LOGITS.repeat(ROWS, 1), torch.zeros(1, 2), tau, 2, gumbel=False).index
    p = (LOGITS / tau).softmax(0).tolist()
    pairs = list(itertools.permutations(range(6), 2))
    probabilities = torch.tensor([p[i] * p[j] / (1 - p[i]) for i, j in pairs])
    drawn = (index[:, 0] * 6 + index[:, 1]).bincount(minlength=36)
    counts = torch.stack([drawn[6 * i + j] for i, j in pairs])
    assert counts.sum() == ROWS
    assert chi_square(counts, probabilities) < 2
    assert chi_square(counts, torch.full((30,), 1 / 30)) > 20  # the check can fail


def test_most_weighted_sizes_follow_the_distribution():
    """argmax(log p + Gumbel noise) is distributed as p, whatever tau."""
    torch.manual_seed(0)
    logits = LOGITS.repeat(ROWS, 1)
    for tau in (0.05, 1.0):
        index, weight, depth = tas.sample_sizes(logits, logits, tau, 6)
        heaviest = index.gather(1, weight.argmax(1, keepdim=True))[:, 0]
        for sizes in (heaviest, depth.argmax(1)):
            assert chi_square(sizes.bincount(minlength=6), LOGITS.softmax(0)) < 3.5


def test_drawing_adds_a_second_noise_to_the_gumbel_sample():
    """At a high tau z is flat, so that all candidates are drawn alike, whatever the logits."""
    torch.manual_seed(0)
    index = tas.sample_sizes(LOGITS.repeat(ROWS, 1), torch.zeros(1, 2), 1e4, 1).index
    assert chi_square(index[:, 0].bincount(minlength=6), torch.full((6,), 1 / 6)) < 3.5


def test_low_tau_is_one_hot():
    torch.manual_seed(0)
    _, weight, depth = tas.sample_sizes(torch.randn(100, 8).double(),
                                        torch.randn(100, 4).double(), 1e-6, 3)
    for sizes in (weight, depth):
        torch.testing.assert_close(sizes.amax(1), torch.ones(100).double())
        torch.testing.assert_close(sizes.sum(1), torch.ones(100).double())


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


def test_absent_candidates_are_never_drawn():
    torch.manual_seed(0)
    alpha = torch.zeros(2000, 8)
    alpha[:, 3:] = tas.ABSENT
    sample = tas.sample_sizes(alpha, alpha, 10.0)
    assert sample.index.max() == 2 and (sample.depth[:, 3:] == 0).all()


@pytest.mark.parametrize("gumbel", [True, False])
def test_samples_are_differentiable(gumbel):
    torch.manual_seed(0)
    alpha = torch.randn(3, 5).double().requires_grad_()
    beta = torch.randn(2, 4).double().requires_grad_()

    def weights(alpha, beta):
        torch.manual_seed(7)
        return tas.sample_sizes(alpha, beta, 1.5, 3, gumbel)[1:]

    assert torch.autograd.gradcheck(weights, (alpha, beta))
    grad = torch.autograd.grad(weights(alpha, beta)[0][:, 0].sum(), alpha)[0]
    assert (grad.abs().amax(1) > 0).all()


# ------------------------------------------------------------------------------------------------
# Cost
# ------------------------------------------------------------------------------------------------

def counted_macs(shape):
    """By running the network on meta tensors under torch's counter, which counts both the
    multiplication and the addition."""
    with torch.device("meta"):
        net, x = tas.ResNet(shape).eval(), torch.empty(1, 3, shape.image_size, shape.image_size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            assert net(x).shape == (1, shape.num_classes)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


@pytest.mark.parametrize("arch", CIFAR + IMAGENET)
@settings(max_examples=6)
@given(data=st.data())
def test_macs_are_what_torch_counts(arch, data):
    size = data.draw(st.integers(8, 70), "image size")
    shape = random_shape(arch, data.draw(st.integers(0, 2 ** 32), "seed"), image_size=size,
                         num_classes=data.draw(st.integers(2, 1000), "classes"))
    macs = tas.count_macs(shape)
    assert type(macs) is int
    assert macs == counted_macs(shape) == slow_macs(shape)


@pytest.mark.parametrize("arch, classes, macs", [
    ("resnet20", 10, 40.81e6), ("resnet32", 10, 69.12e6), ("resnet56", 10, 125.75e6),
    ("resnet110", 10, 253.15e6), ("resnet164", 10, 247.65e6), ("resnet18", 1000, 1814e6),
    ("resnet50", 1000, 4089e6)])
def test_macs_of_unpruned_networks(arch, classes, macs):
    digits = 1e4 if macs < 1e9 else 1e6
    assert round(tas.count_macs(tas.Space(arch, classes).full) / digits) == round(macs / digits)


@pytest.mark.parametrize("arch, params", [  # of torchvision's networks
    ("resnet18", 11689512), ("resnet34", 21797672), ("resnet50", 25557032),
    ("resnet101", 44549160)])
def test_parameters_of_unpruned_networks(arch, params):
    assert tas.count_params(tas.Space(arch, 1000).full) == params


@pytest.mark.parametrize("name", PUBLISHED_MACS)
def test_published_shapes_have_the_published_macs(name):
    shape = tas.Shape.load(HERE / "shapes" / f"{name}.json")
    assert tas.count_macs(shape) == PUBLISHED_MACS[name] == slow_macs(shape)


def test_published_shapes_are_all_there():
    facts = SHARED / "facts" / "published_shapes.json"
    if not facts.exists():
        pytest.skip(f"{facts} is not there")
    entries = json.loads(facts.read_text())
    assert {e["id"]: e["macs"] for e in entries} == PUBLISHED_MACS
    for entry in entries:
        fields = {k: entry[k] for k in ("arch", "num_classes", "image_size", "stem", "stages")}
        assert tas.Shape.load(HERE / "shapes" / f"{entry['id']}.json") == tas.Shape(**fields)


def test_candidates():
    space = tas.Space("resnet110")
    assert space.widths[0] == space.widths[1] == (4, 6, 8, 9, 11, 12, 14, 16)
    assert space.widths[-1] == (19, 25, 32, 38, 44, 51, 57, 64)
    assert space.depths == [(1, 3, 5, 7, 9, 11, 13, 15, 17, 18)] * 3
    assert tas.Space("resnet101").depths == [
        (1, 2, 3), (1, 3, 4), (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23), (1, 2, 3)]
    assert tas.Space("resnet20", search="width").depths == [(3,)] * 3
    depth_only = tas.Space("resnet20", search="depth")
    assert depth_only.widths == [(c,) for c in depth_only.full.convs]


@pytest.mark.parametrize("arch", CIFAR + IMAGENET)
@pytest.mark.parametrize("round_to", [8, 16])
def test_rounded_candidates_are_multiples_or_full(arch, round_to):
    space = tas.Space(arch, round_to=round_to)
    for row, full in zip(space.widths, space.full.convs):
        assert row[-1] == full and list(row) == sorted(set(row))
        assert all(c % round_to == 0 for c in row[:-1])


def random_distribution(space, seed):
    g = torch.Generator().manual_seed(seed)
    p = torch.zeros(len(space.widths), space.K, dtype=torch.float64)
    q = torch.zeros(len(space.depths), space.D, dtype=torch.float64)
    for table, rows in ((p, space.widths), (q, space.depths)):
        for row, candidates in zip(table, rows):
            logits = 2 * torch.randn(len(candidates), generator=g).double()
            row[:len(candidates)] = logits.softmax(0)
    return p, q


@pytest.mark.parametrize("case", range(len(TINY)))
@pytest.mark.parametrize("seed", [0, 1])
def test_expected_macs_by_enumeration(case, seed):
    space, everything, macs = tiny_members(case, seed)
    p, q = random_distribution(space, seed)
    log_p, log_q = p.log().tolist(), q.log().tolist()
    chance = torch.tensor([log_probability(m, log_p, log_q) for m in everything],
                          dtype=torch.float64).exp()
    torch.testing.assert_close(chance.sum(), torch.tensor(1.0).double())
    torch.testing.assert_close(tas.expected_macs(space, p, q), (chance * macs).sum(),
                               rtol=1e-12, atol=0)


def test_expected_macs_of_depths_alone():
    """16 networks: two depths in each of four stages."""
    space = tas.Space("resnet18", 10, 40, search="depth")
    p, q = random_distribution(space, 3)
    total = sum(slow_macs(space.shape([0] * len(space.widths), depth))
                * math.prod(float(q[s, d]) for s, d in enumerate(depth))
                for depth in itertools.product(range(2), repeat=4))
    assert math.isclose(tas.expected_macs(space, p, q), total, rel_tol=1e-12)


@pytest.mark.parametrize("arch", CIFAR + IMAGENET)
@settings(max_examples=4)
@given(seed=st.integers(0, 2 ** 32))
def test_expected_macs_of_one_hots_are_the_macs(arch, seed):
    rng, space = random.Random(seed), tas.Space(arch)
    width = [rng.randrange(len(row)) for row in space.widths]
    depth = [rng.randrange(len(row)) for row in space.depths]
    macs = slow_macs(space.shape(width, depth))
    p = F.one_hot(torch.tensor(width), space.K)
    q = F.one_hot(torch.tensor(depth), space.D)
    assert tas.expected_macs(space, p, q).item() == macs
    assert tas.argmax_macs(space, p * 0.4 + 0.1, q * 0.4 + 0.1).item() == macs
    assert tas.count_macs(space.shape(width, depth)) == macs


def test_dropped_blocks_cost_nothing():
    space = tas.Space("resnet20")
    p, q = random_distribution(space, 0)
    q = F.one_hot(torch.tensor([0, 1, 0]), space.D).double()  # 1, 2 and 1 of 3 blocks are kept
    kept = [*range(0, 3), *range(7, 11), *range(13, 15)]
    other = random_distribution(space, 1)[0]
    other[kept] = p[kept]
    assert not other.equal(p)
    assert tas.expected_macs(space, other, q) == tas.expected_macs(space, p, q)
    for j in kept:
        changed = p.clone()
        changed[j] = changed[j].flip(0)
        assert tas.expected_macs(space, changed, q) != tas.expected_macs(space, p, q)


def test_missing_candidates_cost_nothing():
    space = tas.Space("resnet34", round_to=16)
    p, q = random_distribution(space, 0)
    expected = tas.expected_macs(space, p, q)
    for table, rows in ((p, space.widths), (q, space.depths)):
        assert min(map(len, rows)) < table.shape[1]
        for row, candidates in zip(table, rows):
            row[len(candidates):] = 0.5
    assert tas.expected_macs(space, p, q) == expected


@pytest.mark.parametrize("case", range(len(TINY)))
def test_gradient_of_expected_macs(case):
    space, _, _ = tiny_members(case, 0)
    p, q = (t.requires_grad_() for t in random_distribution(space, 2))
    assert torch.autograd.gradcheck(lambda p, q: tas.expected_macs(space, p, q) / 1e6, (p, q))


# ------------------------------------------------------------------------------------------------
# Search objective
# ------------------------------------------------------------------------------------------------

@given(st.floats(0.1, 10), st.floats(0.01, 0.5), st.floats(1e3, 1e10))
def test_cost_loss(ratio, tolerance, expected):
    target = 1e6
    e = torch.tensor(expected, dtype=torch.float64, requires_grad=True)
    loss = tas.cost_loss(e, ratio * target, target, tolerance)
    sign = 1 if ratio > 1 + tolerance else -1 if ratio < 1 - tolerance else 0
    assert math.isclose(loss.item(), sign * math.log(expected), rel_tol=1e-12)
    grad, = torch.autograd.grad(loss, e)
    assert math.isclose(grad.item(), sign / expected, rel_tol=1e-12)


@pytest.mark.parametrize("actual, sign", [(105, 0), (95, 0), (106, 1), (94, -1)])
def test_cost_loss_takes_the_band_s_edges_in(actual, sign):
    loss = tas.cost_loss(torch.tensor(math.e), torch.tensor(actual), 100)
    torch.testing.assert_close(loss, torch.tensor(float(sign)))


def draw_logits(space, kind, seed):
    g = torch.Generator().manual_seed(seed)
    tables = [torch.randn(len(space.widths), space.K, generator=g),
              torch.randn(len(space.depths), space.D, generator=g)]
    change = {"small": lambda t: t * 0.01, "large": lambda t: t * 50, "huge": lambda t: t * 1e6,
              "ties": lambda t: t.round(), "equal": lambda t: t * 0 + 3,
              "infinite": lambda t: torch.where(t > 1, math.inf, t)}[kind]
    return [change(t) for t in tables]


KINDS = ["small", "large", "huge", "ties", "equal", "infinite"]


def check_extract(space, kind, seed, share, tolerance=0.05):
    """The result is in the band and its sizes are candidates; returns it."""
    alpha, beta = draw_logits(space, kind, seed)
    smallest = space.shape([0] * len(space.widths), [0] * len(space.depths))
    low, high = slow_macs(smallest), slow_macs(space.full)
    target = low + share * (high - low)
    shape = tas.extract(space, alpha, beta, target, tolerance)
    macs = slow_macs(shape)
    assert abs(macs - target) <= tolerance * target
    n, at = len(KERNELS[shape.arch]), 1
    assert shape.stem in space.widths[0]
    for full, blocks, depths in zip(space.full.stages, shape.stages, space.depths):
        assert len(blocks) in depths
        for j, width in enumerate(itertools.chain(*blocks)):
            assert width in space.widths[at + j]
        at += n * len(full)
    return shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["resnet20", "resnet18"])
@settings(max_examples=6)
@given(seed=st.integers(0, 2 ** 32), share=st.floats(0, 1), tolerance=st.floats(0.01, 0.2))
def test_extract_is_in_the_band(arch, kind, seed, share, tolerance):
    check_extract(tas.Space(arch), kind, seed, share, tolerance)


@settings(max_examples=8)
@given(st.sampled_from(["resnet32", "resnet44", "resnet56", "resnet110", "resnet34"]),
       st.sampled_from(KINDS), st.integers(0, 2 ** 32), st.floats(0, 1))
def test_extract_is_in_the_band_of_deep_networks(arch, kind, seed, share):
    check_extract(tas.Space(arch), kind, seed, share)


@pytest.mark.parametrize("arch, kind, share", [
    ("resnet164", "large", 0.3), ("resnet50", "small", 0.5), ("resnet101", "ties", 0.4)])
def test_extract_is_in_the_band_of_bottlenecks(arch, kind, share):
    check_extract(tas.Space(arch), kind, 0, share)


@settings(max_examples=15)
@given(st.sampled_from(["resnet20", "resnet56", "resnet18"]), st.integers(0, 2 ** 32),
       st.floats(-0.049, 0.049))
def test_extract_returns_the_argmax_in_the_band(arch, seed, off):
    space = tas.Space(arch)
    alpha, beta = draw_logits(space, "large", seed)
    most = space.shape([row[:len(c)].argmax() for row, c in zip(alpha, space.widths)],
                       [row[:len(c)].argmax() for row, c in zip(beta, space.depths)])
    assert tas.extract(space, alpha, beta, slow_macs(most) / (1 + off)) == most


@pytest.mark.parametrize("case", range(len(TINY)))
@settings(max_examples=12)
@given(st.integers(0, 2), st.sampled_from(KINDS[:-1]), st.integers(0, 2 ** 32), st.floats(0, 1),
       st.floats(0.005, 0.3))
def test_extract_by_enumeration(case, space_seed, kind, seed, share, tolerance):
    """In the band whenever a Shape is in it; none in the inner half of it is more probable."""
    space, everything, macs = tiny_members(case, space_seed)
    alpha, beta = draw_logits(space, kind, seed)
    target = float(macs.min() + share * (macs.max() - macs.min()))
    off = (macs - target).abs()
    if off.min() > 0.99 * tolerance * target:  # a Shape on the very edge may be found or not
        if off.min() > tolerance * target:
            with pytest.raises(tas.TASError):
                tas.extract(space, alpha, beta, target, tolerance)
        return
    shape = tas.extract(space, alpha, beta, target, tolerance)
    assert abs(slow_macs(shape) - target) <= tolerance * target
    log_p = relative_log_softmax(alpha, space.widths)
    log_q = relative_log_softmax(beta, space.depths)
    inner = (off <= tolerance * target / 2).nonzero().flatten().tolist()
    best = max((log_probability(everything[i], log_p, log_q) for i in inner), default=-math.inf)
    found = shape_log_probability(space, shape, log_p, log_q)
    assert found >= best - 1e-9 * max(1, abs(found))


@pytest.mark.parametrize("case", range(len(TINY)))
def test_extract_of_the_smallest_and_the_largest(case):
    space, _, macs = tiny_members(case, 0)
    low, high = float(macs.min()), float(macs.max())
    alpha, beta = draw_logits(space, "small", 0)
    for extreme, targets in ((low, (low, low / 1.05 * 1.00001)),
                             (high, (high, high / 0.95 * 0.99999))):
        for target in targets:
            found = slow_macs(tas.extract(space, alpha, beta, target))
            assert abs(found - target) <= 0.05 * target
        assert found == extreme  # the only one in the second band
    for target in (low / 1.05 * 0.99999, high / 0.95 * 1.00001, 1.0, 1e15):
        with pytest.raises(tas.TASError) as caught:
            tas.extract(space, alpha, beta, target)
        for number in (low, high, target):
            assert f"{number:,.0f}" in str(caught.value)


def test_extract_of_a_gap():
    """16 networks of very different MACs: a target in the largest gap has none near it."""
    space = tas.Space("resnet18", search="depth")
    alpha, beta = draw_logits(space, "large", 0)
    macs = sorted(slow_macs(m[0]) for m in members(space))
    gap, at = max((b / a, (a + b) / 2) for a, b in zip(macs, macs[1:]))
    with pytest.raises(tas.TASError, match="no shape"):
        tas.extract(space, alpha, beta, at, (gap - 1) / 4)
    for one in macs:
        assert slow_macs(tas.extract(space, alpha, beta, one, 1e-3)) == one
        near = slow_macs(tas.extract(space, alpha, beta, one / (1 + 0.0099), 0.01))
        assert abs(near - one / 1.0099) <= 0.01 * one / 1.0099


@pytest.mark.parametrize("arch", ["resnet20", "resnet56", "resnet18", "resnet34"])
@settings(max_examples=4)
@given(seed=st.integers(0, 2 ** 32), share=st.floats(0.05, 1))
def test_extract_of_rounded_widths(arch, seed, share):
    space = tas.Space(arch, round_to=8)
    shape = check_extract(space, "large", seed, share)
    for blocks, full in zip(shape.stages, space.full.stages):
        for width, most in zip(itertools.chain(*blocks), itertools.chain(*full)):
            assert width % 8 == 0 or width == most


def test_extract_of_nan_is_an_error():
    space = tas.Space("resnet20")
    alpha, beta = draw_logits(space, "small", 0)
    for logits in (alpha, beta):
        logits = logits[0]
        kept, logits[0] = logits[0].clone(), math.nan
        with pytest.raises(tas.TASError):
            tas.extract(space, alpha, beta, 2e7)
        logits[0] = kept


@pytest.mark.parametrize("arch, share", [("resnet20", 0.5), ("resnet110", 0.3), ("resnet18", 0.6)])
def test_drawn_shapes_are_in_the_band_and_differ(arch, share):
    space, seen = tas.Space(arch), set()
    target = share * slow_macs(space.full)
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        shape = tas.draw_shape(space, target)
        assert abs(slow_macs(shape) - target) <= 0.05 * target
        seen.add(shape)
    assert len(seen) == 2  # different for different seeds, the same for the same one


@pytest.mark.parametrize("case", [0, 1])
def test_drawn_shapes_are_uniform_given_the_band(case):
    """Among the Shapes of the inner half of the band the frequencies are in proportion to the
    products of 1 / (number of candidates)."""
    space, everything, macs = tiny_members(case, 0)
    target = float(macs.median())
    off = (macs - target).abs() / target
    tolerance = 2 * float(off.sort().values[11])  # a dozen Shapes in the inner half
    inner = {everything[i][0]: everything[i] for i in (off <= tolerance / 2).nonzero().flatten()}
    log_p = [[-math.log(len(row))] * len(row) for row in space.widths]
    log_q = [[-math.log(len(row))] * len(row) for row in space.depths]
    chance = torch.tensor([math.exp(log_probability(m, log_p, log_q)) for m in inner.values()])
    torch.manual_seed(0)
    drawn = [tas.draw_shape(space, target, tolerance) for _ in range(800)]
    counts = torch.tensor([drawn.count(shape) for shape in inner])
    assert counts.sum() > 300
    assert chi_square(counts, chance / chance.sum()) < 3


@settings(max_examples=12)
@given(st.sampled_from(["resnet20", "resnet56", "resnet18", "resnet50"]), st.floats(0.1, 1),
       st.sampled_from([1, 1, 8]))
def test_scaled_shapes(arch, share, round_to):
    """The nearest of those whose widths are one factor times the full ones."""
    full = tas.Space(arch).full
    target = share * slow_macs(full)

    def scaled(factor):
        def f(c):
            return min(c, max(1, round(c * factor / round_to)) * round_to)
        stages = [[[f(c) for c in widths] for widths in blocks] for blocks in full.stages]
        return dataclasses.replace(full, stem=f(full.stem), stages=stages)

    off = min(abs(slow_macs(scaled(k / 64)) - target) for k in range(1, 65))
    try:
        shape = tas.scale_shape(tas.Space(arch), target, 0.05, round_to)
    except tas.TASError:
        assert off > 0.05 * target
        return
    assert abs(slow_macs(shape) - target) <= min(0.05 * target, off)
    assert list(map(len, shape.stages)) == list(map(len, full.stages))
    assert shape in [scaled(k / 512) for k in range(1, 513)]


# ------------------------------------------------------------------------------------------------
# Knowledge transfer
# ------------------------------------------------------------------------------------------------

def random_logits(seed, n=6, classes=5):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(2, n, classes, generator=g).double()).unbind()
    return student.requires_grad_(), teacher, torch.randint(classes, (n,), generator=g)


@given(st.floats(0, 1), st.floats(0.5, 10), st.integers(0, 999))
def test_kd_loss_by_formula(weight, temperature, seed):
    student, teacher, labels = random_logits(seed)
    total = 0
    for z, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist()):
        def softmax(x, k):
            return [math.exp(v / k) / sum(math.exp(u / k) for u in x) for v in x]
        p, q = softmax(t, temperature), softmax(z, temperature)
        kl = sum(a * math.log(a / b) for a, b in zip(p, q))
        total += -(1 - weight) * math.log(softmax(z, 1)[y]) + weight * temperature ** 2 * kl
    loss = tas.kd_loss(student, teacher, labels, weight, temperature)
    assert math.isclose(loss.item(), total / len(labels), rel_tol=1e-9)


def test_kd_loss_at_weight_0_is_cross_entropy():
    student, teacher, labels = random_logits(0)
    loss, plain = tas.kd_loss(student, teacher, labels, 0.0), F.cross_entropy(student, labels)
    assert loss.equal(plain)
    assert torch.autograd.grad(loss, student)[0].equal(torch.autograd.grad(plain, student)[0])


def test_kd_loss_soft_term_is_stationary_at_the_teacher():
    student, teacher, labels = random_logits(0)
    away = torch.autograd.grad(tas.kd_loss(student, teacher, labels, 1.0), student)[0]
    same = tas.kd_loss(student, student.detach(), labels, 1.0)
    assert same.abs() < 1e-12 and away.abs().max() > 0.01
    assert torch.autograd.grad(same, student)[0].abs().max() < 1e-12


@settings(max_examples=6)
@given(st.sampled_from(["resnet20", "resnet164", "resnet18"]), st.integers(0, 999))
def test_inherited_weights_are_the_first_channels(arch, seed):
    torch.manual_seed(seed)
    teacher = random_bn(tas.ResNet(tas.Space(arch).full))
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


def test_inheriting_everything_copies_the_network():
    torch.manual_seed(0)
    shape = random_shape("resnet20", 1, image_size=8)
    teacher, student = random_bn(tas.ResNet(shape)).eval(), tas.ResNet(shape).eval()
    x = torch.randn(4, 3, 8, 8)
    assert not student(x).equal(teacher(x))
    assert tas.inherit_weights(student, teacher)(x).equal(teacher(x))


# ------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------

def random_bn(net):
    """Random BN weights and statistics; fresh ones would hide mistakes."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for t, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5),
                                 (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2)):
                torch.nn.init.uniform_(t, low, high)
    return net


@pytest.mark.parametrize("build", [lambda space: tas.ResNet(space.full), tas.SuperResNet])
def test_convs_are_initialised_by_their_fan_out(build):
    """Normal with variance 2 / (k^2 output channels)."""
    torch.manual_seed(0)
    convs = [m.weight for m in build(tas.Space("resnet50")).modules()
             if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == 53
    for weight in convs:
        std = math.sqrt(2 / (weight.shape[0] * weight.shape[2] * weight.shape[3]))
        error = 5 / math.sqrt(weight.numel())  # of a mean, in standard deviations
        assert abs(weight.mean() / std) < error and abs(weight.std() / std - 1) < error


@pytest.mark.parametrize("arch", IMAGENET)
def test_full_shapes_are_torchvision_s_networks(arch):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = random_bn(torchvision.models.get_model(arch, weights=None)).double().eval()
    ours = tas.ResNet(tas.Space(arch, 1000, 64).full).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64).double()
    with torch.no_grad():
        assert close(ours(x), theirs(x), 1e-10)


@pytest.mark.parametrize("size", [8, 9])
def test_cifar_shortcut_is_average_pooling_and_a_projection(size):
    torch.manual_seed(0)
    shape = random_shape("resnet20", 3, image_size=size)
    block = random_bn(tas.ResNet(shape)).double().eval().layer2[0]
    x = torch.randn(2, shape.stages[0][-1][-1], size, size).double()

    def bn(m, y):
        scale = m.weight / (m.running_var + m.eps).sqrt()
        return (y - m.running_mean[:, None, None]) * scale[:, None, None] + m.bias[:, None, None]

    half = -(-size // 2)
    pooled = torch.stack([x[:, :, 2 * i:2 * i + 2, 2 * j:2 * j + 2].mean((2, 3))
                          for i in range(half) for j in range(half)], 2).unflatten(2, (half, half))
    conv, norm = block.downsample
    assert conv.weight.shape[2:] == (1, 1) and conv.bias is None
    shortcut = bn(norm, torch.einsum("oc,nchw->nohw", conv.weight[:, :, 0, 0], pooled))
    y = bn(block.bn1, F.conv2d(x, block.conv1.weight, stride=2, padding=1)).relu()
    y = bn(block.bn2, F.conv2d(y, block.conv2.weight, padding=1))
    assert close(block(x), (y + shortcut).relu(), 1e-12)


@pytest.mark.parametrize("arch", ["resnet20", "resnet164", "resnet18", "resnet50"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_projections_stand_where_widths_differ(arch, seed):
    shape = random_shape(arch, seed)
    net, c_in = tas.ResNet(shape), shape.stem
    for s, blocks in enumerate(shape.stages):
        for b, widths in enumerate(blocks):
            block = getattr(net, f"layer{s + 1}")[b]
            projected = any(isinstance(m, torch.nn.Conv2d) for m in block.downsample.modules())
            assert projected == (c_in != widths[-1] or (s > 0 and b == 0))
            c_in = widths[-1]


def test_a_block_without_projection_adds_its_input():
    shape = tas.Shape("resnet20", 10, 8, 5, [[[3, 5]], [[4, 4]], [[4, 4]]])
    block = random_bn(tas.ResNet(shape)).layer1[0].eval()
    torch.nn.init.zeros_(block.bn2.weight)
    torch.nn.init.zeros_(block.bn2.bias)
    x = torch.randn(2, 5, 8, 8)
    assert block(x).equal(x.relu())


# ------------------------------------------------------------------------------------------------
# Shapes
# ------------------------------------------------------------------------------------------------

@settings(max_examples=40)
@given(st.sampled_from(CIFAR + IMAGENET), st.integers(0, 2 ** 32), st.integers(8, 1024),
       st.integers(2, 25_000))
def test_shapes_are_saved_and_loaded(tmp_path_factory, arch, seed, size, classes):
    path = tmp_path_factory.getbasetemp() / "round-trip.json"
    shape = random_shape(arch, seed, image_size=size, num_classes=classes)
    shape.save(path)
    again = tas.Shape.load(path)
    assert again == shape and hash(again) == hash(shape)
    assert json.loads(path.read_text()) == {
        "arch": arch, "num_classes": classes, "image_size": size, "stem": shape.stem,
        "stages": shape.stages}
    assert tas.Shape.load(str(path)) == shape
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


def is_shape(fields):
    """What a Shape's JSON must be."""
    def whole(value, low, high):
        return type(value) is int and low <= value <= high

    def is_list(value, lengths):
        return type(value) is list and len(value) in lengths

    if fields["arch"] not in CIFAR + IMAGENET:
        return False
    full = tas.Space(fields["arch"]).full
    return (whole(fields["num_classes"], 2, 25_000) and whole(fields["image_size"], 8, 1024)
            and whole(fields["stem"], 1, full.stem)
            and is_list(fields["stages"], [len(full.stages)])
            and all(is_list(blocks, range(1, len(most) + 1))
                    and all(is_list(widths, [len(most[0])])
                            and all(whole(w, 1, c) for w, c in zip(widths, most[0]))
                            for widths in blocks)
                    for blocks, most in zip(fields["stages"], full.stages)))


SCALARS = (st.none() | st.booleans() | st.integers(-5, 70) | st.integers() | st.floats()
           | st.just(10 ** 300) | st.just(-10 ** 4000) | st.text(max_size=20)
           | st.sampled_from(["16", "resnet", "\ud800", "x" * 500]))
JUNK = SCALARS | st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8)


def place_of(fields, rng):
    """A random place in the fields: the list or dict, the key, and the name of the place."""
    key = rng.choice(list(fields))
    container, name = fields, key
    while isinstance(container[key], list) and container[key] and rng.random() < 0.75:
        container, key = container[key], rng.randrange(len(container[key]))
        name += f"[{key}]"
    return container, key, name


@settings(max_examples=300)
@given(st.sampled_from(["resnet20", "resnet164", "resnet18"]), st.integers(0, 2 ** 32), JUNK)
def test_a_wrong_field_is_named(tmp_path_factory, arch, seed, junk):
    path = tmp_path_factory.getbasetemp() / "wrong.json"
    fields = dataclasses.asdict(random_shape(arch, seed))
    container, key, name = place_of(fields, random.Random(seed))
    container[key] = junk
    text = json.dumps(fields)
    path.write_text(text)
    fields = json.loads(text)  # what JSON makes of it
    if is_shape(fields):
        assert dataclasses.asdict(tas.Shape.load(path)) == fields
        return
    with pytest.raises(tas.TASError) as caught:
        tas.Shape.load(path)
    message = str(caught.value)
    assert str(path) in message and name in message.removeprefix(str(path))
    assert "\n" not in message and len(message.removeprefix(str(path))) < 300


@pytest.mark.parametrize("field", ["stem", "num_classes", "image_size"])
@pytest.mark.parametrize("value", [0, -1, True, 3.0, "3", None, [3], 10 ** 9,
                                   pytest.param(10 ** 5000, id="huge")])
def test_a_wrong_value_given_in_python_is_named(field, value):
    fields = dataclasses.asdict(tas.Space("resnet20").full) | {field: value}
    with pytest.raises(tas.TASError, match=field):
        tas.Shape(**fields)


@given(st.sampled_from(["arch", "num_classes", "image_size", "stem", "stages"]),
       st.sampled_from(["width", "Stem", "self", "", "cls", "__class__"]))
def test_missing_and_unknown_fields_are_named(tmp_path_factory, missing, unknown):
    path = tmp_path_factory.getbasetemp() / "fields.json"
    fields = dataclasses.asdict(tas.Space("resnet20").full)
    less = {k: v for k, v in fields.items() if k != missing}
    for wrong, name in ((less, missing), (fields | {unknown: 1}, unknown)):
        path.write_text(json.dumps(wrong))
        with pytest.raises(tas.TASError) as caught:
            tas.Shape.load(path)
        assert name in str(caught.value).rpartition("unknown: ")[2]


@settings(max_examples=200)
@given(st.data())
def test_damaged_files_are_refused_or_right(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    shape = random_shape("resnet20", data.draw(st.integers(0, 99)))
    content = json.dumps(dataclasses.asdict(shape)).encode()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 3)) | st.just(len(content)))
    insert = data.draw(st.binary(max_size=4) | st.text("[]{},:\"0123456789-e.", max_size=3)
                       .map(str.encode))
    content = content[:start] + insert + content[end:]
    path.write_bytes(content)
    try:
        found = tas.Shape.load(path)
    except tas.TASError as error:
        assert str(path) in str(error)
        try:
            fields = json.loads(content.decode())
        except ValueError:
            return
        assert (type(fields) is not dict or set(fields) != set(dataclasses.asdict(shape))
                or not is_shape(fields))
        return
    assert dataclasses.asdict(found) == json.loads(content.decode())


@pytest.mark.parametrize("content", [
    b"", b"\x00", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"null", b"3", b"[]", b'"text"', b"{}",
    b"NaN", b"{'arch': 1}", b'{"arch": "\xe9"}', b"[" * 100_000, b'{"a":' * 100_000,
    b"9" * 10_000, b'{"stem": ' + b"9" * 10_000 + b"}", b"[" * 2_000_000],
    ids=lambda content: f"{len(content)}-{content[:12]}")
def test_files_that_are_no_shape(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(tas.TASError) as caught:
        tas.Shape.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_deeply_nested_fields(tmp_path):
    """Just below the depth that the JSON reader refuses, printing the value must not fail."""
    path, fields = tmp_path / "x.json", dataclasses.asdict(tas.Space("resnet20").full)
    for depth in (3, *range(500, 1100, 3), 10_000):
        nested = "[" * depth + "]" * depth
        for name in ("arch", "stem", "stages"):
            path.write_text(json.dumps(fields | {name: "HERE"}).replace('"HERE"', nested))
            with pytest.raises(tas.TASError) as caught:
                tas.Shape.load(path)
            assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "none.json" / "x", "x" * 300):
        with pytest.raises(tas.TASError) as caught:
            tas.Shape.load(path)
        assert str(path) in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(tas.TASError, match="cannot write"):
        tas.Space("resnet20").full.save(tmp_path / "file" / "shape.json")


# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------

def random_images(count, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=g)
    return images, torch.randint(10, (count,), generator=g)


def slow_normalize(images):
    """uint8 [N, H, W, 3] -> float64 [N, 3, H, W]"""
    mean = torch.tensor([0.485, 0.456, 0.406]).double()
    std = torch.tensor([0.229, 0.224, 0.225]).double()
    return ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)


def all_crops(images):
    """Every crop of the images padded by 4 black pixels, plain and flipped: (shifts, flipped) and
    normalised images."""
    size = images.shape[1]
    padded = F.pad(images, (0, 0, 4, 4, 4, 4))
    for top, left, flip in itertools.product(range(9), range(9), (False, True)):
        crop = padded[:, top:top + size, left:left + size]
        yield (top, left, flip), slow_normalize(crop.flip(2) if flip else crop)


def test_augmentation_is_a_padded_crop_and_a_flip():
    """Each image is one of the 162 possible ones, and all 162 come about equally often."""
    images, labels = random_images(4000, 8)
    torch.manual_seed(0)
    order = torch.randperm(4000)
    batches = list(tas.SmallImages(images, labels, "cpu").batches(order, 250, train=True))
    assert [len(x) for x, _ in batches] == [250] * 16
    found, given_labels = (torch.cat(part) for part in zip(*batches))
    assert given_labels.equal(labels[order])
    counts, matches = [], torch.zeros(4000)
    for _, crop in all_crops(images[order]):
        match = (found - crop).abs().flatten(1).amax(1) < 1e-4
        counts.append(match.sum())
        matches += match
    assert matches.equal(torch.ones(4000))
    counts = torch.stack(counts).view(9, 9, 2)
    assert chi_square(counts.flatten(), torch.full((162,), 1 / 162)) < 1.5
    for dims in ((1, 2), (0, 2), (0, 1)):
        n = counts.sum(dims)
        assert chi_square(n, torch.full((len(n),), 1 / len(n))) < 4


def test_images_of_a_batch_are_shifted_apart():
    """The same image many times: every place of a batch draws for itself, and every batch too."""
    images, labels = random_images(1, 8)
    torch.manual_seed(0)
    data = tas.SmallImages(images, labels, "cpu")
    first, second = (x for x, _ in data.batches(torch.zeros(400).long(), 200, train=True))
    for batch in (first, second):
        assert len(batch.flatten(1).unique(dim=0)) > 80  # of 162; 115 are expected
    assert not first.equal(second)


@pytest.mark.parametrize("batch_size", [7, 10, 50])
def test_batches_without_augmentation(batch_size):
    images, labels = random_images(30, 12)
    data, order = tas.SmallImages(images, labels, "cpu"), torch.randperm(30)
    state = torch.get_rng_state()
    batches = list(data.batches(order, batch_size, train=False))
    assert torch.get_rng_state().equal(state)
    assert [len(x) for x, _ in batches] == [
        len(order[i:i + batch_size]) for i in range(0, 30, batch_size)]
    found, given_labels = (torch.cat(part) for part in zip(*batches))
    assert found.dtype == torch.float32 and given_labels.equal(labels[order])
    torch.testing.assert_close(found.double(), slow_normalize(images[order]), rtol=0, atol=1e-5)


def test_normalize_takes_bytes_only():
    with pytest.raises(tas.TASError, match="uint8"):
        tas.normalize(torch.rand(1, 3, 8, 8))


def test_training_drops_the_incomplete_batch():
    images, labels = random_images(30, 8)
    data, order = tas.SmallImages(images, labels, "cpu"), torch.arange(30)
    for batch_size, count in ((7, 4), (10, 3), (30, 1), (31, 0)):
        batches = list(data.batches(order, batch_size, train=True))
        assert [len(x) for x, _ in batches] == [batch_size] * count
        assert [len(y) for _, y in batches] == [batch_size] * count


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


@pytest.mark.parametrize("train", [True, False])
def test_batches_are_channels_last(train):
    data = tas.SmallImages(*random_images(16, 8), "cpu")
    x, _ = next(data.batches(torch.arange(16), 16, train))
    assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


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


# ------------------------------------------------------------------------------------------------
# Widening for the processor
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", ["resnet20", "resnet164", "resnet18"])
def test_padded_networks_compute_and_train_the_same(arch):
    """Three steps of SGD with momentum and weight decay, in float64."""
    torch.manual_seed(0)
    size = 8 if arch in CIFAR else 64
    shape = random_shape(arch, 5, image_size=size)
    shape = dataclasses.replace(shape, stages=[blocks[:2] for blocks in shape.stages])
    net = random_bn(tas.ResNet(shape)).double()
    padded = copy.deepcopy(net)
    tas.pad_channels(padded)
    for module in padded.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.shape[0] % 8 == 0
            assert module.weight.shape[1] in (3, -(-module.weight.shape[1] // 8) * 8)
    optimizers = [torch.optim.SGD(n.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
                  for n in (net, padded)]
    for _ in range(3):
        x, y = torch.randn(8, 3, size, size).double(), torch.randint(10, (8,))
        outputs = []
        for n, optimizer in zip((net, padded), optimizers):
            outputs.append(n(x))
            optimizer.zero_grad()
            F.cross_entropy(outputs[-1], y).backward()
            optimizer.step()
        assert close(outputs[1], outputs[0])
    assert close(padded.eval()(x), net.eval()(x))
    back = tas.inherit_weights(tas.ResNet(net.shape).double(), padded).eval()
    assert close(back(x), net(x))
    for name, tensor in back.state_dict().items():
        torch.testing.assert_close(tensor, net.state_dict()[name], rtol=1e-7, atol=1e-9)


# ------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------

TAS = Path(tas.__file__).resolve()
LIMIT = 240  # seconds; only against hangs
CHEAP = "--data folder --image-size 8 --batch-size 6 --workers 0 --precision fp32"
os.environ["OMP_NUM_THREADS"] = "1"  # in other processes as in this one
RESULTS = ("run.json", "metrics.jsonl", "last.ckpt", "shape.json", "weights.pt")


# ------------------------------------------------------------------------------------------------
# Small worlds
# ------------------------------------------------------------------------------------------------

def run(line, **places):
    """Run a command in this process."""
    return tas.main(line.format(**places).split())


def start(line, *python, **places):
    """Start a command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, *(python or [str(TAS)]), *line.format(**places).split()], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=TAS.parent)


def finish(process):
    """Exit status, output and error output of a process."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    return process.returncode, out, err


def write_images(root, classes="ab", train=12, val=4, size=8, mode="RGB", seed=0):
    """An ImageFolder of noise; the classes differ in brightness."""
    rng = np.random.default_rng(seed)
    for part, count in (("train", train), ("val", val)):
        for c, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(40 * c, 176 + 40 * c, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")
    return root


def tree(root):
    """Content of every file below a directory."""
    return {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def times(root):
    return {p: p.stat().st_mtime_ns for p in root.rglob("*")}


def metrics(directory):
    """Lines of metrics.jsonl, without the only entry that may differ between runs."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def equal(a, b):
    """Whether two nested states are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def check_same_run(a, b):
    """The same result to the last bit, and the same state to go on from."""
    assert metrics(a) == metrics(b)
    assert (a / "shape.json").read_bytes() == (b / "shape.json").read_bytes()
    names = [p / "weights.pt" for p in (a, b) if (p / "weights.pt").exists()]
    assert len(names) == 2 * ("train_accuracy" in metrics(a)[0] and "tau" not in metrics(a)[0])
    assert not names or equal(*map(tas.load_tensors, names))
    assert equal(*[tas.load_tensors(p / "last.ckpt")["parts"] for p in (a, b)])
    results = [tas.read_json(p / "run.json")["result"] for p in (a, b)]
    for result in results:
        del result["seconds"]
        if result.get("search"):
            assert result["search"].pop("seed") == 0
    assert results[0] == results[1]


def stop_while_writing(patch, nth, name="last.ckpt"):
    """Interrupt in the middle of writing the nth file of that name."""
    plain, count = tas.write_file, itertools.count(1)

    def write(path, content):
        if Path(path).name == name and next(count) == nth:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(f"{path}.tmp").write_bytes(bytes(content)[:100])
            raise KeyboardInterrupt
        plain(path, content)

    patch.setattr(tas, "write_file", write)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with `data`, `runs` made by prune, and `half`, an interrupted training."""
    root = tmp_path_factory.mktemp("world")
    write_images(root / "data")
    assert run(f"prune {CHEAP} {{d}} --arch resnet20 --epochs 3 --out {{r}}/runs",
               d=f"--data-dir {root}/data", r=root) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_while_writing(patch, 2)
        assert run(TRAIN + " --out {root}/half", root=root) == 130
    return root


TRAIN = f"train {CHEAP} --data-dir {{root}}/data --arch resnet20 --epochs 2"
SEARCH = f"search {CHEAP} --data-dir {{root}}/data --arch resnet20 --epochs 1"
PRUNE = f"prune {CHEAP} --data-dir {{root}}/data --arch resnet20 --epochs 3"


def one_line(capture):
    """The only line on stderr."""
    err = capture.readouterr().err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def check_refused(capture, root, line, *words, **places):
    """Exit status 2, one line that names the thing, and no file changed or made."""
    before = tree(root)
    capture.readouterr()
    assert run(line, root=root, **places) == 2
    err = one_line(capture)
    for word in words:
        assert word.format(root=root, **places) in err
    after = tree(root)
    shutil.rmtree(root / "new", ignore_errors=True)  # for the other tests
    assert after == before


# ------------------------------------------------------------------------------------------------
# Interruptions
# ------------------------------------------------------------------------------------------------

def check_parts(base, expected):
    for part in ("teacher", "search", "pruned"):
        check_same_run(base / part, expected / part)


def stop_at_line(line, marks, delay, how, **places):
    """Start a command, send a signal a moment after the output has a line with each mark."""
    process = start(line, **places)
    for mark in marks:
        for text in process.stdout:
            if mark in text:
                break
    time.sleep(delay)
    process.send_signal(how)
    return finish(process)


def test_killed_at_random_moments(root, tmp_path):
    rng = random.Random(5)
    line = PRUNE + " --out {tmp}/runs"
    for marks in (["teacher 1/3"], ["search 1/3"], ["search 2/3"], ["pruned 1/3"]):
        status, _, _ = stop_at_line(line, marks, rng.uniform(0, 0.4), signal.SIGKILL, root=root,
                                    tmp=tmp_path)
        assert status in (-signal.SIGKILL, 0)
        if marks == ["teacher 1/3"]:
            assert status == -signal.SIGKILL  # the first kill comes long before the end
    assert finish(start(line, root=root, tmp=tmp_path))[0] == 0
    check_parts(tmp_path / "runs", root / "runs")


SUICIDE = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import tas
left, plain = int(sys.argv[2]), tas.write_file

def write(path, content):
    global left
    left -= str(path).endswith("last.ckpt")
    if left == 0:
        with open(f"{path}.tmp", "wb") as file:
            file.write(bytes(content)[:1000])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    plain(path, content)

tas.write_file = write
sys.exit(tas.main(sys.argv[3:]))
"""


def test_killed_while_writing_checkpoints(root, tmp_path):
    line = PRUNE + " --out {tmp}/runs"
    for part, nth, finished in (("teacher", 3, 2), ("search", 3, 1), ("pruned", 4, 1)):
        status, _, err = finish(start(line, "-c", SUICIDE, str(TAS.parent), str(nth), root=root,
                                      tmp=tmp_path))
        assert status == -signal.SIGKILL, err
        assert (tmp_path / "runs" / part / "last.ckpt.tmp").stat().st_size == 1000
        assert len(tas.load_tensors(tmp_path / "runs" / part / "last.ckpt")["metrics"]) == finished
    assert run(line, root=root, tmp=tmp_path) == 0
    check_parts(tmp_path / "runs", root / "runs")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_stopped_with_a_hint(root, tmp_path, monkeypatch, how):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
    line = TRAIN.replace("--epochs 2", "--epochs 500") + " --out {tmp}/run"
    status, _, err = stop_at_line(line, ["run 2/500"], 0.1, how, root=root, tmp=tmp_path)
    assert status == 130
    assert err.count("\n") == 1 and "same command" in err
    before = tas.load_tensors(tmp_path / "run" / "last.ckpt")["metrics"]
    assert len(before) >= 1
    stop_while_writing(monkeypatch, 2)  # goes on for one more epoch
    assert run(line, root=root, tmp=tmp_path) == 130
    after = tas.load_tensors(tmp_path / "run" / "last.ckpt")["metrics"]
    assert after[:-1] == before and after[-1]["epoch"] == len(before) + 1


def test_interrupted_at_every_epoch(root, tmp_path, monkeypatch):
    line = PRUNE + " --out {tmp}/runs"
    for nth in (1, 2, 1, 3):
        with monkeypatch.context() as patch:
            stop_while_writing(patch, nth)
            assert run(line, root=root, tmp=tmp_path) == 130
    assert run(line, root=root, tmp=tmp_path) == 0
    check_parts(tmp_path / "runs", root / "runs")


@pytest.mark.parametrize("name", ["weights.pt", "shape.json", "run.json", "metrics.jsonl"])
def test_interrupted_while_writing_the_result(root, tmp_path, monkeypatch, name):
    """After the last epoch, too, the same command goes on."""
    line = TRAIN.replace("--epochs 2", "--epochs 3") + " --out {tmp}/teacher"
    for nth in (1, 2):
        with monkeypatch.context() as patch:
            stop_while_writing(patch, nth, name)
            assert run(line, root=root, tmp=tmp_path) in (130, 0)
    assert run(line, root=root, tmp=tmp_path) == 0
    check_same_run(tmp_path / "teacher", root / "runs" / "teacher")


def test_finished_parts_are_not_repeated(root, capsys):
    before = times(root / "runs")
    assert run(PRUNE + " --out {root}/runs", root=root) == 0
    assert times(root / "runs") == before
    assert "1/3" not in capsys.readouterr().out


def test_metrics_are_cut_to_the_checkpoint(root, tmp_path):
    """The file may be one epoch ahead of the checkpoint when the process is killed between."""
    shutil.copytree(root / "half", tmp_path / "half")
    with open(tmp_path / "half" / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "train_loss": 0.0}\n{"epo')
    assert run(TRAIN + " --out {tmp}/half", root=root, tmp=tmp_path) == 0
    assert [line["epoch"] for line in metrics(tmp_path / "half")] == [1, 2]
    assert run(TRAIN + " --out {tmp}/whole", root=root, tmp=tmp_path) == 0
    check_same_run(tmp_path / "half", tmp_path / "whole")


# ------------------------------------------------------------------------------------------------
# Settings and determinism
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("where", ["half", "runs/teacher"])
@pytest.mark.parametrize("change, names", [
    ("--epochs 9", ["epochs was", "now 9"]), ("--lr 0.2", ["lr was 0.1, now 0.2"]),
    ("--seed 4 --lr 0.3", ["seed was 0, now 4", "lr was 0.1, now 0.3"]),
    ("--batch-size 4", ["batch_size was 6, now 4"]),
    ("--weight-decay 0.01", ["weight_decay was 0.0005, now 0.01"])])
def test_other_settings_are_refused(root, capfd, where, change, names):
    check_refused(capfd, root, f"{TRAIN} {change} --out {{root}}/{where}", "--out", *names)


def test_what_does_not_change_the_result_is_no_other_setting(root, tmp_path, capsys):
    shutil.copytree(root / "half", tmp_path / "half")
    line = TRAIN + " --workers 1 --quiet --device cpu --out {tmp}/half"
    assert run(line, root=root, tmp=tmp_path) == 0
    assert run(TRAIN + " --out {tmp}/whole", root=root, tmp=tmp_path) == 0
    check_same_run(tmp_path / "half", tmp_path / "whole")
    assert "half 2/2" not in capsys.readouterr().out


def test_same_seed_same_result_and_another_seed_another(root, tmp_path):
    line = TRAIN.replace("--epochs 2", "--epochs 3") + " --out {tmp}"
    assert run(line + "/0", root=root, tmp=tmp_path) == 0
    assert run(line + "/1 --seed 1", root=root, tmp=tmp_path) == 0
    check_same_run(tmp_path / "0", root / "runs" / "teacher")
    assert metrics(tmp_path / "0")[0]["train_loss"] != metrics(tmp_path / "1")[0]["train_loss"]
    seeds = [tas.read_json(tmp_path / n / "run.json")["settings"]["seed"] for n in "01"]
    assert seeds == [0, 1]


def test_large_images_do_not_depend_on_workers_or_interruptions(tmp_path, monkeypatch):
    write_images(tmp_path / "data", train=8, size=90)
    line = "train --data imagenet --data-dir {tmp}/data --image-size 72 --arch resnet18 " \
           "--epochs 3 --batch-size 8 --precision fp32 --workers {n} --out {tmp}/{n}"
    for n in (0, 2):
        assert run(line, tmp=tmp_path, n=n) == 0
    check_same_run(tmp_path / "0", tmp_path / "2")
    with monkeypatch.context() as patch:
        stop_while_writing(patch, 3)
        assert run(line, tmp=tmp_path, n=1) == 130
    assert run(line, tmp=tmp_path, n=1) == 0
    check_same_run(tmp_path / "0", tmp_path / "1")


def test_the_halves_of_the_search_do_not_mix(tmp_path, monkeypatch):
    """Large images, after a training with the same data: a batch of the one half comes from it, of
    the other from the other."""
    write_images(tmp_path / "data", "abc", train=8, size=66)
    data = tas.load_data("imagenet", tmp_path / "data", 66, torch.device("cpu"), 1)
    list(data.train.batches(torch.arange(24), 4, True))
    pickle.dumps(data.train)  # as for worker processes that are not forks
    seen, plain = [], tas.LargeImages.__getitem__
    monkeypatch.setattr(tas.LargeImages, "__getitem__", lambda self, item: seen.append(
        (id(self), item[0])) or plain(self, item))
    assert run("search --data imagenet --data-dir {tmp}/data --image-size 66 --arch resnet18 "
               "--epochs 2 --batch-size 4 --precision fp32 --workers 0 --out {tmp}/run",
               tmp=tmp_path) == 0
    halves = [set(half.tolist()) for half in tas.split_halves(data.train.labels, 0)]
    found = {owner: {i for o, i in seen if o == owner} for owner, _ in seen}
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, halves))


def test_precision_is_chosen_once(root, tmp_path, monkeypatch):
    line = TRAIN.replace("fp32", "auto") + " --out {tmp}/run"
    with monkeypatch.context() as patch:
        stop_while_writing(patch, 2)
        assert run(line, root=root, tmp=tmp_path) == 130
    info = tas.read_json(tmp_path / "run" / "run.json")
    assert info["precision"] in ("fp32", "bf16") and "times as fast" in info["precision_reason"]
    other = {"fp32": "bf16", "bf16": "fp32"}[info["precision"]]
    (tmp_path / "run" / "run.json").write_text(json.dumps(info | {"precision": other}))
    assert run(line, root=root, tmp=tmp_path) == 0  # no second choice
    assert tas.read_json(tmp_path / "run" / "run.json")["precision"] == other


# ------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------

ONE = f"{CHEAP} --data-dir {{root}}/data --epochs 1 --out {{root}}/new"


@pytest.mark.parametrize("line, words", [
    ("train --arch resnt56 " + ONE, ["resnt56", "did you mean resnet56"]),
    ("train --arch vgg " + ONE, ["vgg", "resnet56"]),
    ("train " + ONE, ["--arch"]),
    ("search " + ONE, ["--arch"]),
    ("train --arch resnet20 --epochs 1", ["--data"]),
    ("trian --arch resnet20 " + ONE, ["trian", "did you mean train"]),
    ("", ["COMMAND"]),
    ("train --data cifar11 --arch resnet20", ["cifar11", "did you mean cifar1"]),
    ("train --data synthetic --image-size 16 --arch resnet20", ["--image-size"]),
    ("train --arch resnet20 --wrong 3 " + ONE, ["--wrong"]),
    *[(f"train --arch resnet20 {ONE} {flag} {value}", [flag, value]) for flag, value in [
        ("--epochs", "-3"), ("--epochs", "0"), ("--epochs", "two"), ("--batch-size", "0"),
        ("--lr", "nan"), ("--lr", "-1"), ("--lr", "inf"), ("--seed", "-1"), ("--workers", "-2"),
        ("--image-size", "7"), ("--precision", "fp8"), ("--compile", "maybe"),
        ("--weight-decay", "2"), ("--transfer", "copy"), ("--device", "nonsense"),
        ("--device", "cuda:99"), ("--device", "meta"), ("--batch-size", "25")]],
    *[(f"search --arch resnet20 {ONE} {flag} {value}", [flag, value]) for flag, value in [
        ("--flops", "0"), ("--flops", "1.5"), ("--flops", "abc"), ("--flops", "nan"),
        ("--flops", "inf"), ("--flops", "-0.5"), ("--flops", "900G"), ("--flops", "M"),
        ("--num-samples", "9"), ("--num-samples", "0"), ("--search", "all"),
        ("--method", "grid"), ("--sampler", "hard"), ("--align", "crop"), ("--round", "0"),
        ("--tolerance", "0"), ("--arch-lr", "nan"), ("--batch-size", "13")]]])
def test_wrong_flags(root, capfd, line, words):
    check_refused(capfd, root, line, *words)


@pytest.mark.parametrize("line, words", [
    ("--method random --search depth --flops 0.01", ["possible are"]),
    ("--method uniform --flops 0.0004", ["--flops"]),
    ("--method uniform --search depth", ["--search depth"]),
    ("--method tas --search depth --flops 0.01", ["possible are"])])
def test_target_out_of_reach(root, capfd, line, words):
    check_refused(capfd, root, f"search --arch resnet20 {ONE} {line}", *words)


def make_data(base, kind):
    """A data directory with one mistake."""
    if kind == "missing":
        return
    if kind == "empty":
        return base.mkdir(parents=True)
    write_images(base, "a" if kind == "one class" else "ab", size=80 if "large" in kind else 8)
    if kind == "no train":
        shutil.rmtree(base / "train")
    elif kind == "no val":
        shutil.rmtree(base / "val")
    elif kind == "class without images":
        for image in (base / "train" / "b").iterdir():
            image.unlink()
    elif kind == "classes differ":
        (base / "val" / "b").rename(base / "val" / "zebra")
    elif kind == "train is a file":
        shutil.rmtree(base / "train")
        (base / "train").write_text("")
    elif "png" in kind:
        image = base / "train" / "b" / "3.png"
        image.write_bytes(image.read_bytes()[:40] + b"\0" * 30)
    elif "jpeg" in kind:
        image = base / "val" / "a" / "cut.jpeg"
        noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(image, quality=95)
        image.write_bytes(image.read_bytes()[:3000])
    elif kind == "text":
        (base / "train" / "b" / "3.png").write_text("no image")


@pytest.mark.parametrize("kind, words", [
    ("missing", ["{base}/train"]), ("empty", ["{base}/train"]), ("no train", ["{base}/train"]),
    ("no val", ["{base}/val"]), ("one class", ["one class"]),
    ("class without images", ["{base}/train", "b"]), ("classes differ", ["b, zebra"]),
    ("train is a file", ["{base}/train"]), ("png", ["{base}/train/b/3.png"]),
    ("jpeg", ["{base}/val/a/cut.jpeg"]), ("text", ["{base}/train/b/3.png"])])
@pytest.mark.parametrize("workers", [0, 2])
def test_wrong_data(tmp_path, capfd, kind, words, workers):
    if workers and kind not in ("png", "jpeg"):
        return  # no image is read
    make_data(tmp_path / "data", kind)
    check_refused(capfd, tmp_path, f"train --arch resnet20 {ONE} --workers {workers}", *words,
                  base=tmp_path / "data")


@pytest.mark.parametrize("kind, name", [("large png", "train/b/3.png"),
                                        ("large jpeg", "val/a/cut.jpeg")])
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_large_images_are_named(tmp_path, capfd, kind, name, workers):
    make_data(tmp_path / "data", kind)
    before = tree(tmp_path / "data")
    line = f"train --arch resnet18 {ONE} --image-size 72 --workers {workers}"
    assert run(line, root=tmp_path) == 2
    assert f"{tmp_path}/data/{name}" in one_line(capfd)
    assert tree(tmp_path / "data") == before
    assert not (tmp_path / "new" / "weights.pt").exists()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA"])
def test_other_kinds_of_images_are_converted(tmp_path, mode):
    write_images(tmp_path / "data", train=4, val=3, mode=mode)
    write_images(tmp_path / "rgb", train=4, val=3)
    for part in ("train", "val"):
        for path in (tmp_path / "rgb" / part).rglob("*.png"):
            same = tmp_path / "data" / path.relative_to(tmp_path / "rgb")
            Image.open(same).convert("RGB").save(path)
    for name in ("data", "rgb"):
        assert run(f"train --arch resnet20 {ONE} --batch-size 4 --data-dir {{tmp}}/{name} "
                   f"--out {{tmp}}/run-{name}", root=tmp_path, tmp=tmp_path) == 0
    check_same_run(tmp_path / "run-data", tmp_path / "run-rgb")


def good_fields():
    return {"arch": "resnet20", "num_classes": 2, "image_size": 8, "stem": 9,
            "stages": [[[9, 8]], [[20, 12], [32, 12]], [[64, 25]]]}


@pytest.mark.parametrize("change, words", [
    ({"arch": "resnet18"}, ["stages"]), ({"arch": "resnet9"}, ["resnet9"]),
    ({"arch": None}, ["arch"]), ({"stem": 0}, ["stem"]), ({"stem": 17}, ["stem", "17"]),
    ({"stem": 8.0}, ["stem", "8.0"]), ({"stem": True}, ["stem", "True"]),
    ({"stem": 10 ** 400}, ["stem"]), ({"stem": "8"}, ["stem"]),
    ({"stages": []}, ["stages"]), ({"stages": [[[9, 8]], [], [[64, 25]]]}, ["stages[1]"]),
    ({"stages": [[[9, 8]], [[20, 12, 3]], [[64, 25]]]}, ["stages[1][0]"]),
    ({"stages": [[[9, 8]], [[20, -12]], [[64, 25]]]}, ["stages[1][0][1]", "-12"]),
    ({"stages": [[[9, 8]], [[20, 12]], [[64, 25]] * 4]}, ["stages[2]"]),
    ({"num_classes": 3}, ["num_classes 3", "2"]), ({"num_classes": 1}, ["num_classes"]),
    ({"image_size": 4}, ["image_size"]), ({"extra": 1}, ["extra"])])
def test_wrong_shapes(root, tmp_path, capfd, change, words):
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(good_fields() | change))
    check_refused(capfd, root, f"train {ONE} --shape {path}", str(path), *words)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000])
def test_files_that_hold_no_shape(root, tmp_path, capfd, content):
    (tmp_path / "shape.json").write_bytes(content)
    check_refused(capfd, root, f"train {ONE} --shape {tmp_path}/shape.json", f"{tmp_path}/shape")


@pytest.mark.parametrize("line, words", [
    ("--arch resnet32 --shape {root}/runs/search/shape.json", ["resnet20", "resnet32"]),
    ("--shape {root}/nowhere.json", ["{root}/nowhere.json"]),
    ("--shape {root}/runs", ["{root}/runs"]),
    ("--shape {root}/runs/search/shape.json --image-size 16", ["image_size 8", "16"]),
    ("--arch resnet20 --transfer kd", ["--transfer kd", "--teacher"]),
    ("--arch resnet20 --transfer init", ["--transfer init", "--teacher"]),
    ("--arch resnet32 --teacher {root}/runs/teacher", ["resnet20", "resnet32"]),
    ("--arch resnet20 --teacher {root}/runs/search", ["{root}/runs/search", "weights.pt"]),
    ("--arch resnet20 --teacher {root}/half", ["{root}/half", "weights.pt"]),
    ("--arch resnet20 --teacher {root}/nowhere", ["{root}/nowhere"]),
    ("--arch resnet20 --teacher {root}/runs/search/shape.json", ["shape.json", "weights.pt"]),
    ("--arch resnet20 --teacher {root}/runs/pruned", ["{root}/runs/pruned", "pruned network"]),
    ("--arch resnet20 --out {root}/half/run.json", ["{root}/half/run.json", "--out"]),
    ("--arch resnet20 --out {root}/half/run.json/new", ["{root}/half/run.json/new", "--out"]),
    ("--arch resnet20 --out {root}/data", ["{root}/data", "--out"]),
    ("--arch resnet20 --out /proc/nowhere", ["/proc/nowhere", "--out"])])
def test_wrong_places(root, capfd, line, words):
    check_refused(capfd, root, f"train {ONE} {line}", *words)


@pytest.mark.parametrize("line, words", [
    ("--flops 50", ["--flops 50"]), ("--search depth --flops 0.01", ["possible are"]),
    ("--batch-size 13", ["half of the search"]), ("--teacher {root}/nowhere", ["{root}/nowhere"]),
    ("--teacher {root}/runs/pruned", ["pruned network"])])
def test_prune_checks_everything_before_the_first_step(root, capfd, line, words):
    check_refused(capfd, root, f"prune --arch resnet20 {ONE} {line}", *words)


def test_a_teacher_of_other_classes(root, tmp_path, capfd):
    write_images(tmp_path / "data", "abc")
    check_refused(capfd, tmp_path, f"train {ONE} --arch resnet20 --teacher {root}/runs/teacher",
                  "num_classes 2", "3")


@pytest.mark.parametrize("line", [
    "eval {CHEAP} --data-dir {root}/data {root}/nowhere", "export {root}/nowhere",
    "eval {CHEAP} --data-dir {root}/data {root}/half", "export {root}/runs/search",
    "export {root}/runs/search/shape.json",
    "describe {root}/nowhere", "describe resnet57", "describe {root}/runs", "report {root}/data",
    "report {root}/nowhere", "bench --arch resnet57", "bench --shape {root}/nowhere.json",
    "bench --rounds 0"])
def test_wrong_arguments_of_the_other_commands(root, capfd, line):
    line = line.replace("{CHEAP}", CHEAP.replace(" --batch-size 6", ""))
    last = line.split()[-1]
    check_refused(capfd, root, line, last.removesuffix("/half"))


def no_network(*_, **__):
    raise urllib.error.URLError("no network")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_no_network_for_cifar(tmp_path, capfd, monkeypatch, name):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    check_refused(capfd, tmp_path, f"train --data {name} --data-dir {{root}}/data --arch resnet20 "
                  "--out {root}/new", name, "{root}/data", "--data synthetic")


def test_no_network_for_a_teacher(root, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    check_refused(capfd, root, f"train {ONE} --arch resnet18 --teacher torchvision",
                  "--teacher torchvision", "no network")
    check_refused(capfd, root, f"train {ONE} --arch resnet20 --teacher torchvision",
                  "--teacher torchvision", "resnet20")


# ------------------------------------------------------------------------------------------------
# Damaged files
# ------------------------------------------------------------------------------------------------

class Evil:
    """A pickle of it makes a directory when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["last.ckpt", "weights.pt"])
def test_a_pickle_is_not_executed(root, tmp_path, capfd, name):
    shutil.copytree(root / ("half" if name == "last.ckpt" else "runs/teacher"), tmp_path / "run")
    torch.save({"settings": Evil(tmp_path / "executed")}, tmp_path / "run" / name)
    line = TRAIN + " --out {run}" if name == "last.ckpt" else "export {run}"
    check_refused(capfd, tmp_path, line.replace("{root}", str(root)), "{run}/" + name,
                  run=tmp_path / "run")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(Exception):  # the file is as dangerous as it should be
        torch.load(tmp_path / "run" / name, weights_only=False)["settings"].path
    assert (tmp_path / "executed").exists()


def spoil(path, kind, root):
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[:len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("hello")
    elif kind == "other":
        shutil.copy(root / "runs" / "search" / path.name, path)
    elif kind == "list":
        torch.save([1, 2], path)
    else:
        state = torch.load(path, weights_only=True)
        {"no parts": lambda: state.pop("parts"), "no metrics": lambda: state.pop("metrics"),
         "no settings": lambda: state.pop("settings"), "no rng": lambda: state.pop("rng"),
         "wrong net": lambda: state["parts"]["net"].popitem()}[kind]()
        torch.save(state, path)


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "other", "list", "no parts",
                                  "no metrics", "no settings", "no rng", "wrong net"])
def test_damaged_checkpoints(root, tmp_path, capfd, kind):
    shutil.copytree(root / "half", tmp_path / "half")
    spoil(tmp_path / "half" / "last.ckpt", kind, root)
    check_refused(capfd, tmp_path, TRAIN.replace("{root}", str(root)) + " --out {root}/half",
                  "{root}/half/last.ckpt", "--out" if kind not in ("truncated", "empty", "text",
                                                                   "list") else "delete it")


@pytest.mark.parametrize("change", [
    b"", b"{", b"[]", b"{}", b'{"settings": []}', b'{"settings": null}', {"settings": {}},
    {"result": []}, {"result": "done"}, {"result": {}}, {"result": {"accuracy": "high"}},
    {"result": {"accuracy": None}}])
def test_damaged_run_files(root, tmp_path, capfd, change):
    shutil.copytree(root / "half", tmp_path / "half")
    path = tmp_path / "half" / "run.json"
    path.write_bytes(change if isinstance(change, bytes) else
                     json.dumps(tas.read_json(path) | change).encode())
    check_refused(capfd, tmp_path, TRAIN.replace("{root}", str(root)) + " --out {root}/half",
                  "{root}/half/run.json")


@pytest.mark.parametrize("change", [{"result": None}, {"result": {}}, {"settings": None}])
@pytest.mark.parametrize("which", ["teacher", "search"])
def test_damaged_run_file_of_a_part(root, tmp_path, capfd, change, which):
    """A teacher or a shape from a damaged run: a clean error, or a result without that entry."""
    shutil.copytree(root / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("pruned"))
    path = tmp_path / "runs" / which / "run.json"
    path.write_text(json.dumps(tas.read_json(path) | change))
    status = run(f"train {ONE} --out {{tmp}}/new --shape {{tmp}}/runs/search/shape.json "
                 "--teacher {tmp}/runs/teacher", root=root, tmp=tmp_path)
    assert status in (0, 2)
    if status:
        assert str(path) in one_line(capfd)
    else:
        accuracy = tas.read_json(tmp_path / "new" / "run.json")["result"]["accuracy"]
        assert accuracy == metrics(tmp_path / "new")[-1]["test_accuracy"]


@pytest.mark.parametrize("name, content", [
    ("run.json", b"{"), ("run.json", b'{"result": {"a": 1}}'), ("metrics.jsonl", b'{"epoch": 1'),
    ("metrics.jsonl", b"[]\n"), ("metrics.jsonl", b'{"epoch": 1}\n'),
    ("metrics.jsonl", b"\xff\n"), ("shape.json", b"{}"), ("machine", None), ("tolerance", None)])
def test_report_of_damaged_runs(root, tmp_path, capfd, name, content):
    shutil.copytree(root / "runs" / "search", tmp_path / "search")
    shutil.copytree(root / "runs" / "teacher", tmp_path / "teacher")
    if content is None:  # an entry of run.json
        path = tmp_path / "search" / "run.json"
        info = tas.read_json(path)
        (info if name in info else info["settings"]).pop(name)
        path.write_text(json.dumps(info))
    else:
        (tmp_path / "search" / name).write_bytes(content)
    before = tree(tmp_path)
    assert run("report {tmp}", tmp=tmp_path) == 2
    assert str(tmp_path) in one_line(capfd)
    assert {p: c for p, c in tree(tmp_path).items() if not p.name.startswith("report.")} == before


def mutate(directory, kind, name, other, at, noise):
    """Damage one file of a run directory."""
    path = directory / name
    content = path.read_bytes()
    at = int(at * len(content))
    if kind == "truncate":
        path.write_bytes(content[:at])
    elif kind == "noise":
        path.write_bytes(content[:at] + noise + content[at + len(noise):])
    else:
        path.write_bytes((directory / other).read_bytes())
        (directory / other).write_bytes(content)


def check_clean(capture, status, *wanted):
    """Status 2 and one line, or 0 and the wanted words."""
    captured = capture.readouterr()
    assert status in (0, 2)
    if status:
        assert re.fullmatch(r"error: [^\n]+\n", captured.err), captured.err
    else:
        assert captured.err == "" and all(word in captured.out for word in wanted), captured.out


@pytest.fixture(scope="module")
def fuzzed(root, tmp_path_factory):
    """The interrupted and the finished run that are damaged, and the line that both end with."""
    base = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(root / "half", base / "finished")
    assert run(TRAIN + " --quiet --out {out}", root=root, out=base / "finished") == 0
    shutil.copytree(root / "half", base / "half")
    return base


FUZZ = settings(deadline=None, derandomize=True, max_examples=25, database=None,
                phases=[Phase.explicit, Phase.generate],  # shrinking would repeat long runs
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@FUZZ
@given(state=st.sampled_from(["half", "finished"]), data=st.data())
def test_damaged_run_directories(root, fuzzed, capfd, state, data):
    names = [name for name in RESULTS if (fuzzed / state / name).exists()]
    kind = data.draw(st.sampled_from(["truncate", "noise", "swap"]))
    name, other = data.draw(st.permutations(names))[:2]
    shutil.rmtree(fuzzed / "run", ignore_errors=True)
    shutil.copytree(fuzzed / state, fuzzed / "run")
    mutate(fuzzed / "run", kind, name, other, data.draw(st.floats(0, 0.999)),
           data.draw(st.binary(min_size=1, max_size=40)))
    damaged = (fuzzed / "run" / name).read_bytes()
    capfd.readouterr()
    status = run(TRAIN + " --quiet --out {out}", root=root, out=fuzzed / "run")
    check_clean(capfd, status)
    if status == 2:
        assert (fuzzed / "run" / name).read_bytes() == damaged  # evidence is not overwritten
        return
    status = run("eval --data folder --workers 0 --data-dir {root}/data {out}", root=root,
                 out=fuzzed / "run")
    accuracy = tas.read_json(fuzzed / "finished" / "run.json")["result"]["accuracy"]
    check_clean(capfd, status, f"accuracy {accuracy:.2f}%")
    if status == 0:
        assert equal(*[tas.load(fuzzed / d).state_dict() for d in ("run", "finished")])


@settings(FUZZ, max_examples=12)
@given(kind=st.sampled_from(["truncate", "noise", "swap"]), data=st.data())
def test_damaged_search_directories(root, fuzzed, capfd, kind, data):
    name, other = data.draw(st.permutations(RESULTS[:4]))[:2]
    shutil.rmtree(fuzzed / "search", ignore_errors=True)
    shutil.copytree(root / "runs" / "search", fuzzed / "search")
    mutate(fuzzed / "search", kind, name, other, data.draw(st.floats(0, 0.999)),
           data.draw(st.binary(min_size=1, max_size=40)))
    capfd.readouterr()
    status = run(SEARCH.replace("--epochs 1", "--epochs 3") + " --quiet --out {out}", root=root,
                 out=fuzzed / "search")
    check_clean(capfd, status, "next: ")
    if status == 0 and name != "shape.json" and (kind != "swap" or other != "shape.json"):
        assert tas.Shape.load(fuzzed / "search" / "shape.json") == tas.Shape.load(
            root / "runs" / "search" / "shape.json")


# ------------------------------------------------------------------------------------------------
# Full disk, numbers
# ------------------------------------------------------------------------------------------------

def fill_disk(patch, nth):
    plain, count = os.fsync, itertools.count(1)

    def fsync(descriptor):
        if next(count) >= nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(descriptor)

    patch.setattr(os, "fsync", fsync)


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    tas.write_file(tmp_path / "file", b"old")
    fill_disk(monkeypatch, 1)
    with pytest.raises(tas.TASError, match="No space left"):
        tas.write_file(tmp_path / "file", b"new" * 1000)
    assert tree(tmp_path) == {tmp_path / "file": b"old"}


@pytest.mark.parametrize("nth", range(1, 10))
def test_a_full_disk_at_any_moment(root, tmp_path, capfd, monkeypatch, nth):
    """Each file in turn is the one that does not fit; afterwards the same command goes on."""
    line = f"train {ONE} --arch resnet20 --out {{tmp}}/run"
    with monkeypatch.context() as patch:
        fill_disk(patch, nth)
        status = run(line, root=root, tmp=tmp_path)
    if status == 0:
        assert nth > 6  # all files were written
        return
    assert status == 2 and "No space left" in one_line(capfd)
    assert not list(tmp_path.rglob("*.tmp"))
    assert run(line, root=root, tmp=tmp_path) == 0
    assert run(line.replace("/run", "/whole"), root=root, tmp=tmp_path) == 0
    check_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_huge_learning_rate_stops_the_run(root, tmp_path, capfd):
    assert run(TRAIN + " --lr 1e9 --out {tmp}/run", root=root, tmp=tmp_path) == 2
    err = one_line(capfd)
    assert re.search(r"epoch \d+, step \d+, .*1e\+09.*lower --lr", err), err
    assert not (tmp_path / "run" / "weights.pt").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("command", ["train", "search"])
def test_a_loss_that_is_not_finite_is_located(root, tmp_path, capfd, monkeypatch, command, value):
    """24 training images, batch 6: 4 steps of training or 2 of search (2 losses each) an epoch."""
    plain, count = F.cross_entropy, itertools.count(1)
    monkeypatch.setattr(F, "cross_entropy", lambda *a: plain(*a) * (
        value if next(count) == 4 + 3 else 1))
    line = (TRAIN if command == "train" else SEARCH + " --epochs 2") + " --out {tmp}/run"
    assert run(line, root=root, tmp=tmp_path) == 2
    step = {"train": 3, "search": 2}[command]
    err = one_line(capfd)
    assert f"epoch 2, step {step}," in err and "--lr 0.1" in err
    assert len(tas.load_tensors(tmp_path / "run" / "last.ckpt")["metrics"]) == 1
    assert len(metrics(tmp_path / "run")) == 1
    assert not (tmp_path / "run" / "shape.json").exists()


# ------------------------------------------------------------------------------------------------
# Many processes
# ------------------------------------------------------------------------------------------------

SPY = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import torch
import tas
out, dies, rank = sys.argv[2], sys.argv[3] == "dies", os.environ["RANK"]
nets, wrote, extract, write_file = [], [], tas.extract, tas.write_file

class Spy(tas.Step):
    calls = 0

    def __init__(self, net, *rest):
        nets.append(net)
        super().__init__(net, *rest)

    def __call__(self, *batch):
        Spy.calls += 1
        if dies and rank == "1" and Spy.calls == 6:
            os._exit(9)
        super().__call__(*batch)

def spy_extract(space, alpha, beta, *rest):
    torch.save([alpha.detach(), beta.detach()], f"{out}/sizes{rank}")
    return extract(space, alpha, beta, *rest)

def spy_write(path, content):
    wrote.append(str(path))
    if "shape.json" in str(path):
        time.sleep(1)  # a slow disk: nobody may read what is not yet there
    write_file(path, content)

tas.Step, tas.extract, tas.write_file = Spy, spy_extract, spy_write
status = tas.main(sys.argv[4:])
nets = [net.state_dict() for net in nets if isinstance(net, tas.ResNet)]
torch.save(nets, f"{out}/nets{rank}")
torch.save(wrote, f"{out}/wrote{rank}")
sys.exit(status)
"""


def two_processes(line, tmp, dies, **places):
    (tmp / "spy.py").write_text(SPY)
    return finish(start(line, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                        str(tmp / "spy.py"), str(TAS.parent), str(tmp), dies, tmp=tmp, **places))


def test_two_processes_agree(root, tmp_path):
    status, out, err = two_processes(PRUNE + " --out {tmp}/runs", tmp_path, "lives", root=root)
    assert status == 0, err
    assert out.count("search 3/3") == 1  # only the first one speaks
    a, b = [torch.load(tmp_path / f"sizes{rank}") for rank in (0, 1)]
    assert equal(a, b)
    saved = tas.load_tensors(tmp_path / "runs" / "search" / "last.ckpt")["parts"]["net"]
    assert torch.equal(saved["alpha"], a[0]) and torch.equal(saved["beta"], a[1])
    a, b = [torch.load(tmp_path / f"nets{rank}") for rank in (0, 1)]
    assert len(a) == 2 and equal(a, b)
    assert len(torch.load(tmp_path / "wrote0")) > 10 and torch.load(tmp_path / "wrote1") == []
    shape = tas.Shape.load(tmp_path / "runs" / "search" / "shape.json")
    ratio = tas.count_macs(shape) / tas.count_macs(shape.full)
    assert 0.475 <= ratio <= 0.525
    assert tas.load(tmp_path / "runs" / "pruned").shape == shape


def test_two_processes_that_draw_a_shape(root, tmp_path):
    """Nothing is learned, so the first process is at the end of it at once."""
    line = SEARCH + " --method random --out {tmp}/run"
    status, _, err = two_processes(line, tmp_path, "lives", root=root)
    assert status == 0, err
    assert tas.read_json(tmp_path / "run" / "run.json")["result"]["macs"] == tas.count_macs(
        tas.Shape.load(tmp_path / "run"))


def test_a_dead_process_ends_the_run(root, tmp_path):
    status, out, _ = two_processes(TRAIN + " --out {tmp}/run", tmp_path, "dies", root=root)
    assert status != 0
    assert "run 1/2" in out and "run 2/2" not in out
    assert len(tas.load_tensors(tmp_path / "run" / "last.ckpt")["metrics"]) == 1
    assert not (tmp_path / "run" / "weights.pt").exists()


def test_a_batch_that_processes_cannot_share(root, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_refused(capfd, root, f"train {ONE} --arch resnet20", "--batch-size 6", "4 processes")


# ------------------------------------------------------------------------------------------------
# Steps: no host sync, the gradients that are stepped, one graph
# ------------------------------------------------------------------------------------------------

def step_args(command, compiled="off", device="cpu"):
    line = f"{command} --data synthetic --arch resnet20 --weight-decay 5e-4 --precision fp32 "
    args = tas.build_parser().parse_args((line + f"--compile {compiled} --batch-size 4" + (
        " --arch-lr 0.05" if command == "search" else "")).split())
    args.device, args.rank, args.world = torch.device(device), 0, 1
    return args


def small_network(seed=0):
    torch.manual_seed(seed)
    return tas.ResNet(tas.Space("resnet20", 3, 8).full)


def search_steps(compiled="off"):
    """A transformable network and a function that takes a step of its weights and one of its
    sizes."""
    torch.manual_seed(0)
    space = tas.Space("resnet20", 3, 8)
    net = tas.SuperResNet(space).to(memory_format=torch.channels_last)
    steps = tas.search_steps(net, step_args("search", compiled), (None, None),
                             tas.count_macs(space.full) / 2)
    return net, steps


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 8, 8, generator=g).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(3, (4,), generator=g)


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


@pytest.mark.parametrize("kind", ["search", "train", "distil"])
def test_a_step_does_not_wait_for_the_device(kind):
    if kind == "search":
        net, steps = search_steps()
    else:
        net = small_network()
        steps = tas.train_steps(net, step_args("train"), None,
                                small_network(1) if kind == "distil" else None)
    before = [p.detach().clone() for p in net.parameters()]
    with no_host_sync():
        for _ in range(3):
            for i, step in enumerate(steps):
                step(*batch(i))
    assert all(not torch.equal(p, old) for p, old in zip(net.parameters(), before)
               if p.grad is not None and p.grad.abs().sum() > 0)
    for step in steps:
        assert len(step.seen) == 3 and step.read()[0] > 0


def test_gradients_of_what_is_stepped_and_of_nothing_else():
    net, steps = search_steps()
    sizes, asked, grads = [net.alpha, net.beta], [], []
    weights = [p for p in net.parameters() if not any(p is s for s in sizes)]

    def snapshot(params):
        return [None if p.grad is None else p.grad.clone() for p in params]

    net.register_forward_pre_hook(lambda *_: asked.append(
        [[p.requires_grad for p in params] for params in (weights, sizes)]))
    hook = register_optimizer_step_pre_hook(
        lambda *_: grads.append([snapshot(weights), snapshot(sizes)]))
    for seed in range(2):
        steps[0](*batch(seed))
        steps[1](*batch(seed + 9))
    hook.remove()
    one, two = len(weights), len(sizes)
    assert asked == [[[True] * one, [False] * two], [[False] * one, [True] * two]] * 2
    assert grads[0][1] == [None, None]  # the weight half knows no gradient of alpha and beta
    assert None not in grads[0][0] and None not in grads[1][1]
    for before, after, part in ((0, 1, 0), (1, 2, 1), (2, 3, 0)):  # kept by the other half
        assert equal(grads[before][part], grads[after][part])
    for before, after, part in ((0, 2, 0), (1, 3, 1)):  # renewed by its own
        assert not equal(grads[before][part], grads[after][part])


def count_graphs(patch):
    """Let torch.compile count its graphs; a counter per compiled function."""
    counters, plain = [], torch.compile

    def counting(function, **options):
        assert options["fullgraph"] is True
        counters.append(CompileCounter())
        return plain(function, **options | {"backend": counters[-1]})

    torch._dynamo.reset()
    patch.setattr(torch, "compile", counting)
    return counters


def test_the_search_step_is_two_graphs(monkeypatch):
    counters = count_graphs(monkeypatch)
    net, steps = search_steps("on")
    net.train()
    for i in range(20):
        net.tau.fill_(10 - i / 2.1)
        steps[0].optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
        steps[0](*batch(i))
        steps[1](*batch(i + 50))
    assert [counter.frame_count for counter in counters] == [1, 1]
    assert len(steps[0].seen) == 20 and steps[0].read()[0] > 0


@pytest.mark.parametrize("distil", [False, True])
def test_the_training_step_is_one_graph(monkeypatch, distil):
    counters = count_graphs(monkeypatch)
    [step] = tas.train_steps(small_network(), step_args("train", "on"), None,
                             small_network(1) if distil else None)
    for i in range(20):
        step.optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
        step(*batch(i))
    assert [counter.frame_count for counter in counters] == [1]


def test_compilation_that_fails_is_one_warning(monkeypatch, capsys):
    def broken(function, **_):
        def fail(*_):
            raise torch._dynamo.exc.TorchDynamoException("no compiler\nfor you")
        return fail

    monkeypatch.setattr(torch, "compile", broken)
    args = step_args("train", "auto", "cuda")  # where auto compiles; nothing is put there
    [step] = tas.train_steps(small_network(), args, None)
    for i in range(3):
        step(*batch(i))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "warning" in err and "no compiler" in err
    assert len(step.seen) == 3 and step.read()[0] > 0


# ------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------

def test_prune_leaves_three_runs(root):
    teacher, pruned = [tas.load(root / "runs" / name) for name in ("teacher", "pruned")]
    shape = tas.Shape.load(root / "runs" / "search" / "shape.json")
    assert teacher.shape == shape.full and pruned.shape == shape
    assert tas.Shape.load(root / "runs" / "search") == shape
    assert tas.read_json(root / "runs" / "pruned" / "run.json")["result"]["classes"] == ["a", "b"]
    assert not teacher.training and not pruned.training
    assert abs(tas.count_macs(shape) / tas.count_macs(shape.full) - 0.5) <= 0.025
    for name, files in (("teacher", RESULTS), ("search", RESULTS[:4]), ("pruned", RESULTS)):
        assert sorted(p.name for p in (root / "runs" / name).iterdir()) == sorted(files)
        info = tas.read_json(root / "runs" / name / "run.json")
        assert info["settings"]["seed"] == 0 and info["versions"]["torch"] == torch.__version__
        assert info["result"]["full_macs"] == tas.count_macs(shape.full)
    accuracy = {n: tas.read_json(root / "runs" / n / "run.json")["result"] for n in
                ("teacher", "pruned")}
    assert accuracy["pruned"]["teacher_accuracy"] == accuracy["teacher"]["accuracy"]


@pytest.mark.parametrize("name", ["teacher", "pruned"])
def test_weights_load_without_this_program_s_help(root, name):
    path = root / "runs" / name
    state = torch.load(path / "weights.pt", weights_only=True)
    net = tas.ResNet(tas.Shape.load(path / "shape.json"))
    net.load_state_dict(state)
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(net.eval()(x), tas.load(path)(x))


@pytest.mark.parametrize("name", ["teacher", "pruned"])
def test_eval_gives_the_accuracy_of_the_run(root, capsys, name):
    result = tas.read_json(root / "runs" / name / "run.json")["result"]
    assert run("eval --data folder --data-dir {root}/data --workers 0 {root}/runs/" + name,
               root=root) == 0
    out = capsys.readouterr().out
    assert f"accuracy {result['accuracy']:.2f}% on 8 images" in out
    net, right = tas.load(root / "runs" / name), 0
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for label, folder in enumerate("ab"):
        for path in (root / "data" / "val" / folder).iterdir():
            pixels = (np.asarray(Image.open(path)) / 255 - mean) / std
            x = torch.tensor(pixels).permute(2, 0, 1)[None].float()
            right += int(net(x).argmax()) == label
    assert result["accuracy"] == 100 * right / 8


def test_export(root, tmp_path, capsys):
    shutil.copytree(root / "runs" / "pruned", tmp_path / "pruned")
    assert run("export {tmp}/pruned", tmp=tmp_path) == 0
    assert "MB" in capsys.readouterr().out
    program = torch.export.load(tmp_path / "pruned" / "network.pt2").module()
    net = tas.load(tmp_path / "pruned")
    for n in (1, 5):
        x = torch.randn(n, 3, 8, 8)
        torch.testing.assert_close(program(x), net(x))


def test_onnx_without_its_packages(root, tmp_path, capsys, monkeypatch):
    shutil.copytree(root / "runs" / "pruned", tmp_path / "pruned")
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert run("export {tmp}/pruned --onnx", tmp=tmp_path) == 2
    assert "pip install onnx" in one_line(capsys)


def cells(text, found):
    """The rows of a Markdown table that have a cell, as dicts."""
    rows = [[c.strip() for c in line.strip("| \n").split(" | ")] for line in text.splitlines()
            if line.startswith("|")]
    return [dict(zip(rows[0], row)) for row in rows[2:] if found in row]


def test_report_over_seeds(root, tmp_path, capsys):
    values = {0: (91.25, 93.5), 1: (90.5, 93.75)}  # pruned and teacher
    for seed, (accuracy, above) in values.items():
        base = tmp_path / str(seed)
        shutil.copytree(root / "runs", base)
        for name, change in (("teacher", {"accuracy": above}), (
                "pruned", {"accuracy": accuracy, "teacher_accuracy": above})):
            info = tas.read_json(base / name / "run.json")
            info["settings"]["seed"] = seed
            info["result"] |= change
            (base / name / "run.json").write_text(json.dumps(info))
    assert run("report {tmp}/0 {tmp}/1 --out {tmp}/report", tmp=tmp_path) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.splitlines()[0] in capsys.readouterr().out
    found, unpruned = cells(text, "tas"), cells(text, "unpruned")
    assert len(found) == len(unpruned) == 1
    for row, place in ((found[0], 0), (unpruned[0], 1)):
        scores = [v[place] for v in values.values()]
        mean, spread = statistics.mean(scores), statistics.stdev(scores)
        assert row["accuracy %"] == f"{mean:.2f} ± {spread:.2f}"
        assert row["seeds"] == "0 1" and row["arch"] == "resnet20"
    drops = [above - accuracy for accuracy, above in values.values()]
    assert found[0]["drop"] == f"{statistics.mean(drops):.2f} ± {statistics.stdev(drops):.2f}"
    shape = tas.Shape.load(root / "runs" / "search" / "shape.json")
    assert float(found[0]["MACs M"].split(" ± ")[0]) == pytest.approx(
        tas.count_macs(shape) / 1e6, abs=0.006)
    assert float(found[0]["removed %"].split(" ± ")[0]) == pytest.approx(
        100 - 100 * tas.count_macs(shape) / tas.count_macs(shape.full), abs=0.06)
    image = Image.open(tmp_path / "report" / "report.png")
    assert image.format == "PNG" and image.width >= 800 and image.height >= 400
    colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 20


def test_report_keeps_other_settings_apart(root, tmp_path):
    """Only runs that differ in nothing but the seed are averaged."""
    changes = [{}, {"lr": 0.2}, {"weight_decay": 0.0}, {"batch_size": 3}, {"seed": 7}]
    for i, change in enumerate(changes):
        shutil.copytree(root / "runs" / "pruned", tmp_path / str(i))
        info = tas.read_json(tmp_path / str(i) / "run.json")
        info["settings"] |= change
        (tmp_path / str(i) / "run.json").write_text(json.dumps(info))
    assert run("report {tmp}", tmp=tmp_path) == 0
    rows = cells((tmp_path / "report.md").read_text(), "tas")
    assert sorted(row["seeds"] for row in rows) == ["0", "0", "0", "0 7"]


def test_report_of_trainings_alone(root, tmp_path, capsys):
    shutil.copytree(root / "runs" / "teacher", tmp_path / "teacher")
    assert run("report {tmp}", tmp=tmp_path) == 0
    assert len(cells((tmp_path / "report.md").read_text(), "unpruned")) == 1
    assert not (tmp_path / "report.png").exists()
    assert "report.png" not in capsys.readouterr().out


@pytest.mark.parametrize("what", ["resnet20", "resnet50", "good", "search"])
def test_describe_accounts_for_all_macs(root, tmp_path, capsys, what):
    if what == "good":
        what = tmp_path / "shape.json"
        what.write_text(json.dumps(good_fields()))
        shape = tas.Shape.load(what)
    elif what == "search":
        what = root / "runs" / "search"
        shape = tas.Shape.load(what / "shape.json")
    else:
        shape = tas.Space(what, 10 if what == "resnet20" else 1000).full
    assert run(f"describe {what}") == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^(\S+) +(\d+) +(\d+) +([\d,]+) +([\d.]+)%", out, re.M)
    macs = [int(row[3].replace(",", "")) for row in rows]
    assert sum(macs) == tas.count_macs(shape)
    assert sum(float(row[4]) for row in rows) == pytest.approx(100, abs=0.05 * len(rows))
    blocks = [w for row in shape.stages for w in row]
    convs = [int(row[1]) for row in rows if ".conv" in row[0] and row[1] != "0"]
    assert convs == [c for w in blocks for c in w]
    dropped = sum(map(len, shape.full.stages)) - len(blocks)
    assert out.count("dropped") == dropped * len(blocks[0])


def test_a_network_without_a_shape_knows_no_search(root, tmp_path, monkeypatch):
    """Even when it is trained in a directory that has a run.json."""
    monkeypatch.chdir(root / "runs" / "search")
    assert run(TRAIN.replace("--epochs 2", "--epochs 1") + " --out {tmp}", root=root,
               tmp=tmp_path / "run") == 0
    result = tas.read_json(tmp_path / "run" / "run.json")["result"]
    assert result["search"] is None and result["teacher_accuracy"] is None


def test_a_reader_that_has_seen_enough():
    process = start("describe resnet164")
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    status, _, err = finish(process)
    assert (status, err) in ((141, ""), (0, ""))  # 0: all of it went into the pipe at once


def test_load_of_a_shape_file(tmp_path):
    (tmp_path / "shape.json").write_text(json.dumps(good_fields()))
    net = tas.load(tmp_path / "shape.json")
    assert not net.training and net(torch.zeros(2, 3, 8, 8)).shape == (2, 2)


def test_bench(root, tmp_path):
    status, out, err = finish(start(
        "bench --arch resnet20 --batch-size 2 --image-size 8 --rounds 1 --precision fp32 "
        "--shape {root}/runs/search/shape.json --json {tmp}/bench.json", root=root, tmp=tmp_path))
    assert status == 0, err
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["batch_size"] == 2 and found["torch"] == torch.__version__
    assert found["threads"] >= 1 and found["machine"]
    rows = {row["case"]: row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == 8
    for row in rows.values():
        assert row["precision"] == "fp32" and row["ms"] > 0 and row["case"] in out
        base = rows[row["to"]]["ms"]  # both are rounded to 0.005 ms
        assert row["ratio"] == pytest.approx(
            row["ms"] / base, abs=6e-4 + 0.006 * (row["ms"] / base + 1) / base)
    shape = tas.Shape.load(root / "runs" / "search" / "shape.json")
    ratio = tas.count_macs(shape) / tas.count_macs(shape.full)
    assert found["macs_ratio"]["shape"] == pytest.approx(ratio * 1, abs=0.01)


PEAK = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import tas

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

args = tas.build_parser().parse_args(["bench", "--precision", "fp32"])
args.weight_decay, args.arch_lr = 5e-4, 1e-3
tas.setup(args)
step = tas._bench_cases(args, tas.Space("resnet20"), {})[sys.argv[2]]
before = peak()
for _ in range(3):
    step()
print(peak() - before)
"""


def test_memory_of_the_search():
    """Growth of the resident set in three steps, a process each: at most 1.5 times training's."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    processes = [subprocess.Popen([sys.executable, "-c", PEAK, str(TAS.parent), case], text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                 for case in ("training", "search, 2 candidates mixed")]
    (_, training, _), (_, search, err) = map(finish, processes)
    assert err == "" and 1e5 < int(training) and int(search) <= 1.5 * int(training)


@pytest.mark.parametrize("command", [
    "", "train", "search", "prune", "eval", "export", "describe", "bench", "report"])
def test_help_fits_one_screen(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        run(command + " --help")
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert out.count("\n") <= 50 and out.startswith("usage: ")


def test_import_is_light():
    names = "matplotlib", "torchvision", "tqdm"
    code = "import sys, torch; before = set(sys.modules); import tas; " \
           f"print([n for n in {names} if n in set(sys.modules) - before])"
    status, out, err = finish(start("", "-c", code))
    assert (status, out, err) == (0, "[]\n", "")


def test_synthetic_data_needs_no_files(tmp_path):
    """The command of the smoke run, as a user types it."""
    line = "prune --data synthetic --arch resnet20 --epochs 1 --batch-size 512 --precision bf16 " \
           "--method uniform --out {tmp}/runs"
    status, out, err = finish(start(line, tmp=tmp_path))
    assert status == 0, err
    assert out.count("next: ") == 1 and "accuracy" in out  # prune itself does what is next
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["pruned", "search", "teacher"]


# ------------------------------------------------------------------------------------------------
# README
# ------------------------------------------------------------------------------------------------

def test_readme_points_at_the_right_lines():
    """Every link to a line of tas.py leads to the definition or the section that it names."""
    code = TAS.read_text().splitlines()
    links = re.findall(r"\[`?([\w ]+)`?\]\(tas\.py#L(\d+)\)", (HERE / "README.md").read_text())
    assert len(links) > 20
    for name, number in links:
        assert re.match(rf"(class|def) {name}\b|# ---- {name} -", code[int(number) - 1]), name


def test_readme_s_commands_are_understood():
    text = (HERE / "README.md").read_text()
    lines = re.findall(r"^python tas\.py (.+)$", text, re.M)
    assert len(lines) >= 2
    for line in lines:
        assert tas.build_parser().parse_args(line.split()).function
    for name in re.findall(r"`(\w+)`", text.split("## Deviations")[1].split("## Limits")[0]):
        assert hasattr(tas, name)
    for path in re.findall(r"\]\(([^)#]+)\)", text):
        assert (HERE / path).exists(), path


# ------------------------------------------------------------------------------------------------
# Switches
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("switch", [
    "--search width", "--search depth", "--method random", "--method uniform", "--num-samples 1",
    "--num-samples 8", "--sampler softmax", "--align pad", "--round 8", "--tolerance 0.02",
    "--method random --search width --round 4", "--flops 1.3M", "--method uniform --round 2"])
def test_switches_of_the_search(root, tmp_path, switch):
    switch += " --flops 0.65" if "depth" in switch else ""
    assert run(SEARCH + " {switch} --out {tmp}/run", root=root, tmp=tmp_path, switch=switch) == 0
    shape = tas.Shape.load(tmp_path / "run" / "shape.json")
    full = shape.full
    share = 0.65 if "depth" in switch else 0.5
    if "1.3M" in switch:
        share = 1.3e6 / tas.count_macs(full)
    tolerance = 0.02 if "0.02" in switch else 0.05
    assert abs(tas.count_macs(shape) / tas.count_macs(full) / share - 1) <= tolerance + 1e-6
    blocks = [w for row in shape.stages for w in row]
    if "--search depth" in switch:
        assert shape.stem == 16 and all(
            w == s[0] for row, s in zip(shape.stages, full.stages) for w in row)
    if "--search width" in switch or "uniform" in switch:
        assert list(map(len, shape.stages)) == [3, 3, 3]
    if "--round" in switch:
        to = int(switch.split("--round ")[1].split()[0])
        assert [c % to for w in blocks for c in w] == [0] * 2 * len(blocks)
    kept = tas.read_json(tmp_path / "run" / "run.json")["settings"]
    for flag, value in re.findall(r"--(\S+) (\S+)", switch.split(" --flops")[0]):
        if flag != "flops":
            assert str(kept[flag.replace("-", "_")]) == value


def test_samplers_and_alignments_differ(root, tmp_path):
    """A switch that changes nothing would be no switch."""
    losses = set()
    for i, switch in enumerate(("", "--sampler softmax", "--align pad", "--num-samples 8")):
        assert run(SEARCH + f" {switch} --out {tmp_path}/{i}", root=root) == 0
        losses.add(metrics(tmp_path / str(i))[0]["val_loss"])
    assert len(losses) == 4


@pytest.mark.parametrize("transfer", ["none", "init", "kd"])
def test_transfer(root, tmp_path, monkeypatch, transfer):
    """The network starts from the teacher's first channels with `init` and only then; the teacher
    guides it with `kd` and only then."""
    seen = []

    plain = tas.train_steps
    monkeypatch.setattr(tas, "train_steps", lambda net, args, share, teacher: seen.append((
        {k: v.clone() for k, v in net.state_dict().items()}, teacher)) or plain(
            net, args, share, teacher))
    assert run(f"train {ONE} --shape {{root}}/runs/search/shape.json --transfer {transfer} "
               "--teacher {root}/runs/teacher --out {tmp}/run", root=root, tmp=tmp_path) == 0
    [(state, teacher)] = seen
    source = torch.load(root / "runs" / "teacher" / "weights.pt", weights_only=True)
    assert (teacher is not None) == (transfer == "kd")
    assert teacher is None or equal(
        {k: v for k, v in teacher.state_dict().items() if "num_batches" not in k},
        {k: v for k, v in source.items() if "num_batches" not in k})
    result = tas.read_json(tmp_path / "run" / "run.json")["result"]
    assert result["search"]["method"] == "tas" and result["teacher_accuracy"] is not None
    shape = tas.Shape.load(root / "runs" / "search" / "shape.json")
    corners = [(name, tuple(slice(n) for n in tensor.shape))
               for name, tensor in tas.ResNet(shape).state_dict().items()
               if name in source and name.endswith("weight") and tensor.ndim > 1]
    same = [torch.equal(state[name][at], source[name][at]) for name, at in corners]
    assert len(same) > 8 and same == [transfer == "init"] * len(same)


# ------------------------------------------------------------------------------------------------
# Photographs
# ------------------------------------------------------------------------------------------------

def test_photographs(tmp_path):
    photographs = SHARED / "data" / "imagenette-mini"
    if not photographs.is_dir():
        pytest.skip("the photographs are not here")
    for part, count in (("train", 16), ("val", 4)):
        for folder in sorted((photographs / part).iterdir())[:2]:
            (tmp_path / "data" / part / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                shutil.copy(path, tmp_path / "data" / part / folder.name)
    assert run("prune --data imagenet --data-dir {tmp}/data --arch resnet18 --image-size 72 "
               "--epochs 1 --batch-size 8 --workers 1 --flops 0.5 --method tas --search width "
               "--precision bf16 --out {tmp}/runs", tmp=tmp_path) == 0
    net = tas.load(tmp_path / "runs" / "pruned")
    assert abs(tas.count_macs(net.shape) / tas.count_macs(net.shape.full) - 0.5) <= 0.025
    assert net(torch.zeros(1, 3, 72, 72)).shape == (1, 2)
    for part in ("teacher", "search", "pruned"):
        assert [line["epoch"] for line in metrics(tmp_path / "runs" / part)] == [1]
    weight_decay = tas.read_json(tmp_path / "runs" / "teacher" / "run.json")["settings"]
    assert weight_decay["weight_decay"] == 1e-4
