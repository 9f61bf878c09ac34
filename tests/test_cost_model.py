"""The cost model: figures by hand, laws it must obey, and agreement with what the templates do."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from specattn_codegen import cost_model, space
from specattn_codegen.build import triton as triton_build
from specattn_codegen.build.resources import Resources
from specattn_codegen.cost_model import attention, floor, grid, occupancy, selection
from specattn_codegen.cost_model.grid import Grid, Iteration
from specattn_codegen.cost_model.hardware import LAUNCH_US, rates
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.plan import Plan, Setting
from specattn_codegen.processors import gpus
from specattn_codegen.processors.arch import Arch
from specattn_codegen.render import render
from specattn_codegen.spec import OPS, KernelSpec, ScoreSpec, Workload
from specattn_codegen.workloads import default_workloads, model_specs

H100 = gpus.find("h100")
LLAMA = HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128)
SPECS = model_specs(LLAMA, dtype="bfloat16", page_size=16, ops=OPS)
VERIFY = SPECS[0]
REFERENCE = dataclasses.replace(VERIFY, score=ScoreSpec(normaliser="reference"))
FLOAT8 = dataclasses.replace(VERIFY, kv_dtype="float8_e4m3", page_size=64)
NEW = [
    REFERENCE,
    FLOAT8,
    dataclasses.replace(VERIFY, score=ScoreSpec(value="logit", heads="layer", granularity="page_max")),
    dataclasses.replace(VERIFY, page_size=880, score=ScoreSpec(rows="last", granularity="page_mean", histogram=True)),
]
ROWS = Workload(batch=2, q_len=7, kv_len=4096)


def predict(spec: KernelSpec, workload: Workload, plan: Plan, arch: Arch = H100) -> cost_model.Prediction:
    return cost_model.predict(spec, workload, plan, arch, cost_model.guess_resources(spec, plan, arch))


def some_plans(spec: KernelSpec, arch: Arch = H100) -> list[Plan]:
    plans = list(space.feasible(spec, arch, "triton"))
    return random.Random(spec.name).sample(plans, min(12, len(plans)))


@pytest.mark.parametrize("spec", [*SPECS, *NEW], ids=lambda spec: spec.name)
def test_plans_that_share_launches_are_predicted_as_each_on_its_own(spec: KernelSpec) -> None:
    taken = {
        plan: tuple(
            dataclasses.replace(kernel, registers=kernel.registers + index % 3, spill_bytes=index % 2 * 64)
            for kernel in cost_model.guess_resources(spec, plan, H100)
        )
        for index, plan in enumerate(random.Random(1).sample(list(space.feasible(spec, H100, "triton")), 100))
    }
    for arch in (H100, dataclasses.replace(H100, fit=(("launch", 1.5), ("memory", 1.1)))):
        together = cost_model.latencies_us(spec, ROWS, taken, arch)
        assert together == {plan: cost_model.latency_us(spec, ROWS, plan, arch, own) for plan, own in taken.items()}


def test_the_floor_of_llama_3_by_hand() -> None:
    """4096 keys of 8 heads, K and V of 128 bfloat16 each; 7 rows of 32 heads read, written and summed up."""
    work = floor.least_work(VERIFY, Workload(batch=2, q_len=7, kv_len=4096))
    cache = 4096 * 8 * (128 + 128) * 2
    rows = 7 * 32 * ((128 + 128) * 2 + 4)
    assert work.memory_bytes == 2 * (cache + rows)
    assert floor.least_work(FLOAT8, ROWS).memory_bytes == 2 * (cache // 2 + rows)
    references, scores = 7 * 32 * 4, 8 * (4096 - 7) * 4
    assert floor.least_work(REFERENCE, ROWS).memory_bytes == 2 * (cache + rows + references + scores)
    pages = dataclasses.replace(VERIFY, score=ScoreSpec(granularity="page_max", histogram=True))
    assert floor.least_work(pages, ROWS).memory_bytes == 2 * (cache + rows + 8 * (256 + 1024) * 4)
    assert work.operations == 2 * 2 * 7 * 32 * 4096 * 256
    expected = work.memory_bytes / (H100.bandwidth_gbs * 1e3)
    assert cost_model.floor_us(VERIFY, Workload(batch=2, q_len=7, kv_len=4096), H100) == pytest.approx(expected)


def test_a_window_and_a_budget_bound_the_keys() -> None:
    windowed = dataclasses.replace(VERIFY, heads=dataclasses.replace(LLAMA, window=1024))
    assert floor.keys_read(windowed, Workload(batch=1, q_len=7, kv_len=32768)) == 1030
    sparse = SPECS[-1]
    assert floor.keys_read(sparse, Workload(batch=1, q_len=1, kv_len=32768, budget=2000)) == 2001


@pytest.mark.parametrize(
    ("registers", "smem_bytes", "num_warps", "blocks"),
    [
        (128, 40960, 4, 4),  # 65536 / (128 * 128) by registers; 233472 / 41984 = 5 by shared memory
        (32, 0, 4, 16),  # 2048 / 128 threads
        (97, 1024, 4, 4),  # 104 registers after rounding: 65536 / 13312
        (255, 232448, 8, 1),
        (255, 0, 16, 0),  # 256 * 512 registers: more than there are
    ],
)
def test_occupancy_by_hand(registers: int, smem_bytes: int, num_warps: int, blocks: int) -> None:
    kernel = Resources(
        kernel="k",
        registers=registers,
        spill_bytes=0,
        smem_bytes=smem_bytes,
        num_warps=num_warps,
        binary_bytes=0,
    )
    assert occupancy.blocks_per_sm(kernel, H100) == blocks
    assert (occupancy.why_unfit((kernel,), H100) is None) == (blocks > 0)


def test_a_binary_that_takes_too_much_shared_memory_does_not_fit() -> None:
    kernel = Resources(
        kernel="k", registers=32, spill_bytes=0, smem_bytes=H100.smem_per_block + 1, num_warps=4, binary_bytes=0
    )
    assert "shared memory" in (occupancy.why_unfit((kernel,), H100) or "")


@pytest.mark.parametrize("spec", [*SPECS, *NEW], ids=lambda spec: spec.name)
def test_no_prediction_beats_the_roofline_and_terms_add_up(spec: KernelSpec) -> None:
    for workload in default_workloads(spec, H100):
        least = cost_model.floor_us(spec, workload, H100)
        for plan in some_plans(spec):
            prediction = predict(spec, workload, plan)
            assert prediction.latency_us >= least
            assert prediction.latency_us == pytest.approx(sum(term.microseconds for term in prediction.terms))
            assert prediction.share_of_ceiling == pytest.approx(least / prediction.latency_us)
            assert prediction.bytes_moved >= prediction.bytes_least
            launches = sum(term.name not in ("launches", "merge") for term in prediction.terms)
            assert prediction.terms[-1].microseconds == LAUNCH_US * launches
            longest = max(term.microseconds for term in prediction.terms)
            assert prediction.bound.startswith(
                tuple(term.name for term in prediction.terms if term.microseconds == longest)
            )


@pytest.mark.parametrize("spec", [*SPECS, *NEW], ids=lambda spec: spec.name)
def test_more_work_takes_longer_and_a_faster_memory_never_does(spec: KernelSpec) -> None:
    faster = dataclasses.replace(H100, bandwidth_gbs=2 * H100.bandwidth_gbs)
    small = Workload(batch=16, q_len=1, kv_len=32768, budget=2294)
    large = Workload(batch=16, q_len=1, kv_len=131072, budget=9175)
    for plan in some_plans(spec):
        assert predict(spec, small, plan).latency_us < predict(spec, large, plan).latency_us
        assert predict(spec, large, plan, faster).latency_us <= predict(spec, large, plan).latency_us


def test_a_long_batch_is_bound_by_memory_near_the_streaming_share() -> None:
    workload = Workload(batch=16, q_len=7, kv_len=131072)
    best = min(
        (predict(VERIFY, workload, plan) for plan in space.feasible(VERIFY, H100, "triton")), key=lambda p: p.latency_us
    )
    assert best.bound == "attend_splits: memory"
    assert 0.8 < best.share_of_ceiling <= 0.9


def test_spills_and_low_occupancy_cost_time() -> None:
    workload = Workload(batch=16, q_len=7, kv_len=32768)
    plan = space.default_plan(VERIFY, H100, "triton")
    lean, merge = cost_model.guess_resources(VERIFY, plan, H100)

    def latency(attend: Resources) -> float:
        return cost_model.predict(VERIFY, workload, plan, H100, (attend, merge)).latency_us

    assert latency(dataclasses.replace(lean, spill_bytes=2000)) > latency(lean)
    starved = dataclasses.replace(lean, smem_bytes=8192 + 32768)  # one tile in flight, one block to a multiprocessor
    assert latency(dataclasses.replace(starved, registers=255)) >= latency(starved)


def test_what_scores_cost_by_hand() -> None:
    """Of 2 requests of 4,089 prefix keys: each way moves its own bytes, and a reference in one tile of rows none."""
    least = floor.least_work(REFERENCE, ROWS).memory_bytes

    def excess(score: ScoreSpec, **changes: Setting) -> int:
        spec = dataclasses.replace(VERIFY, score=score)
        plan = space.default_plan(spec, H100, "triton").replace(**changes)
        splits, _ = attention.used_splits(spec, plan, ROWS, H100)
        partials = 2 * splits * (2 * 7 * 32) * (128 + 1) * 4
        return predict(spec, ROWS, plan).bytes_moved - floor.least_work(spec, ROWS).memory_bytes - partials

    keys = 2 * 4089
    assert excess(ScoreSpec(), score_method="remat") == keys * 8 * 128 * 2
    assert excess(ScoreSpec(), score_method="dump") == 2 * (keys * 7 * 32 * 2 + keys * 7 * 32 // 64 * 4)
    assert excess(ScoreSpec(normaliser="reference"), block_m=32) == 0
    assert excess(ScoreSpec(normaliser="reference"), block_m=16) == 2 * 2 * keys * 8 * 4
    assert excess(ScoreSpec(normaliser="reference", heads="layer"), block_m=32) == 2 * keys * 8 * 4
    prediction = predict(REFERENCE, ROWS, space.default_plan(REFERENCE, H100, "triton"))
    assert prediction.bytes_least == least
    assert prediction.excess_bytes == prediction.bytes_moved / least


def test_a_merge_by_the_last_blocks_is_no_launch_of_its_own() -> None:
    """It pays where few rows or few splits are left to one block, and not where many rows of many splits are."""
    plan = space.default_plan(VERIFY, H100, "triton")
    few, many = (Workload(batch=1, q_len=rows, kv_len=32768) for rows in (1, 7))
    separate, fused = (predict(VERIFY, few, plan.replace(merge=merge)) for merge in ("separate", "fused"))
    assert [term.name for term in fused.terms] == ["attend_splits", "merge", "launches"]
    assert separate.terms[-1].microseconds - fused.terms[-1].microseconds == LAUNCH_US
    assert fused.latency_us < separate.latency_us
    assert predict(VERIFY, many, plan).latency_us < predict(VERIFY, many, plan.replace(merge="fused")).latency_us


def test_a_reference_is_one_pass() -> None:
    """No second pass, no weights kept: no third launch where one tile holds the rows, and less time than either."""
    workload = Workload(batch=16, q_len=7, kv_len=32768)
    exact = dataclasses.replace(VERIFY, score=ScoreSpec())
    plan = space.default_plan(REFERENCE, H100, "triton")
    one_pass = predict(REFERENCE, workload, plan)
    assert [term.name for term in one_pass.terms] == ["attend_splits", "merge_splits", "launches"]
    assert len(predict(REFERENCE, workload, plan.replace(block_m=16)).terms) == 4
    for method in ("remat", "dump"):
        two = predict(exact, workload, space.default_plan(exact, H100, "triton").replace(score_method=method))
        assert two.latency_us > one_pass.latency_us


def test_residency_by_hand() -> None:
    """1,024 blocks of 4 warps, of which 65536 / (168 * 128) = 3 fit; each has one 64-key tile of bytes under way."""
    kernel = Resources(
        kernel="attend_splits", registers=168, spill_bytes=0, smem_bytes=45056, num_warps=4, binary_bytes=0
    )
    plan = space.default_plan(VERIFY, H100, "triton").replace(ctas_per_sm=8, num_stages=2)
    merge = dataclasses.replace(kernel, kernel="merge_splits")
    workload = Workload(batch=1, q_len=7, kv_len=131072)
    found = cost_model.predict(VERIFY, workload, plan, H100, (kernel, merge)).residency
    assert (found.blocks_per_sm, found.warps_per_sm) == (3, 12)
    assert found.occupancy == 12 * 32 / 2048
    tile = 64 * 256 * 2
    assert found.bytes_in_flight == pytest.approx(3 * 132 * tile * (45056 - 8192) / tile)
    assert found.bytes_to_saturate == pytest.approx(0.9 * H100.bandwidth_gbs * 800 / H100.clock_ghz)
    few = cost_model.predict(VERIFY, Workload(batch=1, q_len=7, kv_len=64), plan, H100, (kernel, merge)).residency
    assert few.blocks_per_sm == 1
    assert few.bytes_in_flight < few.bytes_to_saturate


def test_descriptors_need_no_addresses_and_bits_more_operations() -> None:
    workload = Workload(batch=16, q_len=7, kv_len=32768)
    slow_lanes = dataclasses.replace(H100, fp32_tflops=H100.fp32_tflops / 16)

    def latency(**changes: Setting) -> float:
        plan = space.default_plan(FLOAT8, H100, "triton").replace(**changes)
        return predict(FLOAT8, workload, plan, slow_lanes).latency_us

    assert latency(kv_load="descriptor") < latency()
    assert latency(float8="bits") > latency()


def test_a_block_that_waits_alone_moves_its_bytes_once_per_latency() -> None:
    """Little's law: one block, nothing in flight besides what it waits for."""
    speed = dataclasses.replace(rates(H100, "bfloat16", active_sms=1, warp_groups=True), iteration_us=0.0)
    iteration = Iteration(
        memory_bytes=64.0, l2_bytes=0.0, matrix_ops=0.0, vector_ops=0.0, chain=1.0, chain_latency_us=1.0, in_flight=1.0
    )
    alone, limit = grid.wave_us(iteration, 1, 4, speed)
    assert limit == "latency"
    assert alone == pytest.approx(1.0, rel=1e-3)
    overlapped, _ = grid.wave_us(dataclasses.replace(iteration, in_flight=4.0), 1, 4, speed)
    assert overlapped == pytest.approx(0.25, rel=1e-3)


