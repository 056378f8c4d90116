"""Peak arithmetic of known accelerators: the denominator of MFU.

Every number is the vendor's *dense* peak. NVIDIA prints most tensor-core peaks "with sparsity", which is twice the
dense one, so those are halved here. A name must match in full, because what looks alike computes at another speed:
a MIG slice or a virtual GPU shows its card's name with a suffix, a laptop's RTX 4090 is a smaller chip, an H100 on
PCIe has three quarters of an SXM one. What is not listed is unknown, never guessed. (An AMD card split into partitions
keeps its name and cannot be told apart here; such a run has to give its own peak.)

float32 is plain IEEE arithmetic, which is what PyTorch multiplies matrices with unless TF32 is switched on; a run
with TF32 should give its own peak. float16 and bfloat16 accumulate in float32.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple


class Peaks(NamedTuple):
    """Dense TFLOP/s of one device, as PyTorch counts devices; None where the hardware has no such arithmetic."""

    float32: float
    bfloat16: float | None
    float8: float | None
    float16: float | None
    float4: float | None = None


def _same_half_precision(
    float32: float, half: float, float8: float | None = None, float4: float | None = None
) -> Peaks:
    return Peaks(float32=float32, bfloat16=half, float8=float8, float16=half, float4=float4)


def _float16_only(float32: float, float16: float) -> Peaks:
    return Peaks(float32=float32, bfloat16=None, float8=None, float16=float16)


_H100_SXM = _same_half_precision(67, 1979 / 2, 3958 / 2)

# Patterns of `torch.cuda.get_device_name()`, without the vendor's name in front.
_DEVICES: Mapping[str, Peaks] = {
    # NVIDIA V100 datasheet (125 and 112 TFLOPS of float16 tensor arithmetic), V100S datasheet (130)
    r"V100-SXM2-(16|32)GB|V100-SXM3-32GB": _float16_only(15.7, 125),
    r"V100-PCIE-(16|32)GB": _float16_only(14, 112),
    r"V100S-PCIE-32GB": _float16_only(16.4, 130),
    # NVIDIA T4 datasheet
    r"T4": _float16_only(8.1, 65),
    # NVIDIA A100 datasheet: SXM and PCIe have the same peaks
    r"A100-SXM4-[48]0GB|A100-PCIE-40GB|A100 80GB PCIe": _same_half_precision(19.5, 312),
    # NVIDIA A10 datasheet
    r"A10": _same_half_precision(31.2, 125),
    # NVIDIA L4 and L40S datasheets (L4's tensor peaks are printed with sparsity)
    r"L4": _same_half_precision(30.3, 242 / 2, 485 / 2),
    r"L40S": _same_half_precision(91.6, 362.05, 733),
    # NVIDIA H100 datasheet (SXM, NVL) and its first edition (PCIe)
    r"H100 80GB HBM3": _H100_SXM,
    r"H100 PCIe": _same_half_precision(51, 1513 / 2, 3026 / 2),
    r"H100 NVL": _same_half_precision(60, 1671 / 2, 3341 / 2),
    # NVIDIA GH200 Grace Hopper Superchip datasheet: its GPU has an H100 SXM's peaks
    r"GH200 (120|480)GB|GH200 144G HBM3e": _H100_SXM,
    # NVIDIA H200 datasheet (SXM, NVL)
    r"H200": _same_half_precision(67, 1979 / 2, 3958 / 2),
    r"H200 NVL": _same_half_precision(60, 1671 / 2, 3341 / 2),
    # NVIDIA Blackwell datasheet, "individual Blackwell GPU" of HGX B200 and of GB200 NVL72
    r"B200": _same_half_precision(75, 4500 / 2, 9000 / 2, 18000 / 2),
    r"GB200": _same_half_precision(80, 5000 / 2, 10000 / 2, 20000 / 2),
    # NVIDIA GA102, Ada and RTX Blackwell architecture whitepapers, tensor peaks "with FP32 accumulate"
    r"GeForce RTX 3090": _same_half_precision(35.6, 71),
    r"GeForce RTX 4090": _same_half_precision(82.6, 165.2, 330.3),
    r"GeForce RTX 5090": _same_half_precision(104.8, 209.5, 419, 1676),
    # AMD Instinct MI250X datasheet: a card is two devices to PyTorch, so half of the card's 383 (95.7 in float32)
    r"Instinct MI250X": _same_half_precision(95.7 / 2, 383 / 2),
    # AMD Instinct MI300X and MI325X datasheets: the same compute dies at the same clock
    r"Instinct MI300X( VF)?|Instinct MI325X": _same_half_precision(163.4, 1307.4, 2614.9),
    # AMD Instinct MI355X datasheet
    r"Instinct MI355X": _same_half_precision(157.3, 2516.6, 5033.2, 10066.3),
}


def peak_flops(device_name: str, dtype: str = "bfloat16") -> float | None:
    """Dense peak FLOP/s of one device for matrix products in `dtype`, or None if it is not known.

    Args:
        device_name: what `torch.cuda.get_device_name()` says; `cpu` has no known peak.
        dtype: the type that matrix products are computed in: `float32`, `bfloat16`, `float16`, `float8` or
            `float4`; of any other no peak is known.
    """
    name = re.sub(r"^(NVIDIA|Tesla|AMD)\s+", "", device_name.strip())
    for pattern, peaks in _DEVICES.items():
        if re.fullmatch(pattern, name):
            tflops = peaks._asdict().get(dtype)
            return None if tflops is None else tflops * 1e12
    return None


def mixed_peak(device_name: str, shares: Mapping[str, float]) -> float | None:
    """Dense peak FLOP/s of one device for a model whose matrix products are not all in one dtype, or None.

    Were each part of the work to run at the peak of its own dtype, one FLOP would take sum(share / peak) seconds, so
    the peak of the mix is the harmonic mean of the peaks, weighted by the shares of work:

        1 / sum over dtypes of (share of the FLOPs / peak FLOP/s)

    (Amdahl's law; Hennessy and Patterson, "Computer Architecture: A Quantitative Approach", section 1.9.) Dividing by
    the peak of the fastest dtype alone would blame a run for products that it was never meant to compute in it.

    Args:
        device_name: as for `peak_flops`.
        shares: dtype name, as for `peak_flops` -> share of the model's FLOPs in it; they sum to 1.

    Returns:
        None if the peak of a dtype with a share above 0 is not known.

    Raises:
        ValueError: if the shares are not between 0 and 1, or do not sum to 1.
    """
    if min(shares.values(), default=-1.0) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"The shares of FLOPs by dtype are {dict(shares)}; each is 0 to 1 and together they are 1.")
    seconds = 0.0
    for dtype, share in shares.items():
        if share > 0:
            peak = peak_flops(device_name, dtype)
            if peak is None:
                return None
            seconds += share / peak
    return 1 / seconds
