"""Properties of tools/graphs.py: what is compiled or captured does what the steps of tas.py do."""

import collections
import contextlib
import functools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import graphs
import tas

torch.set_num_threads(1)  # small tensors: sharing them out would take longer than computing

MEASURED = dict.fromkeys(("seconds", "images_per_second", "memory_mb"), 0)  # differ between runs
STEPS = [("train --arch resnet20 --batch-size 16", 1),
         ("train --shape {tmp}/resnet20.json --teacher {tmp}/teacher --batch-size 16", 1),
         ("search --arch resnet20 --batch-size 8", 2)]  # and the steps of two batches

@pytest.fixture
def outcome(tmp_path, monkeypatch):
    """Run a command, by tas.py or by tools/graphs.py with its flags, for two epochs of ten steps on
    images of 8x8 pixels whose brightness tells the class. Gives metrics and what is saved. {tmp}
    stands for a directory with a teacher and a pruned shape."""
    torch.manual_seed(0)
    teacher = tas.ResNet(tas.Space("resnet20", 10, 8).full)
    teacher.shape.save(tmp_path / "teacher" / "shape.json")
    tas.save_tensors(tmp_path / "teacher" / "weights.pt", teacher.state_dict())
    stages = [[[3, 5], [7, 5]], [[4, 14]], [[8, 32], [22, 30]]]
    tas.Shape("resnet20", 10, 8, 9, stages).save(tmp_path / "resnet20.json")
    splits = []
    for count in (167, 40):
        labels, noise = torch.randint(10, (count,)), torch.randint(128, (count, 8, 8, 3))
        images = (noise + 12 * labels[:, None, None, None]).byte()
        splits.append(tas.SmallImages(images, labels, "cpu"))
    data = tas.Data(*splits, [str(c) for c in range(10)])
    monkeypatch.setattr(tas, "load_data", functools.cache(lambda *_: data))

    plain = {"take_step": graphs.plain_step, "train": tas.train, "search": tas.search}

    def run(main, flags, line, name):
        for function in plain:  # until main sets other ones
            monkeypatch.setattr(tas, function, plain[function])
        command, *rest = line.format(tmp=tmp_path).split()
        always = "--data synthetic --image-size 8 --device cpu --precision fp32 --quiet --epochs 2"
        where = ["--out", str(tmp_path / name)]
        assert main([*flags.split(), command, *always.split(), *where, *rest]) == 0
        assert main is tas.main or tas.take_step.steps == {}  # and the memory is free
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return ([json.loads(text) | MEASURED for text in lines],
                tas.load_tensors(tmp_path / name / "last.ckpt")["parts"])
    return run

def identical(a, b):
    """Whether two nested states are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b

@pytest.mark.parametrize("line, parts", STEPS)
def test_steps_are_one_graph(outcome, monkeypatch, line, parts):
    """Whatever the sample, the temperature and the rate; and the same steps as without."""
    def counting(function, **options):
        assert options["fullgraph"] is True
        counters.append(CompileCounter())
        return compile_function(function, **options | {"backend": counters[-1]})

    counters, compile_function = [], torch.compile
    monkeypatch.setattr(torch, "compile", counting)
    torch._dynamo.reset()
    plain = outcome(graphs.main, "", line, "plain")
    assert not counters and identical(plain, outcome(tas.main, "", line, "tas"))
    compiled, _ = outcome(graphs.main, "--compile", line, "compiled")
    for line, expected in zip(compiled, plain[0], strict=True):
        assert line == pytest.approx(expected, rel=1e-4)
    assert [counter.frame_count for counter in counters] == [1] * parts

class Recorded(TorchDispatchMode):
    """Stands for a CUDA graph: replay does again, on the same memory, what was done inside."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():  # no view
                    old.copy_(new)

class Forgetful(Recorded):
    """The last operator of all gets lost."""

    def replay(self):
        self.calls[:] = self.calls[:-1]
        super().replay()

