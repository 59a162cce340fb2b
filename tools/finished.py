"""The finished runs of a report: read, checked, named, and sorted into rows.

A run is what `tas.py train` or `search` leaves in a directory. Runs of other versions may lack an
entry; what is missing is None or "not recorded" here.
"""

import contextlib
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas

MISSING = "not recorded"
MEASURED = {  # what every line of metrics.jsonl must have
    "train": ("epoch", "test_accuracy"),
    "search": ("epoch", "expected_macs", "argmax_macs", "width_discrepancy", "depth_discrepancy")}
OWN_COLUMN = "arch", "data", "seed", "precision", "method", "transfer"  # of the table
SHARED = "batch_size", "lr"  # settings of a search that are told of the training alone
APART = "seed", "teacher"  # settings in which the runs of a row may differ

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

def argument(info, flag):
    """Name of the file or folder that a flag of the recorded command gives; "" without one."""
    found = re.search(rf" {flag}[ =](.+?)(?= --|$)", str(info.get("command")), re.DOTALL)
    text = found[1] if found else ""
    with contextlib.suppress(ValueError):  # older runs have no quotation marks
        text = shlex.split(text)[0] if text.startswith("'") else text
    return Path(text).name

def unusual(command, settings, *but):
    """The settings, `but` for some, that differ from the defaults of a command, in words."""
    text = ""
    line = [command, "--data=synthetic", "--arch=resnet20"]
    for name, usual in vars(tas.build_parser().parse_args(line)).items():
        value = settings.get(name, usual)
        # A default of None depends on other settings.
        if usual is not None and value != usual and name not in OWN_COLUMN + but:
            text += f", {name.replace('_', '-')} {str(value)[:40]}"
    return text

def name_method(info, shape, search):
    """How the size of a network was found."""
    if search:
        start = "warm " if "warm" in search else ""  # by tools/warm.py
        return start + str(search["method"]) + unusual("search", search, *SHARED)
    if shape == shape.full:
        return "unpruned"
    return f"given {argument(info, '--shape').removesuffix('.json') or 'shape'}"

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
    same = [info.get("precision")]  # all that the runs of a row have in common
    for each in (settings, search):
        apart = (*APART, "shape") if search else APART
        same.append({name: value for name, value in each.items() if name not in apart})
    data, epochs = settings["data"], str(settings["epochs"])
    if data == "folder":
        data = argument(info, "--data-dir") or MISSING
    if training and search.get("method") == "tas":
        epochs = f"{search['epochs']} + {epochs}"
    teacher = result.get("teacher_accuracy")
    return SimpleNamespace(
        path=path, training=training, arch=shape.arch, data=str(data), shape=shape, lines=lines,
        images=str(settings.get("images")), method=name_method(info, shape, search),
        searched=not training and search["method"] == "tas",
        transfer=str(settings["transfer"]) if training else "",
        other=unusual("train", settings).removeprefix(", ") if training else "",
        same=json.dumps(same, sort_keys=True), seed=number(settings["seed"]), epochs=epochs,
        precision=str(info.get("precision", MISSING)), machine=str(info.get("machine", MISSING)),
        target=number(search["target"]) if search else None,        # in MACs
        tolerance=number(search["tolerance"]) if search else None,  # as a share of it
        macs=result["macs"], full_macs=tas.count_macs(shape.full),
        params=number(result["params"]), seconds=number(result["seconds"]),
        accuracy=number(result["accuracy"]) if training else None,  # in %
        teacher=None if teacher is None else number(teacher),       # its accuracy in %
        has_teacher=settings.get("teacher") is not None)

def group_trainings(runs):
    """Rows: sorted lists of the trainings that differ in nothing but the seed."""
    groups = {}
    for each in sorted(runs, key=lambda each: each.seed):
        if each.training:
            key = each.arch, each.data, each.method, each.transfer, each.same
            groups.setdefault(key, []).append(each)
    return [groups[key] for key in sorted(groups)]
