"""What a step costs on several devices: bytes through the link by the method, and seconds, with nothing overlapped.

A model of the first order, for questions such as "does this need NVLink?": computation divides by the devices, the link
moves bytes at its full speed, latency is left out, and no byte moves while something is computed. Real DDP sends the
gradients of the last layers while those of the first are still being computed, so it lies between `compute / devices`
and this. data/results/two_processes.json holds the model against a real pair of processes.

References: Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (the ring);
Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 7 (what sharding moves).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

GB = 1e9
# Bytes per second in one direction. NVLink is sold by the sum of both directions: 600 GB/s (A100), 900 GB/s (H100).
LINKS = {
    "Ethernet, 10 Gb/s": 10 / 8 * GB,
    "Ethernet, 100 Gb/s": 100 / 8 * GB,
    "PCIe 4.0 x16": 31.5 * GB,  # 16 GT/s x 16 lanes, 128 of 130 bits are data
    "NVLink of an A100": 300 * GB,
}


def ring_all_reduce(parts: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """(the sum of all vectors, once for each worker; the numbers that one worker has sent), by the ring algorithm.

    parts: a vector (n,) per worker, n a multiple of the N workers. Cut each into N chunks. In N - 1 rounds each worker
    sends one chunk to its right neighbour, which adds it: then each holds one finished chunk. In N - 1 more rounds the
    finished chunks travel round. Sent: 2 (N - 1) n / N, nearly 2 n however many workers there are.

    Raises ValueError if the vectors cannot be cut evenly.
    """
    count = len(parts)
    if {len(part) % count for part in parts} != {0} or len({len(part) for part in parts}) > 1:
        raise ValueError(f"got vectors of {[len(part) for part in parts]}, wanted equal multiples of {count}")
    chunks = [list(part.chunk(count)) for part in parts]  # chunks[worker][place]
    sent = 0
    for gathers in (False, True):
        for turn in range(count - 1):
            places = [(worker - turn + gathers) % count for worker in range(count)]
            moving = [chunks[worker][place] for worker, place in enumerate(places)]  # all at the same time
            for worker, (place, chunk) in enumerate(zip(places, moving, strict=True)):
                right = chunks[(worker + 1) % count]
                right[place] = chunk if gathers else right[place] + chunk
            sent += len(moving[0])
    return [torch.cat(mine) for mine in chunks], sent


def ddp_bytes(devices: int, gradient_bytes: float) -> float:
    """Bytes that each device sends in a step with DDP: one all-reduce of the gradients, 2 (N - 1) / N of them."""
    return 2 * (devices - 1) / devices * gradient_bytes


def fsdp_bytes(devices: int, weight_bytes: float, gradient_bytes: float) -> float:
    """Bytes that each device sends in a step with FSDP or ZeRO-3: (N - 1) / N of 2 x weights + gradients.

    All weights are gathered for the forward pass and again for the backward pass, frozen ones too; the gradients are
    added up where they belong (reduce-scatter, half an all-reduce). Full fine-tuning in one dtype: 1.5 times DDP.
    """
    return (devices - 1) / devices * (2 * weight_bytes + gradient_bytes)


def step_seconds(compute_seconds: float, devices: int, sent_bytes: float, bytes_per_second: float) -> float:
    """Seconds of a step whose batch is shared out: compute / N + bytes / link. compute_seconds: on one device."""
    return compute_seconds / devices + sent_bytes / bytes_per_second
