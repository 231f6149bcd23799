"""The GPUs that kernels are compiled for: what one multiprocessor holds, and the speeds of one product of each.

Sources: occupancy tables of the CUDA C++ Programming Guide and the CDNA 3 ISA guide; datasheets for products (dense
bfloat16 with float32 accumulation).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "Architecture"]


@dataclass(frozen=True)
class Architecture:
    """A target of compilation.

    Attributes:
        name: ``"sm_90"`` or ``"gfx942"``.
        backend, number, warp_size: as Triton's ``GPUTarget`` takes them.
        block_shared: bytes of shared memory that one program may use.
        shared: bytes of shared memory of a multiprocessor (compute unit).
        reserved_shared: bytes of it that the system takes for each program.
        warps: most warps that a multiprocessor holds.
        blocks: most programs that it holds.
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
        """Warps that a multiprocessor holds of a kernel.

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


def _nvidia(number: int, block_kib: int, shared_kib: int, warps: int, blocks: int) -> Architecture:
    return Architecture(f"sm_{number}", "cuda", number, 32, block_kib * 1024, shared_kib * 1024, 1024, warps, blocks)


ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        _nvidia(80, 163, 164, 64, 32),
        _nvidia(86, 99, 100, 48, 16),
        _nvidia(89, 99, 100, 48, 24),
        _nvidia(90, 227, 228, 64, 32),
        _nvidia(100, 227, 228, 64, 32),
        _nvidia(120, 99, 100, 48, 24),
        Architecture("gfx942", "hip", "gfx942", 64, 64 * 1024, 64 * 1024, 0, 32, 32),
    )
}
"""Architectures by name."""
