"""A network as a file of another runtime, which is kept only where it computes there what it computes in PyTorch.

onnx: run in ONNX Runtime on the CPU. torch: a program of torch.export, loaded again and run. safetensors: the weights
alone, put into a network of zeros, or, of a run, into one that is rebuilt from the ratio table; equal to the last bit.

Letters: N examples.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves

import autoprune
from autoprune.borrowing import arguments, seeded
from autoprune.core import InputError, MismatchError, Task, check_rules
from autoprune.costs import COUNTING
from autoprune.keywords import positional, unnamed
from autoprune.meters import wire
from autoprune.meters.worker import OnnxRuntime
from autoprune.prune import Inputs, RatioTable
from autoprune.writing import is_full, whole

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}  # of each format
TOLERANCE = {"onnx": 1e-4, "torch": 1e-4, "safetensors": 0.0}  # of the largest value of an output
EXPORTERS = {"onnx": wire.EXPORTERS, "torch": ("torch.export",), "safetensors": ("safetensors",)}
SIZES = (1, 7)  # batches that a file of any batch is run at, besides the example's
OLDEST, NEWEST = 11, 23  # opsets that the exporters take
Run = Callable[[tuple[Tensor, ...]], list[Tensor]]  # a network: from positional inputs to the tensors of its output
Shapes = Mapping[str, tuple[int | str, ...]]
Written = tuple[Run, str, int | None, Collection[str]]  # how to run a file, in what, its opset, the inputs it takes


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file, and how far what it computes is from what the network computes in PyTorch.

    batch: "dynamic" where the file takes any, "fixed" where only the example's; note: why it is fixed though a dynamic
    one was asked for. differences: of each batch size that was run, the largest absolute difference of any output;
    relative: the largest by the largest value of its output, at most TOLERANCE. opset: of onnx. precision: the types of
    the network's floating parameters. inputs, outputs: shapes by name, "batch" standing for any size; of the inputs
    those that the file takes, which ONNX has none of that nothing reads. macs: of one example, None where it is not
    taken alone. runtime: what the file was run in.
    """

    path: Path
    format: str
    batch: str
    differences: Mapping[int, float]
    relative: float
    opset: int | None
    precision: str
    inputs: Shapes
    outputs: Shapes
    macs: float | None
    params: float
    bytes: int
    runtime: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked of a file, as of `export`."""

    format: str = "onnx"
    batch: str = "dynamic"
    opset: int = 18
    metadata: Mapping[str, str] = field(default_factory=dict)
    reload: Callable[[Path], nn.Module] | None = None

    def __post_init__(self) -> None:
        rules = {
            f"format must be one of {', '.join(SUFFIXES)}": self.format in SUFFIXES,
            "batch must be dynamic or fixed": self.batch in ("dynamic", "fixed"),
            f"{OLDEST} <= opset <= {NEWEST}": type(self.opset) is int and OLDEST <= self.opset <= NEWEST,
        }
        check_rules("export", rules, {"format": self.format, "batch": self.batch, "opset": self.opset})


def export(
    model: nn.Module,
    inputs: Inputs,
    path: str | Path,
    *,
    format: str = "onnx",
    batch: str = "dynamic",
    opset: int = 18,
    metadata: Mapping[str, str] = MappingProxyType({}),
    reload: Callable[[Path], nn.Module] | None = None,
) -> Exported:
    """Write a network to `path`, and run what was written beside it: at the example's batch, and, where the batch is of
    any size, at 1 and 7. The model itself is not touched.

    inputs: an example of what the model is called with, whose dimensions but the first are those of the file. format:
    onnx, torch or safetensors. batch: dynamic, or fixed at the example's; where no file of any batch can be made it is
    fixed, and the answer says why. opset: of onnx, 11 to 23. metadata: texts that are written into the file, beside the
    network's costs and shapes. reload: what makes the network again from a file of safetensors.

    Raises:
        InputError: a setting that there is not, a path that cannot be written, a package that is not installed, or a
            network that the format cannot hold.
        MismatchError: the file computes something else; what was at `path` is still there.
        StorageError: the disk is full.
    """
    path, plan = Path(path), Plan(format=format, batch=batch, opset=opset, metadata=metadata, reload=reload)
    if path.suffix != SUFFIXES[format] or not path.parent.is_dir() or path.is_dir():
        raise InputError(f"output must be a file *{SUFFIXES[format]} in a folder that there is, got {path}")
    subject, problems = _Subject.of(model, inputs), dict[str, Exception]()
    for kind, exporter in product(("dynamic", "fixed") if batch == "dynamic" else ("fixed",), EXPORTERS[format]):
        try:
            with seeded(0), _replacing(path) as temporary:
                found = _made(subject, temporary, replace(plan, batch=kind), exporter)
            return replace(found, path=path, note="" if kind == "dynamic" else str(problems.get("dynamic", "")))
        except (MismatchError, wire.NotExportedError) as error:
            if not isinstance(problems.get(kind), MismatchError):
                problems[kind] = error
    if isinstance(problems["fixed"], MismatchError):
        raise problems["fixed"]
    raise InputError(f"the network cannot be exported to {format}: {problems['fixed']}")


def export_run(task: Task, folder: Path, plan: Plan = Plan(), *, output: str | None = None) -> Exported:
    """`export` the pruned network of a finished search or fine-tune, by default into its folder.

    Raises:
        InputError: as of `export`; or the folder holds no finished run of this task.
    """
    table = RatioTable.load(folder / "ratios.yaml")

    def rebuilt(weights: Path) -> nn.Module:
        return table.rebuild(task.model, task.inputs, weights)

    keys = ("budget", "limit", "unit", "value", "met")
    asked = [{key: budget[key] for key in keys if key in budget} for budget in table.budgets]
    return export(
        rebuilt(folder / "pruned.safetensors"),
        task.inputs,
        Path(output) if output else folder / f"exported{SUFFIXES[plan.format]}",
        format=plan.format,
        batch=plan.batch,
        opset=plan.opset,
        metadata={"task": task.name, "budgets": json.dumps(asked), "architecture": table.architecture},
        reload=rebuilt,
    )


@dataclass(frozen=True)
class _Subject:
    """A copy of the network on the CPU in evaluation mode, and its example, positional; keywords: the names that it is
    called by, if it is."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    keywords: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module, inputs: Inputs) -> _Subject:
        keywords = tuple(inputs) if isinstance(inputs, Mapping) else ()
        given = arguments(unnamed(model, inputs)[1], "cpu")
        if not all(isinstance(x, Tensor) and x.dim() and len(x) for x in given):
            raise InputError("every input must be a tensor whose first dimension is the batch, of one example or more")
        made = {id(v): v.detach().clone() for m in model.modules() for v in vars(m).values() if _is_made(v)}
        return _Subject(copy.deepcopy(model, made).cpu().eval(), given, keywords)

    @property
    def names(self) -> list[str]:
        count = len(self.inputs)
        return list(self.keywords) or (["input"] if count == 1 else [f"input_{i}" for i in range(count)])

    def run(self, program: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
        """What a program that is called as the network is makes of positional inputs."""
        given = arguments(inputs)
        with torch.no_grad():
            return program(**dict(zip(self.keywords, given, strict=True))) if self.keywords else program(*given)

    def examples(self, count: int) -> tuple[Tensor, ...]:
        """The example at another batch size: its rows again and again, each time rolled along their last dimension."""
        return tuple(torch.stack([_row(x, i) for i in range(count)]) for x in self.inputs)

    def unmasked(self) -> nn.Module:
        """The network with its masks in its weights."""
        model = copy.deepcopy(self.model)
        for module in model.modules():
            for hook in [h for h in module._forward_pre_hooks.values() if isinstance(h, prune.BasePruningMethod)]:
                prune.remove(module, hook._tensor_name)
        return model


def _is_made(value: Any) -> bool:
    """Whether it is a tensor that was computed, which cannot be copied: as a masked weight is by each pass."""
    return isinstance(value, Tensor) and not value.is_leaf


def _row(x: Tensor, i: int) -> Tensor:
    row, again = x[i % len(x)], i // len(x)
    return row.roll(again, -1) if row.dim() else row


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    try:
        with whole(path) as temporary:
            yield temporary
    except OSError as error:
        raise InputError(f"output={path} cannot be written: {error.strerror or error}") from error


def _made(subject: _Subject, path: Path, plan: Plan, exporter: str) -> Exported:
    """A file by one exporter, at one kind of batch, that was run.

    Raises:
        MismatchError: it computes something else.
        NotExportedError: the exporter cannot, or the network or the file does not run at these batch sizes.
    """
    here, lengths = len(subject.inputs[0]), {len(x) for x in subject.inputs}
    if plan.batch == "dynamic" and len(lengths) > 1:
        said = " and ".join(map(str, sorted(lengths)))
        raise wire.NotExportedError(f"the first dimensions of its inputs are {said}, not those of one batch")
    sizes = sorted({here, *SIZES}) if plan.batch == "dynamic" else []
    examples = {n: subject.examples(n) for n in sizes} or {here: subject.inputs}
    others = "at another batch than the example's" if plan.batch == "dynamic" else "on its example"
    with _telling(f"the network does not run {others}"):
        answers = {n: subject.run(subject.model, given) for n, given in examples.items()}
    wanted = {n: _tensors(answer) for n, answer in answers.items()}
    if not wanted[here]:
        raise InputError("the output of the network must hold a tensor, it has none")
    names = _output_names(answers[here], len(wanted[here]), subject.names)
    facts = _facts(subject) | {"inputs": _shapes(subject.names, examples), "outputs": _shapes(names, wanted)}
    written = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    plan = replace(plan, metadata={"autoprune": autoprune.__version__, **plan.metadata, **written})
    write = {"onnx": _onnx, "torch": _torch, "safetensors": _safetensors}[plan.format]
    run, runtime, opset, taken = write(subject, path, plan, exporter, names)
    with _telling(f"{runtime.partition(' ')[0]} does not run the file"):
        gaps = {n: _gap(run(given), wanted[n]) for n, given in examples.items()}
    relative, most = max(relative for _, relative in gaps.values()), TOLERANCE[plan.format]
    if relative > most:
        told = ", ".join(f"{absolute:.3g} at a batch of {n}" for n, (absolute, _) in gaps.items())
        raise MismatchError(
            f"the {plan.format} file computes something else in {runtime} than the network in PyTorch: it differs by "
            f"{told}, by {relative:.3g} of the largest value of an output, where at most {most:g} is accepted; it was "
            "not kept"
        )
    return Exported(
        path=path,
        format=plan.format,
        batch=plan.batch,
        differences={n: absolute for n, (absolute, _) in gaps.items()},
        relative=relative,
        opset=opset,
        bytes=path.stat().st_size,
        runtime=runtime,
        **(facts | {"inputs": {name: shape for name, shape in facts["inputs"].items() if name in taken}}),
    )


def _facts(subject: _Subject) -> dict[str, Any]:
    """What is said of a network in its file, as of Exported."""
    kinds = {str(p.dtype).removeprefix("torch.") for p in subject.model.parameters() if p.is_floating_point()}
    adapted = positional(subject.model, subject.keywords) if subject.keywords else subject.model
    macs = None
    with suppress(Exception):  # one example alone is counted, which not every network takes
        macs = COUNTING["macs"].measure(adapted, subject.inputs).value
    params = COUNTING["params"].measure(adapted, subject.inputs).value
    return {"precision": ", ".join(sorted(kinds)), "macs": macs, "params": params}


def _onnx(subject: _Subject, path: Path, plan: Plan, exporter: str, outputs: Sequence[str]) -> Written:
    try:
        wire.check_onnx()
        runtime = OnnxRuntime("CPUExecutionProvider", torch.get_num_threads(), "f32")
    except (InputError, ImportError) as error:
        missing = getattr(error, "name", None) or str(error).partition(" ")[0]
        raise InputError(f"{missing} is not installed: pip install 'autoprune[onnxruntime]'") from error
    content = wire.onnx_of(
        _Flat(subject).eval(),
        subject.examples(2) if plan.batch == "dynamic" else subject.inputs,
        names=subject.names,
        outputs=outputs,
        exporter=exporter,
        opset=plan.opset,
        batch="batch" if plan.batch == "dynamic" else None,
    )
    taken = wire.inputs_of(content)
    _check_unread(subject, [name for name in subject.names if name not in taken])
    shapes = {name: shape for name, shape in json.loads(plan.metadata["inputs"]).items() if name in taken}
    content, opset = wire.stamped(content, {**plan.metadata, "inputs": json.dumps(shapes)})
    path.write_bytes(content)
    with _telling("onnxruntime does not load the file"):
        session, _ = runtime.load({"onnx": str(path), "inputs": {}})

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        given = {name: x.numpy() for name, x in zip(subject.names, inputs, strict=True) if name in taken}
        return [torch.from_numpy(y) for y in session.run(None, given)]

    return run, str(runtime.facts()["runtime"]), opset, taken


def _check_unread(subject: _Subject, unread: Sequence[str]) -> None:
    """Raises MismatchError where the network heeds an input that a file has lost, as one does whose code looks whether
    a mask is all ones: on the example alone the file would be right."""
    if not unread:
        return
    changed = [
        (x == 0).to(x.dtype) if name in unread else x for name, x in zip(subject.names, subject.inputs, strict=True)
    ]
    try:
        before, after = (_tensors(subject.run(subject.model, given)) for given in (subject.inputs, tuple(changed)))
    except Exception:  # noqa: BLE001, the network need not take such values
        return
    if _gap(after, before)[1] > TOLERANCE["onnx"]:
        raise MismatchError(
            f"the onnx file does not read {', '.join(unread)}, by which the network's output changes: its code decides "
            "by the example's values; it was not kept"
        )


class _Flat(nn.Module):
    """A network called by position that gives the tensors of its output, one after the other."""

    def __init__(self, subject: _Subject) -> None:
        super().__init__()
        self.network, self.keywords = subject.unmasked(), subject.keywords

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.keywords, values, strict=True)) if self.keywords else {}
        return tuple(_tensors(self.network(**named) if named else self.network(*values)))


