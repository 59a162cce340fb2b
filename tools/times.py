"""Accuracy of networks against the time that they take: a table and a figure.

    python tools/bench.py resnet20 --shape DIR/*/search --json FILE.json
    python tools/times.py FILE.json                        # FILE.md and FILE.png

The first command times the networks of some searches; what was trained of their shapes under
distillation is found beside each search.
"""

import io
import sys
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas
from command import printable, run
from figure import COLOURS, MARKERS
from finished import read_run
from report import table

def read_times(path):
    """{shape: {batch size: milliseconds}} of the inference in a file of tools/bench.py."""
    times = {}
    with tas.errors_as(f"{path} is no file of tools/bench.py ({{}})"):
        for row in tas.read_json(path)["rows"]:
            kind, *rest = row["case"].split(", ")
            if kind == "inference":
                shape, batch = ", ".join(rest[:-1]), int(rest[-1].removeprefix("batch "))
                times.setdefault(shape, {})[batch] = float(row["ms"])
    tas.require(times.get("unpruned"), f"{path} has no times of the unpruned network")
    return times

def find_network(search):
    """The finished training, by distillation, of the shape that a search found."""
    shape = tas.Shape.load(search)
    for path in sorted(Path(search).parent.glob("*/run.json")):
        found = read_run(path.parent)
        if found and found.transfer in ("kd", "init+kd") and found.shape == shape:
            return found
    raise tas.TASError(f"no network of {search} was trained by distillation beside it")

def draw(networks, times, path):
    """A panel for each batch size: a point for each network, the methods told apart."""
    from matplotlib.figure import Figure
    figure, buffer = Figure(figsize=(11, 4.5), layout="constrained"), io.BytesIO()
    unpruned = times["unpruned"]
    methods = sorted({network.method for network in networks.values()})
    for axis, batch in zip(figure.subplots(1, len(unpruned), squeeze=False)[0], unpruned):
        for method, colour, marker in zip(methods, cycle(COLOURS), cycle(MARKERS)):
            points = []
            for shape, network in networks.items():
                if network.method == method:
                    points.append((times[shape][batch] / unpruned[batch], network.accuracy))
            axis.plot(*zip(*sorted(points)), marker, color=colour, label=printable(method))
        axis.set(xlabel=f"time of a batch of {batch} (1: unpruned, {unpruned[batch]:.1f} ms)",
                 ylabel="test accuracy (%)", xlim=(0, None))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  frameon=False)
    figure.savefig(buffer, dpi=110)
    tas.write_file(path, buffer.getvalue())

def report(args):
    """Write the table and the figure, and print the former."""
    file, rows = Path(args.file), []
    times = read_times(file)
    networks = {shape: find_network(shape) for shape in times if shape != "unpruned"}
    tas.require(networks, f"{file} has no network but the unpruned one")
    for shape in sorted(networks, key=lambda shape: (networks[shape].macs, shape)):
        network = networks[shape]
        kept = network.macs / network.full_macs
        row = {"size found by": network.method, "MACs kept": f"{kept:.3f}"}
        for batch, unpruned in times["unpruned"].items():
            row[f"ms, batch {batch}"] = f"{times[shape][batch]:.2f}"
            row[f"of unpruned, batch {batch}"] = f"{times[shape][batch] / unpruned:.2f}"
        rows.append({**row, "accuracy %": f"{network.accuracy:.2f}", "run": Path(shape).parent})
    tas.write_file(file.with_suffix(".md"), table(rows).encode())
    draw(networks, times, file.with_suffix(".png"))
    print(f"{table(rows)}\n{printable(file.with_suffix('.md'))}, "
          f"{printable(file.with_suffix('.png'))}")

def main(argv=None):
    """Write the table and the figure; returns the exit status."""
    parser = tas.Parser(prog="tools/times.py", description=__doc__.split("\n")[0])
    parser.add_argument("file", metavar="FILE", help="JSON of tools/bench.py")
    return run(parser, report, argv)

if __name__ == "__main__":
    sys.exit(main())
