"""The one compiled part; the rest is in pyproject.toml. Where no compiler is, numpy does the same, slower."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "graphopt._counting",
            ["graphopt/_counting.c"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],  # one build for Python 3.11 and later
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
