"""What the PTX executor refuses: races, copies that nobody waited for, bounds, lanes that miss; and its schedules."""

from __future__ import annotations

import numpy as np
import pytest

from ptx_text import LANES, evaluate, run_body
from ptx_tools import Kernels, PtxError, Schedule

SOURCE = np.arange(256, dtype=np.uint32)
SCHEDULES = [Schedule(), Schedule("reverse"), Schedule("random", 1), Schedule("random", 2)]

# Thread t writes t at its place, and reads that of its neighbour in another warp (xor 32) or in its own (xor 1).
WRITE = "shl.b32 %r1, %t, 2; add.s32 %r1, %r1, %shared; st.shared.b32 [%r1], %t;"
READ = "xor.b32 %r2, %t, {other}; shl.b32 %r2, %r2, 2; add.s32 %r2, %r2, %shared; ld.shared.b32 %r3, [%r2];"
AGAIN = "st.shared.b32 [%r1], 77;"
STORE = "st.global.b32 [%outi], %r3;"

pytestmark = pytest.mark.breadth  # half a minute of compilation


def run_64(body: str, schedule: Schedule = SCHEDULES[0]) -> list[int]:
    return run_body(body, SOURCE, threads=64, shared_bytes=256, schedule=schedule).tolist()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("other", [1, 32])
def test_a_barrier_orders(other: int, schedule: Schedule) -> None:
    expected = [t ^ other for t in range(64)]
    body = f"{WRITE} bar.sync 0; {READ.format(other=other)} {STORE}"
    assert run_64(body, schedule) == expected
    # What was read may be written after another barrier.
    assert run_64(f"{body} bar.sync 0; {WRITE}", schedule) == expected


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_bar_warp_sync_orders_a_warp(schedule: Schedule) -> None:
    within, across = (f"{WRITE} bar.warp.sync -1; {READ.format(other=o)} {STORE}" for o in (1, 32))
    assert run_64(within, schedule) == [t ^ 1 for t in range(64)]
    with pytest.raises(PtxError, match=r"shared memory at .*: (another thread wrote there|nobody wrote there)"):
        run_64(across, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    "body, message",
    [
        (f"{WRITE} {READ.format(other=1)}", "ld.shared.b32 .*another thread wrote there since the last barrier"),
        (f"{WRITE} bar.sync 0; {READ.format(other=1)} {AGAIN}", "st.shared.b32 .*another thread read there"),
        (f"{WRITE} bar.sync 0; {READ.format(other=32)} {AGAIN}", "another thread (read|wrote) there since"),
        ("st.shared.b32 [%shared], %t;", "st.shared.b32 .*another thread wrote there since the last barrier"),
        ("ld.shared.b32 %r3, [%shared+128];", "shared memory at 128: nobody wrote there"),
        (f"{WRITE} bar.sync 0; {READ.format(other=64)}", r"shared memory: bytes \d+ to \d+ of 256"),
        ("st.shared.b32 [%shared+2], %t;", "shared memory: 4 bytes at an address that is 2 off"),
        ("st.global.b32 [%outi], %t; ld.global.b32 %r3, [%out];", r"out at byte \d: another thread (read|wrote) there"),
        ("st.global.b32 [%outi+4], %t;", "out: bytes 256 to 260 of 256"),
        ("ld.global.b32 %r3, [%in+-4];", "in: bytes -4 to 0 of 1024"),
        ("ld.global.v2.b32 {%r3, %r4}, [%ini];", "in: 8 bytes at an address that is 4 off"),
        ("st.global.b32 [%ini], %t;", "in: is only read, and was written"),
        ("mov.b64 %d1, 64; ld.global.b32 %r3, [%d1];", "address 64 belongs to no buffer"),
        ("atom.shared.add.u32 %r3, [%shared], %t;", "nobody wrote there"),
        (f"{WRITE} atom.shared.add.u32 %r3, [%shared], %t;", "(another thread|nobody) wrote there"),
    ],
)  # fmt: skip
def test_faults_of_memory(body: str, message: str, schedule: Schedule) -> None:
    with pytest.raises(PtxError, match=message):
        run_64(body, schedule)


