"""Properties of the tools. What a result is compared with is computed plainly in the test."""

import collections
import dataclasses
import hashlib
import html
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import string
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from matplotlib.figure import Figure
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import bench
import command
import describe
import export
import figure
import finished
import graphs
import latency
import layers
import predict
import report
import split
import sweep
import tas
import times
import timing
import trajectory
import weights

torch.set_num_threads(1)  # small tensors: sharing them out would take longer than computing

SETTINGS = settings(deadline=None, derandomize=True, max_examples=100, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture,
                                           HealthCheck.too_slow])
SCRIPTS = ("bench", "describe", "export", "latency", "predict", "report", "split", "sweep",
           "weights")
CHEAP = "--data folder --image-size 8 --batch-size 6 --workers 0 --precision fp32 --quiet"
SIZE = 8  # pixels

# ---- Small worlds -------------------------------------------------------------------------------

def write_images(root):
    """An ImageFolder of noise; the classes differ in brightness."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for c, name in enumerate(("ant", "bee")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(40 * c, 176 + 40 * c, (SIZE, SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A directory with the folder `insects` and `runs`, which prune made."""
    root = tmp_path_factory.mktemp("world")
    write_images(root / "insects")
    line = f"prune {CHEAP} --data-dir {root}/insects --arch resnet20 --epochs 2 --out {root}/runs"
    assert tas.main(line.split()) == 0
    return root

@pytest.fixture
def pruned(world, tmp_path):
    """A copy of the pruned network's run, with weights that no image drives into certainty."""
    directory = shutil.copytree(world / "runs" / "pruned", tmp_path / "pruned")
    torch.manual_seed(0)
    net = tas.ResNet(tas.Shape.load(directory))
    for _ in range(50):  # running statistics
        net(torch.randn(8, 3, SIZE, SIZE))
    tas.save_tensors(directory / "weights.pt", net.state_dict())
    return directory

def change(directory, **entries):
    """Change entries of run.json: those of settings and of the result by name, or run.json's own;
    None removes one."""
    path = directory / "run.json"
    info = tas.read_json(path)
    for name, value in entries.items():
        for part in (info["settings"], info["result"], info):
            if name in part or part is info:
                part[name] = value
                if value is None:
                    del part[name]
                break
    path.write_text(json.dumps(info))
    if "accuracy" in entries:  # of the last epoch, too
        path = directory / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[-1]["test_accuracy"] = entries["accuracy"]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

def one_line(capture):
    """The only line on stderr."""
    err = capture.readouterr().err
    assert err.endswith("\n") and err.count("\n") == 1 and len(err) <= 501, err
    return err

def check_refused(capture, tool, *line, words=()):
    """Exit status 2 and one line that has these words."""
    capture.readouterr()
    assert tool.main([str(word) for word in line]) == 2
    err = one_line(capture)
    assert err.startswith("error: ")
    for word in words:
        assert str(word) in err
    return err

# ---- What all tools share -----------------------------------------------------------------------

def unescape(text):
    """What a reader sees of Markdown."""
    return html.unescape(re.sub(rf"\\([{re.escape(string.punctuation)}])", r"\1", text))

TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=30) | st.text(
    st.sampled_from("a|*_`<>[]&\\$~#\n\x1b\x9b\u202e;"), max_size=30)

@SETTINGS
@given(TEXT)
def test_names_are_shown_as_they_are_and_obeyed_by_nobody(text):
    shown = command.printable(text)
    assert all(c.isprintable() for c in shown)
    if text.isprintable():
        assert shown == text
    written = command.markdown(text)
    assert not re.search(r"(?<!\\)(\\\\)*[|*_`\[\]$~<>]", written)
    assert unescape(written) == shown

STARTS = """
import runpy, sys
import torch  # once for all, as it takes seconds
known = {*sys.modules}
for script in sys.argv[1:]:
    sys.argv, sys.path[0] = [script], script.rpartition("/")[0]
    before = [*sys.path]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print(end.code)
    sys.path[:] = before
    for name in {*sys.modules} - known:
        if name in ("tas", "command", "events", "figure", "finished", "report", "trajectory"):
            del sys.modules[name]
"""

def test_scripts_start_anywhere_and_end_in_one_line(tmp_path):
    """Each as `python tools/NAME.py` would start it, without arguments."""
    scripts = [str(HERE / f"{name}.py") for name in SCRIPTS]
    ended = subprocess.run([sys.executable, "-c", STARTS, *scripts], cwd=tmp_path, text=True,
                           capture_output=True, timeout=120)
    assert ended.stdout.split() == ["2"] * len(SCRIPTS), ended.stderr
    for name, line in itertools.zip_longest(SCRIPTS, ended.stderr.splitlines()):
        assert re.fullmatch(rf"error: .*required.*tools/{name}.py --help", line)

def test_a_reader_that_has_seen_enough():
    """A closed pipe is no error, whether there is much to print or little; a full disk is one."""
    names = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for arch in ("resnet164", "resnet20"):
        process = subprocess.Popen(
            [sys.executable, HERE / "describe.py", arch], text=True, env=names,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=120) == 141

@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("line", [
    "tools/describe.py resnet20",
    "tas.py search --data synthetic --arch resnet20 --method random --out {tmp}/run"])
def test_output_that_finds_no_room(tmp_path, line):
    """One line of error, of which Python's own last attempt makes no more."""
    names = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, *line.format(tmp=tmp_path).split()], text=True,
                               cwd=HERE.parent, env=names, stdout=full, stderr=subprocess.PIPE,
                               timeout=120)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1

@pytest.mark.parametrize("error, status", [
    (tas.TASError("a\nb"), 2), (PermissionError(13, "Permission denied", "x"), 2),
    (KeyboardInterrupt(), 130)])
def test_errors_become_one_line(capsys, error, status):
    def function(args):
        raise error

    assert command.run(tas.Parser(), function, []) == status
    one_line(capsys)

# ---- describe -----------------------------------------------------------------------------------

