"""What the compiler makes of the Triton kernels, on a machine without a GPU.

usage: ``python -m wads_dist.kernels.compiled [--json] [TARGET ...]``; all of ``TARGETS`` without names. Every kernel is
compiled ahead of time for each target, and the binary is read: registers per thread, spills, shared memory, and the mix of
its instructions.
Needs Triton uninterpreted: a process without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = (".objective.triton", ".synthesis.triton", ".group_norm.triton")
# Each target, and the shared memory that one block may have there.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
WARP_SIZE = "warp size"  # as the value of a constexpr: 32 on NVIDIA's targets, 64 on AMD's

# The first pattern that an instruction's name matches names its class; NVIDIA's are upper case.
CLASSES = {
    "shuffle": r"SHFL|ds_bpermute|ds_permute|ds_swizzle|.*_dpp|v_readlane|v_writelane|v_permlane",
    "barrier": r"BAR|WARPSYNC|s_barrier",
    "load": r"LD[GSL]?\b|(global|buffer|flat|scratch)_load|ds_read",
    "store": r"ST[GSL]?\b|(global|buffer|flat|scratch)_store|ds_write",
    "fma": r"[FD]FMA|v_(pk_)?(fma|fmac|mad)_",
    "mufu": r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "float": r"[FD](ADD|MUL|MNMX|SEL|SETP|SET)|v_(pk_)?(add|sub|subrev|mul|max|min|max3|min3|cmp_\w+)_f\d|v_cndmask",
    "integer": r"U?IMAD|U?IADD|U?LEA|U?ISETP|U?LOP|U?SHF|[sv]_(add|sub|mul|lshl|lshr|ashr|and|or|xor|bfe|mad)\w*_[iub]\d",
    "move": r"U?MOV|CS2R|[sv]_mov",
}


@dataclass(frozen=True)
class KernelSpec:
    """One kernel as it would be compiled for one call.

    ``signature`` has the type of every argument that is no constexpr: ``*fp32``, ``i32``, ``fp32``, and ``i32:16`` for an
    integer known to be a multiple of 16, as Triton notices at a launch. Pointers count as aligned to 16 bytes, as torch's are.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    lanes: int | None = None  # of a warp; compiled only for targets whose warps have as many


@dataclass(frozen=True)
class CompiledKernel:
    """``registers`` per thread. ``spills``: bytes of stack a thread (NVIDIA), or registers spilled (AMD). ``instructions``:
    how many of each class the code has, each once however often a loop runs it, and their ``total``."""

    kernel: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    instructions: dict[str, int]


def compile_spec(spec: KernelSpec, target: str) -> CompiledKernel:
    """Compiles ``spec`` for one of ``TARGETS`` and reads the result."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton is interpreting its kernels: unset TRITON_INTERPRET before this process starts")
    gpu, _ = TARGETS[target]
    constexprs = {k: gpu.warp_size if v == WARP_SIZE else v for k, v in spec.constexprs.items()}
    signature, attributes = {}, {}
    for i, argument in enumerate(spec.fn.arg_names):
        kind, _, multiple = spec.signature.get(argument, "constexpr").partition(":")
        signature[argument] = kind
        if multiple or kind.startswith("*"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(spec.fn, signature, constexprs, attrs=attributes)
    compiled = triton.compile(
        source,
        target=gpu,
        options={"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": True},
    )
    read = _read_amdgcn if gpu.backend == "hip" else _read_cubin
    registers, spills, names = read(compiled.asm)
    return CompiledKernel(spec.name, target, registers, spills, compiled.metadata.shared, _mix(names))


def compile_report(targets: Iterable[str] = TARGETS) -> Iterator[CompiledKernel]:
    """Every kernel of this folder for each of ``targets`` (keys of ``TARGETS``), as they are compiled."""
    for name in MODULES:
        for spec in import_module(name, __package__).compile_specs():
            for target in targets:
                if spec.lanes in (None, TARGETS[target][0].warp_size):
                    yield compile_spec(spec, target)


def _read_cubin(asm: Mapping[str, Any]) -> tuple[int, int, list[str]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, sass = dump("-res-usage"), dump("-sass")
    registers, stack, local = (int(re.search(rf"{field}:(\d+)", usage)[1]) for field in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    return (
        registers,
        stack + local,
        re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass, re.M),
    )


def _read_amdgcn(asm: Mapping[str, Any]) -> tuple[int, int, list[str]]:
    text = asm["amdgcn"]
    fields = dict(re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.M))
    spills = int(fields["vgpr_spill_count"]) + int(fields["sgpr_spill_count"])
    return (
        int(fields["vgpr_count"]),
        spills,
        re.findall(r"^\t([sv]_\w+|ds_\w+|(?:global|buffer|flat|scratch)_\w+)", text, re.M),
    )


def _mix(names: list[str]) -> dict[str, int]:
    names = [name for name in names if name not in ("NOP", "s_nop", "s_code_end")]
    counts = Counter(next((c for c, pattern in CLASSES.items() if re.match(pattern, name)), "other") for name in names)
    return {kind: counts[kind] for kind in (*CLASSES, "other")} | {"total": len(names)}


def main(arguments: list[str]) -> None:
    targets = [argument for argument in arguments if argument != "--json"] or list(TARGETS)
    if unknown := set(targets) - set(TARGETS):
        raise SystemExit(f"unknown target {', '.join(sorted(unknown))}; known: {', '.join(TARGETS)}")
    if "--json" in arguments:
        print(json.dumps([asdict(kernel) for kernel in compile_report(targets)]))
        return
    kinds = [*CLASSES, "other", "total"]
    print(f"{'kernel':41} {'target':7} {'regs':>5} {'spills':>6} {'shared':>7}  " + " ".join(f"{k:>7}" for k in kinds))
    for k in compile_report(targets):
        mix = " ".join(f"{k.instructions[kind]:7}" for kind in kinds)
        print(f"{k.kernel:41} {k.target:7} {k.registers:5} {k.spills:6} {k.shared_bytes:7}  {mix}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
