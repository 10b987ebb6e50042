"""Files of compressed networks: what was saved comes back bit for bit; anything else is refused in one line."""

import json
import random

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.compress import Geometry, HTLayer, factorize
from common.deploy import deploy
from common.models import CheckpointError, build_model, load_compressed, save_checkpoint, save_compressed
from common.modules import copy_with
from common.ranks import uniform

SIZES = {"resnet18": 32, "alexnet": 64, "squeezenet1_1": 64, "googlenet": 32, "densenet121": 32}


def compress(architecture, fraction=0.1, layers="all"):
    size = SIZES[architecture]
    model = build_model(architecture, 4, seed=0).eval()
    factors = factorize(model, input_shape=(3, size, size), layers=layers)
    config = uniform(factors, fraction)
    return factors.compress(config).eval(), config


def images(architecture, count=2):
    size = SIZES[architecture]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def same_outputs(first, second, x):
    with torch.no_grad():
        return torch.equal(first.eval()(x), second.eval()(x))


def with_random_plans(model, seed):
    draw = random.Random(seed)
    layers = [module for module in model.modules() if isinstance(module, HTLayer)]
    return copy_with(model, {layer: layer.with_plan(draw.choice(layer.plans)) for layer in layers})


@pytest.fixture(scope="module")
def resnet():
    return compress("resnet18", layers="convs")


@pytest.fixture
def saved(resnet, tmp_path):
    model, config = resnet
    path = tmp_path / "model.safetensors"
    metadata = {"accuracy": 0.5, "provenance": {"seed": 3}}
    save_compressed(model, path, architecture="resnet", num_classes=4, image_size=32, config=config, metadata=metadata)
    return path


def test_loads_what_was_saved(resnet, saved):
    model, config = resnet
    loaded, info = load_compressed(saved)
    assert same_outputs(model, loaded, images("resnet18"))
    assert not any(module.training for module in loaded.modules())
    assert info == {
        "architecture": "resnet18",
        "num_classes": 4,
        "input_shape": (3, 32, 32),
        "config": config,
        "plans": {name: model.get_submodule(name).plan for name in config},
        "metadata": {"accuracy": 0.5, "provenance": {"seed": 3}},
    }
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("seed", range(4))
def test_every_mix_of_plans_comes_back(resnet, tmp_path, seed):
    model = with_random_plans(resnet[0], seed)
    save_compressed(model, tmp_path / "m.safetensors", architecture="resnet18", num_classes=4, image_size=32)
    loaded, info = load_compressed(tmp_path / "m.safetensors")
    assert same_outputs(model, loaded, images("resnet18"))
    assert set(info["plans"].values()) > {"pair"}
    assert info["plans"] == {name: m.plan for name, m in model.named_modules() if isinstance(m, HTLayer)}


@pytest.mark.parametrize("architecture", SIZES)
@pytest.mark.parametrize("deployed", [False, True])
def test_architectures_come_back_compressed_and_deployed(architecture, deployed, tmp_path):
    model, config = compress(architecture, layers="convs" if architecture == "alexnet" else "all")
    x = images(architecture)
    if deployed:
        model = deploy(model, x, plans="flops", rounds=1).model
    path = tmp_path / "m.safetensors"
    size = SIZES[architecture]
    save_compressed(model, path, architecture=architecture, num_classes=4, image_size=size, config=config)
    loaded, info = load_compressed(path)
    assert same_outputs(model, loaded, x)
    assert info["config"] == config


def alexnet_with_small_classifier():
    """AlexNet whose linear layers, 54 of its 57 million parameters, are factorised, the first behind its flatten."""
    model = build_model("alexnet", 4, seed=0).eval()
    generator = torch.Generator().manual_seed(0)

    def layer(shapes, bias, geometry):
        weights = {group: torch.randn(shape, generator=generator) / shape[1] for group, shape in shapes.items()}
        return HTLayer(weights, torch.zeros(bias), geometry).eval()

    behind_flatten = {("in", "row"): (3, 256, 6, 1), ("col",): (5, 3, 1, 6), ("out",): (4096, 5, 1, 1)}
    replaced = {
        model.classifier[1]: layer(behind_flatten, 4096, Geometry(linear=True, unflatten=(256, 6, 6))),
        model.classifier[4]: layer({("in",): (3, 4096), ("out",): (4096, 3)}, 4096, Geometry(linear=True)),
    }
    return copy_with(model, replaced)


