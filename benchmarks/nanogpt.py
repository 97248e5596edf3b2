"""nanoGPT's character-level run for a laptop's processor, by llmfast and by plain PyTorch: wall time and final loss.

    python benchmarks/nanogpt.py input.txt [--steps 2000] [--dtype bfloat16] [--json result.jsonl]

The result is not one for benchmarks/report.py.

Each side is a process of its own, timed from its start to its end, with data preparation, validation and, for llmfast,
checkpoints. The peer follows nanoGPT's `train.py` with the settings that its README gives for a CPU (4 layers, 4 heads,
width 128, 64 characters of context, 12 sequences a step, no dropout, no compilation, torch.optim.AdamW); its network is
the demo's plain PyTorch model with the exact GELU, which is nanoGPT's. llmfast runs configs/shakespeare_char.toml, in
float32 or, with bfloat16 weights and float32 masters, in bfloat16; the peer runs in float32, as nanoGPT does on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "shakespeare_char.toml"
T, B, EVERY, BATCHES = 64, 12, 250, 20
WARMUP, LR, LEAST_LR = 100, 1e-3, 1e-4


def peer(text: Path, steps: int) -> float:
    """Trains in plain PyTorch and returns the last validation loss, in nats a character."""
    from llmfast.cli.demo_peer import PlainGPT
    from llmfast.models import PRESETS

    torch.manual_seed(1337)
    content = text.read_text(encoding="utf-8")
    ids = {character: i for i, character in enumerate(sorted(set(content)))}
    data = torch.tensor([ids[character] for character in content])
    split = int(0.9 * len(data))
    parts = {"train": data[:split], "val": data[split:]}
    model = PlainGPT(PRESETS["gpt-nano"].replace(vocab_size=len(ids), activation="gelu"))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            into_stream = name.endswith(("out.weight", "down.weight"))
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(8) if into_stream else 0.02)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.99))

    def batch(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        source = parts[part]
        starts = torch.randint(len(source) - T, (B,))
        return torch.stack([source[i : i + T] for i in starts]), torch.stack(
            [source[i + 1 : i + 1 + T] for i in starts]
        )

    @torch.no_grad()
    def evaluate() -> float:
        losses = {part: sum(model(*batch(part)).item() for _ in range(BATCHES)) / BATCHES for part in parts}
        return losses["val"]

    for step in range(steps):
        if step % EVERY == 0:
            print(f"step {step}: validation loss {evaluate():.4f}", file=sys.stderr)
        done = (step - WARMUP) / max(1, steps - WARMUP)
        rate = (
            LEAST_LR + 0.5 * (1 + math.cos(math.pi * done)) * (LR - LEAST_LR) if step >= WARMUP else LR * step / WARMUP
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        model(*batch("train")).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return evaluate()


def timed(command: list[str]) -> tuple[float, str]:
    start = time.perf_counter()
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - start, result.stdout


def compare(text: Path, steps: int, dtype: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        ours = [sys.executable, "-P", "-m", "llmfast", "pretrain", "--config", str(CONFIG), "--data", str(text)]
        seconds, _ = timed([*ours, "--steps", str(steps), "--dtype", dtype, "--out", str(run)])
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        loss = [row["loss"] for row in metrics if row["kind"] == "val"][-1]
    peer_seconds, answer = timed([sys.executable, __file__, str(text), "--steps", str(steps), "--peer"])
    return {
        "steps": steps,
        "dtype": dtype,
        "characters": text.stat().st_size,
        "providers": [
            {"name": "llmfast", "seconds": seconds, "validation_loss": loss},
            {"name": "plain PyTorch", "seconds": peer_seconds, "validation_loss": float(answer)},
        ],
        "ratio": peer_seconds / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="llmfast's")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        print(peer(arguments.text, arguments.steps))
        return
    result = compare(arguments.text, arguments.steps, arguments.dtype)
    for provider in result["providers"]:
        print("{name:14} {seconds:7.1f} s   validation loss {validation_loss:.3f}".format(**provider))
    print(f"ratio {result['ratio']:.2f}")
    if arguments.json:
        from llmfast.bench import rows

        command = (
            f"python benchmarks/nanogpt.py {arguments.text.name} --steps {arguments.steps} --dtype {arguments.dtype}"
        )
        rows.append(arguments.json, {**rows.context(command, None, torch.get_num_threads()), **result})


if __name__ == "__main__":
    main()
