"""Residual blocks that can be left out: what they are, and where a model has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.borrowing import arguments
from autoprune.traced import all_names, tensors_of

FAR = 1000.0  # times an input: a block that ends in a bound hands on what lies within it


def skippable(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[str]:
    """Residual blocks, by name: the innermost modules that run once, turn one tensor into another of its shape, and
    hand it on as it is where all that they hold is zero. The model is left as it was."""
    seen: dict[str, list[tuple[object, object]]] = {}

    def watching(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...], named: Mapping[str, object], output: object) -> None:
            given = args[0] if args else None
            seen.setdefault(name, []).append((given.clone() if isinstance(given, Tensor) else None, output))

        return hook

    modules = ((name, m) for name, m in model.named_modules() if name and not isinstance(m, torch.jit.ScriptModule))
    inner = ((name, m) for name, m in modules if any(True for _ in m.children()))
    names = all_names(model)
    holding = {name: m for name, m in inner if _owns(name, [names[id(p)] for p in m.parameters()])}
    hooks = [m.register_forward_hook(watching(name), with_kwargs=True) for name, m in holding.items()]
    try:
        with torch.no_grad():
            model(*arguments(inputs))
            alike = [name for name, calls in seen.items() if len(calls) == 1 and _of_one_shape(*calls[0])]
            found = []
            for name in alike:
                held = [(tensor, tensor.clone()) for _, tensor in tensors_of(holding[name])]
                seen.clear()
                try:
                    for tensor, _ in held:
                        tensor.zero_()
                    model(*arguments(inputs))
                    ((given, output),) = seen[name]
                    if isinstance(given, Tensor) and isinstance(output, Tensor) and torch.equal(given, output):
                        large = FAR * given
                        if torch.equal(holding[name](large.clone()), large):
                            found.append(name)
                except Exception:  # noqa: BLE001, foreign code on weights that are all zero
                    continue
                finally:
                    for tensor, values in held:
                        tensor.copy_(values)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]


def _owns(block: str, parameters: Sequence[Sequence[str]]) -> bool:
    """Whether a module has parameters, and all of them for itself."""
    return bool(parameters) and all(name.startswith(f"{block}.") for names in parameters for name in names)


def _of_one_shape(given: object, output: object) -> bool:
    return isinstance(given, Tensor) and isinstance(output, Tensor) and given.shape == output.shape
