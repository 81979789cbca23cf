"""Where the tests of each module are.

``tests/<folder>/test_<module>.py``, or ``test_<package>.py`` for all modules of a package; FOLDERS
says which folder. What is tried together with something else has its row in ELSEWHERE.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

TESTS = Path(__file__).parent

# Of a module the longest name that it begins with.
FOLDERS = {
    "protocol": "protocol",
    "client": "client",
    "rpc_server": "server",
    "rpc_server.devices": "cpu",
    "rpc_server.devices.cuda": "cuda",
    "rpc_server.devices.split": "split",
    "rpc_server.graph": "graph",
    "rpc_server.models": "models",
    "rpc_server.native": "native",
    "rpc_server.ops": "ops",
    "rpc_server.session": "session",
    "rpc_server.types": "types",
    "conformance": "conformance",
    "tools": "tools",
}

# By module or package: whatever of it has no test of its name is tried there.
ELSEWHERE = {
    # What ggml is, and the wire's declarations, by what is encoded with them.
    "protocol.ggml": "protocol/test_types_and_hashing.py",
    "protocol.ggml.ops": "protocol/test_dialects.py",
    "protocol.ggml.tables": "types/test_against_ggml.py",
    "protocol.codec": "protocol/test_messages.py",
    "protocol.commands": "protocol/test_dialects.py",
    "protocol.errors": "protocol/test_requests.py",
    "protocol.names": "graph/test_readings.py",
    "protocol.numbering": "graph/test_readings.py",
    "protocol.numbering_memory": "graph/test_readings.py",
    "protocol.observe": "protocol/test_conversation.py",
    "protocol.receive_buffer": "protocol/test_requests.py",
    "protocol.text": "server/test_logs.py",
    "protocol.token": "server/test_access.py",
    # Against servers of this project and of upstream; constructors together, as one class has them.
    "client.backend": "client/test_against_servers.py",
    "client.builder": "client/test_constructors.py",
    "client.errors": "client/test_connection.py",
    "client.model_header": "client/test_advice.py",
    "client.split": "client/test_split_backend.py",
    "client.split.address": "client/test_survey.py",
    "client.split.links": "split/test_groups.py",
    "client.tensors": "client/test_graph.py",
    "client.tunnel": "server/test_access.py",
    # The program, and what each session has, through its socket.
    "rpc_server.__main__": "server/test_command_line.py",
    "rpc_server.options": "server/test_command_line.py",
    "rpc_server.cache": "server/test_cache.py",
    "rpc_server.children": "split/test_cards.py",
    "rpc_server.net": "server/test_access.py",
    "rpc_server.net.announcer": "tools/test_workers.py",
    "rpc_server.net.timeouts": "server/test_limits.py",
    "rpc_server.observability": "server/test_metrics.py",
    "rpc_server.observability.history": "server/test_page.py",
    "rpc_server.session": "server/test_hostile.py",
    "rpc_server.session.buffers": "server/test_memory.py",
    "rpc_server.session.by_hash": "server/test_cache.py",
    "rpc_server.session.graph_memory": "server/test_graph_memory.py",
    "rpc_server.session.handlers.links": "split/test_groups.py",
    "rpc_server.session.handlers.split": "split/test_programs.py",
    "rpc_server.session.handshake": "server/test_handshake.py",
    "rpc_server.session.mapped": "server/test_models.py",
    "rpc_server.session.programs": "split/test_programs.py",
    "rpc_server.session.readings": "graph/test_readings.py",
    "rpc_server.session.uploads": "server/test_cache.py",
    "rpc_server.sockets": "server/test_listening.py",
    # Devices by what they compute. Kernels by the ops that use them; a kernel of a card by
    # tests/cuda/harness.py, beside the reference of its op.
    "rpc_server.devices.base": "cpu/test_device.py",
    "rpc_server.devices.registry": "cuda/test_registry.py",
    "rpc_server.devices.planning": "cpu/test_kinds.py",
    "rpc_server.devices.planning.group": "split/test_groups.py",
    "rpc_server.devices.planning.nodes": "cuda/test_device.py",
    "rpc_server.devices.planning.program": "split/test_programs.py",
    "rpc_server.devices.planning.transfers": "cuda/test_program.py",
    "rpc_server.devices.cpu": "cpu/test_device.py",
    "rpc_server.devices.cpu.assembly": "cpu/test_kinds.py",
    "rpc_server.devices.cpu.hashing": "models/test_hashing.py",
    "rpc_server.devices.cpu.instruction_sets": "cpu/test_matmul.py",
    "rpc_server.devices.cpu.kernels": "cpu/test_matmul.py",
    "rpc_server.devices.cpu.kernels.functions": "cpu/test_elementwise.py",
    "rpc_server.devices.cpu.kernels.hashing": "models/test_hashing.py",
    "rpc_server.devices.cpu.kernels.interface": "cpu/test_records.py",
    "rpc_server.devices.cpu.kernels.interface.stream": "split/test_programs.py",
    "rpc_server.devices.cpu.kernels.run": "cpu/test_executor.py",
    "rpc_server.devices.cpu.kernels.stream": "split/test_programs.py",
    "rpc_server.devices.cpu.mapped": "models/test_mapping.py",
    "rpc_server.devices.cpu.planner": "cpu/test_planning.py",
    "rpc_server.devices.cpu.scratch": "cpu/test_planning.py",
    "rpc_server.devices.cpu.storage": "cpu/test_pages.py",
    "rpc_server.devices.cpu.streaming": "split/test_programs.py",
    "rpc_server.devices.cuda": "cuda/test_device.py",
    "rpc_server.devices.cuda.compile": "cuda/test_nvrtc.py",
    "rpc_server.devices.cuda.kernels": "cuda/test_nvrtc.py",
    "rpc_server.devices.cuda.lower": "cuda/test_ops.py",
    "rpc_server.devices.cuda.lower.copy": "cuda/test_encode.py",
    "rpc_server.devices.cuda.lower.fused": "cuda/test_fusion.py",
    "rpc_server.devices.cuda.lower.library": "cuda/test_matmul.py",
    "rpc_server.devices.cuda.queue": "cuda/test_queues.py",
    "rpc_server.devices.cuda.storage": "cuda/test_queues.py",
    "rpc_server.devices.split": "split/test_products.py",
    "rpc_server.devices.split.candidates": "split/test_choice.py",
    "rpc_server.devices.split.holding": "split/test_several_coordinators.py",
    "rpc_server.devices.split.measure": "split/test_shares_by_speed.py",
    "rpc_server.devices.split.sharded": "split/test_subgraphs.py",
    "rpc_server.devices.split.weights": "split/test_storage.py",
    "rpc_server.devices.split.worker": "split/test_failures.py",
    "rpc_server.graph": "graph/test_parse.py",
    "rpc_server.native": "native/test_library.py",
    # Ops of one family, and what several contracts or references have in common.
    "rpc_server.ops.attention_back": "ops/test_training.py",
    "rpc_server.ops.checks": "ops/test_refusals.py",
    "rpc_server.ops.custom": "ops/test_refusals.py",
    "rpc_server.ops.fill": "ops/test_memory.py",
    "rpc_server.ops.gelu": "ops/test_elementwise.py",
    "rpc_server.ops.masks": "ops/test_softmax.py",
    "rpc_server.ops.rounding": "ops/test_matmul.py",
    "rpc_server.ops.rows": "ops/test_memory.py",
    "rpc_server.ops.slices": "ops/test_matmul.py",
    "rpc_server.ops.sliding": "ops/test_convolution.py",
    "rpc_server.types": "types/test_conversions.py",
    # Cases and reports by running them; families of random cases by drawing from each.
    "conformance.__main__": "conformance/test_suite.py",
    "conformance.arguments": "conformance/test_suite.py",
    "conformance.cases": "conformance/test_faults.py",
    "conformance.reports": "conformance/test_suite.py",
    "conformance.properties.__main__": "conformance/test_suite.py",
    "conformance.serve.faults": "conformance/test_serve.py",
    "conformance.differential": "conformance/test_differential_parts.py",
    "conformance.differential.campaign": "conformance/test_differential.py",
    "conformance.differential.__main__": "docs/test_extending.py",
    "conformance.differential.report": "conformance/test_differential.py",
    "conformance.differential.uncovered": "conformance/test_families.py",
    "conformance.differential.families": "conformance/test_families.py",
    # Tables for documents, checked by --check; what starts programs, by those that it starts.
    "tools.arguments": "tools/test_bench.py",
    "tools.captures": "protocol/test_captures.py",
    "tools.client_captures": "conformance/test_client_captures.py",
    "tools.documents": "tools/test_protocol_tables.py",
    "tools.bench.compare": "tools/test_bench_compare.py",
    "tools.bench.cores": "tools/test_bench_compare.py",
    "tools.bench.matmul": "tools/test_bench_kernels.py",
    "tools.bench.ops": "tools/test_bench_kernels.py",
    "tools.bench.profile": "tools/test_bench_kernels.py",
    "tools.bench.link_picture": "tools/test_bench_network.py",
    "tools.bench.relay": "tools/test_bench_network.py",
    "tools.bench.rest": "tools/test_bench_network.py",
    "tools.bench.sleeping": "tools/test_bench_network.py",
    "tools.bench.split": "tools/test_bench_network.py",
    "tools.models": "e2e/test_architectures.py",
    "tools.neighbour.catalogue": "tools/test_neighbour.py",
    "tools.neighbour.catalogue.workers": "tools/test_neighbour.py",
    "tools.op_table": "docs/test_extending.py",
    "tools.serving": "server/test_command_line.py",
    "tools.serving.llama_server": "tools/test_soak.py",
    "tools.serving.ports": "tools/test_bench_network.py",
    "tools.upstream": "e2e/test_old_clients.py",
    "tools.wire": "server/test_console.py",
}

# What is run or imported by its name alone, and by whom.
BY_NAME = {
    "conformance.differential.sketch": ("conformance.differential.families",),
    "conformance.serve.command_line": ("conformance.serve.__main__",),
    "conformance.suite.registry": ("conformance.cases",),
    "rpc_server.devices.cpu.catalog": ("rpc_server.devices.cpu.kernels",),
    "rpc_server.devices.cpu.planner": ("rpc_server.devices.cpu.lower",),
    "rpc_server.ops.table": ("rpc_server.ops",),
    "tests.docs.test_extending": ("conformance.differential.__main__", "tools.op_table"),
    "tools.aarch64.emulation": ("tools.aarch64.cross",),
    "tools.neighbour.site": ("tools.neighbour.attacker",),
    "tools.serving.processes": ("rpc_server.__main__",),
}


def _within(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")


def _nearest(module: str, names: Mapping[str, str]) -> str:
    """The value of the longest name that a module begins with, '' if there is none."""
    longest = max((name for name in names if _within(module, name)), key=len, default="")
    return names.get(longest, "")


def tests_of(module: str) -> Path | None:
    """The file of a module's tests; None if there is none where one looks for it."""
    if module in ELSEWHERE:
        return TESTS / ELSEWHERE[module]
    parts = module.split(".")
    names = [parts[-1], "_".join(parts[-2:]), *reversed(parts[1:-1])]
    folder = TESTS / _nearest(module, FOLDERS)
    own, *of_packages = (folder / f"test_{name}.py" for name in names)
    found = [own, of_packages[0], TESTS / (_nearest(module, ELSEWHERE) or "-"), *of_packages[1:]]
    return next((file for file in found if file.is_file()), None)
