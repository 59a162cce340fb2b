"""Metrics of runs as TensorBoard events."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas

def write_events(runs, parent, directory):
    """Every number of the runs' metrics as TensorBoard events, a folder of them for each run."""
    with tas.errors_as("--tensorboard: {}; pip install tensorboard", ImportError):
        from torch.utils.tensorboard import SummaryWriter
    for each in runs:
        folder = directory / os.path.relpath(each.path, parent)
        for old in folder.glob("events.out.tfevents.*"):  # it would be drawn over the new one
            old.unlink()
        with SummaryWriter(folder) as writer:
            for line in each.lines:
                for name, value in line.items():
                    if name != "epoch" and type(value) in (int, float):
                        writer.add_scalar(name, value, line["epoch"])
