"""The GPUs that kernels are compiled for: the limits of a multiprocessor, and one product's speeds.

Sources: occupancy tables of the CUDA C++ Programming Guide and the CDNA 3 ISA guide; datasheets for products (dense
bfloat16 with float32 accumulation).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "GPUS", "TYPICAL", "Gpu", "GpuArchitecture", "nearest_architecture"]


@dataclass(frozen=True)
class GpuArchitecture:
    """A target of compilation.

    Attributes:
        name: ``"sm_90"`` or ``"gfx942"``.
        backend, number, warp_size: as Triton's ``GPUTarget`` takes them.
        block_shared: bytes of shared memory that one program may use.
        shared: bytes of shared memory of a multiprocessor (compute unit).
        reserved_shared: bytes of it that the system takes for each program.
        warps: maximum resident warps per multiprocessor.
        blocks: maximum resident programs per multiprocessor.
    """

    name: str
    backend: str
    number: int | str
    warp_size: int
    block_shared: int
    shared: int
    reserved_shared: int
    warps: int
    blocks: int

    def occupancy(self, registers: int, num_warps: int, shared: int) -> int:
        """Resident warps of a kernel per multiprocessor.

        Args:
            registers: for each thread; on AMD, vector and accumulation registers together.
            num_warps: of one program.
            shared: bytes of shared memory of one program.
        """
        if self.backend == "hip":
            # Four SIMDs of 512 registers a lane, allocated in eights; a SIMD holds up to eight waves.
            waves = min(8, 512 // max(8, -(-registers // 8) * 8))
            by_registers = 4 * waves // num_warps
        else:
            # 64 Ki registers in four partitions, allocated to a warp in units of 256.
            warp_registers = -(-max(registers, 1) * 32 // 256) * 256
            by_registers = 4 * (16384 // warp_registers) // num_warps
        by_shared = self.shared // (shared + self.reserved_shared) if shared + self.reserved_shared else self.blocks
        return min(by_registers, by_shared, self.blocks, self.warps // num_warps) * num_warps


def _nvidia(number: int, block_kib: int, shared_kib: int, warps: int, blocks: int) -> GpuArchitecture:
    return GpuArchitecture(f"sm_{number}", "cuda", number, 32, block_kib * 1024, shared_kib * 1024, 1024, warps, blocks)


ARCHITECTURES: dict[str, GpuArchitecture] = {
    architecture.name: architecture
    for architecture in (
        _nvidia(80, 163, 164, 64, 32),
        _nvidia(86, 99, 100, 48, 16),
        _nvidia(89, 99, 100, 48, 24),
        _nvidia(90, 227, 228, 64, 32),
        _nvidia(100, 227, 228, 64, 32),
        _nvidia(120, 99, 100, 48, 24),
        GpuArchitecture("gfx942", "hip", "gfx942", 64, 64 * 1024, 64 * 1024, 0, 32, 32),
    )
}
"""Architectures by name."""


@dataclass(frozen=True)
class Gpu:
    """A product, by the numbers of its datasheet.

    Attributes:
        name: what it is called.
        architecture: name of its architecture.
        multiprocessors: SMs or compute units.
        tensor_flops: dense bfloat16 products with float32 sums, FLOP/s.
        memory_bandwidth: bytes/s.
        cache_bandwidth: bytes/s that all multiprocessors together read from their shared cache.
        port_bandwidth: bytes/s that one multiprocessor reads from it.
        special_rate: exponentials or reciprocals that one multiprocessor makes a second.
    """

    name: str
    architecture: str
    multiprocessors: int
    tensor_flops: float
    memory_bandwidth: float
    cache_bandwidth: float
    port_bandwidth: float
    special_rate: float


def _gpu(name: str, architecture: str, units: int, tflops: float, memory: float, clock: float, cache: float) -> Gpu:
    """A GPU from TFLOP/s, GB/s, GHz and the cache's bytes per clock (its TB/s if below 100)."""
    bandwidth = cache * 1e12 if cache < 100 else cache * clock * 1e9
    # A multiprocessor has a port of 64 bytes a clock, and makes 16 special functions: throughput tables of the CUDA
    # C++ Programming Guide; a quarter of 64 lanes on CDNA 3.
    return Gpu(name, architecture, units, tflops * 1e12, memory * 1e9, bandwidth, 64 * clock * 1e9, 16 * clock * 1e9)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # 5,120 bytes a clock: whitepaper of the A100, taken for the H100 too.  Elsewhere every port is busy.
        _gpu("A100", "sm_80", 108, 312, 2039, 1.41, 5120),
        _gpu("RTX 3090", "sm_86", 82, 71, 936, 1.70, 82 * 64),
        _gpu("L40S", "sm_89", 142, 362, 864, 2.52, 142 * 64),
        _gpu("RTX 4090", "sm_89", 128, 165.2, 1008, 2.52, 128 * 64),
        _gpu("H100", "sm_90", 132, 989.4, 3352, 1.755, 5120),
        _gpu("B200", "sm_100", 148, 2250, 8000, 1.85, 148 * 64),
        _gpu("RTX 5090", "sm_120", 170, 209.5, 1792, 2.41, 170 * 64),
        # 17.2 TB/s: the peak of its Infinity Cache.
        _gpu("MI300X", "gfx942", 304, 1307.4, 5300, 2.1, 17.2),
    )
}
"""Products by name."""

TYPICAL = {"sm_80": "A100", "sm_86": "RTX 3090", "sm_89": "L40S", "sm_90": "H100", "sm_100": "B200",
           "sm_120": "RTX 5090", "gfx942": "MI300X"}  # fmt: skip
"""The product whose numbers choose an architecture's tiles."""


def nearest_architecture(major: int, minor: int) -> str:
    """The name of the architecture, or of its nearest relative, of a compute capability >= 8.0."""
    name = f"sm_{major}{minor}"
    if name in ("sm_80", "sm_89"):
        return name
    # Tiles of sm_120 need the least shared memory.
    return {8: "sm_86", 9: "sm_90", 10: "sm_100"}.get(major, "sm_120")
