"""Deployment: the function stays, the plans follow the measurement, the input model is left alone."""

import copy

import pytest
import torch
from torch import nn

from common.compress import HTLayer, factorize, trace_layers
from common.compress.decompose import factorize_layer
from common.compress.layers import MATRIX_PLANS, PLANS
from common.compress.trace import LayerTrace
from common.configuration import KernelRanks, MatrixRanks
from common.deploy import Target, choose, deploy, fold_batch_norm, median_and_error, plain_layer, timer
from common.deploy.plans import FIRST_ROUNDS, PlanTiming, choose_plans, fastest, fewest_flops, interleaved, plan_flops
from common.deploy.runtimes import compiled, cuda_graph
from common.models import build_model
from common.modules import copy_with
from common.ranks import uniform
from tests.helpers import relative_error

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def with_statistics(model, seed=0):
    """Batch norms with statistics and weights far from 0 and 1, where folding them wrongly shows."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) / 4)
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
                nn.init.uniform_(norm.bias, -0.5, 0.5, generator=generator)
    return model.eval()


class SmallNet(nn.Module):
    """Every kind of layer that is factorised: strided, repeated, 1 x 1, behind a flatten, plain linear."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, (5, 3), stride=2, padding=(2, 1), bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.first = nn.Conv2d(12, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 12, 3, padding=1)
        self.wide = nn.Conv2d(12, 20, 1)
        self.norm2 = nn.BatchNorm2d(20)
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(20 * 4 * 3, 18)
        self.head = nn.Linear(18, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.second(torch.relu(self.first(x))))
        x = self.pool(torch.relu(self.norm2(self.wide(x))))
        return self.head(torch.relu(self.hidden(torch.flatten(x, 1))))


IMAGES = (3, 16, 12)
FACTORISED = {
    "stem": KernelRanks(2, 5, 6),
    "first": KernelRanks(5, 8, 6),
    "second": KernelRanks(5, 8, 6),
    "wide": MatrixRanks(7),
    "hidden": KernelRanks(9, 11, 8),
    "head": MatrixRanks(3),
}


def small_net(dtype=torch.float32, compressed=True):
    torch.manual_seed(0)
    model = with_statistics(SmallNet()).to(dtype)
    if not compressed:
        return model
    traces = trace_layers(model, images(dtype=dtype))
    replaced = {}
    for name, ranks in FACTORISED.items():
        layer = model.get_submodule(name)
        kernel = isinstance(ranks, KernelRanks)
        replaced[layer] = factorize_layer(name, layer, traces[name], None, "weight", is_kernel=kernel).layer(ranks)
    return copy_with(model, replaced).eval()


def images(count=3, dtype=torch.float32, shape=IMAGES):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def preferring(*plans):
    """A measurement in which the first of these plans that a layer has is fastest; counts its calls."""

    def measure(modules, inputs):
        measure.calls += 1
        best = next((plan for plan in plans if plan in modules), next(iter(modules)))
        return {name: [1e-3 if name == best else 2e-3] * 4 for name in modules}

    measure.calls = 0
    return measure


# --- the function stays the same --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_outputs_stay(dtype, compressed, memory_format):
    model, x = small_net(dtype, compressed), images(dtype=dtype)
    for plan in PLANS if compressed else ["dense"]:
        deployed = deploy(model, x, measure=preferring(plan, "pair"), memory_format=memory_format, rounds=1)
        with torch.no_grad():
            expected = model(x)
        assert relative_error(deployed(x), expected) < TOLERANCE[dtype]
        assert deployed(x[:2]).shape == (2, 5)  # any batch size, though chosen for one


@pytest.mark.parametrize("policy", ["measure", "flops", "keep"])
def test_every_policy_gives_plain_modules_without_batch_norm(policy):
    deployed = deploy(small_net(), images(), plans=policy, rounds=2)
    kinds = {type(module) for module in deployed.model.modules() if not list(module.children())}
    assert kinds <= {nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.Identity, nn.Flatten, nn.Unflatten}
    assert deployed.folded == {"stem": "norm", "wide": "norm2"}
    assert not any(parameter.requires_grad for parameter in deployed.model.parameters())


