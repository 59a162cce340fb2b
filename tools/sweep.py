"""Prune to several targets with one teacher; ends in one table and one figure.

    python tools/sweep.py 0.5,0.3 --data cifar10 --arch resnet20 [other options of tas.py prune]

Every target is a `tas.py prune --flops TARGET` in a directory of its own below --out, and the first
one trains the teacher of all. Finished parts are kept: the same command goes on after an
interruption, and targets can be added at the end.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import report
import tas
from command import run

def take_own(options):
    """The options that are not the same for all targets, and the others."""
    parser = tas.Parser(prog="tools/sweep.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--flops", "--budget")
    parser.add_argument("--init")
    parser.add_argument("--out")
    return parser.parse_known_args(options)

def plan(targets, options):
    """The directory of all targets, and the command line of each."""
    own, shared = take_own(options)
    tas.require("" not in vars(own).values(), "--out or --init is empty")
    tas.require(own.flops is None, "leave --flops out; the targets come first, such as 0.5,0.3")
    args = tas.build_parser().parse_args(["prune", *shared])
    base, lines = Path(own.out or tas.base_directory(args)), []
    trained = [path.parent for path in sorted(base.glob("*/teacher/weights.pt"))]
    teacher = trained[0] if trained else base / targets[0] / "teacher"
    learns = not args.teacher and args.transfer != "none"
    for target in targets:
        lines.append(["prune", *shared, "--flops", target, "--out", str(base / target)])
        if learns and teacher != base / target / "teacher":
            lines[-1] += ["--teacher", str(teacher)]
        elif own.init:  # of the teacher
            lines[-1] += ["--init", own.init]
    return base, lines

def check(line):
    """All that can go wrong with a target, before hours of training for another one."""
    args = tas.build_parser().parse_args(line)
    for step in ("teacher", "search", "pruned"):
        directory = Path(args.out, step)
        if not (directory / "run.json").exists():
            tas.require_new(directory)
    args.command = "search"
    tas.plan_search(args)

def is_begun(line):
    """Whether there is a search of a target."""
    return Path(line[line.index("--out") + 1], "search/run.json").exists()

def sweep(args):
    """Prune to all targets and report; the exit status of the first part that fails, else 0."""
    tas.require(os.environ.get("WORLD_SIZE", "1") == "1", "torchrun takes one target at a time: "
                "tas.py prune for each, from the second on with --teacher of the first")
    targets = [target.strip() for target in args.targets.split(",")]
    base, lines = plan(targets, args.options)
    for line in lines:
        check(line)
    # Targets that were begun come first: one with other settings is refused before hours of others.
    for line in sorted(lines, key=lambda line: not is_begun(line)):
        status = tas.main(line)
        if status:
            return status
    return report.main([str(base)])

def main(argv=None):
    """Prune to several targets; returns the exit status."""
    parser = tas.Parser(prog="tools/sweep.py", description=__doc__.split("\n")[0])
    parser.add_argument("targets", metavar="TARGETS", help="as of --flops, such as 0.5,0.3")
    parser.add_argument("options", metavar="...", nargs=argparse.REMAINDER,
                        help="options of tas.py prune")
    return run(parser, sweep, argv)

if __name__ == "__main__":
    sys.exit(main())
