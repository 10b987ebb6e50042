"""Recalibration against the true statistics of the data."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from common.compress import HTLayer, factorize, recalibrate
from common.configuration import KernelRanks, MatrixRanks
from tests.helpers import halved


def images(count: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 9, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def deep_stack(bias: bool = True) -> nn.Sequential:
    """Convolutions and linear layers without batch norm."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=bias),
        nn.ReLU(),
        nn.Conv2d(8, 10, (3, 1), bias=bias),
        nn.ReLU(),
        nn.Conv2d(10, 6, 1, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(6 * 4 * 7, 9, bias=bias),
        nn.ReLU(),
        nn.Linear(9, 5, bias=bias),
    )


def normed_net() -> nn.Sequential:
    """Batch norm in the middle, a linear layer with a bias behind it: what a residual network's head sees."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12, momentum=0.3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).eval()


def names(model: nn.Module) -> list[str]:
    """Every layer by name: small matrices are only factorised if they are asked for."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def channel_means(
    model: nn.Module, x: Tensor, kinds: tuple[type, ...], statistic: Callable = torch.mean
) -> dict[str, Tensor]:
    """Mean (or another statistic) of the output per channel of every module of these kinds, with hooks of our own."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, kinds):

            def hook(_module, _inputs, output, name=name):
                found[name] = statistic(output.double(), [axis for axis in range(output.ndim) if axis != 1])

            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


def test_bias_correction_gives_every_layer_of_a_deep_stack_the_dense_means():
    dense, x = deep_stack().eval(), images()
    factors = factorize(dense, x, layers=names(dense))
    compressed = factors.compress(halved(factors))
    expected = channel_means(dense, x, (nn.Conv2d, nn.Linear))
    before = channel_means(compressed, x, (HTLayer,))
    assert any((before[name] - expected[name]).abs().max() > 1e-3 for name in expected)
    recalibrate(compressed, x, factors.output_means())
    for name, mean in channel_means(compressed, x, (HTLayer,)).items():
        torch.testing.assert_close(mean, expected[name], rtol=1e-4, atol=1e-5)


def test_bias_correction_brings_the_outputs_closer():
    dense, x = deep_stack().eval(), images(256)
    factors = factorize(dense, x, layers=names(dense))
    compressed = factors.compress(halved(factors))
    unseen = images(128, seed=3)
    with torch.no_grad():
        before = (compressed.eval()(unseen) - dense(unseen)).square().mean()
        after = (recalibrate(compressed, x, factors.output_means())(unseen) - dense(unseen)).square().mean()
    assert after < before


def faded(seed=3):
    """Twelve convolutions with biases and no norm, trained by nobody but scaled to keep their signal's size."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
    for _ in range(11):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def test_scales_are_given_back_to_every_layer_of_a_deep_stack(monkeypatch):
    monkeypatch.setattr("common.compress.recalibration.LARGEST_GAIN", 1e6)
    model, x = faded(), images(32)
    factors = factorize(model, x)
    config = halved(factors)
    matched = recalibrate(factors.compress(config), x, factors.output_means(), factors.output_stds())
    for statistic in (torch.mean, torch.std):
        expected = channel_means(model, x, (nn.Conv2d,), statistic)
        found = channel_means(matched, x, (HTLayer,), statistic)
        assert set(found) == set(config)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-4)


def test_a_deep_stack_without_norms_does_not_fade_out():
    model, x = faded(), images(32)
    factors = factorize(model, x)
    config = halved(factors)
    shifted = recalibrate(factors.compress(config), x, factors.output_means())
    matched = recalibrate(factors.compress(config), x, factors.output_means(), factors.output_stds())
    with torch.no_grad():
        spreads = [network(x).std(0).norm() for network in (model, shifted, matched)]
    dense, without, with_scales = spreads
    assert without < 0.5 * dense
    assert (with_scales / dense).log().abs() < 0.5 * (without / dense).log().abs()


def test_a_channel_that_truncation_silenced_is_not_blown_up():
    model, x = deep_stack().eval(), images()
    with torch.no_grad():
        model[0].weight[3] = 0  # constant on every image: no scale to give back
    factors = factorize(model, x)
    config = {"0": factors.layers["0"].full_ranks}
    matched = recalibrate(factors.compress(config), x, factors.output_means(), factors.output_stds())
    torch.testing.assert_close(matched(x), model(x), rtol=1e-3, atol=1e-3)


def test_layers_without_a_bias_and_dense_layers_are_left_alone():
    dense, x = deep_stack(bias=False), images()
    factors = factorize(dense, x, layers=names(dense))
    compressed = factors.compress({"0": KernelRanks(2, 2, 3)})
    before = {name: value.clone() for name, value in compressed.state_dict().items()}
    recalibrate(compressed, x, factors.output_means())
    assert all(torch.equal(value, before[name]) for name, value in compressed.state_dict().items())


def test_a_linear_layer_on_rows_gets_its_means_back():
    torch.manual_seed(4)
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(6 * 7, 5)).eval()  # (N, 4, 42) -> (N, 4, 5)
    x = images()
    factors = factorize(dense, x, layers=["2"])
    compressed = recalibrate(factors.compress({"2": MatrixRanks(2)}), x, factors.output_means())
    with torch.no_grad():
        torch.testing.assert_close(compressed(x).mean((0, 1)), dense(x).mean((0, 1)), rtol=1e-4, atol=1e-5)


