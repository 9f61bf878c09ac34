"""The GPUs known by name: limits and peak rates from data sheets. Detects nothing; gpu_detect.py looks at the machine.

Where the numbers come from, besides each row's own source:
- one NVIDIA multiprocessor's registers, threads and shared memory: NVIDIA/cccl, libcudacxx cuda/__device/arch_traits.h.
  One block may opt in to all of the shared memory but the 1 KB that CUDA reserves.
- one AMD compute unit: ROCm's GPU specifications (rocm.docs.amd.com, reference/gpu-specs). Its 512 KB VGPR file is
  131,072 32-bit registers (4 SIMDs x 512 VGPRs x 64 lanes); each SIMD holds 8 wavefronts (LLVM's llvm-calc-occupancy,
  for gfx90a of the same family); one workgroup may take the whole 64 KB of LDS.

Rates are dense (no structured sparsity), with float32 accumulation. Bandwidths are decimal, capacities binary.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from specattn_codegen.errors import SpecError
from specattn_codegen.processors.arch import Arch

KIB, MIB, GIB = 2**10, 2**20, 2**30

_TECHPOWERUP = "techpowerup.com/gpu-specs (SMs, L2, clock), as in reox007/RightNow-GPU-Database data/all-gpus.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one multiprocessor of a compute capability holds."""

    target: str
    smem_per_sm: int
    max_threads_per_sm: int


LIMITS: dict[int, Limits] = {
    80: Limits(target="sm_80", smem_per_sm=164 * KIB, max_threads_per_sm=2048),
    86: Limits(target="sm_86", smem_per_sm=100 * KIB, max_threads_per_sm=1536),
    89: Limits(target="sm_89", smem_per_sm=100 * KIB, max_threads_per_sm=1536),
    90: Limits(target="sm_90a", smem_per_sm=228 * KIB, max_threads_per_sm=2048),
    100: Limits(target="sm_100a", smem_per_sm=228 * KIB, max_threads_per_sm=2048),
    120: Limits(target="sm_120a", smem_per_sm=100 * KIB, max_threads_per_sm=1536),
    942: Limits(target="gfx942", smem_per_sm=64 * KIB, max_threads_per_sm=2048),
}


def arch(
    name: str,
    compute_capability: int,
    *,
    num_sms: int,
    l2_bytes: int,
    memory_bytes: int,
    bandwidth_gbs: float,
    bf16_tflops: float,
    fp32_tflops: float,
    clock_ghz: float,
    source: str,
) -> Arch:
    """An Arch whose multiprocessor limits follow from its compute capability, one of LIMITS."""
    limits = LIMITS[compute_capability]
    is_amd = limits.target.startswith("gfx")
    return Arch(
        name=name,
        vendor="amd" if is_amd else "nvidia",
        compute_capability=compute_capability,
        target=limits.target,
        num_sms=num_sms,
        smem_per_block=limits.smem_per_sm if is_amd else limits.smem_per_sm - KIB,
        smem_per_sm=limits.smem_per_sm,
        registers_per_sm=512 * KIB // 4 if is_amd else 64 * KIB,
        max_threads_per_sm=limits.max_threads_per_sm,
        warp_size=64 if is_amd else 32,
        l2_bytes=l2_bytes,
        memory_bytes=memory_bytes,
        bandwidth_gbs=bandwidth_gbs,
        bf16_tflops=bf16_tflops,
        fp32_tflops=fp32_tflops,
        clock_ghz=clock_ghz,
        source=source,
    )


