"""Time training, search, batching and inference of an arch, in turns in one process.

    python tools/bench.py resnet56 --shape shapes/cifar10-resnet56.json --json bench.json

Cases take turns; of each its median is printed, the ratio to a training step or, for inference, to
the unpruned network, and on a GPU the most memory held meanwhile (not of graphs). Without --shape
all widths are scaled to half of the MACs. --how: eager, CUDA graphs, or compiled by torch.compile.
"""

import argparse
import functools
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas
import torch
from command import printable, run
from graphs import FastStep
from timing import medians

def make_step(how):
    """What takes the place of tas.take_step in one case: a FastStep is of one network."""
    return {"eager": tas.take_step, "graphs": FastStep(captures=True),
            "compiled": FastStep(compiles=True, captures=False)}[how]

def search_case(args, space, batch, candidates):
    """Function of one round of the search: a step of the weights, then one of alpha and beta."""
    args = argparse.Namespace(**{**vars(args), "num_samples": candidates})
    net = tas.to_device(tas.SuperResNet(space), args)
    weights = [p for name, p in net.named_parameters() if name not in ("alpha", "beta")]
    optimizer = tas.sgd(weights, args)
    arch_optimizer = torch.optim.Adam([net.alpha, net.beta], tas.ARCH_LR, fused=True)
    target, tau = tas.count_macs(space.full) / 2, torch.ones((), device=args.device)
    step = make_step(args.how)
    return lambda: (step(args, net, optimizer, tas.search_loss, tau, *batch),
                    step(args, net, arch_optimizer, tas.architecture_loss, tau, target, *batch))

@torch.no_grad()
def infer(args, net, images):
    """One forward pass."""
    with tas.autocast(args):
        return net(images)

def make_cases(args, space, shapes):
    """name -> function of all that is timed, in the precision and by the steps of args."""
    size, n = space.full.image_size, args.batch_size
    pixels = torch.randint(256, (n, size, size, 3), dtype=torch.uint8)
    split, order = tas.SmallImages(pixels, torch.randint(10, (n,)), args.device), torch.arange(n)
    batch = next(split.batches(order, n, True))
    net = tas.to_device(tas.pad_channels(tas.ResNet(space.full)), args)
    optimizer = tas.sgd(net.parameters(), args)
    step = make_step(args.how)
    cases = {
        "training": lambda: step(args, net, optimizer, tas.training_loss, None, *batch),
        "batching, augmentation": lambda: next(split.batches(order, n, True))}
    for k in args.candidates or (2, space.num_widths):
        cases[f"search round, {k} candidates"] = search_case(args, space, batch, k)
    for name, shape in shapes.items():
        deployed = tas.to_device(tas.ResNet(shape).eval(), args)
        for images in (batch[0][:1], batch[0]):
            case = functools.partial(infer, args, deployed, images)
            cases[f"inference, {name}, batch {len(images)}"] = case
    return cases

def read_shapes(args, space):
    """name -> Shape: the unpruned one, those of --shape or, without any, one of half the MACs."""
    shapes, full = {"unpruned": space.full}, space.full
    for path in args.shape:
        shape = shapes[path] = tas.Shape.load(path)
        tas.require((shape.arch, shape.image_size) == (full.arch, full.image_size),
                    f"{path} is for {shape.arch} --image-size {shape.image_size}")
    if not args.shape:
        shapes["uniform"] = tas.scale_shape(space, tas.count_macs(full) / 2)
    return shapes

def bench(args):
    """Time all cases, print the table and write it to --json."""
    # The program's own defaults serve for all that its steps read besides.
    defaults = tas.build_parser().parse_args(["search", "--data=synthetic", f"--arch={args.arch}"])
    args = argparse.Namespace(**{**vars(defaults), **vars(args)})
    args.lr, args.weight_decay = 0.01, tas.WEIGHT_DECAY  # noise diverges at the usual rate
    tas.setup(args)
    tas.require("graphs" not in args.how or FastStep().can_capture(args), "graphs need a GPU")
    space = tas.Space(args.arch, 10, args.image_size).to(args.device)
    shapes, cases, rows, macs = read_shapes(args, space), {}, [], {}
    for precision, how in itertools.product(args.precision, args.how):
        own = argparse.Namespace(**{**vars(args), "precision": precision, "how": how})
        for name, function in make_cases(own, space, shapes).items():
            if how == args.how[0] or name.startswith(("training", "search")):  # others are eager
                cases[name, precision, how] = function
    times = medians(cases, args.rounds, args.device)
    for (name, precision, how), (ms, memory) in times.items():
        inference = name.startswith("inference")
        base = f"inference, unpruned, {name.split(', ')[-1]}" if inference else "training"
        ratio = ms / times[base, precision, args.how[0]][0]
        memory = None if how == "graphs" else memory
        rows.append({"case": name, "precision": precision, "how": how, "ms": ms, "to": base,
                     "ratio": ratio, "memory_mb": memory})
        figures = f"{ms:>9.2f} ms {ratio:>7.3f} x {base}" + (f"{memory:>9.0f} MB" if memory else "")
        print(printable(f"{precision} {how:<9}{name:<46}{figures}"))
    for name, shape in shapes.items():
        macs[name] = tas.count_macs(shape) / tas.count_macs(space.full)
        print(printable(f"MACs  {name:<48}{macs[name]:>21.3f} x unpruned"))
    if args.json:
        found = {"arch": args.arch, "image_size": space.full.image_size, "macs_ratio": macs,
                 "batch_size": args.batch_size, "rows": rows, "torch": torch.__version__,
                 "machine": tas.machine(args.device)}
        tas.write_file(args.json, json.dumps(found, indent=1).encode() + b"\n")

def main(argv=None):
    """Print the times; returns the exit status."""
    flags = tas.Parser(prog="tools/bench.py", description=__doc__.split("\n")[0])
    flags.add_argument("arch", metavar="ARCH", choices=tuple(tas.ARCHS), help=" ".join(tas.ARCHS))
    flags.add_argument("--shape", nargs="+", default=[], help="shape files or run directories")
    flags.add_argument("--batch-size", type=tas.number(int, 2, 10 ** 5), default=256)
    flags.add_argument("--image-size", type=tas.number(int, 8, 1024), help="pixels (32 or 224)")
    flags.add_argument("--rounds", type=tas.number(int, 1, 1000), default=9)
    flags.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    flags.add_argument("--how", nargs="+", choices=("eager", "graphs", "compiled"),
                       default=["eager"])
    flags.add_argument("--candidates", nargs="+", type=tas.number(int, 1, 8), help="(2 and all)")
    flags.add_argument("--device", default="auto", help="cpu, cuda, ...")
    flags.add_argument("--json", metavar="FILE", help="write the times, too")
    return run(flags, bench, argv)

if __name__ == "__main__":
    sys.exit(main())