def test_a_last_wave_of_one_block_waits_as_long_as_a_full_one() -> None:
    speed = rates(H100, "bfloat16", active_sms=H100.num_sms, warp_groups=True)
    iteration = Iteration(
        memory_bytes=64.0, l2_bytes=0.0, matrix_ops=0.0, vector_ops=0.0, chain=1.0, chain_latency_us=1.0, in_flight=1.0
    )
    full = Grid(blocks=2 * H100.num_sms, num_warps=4, resident=2, iterations=10, setup_us=0.0)
    one_more = dataclasses.replace(full, blocks=full.blocks + 1)
    times = [grid.grid_term("k", which, iteration, H100.num_sms, speed).microseconds for which in (full, one_more)]
    assert times[1] == pytest.approx(2 * times[0], rel=0.05)


@pytest.mark.parametrize("spec", [VERIFY, SPECS[1], SPECS[-1], REFERENCE], ids=lambda spec: spec.name)
def test_splits_are_counted_as_the_rendered_kernel_counts_them(spec: KernelSpec) -> None:
    for plan in some_plans(spec)[:4]:
        module = triton_build.import_source(render(spec, plan, "triton"))
        for workload in default_workloads(spec, H100):
            counted = module.num_splits(workload.batch, workload.q_len, workload.kv_len, H100.num_sms)
            assert attention.num_splits(spec, plan, workload, H100) == counted