_ROWS: tuple[Arch, ...] = (
    arch(
        "a100",
        80,
        num_sms=108,
        l2_bytes=40 * MIB,
        memory_bytes=80 * GIB,
        bandwidth_gbs=2039,
        bf16_tflops=312,
        fp32_tflops=19.5,
        clock_ghz=1.41,
        source="A100 SXM4 80 GB: NVIDIA A100 data sheet, as in PyTorch torch/_inductor/analysis/device_info.py and "
        f"ai-dynamo/aiconfigurator systems/a100_sxm.yaml (rates, bandwidth); {_TECHPOWERUP}",
    ),
    arch(
        "a10",
        86,
        num_sms=72,
        l2_bytes=6 * MIB,
        memory_bytes=24 * GIB,
        bandwidth_gbs=600,
        bf16_tflops=125,
        fp32_tflops=31.2,
        clock_ghz=1.695,
        source="A10: citsjtu2020/LLM-Prof hardware_spec.md (rate, bandwidth); a device query in aalanwyr/face2cuda "
        f"step2cuda/README.md (L2, clock); {_TECHPOWERUP}",
    ),
    arch(
        "l4",
        89,
        num_sms=58,
        l2_bytes=48 * MIB,
        memory_bytes=24 * GIB,
        bandwidth_gbs=300,
        bf16_tflops=121,
        fp32_tflops=30.3,
        clock_ghz=2.04,
        source="L4: NVIDIA L4 data sheet, as in ai-dynamo/aiconfigurator systems/l4.yaml (rates, bandwidth); "
        f"{_TECHPOWERUP}, whose 7,424 cores and 30.3 TFLOPS make 58 SMs of 128 lanes",
    ),
    arch(
        "l40s",
        89,
        num_sms=142,
        l2_bytes=96 * MIB,
        memory_bytes=48 * GIB,
        bandwidth_gbs=864,
        bf16_tflops=362,
        fp32_tflops=91.6,
        clock_ghz=2.52,
        source="L40S: NVIDIA L40S data sheet, as in ai-dynamo/aiconfigurator systems/l40s.yaml and on "
        f"mullet.se product 355414 (rates, bandwidth); L2 of the same AD102: arXiv 2606.22588; {_TECHPOWERUP}",
    ),
    arch(
        "rtx4090",
        89,
        num_sms=128,
        l2_bytes=72 * MIB,
        memory_bytes=24 * GIB,
        bandwidth_gbs=1008,
        bf16_tflops=165.2,
        fp32_tflops=82.6,
        clock_ghz=2.52,
        source=f"GeForce RTX 4090: waredb.com/processor/nvidia-geforce-rtx-4090 (rates, bandwidth); {_TECHPOWERUP}",
    ),
    arch(
        "h100",
        90,
        num_sms=132,
        l2_bytes=50 * MIB,
        memory_bytes=80 * GIB,
        bandwidth_gbs=3350,
        bf16_tflops=989,
        fp32_tflops=67,
        clock_ghz=1.98,
        source="H100 SXM5 80 GB: NVIDIA H100 page, as in PyTorch torch/_inductor/analysis/device_info.py and on "
        f"archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html (rates, bandwidth, SMs, L2); {_TECHPOWERUP}",
    ),
    arch(
        "h100-pcie",
        90,
        num_sms=114,
        l2_bytes=50 * MIB,
        memory_bytes=80 * GIB,
        bandwidth_gbs=2000,
        bf16_tflops=756,
        fp32_tflops=51,
        clock_ghz=1.755,
        source="H100 PCIe 80 GB: NVIDIA's table on archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html; "
        f"{_TECHPOWERUP}",
    ),
    arch(
        "h200",
        90,
        num_sms=132,
        l2_bytes=50 * MIB,
        memory_bytes=141 * GIB,
        bandwidth_gbs=4800,
        bf16_tflops=989,
        fp32_tflops=67,
        clock_ghz=1.98,
        source="H200 SXM 141 GB: ai-dynamo/aiconfigurator systems/h200_sxm.yaml (rate, bandwidth, memory); "
        f"{_TECHPOWERUP}",
    ),
    arch(
        "b200",
        100,
        num_sms=148,
        l2_bytes=126 * MIB,
        memory_bytes=180 * GIB,
        bandwidth_gbs=7700,
        bf16_tflops=2250,
        fp32_tflops=74.5,
        clock_ghz=1.965,
        source="HGX B200 180 GB, 1,000 W: NVIDIA Blackwell data sheet, as in ai-dynamo/aiconfigurator "
        "systems/b200_sxm.yaml (rate, bandwidth, memory); a device query in pytorch/ao pull request 4002 (148 SMs, "
        "126.5 MB of L2, 7,680 bits at 3,996 MHz = 7.67 TB/s, where NVIDIA's brief rounds to 8); "
        f"docs.nvidia.com Blackwell tuning guide (L2); {_TECHPOWERUP}",
    ),
    arch(
        "rtx5090",
        120,
        num_sms=170,
        l2_bytes=96 * MIB,
        memory_bytes=32 * GIB,
        bandwidth_gbs=1792,
        bf16_tflops=209.5,
        fp32_tflops=104.8,
        clock_ghz=2.407,
        source="GeForce RTX 5090: NVIDIA RTX Blackwell white paper, as in pytorch/ao roofline_utils.py (rate); "
        "a device query in aikitoria/open-gpu-kernel-modules issue 1 (SMs, L2); Linux Format, May 2025, on "
        f"pocketmags.com (bandwidth); {_TECHPOWERUP}",
    ),
    arch(
        "mi300x",
        942,
        num_sms=304,
        l2_bytes=256 * MIB,
        memory_bytes=192 * GIB,
        bandwidth_gbs=5300,
        bf16_tflops=1307.4,
        fp32_tflops=163.4,
        clock_ghz=2.1,
        source="Instinct MI300X: AMD data sheet, as in PyTorch torch/_inductor/analysis/device_info.py (rates, "
        "bandwidth); ROCm GPU specifications (compute units, caches); rocminfo in ROCm issue 4414 (clock)",
    ),
    arch(
        "mi325x",
        942,
        num_sms=304,
        l2_bytes=256 * MIB,
        memory_bytes=256 * GIB,
        bandwidth_gbs=6000,
        bf16_tflops=1307.4,
        fp32_tflops=163.4,
        clock_ghz=2.1,
        source="Instinct MI325X: awesomeagents.ai/hardware/amd-mi325x (rates, bandwidth); ROCm GPU specifications "
        "(compute units, caches, memory); techpowerup.com/gpu-specs (clock), as in reox007/RightNow-GPU-Database",
    ),
)

GPUS: dict[str, Arch] = {row.name: row for row in _ROWS}


def names() -> tuple[str, ...]:
    """Every GPU known by name, sorted."""
    return tuple(sorted(GPUS))


def find(name: str) -> Arch:
    """The GPU of that name, in any usual spelling: `RTX 4090`, `NVIDIA H100`.

    Raises SpecError with the nearest names where there is none.
    """
    key = _canonical(name)
    by_key = {_canonical(known): row for known, row in GPUS.items()}
    if key in by_key:
        return by_key[key]
    near = [by_key[match].name for match in difflib.get_close_matches(key, by_key, n=3, cutoff=0.5)]
    hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(names())}."
    raise SpecError(f"gpu={name!r}: unknown; {hint} `cpu` and `local` (the GPU of this machine) also do")


def _canonical(name: str) -> str:
    words = name.lower().replace("-", " ").replace("_", " ").split()
    return "".join(word for word in words if word not in {"nvidia", "amd", "geforce", "instinct"})