def test_input_model_is_untouched_and_shares_no_storage():
    model = small_net().train()
    before = copy.deepcopy(model.state_dict())
    deployed = deploy(model, images(), plans="keep", rounds=1)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    theirs = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    ours = {tensor.untyped_storage().data_ptr() for tensor in deployed.model.state_dict().values()}
    assert not theirs & ours


# --- batch norm -------------------------------------------------------------------------------------------------------


def ht_kernel(bias=True):
    torch.manual_seed(0)
    conv = nn.Conv2d(7, 9, 3, padding=1, bias=bias).double()
    trace = LayerTrace((7, 8, 6), (9, 8, 6))
    return factorize_layer("conv", conv, trace, None, "weight", is_kernel=True).layer(KernelRanks(4, 6, 5)).eval()


FOLDED = {
    "convolution": (nn.Conv2d(7, 9, 3), nn.BatchNorm2d(9)),
    "without bias": (nn.Conv2d(7, 9, 3, bias=False), nn.BatchNorm2d(9)),
    "depthwise": (nn.Conv2d(7, 14, 3, groups=7), nn.BatchNorm2d(14)),
    "without weights": (nn.Conv2d(7, 9, (1, 3)), nn.BatchNorm2d(9, affine=False)),
    "large epsilon": (nn.Conv2d(7, 9, 1), nn.BatchNorm2d(9, eps=0.3)),
    "factorised": (ht_kernel(), nn.BatchNorm2d(9)),
    "factorised without bias": (ht_kernel(bias=False), nn.BatchNorm2d(9)),
    "factorised, tucker": (ht_kernel().with_plan("tucker"), nn.BatchNorm2d(9)),
    "factorised, dense": (ht_kernel().with_plan("dense"), nn.BatchNorm2d(9)),
}


@pytest.mark.parametrize("case", FOLDED)
def test_folded_batch_norm_gives_the_same_outputs(case):
    model = with_statistics(nn.Sequential(*FOLDED[case])).double()
    x = images(dtype=torch.float64, shape=(7, 8, 6))
    folded, pairs = fold_batch_norm(model, x)
    assert pairs == {"0": "1"}
    assert isinstance(folded[1], nn.Identity)
    with torch.no_grad():
        assert relative_error(folded(x), model(x)) < 1e-10


def test_linear_layer_takes_its_batch_norm():
    model = with_statistics(nn.Sequential(nn.Flatten(), nn.Linear(24, 6), nn.BatchNorm1d(6))).double()
    x = images(dtype=torch.float64, shape=(2, 3, 4))
    folded, pairs = fold_batch_norm(model, x)
    assert pairs == {"1": "2"}
    with torch.no_grad():
        assert relative_error(folded(x), model(x)) < 1e-10


