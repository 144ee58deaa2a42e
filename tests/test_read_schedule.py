"""Reading a schedule: what runs while a transfer flies, how often, and what is inside fusions and loops."""

import pytest
from overlap import copied, flown
from read_schedule import draw, main, summary

from zigzag_jax.hlo import Array, Program, arrays

pytestmark = pytest.mark.source

KV = "bf16[1,8192,4,128]{3,2,1,0}"  # 8 MiB
KERNEL = 'custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/shard_map/flash_fwd/mpmd_map"}'
SYNC = 'backend_config={"is_sync":true}'
TEXT = f"""HloModule jit_f, is_scheduled=true, entry_computation_layout={{()->{KV}}}

%inside (p: {KV}) -> {KV} {{
  %p = {KV} parameter(0)
  ROOT %k = {KV} custom-call(%p), {KERNEL}
}}

%body (b: (s32[], {KV})) -> (s32[], {KV}) {{
  %b = (s32[], {KV}) parameter(0)
  %x = {KV} get-tuple-element(%b), index=1
  %start.1 = (({KV}), {KV}) collective-permute-start(%x), source_target_pairs={{{{0,1}}}}
  %fused = {KV} fusion(%x), kind=kCustom, calls=%inside
  %done.1 = {KV} collective-permute-done(%start.1)
  %copied = {KV} copy(%done.1)
  %start.2 = (({KV}, /*index=1*/{KV}), ({KV}, {KV})) collective-permute-start(%x, %copied), {SYNC}
  %done.2 = ({KV}, {KV}) collective-permute-done(%start.2)
  ROOT %t = (s32[], {KV}) tuple(%x, %x)
}}

%condition (c: (s32[], {KV})) -> pred[] {{
  %c = (s32[], {KV}) parameter(0)
  ROOT %less = pred[] constant(true)
}}

%scatter (s: f32[8,4]) -> f32[2,4] {{
  %s = f32[8,4] parameter(0)
  ROOT %rs = f32[2,4] reduce-scatter(%s), dimensions={{0}}
}}

ENTRY %main (q: {KV}, w: f32[8,4]) -> {KV} {{
  %q = {KV} parameter(0)
  %w = f32[8,4] parameter(1)
  %gather.s = (f32[8,4], f32[32,4]) all-gather-start(%w), dimensions={{0}}
  %gemm_fusion_dot.1 = f32[8,4] fusion(%w), kind=kCustom, calls=%condition
  %gather.d = f32[32,4] all-gather-done(%gather.s)
  %scatter.s = ((f32[8,4]), f32[2,4]) async-start(%w), calls=%scatter
  %partition = u32[] partition-id()
  %scatter.d = f32[2,4] async-done(%scatter.s)
  %zero = s32[] constant(0)
  %in = (s32[], {KV}) tuple(%zero, %q)
  %loop = (s32[], {KV}) while(%in), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
  ROOT %out = {KV} get-tuple-element(%loop), index=1
}}
"""
SIZE = 8192 * 4 * 128 * 2


@pytest.fixture
def program() -> Program:
    return Program(TEXT)


def test_types_and_their_sizes():
    assert arrays("(bf16[2,3]{1,0}, /*index=1*/s32[], pred[7])") == (
        Array("bf16", (2, 3)),
        Array("s32", ()),
        Array("pred", (7,)),
    )
    assert [x.size for x in arrays("bf16[2,3] s32[] pred[7] f8e4m3fn[4] c64[2] f64[2]")] == [12, 4, 7, 4, 16, 16]
    assert str(Array("f32", (1, 2))) == "f32[1,2]"


def test_what_flies_above_what(program):
    gather, scatter, hop, synchronous = program.flights()
    assert (gather.kind, gather.under, gather.asynchronous) == ("all-gather", ("matmul",), True)
    assert gather.got == (Array("f32", (32, 4)),)
    assert (scatter.kind, scatter.under, scatter.times) == ("reduce-scatter", (), 1)
    assert (hop.kind, hop.under, hop.times, hop.size) == ("collective-permute", ("flash_fwd",), 3, SIZE)
    assert (synchronous.asynchronous, synchronous.under, synchronous.size) == (False, (), 2 * SIZE)
    assert flown(program) == {"flash_fwd": 3 * SIZE, "nothing": 3 * 2 * SIZE}


def test_loops_count_as_often_as_they_run(program):
    assert program.kernels() == {"flash_fwd": 3}
    assert copied(program, 8192, 4 * 128) == {"bf16[1,8192,4,128]": 3}
    assert copied(program, 4096, 4 * 128) == copied(program, 8192, 8 * 128) == {}
    assert list(program.launched()) == [("main", 1), ("body", 3)]
    assert len(program) == 2 + 9 + 2 + 2 + 12


def test_the_picture(program, tmp_path, capsys):
    lines = list(draw(program))
    assert [line.strip() for line in lines] == [
        "matmul",
        "loop body, 3 trips",
        "┬       collective-permute bf16[1,8192,4,128], 8.0 MiB",
        "│       flash_fwd",
        "┴",
        "copy",
        "collective-permute bf16[1,8192,4,128] bf16[1,8192,4,128], 16.0 MiB, and nothing meanwhile",
    ]
    numbers = "\n".join(summary(program))
    assert "kernels run: flash_fwd 3" in numbers
    assert (
        "collective-permute: 6 transfers, 72.0 MiB a device\n    of 2 in the text 1 are synchronous, 1 have" in numbers
    )
    assert "copies of 1 MiB or more, in fusions too: 24.0 MiB" in numbers
    (tmp_path / "hlo.txt").write_text(TEXT)
    assert main([str(tmp_path / "hlo.txt")]) == 0
    assert capsys.readouterr().out == "\n".join([*lines, "", numbers]) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cp", "4", "--seq-len", "100"], r"--seq-len must be divisible by 2 * cp = 8, got 100"),
        (["--option", "xla_gpu_x"], "--option must be NAME=VALUE, got 'xla_gpu_x'"),
        (["nowhere.txt"], "No such file"),
        ([__file__], "text must be a scheduled module"),
    ],
)
def test_mistakes(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
