"""The pod's program, judged without a pod: the page is that of the stored steps, which hold what we want of them."""

import pytest

from benchmarks import pods, pods_page
from benchmarks.tpu import step
from sborax.layout.mesh import abstract_mesh
from sborax.plans import hlo
from sborax.plans.ahead import on_mesh
from sborax.plans.estimate import temporary_bytes
from sborax.plans.roofline import CHIPS, Roofline, attention_flops, received_bytes, roofline

STORED = pods.stored()
DONE = [pod for pod in pods.pods() if pod.name in STORED and "refused" not in STORED[pod.name]["result"]]


def test_the_page_is_made_from_the_stored_steps():
    assert pods.PAGE.read_text() == pods_page.page(STORED)


def test_every_stored_step_is_one_of_the_list():
    assert set(STORED) <= {pod.name for pod in pods.pods()}


@pytest.mark.parametrize("pod", DONE, ids=lambda pod: pod.name)
def test_stored_steps_cost_near_the_least(pod):
    result = STORED[pod.name]["result"]
    over = result["matmul_flops"] / pods.least_flops(pod, result["trained"])
    # Recomputing a layer is a third pass over all kernels but those of `down_proj` and the head.
    assert 0.98 < over < (1.4 if pod.remat == "full" else 1.05)
    assert sum(result["sent_bytes"].values()) / pods.least_sent(pod, result["trained"]) <= pods.SENT_GOALS[pod.method]
    assert pods.held(result) <= CHIPS[pod.chip].memory
    share = result["arguments"]["trained"] + result["arguments"]["optimizer"]
    assert share <= 1.3 * result["state"] / pods.MESHES[pod.chip]["fsdp"]


@pytest.mark.nightly
@pytest.mark.parametrize("pod", [pod for pod in DONE if not pod.method.startswith("Q")], ids=lambda pod: pod.name)
def test_the_formula_for_temporaries_is_near_the_compiled_ones(pod):
    """It decides which mesh and which changes a plan proposes."""
    rows = pod.rows * pods.CHIPS_OF_A_SLICE
    planned = step(pod.shape, pod.method, rows, pods.LENGTH, pod.remat, "splash")
    laid = on_mesh(planned, abstract_mesh(pods.MESHES[pod.chip]))
    compiled = STORED[pod.name]["result"]["temporary_bytes"]
    assert 0.85 * compiled < temporary_bytes(laid) < 1.2 * compiled


PROGRAM = """
HloModule jit_step

%fused (param_0: bf16[4,8,16], param_1: s32[]) -> bf16[8,16] {
  %param_0 = bf16[4,8,16]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %part = bf16[1,8,16]{2,1,0} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,8,16}
  ROOT %flat = bf16[8,16]{1,0} bitcast(%part)
}

%body (arg: (s32[], bf16[4,8,16], bf16[2,8])) -> (s32[], bf16[4,8,16], bf16[2,8]) {
  %arg = (s32[], bf16[4,8,16], bf16[2,8]) parameter(0)
  %turn = s32[] get-tuple-element(%arg), index=0
  %all = bf16[4,8,16]{2,1,0} get-tuple-element(%arg), index=1
  %x = bf16[2,8]{1,0:T(8,128)S(1)} get-tuple-element(%arg), index=2
  %w = bf16[8,16]{1,0} fusion(%all, %turn), kind=kLoop, calls=%fused
  %y = bf16[2,16]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %out = (s32[], bf16[4,8,16], bf16[2,8]) tuple(%turn, %all, %x)
}

%ends (arg: (s32[], bf16[4,8,16], bf16[2,8])) -> pred[] {
  %arg = (s32[], bf16[4,8,16], bf16[2,8]) parameter(0)
  %turn = s32[] get-tuple-element(%arg), index=0
  ROOT %less = pred[] compare(%turn, %turn), direction=LT
}

ENTRY %main (x: bf16[2,8], all: bf16[4,8,16]) -> bf16[2,8] {
  %x = bf16[2,8]{1,0} parameter(0)
  %all = bf16[4,8,16]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %before = (s32[], bf16[4,8,16], bf16[2,8]) tuple(%start, %all, %x)
  %known = (s32[], bf16[4,8,16], bf16[2,8]) while(%before), condition=%ends, body=%body, TRIP
  ROOT %y = bf16[2,8]{1,0} get-tuple-element(%known), index=2
}
"""


