"""Times of functions against each other."""

import statistics
import time

import torch

def medians(functions, rounds, device):
    """name -> (median time in ms, peak memory in MB or None) of functions that take turns.

    In each turn a function is called twice and the second call is timed: what the others have
    pushed out of a cache (oneDNN keeps 1024 compiled kernels) is back by then, as it is in a
    program that runs this function alone."""
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    times, memory = {name: [] for name in functions}, dict.fromkeys(functions)
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            wait()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            function()
            wait()
            times[name].append(1e3 * (time.perf_counter() - start))
            memory[name] = torch.cuda.max_memory_allocated() / 1e6 if cuda else None
    return {name: (statistics.median(t), memory[name]) for name, t in times.items()}
