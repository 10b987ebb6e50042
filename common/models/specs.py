"""Describe modules as plain data that JSON can hold, and build them again, empty, from such data alone.

Knows the modules that compressing and deploying put into a network: factorised layers, and torch's own convolution,
linear layer, identity, flatten, unflatten and sequences of them. Data from a file is checked before anything is built.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import nn

from ..checked import said
from ..compress import CONVOLUTIONS, STAGES, TRANSPOSED, Geometry, HTLayer

LARGEST = 2**24
"""Upper limit of every size in a description; a layer of a CNN stays far below it."""

LARGEST_STEP = 1024
"""Upper limit of strides, paddings and dilations: a wider one would make of any image a map that fills the memory."""

LONGEST = 8
"""Most modules in a sequence: four stages, and what goes between them."""

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
    """A description of one module, with the sizes of its parameters, as JSON would give it back.

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
            "geometry": {key: _listed(value) for key, value in asdict(module.geometry).items() if value is not None},
        }
    if type(module) is nn.Sequential:
        return {"kind": "sequence", "modules": [describe(child, name) for child in module]}
    if type(module) in (*CONVOLUTIONS, *TRANSPOSED):
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        options = {key: _listed(getattr(module, key)) for key in names}
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


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def build(spec: Any) -> nn.Module:
    """The module described, with meta tensors for parameters: nothing is allocated.

    Raises:
        ValueError: a value that is missing, of the wrong type or out of range; the message says which.
    """
    problem = None
    try:
        part = _PART.validate_python(spec)
    except ValidationError as error:
        problem = said(error)
    if problem is not None:
        raise ValueError(f"its description {problem}")
    with torch.device("meta"):
        return part.build()


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


Size = Annotated[int, Field(ge=1, le=LARGEST)]
Step = Annotated[int, Field(ge=1, le=LARGEST_STEP)]
Width = Annotated[int, Field(ge=0, le=LARGEST_STEP)]
Steps = Annotated[list[Step], Field(min_length=1, max_length=3)]
Widths = Annotated[list[Width], Field(min_length=1, max_length=3)]
Padding = Literal["same", "valid"] | Widths
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def _same_axes(*settings: Any) -> None:
    """Raise ValueError unless all lists among the settings are of one length: an entry per axis."""
    lengths = {len(values) for values in settings if isinstance(values, list)}
    if len(lengths) > 1:
        raise ValueError(f"its settings are for windows of {' and of '.join(map(str, sorted(lengths)))} axes")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class _Geometry(_Strict):
    """See `Geometry`; what files of earlier versions do not have is as it was then: two axes, no groups."""

    stride: Steps
    padding: Padding
    dilation: Steps
    padding_mode: PaddingMode
    unflatten: Annotated[list[Size], Field(min_length=3, max_length=3)] | None = None
    linear: bool
    groups: Size = 1
    transposed: bool = False
    output_padding: Widths | None = None
    window: Steps | None = None

    def build(self) -> Geometry:
        _same_axes(self.stride, self.padding, self.dilation, self.output_padding, self.window)
        return Geometry(**{name: _plain(getattr(self, name)) for name in type(self).model_fields})


class _Factorised(_Strict):
    kind: Literal["factorised"]
    groups: Annotated[list[list[str]], Field(min_length=1, max_length=len(STAGES))]
    shapes: Annotated[list[list[Size]], Field(min_length=1, max_length=len(STAGES))]
    bias: bool
    geometry: _Geometry

    def build(self) -> HTLayer:
        if len(self.groups) != len(self.shapes):
            raise ValueError(f"groups and shapes must be of one length; got {len(self.groups)} and {len(self.shapes)}")
        names = [tuple(group) for group in self.groups]
        geometry = self.geometry.build()
        order = 4 if "row" in sum(names, ()) else 2
        for group, shape in zip(names, self.shapes, strict=True):
            if len(shape) != order:
                raise ValueError(f"the stages {group} must have a weight of {order} axes; got {shape}")
            outside = [size for stage, size in zip(("row", "col"), shape[2:], strict=False) if stage not in group]
            if geometry.unflatten is None and any(size != 1 for size in outside):
                raise ValueError(f"the stages {group} cannot have a weight of shape {shape}")
            if shape[0] % geometry.groups:
                raise ValueError(f"the stages {group} have {shape[0]} outputs, no multiple of {geometry.groups} groups")
        weights = {group: torch.empty(shape) for group, shape in zip(names, self.shapes, strict=True)}
        return HTLayer(weights, torch.empty(self.shapes[-1][0]) if self.bias else None, geometry)


class _Convolution(_Strict):
    kind: Literal["convolution"]
    inputs: Annotated[Size, Field(alias="in")]
    outputs: Annotated[Size, Field(alias="out")]
    kernel: Steps
    stride: Steps
    padding: Padding
    dilation: Steps
    groups: Size
    bias: bool
    padding_mode: PaddingMode
    transposed: bool = False
    output_padding: Widths | None = None

    def build(self) -> nn.Module:
        _same_axes(self.kernel, self.stride, self.padding, self.dilation, self.output_padding)
        names = ("stride", "padding", "dilation", "groups", "bias", "padding_mode")
        options = {name: _plain(getattr(self, name)) for name in names}
        if self.transposed:
            options["output_padding"] = tuple(self.output_padding or [0] * len(self.kernel))
        kind = (TRANSPOSED if self.transposed else CONVOLUTIONS)[len(self.kernel) - 1]
        return kind(self.inputs, self.outputs, tuple(self.kernel), **options)


class _Linear(_Strict):
    kind: Literal["linear"]
    inputs: Annotated[Size, Field(alias="in")]
    outputs: Annotated[Size, Field(alias="out")]
    bias: bool

    def build(self) -> nn.Linear:
        return nn.Linear(self.inputs, self.outputs, bias=self.bias)


class _Unflatten(_Strict):
    kind: Literal["unflatten"]
    sizes: Annotated[list[Size], Field(min_length=3, max_length=3)]

    def build(self) -> nn.Unflatten:
        return nn.Unflatten(1, tuple(self.sizes))


class _Flatten(_Strict):
    kind: Literal["flatten"]

    def build(self) -> nn.Flatten:
        return nn.Flatten()


class _Identity(_Strict):
    kind: Literal["identity"]

    def build(self) -> nn.Identity:
        return nn.Identity()


_One = _Factorised | _Convolution | _Linear | _Unflatten | _Flatten | _Identity


class _Sequence(_Strict):
    """Modules in a row; a sequence cannot hold a sequence."""

    kind: Literal["sequence"]
    modules: Annotated[list[Annotated[_One, Field(discriminator="kind")]], Field(min_length=1, max_length=LONGEST)]

    def build(self) -> nn.Sequential:
        return nn.Sequential(*(part.build() for part in self.modules))


_PART: TypeAdapter[Any] = TypeAdapter(Annotated[_One | _Sequence, Field(discriminator="kind")])
