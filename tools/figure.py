"""The figure of the report: accuracy against MACs, test curves, and one search with its sizes."""

import io
import statistics
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas
from command import printable
from trajectory import draw_search, draw_searches, draw_sizes

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22",
           "#17becf", "#000000", "#7a0177", "#006d2c",
           "#a6761d")  # one more than the markers: 13 x 12 pairs differ
MARKERS = "osD^vPX*<>ph"
FILLS = {"none": "none", "init": "left", "kd": "full"}  # of the markers, by transfer
DASHES = {"none": ":", "init": "--", "kd": "-"}         # of the curves, by transfer
UNPRUNED = {"color": "0.4", "marker": "o"}

def name_series(groups):
    """Legend entries of the rows: the method, and what tells rows of one method apart."""
    sets = {(group[0].arch, group[0].data) for group in groups}
    names, details = [], []
    for group in groups:
        first = group[0]
        names.append(first.method if len(sets) == 1
                     else f"{first.arch} on {first.data}: {first.method}")
        details.append((f"{first.epochs} epochs", first.other))
    series = []
    for name, own in zip(names, details):
        rivals = [other for other, theirs in zip(details, names) if theirs == name]
        differ = [text for text, values in zip(own, zip(*rivals)) if text and len({*values}) > 1]
        series.append(printable(", ".join([name, *differ]))[:60])
    return series

def spread(values):
    """Standard deviation; None, no error bar, of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None

def draw_accuracy(axis, groups, names, styles):
    """Accuracy against MACs; the rows of one method at several targets are joined."""
    points = {}
    for group, name in zip(groups, names):
        macs, accuracy = [run.macs / 1e6 for run in group], [run.accuracy for run in group]
        x, y = statistics.mean(macs), statistics.mean(accuracy)
        if name == "unpruned" and len(groups) > 1:  # far to the right of all others
            axis.axhline(y, color=UNPRUNED["color"], linestyle="--", linewidth=1)
            axis.annotate(f"unpruned: {y:.2f}% at {x:.1f}M", (0.02, y), (0, 3), fontsize="small",
                          xycoords=("axes fraction", "data"), textcoords="offset points")
            continue
        transfer = group[0].transfer
        axis.errorbar(x, y, spread(accuracy), spread(macs), capsize=2, elinewidth=0.8,
                      fillstyle=FILLS.get(transfer, "top"), **styles[name])
        points.setdefault((name, transfer), []).append((x, y))
    for (name, _), line in points.items():
        axis.plot(*zip(*sorted(line)), color=styles[name]["color"], linewidth=0.8)
    axis.set(xlabel="MACs (M)", ylabel="test accuracy (%)")
    axis.set_title("mean ± standard deviation over seeds", fontsize="medium")

def draw_curves(axis, groups, names, styles):
    """Test accuracy over the epochs, the mean over the seeds, without the steep beginning."""
    lowest = []
    for group, name in zip(groups, names):
        curves = []
        for run in group:
            curves.append([line["test_accuracy"] for line in run.lines])
        mean = [statistics.mean(values) for values in zip(*curves)]
        axis.plot(range(1, len(mean) + 1), mean, linewidth=1.2, color=styles[name]["color"],
                  linestyle=DASHES.get(group[0].transfer, "-."))
        lowest += mean[len(mean) // 4:][:1]
    if lowest:
        axis.set_ylim(bottom=min(lowest))
    axis.set(xlabel="epoch", ylabel="test accuracy (%)")
    axis.set_title("mean over seeds", fontsize="medium")
    axis.xaxis.get_major_locator().set_params(integer=True)

def draw_trainings(part, groups):
    """Two panels with one legend."""
    from matplotlib.lines import Line2D
    names, styles, handles = name_series(groups), {}, []
    for name in sorted(set(names)):
        i = len(styles)
        styles[name] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        if name == "unpruned":
            styles[name] = UNPRUNED
        handles.append(Line2D([], [], label=name, linestyle="", **styles[name]))
    for transfer in sorted({group[0].transfer for group in groups}):
        handles.append(Line2D([], [], label=f"transfer: {printable(transfer)[:60]}", color="black",
                              marker="o", fillstyle=FILLS.get(transfer, "top"),
                              linestyle=DASHES.get(transfer, "-.")))
    accuracy, curves = part.subplots(1, 2)
    draw_accuracy(accuracy, groups, names, styles)
    draw_curves(curves, groups, names, styles)
    part.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False,
                fontsize="small")

def draw(groups, searches, path):
    """Write the PNG of rows, lists of Finished trainings, and of the first of Finished searches, or
    of what there is of them; without trainings, of all searches against each other."""
    import matplotlib
    from matplotlib.figure import Figure
    # Names may have dollar signs, which are no formulas, and letters that the font lacks.
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search = searches[0] if searches else None
        height = 8.5 if search else 5
        figure, buffer = Figure(figsize=(14, height), layout="constrained"), io.BytesIO()
        top = figure
        if len(searches) > 1 and not groups:
            draw_searches(figure, searches)
            search = None
        if search:
            top, bottom = figure.subfigures(2, 1, height_ratios=(3, 2))
            draw_sizes(bottom, search)
        left = right = top
        if search and groups:
            left, right = top.subfigures(1, 2, width_ratios=(2, 1))
        if groups:
            draw_trainings(left, groups)
        if search:
            draw_search(right, search)
        figure.savefig(buffer, dpi=110)
    tas.write_file(path, buffer.getvalue())