class ReadTwice(nn.Module):
    """The convolution's own output is needed beside the normalised one."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class Returned(ReadTwice):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y), y


class RunTwice(ReadTwice):
    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(x)


class InPlace(ReadTwice):
    def forward(self, x):
        return self.norm(self.conv(x).relu_())


class SharedNorm(ReadTwice):
    def forward(self, x):
        return self.norm(self.norm(self.conv(x)))


@pytest.mark.parametrize(
    "model",
    [
        ReadTwice(),
        Returned(),
        RunTwice(),
        InPlace(),
        SharedNorm(),
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_batch_norm_that_cannot_be_folded_stays(model):
    folded, pairs = fold_batch_norm(with_statistics(model), images())
    assert pairs == {}
    assert [type(m) for m in folded.modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize(
    ("name", "size", "left"),
    [("resnet18", 32, 0), ("googlenet", 32, 0), ("mobilenet_v2", 32, 0), ("densenet121", 32, 62), ("vgg11_bn", 32, 0)],
)
def test_torchvision_networks_fold(name, size, left):
    model = with_statistics(build_model(name, 4, seed=0)).double()
    x = images(2, torch.float64, (3, size, size))
    folded, _ = fold_batch_norm(model, x)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == left
    with torch.no_grad():
        assert relative_error(folded(x), model(x)) < 1e-10


@pytest.mark.parametrize(("name", "size"), [("resnet18", 32), ("squeezenet1_1", 64), ("alexnet", 64)])
def test_compressed_torchvision_networks_deploy(name, size):
    model = with_statistics(build_model(name, 4, seed=0))
    factors = factorize(model, input_shape=(3, size, size), layers="convs" if name == "alexnet" else "all")
    compressed = factors.compress(uniform(factors, 0.1)).eval()
    x = images(2, shape=(3, size, size))
    with torch.no_grad():
        expected = compressed(x)
    assert relative_error(deploy(compressed, x, plans="flops", rounds=1)(x), expected) < 1e-4


# --- plans ------------------------------------------------------------------------------------------------------------


KERNELS = {
    "plain": {"padding": 1},
    "strided": {"stride": (2, 1), "padding": (0, 1)},
    "dilated": {"dilation": (1, 2), "padding": 2},
    "same": {"padding": "same"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "without bias": {"bias": False},
}


@pytest.mark.parametrize("case", KERNELS)
def test_plain_kernels_equal_the_layer_in_every_plan(case):
    torch.manual_seed(0)
    conv = nn.Conv2d(7, 9, (3, 5), **KERNELS[case]).double()
    x = images(2, torch.float64, (7, 11, 12))
    with torch.no_grad():
        trace = trace_layers(nn.Sequential(conv), x)["0"]
        factors = factorize_layer("conv", conv, trace, None, "weight", is_kernel=True)
        chain = factors.truncated(KernelRanks(4, 6, 5), PLANS["chain"])
        layer = HTLayer(chain, factors.bias, factors.geometry)
        assert set(layer.plans) == set(PLANS)
        for plan in layer.plans:
            assert relative_error(plain_layer(layer, plan)(x), layer(x)) < 1e-10
    counts = {plan: factors.flops(KernelRanks(4, 6, 5), PLANS[plan]) for plan in PLANS}
    assert plan_flops(layer, (7, 11, 12)) == counts


@pytest.mark.parametrize("plan", PLANS)
def test_a_linear_layer_behind_a_flatten_ends_in_linear_layers(plan):
    torch.manual_seed(0)
    linear = nn.Linear(7 * 4 * 3, 9).double()
    trace = LayerTrace((84,), (9,), unflatten=(7, 4, 3))
    factors = factorize_layer("fc", linear, trace, None, "weight", is_kernel=True)
    layer = HTLayer(factors.truncated(KernelRanks(4, 6, 5), PLANS["chain"]), factors.bias, factors.geometry)
    x = torch.randn(3, 84, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = plain_layer(layer, plan)
    with torch.no_grad():
        assert relative_error(plain(x), layer(x)) < 1e-10
    assert isinstance(plain if plan == "dense" else plain[-1], nn.Linear)


@pytest.mark.parametrize("plan", MATRIX_PLANS)
@pytest.mark.parametrize("dense", [nn.Linear(8, 6), nn.Conv2d(8, 6, 1, stride=2)])
def test_plain_matrices_equal_the_layer(dense, plan):
    is_linear = isinstance(dense, nn.Linear)
    trace = LayerTrace((8,), (6,)) if is_linear else LayerTrace((8, 5, 4), (6, 3, 2))
    layer = factorize_layer("m", dense.double(), trace, None, "weight", is_kernel=False).layer(MatrixRanks(3))
    x = torch.randn(2, *trace.input_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(plain_layer(layer, plan)(x), layer(x)) < 1e-10


@pytest.mark.parametrize("plan", PLANS)
def test_choice_obeys_the_measurement(plan):
    deployed = deploy(small_net(), images(), measure=preferring(plan), rounds=1)
    assert deployed.plans["first"] == plan
    stages = {"dense": 1, "chain": 4, "tucker": 3, "input-chain": 3, "output-chain": 3}.get(plan, 2)
    module = deployed.model.first
    assert (1 if isinstance(module, nn.Conv2d) else len(module)) == stages


def test_equal_layers_are_measured_once():
    model = small_net()
    measure = preferring("chain")
    choices = choose_plans(model, images(), "measure", measure)
    assert list(choices) == list(FACTORISED)
    assert measure.calls == 5  # first and second are alike
    assert choices["first"] == choices["second"]


def test_another_bias_stride_or_input_is_another_measurement():
    class Variants(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.biased, self.smaller = layer(bias=False), layer(bias=True), layer(bias=False)

        def forward(self, x):
            return self.layer(x).mean() + self.biased(x).mean() + self.smaller(x[:, :, 1:]).mean()

    measure = preferring("chain")
    choose_plans(Variants(ht_kernel), images(2, torch.float64, (7, 8, 6)), "measure", measure)
    assert measure.calls == 3


def test_ties_go_to_fewer_flops():
    timings = {
        "chain": PlanTiming(100, 1.010, 0.0),
        "tucker": PlanTiming(200, 1.000, 0.0),
        "dense": PlanTiming(900, 1.005, 0.0),
    }
    assert fastest(timings) == "chain"
    timings["chain"] = PlanTiming(100, 1.05, 0.0)
    assert fastest(timings) == "tucker"
    timings["chain"] = PlanTiming(100, 1.05, 0.04)  # within twice its error
    assert fastest(timings) == "chain"


def test_equal_flops_go_to_fewer_stages():
    assert fewest_flops({"chain": PlanTiming(5), "tucker": PlanTiming(5), "dense": PlanTiming(6)}) == "tucker"


def test_flops_policy_takes_the_fewest():
    model, x = small_net(), images()
    for name, choice in choose_plans(model, x, "flops", preferring()).items():
        counts = plan_flops(model.get_submodule(name), choice.input_shape)
        assert counts[choice.plan] == min(counts.values())
        assert choice.seconds is None


def test_standard_error_of_the_median_grows_with_the_spread_and_shrinks_with_the_rounds():
    assert median_and_error([2.0]) == (2.0, 0.0)
    wide, narrow = [1.0, 2.0, 3.0, 4.0], [2.4, 2.45, 2.55, 2.6]
    assert median_and_error(wide)[0] == pytest.approx(2.5)
    assert median_and_error(wide)[1] > 5 * median_and_error(narrow)[1]
    assert median_and_error(wide * 9)[1] == pytest.approx(median_and_error(wide)[1] / 3, rel=0.3)


def as_given(runs, _inputs, *, rounds, **_options):
    """In place of a timing of modules: the seconds that stand where the modules would."""
    return {name: [seconds] * rounds for name, seconds in runs.items()}


def test_timer_gives_up_on_hopeless_plans(monkeypatch):
    monkeypatch.setattr("common.deploy.plans.latency_samples", as_given)
    speeds = {"fast": 1.0, "near": 1.4, "hopeless": 1.6}
    samples = timer(lambda module, _: module, rounds=9, threads=None)(speeds, torch.zeros(1))
    assert {name: len(values) for name, values in samples.items()} == {"fast": 9, "near": 9, "hopeless": FIRST_ROUNDS}


def test_timer_calls_a_module_that_is_many_times_as_slow_but_a_few_times(monkeypatch):
    monkeypatch.setattr("common.deploy.plans.latency_samples", as_given)
    speeds = {"dense": 5.0, "fast": 1.0, "slow": 3.0}
    samples = timer(lambda module, _: module, rounds=9, threads=None)(speeds, torch.zeros(1))
    assert {name: len(values) for name, values in samples.items()} == {"dense": 1, "fast": 3, "slow": FIRST_ROUNDS}


@pytest.mark.parametrize("rounds", [1, 2, 9])
def test_what_was_looked_at_cold_is_no_sample_of_what_is_timed_on(monkeypatch, rounds):
    def slow_at_first(runs, _inputs, *, rounds, warmup=3, **_options):
        return {name: [1.0 if warmup > 1 else 3.0] * rounds for name in runs}

    monkeypatch.setattr("common.deploy.plans.latency_samples", slow_at_first)
    samples = interleaved({"one": None, "other": None}, torch.zeros(1), rounds=rounds, threads=None)
    assert samples == {"one": [1.0] * rounds, "other": [1.0] * rounds}


def timed_as(seconds):
    """In place of the timing of whole networks: these seconds, in their order."""
    return lambda runs, *_, **__: {way: [one] for way, one in zip(runs, seconds, strict=True)}


@pytest.mark.parametrize(("place", "expected"), [(0, "input-chain"), (1, "chain"), (2, "tucker"), (3, "dense")])
def test_a_network_is_timed_whole_too_in_the_plans_it_came_in_in_tucker_plans_and_dense(monkeypatch, place, expected):
    """Each layer's fastest plan alone is the input-chain here; the network is fastest in the one at `place`."""
    seconds = [1.0 if at == place else 2.0 for at in range(4)]
    monkeypatch.setattr(choose.Chooser, "_timer", lambda *_: preferring("input-chain"))
    monkeypatch.setattr(choose, "interleaved", timed_as(seconds))
    deployed = deploy(small_net(), images(), rounds=1)
    assert {deployed.plans[name] for name in ("first", "second")} == {expected}
    assert set(deployed.plans) == set(FACTORISED)
    with torch.no_grad():
        assert relative_error(deployed(images()), small_net()(images())) < 1e-4


