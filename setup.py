"""Builds the C++ kernels where there is a torch and a compiler; everything else is in pyproject.toml.

The kernels are optional: without them the package runs on its torch reference. SELFGEN_NO_CPP=1 leaves them out.
SELFGEN_SANITIZE=address,undefined builds them with these sanitizers of gcc: see `make sanitize`.

They call torch's C++ interface and nothing of Python, so that one wheel is for every CPython from 3.11 on (abi3), and
for the torch that it was built with, whose version is written next to them (docs/install.md).
"""

import os
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup

FOLDER = "selfgen_kernels/backends/cpu"
SOURCES = sorted(glob(f"{FOLDER}/*.cpp"))
HEADERS = sorted(glob(f"{FOLDER}/*.h"))
MODULE = "selfgen_kernels.backends.cpu._C"
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none
SANITIZERS = os.environ.get("SELFGEN_SANITIZE", "")
SANITIZE = [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"] if SANITIZERS else []  # a finding ends the process
SPEED = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-wrapv", *SANITIZE] if SANITIZERS else ["-O3", "-g0"]
FLAGS = [*SPEED, *OPENMP, "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-unknown-pragmas"]


def without_kernels(reason: object) -> dict:
    print(f"selfgen: no C++ kernels, CPU ops will run on the torch reference ({reason})", file=sys.stderr)
    return {}


def cpp_kernels() -> dict:
    """The arguments of `setup` that build the kernels; none where that is impossible or unwanted."""
    if os.environ.get("SELFGEN_NO_CPP") == "1":
        return without_kernels("SELFGEN_NO_CPP=1")
    # An isolated build hides the packages of the environment that it installs into: look there last, for its torch.
    sys.path.append(sysconfig.get_path("purelib"))
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except Exception as error:
        return without_kernels(f"torch cannot be imported: {error}")

    class OptionalBuild(BuildExtension):
        def run(self):
            if self.inplace:  # a library of one CPython, as built before, would be found first
                for old in glob(f"{FOLDER}/_C.*"):
                    os.remove(old)
            try:
                super().run()
                Path(self.get_ext_fullpath(MODULE)).with_name("_C.torch").write_text(torch.__version__)
            except Exception as error:
                if SANITIZERS:
                    raise
                self.extensions = []
                without_kernels(error)

    kernels = CppExtension(
        MODULE,
        SOURCES,
        depends=HEADERS,
        extra_compile_args=FLAGS,
        extra_link_args=OPENMP + SANITIZE,
        py_limited_api=True,
    )
    return {
        "ext_modules": [kernels],
        "cmdclass": {"build_ext": OptionalBuild.with_options(use_ninja=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**cpp_kernels())
