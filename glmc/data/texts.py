"""Many short texts in a few arrays, which loader processes share instead of copying."""
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

CHUNK = 2 ** 16  # texts that an iteration decodes at once
CODING = 'utf-8', 'surrogatepass'  # also keeps names that are not UTF-8


class Texts(Sequence):
    """A sequence of N str, held as bytes.

    A list of str would be copied page by page into each forked process that reads it, because reading changes the
    reference count inside each element. Processes that are started in another way get tensors as shared memory.

    Args:
        data: uint8 bytes of the texts.
        starts, stops: (N,) int64 bounds of each text in `data`.
    """

    def __init__(self, data: Tensor, starts: Tensor, stops: Tensor):
        self.data, self.starts, self.stops = data, starts, stops

    @classmethod
    def of(cls, texts: Iterable[str]) -> 'Texts':
        """The same texts; `texts` itself if it is a `Texts`."""
        if isinstance(texts, cls):
            return texts
        data, lengths = bytearray(), []
        for text in texts:
            encoded = text.encode(*CODING)
            data += encoded
            lengths.append(len(encoded))
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        return cls(torch.frombuffer(data or bytearray(1), dtype=torch.uint8), bounds[:-1], bounds[1:])

    def take(self, indices: np.ndarray) -> 'Texts':
        """The texts at (M,) indices, in this order; the bytes are shared."""
        indices = torch.from_numpy(np.ascontiguousarray(indices))
        return Texts(self.data, self.starts[indices], self.stops[indices])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int | slice) -> 'str | Texts':
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        start, stop = self.starts.numpy()[index], self.stops.numpy()[index]
        return self.data.numpy()[start:stop].tobytes().decode(*CODING)

    def __iter__(self) -> Iterator[str]:
        data = memoryview(self.data.numpy())
        for first in range(0, len(self), CHUNK):
            bounds = (each[first:first + CHUNK].tolist() for each in (self.starts, self.stops))
            yield from (str(data[start:stop], *CODING) for start, stop in zip(*bounds, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None

    def __repr__(self) -> str:
        return f'Texts({list(self[:3])}, {len(self)} in all)'