def test_a_network_whose_other_plans_are_as_fast_keeps_its_layers_fastest(monkeypatch):
    seconds = [1.01, 1.0, 1.0, 1.0]
    monkeypatch.setattr(choose.Chooser, "_timer", lambda *_: preferring("input-chain"))
    monkeypatch.setattr(choose, "interleaved", timed_as(seconds))
    assert deploy(small_net(), images(), rounds=1).plans["first"] == "input-chain"


def test_a_factorised_layer_alone_deploys():
    layer, x = ht_kernel(), images(2, torch.float64, (7, 8, 6))
    deployed = deploy(layer, x, measure=preferring("tucker"), rounds=1)
    assert deployed.plans == {"": "tucker"}
    with torch.no_grad():
        assert relative_error(deployed(x), layer(x)) < 1e-10


# --- the report -------------------------------------------------------------------------------------------------------


def test_prediction_is_the_chosen_layers_and_the_rest():
    deployed = deploy(small_net(), images(), measure=preferring("dense"), rounds=2)
    layers = deployed.layers.values()
    assert [choice.seconds for choice in layers] == [1e-3] * len(FACTORISED)
    saved = sum(choice.seconds_before - choice.seconds for choice in layers)
    assert deployed.predicted_seconds == pytest.approx(deployed.reference_seconds - saved)
    assert deployed.measured_seconds > 0
    report = deployed.report()
    for expected in (*deployed.layers, "1 *", "predicted", "measured", "batch 3", "channels_last", "folded: 2"):
        assert expected in report