def test_linear_layers_come_back(tmp_path):
    model, x = alexnet_with_small_classifier(), images("alexnet")
    for variant in (model, deploy(model, x, plans="keep", rounds=1).model):
        save_compressed(variant, tmp_path / "m.st", architecture="alexnet", num_classes=4, image_size=64)
        assert same_outputs(variant, load_compressed(tmp_path / "m.st")[0], x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_come_back(resnet, dtype, tmp_path):
    model = copy_with(resnet[0], {}).to(dtype)
    save_compressed(model, tmp_path / "m.st", architecture="resnet18", num_classes=4, image_size=32)
    loaded, _ = load_compressed(tmp_path / "m.st")
    assert next(loaded.parameters()).dtype == dtype
    assert same_outputs(model, loaded, images("resnet18").to(dtype))


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that was really allocated."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self.nbytes = max(self.nbytes, leaf.nbytes)
        return result


def test_loading_never_allocates_the_dense_network(tmp_path):
    model = alexnet_with_small_classifier()
    save_compressed(model, tmp_path / "m.st", architecture="alexnet", num_classes=4, image_size=64)
    largest_saved = max(tensor.nbytes for tensor in model.state_dict().values())
    with LargestTensor() as largest:
        load_compressed(tmp_path / "m.st")
    assert largest.nbytes == largest_saved < 4 * 4096 * 4096 / 10


# --- what is refused --------------------------------------------------------------------------------------------------


def rewrite(path, *, header=None, tensors=None):
    """Change a file's header fields (by a function of the decoded value) or tensors (None removes)."""
    with safetensors.safe_open(path, framework="pt") as file:
        fields = dict(file.metadata())
        state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    for name, change in (header or {}).items():
        if change is None:
            del fields[name]
        elif isinstance(change, str):
            fields[name] = change
        else:
            fields[name] = json.dumps(change(json.loads(fields[name])))
    for name, tensor in (tensors or {}).items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    safetensors.torch.save_file(state, path, metadata=fields)


def in_module(name, **values):
    """A change of one module's description."""
    return lambda modules: {**modules, name: {**modules[name], **values}}


CONV = "layer1.0.conv1"
HUGE = 10**15

BAD_HEADERS = {
    "a dense checkpoint's format": ({"format": "htd-dense-1"}, "format 'htd-compressed-1' was expected"),
    "a later format": ({"format": "htd-compressed-2"}, "'htd-compressed-2' found"),
    "no architecture": ({"architecture": None}, "its header has no architecture"),
    "no modules": ({"modules": None}, "its header has no modules"),
    "unknown architecture": ({"architecture": "resnet19"}, "unknown model 'resnet19'"),
    "another architecture": ({"architecture": "resnet34"}, "tensor 'layer1.2.bn1.bias' should be"),
    "broken JSON": ({"modules": "{"}, "Expecting property name"),
    "nested JSON": ({"metadata": "[" * 100_000}, "nested too deeply"),
    "a list for an object": ({"modules": lambda _: []}, r"its header has modules \[\]: should be a valid dictionary"),
    "a text for a number": ({"num_classes": lambda _: "4"}, "num_classes '4': should be a valid integer"),
    "other classes": ({"num_classes": lambda _: 5}, "no tensor has an entry for each of its 5 classes"),
    "negative classes": ({"num_classes": lambda _: -1}, "num_classes -1: should be greater"),
    "huge images": ({"input_shape": lambda _: [3, HUGE, HUGE]}, "input_shape.1 .*less than or equal"),
    "tiny images of other channels": ({"input_shape": lambda _: [1, 32, 32]}, "modules do not fit together"),
    "layouts that are no names": ({"channels_last": lambda _: [[1]]}, "channels_last.0"),
    "ranks that are texts": ({"config": lambda _: {CONV: {"rank": "8"}}}, f"config.{CONV}"),
    "ranks of other names": ({"config": lambda _: {CONV: {"r": 8}}}, f"config.{CONV}"),
    "a module that is not there": ({"modules": lambda m: {**m, "layer9": m[CONV]}}, "resnet18 has no module 'layer9'"),
    "the whole network": ({"modules": lambda m: {"": {"kind": "identity"}}}, "not a resnet18 as a whole"),
    "a module that is text": (
        {"modules": lambda m: {**m, CONV: "x"}},
        f"module '{CONV}' cannot be built: its description",
    ),
    "unknown kind": ({"modules": in_module(CONV, kind="pickle")}, "pickle.* expected tags: 'factorised'"),
    "kind that is a list": ({"modules": in_module(CONV, kind=[1])}, "expected tags"),
    "unknown stages": ({"modules": in_module(CONV, groups=[["in"], ["up"]], shapes=[[1, 1]] * 2)}, "no execution plan"),
    "stages that are numbers": ({"modules": in_module(CONV, groups=3)}, "groups 3: should be a valid list"),
    "too few shapes": ({"modules": in_module(CONV, shapes=[])}, "shapes .*at least 1 item"),
    "huge shapes": (
        {"modules": in_module(CONV, shapes=[[HUGE, HUGE, 1, 1]] * 4)},
        "should be less than or equal to 16777216",
    ),
    "overflowing shapes": ({"modules": in_module(CONV, shapes=[[2**24] * 4] * 4)}, f"'{CONV}' cannot be built"),
    "negative shapes": ({"modules": in_module(CONV, shapes=[[-1, 1, 1, 1]] * 4)}, "greater than or equal to 1"),
    "broken numbers": ({"modules": in_module(CONV, shapes=[[1.5, 1, 1, 1]] * 4)}, "1.5: should be a valid integer"),
    "another rank": (
        {"modules": in_module(CONV, shapes=[[9, 64, 1, 1]] + [[9, 9, 1, 1]] * 3)},
        "fit together|should be",
    ),
    "bias that is a number": ({"modules": in_module(CONV, bias=1)}, "bias 1: should be a valid boolean"),
    "missing bias": ({"modules": in_module(CONV, bias=True)}, f"tensor '{CONV}.stages.3.bias' should be"),
    "no geometry": ({"modules": in_module(CONV, geometry=None)}, "geometry None: should be a valid dictionary"),
    "empty geometry": ({"modules": in_module(CONV, geometry={})}, "stride .*required"),
    "huge identity": (
        {"modules": in_module(CONV, kind="identity")},
        f"tensor '{CONV}.stages.0.weight' should be absent",
    ),
    "nested sequences": (
        {"modules": in_module(CONV, kind="sequence", modules=[{"kind": "sequence"}])},
        "modules.0 .*'sequence'",
    ),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused_in_one_line(saved, case):
    header, message = BAD_HEADERS[case]
    rewrite(saved, header=header)
    assert_refused(saved, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv1.stages.0.weight": None}, "tensor 'conv1.stages.0.weight' should be .*, is absent"),
        ({"extra": torch.zeros(3)}, r"tensor 'extra' should be absent, is \(3,\)"),
        ({"fc.weight": torch.zeros(4, 511)}, r"tensor 'fc.weight' should be \(4, 512\), is \(4, 511\)"),
        ({"fc.weight": torch.zeros(4, 512, dtype=torch.int64)}, r"should be torch.float32, is torch.int64"),
        ({"fc.weight": torch.zeros(4, 512, dtype=torch.complex64)}, r"should be torch.float32, is torch.complex64"),
    ],
)
def test_bad_tensors_are_refused(saved, change, message):
    rewrite(saved, tensors=change)
    assert_refused(saved, message)


def assert_refused(path, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_compressed(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 7, 500, -1])
def test_truncated_files_are_refused(saved, kept):
    saved.write_bytes(saved.read_bytes()[:kept])
    assert_refused(saved, "damaged or not a safetensors file")


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    assert_refused(path, "no compressed model at")
    path.write_bytes(random.Random(0).randbytes(1000))
    assert_refused(path, "damaged or not a safetensors file")
    torch.save({"model": nn.Linear(2, 2)}, path)
    assert_refused(path, "damaged or not a safetensors file")
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    assert_refused(path, "format 'htd-compressed-1' was expected, 'none' found")
    save_checkpoint(build_model("squeezenet1_1", 4, seed=0), path, architecture="squeezenet1_1", classes="abcd")
    assert_refused(path, "'htd-dense-1' found")


def test_what_could_not_be_loaded_is_not_saved(resnet, tmp_path, monkeypatch):
    model, path = resnet[0], tmp_path / "m.st"

    def refuses(model, message, **options):
        options = {"architecture": "resnet18", "num_classes": 4, "image_size": 32, **options}
        with pytest.raises(ValueError, match=message):
            save_compressed(model, path, **options)
        assert not list(tmp_path.iterdir())

    refuses(model, "unknown model 'resnet19'", architecture="resnet19")
    refuses(model, "cannot be saved as a compressed resnet34", architecture="resnet34")
    refuses(model, "cannot be saved as a compressed alexnet: the network is a ResNet", architecture="alexnet")
    refuses(model, "cannot be saved as a compressed resnet18", num_classes=7)
    refuses(model, "not JSON serializable", metadata={"device": torch.device("cpu")})
    refuses(model, "not JSON compliant", metadata={"accuracy": float("nan")})
    refuses(copy_with(model, {model.relu: nn.GELU()}), r"module 'relu' is a GELU")
    wrapped = nn.Module()
    wrapped._orig_mod = model
    refuses(wrapped, "a compiled model cannot be saved")


def test_a_setting_that_the_architecture_does_not_have_is_refused(tmp_path):
    model = build_model("googlenet", 4, seed=0)
    model.transform_input = True
    with pytest.raises(ValueError, match=r"the network has transform_input=True, the architecture has False"):
        save_compressed(model, tmp_path / "m.st", architecture="googlenet", num_classes=4, image_size=32)


def test_a_failed_save_leaves_the_old_file(saved, resnet, monkeypatch):
    before = saved.read_bytes()

    def full_disk(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_compressed(resnet[0], saved, architecture="resnet18", num_classes=4, image_size=32)
    assert saved.read_bytes() == before
