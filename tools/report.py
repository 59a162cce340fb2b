"""One Markdown table and one figure of all finished runs below some directories.

    python tools/report.py runs/cifar10-resnet56              # report.md and report.png in there
    python tools/report.py DIR ... --out DIR [--tensorboard]

Networks that differ in nothing but the seed share a row. A second table has numbers that others
published for the same arch and data set. The figure's search is the first below the first DIR.
"""

import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas
from command import markdown, printable, run
from events import write_events
from figure import draw
from finished import read_run
from rows import cost_cells, group_trainings, mean, teacher_cells
from trajectory import search_rows

PAPER = tas.read_json(Path(__file__).with_name("paper.json"))
NEAR = 0.1  # of the MACs, by which a network of the paper may differ to stand beside ours

def find_runs(directories):
    """All finished runs, each once. One that is damaged is named on stderr and left out."""
    runs = {}
    for directory in directories:
        tas.require(Path(directory).is_dir(), f"{directory} is no directory")
        for path in sorted(file.parent for file in Path(directory).rglob("run.json")):
            try:
                found = read_run(path)
            except tas.TASError as error:
                tas.warn(printable(f"left out {path}: {error}"))
                continue
            if found:
                runs.setdefault(path.resolve(), found)
    tas.require(runs, f"no finished run below {', '.join(directories)}; train or search first")
    return list(runs.values())

def published(groups):
    """Rows of paper.json, column -> text, at the same arch and data set as rows of ours."""
    ours, rows = {(group[0].arch, group[0].data, group[0].images) for group in groups}, []
    for table in PAPER["tables"]:
        for cells in table["rows"]:
            if (cells[0], table["data"], table["images"]) in ours:
                rows.append({"data": table["data"], **dict(zip(PAPER["columns"], cells))})
    return rows

def in_macs(text):
    """The number of a text such as 59.5M."""
    return float(text[:-1]) * {"M": 1e6, "G": 1e9}[text[-1]]

def beside(group, others):
    """What the paper has for such a network and transfer at about the same MACs; "-" if nothing."""
    first, macs = group[0], statistics.mean(each.macs for each in group)
    ours = first.method, first.transfer, first.arch, first.data
    for other in others:
        theirs = other["size found by"].lower(), other["transfer"], other["arch"], other["data"]
        size, accuracy = other["MACs"], other["accuracy %"]
        if theirs == ours and not size:  # of unpruned networks
            return accuracy
        if theirs == ours and abs(in_macs(size) - macs) <= NEAR * macs:
            return f"{accuracy} at {size}"
    return "-"

def row(group, parent, others):
    """Our row, column -> text."""
    first = group[0]
    teacher, drop = teacher_cells(group)
    target, reached = cost_cells(group)
    return {
        "arch": first.arch, "data": first.data, "size found by": first.method,
        "transfer": first.transfer,
        "target": target, "reached": reached,
        "MACs M": mean([each.macs / 1e6 for each in group]),
        "removed %": mean([100 - 100 * each.macs / each.full_macs for each in group], 1),
        "params M": mean([each.params / 1e6 for each in group], 3),
        "teacher %": teacher, "accuracy %": mean([each.accuracy for each in group]), "drop": drop,
        "seeds": " ".join(str(each.seed) for each in group), "epochs": first.epochs,
        "precision": ", ".join(sorted({each.precision for each in group})),
        "other settings": first.other,
        "training minutes": mean([each.seconds / 60 for each in group], 1),
        "paper (as transcribed)": beside(group, others),
        "runs": ", ".join(os.path.relpath(each.path, parent) for each in group)}

def table(rows):
    """A Markdown table of dicts with the same keys."""
    text = f"| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}\n"
    for cells in rows:
        text += f"| {' | '.join(markdown(cell) or '-' for cell in cells.values())} |\n"
    return text

def report(args):
    """Write the tables and the figure, and print the former."""
    runs, out = find_runs(args.dirs), Path(args.out or args.dirs[0])
    parent = os.path.commonpath([os.path.abspath(each.path.parent) for each in runs])
    parent = os.path.relpath(parent)
    groups = group_trainings(runs)
    others = published(groups)
    searches = [each for each in runs if each.searched and each.lines]
    text = "No network has been trained yet.\n"
    if groups:
        text = table([row(group, parent, others) for group in groups])
        text += ("\nAccuracy is that of the last epoch on the test images, mean ± standard "
                 "deviation over the seeds.\n")
    elif searches:
        text += f"\n{table(search_rows(searches))}"
    machines = "; ".join(sorted({each.machine for each in runs}))
    text += f"\nRuns are in {markdown(parent)}. Machine: {markdown(machines)}.\n"
    if others:
        text += f"\nTranscribed, not measured here: {PAPER['source']}.\n\n{table(others)}"
    tas.write_file(out / "report.md", text.encode())
    draw(groups, searches, out / "report.png")
    print(f"{text}\n{printable(out / 'report.md')}, {printable(out / 'report.png')}")
    if args.tensorboard:
        write_events(runs, parent, out / "tensorboard")

def main(argv=None):
    """Write the report; returns the exit status."""
    parser = tas.Parser(prog="tools/report.py", description=__doc__.split("\n")[0])
    parser.add_argument("dirs", metavar="DIR", nargs="+", help="directories with runs in them")
    parser.add_argument("--out", metavar="DIR", help="where report.md and .png go (the first DIR)")
    parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard events, too")
    return run(parser, report, argv)

if __name__ == "__main__":
    sys.exit(main())
