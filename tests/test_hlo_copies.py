"""What counts as a copy: results of a launch that are arguments moved, and nothing that was computed."""

import pytest
from hlo_copies import copies
from overlap import copied

from zigzag_jax.hlo import Program

pytestmark = pytest.mark.source
TRIPS = 'backend_config={"known_trip_count":{"n":"3"}}'


def program(inside: str, result: str) -> Program:
    """A loop of three trips around one fusion of q [8,4] and r [8,2]."""
    return Program(f"""HloModule jit_f, is_scheduled=true

%inside (q: f32[8,4], r: f32[8,2]) -> {result} {{
  %q = f32[8,4] parameter(0)
  %r = f32[8,2] parameter(1)
  %zero = s32[] constant(0)
{inside}
}}

%body (b: (f32[8,4], f32[8,2])) -> (f32[8,4], f32[8,2]) {{
  %b = (f32[8,4], f32[8,2]) parameter(0)
  %x = f32[8,4] get-tuple-element(%b), index=0
  %y = f32[8,2] get-tuple-element(%b), index=1
  %fused = {result} fusion(%x, %y), kind=kLoop, calls=%inside, metadata={{op_name="jit(f)/where"}}
  ROOT %t = (f32[8,4], f32[8,2]) tuple(%x, %y)
}}

%condition (c: (f32[8,4], f32[8,2])) -> pred[] {{
  %c = (f32[8,4], f32[8,2]) parameter(0)
  ROOT %less = pred[] constant(true)
}}

ENTRY %main (p: (f32[8,4], f32[8,2])) -> (f32[8,4], f32[8,2]) {{
  %p = (f32[8,4], f32[8,2]) parameter(0)
  ROOT %loop = (f32[8,4], f32[8,2]) while(%p), condition=%condition, body=%body, {TRIPS}
}}
""")


@pytest.mark.parametrize(
    ("inside", "result"),
    [
        pytest.param("  ROOT %s = f32[8,2] slice(%q), slice={[0:8], [2:4]}", "f32[8,2]", id="cut out"),
        pytest.param("  ROOT %s = f32[4,8] transpose(%q), dimensions={1,0}", "f32[4,8]", id="turned"),
        pytest.param("  ROOT %s = f32[8,6] concatenate(%q, %r), dimensions={1}", "f32[8,6]", id="joined"),
        pytest.param("  ROOT %s = f32[8,4,3] broadcast(%q), dimensions={0,1}", "f32[8,4,3]", id="repeated"),
        pytest.param("  %c = f32[8,4] copy(%q)\n  ROOT %s = f32[32] bitcast(%c)", "f32[32]", id="seen as a line"),
        pytest.param("  ROOT %s = f32[4,2] dynamic-slice(%r, %zero, %zero)", "f32[4,2]", id="cut at a place"),
    ],
)
def test_a_fusion_that_only_moves_is_a_copy(inside, result):
    (copy,) = copies(program(inside, result))
    assert (str(copy.array), copy.times, copy.name, copy.source) == (result, 3, "fused", "jit(f)/where")


@pytest.mark.parametrize(
    ("inside", "result"),
    [
        pytest.param("  ROOT %s = f32[8,4] negate(%q)", "f32[8,4]", id="computed"),
        pytest.param("  %n = f32[8,2] negate(%r)\n  ROOT %s = f32[8,6] concatenate(%q, %n)", "f32[8,6]", id="in part"),
        pytest.param("  ROOT %s = bf16[8,4] convert(%q)", "bf16[8,4]", id="rounded"),
        pytest.param("  ROOT %s = s32[8,4] broadcast(%zero), dimensions={}", "s32[8,4]", id="filled"),
        pytest.param(
            "  %s = f32[8,2] slice(%q)\n  ROOT %k = f32[8,2] custom-call(%s, %r)", "f32[8,2]", id="what a kernel reads"
        ),
    ],
)
def test_what_is_computed_is_no_copy(inside, result):
    assert copies(program(inside, result)) == []


def test_of_an_update_the_part_counts_and_of_several_results_each():
    update = "  ROOT %u = f32[8,4] dynamic-update-slice(%q, %r, %zero, %zero)"
    assert [str(copy.array) for copy in copies(program(update, "f32[8,4]"))] == ["f32[8,2]"]
    several = "  %n = f32[8,4] negate(%q)\n  %c = f32[8,2] copy(%r)\n  ROOT %u = (f32[8,4], f32[8,2]) tuple(%n, %c)"
    found = program(several, "(f32[8,4], f32[8,2])")
    assert [str(copy.array) for copy in copies(found)] == ["f32[8,2]"]
    assert copies(found, least=8 * 2 * 4 + 1) == []


def test_keys_are_found_in_whatever_order_their_axes_lie():
    turned = program("  ROOT %s = f32[4,8] transpose(%q), dimensions={1,0}", "f32[4,8]")
    assert copied(turned, 8, 4, 2) == {"f32[4,8]": 3}
    assert copied(turned, 8, 2) == copied(turned, 16, 2) == {}
