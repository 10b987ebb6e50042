"""Describe modules as plain data that JSON can hold, and build them again, empty, from such data alone.

Knows the modules that compressing and deploying put into a network: factorised layers, and torch's own convolution,
linear layer, identity, flatten, unflatten and sequences of them. Data from a file is checked before anything is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ..compress import CONVOLUTIONS, TRANSPOSED, Geometry, HTLayer

LARGEST = 2**24
"""Upper limit of every size in a description; a layer of a CNN stays far below it."""

LARGEST_STEP = 1024
"""Upper limit of strides, paddings and dilations: a wider one would make of any image a map that fills the memory."""

LONGEST = 8
"""Most modules in a sequence: four stages, and what goes between them."""

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

Spec = dict[str, Any]


def differences(
    model: nn.Module, skeleton: nn.Module, name: str = "", *, plain_settings: bool = True
) -> dict[str, Spec]:
    """Dotted name -> description of every module of ``model`` that is not as in ``skeleton``; both stay as they are.

    plain_settings: compare the plain values that modules keep, too.

    Raises:
        ValueError: a module that is neither as in the skeleton nor of a kind that can be described, or one whose
            settings differ.
    """
    children, expected = dict(model.named_children()), dict(skeleton.named_children())
    alike = type(model) is type(skeleton) and model.extra_repr() == skeleton.extra_repr()
    if not alike or list(children) != list(expected):
        return {name: describe(model, name)}
    for setting, value in _settings(skeleton).items() if plain_settings else ():
        if _settings(model).get(setting) != value:
            found = _settings(model).get(setting)
            raise ValueError(f"{_place(name)} has {setting}={found!r}, the architecture has {value!r}")
    found = {}
    for child, module in children.items():
        place = f"{name}.{child}" if name else child
        found |= differences(module, expected[child], place, plain_settings=plain_settings)
    return found


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain values that a module keeps, such as googlenet's transform_input."""
    values = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
    return {key: value for key, value in values.items() if key != "training"}


def _place(name: str) -> str:
    return f"module {name!r}" if name else "the network"


def describe(module: nn.Module, name: str) -> Spec:
    """A description of one module, with the sizes of its parameters.

    name: for the message.

    Raises:
        ValueError: not one of the kinds that can be described.
    """
    if type(module) is HTLayer:
        weights = module.weights()
        return {
            "kind": "factorised",
            "plan": module.plan,
            "groups": [list(group) for group in weights],
            "shapes": [list(weight.shape) for weight in weights.values()],
            "bias": module.bias is not None,
            "geometry": {key: value for key, value in asdict(module.geometry).items() if value is not None},
        }
    if type(module) is nn.Sequential:
        return {"kind": "sequence", "modules": [describe(child, name) for child in module]}
    if type(module) in (*CONVOLUTIONS, *TRANSPOSED):
        options = {key: getattr(module, key) for key in ("stride", "padding", "dilation", "groups", "padding_mode")}
        sizes = {"in": module.in_channels, "out": module.out_channels, "kernel": list(module.kernel_size)}
        transposed = type(module) in TRANSPOSED
        options |= {"transposed": True, "output_padding": list(module.output_padding)} if transposed else {}
        return {"kind": "convolution", **sizes, "bias": module.bias is not None, **options}
    if type(module) is nn.Linear:
        sizes = {"in": module.in_features, "out": module.out_features}
        return {"kind": "linear", **sizes, "bias": module.bias is not None}
    if type(module) is nn.Unflatten and module.dim == 1:
        return {"kind": "unflatten", "sizes": list(module.unflattened_size)}
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return {"kind": "flatten"}
    if type(module) is nn.Identity:
        return {"kind": "identity"}
    raise ValueError(
        f"{_place(name)} is a {type(module).__name__}({module.extra_repr()}), which neither the architecture has there "
        "nor compressing or deploying puts there"
    )


def build(spec: Mapping[str, Any]) -> nn.Module:
    """The module described, with meta tensors for parameters: nothing is allocated.

    Raises:
        ValueError: a value that is missing, of the wrong type or out of range; the message says which.
    """
    kind = _field(spec, "kind")
    builders = {
        "factorised": _factorised,
        "sequence": _sequence,
        "convolution": _convolution,
        "linear": _linear,
        "unflatten": lambda s: nn.Unflatten(1, tuple(_sizes(s, "sizes", 3))),
        "flatten": lambda _: nn.Flatten(),
        "identity": lambda _: nn.Identity(),
    }
    if not isinstance(kind, str) or kind not in builders:
        raise ValueError(f"kind must be one of {', '.join(builders)}; got {_short(kind)}")
    with torch.device("meta"):
        return builders[kind](spec)


