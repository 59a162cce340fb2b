"""Times of functions against each other."""

import statistics
import time

import torch

def medians(functions, rounds, device, warm_up=2):
    """name -> (median time in ms, peak memory in MB or None) of functions that take turns, after
    rounds of warm-up."""
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    times, memory = {name: [] for name in functions}, dict.fromkeys(functions)
    for _ in range(warm_up + rounds):
        for name, function in functions.items():
            wait()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            function()
            wait()
            times[name].append(1e3 * (time.perf_counter() - start))
            memory[name] = torch.cuda.max_memory_allocated() / 1e6 if cuda else None
    return {name: (statistics.median(t[warm_up:]), memory[name]) for name, t in times.items()}
