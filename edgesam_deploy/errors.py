"""Every error the package raises on purpose.

    EdgeSAMError                exit 1   something failed; the message says what to do
    ├── InputError              exit 2   the request itself is wrong
    │   ├── RecipeError                  unknown recipe, or a recipe that does not validate
    │   ├── TargetError                  unknown target, or a target that does not validate
    │   └── PromptError                  points, labels, boxes or mask inputs that cannot be used
    ├── ImageError              exit 1   a file that is not a readable image
    ├── CheckpointError         exit 1   weights that do not fit, do not hash, or are not weights
    ├── GraphError              exit 1   an ONNX file that is broken or breaks a rule of the project
    ├── BundleError             exit 1   a bundle that is incomplete, altered or of another schema
    ├── OutputError             exit 1   a result that could not be written
    ├── BackendError            exit 1   a runtime that is missing a device, or refused the graph
    ├── MissingExtraError       exit 1   an optional dependency is not installed
    └── ThresholdError          exit 3   everything ran, and the result is below its threshold

A message is one line: what was expected, what came, what to do. The command line catches
``EdgeSAMError`` in one place (``cli.main``) and turns it into that line and the exit code.
"""

from __future__ import annotations


class EdgeSAMError(Exception):
    """Root of the tree."""

    exit_code = 1


class InputError(EdgeSAMError):
    exit_code = 2


class RecipeError(InputError):
    pass


class TargetError(InputError):
    pass


class PromptError(InputError):
    pass


class ImageError(EdgeSAMError):
    pass


class CheckpointError(EdgeSAMError):
    pass


class GraphError(EdgeSAMError):
    pass


class BundleError(EdgeSAMError):
    pass


class OutputError(EdgeSAMError):
    pass


class BackendError(EdgeSAMError):
    pass


class MissingExtraError(EdgeSAMError):
    """An optional dependency is missing; the message carries the command that installs it, and another way if any."""

    def __init__(self, module: str, extra: str, otherwise: str = "") -> None:
        super().__init__(
            f"this needs the Python package '{module}', which is not installed: "
            f"run  pip install 'edgesam-deploy[{extra}]'{', or ' if otherwise else ''}{otherwise}"
        )
        self.module = module
        self.extra = extra
        self.otherwise = otherwise

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        """Pickled by what it was made from: one that is raised in a worker process reaches its parent."""
        return type(self), (self.module, self.extra, self.otherwise)


class ThresholdError(EdgeSAMError):
    exit_code = 3