def test_report_without_measured_plans_states_flops():
    deployed = deploy(small_net(), images(), plans="flops", rounds=1)
    assert deployed.predicted_seconds is None
    assert "MFLOPs (multiply-accumulates) of one image" in deployed.report()
    dense = deploy(small_net(compressed=False), images(), rounds=1)
    assert dense.plans == {}
    assert "measured" in dense.report()


# --- options ----------------------------------------------------------------------------------------------------------


def test_memory_format_follows_the_option():
    x = images()
    last, plain = (
        deploy(small_net(), x, measure=preferring("tucker"), memory_format=chosen, rounds=1).model.first[1].weight
        for chosen in (None, "contiguous")
    )
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    assert plain.is_contiguous()
    measured = deploy(small_net(), x, plans="keep", memory_format="measure", rounds=1)
    assert measured.memory_format in ("channels_last", "contiguous")


def test_bfloat16():
    model, x = small_net(), images()
    deployed = deploy(model, x, dtype=torch.bfloat16, plans="flops", rounds=1)
    with torch.no_grad():
        expected = model(x)
    found = deployed(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), expected) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "tensorrt"}, r"runtime must be one of torch, onnxruntime, openvino; got 'tensorrt'"),
        ({"plans": "fastest"}, r"plans must be one of measure, flops, keep; got 'fastest'"),
        ({"memory_format": "nhwc"}, r"memory_format must be one of .*; got 'nhwc'"),
        ({"threads": 0}, r"threads must be at least 1; got 0"),
        ({"rounds": 0}, r"rounds must be at least 1; got 0"),
        ({"cuda_graph": True}, r"CUDA graphs need a CUDA device; the example is on cpu"),
        ({"runtime": "onnxruntime", "compile": True}, r"for the runtime 'torch'"),
        ({"runtime": "onnxruntime", "dtype": torch.float64}, r"float32 on the CPU.*got torch.float64"),
        ({"runtime": "onnxruntime", "memory_format": "channels_last"}, r"leave memory_format out"),
    ],
)
def test_options_that_cannot_be_met_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        deploy(small_net(), images(), **{"plans": "keep", "rounds": 1, **options})


