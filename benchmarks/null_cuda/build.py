"""Build the null CUDA, a CUDA that does nothing, for the torch of the running interpreter.

``python benchmarks/null_cuda/build.py FOLDER`` writes ``FOLDER/libnull_cuda.so``, and a link to it under the name of
every CUDA library that torch needs. Functions that ``null.c`` does not define are generated: they return 0 and are
recorded by name, or count as a launch if they are cuBLAS products.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
from pathlib import Path

#: Libraries that the null CUDA replaces, and the functions that they define.
LIBRARIES = re.compile(
    r"lib(cuda|cudart|cublas|cublasLt|cudnn|cufft|cufile|cupti|curand|cusolver|cusparse|cusparseLt|nccl|nvrtc|nvshmem_host)\.so"
)
NAMES = re.compile(r"_*(cu|nccl|nvrtc|nvshmem)\w+")
#: Computations of cuBLAS: the letter of a type, then the name of the product.
PRODUCTS = re.compile(
    r"cublas(LtMatmul|GemmEx|GemmStridedBatchedEx|[SDCZ](?!et|estroy|reate)[a-z]\w*)"
)


def folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package} is not installed")
    return Path(found.origin).parent


def wanted(libraries: list[Path]) -> tuple[set[str], set[str]]:
    """File names of CUDA libraries that ``libraries`` need, and names of CUDA functions that none of them defines."""
    files, undefined, defined = {"libcuda.so.1"}, set(), set()
    for library in libraries:
        listed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True)
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", listed.stdout)
        files |= {name for name in needed if LIBRARIES.match(name)}
        symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True)
        for line in symbols.stdout.splitlines():
            *_, kind, name = line.split()
            (undefined if kind in "Uw" else defined).add(name.partition("@")[0])
    return files, {name for name in undefined - defined if NAMES.fullmatch(name)}


def bodies(names: list[str]) -> str:
    """C source of functions of these names that do nothing."""
    lines = ["void null_cuda_called_unknown(const char*);", "void null_cuda_launched(void);"]
    for name in names:
        product = PRODUCTS.fullmatch(name)
        does = "null_cuda_launched()" if product else f'null_cuda_called_unknown("{name}")'
        lines.append(
            f'__attribute__((visibility("default"))) long {name}(void) {{ {does}; return 0; }}'
        )
    return "\n".join(lines) + "\n"


def build(out: Path) -> None:
    here, torch, triton = Path(__file__).parent, folder("torch"), folder("triton")
    out.mkdir(parents=True, exist_ok=True)
    files, undefined = wanted([*(torch / "lib").glob("*.so*"), *torch.glob("_C*.so")])
    nvidia = triton / "backends" / "nvidia"
    # Functions of the driver are looked up by name, with their version number or without.
    header = (nvidia / "include" / "cuda.h").read_text()
    undefined |= set(re.findall(r"\bCUresult CUDAAPI (\w+)\(", header))
    undefined |= set(re.findall(r"#define cu\w+\s+(cu\w+)", header))
    source = (here / "null.c").read_text()
    defined = set(re.findall(r"^EXPORT [^(]*?(\w+)\(", source, re.MULTILINE))
    defined |= set(re.findall(r"^CREATES\((\w+)\)", source, re.MULTILINE))
    for name in re.findall(r"^DESCRIBES\((\w+)", source, re.MULTILINE):
        defined |= {f"{name}Create", f"{name}Destroy"}
    rest = sorted(undefined - defined)
    made = out / "made.c"
    made.write_text(bodies(rest))
    library = out / "libnull_cuda.so"
    command = [
        "gcc",
        "-O2",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-w",
        "-I",
        nvidia / "include",
    ]
    subprocess.run(
        [*command, "-o", library, here / "null.c", made, "-ldl", "-lpthread"], check=True
    )
    for name in files:
        link = out / name
        link.unlink(missing_ok=True)
        link.symlink_to(library.name)
    print(
        f"{library}: {len(defined)} functions by hand, {len(rest)} that do nothing, for {len(files)} libraries"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    build(parser.parse_args().folder.resolve())
