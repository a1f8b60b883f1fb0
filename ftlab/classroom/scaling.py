"""What a step costs on several devices, in bytes and in seconds, and the pictures of notebook 09.

A model of the first order, for questions such as "does this need NVLink?": computation divides by the devices, the link
moves bytes at its full speed, latency is left out, and no byte moves while something is computed. Real frameworks send
while they compute, so they lie between `compute / devices` and this. Held against PyTorch's own record of what FSDP2
moves: tests/test_scaling.py.

References: Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (the ring);
Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 7 (what sharding moves).
"""

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from pandas import DataFrame, Series

from ftlab.classroom.show import CHOSEN, LIBRARY, POLICY, REFERENCE, REJECTED

GB = 1e9
# Bytes per second of one GPU in one direction. NVLink is sold by the sum of both directions: 900 GB/s (H100).
LINKS = {
    "Ethernet, 10 Gb/s": 10 / 8 * GB,
    "Ethernet, 100 Gb/s": 100 / 8 * GB,
    "InfiniBand, 400 Gb/s": 400 / 8 * GB,
    "NVLink of an H100": 450 * GB,
}


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


def plot_steps(
    axes: Sequence[Axes], compute: Mapping[str, float], sent: Mapping[str, Callable], counts: Sequence[int]
) -> None:
    """Seconds a step against the number of GPUs, a kind of training an axes, a link a line.

    compute: kind -> seconds on one GPU; sent: kind -> a function of the number of GPUs, bytes of each.
    """
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40]
    for ax, (kind, seconds) in zip(axes, compute.items(), strict=True):
        for (link, speed), colour in zip(LINKS.items(), (REJECTED, CHOSEN, POLICY, LIBRARY), strict=True):
            curve = [step_seconds(seconds, n, sent[kind](n), speed) for n in counts]
            ax.plot(counts, curve, "o-", markersize=3, color=colour, label=link)
        ax.plot(counts, [seconds / n for n in counts], "--", color=REFERENCE, label="computing alone")
        ax.set(title=kind, xscale="log", yscale="log", xlabel="GPUs", xticks=counts, xticklabels=counts)
        ax.set(yticks=ticks, yticklabels=ticks)
        ax.minorticks_off()
    axes[0].set_ylabel("seconds a step")
    axes[0].legend(fontsize=7)


def plot_served(axes: Sequence[Axes], half: DataFrame, most: DataFrame, rate: Series) -> None:
    """Two waits and the throughput against the number of clients; one client of the merged server is 1.

    half, most: the p50 and the p95 of "first" and "per_token", by (clients, arm); rate: tokens/s of all, by the same.
    """
    for arm, colour in (("merged", REFERENCE), ("unmerged", POLICY)):
        for ax, wait in zip(axes, ("first", "per_token"), strict=False):
            for part, style, name in ((half, "o-", "p50"), (most, "o:", "p95")):
                line = part[wait].xs(arm, level="arm") / half.loc[(1, "merged"), wait]
                ax.plot(line.index, line, style, markersize=3, color=colour, label=f"{arm}, {name}")
        line = rate.xs(arm, level="arm") / rate[(1, "merged")]
        axes[2].plot(line.index, line, "o-", markersize=3, color=colour, label=arm)
    titles = ("time to the first token", "time per output token", "throughput of all")
    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, xlabel="clients at once", ylim=(0, None), xticks=line.index)
    axes[0].set_ylabel("times that of one client, merged")
    axes[0].legend(fontsize=8)
