"""Second moments of activations against numpy, over images and positions."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.compress import factorize, trace_layers
from common.compress.moments import channels_last_rows, gather_moments

C, H, W = 3, 6, 5


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(C, 4, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(4, 7, 1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(7 * 2 * 2, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )


def images(count: int = 11, seed: int = 1) -> Tensor:
    return torch.randn(count, C, H, W, generator=torch.Generator().manual_seed(seed)) + 0.7


def gather(model: nn.Module, x, *, kernels=(), **options):
    return gather_moments(model, x, trace_layers(model, images(1)), kernels=kernels, **options)


def activations(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The input of every module of the chain, then the output of the last."""
    found = [x]
    with torch.no_grad():
        for module in model.eval():
            found.append(module(found[-1]))
    return found


def rows_of(features: Tensor) -> np.ndarray:
    """(N, C, H, W) -> (N H W, C) by numpy's own means."""
    array = features.double().numpy()
    return array if array.ndim == 2 else np.moveaxis(array, 1, -1).reshape(-1, array.shape[1])


def test_moments_equal_numpys():
    model, x = small_net(), images()
    moments = gather(model, x, kernels=["0"])
    found = activations(model, x)
    for index in (0, 2, 5, 7):
        output = rows_of(found[index + 1])
        np.testing.assert_allclose(moments[str(index)].output_mean, output.mean(0), rtol=1e-5, atol=1e-6)
        covariance = np.cov(output, rowvar=False, bias=True)
        np.testing.assert_allclose(moments[str(index)].output_covariance, covariance, rtol=1e-5, atol=1e-6)
    pixels = rows_of(x)
    covariance = np.cov(pixels, rowvar=False, bias=True)
    np.testing.assert_allclose(moments["0"].window[0], covariance, rtol=1e-5, atol=1e-6)


