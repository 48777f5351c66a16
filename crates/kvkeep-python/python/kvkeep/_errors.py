"""What can go wrong, by meaning. One class for each error of the library, each a `KvkeepError`
and, where there is one, the built-in exception of that meaning.

A miss is `None` and a rejection is a value (`Outcome`, `StoreReport`): neither is raised.
"""


class KvkeepError(Exception):
    """Any error of kvkeep. Its message says what to do."""


class ConfigError(KvkeepError, ValueError):
    """A setting that makes no cache: a size or a time that is not positive and finite."""


class LayoutError(KvkeepError, ValueError):
    """A KV layout with a zero or absurd dimension."""


class EmptyTokensError(KvkeepError, ValueError):
    """No tokens were given."""


class TokenIdError(KvkeepError, ValueError):
    """Something that is no list of token ids: integers from 0 to 2**32 - 1."""


class EmptyPrefixError(KvkeepError, ValueError):
    """An empty prefix text."""


class ZeroLayersError(KvkeepError, ValueError):
    """No layers were given or asked for."""


class LayerOutOfRangeError(KvkeepError, IndexError):
    """A layer that the layout, or the limit of 4,096, does not have."""


class LayerCountError(KvkeepError, ValueError):
    """More or fewer layers than asked for."""


class BlockOutOfRangeError(KvkeepError, IndexError):
    """A block that was not matched."""


class DuplicateLayerError(KvkeepError, ValueError):
    """The same layer twice in one batch."""


class DTypeMismatchError(KvkeepError, TypeError):
    """A tensor whose dtype is not the layout's."""


class ShapeMismatchError(KvkeepError, ValueError):
    """A tensor whose shape is not the layout's."""


class BufferLengthError(KvkeepError, ValueError):
    """Memory that is not as long as its shape and dtype say."""


class RankError(KvkeepError, ValueError):
    """A tensor of more than 8 dimensions."""


class EmptyTensorError(KvkeepError, ValueError):
    """A tensor without elements."""


class SizeOverflowError(KvkeepError, OverflowError):
    """A size that does not fit the machine's words."""


class CastError(KvkeepError, TypeError):
    """Memory that cannot be read as elements of the asked-for type."""


class OverlapError(KvkeepError, ValueError):
    """Tensors to be written that share memory."""


class OutOfMemoryError(KvkeepError, MemoryError):
    """Memory or address space that the operating system does not give."""


class UnsupportedTensorError(KvkeepError, TypeError):
    """Something that is no tensor that can be kept, or written: neither a torch tensor nor a numpy
    array, a dtype that is not kept, or, to be written, one that is not contiguous."""


class ClosedError(KvkeepError, ValueError):
    """A match that was closed."""


class DeviceError(KvkeepError, RuntimeError):
    """A device that is not there."""


class ForkError(KvkeepError, RuntimeError):
    """A cache used in a child of the process that made it."""


class DiskError(KvkeepError, OSError):
    """A disk tier's directory that cannot be opened, flushed or closed."""


class DiskLockedError(DiskError):
    """A disk tier's directory that another process has open."""


class DiskRefusedError(DiskError):
    """A disk tier that was written with another key, or none, or by another release."""


class NoDiskError(KvkeepError, RuntimeError):
    """A call that needs a disk tier, to a cache that has none."""


class UnsupportedModelError(KvkeepError, TypeError):
    """A model whose state cannot be cut by token, so that no prefix of it can be reused."""
