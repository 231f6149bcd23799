"""Instructions of the PTX executor that exchange between lanes or touch memory, against independent definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tensor_layouts import atoms_nv

from ptx_definitions import CASES, RANDOM, draw, pair, to_bf16, to_f16
from ptx_text import LANES, evaluate, opcode_family, run_body
from ptx_tools import opcodes

pytestmark = pytest.mark.breadth  # half a minute of compilation


def shuffled(mode: str, lane: int, b: int, bounds: int) -> tuple[int, bool]:
    """Which lane is read, and whether it is within bounds: segments are the aligned groups that bits 8 to 12 leave."""
    segment, clamp = bounds >> 8 & 31, bounds & 31
    group = [other for other in range(LANES) if other & segment == lane & segment]
    first, last = lane & segment, (lane & segment) | (clamp & ~segment)
    assert first == group[0]
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
    inside = source >= last if mode == "up" else source <= last
    return (source if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(mode: str, width: int) -> None:
    clamp = 0 if mode == "up" else 31
    bounds = (32 - width) << 8 | clamp
    values, b = draw("u32"), RANDOM.integers(0, 32, LANES).astype(np.uint32)
    if mode != "idx":
        b[:] = 3
    operands: list[np.ndarray | str] = [values, b, str(bounds), "-1"]
    found, inside = evaluate(f"shfl.sync.{mode}.b32", "rp=rrrr", operands)
    expected = [shuffled(mode, lane, int(b[lane]), bounds) for lane in range(LANES)]
    assert found.tolist() == [values[lane] for lane, _ in expected]
    assert inside.tolist() == [p for _, p in expected]
    assert evaluate(f"shfl.sync.{mode}.b32", "r=rrrr", operands)[0].tolist() == found.tolist()


@pytest.mark.parametrize(
    "p", [np.zeros(LANES, bool), np.ones(LANES, bool), np.arange(LANES) % 3 == 0], ids=["none", "all", "some"]
)
def test_votes(p: np.ndarray) -> None:
    assert evaluate("vote.sync.any.pred", "p=pr", [p, "-1"])[0].tolist() == [p.any()] * LANES
    assert evaluate("vote.sync.all.pred", "p=pr", [p, "-1"])[0].tolist() == [p.all()] * LANES
    bits = sum(1 << i for i in range(LANES) if p[i])
    assert evaluate("vote.sync.ballot.b32", "r=pr", [p, "-1"])[0].tolist() == [bits] * LANES


REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def test_reductions() -> None:
    for opcode in (o for o in opcodes() if o.startswith("redux")):
        _, _, operation, kind = opcode.split(".")
        values = draw(kind.replace("b", "u"))
        expected = int(REDUCTIONS[operation].reduce(values)) % 2**32
        assert evaluate(opcode, "r=rr", [values, "-1"])[0].tolist() == [expected] * LANES, opcode


ATOMS = {
    "bf16": ("16.row.col.f32.bf16.bf16.f32", atoms_nv.SM80_16x8x16_F32BF16BF16F32_TN, 16),
    "f16": ("16.row.col.f32.f16.f16.f32", atoms_nv.SM80_16x8x16_F32F16F16F32_TN, 16),
    "tf32": ("8.row.col.f32.tf32.tf32.f32", atoms_nv.SM80_16x8x8_F32TF32TF32F32_TN, 8),
}


@pytest.mark.parametrize("kind", ATOMS)
def test_mma(kind: str) -> None:
    """Operands laid out by tensor-layouts' atom give the product in its layout: D = A [16, K] B [K, 8] + C."""
    end, atom, depth = ATOMS[kind]
    a, b, c = (RANDOM.integers(-100, 100, shape).astype(np.float32) for shape in [(16, depth), (depth, 8), (16, 8)])
    narrow = {"bf16": to_bf16, "f16": to_f16, "tf32": lambda x: x.view(np.uint32) | 0x1ABC}[kind]
    each_register = 1 if kind == "tf32" else 2

    def fragment(matrix: np.ndarray, layout: Callable[[int, int], int], count: int, rows: int) -> list[np.ndarray]:
        values = np.zeros((count, LANES), np.float32)
        for lane in range(LANES):
            for v in range(count):
                column, row = divmod(layout(lane, v), rows)
                values[v, lane] = matrix[row, column]
        raw = [narrow(row) for row in values]
        return raw if each_register == 1 else [pair(raw[i], raw[i + 1]) for i in range(0, count, 2)]

    registers = fragment(a, atom.a_layout, 4 * each_register, 16) + fragment(b.T, atom.b_layout, 2 * each_register, 8)
    places = [[divmod(atom.c_layout(lane, v), 16) for lane in range(LANES)] for v in range(4)]
    registers += [np.array([c[m, n] for n, m in row], np.float32) for row in places]
    found = evaluate(f"mma.sync.aligned.m16n8k{end}", "rrrr=rrrrrrrrrr", registers, (4, 4, 2, 4))
    expected = c + a @ b
    for row, values in zip(places, found, strict=True):
        assert values.view(np.float32).tolist() == [expected[m, n] for n, m in row]


