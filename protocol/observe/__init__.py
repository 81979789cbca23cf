"""A connection that others have, read from outside: captures, recordings, reports."""
