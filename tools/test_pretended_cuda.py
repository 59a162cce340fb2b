"""tas.py and its tools as on a CUDA GPU, where there is none.

A tensor "on" cuda:0 is a pair of a real tensor of the host, which has the values, and a FakeTensor
on cuda:0, through which PyTorch itself checks and propagates devices, dtypes and shapes. So all
that is autocast, dispatched or optimised goes the way of CUDA tensors. Counted are operators,
copies between host and device, and waits for the device, with the line of tas.py that causes them.
What this cannot show: CUDA's kernels, Triton, NCCL, time.
"""

import collections
import importlib
import itertools
import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import (
    DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import tas

torch.set_num_threads(1)  # small tensors: sharing them out would take longer than computing

pytestmark = pytest.mark.skipif(torch.version.cuda is None or torch.cuda.is_available(),
                                reason="for a torch built for CUDA, on a machine without a GPU")

MEASURED = dict.fromkeys(("seconds", "images_per_second", "memory_mb"), 0)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
VIEWS = {"_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "expand", "permute",
         "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose",
         "unbind", "unsqueeze", "view"}  # operators that launch nothing
RANDOM = {"bernoulli", "exponential_", "multinomial", "normal_", "rand", "randint", "randn",
          "random_", "randperm", "uniform_"}

# ---- The pretended device -----------------------------------------------------------------------

class Cuda(torch.Tensor):
    """A tensor that says that it is on cuda:0; its values are in the memory of the host."""

    @staticmethod
    def __new__(cls, host, fake):
        self = torch.Tensor._make_wrapper_subclass(
            cls, fake.size(), strides=fake.stride(), storage_offset=fake.storage_offset(),
            dtype=fake.dtype, layout=fake.layout, device=fake.device, requires_grad=False)
        self.host, self.fake = host, fake
        return self

    def __repr__(self):
        return f"Cuda({self.host})"

    def tolist(self):  # reads memory past the dispatcher
        PretendedCuda.active.log["wait", "tolist", line_of_tas()] += 1
        return self.host.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return PretendedCuda.active.run(function, args, kwargs or {})

def line_of_tas():
    """The innermost line of tas.py on the stack, or the backward pass."""
    for frame, line in traceback.walk_stack(sys._getframe(2)):
        if frame.f_code is backward.__code__:
            return "backward"
        if frame.f_code.co_filename == tas.__file__:
            return f"{frame.f_code.co_name}:{line}"
    return "elsewhere"

class PretendedCuda(TorchDispatchMode):
    """While it is active, cuda:0 exists. ops counts (operator, line), log counts (copy or wait,
    what, line). `random` is the random state of the device; None: it shares that of the host."""

    active = None

    def __init__(self):
        super().__init__()
        self.mode = FakeTensorMode(allow_fallback_kernels=False)
        self.ops, self.log = collections.Counter(), collections.Counter()
        self.random = torch.get_rng_state()

    def fake(self, t, device):
        with self.mode:
            return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        device = (kwargs or {}).get("device")
        if Cuda not in types and (device is None or device.type != "cuda"):
            return function(*args, **kwargs or {})  # not on it
        return self.run(function, args, kwargs or {})

    def run(self, function, args, kwargs):
        flat, spec = tree_flatten((args, kwargs))
        name = function.overloadpacket.__name__
        self.ops[name, line_of_tas()] += 1
        hosts = [t.host if isinstance(t, Cuda) else CPU if isinstance(t, torch.device) else t
                 for t in flat]
        fakes = [t.fake if isinstance(t, Cuda) else self.fake(t, t.device)
                 if isinstance(t, torch.Tensor) else t for t in flat]
        fake_args, fake_kwargs = tree_unflatten(fakes, spec)
        if name == "_fused_sgd_":  # there is no fake one
            assert {t.device for t in fakes if isinstance(t, torch.Tensor)} == {GPU}
            return self.compute(name, function, *tree_unflatten(hosts, spec))
        try:
            with self.mode:
                expected = function(*fake_args, **fake_kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            self.log["wait", name, line_of_tas()] += 1
            result = self.compute(name, function, *tree_unflatten(hosts, spec))
            return Cuda(result, self.fake(result, GPU)) if torch.is_tensor(result) else result
        result = self.compute(name, function, *tree_unflatten(hosts, spec))
        self.note_copies(name, fake_args, fakes, fake_kwargs, expected)
        inputs = {id(fake): t for fake, t in zip(fakes, flat) if isinstance(t, torch.Tensor)}

        def pair(host, fake):
            if not isinstance(fake, torch.Tensor) or id(fake) in inputs:  # or changed in place
                return inputs.get(id(fake), host)
            if name == "native_batch_norm" and not host.numel():  # statistics in eval mode
                host = torch.zeros(fake.shape, dtype=fake.dtype)
            assert (host.shape, host.dtype) == (fake.shape, fake.dtype), (function, host, fake)
            return Cuda(host, fake) if fake.device.type == "cuda" else host

        values, out = tree_flatten(result)
        return tree_unflatten(list(map(pair, values, tree_flatten(expected)[0])), out)

    def compute(self, name, function, args, kwargs):
        """The operator on the values, with the random numbers of the device."""
        if name not in RANDOM or self.random is None:
            return function(*args, **kwargs)
        host = torch.get_rng_state()
        torch.set_rng_state(self.random)
        result = function(*args, **kwargs)
        self.random = torch.get_rng_state()
        torch.set_rng_state(host)
        return result

    def note_copies(self, name, args, flat, kwargs, result):
        """Log a copy between host and device, or a scalar or an index of the host."""
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            if source.device != result.device:
                kind = f"copy to {result.device.type}{', async' * bool(kwargs.get('non_blocking'))}"
                self.log[kind, tuple(source.shape), line_of_tas()] += 1
        elif any(isinstance(t, torch.Tensor) and t.device == CPU for t in flat):
            self.log["host operand", name, line_of_tas()] += 1

    def __enter__(self):
        torch._C._ensureCUDADeviceGuardSet()
        self.lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        PretendedCuda.active = self
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self.lift)
        return super().__exit__(*error)

def backward(value, inputs, **_):
    """Tensor.backward through the same nodes, as the engine of autograd insists on a driver."""
    wanted, order, stack = {id(p) for p in inputs}, {}, [value.grad_fn]
    while stack:
        if (node := stack.pop()) not in order:
            order[node] = None
            stack += [after for after, _ in node.next_functions if after is not None]
    waiting = collections.Counter(after for node in order for after, _ in node.next_functions)
    grads, queue = {value.grad_fn: {0: torch.ones_like(value)}}, [value.grad_fn]
    with torch.no_grad():
        while queue:
            node = queue.pop()
            have, out = grads.pop(node, {}), [None] * len(node.next_functions)
            if hasattr(node, "variable"):
                p = node.variable
                if have and id(p) in wanted:
                    assert have[0].device == p.device and have[0].shape == p.shape
                    p.grad = have[0] if p.grad is None else p.grad + have[0]
            elif have:
                out = node(*[have.get(i) for i in range(max(len(node._input_metadata), 1))])
                out = out if isinstance(out, tuple) else (out,)
            for (after, slot), grad in zip(node.next_functions, out):
                if grad is not None and after is not None:  # as the engine does before it goes on
                    into, meta = grads.setdefault(after, {}), after._input_metadata[slot]
                    assert grad.device == meta.device, (after, grad.device, meta.device)
                    grad = grad.sum_to_size(meta.shape).to(meta.dtype)
                    into[slot] = grad if slot not in into else into[slot] + grad
                waiting[after] -= 1
                if after is not None and waiting[after] == 0:
                    queue.append(after)

@pytest.fixture
def gpu(monkeypatch):
    """cuda:0, as far as Python can tell."""
    pretended, seed, save = PretendedCuda(), torch.manual_seed, tas.save_tensors

    def manual_seed(value):
        if pretended.random is not None:
            pretended.random = torch.Generator().manual_seed(value).get_state()
        return seed(value)

    def save_tensors(path, state):  # torch.save copies each storage to the host
        save(path, tree_map(lambda t: t.host.clone() if isinstance(t, Cuda) else t, state))

    def clear_caches():
        tas.mean_and_std.cache_clear()
        tas.load_data.cache_clear()

    for name, value in {
            "is_available": lambda: True, "_lazy_init": lambda: None, "device_count": lambda: 1,
            "current_device": lambda: 0, "set_device": lambda device: None,
            "synchronize": lambda *_: None, "get_device_name": lambda *_: "pretended GPU",
            "is_bf16_supported": lambda including_emulation=True: True,
            "is_current_stream_capturing": lambda: False,
            "get_rng_state": lambda *_: pretended.random,
            "set_rng_state": lambda state, *_: setattr(pretended, "random", state)}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "manual_seed", manual_seed)
    monkeypatch.setattr(tas, "save_tensors", save_tensors)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t, *_: t)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    clear_caches()
    benchmark = torch.backends.cudnn.benchmark
    torch.__future__.set_swap_module_params_on_conversion(True)  # set_data cannot change the type
    with torch.backends.cudnn.flags(enabled=False), pretended:  # no cuDNN kernels for the host
        yield pretended
    torch.__future__.set_swap_module_params_on_conversion(False)
    torch.backends.cudnn.benchmark = benchmark
    clear_caches()

