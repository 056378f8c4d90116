"""What `titan-doctor` prints: what was found, what was measured, and which ranks are far from the others."""

import dataclasses
import json
import re
from collections.abc import Iterator

from titan_metrics.probes.outliers import Outlier, Reading
from titan_train.doctor import Findings
from titan_train.doctor_options import Options

_SET_BY_LAUNCHERS = re.compile(r"(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_.*|SLURM_.*")
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def as_json(findings: Findings) -> str:
    """All that is known, as one JSON object."""
    return json.dumps(dataclasses.asdict(findings), indent=2)


def as_text(findings: Findings, options: Options) -> str:
    """For people."""
    return "\n".join([findings.layout, "", *_host(findings), "", *_table(findings), "", *_verdict(findings, options)])


def _host(findings: Findings) -> Iterator[str]:
    host = findings.host
    cuda = f", CUDA {host['cuda']}, driver {host['driver'] or 'none'}, NCCL {host['nccl'] or 'none'}" * bool(
        host["cuda"]
    )
    libraries = host["libraries"] | {name: host["titan"][name] for name in sorted(host["titan"])}
    limits = ", ".join(f"{name} {'unlimited' if most is None else most}" for name, most in host["limits"].items())
    yield f"torch      {host['torch']}, Python {host['python']}{cuda}"
    yield f"libraries  {', '.join(f'{name} {version}' for name, version in libraries.items())}"
    cores = f"{host['cores_allowed']} of {host['cores']} cores"
    yield f"host       {host['host']}: {host['cpu']}, {cores}, {host['platform']}"
    available = host["memory_available_bytes"]
    free = "" if available is None else f", {_gib(available)} of it free"
    shared = f"; /dev/shm {_gib(host['shared_memory_bytes'])}" if "shared_memory_bytes" in host else ""
    yield f"memory     {_gib(host['memory_bytes'])}{free}{shared}"
    for name, memory in zip(host["devices"], host["device_memory_bytes"], strict=True):
        yield f"device     {name}, {_gib(memory)}"
    yield f"limits     {limits}"
    for name, value in host["variables"].items():
        if not _SET_BY_LAUNCHERS.fullmatch(name):
            yield f"variable   {name}={value}"
    for difference in findings.differences:
        yield f"differs    {difference}"


def _table(findings: Findings) -> Iterator[str]:
    width = max((len(reading.probe) for reading in findings.rates), default=0)
    if findings.rates:
        yield f"{'':{width}}  {'median':>14}  {'slowest':>14}"
    for reading in findings.rates:
        yield f"{reading.probe:{width}}  {_scaled(reading.median, reading.unit):>14}  {_slowest(reading)}"
    if findings.clocks:
        first, last = min(findings.clocks.values), max(findings.clocks.values)
        yield f"clocks are {(last - first) * 1e3:.3f} ms apart, within {findings.clock_error * 1e3:.3f} ms"


def _slowest(reading: Reading) -> str:
    value = min(reading.values)
    who = f"  rank {reading.values.index(value)}" if len(reading.values) > 1 else ""
    return f"{_scaled(value, reading.unit):>14}{who}"


def _verdict(findings: Findings, options: Options) -> Iterator[str]:
    by_rank: dict[int, list[str]] = {}
    for outlier in findings.outliers:  # the slowest first
        by_rank.setdefault(outlier.rank, []).append(_sentence(outlier))
    for rank, sentences in by_rank.items():
        yield f"rank {rank} {'; '.join(sentences)}"
    if not by_rank:
        yield f"No rank is more than {options.slower_than:.0%} slower than the median of the ranks."


def _sentence(outlier: Outlier) -> str:
    if outlier.unit == "s":
        apart = abs(outlier.value - outlier.median)
        side = "ahead of" if outlier.value > outlier.median else "behind"
        return f"has a clock {apart:.3f} s {side} the median"
    value, below = _scaled(outlier.value, outlier.unit), 1 - outlier.value / outlier.median
    return f"is slow in {outlier.probe}: {value}, {below:.0%} below the median"


def _scaled(value: float, unit: str) -> str:
    for factor, prefix in _PREFIXES:
        if value >= factor:
            return f"{value / factor:.1f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
