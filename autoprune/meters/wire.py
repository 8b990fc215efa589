"""What travels to a measuring process: a network and its inputs as bytes and plain values.

PyTorch's eager execution needs the module itself: cloudpickle makes bytes of it, for a process on this machine only,
which reads them at once. Every other runtime gets ONNX, which any machine may be given.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.core import InputError, StorageError
from autoprune.writing import room

EXPORTERS = ("tracing", "capturing")  # to ONNX


class NotExportedError(ValueError):
    """A network that an exporter does not take, in the exporter's words."""


def packed(model: nn.Module, inputs: Sequence[Tensor], runtime: str) -> dict[str, Any]:
    """A network and its inputs for a worker with this runtime.

    Raises:
        InputError: the model holds something that no other process can be given (a lock, an open file), or it cannot be
            exported.
    """
    return _pickled(model, inputs) if runtime == "torch" else _exported(model, inputs)


def _pickled(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Any]:
    import cloudpickle

    try:
        on_cpu = all(p.device.type == "cpu" for p in model.parameters())
        there = model if on_cpu else copy.deepcopy(model).cpu()  # the worker moves it to its own place
        return {"pickle": bytes(cloudpickle.dumps((there, tuple(x.cpu() for x in inputs))))}
    except Exception as error:
        raise InputError(
            f"the model cannot be sent to a measuring process ({type(error).__name__}: {error}): "
            "its attributes must be tensors, modules and plain values"
        ) from error


def _exported(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """The tracing exporter first, ten times as fast as the one that captures graphs; that one where tracing fails."""
    names = [f"input_{i}" for i in range(len(inputs))]
    given = tuple(x.detach().cpu() for x in inputs)
    subject = copy.deepcopy(model).cpu().eval()
    problems = []
    for exporter in EXPORTERS:
        try:
            content = onnx_of(subject, given, names=names, exporter=exporter)
        except NotExportedError as error:
            problems.append(error)
            continue
        arrays = {
            name: {"dtype": str(x.numpy().dtype), "shape": list(x.shape), "data": x.contiguous().numpy().tobytes()}
            for name, x in zip(names, given, strict=True)
        }
        return {"onnx": content, "inputs": arrays}
    raise InputError(f"the model cannot be exported to ONNX, which this device's runtime needs: {problems[-1]}")


def onnx_of(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    names: Sequence[str],
    outputs: Sequence[str] | None = None,
    exporter: str = "tracing",
    opset: int | None = None,
    batch: str | None = None,
) -> bytes:
    """A network on the CPU, in evaluation mode, as ONNX.

    names, outputs: of its inputs and outputs, in their order. exporter: one of EXPORTERS. batch: what the first
    dimension of every input is called where it may be of any size; None where it is as large as here.

    Raises:
        InputError: onnx or onnxscript is not installed.
        NotExportedError: this exporter cannot.
    """
    check_onnx()
    settings: dict[str, Any] = {"input_names": list(names), "output_names": outputs and list(outputs)}
    if batch and exporter == "tracing":
        settings["dynamic_axes"] = {name: {0: batch} for name in names}
    elif batch:
        settings["dynamic_shapes"] = batched(model, inputs, batch)
    try:
        with quiet(), room(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as folder:
            path, dynamo = Path(folder) / "model.onnx", exporter == "capturing"
            settings |= {"dynamo": dynamo, "external_data": False, "verbose": False, "opset_version": opset}
            torch.onnx.export(model, inputs, path, **settings)
            return path.read_bytes()
    except StorageError:
        raise
    except Exception as error:
        raise NotExportedError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def batched(model: nn.Module, inputs: tuple[Tensor, ...], name: str) -> tuple[Any, ...]:
    """What torch.export is told of positional inputs whose first dimension may be of any size."""
    each = tuple({0: torch.export.Dim(name)} for _ in inputs)
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    before = kinds.index(inspect.Parameter.VAR_POSITIONAL) if inspect.Parameter.VAR_POSITIONAL in kinds else len(each)
    return (*each[:before], each[before:]) if len(each) > before else each


def check_onnx() -> None:
    """Raises InputError where what the exporters need is not installed."""
    try:
        import onnx  # noqa: F401, the exporters need it
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'autoprune[onnx]'") from error


def inputs_of(content: bytes) -> list[str]:
    """The names of what an ONNX model takes."""
    import onnx

    return [entry.name for entry in onnx.load_from_string(content).graph.input]


def stamped(content: bytes, properties: Mapping[str, str]) -> tuple[bytes, int]:
    """An ONNX model with these metadata, and its opset."""
    import onnx

    model = onnx.load_from_string(content)
    onnx.helper.set_model_props(model, dict(properties))
    (opset,) = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    return model.SerializeToString(), opset


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters print to both streams, log and warn; what matters of it is in what they raise."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