def _torch(subject: _Subject, path: Path, plan: Plan, exporter: str, outputs: Sequence[str]) -> Written:
    model, examples = subject.unmasked(), subject.examples(2) if plan.batch == "dynamic" else subject.inputs
    named = dict(zip(subject.keywords, examples, strict=True)) if subject.keywords else {}
    each: Any = [{0: torch.export.Dim("batch")} for _ in examples] if plan.batch == "dynamic" else None
    shapes = dict(zip(named, each, strict=True)) if each and named else each and wire.batched(model, examples, "batch")
    with _telling("torch.export"), wire.quiet():
        program = torch.export.export(model, () if named else examples, named, dynamic_shapes=shapes)
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files={"autoprune.json": json.dumps(plan.metadata)})
        with path.open("rb") as file:
            again = torch.export.load(file).module()
    return lambda inputs: _tensors(subject.run(again, inputs)), f"torch {torch.__version__}", None, subject.names


def _safetensors(subject: _Subject, path: Path, plan: Plan, exporter: str, outputs: Sequence[str]) -> Written:
    safetensors.torch.save_model(subject.model, str(path), metadata={"format": "pt", **plan.metadata})
    if plan.reload:
        again = plan.reload(path).eval()
    else:
        again = copy.deepcopy(subject.model)
        with torch.no_grad():
            for tensor in again.state_dict().values():
                tensor.zero_()
        safetensors.torch.load_model(again, str(path))
    return lambda inputs: _tensors(subject.run(again, inputs)), f"torch {torch.__version__}", None, subject.names


