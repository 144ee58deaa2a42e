"""What travels in a step, counted and put into words; that of a real program: test_plan_compiled.py."""

from zigzag_jax.hlo import Program
from zigzag_jax.train.memory.pool import Pool
from zigzag_jax.train.memory.traffic import Travel, hops_said, table, travels

KV = "bf16[1,4096,4,128]{3,2,1,0}"  # 4 MiB
KERNEL = 'custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/flash_bwd/mpmd_map"}'
TEXT = f"""HloModule jit_f, is_scheduled=true

%body (b: (s32[], {KV})) -> (s32[], {KV}) {{
  %b = (s32[], {KV}) parameter(0)
  %x = {KV} get-tuple-element(%b), index=1
  %start.1 = ({KV}, {KV}) collective-permute-start(%x), channel_id=1
  %k = {KV} custom-call(%x), {KERNEL}
  %done.1 = {KV} collective-permute-done(%start.1)
  %start.2 = ({KV}, {KV}) collective-permute-start(%x), channel_id=2
  %small = {KV} add(%k, %k)
  %done.2 = {KV} collective-permute-done(%start.2)
  ROOT %t = (s32[], {KV}) tuple(%x, %done.1)
}}

%condition (c: (s32[], {KV})) -> pred[] {{
  %c = (s32[], {KV}) parameter(0)
  ROOT %less = pred[] constant(true)
}}

ENTRY %main (q: {KV}, w: f32[8,4]) -> {KV} {{
  %q = {KV} parameter(0)
  %w = f32[8,4] parameter(1)
  %all = f32[8,4] all-reduce(%w), to_apply=%condition
  %zero = s32[] constant(0)
  %in = (s32[], {KV}) tuple(%zero, %q)
  %loop = (s32[], {KV}) while(%in), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
  %start.3 = ({KV}, {KV}) collective-permute-start(%q), channel_id=3, backend_config={{"is_sync":true}}
  %done.3 = {KV} collective-permute-done(%start.3)
  ROOT %out = {KV} get-tuple-element(%loop), index=1
}}
"""


def test_transfers_are_counted_as_often_as_their_loop_runs():
    found = travels(Program(TEXT))
    assert found == (
        Travel("collective-permute", 4 << 20, times=7, asynchronous=6, covered=3),
        Travel("all-reduce", 128, times=1, asynchronous=0, covered=0),
    )
    assert hops_said(found) == "7 hops a step, 6 asynchronous, 3 above a kernel"
    assert hops_said(found[1:]) == "no hops"
    assert table(found, most=1) == [
        "         7 x      4.000 MiB  collective-permute, 6 asynchronous, 3 above a kernel",
        "         1 more, together 0.000 MiB",
    ]


def test_a_pool_keeps_a_twentieth_of_what_is_free():
    assert Pool(100).room(20) == 96
