"""Memory that the fast form keeps: pieces never overlap, come back with their tensors, and no fork shares them."""

import copy
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from torch import nn

import r2kit
from r2kit.backbones.fast import memory
from r2kit.backbones.res2net import Res2Net

pytestmark = pytest.mark.skipif(not memory._HAS_PAGES, reason="the system has no large pages")


@pytest.fixture
def arenas(monkeypatch):
    fresh = memory.Arenas()
    monkeypatch.setattr(memory, "ARENAS", fresh)
    return fresh


def free_bytes(arenas):
    arenas._collect()
    return sum(size for size, _ in arenas._by_size)


def test_pieces_keep_what_was_written_and_join_again(arenas):
    rng = random.Random(0)
    held = []
    for number in range(2000):
        if held and rng.random() < 0.5:
            piece, value = held.pop(rng.randrange(len(held)))
            assert (piece == value).all(), "another piece wrote here"
            del piece
        else:
            piece = arenas.take(rng.choice((1, 4159, 4160, 4161, 100_000, 900_000, 5_000_000)))
            assert piece.ctypes.data % 64 == 0
            piece[:] = number % 251
            held.append((piece, number % 251))
    for piece, value in held:
        assert (piece == value).all()
    before = arenas.capacity
    del piece
    held.clear()
    whole = sum(len(arena) // memory._GRAIN * memory._GRAIN for arena in arenas._arenas)
    assert free_bytes(arenas) == whole
    assert len(arenas._by_size) == len(arenas._arenas), "free neighbours did not join"
    assert arenas.capacity == before
    assert not arenas._lent


def test_a_piece_larger_than_an_arena(arenas):
    piece = arenas.take(memory._ARENA + 1)
    piece[-1] = 1
    assert arenas.capacity >= len(piece)


def test_what_goes_unused_is_given_back(arenas):
    large = arenas.take(3 * memory._ARENA)
    assert arenas.capacity >= 3 * memory._ARENA
    del large
    for _ in range(memory._CALM + 3):
        small = arenas.take(1000)
        del small
    assert arenas.capacity <= memory._ARENA


def test_threads(arenas):
    wrong = []

    def work(value):
        rng = random.Random(value)
        for _ in range(300):
            piece = arenas.take(rng.randrange(1, 300_000))
            piece[:] = value
            if not (piece == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert free_bytes(arenas) > 0
    assert not arenas._lent


def test_a_forked_process_writes_elsewhere(arenas):
    kept = arenas.take(1_000_000)
    kept[:] = 7
    with arenas._lock:  # as another thread may hold it
        child = os.fork()
        if child == 0:  # only system calls and writes: no test framework in here
            signal.alarm(20)
            kept[:] = 8
            arenas.take(2_000_000)[:] = 9
            os._exit(0 if (kept == 8).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    after = arenas.take(2_000_000)
    after[:] = 1
    assert (kept == 7).all()


@pytest.mark.parametrize("shape", [(2, 70, 33, 31), (1, 70_000, 1, 1), (40_000, 1, 1, 1), (3, 1, 300, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_is_as_torch_makes_it(arenas, shape, dtype):
    like = torch.zeros(1, dtype=dtype)
    made = memory.empty(like, shape)
    expected = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    assert made.shape == expected.shape
    assert made.dtype == dtype
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert not made._is_view()
    assert made.data_ptr() % 64 == 0
    assert arenas._lent
    values = torch.randn(shape, dtype=dtype)
    made.copy_(values)
    assert torch.equal(copy.deepcopy(made), values)
    assert torch.equal(made, values)
    del made
    assert free_bytes(arenas) > 0
    assert not arenas._lent


def test_small_ones_are_torchs_own(arenas):
    memory.empty(torch.zeros(1), (1, 8, 4, 4))
    assert arenas.capacity == 0


def test_without_memory_torch_is_asked(arenas, monkeypatch):
    def none(size):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(arenas, "take", none)
    assert memory.empty(torch.zeros(1), (4, 64, 64, 64)).shape == (4, 64, 64, 64)


def test_training_needs_no_more_from_step_to_step(arenas):
    net = r2kit.optimize(Res2Net((1, 1, 1, 1), channels=(32,) * 4, num_classes=3, base_width=64)).train()
    image = torch.randn(8, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    seen = []
    for _ in range(5):
        net.zero_grad(set_to_none=True)
        net(image).sum().backward()
        seen.append(arenas.capacity)
    assert seen[0] > 0
    assert len(set(seen[1:])) == 1
    kept = {name: p.grad.clone() for name, p in net.named_parameters()}
    net(image).sum()  # what is freed and taken again must not be what is still held
    assert all(torch.equal(p.grad, kept[name]) for name, p in net.named_parameters())


def test_an_output_may_change_in_place(arenas):
    plain = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(inplace=True)).double()
    fast = nn.Sequential(r2kit.optimize(copy.deepcopy(plain[:2])), nn.ReLU(inplace=True))
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    outputs = [net(image) for net in (plain, fast)]
    assert arenas._lent
    for out in outputs:
        (out**2).sum().backward()
    np.testing.assert_allclose(outputs[0].detach(), outputs[1].detach(), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(plain[0].weight.grad, fast[0][0].weight.grad, rtol=1e-9, atol=1e-9)
