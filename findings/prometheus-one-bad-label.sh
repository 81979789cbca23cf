#!/usr/bin/env bash
# Surprise: One label value that isn't UTF-8 takes away all metrics: prometheus_client takes it,
# and from then on generate_latest() raises UnicodeEncodeError, for every metric of the registry
# and for good.
#
# Why a good guess is wrong: Label values are checked for their number and turned into str when
# they are set, so that one expects a wrong one to be refused there, or to be escaped when it is
# written, as quotes and line breaks are.
#
# Who it hurts: Exporters that label by what comes from outside: names of files or programs by
# os.fsdecode, as Python gives them, or text off a wire decoded with surrogateescape. A server
# answers scrapes with errors from then on.
#
# Seen with: prometheus-client 0.26.0
. "$(dirname "$0")/common.bash"
install prometheus-client==0.26.0
venv/bin/python - <<'PYTHON'
import os
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Gauge, generate_latest

registry = CollectorRegistry()
sizes = Gauge("size_bytes", "Size of a file.", ["file"], registry=registry)
sizes.labels("model.gguf").set(1)
assert b'size_bytes{file="model.gguf"} 1.0' in generate_latest(registry)
# A name in Latin-1, as os.listdir would give it.
name = os.fsdecode("modèle.gguf".encode("latin-1"))
sizes.labels(name).set(2)
print(f"prometheus-client {version('prometheus-client')} takes {name!a}")
try:
    generate_latest(registry)
except UnicodeEncodeError as error:
    print("generate_latest:", error)
else:
    raise SystemExit("this has changed: the metrics were written")
PYTHON