def test_products_and_traffic_are_counted_by_the_turns_of_loops():
    text = PROGRAM.replace("TRIP", 'backend_config={"known_trip_count":{"n":"4"}}')
    product = 2 * 2 * 16 * 8
    # A turn reads a slice of the stack, writes it, reads it again, and writes the product. x lies in vector memory.
    turn = 3 * 2 * 8 * 16 + 2 * 2 * 16 + 4
    assert (hlo.matmul_flops(text), hlo.memory_bytes(text)) == (4 * product, 4 * turn)
    open_ended = PROGRAM.replace(", TRIP", "")
    assert (hlo.matmul_flops(open_ended, 3), hlo.memory_bytes(open_ended, 3)) == (3 * product, 3 * turn)
    assert hlo.matmul_flops(open_ended) == product


CONVOLUTION = """HloModule step

ENTRY %main (x: f32[8,16,{length}], w: f32[16,{size},4]) -> f32[8,{outputs},4] {{
  %x = f32[8,16,{length}] parameter(0)
  %w = f32[16,{size},4] parameter(1)
  ROOT %c = f32[8,{outputs},4] convolution(%x, %w), window={{{window}}}, dim_labels=bf0_i0o->b0f
}}
"""


@pytest.mark.parametrize(
    ("length", "size", "outputs", "window", "products"),
    [
        (1, 1, 1, "size=1", 1),
        # Two products side by side: at each output, one entry of the window lies on padding.
        (1, 2, 2, "size=2 pad=1_1 rhs_reversal=1", 2),
        # A batched product: at each output, one entry of the window lies in no gap of the dilated input.
        (5, 5, 5, "size=5 stride=4 lhs_dilate=5", 5),
    ],
    ids=["alone", "side by side", "batched"],
)
def test_products_on_padding_and_in_gaps_do_not_count(length, size, outputs, window, products):
    text = CONVOLUTION.format(length=length, size=size, outputs=outputs, window=window)
    assert hlo.matmul_flops(text) == products * 2 * 8 * 16 * 4


BESIDE = """
%begin (p: bf16[1,8]) -> (bf16[1,8], bf16[4,8]) {
  %p = bf16[1,8]{1,0} parameter(0)
  %part = bf16[4,8]{1,0} all-gather(%p), dimensions={0}
  ROOT %parts = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) tuple(%p, %part)
}

%multiply (p: bf16[1,8], g: bf16[4,8], x: bf16[2,8], w: bf16[8,8]) -> (bf16[2,8], bf16[1,8], bf16[4,8]) {
  %p = bf16[1,8]{1,0} parameter(0)
  %g = bf16[4,8]{1,0} parameter(1)
  %x = bf16[2,8]{1,0} parameter(2)
  %w = bf16[8,8]{1,0} parameter(3)
  %piece = bf16[4,8]{1,0} all-gather(%p), dimensions={0}
  %y = bf16[2,8]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %all = (bf16[2,8]{1,0}, bf16[1,8]{1,0}, bf16[4,8]{1,0}) tuple(%y, %p, %piece)
}

ENTRY %main (p: bf16[1,8], x: bf16[2,8], w: bf16[8,8]) -> bf16[2,8] {
  %p = bf16[1,8]{1,0} parameter(0)
  %x = bf16[2,8]{1,0} parameter(1)
  %w = bf16[8,8]{1,0} parameter(2)
  %async-start = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) fusion(%p), kind=kCustom, calls=%begin
  %p0 = bf16[1,8]{1,0} get-tuple-element(%async-start), index=0
  %g0 = bf16[4,8]{1,0} get-tuple-element(%async-start), index=1
  %beside = (bf16[2,8]{1,0}, bf16[1,8]{1,0}, bf16[4,8]{1,0}) fusion(%p0, %g0, %x, %w), kind=kOutput, calls=%multiply
  ROOT %y = bf16[2,8]{1,0} get-tuple-element(%beside), index=0
}
"""


