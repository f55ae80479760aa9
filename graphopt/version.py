"""The version that is installed, for reports and files."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("graphopt")
except PackageNotFoundError:  # the folder is on the path, but nothing was installed
    VERSION = "0+unknown"