def test_rows_and_columns_of_the_window_are_as_correlated_as_neighbouring_pixels():
    """Long stripes along one axis: neighbours across them are unrelated, neighbours along them are the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, (3, 2), dilation=(2, 1)))
    x = torch.randn(40, 3, 16, 1).expand(-1, -1, -1, 40)
    _, rows, columns = gather(model, x, kernels=["0"])["0"].window
    assert rows.shape == (3, 3)
    assert columns.shape == (2, 2)
    np.testing.assert_allclose(rows, np.eye(3), atol=0.08)
    np.testing.assert_allclose(columns, np.ones((2, 2)), atol=0.08)


def test_a_window_of_a_shared_layer_sees_maps_of_several_sizes():
    """The channels' covariance is that over the positions of both calls' inputs."""
    shared, x = nn.Conv2d(C, C, 3, padding=1), images()
    model = nn.Sequential(shared, nn.AvgPool2d(2), shared)
    channels, _, _ = gather(model, x, kernels=["0"], batch_size=4)["0"].window
    found = activations(model, x)
    pixels = np.concatenate([rows_of(found[0]), rows_of(found[2])])
    np.testing.assert_allclose(channels, np.cov(pixels, rowvar=False, bias=True), rtol=1e-5, atol=1e-6)


def test_the_input_moment_behind_a_flatten_is_that_of_the_feature_map():
    model, x = small_net(), images()
    moments = gather(model, x, kernels=["5"])
    pixels = rows_of(activations(model, x)[3])
    channels, rows, columns = moments["5"].window
    np.testing.assert_allclose(channels, np.cov(pixels, rowvar=False, bias=True), rtol=1e-5, atol=1e-6)
    for covariance in (rows, columns):
        assert np.diag(covariance).mean() == pytest.approx(1)
        assert np.linalg.eigvalsh(covariance).min() >= -1e-9


def test_input_moments_are_gathered_for_kernels_only():
    moments = gather(small_net(), images(), kernels=["0"])
    assert [name for name, layer in moments.items() if layer.window is not None] == ["0"]


@pytest.mark.parametrize("batch_size", [1, 4, 11, 128])
def test_batches_do_not_matter(batch_size):
    model, x = small_net(), images()
    x += torch.linspace(-1, 1, len(x))[:, None, None, None]  # the first image, or batch, is darker than the rest
    whole = gather(model, x, kernels=["0", "5"])
    split = gather(model, x, kernels=["0", "5"], batch_size=batch_size)
    given = gather(model, iter(x.split(batch_size)), kernels=["0", "5"])
    for name, expected in whole.items():
        for found in (split[name], given[name]):
            torch.testing.assert_close(found.output_mean, expected.output_mean, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found.output_covariance, expected.output_covariance, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found.window, expected.window, rtol=1e-4, atol=1e-5)


def test_a_linear_layer_on_rows_has_its_channels_last():
    model = nn.Sequential(nn.Conv2d(C, 4, 3), nn.Flatten(2), nn.Linear(12, 5))  # (N, 4, 12) -> (N, 4, 5)
    x = images()
    moments = gather(model, x)["2"]
    output = activations(model, x)[-1].double().numpy().reshape(-1, 5)
    np.testing.assert_allclose(moments.output_covariance, np.cov(output, rowvar=False, bias=True), rtol=1e-5, atol=1e-6)


def test_a_large_mean_does_not_drown_a_small_covariance():
    """Float32 sums of squares around 1e4 carry an error of about 1e-3, far above the variance of 1e-4 here."""
    layer = nn.Conv2d(2, 3, 1)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([100.0, -50.0, 80.0]))
        layer.weight.copy_(1e-2 * torch.tensor([[1.0, 2.0], [-1.0, 1.0], [3.0, 0.5]])[:, :, None, None])
    x = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    expected = np.cov(rows_of(x) @ layer.weight.detach().double().flatten(1).numpy().T, rowvar=False, bias=True)
    found = gather_moments(layer, x, trace_layers(layer, x[:1]), kernels=[], batch_size=5)[""].output_covariance
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("count", [1, 4])
def test_constant_outputs_have_a_covariance_of_rounding_size(count):
    model = small_net()
    moments = gather(model, images(1).mean((2, 3), keepdim=True).expand(count, C, H, W), kernels=["0"])
    for layer in moments.values():
        assert layer.output_covariance.abs().max() <= 1e-10 * layer.output_mean.square().max()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_name_the_first_layer_that_makes_them(value):
    model = small_net()
    with torch.no_grad():
        model[2].bias[0] = value
    with pytest.raises(ValueError, match=r"layer 2: the calibration pass met NaN or infinite activations"):
        gather(model, images())


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="no calibration images"):
        gather(small_net(), [])


def test_the_model_stays_as_it_was():
    model = small_net()
    model[4].eval()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gather(model, images(), kernels=["0"])
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_removed_when_the_model_raises():
    model = small_net()
    traces = trace_layers(model, images(1))
    with pytest.raises(RuntimeError):
        gather_moments(model, torch.randn(2, C + 1, H, W), traces, kernels=[])
    assert not any(module._forward_hooks for module in model.modules())


def test_channel_rows_put_the_channel_axis_last():
    features = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    rows = channels_last_rows(features, axis=1)
    assert rows.shape == (2 * 4 * 5, 3)
    assert rows[5 * 2 + 3].tolist() == features[0, :, 2, 3].tolist()
    assert channels_last_rows(features, axis=-1).shape == (2 * 3 * 4, 5)
    assert channels_last_rows(features[:, :, 0, 0], axis=1).tolist() == features[:, :, 0, 0].tolist()


def test_a_pixel_that_no_window_reads_is_refused_by_name_and_large_numbers_are_numbers():
    """A stride of three leaves out the last row: what is there still enters the moments."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=3)).eval()
    images = torch.randn(4, 3, 7, 7)
    images[0, 0, 6, 6] = torch.nan
    with pytest.raises(ValueError, match=r"layer 0: .*NaN or infinite"):
        factorize(model, images, layers=["0"])
    large = 1e20 * torch.randn(4, 3, 7, 7)
    factors = factorize(model, large, layers=["0"])
    with torch.no_grad():
        expected, found = model(large), factors.compress(factors.full_ranks())(large)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
