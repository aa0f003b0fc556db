"""The two sessions of a bundle: opened on their backends, checked against the contract, and put into a Predictor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from edgesam_deploy.contract import Geometry, GraphContract, TensorSpec, contracts
from edgesam_deploy.errors import BundleError, MissingExtraError
from edgesam_deploy.predictor import Predictor
from edgesam_deploy.recipe import Pixels
from edgesam_deploy.runtime import BACKENDS, CPU_BACKENDS, DEFAULT_BACKEND, Session, SessionOptions, open_session


@contextmanager
def open_predictor(
    graphs: Mapping[str, Path], how: Mapping[str, tuple[str, SessionOptions]], geometry: Geometry, pixels: Pixels
) -> Iterator[Predictor]:
    """A Predictor on ``encoder`` and ``decoder`` files. how: the backend of each, and its options.

    Raises BundleError for a backend that this version has not, or a graph whose inputs or outputs are not those of the
    contract, and MissingExtraError where a backend is not installed.
    """
    with ExitStack() as stack:
        sessions = {}
        for name, expected in contracts(geometry).items():
            backend, options = how[name]
            if name == "decoder":
                # Prompts change their shape from call to call, so that a recorded graph pays for the encoder only; its
                # embedding stays on the device, masks do not.
                options = replace(options, cuda_graph=False, stay=())
            session = stack.enter_context(_open(graphs[name], backend, options))
            _check_specs(session.specs(), expected, graphs[name])
            sessions[name] = session
        yield Predictor(sessions["encoder"], sessions["decoder"], geometry, pixels)


def _open(graph: Path, backend: str, options: SessionOptions) -> Session:
    if backend not in BACKENDS:
        raise BundleError(
            f"{graph} is for the backend '{backend}', this version has {', '.join(BACKENDS)}: upgrade edgesam-deploy"
        )
    try:
        return open_session(graph, backend, options)
    except MissingExtraError as error:
        if backend not in CPU_BACKENDS or backend == DEFAULT_BACKEND:
            raise
        otherwise = f"run the same graphs with  --backend {DEFAULT_BACKEND}"
        raise MissingExtraError(error.module, error.extra, otherwise) from error


def _check_specs(found: GraphContract, expected: GraphContract, graph: Path) -> None:
    """Raise BundleError naming the first tensor that the manifest's geometry does not explain."""
    pairs = zip_longest((*expected.inputs, *expected.outputs), (*found.inputs, *found.outputs))
    for want, have in pairs:
        if want is None or have is None or not _same(want, have):
            raise BundleError(
                f"{graph} has other inputs or outputs than manifest.json says: expected {want}, found {have}. "
                "Build the bundle again"
            )


def _same(want: TensorSpec, have: TensorSpec) -> bool:
    """Equal but for the names of dynamic axes, which a plan does not keep, nor OpenVINO."""
    return (want.name, want.dtype, len(want.shape)) == (have.name, have.dtype, len(have.shape)) and all(
        a == b or (isinstance(a, str) and isinstance(b, str)) for a, b in zip(want.shape, have.shape, strict=True)
    )
