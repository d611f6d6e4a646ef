"""A layer moves between any two frameworks with its weights, and gives the same output."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from pquant_lightning import compress_model, export_model, get_backend, load_jax, to_jax, to_keras, to_nnx
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.errors import OptionError

FRAMEWORKS = ("pytorch", "tensorflow", "jax")
LAYERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "linear": ({"in_features": 5, "out_features": 3}, (4, 5)),
    "conv1d": ({"in_channels": 2, "out_channels": 3, "kernel_size": 3}, (4, 2, 9)),
    "conv2d": ({"in_channels": 2, "out_channels": 4, "kernel_size": 3, "groups": 2, "padding": 1}, (4, 2, 9, 9)),
    "embedding": ({"num_embeddings": 7, "embedding_dim": 3}, ()),
    "layer_norm": ({"normalized_shape": (6,)}, (4, 6)),
    "rms_norm": ({"normalized_shape": (6,)}, (4, 6)),
    "group_norm": ({"num_groups": 2, "num_channels": 4}, (3, 4, 5)),
    "batch_norm1d": ({"num_features": 3}, (4, 3)),
    "batch_norm2d": ({"num_features": 3}, (4, 3, 5, 5)),
}
X = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
COMPRESSED: dict[str, dict[str, Any]] = {
    "low_rank": {"rank": 4},
    "tensor_train": {"rank": 3},
    "ptq": {"min_saving": 0.0},
    "ptq dynamic": {"scheme": "dynamic", "min_saving": 0.0},
    "ptq 4 bits": {"bits": 4, "scheme": "weight_only", "group_size": 8},
}


def moved(kind: str, config: Any, weights: dict[str, Any], x: Tensor) -> dict[str, np.ndarray]:
    """Outputs by framework; from each the weights go on to the next one."""
    outputs = {}
    for name in FRAMEWORKS:
        backend = get_backend(name)
        layer = backend.create_layer(kind, config)
        backend.set_weights(layer, weights)
        outputs[name] = np.asarray(backend.forward(layer, x))
        weights = backend.get_weights(layer)
    return outputs


def check(kind: str, config: Any, weights: dict[str, Any], x: Tensor, expected: Tensor) -> None:
    for name, output in moved(kind, config, weights, x).items():
        np.testing.assert_allclose(output, expected.detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", LAYERS)
def test_ordinary_layers(kind: str) -> None:
    config, shape = LAYERS[kind]
    torch.manual_seed(0)
    source = get_backend("pytorch").create_layer(kind, config)
    for tensor in source.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    x = torch.randn(shape) if shape else torch.randint(7, (4, 3))
    check(kind, config, get_backend("pytorch").get_weights(source), x, source.eval()(x))


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_layers(name: str) -> None:
    torch.manual_seed(0)
    model = compress_model(
        nn.Sequential(nn.Linear(24, 40)), name.split()[0], train_loader=[X], **COMPRESSED[name]
    ).eval()
    ((_, layer),) = compressed_layers(model).items()
    check(layer.kind, layer.spec, get_backend("pytorch").get_weights(layer), X, layer(X))


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_weights_that_do_not_fit(name: str) -> None:
    backend = get_backend(name)
    layer = backend.create_layer("linear", {"in_features": 3, "out_features": 2})
    weight, bias = np.zeros((2, 3), "float32"), np.zeros(2, "float32")
    with pytest.raises(OptionError, match="no weight 'weigth'. Did you mean 'weight'"):
        backend.set_weights(layer, {"weigth": weight, "bias": bias})
    with pytest.raises(OptionError, match="'bias' is missing"):
        backend.set_weights(layer, {"weight": weight})
    with pytest.raises(OptionError, match=r"'weight' has shape \(2, 3\), got \(3, 2\)"):
        backend.set_weights(layer, {"weight": weight.T, "bias": bias})
    with pytest.raises(OptionError, match="'weight' is of type float32, got int64"):
        backend.set_weights(layer, {"weight": weight.astype("int64"), "bias": bias})


def test_a_function_in_jax_is_pure_and_differentiable() -> None:
    import jax

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).eval()
    function, params = to_jax(net, X)
    gradient = jax.grad(lambda p: function(p, X.numpy()).sum())(params)
    net(X).sum().backward()
    np.testing.assert_allclose(gradient["0.weight"], net[0].weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["jax", "tensorflow"])
def test_tied_weights_are_stored_once(kind: str, tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(500, 64), nn.Linear(64, 500, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens))

    assert export_model(Tied(), torch.arange(12).view(3, 4), tmp_path / "tied", kind).ratio < 1.2


def test_a_file_for_jax_takes_its_inputs_in_three_ways(tmp_path: Path) -> None:
    export_model(nn.Linear(24, 8), X, tmp_path / "net", "jax")
    program, params = load_jax(tmp_path / "net")
    for inputs in (X.numpy(), [X.numpy()], {"input": X.numpy()}):
        (output,) = program(params, inputs)
        assert output.shape == (16, 8)


def test_several_outputs_have_names() -> None:
    class Two(nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
            return {"sum": first + second, "product": first * second}

    function, params = to_jax(Two(), {"first": X, "second": X})
    found = function(params, first=X.numpy(), second=X.numpy())
    assert set(found) == {"sum", "product"}
    np.testing.assert_allclose(found["product"], X * X)


def test_arguments_may_come_in_any_order() -> None:
    class Difference(nn.Module):
        def forward(self, second: Tensor, first: Tensor, factor: float = 1.0) -> Tensor:
            return (second - first) * factor

    function, params = to_jax(Difference(), {"second": X, "first": 2 * X, "factor": 3.0})
    for args, kwargs in (((X, 2 * X), {}), ((X,), {"first": 2 * X}), ((), {"first": 2 * X, "second": X})):
        arrays = [x.numpy() for x in args], {name: x.numpy() for name, x in kwargs.items()}
        np.testing.assert_allclose(function(params, *arrays[0], **arrays[1]), -3 * X)
    with pytest.raises(TypeError, match="first"):
        function(params, X.numpy())


def test_an_nnx_module_trains_its_floats_and_keeps_its_integers() -> None:
    import jax.numpy as jnp
    from flax import nnx

    torch.manual_seed(0)
    small = compress_model(nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 2)), "ptq", scheme="dynamic")
    module = to_nnx(small, X)
    assert module.constants["0.codes"][...].dtype == jnp.int8
    module = to_nnx(nn.Sequential(nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 1)), X)

    def loss(module: Any) -> Any:
        return (module(jnp.asarray(X.numpy())) ** 2).mean()

    before = float(loss(module))
    gradient = nnx.grad(loss)(module)
    for name, parameter in module.params.items():
        parameter[...] = parameter[...] - 0.1 * gradient["params"][name][...]
    assert float(loss(module)) < before


def test_a_keras_layer_trains_inside_of_a_model() -> None:
    import keras

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 1))
    layer = to_keras(net, X)
    model = keras.Sequential([keras.Input((24,)), layer])
    np.testing.assert_allclose(model.predict(X.numpy(), verbose=0), net(X).detach().numpy(), rtol=1e-5, atol=1e-6)
    model.compile("sgd", "mse")
    losses = model.fit(X.numpy(), np.ones((16, 1)), epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    integers = to_keras(compress_model(net, "ptq", scheme="dynamic", min_saving=0.0), X)
    assert all("codes" not in variable.path for variable in integers.trainable_variables)
