"""What travels to a measuring process: a network and its inputs as bytes and plain values.

PyTorch's eager execution needs the module itself: cloudpickle makes bytes of it, for a process on this machine only,
which reads them at once. Every other runtime gets ONNX, which any machine may be given.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.core import InputError, StorageError
from autoprune.writing import room


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
    try:
        import onnx  # noqa: F401, the exporters need it
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install 'autoprune[onnx]'") from error
    names = [f"input_{i}" for i in range(len(inputs))]
    given = tuple(x.detach().cpu() for x in inputs)
    subject = copy.deepcopy(model).cpu().eval()
    problems = []
    for dynamo in (False, True):
        try:
            with _quiet(), room(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.onnx"
                settings = {"input_names": names, "dynamo": dynamo, "external_data": False, "verbose": False}
                torch.onnx.export(subject, given, path, **settings)  # type: ignore[arg-type]
                content = path.read_bytes()
        except StorageError:
            raise
        except Exception as error:  # noqa: BLE001, exporters raise of everything
            problems.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        arrays = {
            name: {"dtype": str(x.numpy().dtype), "shape": list(x.shape), "data": x.contiguous().numpy().tobytes()}
            for name, x in zip(names, given, strict=True)
        }
        return {"onnx": content, "inputs": arrays}
    raise InputError(f"the model cannot be exported to ONNX, which this device's runtime needs: {problems[-1]}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
