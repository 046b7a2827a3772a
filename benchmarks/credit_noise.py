"""Signal to noise of the policy gradient under dpg's ways to pay a token, on one cell's own first step.

    python benchmarks/credit_noise.py 24 task=language       24 batches; words are those of `run`
    python benchmarks/credit_noise.py --table                what was measured

M independent batches of the cell's own size are drawn from the untrained generator, each with its metagradients, and from each the policy
gradient g = (1/tokens) sum of advantage times grad log pi is formed for every contestant. Products of gradients of two batches estimate
||E g||^2 without bias, a gradient's product with itself E ||g||^2; signal to noise is the first over what is left of the second. The
direction is compared with that of the text's reward less the group's mean: <E g, E g'> over both lengths, also from products of different
batches, so that noise makes it neither smaller nor larger in the mean (an estimate can exceed 1). Errors are a jackknife's over batches.
Results are added to benchmarks/credit_noise.json.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_suffix(".json")
REFERENCE = "text, group mean"
DISCOUNTS = (0.9, 0.5, 0.0)
CONTESTANTS = (
    *(REFERENCE, "text, group mean / group std", "token, group", "token, position", "token, critic"),
    *(f"token, position, discount {discount}" for discount in DISCOUNTS),
)


def gradients(batches: int, words: list[str]):
    """(M, parameters) of every contestant."""
    import torch

    from dpgbench import config
    from dpgbench.bench.grpo import advantages
    from dpgbench.bench.token_credit import Baseline, alive, discounted, in_generated_tokens, returns_to_go, token_advantages
    from dpgbench.core.seeds import derive, torch_seeded
    from dpgbench.run.cell import RunContext, _Cell
    from dpgbench.store.run_folder import RunFolder

    torch.set_num_threads(1)
    spec = config.read(["method=dpg", *words], sweep=False).cells[0].spec
    folder = RunFolder.of(Path(tempfile.mkdtemp()), spec)
    folder.path.mkdir(parents=True)
    bench = _Cell(spec, RunContext(folder)).bench
    generator, group, texts_a_step = bench.generator, bench.options.policy.group_size, bench.options.policy.completions
    parameters = [parameter for parameter in generator.model.parameters() if parameter.requires_grad]
    baselines = {kind: Baseline(kind, generator, group, bench.seed("baseline")) for kind in ("group", "position", "critic")}
    found = {name: [] for name in CONTESTANTS}
    for batch in range(batches):
        prompts = [prompt for prompt in bench.prompts(texts_a_step // group, "noise", batch) for _ in range(group)]
        asked = generator.token_ids(prompts)
        with torch_seeded(derive(bench.seed("noise"), batch)):
            ids = generator.write(asked)
        texts = generator.texts_of(ids)
        labels = bench.metagradients(texts, batch, per_token=True).rewards
        credit = in_generated_tokens(labels, texts, ids, generator, bench.world.target_tokenizer)
        there, returns, totals = alive(ids, credit.shape[1]), returns_to_go(credit), credit.sum(1)
        paid = {
            REFERENCE: advantages(totals, group, "batch")[:, None].expand(there.shape),
            "text, group mean / group std": advantages(totals, group, "group")[:, None].expand(there.shape),
        }
        for kind, baseline in baselines.items():
            paid[f"token, {kind}"] = token_advantages(returns, baseline(returns, ids), there, group, "batch")
        for discount in DISCOUNTS:
            nearer = returns_to_go(discounted(credit, discount))
            amounts = token_advantages(nearer, baselines["position"](nearer, ids), there, group, "batch")
            paid[f"token, position, discount {discount}"] = amounts
        log_probs = _log_probs(generator, asked, ids, there)
        for name, amounts in paid.items():
            objective = (amounts * log_probs)[there].sum() / there.sum()
            parts = torch.autograd.grad(objective, parameters, retain_graph=True)
            found[name].append(torch.cat([part.flatten() for part in parts]).double())
        print(f"batch {batch + 1} of {batches}", file=sys.stderr, flush=True)
    return {name: torch.stack(rows) for name, rows in found.items()}


def _log_probs(generator, asked, ids, there):
    """(N, W) of the completions' tokens, from unpadded positions."""
    import torch

    longest, width = max(map(len, asked)), there.shape[1]
    rows, masks = [], []
    for prompt, completion in zip(asked, ids, strict=True):
        left, right = longest - len(prompt), width - len(completion)
        rows.append([0] * left + list(prompt) + list(completion) + [0] * right)
        masks.append([0] * left + [1] * (len(prompt) + len(completion)) + [0] * right)
    rows, masks = torch.tensor(rows), torch.tensor(masks)
    places = (masks.cumsum(1) - 1).clamp(min=0)
    logits = generator.model(input_ids=rows, attention_mask=masks, position_ids=places).logits[:, longest - 1 : -1]
    return logits.log_softmax(-1).gather(2, rows[:, longest:, None])[..., 0]


def summary(rows: dict) -> dict:
    """By contestant: signal to noise and its error, both over the reference's too, and the cosine with the reference's mean."""
    import torch

    def signal(products, keep):
        kept = products[keep][:, keep]
        return float(kept.sum() - kept.diagonal().sum()) / (len(keep) * (len(keep) - 1))

    def ratios(keep):
        out = {}
        own = {name: (signal(products[name, name], keep), float(products[name, name].diagonal()[keep].mean())) for name in rows}
        for name, (length, total) in own.items():
            across = signal(products[name, REFERENCE], keep)
            lengths = length * own[REFERENCE][0]
            cosine = across / math.sqrt(lengths) if length > 0 and lengths > 0 else math.nan
            out[name] = {"snr": length / (total - length), "cosine": cosine}
        for entry in out.values():
            entry["gain"] = entry["snr"] / out[REFERENCE]["snr"]
        return out

    count = len(rows[REFERENCE])
    products = {(one, other): rows[one] @ rows[other].T for one in rows for other in {one, REFERENCE}}
    everything = list(range(count))
    whole = ratios(everything)
    left_out = [ratios([other for other in everything if other != one]) for one in everything]
    for name, entry in whole.items():
        for what in list(entry):
            values = torch.tensor([fold[name][what] for fold in left_out])
            entry[f"{what}_error"] = float(((count - 1) / count * (values - values.mean()).square().sum()).sqrt())
    return whole


def table(stored: dict) -> str:
    lines = ["| cell | batches | contestant | signal / noise | over the first | cosine with the first |", "|---|---|---|---|---|---|"]
    for words, cell in stored.items():
        for name, entry in cell["contestants"].items():
            pairs = [
                f"{entry[what]:.{digits}f} ± {entry[what + '_error']:.{digits}f}"
                for what, digits in (("snr", 3), ("gain", 2), ("cosine", 2))
            ]
            first = f"`{words}` | {cell['batches']}" if name == REFERENCE else " | "
            lines.append(f"| {first} | {name} | " + " | ".join(pairs) + " |")
    return "\n".join(lines)


def main() -> None:
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if sys.argv[1:] != ["--table"]:
        batches, *words = sys.argv[1:]
        stored[" ".join(words)] = {"batches": int(batches), "contestants": summary(gradients(int(batches), words))}
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    print(table(stored))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
