"""The GPU registry against its own physics, and detection against what drivers report."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from specattn_codegen.errors import SpecError
from specattn_codegen.processors import gpu_detect, gpus

EVERY = {"a100", "a10", "l4", "l40s", "rtx4090", "h100", "h100-pcie", "h200", "b200", "rtx5090", "mi300x", "mi325x"}


def test_every_promised_gpu_is_there() -> None:
    assert set(gpus.names()) == EVERY
    assert list(gpus.names()) == sorted(gpus.names())
    assert all(row.name == name for name, row in gpus.GPUS.items())


@pytest.mark.parametrize("name", gpus.names())
def test_limits_fit_together(name: str) -> None:
    gpu = gpus.find(name)
    assert gpu.is_gpu
    assert gpu.source.strip()
    assert gpu.smem_per_block <= gpu.smem_per_sm
    assert gpu.max_threads_per_sm % gpu.warp_size == 0
    assert gpu.l2_bytes < gpu.memory_bytes
    # A thread can address 255 registers on NVIDIA and 512 on CDNA: a full multiprocessor must still get some.
    assert gpu.registers_per_sm // gpu.max_threads_per_sm in (32, 42, 64)
    assert 250 <= gpu.bandwidth_gbs <= 10_000
    assert gpu.fp32_tflops < gpu.bf16_tflops


@pytest.mark.parametrize("name", gpus.names())
def test_the_vector_rate_follows_from_multiprocessors_and_clock(name: str) -> None:
    gpu = gpus.find(name)
    # Two operations a fused multiply-add; A100 has 64 float32 lanes a multiprocessor, everything later 128.
    lanes = 64 if gpu.compute_capability == 80 else 128
    assert gpu.fp32_tflops == pytest.approx(gpu.num_sms * lanes * 2 * gpu.clock_ghz / 1e3, rel=0.005)


@pytest.mark.parametrize("name", gpus.names())
def test_the_matrix_rate_is_dense(name: str) -> None:
    gpu = gpus.find(name)
    # Dense multiply-adds a clock and multiprocessor, from NVIDIA's and AMD's architecture papers. A rate quoted with
    # structured sparsity would be twice that.
    per_clock = {"a10": 512, "l4": 512, "l40s": 512, "rtx4090": 256, "rtx5090": 256, "a100": 1024}
    per_clock |= {"h100": 2048, "h100-pcie": 2048, "h200": 2048, "b200": 4096, "mi300x": 1024, "mi325x": 1024}
    peak = gpu.num_sms * per_clock[name] * 2 * gpu.clock_ghz / 1e3
    # Hopper and Blackwell run their matrix units below the boost clock.
    assert 0.9 * peak <= gpu.bf16_tflops <= 1.005 * peak


def test_amd_differs_where_it_should() -> None:
    mi300x, h100 = gpus.find("mi300x"), gpus.find("h100")
    assert (mi300x.vendor, mi300x.target, mi300x.warp_size, mi300x.smem_per_block) == ("amd", "gfx942", 64, 65536)
    assert (h100.vendor, h100.target, h100.warp_size, h100.smem_per_block) == ("nvidia", "sm_90a", 32, 232448)


@pytest.mark.parametrize(
    ("spelling", "name"), [("H100", "h100"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("h100_pcie", "h100-pcie")]
)
def test_usual_spellings_find_the_row(spelling: str, name: str) -> None:
    assert gpus.find(spelling).name == name


def test_unknown_names_get_the_nearest_ones() -> None:
    with pytest.raises(SpecError, match=r"gpu='h10': unknown; did you mean .*h100"):
        gpus.find("h10")
    with pytest.raises(SpecError, match=r"known are a10, a100, .*`cpu` and `local`"):
        gpus.find("voodoo")


def test_the_registry_needs_no_torch() -> None:
    code = "import sys, specattn_codegen.processors.gpus; sys.exit('torch' in sys.modules or 'pynvml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def device(**changes: object) -> gpu_detect.Device:
    """An H200 as its driver describes it, with changes."""
    facts: dict[str, object] = {
        "name": "NVIDIA H200",
        "compute_capability": 90,
        "num_sms": 132,
        "memory_bytes": 150_754_820_096,
        "l2_bytes": 50 * 2**20,
        "clock_ghz": 1.98,
        "bandwidth_gbs": 4814.0,
    }
    return gpu_detect.Device(**{**facts, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "h200"),
        ({"bandwidth_gbs": 0.0}, "h200"),
        ({"memory_bytes": 85_000_000_000, "bandwidth_gbs": 3352.0}, "h100"),
        ({"memory_bytes": 85_000_000_000, "bandwidth_gbs": 2039.0, "num_sms": 114}, "h100-pcie"),
        ({"compute_capability": 80, "num_sms": 108, "memory_bytes": 85_100_000_000, "bandwidth_gbs": 2039.0}, "a100"),
        ({"compute_capability": 86, "num_sms": 72, "memory_bytes": 23_609_475_072, "bandwidth_gbs": 600.0}, "a10"),
        ({"compute_capability": 89, "num_sms": 142, "memory_bytes": 48_305_799_168, "bandwidth_gbs": 864.0}, "l40s"),
        ({"compute_capability": 100, "num_sms": 148, "memory_bytes": 191_500_000_000, "bandwidth_gbs": 7672.0}, "b200"),
        (
            {"compute_capability": 120, "num_sms": 170, "memory_bytes": 33_677_180_928, "bandwidth_gbs": 1792.1},
            "rtx5090",
        ),
        ({"compute_capability": 942, "num_sms": 304, "memory_bytes": 206_141_652_992, "bandwidth_gbs": 0.0}, "mi300x"),
        ({"compute_capability": 942, "num_sms": 304, "memory_bytes": 274_600_000_000, "bandwidth_gbs": 0.0}, "mi325x"),
    ],
)
def test_devices_are_matched_by_their_silicon(changes: dict[str, object], name: str) -> None:
    found = gpu_detect.identify(device(name="Any Name", **changes))
    assert found is gpus.GPUS[name]


def test_a_gpu_without_a_row_is_scaled_from_its_relative() -> None:
    # An A100 40 GB is no a100 row: less memory, less bandwidth, the same rates.
    found = gpu_detect.identify(
        device(
            name="NVIDIA A100-SXM4-40GB",
            compute_capability=80,
            num_sms=108,
            memory_bytes=42_298_834_944,
            l2_bytes=40 * 2**20,
            clock_ghz=1.41,
            bandwidth_gbs=1555.2,
        )
    )
    a100 = gpus.find("a100")
    assert found.name == "nvidia-a100-sxm4-40gb"
    assert (found.memory_bytes, found.bandwidth_gbs) == (42_298_834_944, 1555.2)
    assert (found.target, found.smem_per_block) == (a100.target, a100.smem_per_block)
    assert (found.bf16_tflops, found.fp32_tflops) == (a100.bf16_tflops, a100.fp32_tflops)
    assert "driver" in found.source

    # A full GH100 die: its rates follow its multiprocessors.
    full_die = gpu_detect.identify(device(num_sms=144))
    assert full_die.bf16_tflops == pytest.approx(gpus.find("h100").bf16_tflops * 144 / 132)


def test_a_capability_without_kernels_is_refused() -> None:
    with pytest.raises(SpecError, match=r"Tesla T4: compute capability 75 has no kernels .*sm_80.*--gpu cpu"):
        gpu_detect.identify(device(name="Tesla T4", compute_capability=75))


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpecError, match=r"no NVIDIA or AMD GPU found on this machine.*--gpu h100.*--gpu cpu"):
        gpu_detect.local()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU that torch can use")
def test_the_gpu_at_hand_is_known() -> None:
    found = gpu_detect.local()
    properties = torch.cuda.get_device_properties(0)
    assert found.num_sms == properties.multi_processor_count
    assert found.memory_bytes == pytest.approx(properties.total_memory, rel=0.12)