def test_one_of_the_lanes_that_store_to_one_place_wins() -> None:
    body = f"""setp.lt.u32 %p1, %t, 32; @%p1 st.shared.b32 [%shared], %t; bar.sync 0;
    ld.shared.b32 %r3, [%shared]; {STORE}"""
    assert run_64(body) == [31] * 64
    assert run_64(body, SCHEDULES[1]) == [0] * 64


def test_equal_stores_are_no_race() -> None:
    body = f"mov.b32 %r9, 7; st.shared.b32 [%shared], %r9; bar.sync 0; ld.shared.b32 %r3, [%shared]; {STORE}"
    assert run_64(body) == [7] * 64


def test_blocks_share_nothing() -> None:
    assert run_body("st.global.b32 [%outi], %block;", SOURCE, blocks=3).tolist() == [
        b for b in range(3) for _ in range(32)
    ]
    with pytest.raises(PtxError, match="another block of this launch wrote there"):
        run_body("st.global.b32 [%out], %block;", SOURCE, blocks=2)
    body = "setp.eq.u32 %p1, %block, 1; @%p1 ld.global.b32 %r1, [%outi+-128]; st.global.b32 [%outi], %block;"
    with pytest.raises(PtxError, match="another block of this launch read there"):
        run_body(body, SOURCE, blocks=2, schedule=SCHEDULES[1])


# ---- copies

COPY = """mul.wide.u32 %d1, %t, 16; add.s64 %d1, %in, %d1; mad.lo.s32 %r1, %t, 16, %shared;
    cp.async.cg.shared.global [%r1], [%d1], 16; cp.async.commit_group;"""
OWN = "ld.shared.b32 %r3, [%r1];"
OTHER = "xor.b32 %r2, %t, 1; mad.lo.s32 %r2, %r2, 16, %shared; ld.shared.b32 %r3, [%r2];"


def run_copies(body: str, schedule: Schedule = SCHEDULES[0]) -> list[int]:
    return run_body(body, SOURCE, shared_bytes=1024, schedule=schedule).tolist()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_copies(schedule: Schedule) -> None:
    assert run_copies(f"{COPY} cp.async.wait_group 0; {OWN} {STORE}", schedule) == [4 * t for t in range(LANES)]
    assert run_copies(f"{COPY} cp.async.wait_all; {OWN} {STORE}", schedule) == [4 * t for t in range(LANES)]
    after = f"{COPY} cp.async.wait_group 0; bar.sync 0; {OTHER} {STORE}"
    assert run_copies(after, schedule) == [4 * (t ^ 1) for t in range(LANES)]
    for opcode in ("ca", "cg"):
        for hint in ("", ".L2::64B", ".L2::128B", ".L2::256B"):
            body = after.replace("cp.async.cg.shared.global", f"cp.async.{opcode}.shared.global{hint}")
            assert run_copies(body, schedule) == [4 * (t ^ 1) for t in range(LANES)]


