"""The errors that reach a user.

Each message is one line that says what was wrong, where, and what to do instead. The command line prints it and
exits with code 2; a library caller catches `GraphoptError`. Anything else that escapes is a bug of graphopt.
"""


class GraphoptError(Exception):
    """A request that cannot be honoured as it stands."""


class ModelError(GraphoptError):
    """A model that cannot be read, or that onnxruntime cannot run."""


class DataError(GraphoptError):
    """Calibration or check data that is missing, malformed, or does not fit the model."""


class PipelineError(GraphoptError):
    """A pipeline text with an unknown pass or option, or passes in an order that cannot work."""


class OutputError(GraphoptError):
    """A result that cannot be written where it was asked for."""


class PassError(GraphoptError):
    """A pass that raised, or whose result failed verification; the model from before it was kept."""
