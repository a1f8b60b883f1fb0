"""Before a script on a machine without a GPU: accelerate 1.15 then shards with FSDP, as it was asked to.

    accelerate launch --config_file fsdp2.yaml data/launch/fsdp_on_cpu.py sft.py --config sft.yaml

For a file that says FSDP accelerate sets up plain data parallelism (MULTI_CPU) where there is no GPU, and says nothing.
Its FSDP code needs no GPU, so this corrects accelerate's state and runs the script. With GPUs leave it out.
"""

import functools
import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

plain = AcceleratorState.__init__


@functools.wraps(plain)
def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = with_fsdp
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