def test_blocks_of_a_selected_row_are_counted_as_the_rendered_kernel_counts_them() -> None:
    spec = next(spec for spec in SPECS if spec.op == "select_kv")
    found: set[int] = set()
    for plan in some_plans(spec):
        module = triton_build.import_source(render(spec, plan, "triton"))
        for workload in default_workloads(spec, H100):
            rows, columns = workload.batch * spec.selection_heads, workload.kv_len - workload.q_len
            counted = module.num_splits(rows, columns, H100.num_sms)
            assert selection.num_splits(spec, plan, workload, H100) == counted
            found.add(counted)
    assert len(found) > 2


def test_every_gpu_has_finite_predictions() -> None:
    for name in gpus.names():
        arch = gpus.find(name)
        for spec in SPECS:
            plan = space.default_plan(spec, arch, "triton")
            prediction = predict(spec, default_workloads(spec, arch)[0], plan, arch)
            assert math.isfinite(prediction.latency_us)
            assert 0 < prediction.share_of_ceiling <= 1


def test_the_cpu_is_measured_not_modelled() -> None:
    plan = Plan.of("cpu", radix_bits=8)
    with pytest.raises(SpecError, match="measure it"):
        cost_model.predict(SPECS[3], Workload(batch=1, q_len=1, kv_len=64, budget=8), plan, H100, ())