def test_a_gather_beside_a_product_is_counted_where_it_starts():
    product, gather = 2 * (2 * 8 + 8 * 8 + 2 * 8), 2 * (8 + 4 * 8)
    assert hlo.memory_bytes(BESIDE) == product + gather


SCHEDULE = """
HloModule jit_step, is_scheduled=true

%begin (p: bf16[1,8]) -> bf16[4,8] {
  %p = bf16[1,8]{1,0} parameter(0)
  ROOT %part = bf16[4,8]{1,0} all-gather(%p), channel_id=1, dimensions={0}, frontend_attributes={chain_id="7"}
}

%beside (p: bf16[1,8], x: bf16[4,8], w: bf16[8,8]) -> bf16[4,8] {
  %p = bf16[1,8]{1,0} parameter(0)
  %x = bf16[4,8]{1,0} parameter(1)
  %w = bf16[8,8]{1,0} parameter(2)
  %piece = bf16[4,8]{1,0} all-gather(%p), channel_id=1, dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %y = bf16[4,8]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
}

%multiply (x: bf16[4,8], w: bf16[8,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %w = bf16[8,8]{1,0} parameter(1)
  ROOT %y = bf16[4,8]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
}

ENTRY %main (p: bf16[1,8], x: bf16[4,8], w: bf16[8,8]) -> bf16[4,8] {
  %p = bf16[1,8]{1,0} parameter(0)
  %x = bf16[4,8]{1,0} parameter(1)
  %w = bf16[8,8]{1,0} parameter(2)
  %first = bf16[4,8]{1,0} fusion(%p), kind=kCustom, calls=%begin
  %second = bf16[4,8]{1,0} fusion(%p, %x, %w), kind=kOutput, calls=BESIDE
  %sends = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]) collective-permute-start(%x), channel_id=2
  MIDDLE
  %sent = bf16[4,8]{1,0} collective-permute-done(%sends)
  %z = bf16[4,8]{1,0} fusion(%sent, %w), kind=kOutput, calls=%multiply
  ROOT %sum = bf16[4,8]{1,0} all-reduce(%z), channel_id=3, to_apply=%add
}
"""


def test_what_is_sent_beside_products_is_read_from_the_schedule():
    product = "%y = bf16[4,8]{1,0} fusion(%x, %w), kind=kOutput, calls=%multiply"
    size = 2 * 4 * 8
    beside = SCHEDULE.replace("BESIDE", "%beside").replace("MIDDLE", product)
    assert hlo.collective_bytes(beside) == {"all-gather": size, "collective-permute": size, "all-reduce": size}
    assert hlo.overlapped_bytes(beside) == {"all-gather": size, "collective-permute": size, "all-reduce": 0}
    alone = SCHEDULE.replace("BESIDE", "%begin").replace("MIDDLE", "")
    assert hlo.collective_bytes(alone) == hlo.collective_bytes(beside)
    assert not any(hlo.overlapped_bytes(alone).values())


