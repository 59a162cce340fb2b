"""Properties of tas.py. The slow, plain version that a result is compared with stands in the test.
"""
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
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


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 5))
def test_pad_matrix_keeps_the_channels_that_are_there(widths, more):
    size = max(widths) + more
    matrices = tas.pad_matrix(torch.tensor(widths)[:, None, None], torch.tensor(size), size,
                              torch.float64)
    for matrix, c_in in zip(matrices, widths):
        kept = torch.tensor([1.0] * c_in + [0.0] * (size - c_in)).double()
        assert matrix.equal(torch.diag(kept))


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

def write_images(root, classes=("a", "b", "c"), train=24, test=6, size=8):
    """An ImageFolder of random PNG images, balanced over the classes."""
    from PIL import Image
    rng = random.Random(0)
    for split, count in (("train", train), ("test", test)):
        for i in range(count):
            folder = root / split / classes[i % len(classes)]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = bytes(rng.randrange(256) for _ in range(3 * size * size))
            Image.frombytes("RGB", (size, size), pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = write_images(tmp_path_factory.mktemp("images"))
    return ["--data", "folder", "--data-dir", str(root), "--image-size", "8", "--batch-size", "4",
            "--workers", "0", "--precision", "fp32", "--lr", "0.01"]


def run_lines(path):
    """metrics.jsonl without times."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


KILLER = """
import os, sys, tas, torch
torch.set_num_threads(1)  # as in this process: sums depend on the number of threads
saved, whole, at = [0], tas.save_tensors, int(sys.argv[1])
def save(path, state):
    saved[0] += str(path).endswith("last.ckpt")
    if saved[0] == at:
        open(str(path) + ".tmp", "wb").write(b"half a checkpoint")
        os.kill(os.getpid(), 9)
    whole(path, state)
tas.save_tensors = save
sys.exit(tas.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("command", ["train", "search"])
def test_killed_runs_resume_to_the_same_bits(command, place, tmp_path):
    """Killed in the middle of writing a checkpoint, twice, against an uninterrupted run."""
    flags = [command, "--arch", "resnet20", *place, "--epochs", "3", "--quiet", "--out"]
    assert tas.main([*flags, str(tmp_path / "whole")]) == 0
    for at in ("2", "2"):
        killed = subprocess.run([sys.executable, "-c", KILLER, at, *flags, str(tmp_path / "cut")],
                                cwd=Path(tas.__file__).parent, timeout=300)
        assert killed.returncode == -9
    assert tas.main([*flags, str(tmp_path / "cut")]) == 0
    assert run_lines(tmp_path / "cut") == run_lines(tmp_path / "whole")
    whole, cut = (tas.load_tensors(tmp_path / d / "last.ckpt")["parts"]["net"]
                  for d in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    assert (tmp_path / "cut/shape.json").read_bytes() == (tmp_path / "whole/shape.json").read_bytes()


def test_prune_and_what_users_do_next(place, tmp_path, capsys):
    """All three parts; a second run repeats none; eval, export, describe and report read them."""
    out = tmp_path / "run"
    flags = ["prune", "--arch", "resnet20", *place, "--epochs", "1", "--out", str(out)]
    assert tas.main(flags) == 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert tas.main(flags) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    shape, full = tas.Shape.load(out / "search/shape.json"), tas.Space("resnet20", 3, 8).full
    assert abs(tas.count_macs(shape) / tas.count_macs(full) - 0.5) <= 0.025
    net = tas.load(out / "pruned")
    weights = torch.load(out / "pruned/weights.pt", weights_only=True)
    tas.ResNet(shape).load_state_dict(weights)
    capsys.readouterr()
    assert tas.main(["eval", str(out / "pruned"), *place[:4], "--workers", "0"]) == 0
    accuracy = tas.read_json(out / "pruned/run.json")["result"]["accuracy"]
    assert f"accuracy {accuracy:.2f}%" in capsys.readouterr().out
    assert tas.main(["export", str(out / "pruned")]) == 0
    program = torch.export.load(out / "pruned/network.pt2").module()
    for n in (1, 5):
        x = torch.randn(n, 3, 8, 8)
        torch.testing.assert_close(program(x), net(x))
    capsys.readouterr()
    assert tas.main(["describe", str(out / "pruned")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:-2]]
    assert sum(int(row[3].replace(",", "")) for row in rows) == tas.count_macs(shape)
    assert tas.main(["report", str(out)]) == 0
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{accuracy:.2f}" in (out / "report.md").read_text()


@pytest.mark.parametrize("changes, words", [
    (["--arch", "resnet57"], "resnet56"), (["--data", "cifar"], "cifar10"),
    (["--epochs", "-1"], "--epochs"), (["--flops", "0"], "--flops 0"),
    (["--flops", "1.5"], "--flops 1.5"), (["--flops", "abc"], "--flops abc"),
    (["--flops", "nan"], "--flops nan"), (["--num-samples", "9"], "--num-samples"),
    (["--batch-size", "100"], "--batch-size 100"), (["--data-dir", "nowhere"], "nowhere"),
    (["--device", "abacus"], "--device abacus"), (["--flops", "0.001"], "possible are")])
def test_bad_flags_are_one_line(changes, words, place, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["search", "--arch", "resnet20", *place, "--epochs", "1", "--method", "random", "--out",
             str(out), *changes]
    assert tas.main(flags) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0]
    assert not (out / "shape.json").exists()


def test_bad_images_are_one_line(tmp_path, capsys):
    def fails(root, words):
        assert tas.main(["train", "--arch", "resnet20", "--data", "folder", "--data-dir", str(root),
                         "--image-size", "8", "--batch-size", "4", "--workers", "0", "--out",
                         str(tmp_path / "out")]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1 and words in errors[0]
        assert not (tmp_path / "out").exists()

    broken = write_images(tmp_path / "broken")
    image = broken / "train/a/0.png"
    image.write_bytes(image.read_bytes()[:60])
    fails(broken, str(image))
    fails(write_images(tmp_path / "one", classes=("a",)), "one class")
    odd = write_images(tmp_path / "odd")
    (odd / "test/b").rename(odd / "test/z")
    fails(odd, "same class folders")
    empty = write_images(tmp_path / "empty")
    for path in (empty / "train/b").iterdir():
        path.unlink()
    fails(empty, "b")


def test_other_settings_and_damaged_checkpoints_are_refused(place, tmp_path, capsys):
    flags = ["train", "--arch", "resnet20", *place, "--epochs", "1", "--quiet", "--out",
             str(tmp_path / "out")]
    assert tas.main(flags) == 0
    assert tas.main([*flags, "--workers", "1", "--device", "cpu"]) == 0
    files = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    for changes, words in ((["--epochs", "2"], "epochs was 1, now 2"), (["--seed", "1"], "seed was")):
        capsys.readouterr()
        assert tas.main([*flags, *changes]) == 2
        assert words in capsys.readouterr().err
    assert files == {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    info = json.loads((tmp_path / "out/run.json").read_text())
    del info["result"]
    (tmp_path / "out/run.json").write_text(json.dumps(info))

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    whole = (tmp_path / "out/last.ckpt").read_bytes()
    for content in (whole[:1000], b"", pickle.dumps(Trap())):
        (tmp_path / "out/last.ckpt").write_bytes(content)
        capsys.readouterr()
        assert tas.main(flags) == 2
        assert "last.ckpt is damaged" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_a_loss_that_is_not_finite_stops_the_run(place, tmp_path, capsys):
    flags = ["train", "--arch", "resnet20", *place, "--epochs", "2", "--out", str(tmp_path / "out")]
    assert tas.main([*flags, "--lr", "1e9"]) == 2
    error = capsys.readouterr().err
    assert "not finite in epoch 1, step" in error and "--lr 1e+09" in error


def search_step(compile_flag, space):
    args = tas.build_parser().parse_args(["bench", "--compile", compile_flag])
    net = tas.SuperResNet(space)
    context = tas.Context(torch.device("cpu"))
    step = tas.SearchStep(net, args, context, "fp32", tas.count_macs(space.full) / 2)
    return step, tas.Meter(context)


def test_search_step_never_waits_for_the_device(monkeypatch):
    """No value of a tensor is read in a whole search step."""
    step, meter = search_step("off", tas.Space("resnet20", 10, 8))
    batch = torch.randn(4, 3, 8, 8), torch.arange(4)

    def trip(*_, **__):
        raise AssertionError("a tensor was read")

    for name in ("item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__",
                 "__repr__"):
        monkeypatch.setattr(torch.Tensor, name, trip)
    with pytest.raises(AssertionError):
        torch.ones(()).item()
    for _ in range(2):
        step(batch, batch, meter, meter)


def test_steps_get_the_gradients_that_they_need_only():
    step, meter = search_step("off", tas.Space("resnet20", 10, 8))
    batch, asked = (torch.randn(4, 3, 8, 8), torch.arange(4)), []
    original = step.step

    def spy(loss, params, optimizer):
        others = [p for p in step.weights + step.sizes if all(p is not q for q in params)]
        asked.append(([p.requires_grad for p in params], [p.requires_grad for p in others]))
        original(loss, params, optimizer)

    step.step = spy
    step(batch, batch, meter, meter)
    assert len(asked) == 2
    assert all(all(mine) and not any(others) for mine, others in asked)


def test_search_step_is_one_graph_each_without_recompilation(monkeypatch):
    from torch._dynamo.testing import CompileCounter
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile_(f, backend=counter, **how))
    step, meter = search_step("on", tas.Space("resnet20", 10, 8))
    batch = torch.randn(4, 3, 8, 8), torch.arange(4)
    for i in range(20):
        step.tau.fill_(10 - i * 0.5)
        step.optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
        step(batch, batch, meter, meter)
    assert counter.frame_count == 2  # the loss of the weights and that of the sizes


def test_two_processes_search_together(place, tmp_path):
    """Both halves of every batch are seen, one directory is written, and it can be read."""
    out = tmp_path / "two"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           tas.__file__, "search", "--arch", "resnet20", *place, "--epochs", "1",
                           "--out", str(out)], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("next: ") == 1
    assert tas.Shape.load(out / "shape.json").arch == "resnet20"


def test_importing_loads_neither_plots_nor_data_sets():
    code = "import sys, tas; print(sorted({'matplotlib', 'torchvision'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(tas.__file__).parent, timeout=300)
    assert done.stdout == "[]\n", done.stderr
