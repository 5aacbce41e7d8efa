"""Windows and macOS, as far as they can be tested without one: what is guarded, and what happens behind the guard."""

import ast
import multiprocessing
import pickle
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from r2kit import cache, doctor
from r2kit.data import files
from r2kit.data.datamodule import DataModule
from r2kit.inference import Classifier, choose_device
from r2kit.recipe_file import load_recipe
from r2kit.train import lock
from r2kit.train.signals import StopSignals

PACKAGE = Path(__file__).parent.parent / "r2kit"
POSIX_MODULES = {"fcntl", "grp", "pwd", "resource", "termios"}
POSIX_NAMES = {
    "os": {"fork", "forkpty", "getuid", "killpg", "setsid", "sched_getaffinity", "uname", "wait", "getpgid"},
    "signal": {"SIGUSR1", "SIGUSR2", "SIGKILL", "SIGHUP", "SIGCHLD", "pause"},
}


def guarded(tree: ast.Module) -> set[ast.AST]:
    """What stands inside a try that catches ImportError, or behind a condition with hasattr."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        catches = isinstance(node, ast.Try) and any("ImportError" in ast.dump(one) for one in node.handlers)
        asks = isinstance(node, ast.If | ast.IfExp) and "hasattr" in ast.dump(node.test)
        if catches or asks:
            found.update(ast.walk(node))
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_windows_lacks_is_guarded_and_texts_have_an_encoding(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    safe = guarded(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and {one.name for one in node.names} & POSIX_MODULES:
            assert node in safe, f"{path}:{node.lineno}: import without a guard"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            lacking = POSIX_NAMES.get(node.value.id, set())
            assert node.attr not in lacking or node in safe, f"{path}:{node.lineno}: {node.value.id}.{node.attr}"
        texts = ("read_text", "write_text")  # without an encoding Windows takes the code page of the machine
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in texts:
            assert any(word.arg == "encoding" for word in node.keywords), f"{path}:{node.lineno}: no encoding"


def test_without_posix_locks_a_run_goes_without(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    with lock.hold(tmp_path), lock.hold(tmp_path):
        assert not (tmp_path / lock.NAME).exists()


def test_without_posix_signals_two_are_left(monkeypatch):
    for name in ("SIGUSR1", "SIGUSR2", "SIGCHLD"):
        monkeypatch.delattr(signal, name, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        stop.training = True
        signal.raise_signal(signal.SIGTERM)
        assert stop.noted == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_where_only_spawn_exists_rasters_are_read_by_it(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert files.raster_start_method() == "spawn"


def test_what_loader_processes_are_given_survives_spawn(image_folder):
    """A spawned process gets its work pickled: no lambda, no open file, no local class."""
    transforms = "augment.transforms=[{name: GaussNoise, p: 0.5}]"
    recipe = load_recipe({}, [f"data.root={image_folder}", "data.image_size=32", transforms])
    module = DataModule(recipe.data, recipe.augment, seed=0, batch_size=4)
    module.setup()
    samples = module.train_dataloader().dataset
    again = pickle.loads(pickle.dumps(samples))
    first = module.split.train[0]
    assert torch.equal(again[(0, int(first))]["image"], samples[(0, int(first))]["image"])


@pytest.mark.parametrize(("platform", "part"), [("win32", "AppData"), ("darwin", "Library/Caches")])
def test_the_cache_has_the_platforms_own_place(platform, part, monkeypatch):
    monkeypatch.delenv("R2KIT_CACHE")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    assert part in cache.cache_folder().as_posix()


def test_the_doctor_speaks_of_windows_and_apples_gpu(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    said = "\n".join(doctor.examine())
    assert "Windows: loader processes start by spawn" in said
    assert "Apple GPU: present" in said
    assert choose_device("mps") == torch.device("mps")
    assert choose_device("auto").type != "mps"  # never tested there, so it must be asked for


class NoFloat64(TorchDispatchMode):
    """Stands for Apple's GPU, which has no float64, until tensors leave it."""

    left = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64 and result.ndim and not self.left:
            raise TypeError("the device does not support float64")
        return result


def test_predictions_need_no_float64_on_the_device(monkeypatch):
    device = NoFloat64()
    real = torch.Tensor.cpu

    def leave(tensor, *rest):
        device.left = True
        return real(tensor, *rest)

    monkeypatch.setattr(torch.Tensor, "cpu", leave)
    classify = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), "cpu")
    with device:
        probs = classify(torch.zeros(2, 3, 2, 2))
    assert device.left
    assert probs.shape == (2, 3)
    device.left = False
    with device, pytest.raises(TypeError, match="float64"):
        torch.zeros(2).double()
