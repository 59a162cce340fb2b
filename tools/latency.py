"""Measure what every layer of an arch costs in time, for `tas.py search --cost FILE --budget 0.6`.

    python tools/latency.py resnet20 --batch-size 256 --precision bf16 -o FILE

Times every distinct layer at every pair of candidate widths, as the network runs it: a conv with
its BN in eval mode and its ReLU, the stem with its pooling, the shortcut with the addition, the
classifier with the mean; channels_last, unfolded. Goes on where it was interrupted. Ends with a
check: what the table predicts for random sizes against what they take, drawn beside FILE.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas
import torch
from command import printable, run
from layers import describe_layers, make_case
from timing import medians

CHECKED = 20  # random shapes

def measure(args, space, found):
    """Fill found["cases"], milliseconds by layer and widths, and write it after each step."""
    from tqdm import tqdm
    widths = [*space.widths, *[space.widths[i] for i in space.last_conv[:, 0].tolist()], (1,)]
    steps = {}  # (layer, c_in) -> candidates of c_out, of all convs that are such a layer
    for layer, i, o in zip(describe_layers(space), space.c_in.tolist(), space.c_out.tolist()):
        for c_in in widths[i]:
            step = layer, 3 if layer[0] == "stem" else c_in
            steps[step] = sorted({*steps.get(step, ()), *widths[o]})
    for (layer, c_in), outputs in tqdm(steps.items(), unit="step", disable=None):
        names = {c_out: f"{layer} {c_in} {c_out}" for c_out in outputs}
        if all(name in found["cases"] for name in names.values()):
            continue
        x = torch.randn(args.batch_size, c_in, layer[3], layer[3], device=args.device)
        if args.precision == "bf16" and layer[0] != "stem":
            x = x.bfloat16()
        x = x.contiguous(memory_format=torch.channels_last)
        cases = {name: make_case(args, space, layer, x, c) for c, name in names.items()}
        times = medians(cases, args.rounds, args.device)
        found["cases"] |= {name: ms for name, (ms, _) in times.items()}
        tas.write_file(args.out, json.dumps(found).encode())
    cost = torch.zeros_like(space.cost)
    for table, layer, i, o in zip(cost, describe_layers(space), space.c_in, space.c_out):
        for a, c_in in enumerate(widths[i]):
            for b, c_out in enumerate(widths[o]):
                c_in = 3 if layer[0] == "stem" else c_in
                table[a, b] = found["cases"][f"{layer} {c_in} {c_out}"]
    found["cost"] = cost.tolist()

def check(args, space, found):
    """Predicted and measured latencies of random shapes: their correlation and mean error."""
    full, cases, predicted = space.cost_of(space.full), {}, []
    for i in range(CHECKED):
        shape = tas.draw_shape(space, full * (0.45 + 0.5 * i / CHECKED), 0.2)
        net = tas.to_device(tas.ResNet(shape).eval(), args)
        x = torch.randn(args.batch_size, 3, shape.image_size, shape.image_size, device=args.device)

        @torch.no_grad()
        def case(net=net, x=x.contiguous(memory_format=torch.channels_last)):
            with tas.autocast(args):
                net(x)
        cases[i] = case
        predicted.append(space.cost_of(shape))
    measured = [ms for ms, _ in medians(cases, args.rounds, args.device).values()]
    a, b = torch.tensor(predicted), torch.tensor(measured)
    found["check"] = {"predicted": predicted, "measured": measured,
                      "correlation": float(torch.corrcoef(torch.stack([a, b]))[0, 1]),
                      "mean_error": float(((a - b).abs() / b).mean())}

def draw(found, path):
    """A scatter plot of the check."""
    from matplotlib.figure import Figure
    figure, one = Figure(figsize=(5, 5), layout="constrained"), found["check"]
    axis, most = figure.subplots(), 1.05 * max(one["predicted"] + one["measured"])
    axis.plot([0, most], [0, most], color="0.7", linewidth=1)
    axis.plot(one["predicted"], one["measured"], "o", color="#1f77b4")
    axis.set(xlabel=f"predicted ({found['unit']})", ylabel=f"measured ({found['unit']})",
             xlim=(0, most), ylim=(0, most), title=f"{found['arch']}, random shapes:\ncorrelation "
             f"{one['correlation']:.3f}, mean error {one['mean_error']:.1%}")
    figure.savefig(path, dpi=110)

def latency(args):
    """Measure, check, write."""
    defaults = tas.build_parser().parse_args(["search", "--data=synthetic", f"--arch={args.arch}"])
    args = argparse.Namespace(**{**vars(defaults), **vars(args)})
    tas.setup(args)
    args.precision = tas.native_precision(args)
    space = tas.Space(args.arch, args.classes, args.image_size, round_to=args.round)
    found = {"arch": args.arch, "classes": args.classes, "image_size": space.full.image_size,
             "unit": "ms", "widths": [list(row) for row in space.widths],
             "batch_size": args.batch_size, "precision": args.precision, "torch": torch.__version__,
             "machine": tas.machine(args.device), "cases": {}}
    if Path(args.out).exists():
        old = tas.read_json(args.out)
        odd = [name for name in found if name != "cases" and old.get(name) != found[name]]
        tas.require(not odd, f"{args.out} has another {', '.join(odd)}; choose another file")
        found["cases"] = old["cases"]
    measure(args, space, found)
    tas.write_file(args.out, json.dumps(found).encode())
    space.load_cost(args.out)
    check(args, space, found)
    tas.write_file(args.out, json.dumps(found).encode())
    draw(found, Path(args.out).with_suffix(".png"))
    print(printable(f"{args.out}: {len(found['cases'])} cases; unpruned "
                    f"{space.show(space.cost_of(space.full))}; {CHECKED} random shapes: correlation"
                    f" {found['check']['correlation']:.3f}, mean error "
                    f"{found['check']['mean_error']:.1%}"))
    print(printable(f"next: python tas.py search --data ... --arch {args.arch} --cost {args.out} "
                    "--budget 0.6"))

def main(argv=None):
    """Write the table; returns the exit status."""
    flags = tas.Parser(prog="tools/latency.py", description=__doc__.split("\n")[0])
    flags.add_argument("arch", metavar="ARCH", choices=tuple(tas.ARCHS), help=" ".join(tas.ARCHS))
    flags.add_argument("-o", "--out", metavar="FILE", required=True, help="the JSON to write")
    flags.add_argument("--batch-size", type=tas.number(int, 1, 10 ** 5), default=256)
    flags.add_argument("--image-size", type=tas.number(int, 8, 1024), help="pixels (32 or 224)")
    flags.add_argument("--classes", type=tas.number(int, 2, 25_000), default=10)
    flags.add_argument("--round", type=tas.number(int, 1, 64), default=1, help="as of the search")
    flags.add_argument("--rounds", type=tas.number(int, 1, 1000), default=9, help="of timing")
    flags.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    flags.add_argument("--device", default="auto", help="cpu, cuda, ...")
    return run(flags, latency, argv)

if __name__ == "__main__":
    sys.exit(main())
