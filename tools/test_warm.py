"""Properties of tools/warm.py."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import tas
import warm

torch.set_num_threads(1)  # small tensors: sharing them out would take longer than computing

def random_network(arch):
    """An unpruned network all of whose parameters and statistics are random."""
    torch.manual_seed(0)
    net = tas.ResNet(tas.Space(arch, 7, 24).full).double().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    return net, torch.randn(3, 3, 24, 24).double()

@pytest.mark.parametrize("arch", ["resnet20", "resnet164", "resnet18", "resnet50"])
def test_a_sorted_network_is_the_same_function(arch):
    net, x = random_network(arch)
    expected = net(x)
    warm.sort_channels(net)
    torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)
    for stream in warm.find_streams(net):
        importance = sum(bn.weight.abs() for _, bn in stream.writers)
        assert (importance.diff() <= 0).all() and stream.readers

@pytest.mark.parametrize("arch", ["resnet20", "resnet164", "resnet18"])
def test_the_search_begins_as_the_teacher(arch):
    """With all sizes full it computes what the teacher does in training mode."""
    net, x = random_network(arch)
    space = tas.Space(arch, 7, 24)
    searched = warm.start_from(tas.SuperResNet(space).double(), net)
    index = space.has_width.sum(1, keepdim=True) - 1  # the full widths, and the full depths
    depth = torch.zeros(len(space.depths), space.num_depths).double()
    for row, depths in zip(depth, space.depths):
        row[len(depths) - 1] = 1
    sample = tas.Sample(index, torch.ones_like(index).double(), depth)
    torch.testing.assert_close(searched(x, sample), net.train()(x), rtol=1e-8, atol=1e-8)
    scales = torch.cat([mix.scale.flatten(0, 1).flatten() for mix in searched.mixes])
    weights = torch.cat([bn.weight for bn in net.modules() if hasattr(bn, "running_var")])
    assert set(scales.tolist()) == set(weights.tolist())  # every candidate has the teacher's

def test_a_search_from_a_teacher(tmp_path, monkeypatch, capsys):
    """It runs, records its teacher, and is another run than one from nothing."""
    for name in ("plan_search", "SuperResNet", "SEARCH_SETTINGS"):
        monkeypatch.setattr(tas, name, getattr(tas, name))  # to be put back
    torch.manual_seed(0)
    images = torch.randint(256, (64, 32, 32, 3), dtype=torch.uint8)
    split = tas.SmallImages(images, torch.arange(64) % 10, "cpu")
    data = tas.Data(split, split, list("0123456789"))
    monkeypatch.setattr(tas, "load_data", functools.cache(lambda *_: data))
    line = "--data synthetic --arch resnet20 --batch-size 16 --epochs 1 --precision fp32 --out"
    for out in ("teacher", "other"):
        net = tas.ResNet(tas.Space("resnet20").full)
        net.shape.save(tmp_path / out / "shape.json")
        tas.save_tensors(tmp_path / out / "weights.pt", net.state_dict())

    def search(teacher, out):
        with monkeypatch.context() as patch:
            for name in ("plan_search", "SuperResNet", "SEARCH_SETTINGS"):
                patch.setattr(tas, name, getattr(tas, name))
            words = ["search", *line.split(), str(tmp_path / out)]
            return warm.main([str(tmp_path / teacher), *words])

    assert search("teacher", "run") == 0
    assert f"teacher {tmp_path}/teacher: accuracy" in capsys.readouterr().out
    settings = tas.read_json(tmp_path / "run" / "run.json")["settings"]
    assert settings["warm"] == tas.checksum(tas.load(tmp_path / "teacher"))
    assert search("other", "run") == 2 and "warm was" in capsys.readouterr().err
    assert tas.main(["search", *line.split(), str(tmp_path / "cold")]) == 0
    cold, warmed = (json.loads((tmp_path / out / "metrics.jsonl").read_text())["train_loss"]
                    for out in ("cold", "run"))
    assert cold != warmed
    assert warm.main(["search", "--arch", "resnet20"]) == 2
