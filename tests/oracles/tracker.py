"""What watches a step: every storage by kind from birth to death, or CUDA's own counters; and CUDA's rules on a CPU."""

import contextlib
import weakref
from collections import Counter
from unittest import mock

from ftlab.memory import KINDS, Memory, Moment
from ftlab.memory.settings import Plan

CHUNK = 256  # tokens a chunk of TRL's chunked loss


class CudaRecorder:
    """The peaks of a real step on the GPU, phase by phase. Its allocator does not know what a block is for."""

    def __init__(self) -> None:
        self.phase, self.peaks = "load", {}

    def enter(self, phase: str, kind: str) -> None:
        import torch

        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        self.phase = phase

    def mark(self, tensor, kind: str) -> None:
        pass

    def start(self) -> None:
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.peaks.clear()

    def finish(self) -> Memory:
        self.enter("end", "")
        moments = {phase: Moment("max_memory_allocated", {"all": size}) for phase, size in self.peaks.items()}
        return Memory(moments)


def tracker(p: Plan):
    """A dispatch mode that counts every storage by kind while it lives, and keeps the highest moment of each phase."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.weak import WeakIdKeyDictionary

    bnb, aten = torch.ops.bitsandbytes, torch.ops.aten

    class Tracker(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.known, self.live, self.total = WeakIdKeyDictionary(), Counter(), 0
            self.phase, self.kind, self.moments = "load", "temporary", {}

        def enter(self, phase: str, kind: str) -> None:
            self.phase, self.kind = phase, kind

        def see(self, tensor, kind: str | None = None) -> None:
            """Counts the tensor's storage, if it is new, until it dies."""
            storage = tensor.untyped_storage()
            if storage in self.known:
                return
            entry = [kind or self.kind, storage.nbytes(), None]

            def gone(_):
                self.live[entry[0]] -= entry[1]
                self.total -= entry[1]

            entry[2] = weakref.ref(storage, gone)
            self.known[storage] = entry
            self.live[entry[0]] += entry[1]
            self.total += entry[1]

        def mark(self, tensor, kind: str) -> None:
            """From now on the tensor's storage is of this kind."""
            self.see(tensor)
            entry = self.known[tensor.untyped_storage()]
            self.live[entry[0]] -= entry[1]
            self.live[kind] += entry[1]
            entry[0] = kind

        def start(self) -> None:
            """Forgets how the model and the optimizer were made; what is there now is the phase "load"."""
            self.moments.clear()
            self.look("all loaded")

        def look(self, where: str) -> None:
            if self.phase not in self.moments or self.total > self.moments[self.phase].total:
                self.moments[self.phase] = Moment(where, {k: self.live[k] for k in KINDS})

        def kind_of(self, tensor) -> str:
            entry = self.known.get(tensor.untyped_storage())
            return entry[0] if entry else ""

        def gemm_4bit(self, x, packed, shape, absmax, block, code_name, bias=None, codes=None, code=None, offset=None):
            """bitsandbytes above ~1000 tokens: the matrix is dequantized as a whole, then multiplied."""
            if codes is not None:
                absmax = bnb.dequantize_blockwise(codes, absmax, code, 256, torch.float)
                self.see(absmax)
                absmax = absmax + offset
                self.see(absmax)
            weight = bnb.dequantize_4bit(packed, absmax, block, code_name, shape, x.dtype)
            self.see(weight)
            return torch.nn.functional.linear(x, weight, bias)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func is torch.ops.prim.device.default:
                return func(*args, **kwargs)
            if func is aten._local_scalar_dense.default and hasattr(args[0], "fake_mode"):
                padded = -(-(p.n - p.rows) // CHUNK) * CHUNK  # of TRL's loss: every token counts
                return {torch.int64: padded, torch.bool: not p.padded}.get(args[0].dtype, 1.0)
            if func is bnb.gemm_4bit.default:
                out = self.gemm_4bit(*args, **kwargs)
            elif func is aten._grouped_mm.default and args[0].dtype == torch.float32:  # fake tensors know bf16 alone
                a, b, groups = args[0], args[1], (kwargs.get("offs") if len(args) < 3 else args[2])
                shape = (a.shape[0], b.shape[2]) if b.dim() == 3 else (len(groups), a.shape[0], b.shape[1])
                out = a.new_empty(shape)
            elif func is bnb.int8_vectorwise_quant.default:  # no outlier columns: how many depends on the data
                out = func(args[0])
            elif func is bnb.int8_mixed_scaled_mm.default:
                (x, qx, qw, sx, sw), bias = args[:5], args[6] if len(args) > 6 else None
                product = bnb.int8_linear_matmul(qx, qw)
                self.see(product)
                out = bnb.int8_mm_dequant(product, sx, sw, dtype=x.dtype, bias=bias), None
            else:
                out = func(*args, **kwargs)
            casts = func is aten._to_copy.default and self.kind_of(args[0]) in ("weights", "adapters")
            casts = casts and self.kind == "activations"
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self.see(leaf, "autocast" if casts else None)
            self.look(str(func))
            return out

    return Tracker()


def cuda_rules(on: str):
    """What PyTorch and bitsandbytes do on CUDA and not on a CPU, for as long as the context is open."""
    import bitsandbytes as bnb
    import torch
    from bitsandbytes.autograd import _functions
    from torch.overrides import TorchFunctionMode

    in_fp32, with_dtype = {"exp", "pow", "rsqrt", "logsumexp"}, {"softmax", "log_softmax", "sum"}

    class Rules(TorchFunctionMode):
        """Autocast on CUDA runs these in fp32 (PyTorch's list "CUDA Ops that can autocast to float32")."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            name = getattr(func, "__name__", "")
            if name == "backward":  # checkpoints run their forward once more inside it, by the same rules
                engine, one = torch.autograd.Variable._execution_engine, torch.ones_like(args[0])
                with self:
                    return engine.run_backward((args[0],), (one,), False, False, (), True, True)
            half = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype in (torch.bfloat16, torch.float16)
            if func is torch.nn.functional.dropout and kwargs["training"] and kwargs["p"] > 0:
                return torch.native_dropout(args[0], kwargs["p"], True)[0]
            if half and name in in_fp32 and torch.is_autocast_enabled("cpu"):
                args = (args[0].float(), *args[1:])
            elif half and name in with_dtype and torch.is_autocast_enabled("cpu"):
                kwargs = {"dtype": torch.float32, **{k: v for k, v in kwargs.items() if v is not None}}
            return func(*args, **kwargs)

    def int8_product(x, weight, out=None, state=None, threshold=0.0, bias=None):
        state.threshold = threshold or state.threshold
        return _functions.MatMul8bitLt.apply(x, weight, out, bias, state)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(bnb, "matmul", int8_product))
    stack.enter_context(mock.patch.object(_functions.logger, "warning"))  # of a cast, once per layer and call
    enabled = torch.is_autocast_enabled
    stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda device="cpu": enabled(device)))
    if on == "fake":  # transformers takes fake tensors for an export, and then builds the mask that a run would skip
        stack.enter_context(mock.patch("transformers.masking_utils.is_tracing", lambda *_: False))
    stack.enter_context(Rules())
    return stack
