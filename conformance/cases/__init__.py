"""The cases, by subject; every module here is loaded (conformance.suite says how to write one)."""
