"""ftlab.classroom.scaling against a ring that really passes chunks on, and PyTorch's own record of what FSDP2 moves."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from ftlab.classroom.scaling import LINKS, ddp_bytes, fsdp_bytes, plot_served, plot_steps, step_seconds


def ring_all_reduce(parts: list[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """(the sum of all vectors, once for each worker; the numbers that one worker has sent), by the ring algorithm."""
    count = len(parts)
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


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_ddp_sends_what_a_ring_does(count):
    """Each worker ends with the plain sum. Two workers, [1, 2] and [10, 20], send two numbers each: 11 and 22."""
    parts = [torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(w)) for w in range(count)]
    sums, sent = ring_all_reduce(parts)
    for mine in sums:
        torch.testing.assert_close(mine, torch.stack(parts).sum(0))
    assert sent == ddp_bytes(count, 24)  # of numbers instead of bytes
    sums, sent = ring_all_reduce([torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])])
    assert [mine.tolist() for mine in sums] == [[11.0, 22.0], [11.0, 22.0]] and sent == 2


@pytest.mark.parametrize("trained", ["all", "one layer"])
def test_fsdp_moves_what_pytorch_counts(trained):
    """Four pretended ranks, two layers of 64 x 64 with their own group each: bytes in all-gathers and reduce-scatters.

    A ring sends (N - 1) / N of what an all-gather returns or a reduce-scatter takes. The root's reshard is switched on,
    so every weight is gathered twice.
    """
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.utils._python_dispatch import TorchDispatchMode

    class Collectives(TorchDispatchMode):
        moved = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            if "_allgather_base_" in name:
                self.moved += args[0].nbytes
            elif "_reduce_scatter_base_" in name:
                self.moved += args[1].nbytes
            return function(*args, **(kwargs or {}))

    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (4,))
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
        if trained == "one layer":
            model[1].requires_grad_(False)
        for layer in model:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        with Collectives() as counted:
            model(torch.ones(2, 64)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    weights = 2 * 64 * 64 * 4
    gradients = weights if trained == "all" else weights / 2
    assert fsdp_bytes(4, weights, gradients) == pytest.approx(3 / 4 * counted.moved)


def test_links_on_paper():
    """8 bits a byte; NVLink: half of 900 GB/s."""
    wanted = {"Ethernet, 10 Gb/s": 1.25e9, "Ethernet, 100 Gb/s": 12.5e9}
    assert wanted | {"InfiniBand, 400 Gb/s": 5e10, "NVLink of an H100": 4.5e11} == LINKS


def test_a_step_on_paper():
    """8 s of computing on four devices are 2 s; 2 x 3/4 of 10 GB through 5 GB/s are 3 s more."""
    assert step_seconds(8, 4, ddp_bytes(4, 10e9), 5e9) == pytest.approx(5)
    assert step_seconds(8, 1, ddp_bytes(1, 10e9), 5e9) == 8
    assert fsdp_bytes(4, 10e9, 10e9) == pytest.approx(1.5 * ddp_bytes(4, 10e9))


def test_the_plot_draws_each_link_and_the_computing_alone():
    figure, axes = plt.subplots(1, 2)
    plot_steps(axes, {"a": 8.0, "b": 4.0}, {"a": lambda n: ddp_bytes(n, 1e9), "b": lambda n: 0.0}, [1, 2, 4])
    slow, *_, alone = axes[0].lines
    assert len(axes[0].lines) == len(LINKS) + 1 == len(axes[1].lines)
    assert list(alone.get_ydata()) == [8, 4, 2]
    assert list(slow.get_ydata()) == pytest.approx([8, 4 + 1e9 / 1.25e9, 2 + 1.5e9 / 1.25e9])
    assert list(axes[1].lines[0].get_ydata()) == [4, 2, 1]
    plt.close(figure)


def test_the_plot_of_waits_measures_in_one_merged_client():
    index = pd.MultiIndex.from_product([[1, 4], ["merged", "unmerged"]], names=["clients", "arm"])
    half = pd.DataFrame({"first": [2.0, 3.0, 6.0, 8.0], "per_token": [0.1, 0.2, 0.3, 0.5]}, index)
    figure, axes = plt.subplots(1, 3)
    plot_served(axes, half, 2 * half, pd.Series([10.0, 5.0, 20.0, 15.0], index))
    drawn = [{line.get_label(): list(line.get_ydata()) for line in ax.lines} for ax in axes]
    wanted = {"merged, p50": [1, 3], "merged, p95": [2, 6], "unmerged, p50": [1.5, 4], "unmerged, p95": [3, 8]}
    assert drawn[0] == wanted and drawn[1]["unmerged, p95"] == pytest.approx([4, 10])
    assert drawn[2] == {"merged": [1, 2], "unmerged": [0.5, 1.5]}
    plt.close(figure)
