"""The parts of the report's figure that show searches: one with its sizes, or many compared."""

import itertools
import os
from pathlib import Path

from command import printable

BLUE, RED, GREEN, PINK = "#1f77b4", "#d62728", "#2ca02c", "#e377c2"
UNPRUNED = "0.85"  # grey

def plot(axis, lines, name, scale, **style):
    """A value of the metrics over the epochs."""
    epochs, values = [line["epoch"] for line in lines], [scale * line[name] for line in lines]
    axis.plot(epochs, values, markersize=3, linewidth=1.2, **style)

def add_legend(axis):
    """A legend above the panel, where it hides nothing."""
    axis.legend(frameon=False, fontsize="small", ncols=3, loc="lower left", bbox_to_anchor=(0, 1),
                borderaxespad=0)

def draw_search(part, search):
    """Expected cost and that of the most probable network against the target band, and how decided
    the sizes are, over the epochs of a search."""
    share, half = 100 / search.target, 100 * search.tolerance
    cost, decided = part.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    cost.axhspan(100 - half, 100 + half, color=UNPRUNED, label="target band")
    plot(cost, search.lines, "expected_macs", share, color=BLUE, marker="o", label="expected")
    plot(cost, search.lines, "argmax_macs", share, color=RED, marker="s", label="most probable")
    plot(decided, search.lines, "width_discrepancy", 1, color=GREEN, marker="o", label="widths")
    plot(decided, search.lines, "depth_discrepancy", 1, color=PINK, marker="s", label="depths")
    cost.set_ylabel(f"{printable(search.unit)} (% of target)")
    decided.set(xlabel="epoch of the search", ylabel="first minus second\nprobability")
    decided.xaxis.get_major_locator().set_params(integer=True)
    add_legend(cost)
    add_legend(decided)
    part.suptitle("the search of the sizes below", fontsize="medium")

def short_names(searches):
    """Directories of searches, below the one that all share and without "search" at the end."""
    paths = [Path(search.path).resolve() for search in searches]
    paths = [path.parent if path.name == "search" else path for path in paths]
    parent = os.path.commonpath([path.parent for path in paths])
    return [os.path.relpath(path, parent) for path in paths]

def search_rows(searches):
    """A dict for each search: what it found, and its last metrics."""
    rows = []
    for name, search in zip(short_names(searches), searches):
        last = search.lines[-1]
        rows.append({
            "run": name, "arch": search.shape.arch, "size found by": search.method,
            "MACs": f"{search.macs / 1e6:.2f}M",
            "of the target": f"{search.cost / search.target:.1%}",
            "most probable network, of the target": f"{last['argmax_macs'] / search.target:.1%}",
            "accuracy of sampled networks %": f"{last['val_accuracy']:.2f}",
            "first minus second probability, widths": f"{last['width_discrepancy']:.3f}",
            "depths": f"{last['depth_discrepancy']:.3f}"})
    return rows

def draw_searches(figure, searches):
    """Searches over each other: MACs against the target, how decided the sizes are, and accuracy of
    the sampled networks, over the epochs."""
    import matplotlib
    axes = figure.subplots(2, 2, sharex=True)
    names = {"argmax_macs": "cost of the most probable (of the target)",
             "val_accuracy": "accuracy of sampled networks,\nvalidation half (%)",
             "width_discrepancy": "widths: first minus second\nprobability",
             "depth_discrepancy": "depths: first minus second\nprobability"}
    colors = matplotlib.colormaps["tab10"].colors
    for axis, (name, label) in zip(axes.flat, names.items()):
        for i, (run, search) in enumerate(zip(short_names(searches), searches)):
            scale = 1 / search.target if name == "argmax_macs" else 1
            plot(axis, search.lines, name, scale, color=colors[i % 10], marker="osv^D"[i // 10 % 5],
                 label=printable(run)[:60])
        axis.set_ylabel(label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    first = searches[0]
    axes[0, 0].axhspan(1 - first.tolerance, 1 + first.tolerance, color=UNPRUNED, zorder=0)
    for axis in axes[1]:
        axis.set_xlabel("epoch of the search")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False,
                  fontsize="small")

def draw_sizes(part, search):
    """Found widths over the unpruned ones, conv by conv."""
    shape, full, axis = search.shape, search.shape.full, part.subplots()
    found = [shape.stem]
    for blocks, unpruned in zip(shape.stages, full.stages):
        axis.axvline(len(found) - 0.5, color="0.4", linewidth=0.8, linestyle=":")
        found += itertools.chain(*blocks)
        found += [0] * len(unpruned[0]) * (len(unpruned) - len(blocks))
    axis.bar(range(len(found)), full.convs, color=UNPRUNED, width=0.9, label="unpruned")
    axis.bar(range(len(found)), found, color=BLUE, width=0.9, label="found")
    dropped = [i for i, width in enumerate(found) if width == 0]
    if dropped:
        middle = [full.convs[i] / 2 for i in dropped]
        axis.plot(dropped, middle, "x", color=RED, label="conv of a dropped block")
    axis.set(xlabel="conv, in order (dotted: a stage begins)", ylabel="channels",
             xlim=(-0.6, len(found) - 0.4))
    axis.xaxis.get_major_locator().set_params(integer=True)
    add_legend(axis)
    kept, met = search.macs / search.full_macs, search.cost / search.target
    title = (f"{search.path}, seed {search.seed}: {kept:.1%} of the MACs of {shape.arch}, "
             f"{met:.1%} of the target in {search.unit}")
    part.suptitle(printable(title)[:150], fontsize="medium")
