"""A file that was exported computes, where it will run, what the pruned network computes in PyTorch."""

from __future__ import annotations

import copy
import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import safetensors.torch
import torch
from test_prune import Named, table_of
from torch import Tensor, nn
from torch.nn.utils import prune
from torchmetrics.classification import MulticlassAccuracy
from zoo import ZOO, Plain

import autoprune
from autoprune import cli, exporting
from autoprune.borrowing import first, seeded
from autoprune.core import InputError, MismatchError, StorageError
from autoprune.keywords import positional
from autoprune.meters import wire
from autoprune.prune import RatioTable
from autoprune.tasks.fashion_mnist_resnet20 import make_task


def halved(name: str) -> nn.Module:
    """A network of the zoo at half its widths, its statistics away from those that it begins with."""
    torch.manual_seed(0)
    model = ZOO[name].build().train()
    with torch.no_grad():
        model(*ZOO[name].inputs(8))
    return table_of(model.eval(), inputs=ZOO[name].inputs()).prune(model, ZOO[name].inputs())


def in_onnxruntime(path: Path, inputs: dict[str, Tensor]) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(str(path))
    return list(session.run(None, {name: x.numpy() for name, x in inputs.items()}))


@pytest.mark.parametrize("name", ["resnet", "mobilenetv2", "vit_block", "heads", "lstm", "tied"])
def test_onnx_runs_in_onnxruntime_at_any_batch(name: str, tmp_path: Path) -> None:
    model = halved(name)
    before = copy.deepcopy(model.state_dict())
    made = autoprune.export(model, ZOO[name].inputs(3), tmp_path / "x.onnx", metadata={"task": name})
    assert set(made.differences) == {1, 3, 7}
    assert max(made.differences.values()) < 1e-4
    assert (made.batch, made.opset, made.precision, made.note) == ("dynamic", 18, "float32", "")
    assert made.inputs == {"input": ("batch", 3, 16, 16)}
    with torch.no_grad():
        for size in (1, 5, 7):
            given = torch.randn(size, 3, 16, 16)
            wanted = model(given)
            wanted = list(wanted.values()) if isinstance(wanted, dict) else [wanted]
            for found, answer in zip(in_onnxruntime(made.path, {"input": given}), wanted, strict=True):
                np.testing.assert_allclose(found, answer.numpy(), atol=1e-4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    file = onnx.load(made.path)
    said = {entry.key: entry.value for entry in file.metadata_props}
    assert (said["task"], said["autoprune"], said["precision"]) == (name, autoprune.__version__, "float32")
    assert json.loads(said["inputs"]) == {"input": ["batch", 3, 16, 16]}
    assert float(said["params"]) == made.params == sum(p.numel() for p in model.parameters())


def test_outputs_have_the_names_that_the_network_gives_them(tmp_path: Path) -> None:
    made = autoprune.export(halved("tied"), ZOO["tied"].inputs(), tmp_path / "x.onnx")
    assert made.outputs == {"logits": ("batch", 9, 20), "length": ("batch", 9)}
    assert [output.name for output in onnx.load(made.path).graph.output] == ["logits", "length"]


@pytest.mark.parametrize(("format", "suffix"), [("torch", "pt2"), ("safetensors", "safetensors")])
def test_other_formats_give_the_same_numbers_when_they_are_loaded_again(
    format: str, suffix: str, tmp_path: Path
) -> None:
    model, given = halved("resnet"), torch.randn(5, 3, 16, 16)
    path = tmp_path / f"x.{suffix}"
    made = autoprune.export(model, ZOO["resnet"].inputs(), path, format=format, metadata={"task": "mine"})
    assert (made.differences, made.opset) == ({1: 0.0, 7: 0.0}, None)
    again: Any = copy.deepcopy(model)
    if format == "torch":
        extra = {"autoprune.json": ""}
        again = torch.export.load(path, extra_files=extra).module()
        said = json.loads(extra["autoprune.json"])
    else:
        for parameter in again.parameters():
            nn.init.zeros_(parameter)
        safetensors.torch.load_model(again, path)
        with safetensors.safe_open(path, "pt") as file:
            said = file.metadata()
    assert (said["task"], said["autoprune"]) == ("mine", autoprune.__version__)
    with torch.no_grad():
        assert torch.equal(again(given), model(given))


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_network_that_is_called_by_keywords_keeps_their_names(format: str, tmp_path: Path) -> None:
    model, inputs = Named(), {"other": torch.randn(2, 4), "one": torch.randn(2, 6)}
    adapted = positional(model, tuple(inputs))
    smaller = table_of(adapted, inputs=tuple(inputs.values())).prune(model, inputs)
    made = autoprune.export(smaller, inputs, tmp_path / f"x{exporting.SUFFIXES[format]}", format=format)
    assert made.inputs == {"other": ("batch", 4), "one": ("batch", 6)}
    assert set(made.differences) == {1, 2, 7}
    with torch.no_grad():
        if format == "onnx":
            (found,) = in_onnxruntime(made.path, inputs)
            np.testing.assert_allclose(found, smaller(**inputs).numpy(), atol=1e-5)
        else:
            assert torch.equal(torch.export.load(made.path).module()(**inputs), smaller(**inputs))


def test_masked_weights_are_zeros_in_the_file_and_masks_in_the_network(tmp_path: Path) -> None:
    model = Plain().eval()
    prune.l1_unstructured(model.get_submodule("1.0"), "weight", 0.75)
    inputs = (torch.randn(2, 3, 16, 16),)
    model(*inputs)  # makes of the weight a tensor that cannot be copied
    made = autoprune.export(model, inputs, tmp_path / "x.onnx")
    tensors = [onnx.numpy_helper.to_array(t) for t in onnx.load(made.path).graph.initializer]
    assert float(np.mean(next(t for t in tensors if t.shape == (12, 8, 3, 3)) == 0)) == 0.75
    program = torch.export.load(autoprune.export(model, inputs, tmp_path / "x.pt2", format="torch").path)
    assert float((program.state_dict["1.0.weight"] == 0).float().mean()) == 0.75
    assert not [name for name in program.state_dict if "mask" in name]
    assert prune.is_pruned(model)


class Baked(nn.Module):
    """A number of its code's own is as large as the batch: what traces it makes a constant of that."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * len(x)  # type: ignore[no-any-return]


class Two(Plain):
    """Of pairs alone."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x.view(2, 5) * 2


def test_a_number_that_was_made_a_constant_is_found_and_the_batch_fixed(tmp_path: Path) -> None:
    made = autoprune.export(Baked().eval(), (torch.randn(2, 3, 16, 16),), tmp_path / "x.onnx")
    assert (made.batch, set(made.differences)) == ("fixed", {2})
    assert made.relative < 1e-5
    assert made.note


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_network_of_one_batch_alone_is_exported_with_it_and_the_reason(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{exporting.SUFFIXES[format]}"
    made = autoprune.export(Two().eval(), (torch.randn(2, 3, 16, 16),), path, format=format)
    assert (made.batch, set(made.differences)) == ("fixed", {2})
    assert "does not run at another batch than the example's: RuntimeError: shape '[2, 5]' is invalid" in made.note
    assert made.inputs == {"input": (2, 3, 16, 16)}


class Unread(nn.Linear):
    """Takes a mask, and heeds it or not."""

    def __init__(self, *, heeds: bool) -> None:
        super().__init__(4, 3)
        self.heeds = heeds

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * mask if self.heeds and not bool(mask.all()) else x)


def test_an_input_that_the_file_lost_is_not_said_to_be_taken(tmp_path: Path) -> None:
    inputs, path = {"x": torch.randn(2, 4), "mask": torch.ones(2, 4)}, tmp_path / "x.onnx"
    made = autoprune.export(Unread(heeds=False), inputs, path)
    file = onnx.load(path)
    assert [entry.name for entry in file.graph.input] == list(made.inputs) == ["x"]
    said = {entry.key: entry.value for entry in file.metadata_props}
    assert json.loads(said["inputs"]) == {"x": ["batch", 4]}
    path.unlink()
    with pytest.raises(MismatchError, match="does not read mask, by which the network's output changes"):
        autoprune.export(Unread(heeds=True), inputs, path)
    assert not path.exists()


class Attending(nn.MultiheadAttention):
    """Examples [N, 5, 8] beside one mask [5, 5] for all."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, attn_mask=mask)[0]


@pytest.mark.parametrize("format", ["onnx", "torch", "safetensors"])
def test_an_input_that_is_no_batch_is_kept_as_it_is_and_the_batch_fixed(format: str, tmp_path: Path) -> None:
    inputs = torch.randn(2, 5, 8), torch.zeros(5, 5)
    path = tmp_path / f"x{exporting.SUFFIXES[format]}"
    made = autoprune.export(Attending(8, 2, batch_first=True).eval(), inputs, path, format=format)
    assert (made.batch, set(made.differences)) == ("fixed", {2})
    assert made.note == "the first dimensions of its inputs are 2 and 5, not those of one batch"
    assert made.inputs == {"input_0": (2, 5, 8), "input_1": (5, 5)}


def test_nothing_is_said_of_an_exporter_that_another_stood_in_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = wire.onnx_of

    def capturing(*given: Any, **named: Any) -> bytes:
        if named["exporter"] == "tracing":
            raise wire.NotExportedError("not traced")
        return right(*given, **named)

    monkeypatch.setattr(wire, "onnx_of", capturing)
    made = autoprune.export(nn.Linear(4, 3), (torch.randn(2, 4),), tmp_path / "x.onnx")
    assert (made.batch, made.note) == ("dynamic", "")


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, right = tmp_path / "x.onnx", wire.onnx_of
    path.write_text("what was there")

    def wrong(model: nn.Module, *given: Any, **named: Any) -> bytes:
        with torch.no_grad():
            next(model.parameters())[0] += 0.05
        return right(model, *given, **named)

    monkeypatch.setattr(wire, "onnx_of", wrong)
    with pytest.raises(MismatchError, match=r"computes something else in onnxruntime .* at a batch of 2.*0.0001"):
        autoprune.export(Plain().eval(), (torch.randn(2, 3, 16, 16),), path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x.onnx", "what was there")]


def test_a_full_disk_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(StorageError, match=r"the disk is full: .*x\.pt2 cannot be written"):
        autoprune.export(Plain().eval(), (torch.randn(2, 3, 16, 16),), tmp_path / "x.pt2", format="torch")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", [13, 21])
def test_the_opset_is_the_one_that_is_asked_for(opset: int, tmp_path: Path) -> None:
    made = autoprune.export(Plain().eval(), (torch.randn(2, 3, 16, 16),), tmp_path / "x.onnx", opset=opset)
    file = onnx.load(made.path)
    assert [entry.version for entry in file.opset_import if not entry.domain] == [made.opset] == [opset]
    for value in (*file.graph.input, *file.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param, f"{value.name} has a batch of its own"


def test_outputs_are_compared_each_by_its_own_size() -> None:
    one, nan, inf = torch.tensor([2.0, -4.0]), torch.tensor([float("nan")]), torch.tensor([float("inf")])
    assert exporting._gap([one + 1], [one]) == (1.0, 0.25)
    assert exporting._gap([one, one / 100], [one, one / 200]) == pytest.approx((0.02, 1.0))
    assert exporting._gap([nan, inf], [nan, inf]) == (0.0, 0.0)
    for found, wanted in ((nan, one[:1]), (one[:1], nan), (one, one[:1]), (inf, -inf)):
        assert exporting._gap([found], [wanted])[1] == np.inf
    assert exporting._gap([], [one]) == (np.inf, np.inf)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"format": "tflite"}, "format must be one of onnx, torch, safetensors, got format=tflite"),
        ({"batch": "any"}, "batch must be dynamic or fixed, got batch=any"),
        ({"opset": 5}, "11 <= opset <= 23 must hold, got opset=5"),
        ({"path": "x.pt"}, r"output must be a file \*.onnx in a folder that there is, got x.pt"),
        ({"path": "nowhere/x.onnx"}, "in a folder that there is"),
        ({"inputs": (torch.tensor(1.0),)}, "every input must be a tensor whose first dimension is the batch"),
    ],
)
def test_wrong_settings_are_one_clear_line(settings: dict[str, Any], says: str) -> None:
    given = {"path": "x.onnx", "inputs": (torch.randn(1, 3, 16, 16),), **settings}
    with pytest.raises(InputError, match=says):
        autoprune.export(Plain(), given.pop("inputs"), given.pop("path"), **given)


def make_plain(channels: int = 3) -> autoprune.Task:
    """A task of which nothing but the model and its inputs is needed."""
    with seeded(0):
        model, images = Plain().eval(), torch.randn(2, channels, 16, 16)
    metric = MulticlassAccuracy(num_classes=5)
    split = [(images, torch.zeros(2, dtype=torch.long))]
    return autoprune.Task(
        name="plain", model=model, inputs=(images,), train=split, search=split, test=split,
        loss=nn.functional.cross_entropy, metric=metric, lr=0.1,
    )  # fmt: skip


def run_of(folder: Path, *, device: Any = "cpu") -> nn.Module:
    """The folder of a run that pruned the plain task's network to about half its widths; and that network."""
    task = make_plain()
    table = table_of(task.model, inputs=task.inputs)
    model = table.prune(task.model, task.inputs)
    table.save(folder / "ratios.yaml")
    safetensors.torch.save_model(model, str(folder / "pruned.safetensors"))
    values = {"task": {"_target_": "test_exporting.make_plain"}, "device": device, "seed": 0}
    (folder / "config.yaml").write_text(json.dumps(values))
    return model


def test_a_run_is_exported_from_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, given = run_of(tmp_path).eval(), torch.randn(7, 3, 16, 16)
    for words in (
        ["format=onnx"],
        ["format=safetensors", "output=weights.safetensors"],
        ["format=torch", "batch=fixed"],
    ):
        assert cli.main(["export", str(tmp_path), *words]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert f"file:  {tmp_path}/exported.onnx  (" in shown
    assert "ONNX opset 18, float32, batch dynamic" in shown
    assert "takes: input [batch, 3, 16, 16]; gives output [batch, 5]; " in shown
    assert "takes: input [2, 3, 16, 16]; gives output [2, 5]; " in shown
    assert "apart from PyTorch by at most 0 at a batch of 1, 0 at a batch of 2, 0 at a batch of 7" in shown
    with torch.no_grad():
        (found,) = in_onnxruntime(tmp_path / "exported.onnx", {"input": given})
        np.testing.assert_allclose(found, model(given).numpy(), atol=1e-4)
        again = RatioTable.load("ratios.yaml").rebuild(Plain(), (given,), "weights.safetensors")
        assert torch.equal(again.eval()(given), model(given))
        assert torch.equal(torch.export.load("exported.pt2").module()(given[:2]), model(given[:2]))
    said = {entry.key: entry.value for entry in onnx.load("exported.onnx").metadata_props}
    assert said["task"] == "plain"
    assert json.loads(said["budgets"]) == [{"budget": "flops_50pct", "met": True}]


def test_the_command_ends_with_1_and_the_figures_where_the_file_is_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_of(tmp_path, device={"_target_": "autoprune.meters.device.Device"})
    right = exporting._gap
    monkeypatch.setattr(exporting, "_gap", lambda found, wanted: right([f + 0.1 for f in found], wanted))
    assert cli.main(["export", str(tmp_path), "batch=fixed"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("autoprune: the onnx file computes something else in onnxruntime")
    assert "it differs by 0.1 at a batch of 2" in err
    assert not list(tmp_path.glob("exported*"))


def test_the_default_task_is_exported_to_onnx(tmp_path: Path) -> None:
    task = make_task(data="shipped")
    table = table_of(task.model, inputs=task.inputs)
    model, given = table.prune(task.model, task.inputs), first(task.test, 1)[0][0][:9]
    made = autoprune.export(model, task.inputs, tmp_path / "x.onnx")
    assert set(made.differences) == {1, 7, 44}
    assert max(made.differences.values()) < 1e-4
    with torch.no_grad():
        (found,) = in_onnxruntime(made.path, {"input": given})
        np.testing.assert_allclose(found, model.eval()(given).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "export takes the folder of a finished run first"),
        ("format=onnx", "export takes the folder of a finished run first"),
        ("nowhere", "nowhere is not the folder of a search"),
        (". format=tflite", "format must be one of onnx, torch, safetensors"),
        (". output=5", "output must be a path, got 5"),
        (". output=x.bin", "output must be a file *.onnx"),
        (". opset=many", "opset must be a whole number"),
        (". fromat=onnx", "did you mean 'format'?"),
    ],
)
def test_wrong_words_end_with_2(words: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if "x.bin" in words:
        run_of(tmp_path)
    assert cli.main(["export", *words.split()]) == 2
    assert says in capsys.readouterr().err


def test_weights_that_do_not_fit_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run_of(tmp_path)
    safetensors.torch.save_model(Plain(), str(tmp_path / "pruned.safetensors"))
    assert cli.main(["export", str(tmp_path)]) == 2
    assert "does not hold the weights of this pruned network" in capsys.readouterr().err
    (tmp_path / "ratios.yaml").unlink()
    assert cli.main(["export", str(tmp_path)]) == 2
    assert "ratios.yaml: No such file" in capsys.readouterr().err


def test_without_onnxruntime_the_line_to_install_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"onnxruntime is not installed: pip install 'autoprune\[onnxruntime\]'"):
        autoprune.export(Plain(), (torch.randn(1, 3, 16, 16),), "x.onnx")
