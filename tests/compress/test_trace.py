"""What a forward pass tells about layers: shapes, flattens and nothing that a coincidence of sizes pretends."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.compress import trace_layers
from common.modules import hooked

C, H, W = 3, 4, 5


class Head(nn.Module):
    """A linear layer behind ``path``, a function from a (N, C, H, W) feature map to (N, C H W) features."""

    def __init__(self, path) -> None:
        super().__init__()
        self.path = path
        self.fc = nn.Linear(C * H * W, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.path(x))


FLATTENING_PATHS = {
    "torch.flatten": lambda x: torch.flatten(x, 1),
    "Tensor.flatten": lambda x: x.flatten(1),
    "nn.Flatten": nn.Flatten(),
    "view by batch": lambda x: x.view(x.size(0), -1),
    "view by features": lambda x: x.view(-1, C * H * W),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "torch.reshape": lambda x: torch.reshape(x, (x.shape[0], -1)),
    "of a map that is not contiguous": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3).flatten(1),
    "then dropout": nn.Sequential(nn.Flatten(), nn.Dropout()),
    "then relu": lambda x: functional.relu(x.flatten(1)),
    "then relu in place and dropout": nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Dropout(0.3)),
    "then torch.relu": lambda x: torch.relu(x.flatten(1)),
    "then contiguous": lambda x: x.flatten(1).contiguous(),
}

OTHER_PATHS = {
    "a linear layer of the same size": nn.Sequential(nn.Flatten(), nn.Linear(C * H * W, C * H * W)),
    "a sum with other features": lambda x: x.flatten(1) + 1,
    "features in another order": lambda x: x.flatten(1).flip(1),
    "a pair of halves": lambda x: torch.cat(x.flatten(1).chunk(2, dim=1)[::-1], dim=1),
}


@pytest.mark.parametrize("path", FLATTENING_PATHS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_flatten_is_found(path, batch):
    trace = trace_layers(Head(FLATTENING_PATHS[path]), torch.randn(batch, C, H, W))["fc"]
    assert trace.unflatten == (C, H, W)
    assert (trace.input_shape, trace.output_shape) == ((C * H * W,), (7,))


@pytest.mark.parametrize("path", OTHER_PATHS)
def test_features_of_the_right_size_that_are_no_feature_map_are_not_taken_for_one(path):
    model = Head(OTHER_PATHS[path])
    assert trace_layers(model, torch.randn(2, C, H, W))["fc"].unflatten is None


def test_a_map_of_one_position_is_a_plain_matrix():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 7))
    assert trace_layers(model, torch.randn(2, C, H, W))["2"].unflatten is None


def test_only_the_first_of_two_linear_layers_is_behind_the_flatten():
    model = nn.Sequential(nn.Flatten(), nn.Linear(C * H * W, C * H * W), nn.ReLU(), nn.Linear(C * H * W, 2))
    traces = trace_layers(model, torch.randn(2, C, H, W))
    assert traces["1"].unflatten == (C, H, W)
    assert traces["3"].unflatten is None


def test_shapes_leave_the_batch_out():
    model = nn.Sequential(nn.Conv2d(C, 6, (3, 1), stride=(1, 2)), nn.ReLU(), nn.Conv2d(6, 2, 1))
    traces = trace_layers(model, torch.randn(2, C, H, W))
    assert (traces["0"].input_shape, traces["0"].output_shape) == ((C, H, W), (6, 2, 3))
    assert (traces["2"].input_shape, traces["2"].output_shape) == ((6, 2, 3), (2, 2, 3))


def test_a_shared_layer_is_traced_once_with_every_call():
    shared = nn.Conv2d(C, C, 3, padding=1)
    model = nn.Sequential(shared, nn.MaxPool2d(2), shared)
    traces = trace_layers(model, torch.randn(2, C, H, W))
    assert list(traces) == ["0"]
    assert [call[:2] for call in traces["0"].calls] == [((C, H, W), (C, H, W)), ((C, 2, 2), (C, 2, 2))]
    assert (traces["0"].input_shape, traces["0"].output_shape) == ((C, H, W), (C, H, W))


def test_layers_that_do_not_run_and_other_modules_are_not_traced():
    model = nn.Sequential(nn.Conv2d(C, 2, 1), nn.BatchNorm2d(2))
    model.register_module("unused", nn.Identity())
    model.unused.fc = nn.Linear(3, 3)
    assert list(trace_layers(model, torch.randn(2, C, H, W))) == ["0"]


def test_a_model_that_is_one_layer_has_the_empty_name():
    assert trace_layers(nn.Conv2d(C, 2, 1), torch.randn(1, C, H, W))[""].output_shape == (2, H, W)


def test_tracing_changes_nothing():
    model = nn.Sequential(nn.Conv2d(C, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(24, 2))
    model[1].eval()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace_layers(model, torch.randn(2, C, H, W))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_inside_hooked_the_model_evaluates_without_gradients():
    model = nn.Sequential(nn.Conv2d(C, 4, 3), nn.Dropout())
    seen = []
    with hooked(model, {"0": lambda module, inputs, output: seen.append(output.requires_grad)}):
        assert not any(module.training for module in model.modules())
        model(torch.randn(2, C, H, W))
    assert seen == [False]
    assert torch.is_grad_enabled()


def test_hooks_and_training_flags_are_restored_when_the_model_raises():
    model = nn.Sequential(nn.Conv2d(C, 4, 3), nn.Dropout())
    model[1].eval()
    with pytest.raises(RuntimeError):
        trace_layers(model, torch.randn(2, C + 1, H, W))
    assert [module.training for module in model] == [True, False]
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.is_grad_enabled()
