"""experiments/serving and two_processes hold what notebook 09 says, and its sums what travels in a step.

The sums, a cell of the notebook, are held against a ring that really passes chunks on, and against PyTorch's own record
of what FSDP2 moves.
"""

import numpy as np
import pytest
import torch
from scripts import script

from ftlab.classroom import results
from notebooks import CELLS

SERVED, TWO = results.parts("serving"), results.parts("two_processes")
EQUAL = {run["arm"]: run for run in TWO["equal"]}


def test_each_round_of_the_servers_is_whole_and_every_answer_was_transformers():
    jobs = script("experiments/serving/run.py").jobs
    for turn in {run["round"] for run in SERVED["runs"]}:
        done = [run for run in SERVED["runs"] if run["round"] == turn]
        names = ("what", "arm", "clients", "order")
        assert [{k: run[k] for k in names if k in run} for run in done] == jobs(turn)
    for run in SERVED["runs"] + SERVED["earlier"]:
        assert run["same"] == run["requests"] == len(run.get("first", run.get("latencies")))
    assert {(run["engine"], run["round"]) for run in SERVED["earlier"]} == {
        (engine, turn) for engine in ("llama.cpp", "vLLM") for turn in range(3)
    }


def test_a_round_beside_other_work_counts_as_missing():
    missing = script("experiments/serving/run.py").missing
    runs = [{"engine": "llama.cpp", "round": turn, "load": load} for turn, load in ((0, 2), (0, 9), (0, 2.5), (1, 8))]
    assert missing(runs, "llama.cpp") == [1, 2] and missing(runs, "vLLM") == [0, 1, 2]
    assert missing(SERVED["runs"], "llama.cpp") == []


def test_unmerged_took_more_processor_time_than_its_share_of_the_numbers():
    """More in each round, and over all rounds more than the 4 in a hundred numbers that an adapter adds."""
    for clients in (1, 4, 8):
        spent = {
            arm: np.array([r["cpu_seconds"] for r in SERVED["runs"]
                           if (r["arm"], r["what"], r["clients"]) == (arm, "clients", clients)])
            for arm in ("merged", "unmerged")
        }  # fmt: skip
        assert (spent["unmerged"] > spent["merged"]).all()
        assert spent["unmerged"].sum() > 1.04 * spent["merged"].sum()


def test_mixed_adapters_took_more_processor_time_than_grouped_ones_in_each_round():
    for turn in {run["round"] for run in SERVED["runs"]}:
        orders = {r["order"]: r["cpu_seconds"] for r in SERVED["runs"] if (r["round"], r["what"]) == (turn, "order")}
        assert orders["mixed"] > 1.1 * orders["grouped"]


def test_two_processes_were_one_but_for_the_mean_of_means():
    module = script("experiments/two_processes/run.py")
    assert EQUAL.keys() == module.EQUAL.keys()
    assert {one["arm"] for one in TWO["refused"]} == module.REFUSED.keys()
    one = EQUAL["one"]["losses"]
    for arm in ("accumulated", "ddp", "fsdp2"):
        assert EQUAL[arm]["losses"] == pytest.approx(one, rel=1e-5) and EQUAL[arm]["lora_b_off"] < 1e-4
    assert EQUAL["ddp, local means"]["lora_b_off"] > 0.05
    held = {arm: [float(said.split()[-2]) for said in run["said"]] for arm, run in EQUAL.items()}
    assert held["fsdp2"] == pytest.approx([held["one"][0] / 2] * 2, abs=0.01)
    assert EQUAL["fsdp2"]["said"][0].startswith("FSDPPeftModel")
    weights = 2 * (held["qlora as bytes, fsdp2"][0] - held["qlora as floats, fsdp2"][0])  # MB of 4-bit weights
    assert weights == pytest.approx(1.47456, abs=0.03)  # half a byte for each of micro's 2,949,120


# --- What travels in a step -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """ddp_bytes, fsdp_bytes and LINKS of notebook 09, as a module."""
    file = tmp_path_factory.mktemp("cell") / "wires.py"
    file.write_text("".join(CELLS["09_serve_and_scale#wires"]["source"]), encoding="utf-8")
    return script(str(file))


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
def test_ddp_sends_what_a_ring_does(count, sums):
    """Each worker ends with the plain sum. Two workers, [1, 2] and [10, 20], send two numbers each: 11 and 22."""
    parts = [torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(w)) for w in range(count)]
    whole, sent = ring_all_reduce(parts)
    for mine in whole:
        torch.testing.assert_close(mine, torch.stack(parts).sum(0))
    assert sent == sums.ddp_bytes(count, 24)  # of numbers instead of bytes
    whole, sent = ring_all_reduce([torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])])
    assert [mine.tolist() for mine in whole] == [[11.0, 22.0], [11.0, 22.0]] and sent == 2


@pytest.mark.parametrize("trained", ["all", "one layer"])
def test_fsdp_moves_what_pytorch_counts(trained, sums):
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
    assert sums.fsdp_bytes(4, weights, gradients) == pytest.approx(3 / 4 * counted.moved)


def test_links_on_paper(sums):
    """8 bits a byte; NVLink: half of 900 GB/s."""
    paper = {"Ethernet, 10 Gb/s": 10e9 / 8, "Ethernet, 100 Gb/s": 100e9 / 8, "InfiniBand, 400 Gb/s": 400e9 / 8}
    assert paper | {"NVLink of an H100": 900e9 / 2} == sums.LINKS