class FrozenImages(Recorded):
    """Replays see the images of the capture."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def freeze(value):
            images = torch.is_tensor(value) and value.shape[1:] == (3, 8, 8)
            return value.clone() if images else value

        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.calls[-1] = (function, *tree_map(freeze, (args, kwargs or {})), result)
        return result

class FrozenRate(Recorded):
    """Replays have the learning rate of the capture."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if "lr" in (kwargs or {}):
            self.calls[-1] = (function, args, kwargs | {"lr": kwargs["lr"].clone()}, result)
        return result

class WithoutMomentum(Recorded):
    """Replays forget the steps before."""

    def replay(self):
        for function, args, _, _ in self.calls:
            if "sgd" in function.name():
                torch._foreach_zero_(args[2])
        super().replay()

@pytest.fixture
def use(monkeypatch):
    """Sets what stands for a CUDA graph, in steps on the CPU as well; returns how many replays."""
    replays, plain_capture = collections.Counter(), graphs.capture

    def capture(step, net, optimizer, device, batch):
        @contextlib.contextmanager
        def record(graph, **_):  # a capture does nothing yet
            with graphs.without_trace(net, optimizer, device), graph:
                yield
        monkeypatch.setattr(torch.cuda, "graph", record)
        return plain_capture(step, net, optimizer, device, batch)

    def use(kind):
        def make():
            graph = kind()
            graph.replay = lambda: replays.update([kind]) or kind.replay(graph)
            return graph
        monkeypatch.setattr(graphs, "capture", capture)
        monkeypatch.setattr(graphs.FastStep, "can_capture", lambda step, args: step.captures)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        return replays
    return use

@pytest.mark.parametrize("line, parts", STEPS)
def test_steps_run_from_where_they_were_captured(outcome, use, capsys, line, parts):
    """They do what they do without, and leave no trace of the trial."""
    plain, a = outcome(tas.main, "", line, "plain")
    replays = use(Recorded)
    captured, b = outcome(graphs.main, "", line, "captured")
    assert "not compiled" not in capsys.readouterr().err
    assert replays[Recorded] == parts * (2 + 2 * 10)  # to compare, and of two epochs
    assert captured == [pytest.approx(line, rel=1e-5) for line in plain]
    for name, tensor in a["net"].items():
        torch.testing.assert_close(b["net"][name], tensor, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("kind, line, parts", [
    *[(kind, *step) for kind in (Forgetful, FrozenImages, FrozenRate) for step in STEPS],
    (WithoutMomentum, *STEPS[0])])
def test_captured_steps_that_differ_are_not_used(outcome, use, capsys, kind, line, parts):
    plain = outcome(tas.main, "", line, "plain")
    replays = use(kind)
    captured = outcome(graphs.main, "", line, "captured")
    warning = "warning: a step is not compiled or captured"
    assert capsys.readouterr().err.count(warning) == parts
    assert replays[kind] == 2 * parts
    assert identical(plain, captured)

@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("line, parts", STEPS)
def test_compilation_that_fails_is_one_warning(outcome, monkeypatch, capsys, line, parts, when):
    """And leaves no trace, even where the forward pass was done."""
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, grad):
            raise torch._dynamo.exc.TorchDynamoException("no compiler\nfor you")

    def broken(function, **_):
        def fail(*inputs):
            minimised, loss, logits = function(*inputs)
            if when == "forward":
                raise torch._dynamo.exc.TorchDynamoException("no compiler\nfor you")
            return Broken.apply(minimised), loss, logits
        return fail

    plain = outcome(tas.main, "", line, "plain")
    monkeypatch.setattr(torch, "compile", broken)
    fallen_back = outcome(graphs.main, "--compile", line, "broken")
    warnings = re.findall("warning: a step is not .*no compiler.*\n", capsys.readouterr().err)
    assert len(warnings) == parts
    assert identical(plain, fallen_back)
