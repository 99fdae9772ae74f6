"""Everything a user can be told, one class per kind of trouble, each with its exit code.

    LayerBoostError                 1
    ├── UsageError                  2   a flag, recipe key or value that is not allowed
    ├── CheckpointError             3   a model that cannot be read, or read faithfully
    ├── PlanError                   4   a plan or sensitivity that does not fit, or a budget that cannot be met
    ├── DataError                   5   too little data, or data that cannot be read
    ├── EnvironmentTrouble          6   disk full, folder locked, no such device, out of memory
    ├── TrainingError               7   a loss or weight that is not finite
    └── VerificationError           8   a checkpoint does not compute what it should
                                  130   interrupted; the same command goes on

A message says what, the rule, what was found and what to do.
"""


class LayerBoostError(Exception):
    exit_code = 1


class UsageError(LayerBoostError, ValueError):
    exit_code = 2


class CheckpointError(LayerBoostError, ValueError):
    exit_code = 3


class PlanError(LayerBoostError, ValueError):
    exit_code = 4


class DataError(LayerBoostError, ValueError):
    exit_code = 5


class EnvironmentTrouble(LayerBoostError, RuntimeError):
    exit_code = 6


class TrainingError(LayerBoostError, RuntimeError):
    exit_code = 7


class VerificationError(LayerBoostError, RuntimeError):
    exit_code = 8


INTERRUPTED = 130

# torch has no one exception for it: the CPU's allocator, CUDA's and cuBLAS's each say it in their own words
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")


def out_of_memory(trouble: BaseException) -> bool:
    """Whether the machine or its device had no memory left."""
    return isinstance(trouble, MemoryError) or any(words in str(trouble).lower() for words in _NO_MEMORY)