def slow_layers(shape):
    """(width, MACs) of the convs of a ResNet-20, (0, 0) of dropped ones, then of the projections,
    then of the classifier."""
    convs, projections = [(shape.stem, 27 * shape.stem * shape.image_size ** 2)], []
    c, size = shape.stem, shape.image_size
    for s, blocks in enumerate(shape.stages):
        for b in range(3):
            if b >= len(blocks):
                convs += [(0, 0)] * 2
                continue
            size = -(-size // 2) if s and not b else size
            first, second = blocks[b]
            convs += [(first, 9 * c * first * size ** 2), (second, 9 * first * second * size ** 2)]
            if c != second or s and not b:
                projections.append((second, c * second * size ** 2))
            c = second
    return convs, projections, (shape.num_classes, c * shape.num_classes)

@pytest.mark.parametrize("what", ["resnet20", "file", "bottlenecks", "directory", "resnet50"])
def test_describe_accounts_for_all_macs(world, tmp_path, capsys, what):
    shape = None
    if what == "file":
        what = tmp_path / "some.json"
        shape = tas.Shape("resnet20", 7, 9, 5, [[[4, 6]], [[20, 9], [32, 9]], [[1, 64]] * 3])
        shape.save(what)
    elif what == "bottlenecks":  # of which the first needs no projection
        what = tmp_path / "some.json"
        shape = tas.Shape("resnet164", 7, 9, 16, [[[4, 6, 16]], [[9, 9, 9]] * 2, [[9, 9, 20]]])
        shape.save(what)
    elif what == "directory":
        what = world / "runs" / "search"
        shape = tas.Shape.load(what)
    else:
        shape = tas.Shape.unpruned(what, 1000 if what == "resnet50" else 10)
    assert describe.main([str(what)]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^(\S+) +(\d+) +(\d+) +([\d,]+) +([\d.]+)%  (#+|dropped)$", out, re.M)
    assert len(rows) == out.count("\n") - 2  # but for the heads and the summary
    found = [(row[0], int(row[1]), int(row[3].replace(",", ""))) for row in rows]
    kept = [name for name, module in tas.ResNet(shape).named_modules()
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    assert sorted(name for name, width, _ in found if width) == sorted(kept)
    dropped = [name for name, width, _ in found if not width]
    assert len(dropped) == len(shape.full.convs) - len(shape.convs)
    assert all(".conv" in name for name in dropped)
    total = sum(macs for *_, macs in found)
    assert total == tas.count_macs(shape)
    assert out.endswith(f"{tas.summary(shape)}\n")
    for row, (_, _, macs) in zip(rows, found):
        assert float(row[4]) == pytest.approx(100 * macs / total, abs=0.051)
        assert (row[5] == "dropped") == (row[1] == "0") and len(row[5]) <= 24
    if shape.arch == "resnet20":
        convs, projections, classifier = slow_layers(shape)
        assert [row[1:] for row in found if ".conv" in row[0] or row[0] == "conv1"] == convs
        assert [row[1:] for row in found if "downsample" in row[0]] == projections
        assert found[-1] == ("fc", *classifier)
    unpruned = [int(row[2]) for row in rows if "downsample" not in row[0]]
    assert unpruned == [*shape.full.convs, shape.num_classes]

def test_describe_of_nothing(tmp_path, capsys):
    check_refused(capsys, describe, "resnet21", words=["resnet21", "resnet110"])
    check_refused(capsys, describe, tmp_path, words=[tmp_path])

# ---- predict ------------------------------------------------------------------------------------

def slow_input(path, size):
    """An image file as a network takes it: the shorter side resized, the middle cut out."""
    image = Image.open(path).convert("RGB")
    w, h = image.size
    image = image.resize((w * size // min(w, h), h * size // min(w, h)), Image.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    x = torch.tensor(pixels.copy()).permute(2, 0, 1)[None] / 255  # [1, 3, size, size]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean[:, None, None]) / std[:, None, None]

def predictions(out):
    """[(file, {class: probability in %})], classes in the printed order."""
    found = []
    for line in out.splitlines():
        file, text = line.rsplit(": ", 1)
        pairs = [part.rsplit(" ", 1) for part in text.split(", ")]
        found.append((file, {name: float(p.removesuffix("%")) for name, p in pairs}))
    return found

def test_predict_finds_the_accuracy_of_the_run(world, capsys):
    files = sorted((world / "insects" / "val").rglob("*.png"))
    assert predict.main([str(world / "runs" / "pruned"), *map(str, files)]) == 0
    found, right = predictions(capsys.readouterr().out), 0
    assert [file for file, _ in found] == [str(file) for file in files]
    for file, probabilities in found:
        assert sorted(probabilities) == ["ant", "bee"]
        right += next(iter(probabilities)) == Path(file).parent.name
    accuracy = tas.read_json(world / "runs" / "pruned" / "run.json")["result"]["accuracy"]
    assert 100 * right / len(files) == accuracy

@pytest.mark.parametrize("width, height", [(8, 8), (40, 30), (30, 44), (224, 224), (9, 100)])
def test_predict_resizes_as_at_training(pruned, tmp_path, capsys, width, height):
    rng = np.random.default_rng(1)
    blocks = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    path, squashed = tmp_path / "photograph.png", tmp_path / "squashed.png"
    blocks.resize((width, height), Image.NEAREST).save(path)
    Image.open(path).resize((SIZE, SIZE)).save(squashed)
    assert predict.main([str(pruned), str(path), str(squashed)]) == 0
    (_, found), (_, other) = predictions(capsys.readouterr().out)
    with torch.no_grad():
        expected = 100 * tas.load(pruned)(slow_input(path, SIZE))[0].softmax(0)
    assert [found["ant"], found["bee"]] == pytest.approx(expected.tolist(), abs=0.06)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    if width != height:  # else the test could not fail
        assert abs(found["ant"] - other["ant"]) > 0.5

def test_predict_goes_on_after_a_damaged_file(world, pruned, tmp_path, capsys):
    good = world / "insects" / "val" / "ant" / "0.png"
    bad = tmp_path / "bad\x1b[31m\n.png"
    bad.write_bytes(good.read_bytes()[:60])
    assert predict.main([str(pruned), str(bad), str(good), str(tmp_path / "none.png")]) == 2
    captured = capsys.readouterr()
    assert [file for file, _ in predictions(captured.out)] == [str(good)]
    errors = captured.err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)
    assert r"bad\x1b[31m\n.png" in errors[0] and "none.png" in errors[1]

def test_predict_without_names_of_classes(world, pruned, capsys):
    change(pruned, classes=None)
    good = str(world / "insects" / "val" / "ant" / "0.png")
    assert predict.main([str(pruned), good, "--top", "1"]) == 0
    (_, found), = predictions(capsys.readouterr().out)
    assert len(found) == 1 and next(iter(found)) in ("class 0", "class 1")
    shutil.copy(world / "runs" / "pruned" / "run.json", pruned)
    change(pruned, classes=["one"], weights=None)
    check_refused(capsys, predict, pruned, good, words=[pruned, "2 classes"])
    check_refused(capsys, predict, world / "runs" / "search", good, words=["weights.pt"])

def test_weights_from_elsewhere_predict_and_are_exported(world, tmp_path, capsys):
    """A directory of tools/weights.py has no run.json."""
    state = tas.load(world / "runs/teacher").state_dict()
    torch.save(state, tmp_path / "w.pth")
    line = f"{tmp_path}/w.pth --arch resnet20 --image-size {SIZE} --out {tmp_path}/made"
    assert weights.main(line.split()) == 0
    capsys.readouterr()
    assert predict.main([f"{tmp_path}/made", f"{world}/insects/val/ant/0.png"]) == 0
    (_, found), = predictions(capsys.readouterr().out)
    assert found.keys() == {"class 0", "class 1"}
    assert export.main([f"{tmp_path}/made"]) == 0
    extra = {"metadata.json": ""}
    torch.export.load(tmp_path / "made/network.pt2", extra_files=extra)
    assert "classes" not in json.loads(extra["metadata.json"])
    (tmp_path / "made/run.json").write_text('{"result": [1]}')
    for tool, words in ((predict, ["x.png"]), (export, [])):
        check_refused(capsys, tool, f"{tmp_path}/made", *words, words=["run.json"])

# ---- export -------------------------------------------------------------------------------------

def test_export_gives_the_network(pruned, capsys):
    assert export.main([str(pruned)]) == 0
    out = capsys.readouterr().out
    extra = {"metadata.json": ""}
    program = torch.export.load(pruned / "network.pt2", extra_files=extra).module()
    net = tas.load(pruned)
    for n in (1, 2, 5):
        x = torch.randn(n, 3, SIZE, SIZE)
        torch.testing.assert_close(program(x), net(x))
    told = json.loads(extra["metadata.json"])
    assert json.loads(told["classes"]) == ["ant", "bee"] and told["image_size"] == str(SIZE)
    assert told["macs"] == str(tas.count_macs(net.shape)) and told["arch"] == "resnet20"
    assert json.loads(told["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(told["std"]) == [0.229, 0.224, 0.225]
    size = (pruned / "network.pt2").stat().st_size
    assert f"network.pt2: {size / 1e6:.2f} MB" in out
    unpruned = float(re.search(r"unpruned: ([\d.]+) MB", out)[1])
    assert unpruned > size / 1e6  # as it has twice the weights

def test_export_of_other_outputs_is_refused(pruned, capsys, monkeypatch):
    plain = export.to_program

    def spoil(net):
        other = tas.ResNet(net.shape).eval()
        other.load_state_dict(net.state_dict())
        other.state_dict()["fc.weight"].mul_(1.001)
        return plain(other)

    monkeypatch.setattr(export, "to_program", spoil)
    check_refused(capsys, export, pruned, words=["other outputs"])
    assert not (pruned / "network.pt2").exists()

def test_onnx_without_its_packages(pruned, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    check_refused(capsys, export, pruned, "--onnx", words=["pip install onnx onnxscript"])
    assert not list(pruned.glob("network.*"))

def test_onnx_gives_the_network(pruned, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator
    assert export.main([str(pruned), "--onnx"]) == 0
    model, net = onnx.load(pruned / "network.onnx"), tas.load(pruned)
    onnx.checker.check_model(model)
    found = {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
             for value in (*model.graph.input, *model.graph.output)}
    assert found == {"images": ["batch", 3, SIZE, SIZE], "logits": ["batch", 2]}
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(told["classes"]) == ["ant", "bee"] and told["image_size"] == str(SIZE)
    assert json.loads(told["mean"]) == list(tas.MEAN) and json.loads(told["std"]) == list(tas.STD)
    assert told["macs"] == str(tas.count_macs(net.shape))
    for n in (1, 4):
        x = torch.randn(n, 3, SIZE, SIZE)
        logits, = ReferenceEvaluator(model).run(["logits"], {"images": x.numpy()})
        torch.testing.assert_close(torch.tensor(logits), net(x).detach(), rtol=1e-3, atol=1e-4)

def test_onnx_of_other_outputs_is_refused(pruned, capsys, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(export, "onnx_function", lambda content: lambda x: torch.zeros(len(x), 2))
    check_refused(capsys, export, pruned, "--onnx", words=["ONNX", "other outputs"])
    assert not list(pruned.glob("network.*"))

# ---- bench --------------------------------------------------------------------------------------

@SETTINGS
@given(st.lists(st.lists(st.integers(1, 10 ** 6), min_size=6, max_size=6), min_size=1, max_size=9))
def test_medians_of_functions_that_take_turns(monkeypatch, milliseconds):
    """milliseconds[round]: of the first function the untimed call and the timed one, and so on."""
    clock, calls = [0.0], []

    def make(i):
        def function():
            clock[0] += milliseconds[len(calls) // 6][len(calls) % 6] / 1e3
            calls.append(i)
        return function

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    found = timing.medians({i: make(i) for i in range(3)}, len(milliseconds), torch.device("cpu"))
    assert calls == [0, 0, 1, 1, 2, 2] * len(milliseconds)
    for i in range(3):
        expected = statistics.median([row[2 * i + 1] for row in milliseconds])
        assert found[i] == (pytest.approx(expected), None)

def test_bench(world, tmp_path, capsys):
    shape = world / "runs" / "search"
    line = (f"resnet20 --batch-size 2 --image-size 8 --rounds 1 --precision fp32 bf16 "
            f"--shape {shape} --json {tmp_path}/bench.json")
    assert bench.main(line.split()) == 0
    out, found = capsys.readouterr().out, json.loads((tmp_path / "bench.json").read_text())
    assert found["batch_size"] == 2 and found["torch"] == torch.__version__ and found["machine"]
    times = {(row["case"], row["precision"]): row["ms"] for row in found["rows"]}
    cases = ["training", "batching, augmentation", "search round, 2 candidates",
             "search round, 8 candidates"]
    for name, n in itertools.product(("unpruned", shape), (1, 2)):
        cases.append(f"inference, {name}, batch {n}")
    assert set(times) == set(itertools.product(cases, ("fp32", "bf16")))
    for row in found["rows"]:
        case, precision = row["case"], row["precision"]
        n = case[-1]
        base = f"inference, unpruned, batch {n}" if case.startswith("inference") else "training"
        assert row["to"] == base
        assert row["ratio"] == pytest.approx(row["ms"] / times[base, precision]) and row["ms"] > 0
        assert row["how"] == "eager" and row["memory_mb"] is None
        assert re.search(rf"^{precision} eager +{re.escape(case)} +{row['ms']:.2f} ms +"
                         rf"{row['ratio']:.3f} x {base}$", out, re.M)
    left = tas.Shape.load(shape)
    ratio = tas.count_macs(left) / tas.count_macs(tas.Shape.unpruned("resnet20", 10, SIZE))
    assert found["macs_ratio"] == {"unpruned": 1.0, str(shape): pytest.approx(ratio)}

def test_bench_times_what_it_says(monkeypatch, capsys):
    """A round trains the weights, then the sizes, each under a sample of so many candidates; a
    forward pass is of a network in eval mode."""
    seen, cases = [], {}

    def look(args, net, optimizer, loss_function, *inputs):
        before = [p.detach().clone() for p in net.parameters()]
        step(args, net, optimizer, loss_function, *inputs)
        moved = {name for (name, p), old in zip(net.named_parameters(), before)
                 if not torch.equal(p, old)}
        assert moved and len(inputs[-1]) == 4
        seen.append((moved <= {"alpha", "beta"}, bool(moved & {"alpha", "beta"})))

    def draw(*arguments):
        sample = sample_sizes(*arguments)
        drawn.append(sample.index.shape[1])
        return sample

    def keep(functions, *_):
        cases.update(functions)
        return {name: (1.0, 2e3) for name in functions}

    step, sample_sizes, drawn = tas.take_step, tas.sample_sizes, []
    monkeypatch.setattr(tas, "take_step", look)
    monkeypatch.setattr(tas, "sample_sizes", draw)
    monkeypatch.setattr(bench, "medians", keep)
    monkeypatch.setattr(graphs.FastStep, "can_capture", lambda step, _: step.captures)
    line = "resnet20 --batch-size 4 --image-size 8 --precision fp32 --how eager compiled graphs"
    assert bench.main(line.split()) == 0
    hows = collections.Counter(how for name, _, how in cases if "inference" not in name)
    assert hows == {"eager": 4, "compiled": 3, "graphs": 3} and len(cases) == 10 + 4
    assert capsys.readouterr().out.count("2000 MB") == len(cases) - hows["graphs"]
    losses = [tas.training_loss] + 2 * [tas.search_loss, tas.architecture_loss]
    for how, expected in (("eager", ([], [])), ("compiled", (losses, [])),
                          ("graphs", ([], losses))):
        compiled, captured = [], []
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", lambda f, **_: compiled.append(f) or f)
            patch.setattr(graphs, "capture",
                          lambda step, *_: captured.append(step.args[3]) or step)
            for name in ("training", "search round, 2 candidates", "search round, 8 candidates"):
                for _ in range(2):  # of which the second is as the first
                    cases[name, "fp32", how]()
        assert (compiled, captured) == expected
    assert capsys.readouterr().err == ""
    seen.clear(), drawn.clear()
    cases["training", "fp32", "eager"]()
    assert seen == [(False, False)] and drawn == []
    for k in (2, 8):
        seen.clear(), drawn.clear()
        cases[f"search round, {k} candidates", "fp32", "eager"]()
        assert seen == [(False, False), (True, True)] and drawn == [k, k]
    seen.clear()
    for name in ("unpruned", "uniform"):
        one = cases[f"inference, {name}, batch 1", "fp32", "eager"]()
        all_four = cases[f"inference, {name}, batch 4", "fp32", "eager"]()
        assert all_four.shape == (4, 10) and not all_four.requires_grad
        torch.testing.assert_close(one, all_four[:1])  # in eval mode
    x, y = cases["batching, augmentation", "fp32", "eager"]()
    assert x.shape == (4, 3, SIZE, SIZE) and len(y) == 4 and seen == []

def test_bench_of_what_it_cannot(world, capsys):
    shape = world / "runs" / "search"
    check_refused(capsys, bench, "resnet21", words=["resnet21"])
    check_refused(capsys, bench, "resnet20", "--shape", shape, words=[shape, "--image-size 8"])
    check_refused(capsys, bench, "resnet20", "--shape", world, words=[world])
    check_refused(capsys, bench, "resnet20", "--device", "nix", words=["nix"])
    check_refused(capsys, bench, *"resnet20 --device cpu --how eager graphs".split(), words=["GPU"])

# ---- report -------------------------------------------------------------------------------------

def tables(text):
    """The Markdown tables of a text, each a list of rows, column -> what a reader sees."""
    found, lines = [], text.splitlines()
    for i, line in enumerate(lines):
        if re.fullmatch(r"\|( --- \|)+", line):
            found.append([])
        elif line.startswith("|") and found and lines[i - 1].startswith("|"):
            head, cells = lines[i - 1 - len(found[-1]) - 1], re.split(r" (?<!\\)\| ", line[2:-2])
            head = head[2:-2].split(" | ")
            assert len(cells) == len(head), line
            found[-1].append(dict(zip(head, map(unescape, cells))))
    return found

def make_report(*directories):
    """The exit status, and the tables of report.md in the last directory."""
    status = report.main([*map(str, directories), "--out", str(directories[-1])])
    return status, tables((directories[-1] / "report.md").read_text())

def cells(table, method):
    """The rows of sizes that were found by a method."""
    return [row for row in table if row["size found by"] == method]

def spread(values, digits=2):
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

def test_report_over_seeds(world, tmp_path, capsys):
    values = {0: (91.25, 93.5, 60.0), 1: (90.5, 93.75, 75.0), 5: (88.0, 93.0, 61.5)}
    shapes, full = [], tas.Shape.unpruned("resnet20", 2, SIZE)
    for seed, (accuracy, above, seconds) in values.items():
        shapes.append(dataclasses.replace(full, stem=9 + seed))  # each seed found another one
        base = shutil.copytree(world / "runs", tmp_path / str(seed))
        change(base / "teacher", seed=seed, accuracy=above)
        change(base / "pruned", seed=seed, accuracy=accuracy, teacher_accuracy=above,
               seconds=seconds, teacher=seed, shape=dataclasses.asdict(shapes[-1]),
               macs=tas.count_macs(shapes[-1]), params=tas.count_params(shapes[-1]))
    status, (table,) = make_report(*[tmp_path / str(seed) for seed in values], tmp_path / "0")
    assert status == 0
    assert (tmp_path / "0" / "report.md").read_text() in capsys.readouterr().out
    found, unpruned = cells(table, "tas"), cells(table, "unpruned")
    assert len(found) == len(unpruned) == 1 and len(table) == 2
    accuracies, above, seconds = zip(*values.values())
    macs, full = [tas.count_macs(shape) for shape in shapes], tas.count_macs(full)
    assert found[0] == {
        "arch": "resnet20", "data": "insects", "size found by": "tas", "transfer": "kd",
        "target": f"{round(full / 2) / 1e6:.2f}M MACs", "reached": "-",
        "MACs M": spread([m / 1e6 for m in macs]),
        "removed %": spread([100 - 100 * m / full for m in macs], 1),
        "params M": spread([tas.count_params(shape) / 1e6 for shape in shapes], 3),
        "teacher %": spread(above),
        "accuracy %": spread(accuracies),
        "drop": spread([a - b for a, b in zip(above, accuracies)]), "seeds": "0 1 5",
        "epochs": "2 + 2", "precision": "fp32", "other settings": "batch-size 6",
        "training minutes": spread([s / 60 for s in seconds], 1), "paper (as transcribed)": "-",
        "runs": "0/pruned, 1/pruned, 5/pruned"}
    assert unpruned[0]["accuracy %"] == spread(above) and unpruned[0]["epochs"] == "2"
    for column in ("target", "reached", "teacher %", "drop"):
        assert unpruned[0][column] == "-"
    image = Image.open(tmp_path / "0" / "report.png")
    assert image.format == "PNG" and image.width >= 1200 and image.height >= 800
    colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 20

def test_networks_under_another_cost_are_told_apart(world, tmp_path, capsys, monkeypatch):
    """A search to 8 ms that found 7.9, and what was trained of its shape, in a report and in
    `describe`; the same sizes under MACs are another method."""
    base = shutil.copytree(world / "runs", tmp_path / "timed")
    for part in ("search", "pruned"):
        info = tas.read_json(base / part / "run.json")
        (info["settings"] if part == "search" else info["result"]["search"]).update(
            target=8.0, unit="ms")
        info["result"]["cost"] = 7.9
        (base / part / "run.json").write_text(json.dumps(info))
    status, (table,) = make_report(world / "runs", base, tmp_path)
    (timed,), (plain,) = cells(table, "tas, in ms"), cells(table, "tas")
    assert status == 0 and (timed["target"], timed["reached"]) == ("8 ms", "7.90")
    assert plain["target"].endswith("M MACs") and plain["reached"] == "-"
    capsys.readouterr()
    for part in ("search", "pruned"):
        assert describe.main([str(base / part)]) == 0
        assert capsys.readouterr().out.endswith("M parameters, 7.9 ms\n")
    search, part = finished.read_run(base / "search"), Figure()
    trajectory.draw_search(part, search)
    assert part.axes[0].get_ylabel() == "ms (% of target)"
    found = curves(part.axes[0])["most probable"][1]
    assert found == pytest.approx([100 / 8 * line["argmax_macs"] for line in search.lines])
    trajectory.draw_sizes(part, search)
    assert "98.8% of the target in ms" in part.get_suptitle()
    monkeypatch.chdir(base / "search")  # an arch is no run
    for odd in ({}, {"search": "x"}, {"cost": "7"}):  # a training without a unit, damaged ones
        info["result"] |= {"search": {"command": "train"}, **odd}
        (base / "pruned/run.json").write_text(json.dumps(info))
        for network in ("resnet20", base / "pruned"):
            assert describe.main([str(network)]) == 0
            assert capsys.readouterr().out.endswith("M parameters\n")
    info["result"] |= {"search": tas.read_json("run.json")["settings"], "cost": None}  # an old one
    (base / "pruned/run.json").write_text(json.dumps(info))
    assert cells(make_report(base)[1][0], "tas, in ms")[0]["reached"] == "not recorded"

def test_report_of_one_run_counts_it_once(world, tmp_path):
    """Below directories that overlap, under two names; without a spread."""
    base = shutil.copytree(world / "runs", tmp_path / "runs")
    status, (table,) = make_report(base / "pruned", base, base / "search" / "..", tmp_path)
    accuracy = tas.read_json(base / "pruned" / "run.json")["result"]["accuracy"]
    row, = cells(table, "tas")
    assert status == 0 and row["accuracy %"] == f"{accuracy:.2f}" and row["seeds"] == "0"

def test_report_keeps_other_settings_apart(world, tmp_path):
    """Only runs that differ in nothing but the seed are averaged."""
    changes = [{}, {"lr": 0.2}, {"weight_decay": 0.0}, {"batch_size": 3}, {"seed": 7},
               {"new_setting": 1}, {"epochs": 3}, {"used": "bf16"}]
    for i, entries in enumerate(changes):
        directory = shutil.copytree(world / "runs" / "pruned", tmp_path / str(i))
        info = tas.read_json(directory / "run.json")
        info["precision"] = entries.pop("used", "fp32")
        info["settings"] |= entries
        (directory / "run.json").write_text(json.dumps(info))
    status, (table,) = make_report(tmp_path)
    assert status == 0 and sorted(row["seeds"] for row in table) == ["0"] * 6 + ["0 7"]
    other = {row["runs"]: row["other settings"] for row in table}
    assert other["1"] == "lr 0.2, batch-size 6" and other["3"] == "batch-size 3"
    assert other["5"] == "batch-size 6, new-setting 1, weight-decay 0.0005"
    assert other["7"] == "batch-size 6, precision bf16"
    assert len(set(other.values())) == 7

def test_report_tells_rows_apart_that_look_alike(world, tmp_path):
    """By the settings in which they differ, which may have no default to differ from."""
    rates = {"a": 0.05, "b": 0.02, "c": 0.05}
    for seed, (name, rate) in enumerate(rates.items()):
        directory = shutil.copytree(world / "runs" / "pruned", tmp_path / name)
        search = tas.read_json(directory / "run.json")["result"]["search"]
        change(directory, seed=seed, search=search | {"arch_lr": rate, "target": 1e6 * (1 + seed)})
    _, (table,) = make_report(tmp_path)
    assert {row["runs"]: row["other settings"] for row in table} == {
        name: f"batch-size 6, search arch-lr {rate}" for name, rate in rates.items()}
    _, (table,) = make_report(tmp_path / "a", tmp_path / "c", tmp_path)
    assert {row["other settings"] for row in table} == {"batch-size 6, search arch-lr 0.02",
                                                        "batch-size 6, search arch-lr 0.05"}

def test_searches_that_started_from_teachers_of_their_own_share_a_row(world, tmp_path):
    for seed in (0, 1):
        directory = shutil.copytree(world / "runs" / "pruned", tmp_path / str(seed))
        search = tas.read_json(directory / "run.json")["result"]["search"]
        change(directory, seed=seed, teacher=7 + seed, search=search | {"warm": 7 + seed})
    _, (table,) = make_report(tmp_path)
    assert [(row["seeds"], row["size found by"]) for row in table] == [("0 1", "warm tas")]

def test_report_keeps_two_teachers_of_one_seed_apart(world, tmp_path):
    """Their difference is no spread over seeds; a teacher for each seed shares a row."""
    for name, seed, teacher in (("a", 0, 7), ("b", 1, 8), ("c", 0, 9)):
        directory = shutil.copytree(world / "runs" / "pruned", tmp_path / name)
        change(directory, seed=seed, teacher=teacher)
    _, (table,) = make_report(tmp_path)
    assert sorted((row["seeds"], row["other settings"]) for row in table) == [
        ("0", "batch-size 6, teacher 7"), ("0", "batch-size 6, teacher 9"),
        ("1", "batch-size 6, teacher 8")]
    shutil.rmtree(tmp_path / "c")
    _, (table,) = make_report(tmp_path)
    assert [(row["seeds"], row["other settings"]) for row in table] == [("0 1", "batch-size 6")]

def test_seeds_in_precisions_of_their_own_share_a_row(world, tmp_path):
    """Which shows them; of one seed in two precisions, of training or search, the rows are two."""
    for seed, used in enumerate(("fp32", "bf16", "fp32")):
        directory = shutil.copytree(world / "runs" / "pruned", tmp_path / str(seed))
        info = tas.read_json(directory / "run.json")
        info["precision"] = info["settings"]["precision"] = used
        info["settings"]["seed"] = seed
        info["result"]["search"]["precision"] = used
        (directory / "run.json").write_text(json.dumps(info))
    _, (table,) = make_report(tmp_path)
    assert [(row["seeds"], row["precision"]) for row in table] == [("0 1 2", "bf16, fp32")]
    both = shutil.copytree(tmp_path / "0", tmp_path / "3")
    info["precision"], info["settings"]["seed"] = "bf16", 0
    (both / "run.json").write_text(json.dumps(info))
    _, (table,) = make_report(tmp_path)
    assert sorted((row["seeds"], row["precision"], row["other settings"]) for row in table) == [
        ("0 1", "bf16", "batch-size 6, precision bf16"),
        ("0 2", "fp32", "batch-size 6, precision fp32")]
    shutil.rmtree(both)
    info = tas.read_json(tmp_path / "2" / "run.json")
    info["settings"]["seed"], info["result"]["search"]["precision"] = 0, "bf16"
    (tmp_path / "2" / "run.json").write_text(json.dumps(info))
    _, (table,) = make_report(tmp_path)
    assert sorted((row["seeds"], row["precision"]) for row in table) == [
        ("0", "bf16 + fp32"), ("0", "fp32"), ("1", "bf16")]

def test_rows_are_in_the_order_of_their_targets(world, tmp_path):
    for name, target in (("a", 9e5), ("b", 1e6), ("c", 2e5)):
        directory = shutil.copytree(world / "runs" / "pruned", tmp_path / name)
        search = tas.read_json(directory / "run.json")["result"]["search"]
        change(directory, search=search | {"target": target})
    _, (table,) = make_report(tmp_path)
    assert [row["runs"] for row in table] == ["c", "a", "b"]

def test_report_keeps_given_shapes_apart(world, tmp_path):
    """Without a search, networks of other shapes are other networks."""
    full = tas.Shape.unpruned("resnet20", 2, SIZE)
    for seed, stem in enumerate((9, 10, 9)):
        directory = shutil.copytree(world / "runs" / "pruned", tmp_path / str(seed))
        shape = dataclasses.replace(full, stem=stem)
        change(directory, seed=seed, search=None, shape=dataclasses.asdict(shape),
               macs=tas.count_macs(shape))
    status, (table,) = make_report(tmp_path)
    assert status == 0 and sorted(row["seeds"] for row in table) == ["0 2", "1"]
    assert len(cells(table, "given shape")) == 2

def test_report_names_what_is_unusual_in_a_search(world, tmp_path):
    search = tas.read_json(world / "runs" / "search" / "run.json")["settings"]
    for name, entries in (("a", {"num_samples": 8, "align": "pad"}), ("b", {"method": "random"}),
                          ("c", {"command": "train"})):
        directory = shutil.copytree(world / "runs" / "pruned", tmp_path / name)
        change(directory, search=search | entries)
    change(tmp_path / "c", command="python tas.py train --shape some/dir --teacher x")
    path = tmp_path / "c" / "run.json"
    info = tas.read_json(path)
    info |= {"command": "python tas.py train --shape some/size.json --data-dir=x/y z --seed 0"}
    info["settings"]["command"] = "train"
    path.write_text(json.dumps(info))
    _, (table,) = make_report(tmp_path)
    found = {row["runs"]: (row["size found by"], row["epochs"], row["data"]) for row in table}
    assert found == {"a": ("tas, num-samples 8, align pad", "2 + 2", "insects"),
                     "b": ("random", "2", "insects"), "c": ("given size", "2", "y z")}

def test_report_of_runs_of_other_versions(world, tmp_path):
    base = shutil.copytree(world / "runs", tmp_path / "runs")
    change(base / "pruned", precision=None, teacher_accuracy=None, machine=None, classes=None)
    path = base / "pruned" / "run.json"
    info = tas.read_json(path)
    info.pop("precision", None), info["settings"].pop("precision", None), info.pop("command")
    path.write_text(json.dumps(info))
    (base / "pruned" / "metrics.jsonl").unlink()
    status, (table,) = make_report(base)
    row, = cells(table, "tas")
    assert status == 0
    for column in ("precision", "teacher %", "drop", "data"):
        assert row[column] == "not recorded"
    assert "not recorded" in (base / "report.md").read_text().split("Machine: ")[1]

def test_the_paper_stands_beside_networks_of_its_size():
    """Within a tenth of ours; one whose MACs are unknown, by its method alone."""
    def look(macs, size, method="tas", arch="resnet18"):
        ours = SimpleNamespace(method=method, transfer="kd", arch=arch, data="imagenet", macs=macs)
        other = {"size found by": "TAS", "transfer": "kd", "arch": "resnet18", "data": "imagenet",
                 "MACs": size, "accuracy %": "69.15"}
        return report.beside([ours], [other])

    assert look(1.2e9, "1.21G") == look(1.11e9, "1.21G") == "69.15 at 1.21G"
    assert look(1.3e6, "1.21M") == "69.15 at 1.21M" and look(5e8, "") == "69.15"
    for wrong in (look(1.09e9, "1.21G"), look(1.36e9, "1.21G"), look(1.2e9, "1.21M"),
                  look(1.2e9, "1.21G", method="random"), look(5e8, "", arch="resnet50")):
        assert wrong == "-"

def test_report_reads_the_committed_runs(tmp_path, capsys):
    """All of them, and each accuracy is in the mean of its row."""
    results = HERE.parent / "results"
    trained = {}
    for path in results.rglob("run.json"):
        info = tas.read_json(path)
        if info.get("result") and info["settings"]["command"] == "train":
            trained[str(path.parent.relative_to(results))] = info["result"]["accuracy"]
    assert len(trained) > 20 and report.main([str(results), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""
    ours, paper = tables((tmp_path / "report.md").read_text())
    for row in ours:
        values = [trained.pop(name) for name in row["runs"].split(", ")]
        assert row["accuracy %"].split(" ± ")[0] == f"{statistics.mean(values):.2f}"
        halves = "half-" in row["runs"]  # trained on one half, tested on the other
        assert row["data"] == ("cifar10-half" if halves else "cifar10")
        # The paper's ResNet-20 has 22.4M MACs: beside those of 0.55, not beside smaller ones.
        near = 22.4 / 1.1 < float(row["MACs M"].split()[0]) < 22.4 / 0.9
        expected = {("resnet20", "tas", "kd", True): "92.88 at 22.4M",
                    ("resnet20", "unpruned", "none", False): "92.88 at 40.8M",
                    ("resnet56", "unpruned", "none", False): "94.46 at 125.8M"}
        found = row["arch"], row["size found by"], row["transfer"], near
        assert row["paper (as transcribed)"] == expected.get(found, "-")
    assert not trained
    of = {}
    for row in paper:
        of.setdefault(row["arch"], set()).add(row["size found by"])
    assert of == {"resnet20": {"unpruned", "TAS", "TAS, depth only", "TAS, width only"},
                  "resnet56": {"unpruned", "TAS", "AMC", "FPGM", "SFP"}}
    assert "Transcribed" in (tmp_path / "report.md").read_text()

def test_transcribed_numbers_agree_with_one_another():
    """Drops and removed shares follow from the other numbers, up to their rounding."""
    scale = {"M": 1e6, "G": 1e9}
    classes = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
    checked = 0
    for table in report.PAPER["tables"]:
        rows = [dict(zip(report.PAPER["columns"], cells)) for cells in table["rows"]]
        assert all(len(cells) == len(report.PAPER["columns"]) for cells in table["rows"])
        assert f"{classes[table['data']]} classes" in table["images"]
        unpruned = {row["arch"]: float(row["accuracy %"]) for row in rows
                    if row["size found by"] == "unpruned"}
        for row in rows:
            macs = row["MACs"] and float(row["MACs"][:-1]) * scale[row["MACs"][-1]]
            full = tas.Shape.unpruned(row["arch"], classes[table["data"]])
            if row["size found by"] == "unpruned" and macs:
                assert macs == pytest.approx(tas.count_macs(full), rel=1e-3)
            if row["drop"]:
                drop = unpruned[row["arch"]] - float(row["accuracy %"])
                assert float(row["drop"]) == pytest.approx(drop, abs=0.001)
                removed = 100 - 100 * macs / tas.count_macs(full)
                assert float(row["removed %"]) == pytest.approx(removed, abs=0.2)
                checked += 1
    assert checked == 12

@pytest.mark.parametrize("name, content", [
    ("run.json", b"{"), ("run.json", b'{"result": {"a": 1}}'), ("run.json", b"\xff"),
    ("metrics.jsonl", b'{"epoch": 1'), ("metrics.jsonl", b"[]\n"),
    ("metrics.jsonl", b'{"epoch": 1}\n'), ("metrics.jsonl", b"\xff\n"),
    ("shape.json", b"{}"), ("another shape", None), ("machine", []), ("tolerance", "x"),
    ("tolerance", None), ("seed", None), ("seed", "a"), ("macs", 1), ("seconds", 1e400),
    ("seconds", math.nan), ("params", True),
    ("target", [1]), ("settings", None), ("settings", [])])
def test_one_damaged_run_is_named_and_left_out(world, tmp_path, capsys, name, content):
    base = shutil.copytree(world / "runs", tmp_path / "a\nb")
    search = base / "search"
    if name == "another shape":
        tas.Shape.unpruned("resnet20", 2, SIZE).save(search / "shape.json")
    elif "." in name:
        (search / name).write_bytes(content)
    else:
        info = tas.read_json(search / "run.json")
        for part in (info, info["settings"], info["result"]):
            if name in part:
                part[name] = content
                if content is None:
                    del part[name]
                break
        (search / "run.json").write_text(json.dumps(info))
    capsys.readouterr()
    status, (table,) = make_report(base)
    assert status == 0 and len(table) == 2
    if name == "machine":  # is shown, whatever it is
        assert capsys.readouterr().err == ""
        return
    assert one_line(capsys).startswith(f"warning: left out {tmp_path}/a\\nb/search: ")
    assert Image.open(base / "report.png").height < 700  # without the search's panels

def test_an_accuracy_of_another_log_is_left_out(world, tmp_path, capsys):
    base = shutil.copytree(world / "runs", tmp_path / "runs")
    shutil.copy(base / "teacher" / "metrics.jsonl", tmp_path)
    change(base / "teacher", accuracy=99.0)
    shutil.copy(tmp_path / "metrics.jsonl", base / "teacher")
    status, (table,) = make_report(base)
    assert status == 0 and [row["size found by"] for row in table] == ["tas"]
    assert f"{base}/teacher" in one_line(capsys)

def test_report_of_nothing(world, tmp_path, capsys):
    check_refused(capsys, report, tmp_path / "none", words=[tmp_path / "none"])
    check_refused(capsys, report, tmp_path, words=[tmp_path, "no finished run"])
    check_refused(capsys, report, "", words=["dirs", "empty"])
    check_refused(capsys, report, tmp_path, "--out", "", words=["out", "empty"])
    base = shutil.copytree(world / "runs" / "teacher", tmp_path / "half")
    change(base, result=None)
    check_refused(capsys, report, tmp_path, words=["no finished run"])

RUN_FILES = "run.json", "metrics.jsonl", "shape.json"

@settings(SETTINGS, max_examples=200)
@given(part=st.sampled_from(["search", "pruned"]), name=st.sampled_from(RUN_FILES),
       kind=st.sampled_from(["truncate", "noise", "swap"]), at=st.floats(0, 0.999),
       noise=st.binary(min_size=1, max_size=40) | st.sampled_from([b"-", b"9" * 9, b"e9", b'"']))
def test_any_damage_is_noticed_or_harmless(world, tmp_path_factory, part, name, kind, at, noise):
    """A damaged run is refused in one way, or can be shown."""
    directory = tmp_path_factory.mktemp("damaged") / part
    shutil.copytree(world / "runs" / part, directory)
    path = directory / name
    content = path.read_bytes()
    at = int(at * len(content))
    if kind == "swap":
        content = (directory / RUN_FILES[RUN_FILES.index(name) - 1]).read_bytes()
    else:
        content = content[:at] + (noise + content[at + len(noise):]) * (kind == "noise")
    path.write_bytes(content)
    try:
        run = finished.read_run(directory)
    except tas.TASError as error:
        assert "\n" not in str(error)
        return
    if run is None:
        return
    accuracy = tas.read_json(world / "runs" / "pruned" / "run.json")["result"]["accuracy"]
    if run.training:
        (row,), = tables(report.table([report.row([run], directory, [])]))
        assert float(row["accuracy %"]) == pytest.approx(accuracy, abs=0.005) or not run.lines
        figure.draw_trainings(Figure(), [[run]])
    elif run.searched:
        trajectory.draw_search(Figure(), run)
        trajectory.draw_sizes(Figure(), run)

def test_names_in_a_report_are_escaped(world, tmp_path, capsys):
    odd = "a|b<i>*c*_d_`e`\x1b[31m\n$x_{$&amp;"
    base = shutil.copytree(world / "runs", tmp_path / odd)
    for part in ("pruned", "teacher"):
        line = tas.read_json(base / part / "run.json")["command"]
        path = base / part / "run.json"
        info = tas.read_json(path) | {"command": line.replace("/insects", f"/{odd}"),
                                      "machine": odd}
        path.write_text(json.dumps(info))
    shutil.copytree(base / "search", base / odd)  # the first search, whose name is in the figure
    status, (table,) = make_report(base)
    assert status == 0
    shown = r"a|b<i>*c*_d_`e`\x1b[31m" + r"\n$x_{$&amp;"
    for row in table:
        assert row["data"] == shown
    out = capsys.readouterr().out
    for text in (out, (base / "report.md").read_text()):
        assert all(c.isprintable() or c == "\n" for c in text)
    assert "<i>" not in (base / "report.md").read_text() and shown in unescape(out)
    assert Image.open(base / "report.png").height > 800

def test_report_of_trainings_or_of_a_search_alone(world, tmp_path, capsys):
    heights = []
    for part in ("teacher", "search"):
        shutil.copytree(world / "runs" / part, tmp_path / part / "run")
        assert report.main([str(tmp_path / part)]) == 0
        found = tables((tmp_path / part / "report.md").read_text())
        assert len(found) == 1 and len(found[0]) == 1
        heights.append(Image.open(tmp_path / part / "report.png").height)
    assert heights[0] < heights[1]

# ---- the figure ---------------------------------------------------------------------------------

def read(world, part):
    return finished.read_run(world / "runs" / part)

def changed(run, **entries):
    """A copy of a Finished run with other entries."""
    return type(run)(**{**vars(run), **entries})

def curves(axis):
    """label -> (x, y) of the lines of a panel."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
            for line in axis.get_lines()}

def test_the_search_is_drawn_in_percent_of_the_target(world):
    search, part = read(world, "search"), Figure()
    trajectory.draw_search(part, search)
    macs, decided = part.axes
    epochs, target = [1, 2], tas.count_macs(search.shape.full) / 2
    for axis, scale, names in (
            (macs, 100 / target, {"expected": "expected_macs", "most probable": "argmax_macs"}),
            (decided, 1, {"widths": "width_discrepancy", "depths": "depth_discrepancy"})):
        found = curves(axis)
        assert set(found) == set(names)
        for label, name in names.items():
            assert found[label][0] == epochs
            assert found[label][1] == pytest.approx([scale * line[name] for line in search.lines])
    band, = macs.patches
    low, high = sorted([band.get_y(), band.get_y() + band.get_height()])
    assert (low, high) == pytest.approx((95, 105))
    assert macs.get_ylabel() == "MACs (% of target)"

@pytest.mark.parametrize("stages", [
    [[[4, 6]], [[20, 9], [32, 9]], [[1, 64]] * 3],
    [[[16, 16]] * 3, [[32, 32]] * 3, [[64, 64]] * 3]])
def test_found_widths_stand_over_the_unpruned_ones(world, stages):
    shape, part = tas.Shape("resnet20", 2, SIZE, 7, stages), Figure()
    trajectory.draw_sizes(part, changed(read(world, "search"), shape=shape))
    axis, = part.axes
    expected = [7]
    for blocks in stages:
        for b in range(3):
            expected += blocks[b] if b < len(blocks) else [0, 0]
    unpruned, found = [[bar.get_height() for bar in bars] for bars in axis.containers]
    assert unpruned == shape.full.convs and found == expected
    for bars in axis.containers:
        assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx(range(19))
    dropped = curves(axis).get("conv of a dropped block", ([], []))[0]
    assert dropped == [i for i in range(19) if expected[i] == 0]

def test_points_and_curves_of_rows(world):
    """Means and spreads over the seeds; the rows of one method at two targets are joined."""
    pruned, teacher, groups = read(world, "pruned"), read(world, "teacher"), []
    for macs, accuracies in ((2e6, [80.0, 84.0]), (1e6, [70.0, 71.0]), (3e6, [90.0])):
        group = []
        for accuracy in accuracies:
            lines = [{"epoch": e, "test_accuracy": accuracy + e - 6} for e in range(1, 7)]
            group.append(changed(pruned, macs=macs, accuracy=accuracy, lines=lines))
        groups.append(group)
    groups[2][0].method, groups[2][0].transfer = "random", "none"
    groups.append([changed(teacher, accuracy=95.0, macs=9e6)])
    names, part = figure.name_series(groups), Figure()
    assert names == ["tas", "tas", "random", "unpruned"]
    figure.draw_trainings(part, groups)
    accuracy, test = part.axes
    bars = {}
    for container in accuracy.containers:
        point, _, errors = container.lines
        x, y = float(point.get_xdata()[0]), float(point.get_ydata()[0])
        bars[x, y] = [bar.get_segments()[0] for bar in errors], point.get_fillstyle()
    assert set(bars) == {(2.0, 82.0), (1.0, 70.5), (3.0, 90.0)}
    for (x, y), values in (((2.0, 82.0), [80, 84]), ((1.0, 70.5), [70, 71])):
        deviation = statistics.stdev(values)
        (across, up), fill = bars[x, y]
        assert up[:, 1] == pytest.approx([y - deviation, y + deviation]) and fill == "full"
        assert across[:, 0] == pytest.approx([x, x])
    assert bars[3.0, 90.0] == ([], "none")
    found = [(list(line.get_xdata()), list(line.get_ydata())) for line in accuracy.get_lines()]
    assert ([1.0, 2.0], [70.5, 82.0]) in found and ([0, 1], [95.0, 95.0]) in found
    means = [list(line.get_ydata()) for line in test.get_lines()]
    assert [77, 78, 79, 80, 81, 82] in means and [65.5, 66.5, 67.5, 68.5, 69.5, 70.5] in means
    labels = [text.get_text() for text in part.legends[0].get_texts()]
    assert labels == ["random", "tas", "unpruned", "transfer: kd", "transfer: none"]

def test_legends_tell_rows_apart(world):
    run = read(world, "pruned")
    groups = [[run], [changed(run, epochs="9 + 2")], [changed(run, method="random")]]
    assert figure.name_series(groups) == [
        "tas, 2 + 2 epochs", "tas, 9 + 2 epochs", "random"]
    groups = [[run], [changed(run, precision="bf16", other="lr 0.2")], [changed(run, seed=5)]]
    assert figure.name_series(groups) == [
        "tas, batch-size 6", "tas, lr 0.2", "tas, batch-size 6"]
    groups = [[run], [changed(run, arch="resnet32")], [changed(run, data="x\n")]]
    assert figure.name_series(groups) == [
        "resnet20 on insects: tas", "resnet32 on insects: tas", r"resnet20 on x\n: tas"]

def test_searches_alone_are_drawn_over_each_other(world, tmp_path, capsys, monkeypatch):
    for name in ("one", "two"):
        shutil.copytree(world / "runs/search", tmp_path / name / "search")
    info = tas.read_json(tmp_path / "two/search/run.json")
    info["settings"]["align"] = "pad"
    (tmp_path / "two/search/run.json").write_text(json.dumps(info))
    drawn, plain = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda part, *rest, **more: drawn.append(part) or plain(
        part, *rest, **more))
    assert report.main([str(tmp_path)]) == 0
    lines = [json.loads(line) for line in
             (tmp_path / "one/search/metrics.jsonl").read_text().splitlines()]
    [part] = drawn
    assert [text.get_text() for text in part.legends[0].get_texts()] == ["one", "two"]
    names = "argmax_macs", "val_accuracy", "width_discrepancy", "depth_discrepancy"
    for axis, name in zip(part.axes, names, strict=True):
        scale = info["settings"]["target"] if name == "argmax_macs" else 1
        values = pytest.approx([line[name] / scale for line in lines])
        assert [list(curve.get_ydata()) for curve in axis.get_lines()] == [values, values]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 3 and all(f"{lines[-1]['val_accuracy']:.2f}" in row for row in rows[1:])
    assert rows[1].startswith("| one | resnet20 | tas") and "align pad" in rows[2]

def test_a_search_without_its_metrics(world, tmp_path, capsys):
    """There is nothing to draw; a line that lacks a measurement is damaged."""
    base = shutil.copytree(world / "runs", tmp_path / "runs")
    for part in ("teacher", "pruned"):
        shutil.rmtree(base / part)
    path = base / "search/metrics.jsonl"
    path.write_text(path.read_text().replace("val_accuracy", "accuracy"))
    capsys.readouterr()
    assert report.main([str(base)]) == 2
    assert "left out" in (err := capsys.readouterr().err) and "no finished run" in err
    path.unlink()
    assert report.main([str(base)]) == 0
    assert "No network has been trained yet" in capsys.readouterr().out

# ---- times --------------------------------------------------------------------------------------

def write_times(path, **shapes):
    """As tools/bench.py writes them: milliseconds at batches of 1 and 4."""
    rows = [{"case": "training", "ms": 5.0}]
    for shape, times in shapes.items():
        rows += [{"case": f"inference, {shape}, batch {batch}", "ms": ms}
                 for batch, ms in zip((1, 4), times)]
    path.write_text(json.dumps({"rows": rows}))
    return path

def test_times_beside_accuracies(world, tmp_path, capsys):
    """Each shape has the accuracy of what was trained of it under distillation."""
    file = write_times(tmp_path / "all.json", unpruned=(2, 8), **{f"{world}/runs/search": (1, 6)})
    assert times.main([str(file)]) == 0
    result = tas.read_json(world / "runs/pruned/run.json")["result"]
    kept = result["macs"] / result["full_macs"]
    cells = ["tas", f"{kept:.3f}", "1.00", "0.50", "6.00", "0.75", f"{result['accuracy']:.2f}"]
    text = (tmp_path / "all.md").read_text()
    assert f"| {' | '.join(cells)} | " in text and text in capsys.readouterr().out
    assert text.count("\n") == 3 and (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")

def test_times_of_many_methods(world, tmp_path, monkeypatch):
    """More than there are colours; init+kd is distillation, too."""
    shapes, drawn, plain = {}, [], Figure.savefig
    for i in range(14):
        base = shutil.copytree(world / "runs", tmp_path / str(i))
        search = tas.read_json(base / "search/run.json")["settings"]
        change(base / "pruned", search=search | {"num_samples": i + 3},
               transfer="init+kd" if i else "kd")
        shapes[f"{base}/search"] = (1 + i, 6)
    file = write_times(tmp_path / "all.json", unpruned=(2, 8), **shapes)
    monkeypatch.setattr(Figure, "savefig", lambda part, *rest, **more: drawn.append(part) or plain(
        part, *rest, **more))
    assert times.main([str(file)]) == 0
    [part] = drawn
    assert [len(axis.get_lines()) for axis in part.axes] == [14, 14]
    looks = {(line.get_color(), line.get_marker()) for line in part.axes[0].get_lines()}
    assert len(looks) == len(part.legends[0].get_texts()) == 14

def test_times_of_what_cannot_be_told(world, tmp_path, capsys):
    only = write_times(tmp_path / "only.json", unpruned=(2, 8))
    check_refused(capsys, times, only, words=[only, "unpruned"])
    none = write_times(tmp_path / "none.json", **{f"{world}/runs/search": (1, 6)})
    check_refused(capsys, times, none, words=[none, "unpruned"])
    alone = shutil.copytree(world / "runs/search", tmp_path / "alone/search")
    file = write_times(tmp_path / "alone.json", unpruned=(2, 8), **{str(alone): (1, 6)})
    check_refused(capsys, times, file, words=[alone, "distillation"])
    for content in ("{}", '{"rows": 3}', "[", '{"rows": [{"case": "inference, x", "ms": 1}]}'):
        file.write_text(content)
        check_refused(capsys, times, file, words=[file])

# ---- gpu_check ----------------------------------------------------------------------------------

@pytest.mark.parametrize("fails, warns", [("", ""), ("bench.py", ""), ("", "graphs.py")])
def test_the_plan_of_the_gpu_check(tmp_path, fails, warns):
    """Each command is understood; a part that fails is told, as is one whose steps are plain."""
    stub = tmp_path / "python"
    stub.write_text(f"""#!/bin/bash
[ "$1" = - ] && exec {sys.executable} "$@"
echo "$@" >> {tmp_path}/commands
[[ "$*" != *{warns or "nothing"}* ]] || echo "warning: a step is not compiled or captured" >&2
[ -z "{fails}" ] || [[ "$*" != *{fails or "nothing"}* ]]
""")
    stub.chmod(0o755)
    names = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": f"{tmp_path}/out", "EPOCHS": "3"}
    done = subprocess.run(["bash", str(HERE / "gpu_check.sh")], env=os.environ | names, text=True,
                          capture_output=True, timeout=60)
    assert done.returncode == bool(fails or warns), done
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert {name: part["status"] for name, part in result.items()} == {
        "tests.status": 0, "bench.status": int(bool(fails)), "prune.status": 3 if warns else 0,
        "ddp.status": 0}
    commands = [line.split() for line in (tmp_path / "commands").read_text().splitlines()]
    assert len(commands) == (8 if fails else 10)
    for program, *words in commands:
        if "tas.py" in words[:4]:  # in processes that torch starts
            program, *words = words[words.index("tas.py"):]
        if program in ("tas.py", "tools/graphs.py"):
            assert tas.build_parser().parse_args(words).device == "cuda"
            assert (program == "tools/graphs.py") == (words[0] == "prune")
        elif program != "-m":
            assert words[0] in tas.ARCHS
        assert program == "-m" or (HERE.parent / program).is_file()

# ---- latency ------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", ["resnet20", "resnet164", "resnet18"])
def test_the_layers_are_those_of_the_network(arch):
    """One after the other they do what the network does, at any sizes."""
    torch.manual_seed(0)
    space = tas.Space(arch, 7, 20)
    shape = space.shape(*[[int(torch.randint(len(row), ())) for row in rows]
                          for rows in (space.widths, space.depths)])
    whole = tas.ResNet(shape).eval()
    parts = [whole.conv1, *[m for layer in whole.layers for block in layer for m in
                            (*[getattr(block, f"conv{i + 1}") for i in range(block.num_convs)],
                             block)], whole.fc]
    described = [d for d, layer in zip(layers.describe_layers(space), tas.network_layers(
        space.full), strict=True) if layer.block < len(shape.stages[layer.stage])]
    seen = {}
    for part in parts:
        part.register_forward_hook(lambda m, x, y: seen.update({m: (x[0].shape, y.shape)}))
    whole(torch.zeros(2, 3, 20, 20))
    for part, (kind, kernel, strides, size) in zip(parts, described, strict=True):
        shape_in, shape_out = seen[part]
        if kind != "classifier":
            assert shape_in[-1] == size
        if isinstance(part, tas.Block):
            assert kind == "shortcut" and strides == tuple(
                getattr(part, f"conv{i + 1}").stride[0] for i in range(part.num_convs))
        elif kind != "classifier":
            assert part.kernel_size == (kernel, kernel) and part.stride == strides * 2
        args = SimpleNamespace(device=torch.device("cpu"), precision="fp32")
        x = torch.randn(2, shape_in[1], size, size)
        layers.make_case(args, space, (kind, kernel, strides, size), x, shape_out[1])()

def test_latency_of_an_arch(tmp_path, capsys, monkeypatch):
    """Resumable; the check, the search and the figure use what was measured."""
    line = f"resnet20 --image-size 8 --batch-size 2 --rounds 1 --precision fp32 -o {tmp_path}/"
    line += "t.json"
    plain, measured = latency.medians, []

    def medians(functions, *rest):
        if len(measured) == 9:
            raise KeyboardInterrupt
        measured.append(list(functions))
        return plain(functions, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(latency, "medians", medians)
        assert latency.main(line.split()) == 130
    kept = tas.read_json(tmp_path / "t.json")["cases"]
    assert len(kept) == sum(map(len, measured)) > 0
    assert latency.main(line.split()) == 0
    found, space = tas.read_json(tmp_path / "t.json"), tas.Space("resnet20", 10, 8)
    assert kept.items() <= found["cases"].items() and found["unit"] == "ms"
    space.load_cost(tmp_path / "t.json")
    stem = ("stem", 3, (1,), 8)
    assert space.cost[0, 0].tolist() == [found["cases"][f"{stem} 3 {c}"] for c in space.widths[0]]
    conv = ("conv", 3, (2,), 8)
    c_in, c_out = space.widths[6][2], space.widths[7][5]
    assert space.cost[10, 2, 5] == found["cases"][f"{conv} {c_in} {c_out}"]
    assert min(found["cases"].values()) > 0 and len(found["check"]["measured"]) == 20
    assert Image.open(tmp_path / "t.png").size == (550, 550)
    assert "correlation" in capsys.readouterr().out
    for other, word in (("--batch-size 3", "batch_size"), ("--classes 9", "classes")):
        check_refused(capsys, latency, *line.split(), *other.split(), words=[word])

@pytest.mark.parametrize("arch", tas.ARCHS)
def test_every_arch_has_a_time_for_every_pair_of_widths(tmp_path, monkeypatch, arch):
    """Convs that are alike but for their candidates are timed at those of all of them."""
    timed = {}

    def medians(cases, *rest):
        assert not timed.keys() & cases.keys()
        for name in cases:
            timed[name] = len(timed) + 1.0
        return {name: (timed[name], None) for name in cases}

    monkeypatch.setattr(latency, "medians", medians)
    monkeypatch.setattr(latency, "make_case", lambda *rest: None)
    monkeypatch.setattr(tas, "write_file", lambda *rest: None)
    args = SimpleNamespace(batch_size=1, device=torch.device("cpu"), precision="fp32", rounds=1,
                           out=tmp_path / "t.json")
    space, found = tas.Space(arch, 10), {"cases": {}}
    latency.measure(args, space, found)
    exits = [space.widths[sum(map(len, itertools.chain(*space.full.stages[:s + 1])))]
             for s in range(len(space.depths))]
    widths = [*space.widths, *exits, (1,)]  # the list of Layer
    for layer, table, c_in, c_out in zip(layers.describe_layers(space), found["cost"], space.c_in,
                                         space.c_out, strict=True):
        if layer[0] != "stem":  # whose input has three colours
            for a, before in enumerate(widths[c_in]):
                for b, after in enumerate(widths[c_out]):
                    assert table[a][b] == timed[f"{layer} {before} {after}"]
    assert found["cases"] == timed

# ---- Weights from elsewhere ---------------------------------------------------------------------

WRAPPINGS = {
    "plain": lambda state: state, "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state},
    "parallel": lambda state: {"module." + name: t for name, t in state.items()},
    "older": lambda state: {n: t for n, t in state.items() if "num_batches" not in n}}

@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_of_torchvision_s_form(tmp_path, wrapping):
    torch.manual_seed(0)
    source = torchvision.models.resnet18(num_classes=7).eval()
    torch.save(WRAPPINGS[wrapping](source.state_dict()), tmp_path / "file.pth")
    line = [str(tmp_path / "file.pth"), "--arch", "resnet18", "--out", str(tmp_path / "run")]
    assert weights.main(line) == 0
    net, x = tas.load(tmp_path / "run"), torch.randn(2, 3, 64, 64)
    assert net.shape == tas.Shape.unpruned("resnet18", 7)
    torch.testing.assert_close(net(x), source(x))
    assert weights.main(line) == 2  # nothing is overwritten

def test_weights_as_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = tas.ResNet(tas.Shape.unpruned("resnet20", 3)).state_dict()
    safetensors.save_file(state, tmp_path / "a.safetensors")
    line = [str(tmp_path / "a.safetensors"), "--arch", "resnet20", "--out", str(tmp_path / "run")]
    assert weights.main(line) == 0
    found = tas.load(tmp_path / "run").state_dict()
    assert all(torch.equal(found[name], state[name]) for name in state)

def drop(*names):
    return lambda state: [state.pop(name) for name in names]

@pytest.mark.parametrize("spoil, words", [
    (drop("conv1.weight", "bn1.bias"), ["missing: conv1.weight, bn1.bias\n"]),
    (lambda state: state.update({f"head.{i}": torch.ones(1) for i in range(5)}),
     ["unexpected: head.0, head.1, head.2 ..."]),
    (lambda state: state.update({"conv1.weight": torch.ones(9, 3, 3, 3)}),
     ["of another shape: conv1.weight [9, 3, 3, 3] for [16, 3, 3, 3]"]),
    (drop("fc.bias"), ["fc.bias"]), (lambda state: state.update(x=3), ["tensors"]),
    (lambda state: (state.clear(), state.update(state_dict=[1])), ["cannot read"])])
def test_weights_that_do_not_fit_are_named(tmp_path, capsys, spoil, words):
    state = {**tas.ResNet(tas.Shape.unpruned("resnet20", 3)).state_dict()}
    spoil(state)
    torch.save(state, tmp_path / "file.pth")
    status = weights.main([f"{tmp_path}/file.pth", "--arch", "resnet20", "--out", f"{tmp_path}/r"])
    err = capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1 and not (tmp_path / "r").exists()
    assert all(word in err for word in words), err

class Evil:
    """A pickle of it makes a directory when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)

def test_weights_are_not_executed(tmp_path, capsys, monkeypatch):
    """Neither a file nor what lies where torchvision's download would be."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    url = torchvision.models.get_model_weights("resnet18")["IMAGENET1K_V1"].url
    file = tmp_path / "home/hub/checkpoints" / Path(url).name
    file.parent.mkdir(parents=True)
    torch.save(Evil(tmp_path / "executed"), file)
    for source, word in ((str(file), "cannot read"), ("torchvision", "damaged")):
        assert weights.main([source, "--arch", "resnet18", "--out", f"{tmp_path}/run"]) == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run").exists()

def test_torchvision_s_weights(tmp_path, capsys, monkeypatch):
    """An earlier download is taken; without network the message says where the file goes."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    line = ["torchvision", "--arch", "resnet18", "--out", f"{tmp_path}/run"]

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    assert weights.main(line) == 2
    assert re.search(f"no network.*put that file into {tmp_path}", capsys.readouterr().err)
    assert weights.main(["torchvision", "--arch", "resnet20", "--out", f"{tmp_path}/run"]) == 2
    assert "resnet20" in capsys.readouterr().err
    buffer = io.BytesIO()
    torch.save(torchvision.models.resnet18().state_dict(), buffer)
    beginning = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    kind = SimpleNamespace(url=f"https://x/resnet18-{beginning}.pth")
    monkeypatch.setattr("torchvision.models.get_model_weights", lambda _: {"IMAGENET1K_V1": kind})
    (tmp_path / f"hub/checkpoints/resnet18-{beginning}.pth").write_bytes(buffer.getvalue())
    assert weights.main(line) == 0
    assert tas.load(tmp_path / "run").shape.num_classes == 1000

# ---- split --------------------------------------------------------------------------------------

def write_classes(root, counts):
    """train/ of as many images as counts[class]; each file holds its own first name."""
    for label, count in counts.items():
        for i in range(count):
            path = root / "train" / label / f"{i}.{('png', 'JPEG')[i % 2]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{label}/{path.name}")
    return root

def contents(root):
    """{file: what it holds}, of every file below a directory."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}

def slow_split(root, fraction):
    """What contents(root) should be after a split."""
    expected = contents(root)
    for folder in (root / "train").iterdir():
        names = sorted(p.name for p in folder.iterdir() if p.suffix in (".png", ".JPEG"))
        random.Random(0).shuffle(names)
        for name in names[:max(1, round(fraction * len(names)))]:
            expected[f"test/{folder.name}/{name}"] = expected.pop(f"train/{folder.name}/{name}")
    return expected

COUNTS = {"ant": 20, "bee": 13, "cat": 3}

@pytest.mark.parametrize("fraction, kept", [(0.1, (18, 12, 2)), (0.3, (14, 9, 2))])
def test_split_moves_a_part_of_every_class(tmp_path, capsys, fraction, kept):
    root = write_classes(tmp_path / "data", COUNTS)
    (root / "train/ant/notes.txt").touch()
    expected = slow_split(root, fraction)
    assert split.main([str(root), "--fraction", str(fraction)]) == 0
    assert contents(root) == expected
    assert sorted(path.name for path in root.iterdir()) == ["test", "train"]
    lines = [f"{label}: {k} in train, {n - k} in test" for (label, n), k in
             zip(COUNTS.items(), kept)]
    lines.append(f"{root}: {sum(kept)} in train, {36 - sum(kept)} in test")
    assert capsys.readouterr().out.splitlines() == lines
    for k, label in zip(kept, COUNTS):
        assert len(list((root / "train" / label).glob("*.[pJ]*"))) == k

def test_split_makes_what_tas_reads(tmp_path, capsys):
    write_images(tmp_path / "data")
    shutil.rmtree(tmp_path / "data/val")
    line = f"train {CHEAP} --data-dir {tmp_path}/data --arch resnet20 --epochs 1 --out {tmp_path}/x"
    check_refused(capsys, tas, *line.split(), words=["tools/split.py"])
    assert split.main([str(tmp_path / "data")]) == 0
    data = tas.load_data("folder", f"{tmp_path}/data", 8, torch.device("cpu"), 0)
    assert data.train.labels.bincount().tolist() == [11, 11]
    assert data.test.labels.bincount().tolist() == [1, 1]
    assert tas.main(line.split()) == 0

def test_split_goes_on_after_an_interruption(tmp_path, capsys, monkeypatch):
    """Wherever that is, also with another fraction; no file is lost or changed at any time."""
    plain, calls = os.rename, []

    def rename(source, destination):
        if len(calls) == last:
            raise KeyboardInterrupt
        calls.append(source)
        plain(source, destination)

    for last, fraction in itertools.product(range(12), ("0.3", "0.1", "0.5")):
        root = write_classes(tmp_path / f"{last} {fraction}", COUNTS)
        before, expected = contents(root), slow_split(root, float(fraction))
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", rename)
            assert split.main([str(root), "--fraction", "0.3"]) == 130
        assert len(calls) == last and not (root / "test").exists()
        assert sorted(contents(root).values()) == sorted(before.values())
        assert split.main([str(root), "--fraction", fraction]) == 0
        assert contents(root) == expected and not (root / "test.part").exists()
    assert split.main([str(root)]) == 2 and len(calls) == 11  # images

def test_split_overwrites_nothing(tmp_path, capsys):
    """An image that is in both folders stays in both."""
    root = write_classes(tmp_path / "data", COUNTS)
    (root / "test.part/bee").mkdir(parents=True)
    (root / "test.part/bee/4.png").write_text("another one")
    before = contents(root)
    check_refused(capsys, split, root, words=["bee/4.png", "remove one"])
    assert contents(root) == before

@pytest.mark.parametrize("change, line, words", [
    (lambda root: (root / "test").mkdir(), "", ["has test/ already"]),
    (lambda root: (root / "val/ant").mkdir(parents=True), "", ["has val/ already"]),
    (lambda root: shutil.rmtree(root / "train"), "", ["{root}/train"]),
    (shutil.rmtree, "", ["{root}/train"]),
    (lambda root: [shutil.rmtree(root / "train"), (root / "train").mkdir()], "", ["class"]),
    (lambda root: [(root / "train/x").mkdir(), (root / "train/x/1.txt").touch()], "", ["x"]),
    (lambda root: write_classes(root, {"dog": 1}), "", ["dog has 1 image", "none for training"]),
    *[(lambda root, name=name: (root / "train" / name).rename(root / "kept") and
       (root / "train" / name).symlink_to(root / "kept"), "",
       [f"{{root}}/train/{name}".rstrip("/"), "a link"])
      for name in ("cat", "")],
    (lambda root: (root / "train/bee/more").symlink_to(root / "train/cat"), "", ["bee/more"]),
    (lambda root: None, "--fraction 0.9", ["cat has 3 images"]),
    (lambda root: None, "--fraction 1", ["--fraction", "0.9"]),
    (lambda root: None, "--fraction 0", ["--fraction"])])
def test_split_refuses_before_it_moves(tmp_path, capsys, change, line, words):
    root = write_classes(tmp_path / "data", COUNTS)
    change(root)
    before = sorted(tmp_path.rglob("*"))
    check_refused(capsys, split, root, *line.split(), words=[w.format(root=root) for w in words])
    assert sorted(tmp_path.rglob("*")) == before

# ---- sweep --------------------------------------------------------------------------------------

def check_same_training(a, b):
    """The same network, state and curve to the last bit."""
    assert (a / "shape.json").read_bytes() == (b / "shape.json").read_bytes()
    results = [tas.read_json(path / "run.json")["result"] | {"seconds": 0} for path in (a, b)]
    assert results[0] == results[1]
    measured = "seconds", "images_per_second", "memory_mb"
    curves = [[{k: v for k, v in json.loads(line).items() if k not in measured}
               for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (a, b)]
    assert curves[0] == curves[1] and len(curves[0]) == 2
    for name in ("net", "optimizer"):
        states = [tas.load_tensors(path / "last.ckpt")["parts"][name] for path in (a, b)]
        buffers = [io.BytesIO(), io.BytesIO()]
        for state, buffer in zip(states, buffers):
            torch.save(state, buffer)
        assert buffers[0].getvalue() == buffers[1].getvalue()

def test_sweep_prunes_to_several_targets(world, tmp_path):
    """They share the teacher; each is what it would be alone, and has a row."""
    base, place = tmp_path / "runs", f"{CHEAP} --data-dir {world}/insects --arch resnet20"
    line = f"0.5,0.3 {place} --epochs 2 --out {base}"
    assert sweep.main(line.split()) == 0
    assert sorted(str(path.relative_to(base)) for path in base.glob("*/*/")) == [
        "0.3/pruned", "0.3/search", "0.5/pruned", "0.5/search", "0.5/teacher"]
    for name in ("teacher", "search", "pruned"):
        check_same_training(base / "0.5" / name, world / "runs" / name)
    teacher = tas.checksum(tas.load(base / "0.5/teacher"))
    for target in ("0.5", "0.3"):
        settings = tas.read_json(base / target / "pruned/run.json")["settings"]
        assert settings["teacher"] == teacher
        shape = tas.Shape.load(base / target / "pruned")
        share = tas.count_macs(shape) / tas.count_macs(shape.full)
        assert abs(share / float(target) - 1) <= 0.05
    alone = f"prune {place} --epochs 2 --flops 0.3 --teacher {world}/runs/teacher"
    assert tas.main(f"{alone} --out {tmp_path}/a".split()) == 0
    for name in ("search", "pruned"):
        check_same_training(base / "0.3" / name, tmp_path / "a" / name)
    table = (base / "report.md").read_text()
    runs = [row.split(" | ")[-1].strip(" |") for row in table.splitlines() if "resnet20" in row]
    assert sorted(runs) == ["0.3/pruned", "0.5/pruned", "0.5/teacher"]
    Image.open(base / "report.png").verify()
    before = contents(base)  # finished parts are kept, in whatever order
    for targets in ("0.5,0.3", "0.3,0.5", "0.3"):
        assert sweep.main(line.replace("0.5,0.3", targets).split()) == 0
        assert contents(base) == before | {name: contents(base)[name] for name in
                                           ("report.md", "report.png")}

@pytest.mark.parametrize("targets, options, words", [
    ("0.5,0.001", "--arch resnet20", ["possible are"]), ("0.5,", "--arch resnet20", ["--flops"]),
    ("0.5,../x", "--arch resnet20", ["--flops ../x"]), ("0.5,0.3", "", ["--arch"]),
    ("0.5,0.3", "--arch resnet20 --flops 0.4", ["leave --flops out"]),
    ("0.5,0.3", "--arch resnet20 --flops=0.4", ["leave --flops out"]),
    ("0.5,0.3", "--arch resnet20 --teacher=", ["teacher: an empty value"]),
    *[("0.5,0.3", f"--arch resnet20 {name}=", [f"{name}"]) for name in ("--out", "--init")],
    ("0.5,0.3", "--arch resnet20 --transfer none --init {world}/runs/teacher", ["--init"]),
    ("0.5,0.3", "--arch resnet20 --teacher {world}/runs/search", ["weights.pt"])])
def test_sweep_refuses_before_it_trains(world, tmp_path, capsys, targets, options, words):
    line = f"{targets} {CHEAP} --data-dir {{world}}/insects --out {tmp_path}/runs {options}"
    check_refused(capsys, sweep, *line.format(world=world).split(), words=words)
    assert not (tmp_path / "runs").exists()

def test_sweep_finds_what_is_in_the_way_of_a_later_target(world, tmp_path, capsys):
    (tmp_path / "0.3/search").mkdir(parents=True)
    (tmp_path / "0.3/search/photo.png").touch()
    line = f"0.5,0.3 {CHEAP} --data-dir {world}/insects --arch resnet20 --out {tmp_path}"
    check_refused(capsys, sweep, *line.split(), words=[tmp_path / "0.3/search"])
    assert not (tmp_path / "0.5").exists()

def test_sweep_refuses_a_begun_target_before_it_trains_a_new_one(world, tmp_path, capsys):
    place = f"{CHEAP} --data-dir {world}/insects --arch resnet20 --teacher {world}/runs/teacher"
    assert sweep.main(f"0.5 {place} --method uniform --epochs 1 --out {tmp_path}".split()) == 0
    before = contents(tmp_path)
    line = f"0.3,0.5 {place} --method uniform --epochs 2 --out {tmp_path}"
    check_refused(capsys, sweep, *line.split(), words=[tmp_path / "0.5/search", "epochs was 1"])
    assert contents(tmp_path) == before

def test_sweep_under_torchrun(capsys, monkeypatch):
    """A second part there would wait for ever for its group of processes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_refused(capsys, sweep, "0.5,0.3", words=["one target at a time"])

def test_sweep_names_an_image_that_a_worker_cannot_read(world, tmp_path, capsys):
    shutil.copytree(world / "insects", tmp_path / "insects")
    (tmp_path / "insects/train/bee/3.png").write_text("no image")
    line = f"0.5 {CHEAP} --data-dir {tmp_path}/insects --arch resnet20 --workers 2"
    err = check_refused(capsys, sweep, *line.split())
    assert err.startswith(f"error: cannot read the image {tmp_path}/insects/train/bee/3.png")

@pytest.mark.parametrize("options, first, later", [
    ("", "", "--teacher {base}/0.5/teacher"),
    ("", "--init {world}/runs/teacher", "--teacher {base}/0.5/teacher"),
    ("--teacher {world}/runs/teacher", "", ""), ("--transfer none", "", "")])
@pytest.mark.parametrize("out, base", [("", "runs/insects-resnet20"), ("--out=a/b", "a/b")])
def test_sweep_gives_the_teacher_of_the_first_to_the_others(world, tmp_path, monkeypatch, options,
                                                            first, later, out, base):
    """And ends with the status of the first part that fails."""
    monkeypatch.chdir(tmp_path)
    parse, shared = tas.build_parser().parse_args, f"{CHEAP} --data-dir {world}/insects {options}"
    expected = []
    for target, more in (("0.5", first), ("0.3", later), ("2M", later)):
        line = f"prune {shared} --arch resnet20 {more} --flops {target} --out {base}/{target}"
        expected.append(vars(parse(line.format(world=world, base=base).split())))
    seen, reports = [], []
    monkeypatch.setattr(tas, "main", lambda line: seen.append(vars(parse(line))) or statuses.pop())
    monkeypatch.setattr(report, "main", lambda line: reports.append(line) or 0)
    line = f"{shared} {first} --arch resnet20 {out}".format(world=world).split()
    statuses = [0, 0, 0]
    assert sweep.main(["0.5,0.3, 2M", *line]) == 0
    assert seen == expected and reports == [[base]]
    seen.clear(), reports.clear()
    statuses = [0, 130, 0]
    assert sweep.main(["0.5,0.3, 2M", *line]) == 130
    assert seen == expected[:2] and reports == []

# ---- TensorBoard --------------------------------------------------------------------------------

def test_tensorboard_without_its_package(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    base = shutil.copytree(world / "runs", tmp_path / "runs")
    check_refused(capsys, report, base, "--tensorboard", words=["pip install tensorboard"])
    assert (base / "report.md").exists() and not (base / "tensorboard").exists()

def test_tensorboard_has_the_metrics(world, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    base = shutil.copytree(world / "runs", tmp_path / "runs")
    for _ in range(2):  # the second report takes the place of the first
        assert report.main([str(base), "--tensorboard"]) == 0
    for part in ("teacher", "search", "pruned"):
        events = EventAccumulator(str(base / "tensorboard" / part)).Reload()
        lines = [json.loads(line) for line in
                 (base / part / "metrics.jsonl").read_text().splitlines()]
        assert set(events.Tags()["scalars"]) == set(lines[0]) - {"epoch"}
        for name in set(lines[0]) - {"epoch"}:
            found = [(event.step, event.value) for event in events.Scalars(name)]
            expected = [(line["epoch"], pytest.approx(line[name], rel=1e-5)) for line in lines]
            assert found == expected