def _factorised(spec: Mapping[str, Any]) -> HTLayer:
    groups, shapes = _field(spec, "groups"), _field(spec, "shapes")
    lists = isinstance(groups, list) and isinstance(shapes, list) and len(groups) == len(shapes)
    if not lists or not 1 <= len(groups) <= 4 or not all(isinstance(group, list) for group in groups):
        raise ValueError(f"groups and shapes must be lists of one length, up to 4; got {_short(groups)}")
    names = [tuple(str(stage) for stage in group) for group in groups]
    order = 4 if "row" in sum(names, ()) else 2
    geometry = _geometry(_field(spec, "geometry"))
    weights = {}
    for place, group in enumerate(names):
        shape = _sizes({"shapes": shapes[place]}, "shapes", order)
        if order == 4 and geometry.unflatten is None:
            windowless = [size for stage, size in zip(("row", "col"), shape[2:], strict=True) if stage not in group]
            if any(size != 1 for size in windowless):
                raise ValueError(f"the stages {group} cannot have a weight of shape {shape}")
        if shape[0] % geometry.groups:
            raise ValueError(f"the stages {group} have {shape[0]} outputs, no multiple of {geometry.groups} groups")
        weights[group] = torch.empty(shape)
    bias = torch.empty(next(reversed(weights.values())).shape[0]) if _flag(spec, "bias") else None
    return HTLayer(weights, bias, geometry)


def _geometry(spec: Any) -> Geometry:
    if not isinstance(spec, Mapping):
        raise ValueError(f"geometry must be an object; got {_short(spec)}")
    axes = _axes(spec, "stride")
    given = {key: value for key, value in spec.items() if value is not None}
    return Geometry(
        stride=_per_axis(spec, "stride", axes),
        padding=_padding(spec, axes),
        dilation=_per_axis(spec, "dilation", axes),
        padding_mode=_choice(spec, "padding_mode", PADDING_MODES),
        unflatten=tuple(_sizes(spec, "unflatten", 3)) if "unflatten" in given else None,
        linear=_flag(spec, "linear"),
        # Absent in files of earlier versions, which had two axes and no groups.
        groups=_size(spec, "groups") if "groups" in given else 1,
        transposed=_flag(spec, "transposed") if "transposed" in given else False,
        output_padding=_per_axis(spec, "output_padding", axes, 0) if "output_padding" in given else None,
        window=_per_axis(spec, "window", axes) if "window" in given else None,
    )


def _sequence(spec: Mapping[str, Any]) -> nn.Sequential:
    parts = _field(spec, "modules")
    if not isinstance(parts, list) or not 1 <= len(parts) <= LONGEST:
        raise ValueError(f"modules must be a list of 1 to {LONGEST}; got {_short(parts)}")
    if any(isinstance(part, Mapping) and part.get("kind") == "sequence" for part in parts):
        raise ValueError("a sequence cannot hold a sequence")
    return nn.Sequential(*(build(part) for part in parts))


def _convolution(spec: Mapping[str, Any]) -> nn.Module:
    axes = _axes(spec, "kernel")
    transposed = _flag(spec, "transposed") if "transposed" in spec else False
    more = {"output_padding": _per_axis(spec, "output_padding", axes, 0)} if transposed else {}
    return (TRANSPOSED if transposed else CONVOLUTIONS)[axes - 1](
        _size(spec, "in"),
        _size(spec, "out"),
        _per_axis(spec, "kernel", axes),
        stride=_per_axis(spec, "stride", axes),
        padding=_padding(spec, axes),
        dilation=_per_axis(spec, "dilation", axes),
        groups=_size(spec, "groups"),
        bias=_flag(spec, "bias"),
        padding_mode=_choice(spec, "padding_mode", PADDING_MODES),
        **more,
    )


def _linear(spec: Mapping[str, Any]) -> nn.Linear:
    return nn.Linear(_size(spec, "in"), _size(spec, "out"), bias=_flag(spec, "bias"))


def _field(spec: Any, key: str) -> Any:
    if not isinstance(spec, Mapping) or key not in spec:
        raise ValueError(f"{key!r} is missing in {_short(spec)}")
    return spec[key]


def _size(spec: Mapping[str, Any], key: str, lowest: int = 1, most: int = LARGEST) -> int:
    value = _field(spec, key)
    if type(value) is not int or not lowest <= value <= most:
        raise ValueError(f"{key} must be a whole number in {lowest}..{most}; got {_short(value)}")
    return value


def _sizes(spec: Mapping[str, Any], key: str, count: int, lowest: int = 1, most: int = LARGEST) -> list[int]:
    values = _field(spec, key)
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise ValueError(f"{key} must be a list of {count} whole numbers; got {_short(values)}")
    return [_size({key: value}, key, lowest, most) for value in values]


def _axes(spec: Mapping[str, Any], key: str) -> int:
    """How many axes a convolution has, by the length of one of its settings."""
    values = _field(spec, key)
    if not isinstance(values, (list, tuple)) or len(values) not in (1, 2, 3):
        raise ValueError(f"{key} must be a list of 1 to 3 whole numbers; got {_short(values)}")
    return len(values)


def _per_axis(spec: Mapping[str, Any], key: str, axes: int, lowest: int = 1) -> tuple[int, ...]:
    return tuple(_sizes(spec, key, axes, lowest, LARGEST_STEP))


def _padding(spec: Mapping[str, Any], axes: int) -> tuple[int, ...] | str:
    value = _field(spec, "padding")
    if isinstance(value, str):
        return _choice(spec, "padding", ("same", "valid"))
    return _per_axis(spec, "padding", axes, 0)


def _choice(spec: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    value = _field(spec, key)
    if value not in allowed:
        raise ValueError(f"{key} must be one of {', '.join(allowed)}; got {_short(value)}")
    return value


def _flag(spec: Mapping[str, Any], key: str) -> bool:
    value = _field(spec, key)
    if type(value) is not bool:
        raise ValueError(f"{key} must be true or false; got {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
