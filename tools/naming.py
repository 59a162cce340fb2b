"""How the size of a network was found, in words, from what its runs recorded."""

import contextlib
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas

MACS = "MACs"  # the unit of a search without --cost
MISSING = "not recorded"
OWN_COLUMN = "arch", "data", "seed", "precision", "method", "transfer"  # of the table
SHARED = "batch_size", "lr"  # settings of a search that are told of the training alone

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
        unit = str(search.get("unit", MACS))
        under = "" if unit == MACS else f", in {unit}"  # under a table of --cost
        return start + str(search["method"]) + unusual("search", search, *SHARED) + under
    if shape == shape.full:
        return "unpruned"
    return f"given {argument(info, '--shape').removesuffix('.json') or 'shape'}"
