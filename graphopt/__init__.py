"""Compiler passes for ONNX: fold, calibrate and quantize a float model, with evidence of how close it stays.

result = graphopt.optimize("model.onnx", "fold,calibrate,qdq", data="calib.npz")
result.save("model.int8.onnx")
"""

from graphopt.api import calibrate, channel_groups, check, inspect, lint, optimize
from graphopt.errors import GraphoptError
from graphopt.pass_base import Context, Effect, Pass, PassResult, Skip
from graphopt.pass_manager import PassManager, Result
from graphopt.preprocess import Preprocess
from graphopt.version import VERSION

__all__ = [
    "Context",
    "Effect",
    "GraphoptError",
    "Pass",
    "PassManager",
    "PassResult",
    "Preprocess",
    "Result",
    "Skip",
    "__version__",
    "calibrate",
    "channel_groups",
    "check",
    "inspect",
    "lint",
    "optimize",
]

__version__ = VERSION