GOES_ON = """
HloModule jit_step, is_scheduled=true

%begin (p: bf16[1,8]) -> bf16[4,8] {
  %p = bf16[1,8]{1,0} parameter(0)
  ROOT %part = bf16[4,8]{1,0} all-gather(%p), channel_id=1, frontend_attributes={chain_id="7"}, backend_config=FIRST
}

%beside (p: bf16[1,8], x: bf16[4,8]) -> bf16[4,8] {
  %p = bf16[1,8]{1,0} parameter(0)
  %x = bf16[4,8]{1,0} parameter(1)
  %piece = bf16[4,8]{1,0} all-gather(%p), channel_id=1, frontend_attributes={chain_id="7"}, backend_config=NEXT
  ROOT %y = bf16[4,8]{1,0} convolution(%x, %x), dim_labels=bf_oi->bf
}

%body (s: (bf16[1,8], bf16[4,8])) -> (bf16[1,8], bf16[4,8]) {
  %s = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) parameter(0)
  %p = bf16[1,8]{1,0} get-tuple-element(%s), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%s), index=1
  %y = bf16[4,8]{1,0} fusion(%p, %x), kind=kOutput, calls=%beside
  ROOT %t = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) tuple(%p, %y)
}

%end (p: bf16[1,8]) -> bf16[4,8] {
  %p = bf16[1,8]{1,0} parameter(0)
  ROOT %part = bf16[4,8]{1,0} all-gather(%p), channel_id=1, frontend_attributes={chain_id="7"}, backend_config=NEXT
}

ENTRY %main (p: bf16[1,8], s: (bf16[1,8], bf16[4,8])) -> bf16[4,8] {
  %p = bf16[1,8]{1,0} parameter(0)
  %s = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) parameter(1)
  %first = bf16[4,8]{1,0} fusion(%p), kind=kCustom, calls=%begin
  %t = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) while(%s), body=%body, backend_config={"known_trip_count":{"n":"4"}}
  ROOT %last = bf16[4,8]{1,0} fusion(%p), kind=kCustom, calls=%end
}
"""


def test_a_gather_that_goes_on_in_a_loop_is_sent_once():
    flags = '{"async_collective_fusion_config":{"flag_start":"%d","flag_end":"8"}}'
    text, size = GOES_ON.replace("FIRST", flags % -1).replace("NEXT", flags % 2), 2 * 4 * 8
    assert hlo.collective_bytes(text) == hlo.overlapped_bytes(text) == {"all-gather": size}
    # One that begins and ends in the loop is sent in every turn.
    assert hlo.collective_bytes(text.replace(flags % 2, flags % -1)) == {"all-gather": 5 * size}


OFFLOADED = """
HloModule jit_step, is_scheduled=true

%gather (p: bf16[1,8]) -> bf16[4,8] {
  %p = bf16[1,8]{1,0} parameter(0)
  ROOT %part = bf16[4,8]{1,0} all-gather(%p), channel_id=1, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (p: bf16[1,8], x: bf16[4,8], w: bf16[8,8]) -> bf16[4,8] {
  %p = bf16[1,8]{1,0} parameter(0)
  %x = bf16[4,8]{1,0} parameter(1)
  %w = bf16[8,8]{1,0} parameter(2)
  %begins = ((), (), (s32[128]{0:S(4)})) custom-call-start(), called_computations={%gather}
  BEFORE
  %goes = ((bf16[1,8]{1,0}), bf16[4,8]{1,0}, (s32[128]{0})) custom-call-update(%begins, %p)
  BESIDE
  %part = bf16[4,8]{1,0} custom-call-done(%goes)
  ROOT %z = bf16[4,8]{1,0} dot(%part, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_a_gather_of_another_core_is_beside_the_products_behind_its_operand():
    product, size = "%y = bf16[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 4 * 8
    for head, body, overlapped in ((product, "", 0), ("", product, size)):
        text = OFFLOADED.replace("BEFORE", head).replace("BESIDE", body)
        assert (hlo.collective_bytes(text), hlo.overlapped_bytes(text)) == (
            {"all-gather": size},
            {"all-gather": overlapped},
        )


def test_the_largest_time_bounds_a_step():
    assert received_bytes({"all-gather": 100, "all-reduce": 10, "reduce-scatter": 1}, 4) == 100 + 20 + 4
    times = roofline(CHIPS["v5e"], 197 * 10**12, 2 * 819 * 10**9, 50 * 10**9)
    assert times == Roofline(1.0, 2.0, 0.25) and (times.seconds, times.bound) == (2.0, "memory")
    # Forward, 2 products over half of all pairs, 2 FLOPs for each multiply-add.
    recomputation, single = (attention_flops(3, 64, 5, 128, recompute) for recompute in (True, False))
    assert recomputation - single == 3 * 5 * 2 * 2 * (128 * 128 / 2) * 64
