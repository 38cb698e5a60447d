"""Texts: equal to a list of str, in memory that loader processes share."""
import gc
import multiprocessing

import numpy as np
import psutil
import pytest
import torch

from glmc.data import texts
from glmc.data.texts import Texts

NAMES = ['a/0.png', '', 'ü/日本.jpg', 'not\udcff utf-8', 'a/0.png', '\U0001f980']


def test_equals_the_list(monkeypatch):
    monkeypatch.setattr(texts, 'CHUNK', 4)  # an iteration of two chunks
    kept = Texts.of(iter(NAMES))
    assert list(kept) == NAMES == [kept[index] for index in range(len(NAMES))] and kept[-1] == NAMES[-1]
    assert kept == NAMES and kept != NAMES[:-1] and kept != NAMES[::-1] and kept != 6
    assert kept[1:3] == NAMES[1:3] and kept[::-2] == NAMES[::-2] and Texts.of(kept) is kept
    assert 'ü/日本.jpg' in kept and 'b' not in kept
    with pytest.raises(IndexError):
        kept[len(NAMES)]
    assert Texts.of([]) == [] and Texts.of(['']) == ['']


def test_takes_in_any_order_without_copying_the_bytes():
    kept = Texts.of(NAMES)
    taken = kept.take(np.array([4, 2, 2]))
    assert taken == [NAMES[4], NAMES[2], NAMES[2]] and taken.data.data_ptr() == kept.data.data_ptr()
    assert taken.take(np.array([1])) == [NAMES[2]]


def _private_bytes(names, pipe):
    gc.freeze()
    before = psutil.Process().memory_full_info().uss
    for index in range(len(names)):
        names[index]
    pipe.send(psutil.Process().memory_full_info().uss - before)


@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='no fork')
def test_a_forked_process_that_reads_all_copies_nothing():
    plain = [f'class/{index:08}.png' for index in range(100_000)]
    used = []
    for names in (Texts.of(plain), plain):
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context('fork').Process(target=_private_bytes, args=(names, there))
        process.start()
        used.append(here.recv())
        process.join()
    assert used[0] < 2 ** 21 < used[1]  # 2.6 MiB of bytes and bounds; a list has 6.9 MiB of str


def test_pickling_between_processes_shares_the_memory():
    kept, queue = Texts.of(NAMES), torch.multiprocessing.SimpleQueue()
    queue.put(kept)
    received = queue.get()
    assert received == NAMES and kept.data.is_shared() and received.data.is_shared()
