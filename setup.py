"""The extension modules and the four builds: CODEQ_BUILD=release|debug|sanitize|trace."""

import os
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup

BUILD = os.environ.get("CODEQ_BUILD", "release")
CFLAGS = {
    "release": ["-O3", "-g1"],
    "debug": ["-O0", "-g3", "-DCODEQ_DEBUG"],
    "sanitize": [
        "-O1",
        "-g3",
        "-DCODEQ_DEBUG",
        "-fsanitize=address,undefined",
        "-fno-omit-frame-pointer",
    ],
    "trace": ["-O0", "-g3", "-DCODEQ_DEBUG", "-DCYTHON_TRACE_NOGIL=1"],
}[BUILD]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter"]
LDFLAGS = ["-fsanitize=address,undefined"] if BUILD == "sanitize" else []
CHECKED = BUILD != "release"
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": CHECKED,
    "initializedcheck": CHECKED,
    "wraparound": False,
    "nonecheck": False,
    "cdivision": True,
    "auto_pickle": False,
    "autotestdict": False,
    "embedsignature": False,
    "linetrace": BUILD == "trace",
}
CORE = sorted({*glob("csrc/*.c")} - {"csrc/wire.c"})
C_SOURCES = {
    "_client": ["csrc/text.c", "csrc/wire.c"],
    "_counts": CORE,
    "_engine": CORE,
    "_files": [],
    "_salvage": CORE,
    "_views": CORE,
    "_wire": ["csrc/text.c", "csrc/wire.c"],
}


def extension(name: str) -> Extension:
    return Extension(
        f"codeq.engine.{name}",
        [f"codeq/engine/{name}.pyx", *C_SOURCES[name]],
        include_dirs=["csrc"],
        depends=["csrc/codeq.h", "setup.py"],
        extra_compile_args=[*WARNINGS, "-std=c11", "-fvisibility=hidden", *CFLAGS],
        extra_link_args=LDFLAGS,
    )


setup(
    ext_modules=cythonize(
        [extension(name) for name in C_SOURCES],
        build_dir=None if BUILD == "trace" else "build/cython",
        compiler_directives=DIRECTIVES,
    )
)
