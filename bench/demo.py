"""How the stored runs of `fastadapt demo` read; it is measured by the command itself."""

from __future__ import annotations

from bench import page
from bench.plots import Document


@page.section("demo-all", "The demo with every method", "fastadapt demo --all --json FILE")
@page.section("demo", "The demo", "fastadapt demo --json FILE")
def section(document: Document) -> str:
    served, settings = document["served"]["rows"], document["settings"]
    rows = [
        f"{row['method']} | {row['topic']} | {row['trainable']:,} | {row['loss_before']:.2f} → {row['loss_after']:.2f} "
        f"| {row['x_peft']:.2f} | {row['saved_bytes'] / row['peft_saved_bytes']:.2f} | "
        f"{row['difference_from_peft']:.0e}"
        for row in document["rows"]
    ]
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in document.get("parts", {}).items())
    return (
        f"SmolLM2-135M-Instruct, {settings['steps']} steps for each adapter: {document['seconds']:.0f} s once the "
        f"model is loaded{f' ({parts})' if parts else ''}. {sum(row['equal'] for row in served)} of {len(served)} rows "
        "of the mixed batch answer as alone. On its short rows Python's share is large, and VeRA pays for the memory "
        "that it does not keep.\n\n"
    ) + page.table("| topic | trained | held-out loss | step, x PEFT | kept, x PEFT | logits differ", rows)
