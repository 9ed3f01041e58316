"""What one engine step takes on a GPU: seconds and joules of any set of sequences, from first principles.

This is the simulator's physics and must know nothing of the ledger's cost model. It differs from that model on
purpose: attention is priced per sequence and causally (a prompt's early tokens see little context), the vocabulary
projection runs only for tokens that are sampled, power follows how busy the arithmetic units and the memory are (there
is no price per token), it rises with heat, and a power cap slows the clock and so stretches the step.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Roofline = Literal["whole", "split", "soft"]

#: The columns of `Llm.work`; every one adds up over the sequences of a step.
COUNT, GEMM_FLOPS, ATTENTION_FLOPS, KV_BYTES = range(4)
COLUMNS = 4


@dataclass(frozen=True, slots=True)
class Llm:
    """A decoder-only transformer with grouped-query attention, bf16 weights and KV cache."""

    name: str
    body_parameters: float
    head_parameters: float
    layers: int
    attention_width: int
    kv_width: int

    @property
    def weight_bytes(self) -> float:
        return 2 * (self.body_parameters + self.head_parameters)

    def work(self, tokens: Ints, contexts: Ints, sampled: npt.NDArray[np.bool_]) -> Floats:
        """Per sequence (rows) what it adds to the step (columns: sequences, FLOP, attention FLOP, KV bytes)."""
        work = np.empty((len(tokens), COLUMNS))
        work[:, COUNT] = 1.0
        work[:, GEMM_FLOPS] = 2 * (self.body_parameters * tokens + self.head_parameters * sampled)
        seen = contexts - (tokens - 1) / 2  # the context an average token of a causal chunk attends to
        work[:, ATTENTION_FLOPS] = 4 * self.layers * self.attention_width * tokens * seen
        work[:, KV_BYTES] = 4 * self.layers * self.kv_width * (contexts + tokens)  # keys and values, read and written
        return work


@dataclass(frozen=True, slots=True)
class Gpu:
    """Attainable (not peak) rates, and power. `active_watts` is what a busy GPU draws before any unit is."""

    name: str
    gemm_flops: float
    attention_flops: float
    bytes_per_second: float
    launch_seconds: float
    sequence_seconds: float
    idle_watts: float
    active_watts: float
    compute_watts: float
    memory_watts: float
    cap_watts: float = 700.0
    #: How much of the static power is added when the chip is hot (leakage), and how fast it gets there.
    leakage: float = 0.0
    heating_seconds: float = 60.0

    def warmth(self, at: float) -> float:
        """Factor on static power `at` seconds after the start."""
        return 1.0 + self.leakage * (1.0 - float(np.exp(-at / self.heating_seconds)))


LLAMA_8B = Llm("llama-8b", 6.98e9, 0.525e9, layers=32, attention_width=4096, kv_width=1024)
QWEN_1B5 = Llm("qwen-1.5b", 1.31e9, 0.233e9, layers=28, attention_width=1536, kv_width=256)

#: 989 TFLOP/s and 3.35 TB/s on paper; 60 %, 40 % (attention) and 80 % of them in practice.
H100 = Gpu(
    "H100-like (simulated)", gemm_flops=593e12, attention_flops=396e12, bytes_per_second=2.68e12,
    launch_seconds=0.7e-3, sequence_seconds=10e-6,
    idle_watts=75.0, active_watts=125.0, compute_watts=390.0, memory_watts=290.0,
)  # fmt: skip

#: Power grows a little slower than utilisation.
POWER_EXPONENT = 0.9
#: Dynamic power of the arithmetic units grows with this power of the clock (voltage falls with it).
CLOCK_EXPONENT = 2.4
LOWEST_CLOCK = 0.35
#: Of the "soft" roofline: how sharply compute and memory time combine (infinite would be a plain maximum).
SOFTNESS = 4.0


@dataclass(frozen=True, slots=True)
class StepPhysics:
    """Seconds and joules of a step of one model on one GPU.

    `roofline`: `whole` is the larger of all compute and all memory time, `split` takes the larger for the matrix
    products and for attention apart, `soft` rounds off the corner of `whole`.
    """

    llm: Llm
    gpu: Gpu
    roofline: Roofline = "whole"

    def cost(self, sums: Floats, warmth: float = 1.0) -> tuple[Floats, Floats]:
        """(seconds, joules) of sets of sequences, from the sums of their work: shape (..., columns) to (...)."""
        gemm, attention, memory = self._times(sums)
        overhead = self.gpu.launch_seconds + self.gpu.sequence_seconds * sums[..., COUNT]
        static = self.gpu.active_watts * warmth
        seconds = overhead + self._roof(gemm, attention, memory)
        compute_watts = self._compute_watts((gemm + attention) / seconds)
        memory_watts = self._memory_watts(memory / seconds)
        if np.max(compute_watts + memory_watts) > self.gpu.cap_watts - static:
            clock = self._clock(compute_watts, memory_watts, static)
            gemm, attention = gemm / clock, attention / clock
            seconds = overhead + self._roof(gemm, attention, memory)
            compute_watts = self._compute_watts((gemm + attention) / seconds) * clock**CLOCK_EXPONENT
            memory_watts = self._memory_watts(memory / seconds)
        return seconds, seconds * (static + compute_watts + memory_watts)

    def joules(self, sums: Floats, warmth: float = 1.0) -> Floats:
        """E(S) of sets of sequences; the empty set costs nothing, for there is no step then."""
        return np.where(sums[..., COUNT] > 0, self.cost(sums, warmth)[1], 0.0)

    def _times(self, sums: Floats) -> tuple[Floats, Floats, Floats]:
        gemm = sums[..., GEMM_FLOPS] / self.gpu.gemm_flops
        attention = sums[..., ATTENTION_FLOPS] / self.gpu.attention_flops
        return gemm, attention, (self.llm.weight_bytes + sums[..., KV_BYTES]) / self.gpu.bytes_per_second

    def _roof(self, gemm: Floats, attention: Floats, memory: Floats) -> Floats:
        compute = gemm + attention
        if self.roofline == "whole":
            return np.maximum(compute, memory)
        if self.roofline == "soft":
            return np.asarray((compute**SOFTNESS + memory**SOFTNESS) ** (1 / SOFTNESS))
        weights = self.llm.weight_bytes / self.gpu.bytes_per_second
        return np.maximum(gemm, weights) + np.maximum(attention, memory - weights)

    def _compute_watts(self, busy: Floats) -> Floats:
        return np.asarray(self.gpu.compute_watts * np.minimum(busy, 1.0) ** POWER_EXPONENT)

    def _memory_watts(self, busy: Floats) -> Floats:
        return np.asarray(self.gpu.memory_watts * np.minimum(busy, 1.0) ** POWER_EXPONENT)

    def _clock(self, compute_watts: Floats, memory_watts: Floats, static: float) -> Floats:
        """The clock (1 is full) at which the step stays within the power cap."""
        room = np.maximum(self.gpu.cap_watts - static - memory_watts, 0.0)
        return np.clip((room / np.maximum(compute_watts, 1e-9)) ** (1 / CLOCK_EXPONENT), LOWEST_CLOCK, 1.0)
