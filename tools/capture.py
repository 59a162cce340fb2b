"""A step of tas.py as a CUDA graph: one launch in the place of a thousand.

What is captured has to prove itself: two replays must do what two plain steps do, at other rates
than that of the capture and the second on other images.
"""

import contextlib
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tas
import torch

TRIED_RATES = 0.01, 0.02  # of the two steps that are compared
MOST_OFF = 0.15  # of their change; a lost momentum is 0.2 off, another order of sums 0.1 in bf16

@contextlib.contextmanager
def without_trace(net, optimizer, device):
    """Undo what is done inside: to parameters, buffers, the optimiser's state, random numbers."""
    def tensors():
        moments = itertools.chain(*[state.values() for state in optimizer.state.values()])
        return [*net.parameters(), *net.buffers(), *filter(torch.is_tensor, moments)]

    before = {tensor: tensor.detach().clone() for tensor in tensors()}
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for tensor in tensors():  # a new one is a moment, for which 0 is as good as nothing
                tensor.copy_(before[tensor] if tensor in before else torch.zeros_like(tensor))

def try_out(step, net, optimizer, device, batch):
    """The losses of two steps, [2], and how they change all parameters, [all]; both are undone. The
    rates are not those of the run, which may be next to nothing, and the batches differ."""
    group, (x, y), losses = optimizer.param_groups[0], batch, []
    usual = group["lr"]
    with without_trace(net, optimizer, device):
        before = [p.detach().clone() for p in net.parameters()]
        try:
            for rate, images, labels in zip(TRIED_RATES, (x, -x), (y, y.flip(0))):
                group["lr"] = rate
                losses.append(step(images, labels)[0])
        finally:
            group["lr"] = usual
        changes = [(p.detach() - old).flatten() for p, old in zip(net.parameters(), before)]
    return torch.stack(losses), torch.cat(changes)

def capture(step, net, optimizer, device, batch):
    """A step of a batch as a CUDA graph, which must do in two steps what the step itself does."""
    group, graph, stream = optimizer.param_groups[0], torch.cuda.CUDAGraph(), torch.cuda.Stream()
    rate = torch.tensor(float(group["lr"]), device=device)  # read by the graph, set at each replay
    inputs = [t.clone() for t in batch]

    def replay(*batch):
        rate.fill_(group["lr"])
        for old, new in zip(inputs, batch):
            old.copy_(new)
        graph.replay()
        return result.clone()

    torch.cuda.synchronize()
    with torch.cuda.stream(stream):  # and back, also where the capture fails
        losses, change = try_out(step, net, optimizer, device, batch)  # warms up, too
        torch.cuda.synchronize()
        before, group["lr"] = dict(group), rate
        if "capturable" in group:
            group["capturable"] = True
        try:  # other threads, which copy images, may go on
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = step(*inputs)
        finally:
            group.update(before)
    torch.cuda.synchronize()
    replayed, replayed_change = try_out(replay, net, optimizer, device, batch)
    torch.testing.assert_close(replayed, losses, rtol=1e-2, atol=0)
    off = float((replayed_change - change).norm() / change.norm())
    tas.require(off < MOST_OFF, f"replayed steps are {off:.0%} off")
    return replay