@pytest.mark.parametrize(
    "body, message",
    [
        (f"{COPY} {OWN}", "a cp.async is on its way there that nobody waited for"),
        (f"{COPY} cp.async.wait_group 1; {OWN}", "a cp.async is on its way"),
        (f"{COPY} bar.sync 0; {OTHER}", "a cp.async is on its way"),
        (f"{COPY.replace('cp.async.commit_group;', '')} cp.async.wait_group 0; {OWN}", "a cp.async is on its way"),
        (f"{COPY} cp.async.wait_group 0; {OTHER}", "another thread wrote there since the last barrier"),
        (f"{COPY} st.shared.b32 [%r1], %t;", "a cp.async is on its way"),
        (f"{COPY} cp.async.cg.shared.global [%r1], [%d1], 16;", "a cp.async is on its way"),
        (COPY.replace("[%d1], 16;", "[%d1+1024], 16;"), "in: bytes 1024 to 1026 of 1024"),
        (COPY.replace("[%d1], 16;", "[%d1+8], 16;"), "copies 16 bytes from an address that is 8 off"),
        (COPY.replace("[%r1]", "[%r1+4]"), "shared memory: 16 bytes at an address that is 4 off"),
    ],
)  # fmt: skip
def test_faults_of_copies(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run_copies(body)


def test_groups_of_copies_arrive_in_order() -> None:
    two = COPY + COPY.replace("[%r1]", "[%r1+512]").replace("[%d1]", "[%d1+512]")
    first, second = ("ld.shared.b32 %r3, [%r1];", "ld.shared.b32 %r3, [%r1+512];")
    assert run_copies(f"{two} cp.async.wait_group 1; {first} {STORE}") == [4 * t for t in range(LANES)]
    with pytest.raises(PtxError, match=r"a cp\.async is on its way"):
        run_copies(f"{two} cp.async.wait_group 1; {second} {STORE}")
    assert run_copies(f"{two} cp.async.wait_group 0; {second} {STORE}") == [128 + 4 * t for t in range(LANES)]


def test_what_is_not_read_is_zero() -> None:
    """And may lie anywhere."""
    body = COPY.replace("[%d1], 16;", "[%d1], 16, %r20;") + " cp.async.wait_group 0;"
    select = "and.b32 %r19, %t, 1; shl.b32 %r20, %r19, 4; setp.eq.s32 %p1, %r19, 0; "
    shifted = body.replace("mad.lo", "@%p1 add.s64 %d1, %d1, 1000004; mad.lo", 1)
    found = run_copies(f"{select} {shifted} {OWN} {STORE}")
    assert found == [4 * t if t % 2 else 0 for t in range(LANES)]


# ---- the lanes of a warp

LOOP = """mov.b32 %r1, 0;
AGAIN: setp.ge.u32 %p1, %r1, %t; @%p1 bra DONE; add.s32 %r1, %r1, 1; bra.uni AGAIN;
DONE: """


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_lanes_part_and_meet(schedule: Schedule) -> None:
    body = f"{LOOP} shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1; {STORE}"
    assert run_64(body, schedule) == [t ^ 1 for t in range(64)]


BY_INDEX = """and.b32 %r1, %t, 3; setp.lt.u32 %p1, %t, 60;
LIST: .branchtargets ZERO, ONE, ZERO, THREE;
    @%p1 brx.idx %r1, LIST;
    mov.b32 %r3, 9; bra DONE;
THREE: mov.b32 %r3, 3; bra DONE;
ONE: mov.b32 %r3, 1; bra DONE;
ZERO: mov.b32 %r3, 0;
DONE:"""


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_lanes_branch_by_a_number(schedule: Schedule) -> None:
    """And meet again; those that the guard leaves out go on behind the branch."""
    expected = [9 if t >= 60 else (0, 1, 0, 3)[t & 3] for t in range(64)]
    assert run_64(f"{BY_INDEX} {STORE}", schedule) == expected
    meeting = f"{BY_INDEX} shfl.sync.bfly.b32 %r3, %r3, 1, 31, -1; {STORE}"
    assert run_64(meeting, schedule) == [expected[t ^ 1] for t in range(64)]
    with pytest.raises(PtxError, match=r"brx\.idx .*lane \d+ takes label \d+ of 2"):
        run_64("LIST: .branchtargets DONE, DONE; brx.idx %t, LIST; DONE:", schedule)


@pytest.mark.parametrize(
    "body, message",
    [
        ("setp.eq.s32 %p1, %t, 3; @!%p1 shfl.sync.bfly.b32 %r3, %t, 1, 31, -1;", "lanes take no part that must: 3"),
        ("setp.eq.s32 %p1, %t, 3; @%p1 ret; shfl.sync.bfly.b32 %r3, %t, 1, 31, -1;", "must: 3"),
        ("shfl.sync.bfly.b32 %r3, %t, 1, 31, 255;", "lanes take part that are not named as members"),
        ("setp.lt.u32 %p1, %t, 16; @%p1 shfl.sync.bfly.b32 %r3, %t, 16, 31, 65535;", "reads lane 16, which takes no"),
        ("setp.eq.s32 %p1, %t, 3; @%p1 bra A; bar.sync 0; A: bar.sync 0;", "wait for each other at different places"),
        ("setp.eq.s32 %p1, %t, 3; @!%p1 bar.sync 0;", "lanes do not reach the barrier: 3"),
        ("setp.ge.s32 %p1, %t, 32; @%p1 ret; bar.sync 0;", "warps wait for a barrier that others never reach: line"),
        ("setp.ge.s32 %p1, %t, 32; @%p1 bra A; bar.sync 0; ret; A: bar.sync 1;", "warps wait at different barriers"),
        ("bar.sync 0, 32;", "only barriers of all threads are supported"),
        ("setp.lt.u32 %p1, %t, 16; @%p1 bar.warp.sync 65535;", "only all lanes together"),
    ],
)  # fmt: skip
def test_faults_of_lanes(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run_64(body)


@pytest.mark.parametrize("operation, found", [("and", [0, 1]), ("or", [1, 0])])
def test_barriers_that_reduce(operation: str, found: list[int]) -> None:
    """Whether all threads, and whether any, are not the last; and the same of threads below 0, above -1."""
    test = f"bar.red.{operation}.pred %p2, 0, %p1; selp.b32 %r3, 1, 0, %p2; {STORE}"
    bounds = (
        "setp.lt.u32 %p1, %t, 63;",
        "setp.ge.s32 %p1, %t, 0;" if operation == "and" else "setp.lt.s32 %p1, %t, 0;",
    )
    assert [set(run_64(f"{bound} {test}")) for bound in bounds] == [{value} for value in found]


# ---- blocks and schedules


def test_schedules_differ() -> None:
    """The order in which threads of two warps and blocks take a number."""
    body = """setp.eq.s32 %p1, %t, 0; atom.global.add.u32 %r3, [%out], 1; st.global.b32 [%outi+4], %r3;"""

    def order(schedule: Schedule) -> tuple[int, ...]:
        start = "mov.b32 %r10, 0;"
        return tuple(run_body(start + body, SOURCE, threads=64, blocks=2, size=129, schedule=schedule)[1:].tolist())

    first = 0x7FC00000  # NaN, which the counter starts from
    assert order(SCHEDULES[0]) == tuple(first + i for i in range(128))
    assert order(SCHEDULES[1])[96:] == tuple(first + i for i in range(32))
    assert len({order(schedule) for schedule in SCHEDULES}) == 4
    assert order(SCHEDULES[2]) == order(SCHEDULES[2])


MEETING = """setp.ne.s32 %p1, %t, 0; @%p1 bra WAITED;
    red.release.gpu.global.add.u32 [%out], 1;
SPIN: ld.acquire.gpu.global.u32 %r3, [%out]; add.s32 %r4, %r3, -0x7fc00000; setp.ge.s32 %p2, %r4, 2; @%p2 bra WAITED;
    nanosleep.u32 %r4; bra.uni SPIN;
WAITED: bar.sync 0; membar.gl; fence.acq_rel.gpu; prefetch.global.L2 [%in]; mov.u64 %d9, %globaltimer;
    st.global.b32 [%outi+4], %block;"""


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_blocks_meet_if_they_are_resident(schedule: Schedule) -> None:
    found = run_body(MEETING, SOURCE, blocks=2, size=65, resident_blocks=2, blocks_share=True, schedule=schedule)
    assert found[1:].tolist() == [b for b in range(2) for _ in range(LANES)]
    # A value is released as it is acquired.
    body = (
        "setp.eq.s32 %p1, %t, 0; @%p1 st.release.gpu.global.b32 [%out], 9; ld.acquire.gpu.global.b32 %r3, [%out]; exit;"
    )
    assert run_body(body, SOURCE)[0] == 9


# Block 0 writes its words and releases a count; block 1 waits for that and copies them.
HANDED_OVER = """setp.eq.u32 %p1, %block, 0; setp.ne.s32 %p2, %t, 0; @!%p1 bra READER;
    st.global.b32 [%outi+8], %t; bar.sync 0; @%p2 bra END; red.release.gpu.global.add.u32 [%out], 1; bra.uni END;
READER: @%p2 bra WAITED;
SPIN: ld.acquire.gpu.global.u32 %r3, [%out]; setp.eq.s32 %p3, %r3, 0x7fc00001; @%p3 bra WAITED;
    nanosleep.u32 %r4; bra.uni SPIN;
WAITED: bar.sync 0; mul.wide.u32 %d1, %t, 4; add.s64 %d1, %out, %d1; ld.global.b32 %r5, [%d1+8];
    st.global.b32 [%outi+8], %r5;
END:"""


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    "old, new",
    [
        ("", ""),
        ("red.release", "red.relaxed"),
        ("ld.acquire.gpu.global", "ld.global"),
        ("%t; bar.sync 0;", "%t;"),
        ("WAITED: bar.sync 0;", "WAITED:"),
    ],
    ids=["right", "relaxed", "no acquire", "no barrier before", "no barrier after"],
)
def test_a_release_and_an_acquire_order_blocks(old: str, new: str, schedule: Schedule) -> None:
    """With a barrier on either side of them, for all threads."""

    def run() -> list[int]:
        body = HANDED_OVER.replace(old, new) if old else HANDED_OVER
        return run_body(
            body, SOURCE, blocks=2, size=66, resident_blocks=2, blocks_share=True, schedule=schedule
        ).tolist()

    if not old:
        assert run()[2:] == 2 * list(range(LANES))
        return
    with pytest.raises(PtxError, match=r"another block of this launch (wrote|read) there"):
        run()


# ---- the text


@pytest.mark.parametrize(
    "body, message",
    [
        ("wgmma.fence.sync.aligned;", "`wgmma.fence.sync.aligned`: no such instruction here: wgmma.fence"),
        ("add.s32 %r1, %r2, %d1;", "line .*`add.s32 %r1, %r2, %d1`: operands are not of r=rr"),
        ("add.f32 %r1, %r2;", "operands are not of r=rr"),
        ("ld.shared.b32 %r1, [nothing];", "no variable nothing"),
        ("bra NOWHERE;", "no label NOWHERE"),
        ("brx.idx %r1, NOWHERE;", "no list of labels NOWHERE"),
        ("L: .branchtargets NOWHERE; brx.idx %r1, L;", "no label NOWHERE"),
        (".local .b8 depot[16];", "`.local .b8 depot"),
        ("mov.u32 %r1, %clock;", "operands are not of r=r"),
        ("ld.param.u32 %r1, [first+16];", "parameters: 4 bytes at 16 of 16"),
        ("add.s32 %r1, 12q, %r2;", "`12q` is no number"),
    ],
)  # fmt: skip
def test_faults_of_the_text(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run_body(body, SOURCE)


def test_faults_of_launches() -> None:
    kernels = Kernels(".visible .entry k(.param .u32 n)\n.reqntid 64\n{ ret; }")
    with pytest.raises(PtxError, match="threads: got 32, the kernel requires 64"):
        kernels.run("k", (1,), 32, bytes(4), [])
    with pytest.raises(PtxError, match="threads: got 33, accepted are multiples of 32"):
        kernels.run("k", (1,), 33, bytes(4), [])
    with pytest.raises(PtxError, match="parameters: got 8 bytes, the kernel takes 4"):
        kernels.run("k", (1,), 64, bytes(8), [])
    with pytest.raises(PtxError, match="no kernel q"):
        kernels.run("q", (1,), 64, bytes(4), [])
    assert kernels.run("k", (2, 3, 4), 64, bytes(4), []).blocks == 24


def test_scopes_and_registers_that_nobody_wrote() -> None:
    """A register declared in braces hides one outside; what nobody wrote is NaN."""
    body = "mov.b32 %r1, 1; { .reg .b32 %r1; mov.b32 %r1, 2; } st.global.b32 [%outi], %r1;"
    assert set(run_body(body, SOURCE).tolist()) == {1}
    assert np.isnan(run_body("st.global.b32 [%outi], %r7;", SOURCE).view(np.float32)).all()


def test_mma_may_round_to_zero() -> None:
    """1 - 2^-13 * 2^-13: rounded to nearest it is 1, to zero the number before."""
    one = [np.full(LANES, 1.0, np.float32)] * 4
    a = [np.full(LANES, -(2.0**-13) if i == 0 else 0, np.float32) for i in range(4)]
    b = [np.where(np.arange(LANES) % 4 == 0, 2.0**-13, 0).astype(np.float32), np.zeros(LANES, np.float32)]
    opcode = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
    near, low = (
        evaluate(opcode, "rrrr=rrrrrrrrrr", [*a, *b, *one], (4, 4, 2, 4), truncate_mma=t)[0].view(np.float32)[0]
        for t in (False, True)
    )
    assert near == 1
    assert low == np.nextafter(np.float32(1), np.float32(0))