LDMATRIX = {
    (1, ""): atoms_nv.SM75_U32x1_LDSM_N, (2, ""): atoms_nv.SM75_U32x2_LDSM_N, (4, ""): atoms_nv.SM75_U32x4_LDSM_N,
    (1, ".trans"): atoms_nv.SM75_U16x2_LDSM_T, (2, ".trans"): atoms_nv.SM75_U16x4_LDSM_T,
    (4, ".trans"): atoms_nv.SM75_U16x8_LDSM_T,
}  # fmt: skip


@pytest.mark.parametrize("count, trans", LDMATRIX, ids=str)
def test_ldmatrix(count: int, trans: str) -> None:
    """Lane i names row i, here in reverse order; the atom says, bit by bit, where its 16 bytes go."""
    rows = RANDOM.permutation(1 << 16)[:256].astype(np.uint16).reshape(32, 8)
    registers = ", ".join(f"%r{i}" for i in range(count))
    body = f"""
    mul.wide.u32 %d1, %t, 16; add.s64 %d1, %in, %d1; ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%d1];
    xor.b32 %r20, %t, 31; mad.lo.s32 %r21, %r20, 16, %shared; st.shared.v4.b32 [%r21], {{%r10, %r11, %r12, %r13}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r21];
    mul.wide.u32 %d2, %t, 16; add.s64 %d2, %out, %d2;
    {" ".join(f"st.global.b32 [%d2+{4 * i}], %r{i};" for i in range(count))}"""
    found = run_body(body, rows, size=128, shared_bytes=512).view(np.uint16).reshape(LANES, 8)
    atom = LDMATRIX[count, trans]
    for lane in range(LANES):
        for v in range(2 * count):
            row, column = divmod(atom.dst_layout_bits(lane, 16 * v) // 16, 8)
            assert found[lane, v] == rows[row, column], (lane, v)


# ---- memory


def typed(opcode: str) -> tuple[str, int, int]:
    """Register letter, bytes and count of a load or store."""
    parts = opcode.split(".")
    count = next((int(p[1:]) for p in parts if p in ("v2", "v4")), 1)
    size = int(parts[-1][1:]) // 8
    return {2: "h", 4: "r", 8: "d"}[size], size, count


def accesses() -> set[str]:
    return {o for o in opcodes() if o.startswith(("ld.global", "ld.shared", "st.global", "st.shared"))}


@pytest.mark.parametrize("space", ["global", "shared"])
def test_loads_and_stores(space: str) -> None:
    """Each moves its bytes, and no others, from thread t's place to thread t's place."""
    for opcode in (o for o in accesses() if f".{space}" in o):
        letter, size, count = typed(opcode)
        width, registers = size * count, ", ".join(f"%{letter}{i}" for i in range(count))
        vector, type_ = (f".v{count}" if count > 1 else ""), f".b{8 * size}"
        named = f"{{{registers}}}" if count > 1 else registers
        load, store = f"ld.global{vector}{type_}", f"st.global{vector}{type_}"
        move = f"{load} {named}, [%d20]; {store} [%d21], {named};"
        if space == "global":
            move = move.replace(load if opcode.startswith("ld") else store, opcode)
        else:
            first, second = f"st.shared{vector}{type_}", f"ld.shared{vector}{type_}"
            first, second = (first, opcode) if opcode.startswith("ld") else (opcode, second)
            clear = " ".join(f"mov{type_} %{letter}{i}, 0;" for i in range(count))
            move = f"""{load} {named}, [%d20]; {first} [%r50], {named}; {clear}
            {second} {named}, [%r50]; {store} [%d21], {named};"""
        values = RANDOM.integers(0, 256, LANES * width, dtype=np.uint8)
        body = f"""mul.wide.u32 %d22, %t, {width}; add.s64 %d20, %in, %d22; add.s64 %d21, %out, %d22;
        mad.lo.s32 %r50, %t, {width}, %shared; {move}"""
        found = run_body(body, values, size=LANES * width // 4, shared_bytes=LANES * width)
        assert np.array_equal(found.view(np.uint8), values), opcode


def atomics() -> set[str]:
    return {o for o in opcodes() if o.startswith(("atom.", "red."))}


def test_atomics() -> None:
    """All lanes on one word: the result is that of some order; what a lane gets is what the ones before it left."""
    apply: dict[str, Callable[..., Any]] = {**REDUCTIONS, "exch": lambda _, a: a}
    for opcode in atomics():
        operation, kind = opcode.split(".")[-2:]
        dtype: Any = {"u": np.uint32, "s": np.int32, "f": np.float32, "b": np.uint32}[kind[0]]
        values = RANDOM.integers(-50 if kind[0] in "sf" else 0, 50, LANES).astype(dtype)
        shared, returns = ".shared" in opcode, opcode.startswith("atom")
        place = "[%shared]" if shared else "[%out]"
        start = "setp.eq.s32 %p1, %t, 0; @%p1 st.shared.b32 [%shared], 0; bar.sync 0;"
        if not shared:
            start = "setp.eq.s32 %p1, %t, 0; @%p1 st.global.b32 [%out], 0; bar.sync 0;"
        operands = "%r1" if operation != "cas" else "%t, %r1"  # lane t swaps if it finds t
        body = f"""{start} ld.global.b32 %r1, [%ini]; {opcode} {"%r2, " if returns else ""}{place}, {operands};
        bar.sync 0; {"st.global.b32 [%outi+4], %r2;" if returns else ""}
        {"ld.shared.b32 %r3, [%shared]; @%p1 st.global.b32 [%out], %r3;" if shared else ""}"""
        found = run_body(body, values, size=LANES + 1, shared_bytes=4).view(dtype)
        old = dtype(0)
        for lane in range(LANES):
            if returns:
                assert found[1 + lane] == old, opcode
            swapped = values[lane] if old == lane else old
            old = dtype(swapped) if operation == "cas" else dtype(apply[operation](old, values[lane]))
        assert found[0] == old, opcode


def test_every_instruction_is_tested() -> None:
    """By name here; loads, stores and atomics by the loops above; control flow and copies in test_ptx_rules.py."""
    tested = {case.opcode for case in CASES}
    rest = sorted({opcode_family(o) for o in opcodes() - tested - accesses() - atomics()})
    elsewhere = {
        *("bra", "bra.uni", "brx.idx", "ret", "exit"),
        *("bar.sync", "bar.red.and.pred", "bar.red.or.pred", "bar.warp.sync"),
        *("membar.gl", "fence.acq_rel.gpu", "nanosleep.u32", "prefetch.global.L2"),
        *("cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all"),
        *("ld.acquire.gpu.global.u32", "ld.acquire.gpu.global.b32"),
        *("st.release.gpu.global.u32", "st.release.gpu.global.b32"),
        *(f"cp.async.{c}.shared.global{h}" for c in ("ca", "cg") for h in ("", ".L2::64B", ".L2::128B", ".L2::256B")),
        *(f"ldmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16" for n, trans in LDMATRIX),
        *(f"mma.sync.aligned.m16n8k{end}" for end, _, _ in ATOMS.values()),
    }
    families = ("ld.param.", "shfl.sync.", "vote.sync.", "redux.sync.")
    assert [name for name in rest if name not in elsewhere and not name.startswith(families)] == []