def test_network_that_puts_out_nan_is_refused():
    model = small_net()
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="outputs differ"):
        deploy(model, images(), plans="keep", rounds=1)


def test_compilation_freezes_and_says_when_it_fails(monkeypatch):
    asked = {}

    def fake_compile(module, *, options):
        asked.update(options)
        return module

    x = images()
    monkeypatch.setattr(torch, "compile", fake_compile)
    deployed = deploy(small_net(), x, compile=True, plans="keep", rounds=1)
    assert asked == {"freezing": True, "triton.cudagraphs": False}
    assert "compiled" in deployed.report()
    compiled(small_net(), x, cuda_graph=True)
    assert asked["triton.cudagraphs"]

    def without_compiler(module, *, options):
        def run(_):
            raise RuntimeError("InvalidCxxCompiler: none found\nlong trace")

        return run

    monkeypatch.setattr(torch, "compile", without_compiler)
    with pytest.raises(ValueError, match=r"torch.compile failed .*InvalidCxxCompiler: none found\); it needs"):
        deploy(small_net(), x, compile=True, plans="keep", rounds=1)


def test_cuda_graph_is_recorded_after_a_warm_up_and_takes_one_shape(monkeypatch):
    """The sequence of calls, on a stand-in for the CUDA runtime that replays by running the module again."""
    events = []

    class Stream:
        def __init__(self, *_):
            pass

        def wait_stream(self, _):
            events.append("wait")

    class Context:
        def __init__(self, what=None, *_):
            self.name = "record" if isinstance(what, Graph) else "enter"

        def __enter__(self):
            events.append(self.name)

        def __exit__(self, *_):
            events.append(f"end {self.name}")

    class Graph:
        def replay(self):
            events.append("replay")

    for name, stand_in in {"Stream": Stream, "stream": Context, "device": Context, "graph": Context}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr("common.deploy.runtimes.check_cuda", lambda device: None)
    module = nn.Conv2d(3, 4, 1)
    module.register_forward_hook(lambda *_: events.append("run"))
    x = images()
    run = cuda_graph(module, x)
    assert events.count("run") == 4
    assert events.index("record") > [place for place, event in enumerate(events) if event == "run"][2]
    first = run(x)
    assert events[-1] == "replay"
    assert first.data_ptr() != run(x).data_ptr()  # a result is not overwritten by the next one
    with pytest.raises(ValueError, match=r"recorded for \(3, 3, 16, 12\).*got \(2, 3, 16, 12\)"):
        run(x[:2])


def test_target_describes_itself():
    assert str(Target("torch", True, True, 2)) == "torch, compiled, CUDA graph"
    assert str(Target("onnxruntime", False, False, 1)) == "onnxruntime"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"cuda_graph": True}, {"dtype": torch.bfloat16}])
def test_deploys_on_a_gpu(options):
    model, x = small_net(), images().cuda()
    deployed = deploy(model, x, rounds=2, **options)
    with torch.no_grad():
        expected = model(x.cpu())
    assert relative_error(deployed(x.to(options.get("dtype", x.dtype))).cpu().float(), expected) < 0.05


def test_replaced_modules_are_replaced_under_every_name():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    replaced = copy_with(model, {shared: nn.Identity()})
    assert replaced[0] is replaced[2]
    assert isinstance(replaced[0], nn.Identity)
    assert not any(isinstance(module, HTLayer) for module in replaced.modules())
