"""ftlab.classroom.scaling against the plain sum, a count on paper, and PyTorch's own record of what FSDP2 moves."""

import pytest
import torch

from ftlab.classroom.scaling import LINKS, ddp_bytes, fsdp_bytes, ring_all_reduce, step_seconds


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_each_worker_of_the_ring_ends_with_the_plain_sum(count):
    parts = [torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(w)) for w in range(count)]
    before = [part.clone() for part in parts]
    sums, sent = ring_all_reduce(parts)
    assert len(sums) == count
    for mine in sums:
        torch.testing.assert_close(mine, torch.stack(parts).sum(0))
    assert sent == ddp_bytes(count, 24)  # of numbers instead of bytes
    sums[0].zero_()  # each has its own
    assert all(torch.equal(*pair) for pair in zip(parts, before, strict=True))
    assert not any(torch.equal(mine, sums[0]) for mine in sums[1:])


def test_the_ring_on_paper():
    """Two workers, [1, 2] and [10, 20]. One number each way: worker 1 has 11, worker 0 has 22. One more each: done."""
    sums, sent = ring_all_reduce([torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])])
    assert [mine.tolist() for mine in sums] == [[11.0, 22.0], [11.0, 22.0]]
    assert sent == 2


@pytest.mark.parametrize("lengths", [(3, 3), (4, 2)])
def test_vectors_that_cannot_be_cut_evenly_are_refused(lengths):
    with pytest.raises(ValueError, match="wanted equal multiples of 2"):
        ring_all_reduce([torch.zeros(n) for n in lengths])


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
    """8 bits a byte; PCIe 4.0: 16e9 transfers a second on each of 16 lanes, 128 of 130 bits; NVLink: half of 600."""
    wanted = {"Ethernet, 10 Gb/s": 1.25e9, "Ethernet, 100 Gb/s": 12.5e9, "NVLink of an A100": 3e11}
    wanted["PCIe 4.0 x16"] = 16e9 * 16 * 128 / 130 / 8
    assert LINKS.keys() == wanted.keys()
    assert all(speed == pytest.approx(wanted[name], rel=1e-3) for name, speed in LINKS.items())


def test_a_step_on_paper():
    """8 s of computing on four devices are 2 s; 2 x 3/4 of 10 GB through 5 GB/s are 3 s more."""
    assert step_seconds(8, 4, ddp_bytes(4, 10e9), 5e9) == pytest.approx(5)
    assert step_seconds(8, 1, ddp_bytes(1, 10e9), 5e9) == 8
    assert fsdp_bytes(4, 10e9, 10e9) == pytest.approx(1.5 * ddp_bytes(4, 10e9))