def test_the_pretence(gpu):
    a, b = torch.ones(3, device=GPU), torch.ones(3)
    with pytest.raises(Exception, match="same device"):
        a + b
    assert a.device == GPU and (a + b.to(GPU)).cpu().tolist() == [2, 2, 2]
    assert (a.sum() == 3).item() and a.tolist() == [1, 1, 1] and len(a.nonzero()) == 3
    a += torch.tensor(1.0)
    assert gpu.log == {(*key, "elsewhere"): 1 for key in [
        ("copy to cuda", (3,)), ("copy to cpu", (3,)), ("wait", "_local_scalar_dense"),
        ("wait", "tolist"), ("wait", "nonzero"), ("host operand", "add_")]}
    torch.manual_seed(1)
    host, device = torch.rand(3), torch.rand(3, device=GPU)
    assert host.tolist() == device.tolist() != torch.rand(3, device=GPU).tolist()
    w = torch.randn(4, 3, 3, 3, device=GPU, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = F.conv2d(torch.randn(2, 3, 8, 8, device=GPU), w)
    assert y.dtype is torch.bfloat16
    y.float().square().sum().backward(inputs=[w])
    assert w.grad.device == GPU and w.grad.dtype is torch.float32

def test_backward_is_that_of_autograd():
    """On the host, where both can be had."""
    torch.manual_seed(0)
    space, args = tas.Space("resnet20", 3, 8), arguments("search", CPU, "--precision fp32")
    net, x, y = tas.SuperResNet(space), torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    value = tas.architecture_loss(args, net, torch.ones(()), 1e5, x, y)[0]
    parameters = list(net.parameters())
    expected = torch.autograd.grad(value, parameters, retain_graph=True)
    backward(value, parameters)
    for parameter, grad in zip(parameters, expected):
        torch.testing.assert_close(parameter.grad, grad)

# ---- Steps --------------------------------------------------------------------------------------

def arguments(command, device, extra):
    """What the loops read, as the command line gives it."""
    args = tas.build_parser().parse_args(
        f"{command} --data synthetic --arch resnet20 --weight-decay 5e-4 --batch-size 8 --quiet "
        f"--epochs 1 {extra}".split())
    args.device, args.rank, args.world = device, 0, 1
    return args

def loop(device, kind, precision, steps, arch="resnet20"):
    """One epoch of tas.train or tas.search, of these many steps, on images of noise. Returns the
    shape that was found, the metrics, and what would have been saved."""
    torch.manual_seed(0)
    searches = not kind.startswith("train")
    extra = {"train, distil": "--transfer kd", "search": "--arch-lr 0.01",
             "search, all": "--arch-lr 0.01 --num-samples 8",
             "search, pad": "--arch-lr 0.01 --align pad --sampler softmax"}.get(kind, "")
    args = arguments(kind.split(",")[0], device, f"--precision {precision} {extra}")
    g, count = torch.Generator().manual_seed(0), 8 * steps * (1 + searches)
    splits = [tas.SmallImages(torch.randint(256, (n, 8, 8, 3), generator=g, dtype=torch.uint8),
                              torch.arange(n) % 3, device) for n in (count, 8)]
    data, space, saved = tas.Data(*splits, list("abc")), tas.Space(arch, 3, 8), {}
    target = tas.count_macs(space.full) / 2
    run = SimpleNamespace(args=args, path=Path("run"), settings={"target": target},
                          resume=lambda parts: [], save=lambda parts, _: saved.update(parts),
                          steps=lambda epoch, count, batches, seen: enumerate(batches))
    if searches:
        return tas.search(run, data, space, target), saved
    teacher = tas.ResNet(space.full) if kind == "train, distil" else None
    smallest = space.shape([0] * len(space.widths), [0] * len(space.depths))
    shape = smallest if kind == "train, padded" else space.full
    return (None, tas.train(run, data, tas.ResNet(shape), teacher)), saved

@pytest.fixture
def steps(gpu, monkeypatch):
    """(operators, copies and waits) of every step taken on the device, in order."""
    plain, found = tas.take_step, []

    def take_step(*inputs):
        before = gpu.ops.copy(), gpu.log.copy()
        result = plain(*inputs)
        found.append((gpu.ops - before[0], gpu.log - before[1]))
        return result

    monkeypatch.setattr(tas, "take_step", take_step)
    monkeypatch.setattr(tas, "extract", lambda *_: None)  # what it copies depends on the sizes
    return found

@pytest.fixture
def tiny(monkeypatch):
    """resnet20 of four blocks, and few synthetic images."""
    monkeypatch.setitem(tas.ARCHS, "resnet20", tas.Arch(tas.BASIC, tas.CIFAR, (2, 1, 1)))
    monkeypatch.setattr(tas, "SYNTHETIC_IMAGES", (32, 12))

KINDS = "train", "train, padded", "train, distil", "search", "search, all", "search, pad"

@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_neither_wait_nor_copy(gpu, steps, tiny, kind, precision):
    """Nor does what is between them: an epoch of three steps waits as often as one of one step.
    All steps of a kind are the same operators, and what they change is on the device."""
    tas.mean_and_std(GPU)  # copied once in a process
    logs = []
    for number in (1, 3):
        gpu.log.clear()
        _, saved = loop(GPU, kind, precision, number)
        logs.append(collections.Counter((kind, line) for kind, _, line in gpu.log.elements()))
    assert logs[0] == logs[1] and logs[0]
    assert not any(log for _, log in steps)
    a_round = len(saved) - 1  # steps of one round: as many as optimisers
    assert steps[-a_round:] == steps[-2 * a_round:-a_round] and sum(steps[-1][0].values()) > 100
    tensors = [*saved["net"].state_dict().values(), *(p.grad for p in saved["net"].parameters())]
    for name in saved.keys() - {"net"}:
        tensors += [t for state in saved[name].state.values() for t in state.values()]
    assert {t.device for t in tensors if isinstance(t, torch.Tensor)} == {GPU}

@pytest.mark.parametrize("kind", KINDS)
def test_steps_give_the_numbers_of_the_host(gpu, tiny, kind):
    gpu.random = None  # the same random numbers
    ((shape, [a]), host), ((found, [b]), device) = (loop(d, kind, "fp32", 2) for d in (CPU, GPU))
    assert shape == found and a | MEASURED == pytest.approx(b | MEASURED, rel=1e-4)
    state = {name: t.cpu() for name, t in device["net"].state_dict().items()}
    torch.testing.assert_close(state, dict(host["net"].state_dict()), rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize("kind, arch, most", [
    ("train", "resnet20", 260), ("train", "resnet110", 1_250),
    ("search", "resnet20", 1_150), ("search", "resnet110", 3_350)])
def test_number_of_operators(gpu, steps, kind, arch, most):
    """Of a step of training; of the two of a search round. All but views."""
    loop(GPU, kind, "bf16", 2, arch)  # the first makes what is kept
    last = steps[-2:] if kind == "search" else steps[-1:]
    count = sum(n for ops, _ in last for (name, _), n in ops.items() if name not in VIEWS)
    assert most / 4 < count <= most

# ---- Commands -----------------------------------------------------------------------------------

SIZE = "--batch-size 16 --epochs 2 --device cuda"

def command(capsys, line, expected=0):
    """Run a line of tas.py or of a tool; what it printed."""
    name, *words = line.split()
    if (HERE / f"{name}.py").exists():
        status = importlib.import_module(name).main(words)
    else:
        status = tas.main([name, *words])
    out, err = capsys.readouterr()
    assert status == expected, (line, out, err)
    return out

def test_commands_from_end_to_end(gpu, tiny, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = "--data synthetic"
    command(capsys, f"prune {data} {SIZE} --epochs 1 --arch resnet20 --round 8 --out all")
    searched, trained = (tas.read_json(f"all/{name}/run.json") for name in ("search", "pruned"))
    assert searched["machine"] == "pretended GPU" and searched["precision"] == "bf16"
    assert tas.in_band(searched["result"]["macs"], searched["settings"]["target"], 0.05)
    evaluated = command(capsys, f"eval all/pruned {data} --device cuda")
    assert f"accuracy {trained['result']['accuracy']:.2f}%" in evaluated
    command(capsys, f"eval all/teacher {data} --device cuda --precision fp32")
    command(capsys, f"train {data} {SIZE} --shape all/search --teacher all/teacher "
            "--epochs 1 --transfer init --out init")
    assert gpu.ops
    command(capsys, "export all/pruned")
    command(capsys, "report all")
    command(capsys, "bench resnet20 --image-size 8 --batch-size 8 --rounds 1 --precision bf16 "
            "--device cuda --json bench.json")
    for result in ("all/pruned/network.pt2", "all/report.md", "bench.json"):
        assert (tmp_path / result).stat().st_size > 0

@pytest.mark.parametrize("name", ["train", "search"])
def test_resuming(gpu, tiny, capsys, tmp_path, monkeypatch, name):
    """An interrupted run ends as an uninterrupted one, random numbers of the device included."""
    monkeypatch.chdir(tmp_path)
    extra = "--round 8" if name == "search" else ""
    line = f"{name} --data synthetic --arch resnet20 {SIZE} {extra} --out"
    command(capsys, f"{line} whole")
    plain, calls = tas.Run.save, itertools.count(1)

    def save(*inputs):
        plain(*inputs)
        if next(calls) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tas.Run, "save", save)
        command(capsys, f"{line} parts", expected=130)
    torch.rand(5, device=GPU)
    command(capsys, f"{line} parts")
    whole, parts = ([json.loads(text) | MEASURED
                     for text in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
                    for out in ("whole", "parts"))
    assert len(whole) == 2 and whole == parts

@pytest.mark.parametrize("name, parts", [("train", 1), ("search", 2)])
def test_steps_that_cannot_be_captured(gpu, tiny, capsys, tmp_path, monkeypatch, name, parts):
    """One warning for each; the run is as without the trial, random numbers included."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tas, "take_step", tas.take_step)  # to be put back
    line = f"{name} --data synthetic --arch resnet20 {SIZE} --quiet --out"
    command(capsys, f"{line} plain")
    assert importlib.import_module("graphs").main(f"{line} tried".split()) == 0
    err = capsys.readouterr().err
    assert err.count("warning: a step is not compiled or captured: ") == parts == err.count("\n")
    plain, tried = ([json.loads(text) | MEASURED
                     for text in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
                    for out in ("plain", "tried"))
    assert len(plain) == 2 and plain == tried

def test_the_cpu_leaves_the_gpu_alone(gpu, tiny, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("_lazy_init", "get_rng_state", "set_device", "set_rng_state", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("CUDA is used"))
    line = "search --data synthetic --arch resnet20 --round 8 --batch-size 16 --epochs 1 --out out"
    command(capsys, f"{line} --device cpu")
    info = tas.read_json("out/run.json")
    tas.write_file("out/run.json", json.dumps(info | {"result": None}).encode())  # to be resumed
    command(capsys, f"{line} --device cpu")
    assert not gpu.ops

def test_large_images(gpu, steps, capsys, tmp_path, monkeypatch):
    """Pinned, and copied while the device computes."""
    monkeypatch.chdir(tmp_path)
    for part, k, i in itertools.product(("train", "val"), range(2), range(8)):
        path = tmp_path / "data" / part / "ab"[k] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 80), (40 * k, 9 * i, 99)).save(path)
    command(capsys, f"train --data folder --image-size 72 --arch resnet18 {SIZE} --epochs 1 "
            "--workers 0 --out large")
    copies = {what: n for (kind, what, _), n in gpu.log.items() if kind == "copy to cuda, async"}
    assert copies == {(16, 3, 72, 72): 2, (16,): 2}  # a batch of training, and of the test
    assert len(steps) == 1 and not steps[0][1]
