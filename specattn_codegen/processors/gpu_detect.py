"""Which GPU this machine has. Matches the silicon (capability, multiprocessors, memory), never the product's name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from specattn_codegen.errors import SpecError
from specattn_codegen.processors import gpus
from specattn_codegen.processors.arch import Arch


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a driver says of a GPU; `clock_ghz` and `bandwidth_gbs` are 0 where it does not say."""

    name: str
    compute_capability: int
    num_sms: int
    memory_bytes: int
    l2_bytes: int
    clock_ghz: float
    bandwidth_gbs: float


def local() -> Arch:
    """The first GPU of this machine: its row in the registry, or an Arch made from what its driver says.

    Raises SpecError where there is none, or one no kernel is made for.
    """
    if not torch.cuda.is_available():
        blind = (
            "" if torch.version.cuda or torch.version.hip else f" (torch {torch.__version__} is built for the CPU only)"
        )
        raise SpecError(
            f"no NVIDIA or AMD GPU found on this machine{blind}; name one with --gpu h100, or use --gpu cpu"
        )
    return identify(_query(0))


def _query(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        # gfx942:sramecc+:xnack- -> 942
        digits = properties.gcnArchName.split(":", 1)[0].removeprefix("gfx")
        capability = int(digits) if digits.isdigit() else 0
    else:
        capability = properties.major * 10 + properties.minor
    # Kilohertz, bits and two transfers a clock. ROCm counts HBM's transfers otherwise, and older torch names neither.
    known = hasattr(properties, "memory_clock_rate") and not torch.version.hip
    memory_clock, bus_width = (properties.memory_clock_rate, properties.memory_bus_width) if known else (0, 0)
    return Device(
        name=properties.name,
        compute_capability=capability,
        num_sms=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        l2_bytes=properties.L2_cache_size,
        clock_ghz=getattr(properties, "clock_rate", 0) / 1e6,
        bandwidth_gbs=2 * memory_clock * 1e3 * bus_width / 8 / 1e9,
    )


def identify(device: Device) -> Arch:
    """The registry's row for `device`, or its nearest relative's row rescaled to what the driver says.

    Drivers report 1 to 9 % less memory than the data sheet, so capacities match within 12 %. Peak rates of a GPU
    without a row follow its multiprocessors and clock, from the row of its capability with the nearest number of
    multiprocessors. Raises SpecError for a capability no row has.
    """
    kin = [row for row in gpus.GPUS.values() if row.compute_capability == device.compute_capability]
    if not kin:
        known = ", ".join(sorted({row.target for row in gpus.GPUS.values()}))
        raise SpecError(
            f"{device.name}: compute capability {device.compute_capability} has no kernels (known are {known}); "
            "name another GPU with --gpu h100, or use --gpu cpu"
        )
    for row in kin:
        same_memory = abs(device.memory_bytes - row.memory_bytes) <= 0.12 * row.memory_bytes
        same_bandwidth = (
            not device.bandwidth_gbs or abs(device.bandwidth_gbs - row.bandwidth_gbs) <= 0.1 * row.bandwidth_gbs
        )
        if device.num_sms == row.num_sms and same_memory and same_bandwidth:
            return row
    return _rescaled(min(kin, key=lambda row: abs(row.num_sms - device.num_sms)), device)


def _rescaled(relative: Arch, device: Device) -> Arch:
    clock_ghz = device.clock_ghz or relative.clock_ghz
    speed = device.num_sms * clock_ghz / (relative.num_sms * relative.clock_ghz)
    # ROCm reports the L2 of one die; the last-level cache is a property of the family.
    l2_bytes = relative.l2_bytes if relative.vendor == "amd" else device.l2_bytes
    return dataclasses.replace(
        relative,
        name="-".join(device.name.lower().split()),
        num_sms=device.num_sms,
        l2_bytes=l2_bytes,
        memory_bytes=device.memory_bytes,
        bandwidth_gbs=device.bandwidth_gbs or relative.bandwidth_gbs,
        bf16_tflops=relative.bf16_tflops * speed,
        fp32_tflops=relative.fp32_tflops * speed,
        clock_ghz=clock_ghz,
        source=f"the driver's own properties; peak rates scaled from {relative.name} by multiprocessors and clock",
    )
