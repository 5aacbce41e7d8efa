"""Out of eager Python: one graph for the compiler, a program of any batch and size, and the same numbers from ONNX.

By default a small network does all of it; marked slow, every name of the family does.
"""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from r2kit.backbones import create_model
from r2kit.catalog import CATALOG

SMALL = {"layers": (1, 2, 1, 1), "channels": (8, 16, 32, 64)}
# timm's own networks leave Python by timm's own code; ONNX is asked of one of each kind.
ONNX_OF_TIMM = {"res2net50d", "res2next50", "dla60_res2net", "resnest14d", "resnest50d_4s2x40d"}

pytestmark = pytest.mark.usefixtures("libraries_may_warn")


class Network(NamedTuple):
    """A network in `eval` mode, and the square of which its image sides are multiples."""

    name: str
    model: nn.Module
    unit: int

    @property
    def any_size(self) -> bool:
        """Whether one program serves every size. ScaleNet's pools and its way of resizing depend on the size."""
        return not self.name.startswith("scalenet")

    def images(self, batch: int, height: int = 2, width: int = 3) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        return torch.randn(batch, 3, height * self.unit, width * self.unit, generator=generator)


@pytest.fixture(scope="module")
def libraries_may_warn() -> Iterator[None]:
    """Exporters and compilers deprecate parts of themselves in every release; none of it is ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(
    scope="module", params=["small", *(pytest.param(entry.name, marks=pytest.mark.slow) for entry in CATALOG)]
)
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    name, options = ("res2netplus50", SMALL) if request.param == "small" else (request.param, {})
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, **options).eval()
    yield Network(name, model, 4 if name.startswith("cifar") else 32)
    torch._dynamo.reset()


def export(network: Network, height: int, width: int) -> ExportedProgram:
    """Export for any batch; for any size too, where the network can."""
    dims: dict[int, object] = {0: Dim("batch", min=1, max=64)}
    if network.any_size:
        dims |= {2: network.unit * Dim("rows", min=1, max=64), 3: network.unit * Dim("columns", min=1, max=64)}
    return torch.export.export(network.model, (network.images(2, height, width),), dynamic_shapes=(dims,))


@pytest.fixture(scope="module")
def programs(network: Network, libraries_may_warn: None) -> dict[tuple[int, int], ExportedProgram]:
    """The program for each of two sizes: one and the same, where it serves any."""
    first = export(network, 2, 3)
    return {(2, 3): first, (3, 2): first if network.any_size else export(network, 3, 2)}


@torch.no_grad()
def test_compiles_as_one_graph(network: Network) -> None:
    compiled = torch.compile(network.model, fullgraph=True, backend="eager")
    x = network.images(2)
    torch.testing.assert_close(compiled(x), network.model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_exports_with_any_batch(network: Network, programs: dict) -> None:
    for size, program in programs.items():
        for batch in (1, 3):
            x = network.images(batch, *size)
            torch.testing.assert_close(program.module()(x), network.model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_onnx_agrees(network: Network, programs: dict) -> None:
    if next(e for e in CATALOG if e.name == network.name).owner == "timm" and network.name not in ONNX_OF_TIMM:
        pytest.skip("timm's own code; one of each kind is asked")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    session, program = None, None
    for size, wanted in programs.items():
        if session is None or wanted is not program:
            program = wanted
            # Unoptimised, as the optimiser takes most of the time; onnxruntime has its own.
            made = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
            session = onnxruntime.InferenceSession(made.model_proto.SerializeToString())
        for batch in (1, 3):
            x = network.images(batch, *size)
            (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), network.model(x), rtol=1e-3, atol=1e-4)


SMALL_OF_EACH = {
    "res2net50d": {**SMALL, "stem_width": 8},
    "res2netplus50d": SMALL,
    "blres2net50": {"layers": (2, 2, 2, 2)},
    "resnest50d_2s2x40d": {"layers": (1, 2, 1, 1), "channels": (16, 32, 64, 128), "stem_width": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL_OF_EACH)
def test_the_default_compiler_trains(name: str) -> None:
    """What `torch.compile` does when nothing else is said gives eager's loss and gradients."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, **SMALL_OF_EACH[name]).train()
    x = torch.randn(4, 3, 64, 64)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.load_state_dict(state)
        model.zero_grad()
        loss = nn.functional.cross_entropy(run(x), torch.arange(4))
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    torch._dynamo.reset()
    (eager_loss, eager), (loss, grads) = found
    torch.testing.assert_close(loss, eager_loss, rtol=1e-4, atol=1e-4)
    largest = max(grad.abs().max().item() for grad in eager)
    for grad, expected in zip(grads, eager, strict=True):  # some are zero but for rounding, in front of a BN
        torch.testing.assert_close(grad, expected, rtol=1e-2, atol=1e-4 * largest)