@contextmanager
def _telling(place: str) -> Iterator[None]:
    """What is raised inside, of whatever kind, as a NotExportedError that begins with the place."""
    try:
        yield
    except (InputError, MismatchError):
        raise
    except Exception as error:
        if is_full(error):
            raise
        told = " ".join(str(error).split())[:200]
        raise wire.NotExportedError(f"{place}: {type(error).__name__}: {told}") from error


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _output_names(output: Any, count: int, taken: Sequence[str]) -> list[str]:
    """The keys of an output that is a mapping of tensors; else a number each."""
    names = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    if isinstance(output, Mapping) and all(isinstance(value, Tensor) for value in output.values()):
        names = [str(key) for key in output]
    return [f"output_{name}" if name in taken else name for name in names]


def _shapes(names: Sequence[str], tensors: Mapping[int, Sequence[Tensor]]) -> Shapes:
    """By name, a dimension that is as large as the batch at every size being "batch", one that varies otherwise
    "any"."""
    found = {}
    for i, name in enumerate(names):
        columns = zip(*(tensors[n][i].shape for n in tensors), strict=True)
        found[name] = tuple(
            sizes[0] if len(set(sizes)) == 1 else "batch" if sizes == tuple(tensors) else "any" for sizes in columns
        )
    return found


def _gap(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[float, float]:
    """The largest difference of outputs, and the largest by the largest value of its output; infinite where shapes
    differ, or one is a number and the other not."""
    if [x.shape for x in found] != [x.shape for x in wanted]:
        return math.inf, math.inf
    absolute = relative = 0.0
    for f, w in zip(found, wanted, strict=True):
        apart = (f.double() - w.double()).abs()
        same = (f == w) | (f.isnan() & w.isnan())
        most = float(apart.masked_fill(same, 0.0).nan_to_num(nan=math.inf).max()) if apart.numel() else 0.0
        size = float(w.double().abs().nan_to_num(0.0, 0.0, 0.0).max()) if apart.numel() else 0.0
        absolute, relative = max(absolute, most), max(relative, most / size if size else math.inf * bool(most))
    return absolute, relative
