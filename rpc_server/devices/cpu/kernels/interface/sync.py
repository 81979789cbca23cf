"""What the threads of an executor share: the words of a program, and of its run.

A program can pause behind a record at which its threads meet, or within one that is cut into parts:
see ``rpc_server.devices.cpu.kernels.run``. Where it goes on is in the words ``FIRST`` to ``NEXT``.
"""

# Words of a program: addresses of its kernels, records, step flags and parts, how many records
# there are, and among how many threads a record is divided that is not cut into parts.
KERNELS, RECORDS, STEPS, PARTS, COUNT, SHARES = range(6)
PROGRAM_WORDS = 6

# Words of a run, by groups on cache lines of their own.
ARRIVED = 0
GENERATION = 8
# Set when the run ends behind the barrier at hand, by the thread that came to it last.
ENDS = 9
STATUS = 16
FAILED_AT = 17
# The record of the first thread that waits for a peer; -1 if none does.
WAITING_AT = 18
# The record at which the first thread goes on, and that of the others; whether theirs is done but
# for the barrier behind it.
FIRST = 24
REST = 25
MET = 26
# The first part that nobody has taken, of the record that is cut.
NEXT = 32

# From OWN on the words of each thread, on a cache line of its own: a timespec to read the clock by,
# and the nanoseconds that it has waited at barriers beyond a short while.
OWN = 40
OWN_WORDS = 8
TIME, LOST = 0, 2


def sync_words(n_threads: int) -> int:
    """Return how many words a run of so many threads has."""
    return OWN + n_threads * OWN_WORDS


# The status of a kernel that waits for a peer, and is to be called again when others had their
# turn; and that of a run which is not over.
AGAIN = 65
PAUSED = 66
