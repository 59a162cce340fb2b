"""Run a command of tas.py with steps that are a single launch each on a GPU.

    python tools/graphs.py search --data cifar10 --arch resnet56
    python tools/graphs.py --compile search --data cifar10 --arch resnet56

A step is captured as a CUDA graph at its first use and replayed, after two replayed steps have
agreed with two eager ones. --compile compiles the losses with torch.compile, on any device. Where
either fails, the forward or the backward pass, a warning for each kind of step says so, nothing is
left of the trial, and the steps are those of tas.py. (Before torch 2.13 a capture that CUDA aborts
may break its random generator and stop the command; the same command by tas.py goes on.) The
results are those of tas.py up to rounding.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas
import torch
from capture import capture, without_trace

plain_step = tas.take_step

class FastStep:
    """In the place of tas.take_step, whose arguments but for the batch are the same in a run."""

    def __init__(self, compiles=False, captures=True):
        self.compiles, self.captures, self.steps = compiles, captures, {}

    def __call__(self, args, net, optimizer, loss_function, *inputs):
        *given, x, y = inputs
        if optimizer not in self.steps:
            step = self.prepare(args, net, optimizer, loss_function, given, (x, y))
            self.steps[optimizer] = step
        return self.steps[optimizer](x, y)

    def can_capture(self, args):
        """Whether a step is to be captured: on one GPU."""
        alone = not torch.distributed.is_initialized()
        return self.captures and args.device.type == "cuda" and alone

    def prepare(self, args, net, optimizer, loss_function, given, batch):
        """The step, compiled and captured as far as this works here."""
        def step_of(loss):
            return functools.partial(plain_step, args, net, optimizer, loss, *given)

        step = plain = step_of(loss_function)
        try:
            with without_trace(net, optimizer, args.device):
                if self.compiles:
                    step = step_of(torch.compile(loss_function, fullgraph=True, dynamic=False))
                    step(*batch)  # compiles the backward pass, too
                if self.can_capture(args):
                    step = capture(step, net, optimizer, args.device, batch)
        except Exception as error:
            while error.__context__:  # to the first one; those after it follow from it
                error = error.__context__
            reason = str(error).strip().split("\n")[0][:100]
            print(f"warning: a step is not compiled or captured: {reason}", file=sys.stderr)
            return plain
        return step

    def forget_after(self, loop):
        """A loop of tas.py after which its steps, and the memory that they hold, are gone."""
        @functools.wraps(loop)
        def forgetting(*inputs):
            try:
                return loop(*inputs)
            finally:
                self.steps.clear()
        return forgetting

def main(argv=None):
    """Run the command of tas.py; returns its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    compiles = argv[:1] == ["--compile"]
    tas.take_step = step = FastStep(compiles)
    tas.train, tas.search = step.forget_after(tas.train), step.forget_after(tas.search)
    return tas.main(argv[compiles:])

if __name__ == "__main__":
    sys.exit(main())
