"""The result of a check as text that one reads, and sends in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tools.gpu_check.kernels import LARGEST_ERROR


def _card(result: Mapping[str, Any]) -> Iterator[str]:
    card = result.get("card")
    if card:
        yield f"card      {card['description']}, {card['total']} MiB, {card['free']} MiB free"
    if result.get("driver"):
        yield f"driver    {result['driver']}"
    machine = result["machine"]
    yield f"machine   {machine['processor']}, {machine['cores']} cores, {machine['system']}"
    if result["emulated"]:
        yield "EMULATED: no card has been used; shapes are small and times mean nothing"


def _kernels(result: Mapping[str, Any]) -> Iterator[str]:
    ops = result.get("ops")
    if ops:
        failed = sum(len(f) for f in ops["failed"].values())
        yield (
            f"ops       {ops['cases']} cases beside {ops['reference']} in {ops['seconds']:.0f} s: "
            + (f"{failed} DIFFER" if failed else "no difference")
        )
        for name, reasons in ops["failed"].items():
            yield from (f"            {name} {reason}" for reason in reasons)
    layers = result.get("layers", [])
    if layers:
        wrong = [row for row in layers if not row["right"]]
        worst = max(row["error"] for row in layers)
        yield (
            f"layers    {len(layers)} of {len({r['weights'] for r in layers})} types of weights: "
            f"error {worst:.1e} at most, {LARGEST_ERROR:.0e} allowed"
            + (f"; {len(wrong)} WRONG" if wrong else "")
        )
        for row in wrong:
            what = f"{row['weights']}, {row['tokens']} tokens"
            if row.get("before"):
                what += f" behind {row['before']}"
            yield f"            {what}: {row['error']:.2e}"
    graphs = result.get("graphs")
    if graphs:
        yield (
            f"graphs    {graphs['changed']} of {graphs['growing']} went on when the cache had grown"
            + ("" if graphs["changed"] else ": THE DRIVER DOES NOT CHANGE THEM, see the log")
        )
    coverage = result.get("coverage")
    if coverage:
        yield (
            f"kernels   {coverage['kernels_run']} of {coverage['kernels']} have run, "
            f"compiled {coverage['compiled']} times for types and sizes"
        )
        if coverage["not_run"]:
            yield f"            not: {', '.join(coverage['not_run'])}"


def _speed(result: Mapping[str, Any]) -> Iterator[str]:
    speed = result.get("speed")
    if not speed:
        return
    model = speed["model"]
    layers = f"{model['layers']} layers"
    if model["layers"] != model["layers_of_model"]:
        layers += f" of {model['layers_of_model']}, as many as there is memory for"
    yield f"model     {model['name']}, random weights, {layers}, {model['bytes'] / 2**30:.2f} GiB"
    rows = [(name, speed[name]) for name in ("ours", "upstream") if name in speed]
    yield f"{'':12}{'decode t/s':>12}{'GB/s':>9}{'prompt t/s':>12}{'new graph ms':>14}"
    for name, of in rows:
        yield (
            f"  {name:10}{of['decode_tokens_per_second']:12.1f}"
            f"{of['decode_bytes_per_second'] / 1e9:9.1f}{of['prompt_tokens_per_second']:12.0f}"
            f"{of['new_graph_seconds'] * 1e3:14.1f}"
        )
    if "upstream" in speed:
        ours, theirs = speed["ours"], speed["upstream"]
        keys = ("decode_tokens_per_second", "decode_bytes_per_second", "prompt_tokens_per_second")
        decode, _, prompt = (ours[key] / theirs[key] for key in keys)
        yield f"  {'ratio':10}{decode:12.2f}{'':9}{prompt:12.2f}"


def text(result: Mapping[str, Any]) -> str:
    """Return a line or two for each part of what a check found."""
    lines = [*_card(result), *_kernels(result), *_speed(result)]
    lines += [f"ERROR     {what}: {why}" for what, why in result["errors"].items()]
    lines.append("all is well" if result["right"] else "SOMETHING IS WRONG, see above")
    return "\n".join(lines)
