"""The finished runs of a report: read, checked and named.

A run is what `tas.py train` or `search` leaves in a directory. Runs of other versions may lack an
entry; what is missing is None or "not recorded" here.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas
from naming import MACS, MISSING, argument, name_method, unusual

MEASURED = {  # what every line of metrics.jsonl must have
    "train": ("epoch", "test_accuracy"),
    "search": ("epoch", "expected_macs", "argmax_macs", "val_accuracy", "width_discrepancy",
               "depth_discrepancy")}
APART = "seed", "teacher", "warm", "precision"  # settings in which the runs of a row may differ

def number(value):
    """The value; ValueError unless it is a number of a sensible size."""
    if type(value) not in (int, float) or not abs(value) < 1e15:
        raise ValueError(f"{str(value)[:40]} is no number")
    return value

def read_lines(path, names):
    """The lines of metrics.jsonl, [] where there is no such file."""
    lines = []
    if path.is_file():
        for text in path.read_text().splitlines():
            lines.append(json.loads(text))
            for name in names:
                number(lines[-1][name])
    return lines

def read_run(path):
    """What the report shows of the run in a directory, None when it is not finished. TASError when
    a file of it is damaged, or when its files are not of one run."""
    info = tas.read_json(path / "run.json")
    if not info.get("result"):
        return None
    with tas.errors_as("damaged ({}); repair or remove it"):
        settings, result = info["settings"], info["result"]
        command = settings["command"]
        if command == "train":
            shape, search = tas.Shape(**settings["shape"]), result.get("search") or {}
            if search.get("command") != "search":  # of another training, whose shape it has
                search = {}
        else:
            shape, search = tas.Shape.load(path), settings
        lines = read_lines(path / "metrics.jsonl", MEASURED[command])
        if tas.count_macs(shape) != result["macs"]:
            raise ValueError("its MACs are not those of its shape")
        if command == "train" and lines and lines[-1]["test_accuracy"] != result["accuracy"]:
            raise ValueError("its accuracy is not that of its last epoch")
        return fields(path, info, shape, search, lines)

def fields(path, info, shape, search, lines):
    """Those of read_run; any exception where an entry is missing or of a wrong type. `search` are
    the settings of the search that found the shape, {} without one."""
    settings, result = info["settings"], info["result"]
    training = settings["command"] == "train"
    same = []  # all that the runs of a row have in common
    for each in (settings, search):
        apart = (*APART, "shape") if search else APART
        same.append({name: value for name, value in each.items() if name not in apart})
    unit, target = str(search.get("unit", MACS)), number(search["target"]) if search else None
    if search and target <= 0:
        raise ValueError(f"{target} is no target")
    cost = result["macs"] if unit == MACS else result.get("cost")  # older trainings have none
    if cost is not None or not training:
        number(cost)
    data, epochs = settings["data"], str(settings["epochs"])
    if data == "folder":
        data = argument(info, "--data-dir") or MISSING
    if training and search.get("method") == "tas":
        epochs = f"{search['epochs']} + {epochs}"
    precision = str(info.get("precision", MISSING))
    asked = settings.get("precision")
    searched = search.get("precision", asked)
    if asked and searched != asked:
        precision = f"{searched} + {precision}"
    teacher = result.get("teacher_accuracy")
    return SimpleNamespace(
        path=path, training=training, arch=shape.arch, data=str(data), shape=shape, lines=lines,
        images=str(settings.get("images")), method=name_method(info, shape, search),
        searched=not training and search["method"] == "tas",
        transfer=str(settings["transfer"]) if training else "",
        other=unusual("train", settings).removeprefix(", ") if training else "",
        same=json.dumps(same, sort_keys=True), seed=number(settings["seed"]), epochs=epochs,
        precision=precision, machine=str(info.get("machine", MISSING)),
        unit=unit, target=target, cost=cost,
        tolerance=number(search["tolerance"]) if search else None,  # as a share of it
        macs=result["macs"], full_macs=tas.count_macs(shape.full),
        params=number(result["params"]), seconds=number(result["seconds"]),
        accuracy=number(result["accuracy"]) if training else None,  # in %
        teacher=None if teacher is None else number(teacher),       # its accuracy in %
        teacher_id=settings.get("teacher"))  # a checksum; None without one
