"""The operators in C++; everything else about the package stands in setup.cfg.

The library is loaded by ctypes and by MindSpore and imports nothing of Python, so it needs no module initialisation. It
is optional: without a compiler the package is installed all the same, and models run on plain graphs. Instruction sets
are chosen when it runs, so no flag here names one.
"""

from glob import glob

from setuptools import Extension, setup

NATIVE = "modeling/kernels/native"

setup(
    ext_modules=[
        Extension(
            "kimi_vl.modeling.kernels._native",
            sorted(glob(f"{NATIVE}/*.cc")),
            depends=["setup.py", *sorted(glob(f"{NATIVE}/*.h"))],
            language="c++",
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"],
            libraries=["dl", "pthread"],
            optional=True,
        )
    ]
)
