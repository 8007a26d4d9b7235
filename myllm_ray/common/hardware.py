"""Public data of accelerators and of machines with them. Products are dense: without structured sparsity.

Sources: the data sheets of NVIDIA for V100, T4, A10, A100, L4, L40S, RTX A6000, H100, H200 and HGX B200, and the white
papers of the architectures of GeForce RTX 3090 and 4090 (with accumulation in fp32).
"""

from __future__ import annotations

from dataclasses import dataclass

from myllm_ray.config.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
        name: as `torch.cuda.get_device_name` contains it.
        memory: in bytes.
        half: peak TFLOP/s of matrix products in fp16, and in bf16 unless `bf16` is false.
        tf32: the same in TF32; 0: not supported.
        fp32: the same in fp32.
        memory_bandwidth: in bytes per second.
        link: bytes per second and direction between the accelerators of one machine.
        bf16: whether matrix products in bf16 are supported.
    """

    name: str
    memory: float
    half: float
    tf32: float
    fp32: float
    memory_bandwidth: float
    link: float
    bf16: bool = True

    def peak(self, precision: str, tf32: bool = False) -> float | None:
        """Returns the peak FLOP/s in a precision, or None if it is not supported.

        Args:
            precision: fp32, bf16 or fp16.
            tf32: whether products of fp32 matrices use TF32.
        """
        if precision == "fp32":
            return (self.tf32 if tf32 and self.tf32 else self.fp32) * 1e12
        return self.half * 1e12 if self.bf16 or precision == "fp16" else None


DEVICES = (
    # Of names of which one contains the other, the longer one comes first.
    Device("B200", 180e9, 2250, 1125, 75, 8.0e12, 900e9),
    Device("H200", 141e9, 989, 495, 67, 4.8e12, 450e9),
    Device("GH200", 96e9, 989, 495, 67, 4.0e12, 450e9),
    Device("H100 NVL", 94e9, 835, 418, 60, 3.9e12, 300e9),
    Device("H100 PCIe", 80e9, 756, 378, 51, 2.0e12, 64e9),
    Device("H100", 80e9, 989, 495, 67, 3.35e12, 450e9),
    Device("A100", 80e9, 312, 156, 19.5, 2.0e12, 300e9),
    Device("L40S", 48e9, 362, 183, 91.6, 0.864e12, 32e9),
    Device("L4", 24e9, 121, 60, 30.3, 0.3e12, 32e9),
    Device("A10", 24e9, 125, 62.5, 31.2, 0.6e12, 32e9),
    Device("RTX A6000", 48e9, 154.8, 77.4, 38.7, 0.768e12, 32e9),
    Device("RTX 4090", 24e9, 165.2, 82.6, 82.6, 1.008e12, 32e9),
    Device("RTX 3090", 24e9, 71, 35.6, 35.6, 0.936e12, 32e9),
    Device("V100", 32e9, 125, 0, 15.7, 0.9e12, 150e9, bf16=False),
    Device("T4", 16e9, 65, 0, 8.1, 0.32e12, 16e9, bf16=False),
)
"""Known accelerators."""
_DIFFERENT = ("A10G", "A100X", "L40", "H100 CNX", "MIG", "LAPTOP", "MAX Q")
"""Names of devices that contain a name of the table and have other peaks, unless the table has the whole name."""


def find_device(name: str) -> Device | None:
    """Returns the data of an accelerator by the name that torch reports, such as `NVIDIA H100 80GB HBM3`, or None."""
    words = name.replace("-", " ").upper().split()
    text = " ".join(words)
    if any(other in words for other in _DIFFERENT if " " not in other) or any(
        o in text for o in _DIFFERENT if " " in o
    ):
        return None
    return next((d for d in DEVICES if f" {d.name.upper()} " in f" {text} "), None)


@dataclass(frozen=True)
class Hardware:
    """`count` equal accelerators in one machine."""

    device: Device
    count: int


def hardware_of(text: str) -> Hardware:
    """Returns the hardware of a description such as `h100x8`.

    Raises:
        ConfigError: the description is not valid, or there is no such device in the table.
    """
    name, mark, number = text.lower().replace("_", " ").replace("-", " ").rpartition("x")
    if not mark or not number.isdigit() or name.endswith("rt"):  # without a number: `rtx 4090`
        name, number = text.lower().replace("_", " ").replace("-", " "), "1"
    known = {device.name.lower(): device for device in DEVICES}
    device = known.get(name.strip()) or known.get(f"rtx {name.strip()}")
    if device is None or int(number) < 1:
        names = ", ".join(sorted(d.name.lower().replace(" ", "-") for d in DEVICES))
        raise ConfigError(f"--hardware {text}: give NAME or NAMExCOUNT, such as h100x8; known names: {names}, and here")
    return Hardware(device, int(number))
