"""The rows of a report: trainings that are alike but for their seeds."""

import json
import statistics

from naming import MACS, MISSING

SHOWN = {"arch", "target", "shape", "method"}  # elsewhere in the table

def group_trainings(runs):
    """Rows: lists of trainings by seed. Each seed may have a teacher and a precision of its own,
    which do not tell rows apart; where one seed had several, each of them has a row."""
    groups, rows = {}, []
    for each in sorted(runs, key=lambda each: each.seed):
        if each.training:
            key = (each.arch, each.data, each.method, each.transfer, each.target or 0, each.same)
            groups.setdefault(key, []).append(each)
    for _, group in sorted(groups.items()):
        for part in split(group, "teacher", "teacher_id"):
            rows += split(part, "precision", "precision")
    return tell_apart(rows)

def split(group, word, name):
    """The group alone or, where one seed has several values of a name, a part for each value."""
    pairs = {(each.seed, getattr(each, name)) for each in group}
    if len(pairs) == len({seed for seed, _ in pairs}):
        return [group]
    parts = {}
    for each in group:
        add_setting(each, f"{word} {getattr(each, name)}")
        parts.setdefault(getattr(each, name), []).append(each)
    return list(parts.values())

def add_setting(training, words):
    """Put a setting among those that the table shows."""
    training.other = ", ".join(filter(None, (training.other, words)))

def tell_apart(rows):
    """The rows; those that would look alike show the settings in which they differ."""
    alike = {}
    for row in rows:
        first = row[0]
        looks = (first.arch, first.data, first.method, first.transfer, first.epochs, first.other)
        alike.setdefault(looks, []).append(row)
    for group in alike.values():
        settings = zip(*[json.loads(row[0].same) for row in group])
        for step, each in zip(("", "search "), settings):
            for name in sorted(set().union(*each) - SHOWN):
                values = [str(one.get(name, MISSING)) for one in each]
                if len(set(values)) > 1:
                    for row, value in zip(group, values):
                        words = f"{step}{name.replace('_', '-')} {value[:40]}"
                        for training in row:
                            add_setting(training, words)
    return rows

def mean(values, digits=2):
    """Mean ± standard deviation in words."""
    if None in values:
        return MISSING
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"

def teacher_cells(group):
    """The teacher's accuracy, and how far below it the row is."""
    if not any(each.teacher_id is not None for each in group):
        return "-", "-"
    teachers = [each.teacher for each in group]
    if None in teachers:
        return MISSING, MISSING
    return mean(teachers), mean([each.teacher - each.accuracy for each in group])

def cost_cells(group):
    """The target, and the cost of the networks where it is counted in another unit than MACs."""
    first = group[0]
    if first.target is None:
        return "-", "-"
    if first.unit == MACS:
        return f"{first.target / 1e6:.2f}M MACs", "-"
    return f"{first.target:.4g} {first.unit}", mean([each.cost for each in group])
