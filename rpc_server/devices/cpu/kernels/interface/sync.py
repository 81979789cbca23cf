"""Words of the state that the threads of an executor share, each on a cache line of its own."""

ARRIVED = 0
GENERATION = 8
STATUS = 16
FAILED_AT = 24
SYNC_WORDS = 32