def test_batch_norm_statistics_equal_those_of_the_data():
    model, x = normed_net(), images()
    recalibrate(model, x)
    with torch.no_grad():
        first = model[0](x).double()
        second = model[3](model[2](model[1](model[0](x)))).double()
    for norm, features in ((model[1], first), (model[4], second)):
        mean, variance = features.mean((0, 2, 3)), features.var((0, 2, 3))
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 16, None])
def test_full_ranks_change_nothing_however_images_are_batched_and_ordered(batch_size):
    dense, x = deep_stack().eval(), images(41)
    factors = factorize(dense, x, layers=names(dense))
    full = factors.compress({name: layer.full_ranks for name, layer in factors.layers.items()})
    recalibrate(full, x.flip(0), factors.output_means(), factors.output_stds(), batch_size=batch_size)
    with torch.no_grad():
        torch.testing.assert_close(full(x), dense(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [deep_stack, normed_net])
def test_any_order_and_any_batch_size_come_to_the_same(make):
    dense, x = make().eval(), images(17, seed=5)
    x[-2:] += 20  # a short last batch weighs no more than its images
    factors = factorize(dense, x, layers=names(dense))

    def outputs(given, batch_size):
        small = factors.compress(halved(factors))
        recalibrate(small, given, factors.output_means(), factors.output_stds(), batch_size=batch_size)
        with torch.no_grad():
            return small.eval()(x)

    for batch_size, order in ((8, range(17)), (8, reversed(range(17))), (1, range(17)), (3, range(17))):
        torch.testing.assert_close(outputs(x[list(order)], batch_size), outputs(x, 17), rtol=1e-3, atol=1e-3)


def test_a_layer_and_a_norm_that_run_more_than_once_are_corrected_for_all_their_calls_together():
    class Thrice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(6)
            self.layer, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            for _ in range(3):
                x = torch.relu(self.layer(x)) + x
            return self.norm(x) + self.norm(2 * x)

    dense, x = Thrice().eval(), images()
    recalibrate(dense, x)
    factors = factorize(dense, x, layers=["layer"])
    full = factors.compress({"layer": factors.layers["layer"].full_ranks})
    recalibrate(full, x, factors.output_means(), factors.output_stds(), batch_size=5)
    with torch.no_grad():
        torch.testing.assert_close(full(x), dense(x), rtol=1e-3, atol=1e-3)


def test_one_map_position_and_a_lone_last_image_are_no_obstacle():
    """Batch norm in training refuses a batch of one image at a 1 x 1 map."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, (8, 9)), nn.BatchNorm2d(4)), images(9)
    recalibrate(model, x, batch_size=8)
    with torch.no_grad():
        torch.testing.assert_close(model[1].running_var, model[0](x).var((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_a_norm_that_reads_one_value_of_each_channel_has_no_variance_to_estimate():
    model = nn.Sequential(nn.Conv2d(3, 4, (8, 9)), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="batch norm 1 reads one value"):
        recalibrate(model, images(1))
    assert model[1].running_var.eq(1).all()


def test_the_bias_behind_batch_norm_is_corrected_for_the_new_statistics():
    """Corrected against the old statistics, the head would miss its target by what the statistics moved."""
    dense, x = normed_net(), images(64)
    recalibrate(dense, x)
    factors = factorize(dense, x, layers=names(dense))
    compressed = factors.compress({"0": KernelRanks(1, 1, 2), "3": KernelRanks(2, 2, 3), "8": MatrixRanks(4)})
    recalibrate(compressed, x, factors.output_means())
    with torch.no_grad():
        torch.testing.assert_close(compressed.eval()(x).mean(0), dense(x).mean(0), rtol=0.02, atol=0.01)


def test_reestimation_undoes_a_scale_and_a_shift_of_the_weights():
    model, x = normed_net(), images()
    recalibrate(model, x)
    with torch.no_grad():
        expected = model(x)
        model[0].weight *= 7
        recalibrate(model, x)
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)


def test_momentum_training_flags_and_the_tracked_modules_are_restored():
    model = normed_net().train()
    model[4].eval()
    flags = [module.training for module in model.modules()]
    recalibrate(model, images())
    assert [module.training for module in model.modules()] == flags
    assert (model[1].momentum, model[4].momentum) == (0.1, 0.3)
    assert not any(module._forward_hooks for module in model.modules())


def test_everything_is_restored_when_the_model_raises():
    model = normed_net().train()
    with pytest.raises(RuntimeError):
        recalibrate(model, torch.randn(4, 5, 8, 9))
    assert all(module.training for module in model.modules())
    assert (model[1].momentum, model[4].momentum) == (0.1, 0.3)


def test_batch_norm_without_running_statistics_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    recalibrate(model, images())
    assert model[1].running_mean is None


def test_recalibration_returns_the_model_itself_and_needs_no_gradients():
    model = normed_net()
    assert recalibrate(model, images()) is model
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        recalibrate(normed_net(), images(0))
